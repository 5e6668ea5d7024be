"""The first process of a droplet, inside its fresh namespaces: prepares mounts and network, then becomes sshd.

Started by `machine.py`, which writes the settings as one line of JSON and later a line "ssh" to standard input.
It uses the standard library alone, and starts as fast as Python can.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRIVATE = Path("/run/sshd")
AUTOMOUNT_RULE = Path("/etc/udev/rules.d/99-digitalocean-automount.rules")
_PRIVATE_DIRECTORIES = (str(PRIVATE), "/dev/disk", "/mnt", "/root", "/etc/udev/rules.d")
_TESTS = Path(__file__).resolve().parent.parent


def main() -> None:
    """Prepare the droplet, wait for the order to open SSH, become sshd."""
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    _set_up_mounts()
    _write_files(settings)
    _set_up_network(settings["address"])
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "ssh":
        return
    os.execv("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", str(PRIVATE / "sshd_config")])


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _set_up_mounts() -> None:
    """Hide the host's loop mounts and what tests show by FUSE, and give the droplet directories of its own.

    The program behind a FUSE mount ends when the last namespace lets go of it, which would be with this droplet.
    """
    mounted = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for source, target, kind in reversed(mounted):
        is_shown = kind.startswith("fuse") and Path(target).is_relative_to(os.environ.get("TMPDIR") or "/tmp")
        if source.startswith("/dev/loop") or is_shown:
            done = subprocess.run(("umount", "--lazy", target), check=False, stderr=subprocess.DEVNULL)
            if os.path.ismount(target):  # else another test has just removed its directory, and the mount with it
                done.check_returncode()
    for directory in _PRIVATE_DIRECTORIES:
        with _still_there(_TESTS, directory):
            os.makedirs(directory, exist_ok=True)
            _run("mount", "-t", "tmpfs", "-o", "mode=755", "droplet", directory)
    os.mkdir("/dev/disk/by-id")


@contextlib.contextmanager
def _still_there(kept: Path, covered: str) -> Iterator[None]:
    """Keep a directory where it is while another one is covered: what tests write is wanted, in root's home too."""
    if not kept.is_relative_to(covered):
        yield
        return
    aside = PRIVATE / "aside"
    aside.mkdir()
    _run("mount", "--bind", str(kept), str(aside))
    yield
    kept.mkdir(parents=True)
    _run("mount", "--move", str(aside), str(kept))
    aside.rmdir()


def _write_files(settings: dict[str, Any]) -> None:
    """What cloud-init and the image provide: sshd's files, a name, the auto-mount rule, an open root account."""
    for name, (content, mode) in settings["files"].items():
        path = PRIVATE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(mode)
    if settings["automount"]:
        AUTOMOUNT_RULE.write_text('# ACTION=="add", SUBSYSTEM=="block", ENV{ID_FS_USAGE}=="filesystem", RUN+=...\n')
    _unlock_root()
    _run("hostname", settings["hostname"])


def _unlock_root() -> None:
    """Hide the host's shadow file behind one in which root is not locked; sshd refuses locked accounts."""
    shadow = Path("/etc/shadow")
    if not shadow.exists():
        return
    copy = PRIVATE / "shadow"
    shutil.copy(shadow, copy)
    lines = copy.read_text().splitlines()
    copy.write_text("".join(("root:*:20000::::::" if line.startswith("root:") else line) + "\n" for line in lines))
    _run("mount", "--bind", str(copy), str(shadow))


def _set_up_network(address: str) -> None:
    batch = f"addr add {address}/30 dev eth0\nlink set eth0 up\nlink set lo up\n"
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)


if __name__ == "__main__":
    main()
