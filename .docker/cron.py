# ruff: noqa: INP001 - a script
"""The container's first process: a cron that runs as whoever owns backups/, with no privileges.

    python cron.py           run what `crontab` says, beginning with its first line right away
    python cron.py health    fail if a backup is older than the schedule allows
    python cron.py …         dosvob.py with these words, as whoever owns backups/; so does `python dosvob.py …` here

The crons of Debian must stay root to run jobs, keep their output for a mail, and do not pass signals on. This one gives
the jobs its own output, runs one at a time, and when it is told to stop passes that on and waits for the job's end.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
import signal
import sys
import time
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPT = "lib/dosvob.py"  # which `python dosvob.py` begins by way of this file
CRONTAB = Path("crontab")
BACKUPS = Path("backups")
HOUR, DAY = 60, 24 * 60  # minutes
RUN_TIME = 2 * HOUR  # what a run may take before the health check minds
MOST_MISSED = DAY  # how far back a job is made up for that was due while the machine slept
LOOK_AHEAD = 17 * 366  # days; within them is even 29 February twice
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
FIELDS = (
    # name, lowest and highest value, names from the lowest value on
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 7, WEEKDAYS),
)
NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


class Unusable(Exception):
    """The crontab or the environment is wrong; the message says how."""


def log(text: str) -> None:
    """A line of the log, with the time in UTC as dosvob.py writes it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    sys.stdout.write(f"{now} {text}\n")
    sys.stdout.flush()


