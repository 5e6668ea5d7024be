"""`list`, `restore`, `verify` and `health` with versions, as a user calls them; no account is needed."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SCRIPT, write_at, write_out
from crash_support import power_cut_at
from simulator.storage import mounted
from versions_support import (
    MIB,
    NAME,
    PAGE,
    Lineage,
    back_up,
    digest,
    file_name,
    leave_written,
    listed,
    scatter,
)

import dosvob

ALL = dosvob.Keep(last=100)
ZONE = "Asia/Kolkata"  # five hours and a half


class User(Lineage):
    """Somebody in a directory with backups/ and nothing else."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, ALL)
        self.directory = directory

    def command(self, *arguments: object) -> list[str]:
        """The command line of the script."""
        return [sys.executable, str(SCRIPT), *map(str, arguments)]

    def run(self, *arguments: object, expect: int = 0, zone: str = ZONE) -> str:
        """Run the script; returns all that it said, which is never a traceback."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env={**os.environ, "TZ": zone},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        said = done.stdout + done.stderr
        assert done.returncode == expect, said
        assert "Traceback" not in said
        assert "unexpected" not in said
        return said

    def restore(self, *arguments: object, zone: str = ZONE) -> str:
        """The time, as files are named, of what `restore` brings with these arguments into a new file."""
        target = self.directory / "restored.img"
        target.unlink(missing_ok=True)
        with pytest.MonkeyPatch.context() as patches:  # in this process, which is faster
            patches.setenv("TZ", zone)
            patches.chdir(self.directory)
            time.tzset()
            parsed = dosvob.parse_arguments(["restore", NAME, str(target), *map(str, arguments)])
            assert dosvob.run_command(parsed, dosvob.Reporter(quiet=True), dosvob.Stop()) == 0
        time.tzset()
        return self.time_of(target)

    def time_of(self, file: Path) -> str:
        """When the volume was such."""
        found = digest(file.read_bytes())
        return next(time for time, known in self.truth.items() if known == found)


@pytest.fixture
def user(tmp_path: Path) -> User:
    """Four backups, a day between them; the volume grew before the third one."""
    made = User(tmp_path)
    made.go_on(2, 24)
    made.size += MIB
    made.go_on(2, 24)
    return made


def everything(directory: Path) -> dict[str, Any]:
    """All that can be told of the files below a directory, but for the lock's, into which its holders write."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ctime_ns, path.is_file() and path.read_bytes())
        for path in [directory, *directory.rglob("*")]
        if path.name != "lock"
    }


# -- list


def test_list_says_what_is_there(user: User) -> None:
    said = user.run("list")
    lines = said.splitlines()
    assert lines[0].startswith(f"{NAME}: fra1, 6.0 MiB, takes ")
    assert "for older versions" in lines[0]
    rows = lines[2:]
    assert len(rows) == 4
    zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
    for row, name in zip(rows, sorted(user.truth, reverse=True), strict=True):
        moment = datetime.datetime.strptime(name, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC).astimezone(zone)
        assert row.strip().startswith(moment.strftime("%Y-%m-%d %H:%M:%S +0530"))
    assert rows[0].rstrip().endswith("the image")
    assert user.run("list", NAME) == said


def test_list_for_programs(user: User) -> None:
    (volume,) = json.loads(user.run("list", "--json"))["volumes"]
    assert {key: volume[key] for key in ("name", "region", "size", "problem")} == {
        "name": NAME,
        "region": "fra1",
        "size": 6 * MIB,
        "problem": None,
    }
    moments = [datetime.datetime.fromisoformat(version["time"]) for version in volume["versions"]]
    assert [file_name(moment.astimezone(datetime.UTC)) for moment in moments] == sorted(user.truth, reverse=True)
    assert [version["image"] for version in volume["versions"]] == [True, False, False, False]
    assert not any(version["damaged"] for version in volume["versions"])
    for version, path in zip(volume["versions"][1:], sorted(user.paths.versions.iterdir(), reverse=True), strict=True):
        assert version["occupied"] == path.stat().st_size
        assert 0 < version["frees"] <= version["occupied"]
        assert version["changed"] > 0
    # what it says of a removal is what that frees
    before = sum(path.stat().st_size for path in user.paths.versions.iterdir())
    first = volume["versions"][1]
    versions = dosvob.Versions(user.paths)
    newest, second, _ = versions.all()
    versions._merge([newest, second], lambda _: None)  # as thinning does
    versions._remove([newest])
    after = sum(path.stat().st_size for path in user.paths.versions.iterdir())
    assert before - after == first["frees"]


