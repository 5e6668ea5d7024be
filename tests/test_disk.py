"""What the local disk can do: be full, read-only, failing; lose, change or swap what is on it. The image survives.

The local part runs here with the real agent as a local process, on real file systems; each matter is also met once by
the whole script.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import hashlib
import os
import random
import shutil
import stat
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, Home, Tmpfs, data_places, same, sampled, write_at, write_out
from crash_support import (
    IN_MAIN_THREAD,
    PAGE,
    AgentProcess,
    back_up,
    calls_in,
    leave_spool,
    leave_written,
    power_cut_at,
    recover,
    recover_all,
    restored,
    run_driver,
    scatter,
    snapshot_of,
    strace,
    sync_device,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import Volume
from simulator.storage import LoopDevice, mounted

import dosvob
from dosvob import BLOCK, GIB, PAGES

NAME = "data"
CHUNKS = 10
KIB = 1 << 10


class Disk:
    """A volume (a file) and a directory for its backup: the volume has changed and grown since it was backed up."""

    def __init__(self, directory: Path, backups: Path | None = None) -> None:
        self.device = directory / "device"
        self.backups = backups or directory / "backups"
        self.paths = dosvob.ImagePaths(self.backups, NAME)
        scatter(self.device, 1, (CHUNKS - 2) * MIB)
        self.old = self.device.read_bytes()

    def begin(self) -> None:
        """Back up for the first time, and change the volume."""
        self.back_up()
        scatter(self.device, 2, CHUNKS * MIB)
        self.new = self.device.read_bytes()

    def back_up(self, *, reread: bool = False) -> tuple[dosvob.Update, list[str]]:
        """Back up; returns what was done and the warnings."""
        warnings: list[str] = []
        return back_up(self.backups, NAME, self.device, warn=warnings.append, reread=reread), warnings

    def image(self) -> bytes:
        """The content of the image."""
        return self.paths.image.read_bytes()

    def check_settled(self) -> None:
        """A backup succeeds, and then the image is the volume."""
        self.back_up()
        assert self.image() == self.device.read_bytes()
        assert not any(verify(self.paths))
        assert not self.paths.spool.exists()

    def versions(self) -> list[bytes]:
        """What the versions restore to, the newest first."""
        return list(restored(self.paths, self.device.parent).values())


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A backup of an older state of the volume."""
    made = Disk(tmp_path)
    made.begin()
    return made


def one_clear_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of error that the script wrote besides warnings."""
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    return errors[0]


# -- a full disk


def test_a_disk_that_is_full_at_any_stage_of_a_later_sync(
    tmp_path: Path, tmpfs: Tmpfs, pytestconfig: pytest.Config
) -> None:
    stages = []
    # From nothing to what spool, undo and image take together.
    sizes = [0, *sampled(pytestconfig, range(PAGE, 8 * MIB, 128 << 10), 6), *(number * MIB for number in range(1, 8))]
    for number, free in enumerate(sizes):
        disk = Disk(tmp_path, tmpfs.path / str(number))
        tmpfs.leave_free(64 * MIB)
        disk.begin()
        tmpfs.leave_free(free)
        stages.append(fill(disk))
        tmpfs.leave_free(64 * MIB)
        assert recover_all(disk.backups) == set()
        assert disk.image() in (disk.old, disk.new), free
        assert disk.versions() in ([], [disk.old]), free
        disk.check_settled()
        shutil.rmtree(disk.backups)
    assert {"spool", "write", "space_needed"} <= set(stages)  # but never when the image is being written


def fill(disk: Disk) -> str:
    """Back up to a disk that may be full: at which stage it was."""
    reached, problem = ["spool"], ""
    with pytest.MonkeyPatch.context() as patches:
        stages = ((dosvob.Undo, "write"), (dosvob.Spool, "space_needed"), (dosvob.Update, "_write_image"))
        for owner, name in stages:
            carried_out = getattr(owner, name)

            def reach(*arguments: Any, name: str = name, carried_out: Any = carried_out) -> Any:
                reached.append(name)
                return carried_out(*arguments)

            patches.setattr(owner, name, reach)
        try:
            disk.back_up()
        except (OSError, dosvob.DosvobError) as full:
            problem = str(full)
    if not problem:
        return "none"
    assert "No space left" in problem
    assert disk.image() == disk.old
    assert not disk.paths.undo.exists()
    return reached[-1] if disk.paths.spool.exists() else "begin"


@pytest.mark.parametrize("is_at_once", [True, False])
def test_a_disk_that_becomes_full_while_the_image_is_written_is_taken_back_at_once(
    tmp_path: Path, tmpfs: Tmpfs, monkeypatch: pytest.MonkeyPatch, is_at_once: bool
) -> None:
    """By somebody else, or because it said that it had more free space than it has."""
    disk = Disk(tmp_path, tmpfs.path / "backups")
    disk.begin()
    before = dosvob.identity_of(disk.paths.image)
    write_image = dosvob.Update._write_image

    def without_space(*arguments: Any) -> Any:
        tmpfs.leave_free(0 if is_at_once else 40 * PAGE)
        return write_image(*arguments)

    with monkeypatch.context() as patches:
        patches.setattr(dosvob.Update, "_write_image", without_space)
        snapshot = snapshot_of(disk.device, NAME, taken_at="2026-01-02T00:00:00Z")
        with contextlib.closing(dosvob.Update(disk.paths, snapshot, dosvob.Keep(), print)) as update:
            connect: Any = lambda first, window: AgentProcess(disk.device, first, window)  # noqa: E731
            sync_device(connect, update, print)
            with pytest.raises(OSError, match="No space left"):
                update.finish()
            update.give_up_space()  # as a run does it for the other volumes
    assert disk.image() == disk.old
    assert dosvob.identity_of(disk.paths.image) == before
    assert verify(disk.paths) == [[]]
    assert not disk.paths.undo.exists()
    assert not disk.paths.spool.exists()
    tmpfs.leave_free(64 * MIB)
    disk.back_up()
    assert disk.image() == disk.new
    assert disk.versions() == [disk.old]
    assert not any(verify(disk.paths))


def test_the_space_that_an_image_may_take_is_that_of_all_that_is_written_to_it(disk: Disk) -> None:
    """Whatever its file system does with what is overwritten; zeros take none."""
    write_at(disk.device, 5 * MIB, os.urandom(MIB))
    disk.back_up()
    write_at(disk.device, 5 * MIB, os.urandom(3 * PAGE) + bytes(3 * PAGE))
    write_at(disk.device, 6 * MIB - PAGE, os.urandom(5 * PAGE))
    leave_spool(disk.backups, NAME, disk.device)
    with contextlib.closing(dosvob.SparseFile(disk.paths.image)):
        spool = dosvob.Spool.open(disk.paths, "volume-1", CHUNKS, lambda count: None)
    with spool.file:
        needed = spool.space_needed()
    assert 8 * PAGE + 256 * KIB <= needed < 9 * PAGE + 256 * KIB


def test_a_disk_that_is_full_in_a_first_sync(tmp_path: Path, tmpfs: Tmpfs) -> None:
    for number, free in enumerate((0, PAGE, 16 * PAGE, MIB, 2 * MIB)):
        disk = Disk(tmp_path, tmpfs.path / str(number))
        tmpfs.leave_free(free)
        with pytest.raises((OSError, dosvob.DosvobError)):
            disk.back_up()
        assert not disk.paths.image.exists()
        tmpfs.leave_free(64 * MIB)
        disk.check_settled()
        shutil.rmtree(disk.backups)


def test_the_script_on_a_full_disk_backs_up_the_other_volume(home: Home, tmpfs: Tmpfs) -> None:
    small, big = home.simulator.add_volume("a-small"), home.simulator.add_volume("big")
    write_at(small.path, 5 * MIB, b"small")
    with big.path.open("r+b") as file:
        file.write(os.urandom(4 * MIB))
    backups = ("--backups", str(tmpfs.path))
    tmpfs.leave_free(2 * MIB)
    done = home.run(*backups, expect=1)
    error = one_clear_error(done)
    assert "big" in error
    assert "No space left on device" in error
    assert "make room" in error
    assert same(tmpfs.path / "a-small", small.path)
    assert not (tmpfs.path / "big").exists()
    assert home.simulator.alive() == []
    tmpfs.leave_free(64 * MIB)
    home.run(*backups)
    assert same(tmpfs.path / "big", big.path)


def test_a_later_volume_is_backed_up_although_the_changes_of_the_first_do_not_fit(home: Home, tmpfs: Tmpfs) -> None:
    big, small = home.simulator.add_volume("a-big"), home.simulator.add_volume("b-small")
    backups = ("--backups", str(tmpfs.path))
    home.run(*backups)
    write_at(big.path, 0, os.urandom(12 * MIB))
    write_at(small.path, 5 * MIB, b"small")
    tmpfs.leave_free(8 * MIB)
    error = one_clear_error(home.run(*backups, expect=1))
    assert "a-big" in error
    assert "No space left on device" in error
    assert same(tmpfs.path / "b-small", small.path)
    tmpfs.leave_free(64 * MIB)
    home.run(*backups)
    assert same(tmpfs.path / "a-big", big.path)


def test_a_later_volume_is_backed_up_although_the_first_one_does_not_fit(home: Home, tmpfs: Tmpfs) -> None:
    """Also when there are no images yet."""
    big, small = home.simulator.add_volume("a-big"), home.simulator.add_volume("b-small")
    write_at(big.path, 0, os.urandom(12 * MIB))
    write_at(small.path, 5 * MIB, b"small")
    backups = ("--backups", str(tmpfs.path))
    tmpfs.leave_free(8 * MIB)
    assert "a-big" in one_clear_error(home.run(*backups, expect=1))
    assert same(tmpfs.path / "b-small", small.path)
    tmpfs.leave_free(64 * MIB)
    home.run(*backups)
    assert same(tmpfs.path / "a-big", big.path)


class FailingDisk:
    """A mounted ext4 file system on a disk that fails to write more than it has room for.

    It is made of a loop device over a file on a tmpfs that is smaller than the file. Of a write that begins where there
    is something already, Linux's loop device tells no error.
    """

    SIZE = 64 * MIB

    def __init__(self, tmpfs: Tmpfs, path: Path) -> None:
        self.path = path
        self._tmpfs = tmpfs
        content = tmpfs.path / "disk"
        with content.open("xb") as file:
            file.truncate(self.SIZE)
        options = ["-b", str(PAGE), "-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard"]
        subprocess.run(["mkfs.ext4", "-q", "-F", *options, content], check=True)
        self._loop = LoopDevice(content)
        path.mkdir()
        self._mount()
        with (path / "filling").open("xb") as file:  # what the file system writes about files is not to fail
            os.posix_fallocate(file.fileno(), 0, self.SIZE // 2)
        (path / "filling").unlink()
        self.forget()

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "errors=continue", self._loop.path, self.path], check=True)

    def leave_free(self, free: int) -> None:
        """Only so much can be written from now on, besides where something is already."""
        write_out(self.path)
        self._tmpfs.leave_free(free)

    def forget(self) -> None:
        """Unmount and mount it: what is not on the disk is gone."""
        subprocess.run(["umount", self.path], check=True)
        self._mount()

    def close(self) -> None:
        """Take it away."""
        subprocess.run(["umount", "--lazy", self.path], check=True)
        self._loop.close()


@pytest.fixture
def failing(tmpfs: Tmpfs, tmp_path: Path) -> Iterator[FailingDisk]:
    """A disk that can fail to write."""
    made = FailingDisk(tmpfs, tmp_path / "failing")
    yield made
    made.close()


def test_what_a_failing_disk_only_pretended_to_have_written_is_written_again(
    tmp_path: Path, failing: FailingDisk
) -> None:
    """After a write error the cache shows what the disk does not have."""
    disk = Disk(tmp_path, failing.path / "backups")
    disk.device.write_bytes(os.urandom(CHUNKS * MIB))
    failing.leave_free(3 * MIB)
    with pytest.raises(OSError, match=r"Input/output error|No space left"):
        disk.back_up()
    assert not disk.paths.image.exists()
    failing.leave_free(64 * MIB)
    back_up_in_the_end(disk)
    failing.forget()
    assert disk.image() == disk.device.read_bytes()
    disk.check_settled()


def back_up_in_the_end(disk: Disk) -> None:
    """Back up to a disk that was mended: for each file it may still be told once what could not be written."""
    for _ in ("the image", "the state", "their directory"):
        with contextlib.suppress(OSError):
            disk.back_up()
    disk.back_up()


def test_an_undo_that_never_got_to_the_disk_leaves_the_image_alone(
    tmp_path: Path, failing: FailingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, failing.path / "backups")
    disk.begin()
    complete = dosvob.PatchFile.complete

    def on_a_full_disk(writer: dosvob.PatchFile) -> None:
        while writer.limit % PAGE:  # so that a page begins with the footer
            writer.append(dosvob.Patch(0, 0, 0, b"", bytes(32)))
        failing.leave_free(0)
        complete(writer)

    with monkeypatch.context() as patches:
        patches.setattr(dosvob.PatchFile, "complete", on_a_full_disk)
        patches.setattr(dosvob.Update, "_write_image", lambda *_: pytest.fail("it was written"))
        with pytest.raises(OSError, match=r"Input/output error|No space left"):
            disk.back_up()
    failing.leave_free(64 * MIB)
    recover_all(disk.backups)
    assert disk.image() == disk.old
    back_up_in_the_end(disk)
    failing.forget()
    assert disk.image() == disk.new


def test_an_image_that_never_got_to_the_disk_is_taken_back_when_that_works_again(
    tmp_path: Path, failing: FailingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has all of it, and a power cut would leave a mix; to put it back may fail too, and is tried again."""
    disk = Disk(tmp_path, failing.path / "backups")
    disk.begin()
    write_image = dosvob.Update._write_image

    def on_a_full_disk(*arguments: Any) -> Any:
        failing.leave_free(0)
        return write_image(*arguments)

    with monkeypatch.context() as patches:
        patches.setattr(dosvob.Update, "_write_image", on_a_full_disk)
        with pytest.raises(OSError, match=r"Input/output error|No space left"):
            disk.back_up()
    failing.leave_free(64 * MIB)
    for _ in range(3):  # each file may still tell once of what could not be written
        recover_all(disk.backups)
    assert not disk.paths.undo.exists()
    failing.forget()
    assert disk.image() == disk.old
    back_up_in_the_end(disk)
    assert disk.image() == disk.new


