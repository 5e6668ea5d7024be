"""Who owns what on this machine, so that what a killed simulator left behind is found and removed.

Everything a simulator makes outside of its own memory carries its owner's mark: the process's PID namespace, id and
start time. Loop devices are freed by the kernel with the process that holds them, but stay read-only if they were.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

from .storage import mend_free_devices

_MARK = re.compile(r"do-simulator-(\d+)-(\d+)-(\d+)")


def own_mark() -> str:
    """The mark of this process."""
    return f"do-simulator-{_pid_namespace()}-{os.getpid()}-{_start_time(os.getpid())}"


def is_stale(text: str) -> bool:
    """Whether `text` carries a mark whose owner, of our own PID namespace, is dead."""
    found = _MARK.search(text)
    if found is None or int(found[1]) != _pid_namespace():
        return False
    return _start_time(int(found[2])) != int(found[3])


def sweep(directory: Path) -> None:
    """Remove what dead simulators left: processes, network interfaces, and files in `directory`; free loop devices."""
    _sweep_processes()
    _sweep_interfaces()
    mend_free_devices()
    for entry in directory.iterdir():
        if entry.is_dir() and is_stale(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _start_time(pid: int) -> int:
    """When a process started, in the kernel's ticks; -1 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    fields = text.rpartition(")")[2].split()
    return -1 if fields[0] == "Z" else int(fields[19])


def _sweep_processes() -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if is_stale((process / "cmdline").read_bytes().decode(errors="replace")):
                os.kill(int(process.name), signal.SIGKILL)


def _sweep_interfaces() -> None:
    for interface in Path("/sys/class/net").iterdir():
        with contextlib.suppress(OSError):
            if is_stale((interface / "ifalias").read_text()):
                subprocess.run(["ip", "link", "delete", interface.name], check=False, capture_output=True)
