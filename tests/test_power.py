"""Power cuts at any moment, on a disk that loses whatever was not made durable, sector by sector and name by name.

Every call that changes a file is recorded. Then the directory is made what a power cut may leave: what was made durable
is there, of the rest any part. Whatever that is, the image is one of the two snapshots once it was recovered, or when
it is read before; a power cut may come during the recovery as well.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from versions_support import MIB, Lineage, digest, recover

import dosvob

SECTOR = 512
CALLS = ("rename", "unlink", "mkdir")


@dataclass(frozen=True)
class Change:
    """One call: of a file its number and what becomes of its content; of a directory its path and names."""

    kind: str
    file: int = 0
    offset: int = 0
    data: bytes | None = None  # None: zeros, of that length
    length: int = 0
    names: tuple[Path, ...] = ()
    at: int = 0  # ns


@dataclass
class Disk:
    """What is recorded: changes, and which of them are durable by when."""

    changes: list[Change] = field(default_factory=list)
    durable: dict[int, int] = field(default_factory=dict)  # by the number of a change: how many there were then

    def note(self, change: Change) -> None:
        """One more."""
        self.changes.append(change)

    def sync(self, fd: int) -> None:
        """What is known of that file or directory is durable from now on."""
        status, path = os.fstat(fd), Path(os.readlink(f"/proc/self/fd/{fd}"))
        for number, change in enumerate(self.changes):
            is_in_it = any(name.parent == path for name in change.names)
            is_of_it = is_in_it if stat.S_ISDIR(status.st_mode) else change.file == status.st_ino
            if is_of_it and number not in self.durable:
                self.durable[number] = len(self.changes)


class RecordedFile(io.FileIO):
    """A file whose writes are recorded."""

    disk: Disk

    def write(self, data: Any) -> int:
        """Write, and record it."""
        content = bytes(data)
        self.disk.note(Change("write", os.fstat(self.fileno()).st_ino, self.tell(), content, at=time.time_ns()))
        return io.FileIO.write(self, data)


class RecordedLibrary:
    """The C library, of which fallocate is recorded."""

    def __init__(self, disk: Disk, library: Any) -> None:
        self._disk = disk
        self._library = library

    def fallocate64(self, fd: int, mode: int, offset: Any, length: Any) -> int:
        """Punch a hole, and record it."""
        inode = os.fstat(fd).st_ino
        self._disk.note(Change("write", inode, offset.value, None, length.value, at=time.time_ns()))
        return int(self._library.fallocate64(fd, mode, offset, length))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


class Recorder:
    """What takes the place of the calls that change files: it makes them, and records them."""

    NAMES = ("rename", "unlink", "mkdir", "pwrite", "open", "fdopen", "ftruncate", "utime", "fsync", "fdatasync")

    def __init__(self) -> None:
        self.disk = Disk()
        self._calls: dict[str, Any] = {name: getattr(os, name) for name in self.NAMES}

    def install(self, patches: pytest.MonkeyPatch) -> None:
        """Record from now on."""
        for name in self.NAMES:
            patches.setattr(os, name, getattr(self, name, None) or functools.partial(self._named, name))
        patches.setattr(dosvob, "LIBC", cast("Any", RecordedLibrary(self.disk, dosvob.LIBC)))

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        """Write a part of a file."""
        written = int(self._calls["pwrite"](fd, data, offset))
        content = bytes(data[:written])
        self.disk.note(Change("write", os.fstat(fd).st_ino, offset, content, at=time.time_ns()))
        return written

    def open(self, path: Any, flags: int, *more: Any, **named: Any) -> int:
        """Open a file, which may be new, or become empty."""
        is_new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        fd = int(self._calls["open"](path, flags, *more, **named))
        if is_new:
            self.disk.note(Change("create", os.fstat(fd).st_ino, names=(Path(path),)))
        elif flags & os.O_TRUNC:
            self.disk.note(Change("truncate", os.fstat(fd).st_ino, at=time.time_ns()))
        return fd

    def fdopen(self, fd: int, mode: str = "r", buffering: int = -1, **named: Any) -> Any:
        """Make a file of a descriptor."""
        if mode != "wb":
            return self._calls["fdopen"](fd, mode, buffering, **named)
        file = RecordedFile(fd, mode)
        file.disk = self.disk
        return io.BufferedWriter(file, buffering)

    def ftruncate(self, fd: int, length: int) -> None:
        """Cut a file, or make it longer."""
        self._calls["ftruncate"](fd, length)
        self.disk.note(Change("truncate", os.fstat(fd).st_ino, length=length, at=time.time_ns()))

    def utime(self, fd: Any, ns: tuple[int, int]) -> None:
        """Set the time of a file."""
        self._calls["utime"](fd, ns=ns)
        self.disk.note(Change("utime", os.stat(fd).st_ino, at=ns[1]))

    def _named(self, name: str, *arguments: Any, **named: Any) -> Any:
        if name in ("fsync", "fdatasync"):
            self._calls[name](*arguments)
            self.disk.sync(arguments[0])
            return None
        if name == "mkdir" and os.path.lexists(arguments[0]):
            return self._calls[name](*arguments, **named)
        names = tuple(Path(path) for path in arguments[: 2 if name == "rename" else 1])
        inode = os.lstat(names[0]).st_ino if name != "mkdir" else 0
        done = self._calls[name](*arguments, **named)
        self.disk.note(Change(name, names=names, length=inode))
        return done


@contextlib.contextmanager
def recorded() -> Iterator[Disk]:
    """Record what this process does to files meanwhile."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patches:
        recorder.install(patches)
        yield recorder.disk


