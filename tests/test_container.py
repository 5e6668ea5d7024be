"""The container, with a real Docker engine: build, schedule, stop, health, and what the image holds.

The simulated account is reached over the host's network, which an override file beside the compose file sees to.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB, same, write_at
from simulator import Behaviour, Fault, Simulator
from simulator.storage import LoopDevice

TOP = Path(__file__).resolve().parent.parent
PARTS = ("Dockerfile", "docker-compose.yml", "crontab", ".dockerignore", ".docker", "dosvob.py", "conf.json.example")
OWNER = 61234, 61235  # who has no name and no rights on this machine
SECOND = 1_000_000_000  # in Docker's nanoseconds
ZONE = "Asia/Kolkata"  # 5:30 h before UTC
TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 "
NEVER = "0 0 1 1 * python dosvob.py\n"  # but for the run at the start


def why_not() -> str:
    """Why the tests cannot run here; empty if they can."""
    if shutil.which("docker-compose") is None:
        return "docker-compose is not installed"
    info = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    return f"no Docker engine answers: {info.stderr.strip()[-200:]}" if info.returncode else ""


REASON = why_not()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.beyond_bare]


def until(what: str, condition: Callable[[], Any], limit: float = 150, log: Callable[[], str] = str) -> None:
    """Wait for a condition."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {limit:.0f} s until {what}\n{log()}")
        time.sleep(0.2)


