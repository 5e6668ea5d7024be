#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["requests>=2.32,<3", "paramiko>=5,<6"]
# ///
"""dosvob: back up DigitalOcean volumes into plain raw disk images on a local disk.

For every volume of a region it takes a snapshot, makes a clone of it, attaches the clone to a small throwaway droplet,
and over SSH fetches only what differs from the local image `backups/NAME`; then it removes all that it created.

What it promises:

- The image is at every moment one complete snapshot, or the journal beside it completes it at the next start.
- Whatever it creates is named `dosvob-ephemeral-…`, is removed at the end of the run however that ends, and is named
  loudly if it could not be removed.

What it does not promise: a history of versions (take snapshots of the backups directory for that), or consistency
beyond that of a disk whose power was cut (which is what a snapshot of a volume in use is).

The chapters, lower ones knowing nothing of higher ones: errors and cancellation, configuration, the DigitalOcean API,
ephemeral resources, the agent, the image and its journal, the sync, the connection, reporting, commands, main.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
import fnmatch
import hashlib
import inspect
import io
import itertools
import json
import logging
import os
import queue
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO, Protocol, TypeVar

import paramiko
import requests

VERSION = "1.0.0"
GIB = 1 << 30
Json = dict[str, Any]
T = TypeVar("T")


# ── Errors and cancellation ──────────────────────────────────────────────────────────────────────────────────────────
# One family of errors, each with a message fit for the user; and the way in which a signal reaches all threads.


class DosvobError(Exception):
    """Something went wrong; the message says what, to what, and what to do."""


class UsageError(DosvobError):
    """The command line, the configuration or the place to run in is wrong: exit code 2, and nothing was created."""


class Busy(UsageError):
    """Another dosvob is at work in the same place."""


class Interrupted(DosvobError):
    """The run was asked to stop."""


class Cancellation:
    """Carries the wish to stop to every thread, which look for it wherever they wait.

    A signal handler must not raise (the exception could hit the teardown) nor take a lock (the interrupted code may
    hold it), so `request` only sets an attribute, and waiting is done in short naps.
    """

    NAP = 0.1  # seconds; how late a wish to stop may be noticed

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Ask everyone to stop; safe in a signal handler."""
        self.requested = True

    def check(self) -> None:
        """Raise `Interrupted` if a stop was requested."""
        if self.requested:
            raise Interrupted("interrupted")

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise `Interrupted` as soon as a stop is requested."""
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self.NAP))
            self.check()


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


def utc_now() -> datetime.datetime:
    """The time now, in UTC, with whole seconds."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


# ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────────
# Reads conf.json and the environment. Whatever is wrong there is told in terms of the file, before anything is begun.

EXAMPLE_TOKEN = "dop_v1_PUT-YOUR-TOKEN-HERE"  # noqa: S105 - the placeholder in conf.json.example
DEFAULT_API_URL = "https://api.digitalocean.com"
TOKEN_VARIABLES = ("DIGITALOCEAN_ACCESS_TOKEN", "DIGITALOCEAN_TOKEN")  # those of doctl and of the Terraform provider
API_URL_VARIABLE = "DIGITALOCEAN_API_URL"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Config:
    """What conf.json and the environment say.

    `include` and `exclude` are shell patterns of volume names; an empty `include` means all. `droplet_size` and
    `droplet_image` are slugs, or None for the cheapest and the newest that will do. `healthchecks` is the address of a
    monitoring service that is told how each run goes; whoever knows it can do so too.
    """

    token: str = field(repr=False)
    region: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    droplet_size: str | None = None
    droplet_image: str | None = None
    api_url: str = DEFAULT_API_URL
    healthchecks: str | None = field(default=None, repr=False)


TEXT_KEYS = ("do_token", "region", "droplet_size", "droplet_image", "healthchecks")
LIST_KEYS = ("include", "exclude")


def load_config(path: Path, environment: Mapping[str, str], warn: Callable[[str], None]) -> Config:
    """Read and check the configuration; raise UsageError with a message in terms of the file."""
    content = read_json_object(path)
    check_keys(path, content)
    from_environment = next((environment[name] for name in TOKEN_VARIABLES if environment.get(name)), None)
    token = from_environment or content.get("do_token") or ""
    if not token or token == EXAMPLE_TOKEN:
        raise UsageError(
            f'{path}: "do_token" is still the placeholder or missing: make a token at '
            "https://cloud.digitalocean.com/account/api/tokens and put it there"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError("the DigitalOcean token has a space, a line break or another character that no token has")
    if not content.get("region"):
        raise UsageError(f'{path}: "region" is missing: the region of your volumes, such as "fra1"')
    if from_environment is None and path.stat().st_mode & 0o077:
        warn(f"{path} holds your token and others can read it: chmod 600 {path}")
    return Config(
        token=token,
        region=content["region"],
        include=tuple(content.get("include", ())),
        exclude=tuple(content.get("exclude", ())),
        droplet_size=content.get("droplet_size"),
        droplet_image=content.get("droplet_image"),
        api_url=checked_api_url(environment.get(API_URL_VARIABLE) or DEFAULT_API_URL),
        healthchecks=checked_healthchecks(path, content.get("healthchecks")),
    )


def read_json_object(path: Path) -> Json:
    """The JSON object in the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"there is no {path}: copy conf.json.example to {path} and put your token and region in it"
        ) from None
    except json.JSONDecodeError as problem:
        raise UsageError(f"{path}: line {problem.lineno}, column {problem.colno}: not JSON: {problem.msg}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"cannot read {path}: {problem}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold an object, {{…}}, as conf.json.example does")
    return content


def check_keys(path: Path, content: Json) -> None:
    """Every key is known and its value is of the right type."""
    known = (*TEXT_KEYS, *LIST_KEYS)
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}"
            raise UsageError(f'{path}: unknown key "{key}": {hint}')
        if key in TEXT_KEYS and not isinstance(value, str):
            raise UsageError(f'{path}: "{key}" must be a text in quotes')
        if key in LIST_KEYS and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise UsageError(f'{path}: "{key}" must be a list of names in quotes, such as ["data", "db-*"]')


def checked_api_url(url: str) -> str:
    """The endpoint without a trailing slash; the token must not travel in the clear, save on this very machine."""
    if is_private(url):
        return url.rstrip("/").removesuffix("/v2")
    raise UsageError(f"{API_URL_VARIABLE} is {url!r}: it must be an https:// address such as {DEFAULT_API_URL}")


def checked_healthchecks(path: Path, url: str | None) -> str | None:
    """The address to ping; what is told there, and the address itself, must not travel in the clear either."""
    if url and not is_private(url):
        raise UsageError(f'{path}: "healthchecks" must be an https:// address such as "https://hc-ping.com/YOUR-UUID"')
    return url or None


def is_private(url: str) -> bool:
    """Whether what is sent to an address stays secret on its way: by HTTPS, or within this very machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname if parts.port != 0 else None  # an impossible port is a ValueError only when it is read
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK_HOSTS))


# ── The DigitalOcean API ─────────────────────────────────────────────────────────────────────────────────────────────
# Calls that come back with an answer or with an error that says what to do. Knows how to page, when to wait, and what
# is safe to repeat; knows nothing of backups. The reference: https://docs.digitalocean.com/reference/api/

PAGE_SIZE = 200  # the API's maximum
CALL_TIMEOUT = (10, 60)  # seconds to connect, and between bytes of the answer
CALL_LIMIT = 120  # seconds for all of a call
RETRY_LIMIT = 300  # seconds for which a call that fails with 5xx, or without an answer, is repeated
TEARDOWN_RETRY_LIMIT = 10  # the same in a teardown, which comes back to what failed after it has tried the rest
FIRST_BACKOFF, MAX_BACKOFF = 0.5, 30  # seconds between repetitions, doubling
LIST_LAG = 6  # seconds after which a list is taken to show what was created: lists have been seen to lag behind
RATE_LIMIT_WAIT = 15  # seconds to wait after a 429 that does not say how long
RATE_LIMIT_PATIENCE = 7200  # seconds for which a call that meets 429 is repeated: the longest limit is by the hour
MOST_PAGES = 1000  # of a list, which holds 25 droplets or 100 volumes for most accounts
LIMITS_PAGE = "https://cloud.digitalocean.com/account/team/limits"
TOKENS_PAGE = "https://cloud.digitalocean.com/account/api/tokens"

