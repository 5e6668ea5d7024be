"""`restore --to-volume`: a new volume has the very bytes, or it is removed, or it is named; and nothing else stays."""

from __future__ import annotations

import datetime
import os
import random
import signal
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
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
    assert_nothing_left,
    run,
    small_volumes,
    start,
    until,
)
from versions_support import back_up, leave_committed

import dosvob

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


def new_volume(sim: Simulator, name: str = NEW) -> Volume:
    """The one that was made."""
    (volume,) = [volume for volume in sim.volumes if volume.name == name]
    return volume


def records(home: Home) -> list[Path]:
    """What is written down of volumes that are being made."""
    return list((home.backups / ".dosvob").glob("restore-*"))


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
    assert "this run cost about $0.01" in said
    assert done.stderr == ""
    assert not records(home)


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
    """Its backup was committed, and the image is completed by nothing else before."""
    device = tmp_path / "device"
    os.truncate(device, 2 * GIB)
    write_at(device, GIB + 5, b"grown")
    leave_committed(home.backups, device, DAY + datetime.timedelta(days=2))
    restore(home, "data")
    volume = new_volume(sim)
    assert same(volume.path, device)
    assert volume.path.stat().st_size == 2 * GIB


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
    assert not records(home)


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
    """Nobody tells it before; the volume is what is asked for first."""
    done = restore(home, "data", "--size", 4, expect=1)
    assert "capacity" in done.stderr
    assert_nothing_made(sim)
    assert not records(home)


SCOPES = (
    *("account:read", "regions:read", "sizes:read", "image:read", "droplet:read", "droplet:create", "droplet:delete"),
    *("block_storage:read", "block_storage:create", "block_storage:delete", "block_storage_action:create"),
    *("block_storage_action:read", "actions:read", "tag:create"),
    *("ssh_key:read", "ssh_key:create", "ssh_key:delete", "snapshot:read"),
)


@pytest.mark.parametrize("scope", SCOPES)
def test_scope_that_the_token_lacks(home: Home, sim: Simulator, lost: Lost, scope: str) -> None:
    sim.token_lacks(scope)
    done = restore(home, "data", expect=None)
    assert done.returncode
    assert scope in done.stderr
    assert_nothing_made(sim)
    assert not records(home)


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


def test_chunk_that_is_damaged(home: Home, sim: Simulator, lost: Lost) -> None:
    """Which is found on the way; the rest of it can be had, and be made a volume."""
    write_at(home.image("data"), 3 * MIB + 17, b"rot")
    done = restore(home, "data", expect=1, TZ="UTC")
    assert f"data of 2026-03-02 08:00:00 +0000 is damaged at byte {3 * MIB}" in done.stderr
    assert_nothing_left(sim)
    assert not records(home)
    words = done.stderr.partition("dosvob.py ")[2].splitlines()[0].replace("FILE", "rest.img").replace("'", "")
    command, name, target, _, *time = words.split()
    run(home, command, name, target, "--at", " ".join(time), expect=1, TZ="UTC")
    restore(home, "--from", "rest.img.damaged")
    assert same(new_volume(sim).path, home.image("data"))


# -- the droplet and the way to it


PYTHON = r"""#!/usr/bin/python3
import builtins, re, sys
size = int(re.search(r"read\((\d+)\)", sys.argv[-1])[1])
program = sys.stdin.buffer.read(size).decode()
def run(source):
    start = source.rindex("\n", 0, -1) + 1
    builtins.exec(source[:start] + BODY + source[start:], {})
exec(program, {"exec": run})
"""


def python(directory: Path, body: str) -> Fault:
    """A droplet's python3 that runs something between the program, agent or receiver, and its start."""
    script = directory / "python3"
    script.write_text(PYTHON.replace("BODY", repr(body + "\n")))
    script.chmod(0o700)
    return Fault("python", text=str(script), times=FOREVER)


HALTING = """
import os
work = CLASS.METHOD
seen = []
def halting(self, *what):
    result = work(self, *what)
    seen.append(what)
    for number in range(TIMES):
        if len(seen) == 4:
            try:
                os.mkdir("DIRECTORY/halted-%d" % number)
                time.sleep(1000)
            except FileExistsError:
                pass
    return result
CLASS.METHOD = halting
"""