# ── The schedule ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Job:
    """A line of the crontab: on which days, at which minutes of the day, what."""

    times: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool  # a day of the month or of the week will do, as cron has it when neither field begins with *
    command: str

    @property
    def is_hourly(self) -> bool:
        """Whether it is due in every hour: then a clock that is set forward or back is no matter of it."""
        return len({minutes // HOUR for minutes in self.times}) == DAY // HOUR

    def is_on(self, date: datetime.date) -> bool:
        """Whether it is due on a day."""
        day, weekday = date.day in self.days, date.isoweekday() % 7 in self.weekdays
        return date.month in self.months and (day or weekday if self.either_day else day and weekday)

    def is_due(self, minute: int, zone: zoneinfo.ZoneInfo) -> bool:
        """Whether it is due in a minute of the Epoch, by the clock of a zone.

        As with cron, what the clock skips when it is set forward is due right after that, and what comes twice when it
        is set back is due once; but for what is due in every hour, which goes on as if nothing were.
        """
        before, now = (datetime.datetime.fromtimestamp(number * 60, zone) for number in (minute - 1, minute))
        clock = now.replace(tzinfo=None)
        if self.is_hourly:
            return self._is_on_clock(clock)
        jump = (clock - before.replace(tzinfo=None)) // datetime.timedelta(minutes=1)
        skipped = (clock - datetime.timedelta(minutes=number) for number in range(1, jump))
        return (not now.fold and self._is_on_clock(clock)) or any(map(self._is_on_clock, skipped))

    def _is_on_clock(self, clock: datetime.datetime) -> bool:
        return clock.hour * HOUR + clock.minute in self.times and self.is_on(clock.date())

    def days_from(self, date: datetime.date) -> Iterator[datetime.date]:
        """The days on which it is due, for some years."""
        return (day for day in (date + datetime.timedelta(days=n) for n in range(LOOK_AHEAD)) if self.is_on(day))

    def next_after(self, minute: int, zone: zoneinfo.ZoneInfo) -> int:
        """The minute of the Epoch in which it is due next."""
        for date in self.days_from(datetime.datetime.fromtimestamp(minute * 60, zone).date()):
            midnight = int(datetime.datetime.combine(date, datetime.time(), zone).timestamp()) // 60
            for candidate in range(max(midnight, minute + 1), midnight + DAY + 2 * HOUR):  # clocks may be set back
                if self.is_due(candidate, zone):
                    return candidate
        raise Unusable(f"{CRONTAB}: {self.command!r} is never due")

    def longest_pause(self, date: datetime.date) -> int:
        """The most minutes between two times at which it is due."""
        times = sorted(self.times)
        days = list(self.days_from(date))
        within = (later - earlier for earlier, later in itertools.pairwise(times))
        between = ((later - earlier).days * DAY + times[0] - times[-1] for earlier, later in itertools.pairwise(days))
        return max((*within, *between))


def read_crontab(path: Path) -> list[Job]:
    """The jobs of a crontab."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise Unusable(f"cannot read {path}: {problem}") from None
    jobs = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                jobs.append(parse_job(line.strip()))
            except ValueError as problem:
                raise Unusable(f"{path}, line {number}: {problem}: {line.strip()}") from None
    if not jobs:
        raise Unusable(f"{path} has no line that says when to run what")
    return jobs


def parse_job(line: str) -> Job:
    """A job from its line; raises ValueError."""
    if re.match(r"\w+\s*=", line):
        raise ValueError("variables are set in docker-compose.yml, not here")
    nickname, *command = line.split(maxsplit=1)
    if nickname.startswith("@"):
        if nickname not in NICKNAMES:
            raise ValueError(f"{nickname} is unknown; there are {', '.join(NICKNAMES)}")
        line = " ".join((NICKNAMES[nickname], *command))
    parts = line.split(maxsplit=len(FIELDS))
    if len(parts) <= len(FIELDS):
        raise ValueError("needs five fields and a command")
    minutes, hours, days, months, weekdays = (
        parse_field(text, *field) for text, field in zip(parts, FIELDS, strict=False)
    )
    job = Job(
        times=frozenset(hour * HOUR + minute for hour in hours for minute in minutes),
        days=days,
        months=months,
        weekdays=frozenset(weekday % 7 for weekday in weekdays),
        either_day=not parts[2].startswith("*") and not parts[4].startswith("*"),
        command=parts[5],
    )
    if next(job.days_from(datetime.datetime.now(datetime.UTC).date()), None) is None:
        raise ValueError("there is no such day")
    return job


def parse_field(text: str, name: str, lowest: int, highest: int, names: tuple[str, ...]) -> frozenset[int]:
    """The values of a field, such as `*/4`, `1-5`, `mon,thu`; raises ValueError."""

    def value(word: str) -> int:
        number = lowest + names.index(word.lower()) if word.lower() in names else int(word)
        if not lowest <= number <= highest:
            raise ValueError
        return number

    values: set[int] = set()
    try:
        for part in text.split(","):
            span, has_step, step = part.partition("/")
            first, has_last, last = span.partition("-")
            start = lowest if span == "*" else value(first)
            single = span != "*" and not has_last and not has_step
            end = value(last) if has_last else start if single else highest
            found = range(start, end + 1, int(step) if has_step else 1)
            if not found:
                raise ValueError
            values.update(found)
    except ValueError:
        raise ValueError(f"{text!r} is no {name} ({lowest} to {highest})") from None
    return frozenset(values)


def time_zone() -> zoneinfo.ZoneInfo:
    """The time zone of the schedule."""
    name = os.environ.get("TZ") or "UTC"
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise Unusable(f"TZ is {name!r}: there is no such time zone; write it like Europe/Berlin") from None


# ── The daemon ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Cron:
    """Runs jobs when they are due, one at a time, until it is told to stop.

    All that happens reaches it as a signal or as the end of a minute, for which it waits in one place.
    """

    def __init__(self, jobs: list[Job], zone: zoneinfo.ZoneInfo) -> None:
        self._jobs = jobs
        self._zone = zone
        self._waiting = jobs[:1]
        self._running: Job | None = None
        self._pid = 0
        self._stopping = False
        self._minute = int(time.time()) // 60  # up to which the jobs that were due are known

    def run(self) -> None:
        """Until a signal, and then until the job that runs has ended."""
        while self._running or not self._stopping:
            if self._waiting and not self._running and not self._stopping:
                self._start(self._waiting.pop(0))
            happened = signal.sigtimedwait((signal.SIGCHLD, *STOP), 60 - time.time() % 60)
            if happened is not None and happened.si_signo in STOP:
                self._stop(signal.Signals(happened.si_signo))
            self._reap()
            self._look_at_the_clock()

    def _start(self, job: Job) -> None:
        log(f"cron: running {job.command}")
        self._running = job
        self._pid = os.posix_spawn(
            "/bin/sh",
            ("sh", "-c", job.command),
            os.environ,
            setpgroup=0,  # so that a signal reaches all of it
            setsigmask=(),
            setsigdef=(signal.SIGINT, signal.SIGPIPE),
        )

    def _stop(self, number: signal.Signals) -> None:
        log(f"cron: {number.name}, stopping" + " as soon as the run has ended" * bool(self._running))
        self._stopping = True
        if self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGTERM)

    def _reap(self) -> None:
        """Take note of what has ended; a job has when all of its processes have."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._pid and self._running:
                    code = os.waitstatus_to_exitcode(status)
                    log(f"cron: {self._running.command} ended with exit code {code if code >= 0 else 128 - code}")
        except ChildProcessError:
            if self._running and not self._stopping:
                log(f"cron: next at {self._next().isoformat(timespec='minutes')}")
            self._running = None

    def _next(self) -> datetime.datetime:
        now = int(time.time()) // 60
        return datetime.datetime.fromtimestamp(
            min(job.next_after(now, self._zone) for job in self._jobs) * 60, self._zone
        )

    def _look_at_the_clock(self) -> None:
        """Queue what has become due since the last look."""
        now = int(time.time()) // 60
        for minute in range(max(self._minute + 1, now - MOST_MISSED), now + 1):
            for job in self._jobs:
                if job.is_due(minute, self._zone):
                    self._queue(job)
        self._minute = now

    def _queue(self, job: Job) -> None:
        if job == self._running:
            log(f"cron: {job.command} is due and still runs: left out")
        elif job not in self._waiting:
            self._waiting.append(job)


def become_owner() -> None:
    """Give up root, which is not needed any more, to be whoever OWNER says or whoever owns the backups."""
    if os.getuid() != 0:
        return
    status = BACKUPS.stat()
    owner = os.environ.get("OWNER") or f"{status.st_uid}:{status.st_gid}"
    match = re.fullmatch(r"(\d+)(?::(\d+))?", owner)
    if match is None:
        raise Unusable(f"OWNER is {owner!r}: write it as numbers, uid:gid, such as 1000:1000")
    uid, gid = int(match[1]), int(match[2] or match[1])
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def idle(problem: Unusable) -> None:
    """Stay up with nothing to do: to end would be to be started again, and again."""
    log(f"error: {problem}. Nothing will be backed up: put that right, and start the container anew")
    signal.sigwait(STOP)


def serve() -> None:
    """Be the container's first process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD, *STOP))
    try:
        become_owner()
        jobs, zone = read_crontab(CRONTAB), time_zone()
    except Unusable as problem:
        idle(problem)
    else:
        Cron(jobs, zone).run()


def check_health() -> None:
    """Become `dosvob.py health`, with a limit that lets one run fail and the next one take its time."""
    become_owner()
    pause = read_crontab(CRONTAB)[0].longest_pause(datetime.datetime.now(time_zone()).date())
    hours = (2 * pause + RUN_TIME) / HOUR
    run_script("health", "--max-age", f"{hours:.2f}")


def run_script(*words: str) -> None:
    """Become `dosvob.py` with these words, as the owner."""
    become_owner()
    os.execv(sys.executable, (sys.executable, SCRIPT, *words))  # noqa: S606


def main(called: str, *words: str) -> None:
    """Do what was asked for, by the name that this file was called by and the words behind it."""
    try:
        if Path(called).name == "dosvob.py" or words not in ((), ("health",)):
            run_script(*words)
        elif words:
            check_health()
        else:
            serve()
    except Unusable as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main(*sys.argv)
