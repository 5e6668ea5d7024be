"""What the tests and the demonstration do to a machine: they say what it lacks, and give back what they use."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_for
from simulator.storage import LoopDevice, create_sparse, mend_free_devices

TESTS = Path(__file__).resolve().parent
PATIENCE = 120.0
BLKROSET, BLKROGET = 0x125D, 0x125E


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with nothing set but these variables, and PATH."""
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


# -- loop devices


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LoopDevice]:
    """A loop device over a small file."""
    create_sparse(tmp_path / "disk", 1 << 20)
    made = LoopDevice(tmp_path / "disk")
    yield made
    made.close()


def set_read_only(path: str) -> None:
    """As `blockdev --setro`."""
    with open(path, "rb") as file:
        fcntl.ioctl(file, BLKROSET, struct.pack("i", 1))


def is_read_only(path: str) -> bool:
    """As `blockdev --getro`."""
    with open(path, "rb") as file:
        return bool(struct.unpack("i", fcntl.ioctl(file, BLKROGET, bytes(4)))[0])


def test_a_loop_device_is_writable_for_its_next_user(device: LoopDevice) -> None:
    """A clone is set read-only by the script, and the device stays like that, also without the clone."""
    set_read_only(device.path)
    assert is_read_only(device.path)
    device.close()
    assert not is_read_only(device.path)


def test_a_loop_device_of_a_killed_simulator_is_mended(device: LoopDevice) -> None:
    """It had no time to; the next one has. What is in use is left alone."""
    set_read_only(device.path)
    mend_free_devices()
    assert is_read_only(device.path)
    device.forsake()
    wait_for(lambda: not Path("/sys/block", Path(device.path).name, "loop").exists())  # another test may look at it
    mend_free_devices()
    assert not is_read_only(device.path)


# -- signals


CHILDREN_IGNORE = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
{call}
status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
print(next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")))
"""
OURS = "import signals; signals.ignore_for_ourselves_only()"


@pytest.mark.parametrize("ours", ["", OURS])
def test_signals_that_are_ignored_are_not_inherited(ours: str) -> None:
    """As under `nohup`, and behind a `&` in a script."""
    program = CHILDREN_IGNORE.format(call=ours)
    command = [sys.executable, "-c", program, str(TESTS)]
    ignored = int(run("env", "--ignore-signal=HUP,INT,QUIT,TERM", *command).stdout, 16)
    assert bool(ignored) == (not ours)


def test_what_is_ignored_goes_on_being_so_here() -> None:
    """`nohup` still does what it is for."""
    program = CHILDREN_IGNORE.format(call=OURS) + "import os; os.kill(os.getpid(), 1); print('alive')"
    assert run("env", "--ignore-signal=HUP", sys.executable, "-c", program, str(TESTS)).stdout.endswith("alive\n")


# -- what is set where the tests are started


def set_by(script: Path, **variables: str) -> dict[str, str]:
    """What is set for a program that is run at the end of a script that begins as tests/run does."""
    script.write_text(f"#!/usr/bin/env bash\nsource {TESTS}/environment\nenv\n")
    script.chmod(0o755)
    lines = run(script, **variables).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_a_run_means_the_same_whatever_is_set(tmp_path: Path) -> None:
    """What could hide a failure is not there; what an installation may need is there until that is done."""
    bare = set_by(tmp_path / "bare", CI="true")
    hidden = {"PYTHONUNBUFFERED": "1", "LANG": "de_DE.UTF-8", "https_proxy": "http://127.0.0.1:9", "TMPDIR": "/tmp"}
    full = set_by(tmp_path / "full", **hidden, CI="true", TERM="vt100", DIGITALOCEAN_TOKEN="secret")
    assert full == {**bare, "TERM": "vt100"}
    assert Path(bare["TMPDIR"]) == TESTS / ".tmp"


# -- what is missing


def complaint(*wrapper: str, command: Path, **variables: str) -> str:
    """The one line with which a program ends at once that cannot do its work."""
    done = run(*wrapper, command, **variables)
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{command.name} cannot run here: ")
    return lines[0]


@pytest.mark.parametrize("name", ["run", "demo"])
def test_neither_root_nor_sudo(tmp_path: Path, name: str) -> None:
    for program in ("bash", "dirname", "id", "grep"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    assert "no sudo" in complaint("/usr/bin/unshare", "--user", command=TESTS / name, PATH=str(tmp_path))


def test_a_container_without_privileges() -> None:
    assert "namespaces" in complaint("setpriv", "--bounding-set=-sys_admin", command=TESTS / "demo")


@pytest.mark.parametrize(
    ("instead", "of", "says"),
    [("/bin/false", "/usr/sbin/sshd", "sshd"), ("/dev/null", "/dev/loop-control", "loop devices")],
)
def test_something_that_does_not_work(instead: str, of: str, says: str) -> None:
    """It is told before anything begins, not by a droplet that never comes."""
    wrapper = ("unshare", "--mount", "sh", "-c", f'mount --bind {instead} {of} && exec "$@"', "sh")
    assert says in complaint(*wrapper, command=TESTS / "demo")


# -- the demonstration ends


class Demo:
    """The demonstration while it runs, with a temporary directory of its own."""

    def __init__(self, directory: Path, *wrapper: str) -> None:
        self.directory = directory
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, TESTS / "demo.py"],
            env={**os.environ, "TMPDIR": str(directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        """All that it said so far."""
        return "".join(self.lines)

    def reach(self, text: str) -> None:
        """Wait until it says so."""
        wait_for(lambda: text in self.output, PATIENCE)

    def end(self) -> int:
        """Its exit code. Nothing of it is left: no file, no mount, no process."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)  # all that could write there are gone
        assert not self._reader.is_alive()
        assert list(self.directory.iterdir()) == []
        assert str(self.directory) not in Path("/proc/self/mounts").read_text()
        return code


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "A DigitalOcean account"),
        (signal.SIGINT, "is up at"),
        (signal.SIGTERM, "is up at"),
        (signal.SIGHUP, "is up at"),
        (signal.SIGINT, "cmp backups/files"),
    ],
)
def test_the_demonstration_is_stopped(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    """Ctrl-C, `kill`, its terminal is closed: a line says so, and everything is removed."""
    demo = Demo(tmp_path)
    demo.reach(moment)
    os.killpg(demo.process.pid, number)
    assert demo.end() == 128 + number, demo.output
    assert "Traceback" not in demo.output
    assert demo.lines[-1].startswith(number.name)


def test_the_demonstration_is_stopped_in_a_mount(tmp_path: Path) -> None:
    """Then there is something to unmount; only the demonstration gets the signal."""
    demo = Demo(tmp_path)
    wait_for(lambda: str(tmp_path) in Path("/proc/self/mounts").read_text(), PATIENCE)
    demo.process.terminate()
    assert demo.end() == 128 + signal.SIGTERM


def test_the_demonstration_has_no_reader(tmp_path: Path) -> None:
    """As with `tests/demo | head -1`."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, TESTS / "demo.py"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    os.close(write)
    assert process.returncode == 128 + signal.SIGPIPE
    assert process.stderr.strip() == ""
    assert list(tmp_path.iterdir()) == []
