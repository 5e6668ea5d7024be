"""Looks whether this machine can do what the tests and the demonstration need, and says in one line what it cannot.

Without it, that showed in the middle, as a traceback or as a droplet that never comes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from signals import Stop
from simulator.machine import Machine, MachineOptions
from simulator.ownership import own_mark
from simulator.storage import LoopDevice, create_sparse

SSH_LIMIT = 60.0
DISK_SIZE = 4 << 20


def run(*command: str | Path) -> None:
    """Run a command; what it complains of is the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{command[0]} exits with {done.returncode}")


def make_file_system(directory: Path) -> None:
    """Mount a new ext4 over a loop device."""
    disk, target = directory / "disk", directory / "mnt"
    create_sparse(disk, DISK_SIZE)
    target.mkdir()
    device = LoopDevice(disk)
    try:
        run("mkfs.ext4", "-q", device.path)
        run("mount", device.path, target)
        run("umount", target)
    finally:
        device.close()


def boot_droplet(directory: Path) -> None:
    """Start a simulated droplet, and hear its sshd."""
    log = directory / "log"
    cloud_config = "#cloud-config\n" + yaml.safe_dump({"disable_root": False})
    machine = Machine(
        0, "preflight", mark=own_mark(), user_data=cloud_config, public_keys=[], log=log, options=MachineOptions()
    )
    try:
        machine.open_ssh()
        give_up = time.monotonic() + SSH_LIMIT
        while not greets(machine.address):
            if not machine.alive or time.monotonic() > give_up:
                raise OSError(" / ".join(log.read_text().split("\n")[-3:]).strip(" /") or "its sshd does not answer")
            time.sleep(0.02)
    finally:
        machine.destroy()


def greets(address: str) -> bool:
    """Whether an SSH server answers there."""
    try:
        with socket.create_connection((address, 22), timeout=SSH_LIMIT) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


CHECKS: dict[str, Callable[[Path], None]] = {
    "loop devices with a file system cannot be mounted, which a container wants --privileged for": make_file_system,
    "a simulated droplet, which is an sshd in namespaces of its own, does not start": boot_droplet,
}


def explain(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        output = error.stderr or b""
        said = output if isinstance(output, str) else output.decode(errors="replace")
        return " / ".join(said.split("\n")).strip(" /") or str(error)
    return " / ".join(str(error).split("\n"))


def main() -> None:
    """Do all checks; the first one that fails is told, in the name of the program that is given."""
    stop = Stop()
    for trouble, check in CHECKS.items():
        with tempfile.TemporaryDirectory(prefix="preflight-") as directory:
            try:
                check(Path(directory))
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                sys.exit(f"{sys.argv[1]} cannot run here: {trouble} ({explain(error)})")
        stop.catch_up()


if __name__ == "__main__":
    main()
