"""What the tests of the local part share: syncs of a file as if it were a volume, by the real agent as a local process.

As a program it does one such sync, or one recovery, so that it can be killed or refused its system calls:

    python crash_support.py sync BACKUPS NAME DEVICE
    python crash_support.py recover BACKUPS NAME
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import random
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dosvob

DRIVER = Path(__file__).resolve()
REGION, FIRST_TAKEN_AT = "fra1", datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
MIB = 1 << 20
PAGE = dosvob.PAGE
MOST_VERSIONS = 20  # that a test makes

CHANGING_CALLS = (
    "write,pwrite64,fsync,fdatasync,ftruncate,fallocate,utimensat,?mkdir,mkdirat,"
    "?rename,renameat,renameat2,?unlink,unlinkat"
)
"""The system calls by which the script changes files and makes the changes durable."""

_CALL = re.compile(r"^(\w+)\((.*)$")
_FD = re.compile(r"^(?:AT_FDCWD|\d+)<([^>]*)>")
_RESULT = re.compile(r" = (-?\d+)[^=]*$")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


class PowerCut(BaseException):
    """The power has gone: nothing of the script's handles that."""


class AgentProcess:
    """The real agent over pipes, as a stream.

    It serves the chunks from the first on; with `parts` it serves those, and writes. Reads return at most `most`
    bytes, and break after `cut` bytes in all; `edit` changes the agent's source; `pipe` is how much its pipes hold,
    `python` what runs it.
    """

    def __init__(
        self,
        device: Path,
        first: int,
        window: int,
        *,
        most: int = 1 << 20,
        cut: int | None = None,
        edit: Callable[[str], str] = str,
        pipe: int = 64 << 10,
        python: str = sys.executable,
        parts: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.received = 0
        self._most = most
        self._cut = cut
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(dosvob, "AGENT", edit(dosvob.AGENT))
            rest = ((first, device.stat().st_size // MIB),)
            program = dosvob.agent_source(
                str(device), rest if parts is None else parts, window, writes=parts is not None
            )
        bootstrap = f"import sys; exec(sys.stdin.buffer.read({len(program)}))"
        command = [python, "-I", "-c", bootstrap]
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

    waits = 1.0

    def has_received(self) -> bool:
        """Whether something has come in."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout.fileno()], [], [], 0)[0])

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


def set_constants(patches: pytest.MonkeyPatch, **values: Any) -> None:
    """Give some of the module's constants other values, here and in the agents that are started."""
    for name, value in values.items():
        patches.setattr(dosvob, name, value)
        patches.setattr(dosvob, "AGENT", re.sub(rf"(?m)^{name} = .*$", f"{name} = {value!r}", dosvob.AGENT))


def snapshot_of(device: Path, name: str, volume_id: str = "volume-1", taken_at: str = "") -> dosvob.Snapshot:
    """What the API would tell of a volume with this content."""
    size = device.stat().st_size
    return dosvob.Snapshot(volume_id, name, REGION, size, taken_at or FIRST_TAKEN_AT.isoformat())


def next_time(paths: dosvob.ImagePaths) -> str:
    """When the next snapshot is taken: an hour after that of the image."""
    with contextlib.suppress(dosvob.DosvobError):
        if (state := dosvob.State.load(paths.state)) is not None:
            return (state.moment + datetime.timedelta(hours=1)).isoformat()
    return FIRST_TAKEN_AT.isoformat()


def back_up(
    backups: Path,
    name: str,
    device: Path,
    *,
    volume_id: str = "volume-1",
    reread: bool = False,
    keep: dosvob.Keep = dosvob.Keep(),  # noqa: B008 - frozen
    connect: Callable[[int, int], Any] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> dosvob.Update:
    """What a run of the script does locally: lock, recovery, sync, finish; `connect` takes first chunk and window."""
    stream_to = connect or (lambda first, window: AgentProcess(device, first, window))
    with dosvob.Home(backups).locked():
        recover(backups, name)
        paths = dosvob.ImagePaths(backups, name)
        snapshot = snapshot_of(device, name, volume_id, next_time(paths))
        with contextlib.closing(dosvob.Update(paths, snapshot, keep, warn, reread=reread)) as update:
            sync_device(stream_to, update, warn)
            update.finish()
        return update


def sync_device(start_agent: Callable[[int, int], Any], update: dosvob.Update, warn: Callable[[str], None]) -> None:
    """As a run does it; `start_agent` takes first chunk and window."""
    dosvob.converse(
        lambda: cast("dosvob.AgentStream", start_agent(update.frontier, update.window)),
        dosvob.Pull(update),
        warn,
        lambda received: None,
        lambda _: False,
    )


def power_cut(*_: object) -> Any:
    """What happens instead of a function's work."""
    raise PowerCut


@contextlib.contextmanager
def power_cut_at(owner: Any, name: str, after: int = 0) -> Iterator[None]:
    """The power goes at a call of a function, when so many calls of it have been carried out."""
    calls, carried_out = itertools.count(), getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        return power_cut() if next(calls) >= after else carried_out(*arguments, **named)

    with pytest.MonkeyPatch.context() as patches, contextlib.suppress(PowerCut):
        patches.setattr(owner, name, call)
        yield


def leave_spool(backups: Path, name: str, device: Path) -> None:
    """Back up until all is fetched, as if the power went then."""
    with power_cut_at(dosvob.Undo, "write"):
        back_up(backups, name, device)
    assert dosvob.ImagePaths(backups, name).spool.exists()


def leave_written(backups: Path, name: str, device: Path, patches: int | None = None) -> None:
    """Back up until the image is written, or only so many of the patches are, as if the power went then."""
    cut = (
        power_cut_at(dosvob.Update, "_complete_state")
        if patches is None
        else power_cut_at(dosvob.Patch, "write_to", patches)
    )
    with cut:
        back_up(backups, name, device)
    assert dosvob.ImagePaths(backups, name).undo.exists()


def recover(backups: Path, name: str) -> bool:
    """What every command does first."""
    return dosvob.Undo.recover(dosvob.ImagePaths(backups, name), lambda count: None)


def recover_all(backups: Path) -> set[str]:
    """The same for all volumes: the names for which it failed."""
    return dosvob.Home(backups).recover(dosvob.Reporter(quiet=True), dosvob.Stop())


def verify(paths: dosvob.ImagePaths) -> list[list[tuple[int, int]]]:
    """The ranges that are damaged of the image, of the version before it, and so on."""
    with contextlib.closing(dosvob.Chain(paths, from_disk=True)) as chain:
        if chain.problem:
            raise chain.problem
        assert chain.state is not None
        return [damaged.ranges for damaged in chain.verify(lambda count: None)]


def restored(paths: dosvob.ImagePaths, directory: Path) -> dict[str, bytes]:
    """What all versions that are listed are restored to, by their times; all of them must be whole."""
    contents = {}
    with contextlib.closing(dosvob.Chain(paths)) as chain:
        for depth, version in enumerate(chain.versions, start=1):
            target = directory / f"restored-{version.moment:{dosvob.Version.TIME}}"
            final, damaged = chain.restore(depth, target, lambda count: None)
            assert not damaged.ranges, (version, damaged)
            contents[target.name.removeprefix("restored-")] = final.read_bytes()
            final.unlink()
    return contents


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


def commits(calls: list[Call]) -> list[bool]:
    """Which of the calls are a commit: the new state gets its name; also a later note in it does."""
    return [call.name == "rename" and call.succeeded and call.files[0].endswith(".state.new") for call in calls]


def files_of(backups: Path, name: str) -> list[Path]:
    """The files whose changes matter to the image of a volume, and their directories."""
    paths = dosvob.ImagePaths(backups, name)
    images = [paths.image, paths.partial, paths.state, paths.new_state, paths.spool, paths.undo]
    times = [FIRST_TAKEN_AT + datetime.timedelta(hours=number) for number in range(MOST_VERSIONS)]
    versions = [paths.versions / f"{time:{dosvob.Version.TIME}}" for time in times]
    there = sorted(paths.versions.glob("*"))
    return list(dict.fromkeys([*images, *versions, *there, paths.directory, paths.metadata, paths.versions]))


IN_MAIN_THREAD = {"SYNCS_IN_MAIN_THREAD": True}


def strace(backups: Path, name: str, *options: str, calls: str = CHANGING_CALLS) -> tuple[str, ...]:
    """The words to put before a command: its main thread is traced, as far as the files of the volume are concerned.

    That alone makes changes, in the script with IN_MAIN_THREAD as constants.
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
