"""The line that tells how far a run is: what it estimates comes true, and it fits its terminal."""

from __future__ import annotations

import itertools
import os
import pty
import random
import re
import subprocess
import types
from collections.abc import Iterator
from typing import cast

import pytest
from conftest import MIB, Home, write_at
from simulator import Fault, Simulator
from trouble_support import QUICK, add_volume, assert_backed_up, assert_nothing_left, run

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

    def end(self) -> int:
        """Read to the command's end; returns its exit code."""
        while self.read():
            pass
        return self.process.wait(60)

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
    assert screen.end() == 0, screen.written
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


@pytest.mark.parametrize("columns", [60, 160])
def test_the_live_line_tells_of_both_that_are_synced(home: Home, sim: Simulator, columns: int) -> None:
    volumes = [add_volume(sim, name, offset=0, size=12 * MIB) for name in ("a-name-that-is-rather-long", "b")]
    run(home)
    sim.limit_snapshots(0)
    for volume, size in zip(volumes, (12, 8), strict=True):  # the first one goes on when the second one is done
        write_at(volume.path, 0, random.Random(1).randbytes(size * MIB))
    sim.faults.add(Fault("ssh-slow", bytes=2 * MIB))  # slow enough that they meet, on a slow machine too
    screen = Screen(home, columns)
    assert screen.end() == 0, screen.written
    assert_backed_up(home, *volumes)
    both = [line for line in screen.live() if line.count(" left") == 2]
    assert len(both) > 3, screen.live()
    for line in both:
        assert len(line) < columns
        parts = sorted(line.split(" | "))
        assert [part[:2] for part in parts] == ["a-", "b:"]
        assert any("of 2, " in part for part in parts) == (columns == 160), line
    assert [line for line in screen.live() if " | " not in line and " left" in line]  # after that
    assert not [line for line in screen.shown() if "scanned" in line]


def test_an_interrupt_does_not_glue_to_the_live_line(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data", size=12 * MIB)
    sim.faults.add(Fault("ssh-slow", bytes=MIB))
    screen = Screen(home, 80)
    while b"scanned" not in screen.written:
        assert screen.read()
    os.write(screen.ours, b"\x03")
    assert screen.end() == 130
    assert b"^C" in screen.written
    assert "SIGINT: stopping, and removing what was created" in [line.strip() for line in screen.shown()]
    assert not [line for line in screen.shown() if "^C" in line or ("scanned" in line and "data: backed" not in line)]
    assert_nothing_left(sim)


class Modelled(dosvob.Conversation):
    """A sync of a volume of which so many chunks in turn have changed (or are data), or have not.

    300 are scanned in a second, and 10 fetched, at the same time in a later sync.
    """

    verb = dosvob.Pull.verb

    def __init__(self, *runs: tuple[int, bool], is_first: bool) -> None:
        super().__init__(sum(count for count, _ in runs), 64)
        self.is_first = is_first
        self.clock, self.link = 1000.0, 0  # seconds, and bytes received
        self._runs = runs

    def steps_of_time(self) -> Iterator[None]:
        """Do all of it, and pause after each chunk."""
        free_at = self.clock  # when the link has taken what there is for it
        for has_changed in itertools.chain.from_iterable([changed] * count for count, changed in self._runs):
            free_at = max(self.clock, free_at) + has_changed / 10
            if self.is_first:
                self.clock = max(free_at, self.clock + 1 / 300)
                self.fetched += has_changed
            else:
                self.clock += 1 / 300
                self.outstanding += has_changed
                self._fetch_until(free_at)
            self.position += 1
            self.link = self.fetched * MIB
            yield
        while self.outstanding:
            self.clock += 1 / 10
            self._fetch_until(free_at)
            self.link = self.fetched * MIB
            yield

    def _fetch_until(self, free_at: float) -> None:
        """Finish what has come by now, if the link is free then."""
        waiting = max(round((free_at - self.clock) * 10), 0)
        self.fetched += self.outstanding - waiting
        self.outstanding = waiting


def told(modelled: Modelled, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[float, str]]:
    """What is told at each step, and how many seconds before the end."""
    lines: list[tuple[float, str]] = []
    shown = types.SimpleNamespace(progress=lambda tell: lines.append((modelled.clock, tell())))
    monkeypatch.setattr(dosvob, "time", types.SimpleNamespace(monotonic=lambda: modelled.clock))
    course = dosvob.Course(cast("dosvob.Reporter", shown), dosvob.Stop(), "data", "", modelled)
    for _ in modelled.steps_of_time():
        course(modelled.link)
    return ((modelled.clock - moment, line) for moment, line in lines)


def test_what_is_told_of_a_first_backup_comes_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """With data at both ends, which nobody can know: then it is a bound; and the rate is the link's."""
    modelled, words = Modelled((500, True), (30_000, False), (500, True), is_first=True), set()
    for left, line in told(modelled, monkeypatch):
        if match := re.search(r"data: (under |over )?(\S+ \S+) left", line):
            words.add(match[1])
            estimated = seconds(match[2])
            if match[1] != "over ":
                assert estimated > left / 2 - 2, (line, left)
            if match[1] != "under ":
                assert estimated < left * 2 + 2, (line, left)
        if rate := re.search(r"fetched at ([\d.]+) (\w+)/s", line):
            assert rate[2] in ("B", "KiB") or (rate[2] == "MiB" and float(rate[1]) < 12), line
    assert {"under ", "over "} <= words


def test_what_is_told_of_a_later_backup_comes_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that changed lies at the end, and is known to be outstanding when all is scanned."""
    modelled, estimates = Modelled((2_000, False), (200, True), is_first=False), 0
    for left, line in told(modelled, monkeypatch):
        if "2.1 GiB of 2.1 GiB scanned" in line and (match := re.search(r"data: (\S+ \S+) left", line)):
            estimates += 1
            assert abs(seconds(match[1]) - left) < left / 2 + 3, (line, left)
    assert estimates > 150


def test_the_time_left_is_told_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though most of the time nothing waits to be fetched."""
    modelled = Modelled(*[(100, False), (1, True)] * 200, is_first=False)
    lines = [line for left, line in told(modelled, monkeypatch) if left < 50]
    assert len(lines) > 10_000
    assert all(" left" in line for line in lines)


def test_sizes_read_as_what_they_are() -> None:
    assert dosvob.human_size(1023) == "1023 B"
    assert dosvob.human_size(1024 * 1024 - 1) == "1.0 MiB"
    assert dosvob.human_size((1 << 30) - (1 << 15)) == "1.0 GiB"
    assert dosvob.human_size(1 << 30) == "1.0 GiB"
