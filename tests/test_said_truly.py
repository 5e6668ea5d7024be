"""What the script says can be relied on: commands to paste, times, names, and the whole of what was asked for."""

from __future__ import annotations

import atexit
import bz2
import contextlib
import datetime
import fcntl
import gzip
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, SCRIPT, WITH_CONSTANTS, Home, same
from simulator import Simulator, Volume
from simulator.storage import create_sparse
from trouble_support import PATIENCE, QUICK, add_volume, run, until
from versions_support import NAME, Lineage, back_up

import dosvob

pytestmark = pytest.mark.small
ALL = dosvob.Keep(last=100)


class Owner(Lineage):
    """Somebody with backups of one volume, hour by hour, and a shell."""

    def __init__(self, directory: Path, count: int = 3) -> None:
        super().__init__(directory, ALL)
        self.directory = directory
        self.go_on(count, 1)

    def popen(self, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
        """Start the script."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], cwd=self.directory, **pipes)
        atexit.register(process.kill)  # a test that fails may leave it at work, or stopped
        return process

    def run(self, *arguments: str, expect: int = 0, **more: Any) -> str:
        """Run the script; returns all that it said."""
        said, errors = (process := self.popen(*arguments, **more)).communicate(timeout=120)
        text = (said or b"").decode() + (errors or b"").decode()
        assert process.returncode == expect, text
        assert "Traceback" not in text
        assert "unexpected" not in text
        return text


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path)


# ── Commands that messages name


@pytest.mark.parametrize("script", ["dosvob.py", "../dosvob.py", "some where/dosvob.py", str(SCRIPT)])
def test_a_command_of_a_message_can_be_pasted(owner: Owner, script: str) -> None:
    """It names the interpreter and the script so that they are found from here, and the directory that was given."""
    here = owner.directory / "here"
    here.mkdir()
    owner.backups.rename(here / "my disk's backups")
    if not script.startswith("/"):
        (here / script).parent.mkdir(exist_ok=True)
        shutil.copy(SCRIPT, here / script)
    (here / "my disk's backups" / NAME).rename(here / "elsewhere")
    (here / "my disk's backups" / NAME).touch()
    arguments = ["--backups", "my disk's backups", "--config", "my conf.json"]
    done = subprocess.run(
        [sys.executable, script, "restore", NAME, *arguments], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    command = done.stderr.partition("new file: ")[2].strip()
    assert {"my disk's backups", "my conf.json"} <= set(shlex.split(command)), command
    pasted = subprocess.run(["sh", "-c", command], cwd=here, capture_output=True, text=True, check=False)
    assert pasted.returncode == 1, pasted.stderr  # for the image is empty, which it says
    assert "data.img.damaged" in pasted.stderr


def test_a_command_of_a_message_is_the_containers_there(owner: Owner) -> None:
    """Where it is to be pasted is outside."""
    inside = {**os.environ, "DOSVOB_COMMAND": "docker-compose exec dosvob python dosvob.py"}
    said = owner.run("restore", NAME, expect=2, env=inside)
    assert said.rstrip().endswith(": docker-compose exec dosvob python dosvob.py restore data data.img"), said


@pytest.mark.parametrize("command", ["list", "health", "verify", "restore data data.img"])
def test_every_command_takes_config(owner: Owner, command: str) -> None:
    """An alias, or a command of a message, has it always."""
    options = ["--config", "mine.json", "--backups", "backups", *["--max-age=1e6"] * (command == "health")]
    owner.run(*command.split(), *options)


# ── What it is started with


@pytest.mark.parametrize(
    ("package", "version"), [("paramiko", "2.12.0"), ("paramiko", "3.5.1"), ("requests", "2.28.1")]
)
@pytest.mark.parametrize("arguments", [(), ("sweep",)], ids=str)
def test_an_old_package_is_refused_at_the_start(
    home: Home, package: str, version: str, arguments: tuple[str, ...]
) -> None:
    """Debian's own, for one: before anything is begun, not in the middle."""
    program = (
        f"import {package}, runpy, sys, importlib.metadata as m; {package}.__version__ = {version!r}; old = m.version; "
        f"m.version = lambda name: {version!r} if name == {package!r} else old(name); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPT), *arguments],
        cwd=home.directory,
        env=home.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{package} {version}" in done.stderr
    assert "pip install" in done.stderr
    assert not home.simulator.requests


def test_the_script_can_be_executed() -> None:
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("module", ["argparse", "tempfile", "ssl"])
def test_an_interrupt_while_it_loads_is_one_line(owner: Owner, module: str) -> None:
    """Whatever it is just importing."""
    (owner.directory / "slow").mkdir()
    (owner.directory / "slow" / f"{module}.py").write_text(
        "open('loading', 'w').close()\nimport time\ntime.sleep(60)\n"
    )
    process = owner.popen("sweep", env={**os.environ, "PYTHONPATH": str(owner.directory / "slow")})
    until((owner.directory / "loading").exists)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == b""
    assert len(errors.splitlines()) == 1, errors
    assert b"SIGINT" in errors


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"do_token": "x",}', "line 1, column 17"),
        ('{\n  "region": "fra1",\n  "include": ["data", "db"],\n}\n', "line 3, column 28"),
        ('{"include": ["data" , \n ], "region": "fra1"}', "line 1, column 21"),
        ('{"keep": {"last": 1,\n\n}}', "line 1, column 20"),
    ],
)
def test_a_comma_too_many_is_told_as_that(home: Home, text: str, place: str) -> None:
    (home.directory / "conf.json").write_text(text)
    said = home.run(expect=2).stderr
    assert len(said.splitlines()) == 1
    assert f"{place}: " in said
    assert "comma" in said