SCOPES = {
    # https://docs.digitalocean.com/reference/api/scopes/ ; a 403 does not name the missing scope, so we do.
    "GET /v2/regions": "regions:read",
    "GET /v2/sizes": "sizes:read",
    "GET /v2/images": "image:read",
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
    """The API refused a call: carries the HTTP status and, for a 429, the seconds to wait (None: it did not say)."""

    def __init__(self, call: str, status: int, answer: Json, wait: float | None = None) -> None:
        self.status = status
        self.wait = wait
        said = str(answer.get("message") or answer.get("id") or "no message")
        request = f", request {answer['request_id']}" if answer.get("request_id") else ""
        super().__init__(f'DigitalOcean refused {call}: "{said}" (HTTP {status}{request}).{advice(call, status)}')

    @property
    def transient(self) -> bool:
        """Whether the same call may well succeed later."""
        return self.status >= 500 or self.status in (408, 429)


class NoAnswer(DosvobError):
    """A call went out and no usable answer came back: it may or may not have taken effect."""


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
        return f" It redirects, and your token goes nowhere else: is {API_URL_VARIABLE} right?"
    return by_status.get(status, " It is DigitalOcean's fault: see https://status.digitalocean.com" * (status >= 500))


class TokenAuth(requests.auth.AuthBase):
    """Sets the token on each request; as an auth object it keeps a ~/.netrc from replacing it."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Set it."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Api:
    """The calls, each with the patience that suits it.

    `say` is told of every wait; `detail` of every call. A stop that is requested ends the waiting with `Interrupted`,
    never a call that is under way.
    """

    def __init__(
        self,
        url: str,
        token: str,
        cancellation: Cancellation,
        say: Callable[[str], None],
        detail: Callable[[str], None],
    ) -> None:
        self._url = url
        self._token = token
        self._cancellation = cancellation
        self._say = say
        self._detail = detail
        self._retry_limit = RETRY_LIMIT
        self._limited_since: float | None = None  # the first of the 429s that no other answer has come after
        self._sessions = threading.local()  # requests does not promise that a session can be shared by threads

    def to_the_end(self) -> Api:
        """The same API for a teardown: no signal stops it, and no call holds it up for long, save by the rate limit."""
        api = Api(self._url, self._token, Cancellation(), self._say, self._detail)
        api._retry_limit = TEARDOWN_RETRY_LIMIT
        return api

    def sleep(self, seconds: float) -> None:
        """Sleep, unless a stop is requested."""
        self._cancellation.sleep(seconds)

    def get(self, path: str, **params: str | int) -> Json:
        """GET, repeated while it fails in a way that may pass."""
        return self._patiently("GET", path, params)

    def delete(self, path: str) -> bool:
        """DELETE, repeated likewise; False if it is gone already, or so fresh that it is not known yet."""
        try:
            self._patiently("DELETE", path)
        except ApiError as problem:
            if problem.status != 404:
                raise
            return False
        return True

    def list(self, path: str, key: str, **params: str | int) -> list[Json]:
        """All items of a list, from all its pages."""
        items: list[Json] = []
        for page in range(1, MOST_PAGES + 1):
            answer = self.get(path, **params, per_page=PAGE_SIZE, page=page)
            found = answer.get(key)
            if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
                raise DosvobError(f'DigitalOcean answered GET {path} without a list of "{key}": try again later')
            items += found
            if not found or not next_page(answer):
                return items
        raise DosvobError(f"DigitalOcean's answers to GET {path} have no end: try again later")

    def post(self, path: str, body: Json, *, defer: bool = False) -> Json:
        """POST, once that is let through; with `defer`, a 429 is the caller's to handle.

        A lost answer is `NoAnswer`, and it is the caller's to find out what became of it.
        """
        start = time.monotonic()
        while True:
            try:
                return self._once("POST", path, body=body)
            except ApiError as problem:
                if problem.status != 429 or defer:
                    raise
                self._pause(problem, 0, start)

    def create(self, path: str, key: str, body: Json, find: Callable[[], Json | None], *, defer: bool = False) -> Json:
        """POST until there is an answer, and return its `key`.

        When none came, or a 5xx did, the thing may exist: `find` looks for it by its unique name, until a list can be
        trusted to show it, before it is posted again. With `defer`, a 429 is the caller's to handle. An `ApiError`
        means that the thing does not exist, `NoAnswer` that it may.
        """
        start = time.monotonic()
        may_exist = False
        for backoff in backoffs():
            try:
                return required(self.post(path, body, defer=defer), key, dict)
            except (ApiError, NoAnswer) as problem:
                is_refused = isinstance(problem, ApiError) and (not problem.transient or problem.status == 429)
                if is_refused and not may_exist:
                    raise
                may_exist = True
                if (found := self._look_for(find)) is not None:
                    return found
                if is_refused:  # the name may be taken by what no list shows yet
                    raise NoAnswer(str(problem)) from problem
                self._pause(problem, backoff, start)
        raise AssertionError("unreachable")

    def _look_for(self, find: Callable[[], Json | None]) -> Json | None:
        end = time.monotonic() + LIST_LAG
        try:
            while (found := find()) is None and time.monotonic() < end:
                self.sleep(LIST_LAG / 3)
        except ApiError as problem:  # it is the list that was refused
            raise NoAnswer(str(problem)) from problem
        return found

    def _patiently(self, method: str, path: str, params: Json | None = None) -> Json:
        start = time.monotonic()
        for backoff in backoffs():
            try:
                return self._once(method, path, params=params)
            except (ApiError, NoAnswer) as problem:
                if isinstance(problem, ApiError) and not problem.transient:
                    raise
                self._pause(problem, backoff, start)
        raise AssertionError("unreachable")

    def _pause(self, problem: ApiError | NoAnswer, backoff: float, start: float) -> None:
        """Wait before a repetition, visibly; raise the problem if that has gone on for too long since `start`."""
        is_limited = isinstance(problem, ApiError) and problem.status == 429
        wait = backoff
        if isinstance(problem, ApiError) and is_limited:
            wait = RATE_LIMIT_WAIT if problem.wait is None else problem.wait
        limit = start + self._retry_limit
        if is_limited:  # of an account, so all calls share the patience
            limit = min(start, self._limited_since or start) + RATE_LIMIT_PATIENCE
        if time.monotonic() + wait > limit:
            raise problem
        what = "DigitalOcean's rate limit is reached" if is_limited else str(problem)
        self._say(f"{what}; trying again in {wait:.0f} s")
        self.sleep(wait)

    def _once(self, method: str, path: str, body: Json | None = None, params: Json | None = None) -> Json:
        call = f"{method} {path}"
        self._cancellation.check()
        session = self._session()
        try:
            response = within(
                CALL_LIMIT,
                lambda: session.request(
                    method,
                    self._url + path,
                    json=body,
                    params=params,
                    timeout=CALL_TIMEOUT,
                    allow_redirects=False,  # the token is for this host alone
                ),
            )
        except TimeoutError:
            del self._sessions.session  # the call that goes on has it
            raise NoAnswer(f"{call}: no complete answer from {self._url} within {CALL_LIMIT} s") from None
        except requests.RequestException as problem:
            if isinstance(innermost(problem), ssl.SSLCertVerificationError):
                raise DosvobError(f"{self._url} has no certificate to be trusted: {root_cause(problem)}") from None
            raise NoAnswer(f"{call}: no answer from {self._url}: {root_cause(problem)}") from problem
        self._detail(f"{call} → {response.status_code}")
        self._limited_since = (self._limited_since or time.monotonic()) if response.status_code == 429 else None
        return self._answer(call, response)

    def _answer(self, call: str, response: requests.Response) -> Json:
        try:
            answer = response.json() if response.content else {}
        except ValueError:
            answer = None
        if response.status_code >= 300:
            answer = answer if isinstance(answer, dict) else {"message": f"not JSON, {len(response.content)} bytes"}
            raise ApiError(call, response.status_code, answer, wait_told(response))
        if not isinstance(answer, dict):
            raise NoAnswer(f"{call}: the answer is not a JSON object")
        return answer

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._sessions, "session", None)
        if session is None:
            session = self._sessions.session = requests.Session()
            session.auth = TokenAuth(self._token)
            session.headers["User-Agent"] = f"dosvob/{VERSION}"
        return session


def innermost(problem: BaseException) -> BaseException:
    """The exception that an exception goes back to."""
    while problem.__context__ is not None:
        problem = problem.__context__
    return problem


def root_cause(problem: BaseException) -> str:
    """The innermost reason of an exception, in its own words."""
    return str(innermost(problem)) or type(innermost(problem)).__name__


def backoffs() -> Iterator[float]:
    """Seconds to wait before each repetition, doubling up to a maximum, with jitter."""
    for doubling in itertools.count():
        yield min(FIRST_BACKOFF * 2 ** min(doubling, 16), MAX_BACKOFF) * random.uniform(0.8, 1.2)  # noqa: S311


def wait_told(response: requests.Response) -> float | None:
    """The seconds to wait that a 429 tells: `retry-after` (burst limit), or `ratelimit-reset` (hourly limit).

    From a second to an hour, whatever it tells.
    """
    headers = response.headers
    with contextlib.suppress(KeyError, ValueError):
        return min(max(1.0, float(headers["retry-after"])), 3600.0)
    with contextlib.suppress(KeyError, ValueError):
        if int(headers.get("ratelimit-remaining", 0)) == 0:
            return min(max(1.0, float(headers["ratelimit-reset"]) - time.time()), 3600.0)
    return None


def next_page(answer: Json) -> bool:
    """Whether a list has more pages; the fields that say so may be missing, empty or null."""
    try:
        return bool(((answer.get("links") or {}).get("pages") or {}).get("next"))
    except AttributeError:
        raise DosvobError("DigitalOcean's list does not say whether it has more pages: try again later") from None


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
    tags: tuple[str, ...]

    @classmethod
    def parse(cls, item: Json) -> Volume:
        """From the API's volume object."""
        return cls(
            id=required(item, "id", str),
            name=required(item, "name", str),
            region=required(required(item, "region", dict), "slug", str),
            size=required(item, "size_gigabytes", int) * GIB,
            droplet_ids=tuple(item.get("droplet_ids") or ()),
            tags=tuple(item.get("tags") or ()),
        )

    @property
    def size_gib(self) -> int:
        """The size in GiB, which is how the API counts."""
        return self.size // GIB


def list_volumes(api: Api) -> list[Volume]:
    """All volumes of the account, in all regions."""
    return [Volume.parse(item) for item in api.list("/v2/volumes", "volumes")]


def wait_until(api: Api, limit: float, probe: Callable[[], T | None]) -> T | None:
    """Call `probe` until it returns something, at growing intervals; None after `limit` seconds."""
    end = time.monotonic() + limit
    pause = 0.25
    while (result := probe()) is None:
        if time.monotonic() > end:
            return None
        api.sleep(pause)
        pause = min(pause * 1.3, 1.0)  # two threads wait at a time at most, and the API allows 250 requests a minute
    return result



# ── Ephemeral resources ──────────────────────────────────────────────────────────────────────────────────────────────
# What a run creates and must remove: key, droplet, snapshots, clones. Everything is recognised by its name or its tag,
# so that what an earlier run left behind, or an answer that was lost, is found as well.

TAG = "dosvob-ephemeral"
PREFIX = TAG + "-"
DEFAULT_SIZES = ("s-1vcpu-512mb-10gb", "s-1vcpu-1gb")  # the two smallest; the first is not in all regions
ACTION_LIMIT = 600  # seconds that an attach or detach may take
BUSY_LIMIT = 120  # seconds for which a droplet may be busy with another event
ACTIVE_LIMIT = 600  # seconds until a new droplet must be active and have an address
FRESH_LIMIT = 60  # seconds for which something freshly created may answer 404
REMOVE_LIMIT = 600  # seconds after which removing a leftover is given up: a volume stays attached for a while
ALIVE_AGE = 15 * 60  # seconds; a younger ephemeral droplet may belong to a run on another machine
SNAPSHOT_INTERVAL = 660  # seconds; DigitalOcean takes one snapshot of a volume per 10 minutes
SNAPSHOT_RETRY = 20  # seconds between attempts when a snapshot came too soon and the answer does not say more
HOURS_PER_MONTH = 730
VOLUME_PRICE = 0.10 / HOURS_PER_MONTH  # dollars per GiB and hour; the API does not tell these two:
SNAPSHOT_PRICE = 0.06 / HOURS_PER_MONTH  # https://docs.digitalocean.com/products/volumes/details/pricing/
CONTROL_PANEL = "https://cloud.digitalocean.com"
UNKNOWN = "unknown"  # the id of what may be there, and cannot be listed


class SnapshotTooSoon(DosvobError):
    """The volume's previous snapshot is less than ten minutes old; `wait` seconds may do."""

    def __init__(self, volume: Volume, wait: float) -> None:
        self.wait = wait
        super().__init__(f"{volume.name}: DigitalOcean takes one snapshot of a volume per 10 minutes")


class NoDroplet(DosvobError):
    """The droplet could not be had, so no volume can be backed up."""


DROPLET, VOLUME, SNAPSHOT, KEY = ALL_KINDS = ("droplet", "volume", "snapshot", "SSH key")  # as removing them works


@dataclass(frozen=True)
class ListOf:
    """Where the API lists a kind of resource, and where the control panel shows it."""

    path: str
    key: str
    panel: str
    params: Mapping[str, str] = field(default_factory=dict)


LISTS: Mapping[str, ListOf] = {
    DROPLET: ListOf("/v2/droplets", "droplets", "/droplets"),
    VOLUME: ListOf("/v2/volumes", "volumes", "/volumes"),
    SNAPSHOT: ListOf("/v2/snapshots", "snapshots", "/images/snapshots/volumes", {"resource_type": "volume"}),
    KEY: ListOf("/v2/account/keys", "ssh_keys", "/account/security"),
}


@dataclass(frozen=True)
class Resource:
    """Something of ours in the account; `hourly` is its price in dollars per hour."""

    kind: str
    id: str
    name: str = field(compare=False)
    hourly: float = field(default=0.0, compare=False)
    created_at: str = field(default="", compare=False)

    @property
    def path(self) -> str:
        """Where the API has it."""
        return f"{LISTS[self.kind].path}/{urllib.parse.quote(self.id, safe='')}"

    def __str__(self) -> str:
        cost = f", ${self.hourly * HOURS_PER_MONTH:.2f} a month" if self.hourly else ""
        return f"{self.kind} {self.name} (id {self.id}{cost})"

    @classmethod
    def parse(cls, kind: str, item: Json) -> Resource:
        """From the API's object."""
        identifier = item.get("id")
        if not isinstance(identifier, (str, int)):
            raise DosvobError(f"DigitalOcean listed a {kind} without an id: try again later")
        hourly = {
            DROPLET: float((item.get("size") or {}).get("price_hourly") or 0),
            VOLUME: float(item.get("size_gigabytes") or 0) * VOLUME_PRICE,
            SNAPSHOT: float(item.get("size_gigabytes") or 0) * SNAPSHOT_PRICE,
        }
        return cls(kind, str(identifier), str(item.get("name")), hourly.get(kind, 0.0), str(item.get("created_at", "")))


def is_ephemeral(name: str, tags: Iterable[str]) -> bool:
    """Whether dosvob made it: tags on volumes have been seen not to stick, so the name's prefix will do as well."""
    return name.startswith(PREFIX) or TAG in tags


def list_ephemeral(api: Api, run_prefix: str = "", kinds: Iterable[str] = ALL_KINDS) -> list[Resource]:
    """All ephemeral resources of the account, or those of one run, in the order in which removing them works."""

    def ours(item: Json) -> bool:
        name = str(item.get("name"))
        return name.startswith(run_prefix) if run_prefix else is_ephemeral(name, item.get("tags") or ())

    return [
        Resource.parse(kind, item)
        for kind in kinds
        for item in api.list(LISTS[kind].path, LISTS[kind].key, **LISTS[kind].params)
        if ours(item)
    ]


def remove_all(
    api: Api,
    run_prefix: str,
    note: Callable[[str], None],
    created: Mapping[Resource, float] | None = None,
    kinds: Iterable[str] = ALL_KINDS,
    seen: set[str] | None = None,
) -> dict[Resource, str]:
    """Delete all ephemeral resources (of one run) until none is listed; return what stays, with the reason.

    A volume cannot be deleted for some seconds after its droplet's deletion was accepted: so it is tried again.
    `created`, with the times of that, is deleted before anything is listed, and even if no list can be had. The names
    of what is listed are added to `seen`.
    """
    start = time.monotonic()
    fewest = sys.maxsize
    unseen = dict(created or {})
    seen = set() if seen is None else seen
    for attempt in itertools.count(0 if unseen else 1):
        listed, left = list_each(api, run_prefix, kinds) if attempt else ([], {})
        seen.update(resource.name for resource in listed)
        found = dict.fromkeys([*listed, *unseen])
        left |= delete_each(api, sorted(found, key=lambda resource: ALL_KINDS.index(resource.kind)), unseen, note)
        if attempt and not left:
            return {}
        if attempt and len(left) < fewest:  # it gets on
            start, fewest = time.monotonic(), len(left)
        refused = [resource.kind for resource, problem in left.items() if is_forbidden(problem)]
        limit = BUSY_LIMIT if DROPLET in refused else REMOVE_LIMIT  # what is attached to it stays too
        if len(refused) == len(left) or (attempt and time.monotonic() - start > limit):
            return {resource: str(problem or "it is still listed") for resource, problem in left.items()}
        if attempt:  # only what was there is listed again: DigitalOcean answers ten lists of keys a minute, and no more
            kinds = [kind for kind in ALL_KINDS if any(resource.kind == kind for resource in left)]
        api.sleep(min(0.3 * 1.5**attempt, 5.0))
    raise AssertionError("unreachable")


def is_forbidden(problem: Exception | None) -> bool:
    """Whether the token may not do it, now or later."""
    return isinstance(problem, ApiError) and problem.status in (401, 403)


def list_each(
    api: Api, run_prefix: str, kinds: Iterable[str]
) -> tuple[list[Resource], dict[Resource, Exception | None]]:
    """As `list_ephemeral`; of a kind that cannot be listed something unknown may be there, which is returned apart."""
    listed: list[Resource] = []
    unknown: dict[Resource, Exception | None] = {}
    for kind in kinds:
        try:
            listed += list_ephemeral(api, run_prefix, [kind])
        except Interrupted:
            raise
        except Exception as problem:  # noqa: BLE001 - no answer is so odd that the rest must stay for it
            unknown[Resource(kind, UNKNOWN, f"{run_prefix or PREFIX}*")] = problem
    return listed, unknown


def delete_each(
    api: Api, found: Iterable[Resource], unseen: dict[Resource, float], note: Callable[[str], None]
) -> dict[Resource, Exception | None]:
    """Ask for the deletion of each; returns what went wrong with it, None if nothing did and it may just take a while.

    What is surely gone is taken out of `unseen`.
    """
    problems: dict[Resource, Exception | None] = dict.fromkeys(found)
    for resource in problems:
        note(f"removing {resource}")
        try:
            if api.delete(resource.path) or is_old(unseen.get(resource, 0.0)):
                unseen.pop(resource, None)
        except Interrupted:
            raise
        except Exception as problem:  # noqa: BLE001 - as above
            problems[resource] = problem
    return problems


def is_old(created: float) -> bool:
    """Whether what was created then (time.monotonic) is known everywhere by now: a 404 then says that it is gone."""
    return time.monotonic() - created > LIST_LAG


def sweep(api: Api, report: Reporter) -> None:
    """Remove what earlier runs left behind, and report what stays."""
    found = list_ephemeral(api)
    for resource in found:
        if resource.kind == DROPLET and (seconds := age(resource.created_at)) < ALIVE_AGE:
            report.warn(
                f"{resource} was created only {max(seconds, 0) / 60:.0f} minutes ago: if another machine is backing up "
                "with this account right now, its run will fail; one account wants one dosvob"
            )
    for resource in found:
        report.say(f"left over from an earlier run: {resource}")
    report_left(report, remove_all(api, "", report.detail) if found else {})


def sweep_again(api: Api, report: Reporter, not_before: float) -> None:
    """Remove what was there before this run and was listed late; that this cannot be seen is no failure of the run."""
    try:
        api.sleep(not_before - time.monotonic())
        sweep(api, report)
    except Exception as problem:  # noqa: BLE001 - all of this run's own is removed, however odd the answer is
        report.warn(f"it could not be looked for once more what earlier runs may have left: {problem}")


def age(created_at: str) -> float:
    """Seconds since an RFC 3339 time; infinite if it is none."""
    try:
        return (utc_now() - datetime.datetime.fromisoformat(created_at)).total_seconds()
    except (ValueError, TypeError):
        return float("inf")


def report_left(report: Reporter, left: Mapping[Resource, str]) -> None:
    """Say loudly what could not be removed."""
    report.has_left |= bool(left)
    for resource, reason in left.items():
        what = "there may be something " if resource.id == UNKNOWN else ""
        billed = ", and billed until you remove it" if resource.hourly or resource.id == UNKNOWN else ""
        report.error(
            f"{what}LEFT BEHIND{billed}: {resource}. {reason}. "
            f"Remove it at {CONTROL_PANEL}{LISTS[resource.kind].panel} or run: python dosvob.py sweep"
        )


@dataclass(frozen=True)
class DropletPlan:
    """What droplet to create: slugs of its possible sizes, cheapest first, each with its price in dollars per hour."""

    region: str
    sizes: tuple[tuple[str, float], ...]
    image: str


def plan_droplet(api: Api, config: Config) -> DropletPlan:
    """Check region, size and image against what DigitalOcean offers now; raise UsageError for what it does not."""
    check_region(api, config.region)
    return DropletPlan(config.region, droplet_sizes(api, config), droplet_image(api, config))


def check_region(api: Api, region: str) -> None:
    """The region exists and has volumes."""
    regions = {str(item.get("slug")): item for item in api.list("/v2/regions", "regions")}
    fit = sorted(
        slug for slug, item in regions.items() if item.get("available") and "storage" in (item.get("features") or ())
    )
    if region not in regions:
        raise UsageError(f'there is no region "{region}"; those with volumes are {", ".join(fit)}')
    if region not in fit:
        raise UsageError(f'region "{region}" has no volumes or is closed; those with volumes are {", ".join(fit)}')


def droplet_sizes(api: Api, config: Config) -> tuple[tuple[str, float], ...]:
    """The sizes to try in the region, the cheapest first."""
    offered = {
        str(item.get("slug")): float(item.get("price_hourly") or 0)
        for item in api.list("/v2/sizes", "sizes")
        if item.get("available") and config.region in (item.get("regions") or ())
    }
    wanted = (config.droplet_size,) if config.droplet_size else DEFAULT_SIZES
    usable = sorted(((slug, offered[slug]) for slug in wanted if slug in offered), key=lambda size: size[1])
    if not usable:
        near = difflib.get_close_matches(wanted[0], offered, n=3) or sorted(offered, key=lambda slug: offered[slug])[:3]
        raise UsageError(
            f'droplet size "{" or ".join(wanted)}" is not to be had in {config.region} now: '
            f'set "droplet_size" in conf.json to one of {", ".join(near) or "another region, there is none"}'
        )
    return tuple(usable)


def droplet_image(api: Api, config: Config) -> str:
    """The slug of the configured image, or of the newest Debian in the region."""
    slugs = [
        str(item["slug"])
        for item in api.list("/v2/images", "images", type="distribution")
        if item.get("slug") and item.get("status") != "retired" and config.region in (item.get("regions") or ())
    ]
    debians = sorted((int(m[1]), m[0]) for slug in slugs if (m := re.fullmatch(r"debian-(\d+)-x64", slug)))
    wanted = config.droplet_image or (debians[-1][1] if debians else "debian-x64")
    if wanted not in slugs:
        near = difflib.get_close_matches(wanted, slugs, n=3) or slugs[:3]
        raise UsageError(
            f'droplet image "{wanted}" is not to be had in {config.region}: '
            f'set "droplet_image" in conf.json to one of {", ".join(near)}'
        )
    return wanted


@dataclass(frozen=True)
class Droplet:
    """The running droplet."""

    id: int
    name: str
    address: str


class Ephemeral:
    """All that one run creates. As a context manager it removes it at the end, whatever happens.

    It keeps its own list of what it created, with times, for the cost and for the case that the account can no longer
    be asked.
    """

    def __init__(self, api: Api, report: Reporter) -> None:
        self.prefix = f"{PREFIX}{secrets.token_hex(4)}-"
        self._api = api
        self._report = report
        self._lock = threading.Lock()
        self._created: dict[Resource, float] = {}
        self._removed: dict[Resource, float] = {}
        self._unsettled: dict[str, str] = {}  # kinds by name of what may or may not exist
        self._in_doubt: dict[str, str] = {}  # kinds by name of what may exist twice, or show late
        self._events = threading.Lock()  # a droplet takes one attach or detach at a time

    def __enter__(self) -> Ephemeral:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._created or self._unsettled:
            self._tear_down(self._api.to_the_end())

    def upload_key(self, public_key: str) -> int:
        """Register the run's one-time public key; returns its id."""
        name = self.prefix + "key"
        body = {"name": name, "public_key": public_key}
        return required(self._create(KEY, body), "id", int)

    def create_droplet(self, plan: DropletPlan, key: int, user_data: str) -> Droplet:
        """Create the droplet in the first size that can be had, and wait until it is active and has an address."""
        try:
            return self._await_droplet(self._order_droplet(plan, key, user_data))
        except (ApiError, NoAnswer) as problem:
            raise NoDroplet(f"the droplet could not be had: {problem}") from problem

    def _order_droplet(self, plan: DropletPlan, key: int, user_data: str) -> Json:
        name = self.prefix + "droplet"
        for number, (size, _) in enumerate(plan.sizes, start=1):
            body = {
                "name": name,
                "region": plan.region,
                "size": size,
                "image": plan.image,
                "ssh_keys": [key],
                "user_data": user_data,
                "tags": [TAG],
                "with_droplet_agent": False,
            }
            try:
                return self._create(DROPLET, body)
            except ApiError as problem:
                if problem.status != 422 or number == len(plan.sizes):
                    raise
                self._report.say(f"{size} is not to be had in {plan.region} now; trying the next size")
        raise AssertionError("unreachable")

    def _await_droplet(self, item: Json) -> Droplet:
        identifier = required(item, "id", int)

        def address() -> str | None:
            droplet = self._get_fresh(f"/v2/droplets/{identifier}", "droplet")
            if droplet is None or droplet.get("status") != "active":
                return None
            networks = (droplet.get("networks") or {}).get("v4") or ()
            return next((str(net["ip_address"]) for net in networks if net.get("type") == "public"), None)

        found = wait_until(self._api, ACTIVE_LIMIT, address)
        if found is None:
            raise NoDroplet(f"droplet {identifier} was not active, with an address, within {ACTIVE_LIMIT:.0f} s")
        return Droplet(identifier, required(item, "name", str), found)

    def make_clone(self, volume: Volume, number: int) -> tuple[Volume, str]:
        """A volume with the content that this one has now, and the time of that; the snapshot between is gone again."""
        name = f"{self.prefix}{number}"  # the device is named by it: unique and short
        snapshot = self._make_snapshot(volume, name)
        snapshot_id = required(snapshot, "id", str)
        body = {
            "name": name,
            "region": volume.region,
            "snapshot_id": snapshot_id,
            "size_gigabytes": max(volume.size_gib, int(snapshot.get("min_disk_size") or 0)),
            "tags": [TAG],
        }
        clone = self._create_clone(volume, body)
        self._remove_now(Resource.parse(SNAPSHOT, snapshot))
        return Volume.parse(clone), str(snapshot.get("created_at", ""))

    def _create_clone(self, volume: Volume, body: Json) -> Json:
        def create() -> Json | None:
            try:
                return self._create(VOLUME, body)
            except ApiError as problem:
                if problem.status != 404:
                    raise
                return None  # the snapshot is so fresh that it is not known yet

        clone = wait_until(self._api, FRESH_LIMIT, create)
        if clone is None:
            raise DosvobError(f"{volume.name}: DigitalOcean lost the snapshot that it had just made: try again later")
        return clone

    def _make_snapshot(self, volume: Volume, name: str) -> Json:
        try:
            return self._create(SNAPSHOT, {"name": name, "tags": [TAG]}, f"/v2/volumes/{volume.id}/snapshots")
        except ApiError as problem:
            if problem.status == 429:
                raise SnapshotTooSoon(volume, SNAPSHOT_RETRY if problem.wait is None else problem.wait) from problem
            raise

    def attach(self, clone: Volume, droplet: Droplet) -> None:
        """Attach the clone to the droplet."""
        self._volume_event("attach", clone, droplet, lambda volume: droplet.id in volume.droplet_ids)

    def release(self, clone: Volume, droplet: Droplet) -> None:
        """Detach the clone and delete it."""
        self._volume_event("detach", clone, droplet, lambda volume: droplet.id not in volume.droplet_ids)
        self._remove_now(next(r for r in list(self._created) if r.kind == VOLUME and r.id == clone.id))

    def cost(self) -> float:
        """Dollars for all that was created, by the seconds that it existed until now."""
        now = time.monotonic()
        with self._lock:
            return sum(
                resource.hourly * (self._removed.get(resource, now) - since) / 3600
                for resource, since in self._created.items()
            )

    def _create(self, kind: str, body: Json, post_path: str | None = None) -> Json:
        """Create a resource and enter it in the books; `_unsettled` has its name while it may or may not exist."""
        listed = LISTS[kind]
        name = body["name"]

        def find() -> Json | None:
            self._in_doubt[name] = kind
            items = self._api.list(listed.path, listed.key, **listed.params)
            return next((item for item in items if item.get("name") == name), None)

        with self._lock:
            self._unsettled[name] = kind
        try:
            item = self._api.create(
                post_path or listed.path, listed.key.removesuffix("s"), body, find, defer=kind == SNAPSHOT
            )
        except ApiError as problem:
            if not problem.transient or problem.status == 429:
                self._settle(name)  # it was refused, so it does not exist
            raise
        except Interrupted:
            if name not in self._in_doubt:
                self._settle(name)  # it was not even asked for
            raise
        resource = Resource.parse(kind, item)
        self._settle(name, resource)
        self._report.detail(f"created {resource}")
        return item

    def _settle(self, name: str, resource: Resource | None = None) -> None:
        with self._lock:
            self._unsettled.pop(name, None)
            if resource is not None:
                self._created[resource] = time.monotonic()

    def _remove_now(self, resource: Resource) -> None:
        def delete() -> bool | None:
            try:
                return self._api.delete(resource.path) or is_old(self._created[resource]) or None
            except ApiError as problem:
                if problem.status not in (409, 422):
                    raise
                return None

        if wait_until(self._api, BUSY_LIMIT, delete) is None:
            self._report.detail(f"{resource} is still in use; it will be removed at the end of the run")
            return
        with self._lock:
            self._removed[resource] = time.monotonic()

    def _get_fresh(self, path: str, key: str) -> Json | None:
        """An item by its id; None while it is so fresh that the API does not know it yet."""
        try:
            return required(self._api.get(path), key, dict)
        except ApiError as problem:
            if problem.status != 404:
                raise
            return None

    def _volume_event(self, event: str, clone: Volume, droplet: Droplet, reached: Callable[[Volume], bool]) -> None:
        """Attach or detach, however often it takes until the volume is as wished."""
        path = f"/v2/volumes/{clone.id}/actions"
        body = {"type": event, "droplet_id": droplet.id, "region": clone.region}
        problem: list[DosvobError] = []

        def settled() -> bool | None:
            try:
                action = required(self._api.post(path, body), "action", dict)
            except (ApiError, NoAnswer) as refused:
                # busy with another event, attached or detached already, too fresh to be known, or an answer lost
                if isinstance(refused, ApiError) and not (refused.transient or refused.status in (404, 409, 422)):
                    raise
                problem[:] = [refused]
                volume = self._get_fresh(f"/v2/volumes/{clone.id}", "volume")
                return True if volume is not None and reached(Volume.parse(volume)) else None
            self._await_action(f"{path}/{required(action, 'id', int)}", f"the {event} of {clone.name}")
            return True

        with self._events:
            if wait_until(self._api, BUSY_LIMIT, settled) is None:
                raise problem[0]

    def _await_action(self, path: str, what: str) -> None:
        def status() -> str | None:
            action = self._get_fresh(path, "action") or {}
            return None if action.get("status") in (None, "in-progress") else str(action.get("status"))

        result = wait_until(self._api, ACTION_LIMIT, status)
        if result is None:
            raise DosvobError(f"{what} did not end within {ACTION_LIMIT:.0f} s: DigitalOcean's fault, try again later")
        if result != "completed":
            raise DosvobError(f"{what} failed on DigitalOcean's side ({result}): try again later")

    def _existing(self) -> dict[Resource, float]:
        """What was created and is not known to be gone, with the time of its creation."""
        with self._lock:
            return {resource: since for resource, since in self._created.items() if resource not in self._removed}

    def _tear_down(self, api: Api) -> None:
        """Remove everything of this run, and look again that nothing is left."""
        existing = ", ".join(sorted(resource.kind for resource in self._existing())) or "what may have been created"
        self._report.say(f"removing {existing}: all that is named {self.prefix}…")
        try:
            seen: set[str] = set()
            left = remove_all(api, self.prefix, self._report.doing, self._existing(), seen=seen)
            if self._unsettled or self._in_doubt:
                left |= self._remove_late(api, seen)
        except Exception as problem:  # noqa: BLE001 - even after a bug in here: tell what there may be
            self._report.detail(traceback.format_exc())
            unsettled = [Resource(kind, UNKNOWN, name) for name, kind in self._unsettled.items()]
            left = dict.fromkeys([*self._existing(), *unsettled], str(problem))
        with self._lock:
            for resource in self._created:
                if resource not in left:
                    self._removed.setdefault(resource, time.monotonic())
        report_left(self._report, left)

    def _remove_late(self, api: Api, seen: set[str]) -> dict[Resource, str]:
        """Remove what was asked for without an answer, once lists can be trusted to show it; returns what may stay.

        `seen` has the names of what was listed before.
        """
        api.sleep(LIST_LAG)
        doubtful = {*self._in_doubt.values(), *self._unsettled.values()}
        kinds = [kind for kind in ALL_KINDS if kind in doubtful]
        left = remove_all(api, self.prefix, self._report.doing, kinds=kinds, seen=seen)
        for name, kind in self._unsettled.items():
            if name not in seen:
                left[Resource(kind, UNKNOWN, name)] = "It was asked for, DigitalOcean did not say yes or no"
        return left


# ── The agent ────────────────────────────────────────────────────────────────────────────────────────────────────────
# The part that runs on the droplet: it reads the volume once (what must be sent of a large change: twice), sends a
# digest for each chunk, and the pages that it is asked for. Its source is sent over SSH and run by the droplet's own
# python3, so it uses the standard library alone, and of this file only what `agent_source` names.
#
# The frames and commands. Frames (agent to here) are FRAME (kind, index, length of the payload), then the payload:
#   HELLO    AGENT_MAGIC, the device's size in bytes (8 bytes)       the first frame
#   DIGEST   a chunk's digest                                        at most WINDOW are announced and not done with
#   ZEROS    a count (4 bytes)                                       so many chunks from the index on are all zeros
#   SHORT    the first SHORT bytes of each page digest               in answer to COMPARE
#   RAW      a bitmap of the pages that follow, then the pages       in answer to SEND; pages that were asked for and
#   PACKED   the same, the pages compressed with zlib                are not in the bitmap are all zeros
#   ALIVE    nothing                                                 when there has been nothing to say for a while
#   FAILED   a message                                               the agent cannot go on
# Digests come in the order of the chunks, without gaps; answers in the order of the commands.
# Commands (from here to the agent) are COMMAND (kind, index, count, bitmap), all of one length:
#   DROP     forget `count` chunks from the index on                 COMPARE   send the chunk's SHORT
#   SEND     send the pages in the bitmap, forget the chunk
# The agent ends when no more commands can come.
#
# Why nothing can stand still: a thread of the agent's own takes the commands, which are few and small, as they come, so
# whoever sends one never waits for the agent; so the reader here always goes on reading, and the agent's writing always
# goes on.

CHUNK = 1 << 20  # bytes
PAGE = 4096  # bytes
PAGES = CHUNK // PAGE
ZERO_PAGE = bytes(PAGE)
ZERO_PAGE_DIGEST = hashlib.sha256(ZERO_PAGE).digest()
DIGEST_SIZE = 32  # bytes
SHORT_SIZE = 4  # bytes; enough to tell pages apart, since the chunk's digest is checked in the end
WINDOW = 1024  # chunks that the scan is ahead of what is done with: it goes on while a large change crosses the link
HELD = 64  # chunks that the agent keeps of these, others are read again; a droplet has 512 MiB
READ_AHEAD = 8  # chunks; a volume is latency-bound, one read at a time does not reach its speed
READERS = 4
BATCH = 16  # digests to a write: fewer packets
BATCH_SECONDS = 0.05  # after which a smaller batch will do
QUEUED_FRAMES = 8
HEARTBEAT = 5.0  # seconds
KEPT_MEMORY = 32 << 20  # bytes; the most that glibc takes as M_MMAP_THRESHOLD
SAMPLE = 8 << 10  # bytes that are compressed to see whether it pays
DEVICE_LIMIT = 60.0  # seconds for the device to appear after its attach action completed
AGENT_MAGIC = b"dosvob agent 1\n"
FRAME = ">BII"
COMMAND = ">BII32s"
HELLO, DIGEST, ZEROS, SHORT, RAW, PACKED, ALIVE, FAILED = range(1, 9)
DROP, COMPARE, SEND = range(1, 4)
AGENT_CONSTANTS = (
    *("CHUNK", "PAGE", "ZERO_PAGE_DIGEST", "DIGEST_SIZE", "SHORT_SIZE", "HELD", "READ_AHEAD", "READERS", "BATCH"),
    *("BATCH_SECONDS", "QUEUED_FRAMES", "HEARTBEAT", "KEPT_MEMORY", "SAMPLE", "DEVICE_LIMIT", "AGENT_MAGIC", "FRAME"),
    *("COMMAND", "HELLO", "DIGEST", "ZEROS", "SHORT", "RAW", "PACKED", "ALIVE", "FAILED", "DROP", "COMPARE", "SEND"),
)
AGENT_IMPORTS = """from __future__ import annotations
import collections, concurrent.futures, ctypes, fcntl, hashlib, os, queue, stat, struct, sys, threading, time, zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO
"""


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


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, up to some MiB, for buffers of a chunk come and go all the time.

    Giving each back to the kernel and getting it anew as zeros costs half of all the CPU time of a first sync. The
    numbers are those of mallopt(3): M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, which other C libraries may not have.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2 * KEPT_MEMORY)
        mallopt(-3, KEPT_MEMORY)


