"""Storage as people have it at home: what it does not keep, cannot do, or says wrongly. The image survives.

Real file systems where Debian has them; the answers of others are put into the mouth of this one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, Home, Tmpfs, same, wait_for, write_at, write_out
from crash_support import (
    AgentProcess,
    leave_spool,
    leave_written,
    power_cut_at,
    recover_all,
    run_driver,
    strace,
    sync_device,
    verify,
)
from simulator import Volume
from simulator.storage import LoopDevice, create_sparse, mounted
from storage_support import Storage, cannot_read, run, with_error
from test_disk import NAME, Disk, one_clear_error
from versions_support import Lineage

import dosvob


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A backup of an older state of the volume."""
    made = Disk(tmp_path)
    made.begin()
    return made


def creations(home: Home) -> list[str]:
    """The paths of the calls that created something in the account."""
    return [request.path for request in home.simulator.requests if request.method == "POST"]


# -- an image that somebody reads


def test_an_image_that_is_mounted_is_left_for_later(home: Home, tmp_path: Path) -> None:
    volume, other = home.simulator.add_volume(NAME), home.simulator.add_volume("other")
    subprocess.run(["mkfs.ext4", "-q", volume.path], check=True)
    with mounted(volume.path, tmp_path / "volume") as directory:
        (directory / "file").write_bytes(b"old" * MIB)
    home.run()
    with mounted(home.image(NAME), tmp_path / "look", "ro") as look:
        with mounted(volume.path, tmp_path / "volume") as directory:
            (directory / "file").write_bytes(b"new" * MIB)
        write_at(other.path, 0, b"new")
        before = home.image(NAME).stat()
        posted = len(creations(home))
        error = one_clear_error(home.run(expect=1))
        assert f"{NAME}: " in error
        assert f"mounted on {look}" in error
        assert "/dev/loop" in error
        assert home.image(NAME).stat() == before
        assert same(home.image("other"), other.path)
        made = creations(home)[posted:]
        assert sum("snapshots" in path for path in made) == 1, made  # the other's
        posted = len(creations(home))
        assert "is in use by /dev/loop" in home.run(NAME, expect=1).stderr
        assert creations(home)[posted:] == []  # nothing to pay for
        assert "is in use by /dev/loop" in one_clear_error(home.run("--dry-run", expect=1))
        os.posix_fadvise((fd := os.open(look / "file", os.O_RDONLY)), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, MIB, 0) == (b"old" * MIB)[:MIB]
        os.close(fd)
    home.run()
    assert same(home.image(NAME), volume.path)


def test_an_image_that_comes_to_be_read_during_a_sync_is_left_for_later(disk: Disk) -> None:
    """What was fetched is not fetched again."""
    with contextlib.ExitStack() as devices, pytest.MonkeyPatch.context() as patches:
        converse = dosvob.converse

        def mount_meanwhile(*arguments: Any) -> int:
            received = converse(*arguments)
            devices.enter_context(contextlib.closing(LoopDevice(disk.paths.image)))
            return received

        patches.setattr("dosvob.converse", mount_meanwhile)
        with pytest.raises(dosvob.DosvobError, match=r"is in use by /dev/loop\d+"):
            disk.back_up()
        assert disk.image() == disk.old
        assert not disk.paths.undo.exists()
        assert disk.paths.spool.exists()
    wait_for(lambda: not dosvob.LoopDevices.over(disk.paths.image))  # while another test looks at the device, it stays
    disk.check_settled()


@pytest.mark.parametrize("can_be_asked", [True, False])
def test_an_image_that_is_read_is_not_put_back(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, can_be_asked: bool
) -> None:
    """Also if it is read by another name, where the loop device tells which file it has."""
    leave_written(disk.backups, NAME, disk.device)
    before, path = disk.image(), disk.paths.image
    if can_be_asked:
        os.link(path, path := tmp_path / "another name")
    else:  # as for a user who is not in the group `disk`
        monkeypatch.setattr(dosvob.LoopDevices, "GET_STATUS", 0)
    with contextlib.closing(LoopDevice(path)):
        assert recover_all(disk.backups) == {NAME}
        assert disk.image() == before
        assert disk.paths.undo.exists()
    wait_for(lambda: not dosvob.LoopDevices.over(disk.paths.image))  # while another test looks at the device, it stays
    assert recover_all(disk.backups) == set()
    assert disk.image() == disk.old


@pytest.mark.parametrize("in_container", [False, True])
@pytest.mark.parametrize("options", [(), ("--offset", str(MIB)), ("--offset", str(MIB), "--sizelimit", str(MIB))])
def test_an_image_that_is_read_by_its_path_on_the_host_is_seen(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], *, in_container: bool
) -> None:
    """Where no device can be asked; in a container the host's path of it is not there, either."""
    monkeypatch.setattr(dosvob.LoopDevices, "GET_STATUS", 0)
    elsewhere = disk.backups.parent / "else where"
    longer, other = elsewhere / "longer" / NAME, elsewhere / "other"
    with contextlib.ExitStack() as stack:
        attach = ["losetup", "--find", "--show", *options, str(disk.paths.image)]
        device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
        stack.callback(run, "losetup", "--detach", device)
        elsewhere.mkdir()
        run("mount", "--bind", disk.backups, elsewhere)
        stack.callback(run, "umount", elsewhere)
        longer.parent.mkdir()
        longer.touch()
        os.truncate(longer, 3 * disk.paths.image.stat().st_size)
        shutil.copyfile(elsewhere / NAME, other)
        if in_container:
            run("mount", "-t", "tmpfs", "tmpfs", disk.backups)
            stack.callback(run, "umount", disk.backups)
        assert dosvob.LoopDevices.over(elsewhere / NAME) == [device]
        assert dosvob.LoopDevices.over(other) == []
        if not (in_container and "--sizelimit" in options):
            assert dosvob.LoopDevices.over(longer) == []


# -- times that cannot be set: an image of somebody else, or a CIFS share


def test_an_image_whose_time_cannot_be_set(home: Home) -> None:
    """A first backup, later ones, and what is read of the image: what the last write left is its time."""
    volume, wrapper = home.simulator.add_volume(NAME), with_error("utimensat", "EPERM")
    for number in range(3):
        write_at(volume.path, number * MIB, os.urandom(4096))
        home.run(wrapper=wrapper)
        assert same(home.image(NAME), volume.path)
        paths = dosvob.ImagePaths(home.backups, NAME)
        state = dosvob.State.load(paths.state)
        assert state is not None
        assert state.identity == dosvob.identity_of(paths.image)
    assert len(dosvob.Versions(paths).all()) == 2
    home.run("verify", wrapper=wrapper)


