"""`restore --to-volume`: a new volume has the very bytes from its birth on, or there is none; nothing else stays."""

from __future__ import annotations

import datetime
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, Home, same, sampled, write_at
from simulator import FOREVER, Behaviour, Fault, Resource, Simulator, Volume
from test_faults import FAULTS, Call, calls_of
from trouble_support import (
    FAST,
    GIB,
    Running,
    account,
    answered,
    assert_nothing_left,
    droplet_python,
    run,
    small_volumes,
    start,
    until,
)
from versions_support import back_up, leave_written

NEW = "data-2"
DAY = datetime.datetime(2026, 3, 1, 8, 0, tzinfo=datetime.UTC)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_volumes(monkeypatch)


@pytest.fixture
def behaviour(request: pytest.FixtureRequest) -> Behaviour:
    """A fast account, with the changes that `behaving` gives."""
    return replace(FAST, **getattr(request, "param", {}))


def behaving(**changes: Any) -> pytest.MarkDecorator:
    """Change the behaviour of a test's account."""
    return pytest.mark.parametrize("behaviour", [changes], indirect=True, ids=["changed"])


def fill(path: Path) -> None:
    """A volume with random data, text, half a page, and zeros before, between and behind."""
    source = random.Random(path.name)
    with path.open("wb") as file:
        file.truncate(GIB)
    write_at(path, MIB + 8192, source.randbytes(3 * MIB))
    write_at(path, 6 * MIB, b"a line of text, over and over\n" * 40_000)
    write_at(path, 9 * MIB + 5000, b"half a page")
    write_at(path, 14 * MIB, source.randbytes(MIB // 2))


@dataclass
class Lost:
    """What the volume was at two backups; it is lost now."""

    older: Path
    newer: Path


@pytest.fixture
def lost(tmp_path: Path, home: Home) -> Lost:
    return lose(tmp_path, home)


def lose(directory: Path, home: Home) -> Lost:
    """Two backups of a volume that is not in the account any more."""
    device = directory / "device"
    older, newer = directory / "older", directory / "newer"
    fill(device)
    back_up(home.backups, device, DAY)
    older.write_bytes(device.read_bytes())
    write_at(device, 2 * MIB, b"changed" * 1000)
    write_at(device, 12 * MIB, b"new" * 1000)
    back_up(home.backups, device, DAY + datetime.timedelta(days=1))
    newer.write_bytes(device.read_bytes())
    return Lost(older, newer)


@dataclass
class There:
    """A volume that is still there, and is not any more what it was at two backups."""

    volume: Volume
    older: Path
    newer: Path


@pytest.fixture
def there(tmp_path: Path, home: Home, sim: Simulator) -> There:
    return damage(tmp_path, home, sim)


def damage(directory: Path, home: Home, sim: Simulator) -> There:
    """Two backups of a volume, and what happened to it since."""
    volume = sim.add_volume("data")
    older, newer = directory / "older", directory / "newer"
    fill(volume.path)
    back_up(home.backups, volume.path, DAY, volume_id=volume.id)
    older.write_bytes(volume.path.read_bytes())
    write_at(volume.path, 2 * MIB, b"changed" * 1000)
    back_up(home.backups, volume.path, DAY + datetime.timedelta(days=1), volume_id=volume.id)
    newer.write_bytes(volume.path.read_bytes())
    write_at(volume.path, 3 * MIB + 5, b"damaged")
    write_at(volume.path, 11 * MIB, b"where zeros were" * 2000)
    write_at(volume.path, 6 * MIB + 4096, bytes(20_000))
    return There(volume, older, newer)


def new_volume(sim: Simulator, name: str = NEW) -> Volume:
    """The one that was made."""
    (volume,) = [volume for volume in sim.volumes if volume.name == name]
    return volume


def sent(done: subprocess.CompletedProcess[str]) -> float:
    """How many bytes a restore says that it sent."""
    match = re.search(r"compared: ([\d.]+) (B|KiB|MiB) were sent", done.stdout)
    assert match, done.stdout
    return float(match[1]) * {"B": 1, "KiB": 1024, "MiB": MIB}[match[2]]


def assert_only(sim: Simulator, *volumes: Resource) -> None:
    """Nothing else that was created is still there."""
    assert sim.alive() == list(volumes)


def assert_nothing_made(sim: Simulator) -> None:
    """Nothing at all was ever created."""
    assert [item for item in sim.ever if not item.decoy] == []


def restore(home: Home, *arguments: object, expect: int | None = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """Restore `data` into a new volume."""
    return run(home, "restore", *map(str, arguments), "--to-volume", NEW, expect=expect, **more)


# -- what comes back


def test_latest_comes_back(home: Home, sim: Simulator, lost: Lost) -> None:
    done = restore(home, "data")
    volume = new_volume(sim)
    assert same(volume.path, lost.newer)
    assert_only(sim, volume)
    assert (volume.name, volume.region, volume.size_gib, volume.tags) == (NEW, "fra1", 1, [])
    assert not volume.droplet_id
    said = done.stdout
    assert f"is now also the volume {NEW} (id {volume.id}, $0.10 a month) in fra1" in said
    assert "all of it was read back there and compared" in said
    assert f"doctl compute volume-action attach {volume.id} DROPLET-ID" in said
    assert f"  mount /dev/disk/by-id/scsi-0DO_Volume_{NEW} /mnt" in said
    assert "this run cost about $0.02" in said
    assert done.stderr == ""
    assert f"{NEW} begins empty, for there is no volume data any more" in said


def test_it_is_the_users_from_then_on(home: Home, sim: Simulator, lost: Lost) -> None:
    restore(home, "data")
    for command in (["sweep", "--all"], ["list"], []):
        done = run(home, *command)
        assert "restore" not in done.stdout + done.stderr
    assert same(home.image(NEW), lost.newer)
    assert_only(sim, new_volume(sim))


def test_older_version_comes_back(home: Home, sim: Simulator, lost: Lost) -> None:
    done = restore(home, "data", "--at", "2026-03-01T12:00Z")
    assert "of data of 2026-03-01 08:00:00 +0000" in done.stdout
    assert same(new_volume(sim).path, lost.older)


def test_larger_and_in_another_region(home: Home, sim: Simulator, lost: Lost) -> None:
    restore(home, "data", "--size", 2, "--region", "nyc3")
    volume = new_volume(sim)
    assert (volume.region, volume.size_gib) == ("nyc3", 2)
    content = volume.path.read_bytes()
    assert content == lost.newer.read_bytes() + bytes(GIB)
    (droplet,) = [item for item in sim.ever if item.kind == "droplet"]
    assert droplet.region == "nyc3"


def test_volume_that_had_grown_when_the_power_went(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    """The image was written and not committed: what is restored is the snapshot before, and nothing put it back yet."""
    device = tmp_path / "device"
    os.truncate(device, 2 * GIB)
    write_at(device, GIB + 5, b"grown")
    before = home.image("data").read_bytes()
    leave_written(home.backups, device, DAY + datetime.timedelta(days=2))
    assert home.image("data").stat().st_size == 2 * GIB
    restore(home, "data")
    assert new_volume(sim).path.read_bytes() == before


def test_same_name_may_be_in_another_region(home: Home, sim: Simulator, lost: Lost) -> None:
    sim.add_volume(NEW, "nyc3")
    restore(home, "data")
    (volume,) = sim.alive()
    assert volume.region == "fra1"


def test_region_is_the_images_own(home: Home, sim: Simulator, lost: Lost) -> None:
    home.configure(region="nyc3")
    restore(home, "data")
    assert new_volume(sim).region == "fra1"


def test_image_of_one_of_several_regions(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    """Its name says where it was."""
    home.configure(region=["fra1", "nyc3"])
    volume = sim.add_volume("data", "nyc3")
    fill(volume.path)
    run(home, expect=1)  # for there is none in fra1 any more
    done = restore(home, "data", expect=2)
    assert "data may be fra1/data or nyc3/data: say which" in done.stderr
    restore(home, "nyc3/data")
    assert new_volume(sim).region == "nyc3"
    assert same(new_volume(sim).path, volume.path)
    done = run(home, "restore", "--from", "backups/nyc3/data", "--to-volume", "third", expect=2)
    assert "say in which region the volume is to be, with --region" in done.stderr


@pytest.mark.parametrize("size", [5 * MIB // 2 + 777, GIB + 1, 2 * GIB])
def test_any_file(home: Home, sim: Simulator, tmp_path: Path, size: int) -> None:
    """Its size need not be that of a volume; there need not be any backup."""
    file = tmp_path / "disk.img"
    content = random.Random(size).randbytes(size - MIB) + bytes(MIB - 5) + b"end.."
    file.write_bytes(content)
    home.configure(region="nyc3")
    done = restore(home, "--from", file)
    volume = new_volume(sim)
    assert volume.size_gib == -(-size // GIB)
    assert volume.region == "nyc3"
    assert volume.path.read_bytes() == content.ljust(volume.size_gib * GIB, b"\0")
    assert "was not checked" in done.stdout


def test_image_that_was_set_aside(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    fill(tmp_path / "other")
    back_up(home.backups, tmp_path / "other", DAY + datetime.timedelta(days=2), volume_id="volume-2")
    (aside,) = home.backups.glob("data.set-aside-*")
    restore(home, aside.name)
    assert same(new_volume(sim).path, lost.newer)


def test_image_that_somebody_else_made(home: Home, sim: Simulator) -> None:
    """It lies among the backups, and nothing is recorded of it; its size may be odd."""
    home.backups.mkdir()
    content = random.Random(1).randbytes(2 * MIB + 77)
    home.image("data").write_bytes(content)
    done = restore(home, "data")
    assert new_volume(sim).path.read_bytes() == content.ljust(GIB, b"\0")
    assert "was not checked" in done.stdout


def test_nothing_but_zeros(home: Home, sim: Simulator, tmp_path: Path) -> None:
    file = tmp_path / "zeros"
    file.write_bytes(b"")
    with file.open("r+b") as empty:
        empty.truncate(2 * GIB)
    restore(home, "--from", file)
    assert new_volume(sim).path.read_bytes() == bytes(2 * GIB)


# -- what is refused, before anything is created


REFUSED: dict[str, tuple[list[str], str]] = {
    "small": (["data", "--size", "0"], "data of 2026-03-02 08:00:00 +0000 needs 1 GiB, and --size says 0"),
    "huge": (["data", "--size", "16385"], "a volume has at most 16384 GiB"),
    "no-volumes": (["data", "--region", "ams2"], 'region "ams2" has no volumes or is closed; those with volumes are '),
    "no-region": (["data", "--region", "mars1"], 'there is no region "mars1"'),
    "no-image": (["dato"], "there is no image of dato in backups: did you mean data?"),
    "no-version": (["data", "--at", "2020-01-01"], "data has no version as old as"),
    "no-name": ([], "restore --to-volume takes a volume's name, or --from FILE"),
    "both": (["data", "--from", "conf.json"], "restore --to-volume takes a volume's name, or --from FILE"),
    "at-file": (["--from", "conf.json", "--at", "today"], "--from FILE without --at"),
    "no-file": (["--from", "nowhere.img"], "there is no file nowhere.img"),
    "empty": (["--from", "empty.img"], "empty.img is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(home: Home, sim: Simulator, lost: Lost, case: str) -> None:
    (home.directory / "empty.img").touch()
    arguments, message = REFUSED[case]
    done = restore(home, *arguments, expect=2, TZ="UTC")
    assert message in done.stderr
    assert_nothing_made(sim)


@pytest.mark.parametrize("name", ["Data", "1data", "data_2", "d" * 65, "dosvob-ephemeral-1", "../data", ""])
def test_name_that_no_volume_has(home: Home, sim: Simulator, lost: Lost, name: str) -> None:
    """Or that would be swept."""
    done = run(home, "restore", "data", "--to-volume", name, expect=2)
    assert "cannot be the name of the new volume" in done.stderr
    assert_nothing_made(sim)


def test_name_that_is_taken(home: Home, sim: Simulator, lost: Lost) -> None:
    sim.add_volume(NEW)
    done = restore(home, "data", expect=2)
    assert f"there is a volume {NEW} in fra1 already: take another name" in done.stderr
    assert_nothing_made(sim)


@pytest.mark.parametrize("option", [("--size", "2"), ("--region", "fra1"), ("--from", "x")])
def test_options_of_a_volume_need_one(home: Home, sim: Simulator, lost: Lost, option: tuple[str, str]) -> None:
    done = home.run("restore", "data", "file.img", *option, expect=2)
    assert f"restore uses {option[0]} with --to-volume alone" in done.stderr


@behaving(volume_limit=2)
def test_limit_of_volumes(home: Home, sim: Simulator, lost: Lost) -> None:
    sim.add_volume("one")
    sim.add_volume("two", "nyc3")
    done = restore(home, "data", expect=2)
    assert "your account may have 2 volumes and has 2" in done.stderr
    assert_nothing_made(sim)


@behaving(droplet_limit=1)
def test_limit_of_droplets(home: Home, sim: Simulator, lost: Lost) -> None:
    sim.add_droplet("web")
    done = restore(home, "data", expect=2)
    assert "your account may have 1 droplets and has 1" in done.stderr
    assert_nothing_made(sim)


@behaving(capacity_gib=3)
def test_limit_of_the_capacity(home: Home, sim: Simulator, lost: Lost) -> None:
    """Nobody tells it before; a volume of that size is what is asked for first."""
    done = restore(home, "data", "--size", 4, expect=1)
    assert "capacity" in done.stderr
    assert_nothing_made(sim)


AT_FIRST = ("account:read", "regions:read", "sizes:read", "image:read", "droplet:read", "block_storage:read")
BEFORE_THE_UPLOAD = (
    *("droplet:create", "block_storage:create", "block_storage_action:create", "block_storage_action:read"),
    *("tag:create", "ssh_key:read", "ssh_key:create", "snapshot:read"),
)


@pytest.mark.parametrize("scope", AT_FIRST)
def test_scope_that_the_token_lacks(home: Home, sim: Simulator, lost: Lost, scope: str) -> None:
    sim.token_lacks(scope)
    done = restore(home, "data", expect=None)
    assert done.returncode
    assert scope in done.stderr
    assert_nothing_made(sim)


@pytest.mark.parametrize("scope", BEFORE_THE_UPLOAD)
def test_scope_that_is_missed_before_the_upload(home: Home, sim: Simulator, lost: Lost, scope: str) -> None:
    sim.token_lacks(scope)
    done = restore(home, "data", expect=1, constants={"TEARDOWN_PATIENCE": 0.3})
    assert scope in done.stderr
    assert "were sent" not in done.stdout
    sim.token_lacks()
    run(home, "sweep")
    assert_nothing_left(sim)


def test_scope_for_a_snapshot_is_missed_before_the_upload(home: Home, sim: Simulator, there: There) -> None:
    sim.token_lacks("block_storage_snapshot:create")
    done = restore(home, "data", expect=1)
    assert "block_storage_snapshot:create" in done.stderr
    assert_nothing_made(sim)


@pytest.mark.parametrize("scope", ["droplet:delete", "ssh_key:delete", "snapshot:delete"])
def test_what_may_not_be_removed_is_named(home: Home, sim: Simulator, lost: Lost, scope: str) -> None:
    """And the new volume is there all the same: hours of upload are in it."""
    sim.token_lacks(scope)
    done = restore(home, "data", expect=1, constants={"TEARDOWN_PATIENCE": 0.3})
    assert "LEFT BEHIND" in done.stderr
    assert same(new_volume(sim).path, lost.newer)
    assert "is now also the volume" in done.stdout
    sim.token_lacks()
    run(home, "sweep")
    assert_only(sim, new_volume(sim))


def test_version_that_is_damaged(home: Home, sim: Simulator, lost: Lost) -> None:
    (version,) = (home.backups / ".dosvob" / "data.versions").iterdir()
    write_at(version, version.stat().st_size - 100, b"rot")
    done = restore(home, "data", "--at", "2026-03-01", expect=1, TZ="UTC")
    assert f"{version.name} is damaged" in done.stderr
    assert "dosvob.py restore data FILE --at '2026-03-01 08:00:00 +0000'" in done.stderr
    assert_nothing_made(sim)
    restore(home, "data")  # which does not need it


def test_image_that_was_cut(home: Home, sim: Simulator, lost: Lost) -> None:
    with home.image("data").open("r+b") as image:
        image.truncate(7 * MIB)
    done = restore(home, "data", expect=1)
    assert f"has only {7 * MIB} bytes of {GIB}" in done.stderr
    assert_nothing_made(sim)


def test_image_that_was_cut_behind_its_last_data(home: Home, sim: Simulator, lost: Lost) -> None:
    """All is there: what is gone are zeros, as their digests tell."""
    os.truncate(home.image("data"), 15 * MIB)
    restore(home, "data")
    assert same(new_volume(sim).path, lost.newer)


def test_chunk_that_is_damaged(home: Home, sim: Simulator, lost: Lost) -> None:
    """Which is found on the way; the rest of it can be had, and be made a volume."""
    write_at(home.image("data"), 3 * MIB + 17, b"rot")
    done = restore(home, "data", expect=1, TZ="UTC")
    assert f"data of 2026-03-02 08:00:00 +0000 is damaged at byte {3 * MIB}" in done.stderr
    assert_nothing_left(sim)
    words = done.stderr.partition("dosvob.py ")[2].splitlines()[0].replace("FILE", "rest.img").replace("'", "")
    command, name, target, _, *time = words.split()
    run(home, command, name, target, "--at", " ".join(time), expect=1, TZ="UTC")
    restore(home, "--from", "rest.img.damaged")
    assert same(new_volume(sim).path, home.image("data"))


# -- the droplet and the way to it


HALTING = """
import os
work = CLASS.METHOD
seen = []
def halting(self, *what):
    result = work(self, *what)
    seen.append(what)
    for number in range(TIMES):
        if len(seen) >= 3:
            try:
                os.mkdir("DIRECTORY/halted-%d" % number)
                time.sleep(1000)
            except FileExistsError:
                pass
    return result
CLASS.METHOD = halting
"""


class Halt:
    """The first agents stand still after three chunks that they have written, so that a test can act in the middle."""

    def __init__(self, directory: Path, times: int = 1, what: str = "Agent.write_pages") -> None:
        self._directory = directory
        body = HALTING.replace("TIMES", str(times)).replace("DIRECTORY", str(directory))
        self.fault = droplet_python(directory, body.replace("CLASS.METHOD", what))

    def wait(self, number: int = 0) -> None:
        """Wait until that one has stopped."""
        until((self._directory / f"halted-{number}").exists)


def start_restore(home: Home, *arguments: str, **constants: Any) -> Running:
    return start(home, "restore", "data", "--to-volume", NEW, *arguments, constants=constants)


def test_connection_that_breaks(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path, times=2)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    for number in range(2):
        halt.wait(number)
        sim.droplets[0].cut()
    assert running.end() == 0, running.output
    assert running.output.count("connecting again") >= 2
    assert same(new_volume(sim).path, lost.newer)
    assert_only(sim, new_volume(sim))


def test_connection_that_breaks_when_it_is_read_back(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path, what="Agent.read")
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    sim.droplets[0].cut()
    assert running.end() == 0, running.output
    assert "connecting again" in running.output
    assert same(new_volume(sim).path, lost.newer)


def test_droplet_that_is_lost_is_replaced_once(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    sim.droplets[0].kill()
    assert running.end() == 0, running.output
    assert "making another one" in running.output
    assert same(new_volume(sim).path, lost.newer)
    assert_only(sim, new_volume(sim))


def test_droplets_that_are_lost(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path, times=3)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    for number in range(3):
        halt.wait(number)
        sim.droplets[-1].kill()
    assert running.end() == 1
    assert "3 droplets were lost over it" in running.output
    assert_nothing_left(sim)


def test_silence_is_not_waited_for(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home, STALL_LIMIT=8)
    halt.wait()
    sim.droplets[0].stall()
    running.wait_for("connecting again")
    sim.droplets[0].resume()
    assert running.end() == 0, running.output
    assert same(new_volume(sim).path, lost.newer)


STOPPING = """
import os, signal
try:
    os.mkdir("DIRECTORY/stopped")
    os.kill(os.getppid(), signal.SIGSTOP)
except FileExistsError:
    pass
"""


def test_what_is_sent_into_silence_is_not_waited_for(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    """It is in the kernel's hands by then: here the droplet's sshd stands still before it has taken anything."""
    sim.faults.add(droplet_python(tmp_path, STOPPING.replace("DIRECTORY", str(tmp_path))))
    done = restore(home, "data", constants={"STALL_LIMIT": 5, "ENDING_LIMIT": 2})
    assert "connecting again" in done.stderr
    assert same(new_volume(sim).path, lost.newer)


def test_droplet_without_zstd(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    sim.faults.add(droplet_python(tmp_path, "LIBZSTD = None"))
    restore(home, "data")
    assert same(new_volume(sim).path, lost.newer)


LIES = {
    "never-writes": ("Agent.write_runs = lambda *_: None", "also when written once more"),
    "writes-wrong": (
        (
            "write = Agent.write_runs\n"
            "Agent.write_runs = lambda self, index, pages, data: write(self, index, pages, bytes(len(data)))"
        ),
        "also when written once more",
    ),
    "writes-behind": (
        (
            "write = Agent.write_runs\n"
            "Agent.write_runs = lambda self, index, *what: write(self, index and index - 1, *what)"
        ),
        "also when written once more",
    ),
    "announces": (
        "write = Agent.write_pages\nAgent.write_pages = lambda *what: (write(*what), LIE)",
        "and 16 of 16 was",
    ),
    "answers": ("answer = Agent.answer\nAgent.answer = lambda self, *_: self.put(RAW, 0, bytes(4128))", "of the kind"),
    "other-device": (
        "Agent.open_device = lambda self: self.announce(framed(HELLO, 0, AGENT_MAGIC, bytes(9)))",
        "not one of 1 GiB",
    ),
    "fails": ("def fail(self, *_):\n    raise OSError(5, 'broken')\nAgent.write_runs = fail", "broken"),
    "fails-late": (
        (
            "import time\n"
            "def fail(self, *_):\n    time.sleep(2)  # all that fits under way is\n    raise OSError(5, 'broken')\n"
            "Agent.write_runs = fail"
        ),
        "broken",
    ),
    "not-durable": ("def fail(_):\n    raise OSError(5, 'broken')\nos.fdatasync = fail", "broken"),
}


@pytest.mark.parametrize("lie", LIES)
def test_droplet_that_lies(home: Home, sim: Simulator, tmp_path: Path, lost: Lost, lie: str) -> None:
    body, message = LIES[lie]
    sim.faults.add(droplet_python(tmp_path, body.replace("LIE", "what[0].put(DIGEST, 0, bytes(32))")))
    done = restore(home, "data", expect=1)
    assert message in done.stderr
    assert ("written once more" in done.stderr) == ("once more" in message)
    assert_nothing_left(sim)


def test_page_that_was_stored_wrong_is_written_once_more(
    home: Home, sim: Simulator, tmp_path: Path, lost: Lost
) -> None:
    """Zeros too, where the volume has something else; and of a chunk no more than that page."""
    body = """
write = Agent.write_runs
def wrong(self, index, pages, data):
    write(self, index, pages, data)
    if index % 2:
        write(self, index - 1, 4, b"!" * PAGE)
Agent.write_runs = wrong
"""
    sim.faults.add(droplet_python(tmp_path, body))
    done = restore(home, "data")
    assert "are not what was written, the first one at byte" in done.stderr
    assert "they are written once more" in done.stderr
    assert same(new_volume(sim).path, lost.newer)
    assert_only(sim, new_volume(sim))


def test_zeros_are_written_beyond_the_end_of_what_is_restored(
    home: Home, sim: Simulator, tmp_path: Path, lost: Lost
) -> None:
    """A new volume that is larger has them there; if it does not, they are written like all else."""
    body = f"""
write = Agent.write_runs
def dirty(self, index, pages, data):
    try:
        os.mkdir({str(tmp_path / "lied")!r})
        write(self, {GIB // MIB + 3}, 1, b"!" * PAGE)
    except FileExistsError:
        pass
    write(self, index, pages, data)
Agent.write_runs = dirty
"""
    sim.faults.add(droplet_python(tmp_path, body))
    done = restore(home, "data", "--size", 2)
    assert f"{NEW}: 1 MiB are not what was written, the first one at byte {GIB + 3 * MIB}; they are" in done.stderr
    with new_volume(sim).path.open("rb") as file:
        assert file.read(GIB) == lost.newer.read_bytes()
        assert not any(file.read())


# -- by its difference


def test_only_what_differs_is_sent(home: Home, sim: Simulator, there: There) -> None:
    """The volume itself is neither written to nor detached."""
    web = sim.add_droplet("web", volumes=[there.volume])
    before = there.volume.path.read_bytes()
    done = restore(home, "data")
    assert f"{NEW} begins with what data has now: only what differs in data of" in done.stdout
    assert same(new_volume(sim).path, there.newer)
    assert_only(sim, new_volume(sim))
    assert sent(done) < 0.1 * MIB
    assert there.volume.path.read_bytes() == before
    assert there.volume.droplet_id == web.id
    assert not any(str(there.volume.id) in call.path for call in sim.requests if call.path.endswith("/actions"))
    assert "error: " not in done.stderr + done.stdout


def test_older_version_by_its_difference(home: Home, sim: Simulator, there: There) -> None:
    done = restore(home, "data", "--at", "2026-03-01T12:00Z", "--size", 2)
    assert new_volume(sim).path.read_bytes() == there.older.read_bytes() + bytes(GIB)
    assert sent(done) < 0.1 * MIB


def test_volume_is_known_by_its_id_whatever_its_name(home: Home, sim: Simulator, there: There) -> None:
    there.volume.name = "renamed"
    sim.add_volume("data")
    done = restore(home, "data")
    assert "begins with what renamed has now" in done.stdout
    assert same(new_volume(sim).path, there.newer)


def test_volume_that_came_back_under_the_name_is_begun_with(home: Home, sim: Simulator, there: There) -> None:
    path = there.volume.path.read_bytes()
    sim.remove_volume(there.volume)
    again = sim.add_volume("data")
    again.path.write_bytes(path)
    done = restore(home, "data")
    assert "begins with what data has now" in done.stdout
    assert same(new_volume(sim).path, there.newer)
    assert sent(done) < 0.1 * MIB


BEGIN_EMPTY: dict[str, tuple[list[str], str]] = {
    "elsewhere": (["data", "--region", "nyc3"], "data is in fra1"),
    "from-scratch": (["data", "--from-scratch"], "--from-scratch asks for that"),
    "file": (["--from", "backups/data"], "a file is of no volume"),
    "larger": (["data"], "data is larger, 2 GiB"),
    "gone": (["data"], "there is no volume data any more"),
}


@pytest.mark.parametrize("case", BEGIN_EMPTY)
def test_what_it_begins_with_is_told(home: Home, sim: Simulator, there: There, case: str) -> None:
    arguments, why = BEGIN_EMPTY[case]
    if case == "larger":
        there.volume.grow(2)
    if case == "gone":
        sim.remove_volume(there.volume)
    done = restore(home, *arguments)
    assert f"{NEW} begins empty, for {why}: all of " in done.stdout
    assert same(new_volume(sim).path, there.newer)
    assert_only(sim, new_volume(sim))
    assert not any(item for item in sim.ever if item.kind == "snapshot" and item.volume_id == there.volume.id)  # type: ignore[attr-defined]


def test_image_without_a_state_by_its_difference(home: Home, sim: Simulator, there: There) -> None:
    (home.backups / ".dosvob" / "data.state").unlink()
    done = restore(home, "data")
    assert same(new_volume(sim).path, there.newer)
    assert sent(done) < 0.1 * MIB


def test_base_that_is_deleted_meanwhile(home: Home, sim: Simulator, there: There) -> None:
    """Then all is sent."""
    sim.faults.add(Fault("delay", method="GET", path="^/v2/droplets$", nth=2, seconds=2))
    running = start_restore(home)
    until(lambda: sim.faults.fired)
    sim.remove_volume(there.volume)
    assert running.end() == 0, running.output
    assert f"data is gone meanwhile: {NEW} begins empty" in running.output
    assert same(new_volume(sim).path, there.newer)


@pytest.mark.parametrize("what", ["deleted", "attached"])
def test_base_that_changes_in_the_middle(home: Home, sim: Simulator, tmp_path: Path, there: There, what: str) -> None:
    """A snapshot of it was taken."""
    write_at(there.volume.path, 12 * MIB, random.Random(5).randbytes(3 * MIB))  # to be written over, chunk by chunk
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    if what == "deleted":
        sim.remove_volume(there.volume)
    else:
        there.volume.droplet_id = sim.add_droplet("web").id
        write_at(there.volume.path, 0, b"in use")
    sim.droplets[0].cut()
    assert running.end() == 0, running.output
    assert same(new_volume(sim).path, there.newer)
    assert_only(sim, new_volume(sim))


@pytest.mark.parametrize("says_when", [True, False])
def test_snapshot_of_the_base_is_waited_for(home: Home, sim: Simulator, there: There, says_when: bool) -> None:
    refused = Fault("rate-limit", method="POST", path="/snapshots$", text="1" if says_when else "soon", times=3)
    sim.faults.add(refused)
    done = restore(home, "data", constants={"SNAPSHOT_INTERVAL": 60})
    rule = "data: DigitalOcean takes one snapshot of a volume per 10 minutes, the next one "
    assert done.stdout.count(rule + ("at" if says_when else "by")) == 1
    assert "--from-scratch begins at once" in done.stdout
    assert same(new_volume(sim).path, there.newer)


def test_snapshot_of_the_base_is_not_waited_for_without_end(home: Home, sim: Simulator, there: There) -> None:
    sim.faults.add(Fault("rate-limit", method="POST", path="/snapshots$", text="1", times=FOREVER))
    running = start_restore(home, SNAPSHOT_INTERVAL=1, SNAPSHOT_GRACE=0.6, RATE_LIMIT_PATIENCE=2)
    assert running.end() == 1
    assert "one snapshot of a volume per 10 minutes, and has refused the next one for longer: " in running.output
    assert "HTTP 429" in running.output  # DigitalOcean's own words
    assert_nothing_left(sim)


# -- its birth


@pytest.mark.parametrize("limited", [replace(FAST, capacity_gib=2), replace(FAST, volume_limit=2)])
def test_quota_that_holds_nothing_but_the_new_volume(tmp_path: Path, limited: Behaviour) -> None:
    """The throwaway volume held its place."""
    with account(tmp_path / "account", limited) as (sim, home):
        there = damage(tmp_path, home, sim)
        done = restore(home, "data")
        assert "capacity limit exceeded" in done.stdout
        assert "whose snapshot has all, to make room" in done.stdout
        assert same(new_volume(sim).path, there.newer)
        assert_only(sim, new_volume(sim))


@behaving(capacity_gib=3)
def test_quota_that_is_not_free_at_once(home: Home, sim: Simulator, lost: Lost) -> None:
    sim.add_volume("other")
    sim.faults.add(Fault("error", method="POST", path="^/v2/volumes$", nth=2, status=403, times=4))
    done = restore(home, "data")
    assert done.stdout.count("trying again in") >= 2
    assert same(new_volume(sim).path, lost.newer)


def test_quota_that_others_have_taken_meanwhile(home: Home, sim: Simulator, lost: Lost) -> None:
    sim.faults.add(Fault("error", method="POST", path="^/v2/volumes$", nth=2, status=403, times=FOREVER))
    done = restore(home, "data", expect=1, constants={"NEW_PATIENCE": 1})
    assert "If it speaks of a limit" in done.stderr
    assert_nothing_left(sim)


def test_name_that_is_taken_meanwhile(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    taken = sim.add_volume(NEW)
    sim.droplets[0].cut()
    assert running.end() == 1
    assert "already exists" in running.output
    assert_nothing_left(sim)
    assert sim.volumes == [taken]


def test_creation_is_repeated(home: Home, sim: Simulator, lost: Lost) -> None:
    """For hours of upload may be in the snapshot."""
    sim.faults.add(Fault("error", method="POST", path="^/v2/volumes$", nth=2, status=503, times=6))
    restore(home, "data", constants={"PATIENCE": 1})
    assert same(new_volume(sim).path, lost.newer)
    assert_only(sim, new_volume(sim))


# -- what it would do


def test_dry_run(home: Home, sim: Simulator, there: There) -> None:
    done = restore(home, "data", "--dry-run", "--size", 3)
    said = done.stdout
    assert f"would make {NEW} in fra1, 3 GiB, of data of " in said
    assert f"{NEW} begins with what data has now" in said
    assert "over a droplet s-1vcpu-512mb-10gb with debian-13-x64 in fra1 and a throwaway volume, at $0.00636" in said
    assert f"$0.03 at least; {NEW} itself is $0.30 a month" in said
    assert_nothing_made(sim)
    assert {call.method for call in sim.requests} == {"GET"}


def test_dry_run_of_a_file_leaves_no_directory(home: Home, sim: Simulator) -> None:
    done = restore(home, "--from", "conf.json", "--dry-run")
    assert "a file is of no volume" in done.stdout
    assert not home.backups.exists()
    restore(home, "data", "--dry-run", expect=2)
    assert not home.backups.exists()


def test_dry_run_tells_what_would_be_refused(home: Home, sim: Simulator, lost: Lost) -> None:
    sim.add_volume(NEW)
    assert "take another name" in restore(home, "data", "--dry-run", expect=2).stderr


# -- however it ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_in_the_middle(home: Home, sim: Simulator, tmp_path: Path, lost: Lost, number: signal.Signals) -> None:
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    running.signal(number)
    assert running.end() == 128 + number
    assert f"{number.name}: stopping, and removing what was created" in running.output
    assert_nothing_left(sim)


PHASES = {"sending": "Agent.write_pages", "comparing": "Agent.read"}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_the_middle(home: Home, sim: Simulator, tmp_path: Path, lost: Lost, phase: str) -> None:
    """A sweep removes it all, and it can be begun again at once."""
    halt = Halt(tmp_path, what=PHASES[phase])
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    running.signal(signal.SIGKILL)
    running.end()
    assert not any(volume.name == NEW for volume in sim.volumes)
    assert run(home, "list").stderr == ""
    run(home, "sweep")
    assert_nothing_left(sim)
    restore(home, "data")
    assert same(new_volume(sim).path, lost.newer)


def test_killed_while_it_is_born(home: Home, sim: Simulator, lost: Lost) -> None:
    """Then it is there, whole, and stays."""
    sim.faults.add(Fault("trickle", method="POST", path="^/v2/volumes$", nth=2, seconds=1))
    running = start_restore(home)
    until(lambda: any(volume.name == NEW for volume in sim.volumes))
    running.signal(signal.SIGKILL)
    running.end()
    until(lambda: new_volume(sim).path.exists() and same(new_volume(sim).path, lost.newer))
    run(home, "sweep")
    assert_only(sim, new_volume(sim))


def test_it_is_said_by_nobody_while_it_goes_on(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    assert run(home, "list").stderr == ""
    assert run(home, "health", "--max-age", "1e6").stderr == ""
    for arguments in ((), ("--dry-run",), ("sweep", "--dry-run")):  # which would take what it makes for left behind
        said = run(home, *arguments, expect=2)
        assert "another dosvob is at work" in said.stderr
        assert "dosvob-ephemeral-" not in said.stdout
    running.signal(signal.SIGINT)
    running.end()


def test_note_that_an_earlier_version_left_is_no_matter(home: Home, sim: Simulator, lost: Lost) -> None:
    (home.backups / ".dosvob" / "restore-x.json").write_text("[]")
    assert run(home, "sweep").stderr == ""
    restore(home, "data")


def test_link_that_breaks_ten_times(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """Each time a little more is there."""
    file = tmp_path / "noise"
    file.write_bytes(random.Random(3).randbytes(4 * GIB))
    halt = Halt(tmp_path, times=10)
    sim.faults.add(halt.fault)
    running = start(home, "restore", "--from", str(file), "--to-volume", NEW)
    for number in range(10):
        halt.wait(number)
        sim.droplets[0].cut()
    assert running.end() == 0, running.output
    assert running.output.count("connecting again") >= 10
    assert same(new_volume(sim).path, file)
    assert_only(sim, new_volume(sim))


# -- answers that are lost


ANSWERS = {"throwaway": ("^/v2/volumes$", 1), "snapshot": ("/snapshots$", 1), "new": ("^/v2/volumes$", 2)}


@pytest.mark.parametrize("lag", [0.0, 0.4])
@pytest.mark.parametrize("answer", ANSWERS)
def test_answer_is_lost(tmp_path: Path, lag: float, answer: str) -> None:
    path, nth = ANSWERS[answer]
    with account(tmp_path / "account", replace(FAST, fresh_seconds=lag / 2, list_lag_seconds=lag)) as (sim, home):
        lost = lose(tmp_path, home)
        sim.faults.add(Fault("lost", method="POST", path=path, nth=nth))
        restore(home, "data", constants={"LIST_LAG": 3})
        assert sim.faults.fired
        assert len([item for item in sim.ever if item.kind == "volume"]) == 2
        assert same(new_volume(sim).path, lost.newer)
        assert_only(sim, new_volume(sim))


@behaving(list_lag_seconds=1000)
def test_answer_is_lost_and_no_list_shows_it(home: Home, sim: Simulator, lost: Lost) -> None:
    """It is whole, if it is there; which is told."""
    sim.faults.add(Fault("lost", method="POST", path="^/v2/volumes$", nth=2))
    done = restore(home, "data", expect=1, constants={"LIST_LAG": 0.3, "PATIENCE": 3})
    assert f"it is not known whether the volume {NEW} was made: if it is there, it is whole" in done.stderr
    assert same(new_volume(sim).path, lost.newer)


def test_answer_is_lost_and_somebody_takes_the_name(home: Home, sim: Simulator, lost: Lost) -> None:
    """What has the name is not taken for ours."""
    sim.faults.add(Fault("lost", method="POST", path="^/v2/volumes$", nth=2, effect=False))
    running = start_restore(home, PATIENCE=6, LIST_LAG=3)  # in which the name is taken
    until(lambda: sim.faults.fired)
    sim.add_volume(NEW)
    assert running.end() == 1
    assert "already exists" in running.output
    assert_nothing_left(sim)
    assert new_volume(sim).decoy


def test_namesake_in_another_region_is_not_taken_for_it(home: Home, sim: Simulator, lost: Lost) -> None:
    restore(home, "data", "--region", "nyc3")
    sim.faults.add(Fault("lost", method="POST", path="^/v2/volumes$", nth=2, effect=False))
    restore(home, "data")
    assert {volume.region for volume in sim.volumes} == {"fra1", "nyc3"}


# -- every call, every fault, at any moment


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """The calls of a restore in which nothing goes wrong."""
    directory = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as monkeypatch, account(directory / "account") as (sim, home):
        small_volumes(monkeypatch)
        damage(directory, home, sim)
        restore(home, "data")
        found = calls_of(sim.requests)
    assert len(found) > 30
    return found


def test_any_call_goes_wrong_once(pytestconfig: pytest.Config, tmp_path: Path, calls: list[Call]) -> None:
    problems = []
    cases = [(fault, call) for fault in FAULTS for call in calls]
    for fault, call in sampled(pytestconfig, cases, 8):
        directory = tmp_path / f"{fault}-{cases.index((fault, call))}"
        directory.mkdir()
        try:
            with account(directory / "account") as (sim, home):
                there = damage(directory, home, sim)
                sim.faults.add(replace(FAULTS[fault], method=call.method, path=call.path, nth=call.nth))
                done = restore(home, "data", expect=None)
                assert_ended_well(sim, there, done.returncode)
                assert done.returncode == 0 or fault == "missing", done.stderr  # what may pass is to be overcome
        except (AssertionError, pytest.fail.Exception) as problem:
            problems.append(f"{fault} at {call}: {problem}")
    assert not problems, "\n\n".join(problems)


def assert_ended_well(sim: Simulator, there: There, code: int) -> None:
    """All of it is there, or nothing is left."""
    if code == 0:
        assert same(new_volume(sim).path, there.newer)
        assert_only(sim, new_volume(sim))
    else:
        assert_nothing_left(sim)


def moments(config: pytest.Config, calls: list[Call], count: int) -> Iterator[int]:
    yield from sampled(config, list(range(1, len(calls) + 1)), count)


def test_signal_after_any_call(pytestconfig: pytest.Config, tmp_path: Path, calls: list[Call]) -> None:
    for moment in moments(pytestconfig, calls, 3):
        directory = tmp_path / str(moment)
        directory.mkdir()
        with account(directory / "account") as (sim, home):
            there = damage(directory, home, sim)
            running = start_restore(home)
            until(lambda: len(sim.requests) >= moment or running.process.poll() is not None)  # noqa: B023
            running.signal(signal.SIGTERM)
            code = running.end()
            is_made = "is now also" in running.output  # the last call had been made
            assert code in (128 + signal.SIGTERM, -signal.SIGTERM, *[0] * is_made), (moment, running.output)
            assert_ended_well(sim, there, 0 if is_made else code)
            assert "error: " not in running.output


def test_killed_after_any_call(pytestconfig: pytest.Config, tmp_path: Path, calls: list[Call]) -> None:
    """A sweep removes all; or the new volume is there, and whole."""
    for moment in moments(pytestconfig, calls, 4):
        directory = tmp_path / str(moment)
        directory.mkdir()
        with account(directory / "account") as (sim, home):
            there = damage(directory, home, sim)
            running = start_restore(home)
            until(lambda: len(sim.requests) >= moment or running.process.poll() is not None)  # noqa: B023
            running.signal(signal.SIGKILL)
            running.end()
            answered(sim)
            run(home, "sweep")
            if left := sim.alive():
                assert_only(sim, new_volume(sim))
                assert same(new_volume(sim).path, there.newer), (moment, left)
            assert there.volume in sim.volumes
