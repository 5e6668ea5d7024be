"""What the script says can be relied on: commands to paste, times, names, and the whole of what was asked for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SCRIPT, Home
from simulator import Simulator
from trouble_support import add_volume, until
from versions_support import NAME, Lineage

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
        return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], cwd=self.directory, **pipes)

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
@pytest.mark.parametrize("arguments", [(), ("list",)], ids=str)
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


@pytest.mark.parametrize("module", ["argparse", "uuid", "paramiko", "requests"])
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


def test_a_list_that_is_read_slowly_is_whole(owner: Owner) -> None:
    """However long that takes."""
    expected = owner.run("list", "--json")
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    for number in range(30):  # more than the pipe takes
        shutil.copytree(owner.backups, owner.directory / "many", dirs_exist_ok=True)
        for path in [*(owner.directory / "many").rglob("data*")]:
            path.rename(path.with_name(path.name.replace("data", f"copy-{number}", 1)))
    process = owner.popen("--backups", "many", "list", "--json", stdout=write)
    os.close(write)
    time.sleep(dosvob.Writer.STUCK_LIMIT + 3)
    with open(read, "rb") as file:
        said = file.read().decode()
    assert process.wait(20) == 0, process.communicate()
    assert said.rstrip().endswith("}")
    assert said.count('"time"') == 30 * expected.count('"time"')


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
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    os.close(read)


def test_a_list_that_takes_long_heeds_an_interrupt(owner: Owner) -> None:
    """As it does on a slow disk: it reads the heads of all that the versions have."""
    head = {**dosvob.PatchFile(next(owner.paths.versions.iterdir()), "version").head, "id": "0" * 32}
    name = owner.paths.versions / "20140101T000000Z"
    with dosvob.PatchFile.create(name, "version", head) as version:
        for index in range(100_000):
            version.append(dosvob.Patch(index, 0, 0, b"", bytes(32)))
        version.complete({})
    for number in range(2, 9):
        os.link(name, name.with_name(f"2014010{number}T000000Z"))
    process = owner.popen("list")
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.wait(60) == 130
    assert time.monotonic() - start < 2
