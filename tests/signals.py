"""Signals: how they end the programs here, and what becomes of those that are ignored when the tests begin.

Under `nohup`, and behind a `&` in a script, some are. What a process ignores, its children ignore too, and then a test
that sends such a signal waits in vain.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGPIPE)


def ignore_for_ourselves_only() -> None:
    """Go on ignoring what is ignored here, but let no process that is started from here on do so.

    That is what a handler that does nothing is good for: when a program is executed, the default takes its place.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _do_nothing)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Do as if the signal were ignored."""


class Stopped(BaseException):
    """A signal wants the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


class Stop:
    """Lets the first signal end the main part of a program, and none what prepares it or clears up after it."""

    def __init__(self) -> None:
        self._arrived = 0
        self._listening = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._arrived:
            return
        self._arrived = number
        if self._listening:
            raise Stopped(number)

    @contextlib.contextmanager
    def ends_this(self) -> Iterator[None]:
        """While this lasts, a signal raises `Stopped`; so does one that came before."""
        self._listening = True
        try:
            if self._arrived:
                raise Stopped(self._arrived)
            yield
        finally:
            self._listening = False

    def catch_up(self) -> None:
        """End by the signal that came meanwhile, if one did, so that a shell knows."""
        if self._arrived:
            signal.signal(self._arrived, signal.SIG_DFL)
            os.kill(os.getpid(), self._arrived)
