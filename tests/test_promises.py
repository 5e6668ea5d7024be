"""What was found broken once, by whoever reads the promises and tries them: through the command line alone.

Nothing here knows how the script keeps its books. It knows where the image is, that what is under way lies beside it
in `.dosvob`, and what is told.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import paramiko
import pytest
from conftest import MIB, Home, Tmpfs, same, write_at, write_out
from pythons import python_3
from simulator import FOREVER, Droplet, Fault, Resource, Simulator, Volume
from simulator.machine import Machine
from simulator.storage import LoopDevice
from trouble_support import (
    GIB,
    QUICK,
    Running,
    add_volume,
    assert_backed_up,
    assert_nothing_left,
    run,
    start,
    until,
)

pytestmark = pytest.mark.small

NAME = "data"
PAGE = 4096
WRITES = "pwrite64,pwritev,pwritev2,write"
IMPATIENT = {"STALL_LIMIT": 5, "RECONNECT_LIMIT": 4, "SSH_TIMEOUT": 5, "ADDRESS_LIMIT": 60, "BUSY_LIMIT": 5}
PATIENT = {"STALL_LIMIT": 600}
FEW_AHEAD = {"MOST_AHEAD": 64}  # chunks: a hole of so many MiB stands for one of 256 GiB


def noise(size: int, seed: object = 0) -> bytes:
    """Bytes that cannot be compressed, and are no zeros."""
    return random.Random(str(seed)).randbytes(size)


def errors_of(output: str) -> list[str]:
    """The lines that tell an error."""
    return [line for line in output.splitlines() if "error: " in line]


def bytes_sent(sim: Simulator) -> int:
    """What all droplets so far have sent to us."""
    return sum(item.bytes_sent for item in sim.ever if isinstance(item, Droplet))


def created(sim: Simulator, kind: str) -> list[Resource]:
    """All of a kind that the script ever created."""
    return [item for item in sim.ever if item.kind == kind and not item.decoy]


def spool_of(home: Home, name: str = NAME) -> Path:
    """Where what is fetched for a volume is kept."""
    return home.backups / ".dosvob" / f"{name}.spool"


def undo_of(home: Home) -> Path:
    """Where what the image had is kept while it is written."""
    return home.backups / ".dosvob" / f"{NAME}.undo"


def flip(path: Path, offset: int, *, secretly: bool = False) -> None:
    """Flip a bit; secretly as a disk does it, so that no time tells of it."""
    status = path.stat()
    with path.open("rb") as file:
        file.seek(offset)
        byte = file.read(1)
    write_at(path, offset, bytes([byte[0] ^ 4]))
    if secretly:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


HOLDING_PYTHON = """#!/usr/bin/python3
import os, subprocess, sys, time
agent = subprocess.Popen(["/usr/bin/python3", *sys.argv[1:]], stdout=subprocess.PIPE)
left = {after_bytes}
while data := os.read(agent.stdout.fileno(), min(left, 65536) or 65536):
    os.write(1, data)
    left = max(left - len(data), 0)
    if not left and not os.path.exists({held!r}):
        os.mkdir({held!r})
        while not os.path.exists({released!r}):
            time.sleep(0.02)
sys.exit(agent.wait())
"""


class HoldingPython:
    """A droplet's python3 that falls silent once, after so many bytes, until it is released."""

    def __init__(self, directory: Path, after_bytes: int) -> None:
        directory.mkdir(exist_ok=True)
        self._held, self._released = directory / "held", directory / "released"
        script = directory / "python3"
        script.write_text(
            HOLDING_PYTHON.format(after_bytes=after_bytes, held=str(self._held), released=str(self._released))
        )
        script.chmod(0o700)
        self.fault = Fault("python", text=str(script))

    def wait(self, running: Running) -> None:
        """Wait until it has fallen silent."""
        until(lambda: self._held.exists() or running.process.poll() is not None)
        assert self._held.exists(), running.output

    def release(self) -> None:
        """Let it go on."""
        self._released.mkdir()


def traced(image: Path, *options: str, calls: str = WRITES) -> tuple[str, ...]:
    """The words before a command, which stays the process that is started: its writes to the image are traced.

    Without --seccomp-bpf, with which strace 6.1 injects no signal.
    """
    return ("strace", "-D", "-f", "-qq", "-P", str(image), "-e", f"trace={calls}", *options)