class Halt:
    """The first receivers take nothing more after four chunks, so that a test can act in the middle; or the agents."""

    def __init__(self, directory: Path, times: int = 1, what: str = "Receiver.write_pages") -> None:
        self._directory = directory
        body = HALTING.replace("TIMES", str(times)).replace("DIRECTORY", str(directory))
        self.fault = python(directory, body.replace("CLASS.METHOD", what))

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
    halt = Halt(tmp_path, times=2)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    for number in range(2):
        halt.wait(number)
        sim.droplets[-1].kill()
    assert running.end() == 1
    assert "a second one too" in running.output
    assert_nothing_left(sim)
    assert not records(home)


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
    sim.faults.add(python(tmp_path, STOPPING.replace("DIRECTORY", str(tmp_path))))
    done = restore(home, "data", constants={"STALL_LIMIT": 2})
    assert "connecting again" in done.stderr
    assert same(new_volume(sim).path, lost.newer)


def test_zeros_are_passed_over_one_by_one() -> None:
    """So whoever sends can heed a signal meanwhile, and tell how far it is."""
    contents = [dosvob.ZERO_CHUNK] * 3 + [bytes([1]) * MIB] + [dosvob.ZERO_CHUNK] * 2
    noted: list[bytes] = []
    upload = dosvob.Upload(iter(enumerate(contents)), len(contents), noted.append)
    upload.begin(dosvob.Packer(with_zstd=False))
    for passed in range(1, 4):
        assert (upload.next_frame(), upload.settled) == (b"", passed)
    assert upload.next_frame()
    for _ in range(2):
        assert (upload.next_frame(), upload.settled) == (b"", 3)
    assert upload.next_frame() is None
    upload.made_durable(4)
    assert upload.next_frame() is None
    assert upload.settled == len(contents) == len(noted)
    upload = dosvob.Upload(iter(enumerate(contents)), len(contents), noted.append, only={2})
    upload.begin(dosvob.Packer(with_zstd=False))
    assert [bool(upload.next_frame()) for _ in contents] == [False, False, True, False, False, False]


def test_of_zeros_nothing_is_sent() -> None:
    """Nor does what they took count as a measure of the link."""
    contents = [dosvob.ZERO_CHUNK] * 20 + [bytes([1]) * MIB]
    upload = dosvob.Upload(iter(enumerate(contents)), len(contents), lambda digest: None)
    sent: list[bytes] = []
    stream: Any = SimpleNamespace(send=sent.append, has_received=lambda: False)
    sending = dosvob.Sending(stream, upload, lambda: None)
    sending._handle(dosvob.HELLO, 0, dosvob.AGENT_MAGIC + struct.pack(">Q?", len(contents) * MIB, False))
    sending._flush()
    assert len(sent) == 1


def test_a_detach_that_fails_costs_nothing(home: Home, sim: Simulator, lost: Lost) -> None:
    """All is there and was compared by then, and the droplet is removed."""
    sim.faults.add(Fault("action-errored", nth=3))  # the first asks for a scope, the second attaches
    done = restore(home, "data")
    assert "is detached when the droplet is removed" in done.stderr
    volume = new_volume(sim)
    assert same(volume.path, lost.newer)
    assert_only(sim, volume)
    until(lambda: not volume.droplet_id)