@pytest.mark.parametrize("name", ["20261399T000000Z", "notes.txt", "20260101T000000Z/notes.txt"])
def test_what_is_no_version_is_not_touched(user: User, name: str) -> None:
    """By its name, which has no time that can be, or because it is a directory."""
    (user.paths.versions / name).parent.mkdir(exist_ok=True)
    (user.paths.versions / name).write_text("somebody's")
    user.go_on()
    user.run("verify")
    there = {path.name for path in user.paths.versions.iterdir()} - {Path(name).parts[0]}
    assert {version.path.name for version in dosvob.Versions(user.paths).all()} == there
    user.run("list")
    assert (user.paths.versions / name).read_text() == "somebody's"


def test_list_shows_the_versions_of_an_image_that_is_gone(user: User) -> None:
    """The next backup sets them aside; the user must see what takes the room."""
    (user.backups / NAME).unlink()
    user.go_on(1)
    lines = user.run("list").splitlines()
    (aside,) = [number for number, line in enumerate(lines) if line.startswith(f"{NAME}.set-aside-")]
    assert "the image is missing" in lines[aside + 1]
    assert len(lines[aside + 3 :]) == 3


def test_list_of_nothing_and_of_what_is_not_there(tmp_path: Path, user: User) -> None:
    assert "did you mean data?" in user.run("list", "dat", expect=2)
    assert "did you mean data?" in user.run("restore", "dato", "file", expect=2)
    (tmp_path / "empty").mkdir()
    assert "no backup" in user.run("--backups", "empty", "list")
    assert json.loads(user.run("--backups", "empty", "list", "--json")) == {"volumes": [], "remains": []}
    assert "there is no missing" in user.run("--backups", "missing", "list", expect=2)


# -- restore, by time


def test_restore_without_a_time_is_the_latest(user: User) -> None:
    assert user.restore() == file_name(user.now)


def test_every_way_to_say_a_time(user: User) -> None:
    times = sorted(user.truth)
    assert times[1] == "20150202T203000Z"
    for text in (
        "2015-02-03 02:00:00 +0530",  # as `list` prints it
        "2015-02-03 02:00:00+05:30",
        "2015-02-02 20:30:00 +0000",
        "2015-02-02T20:30:00Z",
        "20150202T203000Z",  # as the file is named
        "2015-02-02 21:30 +01:00",
        "2015-02-03 02:00",  # local
        "2015-02-03T02:00:01",
        "2015-02-03",  # to the end of that day here, when the next one was not yet
        "20150203",
        "2015-02-04 01:59:59",
    ):
        assert user.restore("--at", text) == times[1], text
    assert user.restore("--at", "2015-02-03 01:59:59") == times[0]
    assert user.restore("--at", "2015-02-02", zone="UTC") == times[1]
    assert user.restore("--at", "2015-02-02", zone="Asia/Kolkata") == times[0]
    assert user.restore("--at", "2030-01-01") == times[3]


def test_every_line_of_list_can_be_given_back(user: User) -> None:
    for zone in (ZONE, "America/St_Johns", "UTC"):
        rows = user.run("list", zone=zone).splitlines()[2:]
        for row, time_ in zip(rows, sorted(user.truth, reverse=True), strict=True):
            assert user.restore("--at", row.strip()[:25], zone=zone) == time_
    for version in json.loads(user.run("list", "--json"))["volumes"][0]["versions"]:
        found = user.restore("--at", version["time"])
        assert found == file_name(datetime.datetime.fromisoformat(version["time"]))


