"""What a run takes beside its syncs, and what two syncs at a time: `tests/bench --control-plane` and `--throttled`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulator import FOREVER, Behaviour, Fault, Simulator
from trouble_support import droplet_python

import dosvob

MIB = 1 << 20
HERE = Path(dosvob.__file__)
DELAYS = dataclasses.replace(  # 40 s until a droplet lets us in; 7 s for an attach and 2 s more for the device
    Behaviour.realistic(), boot_seconds=22, address_seconds=3, ssh_seconds=15, action_seconds=7, snapshot_interval=0
)
SNAPSHOT_SECONDS = 4


def measure(arguments: argparse.Namespace) -> str:
    """Measure what is asked for."""
    if arguments.throttled:
        return throttled(arguments.directory, arguments.gib, arguments.old)
    counts = [int(count) for count in arguments.volumes]
    return control_plane(arguments.directory, counts, arguments.attachments, arguments.old)


def control_plane(directory: Path, counts: Sequence[int], attachments: int, old: Path | None) -> str:
    """What runs over some small unchanged volumes take beside their syncs, with delays as DigitalOcean has them.

    For each count of volumes one run, and one of the checkout `old`; a droplet has at most so many attachments.
    """
    scripts = [HERE, *([old.resolve() / HERE.name] if old else [])]
    return "\n".join(line for count in counts for line in measured(directory, count, attachments, scripts))


def measured(directory: Path, count: int, attachments: int, scripts: Sequence[Path]) -> list[str]:
    """A line for each script, with so many volumes."""
    with Simulator(directory / "cloud") as simulator:
        for number in range(count):
            volume = simulator.add_volume(f"volume-{number}", size_gib=1)
            with volume.path.open("r+b") as file:
                file.write(os.urandom(64 * MIB))
        configure(directory, simulator)
        timed_run(HERE, directory, simulator, count)  # from now on nothing changes
        simulator.behave(dataclasses.replace(DELAYS, volumes_per_droplet=attachments))
        delay = Fault("delay", method="POST", path="/snapshots$", seconds=SNAPSHOT_SECONDS, times=FOREVER)
        simulator.faults.add(delay)
        return [f"{script}: {timed_run(script, directory, simulator, count)}" for script in scripts]


THROTTLED = """
import os, threading, time
plain, lock, due = os.pread, threading.Lock(), 0.0
def pread(fd, size, offset):
    global due
    with lock:
        due = max(due, time.monotonic()) + size / 200e6
        wait = due - time.monotonic()
    time.sleep(max(wait, 0))
    return plain(fd, size, offset)
os.pread = pread
"""


def throttled(directory: Path, gib: int, old: Path | None) -> str:
    """What the syncs of two unchanged volumes take if each gives 200 MB/s; in turns with the checkout `old`.

    The directory must be where copies cost nothing, as on XFS, and in memory, for a disk may give less than that.
    """
    times: list[str] = []
    with (
        tempfile.TemporaryDirectory() as place,
        Simulator(directory / "cloud", dataclasses.replace(Behaviour(), snapshot_interval=0)) as simulator,
    ):
        for number in range(2):
            with simulator.add_volume(f"volume-{number}", size_gib=gib).path.open("r+b") as file:
                for _ in range(gib * 16):
                    file.write(os.urandom(64 * MIB))
        configure(directory, simulator)
        moments_of(HERE, directory, simulator)
        simulator.faults.add(droplet_python(Path(place), THROTTLED))
        for script in (HERE, *([old.resolve() / HERE.name] if old else [])) * 3:
            moments = moments_of(script, directory, simulator)
            begun = next(moment for moment, line in moments if "syncing its snapshot" in line)
            ended = max(moment for moment, line in moments if ": backed up" in line)
            times.append(f"{script}: {ended - begun:.1f} s")
    return "\n".join(sorted(times))


def configure(directory: Path, simulator: Simulator) -> None:
    """A home without backups for runs over the simulated account."""
    (directory / "conf.json").write_text(json.dumps({"do_token": simulator.token, "region": "fra1"}))
    (directory / "conf.json").chmod(0o600)
    shutil.rmtree(directory / "backups", ignore_errors=True)


def moments_of(script: Path, directory: Path, simulator: Simulator) -> list[tuple[float, str]]:
    """The lines of a run, with the seconds since its beginning."""
    start = time.monotonic()
    running = subprocess.Popen(
        [sys.executable, script, "--verbose"],
        cwd=directory,
        env={**os.environ, **simulator.environment()},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    moments = [(time.monotonic() - start, line) for line in running.stdout]
    if running.wait():
        sys.exit("the run failed: " + "".join(line for _, line in moments))
    return moments


def timed_run(script: Path, directory: Path, simulator: Simulator, count: int) -> str:
    """One run of a script over so many volumes, and what it took."""
    start, before = time.monotonic(), len(simulator.requests)
    moments = moments_of(script, directory, simulator)
    total, requests = time.monotonic() - start, len(simulator.requests) - before
    up = next(moment for moment, line in moments if "is up at" in line)
    begun = [moment for moment, line in moments if "syncing its snapshot" in line]
    ended = [moment for moment, line in moments if ": backed up" in line]
    syncing = sum(end - begin for begin, end in zip(begun, ended, strict=True))
    # One droplet, to which all volumes are attached one after the other; the last one's device, its sync, the teardown.
    droplet = DELAYS.boot_seconds + DELAYS.address_seconds + DELAYS.ssh_seconds
    attaches = count * DELAYS.action_seconds
    needed = droplet + attaches + DELAYS.device_seconds + ended[-1] - begun[-1] + DELAYS.release_seconds
    return (
        f"{count} volumes in {total:.1f} s with {requests} requests: SSH after {up:.1f} s (the droplet takes "
        f"{droplet:.0f}); from then to the last one's end {ended[-1] - up:.1f} s (attaches take {attaches:.0f}); syncs "
        f"{syncing:.1f} s; teardown {total - ended[-1]:.1f} s (the droplet's volumes take {DELAYS.release_seconds:.0f} "
        f"to be free). {needed:.1f} s cannot be avoided while a droplet attaches one after the other: beyond that a "
        f"volume costs {(total - needed) / count:.1f} s"
    )
