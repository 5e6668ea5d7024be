"""What happens later: a thread that runs things at their time, and one that starts processes."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Clock:
    """Runs functions after a delay, one after the other, on a thread of its own.

    `launch` has a second thread: a process with a parent-death signal dies with the *thread* that started it, so
    that thread lives as long as the clock.
    """

    def __init__(self) -> None:
        """Nothing runs before `start`."""
        self.errors: list[str] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._running = False
        self._launcher = ThreadPoolExecutor(1, "simulator-launcher")
        self._thread = threading.Thread(target=self._run, daemon=True, name="simulator-clock")

    def start(self) -> None:
        """Begin."""
        self._running = True
        self._thread.start()

    def stop(self) -> None:
        """Finish what runs at this moment and forget the rest."""
        with self._changed:
            self._running = False
            self._changed.notify()
        self._thread.join()
        self._launcher.shutdown(wait=True, cancel_futures=True)

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        """Run `function` in so many seconds."""
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), function))
            self._changed.notify()

    def launch(self, function: Callable[[], None]) -> None:
        """Run `function` at once on the thread that starts processes."""
        with self._changed:
            if self._running:
                self._launcher.submit(self._guarded, function)

    def _run(self) -> None:
        while function := self._next():
            self._guarded(function)

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next function; `None` at the end."""
        with self._changed:
            while self._running:
                wait = self._due[0][0] - time.monotonic() if self._due else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(wait)
        return None

    def _guarded(self, function: Callable[[], None]) -> None:
        """Run it; an error of the simulator itself must be seen, but not end the clock."""
        try:
            function()
        except Exception:  # noqa: BLE001
            self.errors.append(traceback.format_exc())
            traceback.print_exc()
