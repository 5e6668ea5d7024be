"""What can happen to a volume, its image, its state and its disk, and what becomes of the versions then."""

from __future__ import annotations

import collections
import contextlib
import datetime
import errno
import os
import random
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, Tmpfs, write_at
from crash_support import PowerCut
from simulator import Simulator, Volume
from trouble_support import GIB, QUICK, small_volumes
from versions_support import (
    MIB,
    NAME,
    PAGE,
    Lineage,
    check_all,
    digest,
    file_name,
    leave_written,
    listed,
    restored,
    thin,
)

import dosvob

ALL = dosvob.Keep(last=100)
NONE = dosvob.Keep(0, 0, 0, 0)


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    """A volume with three versions."""
    made = Lineage(tmp_path, ALL)
    made.go_on(4)
    return made


def damage_of(lineage: Lineage) -> dict[str, str]:
    """What cannot be restored of what is listed."""
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        ranges = chain.verify(lambda size: None)
    return {time: str(damaged) for time, damaged in zip(listed(lineage.backups), ranges, strict=True) if damaged.ranges}


def test_a_volume_that_grew_has_versions_of_the_size_that_it_had(lineage: Lineage) -> None:
    lineage.size += 2 * MIB
    lineage.pass_time(30 * 24)
    lineage.go_on(2)
    lineage.size += MIB
    lineage.pass_time()
    os.truncate(lineage.device, lineage.size)  # by zeros alone, which are nothing to fetch
    lineage.pass_time()
    lineage.back_up()
    assert len(lineage.check()) == 7
    assert [len(restored(lineage.backups, depth)) // MIB for depth in range(7)] == [8, 7, 7, 5, 5, 5, 5]
    lineage.keep = dosvob.Keep(last=0, daily=0, weekly=0, monthly=2)
    thin(lineage.backups, lineage.keep)
    assert [len(restored(lineage.backups, depth)) // MIB for depth in range(len(lineage.check()))] == [8, 5]


def test_a_backup_without_a_change_makes_a_version_that_takes_nothing(lineage: Lineage) -> None:
    lineage.pass_time()
    lineage.back_up()
    assert len(lineage.check()) == 5
    assert max(lineage.paths.versions.iterdir()).stat().st_size == 2 * dosvob.BLOCK


def test_a_volume_that_becomes_zeros_and_comes_back(lineage: Lineage) -> None:
    full = lineage.device.read_bytes()
    for content in (bytes(lineage.size), full, bytes(lineage.size)):
        lineage.device.write_bytes(content)
        lineage.pass_time()
        lineage.back_up()
    assert len(lineage.check()) == 7
    thin(lineage.backups, dosvob.Keep(1, 0, 0, 0))
    assert digest(restored(lineage.backups, 1)) == digest(full)


def test_a_volume_made_anew_takes_its_versions_along(lineage: Lineage) -> None:
    before = lineage.check()
    warnings: list[str] = []
    lineage.volume_id = "volume-2"
    lineage.change()
    lineage.pass_time()
    lineage.back_up(warn=warnings.append)
    assert len(lineage.check()) == 1
    aside = f"{NAME}.set-aside-{before[0]}"
    assert aside in warnings[0]
    assert check_all(lineage.backups, lineage.truth, aside) == before
    lineage.go_on(2)
    assert len(lineage.check()) == 3
    assert check_all(lineage.backups, lineage.truth, aside) == before


def test_no_version_is_made_of_an_image_without_a_state(tmp_path: Path) -> None:
    lineage = Lineage(tmp_path, ALL)
    lineage.backups.mkdir()
    lineage.change()
    lineage.paths.image.write_bytes(lineage.device.read_bytes())
    lineage.go_on()
    assert lineage.check() == [file_name(lineage.now)]
    lineage.go_on()
    assert len(lineage.check()) == 2


def test_a_state_that_is_lost_costs_no_version(lineage: Lineage) -> None:
    lineage.paths.state.unlink()
    lineage.go_on()
    assert len(lineage.check()) == 5
    lineage.go_on()
    assert len(lineage.check()) == 6


@pytest.mark.parametrize("is_gone", [True, False])
def test_versions_are_restored_without_a_state_or_with_a_damaged_one(lineage: Lineage, *, is_gone: bool) -> None:
    """The day on which they are needed is no day to mend that: each patch has its own digest."""
    times = listed(lineage.backups)
    if is_gone:
        lineage.paths.state.unlink()
    else:
        write_at(lineage.paths.state, 100, b"decay")
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert (chain.problem is None) == is_gone
        assert chain.depth_at(lineage.now) == 0
        assert chain.depth_at(chain.versions[1].moment) == 2
    for depth, time in enumerate(times):
        assert digest(restored(lineage.backups, depth)) == lineage.truth[time]


def test_an_image_without_state_and_versions_has_no_time(lineage: Lineage) -> None:
    lineage.paths.state.unlink()
    shutil.rmtree(lineage.paths.versions)
    with (
        contextlib.closing(dosvob.Chain(lineage.paths)) as chain,
        pytest.raises(dosvob.UsageError, match="no snapshot is recorded"),
    ):
        chain.depth_at(lineage.now)


def test_what_is_written_to_the_image_here_costs_what_it_overwrites_of_one_version(lineage: Lineage) -> None:
    """The sync mends the image; older versions that have these pages themselves are right, others are told."""
    newest = file_name(lineage.now)
    write_at(lineage.paths.image, 2 * MIB + 5 * PAGE, b"written here")
    lineage.pass_time()  # the volume itself has not changed
    update = lineage.back_up()
    assert update.differing.size == MIB
    assert damage_of(lineage) == {}  # what was overwritten came back from the volume
    assert len(lineage.check()) == 5

    write_at(lineage.paths.image, 2 * MIB + 5 * PAGE, b"written here")
    write_at(lineage.device, 2 * MIB + 5 * PAGE, b"changed there")
    lineage.pass_time()
    lineage.back_up()
    times = listed(lineage.backups)
    told = damage_of(lineage)
    assert told[times[1]] == f"bytes {2 * MIB} to {3 * MIB - 1}"
    assert set(told.values()) == {told[times[1]]}
    assert newest in told
    for depth, time in enumerate(times):
        if time not in told:
            assert digest(restored(lineage.backups, depth)) == lineage.truth[time]
    lineage.go_on(2)  # and what comes after is right
    assert times[1] in damage_of(lineage)
    assert not {time for time in listed(lineage.backups) if time > times[1]} & damage_of(lineage).keys()
    thin(lineage.backups, dosvob.Keep(last=3))  # thinning hides nothing
    assert set(damage_of(lineage)) == {times[1]}


def test_an_image_that_was_removed(lineage: Lineage) -> None:
    lineage.paths.image.unlink()
    warnings: list[str] = []
    lineage.go_on()
    assert lineage.check() == [file_name(lineage.now)]
    aside = [path.name for path in lineage.paths.metadata.glob("*.set-aside-*.versions")]
    assert len(aside) == 1
    assert not warnings
    lineage.go_on()
    assert len(lineage.check()) == 2


@pytest.mark.parametrize("moves", [1, 2])
def test_a_crash_while_something_without_a_state_is_set_aside_does_not_part_it(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """What goes on an hour later gets the same name."""
    before = lineage.check()
    lineage.paths.state.unlink()
    lineage.size -= MIB  # so it is another volume's, whatever is known
    lineage.change()
    lineage.pass_time()
    rename = Path.rename
    moved: list[Path] = []

    def crash(path: Path, target: Path) -> Path:
        if len(moved) == moves:
            raise PowerCut
        moved.append(path)
        return rename(path, target)

    with monkeypatch.context() as patches, contextlib.suppress(PowerCut):
        patches.setattr(Path, "rename", crash)
        lineage.back_up()
    assert len(moved) == moves
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    monkeypatch.setattr(dosvob, "utc_now", lambda: later)
    lineage.back_up()
    assert lineage.check() == [file_name(lineage.now)]
    home = dosvob.Home(lineage.backups)
    (aside,) = home.names() - home.names(with_aside=False)
    assert [path.name for path in lineage.paths.metadata.glob("*.set-aside-*")] == [f"{aside}.versions"]
    for depth, time in enumerate(before):
        assert digest(restored(lineage.backups, depth, aside)) == lineage.truth[time]


def test_an_image_of_another_time_is_put_in_its_place(lineage: Lineage) -> None:
    """Restored over the image by hand, from a version: the next sync mends it, and no version is the worse for it."""
    old = restored(lineage.backups, 2)
    lineage.paths.image.write_bytes(old)
    lineage.pass_time()
    lineage.back_up()
    assert damage_of(lineage) == {}
    assert len(lineage.check()) == 5


def test_state_and_image_of_another_backup_put_the_versions_aside(lineage: Lineage) -> None:
    """As when an older copy of image and state was put back: the versions do not lead back from it."""
    image, state = lineage.paths.image.read_bytes(), lineage.paths.state.read_bytes()
    lineage.go_on()
    lineage.paths.image.write_bytes(image)
    lineage.paths.state.write_bytes(state)
    warnings: list[str] = []
    lineage.change()
    lineage.pass_time()
    lineage.back_up(warn=warnings.append)
    assert "do not lead back from its image" in warnings[0]
    assert len(lineage.check()) == 2


def test_keep_nothing_and_back(lineage: Lineage) -> None:
    lineage.keep = NONE
    lineage.go_on()
    assert lineage.check() == [file_name(lineage.now)]
    lineage.go_on()
    assert not list(lineage.paths.versions.iterdir())
    lineage.keep = ALL
    lineage.go_on(2)
    assert len(lineage.check()) == 3


def test_a_snapshot_that_is_said_to_be_older_than_the_last(lineage: Lineage) -> None:
    """A clock that goes back: the order of the versions stays that of the backups."""
    before = listed(lineage.backups)
    for hours in (-7, 2):
        lineage.change()
        lineage.pass_time(hours)
        lineage.back_up()
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        names = [version.path.name for version in chain.versions]
        assert names == sorted(names, reverse=True)
        assert not any(ranges.ranges for ranges in chain.verify(lambda size: None))
    for depth, time in enumerate(reversed(listed(lineage.backups)[::-1][: len(before) - 1])):
        assert digest(restored(lineage.backups, depth + 3)) == lineage.truth[time]


def test_a_damaged_version_does_not_keep_others_for_ever(lineage: Lineage) -> None:
    """Nothing can be merged with it, and it stays as long as it is wanted; all else is thinned."""
    lineage.go_on(16)
    times = listed(lineage.backups)
    keep = dosvob.Keep(last=0, daily=3, weekly=0, monthly=0)
    stay = [number for number, wanted in enumerate(keep.wanted(moments_of(lineage))) if wanted]
    spoilt = stay[-1] - 1  # to be merged into the oldest one that stays
    victim = lineage.paths.versions / times[spoilt]
    os.truncate(victim, victim.stat().st_size - 5000)
    with pytest.raises(dosvob.Damaged, match=times[spoilt]):
        thin(lineage.backups, keep)
    left = listed(lineage.backups)
    assert left == [time for number, time in enumerate(times) if number in stay or stay[-2] < number < stay[-1]]
    thin(lineage.backups, dosvob.Keep(1, 0, 0, 0))  # and once it is too old it goes, with what needs it
    assert lineage.check() == [times[0], times[stay[1]]]


def moments_of(lineage: Lineage) -> list[datetime.datetime]:
    """The times of image and versions."""
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert chain.state is not None
        return [chain.state.moment, *(version.moment for version in chain.versions)]


# -- a full disk


def test_a_disk_that_is_full_while_a_version_is_written(tmp_path: Path, tmpfs: Tmpfs) -> None:
    for free in (0, PAGE, 64 << 10, 1 * MIB, 2 * MIB, 3 * MIB, 4 * MIB, 5 * MIB):
        directory = tmpfs.path / "directory"
        directory.mkdir(exist_ok=True)
        tmpfs.leave_free(64 * MIB)
        lineage = Lineage(directory, ALL)
        lineage.device = tmp_path / "device"
        lineage.backups = directory / str(free)
        lineage.paths = dosvob.ImagePaths(lineage.backups, NAME)
        lineage.go_on(3)
        before = lineage.check()
        image = lineage.paths.image.read_bytes()
        lineage.device.write_bytes(random.Random(free).randbytes(lineage.size))
        lineage.pass_time()
        tmpfs.leave_free(free)
        try:
            lineage.back_up()
        except OSError as problem:
            assert problem.errno == errno.ENOSPC  # noqa: PT017 - it may also have had room enough
            tmpfs.leave_free(64 * MIB)
            assert lineage.check() == before
            assert lineage.paths.image.read_bytes() == image
            lineage.back_up()
        tmpfs.leave_free(64 * MIB)
        assert len(lineage.check()) == 4


def test_a_disk_that_is_full_while_versions_are_thinned(tmp_path: Path, tmpfs: Tmpfs) -> None:
    lineage = Lineage(tmpfs.path, ALL)
    for _ in range(5):
        lineage.device.write_bytes(random.Random(str(lineage.now)).randbytes(lineage.size))
        lineage.pass_time(24)
        lineage.back_up()
    before = lineage.check()
    warnings: list[str] = []
    state = dosvob.State.load(lineage.paths.state)
    assert state is not None
    keep = dosvob.Keep(last=0, daily=0, weekly=3, monthly=0)
    config = types.SimpleNamespace(keep=keep)
    told: list[object] = []
    report = types.SimpleNamespace(
        warn=warnings.append, progress=told.append, end_progress=lambda: told.append("the end")
    )
    job: Any = types.SimpleNamespace(config=config, stop=dosvob.Stop(), report=report)
    tmpfs.leave_free(PAGE)
    dosvob.thin(job, lineage.paths, collections.defaultdict(set))
    assert told[-1] == "the end"  # else it would stay on the live line
    tmpfs.leave_free(60 * MIB)
    assert lineage.check() == before
    assert len(warnings) == 1
    assert "older versions could not all be thinned" in warnings[0]
    assert 'to keep fewer change "keep" in conf.json' in warnings[0]
    assert not list(lineage.paths.versions.glob("*.new"))
    thin(lineage.backups, keep)
    assert len(lineage.check()) < len(before)


def make_two_versions(home: Home, volume: Volume, backups: Path) -> dosvob.ImagePaths:
    """Of 2 MiB each, by the whole script."""
    home.configure(keep={"last": 10})
    for seed in range(3):
        write_at(volume.path, 0, random.Random(seed).randbytes(2 * MIB))
        home.run("--backups", str(backups), constants=QUICK)
    return dosvob.ImagePaths(backups, NAME)


def test_the_whole_script_says_what_versions_hold_when_the_disk_is_full(
    sim: Simulator, home: Home, tmpfs: Tmpfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_volumes(monkeypatch)
    volume, backups = sim.add_volume(NAME), tmpfs.path / "backups"
    paths = make_two_versions(home, volume, backups)
    image = paths.image.read_bytes()
    versions = {path: path.read_bytes() for path in paths.versions.iterdir()}
    assert len(versions) == 2
    write_at(volume.path, 0, random.Random(9).randbytes(8 * MIB))
    tmpfs.leave_free(9 * MIB)  # for the spool, not for the undo
    done = home.run("--backups", str(backups), constants=QUICK, expect=1)
    assert "its 2 older versions hold 4.0 MiB" in done.stderr
    assert '"keep" in conf.json says how many there are' in done.stderr
    assert paths.image.read_bytes() == image
    assert {path: path.read_bytes() for path in paths.versions.iterdir()} == versions
    assert not paths.spool.exists()
    assert not paths.undo.exists()
    tmpfs.leave_free(40 * MIB)
    home.run("--backups", str(backups), constants=QUICK)
    assert len(list(paths.versions.iterdir())) == 3
    assert restored(backups, 1) == image
    assert paths.image.stat().st_size == GIB
    assert "backup is" in home.run("--backups", str(backups), "health").stdout


def test_keeping_fewer_versions_makes_room_for_the_next_backup(
    sim: Simulator, home: Home, tmpfs: Tmpfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a disk that old versions fill would stay full."""
    small_volumes(monkeypatch)
    volume, backups = sim.add_volume(NAME), tmpfs.path / "backups"
    paths = make_two_versions(home, volume, backups)
    write_at(volume.path, 0, random.Random(9).randbytes(8 * MIB))
    tmpfs.leave_free(15 * MIB)  # for the spool and the undo, not for what it changes
    home.run("--backups", str(backups), constants=QUICK, expect=1)
    assert len(list(paths.versions.iterdir())) == 2
    home.configure(keep={})
    home.run("--backups", str(backups), constants=QUICK)
    assert not list(paths.versions.iterdir())
    assert paths.image.read_bytes()[: 8 * MIB] == random.Random(9).randbytes(8 * MIB)


def test_a_signal_is_heeded_while_what_an_interrupted_backup_left_is_read(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may be many GiB, and the droplet is there meanwhile."""

    def cut(*_: object) -> None:
        raise PowerCut

    lineage.change()
    lineage.pass_time()
    with monkeypatch.context() as patches:
        patches.setattr(dosvob.Update, "finish", cut)
        with pytest.raises(PowerCut):
            lineage.back_up()

    def stop(size: int) -> None:
        assert size
        raise dosvob.Interrupted

    snapshot = dosvob.Snapshot(lineage.volume_id, NAME, "fra1", lineage.size, lineage.now.isoformat())
    with pytest.raises(dosvob.Interrupted):
        dosvob.Update(lineage.paths, snapshot, ALL, print, stop)
    lineage.back_up()
    assert len(lineage.check()) == 5


def test_an_image_without_a_state_that_has_become_shorter_is_told(lineage: Lineage, tmp_path: Path) -> None:
    """The versions know how long it was."""
    lineage.device.write_bytes(os.urandom(lineage.size))
    lineage.pass_time()
    lineage.back_up()
    lineage.paths.state.unlink()
    os.truncate(lineage.paths.image, 3 * MIB + PAGE)
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert chain.size == lineage.size
        told = [str(ranges) for ranges in chain.verify(lambda size: None)]
        assert told[0] == f"bytes {3 * MIB} to {lineage.size - 1}"
        assert told[1] == "bytes "  # all of it is in the version
        final, damaged = chain.restore(0, tmp_path / "file", lambda size: None)
    assert (final.name, str(damaged)) == ("file.damaged", told[0])


def test_what_an_undo_makes_of_a_chunk_that_cannot_be_read_is_not_sound_without_a_state(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at(lineage.device, 2 * MIB, os.urandom(PAGE))
    lineage.pass_time()
    leave_written(lineage.backups, lineage.device, lineage.now, keep=ALL)
    lineage.paths.state.unlink()
    pages = dosvob.SparseFile.pages

    def unreadable(file: dosvob.SparseFile, index: int, *wanted: int, **hints: bool) -> dict[int, bytes] | None:
        return None if index == 2 else pages(file, index, *wanted, **hints)

    monkeypatch.setattr(dosvob.SparseFile, "pages", unreadable)
    with contextlib.closing(dosvob.Chain(lineage.paths)) as chain:
        assert str(chain.verify(lambda size: None)[0]) == f"bytes {2 * MIB} to {3 * MIB - 1}"


def test_a_version_that_somebody_removed_is_told_by_all_that_lead_back_over_it(lineage: Lineage) -> None:
    """What differed only there, nothing else knows of: so nothing is said to be sound."""
    times = listed(lineage.backups)
    assert len(times) > 3
    (lineage.paths.versions / times[2]).unlink()
    told = damage_of(lineage)
    assert set(times[3:]) <= set(told)
    assert not set(times[:2]) & set(told)
    versions = dosvob.Versions(lineage.paths)
    with pytest.raises(dosvob.Damaged, match="missing"):
        versions._merge(versions.all()[:2], lambda size: None)


def test_versions_that_are_put_aside_are_not_thinned_before(
    home: Home, sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of another volume that had this name; what "keep" says now is about the one that is there now."""
    small_volumes(monkeypatch)
    sim.add_volume(NAME)
    lineage = Lineage(tmp_path, ALL)
    lineage.backups, lineage.paths = home.backups, dosvob.ImagePaths(home.backups, NAME)
    lineage.size = GIB
    for number in range(3):
        write_at(lineage.device, 0, bytes([number]) * PAGE) if number else lineage.device.write_bytes(b"")
        os.truncate(lineage.device, GIB)
        lineage.pass_time()
        lineage.back_up()
    home.configure(keep={})
    home.run(constants=QUICK)
    (aside,) = home.backups.glob(".dosvob/*.versions")
    assert aside.name.startswith(f"{NAME}.set-aside-")
    assert len(list(aside.iterdir())) == 2
