"""The conversation with the agent: a droplet that lies, streams that dribble, and whatever else can come in.

Only a DosvobError may come of it, and the image may change only to what was announced and checked.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dis
import io
import itertools
import os
import queue
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import pytest
from conftest import MIB, Home, same, sampled, wait_for, write_at
from crash_support import PAGE, AgentProcess, back_up, recover, scatter, set_constants, snapshot_of, verify
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pythons import python_3
from simulator import FOREVER, Fault

import dosvob
from dosvob import (
    AGENT_MAGIC,
    ALIVE,
    CHUNK,
    COMMAND,
    COMPARE,
    DIGEST,
    DIGEST_SIZE,
    DROP,
    FAILED,
    FRAME,
    HELLO,
    PAGES,
    RAW,
    SEND,
    SHORT,
    SHORT_SIZE,
    ZERO_DIGEST,
    ZEROS,
    ZLIB,
    ZSTD,
)

NAME = "data"
PATIENCE = 90.0  # seconds after which what stands still is taken to stand still for ever
ALL = b"\xff" * (PAGES // 8)
NONE = bytes(PAGES // 8)
COMMAND_SIZE = struct.calcsize(COMMAND)
T = TypeVar("T")
TOLERATED = [HealthCheck.too_slow, HealthCheck.data_too_large]
fuzz = settings(deadline=None, database=None, print_blob=True, suppress_health_check=TOLERATED)


def frame(kind: int, index: int = 0, payload: bytes = b"") -> bytes:
    """A frame as the agent sends it."""
    return struct.pack(FRAME, kind, index, len(payload)) + payload


def hello(chunks: int) -> bytes:
    """The greeting for a device of so many chunks."""
    return frame(HELLO, 0, AGENT_MAGIC + struct.pack(">Q?", chunks * CHUNK, True))


def digest_of(chunk: bytes) -> bytes:
    """The digest of a chunk."""
    return dosvob.chunk_digest(dosvob.page_digests(chunk))


class Script:
    """A stream that has been written beforehand; it ends with ConnectionLost, or repeats `forever` for long."""

    def __init__(self, *data: bytes, forever: bytes = b"") -> None:
        self.received = 0
        self.pieces = 0
        self.sent = bytearray()
        self._end = time.monotonic() + PATIENCE
        self._data = itertools.chain(filter(None, data), itertools.repeat(forever) if forever else [])

    def send(self, data: bytes) -> None:
        """Nobody listens."""
        self.sent += data

    waits = 1.0

    def receive(self) -> bytes:
        """The next piece."""
        self.pieces += 1
        data = next(self._data, b"")
        if data and time.monotonic() < self._end:
            return data
        raise dosvob.ConnectionLost("the script has ended")

    def close(self) -> None:
        """There is nothing to close."""


class Target:
    """A backup of two chunks, the first one with data, the second one zeros; and one sync to it from a stream."""

    CHUNKS = 2

    def __init__(self, directory: Path) -> None:
        self.device = directory / "device"
        self.backups = directory / "backups"
        self.paths = dosvob.ImagePaths(self.backups, NAME)
        self.content = os.urandom(CHUNK) + bytes(CHUNK)
        self.backups.mkdir()
        self.paths.metadata.mkdir()
        self.device.write_bytes(self.content)
        self.paths.image.write_bytes(self.content)

    def sync(self, stream: dosvob.Stream) -> None:
        """One conversation, and the end of it if it comes to one; nothing else is repaired or repeated."""
        update = dosvob.Update(self.paths, snapshot_of(self.device, NAME), dosvob.Keep(), lambda text: None)
        with contextlib.closing(update):
            dosvob.Pull(update).talk(stream, lambda: None)
            update.finish()

    def check_untouched(self) -> None:
        """The image is as it was, also after a recovery."""
        assert self.paths.image.read_bytes() == self.content
        recover(self.backups, NAME)
        assert self.paths.image.read_bytes() == self.content


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A backup to be lied to."""
    return Target(tmp_path)


