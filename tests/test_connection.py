"""Trouble with SSH: a connection that breaks or stalls is replaced, and what had arrived is not fetched again."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import paramiko
import pytest
from conftest import MIB, Home, sampled
from simulator import FOREVER, Droplet, Fault, Simulator
from trouble_support import (
    FAST,
    PausingPython,
    Running,
    account,
    add_volume,
    assert_backed_up,
    assert_nothing_left,
    run,
    start,
    until,
)

import dosvob

pytestmark = pytest.mark.small

SIZE = 12 * MIB  # of the content, which is random
OVERHEAD = 1.06  # SSH's, TCP's and the agent's own


def bytes_sent(sim: Simulator) -> int:
    """What all droplets so far have sent to us."""
    return sum(item.bytes_sent for item in sim.ever if isinstance(item, Droplet))


CUTS = (1, 300, 1000, 2000, 4000, 10_000, 50_000, 300_000, *(n * MIB + n * 1234 for n in range(1, 12)))


def test_connection_is_cut_after_any_number_of_bytes(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    window = {"LEAST_WINDOW": MIB, "MOST_WINDOW": MIB}  # what is under way is lost with the connection
    for cut in sampled(pytestconfig, CUTS, 4):
        with account(tmp_path / str(cut)) as (sim, home):
            volume = add_volume(sim, "data", size=SIZE)
            sim.faults.add(Fault("ssh-cut", bytes=cut))
            running = start(home, constants=window)
            assert running.end() == 0, running.output
            assert "connecting again" in running.output or cut <= 10_000  # so little may be sent before the agent is up
            assert_backed_up(home, volume)
            assert_nothing_left(sim)
            assert len([item for item in sim.ever if item.kind == "droplet"]) == 1
            assert bytes_sent(sim) < SIZE * OVERHEAD + 3 * MIB, cut  # a window, and a chunk that is not all there


def test_later_sync_is_cut(home: Home, sim: Simulator) -> None:
    """One that goes through the journal."""
    volume = add_volume(sim, "data", offset=0, size=MIB)
    run(home)
    before = bytes_sent(sim)
    with volume.path.open("r+b") as file:
        file.write(random.Random("new").randbytes(3 * MIB))
    sim.faults.add(Fault("ssh-cut", bytes=300_000, times_on_droplet=2))
    assert "connecting again" in run(home).stderr
    assert_backed_up(home, volume)
    assert bytes_sent(sim) - before < 3 * MIB * OVERHEAD + 2 * MIB


def test_any_number_of_connections_that_get_on(home: Home, sim: Simulator) -> None:
    """Only those in a row that bring nothing are counted.

    Such as one of which a slow machine had read too little when it was cut: what is not read by then is lost.
    """
    volume = add_volume(sim, "data", size=SIZE)
    sim.faults.add(Fault("ssh-cut", bytes=5 * MIB // 2, times_on_droplet=FOREVER))
    done = run(home, constants={"ATTEMPTS": 4})
    assert done.stderr.count("connecting again") >= 4
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_connections_that_bring_nothing_are_given_up(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data", offset=0, size=16 * MIB)  # no zeros, of which many fit into what comes through
    sim.faults.add(Fault("ssh-cut", bytes=200_000, times_on_droplet=FOREVER))
    done = run(home, expect=1, constants={"ATTEMPTS": 3})
    assert done.stderr.count("connecting again") == 2
    assert "error: data: the connection to the droplet " in done.stderr
    assert_nothing_left(sim)


@pytest.mark.parametrize("how", ["agent", "network", "cut"])
def test_what_had_arrived_is_not_fetched_again(home: Home, sim: Simulator, tmp_path: Path, how: str) -> None:
    """Half of the data has arrived when the agent falls silent, the network does, or the connection breaks."""
    volume = add_volume(sim, "data", size=SIZE)
    pausing = PausingPython(tmp_path, 6 * MIB)
    sim.faults.add(pausing.fault)
    running = start(home, constants={"STALL_LIMIT": 8})
    pausing.wait()
    partial = home.image("data.partial")
    until(lambda: partial.exists() and partial.stat().st_blocks * 512 >= 5 * MIB)
    until(lambda: bytes_sent(sim) >= 6 * MIB)
    arrived = bytes_sent(sim)
    droplet = sim.droplets[0]
    if how == "network":
        droplet.stall()
    if how == "cut":
        droplet.cut()
    running.wait_for("connecting again")
    droplet.resume()
    assert running.end() == 0, running.output
    assert ("was silent for 8 s" in running.output) == (how != "cut")
    assert_backed_up(home, volume)
    assert_nothing_left(sim)
    assert bytes_sent(sim) - arrived < (SIZE - 5 * MIB) * OVERHEAD


def test_what_had_arrived_is_not_fetched_again_if_it_is_announced_late(tmp_path: Path) -> None:
    """By then what was missing before it may have come."""
    chunks = [random.Random(number).randbytes(MIB) for number in range(3)]
    digests = [dosvob.chunk_digest(dosvob.page_digests(chunk)) for chunk in chunks]
    paths = dosvob.ImagePaths(tmp_path, "data")
    paths.metadata.mkdir()
    hello = dosvob.framed(dosvob.HELLO, 0, dosvob.AGENT_MAGIC, (3 * MIB).to_bytes(8, "big"), b"\1")
    announced = [dosvob.framed(dosvob.DIGEST, index, digest) for index, digest in enumerate(digests)]
    content = [dosvob.framed(dosvob.RAW, index, b"\xff" * 32, chunk) for index, chunk in enumerate(chunks)]
    asked: list[int] = []

    def talk(*frames: bytes) -> None:
        coming = iter(frames)

        def receive() -> bytes:
            if frame := next(coming, b""):
                return frame
            raise dosvob.ConnectionLost("it is cut")

        def send(data: bytes) -> None:
            commands = struct.iter_unpack(dosvob.COMMAND, data)
            asked.extend(index for kind, index, *_ in commands if kind == dosvob.SEND)

        pull.talk(SimpleNamespace(receive=receive, send=send, waits=1.0), lambda: None)

    snapshot = dosvob.Snapshot("id", "data", "fra1", 3 * MIB, "2026-01-01T00:00:00Z")
    with contextlib.closing(dosvob.Update(paths, snapshot, dosvob.Keep(), print)) as update:
        pull = dosvob.Pull(update)
        with pytest.raises(dosvob.ConnectionLost):
            talk(hello, *announced, content[1])
        talk(hello, announced[0], content[0], *announced[1:], content[2])
        assert pull.is_done
        assert asked == [0, 1, 2, 0, 2]
        assert not update.early


def test_what_has_come_is_read_in_order_to_its_end() -> None:
    received = dosvob.Received()
    with pytest.raises(paramiko.buffered_pipe.PipeTimeout):
        received.read(MIB, 0.01)
    assert not received.read_ready()
    for piece in (b"ab", b"c", b"def"):
        received.feed(piece)
    received.close()
    assert received.read_ready()
    assert [received.read(MIB, 1) for _ in range(5)] == [b"ab", b"c", b"def", b"", b""]


# -- the start of an agent


IMPATIENT = {"SSH_TIMEOUT": 5}


def test_connection_that_hears_nothing_is_made_anew(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """Before the droplet counts as being up."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("ssh-deaf", times_on_droplet=2))
    assert run(home, constants=IMPATIENT).stderr == ""
    assert_backed_up(home, volume)
    assert_nothing_left(sim)
    assert logins(tmp_path) == 3
    assert len([item for item in sim.ever if item.kind == "droplet"]) == 1


