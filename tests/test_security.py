"""What must not get out: the token and the keys of a run. And what must not get in: names and texts of the API."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
import ssl
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Home
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from simulator import FOREVER, Droplet, Fault, Simulator
from trouble_support import (
    QUICK,
    PausingPython,
    add_volume,
    assert_backed_up,
    assert_nothing_left,
    run,
    start,
)

import dosvob

pytestmark = pytest.mark.small


def files_with(directory: Path, text: str) -> list[str]:
    """The files below a directory that have the text in them."""
    found = []
    for place, _, files in os.walk(directory):
        for path in (Path(place, name) for name in files):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                if path.is_file() and text.encode() in path.read_bytes():
                    found.append(str(path))
    return found


@pytest.fixture
def private(tmp_path: Path) -> dict[str, Any]:
    """A home directory and a place for temporary files of the run's own, to be looked through later."""
    directories = {"HOME": tmp_path / "user", "TMPDIR": tmp_path / "tmp"}
    for directory in directories.values():
        directory.mkdir()
    return {name: str(directory) for name, directory in directories.items()}


def assert_token_is_nowhere(home: Home, sim: Simulator, output: str, tmp_path: Path) -> None:
    """Not in what the run said or wrote, nor on the droplet or in what the API was told, save where it belongs."""
    assert output
    assert sim.token not in output
    assert files_with(tmp_path, sim.token) == [str(home.directory / "conf.json")]
    assert not any(sim.token in json.dumps(record.body) for record in sim.requests)
    assert all(sim.token not in item.user_data for item in sim.ever if isinstance(item, Droplet))


# -- the token


def test_token_is_not_told(home: Home, sim: Simulator, tmp_path: Path, private: dict[str, Any]) -> None:
    """Not even when the API echoes it, in an error and in the name of something."""
    add_volume(sim, "data")
    sim.add_key(f"dosvob-ephemeral-{sim.token}")
    echo = f"bad token Bearer {sim.token}"
    sim.faults.add(
        Fault("error", method="POST", path="^/v2/droplets$", status=422, text=echo, times=3),
        Fault("error", method="GET", path="^/v2/regions$", status=500, text=echo),
    )
    done = run(home, "--verbose", expect=None, **private)
    assert done.returncode == 1
    assert "bad token Bearer ***" in done.stdout
    assert "bad token Bearer ***" in done.stderr
    assert_nothing_left(sim)
    assert_token_is_nowhere(home, sim, done.stdout + done.stderr, tmp_path)


def test_token_at_any_place_of_a_long_message_is_not_told(home: Home, sim: Simulator) -> None:
    """Not a part of it either, wherever the message may be cut."""
    add_volume(sim, "data")
    places = (0, 230, 290, 299, 300, 9_900, 9_930)
    for number, place in enumerate(places, start=1):
        echo = "-" * place + sim.token + "-" * 400
        sim.faults.add(Fault("error", method="GET", path="^/v2/regions$", status=500, text=echo, nth=number))
    echo = "-" * 290 + sim.token
    sim.faults.add(Fault("error", method="POST", path="^/v2/account/keys$", status=422, text=echo))
    done = run(home, "--verbose", expect=1)
    assert done.stdout.count("***") >= len(places)
    assert "***" in done.stderr
    for first in range(len(sim.token) - 11):
        assert sim.token[first : first + 12] not in done.stdout + done.stderr


@pytest.mark.parametrize("constant", ["LOG_INTERVAL", "BUSY_LIMIT", "ACTION_LIMIT"])
def test_token_is_not_told_by_a_crash(home: Home, sim: Simulator, tmp_path: Path, constant: str) -> None:
    """A bug anywhere: one line without --verbose, a traceback with it, and all is removed."""
    add_volume(sim, "data")
    for arguments in ([], ["--verbose"]):
        before = sim.alive()
        done = home.run(*arguments, expect=1, constants={**QUICK, "LIMIT": 1, constant: {}})
        assert_token_is_nowhere(home, sim, done.stdout + done.stderr, tmp_path)
        crashes = [line for line in done.stderr.splitlines() if "error: unexpected " in line]
        assert len(crashes) == 1
        assert ("Traceback (most recent call last)" in done.stdout) == bool(arguments)
        assert "Traceback" not in done.stderr
        for item in sim.alive():  # the bug may be in the teardown's way
            run_prefix = item.name.rpartition("-")[0]
            assert item in before or item.id in done.stderr or f"{item.kind} {run_prefix}" in done.stderr
    run(home)
    assert_nothing_left(sim)


