"""A kill at every call that changes a file: what is listed afterwards restores to the very bytes that the volume had.

The work is done in a process that is forked, and killed at one of its calls, of which a write is done by half.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import sampled
from versions_support import (
    MIB,
    PAGE,
    Lineage,
    digest,
    file_name,
    killed_at,
    leave_written,
    listed,
    recover,
    restored,
    thin,
)

import dosvob

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
ALL = dosvob.Keep(last=100, daily=0, weekly=0, monthly=0)
FEW = dosvob.Keep(last=1, daily=0, weekly=0, monthly=3)


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    """A volume that grew, with six versions over two months."""
    (tmp_path / "lineage").mkdir()
    made = Lineage(tmp_path / "lineage", ALL, 3)
    made.go_on(3, 11 * 24)
    made.size = 5 * MIB
    made.go_on(4, 11 * 24)
    assert len(made.check()) == 7
    return made


class Matrix:
    """Each case begins with a backups directory as it is now, and a kill."""

    def __init__(self, lineage: Lineage, work: Callable[[], object]) -> None:
        self.lineage = lineage
        self.work = work
        self._files = {path: path.stat() for path in lineage.backups.rglob("*") if path.is_file()}
        self._contents = {path: path.read_bytes() for path in self._files}
        self._now = lineage.now

    def begin(self) -> None:
        """Have the directory as it was; the files are the same, with the same times, as the state has it."""
        self.lineage.now = self._now
        for path in list(self.lineage.backups.rglob("*")):
            if path.is_file() and path not in self._files:
                path.unlink()
        for path, content in self._contents.items():
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(0)
                for start in range(0, len(content), PAGE):
                    if page := content[start : start + PAGE].strip(b"\0"):
                        file.seek(content.index(page, start))
                        file.write(page)
                file.truncate(len(content))
            os.utime(path, ns=(self._files[path].st_atime_ns, self._files[path].st_mtime_ns))
        image = self.lineage.paths.image
        assert image.stat().st_ino == self._files[image].st_ino

    def calls(self) -> list[str]:
        """Those of the work when it is left alone."""
        self.begin()
        return killed_at(0, self.work)[1]

    def kill(self, number: int) -> str:
        """Kill it at that call, the first being 1; returns what that was."""
        self.begin()
        was_killed, calls = killed_at(number, self.work)
        assert was_killed
        return calls[-1]


def check_order(calls: list[str]) -> None:
    """Nothing is relied on before it is durable: a file before it gets its name, a name before another is removed."""
    written: set[str] = set()
    named: set[str] = set()
    for call in calls:
        name, _, rest = call.partition(" ")
        if name in ("write", "pwrite", "ftruncate", "fallocate"):
            written.add(rest)
        elif name in ("fsync", "fdatasync"):
            written.discard(rest)
            named.discard(rest)
        elif name in ("rename", "unlink"):
            old, _, new = rest.partition(" ")
            assert old not in written or name == "unlink", call
            written.discard(old)
            if name == "unlink" and old.endswith("Z"):
                assert not named, call
            if new:
                named.add(str(Path(new).parent))
            elif old.endswith("Z"):
                named.add(str(Path(old).parent))
    assert not written
    assert not named


def test_thinning_killed_anywhere(lineage: Lineage, pytestconfig: pytest.Config) -> None:
    matrix = Matrix(lineage, lambda: thin(lineage.backups, FEW))
    calls = matrix.calls()
    check_order(calls)
    wanted = lineage.check()
    assert len(wanted) == 4
    assert sum(call.startswith("unlink") and call.endswith("Z") for call in calls) == 3
    assert sum(call.startswith("rename") for call in calls) == 1
    for number in sampled(pytestconfig, range(1, len(calls) + 1), 16):
        call = matrix.kill(number)
        times = lineage.check(lambda depths: [depths[-1]])
        assert set(wanted) <= set(times), call
        thin(lineage.backups, FEW)
        assert lineage.check(lambda depths: [depths[-1]]) == wanted, call
        assert sorted(path.name for path in lineage.paths.versions.iterdir()) == sorted(wanted[1:]), call


def test_thinning_killed_again_and_again(lineage: Lineage, pytestconfig: pytest.Config) -> None:
    matrix = Matrix(lineage, lambda: thin(lineage.backups, dosvob.Keep(2, 0, 0, 0)))
    matrix.begin()
    before = len(lineage.check())
    for number in (3, 9, 11, 13, 14, 8, 7, 12, 9, 15, 16):
        killed_at(number, matrix.work)
        times = lineage.check(lambda depths: [depths[-1]])
        assert len(times) <= before
        before = len(times)
    matrix.work()
    assert len(lineage.check()) == 3


def test_a_sync_with_a_version_and_thinning_killed_anywhere(lineage: Lineage, pytestconfig: pytest.Config) -> None:
    """The writing of the undo and of the image, the commit, the version's name, and the thinning behind it."""
    lineage.size = 6 * MIB
    lineage.change()
    lineage.pass_time(24 * 40)
    lineage.keep = FEW
    matrix = Matrix(lineage, lineage.back_up)
    calls = matrix.calls()
    check_order(calls)
    wanted = lineage.check()
    before = ""
    for number in sampled(pytestconfig, range(1, len(calls) + 1), 20):
        call = matrix.kill(number)
        # what is there to be restored before anything is finished, and after
        times = lineage.check(lambda depths: [0, depths[-1]])
        assert len(times) == len(set(times)), call
        recover(lineage.backups)
        assert lineage.check(lambda depths: [1]) == times, call
        before = before or times[1]
        lineage.pass_time(1)  # and the next run
        lineage.back_up()
        assert lineage.check(lambda depths: [])[0] == file_name(lineage.now), call
    assert len(wanted) == 3