class Contents:
    """A directory with its files, to be made again; the image stays the same file, as its state knows it."""

    def __init__(self, lineage: Lineage) -> None:
        self.paths = lineage.paths
        self._root = lineage.backups
        files = {path: path.stat() for path in self._root.rglob("*") if path.is_file()}
        self._names = {path: status.st_ino for path, status in files.items()}
        self._bytes = {status.st_ino: path.read_bytes() for path, status in files.items()}
        self._times = {status.st_ino: status.st_mtime_ns for status in files.values()}
        self._directories = {path for path in self._root.rglob("*") if path.is_dir()}

    def after(self, disk: Disk, chance: random.Random) -> int:
        """Have the directory as a power cut may leave it, at a moment by chance; returns how many changes were made."""
        steps = [number for number, change in enumerate(disk.changes) if change.kind != "write"]  # which are few
        moments = (chance.randrange(len(disk.changes) + 1), chance.choice(steps), chance.choice(steps) + 1)
        moment = chance.choice(moments)
        names, directories = dict(self._names), set(self._directories)
        contents = {inode: bytearray(content) for inode, content in self._bytes.items()}
        times = dict(self._times)
        share = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))  # of what is not durable
        for number, change in enumerate(disk.changes[:moment]):
            is_durable = disk.durable.get(number, moment + 1) <= moment
            keeps = functools.partial(self._keeps, chance, 1.0 if is_durable else share)
            if change.kind in ("create", *CALLS):
                if keeps():
                    self._rename(change, names, directories, contents)
                elif change.kind == "create":
                    contents.setdefault(change.file, bytearray())  # its name is lost, and may get another
            else:
                self._write(change, contents.setdefault(change.file, bytearray()), keeps)
                if keeps():
                    times[change.file] = change.at
        self._make(names, directories, contents, times)
        return moment

    @staticmethod
    def _keeps(chance: random.Random, share: float) -> bool:
        return chance.random() < share

    @staticmethod
    def _rename(change: Change, names: dict[Path, int], directories: set[Path], contents: dict[int, bytearray]) -> None:
        first = change.names[0]
        if change.kind == "mkdir":
            directories.add(first)
        elif change.kind == "create":
            names[first] = change.file
            contents.setdefault(change.file, bytearray())
        elif change.kind == "unlink":
            if names.get(first) == change.length:
                del names[first]
        elif names.get(first) == change.length and change.names[1].parent in {*directories, first.parent}:
            names[change.names[1]] = names.pop(first)

    @staticmethod
    def _write(change: Change, content: bytearray, keeps: Callable[[], bool]) -> None:
        if change.kind == "truncate":
            if keeps():
                del content[change.length :]
                content.extend(bytes(change.length - len(content)))
            return
        if change.kind == "utime":
            return
        data = bytes(change.length) if change.data is None else change.data
        start = 0
        while start < len(data):
            end = min(len(data), start + SECTOR - (change.offset + start) % SECTOR)
            if keeps():
                content.extend(bytes(max(change.offset + end - len(content), 0)))
                content[change.offset + start : change.offset + end] = data[start:end]
            start = end

    def _make(
        self, names: dict[Path, int], directories: set[Path], contents: dict[int, bytearray], times: dict[int, int]
    ) -> None:
        for path in list(self._root.rglob("*")):
            if path.is_file() and path != self.paths.image:
                path.unlink()
        for path in sorted(directories):
            path.mkdir(exist_ok=True)
        for path, inode in names.items():
            with path.open("r+b" if path == self.paths.image else "w+b") as file:
                file.truncate(0)
                file.write(contents[inode])
            os.utime(path, ns=(times.get(inode, 0), times.get(inode, 0)))
        for path in sorted(path for path in self._root.rglob("*") if path.is_dir() and path not in directories):
            shutil.rmtree(path, ignore_errors=True)


