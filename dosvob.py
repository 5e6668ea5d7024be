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
- Home: one backups directory. Leftover: something that was created for a run, and that run has ended.

A run, which is `Run.run` once `main` and `Commands.back_up` have begun it, and where to read of it:

 1. `Config.load` checks conf.json, `Home.locked` keeps other runs of this home out.
 2. `sweep` removes this home's leftovers; `Home.recover` takes back what a crash left half done; `Selection` chooses.
 3. `Misplaced.move` follows a change of "region"; then for each region `Backup.run` takes the volumes in turn. In the
    background `Hosts` makes a key and a droplet, and `_prepare` a snapshot and a clone of the next volume
    (`Ephemeral.make_clone`), and attaches it.
 4. `Update` opens the volume's image; `converse` starts an `Agent` on the droplet, and talks with it by a `Pull`:
    chunks whose digest is the image's are kept, of the others the pages that differ are fetched, as patches.
 5. `Update.finish` writes the undo, then the spool to the image; the state that follows is the commit, and the undo
    becomes a version.
 6. `thin` drops the versions that `keep` does not ask for; of all volumes before the first is fetched, too.
 7. `Ephemeral.__exit__` removes all that was created, until lists show nothing of it; the table, the exit code.

The way back: `Chain.restore` writes a version to a file; `Restoration` makes a new volume of it, by a `Push` to an
`Agent` on a droplet: what differs there is sent, until nothing does.

What it promises: the image is at every moment one complete snapshot, or the undo beside it makes it the one before; a
version that is listed restores to the very bytes that it had, or says which are damaged; all that is created is named
`dosvob-ephemeral-HOME-RUN-…` and removed however the run ends, and named loudly if it could not be; a new volume, which
is to stay, is whole from its birth on.

What it does not promise: consistency beyond that of a disk whose power was cut, which a snapshot of a volume in use is.

The chapters, each standing on those before it but for the reports that it is given a way to make: errors and waiting,
configuration, the DigitalOcean API, ephemeral resources, the agent, patches and images, versions, the update of an
image, the conversations, the connection, reporting, the backup, the way back, commands, main.
"""
# ruff: noqa: E402, UP031, UP036 - what the user lacks is told before it is imported, and in words of older Pythons

from __future__ import annotations

import sys


def refuse_to_start(what: str, mend: str) -> None:
    """End with exit code 2 and one line: what is missing, and the command that mends it."""
    sys.stderr.write("dosvob: " + what + ": " + mend + "\n")
    sys.exit(2)


if sys.version_info < (3, 11):
    refuse_to_start(
        "it needs Python 3.11 or later, and %s is Python %d.%d" % (sys.executable, *sys.version_info[:2]),
        "run it with a newer one, such as python3.12 dosvob.py, or in its container: docker-compose up -d --build",
    )

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
import os
import queue
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol, TypeVar
# isort: on

# agent: end
import argparse
import array
import dataclasses
import datetime
import difflib
import fnmatch
import functools
import heapq
import importlib
import io
import json
import logging
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import tempfile
import traceback
import urllib.parse
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ClassVar, NoReturn

if TYPE_CHECKING:
    import paramiko
    import requests

VERSION = "1.0.0"
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
    """A package that is imported when something of it is first used: what works offline needs Python alone."""

    INSTALL = "python3 -m venv .venv && .venv/bin/pip install 'requests>=2.32,<3' 'paramiko>=5,<6'"

    def __init__(self, name: str, *least: int) -> None:
        self._name = name
        self._least = least  # version

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)

    def check(self) -> None:
        """Import it; raises UsageError if it is missing or too old."""
        what, mend = f"the Python package {self._name}", f"{self.INSTALL} && .venv/bin/python dosvob.py"
        try:
            version = str(self.__version__)
        except ImportError as missing:
            raise UsageError(f"{what} is missing ({missing}): {mend}") from None
        if tuple(map(int, re.findall(r"\d+", version)[: len(self._least)])) < self._least:
            needed = ".".join(map(str, self._least))
            raise UsageError(f"{what} {version} is too old, {needed} or later is needed: {mend}")


PACKAGES = {name: Package(name, *least) for name, *least in (("requests", 2, 32), ("paramiko", 5, 0))}
if not TYPE_CHECKING:
    requests, paramiko = PACKAGES["requests"], PACKAGES["paramiko"]


class Interrupted(BaseException):
    """The run was asked to stop: as KeyboardInterrupt it is no error, so only who ends a run, or a part, catches it."""


class Stop:
    """Carries the wish to stop to every thread, which look for it wherever they wait.

    A signal handler must not raise (the exception could hit the teardown) nor take a lock (the interrupted code may
    hold it; an Event has one), so `request` only sets an attribute, and waiting is done in short naps.
    """

    NAP = 0.1  # seconds; how late a wish to stop may be noticed

    def __init__(self, parent: Stop | None = None) -> None:
        self._parent = parent  # whose wish is this one's too
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
    """What the work returns, or raises; TimeoutError if that takes more than `limit` seconds, and it goes on unheeded.

    For network calls, whose own limits are between two bytes: a name that is looked up, or an answer that trickles in,
    would take any time.
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


def parse_time(text: str) -> datetime.datetime | None:
    """An RFC 3339 time, such as the API's; None if it is none."""
    try:
        return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
    except (ValueError, TypeError, OverflowError):
        return None


def age(moment: str) -> float:
    """Seconds since an RFC 3339 time; infinite if it is none."""
    parsed = parse_time(moment)
    return float("inf") if parsed is None else (utc_now() - parsed).total_seconds()


