"""What the tests of the local part share: syncs of a file as if it were a volume, by the real agent as a local process.

As a program it does one such sync, or one recovery, so that it can be killed or refused its system calls:

    python crash_support.py sync BACKUPS NAME DEVICE
    python crash_support.py recover BACKUPS NAME
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dosvob

DRIVER = Path(__file__).resolve()
REGION, TAKEN_AT = "fra1", "2026-01-01T00:00:00Z"
MIB = 1 << 20
PAGE = dosvob.PAGE
COMMIT_RECORD = dosvob.RECORD_SIZE + dosvob.COMMIT_SIZE

CHANGING_CALLS = "write,pwrite64,fsync,fdatasync,ftruncate,fallocate,?rename,renameat,renameat2,?unlink,unlinkat"
"""The system calls by which the script changes files and makes the changes durable."""

_CALL = re.compile(r"^(\w+)\((.*)$")
_FD = re.compile(r"^(?:AT_FDCWD|\d+)<([^>]*)>")
_RESULT = re.compile(r" = (-?\d+)[^=]*$")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


class AgentProcess:
    """The real agent over pipes, as a stream.

    Reads return at most `most` bytes, and break after `cut` bytes in all; `edit` changes the agent's program; `pipe` is
    how much its pipes hold.
    """

    def __init__(
        self,
        device: Path,
        first: int,
        window: int,
        *,
        most: int = 1 << 20,
        cut: int | None = None,
        edit: Callable[[bytes], bytes] = bytes,
        pipe: int = 64 << 10,
    ) -> None:
        self.received = 0
        self._most = most
        self._cut = cut
        program = edit(dosvob.agent_source(str(device), first, window))
        bootstrap = f"import sys; exec(sys.stdin.buffer.read({len(program)}))"
        command = [sys.executable, "-I", "-c", bootstrap]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, pipesize=pipe
        )
        self.send(program)

    def send(self, data: bytes) -> None:
        """Send all of it; that the agent has ended shows when reading."""
        assert self._process.stdin is not None
        view = memoryview(data)
        with contextlib.suppress(BrokenPipeError):
            while view:
                view = view[os.write(self._process.stdin.fileno(), view) :]

    def receive(self) -> bytes:
        """At least one byte, and at most `most`."""
        assert self._process.stdout is not None
        if self._cut is not None and self.received >= self._cut:
            raise dosvob.ConnectionLost("cut")
        data = os.read(self._process.stdout.fileno(), self._most)
        if not data:
            raise dosvob.ConnectionLost("the agent has ended")
        self.received += len(data)
        return data

    def kill(self) -> None:
        """End the agent at once."""
        self._process.kill()

    def close(self) -> None:
        """End the agent; first of all, or it would complain of the broken pipes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def snapshot_of(device: Path, name: str, volume_id: str = "volume-1") -> dosvob.Snapshot:
    """What the API would tell of a volume with this content."""
    return dosvob.Snapshot(volume_id, name, REGION, device.stat().st_size, TAKEN_AT)