def test_yesterday_and_days_ago(tmp_path: Path) -> None:
    user = User(tmp_path)
    user.now = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - datetime.timedelta(days=5, hours=1)
    user.go_on(5, 24)  # 4 d 1 h ago, 3 d 1 h ago, …, 1 h ago
    times = sorted(user.truth)
    assert user.restore("--at", "3 days ago") == times[1]
    assert user.restore("--at", "1 day ago") == times[3]
    assert user.restore("--at", "1 hour ago") == times[4]
    assert user.restore("--at", "2 hours ago") == times[3]
    assert user.restore("--at", "today") == times[4]
    midnight = datetime.datetime.now(datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    expected = max(name for name in times if name < file_name(midnight))
    assert user.restore("--at", "yesterday", zone="UTC") == expected
    assert "as old as" in user.run("restore", NAME, "file", "--at", "2 weeks ago", expect=2)


def test_a_time_before_the_oldest_and_what_is_no_time(user: User) -> None:
    said = user.run("restore", NAME, "file", "--at", "2015-02-01", expect=2)
    assert "the oldest is of 2015-02-02 02:00:00 +0530" in said
    for text in ("soon", "", "2026-13-01", "99999999 days ago", "0001-01-01", "9999-12-31", "tomorrow"):
        if text in ("0001-01-01", "9999-12-31", ""):
            continue
        assert "is not a time" in user.run("restore", NAME, "file", "--at", text, expect=2), text
    user.run("restore", NAME, "file", "--at", "0001-01-01", expect=2)
    assert not (user.directory / "file").exists()


# -- restore, into a file


@pytest.mark.parametrize("suffix", ["", ".partial", ".damaged"])
def test_nothing_is_restored_over_a_file(user: User, suffix: str) -> None:
    there = user.directory / f"file{suffix}"
    there.write_text("mine")
    said = user.run("restore", NAME, "file", expect=1)
    assert str(there.name) in said
    assert "nothing is restored over it" in said
    assert there.read_text() == "mine"
    assert [path.name for path in user.directory.glob("file*")] == [there.name]
    there.unlink()
    there.symlink_to("nowhere")
    user.run("restore", NAME, "file", expect=1)


def test_a_file_that_appears_meanwhile_is_not_replaced(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    target = user.directory / "file"

    def appear(size: int) -> None:
        target.write_text("mine")

    with contextlib.closing(dosvob.Chain(user.paths)) as chain, pytest.raises(dosvob.DosvobError, match="appeared"):
        chain.restore(1, target, appear)
    assert target.read_text() == "mine"
    assert not target.with_name("file.partial").exists()


def test_the_place_for_the_file_is_wrong(user: User) -> None:
    assert "nowhere/file" in user.run("restore", NAME, "nowhere/file", expect=1)
    user.run("restore", NAME, user.directory, expect=2)
    user.run("restore", NAME, expect=2)
    user.run("restore", NAME, "one", "two", expect=2)


def test_a_restored_file_is_sparse(tmp_path: Path) -> None:
    user = User(tmp_path)
    user.size = 64 * MIB
    user.go_on(3)
    for depth in range(3):
        with contextlib.closing(dosvob.Chain(user.paths)) as chain:
            final, _ = chain.restore(depth, tmp_path / str(depth), lambda size: None)
        assert final.stat().st_size == 64 * MIB
        assert final.stat().st_blocks * 512 <= user.paths.image.stat().st_blocks * 512 + 3 * MIB
    assert user.restore("--at", "3000-01-01") == file_name(user.now)


def test_only_its_owner_may_read_a_restored_file(user: User) -> None:
    user.restore()
    assert (user.directory / "restored.img").stat().st_mode & 0o777 == 0o600


# -- damage


def flip(path: Path, offset: int) -> None:
    """Have one byte decay; the file's times stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def middle_of_data(path: Path) -> int:
    """A byte in the data of a version's last patch but one."""
    with dosvob.PatchFile(path, "version") as file:
        places = [position for position, patch in file.patches(data=False) if patch.filled]
    return places[len(places) // 2] + dosvob.Patch.HEADER.size + 100


@pytest.mark.parametrize("where", ["data", "head", "end", "cut"])
def test_a_damaged_version_is_named_and_the_rest_restored(user: User, where: str) -> None:
    versions = sorted(user.paths.versions.iterdir(), reverse=True)
    victim = versions[1]
    intact = victim.read_bytes()
    if where == "cut":
        os.truncate(victim, victim.stat().st_size - PAGE - 1000)
    else:
        size = victim.stat().st_size
        flip(victim, {"data": middle_of_data(victim), "head": 50, "end": size - 50}[where])
    assert user.restore() == file_name(user.now)
    assert user.restore("--at", versions[0].name) == versions[0].name
    for version in versions[1:]:
        target = user.directory / "target"
        # With the end nothing but the number of its patches is lost, and the last one is of the last chunk; with the
        # head what it leads back from, which costs nothing that the older one has itself.
        if where == "end" or (where == "head" and version != victim):
            assert user.restore("--at", version.name) == version.name
            continue
        said = user.run("restore", NAME, target, "--at", version.name, expect=1)
        assert "is damaged in bytes " in said
        assert not target.exists()
        assert not target.with_name("target.partial").exists()
        rest = target.with_name("target.damaged")
        # what is not named is as it was
        named = said.split("is damaged in bytes ")[1].split(";")[0]
        ranges = [tuple(map(int, part.split(" to "))) for part in named.split(", ")]
        truth = user.directory / "truth"
        victim_now = victim.read_bytes()
        victim.write_bytes(intact)
        user.run("restore", NAME, truth, "--at", version.name)
        victim.write_bytes(victim_now)
        restored, true = bytearray(rest.read_bytes()), truth.read_bytes()
        assert len(restored) >= len(true)  # how long it was is in the head
        for start, last in ranges:
            restored[start : last + 1] = true[start : last + 1]
        assert restored == true
        rest.unlink()
        truth.unlink()
    said = user.run("verify", expect=1)
    assert said.count("cannot be restored in bytes") == {"end": 0, "head": 1}.get(where, 2)
    assert "is sound" not in said
    described = json.loads(user.run("list", "--json"))["volumes"][0]["versions"]
    if where != "data":
        assert described[2]["damaged"]
        assert victim.name in user.run("verify", expect=1)
        assert victim.name in user.run("health", "--max-age", "1e6", expect=1)


def test_damage_of_the_image_is_that_of_what_still_has_it(user: User) -> None:
    """An older version whose own pages replace what decayed is right; others are named."""
    state = dosvob.State.load(user.paths.state)
    assert state is not None
    with dosvob.PatchFile(sorted(user.paths.versions.iterdir())[-1], "version") as newest:
        patch = next(patch for _, patch in newest.patches() if patch.filled)
    page = next(page for page in range(256) if patch.filled >> page & 1)
    flip(user.paths.image, patch.index * MIB + page * PAGE + 5)
    said = user.run("verify", expect=1)
    assert f"differs from its snapshot in bytes {patch.index * MIB} to {(patch.index + 1) * MIB - 1}" in said
    assert "cannot be restored" not in said
    user.run("restore", NAME, "file", expect=1)
    assert (user.directory / "file.damaged").exists()
    for time_ in sorted(user.truth)[:-1]:
        assert user.restore("--at", time_) == time_


def test_verify_and_health_know_versions(user: User) -> None:
    assert "sound, 6.0 MiB, and 3 older versions" in user.run("verify")
    assert "back to 2015-02-02 02:00:00 +0530" in user.run("health", "--max-age", "1e6")


# -- where it is restored from


def test_a_copy_elsewhere_without_anything_else(user: User, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(user.backups, other / "copy")
    shutil.rmtree(user.backups)
    (other / "copy" / ".dosvob" / "lock").unlink()
    user.directory = other
    before = everything(other / "copy")
    for time_ in user.truth:
        assert user.restore("--backups", "copy", "--at", time_) == time_
    user.run("list", "--backups", "copy")
    assert everything(other / "copy") == before


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """The directory cannot be changed."""
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_read_only_copy(user: User) -> None:
    with read_only(user.backups):
        for time_ in user.truth:
            assert user.restore("--at", time_) == time_
        assert user.run("list").count("\n") == 6
        user.run("health", "--max-age", "1e6")


def test_an_undo_is_laid_over_what_is_read_and_not_put_back(user: User) -> None:
    before_it = dict(user.truth)
    user.size += MIB
    user.change()
    user.pass_time()
    leave_written(user.backups, user.device, user.now)
    before = everything(user.backups)
    assert user.restore() == max(before_it)
    for time_ in before_it:
        assert user.restore("--at", time_) == time_
    user.run("list")
    assert everything(user.backups) == before
    # when it was put back in part it is the same
    with (
        contextlib.closing(dosvob.SparseFile(user.paths.image, os.O_RDWR)) as image,
        dosvob.PatchFile(user.paths.undo, "version") as undo,
    ):
        for _, patch in list(undo.patches())[:3]:
            patch.write_to(image)
    for time_ in before_it:
        assert user.restore("--at", time_) == time_
    assert "an interrupted backup was taken back" in user.run("verify")
    assert not user.paths.undo.exists()
    for time_ in before_it:
        assert user.restore("--at", time_) == time_


def test_what_was_set_aside_is_listed_and_restored(user: User) -> None:
    """A volume is made anew under its name: its image goes aside with its versions."""
    before = sorted(user.truth)
    warnings: list[str] = []
    scatter(user.device, 99, 3 * MIB)
    user.pass_time()
    back_up(user.backups, user.device, user.now, ALL, volume_id="volume-2", warn=warnings.append)
    assert "was set aside" in warnings[0]
    aside = f"{NAME}.set-aside-{before[-1]}"
    said = user.run("list")
    assert f"{aside}: fra1" in said
    assert user.restore() == file_name(user.now)
    assert [volume["name"] for volume in json.loads(user.run("list", "--json"))["volumes"]] == [NAME, aside]
    for time_ in before:
        user.run("restore", aside, "file", "--at", time_)
        assert user.time_of(user.directory / "file") == time_
        (user.directory / "file").unlink()
    assert "3 older versions" in user.run("verify", aside)
    assert "as old as" in user.run("restore", NAME, "file", "--at", before[-1], expect=2)


# -- room, file systems and signals


def test_too_little_room(user: User) -> None:
    write_at(user.device, 0, os.urandom(2 * MIB))
    user.go_on()
    place = user.directory / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "dosvob-test", place], check=True)
    try:
        said = user.run("restore", NAME, place / "file", expect=1)
        assert "are free there: make room" in said
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", place], check=True)


def disk_use(path: Path) -> int:
    """The bytes that are used on the file system."""
    write_out(path)
    room = os.statvfs(path)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


@contextlib.contextmanager
def sharing(directory: Path, kind: str) -> Iterator[tuple[User, Path]]:
    """Somebody on a file system whose files can share what they have; and the disk that it is on."""
    if not shutil.which(f"mkfs.{kind}") or kind not in Path("/proc/filesystems").read_text():
        pytest.skip(f"there is no {kind} here")
    size, options = {"btrfs": (128 * MIB, ["-M"]), "xfs": (320 * MIB, ["-m", "reflink=1"])}[kind]
    disk = directory / "disk"
    with disk.open("wb") as file:
        file.truncate(size)
    subprocess.run([f"mkfs.{kind}", "-q", *options, disk], check=True, capture_output=True)
    with mounted(disk, directory / "mounted") as root:
        yield User(root), disk


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_restore_takes_no_room_where_files_can_share(tmp_path: Path, kind: str) -> None:
    with sharing(tmp_path, kind) as (user, _):
        root = user.directory
        user.size = 24 * MIB
        with user.device.open("wb") as file:
            file.write(os.urandom(24 * MIB))
        user.go_on(3)
        before = disk_use(root)
        for number, time_ in enumerate(user.truth):
            user.run("restore", NAME, root / f"file-{number}", "--at", time_)
        assert disk_use(root) - before < 3 * 4 * MIB
        for number, time_ in enumerate(user.truth):
            assert user.time_of(root / f"file-{number}") == time_
        # and what is written to there does not change the image
        write_at(root / "file-0", 0, os.urandom(24 * MIB))
        assert user.restore() == file_name(user.now)
        user.go_on(1)
        assert len(user.check()) == 4


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_zeros_are_restored_where_the_image_that_is_shared_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with sharing(tmp_path, kind) as (user, _):
        user.device.write_bytes(os.urandom(2 * MIB) + bytes(3 * MIB))
        user.pass_time()
        user.back_up()
        write_at(user.device, 2 * MIB, os.urandom(MIB))
        user.pass_time()
        user.back_up()
        chunk = dosvob.SparseFile.chunk

        def fail(file: dosvob.SparseFile, index: int) -> bytes | None:
            return None if index == 2 and file.path == user.paths.image else chunk(file, index)

        monkeypatch.setattr(dosvob.SparseFile, "chunk", fail)
        with contextlib.closing(dosvob.Chain(user.paths)) as chain:
            final, damaged = chain.restore(1, user.directory / "file", lambda size: None)
        assert not damaged.ranges
        assert digest(final.read_bytes()) == user.truth[listed(user.backups)[1]]


def test_what_a_restored_file_shares_was_read_from_the_disk(tmp_path: Path) -> None:
    """And not from the cache, which may have what never got there."""
    with sharing(tmp_path, "xfs") as (user, disk):
        user.device.write_bytes(os.urandom(5 * MIB))
        user.pass_time()
        user.back_up()
        write_out(user.paths.image)
        known = user.paths.image.read_bytes()
        place = disk.read_bytes().index(known[3 * MIB : 3 * MIB + PAGE])
        assert user.paths.image.read_bytes() == known  # it is in the cache, whatever went from there meanwhile
        write_at(disk, place, b"decay")
        assert user.paths.image.read_bytes() == known
        said = user.run("restore", NAME, user.directory / "file", expect=1)
        assert f"is damaged in bytes {3 * MIB} to {4 * MIB - 1}" in said


def test_a_file_that_could_share_a_part_only_has_nothing_of_that_part(
    user: User, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    user.device.write_bytes(bytes(user.size))
    user.pass_time()
    user.back_up()
    user.go_on(1)

    def share_a_part(target: int, _request: int, source: int) -> None:
        os.pwrite(target, os.pread(source, user.size, 0), 0)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "ioctl", share_a_part)
    with contextlib.closing(dosvob.Chain(user.paths)) as chain:
        final, damaged = chain.restore(1, tmp_path / "file", lambda size: None)
    assert not damaged.ranges
    assert final.read_bytes() == bytes(user.size)


def test_a_list_is_of_what_is_left_when_versions_are_thinned_meanwhile(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest = sorted(user.paths.versions.iterdir())[0]
    freed_by = dosvob.Versions.freed_by

    def thin_first(version: dosvob.Version, older: dosvob.Version | None, *more: Callable[[int], None]) -> int:
        if older is not None and older.path == oldest:
            oldest.unlink(missing_ok=True)
        return freed_by(version, older, *more)

    before = len(listed(user.backups))
    monkeypatch.setattr(dosvob.Versions, "freed_by", thin_first)
    monkeypatch.chdir(user.directory)
    found = dosvob.Listing(dosvob.Home(user.backups), lambda size: None).of(user.paths)
    assert [version["damaged"] for version in found["versions"]] == [False] * (before - 1)


def test_list_tells_of_an_image_that_is_still_to_be_put_back(user: User) -> None:
    """Whoever mounts it without dosvob would get parts of two snapshots."""
    user.change()
    user.pass_time()
    leave_written(user.backups, user.device, user.now, keep=ALL)
    told = "an interrupted backup must still be taken back: "
    assert told in user.run("list")
    user.paths.state.rename(user.directory / "state")
    assert told in json.loads(user.run("list", "--json"))["volumes"][0]["problem"]
    (user.directory / "state").rename(user.paths.state)
    with dosvob.Home(user.backups).locked():
        assert told not in user.run("list")  # somebody is at it
    user.run("verify")
    assert told not in user.run("list")


def test_a_version_whose_beginning_is_lost_with_the_power_costs_what_it_leads_back_to(user: User) -> None:
    """The image is whole, and its state counts."""
    user.change()
    user.pass_time()
    with power_cut_at(dosvob.Undo, "settle"):
        back_up(user.backups, user.device, user.now, ALL)
    write_at(user.paths.undo, 0, bytes(PAGE))
    assert user.restore() == file_name(user.now)
    assert "is damaged in" in user.run("restore", NAME, "older", "--at", sorted(user.truth)[-2], expect=1)
    user.run("verify", expect=1)
    assert user.restore() == file_name(user.now)


def test_zeros_that_were_cut_from_an_image_are_no_damage(user: User) -> None:
    """To a restore, which knows that they were zeros; the image's length is told."""
    write_at(user.device, 2 * MIB, bytes(user.size - 2 * MIB))
    user.pass_time()
    user.back_up()
    os.truncate(user.paths.image, 2 * MIB)
    assert user.restore() == file_name(user.now)
    assert f"the image's size is {2 * MIB} bytes, and {user.size} were backed up" in user.run("verify", expect=1)


def test_nothing_is_called_sound_whose_digests_are_not_known(user: User) -> None:
    user.paths.state.unlink()
    said = user.run("verify")
    assert "no digests are recorded yet" in said
    assert "sound" not in said
    os.truncate(user.paths.image, 3 * MIB)
    assert f"the image's size is {3 * MIB} bytes, and {user.size} were backed up" in user.run("verify", expect=1)
    assert f"is damaged in bytes {3 * MIB} to" in user.run("restore", NAME, "file", expect=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    user = User(tmp_path)
    user.go_on(1, 4)
    target = tmp_path / "file"
    begun = ("-P", str(target.with_name("file.partial")), "-e", "trace=ftruncate")
    at_work = ("strace", "-f", "-qq", "-o", "/dev/null", *begun, f"--inject=ftruncate:signal={number.name}:when=1")
    done = subprocess.run(
        [*at_work, *user.command("restore", NAME, target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 128 + number, said
    assert not list(tmp_path.glob("file*"))
    assert "Traceback" not in said


def test_a_restore_waits_for_nobody(user: User) -> None:
    """While a backup is at work, that is said; while another restore is, it goes on."""
    with dosvob.Home(user.backups).locked():
        assert "at work" in user.run("restore", NAME, "file", expect=2)
        user.run("list")
    with dosvob.Home(user.backups).unchanged():
        assert user.restore() == file_name(user.now)
    assert len(listed(user.backups)) == 4


@pytest.mark.parametrize("where", ["data", "header", "end"])
def test_only_what_is_damaged_of_a_version_is_lost(user: User, where: str) -> None:
    """One bit in one patch costs that patch, and not what comes behind it."""
    path = sorted(user.paths.versions.iterdir())[-1]
    with contextlib.closing(dosvob.PatchFile(path, "version")) as file:
        positions = [position for position, _ in file.patches()]
        patches = [patch for _, patch in file.patches()]
    assert len(patches) > 2
    place = {"data": positions[1] + dosvob.Patch.HEADER.size + 7, "header": positions[1] + 6}.get(where, 0)
    write_at(path, place or path.stat().st_size - 100, b"decay")
    with contextlib.closing(dosvob.Chain(user.paths)) as chain:
        told = chain.verify(lambda size: None)[1]
        chunks, flawed = chain.size // MIB, chain.flawed
    lost = {place // MIB for start, end in told.ranges for place in range(start, end, MIB)}
    if where == "end":  # whether there were more patches at the end of it nobody knows
        assert lost == set(range(patches[-1].index + 1, chunks))
    else:  # what a header says the index has too
        assert lost == {patches[1].index} - ({patches[1].index} if where == "header" else set())
        assert flawed == {1}


def test_a_restore_names_the_state_that_is_damaged(user: User) -> None:
    user.go_on()
    write_at(user.paths.state, 5000, b"damage")  # among the digests, which `list` does not read
    said = user.run("restore", NAME, "file")
    assert "not checked" in said
    assert f"{user.paths.state.name} is damaged" in said


@pytest.mark.parametrize("holder", ["", "a backup"])
@pytest.mark.parametrize("line", ["", "2026-01-01T00:00:00+00:00 a run that was killed"])
def test_who_reads_waits_for_one_who_has_the_lock_for_a_moment(
    user: User, monkeypatch: pytest.MonkeyPatch, holder: str, line: str
) -> None:
    """As another restore has, that begins: it says what it does when it has it. A run that goes on has said that."""
    user.go_on()
    with contextlib.ExitStack() as stack:
        stack.enter_context(dosvob.Home(user.backups, holder).locked(with_id=False))
        (user.paths.metadata / "lock").open("a").write(line)
        moments: list[float] = []

        def pass_(seconds: float) -> None:
            moments.append(seconds)
            if len(moments) == 2 and not holder:
                stack.close()

        monkeypatch.setattr(time, "sleep", pass_)
        with (
            pytest.raises(dosvob.Busy, match="a backup since") if holder else contextlib.nullcontext(),
            dosvob.Home(user.backups, "a restore").unchanged(),
        ):
            pass
    assert moments
