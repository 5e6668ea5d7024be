"""Faults: what goes wrong, at which call, how often."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from typing import Literal, get_args

FOREVER = 1_000_000_000

CallKind = Literal[
    "error",  # an error of status `status` (default 500); nothing has happened unless `effect`
    "lost",  # the call takes effect, the connection closes without an answer
    "missing",  # 404, `times` times or for `seconds` from the first time on
    "rate-limit",  # 429 with `retry-after: seconds`, or whatever `text` is
    "rate-limit-reset",  # 429 with `ratelimit-reset` alone, `seconds` from now
    "malformed",  # the call takes effect, the answer's JSON is cut in the middle
    "odd",  # the call takes effect, the answer has the fields of the JSON `text`; `{"a": {…}}`: all items of the list a
    "trickle",  # the call takes effect, the answer comes byte by byte, `seconds` apart, and never ends
    "html",  # a page of HTML with status `status` (default 200)
    "redirect",  # 302 to `text`, by default another host
    "delay",  # the answer comes `seconds` later
    "removes",  # once the answer is made, the resource that the test has put there by the name of `text` is deleted
    "sold-out",  # creating a droplet: "Size is not available in this region."
]
ActionKind = Literal[
    "action-errored",  # the action that this call starts ends `errored`
    "action-stuck",  # the action that this call starts never ends
]
DropletKind = Literal[
    "never-active",  # the droplet that this call creates stays `new`
    "creation-errored",  # ... stays `new`, and the action of its creation ends `errored`
    "no-address",  # ... becomes active and never gets a public address
    "ssh-refused",  # ... never has a listening sshd
    "wrong-host-key",  # ... has another host key than its user_data says
    "dies",  # ... loses its power `seconds` after it became active
    "ssh-cut",  # ... cuts its first `times_on_droplet` connections after `bytes` sent
    "ssh-stalled",  # ... drops all packets once one of its first `times_on_droplet` connections has sent `bytes`
    "ssh-deaf",  # ... opens a channel on each of its first `times_on_droplet` connections and hears nothing after that
    "ssh-slow",  # ... sends `bytes` a second, and no more
    "small-path",  # ... has a path to it on which packets of more than `bytes` are lost silently, both ways
    "python",  # ... has the command `text` as its python3
    "hardened",  # ... has the line `text` first in its sshd_config
    "late-automount",  # ... gets the auto-mount rule anew when its boot commands are done
    "device-held",  # ... has something that holds each volume's device exclusively, as a mount or a device-mapper does
]
Kind = Literal[CallKind, ActionKind, DropletKind]

_CREATES_DROPLETS: frozenset[str] = frozenset(("sold-out", *get_args(DropletKind)))
_STARTS_ACTIONS: frozenset[str] = frozenset(get_args(ActionKind))
_AFTER_EFFECT: frozenset[str] = frozenset(("lost", "malformed", "odd", "trickle"))


@dataclass(frozen=True)
class Fault:
    """One fault, told by the calls that it befalls.

    It befalls the calls whose method and path match, from the `nth` such call on, `times` times; or, with
    `call`, the request of that number (the simulator's first is 1) if it matches. Faults of actions and
    droplets befall the call that creates the action or droplet; unless told otherwise they match every creation of a
    droplet, and every attach and detach (for the action of a droplet's creation, say `path="^/v2/droplets$"`).
    """

    kind: Kind
    method: str = ""
    """Regular expression for the whole method; empty for the kind's own default, or any."""
    path: str = ""
    """Regular expression searched in the path (without query); empty for the kind's own default, or any."""
    nth: int = 1
    call: int = 0
    times: int = 1
    status: int = 0
    seconds: float = 0.0
    effect: bool | None = None
    """Whether the call takes effect before it goes wrong; `None` for the kind's own default."""
    text: str = ""
    bytes: int = 0
    size: str = ""
    """For "sold-out": this size only."""
    times_on_droplet: int = 1
    """For the faults of SSH: how many connections of the droplet they befall."""

    def matches(self, method: str, path: str) -> bool:
        """Whether the fault is about this kind of call."""
        wanted_method, wanted_path = self.method, self.path
        if self.kind in _CREATES_DROPLETS:
            wanted_method, wanted_path = wanted_method or "POST", wanted_path or "^/v2/droplets$"
        if self.kind in _STARTS_ACTIONS:
            wanted_method, wanted_path = wanted_method or "POST", wanted_path or "^/v2/volumes/.*/actions$"
        if wanted_method and not re.fullmatch(wanted_method, method):
            return False
        return not wanted_path or re.search(wanted_path, path) is not None

    @property
    def takes_effect(self) -> bool:
        """Whether the call is carried out although its answer is a fault."""
        return self.kind in _AFTER_EFFECT if self.effect is None else self.effect


@dataclass
class _Armed:
    """A fault and how often its call has been seen."""

    fault: Fault
    seen: int = 0
    until: float = 0.0

    def befalls(self, number: int, method: str, path: str) -> bool:
        """Count this call if it is the fault's, and say whether the fault befalls it."""
        fault = self.fault
        if not fault.matches(method, path):
            return False
        self.seen += 1
        position = number - fault.call if fault.call else self.seen - fault.nth
        if fault.kind == "missing" and fault.seconds:
            return self._within_window(position)
        return 0 <= position < fault.times

    def _within_window(self, position: int) -> bool:
        """For a fault that lasts for a time: whether that time runs, beginning now if it is the first call."""
        if position < 0:
            return False
        self.until = self.until or time.monotonic() + self.fault.seconds
        return time.monotonic() < self.until


@dataclass
class Faults:
    """The faults that are armed. Safe to change while the simulator runs."""

    fired: list[tuple[int, Fault]] = field(default_factory=list)
    """Number of the request and fault, for each that has befallen a call."""
    _armed: list[_Armed] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *faults: Fault) -> None:
        """Arm faults; their counting of calls starts now."""
        with self._lock:
            self._armed.extend(_Armed(fault) for fault in faults)

    def clear(self) -> None:
        """Disarm all faults."""
        with self._lock:
            self._armed.clear()

    def befalling(self, number: int, method: str, path: str) -> list[Fault]:
        """The faults of this call; to be asked once for each call, for it counts."""
        with self._lock:
            found = [armed.fault for armed in self._armed if armed.befalls(number, method, path)]
            self.fired.extend((number, fault) for fault in found)
        return found
