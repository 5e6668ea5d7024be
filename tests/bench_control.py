"""What a run takes beside its syncs. `tests/bench --control-plane` runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulator import FOREVER, Behaviour, Fault, Simulator

import dosvob

MIB = 1 << 20
VOLUMES = 8
DELAYS = dataclasses.replace(  # 40 s until a droplet lets us in; 7 s for an attach and 2 s more for the device
    Behaviour.realistic(), boot_seconds=22, address_seconds=3, ssh_seconds=15, action_seconds=7, snapshot_interval=0
)
SNAPSHOT_SECONDS = 4


def control_plane(directory: Path) -> str:
    """What a run over some small unchanged volumes takes beside its syncs, with delays as DigitalOcean has them."""
    with Simulator(directory / "cloud", behaviour=DELAYS) as simulator:
        delay = Fault("delay", method="POST", path="/snapshots$", seconds=SNAPSHOT_SECONDS, times=FOREVER)
        simulator.faults.add(delay)
        for number in range(VOLUMES):
            volume = simulator.add_volume(f"volume-{number}", size_gib=1)
            with volume.path.open("r+b") as file:
                file.write(os.urandom(64 * MIB))
        (directory / "conf.json").write_text(json.dumps({"do_token": simulator.token, "region": "fra1"}))
        (directory / "conf.json").chmod(0o600)
        shutil.rmtree(directory / "backups", ignore_errors=True)
        return "\n".join(f"{name}: {timed_run(directory, simulator)}" for name in ("the first run", "nothing changed"))


def timed_run(directory: Path, simulator: Simulator) -> str:
    """One run of the script, and what it took."""
    start = time.monotonic()
    script = subprocess.Popen(
        [sys.executable, dosvob.__file__, "--verbose"],
        cwd=directory,
        env={**os.environ, **simulator.environment()},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    moments = [(time.monotonic() - start, line) for line in script.stdout]
    if script.wait():
        sys.exit("the run failed: " + "".join(line for _, line in moments))
    total = time.monotonic() - start
    up = next(moment for moment, line in moments if "is up at" in line)
    begun = [moment for moment, line in moments if "syncing its snapshot" in line]
    ended = [moment for moment, line in moments if ": backed up" in line]
    syncing = sum(end - begin for begin, end in zip(begun, ended, strict=True))
    # One droplet, to which one volume is attached before anything can be synced; one clone must be detached in the end.
    droplet = DELAYS.boot_seconds + DELAYS.address_seconds + DELAYS.ssh_seconds
    needed = droplet + DELAYS.action_seconds + DELAYS.device_seconds + syncing + DELAYS.release_seconds
    return (
        f"{VOLUMES} volumes in {total:.1f} s: SSH after {up:.1f} s (the droplet takes {droplet:.0f}); first attach "
        f"{begun[0] - up:.1f} s; syncs {syncing:.1f} s; between them {ended[-1] - begun[0] - syncing:.1f} s; teardown "
        f"{total - ended[-1]:.1f} s. Of it {needed:.1f} s cannot be avoided: beyond that and its sync a volume costs "
        f"{(total - needed) / VOLUMES:.1f} s"
    )
