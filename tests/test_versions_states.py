"""Versions under whatever happens, in any order: a machine of states that Hypothesis drives.

Whatever is listed restores to the very bytes that the volume had, or is named as damaged; and what was damaged here is
damaged there only where it must be.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from version_reader import Reader
from versions_support import (
    MIB,
    NAME,
    PAGE,
    Lineage,
    check_all,
    digest,
    file_name,
    killed_at,
    leave_written,
    recover,
    thin,
)

import dosvob

CHUNKS = 3
KEEPS = st.one_of(
    st.just(dosvob.Keep(100, 0, 0, 0)),
    st.builds(dosvob.Keep, st.integers(0, 4), st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)),
)
HOURS = st.sampled_from((1, 5, 24, 24 * 7, 24 * 40))


class Versions(RuleBasedStateMachine):
    """A volume, its backup, and what it was at each backup."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="dosvob-test-"))
        self.lineage = Lineage(self.directory, dosvob.Keep(100, 0, 0, 0), CHUNKS)
        self.contents: dict[str, bytes] = {}
        self.rotten = False  # something was damaged here: what is not sound is told, but may be there
        self.unknown = False  # a state was lost: damage would not be told

    def teardown(self) -> None:
        """Nothing is left."""
        shutil.rmtree(self.directory)

    @initialize()
    def begin(self) -> None:
        """The first backup."""
        self.lineage.device.write_bytes(bytes(CHUNKS * MIB))
        self.lineage.change()
        self._later(1)
        self.lineage.back_up()

    def is_settled(self) -> bool:
        """Whether there is a backup of this volume, and nothing to be taken back."""
        paths = self.lineage.paths
        state = dosvob.State.load(paths.state) if paths.image.exists() and not paths.undo.exists() else None
        return state is not None and state.snapshot.volume_id == self.lineage.volume_id

    def _later(self, hours: float) -> None:
        self.lineage.pass_time(hours)
        self.contents[file_name(self.lineage.now)] = self.lineage.device.read_bytes()

    # The volume

    @rule(
        place=st.integers(0, CHUNKS * MIB // PAGE - 8),
        pages=st.sampled_from((1, 2, 8)),
        seed=st.integers(0, 1 << 20),
        zeros=st.booleans(),
    )
    def write(self, place: int, pages: int, seed: int, zeros: bool) -> None:
        """Some pages of the volume change."""
        data = bytes(pages * PAGE) if zeros else random.Random(seed).randbytes(pages * PAGE)
        with self.lineage.device.open("r+b") as file:
            file.seek(place * PAGE)
            file.write(data)

    @rule()
    def change_much(self) -> None:
        """All sorts of changes."""
        self.lineage.change()

    @rule(times=st.integers(1, 40))
    def as_it_was(self, times: int) -> None:
        """The volume becomes what it was, as by a restore."""
        old = self.contents[sorted(self.contents)[-1 - times % len(self.contents)]]
        size = self.lineage.size
        self.lineage.device.write_bytes(old.ljust(size, b"\0")[:size])

    @precondition(lambda self: self.lineage.size < (CHUNKS + 2) * MIB)
    @rule()
    def grow(self) -> None:
        """It becomes larger by a chunk."""
        self.lineage.size += MIB
        os.truncate(self.lineage.device, self.lineage.size)

    @precondition(lambda self: not self.rotten)
    @rule(hours=HOURS, number=st.integers(0, 60))
    def make_anew(self, hours: float, number: int) -> None:
        """Another volume has its name; the first backup of it may be killed."""
        self.lineage.volume_id += "-anew"
        self.lineage.size = CHUNKS * MIB
        self.lineage.device.unlink()
        self.lineage.change()
        self._later(hours)
        killed_at(number, self.lineage.back_up)

    # Backups, and what can happen in them

    @rule(hours=HOURS, reread=st.booleans())
    def back_up(self, hours: float, reread: bool) -> None:
        """A backup that is left alone."""
        self._later(hours)
        warnings: list[str] = []
        self.lineage.back_up(reread=reread, warn=warnings.append)
        if not self.rotten:
            assert not [text for text in warnings if "moved to" in text]
            assert not [text for text in warnings if "not thinned" in text]
            with contextlib.closing(dosvob.Chain(self.lineage.paths)) as chain:
                moments = [self.lineage.now, *(version.moment for version in chain.versions)]
            assert all(self.lineage.keep.wanted(moments))
        assert self.lineage.paths.image.read_bytes() == self.lineage.device.read_bytes() or not reread

    @rule(hours=HOURS, number=st.integers(1, 80))
    def kill_a_backup(self, hours: float, number: int) -> None:
        """A backup is killed at a call that changes a file."""
        self._later(hours)
        killed_at(number, self.lineage.back_up)

    @precondition(lambda self: self.is_settled())
    @rule(hours=HOURS)
    def cut_the_power_at_the_commit(self, hours: float) -> None:
        """A backup ends just before its commit."""
        self._later(hours)
        leave_written(self.lineage.backups, self.lineage.device, self.lineage.now, volume_id=self.lineage.volume_id)

    @rule()
    def recover(self) -> None:
        """Another command takes back what there is to be taken back."""
        recover(self.lineage.backups)

    @rule(number=st.integers(1, 40))
    def kill_a_recovery(self, number: int) -> None:
        """And is killed."""
        killed_at(number, lambda: recover(self.lineage.backups))

    @rule(keep=KEEPS)
    def wish(self, keep: dosvob.Keep) -> None:
        """Something else is to be kept."""
        self.lineage.keep = keep

    @precondition(lambda self: self.lineage.paths.state.exists())
    @rule(keep=KEEPS, number=st.integers(0, 40))
    def thin(self, keep: dosvob.Keep, number: int) -> None:
        """Versions are thinned, and that is killed or not."""

        def work() -> None:
            with contextlib.suppress(dosvob.Damaged):
                thin(self.lineage.backups, keep)

        if not self.lineage.paths.undo.exists():
            killed_at(number, work)

    # What the disk and its user can do

    def _change_byte(self, path: Path, place: int, *, secretly: bool) -> None:
        status = path.stat()
        offset = place % status.st_size
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
        if secretly:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.rotten = True

    @precondition(lambda self: not self.rotten)
    @rule()
    def lose_the_state(self) -> None:
        """Nothing is known of the image any more."""
        self.lineage.paths.state.unlink(missing_ok=True)
        self.unknown = True

    @precondition(lambda self: not self.unknown)
    @rule(place=st.integers(0, CHUNKS * MIB - 1), secretly=st.booleans())
    def spoil_the_image(self, place: int, secretly: bool) -> None:
        """A byte of the image decays, or somebody writes to it."""
        if self.lineage.paths.image.exists():
            self._change_byte(self.lineage.paths.image, place, secretly=secretly)

    @precondition(lambda self: not self.unknown)
    @rule(place=st.integers(0, 1 << 30), which=st.integers(0, 20))
    def spoil_a_version(self, place: int, which: int) -> None:
        """A byte of a version decays."""
        versions = sorted(self.lineage.paths.versions.glob("*Z"))
        if versions:
            self._change_byte(versions[which % len(versions)], place, secretly=True)

    @rule()
    def touch(self) -> None:
        """The image's time changes, and nothing else."""
        if self.lineage.paths.image.exists():
            os.utime(self.lineage.paths.image)

    # What must hold

    @invariant()
    def what_is_listed_is_what_it_was(self) -> None:
        """By dosvob, told damage excepted; and by the reader, if nothing was damaged here."""
        paths = self.lineage.paths
        if not paths.image.exists() or not paths.state.exists():
            return
        with contextlib.closing(dosvob.Chain(paths)) as chain:
            assert chain.state is not None or self.rotten or self.unknown
            if chain.state is None:
                return
            moments = [chain.state.moment, *(version.moment for version in chain.versions)]
            times = [file_name(moment) for moment in moments]
            assert times == sorted(set(times), reverse=True)
            sizes = [chain.size, *(version.snapshot.size if version.snapshot else 0 for version in chain.versions)]
            damaged = chain.verify(lambda size: None)
            for depth, (time, size, ranges) in enumerate(zip(times, sizes, damaged, strict=True)):
                lost = {place // MIB for start, end in ranges.ranges for place in range(start, end, MIB)}
                for content in itertools.islice(chain.contents(depth), size // MIB):
                    is_right = content.chunk == self.contents[time][content.index * MIB : (content.index + 1) * MIB]
                    assert is_right or not content.is_sound, f"chunk {content.index} of {time} is wrong, and not told"
                    assert content.is_sound or self.rotten, f"chunk {content.index} of {time} is said to be damaged"
                    assert content.is_sound == (content.index not in lost), f"chunk {content.index} of {time}"
        if not self.rotten:
            read = {time: digest(content) for time, content in Reader(self.lineage.backups, NAME).all()}
            assert read == {time: self.lineage.truth[time] for time in times}
            assert not list(paths.metadata.glob("*.damaged*"))
            for aside in dosvob.Home(self.lineage.backups).names() - {NAME}:
                if (self.lineage.backups / aside).exists() and (paths.metadata / f"{aside}.state").exists():
                    check_all(self.lineage.backups, self.lineage.truth, aside, lambda depths: depths[-1:])

    @rule(which=st.integers(0, 20))
    def restore(self, which: int) -> None:
        """Restore one into a file."""
        if not self.lineage.paths.image.exists():
            return
        with contextlib.closing(dosvob.Chain(self.lineage.paths)) as chain:
            if chain.state is None:
                return
            depth = which % (1 + len(chain.versions))
            moment = chain.versions[depth - 1].moment if depth else chain.state.moment
            final, damaged = chain.restore(depth, self.directory / "file", lambda size: None)
        content = final.read_bytes()
        final.unlink()
        truth = self.contents[file_name(moment)]
        assert (final.name == "file") == (not damaged.ranges)
        assert len(content) >= len(truth)
        for start, end in damaged.ranges:
            content = content[:start] + truth[start:end].ljust(end - start, b"\0") + content[end:]
        assert content.ljust(len(truth), b"\0")[: len(truth)] == truth
        assert self.rotten or not damaged.ranges


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_versions_under_whatever_happens(pytestconfig: pytest.Config) -> None:
    examples, steps = (400, 40) if pytestconfig.option.exhaustive else (20, 16)
    run_state_machine_as_test(
        Versions,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
