"""What a run tells of itself, and what continuous integration runs and where."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PATIENCE = 120.0
NO_ROOT = 77  # .ci/bare-root's exit code where no root can be made
DAY = 86400


# -- what was skipped


SOME_TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_a(number):
    pytest.skip("there is no abacus here")

@pytest.mark.skipif(True, reason="the moon\\nis full")
def test_b():
    pass

def test_c():
    pass
"""


@pytest.mark.parametrize("processes", ["0", "2"])
def test_what_is_skipped_is_told_in_a_line_for_each_reason(tmp_path: Path, processes: str) -> None:
    """However many tests that are, and in how many places."""
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    pytest_here = [sys.executable, "-m", "pytest", "-c", str(TESTS / "pytest.ini"), "-p", "conftest"]
    options = ["--confcutdir", str(tmp_path), "-p", "no:cacheprovider", "-n", processes]
    command = [*pytest_here, *options, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if " skipped: " in line] == [
        "3 skipped: there is no abacus here",
        "1 skipped: the moon is full",
    ]
    assert "1 passed, 4 skipped" in lines[-1]


# -- where continuous integration runs what


RECORD = """#!/bin/sh
echo "$0 $*" >>calls
echo "$0 $* ran"
exit {code}
"""
CLOCK = """#!/bin/sh
echo {seconds}
"""


class Checkout:
    """A checkout in which everything that .ci/run calls only writes down that it was called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "checkout"
        (self.directory / ".ci").mkdir(parents=True)
        (self.directory / "tests").mkdir()
        shutil.copy(TESTS.parent / ".ci/run", self.directory / ".ci")
        self.programs = directory / "bin"
        self.programs.mkdir()
        for name in (".ci/bare-root", "tests/run", "tests/demo"):
            self.end_with(name, 0)

    def end_with(self, name: str, code: int) -> None:
        """Let a program end with this exit code."""
        self._write(self.directory / name, RECORD.format(code=code))

    def run(self, *arguments: str, seconds: int = 0, expect: int = 0) -> tuple[list[str], str]:
        """What .ci/run calls on a day, the first two sorted, and what it says."""
        self._write(self.programs / "date", CLOCK.format(seconds=seconds))
        calls = self.directory / "calls"
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", self.directory / ".ci/run", *arguments],
            env={"PATH": f"{self.programs}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == expect, done.stdout
        lines = calls.read_text().splitlines()
        return [*sorted(lines[:2]), *lines[2:]], done.stdout

    @staticmethod
    def _write(path: Path, content: str) -> None:
        path.write_text(content)
        path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def bare(suite: str) -> list[str]:
    """The first two calls, which go on at the same time."""
    return [f".ci/bare-root {suite} tests/demo tests/run", "tests/run -n 3 -m beyond_bare"]


def test_everything_runs_on_a_bare_debian_and_here_only_what_wants_more(checkout: Checkout) -> None:
    """On Debian 12 and 13 in turn by the day, or on that which is asked for."""
    assert [checkout.run(seconds=day * DAY + DAY // 2)[0] for day in range(20_000, 20_003)] == [
        bare("bookworm"),
        bare("trixie"),
        bare("bookworm"),
    ]
    for suite in ("trixie", "bookworm"):
        assert checkout.run(suite, seconds=20_000 * DAY)[0] == bare(suite)


@pytest.mark.parametrize("failing", [".ci/bare-root", "tests/run"])
def test_what_fails_in_either_place_fails_the_whole(checkout: Checkout, failing: str) -> None:
    """And the other place is still looked at."""
    checkout.end_with(failing, 1)
    calls, output = checkout.run("trixie", expect=1)
    assert calls == bare("trixie")
    assert all(f"{call} ran" in output for call in calls)
    assert "NOT BARE" not in output


def test_where_there_is_no_bare_debian_everything_runs_here_and_that_is_loud(checkout: Checkout) -> None:
    checkout.end_with(".ci/bare-root", NO_ROOT)
    calls, output = checkout.run("trixie")
    assert calls == [*bare("trixie"), "tests/demo ", "tests/run -m not beyond_bare"]
    assert output.count("NOT BARE") == 2  # where it begins, and at the end, where one looks
    checkout.end_with("tests/demo", 3)
    calls, output = checkout.run("trixie", expect=1)
    assert calls[2:] == ["tests/demo ", "tests/run -m not beyond_bare"]
    assert "NOT BARE" in output.splitlines()[-1]
