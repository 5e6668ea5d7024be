"""Output that nobody reads: the exit code is that of the command, whoever writes, and with each Python that is here.

An older `argparse` fails where it cannot write. Python tries at its exit to write again what it could not, and makes
the exit code 120. What a run writes is in test_first_steps.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import SCRIPT
from pythons import python_3

PATIENCE = 120.0
PYTHONS = ["Debian's own", "3.11", "3.12", "3.13", "3.14"]
COMMANDS = {
    "--help": 0,
    "--version": 0,
    "--no-such-option": 2,
    "restore --size much": 2,
    "sweep --json": 2,
    "verify": 2,  # there is no ./backups
    "list --backups .": 0,
}

# Output leads to a pipe whose other end is closed, to a full disk, or nowhere at all.
CLOSED = {"a pipe": "", "a full disk": "exec >/dev/full 2>&1; ", "nothing": "exec >&- 2>&-; "}

# A package that has all that the script asks for when it is imported, and nothing of use.
STAND_IN = """
class Kind(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Kind(name, (), {})

def __getattr__(name):
    return getattr(Kind("Module", (), {}), name)
"""
WARNING = "import warnings; warnings.simplefilter('always'); warnings.warn('old')\n"


@pytest.fixture(params=PYTHONS)
def python(request: pytest.FixtureRequest) -> str:
    """A Python that the script runs on; skips the test if it is not here."""
    wanted: str = request.param
    if wanted == PYTHONS[0]:
        return "/usr/bin/python3"
    found = python_3(int(wanted.removeprefix("3.")))
    if not found:
        pytest.skip(f"there is no Python {wanted} here")
    return found


class Place:
    """A directory in which the script is run by Pythons that have its packages, or stand-ins for them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "place"
        self.packages = directory / "packages"
        self.directory.mkdir()
        self.packages.mkdir()
        self.add("requests", STAND_IN)
        self.add("paramiko", STAND_IN)

    def add(self, package: str, content: str) -> None:
        """Let a package have this content."""
        (self.packages / f"{package}.py").write_text(content)

    def start(self, closed: str, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command whose output leads there."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.packages), "PYTHONDONTWRITEBYTECODE": "1"}
        read, write = os.pipe()
        os.close(read)
        process = subprocess.Popen(
            ["/bin/sh", "-c", CLOSED[closed] + 'exec "$@"', "sh", *command],
            cwd=self.directory,
            env={**environment, **variables},
            stdout=write,
            stderr=write,
        )
        os.close(write)
        return process


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("closed", "unbuffered"), [("a pipe", ""), ("a pipe", "1"), ("a full disk", ""), ("nothing", "")]
)
@pytest.mark.beyond_bare
def test_the_exit_code_is_that_of_the_command(place: Place, python: str, closed: str, unbuffered: str) -> None:
    started = {
        words: place.start(closed, python, str(SCRIPT), *words.split(), PYTHONUNBUFFERED=unbuffered)
        for words in COMMANDS
    }
    assert {words: process.wait(PATIENCE) for words, process in started.items()} == COMMANDS


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.beyond_bare
def test_a_refusal_to_start_is_wrong_use(place: Place, python: str, closed: str) -> None:
    place.add("requests", "raise ImportError(name='requests')")
    assert place.start(closed, python, str(SCRIPT)).wait(PATIENCE) == 2


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("minor", [8, 9, 10])
@pytest.mark.beyond_bare
def test_so_is_an_older_python(place: Place, minor: int, closed: str) -> None:
    old = python_3(minor)
    if old is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    assert place.start(closed, old, str(SCRIPT), "--version").wait(PATIENCE) == 2


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.beyond_bare
def test_the_warning_of_a_package_does_not_count(place: Place, python: str, closed: str) -> None:
    """It is written before the script has begun."""
    place.add("requests", WARNING + STAND_IN)
    for words in ("--help", "list --backups ."):
        assert place.start(closed, python, str(SCRIPT), *words.split()).wait(PATIENCE) == 0, words


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.beyond_bare
def test_a_warning_in_the_middle_does_not_count_either(place: Place, python: str, closed: str) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import dosvob

def warn(*_):
    {WARNING}
    return 3

dosvob.run_command = warn
sys.exit(dosvob.main(["verify"]))
"""
    assert place.start(closed, python, "-c", program).wait(PATIENCE) == 3
