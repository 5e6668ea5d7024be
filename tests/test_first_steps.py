"""What a user meets first, and what the script tells: old Pythons, missing packages, wrong words, waiting, the end.

And whose leftovers are whose, where two directories back up one account.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import math
import os
import pty
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, SCRIPT, Home, same, write_at
from pythons import python_3
from simulator import FOREVER, Droplet, Fault, Resource, Simulator, Snapshot, Volume
from trouble_support import (
    QUICK,
    add_volume,
    answered,
    assert_backed_up,
    assert_nothing_left,
    run,
    start,
    until,
)

pytestmark = pytest.mark.small

PAGE = 4096
WAIT = 10  # seconds that a snapshot comes too soon, at the time a run is started: more than it needs to get there
VARIABLES = ("DIGITALOCEAN_ACCESS_TOKEN", "DIGITALOCEAN_TOKEN")


# ── What the tests ask


def words(value: object) -> str:
    """A test's parameter for its name: a command line as it is typed."""
    return " ".join(value) or "no arguments" if isinstance(value, tuple) else str(value)


def listing(directory: Path) -> dict[str, bytes]:
    """All files below a directory, but for those of the lock, with their content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one error that was told, without a traceback, and with a line of advice at most."""
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    return errors[0]


def refused(home: Home, *arguments: str, code: int = 2, **variables: Any) -> str:
    """Run the script, which ends with one error and has made nothing but perhaps its own directory; returns it."""
    done = home.run(*arguments, expect=code, **variables)
    assert {request.method for request in home.simulator.requests} <= {"GET"}
    made = {path.relative_to(home.directory).parts for path in home.directory.rglob("*")}
    assert {parts for parts in made if parts[:2] != ("backups", ".dosvob")} <= {("conf.json",), ("backups",)}
    assert home.simulator.token not in done.stdout + done.stderr
    return error_of(done)


def lines_with(output: str, *words: str) -> list[str]:
    """The lines that have all these words."""
    return [line for line in output.splitlines() if all(word in line for word in words)]


def cell(output: str, volume: str, column: str) -> str:
    """What the table at the end has for a volume."""
    lines = [line.partition(" ")[2].strip() for line in output.splitlines()]  # without the time
    head = next(line for line in lines if line.startswith("VOLUME")).split()
    row = next(cells for line in lines if (cells := re.split(" {2,}", line))[0] == volume and len(cells) >= len(head))
    return row[head.index(column)]


# ── The Python that it is run with


def run_bare(home: Home, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, in the user's directory, where it changes nothing."""
    before = listing(home.directory)
    done = subprocess.run(
        command,
        cwd=home.directory,
        env=home.environment(PYTHONDONTWRITEBYTECODE=""),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert listing(home.directory) == before
    assert {path.name for path in home.directory.iterdir()} == {"conf.json"}
    assert not home.simulator.requests
    return done


def assert_python_refused(done: subprocess.CompletedProcess[str], version: str) -> None:
    """One line says what is needed, what this is, and what to do."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Python 3.11" in done.stderr
    assert version in done.stderr.replace("3.11", "")
    assert re.search(r"install|python3\.\d|uv run|run it with", done.stderr.replace("Python 3.11", ""))


@pytest.mark.parametrize("arguments", [(), ("--version",), ("health",)], ids=words)
@pytest.mark.parametrize("minor", [8, 9, 10])
@pytest.mark.beyond_bare
def test_an_older_python_is_told_which_one_is_needed(home: Home, minor: int, arguments: tuple[str, ...]) -> None:
    python = python_3(minor)
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    done = run_bare(home, [python, str(SCRIPT), *arguments])
    assert_python_refused(done, f"3.{minor}")
    assert done.stdout == ""


def test_an_older_python_can_read_the_script() -> None:
    """Else it tells of a wrong syntax, instead of itself."""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))


PRETENDING = """
import collections, pkgutil, runpy, sys, typing
fields = "major minor micro releaselevel serial"
sys.version_info = collections.namedtuple("version_info", fields)(3, 7, 5, "final", 0)
sys.version, sys.hexversion = "3.7.5 (default)", 0x030705F0
sys.argv = sys.argv[1:]
had = set(sys.modules)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*sorted(set(sys.modules) - had))
"""


def test_an_older_python_is_refused_before_anything_is_imported(home: Home) -> None:
    """What is imported may not exist there, or have other contents."""
    done = run_bare(home, [sys.executable, "-c", PRETENDING, str(SCRIPT), "--version"])
    assert_python_refused(done, "3.7")
    imported = set(done.stdout.split())
    assert not imported & {"argparse", "concurrent.futures", "dataclasses", "json", "paramiko", "requests", "ssl"}


def requirements() -> dict[str, str]:
    """What the script declares to need, by package."""
    block = re.search(r"(?m)^# /// script\n((?:^#.*\n)+?)^# ///$", SCRIPT.read_text())
    assert block
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    return {re.split(r"[^\w-]", text)[0]: text for text in metadata["dependencies"]}


def assert_package_asked_for(done: subprocess.CompletedProcess[str], *packages: str) -> None:
    """One line names one of the packages, and the command that installs it, to be pasted into a shell."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    about, _, command = done.stderr.rpartition("pip install")
    assert any(package in about for package in packages), done.stderr
    assert {requirements()[package] for package in packages} & set(shlex.split(command)), done.stderr


@pytest.mark.parametrize("package", ["requests", "paramiko"])
def test_a_package_that_is_missing_is_named_with_what_installs_it(home: Home, package: str) -> None:
    without = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = sys.argv[1:]"
    program = f"{without}; runpy.run_path(sys.argv[0], run_name='__main__')"
    assert_package_asked_for(run_bare(home, [sys.executable, "-c", program, str(SCRIPT)]), package)


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("sweep",)], ids=words)
def test_a_python_without_any_packages_is_told_what_to_install(home: Home, arguments: tuple[str, ...]) -> None:
    done = run_bare(home, [sys.executable, "-I", "-S", str(SCRIPT), *arguments])
    assert_package_asked_for(done, "requests", "paramiko")