def test_an_image_whose_time_cannot_be_set_is_put_back_and_compared(home: Home) -> None:
    lineage = Lineage(home.directory)
    lineage.go_on(2)
    before = lineage.paths.image.read_bytes()
    lineage.change()
    with power_cut_at(dosvob.Update, "_complete_state"):
        lineage.back_up()
    assert lineage.paths.image.read_bytes() != before
    assert "was taken back" in home.run("verify", wrapper=with_error("utimensat", "EPERM")).stdout
    assert lineage.paths.image.read_bytes() == before
    state = dosvob.State.load(lineage.paths.state)
    assert state is not None
    assert state.identity != dosvob.identity_of(lineage.paths.image)  # so the next sync reads all of it
    lineage.go_on()
    lineage.check()


def test_another_error_of_a_time_is_told(home: Home) -> None:
    home.simulator.add_volume(NAME)
    assert "Input/output error" in one_clear_error(home.run(wrapper=with_error("utimensat", "EIO"), expect=1))


# -- what is mere advice


def test_a_kernel_that_takes_no_advice(home: Home) -> None:
    volume = home.simulator.add_volume(NAME)
    wrapper = with_error("fadvise64", "ENOSYS")
    for content in (b"one", b"two"):
        write_at(volume.path, MIB, content)
        home.run(wrapper=wrapper)
        assert same(home.image(NAME), volume.path)
    home.run("verify", wrapper=wrapper)


# -- holes


def telling_a_hole(patches: pytest.MonkeyPatch, path: Path, start: int, end: int) -> None:
    """Have SEEK_DATA tell a hole over data of a file, as some FUSE file systems and ZFS have done."""
    lseek, inode = os.lseek, path.stat().st_ino

    def lie(fd: int, offset: int, whence: int) -> int:
        found = lseek(fd, offset, whence)
        if whence == os.SEEK_DATA and os.fstat(fd).st_ino == inode and start <= found < end:
            return lseek(fd, end, whence)
        return found

    patches.setattr(os, "lseek", lie)