def test_a_recovery_with_a_version_killed_anywhere(lineage: Lineage, pytestconfig: pytest.Config) -> None:
    lineage.change()
    lineage.pass_time()
    leave_written(lineage.backups, lineage.device, lineage.now)
    times = lineage.check()
    assert len(times) == 7
    matrix = Matrix(lineage, lambda: recover(lineage.backups))
    calls = matrix.calls()
    check_order(calls)
    assert lineage.check() == times
    for number in sampled(pytestconfig, range(1, len(calls) + 1), 12):
        call = matrix.kill(number)
        assert lineage.check(lambda depths: [1]) == times, call
        killed_at(max(number - 2, 1), matrix.work)
        assert lineage.check(lambda depths: [1]) == times, call
        recover(lineage.backups)
        assert not lineage.paths.undo.exists()
        assert lineage.check(lambda depths: [0, 1]) == times, call


@pytest.mark.parametrize("depth", [0, 3])
def test_a_restore_killed_anywhere(tmp_path: Path, lineage: Lineage, depth: int, pytestconfig: pytest.Config) -> None:
    """The file is not there before it is whole; and nothing in the directory of the backups changes."""
    target = tmp_path / "restored" / "file"

    def work() -> None:
        with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
            chain.restore(depth, target, lambda size: None)

    def begin() -> None:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()

    begin()
    _, calls = killed_at(0, work)
    assert not [call for call in calls if str(lineage.backups) in call]
    check_order([call.replace(f"link {target}.partial", f"rename {target}.partial") for call in calls])
    content = target.read_bytes()
    assert digest(content) == lineage.truth[listed(lineage.backups)[depth]]
    for number in sampled(pytestconfig, range(1, len(calls) + 1), 10):
        begin()
        was_killed, told = killed_at(number, work)
        assert was_killed
        assert {path.name for path in target.parent.iterdir()} <= {"file", "file.partial"}
        assert not target.exists() or target.read_bytes() == content, told[-1]
        assert target.exists() or restored(lineage.backups, depth) == content


@pytest.mark.parametrize("where", ["in the image", "at the name"])
def test_a_sync_that_is_done_again_in_the_same_run_loses_nothing(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The disk was full, and that even for what was to be put back; after the commit nothing is to be done again."""
    full, patches, write_to = OSError(errno.ENOSPC, "No space left on device"), itertools.count(), dosvob.Patch.write_to

    def write(patch: dosvob.Patch, file: dosvob.SparseFile) -> None:
        if next(patches) > 1:
            raise full
        write_to(patch, file)

    def settle(_undo: dosvob.Undo) -> None:
        raise full

    lineage.change()
    lineage.pass_time()
    with monkeypatch.context() as patched:
        if where == "in the image":
            patched.setattr(dosvob.Patch, "write_to", write)
        else:
            patched.setattr(dosvob.Undo, "settle", settle)
        with pytest.raises(OSError if where == "in the image" else dosvob.DosvobError, match="No space"):
            lineage.back_up()
    assert lineage.paths.undo.exists()
    if where == "in the image":
        lineage.back_up()
    lineage.go_on()
    assert len(lineage.check()) == 9
