"""How fast a restore into a new volume is, against what people do without it. `tests/bench --restore` runs it.

The volume of the other measurements is written over real OpenSSH into a file that stands for the new volume, made
durable, and read back. Beside it, in turns with it, `zstd -1 | ssh 'zstd -d | dd conv=sparse,fsync'`, which compares
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench
import paramiko

import dosvob

GOAL = 1.3  # of the time that the reference takes
L2_GOAL = 1.15  # of what zlib leaves over the link's rate, and 5 seconds more


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One restore: seconds, those of them until all was durable, bytes sent, peak memory here and on the droplet."""

    seconds: float
    written: float
    sent: int
    memory: int
    agent_memory: int


def empty(target: Path, size: int) -> None:
    """A new volume."""
    target.unlink(missing_ok=True)
    with target.open("wb") as file:
        file.truncate(size)


def restore_once(link: bench.Link, source: Path, target: Path) -> Measurement:
    """Restore in a process of its own, so that its memory can be measured; what was restored must be the source."""
    empty(target, source.stat().st_size)
    command = [sys.executable, __file__, json.dumps(dataclasses.asdict(link), default=str), str(source), str(target)]
    watcher = bench.AgentWatcher()
    with watcher:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    bench.check_equal(source, target)
    return Measurement(agent_memory=watcher.peak, **json.loads(done.stdout.splitlines()[-1]))


def restore_here(link: bench.Link, source: Path, target: Path) -> None:
    """What the process of its own does; prints what it measured."""
    dosvob.SSH_PORT = link.port
    keys = dosvob.RunKeys(
        paramiko.Ed25519Key.from_private_key_file(str(link.directory / "id")),  # type: ignore[arg-type]
        paramiko.Ed25519Key.from_private_key_file(str(link.directory / "hostkey")),  # type: ignore[arg-type]
    )
    sent = CountedSends()
    with contextlib.ExitStack() as stack:
        way = stack.enter_context(contextlib.closing(dosvob.Link(link.address, keys, dosvob.Stop())))
        contents = stack.enter_context(dosvob.Source.of_file(source))
        digests = stack.enter_context(tempfile.TemporaryFile())
        way.open(60)  # as a run does it while the volume is being made
        start = time.monotonic()
        upload = dosvob.Upload(contents.chunks(), contents.size // bench.MIB, digests.write)
        writer = dosvob.receiver_source(str(target), 0, dosvob.WINDOW)
        dosvob.converse(lambda _: way.start_agent(writer), dosvob.Sending, upload, print, ignore, lambda _: False)
        written = time.monotonic() - start
        comparison = dosvob.Comparison(contents.size // bench.MIB, digests)
        reader = dosvob.agent_source(str(target), 0, dosvob.WINDOW)
        dosvob.converse(lambda _: way.start_agent(reader), dosvob.ReadBack, comparison, print, ignore, lambda _: False)
        seconds = time.monotonic() - start
    if comparison.differing:
        sys.exit("what was read back is not what was written")
    memory = bench.peak_memory(Path("/proc/self"))
    print(json.dumps({"seconds": seconds, "written": written, "sent": sent.bytes, "memory": memory}))


def ignore(_received: int) -> None:
    """How far it is, nobody asks."""


class CountedSends:
    """Counts what is sent to agents."""

    def __init__(self) -> None:
        self.bytes = 0
        original = dosvob.AgentStream.send

        def send(stream: dosvob.AgentStream, data: bytes) -> None:
            self.bytes += len(data)
            original(stream, data)

        dosvob.AgentStream.send = send  # type: ignore[assignment,method-assign]


def reference(link: bench.Link, source: Path, target: Path) -> float:
    """Seconds for what people do without it."""
    empty(target, source.stat().st_size)
    there = f"zstd -d | dd of={shlex.quote(str(target))} bs=1M iflag=fullblock conv=sparse,fsync,notrunc status=none"
    start = time.monotonic()
    with subprocess.Popen(["zstd", "-1", "-q", "-c", source], stdout=subprocess.PIPE) as packing:
        subprocess.run([*link.ssh(), f"root@{link.address}", there], stdin=packing.stdout, check=True)
    seconds = time.monotonic() - start
    bench.check_equal(source, target)
    return seconds


def packed_size(path: Path) -> int:
    """What zlib's level 1 leaves of it."""
    with path.open("rb") as file:
        chunks = iter(lambda: file.read(bench.MIB), b"")
        return sum(len(zlib.compress(chunk, 1)) for chunk in chunks if chunk != bytes(bench.MIB))


def measure(arguments: argparse.Namespace, keys: Path, here: bench.Link) -> str:
    """The table in Markdown."""
    source = bench.make_data(arguments.directory, arguments.gib)["base"]
    target = arguments.directory / "restored"
    heads = ("link", "seconds", "goal", "of the goal", "until durable", "MB sent", "memory here, droplet (MB)", "zstd")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in arguments.links if arguments.link else ["L0"]:
        runs: list[Measurement] = []
        references: list[float] = []
        emulated = arguments.link and bench.emulated(name, arguments.link, keys)
        with emulated or contextlib.nullcontext(here) as link:
            for _ in range(arguments.rounds):
                runs.append(restore_once(link, source, target))
                if name != "L2":  # which takes a quarter of an hour
                    references.append(reference(link, source, target))
        beside = statistics.median(references) if references else 0.0
        goal = GOAL * beside if beside else L2_GOAL * packed_size(source) / (bench.LINKS[name][2] * 125_000) + 5
        seconds = statistics.median(run.seconds for run in runs)
        lines.append(
            f"| {name} | {seconds:.1f} | {goal:.1f} | {seconds / goal:.2f} "
            f"| {statistics.median(run.written for run in runs):.1f} "
            f"| {statistics.median(run.sent for run in runs) / 1e6:.0f} "
            f"| {max(run.memory for run in runs) / 1e6:.0f}, {max(run.agent_memory for run in runs) / 1e6:.0f} "
            f"| {f'{beside:.1f}' if beside else ''} |"
        )
    target.unlink()
    return "\n".join(lines)


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    fields["directory"] = Path(fields["directory"])
    restore_here(bench.Link(**fields), Path(sys.argv[2]), Path(sys.argv[3]))