def test_a_hole_over_data_that_is_not_there_is_no_damage(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk.device.write_bytes(os.urandom(10 * MIB))
    disk.back_up()
    telling_a_hole(monkeypatch, disk.paths.image, 2 * MIB, 4 * MIB)
    assert verify(disk.paths)[0] == []
    with contextlib.closing(dosvob.Chain(disk.paths)) as chain:
        final, damaged = chain.restore(0, tmp_path / "restored", lambda count: None)
    assert (final.name, damaged.ranges) == ("restored", [])
    assert final.read_bytes() == disk.device.read_bytes()
    write_at(disk.device, 2 * MIB, bytes(2 * MIB))
    update, warnings = disk.back_up()
    assert (update.differing.ranges, warnings) == ([], [])
    monkeypatch.undo()
    assert disk.image() == disk.device.read_bytes()


@pytest.mark.parametrize("what", ["no state", "partial"])
def test_a_hole_over_data_of_which_nothing_is_recorded_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    disk = Disk(tmp_path)
    with dosvob.Home(disk.backups).locked():
        image = disk.paths.image if what == "no state" else disk.paths.partial
        image.write_bytes(os.urandom(8 * MIB))
    disk.device.write_bytes(bytes(8 * MIB))
    telling_a_hole(monkeypatch, image, 2 * MIB, 4 * MIB)
    disk.back_up()
    monkeypatch.undo()
    assert disk.image() == bytes(8 * MIB)


def test_a_first_backup_does_not_read_what_it_has_just_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SEEK_DATA says that all is data."""
    disk, pread, read = Disk(tmp_path), os.pread, []

    def watched(fd: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(disk.paths.partial):
            read.append(offset)
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "lseek", lambda fd, offset, whence: offset)
    monkeypatch.setattr(os, "pread", watched)
    disk.back_up()
    assert disk.image() == disk.old
    assert read == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_where_holes_cannot_be_asked_for_all_is_data(disk: Disk, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "lseek", refuse)
    disk.back_up()
    assert disk.image() == disk.new


# -- what a file system cannot do


@pytest.mark.parametrize("name", ["EOPNOTSUPP", "EINVAL", "EPERM", "ENODEV", "EIO"])
def test_zeros_are_written_whatever_punching_a_hole_answers(disk: Disk, name: str) -> None:
    trace = strace(disk.backups, NAME, "-o", "/dev/null", f"--inject=fallocate:error={name}")
    done = run_driver("sync", disk.backups, NAME, disk.device, wrapper=trace)
    assert done.returncode == 0, done.stderr
    assert disk.image() == disk.new


@pytest.mark.parametrize("name", ["EINVAL", "EOPNOTSUPP", "EBADF"])
def test_a_directory_that_refuses_fsync_is_no_reason_to_refuse_to_work(home: Home, name: str, tmp_path: Path) -> None:
    volume = home.simulator.add_volume(NAME)
    write_at(volume.path, 5 * MIB, b"first")
    home.backups.mkdir()
    metadata = home.backups / ".dosvob"
    directories = (home.directory, home.backups, metadata, metadata / f"{NAME}.versions")
    places = [word for path in directories for word in ("-P", str(path))]
    refusing = ("strace", "-f", "--seccomp-bpf", "-qq", "-o", str(tmp_path / "trace"), "-e", "trace=fsync", *places)
    refusing += (f"--inject=fsync:error={name}",)
    home.run(wrapper=refusing)
    write_at(volume.path, 5 * MIB, b"later")
    home.run(wrapper=refusing)
    assert same(home.image(NAME), volume.path)
    assert list((metadata / f"{NAME}.versions").iterdir())
    home.run("restore", NAME, "copy.img", wrapper=refusing)
    assert same(home.directory / "copy.img", volume.path)
    assert "INJECTED" in (tmp_path / "trace").read_text()


# -- whether an image was touched


@pytest.mark.parametrize("storage", ["sshfs", "mergerfs", "exfat-fuse", "ntfs-3g", "gocryptfs"], indirect=True)
def test_a_remount_does_not_make_another_file_of_an_image(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a first backup and after a later one; nor is a spool dropped."""
    disk = Disk(tmp_path, storage.path / "backups")
    disk.device.write_bytes(os.urandom(8 * MIB))
    for content in (os.urandom(8 * MIB), os.urandom(8 * MIB), os.urandom(8 * MIB)):
        disk.back_up()
        touched_elsewhere(storage)
        state = dosvob.State.load(disk.paths.state)
        assert state is not None
        assert state.identity == dosvob.identity_of(disk.paths.image)
        disk.device.write_bytes(content)
    leave_spool(disk.backups, NAME, disk.device)
    touched_elsewhere(storage)
    found: list[int] = []
    opened = dosvob.Spool.open

    def watched(*arguments: Any) -> dosvob.Spool:
        spool = opened(*arguments)
        found.extend(spool.chunks())
        return spool

    monkeypatch.setattr(dosvob.Spool, "open", watched)
    disk.back_up()
    assert len(found) == 8


@pytest.mark.parametrize(
    "kind", ["ext4", "xfs", "btrfs", "zfs", "nfs4", "fuse.sshfs", "fuseblk", "vfat", "exfat", "cifs"]
)
def test_an_inode_counts_where_it_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """By the type alone: the kernels that tests run on often have no driver for the last ones."""
    monkeypatch.setattr(dosvob.Mount, "of", lambda path: dosvob.Mount("0:0", "/", kind, "/dev/sdb1"))
    stays = kind in ("ext4", "xfs", "btrfs", "zfs", "nfs4")
    assert dosvob.identity_of(tmp_path)["inode"] == (tmp_path.stat().st_ino if stays else 0)


def touched_elsewhere(storage: Storage) -> None:
    """Mount it again, and ask for its files in another order than they were made."""
    storage.unmount()
    storage.mount()
    for path in sorted(storage.path.rglob("*"), reverse=True):
        path.stat()


def test_the_first_image_has_a_time_that_every_file_system_keeps(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.back_up()
    assert disk.paths.image.stat().st_mtime_ns % 10**9 == 0


def test_an_inode_tells_one_image_from_another_where_it_stays(disk: Disk, tmp_path: Path) -> None:
    """Another file of the same length and time is read as a whole."""
    shutil.copy2(disk.paths.image, tmp_path / "copy")
    write_at(tmp_path / "copy", 5 * MIB, b"another")
    status = disk.paths.image.stat()
    os.utime(tmp_path / "copy", ns=(status.st_mtime_ns, status.st_mtime_ns))
    (tmp_path / "copy").rename(disk.paths.image)
    disk.device.write_bytes(disk.old)
    assert disk.back_up()[0].differing.ranges == [(5 * MIB, 6 * MIB)]


# -- a disk that is full when it does not say so


@pytest.fixture
def limited(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[int], Path]]:
    """A file system that says it has free space and has none: by a quota of Btrfs, or by what ext4 holds back."""
    made = Storage(request.param, tmp_path / "storage", size=512 * MIB)
    backups = made.path / "home"
    if request.param == "btrfs":
        run("btrfs", "subvolume", "create", backups)
        run("btrfs", "quota", "enable", made.path)
    else:
        backups.mkdir()

    def leave_free(size: int) -> Path:
        """Only so much can be written from now on."""
        write_out(made.path)
        if request.param == "btrfs":
            run("btrfs", "qgroup", "limit", used_in(backups) + size, backups)
        else:
            filling = made.path / "filling"
            filling.touch()
            os.truncate(filling, 0)
            status = os.statvfs(made.path)
            run("fallocate", "-l", status.f_bfree * status.f_frsize - size - 24 * MIB, filling)
            with filling.open("ab") as file, contextlib.suppress(OSError):
                while file.write(bytes(MIB)):
                    file.flush()
                    os.fsync(file.fileno())
            os.truncate(filling, filling.stat().st_size - size)
        return backups

    yield leave_free
    made.close()


def used_in(path: Path) -> int:
    """The bytes that a Btrfs subvolume refers to."""
    told = subprocess.run(["btrfs", "qgroup", "show", "--raw", "-F", path], capture_output=True, text=True, check=True)
    return int(told.stdout.splitlines()[-1].split()[1])


@pytest.mark.parametrize("limited", ["btrfs", "ext4"], indirect=True)
def test_a_disk_that_turns_out_to_be_full_while_the_image_is_written_is_taken_back(
    tmp_path: Path, limited: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With root's eyes too, who sees blocks free that nobody can write."""
    disk = Disk(tmp_path, limited(256 * MIB) / "backups")
    disk.device.write_bytes(os.urandom(MIB) + bytes(39 * MIB))
    disk.back_up()
    old = disk.image()
    disk.device.write_bytes(os.urandom(40 * MIB))
    write_image, reached = dosvob.Update._write_image, []

    def without_space(*arguments: Any) -> Any:
        reached.append(limited(8 * MIB))
        return write_image(*arguments)

    with monkeypatch.context() as patches:
        patches.setattr(dosvob.SparseFile, "free_space", lambda _: 1 << 40)
        patches.setattr(dosvob.Update, "_write_image", without_space)
        with pytest.raises(OSError, match=r"No space left|Disk quota exceeded") as full:
            disk.back_up()
    assert reached
    assert dosvob.is_disk_full(full.value)
    assert disk.image() == old
    assert not disk.paths.undo.exists()
    assert not disk.paths.spool.exists()
    limited(256 * MIB)
    disk.check_settled()


def test_what_is_over_in_keep_goes_before_a_run_fetches(home: Home, tmpfs: Tmpfs) -> None:
    """Of all volumes, also those that come later or are not backed up any more: the first one may need that space."""
    first, last = home.simulator.add_volume("a-first"), home.simulator.add_volume("z-last")
    backups = ("--backups", str(tmpfs.path))
    home.configure(keep={"last": 3})
    home.run(*backups)
    for _ in range(3):
        write_at(last.path, 0, os.urandom(10 * MIB))
        home.run(*backups, "z-last")
    write_at(first.path, 0, os.urandom(8 * MIB))
    home.configure(keep={}, include=["a-first"])
    tmpfs.leave_free(2 * MIB)
    home.run(*backups)
    assert same(tmpfs.path / "a-first", first.path)
    assert not list((tmpfs.path / ".dosvob").glob("*.versions/*"))


# -- a restore


@pytest.mark.parametrize("is_stubborn", [False, True])
def test_a_restored_file_is_what_is_checked_and_not_its_source(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stubborn: bool
) -> None:
    """A clone with stale bytes has been seen with ZFS; what cannot be mended is named."""
    disk.device.write_bytes(os.urandom(10 * MIB))
    disk.back_up()

    def clone(fd: int, request: int, source: int) -> int:
        assert request == 0x40049409
        content = bytearray(os.pread(source, 10 * MIB, 0))
        content[5 * MIB : 5 * MIB + 4096] = b"S" * 4096
        return os.pwrite(fd, content, 0)

    def write(file: dosvob.SparseFile, data: bytes | memoryview, offset: int) -> None:
        if not is_stubborn:
            os.pwrite(file.fd, data, offset)

    monkeypatch.setattr("fcntl.ioctl", clone)
    monkeypatch.setattr(dosvob.SparseFile, "write", write)
    with contextlib.closing(dosvob.Chain(disk.paths)) as chain:
        final, damaged = chain.restore(0, tmp_path / "restored", lambda count: None)
    assert (final.name, damaged.ranges) == (
        ("restored.damaged", [(5 * MIB, 6 * MIB)]) if is_stubborn else ("restored", [])
    )
    assert (final.read_bytes() == disk.device.read_bytes()) is not is_stubborn


@pytest.mark.parametrize("where", ["over data", "over what was to be zeros"])
def test_a_hole_that_a_clone_tells_is_a_hint(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """What contradicts it is read; and what was written there, in any case."""
    write_at(disk.device, 0, bytes(10 * MIB))
    disk.back_up()
    older = disk.device.read_bytes()
    disk.device.write_bytes(os.urandom(10 * MIB))
    disk.back_up()
    expected = disk.device.read_bytes() if where == "over data" else older
    lseek = os.lseek

    def lie(fd: int, offset: int, whence: int) -> int:
        is_result = os.readlink(f"/proc/self/fd/{fd}").endswith("restored.partial")
        if is_result and whence == os.SEEK_DATA and 2 * MIB <= offset < 4 * MIB:
            return lseek(fd, 4 * MIB, whence)
        return lseek(fd, offset, whence)

    def write_zeros(file: dosvob.SparseFile, offset: int, length: int) -> None:
        """It is not done."""

    def clone(fd: int, request: int, source: int) -> int:
        assert request == 0x40049409
        return os.pwrite(fd, os.pread(source, 10 * MIB, 0), 0)

    monkeypatch.setattr("fcntl.ioctl", clone)
    monkeypatch.setattr(os, "lseek", lie)
    monkeypatch.setattr(dosvob.SparseFile, "write_zeros", write_zeros)
    with contextlib.closing(dosvob.Chain(disk.paths)) as chain:
        final, damaged = chain.restore(int(where != "over data"), tmp_path / "restored", lambda count: None)
    assert (final.read_bytes() == expected) is (not damaged.ranges)
    assert damaged.ranges == ([] if where == "over data" else [(0, 10 * MIB)])


# -- what cannot be changed, or read


@contextlib.contextmanager
def squashed(home: Home, tmp_path: Path) -> Iterator[Path]:
    """A read-only copy of backups/."""
    if shutil.which("mksquashfs") is None:
        pytest.skip("there is no mksquashfs, which is in the package squashfs-tools")
    run("mksquashfs", home.backups, tmp_path / "copy.squashfs", "-quiet", "-no-progress")
    (place := tmp_path / "copy").mkdir()
    run("mount", "-o", "loop,ro", tmp_path / "copy.squashfs", place)
    try:
        yield place
    finally:
        run("umount", place)


def test_a_read_only_copy_is_verified_and_a_damaged_undo_costs_its_own_chunk(home: Home, tmp_path: Path) -> None:
    volume, other = home.simulator.add_volume(NAME), home.simulator.add_volume("other")
    write_at(volume.path, 0, os.urandom(6 * MIB))
    write_at(other.path, 0, os.urandom(MIB))
    home.run()
    old = volume.path.read_bytes()[: 6 * MIB]
    with squashed(home, tmp_path) as copy:
        assert f"{NAME}: sound" in home.run("verify", "--backups", str(copy)).stdout
    (tmp_path / "copy.squashfs").unlink()
    (tmp_path / "copy").rmdir()
    paths, device = dosvob.ImagePaths(home.backups, NAME), tmp_path / "device"
    shutil.copyfile(volume.path, device)
    write_at(device, 0, os.urandom(6 * MIB))
    leave_written_by(paths, device)
    write_at(paths.undo, paths.undo.stat().st_size // 2, b"decayed")
    with squashed(home, tmp_path) as copy:
        done = home.run("verify", "--backups", str(copy), expect=1)
        (damage,) = [line for line in done.stderr.splitlines() if "error: " in line]
        assert f"{NAME}: differs from its snapshot in bytes" in damage
        start, end = map(int, damage.split("bytes ")[1].split(":")[0].split(" to "))
        assert end - start == MIB - 1
        assert "other: sound" in done.stdout
        home.run("restore", NAME, "copy.img", "--backups", str(copy), expect=1)
        brought = (home.directory / "copy.img.damaged").read_bytes()[: 6 * MIB]
        assert brought[:start] + brought[end + 1 :] == old[:start] + old[end + 1 :]


def leave_written_by(paths: dosvob.ImagePaths, device: Path) -> None:
    """Have the image written to, as if the power went before the commit."""
    state = dosvob.State.load(paths.state)
    assert state is not None
    snapshot = dosvob.Snapshot(state.snapshot.volume_id, NAME, "fra1", device.stat().st_size, "2030-01-01T00:00:00Z")
    with contextlib.closing(dosvob.Update(paths, snapshot, dosvob.Keep(), print)) as update:
        connect: Any = lambda first, window: AgentProcess(device, first, window)  # noqa: E731
        sync_device(connect, update, print)
        with power_cut_at(dosvob.Update, "_complete_state"):
            update.finish()
    assert paths.undo.exists()


def backed_up_twice(home: Home) -> list[Volume]:
    """Two volumes, this one and another, each with an image and a version."""
    volumes = [home.simulator.add_volume(each) for each in (NAME, "other")]
    for _ in range(2):
        for volume in volumes:
            write_at(volume.path, 0, os.urandom(MIB))
        home.run()
    return volumes


@pytest.mark.parametrize("name", ["EIO", "EBADMSG", "EUCLEAN"])
def test_a_state_that_the_disk_cannot_read_is_damaged(home: Home, name: str) -> None:
    lineage = Lineage(home.directory)
    lineage.go_on()
    state = lineage.paths.state
    for command in ("list", "health", "verify"):
        done = home.run(command, wrapper=cannot_read(state, name), expect=0 if command == "list" else 1)
        told = done.stdout + done.stderr
        assert f"backups/.dosvob/{NAME}.state is damaged" in told, command
        assert "Traceback" not in told


def test_a_state_that_the_disk_cannot_read_is_no_matter_of_other_volumes(home: Home) -> None:
    volumes = backed_up_twice(home)
    state = dosvob.ImagePaths(home.backups, NAME).state
    failing = cannot_read(state, "EIO")
    for command in ("list", "health", "verify"):
        done = home.run(command, wrapper=failing, expect=0 if command == "list" else 1)
        told = done.stdout + done.stderr
        assert f"{NAME}.state is damaged" in told, command
        assert "other" in told
        assert "Traceback" not in told
    home.run("restore", NAME, "copy.img", wrapper=failing)
    assert same(home.directory / "copy.img", volumes[0].path)
    home.run("restore", "other", "other.img", wrapper=failing)
    write_at(volumes[1].path, 5 * MIB, b"new")
    assert str(state.relative_to(home.directory)) in one_clear_error(home.run(wrapper=failing, expect=1))
    assert same(home.image("other"), volumes[1].path)


@pytest.mark.parametrize("error", ["ENOTCONN", "EACCES"])
def test_an_image_that_a_link_leads_to_in_vain_is_no_matter_of_other_volumes(home: Home, error: str) -> None:
    """Into a mount that broke down, or where this user may not look."""
    volumes = backed_up_twice(home)
    write_at(volumes[1].path, 5 * MIB, b"new")
    failing = cannot_read(home.image(NAME), error, "%file")
    assert f"backups/{NAME}" in one_clear_error(home.run(wrapper=failing, expect=1))
    assert same(home.image("other"), volumes[1].path)


def test_what_the_disk_cannot_even_find_is_no_matter_of_other_volumes(home: Home) -> None:
    """Its inode is damaged, so nobody can tell what it is. What does not need it can be restored all the same."""
    volumes = backed_up_twice(home)
    paths = dosvob.ImagePaths(home.backups, NAME)
    newest = dosvob.Versions(paths).all()[0].path

    def files() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_ino) for path in home.backups.rglob(f"{NAME}*"))

    for number, lost in enumerate((paths.image, paths.state, newest, paths.versions)):
        failing, place, there = cannot_read(lost, "EUCLEAN", "%file"), str(lost.relative_to(home.directory)), files()
        for command in ("list", "health", "verify", *(["--dry-run"] if lost == paths.image else [])):
            done = home.run(command, wrapper=failing, expect=0 if command == "list" else 1)
            told = done.stdout + done.stderr
            assert "other" in told, (command, lost)
            assert "Traceback" not in told
            assert place in told or "damaged\n" in told, (command, lost)
        home.run("restore", "other", f"other-{number}", wrapper=failing)
        home.run("restore", NAME, f"this-{number}", wrapper=failing, expect=int(lost == paths.image))
        for volume, copy in zip(volumes, ("this", "other"), strict=True):
            assert lost == paths.image or same(home.directory / f"{copy}-{number}", volume.path), lost
        if lost in (paths.image, newest):
            write_at(volumes[1].path, 5 * MIB, b"new" + bytes([number]))
            done = home.run(wrapper=failing, expect=int(lost == paths.image))
            assert lost == newest or f"{place}: " in one_clear_error(done)
            assert same(home.image("other"), volumes[1].path)
        if lost in (paths.image, paths.versions):
            done = home.run("restore", NAME, "old", "--at", "2020-01-01", wrapper=failing, expect=1)
            assert place in one_clear_error(done)
            assert files() == there


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        ("EIO", "openat"),
        ("EIO", "%file"),
        ("EIO", "read,pread64"),
        *((f"EIO:when={number}", "pread64") for number in range(1, 9)),
    ],
)
def test_an_undo_that_cannot_be_read_now_is_put_back_when_it_can(home: Home, error: str, calls: str) -> None:
    lineage = Lineage(home.directory)
    lineage.go_on(2)
    lineage.change()
    with power_cut_at(dosvob.Update, "_complete_state"):
        lineage.back_up()
    failing = cannot_read(lineage.paths.undo, error, calls)
    assert "must still be taken back" in home.run("health", expect=1).stderr
    done = home.run("verify", wrapper=failing, expect=None)
    if done.returncode:
        assert "an interrupted backup: backups/.dosvob/data.undo" in done.stderr
        assert "must still be taken back" in home.run("health", expect=1).stderr
        assert "was taken back" in home.run("verify").stdout
    else:  # what was needed was read at the second attempt
        assert error in ("EIO:when=2", "EIO:when=3")
        assert "was taken back" in done.stdout
    lineage.check()


