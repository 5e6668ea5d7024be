"""Two volumes that are synced at a time: each is backed up as it would be alone, whatever becomes of the other."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest
from conftest import MIB, Home, Tmpfs, write_at
from simulator import Fault, Simulator, Volume
from trouble_support import (
    Running,
    add_volume,
    assert_backed_up,
    assert_nothing_left,
    droplet_python,
    run,
    start,
    until,
)

pytestmark = pytest.mark.small

GATED = """
import pathlib, time
work = Agent.run
def run(agent, **options):
    place, volume = pathlib.Path("DIRECTORY"), agent.device.rpartition("-")[2]
    (place / ("begun-%s-%d" % (volume, time.time_ns()))).touch()
    gate = place / ("go-" + volume)
    while not gate.exists():
        time.sleep(0.02)
    print(gate.read_text(), end="", flush=True)
    work(agent, **options)
Agent.run = run
"""


class Gates:
    """A droplet's agents begin, and go on when a test lets them; the volumes have numbers, in their order."""

    def __init__(self, sim: Simulator, directory: Path) -> None:
        self._place = directory
        directory.mkdir()
        sim.faults.add(droplet_python(directory, GATED.replace("DIRECTORY", str(directory))))

    def begun(self, volume: int) -> list[str]:
        """The agents that began for a volume so far."""
        return sorted(path.name for path in self._place.glob(f"begun-{volume}-*"))

    def wait(self, running: Running, *volumes: int) -> None:
        """Wait until these volumes' agents have begun."""
        until(lambda: all(map(self.begun, volumes)) or running.process.poll() is not None)
        assert running.process.poll() is None, running.output

    def open(self, *volumes: int, words: str = "") -> None:
        """Let these volumes' agents go on, with some words before what they say."""
        for volume in volumes:
            (self._place / "going").write_text(words)
            (self._place / "going").rename(self._place / f"go-{volume}")


@pytest.fixture
def gates(sim: Simulator, tmp_path: Path) -> Gates:
    """From now on an agent waits until it may go on."""
    return Gates(sim, tmp_path / "gates")


@pytest.fixture
def volumes(home: Home, sim: Simulator) -> list[Volume]:
    """Three volumes that were backed up, and changed since."""
    made = [add_volume(sim, name) for name in ("a", "b", "c")]
    run(home)
    sim.limit_snapshots(0)
    for volume in made:
        change(volume)
    return made


def change(volume: Volume, size: int = MIB) -> None:
    write_at(volume.path, 3 * MIB, random.Random(volume.name).randbytes(size + 1)[1:])


def test_two_are_synced_at_a_time(home: Home, sim: Simulator, volumes: list[Volume], gates: Gates) -> None:
    running = start(home)
    gates.wait(running, 0, 1)
    gates.open(1)
    running.wait_for("b: backed up")
    gates.wait(running, 2)
    assert "a: backed up" not in running.output
    gates.open(0, 2)
    assert running.end() == 0, running.output
    assert_backed_up(home, *volumes)
    assert len([item for item in sim.ever if item.kind == "droplet"]) == 2, "one each run"
    assert_nothing_left(sim)


def test_a_third_waits(home: Home, sim: Simulator, volumes: list[Volume], gates: Gates) -> None:
    running = start(home, "--verbose")
    gates.wait(running, 0, 1)
    until(lambda: len(sim.droplets[0].volume_ids) == 3)
    gates.open(1)
    running.wait_for(": backed up")
    gates.open(0, 2)
    assert running.end() == 0, running.output
    assert running.output.index("c: syncing") > running.output.index(": backed up")
    assert_backed_up(home, *volumes)


