"""Whether a backup comes up: real file systems on loop devices, as a power cut leaves them or worse, really mounted.

First what the droplet's program finds, then whole runs in a simulated account.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, Home, same, write_at, write_out
from mount_support import shown
from simulator import Fault, RequestRecord, Simulator, Volume
from simulator.storage import LoopDevice, copy_sparse, create_sparse, mounted
from trouble_support import add_volume, assert_backed_up, assert_nothing_left, run, start, until
from version_reader import Reader
from versions_support import Lineage
from versions_support import listed as versions_listed

import dosvob

PAGE = 4096
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB, "f2fs": 128 * MIB}
Disk = Callable[..., Path]


def changes(calls: Iterable[RequestRecord]) -> Counter[tuple[str, str]]:
    """How often something of a kind was created or deleted; what was refused until a clone is free does not count."""
    changing = [call for call in calls if call.method != "GET" and call.status < 300]
    return Counter((call.method, call.path.split("/")[2]) for call in changing)


def needs(kind: str) -> None:
    """Skip the test if this machine cannot have such a file system."""
    if shutil.which(f"mkfs.{kind}") is None or f"\t{kind}\n" not in Path("/proc/filesystems").read_text():
        pytest.skip(f"no {kind} on this machine")


def call(*command: str | Path) -> str:
    """Run a command that must succeed; what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def look(disk: Path, *, with_fsck: bool = False, limit: float = 60) -> dosvob.Finding:
    """What the droplet's program finds on a disk, run as a process of its own, as sshd would."""
    with contextlib.closing(LoopDevice(disk)) as device:
        call("blockdev", "--setro", device.path)  # as the agent leaves it
        process, found = ask(device.path, with_fsck=with_fsck, limit=limit)
        assert process.wait(30) == 0
        return found


def ask(device: str, *, with_fsck: bool = False, limit: float = 60) -> tuple[subprocess.Popen[bytes], dosvob.Finding]:
    """What it finds on a device; and its process, which has been told to end."""
    program = dosvob.droplet_source(f"Checker({device!r}, {with_fsck}, {limit}).run(1)")
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", f"import sys; exec(sys.stdin.buffer.read({len(program)}))"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(program)
    process.stdin.flush()
    answer = process.stdout.readline()
    process.stdin.close()
    return process, dosvob.Finding.parse(answer)