def test_an_undo_that_was_not_complete_makes_no_copy_of_the_image_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the home the image's inode does not tell that the crash came before it was changed."""
    lineage, complete, undo = Lineage(tmp_path), dosvob.PatchFile.complete, b""
    lineage.go_on(2)
    shutil.copytree(lineage.backups, tmp_path / "copy")

    def noted(file: dosvob.PatchFile) -> None:
        nonlocal undo
        undo = file.path.read_bytes()
        complete(file)

    monkeypatch.setattr(dosvob.PatchFile, "complete", noted)
    expected = lineage.paths.image.read_bytes()
    write_at(lineage.device, 0, os.urandom(4096))
    lineage.pass_time()
    lineage.back_up()
    paths = dosvob.ImagePaths(tmp_path / "copy", NAME)
    paths.undo.write_bytes(undo)
    with contextlib.closing(dosvob.Chain(paths)) as chain:
        final, damaged = chain.restore(0, tmp_path / "restored", lambda count: None)
    assert (final.name, damaged.ranges) == ("restored", [])
    assert final.read_bytes() == expected


@pytest.mark.parametrize("error", ["EIO", "EIO:when=1"])
def test_an_undo_waits_for_a_state_that_cannot_be_read_now(home: Home, error: str) -> None:
    """Only that tells whether the image is the new one, and the undo its first version."""
    lineage = Lineage(home.directory)
    lineage.go_on(2)
    lineage.change()
    lineage.pass_time()
    with power_cut_at(dosvob.Undo, "settle"):
        lineage.back_up()
    failing = cannot_read(lineage.paths.state, error, "read")
    assert "data.state is damaged" in home.run("verify", wrapper=failing, expect=1).stderr
    assert lineage.paths.undo.exists()
    home.run("verify")
    assert not lineage.paths.undo.exists()
    assert len(lineage.check()) == 3