class Project:
    """A user's checkout, and the container that is made of it with docker-compose."""

    def __init__(self, directory: Path, sim: Simulator) -> None:
        self.directory = directory
        self.sim = sim
        self.backups = directory / "backups"
        self.name = "dosvob-test-" + hashlib.sha256(str(directory).encode()).hexdigest()[:12]
        directory.mkdir()
        for part in PARTS:
            copy = shutil.copytree if (TOP / part).is_dir() else shutil.copy2
            copy(TOP / part, directory / part)
        self.backups.mkdir()
        os.chown(self.backups, *OWNER)
        self.configure()
        self.schedule(NEVER)
        self.override()

    def configure(self, token: str | None = None) -> None:
        """Write conf.json, for its owner only."""
        path = self.directory / "conf.json"
        path.write_text(json.dumps({"do_token": token or self.sim.token, "region": "fra1"}))
        path.chmod(0o600)
        os.chown(path, *OWNER)

    def schedule(self, crontab: str) -> None:
        """Write another crontab, as editors do: a new file takes the place of the old one."""
        new = self.directory / "crontab.new"
        new.write_text(crontab)
        new.rename(self.directory / "crontab")

    def override(self, **environment: str) -> None:
        """Lead the container to the simulator, and have its health looked at more often."""
        service = {
            "network_mode": "host",
            "environment": {**self.sim.environment(), **environment},
            "healthcheck": {"interval": "1s", "retries": 1},
        }
        (self.directory / "test.yml").write_text(json.dumps({"services": {"dosvob": service}}))

    def compose(self, *arguments: str, expect: int = 0) -> str:
        """Run docker-compose; returns what it prints."""
        done = subprocess.run(
            ["docker-compose", "-p", self.name, "-f", "docker-compose.yml", "-f", "test.yml", *arguments],
            cwd=self.directory,
            env={name: value for name, value in os.environ.items() if name not in ("TZ", "OWNER")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == expect, f"{done.stdout}\n{self.log()}"
        return done.stdout

    def up(self) -> None:
        """As the README says."""
        self.compose("up", "-d", "--build")

    @property
    def container(self) -> str:
        """The container's id, also while it does not run."""
        return docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={self.name}").strip()

    @property
    def image(self) -> str:
        """The image's id."""
        return str(self.inspect()["Image"])

    def inspect(self) -> dict[str, Any]:
        """What the engine knows of the container."""
        found: list[dict[str, Any]] = json.loads(docker("inspect", self.container))
        return found[0]

    def log(self) -> str:
        """What `docker logs` shows."""
        containers = docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={self.name}").split()
        return "".join(docker("logs", container) for container in containers)

    def health(self) -> str:
        """What the engine thinks of the container's health."""
        return str(self.inspect()["State"]["Health"]["Status"])

    def until_logged(self, text: str, count: int = 1) -> None:
        """Wait until the log has a text."""
        until(f"the log says {text!r}", lambda: self.log().count(text) >= count, log=self.log)

    def until_health(self, status: str) -> None:
        """Wait until the container is healthy or not."""
        until(
            f"it is {status}", lambda: self.health() == status, log=lambda: f"{self.log()}\n{self.inspect()['State']}"
        )

    def down(self) -> None:
        """Remove all of it."""
        self.compose("down", "--rmi", "local", "-v", "-t", "60")


def docker(*arguments: str) -> str:
    """Run docker; returns what it prints."""
    return subprocess.run(
        ["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=300
    ).stdout


@pytest.fixture
def project(tmp_path: Path, sim: Simulator) -> Iterator[Project]:
    project = Project(tmp_path / "checkout", sim)
    yield project
    project.down()


ENDED = "cron: python dosvob.py ended with exit code"


def test_from_up_to_the_second_backup(project: Project, sim: Simulator) -> None:
    """The first run at once, the second one when cron says so, which fetches only what changed."""
    volume = sim.add_volume("data")
    write_at(volume.path, 5 * MIB, os.urandom(3 * MIB))
    project.schedule(every_minute_of_this_hour(ZONE))
    project.override(TZ=ZONE)
    project.up()
    project.until_logged(f"{ENDED} 0")
    image = project.backups / "data"
    assert same(image, volume.path)
    project.until_health("healthy")
    write_at(volume.path, 700 * MIB, os.urandom(MIB))
    project.until_logged(f"{ENDED} 0", 2)
    if not same(image, volume.path):  # it was written to after the second snapshot
        project.until_logged(f"{ENDED} 0", 3)
    assert same(image, volume.path)
    log = project.log()
    assert "1.0 MiB had changed, 1.0 MiB were fetched" in log
    assert "\x1b" not in log
    assert "\r" not in log
    assert all(re.match(TIME, line) for line in log.splitlines())
    assert_owned(project)
    assert_confined(project)


def every_minute_of_this_hour(zone: str) -> str:
    """A crontab whose line is due now and in the next hour there, and not at these hours elsewhere."""
    hour = datetime.datetime.now(zoneinfo.ZoneInfo(zone)).hour
    return f"* {hour},{(hour + 1) % 24} * * * python dosvob.py\n"


def assert_owned(project: Project) -> None:
    """All files are the owner's, and nobody else's to read where they should not be."""
    for path in (project.backups, *project.backups.rglob("*")):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == OWNER, path
    assert stat.S_IMODE((project.backups / "data").stat().st_mode) & 0o077 == 0


def assert_confined(project: Project) -> None:
    """The processes have no privileges, and nowhere to write but to the backups and /tmp."""
    status = docker("exec", project.container, "cat", "/proc/1/status").splitlines()
    fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    assert fields["Uid"].split() == [str(OWNER[0])] * 4
    assert fields["Gid"].split() == [str(OWNER[1])] * 4
    assert fields["Groups"].split() == []
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    writable = {
        line.split()[1]
        for line in docker("exec", project.container, "cat", "/proc/mounts").splitlines()
        if "rw" in line.split()[3].split(",")
    }
    kernel = ("/proc", "/dev", "/sys")
    assert {path for path in writable if not path.startswith(kernel)} == {"/dosvob/backups", "/tmp"}


class TestStopping:
    """A run that is ended in the middle."""

    @pytest.fixture
    def behaviour(self) -> Behaviour:
        """A volume stays attached for a while, so that the teardown takes longer than an instant."""
        return Behaviour(release_seconds=2)

    @pytest.fixture
    def at_work(self, project: Project, sim: Simulator) -> Project:
        """A project with a run that does not go on, its resources created."""
        sim.add_volume("data")
        sim.faults.add(Fault("action-stuck", path="/actions$"))
        project.up()
        until("a volume is being attached", lambda: self.created(sim), log=project.log)
        return project

    @staticmethod
    def created(sim: Simulator) -> bool:
        """Whether there is all that can be left behind, and the attach that will not end has begun."""
        asked = any(fault.kind == "action-stuck" for _, fault in list(sim.faults.fired))
        return asked and {"droplet", "volume", "key"} <= {resource.kind for resource in sim.alive()}

    def test_stop_tears_down(self, at_work: Project, sim: Simulator) -> None:
        """The signal reaches the run, and the container waits for it."""
        assert at_work.inspect()["Config"]["StopTimeout"] > 600  # Removal.LIMIT
        at_work.compose("stop")
        assert not sim.alive()
        state = at_work.inspect()["State"]
        assert (state["Running"], state["ExitCode"], state["OOMKilled"]) == (False, 0, False)
        log = at_work.log()
        assert "SIGTERM: stopping, and removing what was created" in log
        assert all(re.match(TIME, line) for line in log.splitlines())

    @pytest.fixture
    def with_time(self, pytestconfig: pytest.Config) -> None:
        """For tests that take minutes."""
        if not pytestconfig.option.exhaustive:
            pytest.skip("takes minutes: with --all only")

    def test_runs_never_overlap(self, with_time: None, at_work: Project, sim: Simulator) -> None:
        """What is due while it still runs is left out."""
        at_work.compose("stop")
        at_work.schedule(every_minute_of_this_hour("UTC"))
        sim.faults.add(Fault("action-stuck", path="/actions$"))
        at_work.compose("start")
        at_work.until_logged("is due and still runs: left out")
        assert at_work.log().count("cron: running") == 2
        at_work.compose("stop")
        assert not sim.alive()

    def test_killed_outright_the_next_start_sweeps(self, at_work: Project, sim: Simulator) -> None:
        """As after a power cut."""
        at_work.compose("kill")
        left = sim.alive()
        assert left
        sim.faults.clear()
        at_work.compose("up", "-d")
        at_work.until_logged(f"{ENDED} 0")
        assert "left over from an earlier run" in at_work.log()
        assert all(resource.deleted is not None for resource in left)
        assert not sim.alive()
        assert (at_work.backups / "data").exists()


def test_wrong_token_is_told_and_not_tried_again(project: Project, sim: Simulator) -> None:
    sim.add_volume("data")
    project.configure(token="dop_v1_wrong")
    project.up()
    project.until_health("unhealthy")
    project.until_logged(f"{ENDED} 2")
    assert 'the token in "do_token" in conf.json (HTTP 401): it is wrong, expired or revoked' in project.log()
    assert "make a new one at https://cloud.digitalocean.com/account/api/tokens" in project.log()
    assert "Traceback" not in project.log()
    asked = len(sim.requests)
    failed = failing_streak(project)
    until("its health is looked at twice more", lambda: failing_streak(project) > failed + 1)
    state = project.inspect()
    assert (state["State"]["Status"], state["RestartCount"]) == ("running", 0)
    assert len(sim.requests) == asked


@pytest.fixture
def backed_up(project: Project, sim: Simulator) -> Project:
    """A container at rest, and one backup, which cannot be had again."""
    write_at(sim.add_volume("data").path, 5 * MIB, os.urandom(3 * MIB))
    project.up()
    project.until_logged(f"{ENDED} 0")
    return project


def test_commands_in_the_container(backed_up: Project, sim: Simulator) -> None:
    """As the owner, in the container that runs and in one for the command alone; nothing but a backup is one."""
    project = backed_up
    assert_commands(project, sim, "exec", "-T", "dosvob", "python", "dosvob.py")
    assert_commands(project, sim, "exec", "-T", "dosvob", "python", "cron.py")
    assert project.log().count("cron: running") == 1
    with contextlib.closing(LoopDevice(project.backups / "data")) as device:
        said = project.compose("exec", "-T", "dosvob", "python", "dosvob.py", expect=1)
    assert f"is in use by {device.path}" in said
    project.compose("down")  # with the host's network, `run` cannot link its container to one that is there
    assert_commands(project, sim, "run", "--rm", "-T", "dosvob")


def assert_commands(project: Project, sim: Simulator, *way: str) -> None:
    """What does not back up needs no account, and is the owner's; what is no command is refused."""
    asked = len(sim.requests)
    assert "data: fra1, 1.0 GiB" in project.compose(*way, "list")
    assert "data: sound" in project.compose(*way, "verify")
    target = f"backups/{len(sim.requests)}.img"
    assert f"is restored to {target}" in project.compose(*way, "restore", "data", target)
    assert same(project.directory / target, project.backups / "data")
    told = project.compose(*way, "restore", "data", expect=2)
    assert "new file: docker-compose exec dosvob python dosvob.py restore data data.img" in told
    assert len(sim.requests) == asked
    assert_owned(project)
    assert "nothing of dosvob's is left" in project.compose(*way, "sweep")
    assert 'did you mean the command "list"?' in project.compose(*way, "lst", expect=2)
    assert 'no volume in fra1 matches "bash"' in project.compose(*way, "bash", expect=2)
    assert {request.method for request in sim.requests[asked:]} == {"GET"}


def failing_streak(project: Project) -> int:
    """How many checks of its health have failed in a row."""
    return int(project.inspect()["State"]["Health"]["FailingStreak"])


def test_unusable_crontab_is_told_and_restarting_mends_it(project: Project, sim: Simulator) -> None:
    volume = sim.add_volume("data")
    project.schedule("0 */4 * * python dosvob.py\n")
    project.up()
    assert_idle(project, "crontab, line 1")
    project.schedule(NEVER)
    project.compose("restart")
    project.until_logged(f"{ENDED} 0")
    project.until_health("healthy")
    assert same(project.backups / "data", volume.path)


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"TZ": "Europe/Atlantis"}, "there is no such time zone"), ({"OWNER": "me"}, "write it as numbers")],
)
def test_unusable_settings_are_told(project: Project, environment: dict[str, str], message: str) -> None:
    project.override(**environment)
    project.up()
    assert_idle(project, message)