def test_a_configuration_with_a_byte_order_mark_is_read(home: Home, sim: Simulator) -> None:
    """As some editors write it."""
    add_volume(sim, "data")
    conf = home.directory / "conf.json"
    conf.write_bytes(b"\xef\xbb\xbf" + conf.read_bytes())
    assert "would back up data" in home.run("--dry-run").stdout


# ── What was asked for


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("list --json", '"time"'),
        ("list", "the image"),
        ("health --max-age=1e6", "its last complete"),
        ("verify", "sound"),
    ],
)
def test_an_answer_that_is_read_slowly_is_whole(tmp_path: Path, arguments: str, text: str) -> None:
    """However long that takes."""
    owner = Owner(tmp_path, 1)
    for number in range(80):  # more than the pipe takes
        shutil.copytree(owner.backups, tmp_path / "many", dirs_exist_ok=True)
        for path in [*(tmp_path / "many").rglob("data*")]:
            path.rename(path.with_name(path.name.replace("data", f"copy-{number}", 1)))
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, str(WITH_CONSTANTS), '{"STUCK_LIMIT": 0.3}', "--backups", "many", *arguments.split()]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    with open(read, "rb") as file:
        said = file.read().decode()
    assert process.wait(20) == 0, process.communicate()
    assert said.count(text) == 80


@pytest.mark.parametrize("how", ["full", "closed"])
@pytest.mark.parametrize("arguments", [("list",), ("list", "--json")], ids=str)
def test_a_list_that_cannot_be_written_is_a_failure(owner: Owner, arguments: tuple[str, ...], how: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        process = owner.popen(*arguments, stdout=full if how == "full" else write)
        os.close(write)
        errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_list_that_nobody_reads_can_be_interrupted(owner: Owner, number: signal.Signals) -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write, bytes(4096)):
            pass
    os.set_blocking(write, True)
    process = owner.popen("list", stdout=write)
    os.close(write)
    until(lambda: heeds_signals(process))
    process.send_signal(number)
    assert process.wait(PATIENCE) == 128 + number
    os.close(read)


def heeds_signals(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has a handler of its own, which Python has not for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"(?m)^SigCgt:\s*([0-9a-f]+)$", status)
    assert caught
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_list_that_takes_long_heeds_an_interrupt(owner: Owner) -> None:
    """As it does on a slow disk: it reads the heads of all that the versions have."""
    head = {**dosvob.PatchFile(next(owner.paths.versions.iterdir()), "version").head, "id": "0" * 32}
    name = owner.paths.versions / "20140101T000000Z"
    with dosvob.PatchFile.create(name, "version", head) as version:
        for index in range(100_000):
            version.append(dosvob.Patch(index, 0, 0, b"", bytes(32)))
        version.complete()
    for number in range(2, 29):
        os.link(name, name.with_name(f"201401{number:02}T000000Z"))
    process = owner.popen("list", stdout=subprocess.PIPE)
    until(lambda: heeds_signals(process) and str(owner.paths.versions) in str(open_files(process)))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"AGE" not in said  # it did not come to the end of it


def open_files(process: subprocess.Popen[bytes]) -> list[str]:
    """What it has open."""
    found = []
    for fd in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(fd))
    return found


# ── Names


