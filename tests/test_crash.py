"""The image survives a kill at every system call that changes a file: it is the old snapshot or the new one.

So do its versions: each that is listed restores to the very bytes that it had.

strace delivers SIGKILL when the process is about to make one such call; which calls there are is read off a run that
is left alone. Most cases run the local part with the real agent as a local process; a sample runs the whole script.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MIB, Home, same, sampled
from crash_support import (
    IN_MAIN_THREAD,
    Call,
    back_up,
    calls_in,
    commits,
    driver,
    files_of,
    killing,
    recover,
    restored,
    run_driver,
    scatter,
    strace,
    verify,
)
from simulator import Volume

import dosvob

NAME = "data"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens
OFFLINE_RUN = {"PATIENCE": 0}
KILLED = -9


@dataclass(frozen=True)
class Case:
    """A kill at the `occurrence`-th call of that name; `position` is the call's place among all of them."""

    call: str
    occurrence: int
    position: int

    @property
    def injection(self) -> str:
        """The option of strace."""
        return killing(self.occurrence, self.call)


def cases_of(calls: list[Call]) -> list[Case]:
    """One case for each call of a run."""
    seen: dict[str, int] = {}
    cases = []
    for position, call in enumerate(calls):
        seen[call.name] = seen.get(call.name, 0) + 1
        cases.append(Case(call.name, seen[call.name], position))
    return cases


class Scene:
    """A volume (a file) and the directory of its backup, on which the local part is run."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.device = directory / "device"
        self.backups = directory / "backups"
        self.trace = directory / "trace"
        self.paths = dosvob.ImagePaths(self.backups, NAME)

    def change(self, seed: int, mebibytes: int) -> bytes:
        """Change the volume; returns its new content."""
        scatter(self.device, seed, mebibytes * MIB)
        return self.device.read_bytes()

    def back_up(self) -> None:
        """Back up, here and undisturbed."""
        back_up(self.backups, NAME, self.device)

    def run(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the driver under strace."""
        wrapper = strace(self.backups, NAME, "-o", str(self.trace), *options)
        return run_driver(command, self.backups, NAME, self.device, wrapper=wrapper)

    def record(self, command: str) -> list[Call]:
        """The calls of a run that is left alone."""
        done = self.run(command)
        assert done.returncode == 0, done.stderr
        return calls_in(self.trace)

    def kill(self, command: str, case: Case) -> list[Call]:
        """Run the driver until the case kills it; returns the calls until then."""
        done = self.run(command, case.injection)
        # In how many writes the state gets to the disk depends a little on what comes first.
        assert done.returncode == KILLED or case.call == "write", (case, done)
        return calls_in(self.trace)

    def image(self) -> bytes:
        """The content of the image."""
        return self.paths.image.read_bytes()

    def check_state(self) -> None:
        """If there is a state, it describes the image as it is; and there are no damaged versions."""
        if self.paths.state.exists():
            assert not any(verify(self.paths))

    def versions(self) -> dict[str, bytes]:
        """What the versions that are listed restore to, by their times."""
        return restored(self.paths, self.device.parent)

    def check_settled(self, content: bytes) -> None:
        """The image has the content and a state, and nothing is left beside it but whole versions."""
        assert self.image() == content
        assert not any(verify(self.paths))
        there = {path.name for path in self.backups.rglob(f"{NAME}*")} - {self.paths.versions.name}
        assert there == {NAME, f"{NAME}.state"}
        assert {path.name for path in self.paths.versions.glob("*")} == set(self.versions())


@dataclass(frozen=True)
class Later:
    """A scene with a backup that has a version, and a volume that has changed and grown since; and all the contents."""

    scene: Scene
    oldest: bytes
    old: bytes
    new: bytes

    @classmethod
    def make(cls, directory: Path) -> Later:
        """In a new directory."""
        scene = Scene(directory)
        contents = []
        for seed, mebibytes in ((3, 7), (1, 8)):
            contents.append(scene.change(seed, mebibytes))
            scene.back_up()
        assert list(scene.versions().values()) == contents[:1]
        return cls(scene, contents[0], contents[1], scene.change(2, 10))

    def check(self, *, is_new: bool) -> None:
        """The image is the old or the new one, and so many versions are there with just what they had."""
        assert self.scene.image() == (self.new if is_new else self.old)
        self.scene.check_state()
        assert list(self.scene.versions().values()) == [*([self.old] if is_new else []), self.oldest]


def first_change_of(calls: list[Call], path: Path) -> int:
    """Where a file is changed for the first time."""
    changes = ("write", "pwrite64", "ftruncate", "fallocate")
    return next(n for n, call in enumerate(calls) if call.name in changes and call.files == (str(path),))