def thinned(home: Home, keep: dosvob.Keep, *wrapper: str) -> str:
    """Thin the versions in a process with a wrapper; what it raises, if anything."""
    program = f"import dosvob; dosvob.Versions(dosvob.ImagePaths(dosvob.Path('backups'), {NAME!r})).thin(dosvob.{keep})"
    environment = {**os.environ, "PYTHONPATH": str(Path(dosvob.__file__).parent)}
    command = [*wrapper, sys.executable, "-c", program]
    done = subprocess.run(command, cwd=home.directory, env=environment, capture_output=True, text=True, check=False)
    return done.stderr.strip()


def test_the_last_version_that_came_up_stays_if_it_cannot_be_read_now(home: Home) -> None:
    lineage = Lineage(home.directory, dosvob.Keep(last=9))
    for came_up in (True, False, False, False):
        lineage.go_on()
        dosvob.State.note(lineage.paths, dosvob.Finding("ext4", used=MIB, size=2 * MIB, came_up=came_up))
    good = dosvob.Versions(lineage.paths).all()[-1].path
    told = thinned(home, dosvob.Keep(1, 0, 0, 0), *cannot_read(good, "EIO", "openat"))
    assert "is damaged" in told  # into which the others could not be merged
    assert good.exists()
    assert not thinned(home, dosvob.Keep(1, 0, 0, 0))
    newest, last = dosvob.Versions(lineage.paths).all()
    assert newest.found is not None
    assert newest.found.came_up is False
    assert last.path == good
    lineage.check()


