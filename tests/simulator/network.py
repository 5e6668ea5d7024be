"""A droplet's network: a veth pair from this machine into its namespace, and a relay that cuts connections."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import re
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_LOCK = Path("/run/lock/do-simulator.lock")
_CLONE_NEWNET = 0x40000000
_RELAY_STEP = 256 * 1024
_SLOW_STEP = 64 * 1024
_POLL = 0.01


@dataclass(frozen=True)
class Link:
    """A veth pair: its end on this machine, and the addresses of both ends."""

    interface: str
    gateway: str
    address: str

    @property
    def bytes_received(self) -> int:
        """What the droplet has sent to this machine; -1 once the link is gone."""
        try:
            return int(Path(f"/sys/class/net/{self.interface}/statistics/rx_bytes").read_text())
        except OSError:
            return -1

    def remember_neighbour(self, hardware_address: str) -> None:
        """Never ask for the droplet's hardware address again: when it is silent, packets shall be lost, not refused."""
        entry = ["to", self.address, "lladdr", hardware_address, "dev", self.interface, "nud", "permanent"]
        subprocess.run(["ip", "neigh", "replace", *entry], check=False, capture_output=True)

    def delete(self) -> None:
        """Remove both ends."""
        subprocess.run(["ip", "link", "delete", self.interface], check=False, capture_output=True)


def create_link(namespace_pid: int, mark: str) -> Link:
    """A link into the network namespace of a process; addresses are reused, as at DigitalOcean: the lowest is free."""
    interface = f"do{secrets.token_hex(5)}"  # processes in other namespaces have the same numbers
    with _allocation():
        gateway, address = _free_addresses()
        batch = (
            f"link add {interface} type veth peer name eth0 netns {namespace_pid}\n"
            f"link set {interface} alias {mark}\n"
            f"addr add {gateway}/30 dev {interface}\n"
            f"link set {interface} up\n"
        )
        subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True, capture_output=True)
    return Link(interface, gateway, address)


@contextlib.contextmanager
def _allocation() -> Iterator[None]:
    """One simulator at a time picks addresses."""
    _LOCK.parent.mkdir(parents=True, exist_ok=True)
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _free_addresses() -> tuple[str, str]:
    """The two usable addresses of the lowest free subnet 10.78.A.B/30."""
    shown = subprocess.run(["ip", "-o", "-4", "addr", "show"], text=True, check=True, capture_output=True).stdout
    used = {int(a) * 256 + int(b) & ~3 for a, b in re.findall(r"inet 10\.78\.(\d+)\.(\d+)/", shown)}
    base = next(base for base in range(0, 65536, 4) if base not in used)
    return _dotted(base + 1), _dotted(base + 2)


def _dotted(host: int) -> str:
    return f"10.78.{host // 256}.{host % 256}"


class UntilChannel:
    """Tells how much of what a client sends may pass until it has opened a channel.

    Of an encrypted packet AES-GCM leaves the length readable (RFC 5647). A client that logs in with a key at once sends
    three: a request for the service, one to log in, and one for the channel, whose confirmation it awaits.
    """

    PACKETS = 3
    _NEW_KEYS = 21
    _TAG = 16

    def __init__(self) -> None:
        self._kept = bytearray()
        self._greeted = False
        self._encrypted = False
        self._left = self.PACKETS

    def passing(self, data: bytes) -> bytes:
        """The packets that are complete with this data, and may pass."""
        self._kept += data
        passing = bytearray()
        while self._left and (size := self._size()) and len(self._kept) >= size:
            if self._encrypted:
                self._left -= 1
            elif self._greeted:
                self._encrypted = self._kept[5] == self._NEW_KEYS
            self._greeted = True
            passing += self._kept[:size]
            del self._kept[:size]
        return bytes(passing)

    def _size(self) -> int:
        """Of the next packet; 0 if that is not known yet. The first one is a line of text."""
        if not self._greeted:
            return self._kept.find(b"\n") + 1
        if len(self._kept) < 6:
            return 0
        return 4 + int.from_bytes(self._kept[:4], "big") + self._TAG * self._encrypted