@pytest.mark.parametrize("pattern", ["dat*", "[d]ata", "nyc3/d*", "*/data", "d?ta"])
def test_patterns_are_names_for_every_command(owner: Owner, pattern: str) -> None:
    """Also where there are several regions."""
    (owner.backups / "nyc3").mkdir()
    for path in (owner.paths.image, owner.paths.metadata):
        path.rename(owner.backups / "nyc3" / path.name)
    (owner.backups / ".dosvob").mkdir()
    (owner.backups / "nyc3" / ".dosvob" / "home").rename(owner.backups / ".dosvob" / "home")
    (owner.backups / "other").write_bytes(bytes(MIB))
    assert "nyc3/data" in (listed := owner.run("list", pattern))
    assert "other" not in listed
    assert "nyc3/data: sound" in (verified := owner.run("verify", pattern))
    assert "other" not in verified
    assert "nyc3/data: its last" in owner.run("health", pattern, "--max-age", "1e6")
    owner.run("restore", pattern, "file")
    assert "may be nyc3/data or other: say which" in owner.run("restore", "*", "file-2", expect=2)
    assert "there is no image of x*" in owner.run("list", "x*", expect=2)


@pytest.mark.parametrize("arguments", [("data", "scratch-1"), ("*",), ("scratch-*", "data"), ("scratch-*",)], ids=str)
def test_a_pattern_of_the_command_line_heeds_exclude(home: Home, sim: Simulator, arguments: tuple[str, ...]) -> None:
    """A name does not: whoever writes it means that volume."""
    for name in ("data", "scratch-1", "scratch-2"):
        add_volume(sim, name)
    home.configure(exclude=["scratch-*"])
    nothing = arguments == ("scratch-*",)
    done = home.run("--dry-run", *arguments, expect=2 if nothing else 0)
    would = re.findall(r"would back up (\S+),", done.stdout)
    assert would == {("data", "scratch-1"): ["data", "scratch-1"], ("scratch-*",): []}.get(arguments, ["data"])
    assert not nothing or '"exclude"' in done.stderr


@pytest.mark.parametrize("target", [".", "..", "/", "", "there", "there/"])
def test_a_directory_is_no_file_to_restore_to(owner: Owner, target: str) -> None:
    (owner.directory / "there").mkdir()
    said = owner.run("restore", NAME, target, expect=2)
    assert len(said.splitlines()) == 1
    assert "is a directory: name a file in it" in said
    assert "data.img" in said.partition("name a file in it: ")[2]


NOW = datetime.datetime(2026, 11, 25, 10, 30, 20).astimezone()  # a Wednesday, here
TIMES = {
    "2026-11-24 08:00": "2026-11-24 08:00:59",
    "2026-11-24 8:00": "2026-11-24 08:00:59",
    "2026-11-24T08:00": "2026-11-24 08:00:59",
    "2026-11-24 08": "2026-11-24 08:59:59",
    "2026-11-24 08:00:07": "2026-11-24 08:00:07",
    "20261124T0800": "2026-11-24 08:00:59",
    "2026-11-24": "2026-11-24 23:59:59",
    "20261124": "2026-11-24 23:59:59",
    "2026-W47": "2026-11-22 23:59:59",
    "2026W47": "2026-11-22 23:59:59",
    "2026-W47-2": "2026-11-17 23:59:59",
    "8:00": "2026-11-25 08:00:59",
    "08:00:01": "2026-11-25 08:00:01",
    "now": "2026-11-25 10:30:20",
    "today": "2026-11-25 23:59:59",
    "today 8:00": "2026-11-25 08:00:59",
    "yesterday": "2026-11-24 23:59:59",
    "Yesterday 08:00": "2026-11-24 08:00:59",
    "yesterday 23:59:59": "2026-11-24 23:59:59",
    "3 days ago": "2026-11-22 10:30:20",
    "2 weeks ago": "2026-11-11 10:30:20",
}


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata"])
@pytest.mark.parametrize("text", TIMES)
def test_a_time_means_the_end_of_what_it_names(monkeypatch: pytest.MonkeyPatch, text: str, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        moment = dosvob.time_meant(text, NOW.replace(tzinfo=None).astimezone())
        assert moment.strftime("%Y-%m-%d %H:%M:%S") == TIMES[text]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_time_with_an_offset_means_its_end_too() -> None:
    for text in ("2026-11-24 08:00 +0530", "2026-11-24T08:00+05:30", "2026-11-24 02:30Z", "20261124T0230Z"):
        end = dosvob.time_meant(text, NOW).astimezone(datetime.UTC)
        assert end.isoformat(timespec="seconds") == "2026-11-24T02:30:59+00:00"
    for text in ("soon", "", "25:00", "2026-13-01", "2026-W54", "8", "24", "yesterday 8:61", "1:2:3"):
        with pytest.raises(dosvob.UsageError, match="is not a time"):
            dosvob.time_meant(text, NOW)


def test_times_on_the_command_line(tmp_path: Path) -> None:
    """What `list` shows without its seconds is found; `latest` is what there is without a time."""
    owner = Owner(tmp_path, 0)
    owner.now = datetime.datetime.now(datetime.UTC).replace(second=40, microsecond=0) - datetime.timedelta(hours=4)
    owner.go_on(3, 1)
    times = sorted(owner.truth)
    for number, (text, expected) in enumerate(
        [
            (f"{owner.now - datetime.timedelta(hours=1):%Y-%m-%d %H:%M}", times[1]),
            (f"{owner.now - datetime.timedelta(hours=2):%Y-%m-%d %H:%M}", times[0]),
            ("now", times[2]),
            ("latest", times[2]),
        ]
    ):
        env = {**os.environ, "TZ": "UTC"}
        said = owner.run("restore", NAME, str(number), "--at", text, env=env)
        when = datetime.datetime.fromisoformat(expected)
        assert f"data of {when:%Y-%m-%d %H:%M:%S %z} is restored" in said


# ── What no volume is made of


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
HEADS = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "vmdk": b"KDMV\1\0\0\0",
    "vhdx": b"vhdxfile",
    "vhd": b"conectix",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
    "zst": b"\x28\xb5\x2f\xfd",
}