def test_a_package_that_is_missing_is_told_where_the_current_directory_is_gone(tmp_path: Path) -> None:
    command = f"mkdir gone && cd gone && rmdir ../gone && {shlex.join([sys.executable, '-I', '-S', str(SCRIPT)])}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert_package_asked_for(done, "requests", "paramiko")


def test_what_works_offline_needs_python_alone(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """On the day of the disaster there may be nothing else."""
    volume = add_volume(sim, "data")
    run(home)
    bare = [sys.executable, "-I", "-S", str(SCRIPT), "--backups", str(home.backups)]
    restored = tmp_path / "restored"
    for words in (["list"], ["list", "--json"], ["verify"], ["health"], ["restore", "data", str(restored)]):
        done = subprocess.run([*bare, *words], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), (words, done)
    assert same(restored, volume.path)


def test_what_works_offline_does_not_load_what_it_does_not_need(home: Home) -> None:
    """Which takes longer than all else that it does."""
    program = "import dosvob, sys; dosvob.main(sys.argv[1:]); print(*sorted(sys.modules))"
    home.backups.mkdir()
    command = [sys.executable, "-c", program, "list", "--backups", str(home.backups)]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60, check=False)
    assert "json" in done.stdout.split()
    assert not {"requests", "paramiko", "cryptography", "urllib3"} & set(done.stdout.split())


# ── Too soon after the last snapshot


def refusals(sim: Simulator, volume: Volume) -> int:
    """How often a snapshot of the volume came too soon."""
    path = f"/v2/volumes/{volume.id}/snapshots"
    return sum((r.method, r.path, r.status) == ("POST", path, 429) for r in sim.requests)


def taken(sim: Simulator, volume: Volume) -> list[Snapshot]:
    """The snapshots that were taken of the volume, the oldest first."""
    return [item for item in sim.ever if isinstance(item, Snapshot) and item.volume_id == volume.id]


def make_too_soon(sim: Simulator, volumes: Iterable[Volume]) -> int:
    """Let each of these volumes' next snapshot come too soon for WAIT seconds at least; returns the interval."""
    interval = math.ceil(time.monotonic() - min(volume.snapshotted for volume in volumes)) + WAIT
    sim.limit_snapshots(interval)
    return interval


def clock_times(moment: float) -> set[str]:
    """The hour and minute of a time, in UTC, however it is rounded."""
    return {
        datetime.datetime.fromtimestamp(moment + seconds, datetime.UTC).strftime("%H:%M") for seconds in range(-2, 61)
    }


@pytest.mark.parametrize("error", [1, -2], ids=["our clock is right", "we are early"])
def test_too_soon_is_one_line_with_the_time_when_the_state_knows_it(home: Home, sim: Simulator, error: int) -> None:
    """For each volume; the others are backed up first, and all are in the end."""
    early = [add_volume(sim, name) for name in ("a-early", "b-early")]
    run(home)
    other = add_volume(sim, "c-other")
    interval = make_too_soon(sim, early) + error  # the state's times are whole seconds
    before = [taken(sim, volume)[-1].created for volume in early]
    done = run(home, constants={"SNAPSHOT_INTERVAL": interval, "LOG_INTERVAL": 3600}, TZ="UTC")
    for volume, last in zip(early, before, strict=True):
        lines = lines_with(done.stdout + done.stderr, volume.name, "snapshot")
        assert len(lines) == 1, done.stdout
        told = lines[0].partition(" ")[2]  # without the line's own time
        assert any(text in told for text in clock_times(int(last) + interval)), told
        if error > 0:
            assert refusals(sim, volume) <= 2  # it is known when to ask
    assert "trying again in" not in done.stdout + done.stderr
    assert done.stdout.index("c-other: backed up") < done.stdout.index("a-early: backed up")
    assert [len(taken(sim, volume)) for volume in early] == [2, 2]
    assert_backed_up(home, *early, other)
    assert_nothing_left(sim)