def back_up(
    backups: Path,
    name: str,
    device: Path,
    *,
    volume_id: str = "volume-1",
    reread: bool = False,
    connect: Callable[[int, int], Any] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> dosvob.Tally:
    """What a run of the script does locally: lock, recovery, sync, finish; `connect` takes first chunk and window."""
    report = dosvob.Reporter(quiet=True)
    stream_to = connect or (lambda first, window: AgentProcess(device, first, window))
    with dosvob.locked(backups):
        recover(backups, name)
        snapshot = snapshot_of(device, name, volume_id)
        paths = dosvob.ImagePaths(backups, name)
        with contextlib.closing(dosvob.Update(paths, snapshot, warn, reread=reread)) as update:
            dosvob.sync_device(
                cast("Callable[[int, int], dosvob.AgentStream]", stream_to), update, report, lambda received: None
            )
            update.finish(warn)
    return update.tally


def leave_committed(backups: Path, name: str, device: Path) -> None:
    """Back up up to the commit mark, as if the power went then: nothing of the journal is applied."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dosvob, "apply_journal", lambda paths, journal: None)
        back_up(backups, name, device)


def recover(backups: Path, name: str) -> bool:
    """What every command does first."""
    return dosvob.recover(dosvob.ImagePaths(backups, name), lambda text: None)


def driver(*arguments: object) -> list[str]:
    """The command line of the driver."""
    return [sys.executable, str(DRIVER), *map(str, arguments)]


# -- system calls


@dataclass(frozen=True)
class Call:
    """A system call that changes files: its name, the files that it is about, and its result; None if it had none."""

    name: str
    files: tuple[str, ...]
    result: int | None

    @property
    def succeeded(self) -> bool:
        """Whether it was carried out."""
        return self.result is not None and self.result >= 0

    @property
    def commits(self) -> bool:
        """Whether this wrote the commit mark of a journal, which is told by its size."""
        return self.name == "write" and self.files[0].endswith(".journal") and self.result == COMMIT_RECORD


def files_of(backups: Path, name: str) -> list[Path]:
    """The files whose changes matter to the image of a volume, and their directories."""
    paths = dosvob.ImagePaths(backups, name)
    return [paths.image, paths.partial, paths.state, paths.new_state, paths.journal, paths.backups, paths.metadata]


def strace(backups: Path, name: str, *options: str, calls: str = CHANGING_CALLS) -> tuple[str, ...]:
    """The words to put before a command: its main thread is traced, as far as the files of the volume are concerned.

    The main thread alone makes changes.
    """
    paths = [word for path in files_of(backups, name) for word in ("-P", str(path))]
    return ("strace", "-y", "-qq", "-s", "0", "-e", f"trace={calls}", *paths, *options)


def killing(number: int, calls: str = CHANGING_CALLS) -> str:
    """The option of strace that kills the process when it begins its call of that number."""
    return f"--inject={calls}:signal=KILL:when={number}"


def calls_in(trace: Path) -> list[Call]:
    """The calls in a trace, in their order."""
    return [_parsed(match) for line in trace.read_text().splitlines() if (match := _CALL.match(line))]


def _parsed(match: re.Match[str]) -> Call:
    name, rest = match[1], match[2]
    fd = None if name.startswith(("rename", "unlink", "mkdir")) else _FD.match(rest)
    result = _RESULT.search(rest)
    return Call(name, (fd[1],) if fd else tuple(_QUOTED.findall(rest)), int(result[1]) if result else None)


# -- contents


def scatter(path: Path, seed: int, size: int) -> None:
    """Change a file here and there as a file system in use would: some pages, some zeros, and some whole chunks."""
    chance = random.Random(seed)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(size)
        for _ in range(12):
            file.seek(chance.randrange(size // PAGE) * PAGE)
            file.write(chance.randbytes(PAGE * chance.choice((1, 1, 3))))
        for _ in range(4):
            file.seek(chance.randrange(size // PAGE - 4) * PAGE)
            file.write(bytes(4 * PAGE))
        whole = chance.sample(range(size // MIB), 3)
        for index, content in zip(whole, (chance.randbytes(MIB), bytes(MIB), chance.randbytes(MIB)), strict=True):
            file.seek(index * MIB)
            file.write(content)
        file.truncate(size)


def run_driver(
    *arguments: object, wrapper: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the driver to its end, whatever that is."""
    return subprocess.run(
        [*wrapper, *driver(*arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(environment or {})},
    )


def main(arguments: list[str]) -> int:
    """Run as a program; one line on stderr for an error, as the script does."""
    command, backups, name, *device = arguments
    try:
        if command == "recover":
            recover(Path(backups), name)
        else:
            back_up(Path(backups), name, Path(device[0]))
    except (dosvob.DosvobError, OSError) as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