def cut_with_orphan(place: Path, whole: Path, cut: Path) -> None:
    """Copy a disk while a file is open that has no name any more."""
    with (place / "orphan").open("wb") as orphan:
        orphan.write(random.Random(2).randbytes(MIB))
        orphan.flush()
        (place / "orphan").unlink()
        directory = os.open(place, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        os.fsync(orphan.fileno())
        copy_sparse(whole, cut)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """Makes a disk with a file system in the state in which a power cut leaves it: with work for the mount to do."""

    def make(kind: str, *options: str, name: str = "disk") -> Path:
        needs(kind)
        whole, cut = tmp_path / f"{name}.whole", tmp_path / name
        create_sparse(whole, SIZES[kind])
        call(f"mkfs.{kind}", "-q", *options, whole)
        with mounted(whole, tmp_path / "place") as place:
            (place / "before").write_bytes(random.Random(1).randbytes(MIB))
            write_out(place)
            for number in range(20):
                with (place / f"file-{number}").open("wb") as file:
                    file.write(random.Random(number).randbytes(5000))
                    file.flush()
                    os.fsync(file.fileno())
            (place / "file-0").rename(place / "renamed")
            if "fast_commit" in options:  # an orphan in it is what Linux 6.18 cannot replay, nor e2fsck mend
                copy_sparse(whole, cut)
            else:
                cut_with_orphan(place, whole, cut)
        whole.unlink()
        return cut

    return make


def ext4_is_dirty(disk: Path) -> bool:
    """Whether its journal waits for being replayed."""
    return "needs_recovery" in call("dumpe2fs", "-h", disk)


def orphans(disk: Path) -> int:
    """How many files without a name an ext4 has, which its next mount is to remove, when its journal is replayed."""
    replayed = disk.with_name("replayed")
    replayed.unlink(missing_ok=True)
    copy_sparse(disk, replayed)
    return call("e2fsck", "-y", "-E", "journal_only", replayed).count("Clearing orphaned inode")


# -- what comes up, with something to replay


@pytest.mark.parametrize("options", [(), ("-O", "fast_commit"), ("-O", "orphan_file"), ("-O", "^metadata_csum")])
def test_ext4_as_after_a_power_cut(disk: Disk, options: tuple[str, ...]) -> None:
    made = disk("ext4", *options)
    assert ext4_is_dirty(made)
    assert orphans(made) == ("fast_commit" not in options)
    found = look(made)
    assert (found.systems, found.rest, found.came_up, found.words) == ("ext4", "", True, "")
    assert found.kernel == os.uname().release
    assert not ext4_is_dirty(made)  # it was replayed on what was tried
    assert not orphans(made)
    call("e2fsck", "-fn", made)  # all that was to be done is done
    assert MIB < found.used < 4 * MIB
    assert str(found) == f"ext4, {100 * found.used / found.size:.0f} % full"


def test_xfs_with_a_dirty_log(disk: Disk, tmp_path: Path) -> None:
    made = disk("xfs")
    namesake = tmp_path / "namesake"
    copy_sparse(made, namesake)
    assert subprocess.run(["xfs_repair", "-n", made], capture_output=True, check=False).returncode == 1
    found = look(made)
    assert (found.systems, found.came_up, found.words) == ("xfs", True, "")
    with mounted(made, tmp_path / "other"):  # as the trial of another clone does that hangs
        assert look(namesake).came_up
    assert subprocess.run(["xfs_repair", "-n", made], capture_output=True, check=False).returncode == 0


def test_btrfs_with_a_log_tree(disk: Disk) -> None:
    made = disk("btrfs")
    super_block = call("btrfs", "inspect-internal", "dump-super", made)
    assert not any(line.split() == ["log_root", "0"] for line in super_block.splitlines())
    found = look(made)
    assert (found.systems, found.came_up, found.words) == ("btrfs", True, "")
    older = made.with_name("older")  # a namesake with an older generation, as the clone of an older snapshot is
    copy_sparse(disk("btrfs", "-U", "11111111-2222-3333-4444-555555555555", name="twin"), older)
    assert look(made.with_name("twin")).came_up
    assert look(older).came_up


def test_f2fs_with_something_to_recover(disk: Disk) -> None:
    made = disk("f2fs")
    found = look(made)
    assert (found.systems, found.came_up, found.words) == ("f2fs", True, "")
    assert MIB < found.used < found.size <= SIZES["f2fs"]


SECTORS = [(2048 + 96 * 2048 * number, 64 * 2048) for number in range(2)]  # of partitions, their first and how many


def partitioned(table: Path, *parts: Path) -> Path:
    """Make a disk of a table and the contents of its two partitions."""
    create_sparse(table, 256 * MIB)
    entries = b"".join(struct.pack("<B3xB3xII", 0, 0x83, *each) for each in SECTORS)
    write_at(table, 446, entries.ljust(64, b"\0") + b"\x55\xaa")
    for (first, _), part in zip(SECTORS, parts, strict=True):
        call("dd", f"if={part}", f"of={table}", "bs=1M", f"seek={first // 2048}", "conv=notrunc,sparse", "status=none")
    return table


@pytest.mark.parametrize("hanging", ["probe", "looked_into"])
def test_cut_off_at_the_second_partition(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    """Then nobody knows of the second one: neither that it comes up nor that it is gone."""
    first = disk("ext4", name="one") if hanging == "looked_into" else tmp_path / "one"
    if hanging == "probe":
        create_sparse(first, 64 * MIB)
        swap(first)
    table = partitioned(tmp_path / "table", first, disk("ext4", name="two"))
    before = look(table)
    assert before.came_up
    head, tail = dosvob.AGENT.split(f"    def {hanging}(self", 1)
    hang = tail.replace('."""', '."""\n        time.sleep(3600 * node.endswith("p2"))', 1)
    monkeypatch.setattr(dosvob, "AGENT", f"{head}    def {hanging}(self{hang}")
    found = look(table, limit=3).after(before)
    assert found.came_up is None
    assert "did not end within 3 s" in found.words


def test_two_file_systems_in_partitions(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = partitioned(tmp_path / "table", disk("ext4", name="one"), disk("ext4", name="two"))
    found = look(table)
    assert (found.systems, found.came_up, found.words) == ("ext4, ext4", True, "")
    write_at(table, SECTORS[1][0] * 512 + 2048, b"\xa5" * 512)  # group descriptors of the second
    found = look(table)
    assert found.came_up is False
    assert "p2" in found.words
    monkeypatch.setattr(dosvob, "CHECKED_PARTS", 1)
    monkeypatch.setattr(dosvob, "AGENT", dosvob.AGENT.replace("CHECKED_PARTS = 8", "CHECKED_PARTS = 1"))
    found = look(table)
    assert (found.systems, found.rest, found.came_up) == ("ext4", "1 more partition", True)


# -- what does not


def damaged_journal(disk: Path) -> None:
    """Damage the first block of the journal, whichever that is; of what is not replayed bitmaps may be half written."""
    block = int(call("debugfs", "-c", "-R", "bmap <8> 0", disk).split()[0])
    size = 1024 << struct.unpack("<I", _read(disk, 1024 + 24, 4))[0]
    write_at(disk, block * size, b"\xff" * 64)


def damaged_descriptors(disk: Path) -> None:
    """Damage the descriptors of the groups."""
    size = 1024 << struct.unpack("<I", _read(disk, 1024 + 24, 4))[0]
    write_at(disk, max(size, 2048), b"\xa5" * 512)


def damaged_root(disk: Path) -> None:
    """Damage the block of the top directory, of which the journal has nothing: the mount itself does not look at it."""
    look(disk)
    block = int(call("debugfs", "-R", "bmap <2> 0", disk).split()[0])
    size = 1024 << struct.unpack("<I", _read(disk, 1024 + 24, 4))[0]
    write_at(disk, block * size, random.Random(3).randbytes(size))


def torn_log(disk: Path) -> None:
    """Damage the records at the log's end, whose checksums tell."""
    start, block, log = struct.unpack(">Q", _read(disk, 48, 8))[0], struct.unpack(">I", _read(disk, 4, 4))[0], 0
    blocks = struct.unpack(">I", _read(disk, 96, 4))[0]
    per_group, bits = struct.unpack(">I", _read(disk, 84, 4))[0], _read(disk, 124, 1)[0]
    log = ((start >> bits) * per_group + (start & ((1 << bits) - 1))) * block
    content = bytearray(_read(disk, log, blocks * block))
    for place in range(0, len(content), 512):
        if content[place : place + 4] == b"\xfe\xed\xba\xbe":
            content[place + 512 + 40 : place + 512 + 80] = b"\x5a" * 40
    write_at(disk, log, bytes(content))


def _read(disk: Path, offset: int, length: int) -> bytes:
    with disk.open("rb") as file:
        return os.pread(file.fileno(), length, offset)


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("ext4", damaged_journal, "EXT4-fs (loop"),
        ("ext4", damaged_descriptors, "EXT4-fs (loop"),
        ("ext4", damaged_root, "EXT4-fs error (device loop"),
        ("xfs", torn_log, "XFS (loop"),
    ],
)
def test_damage(disk: Disk, kind: str, damage: Callable[[Path], None], said: str) -> None:
    made = disk(kind)
    damage(made)
    found = look(made)
    assert (found.systems, found.came_up) == (kind, False)
    assert said in found.words  # the kernel's own words
    assert "Mounting" not in found.words  # nor what it always says
    assert len(found.words) <= 300
    assert str(found) == "DOES NOT COME UP"


def test_a_damaged_superblock(disk: Disk) -> None:
    made = disk("ext4")
    before = look(made)
    write_at(made, 1024, bytes(1024))
    found = look(made)
    assert (found.systems, found.rest, found.came_up) == ("", "no file system", None)
    after = found.after(before)  # there was one, so this is no file system that nobody missed
    assert after.came_up is False
    assert after.words == f"no file system, where there was ext4 with {dosvob.human_size(before.used)}"
    assert found.after(after).came_up is False  # and it stays like that, backup after backup


def test_damage_that_a_mount_does_not_meet(disk: Disk) -> None:
    made = disk("ext4")
    assert look(made, with_fsck=True).came_up
    block = int(call("debugfs", "-R", "bmap before 0", made).split()[0])
    call("debugfs", "-w", "-R", f"freeb {block}", made)  # which a file has
    assert look(made).came_up
    found = look(made, with_fsck=True)
    assert (found.systems, found.came_up) == ("ext4", False)
    assert found.words.startswith("e2fsck: ")


def test_damage_that_a_mount_meets_and_takes(disk: Disk) -> None:
    made = disk("ext4", "-O", "^orphan_file")
    look(made)
    call("debugfs", "-w", "-R", "set_super_value last_orphan 3", made)
    found = look(made)
    assert found.came_up is False
    assert found.words.startswith("EXT4-fs error (device loop")


def test_errors_that_the_volume_had_noted(disk: Disk) -> None:
    made = disk("ext4")
    look(made)
    call("debugfs", "-w", "-R", "set_super_value state 3", made)
    found = look(made)
    assert found.came_up
    assert "mounting fs with errors" in found.words  # it is told


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_the_tools_of_other_file_systems(disk: Disk, kind: str) -> None:
    found = look(disk(kind), with_fsck=True)
    assert (found.came_up, found.words) == (True, "")


def wrong_links(disk: Path) -> None:
    """Note a wrong count of links in a file's inode."""
    number = call("xfs_db", "-c", "path /renamed", "-c", "print v3.inumber", disk).split()[-1]
    call("xfs_db", "-x", "-c", f"inode {number}", "-c", "write -d core.nlinkv2 7", disk)


def damaged_checksums(disk: Path) -> None:
    """Damage a leaf of the tree of checksums, which is read when its files are."""
    dump = call("btrfs", "inspect-internal", "dump-tree", "-t", "csum", disk)
    leaf = re.findall(r"^leaf (\d+) ", dump, re.MULTILINE)[1]
    place = int(call("btrfs-map-logical", "-l", leaf, disk).split()[5])
    write_at(disk, place + 200, b"\xa5" * 100)


@pytest.mark.parametrize(
    ("kind", "options", "damage", "tool"),
    [("xfs", (), wrong_links, "xfs_repair"), ("btrfs", ("-m", "single"), damaged_checksums, "btrfs")],
)
def test_damage_that_only_a_tool_finds(
    disk: Disk, tmp_path: Path, kind: str, options: tuple[str, ...], damage: Callable[[Path], None], tool: str
) -> None:
    made = disk(kind, *options)
    with mounted(made, tmp_path / "place") as place:  # so much that its checksums fill several leaves
        (place / "large").write_bytes(bytes(range(256)) * (40 * MIB // 256))
        write_out(place)
    sound = look(made, with_fsck=True)
    assert (sound.came_up, sound.words) == (True, "")
    damage(made)
    assert look(made).came_up
    found = look(made, with_fsck=True)
    assert (found.systems, found.came_up) == (kind, False)
    assert found.words.startswith(f"{tool}: ")
    assert re.search("nlinks from 7 to 1|checksum verify failed", found.words)


def test_a_superblock_that_asks_for_a_panic(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If something is wrong with it, the whole droplet would end, and the other volumes' backups with it."""
    made, options = disk("ext4"), tmp_path / "options"
    call("tune2fs", "-e", "panic", made)
    told = f"open({str(options)!r}, 'w').write(open('/proc/fs/ext4/%s/options' % node[5:]).read())"
    statvfs = "status = os.statvfs(place)"
    monkeypatch.setattr(dosvob, "AGENT", dosvob.AGENT.replace(statvfs, f"{statvfs}; {told}"))
    assert look(made).came_up
    assert "errors=continue" in options.read_text()


def test_a_device_that_cannot_be_read(disk: Disk) -> None:
    made = disk("ext4")
    before = look(made)
    with contextlib.closing(LoopDevice(made)) as device:
        os.truncate(made, 0)
        process, found = ask(device.path)
        assert process.wait(30) == 0
    assert found.after(before).came_up is None


# -- what cannot be looked into


def luks(disk: Path) -> None:
    """The head of a LUKS volume."""
    write_at(disk, 0, b"LUKS\xba\xbe\0\1".ljust(168, b"\0") + b"0b5f7ddb-4d5c-4b2e-b2c1-2b4d3a3f0c11\0")


def lvm(disk: Path) -> None:
    """The label of a physical volume."""
    rest = struct.pack("<I8s32s", 32, b"LVM2 001", b"abcdefghijklmnopqrstuvwxyz012345").ljust(492, b"\0")
    checksum = zlib.crc32(rest, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    write_at(disk, 512, b"LABELONE" + struct.pack("<QI", 1, checksum) + rest)


def raid(disk: Path) -> None:
    """The superblock of a member of an array, 4 KiB from the beginning."""
    words = bytearray(260)
    struct.pack_into("<II", words, 0, 0xA92B4EFC, 1)
    words[16:32] = b"sixteen bytes of"
    struct.pack_into("<QQQ", words, 128, 2048, 1024, 8)  # where data begins, how much there is, where this block is
    struct.pack_into("<I", words, 220, 1)
    total = sum(struct.unpack("<65I", words))
    struct.pack_into("<I", words, 216, (total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF)
    write_at(disk, 4096, bytes(words))


def zfs(disk: Path) -> None:
    """The first two labels of a ZFS pool's device: libblkid goes by the uberblocks, from 2.41 on by the list before."""

    def text(of: bytes) -> bytes:
        return struct.pack(">I", len(of)) + of + bytes(-len(of) % 4)

    def pair(name: bytes, kind: int, value: bytes) -> bytes:
        body = text(name) + struct.pack(">II", kind, 1) + value
        return struct.pack(">II", len(body) + 8, 64) + body

    numbers = {b"version": 5000, b"state": 0, b"txg": 100, b"pool_guid": 12345, b"top_guid": 777, b"guid": 777}
    pairs = [pair(b"name", 9, text(b"tank")), *(pair(name, 8, struct.pack(">Q", of)) for name, of in numbers.items())]
    for label in (0, 256 << 10):
        write_at(disk, label + (16 << 10), bytes([1, 1, 0, 0]) + struct.pack(">II", 0, 1) + b"".join(pairs) + bytes(8))
        for number in range(8):
            uberblock = struct.pack("<QQQQQ", 0x00BAB10C, 5000, 100 + number, 100 + number, 1_700_000_000)
            write_at(disk, label + ((128 + number) << 10), uberblock)


def swap(disk: Path) -> None:
    """A swap area."""
    call("mkswap", disk)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (luks, "LUKS"),
        (lvm, "LVM"),
        (raid, "a RAID member"),
        (zfs, "ZFS"),
        (swap, "swap"),
        (lambda disk: None, "no file system"),
    ],
)
def test_what_has_no_file_system(tmp_path: Path, make: Callable[[Path], None], named: str) -> None:
    create_sparse(tmp_path / "disk", 64 * MIB)
    make(tmp_path / "disk")
    found = look(tmp_path / "disk")
    assert (found.systems, found.rest, found.came_up, found.words) == ("", named, None, "")
    assert str(found) == named


def test_a_feature_that_the_kernel_lacks(disk: Disk) -> None:
    made = disk("ext4", "-O", "^metadata_csum")
    features = struct.unpack("<I", _read(made, 1024 + 96, 4))[0]
    write_at(made, 1024 + 96, struct.pack("<I", features | 1 << 28))
    found = look(made)
    assert (found.systems, found.came_up) == ("ext4", None)
    assert "unsupported optional features" in found.words
    assert str(found) == "ext4, not tried"


@pytest.mark.parametrize("feature", ["incompat", "ro_compat"])
def test_a_feature_of_xfs_that_the_kernel_lacks(disk: Disk, feature: str) -> None:
    made = disk("xfs")
    look(made)
    known = int(call("xfs_db", "-c", "sb 0", "-c", f"print features_{feature}", made).split()[-1], 16)
    call("xfs_db", "-x", "-c", "sb 0", "-c", f"write -d features_{feature} {known | 1 << 30:#x}", made)
    found = look(made)
    assert (found.systems, found.came_up) == ("xfs", None)
    assert re.search("unknown (incompatible|read-only compatible) features", found.words)


@pytest.mark.parametrize("kind", ["exfat", "f2fs"])
def test_a_file_system_that_the_kernel_lacks(tmp_path: Path, kind: str) -> None:
    if shutil.which(f"mkfs.{kind}") is None or kind in Path("/proc/filesystems").read_text():
        pytest.skip("it needs a file system that this kernel does not know")
    create_sparse(tmp_path / "disk", 64 * MIB)
    call(f"mkfs.{kind}", tmp_path / "disk")
    found = look(tmp_path / "disk")
    assert (found.systems, found.came_up) == (kind, None)
    assert found.words == f"this droplet's kernel has no {kind}"


def test_a_journal_on_another_device(tmp_path: Path) -> None:
    """It may be that of another clone, which is not backed up yet and must not change."""
    disk, journal, cut = (tmp_path / name for name in ("disk", "journal", "cut"))
    for path in (disk, journal):
        create_sparse(path, 64 * MIB)
    with contextlib.closing(LoopDevice(journal)) as device:
        with contextlib.closing(LoopDevice(disk)) as own:
            call("mkfs.ext4", "-q", "-O", "journal_dev", device.path)
            call("mkfs.ext4", "-q", "-J", f"device={device.path}", own.path)
        with mounted(disk, tmp_path / "place") as place, (place / "file").open("wb") as file:
            file.write(b"something to replay")
            file.flush()
            os.fsync(file.fileno())
            copy_sparse(disk, cut)
        call("blockdev", "--flushbufs", device.path)
        before = journal.read_bytes()
        found = look(cut)
        call("blockdev", "--flushbufs", device.path)
    assert (found.systems, found.came_up) == ("ext4", None)
    assert found.words == "its journal is on another device"
    assert journal.read_bytes() == before


def test_a_part_of_a_larger_btrfs(tmp_path: Path) -> None:
    needs("btrfs")
    for name in ("one", "two"):
        create_sparse(tmp_path / name, SIZES["btrfs"])
    call("mkfs.btrfs", "-q", tmp_path / "one", tmp_path / "two")
    found = look(tmp_path / "one")
    assert (found.systems, found.came_up) == ("btrfs", None)


def test_a_mount_that_hangs(disk: Disk, tmp_path: Path) -> None:
    made, below, place = disk("ext4"), tmp_path / "below", tmp_path / "frozen"
    create_sparse(below, 256 * MIB)
    call("mkfs.ext4", "-q", below)
    with mounted(below, place):
        copy_sparse(made, place / "disk")
        with contextlib.closing(LoopDevice(place / "disk")) as device:
            write_out(place)
            call("fsfreeze", "-f", place)  # what is read is there; what is written waits
            try:
                process, found = ask(device.path, limit=15)
            finally:
                call("fsfreeze", "-u", place)
            assert process.wait(60) == 0
    assert (found.systems, found.came_up) == ("ext4", None)
    assert found.words == "the mount of ext4 did not end within 15 s"


def test_nothing_of_it_stays_mounted(disk: Disk) -> None:
    with contextlib.closing(LoopDevice(disk("ext4"))) as device:
        process, found = ask(device.path)
        assert process.wait(30) == 0
        assert found.came_up
        assert f"{device.path} " not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 50_000,
        b'{"parts": 5, "problem": "", "kernel": ""}',
        b"\xff",
        b'{"parts": [{"kind": 7}]}',
    ],
)
def test_an_answer_that_makes_no_sense(answer: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        dosvob.Finding.parse(answer)


def test_what_a_droplet_says_is_not_trusted() -> None:
    part = {"kind": "\x1b[2Jext4" * 99, "is_file_system": True, "came_up": 1, "words": "a\r\n\x1b" * 999}
    answer = {"kernel": "6" * 999, "problem": "", "parts": [{**part, "used": -5, "size": 1 << 90}] * 999}
    found = dosvob.Finding.parse(json.dumps(answer).encode())
    sealed = json.dumps(dataclasses.asdict(found.after(found)))
    assert len(sealed) < dosvob.Update.REST_OF_HEAD - 300
    assert all(" " <= char <= "~" for char in sealed)


def test_what_was_there_before_counts() -> None:
    old = dosvob.Finding("ext4", used=100 * MIB, size=200 * MIB, came_up=True)
    assert not dosvob.Finding("ext4", used=60 * MIB, size=200 * MIB, came_up=True).after(old).change
    emptied = dosvob.Finding("ext4", used=40 * MIB, size=200 * MIB, came_up=True).after(old)
    assert emptied.change == "it has ext4 with 40.0 MiB, and there was ext4 with 100.0 MiB before"
    other = dosvob.Finding("xfs", used=100 * MIB, size=200 * MIB, came_up=True).after(old)
    assert other.change == "it has xfs with 100.0 MiB, and there was ext4 with 100.0 MiB before"
    hidden = dosvob.Finding("", "LUKS").after(old)
    assert (hidden.came_up, hidden.words) == (False, "LUKS, where there was ext4 with 100.0 MiB")
    untried = dosvob.Finding(words="the connection broke").after(old)
    assert untried.came_up is None
    assert dosvob.Finding("", "no file system").after(untried).came_up is False
    assert dosvob.Finding("", "LUKS").after(dosvob.Finding("", "LUKS")).came_up is None
    for came_up in (None, False):  # it was there all the same
        wiped = dosvob.Finding("", "no file system").after(dosvob.Finding("xfs", came_up=came_up))
        assert (wiped.came_up, wiped.words) == (False, "no file system, where there was xfs")
        assert dosvob.Finding("", "no file system").after(wiped).came_up is False


# -- whole runs


class Droplet:
    """A droplet's python3 that does something else when it is to look whether a backup comes up."""

    SCRIPT = """#!/usr/bin/python3
import os, sys
if sys.argv[1:2] != ["-I"]:
    os.execv("/usr/bin/python3", ["python3", *sys.argv[1:]])
length = int(sys.argv[3].rpartition("(")[2].rstrip(")"))
program = sys.stdin.buffer.read(length)
if b"Checker(" in program.rpartition(b"__annotations__")[2][-300:]:
    open({begun!r}, "a").write("x")
    {instead}
sys.argv = ["-c"]
exec(program)
"""

    def __init__(self, directory: Path, instead: str) -> None:
        self.begun = directory / "begun"
        script = directory / "python3"
        script.write_text(self.SCRIPT.format(begun=str(self.begun), instead=instead))
        script.chmod(0o700)
        self.fault = Fault("python", text=str(script), times=9)

    @property
    def times(self) -> int:
        """How often it was to look."""
        return len(self.begun.read_text()) if self.begun.exists() else 0


@pytest.fixture
def data(sim: Simulator, tmp_path: Path) -> Volume:
    """A volume with an ext4 that is in use: its journal has something to replay."""
    return file_system(sim, "data", tmp_path)


def file_system(sim: Simulator, name: str, directory: Path) -> Volume:
    """A volume with an ext4 in use."""
    volume = sim.add_volume(name)
    call("mkfs.ext4", "-q", "-F", volume.path)
    used = directory / "used"
    copy_sparse(volume.path, used)
    with mounted(used, directory / "place") as place:
        (place / "letter").write_text("The engine works.\n")
        with (place / "letter").open() as file:
            os.fsync(file.fileno())
        volume.path.unlink()
        copy_sparse(used, volume.path)
    used.unlink()
    assert ext4_is_dirty(volume.path)
    return volume


def cells(output: str, name: str) -> list[str]:
    """A volume's line in the table."""
    line = next(line for line in output.splitlines() if re.match(rf"\S+ {name} +\d", line))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def listed(home: Home, name: str = "data") -> list[dict[str, Any]]:
    """What `list --json` tells of the snapshots, the newest first."""
    (volume,) = (each for each in json.loads(home.run("list", "--json").stdout)["volumes"] if each["name"] == name)
    versions: list[dict[str, Any]] = volume["versions"]
    return versions


@pytest.mark.small
def test_a_backup_that_comes_up(sim: Simulator, home: Home, data: Volume) -> None:
    done = run(home)
    assert cells(done.stdout, "data")[-2:] == ["ext4, 0 % full", "ok"]
    assert not done.stderr
    assert same(home.image("data"), data.path)
    assert ext4_is_dirty(home.image("data"))  # the clone was changed by the trial, and not the image
    (image,) = listed(home)
    assert (image["found"], image["comes_up"], image["kernel"]) == ("ext4, 0 % full", True, os.uname().release)
    assert image["words"] == ""
    assert "ext4, 0 % full" in home.run("list").stdout
    assert re.search(
        r"data: its last complete backup is .* old, the last one that came up \d", home.run("health").stdout
    )
    assert_nothing_left(sim)


@pytest.mark.small
def test_broken_on_purpose_and_brought_back(sim: Simulator, home: Home, data: Volume, tmp_path: Path) -> None:
    home.configure(keep={})
    run(home)
    sound = data.path.read_bytes()
    damaged_descriptors(data.path)
    time.sleep(1.1)  # versions are told apart by the second
    done = run(home, expect=1)
    assert cells(done.stdout, "data")[-2:] == ["DOES NOT COME UP", "ok"]
    assert "error: data: it does not come up: EXT4-fs (" in done.stderr
    assert "the last one that does is of " in done.stderr
    assert same(home.image("data"), data.path)  # it is what the volume has
    image, version = listed(home)
    assert (image["comes_up"], version["comes_up"]) == (False, True)
    assert image["words"].startswith("EXT4-fs (")
    told = home.run("list").stdout
    assert "DOES NOT COME UP" in told
    assert "kept as the last that came up" in told  # though no version is asked for
    assert "it does not come up: EXT4-fs" in home.run("health", expect=1).stderr

    with shown(home.backups, tmp_path / "shown") as files:
        assert len(files.times("data")) == 2
    assert files.said.count("does not come up: EXT4-fs") == 1
    assert "; the last one that does is of " in files.said

    bad = home.run("restore", "data", "bad.img")
    assert "warning: data of " in bad.stderr
    assert "does not come up: EXT4-fs" in bad.stderr
    at = bad.stderr.rpartition("is of ")[2].strip()
    assert not home.run("restore", "data", "good.img", "--at", at).stderr
    assert (home.directory / "good.img").read_bytes() == sound
    with mounted(home.directory / "good.img", tmp_path / "place") as place:
        assert (place / "letter").read_text() == "The engine works.\n"
    assert set(Reader(home.backups, "data").times())

    data.path.write_bytes(sound)
    time.sleep(1.1)
    run(home)
    assert [version["comes_up"] for version in listed(home)] == [True]  # the older ones are not needed any more
    assert_nothing_left(sim)


@pytest.mark.small
def test_fsck_finds_more(sim: Simulator, home: Home, data: Volume) -> None:
    home.configure(check="fsck")
    look(data.path)  # what is in the journal is in its place
    block = int(call("debugfs", "-R", "bmap letter 0", data.path).split()[0])
    call("debugfs", "-w", "-R", f"freeb {block}", data.path)
    assert "error: data: it does not come up: e2fsck: " in run(home, expect=1).stderr


@pytest.mark.small
def test_none_looks_at_nothing(sim: Simulator, home: Home, data: Volume, tmp_path: Path) -> None:
    droplet = Droplet(tmp_path, "pass")
    home.configure(check="none")
    sim.faults.add(droplet.fault)
    assert cells(run(home).stdout, "data")[-2:] == ["-", "ok"]
    assert droplet.times == 0
    quiet = changes(sim.requests)
    assert listed(home)[0]["found"] is None
    home.configure()
    before = len(sim.requests)
    run(home)
    calls = sim.requests[before:]
    assert droplet.times == 1
    assert changes(calls) == quiet
    home.configure(check="sometimes")
    assert '"check" must be one of "mount", "fsck", "none"' in run(home, expect=2).stderr


@pytest.mark.small
def test_what_was_there_and_is_not(sim: Simulator, home: Home, data: Volume) -> None:
    run(home)
    luks(data.path)
    write_at(data.path, 1024, bytes(1024))
    for _ in range(2):  # the second one, too
        time.sleep(1.1)
        done = run(home, expect=1)
        assert "it does not come up: LUKS, where there was ext4 with " in done.stderr
    home.configure(check="none")
    time.sleep(1.1)
    run(home)
    home.configure()
    time.sleep(1.1)
    assert cells(run(home).stdout, "data")[-2:] == ["LUKS", "ok"]  # so it can be told that this is meant


@pytest.mark.small
@pytest.mark.parametrize(("make", "named"), [(lvm, "LVM"), (raid, "a RAID member")])
def test_a_part_of_something_is_not_taken_by_the_droplet(
    sim: Simulator, home: Home, make: Callable[[Path], None], named: str
) -> None:
    """As lvm2 and mdadm do with what appears, where they are installed; then it could not be read."""
    volume = add_volume(sim, "data")
    make(volume.path)
    assert cells(run(home).stdout, "data")[-2:] == [named, "ok"]
    assert same(home.image("data"), volume.path)


@pytest.mark.small
def test_what_hangs_holds_nothing_up(sim: Simulator, home: Home, data: Volume, tmp_path: Path) -> None:
    other = file_system(sim, "other", tmp_path)
    sim.faults.add(Droplet(tmp_path, r"import re, time; re.search(rb'-0\W', program[-60:]) and time.sleep(3600)").fault)
    done = run(home, constants={"STALL_LIMIT": 10})
    assert cells(done.stdout, "data")[-2:] == ["not tried", "ok"]
    assert cells(done.stdout, "other")[-2:] == ["ext4, 0 % full", "ok"]
    silent = "the connection to the droplet was silent for 10 s"
    assert f"warning: data: whether it comes up is not known: {silent}" in done.stderr
    assert "connecting again" not in done.stderr
    assert same(home.image("other"), other.path)
    assert_nothing_left(sim)


@pytest.mark.small
def test_looks_that_take_long_are_no_reason_to_lose_the_droplet(
    sim: Simulator, home: Home, data: Volume, tmp_path: Path
) -> None:
    """Each holds one of the droplet's places, and it is not busy for that."""
    others = [add_volume(sim, f"e{number}") for number in range(9)]
    sim.faults.add(dataclasses.replace(Droplet(tmp_path, "import time; time.sleep(15)").fault, times=99))
    done = run(home, constants={"BUSY_LIMIT": 9})
    assert {cells(done.stdout, volume.name)[-2] for volume in others} == {"no file system"}
    assert cells(done.stdout, "data")[-2] == "ext4, 0 % full"
    assert changes(sim.requests)["POST", "droplets"] == 1
    assert_nothing_left(sim)


@pytest.mark.small
def test_a_look_that_was_begun_is_not_repeated(sim: Simulator, home: Home, data: Volume, tmp_path: Path) -> None:
    """It may have changed the clone: what it saw, the next one would not."""
    look(data.path)
    call("debugfs", "-w", "-R", "set_super_value last_orphan 3", data.path)
    ending = 'program = program.replace(b"os.write(output, json", b"os._exit(0); (output, json")'
    droplet = Droplet(tmp_path, ending)
    sim.faults.add(droplet.fault)
    assert cells(run(home).stdout, "data")[-2:] == ["not tried", "ok"]
    assert droplet.times == 1


@pytest.mark.small
@pytest.mark.parametrize("places", [7, 2])
def test_many_that_hang_do_not_wait_for_each_other(
    sim: Simulator, home: Home, data: Volume, tmp_path: Path, places: int
) -> None:
    """The limit on time is for all of them that have not begun, too, also while others wait for their places."""
    others = [add_volume(sim, name) for name in ("e", "f")]
    droplet = Droplet(tmp_path, "import time; time.sleep(3600)")
    sim.faults.add(droplet.fault)
    done = run(home, constants={"STALL_LIMIT": 15, "CHECK_LIMIT": 1, "MOST_CHECKS": 1, "PLACES": places})
    assert droplet.times == 2  # of the first one, on another connection too
    for volume in others:
        told = f"warning: {volume.name}: whether it comes up is not known: other volumes' looks took 1 s"
        assert told in done.stderr
    assert_backed_up(home, data, *others)
    assert_nothing_left(sim)


@pytest.mark.small
@pytest.mark.parametrize("instead", ["sys.exit(0)", "print('no' * 99); sys.stdout.flush()", "os.kill(os.getpid(), 9)"])
def test_a_droplet_that_does_not_answer(sim: Simulator, home: Home, data: Volume, tmp_path: Path, instead: str) -> None:
    sim.faults.add(Droplet(tmp_path, instead).fault)
    done = run(home)
    assert cells(done.stdout, "data")[-2:] == ["not tried", "ok"]
    assert "warning: data: whether it comes up is not known: " in done.stderr
    assert same(home.image("data"), data.path)
    assert_nothing_left(sim)


@pytest.mark.small
def test_a_droplet_that_goes_in_the_middle(sim: Simulator, home: Home, data: Volume, tmp_path: Path) -> None:
    droplet = Droplet(tmp_path, "import time; time.sleep(3600)")
    sim.faults.add(droplet.fault)
    running = start(home, constants={"STALL_LIMIT": 6, "RECONNECT_LIMIT": 6})
    until(lambda: droplet.times)
    sim.remove_droplet(sim.droplets[0])
    assert running.end() == 0
    assert cells(running.output, "data")[-2:] == ["not tried", "ok"]
    assert same(home.image("data"), data.path)
    assert_nothing_left(sim)


@pytest.mark.small
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle(sim: Simulator, home: Home, data: Volume, tmp_path: Path, number: int) -> None:
    droplet = Droplet(tmp_path, "import time; time.sleep(3600)")
    sim.faults.add(droplet.fault)
    running = start(home)
    until(lambda: droplet.times)
    running.signal(number)
    assert running.end() == 128 + number
    assert same(home.image("data"), data.path)
    assert_nothing_left(sim)
    sim.faults.clear()
    time.sleep(1.1)
    assert cells(run(home).stdout, "data")[-2:] == ["ext4, 0 % full", "ok"]


@pytest.mark.small
def test_the_new_volume_of_a_restore(sim: Simulator, home: Home, data: Volume) -> None:
    run(home)
    done = run(home, "restore", "data", "--to-volume", "data-2")
    assert "data-2: ext4, 0 % full" in done.stdout
    new = next(volume for volume in sim.volumes if volume.name == "data-2")
    assert same(new.path, data.path)  # not what the trial has made of the throwaway one
    damaged_descriptors(data.path)
    time.sleep(1.1)
    run(home, expect=1)
    done = run(home, "restore", "data", "--to-volume", "data-3", expect=1)
    assert "warning: data of " in done.stderr
    assert "error: data-3: DOES NOT COME UP: EXT4-fs (" in done.stderr
    assert same(next(volume for volume in sim.volumes if volume.name == "data-3").path, data.path)


# -- weeks


def test_the_newest_good_version_stays(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path, dosvob.Keep(3, 0, 0, 0))
    good = dosvob.Finding("ext4", used=MIB, size=2 * MIB, came_up=True)
    bad = dosvob.Finding("ext4", came_up=False, words="EXT4-fs (sda): group descriptors corrupted!")
    unknown = dosvob.Finding(words="the connection broke")
    last_good = ""
    for number in range(1, 61):
        lineage.go_on()
        dosvob.State.note(lineage.paths, good if number < 20 else bad if number % 3 else unknown)
        dosvob.Versions(lineage.paths).thin(lineage.keep)
        times = lineage.check(lambda depths: depths[-1:]) if number % 20 == 0 else versions_listed(lineage.backups)
        last_good = times[0] if number == 19 else last_good
        assert len(times) == min(number, 4 + (number > 22))
        assert not last_good or last_good in times
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert [version.found.came_up for version in chain.versions if version.found][-1]
    lineage.go_on()
    dosvob.State.note(lineage.paths, good)
    dosvob.Versions(lineage.paths).thin(lineage.keep)
    assert last_good not in lineage.check()  # a newer one came up


def test_the_newest_good_version_stays_while_nobody_looks(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path, dosvob.Keep(1, 0, 0, 0))
    lineage.go_on()
    dosvob.State.note(lineage.paths, dosvob.Finding("ext4", used=MIB, size=2 * MIB, came_up=True))
    (good,) = versions_listed(lineage.backups)
    for _ in range(4):
        lineage.go_on()
        dosvob.State.note(lineage.paths, None)
        dosvob.Versions(lineage.paths).thin(lineage.keep)
    assert good in lineage.check()
    assert "kept as the last that came up" in listing_of(lineage)


def listing_of(lineage: Lineage) -> str:
    """What `list` says of it."""
    listing = dosvob.Listing(dosvob.Home(lineage.backups), lambda _: None)
    return listing.text(listing.of(lineage.paths))


def test_states_and_versions_without_it_stay_readable(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path)
    lineage.go_on(3)
    for path in (lineage.paths.state, *lineage.paths.versions.iterdir()):
        kind = "state" if path == lineage.paths.state else "version"
        content = dosvob.unseal(kind, path.read_bytes()[:PAGE], path)
        assert content is not None
        del content["found"]  # as older ones are
        write_at(path, 0, dosvob.seal(kind, content))
    lineage.check()
    listing = dosvob.Listing(dosvob.Home(lineage.backups), lambda _: None)
    assert [version["found"] for version in listing.of(lineage.paths)["versions"]] == [None] * 3
    lineage.go_on()
    dosvob.State.note(lineage.paths, dosvob.Finding("xfs", came_up=True))
    lineage.check()