@pytest.mark.parametrize(
    ("path", "key"),
    [("account/keys", "ssh_key"), ("droplets", "droplet"), ("volumes/.*/snapshots", "snapshot"), ("volumes", "volume")],
)
def test_token_is_not_told_by_an_answer_that_makes_no_sense(
    home: Home, sim: Simulator, tmp_path: Path, path: str, key: str
) -> None:
    """Something was created then that is in no books yet: it is removed all the same."""
    add_volume(sim, "data")
    field = "size" if key == "droplet" else "size_gigabytes"
    sim.faults.add(Fault("odd", method="POST", path=f"^/v2/{path}$", text=json.dumps({key: {field: "one"}})))
    done = home.run(expect=1, constants=QUICK)
    assert sim.faults.fired
    assert "Traceback" not in done.stdout + done.stderr
    assert_nothing_left(sim)
    assert_token_is_nowhere(home, sim, done.stdout + done.stderr, tmp_path)


def test_token_of_the_wrong_type_is_not_told(home: Home, sim: Simulator) -> None:
    home.configure(do_token=[sim.token])
    done = home.run(expect=2)
    assert '"do_token" must be a text' in done.stderr
    assert sim.token not in done.stdout + done.stderr


@pytest.mark.parametrize("variable", ["", "DIGITALOCEAN_ACCESS_TOKEN", "DIGITALOCEAN_TOKEN"])
def test_token_is_in_no_command_line(home: Home, sim: Simulator, tmp_path: Path, variable: str) -> None:
    """Here or on the droplet, whose processes are this machine's too; nor is it in the environment there."""
    add_volume(sim, "data", size=12 << 20)
    pausing = PausingPython(tmp_path, 6 << 20)
    sim.faults.add(pausing.fault)
    if variable:
        home.configure(do_token=None)
    running = start(home, "--verbose", constants={"STALL_LIMIT": 8}, **({variable: sim.token} if variable else {}))
    pausing.wait()
    droplet = sim.droplets[0].machine
    assert droplet is not None
    namespace = os.readlink(droplet.root.parent / "ns/pid")
    assert command_lines(b"python3 -I -c", namespace)  # the agent is among those looked at
    assert not command_lines(sim.token.encode())
    assert not command_lines(sim.token.encode(), namespace, "environ")
    assert running.end() == 0
    assert sim.token not in running.output


