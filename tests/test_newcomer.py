"""The first month of somebody who has never heard of dosvob, through the real process.

From a clone of the repository to the day on which a file, and then the volume, are needed again.
"""

from __future__ import annotations

import datetime
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import SCRIPT, Home, same
from simulator import Simulator, Volume
from simulator.storage import mounted
from trouble_support import GIB, QUICK, assert_nothing_left, until
from version_reader import Reader

DAYS = 30
START = datetime.datetime(2026, 3, 1, 8, tzinfo=datetime.UTC)  # long ago, so that the whole month lies in the past
DIARY = "diary.txt"

pytestmark = pytest.mark.small


class Month:
    """A user's directory, the volume, and what was on it each day."""

    def __init__(self, home: Home, sim: Simulator, directory: Path, patches: pytest.MonkeyPatch) -> None:
        self.home = home
        self.sim = sim
        self.volume: Volume = sim.add_volume("data")
        subprocess.run(["mkfs.ext4", "-q", "-F", self.volume.path], check=True)
        self.day = 0
        self.kept: dict[int, bytes] = {}
        self._mount = directory / "mounted"
        patches.setattr("simulator.resources.timestamp", lambda _: f"{self.now():%Y-%m-%dT%H:%M:%SZ}")
        sim.limit_snapshots(0)

    def now(self) -> datetime.datetime:
        """The time in the account."""
        return START + datetime.timedelta(days=self.day)

    def say(self, *arguments: str, expect: int = 0) -> str:
        """What a command says."""
        done = self.home.run(*arguments, expect=expect, constants=QUICK, TZ="UTC")
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def write(self) -> None:
        """A day on the volume: the diary goes on, and something else comes and goes."""
        chance = random.Random(self.day)
        with mounted(self.volume.path, self._mount) as root:
            with (root / DIARY).open("a") as diary:
                diary.write(f"day {self.day}\n")
            (root / f"photo-{self.day % 4}").write_bytes(chance.randbytes(1 << 18))

    def pass_day(self) -> None:
        """The next day: something is written, and the cron's backup is made."""
        self.day += 1
        self.write()
        self.say()
        assert same(self.home.image("data"), self.volume.path)
        self.kept[self.day] = self.volume.path.read_bytes()

    def diary_in(self, image: Path) -> str:
        """What the diary has on a copy of an image."""
        with mounted(image, self._mount) as root:
            return (root / DIARY).read_text()


@pytest.fixture
def month(home: Home, sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Month:
    """The day before the first backup."""
    return Month(home, sim, tmp_path, monkeypatch)


def begin(month: Month) -> None:
    """As README has it: each mistake on the way is a line that says what to do."""
    home, conf = month.home, month.home.directory / "conf.json"
    conf.unlink()
    home.backups.mkdir()  # as a clone has it
    assert "copy conf.json.example" in month.say(expect=2)
    shutil.copy(SCRIPT.parent / "conf.json.example", conf)
    conf.chmod(0o600)
    assert "is still the placeholder" in month.say(expect=2)
    assert not month.sim.requests
    conf.write_text(json.dumps({**json.loads(conf.read_text()), "do_token": month.sim.token}))
    assert "would back up data" in month.say("--dry-run")
    assert "there is no backup" in month.say("list")
    assert [path.name for path in home.backups.iterdir() if path.name != ".dosvob"] == []


def kill_a_run(month: Month) -> None:
    """The machine goes down in the middle; the next run removes what is left, and backs up."""
    running = month.home.start(constants=QUICK)
    until(lambda: len(month.sim.alive()) > 1)
    running.kill()
    running.wait()
    assert len(month.sim.alive()) > 1


def look_into_the_image(month: Month, tmp_path: Path) -> None:
    """Who looks into the image itself, with a run coming meanwhile, goes on seeing what was there."""
    before = month.home.image("data").read_bytes()
    with mounted(month.home.image("data"), tmp_path / "looking", "ro", "noload"):
        month.day += 1
        month.write()
        assert "/dev/loop" in month.say(expect=1)
        assert month.home.image("data").read_bytes() == before


def test_a_newcomers_month(month: Month, tmp_path: Path) -> None:
    begin(month)
    for _ in range(DAYS // 3):
        month.pass_day()
    kill_a_run(month)
    look_into_the_image(month, tmp_path)
    month.volume.grow(2)
    while month.day < DAYS:
        month.pass_day()
    said = month.say("list")
    assert "2.0 " in said or str(2 * GIB) in said
    assert "sound" in month.say("verify")
    month.say("health", "--max-age", "1000000")

    # the diary is lost, and only somebody's memory says when it was there
    with mounted(month.volume.path, tmp_path / "mounted") as root:
        (root / DIARY).unlink()
    month.day += 1
    month.say()
    before = f"{month.now() - datetime.timedelta(days=1):%Y-%m-%d}"
    month.say("restore", "data", "copy.img", "--at", before)
    copy = month.home.directory / "copy.img"
    assert copy.read_bytes() == month.kept[DAYS]
    assert month.diary_in(copy).endswith(f"day {DAYS}\n")

    # then the volume is, and comes back as it was a week before
    week_before = max(day for day in days_of_versions(month) if day <= DAYS - 7)
    at = f"{START + datetime.timedelta(days=week_before):%Y-%m-%d}"
    month.say("restore", "data", "--to-volume", "data-2", "--at", at)
    (new,) = (volume for volume in month.sim.volumes if volume.name == "data-2")
    assert new.path.read_bytes()[: len(month.kept[week_before])] == month.kept[week_before]
    month.sim.remove_volume(new)
    assert_nothing_left(month.sim)

    # what is there is what conf.json.example asks for, and each of it is what the volume was
    kept = [moment for moment, _ in Reader(month.home.backups, "data").all()]
    assert 7 <= len(kept) <= 1 + 6 + 7 + 4 + 6
    versions = Reader(month.home.backups, "data").all()
    for day, (_, content) in zip(days_of_versions(month), versions, strict=True):
        assert day == month.day or content == month.kept[day]


def days_of_versions(month: Month) -> list[int]:
    """The days of which there is a backup, the last one first, as `list` tells it."""
    (data,) = json.loads(month.say("list", "--json"))["volumes"]
    return [(datetime.datetime.fromisoformat(version["time"]) - START).days for version in data["versions"]]
