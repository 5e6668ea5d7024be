"""What a long chain of versions costs: `tests/bench --chain` runs it, with `--old DIRECTORY` beside another checkout.

A sparse image of 200 GiB with 100,000 pages of 4 KiB here and there, and 60 versions, each of which has 5,000 of these
as they were. Each checkout makes it in its own format, with the same contents. Measured are the CPU time and the peak
memory of `list`, `verify` and `restore --at` the oldest, as processes. Then what reading through `mount` takes: the
first byte of the oldest, random pages of it, and an image of 1 GiB of noise beside `cat` of it, both from the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

GIB, MIB, PAGE = 1 << 30, 1 << 20, 4096
SIZE, VERSIONS, POOL, CHANGED = 200 * GIB, 60, 100_000, 5_000
BEGUN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
GOALS = {"restore": 0.03, "verify": 0.06, "list": 0.2}  # of the other checkout's CPU time


def data_of(page: int, generation: int) -> bytes:
    """What a page has; the first byte is never zero."""
    return struct.pack(">BQQ", 1, page, generation).ljust(32, b"-") * (PAGE // 32)


def make(backups: Path) -> None:
    """Make the backups, in the format of the dosvob that is imported."""
    import dosvob  # noqa: PLC0415

    chance, paths = random.Random(1), dosvob.ImagePaths(backups, "data")
    paths.versions.mkdir(parents=True)
    pool = chance.sample(range(SIZE // PAGE), POOL)
    generations: dict[int, dict[int, int]] = {}
    for page in pool:
        generations.setdefault(page // 256, {})[page] = 0

    def digest(chunk: int) -> bytes:
        pages = bytearray(dosvob.ZERO_PAGES)
        for page, generation in generations[chunk].items():
            pages[page % 256 * 32 : page % 256 * 32 + 32] = hashlib.sha256(data_of(page, generation)).digest()
        return hashlib.sha256(pages).digest()

    def snapshot(number: int) -> dosvob.Snapshot:
        moment = BEGUN + datetime.timedelta(hours=4 * number)
        return dosvob.Snapshot("volume-1", "data", "fra1", SIZE, moment.strftime("%Y-%m-%dT%H:%M:%SZ"))

    for number in range(VERSIONS):
        older, newer = (dataclasses.asdict(snapshot(number + step)) for step in (0, 1))
        name = snapshot(number).moment(dosvob.utc_now()).strftime(dosvob.Version.TIME)
        head = {"id": f"{number:032x}", "time": name, "snapshot": older, "newer": newer}
        changed: dict[int, list[int]] = {}
        for page in sorted(chance.sample(pool, CHANGED)):
            changed.setdefault(page // 256, []).append(page)
        with dosvob.PatchFile.create(paths.versions / name, "version", head) as file:
            for chunk, pages in changed.items():
                bitmap = sum(1 << page % 256 for page in pages)
                old = b"".join(data_of(page, generations[chunk][page]) for page in pages)
                file.append(dosvob.Patch(chunk, bitmap, bitmap, old, digest(chunk)))
                generations[chunk].update(dict.fromkeys(pages, number + 1))
            file.complete()
    table = bytearray(dosvob.ZERO_DIGEST * (SIZE // MIB))
    with paths.image.open("wb") as image:
        image.truncate(SIZE)
        for chunk in sorted(generations):
            table[chunk * 32 : chunk * 32 + 32] = digest(chunk)
            for page, generation in generations[chunk].items():
                image.seek(page * PAGE)
                image.write(data_of(page, generation))
    paths.state.write_bytes(bytes(4096) + table)
    digests, now = hashlib.sha256(table).hexdigest(), dosvob.utc_now().isoformat()
    identity = dosvob.identity_of(paths.image)
    dosvob.State(snapshot(VERSIONS), now, 0, digests, identity).write(paths.state)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a process took: CPU time and time in seconds, peak memory in bytes."""

    cpu: float
    seconds: float
    memory: int


def cost_of(checkout: Path, backups: Path, *arguments: object) -> Cost:
    """Run a command of a checkout."""
    command = [sys.executable, checkout / "dosvob.py", "--backups", backups, *arguments]
    start = time.monotonic()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - start, usage.ru_maxrss * 1024)


def made(checkout: Path, directory: Path) -> Path:
    """The backups of a checkout."""
    if not directory.exists():
        program = f"import pathlib, bench_chain; bench_chain.make(pathlib.Path({str(directory)!r}))"
        environment = {**os.environ, "PYTHONPATH": f"{checkout}:{Path(__file__).resolve().parent}"}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, cwd=checkout)
    return directory