# -- read-only


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Makes a file or directory read-only, also for root, by mounting it on itself."""
    mounted: list[Path] = []

    def make(path: Path) -> None:
        subprocess.run(["mount", "--bind", path, path], check=True)
        mounted.append(path)
        subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True)

    yield make
    for path in mounted:
        subprocess.run(["umount", "--lazy", path], check=True)


def test_a_read_only_directory_is_told_before_anything_is_created(
    home: Home, read_only: Callable[[Path], None]
) -> None:
    home.simulator.add_volume(NAME)
    home.backups.mkdir()
    read_only(home.backups)
    done = home.run(expect=2)
    assert f"cannot write to {home.backups.name}" in one_clear_error(done)
    assert "Read-only file system" in done.stderr
    assert not [request for request in home.simulator.requests if request.method == "POST"]


def test_a_read_only_image_is_told_before_anything_is_fetched(home: Home, read_only: Callable[[Path], None]) -> None:
    volume, other = home.simulator.add_volume(NAME), home.simulator.add_volume("other")
    home.run()
    write_at(volume.path, 3 * MIB, b"new")
    write_at(other.path, 3 * MIB, b"new too")
    kept = home.image(NAME).stat()
    read_only(home.image(NAME))
    error = one_clear_error(home.run(expect=1))
    assert "Read-only file system" in error
    assert NAME in error
    assert (home.image(NAME).stat().st_mtime_ns, same(home.image("other"), other.path)) == (kept.st_mtime_ns, True)
    assert not (home.backups / ".dosvob" / f"{NAME}.spool").exists()
    subprocess.run(["umount", home.image(NAME)], check=True)
    subprocess.run(["mount", "--bind", home.image(NAME), home.image(NAME)], check=True)  # for the fixture to undo
    home.run()
    assert same(home.image(NAME), volume.path)


# -- a failing disk


def test_an_io_error_at_any_call_leaves_the_old_or_the_new_image(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    def scene(name: str) -> Disk:
        (tmp_path / name).mkdir()
        made = Disk(tmp_path / name)
        made.begin()
        return made

    def run(disk: Disk, *options: str) -> subprocess.CompletedProcess[str]:
        wrapper = strace(disk.backups, NAME, "-o", str(disk.device) + ".trace", *options)
        return run_driver("sync", disk.backups, NAME, disk.device, wrapper=wrapper)

    whole = scene("whole")
    assert run(whole).returncode == 0
    seen: dict[str, int] = {}
    cases = []
    for call in calls_in(Path(str(whole.device) + ".trace")):
        seen[call.name] = seen.get(call.name, 0) + 1
        # A directory may be there already, what is to be read need not be written first, and a hole may be zeros.
        is_needed = call.succeeded if call.name == "mkdir" else call.name not in ("fdatasync", "fallocate")
        cases.append((call.name, seen[call.name], is_needed))
    # In how many writes the state gets to the disk depends a little on what comes first.
    cases = [case for case in cases if case[0] != "write" or case[1] < seen["write"] - 1]
    for name, occurrence, is_needed in sampled(pytestconfig, cases, 6):
        disk = scene(f"{name}-{occurrence}")
        done = run(disk, f"--inject={name}:error=EIO:when={occurrence}")
        assert done.returncode == is_needed, (name, occurrence, done)
        assert "Input/output error" in done.stderr or not is_needed
        assert "Traceback" not in done.stderr
        recover(disk.backups, NAME)
        assert disk.image() in (disk.old, disk.new), (name, occurrence)
        assert disk.versions() == [disk.old] * (disk.image() == disk.new), (name, occurrence)
        disk.check_settled()


class BadPages:
    """Pages of the image that the disk cannot read; what is written to them, or made a hole, can be read again.

    As the kernel does it, a read ends before them, and is an error only if it begins with one.
    """

    def __init__(self, disk: Disk, pages: Iterable[int], patches: pytest.MonkeyPatch) -> None:
        self.pages = set(pages)
        self._inode = disk.paths.image.stat().st_ino
        pread, write_data, write_zeros = os.pread, dosvob.SparseFile.write, dosvob.SparseFile.write_zeros

        def read(fd: int, length: int, offset: int) -> bytes:
            bad = self.pages.intersection(pages_of(offset, length)) if self._is_image(fd) else ()
            if offset // PAGE in bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return pread(fd, min(bad) * PAGE - offset if bad else length, offset)

        def write(file: dosvob.SparseFile, data: bytes | memoryview, offset: int) -> None:
            write_data(file, data, offset)
            self._mend(file.fd, offset, len(data))

        def punch(file: dosvob.SparseFile, offset: int, length: int) -> None:
            write_zeros(file, offset, length)
            self._mend(file.fd, offset, length)

        patches.setattr(os, "pread", read)
        patches.setattr(dosvob.SparseFile, "write", write)
        patches.setattr(dosvob.SparseFile, "write_zeros", punch)

    def _is_image(self, fd: int) -> bool:
        return os.fstat(fd).st_ino == self._inode

    def _mend(self, fd: int, offset: int, length: int) -> None:
        if self._is_image(fd):
            self.pages.difference_update(pages_of(offset, length))


def mebibyte(number: int) -> tuple[int, int]:
    """A range of bytes."""
    return number * MIB, (number + 1) * MIB


def pages_of(offset: int, length: int) -> range:
    """The numbers of the pages of a part of a file."""
    return range(offset // PAGE, (offset + length - 1) // PAGE + 1)


@pytest.mark.parametrize("becomes", ["what it was", "another page", "zeros in part", "zeros", "noise"])
@pytest.mark.parametrize("reread", [True, False])
def test_a_mebibyte_that_the_disk_cannot_read_is_fetched_and_written_again(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, becomes: str, reread: bool
) -> None:
    chunk = 5
    write_at(disk.device, chunk * MIB, os.urandom(PAGES // 2 * PAGE) + bytes(PAGES // 2 * PAGE))
    disk.back_up()
    bad = BadPages(disk, range(chunk * PAGES, (chunk + 1) * PAGES), monkeypatch)
    assert verify(disk.paths)[0] == [(chunk * MIB, (chunk + 1) * MIB)]
    change = {
        "what it was": b"",
        "another page": os.urandom(PAGE),
        "zeros in part": bytes(9 * PAGE),
        "zeros": bytes(MIB),
        "noise": os.urandom(MIB),
    }
    write_at(disk.device, chunk * MIB, change[becomes])
    runs = 1 if reread else dosvob.ImageDigests.PARTS
    decayed = [disk.back_up(reread=reread)[0].differing.ranges for _ in range(runs)]
    assert [places for places in decayed if places] == [[mebibyte(chunk)]]
    assert not bad.pages
    assert disk.image() == disk.device.read_bytes()
    assert verify(disk.paths)[0] == []


@pytest.mark.parametrize("becomes", ["what it was", "zeros"])
def test_a_page_in_the_middle_that_the_disk_cannot_read_is_written_again(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    page = 5 * PAGES + 7
    write_at(disk.device, 5 * MIB, os.urandom(MIB))
    disk.back_up()
    bad = BadPages(disk, [page], monkeypatch)
    assert verify(disk.paths)[0] == [(5 * MIB, 6 * MIB)]
    if becomes == "zeros":
        write_at(disk.device, page * PAGE, bytes(PAGES // 2 * PAGE))
    assert disk.back_up(reread=True)[0].differing.ranges == [mebibyte(5)]
    assert not bad.pages
    assert disk.image() == disk.device.read_bytes()


def reading_fails(image: Path) -> tuple[str, ...]:
    """The words before a command that reads the data of an image MiB by MiB: the disk cannot read the first of them."""
    trace = ("strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-P", str(image), "-e", "trace=pread64")
    return (*trace, "--inject=pread64:error=EIO:when=1")


def test_the_script_names_what_the_disk_cannot_read_and_fetches_it(home: Home) -> None:
    volume = home.simulator.add_volume(NAME)
    write_at(volume.path, 700 * MIB, os.urandom(MIB))
    home.run()
    image = home.image(NAME)
    done = home.run("verify", wrapper=reading_fails(image), expect=1)
    assert f"bytes {700 * MIB} to {701 * MIB - 1}" in one_clear_error(done)
    inode = image.stat().st_ino
    done = home.run("--reread", wrapper=reading_fails(image))
    assert "cannot be read" in done.stderr
    assert f"bytes {700 * MIB} to {701 * MIB - 1}" in done.stderr
    assert "1.0 MiB had changed" in done.stdout  # so it was written again
    assert image.stat().st_ino == inode
    assert same(image, volume.path)


def test_a_hole_beyond_4_gib_is_made_there_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "image"
    places = (MIB, 4 * GIB + MIB, 5 * GIB, 5 * GIB + MIB)
    with path.open("x+b") as file:
        file.truncate(6 * GIB)
        for place in places:
            os.pwrite(file.fileno(), b"x" * MIB, place)
        with contextlib.closing(dosvob.SparseFile(path, os.O_RDWR)) as sparse:
            sparse.write_zeros(5 * GIB, MIB)
        assert data_places(path) == {place // MIB for place in places if place != 5 * GIB}
        assert os.pread(file.fileno(), MIB, 5 * GIB) == bytes(MIB)
        assert os.fstat(file.fileno()).st_size == 6 * GIB


# -- an undo that is put back, or damaged


def flipped(content: bytes, position: int, bit: int) -> bytes:
    """The content with one bit changed."""
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_patch_of_an_undo_that_decayed_costs_its_own_chunk(disk: Disk, is_lost: bool) -> None:
    """All else is put back; then all of the image is compared, and mended from the volume."""
    leave_written(disk.backups, NAME, disk.device)
    undo = disk.paths.undo.read_bytes()
    with dosvob.PatchFile(disk.paths.undo, "version") as file:
        position, patch = max((found for found in file.patches() if found[1].filled), key=lambda found: found[0])
    if is_lost:
        disk.paths.undo.write_bytes(flipped(undo, position + patch.length - 9, 2))
    with contextlib.closing(dosvob.Chain(disk.paths)) as chain:  # who only reads says the same
        assert [damaged.ranges for damaged in chain.verify(lambda count: None)] == [[mebibyte(patch.index)] * is_lost]
    assert recover(disk.backups, NAME)
    assert not disk.paths.undo.exists()
    assert verify(disk.paths) == [[mebibyte(patch.index)] * is_lost]
    start, end = mebibyte(patch.index)
    assert disk.image()[:start] + disk.image()[end:] == disk.old[:start] + disk.old[end:]
    update, _ = disk.back_up()
    assert update.differing.ranges == [mebibyte(patch.index)] * is_lost
    assert disk.image() == disk.new
    assert verify(disk.paths) == [[], [mebibyte(patch.index)] * is_lost]


def test_an_undo_of_any_length_is_put_back_as_a_whole_or_deleted(disk: Disk, pytestconfig: pytest.Config) -> None:
    """A crash while it is written leaves it so, and the image was not touched."""
    with power_cut_at(dosvob.Update, "_write_image"):
        disk.back_up()
    undo = disk.paths.undo.read_bytes()
    head = BLOCK + dosvob.Patch.HEADER.size
    lengths = [0, 1, 10, BLOCK - 1, BLOCK, head, len(undo) - 1, len(undo) - BLOCK - 1, len(undo) - BLOCK]
    before = dosvob.identity_of(disk.paths.image)
    for length in (*lengths, *sampled(pytestconfig, range(0, len(undo), 5003), 40)):
        disk.paths.undo.write_bytes(undo[:length])
        with contextlib.closing(dosvob.Chain(disk.paths)) as chain:
            assert not any(damaged.ranges for damaged in chain.verify(lambda count: None))
        assert not recover(disk.backups, NAME)
        assert not disk.paths.undo.exists()
        assert dosvob.identity_of(disk.paths.image) == before, length
    disk.check_settled()


def test_an_undo_whose_footer_decayed_is_put_back_and_all_is_compared(disk: Disk, pytestconfig: pytest.Config) -> None:
    """It looks like one that was being written, but the image was touched."""
    leave_written(disk.backups, NAME, disk.device)
    undo = disk.paths.undo.read_bytes()
    position = len(undo) - 1 - random.Random(pytestconfig.option.seed).randrange(BLOCK)
    disk.paths.undo.write_bytes(flipped(undo, position, position % 8))
    assert recover(disk.backups, NAME)
    assert disk.image() == disk.old
    state = dosvob.State.load(disk.paths.state)
    assert state is not None
    assert state.identity != dosvob.identity_of(disk.paths.image)
    disk.back_up()
    assert disk.image() == disk.new
    disk.check_settled()


@pytest.mark.parametrize("kind", ["end", "state", "spool", "version"])
def test_a_page_of_a_volume_that_has_backups_itself_is_no_footer(disk: Disk, kind: str) -> None:
    """It is the last of what an interrupted sync has left, where a footer would be."""
    disk.back_up()
    old = disk.image()
    write_at(disk.device, 5 * MIB, dosvob.seal(kind, {"id": "0" * 32}))
    leave_spool(disk.backups, NAME, disk.device)
    with dosvob.PatchFile(disk.paths.spool, "spool") as file:
        assert file.footer is None
        assert len(list(file.patches())) == 1
    assert not recover(disk.backups, NAME)
    assert disk.image() == old
    disk.check_settled()


def test_what_is_put_back_has_its_old_length_and_time_so_that_nothing_is_fetched_twice(disk: Disk) -> None:
    before = dosvob.identity_of(disk.paths.image)
    leave_written(disk.backups, NAME, disk.device)
    assert disk.paths.image.stat().st_size == len(disk.new)
    assert recover(disk.backups, NAME)
    assert dosvob.identity_of(disk.paths.image) == before
    assert disk.image() == disk.old
    assert verify(disk.paths) == [[]]
    streams: list[AgentProcess] = []

    def connect(first: int, window: int) -> AgentProcess:
        streams.append(AgentProcess(disk.device, first, window))
        return streams[-1]

    back_up(disk.backups, NAME, disk.device, connect=connect)
    assert disk.image() == disk.new
    assert streams[0].received < 8 * KIB  # digests alone


def test_an_undo_is_of_no_use_to_another_state_than_its_own(disk: Disk) -> None:
    """Somebody put back an older copy of image and state, and the undo of a crash lies there still."""
    image, state = disk.paths.image.read_bytes(), disk.paths.state.read_bytes()
    disk.back_up()
    scatter(disk.device, 7, CHUNKS * MIB)
    leave_written(disk.backups, NAME, disk.device)
    disk.paths.image.write_bytes(image)
    disk.paths.state.write_bytes(state)
    shutil.rmtree(disk.paths.versions)
    with contextlib.closing(dosvob.Chain(disk.paths)) as chain:
        assert not any(damaged.ranges for damaged in chain.verify(lambda count: None))
    assert not recover(disk.backups, NAME)
    assert disk.image() == image
    assert verify(disk.paths) == [[]]
    disk.check_settled()


@pytest.mark.parametrize("keeps_none", [True, False])
def test_an_image_without_a_state_is_put_back_too(disk: Disk, keeps_none: bool) -> None:
    """Without versions nothing is kept of it, and with none to be kept neither."""
    disk.paths.state.unlink()
    with power_cut_at(dosvob.Update, "_complete_state"):
        keep = dosvob.Keep(0, 0, 0, 0) if keeps_none else dosvob.Keep()
        back_up(disk.backups, NAME, disk.device, keep=keep)
    assert disk.image() == disk.new
    target = disk.backups.parent / "restored"
    with contextlib.closing(dosvob.Chain(disk.paths)) as chain:
        assert chain.restore(0, target, lambda count: None)[0].read_bytes() == disk.old
    assert recover(disk.backups, NAME)
    assert disk.image() == disk.old
    disk.back_up()
    assert disk.image() == disk.new
    assert disk.versions() == []
    disk.check_settled()


def test_with_no_versions_to_be_kept_an_undo_is_there_all_the_same_and_goes(disk: Disk) -> None:
    none = dosvob.Keep(0, 0, 0, 0)
    with power_cut_at(dosvob.Update, "_complete_state"):
        back_up(disk.backups, NAME, disk.device, keep=none)
    assert recover(disk.backups, NAME)
    assert disk.image() == disk.old
    back_up(disk.backups, NAME, disk.device, keep=none)
    assert disk.image() == disk.new
    assert not disk.paths.undo.exists()
    assert disk.versions() == []


def test_after_its_commit_an_undo_is_a_version_also_before_it_has_its_name(disk: Disk) -> None:
    with power_cut_at(dosvob.Undo, "settle"):
        disk.back_up()
    assert disk.paths.undo.exists()
    state = disk.paths.state.read_bytes()
    assert disk.versions() == [disk.old]
    assert not recover(disk.backups, NAME)
    assert disk.paths.state.read_bytes() == state
    assert not disk.paths.undo.exists()
    assert disk.image() == disk.new
    assert disk.versions() == [disk.old]
    disk.check_settled()


def test_a_new_image_has_another_time_than_the_old_one_also_within_a_second(disk: Disk) -> None:
    for seed in range(3, 6):
        before = dosvob.identity_of(disk.paths.image)
        scatter(disk.device, seed, CHUNKS * MIB)
        disk.back_up()
        assert dosvob.identity_of(disk.paths.image)["mtime_ns"] > before["mtime_ns"]


def test_the_good_part_of_a_spool_is_used_again(disk: Disk) -> None:
    streams: list[AgentProcess] = []

    def connect(first: int, window: int) -> AgentProcess:
        streams.append(AgentProcess(disk.device, first, window))
        return streams[-1]

    with power_cut_at(dosvob.Undo, "write"):
        back_up(disk.backups, NAME, disk.device, connect=connect)
    os.truncate(disk.paths.spool, disk.paths.spool.stat().st_size - 1)
    back_up(disk.backups, NAME, disk.device, connect=connect)
    assert streams[1].received < streams[0].received / 2
    assert disk.image() == disk.new


def all_patches(path: Path) -> list[tuple[int, dosvob.Patch]]:
    """The patches of a spool up to the first that is not whole, with their positions."""
    found = []
    with contextlib.suppress(dosvob.Damaged), dosvob.PatchFile(path, "spool") as file:
        for position, patch in file.patches():
            found.append((position, dataclasses.replace(patch, data=bytes(patch.data))))
    return found


def test_patches_read_from_a_damaged_spool_were_all_written(disk: Disk, pytestconfig: pytest.Config) -> None:
    leave_spool(disk.backups, NAME, disk.device)
    spool = disk.paths.spool.read_bytes()
    written = all_patches(disk.paths.spool)
    assert len(written) > 5
    assert written[-1][0] + written[-1][1].length == len(spool)
    path = disk.backups.parent / "spool"
    for position in sampled(pytestconfig, range(0, len(spool), 3001), 40):
        for damaged in (flipped(spool, position, position % 8), spool[:position] + spool[position + 1 :]):
            path.write_bytes(damaged)
            found = all_patches(path)
            assert found == written[: len(found)]
            assert len(found) < len(written)


def test_patches_of_an_older_spool_behind_a_new_beginning_are_never_used(disk: Disk) -> None:
    """As a disk may have them where the new spool was never written; the same volume, image and chunks."""
    leave_spool(disk.backups, NAME, disk.device)
    older, newer = disk.paths.spool.read_bytes(), disk.backups.parent / "newer"
    with dosvob.PatchFile(disk.paths.spool, "spool") as file:
        head = file.head
    taken_up = []
    for new_id in (head["id"], "0" * 32):
        newer.unlink(missing_ok=True)
        writer = dosvob.PatchFile.create(newer, "spool", {**head, "id": new_id})
        writer.append(dosvob.Patch(1, 0, 0, b"", bytes(32)))
        writer.close()
        disk.paths.spool.write_bytes(newer.read_bytes() + older[BLOCK:])
        taken_up.append(len(all_patches(disk.paths.spool)))
    assert taken_up[0] > taken_up[1] == 1
    write_at(disk.device, 0, os.urandom(CHUNKS * MIB))  # nothing of the older patches is there any more
    disk.check_settled()


@settings(deadline=None, database=None, print_blob=True)
@given(st.binary(max_size=2000), st.booleans())
def test_arbitrary_bytes_are_no_patches(junk: bytes, is_tail: bool) -> None:
    """Alone, or behind a good beginning, of which they are no part."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "spool")
        written = dosvob.Patch(0, 1, 1, b"w" * PAGE, bytes(32))
        if is_tail:
            writer = dosvob.PatchFile.create(path, "spool", {"id": "an id"})
            writer.append(written)
            writer.close()
        with path.open("ab") as file:
            file.write(junk)
        assert [patch for _, patch in all_patches(path)] == [written] * is_tail
        with dosvob.PatchFile(path, "spool") as found:
            assert found.footer is None


