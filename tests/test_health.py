"""What others are told of the backups: the pings to a monitoring service, and the command `health`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import MIB, SCRIPT, Home, write_at
from simulator import Fault, Simulator

import dosvob


@dataclass(frozen=True)
class Ping:
    """What the service was told."""

    method: str
    path: str
    body: str


class Service:
    """A monitoring service that notes its pings and answers as it is told to."""

    def __init__(self) -> None:
        self.pings: list[Ping] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.released = threading.Event()  # an answer waits for it
        self.released.set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def _note(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                service.pings.append(Ping(self.command, self.path, body.decode()))
                service.released.wait()
                self.send_response(service.status)
                for name, value in {"Content-Length": "2", **service.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"OK")

            do_GET = do_POST = do_PUT = do_HEAD = _note  # noqa: N815 - http.server's names

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that has gone away is what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/ping/5ec7e7"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def paths(self) -> list[str]:
        """The paths that were asked for."""
        return [ping.path for ping in self.pings]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


START, SUCCESS, FAIL = "/ping/5ec7e7/start", "/ping/5ec7e7", "/ping/5ec7e7/fail"


@contextlib.contextmanager
def lock_held(home: Home) -> Iterator[None]:
    """Another process holds the lock, as a run does."""
    with (home.backups / ".dosvob" / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


# -- pings


def test_success_is_told_with_the_table(home: Home, sim: Simulator, service: Service) -> None:
    """Also when nothing of it is printed."""
    sim.add_volume("data")
    home.configure(healthchecks=service.url + "/")
    assert home.run("--quiet").stdout == ""
    assert [(ping.method, ping.path) for ping in service.pings] == [("POST", START), ("POST", SUCCESS)]
    assert "data" in service.pings[1].body
    assert "ok" in service.pings[1].body
    assert "this run cost" in service.pings[1].body


def test_failed_volume_is_told_with_the_reason(home: Home, sim: Simulator, service: Service) -> None:
    sim.add_volume("bad")
    sim.add_volume("good")
    (home.backups / "bad").mkdir(parents=True)
    home.configure(healthchecks=service.url)
    done = home.run(expect=1)
    assert service.paths == [START, FAIL]
    reason = next(line for line in done.stderr.splitlines() if "error: " in line).partition("error: ")[2]
    assert reason in service.pings[1].body
    assert "FAILED" in service.pings[1].body


def test_refused_token_is_told_without_the_token(home: Home, sim: Simulator, service: Service) -> None:
    sim.revoke_token()
    home.configure(healthchecks=service.url)
    home.run(expect=2)
    assert service.paths == [START, FAIL]
    assert "401" in service.pings[1].body
    assert sim.token not in service.pings[1].body


def test_wrong_region_is_told(home: Home, service: Service) -> None:
    home.configure(region="nowhere1", healthchecks=service.url)
    home.run(expect=2)
    assert service.paths == [START, FAIL]
    assert "nowhere1" in service.pings[1].body


def test_unwritable_place_is_told(home: Home, service: Service) -> None:
    home.backups.write_text("not a directory")
    home.configure(healthchecks=service.url)
    home.run(expect=2)
    assert service.paths == [FAIL]


def test_interrupted_run_is_told(home: Home, sim: Simulator, service: Service) -> None:
    sim.add_volume("data")
    sim.faults.add(Fault("action-stuck", method="POST", path="/actions$"))
    home.configure(healthchecks=service.url)
    with home.start("--verbose") as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "/actions → " in line:
                run.send_signal(signal.SIGTERM)
                break
        run.stdout.read()
    assert run.returncode == 128 + signal.SIGTERM
    assert service.paths == [START, FAIL]
    assert "interrupted" in service.pings[1].body
    assert not sim.alive()


def test_run_that_is_locked_out_tells_nothing(home: Home, service: Service) -> None:
    home.configure(healthchecks=service.url)
    (home.backups / ".dosvob").mkdir(parents=True)
    (home.backups / ".dosvob" / "lock").touch()
    with lock_held(home):
        assert "another dosvob" in home.run(expect=2).stderr
    assert service.pings == []


def test_other_commands_tell_nothing(home: Home, sim: Simulator, service: Service) -> None:
    sim.add_volume("data")
    home.configure(healthchecks=service.url)
    home.run("--dry-run")
    home.run("sweep")
    home.run("health", expect=1)
    assert service.pings == []


@pytest.mark.parametrize("trouble", ["nobody listens", "refusal", "redirect", "silence", "no such host"])
def test_failing_pings_do_not_fail_the_backup(home: Home, sim: Simulator, service: Service, trouble: str) -> None:
    sim.add_volume("data")
    home.configure(healthchecks="https://hc.invalid/ping/5ec7e7" if trouble == "no such host" else service.url)
    if trouble == "nobody listens":
        service.close()
    elif trouble == "refusal":
        service.status = 503
    elif trouble == "redirect":
        service.status, service.headers = 302, {"Location": "/elsewhere"}
    elif trouble == "silence":
        service.released.clear()
    done = home.run()
    assert home.image("data").stat().st_size == 1024 * MIB
    assert done.stderr.count("warning: the ping to ") == 2
    assert "5ec7e7" not in done.stdout + done.stderr
    assert service.paths == ([] if trouble in ("nobody listens", "no such host") else [START, SUCCESS])


def test_trickling_answer_is_given_up_in_time(home: Home, sim: Simulator) -> None:
    """Each byte comes within any limit on a single read: only a limit on the whole ends it."""
    sim.add_volume("data")
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not over.wait(0.2):
                self.wfile.write(b"x")

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """The client goes away, as it should."""

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home.configure(healthchecks=f"http://127.0.0.1:{server.server_address[1]}/x")
        done = home.run()
        over.set()
        server.shutdown()
    assert done.stderr.count("no answer within 5 s") == 2


def test_address_is_checked(home: Home, sim: Simulator) -> None:
    """What would travel in the clear, or is no address at all, is refused before anything is done."""
    for value in ("http://hc-ping.com/x", "hc-ping.com/x", "https://", "https://[::1/x", "https://a:b/", 7):
        home.configure(healthchecks=value)
        assert 'conf.json: "healthchecks" must be' in home.run(expect=2).stderr
    assert not sim.requests


# -- health


def record_snapshot_time(home: Home, name: str, moment: datetime.datetime) -> None:
    """Have the state file say that its snapshot was taken then, with all its checksums right."""
    path = home.backups / ".dosvob" / f"{name}.state"
    state = dosvob.State.load(path)
    assert state is not None
    changed = dataclasses.replace(state, snapshot=dataclasses.replace(state.snapshot, taken_at=moment.isoformat()))
    write_at(path, 0, dosvob.seal("state", dataclasses.asdict(changed)))


def write_old_state(home: Home, name: str) -> None:
    """The state of a volume that was backed up in 2020, and has an image."""
    moment = "2020-01-01T00:00:00+00:00"
    snapshot = dosvob.Snapshot("an-id", name, "fra1", 0, moment)
    identity = dosvob.identity_of(home.image(name))
    state = dosvob.State(snapshot, moment, 0, hashlib.sha256(b"").hexdigest(), identity)
    (home.backups / ".dosvob" / f"{name}.state").write_bytes(dosvob.seal("state", dataclasses.asdict(state)))


def hours_ago(hours: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=hours)


def offline(home: Home, *arguments: str, expect: int) -> subprocess.CompletedProcess[str]:
    """Run it without configuration, and with an address of the API that would fail."""
    (home.directory / "conf.json").unlink(missing_ok=True)
    return home.run(*arguments, expect=expect, DIGITALOCEAN_API_URL="https://192.0.2.1")


def test_health_looks_at_each_volume(home: Home, sim: Simulator) -> None:
    """At the age of the snapshot, and at whether what is recorded is really there; offline, beside a run."""
    sim.add_volume("data")
    sim.add_volume("logs")
    home.run()
    with lock_held(home):
        assert offline(home, "health", expect=0).stdout.count("its last complete backup is") == 2
    record_snapshot_time(home, "logs", hours_ago(10))
    assert re.search(r"(10:00|9:59) h old", offline(home, "health", "--max-age", "10.5", expect=0).stdout)
    done = offline(home, "health", "--max-age", "9.5", expect=1)
    assert re.search(r"logs: its last complete backup is (10:00|9:59) h old, more than 9.5 h", done.stderr)
    assert "data: its last complete backup is" in done.stdout
    offline(home, "health", "data", "--max-age", "9.5", expect=0)
    wanted = home.backups / ".dosvob" / "wanted.json"
    for content in ("{", "7", '["../../etc/passwd"]'):  # somebody wrote to it: what makes no sense is not there
        wanted.write_text(content)
        done = offline(home, "health", expect=1 if "passwd" in content else 0)
        assert "data: its last complete backup is" in done.stdout
    home.image("data").unlink()
    write_at(home.backups / ".dosvob" / "logs.state", 40, b"\xff")
    done = offline(home, "health", expect=1)
    assert "data: backups/data is missing" in done.stderr
    assert "logs.state is damaged" in done.stderr


def test_health_misses_what_was_never_backed_up(home: Home, sim: Simulator) -> None:
    """Also after a run for other volumes only."""
    sim.add_volume("bad")
    sim.add_volume("good")
    (home.backups / "bad").mkdir(parents=True)
    home.run(expect=1)
    home.run("good")
    (home.backups / "bad").rmdir()
    done = offline(home, "health", expect=1)
    assert "bad: there is no complete backup of it yet" in done.stderr
    assert "good: its last complete backup is" in done.stdout


def test_health_reminds_of_volumes_that_are_not_backed_up_any_more(home: Home, sim: Simulator) -> None:
    sim.add_volume("data")
    sim.add_volume("old")
    home.run()
    home.configure(include=["data"])
    home.run()
    record_snapshot_time(home, "old", hours_ago(30))
    assert "if it is not to be backed up any more, move it and" in home.run("health", expect=1).stderr
    (home.backups / ".dosvob" / "old.state").unlink()
    home.image("old").unlink()
    home.run("health")


def test_health_and_verify_do_not_take_an_image_that_was_set_aside_for_a_volume(home: Home, sim: Simulator) -> None:
    old = sim.add_volume("data")
    write_at(old.path, 0, b"old")
    home.run()
    sim.remove_volume(old)
    write_at(sim.add_volume("data").path, 0, b"new")
    home.run()
    assert len(list(home.backups.glob("data.set-aside-*"))) == 1
    for command, told in (("health", "data: its last complete backup is"), ("verify", "data: sound")):
        done = home.run(command)
        assert not done.stderr
        assert len(done.stdout.splitlines()) == 1
        assert told in done.stdout


def test_health_tells_of_an_image_whose_disk_is_not_mounted(home: Home, sim: Simulator) -> None:
    sim.add_volume("data")
    home.run()
    image = home.image("data")
    image.unlink()
    image.symlink_to("elsewhere/data")
    done = home.run("health", expect=1)
    assert "data leads to elsewhere/data, which is not there: is it mounted?" in done.stderr


def test_health_without_any_backup(home: Home) -> None:
    assert "no backups" in offline(home, "health", expect=2).stderr
    home.backups.mkdir()
    assert "there is no backup in backups yet" in offline(home, "health", expect=1).stderr


def test_limit_is_a_number_of_hours(home: Home) -> None:
    for value in ("0", "nan", "a day"):
        assert "--max-age" in home.run("health", f"--max-age={value}", expect=2).stderr


@pytest.mark.parametrize(
    ("line", "limit"),
    [
        ("0 */4 * * *", 10),
        ("30 5 * * *", 50),
        ("0 8-18/2 * * mon-fri", 126),  # from Friday evening to Monday morning
        ("0 0 1 * 0", 338),  # Sundays, and the first of each month as well
        ("@monthly", 1490),
    ],
)
def test_limit_in_the_container_follows_from_the_schedule(home: Home, sim: Simulator, line: str, limit: int) -> None:
    """Twice the longest pause, and two hours for a run: one run may fail."""
    (home.backups / ".dosvob").mkdir(parents=True)
    (home.directory / "crontab").write_text(f"# when\n{line}  python dosvob.py\n0 0 1 1 * python dosvob.py verify\n")
    home.image("data").touch()
    write_old_state(home, "data")
    (home.directory / "lib").mkdir()
    shutil.copy(SCRIPT, home.directory / "lib")
    cron = SCRIPT.parent / ".docker" / "cron.py"
    done = subprocess.run(
        [sys.executable, cron, "health"], cwd=home.directory, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert f"more than {limit} h" in done.stderr


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("0 */4 * * python dosvob.py", "'python' is no day of the week"),
        ("60 * * * * python dosvob.py", "'60' is no minute"),
        ("0 5-3 * * * python dosvob.py", "'5-3' is no hour"),
        ("0 0 30 feb * python dosvob.py", "there is no such day"),
        ("@reboot python dosvob.py", "@reboot is unknown"),
        ("MAILTO=me", "variables are set in docker-compose.yml"),
        ("", "has no line that says when to run what"),
    ],
)
def test_wrong_crontab_is_unhealthy(home: Home, line: str, problem: str) -> None:
    """With a message that says where and what."""
    home.backups.mkdir()
    (home.directory / "crontab").write_text(line + "\n")
    cron = SCRIPT.parent / ".docker" / "cron.py"
    done = subprocess.run(
        [sys.executable, cron, "health"], cwd=home.directory, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert problem in done.stderr