def changed(directory: Path, keep: dosvob.Keep) -> Lineage:
    """A volume with a version, which has changed and grown since."""
    directory.mkdir()
    lineage = Lineage(directory, keep, 3)
    lineage.go_on(2)
    lineage.size = 4 * MIB
    lineage.change()
    lineage.pass_time()
    return lineage


def check(lineage: Lineage, snapshots: set[str]) -> None:
    """What is read is one of the snapshots, and what is older is what it was."""
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert chain.state is not None
        moments = [chain.state.moment, *(version.moment for version in chain.versions)]
        wanted = [f"{moment:{dosvob.Version.TIME}}" for moment in moments]
        damaged = [ranges.ranges for ranges in chain.verify(lambda size: None)]
        assert damaged == [[]] * len(wanted)
        assert {lineage.truth[wanted[0]]} <= snapshots
        target = lineage.backups.parent / "restored"
        final, _ = chain.restore(0, target, lambda size: None)
    content = final.read_bytes()
    final.unlink()
    assert digest(content) == lineage.truth[wanted[0]]


@pytest.mark.parametrize("keep", [dosvob.Keep(9, 0, 0, 0), dosvob.Keep(0, 0, 0, 0)], ids=["with versions", "without"])
def test_a_power_cut_at_any_moment_leaves_one_of_the_two_snapshots(
    tmp_path: Path, keep: dosvob.Keep, pytestconfig: pytest.Config
) -> None:
    lineage = changed(tmp_path / "lineage", keep)
    before = Contents(lineage)
    with recorded() as sync:
        lineage.back_up()
    assert {change.kind for change in sync.changes} >= {"write", "truncate", "create", "rename", "unlink", "utime"}
    snapshots = {lineage.truth[time_] for time_ in sorted(lineage.truth)[-2:]}
    chance = random.Random(pytestconfig.option.seed)
    was_put_back = 0
    for _ in range(1000 if pytestconfig.option.exhaustive else 30):
        before.after(sync, chance)
        check(lineage, snapshots)
        cut = Contents(lineage)
        with recorded() as recovery:
            was_put_back += recover(lineage.backups)
        if recovery.changes and chance.random() < 0.5:  # the power goes again
            cut.after(recovery, chance)
            check(lineage, snapshots)
            recover(lineage.backups)
        check(lineage, snapshots)
        assert digest(lineage.paths.image.read_bytes()) in snapshots
        lineage.back_up()
        assert lineage.paths.image.read_bytes() == lineage.device.read_bytes()
        check(lineage, snapshots)
    assert was_put_back