@pytest.mark.parametrize("droplets", [1, FOREVER])
def test_droplet_that_hears_nothing_on_any_connection_is_given_up(home: Home, sim: Simulator, droplets: int) -> None:
    """Another one may do; if it does not, that is the end."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("ssh-deaf", times=droplets, times_on_droplet=FOREVER))
    done = run(home, expect=0 if droplets == 1 else 1, constants={**IMPATIENT, "ATTEMPTS": 2})
    assert "warning: the connection to the droplet broke: no answer; making another one" in done.stderr
    if droplets == 1:
        assert_backed_up(home, volume)
    else:
        told = "error: nothing can be done .*, a second one too: the connection to the droplet broke"
        assert re.search(told, done.stderr)
    assert_nothing_left(sim)


@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
def test_path_that_loses_large_packets(home: Home, sim: Simulator) -> None:
    """As a tunnel may: it is logged in, and then the large ones are lost, both ways. It takes seconds to notice."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("small-path", bytes=1400))
    done = run(home)
    assert "connecting again" not in done.stdout + done.stderr
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def start_deaf(home: Home, sim: Simulator, reconnect: float = 7) -> tuple[Running, Droplet]:
    """A run whose droplet is up, and hears nothing of the agent that is being started there."""
    sim.faults.add(Fault("delay", method="POST", path="/actions$", seconds=5))  # it is attached after that
    running = start(home, constants={**IMPATIENT, "ATTEMPTS": 2, "RECONNECT_LIMIT": reconnect})
    running.wait_for(" is up at ")
    droplet = sim.droplets[0]
    droplet.stall()
    return running, droplet


def test_agent_that_is_never_started_is_asked_for_on_another_connection(
    home: Home, sim: Simulator, tmp_path: Path
) -> None:
    volume = add_volume(sim, "data")
    running, droplet = start_deaf(home, sim, reconnect=30)
    running.wait_for("connecting again")
    droplet.resume()
    assert running.end() == 0, running.output
    assert running.output.count("the agent could not be started") == 1
    assert_backed_up(home, volume)
    assert_nothing_left(sim)
    assert logins(tmp_path) == 2