@pytest.mark.parametrize("kind", ["spool", "undo"])
def test_a_file_of_a_newer_version_is_kept_and_told(disk: Disk, kind: str) -> None:
    leave_written(disk.backups, NAME, disk.device, patches=0)
    path = disk.paths.spool if kind == "spool" else disk.paths.undo
    sealed_as = "spool" if kind == "spool" else "version"
    with dosvob.PatchFile(path, sealed_as) as file:
        head = file.head
    write_at(path, 0, dosvob.seal(sealed_as, {**head, "version": 3}))
    if kind == "spool":
        recover(disk.backups, NAME)
    kept, image = path.read_bytes(), disk.image()
    commands: list[Callable[[], object]] = [disk.back_up]
    commands += [lambda: recover(disk.backups, NAME)] if kind == "undo" else []
    for command in commands:
        with pytest.raises(dosvob.DosvobError, match="newer dosvob"):
            command()
    assert disk.image() == image
    assert path.read_bytes() == kept


OLDER_JOURNAL = (
    "c-nJfKm{wO?6j_pTH`ju<B1`^=;No=)k<ZlMa7x<c}i9ahB^vLnJGYql0h1Ns0375mY-9an;H+%0O9Bwf+X@1b5lWLDTyVCAbwI}"
    "F^FHSRGe7_Vi*}%nj4xLfh^0*PXURT1KGJHnLyL>ib3u$H#0XfGBq<mfZAFYu=@qzK4Ios>bCHXbH~}Fqvua|mrs?*OD*?6^{fEH"
    "$!U9?&DTy$k<}7%y|U<GvNJ@2ksm^{F!0~m^_A~d*n54^t1BkVNlmOK-djbf>5yPkN-IhPtHAJINn&<tUVLH+NRg3&k(sW6ArOTa"
    "7+8T(lv1t2C>RB!V9)>ncZuT_"
)
OLDER_STATE = (
    "c-l+JFD}bZQYbD-EJ;-`<f>LGOD!tS%+FJ@QZUp}P%6$#EGW*%F9C9aQu#ThxvBA)DL@{Sqid)HRF#*Qn+g(3Ni0bO@rzQ^Ax0>r"
    "6(xdI6lYd}R2Ugpnj4xL0R>7Dvs3fp6F~+m85tOv=^7XUQHX(o6&OV+)dCeI=jRsWq?V+nU{`1gRHzMB4zaW-H4)@AV<0ChzqBYX"
    "F$bi{APqkR=}pN@Pc1Gf1}itQOfg9`OEWi0OR+REOEXF{GBGnSv`9=eF*ZuIFf&QBG_^D~v`98gwluOdu}DcuwJ^0zv`n%zw=^(G"
    "G6xx#nUb1Ul37v-4mAv~XXfRnfJDrJ?A($}V2I{{Y&JAEGdD6aH8Vhf+FCA!Q7{Td!6+C7qhJ(_f>AIEM!_f;1*3onkhE3#CG)K>"
    "pVTs+R4qKj>D(sao69->-`mgLyPMk7;`QZ1t|TdSF1miQNb1Ith5Gq%x7{^n&$`TTdaB;U?<el-Nrp6p?ls9&3H@*J^6Yh{y}LHD"
    "#cs}6=r=J}WAn4v$1?!D`fDZ"
)
"""Of the dosvob of commit 55eb527: a committed journal for an image of 2 MiB, and a state of one; compressed."""


