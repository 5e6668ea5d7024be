"""A push makes a device what a source is: with the real agent over pipes, on connections that break, and on lies."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import MIB, same, write_at
from crash_support import PAGE, AgentProcess, scatter, set_constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dosvob
from dosvob import CHUNK, PAGES, SHORT_SIZE

NARROW = 4096  # bytes; no pipe holds less
PATIENCE = 90.0  # seconds after which what stands still is taken to stand still for ever
COLLIDING = tuple(number.to_bytes(8, "little") * (PAGE // 8) for number in (40620, 118918))
"""Two pages that differ, and are alike in their short digests."""


class Pushed:
    """A push of a file to another one, and what came of it; `cuts` are bytes received after which connections break."""

    def __init__(
        self,
        source: Path,
        device: Path,
        *,
        is_empty: bool = False,
        cuts: list[int] | None = None,
        connect: Callable[[Path, Any], Any] | None = None,
    ) -> None:
        self.warnings: list[str] = []
        self.parts: list[tuple[tuple[int, int], ...]] = []  # of each connection
        self.received: list[int] = []
        streams: list[AgentProcess] = []
        left = list(cuts or [])
        with dosvob.Source.of_file(source) as contents, tempfile.TemporaryFile() as digests:
            chunks = device.stat().st_size // CHUNK
            self.push = dosvob.Push(contents.chunks, chunks, digests, self.warnings.append, is_empty=is_empty)

            def start() -> dosvob.AgentStream:
                parts = self.push._parts()
                self.parts.append(parts)
                make = connect or (
                    lambda device, parts: AgentProcess(
                        device, 0, dosvob.WINDOW, parts=parts, most=200, cut=left.pop(0) if left else None
                    )
                )
                streams.append(make(device, parts))
                return cast("dosvob.AgentStream", streams[-1])

            def kill() -> None:
                for stream in streams:
                    stream.kill()

            timer = threading.Timer(PATIENCE, kill)
            timer.start()
            try:
                dosvob.converse(start, self.push, lambda text: None, lambda received: None, lambda _: False)
            finally:
                timer.cancel()
                self.received = [stream.received for stream in streams]
        assert same(source, device)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """What the device has at first."""
    path = tmp_path / "device"
    scatter(path, 1, 24 * MIB)
    return path


def changed(device: Path, *offsets: int) -> Path:
    """A source that is what the device is, but for a page at each of these places."""
    source = device.with_name("source")
    source.write_bytes(device.read_bytes())
    for number, offset in enumerate(offsets):
        write_at(source, offset, random.Random(number).randbytes(PAGE))
    return source


def new(device: Path) -> None:
    """Make it a device that was created empty."""
    size = device.stat().st_size
    os.truncate(device, 0)
    os.truncate(device, size)


def test_all_is_sent_to_an_empty_device_and_then_compared(device: Path) -> None:
    source = changed(device)
    new(device)
    done = Pushed(source, device, is_empty=True)
    assert done.parts == [(), ((0, 24),)]
    assert not done.warnings


def test_only_pages_that_differ_are_sent_and_only_their_chunks_compared_again(device: Path) -> None:
    source = changed(device, 0, 5 * PAGE, 20 * MIB)
    done = Pushed(source, device)
    assert done.parts == [((0, 24),), ((0, 1), (20, 21))]
    assert 3 * PAGE < done.push.sent < 3 * PAGE + 500
    assert done.received[1] < 500
    assert not done.warnings


def test_nothing_is_sent_if_nothing_differs(device: Path) -> None:
    done = Pushed(changed(device), device)
    assert (done.push.sent, len(done.parts)) == (0, 1)


def test_zeros_are_written_and_not_sent(device: Path) -> None:
    """Over a chunk, and over a page of one that is otherwise the same."""
    write_at(device, 7 * MIB, os.urandom(3 * MIB))
    source = changed(device)
    write_at(source, 7 * MIB, bytes(MIB))
    write_at(source, 8 * MIB + PAGE, bytes(PAGE))
    done = Pushed(source, device)
    assert done.push.sent < 500


def test_source_that_is_shorter_is_followed_by_zeros(device: Path) -> None:
    """As where a new volume is larger: the contents have all chunks."""
    source = device.with_name("source")
    source.write_bytes(device.read_bytes())
    with dosvob.Source.of_file(source) as contents, tempfile.TemporaryFile() as digests:
        os.truncate(device, 30 * MIB)
        write_at(device, 27 * MIB, b"left over")

        def chunks() -> Iterator[tuple[int, bytes]]:
            yield from contents.chunks()
            yield from ((index, dosvob.ZERO_CHUNK) for index in range(24, 30))

        push = dosvob.Push(chunks, 30, digests, lambda text: None, is_empty=False)
        dosvob.converse(
            lambda: cast("dosvob.AgentStream", AgentProcess(device, 0, dosvob.WINDOW, parts=push._parts())),
            push,
            lambda text: None,
            lambda received: None,
            lambda _: False,
        )
    assert device.read_bytes() == source.read_bytes() + bytes(6 * MIB)


def test_short_digests_that_collide(tmp_path: Path) -> None:
    """Alone in a chunk, and beside a page that is seen to differ."""
    device, source = tmp_path / "device", tmp_path / "source"
    other = os.urandom(PAGE)
    device.write_bytes((COLLIDING[0] + bytes(CHUNK - PAGE)) * 2)
    source.write_bytes(COLLIDING[1] + bytes(CHUNK - PAGE) + COLLIDING[1] + other + bytes(CHUNK - 2 * PAGE))
    done = Pushed(source, device)
    assert done.parts == [((0, 2),), ((0, 2),), ((1, 2),)]


def test_gaps_between_what_is_compared_again_are_few(device: Path) -> None:
    with tempfile.TemporaryFile() as digests:
        push = dosvob.Push(lambda: iter(()), 1_000_000, digests, lambda text: None, is_empty=False)
    push._right[:] = b"\x01" * 1_000_000
    for index in range(0, 1_000_000, 100):
        push._right[index] = 0
    assert push._parts() == ((0, 999_901),)
    push._right[:] = b"\x01" * 1_000_000
    push._right[5] = push._right[700_000] = 0
    assert push._parts() == ((5, 6), (700_000, 700_001))


# -- connections that break


def test_connections_that_break_over_and_over(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dosvob, "ATTEMPTS", 100)
    device.write_bytes(os.urandom(24 * MIB))
    source = changed(device, *range(PAGE, 24 * MIB, MIB))
    done = Pushed(source, device, cuts=[600, 3000, 5000, 7000, 9000])
    assert len(done.parts) >= 6
    assert not done.warnings


def test_what_was_compared_is_not_compared_again(tmp_path: Path) -> None:
    device, source = tmp_path / "device", tmp_path / "source"
    device.write_bytes(os.urandom(64 * MIB))
    source.write_bytes(device.read_bytes())
    write_at(source, 60 * MIB, os.urandom(PAGE))
    done = Pushed(source, device, cuts=[1500])
    assert done.parts[1][0][0] > 10


@settings(deadline=None, database=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    seeds=st.tuples(st.integers(3, 99), st.integers(3, 99)), cuts=st.lists(st.integers(0, 9000)), empty=st.booleans()
)
def test_a_push_makes_a_device_what_a_source_is(seeds: tuple[int, int], cuts: list[int], empty: bool) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patches:
        patches.setattr(dosvob, "ATTEMPTS", 100)
        device, source = Path(directory, "device"), Path(directory, "source")
        for path, seed in zip((device, source), seeds, strict=True):
            scatter(path, seed, 6 * MIB)
        if empty:
            new(device)
        Pushed(source, device, is_empty=empty, cuts=cuts[:20])


def test_an_agent_waits_for_the_end_of_the_one_before_it(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What that still writes would not be on the device when it is compared."""
    set_constants(monkeypatch, HEARTBEAT=0.2)
    first = AgentProcess(device, 0, dosvob.WINDOW, parts=())
    with contextlib.closing(first):
        said = b""
        while dosvob.AGENT_MAGIC not in said:
            said += first.receive()
        second = AgentProcess(device, 0, dosvob.WINDOW, parts=())
        with contextlib.closing(second):
            said = b""
            while said.count(dosvob.framed(dosvob.ALIVE, 0)) < 10:
                said += second.receive()
            assert dosvob.AGENT_MAGIC not in said
            first.kill()
            while dosvob.AGENT_MAGIC not in said:
                said += second.receive()


