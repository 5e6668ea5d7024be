"""Run dosvob.py as it is, but with other values for some of its constants: limits of minutes are not for tests.

It is called as `python with_constants.py '{"ACTION_LIMIT": 2}'` and dosvob's own arguments. A constant may be the
module's or a class's, the agent's among them. `SYNCS_IN_MAIN_THREAD` is none of its own: with it there is no thread for
a sync, for strace counts the calls of each thread.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dosvob

NO_SUCH_CONSTANT = 99  # as an exit code, which is none of dosvob's


class MainThread(concurrent.futures.Executor):
    """Does at once what it is given."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> concurrent.futures.Future[Any]:
        """Do it, and return what came of it."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(work(*arguments, **options))
        except BaseException as problem:  # noqa: BLE001 - as the other executors
            future.set_exception(problem)
        return future


def sync_in_main_thread() -> None:
    """Have the executor for syncs be one without threads."""
    threads = concurrent.futures.ThreadPoolExecutor

    def made(workers: int) -> concurrent.futures.Executor:
        return MainThread() if workers == dosvob.Backup.MOST_SYNCS else threads(workers)

    concurrent.futures.ThreadPoolExecutor = made  # type: ignore[assignment, misc]


def set_constant(name: str, value: Any) -> None:
    """Set it wherever it is; ends with an error if that is nowhere."""
    if name == "SYNCS_IN_MAIN_THREAD":
        sync_in_main_thread()
        return
    owners = [dosvob, *(owner for owner in vars(dosvob).values() if isinstance(owner, type))]
    found = [owner for owner in owners if name in vars(owner)]
    if not found:
        sys.stderr.write(f"dosvob has no constant {name}\n")
        sys.exit(NO_SUCH_CONSTANT)
    for owner in found:
        setattr(owner, name, value)
    dosvob.AGENT = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value!r}", dosvob.AGENT)


if __name__ == "__main__":
    sys.argv[0] = dosvob.__file__  # which messages name
    for constant, wanted in json.loads(sys.argv[1]).items():
        set_constant(constant, wanted)
    os._exit(dosvob.main(sys.argv[2:]))