def unpacked(text: str) -> bytes:
    """One of these."""
    return zlib.decompress(base64.b85decode(text))


class OlderDisk(Disk):
    """The image of an older dosvob: its first chunk begins with "old", the second is zeros."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.old = b"old".ljust(2 * MIB, b"\0")
        self.device.write_bytes(self.old)
        self.paths.metadata.mkdir(parents=True)
        self.paths.image.write_bytes(self.old)
        self.paths.state.write_bytes(unpacked(OLDER_STATE))


def test_a_state_of_an_older_dosvob_is_read_as_before(tmp_path: Path) -> None:
    disk = OlderDisk(tmp_path)
    assert dosvob.State.load(disk.paths.state) == dosvob.State(
        dosvob.Snapshot("volume-1", NAME, "fra1", 2 * MIB, "2026-01-01T00:00:00Z"),
        "2026-01-01T00:05:00+00:00",
        3,
        hashlib.sha256(disk.paths.state.read_bytes()[BLOCK:]).hexdigest(),
        {"size": 2 * MIB, "inode": 7, "mtime_ns": 1767225600 * 10**9},
    )
    assert verify(disk.paths) == [[]]
    decay(disk.paths.image, 5)
    assert verify(disk.paths) == [[mebibyte(0)]]
    update, warnings = disk.back_up()
    assert (update.differing.ranges, warnings) == ([mebibyte(0)], [])
    assert disk.image() == disk.old
    disk.check_settled()


def test_a_journal_of_dosvob_without_versions_is_kept_and_told(tmp_path: Path) -> None:
    """The image may have been changed in part, and only the one that wrote the journal can complete it."""
    disk = OlderDisk(tmp_path)
    journal = disk.paths.metadata / f"{NAME}.journal"
    journal.write_bytes(unpacked(OLDER_JOURNAL))
    with dosvob.Home(disk.backups).locked():  # it makes an id, which the older one did not have
        before = all_identities(disk.backups)
    for command in (lambda: recover(disk.backups, NAME), disk.back_up):
        with pytest.raises(dosvob.DosvobError, match=r"older dosvob.*must finish it"):
            command()
    assert recover_all(disk.backups) == {NAME}
    assert all_identities(disk.backups) == before
    journal.unlink()  # as the message says
    disk.check_settled()


def journal_of(disk: Disk, *, is_committed: bool) -> Path:
    """A journal as dosvob with one had it, and the version that it would have left."""
    journal = disk.paths.metadata / f"{NAME}.journal"
    head = {"id": "f" * 32, "name": NAME, "volume_id": "volume-1", "base": dosvob.identity_of(disk.paths.image)}
    with dosvob.PatchFile.create(journal, "journal", head) as writer:
        writer.append(dosvob.Patch(0, 1, 1, b"n" * PAGE, bytes(32)))
        if is_committed:
            writer.complete()
    journal.with_name(f"{NAME}.version.new").write_bytes(b"")
    return journal


def test_a_committed_journal_is_kept_and_told(disk: Disk) -> None:
    """It may have been written to the image in part."""
    journal = journal_of(disk, is_committed=True)
    with dosvob.Home(disk.backups).locked():
        before = all_identities(disk.backups)
    for command in (lambda: recover(disk.backups, NAME), disk.back_up):
        with pytest.raises(dosvob.DosvobError, match=r"older dosvob.*must finish it"):
            command()
    assert recover_all(disk.backups) == {NAME}
    assert all_identities(disk.backups) == before
    journal.unlink()  # as the message says
    disk.check_settled()


@pytest.mark.parametrize("kept", [0, BLOCK, BLOCK + 1, -1, None])
def test_a_journal_that_was_not_committed_is_dropped(disk: Disk, kept: int | None) -> None:
    journal = journal_of(disk, is_committed=False)
    journal.write_bytes(journal.read_bytes()[:kept])
    assert recover_all(disk.backups) == set()
    assert not {path.name for path in disk.paths.metadata.iterdir()} & {f"{NAME}.journal", f"{NAME}.version.new"}
    assert disk.image() == disk.old
    disk.check_settled()


# -- a spool that is used again


CHUNK_5 = 5 * MIB


@pytest.mark.parametrize("taken_back", [1, 2])
@pytest.mark.parametrize("between", [[], [{0: b"b"}], [{0: b"b"}, {0: b"c", 9: b"c"}], [{}, {9: b"d"}]], ids=str)
def test_pages_that_the_volume_takes_back_between_syncs_are_not_what_was_spooled(
    disk: Disk, between: list[dict[int, bytes]], taken_back: int
) -> None:
    """An interrupted sync changed two pages of a chunk, and others may be interrupted before one comes to its end."""
    write_at(disk.device, CHUNK_5, os.urandom(MIB))
    disk.back_up()
    before = disk.device.read_bytes()

    def change(pages: dict[int, bytes]) -> None:
        write_at(disk.device, CHUNK_5, before[CHUNK_5 : CHUNK_5 + MIB])
        for page, content in pages.items():
            write_at(disk.device, CHUNK_5 + page * PAGE, content * PAGE)

    ids = set()
    for pages in ({0: b"a", 9: b"a"}, *between):
        change(pages)
        leave_spool(disk.backups, NAME, disk.device)
        with dosvob.PatchFile(disk.paths.spool, "spool") as file:
            ids.add(file.head["id"])
    assert len(ids) == 1  # it is taken up each time
    change({9: b"a"} if taken_back == 1 else {})
    disk.back_up()
    assert disk.image() == disk.device.read_bytes()
    assert disk.versions()[0] == before
    disk.check_settled()


def test_a_spooled_chunk_that_decayed_to_what_the_volume_has_is_left_as_it_is(disk: Disk) -> None:
    """So that what was fetched for it is of no use any more, and must not be written."""
    write_at(disk.device, CHUNK_5, os.urandom(MIB))
    disk.back_up()
    before = disk.device.read_bytes()
    write_at(disk.device, CHUNK_5, os.urandom(PAGE))
    leave_spool(disk.backups, NAME, disk.device)
    write_at(disk.device, CHUNK_5, before[CHUNK_5 : CHUNK_5 + PAGE])
    decay(disk.paths.image, CHUNK_5 + 9 * PAGE)
    write_at(disk.device, CHUNK_5 + 9 * PAGE, disk.image()[CHUNK_5 + 9 * PAGE :][:PAGE])
    disk.back_up()
    assert disk.image() == disk.device.read_bytes()
    assert verify(disk.paths)[0] == []


def test_a_spooled_chunk_that_decayed_elsewhere_is_mended(disk: Disk) -> None:
    """Where its patch has nothing: with the patch it is not what the spool says that it becomes."""
    write_at(disk.device, CHUNK_5, os.urandom(MIB))
    disk.back_up()
    write_at(disk.device, CHUNK_5, os.urandom(PAGE))
    leave_spool(disk.backups, NAME, disk.device)
    decay(disk.paths.image, CHUNK_5 + 9 * PAGE)
    assert disk.back_up()[0].differing.ranges == [mebibyte(5)]
    assert disk.image() == disk.device.read_bytes()
    assert verify(disk.paths)[0] == []


def test_a_spooled_chunk_that_cannot_be_read_any_more_is_all_written(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its patch has all that is no zeros: what cannot be read may be elsewhere."""
    write_at(disk.device, CHUNK_5, bytes(9 * PAGE) + os.urandom(PAGE) + bytes(MIB - 10 * PAGE))
    disk.back_up()
    write_at(disk.device, CHUNK_5 + 9 * PAGE, os.urandom(PAGE))
    leave_spool(disk.backups, NAME, disk.device)
    bad = BadPages(disk, [CHUNK_5 // PAGE + 20], monkeypatch)
    assert disk.back_up()[0].differing.ranges == [mebibyte(5)]
    assert not bad.pages
    assert disk.image() == disk.device.read_bytes()


def test_of_two_patches_of_a_chunk_the_last_counts(disk: Disk) -> None:
    disk.back_up()
    for _ in range(2):
        write_at(disk.device, CHUNK_5, os.urandom(PAGE))
        leave_spool(disk.backups, NAME, disk.device)
    assert [patch.index for _, patch in all_patches(disk.paths.spool)] == [5, 5]
    disk.back_up()
    assert disk.image() == disk.device.read_bytes()


def test_nothing_stays_behind_the_good_part_of_a_spool(disk: Disk) -> None:
    leave_spool(disk.backups, NAME, disk.device)
    spool = disk.paths.spool.read_bytes()
    disk.paths.spool.write_bytes(flipped(spool, BLOCK + 40, 0))
    disk.device.write_bytes(disk.old)
    leave_spool(disk.backups, NAME, disk.device)
    assert disk.paths.spool.stat().st_size == BLOCK
    disk.check_settled()


@pytest.mark.parametrize("comes_back", ["what it was", "a part of it", "something else"])
def test_a_chunk_that_was_zeros_in_an_interrupted_sync_gets_its_data_back(disk: Disk, comes_back: str) -> None:
    """What pages are in a patch is decided by the image, which has all of the data still."""
    data = os.urandom(MIB)
    write_at(disk.device, CHUNK_5, data)
    disk.back_up()
    write_at(disk.device, CHUNK_5, bytes(MIB))
    leave_spool(disk.backups, NAME, disk.device)
    contents = {
        "what it was": data,
        "a part of it": bytes(MIB // 2) + data[MIB // 2 :],
        "something else": os.urandom(3 * PAGE) + bytes(MIB - 3 * PAGE),
    }
    write_at(disk.device, CHUNK_5, contents[comes_back])
    disk.back_up()
    assert disk.image() == disk.device.read_bytes()
    disk.check_settled()


# -- what goes wrong while the image is written


def test_a_spool_that_decays_before_it_is_written_is_taken_back_at_once(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is good of it is used again."""
    before = dosvob.identity_of(disk.paths.image)
    write_image = dosvob.Update._write_image

    def decayed(update: dosvob.Update, spool: dosvob.Spool) -> Any:
        position, patch = all_patches(disk.paths.spool)[-1]
        write_at(disk.paths.spool, position + patch.length - 9, b"decayed")
        return write_image(update, spool)

    with monkeypatch.context() as patches:
        patches.setattr(dosvob.Update, "_write_image", decayed)
        with pytest.raises(dosvob.Damaged):
            disk.back_up()
    assert disk.image() == disk.old
    assert dosvob.identity_of(disk.paths.image) == before
    assert not disk.paths.undo.exists()
    assert len(all_patches(disk.paths.spool)) > 3
    disk.back_up()
    assert disk.image() == disk.new
    disk.check_settled()


def test_a_signal_while_the_image_is_written_leaves_it_to_the_next_command(disk: Disk) -> None:
    written: list[dosvob.Patch] = []
    write_to = dosvob.Patch.write_to

    def write(patch: dosvob.Patch, file: dosvob.SparseFile) -> None:
        written.append(patch)
        write_to(patch, file)

    def heed(count: int) -> None:
        if len(written) == 3:
            raise dosvob.Interrupted

    snapshot = snapshot_of(disk.device, NAME, taken_at="2026-01-02T00:00:00Z")
    with contextlib.closing(dosvob.Update(disk.paths, snapshot, dosvob.Keep(), print, heed)) as update:
        connect: Any = lambda first, window: AgentProcess(disk.device, first, window)  # noqa: E731
        sync_device(connect, update, print)
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(dosvob.Patch, "write_to", write)
            with pytest.raises(dosvob.Interrupted):
                update.finish()
    assert recover(disk.backups, NAME)
    assert disk.image() == disk.old
    disk.back_up()
    assert disk.image() == disk.new
    disk.check_settled()


def test_an_image_that_appears_during_a_first_sync_is_not_overwritten(tmp_path: Path) -> None:
    disk = Disk(tmp_path)

    def connect(first: int, window: int) -> AgentProcess:
        disk.paths.image.write_bytes(b"somebody's")
        return AgentProcess(disk.device, first, window)

    with pytest.raises(dosvob.DosvobError, match="has appeared meanwhile"):
        back_up(disk.backups, NAME, disk.device, connect=connect)
    assert disk.image() == b"somebody's"
    assert disk.paths.partial.read_bytes() == disk.device.read_bytes()
    assert not disk.paths.state.exists()
    disk.paths.image.unlink()
    disk.check_settled()


def test_an_undo_whose_image_was_deleted_is_of_no_use(disk: Disk) -> None:
    leave_written(disk.backups, NAME, disk.device)
    disk.paths.image.unlink()
    assert recover_all(disk.backups) == set()
    assert not disk.paths.undo.exists()
    update, warnings = disk.back_up()
    assert update.changed
    assert not warnings
    disk.check_settled()


def test_the_script_backs_up_afresh_when_the_image_of_an_interrupted_sync_was_deleted(home: Home) -> None:
    volume = home.simulator.add_volume(NAME)
    write_at(volume.path, 5 * MIB, b"old")
    home.run()
    paths = dosvob.ImagePaths(home.backups, NAME)
    head = {"id": "a" * 32, "volume_id": volume.id, "base": dosvob.identity_of(paths.image)}
    dosvob.PatchFile.create(paths.spool, "spool", head).close()  # what came until the crash
    paths.image.unlink()
    done = home.run()
    assert not done.stderr
    assert same(paths.image, volume.path)
    assert not paths.spool.exists()


def test_a_spool_with_patches_beyond_the_volumes_end_does_no_harm(disk: Disk) -> None:
    """It was begun when the volume was said to be larger."""
    leave_spool(disk.backups, NAME, disk.device)
    os.truncate(disk.device, (CHUNKS - 2) * MIB)
    with contextlib.suppress(dosvob.DosvobError):  # nothing of it is applied
        disk.back_up()
    disk.check_settled()


@pytest.mark.parametrize("kind", ["spool", "undo", "journal"])
@pytest.mark.parametrize("junk", [b"", b"junk"], ids=["zeros", "junk"])
def test_the_script_does_not_take_a_large_file_that_is_none_of_its_own_into_memory(
    home: Home, junk: bytes, kind: str
) -> None:
    """As a power cut may leave it."""
    volume = home.simulator.add_volume(NAME)
    home.run()
    write_at(volume.path, 5 * MIB, b"new")
    path = home.backups / ".dosvob" / f"{NAME}.{kind}"
    path.write_bytes(junk)
    os.truncate(path, 64 * GIB)
    limited = ("sh", "-c", f'ulimit -v {8 * GIB // KIB}; exec "$@"', "sh")
    if kind == "journal":
        assert "must finish it" in home.run("verify", wrapper=limited, expect=1).stderr
        path.unlink()
    assert "sound" in home.run("verify", wrapper=limited).stdout
    assert not home.run(wrapper=limited).stderr
    assert same(home.image(NAME), volume.path)
    assert not path.exists()


def test_a_spool_that_is_used_again_and_again_does_not_grow_by_what_it_has(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """A few hot chunks are other ones whenever a sync is begun, and no sync is finished."""
    monkeypatch.setattr(dosvob, "ATTEMPTS", 1)
    chance = random.Random(pytestconfig.option.seed)
    hot = 5
    disk.back_up()
    size = 0
    for number in range(15):
        whole = number % 5 == 1
        for chunk in range(hot):
            heat(disk, chunk, chance, whole=whole or chunk == hot - 1)
        cut = chance.randrange(hot * MIB // 2, hot * MIB) if whole else chance.randrange(4 * KIB, MIB)
        with pytest.raises(dosvob.ConnectionLost, match="cut"):
            back_up(disk.backups, NAME, disk.device, connect=cut_connection(disk.device, cut))
        grown = disk.paths.spool.stat().st_size - size
        size += grown
        assert grown <= BLOCK + hot * (MIB + dosvob.Patch.HEADER.size), number
    disk.check_settled()


def heat(disk: Disk, chunk: int, chance: random.Random, *, whole: bool) -> None:
    """Change all of a chunk; or some of its pages, perhaps to zeros, or back to what they are in the image."""
    if whole:
        write_at(disk.device, chunk * MIB, chance.randbytes(MIB))
        return
    with disk.paths.image.open("rb") as image:
        for page in chance.sample(range(0, PAGES, PAGES // 8), 4):
            place = chunk * MIB + page * PAGE
            was = os.pread(image.fileno(), PAGE, place)
            write_at(disk.device, place, chance.choice((was, bytes(PAGE), chance.randbytes(PAGE))))


@pytest.mark.parametrize("good_reads", range(4))
def test_a_chunk_that_cannot_be_read_any_more_when_its_spool_is_used_again_is_not_guessed(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, good_reads: int
) -> None:
    """It is read for its digest, for its pages, and for the version; then, or before, the disk fails."""
    write_at(disk.device, 5 * MIB, os.urandom(MIB))
    disk.back_up()
    write_at(disk.device, 5 * MIB, os.urandom(PAGE))
    leave_spool(disk.backups, NAME, disk.device)
    write_at(disk.device, 5 * MIB + PAGE, os.urandom(PAGE))
    bad = BadPages(disk, [], monkeypatch)
    read_part = dosvob.SparseFile.read
    reads: list[int] = []

    def read_and_lose(file: dosvob.SparseFile, offset: int, length: int) -> bytes | None:
        if file.path == disk.paths.image and offset == 5 * MIB:
            if len(reads) == good_reads:
                bad.pages.update(range(5 * PAGES, 6 * PAGES))
            reads.append(length)
        return read_part(file, offset, length)

    monkeypatch.setattr(dosvob.SparseFile, "read", read_and_lose)
    with contextlib.suppress(OSError, dosvob.DosvobError):
        disk.back_up()
    assert len(reads) >= min(good_reads, 3)
    monkeypatch.undo()
    image, *versions = verify(disk.paths)
    assert image == []
    assert versions[0] == ([] if good_reads >= 3 else [mebibyte(5)])
    disk.back_up()
    assert disk.image() == disk.device.read_bytes()
    assert not disk.paths.spool.exists()


def cut_connection(device: Path, cut: int, connections: int = 1, most: int = 4 * KIB) -> Callable[[int, int], Any]:
    """For back_up: the first connections break after so many bytes."""
    left = [cut] * connections
    return lambda first, window: AgentProcess(device, first, window, most=most, cut=left.pop() if left else None)


def test_a_spool_that_is_deleted_during_the_sync_is_no_loss(disk: Disk) -> None:
    def connect(first: int, window: int) -> AgentProcess:
        disk.paths.spool.unlink()
        return AgentProcess(disk.device, first, window)

    back_up(disk.backups, NAME, disk.device, connect=connect)
    assert disk.image() == disk.new
    disk.check_settled()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_volume_that_does_not_fit_into_a_head_is_refused_before_anything_changes(
    tmp_path: Path, is_first: bool
) -> None:
    disk = Disk(tmp_path)
    if not is_first:
        disk.begin()
    before = all_identities(disk.backups)
    with pytest.raises(dosvob.DosvobError, match="longer than is possible"):
        back_up(disk.backups, NAME, disk.device, volume_id="v" * BLOCK)
    assert all_identities(disk.backups) == before
    disk.check_settled()


def all_identities(directory: Path) -> dict[Path, dict[str, int]]:
    """What there is in a directory, but for the lock and the home's id."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name not in ("lock", "home")]
    return {path: dosvob.identity_of(path) for path in files}


# -- a damaged state


def test_a_damaged_state_is_told_and_the_image_is_left_as_it_is(disk: Disk, pytestconfig: pytest.Config) -> None:
    state = disk.paths.state.read_bytes()
    damage = [flipped(state, position, 3) for position in (0, 20, 300, 4000, 4095, 4096, len(state) - 1)]
    damage += [flipped(state, position, 5) for position in sampled(pytestconfig, range(0, len(state), 61), 10)]
    damage += [state[:length] for length in (0, 1, 100, 4095, 4096, len(state) - 1)] + [state + b"x"]
    for content in damage:
        disk.paths.state.write_bytes(content)
        with pytest.raises(dosvob.DosvobError, match="is damaged") as raised:
            disk.back_up()
        assert str(disk.paths.state) in str(raised.value)
        assert disk.image() == disk.old
        assert disk.paths.state.read_bytes() == content
        with pytest.raises(dosvob.DosvobError, match="is damaged"):
            verify(disk.paths)
    disk.paths.state.unlink()  # as the message says
    disk.check_settled()


def test_a_state_of_a_newer_version_is_kept_and_told(disk: Disk) -> None:
    state = dosvob.State.load(disk.paths.state)
    assert state is not None
    write_at(disk.paths.state, 0, dosvob.seal("state", {"version": 3, **dataclasses.asdict(state)}))
    kept = disk.paths.state.read_bytes()
    with pytest.raises(dosvob.DosvobError, match="newer dosvob"):
        disk.back_up()
    assert disk.image() == disk.old
    assert disk.paths.state.read_bytes() == kept


def test_the_image_of_another_volume_of_that_name_is_set_aside(disk: Disk) -> None:
    warnings: list[str] = []
    back_up(disk.backups, NAME, disk.device, volume_id="volume-2", warn=warnings.append)
    (aside,) = disk.backups.glob(f"{NAME}.set-aside-*")
    assert aside.read_bytes() == disk.old
    assert str(aside) in warnings[0]
    assert disk.image() == disk.new
    state = dosvob.State.load(disk.paths.state)
    assert state is not None
    assert state.snapshot.volume_id == "volume-2"


# -- the same, met by the whole script


@dataclass(frozen=True)
class Trouble:
    """Trouble with the files of one volume: how it comes about, what is told, and what the user does about it.

    `cause` returns the words to put before the command.
    """

    cause: Callable[[Home, Volume], tuple[str, ...]]
    told: tuple[str, ...]
    cure: Callable[[dosvob.ImagePaths], None] = lambda paths: None


def failing_undo(home: Home, volume: Volume) -> tuple[str, ...]:
    """The disk fails when the undo is made durable."""
    undo = str(home.backups / ".dosvob" / f"{NAME}.undo")
    return ("strace", "-f", "-o", "/dev/null", "-P", undo, "-e", "trace=fsync", "--inject=fsync:error=EIO")


def damaged_state(home: Home, volume: Volume) -> tuple[str, ...]:
    """The state has decayed."""
    write_at(home.backups / ".dosvob" / f"{NAME}.state", 5000, b"decay")
    return ()


TROUBLES = [
    Trouble(failing_undo, (f"/.dosvob/{NAME}.undo: Input/output error: the disk may be failing",)),
    Trouble(damaged_state, (f"{NAME}.state is damaged", "Delete that file"), lambda paths: paths.state.unlink()),
]


def test_the_script_tells_its_trouble_with_one_volume_and_backs_up_the_other(
    home: Home, pytestconfig: pytest.Config
) -> None:
    volume, other = home.simulator.add_volume(NAME), home.simulator.add_volume("other")
    paths = dosvob.ImagePaths(home.backups, NAME)
    home.run()
    for number, trouble in enumerate(sampled(pytestconfig, TROUBLES, 2), start=1):
        for changed in (volume, other):
            write_at(changed.path, number * MIB, b"new")
        before = dosvob.identity_of(paths.image)
        wrapper = trouble.cause(home, volume)
        error = one_clear_error(home.run("--backups", str(home.backups), wrapper=wrapper, expect=1))
        assert all(words in error for words in (NAME, *trouble.told)), error
        assert dosvob.identity_of(paths.image) == before
        assert same(home.image("other"), other.path)
        assert home.simulator.alive() == []
        trouble.cure(paths)
        home.run()
        assert same(paths.image, volume.path)


def test_an_error_names_the_file_that_it_is_about() -> None:
    """The kernel tells of a descriptor only that something is wrong."""
    with contextlib.closing(dosvob.SparseFile(Path("/dev/full"), os.O_WRONLY)) as file:
        works: list[Callable[[], object]] = [
            lambda: file.write(b"x", 0),
            lambda: file.read(0, 1),
            lambda: file.set_length(1),
            file.sync,
        ]
        for work in works:
            with pytest.raises(OSError, match="/dev/full") as met:
                work()
            assert dosvob.explained(met.value, Path("backups")).startswith("/dev/full: ")


# -- an image that changed behind our back


def decay(image: Path, offset: int) -> None:
    """Flip a bit as a disk does: no time and no size tells of it."""
    status = image.stat()
    with image.open("rb") as file:
        file.seek(offset)
        byte = file.read(1)
    write_at(image, offset, bytes([byte[0] ^ 4]))
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("chunk", [0, 4, CHUNKS - 1])
def test_a_flipped_bit_is_found_within_eight_backups(disk: Disk, chunk: int) -> None:
    disk.back_up()
    write_at(disk.device, chunk * MIB, os.urandom(2 * PAGE))  # so that it is not a hole, where nothing can decay
    disk.back_up()
    decay(disk.paths.image, chunk * MIB + 5000)
    assert verify(disk.paths)[0] == [(chunk * MIB, (chunk + 1) * MIB)]
    found = [disk.back_up()[0].differing.ranges for _ in range(dosvob.ImageDigests.PARTS)]
    assert sorted(found) == [[]] * (dosvob.ImageDigests.PARTS - 1) + [[mebibyte(chunk)]]
    assert disk.image() == disk.device.read_bytes()


def test_decay_anywhere_in_a_large_image_is_found_within_eight_backups(tmp_path: Path) -> None:
    """Of more chunks than are in a part by more than one division."""
    chunks = 70
    disk = Disk(tmp_path)
    with disk.device.open("wb") as file:
        for chunk in range(chunks):
            file.seek(chunk * MIB)
            file.write(os.urandom(PAGE))
        file.truncate(chunks * MIB)
    disk.back_up()
    for chunk in range(chunks):
        decay(disk.paths.image, chunk * MIB + 100)
    found = [disk.back_up()[0].differing for _ in range(dosvob.ImageDigests.PARTS)]
    places = [start for differing in found for first, end in differing.ranges for start in range(first, end, MIB)]
    assert sorted(places) == [chunk * MIB for chunk in range(chunks)]  # each of them once
    assert same(disk.paths.image, disk.device)
    assert verify(disk.paths)[0] == []


def test_data_that_became_a_hole_is_told(disk: Disk) -> None:
    """Without being read, so at once."""
    write_at(disk.device, 6 * MIB, os.urandom(2 * MIB))
    disk.back_up()
    status = disk.paths.image.stat()
    with contextlib.closing(dosvob.SparseFile(disk.paths.image, os.O_RDWR)) as image:
        image.write_zeros(7 * MIB, MIB)
    os.utime(disk.paths.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verify(disk.paths)[0] == [mebibyte(7)]
    assert disk.back_up()[0].differing.ranges == [mebibyte(7)]
    assert disk.image() == disk.device.read_bytes()
    assert verify(disk.paths)[0] == []


def test_a_flipped_bit_is_found_at_once_when_all_is_read_again(disk: Disk) -> None:
    disk.back_up()
    write_at(disk.device, 3 * MIB, b"so that it is not a hole")
    disk.back_up()
    decay(disk.paths.image, 3 * MIB + 5)
    assert disk.back_up(reread=True)[0].differing.ranges == [mebibyte(3)]
    assert disk.image() == disk.device.read_bytes()


def test_the_script_finds_a_flipped_bit_names_it_and_mends_it(home: Home) -> None:
    volume = home.simulator.add_volume(NAME)
    write_at(volume.path, 700 * MIB + 5000, os.urandom(3 * MIB))
    home.run()
    decay(home.image(NAME), 701 * MIB + 9)
    done = home.run("verify", expect=1)
    assert f"bytes {701 * MIB} to {702 * MIB - 1}" in one_clear_error(done)
    done = home.run("--reread")
    assert f"bytes {701 * MIB} to {702 * MIB - 1}" in done.stderr
    assert same(home.image(NAME), volume.path)
    assert "sound" in home.run("verify").stdout


def test_the_script_finds_what_was_written_through_a_loop_mount(home: Home, tmp_path: Path) -> None:
    volume = home.simulator.add_volume(NAME)
    subprocess.run(["mkfs.ext4", "-q", "-F", volume.path], check=True)
    home.run()
    with mounted(home.image(NAME), tmp_path / "mounted") as there:
        (there / "written").write_bytes(os.urandom(MIB))
    assert not same(home.image(NAME), volume.path)
    assert "differs from its snapshot" in home.run("verify", expect=1).stderr
    done = home.run()
    assert "differs from what was recorded" in done.stderr
    assert same(home.image(NAME), volume.path)


@pytest.mark.parametrize("is_changed", [True, False], ids=["with changes", "without"])
def test_what_is_written_to_the_image_during_a_sync_is_found_by_the_next(disk: Disk, is_changed: bool) -> None:
    disk.back_up()
    if is_changed:
        write_at(disk.device, 3 * MIB, b"changed")
    place = rewritten(disk, 6)

    def connect(first: int, window: int) -> AgentProcess:
        write_at(disk.paths.image, place, b"by somebody")
        return AgentProcess(disk.device, first, window)

    back_up(disk.backups, NAME, disk.device, connect=connect)
    check_found_and_mended(disk, place)


def test_what_is_written_to_the_image_between_a_crash_and_its_recovery_is_put_back_where_the_undo_has_it(
    disk: Disk,
) -> None:
    """Elsewhere it is found as decay is: an image that was put back has its old time."""
    disk.back_up()
    write_at(disk.device, 3 * MIB, b"changed")
    before = disk.image()
    leave_written(disk.backups, NAME, disk.device)
    write_at(disk.paths.image, 3 * MIB + 5, b"by somebody")
    assert recover(disk.backups, NAME)
    assert disk.image() == before
    disk.check_settled()


def rewritten(disk: Disk, chunk: int) -> int:
    """Where that chunk is, with some data in the image that the next sync does not read again in its turn."""
    write_at(disk.device, chunk * MIB, os.urandom(PAGE))
    disk.back_up()
    state = dosvob.State.load(disk.paths.state)
    assert state is not None
    for _ in range((chunk * dosvob.ImageDigests.PARTS // CHUNKS - state.reread) % dosvob.ImageDigests.PARTS):
        disk.back_up()
    return chunk * MIB + PAGE


def check_found_and_mended(disk: Disk, place: int) -> None:
    """The very next sync finds that the image differs there, and mends it."""
    assert disk.image() != disk.device.read_bytes()
    assert disk.back_up()[0].differing.ranges == [mebibyte(place // MIB)]
    disk.check_settled()


def test_a_chunk_that_decayed_is_told_once_however_often_the_connection_breaks(disk: Disk) -> None:
    disk.back_up()
    decay(disk.paths.image, (CHUNKS - 1) * MIB)
    write_at(disk.device, (CHUNKS - 1) * MIB, os.urandom(PAGE))
    connect = cut_connection(disk.device, 300, connections=3, most=60)
    update = back_up(disk.backups, NAME, disk.device, reread=True, connect=connect)
    assert (update.differing.ranges, update.differing.size) == ([mebibyte(CHUNKS - 1)], MIB)
    disk.back_up()
    assert disk.image() == disk.device.read_bytes()
    assert verify(disk.paths)[0] == []


# -- what is said of the volume, or stands in its place


def test_a_volume_that_is_said_to_have_shrunk_leaves_all_as_it_is(disk: Disk) -> None:
    disk.back_up()
    before = all_identities(disk.backups)
    os.truncate(disk.device, (CHUNKS - 1) * MIB)
    with pytest.raises(dosvob.DosvobError, match=r"has shrunk to 9.* MiB, which no volume does"):
        disk.back_up()
    assert all_identities(disk.backups) == before
    os.truncate(disk.device, CHUNKS * MIB)
    disk.check_settled()


def test_the_script_leaves_a_link_alone_whose_disk_is_not_mounted(home: Home, tmp_path: Path) -> None:
    volume = home.simulator.add_volume(NAME)
    home.run()
    mounted, unmounted = tmp_path / "mounted", tmp_path / "unmounted"
    mounted.mkdir()
    image = home.image(NAME)
    image.rename(mounted / NAME)
    image.symlink_to(mounted / NAME)
    mounted.rename(unmounted)
    state = home.backups / ".dosvob" / f"{NAME}.state"
    before = state.read_bytes()
    write_at(volume.path, 5 * MIB, b"new")
    error = one_clear_error(home.run(expect=1))
    assert f"{NAME} leads to {mounted / NAME}, which is not there" in error
    assert image.readlink() == mounted / NAME
    assert state.read_bytes() == before
    assert not list(home.backups.glob(f"{NAME}.*"))
    unmounted.rename(mounted)
    assert not home.run().stderr
    assert image.is_symlink()
    assert same(mounted / NAME, volume.path)


@pytest.mark.parametrize("patches", [0, 3, None])
def test_an_undo_is_kept_while_the_disk_that_its_image_is_linked_to_is_not_mounted(
    disk: Disk, patches: int | None
) -> None:
    mounted, unmounted = disk.backups / "mounted", disk.backups / "unmounted"
    mounted.mkdir()
    disk.paths.image.rename(mounted / NAME)
    disk.paths.image.symlink_to(mounted / NAME)
    leave_written(disk.backups, NAME, disk.device, patches)
    kept = disk.paths.undo.read_bytes()
    mounted.rename(unmounted)
    assert recover_all(disk.backups) == {NAME}
    assert disk.paths.undo.read_bytes() == kept
    unmounted.rename(mounted)
    assert recover(disk.backups, NAME)
    assert disk.image() == disk.old
    disk.check_settled()


# -- who may read it, and where it may be


def test_images_and_states_are_for_their_owner_only(home: Home) -> None:
    volume = home.simulator.add_volume(NAME)
    write_at(volume.path, 0, b"secret")
    home.run(wrapper=("sh", "-c", 'umask 0; exec "$@"', "sh"))
    write_at(volume.path, 0, b"SECRET")
    trace = home.directory / "trace"
    paths = dosvob.ImagePaths(home.backups, NAME)
    wrapper = (*strace(home.backups, NAME, "-o", str(trace), "--inject=rename:signal=KILL:when=1"),)
    wrapper = (*wrapper, "sh", "-c", 'umask 0; exec "$@"', "sh")
    home.run("--backups", str(home.backups), wrapper=wrapper, expect=None, constants=IN_MAIN_THREAD)
    assert paths.spool.exists()
    for path in (paths.image, paths.state, paths.new_state, paths.spool, paths.undo):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    home.run()
    assert stat.S_IMODE(paths.image.stat().st_mode) == 0o600
    assert stat.S_IMODE(paths.state.stat().st_mode) == 0o600
    assert {stat.S_IMODE(version.stat().st_mode) for version in paths.versions.iterdir()} == {0o600}
    assert stat.S_IMODE(paths.versions.stat().st_mode) == 0o700


HOSTILE = (
    *("", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "a\n", "-", "-rf", "Data", "dätä", "a" * 65, "a" * 300),
    *("data.partial", "data.state", ".dosvob", ".dosvob/lock", "*", "\x1b[2J", "a b", "data\u202e"),
)


@pytest.mark.parametrize(
    "name",
    [*(name for name in HOSTILE if name != "a/b"), "a/b/c", "/b", "a/", "../b", "a/..", "A/b", ".dosvob/b", "a//b"],
    ids=ascii,
)
def test_a_hostile_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(dosvob.DosvobError, match="not a name that a volume can have"):
        dosvob.ImagePaths(tmp_path, name)


def test_names_that_only_look_dangerous_are_apart_from_each_other(tmp_path: Path) -> None:
    names = ("lock", "data", "data-partial", "state", "spool", "a", "a" * 64)
    files = [path for name in names for path in vars(dosvob.ImagePaths(tmp_path, name)).values()]
    found = [path for path in files if isinstance(path, Path) and path not in (tmp_path, tmp_path / ".dosvob")]
    assert len(set(found)) == len(found) == 7 * len(names)
    assert tmp_path / ".dosvob" / "lock" not in found


def test_the_script_does_not_leave_the_directory_for_a_hostile_name(home: Home) -> None:
    good = home.simulator.add_volume("good")
    home.simulator.add_volume("lock")
    write_at(good.path, 0, b"good")
    for number, name in enumerate(HOSTILE):
        home.simulator.add_volume(f"hostile-{number}").name = name
    before = outside(home)
    done = home.run(expect=1)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("is not a name that a volume can have") == len(HOSTILE)
    assert "\x1b" not in done.stdout + done.stderr
    assert outside(home) == before
    assert {path.name for path in home.backups.iterdir()} == {"good", "lock", ".dosvob"}
    assert same(home.image("good"), good.path)


def outside(home: Home) -> set[Path]:
    """What there is beside the backups directory."""
    return {*home.directory.parent.iterdir(), *home.directory.iterdir()} - {home.backups}


def test_space_is_made_of_the_end_of_a_first_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that has begun anew: what it has not come to yet is the end."""
    device, chunks = tmp_path / "device", 2000  # of which a window is but a part
    device.touch()
    for place in (0, chunks - 2):
        write_at(device, place * MIB, os.urandom(2 * MIB))
    paths = dosvob.ImagePaths(tmp_path, NAME)
    paths.metadata.mkdir()
    subprocess.run(["cp", "--sparse=always", device, paths.partial], check=True)
    monkeypatch.setattr(dosvob.Update, "SPACE_FOR_OTHERS", MIB)
    with contextlib.closing(dosvob.Update(paths, snapshot_of(device, NAME), dosvob.Keep(), print)) as update:
        update.give_up_space()
    assert data_places(paths.partial) == {0, 1, chunks - 2}
    with device.open("rb") as file:
        assert file.read(2 * MIB) == paths.partial.read_bytes()[: 2 * MIB]
    back_up(tmp_path, NAME, device)
    assert same(paths.image, device)


def test_the_disk_writes_while_a_first_sync_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would all be waited for at the end."""
    device, size = tmp_path / "device", 12 * MIB
    device.write_bytes(os.urandom(size))
    told: list[int] = []  # the length of the file, each time
    monkeypatch.setattr(dosvob.Update, "WRITE_OUT", 3 * MIB)
    monkeypatch.setattr(dosvob.SparseFile, "write_out", lambda file: told.append(os.fstat(file.fd).st_blocks * 512))
    back_up(tmp_path, NAME, device)
    assert same(tmp_path / NAME, device)
    assert [round(length / MIB) for length in told] == [4, 8, 12]
