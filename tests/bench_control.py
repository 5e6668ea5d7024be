"""What a run takes beside its syncs. `tests/bench --control-plane` runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulator import FOREVER, Behaviour, Fault, Simulator

import dosvob

MIB = 1 << 20
HERE = Path(dosvob.__file__)
DELAYS = dataclasses.replace(  # 40 s until a droplet lets us in; 7 s for an attach and 2 s more for the device
    Behaviour.realistic(), boot_seconds=22, address_seconds=3, ssh_seconds=15, action_seconds=7, snapshot_interval=0
)
SNAPSHOT_SECONDS = 4


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
        (directory / "conf.json").write_text(json.dumps({"do_token": simulator.token, "region": "fra1"}))
        (directory / "conf.json").chmod(0o600)
        shutil.rmtree(directory / "backups", ignore_errors=True)
        timed_run(HERE, directory, simulator, count)  # from now on nothing changes
        simulator.behave(dataclasses.replace(DELAYS, volumes_per_droplet=attachments))
        delay = Fault("delay", method="POST", path="/snapshots$", seconds=SNAPSHOT_SECONDS, times=FOREVER)
        simulator.faults.add(delay)
        return [f"{script}: {timed_run(script, directory, simulator, count)}" for script in scripts]


def timed_run(script: Path, directory: Path, simulator: Simulator, count: int) -> str:
    """One run of a script over so many volumes, and what it took."""
    start, before = time.monotonic(), len(simulator.requests)
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
