"""The HTTP side: connections, authorization, rate limits, faults, and the record of all requests."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import socket
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .behaviour import Behaviour
from .catalogue import Json
from .cloud import Refusal, not_found
from .contract import Contract
from .faults import Fault, Faults
from .routes import Answer, Call, Routes

_HTML = "<!DOCTYPE html><html><head><title>One moment</title></head><body>We'll be right back.</body></html>"
_ELSEWHERE = "http://elsewhere.invalid/"
_HOURLY = 5000


@dataclass
class RequestRecord:
    """One request and its answer. The token appears as a digest."""

    number: int
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    body: Any
    started: float
    """Seconds of the epoch."""
    status: int = 0
    """0 if the answer was never sent."""
    answer: Any = None
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    """The kinds of the faults that befell it."""


@dataclass
class Token:
    """What the account's token may do."""

    value: str
    lacking: set[str] = field(default_factory=set)
    revoked: bool = False


class Front:
    """Takes requests from the connections and decides what becomes of them."""

    def __init__(self, routes: Routes, behaviour: Behaviour, token: Token, faults: Faults, contract: Contract) -> None:
        """Everything is shared with the simulator."""
        self.requests: list[RequestRecord] = []
        self.contract = contract
        self.errors: list[str] = []
        self.idle_seconds = behaviour.idle_seconds
        self.lost = 0
        self._routes = routes
        self._behaviour = behaviour
        self._token = token
        self._faults = faults
        self._lock = threading.Lock()
        self._times: deque[float] = deque()
        self._key_lists: deque[float] = deque()

    def record(self, method: str, target: str, headers: dict[str, str], raw: bytes) -> RequestRecord:
        """Write down a request that has come in."""
        parts = urlsplit(target)
        shown = dict(headers)
        if "authorization" in shown:
            shown["authorization"] = "sha256:" + hashlib.sha256(shown["authorization"].encode()).hexdigest()[:16]
        body: Any = None
        if raw:
            try:
                body = json.loads(raw)
            except ValueError:
                body = raw.decode(errors="replace")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        with self._lock:
            number = len(self.requests) + 1
            record = RequestRecord(number, method, parts.path, query, shown, body, time.time())
            self.requests.append(record)
        return record

    def answer(self, record: RequestRecord, authorization: str, base_url: str) -> tuple[Answer, Fault | None]:
        """The answer to a request, and the fault of the call, if any, that spoils its delivery."""
        faults = self._faults.befalling(record.number, record.method, record.path)
        record.faults = [fault.kind for fault in faults]
        time.sleep(sum(fault.seconds for fault in faults if fault.kind == "delay"))
        spoiling = next((fault for fault in faults if fault.kind in _SPOILERS), None)
        if spoiling and not spoiling.takes_effect:
            return self._faulty(spoiling, record), spoiling
        answer = self._regular(record, authorization, base_url, faults)
        for fault in faults:
            if fault.kind == "removes":
                self._routes.remove(fault.text)
        if not spoiling:
            self.contract.check(record.method, record.path, record.query, record.body, answer.status, answer.body)
        elif spoiling.kind == "odd":
            answer = replace(answer, body=_odd(answer.body or {}, json.loads(spoiling.text)))
        elif spoiling.kind not in _SPOILED_ON_THE_WAY:
            answer = self._faulty(spoiling, record)
        return answer, spoiling

    def now(self) -> float:
        """Seconds of the epoch, by the cloud's clock."""
        return time.time() + self._behaviour.clock_seconds

    def _faulty(self, fault: Fault, record: RequestRecord) -> Answer:
        """The answer of a fault that replaces the regular one."""
        if fault.kind == "rate-limit-reset":
            reset = str(math.ceil(self.now() + fault.seconds))
            return _refused(_too_many({"ratelimit-remaining": "0", "ratelimit-reset": reset}))
        return _faulty(fault, record)

    def _regular(self, record: RequestRecord, authorization: str, base_url: str, faults: list[Fault]) -> Answer:
        """What DigitalOcean would answer."""
        try:
            self._check_authorization(authorization)
            self._check_rate(record)
            if record.body is not None and not isinstance(record.body, dict):
                raise Refusal(400, "bad_request", "error parsing request body")
            call = Call(record.method, record.path, record.query, record.body or {}, base_url, faults)
            return self._routes.answer(call, self._token.lacking)
        except Refusal as refusal:
            return _refused(refusal)
        except Exception as error:
            self.errors.append(f"{record.method} {record.path}: {error!r}")
            raise

    def _check_authorization(self, authorization: str) -> None:
        if self._token.revoked or authorization != f"Bearer {self._token.value}":
            raise Refusal(401, "Unauthorized", "Unable to authenticate you")

    def _check_rate(self, record: RequestRecord) -> None:
        behaviour, now = self._behaviour, self.now()
        with self._lock:
            self._times.append(now)
            while self._times[0] < now - 3600:
                self._times.popleft()
            recent = [at for at in self._times if at > now - 60]
            if behaviour.requests_per_hour and len(self._times) > behaviour.requests_per_hour:
                raise _too_many({"ratelimit-reset": str(math.ceil(self._times[0] + 3600))})
            if behaviour.requests_per_minute and len(recent) > behaviour.requests_per_minute:
                raise _too_many({"retry-after": str(math.ceil(recent[0] + 60 - now))})
            if (record.method, record.path) == ("GET", "/v2/account/keys") and behaviour.key_lists_per_minute:
                self._key_lists.append(now)
                listed = [at for at in self._key_lists if at > now - 60]
                if len(listed) > behaviour.key_lists_per_minute:
                    raise _too_many({"retry-after": str(math.ceil(listed[0] + 60 - now))})

    def rate_headers(self) -> dict[str, str]:
        """The headers of every answer."""
        limit = self._behaviour.requests_per_hour or _HOURLY
        used = len(self._times)
        reset = math.ceil((self._times[0] if self._times else self.now()) + 3600)
        return {
            "ratelimit-limit": str(limit),
            "ratelimit-remaining": str(max(0, limit - used)),
            "ratelimit-reset": str(reset),
        }