def test_what_is_not_ours_is_passed_over(tmp_path: Path) -> None:
    """Whatever it is: the names of the rest are told."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "Loop of links").symlink_to("Loop of links")
    (tmp_path / "nowhere").symlink_to("gone")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / ".dosvob").touch()
    (tmp_path / "nyc3" / ".dosvob").mkdir(parents=True)
    for name in ("data", "nyc3/data", "nyc3/.dosvob/other.state"):
        (tmp_path / name).touch()
    assert dosvob.Home(tmp_path).names() == {"data", "nyc3/data", "nyc3/other"}


def test_a_version_that_cannot_be_removed_keeps_no_other_one(home: Home) -> None:
    lineage = Lineage(home.directory, dosvob.Keep(last=9))
    lineage.go_on(7)
    oldest = dosvob.Versions(lineage.paths).all()[-1].path
    told = thinned(home, dosvob.Keep(3, 0, 0, 0), *cannot_read(oldest, "EUCLEAN", "unlink"))
    assert "Structure needs cleaning" in told
    kept = [version.path for version in dosvob.Versions(lineage.paths).all()]
    assert len(kept) == 4
    assert kept[-1] == oldest
    assert not thinned(home, dosvob.Keep(3, 0, 0, 0))
    assert [version.path for version in dosvob.Versions(lineage.paths).all()] == kept[:3]
    lineage.check()


def test_a_version_is_restored_without_what_it_does_not_need_of_the_image(home: Home) -> None:
    """Its patches have all that it has there. What is wrong with the image is told all the same."""
    lineage = Lineage(home.directory)
    with lineage.device.open("xb") as device:
        device.truncate(4 * MIB)
    for content in (b"one", b"two"):
        write_at(lineage.device, 2 * MIB, content * 1000)
        lineage.pass_time()
        lineage.back_up()
        (home.directory / content.decode()).write_bytes(lineage.device.read_bytes())
    first = dosvob.Versions(lineage.paths).all()[0].moment.strftime("%Y-%m-%dT%H:%MZ")
    failing = cannot_read(lineage.paths.image, "EIO")
    home.run("restore", NAME, "old", "--at", first, wrapper=failing)
    assert same(home.directory / "old", home.directory / "one")
    assert (
        f"differs from its snapshot in bytes {2 * MIB} to {3 * MIB - 1}"
        in home.run("verify", wrapper=failing, expect=1).stderr
    )


# -- what a run needs is tried before it costs anything


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_volume_that_is_larger_than_a_file_may_be(home: Home, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    home.simulator.add_volume("big", size_gib=17)
    home.simulator.add_volume("small")
    with (tmp_path / "store").open("xb") as file:
        file.truncate(400 * MIB)
    run("mkfs.ext2", "-q", "-b", "1024", tmp_path / "store")
    home.backups.mkdir()
    with mounted(tmp_path / "store", home.backups):
        error = one_clear_error(home.run(*arguments, expect=2))
        assert "will not do for an image of 17.0 GiB (File too large): use a file system with larger files" in error
        assert not creations(home)
        assert not list(home.backups.rglob(".dosvob-trial*"))


@pytest.mark.parametrize(
    ("injection", "path", "remedy"),
    [
        ("pwrite64:error=EPERM:when=2", ".trial", "rclone does with --vfs-cache-mode writes"),
        ("openat:error=EOPNOTSUPP:when=3", ".trial", "mount an SMB share with mount.cifs"),
        ("ftruncate:error=EFBIG:when=2", ".trial", "larger files, such as XFS"),
        ("rename:error=EXDEV:when=1", ".trial.renamed", "mergerfs does with category.create=mfs"),
        ("rename:error=EEXIST:when=2", ".trial.renamed", "sshfs does with -o workaround=rename"),
        ("flock:error=ENOLCK", "lock", "-o local_lock=flock"),
        ("fsync:error=EIO:when=1", ".trial", "will not do (Input/output error)"),
    ],
)
def test_what_the_disk_will_not_do_is_told_with_its_remedy(
    home: Home, tmp_path: Path, injection: str, path: str, remedy: str
) -> None:
    home.simulator.add_volume(NAME)
    home.backups.mkdir()
    (home.backups / ".dosvob").mkdir()
    call = injection.partition(":")[0]
    place = f"{home.backups.name}/.dosvob/{path}"
    wrapper = ("strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", f"trace={call}",
               *("-P", place, "-P", str(home.directory / place), f"--inject={injection}"))  # fmt: skip
    done = home.run(wrapper=wrapper, expect=2, constants={"TRIAL_NAME": ".trial"})
    told = [line for line in done.stderr.splitlines() if not line.startswith("strace: ")]
    assert len(told) == 1, told
    assert remedy in told[0]
    assert not creations(home)
    assert not list(home.backups.rglob(".trial*"))


def test_a_server_that_does_not_rename_over_a_file(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """What SFTP itself has does not; the remedy that is told makes it do."""
    monkeypatch.setattr(Storage, "SFTP", "internal-sftp -P posix-rename")
    storage = Storage("sshfs", tmp_path / "storage")
    request.addfinalizer(storage.close)
    volume, backups = home.simulator.add_volume(NAME), ("--backups", str(storage.path / "backups"))
    for arguments in ((), ("--dry-run",)):
        error = one_clear_error(home.run(*backups, *arguments, expect=2))
        assert "it must rename over a file: sshfs does with -o workaround=rename" in error
    assert not creations(home)
    storage.unmount()
    storage.mount("workaround=rename")
    for content in (b"one", b"two"):
        write_at(volume.path, MIB, content)
        home.run(*backups)
        assert same(storage.path / "backups" / NAME, volume.path)


def try_storage(directory: Path) -> None:
    """Try whether a volume of a GiB can be backed up into a directory."""
    dosvob.Trial(directory, [dosvob.GIB], [dosvob.GIB], print).run()


def test_two_trials_at_once(tmp_path: Path) -> None:
    """A dry run holds no lock while it tries what a run tries at the same time."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        list(threads.map(try_storage, [tmp_path] * 100))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_trial_left_goes_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is not disturbed by it, and does not disturb one that goes on."""
    (tmp_path / "photos").mkdir()
    others = tmp_path / "photos" / ".dosvob-trial-1"
    others.touch()
    with monkeypatch.context() as patches:
        patches.setattr(dosvob.Trial, "_remove", lambda *_: None)
        try_storage(tmp_path)
    file, directory, _ = sorted(tmp_path.iterdir())
    (directory / "renamed").touch()
    try_storage(tmp_path)
    assert (file.exists(), directory.exists()) == (True, True)
    for path in (others, file, directory):
        os.utime(path, (0, 0))
    try_storage(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert others.exists()


def unmounted(paths: dosvob.ImagePaths) -> None:
    """The image is on another disk, which is not mounted."""
    paths.image.unlink()
    paths.image.symlink_to(paths.image.parent / "usb disk" / NAME)


def read_only(paths: dosvob.ImagePaths) -> None:
    """The image is on another disk, which is mounted read-only."""
    disk = paths.image.parent.parent / "usb disk"
    disk.mkdir()
    shutil.move(paths.image, disk / NAME)
    paths.image.symlink_to(disk / NAME)
    run("mount", "--bind", disk, disk)
    run("mount", "-o", "remount,ro,bind", disk)


def replaced_by_a_directory(paths: dosvob.ImagePaths) -> None:
    """Somebody made a directory in its place."""
    paths.image.unlink()
    paths.image.mkdir()


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (unmounted, "which is not there: is it mounted?"),
        (read_only, f"backups/{NAME}: Read-only file system: mount it for writing"),
        (replaced_by_a_directory, "is a directory, and its name is that of an image"),
        (lambda paths: write_at(paths.state, 5000, b"decay"), f"{NAME}.state is damaged"),
        (lambda paths: write_at(paths.state, 0, b"decay"), f"{NAME}.state is damaged"),
        (lambda paths: cannot_read(paths.state, "EIO"), f"{NAME}.state is damaged"),
        (lambda paths: cannot_read(paths.state, "EACCES", "%file"), f"{NAME}.state: Permission denied: it must belong"),
        (lambda paths: cannot_read(paths.versions, "EIO", "%file,getdents64"), f"{NAME}.versions: Input/output error"),
    ],
)
def test_an_image_that_cannot_be_backed_up_costs_nothing(
    home: Home, cause: Callable[[dosvob.ImagePaths], tuple[str, ...] | None], says: str
) -> None:
    """A dry run says the same. The other volume is backed up."""
    paths = dosvob.ImagePaths(home.backups, NAME)
    _, other = backed_up_twice(home)
    write_at(other.path, 5 * MIB, b"new")
    posted = len(creations(home))
    wrapper = cause(paths) or ()
    try:
        for arguments in (("--dry-run",), (), (NAME,)):
            done = home.run(*arguments, expect=1, wrapper=wrapper)
            (error,) = [line for line in done.stderr.splitlines() if f" error: {NAME}: " in line]
            assert says in error
            assert error.endswith("it is not backed up")
            assert ("would back up other" in done.stdout) is (arguments == ("--dry-run",))
            assert f"would back up {NAME}" not in done.stdout
    finally:
        if cause is read_only:
            run("umount", "--lazy", home.directory / "usb disk")
    assert same(home.image("other"), other.path)
    assert sum("snapshots" in path for path in creations(home)[posted:]) == 1  # the other's