def zeros_frame(end: int, count: int) -> bytes:
    """The frame for `count` chunks of zeros before the chunk `end`; none for none."""
    return struct.pack(FRAME + "I", ZEROS, end - count, 4, count) if count else b""


class Agent:
    """Serves one device to one reader, from the chunk `first` on, at most `window` chunks ahead of what is done with.

    Five sorts of threads: readers that read ahead, a scanner that hashes, one that takes commands, one that answers
    them, and the main thread, which writes.
    """

    def __init__(self, device: str, first: int, window: int, commands: BinaryIO, output: int) -> None:
        self.device = device
        self.first = first
        self.window = window
        self.commands = commands
        self.output = output
        self.fd = -1
        self.announced: dict[int, bytes] = {}  # the page digests of chunks that are not done with, by index
        self.held: dict[int, bytes] = {}  # those of these chunks that need not be read again
        self.room = threading.Condition()
        self.requests: queue.SimpleQueue[tuple[int, int, int]] = queue.SimpleQueue()  # kind, index and bitmap
        self.frames: queue.Queue[bytes] = queue.Queue(QUEUED_FRAMES)
        self.written = 0.0  # bytes written of late, and the seconds that it took: what the link takes
        self.writing = 0.0

    def run(self) -> None:
        """Serve until told to end; the process ends with it."""
        keep_freed_memory()
        if stat.S_ISFIFO(os.fstat(self.output).st_mode):  # a chunk at a time instead of 64 KiB to sshd
            fcntl.fcntl(self.output, fcntl.F_SETPIPE_SZ, CHUNK)
        for work in (self.scan, self.take_commands, self.answer_requests):
            threading.Thread(target=self.guarded, args=(work,), daemon=True).start()
        self.write_frames()

    def guarded(self, work: Callable[[], None]) -> None:
        """Do the work of a thread; tell the other side if it fails."""
        try:
            work()
        except Exception as problem:  # noqa: BLE001 - whatever it is, the other side is to know
            self.put(FAILED, 0, f"{type(problem).__name__}: {problem}".encode()[:1000])

    def put(self, kind: int, index: int, *payload: bytes) -> None:
        """Queue a frame."""
        self.frames.put(b"".join((struct.pack(FRAME, kind, index, sum(map(len, payload))), *payload)))

    def write_frames(self) -> None:
        """Write the frames that come, and a sign of life when none does."""
        while True:
            try:
                frame = self.frames.get(timeout=HEARTBEAT)
            except queue.Empty:
                frame = struct.pack(FRAME, ALIVE, 0, 0)
            start = time.monotonic()
            view = memoryview(frame)
            while view:
                view = view[os.write(self.output, view) :]
            # Sums that fade, and not a mean of rates: what only fills a buffer is written in no time.
            self.written = 0.9 * self.written + len(frame)
            self.writing = 0.9 * self.writing + time.monotonic() - start

    def scan(self) -> None:
        """Announce all chunks in order, holding those that may be asked for."""
        chunks = self.open_device() // CHUNK
        zero_chunk = bytes(CHUNK)
        batch: list[bytes] = []
        zeros = 0  # the length of the run of zero chunks before this one
        flushed = time.monotonic()
        for index, chunk in self.read_chunks(chunks):
            if chunk == zero_chunk:
                zeros += 1
            else:
                pages = page_digests(chunk)
                with self.room:
                    self.announced[index] = pages
                    if len(self.held) < HELD:
                        self.held[index] = chunk
                announcement = struct.pack(FRAME, DIGEST, index, DIGEST_SIZE) + chunk_digest(pages)
                batch += [zeros_frame(index, zeros), announcement]
                zeros = 0
            is_due = index + 1 == chunks or time.monotonic() - flushed > BATCH_SECONDS
            if is_due or len(batch) >= 2 * BATCH or len(self.announced) >= self.window:
                self.frames.put(b"".join((*batch, zeros_frame(index + 1, zeros))))
                batch.clear()
                zeros = 0
                flushed = time.monotonic()
            with self.room:
                self.room.wait_for(lambda: len(self.announced) < self.window)

    def read_chunks(self, chunks: int) -> Iterator[tuple[int, bytes]]:
        """All chunks from the first on, read ahead by several threads."""
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            ahead: collections.deque[concurrent.futures.Future[bytes]] = collections.deque()
            for index in range(self.first, chunks + READ_AHEAD):
                if index < chunks:
                    ahead.append(pool.submit(self.read, index))
                if index - READ_AHEAD >= self.first:
                    yield index - READ_AHEAD, ahead.popleft().result()

    def read(self, index: int) -> bytes:
        """One chunk of the device."""
        chunk = os.pread(self.fd, CHUNK, index * CHUNK)
        if len(chunk) != CHUNK:
            raise OSError(f"{self.device} ended at chunk {index}, after {len(chunk)} bytes of it")
        return chunk

    def open_device(self) -> int:
        """Wait for the device, protect it from writes, and say hello; returns its size in bytes."""
        end = time.monotonic() + DEVICE_LIMIT
        while not os.path.exists(self.device):
            if time.monotonic() > end:
                raise OSError(f"{self.device} did not appear within {DEVICE_LIMIT:.0f} s")
            time.sleep(0.1)
        self.fd = os.open(self.device, os.O_RDONLY)
        if stat.S_ISBLK(os.fstat(self.fd).st_mode):
            fcntl.ioctl(self.fd, 0x125D, struct.pack("i", 1))  # BLKROSET: as blockdev --setro
            self.refuse_mounted()
        size = os.lseek(self.fd, 0, os.SEEK_END)
        self.put(HELLO, 0, AGENT_MAGIC, struct.pack(">Q", size))
        return size

    def refuse_mounted(self) -> None:
        """Raise OSError if the device, or a partition of it, is mounted: it would change while it is read."""
        device = os.path.realpath(self.device)
        number = os.fstat(self.fd).st_rdev
        numbers = {f"{os.major(number)}:{os.minor(number)}"}
        sysfs = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
        for entry in os.listdir(sysfs) if os.path.isdir(sysfs) else ():
            if os.path.exists(f"{sysfs}/{entry}/partition"):
                with open(f"{sysfs}/{entry}/dev") as dev:
                    numbers.add(dev.read().strip())
        with open("/proc/self/mountinfo") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] in numbers or fields[fields.index("-") + 2] == device:
                    raise OSError(f"{self.device} is mounted at {fields[4]} on the droplet")

    def take_commands(self) -> None:
        """Take commands until there is nobody to give them; the process ends with that."""
        size = struct.calcsize(COMMAND)
        while len(command := self.commands.read(size)) == size:
            kind, index, count, bitmap = struct.unpack(COMMAND, command)
            if kind == DROP:  # at once: the scan may be waiting for it, and an answer for the link
                self.forget(index, count)
            else:
                self.requests.put((kind, index, int.from_bytes(bitmap, "little")))
        os._exit(0)

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
            self.forget(index, 1)
        else:
            raise ValueError(f"there is no command {kind}")

    def chunk_of(self, index: int) -> bytes:
        """A chunk, which is read again unless it is held."""
        return self.held.get(index) or self.read(index)

    def pages_of(self, index: int) -> bytes:
        """The digests of a chunk's pages."""
        return self.announced.get(index) or page_digests(self.chunk_of(index))

    def send_pages(self, index: int, wanted: int) -> None:
        """Send the wanted pages, save those that are zeros."""
        chunk, digests = self.chunk_of(index), self.pages_of(index)
        pages = []
        for page in range(len(chunk) // PAGE):
            if wanted >> page & 1 and digests[page * DIGEST_SIZE : (page + 1) * DIGEST_SIZE] != ZERO_PAGE_DIGEST:
                pages.append(page)
        included = sum(1 << page for page in pages)
        is_whole = len(pages) * PAGE == len(chunk)
        data = chunk if is_whole else b"".join([chunk[page * PAGE : (page + 1) * PAGE] for page in pages])
        bitmap = included.to_bytes(len(chunk) // PAGE // 8, "little")
        if self.compressing_pays(data):
            self.put(PACKED, index, bitmap, zlib.compress(data, 1))
        else:
            self.put(RAW, index, bitmap, data)

    def compressing_pays(self, data: bytes) -> bool:
        """Whether the link is slower than compressing, which a sample of the data tells."""
        if self.frames.empty() or not data:
            return False  # the link waits for us
        sample = memoryview(data)[:SAMPLE]
        start = time.thread_time()  # which does not count waiting for the interpreter's lock
        saved = 1 - len(zlib.compress(sample, 1)) / len(sample)
        seconds = time.thread_time() - start
        return saved > 0.1 and len(sample) * self.writing > self.written * seconds


# Taken as this file is loaded: by the time an agent is started, an update may have changed the file.
AGENT_PARTS = [inspect.getsource(part) for part in (page_digests, chunk_digest, zeros_frame, keep_freed_memory, Agent)]


def agent_source(device: str, first: int, window: int) -> bytes:
    """The agent's program."""
    constants = "".join(f"{name} = {globals()[name]!r}\n" for name in AGENT_CONSTANTS) + "ZERO_PAGE = bytes(PAGE)\n"
    start = f"Agent({device!r}, {first}, {window}, sys.stdin.buffer, 1).run()\n"
    return "\n\n".join((AGENT_IMPORTS, constants, *AGENT_PARTS, start)).encode()


# ── The image and its journal ────────────────────────────────────────────────────────────────────────────────────────
# Where a backup lives on the local disk, and how it changes without ever being lost. Knows files only.
#
#   backups/NAME                     the image: sparse, byte for byte the volume
#   backups/NAME.partial             a first sync that is not complete yet
#   backups/.dosvob/NAME.state       which volume and snapshot the image is, and the digest of each of its chunks
#   backups/.dosvob/NAME.state.new   the same for the sync that goes on
#   backups/.dosvob/NAME.journal     what the sync that goes on will change in the image
#
# A sync of an existing image goes through these steps, and a crash in any of them leaves what is said beside it:
#   1. changes and digests are written to journal and state.new     the old image; the journal's good part is reused
#   2. both are made durable, and their directory                   the same
#   3. the commit mark is written to the journal and made durable   the old image, completed to the new one at the next
#   4. the journal is applied to the image, which is made durable   start: applying twice is the same as once
#   5. state.new is made durable and becomes the state              the new image; applied once more, to the same end
#   6. the journal is removed                                       the new image

STATE_MAGIC = b"dosvob state 1\n"
STATE_HEADER = 4096  # bytes, the last 32 of which are a checksum of the others
STATE_VERSION = JOURNAL_VERSION = 1
REREAD_PARTS = 8  # every sync reads so great a part of the image again, in turn, to find what decayed on disk
READ_AHEAD_LOCAL = 8  # chunks
ROOM_FOR_OTHERS = GIB  # bytes that a first sync on a full disk leaves to the changes of other volumes
ZERO_PAGES = ZERO_PAGE_DIGEST * PAGES
ZERO_DIGEST = chunk_digest(ZERO_PAGES)
ALL_PAGES = (1 << PAGES) - 1
LIBC = ctypes.CDLL(None, use_errno=True)
FALLOCATE = getattr(LIBC, "fallocate64", None) or getattr(LIBC, "fallocate", None)  # Python has only posix_fallocate
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # fallocate(2)
VOLUME_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")  # what DigitalOcean allows; as a file name it is harmless


@dataclass(frozen=True)
class Identity:
    """What tells that a file was not touched since: size in bytes, inode, modification time in ns."""

    size: int
    inode: int
    mtime_ns: int

    @classmethod
    def of(cls, path_or_fd: Path | int) -> Identity:
        """That of a file now."""
        status = os.stat(path_or_fd)
        return cls(status.st_size, status.st_ino, status.st_mtime_ns)


@dataclass(frozen=True)
class Snapshot:
    """What an image is a copy of: the volume, its size in bytes, and when its snapshot was taken (RFC 3339)."""

    volume_id: str
    name: str
    region: str
    size: int
    taken_at: str

    def mark(self) -> bytes:
        """For a journal's commit mark: always COMMIT_SIZE bytes; raises DosvobError if that is not enough."""
        mark = json.dumps(dataclasses.asdict(self)).encode().ljust(COMMIT_SIZE)
        if len(mark) > COMMIT_SIZE:
            raise DosvobError(f"{self.name[:64]}: what DigitalOcean says of it is longer than is possible")
        return mark


@dataclass(frozen=True)
class State:
    """What is known of an image; the digests are in the file, behind this header.

    `reread` is the part of the image that was read again by the last sync; `journal` the id of the journal that led to
    it ("" for none); `digests` the SHA-256 of the table of digests; `identity` None while the image is being changed.
    """

    snapshot: Snapshot
    completed_at: str
    reread: int
    journal: str
    digests: str
    identity: Identity | None = None

    def pack(self) -> bytes:
        """The header of the state file."""
        body = STATE_MAGIC + json.dumps({"version": STATE_VERSION, **dataclasses.asdict(self)}).encode() + b"\n"
        body = body.ljust(STATE_HEADER - DIGEST_SIZE)
        return body + hashlib.sha256(body).digest()

    @classmethod
    def unpack(cls, header: bytes, path: Path) -> State:
        """From the header of a state file; raise DosvobError if it is damaged or of a newer version."""
        body, checksum = header[:-DIGEST_SIZE], header[-DIGEST_SIZE:]
        try:
            if hashlib.sha256(body).digest() != checksum or not body.startswith(STATE_MAGIC):
                raise ValueError("checksum")
            content = json.loads(body[len(STATE_MAGIC) :])
            if (version := content.pop("version")) != STATE_VERSION:
                raise newer_version(path, version)
            identity = content.pop("identity")
            snapshot = Snapshot(**content.pop("snapshot"))
            return cls(snapshot=snapshot, identity=Identity(**identity) if identity else None, **content)
        except (ValueError, TypeError, KeyError):
            raise damaged_state(path) from None


def newer_version(path: Path, version: object) -> DosvobError:
    """The error for a file that a newer dosvob wrote."""
    return DosvobError(f"{path} was written by a newer dosvob (format {version}): update dosvob; nothing was changed")


def damaged_state(path: Path) -> DosvobError:
    """The error for a state file that cannot be used."""
    return DosvobError(
        f"{path} is damaged; the image was left as it is. Delete that file, and the next run compares the whole image "
        "with the volume"
    )


class ImagePaths:
    """The files of one volume's backup."""

    def __init__(self, backups: Path, name: str) -> None:
        if not VOLUME_NAME.fullmatch(name):
            raise DosvobError(f"{name!r} is not a name that a volume can have: it is not backed up")
        self.name = name
        self.backups = backups
        self.metadata = backups / ".dosvob"
        self.image = backups / name
        self.partial = backups / f"{name}.partial"
        self.state = self.metadata / f"{name}.state"
        self.new_state = self.metadata / f"{name}.state.new"
        self.journal = self.metadata / f"{name}.journal"

    def load_state(self) -> State | None:
        """The state, its checksums verified; None if there is none. Raises DosvobError for a damaged or newer one."""
        return load_state(self.state)

    def set_aside(self, path: Path, why: str) -> Path:
        """Rename a file so that it is out of the way, but not lost; returns its new path."""
        stamp = utc_now().strftime("%Y%m%dT%H%M%SZ")
        aside = next(
            candidate
            for number in itertools.count()
            if not (candidate := path.with_name(f"{path.name}.{why}-{stamp}{f'-{number}' * bool(number)}")).exists()
        )
        path.rename(aside)
        sync_directory(path.parent)
        return aside


def names_with_state(backups: Path) -> set[str]:
    """The volumes that have a state file; those of images that were set aside are not named as volumes are."""
    names = {path.name.removesuffix(".state") for path in (backups / ".dosvob").glob("*.state")}
    return {name for name in names if VOLUME_NAME.fullmatch(name)}


def load_state(path: Path) -> State | None:
    """Read and verify a state file; None if there is none."""
    try:
        with path.open("rb") as file:
            state = State.unpack(file.read(STATE_HEADER), path)
            table = hashlib.sha256()
            length = 0
            while block := file.read(CHUNK):
                table.update(block)
                length += len(block)
    except FileNotFoundError:
        return None
    if table.hexdigest() != state.digests or length != state.snapshot.size // CHUNK * DIGEST_SIZE:
        raise damaged_state(path)
    return state


def sync_directory(path: Path) -> None:
    """Make renames, new and removed names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def create_private(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file that only its owner may read; returns the descriptor."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def forget_cached(fd: int) -> None:
    """Have the next reads of a file come from the disk.

    After a write error, which may have been told to a process that has ended, the kernel goes on showing what never got
    there: https://wiki.postgresql.org/wiki/Fsync_Errors
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def read_chunk(fd: int, index: int) -> bytes | None:
    """A chunk of an image, with zeros beyond the image's end; None if the disk cannot read it."""
    chunk = b""
    try:  # a read ends before what cannot be read, and only the next one fails
        while len(chunk) < CHUNK and (part := os.pread(fd, CHUNK - len(chunk), index * CHUNK + len(chunk))):
            chunk += part
        return chunk.ljust(CHUNK, b"\0")
    except OSError as problem:
        if problem.errno != errno.EIO:
            raise
        return None


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write at an offset, all of it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def make_zeros(fd: int, offset: int, length: int) -> None:
    """Make a range of a file zeros, as a hole where the file system has them."""
    if not punch_hole(fd, offset, length):
        for start in range(offset, offset + length, CHUNK):
            write_all(fd, bytes(min(CHUNK, offset + length - start)), start)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make a range of a file a hole; False if the file system or the C library has none."""
    if FALLOCATE is None:
        return False
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    if FALLOCATE(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0:
        return True
    number = ctypes.get_errno()
    if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
        raise OSError(number, os.strerror(number))
    return False


# The journal: a sequence of records, each a header, then its data. They say (offset, length, data or a hole), and are
# meant to serve for reverse deltas too.

RECORD = ">cQQ16s"  # kind, offset and length in bytes, checksum
RECORD_SIZE = struct.calcsize(RECORD)
BEGIN, DATA, HOLE, COMMIT = b"B", b"D", b"H", b"C"
MOST_DATA = {BEGIN: 64 << 10, DATA: CHUNK, HOLE: 0, COMMIT: 1024}  # bytes
COMMIT_SIZE = MOST_DATA[COMMIT]  # always: so that the end of a file tells whether there is one


@dataclass(frozen=True)
class Record:
    """One record of a journal. `data` is empty for a hole; `position` is where it is in the file, in bytes."""

    kind: bytes
    offset: int
    length: int
    data: bytes
    position: int


def record_checksum(journal_id: str, kind: bytes, offset: int, length: int, data: bytes | memoryview) -> bytes:
    """Binds a record to its journal, so that no old data on the disk can pass for one."""
    checksum = hashlib.sha256(f"{journal_id} {kind!r} {offset} {length} ".encode())
    checksum.update(data)
    return checksum.digest()[:16]


@dataclass(frozen=True)
class JournalHead:
    """What a journal begins with: the volume that it is about, and what the image was when it was begun."""

    id: str
    volume_id: str
    name: str
    base: Identity


class Journal:
    """A journal that is open for writing, at its end."""

    def __init__(self, fd: int, head: JournalHead, end: int) -> None:
        self.head = head
        self.start = end
        self._file = os.fdopen(fd, "wb", buffering=CHUNK)
        self._file.seek(end)
        self._file.truncate()

    @classmethod
    def begin(cls, path: Path, snapshot: Snapshot, base: Identity) -> Journal:
        """A new, empty journal."""
        head = JournalHead(secrets.token_hex(16), snapshot.volume_id, snapshot.name, base)
        journal = cls(create_private(path), head, 0)
        journal.append(BEGIN, 0, json.dumps({"version": JOURNAL_VERSION, **dataclasses.asdict(head)}).encode())
        journal.start = journal._file.tell()
        return journal

    @property
    def is_empty(self) -> bool:
        """Whether it has no changes."""
        return self._file.tell() == self.start

    def append(self, kind: bytes, offset: int, data: bytes | memoryview = b"", length: int | None = None) -> None:
        """Append a record; `length` is for holes, which have no data."""
        size = len(data) if length is None else length
        journal_id = "" if kind == BEGIN else self.head.id
        self._file.write(struct.pack(RECORD, kind, offset, size, record_checksum(journal_id, kind, offset, size, data)))
        self._file.write(data)

    def make_durable(self) -> None:
        """Everything so far survives a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def commit(self, snapshot: Snapshot) -> None:
        """Write the commit mark, durably: from now on the image is what the journal makes of it."""
        self.append(COMMIT, self._file.tell(), snapshot.mark())
        self.make_durable()

    def close(self) -> None:
        """Close the file; what is buffered may be lost."""
        with contextlib.suppress(OSError):  # a full disk, which was reported when it was met
            self._file.close()


class JournalFile:
    """A journal as found on disk. `end` is where its good part ends; `snapshot` is what it leads to, once committed.

    Raises DosvobError for a journal of a newer version; `head` is None if not even its beginning can be read.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.end = 0
        self.snapshot: Snapshot | None = None
        self.head = self._read_head()
        self.start = self.end

    def records(self, position: int | None = None) -> Iterator[Record]:
        """The intact records from a position on; having read to the end sets `end` and `snapshot`."""
        self._file.seek(self.start if position is None else position)
        while self.head is not None and (record := self._read_record(self.head.id)) is not None:
            self.end = self._file.tell()
            if record.kind == COMMIT:
                self.snapshot = Snapshot(**json.loads(record.data))
                return
            yield record

    def is_sound(self) -> bool:
        """Whether there is a commit mark, and every record before it is intact and lies within the image."""
        end = 0
        for record in self.records():
            end = max(end, record.offset + record.length)
        return self.snapshot is not None and end <= self.snapshot.size and self.end == self._size

    @property
    def ends_with_commit(self) -> bool:
        """Whether the file's end is a commit mark, whatever there is before."""
        if self.head is None or self._size < RECORD_SIZE + COMMIT_SIZE:
            return False
        self._file.seek(self._size - RECORD_SIZE - COMMIT_SIZE)
        record = self._read_record(self.head.id)
        return record is not None and record.kind == COMMIT

    def _read_head(self) -> JournalHead | None:
        record = self._read_record("")
        if record is None or record.kind != BEGIN:
            return None
        self.end = self._file.tell()
        content = json.loads(record.data)
        if (version := content.pop("version")) != JOURNAL_VERSION:
            raise newer_version(self.path, version)
        return JournalHead(base=Identity(**content.pop("base")), **content)

    def _read_record(self, journal_id: str) -> Record | None:
        position = self._file.tell()
        header = self._file.read(RECORD_SIZE)
        if len(header) < RECORD_SIZE:
            return None
        kind, offset, length, checksum = struct.unpack(RECORD, header)
        stored = 0 if kind == HOLE else length
        if stored > MOST_DATA.get(kind, -1):
            return None
        data = self._file.read(stored)
        if record_checksum(journal_id, kind, offset, length, data) != checksum:
            return None
        return Record(kind, offset, length, data, position)


def recover(paths: ImagePaths, warn: Callable[[str], None]) -> bool:
    """Finish what a crash left: apply a committed journal, keep a good part for reuse; no network is needed.

    Returns whether a journal was applied. Raises DosvobError if a journal is damaged, and sets it aside.
    """
    try:
        file = paths.journal.open("rb", buffering=CHUNK)
    except FileNotFoundError:
        return False
    with file:
        check_link(paths)
        journal = JournalFile(paths.journal, file)
        if journal.is_sound() and is_of_image(paths, journal, warn):
            apply_journal(paths, journal)
            return True
        if journal.snapshot is None and is_reusable(paths, journal):
            return False
    aside = paths.set_aside(paths.journal, "damaged")
    raise DosvobError(
        f"the journal of {paths.name} is damaged or does not belong to its image; it was set aside as {aside}, and "
        f"nothing of it was applied. The next run compares {paths.image} with the volume and mends it"
    )


def check_link(paths: ImagePaths) -> None:
    """Raise DosvobError if the image is a link that leads nowhere: what it led to will come back."""
    if paths.image.is_symlink() and not paths.image.exists():
        raise DosvobError(f"{paths.image} leads to {paths.image.readlink()}, which is not there: is it mounted?")


def is_of_image(paths: ImagePaths, journal: JournalFile, warn: Callable[[str], None]) -> bool:
    """Whether a journal may be applied to the image that is there."""
    assert journal.head is not None
    if journal.head.name != paths.name or not paths.image.exists():
        return False
    if Identity.of(paths.image).inode != journal.head.base.inode:
        warn(f"{paths.image} is another file than when its journal was begun; the next sync compares all of it")
    return True


def is_reusable(paths: ImagePaths, journal: JournalFile) -> bool:
    """Whether a journal without a commit mark is what a crash left in the middle of a sync."""
    if journal.head is None:  # torn before anything of worth was in it, or not a journal
        with paths.journal.open("rb") as file:
            return not any(file.read(MOST_DATA[BEGIN]))
    if journal.ends_with_commit or journal.head.name != paths.name:
        return False
    return not paths.image.exists() or Identity.of(paths.image) == journal.head.base  # without one it is of no use


def apply_journal(paths: ImagePaths, journal: JournalFile) -> None:
    """Steps 4 to 6 of a sync, for a journal that was found sound."""
    assert journal.head is not None
    assert journal.snapshot is not None
    fd = os.open(paths.image, os.O_RDWR | os.O_CLOEXEC)
    try:
        was_untouched = Identity.of(fd) == journal.head.base  # else the next sync reads all of it
        os.ftruncate(fd, journal.snapshot.size)
        for record in journal.records():
            if record.kind == HOLE:
                make_zeros(fd, record.offset, record.length)
            else:
                write_all(fd, record.data, record.offset)
        os.fsync(fd)
        identity = Identity.of(fd) if was_untouched else None
    finally:
        os.close(fd)
    adopt_new_state(paths, journal.head, identity)
    paths.journal.unlink()
    sync_directory(paths.metadata)


def adopt_new_state(paths: ImagePaths, head: JournalHead, identity: Identity | None) -> None:
    """Make the state that belongs to an applied journal the image's state, with this identity of the image."""
    for path in (paths.new_state, paths.state):  # the second if a crash came after the rename
        with contextlib.suppress(DosvobError):  # a damaged one is as good as none: the image is compared in full
            if (state := load_state(path)) is not None and state.journal == head.id:
                fd = create_private(path)
                try:
                    write_all(fd, dataclasses.replace(state, identity=identity).pack(), 0)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                path.rename(paths.state)
                sync_directory(paths.metadata)
                return
    for path in (paths.new_state, paths.state):
        path.unlink(missing_ok=True)


class StateWriter:
    """Writes the state of the sync that goes on: digests come in the order of the chunks, the header last."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(create_private(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), "wb", buffering=128 << 10)
        self._file.write(bytes(STATE_HEADER))
        self._table = hashlib.sha256()

    def append(self, digest: bytes) -> None:
        """The digest of the next chunk."""
        self._file.write(digest)
        self._table.update(digest)

    def finish(self, snapshot: Snapshot, reread: int, journal: str, identity: Identity | None) -> None:
        """Write the header, and make it all durable."""
        state = State(snapshot, utc_now().isoformat(), reread, journal, self._table.hexdigest(), identity)
        self._file.seek(0)
        self._file.write(state.pack())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what is buffered may be lost."""
        with contextlib.suppress(OSError):  # a full disk, which was reported when it was met
            self._file.close()


@dataclass
class Tally:
    """What a sync did, in bytes; `decayed` has the offsets of chunks that had changed on the local disk."""

    changed: int = 0
    decayed: list[int] = field(default_factory=list)
    decayed_bytes: int = 0

    MOST_OFFSETS = 20

    def add_decayed(self, index: int) -> None:
        """Count a chunk."""
        self.decayed_bytes += CHUNK
        if len(self.decayed) < self.MOST_OFFSETS:
            self.decayed.append(index * CHUNK)


class Update:
    """One sync's changes to one image: what the image has, what is kept, what is stored, and the end of it.

    Chunks may be settled in any order within a window. Of a first sync everything goes straight into NAME.partial, of
    a later one into the journal. To be closed in any case; only `finish` makes it count.
    """

    def __init__(self, paths: ImagePaths, snapshot: Snapshot, warn: Callable[[str], None], *, reread: bool) -> None:
        self.chunks = snapshot.size // CHUNK
        self.is_first: bool  # whether there is no image yet
        snapshot.mark()  # it must be possible in the end
        self.settled = 0  # chunks from the first on that are done
        self.tally = Tally()
        self._paths = paths
        self._snapshot = snapshot
        self._digests: dict[int, bytes] = {}  # of chunks that are done, beyond `settled`
        self._resumed: dict[int, int] = {}  # of a journal that was taken up: where each chunk's last records begin
        self._decayed: set[int] = set()  # chunks that had changed on the local disk, and are not done
        self._journal: Journal | None = None
        self._is_committed = False
        self._known: BinaryIO | None = None
        self._hole_until = 0
        self._open(warn, reread)

    def _open(self, warn: Callable[[str], None], reread: bool) -> None:
        paths = self._paths
        state = self._fit_for_use(paths.load_state(), warn)
        self.is_first = not paths.image.exists()
        if self.is_first:
            paths.state.unlink(missing_ok=True)
            paths.journal.unlink(missing_ok=True)
            state = None
        self._fd = create_private(paths.partial) if self.is_first else os.open(paths.image, os.O_RDONLY | os.O_CLOEXEC)
        if self.is_first:
            forget_cached(self._fd)
            os.ftruncate(self._fd, self._snapshot.size)
        else:
            self._open_journal()
        self._new_state = StateWriter(paths.new_state)
        self._part = (state.reread + 1) % REREAD_PARTS if state else 0
        self._trusted = state is not None and not reread and state.identity == Identity.of(self._fd)
        self._known_chunks = state.snapshot.size // CHUNK if state else 0
        if state is not None:
            self._known = paths.state.open("rb", buffering=128 << 10)

    def _fit_for_use(self, state: State | None, warn: Callable[[str], None]) -> State | None:
        """The state, if it is this volume's; the image of another volume is set aside."""
        paths = self._paths
        check_link(paths)
        other = state is not None and state.snapshot.volume_id != self._snapshot.volume_id
        if state is not None and not other and state.snapshot.size > self._snapshot.size:
            raise DosvobError(
                f"{paths.name}: DigitalOcean says that it has shrunk to {human_size(self._snapshot.size)}, which no "
                f"volume does; {paths.image} was left as it is: try again later"
            )
        if paths.image.exists() and (other or paths.image.stat().st_size > self._snapshot.size):
            aside = paths.set_aside(paths.image, "set-aside")
            warn(
                f"the image {paths.image} is of another volume that had this name, and was set aside as {aside}: "
                "delete it when you no longer need it"
            )
            paths.journal.unlink(missing_ok=True)
            if state is not None:
                paths.state.rename(paths.metadata / f"{aside.name}.state")
            return None
        return state

    def _open_journal(self) -> None:
        """A new journal, or the one that a crash left, to be continued."""
        base = Identity.of(self._fd)
        with contextlib.suppress(FileNotFoundError), self._paths.journal.open("rb", buffering=CHUNK) as file:
            old = JournalFile(self._paths.journal, file)
            if old.head is not None and old.head.base == base and old.head.volume_id == self._snapshot.volume_id:
                self._take_up(old, old.head)
        if self._journal is None:
            self._paths.journal.unlink(missing_ok=True)
            self._journal = Journal.begin(self._paths.journal, self._snapshot, base)

    def _take_up(self, old: JournalFile, head: JournalHead) -> None:
        """Continue a journal: note where each chunk's last records begin."""
        previous = -1
        for record in old.records():
            index = record.offset // CHUNK
            if index != previous:
                self._resumed[index] = record.position
            previous = index
        self._journal = Journal(create_private(self._paths.journal), head, old.end)
        self._journal.start = old.start

    # What the image has

    def local_digests(self) -> Generator[bytes, None, None]:
        """The digests of the local chunks in order, from `settled` on; those that must be read are read ahead."""
        self._hole_until = 0
        self._decayed.clear()
        if self._known is not None:
            self._known.seek(STATE_HEADER + self.settled * DIGEST_SIZE)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ahead: collections.deque[concurrent.futures.Future[bytes] | bytes] = collections.deque()
            for index in range(self.settled, self.chunks):
                recorded = self._recorded(index)
                known = self._known_digest(index, recorded)
                ahead.append(known if known is not None else pool.submit(self._read_digest, index, recorded))
                if len(ahead) > READ_AHEAD_LOCAL:
                    yield settled_value(ahead.popleft())
            for digest in ahead:
                yield settled_value(digest)

    def _recorded(self, index: int) -> bytes | None:
        """The digest that the state has for the chunk."""
        return self._known.read(DIGEST_SIZE) if self._known is not None and index < self._known_chunks else None

    def _known_digest(self, index: int, recorded: bytes | None) -> bytes | None:
        """The chunk's digest if it is known without reading the chunk."""
        if index in self._resumed:
            return None
        if self._is_hole(index):
            if recorded not in (None, ZERO_DIGEST):
                self._decayed.add(index)
            return ZERO_DIGEST
        in_turn = index * REREAD_PARTS // self.chunks == self._part
        return recorded if self._trusted and not in_turn else None

    def _read_digest(self, index: int, recorded: bytes | None) -> bytes:
        pages = self.local_pages(index)
        digest = chunk_digest(pages) if pages else b""
        if pages and recorded is not None and digest != recorded and index not in self._resumed:
            self._decayed.add(index)
        return digest

    def _is_hole(self, index: int) -> bool:
        """Whether the image has no data there, which then need not be read."""
        start = index * CHUNK
        if start >= self._hole_until:
            try:
                self._hole_until = os.lseek(self._fd, start, os.SEEK_DATA)
            except OSError as problem:
                if problem.errno != errno.ENXIO:  # ENXIO: no data from there to the end
                    raise
                self._hole_until = self._snapshot.size
        return start + CHUNK <= self._hole_until

    def local_pages(self, index: int) -> bytes:
        """The digests of the pages of a local chunk, as the journal would make it; empty if the disk cannot read it."""
        chunk = self._local_chunk(index)
        return b"" if chunk is None else page_digests(chunk)

    def _local_chunk(self, index: int) -> bytes | None:
        """A local chunk, as the journal would make it; None if the disk cannot read it."""
        chunk = read_chunk(self._fd, index)
        if chunk is None:
            self._decayed.add(index)
            return None
        for record in self._journal_records(index):
            start = record.offset % CHUNK
            chunk = chunk[:start] + (record.data or bytes(record.length)) + chunk[start + record.length :]
        return chunk

    def _journal_records(self, index: int) -> list[Record]:
        """The chunk's records in a journal that was taken up."""
        if index not in self._resumed:
            return []
        with self._paths.journal.open("rb", buffering=128 << 10) as file:
            records = JournalFile(self._paths.journal, file).records(self._resumed[index])
            return list(itertools.takewhile(lambda record: record.offset // CHUNK == index, records))

    # What becomes of it

    def is_settled(self, index: int) -> bool:
        """Whether the chunk is done, by an attempt before this one."""
        return index in self._digests

    def keep(self, index: int, digest: bytes) -> None:
        """The chunk is as it should be."""
        self._digests[index] = digest
        if index in self._decayed:
            self._decayed.remove(index)
            self.tally.add_decayed(index)
        while (done := self._digests.pop(self.settled, None)) is not None:
            self._new_state.append(done)
            self.settled += 1

    def store(self, index: int, digest: bytes, wanted: int, included: int, data: bytes) -> None:
        """Change the wanted pages of a chunk to the data, which has the included ones; the others become zeros."""
        self.tally.changed += wanted.bit_count() * PAGE
        if index in self._resumed and wanted != ALL_PAGES:
            data = self._merged(index, wanted, included, data)  # for a chunk's last records must stand alone
            wanted, included = ALL_PAGES, nonzero_pages(data)
            data = b"".join(data[page * PAGE : (page + 1) * PAGE] for page in range(PAGES) if included >> page & 1)
        position = 0
        for first, count, is_data in page_runs(wanted, included):
            offset, length = index * CHUNK + first * PAGE, count * PAGE
            if is_data:
                self._store_data(offset, memoryview(data)[position : position + length])
                position += length
            else:
                self._store_hole(offset, length)
        self.keep(index, digest)

    def _merged(self, index: int, wanted: int, included: int, data: bytes) -> bytes:
        """A local chunk as the data makes it."""
        local = self._local_chunk(index)
        if local is None:  # though it could be read just now; the next sync fetches all of it
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._paths.image))
        chunk = bytearray(local)
        position = 0
        for first, count, is_data in page_runs(wanted, included):
            start, length = first * PAGE, count * PAGE
            chunk[start : start + length] = data[position : position + length] if is_data else bytes(length)
            position += length * is_data
        return bytes(chunk)

    def _store_data(self, offset: int, data: memoryview) -> None:
        if self._journal is not None:
            self._journal.append(DATA, offset, data)
        else:
            write_all(self._fd, data, offset)

    def _store_hole(self, offset: int, length: int) -> None:
        if self._journal is not None:
            self._journal.append(HOLE, offset, length=length)
        else:
            make_zeros(self._fd, offset, length)

    # The end of it

    def finish(self, warn: Callable[[str], None]) -> None:
        """Make it the image; all chunks must be settled."""
        assert self.settled == self.chunks
        if self._journal is None:
            self._finish_first()
        elif self._journal.is_empty and Identity.of(self._fd).size == self._snapshot.size:
            identity = Identity.of(self._fd)
            was_untouched = identity == self._journal.head.base  # since this sync began to read it
            self._new_state.finish(self._snapshot, self._part, "", identity if was_untouched else None)
            self._journal.close()
            self._paths.journal.unlink()
            self._install_state()
        else:
            self._journal.make_durable()
            self._new_state.finish(self._snapshot, self._part, self._journal.head.id, None)
            sync_directory(self._paths.metadata)
            self._journal.commit(self._snapshot)
            self._is_committed = True
            if not recover(self._paths, warn):
                raise DosvobError(f"{self._paths.journal} has gone before it could be applied: who removed it?")

    def _finish_first(self) -> None:
        os.fsync(self._fd)
        self._new_state.finish(self._snapshot, self._part, "", Identity.of(self._fd))
        if self._paths.image.exists():
            kept = self._paths.partial
            raise DosvobError(f"{self._paths.image} has appeared meanwhile: move it away; {kept} is kept")
        self._paths.partial.rename(self._paths.image)
        sync_directory(self._paths.backups)
        self._install_state()

    def _install_state(self) -> None:
        self._paths.new_state.rename(self._paths.state)
        sync_directory(self._paths.metadata)

    def give_room(self) -> None:
        """Give up so much of a sync that cannot go on for want of room that the other volumes can.

        That is a journal, or the end of a first sync: each run that fails fetches only that again.
        """
        if self._is_committed:
            return
        if self._journal is not None:
            self._paths.journal.unlink(missing_ok=True)
            return
        goal = os.fstat(self._fd).st_blocks * 512 - ROOM_FOR_OTHERS
        for index in reversed(range(min(self.settled + WINDOW, self.chunks))):
            if os.fstat(self._fd).st_blocks * 512 <= goal or not punch_hole(self._fd, index * CHUNK, CHUNK):
                break

    def close(self) -> None:
        """Close the files. What was not finished is left for the next sync to take up."""
        for file in (self._journal, self._new_state, self._known):
            if file is not None:
                file.close()
        os.close(self._fd)


def settled_value(value: concurrent.futures.Future[bytes] | bytes) -> bytes:
    """The value, waited for if it is still to come."""
    return value if isinstance(value, bytes) else value.result()


def nonzero_pages(chunk: bytes) -> int:
    """A bitmap of the pages of a chunk that are not all zeros."""
    return sum(1 << page for page in range(PAGES) if not chunk.startswith(ZERO_PAGE, page * PAGE))


def page_runs(wanted: int, included: int) -> Iterator[tuple[int, int, bool]]:
    """The runs of wanted pages that are alike: (first page, count, whether they have data)."""
    first, kind = 0, None
    for page in range(PAGES + 1):
        this = bool(included >> page & 1) if page < PAGES and wanted >> page & 1 else None
        if this is not kind:
            if kind is not None:
                yield first, page - first, kind
            first, kind = page, this


def verify_image(paths: ImagePaths, progress: Callable[[int], None]) -> list[tuple[int, int]] | None:
    """Compare an image with its recorded digests; the damaged ranges in bytes (start, end), None without a record."""
    state = paths.load_state()
    if state is None:
        return None
    damaged: list[tuple[int, int]] = []
    with paths.image.open("rb", buffering=0) as image, paths.state.open("rb") as digests:
        digests.seek(STATE_HEADER)
        for start in range(0, state.snapshot.size, CHUNK):
            chunk, recorded = read_chunk(image.fileno(), start // CHUNK), digests.read(DIGEST_SIZE)
            if chunk is None or chunk_digest(page_digests(chunk)) != recorded:
                first = damaged.pop()[0] if damaged and damaged[-1][1] == start else start
                damaged.append((first, start + CHUNK))
            progress(CHUNK)
    return damaged


# ── The sync ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# The local end of the conversation with the agent: compares, asks, checks, stores. Knows neither SSH nor the API, and
# trusts nothing that comes in: what does not fit the conversation ends it.

MOST_AHEAD = 1 << 18  # chunks whose digests are kept while one before them is still to come; no droplet reads as fast
PROGRESS_LIMIT = 600  # seconds in which at least one chunk must be settled
MOST_PAYLOAD = {  # bytes, by kind of frame
    HELLO: len(AGENT_MAGIC) + 8,
    DIGEST: DIGEST_SIZE,
    ZEROS: 4,
    SHORT: PAGES * SHORT_SIZE,
    RAW: PAGES // 8 + CHUNK,
    PACKED: PAGES // 8 + CHUNK,
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


@dataclass(frozen=True)
class Frame:
    """One frame from the agent."""

    kind: int
    index: int
    payload: bytes


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

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with this data."""
        view = memoryview(data)
        while len(view) >= self._missing:
            part = b"".join((*self._pieces, view[: self._missing]))
            view = view[self._missing :]
            self._pieces.clear()
            if self._header is None:
                self._begin(part, view)
            else:
                kind, index = self._header
                self._header, self._missing = None, self.HEADER
                yield Frame(kind, index, part)
        self._missing -= len(view)
        self._pieces.append(view)
        if len(self._pieces) > self.MOST_PIECES:
            self._pieces = [b"".join(self._pieces)]

    def _begin(self, header: bytes, rest: memoryview) -> None:
        kind, index, length = struct.unpack(FRAME, header)
        if length > MOST_PAYLOAD.get(kind, -1):
            raise BadAgent(f"the droplet sent something that is not a frame: {header + bytes(rest[:60])!r}")
        self._header, self._missing = (kind, index), length


@dataclass
class Pending:
    """A chunk that was announced and is not settled.

    Its digest, and when they are known the digests of the local pages and a bitmap of the pages that are asked for.
    """

    digest: bytes
    local: bytes = b""
    wanted: int = 0


class Sync:
    """One conversation, from the first chunk of `update` that is not settled to the last."""

    def __init__(self, stream: Stream, update: Update, progress: Callable[[], None]) -> None:
        self._stream = stream
        self._update = update
        self._progress = progress
        self._parser = FrameParser()
        self._commands: list[bytes] = []
        self._drops: tuple[int, int] = (0, 0)  # chunks to drop, from and up to
        self._pending: dict[int, Pending] = {}
        self._next = update.settled  # the chunk that must be announced next
        self._greeted = False
        self._local = update.local_digests()

    def run(self) -> None:
        """Go on until all chunks are settled."""
        keep_freed_memory()
        settled, deadline = -1, 0.0
        with contextlib.closing(self._local):
            while self._update.settled < self._update.chunks:
                for frame in self._parser.feed(self._stream.receive()):
                    self._handle(frame)
                self._flush()
                self._progress()
                if self._update.settled != settled:
                    settled, deadline = self._update.settled, time.monotonic() + PROGRESS_LIMIT
                elif time.monotonic() > deadline:
                    raise ConnectionLost(f"the droplet says that it lives, but sent nothing for {PROGRESS_LIMIT} s")

    def _handle(self, frame: Frame) -> None:
        handlers = {
            HELLO: self._on_hello,
            DIGEST: self._on_digest,
            ZEROS: self._on_zeros,
            SHORT: self._on_short,
            RAW: self._on_data,
            PACKED: self._on_data,
            ALIVE: lambda _: None,
            FAILED: self._on_failed,
        }
        if not self._greeted and frame.kind not in (HELLO, ALIVE, FAILED):
            raise BadAgent("the droplet did not begin with a greeting")
        handlers[frame.kind](frame)

    def _on_hello(self, frame: Frame) -> None:
        size = self._update.chunks * CHUNK
        if frame.payload != AGENT_MAGIC + struct.pack(">Q", size):
            raise BadAgent(f"the device on the droplet is not one of {size // GIB} GiB: {frame.payload!r}")
        self._greeted = True

    def _on_failed(self, frame: Frame) -> None:
        raise BadAgent(f"the droplet cannot go on: {frame.payload.decode(errors='replace')}")

    def _on_digest(self, frame: Frame) -> None:
        if frame.index != self._next or len(frame.payload) != DIGEST_SIZE:
            raise BadAgent(f"the droplet announced chunk {frame.index} when {self._next} was due")
        if len(self._pending) > 2 * WINDOW:  # it may have forgotten so many that are asked for once more
            raise BadAgent(f"the droplet announced {len(self._pending)} chunks and does not send them")
        self._announced(frame.index, frame.payload)

    def _on_zeros(self, frame: Frame) -> None:
        (count,) = struct.unpack(">I", frame.payload) if len(frame.payload) == 4 else (0,)
        if frame.index != self._next or not 0 < count <= self._update.chunks - self._next:
            raise BadAgent(f"the droplet announced {count} chunks of zeros from {frame.index}, {self._next} was due")
        if self._pending and self._next + count - self._update.settled > MOST_AHEAD:
            raise BadAgent(f"the droplet announced {count} chunks of zeros and does not send others")
        for index in range(frame.index, frame.index + count):
            self._announced(index, ZERO_DIGEST)

    def _announced(self, index: int, digest: bytes) -> None:
        """Decide what is to be done about a chunk."""
        local = next(self._local, None)
        if local is None:
            raise BadAgent(f"the droplet announced chunk {index}, which is beyond the volume's end")
        self._next = index + 1
        if self._update.is_settled(index):
            self._drop(index)
        elif local == digest:
            self._update.keep(index, digest)
            self._drop(index)
        elif digest == ZERO_DIGEST:
            self._update.store(index, digest, ALL_PAGES, 0, b"")
        elif local in (ZERO_DIGEST, b""):  # nothing there, or nothing that can be read
            self._pending[index] = Pending(digest, ZERO_PAGES)
            self._ask(index, ALL_PAGES)
        else:
            self._pending[index] = Pending(digest)
            self._command(COMPARE, index)

    def _on_short(self, frame: Frame) -> None:
        pending = self._pending.get(frame.index)
        if pending is None or pending.local or len(frame.payload) != PAGES * SHORT_SIZE:
            raise BadAgent(f"the droplet sent page digests of chunk {frame.index} that nobody asked for")
        local = self._update.local_pages(frame.index)
        pending.local = local or ZERO_PAGES
        theirs = frame.payload
        differing = 0
        for page in range(PAGES):  # all of them, if there is nothing that can be read
            start = page * DIGEST_SIZE
            if local[start : start + SHORT_SIZE] != theirs[page * SHORT_SIZE : (page + 1) * SHORT_SIZE]:
                differing |= 1 << page
        self._ask(frame.index, differing or ALL_PAGES)

    def _on_data(self, frame: Frame) -> None:
        pending = self._pending.get(frame.index)
        included = int.from_bytes(frame.payload[: PAGES // 8], "little")
        if pending is None or not pending.wanted or len(frame.payload) < PAGES // 8 or included & ~pending.wanted:
            raise BadAgent(f"the droplet sent pages of chunk {frame.index} that nobody asked for")
        data = unpacked(frame, included.bit_count() * PAGE)
        if merged_digest(pending.local, pending.wanted, included, data) == pending.digest:
            del self._pending[frame.index]
            self._update.store(frame.index, pending.digest, pending.wanted, included, data)
        elif pending.wanted != ALL_PAGES:  # two pages alike in their short digests, or changed here just now
            self._ask(frame.index, ALL_PAGES)
        else:
            raise BadAgent(f"chunk {frame.index} does not have the digest that was announced for it")

    def _ask(self, index: int, wanted: int) -> None:
        self._pending[index].wanted = wanted
        self._command(SEND, index, 1, wanted)

    def _drop(self, index: int) -> None:
        """Tell the agent to forget a chunk, together with its neighbours."""
        start, end = self._drops
        if end != index:
            self._send_drops()
            start = index
        self._drops = (start, index + 1)

    def _send_drops(self) -> None:
        start, end = self._drops
        self._drops = (0, 0)
        if end > start:
            self._command(DROP, start, end - start)

    def _command(self, kind: int, index: int, count: int = 0, bitmap: int = 0) -> None:
        self._commands.append(struct.pack(COMMAND, kind, index, count, bitmap.to_bytes(PAGES // 8, "little")))

    def _flush(self) -> None:
        self._send_drops()
        if self._commands:
            self._stream.send(b"".join(self._commands))
            self._commands.clear()


def unpacked(frame: Frame, size: int) -> bytes:
    """The pages in a data frame, which must be `size` bytes; never more is unpacked than that."""
    data = frame.payload[PAGES // 8 :]
    if frame.kind == PACKED:
        decompressor = zlib.decompressobj()
        try:
            data = decompressor.decompress(data, size + 1)
        except zlib.error as problem:
            raise BadAgent(f"the pages of chunk {frame.index} cannot be unpacked: {problem}") from None
    if len(data) != size:
        raise BadAgent(f"the droplet sent {len(data)} bytes of chunk {frame.index}, and announced {size}")
    return data


def merged_digest(local: bytes, wanted: int, included: int, data: bytes) -> bytes:
    """The digest of a chunk whose wanted pages become the data (the included ones) and zeros (the others)."""
    digests = [local[start : start + DIGEST_SIZE] for start in range(0, len(local), DIGEST_SIZE)]
    fetched = page_digests(data)
    position = 0
    for page in range(PAGES):
        if included >> page & 1:
            digests[page] = fetched[position : position + DIGEST_SIZE]
            position += DIGEST_SIZE
        elif wanted >> page & 1:
            digests[page] = ZERO_PAGE_DIGEST
    return chunk_digest(b"".join(digests))


# ── The connection ───────────────────────────────────────────────────────────────────────────────────────────────────
# SSH to the droplet: keys that exist in memory and for one run only, a host key that is known before the droplet is,
# and an agent at the other end of a channel.

SSH_PORT = 22
SSH_LIMIT = 300  # seconds after which a droplet that does not let us in is given up
SSH_TIMEOUT = 20  # seconds for one attempt to connect
KEEPALIVE = 60  # seconds; a router forgets a connection that is idle, as it is while the next clone is waited for
RECONNECT_LIMIT = 60  # seconds until a droplet that was up must let us in again
STALL_LIMIT = 30  # seconds of silence after which a connection is given up; the agent speaks every HEARTBEAT
LEAST_WINDOW, MOST_WINDOW = 4 << 20, 32 << 20  # bytes under way: enough for 1 Gbit/s over 30 ms, and over 200 ms
RECEIVE_SIZE = 4 << 20  # bytes taken at once: paramiko moves all the rest of what has come, each time
PACKET_SIZE = 256 << 10  # bytes; fewer packets, each of which costs paramiko some Python
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr")  # GCM is three times as fast
ATTEMPTS = 5  # connections in a row that break without one more chunk settled

FIRST_PACKETS = 100  # that the droplet sends before it hears of the first one's arrival; Linux sends 10
USER_DATA_COMMANDS = (
    # DigitalOcean's images mount a volume that appears, which writes to it; before sshd runs, so before any attach.
    "rm -f /etc/udev/rules.d/99-digitalocean-automount.rules",
    "udevadm control --reload || true",
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


@contextlib.contextmanager
def closing_after(limit: float, transport: paramiko.Transport) -> Iterator[None]:
    """Close the transport if the block takes more than `limit` seconds, with which the block fails."""
    timer = threading.Timer(limit, transport.close)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class AgentStream:
    """A running agent at the other end of an SSH connection. To be closed, by which the agent ends."""

    def __init__(self, transport: paramiko.Transport, program: bytes, cancellation: Cancellation) -> None:
        self.received = 0  # bytes
        self._window = LEAST_WINDOW  # bytes that may be under way
        self._measured = (0, time.monotonic())  # bytes received at the last look at how fast they come, and its time
        self._transport = transport
        self._cancellation = cancellation
        bootstrap = f"import sys; exec(sys.stdin.buffer.read({len(program)}))"
        try:
            start = time.monotonic()
            self._channel = transport.open_session(self._window, PACKET_SIZE, SSH_TIMEOUT)
            self._round_trip = time.monotonic() - start  # seconds
            self._channel.settimeout(Cancellation.NAP)
            with closing_after(SSH_TIMEOUT, transport):  # paramiko waits for the answer without a limit
                self._channel.exec_command(f"exec python3 -I -c '{bootstrap}'")
        except (paramiko.SSHException, OSError, EOFError) as problem:
            raise self._lost(f"the agent could not be started: {problem}") from problem
        self.send(program)

    def send(self, data: bytes) -> None:
        """Send all of it; raises ConnectionLost."""
        view = memoryview(data)
        while view:
            sent = self._patiently(lambda: self._channel.send(bytes(view)))  # noqa: B023 - called before view changes
            view = view[sent:]

    def receive(self) -> bytes:
        """What has come in."""
        data = self._patiently(lambda: self._channel.recv(RECEIVE_SIZE))
        if not data:
            raise ConnectionLost(f"the connection to the droplet ended{self._last_words()}")
        self.received += len(data)
        self._widen()
        return data

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
            self._cancellation.check()
            try:
                return transfer()
            except TimeoutError:
                if time.monotonic() > end or not self._transport.is_active():
                    raise self._lost(f"the connection to the droplet was silent for {STALL_LIMIT} s") from None
            except (OSError, EOFError, paramiko.SSHException) as problem:
                raise self._lost(f"the connection to the droplet broke: {problem}") from problem

    def _lost(self, what: str) -> ConnectionLost:
        """The error for a connection that is not to be used any more."""
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


class SeldomRekeyed(paramiko.packet.Packetizer):
    """Packets of a connection whose keys are renewed every 32 GiB, and not every 512 MiB.

    Each time the stream stands still for three round trips, which is 10 % of the time over 200 ms. 64 GiB are safe:
    https://www.rfc-editor.org/rfc/rfc4344#section-3.2
    """

    REKEY_BYTES = 32 << 30


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


def connect(address: str, keys: RunKeys) -> paramiko.Transport:
    """An authenticated connection; raises HostKeyMismatch, or ConnectionLost for what may pass."""
    try:
        sock = ReadAheadSocket(socket.create_connection((address, SSH_PORT), timeout=SSH_TIMEOUT))
    except OSError as problem:
        raise ConnectionLost(f"no connection to the droplet at {address}: {problem}") from problem
    # Without it each window adjustment waits for an acknowledgement: half the speed.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport = paramiko.Transport(
        sock,
        default_window_size=LEAST_WINDOW,
        default_max_packet_size=PACKET_SIZE,
        packetizer_class=SeldomRekeyed,
    )
    transport.banner_timeout = transport.auth_timeout = SSH_TIMEOUT
    transport.set_keepalive(KEEPALIVE)
    options = transport.get_security_options()
    options.ciphers = CIPHERS
    options.key_types = (keys.host.get_name(),)
    try:
        log_in(transport, address, keys)
    except BaseException:
        transport.close()
        raise
    return transport


def log_in(transport: paramiko.Transport, address: str, keys: RunKeys) -> None:
    """Make sure that it is our droplet, then authenticate; raises HostKeyMismatch, or ConnectionLost."""
    try:
        transport.start_client(timeout=SSH_TIMEOUT)
        if transport.get_remote_server_key() != keys.host:
            raise HostKeyMismatch(address)
        transport.auth_publickey("root", keys.client)
    except paramiko.ssh_exception.IncompatiblePeer as problem:  # it has no host key of this kind at all
        raise HostKeyMismatch(address) from problem
    except (paramiko.SSHException, OSError, EOFError) as problem:
        raise ConnectionLost(f"the droplet at {address} does not let us in: {problem}") from problem


def connect_when_up(address: str, keys: RunKeys, cancellation: Cancellation, limit: float) -> paramiko.Transport:
    """Connect to a droplet that may still be starting; raises the last ConnectionLost after `limit` seconds."""
    end = time.monotonic() + limit
    pause = 0.25
    while True:
        try:
            return connect(address, keys)
        except ConnectionLost:
            if time.monotonic() > end:
                raise
        cancellation.sleep(pause)
        pause = min(pause * 1.3, 1.0)


class Link:
    """The way to the droplet's agents: one connection, made anew when it has broken. To be closed."""

    def __init__(self, address: str, keys: RunKeys, cancellation: Cancellation) -> None:
        self._address = address
        self._keys = keys
        self._cancellation = cancellation
        self._transport: paramiko.Transport | None = None

    def open(self, limit: float) -> paramiko.Transport:
        """The connection that there is, or a new one within `limit` seconds; raises ConnectionLost."""
        if self._transport is None or not self._transport.is_active():
            self.close()
            self._transport = connect_when_up(self._address, self._keys, self._cancellation, limit)
        return self._transport

    def start_agent(self, program: bytes) -> AgentStream:
        """An agent with this program; raises ConnectionLost."""
        self._cancellation.check()
        return AgentStream(self.open(RECONNECT_LIMIT), program, self._cancellation)

    def close(self) -> None:
        """Close the connection, and with it whatever runs at its other end."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def device_path(volume_name: str) -> str:
    """Where a droplet has an attached volume: https://docs.digitalocean.com/products/volumes/how-to/mount/"""
    return f"/dev/disk/by-id/scsi-0DO_Volume_{volume_name}"


def sync_device(
    start_agent: Callable[[int, int], AgentStream], update: Update, report: Reporter, progress: Callable[[int], None]
) -> int:
    """Sync over as many connections as it takes; returns the bytes received.

    `start_agent` starts an agent with its first chunk and its window. After a connection that broke another one goes on
    from the first chunk that is not settled.
    """
    # Of a first sync all is fetched, so nothing is gained by a scan far ahead, and chunks would be read twice.
    window = HELD if update.is_first else WINDOW
    received = 0
    failures = 0
    while True:
        settled = update.settled
        try:
            stream = start_agent(settled, window)
        except ConnectionLost as problem:
            failures += 1
            if failures >= ATTEMPTS:
                raise
            report.warn(f"{problem}; connecting again")
            continue
        try:
            Sync(stream, update, lambda: progress(received + stream.received)).run()  # noqa: B023 - used in here only
            return received + stream.received
        except ConnectionLost as problem:
            failures = failures + 1 if update.settled == settled else 1
            if failures >= ATTEMPTS:
                raise
            report.warn(f"{problem}; connecting again")
        finally:
            received += stream.received
            stream.close()


# ── Reporting ────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the user sees: on a terminal a live line, in a log lines with the time (UTC) now and then; a table at the end.

LOG_INTERVAL = 60  # seconds between a log's lines about the same sync
LIVE_INTERVAL = 0.2  # seconds between updates of a terminal's live line
LINE_LIMIT = 10_000  # characters; an answer of the API that is quoted may have any length
MOST_QUEUED = 10_000  # lines that wait for a terminal or a pipe that takes nothing more; later ones are lost
STUCK_LIMIT = 5  # seconds for which it is waited for at the end
PING_LIMIT = 5  # seconds that a ping may take
PING_BODY = 10_000  # bytes, from the end; a service may keep no more of it


def human_size(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_time(seconds: float) -> str:
    """Seconds as 12 s, 3:05 min or 2:03 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"


class Writer:
    """Writes to one place, in a thread of its own."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Any, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def put(self, stream: Any, text: str) -> None:
        """Write this when what was put before has been written; never waits."""
        if self._queue.qsize() < MOST_QUEUED:
            self._queue.put((stream, text))

    def close(self) -> bool:
        """Let what is queued be written; returns whether it could be."""
        self._queue.put(None)
        self._thread.join(STUCK_LIMIT)
        return not self._thread.is_alive()

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            stream, text = item
            with contextlib.suppress(OSError, ValueError):  # a terminal that was closed is no reason to end
                stream.write(text)
                stream.flush()


class Reporter:
    """Writes to the user, from any thread. `secret` never gets out, and nothing that could steer a terminal does.

    Threads of their own do the writing: a terminal that was stopped with ^S, or a pipe that nobody reads, must not
    keep a run, and its teardown least of all, from its work.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, secret: str = "") -> None:
        self.verbose = verbose
        self.quiet = quiet
        self.secret = secret
        self.current = ""  # what is going on, for whoever asks with a second signal
        self.has_left = False  # whether something could not be removed from the account
        self.summary: list[str] = []  # what somebody who was not there must know: warnings, errors, results
        self._lock = threading.Lock()
        self._live = ""
        self._is_terminal = sys.stdout.isatty()
        self._lined_at = 0.0 if self._is_terminal else time.monotonic()
        self._output = Writer()
        self._errors = self._output if os.path.sameopenfile(1, 2) else Writer()  # in one place they keep their order

    def close(self) -> bool:
        """Let what is queued be written; returns whether it could be."""
        closed = [writer.close() for writer in {self._output, self._errors}]
        return all(closed)

    def say(self, text: str) -> None:
        """Something happened."""
        if not self.quiet:
            self._write(sys.stdout, text)

    def detail(self, text: str) -> None:
        """Something that is of interest with --verbose only."""
        if self.verbose:
            self._write(sys.stdout, text)

    def warn(self, text: str) -> None:
        """Something that the user should look into."""
        self.summary.append(f"warning: {text}")
        self._write(sys.stderr, f"warning: {text}")

    def error(self, text: str) -> None:
        """Something failed."""
        self.summary.append(f"error: {text}")
        self._write(sys.stderr, f"error: {text}")

    def conclude(self, text: str) -> None:
        """What came of the run."""
        self.summary.append(text)
        self.say(text)

    def doing(self, text: str) -> None:
        """What is going on now."""
        self.current = self.clean(text)
        self.detail(text)

    def progress(self, text: str) -> None:
        """How far something has got: replaces the live line on a terminal, and is a line now and then in a log."""
        interval = LIVE_INTERVAL if self._is_terminal else LOG_INTERVAL
        if self.quiet or time.monotonic() - self._lined_at < interval:
            return
        self._lined_at = time.monotonic()
        if self._is_terminal:
            with self._lock:
                self._live = self.clean(text)[: shutil.get_terminal_size().columns - 1]
                self._put(sys.stdout, f"\r\x1b[2K{self._live}")
        else:
            self._write(sys.stdout, text)

    def end_progress(self) -> None:
        """Take the live line away; the next progress shows at once."""
        self._lined_at = 0.0 if self._is_terminal else time.monotonic()
        with self._lock:
            if self._live:
                self._live = ""
                self._put(sys.stdout, "\r\x1b[2K")

    def interject(self, text: str) -> None:
        """Tell something from a signal handler, which may have interrupted whoever holds the lock."""
        self._put(sys.stderr, self._lines(sys.stderr, text))

    def _lines(self, stream: Any, text: str) -> str:
        stamp = "" if stream.isatty() else f"{utc_now().isoformat()} "
        return "".join(f"{stamp}{line}\n" for line in self.clean(text).splitlines())

    def _write(self, stream: Any, text: str) -> None:
        lines = self._lines(stream, text)
        with self._lock:
            self._put(stream, f"\r\x1b[2K{lines}{self._live}" if self._live else lines)

    def clean(self, text: str) -> str:
        """The text without the secret and without what could steer a terminal."""
        if self.secret:
            text = text.replace(self.secret, "***")
        text = "".join(char if char.isprintable() or char == "\n" else "�" for char in text)
        return "\n".join(line[:LINE_LIMIT] for line in text.split("\n"))

    def _put(self, stream: Any, text: str) -> None:
        (self._errors if stream is sys.stderr else self._output).put(stream, text)


class Monitor:
    """Tells a service in the manner of healthchecks.io how a run goes: https://healthchecks.io/docs/http_api/

    That is done at once or not at all: a ping that fails is worth a warning, and nothing else comes of it.
    """

    def __init__(self, url: str | None, report: Reporter) -> None:
        self._url = url
        self._report = report

    def start(self) -> None:
        """The run has begun."""
        self._ping("/start", "")

    def success(self) -> None:
        """The run has ended well."""
        self._ping("", "\n".join(self._report.summary))

    def fail(self, problem: str = "") -> None:
        """The run has failed."""
        self._ping("/fail", "\n".join([*self._report.summary, *([f"error: {problem}"] if problem else [])]))

    def _ping(self, event: str, body: str) -> None:
        if self._url is None:
            return
        parts = urllib.parse.urlsplit(self._url)
        url = parts._replace(path=parts.path.rstrip("/") + event).geturl()
        content = self._report.clean(body).encode(errors="replace")[-PING_BODY:]
        try:
            problem = within(PING_LIMIT, lambda: post_ping(url, content))
        except TimeoutError:
            problem = f"no answer within {PING_LIMIT} s"
        if problem:
            self._report.warn(f"the ping to {parts.hostname} failed: {problem}; the backup is not affected")


def post_ping(url: str, body: bytes) -> str:
    """Send a ping; returns what went wrong, without the address, for who knows that can send pings too."""
    headers = {"User-Agent": f"dosvob/{VERSION}", "Content-Type": "text/plain; charset=utf-8"}
    try:
        response = requests.post(url, data=body, headers=headers, timeout=PING_LIMIT, allow_redirects=False)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the backup is what matters
        return root_cause(problem)
    return "" if response.ok and response.status_code < 300 else f"HTTP status {response.status_code}"


class Progress:
    """How far one volume's sync is."""

    def __init__(self, report: Reporter, name: str, update: Update) -> None:
        self._report = report
        self._name = name
        self._update = update
        self._start = time.monotonic()
        self._from = update.settled

    def __call__(self, received: int) -> None:
        """Show it; `received` is in bytes."""
        update = self._update
        seconds = max(time.monotonic() - self._start, 0.001)
        done = (update.settled - self._from) * CHUNK
        left = (update.chunks - update.settled) * CHUNK / (done / seconds) if done else 0
        self._report.progress(
            f"{self._name}: {human_size(update.settled * CHUNK)} of {human_size(update.chunks * CHUNK)} scanned, "
            f"{human_size(received)} fetched, {human_size(done / seconds)}/s{f', {human_time(left)} left' * bool(done)}"
        )


@dataclass(frozen=True)
class Result:
    """What became of one volume; sizes in bytes, `error` empty if it is backed up."""

    name: str
    size: int
    changed: int = 0
    fetched: int = 0
    seconds: float = 0.0
    error: str = ""


def result_table(results: Iterable[Result]) -> str:
    """The table at the end of a run."""
    rows = [("VOLUME", "SIZE", "CHANGED", "FETCHED", "TIME", "")]
    for result in results:
        figures = (human_size(result.changed), human_size(result.fetched), human_time(result.seconds))
        rows.append(
            (result.name, human_size(result.size), *(("-", "-", "-") if result.error else figures),
             "FAILED" if result.error else "ok")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(
        "  ".join(cell.ljust(width) if number in (0, 5) else cell.rjust(width)
                  for number, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the user can ask for: a backup, a dry run, a sweep, a verification. Puts the chapters above together.

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
RELEASE_DELAY = 60  # seconds at most for which a clone that was synced stays so that another one is attached first


def select_volumes(volumes: Iterable[Volume], config: Config, names: Iterable[str], report: Reporter) -> list[Volume]:
    """The volumes to back up; raises UsageError for a name or pattern that fits none, and tells of other regions."""
    theirs = [volume for volume in volumes if not is_ephemeral(volume.name, volume.tags)]
    here = [volume for volume in theirs if volume.region == config.region]
    elsewhere = sorted(f"{volume.name} ({volume.region})" for volume in theirs if volume.region != config.region)
    if not here:
        raise UsageError(
            f"there are no volumes in {config.region}"
            + (f"; there are {', '.join(elsewhere)}: is \"region\" in conf.json right?" if elsewhere else "")
        )
    for pattern in (*config.include, *config.exclude, *names):
        if not any(fnmatch.fnmatchcase(volume.name, pattern) for volume in here):
            raise UsageError(
                f'no volume in {config.region} matches "{pattern}"; there are {", ".join(sorted(v.name for v in here))}'
            )
    if elsewhere:
        report.say(f"not backed up, because in another region than {config.region}: {', '.join(elsewhere)}")
    wanted = tuple(names) or config.include or ("*",)
    excluded = () if tuple(names) else config.exclude
    chosen = [volume for volume in here if matches(volume.name, wanted) and not matches(volume.name, excluded)]
    if not chosen:
        raise UsageError('"include" and "exclude" in conf.json leave no volume to back up')
    return sorted(chosen, key=lambda volume: volume.name)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the shell patterns fits."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@contextlib.contextmanager
def locked(backups: Path) -> Iterator[None]:
    """Hold the lock of a backups directory, making what is missing; UsageError if it is held, or cannot be had."""
    metadata = backups / ".dosvob"
    try:
        backups.mkdir(mode=0o700, exist_ok=True)
        metadata.mkdir(mode=0o700, exist_ok=True)
        sync_directory(backups)  # a journal counts only if its directory survives a power cut
        fd = create_private(metadata / "lock")
    except OSError as problem:
        raise UsageError(f"cannot write to {backups}: {problem.strerror}: is it there, and yours?") from problem
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another dosvob is at work in {backups}: wait until it ends") from None
        yield
    finally:
        os.close(fd)


def recover_all(backups: Path, report: Reporter) -> set[str]:
    """Finish what crashes left, without network; returns the names for which that failed."""
    failed = set()
    for journal in sorted((backups / ".dosvob").glob("*.journal")):
        name = journal.name.removesuffix(".journal")
        try:
            with journal.open("rb") as file:
                forget_cached(file.fileno())
            if recover(ImagePaths(backups, name), report.warn):
                report.say(f"{name}: an interrupted backup was completed from its journal")
        except DosvobError as problem:
            report.error(str(problem))
            failed.add(name)
        except OSError as problem:
            report.error(f"{name}: {disk_problem(problem, backups)}; the journal is kept and applied at the next start")
            failed.add(name)
    return failed


def disk_problem(problem: OSError, backups: Path) -> str:
    """What the local disk refused, for the user."""
    advice = {
        errno.ENOSPC: "make room there and run again",
        errno.EDQUOT: "make room there and run again",
        errno.EROFS: "mount it for writing",
        errno.EACCES: "it must belong to the user who runs dosvob",
        errno.EPERM: "it must belong to the user who runs dosvob",
        errno.EIO: "the disk may be failing: look at the kernel's log",
    }
    where = problem.filename or backups
    return f"{where}: {problem.strerror or problem}: {advice.get(problem.errno or 0, 'look at that file and its disk')}"


@dataclass(frozen=True)
class Turn:
    """A volume whose turn it is; not before a time, and given up after another (both of time.monotonic)."""

    volume: Volume
    number: int
    not_before: float = 0.0
    give_up: float = float("inf")

    def later(self, wait: float) -> Turn:
        """The same after a snapshot that came too soon."""
        now = time.monotonic()
        give_up = now + max(SNAPSHOT_INTERVAL, wait + 60) if self.give_up == float("inf") else self.give_up
        return dataclasses.replace(self, not_before=now + wait, give_up=give_up)


@dataclass(frozen=True)
class Reached:
    """The droplet, and the way to its agents."""

    droplet: Droplet
    link: Link


@dataclass(frozen=True)
class Prepared:
    """A clone that is attached, and when its snapshot was taken."""

    clone: Volume
    taken_at: str


class Backup:
    """One run: all volumes over one droplet, the next volume's clone being prepared while this one syncs."""

    def __init__(
        self, api: Api, plan: DropletPlan, backups: Path, report: Reporter, cancellation: Cancellation, *, reread: bool
    ) -> None:
        self._api = api
        self._plan = plan
        self._backups = backups
        self._report = report
        self._cancellation = cancellation
        self._reread = reread
        self._keys = RunKeys.generate()
        self._results: dict[str, Result] = {}

    def run(self, volumes: list[Volume]) -> list[Result]:
        """Back up all volumes; returns the results in their order."""
        names = ", ".join(volume.name for volume in volumes)
        self._report.say(f"backing up {names}, over a droplet {self._plan.sizes[0][0]} with {self._plan.image}")
        ephemeral = Ephemeral(self._api, self._report)
        with ephemeral:
            try:
                self._run(ephemeral, volumes)
            finally:
                self._report.end_progress()
        self._report.conclude(result_table(self._results[volume.name] for volume in volumes))
        self._report.conclude(f"this run cost about ${ephemeral.cost():.5f}")
        return [self._results[volume.name] for volume in volumes]

    def _run(self, ephemeral: Ephemeral, volumes: list[Volume]) -> None:
        pool = concurrent.futures.ThreadPoolExecutor
        with contextlib.ExitStack() as links, pool(1) as droplets, pool(1) as ahead, pool(1) as behind:
            try:
                reached = droplets.submit(self._make_droplet, ephemeral, links)
                turns = [Turn(volume, number) for number, volume in enumerate(volumes) if self._is_acceptable(volume)]
                self._take_turns(collections.deque(turns), ephemeral, reached, ahead, behind)
            finally:
                self._cancellation.request()  # what goes on in the background is of no use any more

    def _is_acceptable(self, volume: Volume) -> bool:
        try:
            ImagePaths(self._backups, volume.name)
        except DosvobError as problem:
            self._fail(volume, str(problem))
            return False
        return True

    def _take_turns(
        self,
        turns: collections.deque[Turn],
        ephemeral: Ephemeral,
        reached: concurrent.futures.Future[Reached],
        ahead: concurrent.futures.Executor,
        behind: concurrent.futures.Executor,
    ) -> None:
        """One volume after the other; the next one is prepared, and the last one released, while one syncs."""

        def start() -> tuple[Turn, concurrent.futures.Future[Prepared]] | None:
            turn = turns.popleft() if turns else None
            return (turn, ahead.submit(self._prepare, turn, ephemeral, reached)) if turn else None

        upcoming = start()
        last: Prepared | None = None
        while upcoming is not None:
            turn, future = upcoming
            prepared = self._prepared(turn, future, turns)
            upcoming = start()
            if prepared is None:
                continue
            if last is not None and upcoming is not None:  # the last clones go with the droplet
                behind.submit(self._release, last.clone, ephemeral, reached.result().droplet, upcoming[1])
            self._sync(turn.volume, prepared, reached.result().link)
            last = prepared

    def _prepared(
        self, turn: Turn, future: concurrent.futures.Future[Prepared], turns: collections.deque[Turn]
    ) -> Prepared | None:
        """What was prepared for the turn; None if it failed, or is to be taken later."""
        try:
            return self._await(turn, future)
        except Interrupted:
            raise
        except SnapshotTooSoon as problem:
            later = turn.later(problem.wait)
            if later.not_before < later.give_up:
                self._report.say(f"{problem}; trying again in {problem.wait:.0f} s, after the other volumes")
                turns.append(later)
            else:
                self._fail(turn.volume, f"{problem}, and did not take this one for longer: try again later")
        except NoDroplet as problem:
            self._report.error(str(problem))
            for other in (turn, *turns):
                self._results[other.volume.name] = Result(other.volume.name, other.volume.size, error=str(problem))
            turns.clear()
        except DosvobError as problem:
            self._fail(turn.volume, str(problem))
        return None

    def _await(self, turn: Turn, future: concurrent.futures.Future[Prepared]) -> Prepared:
        start = time.monotonic()
        while not future.done():
            left = turn.not_before - time.monotonic()
            until = f"{left:.0f} s until DigitalOcean may take its next snapshot"
            waiting = f"waiting for its clone and the droplet, {human_time(time.monotonic() - start)}"
            self._report.progress(f"{turn.volume.name}: {until if left > 0 else waiting}")
            concurrent.futures.wait([future], timeout=0.5)
        return future.result()

    def _fail(self, volume: Volume, problem: str) -> None:
        self._report.end_progress()
        self._report.error(problem if problem.startswith(f"{volume.name}: ") else f"{volume.name}: {problem}")
        self._results[volume.name] = Result(volume.name, volume.size, error=problem)

    # In the background

    def _make_droplet(self, ephemeral: Ephemeral, links: contextlib.ExitStack) -> Reached:
        """Create the droplet and wait until it lets us in; `links` closes what is opened."""
        try:
            key = ephemeral.upload_key(self._keys.public)
            droplet = ephemeral.create_droplet(self._plan, key, self._keys.user_data())
            link = links.enter_context(contextlib.closing(Link(droplet.address, self._keys, self._cancellation)))
            link.open(SSH_LIMIT)
        except (Interrupted, NoDroplet):
            raise
        except DosvobError as problem:
            raise NoDroplet(f"no volume can be backed up, for want of a droplet: {problem}") from problem
        self._report.say(f"the droplet {droplet.name} is up at {droplet.address}")
        return Reached(droplet, link)

    def _prepare(self, turn: Turn, ephemeral: Ephemeral, reached: concurrent.futures.Future[Reached]) -> Prepared:
        """Make the volume's clone and attach it."""
        self._cancellation.sleep(turn.not_before - time.monotonic())
        if reached.done():
            reached.result()  # a clone would be of no use without a droplet
        clone, taken_at = ephemeral.make_clone(turn.volume, turn.number)
        ephemeral.attach(clone, reached.result().droplet)
        return Prepared(clone, taken_at)

    def _release(
        self, clone: Volume, ephemeral: Ephemeral, droplet: Droplet, upcoming: concurrent.futures.Future[Prepared]
    ) -> None:
        """Detach the clone and delete it, after the next one's attachment: that one is waited for first."""
        concurrent.futures.wait([upcoming], timeout=RELEASE_DELAY)
        try:
            ephemeral.release(clone, droplet)
        except DosvobError as problem:  # or Interrupted
            self._report.detail(f"{problem}; {clone.name} is removed at the end of the run")

    # In the foreground

    def _sync(self, volume: Volume, prepared: Prepared, link: Link) -> None:
        start = time.monotonic()
        self._report.current = f"backing up {volume.name}"
        try:
            result = self._sync_image(volume, prepared, link)
        except Interrupted:
            raise
        except DosvobError as problem:
            self._fail(volume, str(problem))
        except OSError as problem:
            self._fail(volume, disk_problem(problem, self._backups))
        else:
            result = self._results[volume.name] = dataclasses.replace(result, seconds=time.monotonic() - start)
            self._report.end_progress()
            self._report.say(
                f"{volume.name}: backed up {human_size(result.size)} in {human_time(result.seconds)}, "
                f"{human_size(result.changed)} had changed, {human_size(result.fetched)} were fetched"
            )

    def _sync_image(self, volume: Volume, prepared: Prepared, link: Link) -> Result:
        paths = ImagePaths(self._backups, volume.name)
        snapshot = Snapshot(volume.id, volume.name, volume.region, prepared.clone.size, prepared.taken_at)
        device = device_path(prepared.clone.name)

        def start_agent(first: int, window: int) -> AgentStream:
            return link.start_agent(agent_source(device, first, window))

        self._report.detail(f"{volume.name}: syncing its snapshot of {prepared.taken_at}")
        with contextlib.closing(Update(paths, snapshot, self._report.warn, reread=self._reread)) as update:
            progress = Progress(self._report, volume.name, update)
            try:
                received = sync_device(start_agent, update, self._report, progress)
                update.finish(self._report.warn)
            except OSError as problem:
                if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                    update.give_room()
                raise
        self._tell_decay(volume.name, update.tally)
        return Result(volume.name, snapshot.size, update.tally.changed, received)

    def _tell_decay(self, name: str, tally: Tally) -> None:
        if tally.decayed_bytes:
            places = ", ".join(map(str, tally.decayed))
            self._report.warn(
                f"{name}: {human_size(tally.decayed_bytes)} of the image had changed on this disk by itself, or could "
                f"not be read (the MiB at byte {places}); the volume's content was put back. Nobody wrote to it? Look "
                "at the disk"
            )


def back_up(arguments: argparse.Namespace, report: Reporter, cancellation: Cancellation) -> int:
    """The main job; returns the exit code."""
    config = load_config(arguments.config, os.environ, report.warn)
    report.secret = config.token
    api = Api(config.api_url, config.token, cancellation, report.say, report.detail)
    if arguments.dry_run:
        return dry_run(api, config, arguments, report)
    monitor = Monitor(config.healthchecks, report)
    try:
        with locked(arguments.backups):
            monitor.start()
            code = back_up_all(api, config, arguments, report, cancellation)
    except Busy:
        raise  # the one that is at work tells how it goes
    except Exception as problem:
        monitor.fail(str(problem))
        raise
    if code == EXIT_OK:
        monitor.success()
    else:
        monitor.fail()
    return code


def back_up_all(
    api: Api, config: Config, arguments: argparse.Namespace, report: Reporter, cancellation: Cancellation
) -> int:
    """A backup, once the lock is held; returns the exit code."""
    damaged = recover_all(arguments.backups, report)
    start = time.monotonic()
    sweep(api, report)
    plan = plan_droplet(api, config)
    volumes = select_volumes(list_volumes(api), config, arguments.names, report)
    if not arguments.names:
        record_wanted(arguments.backups, (volume.name for volume in volumes), report)
    fit = [volume for volume in volumes if volume.name not in damaged]
    backup = Backup(api, plan, arguments.backups, report, cancellation, reread=arguments.reread)
    results = backup.run(fit) if fit else []
    if not report.has_left:
        sweep_again(api.to_the_end(), report, start + LIST_LAG)
    return EXIT_FAILED if report.has_left or damaged or any(result.error for result in results) else EXIT_OK


def dry_run(api: Api, config: Config, arguments: argparse.Namespace, report: Reporter) -> int:
    """Say what a backup would do; changes nothing."""
    for resource in list_ephemeral(api):
        report.say(f"would remove what an earlier run left: {resource}")
    plan = plan_droplet(api, config)
    size, price = plan.sizes[0]
    for volume in select_volumes(list_volumes(api), config, arguments.names, report):
        if not VOLUME_NAME.fullmatch(volume.name):
            report.say(f"would not back up {volume.name!r}: that is not a name that a volume can have")
            continue
        image = ImagePaths(arguments.backups, volume.name).image
        how = "changes only" if image.exists() else "all of it, for the first time"
        report.say(f"would back up {volume.name}, {volume.size_gib} GiB, to {image}: {how}")
    report.say(f"would do so over a droplet {size} with {plan.image} in {plan.region}, at ${price:.5f} an hour")
    return EXIT_OK


def sweep_only(arguments: argparse.Namespace, report: Reporter, cancellation: Cancellation) -> int:
    """Remove what earlier runs left behind, and nothing else."""
    config = load_config(arguments.config, os.environ, report.warn)
    report.secret = config.token
    api = Api(config.api_url, config.token, cancellation, report.say, report.detail)
    if arguments.names:
        raise UsageError("sweep takes no names: it removes all that dosvob left behind")
    if arguments.dry_run:
        for resource in list_ephemeral(api):
            report.say(f"would remove {resource}")
        return EXIT_OK
    with locked(arguments.backups):
        damaged = recover_all(arguments.backups, report)
        sweep(api, report)
        if not report.has_left:
            api.sleep(LIST_LAG)  # what was created a moment ago may not have been listed yet
            sweep(api, report)
    if not report.has_left:
        report.say("nothing of dosvob's is left in the account")
    return EXIT_FAILED if report.has_left or damaged else EXIT_OK


def verify(arguments: argparse.Namespace, report: Reporter, cancellation: Cancellation) -> int:
    """Compare images with their recorded digests, without network or account."""
    backups: Path = arguments.backups
    if not backups.is_dir():
        raise UsageError(f"there is no {backups}: say where the images are with --backups")
    with locked(backups):
        failed = bool(recover_all(backups, report))
        known = names_with_state(backups)
        present = {path.name for path in backups.iterdir() if VOLUME_NAME.fullmatch(path.name) and path.is_file()}
        names = arguments.names or sorted(known | present)
        for name in names:
            if name not in known | present:
                raise UsageError(f"there is no image of {name} in {backups}")
            try:
                failed |= not verify_one(ImagePaths(backups, name), report, cancellation)
            except OSError as problem:
                report.error(f"{name}: {disk_problem(problem, backups)}")
                failed = True
            except DosvobError as problem:
                if isinstance(problem, Interrupted):
                    raise
                report.error(str(problem))
                failed = True
    return EXIT_FAILED if failed else EXIT_OK


def record_wanted(backups: Path, names: Iterable[str], report: Reporter) -> None:
    """Keep in mind what is to be backed up, for `health`."""
    new = backups / ".dosvob" / "wanted.json.new"
    try:
        with os.fdopen(create_private(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            json.dump(list(names), file)
        new.rename(new.with_suffix(""))
    except OSError as problem:
        report.warn(f"{disk_problem(problem, backups)}; `health` will not miss a volume that was never backed up")


def recorded_wanted(backups: Path) -> set[str]:
    """What the last run was to back up."""
    try:
        names = json.loads((backups / ".dosvob" / "wanted.json").read_text())
    except (FileNotFoundError, ValueError):
        return set()
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def health(
    arguments: argparse.Namespace,
    report: Reporter,
    cancellation: Cancellation,  # noqa: ARG001 - what every command is given
) -> int:
    """Say how old each backup is, without network, account or lock; it fails if one is too old, or there is none."""
    backups: Path = arguments.backups
    if not backups.is_dir():
        raise UsageError(f"there is no {backups}: say where the images are with --backups")
    try:
        wanted = recorded_wanted(backups)
        names = arguments.names or sorted(wanted | names_with_state(backups))
        if not names:
            raise DosvobError(f"there is no backup in {backups} yet")
        fresh = [is_fresh(backups, name, arguments.max_age, wanted, report) for name in names]
    except OSError as problem:
        raise DosvobError(disk_problem(problem, backups)) from problem
    return EXIT_OK if all(fresh) else EXIT_FAILED


def is_fresh(backups: Path, name: str, max_age: float, wanted: set[str], report: Reporter) -> bool:
    """Whether an image is there and its snapshot is at most `max_age` hours old, and say so."""
    try:
        paths = ImagePaths(backups, name)
        check_link(paths)
        with paths.state.open("rb") as file:
            state = State.unpack(file.read(STATE_HEADER), paths.state)
    except FileNotFoundError:
        report.error(f"{name}: there is no complete backup of it yet")
        return False
    except DosvobError as problem:
        report.error(str(problem))
        return False
    if not paths.image.exists():
        report.error(f"{name}: {paths.image} is missing: the next backup fetches all of it")
        return False
    seconds = max(age(state.snapshot.taken_at), 0)
    if seconds == float("inf"):  # what DigitalOcean says is not a time
        seconds = max(age(state.completed_at), 0)
    told = f"{name}: its last complete backup is {human_time(seconds)} old"
    if seconds <= max_age * 3600:
        report.say(told)
        return True
    unwanted = f"; if it is not to be backed up any more, move it and {paths.state} elsewhere"
    report.error(f"{told}, more than {max_age:g} h{unwanted * (name not in wanted)}")
    return False


def verify_one(paths: ImagePaths, report: Reporter, cancellation: Cancellation) -> bool:
    """Verify one image and say what was found; returns whether it is sound."""
    done = 0

    def progress(size: int) -> None:
        nonlocal done
        cancellation.check()
        done += size
        report.progress(f"{paths.name}: {human_size(done)} verified")

    damaged = verify_image(paths, progress)
    report.end_progress()
    if damaged is None:
        report.say(f"{paths.name}: no digests are recorded yet, the next backup records them")
        return True
    for start, end in damaged:
        report.error(f"{paths.name}: differs from its snapshot in bytes {start} to {end - 1}: the next backup mends it")
    if not damaged:
        report.say(f"{paths.name}: sound, {human_size(done)}")
    return not damaged


# ── main ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The command line, signals and exit codes.

EPILOG = """\
examples:
  python dosvob.py                  back up all volumes that conf.json names to ./backups
  python dosvob.py data 'db-*'      back up these volumes only
  python dosvob.py sweep            remove droplets, clones, snapshots and keys that a killed run left behind
  python dosvob.py verify           compare the images with their recorded digests, offline
  python dosvob.py health           say how old each backup is, and fail if one is too old, offline

exit codes:
  0  everything is backed up, and nothing is left behind in the account
  1  something failed, or was left behind: the messages say what
  2  wrong use or configuration; nothing was created
  128+n  ended by signal n, after removing everything
"""
COMMANDS: Mapping[str, Callable[[argparse.Namespace, Reporter, Cancellation], int]] = {
    "sweep": sweep_only,
    "verify": verify,
    "health": health,
}


DEFAULT_MAX_AGE = 24  # hours


def hours(text: str) -> float:
    """A positive number of hours; ValueError is argparse's way."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `command` is one of COMMANDS or "" for a backup, `names` what follows."""
    parser = argparse.ArgumentParser(
        prog="dosvob.py",
        description="Back up DigitalOcean volumes into raw disk images, fetching only what changed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="volumes to back up (patterns too), or a command")
    parser.add_argument("--config", type=Path, default=Path("conf.json"), metavar="FILE", help="default: conf.json")
    parser.add_argument("--backups", type=Path, default=Path("backups"), metavar="DIR", help="default: backups")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; change nothing anywhere")
    parser.add_argument("--reread", action="store_true", help="read all of the local images, not an eighth in turn")
    parser.add_argument(
        "--max-age", type=hours, default=DEFAULT_MAX_AGE, metavar="HOURS", help="for health; default: %(default)s"
    )
    parser.add_argument("--verbose", action="store_true", help="tell every call, and tracebacks")
    parser.add_argument("--quiet", action="store_true", help="tell only warnings and errors")
    parser.add_argument("--version", action="version", version=f"dosvob {VERSION}")
    parsed = parser.parse_intermixed_args(arguments)
    parsed.command = parsed.names.pop(0) if parsed.names and parsed.names[0] in COMMANDS else ""
    return parsed


class Signals:
    """Turns the signals that end a program into a wish to stop. `number` is that of the first one, or 0.

    Nothing is raised from the handler, so nothing is interrupted in the middle, the teardown least of all.
    """

    def __init__(self, cancellation: Cancellation, report: Reporter) -> None:
        self.number = 0
        self._cancellation = cancellation
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
        self._cancellation.request()
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
    parsed = parse_arguments(arguments)
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # what it logs also reaches us as exceptions
    report = Reporter(quiet=parsed.quiet, verbose=parsed.verbose)
    cancellation = Cancellation()
    signals = Signals(cancellation, report)
    code = run_command(parsed, report, cancellation)
    if signals.number:
        code = 128 + signals.number
    if report.has_left:
        code = EXIT_FAILED
    if not report.close():
        os._exit(code)  # Python would wait for what cannot be written
    return code


def run_command(parsed: argparse.Namespace, report: Reporter, cancellation: Cancellation) -> int:
    """Do what was asked for; returns the exit code, and raises nothing."""
    try:
        return COMMANDS.get(parsed.command, back_up)(parsed, report, cancellation)
    except Interrupted:
        return EXIT_FAILED
    except UsageError as problem:
        report.error(str(problem))
        return EXIT_USAGE
    except DosvobError as problem:
        report.error(str(problem))
        report.detail(traceback.format_exc())
    except Exception as problem:  # noqa: BLE001 - a bug, or a disk that fails where nobody expects it: still one clear line
        report.error(f"unexpected {type(problem).__name__}: {problem}; run again with --verbose to see where")
        report.detail(traceback.format_exc())
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
