"""Volumes and snapshots as sparse files, and loop devices over them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

GIB = 1024**3

_FICLONE = 0x40049409
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CLR_FD = 0x4C01
_BLKROSET = 0x125D
_LOOP_MAJOR = 7
_AUTOCLEAR, _PARTSCAN = 4, 8  # with the latter its partitions go with the device
_DIRECT_IO = 16  # where the file system can: a volume is mostly holes, and to cache those too is most of a run's time
_COPY_STEP = 8 * 1024 * 1024
_RELEASE_LIMIT = 300  # seconds


def create_sparse(path: Path, size: int) -> None:
    """A new file of nothing but zeros."""
    with path.open("xb") as file:
        file.truncate(size)


def copy_sparse(source: Path, target: Path, size: int | None = None) -> None:
    """Copy a file with its holes, shared with the source where the file system can, grown to `size`."""
    with source.open("rb") as reader, target.open("xb") as writer:
        whole = os.fstat(reader.fileno()).st_size
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            writer.truncate(whole)
            _copy_extents(reader.fileno(), writer.fileno(), whole)
        writer.truncate(size or whole)


def _copy_extents(reader: int, writer: int, size: int) -> None:
    """Copy all stretches of data, leave the holes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(reader, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                return
            raise
        position = os.lseek(reader, start, os.SEEK_HOLE)
        _copy_range(reader, writer, start, position)


def _copy_range(reader: int, writer: int, start: int, end: int) -> None:
    """Copy one stretch of bytes."""
    os.lseek(writer, start, os.SEEK_SET)
    while start < end:
        copied = os.sendfile(writer, reader, start, min(_COPY_STEP, end - start))
        if not copied:  # the source shrank meanwhile
            return
        start += copied


class LoopDevice:
    """A block device over a file. It is free again at the latest when this process ends, however that happens."""

    def __init__(self, backing: Path) -> None:
        """Take a free loop device for `backing`."""
        with backing.open("r+b") as file:
            self._fd, self.path = _configure_loop(file.fileno())

    def close(self) -> None:
        """Free the device; a process that still has it open can read on until it closes it."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            _make_writable(self._fd)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fd, _LOOP_CLR_FD)
        self.forsake()

    def forsake(self) -> None:
        """Leave the device to the kernel, which is what becomes of it when this process is killed."""
        os.close(self._fd)
        self._fd = -1


def _configure_loop(backing: int) -> tuple[int, str]:
    """Bind a free loop device to an open file; returns the descriptor that keeps it, and its path."""
    info = struct.pack("=52xI176x", _AUTOCLEAR | _PARTSCAN | _DIRECT_IO)
    config = struct.pack("=II", backing, 512) + info + bytes(64)
    while True:
        device, path = _open_free_loop()
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, config)
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:  # somebody else was quicker: take the next one
                raise
        else:
            _make_writable(device)  # its last user may have left it read-only
            return device, path


def _make_writable(device: int) -> None:
    """Undo what `blockdev --setro` did; the device would stay like that for whoever gets it next."""
    fcntl.ioctl(device, _BLKROSET, struct.pack("i", 0))


def mend_free_devices() -> None:
    """Make those loop devices writable again that a killed simulator left read-only: free ones have no reason to be."""
    for device in Path("/sys/block").glob("loop*"):
        with contextlib.suppress(OSError):
            if (device / "ro").read_text() == "1\n" and not (device / "loop").exists():
                node = os.open(f"/dev/{device.name}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    _make_writable(node)
                finally:
                    os.close(node)


def _open_free_loop() -> tuple[int, str]:
    """Open a loop device that is free at the moment."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    finally:
        os.close(control)
    path = f"/dev/loop{number}"
    if not os.path.exists(path):  # inside a container /dev does not follow the kernel
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o660, os.makedev(_LOOP_MAJOR, number))
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), path


@contextlib.contextmanager
def mounted(disk: Path, directory: Path, *options: str) -> Iterator[Path]:
    """A file with a file system, mounted while the context lasts; after it the file has all that was written."""
    directory.mkdir(exist_ok=True)
    with contextlib.closing(LoopDevice(disk)) as device:
        subprocess.run(["mount", "-o", ",".join(("defaults", *options)), device.path, directory], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", directory], check=True)
            end = time.monotonic() + _RELEASE_LIMIT
            while _is_in_use(device.path):
                if time.monotonic() > end:
                    raise TimeoutError(f"{device.path} is in use long after it was unmounted")
                time.sleep(0.05)


def _is_in_use(device: str) -> bool:
    """Whether something has it mounted: the namespace of a droplet that starts takes a copy of each mount along."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as problem:
        if problem.errno != errno.EBUSY:
            raise
        return True
    return False


def file_system_of(device: str) -> str:
    """The type of the file system on a device, empty if it has none."""
    found = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "TYPE", device], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()