def measure(arguments: argparse.Namespace) -> str:
    """The table in Markdown."""
    ours, target = Path(__file__).resolve().parent.parent, arguments.directory / "restored"
    checkouts = {"ours": ours, **({"the other": arguments.old.resolve()} if arguments.old else {})}
    oldest = BEGUN.strftime("%Y-%m-%dT%H:%MZ")
    commands = {
        "list": ["list", "--json"],
        "verify": ["verify"],
        "restore": ["restore", "data", target, "--at", oldest],
    }
    costs: dict[str, dict[str, Cost]] = {what: {} for what in commands}
    digests = set()
    for what, command in commands.items():
        for name, checkout in checkouts.items():
            costs[what][name] = cost_of(checkout, made(checkout, arguments.directory / f"chain-{name[-5:]}"), *command)
            print(f"{what}, {name}: {costs[what][name]}", file=sys.stderr)
            if target.exists():
                digests.add(contents_of(target))
                target.unlink()
    assert len(digests) == 1, "the two have restored different contents"
    lines = ["| command | CPU seconds | memory (MB) | the other's | of that | goal |", "|---|---|---|---|---|---|"]
    for what, by in costs.items():
        cost, other = by["ours"], by.get("the other")
        beside = f"{other.cpu:.1f} | {cost.cpu / other.cpu:.3f}" if other else "- | -"
        lines.append(f"| {what} | {cost.cpu:.1f} | {cost.memory / 1e6:.0f} | {beside} | {GOALS[what]} |")
    return "\n".join([*lines, "", measure_mount(arguments.directory)])


def make_noise(backups: Path) -> None:
    """An image of 1 GiB that has no page twice."""
    import dosvob  # noqa: PLC0415

    paths = dosvob.ImagePaths(backups, "noise")
    paths.metadata.mkdir(parents=True)
    table = bytearray()
    with paths.image.open("wb") as image:
        for _ in range(GIB // MIB):
            image.write(chunk := os.urandom(MIB))
            table += dosvob.digest_of(chunk)
        image.flush()
        os.fsync(image.fileno())
    now = dosvob.utc_now().isoformat()
    snapshot = dosvob.Snapshot("volume-2", "noise", "fra1", GIB, now)
    paths.state.write_bytes(bytes(4096) + table)
    digests = hashlib.sha256(table).hexdigest()
    dosvob.State(snapshot, now, 0, digests, dosvob.identity_of(paths.image)).write(paths.state)


def seconds_of_cat(path: Path, *cached: Path) -> float:
    """Seconds to read a file from the disk; what the kernel has of it, and of others, is dropped before."""
    for each in (path, *cached):
        with each.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.monotonic()
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - start


def reads_in_a_second(path: Path, pages: Sequence[int], seconds: float = 5) -> float:
    """How many pages of these can be read in a second, in any order."""
    chance, reads = random.Random(2), 0
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        assert len(os.pread(fd, PAGE, chance.choice(pages) * PAGE)) == PAGE
        reads += 1
    os.close(fd)
    return reads / seconds


def measure_mount(directory: Path) -> str:
    """What reading through `mount` takes, in lines."""
    from mount_support import shown  # noqa: PLC0415

    noise, lines = directory / "chain-noise", []
    if not noise.exists():
        make_noise(noise)
    with shown(directory / "chain-ours", directory / "shown") as mount:
        oldest = mount.path("data", mount.times("data")[-1])
        start = time.monotonic()
        oldest.open("rb").read(1)
        lines.append(f"first byte of the oldest: {time.monotonic() - start:.2f} s (goal 1)")
        pool = random.Random(1).sample(range(SIZE // PAGE), POOL)
        for what, pages in (("with data", pool), ("anywhere", range(SIZE // PAGE))):
            rate = reads_in_a_second(oldest, pages)
            lines.append(f"random pages of the oldest, {what}: {rate:.0f} a second (goal 5000)")
    with shown(noise, directory / "shown") as mount:
        path, image = mount.directory / "noise" / "latest", noise / "noise"
        through = seconds_of_cat(path, image)  # the only time that it is checked
        plain, again = (min(seconds_of_cat(each, image) for _ in range(3)) for each in (image, path))
        lines.append(f"cat of 1 GiB: {plain:.2f} s, through mount {through:.2f} s: {plain / through:.2f} x (goal 0.5)")
        lines.append(f"the same once more, which checks nothing again: {plain / again:.2f} x")
    with shown(noise, directory / "shown") as mount:
        for what in ("as they are checked first", "when they were"):
            rate = reads_in_a_second(mount.directory / "noise" / "latest", range(GIB // PAGE))
            lines.append(f"random pages of 1 GiB of noise, {what}: {rate:.0f} a second")
    return "\n".join(f"- {line}" for line in lines)


def contents_of(path: Path) -> str:
    """The SHA-256 of its data, without holes."""
    found, offset = hashlib.sha256(), 0
    with path.open("rb") as file:
        while True:
            try:
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                return found.hexdigest()
            data = os.pread(file.fileno(), PAGE, offset)
            found.update(struct.pack(">Q", offset) + data if data.strip(b"\0") else b"")
            offset += PAGE


if __name__ == "__main__":
    print(json.dumps({"made": str(made(Path(sys.argv[1]), Path(sys.argv[2])))}))
