"""What the tests of `mount` share: the command as a process, and what is read through it."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import SCRIPT

MIB = 1 << 20


class Shown:
    """A `mount` that goes on; `said` is all that it has said when it has ended."""

    def __init__(self, directory: Path, process: subprocess.Popen[str]) -> None:
        self.directory = directory
        self.process = process
        self.said = ""

    def times(self, name: str) -> list[str]:
        """The files of a volume, named as files of versions are, the newest first."""
        names = {path.name for path in (self.directory / name).iterdir()} - {"latest"}
        return sorted((each.replace("-", "") for each in names), reverse=True)

    def path(self, name: str, time: str) -> Path:
        """The file of a time, as files of versions are named."""
        return self.directory / name / f"{time[:4]}-{time[4:6]}-{time[6:]}"

    def digest(self, name: str, time: str) -> str:
        """The SHA-256 of a file."""
        with self.path(name, time).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def unmount(directory: Path) -> None:
    """Unmount; a loop device that was over a file there lets go of it a moment after its own unmount.

    That is when droplets that have just begun to start have let go of it, too.
    """
    for attempt in range(600):
        if subprocess.run(["umount", directory], check=attempt == 599, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)


@contextlib.contextmanager
def shown(backups: Path, directory: Path, *arguments: object, code: int | None = 0) -> Iterator[Shown]:
    """The images and versions as files, by the command, without any package; it ends with this code, None for any."""
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-I", "-S", SCRIPT, "--backups", backups, "mount", directory, *arguments]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    this = Shown(directory, process)
    try:
        line = ""
        while " shows " not in line:
            line = process.stdout.readline()
            assert line, f"it ended: {this.said}"
            this.said += line
        yield this
        if process.poll() is None:
            unmount(directory)
        this.said += process.communicate(timeout=180)[0]
        assert code in (None, process.returncode), this.said
        assert "Traceback" not in this.said
        assert "unexpected" not in this.said
    finally:
        if process.poll() is None:
            subprocess.run(["umount", "--lazy", directory], check=False)
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stdout.close()


class Direct:
    """Reads a file past the kernel's cache, in chunks."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, MIB)

    def chunk(self, index: int) -> bytes:
        """A MiB of it; raises OSError."""
        length = os.preadv(self.fd, [self._buffer], index * MIB)
        return self._buffer[:length]

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)
        self._buffer.close()
