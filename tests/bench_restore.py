"""How fast a restore into a new volume is, against what people do without it. `tests/bench --restore` runs it.

The volume of the other measurements is sent over real OpenSSH to a file that stands for the throwaway volume, made
durable, read back and compared:

  empty      the volume has nothing yet
  scattered  it has what was there before 5,000 random pages of 4 KiB changed
  piece      it has what was there before 205 MB changed in one piece

Beside it, in turns with it, `zstd -1 | ssh 'zstd -d | dd conv=sparse,fsync'`, which compares nothing; or with `--old
DIRECTORY` another checkout of dosvob, which fills an empty volume.
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

L2_GOAL = 1.15  # of what zlib leaves over the link's rate, and 5 seconds more


CELLS = {"empty": ("", "base"), "scattered": ("base", "scattered"), "piece": ("scattered", "piece")}
"""What the volume has, and what it is to have."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One restore: seconds, bytes sent, peak memory here and on the droplet."""

    seconds: float
    sent: int
    memory: int
    agent_memory: int


def begin(target: Path, size: int, before: Path | None) -> None:
    """A volume that is new, or has what was there before."""
    target.unlink(missing_ok=True)
    if before is not None:
        bench.copy(before, target)
    else:
        with target.open("wb") as file:
            file.truncate(size)
    subprocess.run(["sync", target], check=True)


def restore_once(
    link: bench.Link, source: Path, target: Path, before: Path | None = None, script: Path = Path(__file__)
) -> Measurement:
    """Restore in a process of its own, so that its memory can be measured; what was restored must be the source."""
    begin(target, source.stat().st_size, before)
    arguments = [json.dumps(dataclasses.asdict(link), default=str), str(source), str(target)]
    watcher = bench.AgentWatcher()
    with watcher:
        command = [sys.executable, str(script), *arguments, *(["by its difference"] if before else [])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    bench.check_equal(source, target)
    told = json.loads(done.stdout.splitlines()[-1])
    return Measurement(told["seconds"], told["sent"], told["memory"], watcher.peak)


def restore_here(link: bench.Link, source: Path, target: Path, *, is_empty: bool) -> None:
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
        push = dosvob.Push(contents.chunks, contents.size // bench.MIB, digests, print, is_empty=is_empty)
        dosvob.converse(
            lambda: way.start_agent(push.program(str(target))), push, print, lambda _: None, lambda _: False
        )
        seconds = time.monotonic() - start
    memory = bench.peak_memory(Path("/proc/self"))
    print(json.dumps({"seconds": seconds, "sent": sent.bytes, "memory": memory}))


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
    begin(target, source.stat().st_size, None)
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
    data, target = bench.make_data(arguments.directory, arguments.gib), arguments.directory / "restored"
    heads = ("link", "what", "seconds", "MB sent", "memory here, droplet (MB)", "all of it, by others", "of that")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in arguments.links if arguments.link else ["L0"]:
        cells = {cell: CELLS[cell] for cell in arguments.cells if cell in CELLS} or CELLS
        runs: dict[str, list[Measurement]] = {cell: [] for cell in cells}
        others: list[float] = []
        emulated = arguments.link and bench.emulated(name, arguments.link, keys)
        with emulated or contextlib.nullcontext(here) as link:
            for _ in range(arguments.rounds):
                for cell, (before, after) in cells.items():
                    runs[cell].append(restore_once(link, data[after], target, data.get(before)))
                    print(f"{name} {cell}: {runs[cell][-1]}", file=sys.stderr)
                if arguments.old:
                    script = arguments.old / "tests" / "bench_restore.py"
                    others.append(restore_once(link, data["base"], target, script=script).seconds)
                elif name != "L2":  # which takes a quarter of an hour
                    others.append(reference(link, data["base"], target))
                print(f"{name}, all of it, by others: {others[-1:]}", file=sys.stderr)
        if not others:  # the goal stands for them
            others.append(L2_GOAL * packed_size(data["base"]) / (bench.LINKS[name][2] * 125_000) + 5)
        lines += [line(name, cell, measured, statistics.median(others)) for cell, measured in runs.items()]
    target.unlink()
    return "\n".join(lines)


def line(link: str, cell: str, runs: list[Measurement], beside: float) -> str:
    """A line of the table."""
    seconds, sent = (statistics.median(getattr(run, what) for run in runs) for what in ("seconds", "sent"))
    memory = f"{max(run.memory for run in runs) / 1e6:.0f}, {max(run.agent_memory for run in runs) / 1e6:.0f}"
    return f"| {link} | {cell} | {seconds:.1f} | {sent / 1e6:.0f} | {memory} | {beside:.1f} | {seconds / beside:.3f} |"


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    fields["directory"] = Path(fields["directory"])
    restore_here(bench.Link(**fields), Path(sys.argv[2]), Path(sys.argv[3]), is_empty=len(sys.argv) < 5)
