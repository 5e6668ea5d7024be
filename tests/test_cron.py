"""The container's cron, without a container: what it reads, and when it runs what, also where clocks are set."""

from __future__ import annotations

import datetime
import importlib.util
import os
import struct
import subprocess
import sys
import time
import zoneinfo
from pathlib import Path
from types import ModuleType

import pytest
from conftest import SCRIPT

CRON = SCRIPT.parent / ".docker" / "cron.py"


@pytest.fixture(scope="module")
def cron() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("cron", CRON)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["cron"] = module
    spec.loader.exec_module(module)
    return module


def runs(cron: ModuleType, line: str, zone: str, day: str, hours: int = 30) -> list[str]:
    """When a line of a crontab is due from the beginning of a day on: local times with their offsets, to the minute."""
    job, there = cron.parse_job(f"{line} true"), zoneinfo.ZoneInfo(zone)
    start = int(datetime.datetime.fromisoformat(day).replace(tzinfo=there).timestamp()) // 60
    due = [minute for minute in range(start, start + hours * 60) if job.is_due(minute, there)]
    following: list[int] = []
    minute = start - 1
    while len(following) < len(due):
        following.append(minute := job.next_after(minute, there))
    assert following == due
    return [f"{datetime.datetime.fromtimestamp(minute * 60, there):%d %H:%M %z}" for minute in due]


@pytest.mark.parametrize(
    ("line", "zone", "day", "expected"),
    [
        # the clock goes from 02:00 to 03:00
        ("30 2 * * *", "Europe/Berlin", "2026-03-29", ["29 03:00 +0200", "30 02:30 +0200"]),
        ("5,30 2 * * *", "Europe/Berlin", "2026-03-29", ["29 03:00 +0200", "30 02:05 +0200", "30 02:30 +0200"]),
        ("0 3 * * *", "Europe/Berlin", "2026-03-29", ["29 03:00 +0200", "30 03:00 +0200"]),
        ("0 2/6 * * *", "Europe/Berlin", "2026-03-29",
         ["29 03:00 +0200", "29 08:00 +0200", "29 14:00 +0200", "29 20:00 +0200", "30 02:00 +0200"]),
        # from 03:00 back to 02:00
        ("30 2 * * *", "Europe/Berlin", "2026-10-25", ["25 02:30 +0200", "26 02:30 +0100"]),
        ("0 2 * * *", "Europe/Berlin", "2026-10-25", ["25 02:00 +0200", "26 02:00 +0100"]),
        ("0 3 * * *", "Europe/Berlin", "2026-10-25", ["25 03:00 +0100", "26 03:00 +0100"]),
        # half an hour: from 02:00 to 02:30, and back
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-04", ["04 02:30 +1100", "05 02:15 +1100"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-05", ["05 01:45 +1100", "06 01:45 +1030"]),
        # from midnight to one o'clock: on that day
        ("30 0 * * *", "Africa/Cairo", "2026-04-24", ["24 01:00 +0300", "25 00:30 +0300"]),
        ("0 4 * * *", "UTC", "2026-03-29", ["29 04:00 +0000", "30 04:00 +0000"]),
    ],
)  # fmt: skip
def test_where_clocks_are_set(cron: ModuleType, line: str, zone: str, day: str, expected: list[str]) -> None:
    """What is skipped runs right after the jump, what comes twice runs once."""
    assert runs(cron, line, zone, day) == expected


@pytest.mark.parametrize(("day", "hours"), [("2026-03-29", 23), ("2026-10-25", 25)])
@pytest.mark.parametrize(("line", "count"), [("0 * * * *", 1), ("*/15 * * * *", 4)])
def test_what_is_due_every_hour_goes_on(cron: ModuleType, line: str, count: int, day: str, hours: int) -> None:
    """As if no clock were set."""
    assert len(runs(cron, line, "Europe/Berlin", day, hours)) == hours * count


@pytest.mark.parametrize(
    "text", ["@daily\tpython dosvob.py\n", "@daily \t python dosvob.py\n", "\ufeff@daily python dosvob.py\n",
             "\ufeff0\t0 * *\t*\tpython dosvob.py\r\n"]
)  # fmt: skip
def test_what_editors_write_is_read(cron: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "crontab").write_bytes(text.encode())
    (job,) = cron.read_crontab(tmp_path / "crontab")
    assert (job.command, sorted(job.times)) == ("python dosvob.py", [0])


def time_zone(directory: Path, change: int, before: int, after: int) -> None:
    """A time zone Test whose clock is set at a moment, from one offset to another, in seconds."""
    kinds = struct.pack(">lbb", before, 0, 0) + struct.pack(">lbb", after, 0, 4)
    for version in (1, 2):
        head = struct.pack(">4sc15x6l", b"TZif", b"2", 0, 0, 0, 1, 2, 8)
        body = struct.pack(">l" if version == 1 else ">q", change) + b"\1" + kinds + b"OLD\0NEW\0"
        with (directory / "Test").open("ab") as file:
            file.write(head + body)
    with (directory / "Test").open("ab") as file:
        file.write(b"\n\n")


def test_a_jump_of_the_clock_while_it_runs(tmp_path: Path) -> None:
    """The process as it is, in a zone whose clock is set forward by an hour at the next minute."""
    change = int(time.time() + 30) // 60 * 60 + 60  # in which it has started, on a slow machine too
    time_zone(tmp_path, change, 0, 3600)
    skipped = datetime.datetime.fromtimestamp(change + 1800, datetime.UTC)
    (tmp_path / "crontab").write_text(f"0 0 1 1 * true\n{skipped.minute} {skipped.hour} * * *\techo made up for\n")
    (tmp_path / "backups").mkdir()
    environment = {**os.environ, "TZ": "Test", "PYTHONTZPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(CRON)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = ""
    while said.count("cron: next at ") < 2 and (line := process.stdout.readline()):  # before the jump, and after it
        said += line
    process.terminate()
    said += process.communicate(timeout=60)[0]
    assert said.count("\nmade up for\n") == 1, said
    at = datetime.datetime.fromtimestamp(change, zoneinfo.ZoneInfo("UTC")) + datetime.timedelta(hours=1)
    assert f"cron: next at {at:%Y-%m-%dT%H:%M}+01:00" in said