@pytest.mark.parametrize("retry_after", [False, True], ids=["no word when", "retry-after"])
def test_too_soon_is_one_line_when_somebody_else_took_the_last_snapshot(
    home: Home, sim: Simulator, retry_after: bool
) -> None:
    early, other = add_volume(sim, "a-early"), add_volume(sim, "b-other")
    sim.limit_snapshots(WAIT if retry_after else 4, retry_after=retry_after)
    early.snapshotted = time.monotonic() + (0 if retry_after else 1000)  # until it is asked for
    running = start(home, constants={"SNAPSHOT_INTERVAL": WAIT + 2 if retry_after else 6, "LOG_INTERVAL": 3600})
    until(lambda: refusals(sim, early) or running.process.poll() is not None)
    if not retry_after:
        early.snapshotted = time.monotonic()
    assert running.end() == 0, running.output
    lines = lines_with(running.output, "a-early", "snapshot")
    assert len(lines) == 1, running.output
    if retry_after:
        assert re.search(r"\b\d\d:\d\d\b", lines[0].partition(" ")[2]), lines[0]
    assert "trying again in" not in running.output
    assert running.output.index("b-other: backed up") < running.output.index("a-early: backed up")
    assert_backed_up(home, early, other)
    assert_nothing_left(sim)


def seconds_left(lines: Iterable[str]) -> list[int]:
    """The seconds of a countdown to the volume's next snapshot, as they were told."""
    told = [re.search(r"\b(\d+) s\b", line) for line in lines if "data" in line and "snapshot" in line]
    return [int(match[1]) for match in told if match]


def assert_counts_down(counted: list[int]) -> None:
    """The seconds get fewer and fewer, down to few."""
    assert counted == sorted(counted, reverse=True)
    assert len(set(counted)) >= 3, counted
    assert counted[0] <= WAIT + 2
    assert counted[-1] <= 2


def test_a_log_has_a_line_now_and_then_while_a_snapshot_is_waited_for(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    run(home)
    interval = make_too_soon(sim, [volume]) + 1
    done = run(home, constants={"SNAPSHOT_INTERVAL": interval, "LOG_INTERVAL": 0})
    assert_counts_down(seconds_left(line.partition(" ")[2] for line in done.stdout.splitlines()))
    assert "trying again in" not in done.stdout


def read_terminal(descriptor: int) -> bytes:
    """What is shown next; nothing at its end."""
    with contextlib.suppress(OSError):  # EIO: nobody is at the other side any more
        return os.read(descriptor, 65536)
    return b""


def test_a_terminal_counts_down_in_its_live_line_until_the_snapshot(home: Home, sim: Simulator) -> None:
    """What stays on the screen is one line, with the time."""
    volume = add_volume(sim, "data")
    run(home)
    interval = make_too_soon(sim, [volume]) + 1
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "110"], stdin=theirs, check=True)
    with subprocess.Popen(
        home.command(constants={**QUICK, "SNAPSHOT_INTERVAL": interval, "LIVE_INTERVAL": 0}),
        cwd=home.directory,
        env=home.environment(COLUMNS="0"),  # which would count for more than the terminal's own width
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b"".join(iter(lambda: read_terminal(ours), b"")).decode()
    os.close(ours)
    assert process.returncode == 0, shown
    assert_counts_down(seconds_left(re.findall(r"\r\x1b\[2K([^\r\n]+)(?=\r\x1b)", shown)))
    kept = [line.rpartition("\x1b[2K")[2] for line in shown.split("\r\n")]
    about = [line for line in kept if "data" in line and "snapshot" in line]
    assert len(about) == 1, kept
    assert re.search(r"\d\d:\d\d", about[0])
    assert "trying again in" not in shown


# ── Names of volumes and of commands


@pytest.mark.parametrize(
    ("key", "patterns", "unfit"), [("include", ["data", "db-*"], "db-*"), ("exclude", ["old-disk", "web"], "old-disk")]
)
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)], ids=words)
def test_a_pattern_of_the_configuration_that_fits_nothing_is_a_warning(
    home: Home, sim: Simulator, key: str, patterns: list[str], unfit: str, arguments: tuple[str, ...]
) -> None:
    """A volume was deleted: that is no reason not to back up the others."""
    data, web = add_volume(sim, "data"), add_volume(sim, "web")
    home.configure(**{key: patterns})
    done = run(home, *arguments)
    (warning,) = lines_with(done.stderr, "warning: ")
    assert f'"{key}"' in warning
    assert f'"{unfit}"' in warning
    assert "web" not in re.findall(r"(\S+): backed up|would back up (\S+),", done.stdout)
    if not arguments:
        assert_backed_up(home, data)
        assert not home.image(web.name).exists()


