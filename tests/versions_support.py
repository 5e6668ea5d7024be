"""What the tests of versions share: syncs of a file as if it were a volume, at times that are chosen, and their ends.

A sync runs in this process, with the real agent's code called as a function; to be killed, it runs in a process that is
forked, in which every call that changes a file is counted, and one of them is its last.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import io
import os
import queue
import random
import signal
import struct
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from crash_support import power_cut_at, sync_device
from version_reader import Reader

import dosvob

NAME = "data"
MIB, PAGE = 1 << 20, 4096
FIRST_DAY = datetime.datetime(2015, 1, 31, 20, 30, tzinfo=datetime.UTC)  # long ago: no time is taken that is to come
KEEP = dosvob.Keep(last=3, daily=4, weekly=3, monthly=3)
COMMAND_SIZE = struct.calcsize(dosvob.COMMAND)


class InlineAgent:
    """The agent's own code as a stream, without threads that go on: it has scanned all before the first answer."""

    def __init__(self, device: Path, first: int, window: int) -> None:
        self.received = 0
        parts = ((first, device.stat().st_size // MIB),)
        self._agent = dosvob.Agent(str(device), parts, 1 << 20, dosvob.Packer(True), io.BytesIO(), -1)
        self._frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._agent.frames = cast("queue.Queue[bytes]", self._frames)
        self._rest = b""
        self._agent.scan()

    def send(self, data: bytes) -> None:
        """Commands, which are answered at once."""
        self._rest += data
        while len(self._rest) >= COMMAND_SIZE:
            kind, index, count, bitmap = struct.unpack(dosvob.COMMAND, self._rest[:COMMAND_SIZE])
            self._rest = self._rest[COMMAND_SIZE:]
            if kind == dosvob.DROP:
                self._agent.forget(index, count)
            else:
                self._agent.answer(kind, index, int.from_bytes(bitmap, "little"))

    waits = 1.0

    def receive(self) -> bytes:
        """The next frames."""
        frame = b""
        while not frame:
            try:
                frame = self._agent.announcements.popleft() if self._agent.announcements else self._frames.get_nowait()
            except queue.Empty:
                raise dosvob.ConnectionLost("the agent has nothing more to say") from None
        self.received += len(frame)
        return frame

    def close(self) -> None:
        """End it."""
        if self._agent.fd >= 0:
            os.close(self._agent.fd)


def text_of(moment: datetime.datetime) -> str:
    """A time as DigitalOcean gives it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def file_name(moment: datetime.datetime) -> str:
    """The name of the file of a version."""
    return moment.strftime("%Y%m%dT%H%M%SZ")


def back_up(
    backups: Path,
    device: Path,
    moment: datetime.datetime,
    keep: dosvob.Keep = KEEP,
    *,
    name: str = NAME,
    volume_id: str = "volume-1",
    reread: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> dosvob.Update:
    """What a run of the script does locally: recovery, sync, finish, thinning. The volume was such at that moment."""
    snapshot = dosvob.Snapshot(volume_id, name, "fra1", device.stat().st_size, text_of(moment))
    paths = dosvob.ImagePaths(backups, name)
    with dosvob.Home(backups).locked():
        with contextlib.closing(dosvob.Update(paths, snapshot, keep, warn, reread=reread)) as update:
            sync_device(functools.partial(InlineAgent, device), update, warn)
            update.finish()
        try:
            dosvob.Versions(paths).thin(keep)
        except dosvob.Damaged as problem:
            warn(f"not thinned: {problem}")
    return update


def thin(backups: Path, keep: dosvob.Keep) -> None:
    """Thin the versions as the end of a sync does."""
    paths = dosvob.ImagePaths(backups, NAME)
    state = dosvob.State.load(paths.state)
    assert state is not None
    dosvob.Versions(paths).thin(keep)


def recover(backups: Path) -> bool:
    """What every command that has the lock does first."""
    return dosvob.Undo.recover(dosvob.ImagePaths(backups, NAME), lambda size: None)


def leave_written(backups: Path, device: Path, moment: datetime.datetime, **options: Any) -> None:
    """Back up until the image is written, as if the power went just before the commit."""
    with power_cut_at(dosvob.Update, "_complete_state"):
        back_up(backups, device, moment, **options)
    assert dosvob.ImagePaths(backups, NAME).undo.exists()


# -- what is there to be restored


def restored(backups: Path, depth: int, name: str = NAME) -> bytes:
    """The image, or the version so many steps back, restored by dosvob; it must be sound."""
    with (
        tempfile.TemporaryDirectory(dir=backups.parent) as directory,
        contextlib.closing(dosvob.Chain(dosvob.ImagePaths(backups, name))) as chain,
    ):
        final, damaged = chain.restore(depth, Path(directory) / "file", lambda size: None)
        assert not damaged.ranges, f"{depth} back: {damaged}"
        return final.read_bytes()


def listed(backups: Path, name: str = NAME) -> list[str]:
    """The times of the image and of all versions, as files are named."""
    with contextlib.closing(dosvob.Chain(dosvob.ImagePaths(backups, name))) as chain:
        assert chain.state is not None
        return [file_name(moment) for moment in (chain.state.moment, *(version.moment for version in chain.versions))]


def digest(content: bytes) -> str:
    """What is kept of a content to compare with."""
    return hashlib.sha256(content).hexdigest()


def check_all(
    backups: Path, truth: dict[str, str], name: str = NAME, choose: Callable[[list[int]], list[int]] = list
) -> list[str]:
    """Everything that is listed restores to what it was: by the reader that shares no code with dosvob, and by dosvob.

    Of dosvob's own, which are slow, those alone that `choose` chooses, given how many steps back they are.
    """
    times = listed(backups, name)
    read = {time: digest(content) for time, content in Reader(backups, name).all()}
    assert read == {time: truth[time] for time in times}
    assert list(read) == times
    for depth in choose(list(range(len(times)))):
        assert digest(restored(backups, depth, name)) == truth[times[depth]], times[depth]
    return times


# -- the end of a process at one of the calls by which it changes files


class CountedFile(io.FileIO):
    """A file whose writes are counted."""

    counter: Counter

    def write(self, data: Any) -> int:
        """Write, and count it."""
        self.counter("write", self.name, data, lambda part: io.FileIO.write(self, part))
        return io.FileIO.write(self, data)

    def truncate(self, size: int | None = None) -> int:
        """Cut, and count it."""
        self.counter("ftruncate", self.name)
        return io.FileIO.truncate(self, size)


class CountedLibrary:
    """The C library, of which fallocate is counted."""

    def __init__(self, counter: Counter, library: Any) -> None:
        self._counter = counter
        self._library = library

    def fallocate64(self, fd: int, *arguments: Any) -> int:
        """Punch a hole, and count it."""
        self._counter("fallocate", fd)
        return int(self._library.fallocate64(fd, *arguments))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


class Counter:
    """Counts the calls that change files, and kills the process at one of them; of a write a part is still done."""

    CALLS = ("fsync", "fdatasync", "ftruncate", "rename", "unlink", "link", "mkdir", "utime")

    def __init__(self, last: int, log: int) -> None:
        self.calls = 0
        self._last = last
        self._log = log

    def __call__(
        self, name: str, what: Any = "", data: Any = b"", write: Callable[[Any], Any] = lambda part: None
    ) -> None:
        """One call; `write` does a part of what it is about."""
        self.calls += 1
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        _WRITE(self._log, f"{name} {path}\n".encode())
        if self.calls == self._last:
            if len(data) > 1:
                write(memoryview(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Count from now on; there is no way back."""
        for name in self.CALLS:
            setattr(os, name, functools.partial(self._counted, name, getattr(os, name)))
        pwrite, open_file, fdopen = os.pwrite, os.open, os.fdopen

        def counted_pwrite(fd: int, data: Any, offset: int) -> int:
            self("pwrite", fd, data, lambda part: pwrite(fd, part, offset))
            return pwrite(fd, data, offset)

        def counted_open(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & (os.O_TRUNC | os.O_CREAT) and (flags & os.O_TRUNC or not os.path.lexists(path)):
                self("create", path)
            return open_file(path, flags, *arguments, **named)

        def counted_fdopen(fd: int, mode: str = "r", buffering: int = -1, **named: Any) -> Any:
            if mode != "wb":
                return fdopen(fd, mode, buffering, **named)
            file = CountedFile(fd, mode)
            file.counter = self
            return io.BufferedWriter(file, buffering)

        os.pwrite, os.open, os.fdopen = counted_pwrite, counted_open, counted_fdopen  # type: ignore[assignment]
        dosvob.LIBC = cast("Any", CountedLibrary(self, dosvob.LIBC))

    def _counted(self, name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if isinstance(arguments[0], int):
            self(name, arguments[0])
        else:
            self(name, " ".join(map(str, arguments[: 2 if name in ("rename", "link") else 1])))
        return call(*arguments, **named)


_WRITE = os.write


def killed_at(last: int, work: Callable[[], object]) -> tuple[bool, list[str]]:
    """Do the work in another process, which is killed at its changing call of that number; 0: not at all.

    Returns whether it was killed, and its calls.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.close(reading)
                Counter(last, log.fileno()).install()
                work()
                code = 0
            except BaseException:  # noqa: BLE001 - told to the other process
                _WRITE(writing, traceback.format_exc().encode()[:60_000])
            finally:
                os._exit(code)
        os.close(writing)
        with open(reading, "rb") as errors:
            problem = errors.read().decode()
        status = os.waitpid(child, 0)[1]
        assert not problem, problem
        log.seek(0)
        calls = log.read().decode().splitlines()
    was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert was_killed or status == 0, status
    return was_killed, calls


# -- contents


def scatter(device: Path, seed: int, size: int) -> None:
    """Change a file here and there as a file system in use would: some pages, some zeros, a whole chunk."""
    chance = random.Random(seed)
    with device.open("r+b" if device.exists() else "w+b") as file:
        file.truncate(size)
        for _ in range(6):
            file.seek(chance.randrange(size // PAGE) * PAGE)
            file.write(chance.randbytes(PAGE * chance.choice((1, 1, 3))))
        for _ in range(2):
            file.seek(chance.randrange(size // PAGE - 4) * PAGE)
            file.write(bytes(4 * PAGE))
        file.seek(chance.randrange(size // MIB) * MIB)
        file.write(chance.choice((chance.randbytes(MIB), bytes(MIB))))
        file.truncate(size)


class Lineage:
    """A volume (a file), its backup, and what it was at each backup. Time passes in steps."""

    def __init__(self, directory: Path, keep: dosvob.Keep = KEEP, mebibytes: int = 5) -> None:
        self.device = directory / "device"
        self.backups = directory / "backups"
        self.paths = dosvob.ImagePaths(self.backups, NAME)
        self.keep = keep
        self.now = FIRST_DAY
        self.size = mebibytes * MIB
        self.truth: dict[str, str] = {}
        self.volume_id = "volume-1"
        self._seed = 0

    def change(self) -> None:
        """Change the volume."""
        self._seed += 1
        scatter(self.device, self._seed, self.size)

    def pass_time(self, hours: float = 4) -> None:
        """It is later; what the volume is now, it is at that time."""
        self.now += datetime.timedelta(hours=hours)
        self.truth[file_name(self.now)] = digest(self.device.read_bytes())

    def back_up(self, **options: Any) -> dosvob.Update:
        """Back it up as it is."""
        options = {"volume_id": self.volume_id, **options}
        return back_up(self.backups, self.device, self.now, self.keep, **options)

    def go_on(self, times: int = 1, hours: float = 4) -> None:
        """Change it and back it up, so often."""
        for _ in range(times):
            self.change()
            self.pass_time(hours)
            self.back_up()

    def check(self, choose: Callable[[list[int]], list[int]] = list) -> list[str]:
        """All that is listed restores to what it was."""
        return check_all(self.backups, self.truth, choose=choose)
