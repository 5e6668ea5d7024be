"""A long history of a volume with a real file system: at any point of it, what is listed is what the volume was."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import version_reader
from mount_support import Shown, shown
from simulator.storage import mounted
from version_reader import Reader
from versions_support import MIB, NAME, PAGE, Lineage, digest, killed_at, recover

import dosvob

SYNCS = 60
GROWN_AT = {17: 8 * MIB, 41: 11 * MIB}
ZEROED_AT = 29
HOURS = (4, 4, 4, 9, 24, 24, 24 * 5, 24 * 16)


class Volume(Lineage):
    """A volume with ext4 and the files of somebody who works on it."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        super().__init__(directory, dosvob.Keep(last=2, daily=3, weekly=2, monthly=3), 6)
        self._chance = chance
        self._mount = directory / "mount"
        self._make()

    def _make(self) -> None:
        self.device.write_bytes(b"")
        with self.device.open("r+b") as file:
            file.truncate(self.size)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", self.device], check=True)

    def work(self) -> None:
        """Files are made, changed and deleted."""
        if not self.device.read_bytes().strip(b"\0"):
            self._make()
        chance = self._chance
        with mounted(self.device, self._mount, "nodiscard" if chance.random() < 0.5 else "discard") as root:
            files = sorted(root.glob("*/*.data"))
            for path in chance.sample(files, min(len(files), chance.randrange(3))):
                path.unlink()
            files = sorted(root.glob("*/*.data"))
            for path in chance.sample(files, min(len(files), chance.randrange(3))):
                with path.open("r+b") as file:
                    file.seek(chance.randrange(1 + path.stat().st_size))
                    file.write(chance.randbytes(chance.randrange(1, 3 * PAGE)))
            for _ in range(chance.randrange(1, 4)):
                directory = root / f"directory-{chance.randrange(4)}"
                directory.mkdir(exist_ok=True)
                path = directory / f"{chance.randrange(10**6)}.data"
                with contextlib.suppress(OSError):  # full, which is as good as anything
                    path.write_bytes(chance.choice((bytes, chance.randbytes))(chance.choice((100, 9000, 300_000))))

    def grow(self, size: int) -> None:
        """Make it larger, and its file system too."""
        self.size = size
        with self.device.open("r+b") as file:
            file.truncate(size)
        subprocess.run(["resize2fs", "-f", self.device], check=True, capture_output=True)

    def clear(self) -> None:
        """Nothing but zeros is left."""
        self.device.write_bytes(bytes(self.size))


def go_through_history(
    volume: Volume, mount: Shown, chance: random.Random, *, exhaustive: bool
) -> tuple[list[str], str]:
    """All of it; returns the times of what is there at its end, and the digest of nothing but zeros."""
    cuts = thinned = 0
    nothing = ""

    def check() -> list[str]:
        """By dosvob the newest and the oldest are restored, and one between; all of them under --all."""
        return volume.check(lambda depths: depths if exhaustive else sorted({0, depths[-1], chance.choice(depths)}))

    for number in range(SYNCS):
        if number in GROWN_AT:
            volume.grow(GROWN_AT[number])
        if number == ZEROED_AT:
            volume.clear()
            nothing = digest(bytes(volume.size))
        else:
            volume.work()
        volume.pass_time(chance.choice(HOURS))
        if number and chance.random() < 0.3:  # the power is cut, and sometimes once more
            for _ in range(chance.choice((1, 1, 2))):
                cuts += killed_at(chance.randrange(1, 70), volume.back_up)[0]
                check()
                if chance.random() < 0.5:
                    recover(volume.backups)
                    check()
                if chance.random() < 0.5:
                    volume.work()
                volume.pass_time(1 / 6)  # the next run takes another snapshot
        before = len(list(volume.paths.versions.glob("*"))) if number else 0
        volume.back_up()
        times = check()
        assert mount.times(NAME) == times
        for time in {times[0], times[-1], chance.choice(times)}:
            assert mount.digest(NAME, time) == volume.truth[time], time
        assert volume.truth[times[0]] == volume.truth[max(volume.truth)]
        thinned += len(times) - 1 <= before
        assert not list(volume.paths.metadata.glob("*.new")), "something is left"
    assert cuts >= 5
    assert thinned >= SYNCS // 2
    assert 3 <= len(times) <= 10  # the image, and at least the last two
    return times, nothing


def test_sixty_syncs_and_every_version_that_is_listed_is_what_the_volume_was(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """By dosvob, by the reader that knows the format from README alone, and by one mount that goes on all the time."""
    chance = random.Random(pytestconfig.option.seed)
    volume = Volume(tmp_path, chance)
    volume.backups.mkdir(mode=0o700)
    with shown(volume.backups, tmp_path / "shown") as mount:
        times, nothing = go_through_history(volume, mount, chance, exhaustive=pytestconfig.option.exhaustive)
        Path("/proc/sys/vm/drop_caches").write_text("1")
        for time, content in Reader(volume.backups, NAME).all():
            assert mount.path(NAME, time).read_bytes() == content
    with contextlib.closing(dosvob.Chain(volume.paths, from_disk=True)) as chain:
        assert not any(ranges.ranges for ranges in chain.verify(lambda size: None))
    # An older version is a file system, unless it is of when there was none; and it is what the reader writes as a
    # program, from another directory.
    moved, file = tmp_path / "copy", tmp_path / "file"
    shutil.copytree(volume.backups, moved)
    reader = [sys.executable, "-I", version_reader.__file__, str(moved), NAME]
    told = subprocess.run(reader, check=True, capture_output=True, text=True).stdout
    assert told.split() == times
    oldest = [time for time in times if volume.truth[time] != nothing][-1]
    subprocess.run([*reader, oldest, file], check=True)
    subprocess.run(["e2fsck", "-f", "-n", file], check=True, capture_output=True)
    with mounted(file, tmp_path / "look", "ro") as root:
        assert list(root.glob("*/*.data"))