def test_an_include_that_fits_nothing_at_all_is_an_error(home: Home, sim: Simulator) -> None:
    """Nothing would be backed up."""
    add_volume(sim, "data")
    home.configure(include=["dta"])
    done = home.run(expect=2)
    assert '"dta"' in done.stderr
    assert '"include"' in done.stderr
    assert lines_with(done.stderr, "error: ")
    assert {request.method for request in sim.requests} == {"GET"}


def test_a_name_on_the_command_line_that_fits_nothing_is_an_error(home: Home, sim: Simulator) -> None:
    """Also beside one that does."""
    add_volume(sim, "data")
    for arguments in (("archive",), ("data", "archive"), ("--dry-run", "archive-*")):
        assert f'"{arguments[-1]}"' in refused(home, *arguments)


def test_a_name_that_a_volume_of_another_region_has_is_told_where_that_is(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    sim.add_volume("archive", region="sgp1")
    sim.add_volume("unrelated", region="tor1")
    error = refused(home, "archive")
    assert '"archive"' in error
    assert "sgp1" in error
    assert "tor1" not in error


@pytest.mark.parametrize(
    ("word", "command"),
    [("swep", "sweep"), ("verfy", "verify"), ("helth", "health"), ("restor", "restore"), ("lst", "list")],
)
def test_a_command_that_is_misspelt_is_told_which_one_may_be_meant(
    home: Home, sim: Simulator, word: str, command: str
) -> None:
    add_volume(sim, "data")
    error = refused(home, word)
    assert f'"{word}"' in error
    assert re.search(rf"did you mean .*\b{command}\b", error)


def test_a_volume_may_be_called_nearly_as_a_command(home: Home, sim: Simulator) -> None:
    add_volume(sim, "swep")
    assert "would back up swep," in run(home, "--dry-run", "swep").stdout


# ── A wrong token


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("sweep",)], ids=words)
def test_a_wrong_token_of_the_file_is_a_wrong_configuration(
    home: Home, sim: Simulator, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    add_volume(sim, "data")
    home.configure(do_token="dop_v1_0123")
    mine = tmp_path / "mine.json"
    (home.directory / "conf.json").rename(mine)
    error = refused(home, "--config", str(mine), *arguments)
    assert "401" in error or "Unable to authenticate" in error
    assert "mine.json" in error


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("sweep",)], ids=words)
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_wrong_token_of_the_environment_is_told_with_the_variable(
    home: Home, sim: Simulator, variable: str, arguments: tuple[str, ...]
) -> None:
    """The one in the file would do, but the environment goes before it."""
    add_volume(sim, "data")
    variables: Any = {variable: "dop_v1_0123"}
    error = refused(home, *arguments, **variables)
    assert re.search(rf"\b{variable}\b", error)