@pytest.mark.parametrize("storage", ["exfat-fuse"], indirect=True)
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_without_sparse_files_all_of_a_volume_is_needed(
    home: Home, storage: Storage, arguments: tuple[str, ...]
) -> None:
    home.simulator.add_volume(NAME)
    error = one_clear_error(home.run("--backups", str(storage.path / "backups"), *arguments, expect=2))
    assert "has no sparse files: 1.0 GiB are needed" in error
    assert "MiB are free" in error
    assert not creations(home)


@pytest.mark.parametrize("storage", ["exfat-fuse"], indirect=True)
def test_without_sparse_files_what_is_there_already_is_not_needed_again(home: Home, storage: Storage) -> None:
    home.simulator.add_volume(NAME)
    (backups := storage.path / "backups").mkdir()
    create_sparse(backups / f"{NAME}.partial", 190 * MIB)
    error = one_clear_error(home.run("--backups", str(backups), "--dry-run", expect=2))
    assert "has no sparse files: 834.0 MiB are needed" in error


@pytest.mark.parametrize("storage", ["ntfs-3g", "gocryptfs", "sshfs"], indirect=True)
def test_where_no_holes_can_be_made_that_is_said_once(home: Home, storage: Storage) -> None:
    volume, _ = home.simulator.add_volume(NAME), home.simulator.add_volume("other")
    write_at(volume.path, 0, os.urandom(2 * MIB))
    backups = ("--backups", str(storage.path / "backups"))
    done = home.run(*backups)
    told = [line for line in done.stdout.splitlines() if "no holes can be made" in line]
    assert len(told) == 1, done.stdout
    write_at(volume.path, 0, bytes(2 * MIB))
    home.run(*backups)
    assert same(storage.path / "backups" / NAME, volume.path)
    assert not list(storage.path.rglob(".dosvob-trial*"))


def test_a_dry_run_says_what_is_free_and_what_a_run_costs(home: Home) -> None:
    home.simulator.add_volume(NAME)
    told = home.run("--dry-run").stdout
    assert "first backups take up to 1.0 GiB, for 1 volume" in told
    assert "are free in" in told
    assert "about $0.02 for a run" in told
    assert not list(home.directory.rglob(".dosvob-trial*"))


def test_a_disk_that_does_not_tell_what_is_free_is_not_full(home: Home) -> None:
    volume = home.simulator.add_volume(NAME)
    home.backups.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=0", "dosvob-test", home.backups)
    try:
        for content in (b"one", b"two"):
            write_at(volume.path, MIB, content)
            home.run()
            assert same(home.image(NAME), volume.path)
        home.run("restore", NAME, str(home.backups / "copy.img"))
        assert "does not tell how much is free" in home.run("--dry-run").stdout
    finally:
        run("umount", "--lazy", home.backups)


# -- what is said, and when


