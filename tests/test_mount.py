"""`mount`: images and versions as files, through the kernel; while runs go on, and over what decayed."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SCRIPT, write_at
from mount_support import MIB, Direct, Shown, shown
from simulator.storage import LoopDevice, mounted
from version_reader import Reader
from versions_support import (
    NAME,
    PAGE,
    Lineage,
    back_up,
    digest,
    file_name,
    killed_at,
    leave_written,
    recover,
    text_of,
    thin,
)

import dosvob

ALL = dosvob.Keep(last=100)
FEW = dosvob.Keep(2, 0, 0, 0)


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    """Four backups, a day between them; the volume grew before the third one."""
    made = Lineage(tmp_path, ALL)
    made.go_on(2, 24)
    made.size += MIB
    made.go_on(2, 24)
    return made


def digest_of_tree(directory: Path) -> dict[str, str]:
    """All that the files below a directory have."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path): digest(path.read_bytes()) for path in files}


def run(*command: object) -> str:
    """Run a command, which must succeed; returns what it says."""
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def failed(*command: object) -> str:
    """What a command says that is wrong use."""
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def drop_caches() -> None:
    """Have the next reads come from the mount."""
    Path("/proc/sys/vm/drop_caches").write_text("1")


# -- what it shows


def test_each_version_is_a_file_with_its_time_size_and_bytes(lineage: Lineage, tmp_path: Path) -> None:
    before = digest_of_tree(lineage.backups)
    with shown(lineage.backups, tmp_path / "shown") as mount:
        assert sorted(path.name for path in mount.directory.iterdir()) == [NAME]
        assert mount.times(NAME) == sorted(lineage.truth, reverse=True)
        for moment, truth in lineage.truth.items():
            path = mount.path(NAME, moment)
            assert mount.digest(NAME, moment) == truth
            assert file_name(datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)) == moment
        sizes = [mount.path(NAME, moment).stat().st_size // MIB for moment in sorted(lineage.truth)]
        assert sizes == [5, 5, 6, 6]
        latest = mount.directory / NAME / "latest"
        assert digest(latest.read_bytes()) == lineage.truth[max(lineage.truth)]
        assert latest.readlink() == Path(mount.path(NAME, max(lineage.truth)).name)
        # what it is called is what --at takes
        name = mount.path(NAME, sorted(lineage.truth)[1]).name
        run(sys.executable, SCRIPT, "--backups", lineage.backups, "restore", NAME, tmp_path / "file", "--at", name)
        assert digest((tmp_path / "file").read_bytes()) == lineage.truth[sorted(lineage.truth)[1]]
        # programs that look for holes find them where zeros are, and nowhere else
        run("cp", "--sparse=auto", mount.directory / NAME / name, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    assert "4 snapshots" in mount.said
    assert digest_of_tree(lineage.backups) == before


def test_a_long_chain(tmp_path: Path) -> None:
    """More versions than a process may have files open: listed, shown, verified, restored and thinned."""
    lineage = Lineage(tmp_path, ALL, 1)
    contents = make_long_chain(lineage, 2000)
    command = [sys.executable, SCRIPT, "--backups", lineage.backups]
    assert len(run(*command, "list").splitlines()) == 2 + 2001
    assert "2000 older versions" in run(*command, "verify")
    oldest = min(contents)
    with shown(lineage.backups, tmp_path / "shown") as mount:
        assert len(mount.times(NAME)) == 2001
        for moment in (oldest, sorted(contents)[1000], max(contents)):
            assert mount.path(NAME, moment).read_bytes() == contents[moment]
        run(*command, "restore", NAME, tmp_path / "file", "--at", mount.path(NAME, oldest).name)
    assert (tmp_path / "file").read_bytes() == contents[oldest]
    thin(lineage.backups, dosvob.Keep(1, 0, 0, 8))
    for moment, content in Reader(lineage.backups, NAME).all():
        assert content == contents[moment]
    assert 2 < len(list(lineage.paths.versions.iterdir())) < 10


def make_long_chain(lineage: Lineage, count: int) -> dict[str, bytes]:
    """Versions of a volume of 1 MiB, of which some pages change each time."""
    chance, content, contents = random.Random(3), bytearray(os.urandom(MIB)), {}
    lineage.device.write_bytes(content)
    lineage.pass_time()
    lineage.back_up()
    state = dosvob.State.load(lineage.paths.state)
    assert state is not None
    lineage.paths.versions.mkdir()
    newest = state.snapshot
    contents[file_name(lineage.now)] = bytes(content)
    newer, moment = newest, lineage.now
    for _ in range(count):
        moment -= datetime.timedelta(hours=4)
        older = dataclasses.replace(newest, taken_at=text_of(moment))
        pages = sorted(chance.sample(range(256), 2))
        for page in pages:
            content[page * PAGE : (page + 1) * PAGE] = chance.choice((chance.randbytes, bytes))(PAGE)
        bitmap = sum(1 << page for page in pages)
        data = b"".join(bytes(content[page * PAGE : (page + 1) * PAGE]) for page in pages)
        head = {"id": chance.randbytes(16).hex(), "time": file_name(moment), "snapshot": dataclasses.asdict(older)}
        path = lineage.paths.versions / file_name(moment)
        with dosvob.PatchFile.create(path, "version", {**head, "newer": dataclasses.asdict(newer)}) as file:
            file.append(dosvob.Patch.of(0, bitmap, data, dosvob.digest_of(bytes(content))))
            file.complete()
        contents[file_name(moment)] = bytes(content)
        newer = older
    return contents


def test_versions_without_an_index_are_read_as_they_are(lineage: Lineage, tmp_path: Path) -> None:
    """As dosvob wrote them before: verified, listed, restored, shown, thinned; and the reader knows both."""
    for path in lineage.paths.versions.iterdir():
        without_index(path)
    lineage.go_on()
    assert lineage.check() == sorted(lineage.truth, reverse=True)
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert not any(ranges.ranges for ranges in chain.verify(lambda size: None))
    listing = dosvob.Listing(dosvob.Home(lineage.backups), lambda size: None).of(lineage.paths)
    assert all(version["frees"] for version in listing["versions"][1:])
    with shown(lineage.backups, tmp_path / "shown") as mount:
        for moment in mount.times(NAME):
            assert mount.digest(NAME, moment) == lineage.truth[moment]
    thin(lineage.backups, FEW)
    assert len(lineage.check()) == 3


def without_index(path: Path) -> None:
    """Make a version what it was in format 1."""
    with dosvob.PatchFile(path, "version") as file:
        assert file.footer is not None
        head, end, limit = file.head, {key: file.footer[key] for key in ("id", "changed")}, file.limit
    content = path.read_bytes()[PAGE:limit]
    path.write_bytes(dosvob.seal("version", {"version": 1, **head}) + content + dosvob.seal("end", end))


def test_volumes_of_several_regions_and_chosen_ones(tmp_path: Path) -> None:
    truth = {}
    for number, name in enumerate(("fra1/data", "nyc3/data", "nyc3/other")):
        device = tmp_path / "device"
        device.write_bytes(bytes([number + 1]) * MIB)
        directory = tmp_path / "backups"
        with dosvob.Home(directory).locked():
            dosvob.Home(directory).make_directory(name.partition("/")[0])
        back_up(directory, device, dosvob.utc_now(), ALL, name=name, volume_id=name)
        truth[name] = device.read_bytes()
    with shown(tmp_path / "backups", tmp_path / "shown") as mount:
        for name, content in truth.items():
            assert (mount.directory / name / "latest").read_bytes() == content
    with shown(tmp_path / "backups", tmp_path / "shown", "nyc3/*") as mount:
        found = {str(path.relative_to(mount.directory)) for path in mount.directory.glob("*/*")}
        assert found == {"nyc3/data", "nyc3/other"}


# -- written to, and nothing is changed


def test_what_is_written_is_gone_with_the_mount(lineage: Lineage, tmp_path: Path) -> None:
    before, chance = digest_of_tree(lineage.backups), random.Random(1)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with shown(lineage.backups, tmp_path / "shown", "--scratch", scratch) as mount:
        oldest, newest = min(lineage.truth), max(lineage.truth)
        path = mount.path(NAME, oldest)
        expected = bytearray(path.read_bytes())
        with path.open("r+b") as file:
            for _ in range(40):
                offset = chance.randrange(len(expected) - 3 * PAGE)
                data = chance.choice((chance.randbytes, bytes))(chance.choice((1, 100, PAGE, 3 * PAGE)))
                file.seek(offset)
                file.write(data)
                expected[offset : offset + len(data)] = data
            file.flush()
            offset, length = 2 * MIB - 3 * PAGE - 7, 5 * PAGE
            run("fallocate", "--punch-hole", "--offset", offset, "--length", length, path)
            expected[offset : offset + length] = bytes(length)
        drop_caches()
        assert path.read_bytes() == expected
        assert not list(scratch.iterdir())  # it has no name
        assert mount.digest(NAME, newest) == lineage.truth[newest]
        with pytest.raises(OSError, match="permitted"):
            os.truncate(path, 5)
        with path.open("r+b") as file, pytest.raises(OSError, match="too large"):
            os.pwrite(file.fileno(), b"more", len(expected) - 2)
    with shown(lineage.backups, tmp_path / "shown") as mount:
        assert mount.digest(NAME, oldest) == lineage.truth[oldest]
    assert digest_of_tree(lineage.backups) == before


def test_read_only(lineage: Lineage, tmp_path: Path) -> None:
    with shown(lineage.backups, tmp_path / "shown", "--read-only") as mount:
        for path in (mount.directory / NAME).iterdir():
            with pytest.raises(OSError, match="Read-only"):
                path.open("r+b")
        assert mount.digest(NAME, max(lineage.truth)) == lineage.truth[max(lineage.truth)]


FILE_SYSTEMS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f"), "btrfs": ("mkfs.btrfs", "-q", "-f")}


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_file_system_that_was_in_use_comes_up(tmp_path: Path, kind: str) -> None:
    """Two versions at once, of a volume that was never unmounted; the image is afterwards what it was."""
    if shutil.which(FILE_SYSTEMS[kind][0]) is None:
        pytest.skip(f"{FILE_SYSTEMS[kind][0]} is not there")
    lineage = Lineage(tmp_path, ALL, 320)
    live, root = tmp_path / "live", tmp_path / "root"
    live.write_bytes(b"")
    os.truncate(live, lineage.size)
    subprocess.run([*FILE_SYSTEMS[kind], live], check=True)
    with mounted(live, root) as volume:
        for number in range(2):
            (volume / "new").write_text(f"version {number}")
            (volume / "new").rename(volume / "replaced")
            subprocess.run(["sync", "-f", volume], check=True)
            for name in range(20):
                with (volume / f"{number}-{name}").open("wb") as file:
                    file.write(b"%d" % number * 5000)
                    os.fsync(file.fileno())
            subprocess.run(["cp", "--sparse=always", live, lineage.device], check=True)
            lineage.pass_time()
            lineage.back_up()
    before = digest_of_tree(lineage.backups)
    options = ["nouuid"] if kind == "xfs" else []
    with shown(lineage.backups, tmp_path / "shown") as mount, contextlib.ExitStack() as stack:
        places = [tmp_path / f"place-{number}" for number in range(2)]
        for place, moment in zip(places, sorted(lineage.truth), strict=True):
            place.mkdir()
            run("mount", "-o", ",".join(["loop", *options]), mount.path(NAME, moment), place)
            stack.callback(run, "umount", place)
        for number, place in enumerate(places):
            assert {(place / f"{number}-{name}").read_bytes() for name in range(20)} == {b"%d" % number * 5000}
            assert (place / "replaced").read_text() == f"version {number}"
            (place / "new").write_text("written to, and nowhere")
        lineage.back_up()  # nothing of it is in its way
    assert (
        digest_of_tree(lineage.backups).items()
        >= {path: content for path, content in before.items() if path == str(lineage.paths.image)}.items()
    )


def test_a_partition_that_was_in_use_comes_up(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path, ALL, 128)
    live, place, start = tmp_path / "live", tmp_path / "place", MIB
    place.mkdir()
    live.write_bytes(b"")
    os.truncate(live, lineage.size)
    subprocess.run(["mkfs.ext4", "-q", "-E", f"offset={start}", live, "100M"], check=True)
    write_at(live, 446, struct.pack("<B3xB3xII", 0, 0x83, start // 512, 100 * 2048).ljust(64, b"\0") + b"\x55\xaa")
    run("mount", "-o", f"loop,offset={start},sizelimit={100 * MIB}", live, place)
    try:
        with (place / "file").open("w") as file:
            file.write("content")
            file.flush()
            os.fsync(file.fileno())
        subprocess.run(["cp", "--sparse=always", live, lineage.device], check=True)
    finally:
        run("umount", place)
    lineage.pass_time()
    lineage.back_up()
    with shown(lineage.backups, tmp_path / "shown") as mount:
        device = run("losetup", "-fP", "--show", mount.directory / NAME / "latest").strip()
        try:
            run("partx", "--update", device)  # for a kernel that knows no such tables
            run("mount", f"{device}p1", place)
            try:
                assert (place / "file").read_text() == "content"
            finally:
                run("umount", place)
        finally:
            run("losetup", "-d", device)


# -- while runs go on


class Watch:
    """All snapshots that a volume has had, each of which is read whole after each call that changes a file."""

    CALLS = ("pwrite", "rename", "unlink", "ftruncate", "fsync")

    def __init__(self, lineage: Lineage) -> None:
        self.shown = dosvob.Shown(lineage.paths, dosvob.OpenFiles())
        self.right = self.gone = 0
        self._lineage = lineage
        self._truth: dict[dosvob.Snapshot, str] = {}
        self._is_reading = False

    def look(self) -> None:
        """See what there is."""
        for snapshot in self.shown.versions().values():
            self._truth[snapshot] = self._lineage.truth[file_name(snapshot.moment(dosvob.utc_now()))]

    def compare(self) -> None:
        """Read all of it."""
        self._is_reading = True
        for snapshot, expected in self._truth.items():
            self.shown._cache.clear()
            content = hashlib.sha256()
            try:
                for index in range(snapshot.size // MIB):
                    content.update(self.shown.read(snapshot, index, 0, dosvob.PAGES))
                assert content.hexdigest() == expected, snapshot.taken_at
                self.right += 1
            except dosvob.Replaced:
                self.gone += 1
        self._is_reading = False

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call after which all is compared."""

        def watching(*arguments: Any, **named: Any) -> Any:
            done = call(*arguments, **named)
            if not self._is_reading:
                self.compare()
            return done

        return watching


def test_what_is_shown_stays_right_at_each_step_of_a_run(lineage: Lineage, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(lineage)
    for keep in (ALL, FEW):
        watch.look()
        lineage.keep = keep
        lineage.change()
        lineage.pass_time()
        with monkeypatch.context() as patches:
            for name in Watch.CALLS:
                patches.setattr(os, name, watch.watched(getattr(os, name)))
            lineage.back_up()
    watch.look()
    watch.compare()
    watch.shown.close()
    assert watch.right > 100
    assert watch.gone


def test_an_image_without_holes_is_read_in_any_order(tmp_path: Path) -> None:
    """A chunk of it may have decayed, and a run may change the image."""
    lineage = Lineage(tmp_path, ALL)
    before = random.Random(1).randbytes(12 * MIB)
    lineage.device.write_bytes(before)
    lineage.pass_time()
    lineage.back_up()
    flip(lineage.paths.image, 3 * MIB + 5)

    with contextlib.closing(dosvob.Shown(lineage.paths, dosvob.OpenFiles())) as shown:
        (snapshot,) = shown.versions().values()

        def compare(*indices: int) -> None:
            for index in indices:
                if index == 3:
                    with pytest.raises(dosvob.Damaged, match="bytes 3145728 to 4194303 are not what was backed up"):
                        shown.read(snapshot, index, 0, dosvob.PAGES)
                else:
                    found = shown.read(snapshot, index, 2, 100)
                    assert found == before[index * MIB + 2 * PAGE : index * MIB + 102 * PAGE], index

        compare(0, 1, 2, 3, 4, 5, 9, 3, 0, 10, 11, 6, 7)
        lineage.device.write_bytes(random.Random(2).randbytes(12 * MIB))
        lineage.pass_time()
        lineage.back_up()
        compare(8, 9, 10, 11, 0, 1, 2, 4)
        with pytest.raises(dosvob.Damaged):  # what it was is in nothing but the undo, which has the decayed page
            shown.read(snapshot, 3, 0, dosvob.PAGES)


def test_a_mount_follows_runs_that_are_killed_at_any_step(
    lineage: Lineage, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Through the kernel, past its cache: what is listed is what the volume was, before, between and after."""
    chance = random.Random(pytestconfig.option.seed)
    with shown(lineage.backups, tmp_path / "shown") as mount:

        def check() -> None:
            times = mount.times(NAME)
            assert times
            for moment in times:
                content = hashlib.sha256()
                with contextlib.closing(Direct(mount.path(NAME, moment))) as file:
                    index = 0
                    while chunk := file.chunk(index):
                        content.update(chunk)
                        index += 1
                assert content.hexdigest() == lineage.truth[moment], moment

        for _ in range(200 if pytestconfig.option.exhaustive else 12):
            lineage.keep = chance.choice((ALL, FEW))
            lineage.size += MIB * (chance.random() < 0.2)
            lineage.change()
            lineage.pass_time()
            killed_at(chance.randrange(1, 60), lineage.back_up)
            check()
            if chance.random() < 0.5:
                recover(lineage.backups)
                check()
        lineage.pass_time()
        lineage.back_up()
        check()


class Reading:
    """A thread that reads what is shown, here and there, past the kernel's cache, and compares it."""

    def __init__(self, mount: Shown, contents: dict[str, bytes]) -> None:
        self.wrong: list[str] = []
        self.errors = self.reads = 0
        self._mount = mount
        self._contents = contents
        self._is_over = threading.Event()
        self._files: dict[str, Direct] = {}
        self._thread = threading.Thread(target=self._go_on)

    def _go_on(self) -> None:
        chance = random.Random(5)
        while not self._is_over.is_set():
            moment = chance.choice(sorted(self._contents))
            content = self._contents[moment]
            index = chance.randrange(len(content) // MIB)
            if chance.random() < 0.1 and moment in self._files:
                self._files.pop(moment).close()
            try:
                if moment not in self._files:
                    self._files[moment] = Direct(self._mount.path(NAME, moment))
                if self._files[moment].chunk(index) != content[index * MIB : (index + 1) * MIB]:
                    self.wrong.append(f"{moment}, chunk {index}")
                self.reads += 1
            except FileNotFoundError:
                pass
            except OSError as problem:
                self.errors += 1
                if problem.errno != errno.EIO:
                    self.wrong.append(str(problem))

    def __enter__(self) -> Reading:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_over.set()
        self._thread.join()
        for file in self._files.values():
            file.close()


def test_a_reader_that_goes_on_reads_each_byte_or_an_error_that_is_explained(
    lineage: Lineage, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Without a pause, while runs change the image and thin, are killed and are taken back."""
    contents: dict[str, bytes] = {}
    with shown(lineage.backups, tmp_path / "shown", code=None) as mount:
        for moment in mount.times(NAME):
            contents[moment] = mount.path(NAME, moment).read_bytes()
            assert digest(contents[moment]) == lineage.truth[moment]
        with Reading(mount, contents) as reading:
            chance = random.Random(pytestconfig.option.seed)
            rounds = 500 if pytestconfig.option.exhaustive else 30
            while rounds > 0 or reading.reads <= 500:  # which are few in a round if the machine is busy
                rounds -= 1
                lineage.keep = chance.choice((ALL, FEW))
                lineage.size += MIB * (chance.random() < 0.1 and rounds >= 0)
                lineage.change()
                lineage.pass_time()
                content = lineage.device.read_bytes()
                killed_at(chance.choice((0, chance.randrange(1, 60))), lineage.back_up)
                if mount.times(NAME)[0] == file_name(lineage.now):
                    contents[file_name(lineage.now)] = content
    assert not reading.wrong
    told = [line for line in mount.said.splitlines() if "error: " in line]
    assert bool(reading.errors) == bool(told), mount.said
    assert all("a run has dropped it" in line for line in told), told


def test_a_version_that_was_dropped_is_readable_until_it_is_closed(lineage: Lineage, tmp_path: Path) -> None:
    oldest = min(lineage.truth)
    with shown(lineage.backups, tmp_path / "shown") as mount:
        path = mount.path(NAME, oldest)
        with contextlib.closing(Direct(path)) as file:
            first = file.chunk(0)
            thin(lineage.backups, dosvob.Keep(1, 0, 0, 0))
            lineage.go_on()
            assert oldest not in mount.times(NAME)
            rest = b"".join(file.chunk(index) for index in range(1, 6))
            assert digest(first + rest) == lineage.truth[oldest]
        assert {mount.digest(NAME, moment) for moment in mount.times(NAME)} <= set(lineage.truth.values())


def test_what_is_open_stays_readable_though_nobody_reads_it_while_runs_go_on(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest and a version: after each run, what leads to them is held."""
    lineage.keep, left = dosvob.Keep(1, 0, 0, 0), iter((1, 1, 1, 1))
    reading, writing = os.pipe2(os.O_NONBLOCK)
    monkeypatch.setattr(dosvob.Kernel, "FOLLOWED", 0)
    files = dosvob.FileSystem(dosvob.Home(lineage.backups), [], None, dosvob.Reporter())
    with contextlib.closing(files), open(reading, "rb"), open(writing, "wb"):
        opened = [
            files.file(node) for name, node in files.children(files.children(1)[NAME]).items() if name != "latest"
        ]
        for file in opened:
            file.open()
        with pytest.raises(StopIteration):
            dosvob.Kernel(reading, files, read_only=True).serve(lambda: lineage.go_on(next(left)))
        found = {file_name(file.snapshot.moment(lineage.now)): digest(file.read(0, file.size)) for file in opened}
    assert found.items() <= lineage.truth.items()


def test_a_run_is_not_kept_out_by_a_loop_device_over_what_is_shown(lineage: Lineage, tmp_path: Path) -> None:
    with shown(lineage.backups, tmp_path / "shown") as mount:
        with contextlib.closing(LoopDevice(mount.path(NAME, max(lineage.truth)))):
            lineage.go_on()
        assert mount.digest(NAME, max(lineage.truth)) == lineage.truth[max(lineage.truth)]


# -- what decayed


def flip(path: Path, offset: int) -> None:
    """Have a byte decay."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_a_chunk_that_decayed_is_an_error_that_is_named(lineage: Lineage, tmp_path: Path) -> None:
    newest, contents = max(lineage.truth), lineage.device.read_bytes()
    index = next(index for index in range(6) if contents[index * MIB : (index + 1) * MIB].strip(b"\0"))
    flip(
        lineage.paths.image,
        index * MIB + contents[index * MIB : (index + 1) * MIB].index(contents[index * MIB :].lstrip(b"\0")[:1]),
    )
    with shown(lineage.backups, tmp_path / "shown", code=1) as mount, mount.path(NAME, newest).open("rb") as file:
        for place in range(6):
            if place == index:
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(file.fileno(), PAGE, place * MIB)
            else:
                found = os.pread(file.fileno(), PAGE, place * MIB)
                assert found == contents[place * MIB : place * MIB + PAGE]
    assert f"bytes {index * MIB} to {(index + 1) * MIB - 1} are not what was backed up" in mount.said
    assert mount.said.count("are not what was backed up") == 1


def test_a_version_that_decayed_is_an_error_and_not_other_bytes(lineage: Lineage, tmp_path: Path) -> None:
    version = sorted(lineage.paths.versions.iterdir())[0]
    with dosvob.PatchFile(version, "version") as file:
        position, patch = next(found for found in file.patches() if found[1].filled)
    flip(version, position + patch.length - 5)
    with shown(lineage.backups, tmp_path / "shown", code=1) as mount:
        for moment, truth in lineage.truth.items():
            if moment == version.name:
                with pytest.raises(OSError, match="Input/output error"):
                    mount.digest(NAME, moment)
            else:
                assert mount.digest(NAME, moment) == truth


def test_what_is_recorded_as_zeros_is_never_something_else(tmp_path: Path) -> None:
    """The image has got other bytes in chunks of zeros: in one of all versions, and in one of the older alone."""
    lineage = Lineage(tmp_path, ALL, 60)
    lineage.device.write_bytes(random.Random(1).randbytes(50 * MIB).ljust(60 * MIB, b"\0"))
    for content in (bytes(6), b"a page"):
        write_at(lineage.device, 55 * MIB, content)
        lineage.pass_time()
        lineage.back_up()
    for chunk in (54, 55):
        write_at(lineage.paths.image, chunk * MIB + 5 * PAGE, b"garbage")
    with shown(lineage.backups, tmp_path / "shown", code=None) as mount:
        for moment in lineage.truth:
            with contextlib.closing(Direct(mount.path(NAME, moment))) as file:
                for _ in range(2):
                    assert file.chunk(54) == bytes(MIB)
                    if moment == min(lineage.truth):
                        assert file.chunk(55) == bytes(MIB)
                    else:
                        with pytest.raises(OSError, match="Input/output error"):
                            file.chunk(55)
                    for index in range(dosvob.Shown.CACHED + 1):
                        file.chunk(index)


def test_a_version_is_shown_that_needs_nothing_of_what_decayed(tmp_path: Path) -> None:
    """As by `verify` and `restore`: all pages that no patch has were zeros. It stays so after others were read."""
    lineage = Lineage(tmp_path, ALL, 60)
    lineage.device.write_bytes(random.Random(1).randbytes(50 * MIB).ljust(60 * MIB, b"\0"))
    for content in (b"old", b"new"):
        write_at(lineage.device, 55 * MIB, content)
        lineage.pass_time()
        lineage.back_up()
    write_at(lineage.paths.image, 55 * MIB + 5 * PAGE, b"garbage")
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert [bool(damaged.ranges) for damaged in chain.verify(lambda size: None)] == [True, False]
    with (
        shown(lineage.backups, tmp_path / "shown") as mount,
        contextlib.closing(Direct(mount.path(NAME, min(lineage.truth)))) as file,
    ):
        for _ in range(2):
            assert file.chunk(55) == b"old".ljust(MIB, b"\0")
            for index in range(dosvob.Shown.CACHED + 1):
                file.chunk(index)


@pytest.mark.parametrize("kind", ["version", "undo"])
def test_a_damaged_patch_costs_the_chunks_alone_that_it_may_be_of(tmp_path: Path, kind: str) -> None:
    """As by `verify`: the index is damaged, too. Nothing but the state, or an older patch, tells what a chunk was."""
    lineage = Lineage(tmp_path, ALL, 6)
    contents = [bytearray(random.Random(1).randbytes(6 * MIB))]
    for changes in ({0: PAGE, 2: MIB}, {1: PAGE, 3: MIB, 4: PAGE}):
        contents.append(contents[-1][:])
        for chunk, length in changes.items():
            contents[-1][chunk * MIB : chunk * MIB + length] = bytes(length)
    for number, content in enumerate(contents):
        lineage.device.write_bytes(content)
        lineage.pass_time()
        if number == 2 and kind == "undo":
            leave_written(lineage.backups, lineage.device, lineage.now)
        else:
            lineage.back_up()
    damaged = lineage.paths.undo if kind == "undo" else max(lineage.paths.versions.iterdir())
    with dosvob.PatchFile(damaged, "version") as patches:
        position = next(position for position, patch in patches.patches() if patch.index == 3)
    flip(damaged, patches.limit + 5)
    flip(damaged, position + PAGE)

    lost = [{3}, {3}] if kind == "undo" else [set(), {2, 3}, {3}]
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert [chunks_of(ranges) for ranges in chain.verify(lambda size: None)] == lost
    times = sorted(lineage.truth)[: len(lost)]
    with shown(lineage.backups, tmp_path / "shown", code=1) as mount:
        for moment, content, missing in zip(times, contents, reversed(lost), strict=False):
            with contextlib.closing(Direct(mount.path(NAME, moment))) as file:
                for index in range(6):
                    if index in missing:
                        assert os.lseek(file.fd, index * MIB, os.SEEK_DATA) == index * MIB
                        with pytest.raises(OSError, match="Input/output error"):
                            file.chunk(index)
                    else:
                        assert file.chunk(index) == content[index * MIB : (index + 1) * MIB]


def test_an_index_that_cannot_be_read_for_once_does_not_count_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = Lineage(tmp_path, ALL, 3)
    lineage.go_on(2)
    rows = dosvob.PatchFile.rows
    told: list[Path] = []

    def fail_once(file: dosvob.PatchFile, first: int, count: int) -> bytes:
        if not told:
            told.append(file.path)
            raise dosvob.Damaged("for once")
        return rows(file, first, count)

    with contextlib.closing(dosvob.Shown(lineage.paths, dosvob.OpenFiles())) as shown_:
        now, before = shown_.versions().values()
        expected = [shown_.read(before, index, 0, dosvob.PAGES) for index in range(3)]
        assert expected != [shown_.read(now, index, 0, dosvob.PAGES) for index in range(3)]
    monkeypatch.setattr(dosvob.PatchFile, "rows", fail_once)
    with contextlib.closing(dosvob.Shown(lineage.paths, dosvob.OpenFiles())) as shown_:
        with contextlib.suppress(dosvob.Damaged):
            shown_.hold(before)
        assert told
        assert [shown_.read(before, index, 0, dosvob.PAGES) for index in range(3)] == expected


def chunks_of(ranges: dosvob.Ranges) -> set[int]:
    """The chunks in ranges of bytes."""
    return {index for start, end in ranges.ranges for index in range(start // MIB, end // MIB)}


def decay(chance: random.Random, path: Path) -> str:
    """Have a part of a file decay; returns what was done."""
    size = path.stat().st_size
    offset, kind = chance.randrange(size), chance.choice(("flip", "zeros", "other", "cut"))
    if kind == "flip":
        flip(path, offset)
    elif kind == "cut":
        os.truncate(path, offset)
    else:
        length = min(chance.choice((10, PAGE, 3 * PAGE)), size - offset)
        write_at(path, offset, bytes(length) if kind == "zeros" else chance.randbytes(length))
    return f"{path.name}: {kind} at {offset}"


def read_twice(shown: dosvob.Shown, snapshot: dosvob.Snapshot, index: int) -> bytes | None:
    """A chunk, read as one that was not looked at yet, and then again; None if it is damaged."""
    try:
        shown._cache.clear()
        first = shown.read(snapshot, index, 0, dosvob.PAGES)
        shown._cache.clear()
        assert b"".join(shown.read(snapshot, index, page, 64) for page in range(0, dosvob.PAGES, 64)) == first
    except dosvob.Damaged:
        return None
    return first


def test_mount_restore_and_verify_judge_damage_alike(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Wherever it is: what one of them finds whole is what was backed up, and so do the others."""
    chance = random.Random(pytestconfig.option.seed)
    for number in range(300 if pytestconfig.option.exhaustive else 12):
        directory = tmp_path / str(number)
        directory.mkdir()
        lineage, contents = Lineage(directory, ALL, 3), {}
        lineage._seed = chance.randrange(1 << 30)
        for place in range(4):
            lineage.size += MIB * (place == 2)
            lineage.change()
            lineage.pass_time()
            contents[lineage.now] = lineage.device.read_bytes()
            if place == 3 and chance.random() < 0.5:
                leave_written(lineage.backups, lineage.device, lineage.now)
            else:
                lineage.back_up()
        paths = lineage.paths
        files = [path for path in (paths.image, paths.undo, *paths.versions.iterdir()) if path.exists()]
        case = ", ".join(decay(chance, chance.choice(files)) for _ in range(chance.choice((1, 1, 2, 3))))

        damaged = {}
        with contextlib.closing(dosvob.Chain(paths)) as chain:
            verified = chain.verify(lambda size: None)
            for depth, moment in enumerate(chain.moments):
                assert moment is not None
                file, ranges = chain.restore(depth, directory / f"file-{depth}", lambda size: None)
                damaged[moment] = chunks_of(ranges)
                assert chunks_of(verified[depth]) == damaged[moment], case
                content = file.read_bytes()
                for index in set(range(len(contents[moment]) // MIB)) - damaged[moment]:
                    part = slice(index * MIB, (index + 1) * MIB)
                    assert content[part] == contents[moment][part], f"{case}: restored {moment}, chunk {index}"
        with contextlib.closing(dosvob.Shown(paths, dosvob.OpenFiles())) as shown:
            for snapshot in shown.versions().values():
                moment = snapshot.moment(lineage.now)
                for index in range(snapshot.size // MIB):
                    where = f"{case}: shown {moment}, chunk {index}"
                    try:
                        found = read_twice(shown, snapshot, index)
                    except dosvob.Replaced:  # a head is lost, and with it what its version leads to
                        assert any(version.snapshot is None for version in chain.versions), where
                        break
                    is_right = found == contents[moment][index * MIB : (index + 1) * MIB]
                    assert is_right or (found is None and index in damaged[moment]), where
        shutil.rmtree(directory)


# -- its end


def test_it_ends_with_an_interrupt_as_soon_as_nobody_uses_it(lineage: Lineage, tmp_path: Path) -> None:
    newest = max(lineage.truth)
    with shown(lineage.backups, tmp_path / "shown", code=130) as mount:
        with mount.path(NAME, newest).open("rb") as file:
            mount.process.send_signal(signal.SIGINT)
            assert mount.process.stdout is not None
            while "is in use" not in mount.said:
                line = mount.process.stdout.readline()
                assert line
                mount.said += line
            drop_caches()
            assert digest(file.read()) == lineage.truth[newest]
        mount.process.wait(120)
    assert not os.path.ismount(tmp_path / "shown")


def test_a_mount_that_was_killed_is_told_by_the_next(lineage: Lineage, tmp_path: Path) -> None:
    directory = tmp_path / "shown here"
    command = [sys.executable, SCRIPT, "--backups", lineage.backups, "mount", directory]
    with shown(lineage.backups, directory, code=-signal.SIGKILL) as mount:
        assert f"something is shown in {directory} already: umount '{directory}'" in failed(*command)
        mount.process.send_signal(signal.SIGKILL)
        mount.process.wait()
    assert f"what is left of a mount that was killed: umount '{directory}'" in failed(*command)
    run("umount", directory)
    with shown(lineage.backups, directory) as mount:
        assert mount.digest(NAME, max(lineage.truth)) == lineage.truth[max(lineage.truth)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "mount takes a directory"),
        (("nowhere",), "nowhere is no directory to show them in: No such file or directory: mkdir nowhere"),
        (("here", "dta"), "there is no image of dta in "),
        (("backups/below",), "is among the backups"),
        (("here", "--scratch", "nowhere"), "nowhere cannot have what is written"),
        (("here", "--scratch", "here/below"), "here/below is in here, and would be hidden by it"),
        ((".",), "backups is in ., and would be hidden by it"),
        (("no where",), "mkdir 'no where'"),
    ],
)
def test_what_cannot_be_mounted_is_told(
    lineage: Lineage, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "backups" / "below").mkdir()
    command = [sys.executable, str(SCRIPT), "mount", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert told in done.stderr


AS_USER = """
# As nobody, for fusermount3 wants a user with a name.
set -e
mknod "$1/fuse" c 10 229 && chmod 666 "$1/fuse" && mount --bind "$1/fuse" /dev/fuse
[ -z "$2" ] || { echo "$2" > "$1/fuse.conf" && touch /etc/fuse.conf && mount --bind "$1/fuse.conf" /etc/fuse.conf; }
mount --bind "$1" /mnt && cd /mnt && chmod 755 . && chown -R 65534:65534 backups shown  # whoever may not get to $1
shift 2
setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/tmp "$@" backups mount shown > said 2>&1 &
while kill -0 $! && ! grep -q " shows " said; do sleep 0.05; done
grep " fuse.dosvob " /proc/self/mountinfo > /dev/null
setpriv --reuid 65534 --regid 65534 --clear-groups sha256sum shown/data/latest > digest
cat shown/data/latest > by-root 2> /dev/null || true
setpriv --reuid 65534 --regid 65534 --clear-groups fusermount3 -u shown
wait $!
"""


def python_for_all() -> str:
    """A Python that others than root can run."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        program = "import sys; sys.exit(sys.version_info < (3, 11))"
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", path, "-I", "-c", program]
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            return path
    pytest.skip("there is no Python 3.11 that others than root can run")


@pytest.mark.parametrize("conf", ["", "user_allow_other"])
def test_as_a_user_who_is_not_root(lineage: Lineage, tmp_path: Path, conf: str) -> None:
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not there")
    (tmp_path / "shown").mkdir()
    shutil.copy(SCRIPT, tmp_path / "dosvob.py")
    python = [python_for_all(), "-I", "-S", "dosvob.py", "--backups"]
    command = ["unshare", "--mount", "sh", "-c", AS_USER, "sh", tmp_path, conf, *python]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    said = (tmp_path / "said").read_text()
    assert done.returncode == 0, done.stderr + said
    newest = lineage.truth[max(lineage.truth)]
    assert (tmp_path / "digest").read_text().split()[0] == newest
    assert ((tmp_path / "by-root").read_bytes() == lineage.device.read_bytes()) == bool(conf)
    assert ("put user_allow_other into /etc/fuse.conf" in said) == (not conf)