@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vhdx", "vhd", "vdi", "gz", "zst", "xz", "bz2"])
def test_a_file_that_is_no_raw_image_is_refused(home: Home, sim: Simulator, kind: str) -> None:
    """With the command that makes it one, which works."""
    content = os.urandom(MIB) + bytes(MIB)
    source = home.directory / f"my disk.{kind}"
    source.write_bytes(COMPRESSED[kind](content) if kind in COMPRESSED else HEADS[kind].ljust(MIB, b"x"))
    done = run(home, "restore", "--to-volume", "new", "--from", source.name, expect=2)
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    command = line.partition("make one of it: ")[2].partition("; then")[0]
    assert "'my disk.img'" in command, line
    assert ("qemu-img convert" in command) == (kind not in (*COMPRESSED, "zst"))
    assert not [request for request in sim.requests if request.method != "GET"]
    if kind in COMPRESSED:
        subprocess.run(["sh", "-c", command], cwd=home.directory, check=True)
        assert (home.directory / "my disk.img").read_bytes() == content


# ── Who is at work


def since(text: str) -> list[tuple[str, datetime.datetime]]:
    """What is at work, and since when, as a command says that was turned away."""
    found = re.findall(r", (a [^,]*?) since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4})", text)
    return [(what, datetime.datetime.strptime(when, "%Y-%m-%d %H:%M:%S %z")) for what, when in found]


def stopped(owner: Owner, *arguments: str) -> subprocess.Popen[bytes]:
    """A command that has the lock, and does not go on."""
    lock = owner.paths.metadata / "lock"
    before = lock.read_bytes()
    process = owner.popen(*arguments)
    # with its line in there: before that it may take those of killed ones out
    until(lambda: lock.read_bytes() not in (before, b"") or process.poll() is not None)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None
    return process


def test_who_is_turned_away_is_told_by_what(tmp_path: Path) -> None:
    """Also by several restores, of which one is killed, and the other ends."""
    owner = Owner(tmp_path, 1)
    with (owner.backups / NAME).open("r+b") as image:  # so that it takes a while
        image.truncate(8 << 30)
    owner.paths.state.unlink()
    begun = dosvob.utc_now()
    killed, first = stopped(owner, "restore", NAME, "a"), stopped(owner, "restore", NAME, "b")
    for command in ("verify", "sweep", ""):
        (tmp_path / "conf.json").write_text('{"do_token": "x", "region": "fra1"}')
        told = owner.run(*command.split(), expect=2)
        assert len(told.splitlines()) <= 2
        assert [what for what, _ in since(told)] == ["a restore of data"] * 2, told
        assert all(begun <= when <= dosvob.utc_now() for _, when in since(told))
    killed.kill()
    killed.wait()
    for number in (signal.SIGTERM, signal.SIGCONT):
        first.send_signal(number)
    assert first.wait(60) == 128 + signal.SIGTERM
    last = stopped(owner, "restore", NAME, "d")
    assert [what for what, _ in since(owner.run("verify", expect=2))] == ["a restore of data"]
    last.kill()
    last.wait()


