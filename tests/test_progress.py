"""The line that tells how far a run is: what it estimates comes true, and it fits its terminal."""

from __future__ import annotations

import os
import pty
import random
import re
import subprocess
import time
from collections.abc import Iterator

import pytest
from conftest import MIB, Home, write_at
from simulator import Fault, Simulator
from trouble_support import QUICK, add_volume, assert_backed_up, assert_nothing_left

import dosvob

pytestmark = pytest.mark.small

SECONDS = {"s": 1, "min": 60, "h": 3600, "days": 86400}


def seconds(text: str) -> float:
    """What `12 s`, `3:05 min` or `2:03 h` means."""
    number, unit = text.split()
    whole, _, rest = number.partition(":")
    return (float(whole) + float(rest or 0) / 60) * SECONDS[unit]


class Screen:
    """A terminal of so many columns, on which a command runs: what is written to it, and what it then shows."""

    def __init__(self, home: Home, columns: int, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        subprocess.run(["stty", "cols", str(columns)], stdin=theirs, check=True)
        self.written = b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *home.command(*arguments, constants={**QUICK, "LIVE_INTERVAL": 0})],
            cwd=home.directory,
            env=home.environment(COLUMNS="0"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

    def read(self) -> bool:
        """Read what comes next; whether there is something."""
        try:
            data = os.read(self.ours, 65536)
        except OSError:  # EIO: nobody is at the other side any more
            data = b""
        self.written += data
        return bool(data)

    def live(self) -> list[str]:
        """All live lines."""
        return re.findall(r"\r\x1b\[2K([^\r\n]+)(?=\r\x1b)", self.written.decode(errors="replace"))

    def shown(self) -> list[str]:
        """The lines that stay."""
        lines: list[str] = []
        for line in self.written.decode(errors="replace").split("\n"):
            kept = ""
            for part in re.split(r"\r", line):
                kept = part.rpartition("\x1b[2K")[2] if "\x1b[2K" in part else part + kept[len(part) :]
            lines.append(kept)
        return lines


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_live_line_begins_with_what_matters(home: Home, sim: Simulator, columns: int) -> None:
    """However long the name: its beginning and end, the time left, which of several it is; no figure is cut."""
    name = "a-very-long-name-that-somebody-gave-to-a-volume-long-ago-number-7"[:64]
    volumes = [add_volume(sim, name, size=12 * MIB), add_volume(sim, "b")]
    sim.faults.add(Fault("ssh-slow", bytes=3 * MIB))
    screen = Screen(home, columns)
    while screen.read():
        pass
    assert screen.process.wait(60) == 0, screen.written
    assert_backed_up(home, *volumes)
    lines = [line for line in screen.live() if " left" in line]
    assert len(lines) > 3, screen.live()
    for line in lines:
        assert len(line) < columns
        told = re.fullmatch(r"(\S+): ((under |over )?[\d:]+ (s|min) left)(, (\d) of 2)?(, .*)?", line)
        assert told, line
        assert told[6] == ("2" if told[1] == "b" else "1")
        if told[1] != "b":
            start, _, end = told[1].partition("…")
            assert len(start) >= 4
            assert name.startswith(start)
            assert name.endswith(end)
        parts = r"[\d.]+ \w+ of 16.0 MiB scanned|[\d.]+ \w+ fetched( at [\d.]+ \w+/s)?"
        assert re.fullmatch(rf"(, ({parts}))*", told[7] or ""), line
    assert any("scanned" in line for line in lines) == (columns > 40)
    assert any("fetched at" in line for line in lines) == (columns > 80)


def test_an_interrupt_does_not_glue_to_the_live_line(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data", size=12 * MIB)
    sim.faults.add(Fault("ssh-slow", bytes=MIB))
    screen = Screen(home, 80)
    while b"scanned" not in screen.written:
        assert screen.read()
    os.write(screen.ours, b"\x03")
    while screen.read():
        pass
    assert screen.process.wait(60) == 130
    assert b"^C" in screen.written
    assert "SIGINT: stopping, and removing what was created" in [line.strip() for line in screen.shown()]
    assert not [line for line in screen.shown() if "^C" in line or ("scanned" in line and "data: backed" not in line)]
    assert_nothing_left(sim)


def told(home: Home) -> Iterator[tuple[float, str]]:
    """The lines of a run, with the times at which they came, and its end."""
    process = home.start(constants={**QUICK, "LOG_INTERVAL": 0.2})
    assert process.stdout
    for line in process.stdout:
        yield time.monotonic(), line
    assert process.wait(60) == 0


def test_what_is_told_of_a_first_backup_comes_true(home: Home, sim: Simulator) -> None:
    """With data at both ends, which nobody can know: then it is a bound; and the rate is the link's."""
    volume = sim.add_volume("data", size_gib=40)
    for place, size in ((0, 90 * MIB), (40 * 16 * MIB - 30 * MIB, 30 * MIB)):
        write_at(volume.path, place, random.Random(place).randbytes(size))
    sim.faults.add(Fault("ssh-slow", bytes=10 * MIB))
    lines = list(told(home))
    assert_backed_up(home, volume)
    end = next(moment for moment, line in lines if "data: backed up" in line)
    begun = next(moment for moment, line in lines if "scanned" in line)
    found = 0
    for moment, line in lines:
        if match := re.search(r"data: (under |over )?(\S+ \S+) left", line):
            found += 1
            actual, estimated = end - moment, seconds(match[2])
            if match[1] != "over ":
                assert estimated > actual / 2 - 2, (line, actual)
            if match[1] != "under ":
                assert estimated < actual * 2 + 2, (line, actual)
        if (rate := re.search(r"fetched at ([\d.]+) (\w+)/s", line)) and moment - begun > 2:
            assert rate[2] in ("KiB", "MiB"), line
            assert rate[2] == "KiB" or float(rate[1]) < 12, line
    assert found > 5
    assert any("under " in line for _, line in lines), lines
    assert any("over " in line for _, line in lines), lines


def test_what_is_told_of_a_later_backup_comes_true(home: Home, sim: Simulator) -> None:
    """All that changed lies at the end, and is known to be outstanding when all is scanned."""
    volume = sim.add_volume("data", size_gib=8)
    list(told(home))
    sim.limit_snapshots(0)
    write_at(volume.path, 100 * MIB, random.Random(1).randbytes(20 * MIB))
    sim.faults.add(Fault("ssh-slow", bytes=2 * MIB))
    lines = list(told(home))
    assert_backed_up(home, volume)
    end = next(moment for moment, line in lines if "data: backed up" in line)
    scanned = [(moment, line) for moment, line in lines if "128.0 MiB of 128.0 MiB scanned" in line]
    estimates = [(moment, match[1]) for moment, line in scanned if (match := re.search(r"data: (\S+ \S+) left", line))]
    assert len(estimates) > 5
    for moment, text in estimates:
        assert abs(seconds(text) - (end - moment)) < (end - moment) / 2 + 3, (text, end - moment)


def test_sizes_read_as_what_they_are() -> None:
    assert dosvob.human_size(1023) == "1023 B"
    assert dosvob.human_size(1024 * 1024 - 1) == "1.0 MiB"
    assert dosvob.human_size((1 << 30) - (1 << 15)) == "1.0 GiB"
    assert dosvob.human_size(1 << 30) == "1.0 GiB"