def test_what_syncs_left_of_volumes_that_are_gone_is_named(home: Home) -> None:
    home.simulator.add_volume(NAME)
    home.run()
    metadata = home.backups / ".dosvob"
    (metadata / "gone.versions.of-20260101T000000Z-0123").mkdir()
    left = (home.backups / "gone.partial", metadata / "gone.spool",
            metadata / "gone.versions.of-20260101T000000Z-0123" / "20260101T000000Z")  # fmt: skip
    for path in left:
        path.write_bytes(os.urandom(2 * MIB))
    (metadata / f"{NAME}.spool").write_bytes(os.urandom(MIB))
    listed = home.run("list").stdout
    for name in ("gone.partial: 2.0 MiB", "gone.spool: 2.0 MiB", "gone.versions.of-20260101T000000Z-0123: 2.0 MiB"):
        assert name in listed
    assert f"{NAME}.spool: 1.0 MiB" in listed
    assert f"{NAME}.spool: 1.0 MiB" in home.run("list", f"{NAME[:2]}*").stdout
    only = home.run("list", "gone").stdout
    assert "gone.partial" in only
    assert NAME not in only
    (damaged := home.backups / "old.img.damaged").write_bytes(b"as a restore may leave it")
    assert f"{damaged.name}: 4.0 KiB" in home.run("list").stdout
    damaged.unlink()
    failing = cannot_read(left[2].parent, "EIO", "getdents64")
    assert "gone.versions.of-20260101T000000Z-0123: 4.0 KiB" in home.run("list", wrapper=failing).stdout
    told = json.loads(home.run("list", "--json").stdout)["remains"]
    assert {(each["path"], each["name"], each["occupied"]) for each in told} == {
        ("backups/gone.partial", "gone", 2 * MIB),
        ("backups/.dosvob/gone.spool", "gone", 2 * MIB),
        ("backups/.dosvob/gone.versions.of-20260101T000000Z-0123", "gone", 2 * MIB + 4096),
        (f"backups/.dosvob/{NAME}.spool", NAME, MIB),
    }
    told = home.run().stdout
    assert told.count("the account has no volume gone") == 3
    assert "takes 2.0 MiB" in told
    assert all(path.exists() for path in left)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_storage_that_keeps_no_modes_is_not_warned_about(home: Home, tmp_path: Path, keeps: bool) -> None:
    home.simulator.add_volume(NAME)
    with (tmp_path / "store").open("xb") as file:
        file.truncate(64 * MIB)
    run(*(("mkfs.ext4", "-q") if keeps else ("mkfs.exfat",)), tmp_path / "store")
    device = LoopDevice(tmp_path / "store")
    (place := tmp_path / "place").mkdir()
    run(*(("mount",) if keeps else ("mount.exfat-fuse", "-o", "umask=0")), device.path, place)
    try:
        shutil.copyfile(home.directory / "conf.json", place / "conf.json")
        (place / "conf.json").chmod(0o644)
        done = home.run("--config", str(place / "conf.json"), "--dry-run")
        assert ("chmod 600" in done.stderr) is keeps
        assert [path.name for path in place.iterdir() if path.name != "lost+found"] == ["conf.json"]
    finally:
        run("umount", place)
        device.close()


def test_a_version_that_does_not_need_what_decayed_of_the_image_is_sound(tmp_path: Path) -> None:
    """Of a chunk that was zeros then, its own pages are all that it needs: a restore and `verify` say the same."""
    lineage = Lineage(tmp_path)
    lineage.device.write_bytes(bytes(lineage.size))
    lineage.pass_time()
    lineage.back_up()
    write_at(lineage.device, MIB, os.urandom(4096))
    lineage.pass_time()
    lineage.back_up()
    write_at(lineage.paths.image, MIB + 8192, b"decay")
    assert verify(lineage.paths) == [[(MIB, 2 * MIB)], []]
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        final, damaged = chain.restore(1, tmp_path / "restored", lambda count: None)
    assert damaged.ranges == []
    assert final.read_bytes() == bytes(lineage.size)


@pytest.fixture
def full_temporary(tmpfs: Tmpfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """$TMPDIR is full, and each index larger than what is held in memory."""
    (tmpfs.path / "filler").write_bytes(bytes(4096))
    tmpfs.leave_free(0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmpfs.path))
    monkeypatch.setattr(dosvob.PatchFile, "INDEX_IN_MEMORY", 50)


@pytest.mark.usefixtures("full_temporary")
def test_a_full_temporary_directory_is_not_a_full_disk_of_backups(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path, dosvob.Keep(last=2), 5)
    lineage.go_on(5)  # with an undo each, and merges
    lineage.check()


def test_a_version_without_an_index_is_not_called_damaged_for_a_full_temporary_directory(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    lineage = Lineage(tmp_path, dosvob.Keep(last=9), 5)
    with pytest.MonkeyPatch.context() as patches:  # as the first versions of dosvob wrote them
        patches.setattr(dosvob.PatchFile, "_make_index", lambda file: None)
        patches.setitem(dosvob.FORMATS, "version", 1)
        lineage.go_on(3)
    request.getfixturevalue("full_temporary")
    listed = dosvob.Listing(dosvob.Home(lineage.backups), lambda _: None).of(lineage.paths)
    assert [version["damaged"] for version in listed["versions"]] == [False] * 3


@pytest.mark.parametrize("storage", ["exfat-fuse", "sshfs"], indirect=True)
def test_a_restore_takes_what_the_volume_held_also_of_an_image_that_has_no_holes(
    storage: Storage, tmp_path: Path, tmpfs: Tmpfs
) -> None:
    lineage = Lineage(tmp_path, dosvob.Keep(last=9), 100)
    lineage.device.write_bytes(os.urandom(MIB))
    os.truncate(lineage.device, 100 * MIB)
    lineage.backups = storage.path / "backups"
    lineage.paths = dosvob.ImagePaths(lineage.backups, NAME)
    lineage.pass_time()
    lineage.back_up()
    tmpfs.leave_free(40 * MIB)
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        copy, damaged = chain.restore(0, tmpfs.path / "copy.img", lambda _: None)
    assert not damaged.ranges
    assert same(copy, lineage.device)
    tmpfs.leave_free(MIB // 2)
    copy.unlink()
    tmpfs.leave_free(MIB // 2)
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain, pytest.raises(dosvob.DosvobError, match="up to 1"):
        chain.restore(0, tmpfs.path / "copy.img", lambda _: None)


@pytest.mark.parametrize("storage", ["exfat-fuse"], indirect=True)
def test_a_storage_that_keeps_no_modes_is_not_warned_about_in_the_container(home: Home, storage: Storage) -> None:
    """There conf.json is in a directory that cannot be written to, so that nothing can be tried."""
    home.simulator.add_volume(NAME)
    home.backups.mkdir()
    shutil.copyfile(home.directory / "conf.json", storage.path / "conf.json")
    with contextlib.ExitStack() as stack:
        for what, where, is_read_only in (
            (home.directory, home.directory, True),
            (storage.path / "conf.json", home.directory / "conf.json", True),
            (home.backups, home.backups, False),
        ):
            run("mount", "--bind", what, where)
            stack.callback(run, "umount", "--lazy", where)
            run("mount", "-o", "remount,bind," + ("ro" if is_read_only else "rw"), where)
        assert "chmod" not in home.run("--dry-run").stderr