# ── Versions that go


def add_versions(home: Home, volume: Volume, count: int) -> list[datetime.datetime]:
    """Backups of a volume, day by day, the first one on 1 November 2015; returns when."""
    home.backups.mkdir(exist_ok=True)
    first = datetime.datetime(2015, 11, 1, 8, tzinfo=datetime.UTC)
    moments = [first + datetime.timedelta(days=number) for number in range(count)]
    for moment in moments:
        back_up(home.backups, volume.path, moment, ALL, volume_id=volume.id)
    return moments


def test_what_is_not_kept_any_more_is_told(home: Home, sim: Simulator) -> None:
    """In a line for each volume, also beforehand; most of it loudly, and before anything is fetched."""
    volume = add_volume(sim, "data")
    add_versions(home, volume, 11)
    home.configure(keep={"last": 8})
    dry = run(home, "--dry-run", TZ="UTC")
    assert "would not keep 3 versions of data any more, the oldest of 2015-11-01" in dry.stdout
    assert not dry.stderr
    done = run(home, TZ="UTC")
    assert not done.stderr
    assert done.stdout.count("not kept any more") == 1
    assert "data: 3 versions are not kept any more, the oldest of 2015-11-01" in done.stdout
    home.configure(keep={"last": 3})
    loud = '"keep" in conf.json asks for 3 of its 8 older versions; 5 {} dropped, the oldest of 2015-11-04'
    assert loud.format("would be") in run(home, "--dry-run", TZ="UTC").stderr
    sim.limit_snapshots(0)
    process = home.start(constants=QUICK, TZ="UTC")
    said = process.communicate(timeout=120)[0]
    assert said.index(loud.format("are")) < said.index("is up at")
    assert said.count("not kept any more") == 1
    assert "data: 6 versions are not kept any more, the oldest of 2015-11-04" in said
    sim.limit_snapshots(0)
    done = run(home, TZ="UTC")
    assert "data: 1 version is not kept any more, of 2015-11-10" in done.stdout
    assert not done.stderr


def test_what_is_dropped_of_a_volume_that_is_not_backed_up_is_told_too(home: Home, sim: Simulator) -> None:
    add_versions(home, add_volume(sim, "data"), 9)
    add_volume(sim, "other")
    home.configure(keep={"last": 3}, exclude=["data"])
    loud = '"keep" in conf.json asks for 3 of its 8 older versions; 5 {} dropped, the oldest of 2015-11-01'
    assert loud.format("would be") in run(home, "--dry-run", TZ="UTC").stderr
    assert loud.format("are") in run(home, TZ="UTC").stderr


# ── Modes


@pytest.mark.parametrize(("mode", "says"), [(0o400, "its mode is r--------: chmod u+w backups/data"), (0o600, "")])
def test_an_image_that_cannot_be_written_to_is_found_before_anything_is_created(
    home: Home, sim: Simulator, mode: int, says: str
) -> None:
    """The other volumes are backed up."""
    volume, other = add_volume(sim, "data"), add_volume(sim, "other")
    add_versions(home, volume, 1)
    home.image("data").chmod(mode)
    without_rights = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    done = run(home, expect=1 if says else 0, wrapper=without_rights)
    assert not says or f"data: backups/data cannot be written to, {says}" in done.stderr
    assert same(home.image("other"), other.path)
    made = {request.path for request in sim.requests if request.method == "POST"}
    assert any(volume.id in path for path in made) == (not says)


def test_a_storage_without_modes_is_not_warned_about(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """There chmod would change nothing."""
    if shutil.which("mkfs.exfat") is None or shutil.which("mount.exfat-fuse") is None:
        pytest.skip("exfatprogs and exfat-fuse are not installed")
    add_volume(sim, "data")
    disk, stick = tmp_path / "disk", tmp_path / "stick"
    stick.mkdir()
    create_sparse(disk, 64 * MIB)
    subprocess.run(["mkfs.exfat", disk], check=True, capture_output=True)
    loop = subprocess.run(["losetup", "-f", "--show", disk], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["mount.exfat-fuse", loop, stick], check=True, capture_output=True)
    try:
        shutil.copyfile(home.directory / "conf.json", stick / "conf.json")
        assert (stick / "conf.json").stat().st_mode & 0o077
        assert "would back up data" in (done := home.run("--dry-run", "--config", str(stick / "conf.json"))).stdout
        assert not done.stderr
    finally:
        subprocess.run(["umount", stick], check=True)
        subprocess.run(["losetup", "-d", loop], check=True)