def test_agent_that_is_never_started_on_any_connection_is_given_up(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    running, _ = start_deaf(home, sim)
    assert running.end() == 1
    assert "the agent could not be started" in running.output
    assert "error: data: no connection to the droplet" in running.output
    assert_nothing_left(sim)


def test_signal_while_an_agent_is_being_started(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    running, _ = start_deaf(home, sim)
    running.wait_for("the agent could not be started")
    running.signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGTERM
    assert_nothing_left(sim)
    assert running.output.count("connecting again") == 1  # the one that was being made is not followed by others
    assert "error: " not in running.output


def test_signal_while_a_droplet_hears_nothing(home: Home, sim: Simulator, tmp_path: Path) -> None:
    add_volume(sim, "data")
    sim.faults.add(Fault("ssh-deaf", times_on_droplet=FOREVER))
    running = start(home, constants=IMPATIENT)
    until(lambda: logins(tmp_path))
    running.signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGTERM
    assert_nothing_left(sim)
    assert logins(tmp_path) <= 2
    assert "error: " not in running.output


def test_one_connection_serves_all_volumes(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """One after the other, for a first backup goes alone; a check would have one of its own beside the next one."""
    home.configure(check="none")
    volumes = [add_volume(sim, name) for name in ("data", "logs", "mail")]
    run(home)
    assert_backed_up(home, *volumes)
    assert logins(tmp_path) == 1


def test_after_an_agent_that_ended_the_next_one_gets_another_connection(
    home: Home, sim: Simulator, tmp_path: Path
) -> None:
    """For the agent's end may be that of the connection, of which paramiko tells later; or it may not, as here."""
    volume = add_volume(sim, "data")
    script = tmp_path / "python3"
    script.write_text(f'#!/bin/sh\nmkdir {tmp_path}/begun && exit 3\nexec /usr/bin/python3 "$@"\n')
    script.chmod(0o700)
    sim.faults.add(Fault("python", text=str(script)))
    assert "the connection to the droplet ended; connecting again" in run(home).stderr
    assert_backed_up(home, volume)
    assert_nothing_left(sim)
    assert logins(tmp_path) == 2


def logins(directory: Path) -> int:
    """How often somebody has logged in to a droplet, by the logs of sshd."""
    return "".join(path.read_text() for path in sshd_logs(directory)).count("Accepted publickey for root ")


def sshd_logs(directory: Path) -> list[Path]:
    """What sshd has written on the droplets of the simulator that is in a directory."""
    return list(directory.glob("cloud/*/droplet-*.log"))


# -- the beginning


def test_ssh_comes_late(tmp_path: Path) -> None:
    """The droplet is active before it has an address, and has one before it takes connections."""
    late = replace(FAST, boot_seconds=0.5, address_seconds=0.5, ssh_seconds=1.5)
    with account(tmp_path / "account", late) as (sim, home):
        volume = add_volume(sim, "data")
        run(home)
        assert_backed_up(home, volume)
        assert_nothing_left(sim)


# -- somebody else answers


def test_host_key_of_another_kind(home: Home, sim: Simulator, tmp_path: Path) -> None:
    add_volume(sim, "data")
    sim.faults.add(Fault("wrong-host-key"))
    assert_refused(run(home, expect=1).stderr, sim, tmp_path, "offers no host key of the kind ecdsa-sha2-nistp256")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("Ciphers chacha20-poly1305@openssh.com", "offers no cipher that dosvob uses (aes128-gcm@openssh.com, "),
        ("KexAlgorithms sntrup761x25519-sha512@openssh.com", "offers no key exchange that dosvob uses ("),
        ("MACs umac-64@openssh.com\nCiphers aes128-ctr", "offers no MAC that dosvob uses (hmac-sha2-256, "),
    ],
)
def test_hardened_server(home: Home, sim: Simulator, tmp_path: Path, line: str, what: str) -> None:
    """It is told at once what its sshd does not offer; nobody stands between."""
    add_volume(sim, "data")
    sim.faults.add(Fault("hardened", text=line))
    assert_refused(run(home, expect=1, constants={"STRANGER_LIMIT": 3600}).stderr, sim, tmp_path, what)


def test_host_key_of_the_same_kind(tmp_path: Path) -> None:
    with account(tmp_path / "account", replace(FAST, ssh_seconds=2)) as (sim, home):
        add_volume(sim, "data")
        running = start(home, constants={"STRANGER_LIMIT": 1})
        until(lambda: sim.droplets and sim.droplets[0].machine)
        machine = sim.droplets[0].machine
        assert machine is not None
        key = machine.root / "run/sshd/ssh_host_ecdsa_key"
        assert key.exists()
        paramiko.ECDSAKey.generate(bits=256).write_private_key_file(str(key))
        assert running.end() == 1
        assert_refused(running.output, sim, tmp_path / "account", STRANGER)


STRANGER = "does not have the host key of the droplet that was created: somebody may stand between"


def assert_refused(errors: str, sim: Simulator, directory: Path, says: str) -> None:
    """It was said, nobody logged in or tried to, and nothing is left."""
    assert says in errors
    assert says == STRANGER or "between" not in errors
    assert "Traceback" not in errors
    logs = "".join(path.read_text() for path in sshd_logs(directory))
    assert "Server listening" in logs  # it is sshd's own log, in which a login would stand
    assert "root" not in logs
    assert "Accepted" not in logs
    assert_nothing_left(sim)