def test_of_two_wrong_tokens_the_one_that_was_used_is_told(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    variables: Any = dict.fromkeys(VARIABLES, "dop_v1_0123")
    error = refused(home, **variables)
    assert VARIABLES[0] in error
    assert VARIABLES[1] not in error


@pytest.mark.parametrize("path", ["/snapshots$", "^/v2/droplets$", "^/v2/volumes$"])
def test_a_token_that_is_refused_in_the_middle_is_a_failure(home: Home, sim: Simulator, path: str) -> None:
    """Something was created by then."""
    add_volume(sim, "data")
    fault = Fault("error", "POST", path, status=401, text="Unable to authenticate you", times=FOREVER)
    sim.faults.add(fault)
    done = run(home, expect=1)
    assert "401" in done.stderr
    assert_nothing_left(sim)


def test_a_token_that_is_revoked_in_the_middle_is_a_failure(home: Home, sim: Simulator) -> None:
    """And what could not be removed is named."""
    add_volume(sim, "data")
    sim.faults.add(Fault("never-active"))
    running = start(home, constants={"LIMIT": 0.5, "BUSY_LIMIT": 0.5})
    until(lambda: sim.droplets)
    sim.revoke_token()
    assert running.end() == 1, running.output
    assert "LEFT BEHIND" in running.output
    sim.revoke_token(False)
    run(home, "sweep")
    assert_nothing_left(sim)


# ── Nobody is there


@pytest.fixture
def unreachable(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an API that cannot be reached, in the way that the parameter says."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen(64)
        yield "https://api.invalid" if request.param == "unknown" else f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("unreachable", ["closed", "silent", "unknown"], indirect=True)
def test_a_dry_run_without_a_network_ends_soon(home: Home, unreachable: str) -> None:
    """Somebody sits before it. Thirty seconds are promised, and twice as many are for a slow machine."""
    done = home.run("--dry-run", expect=1, timeout=60, DIGITALOCEAN_API_URL=unreachable)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    error = error_of(done)
    assert "DigitalOcean" in error or unreachable.partition("//")[2] in error
    assert len(error) < 400


# ── Nothing to do, and options that do nothing


def test_verify_with_nothing_to_verify_says_so_and_fails(home: Home) -> None:
    home.backups.mkdir()
    done = home.run("verify", expect=1)
    assert re.search(r"nothing.* verif", error_of(done))


def test_a_dry_sweep_with_nothing_to_do_says_so(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    done = home.run("sweep", "--dry-run")
    assert len(lines_with(done.stdout, "nothing")) == 1, done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("verify", "--dry-run"), "--dry-run"),
        (("--dry-run", "verify"), "--dry-run"),
        (("verify", "--reread"), "--reread"),
        (("verify", "--max-age", "3"), "--max-age"),
        (("health", "--reread"), "--reread"),
        (("health", "data", "--reread"), "--reread"),
        (("health", "--dry-run"), "--dry-run"),
        (("sweep", "--max-age", "3"), "--max-age"),
        (("sweep", "--max-age", "24"), "--max-age"),
        (("sweep", "--reread"), "--reread"),
        (("--max-age", "3"), "--max-age"),
        (("data", "--max-age=24"), "--max-age"),
        (("--all",), "--all"),
        (("verify", "--all"), "--all"),
        (("health", "--all"), "--all"),
    ],
    ids=words,
)
def test_an_option_that_the_command_does_not_use_is_refused(
    home: Home, sim: Simulator, arguments: tuple[str, ...], option: str
) -> None:
    """Whoever gives it expects something of it."""
    add_volume(sim, "data")
    run(home)
    calls, before = len(sim.requests), listing(home.directory)
    done = home.run(*arguments, expect=2)
    assert "Traceback" not in done.stderr
    assert option in done.stderr.splitlines()[-1]
    assert done.stdout == ""
    assert len(sim.requests) == calls
    assert listing(home.directory) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config", "conf.json", "--backups", "backups", "--dry-run", "--reread", "--verbose"),
        ("data", "--dry-run", "--quiet"),
        ("sweep", "--config", "conf.json", "--backups", "backups", "--verbose"),
        ("sweep", "--dry-run", "--quiet"),
        ("sweep", "--all", "--dry-run"),
        ("sweep", "--all"),
        ("verify", "data", "--backups", "backups", "--quiet"),
        ("verify", "--verbose"),
        ("health", "data", "--backups", "backups", "--max-age", "3", "--quiet"),
        ("health", "--verbose"),
        ("health", "--config", "conf.json"),
        ("verify", "--config", "conf.json"),
    ],
    ids=words,
)
def test_an_option_that_the_command_uses_is_taken(home: Home, sim: Simulator, arguments: tuple[str, ...]) -> None:
    add_volume(sim, "data")
    run(home)
    assert run(home, *arguments).stderr == ""


# ── How a run ends