def assert_idle(project: Project, message: str) -> None:
    """The container says what is wrong, is unhealthy, stays up, and does nothing."""
    project.until_health("unhealthy")
    assert message in project.log()
    state = project.inspect()
    assert (state["State"]["Status"], state["RestartCount"]) == ("running", 0)
    assert not project.sim.requests


def test_owner_can_be_set(project: Project, sim: Simulator) -> None:
    """Whoever is set is whoever writes; here the group only differs from that of the directory."""
    sim.add_volume("data")
    project.override(OWNER=f"{OWNER[0]}:{OWNER[1] + 1}")
    project.up()
    project.until_logged(f"{ENDED} 0")
    status = (project.backups / "data").stat()
    assert (status.st_uid, status.st_gid) == (OWNER[0], OWNER[1] + 1)


def test_image_holds_no_secret(project: Project, sim: Simulator, tmp_path: Path) -> None:
    """Neither the token, nor the backups, nor the history, in any of the layers; nor conf.json by name."""
    marks = {"conf.json": sim.token.encode(), "backups/old": os.urandom(16), ".git/HEAD": os.urandom(16)}
    for name, mark in list(marks.items())[1:]:
        path = project.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mark)
    project.up()
    image, archive = project.image, tmp_path / "image.tar"
    docker("save", "-o", str(archive), image)
    texts = [docker("history", "--no-trunc", image).encode(), docker("inspect", image).encode()]
    names, blobs = members(archive)
    assert "dosvob/dosvob.py" in names
    forbidden = ("dosvob/backups/", "dosvob/conf", ".git/", "dosvob/.git/")
    assert not [name for name in names if name.startswith(forbidden)]
    for mark in marks.values():
        assert not any(mark in blob for blob in (*texts, *blobs))