def command_lines(text: bytes, namespace: str = "", file: str = "cmdline") -> list[bytes]:
    """The processes, of one droplet if one is given, that have the text in their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            content = (process / file).read_bytes().replace(b"\0", b" ")
            if text in content and namespace in ("", os.readlink(process / "ns/pid")):
                found.append(content)
        except OSError:  # it has ended
            continue
    return found


def test_netrc_does_not_replace_the_token(home: Home, sim: Simulator, private: dict[str, Any]) -> None:
    """Which `requests` would prefer, and sends to whatever host it names."""
    volume = add_volume(sim, "data")
    netrc = Path(private["HOME"], ".netrc")
    netrc.write_text("machine 127.0.0.1\nlogin somebody\npassword else\n")
    netrc.chmod(0o600)
    run(home, **private)
    assert_backed_up(home, volume)


# -- files


def test_keys_are_in_memory_only(home: Home, sim: Simulator, tmp_path: Path, private: dict[str, Any]) -> None:
    """No private key gets into a file, in the middle of a run or after it; and each run has its own."""
    add_volume(sim, "data", size=12 << 20)
    pausing = PausingPython(tmp_path, 6 << 20)
    sim.faults.add(pausing.fault)
    running = start(home, constants={"STALL_LIMIT": 8}, **private)
    pausing.wait()
    assert files_with(tmp_path, "PRIVATE KEY") == []
    assert running.end() == 0
    assert files_with(tmp_path, "PRIVATE KEY") == []
    assert list(Path(private["TMPDIR"]).iterdir()) == []
    assert list(Path(private["HOME"]).iterdir()) == []
    run(home, **private)
    first, second = [item.user_data for item in sim.ever if isinstance(item, Droplet)]
    assert "PRIVATE KEY" in first
    assert first != second
    keys = [record.body["public_key"] for record in sim.requests if (record.method, record.path) == KEY_UPLOAD]
    assert len(set(keys)) == 2


KEY_UPLOAD = ("POST", "/v2/account/keys")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
def test_readable_configuration_is_warned_about(home: Home, sim: Simulator, mode: int) -> None:
    add_volume(sim, "data")
    (home.directory / "conf.json").chmod(mode)
    done = run(home, "--dry-run")
    assert ("holds your token and others can read it: chmod 600 conf.json" in done.stderr) == (mode != 0o600)
    done = run(home, "--dry-run", DIGITALOCEAN_TOKEN=sim.token)  # then the file's does not matter
    assert done.stderr == ""


def test_images_are_their_owners_alone(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """Under any umask, at any moment."""
    volume = add_volume(sim, "data", size=12 << 20)
    pausing = PausingPython(tmp_path, 6 << 20)
    sim.faults.add(pausing.fault)
    seen: dict[str, int] = {}
    wide_open = ("sh", "-c", 'umask 000; exec "$@"', "sh")
    done: list[Any] = []
    limits = {**QUICK, "STALL_LIMIT": 8}
    runner = threading.Thread(target=lambda: done.append(home.run(wrapper=wide_open, constants=limits, expect=None)))
    runner.start()
    while runner.is_alive():
        look_at_modes(home.backups, seen)
        runner.join(0.01)
    assert done[0].returncode == 0, done[0].stderr
    with volume.path.open("r+b") as file:
        file.write(b"changed")
    home.run(wrapper=wide_open, constants=QUICK)
    look_at_modes(home.backups, seen)
    assert {"backups", ".dosvob", "data", "data.partial", "data.state", "data.state.new", "lock"} <= set(seen)
    assert {name: oct(mode) for name, mode in seen.items() if mode & 0o077} == {}


def look_at_modes(directory: Path, seen: dict[str, int]) -> None:
    """Note all permissions ever seen of each file."""
    for place, directories, files in os.walk(directory):
        for path in (Path(place), *(Path(place, name) for name in (*directories, *files))):
            with contextlib.suppress(OSError):  # it was renamed or removed just now
                seen[path.name] = seen.get(path.name, 0) | stat.S_IMODE(path.stat().st_mode)


# -- TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody vouches for, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(encoded + built.public_bytes(serialization.Encoding.PEM))
    return path


class QuietServer(ThreadingHTTPServer):
    """Takes it as it comes if a client ends the handshake."""

    def handle_error(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def https(certificate: Path) -> Iterator[tuple[str, list[str]]]:
    """A server with that certificate, and the Authorization headers that it got."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        """Refuses everything."""

        def do_GET(self) -> None:
            """Remember the token."""
            seen.append(str(self.headers["Authorization"]))
            self.send_error(401)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with QuietServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()
        thread.join()


def test_certificate_is_verified(home: Home, sim: Simulator, certificate: Path, https: tuple[str, list[str]]) -> None:
    url, seen = https
    done = run(home, expect=1, DIGITALOCEAN_API_URL=url)
    assert len(done.stderr.splitlines()) == 1
    assert f"{url} has no certificate to be trusted: " in done.stderr
    assert seen == []
    run(home, expect=2, DIGITALOCEAN_API_URL=url, REQUESTS_CA_BUNDLE=str(certificate))
    assert set(seen) == {f"Bearer {sim.token}"}  # one that is trusted gets it


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://", "http://host:port", "ftp://127.0.0.1:9"])
def test_a_proxy_that_can_never_work(home: Home, sim: Simulator, proxy: str) -> None:
    """It is told at once, as what it is."""
    done = run(home, expect=2, HTTP_PROXY=proxy)
    assert "trying again" not in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "HTTPS_PROXY and ALL_PROXY in the environment" in done.stderr
    assert sim.requests == []


@pytest.mark.parametrize("is_there", [False, True])
def test_certificates_that_cannot_be_read(
    home: Home, tmp_path: Path, https: tuple[str, list[str]], is_there: bool
) -> None:
    """There is no such file, or none in it."""
    bundle = tmp_path / "bundle"
    if is_there:
        bundle.write_text("nothing")
    done = run(home, expect=2, DIGITALOCEAN_API_URL=https[0], REQUESTS_CA_BUNDLE=str(bundle))
    assert "trying again" not in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE in the environment" in done.stderr
    assert https[1] == []


def test_only_a_proxy_leads_out(home: Home, sim: Simulator) -> None:
    """The API is reached, and no droplet: a second one is not bought."""
    add_volume(sim, "data")
    sim.faults.add(Fault("ssh-refused", times=FOREVER))
    done = run(home, expect=1, HTTP_PROXY=sim.url, constants={"SSH_LIMIT": 0.5})
    assert "SSH uses none: let port 22 go out" in done.stderr
    assert len([item for item in sim.ever if item.kind == "droplet"]) == 1


@pytest.mark.parametrize("url", ["http://api.digitalocean.com", "ftp://127.0.0.1", "api.digitalocean.com", "https://"])
def test_token_does_not_travel_in_the_clear(home: Home, url: str) -> None:
    done = home.run(expect=2, DIGITALOCEAN_API_URL=url)
    assert "it must be an https:// address" in done.stderr


# -- what comes from the API


def test_name_of_a_volume_is_not_a_path(home: Home, sim: Simulator) -> None:
    """It is not backed up, and said; the others are."""
    names = ["../escaped", "/tmp/escaped", ".dosvob", "a/b", "a\0b", "", "Data", "data.partial"]
    evil = [sim.add_volume(f"evil-{number}") for number in range(len(names))]
    good = add_volume(sim, "good")
    for volume, name in zip(evil, names, strict=True):
        volume.name = name
    done = run(home, expect=1)
    assert done.stderr.count("is not a name that a volume can have") == len(names)
    assert_backed_up(home, good)
    assert sorted(path.name for path in home.backups.iterdir()) == [".dosvob", "good"]
    assert sorted(path.name for path in home.directory.iterdir()) == ["backups", "conf.json"]
    assert not Path("/tmp/escaped").exists()
    assert_nothing_left(sim)


def test_texts_of_the_api_do_not_steer_the_terminal(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    text = "oops\x1b]0;title\x07\x1b[2J\u202e\x9b31m"
    sim.faults.add(Fault("error", method="POST", path="^/v2/droplets$", status=422, text=text, times=3))
    done = run(home, "--verbose", expect=1)
    assert "oops" in done.stderr
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr)


SEVERAL_LINES = """#!/usr/bin/python3
import struct, sys, time
words = b"nothing\\nother: backed up\\r\\n  at all"
sys.stdout.buffer.write(struct.pack(">BII", {kind}, 0, len(words)) + words)
sys.stdout.flush()
time.sleep(5)
"""


def test_what_the_droplet_says_stays_on_one_line(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """It must not write lines of its own into a log."""
    add_volume(sim, "data")
    script = tmp_path / "python3"
    script.write_text(SEVERAL_LINES.format(kind=dosvob.FAILED))
    script.chmod(0o700)
    sim.faults.add(Fault("python", text=str(script)))
    done = run(home, expect=1)
    (line,) = done.stderr.splitlines()
    assert line.endswith("error: data: the droplet cannot go on: nothing other: backed up at all")
