"""What the tests share: a simulated DigitalOcean account, and a user's directory in which the real script is run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from signals import ignore_for_ourselves_only
from simulator import Behaviour, Simulator

SCRIPT = Path(__file__).resolve().parent.parent / "dosvob.py"
LEAN = Path(__file__).resolve().parent / "lean"
WITH_CONSTANTS = Path(__file__).resolve().parent / "with_constants.py"
OPENAPI = os.environ.get("DIGITALOCEAN_OPENAPI")
MIB = 1 << 20
pytest_plugins = ["storage_support", "trouble_support"]
T = TypeVar("T")

ignore_for_ourselves_only()
for ending in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(ending) is signal.SIG_DFL:  # end as with Ctrl-C, which gives back what the tests use
        signal.signal(ending, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two options: run the whole of what is sampled otherwise, and repeat a sample."""
    parser.addoption("--all", action="store_true", dest="exhaustive", help="run every case of the large matrices")
    parser.addoption("--seed", type=int, default=None, help="choose the same sample of the matrices as that run did")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed, unless it is given or this is one of pytest-xdist's processes: those share the first one's."""
    if config.option.seed is None:
        config.option.seed = getattr(config, "workerinput", {}).get("seed", random.SystemRandom().randrange(1_000_000))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell one of pytest-xdist's processes the seed."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    """Say how the sample of this run can be had again."""
    if config.option.exhaustive:
        return "matrices: every case (--all)"
    return f"matrices: a sample, to be repeated with --seed {config.option.seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped and why, in a line for each reason, so that a missing tool is seen."""
    told = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")]
    for reason, count in Counter(" ".join(words.split()) for words in told).most_common():
        terminalreporter.line(f"{count} skipped: {reason}")


def sampled(config: pytest.Config, items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, chosen by the run's seed and in their own order; all of them under --all."""
    if config.option.exhaustive or count >= len(items):
        return list(items)
    chosen = random.Random(config.option.seed).sample(range(len(items)), count)
    return [items[index] for index in sorted(chosen)]


class Home:
    """A directory with conf.json and backups/, as a user has it, and the script that is run in it as a process."""

    def __init__(self, directory: Path, simulator: Simulator) -> None:
        self.directory = directory
        self.simulator = simulator
        self.backups = directory / "backups"
        directory.mkdir(exist_ok=True)
        self.configure()

    def configure(self, **keys: Any) -> None:
        """Write conf.json: the simulator's token, region fra1, and these keys; None takes a key away."""
        content = {"do_token": self.simulator.token, "region": "fra1", **keys}
        path = self.directory / "conf.json"
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        path.chmod(0o600)

    def command(self, *arguments: str, constants: Mapping[str, Any] | None = None) -> list[str]:
        """The command line that runs the script, with other values for some of its constants if so wished.

        In this environment `-m dosvob` is what `dosvob.py` is, but compiled once: half of what starting takes.
        """
        if constants:
            return [sys.executable, str(WITH_CONSTANTS), json.dumps(dict(constants)), *arguments]
        return [sys.executable, "-m", SCRIPT.stem, *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        """The environment to run the script in, without a real token that may be in ours."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("DIGITALOCEAN_")}
        return {**ours, "PYTHONPATH": f"{LEAN}:{SCRIPT.parent}", **self.simulator.environment(), **variables}

    def run(
        self,
        *arguments: str,
        expect: int | None = 0,
        constants: Mapping[str, Any] | None = None,
        wrapper: tuple[str, ...] = (),
        timeout: float = 600,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run the script to its end and check its exit code (None: any); `wrapper` goes before the command."""
        done = subprocess.run(
            [*wrapper, *self.command(*arguments, constants=constants)],
            cwd=self.directory,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if expect is not None and done.returncode != expect:
            pytest.fail(f"exit code {done.returncode}, not {expect}\n{done.stdout}\n{done.stderr}")
        return done

    def start(
        self, *arguments: str, constants: Mapping[str, Any] | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """Start the script; its output and errors come out of `stdout`, line by line."""
        return subprocess.Popen(
            self.command(*arguments, constants=constants),
            cwd=self.directory,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def image(self, name: str) -> Path:
        """Where the image of a volume is."""
        return self.backups / name


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Change a part of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def write_out(path: Path) -> None:
    """Have what is written to a file system get to its disk. All of them would be other tests' too, and take longer."""
    subprocess.run(["sync", "--file-system", path], check=False, stderr=subprocess.DEVNULL)  # the disk may be failing


def data_places(path: Path) -> set[int]:
    """The numbers of those MiB of a sparse file that are not holes altogether."""
    places: set[int] = set()
    with path.open("rb") as file:
        end = 0
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # no more data
                return places
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            places.update(range(start // MIB, (end - 1) // MIB + 1))


def same(one: Path, other: Path) -> bool:
    """Whether two files, sparse or not, have the same content."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        return all(
            os.pread(first.fileno(), MIB, place * MIB) == os.pread(second.fileno(), MIB, place * MIB)
            for place in data_places(one) | data_places(other)
        )


def wait_for(condition: Callable[[], T | None], limit: float = 180) -> T:
    """What the condition returns, once that is something; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {limit} s in vain")
        time.sleep(0.01)
    return found


@pytest.fixture
def sim(tmp_path: Path, behaviour: Behaviour) -> Iterator[Simulator]:
    """A simulated account. At the end nothing that was created through the API is left, and all was by the book."""
    with Simulator(tmp_path / "cloud", behaviour=behaviour, openapi=OPENAPI) as simulator:
        yield simulator
        assert not simulator.violations


@pytest.fixture
def home(tmp_path: Path, sim: Simulator) -> Home:
    """A user's directory."""
    return Home(tmp_path / "home", sim)


class Tmpfs:
    """A file system of a size that can be changed, in bytes; for `free` more than is used now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m,mode=755", "dosvob-test", path], check=True)

    def leave_free(self, free: int) -> None:
        """Only so much can be written from now on."""
        room = os.statvfs(self.path)
        used = (room.f_blocks - room.f_bfree) * room.f_frsize
        # tmpfs takes a size of 0 for "no limit"
        subprocess.run(["mount", "-o", f"remount,size={max(used + free, 4096)}", self.path], check=True)

    def unmount(self) -> None:
        """Take it away."""
        subprocess.run(["umount", "--lazy", self.path], check=True)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Tmpfs]:
    """A small file system."""
    made = Tmpfs(tmp_path / "tmpfs")
    yield made
    made.unmount()