def test_a_first_backup_goes_alone(home: Home, sim: Simulator, volumes: list[Volume], gates: Gates) -> None:
    """Neither beside a later one nor beside another first one."""
    volumes += [add_volume(sim, "aa"), add_volume(sim, "ab")]
    running = start(home, "--verbose")
    for number, name in enumerate(("a", "aa", "ab")):
        gates.wait(running, number)
        gates.open(number)
        running.wait_for(f"{name}: backed up")
    gates.wait(running, 3, 4)
    gates.open(3, 4)
    assert running.end() == 0, running.output
    begun = re.findall(r"(\w+): (syncing|backed up)", running.output)
    firsts = [(name, word) for name in ("aa", "ab") for word in ("syncing", "backed up")]
    assert begun[:6] == [("a", "syncing"), ("a", "backed up"), *firsts], running.output
    assert_backed_up(home, *volumes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_both_are_stopped(home: Home, sim: Simulator, volumes: list[Volume], gates: Gates, number: int) -> None:
    running = start(home)
    gates.wait(running, 0, 1)
    running.signal(number)
    code = running.end()
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert_nothing_left(sim)
    gates.open(0, 1, 2)
    run(home, "verify")
    run(home)
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_a_droplet_that_is_lost_costs_neither(home: Home, sim: Simulator, volumes: list[Volume], gates: Gates) -> None:
    """One is made in its place, and they go on one at a time."""
    running = start(home)
    gates.wait(running, 0, 1)
    sim.droplets[0].kill()
    until(lambda: len(gates.begun(0)) + len(gates.begun(1)) == 3)
    gates.open(*(volume for volume in (0, 1) if len(gates.begun(volume)) == 2))
    running.wait_for(": backed up")
    gates.open(0, 1, 2)
    assert running.end() == 0, running.output
    assert running.output.count("making another one") == 1
    assert_backed_up(home, *volumes)
    assert sum(item.kind == "droplet" for item in sim.ever) == 3, "one in the first run"
    assert_nothing_left(sim)


@pytest.mark.parametrize("deadly", [0, 1])
def test_a_volume_over_which_each_droplet_is_lost_fails_and_no_other(
    home: Home, sim: Simulator, volumes: list[Volume], gates: Gates, deadly: int
) -> None:
    running, seen = start(home), set[str]()
    gates.wait(running, 0, 1)
    gates.open(2)

    def has_ended() -> bool:
        new = {*gates.begun(deadly)} - seen
        if new:
            seen.update(new)
            sim.droplets[-1].kill()
            gates.open(1 - deadly)
        return running.process.poll() is not None

    until(has_ended, 180)
    assert running.end() == 1, running.output
    assert running.output.count("droplets were lost over it") == 1
    assert f"error: {volumes[deadly].name}: " in running.output
    assert len(gates.begun(1 - deadly)) == 2, "only the first loss was met together"
    del volumes[deadly]
    assert_backed_up(home, *volumes)
    assert sum(item.kind == "droplet" for item in sim.ever) == 1 + 4
    assert_nothing_left(sim)


def test_an_attach_that_hangs_costs_neither(home: Home, sim: Simulator, volumes: list[Volume], gates: Gates) -> None:
    """The droplet is no good for more, but what is being synced over it goes on to its end."""
    sim.faults.add(Fault("action-stuck", nth=3))
    running = start(home, constants={"ACTION_LIMIT": 4, "STALL_LIMIT": 600})
    gates.wait(running, 0, 1)
    until(lambda: any(fault.kind == "action-stuck" for _, fault in sim.faults.fired))
    gates.open(1)
    running.wait_for("b: backed up")
    asked = r"GET /v2/volumes/[^/ ]+ GET /v2/droplets/"  # at last, before it gives up
    until(lambda: re.search(asked, " ".join(f"{request.method} {request.path}" for request in sim.requests)))
    gates.open(0, 2)
    assert running.end() == 0, running.output
    assert running.output.count("making another one") == 1
    assert "tried again" not in running.output
    assert [len(gates.begun(volume)) for volume in (0, 1, 2)] == [1, 1, 1]
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_a_connection_that_waited_is_not_tried_after_another_one_broke(
    home: Home, sim: Simulator, volumes: list[Volume], gates: Gates
) -> None:
    running = start(home, "--verbose", constants={"STALL_LIMIT": 5, "SSH_TIMEOUT": 5, "RECONNECT_LIMIT": 5})
    gates.wait(running, 0, 1)
    gates.open(0, 1)
    for volume in ("a", "b"):
        running.wait_for(f"{volume}: no file system, by")  # by then its connection is free
    gates.wait(running, 2)
    said = len(running.output)
    sim.droplets[0].stall()
    running.wait_for("no connection to the droplet")
    sim.droplets[0].resume()
    gates.open(2)
    assert running.end() == 0, running.output
    assert "could not be started" not in running.output[said:]
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_what_fails_does_not_keep_the_other(home: Home, sim: Simulator, volumes: list[Volume], gates: Gates) -> None:
    running = start(home)
    gates.wait(running, 0, 1)
    gates.open(0, words="no agent of ours")
    running.wait_for("error: a: ")
    gates.wait(running, 2)
    gates.open(1, 2)
    assert running.end() == 1, running.output
    assert_backed_up(home, *volumes[1:])
    assert_nothing_left(sim)


def test_neither_waits_for_what_the_other_has_under_way(home: Home, sim: Simulator, volumes: list[Volume]) -> None:
    """Over a slow link that takes longer than an agent may be silent."""
    change(volumes[0], 8 * MIB)
    sim.faults.add(Fault("ssh-slow", bytes=MIB // 4))
    running = start(home, constants={"STALL_LIMIT": 9, "SSH_TIMEOUT": 9})
    assert running.end() == 0, running.output
    assert "connecting again" not in running.output
    assert running.output.index("b: backed up") < running.output.index("a: backed up")
    assert_backed_up(home, *volumes)


def test_what_does_not_fit_beside_another_is_done_alone(
    home: Home, sim: Simulator, tmpfs: Tmpfs, tmp_path: Path
) -> None:
    """There is room for the changes of one, and not of both."""
    home.configure(keep={})
    volumes, where = [add_volume(sim, name, offset=0, size=9 * MIB) for name in ("a", "b")], str(tmpfs.path)
    home.backups = tmpfs.path
    run(home, "--backups", where)
    sim.limit_snapshots(0)
    for volume in volumes:
        write_at(volume.path, 0, random.Random(volume.name + "changed").randbytes(8 * MIB))
    tmpfs.leave_free(27 * MIB)  # what is fetched, the undo, and as much for what a file system may copy
    gates = Gates(sim, tmp_path / "gates")
    sim.faults.add(Fault("ssh-slow", bytes=4 * MIB))
    running = start(home, "--backups", where)
    gates.wait(running, 0, 1)
    gates.open(0, 1)
    assert running.end() == 0, running.output
    assert "the disk is full; it is tried again, with no other volume beside it" in running.output
    assert "error" not in running.output
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)
    tmpfs.leave_free(20 * MIB)
    for volume in volumes:
        write_at(volume.path, 0, random.Random(volume.name).randbytes(8 * MIB))
    done = run(home, "--backups", where, expect=1)
    assert {line.split("error: ")[1][0] for line in done.stderr.splitlines() if "error: " in line} == {"a", "b"}
    assert done.stdout.count("it is tried again") <= 2, "once each"
