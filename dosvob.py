#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["requests>=2.32,<3", "paramiko>=5,<6"]
# ///
"""dosvob: back up DigitalOcean volumes into plain raw disk images on a local disk, and bring them back.

snapshot → clone → droplet → agent: digests of every MiB → patches of what differs → spool → undo → image and version

The words:

- Volume: what is backed up. Snapshot: its content at a moment. Clone: a throwaway volume made from the snapshot.
- Image: the local file `backups/NAME`, with several regions `backups/REGION/NAME`, byte for byte the last snapshot.
- Chunk: 1 MiB of either, the unit of digests and of the conversation. Page: 4 KiB, the unit of change.
- Patch: new contents for some pages of one chunk, with the digest that the chunk has afterwards.
- Spool: the patches that a sync has fetched and will write to the image. Undo: what the image has in those places.
- Version: an undo that is kept: an older snapshot, as the patches that lead back to it from the next newer one.
- State: which snapshot an image is, and the digest of each chunk.
- Home: one backups directory. Leftover: a resource of a run that has ended.

A run, which is `Run.run` once `main` and `Commands.back_up` have begun it, and where to read of it:

 1. `Config.load` checks conf.json, `Home.locked` keeps other runs of this home out.
 2. `sweep` removes this home's leftovers; `Home.recover` takes back what a crash left half done; `Selection` chooses.
 3. `Misplaced.move` follows a change of "region"; then for each region `Backup.run` takes the volumes in turn. In the
    background `DropletKeeper` makes a key and a droplet, `Backup._make_clone` makes clones of the next volumes, and
    `Backup._attach` attaches one after the other. They stay attached until the droplet goes.
 4. `Update` opens the volume's image. `converse` starts an `Agent` on the droplet and has a `Pull` talk with it: chunks
    whose digest is the image's stay as they are; of the others the pages that differ are fetched, as patches.
 5. `Update.finish` writes the undo, then the spool to the image. The new state is the commit, and makes the undo a
    version.
 6. A `Checker` on the droplet mounts the clone: does the backup come up? `Backup._take_note` writes what it found into
    the state, while the next volume is fetched.
 7. `thin` drops the versions that `keep` does not ask for; it also does so for all volumes before the first is fetched.
 8. `Ephemeral.__exit__` removes all that was created, until lists show nothing of it; the table, the exit code.

The way back: `Commands.mount` shows all versions as files; `Kernel` answers what the real one asks over FUSE.
`Chain.restore` writes a version to a file. `Restoration` makes a new volume of it: a `Push` sends what differs to an
`Agent` on a droplet, until nothing does.

What it promises:

- The image is at every moment one complete snapshot, or the undo beside it makes it the one before.
- A version that is listed restores to the very bytes that the volume had, or says which of them are damaged.
- All that a run creates is named `dosvob-ephemeral-HOME-RUN-…` and removed however the run ends. What could not be
  removed is named loudly. A new volume, which is to stay, is whole from its birth.

What it does not promise: a snapshot of a volume in use is as consistent as a disk after a power cut, not more. Whether
its file systems come up after that is tried each time, and told.

The threads. Here: the main thread decides. In a backup two others talk with an agent each and change an image each; one
makes clones, one attaches them, one releases those that would cost another hour, some wait for a `Checker`. One (of
`DropletKeeper`) makes the droplet. paramiko has one for each connection, each stream of output has one (`Writer`), and
`done_ahead` and `within` start some for a moment. On the droplet: see `Agent`.

The chapters, each of which uses those before it alone: errors and waiting, reporting, configuration, the DigitalOcean
API, ephemeral resources, the agent, image files, versions, the home, the update of an image, the conversations, the
connection, the backup, the way back, the mount, commands, main.
"""
# ruff: noqa: E402, UP031, UP036 - we report what the user lacks before we import it, in syntax that old Pythons know

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    try:
        sys.stderr.write(
            "dosvob: it needs Python 3.11 or later, and %s is Python %d.%d: run it with a newer one, such as "
            "python3.12 dosvob.py, or in its container: docker-compose up -d --build\n"
            % (sys.executable, *sys.version_info[:2])
        )
        sys.stderr.flush()
    except (AttributeError, OSError):  # it is closed, or nobody reads it
        sys.stderr = None  # else Python tries again at its exit, and makes the exit code 120
    sys.exit(2)

import os
import signal


def end_while_loading(number: int, _frame: object) -> None:
    """End at ^C with one line, until `Signals` takes over: nothing has begun."""
    os.write(2, b"SIGINT: stopped before anything was begun\n")
    os._exit(128 + number)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_while_loading)

# agent: begin
# isort: off
import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import os  # noqa: F811 - which begins the agent's own part
import queue
import re
import stat
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, ClassVar, Protocol, TypeVar
# isort: on

# agent: end
import argparse
import array
import bisect
import dataclasses
import datetime
import difflib
import email.utils
import fnmatch
import functools
import heapq
import importlib
import io
import logging
import operator
import random
import secrets
import select
import shlex
import shutil
import socket
import ssl
import tempfile
import traceback
import urllib.parse
from collections.abc import Collection, Container
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    import paramiko
    import requests

VERSION = "1.0.0"
LIMITS_PAGE = "https://cloud.digitalocean.com/account/team/limits"
TOKENS_PAGE = "https://cloud.digitalocean.com/account/api/tokens"
GIB = 1 << 30
Json = dict[str, Any]
S = TypeVar("S")
T = TypeVar("T")


# ── Errors and waiting ───────────────────────────────────────────────────────────────────────────────────────────────
# One family of errors, each with a message fit for the user; and one way to wait, which a signal ends.


class DosvobError(Exception):
    """Something went wrong; the message says what, to what, and what to do."""


class UsageError(DosvobError):
    """The command line, the configuration or the place to run in is wrong: exit code 2, and nothing was created."""


class Busy(UsageError):
    """Another dosvob is at work in the same place."""


class Package:
    """Imports a package at its first use, so that offline commands need Python alone."""

    def __init__(self, name: str, *least: int) -> None:
        self._name = name
        self._least = least  # version

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)

    def check(self) -> None:
        """Import it; raises UsageError if it is missing or too old."""
        what = f"the Python package {self._name}"
        try:
            version = str(self.__version__)
        except ImportError as missing:
            raise UsageError(f"{what} is missing ({missing}): {self._mend()}") from None
        if tuple(map(int, re.findall(r"\d+", version)[: len(self._least)])) < self._least:
            needed = ".".join(map(str, self._least))
            raise UsageError(f"{what} {version} is too old, {needed} or later is needed: {self._mend()}")

    @staticmethod
    def _mend() -> str:
        script = os.path.abspath(__file__)
        venv, script = (shlex.quote(near_path(path)) for path in (f"{os.path.dirname(script)}/.venv", script))
        install = f"python3 -m venv {venv} && {venv}/bin/pip install 'requests>=2.32,<3' 'paramiko>=5,<6'"
        return f"{install} && {venv}/bin/python {script}"


PACKAGES = Package("requests", 2, 32), Package("paramiko", 5, 0)
if not TYPE_CHECKING:
    requests, paramiko = PACKAGES


class Interrupted(BaseException):
    """The run was asked to stop. Like KeyboardInterrupt it is no error: only what ends a run, or a part, catches it."""


class Stop:
    """Tells every thread to stop; each looks wherever it waits.

    A signal handler must not raise (the exception could hit the teardown) nor take a lock (the interrupted code may
    hold it; an Event has one), so `request` only sets an attribute, and `sleep` takes short naps.
    """

    NAP = 0.1  # seconds; how late a wish to stop may be noticed

    def __init__(self, parent: Stop | None = None) -> None:
        self._parent = parent  # a request there counts here too
        self.requested = False

    def request(self) -> None:
        """Ask everyone to stop; safe in a signal handler."""
        self.requested = True

    def check(self) -> None:
        """Raise `Interrupted` if a stop was requested."""
        if self.requested:
            raise Interrupted("interrupted")
        if self._parent is not None:
            self._parent.check()

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise `Interrupted` as soon as a stop is requested."""
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self.NAP))
            self.check()

    def wait_until(self, limit: float, probe: Callable[[], T | None]) -> T | None:
        """Call `probe` until it returns something, at growing intervals; None after `limit` seconds."""
        end = time.monotonic() + limit
        intervals = pauses(0.25, 1.0)  # two threads wait at a time at most, and the API allows 250 requests a minute
        while (result := probe()) is None and time.monotonic() <= end:
            self.sleep(next(intervals))
        return result


def pauses(first: float, most: float, growth: float = 1.3) -> Iterator[float]:
    """Seconds to wait before each repetition, growing up to a maximum, with jitter."""
    pause = first
    while True:
        yield pause * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
        pause = min(pause * growth, most)


def within(limit: float, work: Callable[[], T]) -> T:
    """Return or raise what the work does; after `limit` seconds abandon it and raise TimeoutError.

    For network calls: their own limits hold between two bytes, and bound neither a name's lookup nor an answer that
    trickles in.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as problem:  # noqa: BLE001 - whatever it is, it is raised where it is waited for
            outcome.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(limit)


def root_cause(problem: BaseException) -> BaseException:
    """The exception that an exception goes back to."""
    while problem.__context__ is not None:
        problem = problem.__context__
    return problem


def reason(problem: BaseException) -> str:
    """What an exception says, or is."""
    return str(problem) or ("no answer" if isinstance(problem, TimeoutError) else type(problem).__name__)


def utc_now() -> datetime.datetime:
    """The time now, in UTC, with whole seconds."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def running_time() -> float:
    """Seconds that go on while this machine is suspended, which those of time.monotonic do not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.time()


def parse_time(text: str) -> datetime.datetime | None:
    """An RFC 3339 time, such as the API's; None if it is none."""
    try:
        return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
    except (ValueError, TypeError, OverflowError):
        return None


def age(moment: str, now: datetime.datetime) -> float:
    """Seconds from an RFC 3339 time to `now`; infinite if it is none."""
    parsed = parse_time(moment)
    return float("inf") if parsed is None else (now - parsed).total_seconds()


def human_size(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < (1024 if unit == "B" else 1023.95):  # which would read as 1024.0
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_time(seconds: float) -> str:
    """Seconds as 12 s, 3:05 min, 2:03 h or 5 days."""
    whole = max(int(seconds), 0)  # clocks may differ
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h" if whole < 72 * 3600 else f"{whole // 86400} days"


def local_time(moment: datetime.datetime) -> str:
    """A time in the local time zone, with its offset from UTC."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def explained(problem: DosvobError | OSError, where: Path) -> str:
    """An error's text for the user; an OSError that names no file gets `where`."""
    if isinstance(problem, DosvobError):
        return str(problem)
    advice = {
        errno.ENOSPC: "make room there and run again",
        errno.EDQUOT: "make room there and run again",
        errno.EROFS: "mount it for writing",
        errno.EACCES: "it must belong to the user who runs dosvob",
        errno.EPERM: "it must belong to the user who runs dosvob",
        errno.EXDEV: "it is on another disk than where it belongs: move it there yourself",
        errno.EIO: "the disk may be failing: look at the kernel's log",
    }.get(problem.errno or 0, "look at that file and its disk")
    return f"{problem.filename or where}: {problem.strerror or problem}: {advice}"


def is_disk_full(problem: BaseException) -> bool:
    """Whether it tells of a full disk, or of a quota."""
    return isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)


# ── Reporting ────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the user sees: on a terminal a live line, in a log lines with the time (UTC) now and then; a table at the end.


class Writer:
    """Writes to one file descriptor, in a thread of its own. `has_failed` tells whether a write failed."""

    MOST_QUEUED = 10_000  # lines that wait for a terminal or a pipe that takes nothing more; later ones are lost
    STUCK_LIMIT = 5  # seconds that `close` waits for it

    def __init__(self, fd: int, encoding: str) -> None:
        self.is_terminal = os.isatty(fd)
        self._fd = fd
        self._encoding = encoding
        self.has_failed = False
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def put(self, text: str) -> None:
        """Queue a text to be written; never waits."""
        if self._queue.qsize() < self.MOST_QUEUED:
            self._queue.put(text)

    def close(self) -> None:
        """Write what is queued, and wait for that, for STUCK_LIMIT at most."""
        self._queue.put(None)
        self._thread.join(self.STUCK_LIMIT)

    def flush(self, stop: Stop) -> None:
        """Wait, without a limit, until each text is written or has failed; raises Interrupted."""
        self._queue.put(None)
        while self._thread.is_alive():
            stop.sleep(Stop.NAP)
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        # To the descriptor: at its exit Python would try again what sys.stdout could not write, and exit with 120.
        while (text := self._queue.get()) is not None:
            view = memoryview(text.encode(self._encoding, "replace"))
            while view:
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:  # another process that shares it made it non-blocking
                    time.sleep(Stop.NAP)
                except OSError:  # a terminal that was closed is no reason to end
                    self.has_failed = True
                    break


class Reporter:
    """Writes to the user, from any thread. `secret` never gets out, and nothing that could steer a terminal does.

    It leaves the writing to threads: a terminal that was stopped with ^S, or a pipe that nobody reads, must not block
    a run, least of all its teardown.
    """

    LOG_INTERVAL = 60  # seconds between a log's lines about the same sync
    LIVE_INTERVAL = 0.2  # seconds between updates of a terminal's live line
    LINE_LIMIT = 10_000  # characters; an answer of the API that is quoted may have any length

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.verbose = verbose
        self.quiet = quiet
        self.secret = ""
        self.current = ""  # what is going on, for whoever asks with a second signal
        self.has_failed = False  # whether there was an error
        self.left: set[object] = set()  # what could not be removed from the account, see `tell_left_behind`
        self.summary: list[str] = []  # what somebody who was not there must know: warnings, errors, results
        self._lock = threading.Lock()
        self._live: dict[int, str] = {}  # the live line's parts, by thread
        self._lined_at: dict[int, float] = {}  # when each thread's part, or its line in a log, was last written
        self._output = Writer(1, sys.stdout.encoding or "utf-8")
        # In one place they keep their order
        self._errors = self._output if os.path.sameopenfile(1, 2) else Writer(2, sys.stderr.encoding or "utf-8")

    def close(self) -> None:
        """Write what is queued, and wait for that, for STUCK_LIMIT at most."""
        for writer in {self._output, self._errors}:
            writer.close()

    def flush(self, stop: Stop) -> None:
        """Wait, without a limit, until each text is written or has failed; raises Interrupted."""
        for writer in (self._output, self._errors):
            writer.flush(stop)

    def say(self, text: str, *, is_result: bool = False) -> None:
        """Something happened, or came of the run."""
        if is_result:
            self.summary.append(text)
        if not self.quiet:
            self._write(self._output, text)

    def detail(self, text: str) -> None:
        """Something that is of interest with --verbose only."""
        if self.verbose:
            self._write(self._output, text)

    def warn(self, text: str, kind: str = "warning") -> None:
        """Something that the user should look into."""
        self.summary.append(f"{kind}: {text}")
        self._write(self._errors, f"{kind}: {text}")

    def error(self, text: str) -> None:
        """Something failed, and so does the command."""
        self.has_failed = True
        self.warn(text, "error")

    def answer(self, text: str, stop: Stop) -> None:
        """Print what the user asked for, also with --quiet, without the time; an error if not all could be written."""
        self._output.put(self.clean(text) + "\n")
        self._output.flush(stop)
        if self._output.has_failed:
            self.error("the output could not be written, not all of it at least")

    def doing(self, text: str) -> None:
        """What is going on now."""
        self.current = self.clean(text)
        self.detail(text)

    def progress(self, tell: Callable[[], str]) -> None:
        """How far this thread's work has got: its part of the live line on a terminal, a line now and then in a log.

        `tell` is asked for it only then: this is called for each chunk.
        """
        is_live, thread, now = self._output.is_terminal, threading.get_ident(), time.monotonic()
        lined_at = self._lined_at.setdefault(thread, 0.0 if is_live else now)
        if self.quiet or now - lined_at < (self.LIVE_INTERVAL if is_live else self.LOG_INTERVAL):
            return
        self._lined_at[thread] = now
        if is_live:
            with self._lock:
                self._live[thread] = self.clean(tell())
                self._output.put(f"\r\x1b[2K{self._live_line()}")
        else:
            self._write(self._output, tell())

    def end_progress(self) -> None:
        """Take this thread's part of the live line away; its next progress shows at once."""
        thread = threading.get_ident()
        self._lined_at.pop(thread, None)
        with self._lock:
            if self._live.pop(thread, None) is not None:
                self._output.put(f"\r\x1b[2K{self._live_line()}")

    def _live_line(self) -> str:
        columns, parts, between = shutil.get_terminal_size().columns - len("^C") - 1, self._live.values(), " | "
        width = (columns + len(between)) // max(len(parts), 1) - len(between)  # a terminal puts the ^C behind it
        return between.join(fitted(part, width) for part in parts)

    def interject(self, text: str) -> None:
        """Report from a signal handler, without the lock: the code that it interrupted may hold it."""
        over_live_line = "\r\x1b[2K" if self._errors.is_terminal else ""  # which has a ^C behind it
        self._errors.put(over_live_line + self._lines(self._errors, text))

    def _lines(self, writer: Writer, text: str) -> str:
        stamp = "" if writer.is_terminal else f"{utc_now().isoformat()} "
        return "".join(f"{stamp}{line}\n" for line in self.clean(text).splitlines())

    def _write(self, writer: Writer, text: str) -> None:
        lines = self._lines(writer, text)
        with self._lock:
            is_below = bool(self._live) and writer.is_terminal
            writer.put(f"\r\x1b[2K{lines}{self._live_line()}" if is_below else lines)

    def clean(self, text: str) -> str:
        """The text without the secret and without what could steer a terminal."""
        if self.secret:
            text = text.replace(self.secret, "***")
        text = "".join(char if char.isprintable() or char == "\n" else "�" for char in text)
        return "\n".join(line[: self.LINE_LIMIT] for line in text.split("\n"))


def command_line(*words: str) -> str:
    """A command of ours, quoted for a shell, with the --config and --backups that this one was given."""
    script = os.path.abspath(sys.argv[0])
    places = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for option in ("--config", "--backups"):
        places.add_argument(option)
    given = [
        word for item in vars(places.parse_known_args(sys.argv[1:])[0]).items() for word in (f"--{item[0]}", item[1])
    ]
    is_in_path = shutil.which(Path(sys.executable).name) == sys.executable
    python = Path(sys.executable).name if is_in_path else near_path(sys.executable)
    outside = os.environ.get("DOSVOB_COMMAND")  # the container's
    return " ".join([outside or shlex.join([python, near_path(script)]), shlex.join([*given, *words])])


def near_path(path: str) -> str:
    """A path, made relative if it is below the current directory, which may be gone."""
    with contextlib.suppress(FileNotFoundError):
        if Path(path).is_relative_to(os.getcwd()):
            return os.path.relpath(path)
    return path


def fitted(text: str, columns: int) -> str:
    """Cut a line of progress, `NAME: this, that`, to so many columns: its last parts go, then the name's middle."""
    name, colon, rest = text.partition(": ")
    parts, least = rest.split(", "), min(len(name), 10)
    while len(parts) > 1 and least + len(colon + ", ".join(parts)) > columns:
        parts.pop()
    told = colon + ", ".join(parts)
    room = max(columns - len(told), least)
    if len(name) > room:
        name = f"{name[: room // 2]}…{name[len(name) - (room - 1) // 2 :]}"
    return f"{name}{told}"[:columns]


class Rate:
    """How much a count grows in a second, of late."""

    SPAN = 15  # seconds that are looked back
    STEP = 0.5  # seconds between the counts that are kept

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[float, float]] = collections.deque()  # times and counts

    def __call__(self, count: float, now: float | None = None) -> float:
        """The rate, given the count now, or by another clock; 0 if it has not grown, or in the first second."""
        now = time.monotonic() if now is None else now
        if not self._seen or now - self._seen[-1][0] >= self.STEP:
            self._seen.append((now, count))
        while len(self._seen) > 2 and self._seen[1][0] < now - self.SPAN:
            self._seen.popleft()
        since, before = self._seen[0]
        return max(count - before, 0) / (now - since) if now - since >= 1 else 0

    @property
    def fastest(self) -> float:
        """The highest rate between neighbours of the counts that are kept."""
        pairs = itertools.pairwise(self._seen)
        return max(((after - before) / (then - since) for (since, before), (then, after) in pairs), default=0)


class Meter:
    """Counts the bytes that some work has done, shows its progress, and ends it when a stop was requested."""

    INTERVAL = 0.1  # seconds between looks at the rate

    def __init__(self, report: Reporter, stop: Stop, what: str, total: int = 0, *, is_announced: bool = False) -> None:
        self.done = 0
        self._is_told = is_announced
        self._report = report
        self._stop = stop
        self._what = what
        self._total = total
        self._rate = Rate()
        self._next = 0.0  # when it looks at the rate again

    def __call__(self, size: int) -> None:
        """So many bytes more: this is called for each chunk. Raises Interrupted."""
        self._stop.check()
        if not self.done and self._is_told:
            self._report.say(f"{self._what}; when it is stopped, it goes on next time")
        self.done += size
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.INTERVAL
            rate = self._rate(self.done, now)
            self._report.progress(lambda: self._told(rate))

    def _told(self, rate: float) -> str:
        name, _, doing = self._what.partition(": ")
        of = f" of {human_size(self._total)}" if self._total else ""
        left = f"{human_time((self._total - self.done) / rate)} left, " if of and rate else ""
        pace = f", {human_size(rate)}/s" if of and rate else ""
        return f"{name}: {left}{doing} {human_size(self.done)}{of}{pace}"


def ping(url: str | None, event: str, report: Reporter, problem: str = "") -> None:
    """Tell a service in the manner of healthchecks.io how a run goes: https://healthchecks.io/docs/http_api/

    `event` is "/start", "" for success or "/fail". It tries once. A failure is only a warning, and that hides the
    address: whoever knows it can send pings too.
    """
    if url is None:
        return
    limit = 5  # seconds
    most = 10_000  # bytes, from the end; a service may keep no more of it
    parts = urllib.parse.urlsplit(url)
    address = parts._replace(path=parts.path.rstrip("/") + event).geturl()
    lines = [] if event == "/start" else [*report.summary, *([f"error: {problem}"] if problem else [])]
    body = report.clean("\n".join(lines)).encode(errors="replace")[-most:]
    headers = {"User-Agent": f"dosvob/{VERSION}", "Content-Type": "text/plain; charset=utf-8"}
    post = functools.partial(requests.post, address, body, headers=headers, timeout=limit, allow_redirects=False)
    try:
        response = within(limit, post)
        failure = "" if 200 <= response.status_code < 300 else f"HTTP status {response.status_code}"
    except TimeoutError:
        failure = f"no answer within {limit} s"
    except Exception as unreachable:  # noqa: BLE001 - whatever it is, the backup is what matters
        failure = reason(root_cause(unreachable))
    if failure:
        report.warn(f"the ping to {parts.hostname} failed: {failure}; the backup is not affected")


def counted(count: int, noun: str) -> str:
    """A number of things: `8 versions`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def oldest_of(moments: Collection[datetime.datetime]) -> str:
    """How the oldest of some versions is named in a message about them."""
    return f"{'the oldest ' * (len(moments) > 1)}of {local_time(min(moments))[:10]}"


def table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Rows in columns, those whose numbers are in `left` adjusted to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


# ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────────
# Reads conf.json and the environment, and reports what is wrong there in terms of the file, before anything begins.


@dataclass(frozen=True)
class Keep:
    """How many versions to keep; with all numbers 0 none.

    `last` newest ones beside the image; and the newest of each of the last `daily` days, `weekly` weeks and `monthly`
    months (UTC) that have one, the image counting, as `restic forget` does. conf.json.example has the defaults.
    """

    last: int = 6
    daily: int = 7
    weekly: int = 4
    monthly: int = 6

    def wanted(self, moments: Sequence[datetime.datetime]) -> list[bool]:
        """Which snapshots to keep, given their times, the newest first; the first is the image's."""
        wanted = [number <= self.last for number in range(len(moments))]
        for count, period in ((self.daily, "%Y-%m-%d"), (self.weekly, "%G-%V"), (self.monthly, "%Y-%m")):
            periods: list[str] = []
            for number, moment in enumerate(moments):
                if len(periods) < count and moment.strftime(period) not in periods[-1:]:
                    periods.append(moment.strftime(period))
                    wanted[number] = True
        return wanted


@dataclass(frozen=True)
class Config:
    """What conf.json and the environment say.

    `regions` are slugs; empty means all in which the account has volumes; with `by_region` each has a directory for
    its images. `include` and `exclude` are shell patterns of volume names; an empty `include` means all. `droplet_size`
    and `droplet_image` are slugs, or None for the cheapest and the newest that will do. `healthchecks` is the address
    of a monitoring service that we ping about each run; whoever knows it can ping too. `check` is how a droplet looks
    whether a backup comes up: by a mount, also by the file system's own tool, or not at all.
    """

    token: str = field(repr=False)
    token_from: str
    regions: tuple[str, ...]
    by_region: bool
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    droplet_size: str | None
    droplet_image: str | None
    api_url: str
    healthchecks: str | None = field(repr=False)
    keep: Keep
    check: str = "mount"

    CHECKS = ("mount", "fsck", "none")
    PLACEHOLDER = "dop_v1_PUT-YOUR-TOKEN-HERE"  # in conf.json.example
    TOKEN_VARIABLES = ("DIGITALOCEAN_ACCESS_TOKEN", "DIGITALOCEAN_TOKEN")  # doctl's and the Terraform provider's
    URL_VARIABLE = "DIGITALOCEAN_API_URL"
    TEXT = ((str,), "a text in quotes")
    NAMES = ((list,), 'a list of names in quotes, such as ["data", "db-*"]')
    KEYS: ClassVar[Mapping[str, tuple[tuple[type, ...], str]]] = {  # the types of its value, and what it must be
        "do_token": TEXT,
        "region": ((str, list), 'a region in quotes, such as "fra1", or ["fra1", "nyc3"] for several, or "all"'),
        "include": NAMES,
        "exclude": NAMES,
        "droplet_size": TEXT,
        "droplet_image": TEXT,
        "healthchecks": TEXT,
        "keep": ((dict,), f"an object such as {json.dumps(dataclasses.asdict(Keep()))}"),
        "check": TEXT,
    }

    @classmethod
    def load(cls, path: Path, environment: Mapping[str, str], warn: Callable[[str], None]) -> Config:
        """Read and check the configuration; raise UsageError with a message in terms of the file."""
        content = cls._read(path)
        cls._check(path, content, cls.KEYS)
        number = ((int,), "a whole number from 0 to 10000")
        numbers = {item.name: number for item in dataclasses.fields(Keep)}
        cls._check(path, content.get("keep", {}), numbers, ' in "keep"')
        variable = next((name for name in cls.TOKEN_VARIABLES if environment.get(name)), None)
        token = environment[variable] if variable else content.get("do_token", "")
        if not token or token == cls.PLACEHOLDER:
            raise UsageError(
                f'{path}: "do_token" is still the placeholder or missing: make a token at {TOKENS_PAGE}, put it there'
            )
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise UsageError("the DigitalOcean token has a space, a line break or another character that no token has")
        region = content.get("region")
        if not region:
            raise UsageError(f'{path}: "region" is missing: the region of your volumes, such as "fra1"')
        if not variable and cls._is_open_to_others(path):
            warn(f"{path} holds your token and others can read it: chmod 600 {shlex.quote(str(path))}")
        url = environment.get(cls.URL_VARIABLE) or "https://api.digitalocean.com"
        if not cls._is_private(url):
            raise UsageError(f"{cls.URL_VARIABLE} is {url!r}: it must be an https:// address")
        ping = content.get("healthchecks") or None
        if ping and not cls._is_private(ping):
            raise UsageError(
                f'{path}: "healthchecks" must be an https:// address such as "https://hc-ping.com/YOUR-UUID"'
            )
        check = content.get("check", cls.check)
        if check not in cls.CHECKS:
            raise UsageError(f'{path}: "check" must be one of {", ".join(map(json.dumps, cls.CHECKS))}')
        return cls(
            token=token,
            token_from=f"the environment variable {variable}" if variable else f'"do_token" in {path}',
            regions=() if region == "all" else (region,) if isinstance(region, str) else tuple(dict.fromkeys(region)),
            by_region=region == "all" or isinstance(region, list),
            include=tuple(content.get("include", ())),
            exclude=tuple(content.get("exclude", ())),
            droplet_size=content.get("droplet_size"),
            droplet_image=content.get("droplet_image"),
            api_url=url.rstrip("/").removesuffix("/v2"),
            healthchecks=ping,
            keep=Keep(**{**dict.fromkeys(numbers, 0), **content["keep"]}) if "keep" in content else Keep(),
            check=check,
        )

    @classmethod
    def _check(
        cls, path: Path, content: Json, known: Mapping[str, tuple[tuple[type, ...], str]], where: str = ""
    ) -> None:
        """Check that each key is known, and the type of its value; raises UsageError."""
        for key, value in content.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}"
                raise UsageError(f'{path}: unknown key{where} "{key}": {hint}')
            types, must_be = known[key]
            is_fit = type(value) in types  # a bool is an int to isinstance
            if isinstance(value, list):
                is_fit = is_fit and all(isinstance(name, str) for name in value)
            if not is_fit or (isinstance(value, int) and not 0 <= value <= 10_000):
                raise UsageError(f'{path}: "{key}"{where} must be {must_be}')

    @staticmethod
    def _read(path: Path) -> Json:
        """The JSON object in the file."""
        text = ""
        try:
            text = path.read_text(encoding="utf-8-sig")
            content = json.loads(text)
        except FileNotFoundError:
            raise UsageError(
                f"there is no {path}: copy conf.json.example to {path} and put your token and region in it"
            ) from None
        except json.JSONDecodeError as problem:
            what, at = problem.msg, problem.pos
            for comma in re.finditer(r",\s*[]}]", text):  # Python reports it as something else, each version its own
                if comma.start() <= at <= comma.end():
                    what, at = f"a comma too many, before the {comma[0][-1]}", comma.start()
            line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
            raise UsageError(f"{path}: line {line}, column {column}: not JSON: {what}") from None
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(f"cannot read {path}: {problem}") from None
        if not isinstance(content, dict):
            raise UsageError(f"{path}: must hold an object, {{…}}, as conf.json.example does")
        return content

    @staticmethod
    def _is_open_to_others(path: Path) -> bool:
        """Whether a file's mode lets others read it; False where the file system has no modes, and shows fixed ones."""
        if not path.stat().st_mode & 0o077:
            return False
        try:
            with tempfile.TemporaryFile(dir=path.absolute().parent) as private:
                return not os.fstat(private.fileno()).st_mode & 0o077
        except OSError:  # as in the container, where it is read-only
            return not re.match("fuse|exfat|v?fat|msdos|ntfs|cifs|smb|9p", Mount.of(path).kind)

    @staticmethod
    def _is_private(url: str) -> bool:
        """Whether what is sent to an address stays secret on its way: by HTTPS, or within this very machine."""
        try:
            parts = urllib.parse.urlsplit(url)
            host = parts.hostname if parts.port != 0 else None  # reading an impossible port raises ValueError
        except ValueError:
            return False
        return bool(host) and (
            parts.scheme == "https" or (parts.scheme == "http" and host in ("127.0.0.1", "localhost", "::1"))
        )


# ── The DigitalOcean API ─────────────────────────────────────────────────────────────────────────────────────────────
# Calls that come back with an answer or with an error that says what to do. Knows how to page, when to wait, and what
# is safe to repeat; knows nothing of backups. The reference: https://docs.digitalocean.com/reference/api/

SCOPES = {
    # https://docs.digitalocean.com/reference/api/scopes/ ; a 403 does not name the missing scope, so we do.
    "GET /v2/account": "account:read",
    "GET /v2/regions": "regions:read",
    "GET /v2/sizes": "sizes:read",
    "GET /v2/images": "image:read",
    "GET /v2/actions": "actions:read",
    "GET /v2/account/keys": "ssh_key:read",
    "POST /v2/account/keys": "ssh_key:create",
    "DELETE /v2/account/keys": "ssh_key:delete",
    "GET /v2/droplets": "droplet:read",
    "POST /v2/droplets": "droplet:create, ssh_key:read, tag:create, regions:read, sizes:read, image:read",
    "DELETE /v2/droplets": "droplet:delete",
    "GET /v2/snapshots": "snapshot:read, block_storage_snapshot:read",
    "DELETE /v2/snapshots": "snapshot:delete, block_storage_snapshot:delete",
    "GET /v2/volumes": "block_storage:read, block_storage_action:read",
    "POST /v2/volumes": "block_storage:create, block_storage_action:create, block_storage_snapshot:create, tag:create",
    "DELETE /v2/volumes": "block_storage:delete",
}


class ApiError(DosvobError):
    """A call failed. `status` is that of HTTP; None: no usable answer came.

    Of a 429 `wait` is the seconds that it asks for, and `is_accounts` tells that the account's limit is reached. If it
    is not, it is that of the call's own kind, or with a `wait` perhaps the account's for a minute.
    """

    def __init__(self, status: int | None, text: str, wait: float | None = None, *, is_accounts: bool = False) -> None:
        self.status = status
        self.wait = wait
        self.is_accounts = is_accounts
        super().__init__(text)

    @property
    def may_exist(self) -> bool:
        """Whether the call may have taken effect all the same."""
        return self.status is None or self.status >= 500 or self.status == 408

    @staticmethod
    def advice(call: str, status: int) -> str:
        """What the user can do about a refused call, as a sentence after a space; or nothing."""
        resource = next((key for key in sorted(SCOPES, key=len, reverse=True) if call.startswith(key)), "")
        by_status = {
            401: f" The token is wrong, expired or revoked: make a new one at {TOKENS_PAGE}",
            403: f" If it speaks of a limit, have it raised at {LIMITS_PAGE}; otherwise the token lacks a scope, this "
            f"call needs {SCOPES.get(resource, 'full access')}: {TOKENS_PAGE}",
            404: " It is gone, or belongs to another account: look in the control panel",
            409: " It is in use: dosvob tries again at its next run",
            422: f" Something about the request does not suit DigitalOcean; limits are at {LIMITS_PAGE}",
            429: " Too many requests: try again later",
        }
        if 300 <= status < 400:
            return f" It redirects, and your token goes nowhere else: is {Config.URL_VARIABLE} right?"
        return by_status.get(
            status, " It is DigitalOcean's fault: see https://status.digitalocean.com" * (status >= 500)
        )


class Api:
    """The calls. It repeats a failing one for `patience` seconds, if that is safe and may help.

    It reports every wait, and in detail every call. A stop ends the waiting with `Interrupted`, never a call that is
    under way.
    """

    PATIENCE = 300  # seconds
    DRY_RUN_PATIENCE = 20  # seconds: somebody waits for it
    TEARDOWN_PATIENCE = 10  # seconds: a teardown comes back to what failed, after it has tried the rest
    RATE_LIMIT_PATIENCE = 7200  # seconds for which a call that meets 429 is repeated: the longest limit is by the hour
    RATE_LIMIT_WAIT = 15  # seconds to wait after a 429 that does not say how long
    LONGEST_WAIT = 3600  # seconds; whatever a 429 asks for
    CLOCK_TOLERANCE = 120  # seconds that this machine's clock may be off before that is told
    CALL_TIMEOUT = (10, 60)  # seconds to connect, and between bytes of the answer
    CALL_LIMIT = 120  # seconds for all of a call
    FIRST_BACKOFF, MAX_BACKOFF = 0.5, 30  # seconds between repetitions, doubling
    IDLE_LIMIT = 60  # seconds after which a connection is not used again: a router may have forgotten it, silently
    PAGE_SIZE = 200  # the API's maximum
    MOST_PAGES = 1000  # of a list, which holds 25 droplets or 100 volumes for most accounts
    MOST_READINGS = 10  # of a list that changes meanwhile
    READING_PAUSE = 1  # seconds between them

    def __init__(self, config: Config, stop: Stop, report: Reporter, patience: float) -> None:
        self.stop = stop
        self._config = config
        self._report = report
        self._patience = patience
        self._is_token_known = False  # whether a call was let through
        self._ahead: float | None = None  # seconds that DigitalOcean's clock is ahead of this machine's, once known
        self.limited_since: float | None = None  # the first 429 of an unbroken row; None after any other answer
        self._sessions = threading.local()  # requests does not promise that a session can be shared by threads

    def with_stop(self, stop: Stop, patience: float | None = None) -> Api:
        """A copy with another stop, and another patience if one is given."""
        api = Api(self._config, stop, self._report, self._patience if patience is None else patience)
        api._is_token_known, api._ahead = self._is_token_known, self._ahead
        return api

    def now(self) -> datetime.datetime:
        """The time by DigitalOcean's clock, as its last answer told: machines at home are hours or days off."""
        return utc_now() + datetime.timedelta(seconds=self._ahead or 0)

    def get(self, path: str, **params: str | int) -> Json:
        """GET, repeated while it fails in a way that may pass."""
        return self._repeated("GET", path, params=params)

    def get_fresh(self, path: str, key: str, *, is_patient: bool = True) -> Json | None:
        """An item by its id; None if the API does not know it: not yet, or not any more. If impatient it asks once."""
        try:
            return Api.required(self.get(path) if is_patient else self._once("GET", path, None, None), key, dict)
        except ApiError as problem:
            if problem.status != 404:
                raise
            return None

    def delete(self, path: str) -> None:
        """DELETE, repeated likewise; that it is gone already is fine."""
        try:
            self._repeated("DELETE", path)
        except ApiError as problem:
            if problem.status != 404:
                raise

    def list(self, path: str, key: str, **params: str | int) -> list[Json]:
        """All items of a list, from all its pages, none twice.

        While pages are read others change the list, and what they delete on one page hides an item of the next. So
        several pages count if they have as many items as each says that there are, or the same as at the last reading.
        """
        last: Collection[str] = ()
        for _ in range(self.MOST_READINGS):
            items, totals = self._pages(path, key, params)
            if totals <= {str(len(items))} or items.keys() == last:
                return [*items.values()]
            last = items.keys()
            self.stop.sleep(self.READING_PAUSE)
        raise DosvobError(f"the list of GET {path} changed each time that it was read: try again later")

    def _pages(self, path: str, key: str, params: Json) -> tuple[dict[str, Json], set[str]]:
        """The items of all pages, by what identifies each, and how many there are, as each of several pages says."""
        items: dict[str, Json] = {}
        totals: set[str] = set()
        for page in range(1, self.MOST_PAGES + 1):
            answer = self.get(path, **params, per_page=self.PAGE_SIZE, page=page)
            found, links = answer.get(key), answer.get("links") or {}
            pages = (links.get("pages") or {}) if isinstance(links, dict) else None  # each may be missing, or null
            if not isinstance(found, list) or not all(isinstance(item, dict) for item in [*found, pages]):
                raise DosvobError(f'DigitalOcean answered GET {path} without a list of "{key}": try again later')
            items |= {str(item.get("id") or item.get("slug") or f"{page}/{n}"): item for n, item in enumerate(found)}
            has_next = bool(found and pages and pages.get("next"))
            if has_next or page > 1:
                meta = answer.get("meta")
                totals.add(str(meta.get("total") if isinstance(meta, dict) else None))
            if not has_next:
                return items, totals
        raise DosvobError(f"DigitalOcean's answers to GET {path} have no end: try again later")

    def post(self, path: str, body: Json) -> Json:
        """POST, repeated after a 429 only, for a snapshot if that is the account's: the caller waits for the volume's.

        If it fails with `may_exist`, the caller must find out whether it took effect.
        """
        return self._repeated("POST", path, body=body)

    def _repeated(self, method: str, path: str, body: Json | None = None, params: Json | None = None) -> Json:
        wait = self.repetition()
        takes_snapshot = method == "POST" and path.endswith("/snapshots")
        while True:
            try:
                return self._once(method, path, body, params)
            except ApiError as problem:
                is_limited = problem.status == 429 and (problem.is_accounts or not takes_snapshot)
                if not is_limited and not (problem.may_exist and method != "POST"):
                    raise
                wait(problem)

    def repetition(self) -> Callable[[ApiError], None]:
        """What to call before each repetition of a call: says so and waits, or raises when the patience would end."""
        start, intervals = time.monotonic(), pauses(self.FIRST_BACKOFF, self.MAX_BACKOFF, 2)

        def wait(problem: ApiError) -> None:
            pause, limit, what = next(intervals), start + self._patience, str(problem)
            if problem.status == 429:  # the limit is the account's, so all calls share the patience
                limit = min(start, self.limited_since or start) + self.RATE_LIMIT_PATIENCE
                pause = self.RATE_LIMIT_WAIT if problem.wait is None else problem.wait
                what = "DigitalOcean's rate limit is reached"
            if time.monotonic() + pause > limit:
                raise problem
            self._report.say(f"{what}; trying again in {pause:.0f} s")
            self.stop.sleep(pause)

        return wait

    def _once(self, method: str, path: str, body: Json | None, params: Json | None) -> Json:
        call, url = f"{method} {path}", self._config.api_url
        limit = min(self.CALL_LIMIT, max(self._patience, self.TEARDOWN_PATIENCE))
        self.stop.check()
        session = self._session()
        request = functools.partial(session.request, method, url + path, json=body, params=params)
        try:  # the token is for this host alone
            response = within(limit, lambda: request(timeout=self.CALL_TIMEOUT, allow_redirects=False))
        except TimeoutError:
            del self._sessions.session  # the abandoned call still uses it
            raise ApiError(None, f"{call}: no complete answer from {url} within {limit:.0f} s") from None
        except OSError as problem:  # which those of requests are, too
            cause = root_cause(problem)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise DosvobError(f"{url} has no certificate to be trusted: {cause}") from None
            if isinstance(problem, ValueError):  # as requests has it for what can be seen without a connection
                names = f"HTTPS_PROXY and ALL_PROXY in the environment, and {Config.URL_VARIABLE}"
                raise UsageError(f"{url} cannot be reached so: {cause} Look at {names}") from None
            if not isinstance(problem, requests.RequestException) or getattr(cause, "library", "") == "X509":
                names = "REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE in the environment"
                raise UsageError(f"the certificates to be trusted cannot be read: {cause}: look at {names}") from None
            raise ApiError(None, f"{call}: no answer from {url}: {reason(cause)}") from problem
        self._report.detail(f"{call} → {response.status_code}")
        self._heed_clock(response)
        self.limited_since = (self.limited_since or time.monotonic()) if response.status_code == 429 else None
        return self._answer(call, response)

    def _answer(self, call: str, response: requests.Response) -> Json:
        status = response.status_code
        try:
            answer = response.json() if response.content else {}
        except ValueError:
            answer = None
        if status == 401 and not self._is_token_known:
            raise UsageError(
                f"DigitalOcean does not accept the token in {self._config.token_from} (HTTP 401): it is wrong, "
                f"expired or revoked; make a new one at {TOKENS_PAGE}"
            )
        if status >= 300:
            told = answer if isinstance(answer, dict) else {"message": f"not JSON, {len(response.content)} bytes"}
            said = str(told.get("message") or told.get("id") or "no message")
            request = f", request {told['request_id']}" if told.get("request_id") else ""
            text = f'DigitalOcean refused {call}: "{said}" (HTTP {status}{request}).{ApiError.advice(call, status)}'
            is_accounts = response.headers.get("ratelimit-remaining") == "0"
            raise ApiError(status, text, self._wait_told(response), is_accounts=is_accounts)
        self._is_token_known = True
        if not isinstance(answer, dict):
            raise ApiError(None, f"{call}: the answer is not a JSON object")
        return answer

    def _heed_clock(self, response: requests.Response) -> None:
        """Note what DigitalOcean's clock says; tells once if this machine's is minutes off."""
        try:
            ahead = email.utils.parsedate_to_datetime(response.headers["date"]).timestamp() - time.time()
        except (KeyError, ValueError):
            return
        if self._ahead is None and abs(ahead) > self.CLOCK_TOLERANCE:
            how = f"{human_time(abs(ahead))} {'behind' if ahead > 0 else 'ahead of'}"
            self._report.warn(f"this machine's clock is {how} DigitalOcean's, whose times count; set it right")
        self._ahead = ahead

    def _wait_told(self, response: requests.Response) -> float | None:
        """The seconds to wait that a 429 tells: `retry-after` (burst limit), or `ratelimit-reset` (hourly limit)."""
        headers = response.headers
        with contextlib.suppress(KeyError, ValueError):
            return min(max(1.0, float(headers["retry-after"])), self.LONGEST_WAIT)
        with contextlib.suppress(KeyError, ValueError):
            if int(headers.get("ratelimit-remaining", 0)) == 0:
                now = time.time() + (self._ahead or 0)
                return min(max(1.0, float(headers["ratelimit-reset"]) - now), self.LONGEST_WAIT)
        return None

    @property
    def is_proxied(self) -> bool:
        """Whether the calls go through a proxy, as the environment asks for."""
        proxies = requests.utils.get_environ_proxies(self._config.api_url)
        return requests.utils.select_proxy(self._config.api_url, proxies) is not None

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._config.token}"
        return request

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._sessions, "session", None)
        if session is None or time.monotonic() - self._sessions.used_at > self.IDLE_LIMIT:
            session = self._sessions.session = requests.Session()
            session.auth = self._authorize  # a ~/.netrc would replace a plain header
            session.headers["User-Agent"] = f"dosvob/{VERSION}"
        self._sessions.used_at = time.monotonic()
        return session

    @staticmethod
    def required(item: Json, key: str, kind: type[T]) -> T:
        """A field of an answer, of the type it must have."""
        value = item.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DosvobError(f'DigitalOcean\'s answer has no usable "{key}": try again later')
        return value


@dataclass(frozen=True)
class Volume:
    """A volume of the account; `size` in bytes."""

    id: str
    name: str
    region: str
    size: int

    @classmethod
    def parse(cls, item: Json) -> Volume:
        """From the API's volume object."""
        return cls(
            id=Api.required(item, "id", str),
            name=Api.required(item, "name", str),
            region=Api.required(Api.required(item, "region", dict), "slug", str),
            size=Api.required(item, "size_gigabytes", int) * GIB,
        )


# ── Ephemeral resources ──────────────────────────────────────────────────────────────────────────────────────────────
# What a run creates and must remove: key, droplet, snapshots, clones. The name, `dosvob-ephemeral-HOME-RUN-…`, tells
# whose they are: so we also find what an earlier run left behind, and what was created though the answer was lost.

TAG = "dosvob-ephemeral"
LIST_LAG = 6  # seconds after which a list is taken to show what was created: lists have been seen to lag behind
BUSY_LIMIT = 120  # seconds for which a droplet may be busy with another event, or a volume with its droplet
HOURS_PER_MONTH = 730
UNKNOWN = "unknown"  # the id of what may be there, and cannot be listed
GONE = "is gone, or off: another run with the same backups directory may have removed it, from another machine"


class NoDroplet(DosvobError):
    """The droplet could not be had, so nothing can be done."""


class DropletLost(DosvobError):
    """The droplet is gone, did not come up, or takes no more events: another one may do."""


@dataclass(frozen=True)
class Kind:
    """A kind of resource: where the API lists it, where the control panel shows it, and what it costs.

    `gib_hour` is its price in dollars per GiB and hour, `least` what it costs at least, `step` the seconds to which its
    time is rounded up. Droplets: by the second, at least $0.01 (DigitalOcean's answer at
    https://www.digitalocean.com/community/questions/how-billing-works-for-1-hour). Volumes: by the hour
    (https://docs.digitalocean.com/products/volumes/details/pricing/). Snapshots: at least $0.01, however short
    (https://docs.digitalocean.com/products/images/snapshots/details/pricing/).
    """

    path: str
    key: str
    panel: str
    params: Mapping[str, str] = field(default_factory=dict)
    gib_hour: float = 0.0
    least: float = 0.0
    step: float = 1.0


DROPLET, VOLUME, SNAPSHOT, KEY = "droplet", "volume", "snapshot", "SSH key"
KINDS: Mapping[str, Kind] = {  # in the order in which removing them works
    DROPLET: Kind("/v2/droplets", "droplets", "/droplets", least=0.01),
    VOLUME: Kind("/v2/volumes", "volumes", "/volumes", gib_hour=0.10 / HOURS_PER_MONTH, step=3600),
    SNAPSHOT: Kind(
        *("/v2/snapshots", "snapshots", "/images/snapshots/volumes", {"resource_type": "volume"}),
        gib_hour=0.06 / HOURS_PER_MONTH,
        least=0.01,
    ),
    KEY: Kind("/v2/account/keys", "ssh_keys", "/account/security"),
}


@dataclass(frozen=True)
class Resource:
    """Something of ours in the account; `hourly` is its price in dollars per hour."""

    kind: str
    id: str
    name: str = field(compare=False)
    hourly: float = field(default=0.0, compare=False)
    created_at: str = field(default="", compare=False)

    NAME = re.compile(rf"{TAG}-([0-9a-f]{{8}})-[0-9a-f]{{8}}-")

    @classmethod
    def parse(cls, kind: str, item: Json) -> Resource:
        """From the API's object."""
        identifier = item.get("id")
        if not isinstance(identifier, (str, int)):
            raise DosvobError(f"DigitalOcean listed a {kind} without an id: try again later")
        droplet_price = (item.get("size") or {}).get("price_hourly") if kind == DROPLET else 0
        hourly = float(droplet_price or 0) + float(item.get("size_gigabytes") or 0) * KINDS[kind].gib_hour
        return cls(kind, str(identifier), str(item.get("name")), hourly, str(item.get("created_at", "")))

    @staticmethod
    def is_ephemeral(item: Json) -> bool:
        """Whether dosvob made it, by its tag or its name: tags on volumes have been seen not to stick."""
        return str(item.get("name")).startswith(TAG + "-") or TAG in (item.get("tags") or ())

    @classmethod
    def list(cls, api: Api, kind: str) -> list[Resource]:
        """All ephemeral resources of a kind in the account, of whatever home."""
        items = api.list(KINDS[kind].path, KINDS[kind].key, **KINDS[kind].params)
        return [cls.parse(kind, item) for item in items if cls.is_ephemeral(item)]

    @property
    def home(self) -> str:
        """The home that it belongs to; empty for what older versions, or the original dosvob, have left."""
        match = self.NAME.match(self.name)
        return match[1] if match else ""

    @property
    def path(self) -> str:
        """Its path in the API."""
        return f"{KINDS[self.kind].path}/{urllib.parse.quote(self.id, safe='')}"

    def cost(self, seconds: float) -> float:
        """Dollars for so long."""
        kind = KINDS[self.kind]
        steps = -(-seconds // kind.step)
        return max(kind.least, self.hourly * steps * kind.step / 3600)

    def __str__(self) -> str:
        cost = f", ${self.hourly * HOURS_PER_MONTH:.2f} a month" if self.hourly else ""
        return f"{self.kind} {self.name} (id {self.id}{cost})"


def reached_limit(api: Api, kind: str) -> str:
    """What to say if the account has as many of a kind as it may have; empty if not."""
    limit = Api.required(api.get("/v2/account"), "account", dict).get(f"{kind}_limit")
    count = len(api.list(KINDS[kind].path, KINDS[kind].key))
    is_reached = isinstance(limit, int) and count >= limit
    return f"your account may have {limit} {kind}s and has {count}: see {LIMITS_PAGE}" if is_reached else ""


class Removal:
    """Deletes the resources that are known, then those that are listed, until the lists show none of ours.

    `is_ours` selects them. An empty list counts if it was asked for after `not_before` (time.monotonic): the last
    creation plus LIST_LAG. What fails is tried again with growing pauses, for a volume cannot be deleted for some
    seconds after its droplet's deletion was accepted.
    """

    LIMIT = 600  # seconds without progress after which it gives up

    def __init__(
        self,
        api: Api,
        is_ours: Callable[[Resource], bool],
        not_before: float,
        note: Callable[[str], None],
        kinds: Iterable[str] = KINDS,
    ) -> None:
        self._api = api
        self._is_ours = is_ours
        self._not_before = not_before
        self._note = note
        self._kinds = dict.fromkeys(kinds, False)  # those that are not done, and whether their last list was empty
        self._known: list[Resource] = []
        self._gone: set[Resource] = set()  # whose deletion was accepted

    def run(self, known: Iterable[Resource] = (), asked: Mapping[str, str] | None = None) -> dict[Resource, str]:
        """Remove; returns what stays, with the reason.

        `known` certainly was created. `asked` maps the names of what may have been, for no answer came, to its kinds:
        if its kind cannot be listed, it is returned too, with the id UNKNOWN.
        """
        self._known = sorted(known, key=lambda resource: list(KINDS).index(resource.kind))
        self._delete(self._known)
        since, fewest, intervals = time.monotonic(), sys.maxsize, pauses(0.3, 5, 1.5)
        while self._kinds:
            begun = time.monotonic()
            left = self._round()
            if len(left) < fewest:  # it gets on
                since, fewest = time.monotonic(), len(left)
            is_hopeless = begun >= self._not_before and self._is_hopeless(left)
            if left and (is_hopeless or begun - since > self.LIMIT):  # a round may take long
                return self._named(left, asked or {})
            if self._kinds:
                pause = next(intervals) if any(left.values()) else 1  # once all was accepted it is gone soon
                self._api.stop.sleep(pause if left else max(self._not_before - time.monotonic(), 0))
        return {}

    def _round(self) -> dict[Resource, Exception | None]:
        """List each kind and delete what is there; returns what is left, with what went wrong, None for nothing.

        A known resource is there until its deletion is accepted, whatever a list says.
        """
        left: dict[Resource, Exception | None] = {}
        for kind, was_empty in list(self._kinds.items()):
            asked = time.monotonic()
            if was_empty and asked < self._not_before:  # DigitalOcean answers ten lists of keys a minute, and no more
                continue
            found = [resource for resource in self._known if resource.kind == kind and resource not in self._gone]
            try:
                found += filter(self._is_ours, Resource.list(self._api, kind))
            except Exception as problem:  # noqa: BLE001 - however odd an answer is, the rest must go
                left[Resource(kind, UNKNOWN, f"{TAG}-*")] = problem
            else:
                self._kinds[kind] = not found
                if not found and asked >= self._not_before:
                    del self._kinds[kind]
            left |= self._delete(found)
        return left

    def _delete(self, found: Iterable[Resource]) -> dict[Resource, Exception | None]:
        """Ask for the deletion of each; returns what went wrong with it, None if nothing did: it may take a while."""
        problems: dict[Resource, Exception | None] = dict.fromkeys(found)
        for resource in problems:
            self._note(f"removing {resource}")
            try:
                self._api.delete(resource.path)
                self._gone.add(resource)
            except Exception as problem:  # noqa: BLE001 - as above
                problems[resource] = problem
        return problems

    @staticmethod
    def _is_hopeless(left: Mapping[Resource, Exception | None]) -> bool:
        """Whether to try again is useless: the token may not do it, or what it may not delete uses the rest."""
        refused = [resource.kind for resource, problem in left.items() if isinstance(problem, ApiError)
                   and problem.status in (401, 403)]  # fmt: skip
        return len(refused) == len(left) or (
            DROPLET in refused and {resource.kind for resource in left} <= {*refused, VOLUME}
        )

    @staticmethod
    def _named(left: Mapping[Resource, Exception | None], asked: Mapping[str, str]) -> dict[Resource, str]:
        """What is left, with reasons; for a kind that could not be listed, the names of what may be there."""
        named: dict[Resource, str] = {}
        for resource, problem in left.items():
            reason = str(problem or "it is still listed")
            if resource.id == UNKNOWN:
                names = [name for name, kind in asked.items() if kind == resource.kind]
                resource = Resource(resource.kind, UNKNOWN, ", ".join(names) or resource.name)  # noqa: PLW2901
            named[resource] = reason
        return named


def tell_left_behind(left: Mapping[Resource, str], report: Reporter, *, of_all: bool = False) -> None:
    """Say loudly what could not be removed, and why; `of_all` if all homes' leftovers were to be removed."""
    report.left |= set(left)
    for resource, reason in left.items():
        what = "there may be something " if resource.id == UNKNOWN else ""
        billed = ", and billed until you remove it" if resource.hourly or resource.id == UNKNOWN else ""
        run = command_line("sweep", *["--all"] * of_all)
        report.error(
            f"{what}LEFT BEHIND{billed}: {resource}. {reason}. Remove it at "
            f"https://cloud.digitalocean.com{KINDS[resource.kind].panel} or run: {run}"
        )


@dataclass(frozen=True)
class DropletPlan:
    """What droplet to create: slugs of its possible sizes, cheapest first, each with its price in dollars per hour."""

    region: str
    sizes: tuple[tuple[str, float], ...]
    image: str

    # The smallest, of which the first is not in all regions. A run of less than half an hour costs the same with each.
    DEFAULT_SIZES = ("s-1vcpu-512mb-10gb", "s-1vcpu-1gb", "s-1vcpu-2gb")

    @classmethod
    def make(cls, api: Api, config: Config, region: str) -> DropletPlan:
        """Check region, size and image against what DigitalOcean offers now; raise UsageError for what it does not."""
        regions = {str(item.get("slug")): item for item in api.list("/v2/regions", "regions")}
        fit = sorted(slug for slug, item in regions.items()
                     if item.get("available") and "storage" in (item.get("features") or ()))  # fmt: skip
        if region not in fit:
            is_there = region in regions
            what = f'region "{region}" has no volumes or is closed' if is_there else f'there is no region "{region}"'
            raise UsageError(f"{what}; those with volumes are {', '.join(fit)}")

        prices = {
            str(item.get("slug")): float(item.get("price_hourly") or 0)
            for item in api.list("/v2/sizes", "sizes")
            if item.get("available") and region in (item.get("regions") or ())
        }
        sizes = (config.droplet_size,) if config.droplet_size else cls.DEFAULT_SIZES
        usable = sorted(((slug, prices[slug]) for slug in sizes if slug in prices), key=lambda size: size[1])
        if not usable:
            cls._refuse("size", sizes, sorted(prices, key=prices.__getitem__), region)

        images = [
            str(item["slug"])
            for item in api.list("/v2/images", "images", type="distribution")
            if item.get("slug") and item.get("status") != "retired" and region in (item.get("regions") or ())
        ]
        debians = sorted((int(m[1]), m[0]) for slug in images if (m := re.fullmatch(r"debian-(\d+)-x64", slug)))
        image = config.droplet_image or (debians[-1][1] if debians else "debian-x64")
        if image not in images:
            cls._refuse("image", [image], images, region)
        return cls(region, tuple(usable), image)

    @staticmethod
    def _refuse(what: str, wanted: Sequence[str], offered: Sequence[str], region: str) -> NoReturn:
        near = difflib.get_close_matches(wanted[0], offered, n=3) or offered[:3]
        raise UsageError(
            f'droplet {what} "{" or ".join(wanted)}" is not to be had in {region} now: '
            f'set "droplet_{what}" in conf.json to one of {", ".join(near) or "another region, there is none"}'
        )


@dataclass(frozen=True)
class Droplet:
    """The running droplet."""

    id: int
    name: str
    address: str


class Ephemeral:
    """All that one run creates. As a context manager it removes it at the end, whatever happens, by `Removal`.

    A home has one run at a time, so the end also removes what an earlier run of this home left, and lists showed too
    late for the sweep at the beginning. It does not wait again for what could not be removed before.
    """

    ACTION_LIMIT = 150  # seconds after which an action, such as an attach, has no end: it takes some 7
    LOOK_INTERVAL = 12  # polls of an action, some 9 s, between looks whether the droplet lives
    ADDRESS_LIMIT = 600  # seconds until a new droplet must have an address
    FRESH_LIMIT = 60  # seconds for which something freshly created may answer 404
    NEW_PATIENCE = 1800  # seconds for which it repeats the creation of what will stay: hours of work precede it
    HOUR_ENDS = 3300  # seconds into an hour of a volume's life after which it is let go: its next hour costs as much

    def __init__(self, api: Api, home: str, report: Reporter) -> None:
        self.prefix = f"{TAG}-{home}-{secrets.token_hex(4)}-"
        self._home = home
        self._api = api
        self._report = report
        self._created: dict[Resource, float] = {}  # with the times (`running_time`)
        self._removed: dict[Resource, float] = {}
        self._asked: dict[str, str] = {}  # kinds by name of what was asked for, and not answered yet
        self._last_post = time.monotonic()
        self._key: int | None = None  # the id of the run's one-time key
        self._attached: dict[str, int] = {}  # droplets by clone
        self._events = threading.RLock()  # a droplet takes one at a time, and one may last longer than BUSY_LIMIT
        self._quickest = 0.0  # seconds of the quickest action so far, before which no other one is expected to end
        self._lost: dict[int, str] = {}  # why droplets, by id, are gone or take no more events

    def __enter__(self) -> Ephemeral:
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove everything, and say loudly what stays."""
        existing = [resource for resource in self._created if resource not in self._removed]
        counts = sorted(collections.Counter(resource.kind for resource in existing).items())
        told = ", ".join(counted(count, kind) for kind, count in counts) or "what may have been created"
        self._report.say(f"removing {told}: all that is named {self.prefix}…")
        api, note = self._api.with_stop(Stop(), Api.TEARDOWN_PATIENCE), self._report.doing  # no signal ends this
        try:
            left = Removal(api, self._is_ours, self._last_post + LIST_LAG, note).run(existing, self._asked)
        except Exception as problem:  # noqa: BLE001 - even after a bug in here: tell what there may be
            self._report.detail(traceback.format_exc())
            unknown = [Resource(kind, UNKNOWN, name) for name, kind in self._asked.items()]
            left = dict.fromkeys([*existing, *unknown], str(problem))
        for resource in existing:
            if resource not in left:
                self._removed[resource] = running_time()
        tell_left_behind(left, self._report)

    def _is_ours(self, resource: Resource) -> bool:
        return resource.home in ("", self._home) and resource not in self._report.left

    def cost(self) -> float:
        """Dollars for all that was created, by the seconds that it existed until now."""
        now = running_time()
        return sum(resource.cost(self._removed.get(resource, now) - since) for resource, since in self._created.items())

    def create_droplet(self, plan: DropletPlan, public_key: str, user_data: str) -> Droplet:
        """Create the droplet in the first size that can be had, and wait until it is active and has an address.

        The key, which lets us in, is registered first, once in a run. Raises ApiError if DigitalOcean refuses that,
        NoDroplet if it refuses the droplet, DropletLost if that did not come up.
        """
        if self._key is None:
            key = self._create(KEY, {"name": f"{self.prefix}key", "public_key": public_key})
            self._key = Api.required(key, "id", int)
        made = sum(resource.kind == DROPLET for resource in list(self._created))
        sizes = [size for size, _ in plan.sizes]
        item: Json | None = None
        while item is None:
            size = sizes.pop(0)
            body = {
                "name": f"{self.prefix}droplet{f'-{made}' * bool(made)}",  # unique, so that it can be looked for
                "region": plan.region,
                "size": size,
                "image": plan.image,
                "ssh_keys": [self._key],
                "user_data": user_data,
                "tags": [TAG],
                "with_droplet_agent": False,
            }
            try:
                item = self._create(DROPLET, body)
            except ApiError as problem:
                if problem.status != 422 or not sizes or self._has_all_droplets():
                    raise NoDroplet(f"the droplet could not be had: {problem}") from problem
                self._report.say(f"{size} is not to be had in {plan.region} now; trying the next size")
        droplet = Droplet(Api.required(item, "id", int), Api.required(item, "name", str), "")
        actions = (item.get("links") or {}).get("actions") or [{}]  # what was found in a list has none
        address = self._await_address(droplet, str(actions[0].get("id", "")))
        return dataclasses.replace(droplet, address=address)

    def _has_all_droplets(self) -> bool:
        """Whether the account has as many droplets as it may have, as far as the token lets us see."""
        with contextlib.suppress(DosvobError):
            return bool(reached_limit(self._api, DROPLET))
        return False

    def _await_address(self, droplet: Droplet, action: str) -> str:
        """The public address of a droplet that was created; raises DropletLost if it, or its action, has failed."""
        known, looks, start = False, 0, time.monotonic()

        def address() -> str | None:
            nonlocal known, looks
            item = self._api.get_fresh(f"/v2/droplets/{droplet.id}", "droplet")
            if item is None and (known or time.monotonic() - start > self.FRESH_LIMIT):
                raise DropletLost(f"the droplet {droplet.name} {GONE}")
            known, looks = item is not None, looks + 1
            if item is not None and item.get("status") == "active":
                networks = (item.get("networks") or {}).get("v4") or ()
                return next((str(net["ip_address"]) for net in networks if net.get("type") == "public"), None)
            if action and looks % 4 == 0:  # seldom: the API allows 250 requests a minute
                status = (self._api.get_fresh(f"/v2/actions/{action}", "action") or {}).get("status")
                if status == "errored":
                    raise DropletLost(f"the creation of the droplet {droplet.name} failed on DigitalOcean's side")
            return None

        found = self._api.stop.wait_until(self.ADDRESS_LIMIT, address)
        if found is None:
            raise DropletLost(f"{droplet.name} was not active, with an address, within {self.ADDRESS_LIMIT} s")
        return found

    def is_gone(self, droplet: Droplet) -> bool:
        """Whether the droplet does not run any more, as far as DigitalOcean can tell at once."""
        try:
            item = self._api.get_fresh(f"/v2/droplets/{droplet.id}", "droplet", is_patient=False)
        except ApiError:
            return False
        return item is None or item.get("status") != "active"

    def _refuse_lost(self, droplet: Droplet) -> None:
        """Raise DropletLost if the droplet is gone."""
        if self.is_gone(droplet):
            self._give_up(droplet, f"the droplet {droplet.name} {GONE}")

    def _give_up(self, droplet: Droplet, why: str) -> NoReturn:
        """Raise DropletLost, and let nobody else try."""
        self._lost[droplet.id] = why
        raise DropletLost(why)

    def remove_droplets(self) -> None:
        """Remove the run's droplets that are still there; nothing is attached to them any more."""
        for resource in list(self._created):
            if resource.kind == DROPLET and resource not in self._removed:
                self._remove_now(resource)

    def take_snapshot(self, volume: Volume, name: str) -> Json:
        """A snapshot of a volume as it is now; `name` tells it from the run's others.

        Raises ApiError with the status 429 if the volume's last one is less than ten minutes old.
        """
        body = {"name": f"{self.prefix}{name}", "tags": [TAG]}
        return self._create(SNAPSHOT, body, f"/v2/volumes/{volume.id}/snapshots")

    def make_clone(
        self, volume: Volume, number: int, size: int = 0, make_room: Callable[[], bool] = lambda: False
    ) -> tuple[Volume, str]:
        """Clone the volume as it is now; returns the clone and the time of the snapshot between, which is removed.

        It has at least `size` bytes. `make_room` frees some of the account's quota if that refuses the clone, and
        returns whether it could. Raises as `take_snapshot` does.
        """
        snapshot = self.take_snapshot(volume, str(number))
        name = f"{self.prefix}{number}"  # the device is named by it: unique and short
        body = {"name": name, "region": volume.region, "size_gigabytes": max(volume.size, size) // GIB, "tags": [TAG]}
        clone = self._make_of(snapshot, body, make_room=make_room)
        self._remove_now(Resource.parse(SNAPSHOT, snapshot))
        return Volume.parse(clone), self._time_of(snapshot)

    def _time_of(self, snapshot: Json) -> str:
        """When it was taken; now, by DigitalOcean's clock, if the time that it gives is impossible.

        Versions are named and thinned by it, so a time that is far in the future would spoil all that come after.
        """
        text, now = str(snapshot.get("created_at")), self._api.now()
        taken = parse_time(text)
        is_possible = taken is not None and taken.year >= 2000 and taken - now < datetime.timedelta(days=1)
        return text if is_possible else now.isoformat()

    def make_empty(self, region: str, size: int) -> Volume:
        """A throwaway volume of so many bytes that has nothing."""
        body = {"name": f"{self.prefix}0", "region": region, "size_gigabytes": size // GIB, "tags": [TAG]}
        return Volume.parse(self._create(VOLUME, body))

    def make_new(self, name: str, description: str, volume: Volume, snapshot: Json) -> Volume:
        """Create a volume of the snapshot of a throwaway one; it stays, for the teardown does not know of it.

        If DigitalOcean refuses, which may be for a quota, the throwaway one goes first: its snapshot has all.
        """
        body = {"name": name, "region": volume.region, "size_gigabytes": volume.size // GIB}
        body["description"] = description  # tells it from somebody else's if the answer is lost
        patient = self._api.with_stop(self._api.stop, self.NEW_PATIENCE)
        wait, has_freed_quota = patient.repetition(), False
        try:
            while True:
                try:
                    return Volume.parse(self._make_of(snapshot, body, patient, stays=True))
                except ApiError as problem:
                    if problem.status not in (403, 422):
                        raise
                    if has_freed_quota:
                        wait(problem)
                        continue
                    self._report.say(f"{problem}; removing {volume.name}, whose snapshot has all, to make room")
                self.remove_droplets()
                self._remove_now(self._resource(volume))
                has_freed_quota = True
        finally:
            if self._asked.pop(name, None):
                self._report.warn(f"it is not known whether the volume {name} was made: if it is there, it is whole")

    def _make_of(
        self,
        snapshot: Json,
        body: Json,
        api: Api | None = None,
        *,
        stays: bool = False,
        make_room: Callable[[], bool] = lambda: False,
    ) -> Json:
        """The volume that a body describes, with the content of a snapshot."""
        least = max(body["size_gigabytes"], int(snapshot.get("min_disk_size") or 0))
        body = {**body, "snapshot_id": Api.required(snapshot, "id", str), "size_gigabytes": least}

        def create() -> Json | None:
            while True:
                try:
                    return self._create(VOLUME, body, api=api, stays=stays)
                except ApiError as problem:
                    if problem.status == 404:
                        return None  # the snapshot is so fresh that it is not known yet
                    if not (problem.status == 403 and make_room()):
                        raise

        item = self._api.stop.wait_until(self.FRESH_LIMIT, create)
        if item is None:
            raise DosvobError("DigitalOcean lost the snapshot that it had just made: try again later")
        return item

    def attach(self, volume: Volume, droplet: Droplet, make_room: Callable[[], bool] = lambda: False) -> None:
        """Attach the volume to the droplet, unless it is; `make_room` detaches another one if it may have too many."""
        if self._attached.get(volume.id) != droplet.id:
            self._volume_event("attach", volume, droplet, make_room)
            self._attached[volume.id] = droplet.id

    def release(self, clone: Volume, droplet: Droplet) -> None:
        """Detach the clone, unless the droplet that it was attached to is gone, and delete it."""
        if self._attached.get(clone.id) == droplet.id:
            self._volume_event("detach", clone, droplet)
            del self._attached[clone.id]
        self._remove_now(self._resource(clone))

    def has_cost_an_hour(self, clone: Volume) -> bool:
        """Whether the started hour of a clone, which is paid for, is nearly over."""
        return (running_time() - self._created[self._resource(clone)]) % 3600 > self.HOUR_ENDS

    @staticmethod
    def _resource(volume: Volume) -> Resource:
        return Resource(VOLUME, volume.id, volume.name)

    def _create(
        self, kind: str, body: Json, post_path: str | None = None, *, api: Api | None = None, stays: bool = False
    ) -> Json:
        """Create a resource, and note it for the teardown unless it `stays`; returns it with the answer's links.

        After no answer, or a 5xx, it may exist. Then we look for its unique name, until a list must show it, and only
        then ask again. A refusal of that may mean that it does exist, so we look once more. `_asked` has the name for
        as long as we do not know.
        """
        where, name, api = KINDS[kind], body["name"], api or self._api
        wait, wait_after_refusal, is_doubtful = api.repetition(), self._api.repetition(), name in self._asked

        def find() -> Json | None:
            known = {key: body[key] for key in ("name", "description") if key in body}
            for item in api.list(where.path, where.key, **where.params):
                region = (item.get("region") or {}).get("slug")  # a volume may have a namesake in another one
                if known.items() <= item.items() and body.get("region", region) == region:
                    return item
            return None

        item: Json | None = None
        while item is None:
            api.stop.check()
            self._asked[name] = kind
            try:
                answer = api.post(post_path or where.path, body)
                links = answer.get("links") or {}
                item = {"links": links, **Api.required(answer, where.key.removesuffix("s"), dict)}
            except ApiError as problem:
                if not problem.may_exist and not is_doubtful:
                    del self._asked[name]
                    raise
                is_doubtful, self._last_post = True, time.monotonic()
                item = api.stop.wait_until(LIST_LAG, find)
                if item is None and not (problem.may_exist or problem.status in (403, 409, 422)):
                    raise
                if item is None:  # a refusal is not waited for as long as what will stay may be
                    (wait if problem.may_exist else wait_after_refusal)(problem)
            finally:
                self._last_post = time.monotonic()
        resource = Resource.parse(kind, item)
        if not stays:
            self._created[resource] = running_time()
        del self._asked[name]
        self._report.detail(f"created {resource}")
        return item

    def _remove_now(self, resource: Resource) -> None:
        """Remove what is not needed any more; what does not go is left to the end of the run."""

        def delete() -> bool | None:
            try:
                self._api.delete(resource.path)
            except ApiError as problem:
                self._report.detail(f"{problem}; {resource} is removed at the end of the run, if not before")
                return None if problem.status in (409, 422) else False  # in use
            return True

        if self._api.stop.wait_until(BUSY_LIMIT, delete):
            self._removed[resource] = running_time()

    def _volume_event(
        self, event: str, volume: Volume, droplet: Droplet, make_room: Callable[[], bool] = lambda: False
    ) -> None:
        """Attach or detach, however often it takes until the volume is as wished.

        Raises DropletLost if the droplet is gone, or takes no more events: one has no end, or it stays busy.
        """
        failures: list[DosvobError] = []
        with self._events:
            work = functools.partial(self._try_event, event, volume, droplet, make_room, failures)
            if self._api.stop.wait_until(BUSY_LIMIT, work) is None:
                if isinstance(failures[-1], ApiError) and failures[-1].status in (409, 422):
                    self._give_up(droplet, f"{droplet.name} was busy for {BUSY_LIMIT} s: {failures[-1]}")
                raise failures[-1]

    def _try_event(
        self, event: str, volume: Volume, droplet: Droplet, make_room: Callable[[], bool], failures: list[DosvobError]
    ) -> bool | None:
        """Ask for the event and await its end; True if the volume is as wished, None if it should be asked again."""
        if droplet.id in self._lost:
            raise DropletLost(self._lost[droplet.id])
        path, body = f"/v2/volumes/{volume.id}/actions", {"droplet_id": droplet.id, "region": volume.region}
        try:
            action = Api.required(self._api.post(path, {"type": event, **body}), "action", dict)
        except ApiError as refused:
            # busy with another event, attached or detached already, too fresh to be known, or an answer lost
            if not (refused.may_exist or refused.status in (404, 409, 422, 429)):
                raise
            failures.append(refused)
            self._refuse_lost(droplet)
            if self._is_done(event, volume, droplet):
                return True
            if refused.status == 422 and make_room():  # it may have as many volumes as it can have
                return self._try_event(event, volume, droplet, make_room, failures)
            return None
        status = self._await_action(f"{path}/{Api.required(action, 'id', int)}", droplet)
        if status == "completed" or self._is_done(event, volume, droplet):
            return True
        self._refuse_lost(droplet)
        if status is None:
            self._give_up(droplet, f"the {event} of {volume.name} did not end within {self.ACTION_LIMIT} s")
        failed = DosvobError(f"the {event} of {volume.name} failed on DigitalOcean's side ({status}): try again later")
        if failures and not isinstance(failures[-1], ApiError):  # for the second time
            raise failed
        failures.append(failed)
        return None

    def _is_done(self, event: str, volume: Volume, droplet: Droplet) -> bool:
        """Whether the volume is as wished, as itself tells."""
        item = self._api.get_fresh(f"/v2/volumes/{volume.id}", "volume")
        return item is not None and (droplet.id in (item.get("droplet_ids") or ())) == (event == "attach")

    def _await_action(self, path: str, droplet: Droplet) -> str | None:
        """What the status of an action of a droplet is when it has ended; None if that takes too long."""
        looks = itertools.count(1)

        def status() -> str | None:
            action = self._api.get_fresh(path, "action") or {}
            if action.get("status") not in (None, "in-progress"):
                return str(action["status"])
            if next(looks) % self.LOOK_INTERVAL == 0:
                self._refuse_lost(droplet)
            return None

        begun = time.monotonic()
        self._api.stop.sleep(0.8 * self._quickest)
        ended = self._api.stop.wait_until(self.ACTION_LIMIT, status)
        self._quickest = min(self._quickest or self.ACTION_LIMIT, time.monotonic() - begun)
        return ended


# ── The agent ────────────────────────────────────────────────────────────────────────────────────────────────────────
# The part that runs on the droplet: it reads the volume once (what it must send of a large change: twice), sends a
# digest for each chunk, sends the pages that it is asked for, and writes those that it is given. Another program, the
# `Checker`, then tries whether what is on the volume comes up. Their source stands between the marks "agent: begin" and
# "agent: end" in this file. We send it over SSH, and the droplet's own python3 runs it: so it uses the standard library
# of Python 3.8 alone.
#
# Frames (agent to here) are FRAME (kind, index, length of the payload), then the payload:
#   HELLO    AGENT_MAGIC, the device's size in bytes (8 bytes),      the first frame
#            whether there is zstd there (1 byte)
#   DIGEST   a chunk's digest                                        at most `window` are announced and not forgotten
#   ZEROS    a count (4 bytes)                                       so many chunks from the index on are all zeros
#   SHORT    the first SHORT_SIZE bytes of each page digest          in answer to COMPARE
#   RAW      a bitmap of the pages that follow, then the pages       in answer to SEND; pages that were asked for and
#   ZLIB     the same, the pages compressed with zlib                are not in the bitmap are all zeros
#   ZSTD     the same, the pages compressed with zstd
#   ALIVE    nothing                                                 when there has been nothing to say for a while
#   FAILED   a message                                               the agent cannot go on
# Digests (and ZEROS) come in the order of `parts`, without gaps, and overtake queued answers. Those come in any order.
# Commands (from here to the agent) are COMMAND (kind, index, count, bitmap), all of one length:
#   DROP     forget `count` chunks from the index on                 COMPARE   send the chunk's SHORT
#   SEND     send the pages in the bitmap, forget the chunk; `count` is the percentage of this end's reads that waited
#   WRITE    write the pages in the bitmap, forget the chunk: they are in the frame that follows, as in answer to SEND
# The agent obeys a command that follows a WRITE after it. It ends when its input does.
#
# An agent that writes first waits for the end of the one before it, which may not have noticed that its connection is
# gone. Then it flushes what that one wrote, and drops the kernel's cache: so its digests are of what the device has.
#
# Why nothing deadlocks: one thread takes the commands as they come, and writes to the device. It waits for the device
# alone: other threads answer, and announcements, its own failure among them, have a queue without a limit. So whoever
# sends a command or a WRITE waits for the link and the device only, even while nobody reads what the agent says, and
# then goes on to read. So the agent's writing to the link always goes on.

# agent: begin
CHUNK = 1 << 20  # bytes
PAGE = 4096  # bytes
PAGES = CHUNK // PAGE
ZERO_PAGE = bytes(PAGE)
ZERO_PAGE_DIGEST = hashlib.sha256(ZERO_PAGE).digest()
DIGEST_SIZE = 32  # bytes
SHORT_SIZE = 4  # bytes; enough to tell pages apart, since the chunk's digest is checked in the end
WINDOW = 1024  # chunks that are announced and not forgotten: the scan goes on while a large change crosses the link
HELD = 64  # chunks of these that the agent keeps in memory; it reads others again; a droplet has 512 MiB
MOST_AHEAD = 1 << 16  # chunks, zeros included, that the scan may be ahead of the first one that is not forgotten
READ_AHEAD = 8  # chunks; a volume is latency-bound, one read at a time does not reach its speed
READERS = 4
FEW_READS = 4  # runs of a chunk's pages to read one by one; with more, reading the whole chunk takes no longer
BATCH = 16  # digests to a write: fewer packets
BATCH_SECONDS = 0.05  # after which a smaller batch will do
QUEUED_FRAMES = 8
HEARTBEAT = 5.0  # seconds
KEPT_MEMORY = 32 << 20  # bytes; the most that glibc takes as M_MMAP_THRESHOLD
DEVICE_LIMIT = 60.0  # seconds for the device to appear after its attach action completed
EXCLUSIVE_LIMIT = 5.0  # seconds for which something, such as udev's probing, may hold it exclusively
ENDING_LIMIT = 60.0  # seconds that an agent may take to notice that its connection is gone
SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ of fcntl(2), which Python has had a name for since 3.10
AGENT_MAGIC = b"dosvob agent 3\n"
FRAME = ">BII"
COMMAND = ">BII32s"
HELLO, DIGEST, ZEROS, SHORT, RAW, ZLIB, ZSTD, ALIVE, FAILED = range(1, 10)
# How hard to compress: the level, what that costs and how long the result is, in multiples of the lowest level's; those
# above gain hardly anything
LEVELS = {
    ZLIB: ((1, 1.0, 1.0), (6, 2.0, 0.95)),
    ZSTD: ((1, 1.0, 1.0), (3, 2.0, 0.9), (6, 7.0, 0.87)),
}
NOT_AT_ALL = (0, 0.0, 1.0)
DROP, COMPARE, SEND, WRITE = range(1, 5)


def framed(kind: int, index: int, *payload: bytes) -> bytes:
    """A frame, ready to be sent."""
    return b"".join((struct.pack(FRAME, kind, index, sum(map(len, payload))), *payload))


def page_digests(chunk: bytes) -> bytes:
    """The SHA-256 of each page of a chunk, one after another.

    A chunk's digest is made of these, so that pages can be compared and checked without hashing anything twice.
    """
    view = memoryview(chunk)
    return b"".join(
        [
            ZERO_PAGE_DIGEST
            if chunk.startswith(ZERO_PAGE, start)
            else hashlib.sha256(view[start : start + PAGE]).digest()
            for start in range(0, len(chunk), PAGE)
        ]
    )


def chunk_digest(pages: bytes | bytearray) -> bytes:
    """The digest of a chunk, given those of its pages."""
    return hashlib.sha256(pages).digest()


def runs(bitmap: int) -> Iterator[tuple[int, int]]:
    """The runs of pages in a bitmap (page p is the bit 1 << p), in order: the first page, and how many."""
    end = 0
    while bitmap:
        skipped = (bitmap & -bitmap).bit_length() - 1
        count = (~(bitmap >> skipped) & ((bitmap >> skipped) + 1)).bit_length() - 1
        bitmap >>= skipped + count
        end += skipped + count
        yield end - count, count


def numbers_in(bitmap: int) -> Iterator[int]:
    """The numbers of the bits that are set, of pages for example, in order."""
    for first, count in runs(bitmap):
        yield from range(first, first + count)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory, up to some MiB: buffers of a chunk come and go all the time.

    To give each back to the kernel, and get another one zeroed, costs half of the CPU time of a first sync. All threads
    share one arena, for each of their own would keep as much. The numbers are those of mallopt(3): M_TRIM_THRESHOLD,
    M_MMAP_THRESHOLD and M_ARENA_MAX, which other C libraries may not have.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2 * KEPT_MEMORY)
        mallopt(-3, KEPT_MEMORY)
        mallopt(-8, 1)


class Zstd:
    """zstd, from the system's libzstd: far faster than zlib, and its output is smaller. Any thread may use it."""

    MAGIC = b"\x28\xb5\x2f\xfd"  # of a frame; older formats and skippable frames have others

    def __init__(self) -> None:
        """Raises OSError or AttributeError where there is no such library."""
        library = ctypes.CDLL("libzstd.so.1")  # which every Debian has: dpkg needs it
        size, data = ctypes.c_size_t, ctypes.c_char_p
        self._compress = library.ZSTD_compress
        self._compress.argtypes, self._compress.restype = [data, size, data, size, ctypes.c_int], size
        self._decompress = library.ZSTD_decompress
        self._decompress.argtypes, self._decompress.restype = [data, size, data, size], size
        self._frame_size = library.ZSTD_findFrameCompressedSize
        self._frame_size.argtypes, self._frame_size.restype = [data, size], size

    def compress(self, data: bytes, level: int) -> bytes:
        """The data compressed to one frame; or the data itself if that is not shorter."""
        buffer = ctypes.create_string_buffer(len(data))
        size = self._compress(buffer, len(data), data, len(data), level)
        return ctypes.string_at(buffer, size) if size < len(data) else data  # errors are numbers beyond all sizes

    def decompress(self, data: bytes, size: int) -> bytes:
        """Decompress one frame of exactly `size` bytes, else ValueError; allocates no more than these.

        It does so in one step, for then zstd does not allocate the frame's window, which may be huge.
        """
        if not data.startswith(self.MAGIC) or self._frame_size(data, len(data)) != len(data):
            raise ValueError("not one frame of zstd")
        buffer = ctypes.create_string_buffer(max(size, 1))
        if self._decompress(buffer, size, data, len(data)) != size:
            raise ValueError("not %d bytes compressed with zstd" % size)
        return ctypes.string_at(buffer, size)


try:
    LIBZSTD: Zstd | None = Zstd()
except (OSError, AttributeError):
    LIBZSTD = None


class Packer:
    """Prepares data for the link: raw, or compressed so that it is through soonest.

    It decides for each piece, by what compressing and sending took of late. Any thread may use it. `waits` is the share
    of the receiver's reads that found nothing yet: if it is small, the receiver takes longer than the link, and to
    unpack as well would take it longer still.
    """

    WAITS = 0.1  # the share from which on sending is taken to wait for the link
    SAMPLES, SAMPLE = 4, 2 << 10  # pieces, and bytes of each, that are compressed to see whether it makes a difference
    FADING = 0.9  # of the sums below, with each piece; sums, and not a mean of rates, which a buffer that fills spoils

    def __init__(self, with_zstd: bool) -> None:
        """`with_zstd` tells whether the other side can unpack it."""
        self.kind = ZSTD if with_zstd and LIBZSTD is not None else ZLIB
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.waits = 1.0
        self._lock = threading.Lock()
        self._packed = 0.0  # bytes compressed of late
        self._packing, self._result = 0.0, 0.0  # the seconds that the lowest level takes for these, and bytes it makes
        self._sent = self._sending = 0.0  # bytes sent of late, and the seconds that it took

    def sent(self, size: int, seconds: float) -> None:
        """So many bytes were sent, in so much time."""
        with self._lock:
            self._sent = self.FADING * self._sent + size
            self._sending = self.FADING * self._sending + seconds

    def pack(self, data: bytes) -> tuple[int, bytes]:
        """What to send for the data: the kind of the frame (RAW, ZLIB, ZSTD) and the bytes."""
        level, cost, length = self._level(len(data))
        if not level or not self._gets_shorter(data):
            return RAW, data
        start = time.thread_time()  # which does not count waiting for the interpreter's lock
        packed = self._compress(data, level)
        seconds = time.thread_time() - start
        with self._lock:
            self._packed = self.FADING * self._packed + len(data)
            self._packing = self.FADING * self._packing + seconds / cost
            self._result = self.FADING * self._result + len(packed) / length
        return (self.kind, packed) if len(packed) < len(data) else (RAW, data)

    def _level(self, size: int) -> tuple[int, float, float]:
        """How hard to compress so many bytes, what that costs, and how long the result is; level 0 for not at all."""
        with self._lock:
            on_link = size * self._sending / (self._sent or 1.0)
            packing = size * self._packing / (self._packed or 1.0) / self.cores
            on_link_packed = on_link * self._result / (self._packed or 1.0)
        if not on_link or self.waits < self.WAITS:
            return NOT_AT_ALL
        if not self._packed:
            return LEVELS[self.kind][0]
        return min(
            NOT_AT_ALL, *LEVELS[self.kind],
            key=lambda by: max(packing * by[1], on_link_packed * by[2]) if by[0] else on_link,
        )  # fmt: skip

    def _gets_shorter(self, data: bytes) -> bool:
        step = max(len(data) // self.SAMPLES, 1)
        sample = b"".join([data[start : start + min(step, self.SAMPLE)] for start in range(0, len(data), step)])
        return len(self._compress(sample, 1)) < 0.9 * len(sample)

    def _compress(self, data: bytes, level: int) -> bytes:
        """Compressed, or as it is if zstd would make it longer; zlib may do so."""
        if self.kind == ZSTD and LIBZSTD is not None:
            return LIBZSTD.compress(data, level)
        return zlib.compress(data, level)

    @staticmethod
    def unpack(kind: int, data: bytes, size: int) -> bytes:
        """The data of a RAW, ZLIB or ZSTD frame: `size` bytes, else ValueError; no more is unpacked than that."""
        if kind == ZSTD:
            if LIBZSTD is None:
                raise ValueError("zstd, which is not here")
            return LIBZSTD.decompress(data, size)
        if kind == ZLIB:
            decompressor = zlib.decompressobj()
            try:
                data = decompressor.decompress(data, size + 1)
            except zlib.error as problem:
                raise ValueError(str(problem)) from None
            if len(data) == size and (not decompressor.eof or decompressor.unused_data):
                raise ValueError("zlib that is cut off, or followed by something")
        if len(data) != size:
            raise ValueError("%d bytes, and not %d" % (len(data), size))
        return data


def insisted(limit: float, work: Callable[[], T], *passing: int) -> T:
    """What the work returns; for `limit` seconds it is done again while it raises an OSError of these numbers."""
    end = time.monotonic() + limit
    while True:
        try:
            return work()
        except OSError as problem:
            if problem.errno not in passing or time.monotonic() > end:
                raise
        time.sleep(0.1)


def done_ahead(work: Callable[[S], T], items: Iterable[S], threads: int, most: int) -> Iterator[T]:
    """The results of `work` in the order of the items; so many threads do it, up to `most` items ahead."""
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    coming: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    try:
        for item in items:
            coming.append(pool.submit(work, item))
            if len(coming) > most:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        # The garbage collector may end this generator while a thread is being started, which holds a lock: to wait
        # for the pool's threads then would be to wait for that lock.
        for future in coming:
            future.cancel()
        pool.shutdown(wait=False)


class Agent:
    """Serves one device to one peer: the ranges of chunks in `parts`, at most `window` chunks ahead of those forgotten.

    The device is set read-only unless the agent `writes`. Five sorts of threads: readers that read ahead; a scanner
    that hashes; one that takes commands and writes to the device; some that answer and compress, one for each core, at
    least two; and the main thread, which writes to the link.
    """

    writes = False

    def __init__(
        self,
        device: str,
        parts: Sequence[tuple[int, int]],
        window: int,
        packer: Packer,
        commands: BinaryIO,
        output: int,
    ) -> None:
        self.device = device
        self.parts = parts
        self.window = window
        self.packer = packer
        self.commands = commands
        self.output = output
        self.fd = -1
        self.announced: dict[int, bytes] = {}  # page digests, by index, of chunks that are not forgotten yet
        self.held: dict[int, bytes] = {}  # the contents of some of them, which need not be read again
        self.window_moved = threading.Condition()
        self.requests: queue.SimpleQueue[tuple[int, int, int]] = queue.SimpleQueue()  # kind, index and bitmap
        self.frames: queue.Queue[bytes] = queue.Queue(QUEUED_FRAMES)
        self.announcements: collections.deque[bytes] = collections.deque()  # frames that go before those

    def run(self, *, writes: bool) -> None:
        """Serve until told to end; the process ends with it."""
        self.writes = writes
        keep_freed_memory()
        if stat.S_ISFIFO(os.fstat(self.output).st_mode):  # a chunk at a time instead of 64 KiB to sshd
            fcntl.fcntl(self.output, SET_PIPE_SIZE, CHUNK)
        for work in (self.scan, self.take_commands, *[self.answer_requests] * max(2, self.packer.cores)):
            threading.Thread(target=self.guarded, args=(work,), daemon=True).start()
        self.write_frames()

    def guarded(self, work: Callable[[], None]) -> None:
        """Do the work of a thread; tell the other side if it fails."""
        try:
            work()
        except Exception as problem:  # noqa: BLE001 - whatever it is, the other side is to know
            self.announce(framed(FAILED, 0, f"{type(problem).__name__}: {problem}".encode()[:1000]))

    def put(self, kind: int, index: int, *payload: bytes) -> None:
        """Queue a frame."""
        self.frames.put(framed(kind, index, *payload))

    def announce(self, frames: bytes) -> None:
        """Send frames before all that is queued: a scan that waited behind data would last longer."""
        self.announcements.append(frames)
        with contextlib.suppress(queue.Full):
            self.frames.put_nowait(b"")  # the main thread may be waiting

    def write_frames(self) -> None:
        """Write the frames that come, and a sign of life when none does."""
        while True:
            try:
                frame = self.frames.get(timeout=HEARTBEAT)
            except queue.Empty:
                frame = framed(ALIVE, 0)
            while self.announcements:
                self.write(self.announcements.popleft())
            if frame:
                self.write(frame)
                kind, index, _ = struct.unpack_from(FRAME, frame)
                if kind in (RAW, ZLIB, ZSTD):  # only now: before, any number of digests could overtake it
                    self.forget(index, 1)

    def write(self, data: bytes) -> None:
        """Write all of it, and measure the link by that."""
        start = time.monotonic()
        view = memoryview(data)
        while view:
            view = view[os.write(self.output, view) :]
        self.packer.sent(len(data), time.monotonic() - start)

    def scan(self) -> None:
        """Announce the chunks in order, holding those that may be asked for."""
        self.open_device()
        ends = {end for _, end in self.parts}
        zero_chunk = bytes(CHUNK)
        batch: list[bytes] = []
        zeros = 0  # the length of the run of zero chunks up to this one
        flushed = time.monotonic()
        for index, chunk in self.read_chunks():
            pages = b"" if chunk == zero_chunk else page_digests(chunk)
            if pages:
                with self.window_moved:
                    self.announced[index] = pages
                    if len(self.held) < HELD and not self.writes:
                        self.held[index] = chunk
            else:
                zeros += 1
            is_late = index + 1 == self.parts[-1][1] or time.monotonic() - flushed > BATCH_SECONDS
            is_due = is_late or len(batch) >= BATCH or not self.may_scan_on(index)
            if zeros and (pages or is_due or index + 1 in ends):
                batch.append(framed(ZEROS, index + (not pages) - zeros, struct.pack(">I", zeros)))
                zeros = 0
            if pages:
                batch.append(framed(DIGEST, index, chunk_digest(pages)))
            if is_due:
                self.announce(b"".join(batch))
                batch.clear()
                flushed = time.monotonic()
                with self.window_moved:
                    self.window_moved.wait_for(lambda: self.may_scan_on(index))  # noqa: B023 - called before the next index

    def may_scan_on(self, index: int) -> bool:
        """Whether the scan may go on beyond this chunk."""
        with self.window_moved:
            first = next(iter(self.announced), index)  # they come in order
            return len(self.announced) < self.window and index - first < MOST_AHEAD

    def read_chunks(self) -> Iterator[tuple[int, bytes]]:
        """All chunks of the parts."""
        indices, ahead = itertools.tee(itertools.chain.from_iterable(range(*part) for part in self.parts))
        return zip(indices, done_ahead(self.read, ahead, READERS, READ_AHEAD))  # noqa: B905 - Python 3.8 has no strict

    def read(self, index: int, first: int = 0, count: int = PAGES) -> bytes:
        """One chunk of the device, or so many of its pages."""
        data = os.pread(self.fd, count * PAGE, index * CHUNK + first * PAGE)
        if len(data) != count * PAGE:
            raise OSError(f"{self.device} ended in chunk {index}, {first * PAGE + len(data)} bytes from its beginning")
        return data

    def open_device(self) -> None:
        """Wait for the device, protect it from writes that are not ours, and say hello."""
        try:
            fd = insisted(DEVICE_LIMIT, lambda: os.open(self.device, os.O_RDONLY), errno.ENOENT)
        except FileNotFoundError:
            raise OSError(f"{self.device} did not appear within {DEVICE_LIMIT:.0f} s") from None
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            fcntl.ioctl(fd, 0x125D, struct.pack("i", not self.writes))  # BLKROSET: as blockdev --setro, or --setrw
            self.refuse_if_in_use()
        self.fd = os.open(self.device, os.O_RDWR if self.writes else os.O_RDONLY)
        os.close(fd)
        if self.writes:
            self.wait_for_the_one_before()
            os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.lseek(self.fd, 0, os.SEEK_END)
        self.announce(framed(HELLO, 0, AGENT_MAGIC, struct.pack(">Q?", size, LIBZSTD is not None)))

    def wait_for_the_one_before(self) -> None:
        """Wait for the end of another writing agent; one that outlasts ENDING_LIMIT hangs, and writes no more."""
        with contextlib.suppress(BlockingIOError):
            insisted(ENDING_LIMIT, lambda: fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB), errno.EAGAIN)

    def refuse_if_in_use(self) -> None:
        """Raise OSError if the device, or a part of it, is mounted or otherwise claimed: it would change meanwhile.

        A mount holds it exclusively, even while it replays its journal and is not listed yet: open(2), O_EXCL.
        """
        try:
            os.close(insisted(EXCLUSIVE_LIMIT, lambda: os.open(self.device, os.O_RDONLY | os.O_EXCL), errno.EBUSY))
        except OSError as problem:
            if problem.errno != errno.EBUSY:
                raise
            raise OSError(f"{self.device} is in use on the droplet: mounted, or part of something") from None

    def take_commands(self) -> None:
        """Take commands until the input ends; the process ends with that."""
        self.guarded(self.obey)
        while self.commands.read(CHUNK):  # after a failure: a peer that is sending reads of it only when it has sent
            pass
        os._exit(0)

    def obey(self) -> None:
        """Do DROP, for which the scan may be waiting, and WRITE at once; let other threads answer the rest."""
        size = struct.calcsize(COMMAND)
        while len(command := self.commands.read(size)) == size:
            kind, index, count, bitmap = struct.unpack(COMMAND, command)
            pages = int.from_bytes(bitmap, "little")
            if kind == DROP:
                self.forget(index, count)
            elif kind == WRITE:
                self.write_pages(index, pages)
                self.forget(index, 1)
            else:
                if kind == SEND:
                    self.packer.waits = count / 100
                self.requests.put((kind, index, pages))

    def write_pages(self, index: int, wanted: int) -> None:
        """Write the wanted pages of a chunk from the frame that follows; those that it leaves out are zeros."""
        header = self.commands.read(struct.calcsize(FRAME))
        kind, _, length = struct.unpack(FRAME, header)
        payload = self.commands.read(length)
        filled = int.from_bytes(payload[: PAGES // 8], "little")
        data = Packer.unpack(kind, payload[PAGES // 8 :], bin(filled).count("1") * PAGE)
        self.write_runs(index, filled, data)
        self.write_runs(index, wanted & ~filled, bytes(CHUNK))

    def write_runs(self, index: int, pages: int, data: bytes) -> None:
        """Write the pages of a chunk that are in the bitmap; the data has them in order."""
        view = memoryview(data)
        for first, count in runs(pages):
            offset = index * CHUNK + first * PAGE
            end = offset + count * PAGE
            while offset < end:
                written = os.pwrite(self.fd, view[: end - offset], offset)
                view, offset = view[written:], offset + written

    def forget(self, index: int, count: int) -> None:
        """Forget chunks, so that the scan may go on."""
        with self.window_moved:
            for dropped in range(index, index + count):
                self.announced.pop(dropped, None)
                self.held.pop(dropped, None)
            self.window_moved.notify()

    def answer_requests(self) -> None:
        """Answer all commands that want it."""
        while True:
            self.answer(*self.requests.get())

    def answer(self, kind: int, index: int, bitmap: int) -> None:
        """Answer a command."""
        if kind == COMPARE:
            pages = self.pages_of(index)
            shorts = [pages[start : start + SHORT_SIZE] for start in range(0, len(pages), DIGEST_SIZE)]
            self.put(SHORT, index, b"".join(shorts))
        elif kind == SEND:
            self.send_pages(index, bitmap)
        else:
            raise ValueError(f"there is no command {kind}")

    def pages_of(self, index: int) -> bytes:
        """The digests of a chunk's pages."""
        return self.announced.get(index) or page_digests(self.held.get(index) or self.read(index))

    def send_pages(self, index: int, wanted: int) -> None:
        """Send the wanted pages, but no zeros."""
        chunk, digests = self.held.get(index), self.pages_of(index)
        starts = {page: page * DIGEST_SIZE for page in numbers_in(wanted)}
        filled = [page for page, start in starts.items() if digests[start : start + DIGEST_SIZE] != ZERO_PAGE_DIGEST]
        bitmap = sum(1 << page for page in filled)
        pieces = list(runs(bitmap))
        if chunk is None and len(pieces) > FEW_READS:
            chunk = self.read(index)
        data = b"".join(
            [
                self.read(index, first, count) if chunk is None else chunk[first * PAGE : (first + count) * PAGE]
                for first, count in pieces
            ]
        )
        kind, packed = self.packer.pack(data)
        self.put(kind, index, bitmap.to_bytes(PAGES // 8, "little"), packed)


CHECK_LIMIT = 600.0  # seconds for a `Checker`: no billed droplet waits longer
CHECKED_PARTS = 8  # partitions that it looks at
CHECKED_ENTRIES = 1000  # of the top directory
CHECKED_WORDS = 300  # characters of what the kernel, or a tool, says


class Checker:
    """Tries whether what is on a device comes up: mounts each file system on it as after a power cut, and looks in.

    So the journal is replayed, which changes the device. It answers with one line of JSON, after `limit` seconds
    whatever hangs; spaces before that say that it lives. It ends with its input. What it mounts is in a namespace of
    its own, so nothing is left behind. If memory is short, it goes before any agent.
    """

    PLACE = "/mnt"  # where it has a small file system of its own
    READ_ONLY = ("cramfs", "erofs", "iso9660", "squashfs")
    OPTIONS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("ext2", "ext3", "ext4"), "errors=continue"),  # a superblock may say panic
        "xfs": "nouuid",
    }
    TAKEN = (errno.EBUSY, errno.EEXIST)  # for a while; EEXIST: by a Btrfs of the same UUID, before Linux 6.7
    NOT_TRIED = (*TAKEN, errno.EPERM, errno.EACCES, errno.EROFS, errno.ENODEV, errno.ENOMEM, errno.ENOTBLK)
    # What kernels, from 5.10 to 6.18, say if they lack something, if something is wrong, and if all is well
    LACKS = re.compile(
        r"unsupported optional features|unknown \S+( \S+)? features|safely mounted|without CONFIG_|"
        r"external (journal|log)|bad block size|supported for page size|Only pagesize"
    )
    WRONG = re.compile(
        r"EXT4-fs error|BTRFS (error|critical)(?!.* already reg)|XFS .*(orruption|rror|hut ?down)|I/O error"
    )
    USUAL = re.compile(
        r"mounted filesystem|Mounting V|[Uu]nmounting|first mount of|recovery complete|(Starting|Ending) |using |"
        r"orphan|enabling|checking UUID|free.space.tree|last unmount"
    )
    TOOLS: ClassVar[Mapping[str, tuple[tuple[str, ...], int]]] = {  # with the exit code that tells of damage
        **dict.fromkeys(("ext2", "ext3", "ext4"), (("e2fsck", "-fn"), 4)),
        "xfs": (("xfs_repair", "-n"), 1),
        "btrfs": (("btrfs", "check", "--readonly"), 1),
    }

    def __init__(self, device: str, with_fsck: bool, limit: float) -> None:
        self.device = device
        self.with_fsck = with_fsck
        self.limit = limit
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.doing = "looking for file systems"
        self.problem = ""  # why nothing was tried
        self.parts: list[dict[str, Any]] = []  # what was found

    def run(self, output: int) -> None:
        """Answer; the process ends with it."""
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        os.nice(10)  # the next volume is being read
        worker = threading.Thread(target=self.work, daemon=True)
        worker.start()
        end = time.monotonic() + self.limit
        while worker.is_alive() and time.monotonic() < end:
            os.write(output, b" ")
            worker.join(min(HEARTBEAT, max(end - time.monotonic(), 0)))
        if worker.is_alive():
            self.problem = "%s did not end within %d s" % (self.doing, self.limit)
        answer = {"kernel": os.uname().release, "parts": self.parts, "problem": self.problem}
        os.write(output, json.dumps(answer).encode() + b"\n")
        os.read(0, 1)
        os._exit(0)

    def work(self) -> None:
        """Look at all that there is."""
        try:
            self.enter_namespace()
            self.look_at_all()
        except Exception as problem:  # noqa: BLE001 - whatever it is, the other side is to know
            self.problem = "%s: %s" % (self.doing, problem)

    def call(self, name: str, *arguments: Any) -> None:
        """Call the C library; raises OSError."""
        if getattr(self.libc, name)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def mount(self, source: str, place: str, kind: str, flags: int = 0, options: str = "") -> None:
        """Mount; raises OSError."""
        texts = [text.encode() for text in (source, place, kind)]
        self.call("mount", *texts, ctypes.c_ulong(flags), options.encode())

    def enter_namespace(self) -> None:
        """Have mounts of one's own, and a place for them."""
        self.call("unshare", 0x20000)  # CLONE_NEWNS
        self.mount("", "/", "", 0x44000)  # MS_REC | MS_PRIVATE
        self.mount("dosvob", self.PLACE, "tmpfs")
        os.mkdir(self.PLACE + "/tried")

    def tool(self, *command: str) -> tuple[int, str]:
        """Run a tool; returns its exit code, and the beginning of what it says. Raises FileNotFoundError."""
        path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
        said = b""
        with subprocess.Popen(  # noqa: S603 - commands of ours
            command, env=path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            while data := os.read(process.stdout.fileno(), CHUNK):  # type: ignore[union-attr]
                said = (said + data)[:PAGE]
        return process.returncode, said.decode(errors="replace")

    def look_at_all(self) -> None:
        """Look at the device, or at its partitions, all made writable."""
        device = os.path.realpath(self.device)
        self.make_writable(device)
        facts = self.probe(device)
        if "TYPE" in facts or "PTTYPE" not in facts:
            self.look_at(device, facts)
            return
        with contextlib.suppress(FileNotFoundError):
            self.tool("partx", "--update", device)  # the table may be younger than the device
        name = os.path.basename(device)
        parts = "/sys/class/block/%s" % name
        names = [each for each in os.listdir(parts) if os.path.exists("%s/%s/partition" % (parts, each))]
        if more := len(names[CHECKED_PARTS:]):
            self.look_at("", {"TYPE": "%d more partition%s" % (more, "s" * (more > 1))})
        found = []  # before any is tried: what was not seen is not missing
        for each in sorted(names, key=lambda part: (len(part), part))[:CHECKED_PARTS]:
            with open("%s/%s/dev" % (parts, each)) as file:
                major, minor = map(int, file.read().split(":"))
            node = "%s/%s" % (self.PLACE, each)  # udev may not have made one yet
            os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(major, minor))
            self.make_writable(node)
            found.append((node, self.probe(node)))
        for node, facts in found:
            self.look_at(node, facts)

    @staticmethod
    def make_writable(node: str) -> None:
        """As blockdev --setrw: an agent has set it read-only."""
        with open(node, "rb", buffering=0) as device:
            fcntl.ioctl(device, 0x125D, struct.pack("i", 0))  # BLKROSET

    def probe(self, node: str) -> dict[str, str]:
        """What is there, in the words of blkid."""
        code, said = self.tool("blkid", "-p", "-o", "export", node)
        if code == 8:
            return {"TYPE": "several signatures", "USAGE": "other"}
        with open(node, "rb") as file:  # blkid says of what it cannot read that there is nothing
            file.read(PAGE)
        if code not in (0, 2):  # 2: nothing is
            raise OSError("blkid: exit code %d" % code)
        return dict(line.partition("=")[::2] for line in said.splitlines())

    def look_at(self, node: str, facts: Mapping[str, str]) -> None:
        """Note what is on a node, and try it if it is a file system."""
        kind = facts.get("TYPE", "")
        is_file_system = facts.get("USAGE") == "filesystem" and not kind.endswith("_member")  # as of ZFS
        part = {"kind": kind, "is_file_system": is_file_system, "came_up": None, "words": "", "used": 0, "size": 0}
        self.parts.append(part)
        if "EXT_JOURNAL" in facts:  # the kernel would take it by its number, which may be another volume's clone
            part["words"] = "its journal is on another device"
        elif is_file_system:
            self.doing = "the mount of %s" % kind
            part.update(self.tried(node, kind))
            if self.with_fsck and part["came_up"] and kind in self.TOOLS:
                part.update(self.checked(node, kind))

    def tried(self, node: str, kind: str) -> dict[str, Any]:
        """Whether a file system comes up: `came_up`, None if that could not be tried, `words`, `used` and `size`."""
        found: dict[str, Any] = {}
        problem = None
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(log, 0, os.SEEK_END)
        try:
            found = self.looked_into(node, kind)
        except OSError as failure:
            problem = failure
        words = self.kernel_words(log, os.path.basename(node))
        os.close(log)
        if problem is None:
            is_wrong = bool(self.WRONG.search(words))  # the first ones, if any are
            return {**found, "came_up": not is_wrong, "words": words if is_wrong or "with errors" in words else ""}
        if problem.errno == errno.ENODEV:
            words = "this droplet's kernel has no %s" % kind
        is_untried = problem.errno in self.NOT_TRIED or self.LACKS.search(words) or self.is_one_of_many(node, kind)
        return {"came_up": None if is_untried else False, "words": words or str(problem.strerror)}

    def looked_into(self, node: str, kind: str) -> dict[str, Any]:
        """Mount a file system, read its top directory, unmount it; the bytes `used`, and its `size`."""
        place, flags = self.PLACE + "/tried", 2 | 4 | 8  # MS_NOSUID, MS_NODEV, MS_NOEXEC

        def mount() -> None:
            if kind == "btrfs":  # the kernel may know a namesake, such as the volume's last clone
                with contextlib.suppress(OSError), open("/dev/btrfs-control", "r+b", buffering=0) as control:
                    fcntl.ioctl(control, 0x50009405, bytearray(4096))  # BTRFS_IOC_FORGET_DEV
            self.mount(node, place, kind, flags | (kind in self.READ_ONLY), self.OPTIONS.get(kind, ""))

        insisted(EXCLUSIVE_LIMIT, mount, *self.TAKEN)
        try:
            with os.scandir(place) as entries:
                for entry in itertools.islice(entries, CHECKED_ENTRIES):
                    entry.stat(follow_symlinks=False)
            status = os.statvfs(place)
        finally:
            self.call("umount2", place.encode(), 0)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        return {"used": used, "size": used + status.f_bavail * status.f_frsize}

    def kernel_words(self, log: int, name: str) -> str:
        """What the kernel has said of a device since, but for what it always says; first what is wrong."""
        lines: dict[str, bool] = {}  # and whether they tell that all may be well
        for _ in range(10_000):
            try:
                record = os.read(log, 2 * PAGE)
            except BlockingIOError:
                break
            except BrokenPipeError:  # some were lost
                continue
            line = record.partition(b";")[2].partition(b"\n")[0].decode(errors="replace")
            is_well = not self.WRONG.search(line)
            if re.search(r"\b%s\b" % re.escape(name), line) and not (is_well and self.USUAL.search(line)):
                lines[line] = is_well
        return "; ".join(sorted(lines, key=lines.__getitem__))[:CHECKED_WORDS]

    @staticmethod
    def is_one_of_many(node: str, kind: str) -> bool:
        """Whether it is a part of a Btrfs that has other devices."""
        if kind != "btrfs":
            return False
        with open(node, "rb") as file:
            file.seek(65536 + 136)  # `num_devices` of the superblock
            return int.from_bytes(file.read(8), "little") > 1

    def checked(self, node: str, kind: str) -> dict[str, Any]:
        """Whether a file system is sound, by its own tool."""
        command, damaged = self.TOOLS[kind]
        self.doing = command[0]
        try:
            code, said = self.tool(*command, node)
        except FileNotFoundError:
            return {"words": "there is no %s on the droplet" % command[0]}
        if code == 0:
            return {}
        lines = [
            line for line in said.splitlines() if line.strip() and not re.match(r"e2fsck |Pass |Phase | *- |\[\d", line)
        ]
        words = "%s: %s" % (command[0], "; ".join(lines) or "exit code %d" % code)
        return {"came_up": code < 0 or not code & damaged, "words": words[:CHECKED_WORDS]}


# agent: end
# Read while this file is loaded: an update may have changed it by the time an agent starts.
AGENT = "".join(re.findall(r"(?ms)^# agent: begin$(.*?)^# agent: end$", Path(__file__).read_text(encoding="utf-8")))


def agent_source(device: str, parts: Sequence[tuple[int, int]], window: int, *, writes: bool = False) -> bytes:
    """The agent's program."""
    packer = f"Packer({LIBZSTD is not None})"
    return droplet_source(f"Agent({device!r}, {parts!r}, {window}, {packer}, sys.stdin.buffer, 1).run(writes={writes})")


def droplet_source(start: str) -> bytes:
    """A program for the droplet; if its Python is too old, that says so in a FAILED frame."""
    source = f"from __future__ import annotations\nimport sys\n{AGENT}{start}\n"
    return f"""import struct, sys
if sys.version_info < (3, 8):
    text = "it has Python %d.%d, and 3.8 is needed: set \\"droplet_image\\" in conf.json" % sys.version_info[:2]
    sys.stdout.buffer.write(struct.pack({FRAME!r}, {FAILED}, 0, len(text)) + text.encode())
    sys.exit()
exec({source!r})
""".encode()


# ── Image files ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Where a backup lives on the local disk, and what its files are made of. Knows files only.
#
#   backups/NAME                         the image: sparse, byte for byte the volume
#   backups/NAME.partial                 a first sync that is not complete yet
#   backups/.dosvob/NAME.state           the state: a sealed block, then the digest of each chunk
#   backups/.dosvob/NAME.state.new       the next state, of the sync in progress
#   backups/.dosvob/NAME.spool           the patches that the sync in progress has fetched
#   backups/.dosvob/NAME.undo            what the image had in those places
#   backups/.dosvob/NAME.versions/TIME   a version: an undo that was kept, named by its snapshot's time (UTC)
#   NAME.set-aside-…, .versions.of-…     what did not belong together: for the user
#   backups/.dosvob/lock, home, wanted.json   the home's: see `Home`
#
# With several regions all of these are in backups/REGION.
#
# A sync saves what it will overwrite. After a crash that is put back, unless the state is the new one already. So a
# sync of an existing image has these steps. Beside each stands what a crash in it leaves:
#   1. patches go to the spool, digests to state.new      the old image; the next sync uses what the spool has
#   2. the undo is written, with a footer when it is      the same; an undo without a footer is deleted
#      whole
#   3. is there free space for the rest? if not, spool    the same
#      and undo go
#   4. the spool is written to the image in place         a mix, until the undo is put back: then the old image
#   5. state.new is renamed over the state: the commit    the same before, the new image afterwards
#   6. the undo gets a version's name, or goes if none    the new image; the next command does the rest
#      is kept; the spool goes
# `Undo.recover` is all that a crash needs. To put an undo back twice is the same as once.

BLOCK = 4096  # bytes of a sealed block
# Of the files, by their kinds, 1 of all others. Versions of format 1 have no index, states of format 1 nothing `found`.
FORMATS = {"version": 2, "state": 2}
ALL_PAGES = (1 << PAGES) - 1
ZERO_CHUNK = bytes(CHUNK)
ZERO_PAGES = ZERO_PAGE_DIGEST * PAGES
ZERO_DIGEST = chunk_digest(ZERO_PAGES)
LIBC = ctypes.CDLL(None, use_errno=True)
UNLIMITED = sys.maxsize  # bytes


def digest_of(chunk: bytes) -> bytes:
    """The digest of a chunk, without work for ZERO_CHUNK."""
    return ZERO_DIGEST if chunk is ZERO_CHUNK else chunk_digest(page_digests(chunk))


def digests_of(pages: Mapping[int, bytes], others: bytes | bytearray = ZERO_PAGES) -> bytearray:
    """The digests of the pages of a chunk, given those that are not zeros by their numbers, and the others' digests."""
    digests = bytearray(others)
    for page, data in pages.items():
        digests[page * DIGEST_SIZE : (page + 1) * DIGEST_SIZE] = hashlib.sha256(data).digest()
    return digests


class Damaged(DosvobError):
    """A file of ours is not what we wrote."""


class Unread(Damaged):
    """The disk could not read it, which may pass."""


def seal(kind: str, content: Json) -> bytes:
    """A block that checks itself: a line with its kind, JSON, and the SHA-256 of all before."""
    body = f"dosvob {kind} 1\n{json.dumps({'version': FORMATS.get(kind, 1), **content})}\n".encode()
    if len(body) > BLOCK - DIGEST_SIZE:
        raise DosvobError(f"what DigitalOcean says of the volume is longer than is possible: {str(content)[:200]}")
    body = body.ljust(BLOCK - DIGEST_SIZE)
    return body + hashlib.sha256(body).digest()


def unseal(kind: str, block: bytes, path: Path) -> Json | None:
    """The content of a sealed block; None if it is not a whole one. Raises DosvobError for a newer dosvob's."""
    body, checksum = block[:-DIGEST_SIZE], block[-DIGEST_SIZE:]
    first, _, rest = body.partition(b"\n")
    if first != f"dosvob {kind} 1".encode() or hashlib.sha256(body).digest() != checksum:
        return None
    content: Json = json.loads(rest)
    if (version := content.pop("version")) > FORMATS.get(kind, 1):
        raise DosvobError(
            f"{path} was written by a newer dosvob (format {version}): update dosvob; nothing was changed"
        )
    return content


def is_unreadable(problem: OSError) -> bool:
    """Whether it tells that the disk does not have any more what was written, or has it damaged."""
    return problem.errno in (errno.EIO, errno.EBADMSG, errno.EUCLEAN)


def mode_of(path: Path, *, follow_symlinks: bool = True) -> int:
    """What `st_mode` says of it; 0 if there is nothing. Raises OSError if nobody can tell."""
    try:
        return path.stat(follow_symlinks=follow_symlinks).st_mode
    except OSError as problem:
        if problem.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return 0


def exists(path: Path, *, follow_symlinks: bool = True) -> bool:
    """Whether there is something. Raises OSError if nobody can tell, which `Path.exists` does not promise."""
    return bool(mode_of(path, follow_symlinks=follow_symlinks))


def may_be_file(path: Path) -> bool:
    """Whether it is a file; also if nobody can tell: whoever opens it meets that."""
    try:
        return stat.S_ISREG(mode_of(path))
    except OSError:
        return True


def names_in(directory: Path) -> list[str]:
    """The names in a directory, in order; none without it. Raises OSError, which pathlib's `glob` may hide."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def free_in(place: Path | int) -> int:
    """The bytes that are free there, without root's reserve: even root cannot write all of that.

    UNLIMITED if the file system does not tell, as a tmpfs without a limit and some of FUSE do not.
    """
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize if status.f_blocks else UNLIMITED


def sync_directory(path: Path) -> None:
    """Make renames, new and removed names in a directory durable; some file systems cannot be asked for that."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(fd)


def create_private(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file that only its owner may read; returns the descriptor."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


@dataclass(frozen=True)
class Mount:
    """A mount, as /proc/self/mountinfo has it: the device by its numbers, where it is, its type, what it is made of."""

    device: str
    place: str
    kind: str
    source: str

    @classmethod
    def all(cls) -> list[Mount]:
        """All that this process sees, in their order; none where Linux does not tell."""
        mounts = []
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
                before, _, after = line.partition(" - ")
                _, _, device, _, place, *_ = before.split()
                kind, source, *_ = after.split()
                place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)
                mounts.append(cls(device, place, kind, source))
        return mounts

    @classmethod
    def of(cls, path_or_fd: Path | int) -> Mount:
        """That of the file system that a file is on; one of no kind if nobody tells."""
        device = os.stat(path_or_fd).st_dev
        numbers = f"{os.major(device)}:{os.minor(device)}"
        return next((mount for mount in cls.all() if mount.device == numbers), cls(numbers, "", "", ""))

    @property
    def keeps_inodes(self) -> bool:
        """Whether a file has the same inode after a remount.

        Many file systems of FUSE make up others each time, FAT and exFAT too (iunique() of Linux), and CIFS where its
        server has none: https://manpages.debian.org/mount.cifs.8, noserverino.
        """
        return not re.match("fuse|v?fat|msdos|exfat|cifs|smb", self.kind)


def identity_of(path_or_fd: Path | int) -> dict[str, int]:
    """What tells that a file was not touched since: size in bytes, inode (0 if that tells nothing), mtime in ns."""
    status, has_inode = os.stat(path_or_fd), Mount.of(path_or_fd).keeps_inodes
    return {"size": status.st_size, "inode": status.st_ino * has_inode, "mtime_ns": status.st_mtime_ns}


def stamp(file: SparseFile, not_before: int = 0) -> None:
    """Give a file the time of now in whole seconds, which every file system keeps, also at a rename; durably."""
    set_time(file, max(int(time.time()), not_before) * 10**9)


def set_time(file: SparseFile, nanoseconds: int) -> None:
    """Give a file a time, durably; where only its owner may do that, it keeps that of the last write."""
    with contextlib.suppress(PermissionError), file.named():
        os.utime(file.fd, ns=(nanoseconds, nanoseconds))
    file.sync()


class LoopDevices:
    """The loop devices of this machine, by which an image is looked into."""

    GET_STATUS = 0x4C05  # LOOP_GET_STATUS64 of loop(4)
    STATUS = struct.Struct("=QQ216x")  # struct loop_info64: device and inode of the file

    @classmethod
    def over(cls, path: Path) -> list[str]:
        """Those that are over a file, each with where it is mounted."""
        path, status = Path(os.path.realpath(path)), path.stat()
        devices = sorted(Path("/sys/block").glob("loop*"))
        return [cls._described(device) for device in devices if cls._is_over(device, path, status)]

    @classmethod
    def _is_over(cls, device: Path, path: Path, status: os.stat_result) -> bool:
        """By the file's device and inode, if we may ask for these, or else by its path.

        A container sees the host's path, and no file there: then a file of the same name and length is taken for ours.
        """
        told = Path(cls._told(device / "loop/backing_file"))
        if told == path or (file := cls._file(device.name)) == (status.st_dev, status.st_ino):
            return True
        if file or told.name != path.name:
            return False
        try:
            return os.path.samestat(told.stat(), status)
        except OSError:
            offset, limit = (int(cls._told(device / "loop" / each) or 0) for each in ("offset", "sizelimit"))
            return bool(limit) or offset + int(cls._told(device / "size") or 0) * 512 == status.st_size

    @staticmethod
    def _told(path: Path) -> str:
        """What a file of /sys tells; nothing if it is not there, as that of a device that is over no file."""
        with contextlib.suppress(OSError):
            return path.read_text(errors="surrogateescape").removesuffix("\n")
        return ""

    @classmethod
    def _file(cls, name: str) -> tuple[int, int] | None:
        """Device and inode of what it is over, if we may ask for that: the path may be another one here."""
        with contextlib.suppress(OSError), open(f"/dev/{name}", "rb", buffering=0) as opened:
            device, inode = cls.STATUS.unpack(fcntl.ioctl(opened, cls.GET_STATUS, bytes(cls.STATUS.size)))
            return device, inode
        return None

    @classmethod
    def _described(cls, device: Path) -> str:
        """A device, and where it, a partition of it, or what is made of these is mounted."""
        numbers, names, parts = set(), set(), [device]
        while parts:
            part = parts.pop()
            numbers.add(cls._told(part / "dev"))
            names.add(f"/dev/{part.name}")
            parts += [*part.glob(f"{part.name}p*"), *part.glob("holders/*")]
        places = [each.place for each in Mount.all() if each.device in numbers or each.source in names]
        return f"/dev/{device.name}" + f", mounted on {' and '.join(places)}" * bool(places)


@dataclass(frozen=True)
class Snapshot:
    """What an image is a copy of: the volume, its size in bytes, and when its snapshot was taken (RFC 3339)."""

    volume_id: str
    name: str
    region: str
    size: int
    taken_at: str

    def moment(self, known_at: datetime.datetime) -> datetime.datetime:
        """When it was taken; `known_at` if that is no time."""
        return (parse_time(self.taken_at) or known_at).replace(microsecond=0)  # as it is listed


@dataclass(frozen=True)
class Finding:
    """What a droplet found on a volume, and whether it comes up.

    `systems` names its file systems, which hold `used` of `size` bytes; `rest` what else there is. `came_up` is None if
    there was nothing to try, or it could not be tried. `words` say why not, mostly the kernel's, of the release
    `kernel`. `before` and `used_before`: the file systems of the last backup before it that came up, or else had some.
    """

    systems: str = ""
    rest: str = ""
    used: int = 0
    size: int = 0
    came_up: bool | None = None
    words: str = ""
    kernel: str = ""
    before: str = ""
    used_before: int = 0

    MOST_ANSWER: ClassVar[int] = 64 << 10  # bytes
    NAMES: ClassVar[Mapping[str, str]] = {
        "crypto_LUKS": "LUKS",
        "LVM2_member": "LVM",
        "linux_raid_member": "a RAID member",
        "zfs_member": "ZFS",
    }

    @classmethod
    def parse(cls, answer: bytes) -> Finding:
        """From a `Checker`'s answer, of which nothing is trusted; raises ValueError."""

        def text(value: object, most: int) -> str:
            return "".join(char if " " <= char <= "~" else "?" for char in str(value)[:most])

        named: dict[bool, list[str]] = {True: [], False: []}  # file systems, and the rest
        try:
            content = json.loads(answer)
            parts = content["parts"][: CHECKED_PARTS + 1]  # with what says that there are more
            for part in parts:
                kind = text(part["kind"], 20)
                named[part["is_file_system"] is True] += [cls.NAMES.get(kind, kind)] if kind else []
            used, size = (sum(min(max(int(part[key]), 0), 1 << 60) for part in parts) for key in ("used", "size"))
            came_up = [part["came_up"] for part in parts]
            words = "; ".join(
                text(each, CHECKED_WORDS) for each in (content["problem"], *(part["words"] for part in parts)) if each
            )
            kernel, is_tried = text(content["kernel"], 60), not content["problem"]
        except (TypeError, KeyError, AttributeError, RecursionError, OverflowError) as problem:
            raise ValueError(str(problem)) from None
        if is_tried and not any(named.values()):
            named[False] = ["no file system"]
        is_cut_off = not is_tried and any(part["is_file_system"] is True and part["came_up"] is None for part in parts)
        result = False if False in came_up else True if True in came_up and not is_cut_off else None
        return cls(", ".join(named[True]), ", ".join(named[False]), used, size, result, words[:CHECKED_WORDS], kernel)

    @classmethod
    def unpack(cls, content: Json | None) -> Finding | None:
        """From a state or a version; None if it has none."""
        known = {item.name for item in dataclasses.fields(cls)}
        return None if content is None else cls(**{key: value for key, value in content.items() if key in known})

    def after(self, last: Finding) -> Finding:
        """The same with what was there before; where nothing is left of that, it does not come up."""
        before, used = (last.systems, last.used) if last.came_up else (last.before or last.systems, last.used_before)
        found = dataclasses.replace(self, before=before, used_before=used)
        if before and self.rest and not self.systems and not self.words:  # which tell why not all was seen
            return dataclasses.replace(found, came_up=False, words=f"{self.rest}, where there was {found.was}")
        return found

    @property
    def was(self) -> str:
        """What there was before, in words."""
        return self.before + f" with {human_size(self.used_before)}" * bool(self.used_before)

    @property
    def change(self) -> str:
        """What somebody may miss of what was there before; nothing if all is as it was, or more."""
        if not self.came_up or not self.before or (self.systems == self.before and 2 * self.used >= self.used_before):
            return ""
        return f"it has {self.systems} with {human_size(self.used)}, and there was {self.was} before"

    def __str__(self) -> str:
        if self.came_up is False:
            return "DOES NOT COME UP"
        names = ", ".join(filter(None, (self.systems, self.rest)))
        fill = f"{100 * self.used / self.size:.0f} % full" if self.size else ""
        untried = "not tried" * (self.came_up is None and (not names or bool(self.systems)))
        return ", ".join(filter(None, (names, fill, untried)))


@dataclass(frozen=True)
class State:
    """What is known of an image; the digests are in the file, behind this block.

    `reread` is the part of the image that the last sync read again; `digests` the SHA-256 of the table of digests;
    `identity` what `identity_of` said of the image, None if somebody wrote to it during the sync; `found` what a
    droplet found on it, None if it was not to look.
    """

    snapshot: Snapshot
    completed_at: str
    reread: int
    digests: str
    identity: dict[str, int] | None
    found: Finding | None = None

    DAMAGED: ClassVar[str] = (
        "{} is damaged; the image was left as it is. Delete that file, and the next run compares all of the image with "
        "the volume"
    )

    @classmethod
    def unpack(cls, block: bytes, path: Path) -> State:
        """From the block that a state file begins with; raises Damaged, or DosvobError for a newer dosvob's."""
        content = unseal("state", block, path) or {}
        content.pop("journal", None)  # of dosvob before it had an undo
        try:
            found = Finding.unpack(content.pop("found", None))
            return cls(snapshot=Snapshot(**content.pop("snapshot")), found=found, **content)
        except (TypeError, KeyError):
            raise Damaged(cls.DAMAGED.format(path)) from None

    @classmethod
    def load(cls, path: Path, *, whole: bool = True) -> State | None:
        """Read and verify a state file, its table only if `whole`; None if there is none. Raises Damaged, Unread."""
        try:
            with path.open("rb") as file:
                state = cls.unpack(file.read(BLOCK), path)
                is_sound = not whole or hashlib.file_digest(file, "sha256").hexdigest() == state.digests
        except FileNotFoundError:
            return None
        except OSError as problem:
            if not is_unreadable(problem):
                raise
            raise Unread(cls.DAMAGED.format(path)) from problem
        if not is_sound:
            raise Damaged(cls.DAMAGED.format(path))
        return state

    def write(self, path: Path) -> None:
        """Write the block before the digests that are in a file, and make the whole file durable."""
        with contextlib.closing(SparseFile(path, os.O_WRONLY)) as file:
            file.write(seal("state", dataclasses.asdict(self)), 0)
            file.sync()

    @classmethod
    def note(cls, paths: ImagePaths, found: Finding | None) -> Finding | None:
        """Write what a droplet found into an image's state; returns it with what was there before.

        None: it was not to look, so nothing counts as it was before. Raises OSError, DosvobError.
        """
        state = cls.load(paths.state)
        if state is None:
            return found
        found = found.after(state.found or Finding()) if found else None
        with paths.state.open("rb") as old, os.fdopen(create_private(paths.new_state), "wb") as new:
            new.truncate()
            shutil.copyfileobj(old, new)
        dataclasses.replace(state, found=found).write(paths.new_state)
        paths.new_state.rename(paths.state)
        sync_directory(paths.metadata)
        return found

    @property
    def moment(self) -> datetime.datetime:
        """When the snapshot was taken."""
        return self.snapshot.moment(parse_time(self.completed_at) or utc_now())


class ImagePaths:
    """The files of one volume's backup, or of one that was set aside.

    The name is the volume's. With several regions it is REGION/NAME, and all files are in a directory REGION.
    """

    VOLUME_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")  # what DigitalOcean allows; as a file name it is harmless
    ASIDE = re.compile(VOLUME_NAME.pattern + r"\.set-aside-[0-9A-Za-z-]+")

    def __init__(self, backups: Path, name: str) -> None:
        *region, base = name.split("/", 1)
        is_fit = self.VOLUME_NAME.fullmatch(base) or self.ASIDE.fullmatch(base)
        if not is_fit or not all(self.VOLUME_NAME.fullmatch(slug) for slug in region):
            raise DosvobError(f"{name!r} is not a name that a volume can have: it is not backed up")
        self.name = name
        self.directory = backups.joinpath(*region)
        self.metadata = self.directory / ".dosvob"
        self.image = self.directory / base
        self.partial = self.directory / f"{base}.partial"
        self.state = self.metadata / f"{base}.state"
        self.new_state = self.metadata / f"{base}.state.new"
        self.spool = self.metadata / f"{base}.spool"
        self.undo = self.metadata / f"{base}.undo"
        self.versions = self.metadata / f"{base}.versions"

    def check_link(self) -> None:
        """Raise DosvobError if the image is a directory, or a link that leads nowhere: its target may be unmounted."""
        if self.image.is_dir():
            raise DosvobError(f"{self.image} is a directory, and its name is that of an image: move it elsewhere")
        if self.image.is_symlink() and not exists(self.image):
            raise DosvobError(f"{self.image} leads to {self.image.readlink()}, which is not there: is it mounted?")

    def check_unread(self) -> None:
        """Raise DosvobError if a loop device is over the image: whoever reads by that would read what is written."""
        with contextlib.suppress(OSError):  # which whoever opens it meets, and tells
            if devices := LoopDevices.over(self.image):
                raise DosvobError(
                    f"{self.image} is in use by {'; '.join(devices)}, and what is read there must not change: it was "
                    "left as it is. Unmount it, or detach it with losetup --detach, and run again"
                )

    def set_aside(self, moment: datetime.datetime) -> ImagePaths:
        """Rename the image, its versions and its state out of the way.

        `moment` is when the image's snapshot was taken, by the state or else the versions: so after a crash the next
        call completes it under the same name. The image goes first, for without it the others are set aside too.
        """
        stamp = f"{self.image.name}.set-aside-{moment.strftime(Version.TIME)}"
        for number in itertools.count():
            aside = ImagePaths(self.directory, f"{stamp}{f'-{number}' * bool(number)}")
            moves = [(self.image, aside.image), (self.versions, aside.versions), (self.state, aside.state)]
            if not exists(aside.state) and not any(exists(old) and exists(new) for old, new in moves):
                break
        for old, new in moves:
            if exists(old):
                old.rename(new)
        sync_directory(self.directory)
        sync_directory(self.metadata)
        return aside


class SparseFile:
    """An image, or a file that becomes one: read and written by offset, with holes for zeros. To be closed."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.path = path
        self.fd = create_private(path, flags)

    def read(self, offset: int, length: int) -> bytes | None:
        """A part of it, with zeros beyond its end; None if the disk cannot read it."""
        data = b""
        try:  # a read ends before what cannot be read, and only the next one fails
            with self.named():
                while len(data) < length and (part := os.pread(self.fd, length - len(data), offset + len(data))):
                    data += part
        except OSError as problem:
            if not is_unreadable(problem):
                raise
            return None
        return data if len(data) == length else data.ljust(length, b"\0")

    def chunk(self, index: int) -> bytes | None:
        """A chunk of it, likewise; of zeros ZERO_CHUNK itself."""
        data = self.read(index * CHUNK, CHUNK)
        return ZERO_CHUNK if data == ZERO_CHUNK else data

    def pages(self, index: int, wanted: int = ALL_PAGES, *, hints: bool = True) -> dict[int, bytes] | None:
        """The wanted pages of a chunk that are not zeros, by their numbers; None if the disk cannot read it.

        With `hints` what is said to be a hole is not read: only the chunk's digest tells whether that was right.
        """
        found: dict[int, bytes] = {}
        offset, end = index * CHUNK, (index + 1) * CHUNK
        while offset < end:
            stop = end
            if hints:
                if (offset := self.end_of_hole(offset, end) // PAGE * PAGE) == end:
                    break
                stop = min(max(-(-self._end_of_data(offset, end) // PAGE), offset // PAGE + 1) * PAGE, end)
            first, count = offset // PAGE % PAGES, (stop - offset) // PAGE
            asked, offset = wanted >> first & ((1 << count) - 1), stop
            data = self.read(stop - count * PAGE, count * PAGE) if asked else b""
            if data is None:
                return None
            for page in numbers_in(asked):
                if not data.startswith(ZERO_PAGE, page * PAGE):
                    found[first + page] = data[page * PAGE : (page + 1) * PAGE]
        return found

    def write_pages(self, index: int, pages: Mapping[int, bytes], which: int) -> None:
        """Write the pages of a chunk that are in the bitmap `which`: what is not in `pages` is zeros, and a hole."""
        has_data = sum(1 << page for page in pages)
        for first, count in runs(which & has_data):
            self.write(b"".join([pages[page] for page in range(first, first + count)]), index * CHUNK + first * PAGE)
        for first, count in runs(which & ~has_data):
            self.write_zeros(index * CHUNK + first * PAGE, count * PAGE)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write at an offset, all of it."""
        view = memoryview(data)
        with self.named():
            while view:
                written = os.pwrite(self.fd, view, offset)
                view, offset = view[written:], offset + written

    def set_length(self, length: int) -> None:
        """Cut it there, or lengthen it by a hole."""
        with self.named():
            os.ftruncate(self.fd, length)

    def sync(self) -> None:
        """Make what was written to it durable."""
        with self.named():
            os.fsync(self.fd)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Have an OSError of its descriptor tell which file it is about."""
        try:
            yield
        except OSError as problem:
            problem.filename = problem.filename or str(self.path)
            raise

    def write_zeros(self, offset: int, length: int) -> None:
        """Make a range zeros, as a hole where that can be."""
        if not self.punch(offset, length):
            for start in range(offset, offset + length, CHUNK):
                self.write(bytes(min(CHUNK, offset + length - start)), start)

    def punch(self, offset: int, length: int) -> bool:
        """Make a hole; False if the file system or the C library has none, whatever it says of that."""
        # Python has only posix_fallocate
        fallocate = getattr(LIBC, "fallocate64", None) or getattr(LIBC, "fallocate", None)
        keep_size_and_punch = 1 | 2  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE of fallocate(2)
        arguments = (self.fd, keep_size_and_punch, ctypes.c_int64(offset), ctypes.c_int64(length))
        return fallocate is not None and fallocate(*arguments) == 0

    def end_of_hole(self, offset: int, end: int) -> int:
        """Where the first data at or after an offset is; `end` if there is none before.

        A hint: file systems have told a hole over data. Those that do not know say that all is data, or refuse.
        """
        try:
            return min(os.lseek(self.fd, offset, os.SEEK_DATA), end)
        except OSError as problem:
            return end if problem.errno == errno.ENXIO else offset

    def _end_of_data(self, offset: int, end: int) -> int:
        """Where the first hole behind data is; `end` if there is none before, or nobody knows."""
        try:
            return min(os.lseek(self.fd, offset, os.SEEK_HOLE), end)
        except OSError:
            return end

    def is_full(self, index: int) -> bool:
        """Whether a chunk is said to have no hole, likewise a hint."""
        offset, end = index * CHUNK, (index + 1) * CHUNK
        return self.end_of_hole(offset, end) == offset and self._end_of_data(offset, end) == end

    def chunk_holes(self, first: int, end: int) -> Iterator[bool]:
        """For each of these chunks, in order, whether it is said to be a hole; a hole of many chunks takes one look.

        That is believed where zeros are recorded, and nowhere else.
        """
        data = 0
        for index in range(first, end):
            if index * CHUNK >= data:
                data = self.end_of_hole(index * CHUNK, end * CHUNK)
            yield (index + 1) * CHUNK <= data

    def free_space(self) -> int:
        """The bytes that are free where it is, see `free_in`."""
        return free_in(self.fd)

    def forget_cached(self, offset: int = 0, length: int = 0) -> None:
        """Have the next reads of it, or of a part of it, come from the disk.

        It may have decayed there. And after a write error, which perhaps only a process saw that has ended, the kernel
        goes on showing what never got there: https://wiki.postgresql.org/wiki/Fsync_Errors
        """
        with contextlib.suppress(OSError):  # what is not on the disk yet would not be forgotten
            os.fdatasync(self.fd)
        self._advise(offset, length, "DONTNEED")

    def read_ahead(self, offset: int, length: int) -> None:
        """Have the kernel begin to read a part of it: many reads at once take a disk hardly longer than one."""
        self._advise(offset, length, "WILLNEED")

    def write_out(self) -> None:
        """Have the kernel begin to write what it has of the file, so that to wait for all of it at the end is short."""
        self._advise(0, 0, "DONTNEED")

    def _advise(self, offset: int, length: int, advice: str) -> None:
        """Give the kernel advice on a part of it, 0 bytes being all of the rest, where it takes any."""
        with contextlib.suppress(OSError, AttributeError):  # refused, or not there
            os.posix_fadvise(self.fd, offset, length, getattr(os, f"POSIX_FADV_{advice}"))

    def close(self) -> None:
        """Close it; once more does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@dataclass(frozen=True)
class Patch:
    """New contents for some pages of a chunk, and the digest that the whole chunk has then.

    `pages` is the bitmap of the pages that it changes; `data` has those in the bitmap `filled`, in order; the others
    become zeros. In a file a header goes before the data. Its checksum is the first half of the SHA-256 of the file's
    id, the other fields and the data; with the id, no old data on the disk can pass for a patch.
    """

    index: int
    pages: int
    filled: int
    data: bytes | memoryview
    digest: bytes

    HEADER = struct.Struct(">4sI32s32s32s16s")  # MAGIC, index, pages, filled, digest, checksum
    MAGIC = b"ptch"

    def pack(self, file_id: str) -> bytes:
        """The header, for the file with that id."""
        bitmaps = [bits.to_bytes(PAGES // 8, "little") for bits in (self.pages, self.filled)]
        fields = self.HEADER.pack(self.MAGIC, self.index, *bitmaps, self.digest, b"")[:-16]
        checksum = hashlib.sha256(file_id.encode() + fields)
        checksum.update(self.data)
        return fields + checksum.digest()[:16]

    @property
    def length(self) -> int:
        """The bytes that it takes in a file."""
        return self.HEADER.size + self.filled.bit_count() * PAGE

    def runs(self) -> Iterator[tuple[int, int, memoryview | None]]:
        """The runs of filled pages and of zero pages, in order: offset in the chunk, length in bytes, data or None."""
        data, position = memoryview(self.data), 0
        filled = [(*run, True) for run in runs(self.filled)]
        zeros = [(*run, False) for run in runs(self.pages & ~self.filled)]
        for first, count, is_filled in sorted(filled + zeros):
            length = count * PAGE
            yield first * PAGE, length, data[position : position + length] if is_filled else None
            position += length * is_filled

    def over(self, chunk: bytes) -> bytes:
        """The chunk as the patch makes it."""
        patched = bytearray(chunk)
        for start, length, data in self.runs():
            patched[start : start + length] = bytes(length) if data is None else data
        return bytes(patched)

    def write_to(self, file: SparseFile) -> None:
        """Change an image in place, zeros becoming holes."""
        for start, length, data in self.runs():
            offset = self.index * CHUNK + start
            if data is None:
                file.write_zeros(offset, length)
            else:
                file.write(data, offset)

    @staticmethod
    def select(data: bytes, wanted: int, among: int = ALL_PAGES) -> bytes:
        """The wanted pages out of the data, which has those of the bitmap `among`."""
        if wanted == among:
            return data
        places = enumerate(numbers_in(among))
        return b"".join([data[place * PAGE : (place + 1) * PAGE] for place, page in places if wanted >> page & 1])

    @classmethod
    def of(cls, index: int, pages: int, data: bytes, digest: bytes) -> Patch:
        """The patch that makes these pages of a chunk what the data has."""
        places = enumerate(numbers_in(pages))
        filled = sum(1 << page for place, page in places if not data.startswith(ZERO_PAGE, place * PAGE))
        return cls(index, pages, filled, cls.select(data, filled, pages), digest)

    @classmethod
    def of_image(cls, file: SparseFile, index: int, pages: int, digest: bytes) -> Patch:
        """The patch that restores these pages of an image; for unreadable ones zeros, which the digest reveals."""
        pieces = []
        for first, count in runs(pages):
            start, length = index * CHUNK + first * PAGE, count * PAGE
            data = file.read(start, length)
            if data is None:  # then page by page: what can be read is kept
                data = b"".join([file.read(place, PAGE) or ZERO_PAGE for place in range(start, start + length, PAGE)])
            pieces.append(data)
        return cls.of(index, pages, b"".join(pieces), digest)


class Entry(NamedTuple):
    """A patch as an index has it: what its header says, and where in the file it begins."""

    chunk: int
    position: int
    pages: int
    filled: int
    digest: bytes


class OpenFiles:
    """Keeps the files open that were used last, MOST at a time: a process may have no more than some 1,000."""

    MOST = 200

    def __init__(self) -> None:
        self._files: dict[PatchFile, None] = {}  # in the order of their last use

    def use(self, file: PatchFile) -> None:
        """One is used now; another one may be closed for it."""
        self._files.pop(file, None)
        self._files[file] = None
        if len(self._files) > self.MOST:
            self.forget(next(iter(self._files)))

    def forget(self, file: PatchFile) -> None:
        """Close one."""
        self._files.pop(file, None)
        file.park()


class PatchFile:
    """A file of patches, as a spool, an undo and a version are: a sealed head, patches, a sealed footer. To be closed.

    The footer is the last block of a file that is whole; a spool has none. A version has an index before it. `head` and
    `footer` are what these say: {} for a damaged head, None for a missing footer. Several threads may read the file,
    even what one of them has just appended. A `pool` closes it meanwhile if too many are open; `from_disk` has it read
    from the disk, see SparseFile.forget_cached. Raises FileNotFoundError, DosvobError for the file of a newer dosvob.
    """

    ROW = struct.Struct(">IQ32s32s32s")  # of the index: an Entry, its bitmaps as in a patch's header
    PAGES_AT = 12  # where in a row the bitmap of the pages is
    ROWS = 64  # of the index that are read at once
    INDEX_IN_MEMORY = 1 << 20  # bytes of an index that is being made; the rest is in an unnamed file

    def __init__(
        self,
        path: Path,
        kind: str,
        flags: int = os.O_RDONLY,
        *,
        from_disk: bool = False,
        pool: OpenFiles | None = None,
    ) -> None:
        self.path = path
        self.doubtful: list[tuple[int, float]] = []  # see `load_index`
        self._kind = kind
        self._pool = pool
        self._opened = SparseFile(path, flags)
        self._is_read_only = flags == os.O_RDONLY
        self._made: tempfile.SpooledTemporaryFile[bytes] | None = None  # the index of a file that has none
        self._count = -1  # of the index's rows; before they are known -1
        self._chunks: array.array[int] | None = None  # of its rows, if `chunks` was asked
        try:
            if from_disk:
                self._opened.forget_cached()
            size = os.fstat(self._opened.fd).st_size
            first = self._opened.read(0, BLOCK)
            last = self._opened.read(size - BLOCK, BLOCK) if size >= 2 * BLOCK else b""
            self.is_unread = first is None or last is None  # or a patch, later; that may pass
            self.head = unseal(kind, first or b"", path) or {}
            footer = unseal("end", last or b"", path)
        except BaseException:
            self.close()
            raise
        self.footer = None if footer is None or (self.head and footer["id"] != self.head["id"]) else footer
        self.limit = self._end = size - BLOCK * (self.footer is not None)
        if self.footer and "index" in self.footer:
            self.limit = self.footer["index"]  # of the patches
        self._changed = 0  # bytes
        if pool is not None:
            pool.use(self)

    @property
    def _file(self) -> SparseFile:
        if self.is_parked:
            first: bytes | None = b""
            with contextlib.suppress(FileNotFoundError):
                self._opened = SparseFile(self.path)
                first = self._opened.read(0, BLOCK)
            if self.is_parked or first is None or (unseal(self._kind, first, self.path) or {}) != self.head:
                self._opened.close()
                raise Damaged(f"{self.path} {'cannot be read' if first is None else 'was replaced or removed'}")
        if self._pool is not None:
            self._pool.use(self)
        return self._opened

    @classmethod
    def of_version(cls, path: Path, *, from_disk: bool = False, pool: OpenFiles | None = None) -> PatchFile:
        """A version's file; in place of one that the disk cannot open an empty one, which counts as damaged."""
        try:
            return cls(path, "version", from_disk=from_disk, pool=pool)
        except OSError as problem:
            if not is_unreadable(problem):
                raise
            return cls(Path(os.devnull), "version")

    @classmethod
    def create(cls, path: Path, kind: str, head: Json) -> PatchFile:
        """A new file, to be appended to, in place of what is there."""
        path.unlink(missing_ok=True)
        with contextlib.closing(SparseFile(path, os.O_WRONLY | os.O_CREAT)) as file:
            file.write(seal(kind, head), 0)
        created = cls(path, kind, os.O_RDWR)
        if kind == "version":
            created._make_index()
        return created

    def append(self, patch: Patch) -> int:
        """Append a patch; returns its position."""
        position = self.limit
        self._file.write(patch.pack(self.head["id"]), position)
        self._file.write(patch.data, position + Patch.HEADER.size)
        self.limit += patch.length
        self._changed += patch.pages.bit_count() * PAGE
        self._add(patch, position)
        return position

    def cut(self, position: int) -> None:
        """Cut the file there, behind the good part of what a crash left, and append there from now on."""
        self._file.set_length(position)
        self.limit = position

    def complete(self) -> None:
        """Write the index, make it and all patches durable, then the footer."""
        checksum, end = hashlib.sha256(), self.limit
        if self._made is not None:
            self._made.seek(0)
            for rows in iter(functools.partial(self._made.read, CHUNK), b""):
                checksum.update(rows)
                self._file.write(rows, end)
                end += len(rows)
        self._file.sync()
        self.footer = {"id": self.head["id"], "changed": self._changed}
        if self._made is not None:
            self.footer |= {"index": self.limit, "index_digest": checksum.hexdigest()}
        self._file.write(seal("end", self.footer), end)
        self._file.sync()

    def header_at(self, position: int) -> Patch:
        """The patch at a position, without its data and not verified; raises Damaged if there is none."""
        header = self._stored(position, Patch.HEADER.size)
        magic, index, pages, filled, digest, _ = Patch.HEADER.unpack(header)
        if magic != Patch.MAGIC:
            raise Damaged(f"{self.path} is damaged at byte {position}")
        return Patch(index, int.from_bytes(pages, "little"), int.from_bytes(filled, "little"), b"", digest)

    def patch_at(self, position: int) -> Patch:
        """The patch at a position; raises Damaged if it is not whole."""
        header = self.header_at(position)
        stored = self._stored(position, header.length)
        patch = dataclasses.replace(header, data=memoryview(stored)[Patch.HEADER.size :])
        if patch.filled & ~patch.pages or patch.pack(self.head.get("id", "")) != stored[: Patch.HEADER.size]:
            raise Damaged(f"{self.path} is damaged at byte {position}")
        return patch

    def _stored(self, position: int, length: int) -> bytes:
        """What the file has there; zeros, which are no patch, for what cannot be read now."""
        stored = self._file.read(position, length)
        self.is_unread |= stored is None
        return bytes(length) if stored is None else stored

    def find_patch(self, position: int) -> int:
        """Where the next whole patch at or behind a position begins; `limit` if there is none."""
        while position < self.limit:
            block = self._file.read(position, min(CHUNK, self.limit - position))
            self.is_unread |= block is None
            found = block.find(Patch.MAGIC) if block is not None else -1
            if found >= 0:
                with contextlib.suppress(Damaged):
                    self.patch_at(position + found)
                    return position + found
            # what cannot be read, it passes over page by page
            position += found + 1 if found >= 0 else PAGE if block is None else max(len(block) - 3, 1)
        return self.limit

    def patches(self, *, data: bool = True) -> Iterator[tuple[int, Patch]]:
        """All patches with their positions, or their headers; raises Damaged at the first one that is not whole."""
        position = BLOCK
        while position < self.limit:
            patch = self.patch_at(position) if data else self.header_at(position)
            yield position, patch
            position += patch.length

    # The index

    def load_index(self, *, whole: bool = True) -> None:
        """Find the index; if there is no sound one, make it of the patches that are whole and in order.

        `doubtful` are then ranges of chunks, without their ends, to which a damaged patch may belong. If not `whole`,
        it reads no data of patches, and raises Damaged for what is no patch.
        """
        if self._count >= 0:
            return
        if self.footer and "index" in self.footer:
            checksum = hashlib.sha256()
            for place in range(self.limit, self._end, CHUNK):
                checksum.update(self._file.read(place, min(CHUNK, self._end - place)) or b"")
            if checksum.hexdigest() == self.footer["index_digest"]:
                self._count = (self._end - self.limit) // self.ROW.size
                if not self.head:  # which tells what it leads back from
                    self.doubtful.append((-1, float("inf")))
                return
        self._make_index()
        if not whole:
            for position, patch in self.patches(data=False):
                self._add(patch, position)
            return
        self._index_what_is_whole()

    def _index_what_is_whole(self) -> None:
        position, last, is_damaged = BLOCK, -1, False
        while self.head and position < self.limit:
            try:
                patch, at = self.patch_at(position), position
                position += patch.length
            except Damaged:
                patch = None
                position = self.find_patch(position + 1)
            if patch is None or patch.index <= last:
                is_damaged = True
                continue
            if is_damaged:
                self.doubtful.append((last, patch.index))
            last, is_damaged = patch.index, False
            self._add(patch, at)
        if is_damaged or not self.head or self.footer is None:
            self.doubtful.append((last, float("inf")))

    def _make_index(self) -> None:
        place = None if self._is_read_only else str(self.path.parent)  # $TMPDIR may be full, or memory
        self._made = tempfile.SpooledTemporaryFile(self.INDEX_IN_MEMORY, dir=place)  # noqa: SIM115 - see `close`
        self._count = 0

    def _add(self, patch: Patch, position: int) -> None:
        if self._made is not None:
            bitmaps = [bits.to_bytes(PAGES // 8, "little") for bits in (patch.pages, patch.filled)]
            self._made.write(self.ROW.pack(patch.index, position, *bitmaps, patch.digest))
            self._count += 1

    def may_have_lost(self, index: int) -> bool:
        """Whether a damaged part of it may have been a patch of a chunk."""
        return any(first < index < end for first, end in self.doubtful)

    def rows(self, first: int, count: int) -> bytes:
        """So many rows of the index from one on, as far as there are; raises Damaged."""
        length = min(count, self._count - first) * self.ROW.size
        if self._made is not None:
            self._made.seek(first * self.ROW.size)
            return self._made.read(length)
        found = self._file.read(self.limit + first * self.ROW.size, length)
        if found is None:
            raise Damaged(f"{self.path} cannot be read at byte {self.limit + first * self.ROW.size}")
        return found

    def entries(self) -> Iterator[Entry]:
        """All that the index has."""
        for first in range(0, self._count, self.ROWS):
            yield from map(self.entry_of, self.ROW.iter_unpack(self.rows(first, self.ROWS)))

    @staticmethod
    def entry_of(row: tuple[int, int, bytes, bytes, bytes]) -> Entry:
        """An unpacked row."""
        index, position, pages, filled, digest = row
        return Entry(index, position, int.from_bytes(pages, "little"), int.from_bytes(filled, "little"), digest)

    def columns(self, first: int, end: int) -> dict[bytes, bytes]:
        """The packed rows of these chunks, by the chunk's packed number."""
        start, stop = (bisect.bisect_left(self.chunks(), chunk) for chunk in (first, end))
        rows, size = self.rows(start, stop - start), self.ROW.size
        return {rows[place : place + 4]: rows[place : place + size] for place in range(0, len(rows), size)}

    def chunks(self) -> array.array[int]:
        """The chunks of the index's rows, in order; they are kept."""
        if self._chunks is None:
            chunks = array.array("I")
            for first in range(0, self._count, CHUNK // PAGE):
                rows = memoryview(self.rows(first, CHUNK // PAGE)).cast("I")
                chunks.extend(rows[:: self.ROW.size // 4])
            if sys.byteorder == "little":
                chunks.byteswap()
            self._chunks = chunks  # all of them, or none if one cannot be read
        return self._chunks

    def find(self, index: int) -> Entry | None:
        """What it has of a chunk."""
        chunks = self.chunks()
        row = bisect.bisect_left(chunks, index)
        if row == len(chunks) or chunks[row] != index:
            return None
        return self.entry_of(self.ROW.unpack(self.rows(row, 1)))

    def pages_of(self, entry: Entry, wanted: int) -> dict[int, bytes]:
        """Those of the wanted pages that it has data for, not verified; zeros for what cannot be read."""
        found = {}
        for first, count in runs(entry.filled & wanted):
            place = (entry.filled & ((1 << first) - 1)).bit_count()
            data = self._file.read(entry.position + Patch.HEADER.size + place * PAGE, count * PAGE)
            for number in range(count):
                found[first + number] = data[number * PAGE : (number + 1) * PAGE] if data else ZERO_PAGE
        return found

    def checked_pages(self, entry: Entry) -> tuple[dict[int, bytes], bool]:
        """The pages that it has data for, and whether the patch is what was written."""
        size = Patch.HEADER.size
        stored = self._file.read(entry.position, size + entry.filled.bit_count() * PAGE) or b""
        patch = Patch(entry.chunk, entry.pages, entry.filled, memoryview(stored)[size:], entry.digest)
        data = stored[size:]
        places = enumerate(numbers_in(entry.filled))
        pages = {page: data[place * PAGE : (place + 1) * PAGE] for place, page in places}
        return pages, patch.pack(self.head.get("id", "")) == stored[:size]

    @property
    def is_parked(self) -> bool:
        """Whether it is closed, for now."""
        return self._opened.fd < 0

    @property
    def fd(self) -> int:
        """The file's descriptor."""
        return self._file.fd

    def park(self) -> None:
        """Close the file; the next use opens it again, and raises Damaged if it is another one."""
        self._opened.close()

    def close(self) -> None:
        """Close the file."""
        if self._pool is not None:
            self._pool.forget(self)
        self._opened.close()
        if self._made is not None:
            self._made.close()

    def __enter__(self) -> PatchFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


# ── Versions ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Older snapshots of an image, each kept as the patches that lead back to it from the next newer one: written by a sync
# as its undo, thinned by age, read for a restore. Knows files only.


@dataclass(frozen=True)
class Version:
    """A version as its file tells; sizes in bytes. It is not whole if its head or its footer is damaged.

    `newer` is the snapshot that it leads back from, `changed` how much differed between the two, `occupied` what the
    file takes, `found` what a droplet found on it. Without a head nothing is known but the time, by the file's name.
    """

    path: Path
    moment: datetime.datetime
    is_whole: bool
    snapshot: Snapshot | None
    newer: Snapshot | None
    changed: int
    occupied: int
    found: Finding | None = None

    TIME = "%Y%m%dT%H%M%SZ"

    @classmethod
    def load(cls, path: Path) -> Version:
        """From its file; raises FileNotFoundError, DosvobError for a newer dosvob's, Damaged without even a time."""
        with PatchFile.of_version(path) as file:
            head, footer, occupied = file.head, file.footer, os.fstat(file.fd).st_size
        try:
            moment = datetime.datetime.strptime(head.get("time", path.name), cls.TIME).replace(tzinfo=datetime.UTC)
        except ValueError:
            raise Damaged(f"{path} is damaged") from None
        snapshot, newer = (Snapshot(**head[key]) if head else None for key in ("snapshot", "newer"))
        is_whole, changed = bool(head) and footer is not None, footer["changed"] if footer else 0
        found = Finding.unpack(head.get("found"))
        return cls(path, moment, is_whole, snapshot, newer, changed, occupied, found)

    def lacks_newer(self, newer: Sequence[Snapshot | None]) -> bool:
        """Whether one between is missing: this version leads back from none of the newer snapshots.

        None stands for the unknown snapshot of a damaged version. This one may lead back from that one, which is
        reported as damaged itself.
        """
        return self.newer is not None and None not in newer and self.newer not in newer


class Versions:
    """The versions of an image."""

    MOST_JOINED = 32  # of which each is open, and has a patch in memory
    COMPARED = 1 << 16  # chunks of which `freed_by` has the rows in memory

    def __init__(self, paths: ImagePaths) -> None:
        self._paths = paths

    def all(self) -> list[Version]:
        """All of them, the newest first; also an undo that is committed, but not renamed to a version yet."""
        versions = []
        with Undo.left(self._paths) as undo:
            if undo is not None and undo.is_committed and undo.is_version:
                versions.append(Version.load(self._paths.undo))
        for name in reversed(names_in(self._paths.versions)):
            path = self._paths.versions / name
            with contextlib.suppress(FileNotFoundError, Damaged):  # thinned by a run that goes on; not ours
                if re.fullmatch(r"\d{8}T\d{6}Z", name) and may_be_file(path):
                    versions.append(Version.load(path))
        return versions

    def unwanted(self, keep: Keep, upcoming: datetime.datetime | None = None) -> list[datetime.datetime]:
        """The times of those that `keep` does not ask for: now, or once there is an image of the time `upcoming`.

        If the image does not come up, or nobody knows, the newest version that did stays whatever `keep` says. So do
        those newer than it that cannot be read, for they may have come up.
        """
        versions, state = self.all(), State.load(self._paths.state, whole=False)
        image = Versions.moment_of_image(state, versions) or utc_now()
        moments = [*([upcoming] if upcoming else []), image, *(version.moment for version in versions)]
        wanted = keep.wanted(moments)
        found = [state.found if state else None, *(each.found for each in versions)]
        unknown = [False, *(each.snapshot is None for each in versions)]
        has_before = any(each is not None and each.before for each in found)
        for place, (each, is_unknown) in enumerate(zip(found, unknown, strict=True), int(upcoming is not None)):
            has_come_up = each is not None and bool(each.came_up)
            wanted[place] |= has_come_up or (is_unknown and has_before)
            if has_come_up:
                break
        return [moment for moment, stays in zip(moments, wanted, strict=True) if not stays]

    def thin(self, keep: Keep, tick: Callable[[int], None] = lambda _: None) -> None:
        """Drop those that `keep` does not ask for, as far as that can be; then raise the last OSError or Damaged.

        It merges the patches of a version that goes into the next older one that stays: first the merged file replaces
        that one, then the other is removed. In between the chain leads to the same contents, since for each page an
        older patch overrides a newer one. Whatever it raises, none that stays is lost.
        """
        for name in names_in(self._paths.versions):
            if name.endswith(".new"):
                with contextlib.suppress(OSError):  # whoever writes it anew meets that
                    (self._paths.versions / name).unlink()
        unwanted = self.unwanted(keep)
        groups: list[list[Version]] = [[]]  # each ends with one that stays, the last one has none
        for version in self.all():
            groups[-1].append(version)
            if version.moment not in unwanted:
                groups.append([])
        removals = [functools.partial(self._remove, [version]) for version in reversed(groups.pop())]
        met: OSError | Damaged | None = None
        for step in (*removals, *(functools.partial(self._join, group, tick) for group in groups)):
            try:  # removals first: they take no space, and free some
                step()
            except (OSError, Damaged) as problem:  # what one version meets is no reason to keep others for ever
                if is_disk_full(problem):
                    raise
                met = problem
        if met is not None:
            raise met

    def _join(self, versions: Sequence[Version], tick: Callable[[int], None]) -> None:
        """Make the oldest of versions, given the newest first, lead back over all of them, MOST_JOINED at a time."""
        while len(versions) > 1:
            starts = range(0, len(versions), self.MOST_JOINED)
            parts = [versions[first : first + self.MOST_JOINED] for first in starts]
            for part in parts:
                if len(part) > 1:
                    self._merge(part, tick)
                    self._remove(part[:-1])
            versions = [Version.load(part[-1].path) for part in parts]

    def _remove(self, versions: Sequence[Version]) -> None:
        """Remove versions, given the newest first, from the oldest on: the others still lead back to the same."""
        for version in reversed(versions):
            version.path.unlink()
            sync_directory(self._paths.versions)

    def _merge(self, versions: Sequence[Version], tick: Callable[[int], None]) -> None:
        """Merge versions, given the newest first, into the oldest: its new file leads back over all of them."""
        oldest, known = versions[-1], [versions[0].newer]
        for version in versions:
            if not version.is_whole:
                raise Damaged(f"{version.path} is damaged")
            if version.lacks_newer(known):
                raise Damaged(f"what {version.path} leads back from is missing")
            known.append(version.snapshot)
        target = oldest.path.with_name(f"{oldest.path.name}.new")
        with contextlib.ExitStack() as files:
            opened = [files.enter_context(PatchFile(version.path, "version")) for version in versions]
            head = {**opened[-1].head, "id": secrets.token_hex(16), "newer": opened[0].head["newer"]}
            size = head["snapshot"]["size"]
            merged = files.enter_context(PatchFile.create(target, "version", head))
            try:
                for file in opened:
                    file.load_index()
                    if file.doubtful:
                        raise Damaged(f"{file.path} is damaged")
                for index, entries in by_chunk(opened):
                    patches = [opened[number].patch_at(entry.position) for number, entry in entries]
                    if index < size // CHUNK:
                        merged.append(self._one_of(patches))
                    tick(sum(patch.length for patch in patches))
                merged.complete()
            except BaseException:
                target.unlink(missing_ok=True)
                raise
        target.rename(oldest.path)
        sync_directory(self._paths.versions)

    @staticmethod
    def _one_of(patches: Sequence[Patch]) -> Patch:
        """One patch that does what these do one after the other."""
        last, chunk, pages = patches[-1], ZERO_CHUNK, 0
        if len(patches) == 1:
            return last
        for patch in patches:
            chunk = patch.over(chunk)
            pages |= patch.pages
        return Patch.of(last.index, pages, Patch.select(chunk, pages), last.digest)

    @staticmethod
    def freed_by(version: Version, older: Version | None, tick: Callable[[int], None] = lambda _: None) -> int:
        """The bytes that removing one would free: those that the next older one need not take over; raises Damaged."""
        if older is None or older.snapshot is None:
            return version.occupied
        taken_over = 0
        with PatchFile(version.path, "version") as file, PatchFile(older.path, "version") as older_file:
            for each in (file, older_file):
                each.load_index(whole=False)
            for first in range(0, older.snapshot.size // CHUNK, Versions.COMPARED):
                end = min(first + Versions.COMPARED, older.snapshot.size // CHUNK)
                tick(0)
                taken_over += Versions._taken_over(file.columns(first, end), older_file.columns(first, end))
        return version.occupied - taken_over

    @staticmethod
    def _taken_over(new: Mapping[bytes, bytes], old: Mapping[bytes, bytes]) -> int:
        """The bytes that the older one would take over, given rows of the indexes: as one number each, for speed."""

        def bits(rows: Iterable[bytes], first: int) -> int:
            return int.from_bytes(b"".join([row[first : first + PAGES // 8] for row in rows]))

        pages, filled = PatchFile.PAGES_AT, PatchFile.PAGES_AT + PAGES // 8
        both = new.keys() & old.keys()
        overridden = bits([new[chunk] for chunk in both], filled) & bits([old[chunk] for chunk in both], pages)
        data = (bits(new.values(), filled).bit_count() - overridden.bit_count()) * PAGE
        return data + (len(new) - len(both)) * (Patch.HEADER.size + PatchFile.ROW.size)

    @staticmethod
    def next_moment(taken: datetime.datetime, versions: Sequence[Version]) -> datetime.datetime:
        """The time that a snapshot has as the next version: versions are in the order of their names."""
        return max(taken, versions[0].moment + datetime.timedelta(seconds=1)) if versions else taken

    @staticmethod
    def moment_of_image(state: State | None, versions: Sequence[Version]) -> datetime.datetime | None:
        """When the image's snapshot was taken; without a state by what the newest version leads back from."""
        newer = versions[0].newer if versions else None
        if state is not None:
            return state.moment
        return newer.moment(utc_now()) if newer else None


def by_chunk(files: Iterable[PatchFile]) -> Iterator[tuple[int, list[tuple[int, Entry]]]]:
    """The chunks that have patches, in order, each with the numbers of the files that have one, and its entries."""

    def numbered(number: int, file: PatchFile) -> Iterator[tuple[int, int, Entry]]:
        return ((entry.chunk, number, entry) for entry in file.entries())

    merged = heapq.merge(*itertools.starmap(numbered, enumerate(files)))
    for index, group in itertools.groupby(merged, key=operator.itemgetter(0)):
        yield index, [(number, entry) for _, number, entry in group]


class Undo:
    """What an image had in the places that a sync changes: old contents of pages, the length and the time of the file.

    Recovery puts that back, unless the state is the new one already (`is_committed`). Then the undo is the newest
    version; or it goes, if none is kept (not `is_version`). If the state is neither the new one nor the old one,
    somebody put other files there, and the undo goes too (`is_stray`).
    """

    def __init__(self, paths: ImagePaths, file: PatchFile) -> None:
        """Raises DosvobError for a newer dosvob's state."""
        self.paths = paths
        self.file = file
        self.is_version = bool(file.head["time"])
        self.is_committed = self.is_stray = False
        self.state_problem: Unread | None = None  # for which it is not known whether it is either
        try:
            if (state := State.load(paths.state, whole=False)) is not None:
                snapshot, newer = dataclasses.asdict(state.snapshot), (file.head["newer"], file.head["newer_digests"])
                self.is_committed = (snapshot, state.digests) == newer
                self.is_stray = not self.is_committed and snapshot != file.head["snapshot"]
        except Unread as problem:
            self.state_problem = problem
        except Damaged:
            pass  # a state that is damaged says nothing

    @classmethod
    @contextlib.contextmanager
    def left(cls, paths: ImagePaths, *, from_disk: bool = False) -> Iterator[Undo | None]:
        """The undo that is there, if it is whole and of the image; else None. Raises Unread if nobody can tell now."""
        with contextlib.ExitStack() as files:
            undo = None
            with contextlib.suppress(FileNotFoundError):
                file = files.enter_context(PatchFile(paths.undo, "version", from_disk=from_disk))
                # An undo without a footer was being written when the crash came, or its footer decayed since.
                is_needed = file.footer is not None or (file.head and file.head["base"] != identity_of(paths.image))
                undo = cls(paths, file) if file.head and is_needed else None
                if undo is None:
                    cls._check_read(file)
            yield undo if undo is not None and not undo.is_stray else None

    @classmethod
    def write(
        cls,
        paths: ImagePaths,
        image: SparseFile,
        head: Json,
        differing: Iterable[tuple[int, int, bytes]],
        tick: Callable[[int], None],
    ) -> Undo:
        """Step 2 of a sync: the undo, durable; its file is to be closed. If that fails, there is none.

        `differing` are the chunks that the two snapshots differ in: index, bitmap of the pages that the sync changes,
        and the digest that the chunk had.
        """
        file = PatchFile.create(paths.undo, "version", {"id": secrets.token_hex(16), **head})
        try:
            for index, pages, digest in differing:
                patch = Patch.of_image(image, index, pages, digest)
                file.append(patch)
                tick(patch.length)
            file.complete()
            sync_directory(paths.metadata)
            return cls(paths, file)
        except BaseException:
            file.close()
            paths.undo.unlink()
            raise

    @classmethod
    def recover(cls, paths: ImagePaths, tick: Callable[[int], None]) -> bool:
        """Mend what a sync left that a crash ended, without the network; returns whether it put an undo back.

        `tick` gets the bytes that were written, and may raise `Interrupted`: the next call begins from the start.
        """
        paths.check_link()
        drop_journal(paths)
        with cls.left(paths, from_disk=True) as undo:
            if undo is None:
                paths.undo.unlink(missing_ok=True)
            elif undo.state_problem:
                raise undo.state_problem
            elif undo.is_committed:
                undo.settle()
            elif not exists(paths.image):
                undo.drop()
            else:
                paths.check_unread()
                undo.put_back(tick)
                return True
        return False

    def put_back(self, tick: Callable[[int], None]) -> None:
        """Make the image what it was.

        It also gets its old time, so that its state and the spool still fit it. If a part of the undo decayed it does
        not, for then the next sync must compare all of the image, as it does where the time may not be set. A part that
        cannot be read now may be the next time: the undo stays for that, and Unread is raised.
        """
        base = self.file.head["base"]
        self.file.load_index()
        is_whole = not self.file.doubtful
        with contextlib.closing(SparseFile(self.paths.image, os.O_RDWR)) as image:
            image.forget_cached()  # ext4 does not write pages again that a write error left in the cache
            for entry in self.file.entries():
                try:
                    patch = self.file.patch_at(entry.position)
                except Damaged:
                    is_whole = False
                    continue
                patch.write_to(image)
                tick(patch.length)
            image.set_length(base["size"])
            image.sync()  # before its time says that it is the old one
            self._check_read(self.file)
            if is_whole:
                set_time(image, base["mtime_ns"])
        self.drop()

    @staticmethod
    def _check_read(file: PatchFile) -> None:
        """Raise Unread if a part of it could not be read."""
        if file.is_unread:
            raise Unread(
                f"{file.path} cannot be read: the disk may be failing. If it stays so, delete that file, and the next "
                "run compares all of the image with the volume"
            )

    def settle(self) -> None:
        """Step 6 of a sync: the undo becomes a version, or goes if none is kept; the spool goes."""
        if self.is_version:
            if not exists(self.paths.versions):
                self.paths.versions.mkdir(mode=0o700)
                sync_directory(self.paths.metadata)
            self.paths.undo.rename(self.paths.versions / self.file.head["time"])
            sync_directory(self.paths.versions)
            sync_directory(self.paths.metadata)
        else:
            self.drop()
        self.paths.spool.unlink(missing_ok=True)
        sync_directory(self.paths.metadata)

    def drop(self) -> None:
        """Remove it."""
        self.paths.undo.unlink()
        sync_directory(self.paths.metadata)


def drop_journal(paths: ImagePaths) -> None:
    """Drop the unfinished journal and version that an older dosvob, which had no undo, left in the middle of a sync.

    Raises DosvobError if the journal is whole, or may be: only the dosvob that wrote it can finish that sync.
    """
    journal = paths.metadata / f"{paths.image.name}.journal"
    with contextlib.suppress(FileNotFoundError), PatchFile(journal, "journal") as file:
        if file.footer is not None or file.is_unread or (file.limit and not file.head):
            raise DosvobError(
                f"{journal} was left by an older dosvob, which must finish it: run that one's `dosvob.py verify` once "
                f"with this directory, then this one. Or delete {journal}, and the next run compares all of the image "
                "with the volume"
            )
        (paths.metadata / f"{paths.image.name}.version.new").unlink(missing_ok=True)
        journal.unlink()


class Ranges:
    """Ranges of bytes, made of chunks; neighbours that come one after the other are joined."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []  # starts and ends

    def add(self, index: int) -> None:
        """Add a chunk."""
        start = index * CHUNK
        first = self.ranges.pop()[0] if self.ranges and self.ranges[-1][1] == start else start
        self.ranges.append((first, start + CHUNK))

    @property
    def size(self) -> int:
        """The bytes that are in them."""
        return sum(end - start for start, end in self.ranges)

    def __str__(self) -> str:
        told = [f"{start} to {end - 1}" for start, end in sorted(self.ranges)[:20]]
        return "bytes " + ", ".join(told) + f" and {len(self.ranges) - 20} more places" * (len(self.ranges) > 20)


@dataclass(frozen=True)
class Content:
    """A chunk of a snapshot: its pages by their numbers, without those of zeros.

    It `is_sound` if it has the digest recorded for it; where none is recorded, if it can be read. `patched` is the
    bitmap of the pages that are not the image's.
    """

    index: int
    pages: dict[int, bytes]
    is_sound: bool
    patched: int = 0

    @functools.cached_property
    def filled(self) -> int:
        """The bitmap of its pages that are not zeros."""
        return sum(1 << page for page in self.pages)

    @property
    def chunk(self) -> bytes:
        """All of it; of zeros ZERO_CHUNK itself."""
        return b"".join([self.pages.get(page, ZERO_PAGE) for page in range(PAGES)]) if self.pages else ZERO_CHUNK


def laid_over(patches: Sequence[tuple[PatchFile, Entry]], wanted: int = ALL_PAGES) -> tuple[dict[int, bytes], int]:
    """The wanted pages that the patches of a chunk have, not verified; and a bitmap of those that none has.

    The patches are the newest first. Of each page the oldest one counts, and no other is read.
    """
    pages: dict[int, bytes] = {}
    for file, entry in reversed(patches):
        if wanted & entry.pages:
            pages |= file.pages_of(entry, wanted & entry.pages)
            wanted &= ~entry.pages
    return pages, wanted


def content_of(
    image: SparseFile,
    index: int,
    patches: Sequence[tuple[PatchFile, Entry]],
    digest: bytes,
    *,
    tries_zeros: bool = False,
) -> tuple[dict[int, bytes], bytearray, bool]:
    """The pages of a chunk of an image with patches laid over it, their digests, and whether they have this digest.

    Holes are believed as far as the digest proves them. If it `tries_zeros` all pages that no patch has are first taken
    for zeros: if the digest agrees the image is not read, and what is wrong with it there is not seen.
    """
    laid, rest = laid_over(patches)
    digests_laid = digests_of(laid)
    if (not rest or tries_zeros) and chunk_digest(digests_laid) == digest:
        return laid, digests_laid, True
    pages, digests = laid, digests_laid
    for hints in (True, False) if rest else ():
        if (stored := image.pages(index, rest, hints=hints)) is None:
            break
        pages, digests = laid | stored, digests_of(stored, digests_laid)
        if chunk_digest(digests) == digest:
            return pages, digests, True
    return pages, digests, False


class Spot(NamedTuple):
    """A chunk of an image and its patches, by the numbers of the steps back that have one.

    `recorded` is its digest in the image, None if none is known; `is_zeros` whether that and the file system say so.
    """

    chunk: int
    recorded: bytes | None
    is_zeros: bool
    patches: list[tuple[int, Entry]]


class Chain:
    """An image and all that leads back from it: what each snapshot was, chunk by chunk. To be closed.

    If an undo must be put back, it lays that over what it reads, and changes no file. `versions` are the newest first;
    `problem` is what is wrong with the state: versions can be restored without one; `no_versions` why these cannot even
    be listed. `moments`, `snapshots` and `sizes` (bytes) are the image's and the versions', by how many steps back each
    is; an unknown time or snapshot is None. `size` is the image's, `length` what there is of it. Raises
    FileNotFoundError without an image.
    """

    READ_BACK = 8192  # pages that a restore writes before it reads them from the disk, or chunks

    def __init__(self, paths: ImagePaths, *, from_disk: bool = False) -> None:
        self.paths = paths
        self.state: State | None = None
        self.problem: Damaged | None = None
        self.no_versions = ""
        self._from_disk = from_disk
        self._table: SparseFile | None = None
        self._digests, self._digests_at = b"", -1  # a part of the table
        self.flawed: set[int] = set()  # see `verify`
        paths.check_link()
        with contextlib.ExitStack() as files:
            self.image = files.enter_context(contextlib.closing(SparseFile(paths.image)))
            if from_disk:
                self.image.forget_cached()
            self.versions: list[Version] = []
            try:
                self.versions = Versions(paths).all()
            except OSError as problem:
                if not is_unreadable(problem):
                    raise
                self.no_versions = f"its older versions cannot be read: {explained(problem, paths.versions)}"
            undo = files.enter_context(Undo.left(paths, from_disk=from_disk))
            self._undo = undo.file if undo is not None and not undo.is_committed else None
            self._before = int(self._undo is not None)  # how many steps lead to the image's own snapshot
            length: int = self._undo.head["base"]["size"] if self._undo else os.fstat(self.image.fd).st_size
            self.size = -(-length // CHUNK) * CHUNK
            try:
                if (state := State.load(paths.state)) is not None:
                    self.state, self.size = state, state.snapshot.size
                    self._table = files.enter_context(contextlib.closing(SparseFile(paths.state)))
            except Damaged as problem:
                self.problem = problem
            newer = self.versions[0].newer if self.versions else None
            self._snapshot = self.state.snapshot if self.state else newer  # what the image is, as far as is known
            if self.state is None and newer is not None:
                self.size = max(self.size, newer.size)  # the image may have been cut
            self.length = length if self._snapshot else self.size
            moment = Versions.moment_of_image(self.state, self.versions)
            self.moments = [moment, *(version.moment for version in self.versions)]
            self.snapshots = [self.state and self.state.snapshot, *(version.snapshot for version in self.versions)]
            self.sizes = [snapshot.size if snapshot else self.size for snapshot in self.snapshots]
            self._files = files.pop_all()

    def depth_at(self, moment: datetime.datetime | None) -> int:
        """How many steps back the newest snapshot at or before `moment` is; without one 0, the image's.

        Raises UsageError if there is none as old as that, Damaged if nobody knows.
        """
        if moment is None:
            return 0
        moments = [candidate for candidate in self.moments if candidate is not None]
        if self.no_versions and (not moments or moments[0] > moment):
            raise Damaged(f"{self.paths.name}: {self.no_versions}")
        if self.moments[0] is None:
            raise UsageError(f"no snapshot is recorded for {self.paths.image}, so there is no version by time")
        for depth, candidate in enumerate(moments):
            if candidate <= moment:
                return depth
        raise UsageError(
            f"{self.paths.name} has no version as old as {local_time(moment)}; the oldest is of "
            f"{local_time(moments[-1])}"
        )

    def is_cut(self, size: int) -> bool:
        """Whether the image is too short for its first `size` bytes, recorded zeros at their end not counting."""
        missing = range(self.length // CHUNK, min(size, self.size) // CHUNK)
        return any(self._recorded(index) != ZERO_DIGEST for index in missing)

    def doubt(self, depth: int) -> str:
        """What to say of a snapshot that did not come up, and which one did; nothing of others."""
        found = [self.state.found if self.state else None, *(version.found for version in self.versions)]
        this = found[depth]
        if this is None or this.came_up is not False:
            return ""
        good = [moment for moment, each in zip(self.moments, found, strict=True) if moment and each and each.came_up]
        none = self.no_versions or "none that is kept does"
        the_last = f"the last one that does is of {local_time(good[0])}" if good else none
        return f"it does not come up: {this.words}; {the_last}"

    @contextlib.contextmanager
    def _steps(self, depth: int) -> Iterator[list[PatchFile]]:
        """What leads back from the image as it is to `depth` versions before, with their indexes.

        The first is the undo that is to be put back, if there is one.
        """
        known, pool = [self._snapshot], OpenFiles()
        with contextlib.ExitStack() as files:
            steps = [self._undo] if self._undo else []
            for version in self.versions[:depth]:
                step = PatchFile.of_version(version.path, from_disk=self._from_disk, pool=pool)
                steps.append(files.enter_context(step))
                if version.lacks_newer(known):
                    step.doubtful.append((-1, float("inf")))
                known.append(version.snapshot)
            for step in steps:
                step.load_index()
            yield steps

    def _walk(self, steps: Sequence[PatchFile]) -> Iterator[Spot]:
        """The chunks of the image, in order."""
        patched = by_chunk(steps)
        upcoming = next(patched, None)
        for index, is_hole in enumerate(self.image.chunk_holes(0, self.size // CHUNK)):
            patches: list[tuple[int, Entry]] = []
            if upcoming is not None and upcoming[0] == index:
                patches, upcoming = upcoming[1], next(patched, None)
            recorded = self._recorded(index)
            if recorded is None and self._undo and patches and patches[0][0] == 0:
                recorded = patches[0][1].digest
            yield Spot(index, recorded, is_hole and recorded == ZERO_DIGEST, patches)

    def _recorded(self, index: int) -> bytes | None:
        """The digest of a chunk of the image by the state; None without one."""
        if self._table is None:
            return None
        first, place = divmod(index, 4096)
        if first != self._digests_at:
            self._digests_at = first
            self._digests = self._table.read(BLOCK + first * 4096 * DIGEST_SIZE, 4096 * DIGEST_SIZE) or b""
        return self._digests[place * DIGEST_SIZE : (place + 1) * DIGEST_SIZE]

    def _of_image(self, spot: Spot, undo: Entry | None) -> tuple[dict[int, bytes], bytearray | None, bool]:
        """The pages of a chunk of the image, with what the undo has of it, their digests, and whether all is sound.

        The digests are None if nothing is recorded to compare them with.
        """
        if spot.is_zeros and undo is None:
            return {}, bytearray(ZERO_PAGES), True
        patches = [(self._undo, undo)] if self._undo and undo else []
        if spot.recorded is not None:
            return content_of(self.image, spot.chunk, patches, spot.recorded)
        stored = self.image.pages(spot.chunk, hints=False)
        is_whole = stored is not None and (spot.chunk + 1) * CHUNK <= self.length
        return stored or {}, None, is_whole

    def verify(self, tick: Callable[[int], None]) -> list[Ranges]:
        """Compare the image and all versions with their digests; what is damaged of each, the image first.

        What decayed of a version's file and can be done without is in `flawed`, by how many steps back it is.
        """
        damaged = [Ranges() for _ in self.sizes]
        with self._steps(len(self.versions)) as steps:
            is_doubtful = any(step.doubtful for step in steps)
            for spot in self._walk(steps):
                if is_doubtful or spot.patches or not spot.is_zeros:
                    for depth in self._wrong(spot, steps, self._doubtful(spot, steps) if is_doubtful else ()):
                        if spot.chunk * CHUNK < self.sizes[depth]:
                            damaged[depth].add(spot.chunk)
                tick(CHUNK)
        return damaged

    def _wrong(self, spot: Spot, steps: Sequence[PatchFile], doubtful: Sequence[int]) -> Iterator[int]:
        """How many steps back a chunk is not sound. Pages that are as recorded are hashed once."""
        before, own = self._before, dict(spot.patches)
        undo = own.pop(0, None) if before else None
        pages, known, is_sound = self._of_image(spot, undo)
        patched = undo.pages if undo else 0
        digests, since = digests_of(pages if own else {}) if known is None else known, 0
        in_doubt = [number for number in doubtful if number >= before and number not in own]
        for number in sorted([*own, *in_doubt]):
            depth = number + 1 - before
            if not is_sound:
                yield from range(since, depth)
            since, is_sound = depth, False
            if entry := own.get(number):
                data, is_whole = steps[number].checked_pages(entry)
                if not is_whole:
                    self.flawed.add(depth)
                for page in numbers_in(entry.pages):
                    at = page * DIGEST_SIZE
                    digest = hashlib.sha256(data[page]).digest() if page in data else ZERO_PAGE_DIGEST
                    digests[at : at + DIGEST_SIZE] = digest
                patched |= entry.pages
                is_sound = entry.digest == chunk_digest(digests) or entry.digest == self._without(digests, patched)
        if not is_sound:
            yield from range(since, 1 + len(self.versions))

    @staticmethod
    def _without(digests: bytearray, patched: int) -> bytes:
        """The digest of a chunk of which only these pages are no zeros: then it is sound whatever the image has."""
        places = [(page * DIGEST_SIZE, patched >> page & 1) for page in range(PAGES)]
        return chunk_digest(
            b"".join([digests[at : at + DIGEST_SIZE] if has else ZERO_PAGE_DIGEST for at, has in places])
        )

    @staticmethod
    def _doubtful(spot: Spot, steps: Sequence[PatchFile]) -> list[int]:
        """The steps whose damaged parts may have a patch of a chunk."""
        return [number for number, step in enumerate(steps) if step.may_have_lost(spot.chunk)]

    def contents(self, depth: int) -> Iterator[Content]:
        """What each chunk of the image was `depth` versions before. What is damaged is laid over it as it is."""
        with self._steps(depth) as steps:
            is_doubtful = any(step.doubtful for step in steps)
            for spot in self._walk(steps):
                if spot.is_zeros and not spot.patches and not is_doubtful:
                    yield Content(spot.chunk, {}, is_sound=True)
                else:
                    yield self._content(spot, steps, self._doubtful(spot, steps) if is_doubtful else ())

    def _content(self, spot: Spot, steps: Sequence[PatchFile], doubtful: Sequence[int]) -> Content:
        last, patched = spot.patches[-1][0] if spot.patches else -1, 0
        for _, entry in spot.patches:
            patched |= entry.pages
        if last < self._before:  # it is the image's own, or was
            pages, _, is_sound = self._of_image(spot, spot.patches[0][1] if spot.patches else None)
        else:
            patches = [(steps[number], entry) for number, entry in spot.patches]
            digest = spot.patches[-1][1].digest
            pages, _, is_sound = content_of(self.image, spot.chunk, patches, digest, tries_zeros=True)
        if self._before and spot.recorded is not None:
            last = max(last, 0)  # the state's digest tells, whatever the undo had
        return Content(spot.chunk, pages, is_sound and all(number <= last for number in doubtful), patched)

    def restore(self, depth: int, target: Path, tick: Callable[[int], None]) -> tuple[Path, Ranges]:
        """Write the image, or the version `depth` steps back, to a new, sparse file.

        Returns the file, and what of it is damaged: if anything is, the file is `target.damaged`. Until it is complete
        it is `target.partial`, which a failure removes. Raises DosvobError if one of the three exists already, or there
        is not enough free space, OSError.
        """
        size = self.sizes[depth]
        partial, damaged_target = (target.with_name(f"{target.name}.{what}") for what in ("partial", "damaged"))
        for path in (target, partial, damaged_target):
            if exists(path, follow_symlinks=False):
                raise DosvobError(
                    f"{path} is there, and nothing is restored over it: move it away, or name another file"
                )
        damaged = Ranges()
        written: list[Content] = []  # what is to be read back
        with contextlib.closing(SparseFile(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL)) as file:
            try:
                is_cloned = self._clone_to(file, depth, size)
                file.set_length(size)
                held = 0
                for content in itertools.islice(self.contents(depth), size // CHUNK):
                    if content.pages or is_cloned:
                        file.write_pages(content.index, content.pages, content.patched if is_cloned else content.filled)
                    if content.pages or is_cloned or not content.is_sound:
                        written.append(content)
                    held += len(content.pages)
                    if held > self.READ_BACK or len(written) > self.READ_BACK:
                        self._read_back(file, written, damaged, is_cloned=is_cloned)
                        held = 0
                    tick(CHUNK)
                self._read_back(file, written, damaged, is_cloned=is_cloned)
                file.sync()
                rename_new(partial, final := damaged_target if damaged.ranges else target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return final, damaged

    @staticmethod
    def _read_back(file: SparseFile, written: list[Content], damaged: Ranges, *, is_cloned: bool) -> None:
        """Compare what a restored file has on the disk with what it is to have, and write again what it has not.

        `written` are in order. Of a clone all is compared: ZFS has been seen to show in one what was there before. A
        new file has nothing where nothing was written.
        """

        def is_there(content: Content) -> bool:
            if is_cloned:  # a hole that contradicts what is to be there is read
                hints = not content.patched
                return file.pages(content.index, hints=hints) == content.pages or (
                    hints and file.pages(content.index, hints=False) == content.pages
                )
            return all(
                file.read(content.index * CHUNK + first * PAGE, count * PAGE)
                == b"".join([content.pages[page] for page in range(first, first + count)])
                for first, count in runs(content.filled)
            )

        for attempt in (1, 2) if written else ():
            file.forget_cached(written[0].index * CHUNK, (written[-1].index + 1 - written[0].index) * CHUNK)
            for content in written if not is_cloned else ():
                for first, count in runs(content.filled):
                    file.read_ahead(content.index * CHUNK + first * PAGE, count * PAGE)
            wrong = [content for content in written if not is_there(content)]
            for content in wrong if attempt == 1 else ():
                file.write_pages(content.index, content.pages, ALL_PAGES)
            if not wrong:
                break
        lost = {content.index for content in wrong} if written else set()
        for content in written:
            if content.index in lost or not content.is_sound:
                damaged.add(content.index)
        written.clear()

    def _clone_to(self, file: SparseFile, depth: int, size: int) -> bool:
        """Make a file share the image's content; where its file system cannot, check that there is space for a copy."""
        with contextlib.suppress(OSError):
            if self._undo is None:  # else the image is not what the first step back begins with
                fcntl.ioctl(file.fd, 0x40049409, self.image.fd)  # FICLONE of ioctl_ficlone(2)
                self.image.forget_cached()  # what is on the disk is what they share
                return True
        file.set_length(0)  # it may have got a part before it failed
        free = file.free_space()
        held, older = os.fstat(self.image.fd).st_blocks * 512, sum(each.occupied for each in self.versions[:depth])
        needed = min(held + older, size)
        if needed > free:
            needed = min(needed, self._filled(depth, size))
        if needed > free:
            raise DosvobError(
                f"{file.path} may take up to {human_size(needed)}, and {human_size(free)} are free there: make room"
            )
        return False

    def _filled(self, depth: int, size: int) -> int:
        """The bytes of the chunks that are not recorded to be zeros."""
        with self._steps(depth) as steps:
            spots = itertools.islice(self._walk(steps), size // CHUNK)
            return CHUNK * sum(
                (spot.patches[-1][1].digest if spot.patches else spot.recorded) != ZERO_DIGEST for spot in spots
            )

    def close(self) -> None:
        """Close all files."""
        self._files.close()


def rename_new(old: Path, new: Path) -> None:
    """Rename, durably, but not over an existing file; raises DosvobError then, and leaves the old name."""
    if exists(new, follow_symlinks=False):
        raise DosvobError(f"{new} has appeared meanwhile: move it away")
    old.rename(new)
    sync_directory(new.parent)


@dataclass(frozen=True)
class Source:
    """The content for a new volume; `size` in bytes.

    `region`, `volume_id` and `volume_name` are those of the original volume, as far as they are known; `snapshot_at` is
    when its last snapshot was taken here; `doubt` is what `Chain.doubt` says. Each call of `chunks` starts from the
    beginning; for a hole it yields ZERO_CHUNK. It raises Damaged.
    """

    name: str
    size: int
    is_checked: bool  # whether the digests of what it has are recorded
    chunks: Callable[[], Iterator[tuple[int, bytes]]]
    region: str = ""
    volume_id: str = ""
    volume_name: str = ""
    snapshot_at: str = ""
    doubt: str = ""

    FORMATS: ClassVar[Mapping[tuple[int, bytes], str]] = {
        # what a file that is no raw image has, and where; the command that makes one of it
        (0, b"QFI\xfb"): "qemu-img convert -f qcow2 -O raw",
        (0, b"KDMV"): "qemu-img convert -f vmdk -O raw",
        (0, b"# Disk DescriptorFile"): "qemu-img convert -f vmdk -O raw",
        (0, b"vhdxfile"): "qemu-img convert -f vhdx -O raw",
        (0, b"conectix"): "qemu-img convert -f vpc -O raw",
        (64, b"\x7f\x10\xda\xbe"): "qemu-img convert -f vdi -O raw",
        (0, b"\x1f\x8b\x08"): "gzip -dc",
        (0, b"\x28\xb5\x2f\xfd"): "zstd -dc",
        (0, b"\xfd7zXZ\0"): "xz -dc",
        (0, b"BZh"): "bzip2 -dc",
    }

    @classmethod
    def _refuse_format(cls, path: Path, head: bytes) -> None:
        """Raise UsageError for a file that is a packed or compressed image: a volume of it would be of no use."""
        for (offset, magic), command in cls.FORMATS.items():
            if head.startswith(magic, offset):
                raw = path.with_suffix(".img" if path.suffix != ".img" else ".raw")
                to = "" if command.startswith("qemu") else "> "
                raise UsageError(
                    f"{path} is no raw disk image. To make one of it: {command} {shlex.quote(str(path))} "
                    f"{to}{shlex.quote(str(raw))}; then restore --from {shlex.quote(str(raw))}"
                )

    @classmethod
    @contextlib.contextmanager
    def of_file(cls, path: Path) -> Iterator[Source]:
        """A plain file; raises OSError, UsageError."""
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        with contextlib.closing(SparseFile(path)) as file:
            size = os.fstat(file.fd).st_size
            cls._refuse_format(path, os.pread(file.fd, 512, 0))

            def chunks() -> Iterator[tuple[int, bytes]]:
                for index in range(-(-size // CHUNK)):
                    if (chunk := file.chunk(index)) is None:
                        raise Damaged(f"{path} cannot be read at byte {index * CHUNK}: the disk may be failing")
                    yield index, chunk

            yield cls(str(path), size, is_checked=False, chunks=chunks)

    @classmethod
    @contextlib.contextmanager
    def of_image(cls, paths: ImagePaths, moment: datetime.datetime | None) -> Iterator[Source]:
        """An image, or its version of that time; raises Damaged for damage that shows without reading all of it.

        Raises UsageError if there is none, OSError.
        """
        with contextlib.closing(Chain(paths)) as chain:
            depth = chain.depth_at(moment)
            snapshot, taken, size = chain.snapshots[depth], chain.moments[depth], chain.sizes[depth]
            name = f"{paths.name} of {local_time(taken)}" if taken else paths.name
            at = ["--at", local_time(taken)] if taken else []
            rest = f"to restore the rest of it to a file: {command_line('restore', paths.name, 'FILE', *at)}"
            for version in chain.versions[:depth]:
                if not version.is_whole:
                    raise Damaged(f"{version.path} is damaged; {rest}")
            if chain.problem or chain.is_cut(size):
                raise Damaged(
                    f"{chain.problem or f'{paths.image} has only {chain.length} bytes of {chain.size}'}; {rest}"
                )

            def chunks() -> Iterator[tuple[int, bytes]]:
                for content in itertools.islice(chain.contents(depth), size // CHUNK):
                    if not content.is_sound:
                        raise Damaged(f"{name} is damaged at byte {content.index * CHUNK}; {rest}")
                    yield content.index, content.chunk

            yield cls(
                name,
                size,
                is_checked=chain.state is not None,
                chunks=chunks,
                region=snapshot.region if snapshot else "",
                volume_id=snapshot.volume_id if snapshot else "",
                volume_name=(snapshot.name if snapshot else paths.image.name).rpartition("/")[2],
                snapshot_at=chain.state.snapshot.taken_at if chain.state else "",
                doubt=chain.doubt(depth),
            )


# ── The home ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# One backups directory as a whole: its lock, its id, what is in it, and what a crash left there.


class Home:
    """One backups directory: its lock, its id, and what is in it.

    `work` says what the holder does. Each holder writes it into a line of the lock's file, for those who must wait.
    """

    LINE = 200  # bytes

    def __init__(self, path: Path, work: str = "") -> None:
        self.path = path
        self.metadata = path / ".dosvob"
        self._work = work

    @contextlib.contextmanager
    def locked(self, *, with_id: bool = True) -> Iterator[None]:
        """Hold its lock; creates what is missing, an id too if one is needed. UsageError if held, or not writable."""
        try:
            if not self.path.is_dir():
                self.path.mkdir(mode=0o700)
                sync_directory(self.path.resolve().parent)
            self.make_directory("")
            lock = self.metadata / "lock" if with_id else self._lock()
            fd = create_private(lock)
        except OSError as problem:
            raise UsageError(f"cannot write to {self.path}: {problem.strerror}: is it there, and yours?") from problem
        with self._held(fd, fcntl.LOCK_EX, lock):
            if with_id and not self.id:  # durable before anything is named by it
                self.write("home", secrets.token_hex(4) + "\n")
            yield

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Hold its lock for reading, as several may, where there is a lock to open. Busy if somebody is at work."""
        self.check()
        for flags in (os.O_RDWR, os.O_RDONLY):
            with contextlib.suppress(OSError):  # a copy, or not ours
                lock = self._lock()
                fd = os.open(lock, flags | os.O_CLOEXEC)
                break
        else:
            yield
            return
        with self._held(fd, fcntl.LOCK_SH, lock):
            yield

    def _lock(self) -> Path:
        """The file that is locked; for a region's directory, which has no id, that of its home."""
        above = Path(os.path.abspath(self.path)).parent / ".dosvob"
        if not exists(self.metadata / "home"):
            with contextlib.suppress(OSError):  # what is above may be somebody else's
                if exists(above / "home"):
                    return above / "lock"
        return self.metadata / "lock"

    def is_read_only(self) -> bool:
        """Whether nothing can be changed in it, as in a copy on a read-only disk, or in somebody else's."""
        return self.metadata.is_dir() and not os.access(self.metadata, os.W_OK)

    def is_busy(self) -> bool:
        """Whether somebody is at work in it."""
        try:
            with Home(self.path).unchanged():
                return False
        except Busy:
            return True

    @contextlib.contextmanager
    def _held(self, fd: int, kind: int, lock: Path) -> Iterator[None]:
        try:
            try:
                if self._work:
                    with contextlib.suppress(OSError):  # others have it too, or the file cannot be written to
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.ftruncate(fd, 0)  # the lines of killed holders
                self._take(fd, kind)
            except OSError as problem:
                if kind == fcntl.LOCK_EX:
                    raise UsageError(
                        f"{self.path} cannot be locked ({problem.strerror}), so that two runs could meet there: mount "
                        "it with locks, as NFS has by -o local_lock=flock"
                    ) from problem
            with self._named(fd, lock):
                yield
        finally:
            os.close(fd)

    def _take(self, fd: int, kind: int) -> None:
        """Lock it; raises Busy. Who does not say what for has it for a moment; a line may be of one that was killed."""
        for attempt in range(20):
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holders = ", ".join(self._holders(fd))
            if attempt == 19 or (holders and attempt > 3):
                of = f", {holders}" if holders else ""
                raise Busy(f"another dosvob is at work in {self.path}{of}: wait until it ends")
            time.sleep(0.05)

    @contextlib.contextmanager
    def _named(self, fd: int, lock: Path) -> Iterator[None]:
        """Write a line with the work and its start into the lock's file, if that is writable; blank it at the end."""
        place = -1
        if self._work:
            line = f"{utc_now().isoformat()} {self._work}".encode(errors="replace")[: self.LINE - 1]
            with contextlib.suppress(OSError), open(lock, "ab", buffering=0) as end:
                end.write(line.ljust(self.LINE - 1) + b"\n")  # in one write, behind the lines of others
                place = end.tell() - self.LINE
        try:
            yield
        finally:
            if place >= 0:
                with contextlib.suppress(OSError):
                    os.pwrite(fd, b" " * (self.LINE - 1), place)

    def _holders(self, fd: int) -> Iterator[str]:
        """What the holders of the lock do, and since when, by its file."""
        with contextlib.suppress(OSError):
            for line in os.pread(fd, 100 * self.LINE, 0).decode(errors="replace").splitlines():
                since, _, work = line.strip().partition(" ")
                if (moment := parse_time(since)) is not None:
                    yield f"{work} since {local_time(moment)}"

    def check(self) -> None:
        """Raise UsageError if it is not there."""
        if not self.path.is_dir():
            raise UsageError(f"there is no {self.path}: say where the images are with --backups")

    @property
    def id(self) -> str:
        """Its id, which is in the names of all that is created for it; empty if it has none yet. Raises OSError."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            text = (self.metadata / "home").read_text(encoding="ascii").strip()
            return text if re.fullmatch(r"[0-9a-f]{8}", text) else ""
        return ""

    def write(self, name: str, text: str) -> None:
        """Replace a small file of ours, durably; raises OSError."""
        new = self.metadata / f"{name}.new"
        with os.fdopen(create_private(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.metadata / name)
        sync_directory(self.metadata)

    def make_directory(self, region: str) -> None:
        """Create, durably, the directories for the images of a region, "" for none, that do not exist."""
        directory = self.path / region
        if directory.is_file():
            quoted = shlex.quote(str(directory))
            raise DosvobError(
                f"{directory} is a file, and the images of the region {region} go into a directory of that name. If it "
                f"is the image of a volume in that region: mv {quoted} {quoted}.image && mkdir {quoted} "
                f"&& mv {quoted}.image {quoted}/{region}; otherwise move it elsewhere"
            )
        if region and exists(directory / ".dosvob" / "home"):
            raise DosvobError(
                f"{directory} is a backups directory of its own: the images of {region} cannot go there, unless you "
                f"run {command_line('sweep', '--backups', str(directory))} and then delete {directory}/.dosvob/home"
            )
        for path in (directory, directory / ".dosvob"):
            path.mkdir(mode=0o700, exist_ok=True)
        for path in (self.path, directory):  # an undo counts only if its directory survives a power cut
            sync_directory(path)

    def directories(self) -> list[str]:
        """The directories with images: "" and those of regions. A directory with an id of its own is another home."""
        found = [""]
        for name in filter(ImagePaths.VOLUME_NAME.fullmatch, names_in(self.path)):
            metadata, is_region = self.path / name / ".dosvob", False
            with contextlib.suppress(PermissionError):  # then it is nothing of ours
                is_region = not may_be_file(self.path / name) and exists(metadata)
            if is_region and not exists(metadata / "home"):
                found.append(name)
        return found

    def names(self, *, with_aside: bool = True) -> set[str]:
        """The names of all that has an image, a state or versions here: volumes, and what was set aside."""
        patterns = (ImagePaths.VOLUME_NAME, *([ImagePaths.ASIDE] if with_aside else []))
        names = set()
        for region in self.directories():
            directory = self.path / region
            metadata = map(Path, names_in(directory / ".dosvob"))
            known = {path.stem for path in metadata if path.suffix in (".state", ".versions")}
            fit = {
                name
                for name in known.union(names_in(directory))
                if any(pattern.fullmatch(name) for pattern in patterns)
            }
            there = {name for name in fit if name in known or may_be_file(directory / name)}
            names |= {f"{region}/{name}" if region else name for name in there}
        return names

    def remains(self) -> dict[Path, str]:
        """What syncs and restores left here besides images, states and versions, or put out of the way: by volume."""
        kinds = {".": "partial|damaged|set-aside-.*", ".dosvob": r"spool|undo|state\.new|versions\.of-.*"}
        found = {}
        for region, (place, kind) in itertools.product(self.directories(), kinds.items()):
            for name in names_in(self.path / region / place):
                if fit := re.fullmatch(rf"({ImagePaths.VOLUME_NAME.pattern})\.(?:.*\.)?(?:{kind})", name):
                    found[self.path / region / place / name] = f"{region}/{fit[1]}" if region else fit[1]
        return found

    @staticmethod
    def occupied(path: Path) -> int:
        """The bytes that a file, or a directory with its files, takes; at least, if the disk cannot read all of it."""
        occupied = 0
        below = [Path(place, name) for place, *names in os.walk(path) for name in itertools.chain(*names)]
        for each in [path, *below]:
            with contextlib.suppress(OSError):  # what the disk cannot read, or went meanwhile
                occupied += each.stat().st_blocks * 512
        return occupied

    def select(self, names: list[str], *, with_aside: bool = True, remains: Sequence[str] = ()) -> list[str]:
        """What these names or patterns fit, or all without names.

        Raises UsageError for one that fits nothing, and no name of what `remains` either.
        """
        there = self.names()
        chosen: list[str] = []
        for name in names:
            if not (found := self.matching(name, there)) and not self.matching(name, remains):
                near = difflib.get_close_matches(name, there, n=1)
                hint = f": did you mean {near[0]}?" if near else ""
                raise UsageError(f"there is no image of {name} in {self.path}{hint}")
            chosen += found
        return list(dict.fromkeys(chosen)) if names else sorted(self.names(with_aside=with_aside))

    def one_named(self, name: str) -> str:
        """The image of this name, or the only one that it fits; raises UsageError if it fits none, or several."""
        found = self.select([name])
        if len(found) > 1 and name not in found:
            raise UsageError(f"{name} may be {' or '.join(found)}: say which")
        return name if name in found else found[0]

    def move(self, old: ImagePaths, new: ImagePaths) -> None:
        """Move all files of an image to another directory; raises DosvobError, OSError.

        After a crash the next call completes it: the state moves last, and tells until then that something is left to
        move, and where to.
        """
        rest = [path for name in names_in(old.metadata) if name.startswith(f"{old.image.name}.")
                if (path := old.metadata / name) != old.state and not name.startswith(f"{old.image.name}.set-aside-")
                and path.suffix != ".json"]  # fmt: skip
        files = (old.image, old.partial, *rest, old.state)
        paths = [path for path in files if exists(path, follow_symlinks=False)]
        for path in paths:
            if exists(target := new.directory / path.relative_to(old.directory), follow_symlinks=False):
                raise DosvobError(f"{path} belongs where {target} is already: move one of them elsewhere")
        self.make_directory("" if new.directory == self.path else new.directory.name)
        for path in paths:
            if path == old.state:
                self._sync(old, new)
            if path.is_symlink():  # a relative one would lead elsewhere from there
                link = path.with_name(f"{path.name}.link")
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.realpath(path))
                link.rename(path)
            path.rename(new.directory / path.relative_to(old.directory))
        self._sync(old, new)

    @staticmethod
    def _sync(*images: ImagePaths) -> None:
        for paths in images:
            sync_directory(paths.directory)
            sync_directory(paths.metadata)

    def wanted(self) -> set[str]:
        """The names that the last run without names on its command line had to back up."""
        try:
            names = json.loads((self.metadata / "wanted.json").read_text())
        except (OSError, ValueError):
            return set()
        return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()

    @staticmethod
    def matching(name: str, names: Iterable[str]) -> list[str]:
        """The names that a name or pattern fits: REGION/NAME if it has a slash, else NAME in whatever region."""
        return sorted(
            each for each in names if fnmatch.fnmatchcase(each if "/" in name else each.rpartition("/")[2], name)
        )

    def unfinished(self, paths: ImagePaths) -> str:
        """What to say of an image that a crash left between two snapshots; "" for any other."""
        with Undo.left(paths) as undo:
            if undo is not None and not undo.is_committed and not self.is_busy():
                return f"an interrupted backup must still be taken back: {command_line('verify', paths.name)}"
        return ""

    def recover(self, report: Reporter, stop: Stop) -> set[str]:
        """Take back interrupted backups, without network; returns the names for which that failed."""
        failed: set[str] = set()
        try:
            names = sorted(self._with_file("undo") | self._with_file("journal"))
        except OSError as problem:  # no reason to say nothing of what a sweep meets
            report.error(explained(problem, self.path))
            return failed
        for name in names:
            meter = Meter(report, stop, f"{name}: taking back an interrupted backup", is_announced=True)
            try:
                if Undo.recover(ImagePaths(self.path, name), meter):
                    report.end_progress()
                    report.say(f"{name}: an interrupted backup was taken back; the image is what it was before")
            except (DosvobError, OSError) as problem:
                kept = "; the next backup or verify tries again" * isinstance(problem, OSError)
                report.error(f"{name}: an interrupted backup: {explained(problem, self.path)}{kept}")
                failed.add(name)
        return failed

    def _with_file(self, kind: str) -> set[str]:
        """The names that have a file of this kind among the metadata."""
        places = [Path(region) for region in self.directories()]
        return {
            str(place / name[: -len(kind) - 1])
            for place in places
            for name in names_in(self.path / place / ".dosvob")
            if name.endswith(f".{kind}")
        }


# ── The update of an image ───────────────────────────────────────────────────────────────────────────────────────────
# One sync's side of the local disk: what the image has, what becomes of it, and the end of that. Knows files only.


class Spool:
    """The patches that a sync has fetched: of each chunk the last one counts. It takes 8 bytes of memory per chunk.

    A patch applies to the image as it is, not to the result of an earlier patch. The spool promises nothing: the next
    sync uses its whole patches, if the image is still the one that it was begun for.
    """

    def __init__(self, file: PatchFile, chunks: int) -> None:
        self.file = file
        self.positions = array.array("Q", [0]) * chunks  # in the file; 0: none

    @classmethod
    def open(cls, paths: ImagePaths, volume_id: str, chunks: int, tick: Callable[[int], None]) -> Spool:
        """The spool for a new sync: the one that an interrupted sync left, if it fits the image, or an empty one."""
        base, fits = identity_of(paths.image), False
        with contextlib.suppress(FileNotFoundError), PatchFile(paths.spool, "spool") as file:
            fits = (file.head.get("volume_id"), file.head.get("base")) == (volume_id, base)
        if not fits:
            head = {"id": secrets.token_hex(16), "volume_id": volume_id, "base": base}
            PatchFile.create(paths.spool, "spool", head).close()
        spool = cls(PatchFile(paths.spool, "spool", os.O_RDWR), chunks)
        spool.file.cut(spool._find_patches(tick))
        return spool

    def _find_patches(self, tick: Callable[[int], None]) -> int:
        """Read all of it; returns where its good part ends."""
        good = BLOCK
        with contextlib.suppress(Damaged):  # where a crash cut a patch off
            for position, patch in self.file.patches():
                if patch.index >= len(self.positions):
                    break
                self.positions[patch.index] = position
                good = position + patch.length
                tick(patch.length)
        return good

    def append(self, patch: Patch) -> None:
        """Append a patch, which replaces an earlier one of its chunk."""
        self.positions[patch.index] = self.file.append(patch)

    def header(self, index: int) -> Patch | None:
        """The patch of a chunk without its data, if there is one."""
        return self.file.header_at(self.positions[index]) if self.positions[index] else None

    def patch(self, index: int) -> Patch | None:
        """The patch of a chunk, if there is one; raises Damaged."""
        return self.file.patch_at(self.positions[index]) if self.positions[index] else None

    def chunks(self) -> Iterator[int]:
        """The chunks that have a patch, in order."""
        return (index for index, position in enumerate(self.positions) if position)

    def space_needed(self) -> int:
        """The most bytes that writing the spool to the image takes, the file system's metadata included.

        It assumes that the file system copies what is overwritten, as Btrfs and ZFS do, and XFS if it is shared.
        """
        filled = sum(self.file.header_at(self.positions[index]).filled.bit_count() * PAGE for index in self.chunks())
        return filled + filled // 64 + (256 << 10) * bool(filled)


class ImageDigests:
    """The digests of the local image with its spool applied. Only reads.

    `suspects` are chunks that differ from the state's digests, or cannot be read, until they are mended. `is_new`: this
    sync created the file, so what it has not stored there itself is zeros.
    """

    PARTS = 8  # every sync reads the next eighth of the image again, to find what decayed on disk
    READ_AHEAD = 8  # chunks

    def __init__(
        self,
        paths: ImagePaths,
        image: SparseFile,
        chunks: int,
        state: State | None,
        spool: Spool | None,
        *,
        reread: bool,
    ) -> None:
        self.is_new = False
        self.part = (state.reread + 1) % self.PARTS if state else 0
        self.suspects: set[int] = set()
        self._image = image
        self._chunks = chunks
        self._spool = spool
        self._state = paths.state if state else None
        is_trusted = state is not None and not reread and state.identity == identity_of(image.fd)
        part = range(*(-(-part * chunks // self.PARTS) for part in (self.part, self.part + 1)))
        self._reread = part if is_trusted else range(chunks)
        image.forget_cached(self._reread.start * CHUNK, max(len(self._reread), 1) * CHUNK)  # to come from the disk

    def digests(self, start: int) -> Iterator[bytes]:
        """The digests of the chunks in order, from `start` on; b"" for what cannot be read. Reads ahead."""
        self.suspects.clear()
        with self._state.open("rb", buffering=128 << 10) if self._state else io.BytesIO() as table:
            table.seek(BLOCK + start * DIGEST_SIZE)
            indices = range(start, self._chunks)
            recorded = (table.read(DIGEST_SIZE) for _ in indices)
            holes = self._image.chunk_holes(start, self._chunks)
            yield from done_ahead(self._digest, zip(indices, recorded, holes, strict=True), 1, self.READ_AHEAD)

    def _digest(self, chunk_at: tuple[int, bytes, bool]) -> bytes:
        """The digest of a chunk, given its index, its digest in the state (b"" for none) and whether it is a hole."""
        index, recorded, is_hole = chunk_at
        is_spooled = self._spool is not None and bool(self._spool.positions[index])
        if self.is_new or (is_hole and recorded == ZERO_DIGEST and not is_spooled):
            return ZERO_DIGEST
        if recorded and not (is_hole or is_spooled or index in self._reread):
            return recorded
        chunk = self._image.chunk(index)
        digest = b"" if chunk is None else digest_of(chunk)
        if chunk is None or (recorded and digest != recorded):
            self.suspects.add(index)
        patch = self._spool.patch(index) if self._spool is not None else None
        if patch is not None and chunk is not None and digest_of(patch.over(chunk)) == patch.digest:
            return patch.digest
        return digest

    def pages(self, index: int) -> bytes:
        """The digests of the pages of a chunk, without what the spool has; b"" if the disk cannot read it."""
        chunk = self._image.chunk(index)
        if chunk is None:
            self.suspects.add(index)
        return b"" if chunk is None else page_digests(chunk)


class Update:
    """One sync's changes to one image: patches that may come in any order within a window, and their commit.

    A first sync writes straight into NAME.partial, a later one into the spool. `changed` counts bytes; `differing` are
    the chunks of the image that were not as recorded. All chunks before the `frontier` are finished; `early` has the
    digests of finished chunks behind it. `tick` gets the bytes that the constructor and `finish` read or write, and may
    raise `Interrupted`. To be closed in any case; nothing counts before `finish`.
    """

    SPACE_FOR_OTHERS = 1 << 30  # bytes that a first sync on a full disk leaves to the changes of other volumes
    WRITE_OUT = 64 << 20  # bytes
    REST_OF_HEAD = 1600  # bytes, at most, of a version's head beside its two snapshots

    def __init__(
        self,
        paths: ImagePaths,
        snapshot: Snapshot,
        keep: Keep,
        warn: Callable[[str], None],
        tick: Callable[[int], None] = lambda _: None,
        *,
        reread: bool = False,
    ) -> None:
        self.chunks = snapshot.size // CHUNK
        self.frontier = 0
        self.early: dict[int, bytes] = {}
        self.changed = 0
        self.differing = Ranges()
        self._paths = paths
        self._snapshot = snapshot
        self._warn = warn
        self._tick = tick
        described = dataclasses.asdict(snapshot)
        seal(
            "version", {"snapshot": described, "newer": described, "more": "." * self.REST_OF_HEAD}
        )  # must be possible
        Undo.recover(paths, tick)  # what an earlier sync of this run may have left: to begin anew would lose it
        paths.check_unread()
        self._state = self._fitting_state()
        self._found = (self._state.found if self._state else None) or Finding()
        self.is_first = not exists(paths.image)  # whether there is no image yet
        self._makes_version = bool(self._older) or (
            (any(dataclasses.astuple(keep)) or bool(self._found.came_up)) and self._state is not None
        )
        flags = os.O_RDWR | (os.O_CREAT if self.is_first else 0)
        is_new = self.is_first and not exists(paths.partial)
        self._image = SparseFile(paths.partial if self.is_first else paths.image, flags)
        self.spool = None if self.is_first else Spool.open(paths, snapshot.volume_id, self.chunks, tick)
        if self.is_first:
            self._image.set_length(snapshot.size)
        new_state = create_private(paths.new_state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._new_state = os.fdopen(new_state, "wb", buffering=128 << 10)
        self._new_state.write(bytes(BLOCK))
        self._table = hashlib.sha256()
        self._unwritten = 0  # bytes that the kernel may keep in memory
        self.image_digests = ImageDigests(paths, self._image, self.chunks, self._state, self.spool, reread=reread)
        self.image_digests.is_new = is_new

    def _fitting_state(self) -> State | None:
        """The state, if it is this volume's; sets aside what is another volume's, and versions without an image."""
        paths, size = self._paths, self._snapshot.size
        state, versions = State.load(paths.state), Versions(paths).all()
        self._older = versions  # none other comes or goes before the end of this sync
        is_other = state is not None and state.snapshot.volume_id != self._snapshot.volume_id
        if state is not None and not is_other and state.snapshot.size > size:
            raise DosvobError(
                f"DigitalOcean says that it has shrunk to {human_size(size)}, which no volume does; {paths.image} was "
                "left as it is: try again later"
            )
        has_image = exists(paths.image)
        length = paths.image.stat().st_size if has_image else 0
        if is_other or (state is None and length > size) or (versions and not has_image):
            aside = paths.set_aside(Versions.moment_of_image(state, versions) or utc_now())
            what = f"the image {paths.image} is of another volume that had this name, and" if has_image else (
                f"the image {paths.image} is gone, and its older versions, which are of no use without it,"
            )  # fmt: skip
            self._warn(f"{what} was set aside as {aside.image}: delete it when you no longer need it")
            has_image, self._older = False, []
        if not has_image:
            paths.state.unlink(missing_ok=True)
            paths.spool.unlink(missing_ok=True)
            return None
        if state is not None and length > state.snapshot.size:  # it is cut by the end of this sync
            self._warn(
                f"{paths.image} has {length} bytes, and {state.snapshot.size} were backed up: somebody appended to it; "
                "it is cut"
            )
        newer = versions[0].newer if versions else None
        if state is not None and newer is not None and newer != state.snapshot:
            stamp = newer.moment(utc_now()).strftime(Version.TIME)
            moved = paths.versions.with_name(f"{paths.versions.name}.of-{stamp}-{secrets.token_hex(2)}")
            paths.versions.rename(moved)
            self._older = []
            self._warn(f"the versions of {paths.name} do not lead back from its image; they were moved to {moved}")
        return state

    # What becomes of it

    def has_nothing_at(self, index: int, digest: bytes) -> bool:
        """Whether the image, by the chunk's local digest, has zeros there, or nothing that can be read."""
        return digest == b"" or (digest == ZERO_DIGEST and not (self.spool and self.spool.positions[index]))

    @property
    def window(self) -> int:
        """How many chunks the agent may be ahead; few in a first sync, so that it reads no chunk twice."""
        return HELD if self.is_first else WINDOW

    def leave_as_is(self, index: int, digest: bytes) -> None:
        """Record that a chunk of the image, with its patch in the spool if there is one, is right."""
        if self.spool and (header := self.spool.header(index)):
            if header.digest == digest:
                self.changed += header.pages.bit_count() * PAGE
            else:  # the volume has again what the image has: the patch in the spool must not be written
                self.spool.append(Patch(index, 0, 0, b"", digest))
        self._record(index, digest)

    def store(self, patch: Patch) -> None:
        """Change a chunk: in a first sync now, in a later one when `finish` writes the spool."""
        self.changed += patch.pages.bit_count() * PAGE
        if self.spool:
            self.spool.append(patch)
        else:
            patch.write_to(self._image)
            self._unwritten += len(patch.data)
            if self._unwritten > self.WRITE_OUT:
                self._image.write_out()
                self._unwritten = 0
        self._record(patch.index, patch.digest)

    def _record(self, index: int, digest: bytes) -> None:
        self.early[index] = digest
        if index in self.image_digests.suspects:
            self.image_digests.suspects.remove(index)
            self.differing.add(index)
        while (digest_due := self.early.pop(self.frontier, None)) is not None:
            self._new_state.write(digest_due)
            self._table.update(digest_due)
            self.frontier += 1

    # The end of it

    def finish(self) -> None:
        """Steps 2 to 6 of a sync. All chunks must be finished.

        An error before the commit is raised after the undo was put back. A signal does not wait for that: the next
        command puts it back. One after the commit is a DosvobError.
        """
        assert self.frontier == self.chunks
        self._new_state.flush()
        if self.spool is None:
            self._finish_first()
            return
        paths, digests = self._paths, self._table.hexdigest()
        paths.check_unread()  # a sync may take hours
        differing = self._differing(self.spool)
        undo = Undo.write(paths, self._image, self._head_of_undo(digests), differing, self._tick)
        with undo.file:
            if self.spool.space_needed() > self._image.free_space():  # fallocate(2) would touch the image's time
                undo.drop()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths.image))
            try:
                identity = self._write_image(self.spool)
                self._complete_state(digests, identity)
                paths.new_state.rename(paths.state)
            except Exception as problem:
                if is_disk_full(problem):
                    self._drop_spool(self.spool)
                undo.put_back(self._tick)
                raise
            try:
                sync_directory(paths.metadata)
                undo.settle()
            except OSError as problem:
                raise DosvobError(
                    "it is backed up; the version before gets its name with the next backup or verify: "
                    + explained(problem, paths.versions)
                ) from problem

    def _drop_spool(self, spool: Spool) -> None:
        """Free what it takes, for the undo to be put back there: some file systems need space to overwrite."""
        self._paths.spool.unlink(missing_ok=True)
        spool.file.close()  # of an open file nothing is freed
        os.sync()  # nor by Btrfs before

    def _head_of_undo(self, digests: str) -> Json:
        """The head of the undo: its two snapshots, the digests of the state that commits it, the image's identity.

        Without a state the image's snapshot is the one that the newest version leads back from.
        """
        newer, state, older, image = self._snapshot, self._state, self._older, identity_of(self._image.fd)
        snapshot = state.snapshot if state else older[0].newer if older else None
        if snapshot is None:  # known is only that it is later than the newest version, if there is one
            taken_at = older[0].moment.isoformat() if older else ""
            snapshot = dataclasses.replace(newer, size=image["size"] // CHUNK * CHUNK, taken_at=taken_at)
        moment = Versions.next_moment(state.moment if state else snapshot.moment(utc_now()), older)
        return {
            "time": moment.strftime(Version.TIME) if self._makes_version else "",
            "snapshot": dataclasses.asdict(snapshot),
            "newer": dataclasses.asdict(newer),
            "newer_digests": digests,
            "base": image,
            "found": dataclasses.asdict(state.found) if state and state.found else None,
        }

    def _differing(self, spool: Spool) -> Iterator[tuple[int, int, bytes]]:
        """The chunks that differ between the image's snapshot and the new one, as `Undo.write` wants them.

        The old and the new table of digests decide, for a version leads from snapshot to snapshot. What decayed here,
        or what somebody wrote to the image, the sync mends, and no version has it. If an older snapshot lost a chunk by
        that, the chunk's digest tells.
        """
        if self._state is None:
            for index in spool.chunks():
                chunk, header = self._image.chunk(index), spool.header(index)
                # what cannot be read gets a digest that nothing has
                digest = bytes(DIGEST_SIZE) if chunk is None else digest_of(chunk)
                yield index, header.pages if header else 0, digest
            return
        with self._paths.state.open("rb") as old, self._paths.new_state.open("rb") as new:
            old.seek(BLOCK)
            new.seek(BLOCK)
            for index in range(self._state.snapshot.size // CHUNK):
                digest = old.read(DIGEST_SIZE)
                if digest != new.read(DIGEST_SIZE):
                    header = spool.header(index)
                    yield index, header.pages if header else 0, digest

    def _write_image(self, spool: Spool) -> dict[str, int] | None:
        """Step 4: returns the image's new identity; None if somebody wrote to it since this sync began."""
        image, before = self._image, identity_of(self._image.fd)
        if before["size"] != self._snapshot.size:
            image.set_length(self._snapshot.size)
        for index in spool.chunks():
            if patch := spool.patch(index):
                patch.write_to(image)
                self._tick(patch.length)
        if identity_of(image.fd) != before or any(spool.positions):
            stamp(image, before["mtime_ns"] // 10**9 + 2)  # later, which tells the new image from the old
        else:
            image.sync()
        return identity_of(image.fd) if before == spool.file.head["base"] else None

    def _finish_first(self) -> None:
        stamp(self._image)
        try:
            rename_new(self._paths.partial, self._paths.image)
        except DosvobError as problem:
            raise DosvobError(f"{problem}; {self._paths.partial} is kept") from None
        # only now, for a rename may change what tells one file from another
        self._complete_state(self._table.hexdigest(), identity_of(self._paths.image))
        self._paths.new_state.rename(self._paths.state)
        sync_directory(self._paths.metadata)

    def _complete_state(self, digests: str, identity: dict[str, int] | None) -> None:
        now = utc_now().isoformat()
        found = Finding().after(self._found)
        State(self._snapshot, now, self.image_digests.part, digests, identity, found).write(self._paths.new_state)

    def give_up_space(self) -> None:
        """Free space for the other volumes, after this sync met a full disk.

        It drops the spool, or cuts the end off a first sync's file: the next run fetches only that again.
        """
        if self.spool is None and exists(self._paths.partial):
            goal = os.fstat(self._image.fd).st_blocks * 512 - self.SPACE_FOR_OTHERS
            for index in reversed(range(self.chunks)):
                if os.fstat(self._image.fd).st_blocks * 512 <= goal:
                    break
                self._image.set_length(index * CHUNK)
        elif self.spool:
            self._paths.spool.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files. What was not finished is left for the next sync to take up."""
        self._image.close()
        if self.spool:
            self.spool.file.close()
        with contextlib.suppress(OSError):  # a full disk, which was reported when it was met
            self._new_state.close()


# ── The conversations ────────────────────────────────────────────────────────────────────────────────────────────────
# The local end of a conversation with the agent. A `Pull` makes an image what the device is: it compares, asks, checks,
# stores. A `Push` makes a device what a source is: it sends, compares, and sends again what differs, until nothing
# does. Knows neither SSH nor the API, and trusts nothing that comes in: what does not fit the conversation ends it.

PROGRESS_LIMIT = 600  # seconds in which at least one chunk must be finished
MOST_PAYLOAD = {  # bytes, by kind of frame
    HELLO: len(AGENT_MAGIC) + 8 + 1,
    DIGEST: DIGEST_SIZE,
    ZEROS: 4,
    SHORT: PAGES * SHORT_SIZE,
    RAW: PAGES // 8 + CHUNK,
    ZLIB: PAGES // 8 + CHUNK,
    ZSTD: PAGES // 8 + CHUNK,
    ALIVE: 0,
    FAILED: 1000,
}


class FromDroplet(DosvobError):
    """Something that may quote the droplet: it stays on one line."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


class ConnectionLost(FromDroplet):
    """The stream broke or stands still; another one to the same droplet may do."""


class BadAgent(FromDroplet):
    """What came from the droplet makes no sense, or it says that it cannot go on."""


class Stream(Protocol):
    """Two-way bytes to an agent."""

    def send(self, data: bytes) -> None:
        """Send all of it."""

    def receive(self) -> bytes:
        """At least one byte; raises ConnectionLost when no more come."""

    waits: float
    """The share of the reads of late, from 0 to 1, that found nothing yet."""


class FrameParser:
    """Cuts received bytes into frames; a length that a frame of its kind cannot have is refused before it is read.

    What has come of a frame is kept in pieces and joined once: each byte is copied once.
    """

    HEADER = struct.calcsize(FRAME)
    MOST_PIECES = 1024  # so that bytes that come one by one do not take a hundred times their size

    def __init__(self) -> None:
        self._pieces: list[bytes | memoryview] = []
        self._missing = self.HEADER  # bytes of the part that comes: a header, or a payload
        self._header: tuple[int, int] | None = None  # kind and index of the frame whose payload comes

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """The kind, index and payload of the frames that are complete with this data."""
        view = memoryview(data)
        while len(view) >= self._missing:
            part = b"".join((*self._pieces, view[: self._missing]))
            view = view[self._missing :]
            self._pieces.clear()
            if self._header is None:
                kind, index, length = struct.unpack(FRAME, part)
                if length > MOST_PAYLOAD.get(kind, -1):
                    raise BadAgent(f"the droplet sent something that is not a frame: {part + bytes(view[:60])!r}")
                self._header, self._missing = (kind, index), length
            else:
                kind, index = self._header
                self._header, self._missing = None, self.HEADER
                yield kind, index, part
        self._missing -= len(view)
        self._pieces.append(view)
        if len(self._pieces) > self.MOST_PIECES:
            self._pieces = [b"".join(self._pieces)]


class Conversation:
    """One job over all `chunks` of a device, done by talking with agents, over as many connections as it takes.

    `position` is the number of chunks that the progress shows, with the words `verb`, which `Course` completes. Of
    these, `outstanding` still wait for pages, and `fetched` got some. In a first backup (`is_first`) the agent is never
    far ahead. `steps` grows with each finished chunk: while it grows, a broken connection is worth another one.
    """

    verb = ""
    writes = False  # whether the agent writes to the device
    is_first = False

    def __init__(self, chunks: int, window: int) -> None:
        self.chunks = chunks
        self.position = self.steps = self.outstanding = self.fetched = 0
        self.is_done = False
        self._window = window  # how many chunks the agent may be ahead
        self._stream: Stream
        self._progress: Callable[[], None]
        self._commands: list[tuple[int, int, int, int]] = []  # not sent yet: kind, index, count, bitmap
        self._due: collections.deque[tuple[int, int]] = collections.deque()  # ranges of chunks not announced yet
        self._greeted = self._is_over = False

    def program(self, device: str) -> bytes:
        """The agent's program for the next connection."""
        return agent_source(device, self._parts(), self._window, writes=self.writes)

    def _parts(self) -> tuple[tuple[int, int], ...]:
        """The ranges of chunks that it announces."""
        return ((0, self.chunks),)

    def talk(self, stream: Stream, progress: Callable[[], None]) -> None:
        """Do what one connection can do; calls `progress` now and then, which may raise `Interrupted`."""
        keep_freed_memory()
        self._stream, self._progress = stream, progress
        self._commands.clear()
        self._due = collections.deque(self._parts())
        self._greeted = self._is_over = False
        parser, last, deadline = FrameParser(), (-1, -1), 0.0
        while not self._is_over:
            for frame in parser.feed(stream.receive()):
                self._handle(*frame)
            self._flush()
            progress()
            if (self.position, self.steps) != last:
                last, deadline = (self.position, self.steps), time.monotonic() + PROGRESS_LIMIT
            elif time.monotonic() > deadline:
                raise ConnectionLost(f"the droplet says that it lives, but got no chunk done for {PROGRESS_LIMIT} s")

    def _handle(self, kind: int, index: int, payload: bytes) -> None:
        if not self._greeted and kind not in (HELLO, ALIVE, FAILED):
            raise BadAgent("the droplet did not begin with a greeting")
        if kind == FAILED:
            raise BadAgent(f"the droplet cannot go on: {payload.decode(errors='replace')}")
        if kind == HELLO:
            self._on_hello(payload)
        elif kind == DIGEST:
            self._on_digests(index, 1, payload)
        elif kind == ZEROS:
            self._on_digests(index, int.from_bytes(payload, "big"), ZERO_DIGEST)
        elif kind != ALIVE:
            self._on_answer(kind, index, payload)

    def _on_hello(self, payload: bytes) -> None:
        size = self.chunks * CHUNK
        if payload[:-1] != AGENT_MAGIC + struct.pack(">Q", size):
            raise BadAgent(f"the device on the droplet is not one of {size // GIB} GiB: {payload!r}")
        self._greeted = True

    def _on_digests(self, index: int, count: int, digest: bytes) -> None:
        """The agent announces `count` chunks from `index` on, all with this digest."""
        due, end = self._due.popleft() if self._due else (self.chunks, self.chunks)
        if index != due or not 0 < count <= end - due or len(digest) != DIGEST_SIZE:
            raise BadAgent(f"the droplet announced {count} chunks from {index} on, and {due} of {self.chunks} was due")
        if due + count < end:
            self._due.appendleft((due + count, end))
        for announced in range(index, index + count):
            self._on_digest(announced, digest)

    def _on_digest(self, index: int, digest: bytes) -> None:
        """A chunk is announced."""
        raise NotImplementedError

    def _on_answer(self, kind: int, index: int, payload: bytes) -> None:
        """The agent sent any other frame."""
        raise BadAgent(f"the droplet sent a frame of the kind {kind} with {len(payload)} bytes of chunk {index}")

    def _drop(self, index: int) -> None:
        """Have the agent forget a chunk; joins it to the last unsent DROP if that ends just before it."""
        first, count = index, 0
        if self._commands and self._commands[-1][0] == DROP and sum(self._commands[-1][1:3]) == index:
            _, first, count, _ = self._commands.pop()
        self._command(DROP, first, count + 1)

    def _command(self, kind: int, index: int, count: int = 0, bitmap: int = 0) -> None:
        self._commands.append((kind, index, count, bitmap))

    def _ask_for(self, index: int, pages: int) -> None:
        self._command(SEND, index, round(100 * self._stream.waits), pages)

    def _flush(self) -> None:
        """Send what is to be sent by now."""
        if self._commands:
            self._stream.send(b"".join([packed_command(*command) for command in self._commands]))
            self._commands.clear()


def packed_command(kind: int, index: int, count: int, bitmap: int) -> bytes:
    """A command, ready to be sent."""
    return struct.pack(COMMAND, kind, index, count, bitmap.to_bytes(PAGES // 8, "little"))


def differing_pages(ours: bytes, theirs: bytes) -> int:
    """A bitmap of the pages that differ, by our digests and their short ones."""
    differing = 0
    for page in range(PAGES):
        start = page * DIGEST_SIZE
        if ours[start : start + SHORT_SIZE] != theirs[page * SHORT_SIZE : (page + 1) * SHORT_SIZE]:
            differing |= 1 << page
    return differing


@dataclass
class Pending:
    """A chunk that was announced and is not finished.

    `pages` are the digests of the image's pages, `wanted` is a bitmap of the pages that were asked for, both empty
    until then. `is_unknown` if nobody knows what the image's pages have, so all of them must be written.
    """

    digest: bytes
    pages: bytes = b""
    wanted: int = 0
    is_unknown: bool = False


class Pull(Conversation):
    """Compares what the agent announces with the local image, and asks for what differs."""

    verb = "scanned, {fetched} fetched at {link}/s"
    # The agent keeps to MOST_AHEAD, not counting chunks that are asked for a second time, which are few and seldom.
    BOUND = 4

    def __init__(self, update: Update) -> None:
        super().__init__(update.chunks, update.window)
        self.is_first = update.is_first
        self._update = update
        self._pending: dict[int, Pending] = {}
        self._digests_here: Iterator[bytes] = iter(())
        self._announced_to = 0
        self._flush()

    def _parts(self) -> tuple[tuple[int, int], ...]:
        return ((self._update.frontier, self.chunks),)

    def talk(self, stream: Stream, progress: Callable[[], None]) -> None:
        """Go on until all chunks are finished."""
        self._pending.clear()
        self._digests_here = self._update.image_digests.digests(self._update.frontier)
        with contextlib.closing(self._digests_here):  # type: ignore[type-var] # a generator
            super().talk(stream, progress)

    def _flush(self) -> None:
        super()._flush()
        self.steps = self._update.frontier + len(self._update.early)
        self.position = self.steps if self.is_first else max(self._announced_to, self._update.frontier)
        self.outstanding = max(self.position - self.steps, 0)
        self.is_done = self._is_over = self._update.frontier == self.chunks

    def _on_digests(self, index: int, count: int, digest: bytes) -> None:
        """Refuse an agent that is too far ahead; then as any conversation does."""
        # Twice the window: the agent forgets a chunk that it sends, and it may be asked for that again. The distance
        # has a bound because `early` keeps the digest of each chunk behind a pending one.
        is_far_ahead = bool(self._pending) and index + count - self._update.frontier > self.BOUND * MOST_AHEAD
        if len(self._pending) > 2 * WINDOW or is_far_ahead:
            raise BadAgent(f"the droplet announced {count} chunks more, and does not send what it announced before")
        super()._on_digests(index, count, digest)
        self._announced_to = index + count

    def _on_answer(self, kind: int, index: int, payload: bytes) -> None:
        if kind == SHORT:
            self._on_short(index, payload)
        elif kind in (RAW, ZLIB, ZSTD):
            self._on_data(kind, index, payload)
        else:
            super()._on_answer(kind, index, payload)

    def _on_digest(self, index: int, digest: bytes) -> None:
        """Decide what to do about a chunk."""
        ours = next(self._digests_here)
        if index < self._update.frontier or index in self._update.early:  # finished over an earlier connection
            self._drop(index)
        elif ours == digest:
            self._update.leave_as_is(index, digest)
            self._drop(index)
        elif digest == ZERO_DIGEST:
            # all pages, if the image cannot be read there
            zeroed = self._merged(self._update.image_digests.pages(index), ALL_PAGES, 0, b"")[1]
            self._update.store(Patch(index, zeroed, 0, b"", digest))
        elif self._update.has_nothing_at(index, ours):
            self._pending[index] = Pending(digest, ZERO_PAGES, ALL_PAGES, is_unknown=ours == b"")
            self._ask_for(index, ALL_PAGES)
        else:
            self._pending[index] = Pending(digest)
            self._command(COMPARE, index)

    def _on_short(self, index: int, theirs: bytes) -> None:
        pending = self._pending.get(index)
        if pending is None or pending.pages or len(theirs) != PAGES * SHORT_SIZE:
            raise BadAgent(f"the droplet sent page digests of chunk {index} that nobody asked for")
        ours = self._update.image_digests.pages(index)
        pending.pages, pending.is_unknown = ours or ZERO_PAGES, not ours
        differing = differing_pages(ours, theirs)  # all pages, if the image cannot be read there
        if not differing and chunk_digest(ours) == pending.digest:  # only the patch in the spool differed
            del self._pending[index]
            self._update.store(Patch(index, 0, 0, b"", pending.digest))
            self._drop(index)
        else:
            pending.wanted = differing or ALL_PAGES
            self._ask_for(index, pending.wanted)

    def _on_data(self, kind: int, index: int, payload: bytes) -> None:
        pending = self._pending.get(index)
        included = int.from_bytes(payload[: PAGES // 8], "little")
        if pending is None or not pending.wanted or len(payload) < PAGES // 8 or included & ~pending.wanted:
            raise BadAgent(f"the droplet sent pages of chunk {index} that nobody asked for")
        try:
            data = Packer.unpack(kind, payload[PAGES // 8 :], included.bit_count() * PAGE)
        except ValueError as problem:
            raise BadAgent(f"the pages of chunk {index} cannot be unpacked: {problem}") from None
        merged, changed = self._merged(pending.pages, pending.wanted, included, data)
        if chunk_digest(merged) == pending.digest:
            del self._pending[index]
            changed = ALL_PAGES if pending.is_unknown else changed
            filled = included & changed
            self.fetched += 1
            self._update.store(Patch(index, changed, filled, Patch.select(data, filled, included), pending.digest))
        elif pending.wanted != ALL_PAGES:  # two pages with the same short digest, or the image changed just now
            pending.is_unknown = True
            pending.wanted = ALL_PAGES
            self._ask_for(index, ALL_PAGES)
        else:
            raise BadAgent(f"chunk {index} does not have the digest that was announced for it")

    @staticmethod
    def _merged(ours: bytes, wanted: int, included: int, data: bytes) -> tuple[bytearray, int]:
        """The page digests of a chunk after its wanted pages became the data (the included ones) or zeros (the others).

        Also returns a bitmap of the pages that this changes.
        """
        digests, fetched = bytearray(ours), memoryview(page_digests(data))
        for first, count in runs(wanted & ~included):
            digests[first * DIGEST_SIZE : (first + count) * DIGEST_SIZE] = ZERO_PAGE_DIGEST * count
        for first, count in runs(included):
            length = count * DIGEST_SIZE
            digests[first * DIGEST_SIZE : first * DIGEST_SIZE + length] = fetched[:length]
            fetched = fetched[length:]
        if ours is ZERO_PAGES:  # as most chunks of a first sync, and soon: the agent leaves zeros out
            return digests, included
        changed = 0
        for page in numbers_in(wanted):
            place = slice(page * DIGEST_SIZE, (page + 1) * DIGEST_SIZE)
            changed |= (digests[place] != ours[place]) << page
        return digests, changed


@dataclass(frozen=True)
class Piece:
    """A chunk of a push's source; its page digests, if not known before; its WRITE over zeros, if still needed."""

    index: int
    chunk: bytes = b""
    pages: bytes = b""
    write: bytes = b""


class Push(Conversation):
    """Makes a device what a source is.

    A device that was created empty first gets all chunks that are not zeros, without comparing. Then each connection
    compares all chunks that are not known to be right, and sends what differs: the pages whose short digests differ, or
    all pages of the chunk if none does. So what a broken connection or a lost droplet did not write, or wrote wrong, is
    sent again; at the end all was read back from the device itself.

    `contents` begins a pass over all chunks of the source, in order; their digests go into a file. `warn` gets a
    message if chunks differ though the agent took all; if that does not end, `talk` raises DosvobError.
    """

    MOST_PENDING = 64  # chunks in memory until the agent has told which of their pages differ
    MOST_MENDS = 3  # times that chunks may differ though the agent took all; colliding short digests take one
    MOST_PARTS = 1000  # ranges of chunks in an agent's program
    PACKERS = 2
    READ_AHEAD = 8  # chunks
    writes = True
    _stream: AgentStream  # for its `has_received`

    def __init__(
        self,
        contents: Callable[[], Iterator[tuple[int, bytes]]],
        chunks: int,
        digests: BinaryIO,
        warn: Callable[[str], None],
        *,
        is_empty: bool,
    ) -> None:
        super().__init__(chunks, WINDOW)
        self.sent = 0  # bytes
        self._contents = contents
        self._digests = digests.fileno()
        self._warn = warn
        self._noted = 0  # how many digests are in the file
        self._passed = 0 if is_empty else chunks  # how many chunks were sent without comparing, or need not be
        self._right, self._count_right = bytearray(chunks), 0  # 1 for each chunk that is known to be right
        self._pieces: Iterator[Piece] = iter(())
        self._piece = Piece(chunks)  # the last one taken from `_pieces`; none yet
        self._packer: Packer
        self._mends = 0
        self._is_all_taken = False  # whether the agent took all that the last connection sent
        self._begin()

    def _begin(self) -> None:
        """Forget what belongs to the last connection."""
        self._announced: collections.deque[tuple[int, bytes]] = collections.deque()  # digests not compared yet
        self._pending: dict[int, Piece] = {}  # chunks that differ: the agent was asked in which pages
        self._differing: list[int] = []  # the first chunk that was not right, and how many there are
        self._last = self._asked = -1  # the chunk that was sent last; the one whose answer tells that all is taken

    def talk(self, stream: Stream, progress: Callable[[], None]) -> None:
        """Send what is not sent yet; or else compare what is not known to be right, and send what differs."""
        self._begin()
        self.verb = f"{'written' if self._passed < self.chunks else 'compared'} at {{pace}}/s"
        was_all_taken, self._is_all_taken = self._is_all_taken, False
        super().talk(stream, progress)
        self._is_all_taken = True
        if self._differing and was_all_taken:
            first, count = self._differing
            told = f"{count} MiB are not what was written, the first one at byte {first * CHUNK}"
            self._mends += 1
            if self._mends > self.MOST_MENDS:
                raise DosvobError(f"{told}, also when written once more: DigitalOcean's fault, try again later")
            self._warn(f"{told}; they are written once more")

    def _parts(self) -> tuple[tuple[int, int], ...]:
        """The ranges not known to be right, joined over small gaps if there are too many; none before all is sent."""
        pattern, gap = rb"\x00+", 1
        while self._passed == self.chunks:
            parts = tuple(match.span() for match in re.finditer(pattern, self._right))
            if len(parts) <= self.MOST_PARTS:
                return parts
            pattern, gap = rb"\x00+(?:\x01{1,%d}\x00+)*" % gap, gap * 8
        return ()

    def _on_hello(self, payload: bytes) -> None:
        super()._on_hello(payload)
        self._packer = Packer(with_zstd=payload[-1:] == b"\1")

    def _on_digest(self, index: int, digest: bytes) -> None:
        self._announced.append((index, digest))
        if len(self._announced) > 2 * MOST_AHEAD:
            raise BadAgent("the droplet announces more than it may")

    def _on_answer(self, kind: int, index: int, payload: bytes) -> None:
        piece = self._pending.pop(index, None)
        if kind != SHORT or len(payload) != PAGES * SHORT_SIZE or not (piece or index == self._asked):
            super()._on_answer(kind, index, payload)
        if piece:
            pages = piece.pages or page_digests(piece.chunk)
            self._send(index, self._write(index, piece.chunk, differing_pages(pages, payload) or ALL_PAGES))
        else:
            self._is_over = True

    def _flush(self) -> None:
        """Compare, or send, until something has come in, or nothing goes on without it."""
        super()._flush()
        if not self._greeted:
            return
        while self._announced and len(self._pending) < self.MOST_PENDING:
            for _ in range(min(BATCH, len(self._announced))):
                self._compare(*self._announced.popleft())
            super()._flush()
            if self._stream.has_received():
                return
        while self._passed < self.chunks and not self._stream.has_received():
            if write := self._piece_at(self._passed).write:
                self._send(self._passed, write)
            self._passed += 1
            self.position, self.steps = self._passed, self.steps + 1
        if self._passed < self.chunks or self._due or self._announced or self._pending or self._asked >= 0:
            return
        self._asked, self._is_over = self._last, self._last < 0
        if not self._is_over:  # the agent answers after it has written all that was sent before
            self._command(COMPARE, self._asked)
            super()._flush()

    def _compare(self, index: int, digest: bytes) -> None:
        """See whether a chunk is right; if not, send it, or ask where it differs."""
        if self._right[index] or digest == self._expected(index):
            self._count_right += not self._right[index]
            self.steps += not self._right[index]
            self._right[index] = 1
            self._drop(index)
        else:
            first, count = self._differing or (index, 0)
            self._differing = [first, count + 1]
            piece = self._piece_at(index)
            if digest == ZERO_DIGEST or piece.chunk == ZERO_CHUNK:
                self._send(index, self._write(index, piece.chunk, ALL_PAGES, over_zeros=digest == ZERO_DIGEST))
            else:
                self._pending[index] = piece
                self._command(COMPARE, index)
        self.position = self._count_right + sum(self._differing[1:])
        self.is_done = self._count_right == self.chunks

    def _send(self, index: int, write: bytes) -> None:
        start = time.monotonic()
        self._stream.send(write)
        self._packer.sent(len(write), time.monotonic() - start)
        self.sent += len(write)
        self._last = index

    # The source

    def _expected(self, index: int) -> bytes:
        """The digest of a chunk of the source."""
        if index >= self._noted:
            self._piece_at(index)
        return os.pread(self._digests, DIGEST_SIZE, index * DIGEST_SIZE)

    def _piece_at(self, index: int) -> Piece:
        """A chunk of the source: reads on to it, or from the beginning if the last one taken is behind it."""
        if self._piece.index > index:
            self._pieces = done_ahead(self._prepared, self._contents(), self.PACKERS, self.READ_AHEAD)
            self._piece = Piece(-1)
        while self._piece.index < index:
            self._piece = next(self._pieces)
            if self._piece.index == self._noted:
                os.pwrite(self._digests, chunk_digest(self._piece.pages), self._noted * DIGEST_SIZE)
                self._noted += 1
            self._progress()  # which raises `Interrupted`
        return self._piece

    def _prepared(self, chunk_at: tuple[int, bytes]) -> Piece:
        """The piece for a chunk of the source; runs in a thread of its own."""
        index, chunk = chunk_at
        if chunk == ZERO_CHUNK:
            return Piece(index, ZERO_CHUNK, ZERO_PAGES)
        pages = page_digests(chunk) if index >= self._noted else b""
        write = self._write(index, chunk, ALL_PAGES, over_zeros=True) if index >= self._passed else b""
        return Piece(index, chunk, pages, write)

    def _write(self, index: int, chunk: bytes, wanted: int, *, over_zeros: bool = False) -> bytes:
        """The WRITE of these pages of a chunk; with `over_zeros` without the pages that are zeros."""
        patch = Patch.of(index, wanted, Patch.select(chunk, wanted), b"")
        kind, data = self._packer.pack(bytes(patch.data))
        command = packed_command(WRITE, index, 1, patch.filled if over_zeros else wanted)
        header = struct.pack(FRAME, kind, index, PAGES // 8 + len(data))
        return b"".join((command, header, patch.filled.to_bytes(PAGES // 8, "little"), data))


# ── The connection ───────────────────────────────────────────────────────────────────────────────────────────────────
# SSH to the droplet: keys that exist in memory and for one run only, a host key that is known before the droplet is,
# and an agent at the other end of a channel.

SSH_PORT = 22
SSH_LIMIT = 300  # seconds after which a droplet that does not let us in is given up
STRANGER_LIMIT = 60  # seconds for which another host key may be shown, as it may be while a droplet starts
SSH_TIMEOUT = 20  # seconds for one attempt to connect
KEEPALIVE = 60  # seconds; a router forgets a connection that is idle, as it is while the next clone is waited for
RECONNECT_LIMIT = 60  # seconds until a droplet that was up must let us in again
STALL_LIMIT = 30  # seconds of silence after which a connection is given up; the agent speaks every HEARTBEAT
LEAST_WINDOW, MOST_WINDOW = 4 << 20, 32 << 20  # bytes under way: enough for 1 Gbit/s over 30 ms, and over 200 ms
SEND_SIZE = 32 << 10  # bytes given to paramiko at once: the most that OpenSSH takes in a packet
PACKET_SIZE = 256 << 10  # bytes; fewer packets, each of which costs paramiko some Python
# Bytes after which keys are renewed. Each time the stream stops for three round trips: with paramiko's 512 MiB that is
# 10 % of the time over 200 ms. 64 GiB are safe: https://www.rfc-editor.org/rfc/rfc4344#section-3.2
REKEY_BYTES = 32 << 30
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr")  # GCM is three times as fast
ATTEMPTS = 5  # connections in a row that break before one more chunk is finished

SENT_SEGMENT = 1240  # bytes of data in a packet that we send: what passes through any tunnel
FIRST_PACKETS = 100  # packets that the droplet sends before the first acknowledgement; Linux's default is 10
DISARM = (
    # DigitalOcean's images mount a volume that appears, which writes to it.
    "rm -f /etc/udev/rules.d/99-digitalocean-automount.rules",
    # mdadm (rules 63 and 64), Btrfs (64) and lvm2 (69) take what appears if it is a part of theirs, as rule 60 tells.
    """echo 'ENV{ID_SERIAL}=="0DO_Volume_*", ENV{ID_FS_TYPE}=""' > /etc/udev/rules.d/61-dosvob.rules""",
    "udevadm control --reload || true",
)
USER_DATA_COMMANDS = (
    *DISARM,  # before sshd runs, so before any attach
    # An agent that nobody hears any more, with its 100 MiB, ends after half a minute instead of a quarter of an hour.
    "sysctl -q -w net.ipv4.tcp_retries2=6 || true",
    # Stock buffers of 4 MiB allow 33 MB/s at a round trip of 80 ms; BBR does not take every lost packet for congestion.
    "sysctl -q -w net.ipv4.tcp_wmem='4096 1048576 67108864' || true",
    "modprobe -q tcp_bbr && sysctl -q -w net.ipv4.tcp_congestion_control=bbr || true",
    # A tunnel, or a container's bridge, may lose large packets silently: the droplet tries smaller ones after seconds.
    "sysctl -q -w net.ipv4.tcp_mtu_probing=1 || true",
    # Three round trips less until a long link is full; and what we send never is large.
    f"ip route change $(ip -4 route show default | head -n 1) initcwnd {FIRST_PACKETS} advmss {SENT_SEGMENT} || true",
)


class HostKeyMismatch(DosvobError):
    """Somebody else answers at the droplet's address."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"the machine at {address} does not have the host key of the droplet that was created: somebody may stand "
            "between; nothing was sent to it. Try again; if it stays, ask DigitalOcean's support"
        )


class Incompatible(DosvobError):
    """The droplet's sshd and we share no algorithm of some kind, and trying again does not help."""

    KINDS: ClassVar[Mapping[str, tuple[str, str]]] = {  # by paramiko's word: our word, and the name in its options
        "kex": ("key exchange", "kex"),
        "host key": ("host key of the kind", "key_types"),
        "cipher": ("cipher", "ciphers"),
        "mac": ("MAC", "digests"),
    }

    def __init__(self, address: str, problem: Exception, ours: paramiko.transport.SecurityOptions) -> None:
        known = (kind for word, kind in self.KINDS.items() if f" {word}" in str(problem))
        what, key = next(known, (f"protocol ({problem})", ""))
        names = ", ".join(getattr(ours, key, ()))
        offers = f"{what} {names}" if key == "key_types" else f"{what} that dosvob uses" + f" ({names})" * bool(names)
        super().__init__(
            f"the sshd of the droplet at {address} offers no {offers}: have its image allow one, or leave "
            '"droplet_image" out of conf.json'
        )


@dataclass(frozen=True)
class RunKeys:
    """The key that lets us in, and the droplet's host key: made for one run, and kept in memory."""

    client: paramiko.ECDSAKey
    host: paramiko.ECDSAKey

    @classmethod
    def generate(cls) -> RunKeys:
        """New keys."""
        return cls(paramiko.ECDSAKey.generate(bits=256), paramiko.ECDSAKey.generate(bits=256))

    @property
    def public(self) -> str:
        """The client's public key, in the form of authorized_keys."""
        return f"{self.client.get_name()} {self.client.get_base64()}"

    def user_data(self) -> str:
        """What cloud-init is to do on the droplet: JSON, which is YAML as well.

        https://cloudinit.readthedocs.io/en/latest/reference/modules.html
        """
        private = io.StringIO()
        self.host.write_private_key(private)
        content = {
            "disable_root": False,
            "ssh_keys": {
                "ecdsa_private": private.getvalue(),
                "ecdsa_public": f"{self.host.get_name()} {self.host.get_base64()}",
            },
            "bootcmd": list(USER_DATA_COMMANDS),
        }
        return "#cloud-config\n" + json.dumps(content)


class AgentStream:
    """A running agent at the other end of an SSH connection that it has for itself.

    To be closed, by which the agent ends; then, or when the connection is lost, `give_back` gets that.
    """

    FADING = 0.98  # of `waits`, with each read

    def __init__(
        self,
        transport: paramiko.Transport,
        program: bytes,
        stop: Stop,
        give_back: Callable[[paramiko.Transport], None],
    ) -> None:
        self.received = 0  # bytes
        self.waits = 1.0
        self._window = LEAST_WINDOW  # bytes that may be under way
        self._measured = (0, time.monotonic())  # bytes received at the last look at how fast they come, and its time
        self._transport = transport
        self._stop = stop
        self._give_back = give_back
        bootstrap = f"import sys; exec(sys.stdin.buffer.read({len(program)}))"
        try:
            start = time.monotonic()
            self._channel = transport.open_session(self._window, PACKET_SIZE, SSH_TIMEOUT)
            opened = time.monotonic()
            self._channel.settimeout(Stop.NAP)
            self._channel.in_buffer = Received()  # type: ignore[assignment]
            # paramiko waits for the answer without a limit
            within(SSH_TIMEOUT, lambda: self._channel.exec_command(f"exec python3 -I -c '{bootstrap}'"))
            self._round_trip = min(opened - start, time.monotonic() - opened)  # seconds; either may have had to wait
        except (paramiko.SSHException, OSError, EOFError) as problem:
            raise self._lost(f"the agent could not be started: {reason(problem)}") from problem
        self.send(program)

    def send(self, data: bytes) -> None:
        """Send all of it; raises ConnectionLost."""
        view = memoryview(data)
        while view:
            sent = self._patiently(lambda: self._channel.send(bytes(view[:SEND_SIZE])))  # noqa: B023 - called at once
            view = view[sent:]

    def receive(self) -> bytes:
        """What has come in."""
        self.waits = self.FADING * self.waits + (1 - self.FADING) * (not self.has_received())
        data = self._patiently(lambda: self._channel.recv(PACKET_SIZE))
        if not data:
            raise self._lost(f"the connection to the droplet ended{self._last_words()}")
        self.received += len(data)
        self._widen()
        return data

    def has_received(self) -> bool:
        """Whether something has come in."""
        return self._channel.recv_ready()

    def _widen(self) -> None:
        """Grow the window to twice what arrives in a round trip, which keeps a long link full.

        It starts small, for sshd buffers what the link does not take yet, and copies that buffer again and again while
        it grows: for 32 MiB that takes seconds.
        """
        received, since = self._measured
        seconds = time.monotonic() - since
        if seconds < self._round_trip / 4:  # often enough to grow as fast as what arrives does
            return
        self._measured = (self.received, time.monotonic())
        wanted = min(int(2 * (self.received - received) / seconds * self._round_trip), MOST_WINDOW)
        if wanted > self._window and hasattr(self._channel, "in_window_sofar"):
            # paramiko announces this with the next bytes that we take; it has no call to grow a window.
            self._channel.in_window_sofar += wanted - self._window
            self._window = wanted

    def _patiently(self, transfer: Callable[[], T]) -> T:
        end = time.monotonic() + STALL_LIMIT
        while True:
            self._stop.check()
            try:
                return transfer()
            except TimeoutError:
                if not self._transport.is_active():
                    raise self._lost("the connection to the droplet ended") from None
                if time.monotonic() > end:
                    raise self._lost(f"the connection to the droplet was silent for {STALL_LIMIT} s") from None
            except (OSError, EOFError, paramiko.SSHException) as problem:
                if self._channel.closed:  # as after an agent that ended before it had its program
                    raise self._lost(f"the connection to the droplet ended{self._last_words()}") from problem
                raise self._lost(f"the connection to the droplet broke: {reason(problem)}") from problem

    def _lost(self, what: str) -> ConnectionLost:
        """Close the connection; returns the error for that.

        Also if only the agent may have ended: paramiko reports the end of a connection after that of its channels.
        """
        self._transport.close()
        self._give_back(self._transport)
        return ConnectionLost(what)

    def _last_words(self) -> str:
        """What the droplet's shell or Python wrote as an error."""
        words = b""
        with contextlib.suppress(OSError):
            while self._channel.recv_stderr_ready():
                words += self._channel.recv_stderr(4096)
        lines = words.decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""

    def close(self) -> None:
        """End the agent. It never ends by itself: paramiko stands still if a channel ends while keys are renewed."""
        with contextlib.suppress(paramiko.SSHException, OSError, EOFError):  # the connection is gone, and the agent too
            self._channel.close()
        if self._transport.is_active():
            self._give_back(self._transport)


class Received:
    """What has come over a channel, in pieces: paramiko's buffer for it copies each byte twice, and moves the rest."""

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def feed(self, data: bytes) -> None:
        """More has come."""
        self._pieces.put(data)

    def read(self, _most: int, timeout: float | None = None) -> bytes:
        """A piece, which is no longer than a packet; nothing after the end."""
        try:
            data = self._pieces.get(timeout=timeout)
        except queue.Empty:
            raise paramiko.buffered_pipe.PipeTimeout from None
        if not data:
            self.close()  # whoever asks again is told again
        return data

    def read_ready(self) -> bool:
        """Whether something has come."""
        return not self._pieces.empty()

    def __len__(self) -> int:
        """How many pieces there are, which paramiko's description of a channel tells."""
        return self._pieces.qsize()

    def close(self) -> None:
        """No more comes."""
        self._pieces.put(b"")


class ReadAheadSocket(socket.socket):
    """A socket that reads ahead: paramiko asks for 16 bytes, then for the rest of a packet, a system call for each."""

    READ_SIZE = 256 << 10  # bytes

    def __init__(self, connected: socket.socket) -> None:
        timeout = connected.gettimeout()
        super().__init__(fileno=connected.detach())
        self.settimeout(timeout)
        self._data = b""
        self._taken = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Up to `size` bytes."""
        if self._taken == len(self._data):
            self._data = super().recv(self.READ_SIZE, flags)
            self._taken = 0
        data = self._data[self._taken : self._taken + size]
        self._taken += len(data)
        return data


class Link:
    """The way to the droplet: a connection for each agent at a time, kept for the next one. To be closed.

    Over one connection what one agent sends would wait for what another one has under way, on a slow link for longer
    than an agent may be silent.
    """

    def __init__(self, address: str, keys: RunKeys, stop: Stop) -> None:
        self._address = address
        self._keys = keys
        self._stop = stop
        self._made: set[paramiko.Transport] = set()
        self._free: list[paramiko.Transport] = []  # over which no agent talks

    def open(self, limit: float) -> None:
        """See to it that there is a free connection, within `limit` seconds; raises ConnectionLost."""
        self._give_back(self._take(limit))

    def _take(self, limit: float) -> paramiko.Transport:
        """A free connection, or a new one within `limit` seconds; raises ConnectionLost."""
        self._stop.check()
        with contextlib.suppress(IndexError):
            while True:
                if (transport := self._free.pop()).is_active():
                    return transport
        transport = self._connect_when_up(limit)
        self._made.add(transport)
        return transport

    def _give_back(self, transport: paramiko.Transport) -> None:
        """Keep a connection for the next agent. If it is broken, so may the free ones be, and it takes long to show."""
        if transport.is_active():
            self._free.append(transport)
            return
        self._made.discard(transport)
        with contextlib.suppress(IndexError):
            while True:
                broken = self._free.pop()
                self._made.discard(broken)
                broken.close()

    @staticmethod
    def device(volume_name: str) -> str:
        """Where a droplet has an attached volume: https://docs.digitalocean.com/products/volumes/how-to/mount/"""
        return f"/dev/disk/by-id/scsi-0DO_Volume_{volume_name}"

    def run(self, command: str, limit: float) -> None:
        """Connect within `limit` seconds and run a command to its end, whatever it returns; raises ConnectionLost."""
        transport = self._take(limit)
        try:
            with contextlib.closing(transport.open_session(timeout=SSH_TIMEOUT)) as channel:
                within(SSH_TIMEOUT, lambda: channel.exec_command(command))
                within(SSH_TIMEOUT, channel.recv_exit_status)
        except (paramiko.SSHException, OSError, EOFError) as problem:
            transport.close()
            raise ConnectionLost(f"the connection to the droplet broke: {reason(problem)}") from problem
        finally:
            self._give_back(transport)

    def start_agent(self, program: bytes) -> AgentStream:
        """An agent, or another program that talks as one does; raises ConnectionLost."""
        return AgentStream(self._take(RECONNECT_LIMIT), program, self._stop, self._give_back)

    def check(self, volume_name: str, *, with_fsck: bool) -> Finding:
        """What is on an attached volume, and whether it comes up; raises ConnectionLost, BadAgent."""
        program = droplet_source(f"Checker({self.device(volume_name)!r}, {with_fsck}, {CHECK_LIMIT}).run(1)")
        with contextlib.closing(self.start_agent(program)) as stream:
            answer, end = b"", time.monotonic() + CHECK_LIMIT + STALL_LIMIT
            while not answer.endswith(b"\n"):
                if len(answer) > Finding.MOST_ANSWER or time.monotonic() > end:
                    raise BadAgent("the droplet does not say what it found")
                try:
                    answer = (answer + stream.receive()).lstrip()
                except ConnectionLost as problem:
                    if not stream.received:
                        raise
                    # what it has changed of the clone by now, another look would not see
                    raise BadAgent(str(problem)) from problem
        try:
            return Finding.parse(answer)
        except ValueError as problem:
            raise BadAgent(f"what the droplet says that it found makes no sense: {problem}") from None

    def _connect_when_up(self, limit: float) -> paramiko.Transport:
        """Connect to a droplet that may still be starting; raises the last ConnectionLost after `limit` seconds.

        Raises HostKeyMismatch if another host key stays for STRANGER_LIMIT; who shows one is sent nothing.
        """
        start, stranger_since = time.monotonic(), float("inf")
        waiting = pauses(0.25, 1.0)
        while True:
            try:
                return self._connect()
            except ConnectionLost:
                if time.monotonic() - start > limit:
                    raise
            except HostKeyMismatch:
                stranger_since = min(stranger_since, time.monotonic())
                if time.monotonic() - stranger_since > STRANGER_LIMIT:
                    raise
            self._stop.sleep(next(waiting))

    def _connect(self) -> paramiko.Transport:
        """An authenticated connection; raises HostKeyMismatch, or ConnectionLost for what may pass."""
        try:
            sock = ReadAheadSocket(socket.create_connection((self._address, SSH_PORT), timeout=SSH_TIMEOUT))
        except OSError as problem:
            raise ConnectionLost(f"no connection to the droplet at {self._address}: {reason(problem)}") from problem
        # Without it each window adjustment waits for an acknowledgement: half the speed.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # paramiko sends until the kernel gives up, deaf to all else
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_LIMIT * 1000)
        transport = paramiko.Transport(
            sock,
            default_window_size=LEAST_WINDOW,
            default_max_packet_size=PACKET_SIZE,
        )
        transport.packetizer.REKEY_BYTES = REKEY_BYTES
        transport.banner_timeout = transport.auth_timeout = SSH_TIMEOUT
        transport.set_keepalive(KEEPALIVE)
        options = transport.get_security_options()
        options.ciphers = CIPHERS
        options.key_types = (self._keys.host.get_name(),)
        try:
            self._log_in(transport)
        except BaseException:
            transport.close()
            raise
        return transport

    def _log_in(self, transport: paramiko.Transport) -> None:
        """Make sure that it is our droplet, then authenticate; raises HostKeyMismatch, Incompatible, ConnectionLost."""
        try:
            transport.start_client(timeout=SSH_TIMEOUT)
            if transport.get_remote_server_key() != self._keys.host:
                raise HostKeyMismatch(self._address)
            transport.auth_publickey("root", self._keys.client)
        except paramiko.ssh_exception.IncompatiblePeer as problem:
            raise Incompatible(self._address, problem, transport.get_security_options()) from problem
        except (paramiko.SSHException, OSError, EOFError) as problem:
            raise ConnectionLost(f"the droplet at {self._address} does not let us in: {reason(problem)}") from problem

    def close(self) -> None:
        """Close the connections, and with them whatever runs at their other end."""
        for transport in list(self._made):
            transport.close()


def converse(
    start_agent: Callable[[], AgentStream],
    conversation: Conversation,
    warn: Callable[[str], None],
    progress: Callable[[int], None],
    replace_lost: Callable[[DosvobError], bool],
) -> int:
    """Hold a conversation to its end, over as many connections as it takes; returns the bytes received.

    `start_agent` starts an agent with the conversation's program. `replace_lost` gets what ended a connection: if the
    droplet is lost, it has another one made and returns True, or raises to end it all.
    """
    received = failures = 0
    while not conversation.is_done:
        done, stream = conversation.steps, None
        try:
            stream = start_agent()
            conversation.talk(stream, lambda: progress(received + stream.received))  # noqa: B023 - used in here
            failures = 0
        except (ConnectionLost, HostKeyMismatch, DropletLost) as problem:
            failures = failures + 1 if conversation.steps == done else 1
            if replace_lost(problem):  # asked first: the address of a lost one may be somebody else's by now
                failures = 0
            elif failures >= ATTEMPTS or isinstance(problem, HostKeyMismatch):
                raise
            else:
                warn(f"{problem}; connecting again")
        finally:
            if stream is not None:
                received += stream.received
                stream.close()
    return received


# ── The backup ───────────────────────────────────────────────────────────────────────────────────────────────────────
# One run: all volumes of a region over one droplet, two at a time, the next ones' clones being prepared meanwhile. Puts
# the chapters above together.


class Trial:
    """A try, in a directory, of all that a run needs of its file system, before anything that costs is created.

    `sizes` in bytes are those of the volumes that have no image there yet, `needed` what each may still take. What is
    missing raises UsageError with what to do; what is merely dear is said.
    """

    SAMPLE = 16 * CHUNK  # large enough that it shows in the free space whether a length takes any
    TRIAL_NAME = ".dosvob-trial-{}"  # a dry run and a run may try at once, and neither knows of the other
    ABANDONED = 24 * 3600  # seconds after which whoever made it is taken to be dead; a trial takes some

    def __init__(
        self, directory: Path, sizes: Sequence[int], needed: Sequence[int], say: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._largest = max(sizes, default=0)
        self._needed = needed
        self._say = say
        self._kind = Mount.of(directory).kind or "its file system"
        name = self.TRIAL_NAME.format(secrets.token_hex(4))
        self._paths = (directory / name, directory / f"{name}.renamed", directory / f"{name}.directory")

    def run(self) -> None:
        """Try it, and leave nothing there. A full disk is no reason to stop: some volumes may need no more."""
        try:
            for step, remedy in (
                (self._write, "give dosvob the right to write there"),
                (self._write_in_the_middle, "it must change files in place: rclone does with --vfs-cache-mode writes"),
                (self._reopen, "it must open a file again to change it: mount an SMB share with mount.cifs"),
                (self._lengthen, "use a file system with larger files, such as XFS or Btrfs"),
                (self._rename, "it must rename between directories: mergerfs does with category.create=mfs"),
                (self._replace, "it must rename over a file: sshfs does with -o workaround=rename"),
                (self._lock, "it must lock files: NFS does with -o local_lock=flock"),
            ):  # fmt: skip
                if not self._try(step, remedy):
                    break
        finally:
            self._remove(self._paths)

    def _try(self, step: Callable[[], None], remedy: str) -> bool:
        """Take a step; False if the disk is full."""
        try:
            step()
        except OSError as problem:
            if is_disk_full(problem):
                return False
            size = f" for an image of {human_size(self._largest)}" * (problem.errno == errno.EFBIG)
            what = f"{self._directory} is on {self._kind}, which will not do{size} ({problem.strerror})"
            raise UsageError(f"{what}: {remedy}") from problem
        return True

    @staticmethod
    def _remove(paths: Iterable[Path]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)

    def _remove_abandoned(self, now: float) -> None:
        """Remove what trials left that were killed long ago; `now` is by the clock of this file system."""
        for path in self._directory.glob(self.TRIAL_NAME.format("*")):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < now - self.ABANDONED:
                    self._remove([path])

    @contextlib.contextmanager
    def _opened(self, flags: int = os.O_RDWR) -> Iterator[SparseFile]:
        with contextlib.closing(SparseFile(self._paths[0], flags)) as file:
            yield file

    def _write(self) -> None:
        with self._opened(os.O_RDWR | os.O_CREAT) as file:
            file.write(ZERO_CHUNK, 0)
            os.fsync(file.fd)
            self._remove_abandoned(os.fstat(file.fd).st_mtime)

    def _write_in_the_middle(self) -> None:
        with self._opened() as file:
            file.write(b"x" * PAGE, CHUNK // 2)
            os.fsync(file.fd)
            if file.read(CHUNK // 2, PAGE) != b"x" * PAGE:
                raise OSError(errno.EIO, "what was written there does not come back")

    def _reopen(self) -> None:
        with self._opened() as file:
            file.write(b"y" * PAGE, 0)

    def _lengthen(self) -> None:
        """Set the length of the largest image; where that takes space, look only whether it could be."""
        with self._opened() as file:
            can_punch, free = file.punch(0, CHUNK), file.free_space()
            os.ftruncate(file.fd, self.SAMPLE)
            os.fsync(file.fd)
            status = os.fstat(file.fd)
            is_sparse = status.st_blocks * 512 < self.SAMPLE or free - file.free_space() < self.SAMPLE // 2
            if is_sparse:
                os.ftruncate(file.fd, max(self._largest, self.SAMPLE))
            else:
                self._look_for_space(file, free)
        if is_sparse and not can_punch:
            self._say(
                f"{self._directory} is on {self._kind}, where no holes can be made in a file: what becomes zeros on a "
                "volume goes on taking space here, up to the volume's size"
            )

    def _look_for_space(self, file: SparseFile, free: int) -> None:
        figures = f"{human_size(sum(self._needed))} are needed for first backups, {human_size(free)} are free"
        told = f"{self._directory} is on {self._kind}, which has no sparse files: {figures}"
        if max(self._needed, default=0) > free:
            raise UsageError(f"{told}: use another file system, such as ext4 or Btrfs, or a larger disk")
        try:
            os.lseek(file.fd, self._largest, os.SEEK_SET)  # refused beyond what a file can have
        except OSError as problem:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from problem
        self._say(told)

    def _rename(self) -> None:
        file, renamed, directory = self._paths
        file.rename(renamed)
        directory.mkdir(mode=0o700)
        renamed.rename(directory / "renamed")
        (directory / "renamed").rename(file)

    def _replace(self) -> None:
        """Rename over another file, as each commit does."""
        file, other, _ = self._paths
        os.close(create_private(other))
        other.rename(file)

    def _lock(self) -> None:
        with self._opened() as file:
            fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclass(frozen=True)
class Context:
    """What all that needs the account is given."""

    config: Config
    api: Api
    home: Home
    report: Reporter
    stop: Stop

    def name(self, volume: Volume) -> str:
        """The name of a volume's image."""
        return f"{volume.region}/{volume.name}" if self.config.by_region else volume.name

    def try_storage(
        self, volumes: Sequence[Volume], moved: Mapping[str, ImagePaths] | None = None, *, dry_run: bool = False
    ) -> None:
        """Try all that a backup of the volumes needs where their images go; raises UsageError with what to do.

        What is not there yet is tried where it will be made. A dry run also says how much is free there; `moved` tells
        it where that is, by name, which the run would move first.
        """
        new_in: dict[Path, list[tuple[Volume, ImagePaths]]] = {}  # those that have no image yet
        for volume in volumes:
            paths = ImagePaths(self.home.path, self.name(volume))
            now = (moved or {}).get(paths.name, paths)
            new_in.setdefault(paths.metadata, []).extend([] if may_be_file(now.image) else [(volume, now)])
        for directory, new in new_in.items():
            place = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
            sizes = [volume.size for volume, _ in new]
            needed = [max(volume.size - self.home.occupied(now.partial), 0) for volume, now in new]
            Trial(place, sizes, needed, self.report.say).run()
            if dry_run:
                free = free_in(place)
                told = f"{human_size(free)} are free in {place}"
                told = f"{place} does not tell how much is free" if free == UNLIMITED else told
                first = f"; first backups take up to {human_size(sum(needed))}, for {counted(len(sizes), 'volume')}"
                first *= bool(sizes)
                self.report.say(f"{told}{first}")


Host = tuple[Droplet, Link]


class Course:
    """Shows how far a conversation is, and the time left; ends it when a stop was requested.

    The time left follows from how fast it scanned and fetched of late. In a first backup nobody knows how much of the
    rest is data: after much data it may take less, after zeros more.
    """

    def __init__(self, report: Reporter, stop: Stop, name: str, number: str, conversation: Conversation) -> None:
        self._report = report
        self._stop = stop
        self._name = name
        self._number = number  # "2 of 5", if there are several
        self._conversation = conversation
        self._position = 0
        self._scan, self._fetch, self._link = Rate(), Rate(), Rate()  # chunks, chunks, and bytes
        self._called, self._fetching = time.monotonic(), 0.0  # seconds in which something was there to be fetched

    def __call__(self, received: int) -> None:
        """Show the progress, given the bytes received so far. Raises Interrupted."""
        self._stop.check()
        reached = self._conversation.position
        if reached < self._position:  # what was sent is compared now
            self._scan, self._fetch = Rate(), Rate()
        self._position = reached
        now = time.monotonic()
        if self._conversation.outstanding or self._conversation.is_first:
            self._fetching += now - self._called
        self._called = now
        fetch = self._fetch(self._conversation.fetched, self._fetching)
        link, scan = self._link(received), self._scan(reached)
        self._report.progress(lambda: self._told(received, link, scan, fetch))

    def _told(self, received: int, link: float, scan: float, fetch: float) -> str:
        reached, size = self._position, self._conversation.chunks * CHUNK
        told = self._conversation.verb.format(
            fetched=human_size(received), link=human_size(link), pace=human_size(scan * CHUNK)
        )
        told = told if link and scan else told.partition(" at ")[0]
        told = f"{human_size(reached * CHUNK)} of {human_size(size)} {told}"
        return f"{self._name}: {', '.join(filter(None, (self._left(scan, fetch), self._number, told)))}"

    def _left(self, scan: float, fetch: float) -> str:
        """The time left; empty while it is unknown."""
        conversation, reached = self._conversation, self._position
        unscanned, outstanding = conversation.chunks - reached, conversation.outstanding
        if (unscanned and not scan) or (outstanding and not fetch):
            return ""
        word = "" if not (conversation.is_first and unscanned) else "under " if fetch > 0.3 * scan else "over "
        if word == "under ":  # as if all the rest were data
            scan = min(scan, fetch)
        elif word == "over ":
            scan = max(scan, self._scan.fastest)
        seconds = (unscanned / scan if unscanned else 0) + (outstanding / fetch if outstanding else 0)
        return "" if word and seconds < 1 else f"{word}{human_time(seconds)} left"


class DropletKeeper:
    """Makes the run's droplet, and the `Link` to it, in the background; replaces a lost one. To be closed."""

    MOST_LOST = 3  # droplets over one volume, which may be why and fails then

    def __init__(self, context: Context, ephemeral: Ephemeral, plan: DropletPlan) -> None:
        self._context = context
        self._ephemeral = ephemeral
        self._plan = plan
        self._keys = RunKeys.generate()
        self._lost = 0  # droplets since the last conversation that came to its end
        self._lost_over: collections.Counter[str] = collections.Counter()  # droplets by the volumes that were attached
        self._replacing = threading.Lock()
        self._links = contextlib.ExitStack()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._future = self._pool.submit(self._make)

    def get(self) -> Host:
        """The droplet, once it lets us in; raises NoDroplet."""
        return self._future.result()

    def check(self) -> None:
        """Raise NoDroplet if making one has failed by now; does not wait."""
        if self._future.done():
            self._future.result()

    def replace(self, lost: Droplet, problem: DosvobError) -> None:
        """Remove a lost droplet and have another one made, unless that was done, or too many were lost in a row."""
        with self._replacing:
            if self.get()[0] is not lost:
                return
            self._lost += 1
            if self._lost > self.MOST_LOST:
                told = f"{self._lost} were lost in a row: {problem}"
                self._future = concurrent.futures.Future()
                self._future.set_exception(NoDroplet(f"nothing can be done for want of a droplet, {told}"))
            else:
                self._remove(problem)
                self._future = self._pool.submit(self._make)

    def _remove(self, problem: DosvobError) -> None:
        self._context.report.warn(f"{problem}; making another one")
        self._ephemeral.remove_droplets()

    def _make(self, *, is_second: bool = False) -> Host:
        """Create the droplet, and a second one if it is lost meanwhile, and wait until it lets us in."""
        try:
            droplet = self._ephemeral.create_droplet(self._plan, self._keys.public, self._keys.user_data())
            link = self._links.enter_context(contextlib.closing(Link(droplet.address, self._keys, self._context.stop)))
            self._reach(link)
            # again, in case something wrote a rule after bootcmd
            self._repeated(droplet, ATTEMPTS, functools.partial(link.run, "; ".join(DISARM), RECONNECT_LIMIT))
        except NoDroplet:
            raise
        except DosvobError as problem:
            is_lost = isinstance(problem, (DropletLost, ConnectionLost))
            if not is_lost or is_second:
                too = ", a second one too" * is_lost
                raise NoDroplet(f"nothing can be done for want of a droplet{too}: {problem}") from problem
            self._remove(problem)
            return self._make(is_second=True)
        self._context.report.say(f"the droplet {droplet.name} is up at {droplet.address}")
        return droplet, link

    def converse(
        self,
        volume: Volume,
        conversation: Conversation,
        what: str,
        number: str = "",
        has_company: Callable[[], bool] = lambda: False,
    ) -> int:
        """As `converse`, with the volume attached to the droplet, or to another one if that is lost.

        `what` names it in the progress, `number` says which of several it is. If it `has_company` when a droplet is
        lost, another one is made all the same, and DropletLost is raised: either may be why.
        """
        droplet, link = self.get()  # before anything is measured
        progress = Course(self._context.report, self._context.stop, what, number, conversation)

        def start_agent() -> AgentStream:
            nonlocal droplet, link
            droplet, link = self.get()
            self._ephemeral.attach(volume, droplet)
            return link.start_agent(conversation.program(Link.device(volume.name)))

        def replace_lost(problem: DosvobError) -> bool:
            if not isinstance(problem, DropletLost):
                if not self._ephemeral.is_gone(droplet):
                    return False
                problem = DropletLost(f"{problem}; the droplet {GONE}")
            self.replace(droplet, problem)
            self._lost_over[volume.id] += 1
            if self._lost_over[volume.id] == self.MOST_LOST:
                raise DosvobError(f"{problem}; {self.MOST_LOST} droplets were lost over it")
            if has_company():
                raise problem
            return True

        received = converse(start_agent, conversation, self._context.report.warn, progress, replace_lost)
        self._lost = 0
        return received

    def _reach(self, link: Link) -> None:
        try:
            link.open(SSH_LIMIT)
        except ConnectionLost as problem:
            if self._context.api.is_proxied:  # another droplet would be as far away
                raise NoDroplet(
                    f"{problem}. DigitalOcean's API is reached through a proxy, and SSH uses none: let port {SSH_PORT} "
                    "go out, or run dosvob where it does"
                ) from problem
            raise

    def look_at(self, volume: Volume) -> Finding:
        """What is on a volume that is attached to the droplet, and whether it comes up."""
        try:
            droplet, link = self.get()
            with_fsck = self._context.config.check == "fsck"
            return self._repeated(droplet, 2, lambda: link.check(volume.name, with_fsck=with_fsck))
        except DosvobError as problem:
            return Finding(words=str(problem)[:CHECKED_WORDS])

    def _repeated(self, droplet: Droplet, attempts: int, work: Callable[[], T]) -> T:
        """What the work returns; it is repeated if its connection breaks, unless the droplet is gone."""
        for _ in range(attempts - 1):
            try:
                return work()
            except ConnectionLost:
                if self._ephemeral.is_gone(droplet):
                    raise
        return work()

    def close(self) -> None:
        """Wait for what goes on in the background, and close the connections."""
        self._pool.shutdown()
        self._links.close()


class SnapshotTurn:
    """The wait for DigitalOcean's next snapshot of a volume. Times are time.monotonic.

    No snapshot is asked for before `not_before`. `until` is the time that the user has read of, 0 for none.
    """

    SNAPSHOT_INTERVAL = 600  # seconds; DigitalOcean takes one snapshot of a volume per 10 minutes
    SNAPSHOT_RETRY = 20  # seconds between attempts when it is too soon and nobody says by how much
    SNAPSHOT_GRACE = 60  # seconds for which one may still be refused when it is due
    RULE = "DigitalOcean takes one snapshot of a volume per 10 minutes"

    def __init__(self, name: str) -> None:
        self.not_before = self.until = 0.0
        self._name = name
        self._give_up = self._at_last = float("inf")

    def put_off(self, problem: DosvobError | OSError, last: str, context: Context, hint: str) -> None:
        """Set when to ask again after a refusal; raises any other problem, and DosvobError when it lasts for too long.

        DigitalOcean seldom says when the next one is due. Then `last` tells, the time of the last one, if we took that.
        If it does say when, the limit may be the account's for a minute, and the time to give up moves on.
        """
        if not isinstance(problem, ApiError) or problem.status != 429 or problem.is_accounts:
            raise problem
        wait, now, since = problem.wait, time.monotonic(), age(last, context.api.now())
        if wait is None and 0 <= since < self.SNAPSHOT_INTERVAL:
            wait = self.SNAPSHOT_INTERVAL - since
        if not self.until:
            seconds = self.SNAPSHOT_INTERVAL if wait is None else wait
            moment = local_time(utc_now() + datetime.timedelta(seconds=seconds))
            the_next_one = f"the next one {'by' if wait is None else 'at'} {moment}"
            context.report.say(f"{self._name}: {self.RULE}, {the_next_one}; {hint}")
            self.until = now + seconds
        wait = self.SNAPSHOT_RETRY if wait is None else wait
        self.not_before = now + wait
        give_up = now + max(self.SNAPSHOT_INTERVAL, wait) + self.SNAPSHOT_GRACE
        self._give_up = min(self._give_up, give_up) if problem.wait is None else give_up
        self._at_last = min(self._at_last, now + max(Api.RATE_LIMIT_PATIENCE, wait))
        if self.not_before > min(self._give_up, self._at_last):
            raise DosvobError(f"{self.RULE}, and has refused the next one for longer: {problem}") from problem

    def told(self) -> str:
        """What to say while it is waited for; nothing once it is due."""
        left = max(self.until, self.not_before) - time.monotonic()
        return f"{self._name}: {human_time(left)} until DigitalOcean takes its next snapshot" if left > 0 else ""


@dataclass
class Result:
    """What became of one volume by now; sizes in bytes, `outcome` "ok" if it is backed up, `found` what is on it.

    `is_thinned`: whether its versions could be thinned before; if not, that was told.
    """

    name: str
    size: int
    outcome: str
    changed: int = 0
    fetched: int = 0
    seconds: float = 0.0
    is_thinned: bool = True
    found: str = "-"

    def row(self) -> tuple[str, ...]:
        """Its line in the table at the end of a run."""
        figures = (human_size(self.changed), human_size(self.fetched), human_time(self.seconds), self.found)
        return self.name, human_size(self.size), *(figures if self.outcome == "ok" else ("-",) * 4), self.outcome


Prepared = concurrent.futures.Future[tuple[Volume, str]]  # a volume's clone, and when its snapshot was taken


@dataclass(eq=False)
class Queued:
    """A volume on its way: it waits for its turn, is `prepared`, then synced.

    If it `goes_alone` no other volume is synced beside it; whether one was, at any time, `had_company` tells. `place`
    is "2 of 5", if there are several.
    """

    volume: Volume
    name: str
    number: int
    turn: SnapshotTurn
    goes_alone: bool = False
    had_company: bool = False
    place: str = ""
    prepared: Prepared = field(init=False)
    sync: concurrent.futures.Future[Result] = field(init=False)


Dropped = collections.defaultdict[str, set[datetime.datetime]]  # the versions that a run dropped, by image


def thin(context: Context, paths: ImagePaths, dropped: Dropped) -> bool:
    """Drop the versions that `keep` does not ask for; False if that failed: the next run tries again."""
    before: set[datetime.datetime] = set()
    try:
        meter = Meter(context.report, context.stop, f"{paths.name}: thinning its versions")
        before = {version.moment for version in Versions(paths).all()}
        Versions(paths).thin(context.config.keep, meter)
    except Interrupted:
        pass  # the next wait raises it again
    except (OSError, DosvobError) as problem:
        held = human_size(Home.occupied(paths.versions))
        context.report.warn(
            f"{paths.name}: its older versions could not all be thinned, and none is lost by that: "
            f"{explained(problem, paths.versions)}. They "
            f'hold {held}; to keep fewer change "keep" in conf.json; to see which are damaged: '
            + command_line("verify", paths.name)
        )
        return False
    finally:
        context.report.end_progress()
        with contextlib.suppress(OSError, DosvobError):
            dropped[paths.name] |= before - {version.moment for version in Versions(paths).all()}
    return True


class Backup:
    """One run over the volumes of one region. `results`, by the images' names, has those of other regions too."""

    AHEAD = 3  # volumes whose clones are made and attached while others sync: a droplet takes one event at a time
    MOST_SYNCS = 2  # at a time: DigitalOcean gives each volume some 200 to 300 MB/s, and the droplet reads more
    MOST_CHECKS = 4  # at a time, if some hang
    PLACES = 7  # for clones that are needed: some droplets take no more

    def __init__(
        self,
        context: Context,
        plan: DropletPlan,
        volumes: Sequence[Volume],
        results: dict[str, Result],
        dropped: Dropped,
        *,
        reread: bool,
    ) -> None:
        stop = Stop(context.stop)  # what ends with this region
        self._context = dataclasses.replace(context, stop=stop, api=context.api.with_stop(stop))
        self._plan = plan
        self._reread = reread
        self._report = context.report
        self._results = results
        self._dropped = dropped
        self._queue = collections.deque(
            Queued(volume, name := context.name(volume), number, SnapshotTurn(name))
            for number, volume in enumerate(volumes)
        )
        self._ephemeral = Ephemeral(self._context.api, context.home.id, context.report)
        self._has_no_droplet = False
        self._refused = sys.maxsize  # bytes of the smallest clone that the account has no quota for
        self._needed: set[str] = set()  # the ids of clones that wait for their sync or are at it
        self._spent: dict[str, Volume] = {}  # the clones that nothing needs any more, by id
        self._checks: dict[str, tuple[Queued, concurrent.futures.Future[Finding], float]] = {}  # by clone; since when
        self._keeper: DropletKeeper

    def run(self) -> float:
        """Back up all volumes and remove what was created for that; returns what it cost, in dollars."""
        names = ", ".join(queued.name for queued in self._queue)
        self._report.say(f"backing up {names}, over a droplet {self._plan.sizes[0][0]} with {self._plan.image}")
        with self._ephemeral:
            try:
                self._back_up_all()
            finally:
                self._report.end_progress()
        return self._ephemeral.cost()

    def _back_up_all(self) -> None:
        """Two volumes at a time, or one; the next ones' clones are made and attached while they sync."""
        pool = concurrent.futures.ThreadPoolExecutor
        self._keeper = DropletKeeper(self._context, self._ephemeral, self._plan)
        ahead: collections.deque[Queued] = collections.deque()
        syncs: list[Queued] = []  # those that are under way
        since = time.monotonic()
        syncer, beside = pool(self.MOST_SYNCS), pool(self.MOST_CHECKS)
        with contextlib.closing(self._keeper), pool(1) as maker, pool(1) as attacher, pool(1) as saver, beside, syncer:
            try:
                saver.submit(self._save_hours)
                while self._queue or ahead or syncs:
                    while self._queue and len(ahead) < min(self.AHEAD, self.PLACES - len(syncs) - self._looks()):
                        queued = self._queue.popleft()
                        made = maker.submit(self._make_clone, queued)
                        queued.prepared = attacher.submit(self._attach, queued, made)
                        ahead.append(queued)
                    if ahead and self._may_begin(ahead[0], syncs):
                        self._begin(ahead.popleft(), syncs, syncer)
                        since = time.monotonic()
                        continue
                    self._wait(ahead, syncs, since)
                    ended = [queued for queued in syncs if queued.sync.done()]
                    for queued in sorted(ended, key=lambda queued: queued.sync.exception() is not None):
                        syncs.remove(queued)
                        if not self._end_sync(queued, beside):
                            ahead.appendleft(queued)
                        since = time.monotonic()
                    self._end_checks()
                self._end_checks(wait=True)
            finally:
                self._context.stop.request()  # what goes on in the background is of no use any more

    def _may_begin(self, queued: Queued, syncs: Sequence[Queued]) -> bool:
        """Whether a volume's sync can begin now: its clone is there, or failed, and it may go beside what goes on."""
        alone = any(each.goes_alone for each in (queued, *syncs))
        return queued.prepared.done() and len(syncs) < (1 if alone else self.MOST_SYNCS)

    def _wait(self, ahead: Sequence[Queued], syncs: Sequence[Queued], since: float) -> None:
        """Wait until a sync ends or the next clone is there, for a moment at most; say since when if that is all."""
        awaited: list[concurrent.futures.Future[Any]] = [queued.sync for queued in syncs]
        awaited += [queued.prepared for queued in itertools.islice(ahead, 1) if not queued.prepared.done()]
        awaited += [future for _, future, _ in self._checks.values()]
        if syncs:
            self._report.current = f"backing up {' and '.join(queued.name for queued in syncs)}"
        elif not ahead:
            self._report.progress(lambda: "looking whether the backups come up, before the droplet takes another clone")
        else:
            queued = ahead[0]
            waiting = f"{queued.name}: waiting for its clone and the droplet, {human_time(time.monotonic() - since)}"
            self._report.progress(lambda: queued.turn.told() or waiting)
        concurrent.futures.wait(awaited, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED)

    def _begin(self, queued: Queued, syncs: list[Queued], syncer: concurrent.futures.Executor) -> None:
        """Begin the sync of a volume whose clone is there; if that failed, the volume failed or its turn is put off."""
        name = queued.name
        self._report.end_progress()
        try:
            clone, taken_at = queued.prepared.result()
        except (DosvobError, OSError) as problem:
            self._put_off(queued, problem)
            return
        self._results[name].outcome = "begun"
        if len(self._results) > 1 and not queued.place:
            begun = sum(result.outcome != "not begun" for result in self._results.values())
            queued.place = f"{begun} of {len(self._results)}"
        queued.had_company = bool(syncs)
        for other in syncs:
            other.had_company = True
        queued.sync = syncer.submit(self._sync, queued, clone, taken_at)
        syncs.append(queued)

    def _put_off(self, queued: Queued, problem: DosvobError | OSError) -> None:
        """Put a volume's turn off until DigitalOcean takes its next snapshot; if that is not it, it failed."""
        path, last = ImagePaths(self._context.home.path, queued.name).state, ""
        with contextlib.suppress(OSError, DosvobError):
            state = State.load(path, whole=False)
            last = state.snapshot.taken_at if state else ""
        try:
            queued.turn.put_off(problem, last, self._context, "the other volumes go first")
        except (DosvobError, OSError) as final:
            self._fail(queued, final)
        else:
            self._queue.append(queued)

    def _fail(self, queued: Queued, problem: DosvobError | OSError) -> None:
        """Report why a volume failed; without a droplet all that are left fail with it."""
        self._report.end_progress()
        failed = [queued]
        if isinstance(problem, NoDroplet):
            if not self._has_no_droplet:  # the volume that was being prepared meanwhile meets it too
                self._report.error(str(problem))
            self._has_no_droplet = True
            failed += self._queue
            self._queue.clear()
        else:
            told = explained(problem, self._context.home.path)
            if is_disk_full(problem):
                with contextlib.suppress(OSError, DosvobError):
                    versions = Versions(ImagePaths(self._context.home.path, queued.name)).all()
                    held = f"{len(versions)} older versions hold {human_size(sum(each.occupied for each in versions))}"
                    told += f'; its {held}, and "keep" in conf.json says how many there are' * bool(versions)
            self._report.error(f"{queued.name}: {told}")
        for each in failed:
            self._results[each.name].outcome = "FAILED"

    # In the background

    def _make_clone(self, queued: Queued) -> tuple[Volume, str]:
        """Make the volume's clone, when its turn and the account's quota allow it."""
        paths = ImagePaths(self._context.home.path, queued.name)
        paths.check_unread()  # before that costs anything
        # The volume is not what a first backup waits for, and the sooner each one is complete the better.
        queued.goes_alone = not exists(paths.image)
        size = queued.volume.size

        def make_room() -> bool:
            has_room = self._let_one_go(patiently=True)
            if not has_room:
                self._refused = min(self._refused, size)
            return has_room

        self._context.stop.sleep(queued.turn.not_before - time.monotonic())
        self._keeper.check()  # a clone would be of no use without a droplet
        if size >= self._refused:
            raise DosvobError(
                f"DigitalOcean refused a clone of {human_size(self._refused)} before, as was told, so none of "
                f"{human_size(size)} is asked for, and no snapshot is paid for"
            )
        clone, taken_at = self._ephemeral.make_clone(queued.volume, queued.number, make_room=make_room)
        self._needed.add(clone.id)
        return clone, taken_at

    def _attach(self, queued: Queued, made: Prepared) -> tuple[Volume, str]:
        """Attach a volume's clone, once it is made."""
        clone, taken_at = made.result()
        try:
            self._ephemeral.attach(clone, self._keeper.get()[0], self._let_one_go)
        except DropletLost:
            queued.goes_alone = True  # its sync has another one made, when no other one needs this one
        except DosvobError:
            self._end_use(clone)
            raise
        return clone, taken_at

    def _end_use(self, clone: Volume) -> None:
        """Nothing needs the clone any more: it may be let go, and is removed with the droplet at the latest."""
        self._spent[clone.id] = clone
        self._needed.discard(clone.id)

    def _let_one_go(self, *, patiently: bool = False) -> bool:
        """Release a spent clone; returns whether there was one. If it is `patient` it waits for those in use."""
        while not self._spent:
            if not (patiently and self._needed):
                return False
            self._context.stop.sleep(Stop.NAP)
        droplet = self._keeper.get()[0]
        try:
            self._release(next(iter(self._spent.values())), droplet)
        except DropletLost as problem:
            if not patiently:
                raise
            if self._needed:  # which has another one made when its turn comes
                self._context.stop.sleep(Stop.NAP)
            else:
                self._keeper.replace(droplet, problem)
        return True

    def _save_hours(self) -> None:
        """Release each spent clone before it costs another hour."""
        while True:
            self._context.stop.sleep(1)
            for clone in filter(self._ephemeral.has_cost_an_hour, list(self._spent.values())):
                with contextlib.suppress(DropletLost, NoDroplet):
                    self._release(clone, self._keeper.get()[0])

    def _release(self, clone: Volume, droplet: Droplet) -> None:
        """Detach and delete a spent clone, unless somebody else does; raises DropletLost."""
        if self._spent.pop(clone.id, None) is None:
            return
        try:
            self._ephemeral.release(clone, droplet)
        except DropletLost:
            self._spent[clone.id] = clone
            raise
        except DosvobError as problem:
            self._report.detail(f"{problem}; {clone.name} is removed at the end of the run")

    # In the two threads of the syncs

    def _sync(self, queued: Queued, clone: Volume, taken_at: str) -> Result:
        """Make the clone's content the volume's image."""
        start, volume, name, report = time.monotonic(), queued.volume, queued.name, self._report
        report.detail(f"{name}: syncing its snapshot of {taken_at}")
        paths = ImagePaths(self._context.home.path, name)
        snapshot = Snapshot(volume.id, name, volume.region, clone.size, taken_at)

        def warn(text: str) -> None:
            report.warn(f"{name}: {text}")

        meter = Meter(report, self._context.stop, f"{name}: reading and writing here")
        try:
            update = Update(paths, snapshot, self._context.config.keep, warn, meter, reread=self._reread)
            with contextlib.closing(update):
                try:
                    converse = self._keeper.converse
                    received = converse(clone, Pull(update), name, queued.place, lambda: queued.had_company)
                    update.finish()
                except OSError as problem:
                    if is_disk_full(problem):
                        update.give_up_space()
                    raise
        finally:
            report.end_progress()
        if update.differing.ranges:
            warn(
                f"{human_size(update.differing.size)} of the image differs from what was recorded, or "
                f"cannot be read: {update.differing}. Either it was mounted or opened for writing, or the "
                "disk is failing; the volume's content was put back"
            )
        seconds, was_thinned = time.monotonic() - start, self._results[name].is_thinned
        return Result(name, snapshot.size, "ok", update.changed, received, seconds, was_thinned)

    # In the foreground

    def _end_sync(self, queued: Queued, beside: concurrent.futures.Executor) -> bool:
        """Report what became of a sync, and have its clone checked; False if it is to be done again, alone.

        That is so if the disk was full or the droplet lost, of which another one beside it may be the reason.
        """
        try:
            result = queued.sync.result()
        except (DosvobError, OSError) as problem:
            if queued.had_company and (is_disk_full(problem) or isinstance(problem, DropletLost)):
                why = "the disk is full" if is_disk_full(problem) else "the droplet was lost"
                self._report.say(f"{queued.name}: {why}; it is tried again, with no other volume beside it")
                queued.goes_alone = True
                return False
            self._fail(queued, problem)
        else:
            self._results[queued.name] = result
            self._report.say(
                f"{result.name}: backed up {human_size(result.size)} in {human_time(result.seconds)}, "
                f"{human_size(result.changed)} had changed, {human_size(result.fetched)} were fetched"
            )
        self._look_at(queued, beside)
        return True

    # Whether it comes up

    def _look_at(self, queued: Queued, beside: concurrent.futures.Executor) -> None:
        """Have the droplet look whether a clone that was backed up comes up, unless the user wants none of that."""
        clone = queued.prepared.result()[0]
        is_ok, wants_check = self._results[queued.name].outcome == "ok", self._context.config.check != "none"
        if is_ok and wants_check:
            future = beside.submit(self._keeper.look_at, clone)
            future.add_done_callback(lambda _: self._end_use(clone))
            self._checks[clone.id] = (queued, future, time.monotonic())
        else:
            self._end_use(clone)
        if is_ok and not wants_check:
            self._take_note(queued.name, None)

    def _looks(self) -> int:
        """How many have not ended."""
        return sum(not future.done() for _, future, _ in self._checks.values())

    def _end_checks(self, *, wait: bool = False) -> None:
        start = time.monotonic()
        for clone, (queued, future, _) in list(self._checks.items()):
            self._give_up_checks()
            while wait and not future.done():  # a stop ends it too
                waited = time.monotonic() - start
                told = f"{queued.name}: looking whether its backup comes up, {human_time(waited)}"
                self._report.progress(lambda: told)  # noqa: B023 - called at once
                self._give_up_checks()
                concurrent.futures.wait([future], timeout=0.5)
            if future.done():
                del self._checks[clone]
                self._report.end_progress()
                late = Finding(words=f"other volumes' looks took {human_time(CHECK_LIMIT)}")
                self._take_note(queued.name, late if future.cancelled() else future.result())

    def _give_up_checks(self) -> None:
        """Cancel the looks that wait for others that hang; those that have begun have each their own limit."""
        for _, future, since in self._checks.values():
            if time.monotonic() - since > CHECK_LIMIT:
                future.cancel()

    def _take_note(self, name: str, found: Finding | None) -> None:
        """Record what was found on a volume, None if that was not looked for; say what is wrong; thin its versions."""
        report, paths, doubt = self._report, ImagePaths(self._context.home.path, name), ""
        try:
            found = State.note(paths, found)
            if found is not None and found.came_up is False:
                with contextlib.closing(Chain(paths)) as chain:
                    doubt = chain.doubt(0)
        except (DosvobError, OSError) as problem:
            report.warn(f"{name}: what was found on it is not recorded: {explained(problem, paths.state)}")
        if found is not None:
            self._results[name].found = str(found)
            report.detail(f"{name}: {found}, by Linux {found.kernel or 'of an unknown release'}")
            untried = "whether it comes up is not known: " * (found.came_up is None)
            if found.came_up is False:
                report.error(f"{name}: {doubt or found}; it is backed up all the same, for that is what the volume has")
            elif told := "; ".join(filter(None, (found.change, found.words and untried + found.words))):
                report.warn(f"{name}: {told}")
        if self._results[name].is_thinned:
            thin(self._context, paths, self._dropped)


# ── The way back ─────────────────────────────────────────────────────────────────────────────────────────────────────
# Makes a new volume of an image, an older version or any file. First comes a throwaway volume: a clone of the image's
# own volume if that is still there, else an empty one. A droplet makes it what the source is, and the new volume is
# made from its snapshot. So the new one is whole from its birth, and the teardown removes all else.


@dataclass(frozen=True)
class NewVolume:
    """The volume to make; `size` in bytes."""

    name: str
    region: str
    size: int

    NAME: ClassVar[re.Pattern[str]] = re.compile(r"[a-z][a-z0-9-]{0,63}")
    LARGEST: ClassVar[int] = 16 << 10  # GiB

    def check(self, api: Api) -> list[Volume]:
        """Raise UsageError for what DigitalOcean would refuse in the end; returns the account's volumes."""
        if not self.NAME.fullmatch(self.name) or Resource.is_ephemeral({"name": self.name}):
            raise UsageError(
                f'"{self.name}" cannot be the name of the new volume: up to 64 lower-case letters, digits and dashes, '
                f'beginning with a letter, and not with "{TAG}"'
            )
        if self.size > self.LARGEST * GIB:
            raise UsageError(f"a volume has at most {self.LARGEST} GiB, and this one would have {self.size // GIB}")
        items = api.list("/v2/volumes", "volumes")
        volumes = [Volume.parse(item) for item in items if not Resource.is_ephemeral(item)]
        if any((volume.name, volume.region) == (self.name, self.region) for volume in volumes):
            raise UsageError(f"there is a volume {self.name} in {self.region} already: take another name")
        for kind in (VOLUME, DROPLET):
            if limit := reached_limit(api, kind):
                raise UsageError(limit)
        return volumes

    def base(self, source: Source, volumes: Iterable[Volume], *, from_scratch: bool) -> tuple[Volume | None, str]:
        """The volume to begin with, None for none; and the sentence that says so and why."""
        known = [volume for volume in volumes if volume.id == source.volume_id]
        known = known or [volume for volume in volumes if volume.name == source.volume_name]
        here = [volume for volume in known if volume.region == self.region]
        if not source.volume_name:
            why = "a file is of no volume"
        elif from_scratch:
            why = "--from-scratch asks for that"
        elif not known:
            why = f"there is no volume {source.volume_name} any more"
        elif not here:
            why = f"{known[0].name} is in {known[0].region}"
        elif here[0].size > self.size:
            why = f"{here[0].name} is larger, {here[0].size // GIB} GiB"
        else:
            return here[0], (
                f"{self.name} begins with what {here[0].name} has now: only what differs in {source.name} is sent"
            )
        return None, f"{self.name} begins empty, for {why}: all of {source.name} but zeros is sent"

    @property
    def price(self) -> float:
        """Dollars a month."""
        return self.size / GIB * KINDS[VOLUME].gib_hour * HOURS_PER_MONTH


class Restoration:
    """One run that makes a new volume, beginning with a base if there is one."""

    def __init__(
        self, context: Context, plan: DropletPlan, source: Source, new: NewVolume, base: Volume | None
    ) -> None:
        stop = Stop(context.stop)  # what ends with this
        self._context = dataclasses.replace(context, stop=stop, api=context.api.with_stop(stop))
        self._plan = plan
        self._source = source
        self._new = new
        self._base = base
        self._ephemeral = Ephemeral(self._context.api, context.home.id, context.report)

    def run(self) -> Volume:
        """Make it; returns it when all else is removed."""
        with self._ephemeral:
            made = self._make()
        cost = self._ephemeral.cost()
        self._context.report.say(f"this run cost about ${cost:.4f}, DigitalOcean's minimum charges included")
        return made

    def _make(self) -> Volume:
        new, report = self._new, self._context.report
        volume, is_empty = self._throwaway()
        with contextlib.closing(DropletKeeper(self._context, self._ephemeral, self._plan)) as keeper:
            try:
                sent = self._fill(volume, keeper, is_empty=is_empty)
                report.end_progress()
                report.say(f"all that {new.name} is to have is there, and was compared: {human_size(sent)} were sent")
                described = f"restored by dosvob: {self._source.name if self._source.volume_name else 'a file'}"
                snapshot = functools.partial(self._ephemeral.take_snapshot, volume, "new")
                has_all = self._when_allowed(snapshot, new.name, "", "the droplet waits meanwhile")
                self._try_out(volume, keeper)  # which changes the throwaway volume
                return self._ephemeral.make_new(new.name, described, volume, has_all)
            except BaseException:
                self._context.stop.request()  # a droplet that is still being made is of no use any more
                raise
            finally:
                report.end_progress()

    def _try_out(self, volume: Volume, keeper: DropletKeeper) -> None:
        """Say whether the new volume will come up, by the throwaway one."""
        name, report = self._new.name, self._context.report
        if self._context.config.check == "none":
            return
        report.progress(lambda: f"{name}: looking whether it comes up")
        found = keeper.look_at(volume)
        report.end_progress()
        tell = report.error if found.came_up is False else report.warn if found.words else report.say
        tell(f"{name}: {found}{f': {found.words}' * bool(found.words)}")

    def _throwaway(self) -> tuple[Volume, bool]:
        """A throwaway volume, and whether it is empty."""
        new, base, report = self._new, self._base, self._context.report
        if base is not None:
            make_clone = functools.partial(self._ephemeral.make_clone, base, 0, new.size)
            hint = "--from-scratch begins at once, with an empty volume"
            try:
                return self._when_allowed(make_clone, base.name, self._source.snapshot_at, hint)[0], False
            except ApiError as problem:
                if problem.status != 404:
                    raise
            report.say(f"{base.name} is gone meanwhile: {new.name} begins empty")
        return self._ephemeral.make_empty(new.region, new.size), True

    def _when_allowed(self, work: Callable[[], T], name: str, last: str, hint: str) -> T:
        """Do work that takes a snapshot, as soon as DigitalOcean allows one; `last` is the time of the last one."""
        turn = SnapshotTurn(name)
        while True:
            try:
                return work()
            except ApiError as problem:
                turn.put_off(problem, last, self._context, hint)
            while (left := turn.not_before - time.monotonic()) > 0:
                self._context.report.progress(turn.told)
                self._context.stop.sleep(min(left, 0.5))

    def _fill(self, volume: Volume, keeper: DropletKeeper, *, is_empty: bool) -> int:
        """Make the volume what the source is, with zeros behind that; returns the bytes sent."""
        chunks, source, new = volume.size // CHUNK, self._source, self._new

        def contents() -> Iterator[tuple[int, bytes]]:
            beyond = range(-(-source.size // CHUNK), chunks)
            return itertools.chain(source.chunks(), ((index, ZERO_CHUNK) for index in beyond))

        def warn(text: str) -> None:
            self._context.report.warn(f"{new.name}: {text}")

        with tempfile.TemporaryFile(dir=self._context.home.metadata) as digests:
            push = Push(contents, chunks, digests, warn, is_empty=is_empty)
            keeper.converse(volume, push, new.name)
        return push.sent


# ── The mount ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Shows images and versions as files. `Shown` knows what a snapshot's bytes are while runs go on, `ShownFile` what was
# written over them, `FileSystem` what is where, and `Kernel` speaks FUSE's protocol with it:
# https://docs.kernel.org/filesystems/fuse/ and include/uapi/linux/fuse.h. One thread does all of it.


class Replaced(DosvobError):
    """What is to be read is not there any more."""


class Steps(NamedTuple):
    """The files that lead from an image to a snapshot, the newest first, each with its place.

    `doubtful` are those that may have lost patches. `numbers` is a bitmap of their numbers in a `Lookup`; `checked` are
    the chunks of which all that is stored was found as recorded since.
    """

    files: Mapping[PatchFile, int]
    doubtful: Sequence[PatchFile]
    numbers: int
    checked: set[int]


class Lookup:
    """Finds what files with an index have of a chunk, without asking each one: there may be thousands."""

    MOST_BUCKETS = 1 << 18

    def __init__(self, chunks: int) -> None:
        self._files: list[PatchFile] = []
        self._numbers: dict[PatchFile, int] = {}
        # Bitmaps of files, by the remainders of the chunks that they have
        self._having = [0] * min(max(chunks, 1), self.MOST_BUCKETS)

    def steps(self, files: Sequence[PatchFile]) -> Steps:
        """Make steps of these; raises Damaged, OSError for one of which the index cannot be read."""
        for file in files:
            if file not in self._numbers:
                chunks, number = file.chunks(), len(self._files)
                self._numbers[file] = number
                self._files.append(file)
                for chunk in chunks:
                    self._having[chunk % len(self._having)] |= 1 << number
        places = {file: place for place, file in enumerate(files)}
        doubtful = [file for file in files if file.doubtful]
        return Steps(places, doubtful, sum(1 << self._numbers[file] for file in files), set())

    def find(self, steps: Steps, index: int) -> list[tuple[PatchFile, Entry]]:
        """What the steps have of a chunk, the newest first."""
        numbers = self._having[index % len(self._having)] & steps.numbers
        having = sorted((self._files[number] for number in numbers_in(numbers)), key=steps.files.__getitem__)
        return [(file, entry) for file in having if (entry := file.find(index)) is not None]


@dataclass(frozen=True)
class View:
    """What there was of a volume at a moment: its image, state and undo, and the marks by which a change is noticed."""

    image: SparseFile
    table: SparseFile
    state: State
    undo: PatchFile | None  # it is laid over the image, which is what the state says then
    versions: dict[str, Snapshot]  # by the names of their files; the image's among them
    marks: tuple[object, ...]
    lookup: Lookup
    steps: dict[Snapshot, Steps] = field(default_factory=dict)  # to those that were looked for


class Shown:
    """What the snapshots of a volume are, while runs change its image and thin its versions. It holds no lock.

    A run touches an image only after its undo is whole. So what was read is right if afterwards image and state are the
    same, and there is no other whole undo. Otherwise it looks at what is there now, and reads again. A version's file
    leads from one snapshot to another for ever. So it is kept open, and can be read even after a run has dropped it.
    """

    ATTEMPTS = 100
    CACHED = 48  # chunks
    JUST_NOW = 50_000_000  # ns; a change within the clock's step of another one might not show

    def __init__(self, paths: ImagePaths, pool: OpenFiles) -> None:
        self.paths = paths
        self._pool = pool
        self._view: View | None = None
        self._leading: dict[tuple[Snapshot, Snapshot], PatchFile] = {}  # from one to an older one
        self._cache: dict[tuple[Snapshot, int], bytes | dict[int, bytes]] = {}  # chunks, or what is no zeros of them
        self._held: dict[Snapshot, Steps] = {}  # to those that are open
        self._files = contextlib.ExitStack()  # the view's

    def versions(self) -> dict[str, Snapshot]:
        """The snapshots that there are by the names of their files, the newest first; raises DosvobError, OSError."""
        view = self._view
        return (view if view is not None and self._is_current(view, all_of_it=True) else self._look()).versions

    def read(self, snapshot: Snapshot, index: int, first: int, count: int) -> bytes:
        """So many pages of a chunk, from the `first` on, as the snapshot has them.

        Raises Damaged if they are not what was recorded, Replaced if the snapshot is not there any more, OSError.
        """
        if (cached := self._cache.pop((snapshot, index), None)) is not None:
            self._cache[snapshot, index] = cached  # the last one that was used
            return self._part_of(cached, first, count)
        damage: Damaged | None = None
        for _ in range(self.ATTEMPTS):
            view = self._view or self._look()
            try:
                steps = self._steps(view, snapshot)
                patches = view.lookup.find(steps, index)
                if index in steps.checked:
                    chunk, part = None, self._some(view, index, patches, first, count)
                else:
                    chunk, is_stored = self._all(view, steps, index, patches)
                    part = self._part_of(chunk, first, count)
            except Damaged as problem:
                if damage is not None and self._is_current(view):
                    raise
                damage = problem  # unless it goes with another look: a version was replaced, the image changed
            else:
                if self._is_current(view):
                    if chunk is not None:
                        if is_stored:
                            steps.checked.add(index)
                        self._keep(snapshot, index, chunk)
                    return part
            self._look()
        raise Damaged(f"{self.paths.name} changes faster than it can be read")

    def _keep(self, snapshot: Snapshot, index: int, chunk: bytes | dict[int, bytes]) -> None:
        self._cache[snapshot, index] = chunk
        if len(self._cache) > self.CACHED:
            del self._cache[next(iter(self._cache))]

    def is_zeros(self, snapshot: Snapshot, index: int) -> bool:
        """Whether a chunk is recorded to be zeros."""
        view = self._view or self._look()
        steps = self._steps(view, snapshot)
        try:
            return self._recorded(view, steps, index, view.lookup.find(steps, index)) == ZERO_DIGEST
        except Damaged:
            return False  # to read it tells

    def _recorded(self, view: View, steps: Steps, index: int, patches: list[tuple[PatchFile, Entry]]) -> bytes:
        """The digest of a chunk; raises Damaged if a damaged part may have had an older patch of it."""
        # Whatever an undo had, which is the first of them: what it leads back to is in the state
        last = steps.files[patches[-1][0]] if patches else 0 if view.undo else -1
        for file in steps.doubtful:
            if steps.files[file] > last and file.may_have_lost(index):
                raise Damaged(f"{file.path} is damaged: {command_line('verify', self.paths.name)}")
        return patches[-1][1].digest if patches else view.table.read(BLOCK + index * DIGEST_SIZE, DIGEST_SIZE) or b""

    @staticmethod
    def _part_of(chunk: bytes | dict[int, bytes], first: int, count: int) -> bytes:
        if isinstance(chunk, bytes):
            return chunk[first * PAGE : (first + count) * PAGE]
        return b"".join([chunk.get(page, ZERO_PAGE) for page in range(first, first + count)])

    def _all(
        self, view: View, steps: Steps, index: int, patches: list[tuple[PatchFile, Entry]]
    ) -> tuple[bytes | dict[int, bytes], bool]:
        """All of a chunk, or what is no zeros of it; raises Damaged if it is not as recorded.

        And whether that was read of what is stored, and not known without.
        """
        digest = self._recorded(view, steps, index, patches)
        if digest == ZERO_DIGEST:
            return {}, False
        if not patches and view.image.is_full(index):
            chunk = view.image.chunk(index)  # in one piece, which is soonest
            if chunk is not None and digest_of(chunk) == digest:
                return chunk, True
        is_versions = bool(patches) and patches[-1][0] is not view.undo
        for tries_zeros in (False, True) if is_versions else (False,):
            pages, _, is_sound = content_of(view.image, index, patches, digest, tries_zeros=tries_zeros)
            if is_sound:
                return pages, not tries_zeros
        raise Damaged(
            f"bytes {index * CHUNK} to {(index + 1) * CHUNK - 1} are not what was backed up: to see what is "
            f"damaged: {command_line('verify', self.paths.name)}"
        )

    @staticmethod
    def _some(view: View, index: int, patches: list[tuple[PatchFile, Entry]], first: int, count: int) -> bytes:
        """Some pages of a chunk that is as recorded."""
        pages, rest = laid_over(patches, ((1 << count) - 1) << first)
        for start, length in runs(rest):
            offset = index * CHUNK + start * PAGE
            data = view.image.read(offset, length * PAGE)
            if data is None:
                raise Damaged(f"{view.image.path} cannot be read at byte {offset}")
            if length == count:
                return data
            pages |= {start + number: data[number * PAGE : (number + 1) * PAGE] for number in range(length)}
        return Shown._part_of(pages, first, count)

    def _steps(self, view: View, snapshot: Snapshot) -> Steps:
        """What leads from the image to a snapshot; raises Replaced, Damaged."""
        if snapshot in view.steps:
            return view.steps[snapshot]
        files = [*self._way(view.state.snapshot, snapshot), *([view.undo] if view.undo else [])]
        for file in files:
            file.load_index()
        view.steps[snapshot] = steps = view.lookup.steps(files[::-1])
        if snapshot in self._held:
            self._held[snapshot] = steps
        return steps

    def _way(self, newest: Snapshot, oldest: Snapshot) -> list[PatchFile]:
        """The shortest way between two snapshots, the last step first; raises Replaced."""
        leading = collections.defaultdict(list)
        for (newer, older), file in self._leading.items():
            leading[newer].append((older, file))
        before: dict[Snapshot, tuple[Snapshot, PatchFile] | None] = {newest: None}
        ways = collections.deque(before)
        while ways and oldest not in before:
            newer = ways.popleft()
            for older, file in leading[newer]:
                if older not in before:
                    before[older] = newer, file
                    ways.append(older)
        if oldest not in before:
            raise Replaced("the version is not there any more: a run has dropped it, or what leads to it is damaged")
        way, step = [], before[oldest]
        while step is not None:
            way.append(step[1])
            step = before[step[0]]
        return way

    def hold(self, snapshot: Snapshot) -> None:
        """Keep what leads to a snapshot open, for it to be read even if a run drops it; raises Replaced, Damaged."""
        self._held[snapshot] = self._steps(self._view or self._look(), snapshot)

    def let_go(self, snapshot: Snapshot) -> None:
        """It is not open any more."""
        self._held.pop(snapshot, None)

    def follow(self) -> None:
        """Hold what leads to snapshots that are open, though nobody reads them: the run after the next may drop it."""
        if self._held:
            with contextlib.suppress(DosvobError, OSError):  # who reads meets that
                self.versions()

    # What is there

    @staticmethod
    def _mark(path_or_fd: Path | int) -> tuple[int, ...] | None:
        """What changes with a file; None without one."""
        try:
            status = os.stat(path_or_fd)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _marks(self, image: SparseFile, undo: PatchFile | None, *, all_of_it: bool = True) -> tuple[object, ...]:
        """The marks of state, undo, image and, with `all_of_it`, versions.

        An image below an undo may change; an undo that is not whole, or is a version already, does not count.
        """
        has_undo = self._mark(self.paths.undo)
        if undo is None and has_undo is not None:
            with Undo.left(self.paths) as left:
                has_undo = None if left is None or left.is_committed else has_undo
        told = self._mark(self.paths.state), has_undo, self._mark(image.fd) if undo is None else None
        return (*told, self._mark(self.paths.versions)) if all_of_it else told

    def _is_current(self, view: View, *, all_of_it: bool = False) -> bool:
        """Whether what was read by a view is right; `all_of_it`: and whether there are the same versions."""
        marks = self._marks(view.image, view.undo, all_of_it=all_of_it)
        return marks == view.marks[: len(marks)]

    def _look(self) -> View:
        """See what is there now; raises Replaced, DosvobError, OSError."""
        for attempt in range(self.ATTEMPTS):
            if attempt > 1:
                time.sleep(0.01)
            with contextlib.ExitStack() as files, contextlib.suppress(FileNotFoundError):
                image = files.enter_context(contextlib.closing(SparseFile(self.paths.image)))
                undo = files.enter_context(Undo.left(self.paths))
                laid = undo.file if undo is not None and not undo.is_committed else None
                marks = self._marks(image, laid)
                table = files.enter_context(contextlib.closing(SparseFile(self.paths.state)))
                state = State.load(self.paths.state)
                versions = Versions(self.paths).all()
                changed = os.fstat(image.fd).st_ctime_ns
                is_new = laid is None and abs(time.time_ns() - changed) < self.JUST_NOW
                is_torn = self._mark(table.fd) != marks[0] or (self._mark(laid.fd) if laid else None) != marks[1]
                if state is None or is_new or is_torn:
                    continue
                self._open(versions)
                if self._marks(image, laid) != marks:
                    continue
                self._close()
                lookup = Lookup(state.snapshot.size // CHUNK)
                self._view = View(image, table, state, laid, self._named(state, versions), marks, lookup)
                self._files = files.pop_all()
                for snapshot in self._held:
                    with contextlib.suppress(DosvobError, OSError):  # who reads it meets that
                        self.hold(snapshot)
                return self._view
        raise Replaced(f"{self.paths.name}: its image or its state is not there, or changes all the time")

    @staticmethod
    def _named(state: State, versions: Sequence[Version]) -> dict[str, Snapshot]:
        """The snapshots by the names of their files: the image's is the one that it has later, as a version."""
        moment = Versions.next_moment(state.moment, versions)
        moments = [(moment, state.snapshot), *((version.moment, version.snapshot) for version in versions)]
        return {each.strftime(FileSystem.TIME): snapshot for each, snapshot in moments if snapshot is not None}

    def _open(self, versions: Sequence[Version]) -> None:
        """Open the files of versions that are not known yet, and let go of what neither leads to one nor is held."""
        found: dict[tuple[Snapshot, Snapshot], PatchFile] = {}
        for version in versions:
            if version.newer is not None and version.snapshot is not None:
                key = (version.newer, version.snapshot)
                file = self._leading.get(key)
                if file is None or file.path.parent != version.path.parent or file.is_parked:
                    file = PatchFile(version.path, "version", pool=self._pool)
                    if (file.head.get("newer"), file.head.get("snapshot")) != (*map(dataclasses.asdict, key),):
                        file.close()
                        raise FileNotFoundError(version.path)  # it was replaced since it was listed
                found[key] = file
        held = {id(file) for steps in self._held.values() for file in steps.files}
        for key, file in self._leading.items():
            if key not in found and id(file) in held:
                found[key] = file
            elif found.get(key) is not file:
                file.close()
        self._leading = found

    def _close(self) -> None:
        if self._view is not None:
            self._view = None
            self._files.close()

    def close(self) -> None:
        """Close all files."""
        self._close()
        for file in self._leading.values():
            file.close()


class ShownFile:
    """A snapshot as a file: its bytes, and what was written over them since the mount began."""

    SOUGHT = 20_000  # chunks in which data is looked for at once

    def __init__(self, shown: Shown, snapshot: Snapshot, scratch: Path | None) -> None:
        self.shown = shown
        self.snapshot = snapshot
        self.size = snapshot.size  # bytes
        self.opened = 0  # how often
        self._directory = scratch
        self._scratch: SparseFile | None = None
        self._written: dict[int, int] = {}  # the bitmaps of the pages that the scratch file has, by their chunks

    def open(self) -> None:
        """Open it, so that it stays readable; raises as `Shown.read` does."""
        self.shown.hold(self.snapshot)
        self.opened += 1

    def release(self) -> None:
        """End what `open` began."""
        self.opened -= 1
        if not self.opened:
            self.shown.let_go(self.snapshot)

    @staticmethod
    def _parts(offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The chunks of a range of bytes, each with the first page and how many pages."""
        page, last = offset // PAGE, -(-end // PAGE)
        while page < last:
            index, first = divmod(page, PAGES)
            count = min(PAGES - first, last - page)
            yield index, first, count
            page += count

    def read(self, offset: int, length: int) -> bytes:
        """A part of it, as far as it goes. Raises as `Shown.read` does."""
        end = min(offset + length, self.size)
        pieces = [self._part(*part) for part in self._parts(offset, end)]
        if pieces:
            pieces[-1] = pieces[-1][: len(pieces[-1]) - -end % PAGE]
            pieces[0] = pieces[0][offset % PAGE :]
        return b"".join(pieces)

    def _part(self, index: int, first: int, count: int) -> bytes:
        """So many pages of a chunk, from the `first` on."""
        own = self._written.get(index, 0) >> first & ((1 << count) - 1)
        if not own or self._scratch is None:
            return self.shown.read(self.snapshot, index, first, count)
        is_all = own == (1 << count) - 1
        data = bytearray(count * PAGE) if is_all else bytearray(self.shown.read(self.snapshot, index, first, count))
        for start, length in runs(own):
            written = self._scratch.read(index * CHUNK + (first + start) * PAGE, length * PAGE)
            data[start * PAGE : (start + length) * PAGE] = written or bytes(length * PAGE)
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write over a part of it; raises OSError."""
        end = offset + len(data)
        start, stop = offset // PAGE * PAGE, -(-end // PAGE) * PAGE
        if end > self.size:
            raise OSError(errno.EFBIG, "it does not grow")
        self._scratch_file().write(self.read(start, offset - start) + data + self.read(end, stop - end), start)
        self._mark(start, stop)

    def write_zeros(self, offset: int, length: int) -> None:
        """The same with zeros, which take no space."""
        end = min(offset + length, self.size)
        start, stop = -(-offset // PAGE) * PAGE, end // PAGE * PAGE
        if start < stop:
            self._scratch_file().write_zeros(start, stop - start)
            self._mark(start, stop)
        for first, last in ((offset, min(start, end)), (max(stop, offset), end)) if start <= stop else ((offset, end),):
            if first < last:
                self.write(first, bytes(last - first))

    def _mark(self, start: int, stop: int) -> None:
        for index, first, count in self._parts(start, stop):
            self._written[index] = self._written.get(index, 0) | ((1 << count) - 1) << first

    def _scratch_file(self) -> SparseFile:
        if self._scratch is None:
            with tempfile.TemporaryFile(dir=self._directory) as file:
                self._scratch = SparseFile(Path(f"/proc/self/fd/{file.fileno()}"), os.O_RDWR)
                self._scratch.path = Path(self._directory or tempfile.gettempdir())  # it has no name
                self._scratch.set_length(self.size)
        return self._scratch

    def seek(self, offset: int, *, data: bool) -> int:
        """Where the next data is, or the next hole: whole chunks, by their digests. Raises OSError."""
        chunks = range(offset // CHUNK, self.size // CHUNK)
        if offset >= self.size:
            raise OSError(errno.ENXIO, "behind the end")
        for index in chunks[: self.SOUGHT]:
            if data != (index not in self._written and self.shown.is_zeros(self.snapshot, index)):
                return max(offset, index * CHUNK)
        if data and len(chunks) <= self.SOUGHT:
            raise OSError(errno.ENXIO, "no data")
        return chunks[self.SOUGHT] * CHUNK if data else self.size  # what is said to be data may be zeros

    def close(self) -> None:
        """Close the scratch file, by which it is gone."""
        if self._scratch is not None:
            self._scratch.close()


class FileSystem:
    """What the mount shows: directories for regions and volumes, in these a file per snapshot, and `latest`.

    Nodes have numbers, which the kernel knows them by, as long as the mount is there.
    """

    TIME = "%Y-%m-%dT%H%M%SZ"  # as --at takes it
    LATEST = "latest"

    def __init__(self, home: Home, patterns: Sequence[str], scratch: Path | None, report: Reporter) -> None:
        self._home = home
        self._patterns = patterns
        self._scratch = scratch
        self._report = report
        self._pool = OpenFiles()
        self._shown: dict[str, Shown] = {}
        # Directories by their paths, links and files; 1 is the root
        self.nodes: list[str | tuple[str, str] | ShownFile] = ["", ""]
        self._numbers: dict[object, int] = {"": 1}
        self._told: set[str] = set()

    def _number(self, key: object, node: str | tuple[str, str] | ShownFile) -> int:
        if key not in self._numbers:
            self.nodes.append(node)
            self._numbers[key] = len(self.nodes) - 1
        return self._numbers[key]

    def names(self) -> set[str]:
        """The volumes, and what was set aside."""
        there = self._home.names()
        if not self._patterns:
            return there
        return {name for pattern in self._patterns for name in Home.matching(pattern, there)}

    def versions(self, name: str) -> dict[str, Snapshot]:
        """What there is of a volume, by the names of the files, the newest first; tells what is wrong."""
        shown = self._shown.setdefault(name, Shown(ImagePaths(self._home.path, name), self._pool))
        try:
            return shown.versions()
        except (DosvobError, OSError) as problem:
            self.tell(f"{name} is not shown: {explained(problem, self._home.path)}")
            return {}

    def tell(self, text: str) -> None:
        """Report an error, once."""
        if text not in self._told:
            self._told.add(text)
            self._report.error(text)

    def children(self, number: int) -> dict[str, int]:
        """What is in a directory; raises OSError if it is none."""
        path, names = self.nodes[number], self.names()
        if not isinstance(path, str):
            raise NotADirectoryError(errno.ENOTDIR, "no directory")
        if path not in names:
            below = f"{path}/" if path else ""
            found = sorted({name.removeprefix(below).partition("/")[0] for name in names if name.startswith(below)})
            return {name: self._number(below + name, below + name) for name in found}
        versions, children = self.versions(path), {}
        for name, snapshot in versions.items():
            file = ShownFile(self._shown[path], snapshot, self._scratch)
            children[name] = self._number((path, snapshot), file)
        if versions:
            link = (path, next(iter(versions)))
            children[self.LATEST] = self._number(link, link)
        return children

    def follow(self) -> None:
        """Keep what is open readable while runs go on; to be called between any two runs of a volume."""
        for shown in self._shown.values():
            shown.follow()

    def file(self, number: int) -> ShownFile:
        """A file; raises OSError if it is none."""
        node = self.nodes[number]
        if not isinstance(node, ShownFile):
            raise IsADirectoryError(errno.EISDIR, "no file")
        return node

    def close(self) -> None:
        """Close all files."""
        for node in self.nodes:
            if isinstance(node, ShownFile):
                node.close()
        for shown in self._shown.values():
            shown.close()


class Kernel:
    """The kernel's end of a mount: a descriptor of /dev/fuse, over which it asks, one question at a time."""

    IN = struct.Struct("=IIQQIIIHH")  # fuse_in_header: length, opcode, unique, node, uid, gid, pid, extension, padding
    OUT = struct.Struct("=IiQ")  # fuse_out_header: length, error, unique
    ATTR = struct.Struct("=6Q10I")
    MOST = CHUNK  # bytes of a read or a write
    FOLLOWED = 60  # seconds between looks at what runs have done; those of a volume are 10 minutes apart
    LONG, SHORT = 3600, 1  # seconds for which the kernel may rely on what a file is, and on what is there
    FLAGS = 1 << 0 | 1 << 5 | 1 << 22  # FUSE_ASYNC_READ, FUSE_BIG_WRITES, FUSE_MAX_PAGES
    UNANSWERED = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET

    def __init__(self, fd: int, files: FileSystem, *, read_only: bool) -> None:
        self._fd = fd
        self._files = files
        self._modes = (0o500, 0o400) if read_only else (0o700, 0o600)
        self._began = utc_now().timestamp()
        self._answers: dict[int, Callable[[int, memoryview], bytes]] = {
            1: self._lookup, 3: self._getattr, 4: self._getattr, 5: self._readlink, 14: self._open, 15: self._read,
            16: self._write, 17: self._statfs, 18: self._release, 20: self._nothing, 25: self._nothing, 26: self._init,
            27: self._opendir, 28: self._readdir, 29: self._nothing, 30: self._nothing, 38: self._nothing,
            43: self._fallocate, 46: self._lseek,
        }  # fmt: skip

    def serve(self, is_ended: Callable[[], object]) -> None:
        """Answer until it is unmounted; calls `is_ended` now and then."""
        buffer = memoryview(bytearray(self.MOST + (64 << 10)))
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        looked = followed = 0.0
        while True:
            if time.monotonic() - looked > Stop.NAP:
                is_ended()
                looked = time.monotonic()
            if time.monotonic() - followed > self.FOLLOWED:
                self._files.follow()
                followed = time.monotonic()
            try:
                length = os.readv(self._fd, [buffer])
            except BlockingIOError:
                poll.poll(Stop.NAP * 1000)
            except OSError as problem:
                if problem.errno == errno.ENODEV:
                    return
                if problem.errno not in (errno.ENOENT, errno.EINTR):  # the question was taken back
                    raise
            else:
                self._answer(buffer[:length])

    def _answer(self, question: memoryview) -> None:
        _, opcode, unique, node, *_ = self.IN.unpack(question[: self.IN.size])
        if opcode in self.UNANSWERED:
            return
        answer, number = b"", 0
        try:
            if opcode not in self._answers:
                raise OSError(errno.ENOSYS, "not needed")
            answer = self._answers[opcode](node, question[self.IN.size :])
        except DosvobError as problem:
            number = errno.EIO
            self._files.tell(f"{self._described(node)}: {problem}")
        except OSError as problem:
            number = problem.errno or errno.EIO
            if problem.filename or number in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                self._files.tell(f"{self._described(node)}: {explained(problem, Path(tempfile.gettempdir()))}")
        except Exception as problem:  # noqa: BLE001 - a bug: whoever reads meets an error, and the mount goes on
            number = errno.EIO
            self._files.tell(f"{self._described(node)}: unexpected {type(problem).__name__}: {problem}")
        head = self.OUT.pack(self.OUT.size + len(answer), -number, unique)
        with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
            os.writev(self._fd, [head, answer])

    def _described(self, number: int) -> str:
        node = self._files.nodes[number]
        return f"{node.shown.paths.name} of {node.snapshot.taken_at}" if isinstance(node, ShownFile) else str(node)

    def _attributes(self, number: int) -> bytes:
        node, (directory, file) = self._files.nodes[number], self._modes
        seconds, size, mode, links = self._began, 0, stat.S_IFDIR | directory, 2
        if isinstance(node, ShownFile):
            seconds, size, mode, links = node.snapshot.moment(utc_now()).timestamp(), node.size, stat.S_IFREG | file, 1
        elif isinstance(node, tuple):
            size, mode, links = len(node[1]), stat.S_IFLNK | 0o777, 1
        # one block less than the size: so programs look for holes, and do not take all of it for one
        blocks, times = max(size // 512 - 1, 0), [int(seconds)] * 3
        return self.ATTR.pack(
            number, size, blocks, *times, 0, 0, 0, mode, links, os.geteuid(), os.getegid(), 0, PAGE, 0
        )

    def _init(self, _node: int, body: memoryview) -> bytes:
        major, minor, ahead, _ = struct.unpack("=4I", body[:16])
        if (major, minor) < (7, 28):
            raise OSError(errno.EPROTO, "the kernel is too old")
        ahead = max(ahead, self.MOST)
        return struct.pack("=4IHHIIHHI28x", 7, 31, ahead, self.FLAGS, 16, 12, self.MOST, 1, self.MOST // PAGE, 0, 0)

    def _lookup(self, node: int, body: memoryview) -> bytes:
        found = self._files.children(node).get(os.fsdecode(bytes(body).rstrip(b"\0")))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "not there")
        return struct.pack("=4QII", found, 0, self.SHORT, self.LONG, 0, 0) + self._attributes(found)

    def _getattr(self, node: int, body: memoryview) -> bytes:
        """Also that of SETATTR, of which only another size is refused."""
        if len(body) >= 88 and struct.unpack("=I", body[:4])[0] & 1 << 3:
            (size,) = struct.unpack("=Q", body[16:24])
            if size != self._files.file(node).size:
                raise OSError(errno.EPERM, "it has the size that it has")
        return struct.pack("=QII", self.LONG, 0, 0) + self._attributes(node)

    def _readlink(self, node: int, _body: memoryview) -> bytes:
        link = self._files.nodes[node]
        return os.fsencode(link[1]) if isinstance(link, tuple) else b""

    def _open(self, node: int, _body: memoryview) -> bytes:
        self._files.file(node).open()
        keep_cache = 1 << 1  # FOPEN_KEEP_CACHE: what it has changes by writes to it alone
        return struct.pack("=QIi", 0, keep_cache, 0)

    def _release(self, node: int, _body: memoryview) -> bytes:
        self._files.file(node).release()
        return b""

    def _read(self, node: int, body: memoryview) -> bytes:
        _, offset, size = struct.unpack("=QQI", body[:20])
        return self._files.file(node).read(offset, size)

    def _write(self, node: int, body: memoryview) -> bytes:
        _, offset, size = struct.unpack("=QQI", body[:20])
        self._files.file(node).write(offset, bytes(body[40 : 40 + size]))
        return struct.pack("=II", size, 0)

    def _fallocate(self, node: int, body: memoryview) -> bytes:
        _, offset, length, mode = struct.unpack("=3QI", body[:28])
        if mode & ~1 not in (0x02, 0x10):  # with or without KEEP_SIZE: PUNCH_HOLE, ZERO_RANGE
            raise OSError(errno.EOPNOTSUPP, "only zeros")
        self._files.file(node).write_zeros(offset, length)
        return b""

    def _lseek(self, node: int, body: memoryview) -> bytes:
        _, offset, whence = struct.unpack("=QQI", body[:20])
        return struct.pack("=Q", self._files.file(node).seek(offset, data=whence == os.SEEK_DATA))

    def _opendir(self, _node: int, _body: memoryview) -> bytes:
        return bytes(16)

    def _readdir(self, node: int, body: memoryview) -> bytes:
        _, offset, size = struct.unpack("=QQI", body[:20])
        entries = [(".", node), ("..", node), *self._files.children(node).items()]
        found = b""
        for place, (name, number) in enumerate(entries[offset:], offset + 1):
            encoded = os.fsencode(name)
            entry = struct.pack("=QQII", number, place, len(encoded), 0) + encoded
            entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
            if len(found) + len(entry) > size:
                break
            found += entry
        return found

    def _statfs(self, _node: int, _body: memoryview) -> bytes:
        return struct.pack("=5Q4I24x", 0, 0, 0, 0, 0, PAGE, 255, PAGE, 0)

    def _nothing(self, _node: int, _body: memoryview) -> bytes:
        return b""


class MountPoint:
    """A directory on which files are shown: by mount(2) as root, else by the program fusermount3, which may do it too.

    Nothing of this process looks at the directory while it is mounted: it would wait for itself.
    """

    KIND = "fuse.dosvob"
    READ_ONLY, NO_SUID, NO_DEVICES, DETACH = 1, 2, 4, 2  # MS_RDONLY, MS_NOSUID, MS_NODEV, MNT_DETACH

    def __init__(self, directory: Path, *, read_only: bool) -> None:
        """Raises UsageError if nothing can be mounted there."""
        self._read_only = read_only
        self._is_root = os.geteuid() == 0
        self._program = next(filter(None, map(shutil.which, ("fusermount3", "fusermount"))), None)
        unmount = "umount" if self._is_root else f"{Path(self._program or 'fusermount3').name} -u"
        self.end = f"{unmount} {shlex.quote(str(directory))}"
        self.is_for_root = self._is_root  # whether root can look into it
        try:
            os.listdir(directory)  # what the kernel knows of a file, it goes on telling after the end of a mount
        except OSError as problem:
            if problem.errno == errno.ENOTCONN:
                raise UsageError(
                    f"{directory} is what is left of a mount that was killed: {self.end}, and run again"
                ) from None
            mend = f": mkdir {shlex.quote(str(directory))}" * (problem.errno == errno.ENOENT)
            raise UsageError(f"{directory} is no directory to show them in: {problem.strerror}{mend}") from None
        self.path = os.path.realpath(directory)
        if any(mount.place == self.path and mount.kind == self.KIND for mount in Mount.all()):
            raise UsageError(f"something is shown in {directory} already: {self.end}, or take another directory")
        if not os.access("/dev/fuse", os.R_OK | os.W_OK) or not (self._is_root or self._program):
            raise UsageError(
                "there is no FUSE here, by which files are shown (modprobe fuse, or apt install fuse3; in a container "
                "it takes --device /dev/fuse --cap-add SYS_ADMIN): restore to a file instead"
            )

    def mount(self) -> int:
        """Mount; returns the kernel's end. Raises DosvobError."""
        return self._mount() if self._is_root else self._have_mounted()

    def _mount(self) -> int:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        options = f"fd={fd},rootmode=40000,user_id=0,group_id={os.getegid()},default_permissions,max_read={Kernel.MOST}"
        flags = self.NO_SUID | self.NO_DEVICES | self.READ_ONLY * self._read_only
        if LIBC.mount(b"dosvob", os.fsencode(self.path), self.KIND.encode(), ctypes.c_ulong(flags), options.encode()):
            os.close(fd)
            problem = os.strerror(ctypes.get_errno())
            raise DosvobError(
                f"nothing can be mounted on {self.path}: {problem}: a container needs --cap-add SYS_ADMIN"
            )
        for mount in Mount.all():
            if mount.place == self.path and mount.kind == self.KIND:
                with contextlib.suppress(OSError):  # else the kernel asks for 128 KiB at a time
                    Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").write_text(str(Kernel.MOST >> 10))
        return fd

    def _have_mounted(self) -> int:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            common = (
                f"default_permissions,max_read={Kernel.MOST},fsname=dosvob,subtype=dosvob" + ",ro" * self._read_only
            )
            for more in (",allow_other", ""):  # others than root are kept out by the modes
                done = subprocess.run(  # noqa: S603 - what is in PATH
                    [str(self._program), "-o", common + more, "--", self.path],
                    env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                    pass_fds=[theirs.fileno()],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode == 0:
                    self.is_for_root = bool(more)
                    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
                    os.set_blocking(fds[0], False)
                    return fds[0]
        raise DosvobError(f"nothing can be mounted on {self.path}: {done.stderr.strip()}")

    def unmount(self, *, lazily: bool = False) -> None:
        """Unmount it, if nobody uses it, or `lazily`; for another thread than the one that answers."""
        if self._is_root:
            LIBC.umount2(os.fsencode(self.path), self.DETACH * lazily)
        else:
            command = [str(self._program), "-u", *["-z"] * lazily, "--", self.path]
            subprocess.run(command, capture_output=True, check=False)  # noqa: S603


class Served:
    """A mount that goes on until it is unmounted, or a stop is requested and nobody uses it any more."""

    RETRY = 1.0  # seconds

    def __init__(self, point: MountPoint, files: FileSystem, report: Reporter, stop: Stop) -> None:
        self._point = point
        self._files = files
        self._report = report
        self._stop = stop
        self._unmounting: threading.Thread | None = None
        self._tried = 0.0

    def run(self, fd: int, *, read_only: bool) -> None:
        """Serve it."""
        keep_freed_memory()
        try:
            Kernel(fd, self._files, read_only=read_only).serve(self._end_if_asked)
        except BaseException:
            self._unmounting = threading.Thread(target=functools.partial(self._point.unmount, lazily=True), daemon=True)
            self._unmounting.start()
            raise
        finally:
            os.close(fd)
            if self._unmounting is not None:
                self._unmounting.join()

    def _end_if_asked(self) -> None:
        now = time.monotonic()
        if not self._stop.requested or now - self._tried < self.RETRY:
            return
        if self._unmounting is not None:
            if self._unmounting.is_alive():
                return
            self._report.doing(f"{self._point.path} is in use")
            if self._tried:
                self._files.tell(
                    f"{self._point.path} is in use: it ends as soon as what is on it is unmounted and closed"
                )
        self._tried, self._unmounting = now, threading.Thread(target=self._point.unmount, daemon=True)
        self._unmounting.start()


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the user can ask for, and how a run goes that does it.


class Selection:
    """Which of the account's volumes are backed up: of those in the regions of conf.json, the ones that it names.

    `account` are all that there are.
    """

    def __init__(self, context: Context) -> None:
        """Reports regions without volumes; raises UsageError if no region has any."""
        self._context = context
        config = context.config
        items = context.api.list("/v2/volumes", "volumes")
        volumes = sorted((Volume.parse(item) for item in items if not Resource.is_ephemeral(item)), key=context.name)
        regions = set(config.regions or [volume.region for volume in volumes])
        here = [volume for volume in volumes if volume.region in regions]
        elsewhere = [volume for volume in volumes if volume.region not in regions]
        others = ", ".join(sorted(f"{volume.name} ({volume.region})" for volume in elsewhere))
        for region in sorted(regions - {volume.region for volume in here}):
            problem = f"there are no volumes in {region}"
            problem += f'; there are {others}: is "region" in conf.json right?' * bool(others)
            try:
                DropletPlan.make(context.api, config, region)
            except UsageError as better:  # there is no such region
                problem = str(better)
            if not here:
                raise UsageError(problem)
            context.report.error(problem)
        if not here:
            raise UsageError("there are no volumes in the account")
        if elsewhere:
            context.report.say(f"not backed up, because in another region than {', '.join(sorted(regions))}: {others}")
        self._here, self._elsewhere = here, elsewhere
        self.account = volumes

    def select(self, names: Sequence[str]) -> list[Volume]:
        """The volumes to back up; raises UsageError for a name that fits none, reports a volume whose name is unfit."""
        context, here, config = self._context, self._here, self._context.config
        where = ", ".join(sorted({volume.region for volume in here}))
        there_are = f"there are {', '.join(context.name(volume) for volume in here)}"
        for name in names:
            if not self._matching(here, [name]):
                others = ", ".join(sorted({volume.region for volume in self._matching(self._elsewhere, [name])}))
                near = difflib.get_close_matches(name, COMMANDS, n=1)
                raise UsageError(
                    f'no volume in {where} matches "{name}"; '
                    + f'it is in {others}, and "region" in conf.json is {where}; ' * bool(others)
                    + (f'did you mean the command "{near[0]}"? ' if near else "")
                    + there_are
                )
        for key, patterns in (("include", config.include), ("exclude", config.exclude)):
            for pattern in patterns:
                if not self._matching(here, [pattern]):
                    context.report.warn(f'"{key}" in conf.json: no volume in {where} matches "{pattern}"; {there_are}')
        chosen = self._matching(here, names or config.include or ("*",))
        meant = self._matching(here, [name for name in names if not set(name) & set("*?[")])  # even if excluded
        excluded = [volume for volume in self._matching(here, config.exclude) if volume not in meant]
        chosen = [volume for volume in chosen if volume not in excluded]
        if not chosen:
            raise UsageError(f'"include" and "exclude" in conf.json leave no volume to back up; {there_are}')
        for volume in chosen:
            if not self._is_fit(volume):  # it would become a path
                context.report.error(f"{volume.name!r} is not a name that a volume can have: it is not backed up")
        return [volume for volume in chosen if self._is_fit(volume)]

    @staticmethod
    def _matching(volumes: Iterable[Volume], patterns: Sequence[str]) -> list[Volume]:
        """The volumes that one of the shell patterns fits."""
        return [
            volume
            for volume in volumes
            if any(Home.matching(pattern, [f"{volume.region}/{volume.name}"]) for pattern in patterns)
        ]

    @staticmethod
    def _is_fit(volume: Volume) -> bool:
        return all(ImagePaths.VOLUME_NAME.fullmatch(name) for name in (volume.name, volume.region))


def sweep(
    context: Context, not_before: float = 0.0, *, everything: bool = False, dry_run: bool = False
) -> list[Resource]:
    """Remove this home's leftovers and those of no home, and report what stays; name those of other homes.

    `everything` removes those of other homes too, which may be in use. With `not_before` it ends only after a list
    that was asked for later than that (time.monotonic) shows nothing. Returns the leftovers that it found; a `dry_run`
    only names them.
    """
    report, ours = context.report, ("", context.home.id)
    found: list[Resource] = []
    kinds = list(KINDS)
    refused: ApiError | None = None
    for kind in KINDS:
        try:
            found += Resource.list(context.api, kind)
        except ApiError as problem:
            if problem.status is None:  # nobody answers
                raise
            kinds.remove(kind)  # the others cost money meanwhile
            refused = problem
    leftovers = [resource for resource in found if everything or resource.home in ours]
    for resource in found:
        if resource in leftovers:
            report.say(f"{'would remove' if dry_run else 'left over from an earlier run:'} {resource}")
            continue
        seconds = age(resource.created_at, context.api.now())
        how_old = "of unknown age" if seconds == float("inf") else f"{human_time(seconds)} old"
        tell = report.say if seconds < 24 * 3600 or not resource.hourly else report.warn  # no run takes so long
        tell(
            f"not touched, because it belongs to another backups directory (its id is {resource.home}): {resource}, "
            f"{how_old}. If nothing backs up to that any more: {command_line('sweep', '--all')}"
        )
    if (leftovers or not_before) and not dry_run:
        removal = Removal(context.api, lambda item: everything or item.home in ours, not_before, report.doing, kinds)
        tell_left_behind(removal.run(), report, of_all=everything)
    if refused:
        raise refused
    return leftovers


class Misplaced:
    """The images that lie where an earlier "region" in conf.json put them, and that may be these volumes'."""

    def __init__(self, context: Context, volumes: Sequence[Volume]) -> None:
        self._context = context
        self._volumes = volumes

    def images(self) -> Iterator[tuple[ImagePaths, str]]:
        """Each, and the name that it should have now, "" if nobody knows.

        A region's directory tells the region, or else the state. An image without a state counts only if it may be one
        of these volumes'.
        """
        config, home = self._context.config, self._context.home
        elsewhere = {volume.name if config.by_region else f"{volume.region}/{volume.name}" for volume in self._volumes}
        there = home.names()
        for name in sorted(there | elsewhere):
            old = ImagePaths(home.path, name)
            region, _, base = name.rpartition("/")
            has_anything = name in there or may_be_file(old.image) or may_be_file(old.partial)
            is_anothers = bool(region) and has_anything and exists(old.metadata / "home")
            if bool(region) == config.by_region or not has_anything or is_anothers:
                continue
            if region in config.regions:
                yield old, base
            elif config.by_region:
                with contextlib.suppress(DosvobError):
                    state = State.load(old.state, whole=False)
                    region = state.snapshot.region if state else ""
                if region or name in elsewhere:
                    yield old, f"{region}/{base}" if region else ""

    def move(self, damaged: Container[str]) -> set[str]:
        """Move them to where "region" wants them now; returns the names that must not be backed up.

        These could not be moved, perhaps because their recovery failed (`damaged`): a backup would fetch all of them.
        """
        context, volumes = self._context, self._volumes
        failed: set[str] = set()
        for old, name in self.images():
            names = [name] if name else [context.name(volume) for volume in volumes if volume.name == old.name]
            try:
                if old.name in damaged:  # which was reported
                    failed.update(names)
                    continue
                if not name:
                    raise DosvobError(self._how_to_move(old, [ImagePaths(context.home.path, name) for name in names]))
                context.home.move(old, ImagePaths(context.home.path, name))
                context.report.say(
                    f'{old.name}: its image is {context.home.path / name} now, for "region" in conf.json'
                )
            except (DosvobError, OSError) as problem:
                context.report.error(f"{old.name}: {explained(problem, old.directory)}")
                failed.update(names)
        return failed

    @staticmethod
    def _how_to_move(old: ImagePaths, places: Sequence[ImagePaths]) -> str:
        """What to do about an image that may belong in any of these places."""
        files = shlex.join(str(path) for path in (old.image, old.partial) if exists(path))
        metadata = shlex.join(str(path) for path in (old.state, old.versions) if exists(path))
        new = places[0]
        directory, new_metadata = (shlex.quote(f"{path}/") for path in (new.directory, new.metadata))
        commands = [f"mkdir -p {new_metadata}"]
        commands += [f"mv {files} {directory}"] if files else []
        commands += [f"mv {metadata} {new_metadata}"] if metadata else []
        regions = " or ".join(place.directory.name for place in places)
        return (
            f"nothing tells of which region {files or metadata} is, {regions} perhaps, so that is not backed up. If it "
            f"is of {new.directory.name}: {' && '.join(commands)}; otherwise move it elsewhere"
        )


def tell_thinning(context: Context, paths: ImagePaths, *, dry_run: bool = False, is_new: bool = True) -> None:
    """Warn if `keep` drops more than half of the older versions; in a dry run also say what the run would drop.

    `is_new`: the run makes a new image of it.
    """
    with contextlib.suppress(OSError, DosvobError):  # the thinning itself reports these
        versions = Versions(paths)
        count, unwanted = len(versions.all()), versions.unwanted(context.config.keep)
        if 2 * len(unwanted) > count:
            context.report.warn(
                f'{paths.name}: "keep" in conf.json asks for {count - len(unwanted)} of its {count} older versions; '
                f"{len(unwanted)} {'would be' if dry_run else 'are'} dropped, {oldest_of(unwanted)}"
            )
        upcoming = context.api.now() if is_new else None
        if dry_run and exists(paths.state) and (unwanted := versions.unwanted(context.config.keep, upcoming)):
            context.report.say(
                f"would not keep {counted(len(unwanted), 'version')} of {paths.name} any more, {oldest_of(unwanted)}"
            )


def refusal(paths: ImagePaths) -> str:
    """What the sync of an image will fail at, as far as that is seen here and now; "" if nothing is."""
    image = paths.image
    try:
        paths.check_link()
        State.load(paths.state)
        Versions(paths).all()
        paths.check_unread()
        os.close(os.open(image, os.O_WRONLY | os.O_CLOEXEC))
    except FileNotFoundError:  # there is no image yet
        return ""
    except (DosvobError, OSError) as problem:
        told = explained(problem, image)
        if isinstance(problem, PermissionError) and str(problem.filename) == str(image):
            with contextlib.suppress(OSError):  # a link into where we may not look
                status = image.stat()
                is_ours = status.st_uid == os.geteuid()
                mend = f"chmod u+w {shlex.quote(str(image))}" if is_ours else f"it belongs to the user {status.st_uid}"
                mend = told if is_ours and status.st_mode & stat.S_IWUSR else mend
                return f"{image} cannot be written to, its mode is {stat.filemode(status.st_mode)[1:]}: {mend}"
        return told
    return ""


def is_fit(context: Context, name: str, paths: ImagePaths) -> bool:
    """Whether nothing is seen that the sync of an image will fail at; reports what is, before anything is paid for."""
    if problem := refusal(paths):
        context.report.error(f"{name}: {problem}; it is not backed up")
    return not problem


class Run:
    """One backup of some volumes; the lock is held."""

    def __init__(self, context: Context, names: Sequence[str], *, reread: bool) -> None:
        """`names` are those on the command line."""
        self._context = context
        self._names = names
        self._reread = reread
        self._results: dict[str, Result] = {}  # by the name of the image
        self._dropped: Dropped = collections.defaultdict(set)

    def run(self) -> None:
        """Do all of it, from an earlier run's leftovers to the table and the cost."""
        context, home, report = self._context, self._context.home, self._context.report
        try:
            sweep(context)  # first: what is left costs money while a large backup is taken back
        finally:
            damaged = home.recover(report, context.stop)
        selection = Selection(context)
        volumes = selection.select(self._names)
        plans = self._plan_droplets(volumes)
        if not self._names:
            try:
                home.write("wanted.json", json.dumps([context.name(volume) for volume in volumes]))
            except OSError as problem:
                report.warn(
                    f"{explained(problem, home.path)}; `health` will not miss a volume that was never backed up"
                )
        damaged |= Misplaced(context, volumes).move(damaged)
        fit = [volume for volume in volumes if context.name(volume) not in damaged]
        self._results = {context.name(volume): Result(context.name(volume), volume.size, "not begun") for volume in fit}
        for name, result in self._results.items():
            paths = ImagePaths(home.path, name)
            tell_thinning(context, paths)
            if not is_fit(context, name, paths):
                result.outcome = "FAILED"
        fit = [volume for volume in fit if self._results[context.name(volume)].outcome == "not begun"]
        cost = 0.0
        try:
            self._thin_all(selection.account, damaged)
            self._tell_remains(selection.account)
            context.try_storage(fit)
            for _, volumes_there in itertools.groupby(fit, lambda volume: volume.region):
                cost += self._back_up_region(plans, list(volumes_there))
        except Interrupted:
            self._tell_interrupted()
            raise
        finally:
            self._tell_dropped()
        if self._results:
            rows = [
                ("VOLUME", "SIZE", "CHANGED", "FETCHED", "TIME", "FOUND", ""),
                *(result.row() for result in self._results.values()),
            ]
            report.say(table(rows, (0, 5, 6)), is_result=True)
            report.say(f"this run cost about ${cost:.4f}, DigitalOcean's minimum charges included", is_result=True)
        if not report.left:
            report.say("nothing of this home's is left in the account")

    def _tell_dropped(self) -> None:
        """Say which versions are gone, in a line for each volume."""
        for name, moments in sorted(self._dropped.items()):
            if moments:
                are = "are" if len(moments) > 1 else "is"
                told = f"{counted(len(moments), 'version')} {are} not kept any more, {oldest_of(moments)}"
                self._context.report.say(f"{name}: {told}")

    def _tell_remains(self, volumes: Iterable[Volume]) -> None:
        """Say what syncs left of volumes that the account has no more."""
        context, there = self._context, [f"{volume.region}/{volume.name}" for volume in volumes]
        for path, name in context.home.remains().items():
            if path.suffix != ".damaged" and not Home.matching(name, there):  # somebody restored that
                size = human_size(context.home.occupied(path))
                context.report.say(
                    f"{path} takes {size}, and the account has no volume {name}: delete it if you do not need it"
                )

    def _thin_all(self, volumes: Iterable[Volume], damaged: Container[str]) -> None:
        """Thin the versions of all volumes: the disk may be full, "keep" ask for fewer, and the first need the space.

        It leaves alone what belongs to another volume that had the name: the volume's turn sets that aside.
        """
        context, results = self._context, self._results
        for volume in volumes:
            name = context.name(volume)
            with contextlib.suppress(OSError, DosvobError):  # which its turn meets, and tells
                paths = ImagePaths(context.home.path, name)
                state = State.load(paths.state, whole=False)
                is_fit = state is not None and state.snapshot.volume_id == volume.id and name not in damaged
                if not is_fit or not exists(paths.image):
                    continue
                if name not in results:
                    tell_thinning(context, paths)
                if not thin(context, paths, self._dropped) and name in results:
                    results[name].is_thinned = False

    def _plan_droplets(self, volumes: Iterable[Volume]) -> dict[str, DropletPlan]:
        """What droplets to create, by region; with several regions, one that cannot have one fails alone."""
        context, plans = self._context, {}
        for region in dict.fromkeys(volume.region for volume in volumes):
            try:
                plans[region] = DropletPlan.make(context.api, context.config, region)
            except DosvobError as problem:
                if not context.config.by_region:
                    raise
                context.report.error(f"{region}: {problem}")
        return plans

    def _back_up_region(self, plans: Mapping[str, DropletPlan], volumes: Sequence[Volume]) -> float:
        """Back up the volumes of one region; returns what it cost. Reports a failure: other regions go on."""
        context, results, region = self._context, self._results, volumes[0].region
        try:
            if context.config.by_region:
                context.home.make_directory(region)
            if region in plans:
                return Backup(context, plans[region], volumes, results, self._dropped, reread=self._reread).run()
        except (DosvobError, OSError) as problem:
            context.report.error(f"{region}: {explained(problem, context.home.path)}")
        for result in (results[context.name(volume)] for volume in volumes):
            if result.outcome != "ok":
                result.outcome = "FAILED"
        return 0.0

    def _tell_interrupted(self) -> None:
        """Say what is complete, what goes on next time, and how to see it."""
        words = {
            "ok": "complete",
            "begun": "begun, and goes on next time",
            "FAILED": "FAILED",
            "not begun": "not begun",
        }
        told = []
        for outcome, word in words.items():
            names = [result.name for result in self._results.values() if result.outcome == outcome]
            told += [f"{word}: {', '.join(names)}"] if names else []
        told.append(f"to see what there is: {command_line('list')}")
        self._context.report.say(f"interrupted; {'; '.join(told)}", is_result=True)


class Listing:
    """What `list` shows of a home: for each volume an entry, as JSON has it and as text."""

    def __init__(self, home: Home, tick: Callable[[int], None]) -> None:
        self._home = home
        self._tick = tick

    def of(self, paths: ImagePaths) -> Json:
        """A volume's entry in `list --json`; README describes its form."""
        found: Json = {
            "name": paths.name,
            "region": None,
            "size": None,
            "occupied": 0,
            "problem": None,
            "versions": [],
        }

        def add(of: Version | State, frees: int | None = None, **more: Any) -> None:
            version = of if isinstance(of, Version) else None
            changed, occupied = (version.changed, version.occupied) if version else (None, found["occupied"])
            seen = of.found
            found["versions"].append(
                {"time": of.moment.isoformat(), "image": version is None, "changed": changed, "occupied": occupied,
                 "frees": frees, "damaged": False, "found": str(seen) if seen else None,
                 "comes_up": seen.came_up if seen else None, "words": seen.words if seen else None,
                 "kernel": seen.kernel if seen else None, **more}
            )  # fmt: skip

        try:
            paths.check_link()
            found["problem"] = self._home.unfinished(paths) or None
            status = paths.image.stat()
            found |= {"size": status.st_size, "occupied": status.st_blocks * 512}
            if (state := State.load(paths.state, whole=False)) is None:
                raise FileNotFoundError
            found |= {"region": state.snapshot.region, "size": state.snapshot.size}
            add(state)
        except FileNotFoundError:
            missing = "the image is missing" if found["size"] is None else "no snapshot is recorded"
            found["problem"] = found["problem"] or missing
        except (OSError, DosvobError) as problem:
            found["problem"] = found["problem"] or explained(problem, paths.image)
        versions: list[Version] = []
        try:
            versions = Versions(paths).all()
        except (OSError, DosvobError) as problem:
            found["problem"] = found["problem"] or explained(problem, paths.versions)
        for version, older in itertools.zip_longest(versions, versions[1:]):
            try:
                add(version, Versions.freed_by(version, older, self._tick), damaged=not version.is_whole)
            except FileNotFoundError:  # a run that goes on has thinned them meanwhile
                return self.of(paths)
            except (OSError, Damaged) as problem:
                is_damaged = isinstance(problem, Damaged) or is_unreadable(problem)
                add(version, version.occupied, damaged=is_damaged or not version.is_whole)
        return found

    @staticmethod
    def text(volume: Json) -> str:
        """The entry as text, for people."""
        size = human_size(volume["size"]) if volume["size"] else "of unknown size"
        older = sum(version["occupied"] for version in volume["versions"] if not version["image"])
        here = human_size(volume["occupied"]) + " here" + f" and {human_size(older)} for older versions" * bool(older)
        lines = [f"{volume['name']}: {volume['region'] or 'region unknown'}, {size}, takes {here}"]
        if volume["problem"]:
            lines.append(f"  {volume['problem']}")
        rows = [("  TIME", "AGE", "CHANGED SINCE", "REMOVING FREES", "FOUND", "")]
        last_good = next((version["time"] for version in volume["versions"] if version["comes_up"]), "")
        for version in volume["versions"]:
            moment = datetime.datetime.fromisoformat(version["time"])
            figures = ("-", "-") if version["image"] else (human_size(version["changed"]), human_size(version["frees"]))
            note = "damaged" if version["damaged"] else "the image" * version["image"]
            if version["time"] == last_good and not version["image"]:
                note = ", ".join(filter(None, (note, "kept as the last that came up")))
            how_old = human_time((utc_now() - moment).total_seconds())
            rows.append((f"  {local_time(moment)}", how_old, *figures, version["found"] or "-", note))
        return "\n".join([*lines, table(rows, (0, 4, 5))] if volume["versions"] else lines)


class Commands:
    """What the user can ask for, each a method. It has failed if it raises, or reports an error.

    Those that need no account: `verify`, `health`, `list`, `mount`, and `restore` to a file.
    """

    def __init__(self, arguments: argparse.Namespace, report: Reporter, stop: Stop) -> None:
        self._arguments = arguments
        self._report = report
        self._stop = stop
        names = arguments.names[:1] if arguments.command == "restore" else arguments.names
        of = f" of {', '.join(names)}" if names else ""
        self._home = Home(arguments.backups, f"a {arguments.command or 'backup'}{of}")

    def _context(self) -> Context:
        """The context for a command that needs the account; raises UsageError."""
        report, stop = self._report, self._stop
        for package in PACKAGES:
            package.check()
        config = Config.load(self._arguments.config, os.environ, report.warn)
        report.secret = config.token
        if self._arguments.dry_run and self._home.path.is_dir():
            with Home(self._home.path).unchanged():  # what a run at work has created would be taken for leftovers
                pass
        patience = Api.DRY_RUN_PATIENCE if self._arguments.dry_run else Api.PATIENCE
        return Context(config, Api(config, stop, report, patience), self._home, report, stop)

    def back_up(self) -> None:
        """Back up volumes, and ping how it goes."""
        context, report = self._context(), self._report
        if self._arguments.dry_run:
            self._dry_run(context)
            return
        url = context.config.healthchecks
        try:
            with context.home.locked():
                ping(url, "/start", report)
                Run(context, self._arguments.names, reread=self._arguments.reread).run()
        except Busy:
            raise  # nothing is wrong; if the other run takes too long, its ping is missed
        except (Exception, Interrupted) as problem:
            ping(url, "/fail", report, str(problem))
            raise
        ping(url, "/fail" if report.has_failed else "", report)

    def _dry_run(self, context: Context) -> None:
        """Say what a backup would do; changes nothing."""
        sweep(context, dry_run=True)
        selection = Selection(context)
        volumes = selection.select(self._arguments.names)
        moved = {name: old for old, name in Misplaced(context, volumes).images()} if context.home.path.is_dir() else {}
        fit = []
        for volume in volumes:
            name = context.name(volume)
            paths, old = ImagePaths(context.home.path, name), moved.get(name)
            if not is_fit(context, name, old or paths):
                continue
            fit.append(volume)
            image = paths.image
            has_image = may_be_file(image) or (old is not None and may_be_file(old.image))
            how = "changes only" if has_image else "all of it, for the first time"
            first = f" (where {old.image} goes first)" if old else ""
            self._report.say(f"would back up {name}, {human_size(volume.size)}, to {image}{first}: {how}")
            tell_thinning(context, old or paths, dry_run=True)
        for volume in selection.account:
            if volume not in volumes:
                tell_thinning(context, ImagePaths(context.home.path, context.name(volume)), dry_run=True, is_new=False)
        for region in dict.fromkeys(volume.region for volume in fit):
            plan = DropletPlan.make(context.api, context.config, region)
            size, price = plan.sizes[0]
            gib = [volume.size / GIB for volume in fit if volume.region == region]
            least = KINDS[DROPLET].least + len(gib) * KINDS[SNAPSHOT].least + sum(gib) * KINDS[VOLUME].gib_hour
            self._report.say(
                f"would do so over a droplet {size} with {plan.image} in {region}, at ${price:.5f} an hour: about "
                f"${least:.2f} for a run, if it takes less than an hour"
            )
        context.try_storage(fit, moved, dry_run=True)

    def sweep(self) -> None:
        """Remove leftovers, and nothing else."""
        arguments, report = self._arguments, self._report
        if arguments.names:
            raise UsageError("sweep takes no names: it removes all that dosvob left behind")
        context = self._context()
        if arguments.dry_run:
            if not sweep(context, everything=arguments.all, dry_run=True):
                report.say("there is nothing to remove")
            return
        with context.home.locked():
            sweep(
                context, time.monotonic() + LIST_LAG, everything=arguments.all
            )  # what was created a moment ago shows late
            context.home.recover(report, self._stop)
        if not report.left:
            report.say("nothing of dosvob's is left in the account" + " for this home" * (not arguments.all))

    def verify(self) -> None:
        """Compare images and versions with their recorded digests, without network or account."""
        home, report = self._home, self._report
        self._home.check()
        is_copy = home.is_read_only()
        # an id would make a home of a region's directory
        with home.unchanged() if is_copy else home.locked(with_id=False):
            if not is_copy:
                home.recover(report, self._stop)
            names = home.select(self._arguments.names, with_aside=False)
            if not names:
                raise DosvobError(f"there is no backup in {home.path} yet, so nothing was verified")
            for name in names:
                try:
                    self._verify_one(ImagePaths(home.path, name))
                except (OSError, DosvobError) as problem:
                    report.error(f"{name}: {explained(problem, home.path)}")

    def _verify_one(self, paths: ImagePaths) -> None:
        """Verify one image and its versions and say what was found."""
        report = self._report
        with contextlib.closing(Chain(paths, from_disk=True)) as chain:
            problems = [*([str(chain.problem)] if chain.problem else []), *filter(None, [chain.no_versions])]
            meter = Meter(report, self._stop, f"{paths.name}: verified", chain.size)
            if chain.state is None and not chain.problem:
                report.say(f"{paths.name}: no digests are recorded yet, the next backup records them")
            is_recorded = chain.state is not None or bool(chain.versions)
            image, *versions = chain.verify(meter) if is_recorded else [Ranges()]
        report.end_progress()
        if is_recorded and chain.length != chain.size:
            problems.append(
                f"the image's size is {chain.length} bytes, and {chain.size} were backed up: the next backup mends it"
            )
        if image.ranges:
            problems.append(f"differs from its snapshot in {image}: the next backup mends it")
        for depth, (version, ranges) in enumerate(zip(chain.versions, versions, strict=True), 1):
            is_whole = version.is_whole and depth not in chain.flawed
            if ranges.ranges or not is_whole:
                lost = f"cannot be restored in {ranges}" if ranges.ranges else "can be restored whole"
                damaged = f"; {version.path} is damaged" * (not is_whole)
                problems.append(f"the version of {local_time(version.moment)} {lost}{damaged}")
        for problem in problems:
            report.error(f"{paths.name}: {problem}")
        if is_recorded and not problems:
            and_versions = f", and {counted(len(versions), 'older version')}" * bool(versions)
            sound = "sound" if chain.state else "nothing is seen to be damaged, but the image has no digests"
            report.say(f"{paths.name}: {sound}, {human_size(chain.size)}{and_versions}")

    def health(self) -> None:
        """Say how old each backup is, without network, account or lock; fails if one is too old, or there is none."""
        home, report = self._home, self._report
        self._home.check()
        wanted = home.wanted()
        there = wanted | {
            name for name in home.names(with_aside=False) if may_be_file(ImagePaths(home.path, name).state)
        }
        asked = [found for name in self._arguments.names for found in Home.matching(name, there) or [name]]
        names = list(dict.fromkeys(asked)) or sorted(there)
        if not names:
            raise DosvobError(f"there is no backup in {home.path} yet")
        for name in names:
            try:
                report.say(f"{name}: {self._health_of(name, is_wanted=name in wanted)}")
            except (OSError, DosvobError) as problem:
                report.error(f"{name}: {explained(problem, home.path)}")

    def _health_of(self, name: str, *, is_wanted: bool) -> str:
        """What to say of a backup; raises DosvobError if it is missing, not complete, or older than may be."""
        paths, max_age = ImagePaths(self._home.path, name), self._arguments.max_age  # hours
        paths.check_link()
        if problem := self._home.unfinished(paths):
            raise DosvobError(problem)
        state = State.load(paths.state, whole=False)
        if state is None:
            raise DosvobError("there is no complete backup of it yet")
        if not exists(paths.image):
            raise DosvobError(f"{paths.image} is missing: the next backup fetches all of it")
        if state.identity is None:
            raise DosvobError(f"{paths.image} may not be what was backed up: the next backup compares and mends it")
        seconds = (utc_now() - state.moment).total_seconds()
        told = f"its last complete backup is {human_time(seconds)} old"
        if seconds > max_age * 3600:
            unwanted = f"; if it is not to be backed up any more, move it and {paths.state} elsewhere"
            raise DosvobError(f"{told}, more than {max_age:g} h{unwanted * (not is_wanted)}")
        versions = Versions(paths).all()
        for version in versions:
            if not version.is_whole:
                verify = command_line("verify", name)
                raise DosvobError(
                    f"{told}, but the version {version.path} is damaged, which all older ones need: {verify}"
                )
        snapshots: list[State | Version] = [state, *versions]
        good = next((each.moment for each in snapshots if each.found and each.found.came_up), None)
        if good:
            told += f", the last one that came up {human_time((utc_now() - good).total_seconds())}"
        if state.found and state.found.came_up is False:
            raise DosvobError(f"{told}; it does not come up: {state.found.words}")
        return told + (f"; versions back to {local_time(versions[-1].moment)}" if versions else "")

    def list(self) -> None:
        """Say what is there to be restored, without network, account or lock."""
        home, report = self._home, self._report
        self._home.check()
        patterns = self._arguments.names
        remains: list[Json] = [
            {"path": str(path), "name": name, "occupied": home.occupied(path)}
            for path, name in home.remains().items()
            if "set-aside" not in path.name and any(home.matching(each, [name]) for each in patterns or ["*"])
        ]
        names = home.select(patterns, remains=[left["name"] for left in remains])
        listing = Listing(home, lambda _: self._stop.check())
        found = [listing.of(ImagePaths(home.path, name)) for name in names]
        if self._arguments.json:
            report.answer(json.dumps({"volumes": found, "remains": remains}, indent=2), self._stop)
            return
        if not found:
            report.say(f"there is no backup in {home.path} yet")
        rest = [f"{left['path']}: {human_size(left['occupied'])}, of {left['name']}" for left in remains]
        told = [listing.text(volume) for volume in found]
        told += ["\n  ".join(["left by what is not complete, or put out of the way:", *rest])] if rest else []
        if told:
            report.answer("\n\n".join(told), self._stop)

    def mount(self) -> None:
        """Show images and versions as files, until it is unmounted; without lock, network or account."""
        arguments, home, report = self._arguments, self._home, self._report
        home.check()
        if not arguments.names:
            raise UsageError(f"mount takes a directory to show them in: {command_line('mount', 'DIR')}")
        directory, patterns = Path(arguments.names[0]), arguments.names[1:]
        home.select(patterns)
        point = MountPoint(directory, read_only=arguments.read_only)
        if Path(point.path).is_relative_to(os.path.realpath(home.path)):
            raise UsageError(f"{directory} is among the backups: take a directory elsewhere")
        for needed in (home.path, arguments.scratch or tempfile.gettempdir()):
            if Path(os.path.realpath(needed)).is_relative_to(point.path):  # it would wait for itself
                raise UsageError(f"{needed} is in {directory}, and would be hidden by it: take a directory elsewhere")
        try:
            tempfile.TemporaryFile(dir=arguments.scratch).close()
        except OSError as problem:
            raise UsageError(
                f"{arguments.scratch or tempfile.gettempdir()} cannot have what is written to the files: "
                f"{problem.strerror}: name a directory with --scratch"
            ) from None
        with contextlib.closing(FileSystem(home, patterns, arguments.scratch, report)) as files:
            there = {name: files.versions(name) for name in sorted(files.names())}
            for name in there:
                self._tell_doubts(ImagePaths(home.path, name))
            fd = point.mount()
            report.say(
                f"{directory} shows {counted(len(there), 'volume')}, "
                f"{counted(sum(map(len, there.values())), 'snapshot')} in all, until {point.end} or ^C"
            )
            if not point.is_for_root:
                report.say(
                    "only you can look into it, not root, by which loop devices are made: for these start it with "
                    "sudo, or put user_allow_other into /etc/fuse.conf"
                )
            Served(point, files, report, self._stop).run(fd, read_only=arguments.read_only)

    def _tell_doubts(self, paths: ImagePaths) -> None:
        """Warn of the snapshots that did not come up."""
        with contextlib.suppress(OSError, DosvobError), contextlib.closing(Chain(paths)) as chain:
            for depth, moment in enumerate(chain.moments):
                if moment is not None and (doubt := chain.doubt(depth)):
                    self._report.warn(f"{paths.name} of {local_time(moment)}: {doubt}")

    def restore(self) -> None:
        """Bring back an image or an older version."""
        if self._arguments.to_volume is None:
            self._restore_to_file()
        else:
            self._restore_to_volume()

    def _restore_to_volume(self) -> None:
        """Make a new volume of an image, an older version or any file."""
        arguments, report = self._arguments, self._report
        file, dry_run = vars(arguments)["from"], arguments.dry_run
        if len(arguments.names) != (0 if file else 1) or (file and arguments.at):
            raise UsageError(
                "restore --to-volume takes a volume's name, or --from FILE without --at: "
                + command_line("restore", "data", "--to-volume", "data-restored")
            )
        context = self._context()
        if not file:
            context.home.check()  # before a lock makes one
        with contextlib.nullcontext() if dry_run else context.home.locked():
            sweep(context, dry_run=dry_run)
            if file:
                opened = Source.of_file(file)
            else:
                paths = ImagePaths(context.home.path, context.home.one_named(arguments.names[0]))
                opened = Source.of_image(paths, self._wanted_time())
            with opened as source:
                wish = self._wish(context, source)
                plan = DropletPlan.make(context.api, context.config, wish.region)
                base, why = wish.base(source, wish.check(context.api), from_scratch=arguments.from_scratch)
                would = "would make" if dry_run else "making"
                report.say(f"{would} {wish.name} in {wish.region}, {wish.size // GIB} GiB, of {source.name}; {why}")
                if source.doubt:
                    report.warn(f"{source.name}: {source.doubt}")
                if dry_run:
                    self._tell_costs(plan, wish, snapshots=1 if base is None else 2)
                    return
                new = Restoration(context, plan, source, wish, base).run()
        unchecked = (
            "" if source.is_checked else "; whether that is what was backed up is not recorded, and was not checked"
        )
        made = f"{new.name} (id {new.id}, ${wish.price:.2f} a month) in {new.region}"
        report.say(
            f"{source.name} is now also the volume {made}: all of it was read back there and compared{unchecked}. "
            "To use it on a droplet of yours:\n"
            f"  doctl compute volume-action attach {new.id} DROPLET-ID\n"
            f"  mount {Link.device(new.name)} /mnt    # on the droplet; of XFS beside the original: mount -o nouuid"
        )

    def _wish(self, context: Context, source: Source) -> NewVolume:
        """The volume to make of a source; raises UsageError."""
        arguments, least = self._arguments, -(-source.size // GIB)
        size = least if arguments.size is None else arguments.size
        if not least:
            raise UsageError(f"{source.name} is empty: there is nothing to make a volume of")
        if size < least:
            raise UsageError(f"{source.name} needs {least} GiB, and --size says {size}")
        regions = context.config.regions
        region = arguments.region or source.region or (regions[0] if len(regions) == 1 else "")
        if not region:
            raise UsageError("say in which region the volume is to be, with --region")
        return NewVolume(arguments.to_volume, region, size * GIB)

    def _tell_costs(self, plan: DropletPlan, wish: NewVolume, snapshots: int) -> None:
        """Say what a restore to a new volume would cost."""
        (slug, price), hourly = plan.sizes[0], wish.price / HOURS_PER_MONTH
        least = KINDS[DROPLET].least + snapshots * KINDS[SNAPSHOT].least + hourly
        self._report.say(
            f"would do so over a droplet {slug} with {plan.image} in {wish.region} and a throwaway volume, at "
            f"${price + hourly:.5f} an hour, ${least:.2f} at least; {wish.name} itself is ${wish.price:.2f} a month"
        )

    def _restore_to_file(self) -> None:
        """Write an image or an older version to a new file, without network, account or configuration."""
        arguments, report, home = self._arguments, self._report, self._home
        if len(arguments.names) != 2:
            raise UsageError(
                f"restore takes a volume's name and a new file: {command_line('restore', 'data', 'data.img')}"
            )
        name, target = arguments.names[0], Path(arguments.names[1])
        with home.unchanged():
            name = home.one_named(name)
            if target.is_dir():
                file = command_line("restore", name, str(target / f"{name.rpartition('/')[2]}.img"))
                raise UsageError(f"{target} is a directory: name a file in it: {file}")
            try:
                with contextlib.closing(Chain(ImagePaths(home.path, name))) as chain:
                    depth = chain.depth_at(self._wanted_time())
                    taken = chain.moments[depth]
                    told = f"{name} of {local_time(taken)}" if taken else f"{name}, of which no digests are recorded,"
                    meter = Meter(report, self._stop, f"{name}: restored", chain.size)
                    is_recorded = chain.state is not None
                    if chain.problem:
                        report.warn(f"{name}: {chain.problem}")
                    if doubt := chain.doubt(depth):
                        report.warn(f"{told}: {doubt}")
                    final, damaged = chain.restore(depth, target, meter)
            except OSError as problem:
                raise DosvobError(f"{name} could not be restored: {explained(problem, target)}") from problem
        report.end_progress()
        size = final.stat()
        figures = f"{human_size(size.st_size)}, which take {human_size(size.st_blocks * 512)} of the disk"
        if damaged.ranges:
            report.error(f"{told} is damaged in {damaged}; the rest of it is in {final}, {figures}")
            return
        checked = "every chunk as it was recorded" if is_recorded else "not checked, for want of the image's digests"
        report.say(f"{told} is restored to {final}: {figures}, {checked}")

    def _wanted_time(self) -> datetime.datetime | None:
        """That of --at, None for the latest; raises UsageError."""
        text = self._arguments.at
        if text is None or text.strip().lower() == "latest":
            return None
        return time_meant(text, datetime.datetime.now().astimezone())


def time_meant(text: str, now: datetime.datetime) -> datetime.datetime:
    """The time that a text means: as `list` prints it, ISO 8601, `8:00`, `yesterday 8:00`, `3 days ago`, `now`.

    A week, a day, an hour, a minute or a second means its end. Raises UsageError.
    """
    words = " ".join(text.lower().split())
    with contextlib.suppress(ValueError, OverflowError):
        if words == "now":
            return now
        if match := re.fullmatch(r"(\d{1,5}) (minute|hour|day|week)s? ago", words):
            return now - datetime.timedelta(**{f"{match[2]}s": int(match[1])})
        for word, days in (("today", 0), ("yesterday", 1)):
            words = re.sub(rf"^{word}\b", str(now.date() - datetime.timedelta(days=days)), words)
        if match := re.fullmatch(
            r"(\d{4}-?\d\d-?\d\d|\d{4}-?w\d\d(?:-?\d)?)?"  # a date, or a week
            r"(?:(?:^|[ t])(\d\d?)(:?\d\d)?(:?\d\d)?([.,]\d+)?)?"  # an hour, minute, second and fraction
            r" ?(z|[+-]\d\d:?\d\d)?",
            words,
        ):
            date, hour, minute, second, fraction, offset = match.groups()
            if date or minute:
                unit = (
                    "days" if date and not hour else "hours" if not minute else "minutes" if not second else "seconds"
                )
                if unit == "days" and "w" in date and len(date.replace("-", "")) == len("2026w48"):
                    unit = "weeks"
                clock = f"{hour.zfill(2)}{minute or ''}{second or ''}{fraction or ''}" if hour else "00"
                begun = datetime.datetime.fromisoformat(f"{date or now.date()}T{clock}{offset or ''}".upper())
                length = datetime.timedelta(**{unit: 1}, microseconds=-1)
                return (begun if fraction else begun + length).astimezone()
    raise UsageError(
        f'"{text}" is not a time: "2026-11-24", "2026-11-24 08:00", with an offset if it is not of here, "8:00", '
        '"yesterday 8:00", "3 days ago" or "latest"'
    )


# ── main ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The command line, signals and exit codes.

EPILOG = """\
examples:
  python dosvob.py                  back up all volumes that conf.json names to ./backups
  python dosvob.py data 'db-*'      back up these volumes only
  python dosvob.py list             say what there is to restore, with times, offline
  python dosvob.py mount DIR        show every version as a file that can be mounted, at once, offline
  python dosvob.py restore data data.img --at '2026-11-24 08:00'
                                    write that version, or the latest, to a new file, offline
  python dosvob.py restore data --to-volume data-2 --at yesterday
                                    make a new volume of it, in the account
  python dosvob.py verify           compare images and versions with their recorded digests, offline
  python dosvob.py health           say how old each backup is, and fail if one is too old, offline
  python dosvob.py sweep            remove droplets, clones, snapshots and keys that a killed run left behind

exit codes:
  0  everything is backed up, and nothing is left behind in the account
  1  something failed, or was left behind: the messages say what
  2  wrong use or configuration; nothing was created
  128+n  ended by signal n, after removing everything
"""
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
PLACES = {"config", "backups"}
ACCOUNT = {*PLACES, "dry_run"}
TO_VOLUME = {"dry_run", "to_volume", "region", "size", "from", "from_scratch"}
COMMANDS: Mapping[str, tuple[Callable[[Commands], None], set[str]]] = {
    # what does it, and the options that it uses
    "": (Commands.back_up, {*ACCOUNT, "reread"}),
    "sweep": (Commands.sweep, {*ACCOUNT, "all"}),
    "verify": (Commands.verify, PLACES),
    "health": (Commands.health, {*PLACES, "max_age"}),
    "list": (Commands.list, {*PLACES, "json"}),
    "mount": (Commands.mount, {*PLACES, "read_only", "scratch"}),
    "restore": (Commands.restore, {*PLACES, "at", *TO_VOLUME}),
}
ANSWERS = {"list", "health", "verify"}  # the program ends only after all that these say is written
DEFAULTS: Json = {
    "config": Path("conf.json"),
    "backups": Path("backups"),
    "max_age": 24.0,
    **dict.fromkeys(("at", "to_volume", "region", "size", "from", "scratch")),
    **dict.fromkeys(("dry_run", "reread", "all", "json", "from_scratch", "read_only", "verbose", "quiet"), False),
}


class ArgumentParser(argparse.ArgumentParser):
    """One that needs no reader of its help and errors: without one, Python 3.11.2's own ends with a traceback."""

    def _print_message(self, message: str, file: Any = None) -> None:
        with contextlib.suppress(OSError):
            super()._print_message(message, file)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `command` is one of COMMANDS, `names` what follows."""

    def hours(text: str) -> float:
        """A positive number of hours; ValueError is argparse's way."""
        value = float(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parser = ArgumentParser(
        prog="dosvob.py",
        description="Back up DigitalOcean volumes into raw disk images, fetching only what changed; bring them back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # so that it is seen which options were given
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="volumes to back up (patterns too), or a command")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: conf.json")
    parser.add_argument("--backups", type=Path, metavar="DIR", help="default: backups")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; change nothing anywhere")
    parser.add_argument("--reread", action="store_true", help="read all of the local images, not an eighth in turn")
    parser.add_argument("--all", action="store_true", help="for sweep: what other backups directories left, too")
    parser.add_argument("--at", metavar="TIME", help="for restore: the newest version that is not later")
    parser.add_argument("--to-volume", metavar="NEW", help="for restore: make a new volume of it, in the account")
    parser.add_argument("--region", help="for restore --to-volume; default: the image's own")
    parser.add_argument("--size", type=int, metavar="GIB", help="for restore --to-volume; default: as large as it was")
    parser.add_argument("--from", type=Path, metavar="FILE", help="for restore --to-volume: of any file, without NAME")
    parser.add_argument("--from-scratch", action="store_true", help="for restore --to-volume: send all of it")
    parser.add_argument("--read-only", action="store_true", help="for mount: files that cannot be written to")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for mount: where what is written to them goes")
    parser.add_argument("--json", action="store_true", help="for list: for programs")
    parser.add_argument("--max-age", type=hours, metavar="HOURS", help="for health; default: 24")
    parser.add_argument("--verbose", action="store_true", help="tell every call, and tracebacks")
    parser.add_argument("--quiet", action="store_true", help="tell only warnings and errors")
    parser.add_argument("--version", action="version", version=f"dosvob {VERSION}")
    given = vars(parser.parse_intermixed_args(arguments))
    names = given.setdefault("names", [])
    command = names.pop(0) if names and names[0] and names[0] in COMMANDS else ""  # "" is no name: it matches nothing
    for option in given.keys() - COMMANDS[command][1] - {"names", "verbose", "quiet"}:
        parser.error(f"{command or 'a backup'} does not use --{option.replace('_', '-')}")
    if command == "restore" and "to_volume" not in given:
        for option in TO_VOLUME & given.keys():
            parser.error(f"restore uses --{option.replace('_', '-')} with --to-volume alone")
    return argparse.Namespace(**{**DEFAULTS, **given, "command": command})


class Signals:
    """Turns the signals that end a program into a wish to stop. `number` is that of the first one, or 0.

    Nothing is raised from the handler, so nothing is interrupted in the middle, the teardown least of all.
    """

    def __init__(self, stop: Stop, report: Reporter) -> None:
        self.number = 0
        self._stop = stop
        self._report = report
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.number:
            doing = self._report.current or "stopping"
            self._report.interject(f"still at work: {doing}; please wait, or billed resources stay")
            return
        self.number = number
        self._stop.request()
        self._report.interject(f"{signal.Signals(number).name}: stopping, and removing what was created")


def open_standard_streams() -> None:
    """Open closed standard streams on /dev/null: else an image gets their number when opened, and then our messages."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - open as long as the program runs
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    drop_unwritten()  # such as a warning of what was imported
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to lose the line


def drop_unwritten() -> None:
    """Let go of what Python could not write: it would try again at its exit, and make the exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    open_standard_streams()
    try:
        return run_program(parse_arguments(arguments))
    finally:
        drop_unwritten()


def run_program(parsed: argparse.Namespace) -> int:
    """Run a command with a reporter and the signals' stop; returns the program's exit code."""
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # what it logs also reaches us as exceptions
    report = Reporter(quiet=parsed.quiet, verbose=parsed.verbose)
    stop = Stop()
    signals = Signals(stop, report)
    code = run_command(parsed, report, stop)
    if parsed.command in ANSWERS or parsed.dry_run:
        with contextlib.suppress(Interrupted):
            report.flush(stop)
    if signals.number:
        code = 128 + signals.number
    if report.left:
        code = EXIT_FAILED
    report.close()
    return code


def run_command(parsed: argparse.Namespace, report: Reporter, stop: Stop) -> int:
    """Do what was asked for; returns the exit code, and raises nothing."""
    try:
        COMMANDS[parsed.command][0](Commands(parsed, report, stop))
    except Interrupted:
        return EXIT_FAILED
    except UsageError as problem:
        report.error(str(problem))
        return EXIT_USAGE
    except (DosvobError, OSError) as problem:
        report.error(explained(problem, parsed.backups))
        report.detail(traceback.format_exc())
    except Exception as problem:  # noqa: BLE001 - a bug: one clear line
        report.error(f"unexpected {type(problem).__name__}: {problem}; run again with --verbose to see where")
        report.detail(traceback.format_exc())
    return EXIT_FAILED if report.has_failed else EXIT_OK


if __name__ == "__main__":
    os._exit(main())  # Python's own end takes a tenth of a second, and waits for what cannot be written
