"""What the tests of trouble share: small volumes, short limits, and what must hold however a run ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import MIB, OPENAPI, Home, same, write_at
from simulator import FOREVER, Behaviour, Fault, Simulator, Volume

T = TypeVar("T")
PATIENCE = 180.0  # seconds for what comes soon, on a slow machine too
SOON = 2.5  # seconds that are a limit to wait for, and for what goes well on a slow machine enough
GIB = 16 * MIB  # what these tests take for a GiB, on both sides: the calls are the same, and there is less to read
QUICK: Mapping[str, Any] = {
    "GIB": GIB,
    "FIRST_BACKOFF": 0.05,
    "MAX_BACKOFF": 0.3,
    "LIST_LAG": 0.6,
    "RATE_LIMIT_WAIT": 0.3,
    "SNAPSHOT_RETRY": 0.3,
    "HEARTBEAT": 0.5,
}
FAST = Behaviour(
    boot_seconds=0.05,
    address_seconds=0.02,
    ssh_seconds=0.02,
    action_seconds=0.02,
    device_seconds=0.02,
    release_seconds=0.3,
)


def small_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the simulator count in small GiB; the script is told by QUICK."""
    for module in ("cloud", "resources"):
        monkeypatch.setattr(f"simulator.{module}.GIB", GIB)


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is marked `small` has small volumes."""
    if request.node.get_closest_marker("small"):
        small_volumes(monkeypatch)


@pytest.fixture
def behaviour(request: pytest.FixtureRequest) -> Behaviour:
    """How the simulated account behaves: fast for a test that is marked `small`; with the changes in its param."""
    usual = FAST if request.node.get_closest_marker("small") else Behaviour()
    return replace(usual, **getattr(request, "param", {}))


def answered(sim: Simulator) -> None:
    """Wait until nothing is under way in the account any more: whoever asked for it may have been killed meanwhile."""
    until(lambda: all(record.seconds for record in list(sim.requests)))


def add_volume(sim: Simulator, name: str, offset: int = 3 * MIB, size: int = 5 * MIB // 2) -> Volume:
    """A volume with some random content between zeros."""
    volume = sim.add_volume(name)
    write_at(volume.path, offset, random.Random(name).randbytes(size))
    return volume


@contextlib.contextmanager
def account(directory: Path, behaviour: Behaviour = FAST) -> Iterator[tuple[Simulator, Home]]:
    """As the fixtures `sim` and `home`, for a test that needs several."""
    directory.mkdir()
    with Simulator(directory / "cloud", behaviour, OPENAPI) as sim:
        yield sim, Home(directory / "home", sim)
        assert not sim.violations


def until(condition: Callable[[], T | None], limit: float = PATIENCE) -> T:
    """Wait for something to become true, and return it."""
    give_up = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.005)
    return found


def run(
    home: Home, *arguments: str, expect: int | None = 0, constants: Mapping[str, Any] | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run the script with short limits to its end; it never ends with a traceback."""
    done = home.run(*arguments, expect=expect, constants={**QUICK, **(constants or {})}, **more)
    assert_explained(done.returncode, done.stdout, done.stderr)
    return done


def assert_explained(code: int, output: str, errors: str) -> None:
    """No traceback, and a failure comes with an error message."""
    assert "Traceback" not in output + errors
    assert "unexpected" not in errors, errors
    assert code in (0, 1, 2), f"exit code {code}: {errors}"
    assert (code == 0) == ("error: " not in errors), f"exit code {code}: {errors}"


def assert_nothing_left(sim: Simulator) -> None:
    """Of all that was ever created through the API nothing exists."""
    assert sim.alive() == []
    assert all(item.deleted for item in sim.ever if not item.decoy and item.kind != "tag")


def assert_named(sim: Simulator, errors: str) -> None:
    """Each thing that is left has a line of its own, with its id, and its cost if it is billed."""
    for item in sim.alive():
        lines = [line for line in errors.splitlines() if f"(id {item.id}" in line and "LEFT BEHIND" in line]
        assert len(lines) == 1, (item, errors)
        assert ("a month)" in lines[0]) == item.billed
        assert ("and billed until you remove it" in lines[0]) == item.billed
        assert "https://cloud.digitalocean.com/" in lines[0]


def assert_backed_up(home: Home, *volumes: Volume) -> None:
    """The images are what the volumes are."""
    for volume in volumes:
        assert same(home.image(volume.name), volume.path), volume.name


DROPLET_PYTHON = r"""#!/usr/bin/python3
import builtins, re, sys
size = int(re.search(r"read\((\d+)\)", sys.argv[-1])[1])
program = sys.stdin.buffer.read(size).decode()
def run(source):
    start = source.rindex("\n", 0, -1) + 1
    builtins.exec(source[:start] + BODY + source[start:], {})
exec(program, {"exec": run})
"""


def droplet_python(directory: Path, body: str) -> Fault:
    """A droplet's python3 that runs something between the agent's program and its start."""
    script = directory / "python3"
    script.write_text(DROPLET_PYTHON.replace("BODY", repr(body + "\n")))
    script.chmod(0o700)
    return Fault("python", text=str(script), times=FOREVER)


PAUSING_PYTHON = """#!/usr/bin/python3
import os, subprocess, sys
command = ["/usr/bin/python3", *sys.argv[1:]]
try:
    os.mkdir({begun!r})
except FileExistsError:
    os.execv(command[0], command)
agent = subprocess.Popen(command, stdout=subprocess.PIPE)
left = {after_bytes}
while left and (data := os.read(agent.stdout.fileno(), min(left, 65536))):
    os.write(1, data)
    left -= len(data)
os.mkdir({paused!r})
agent.wait()
"""


class PausingPython:
    """A droplet's python3 whose first run falls silent after so many bytes, so that a test can act in the middle."""

    def __init__(self, directory: Path, after_bytes: int) -> None:
        self._paused = directory / "paused"
        script = directory / "python3"
        begun, paused = str(directory / "begun"), str(self._paused)
        script.write_text(PAUSING_PYTHON.format(begun=begun, paused=paused, after_bytes=after_bytes))
        script.chmod(0o700)
        self.fault = Fault("python", text=str(script))

    def wait(self) -> None:
        """Wait until it has fallen silent."""
        until(self._paused.exists)


class Running:
    """The script while it runs; its output is collected line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        atexit.register(process.kill)  # a test that fails may leave it at work
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        """All output so far."""
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        """Wait until the output has this text."""
        until(lambda: text in self.output or self.process.poll() is not None)
        if self.process.poll() is not None:
            self._reader.join(PATIENCE)
        assert text in self.output, self.output

    def end(self) -> int:
        """Wait for the end; returns the exit code, or the negative number of the signal that killed it."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)


def start(home: Home, *arguments: str, constants: Mapping[str, Any] | None = None, **variables: str) -> Running:
    """Start the script with short limits."""
    return Running(home.start(*arguments, constants={**QUICK, **(constants or {})}, **variables))