# -- nothing stands still


@pytest.mark.parametrize("is_empty", [True, False])
@pytest.mark.parametrize("tight", [{}, {"WINDOW": 1, "QUEUED_FRAMES": 1, "READ_AHEAD": 1, "READERS": 1, "BATCH": 1}])
def test_no_deadlock_with_narrow_pipes(
    device: Path, monkeypatch: pytest.MonkeyPatch, tight: dict[str, int], is_empty: bool
) -> None:
    """Both pipes are full most of the time."""
    set_constants(monkeypatch, **tight)
    monkeypatch.setattr(dosvob, "ATTEMPTS", 1)
    source = changed(device)
    scatter(source, 2, 24 * MIB)
    if is_empty:
        new(device)
    Pushed(
        source,
        device,
        is_empty=is_empty,
        connect=lambda device, parts: AgentProcess(device, 0, dosvob.WINDOW, parts=parts, pipe=NARROW, most=5000),
    )


def test_an_agent_takes_what_it_is_to_write_while_nobody_reads_what_it_says(tmp_path: Path) -> None:
    """Else whoever sends would wait for it, and it for them."""
    device = tmp_path / "device"
    device.write_bytes(os.urandom(200 * MIB))
    stream = AgentProcess(device, 0, dosvob.WINDOW, parts=((0, 200),), pipe=NARROW)
    timer = threading.Timer(PATIENCE, stream.kill)
    timer.start()
    with contextlib.closing(stream):
        assert stream.receive()
        for _ in range(2000):  # their answers take 2 MB
            stream.send(dosvob.packed_command(dosvob.COMPARE, 1, 0, 0))
        data = os.urandom(CHUNK)
        frame = dosvob.framed(dosvob.RAW, 0, b"\xff" * (PAGES // 8), data)
        for index in range(50):
            stream.send(dosvob.packed_command(dosvob.WRITE, index, 1, dosvob.ALL_PAGES) + frame)
        stream.send(dosvob.packed_command(99, 0, 0, 0) + dosvob.packed_command(dosvob.WRITE, 0, 1, 0) + bytes(9) * 100)
        stream.send(bytes(CHUNK) * 20)  # after its failure
        timer.cancel()
        assert timer.finished.is_set()
    with device.open("rb") as file:
        assert file.read(49 * MIB) == data * 49


# -- what is wrong


def edit(source: str, body: str) -> Callable[[Path, Any], AgentProcess]:
    """Agents with something in their source that is another one's."""
    assert source in dosvob.AGENT

    def connect(device: Path, parts: Any) -> AgentProcess:
        return AgentProcess(device, 0, dosvob.WINDOW, parts=parts, edit=lambda text: text.replace(source, body))

    return connect


WRITES = "                self.write_pages(index, pages)\n"


def test_a_page_that_is_stored_wrong_is_sent_once_more(device: Path, tmp_path: Path) -> None:
    source = changed(device, 3 * MIB, 9 * MIB)
    mark = str(tmp_path / "mark")
    wrong = f"                os.path.exists({mark!r}) or os.pwrite(self.fd, b'!', index * CHUNK)\n"
    wrong += f"                index == 9 and open({mark!r}, 'w')\n"
    done = Pushed(source, device, connect=edit(WRITES, WRITES + wrong))
    assert done.warnings == [
        f"2 MiB are not what was written, the first one at byte {3 * MIB}; they are written once more"
    ]
    assert 4 * PAGE < done.push.sent < 4 * PAGE + 1000


def test_a_device_that_stores_nothing_is_given_up(device: Path) -> None:
    source = changed(device, 3 * MIB)
    nothing = edit(WRITES, WRITES.replace("self.write_pages", "(lambda *_: self.commands.read(9 + 32 + 4096))"))
    with pytest.raises(dosvob.DosvobError, match="also when written once more: DigitalOcean's fault"):
        Pushed(source, device, connect=nothing)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (dosvob.framed(dosvob.SHORT, 0, bytes(PAGES * SHORT_SIZE)), "a frame of the kind"),
        (dosvob.framed(dosvob.RAW, 0, bytes(40)), "a frame of the kind"),
        (dosvob.framed(dosvob.DIGEST, 0, bytes(32)) * 2, "0 of 2 was due|1 of 2 was due"),
        (dosvob.framed(dosvob.ZEROS, 0, struct.pack(">I", 3)), "announced 3 chunks"),
        (dosvob.framed(dosvob.DIGEST, 0, bytes(32)) + dosvob.framed(dosvob.SHORT, 0, b"few"), "a frame of the kind"),
        (dosvob.framed(dosvob.FAILED, 0, b"no"), "cannot go on: no"),
    ],
)
def test_a_droplet_that_lies(said: bytes, message: str) -> None:
    hello = dosvob.framed(dosvob.HELLO, 0, dosvob.AGENT_MAGIC, struct.pack(">Q?", 2 * CHUNK, True))
    stream: Any = SimpleNamespace(receive=iter([hello, said]).__next__, has_received=bool, send=len)
    with tempfile.TemporaryFile() as digests:
        source = [(index, bytes([index + 1]) * CHUNK) for index in range(2)]
        push = dosvob.Push(lambda: iter(source), 2, digests, lambda text: None, is_empty=False)
        with pytest.raises(dosvob.BadAgent, match=message):
            push.talk(stream, lambda: None)