def members(archive: Path) -> tuple[set[str], list[bytes]]:
    """The names of all files in an image's own layers, and the content of those that are not the base's."""
    names: set[str] = set()
    blobs: list[bytes] = []
    with tarfile.open(archive) as outer:
        for member in outer:
            file = outer.extractfile(member)
            if file is None:
                continue
            try:
                with tarfile.open(fileobj=file) as layer:
                    for inner in layer:
                        names.add(inner.name)
                        content = layer.extractfile(inner) if inner.isfile() else None
                        blobs.append(content.read() if content else b"")
            except tarfile.ReadError:
                file.seek(0)
                blobs.append(file.read())
    return names, blobs


def test_edit_of_the_script_does_not_install_the_dependencies_again(project: Project) -> None:
    project.compose("build")
    with (project.directory / "dosvob.py").open("a") as file:
        file.write("\n# an edit\n")
    cached = re.compile(
        r"RUN pip install.*\n(#\d+ CACHED| ---> Using cache)"
    )  # as BuildKit says it, or its predecessor
    assert cached.search(project.compose("build"))
    script = project.directory / "dosvob.py"
    script.write_text(script.read_text().replace('"requests>=2.32,<3"', '"requests>=2.32,<4"'))
    changed = project.compose("build")
    assert "RUN pip install" in changed
    assert not cached.search(changed)


def test_compose_file_keeps_the_log_small_and_restarts(project: Project) -> None:
    project.compose("up", "--build", "--no-start")
    host = project.inspect()["HostConfig"]
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "5"}}
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["CapDrop"] == ["ALL"]