# What the droplet may say of chunk 0, which is different there: its digest, then the answer to COMPARE, then to SEND.
THEIRS = bytes(range(1, 256)) * (CHUNK // 255) + bytes(CHUNK % 255)
OURS_DIFFERS = hello(2) + frame(DIGEST, 0, digest_of(THEIRS))
ASKED = OURS_DIFFERS + frame(SHORT, 0, bytes(PAGES * SHORT_SIZE))
BOMB = zlib.compress(bytes(64 << 20), 9)

LIES = {
    "message of the day": (b"Welcome to Debian GNU/Linux 12\n", "not a frame"),
    "another size": (hello(3), "not one of"),
    "another magic": (frame(HELLO, 0, b"dosvob agent 9\n" + struct.pack(">Q?", 2 * CHUNK, True)), "not one of"),
    "no greeting": (frame(DIGEST, 0, bytes(DIGEST_SIZE)), "greeting"),
    "unknown kind": (hello(2) + frame(99), "not a frame"),
    "a length beyond all bounds": (hello(2) + struct.pack(FRAME, RAW, 0, 0xFFFFFFFF), "not a frame"),
    "a digest that is too short": (hello(2) + frame(DIGEST, 0, bytes(31)), "0 of 2 was due"),
    "a chunk left out": (hello(2) + frame(DIGEST, 1, bytes(DIGEST_SIZE)), "0 of 2 was due"),
    "a chunk twice": (OURS_DIFFERS + frame(DIGEST, 0, digest_of(THEIRS)), "1 of 2 was due"),
    "a chunk beyond the end": (
        OURS_DIFFERS + frame(DIGEST, 1, bytes(32)) + frame(DIGEST, 2, bytes(32)),
        "2 of 2 was due",
    ),
    "an index beyond all bounds": (hello(2) + frame(DIGEST, 0xFFFFFFFF, bytes(DIGEST_SIZE)), "0 of 2 was due"),
    "too many zeros": (hello(2) + frame(ZEROS, 0, struct.pack(">I", 3)), "announced 3 chunks"),
    "no zeros": (hello(2) + frame(ZEROS, 0, struct.pack(">I", 0)), "announced 0 chunks"),
    "zeros without a count": (hello(2) + frame(ZEROS, 0, b""), "announced 0 chunks"),
    "page digests unasked": (hello(2) + frame(SHORT, 0, bytes(PAGES * SHORT_SIZE)), "nobody asked"),
    "page digests twice": (ASKED + frame(SHORT, 0, bytes(PAGES * SHORT_SIZE)), "nobody asked"),
    "too few page digests": (OURS_DIFFERS + frame(SHORT, 0, b"few"), "nobody asked"),
    "pages of nowhere": (hello(2) + frame(RAW, 7, ALL + THEIRS), "nobody asked"),
    "pages before they were asked for": (OURS_DIFFERS + frame(RAW, 0, NONE), "nobody asked"),
    "pages of a chunk whose digest is that of nothing": (
        hello(2) + frame(DIGEST, 0, dosvob.chunk_digest(b"")) + frame(RAW, 0, NONE),
        "nobody asked",
    ),
    "pages without a bitmap": (ASKED + frame(RAW, 0, b"x"), "nobody asked"),
    "fewer bytes than pages": (ASKED + frame(RAW, 0, ALL + THEIRS[:-1]), "1048575 bytes, and not 1048576"),
    "more bytes than pages": (ASKED + frame(RAW, 0, b"\1" + bytes(31) + THEIRS), "1048576 bytes, and not 4096"),
    "pages that are not packed": (ASKED + frame(ZLIB, 0, ALL + b"not zlib"), "cannot be unpacked"),
    "a bomb": (ASKED + frame(ZLIB, 0, ALL + BOMB), "1048577 bytes, and not 1048576"),
    "a bomb in place of zeros": (ASKED + frame(ZLIB, 0, NONE + BOMB), "1 bytes, and not 0"),
    "pages that are not packed with zstd": (ASKED + frame(ZSTD, 0, ALL + b"not zstd"), "cannot be unpacked"),
    "pages that are packed and followed by others": (
        ASKED + frame(ZLIB, 0, ALL + zlib.compress(THEIRS, 1) + b"x"),
        "followed by something",
    ),
    "other pages than announced": (ASKED + frame(RAW, 0, ALL + bytes(CHUNK)), "does not have the digest"),
    "zeros in place of pages": (ASKED + frame(RAW, 0, NONE) + frame(RAW, 0, NONE), "does not have the digest"),
    "failure": (hello(2) + frame(FAILED, 0, b"OSError: \x1b[2Jgone"), "cannot go on"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_in_an_error_and_the_image_is_untouched(target: Target, lie: str) -> None:
    said, message = LIES[lie]
    with pytest.raises(dosvob.BadAgent, match=message):
        target.sync(Script(said))
    target.check_untouched()


@pytest.mark.parametrize("said", [b"", hello(2), OURS_DIFFERS, ASKED], ids=["nothing", "greeting", "digest", "digests"])
def test_a_droplet_that_falls_silent_is_a_connection_lost(target: Target, said: bytes) -> None:
    with pytest.raises(dosvob.ConnectionLost):
        target.sync(Script(said))
    target.check_untouched()


@pytest.mark.parametrize("forever", [frame(ALIVE), hello(2), frame(ALIVE) * 1000], ids=["alive", "hello", "many"])
def test_a_droplet_that_does_nothing_but_live_is_given_up(
    target: Target, monkeypatch: pytest.MonkeyPatch, forever: bytes
) -> None:
    monkeypatch.setattr(dosvob, "PROGRESS_LIMIT", 0.2)
    with pytest.raises(dosvob.ConnectionLost, match="says that it lives"):
        target.sync(Script(OURS_DIFFERS, forever=forever))
    target.check_untouched()


@pytest.mark.parametrize(
    ("kind", "payload"), [(ZEROS, struct.pack(">I", 1)), (DIGEST, dosvob.ZERO_DIGEST)], ids=["zeros", "digests"]
)
def test_a_droplet_that_keeps_a_chunk_back_and_announces_without_end_is_refused(
    target: Target, monkeypatch: pytest.MonkeyPatch, kind: int, payload: bytes
) -> None:
    """What it announces meanwhile is kept in memory."""
    set_constants(monkeypatch, MOST_AHEAD=1000)
    with target.device.open("r+b") as file:
        file.truncate(100_000 * CHUNK)
    said = [hello(100_000), frame(DIGEST, 0, digest_of(THEIRS))]
    said += [frame(kind, index, payload) for index in range(1, 100_000)]
    stream = Script(*said)
    with pytest.raises(dosvob.BadAgent, match="does not send"):
        target.sync(stream)
    assert stream.pieces <= 3 + dosvob.Pull.BOUND * 1000
    target.check_untouched()


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "pending"])
def test_digests_without_end_are_refused_while_a_chunk_is_kept_back(
    target: Target, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """Whether they are of what the image has, and are kept until the table is written, or are to be asked for."""
    set_constants(monkeypatch, WINDOW=100, MOST_AHEAD=1000)
    chunks = 100_000
    os.truncate(target.device, chunks * CHUNK)
    digest = ZERO_DIGEST if is_kept else digest_of(THEIRS)
    said = [hello(chunks), frame(DIGEST, 0, digest_of(THEIRS))]
    said += [frame(DIGEST, index, digest) for index in range(1, chunks)]
    stream = Script(*said)
    with pytest.raises(dosvob.BadAgent, match="does not send"):
        target.sync(stream)
    assert stream.pieces <= 3 + (dosvob.Pull.BOUND * 1000 if is_kept else 2 * 100)
    target.check_untouched()


def test_a_page_that_was_not_asked_for_before_one_that_was_does_not_get_into_the_image(target: Target) -> None:
    """It would be taken for the other one, which it is not: the digest would fit, and the image would not."""
    page = os.urandom(PAGE)
    theirs = target.content[:PAGE] + page + target.content[2 * PAGE : CHUNK]
    digests = dosvob.page_digests(theirs)
    shorts = b"".join(digests[at : at + SHORT_SIZE] for at in range(0, len(digests), DIGEST_SIZE))
    said = hello(2) + frame(DIGEST, 0, digest_of(theirs)) + frame(SHORT, 0, shorts)
    both = (3).to_bytes(PAGES // 8, "little")
    with pytest.raises(dosvob.BadAgent, match="nobody asked"):
        target.sync(Script(said + frame(RAW, 0, both + page + bytes(PAGE)) + frame(ZEROS, 1, struct.pack(">I", 1))))
    target.check_untouched()


def test_zeros_without_end_are_no_lie_if_nothing_is_kept_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_constants(monkeypatch, MOST_AHEAD=4)
    device, backups = tmp_path / "device", tmp_path / "backups"
    device.write_bytes(bytes(100 * CHUNK) + THEIRS)
    for _ in ("a first sync", "a later one"):
        back_up(backups, NAME, device)
        assert same(backups / NAME, device)


def test_a_wrong_page_is_asked_for_again_once_and_the_true_one_taken(target: Target) -> None:
    """Two pages may be alike in their short digests: then all of the chunk is asked for."""
    one_page = b"\1" + bytes(31)
    ours = dosvob.page_digests(target.content[:CHUNK])
    shorts = bytearray(b"".join(ours[at : at + SHORT_SIZE] for at in range(0, len(ours), DIGEST_SIZE)))
    shorts[0] ^= 1
    stream = Script(
        OURS_DIFFERS
        + frame(SHORT, 0, bytes(shorts))
        + frame(RAW, 0, one_page + THEIRS[:PAGE])
        + frame(RAW, 0, ALL + THEIRS)
        + frame(ZEROS, 1, struct.pack(">I", 1))
    )
    target.sync(stream)
    assert target.paths.image.read_bytes() == THEIRS + bytes(CHUNK)


# -- the whole script and a droplet whose python3 is another program

LIAR = """
import os, struct, sys, time
def frame(kind, index=0, payload=b""):
    os.write(1, struct.pack(">BII", kind, index, len(payload)) + payload)
def hello(size=1 << 30):
    frame({HELLO}, 0, {AGENT_MAGIC!r} + struct.pack(">Q?", size, True))
{body}
time.sleep(3600)
"""
PYTHON = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable
LIVE_LIES: dict[str, tuple[str, str]] = {
    "message of the day": ("print('Welcome to Debian', flush=True)", "not a frame"),
    "another size": ("hello(1 << 40)", "not one of 1 GiB"),
    "out of range": ("hello(); frame(2, 1 << 31, bytes(32))", "0 of 1024 was due"),
    "too long": ("hello(); os.write(1, struct.pack('>BII', 5, 0, 1 << 31))", "not a frame"),
    "wrong pages": (
        "hello(); frame(2, 0, b'x' * 32); frame(4, 0, bytes(1024)); frame(5, 0, b'\\xff' * 32 + b'x' * (1 << 20))",
        "does not have the digest",
    ),
    "a bomb": (
        (
            "import zlib; hello(); frame(2, 0, b'x' * 32); frame(4, 0, bytes(1024));"
            "frame(6, 0, b'\\xff' * 32 + zlib.compress(bytes(4 << 20)))"
        ),
        "1048577 bytes, and not 1048576",
    ),
    "silence": ("", "silent"),
    "life without end": ("hello()\nwhile True:\n  frame(8); time.sleep(0.05)", "says that it lives"),
    "the end": ("sys.exit('no more')", "no more"),
}
IMPATIENCE = {"silence": {"STALL_LIMIT": 1}, "life without end": {"PROGRESS_LIMIT": 1}}


def test_the_script_against_a_droplet_that_lies(home: Home, pytestconfig: pytest.Config) -> None:
    volume = home.simulator.add_volume(NAME)
    scatter(volume.path, 1, 1 << 30)
    write_at(volume.path, 0, b"so that there are pages to compare in the first chunk")
    home.run()
    before = home.image(NAME).stat()
    scatter(volume.path, 2, 1 << 30)
    for lie in sampled(pytestconfig, list(LIVE_LIES), 3):
        body, message = LIVE_LIES[lie]
        liar = LIAR.format(body=body, HELLO=HELLO, AGENT_MAGIC=AGENT_MAGIC)
        home.simulator.faults.clear()
        home.simulator.faults.add(Fault("python", times=FOREVER, text=f"{PYTHON} -c {shlex.quote(liar)}"))
        done = home.run(expect=1, constants={"ATTEMPTS": 2, **IMPATIENCE.get(lie, {})})
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        assert len(errors) == 1, done.stderr
        assert message in errors[0], done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        after = home.image(NAME).stat()
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino), lie
        assert home.simulator.alive() == []
    home.simulator.faults.clear()
    home.run()
    assert same(home.image(NAME), volume.path)


# -- whatever comes in


@fuzz
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_arbitrary_bytes_are_frames_or_refused(pieces: list[bytes]) -> None:
    parser = dosvob.FrameParser()
    with contextlib.suppress(dosvob.BadAgent):
        for piece in pieces:
            for kind, _, payload in parser.feed(piece):
                assert len(payload) <= dosvob.MOST_PAYLOAD[kind]


def some_frames() -> st.SearchStrategy[list[bytes]]:
    """Frames that could be the agent's, if in another order and with another content."""
    kinds = st.sampled_from(sorted(dosvob.MOST_PAYLOAD))
    usual = {
        HELLO: hello(2)[struct.calcsize(FRAME) :],
        DIGEST: digest_of(THEIRS),
        ZEROS: struct.pack(">I", 1),
        SHORT: bytes(PAGES * SHORT_SIZE),
        RAW: ALL + THEIRS,
        ZLIB: ALL + zlib.compress(THEIRS, 1),
        ZSTD: ALL + dosvob.Zstd().compress(THEIRS, 1),
        ALIVE: b"",
        FAILED: b"why",
    }
    indexes = st.sampled_from((0, 0, 0, 1, 1, 2, 0xFFFFFFFF))
    others = (st.binary(max_size=64), st.just(NONE), st.just(b"\1" + NONE[1:]))
    payloads = st.one_of(st.none(), st.none(), st.none(), *others)

    def build(kind: int, index: int, payload: bytes | None) -> bytes:
        return frame(kind, index, usual[kind] if payload is None else payload[: dosvob.MOST_PAYLOAD[kind]])

    return st.lists(st.builds(build, kinds, indexes, payloads), max_size=12)


@fuzz
@given(some_frames(), st.data())
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(frames)
    parser = dosvob.FrameParser()
    found = []
    position = 0
    while position < len(whole):
        size = data.draw(st.sampled_from((1, 3, 9, 100, 5000, 1 << 20)))
        if size < len(whole) // 500:  # not a million pieces
            size = len(whole)
        found += list(parser.feed(whole[position : position + size]))
        position += size
    assert [frame(*item) for item in found] == frames


@dataclass
class FakeAgent:
    """An honest agent in this process, whose `number`-th frame is changed by `lie`; it keeps what it announced."""

    content: bytes
    number: int
    lie: Callable[[bytes], bytes]

    def __post_init__(self) -> None:
        self.received = 0
        self._frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._commands = bytearray()
        self._count = 0
        self.announced: list[bytes] = []
        self._put(hello(len(self.content) // CHUNK)[struct.calcsize(FRAME) :], HELLO)
        for index in range(len(self.content) // CHUNK):
            digest = digest_of(self._chunk(index))
            if digest == ZERO_DIGEST:
                self._put(struct.pack(">I", 1), ZEROS, index)
            else:
                self._put(digest, DIGEST, index)

    def _chunk(self, index: int) -> bytes:
        return self.content[index * CHUNK : (index + 1) * CHUNK]

    def _put(self, payload: bytes, kind: int, index: int = 0) -> None:
        data = frame(kind, index, payload)
        self._frames.put(self.lie(data) if self._count == self.number else data)
        self._count += 1

    def send(self, data: bytes) -> None:
        """Answer at once."""
        self._commands += data
        while len(self._commands) >= COMMAND_SIZE:
            kind, index, _, bitmap = struct.unpack_from(COMMAND, self._commands)
            del self._commands[:COMMAND_SIZE]
            pages = dosvob.page_digests(self._chunk(index))
            if kind == COMPARE:
                starts = range(0, len(pages), DIGEST_SIZE)
                self._put(b"".join(pages[start : start + SHORT_SIZE] for start in starts), SHORT, index)
            elif kind == SEND:
                wanted = int.from_bytes(bitmap, "little")
                chunk = self._chunk(index)
                parts = [chunk[page * PAGE : (page + 1) * PAGE] for page in range(PAGES) if wanted >> page & 1]
                self._put(bitmap + b"".join(parts), RAW, index)

    waits = 1.0

    def receive(self) -> bytes:
        """The next frame."""
        if self._frames.empty():
            raise dosvob.ConnectionLost("nothing more to say")
        data = self._frames.get()
        self._note(data)
        return data

    def _note(self, data: bytes) -> None:
        """Keep what is announced by what is really sent, one digest per chunk."""
        with contextlib.suppress(dosvob.BadAgent):
            for kind, _, payload in dosvob.FrameParser().feed(data):
                if kind == DIGEST:
                    self.announced.append(payload)
                elif kind == ZEROS:
                    self.announced += [ZERO_DIGEST] * min(4, int.from_bytes(payload, "big"))


def lies() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """What may become of a frame on its way."""

    def flip(position: int, bit: int) -> Callable[[bytes], bytes]:
        def flipped(data: bytes) -> bytes:
            changed = bytearray(data)
            changed[position % len(data)] ^= 1 << bit
            return bytes(changed)

        return flipped

    return st.one_of(
        st.builds(flip, st.integers(0, 60), st.integers(0, 7)),
        st.builds(flip, st.integers(0, 2 << 20), st.integers(0, 7)),
        st.builds(lambda end: lambda data: data[:end], st.integers(0, 60)),
        st.builds(lambda junk: lambda data: data + junk, st.binary(max_size=40)),
        st.just(lambda data: data + data),
        st.just(lambda data: b""),
        st.just(lambda data: frame(ZEROS, 0, struct.pack(">I", 2))),
        st.just(lambda data: data),
    )


@settings(fuzz, max_examples=40)
@given(some_frames(), st.booleans())
def test_arbitrary_frames_change_nothing_but_by_their_digests(frames: list[bytes], greets: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        target = Target(Path(directory))
        check_fuzzed(target, Script(hello(2) * greets + b"".join(frames)), [])


@settings(fuzz, max_examples=60)
@given(st.integers(0, 6), lies())
def test_a_conversation_disturbed_in_one_place_changes_nothing_but_by_its_digests(
    number: int, lie: Callable[[bytes], bytes]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        target = Target(Path(directory))
        agent = FakeAgent(target.content[PAGE:CHUNK] + target.content[:PAGE] + THEIRS, number, lie)
        check_fuzzed(target, agent, agent.announced)


def check_fuzzed(target: Target, stream: dosvob.Stream, announced: list[bytes]) -> None:
    """Either there is an error and the image is as it was; or it has become what was announced."""
    try:
        target.sync(stream)
    except dosvob.DosvobError:
        target.check_untouched()
        return
    content = target.paths.image.read_bytes()
    digests = [digest_of(content[start : start + CHUNK]) for start in range(0, len(content), CHUNK)]
    if announced:
        assert digests == announced[: len(digests)]
    assert not any(verify(target.paths))


commands = st.builds(
    lambda kind, index, count, bitmap: struct.pack(COMMAND, kind, index, count, bitmap),
    st.sampled_from((0, DROP, COMPARE, SEND, 77)),
    st.one_of(st.integers(0, 3), st.integers(0, 0xFFFFFFFF)),
    st.integers(0, 1000),
    st.binary(min_size=PAGES // 8, max_size=PAGES // 8),
)


class Ended(BaseException):
    """Stands for the end of the agent's process."""


@settings(fuzz, max_examples=50)
@given(st.lists(st.one_of(commands, st.binary(max_size=60)), max_size=8))
def test_the_agent_answers_commands_or_says_that_it_cannot(given_commands: list[bytes]) -> None:
    def end(code: int) -> None:
        raise Ended

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patches:
        device = Path(directory, "device")
        device.write_bytes(THEIRS + bytes(CHUNK))
        patches.setattr(os, "_exit", end)
        agent = dosvob.Agent(str(device), ((0, 2),), 1, dosvob.Packer(True), io.BytesIO(b"".join(given_commands)), -1)
        agent.frames = queue.Queue()
        with device.open("rb") as file:
            agent.fd = file.fileno()
            with contextlib.suppress(Ended):
                agent.take_commands()

            def answer_all() -> None:
                for request in drained(agent.requests):
                    agent.answer(*request)

            agent.guarded(answer_all)
    kinds = [kind for frame in drained(agent.frames) for kind, _, _ in dosvob.FrameParser().feed(frame)]
    assert set(kinds) <= {SHORT, RAW, ZLIB, ZSTD, FAILED}
    assert FAILED not in kinds[:-1]


def drained(items: queue.Queue[T] | queue.SimpleQueue[T]) -> Iterator[T]:
    """All that is in a queue."""
    while not items.empty():
        yield items.get()


# -- nothing stands still


NARROW = 4096  # bytes; no pipe holds less
TIGHT = {"WINDOW": 1, "HELD": 1, "READ_AHEAD": 1, "QUEUED_FRAMES": 1, "READERS": 1, "BATCH": 1, "LOCAL": 1}


def tighten(patches: pytest.MonkeyPatch, tight: dict[str, int]) -> None:
    """Give the constants these values; LOCAL is how far the local image is read ahead."""
    values = dict(tight)
    patches.setattr(dosvob.ImageDigests, "READ_AHEAD", values.pop("LOCAL", dosvob.ImageDigests.READ_AHEAD))
    set_constants(patches, **values)


def in_time(streams: list[AgentProcess], work: Callable[[], object]) -> None:
    """Do the work; if it stands still, its agents are killed, with which it fails."""

    def kill() -> None:
        for stream in streams:
            stream.kill()

    timer = threading.Timer(PATIENCE, kill)
    timer.start()
    try:
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(dosvob, "ATTEMPTS", 1)
            work()
    finally:
        timer.cancel()


def back_up_tightly(directory: Path, *, most: int = 1 << 20, edit: Callable[[str], str] = str) -> None:
    """A first and a later sync over narrow pipes."""
    device, backups = directory / "device", directory / "backups"
    streams: list[AgentProcess] = []

    def connect(first: int, window: int) -> AgentProcess:
        streams.append(AgentProcess(device, first, window, most=most, edit=edit, pipe=NARROW))
        return streams[-1]

    for seed in (1, 2):
        scatter(device, seed, 6 * MIB)
        in_time(streams, lambda: back_up(backups, NAME, device, connect=connect))
        assert (backups / NAME).read_bytes() == device.read_bytes()
    assert len(streams) == 2, "a connection was lost: something stood still"


@pytest.mark.parametrize("tight", [{}, TIGHT, *({name: value, "HELD": 1} for name, value in TIGHT.items())], ids=str)
def test_no_deadlock_with_tight_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tight: dict[str, int]) -> None:
    tighten(monkeypatch, tight)
    back_up_tightly(tmp_path, most=5000)


def test_no_deadlock_with_one_byte_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tighten(monkeypatch, TIGHT)
    device, backups = tmp_path / "device", tmp_path / "backups"
    scatter(device, 1, 4 * MIB)
    back_up(backups, NAME, device)
    with device.open("r+b") as file:
        for offset in (0, MIB, MIB + 5 * PAGE, 3 * MIB):
            file.seek(offset)
            file.write(os.urandom(100))
    stream = AgentProcess(device, 0, dosvob.WINDOW, most=1, pipe=NARROW)
    in_time([stream], lambda: back_up(backups, NAME, device, connect=lambda first, window: stream))
    assert (backups / NAME).read_bytes() == device.read_bytes()


def test_no_deadlock_with_a_slow_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent is done long before what it sends is stored."""
    write, append, barrier = dosvob.SparseFile.write, dosvob.PatchFile.append, threading.Event()

    def write_slowly(file: dosvob.SparseFile, data: bytes | memoryview, offset: int) -> None:
        barrier.wait(0.005)
        write(file, data, offset)

    def append_slowly(writer: dosvob.PatchFile, patch: dosvob.Patch) -> int:
        barrier.wait(0.05)
        return append(writer, patch)

    monkeypatch.setattr(dosvob.SparseFile, "write", write_slowly)
    monkeypatch.setattr(dosvob.PatchFile, "append", append_slowly)
    back_up_tightly(tmp_path)


def test_no_deadlock_with_a_slow_agent(tmp_path: Path) -> None:
    read, slowly = "data = os.pread(", "time.sleep(0.05); data = os.pread("
    back_up_tightly(tmp_path, edit=lambda source: edited(source, read, slowly))


def test_the_scan_does_not_wait_for_data_to_be_sent(tmp_path: Path) -> None:
    """What lies behind a large change would be come to only when all of that was sent."""
    device, chunks = tmp_path / "device", 40
    device.write_bytes(os.urandom(chunks * CHUNK))
    agent = dosvob.Agent(str(device), ((0, chunks),), chunks + 1, dosvob.Packer(with_zstd=False), io.BytesIO(), -1)
    while not agent.frames.full():
        agent.put(RAW, 0)
    scan = threading.Thread(target=agent.scan, daemon=True)
    scan.start()
    scan.join(30)
    assert not scan.is_alive()
    kinds = [kind for kind, _, _ in dosvob.FrameParser().feed(b"".join(agent.announcements))]
    assert kinds == [HELLO, *[DIGEST] * chunks]


def test_room_for_other_chunks_is_made_when_the_data_has_been_sent(tmp_path: Path) -> None:
    """Not when it is queued, since announcements overtake what is: the scan would get ahead of it without a bound."""
    device = tmp_path / "device"
    device.write_bytes(os.urandom(4 * CHUNK))
    output = os.open(os.devnull, os.O_WRONLY)
    agent = dosvob.Agent(str(device), ((0, 4),), 2, dosvob.Packer(with_zstd=False), io.BytesIO(), output)
    threading.Thread(target=agent.scan, daemon=True).start()
    wait_for(lambda: list(agent.announced) == [0, 1])
    agent.answer(SEND, 0, dosvob.ALL_PAGES)
    assert list(agent.announced) == [0, 1]
    threading.Thread(target=agent.write_frames, daemon=True).start()
    wait_for(lambda: list(agent.announced) == [1, 2])


def test_what_is_done_ahead_and_then_not_wanted_is_not_waited_for() -> None:
    """The garbage collector may end it, amid anything."""
    going_on = threading.Event()
    results = dosvob.done_ahead(lambda item: item == 0 or going_on.wait(), range(9), 2, 2)
    assert next(results)
    closing = threading.Thread(target=results.close)  # type: ignore[attr-defined]
    closing.start()
    closing.join(10)
    has_waited = closing.is_alive()
    going_on.set()
    closing.join()
    assert not has_waited


def test_nothing_stands_still_with_all_chunks_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than the scan may be ahead, and than the agent holds, each of which is compared and sent."""
    set_constants(monkeypatch, WINDOW=72, HELD=20)
    device, backups = tmp_path / "device", tmp_path / "backups"
    chunks = dosvob.WINDOW + 20
    device.write_bytes(os.urandom(PAGE) * (chunks * PAGES))
    back_up(backups, NAME, device)
    with device.open("r+b") as file:
        for index in range(chunks):
            file.seek(index * CHUNK + index * PAGE)
            file.write(b"changed")
    stream = AgentProcess(device, 0, dosvob.WINDOW, most=3000, pipe=NARROW)
    in_time([stream], lambda: back_up(backups, NAME, device, connect=lambda first, window: stream))
    assert same(backups / NAME, device)
    assert stream.received < chunks * (PAGE + PAGES * SHORT_SIZE + 200)


COLLIDING = tuple(number.to_bytes(8, "little") * (PAGE // 8) for number in (40620, 118918))
"""Two pages that differ, and are alike in their short digests."""


def test_many_pages_that_collide_in_their_short_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each such chunk is sent twice, while the scan goes on."""
    one, other = COLLIDING
    assert one != other
    assert dosvob.page_digests(one)[:SHORT_SIZE] == dosvob.page_digests(other)[:SHORT_SIZE]
    set_constants(monkeypatch, WINDOW=8, HELD=8)
    device, backups = tmp_path / "device", tmp_path / "backups"
    chunks = 5 * dosvob.WINDOW

    def write(page: bytes) -> None:
        device.write_bytes(b"".join(page + os.urandom(PAGE) + bytes(CHUNK - 2 * PAGE) for _ in range(chunks)))

    write(one)
    back_up(backups, NAME, device)
    write(other)
    stream = AgentProcess(device, 0, dosvob.WINDOW, most=4096)
    in_time([stream], lambda: back_up(backups, NAME, device, connect=lambda first, window: stream))
    assert same(backups / NAME, device)
    assert stream.received > 2 * chunks * PAGE  # the random pages


def test_a_change_that_collides_in_all_short_digests_of_its_chunk_is_fetched(tmp_path: Path) -> None:
    device, backups = tmp_path / "device", tmp_path / "backups"
    for page in COLLIDING:
        device.write_bytes(page + bytes(CHUNK - PAGE))
        back_up(backups, NAME, device)
        assert same(backups / NAME, device)


def test_of_chunks_that_the_agent_does_not_hold_no_more_is_read_again_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The batch is so long that more are announced than held before any is asked for.
    set_constants(monkeypatch, WINDOW=8, HELD=2, BATCH_SECONDS=3600)
    device, backups, reads = tmp_path / "device", tmp_path / "backups", tmp_path / "reads"
    chunks = 30
    device.write_bytes(os.urandom(PAGE) * (chunks * PAGES))
    back_up(backups, NAME, device)
    pieces = {index: (1, 2, 4, 5, 128)[index % 5] for index in range(chunks)}
    for index, count in pieces.items():
        for piece in range(count):
            write_at(device, index * MIB + 2 * piece * PAGE, os.urandom(PAGE))

    def edit(source: str) -> str:
        noted = f"open({str(reads)!r}, 'a').write(f'{{index}} {{count}}\\n'); data = os.pread("
        return edited(source, "data = os.pread(", noted)

    stream = AgentProcess(device, 0, dosvob.WINDOW, pipe=NARROW, edit=edit)
    in_time([stream], lambda: back_up(backups, NAME, device, connect=lambda first, window: stream))
    assert same(backups / NAME, device)
    found: dict[int, list[int]] = {index: [] for index in range(chunks)}
    for line in reads.read_text().splitlines():
        index, count = map(int, line.split())
        found[index].append(count)
    again = {index: sizes for index, (whole, *sizes) in found.items() if sizes and whole == PAGES}
    assert len(again) > chunks // 2
    for index, sizes in again.items():
        assert sizes == ([1] * pieces[index] if pieces[index] <= 4 else [PAGES])


def test_chunks_are_dropped_while_an_answer_waits(tmp_path: Path) -> None:
    """The scan goes on, whatever the link is busy with: here the answers never come."""
    window = 4
    device = tmp_path / "device"
    device.write_bytes(os.urandom(PAGE) * (4 * window * PAGES))
    answer = "self.answer(*self.requests.get())"
    stream = AgentProcess(device, 0, window, edit=lambda source: edited(source, answer, "time.sleep(3600)"))
    parser = dosvob.FrameParser()

    def announced(count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            found += [index for kind, index, _ in parser.feed(stream.receive()) if kind == DIGEST]
        return found

    def talk() -> None:
        assert announced(window) == list(range(window))
        stream.send(struct.pack(COMMAND, SEND, 0, 1, ALL))
        stream.send(struct.pack(COMMAND, DROP, 1, window - 1, NONE))
        assert announced(window - 1) == list(range(window, 2 * window - 1))

    with contextlib.closing(stream):
        in_time([stream], talk)


def test_the_scan_is_bounded_by_its_position_also_when_all_it_meets_is_a_hole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a change that takes long: the other side keeps what is announced beyond it."""
    most, chunks = 20, 400
    set_constants(monkeypatch, MOST_AHEAD=most, HEARTBEAT=0.3)
    device = tmp_path / "device"
    device.write_bytes(os.urandom(CHUNK))
    os.truncate(device, chunks * CHUNK)
    stream = AgentProcess(device, 0, dosvob.WINDOW)
    parser = dosvob.FrameParser()

    def announced(least: int) -> int:
        """How many chunks are announced when the agent has no more to say for now; so many at least."""
        end = 0
        while True:
            for kind, index, payload in parser.feed(stream.receive()):
                if kind == ZEROS:
                    end = index + int.from_bytes(payload, "big")
                if end == chunks or (kind == ALIVE and end >= least):  # it may say that it lives before it has begun
                    return end

    def talk() -> None:
        assert announced(most + 1) == most + 1
        stream.send(struct.pack(COMMAND, DROP, 0, 1, NONE))
        assert announced(chunks) == chunks

    with contextlib.closing(stream):
        in_time([stream], talk)


@pytest.mark.parametrize("wanted", [dosvob.ALL_PAGES, 0b1110])
def test_pages_of_zeros_are_not_sent(tmp_path: Path, wanted: int) -> None:
    device = tmp_path / "device"
    device.write_bytes(os.urandom(2 * PAGE) + bytes(PAGE) + os.urandom(PAGE) + bytes(CHUNK - 4 * PAGE))
    agent = dosvob.Agent(str(device), ((0, 2),), 1, dosvob.Packer(True), io.BytesIO(), -1)
    with device.open("rb") as file:
        agent.fd = file.fileno()
        agent.send_pages(0, wanted)
    ((_, _, payload),) = (found for data in drained(agent.frames) for found in dosvob.FrameParser().feed(data))
    sent = wanted & 0b1011
    assert int.from_bytes(payload[: len(NONE)], "little") == sent
    assert len(payload) == len(NONE) + sent.bit_count() * PAGE


# -- compression


TEXT = b"".join(b"%d bottles of beer on the wall, %x\n" % (n, n * n * n) for n in range(30_000))[:CHUNK]
NOISE = os.urandom(CHUNK)
PACKED = dosvob.Zstd().compress(TEXT, 1)
ENDLESS = 31  # the exponent of a window of 2 GiB


def zstd_frame(*blocks: bytes, window: int = 20) -> bytes:
    """A frame of zstd that does not tell its size, with such a window; the last block has its bit set."""
    return dosvob.Zstd.MAGIC + bytes((0, window - 10 << 3)) + b"".join(blocks)


def zstd_block(content: bytes, times: int = 1, *, is_last: bool = True) -> bytes:
    """A block that has its content as it is, or its only byte so many times."""
    size = times if times > 1 else len(content)
    return (size << 3 | 2 * (times > 1) | is_last).to_bytes(3, "little") + content


def zstd_program(*options: str, data: bytes) -> bytes:
    """What the program makes of it."""
    return subprocess.run(["zstd", "-q", "-c", *options], input=data, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("data", [TEXT, NOISE, bytes(CHUNK), TEXT[:PAGE]], ids=["text", "noise", "zeros", "a page"])
def test_what_zstd_packs_is_what_the_zstd_program_unpacks_and_the_other_way(data: bytes) -> None:
    library = dosvob.Zstd()
    for level, *_ in dosvob.LEVELS[ZSTD]:
        packed = library.compress(data, level)
        if data == NOISE:
            assert packed == data  # it does not become shorter
        else:
            assert len(packed) < len(data) / 2
            assert zstd_program("-d", data=packed) == data
            assert library.decompress(packed, len(data)) == data
        assert library.decompress(zstd_program(f"-{level}", data=data), len(data)) == data


SKIPPED = b"\x50\x2a\x4d\x18\4\0\0\0junk"  # a frame that is to be skipped
HOSTILE = {
    "nothing": b"",
    "not zstd": TEXT,
    "the beginning of a frame": PACKED[: len(PACKED) // 2],
    "a frame without its last byte": PACKED[:-1],
    "a frame and a byte": PACKED + b"\0",
    "a frame and junk": PACKED + NOISE[:100],
    "a frame and one that is to be skipped": PACKED + SKIPPED,
    "a frame behind one that is to be skipped": SKIPPED + PACKED,
    "two halves": dosvob.Zstd().compress(TEXT[: CHUNK // 2], 1) + dosvob.Zstd().compress(TEXT[CHUNK // 2 :], 1),
    "an old format": b"\x27\xb5\x2f\xfd" + PACKED[4:],
    "less than is asked for": dosvob.Zstd().compress(TEXT[:-1], 1),
    "more than is asked for": dosvob.Zstd().compress(TEXT + b"x", 1),
    "a bomb": zstd_frame(*[zstd_block(b"x", 128 << 10, is_last=False)] * 10_000, zstd_block(b"")),
    "no last block": zstd_frame(zstd_block(TEXT[: 128 << 10], is_last=False)),
    "a block that is none": zstd_frame(b"\7\0\0"),
    "a dictionary that is not here": dosvob.Zstd.MAGIC + b"\x21\7\xff" + PACKED[6:],
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_is_not_zstd_of_that_size_is_refused(hostile: str) -> None:
    with pytest.raises(ValueError, match="zstd"):
        dosvob.Packer.unpack(ZSTD, HOSTILE[hostile], CHUNK)


def test_what_is_to_be_skipped_is_not_taken_for_nothing() -> None:
    assert dosvob.Packer.unpack(ZSTD, zstd_frame(zstd_block(b"")), 0) == b""
    with pytest.raises(ValueError, match="zstd"):
        dosvob.Packer.unpack(ZSTD, SKIPPED, 0)


def test_a_window_beyond_all_bounds_takes_no_memory() -> None:
    """One of 2 GiB, where there is less."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(dosvob.__file__).parent)!r})
import dosvob
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
sys.stdout.buffer.write(dosvob.Packer.unpack({ZSTD}, {zstd_frame(zstd_block(b"content"), window=ENDLESS)!r}, 7))
"""
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout == b"content"


@fuzz
@given(st.sampled_from((ZLIB, ZSTD)), st.data())
def test_damaged_data_is_unpacked_to_its_size_or_refused(kind: int, data: st.DataObject) -> None:
    packed = bytearray(PACKED if kind == ZSTD else zlib.compress(TEXT, 1))
    for _ in range(data.draw(st.integers(0, 3))):
        packed[data.draw(st.integers(0, 100) | st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    packed = packed[: data.draw(st.just(len(packed)) | st.integers(0, len(packed)))]
    size = data.draw(st.sampled_from((CHUNK, CHUNK, PAGE, 0)))
    with contextlib.suppress(ValueError):
        assert len(dosvob.Packer.unpack(kind, bytes(packed), size)) == size


def clocked_packer(patches: pytest.MonkeyPatch, seconds: float, *, with_zstd: bool = True) -> dosvob.Packer:
    """A packer on one core, whose lowest level takes so long for a chunk and makes half of it, as it has found out."""
    ticks = itertools.count()
    patches.setattr(os, "sched_getaffinity", lambda _: {0})
    patches.setattr(time, "thread_time", lambda: next(ticks) * seconds)
    packer = dosvob.Packer(with_zstd)
    patches.setattr(packer, "_compress", lambda data, level: bytes([level]) * (len(data) // 2))
    packer.sent(CHUNK, 1e9)
    assert packer.pack(TEXT)[0] == (ZSTD if with_zstd else ZLIB)
    for _ in range(1000):  # which is forgotten
        packer.sent(0, 0)
    return packer


def level_of(packer: dosvob.Packer) -> int:
    """How hard it compresses text; 0 for not at all."""
    kind, packed = packer.pack(TEXT)
    return packed[0] if kind != RAW else 0


@pytest.mark.parametrize(
    ("link", "level"), [(0.9, 0), (1, 0), (1.1, 1), (3.9, 1), (4.2, 3), (15, 3), (16.5, 6), (1e6, 6)]
)
def test_it_is_compressed_so_that_it_is_through_soonest(
    monkeypatch: pytest.MonkeyPatch, link: float, level: int
) -> None:
    """Level 1 takes 1 s and leaves a half for the link, level 3 takes 2 s and leaves 9/20, level 6 7 s and 87/200."""
    packer = clocked_packer(monkeypatch, 1)
    packer.sent(CHUNK, link)
    assert level_of(packer) == level
    packer.sent(1 << 50, 0)  # now it is fast
    assert level_of(packer) == 0


@pytest.mark.parametrize(("waits", "level"), [(1.0, 6), (0.2, 6), (0.05, 0), (0.0, 0)])
def test_a_receiver_that_is_slower_than_the_link_has_nothing_to_unpack(
    monkeypatch: pytest.MonkeyPatch, waits: float, level: int
) -> None:
    packer = clocked_packer(monkeypatch, 1)
    packer.sent(CHUNK, 1e6)
    packer.waits = waits
    assert level_of(packer) == level


@pytest.mark.parametrize("with_zstd", [True, False])
def test_what_does_not_get_shorter_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch, with_zstd: bool) -> None:
    """Also what begins as text and goes on as noise: of a frame that is too long the other side would have none."""
    packer = clocked_packer(monkeypatch, 1, with_zstd=with_zstd)
    packer.sent(CHUNK, 1e6)
    monkeypatch.setattr(packer, "_compress", lambda data, level: data + b"longer" if len(data) == CHUNK else b"")
    for data in (NOISE, TEXT, b""):
        assert packer.pack(data) == (RAW, data)


def test_what_compressing_hard_took_tells_what_it_would_take_less_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = clocked_packer(monkeypatch, 1)
    ticks = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks) * 7)  # what the hardest level takes
    monkeypatch.setattr(packer, "_compress", lambda data, level: bytes([level]) * round(len(data) * 0.435))
    packer.sent(CHUNK, 1e9)
    for _ in range(100):
        assert level_of(packer) == 6
    for _ in range(1000):
        packer.sent(0, 0)
    packer.sent(CHUNK, 15)
    assert level_of(packer) == 3


def test_only_a_sample_of_noise_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = dosvob.Packer(True)
    packer.sent(CHUNK, 1e6)
    compress, sizes = packer._compress, set()

    def note(data: bytes, level: int) -> bytes:
        sizes.add(len(data))
        return compress(data, level)

    monkeypatch.setattr(packer, "_compress", note)
    assert packer.pack(NOISE) == (RAW, NOISE)
    assert sizes == {packer.SAMPLES * packer.SAMPLE}
    assert packer.pack(NOISE[:PAGE]) == (RAW, NOISE[:PAGE])
    assert packer.pack(TEXT)[0] == ZSTD


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_zstd_is_used_where_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool, there: bool
) -> None:
    device, backups = tmp_path / "device", tmp_path / "backups"
    device.write_bytes(TEXT * 20)
    if not here:
        monkeypatch.setattr(dosvob, "LIBZSTD", None)

    def edit(source: str) -> str:
        source = edited(source, "if not on_link or self.waits < self.WAITS:", "if False:")
        source = edited(source, "if not self._packed:", "if True:")  # it pays in any case
        return source if there else edited(source, '"libzstd.so.1"', '"libzstd.so.none"')

    stream = AgentProcess(device, 0, dosvob.WINDOW, edit=edit)
    kinds: Counter[int] = Counter()
    handle = dosvob.Pull._handle

    def note(sync: dosvob.Pull, *item: Any) -> None:
        kinds[item[0]] += 1
        handle(sync, *item)

    monkeypatch.setattr(dosvob.Pull, "_handle", note)
    in_time([stream], lambda: back_up(backups, NAME, device, connect=lambda first, window: stream))
    assert same(backups / NAME, device)
    assert kinds[ZSTD if here and there else ZLIB] == 20, kinds


# -- the agent's source


def inner_source() -> str:
    """What an agent's program executes once the droplet's Python has been looked at."""
    last = ast.parse(dosvob.agent_source("/dev/null", ((0, 1),), 1)).body[-1]
    assert isinstance(last, ast.Expr)
    assert isinstance(last.value, ast.Call)
    return str(ast.literal_eval(last.value.args[0]))


def code_objects(code: CodeType) -> Iterator[CodeType]:
    """A code object and all within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_objects(constant)


def test_the_agents_source_is_that_of_python_3_8() -> None:
    ast.parse(dosvob.agent_source("/dev/null", ((0, 1),), 1), feature_version=(3, 8))
    ast.parse(inner_source(), feature_version=(3, 8))


def test_the_agents_source_needs_nothing_but_itself_and_the_standard_library() -> None:
    tree, code = ast.parse(inner_source()), compile(inner_source(), "agent", "exec")
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names

    def names(part: CodeType, *operations: str) -> set[str]:
        return {step.argval for step in dis.get_instructions(part) if step.opname in operations}

    defined = names(code, "STORE_NAME", "STORE_GLOBAL") | set(dir(builtins))
    asked_for_by_python = {"__name__", "__annotations__"}  # in a class's body, and for an annotated name
    for part in code_objects(code):
        used = names(part, "LOAD_GLOBAL") | (names(part, "LOAD_NAME") - names(part, "STORE_NAME"))
        assert used <= defined | asked_for_by_python


@pytest.mark.parametrize("version", ["3.6", "3.8", "3.9", "3.10", "3.12", "3.13"])
@pytest.mark.beyond_bare
def test_the_agent_runs_on_the_pythons_that_droplets_have(tmp_path: Path, version: str) -> None:
    python = python_3(int(version.removeprefix("3.")))
    if not python:
        pytest.skip(f"there is no Python {version} here")
    device, backups = tmp_path / "device", tmp_path / "backups"
    warnings: list[str] = []

    def connect(first: int, window: int) -> AgentProcess:
        return AgentProcess(device, first, window, python=str(python))

    for seed in (1, 2):
        scatter(device, seed, 6 * MIB)
        if version == "3.6":
            with pytest.raises(dosvob.BadAgent, match=r'it has Python 3\.6, and 3\.8 is needed: set "droplet_image"'):
                back_up(backups, NAME, device, connect=connect)
        else:
            back_up(backups, NAME, device, connect=connect, warn=warnings.append)
            assert same(backups / NAME, device)
    assert not warnings


def edited(source: str, old: str, new: str) -> str:
    """The agent's source with a change."""
    assert source.count(old) == 1
    return source.replace(old, new)


def test_what_was_done_before_a_connection_broke_is_not_counted_twice(tmp_path: Path) -> None:
    """A chunk of zeros is done at once, while the data of the one before it is still to come."""
    device, backups = tmp_path / "device", tmp_path / "backups"
    device.write_bytes(os.urandom(2 * CHUNK))
    back_up(backups, NAME, device)
    device.write_bytes(os.urandom(CHUNK) + bytes(CHUNK))
    cuts = [100, None]
    streams: list[AgentProcess] = []

    def connect(first: int, window: int) -> AgentProcess:
        streams.append(AgentProcess(device, first, window, cut=cuts.pop(0), most=100))
        return streams[-1]

    update = back_up(backups, NAME, device, connect=connect)
    assert [stream.received < CHUNK for stream in streams] == [True, False]
    assert update.changed == 2 * CHUNK
    assert same(backups / NAME, device)


def test_what_comes_out_of_order_is_progress(target: Target) -> None:
    """Each connection brings one chunk more, and never the first one."""
    chunks = 8
    os.truncate(target.device, chunks * CHUNK)
    said = [hello(chunks)] + [frame(DIGEST, index, digest_of(THEIRS)) for index in range(chunks)]
    missing = list(range(1, chunks))

    def connect() -> Any:
        assert update.frontier == 0
        return Script(*said, frame(RAW, missing.pop(0), b"\xff" * (PAGES // 8) + THEIRS)) if missing else Script()

    update = dosvob.Update(target.paths, snapshot_of(target.device, NAME), dosvob.Keep(), lambda text: None)
    with contextlib.closing(update), pytest.raises(dosvob.ConnectionLost):
        dosvob.converse(connect, dosvob.Pull(update), lambda text: None, lambda received: None, lambda _: False)
    assert not missing


# -- any image becomes any other


@dataclass(frozen=True)
class Patch:
    """A change of a file: `pages` pages from page `page` on, with random data, one byte, or zeros."""

    page: int
    pages: int
    kind: str
    seed: int

    def apply(self, content: bytearray) -> None:
        """Change the content, which stays as long as it is."""
        start = self.page * PAGE % len(content)
        length = min(self.pages * PAGE, len(content) - start)
        filling = {
            "random": (self.seed.to_bytes(4, "big") * PAGE)[:PAGE] * self.pages,
            "byte": bytes(100) + b"x" + bytes(self.pages * PAGE - 101),
            "zeros": bytes(self.pages * PAGE),
        }
        content[start : start + length] = filling[self.kind][:length]


patches = st.lists(
    st.builds(
        Patch,
        st.integers(0, 3 * PAGES),
        st.sampled_from((1, 1, 2, 17, PAGES, 2 * PAGES)),
        st.sampled_from(("random", "byte", "zeros")),
        st.integers(1, 1 << 30),
    ),
    max_size=6,
)


def contents(size: int, layers: Iterable[list[Patch]]) -> Iterator[bytes]:
    """The contents of a volume that is changed again and again."""
    content = bytearray(size)
    for layer in layers:
        for patch in layer:
            patch.apply(content)
        yield bytes(content)


@settings(fuzz, max_examples=15)
@given(
    chunks=st.integers(1, 3),
    layers=st.lists(patches, min_size=1, max_size=3),
    growth=st.integers(0, 2),
    cuts=st.lists(st.integers(0, 1 << 21), max_size=8),
    reread=st.booleans(),
)
def test_a_sync_makes_the_image_the_volume(
    chunks: int, layers: list[list[Patch]], growth: int, cuts: list[int], reread: bool
) -> None:
    """First, later, grown; on connections that break anywhere, and taken up by another run after too many of them."""
    with tempfile.TemporaryDirectory() as directory:
        device, backups = Path(directory, "device"), Path(directory, "backups")
        left = list(cuts)

        def connect(first: int, window: int) -> AgentProcess:
            return AgentProcess(device, first, window, cut=left.pop() if left else None)

        for number, content in enumerate(contents(chunks * CHUNK, layers)):
            device.write_bytes(content + bytes(growth * CHUNK * (number > 0)))
            while left:
                with contextlib.suppress(dosvob.ConnectionLost):
                    back_up(backups, NAME, device, connect=connect, reread=reread)
                    break
            else:
                back_up(backups, NAME, device, connect=connect, reread=reread)
            assert (backups / NAME).read_bytes() == device.read_bytes()
            assert not any(verify(dosvob.ImagePaths(backups, NAME)))