def test_a_good_run_ends_by_saying_that_nothing_is_left(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    done = run(home)
    assert [line for line in done.stdout.splitlines()[-3:] if "nothing" in line and "left" in line], done.stdout


STALLING_PYTHON = """#!/usr/bin/python3
import os, subprocess, sys
command = ["/usr/bin/python3", *sys.argv[1:]]
if os.path.exists({stalled!r}):
    os.execv(command[0], command)
agent = subprocess.Popen(command, stdout=subprocess.PIPE)
left = {after_bytes}
while left and (data := os.read(agent.stdout.fileno(), min(left, 65536))):
    os.write(1, data)
    left -= len(data)
if not left:
    os.mkdir({stalled!r})
sys.exit(agent.wait())
"""


def test_a_run_that_is_interrupted_says_how_far_it_got(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """Which volumes are complete, which goes on next time, which were not begun, and how to see that."""
    small, large = 64 << 10, 12 << 20
    volumes = [
        add_volume(sim, name, size=size) for name, size in (("alpha", small), ("bravo", large), ("carol", small))
    ]
    stalled, python = tmp_path / "stalled", tmp_path / "python3"
    python.write_text(STALLING_PYTHON.format(stalled=str(stalled), after_bytes=6 << 20))  # which alpha never sends
    python.chmod(0o700)
    sim.faults.add(Fault("python", text=str(python)))
    running = start(home)
    until(lambda: stalled.exists() or running.process.poll() is not None)
    running.signal(signal.SIGINT)
    assert running.end() == 128 + signal.SIGINT, running.output
    assert_nothing_left(sim)
    assert home.image("alpha").exists()
    assert home.image("bravo.partial").exists()
    said = running.output.partition("stopping")[2].splitlines()
    for name, state in (("alpha", r"\bcomplete"), ("bravo", r"\bgo(es)? on\b"), ("carol", r"\bnot begun\b")):
        assert [line for line in said if name in line and re.search(state, line)], (name, running.output)
    assert [line for line in said if re.search(r"dosvob\.py (health|list|verify|--dry-run)\b", line)], running.output
    run(home)
    assert_backed_up(home, *volumes)


@pytest.mark.parametrize(("count", "volumes"), [(1, "1 volume"), (2, "2 volumes")])
def test_what_is_removed_at_the_end_is_counted(home: Home, sim: Simulator, count: int, volumes: str) -> None:
    for number in range(count):
        add_volume(sim, f"data-{number}")
    lines = lines_with(run(home).stdout, "removing ")
    assert len(lines) == 1, lines
    for words in ("1 SSH key", "1 droplet", volumes):
        assert re.search(rf"\b{words}\b", lines[0]), lines[0]


@pytest.mark.parametrize(("count", "least"), [(1, 0.02), (2, 0.03)])
def test_the_cost_has_the_least_that_digitalocean_charges(home: Home, sim: Simulator, count: int, least: float) -> None:
    """A cent for each droplet and for each snapshot, however short their life."""
    for number in range(count):
        add_volume(sim, f"data-{number}")
    told = re.search(r"\$(\d+(\.\d+)?)", lines_with(run(home).stdout, "cost", "$")[-1])
    assert told
    assert least <= float(told[1]) < least + 0.02


# ── What changed


def test_what_was_written_to_an_image_here_is_told_with_its_likely_causes(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    run(home)
    image = home.image("data")
    position = 4 * MIB + 7
    with image.open("rb") as file:
        file.seek(position)
        (byte,) = file.read(1)
    was = image.stat().st_mtime_ns
    write_at(image, position, bytes([byte ^ 1]))
    os.utime(image, ns=(was, was + 1_000_000_000))
    done = run(home)
    (warning,) = lines_with(done.stderr, "warning: ")
    assert "differs from what was recorded" in warning
    written = re.search(r"mounted .*\bwriting\b", warning)
    assert written, warning
    assert re.search(r"\bdisk\b", warning[written.end() :]), warning
    assert_backed_up(home, volume)
    assert run(home).stderr == ""


def test_changed_counts_the_pages_that_differ(home: Home, sim: Simulator) -> None:
    """Not the chunks of 1 MiB that they are in, also where the image has nothing but zeros."""
    volume = sim.add_volume("data", size_gib=2)
    run(home)
    for chunk in range(1, 31):
        write_at(volume.path, chunk * MIB + chunk * PAGE, random.randbytes(PAGE))
    done = run(home)
    assert cell(done.stdout, "data", "CHANGED") == "120.0 KiB"
    assert lines_with(done.stdout, "data: ", "120.0 KiB")
    assert_backed_up(home, volume)


def test_changed_counts_what_became_zeros(home: Home, sim: Simulator) -> None:
    volume = sim.add_volume("data")
    write_at(volume.path, 5 * MIB + 9 * PAGE, random.randbytes(PAGE))
    assert cell(run(home).stdout, "data", "CHANGED") == "4.0 KiB"
    write_at(volume.path, 5 * MIB + 9 * PAGE, bytes(PAGE))
    assert cell(run(home).stdout, "data", "CHANGED") == "4.0 KiB"
    assert_backed_up(home, volume)


def test_changed_is_nothing_where_nothing_changed(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    sim.add_volume("zeros")
    run(home)
    done = run(home)
    assert cell(done.stdout, "data", "CHANGED") == "0 B"
    assert cell(done.stdout, "zeros", "CHANGED") == "0 B"
    write_at(volume.path, 5 * MIB + 17, b"!")
    assert cell(run(home).stdout, "data", "CHANGED") == "4.0 KiB"


# ── Output that is closed


def assert_quiet_about_the_pipe(code: int, errors: str) -> None:
    """Python's own words about a pipe that nobody reads are not for the user."""
    assert code != 120, errors
    assert "BrokenPipe" not in errors
    assert "Exception ignored" not in errors
    assert "Traceback" not in errors


def buffered(home: Home) -> dict[str, str]:
    """The environment to run the script in, with Python's own buffering."""
    return {name: value for name, value in home.environment().items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("--no-such-option",), 2),
        (("health",), 0),
        (("verify",), 0),
        (("--dry-run",), 0),
        (("sweep", "data"), 2),
    ],
    ids=words,
)
def test_nobody_reads_the_output(
    home: Home, sim: Simulator, arguments: tuple[str, ...], code: int, closed: str
) -> None:
    """As with `| true`."""
    add_volume(sim, "data")
    run(home)
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=home.directory,
        env=buffered(home),
        stdout=subprocess.PIPE if closed == "stderr" else write,
        stderr=subprocess.PIPE if closed == "stdout" else write,
        text=True,
    )
    os.close(write)
    errors = process.communicate(timeout=60)[1]
    assert_quiet_about_the_pipe(process.returncode, errors or "")
    assert process.returncode == code


def test_only_the_first_line_of_a_run_is_read(home: Home, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `| head -1`."""
    monkeypatch.undo()  # of real GiB: this is the script as it is
    volume = sim.add_volume("data")
    write_at(volume.path, 3 * MIB, random.randbytes(MIB))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        cwd=home.directory,
        env=buffered(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 0, errors
    assert_quiet_about_the_pipe(process.returncode, errors)
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


# ── Whose leftovers are whose

NAME = re.compile(r"dosvob-ephemeral-([0-9a-f]{8})-([0-9a-f]{8})-.+")
FOREIGN = "dosvob-ephemeral-0123abcd-89ef4567-"


def names(sim: Simulator) -> list[str]:
    """The names of all that was created through the API, the tag aside."""
    return [item.name for item in sim.ever if not item.decoy and item.kind != "tag"]


def home_and_run(made: Iterable[str]) -> tuple[str, str]:
    """The one home and the one run that these names have."""
    found = {(match[1], match[2]) if (match := NAME.fullmatch(name)) else (name, "") for name in made}
    assert len(found) == 1, found
    return next(iter(found))


@pytest.fixture
def elsewhere(tmp_path: Path, sim: Simulator) -> Home:
    """A second directory for the same account."""
    return Home(tmp_path / "elsewhere", sim)


def add_leftovers(sim: Simulator, prefix: str, tags: Sequence[str] = ("dosvob-ephemeral",)) -> list[Resource]:
    """What a killed run leaves, as old as three hours and a minute."""
    volume = sim.volumes[0]
    clone = sim.add_volume(f"{prefix}0", tags=tags)
    left = [
        sim.add_droplet(f"{prefix}droplet", tags=tags, volumes=[clone]),
        clone,
        sim.add_volume(f"{prefix}1", region="nyc1", tags=tags),
        sim.add_snapshot(volume, f"{prefix}1", tags=tags),
        sim.add_key(f"{prefix}key"),
    ]
    for item in left:
        item.created = time.time() - 3 * 3600 - 60
    return left


def assert_told(output: str, items: Iterable[Resource]) -> None:
    """Each is named in a line of its own, with its age and what it costs, as far as there are any."""
    for item in items:
        lines = lines_with(output, item.name, item.id)
        assert len(lines) == 1, (item, output)
        if item.billed:
            assert re.search(r"\b3(:0\d)? h", lines[0]), lines[0]
            assert re.search(r"\$\d+\.\d\d", lines[0]), lines[0]


def test_names_have_the_home_and_the_run(home: Home, elsewhere: Home, sim: Simulator) -> None:
    """The home is kept with the backups, also where they are moved to."""
    add_volume(sim, "data")
    told: list[tuple[str, str]] = []
    for each, arguments in ((home, []), (home, []), (elsewhere, []), (home, ["--backups", "moved"])):
        if arguments:
            home.backups.rename(home.directory / "moved")
        before = len(names(sim))
        run(each, *arguments)
        told.append(home_and_run(names(sim)[before:]))
    homes = [one for one, _ in told]
    assert homes[0] == homes[1] == homes[3] != homes[2]
    assert len({one for _, one in told}) == 4


@pytest.mark.parametrize("arguments", [(), ("sweep",), ("sweep", "--all")], ids=words)
def test_leftovers_of_this_home_are_removed(home: Home, sim: Simulator, arguments: tuple[str, ...]) -> None:
    add_volume(sim, "data")
    run(home)
    ours, _ = home_and_run(names(sim))
    left = add_leftovers(sim, f"dosvob-ephemeral-{ours}-0badcafe-")
    left += add_leftovers(sim, f"dosvob-ephemeral-{ours}-0badf00d-", tags=())
    run(home, *arguments)
    assert [item for item in left if not item.deleted] == []
    assert_nothing_left(sim)


@pytest.mark.parametrize("arguments", [(), ("sweep",), ("sweep", "--all")], ids=words)
def test_leftovers_without_a_home_are_removed(home: Home, sim: Simulator, arguments: tuple[str, ...]) -> None:
    """As older versions made them; or renamed, with the tag."""
    volume = add_volume(sim, "data")
    tag = ["dosvob-ephemeral"]
    left = add_leftovers(sim, "dosvob-ephemeral-1a2b3c4d-")
    left += add_leftovers(sim, "dosvob-ephemeral-5a2b3c4d-", tags=())
    left += [sim.add_volume("renamed", tags=tag), sim.add_droplet("renamed", tags=["web", *tag])]
    left += [sim.add_volume("dosvob-ephemeral-notes"), sim.add_snapshot(volume, "renamed", tags=tag)]
    run(home, *arguments)
    assert [item for item in left if not item.deleted] == []
    assert_nothing_left(sim)


@pytest.mark.parametrize("tags", [("dosvob-ephemeral",), ()], ids=["tagged", "untagged"])
def test_leftovers_of_another_home_are_named_and_stay(home: Home, sim: Simulator, tags: tuple[str, ...]) -> None:
    """In every run, which they do not fail; nor are they backed up."""
    volume = add_volume(sim, "data")
    left = add_leftovers(sim, FOREIGN, tags)
    for arguments in ((), (), ("sweep",)):
        done = run(home, *arguments)
        assert_told(done.stdout + done.stderr, left)
        assert [item for item in left if item.deleted] == []
        assert_nothing_left(sim)
    assert_backed_up(home, volume)
    assert not list(home.backups.glob("dosvob-ephemeral*"))
    assert {r.path for r in sim.requests if r.path.endswith("/snapshots") and r.method == "POST"} == {
        f"/v2/volumes/{volume.id}/snapshots"
    }


def test_leftovers_of_another_home_are_swept_when_all_is(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    left = add_leftovers(sim, FOREIGN) + add_leftovers(sim, FOREIGN.replace("0", "1"), tags=())
    run(home, "sweep")
    done = run(home, "sweep", "--all")
    assert [item for item in left if not item.deleted] == []
    assert all(lines_with(done.stdout + done.stderr, item.name, item.id) for item in left)


def test_a_dry_sweep_says_whose_leftovers_would_go(home: Home, sim: Simulator) -> None:
    """Also where there is no home yet."""
    add_volume(sim, "data")
    foreign = add_leftovers(sim, FOREIGN)
    old = add_leftovers(sim, "dosvob-ephemeral-1a2b3c4d-")
    for arguments, going in (
        (("--dry-run",), old),
        (("sweep", "--dry-run"), old),
        (("sweep", "--all", "--dry-run"), [*old, *foreign]),
    ):
        done = run(home, *arguments)
        would = [item for item in [*old, *foreign] if lines_with(done.stdout, "would remove", item.id)]
        assert would == going
        if foreign[0] not in going:
            assert_told(done.stdout + done.stderr, foreign)
    assert {request.method for request in sim.requests} == {"GET"}
    assert [path.name for path in home.directory.iterdir()] == ["conf.json"]


@pytest.mark.parametrize("arguments", [(), ("sweep",), ("sweep", "--all")], ids=words)
def test_what_only_looks_like_ours_is_the_users(home: Home, sim: Simulator, arguments: tuple[str, ...]) -> None:
    volume = add_volume(sim, "data")
    kept: list[Resource] = []
    for name in (
        "dosvob-ephemeral",
        "dosvob-ephemeralx",
        "dosvob-ephemeralx-0123abcd-89ef4567-0",
        "my-dosvob-ephemeral-x",
    ):
        kept += [sim.add_volume(name), sim.add_droplet(name), sim.add_snapshot(volume, name), sim.add_key(name)]
    kept.append(sim.add_droplet("web", tags=["dosvob-ephemeralx", "dosvob"]))
    home.configure(include=["data"])
    done = run(home, *arguments)
    assert [item for item in kept if item.deleted] == []
    assert not any(item.id in done.stdout + done.stderr for item in kept)


def kill_in_the_middle(home: Home, sim: Simulator) -> list[Resource]:
    """Kill a run when it has created all that a run creates; returns what it leaves."""
    before = set(sim.alive())

    def left() -> list[Resource]:
        return [item for item in sim.alive() if item not in before and item.kind != "snapshot"]

    running = start(home)
    until(lambda: {item.kind for item in left()} == {"key", "droplet", "volume"} or running.process.poll() is not None)
    running.signal(signal.SIGKILL)
    assert running.end() == -signal.SIGKILL, running.output
    answered(sim)
    return left()


def test_two_homes_whose_runs_were_killed_remove_what_is_their_own(home: Home, elsewhere: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    ours, theirs = kill_in_the_middle(home, sim), kill_in_the_middle(elsewhere, sim)
    done = run(home)
    assert all(item.deleted for item in ours)
    assert not any(item.deleted for item in theirs)
    assert all(lines_with(done.stdout + done.stderr, item.name, item.id) for item in theirs)
    assert_backed_up(home, volume)
    run(elsewhere, "sweep")
    assert all(item.deleted for item in theirs)
    assert_nothing_left(sim)


def test_a_run_elsewhere_does_not_disturb_one_that_goes_on(home: Home, elsewhere: Home, sim: Simulator) -> None:
    """Nor does a sweep."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("never-active"))
    first = start(home)
    until(lambda: sim.droplets)
    droplet: Droplet = sim.droplets[0]
    run(elsewhere)
    run(elsewhere, "sweep")
    assert_backed_up(elsewhere, volume)
    assert droplet.deleted is None
    assert first.process.poll() is None
    first.signal(signal.SIGTERM)
    assert first.end() == 128 + signal.SIGTERM
    assert_nothing_left(sim)


def test_two_homes_back_up_at_the_same_time(home: Home, elsewhere: Home, sim: Simulator) -> None:
    volumes = [add_volume(sim, name) for name in ("data", "more")]
    both = [start(each) for each in (home, elsewhere)]
    for running in both:
        assert running.end() == 0, running.output
    for each in (home, elsewhere):
        assert_backed_up(each, *volumes)
    assert_nothing_left(sim)