def start_traced(home: Home, wrapper: tuple[str, ...], *arguments: str) -> Running:
    """Start the script behind these words."""
    command = [*wrapper, *home.command("--backups", str(home.backups), *arguments, constants=QUICK)]
    return Running(
        subprocess.Popen(
            command,
            cwd=home.directory,
            env=home.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )


def back_up_then_change(home: Home, pages: int = 60) -> tuple[Volume, bytes]:
    """A volume that was backed up and has changed here and there since; also what it was."""
    volume = add_volume(home.simulator, NAME, offset=0, size=GIB)
    run(home)
    old = volume.path.read_bytes()
    for page in range(pages):
        write_at(volume.path, page * (GIB // pages // PAGE) * PAGE, noise(PAGE, page))
    return volume, old


def kill_in_the_middle_of_the_changes(home: Home) -> tuple[Volume, bytes]:
    """A run is killed while it changes an image; returns the volume and the image's old content."""
    volume, old = back_up_then_change(home)
    image = home.image(NAME)
    kill = traced(image, "-o", "/dev/null", f"--inject={WRITES}:signal=KILL:when=9")
    assert start_traced(home, kill).end() == -signal.SIGKILL
    assert image.read_bytes() not in (old, volume.path.read_bytes())
    assert undo_of(home).exists()
    return volume, old


def kill_in_the_middle_of_the_transfer(home: Home, directory: Path, change: Callable[[Volume], None]) -> Volume:
    """A backup, and a later one that is killed when about 3 MiB of 6 MiB have come; `change` adds to the change."""
    volume = add_volume(home.simulator, NAME, offset=0, size=8 * MIB)
    run(home)
    write_at(volume.path, 2 * MIB, noise(6 * MIB))
    change(volume)
    holding = HoldingPython(directory / "python", 4 * MIB)
    home.simulator.faults.add(holding.fault)
    running = start(home, constants=PATIENT)
    holding.wait(running)
    until(lambda: spool_of(home).exists() and spool_of(home).stat().st_size > 3 * MIB)  # two are whole
    running.signal(signal.SIGKILL)
    running.end()
    return volume


# -- a full disk


def test_changes_that_fit_beside_an_image_but_not_into_it_leave_the_old_image_and_the_other_volume_its_room(
    home: Home, sim: Simulator, tmpfs: Tmpfs
) -> None:
    """There is room for what changed once, and not for what becomes of the image's holes as well."""
    home.backups = tmpfs.path
    big, other = add_volume(sim, "a-big", offset=0, size=MIB), add_volume(sim, "other")
    where = ("--backups", str(tmpfs.path))
    run(home, *where)
    old = big.path.read_bytes()
    write_at(big.path, 0, noise(MIB, "in place"))
    write_at(big.path, 4 * MIB, noise(5 * MIB, "into holes"))
    tmpfs.leave_free(9 * MIB)
    for number in range(3):
        write_at(other.path, 3 * MIB, noise(PAGE, number))
        done = run(home, *where, expect=1)
        assert home.image("a-big").read_bytes() == old, done
        assert not spool_of(home, "a-big").exists()
        assert_backed_up(home, other)
        (error,) = errors_of(done.stderr)
        assert "a-big" in error
        assert "room" in error
        assert_nothing_left(sim)
        run(home, *where, "verify")
        run(home, *where, "health")
    tmpfs.leave_free(64 * MIB)
    run(home, *where)
    assert_backed_up(home, big, other)


# -- changes that were begun and not finished


def test_health_tells_of_an_image_that_is_still_to_be_put_back(home: Home) -> None:
    volume, old = kill_in_the_middle_of_the_changes(home)
    (error,) = errors_of(run(home, "health", expect=1).stderr)
    assert NAME in error
    assert undo_of(home).exists()  # it only looks
    run(home, "verify")
    run(home, "health")
    assert home.image(NAME).read_bytes() == old
    check_mended(home, volume)


def test_an_undo_that_decayed_is_put_back_as_far_as_it_is_whole_and_told(home: Home) -> None:
    """Then no command trusts the image, before the next backup has compared all of it."""
    volume, _ = kill_in_the_middle_of_the_changes(home)
    undo = undo_of(home)
    flip(undo, 4096 + 200)  # behind the head, in what it has of the first chunk, which was written
    done = run(home, "verify", expect=1)
    assert any(NAME in line and "differs from its snapshot" in line for line in errors_of(done.stderr))
    assert "sound" not in done.stdout
    run(home)
    assert_backed_up(home, volume)
    run(home, "health")
    told = errors_of(run(home, "verify", expect=1).stderr)  # of the older version, whose content it was
    assert [line for line in told if "the version of" not in line] == []


def test_changes_that_decay_while_they_are_being_made_are_taken_back_at_once(home: Home, tmp_path: Path) -> None:
    volume = add_volume(home.simulator, NAME, offset=0, size=10 * MIB)
    run(home)
    old = volume.path.read_bytes()
    write_at(volume.path, 0, noise(10 * MIB))
    running = stopped_at_the_first_change(home, tmp_path)
    spool = spool_of(home)
    for quarter in (1, 3):  # chunks come in any order, so that one of the two may have been written already
        flip(spool, spool.stat().st_size * quarter // 4)
    assert end_of_stopped(running) == 1, running.output
    assert any(NAME in line and "spool" in line for line in errors_of(running.output)), running.output
    assert_nothing_left(home.simulator)
    assert home.image(NAME).read_bytes() == old
    assert "sound" in run(home, "verify").stdout
    check_mended(home, volume)


def stopped_at_the_first_change(home: Home, directory: Path) -> Running:
    """A run that has just made its first change of the image, and is stopped."""
    trace = directory / "trace"
    stop = f"--inject={WRITES}:signal=STOP:when=1"
    running = start_traced(home, traced(home.image(NAME), "-o", str(trace), stop))
    until(lambda: running.process.poll() is not None or (trace.exists() and "stopped by SIGSTOP" in trace.read_text()))
    return running


def end_of_stopped(running: Running) -> int:
    """Let it go on, as often as it is stopped, to its end; returns the exit code."""

    def has_ended() -> bool:
        running.signal(signal.SIGCONT)
        return running.process.poll() is not None

    until(has_ended)
    return running.end()


def check_mended(home: Home, volume: Volume) -> None:
    """The next backup puts all right; one that finds the damage first may still have to tell it."""
    if run(home, expect=None).returncode:
        run(home)
    assert_backed_up(home, volume)
    assert "sound" in run(home, "verify").stdout
    run(home, "health")
    assert_nothing_left(home.simulator)


def test_leftovers_in_the_account_are_removed_before_an_image_is_put_back(home: Home, tmp_path: Path) -> None:
    """They cost money, and to put an image back may take long."""
    volume, _ = kill_in_the_middle_of_the_changes(home)
    assert {item.kind for item in home.simulator.alive()} >= {"droplet", "volume"}
    running = stopped_at_the_first_change(home, tmp_path)
    left = home.simulator.alive()
    assert end_of_stopped(running) == 0, running.output
    assert left == []
    assert_backed_up(home, volume)


@pytest.mark.parametrize("when", ["at the end of a sync", "of an earlier run"])
def test_a_signal_ends_the_changing_of_an_image_which_is_told_and_the_next_command_takes_it_back(
    home: Home, when: str
) -> None:
    """It is no crash: what was created is removed."""
    sim = home.simulator
    volume, old = back_up_then_change(home) if when.startswith("at") else kill_in_the_middle_of_the_changes(home)
    image = home.image(NAME)
    before = image.stat().st_mtime_ns
    running = start_traced(home, traced(image, "-o", "/dev/null", f"--inject={WRITES}:delay_enter=400000"))
    until(lambda: image.stat().st_mtime_ns != before or running.process.poll() is not None)
    if not when.startswith("at"):
        until(lambda: "taking back" in running.output or running.process.poll() is not None)
    running.signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGTERM, running.output
    assert not same(image, volume.path)
    assert undo_of(home).exists()
    assert_nothing_left(sim)
    run(home, "health", expect=1)
    run(home, "verify")
    assert image.read_bytes() == old
    sent = bytes_sent(sim)
    check_mended(home, volume)
    assert bytes_sent(sim) - sent < MIB  # what was fetched is used


@pytest.mark.parametrize("how", ["touched", "moved to another disk"])
def test_an_image_that_was_touched_since_a_sync_was_interrupted_is_no_damage(
    home: Home, tmp_path: Path, how: str
) -> None:
    """What had come is of no use any more, and nothing else is wrong."""
    volume = kill_in_the_middle_of_the_transfer(home, tmp_path, lambda volume: None)
    image = home.image(NAME)
    if how == "touched":
        os.utime(image)
    else:
        moved = tmp_path / "moved"
        subprocess.run(["cp", "--preserve=all", "--sparse=always", image, moved], check=True)
        moved.rename(image)
    done = run(home)
    assert "damaged" not in done.stdout + done.stderr
    assert not list(home.backups.rglob("*damaged*"))
    assert_backed_up(home, volume)
    assert_nothing_left(home.simulator)


def test_a_page_that_has_come_and_is_then_taken_back_on_the_volume_is_as_on_the_volume(
    home: Home, tmp_path: Path
) -> None:
    """Of a chunk with two changed pages, both of which had come when the sync was killed."""
    old: list[bytes] = []

    def change(volume: Volume) -> None:
        old.append(volume.path.read_bytes()[:MIB])
        for page in (3, 7):
            write_at(volume.path, page * PAGE, noise(PAGE, page))

    volume = kill_in_the_middle_of_the_transfer(home, tmp_path, change)
    write_at(volume.path, 7 * PAGE, old[0][7 * PAGE : 8 * PAGE])
    before = bytes_sent(home.simulator)
    run(home)
    assert_backed_up(home, volume)
    assert bytes_sent(home.simulator) - before < 5 * MIB  # so what had come was taken up
    assert "sound" in run(home, "verify").stdout


# -- what the disk does behind our back


class RottingDisk:
    """A mounted ext4 file system, whose blocks can change on the disk while the cache shows what they were."""

    SIZE = 96 * MIB

    def __init__(self, directory: Path) -> None:
        self.path = directory / "mounted"
        self.path.mkdir()
        self._backing = directory / "disk"
        with self._backing.open("xb") as file:
            file.truncate(self.SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", str(PAGE), "-m", "0", self._backing], check=True)
        self._loop = LoopDevice(self._backing)
        subprocess.run(["mount", self._loop.path, self.path], check=True)

    def rot(self, path: Path, offset: int) -> None:
        """Flip a bit of what the disk has of a file, which is in the cache as it was."""
        write_out(self.path)
        known = path.read_bytes()
        with path.open("rb") as file:
            (block,) = struct.unpack("i", fcntl.ioctl(file.fileno(), 1, struct.pack("i", offset // PAGE)))  # FIBMAP
        assert block, "there is a hole"
        place = block * PAGE + offset % PAGE
        with self._backing.open("rb") as file:
            file.seek(place)
            assert file.read(1) == known[offset : offset + 1]
        flip(self._backing, place)
        assert path.read_bytes() == known

    def close(self) -> None:
        """Take it away."""
        subprocess.run(["umount", "--lazy", self.path], check=True)
        self._loop.close()


@pytest.fixture
def rotting(tmp_path: Path) -> Iterator[RottingDisk]:
    made = RottingDisk(tmp_path)
    yield made
    made.close()


def test_verify_reads_the_disk_and_not_the_cache(home: Home, sim: Simulator, rotting: RottingDisk) -> None:
    add_volume(sim, NAME, offset=0, size=GIB)
    home.backups = rotting.path
    where = ("--backups", str(rotting.path))
    run(home, *where)
    assert "sound" in run(home, *where, "verify").stdout
    rotting.rot(home.image(NAME), 11 * MIB + 5000)
    (error,) = errors_of(run(home, *where, "verify", expect=1).stderr)
    assert NAME in error
    assert f"{11 * MIB} to {12 * MIB - 1}" in error


def test_what_a_backup_reads_again_in_turn_it_reads_from_the_disk(
    home: Home, sim: Simulator, rotting: RottingDisk
) -> None:
    volume = add_volume(sim, NAME, offset=0, size=GIB)
    home.backups = rotting.path
    where = ("--backups", str(rotting.path))
    run(home, *where)
    rotting.rot(home.image(NAME), 11 * MIB + 5000)
    told = [str(11 * MIB) in run(home, *where).stderr for _ in range(8)]
    assert sum(told) == 1
    with home.image(NAME).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert_backed_up(home, volume)


def test_decay_anywhere_in_a_long_image_is_found_within_eight_runs(
    home: Home, sim: Simulator, pytestconfig: pytest.Config
) -> None:
    chunks = 112
    volume = sim.add_volume(NAME, size_gib=chunks * MIB // GIB)
    for chunk in range(chunks):
        write_at(volume.path, chunk * MIB, noise(PAGE, chunk))  # so that there is something to decay
    run(home)
    chance = random.Random(pytestconfig.option.seed)
    # Not the first, whose 0 is in many a line, and no neighbours, which are told as one.
    places = sorted(2 * place + 1 for place in chance.sample(range(chunks // 2), 3))
    for chunk in places:
        flip(home.image(NAME), chunk * MIB + chance.randrange(PAGE), secretly=True)
    output = "".join(run(home).stderr for _ in range(8))
    for chunk in places:
        assert len(re.findall(rf"\b{chunk * MIB}\b", output)) == 1, (places, output)
    assert_backed_up(home, volume)


def test_data_that_became_a_hole_on_the_disk_is_told_and_mended(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, NAME, offset=0, size=8 * MIB)
    run(home)
    image = home.image(NAME)
    status = image.stat()
    subprocess.run(["fallocate", "--punch-hole", "-o", str(5 * MIB), "-l", str(MIB), image], check=True)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert f"{5 * MIB} to {6 * MIB - 1}" in run(home, "verify", expect=1).stderr
    done = run(home)
    assert re.search(rf"warning: {NAME}: .*\b{5 * MIB}\b", done.stderr)
    assert_backed_up(home, volume)


def test_an_image_that_has_become_longer_is_not_sound_and_is_cut_to_its_size(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, NAME, offset=0, size=8 * MIB)
    run(home)
    with home.image(NAME).open("ab") as file:
        file.write(noise(4000))
    done = run(home, "verify", expect=1)
    (error,) = errors_of(done.stderr)
    assert NAME in error
    assert re.search(r"\bsize|\blonger\b|\blong\b", error)
    assert "sound" not in done.stdout
    before = bytes_sent(sim)
    done = run(home)
    assert re.search(rf"{NAME}\b.*(\bsize|\blonger\b|\bcut\b)", done.stdout + done.stderr)
    assert not list(home.backups.glob("*set-aside*"))
    assert bytes_sent(sim) - before < MIB
    assert_backed_up(home, volume)
    assert "sound" in run(home, "verify").stdout


def test_an_image_that_appears_during_a_first_sync_is_not_overwritten(
    home: Home, sim: Simulator, tmp_path: Path
) -> None:
    volume = add_volume(sim, NAME, offset=0, size=8 * MIB)
    holding = HoldingPython(tmp_path / "python", 4 * MIB)
    sim.faults.add(holding.fault)
    running = start(home, constants=PATIENT)
    holding.wait(running)
    home.image(NAME).write_bytes(b"somebody's")
    holding.release()
    assert running.end() == 1
    (error,) = errors_of(running.output)
    assert NAME in error
    assert "appeared" in error
    assert home.image(NAME).read_bytes() == b"somebody's"
    assert_nothing_left(sim)
    home.image(NAME).unlink()
    before = bytes_sent(sim)
    run(home)
    assert_backed_up(home, volume)
    assert bytes_sent(sim) - before < MIB  # what had come was kept


# -- the link


GROWING_PYTHON = """#!/usr/bin/python3
import ctypes, os, sys, zlib
if "-c" not in sys.argv:
    os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv[1:]])
class Packer:
    def __init__(self, *options, **named):
        self.packer = real()
    def compress(self, data):
        pieces = [data[start : start + 256] for start in range(0, len(data), 256)]
        return b"".join([self.packer.compress(piece) + self.packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces])
    def flush(self, *mode):
        return self.packer.flush(*mode)
def compress(data, *options, **named):
    packer = Packer()
    return packer.compress(data) + packer.flush()
real, zlib.compressobj, zlib.compress = zlib.compressobj, Packer, compress
def without_zstd(name, library=ctypes.CDLL, **how):
    if name and "zstd" in name:
        raise OSError("there is no zstd")
    return library(name, **how)
ctypes.CDLL = without_zstd
code = sys.argv[sys.argv.index("-c") + 1]
sys.argv[:] = ["-c"]
exec(code, {"__name__": "__main__"})
"""
"""Compresses as zlib-ng does at its fastest, in that noise becomes some percent longer by it; and has no zstd."""


def test_a_chunk_that_becomes_longer_by_compressing_is_backed_up(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """It begins as text and goes on as noise, and the link is slow."""
    python = tmp_path / "python3"
    python.write_text(GROWING_PYTHON)
    python.chmod(0o700)
    volume = sim.add_volume(NAME, size_gib=2)
    for chunk in range(28):
        write_at(volume.path, chunk * MIB, b"so it begins " * 640 + noise(MIB - 13 * 640, chunk))
    sim.faults.add(Fault("python", text=str(python)), Fault("ssh-slow", bytes=6 * MIB))
    run(home)
    assert_backed_up(home, volume)


def test_a_large_hole_behind_a_large_change_is_scanned_over_a_slow_link(home: Home, sim: Simulator) -> None:
    """The scan is far ahead of what the link has taken."""
    volume = sim.add_volume(NAME, size_gib=32)
    for number in range(2):
        write_at(volume.path, 0, noise(8 * MIB, number))
        sim.faults.add(Fault("ssh-slow", bytes=6 * MIB))
        run(home, constants=FEW_AHEAD)
        assert_backed_up(home, volume)


# -- two machines, one account


def test_a_sweep_and_a_run_elsewhere_leave_a_run_alone_that_is_going_on(
    home: Home, sim: Simulator, tmp_path: Path
) -> None:
    volume = add_volume(sim, NAME, offset=0, size=12 * MIB)
    other_home = Home(tmp_path / "elsewhere", sim)
    holding = HoldingPython(tmp_path / "python", 4 * MIB)
    sim.faults.add(holding.fault)
    running = start(home, constants=PATIENT)
    holding.wait(running)
    theirs = sim.alive()
    billed = [item for item in theirs if item.kind in ("droplet", "volume")]
    assert {item.kind for item in billed} == {"droplet", "volume"}
    for arguments, expected in ((("sweep",), None), ((), 0)):
        done = run(other_home, *arguments, expect=expected)
        assert [item for item in theirs if item.deleted] == [], (arguments, done)
        for item in billed:
            assert item.name in done.stdout + done.stderr or item.id in done.stdout + done.stderr, (item, done)
    assert_backed_up(other_home, volume)
    holding.release()
    assert running.end() == 0, running.output
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


# -- the droplet


def add_three(sim: Simulator) -> list[Volume]:
    """More than are under way at a time."""
    return [add_volume(sim, name, offset=0, size=8 * MIB) for name in ("a", "b", "c")]


def test_a_droplet_that_is_deleted_during_a_sync_is_replaced(home: Home, sim: Simulator, tmp_path: Path) -> None:
    volumes = add_three(sim)
    holding = HoldingPython(tmp_path / "python", 4 * MIB)
    sim.faults.add(holding.fault)
    running = start(home, constants=IMPATIENT)
    holding.wait(running)
    sim.remove_droplet(sim.droplets[0])
    assert running.end() == 0, running.output
    assert len(created(sim, "droplet")) == 2
    assert len(created(sim, "snapshot")) == len(volumes)
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_a_volume_that_loses_three_droplets_fails(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """The others are backed up over a fourth one."""
    _, *others = add_three(sim)
    holdings = [HoldingPython(tmp_path / f"python-{number}", 2 * MIB) for number in (1, 2, 3)]
    sim.faults.add(*(replace(holding.fault, nth=nth) for nth, holding in enumerate(holdings, start=1)))
    running = start(home, constants=IMPATIENT)
    for holding in holdings:
        holding.wait(running)
        sim.remove_droplet(sim.droplets[0])
    assert running.end() == 1
    assert re.search("error: a: .*; 3 droplets were lost over it", running.output)
    assert len(created(sim, "snapshot")) == 3
    assert_backed_up(home, *others)
    assert_nothing_left(sim)


def check_ended_without_a_droplet(running: Running, sim: Simulator) -> None:
    """The run has failed with one line."""
    assert running.end() == 1, running.output
    assert len(errors_of(running.output)) == 1, running.output
    assert "droplet" in errors_of(running.output)[0]
    assert len(re.findall(r" [abc] .*FAILED", running.output)) == 3
    assert len(created(sim, "droplet")) == 2
    assert_nothing_left(sim)


def test_a_droplet_whose_creation_fails_is_replaced(home: Home, sim: Simulator) -> None:
    volumes = add_three(sim)
    sim.faults.add(Fault("creation-errored"))
    run(home, constants={**IMPATIENT, "ADDRESS_LIMIT": 600})
    assert len(created(sim, "droplet")) == 2
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_a_second_droplet_whose_creation_fails_ends_the_run(home: Home, sim: Simulator) -> None:
    add_three(sim)
    sim.faults.add(Fault("creation-errored", times=FOREVER))
    check_ended_without_a_droplet(start(home, constants=IMPATIENT), sim)


def test_a_droplet_that_is_deleted_while_it_starts_is_replaced(home: Home, sim: Simulator) -> None:
    volumes = add_three(sim)
    sim.faults.add(Fault("never-active"))
    running = start(home, constants={**IMPATIENT, "ADDRESS_LIMIT": 600})
    seen = re.compile(r"/v2/droplets/\d+")
    until(lambda: any(seen.fullmatch(record.path) and record.status == 200 for record in sim.requests))
    sim.remove_droplet(sim.droplets[0])
    assert running.end() == 0, running.output
    assert len(created(sim, "droplet")) == 2
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_a_droplet_that_is_deleted_while_a_clone_is_being_attached_is_replaced(home: Home, sim: Simulator) -> None:
    volumes = add_three(sim)
    sim.faults.add(Fault("action-stuck"))
    running = start(home, constants={**IMPATIENT, "ACTION_LIMIT": 3})
    until(lambda: any(record.method == "POST" and record.path.endswith("/actions") for record in sim.requests))
    sim.remove_droplet(sim.droplets[0])
    assert running.end() == 0, running.output
    assert len(created(sim, "droplet")) == 2
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_a_droplet_of_which_nothing_can_be_told_is_not_replaced(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data", size=12 * MIB)
    sim.faults.add(Fault("ssh-cut", bytes=5 * MIB))
    running = start(home, constants={"PATIENCE": 0.3})
    until(lambda: any(record.path.endswith("/actions") for record in sim.requests))
    sim.faults.add(Fault("error", method="GET", path=r"^/v2/droplets/\d+$", status=503, times=FOREVER))
    assert running.end() == 0, running.output
    assert "connecting again" in running.output
    assert len(created(sim, "droplet")) == 1
    assert_backed_up(home, volume)


def machine_of(sim: Simulator) -> Machine:
    """The machine of the droplet, as soon as there is one."""
    return until(lambda: sim.droplets[0].machine if sim.droplets else None)


def test_a_droplet_gives_up_a_connection_that_is_dead_within_minutes(home: Home, sim: Simulator) -> None:
    """Or its agents, which read the volume and keep it in memory, pile up behind connections that broke silently."""
    add_volume(sim, NAME)
    running = start(home)
    retries = int(machine_of(sim).kernel_setting("net.ipv4.tcp_retries2"))
    assert running.end() == 0
    assert 3 <= retries <= 10


@pytest.fixture
def old_python(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fault]:
    """A droplet that has a Python of this version; skips the test if there is none here."""
    version: str = request.param
    python = python_3(int(version.removeprefix("3.")))
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    there = tmp_path / "python"
    there.mkdir()
    # A droplet does not see this machine's /root.
    subprocess.run(["mount", "--bind", Path(python).parent.parent, there], check=True)
    command = f"env LD_LIBRARY_PATH={there}/lib {there}/bin/python{version}"
    yield Fault("python", text=command, times=FOREVER)
    subprocess.run(["umount", "--lazy", there], check=True)


@pytest.mark.parametrize("old_python", ["3.8", "3.9"], indirect=True)
@pytest.mark.beyond_bare
def test_a_droplet_with_an_old_python_will_do(home: Home, sim: Simulator, old_python: Fault) -> None:
    volume = add_volume(sim, NAME)
    sim.faults.add(old_python)
    for number in range(2):
        write_at(volume.path, 5 * MIB, noise(PAGE, number))
        run(home)
        assert_backed_up(home, volume)


@pytest.mark.parametrize(
    ("old_python", "version"), [("3.7", "3.7"), ("3.6", "3.6")], indirect=["old_python"], ids=["3.7", "3.6"]
)
@pytest.mark.beyond_bare
def test_a_droplet_with_a_python_that_is_too_old_is_told(
    home: Home, sim: Simulator, old_python: Fault, version: str
) -> None:
    add_volume(sim, NAME)
    sim.faults.add(old_python)
    done = run(home, expect=1)
    assert "connecting again" not in done.stdout + done.stderr
    (error,) = errors_of(done.stderr)
    assert all(words in error for words in (version, "3.8", "droplet_image")), error
    assert_nothing_left(sim)


def test_a_clone_that_is_in_use_on_the_droplet_is_refused(home: Home, sim: Simulator) -> None:
    """By what no list of mounts shows: a mount of another namespace, or a device-mapper."""
    add_volume(sim, NAME)
    sim.faults.add(Fault("device-held"))
    done = run(home, expect=1)
    (error,) = errors_of(done.stderr)
    assert re.search(rf"{NAME}: .*\b(in use|mounted)\b", error)
    assert "connecting again" not in done.stderr
    assert not home.image(NAME).exists()
    assert_nothing_left(sim)


def test_automount_is_disarmed_once_more_before_the_first_attach(home: Home, sim: Simulator) -> None:
    """What is set up late at boot may bring it back."""
    volume = add_volume(sim, NAME)
    subprocess.run(["mkfs.ext4", "-q", "-F", volume.path], check=True)
    sim.faults.add(Fault("late-automount"))
    run(home)
    assert_backed_up(home, volume)


@pytest.mark.parametrize("behaviour", [{"ssh_seconds": 5}], indirect=True, ids=["slow"])
def test_the_image_s_own_host_key_is_passed_over_while_the_droplet_boots(home: Home, sim: Simulator) -> None:
    """There sshd may be up before cloud-init has put ours in its place."""
    volume = add_volume(sim, NAME)
    running = start(home)
    machine = machine_of(sim)
    path = machine.root / "run/sshd/ssh_host_ecdsa_key"
    ours = until(lambda: path.read_text() if path.exists() else None)
    paramiko.ECDSAKey.generate(bits=256).write_private_key_file(str(path))
    until(lambda: "[preauth]" in sshd_log(home) or running.process.poll() is not None)
    path.write_text(ours)
    machine.restart_ssh()
    assert running.end() == 0, running.output
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def sshd_log(home: Home) -> str:
    """What sshd has written on the droplets."""
    return "".join(path.read_text() for path in home.directory.parent.glob("cloud/*/droplet-*.log"))


# -- what others are told, and signals


@pytest.fixture
def pings() -> Iterator[tuple[str, list[str]]]:
    """The address of a monitoring service, and the bodies that it got."""
    bodies: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"] or 0)).decode())
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/ping", bodies
        server.shutdown()
        thread.join()


def test_an_error_that_repeats_the_token_is_told_without_it(
    home: Home, sim: Simulator, pings: tuple[str, list[str]]
) -> None:
    url, bodies = pings
    home.configure(healthchecks=url)
    add_volume(sim, NAME)
    said = f"who is {sim.token}?"
    sim.faults.add(Fault("error", method="POST", path="/snapshots$", status=422, text=said, times=FOREVER))
    done = run(home, "--verbose", expect=1)
    assert "who is" in done.stderr
    assert "who is" in bodies[-1]
    assert sim.token not in "".join((done.stdout, done.stderr, *bodies))


def test_a_summary_that_is_too_long_loses_its_beginning(
    home: Home, sim: Simulator, pings: tuple[str, list[str]]
) -> None:
    url, bodies = pings
    home.configure(healthchecks=url)
    for volume in add_three(sim):
        text = f"begin-{volume.name} {'x' * 6000} end"
        path = f"{volume.id}/snapshots$"
        sim.faults.add(Fault("error", method="POST", path=path, status=422, text=text, times=FOREVER))
    run(home, expect=1)
    assert len(bodies[-1]) <= 10_000
    assert "begin-a" not in bodies[-1]
    assert "FAILED" in bodies[-1]
    assert bodies[-1].rstrip().splitlines()[-1].startswith("this run cost")


def test_a_hangup_does_not_end_a_run_that_was_started_to_survive_it(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """As nohup starts it."""
    volume = add_volume(sim, NAME, offset=0, size=8 * MIB)
    holding = HoldingPython(tmp_path / "python", 4 * MIB)
    sim.faults.add(holding.fault)
    running = start_traced(home, ("sh", "-c", 'trap "" HUP; exec "$@"', "sh"))
    holding.wait(running)
    running.signal(signal.SIGHUP)
    holding.release()
    assert running.end() == 0, running.output
    assert_backed_up(home, volume)


def test_a_wait_of_days_is_not_obeyed_to_the_letter(home: Home, sim: Simulator) -> None:
    add_volume(sim, NAME)
    sim.faults.add(Fault("rate-limit", path="^/v2/regions$", text="1000000", times=FOREVER))
    running = start(home)
    waiting = re.compile(r"trying again in (\d+) s")
    until(lambda: waiting.search(running.output) or running.process.poll() is not None)
    with contextlib.suppress(TypeError):
        found = waiting.search(running.output)
        assert found is None or int(found[1]) <= 3600
    running.signal(signal.SIGTERM)
    assert running.end() in (1, 128 + signal.SIGTERM)
    assert_nothing_left(sim)