def human_size(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_time(seconds: float) -> str:
    """Seconds as 12 s, 3:05 min, 2:03 h or 5 days."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h" if whole < 72 * 3600 else f"{whole // 86400} days"


def local_time(moment: datetime.datetime) -> str:
    """A time as people here write it, with its offset."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


# ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────────
# Reads conf.json and the environment. Whatever is wrong there is told in terms of the file, before anything is begun.


@dataclass(frozen=True)
class Keep:
    """How many versions are kept: all numbers 0 for none, as before there were versions.

    `last` beside the image; and the newest of each of the last `daily` days, `weekly` weeks and `monthly` months that
    have one, in UTC, the image counting: what `restic forget` means by it. The default is that of conf.json.example.
    """

    last: int = 6
    daily: int = 7
    weekly: int = 4
    monthly: int = 6

    def wanted(self, moments: Sequence[datetime.datetime]) -> list[bool]:
        """Which versions to keep, given when they were taken, the newest first; the first of them is the image."""
        wanted = [number <= self.last for number in range(len(moments))]
        rules: list[tuple[int, Callable[[datetime.datetime], tuple[int, ...]]]] = [
            (self.daily, lambda moment: (moment.year, moment.month, moment.day)),
            (self.weekly, lambda moment: moment.isocalendar()[:2]),
            (self.monthly, lambda moment: (moment.year, moment.month)),
        ]
        for count, period in rules:
            periods: list[tuple[int, ...]] = []
            for number, moment in enumerate(moments):
                if len(periods) < count and period(moment) not in periods[-1:]:
                    periods.append(period(moment))
                    wanted[number] = True
        return wanted


@dataclass(frozen=True)
class Config:
    """What conf.json and the environment say.

    `regions` are slugs, none for all that have volumes of the account; with `by_region` each has a directory for its
    images. `include` and `exclude` are shell patterns of volume names; an empty `include` means all. `droplet_size`
    and `droplet_image` are slugs, or None for the cheapest and the newest that will do. `healthchecks` is the address
    of a monitoring service that is told how each run goes; whoever knows it can do so too.
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
        if not variable and path.stat().st_mode & 0o077 and cls._keeps_modes(path.parent):
            warn(f"{path} holds your token and others can read it: chmod 600 {path}")
        url = environment.get(cls.URL_VARIABLE) or "https://api.digitalocean.com"
        if not cls._is_private(url):
            raise UsageError(f"{cls.URL_VARIABLE} is {url!r}: it must be an https:// address")
        ping = content.get("healthchecks") or None
        if ping and not cls._is_private(ping):
            raise UsageError(
                f'{path}: "healthchecks" must be an https:// address such as "https://hc-ping.com/YOUR-UUID"'
            )
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
        )

    @classmethod
    def _check(
        cls, path: Path, content: Json, known: Mapping[str, tuple[tuple[type, ...], str]], where: str = ""
    ) -> None:
        """Every key is a known one, and its value is what that must be; raises UsageError."""
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
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"there is no {path}: copy conf.json.example to {path} and put your token and region in it"
            ) from None
        except json.JSONDecodeError as problem:
            raise UsageError(
                f"{path}: line {problem.lineno}, column {problem.colno}: not JSON: {problem.msg}"
            ) from None
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(f"cannot read {path}: {problem}") from None
        if not isinstance(content, dict):
            raise UsageError(f"{path}: must hold an object, {{…}}, as conf.json.example does")
        return content

    @staticmethod
    def _keeps_modes(directory: Path) -> bool:
        """Whether chmod has an effect on files there: FAT and some NAS know no modes, and nothing can be done there."""
        try:
            with tempfile.NamedTemporaryFile(dir=directory, prefix=".dosvob-") as file:
                return os.fstat(file.fileno()).st_mode & 0o077 == 0
        except OSError:  # as it may be read-only, nobody knows
            return True

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

LIMITS_PAGE = "https://cloud.digitalocean.com/account/team/limits"
TOKENS_PAGE = "https://cloud.digitalocean.com/account/api/tokens"

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
    """A call failed. `status` is that of HTTP; None: no usable answer came. `wait`: seconds that a 429 asks for."""

    def __init__(self, status: int | None, text: str, wait: float | None = None) -> None:
        self.status = status
        self.wait = wait
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
    """The calls, each with the patience that suits it: `patience` is for how many seconds a failing one is repeated.

    `say` is told of every wait; `detail` of every call. A stop that is requested ends the waiting with `Interrupted`,
    never a call that is under way.
    """

    PATIENCE = 300  # seconds
    DRY_RUN_PATIENCE = 20  # seconds: somebody waits for it
    TEARDOWN_PATIENCE = 10  # seconds: a teardown comes back to what failed, after it has tried the rest
    RATE_LIMIT_PATIENCE = 7200  # seconds for which a call that meets 429 is repeated: the longest limit is by the hour
    RATE_LIMIT_WAIT = 15  # seconds to wait after a 429 that does not say how long
    LONGEST_WAIT = 3600  # seconds; whatever a 429 asks for
    CALL_TIMEOUT = (10, 60)  # seconds to connect, and between bytes of the answer
    CALL_LIMIT = 120  # seconds for all of a call
    FIRST_BACKOFF, MAX_BACKOFF = 0.5, 30  # seconds between repetitions, doubling
    PAGE_SIZE = 200  # the API's maximum
    MOST_PAGES = 1000  # of a list, which holds 25 droplets or 100 volumes for most accounts

    def __init__(
        self, config: Config, stop: Stop, say: Callable[[str], None], detail: Callable[[str], None], patience: float
    ) -> None:
        self.stop = stop
        self._config = config
        self._say = say
        self._detail = detail
        self._patience = patience
        self._is_token_known = False  # whether a call was let through
        self.limited_since: float | None = None  # the first of the 429s that no other answer has come after
        self._sessions = threading.local()  # requests does not promise that a session can be shared by threads

    def with_stop(self, stop: Stop, patience: float | None = None) -> Api:
        """The same API, whose waiting another stop ends; with a patience of its own."""
        api = Api(self._config, stop, self._say, self._detail, self._patience if patience is None else patience)
        api._is_token_known = self._is_token_known
        return api

    def get(self, path: str, **params: str | int) -> Json:
        """GET, repeated while it fails in a way that may pass."""
        return self._repeated("GET", path, params=params)

    def get_fresh(self, path: str, key: str) -> Json | None:
        """An item by its id; None if the API does not know it: not yet, or not any more."""
        try:
            return Api.required(self.get(path), key, dict)
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
        """All items of a list, from all its pages."""
        items: list[Json] = []
        for page in range(1, self.MOST_PAGES + 1):
            answer = self.get(path, **params, per_page=self.PAGE_SIZE, page=page)
            found, links = answer.get(key), answer.get("links") or {}
            pages = (links.get("pages") or {}) if isinstance(links, dict) else None  # each may be missing, or null
            if not isinstance(found, list) or not all(isinstance(item, dict) for item in [*found, pages]):
                raise DosvobError(f'DigitalOcean answered GET {path} without a list of "{key}": try again later')
            items += found
            if not found or not pages or not pages.get("next"):
                return items
        raise DosvobError(f"DigitalOcean's answers to GET {path} have no end: try again later")

    def post(self, path: str, body: Json) -> Json:
        """POST, once that is let through, save that the limit of a volume's own snapshots is the caller's to wait for.

        If it fails so that it may have taken effect, it is the caller's to find out whether it did.
        """
        return self._repeated("POST", path, body=body)

    def _repeated(self, method: str, path: str, body: Json | None = None, params: Json | None = None) -> Json:
        start, intervals = time.monotonic(), self.backoff()
        heeds_limit = not (method == "POST" and path.endswith("/snapshots"))
        while True:
            try:
                return self._once(method, path, body, params)
            except ApiError as problem:
                if not (heeds_limit if problem.status == 429 else problem.may_exist and method != "POST"):
                    raise
                self.pause(problem, next(intervals), start)

    def backoff(self) -> Iterator[float]:
        """The seconds between repetitions of a call."""
        return pauses(self.FIRST_BACKOFF, self.MAX_BACKOFF, 2)

    def pause(self, problem: ApiError, pause: float, start: float) -> None:
        """Wait before a repetition, visibly; raise the problem if that has gone on for too long since `start`."""
        limit, what = start + self._patience, str(problem)
        if problem.status == 429:  # of an account, so all calls share the patience
            limit = min(start, self.limited_since or start) + self.RATE_LIMIT_PATIENCE
            pause = self.RATE_LIMIT_WAIT if problem.wait is None else problem.wait
            what = "DigitalOcean's rate limit is reached"
        if time.monotonic() + pause > limit:
            raise problem
        self._say(f"{what}; trying again in {pause:.0f} s")
        self.stop.sleep(pause)

    def _once(self, method: str, path: str, body: Json | None, params: Json | None) -> Json:
        call, url = f"{method} {path}", self._config.api_url
        limit = min(self.CALL_LIMIT, max(self._patience, self.TEARDOWN_PATIENCE))
        self.stop.check()
        session = self._session()
        request = functools.partial(session.request, method, url + path, json=body, params=params)
        try:  # the token is for this host alone
            response = within(limit, lambda: request(timeout=self.CALL_TIMEOUT, allow_redirects=False))
        except TimeoutError:
            del self._sessions.session  # the call that goes on has it
            raise ApiError(None, f"{call}: no complete answer from {url} within {limit:.0f} s") from None
        except requests.RequestException as problem:
            cause = root_cause(problem)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise DosvobError(f"{url} has no certificate to be trusted: {cause}") from None
            raise ApiError(None, f"{call}: no answer from {url}: {reason(cause)}") from problem
        self._detail(f"{call} → {response.status_code}")
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
            raise ApiError(status, text, self._wait_told(response))
        self._is_token_known = True
        if not isinstance(answer, dict):
            raise ApiError(None, f"{call}: the answer is not a JSON object")
        return answer

    def _wait_told(self, response: requests.Response) -> float | None:
        """The seconds to wait that a 429 tells: `retry-after` (burst limit), or `ratelimit-reset` (hourly limit)."""
        headers = response.headers
        with contextlib.suppress(KeyError, ValueError):
            return min(max(1.0, float(headers["retry-after"])), self.LONGEST_WAIT)
        with contextlib.suppress(KeyError, ValueError):
            if int(headers.get("ratelimit-remaining", 0)) == 0:
                return min(max(1.0, float(headers["ratelimit-reset"]) - time.time()), self.LONGEST_WAIT)
        return None

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._config.token}"
        return request

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._sessions, "session", None)
        if session is None:
            session = self._sessions.session = requests.Session()
            session.auth = self._authorize  # what is set as a header a ~/.netrc would replace
            session.headers["User-Agent"] = f"dosvob/{VERSION}"
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
    droplet_ids: tuple[int, ...]

    @classmethod
    def parse(cls, item: Json) -> Volume:
        """From the API's volume object."""
        return cls(
            id=Api.required(item, "id", str),
            name=Api.required(item, "name", str),
            region=Api.required(Api.required(item, "region", dict), "slug", str),
            size=Api.required(item, "size_gigabytes", int) * GIB,
            droplet_ids=tuple(item.get("droplet_ids") or ()),
        )


# ── Ephemeral resources ──────────────────────────────────────────────────────────────────────────────────────────────
# What a run creates and must remove: key, droplet, snapshots, clones. Whose they are is in the name, which is
# `dosvob-ephemeral-HOME-RUN-…`; so what an earlier run left behind, or an answer that was lost, is found as well.

TAG = "dosvob-ephemeral"
LIST_LAG = 6  # seconds after which a list is taken to show what was created: lists have been seen to lag behind
BUSY_LIMIT = 120  # seconds for which a droplet may be busy with another event, or a volume with its droplet
HOURS_PER_MONTH = 730
UNKNOWN = "unknown"  # the id of what may be there, and cannot be listed


class NoDroplet(DosvobError):
    """The droplet could not be had, so nothing can be done."""


class DropletLost(DosvobError):
    """The droplet is gone, or did not come up: another one may do."""


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
        """Whether dosvob made it: tags on volumes have been seen not to stick, so the name's prefix will do as well."""
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
        """Where the API has it."""
        return f"{KINDS[self.kind].path}/{urllib.parse.quote(self.id, safe='')}"

    def cost(self, seconds: float) -> float:
        """Dollars for so long."""
        kind = KINDS[self.kind]
        steps = -(-seconds // kind.step)
        return max(kind.least, self.hourly * steps * kind.step / 3600)

    def __str__(self) -> str:
        cost = f", ${self.hourly * HOURS_PER_MONTH:.2f} a month" if self.hourly else ""
        return f"{self.kind} {self.name} (id {self.id}{cost})"


class Removal:
    """Deletes what is known to have been created, then what is listed, until nothing of ours is listed any more.

    `is_ours` tells what is. Kind by kind, a list is believed that was asked for after `not_before` (time.monotonic):
    the time of the last creation and that by which lists lag behind. A volume cannot be deleted for some seconds after
    its droplet's deletion was accepted: what fails is tried again with growing pauses.
    """

    LIMIT = 600  # seconds after which it is given up, if nothing more goes

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

        `known` was created, with certainty. `asked` has kinds by name of what was asked for without an answer: if its
        kind cannot be listed, it is returned too, with the id UNKNOWN.
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
                self._api.stop.sleep(next(intervals) if left else max(self._not_before - time.monotonic(), 0))
        return {}

    def _round(self) -> dict[Resource, Exception | None]:
        """List and delete what is there of each kind; what is left, and what went wrong with it, None for nothing.

        What is known, and would not be deleted, is there whatever a list says.
        """
        left: dict[Resource, Exception | None] = {}
        for kind, was_empty in list(self._kinds.items()):
            asked = time.monotonic()
            if was_empty and asked < self._not_before:  # DigitalOcean answers ten lists of keys a minute, and no more
                continue
            found = [resource for resource in self._known if resource.kind == kind and resource not in self._gone]
            try:
                found += filter(self._is_ours, Resource.list(self._api, kind))
            except Exception as problem:  # noqa: BLE001 - no answer is so odd that the rest must stay for it
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
        """Whether it is of no use to try again: the token may not do it, or it is in use by what must stay."""
        refused = [resource.kind for resource, problem in left.items() if isinstance(problem, ApiError)
                   and problem.status in (401, 403)]  # fmt: skip
        return len(refused) == len(left) or (
            DROPLET in refused and {resource.kind for resource in left} <= {*refused, VOLUME}
        )

    @staticmethod
    def _named(left: Mapping[Resource, Exception | None], asked: Mapping[str, str]) -> dict[Resource, str]:
        """What is left, with reasons; of a kind that could not be listed, each thing by name that may be there."""
        named: dict[Resource, str] = {}
        for resource, problem in left.items():
            reason = str(problem or "it is still listed")
            if resource.id == UNKNOWN:
                names = [name for name, kind in asked.items() if kind == resource.kind]
                resource = Resource(resource.kind, UNKNOWN, ", ".join(names) or resource.name)  # noqa: PLW2901
            named[resource] = reason
        return named


@dataclass(frozen=True)
class DropletPlan:
    """What droplet to create: slugs of its possible sizes, cheapest first, each with its price in dollars per hour."""

    region: str
    sizes: tuple[tuple[str, float], ...]
    image: str

    DEFAULT_SIZES = ("s-1vcpu-512mb-10gb", "s-1vcpu-1gb")  # the two smallest; the first is not in all regions

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

    Since a home has one run at a time, the end also removes what an earlier run of this home left, and lists showed
    too late for the sweep at the beginning. What could not be removed before is not waited for once more.
    """

    ACTION_LIMIT = 600  # seconds that an action, such as an attach, may take
    ADDRESS_LIMIT = 600  # seconds until a new droplet must have an address
    FRESH_LIMIT = 60  # seconds for which something freshly created may answer 404
    NEW_PATIENCE = 1800  # seconds for which the creation of what is to stay is repeated: it may have taken hours so far

    def __init__(self, api: Api, home: str, report: Reporter) -> None:
        self.prefix = f"{TAG}-{home}-{secrets.token_hex(4)}-"
        self._home = home
        self._api = api
        self._report = report
        self._created: dict[Resource, float] = {}  # with the times (time.monotonic)
        self._removed: dict[Resource, float] = {}
        self._asked: dict[str, str] = {}  # kinds by name of what was asked for, and not answered yet
        self._last_post = time.monotonic()
        self._key: int | None = None  # the id of the run's one-time key
        self._attached: dict[str, int] = {}  # droplets by clone
        self._events = threading.Lock()  # a droplet takes one at a time, and one may last longer than BUSY_LIMIT

    def __enter__(self) -> Ephemeral:
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove everything, and say loudly what stays."""
        existing = [resource for resource in self._created if resource not in self._removed]
        counts = sorted(collections.Counter(resource.kind for resource in existing).items())
        told = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts) or "what may have been created"
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
                self._removed[resource] = time.monotonic()
        self._report.left_behind(left)

    def _is_ours(self, resource: Resource) -> bool:
        return resource.home in ("", self._home) and resource not in self._report.left

    def cost(self) -> float:
        """Dollars for all that was created, by the seconds that it existed until now."""
        now = time.monotonic()
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
                if problem.status != 422 or not sizes:
                    raise NoDroplet(f"the droplet could not be had: {problem}") from problem
                self._report.say(f"{size} is not to be had in {plan.region} now; trying the next size")
        droplet = Droplet(Api.required(item, "id", int), Api.required(item, "name", str), "")
        actions = (item.get("links") or {}).get("actions") or [{}]  # what was found in a list has none
        address = self._await_address(droplet, str(actions[0].get("id", "")))
        return dataclasses.replace(droplet, address=address)

    def _await_address(self, droplet: Droplet, action: str) -> str:
        """The public address of a droplet that was created; raises DropletLost if it, or its action, has failed."""
        known, looks, start = False, 0, time.monotonic()

        def address() -> str | None:
            nonlocal known, looks
            item = self._api.get_fresh(f"/v2/droplets/{droplet.id}", "droplet")
            if item is None and (known or time.monotonic() - start > self.FRESH_LIMIT):
                raise DropletLost(f"the droplet {droplet.name} is gone")
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
        """Whether the droplet does not run any more, as far as DigitalOcean can tell."""
        try:
            item = self._api.get_fresh(f"/v2/droplets/{droplet.id}", "droplet")
        except ApiError:
            return False
        return item is None or item.get("status") != "active"

    def _refuse_lost(self, droplet: Droplet, problem: DosvobError) -> None:
        """Raise DropletLost if that is what the problem comes from."""
        if self.is_gone(droplet):
            raise DropletLost(f"the droplet {droplet.name} is gone") from problem

    def remove_droplets(self) -> None:
        """Remove the droplet, which is to be replaced, if it is still there; nothing is attached to it any more."""
        for resource in list(self._created):
            if resource.kind == DROPLET and resource not in self._removed:
                self._remove_now(resource)

    def make_clone(self, volume: Volume, number: int, size: int = 0) -> tuple[Volume, str]:
        """A volume with the content that this one has now, and the time of that; the snapshot between is gone again.

        It has at least `size` bytes. Raises ApiError with the status 429 if the volume's last snapshot is less than ten
        minutes old.
        """
        name = f"{self.prefix}{number}"  # the device is named by it: unique and short
        snapshot = self._take_snapshot(volume, name)
        body = {"name": name, "region": volume.region, "size_gigabytes": max(volume.size, size) // GIB, "tags": [TAG]}
        clone = self._make_of(snapshot, body)
        self._remove_now(Resource.parse(SNAPSHOT, snapshot))
        return Volume.parse(clone), str(snapshot.get("created_at", ""))

    def make_empty(self, region: str, size: int) -> Volume:
        """A throwaway volume of so many bytes that has nothing."""
        body = {"name": f"{self.prefix}0", "region": region, "size_gigabytes": size // GIB, "tags": [TAG]}
        return Volume.parse(self._create(VOLUME, body))

    def make_new(self, name: str, description: str, volume: Volume) -> Volume:
        """A volume that is to stay, with all that a throwaway one has, which makes room for it if the quota wants that.

        It is whole from its creation on, and no matter of the teardown's.
        """
        snapshot = self._take_snapshot(volume, f"{self.prefix}new")
        body = {"name": name, "region": volume.region, "size_gigabytes": volume.size // GIB}
        body["description"] = description  # by which it is told from somebody else's if the answer is lost
        patient = self._api.with_stop(self._api.stop, self.NEW_PATIENCE)
        start, intervals, has_room = time.monotonic(), self._api.backoff(), False
        try:
            while True:
                try:
                    return Volume.parse(self._make_of(snapshot, body, patient, stays=True))
                except ApiError as problem:
                    if problem.status not in (403, 422):
                        raise
                    if has_room:
                        patient.pause(problem, next(intervals), start)
                        continue
                    self._report.say(f"{problem}; removing {volume.name}, whose snapshot has all, to make room")
                self.remove_droplets()
                self._remove_volume(volume)
                has_room = True
        finally:
            if self._asked.pop(name, None):
                self._report.warn(f"it is not known whether the volume {name} was made: if it is there, it is whole")

    def _take_snapshot(self, volume: Volume, name: str) -> Json:
        return self._create(SNAPSHOT, {"name": name, "tags": [TAG]}, f"/v2/volumes/{volume.id}/snapshots")

    def _make_of(self, snapshot: Json, body: Json, api: Api | None = None, *, stays: bool = False) -> Json:
        """The volume that a body describes, with the content of a snapshot."""
        least = max(body["size_gigabytes"], int(snapshot.get("min_disk_size") or 0))
        body = {**body, "snapshot_id": Api.required(snapshot, "id", str), "size_gigabytes": least}

        def create() -> Json | None:
            try:
                return self._create(VOLUME, body, api=api, stays=stays)
            except ApiError as problem:
                if problem.status != 404:
                    raise
                return None  # the snapshot is so fresh that it is not known yet

        item = self._api.stop.wait_until(self.FRESH_LIMIT, create)
        if item is None:
            raise DosvobError("DigitalOcean lost the snapshot that it had just made: try again later")
        return item

    def attach(self, volume: Volume, droplet: Droplet) -> None:
        """Attach the volume to the droplet, unless it is."""
        if self._attached.get(volume.id) != droplet.id:
            self._volume_event("attach", volume, droplet)
            self._attached[volume.id] = droplet.id

    def detach(self, volume: Volume, droplet: Droplet) -> None:
        """Detach it."""
        self._volume_event("detach", volume, droplet)

    def release(self, clone: Volume, droplet: Droplet) -> None:
        """Detach the clone and delete it."""
        self.detach(clone, droplet)
        self._remove_volume(clone)

    def _remove_volume(self, volume: Volume) -> None:
        self._remove_now(next(r for r in list(self._created) if r.kind == VOLUME and r.id == volume.id))

    def _create(
        self, kind: str, body: Json, post_path: str | None = None, *, api: Api | None = None, stays: bool = False
    ) -> Json:
        """Create a resource and enter it in the books, unless it `stays`; its links in the answer are put into it.

        When no answer came, or a 5xx did, it may exist: it is looked for by its unique name, until a list can be
        trusted to show it, before it is asked for again. `_asked` has its name while it may exist without our knowing.
        """
        where, name, api = KINDS[kind], body["name"], api or self._api
        start, intervals, is_doubtful = time.monotonic(), api.backoff(), name in self._asked

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
                if item is None and not problem.may_exist:
                    raise
                if item is None:
                    api.pause(problem, next(intervals), start)
            finally:
                self._last_post = time.monotonic()
        resource = Resource.parse(kind, item)
        if not stays:
            self._created[resource] = time.monotonic()
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
            self._removed[resource] = time.monotonic()

    def _volume_event(self, event: str, volume: Volume, droplet: Droplet) -> None:
        """Attach or detach, however often it takes until the volume is as wished."""
        path = f"/v2/volumes/{volume.id}/actions"
        body = {"type": event, "droplet_id": droplet.id, "region": volume.region}
        problem: list[DosvobError] = []

        def done() -> bool | None:
            try:
                action = Api.required(self._api.post(path, body), "action", dict)
            except ApiError as refused:
                # busy with another event, attached or detached already, too fresh to be known, or an answer lost
                if not (refused.may_exist or refused.status in (404, 409, 422, 429)):
                    raise
                problem[:] = [refused]
                self._refuse_lost(droplet, refused)
                item = self._api.get_fresh(f"/v2/volumes/{volume.id}", "volume")
                is_attached = None if item is None else droplet.id in Volume.parse(item).droplet_ids
                return True if is_attached == (event == "attach") else None
            try:
                self._await_action(f"{path}/{Api.required(action, 'id', int)}", f"the {event} of {volume.name}")
            except DosvobError as failed:
                self._refuse_lost(droplet, failed)
                raise
            return True

        with self._events:
            if self._api.stop.wait_until(BUSY_LIMIT, done) is None:
                raise problem[0]

    def _await_action(self, path: str, what: str) -> None:
        def status() -> str | None:
            action = self._api.get_fresh(path, "action") or {}
            return None if action.get("status") in (None, "in-progress") else str(action.get("status"))

        result = self._api.stop.wait_until(self.ACTION_LIMIT, status)
        if result is None:
            raise DosvobError(f"{what} did not end within {self.ACTION_LIMIT} s: DigitalOcean's fault, try again later")
        if result != "completed":
            raise DosvobError(f"{what} failed on DigitalOcean's side ({result}): try again later")


# ── The agent ────────────────────────────────────────────────────────────────────────────────────────────────────────
# The part that runs on the droplet: it reads the volume once (what must be sent of a large change: twice), sends a
# digest for each chunk, sends the pages that it is asked for, and writes those that it is given. Its source, which is
# what stands between the marks "agent: begin" and "agent: end" in this file, is sent over SSH and run by the droplet's
# own python3: so it uses the standard library alone, as Python 3.8 had it.
#
# Frames (agent to here) are FRAME (kind, index, length of the payload), then the payload:
#   HELLO    AGENT_MAGIC, the device's size in bytes (8 bytes),      the first frame
#            whether there is zstd there (1 byte)
#   DIGEST   a chunk's digest                                        at most `window` are announced and not done with
#   ZEROS    a count (4 bytes)                                       so many chunks from the index on are all zeros
#   SHORT    the first SHORT_SIZE bytes of each page digest          in answer to COMPARE
#   RAW      a bitmap of the pages that follow, then the pages       in answer to SEND; pages that were asked for and
#   ZLIB     the same, the pages compressed with zlib                are not in the bitmap are all zeros
#   ZSTD     the same, the pages compressed with zstd
#   ALIVE    nothing                                                 when there has been nothing to say for a while
#   FAILED   a message                                               the agent cannot go on
# Digests come in the order of the chunks that were asked for when it was started, without gaps, and before data that
# was queued earlier; answers in any order.
# Commands (from here to the agent) are COMMAND (kind, index, count, bitmap), all of one length:
#   DROP     forget `count` chunks from the index on                 COMPARE   send the chunk's SHORT
#   SEND     send the pages in the bitmap, forget the chunk
#   WRITE    write the pages in the bitmap, forget the chunk: they are in the frame that follows, as in answer to SEND
# A command that follows a WRITE is obeyed after it. The agent ends when no more commands can come.
#
# What was written and what is compared: an agent that may write first waits for the end of the one before it, which may
# not have noticed yet that nobody hears it, makes durable what that has written, and has the kernel forget it. So the
# digests are those of what the device itself has; of what this agent writes, the next one tells.
#
# Why nothing can stand still: a thread of the agent's own takes the commands as they come, and writes what it is to
# write. It waits for the device alone: for no answer of the agent's to get onto its way, for answers are the work of
# other threads, and its own failure is put where there is always room. So whoever sends, a command or a WRITE, waits
# for the link and the device at most, even while nobody reads what the agent says; then goes on to read; and so the
# agent's writing to the link always goes on.

# agent: begin
CHUNK = 1 << 20  # bytes
PAGE = 4096  # bytes
PAGES = CHUNK // PAGE
ZERO_PAGE = bytes(PAGE)
ZERO_PAGE_DIGEST = hashlib.sha256(ZERO_PAGE).digest()
DIGEST_SIZE = 32  # bytes
SHORT_SIZE = 4  # bytes; enough to tell pages apart, since the chunk's digest is checked in the end
WINDOW = 1024  # chunks that the scan is ahead of what is done with: it goes on while a large change crosses the link
HELD = 64  # chunks that the agent keeps of these, others are read again; a droplet has 512 MiB
MOST_AHEAD = 1 << 16  # chunks, of zeros too, that the scan may be beyond the first one that is not done with
READ_AHEAD = 8  # chunks; a volume is latency-bound, one read at a time does not reach its speed
READERS = 4
FEW_READS = 4  # pieces of a chunk that are read one by one; of more, reading all of it takes no longer
BATCH = 16  # digests to a write: fewer packets
BATCH_SECONDS = 0.05  # after which a smaller batch will do
QUEUED_FRAMES = 8
HEARTBEAT = 5.0  # seconds
KEPT_MEMORY = 32 << 20  # bytes; the most that glibc takes as M_MMAP_THRESHOLD
DEVICE_LIMIT = 60.0  # seconds for the device to appear after its attach action completed
EXCLUSIVE_LIMIT = 5.0  # seconds for which something, such as udev's probing, may have it for itself
SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ of fcntl(2), which Python has had a name for since 3.10
AGENT_MAGIC = b"dosvob agent 3\n"
FRAME = ">BII"
COMMAND = ">BII32s"
HELLO, DIGEST, ZEROS, SHORT, RAW, ZLIB, ZSTD, ALIVE, FAILED = range(1, 10)
LEVELS = {  # of compression, each with its cost in multiples of the lowest one's; those above gain hardly anything
    ZLIB: ((1, 1.0), (6, 2.0)),
    ZSTD: ((1, 1.0), (3, 2.0), (6, 7.0)),
}
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


def pages_in(bitmap: int) -> Iterator[int]:
    """The pages in a bitmap, in order."""
    for first, count in runs(bitmap):
        yield from range(first, first + count)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, up to some MiB, for buffers of a chunk come and go all the time.

    Giving each back to the kernel and getting it anew as zeros costs half of all the CPU time of a first sync. One
    arena, and not one for each thread, each of which would keep as much. The numbers are those of mallopt(3):
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX, which other C libraries may not have.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2 * KEPT_MEMORY)
        mallopt(-3, KEPT_MEMORY)
        mallopt(-8, 1)


class Zstd:
    """zstd, as the system's C library has it: far faster than zlib, and it leaves less. Any thread may use it."""

    MAGIC = b"\x28\xb5\x2f\xfd"  # of a frame; older formats and frames that are to be skipped have others

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
        """The data compressed, as one frame; as it is if it does not become shorter by that."""
        room = ctypes.create_string_buffer(len(data))
        size = self._compress(room, len(data), data, len(data), level)
        return ctypes.string_at(room, size) if size < len(data) else data  # errors are numbers beyond all sizes

    def decompress(self, data: bytes, size: int) -> bytes:
        """What was compressed, which must be one frame of `size` bytes: raises ValueError, and takes no more room.

        In one step, so that the frame's own window, which may be huge, is not made.
        """
        if not data.startswith(self.MAGIC) or self._frame_size(data, len(data)) != len(data):
            raise ValueError("not one frame of zstd")
        room = ctypes.create_string_buffer(max(size, 1))
        if self._decompress(room, size, data, len(data)) != size:
            raise ValueError("not %d bytes compressed with zstd" % size)
        return ctypes.string_at(room, size)


try:
    LIBZSTD: Zstd | None = Zstd()
except (OSError, AttributeError):
    LIBZSTD = None


class Packer:
    """Makes data ready for the link: as it is, or compressed so hard that the link still is what takes longest.

    That is decided for each piece, by what compressing and sending of late took. Any thread may use it.
    """

    SHARE = 0.6  # of the time that the link takes for the data; the cores have reading, hashing and SSH to do as well
    SAMPLES, SAMPLE = 4, 2 << 10  # pieces, and bytes of each, that are compressed to see whether it makes a difference
    FADING = 0.9  # of the sums below, with each piece; sums, and not a mean of rates, which a buffer that fills spoils

    def __init__(self, with_zstd: bool) -> None:
        """`with_zstd` tells whether the other side can unpack it."""
        self.kind = ZSTD if with_zstd and LIBZSTD is not None else ZLIB
        self.cores = os.cpu_count() or 1
        self._lock = threading.Lock()
        self._packed = self._packing = 0.0  # bytes compressed of late, and the seconds that the lowest level takes
        self._sent = self._sending = 0.0  # bytes sent of late, and the seconds that it took

    def sent(self, size: int, seconds: float) -> None:
        """So many bytes were sent, in so much time."""
        with self._lock:
            self._sent = self.FADING * self._sent + size
            self._sending = self.FADING * self._sending + seconds

    def pack(self, data: bytes) -> tuple[int, bytes]:
        """What to send for the data: the kind of the frame (RAW, ZLIB, ZSTD) and the bytes."""
        level, cost = self._level(len(data))
        if not level or not self._gets_shorter(data):
            return RAW, data
        start = time.thread_time()  # which does not count waiting for the interpreter's lock
        packed = self._compress(data, level)
        seconds = time.thread_time() - start
        with self._lock:
            self._packed = self.FADING * self._packed + len(data)
            self._packing = self.FADING * self._packing + seconds / cost
        return (self.kind, packed) if len(packed) < len(data) else (RAW, data)

    def _level(self, size: int) -> tuple[int, float]:
        """How hard to compress so many bytes, and what that costs; level 0 for not at all."""
        with self._lock:
            on_link = size * self._sending / (self._sent or 1.0)
            lowest = size * self._packing / (self._packed or 1.0)
        levels = [
            (level, cost) for level, cost in LEVELS[self.kind] if lowest * cost < on_link * self.SHARE * self.cores
        ]
        if not levels:
            return 0, 0.0
        return levels[-1 if self._packed else 0]

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


def done_ahead(work: Callable[[S], T], items: Iterable[S], threads: int, most: int) -> Iterator[T]:
    """What the work makes of each item, in order: done ahead, for so many items at most, by so many threads."""
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
        # Left unfinished, this is ended by the garbage collector, maybe while a thread is being started: to wait for
        # the pool's threads then would be to wait for the lock which that start holds.
        for future in coming:
            future.cancel()
        pool.shutdown(wait=False)


class Agent:
    """Serves one device to one reader, and writes to it if it `writes`; otherwise the device is set read-only.

    It announces the chunks of `parts`, ranges of them in order, at most `window` ahead of what is done with. Five sorts
    of threads: readers that read ahead, a scanner that hashes, one that takes commands and writes to the device, some
    that answer commands, as many as there are cores to compress on but at least two, and the main thread, which writes
    to the other side.
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
        self.announced: dict[int, bytes] = {}  # the page digests of chunks that are not done with, by index
        self.held: dict[int, bytes] = {}  # those of these chunks that need not be read again
        self.room = threading.Condition()
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
        """Have frames written before all that is queued: a scan that waited for data to be sent would last longer."""
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
                if kind in (RAW, ZLIB, ZSTD):  # earlier it would make room for what may overtake it without a bound
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
                with self.room:
                    self.announced[index] = pages
                    if len(self.held) < HELD and not self.writes:
                        self.held[index] = chunk
            else:
                zeros += 1
            is_late = index + 1 == self.parts[-1][1] or time.monotonic() - flushed > BATCH_SECONDS
            is_due = is_late or len(batch) >= BATCH or not self.has_room(index)
            if zeros and (pages or is_due or index + 1 in ends):
                batch.append(framed(ZEROS, index + (not pages) - zeros, struct.pack(">I", zeros)))
                zeros = 0
            if pages:
                batch.append(framed(DIGEST, index, chunk_digest(pages)))
            if is_due:
                self.announce(b"".join(batch))
                batch.clear()
                flushed = time.monotonic()
                with self.room:
                    self.room.wait_for(lambda: self.has_room(index))  # noqa: B023 - called before the next index

    def has_room(self, index: int) -> bool:
        """Whether the scan may go on beyond this chunk."""
        with self.room:
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
        end = time.monotonic() + DEVICE_LIMIT
        while not os.path.exists(self.device):
            if time.monotonic() > end:
                raise OSError(f"{self.device} did not appear within {DEVICE_LIMIT:.0f} s")
            time.sleep(0.1)
        fd = os.open(self.device, os.O_RDONLY)
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            fcntl.ioctl(fd, 0x125D, struct.pack("i", not self.writes))  # BLKROSET: as blockdev --setro, or --setrw
            self.refuse_if_in_use()
        self.fd = os.open(self.device, os.O_RDWR if self.writes else os.O_RDONLY)
        os.close(fd)
        if self.writes:
            fcntl.flock(self.fd, fcntl.LOCK_EX)  # which the agent before it holds to its end
            os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.lseek(self.fd, 0, os.SEEK_END)
        self.announce(framed(HELLO, 0, AGENT_MAGIC, struct.pack(">Q?", size, LIBZSTD is not None)))

    def refuse_if_in_use(self) -> None:
        """Raise OSError if the device, or a part of it, is mounted or otherwise claimed: it would change meanwhile.

        A mount, also one that still replays its journal and is listed nowhere yet, has it exclusively: open(2), O_EXCL.
        """
        end = time.monotonic() + EXCLUSIVE_LIMIT
        while True:
            try:
                os.close(os.open(self.device, os.O_RDONLY | os.O_EXCL))
            except OSError as problem:
                if problem.errno != errno.EBUSY:
                    raise
                if time.monotonic() > end:
                    raise OSError(f"{self.device} is in use on the droplet: mounted, or part of something") from None
            else:
                return
            time.sleep(0.1)

    def take_commands(self) -> None:
        """Take commands until there is nobody to give them; the process ends with that."""
        self.guarded(self.obey)
        while self.commands.read(CHUNK):  # after a failure: whoever is sending hears of it when all is off their hands
            pass
        os._exit(0)

    def obey(self) -> None:
        """Do at once what the scan may be waiting for, and what is to be written; let others answer the rest."""
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
                self.requests.put((kind, index, pages))

    def write_pages(self, index: int, wanted: int) -> None:
        """Write the wanted pages of a chunk, as the frame that comes has them: those that it leaves out are zeros."""
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
        """Make room for other chunks."""
        with self.room:
            for dropped in range(index, index + count):
                self.announced.pop(dropped, None)
                self.held.pop(dropped, None)
            self.room.notify()

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
        """Send the wanted pages, save those that are zeros."""
        chunk, digests = self.held.get(index), self.pages_of(index)
        starts = {page: page * DIGEST_SIZE for page in pages_in(wanted)}
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


# agent: end
# Taken as this file is loaded: by the time an agent is started, an update may have changed the file.
AGENT = "".join(re.findall(r"(?ms)^# agent: begin$(.*?)^# agent: end$", Path(__file__).read_text(encoding="utf-8")))


def agent_source(device: str, parts: Sequence[tuple[int, int]], window: int, *, writes: bool = False) -> bytes:
    """The agent's program; it says in the agent's frames if the droplet's Python is too old for it."""
    packer = f"Packer({LIBZSTD is not None})"
    start = f"Agent({device!r}, {parts!r}, {window}, {packer}, sys.stdin.buffer, 1).run(writes={writes})\n"
    source = f"from __future__ import annotations\nimport sys\n{AGENT}"
    return f"""import struct, sys
if sys.version_info < (3, 8):
    text = "it has Python %d.%d, and 3.8 is needed: set \\"droplet_image\\" in conf.json" % sys.version_info[:2]
    sys.stdout.buffer.write(struct.pack({FRAME!r}, {FAILED}, 0, len(text)) + text.encode())
    sys.exit()
exec({source + start!r})
""".encode()


# ── Image files ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Where a backup lives on the local disk, and what its files are made of. Knows files only.
#
#   backups/NAME                         the image: sparse, byte for byte the volume
#   backups/NAME.partial                 a first sync that is not complete yet
#   backups/.dosvob/NAME.state           the state: a sealed block, then the digest of each chunk
#   backups/.dosvob/NAME.state.new       the same of the sync that goes on
#   backups/.dosvob/NAME.spool           the patches that the sync that goes on has fetched
#   backups/.dosvob/NAME.undo            what the image had in those places
#   backups/.dosvob/NAME.versions/TIME   a version: an undo that was kept, named by its snapshot's time (UTC)
#   NAME.set-aside-…, .versions.of-…     what did not belong together: for the user
#   backups/.dosvob/lock, home, wanted.json   the home's: see `Home`
#
# With several regions all of these are in backups/REGION.
#
# What is to be overwritten is first written elsewhere, and until the state says otherwise that is put back. So a sync
# of an existing image goes through these steps. Beside each stands what a crash in it leaves:
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
ALL_PAGES = (1 << PAGES) - 1
ZERO_CHUNK = bytes(CHUNK)
ZERO_PAGES = ZERO_PAGE_DIGEST * PAGES
ZERO_DIGEST = chunk_digest(ZERO_PAGES)
LIBC = ctypes.CDLL(None, use_errno=True)


def digest_of(chunk: bytes) -> bytes:
    """The digest of a chunk, without work for ZERO_CHUNK."""
    return ZERO_DIGEST if chunk is ZERO_CHUNK else chunk_digest(page_digests(chunk))


class Damaged(DosvobError):
    """A file of ours is not what was written."""


def seal(kind: str, content: Json) -> bytes:
    """A block that tells by itself whether it is whole: a line with its kind, JSON, and the SHA-256 of all before."""
    body = f"dosvob {kind} 1\n{json.dumps({'version': 1, **content})}\n".encode()
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
    if (version := content.pop("version")) != 1:
        raise DosvobError(
            f"{path} was written by a newer dosvob (format {version}): update dosvob; nothing was changed"
        )
    return content


def is_unreadable(problem: OSError) -> bool:
    """Whether it tells that the disk does not have any more what was written, or has it damaged."""
    return problem.errno in (errno.EIO, errno.EBADMSG, errno.EUCLEAN)


def is_disk_full(problem: BaseException) -> bool:
    """Whether it tells of a full disk, or of a quota."""
    return isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)


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
        """Whether a file has the same inode after a remount: FUSE makes them up, many of its file systems each time."""
        return not self.kind.startswith("fuse")


def identity_of(path_or_fd: Path | int) -> dict[str, int]:
    """What tells that a file was not touched since: size in bytes, inode (0 if that tells nothing), mtime in ns."""
    status, has_inode = os.stat(path_or_fd), Mount.of(path_or_fd).keeps_inodes
    return {"size": status.st_size, "inode": status.st_ino * has_inode, "mtime_ns": status.st_mtime_ns}


def stamp(fd: int, not_before: int = 0) -> None:
    """Give a file the time of now in whole seconds, which every file system keeps, also at a rename; durably."""
    seconds = max(int(time.time()), not_before)
    os.utime(fd, ns=(seconds * 10**9, seconds * 10**9))
    os.fsync(fd)


class LoopDevices:
    """The loop devices of this machine, by which an image is looked into."""

    GET_STATUS = 0x4C05  # LOOP_GET_STATUS64 of loop(4)
    STATUS = struct.Struct("=QQ216x")  # struct loop_info64: device and inode of the file

    @classmethod
    def over(cls, path: Path) -> list[str]:
        """Those that are over a file, each with where it is mounted."""
        status = path.stat()
        file, name = (status.st_dev, status.st_ino), os.path.realpath(path)
        return [
            cls._described(device)
            for device in sorted(Path("/sys/block").glob("loop*"))
            if cls._told(device / "loop" / "backing_file") == name or cls._file(device.name) == file
        ]

    @staticmethod
    def _told(path: Path) -> str:
        """What a file of /sys tells; nothing if it is not there, as that of a device that is over no file."""
        with contextlib.suppress(OSError):
            return path.read_text(errors="surrogateescape").removesuffix("\n")
        return ""

    @classmethod
    def _file(cls, name: str) -> tuple[int, int] | None:
        """Device and inode of what it is over, if we may ask for that: the path may be another one here."""
        with contextlib.suppress(OSError):
            fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                device, inode = cls.STATUS.unpack(fcntl.ioctl(fd, cls.GET_STATUS, bytes(cls.STATUS.size)))
                return device, inode
            finally:
                os.close(fd)
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
        """When it was taken; if what DigitalOcean says of that cannot be, when it was known here.

        Versions are named and thinned by it, so a time that is far in the future would spoil all that come after.
        """
        taken = parse_time(self.taken_at)
        if taken is None or taken.year < 2000 or taken - known_at > datetime.timedelta(days=1):
            taken = known_at
        return taken.replace(microsecond=0)  # as it is listed


@dataclass(frozen=True)
class State:
    """What is known of an image; the digests are in the file, behind this block.

    `reread` is the part of the image that the last sync read again; `digests` the SHA-256 of the table of digests;
    `identity` what `identity_of` said of the image, None if somebody wrote to it during the sync.
    """

    snapshot: Snapshot
    completed_at: str
    reread: int
    digests: str
    identity: dict[str, int] | None

    @classmethod
    def unpack(cls, block: bytes, path: Path) -> State:
        """From the block that a state file begins with; raises Damaged, or DosvobError for a newer dosvob's."""
        content = unseal("state", block, path) or {}
        content.pop("journal", None)  # of dosvob before it had an undo
        try:
            return cls(snapshot=Snapshot(**content.pop("snapshot")), **content)
        except (TypeError, KeyError):
            raise Damaged(
                f"{path} is damaged; the image was left as it is. Delete that file, and the next run compares all of "
                "the image with the volume"
            ) from None

    @classmethod
    def load(cls, path: Path, *, whole: bool = True) -> State | None:
        """Read and verify a state file, with its table unless not the `whole` is wanted; None if there is none."""
        try:
            with path.open("rb") as file:
                state = cls.unpack(file.read(BLOCK), path)
                is_sound = not whole or hashlib.file_digest(file, "sha256").hexdigest() == state.digests
        except FileNotFoundError:
            return None
        except OSError as problem:
            if not is_unreadable(problem):
                raise
            is_sound = False
        return state if is_sound else cls.unpack(b"", path)

    def write(self, path: Path) -> None:
        """Put it before the digests that are in a file, and make it all durable."""
        with contextlib.closing(SparseFile(path, os.O_WRONLY)) as file:
            file.write(seal("state", dataclasses.asdict(self)), 0)
            os.fsync(file.fd)

    @property
    def moment(self) -> datetime.datetime:
        """When the snapshot was taken."""
        return self.snapshot.moment(parse_time(self.completed_at) or utc_now())


class ImagePaths:
    """The files of one volume's backup, or of one that was set aside.

    Its name is the volume's; where several regions are backed up REGION/NAME, and it is all in a directory REGION.
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
        """Raise DosvobError if the image is a directory or a link that leads nowhere: what it led to will come back."""
        if self.image.is_dir():
            raise DosvobError(f"{self.image} is a directory, and its name is that of an image: move it elsewhere")
        if self.image.is_symlink() and not self.image.exists():
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
        """Rename the image, its versions and its state so that they are out of the way, but not lost.

        `moment` is when the image's snapshot was taken, as the state or else the versions tell: so what a crash left of
        this is completed under the same name. The image goes first, for without it the others are set aside too.
        """
        stamp = f"{self.image.name}.set-aside-{moment.strftime('%Y%m%dT%H%M%SZ')}"
        for number in itertools.count():
            aside = ImagePaths(self.directory, f"{stamp}{f'-{number}' * bool(number)}")
            moves = [(self.image, aside.image), (self.versions, aside.versions), (self.state, aside.state)]
            if not aside.state.exists() and not any(old.exists() and new.exists() for old, new in moves):
                break
        for old, new in moves:
            if old.exists():
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

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write at an offset, all of it."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, offset)
            view, offset = view[written:], offset + written

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

    def chunk_holes(self, first: int, end: int) -> Iterator[bool]:
        """For each of these chunks, in order, whether it is said to be a hole: one look for all that a hole is made of.

        That is believed where zeros are recorded, and nowhere else.
        """
        data = 0
        for index in range(first, end):
            if index * CHUNK >= data:
                data = self.end_of_hole(index * CHUNK, end * CHUNK)
            yield (index + 1) * CHUNK <= data

    def free_space(self) -> int:
        """The bytes that are free where it is, for everybody: of the rest root cannot write all either."""
        status = os.fstatvfs(self.fd)
        return status.f_bavail * status.f_frsize

    def forget_cached(self, offset: int = 0, length: int = 0) -> None:
        """Have the next reads of it, or of a part of it, come from the disk.

        It may have decayed there; and after a write error, which may have been told to a process that has ended, the
        kernel goes on showing what never got there: https://wiki.postgresql.org/wiki/Fsync_Errors
        """
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # what is not on the disk yet would not be forgotten
                os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it; once more does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@dataclass(frozen=True)
class Patch:
    """New contents for some pages of a chunk, and the digest that the whole chunk has then.

    `pages` is the bitmap of the pages that it is about; `data` has those of them that are in
    the bitmap `filled`, in order; the others become zeros. In a file a header goes before the data. Its checksum binds
    it to the file's id, so that no old data on the disk can pass for it: the first half of the SHA-256 of the id, the
    other fields, and the data.
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
        """The runs of pages that are alike: (offset and length in the chunk in bytes, data; None for zeros)."""
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
        """The wanted ones of the pages in the data, which has those of the bitmap `among`."""
        if wanted == among:
            return data
        places = enumerate(pages_in(among))
        return b"".join([data[place * PAGE : (place + 1) * PAGE] for place, page in places if wanted >> page & 1])

    @classmethod
    def of(cls, index: int, pages: int, data: bytes, digest: bytes) -> Patch:
        """The patch that puts these pages of a chunk, which the data has, there."""
        places = enumerate(pages_in(pages))
        filled = sum(1 << page for place, page in places if not data.startswith(ZERO_PAGE, place * PAGE))
        return cls(index, pages, filled, cls.select(data, filled, pages), digest)

    @classmethod
    def of_image(cls, file: SparseFile, index: int, pages: int, digest: bytes) -> Patch:
        """What these pages of an image have now; zeros for what the disk cannot read, which the digest will tell."""
        pieces = []
        for first, count in runs(pages):
            start, length = index * CHUNK + first * PAGE, count * PAGE
            data = file.read(start, length)
            if data is None:  # then page by page: what can be read is kept
                data = b"".join([file.read(place, PAGE) or ZERO_PAGE for place in range(start, start + length, PAGE)])
            pieces.append(data)
        return cls.of(index, pages, b"".join(pieces), digest)


class PatchFile:
    """A file of patches, as a spool, an undo and a version are: a sealed head, patches, a sealed footer. To be closed.

    The footer is the last block of a file that is whole; a spool has none. `head` and `footer` are the contents of
    these: {} for a head that is damaged, None for a footer that is not there. Several threads may read it, also what
    one of them has just appended. Raises DosvobError for a newer dosvob's, FileNotFoundError. `from_disk`: as
    SparseFile.forget_cached.
    """

    def __init__(self, path: Path, kind: str, flags: int = os.O_RDONLY, *, from_disk: bool = False) -> None:
        self.path = path
        self._file = SparseFile(path, flags)
        try:
            if from_disk:
                self._file.forget_cached()
            size = os.fstat(self._file.fd).st_size
            self.head = unseal(kind, self._file.read(0, BLOCK) or b"", path) or {}
            footer = unseal("end", self._file.read(size - BLOCK, BLOCK) or b"", path) if size >= 2 * BLOCK else None
        except BaseException:
            self.close()
            raise
        self.footer = None if footer is None or (self.head and footer["id"] != self.head["id"]) else footer
        self.limit = size - BLOCK * (self.footer is not None)  # of the patches
        self._changed = 0  # bytes

    @classmethod
    def create(cls, path: Path, kind: str, head: Json) -> PatchFile:
        """A new file, to be appended to, in place of what is there."""
        path.unlink(missing_ok=True)
        with contextlib.closing(SparseFile(path, os.O_WRONLY | os.O_CREAT)) as file:
            file.write(seal(kind, head), 0)
        return cls(path, kind, os.O_RDWR)

    def append(self, patch: Patch) -> int:
        """Append a patch; returns its position."""
        position = self.limit
        self._file.write(patch.pack(self.head["id"]), position)
        self._file.write(patch.data, position + Patch.HEADER.size)
        self.limit += patch.length
        self._changed += patch.pages.bit_count() * PAGE
        return position

    def cut(self, position: int) -> None:
        """Go on there, behind the good part of what a crash left."""
        os.ftruncate(self._file.fd, position)
        self.limit = position

    def complete(self) -> None:
        """Make all patches durable, then the footer."""
        os.fsync(self._file.fd)
        self.footer = {"id": self.head["id"], "changed": self._changed}
        self._file.write(seal("end", self.footer), self.limit)
        os.fsync(self._file.fd)

    def header_at(self, position: int) -> Patch:
        """The patch at a position, without its data and not verified; raises Damaged if there is none."""
        header = self._file.read(position, Patch.HEADER.size) or bytes(Patch.HEADER.size)
        magic, index, pages, filled, digest, _ = Patch.HEADER.unpack(header)
        if magic != Patch.MAGIC:
            raise Damaged(f"{self.path} is damaged at byte {position}")
        return Patch(index, int.from_bytes(pages, "little"), int.from_bytes(filled, "little"), b"", digest)

    def patch_at(self, position: int) -> Patch:
        """The patch at a position; raises Damaged if it is not whole."""
        header = self.header_at(position)
        stored = self._file.read(position, header.length) or b""
        patch = dataclasses.replace(header, data=memoryview(stored)[Patch.HEADER.size :])
        if patch.filled & ~patch.pages or patch.pack(self.head.get("id", "")) != stored[: Patch.HEADER.size]:
            raise Damaged(f"{self.path} is damaged at byte {position}")
        return patch

    def find_patch(self, position: int) -> int:
        """Where the next whole patch at or behind a position begins; `limit` if there is none."""
        while position < self.limit:
            block = self._file.read(position, min(CHUNK, self.limit - position))
            found = block.find(Patch.MAGIC) if block is not None else -1
            if found >= 0:
                with contextlib.suppress(Damaged):
                    self.patch_at(position + found)
                    return position + found
            # what cannot be read is passed over by its pages
            position += found + 1 if found >= 0 else PAGE if block is None else max(len(block) - 3, 1)
        return self.limit

    def patches(self, *, data: bool = True) -> Iterator[tuple[int, Patch]]:
        """All patches with their positions, or their headers; raises Damaged at the first one that is not whole."""
        position = BLOCK
        while position < self.limit:
            patch = self.patch_at(position) if data else self.header_at(position)
            yield position, patch
            position += patch.length

    def close(self) -> None:
        """Close the file."""
        self._file.close()

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
    file takes. Without a head nothing is known but the time, by the file's name.
    """

    path: Path
    moment: datetime.datetime
    is_whole: bool
    snapshot: Snapshot | None
    newer: Snapshot | None
    changed: int
    occupied: int

    TIME = "%Y%m%dT%H%M%SZ"

    @classmethod
    def load(cls, path: Path) -> Version:
        """From its file; raises FileNotFoundError, DosvobError for a newer dosvob's, Damaged without even a time."""
        with PatchFile(path, "version") as file:
            head, footer = file.head, file.footer
        try:
            moment = datetime.datetime.strptime(head.get("time", path.name), cls.TIME).replace(tzinfo=datetime.UTC)
        except ValueError:
            raise Damaged(f"{path} is damaged") from None
        snapshot, newer = (Snapshot(**head[key]) if head else None for key in ("snapshot", "newer"))
        is_whole, changed = bool(head) and footer is not None, footer["changed"] if footer else 0
        return cls(path, moment, is_whole, snapshot, newer, changed, path.stat().st_size)

    def is_loose(self, newer: Sequence[Snapshot | None]) -> bool:
        """Whether it leads back from none of the newer snapshots, so that what is between is missing.

        None stands for one that is not known, being damaged: then that one tells, and this one leads back from it.
        """
        return self.newer is not None and None not in newer and self.newer not in newer


class Versions:
    """The versions of an image."""

    def __init__(self, paths: ImagePaths) -> None:
        self._paths = paths

    def all(self) -> list[Version]:
        """All of them, the newest first; also an undo that counts, and did not get its name yet."""
        versions = []
        with Undo.left(self._paths) as undo:
            if undo is not None and undo.is_committed and undo.is_version:
                versions.append(Version.load(self._paths.undo))
        for path in sorted(self._paths.versions.glob("*"), reverse=True):
            with contextlib.suppress(FileNotFoundError, Damaged):  # thinned by a run that goes on; not ours
                if re.fullmatch(r"\d{8}T\d{6}Z", path.name) and path.is_file():
                    versions.append(Version.load(path))
        return versions

    def thin(self, keep: Keep, heed: Callable[[int], None] = lambda _: None) -> None:
        """Drop those that `keep` does not ask for; raises OSError, Damaged, and has dropped none wrongly then.

        What a version has that is to be dropped goes into the next older one that stays: that one's new file, which
        leads back over both, takes its place, and then the other is removed. Until then the chain leads to the same
        contents, since what an older patch says of a page covers what a newer one says.
        """
        for unfinished in self._paths.versions.glob("*.new"):
            unfinished.unlink()
        versions = self.all()
        image = Versions.moment_of_image(State.load(self._paths.state, whole=False), versions) or utc_now()
        wanted = keep.wanted([image, *(version.moment for version in versions)])[1:]
        groups: list[list[Version]] = [[]]  # each ends with one that stays, the last one has none
        for version, stays in zip(versions, wanted, strict=True):
            groups[-1].append(version)
            if stays:
                groups.append([])
        self._remove(groups.pop())  # first, for that needs no room, but makes some
        damaged: Damaged | None = None
        for *dropped, version in groups:
            try:
                if dropped:
                    self._merge([*dropped, version], heed)
                    self._remove(dropped)
            except Damaged as problem:  # which is no reason to keep others for ever
                damaged = problem
        if damaged:
            raise damaged

    def _remove(self, versions: Sequence[Version]) -> None:
        """Remove versions, the oldest first: what is left leads back to what it did. They come the newest first."""
        for version in reversed(versions):
            version.path.unlink()
            sync_directory(self._paths.versions)

    def _merge(self, versions: Sequence[Version], heed: Callable[[int], None]) -> None:
        """Let the last of the versions, the oldest, lead back over all of them, which come the newest first."""
        oldest, known = versions[-1], [versions[0].newer]
        for version in versions:
            if not version.is_whole:
                raise Damaged(f"{version.path} is damaged")
            if version.is_loose(known):
                raise Damaged(f"what {version.path} leads back from is missing")
            known.append(version.snapshot)
        target = oldest.path.with_name(f"{oldest.path.name}.new")
        with contextlib.ExitStack() as files:
            opened = [files.enter_context(PatchFile(version.path, "version")) for version in versions]
            head = {**opened[-1].head, "id": secrets.token_hex(16), "newer": opened[0].head["newer"]}
            size = head["snapshot"]["size"]
            merged = files.enter_context(PatchFile.create(target, "version", head))
            streams = [PatchStream(file) for file in opened]
            try:
                for index, patches in PatchStream.by_chunk(streams):
                    if index < size // CHUNK:
                        merged.append(self._one_of([*patches.values()]))
                    heed(sum(patch.length for patch in patches.values()))
                for stream in streams:
                    if stream.doubtful:
                        raise Damaged(f"{stream.file.path} is damaged")
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
    def freed_by(version: Version, older: Version | None) -> int:
        """The bytes that removing one would free: those that the next older one need not take over; raises Damaged."""
        if older is None or older.snapshot is None:
            return version.occupied
        taken_over = 0
        with PatchFile(version.path, "version") as file, PatchFile(older.path, "version") as older_file:
            headers = [(patch for _, patch in each.patches(data=False)) for each in (file, older_file)]
            for index, patches in PatchStream.by_chunk(headers):
                if 0 in patches and index < older.snapshot.size // CHUNK:
                    has_own, own = 1 in patches, patches[1].pages if 1 in patches else 0
                    taken_over += (patches[0].filled & ~own).bit_count() * PAGE + Patch.HEADER.size * (not has_own)
        return version.occupied - taken_over

    @staticmethod
    def moment_of_image(state: State | None, versions: Sequence[Version]) -> datetime.datetime | None:
        """When the image's snapshot was taken; without a state by what the newest version leads back from."""
        newer = versions[0].newer if versions else None
        if state is not None:
            return state.moment
        return newer.moment(utc_now()) if newer else None


class PatchStream:
    """The whole patches of a version, in the order of the chunks, whatever is damaged between them.

    `doubtful` are the chunks that the damaged ones may have been of, as far as was read: ranges, neither end included.
    """

    def __init__(self, file: PatchFile, *, is_loose: bool = False) -> None:
        self.file = file
        self.doubtful: list[tuple[int, float]] = [(-1, float("inf"))] if is_loose else []

    def __iter__(self) -> Iterator[Patch]:
        file, position, last, is_damaged = self.file, BLOCK, -1, False
        while file.head and position < file.limit:
            try:
                patch = file.patch_at(position)
                position += patch.length
            except Damaged:
                patch = None
                position = file.find_patch(position + 1)
            if patch is None or patch.index <= last:
                is_damaged = True
                continue
            if is_damaged:
                self.doubtful.append((last, patch.index))
            last, is_damaged = patch.index, False
            yield patch
        if is_damaged or not file.head or file.footer is None:
            self.doubtful.append((last, float("inf")))

    @staticmethod
    def by_chunk(streams: Iterable[Iterable[Patch]]) -> Iterator[tuple[int, dict[int, Patch]]]:
        """The chunks that have patches, in order, each with its patches by the numbers of their streams."""
        numbered = [zip(itertools.repeat(number), stream) for number, stream in enumerate(streams)]
        merged = heapq.merge(*numbered, key=lambda item: item[1].index)
        for index, patches in itertools.groupby(merged, key=lambda item: item[1].index):
            yield index, dict(patches)


class Undo:
    """What an image had in the places that a sync changes: old contents of pages, the length and the time of the file.

    All recovery is to put that back, unless the state is the one that the undo leads back from (`is_committed`). Then
    it is the newest version, or of no use if none is to be kept (`is_version`). If the state is neither that one nor
    the one before, somebody put other files there, and the undo is of no use either (`is_stray`).
    """

    def __init__(self, paths: ImagePaths, file: PatchFile) -> None:
        """Raises DosvobError for a newer dosvob's state."""
        self.paths = paths
        self.file = file
        self.is_version = bool(file.head["time"])
        self.is_committed = self.is_stray = False
        with contextlib.suppress(Damaged):  # a state that nobody can read says nothing
            if (state := State.load(paths.state, whole=False)) is not None:
                snapshot, newer = dataclasses.asdict(state.snapshot), (file.head["newer"], file.head["newer_digests"])
                self.is_committed = (snapshot, state.digests) == newer
                self.is_stray = not self.is_committed and snapshot != file.head["snapshot"]

    @classmethod
    @contextlib.contextmanager
    def left(cls, paths: ImagePaths, *, from_disk: bool = False) -> Iterator[Undo | None]:
        """The undo that is there, if it is whole and of the image; else None."""
        with contextlib.ExitStack() as files:
            undo = None
            with contextlib.suppress(FileNotFoundError):
                file = files.enter_context(PatchFile(paths.undo, "version", from_disk=from_disk))
                undo = cls(paths, file) if file.head and file.footer is not None else None
            yield undo if undo is not None and not undo.is_stray else None

    @classmethod
    def write(
        cls,
        paths: ImagePaths,
        image: SparseFile,
        head: Json,
        differing: Iterable[tuple[int, int, bytes]],
        heed: Callable[[int], None],
    ) -> Undo:
        """Step 2 of a sync: the undo, durable. To be closed. If that fails, there is none.

        `differing` are the chunks that the two snapshots differ in: index, bitmap of the pages that the sync changes,
        and the digest that the chunk had.
        """
        file = PatchFile.create(paths.undo, "version", {"id": secrets.token_hex(16), **head})
        try:
            for index, pages, digest in differing:
                patch = Patch.of_image(image, index, pages, digest)
                file.append(patch)
                heed(patch.length)
            file.complete()
            sync_directory(paths.metadata)
            return cls(paths, file)
        except BaseException:
            file.close()
            paths.undo.unlink()
            raise

    @classmethod
    def recover(cls, paths: ImagePaths, heed: Callable[[int], None]) -> bool:
        """Finish what a sync left that a crash ended, with no network; returns whether an undo was put back.

        `heed` gets the bytes that were written, and may raise `Interrupted`: the next call begins from the start.
        """
        paths.check_link()
        drop_journal(paths)
        with cls.left(paths, from_disk=True) as undo:
            if undo is None:
                paths.undo.unlink(missing_ok=True)
            elif undo.is_committed:
                undo.settle()
            elif not paths.image.exists():
                undo.drop()
            else:
                paths.check_unread()
                undo.put_back(heed)
                return True
        return False

    def put_back(self, heed: Callable[[int], None]) -> None:
        """Make the image what it was.

        It also gets its old time, so that its state and the spool still fit it; unless a part of the undo decayed, for
        then the next sync must compare all of the image.
        """
        base, patches = self.file.head["base"], PatchStream(self.file)
        with contextlib.closing(SparseFile(self.paths.image, os.O_RDWR)) as image:
            image.forget_cached()  # what a write error left in there, ext4 does not write when it is written again
            for patch in patches:
                patch.write_to(image)
                heed(patch.length)
            os.ftruncate(image.fd, base["size"])
            os.fsync(image.fd)  # before its time says that it is the old one
            if not patches.doubtful:
                os.utime(image.fd, ns=(base["mtime_ns"], base["mtime_ns"]))
                os.fsync(image.fd)
        self.drop()

    def settle(self) -> None:
        """Step 6 of a sync."""
        if self.is_version:
            if not self.paths.versions.exists():
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

    def close(self) -> None:
        """Close its file."""
        self.file.close()


def drop_journal(paths: ImagePaths) -> None:
    """Drop what dosvob before it had an undo left in the middle of a sync: a journal, and a version that was to be.

    Raises DosvobError if the journal counts, or may count: only the dosvob that wrote it can finish that.
    """
    journal = paths.metadata / f"{paths.image.name}.journal"
    with contextlib.suppress(FileNotFoundError), PatchFile(journal, "journal") as file:
        if file.footer is not None or (file.limit and not file.head):
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


class Chain:
    """An image and all that leads back from it: what each snapshot was, chunk by chunk. To be closed.

    An undo that is to be put back is laid over what is read, so nothing is changed. `versions` are the newest first;
    `problem` is what is wrong with the state, without which versions can be restored all the same; `moment` is when the
    image's snapshot was taken, None if unknown; `size` is that of the snapshot in bytes, `length` what there is of it.
    Raises FileNotFoundError without an image.
    """

    READ_BACK = 64  # chunks that a restore writes before it reads them from the disk

    def __init__(self, paths: ImagePaths, *, from_disk: bool = False) -> None:
        self.paths = paths
        self.state: State | None = None
        self.problem: Damaged | None = None
        self._from_disk = from_disk
        self._table: SparseFile | None = None
        paths.check_link()
        with contextlib.ExitStack() as files:
            self.image = files.enter_context(contextlib.closing(SparseFile(paths.image)))
            if from_disk:
                self.image.forget_cached()
            self.versions = Versions(paths).all()
            undo = files.enter_context(Undo.left(paths, from_disk=from_disk))
            self._undo = undo.file if undo is not None and not undo.is_committed else None
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
            self.moment = Versions.moment_of_image(self.state, self.versions)
            self._files = files.pop_all()

    def depth_at(self, moment: datetime.datetime | None) -> int:
        """How many steps back the newest snapshot is that is not later than a time; 0, the image's, without a time.

        Raises UsageError if there is none as old as that.
        """
        if moment is None:
            return 0
        if self.moment is None:
            raise UsageError(f"no snapshot is recorded for {self.paths.image}, so there is no version by time")
        moments = [self.moment, *(version.moment for version in self.versions)]
        for depth, candidate in enumerate(moments):
            if candidate <= moment:
                return depth
        raise UsageError(
            f"{self.paths.name} has no version as old as {local_time(moment)}; the oldest is of "
            f"{local_time(moments[-1])}"
        )

    def chunks(self, depth: int) -> Iterator[tuple[int, list[bytes], list[bool]]]:
        """For each chunk its index, its contents and whether they are sound: as the image has it, and `depth` versions.

        Contents that are the same are the same object; zeros are ZERO_CHUNK. A chunk is sound if it has the
        digest that was recorded for it; of an image without a state, where none is, if it is there and can be read.
        """
        known = [self._snapshot]
        streams = [PatchStream(self._undo)] if self._undo else []
        steps_before = len(streams)  # the image's
        with contextlib.ExitStack() as files:
            for version in self.versions[:depth]:
                file = files.enter_context(PatchFile(version.path, "version", from_disk=self._from_disk))
                streams.append(PatchStream(file, is_loose=version.is_loose(known)))
                known.append(version.snapshot)
            patched = PatchStream.by_chunk(streams)
            upcoming = next(patched, None)
            for index, is_hole in enumerate(self.image.chunk_holes(0, self.size // CHUNK)):
                patches: dict[int, Patch] = {}
                if upcoming is not None and upcoming[0] == index:
                    patches = upcoming[1]
                    upcoming = next(patched, None)
                undone = patches.get(0) if self._undo else None
                chunk, is_sound = self._image_chunk(index, undone, is_hole=is_hole)
                contents, soundness = [chunk], [is_sound]
                for number, stream in itertools.islice(enumerate(streams), steps_before, None):
                    if number in patches:
                        chunk = patches[number].over(chunk)
                        is_sound = chunk_digest(page_digests(chunk)) == patches[number].digest
                    elif any(first < index < end for first, end in stream.doubtful):  # it may have had one
                        is_sound = False
                    contents.append(chunk)
                    soundness.append(is_sound)
                yield index, contents, soundness

    def _image_chunk(self, index: int, undone: Patch | None, *, is_hole: bool) -> tuple[bytes, bool]:
        """A chunk of the image, with what the undo has of it, and whether it is sound."""
        recorded = undone.digest if undone else None
        if self._table is not None:
            recorded = self._table.read(BLOCK + index * DIGEST_SIZE, DIGEST_SIZE) or b""
        stored = ZERO_CHUNK if is_hole and recorded == ZERO_DIGEST and not undone else self.image.chunk(index)
        chunk = undone.over(stored or ZERO_CHUNK) if undone else stored or ZERO_CHUNK
        is_cut = recorded is None and (index + 1) * CHUNK > self.length
        if is_cut or (stored is None and undone is None):
            return chunk, False
        return chunk, recorded is None or recorded == digest_of(chunk)

    def verify(self, heed: Callable[[int], None]) -> list[Ranges]:
        """Compare the image and all versions with their digests; what is damaged of each, the image first."""
        damaged = [Ranges() for _ in range(1 + len(self.versions))]
        snapshots = [version.snapshot for version in self.versions]
        sizes = [self.size, *(snapshot.size if snapshot else self.size for snapshot in snapshots)]
        for index, _, soundness in self.chunks(len(self.versions)):
            for ranges, size, is_sound in zip(damaged, sizes, soundness, strict=True):
                if not is_sound and index * CHUNK < size:
                    ranges.add(index)
            heed(CHUNK)
        return damaged

    def restore(self, depth: int, target: Path, heed: Callable[[int], None]) -> tuple[Path, Ranges]:
        """Write what the image or, `depth` steps back, a version was into a new, sparse file.

        Returns the file, and what of it is damaged: then it is not `target`, but `target.damaged`. Until it is whole it
        is `target.partial`, which is removed if it does not come to that. Raises DosvobError if one of them exists
        already, or there is not enough room, OSError.
        """
        snapshot = self.versions[depth - 1].snapshot if depth else None
        size = snapshot.size if snapshot else self.size
        partial, damaged_target = (target.with_name(f"{target.name}.{what}") for what in ("partial", "damaged"))
        for path in (target, partial, damaged_target):
            if os.path.lexists(path):
                raise DosvobError(
                    f"{path} is there, and nothing is restored over it: move it away, or name another file"
                )
        damaged = Ranges()
        written: list[tuple[int, bytes, bool]] = []  # what is to be read back
        with contextlib.closing(SparseFile(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL)) as file:
            try:
                is_cloned = self._clone_to(file, depth)
                os.ftruncate(file.fd, size)
                for index, contents, soundness in itertools.islice(self.chunks(depth), size // CHUNK):
                    content, base = contents[depth], contents[0] if is_cloned else ZERO_CHUNK
                    if content is not base:
                        pages = ((page, page * PAGE) for page in range(PAGES))
                        differing = sum(
                            1 << page for page, at in pages if base[at : at + PAGE] != content[at : at + PAGE]
                        )
                        if is_cloned and base is ZERO_CHUNK:  # it may stand for what the disk cannot read
                            differing = ALL_PAGES
                        Patch.of(index, differing, Patch.select(content, differing), b"").write_to(file)
                    written.append((index, content, soundness[depth]))
                    if len(written) == self.READ_BACK:
                        self._read_back(file, written, damaged)
                    heed(CHUNK)
                self._read_back(file, written, damaged)
                os.fsync(file.fd)
                rename_new(partial, final := damaged_target if damaged.ranges else target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return final, damaged

    @staticmethod
    def _read_back(file: SparseFile, written: list[tuple[int, bytes, bool]], damaged: Ranges) -> None:
        """Compare what a restored file has on the disk with what it is to have, and write again what it has not.

        `written` are chunks that follow each other: index, content, whether that is sound. ZFS has been seen to share
        with a clone what was there before.
        """
        for attempt in (1, 2):
            if written:
                file.forget_cached(written[0][0] * CHUNK, len(written) * CHUNK)
            wrong = {index: content for index, content, _ in written if file.chunk(index) != content}
            for index, content in wrong.items() if attempt == 1 else ():
                file.write(content, index * CHUNK)
        for index, _, is_sound in written:
            if index in wrong or not is_sound:
                damaged.add(index)
        written.clear()

    def _clone_to(self, file: SparseFile, depth: int) -> bool:
        """Make a file share the image's content; if its file system cannot, make sure that there is room for a copy."""
        with contextlib.suppress(OSError):
            if self._undo is None:  # else the image is not what the first step back begins with
                fcntl.ioctl(file.fd, 0x40049409, self.image.fd)  # FICLONE of ioctl_ficlone(2)
                self.image.forget_cached()  # what is on the disk is what they share
                return True
        os.ftruncate(file.fd, 0)  # it may have got a part before it failed
        older = sum(version.occupied for version in self.versions[:depth])
        needed, free = os.fstat(self.image.fd).st_blocks * 512 + older, file.free_space()
        if needed > free:
            raise DosvobError(
                f"{file.path} may take up to {human_size(needed)}, and {human_size(free)} are free there: make room"
            )
        return False

    def close(self) -> None:
        """Close all files."""
        self._files.close()


def rename_new(old: Path, new: Path) -> None:
    """Rename, durably, but not over an existing file; raises DosvobError then, and leaves the old name."""
    if os.path.lexists(new):
        raise DosvobError(f"{new} has appeared meanwhile: move it away")
    old.rename(new)
    sync_directory(new.parent)


# ── The update of an image ───────────────────────────────────────────────────────────────────────────────────────────
# One sync's side of the local disk: what the image has, what becomes of it, and the end of that. Knows files only.


class Spool:
    """The patches that a sync has fetched: of each chunk the last one counts. 8 bytes are kept for each of the volume.

    Each is made for the image as it is, without those before it. The spool promises nothing: the next sync uses what is
    whole of it, if the image is still what it was begun for.
    """

    def __init__(self, file: PatchFile, chunks: int) -> None:
        self.file = file
        self.positions = array.array("Q", [0]) * chunks  # in the file; 0: none

    @classmethod
    def open(cls, paths: ImagePaths, volume_id: str, chunks: int, heed: Callable[[int], None]) -> Spool:
        """The spool of the sync that begins: what another one left, if it fits, or a new one."""
        base, fits = identity_of(paths.image), False
        with contextlib.suppress(FileNotFoundError), PatchFile(paths.spool, "spool") as file:
            fits = (file.head.get("volume_id"), file.head.get("base")) == (volume_id, base)
        if not fits:
            head = {"id": secrets.token_hex(16), "volume_id": volume_id, "base": base}
            PatchFile.create(paths.spool, "spool", head).close()
        spool = cls(PatchFile(paths.spool, "spool", os.O_RDWR), chunks)
        spool.file.cut(spool._find_patches(heed))
        return spool

    def _find_patches(self, heed: Callable[[int], None]) -> int:
        """Read all of it; returns where its good part ends."""
        good = BLOCK
        with contextlib.suppress(Damaged):  # which is what a crash leaves
            for position, patch in self.file.patches():
                if patch.index >= len(self.positions):
                    break
                self.positions[patch.index] = position
                good = position + patch.length
                heed(patch.length)
        return good

    def append(self, patch: Patch) -> None:
        """From now on this is the chunk's patch."""
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
        """The bytes that the image takes at most when the spool is written to it, and the file system for its own.

        As if it copied what is overwritten, as Btrfs and ZFS do, and XFS of what is shared.
        """
        filled = sum(self.file.header_at(self.positions[index]).filled.bit_count() * PAGE for index in self.chunks())
        return filled + filled // 64 + (256 << 10) * bool(filled)


class LocalImage:
    """What the local image has, as its spool stands. Only reads.

    `suspects` are chunks that are not what the state says, or cannot be read, and are not done with. `is_new`: this
    sync made the file, of nothing but zeros, and what it has stored there is not asked for.
    """

    PARTS = 8  # every sync reads so great a part of the image again, in turn, to find what decayed on disk
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
        """That of a chunk by its index, digest that the state has, if any, and whether it is a hole."""
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
        if patch is not None and chunk is not None and chunk_digest(page_digests(patch.over(chunk))) == patch.digest:
            return patch.digest
        return digest

    def pages(self, index: int) -> bytes:
        """The digests of the pages of a chunk, without what the spool has; b"" if the disk cannot read it."""
        chunk = self._image.chunk(index)
        if chunk is None:
            self.suspects.add(index)
        return b"" if chunk is None else page_digests(chunk)


class Update:
    """What one sync makes of one image: patches that may come in any order within a window, and the end of it.

    Of a first sync everything goes straight into NAME.partial, of a later one into the spool. `changed` counts bytes;
    `differing` are the chunks of the image that were not what was recorded. `heed` is told of the bytes that are read
    or written at the beginning and the end, and may raise `Interrupted`. To be closed in any case; only `finish` makes
    it count.
    """

    SPACE_FOR_OTHERS = 1 << 30  # bytes that a first sync on a full disk leaves to the changes of other volumes

    def __init__(
        self,
        paths: ImagePaths,
        snapshot: Snapshot,
        keep: Keep,
        warn: Callable[[str], None],
        heed: Callable[[int], None] = lambda _: None,
        *,
        reread: bool = False,
    ) -> None:
        self.chunks = snapshot.size // CHUNK
        self.settled = 0  # so many chunks are done with, from the first on
        self.done: dict[int, bytes] = {}  # digests of chunks that are done, beyond `settled`
        self.changed = 0
        self.differing = Ranges()
        self._paths = paths
        self._snapshot = snapshot
        self._warn = warn
        self._heed = heed
        described = dataclasses.asdict(snapshot)
        seal("version", {"snapshot": described, "newer": described, "more": "." * 400})  # must be possible
        paths.check_link()
        paths.check_unread()
        self._state = self._fitting_state()
        self.is_first = not paths.image.exists()  # whether there is no image yet
        self._makes_version = bool(Versions(paths).all()) or (
            any(dataclasses.astuple(keep)) and self._state is not None
        )
        flags = os.O_RDWR | (os.O_CREAT if self.is_first else 0)
        is_new = self.is_first and not paths.partial.exists()
        self._image = SparseFile(paths.partial if self.is_first else paths.image, flags)
        self.spool = None if self.is_first else Spool.open(paths, snapshot.volume_id, self.chunks, heed)
        if self.is_first:
            os.ftruncate(self._image.fd, snapshot.size)
        new_state = create_private(paths.new_state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._new_state = os.fdopen(new_state, "wb", buffering=128 << 10)
        self._new_state.write(bytes(BLOCK))
        self._table = hashlib.sha256()
        self.local = LocalImage(paths, self._image, self.chunks, self._state, self.spool, reread=reread)
        self.local.is_new = is_new

    def _fitting_state(self) -> State | None:
        """The state, if it is this volume's; what belongs to another volume, or to no image, is set aside."""
        paths, size = self._paths, self._snapshot.size
        state, versions = State.load(paths.state), Versions(paths).all()
        is_other = state is not None and state.snapshot.volume_id != self._snapshot.volume_id
        if state is not None and not is_other and state.snapshot.size > size:
            raise DosvobError(
                f"DigitalOcean says that it has shrunk to {human_size(size)}, which no volume does; {paths.image} was "
                "left as it is: try again later"
            )
        has_image = paths.image.exists()
        length = paths.image.stat().st_size if has_image else 0
        if is_other or (state is None and length > size) or (versions and not has_image):
            aside = paths.set_aside(Versions.moment_of_image(state, versions) or utc_now())
            what = f"the image {paths.image} is of another volume that had this name, and" if has_image else (
                f"the image {paths.image} is gone, and its older versions, which are of no use without it,"
            )  # fmt: skip
            self._warn(f"{what} was set aside as {aside.image}: delete it when you no longer need it")
            has_image = False
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
            self._warn(f"the versions of {paths.name} do not lead back from its image; they were moved to {moved}")
        return state

    # What becomes of it

    def has_nothing_at(self, index: int, digest: bytes) -> bool:
        """Whether the image, by the chunk's local digest, has zeros there, or nothing that can be read."""
        return digest == b"" or (digest == ZERO_DIGEST and not (self.spool and self.spool.positions[index]))

    @property
    def window(self) -> int:
        """How many chunks the agent may be ahead; few in a first sync, of which all is fetched, lest it reads twice."""
        return HELD if self.is_first else WINDOW

    def count_done(self) -> int:
        """How many chunks are done with, in whatever order."""
        return self.settled + len(self.done)

    def keep(self, index: int, digest: bytes) -> None:
        """The chunk is as it should be, as the spool stands."""
        if self.spool and (header := self.spool.header(index)):
            if header.digest == digest:
                self.changed += header.pages.bit_count() * PAGE
            else:  # it has become again what the image has: what was fetched for it is not to be written
                self.spool.append(Patch(index, 0, 0, b"", digest))
        self._settle(index, digest)

    def store(self, patch: Patch) -> None:
        """Change a chunk of the image, when all of the sync counts."""
        self.changed += patch.pages.bit_count() * PAGE
        if self.spool:
            self.spool.append(patch)
        else:
            patch.write_to(self._image)
        self._settle(patch.index, patch.digest)

    def _settle(self, index: int, digest: bytes) -> None:
        self.done[index] = digest
        if index in self.local.suspects:
            self.local.suspects.remove(index)
            self.differing.add(index)
        while (settled := self.done.pop(self.settled, None)) is not None:
            self._new_state.write(settled)
            self._table.update(settled)
            self.settled += 1

    # The end of it

    def finish(self) -> None:
        """Make it the image: steps 2 to 6. All chunks must be settled.

        What goes wrong before the commit is taken back at once, and then raised. A signal is not waited for so long:
        the next command takes that back.
        """
        assert self.settled == self.chunks
        self._new_state.flush()
        if self.spool is None:
            self._finish_first()
            return
        paths, digests = self._paths, self._table.hexdigest()
        paths.check_unread()  # a sync may take hours
        differing = self._differing(self.spool)
        undo = Undo.write(paths, self._image, self._head_of_undo(digests), differing, self._heed)
        with contextlib.closing(undo):
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
                undo.put_back(self._heed)
                raise
            sync_directory(paths.metadata)
            undo.settle()

    def _drop_spool(self, spool: Spool) -> None:
        """Free what it takes, for the undo to be put back there: some file systems need space to overwrite."""
        self._paths.spool.unlink(missing_ok=True)
        spool.file.close()  # of an open file nothing is freed
        os.sync()  # nor by Btrfs before

    def _head_of_undo(self, digests: str) -> Json:
        """What the undo says of itself: which snapshots it leads between, by what state it counts, what the image is.

        Without a state the image is what the newest version leads back from.
        """
        newer, state, image = self._snapshot, self._state, identity_of(self._image.fd)
        older = Versions(self._paths).all()
        snapshot = state.snapshot if state else older[0].newer if older else None
        if snapshot is None:  # nobody knows more than that it is later than that version
            taken_at = older[0].moment.isoformat() if older else ""
            snapshot = dataclasses.replace(newer, size=image["size"] // CHUNK * CHUNK, taken_at=taken_at)
        moment = state.moment if state else snapshot.moment(utc_now())
        if older:  # the order of their names is that of the chain
            moment = max(moment, older[0].moment + datetime.timedelta(seconds=1))
        return {
            "time": moment.strftime(Version.TIME) if self._makes_version else "",
            "snapshot": dataclasses.asdict(snapshot),
            "newer": dataclasses.asdict(newer),
            "newer_digests": digests,
            "base": image,
        }

    def _differing(self, spool: Spool) -> Iterator[tuple[int, int, bytes]]:
        """The chunks that differ between the image's snapshot and the new one, as `Undo.write` wants them.

        The tables of digests tell whether a chunk differs, for it is the snapshots that a version leads between: an
        image that decayed here, or was written to, is mended by a sync and has no part in that. What is lost of an
        older snapshot by that is told by its digest.
        """
        if self._state is None:
            for index in spool.chunks():
                chunk, header = self._image.chunk(index), spool.header(index)
                # what cannot be read gets a digest that nothing has
                digest = bytes(DIGEST_SIZE) if chunk is None else chunk_digest(page_digests(chunk))
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
        """Step 4: returns what the image is then; None if somebody wrote to it since this sync began."""
        image, before = self._image, identity_of(self._image.fd)
        if before["size"] != self._snapshot.size:
            os.ftruncate(image.fd, self._snapshot.size)
        for index in spool.chunks():
            if patch := spool.patch(index):
                patch.write_to(image)
                self._heed(patch.length)
        if identity_of(image.fd) != before or any(spool.positions):
            stamp(image.fd, before["mtime_ns"] // 10**9 + 2)  # later, which tells the new image from the old
        else:
            os.fsync(image.fd)
        return identity_of(image.fd) if before == spool.file.head["base"] else None

    def _finish_first(self) -> None:
        stamp(self._image.fd)
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
        State(self._snapshot, now, self.local.part, digests, identity).write(self._paths.new_state)

    def free_space(self) -> None:
        """Give up so much of a sync that met a full disk that the other volumes can go on.

        That is the spool, or the end of a first sync: each run that fails fetches only that again.
        """
        if self.spool is None and self._paths.partial.exists():
            goal = os.fstat(self._image.fd).st_blocks * 512 - self.SPACE_FOR_OTHERS
            for index in reversed(range(self.chunks)):
                if os.fstat(self._image.fd).st_blocks * 512 <= goal:
                    break
                os.ftruncate(self._image.fd, index * CHUNK)
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

PROGRESS_LIMIT = 600  # seconds in which at least one chunk must be done with
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


class ConnectionLost(DosvobError):
    """The stream broke or stands still; another one to the same droplet may do."""


class BadAgent(DosvobError):
    """What came from the droplet makes no sense, or it says that it cannot go on."""


class Stream(Protocol):
    """Two-way bytes to an agent."""

    def send(self, data: bytes) -> None:
        """Send all of it."""

    def receive(self) -> bytes:
        """At least one byte; raises ConnectionLost when no more come."""


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
    """Something to be got done with agents about all `chunks` of a device, over as many connections as it takes.

    `settled` is how many of them are done with as it is told to the user, in the words `told`, {} being the bytes
    received; `done` how many are, in whatever order: while that grows, a connection is worth another one.
    """

    told = ""
    writes = False  # whether the agent is to

    def __init__(self, chunks: int, window: int) -> None:
        self.chunks = chunks
        self.settled = self.done = 0
        self.is_done = False
        self._window = window  # how many chunks the agent may be ahead
        self._stream: Stream
        self._progress: Callable[[], None]
        self._commands: list[tuple[int, int, int, int]] = []  # that are to be sent: kind, index, count, bitmap
        self._due: collections.deque[tuple[int, int]] = collections.deque()  # ranges of chunks that are to be announced
        self._greeted = self._is_over = False

    def program(self, device: str) -> bytes:
        """The program of the agent that the next connection is to have."""
        return agent_source(device, self._parts(), self._window, writes=self.writes)

    def _parts(self) -> tuple[tuple[int, int], ...]:
        """The ranges of chunks that it announces."""
        return ((self.settled, self.chunks),)

    def talk(self, stream: Stream, progress: Callable[[], None]) -> None:
        """Get done what can be over one connection; `progress` is called now and then, and may raise `Interrupted`."""
        keep_freed_memory()
        self._stream, self._progress = stream, progress
        self._commands.clear()
        self._due = collections.deque(self._parts())
        self._greeted = self._is_over = False
        parser, steps, deadline = FrameParser(), (-1, -1), 0.0
        while not self._is_over:
            for frame in parser.feed(stream.receive()):
                self._handle(*frame)
            self._flush()
            progress()
            if (self.settled, self.done) != steps:
                steps, deadline = (self.settled, self.done), time.monotonic() + PROGRESS_LIMIT
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
        """So many chunks are announced, with the same digest."""
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
        """Anything else came."""
        raise BadAgent(f"the droplet sent a frame of the kind {kind} with {len(payload)} bytes of chunk {index}")

    def _drop(self, index: int) -> None:
        """Tell the agent to forget a chunk, together with those before it that it is told to forget just now."""
        first, count = index, 0
        if self._commands and self._commands[-1][0] == DROP and sum(self._commands[-1][1:3]) == index:
            _, first, count, _ = self._commands.pop()
        self._command(DROP, first, count + 1)

    def _command(self, kind: int, index: int, count: int = 0, bitmap: int = 0) -> None:
        self._commands.append((kind, index, count, bitmap))

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
    """A chunk that was announced and is not settled.

    Its digest, and when they are known the digests of the local pages and a bitmap of the pages that are asked for;
    `is_unknown` if what the local pages have cannot be relied on, so that all of them are to be written.
    """

    digest: bytes
    local: bytes = b""
    wanted: int = 0
    is_unknown: bool = False


class Pull(Conversation):
    """Compares what the agent announces with the local image, and asks for what differs."""

    told = "scanned, {} fetched"
    # The agent keeps to MOST_AHEAD, not counting chunks that are asked for a second time, which are few and seldom.
    BOUND = 4

    def __init__(self, update: Update) -> None:
        super().__init__(update.chunks, update.window)
        self._update = update
        self._pending: dict[int, Pending] = {}
        self._local: Iterator[bytes] = iter(())
        self._flush()

    def talk(self, stream: Stream, progress: Callable[[], None]) -> None:
        """Go on until all chunks are settled."""
        self._pending.clear()
        self._local = self._update.local.digests(self.settled)
        with contextlib.closing(self._local):  # type: ignore[type-var] # a generator
            super().talk(stream, progress)

    def _flush(self) -> None:
        super()._flush()
        self.settled, self.done = self._update.settled, self._update.count_done()
        self.is_done = self._is_over = self.settled == self.chunks

    def _on_digests(self, index: int, count: int, digest: bytes) -> None:
        """So many chunks are announced, with the same digest."""
        # It may have forgotten so many that are asked for once more. Digests behind one that is to come are kept.
        is_far_ahead = bool(self._pending) and index + count - self._update.settled > self.BOUND * MOST_AHEAD
        if len(self._pending) > 2 * WINDOW or is_far_ahead:
            raise BadAgent(f"the droplet announced {count} chunks more, and does not send what it announced before")
        super()._on_digests(index, count, digest)

    def _on_answer(self, kind: int, index: int, payload: bytes) -> None:
        if kind == SHORT:
            self._on_short(index, payload)
        elif kind in (RAW, ZLIB, ZSTD):
            self._on_data(kind, index, payload)
        else:
            super()._on_answer(kind, index, payload)

    def _on_digest(self, index: int, digest: bytes) -> None:
        """Decide what is to be done about a chunk."""
        local = next(self._local)
        if index in self._update.done:  # by an attempt before this one
            self._drop(index)
        elif local == digest:
            self._update.keep(index, digest)
            self._drop(index)
        elif digest == ZERO_DIGEST:
            # all of them, if there is nothing that can be read
            zeroed = self._merged(self._update.local.pages(index), ALL_PAGES, 0, b"")[1]
            self._update.store(Patch(index, zeroed, 0, b"", digest))
        elif self._update.has_nothing_at(index, local):
            self._pending[index] = Pending(digest, ZERO_PAGES, ALL_PAGES, is_unknown=local == b"")
            self._command(SEND, index, 1, ALL_PAGES)
        else:
            self._pending[index] = Pending(digest)
            self._command(COMPARE, index)

    def _on_short(self, index: int, theirs: bytes) -> None:
        pending = self._pending.get(index)
        if pending is None or pending.local or len(theirs) != PAGES * SHORT_SIZE:
            raise BadAgent(f"the droplet sent page digests of chunk {index} that nobody asked for")
        local = self._update.local.pages(index)
        pending.local, pending.is_unknown = local or ZERO_PAGES, not local
        differing = differing_pages(local, theirs)  # all of them, if there is nothing that can be read
        if not differing and chunk_digest(local) == pending.digest:  # the spool alone had something else
            del self._pending[index]
            self._update.store(Patch(index, 0, 0, b"", pending.digest))
            self._drop(index)
        else:
            pending.wanted = differing or ALL_PAGES
            self._command(SEND, index, 1, pending.wanted)

    def _on_data(self, kind: int, index: int, payload: bytes) -> None:
        pending = self._pending.get(index)
        included = int.from_bytes(payload[: PAGES // 8], "little")
        if pending is None or not pending.wanted or len(payload) < PAGES // 8 or included & ~pending.wanted:
            raise BadAgent(f"the droplet sent pages of chunk {index} that nobody asked for")
        try:
            data = Packer.unpack(kind, payload[PAGES // 8 :], included.bit_count() * PAGE)
        except ValueError as problem:
            raise BadAgent(f"the pages of chunk {index} cannot be unpacked: {problem}") from None
        merged, changed = self._merged(pending.local, pending.wanted, included, data)
        if chunk_digest(merged) == pending.digest:
            del self._pending[index]
            changed = ALL_PAGES if pending.is_unknown else changed
            filled = included & changed
            self._update.store(Patch(index, changed, filled, Patch.select(data, filled, included), pending.digest))
        elif pending.wanted != ALL_PAGES:  # two pages alike in their short digests, or changed here just now
            pending.is_unknown = True
            pending.wanted = ALL_PAGES
            self._command(SEND, index, 1, ALL_PAGES)
        else:
            raise BadAgent(f"chunk {index} does not have the digest that was announced for it")

    @staticmethod
    def _merged(local: bytes, wanted: int, included: int, data: bytes) -> tuple[bytearray, int]:
        """The page digests of a chunk whose wanted pages become the data (the included ones) and zeros (the others).

        And the bitmap of the pages that differ by that.
        """
        digests, fetched = bytearray(local), page_digests(data)
        changed = position = 0
        for page in pages_in(wanted):
            digest = ZERO_PAGE_DIGEST
            if included >> page & 1:
                digest = fetched[position : position + DIGEST_SIZE]
                position += DIGEST_SIZE
            place = slice(page * DIGEST_SIZE, (page + 1) * DIGEST_SIZE)
            if digests[place] != digest:
                digests[place] = digest
                changed |= 1 << page
        return digests, changed


@dataclass(frozen=True)
class Piece:
    """A chunk of a push's source, the digests of its pages if they were not known yet, and the WRITE that it needs."""

    index: int
    chunk: bytes = b""
    pages: bytes = b""
    write: bytes = b""


class Push(Conversation):
    """Makes a device what a source is.

    A device that was created empty is first taken for zeros: all that is not zeros is sent, and nothing compared. Then,
    over each connection, all that is not known to be right is compared, and sent if it differs: of a chunk the pages
    whose short digests differ, or all if none does. So what a broken connection or a lost droplet has not written, and
    what was written wrong, is sent once more; at the end all was read from the device itself.

    `contents` begins a pass over all chunks of the source, in order; their digests go into a file. `warn` is told of
    what differs though all was taken; talking raises DosvobError if that does not end.
    """

    MOST_PENDING = 64  # chunks in memory until the agent has told which of their pages differ
    MOST_MENDS = 3  # times that what was taken is sent once more; short digests that collide take one
    MOST_PARTS = 1000  # ranges that an agent is told to announce
    PACKERS = 2
    READ_AHEAD = 8  # chunks
    writes = True
    _stream: AgentStream  # of which it can be told whether something has come in

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
        self._noted = 0  # so many digests are in the file
        self._passed = 0 if is_empty else chunks  # so many chunks need not be taken for zeros any more
        self._right, self._count_right = bytearray(chunks), 0  # 1 for each chunk that is known to be right
        self._pieces: Iterator[Piece] = iter(())
        self._piece = Piece(chunks)  # the last one that was taken from these
        self._packer: Packer
        self._mends = 0
        self._is_all_taken = False  # what was sent over the connection before
        self._begin()

    def _begin(self) -> None:
        """Another connection."""
        self._announced: collections.deque[tuple[int, bytes]] = collections.deque()  # digests that are to be compared
        self._pending: dict[int, Piece] = {}  # what differs, and it is to be told where
        self._differing: list[int] = []  # the first chunk that was not right, and how many there are
        self._last = self._asked = -1  # the chunk that was sent last; the one whose answer tells that all is taken

    def talk(self, stream: Stream, progress: Callable[[], None]) -> None:
        """Send what is not sent yet; or else compare what is not known to be right, and send what differs."""
        self._begin()
        self.told = "written" if self._passed < self.chunks else "compared"
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
        """What is not known to be right, with short gaps; nothing while there is something that is not sent yet."""
        gap = 1
        while self._passed == self.chunks:
            gap *= 8
            pattern = rb"\x00+(?:\x01{1,%d}\x00+)*" % gap
            parts = tuple(match.span() for match in re.finditer(pattern, self._right))
            if len(parts) <= self.MOST_PARTS:
                return parts
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
        """Compare, or send, until something has come in or must come in first."""
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
            self.settled, self.done = self._passed, self.done + 1
        if self._passed < self.chunks or self._due or self._announced or self._pending or self._asked >= 0:
            return
        self._asked, self._is_over = self._last, self._last < 0
        if not self._is_over:  # it answers when it has taken all that was sent before
            self._command(COMPARE, self._asked)
            super()._flush()

    def _compare(self, index: int, digest: bytes) -> None:
        """See whether a chunk is right; if not, send it, or ask where it differs."""
        if self._right[index] or digest == self._expected(index):
            self._count_right += not self._right[index]
            self.done += not self._right[index]
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
        self.settled = self._count_right + sum(self._differing[1:])
        self.is_done = self._count_right == self.chunks

    def _send(self, index: int, write: bytes) -> None:
        start = time.monotonic()
        self._stream.send(write)
        self._packer.sent(len(write), time.monotonic() - start)
        self.sent += len(write)
        self._last = index

    # What is to be there

    def _expected(self, index: int) -> bytes:
        """The digest that a chunk is to have."""
        if index >= self._noted:
            self._piece_at(index)
        return os.pread(self._digests, DIGEST_SIZE, index * DIGEST_SIZE)

    def _piece_at(self, index: int) -> Piece:
        """What the source has there: by reading on, or from its beginning if that is behind."""
        if self._piece.index > index:
            self._pieces = done_ahead(self._prepared, self._contents(), self.PACKERS, self.READ_AHEAD)
            self._piece = Piece(-1)
        while self._piece.index < index:
            self._piece = next(self._pieces)
            if self._piece.index == self._noted:
                os.pwrite(self._digests, chunk_digest(self._piece.pages), self._noted * DIGEST_SIZE)
                self._noted += 1
            self._progress()  # which heeds a stop
        return self._piece

    def _prepared(self, chunk_at: tuple[int, bytes]) -> Piece:
        """A chunk of the source with what is needed of it, in a thread of its own."""
        index, chunk = chunk_at
        if chunk == ZERO_CHUNK:
            return Piece(index, ZERO_CHUNK, ZERO_PAGES)
        pages = page_digests(chunk) if index >= self._noted else b""
        write = self._write(index, chunk, ALL_PAGES, over_zeros=True) if index >= self._passed else b""
        return Piece(index, chunk, pages, write)

    def _write(self, index: int, chunk: bytes, wanted: int, *, over_zeros: bool = False) -> bytes:
        """The WRITE of these pages of a chunk; of those that are not zeros if zeros are there."""
        patch = Patch.of(index, wanted, Patch.select(chunk, wanted), b"")
        kind, data = self._packer.pack(bytes(patch.data))
        frame = framed(kind, index, patch.filled.to_bytes(PAGES // 8, "little"), data)
        return packed_command(WRITE, index, 1, patch.filled if over_zeros else wanted) + frame


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
RECEIVE_SIZE = 4 << 20  # bytes taken at once: paramiko moves all the rest of what has come, each time
PACKET_SIZE = 256 << 10  # bytes; fewer packets, each of which costs paramiko some Python
# Bytes after which keys are renewed, and not 512 MiB. Each time the stream stands still for three round trips, which is
# 10 % of the time over 200 ms. 64 GiB are safe: https://www.rfc-editor.org/rfc/rfc4344#section-3.2
REKEY_BYTES = 32 << 30
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr")  # GCM is three times as fast
ATTEMPTS = 5  # connections in a row that break without one more chunk done with

FIRST_PACKETS = 100  # that the droplet sends before it hears of the first one's arrival; Linux sends 10
DISARM = (
    # DigitalOcean's images mount a volume that appears, which writes to it.
    "rm -f /etc/udev/rules.d/99-digitalocean-automount.rules",
    "udevadm control --reload || true",
)
USER_DATA_COMMANDS = (
    *DISARM,  # before sshd runs, so before any attach
    # An agent that nobody hears any more, with its 100 MiB, ends after half a minute instead of a quarter of an hour.
    "sysctl -q -w net.ipv4.tcp_retries2=6 || true",
    # Stock buffers of 4 MiB allow 33 MB/s at a round trip of 80 ms; BBR does not take every lost packet for congestion.
    "sysctl -q -w net.ipv4.tcp_wmem='4096 1048576 67108864' || true",
    "modprobe -q tcp_bbr && sysctl -q -w net.ipv4.tcp_congestion_control=bbr || true",
    # Three round trips less until a long link is full.
    f"ip route change $(ip -4 route show default | head -n 1) initcwnd {FIRST_PACKETS} || true",
)


class HostKeyMismatch(DosvobError):
    """Somebody else answers at the droplet's address."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"the machine at {address} does not have the host key of the droplet that was created: somebody may stand "
            "between; nothing was sent to it. Try again; if it stays, ask DigitalOcean's support"
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
    """A running agent at the other end of an SSH connection. To be closed, by which the agent ends."""

    def __init__(self, transport: paramiko.Transport, program: bytes, stop: Stop) -> None:
        self.received = 0  # bytes
        self._window = LEAST_WINDOW  # bytes that may be under way
        self._measured = (0, time.monotonic())  # bytes received at the last look at how fast they come, and its time
        self._transport = transport
        self._stop = stop
        bootstrap = f"import sys; exec(sys.stdin.buffer.read({len(program)}))"
        try:
            start = time.monotonic()
            self._channel = transport.open_session(self._window, PACKET_SIZE, SSH_TIMEOUT)
            opened = time.monotonic()
            self._channel.settimeout(Stop.NAP)
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
        data = self._patiently(lambda: self._channel.recv(RECEIVE_SIZE))
        if not data:
            raise self._lost(f"the connection to the droplet ended{self._last_words()}")
        self.received += len(data)
        self._widen()
        return data

    def has_received(self) -> bool:
        """Whether something has come in."""
        return self._channel.recv_ready()

    def _widen(self) -> None:
        """Let twice as much be under way as arrives in a round trip, as it takes to keep a long link full.

        Not more from the start: sshd keeps what the link does not take yet in a buffer that it copies again and again
        while that grows, which for 32 MiB takes seconds.
        """
        received, since = self._measured
        seconds = time.monotonic() - since
        if seconds < self._round_trip / 4:  # often enough to grow as fast as what arrives does
            return
        self._measured = (self.received, time.monotonic())
        wanted = min(int(2 * (self.received - received) / seconds * self._round_trip), MOST_WINDOW)
        if wanted > self._window and hasattr(self._channel, "in_window_sofar"):
            # What paramiko announces with the next bytes that are taken; it has no call for a window that grows.
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
                raise self._lost(f"the connection to the droplet broke: {reason(problem)}") from problem

    def _lost(self, what: str) -> ConnectionLost:
        """The error for a connection that is not to be used any more.

        Nor is one whose agent alone may have ended: paramiko tells of the connection's end after that of its channels.
        """
        self._transport.close()
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
    """The way to the droplet's agents: one connection, made anew when it has broken. To be closed."""

    def __init__(self, address: str, keys: RunKeys, stop: Stop) -> None:
        self._address = address
        self._keys = keys
        self._stop = stop
        self._transport: paramiko.Transport | None = None

    def open(self, limit: float) -> paramiko.Transport:
        """The connection that there is, or a new one within `limit` seconds; raises ConnectionLost."""
        if self._transport is None or not self._transport.is_active():
            self.close()
            self._transport = self._connect_when_up(limit)
        return self._transport

    @staticmethod
    def device(volume_name: str) -> str:
        """Where a droplet has an attached volume: https://docs.digitalocean.com/products/volumes/how-to/mount/"""
        return f"/dev/disk/by-id/scsi-0DO_Volume_{volume_name}"

    def run(self, command: str, limit: float) -> None:
        """Connect within `limit` seconds and run a command to its end, whatever it returns; raises ConnectionLost."""
        transport = self.open(limit)
        try:
            with contextlib.closing(transport.open_session(timeout=SSH_TIMEOUT)) as channel:
                within(SSH_TIMEOUT, lambda: channel.exec_command(command))
                within(SSH_TIMEOUT, channel.recv_exit_status)
        except (paramiko.SSHException, OSError, EOFError) as problem:
            transport.close()
            raise ConnectionLost(f"the connection to the droplet broke: {reason(problem)}") from problem

    def start_agent(self, program: bytes) -> AgentStream:
        """An agent with this program; raises ConnectionLost."""
        self._stop.check()
        return AgentStream(self.open(RECONNECT_LIMIT), program, self._stop)

    def _connect_when_up(self, limit: float) -> paramiko.Transport:
        """Connect to a droplet that may still be starting; raises the last ConnectionLost after `limit` seconds.

        Raises HostKeyMismatch for a stranger who stays there: nothing is sent to one.
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
        """Make sure that it is our droplet, then authenticate; raises HostKeyMismatch, or ConnectionLost."""
        try:
            transport.start_client(timeout=SSH_TIMEOUT)
            if transport.get_remote_server_key() != self._keys.host:
                raise HostKeyMismatch(self._address)
            transport.auth_publickey("root", self._keys.client)
        except paramiko.ssh_exception.IncompatiblePeer as problem:  # it has no host key of this kind at all
            raise HostKeyMismatch(self._address) from problem
        except (paramiko.SSHException, OSError, EOFError) as problem:
            raise ConnectionLost(f"the droplet at {self._address} does not let us in: {reason(problem)}") from problem

    def close(self) -> None:
        """Close the connection, and with it whatever runs at its other end."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def converse(
    start_agent: Callable[[], AgentStream],
    conversation: Conversation,
    warn: Callable[[str], None],
    progress: Callable[[int], None],
    replace_lost: Callable[[DosvobError], bool],
) -> int:
    """Go on with a conversation over as many connections as it takes until it is done; returns the bytes received.

    `start_agent` starts an agent with its program. If the problem is that the droplet is lost, `replace_lost` has
    another one made, and returns True, or raises what is to end it all.
    """
    received = failures = 0
    while not conversation.is_done:
        done, stream = conversation.done, None
        try:
            stream = start_agent()
            conversation.talk(stream, lambda: progress(received + stream.received))  # noqa: B023 - used in here
            failures = 0
        except (ConnectionLost, HostKeyMismatch, DropletLost) as problem:
            failures = failures + 1 if conversation.done == done else 1
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


# ── Reporting ────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the user sees: on a terminal a live line, in a log lines with the time (UTC) now and then; a table at the end.


class Writer:
    """Writes to one file descriptor, in a thread of its own."""

    MOST_QUEUED = 10_000  # lines that wait for a terminal or a pipe that takes nothing more; later ones are lost
    STUCK_LIMIT = 5  # seconds for which it is waited for at the end

    def __init__(self, fd: int, encoding: str) -> None:
        self.is_terminal = os.isatty(fd)
        self._fd = fd
        self._encoding = encoding
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def put(self, text: str) -> None:
        """Write this when what was put before has been written; never waits."""
        if self._queue.qsize() < self.MOST_QUEUED:
            self._queue.put(text)

    def close(self) -> bool:
        """Let what is queued be written; returns whether it could be."""
        self._queue.put(None)
        self._thread.join(self.STUCK_LIMIT)
        return not self._thread.is_alive()

    def _write(self) -> None:
        # To the descriptor: what cannot be written must not be tried again by Python at its exit, with the code 120.
        while (text := self._queue.get()) is not None:
            view = memoryview(text.encode(self._encoding, "replace"))
            with contextlib.suppress(OSError):  # a terminal that was closed is no reason to end
                while view:
                    try:
                        view = view[os.write(self._fd, view) :]
                    except BlockingIOError:  # somebody else who has it too has set it so
                        time.sleep(Stop.NAP)


class Reporter:
    """Writes to the user, from any thread. `secret` never gets out, and nothing that could steer a terminal does.

    Threads of their own do the writing: a terminal that was stopped with ^S, or a pipe that nobody reads, must not
    keep a run, and its teardown least of all, from its work.
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
        self.left: set[Resource] = set()  # what could not be removed from the account
        self.summary: list[str] = []  # what somebody who was not there must know: warnings, errors, results
        self._lock = threading.Lock()
        self._live = ""
        self._output = Writer(1, sys.stdout.encoding or "utf-8")
        # In one place they keep their order
        self._errors = self._output if os.path.sameopenfile(1, 2) else Writer(2, sys.stderr.encoding or "utf-8")
        self._lined_at = 0.0 if self._output.is_terminal else time.monotonic()

    def close(self) -> bool:
        """Let what is queued be written; returns whether it could be."""
        closed = [writer.close() for writer in {self._output, self._errors}]
        return all(closed)

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

    def answer(self, text: str) -> None:
        """What was asked for: as it is, also with --quiet, and without the time."""
        self._output.put(self.clean(text) + "\n")

    def doing(self, text: str) -> None:
        """What is going on now."""
        self.current = self.clean(text)
        self.detail(text)

    def left_behind(self, left: Mapping[Resource, str], *, of_all: bool = False) -> None:
        """Say loudly what could not be removed; `of_all` if that was to be of all homes."""
        self.left |= set(left)
        for resource, reason in left.items():
            what = "there may be something " if resource.id == UNKNOWN else ""
            billed = ", and billed until you remove it" if resource.hourly or resource.id == UNKNOWN else ""
            self.error(
                f"{what}LEFT BEHIND{billed}: {resource}. {reason}. Remove it at "
                f"https://cloud.digitalocean.com{KINDS[resource.kind].panel} or run: "
                + command_line("sweep", *["--all"] * of_all)
            )

    def progress(self, text: str) -> None:
        """How far something has got: replaces the live line on a terminal, and is a line now and then in a log."""
        interval = self.LIVE_INTERVAL if self._output.is_terminal else self.LOG_INTERVAL
        if self.quiet or time.monotonic() - self._lined_at < interval:
            return
        self._lined_at = time.monotonic()
        if self._output.is_terminal:
            with self._lock:
                self._live = self.clean(text)[: shutil.get_terminal_size().columns - 1]
                self._output.put(f"\r\x1b[2K{self._live}")
        else:
            self._write(self._output, text)

    def end_progress(self) -> None:
        """Take the live line away; the next progress shows at once."""
        self._lined_at = 0.0 if self._output.is_terminal else time.monotonic()
        with self._lock:
            if self._live:
                self._live = ""
                self._output.put("\r\x1b[2K")

    def interject(self, text: str) -> None:
        """Tell something from a signal handler, which may have interrupted whoever holds the lock."""
        self._errors.put(self._lines(self._errors, text))

    def _lines(self, writer: Writer, text: str) -> str:
        stamp = "" if writer.is_terminal else f"{utc_now().isoformat()} "
        return "".join(f"{stamp}{line}\n" for line in self.clean(text).splitlines())

    def _write(self, writer: Writer, text: str) -> None:
        lines = self._lines(writer, text)
        with self._lock:
            writer.put(f"\r\x1b[2K{lines}{self._live}" if self._live and writer.is_terminal else lines)

    def clean(self, text: str) -> str:
        """The text without the secret and without what could steer a terminal."""
        if self.secret:
            text = text.replace(self.secret, "***")
        text = "".join(char if char.isprintable() or char == "\n" else "�" for char in text)
        return "\n".join(line[: self.LINE_LIMIT] for line in text.split("\n"))


def command_line(*words: str) -> str:
    """A command of ours as the user called this one, to be copied."""
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else Path(sys.executable).name
    return " ".join([python, os.path.basename(sys.argv[0]) or "dosvob.py", *words])


class Meter:
    """How far something is that goes over many bytes; heeds a stop as well."""

    def __init__(self, report: Reporter, stop: Stop, what: str, total: int = 0, *, is_told: bool = False) -> None:
        self.done = 0
        self._is_told = is_told
        self._report = report
        self._stop = stop
        self._what = what
        self._total = total
        self._start = time.monotonic()

    def __call__(self, size: int, more: str = "") -> None:
        """So many bytes more; `more` is told behind the total, if there is one. Raises Interrupted."""
        self._stop.check()
        if not self.done and self._is_told:
            self._report.say(f"{self._what}; when it is stopped, it goes on next time")
        self.done += size
        rate = self.done / max(time.monotonic() - self._start, 0.001)
        of = f" of {human_size(self._total)}{more}, {human_size(rate)}/s" if self._total else ""
        left = f", {human_time((self._total - self.done) / rate)} left" if self._total and rate else ""
        self._report.progress(f"{self._what}: {human_size(self.done)}{of}{left}")


def ping(url: str | None, event: str, report: Reporter, problem: str = "") -> None:
    """Tell a service in the manner of healthchecks.io how a run goes: https://healthchecks.io/docs/http_api/

    `event` is "/start", "" for success or "/fail". That is done at once or not at all: a ping that fails is worth a
    warning, without the address (who knows that can send pings too), and nothing else comes of it.
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


# ── The backup ───────────────────────────────────────────────────────────────────────────────────────────────────────
# One run: all volumes of a region over one droplet, the next volume's clone being prepared while this one syncs. Puts
# the chapters above together.


class Home:
    """One backups directory: its lock, its id, and what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = path / ".dosvob"

    @contextlib.contextmanager
    def locked(self, *, with_id: bool = True) -> Iterator[None]:
        """Hold its lock, making what is missing, with an id if one is needed; UsageError if held, or not to be had."""
        try:
            if not self.path.is_dir():
                self.path.mkdir(mode=0o700)
                sync_directory(self.path.resolve().parent)
            self.make_directory("")
            fd = create_private(self.metadata / "lock")
        except OSError as problem:
            raise UsageError(f"cannot write to {self.path}: {problem.strerror}: is it there, and yours?") from problem
        with self._held(fd, fcntl.LOCK_EX):
            if with_id and not self.id:  # durable before anything is named by it
                self.write("home", secrets.token_hex(4) + "\n")
            yield

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Keep whoever would change it out, where it can be changed; several may read. Busy if somebody is at work."""
        self.check()
        try:
            fd = os.open(self.metadata / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # a copy, or not ours
            yield
            return
        with self._held(fd, fcntl.LOCK_SH):
            yield

    def is_read_only(self) -> bool:
        """Whether nothing can be changed in it, as in a copy on a read-only disk, or in somebody else's."""
        return self.metadata.is_dir() and not os.access(self.metadata, os.W_OK)

    def is_busy(self) -> bool:
        """Whether somebody is at work in it."""
        try:
            with self.unchanged():
                return False
        except Busy:
            return True

    @contextlib.contextmanager
    def _held(self, fd: int, kind: int) -> Iterator[None]:
        try:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another dosvob is at work in {self.path}: wait until it ends") from None
            except OSError as problem:
                if kind == fcntl.LOCK_EX:
                    raise UsageError(
                        f"{self.path} cannot be locked ({problem.strerror}), so that two runs could meet there: mount "
                        "it with locks, as NFS has by -o local_lock=flock"
                    ) from problem
            yield
        finally:
            os.close(fd)

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
        """See that the directories for the images of a region, "" for those of no region, are there, durably."""
        directory = self.path / region
        if directory.is_file():
            raise DosvobError(
                f"{directory} is a file, and the images of the region {region} go into a directory of that name. If it "
                f"is the image of a volume in that region: mv {directory} {directory}.image && mkdir {directory} && "
                f"mv {directory}.image {directory}/{region}; otherwise move it elsewhere"
            )
        if region and (directory / ".dosvob" / "home").exists():
            raise DosvobError(
                f"{directory} is a backups directory of its own: the images of {region} cannot go there, unless you "
                f"run {command_line('sweep', '--backups', str(directory))} and then delete {directory}/.dosvob/home"
            )
        for path in (directory, directory / ".dosvob"):
            path.mkdir(mode=0o700, exist_ok=True)
        for path in (self.path, directory):  # an undo counts only if its directory survives a power cut
            sync_directory(path)

    def directories(self) -> list[str]:
        """Where images are: "", and the regions that have a directory; what has an id of its own is another home."""
        found = [path.parent for path in self.path.glob("*/.dosvob") if not (path / "home").exists()]
        return ["", *sorted(path.name for path in found if ImagePaths.VOLUME_NAME.fullmatch(path.name))]

    def names(self, *, with_aside: bool = True) -> set[str]:
        """What has an image, a state or versions here: the volumes, and what of them was set aside."""
        patterns = (ImagePaths.VOLUME_NAME, *([ImagePaths.ASIDE] if with_aside else []))
        names = set()
        for region in self.directories():
            directory = self.path / region
            found = {path.name for path in directory.iterdir() if path.is_file()}
            found |= {path.stem for path in directory.glob(".dosvob/*") if path.suffix in (".state", ".versions")}
            fit = {name for name in found if any(pattern.fullmatch(name) for pattern in patterns)}
            names |= {f"{region}/{name}" if region else name for name in fit}
        return names

    def remains(self) -> dict[Path, str]:
        """What syncs left here, or put out of the way, besides images with their states and versions: whose it is."""
        kinds = ("*.partial", ".dosvob/*.spool", ".dosvob/*.undo", ".dosvob/*.state.new", ".dosvob/*.versions.of-*",
                 "*.set-aside-*")  # fmt: skip
        found = {}
        for region in self.directories():
            for path in sorted(path for kind in kinds for path in (self.path / region).glob(kind)):
                name = path.name.partition(".")[0]
                if ImagePaths.VOLUME_NAME.fullmatch(name):
                    found[path] = f"{region}/{name}" if region else name
        return found

    @staticmethod
    def occupied(path: Path) -> int:
        """The bytes that a file, or a directory with its files, takes."""
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        return sum(each.stat().st_blocks * 512 for each in files if each.exists())

    def chosen(self, names: list[str], *, with_aside: bool = True) -> list[str]:
        """The names, which must all be of something here, or all that are; raises UsageError."""
        there = self.names()
        chosen: list[str] = []
        for name in names:
            if not (found := self.called(name, there)):
                near = difflib.get_close_matches(name, there, n=1)
                hint = f": did you mean {near[0]}?" if near else ""
                raise UsageError(f"there is no image of {name} in {self.path}{hint}")
            chosen += found
        return list(dict.fromkeys(chosen)) or sorted(self.names(with_aside=with_aside))

    def meant(self, name: str) -> str:
        """The name of the image that somebody means who says this; raises UsageError if there is none, or several."""
        found = self.chosen([name])
        if len(found) > 1 and name not in found:
            raise UsageError(f"{name} may be {' or '.join(found)}: say which")
        return name if name in found else found[0]

    def move(self, old: ImagePaths, new: ImagePaths) -> None:
        """Rename all that belongs to an image, for it to lie in another directory; raises DosvobError, OSError.

        What a crash leaves of that the next call completes: the state, which tells that there is something left to be
        moved, and where to, goes last.
        """
        rest = [path for path in old.metadata.glob(f"{old.image.name}.*")
                if path != old.state and not path.name.startswith(f"{old.image.name}.set-aside-")
                and path.suffix != ".json"]  # fmt: skip
        paths = [path for path in (old.image, old.partial, *rest, old.state) if os.path.lexists(path)]
        for path in paths:
            if os.path.lexists(target := new.directory / path.relative_to(old.directory)):
                raise DosvobError(f"{path} belongs where {target} is already: move one of them elsewhere")
        self.make_directory("" if new.directory == self.path else new.directory.name)
        for path in paths:
            if path == old.state:
                self._sync(old, new)
            if path.is_symlink():  # it may lead from where it is
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
        """What the last run was to back up."""
        try:
            names = json.loads((self.metadata / "wanted.json").read_text())
        except (OSError, ValueError):
            return set()
        return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()

    @staticmethod
    def called(name: str, names: Iterable[str]) -> list[str]:
        """Those of the names of images that somebody means who says this: with a region, or in whatever region."""
        return sorted(each for each in names if name in (each, each.rpartition("/")[2]))

    def recover(self, report: Reporter, stop: Stop) -> set[str]:
        """Take back what crashes left of a backup in the middle, with no network; returns the names that failed."""
        failed = set()
        for name in sorted(self._with_file("undo") | self._with_file("journal")):
            meter = Meter(report, stop, f"{name}: taking back an interrupted backup", is_told=True)
            try:
                if Undo.recover(ImagePaths(self.path, name), meter):
                    report.end_progress()
                    report.say(f"{name}: an interrupted backup was taken back; the image is what it was before")
            except (DosvobError, OSError) as problem:
                kept = "; the next backup or verify takes it back" * isinstance(problem, OSError)
                report.error(f"{name}: an interrupted backup: {explained(problem, self.path)}{kept}")
                failed.add(name)
        return failed

    def _with_file(self, kind: str) -> set[str]:
        """The names that have a file of this kind among the metadata."""
        places = [Path(region) for region in self.directories()]
        return {
            str(place / path.stem) for place in places for path in (self.path / place / ".dosvob").glob(f"*.{kind}")
        }


class Trial:
    """A try, in a directory, of all that a run needs of its file system, before anything that costs is created.

    `largest` is the size in bytes of the largest volume that has no image there yet, `needed` that of all of them. What
    is missing raises UsageError with what to do; what is merely dear is said.
    """

    SAMPLE = 16 * CHUNK  # large enough that it shows in the free space whether a length takes any

    def __init__(self, directory: Path, sizes: Sequence[int], say: Callable[[str], None]) -> None:
        self._directory = directory
        self._largest, self._needed = max(sizes, default=0), sum(sizes)
        self._say = say
        self._kind = Mount.of(directory).kind or "its file system"
        self._paths = (directory / ".trial", directory / ".trial.renamed", directory / ".trial.directory")

    def run(self) -> None:
        """Try it, and leave nothing there. A full disk is no reason to stop: some volumes may need no more."""
        self._clear()
        try:
            for step, remedy in (
                (self._write, "give dosvob the right to write there"),
                (self._write_in_the_middle, "it must change files in place: rclone does with --vfs-cache-mode writes"),
                (self._reopen, "it must open a file again to change it: mount an SMB share with mount.cifs"),
                (self._lengthen, "use a file system with larger files, such as XFS or Btrfs"),
                (self._rename, "it must rename between directories: mergerfs does with category.create=mfs"),
                (self._lock, "it must lock files: NFS does with -o local_lock=flock"),
            ):  # fmt: skip
                if not self._try(step, remedy):
                    break
        finally:
            with contextlib.suppress(OSError):
                self._clear()

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

    def _clear(self) -> None:
        file, renamed, directory = self._paths
        for path in (file, renamed, directory / "renamed"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
        if directory.is_dir():
            directory.rmdir()

    @contextlib.contextmanager
    def _opened(self, flags: int = os.O_RDWR) -> Iterator[SparseFile]:
        with contextlib.closing(SparseFile(self._paths[0], flags)) as file:
            yield file

    def _write(self) -> None:
        with self._opened(os.O_RDWR | os.O_CREAT) as file:
            file.write(ZERO_CHUNK, 0)
            os.fsync(file.fd)

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
        figures = f"{human_size(self._needed)} are needed for first backups, {human_size(free)} are free"
        told = f"{self._directory} is on {self._kind}, which has no sparse files: {figures}"
        if self._largest > free:
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

    def _lock(self) -> None:
        with self._opened() as file:
            fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclass(frozen=True)
class Job:
    """What all that needs the account is given."""

    config: Config
    api: Api
    home: Home
    report: Reporter
    stop: Stop

    def name(self, volume: Volume) -> str:
        """The name of a volume's image."""
        return f"{volume.region}/{volume.name}" if self.config.by_region else volume.name

    def try_storage(self, volumes: Sequence[Volume], *, dry_run: bool = False) -> None:
        """Try all that a backup of the volumes needs where their images go; raises UsageError with what to do.

        What is not there yet is tried where it will be made. A dry run also says how much is free there.
        """
        sizes_in: dict[Path, list[int]] = {}  # of those that have no image yet
        for volume in volumes:
            paths = ImagePaths(self.home.path, self.name(volume))
            sizes_in.setdefault(paths.metadata, []).extend([] if paths.image.exists() else [volume.size])
        for directory, sizes in sizes_in.items():
            place = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
            Trial(place, sizes, self.report.say).run()
            if dry_run:
                status = os.statvfs(place)
                free = human_size(status.f_bavail * status.f_frsize)
                first = f"; first backups take up to {human_size(sum(sizes))}, for {len(sizes)} volumes" * bool(sizes)
                self.report.say(f"{free} are free in {place}{first}")


def explained(problem: DosvobError | OSError, where: Path) -> str:
    """What an error says to the user; of what the local disk refused, `where` unless it names the file itself."""
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


Host = tuple[Droplet, Link]


class Hosts:
    """Makes the run's droplet, and the way to its agents, in the background; another one, once, if it is lost.

    To be closed.
    """

    def __init__(self, job: Job, ephemeral: Ephemeral, plan: DropletPlan) -> None:
        self._job = job
        self._ephemeral = ephemeral
        self._plan = plan
        self._keys = RunKeys.generate()
        self._is_replaced = False
        self._links = contextlib.ExitStack()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._future = self._pool.submit(self._make)

    def get(self) -> Host:
        """The droplet, once it lets us in; raises NoDroplet."""
        return self._future.result()

    def check(self) -> None:
        """Raise NoDroplet if it is known by now that there will be none."""
        if self._future.done():
            self._future.result()

    def _give_up_on(self, problem: DosvobError) -> None:
        """Remove the droplet, for another one to be made; raises NoDroplet if this is not the first that was lost."""
        if self._is_replaced:
            raise NoDroplet(f"nothing can be done for want of a droplet, a second one too: {problem}")
        self._is_replaced = True
        self._job.report.warn(f"{problem}; making another one")
        self._ephemeral.remove_droplets()

    def _make(self) -> Host:
        """Create the droplet, and another one if it is lost meanwhile, and wait until it lets us in."""
        while True:
            try:
                droplet = self._ephemeral.create_droplet(self._plan, self._keys.public, self._keys.user_data())
                link = self._links.enter_context(contextlib.closing(Link(droplet.address, self._keys, self._job.stop)))
                link.open(SSH_LIMIT)
                self._disarm(link, droplet)
            except NoDroplet:
                raise
            except (DropletLost, ConnectionLost) as problem:
                self._give_up_on(problem)
            except DosvobError as problem:
                raise NoDroplet(f"nothing can be done for want of a droplet: {problem}") from problem
            else:
                self._job.report.say(f"the droplet {droplet.name} is up at {droplet.address}")
                return droplet, link

    def converse(self, volume: Volume, conversation: Conversation, what: str) -> int:
        """As `converse`, with the volume attached to the droplet, or to another one if that is lost.

        `what` is what progress is told of.
        """
        self.get()  # before the meter measures the time
        new_meter = functools.partial(Meter, self._job.report, self._job.stop, what, conversation.chunks * CHUNK)
        meter = new_meter()

        def start_agent() -> AgentStream:
            droplet, link = self.get()
            self._ephemeral.attach(volume, droplet)
            return link.start_agent(conversation.program(Link.device(volume.name)))

        def progress(received: int) -> None:
            nonlocal meter
            if conversation.settled * CHUNK < meter.done:  # what was sent is compared now
                meter = new_meter()
            meter(conversation.settled * CHUNK - meter.done, f" {conversation.told.format(human_size(received))}")

        return converse(start_agent, conversation, self._job.report.warn, progress, self._replace_lost)

    def _replace_lost(self, problem: DosvobError) -> bool:
        """If the problem is that the droplet is lost, have another one made; returns whether. Raises NoDroplet."""
        if not isinstance(problem, DropletLost):
            if not self._ephemeral.is_gone(self.get()[0]):
                return False
            problem = DropletLost(f"{problem}; the droplet is gone")
        self._give_up_on(problem)
        self._future = self._pool.submit(self._make)
        return True

    def _disarm(self, link: Link, droplet: Droplet) -> None:
        """Once more, in case something wrote the rule after bootcmd."""
        for attempt in itertools.count(1):
            try:
                link.run("; ".join(DISARM), RECONNECT_LIMIT)
                break
            except ConnectionLost:
                if attempt == ATTEMPTS or self._ephemeral.is_gone(droplet):
                    raise

    def close(self) -> None:
        """Wait for what goes on in the background, and close the connections."""
        self._pool.shutdown()
        self._links.close()


@dataclass(frozen=True)
class Result:
    """What became of one volume; sizes in bytes, `outcome` "ok" if it is backed up.

    `is_thinned`: whether its versions could be thinned before; if not, that was told.
    """

    name: str
    size: int
    outcome: str
    changed: int = 0
    fetched: int = 0
    seconds: float = 0.0
    is_thinned: bool = True

    def row(self) -> tuple[str, ...]:
        """Its line in the table at the end of a run."""
        figures = (human_size(self.changed), human_size(self.fetched), human_time(self.seconds))
        return self.name, human_size(self.size), *(figures if self.outcome == "ok" else ("-",) * 3), self.outcome


@dataclass
class Turn:
    """A volume whose turn it is; times are time.monotonic.

    Not before `not_before`; the user was told of `until` (0: of nothing); after `give_up` it fails.
    """

    volume: Volume
    name: str
    number: int
    not_before: float = 0.0
    until: float = 0.0
    give_up: float = float("inf")


Prepared = concurrent.futures.Future[tuple[Volume, str]]  # a volume's clone, and when its snapshot was taken


def thin(job: Job, paths: ImagePaths) -> bool:
    """Drop the versions that are not to be kept; False if not all could be: the next run tries again."""
    try:
        meter = Meter(job.report, job.stop, f"{paths.name}: thinning its versions")
        Versions(paths).thin(job.config.keep, meter)
    except Interrupted:
        pass  # whoever waits next ends the run
    except (OSError, DosvobError) as problem:
        held = human_size(sum(version.occupied for version in Versions(paths).all()))
        job.report.warn(
            f"{paths.name}: its older versions could not all be thinned, and none is lost by that: "
            f"{explained(problem, paths.versions)}. They "
            f'hold {held}; to keep fewer change "keep" in conf.json; to see which are damaged: '
            + command_line("verify", paths.name)
        )
        return False
    return True


class Backup:
    """One run over the volumes of one region. `results` are by the names of the images, those of other regions too."""

    SNAPSHOT_INTERVAL = 600  # seconds; DigitalOcean takes one snapshot of a volume per 10 minutes
    SNAPSHOT_RETRY = 20  # seconds between attempts when a snapshot came too soon and nobody says how much
    RELEASE_DELAY = 60  # seconds at most for which a clone that was synced stays so that another one is attached first

    def __init__(
        self, job: Job, plan: DropletPlan, volumes: Sequence[Volume], results: dict[str, Result], *, reread: bool
    ) -> None:
        stop = Stop(job.stop)  # what ends with this region
        self._job = dataclasses.replace(job, stop=stop, api=job.api.with_stop(stop))
        self._plan = plan
        self._reread = reread
        self._report = job.report
        self._results = results
        self._turns = collections.deque(Turn(volume, job.name(volume), number) for number, volume in enumerate(volumes))
        self._ephemeral = Ephemeral(self._job.api, job.home.id, job.report)
        self._has_no_droplet = False

    def run(self) -> float:
        """Back up all volumes and remove what was created for that; returns what it cost, in dollars."""
        names = ", ".join(turn.name for turn in self._turns)
        self._report.say(f"backing up {names}, over a droplet {self._plan.sizes[0][0]} with {self._plan.image}")
        with self._ephemeral:
            try:
                self._take_turns()
            finally:
                self._report.end_progress()
        return self._ephemeral.cost()

    def _take_turns(self) -> None:
        """One volume after the other; the next one is prepared, and the last one released, while one syncs."""
        pool = concurrent.futures.ThreadPoolExecutor
        hosts = Hosts(self._job, self._ephemeral, self._plan)
        with contextlib.closing(hosts), pool(1) as ahead, pool(1) as behind:

            def start() -> tuple[Turn, Prepared] | None:
                turn = self._turns.popleft() if self._turns else None
                return (turn, ahead.submit(self._prepare, turn, hosts)) if turn else None

            try:
                upcoming, last = start(), None
                while upcoming is not None:
                    turn, future = upcoming
                    prepared = self._await(turn, future)
                    upcoming = start()
                    if prepared is None:
                        continue
                    if last is not None and upcoming is not None:  # the last clones go with the droplet
                        behind.submit(self._release, last, hosts, upcoming[1])
                    self._sync(turn, *prepared, hosts)
                    last = prepared[0]
            finally:
                self._job.stop.request()  # what goes on in the background is of no use any more

    def _await(self, turn: Turn, future: Prepared) -> tuple[Volume, str] | None:
        """What was prepared for the turn; None if it failed, or is to be taken later."""
        start = time.monotonic()
        while not future.done():
            left = max(turn.until, turn.not_before) - time.monotonic()
            until = f"{human_time(left)} until DigitalOcean takes its next snapshot"
            waiting = f"waiting for its clone and the droplet, {human_time(time.monotonic() - start)}"
            self._report.progress(f"{turn.name}: {until if left > 0 else waiting}")
            concurrent.futures.wait([future], timeout=0.5)
        try:
            return future.result()
        except DosvobError as problem:
            if isinstance(problem, ApiError) and problem.status == 429:
                self._put_off(turn, problem.wait)
            else:
                self._fail(turn, problem)
        return None

    def _put_off(self, turn: Turn, wait: float | None) -> None:
        """Take a turn later, when DigitalOcean takes the volume's next snapshot.

        DigitalOcean says seldom in how many seconds that is (`wait`); the state knows when the last one was taken, if
        that was ours.
        """
        now, path = time.monotonic(), ImagePaths(self._job.home.path, turn.name).state
        with contextlib.suppress(OSError, DosvobError):
            state = State.load(path, whole=False)
            since = age(state.snapshot.taken_at) if state else -1.0
            if wait is None and 0 <= since < self.SNAPSHOT_INTERVAL:
                wait = self.SNAPSHOT_INTERVAL - since
        rule = "DigitalOcean takes one snapshot of a volume per 10 minutes"
        if not turn.until:
            seconds = self.SNAPSHOT_INTERVAL if wait is None else wait
            moment = local_time(utc_now() + datetime.timedelta(seconds=seconds))
            the_next_one = f"the next one {'by' if wait is None else 'at'} {moment}"
            self._report.say(f"{turn.name}: {rule}, {the_next_one}; the other volumes go first")
            turn.until = now + seconds
        wait = self.SNAPSHOT_RETRY if wait is None else wait
        turn.not_before = now + wait
        turn.give_up = min(turn.give_up, now + max(self.SNAPSHOT_INTERVAL, wait) + 60)
        if turn.not_before > turn.give_up:
            self._fail(turn, DosvobError(f"{rule}, and did not take this one for longer: try again later"))
        else:
            self._turns.append(turn)

    def _fail(self, turn: Turn, problem: DosvobError | OSError) -> None:
        """Report what a volume, or for want of a droplet each that is left, failed for."""
        self._report.end_progress()
        failed = [turn]
        if isinstance(problem, NoDroplet):
            if not self._has_no_droplet:  # the volume that was being prepared meanwhile meets it too
                self._report.error(str(problem))
            self._has_no_droplet = True
            failed += self._turns
            self._turns.clear()
        else:
            told = explained(problem, self._job.home.path)
            if is_disk_full(problem):
                versions = Versions(ImagePaths(self._job.home.path, turn.name)).all()
                held = f"{len(versions)} older versions hold {human_size(sum(each.occupied for each in versions))}"
                told += f'; its {held}, and "keep" in conf.json says how many there are' * bool(versions)
            self._report.error(f"{turn.name}: {told}")
        for each in failed:
            self._results[each.name] = dataclasses.replace(self._results[each.name], outcome="FAILED")

    # In the background

    def _prepare(self, turn: Turn, hosts: Hosts) -> tuple[Volume, str]:
        """Make the volume's clone and attach it."""
        ImagePaths(self._job.home.path, turn.name).check_unread()  # before that costs anything
        self._job.stop.sleep(turn.not_before - time.monotonic())
        hosts.check()  # a clone would be of no use without a droplet
        clone, taken_at = self._ephemeral.make_clone(turn.volume, turn.number)
        with contextlib.suppress(DropletLost):  # then it is attached to another one, before its sync
            self._ephemeral.attach(clone, hosts.get()[0])
        return clone, taken_at

    def _release(self, clone: Volume, hosts: Hosts, upcoming: Prepared) -> None:
        """Detach the clone and delete it, after the next one's attachment: that one is waited for first."""
        concurrent.futures.wait([upcoming], timeout=self.RELEASE_DELAY)
        try:
            self._ephemeral.release(clone, hosts.get()[0])
        except (DosvobError, Interrupted) as problem:
            self._report.detail(f"{problem}; {clone.name} is removed at the end of the run")

    # In the foreground

    def _sync(self, turn: Turn, clone: Volume, taken_at: str, hosts: Hosts) -> None:
        """Make the clone's content the volume's image."""
        start, volume, name = time.monotonic(), turn.volume, turn.name
        self._report.current = f"backing up {name}"
        self._report.detail(f"{name}: syncing its snapshot of {taken_at}")
        self._results[name] = dataclasses.replace(self._results[name], outcome="begun")
        paths = ImagePaths(self._job.home.path, name)
        snapshot = Snapshot(volume.id, name, volume.region, clone.size, taken_at)

        def warn(text: str) -> None:
            self._report.warn(f"{name}: {text}")

        meter = Meter(self._report, self._job.stop, f"{name}: reading and writing here")
        try:
            update = Update(paths, snapshot, self._job.config.keep, warn, meter, reread=self._reread)
            with contextlib.closing(update):
                try:
                    received = hosts.converse(clone, Pull(update), name)
                    update.finish()
                except OSError as problem:
                    if is_disk_full(problem):
                        update.free_space()
                    raise
            if update.differing.ranges:
                warn(
                    f"{human_size(update.differing.size)} of the image differs from what was recorded, or "
                    f"cannot be read: {update.differing}. Either it was mounted or opened for writing, or the "
                    "disk is failing; the volume's content was put back"
                )
            if self._results[name].is_thinned:
                thin(self._job, paths)
        except (DosvobError, OSError) as problem:
            self._fail(turn, problem)
        else:
            result = Result(name, snapshot.size, "ok", update.changed, received, time.monotonic() - start)
            self._results[name] = result
            self._report.end_progress()
            self._report.say(
                f"{name}: backed up {human_size(result.size)} in {human_time(result.seconds)}, "
                f"{human_size(result.changed)} had changed, {human_size(result.fetched)} were fetched"
            )


# ── The way back ─────────────────────────────────────────────────────────────────────────────────────────────────────
# A new volume is made of an image, of an older version or of any file: a throwaway volume, which begins with what the
# image's own volume has now if that is still there, is made what the source is over a droplet; then the new volume is
# made from a snapshot of it. So the new one is whole from its birth, and all else goes by the one rule.


@dataclass(frozen=True)
class Source:
    """What a volume is made of; `size` in bytes.

    `region`, `volume_id` and `volume_name` are those of the volume that it was, as far as they are known; `snapshot_at`
    is when the last snapshot of that was taken here. Each call of `chunks` begins at the beginning; what it yields of a
    hole is ZERO_CHUNK. It raises Damaged.
    """

    name: str
    size: int
    is_checked: bool  # whether the digests of what it has are recorded
    chunks: Callable[[], Iterator[tuple[int, bytes]]]
    region: str = ""
    volume_id: str = ""
    volume_name: str = ""
    snapshot_at: str = ""

    @classmethod
    @contextlib.contextmanager
    def of_file(cls, path: Path) -> Iterator[Source]:
        """A plain file; raises OSError, UsageError."""
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        with contextlib.closing(SparseFile(path)) as file:
            size = os.fstat(file.fd).st_size

            def chunks() -> Iterator[tuple[int, bytes]]:
                for index in range(-(-size // CHUNK)):
                    if (chunk := file.chunk(index)) is None:
                        raise Damaged(f"{path} cannot be read at byte {index * CHUNK}: the disk may be failing")
                    yield index, chunk

            yield cls(str(path), size, is_checked=False, chunks=chunks)

    @classmethod
    @contextlib.contextmanager
    def of_image(cls, paths: ImagePaths, moment: datetime.datetime | None) -> Iterator[Source]:
        """An image, or the version that it had at that time; raises Damaged for what is seen to be, without reading it.

        Raises UsageError if there is none, OSError.
        """
        with contextlib.closing(Chain(paths)) as chain:
            depth = chain.depth_at(moment)
            snapshot = chain.versions[depth - 1].snapshot if depth else chain.state.snapshot if chain.state else None
            taken = chain.versions[depth - 1].moment if depth else chain.moment
            name = f"{paths.name} of {local_time(taken)}" if taken else paths.name
            at = ["--at", f"'{local_time(taken)}'"] if taken else []
            rest = f"to restore the rest of it to a file: {command_line('restore', paths.name, 'FILE', *at)}"
            size = snapshot.size if snapshot else chain.size
            for version in chain.versions[:depth]:
                if not version.is_whole:
                    raise Damaged(f"{version.path} is damaged; {rest}")
            if chain.problem or chain.length < min(size, chain.size):
                raise Damaged(
                    f"{chain.problem or f'{paths.image} has only {chain.length} bytes of {chain.size}'}; {rest}"
                )

            def chunks() -> Iterator[tuple[int, bytes]]:
                for index, contents, soundness in itertools.islice(chain.chunks(depth), size // CHUNK):
                    if not soundness[depth]:
                        raise Damaged(f"{name} is damaged at byte {index * CHUNK}; {rest}")
                    yield index, contents[depth]

            yield cls(
                name,
                size,
                is_checked=chain.state is not None,
                chunks=chunks,
                region=snapshot.region if snapshot else "",
                volume_id=snapshot.volume_id if snapshot else "",
                volume_name=(snapshot.name if snapshot else paths.image.name).rpartition("/")[2],
                snapshot_at=chain.state.snapshot.taken_at if chain.state else "",
            )


@dataclass(frozen=True)
class NewVolume:
    """A volume that is to be made; `size` in bytes."""

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
        account = Api.required(api.get("/v2/account"), "account", dict)
        for kind, count in ((VOLUME, len(items)), (DROPLET, len(api.list("/v2/droplets", "droplets")))):
            limit = account.get(f"{kind}_limit")
            if isinstance(limit, int) and count >= limit:
                raise UsageError(f"your account may have {limit} {kind}s and has {count}: see {LIMITS_PAGE}")
        return volumes

    def base(self, source: Source, volumes: Iterable[Volume], *, from_scratch: bool) -> tuple[Volume | None, str]:
        """The volume to begin with, None for none; and what is told of that."""
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

    def __init__(self, job: Job, plan: DropletPlan, source: Source, new: NewVolume, base: Volume | None) -> None:
        stop = Stop(job.stop)  # what ends with this
        self._job = dataclasses.replace(job, stop=stop, api=job.api.with_stop(stop))
        self._plan = plan
        self._source = source
        self._new = new
        self._base = base
        self._ephemeral = Ephemeral(self._job.api, job.home.id, job.report)

    def run(self) -> Volume:
        """Make it; returns it when all else is removed."""
        with self._ephemeral:
            made = self._make()
        cost = self._ephemeral.cost()
        self._job.report.say(f"this run cost about ${cost:.4f}, DigitalOcean's minimum charges included")
        return made

    def _make(self) -> Volume:
        new, report = self._new, self._job.report
        volume, is_empty = self._throwaway()
        with contextlib.closing(Hosts(self._job, self._ephemeral, self._plan)) as hosts:
            try:
                sent = self._fill(volume, hosts, is_empty=is_empty)
            except BaseException:
                self._job.stop.request()  # a droplet that is still being made is of no use any more
                raise
            finally:
                report.end_progress()
        report.say(f"all that {new.name} is to have is there, and was compared: {human_size(sent)} were sent")
        described = self._source.name if self._source.volume_name else "a file"
        make_new = functools.partial(self._ephemeral.make_new, new.name, f"restored by dosvob: {described}", volume)
        return self._when_allowed(make_new, new.name)

    def _throwaway(self) -> tuple[Volume, bool]:
        """The volume that becomes what the source is, and whether it is empty."""
        new, base, report = self._new, self._base, self._job.report
        if base is not None:
            make_clone = functools.partial(self._ephemeral.make_clone, base, 0, new.size)
            hint = "; --from-scratch begins at once, with an empty volume"
            try:
                return self._when_allowed(make_clone, base.name, self._source.snapshot_at, hint)[0], False
            except ApiError as problem:
                if problem.status != 404:
                    raise
            report.say(f"{base.name} is gone meanwhile: {new.name} begins empty")
        return self._ephemeral.make_empty(new.region, new.size), True

    def _when_allowed(self, work: Callable[[], T], name: str, last: str = "", hint: str = "") -> T:
        """Do what takes a snapshot when DigitalOcean does so: once in ten minutes of a volume; `last` was its last."""
        interval, retry, report, until = Backup.SNAPSHOT_INTERVAL, Backup.SNAPSHOT_RETRY, self._job.report, 0.0
        while True:
            try:
                return work()
            except ApiError as problem:
                if problem.status != 429 or (until and time.monotonic() > until + 3 * retry):
                    raise
                since = age(last)
                wait = problem.wait or (interval - since if 0 <= since < interval else None)
            if not until:
                seconds = wait or interval
                until, moment = time.monotonic() + seconds, local_time(utc_now() + datetime.timedelta(seconds=seconds))
                rule = "DigitalOcean takes one snapshot of a volume per 10 minutes"
                report.say(f"{name}: {rule}, the next one {'at' if wait else 'by'} {moment}{hint}")
            end = time.monotonic() + (wait or retry)
            while (left := end - time.monotonic()) > 0:
                seconds = max(until - time.monotonic(), 0)
                report.progress(f"{name}: {human_time(seconds)} until DigitalOcean takes its next snapshot")
                self._job.stop.sleep(min(left, 0.5))

    def _fill(self, volume: Volume, hosts: Hosts, *, is_empty: bool) -> int:
        """Make the volume what the source is, with zeros behind that; returns the bytes sent."""
        chunks, source, new = volume.size // CHUNK, self._source, self._new

        def contents() -> Iterator[tuple[int, bytes]]:
            beyond = range(-(-source.size // CHUNK), chunks)
            return itertools.chain(source.chunks(), ((index, ZERO_CHUNK) for index in beyond))

        def warn(text: str) -> None:
            self._job.report.warn(f"{new.name}: {text}")

        with tempfile.TemporaryFile(dir=self._job.home.metadata) as digests:
            push = Push(contents, chunks, digests, warn, is_empty=is_empty)
            hosts.converse(volume, push, new.name)
        return push.sent


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the user can ask for, and how a run goes that does it.


class Selection:
    """Which of the account's volumes are backed up: of those in the regions of conf.json, the ones that it names.

    `account` are all that there are.
    """

    def __init__(self, job: Job) -> None:
        """Tells of regions that have none; raises UsageError if there is none in any."""
        self._job = job
        config = job.config
        items = job.api.list("/v2/volumes", "volumes")
        volumes = sorted((Volume.parse(item) for item in items if not Resource.is_ephemeral(item)), key=job.name)
        regions = set(config.regions or [volume.region for volume in volumes])
        here = [volume for volume in volumes if volume.region in regions]
        elsewhere = [volume for volume in volumes if volume.region not in regions]
        others = ", ".join(sorted(f"{volume.name} ({volume.region})" for volume in elsewhere))
        for region in sorted(regions - {volume.region for volume in here}):
            problem = f"there are no volumes in {region}"
            problem += f'; there are {others}: is "region" in conf.json right?' * bool(others)
            try:
                DropletPlan.make(job.api, config, region)
            except UsageError as better:  # there is no such region
                problem = str(better)
            if not here:
                raise UsageError(problem)
            job.report.error(problem)
        if not here:
            raise UsageError("there are no volumes in the account")
        if elsewhere:
            job.report.say(f"not backed up, because in another region than {', '.join(sorted(regions))}: {others}")
        self._here, self._elsewhere = here, elsewhere
        self.account = volumes

    def chosen(self, names: Sequence[str]) -> list[Volume]:
        """Those to back up; raises UsageError for a name that fits none, tells of one that no volume can have."""
        job, here, config = self._job, self._here, self._job.config
        where = ", ".join(sorted({volume.region for volume in here}))
        there_are = f"there are {', '.join(job.name(volume) for volume in here)}"
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
                    job.report.warn(f'"{key}" in conf.json: no volume in {where} matches "{pattern}"; {there_are}')
        chosen = self._matching(here, names or config.include or ("*",))
        excluded = () if names else self._matching(here, config.exclude)
        chosen = [volume for volume in chosen if volume not in excluded]
        if not chosen:
            raise UsageError(f'"include" and "exclude" in conf.json leave no volume to back up; {there_are}')
        for volume in chosen:
            if not self._is_fit(volume):  # it would become a path
                job.report.error(f"{volume.name!r} is not a name that a volume can have: it is not backed up")
        return [volume for volume in chosen if self._is_fit(volume)]

    @staticmethod
    def _matching(volumes: Iterable[Volume], patterns: Sequence[str]) -> list[Volume]:
        """Those that one of the shell patterns fits: of names, or with a slash of a region and a name."""

        def fits(volume: Volume, pattern: str) -> bool:
            return fnmatch.fnmatchcase(f"{volume.region}/{volume.name}" if "/" in pattern else volume.name, pattern)

        return [volume for volume in volumes if any(fits(volume, pattern) for pattern in patterns)]

    @staticmethod
    def _is_fit(volume: Volume) -> bool:
        return all(ImagePaths.VOLUME_NAME.fullmatch(name) for name in (volume.name, volume.region))


def sweep(job: Job, not_before: float = 0.0, *, everything: bool = False, dry_run: bool = False) -> list[Resource]:
    """Remove this home's leftovers and those of no home, and report what stays; name those of other homes.

    What another home has may be in use: `everything` removes it too. With `not_before` (time.monotonic) it is gone on
    until a list shows nothing that was asked for after that. Returns what was found to be removed; a `dry_run` only
    names it.
    """
    report, ours = job.report, ("", job.home.id)
    found: list[Resource] = []
    kinds = list(KINDS)
    refused: ApiError | None = None
    for kind in KINDS:
        try:
            found += Resource.list(job.api, kind)
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
        seconds = age(resource.created_at)
        how_old = "of unknown age" if seconds == float("inf") else f"{human_time(max(seconds, 0))} old"
        tell = report.say if seconds < 24 * 3600 or not resource.hourly else report.warn  # no run takes so long
        tell(
            f"not touched, because it belongs to another backups directory (its id is {resource.home}): {resource}, "
            f"{how_old}. If nothing backs up to that any more: {command_line('sweep', '--all')}"
        )
    if (leftovers or not_before) and not dry_run:
        removal = Removal(job.api, lambda item: everything or item.home in ours, not_before, report.doing, kinds)
        report.left_behind(removal.run(), of_all=everything)
    if refused:
        raise refused
    return leftovers


class Misplaced:
    """The images that lie where another "region" in conf.json had them, as far as they may be these volumes'."""

    def __init__(self, job: Job, volumes: Sequence[Volume]) -> None:
        self._job = job
        self._volumes = volumes

    def images(self) -> Iterator[tuple[ImagePaths, str]]:
        """Each, and the name of where it belongs, "" if nobody knows.

        That is told by a region's directory, or else by the state. Of what has none only what may be one of these
        volumes' is named.
        """
        config, home = self._job.config, self._job.home
        elsewhere = {volume.name if config.by_region else f"{volume.region}/{volume.name}" for volume in self._volumes}
        for name in sorted(home.names() | elsewhere):
            old = ImagePaths(home.path, name)
            region, _, base = name.rpartition("/")
            has_anything = any(path.exists() for path in (old.image, old.partial, old.state, old.versions))
            if bool(region) == config.by_region or not has_anything:
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
        """Move them to where "region" has them now; returns the names of what is not to be backed up.

        Those are what could not be moved, for it would be fetched again; also if its recovery failed (`damaged`).
        """
        job, volumes = self._job, self._volumes
        failed: set[str] = set()
        for old, name in self.images():
            names = [name] if name else [job.name(volume) for volume in volumes if volume.name == old.name]
            try:
                if old.name in damaged:  # which was told
                    failed.update(names)
                    continue
                if not name:
                    raise DosvobError(self._how_to_move(old, [ImagePaths(job.home.path, name) for name in names]))
                job.home.move(old, ImagePaths(job.home.path, name))
                job.report.say(f'{old.name}: its image is {job.home.path / name} now, for "region" in conf.json')
            except (DosvobError, OSError) as problem:
                job.report.error(f"{old.name}: {explained(problem, old.directory)}")
                failed.update(names)
        return failed

    @staticmethod
    def _how_to_move(old: ImagePaths, places: Sequence[ImagePaths]) -> str:
        """What to do about an image that may belong in any of these places."""
        files = " ".join(str(path) for path in (old.image, old.partial) if path.exists())
        metadata = " ".join(str(path) for path in (old.state, old.versions) if path.exists())
        new = places[0]
        commands = [f"mkdir -p {new.metadata}"]
        commands += [f"mv {files} {new.directory}/"] if files else []
        commands += [f"mv {metadata} {new.metadata}/"] if metadata else []
        regions = " or ".join(place.directory.name for place in places)
        return (
            f"nothing tells of which region {files or metadata} is, {regions} perhaps, so that is not backed up. If it "
            f"is of {new.directory.name}: {' && '.join(commands)}; otherwise move it elsewhere"
        )


class Run:
    """One backup of some volumes; the lock is held."""

    def __init__(self, job: Job, names: Sequence[str], *, reread: bool) -> None:
        """`names` are those on the command line."""
        self._job = job
        self._names = names
        self._reread = reread
        self._results: dict[str, Result] = {}  # by the name of the image

    def run(self) -> None:
        """From the leftovers of an earlier run to what this one cost."""
        job, home, report = self._job, self._job.home, self._job.report
        try:
            sweep(job)  # first: what is left costs money while a large backup is taken back
        finally:
            damaged = home.recover(report, job.stop)
        selection = Selection(job)
        volumes = selection.chosen(self._names)
        plans = self._plan_droplets(volumes)
        if not self._names:
            try:
                home.write("wanted.json", json.dumps([job.name(volume) for volume in volumes]))
            except OSError as problem:
                report.warn(
                    f"{explained(problem, home.path)}; `health` will not miss a volume that was never backed up"
                )
        damaged |= Misplaced(job, volumes).move(damaged)
        fit = [volume for volume in volumes if job.name(volume) not in damaged]
        self._results = {job.name(volume): Result(job.name(volume), volume.size, "not begun") for volume in fit}
        self._thin_all(selection.account, damaged)
        self._tell_remains(selection.account)
        job.try_storage(fit)
        cost = 0.0
        try:
            for _, volumes_there in itertools.groupby(fit, lambda volume: volume.region):
                cost += self._back_up_region(plans, list(volumes_there))
        except Interrupted:
            self._tell_interrupted()
            raise
        if self._results:
            rows = [
                ("VOLUME", "SIZE", "CHANGED", "FETCHED", "TIME", ""),
                *(result.row() for result in self._results.values()),
            ]
            report.say(table(rows, (0, 5)), is_result=True)
            report.say(f"this run cost about ${cost:.4f}, DigitalOcean's minimum charges included", is_result=True)
        if not report.left:
            report.say("nothing of this home's is left in the account")

    def _tell_remains(self, volumes: Iterable[Volume]) -> None:
        """Say what syncs left of volumes that the account has no more."""
        job, names = self._job, {self._job.name(volume) for volume in volumes}
        for path, name in job.home.remains().items():
            if name not in names:
                size = human_size(job.home.occupied(path))
                job.report.say(f"{path} takes {size}, and the account has no volume {name}: delete it if you do not "
                               "need it")  # fmt: skip

    def _thin_all(self, volumes: Iterable[Volume], damaged: Container[str]) -> None:
        """Thin the versions of all volumes: the disk may be full, "keep" ask for fewer, and the first need the space.

        What is not of the volume that has its name is set aside by the volume's turn, as it is.
        """
        job, results = self._job, self._results
        for volume in volumes:
            name = job.name(volume)
            with contextlib.suppress(OSError, DosvobError):  # which its turn meets, and tells
                paths = ImagePaths(job.home.path, name)
                state = State.load(paths.state, whole=False)
                is_fit = state is not None and state.snapshot.volume_id == volume.id and name not in damaged
                if is_fit and paths.image.exists() and not thin(job, paths) and name in results:
                    results[name] = dataclasses.replace(results[name], is_thinned=False)

    def _plan_droplets(self, volumes: Iterable[Volume]) -> dict[str, DropletPlan]:
        """What droplets to create, by region; one of several regions that cannot have one fails for itself."""
        job, plans = self._job, {}
        for region in dict.fromkeys(volume.region for volume in volumes):
            try:
                plans[region] = DropletPlan.make(job.api, job.config, region)
            except DosvobError as problem:
                if not job.config.by_region:
                    raise
                job.report.error(f"{region}: {problem}")
        return plans

    def _back_up_region(self, plans: Mapping[str, DropletPlan], volumes: Sequence[Volume]) -> float:
        """Back up volumes of one region; returns what it cost. If it fails, that is no matter of other regions."""
        job, results, region = self._job, self._results, volumes[0].region
        try:
            if job.config.by_region:
                job.home.make_directory(region)
            if region in plans:
                return Backup(job, plans[region], volumes, results, reread=self._reread).run()
        except (DosvobError, OSError) as problem:
            job.report.error(f"{region}: {explained(problem, job.home.path)}")
        for volume in volumes:
            name = job.name(volume)
            if results[name].outcome != "ok":
                results[name] = dataclasses.replace(results[name], outcome="FAILED")
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
        self._job.report.say(f"interrupted; {'; '.join(told)}", is_result=True)


class Commands:
    """What the user can ask for, each a method. It has failed if it raises, or reports an error.

    Those that need no account: `verify`, `health`, `list`, and `restore` to a file.
    """

    def __init__(self, arguments: argparse.Namespace, report: Reporter, stop: Stop) -> None:
        self._arguments = arguments
        self._report = report
        self._stop = stop
        self._home = Home(arguments.backups)

    def _job(self) -> Job:
        """What a command that needs the account is given; raises UsageError."""
        report, stop = self._report, self._stop
        for package in PACKAGES.values():
            package.check()
        config = Config.load(self._arguments.config, os.environ, report.warn)
        report.secret = config.token
        if self._arguments.dry_run and self._home.path.is_dir():
            with self._home.unchanged():  # what a run at work has created would be taken for leftovers
                pass
        patience = Api.DRY_RUN_PATIENCE if self._arguments.dry_run else Api.PATIENCE
        return Job(config, Api(config, stop, report.say, report.detail, patience), self._home, report, stop)

    def back_up(self) -> None:
        """The main job."""
        job, report = self._job(), self._report
        if self._arguments.dry_run:
            self._dry_run(job)
            return
        url = job.config.healthchecks
        try:
            with job.home.locked():
                ping(url, "/start", report)
                Run(job, self._arguments.names, reread=self._arguments.reread).run()
        except Busy:
            raise  # nothing is wrong; of what takes too long the pings tell that do not come
        except (Exception, Interrupted) as problem:
            ping(url, "/fail", report, str(problem))
            raise
        ping(url, "/fail" if report.has_failed else "", report)

    def _dry_run(self, job: Job) -> None:
        """Say what a backup would do; changes nothing."""
        sweep(job, dry_run=True)
        volumes = Selection(job).chosen(self._arguments.names)
        moved = {name: old for old, name in Misplaced(job, volumes).images()} if job.home.path.is_dir() else {}
        for volume in volumes:
            name = job.name(volume)
            image = ImagePaths(job.home.path, name).image
            old = moved.get(name)
            how = "changes only" if image.exists() or (old and old.image.exists()) else "all of it, for the first time"
            first = f" (where {old.image} goes first)" if old else ""
            self._report.say(f"would back up {name}, {volume.size // GIB} GiB, to {image}{first}: {how}")
        for region in dict.fromkeys(volume.region for volume in volumes):
            plan = DropletPlan.make(job.api, job.config, region)
            size, price = plan.sizes[0]
            gib = [volume.size / GIB for volume in volumes if volume.region == region]
            least = KINDS[DROPLET].least + len(gib) * KINDS[SNAPSHOT].least + sum(gib) * KINDS[VOLUME].gib_hour
            self._report.say(
                f"would do so over a droplet {size} with {plan.image} in {region}, at ${price:.5f} an hour: about "
                f"${least:.2f} for a run, if it takes less than an hour"
            )
        job.try_storage(volumes, dry_run=True)

    def sweep(self) -> None:
        """Remove leftovers, and nothing else."""
        arguments, report = self._arguments, self._report
        if arguments.names:
            raise UsageError("sweep takes no names: it removes all that dosvob left behind")
        job = self._job()
        if arguments.dry_run:
            if not sweep(job, everything=arguments.all, dry_run=True):
                report.say("there is nothing to remove")
            return
        with job.home.locked():
            sweep(
                job, time.monotonic() + LIST_LAG, everything=arguments.all
            )  # what was created a moment ago shows late
            job.home.recover(report, self._stop)
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
            names = home.chosen(self._arguments.names, with_aside=False)
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
            problems = [str(chain.problem)] if chain.problem else []
            meter = Meter(report, self._stop, f"{paths.name}: verified", chain.size)
            if chain.state is None and not problems:
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
        for version, ranges in zip(chain.versions, versions, strict=True):
            if ranges.ranges or not version.is_whole:
                lost = f"cannot be restored in {ranges}" if ranges.ranges else "can be restored whole"
                damaged = f"; {version.path} is damaged" * (not version.is_whole)
                problems.append(f"the version of {local_time(version.moment)} {lost}{damaged}")
        for problem in problems:
            report.error(f"{paths.name}: {problem}")
        if is_recorded and not problems:
            and_versions = f", and {len(versions)} older version{'s' * (len(versions) > 1)}" if versions else ""
            sound = "sound" if chain.state else "nothing is seen to be damaged, but the image has no digests"
            report.say(f"{paths.name}: {sound}, {human_size(chain.size)}{and_versions}")

    def health(self) -> None:
        """Say how old each backup is, without network, account or lock; fails if one is too old, or there is none."""
        home, report = self._home, self._report
        self._home.check()
        wanted = home.wanted()
        there = wanted | {name for name in home.names(with_aside=False) if ImagePaths(home.path, name).state.exists()}
        asked = [found for name in self._arguments.names for found in Home.called(name, there) or [name]]
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
        if problem := self._unfinished(paths):
            raise DosvobError(problem)
        state = State.load(paths.state, whole=False)
        if state is None:
            raise DosvobError("there is no complete backup of it yet")
        if not paths.image.exists():
            raise DosvobError(f"{paths.image} is missing: the next backup fetches all of it")
        if state.identity is None:
            raise DosvobError(f"{paths.image} may not be what was backed up: the next backup compares and mends it")
        seconds = max((utc_now() - state.moment).total_seconds(), 0)
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
        return told + (f"; versions back to {local_time(versions[-1].moment)}" if versions else "")

    def _unfinished(self, paths: ImagePaths) -> str:
        """What to say of an image that a crash left between two snapshots; nothing of another one."""
        with Undo.left(paths) as undo:
            if undo is not None and not undo.is_committed and not self._home.is_busy():
                return f"an interrupted backup must still be taken back: {command_line('verify', paths.name)}"
        return ""

    def list(self) -> None:
        """Say what is there to be restored, without network, account or lock."""
        home, report = self._home, self._report
        self._home.check()
        found = [self._described(ImagePaths(home.path, name)) for name in home.chosen(self._arguments.names)]
        if self._arguments.json:
            report.answer(json.dumps({"volumes": found}, indent=2))
            return
        if not found:
            report.say(f"there is no backup in {home.path} yet")
        rest = [
            f"{path}: {human_size(home.occupied(path))}, of {name}"
            for path, name in home.remains().items()
            if "set-aside" not in path.name and (not self._arguments.names or name in self._arguments.names)
        ]
        told = [self._description(volume) for volume in found]
        told += ["\n  ".join(["left by syncs that are not complete, or put out of the way:", *rest])] if rest else []
        if told:
            report.answer("\n\n".join(told))

    def _described(self, paths: ImagePaths) -> Json:
        """What there is of a volume, in the form of `list --json`: README has it."""
        found: Json = {
            "name": paths.name,
            "region": None,
            "size": None,
            "occupied": 0,
            "problem": None,
            "versions": [],
        }

        def add(
            moment: datetime.datetime, version: Version | None = None, frees: int | None = None, **more: Any
        ) -> None:
            changed, occupied = (version.changed, version.occupied) if version else (None, found["occupied"])
            found["versions"].append(
                {"time": moment.isoformat(), "image": version is None, "changed": changed, "occupied": occupied,
                 "frees": frees, "damaged": False, **more}
            )  # fmt: skip

        try:
            paths.check_link()
            found["problem"] = self._unfinished(paths) or None
            status = paths.image.stat()
            found |= {"size": status.st_size, "occupied": status.st_blocks * 512}
            if (state := State.load(paths.state, whole=False)) is None:
                raise FileNotFoundError
            found |= {"region": state.snapshot.region, "size": state.snapshot.size}
            add(state.moment)
        except FileNotFoundError:
            missing = "no snapshot is recorded" if found["size"] else "the image is missing"
            found["problem"] = found["problem"] or missing
        except (OSError, DosvobError) as problem:
            found["problem"] = found["problem"] or explained(problem, paths.image)
        versions = Versions(paths).all()
        for version, older in itertools.zip_longest(versions, versions[1:]):
            try:
                add(version.moment, version, Versions.freed_by(version, older), damaged=not version.is_whole)
            except Damaged:
                add(version.moment, version, version.occupied, damaged=True)
            except FileNotFoundError:  # a run that goes on has thinned them meanwhile
                return self._described(paths)
        return found

    @staticmethod
    def _description(volume: Json) -> str:
        """The same, for people."""
        size = human_size(volume["size"]) if volume["size"] else "of unknown size"
        older = sum(version["occupied"] for version in volume["versions"] if not version["image"])
        here = human_size(volume["occupied"]) + " here" + f" and {human_size(older)} for older versions" * bool(older)
        lines = [f"{volume['name']}: {volume['region'] or 'region unknown'}, {size}, takes {here}"]
        if volume["problem"]:
            lines.append(f"  {volume['problem']}")
        rows = [("  TIME", "AGE", "CHANGED SINCE", "REMOVING FREES", "")]
        for version in volume["versions"]:
            moment = datetime.datetime.fromisoformat(version["time"])
            figures = ("-", "-") if version["image"] else (human_size(version["changed"]), human_size(version["frees"]))
            note = "damaged" if version["damaged"] else "the image" * version["image"]
            rows.append((f"  {local_time(moment)}", human_time(max(age(version["time"]), 0)), *figures, note))
        return "\n".join([*lines, table(rows, (0, 4))] if volume["versions"] else lines)

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
        job = self._job()
        with contextlib.nullcontext() if dry_run else job.home.locked():
            sweep(job, dry_run=dry_run)
            if file:
                opened = Source.of_file(file)
            else:
                job.home.check()
                paths = ImagePaths(job.home.path, job.home.meant(arguments.names[0]))
                opened = Source.of_image(paths, self._wanted_time())
            with opened as source:
                wish = self._wish(job, source)
                plan = DropletPlan.make(job.api, job.config, wish.region)
                base, why = wish.base(source, wish.check(job.api), from_scratch=arguments.from_scratch)
                would = "would make" if dry_run else "making"
                report.say(f"{would} {wish.name} in {wish.region}, {wish.size // GIB} GiB, of {source.name}; {why}")
                if dry_run:
                    self._tell_costs(plan, wish, snapshots=1 if base is None else 2)
                    return
                new = Restoration(job, plan, source, wish, base).run()
        unchecked = (
            "" if source.is_checked else "; whether that is what was backed up is not recorded, and was not checked"
        )
        made = f"{new.name} (id {new.id}, ${wish.price:.2f} a month) in {new.region}"
        report.say(
            f"{source.name} is now also the volume {made}: all of it was read back there and compared{unchecked}. "
            "To use it on a droplet of yours:\n"
            f"  doctl compute volume-action attach {new.id} DROPLET-ID\n"
            f"  mount {Link.device(new.name)} /mnt    # on the droplet"
        )

    def _wish(self, job: Job, source: Source) -> NewVolume:
        """The volume that is to be made of a source; raises UsageError."""
        arguments, least = self._arguments, -(-source.size // GIB)
        size = least if arguments.size is None else arguments.size
        if not least:
            raise UsageError(f"{source.name} is empty: there is nothing to make a volume of")
        if size < least:
            raise UsageError(f"{source.name} needs {least} GiB, and --size says {size}")
        regions = job.config.regions
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
            name = home.meant(name)
            try:
                with contextlib.closing(Chain(ImagePaths(home.path, name))) as chain:
                    depth = chain.depth_at(self._wanted_time())
                    version = chain.versions[depth - 1].moment if depth else chain.moment
                    told = (
                        f"{name} of {local_time(version)}" if version else f"{name}, of which no digests are recorded,"
                    )
                    meter = Meter(report, self._stop, f"{name}: restored", chain.size)
                    is_recorded = chain.state is not None
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
        """That of --at: as `list` prints it, ISO 8601, `yesterday`, `3 days ago`; a date means its end.

        Raises UsageError.
        """
        if (text := self._arguments.at) is None:
            return None
        now = datetime.datetime.now().astimezone()
        if match := re.fullmatch(r"(\d{1,5}) (minute|hour|day|week)s? ago", text.strip()):
            return now - datetime.timedelta(**{f"{match[2]}s": int(match[1])})
        day = now.date()
        if text.strip() in ("today", "yesterday"):
            text = str(day - datetime.timedelta(days=text.strip() == "yesterday"))
        try:
            moment = datetime.datetime.fromisoformat(re.sub(r"\s+(?=[+-]\d\d:?\d\d$)", "", text.strip()))
            if re.fullmatch(r"[\d-]{8,10}", text.strip()):
                moment += datetime.timedelta(days=1, microseconds=-1)
            return moment.astimezone()
        except (ValueError, OverflowError):
            raise UsageError(
                f'"{text}" is not a time: "2026-11-24", "2026-11-24 08:00", with an offset if it is not of here, '
                '"yesterday" or "3 days ago"'
            ) from None


# ── main ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The command line, signals and exit codes.

EPILOG = """\
examples:
  python dosvob.py                  back up all volumes that conf.json names to ./backups
  python dosvob.py data 'db-*'      back up these volumes only
  python dosvob.py list             say what there is to restore, with times, offline
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
ACCOUNT = {"config", "backups", "dry_run"}
TO_VOLUME = {"config", "dry_run", "to_volume", "region", "size", "from", "from_scratch"}
COMMANDS: Mapping[str, tuple[Callable[[Commands], None], set[str]]] = {
    # what does it, and the options that it uses
    "": (Commands.back_up, {*ACCOUNT, "reread"}),
    "sweep": (Commands.sweep, {*ACCOUNT, "all"}),
    "verify": (Commands.verify, {"backups"}),
    "health": (Commands.health, {"backups", "max_age"}),
    "list": (Commands.list, {"backups", "json"}),
    "restore": (Commands.restore, {"backups", "at", *TO_VOLUME}),
}
DEFAULTS: Json = {
    "config": Path("conf.json"),
    "backups": Path("backups"),
    "max_age": 24.0,
    **dict.fromkeys(("at", "to_volume", "region", "size", "from")),
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `command` is one of COMMANDS, `names` what follows."""

    def hours(text: str) -> float:
        """A positive number of hours; ValueError is argparse's way."""
        value = float(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parser = argparse.ArgumentParser(
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
    parser.add_argument("--json", action="store_true", help="for list: for programs")
    parser.add_argument("--max-age", type=hours, metavar="HOURS", help="for health; default: 24")
    parser.add_argument("--verbose", action="store_true", help="tell every call, and tracebacks")
    parser.add_argument("--quiet", action="store_true", help="tell only warnings and errors")
    parser.add_argument("--version", action="version", version=f"dosvob {VERSION}")
    given = vars(parser.parse_intermixed_args(arguments))
    names = given.setdefault("names", [])
    command = names.pop(0) if names and names[0] in COMMANDS else ""
    for option in given.keys() - COMMANDS[command][1] - {"names", "verbose", "quiet"}:
        parser.error(f"{command or 'a backup'} does not use --{option.replace('_', '-')}")
    if command == "restore" and "to_volume" not in given:
        for option in TO_VOLUME & given.keys():
            parser.error(f"restore uses --{option.replace('_', '-')} with --to-volume alone")
    flags = dict.fromkeys(("dry_run", "reread", "all", "json", "from_scratch", "verbose", "quiet"), False)
    return argparse.Namespace(**{**flags, **DEFAULTS, **given, "command": command})


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
    """Let closed standard streams lead nowhere: an image that got their number when opened would get their messages."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - open as long as the program runs
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show is no reason to lose the line


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    open_standard_streams()
    try:
        parsed = parse_arguments(arguments)
    finally:  # argparse writes help and errors to what may be a closed pipe, which Python would tell of at its exit
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # what it logs also reaches us as exceptions
    report = Reporter(quiet=parsed.quiet, verbose=parsed.verbose)
    stop = Stop()
    signals = Signals(stop, report)
    code = run_command(parsed, report, stop)
    if signals.number:
        code = 128 + signals.number
    if report.left:
        code = EXIT_FAILED
    if not report.close():
        os._exit(code)  # Python would wait for what cannot be written
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
    sys.exit(main())