def test_droplet_without_zstd(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    sim.faults.add(python(tmp_path, "LIBZSTD = None"))
    restore(home, "data")
    assert same(new_volume(sim).path, lost.newer)


LATER = """
def make_durable(self):
    with self.room:
        self.room.wait_for(lambda: self.end)
    {}
Receiver.make_durable = make_durable
"""
LIES = {
    "never-writes": ("Receiver.write_pages = lambda *_: None", "also when written once more"),
    "writes-wrong": (
        (
            "write_pages = Receiver.write_pages\n"
            "Receiver.write_pages = lambda self, index, pages, data: write_pages(self, index, pages, bytes(len(data)))"
        ),
        "also when written once more",
    ),
    "writes-behind": (
        (
            "write_pages = Receiver.write_pages\n"
            "Receiver.write_pages = lambda self, index, *what: write_pages(self, index and index - 1, *what)"
        ),
        "also when written once more",
    ),
    "too-early": (
        (
            "put = Receiver.put\n"
            "Receiver.put = lambda self, kind, index, *what: put(self, kind, index + 1000 * (kind == DURABLE), *what)"
        ),
        "which was not sent",
    ),
    "reads": (LATER.format("self.put(DIGEST, 0, bytes(32))"), "and was to write"),
    "answers": (LATER.format("self.put(RAW, 0, bytes(4128))"), "a frame of the kind"),
    "writes-when-reading": ("Agent.scan = lambda self: (self.open_device(), self.put(DURABLE, 1))", "of the kind"),
    "other-device": (
        "Receiver.open_device = lambda self: self.put(HELLO, 0, AGENT_MAGIC, bytes(9))",
        "not one of 1 GiB",
    ),
    "fails": ("def fail(self, *_):\n    raise OSError(5, 'broken')\nReceiver.write_pages = fail", "broken"),
    "fails-late": (
        (
            "import time\n"
            "def fail(self, *_):\n    time.sleep(2)  # all that fits under way is\n    raise OSError(5, 'broken')\n"
            "Receiver.write_pages = fail"
        ),
        "broken",
    ),
    "not-durable": ("def fail(_):\n    raise OSError(5, 'broken')\nos.fdatasync = fail", "broken"),
}


@pytest.mark.parametrize("lie", LIES)
def test_droplet_that_lies(home: Home, sim: Simulator, tmp_path: Path, lost: Lost, lie: str) -> None:
    body, message = LIES[lie]
    sim.faults.add(python(tmp_path, body))
    done = restore(home, "data", expect=1)
    assert message in done.stderr
    assert ("written once more" in done.stderr) == ("once more" in message)
    assert_nothing_left(sim)
    assert not records(home)


def test_what_was_not_written_is_written_once_more(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    """Zeros too, where the volume has something else."""
    body = f"""
write_pages = Receiver.write_pages
def wrong(self, index, pages, data):
    try:
        os.mkdir({str(tmp_path / "lied")!r} + "-%d" % index)
        data = bytes(len(data)) if index % 2 else data
        write_pages(self, 0, pages, b"!" * len(data))
    except FileExistsError:
        pass
    write_pages(self, index, pages, data)
Receiver.write_pages = wrong
"""
    sim.faults.add(python(tmp_path, body))
    done = restore(home, "data")
    assert "are not what was written" in done.stderr
    assert "they are written once more" in done.stderr
    assert same(new_volume(sim).path, lost.newer)


def test_zeros_are_written_beyond_the_end_of_what_is_restored(
    home: Home, sim: Simulator, tmp_path: Path, lost: Lost
) -> None:
    """A new volume that is larger has them there; if it does not, they are written like all else."""
    body = f"""
write_pages = Receiver.write_pages
def dirty(self, index, pages, data):
    try:
        os.mkdir({str(tmp_path / "lied")!r})
        write_pages(self, {GIB // MIB + 3}, pages, b"!" * len(data))
    except FileExistsError:
        pass
    write_pages(self, index, pages, data)
Receiver.write_pages = dirty
"""
    sim.faults.add(python(tmp_path, body))
    done = restore(home, "data", "--size", 2)
    assert f"1 MiB of {NEW} are not what was written, the first one at byte {GIB + 3 * MIB}; they are" in done.stderr
    with new_volume(sim).path.open("rb") as file:
        assert file.read(GIB) == lost.newer.read_bytes()
        assert not any(file.read())


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
    assert not records(home)


def kill_in_the_middle(home: Home, sim: Simulator, directory: Path) -> Volume:
    """Kill a restore outright; returns what it left."""
    halt = Halt(directory)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    running.signal(signal.SIGKILL)
    running.end()
    return new_volume(sim)


def test_killed_and_named(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    """By every command, until it is gone, and by none after that; it is never removed, for it may be in use by now."""
    volume = kill_in_the_middle(home, sim, tmp_path)
    named = f"volume {NEW} (id {volume.id}, $0.10 a month). "
    for command in (
        ["list"],
        ["list", "--json"],
        ["health", "--max-age", "1e6"],
        ["verify"],
        ["restore", "data", "x"],
    ):
        done = run(home, *command, expect=None)
        assert done.stderr.count(f"in fra1 there is, unless it was removed since, the {named}") == 1, command
        assert "It is not complete, for the restore was ended in the middle" in done.stderr
    for command in (["sweep"], ["sweep", "--all"], []):
        done = run(home, *command, expect=1)
        assert done.stderr.count(f"LEFT BEHIND, and billed until you remove it: {named}") == 1, command
        assert f"doctl compute volume delete {volume.id}" in done.stderr
        assert_only(sim, volume)
    sim.remove_volume(volume)
    sim.add_volume("other")
    run(home, "sweep")
    assert records(home)  # a list may show late what is there
    for command in (["sweep"], ["list"], []):
        done = run(home, *command, constants={"SHOWN_LIMIT": 0})
        assert "restore" not in done.stdout + done.stderr
    assert not records(home)


def test_killed_and_kept(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    volume = kill_in_the_middle(home, sim, tmp_path)
    run(home, "sweep", expect=1)
    (record,) = records(home)
    assert str(record.relative_to(home.directory)) in run(home, "list").stderr
    record.unlink()
    assert run(home, "sweep").stderr == ""
    assert_only(sim, volume)


def test_killed_before_the_answer(home: Home, sim: Simulator, lost: Lost) -> None:
    """It is known by its description then; a volume of the same name elsewhere is not it."""
    sim.faults.add(Fault("trickle", method="POST", path="^/v2/volumes$", nth=2, seconds=1))
    other = sim.add_volume(NEW, "nyc3")
    running = start_restore(home)
    until(lambda: len(sim.volumes) == 2)
    running.signal(signal.SIGKILL)
    running.end()
    (volume,) = sim.alive()
    assert "(id unknown, $0.10 a month)" in run(home, "list").stderr
    done = run(home, "sweep", expect=1)
    assert f"(id {volume.id}, " in done.stderr
    assert other.id not in done.stderr
    assert_only(sim, volume)


def test_it_is_said_by_nobody_while_it_goes_on(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    assert records(home)
    assert run(home, "list").stderr == ""
    assert run(home, "health", "--max-age", "1e6").stderr == ""
    for arguments in ((), ("--dry-run",), ("sweep", "--dry-run")):  # which would take what it makes for left behind
        said = run(home, *arguments, expect=2)
        assert "another dosvob is at work" in said.stderr
        assert "dosvob-ephemeral-" not in said.stdout
    running.signal(signal.SIGINT)
    running.end()


def test_killed_and_tried_again(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    volume = kill_in_the_middle(home, sim, tmp_path)
    done = restore(home, "data", expect=1)
    assert f"(id {volume.id}, " in done.stderr
    assert f"there is a volume {NEW} in fra1 already" in done.stderr
    sim.remove_volume(volume)
    restore(home, "data")
    assert same(new_volume(sim).path, lost.newer)


def test_record_that_is_no_record(home: Home, sim: Simulator, lost: Lost) -> None:
    (home.backups / ".dosvob" / "restore-x.json").write_text("[]")
    assert "cannot be read" in run(home, "sweep").stderr


def test_volume_that_somebody_uses_stays(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    """Though the restore failed."""
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home)
    halt.wait()
    volume, web = new_volume(sim), sim.add_droplet("web")
    volume.droplet_id = web.id
    running.signal(signal.SIGTERM)
    assert running.end() == 1
    assert f"LEFT BEHIND, and billed until you remove it: volume {NEW} (id {volume.id}" in running.output
    assert f"attached to the droplet {web.id}, which is not of this run" in running.output
    assert f"doctl compute volume delete {volume.id}" in running.output
    volume.droplet_id = ""
    assert_only(sim, volume)
    assert f"(id {volume.id}, " in run(home, "sweep", expect=1).stderr


def test_all_is_removed_though_nobody_says_who_uses_it(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault)
    running = start_restore(home, TEARDOWN_PATIENCE=0.3)
    halt.wait()
    sim.faults.add(Fault("error", method="GET", path="^/v2/volumes/", times=FOREVER))
    running.signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGTERM
    assert_nothing_left(sim)


def test_volume_that_cannot_be_removed(home: Home, sim: Simulator, tmp_path: Path, lost: Lost) -> None:
    halt = Halt(tmp_path)
    sim.faults.add(halt.fault, Fault("error", method="DELETE", path="^/v2/volumes/", nth=2, status=403, times=FOREVER))
    running = start_restore(home)
    halt.wait()
    running.signal(signal.SIGTERM)
    assert running.end() == 1
    volume = new_volume(sim)
    assert running.output.count(f"LEFT BEHIND, and billed until you remove it: volume {NEW} (id {volume.id}") == 1
    assert_only(sim, volume)
    sim.faults.clear()
    assert f"(id {volume.id}, " in run(home, "sweep", expect=1).stderr


# -- answers that are lost


@pytest.mark.parametrize("lag", [0.0, 0.4])
def test_answer_is_lost(tmp_path: Path, lag: float) -> None:
    with account(tmp_path / "account", replace(FAST, fresh_seconds=lag / 2, list_lag_seconds=lag)) as (sim, home):
        lost = lose(tmp_path, home)
        sim.faults.add(Fault("lost", method="POST", path="^/v2/volumes$", nth=2))
        restore(home, "data", constants={"LIST_LAG": 3})
        assert sim.faults.fired
        assert len([item for item in sim.ever if item.kind == "volume"]) == 1
        assert same(new_volume(sim).path, lost.newer)
        assert_only(sim, new_volume(sim))


@behaving(list_lag_seconds=1000)
def test_answer_is_lost_and_no_list_shows_it(home: Home, sim: Simulator, lost: Lost) -> None:
    """It stays written down until a list does, or would."""
    sim.faults.add(Fault("lost", method="POST", path="^/v2/volumes$", nth=2))
    restore(home, "data", expect=1, constants={"LIST_LAG": 0.3})
    (volume,) = sim.alive()
    run(home, "sweep")
    restore(home, "data", expect=1, constants={"LIST_LAG": 0.3})  # of which nothing is left
    volume.listed = 0
    assert f"(id {volume.id}, " in run(home, "sweep", expect=1).stderr
    sim.remove_volume(new_volume(sim))
    run(home, "sweep")
    assert records(home)
    run(home, "sweep", constants={"SHOWN_LIMIT": 0})
    assert not records(home)


def test_answer_is_lost_and_somebody_takes_the_name(home: Home, sim: Simulator, lost: Lost) -> None:
    """What has the name is not taken for ours, neither to be written nor to be removed."""
    sim.faults.add(Fault("lost", method="POST", path="^/v2/volumes$", nth=2, effect=False))
    running = start_restore(home)
    until(lambda: sim.faults.fired)
    sim.add_volume(NEW)
    assert running.end() == 1
    assert "already exists" in running.output
    assert_nothing_left(sim)
    assert new_volume(sim).decoy


# -- every call, every fault, at any moment


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """The calls of a restore in which nothing goes wrong."""
    directory = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as monkeypatch, account(directory / "account") as (sim, home):
        small_volumes(monkeypatch)
        lose(directory, home)
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
                lost = lose(directory, home)
                sim.faults.add(replace(FAULTS[fault], method=call.method, path=call.path, nth=call.nth))
                done = restore(home, "data", expect=None)
                assert_ended_well(home, sim, lost, done.returncode)
                assert done.returncode == 0 or fault == "missing", done.stderr  # what may pass is to be overcome
        except (AssertionError, pytest.fail.Exception) as problem:
            problems.append(f"{fault} at {call}: {problem}")
    assert not problems, "\n\n".join(problems)


def assert_ended_well(home: Home, sim: Simulator, lost: Lost, code: int) -> None:
    """All of it is there, or nothing is left."""
    if code == 0:
        assert same(new_volume(sim).path, lost.newer)
        assert_only(sim, new_volume(sim))
    else:
        assert_nothing_left(sim)
    assert not records(home)


def moments(config: pytest.Config, calls: list[Call], count: int) -> Iterator[int]:
    yield from sampled(config, list(range(1, len(calls) + 1)), count)


def test_signal_after_any_call(pytestconfig: pytest.Config, tmp_path: Path, calls: list[Call]) -> None:
    for moment in moments(pytestconfig, calls, 3):
        directory = tmp_path / str(moment)
        directory.mkdir()
        with account(directory / "account") as (sim, home):
            lost = lose(directory, home)
            running = start_restore(home)
            until(lambda: len(sim.requests) >= moment or running.process.poll() is not None)  # noqa: B023
            running.signal(signal.SIGTERM)
            code = running.end()
            is_made = "is now also" in running.output  # the last call had been made
            assert code in (128 + signal.SIGTERM, -signal.SIGTERM, *[0] * is_made), (moment, running.output)
            assert_ended_well(home, sim, lost, 0 if is_made else code)
            assert "error: " not in running.output


def test_killed_after_any_call(pytestconfig: pytest.Config, tmp_path: Path, calls: list[Call]) -> None:
    """What it is in the middle of is named; the rest is swept."""
    for moment in moments(pytestconfig, calls, 4):
        directory = tmp_path / str(moment)
        directory.mkdir()
        with account(directory / "account") as (sim, home):
            lost = lose(directory, home)
            running = start_restore(home)
            until(lambda: len(sim.requests) >= moment or running.process.poll() is not None)  # noqa: B023
            running.signal(signal.SIGKILL)
            running.end()
            done = run(home, "sweep", expect=None)
            left = sim.alive()
            assert all(item.name == NEW for item in left), moment
            if left and not same(new_volume(sim).path, lost.newer):
                assert f"(id {left[0].id}, " in done.stderr, moment
            assert (done.returncode == 1) == bool(left and "It is not complete" in done.stderr)
            for volume in sim.volumes:
                sim.remove_volume(volume)
            assert run(home, "sweep").stderr == ""


def test_what_was_not_even_asked_for_is_not_taken_for_left_behind() -> None:
    """A signal that comes before the first call."""
    stop = dosvob.Stop()
    stop.request()
    api: Any = SimpleNamespace(stop=stop, backoff=lambda: iter(()))
    report: Any = SimpleNamespace(left={})
    ephemeral = dosvob.Ephemeral(api, "home", report)
    with pytest.raises(dosvob.Interrupted):
        ephemeral.make_volume("new", "fra1", 1 << 30, "mark")
    assert not ephemeral.may_have_left(dosvob.Resource(dosvob.VOLUME, "", "new"))


def test_a_stop_is_heeded_between_zeros() -> None:
    """Of which there may be many, with nothing to be sent nor to come in."""
    taken = []

    def source() -> Iterator[tuple[int, bytes]]:
        for index in range(1000):
            taken.append(index)
            yield index, dosvob.ZERO_CHUNK

    def stop() -> None:
        raise dosvob.Interrupted

    greeting = dosvob.framed(dosvob.HELLO, 0, dosvob.AGENT_MAGIC, struct.pack(">Q?", 1000 * MIB, True))
    stream: Any = SimpleNamespace(receive=lambda: greeting, has_received=lambda: False)
    upload = dosvob.Upload(source(), 1000, lambda digest: None)
    with pytest.raises(dosvob.Interrupted):
        dosvob.Sending(stream, upload, stop).run()
    assert len(taken) < 100


# -- memory


def test_what_is_kept_is_bounded() -> None:
    """Until it is durable no more is read, however large it is."""
    read = []

    def source() -> Iterator[tuple[int, bytes]]:
        for index in range(200):
            read.append(index)
            yield index, random.Random(index).randbytes(MIB)

    upload = dosvob.Upload(source(), 200, lambda digest: None)
    upload.begin(dosvob.Packer(with_zstd=True))
    frames = []
    while (frame := upload.next_frame()) is not None:
        frames.append(frame)
    assert 64 <= len(frames) <= 66
    assert len(read) < 80
    upload.made_durable(10)
    assert upload.settled == 10
    assert upload.next_frame() is not None