class Relay:
    """Forwards a droplet's SSH port to its sshd until a connection has sent so many bytes, then does `on_limit`.

    With a limit of 0 it forwards everything, but nothing from the client once that has a channel.

    It runs in this process, on a thread that has entered the droplet's network namespace.
    """

    def __init__(
        self,
        namespace_pid: int,
        address: str,
        limit: int,
        connections: int,
        on_limit: Callable[[], None] | None,
        bytes_per_second: int = 0,
    ) -> None:
        """Relay from `address` port 22 to 127.0.0.1 port 22; without `on_limit`, the connection is cut there.

        The first so many connections are limited; of all, at most `bytes_per_second` come from sshd, if that is not 0.
        """
        self._address = address
        self._limit = limit
        self._connections = connections
        self._on_limit = on_limit
        self._pause = 1 / bytes_per_second if bytes_per_second else 0.0  # seconds for each byte
        self._namespace_pid = namespace_pid
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="simulator-relay")
        self._thread.start()

    def stop(self) -> None:
        """Cut everything and leave the namespace."""
        self._stopping = True
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._cancel_all)
        self._thread.join(5)

    def cut(self) -> None:
        """Cut all connections that are open now."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _run(self) -> None:
        with open(f"/proc/{self._namespace_pid}/ns/net") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot enter the droplet's network")
        self._loop.run_until_complete(self._listen())
        self._loop.close()

    async def _listen(self) -> None:
        """Take connections, from the moment that sshd does, until told to stop."""
        while not self._stopping and not await _takes_connections("127.0.0.1", 22):
            await asyncio.sleep(_POLL)
        if self._stopping:
            return
        server = await asyncio.start_server(self._accept, self._address, 22)
        while not self._stopping:
            await asyncio.sleep(_POLL)
        server.close()
        self._cancel_all()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection from the client."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        limited = self._connections > 0
        self._connections -= 1
        try:
            await self._serve(reader, writer, limited)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limited: bool) -> None:
        """Forward both directions until either ends or the limit is reached."""
        connection = socket.create_connection(("127.0.0.1", 22))
        if self._pause:  # what is under way to us is as good as sent
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_STEP)
        from_sshd, to_sshd = await asyncio.open_connection(sock=connection, limit=_RELAY_STEP)
        try:
            upstream = asyncio.ensure_future(self._forward_up(reader, to_sshd, limited))
            downward = self._forward_slowly(from_sshd, writer) if self._pause else None
            downstream = asyncio.ensure_future(
                downward or self._forward(from_sshd, writer, self._limit if limited else 0)
            )
            try:
                await asyncio.wait((upstream, downstream), return_when=asyncio.FIRST_COMPLETED)
            finally:
                upstream.cancel()
                downstream.cancel()
        finally:
            to_sshd.transport.abort()

    async def _forward_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limited: bool) -> None:
        """Forward what the client sends until the end."""
        if not limited or self._limit:
            await self._forward(reader, writer, 0)
            return
        until_channel = UntilChannel()
        while chunk := await reader.read(_RELAY_STEP):
            writer.write(until_channel.passing(chunk))
            await writer.drain()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> None:
        """Forward until the end, or so many bytes, if the limit is not 0."""
        left = limit
        while chunk := await reader.read(min(left or _RELAY_STEP, _RELAY_STEP)):
            writer.write(chunk)
            await writer.drain()
            if limit and (left := left - len(chunk)) <= 0:
                await self._at_limit()
                return

    async def _forward_slowly(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward until the end, only so fast."""
        while chunk := await reader.read(_SLOW_STEP):
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(len(chunk) * self._pause)

    async def _at_limit(self) -> None:
        """Cut by returning, or do what was ordered and keep the connection."""
        if self._on_limit is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._on_limit)
            await asyncio.Event().wait()


async def _takes_connections(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        _, writer = await asyncio.open_connection(address, port)
    except OSError:
        return False
    writer.close()
    return True