def test_announcements_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dosvob, "MOST_AHEAD", 100)
    chunks = 10_000
    hello = dosvob.framed(dosvob.HELLO, 0, dosvob.AGENT_MAGIC, struct.pack(">Q?", chunks * CHUNK, True))
    said = (dosvob.framed(dosvob.DIGEST, index, bytes(32)) for index in range(chunks))
    stream: Any = SimpleNamespace(receive=lambda: next(said, b""), has_received=lambda: True, send=len)
    with tempfile.TemporaryFile() as digests:
        source = ((index, b"x" * CHUNK) for index in range(chunks))
        push = dosvob.Push(lambda: source, chunks, digests, lambda text: None, is_empty=False)
        first = iter([hello])
        stream.receive = lambda: next(first, None) or next(said)
        with pytest.raises(dosvob.BadAgent, match="announces more than it may"):
            push.talk(stream, lambda: None)


# -- memory, and a stop


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    """However much differs."""
    device, source = tmp_path / "device", tmp_path / "source"
    device.write_bytes(os.urandom(PAGE) * (200 * PAGES))
    source.write_bytes(os.urandom(PAGE) * (200 * PAGES))
    most = 0
    command = dosvob.Push._command

    def note(push: dosvob.Push, *what: int) -> None:
        nonlocal most
        most = max(most, len(push._pending))
        command(push, *what)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dosvob.Push, "_command", note)
        Pushed(source, device)
    assert 16 < most <= dosvob.Push.MOST_PENDING + dosvob.BATCH


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_stop_is_heeded_between_zeros(is_empty: bool) -> None:
    """Of which there may be many, with nothing to be sent nor to come in."""
    taken = []

    def source() -> Iterator[tuple[int, bytes]]:
        for index in range(1000):
            taken.append(index)
            yield index, dosvob.ZERO_CHUNK

    def stop() -> None:
        raise dosvob.Interrupted

    said = dosvob.framed(dosvob.HELLO, 0, dosvob.AGENT_MAGIC, struct.pack(">Q?", 1000 * MIB, True))
    said += dosvob.framed(dosvob.ZEROS, 0, struct.pack(">I", 1000)) * (not is_empty)
    stream: Any = SimpleNamespace(receive=lambda: said, has_received=lambda: False, send=len)
    with tempfile.TemporaryFile() as digests:
        push = dosvob.Push(source, 1000, digests, lambda text: None, is_empty=is_empty)
        with pytest.raises(dosvob.Interrupted):
            push.talk(stream, stop)
    assert len(taken) < 100