_SPOILED_ON_THE_WAY = frozenset(("lost", "malformed", "trickle"))
_SPOILERS = _SPOILED_ON_THE_WAY | {"error", "missing", "rate-limit", "rate-limit-reset", "html", "odd", "redirect"}


def _too_many(headers: dict[str, str]) -> Refusal:
    return Refusal(429, "too_many_requests", "API rate limit exceeded.", headers)


def _refused(refusal: Refusal) -> Answer:
    body = {"id": refusal.reason, "message": refusal.message, "request_id": str(uuid.uuid4())}
    return Answer(refusal.status, body, refusal.headers)


def _faulty(fault: Fault, record: RequestRecord) -> Answer:
    if fault.kind == "missing":
        return _refused(not_found())
    if fault.kind == "rate-limit":
        return _refused(_too_many({"retry-after": fault.text or str(math.ceil(fault.seconds))}))
    if fault.kind == "redirect":
        location = fault.text or _ELSEWHERE.rstrip("/") + record.path
        return Answer(fault.status or 302, {}, {"location": location})
    if fault.kind == "html":
        return Answer(fault.status or 200)
    status = fault.status or 500
    message = fault.text or "Unexpected server-side error"
    return _refused(Refusal(status, "server_error" if status >= 500 else "error", message))


def _odd(body: Json, fields: Json) -> Json:
    """A body with other fields, or items with other fields in its lists."""
    changed = dict(body)
    for name, value in fields.items():
        is_for_items = isinstance(value, dict) and isinstance(body.get(name), list)
        changed[name] = [{**item, **value} for item in body[name]] if is_for_items else value
    return changed


class _Connection(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        """Remember the connection, so that it can be closed at the end."""
        super().setup()
        self.served = time.monotonic()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        """Forget the connection."""
        self.server.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        """Serve; a client that goes away is nothing to speak of."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *args: object) -> None:
        """Say nothing; there is the record."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The time that goes with an answer."""
        return super().date_time_string(self.server.front.now() if timestamp is None else timestamp)

    def _serve(self) -> None:
        front, now = self.server.front, time.monotonic()
        if front.idle_seconds and now - self.served > front.idle_seconds:
            front.lost += 1
            self.rfile.read()  # until the client gives up
            return
        self.served = now
        headers = {name.lower(): value for name, value in self.headers.items()}
        raw = self.rfile.read(int(headers.get("content-length") or 0))
        record = front.record(self.command, self.path, headers, raw)
        begun = time.monotonic()
        base_url = f"http://{headers.get('host', '')}"
        answer, fault = front.answer(record, headers.get("authorization", ""), base_url)
        record.seconds = time.monotonic() - begun
        if fault and fault.kind == "lost":
            self.close_connection = True
            return
        if fault and fault.kind == "trickle":
            self._trickle(answer, fault.seconds)
            return
        record.status, record.answer = answer.status, answer.body
        self._send(answer, fault)

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        content = b"" if answer.body is None else json.dumps(answer.body).encode()
        content_type = "application/json; charset=utf-8"
        if fault and fault.kind == "malformed":
            content = content[: len(content) // 2] or b'{"'
        if fault and fault.kind == "html":
            content, content_type = _HTML.encode(), "text/html"
        self.send_response(answer.status)
        for name, value in {**self.server.front.rate_headers(), **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("x-request-id", str(uuid.uuid4()))
        if answer.status != 204 or content:
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _trickle(self, answer: Answer, seconds: float) -> None:
        """Send an answer whose header never ends, until the client goes away."""
        self.close_connection = True
        self.send_response(answer.status)
        self.flush_headers()
        for byte in itertools.chain(b"x-trickle: ", itertools.repeat(ord("x"))):
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(seconds)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _serve  # noqa: N815


class Server(ThreadingHTTPServer):
    """Listens on this machine."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], front: Front) -> None:
        """Bind; `start` begins to serve."""
        super().__init__(address, _Connection)
        self.front = front
        self.connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True, name="simulator-http")

    def start(self) -> None:
        """Serve on a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and close all connections."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