def test_a_later_sync_killed_anywhere_leaves_the_old_or_the_new_image(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    calls = Later.make(tmp_path / "whole").scene.record("sync")
    assert sum(commits(calls)) == 1
    assert {call.name for call in calls} >= {"write", "pwrite64", "fsync", "rename", "ftruncate", "fallocate", "unlink"}
    changed = {file for call in calls for file in call.files}
    assert {f"{NAME}.undo", f"{NAME}.versions"} <= {Path(file).name for file in changed}
    for case in sampled(pytestconfig, cases_of(calls), 7):
        later = Later.make(tmp_path / str(case.position))
        scene = later.scene
        committed = any(commits(scene.kill("sync", case)))
        recover(scene.backups, NAME)  # what every command does first, also without a network
        later.check(is_new=committed)
        scene.back_up()
        scene.check_settled(later.new)
        expected = [later.old, later.oldest]
        assert list(scene.versions().values()) == ([later.new, *expected] if committed else expected)


def test_before_its_recovery_a_killed_sync_can_be_restored_from(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """An undo is laid over what is read, also one that was put back in part."""
    calls = Later.make(tmp_path / "whole").scene.record("sync")
    cases = cases_of(calls)
    committed = commits(calls).index(True)
    begun = first_change_of(calls, dosvob.ImagePaths(tmp_path / "whole" / "backups", NAME).image)
    parts = ((cases[:begun], 1), (cases[begun : committed + 1], 3), (cases[committed + 1 :], 2))
    for case in [case for part, count in parts for case in sampled(pytestconfig, part, count)]:
        later = Later.make(tmp_path / str(case.position))
        scene = later.scene
        is_new = any(commits(scene.kill("sync", case)))
        target = tmp_path / f"restored-{case.position}"
        with contextlib.closing(dosvob.Chain(scene.paths)) as chain:
            final, damaged = chain.restore(0, target, lambda count: None)
        assert not damaged.ranges
        assert final.read_bytes() == (later.new if is_new else later.old), case
        assert list(scene.versions().values()) == [*([later.old] if is_new else []), later.oldest], case


def test_a_first_sync_killed_anywhere_leaves_no_image_or_a_whole_one(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    scene = Scene(tmp_path / "whole")
    scene.change(1, 8)
    for case in sampled(pytestconfig, cases_of(scene.record("sync")), 4):
        scene = Scene(tmp_path / str(case.position))
        content = scene.change(1, 8)
        named = became_the_image(scene.kill("sync", case), scene.paths)
        recover(scene.backups, NAME)
        assert scene.paths.image.exists() == named, case
        if scene.paths.image.exists():
            assert scene.image() == content, case
            scene.check_state()
        scene.back_up()
        scene.check_settled(content)


def became_the_image(calls: list[Call], paths: dosvob.ImagePaths) -> bool:
    """Whether what a first sync fetched has got its name."""
    return any(call.name == "rename" and call.succeeded and str(paths.image) in call.files for call in calls)


def test_a_recovery_killed_anywhere_is_finished_by_the_next(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    def interrupted(directory: Path, case: Case) -> Later:
        later = Later.make(directory)
        later.scene.kill("sync", case)
        return later

    sync = Later.make(tmp_path / "sync").scene.record("sync")
    begun = cases_of(sync)[commits(sync).index(True)]  # the last call before the commit
    calls = interrupted(tmp_path / "recovery", begun).scene.record("recover")
    chance = random.Random(pytestconfig.option.seed)
    for case in sampled(pytestconfig, cases_of(calls), 3):
        later = interrupted(tmp_path / str(case.position), begun)
        scene = later.scene
        scene.kill("recover", case)
        # And the one after it, so that an undo is found that was put back in part, twice. It has no more calls to
        # make than the first one, so this one may also come to its end.
        again = chance.choice(cases_of(calls))
        assert scene.run("recover", again.injection).returncode in (KILLED, 0)
        recover(scene.backups, NAME)
        later.check(is_new=False)
        assert not scene.paths.undo.exists()
        scene.back_up()
        scene.check_settled(later.new)


def test_killed_again_and_again_the_sync_gets_on(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Each sync takes up what the one before it left, while the volume goes on changing."""
    later = Later.make(tmp_path / "scene")
    scene = later.scene
    chance = random.Random(pytestconfig.option.seed)
    contents = [later.oldest, later.old, later.new]
    for seed in range(3, 8):
        call, occurrence = chance.choice((("write", 2), ("fsync", 1), ("pwrite64", 3), ("rename", 1), ("unlink", 2)))
        scene.run("sync", killing(occurrence, call))
        recover(scene.backups, NAME)
        assert scene.image() in contents, (call, occurrence)
        assert all(content in contents for content in scene.versions().values())
        contents.append(scene.change(seed, 8 + seed))
    scene.back_up()
    scene.check_settled(contents[-1])


# -- what is durable when


class Durability:
    """Walks through calls, keeping the files and directories that a power cut could still take back."""

    def __init__(self, paths: dosvob.ImagePaths) -> None:
        self.volatile: set[str] = set()
        self._paths = paths
        self._written: set[str] = set()
        self._created = {str(path) for path in (paths.spool, paths.new_state, paths.undo, paths.partial)}

    def follow(self, call: Call) -> None:
        """What becomes volatile or durable by the call."""
        if call.name in ("fsync", "fdatasync"):
            self.volatile.discard(call.files[0])
        elif call.name.startswith(("mkdir", "rename", "unlink")):
            if call.files[-1] != str(self._paths.directory):  # whose parent is the user's
                self.volatile.add(parent(call.files[-1]))
        else:
            self.volatile.add(call.files[0])
            if call.files[0] in self._created - self._written:  # perhaps just now
                self.volatile.add(parent(call.files[0]))
            self._written.add(call.files[0])

    def relies_on(self, call: Call) -> set[str]:
        """What must be durable before the call is made."""
        paths = self._paths
        image, undo, metadata = str(paths.image), str(paths.undo), str(paths.metadata)
        if call.name.startswith("rename"):  # something becomes the image, the state, or a version
            relied_on = {call.files[0]} | (set() if call.files[-1] == image else {image, str(paths.directory)})
            return relied_on | ({metadata} if call.files[0] == undo else set())
        if call.name.startswith("unlink"):
            settled = {image, str(paths.state), metadata, str(paths.versions)}
            return settled if call.files[0] in (undo, str(paths.spool)) else set()
        return {undo, metadata} if call.files[0] == image else set()


def parent(path: str) -> str:
    """The directory of a file."""
    return str(Path(path).parent)


def check_durability(calls: list[Call], paths: dosvob.ImagePaths) -> None:
    """Every step is durable before the next one relies on it, and all is in the end."""
    power = Durability(paths)
    changes = [call for call in calls if call.succeeded]
    for number, call in enumerate(changes):
        if call.name not in ("fsync", "fdatasync"):
            assert not power.volatile & power.relies_on(call), (number, call)
        power.follow(call)
    assert power.volatile <= {str(paths.spool)}  # which promises nothing
    written = [call.files == (str(paths.image),) and call.name not in ("fsync", "fdatasync") for call in changes]
    undo = [call.files == (str(paths.undo),) and call.name == "fsync" for call in changes]
    if True in written:
        last_written = len(written) - 1 - written[::-1].index(True)
        assert undo.index(True) < written.index(True)
        assert last_written < commits(changes).index(True)


def test_everything_is_durable_before_the_next_step_relies_on_it(tmp_path: Path) -> None:
    scene = Later.make(tmp_path / "later").scene
    check_durability(scene.record("sync"), scene.paths)
    shutil.rmtree(scene.paths.versions)  # so that its directory is made
    scene.change(5, 10)
    check_durability(scene.record("sync"), scene.paths)
    first = Scene(tmp_path / "first")
    first.change(1, 8)
    check_durability(first.record("sync"), first.paths)


def test_the_directory_of_the_undo_is_durable_when_an_image_is_adopted(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene")
    scene.backups.mkdir()
    scene.paths.image.write_bytes(scene.change(1, 8))
    scene.change(2, 8)
    trace = strace(scene.backups, NAME, "-o", str(scene.trace))
    subprocess.run([*trace, *driver("sync", scene.backups, NAME, scene.device)], check=True, timeout=60)
    calls = calls_in(scene.trace)
    assert [call.files for call in calls if call.name == "mkdir" and call.succeeded] == [(str(scene.paths.metadata),)]
    check_durability(calls, scene.paths)


def test_an_interrupted_sync_that_was_recovered_is_durable_too(tmp_path: Path) -> None:
    scene = Later.make(tmp_path / "sync").scene
    calls = scene.record("sync")
    scene = Later.make(tmp_path / "recovery").scene
    scene.kill("sync", cases_of(calls)[commits(calls).index(True)])
    recovery = [call for call in scene.record("recover") if call.name != "fdatasync"]  # of what is read
    names = [(call.name, Path(call.files[-1]).name) for call in recovery if call.succeeded]
    assert names[-6:] == [
        ("ftruncate", NAME),
        ("fsync", NAME),  # before its time says that it is what it was
        ("utimensat", NAME),
        ("fsync", NAME),
        ("unlink", f"{NAME}.undo"),
        ("fsync", ".dosvob"),
    ]


# -- the whole script


class WholeScript:
    """The whole script with the simulated account; the volume's content is one of two that are kept to compare."""

    def __init__(self, home: Home, volume: Volume) -> None:
        self.home = home
        self.volume = volume
        self.trace = home.directory / "trace"
        self.paths = dosvob.ImagePaths(home.backups, NAME)
        self.old, self.new = home.directory / "old", home.directory / "new"
        scatter(volume.path, 1, 1 << 30)
        copy(volume.path, self.old)
        scatter(volume.path, 2, 1 << 30)
        copy(volume.path, self.new)

    def put(self, content: Path) -> None:
        """The volume's content becomes this one."""
        copy(content, self.volume.path)

    def run(self, *options: str, expect: int) -> list[Call]:
        """Run the script under strace."""
        wrapper = strace(self.home.backups, NAME, "-o", str(self.trace), *options)
        self.home.run("--backups", str(self.home.backups), wrapper=wrapper, expect=expect, constants=IN_MAIN_THREAD)
        return calls_in(self.trace)

    def forget_volume(self) -> None:
        """Remove all that is there of it, so that the next sync is the first."""
        for path in files_of(self.home.backups, NAME):
            if path.is_file():
                path.unlink()
        shutil.rmtree(self.paths.versions, ignore_errors=True)

    def start_without_the_cloud(self, case: Case) -> None:
        """One of the two ways in which the next start finds no network."""
        if case.position % 2:
            self.home.run("verify", expect=None)  # it does not know an image that has no state yet
        else:
            self.home.run(expect=1, constants=OFFLINE_RUN, DIGITALOCEAN_API_URL=NOWHERE)

    def check_settled(self, case: Case) -> None:
        """The next run succeeds and leaves nothing, here or there."""
        created_from = self.created_from()  # the directory is synced before anything is created
        assert self.home.simulator.alive() or case.position <= created_from
        self.home.run()
        assert same(self.paths.image, self.volume.path)
        assert not self.home.simulator.alive()
        there = {path.name for path in self.home.backups.rglob(f"{NAME}*")} - {self.paths.versions.name}
        assert there == {NAME, f"{NAME}.state"}
        assert not any(verify(self.paths))

    def created_from(self) -> int:
        """How many calls, all about directories, the last run made before its first about a file."""
        directories = {str(self.paths.directory), str(self.paths.metadata)}
        calls = calls_in(self.trace)
        return next((n for n, call in enumerate(calls) if not set(call.files) <= directories), len(calls))


def copy(source: Path, target: Path) -> None:
    """Copy a sparse file."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def test_the_whole_script_killed_in_a_later_sync(home: Home, pytestconfig: pytest.Config) -> None:
    script = WholeScript(home, home.simulator.add_volume(NAME))
    script.put(script.old)
    home.run()
    script.paths.versions.mkdir()  # which is made but once
    script.put(script.new)
    calls = script.run(expect=0)
    check_durability(calls, script.paths)
    assert sum(commits(calls)) == 2  # the commit, and then the note of what was found on the volume
    # A write too many would be one that does not come when the answers come in another order: the driver does those.
    for case in sampled(pytestconfig, [case for case in cases_of(calls) if case.call != "write"], 1):
        script.put(script.old)
        home.run()
        script.put(script.new)
        committed = any(commits(script.run(case.injection, expect=KILLED)))
        script.start_without_the_cloud(case)
        assert same(script.paths.image, script.new if committed else script.old), case
        script.check_settled(case)


def test_the_whole_script_killed_in_a_first_sync(home: Home, pytestconfig: pytest.Config) -> None:
    script = WholeScript(home, home.simulator.add_volume(NAME))
    check_durability(script.run(expect=0), script.paths)
    script.forget_volume()  # and not the directory's id, which is made but once
    calls = script.run(expect=0)
    assert became_the_image(calls, script.paths)
    for case in sampled(pytestconfig, [case for case in cases_of(calls) if case.call != "write"], 1):  # as above
        script.forget_volume()
        named = became_the_image(script.run(case.injection, expect=KILLED), script.paths)
        script.start_without_the_cloud(case)
        assert script.paths.image.exists() == named, case
        assert not script.paths.image.exists() or same(script.paths.image, script.new), case
        script.check_settled(case)
