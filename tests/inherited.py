"""Signals that are ignored when the tests begin, as they are under `nohup` and behind a `&` in a script.

What a process ignores, its children ignore too, and then a test that sends such a signal waits in vain.
"""

from __future__ import annotations

import signal
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
