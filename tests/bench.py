"""How fast a sync is, against what the machine and the link allow. Run it as `tests/bench`; `--help` says how.

A volume of 4 GiB (1 GiB random, 1 GiB compressible text, 2 GiB zeros) is synced over real OpenSSH:

  S1  the first sync                S3  5,000 random pages of 4 KiB changed
  S2  nothing changed               S4  205 MB changed in one piece, half of it compressible

Two references are measured beside it: H, one thread that reads the volume once in 1 MiB reads with SHA-256, on the
droplet's side; and C, `ssh cat` of the non-zero data alone. Each goal is a ratio to these, in the same run, of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paramiko
from simulator import Behaviour, Simulator

import dosvob

MIB, GIB = 1 << 20, 1 << 30
SIZE = 4 * GIB
PAGES_CHANGED = 5000
PIECE = 205_000_000 // MIB * MIB
LINKS = {  # name: (round trip in ms, Mbit/s down, Mbit/s up), 0 for no limit
    "L0": (0, 0, 0),
    "L1": (20, 1000, 1000),
    "L2": (40, 100, 20),
    "80 ms": (80, 1000, 1000),
    "200 ms": (200, 1000, 1000),
}
SCENARIOS = {"L0": "S1 S2 S3 S4", "L1": "S1 S2 S3 S4", "L2": "S1 S2 S3 S4", "80 ms": "S1", "200 ms": "S1"}


# ── The data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(length: int, seed: int) -> bytes:
    """Text that compresses about as well as text does."""
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 11))) for _ in range(20000)]
    out = bytearray()
    while len(out) < length:
        out += " ".join(source.choices(words, k=5000)).encode() + b"\n"
    return bytes(out[:length])


@dataclass(frozen=True)
class Data:
    """The contents that a volume has in turn, and how many bytes zlib's level 1 leaves of what crosses the link."""

    base: Path
    scattered: Path
    piece: Path
    base_packed: int
    piece_packed: int


def make_data(directory: Path) -> Data:
    """Make the three contents, once per directory."""
    paths = [directory / name for name in ("base", "scattered", "piece")]
    facts = directory / "facts.json"
    if not facts.exists():
        base_packed = make_base(paths[0])
        make_scattered(paths[0], paths[1])
        piece_packed = make_piece(paths[1], paths[2])
        facts.write_text(json.dumps([base_packed, piece_packed]))
    base_packed, piece_packed = json.loads(facts.read_text())
    return Data(paths[0], paths[1], paths[2], base_packed, piece_packed)


def make_base(path: Path) -> int:
    """The volume as it is first, with its zeros between the rest."""
    packed = 0
    with path.open("wb") as file:
        file.truncate(SIZE)
        for mib in range(GIB // MIB):
            for quarter, data in ((0, os.urandom(MIB)), (2, text(MIB, mib % 50))):
                file.seek(quarter * GIB + mib * MIB)
                file.write(data)
                packed += len(zlib.compress(data, 1))
    return packed


def make_scattered(source: Path, path: Path) -> None:
    """The same with random pages changed."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, path], check=True)
    with path.open("r+b") as file:
        for page in random.Random(3).sample(range(SIZE // 4096), PAGES_CHANGED):
            file.seek(page * 4096)
            file.write(os.urandom(4096))


def make_piece(source: Path, path: Path) -> int:
    """The same with a piece changed, half of it compressible."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, path], check=True)
    half = PIECE // 2 // MIB * MIB
    data = os.urandom(half) + text(PIECE - half, 99)
    with path.open("r+b") as file:
        file.seek(GIB // 2 + 12 * MIB)
        file.write(data)
    return sum(len(zlib.compress(data[start : start + MIB], 1)) for start in range(0, len(data), MIB))


# ── The link and the two references ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Link:
    """A link that is up: how to reach the droplet's side by SSH, and how to run a command there."""

    name: str
    address: str
    port: int
    directory: Path  # with the keys `id` and `hostkey`
    there: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Bytes per second from the droplet, infinite for no limit."""
        megabits = LINKS[self.name][1]
        return megabits * 125_000 or float("inf")

    def ssh(self) -> list[str]:
        """The ssh command."""
        return [
            *("ssh", "-F", "none", "-p", str(self.port), "-i", str(self.directory / "id"), "-o", "BatchMode=yes"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
            f"root@{self.address}",
        ]


@contextlib.contextmanager
def emulated(name: str, script: Path, directory: Path) -> Iterator[Link]:
    """A link made by a script that is called `up RTT_MS DOWN_MBIT UP_MBIT`, and `down`."""
    settings = {"CC": os.environ.get("CC", "bbr"), "BENCH": str(directory), "SSHD_EXTRA": "SetEnv PATH=/usr/bin:/bin"}
    environment = {**os.environ, **settings}
    subprocess.run([script, "up", *map(str, LINKS[name])], env=environment, check=True, stdout=subprocess.DEVNULL)
    there = ("ip", "netns", "exec", "droplet")
    first_packets = f"ip route change $(ip route show 10.77.0.0/30) initcwnd {dosvob.FIRST_PACKETS}"
    for command in (*dosvob.USER_DATA_COMMANDS, first_packets):  # as cloud-init does it on a droplet
        if "tcp_wmem" in command or command == first_packets:
            subprocess.run([*there, "sh", "-c", command], check=True, stdout=subprocess.DEVNULL)
    try:
        yield Link(name, "10.77.0.2", 22, directory, there)
    finally:
        subprocess.run([script, "down"], env=environment, check=True)


@contextlib.contextmanager
def loopback(name: str, directory: Path) -> Iterator[Link]:
    """No link at all: an sshd on this machine."""
    port = 22022
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("id", "hostkey"):
        if not (directory / key).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
    shutil.copy(directory / "id.pub", directory / "authorized_keys")
    options = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": directory / "hostkey",
        "AuthorizedKeysFile": directory / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "SetEnv": "PATH=/usr/bin:/bin",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", "/dev/null", *words])
    try:
        link = Link(name, "127.0.0.1", port, directory, ())
        while subprocess.run([*link.ssh(), "true"], check=False, stderr=subprocess.DEVNULL).returncode:
            time.sleep(0.1)
        yield link
    finally:
        server.terminate()
        server.wait()


def reference_h(link: Link, path: Path) -> float:
    """Seconds to read and hash the volume with one thread."""
    program = (
        "import hashlib,sys\nf=open(sys.argv[1],'rb',buffering=0)\nh=hashlib.sha256()\n"
        "while b:=f.read(1<<20): h.update(b)\n"
    )
    start = time.monotonic()
    subprocess.run([*link.there, "/usr/bin/python3", "-c", program, path], check=True)
    return time.monotonic() - start


def reference_c(link: Link, path: Path, directory: Path) -> float:
    """Seconds for `ssh cat` of the two GiB that are not zeros."""
    start = time.monotonic()
    with (directory / "cat").open("wb") as out:
        command = f"dd if={path} bs=1M count=1024 status=none; dd if={path} bs=1M count=1024 skip=2048 status=none"
        subprocess.run([*link.ssh(), command], stdout=out, check=True)
    seconds = time.monotonic() - start
    (directory / "cat").unlink()
    return seconds


# ── One sync ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measurement:
    """One sync: seconds, bytes received, peak memory here and on the droplet, bytes read and written by calls."""

    seconds: float
    received: int
    memory: int
    agent_memory: int
    read: int
    written: int


def sync_once(link: Link, source: Path, backups: Path, size: int = SIZE, *, keep: bool = True) -> Measurement:
    """Sync in a process of its own, so that its memory can be measured."""
    command = [sys.executable, __file__, "--one", json.dumps(dataclasses.asdict(link), default=str)]
    watcher = AgentWatcher()
    with watcher:
        done = subprocess.run(
            [*command, str(source), str(backups), str(size), "keep" if keep else "none"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    return Measurement(agent_memory=watcher.peak, **json.loads(done.stdout.splitlines()[-1]))


class AgentWatcher(threading.Thread):
    """Watches the peak memory (bytes) of agents on this machine."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()

    def __enter__(self) -> AgentWatcher:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        """Look now and then; the kernel keeps the peak."""
        while not self._done.wait(0.2):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if b"exec(sys.stdin.buffer.read" in (process / "cmdline").read_bytes():
                        self.peak = max(self.peak, peak_memory(process))


def sync_here(link: Link, source: Path, backups: Path, size: int, keep: dosvob.Keep) -> None:
    """What the process of its own does; prints what it measured."""
    dosvob.SSH_PORT = link.port
    keys = dosvob.RunKeys(
        paramiko.Ed25519Key.from_private_key_file(str(link.directory / "id")),  # type: ignore[arg-type]
        paramiko.Ed25519Key.from_private_key_file(str(link.directory / "hostkey")),  # type: ignore[arg-type]
    )
    report = dosvob.Reporter(quiet=True)
    paths = dosvob.ImagePaths(backups, "bench")
    paths.metadata.mkdir(parents=True, exist_ok=True)
    snapshot = dosvob.Snapshot("id", "bench", "fra1", size, "2026-01-01T00:00:00Z")

    def start_agent(first: int, window: int) -> dosvob.AgentStream:
        return way.start_agent(dosvob.agent_source(str(source), first, window))

    read_before, written_before = bytes_moved("rchar"), bytes_moved("wchar")
    with contextlib.closing(dosvob.Link(link.address, keys, dosvob.Stop())) as way:
        way.open(60)  # as a run does it while the clone is being made
        start = time.monotonic()
        with contextlib.closing(dosvob.Update(paths, snapshot, keep, report.warn)) as update:
            received = dosvob.sync_device(start_agent, update, report.warn, lambda received: None)
            update.finish()
        seconds = time.monotonic() - start
    memory = peak_memory(Path("/proc/self"))
    moved = {"read": bytes_moved("rchar") - read_before, "written": bytes_moved("wchar") - written_before}
    print(json.dumps({"seconds": seconds, "received": received, "memory": memory, **moved}))


def peak_memory(process: Path) -> int:
    """The most memory that a process has had (bytes); what rusage tells counts the parent's as well."""
    lines = (process / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def bytes_moved(field: str) -> int:
    """Bytes that this process has read (rchar) or written (wchar) by calls, of files and sockets."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields[field])


# ── The runs and the table ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    """What was measured on a link in one repetition, by the scenario's or the reference's name."""

    link: str
    values: dict[str, list[Measurement | float]]


def run_link(link: Link, data: Data, directory: Path, repetitions: int) -> Row:
    """All scenarios of a link, so many times."""
    row = Row(link.name, {})
    backups = directory / "backups"
    sources = {"S1": data.base, "S2": data.base, "S3": data.scattered, "S4": data.piece}
    for repetition in range(repetitions):
        shutil.rmtree(backups, ignore_errors=True)
        subprocess.run(["cat", *sources.values()], stdout=subprocess.DEVNULL, check=True)  # into the page cache
        note(row, "H", reference_h(link, data.base))
        if link.name == "L0":
            note(row, "C", reference_c(link, data.base, directory))
        for scenario in SCENARIOS[link.name].split():
            note(row, scenario, sync_once(link, sources[scenario], backups))
            check_equal(sources[scenario], backups / "bench")
        print(f"{link.name}: repetition {repetition + 1} of {repetitions} done", file=sys.stderr)
    return row


def note(row: Row, name: str, value: Measurement | float) -> None:
    """Keep a value."""
    row.values.setdefault(name, []).append(value)


def check_equal(source: Path, image: Path) -> None:
    """The image must be the volume, or the figures mean nothing."""
    subprocess.run(["cmp", source, image], check=True)


def median(values: list[Measurement | float]) -> float:
    """The median of the seconds."""
    return statistics.median(value.seconds if isinstance(value, Measurement) else value for value in values)


def limit_of(scenario: str, row: Row, link: Link, data: Data, rows: dict[str, Row]) -> float:
    """The seconds that the goal allows."""
    h = median(row.values["H"])
    later = {
        "S2": 1.25 * h + 1,
        "S3": 1.4 * h + 1 + PAGES_CHANGED * 4096 / link.rate,
        "S4": max(h, data.piece_packed / link.rate) * 1.2 + 1,
    }
    return later.get(scenario) or first_limit(row, link, data, rows)


def first_limit(row: Row, link: Link, data: Data, rows: dict[str, Row]) -> float:
    """The same for the first sync."""
    if link.name == "L0":
        return 1.3 * median(row.values["C"])
    if link.name == "L2":
        return 1.1 * data.base_packed / link.rate
    if link.name in ("80 ms", "200 ms") and "L1" in rows:
        return median(rows["L1"].values["S1"]) * (1.05 if link.name == "80 ms" else 1.15)
    return 1.05 * 2 * GIB / link.rate + 1


def table(rows: dict[str, Row], links: dict[str, Link], data: Data) -> str:
    """The table in Markdown."""
    heads = ("link", "what", "seconds", "goal", "of the goal", "MB received", "memory here, droplet (MB)", "H")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        for scenario, values in row.values.items():
            measured = [value for value in values if isinstance(value, Measurement)]
            if not measured:
                continue
            seconds, limit = median(values), limit_of(scenario, row, links[name], data, rows)
            received = statistics.median(value.received for value in measured) / 1e6
            memory = f"{max(v.memory for v in measured) / 1e6:.0f}, {max(v.agent_memory for v in measured) / 1e6:.0f}"
            lines.append(
                f"| {name} | {scenario} | {seconds:.1f} | {limit:.1f} | {seconds / limit:.2f} | {received:.2f} | "
                f"{memory} | {median(row.values['H']):.1f} |"
            )
    if "L0" in rows:
        lines.append(
            f"\nC (`ssh cat` of the 2 GiB that are not zeros, no limit on the link): "
            f"{median(rows['L0'].values['C']):.1f} s"
        )
    return "\n".join(lines)


def versions_table(link: Link, data: Data, directory: Path, repetitions: int) -> str:
    """What keeping a version costs a sync of a change in one piece (S4), in turns with one that keeps none."""
    backups = directory / "backups"
    runs: dict[bool, list[Measurement]] = {True: [], False: []}
    for _ in range(repetitions):
        for keep in (False, True):
            shutil.rmtree(backups, ignore_errors=True)
            sync_once(link, data.scattered, backups)
            runs[keep].append(sync_once(link, data.piece, backups, keep=keep))
    lines = ["| 205 MB changed | seconds | MB read | MB written |", "|---|---|---|---|"]
    for keep, name in ((False, "without versions"), (True, "with a version")):
        figures = [
            statistics.median(getattr(run, what) for run in runs[keep]) for what in ("seconds", "read", "written")
        ]
        lines.append(f"| {name} | {figures[0]:.1f} | {figures[1] / 1e6:.0f} | {figures[2] / 1e6:.0f} |")
    return "\n".join(lines)


def memory_table(link: Link, directory: Path) -> str:
    """Peak memory over volumes of several sizes; ends the benchmark if it is not the same, or more than the goal."""
    lines = ["| volume | memory here (MB) | on the droplet (MB) |", "|---|---|---|"]
    runs = []
    for gib in (1, 4, 16):
        source = directory / f"sparse-{gib}"
        with source.open("wb") as file:
            file.truncate(gib * GIB)
            for part in range(256):
                file.seek(part * (gib * GIB // 256))
                file.write(os.urandom(MIB))
        shutil.rmtree(directory / "backups", ignore_errors=True)
        runs.append(sync_once(link, source, directory / "backups", gib * GIB))
        lines.append(f"| {gib} GiB | {runs[-1].memory / 1e6:.0f} | {runs[-1].agent_memory / 1e6:.0f} |")
        source.unlink()
    here, there = [run.memory for run in runs], [run.agent_memory for run in runs]
    if max(here) > 160e6 or max(there) > 200e6 or here[-1] > 1.25 * here[0] or there[-1] > 1.25 * there[0]:
        sys.exit("\n".join((*lines, "memory grows with the volume, or is more than it should be")))
    return "\n".join(lines)


def control_plane(directory: Path) -> str:
    """How much longer than its syncs a run over 8 volumes takes, with delays as DigitalOcean has them."""
    with Simulator(directory / "cloud", behaviour=Behaviour.realistic()) as simulator:
        for number in range(8):
            volume = simulator.add_volume(f"volume-{number}", size_gib=16)
            with volume.path.open("r+b") as file:
                file.write(os.urandom(64 * MIB))
        (directory / "conf.json").write_text(json.dumps({"do_token": simulator.token, "region": "fra1"}))
        (directory / "conf.json").chmod(0o600)
        shutil.rmtree(directory / "backups", ignore_errors=True)
        start = time.monotonic()
        script = subprocess.Popen(
            [sys.executable, dosvob.__file__, "--verbose"],
            cwd=directory,
            env={**os.environ, **simulator.environment()},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert script.stdout is not None
        moments = [(time.monotonic() - start, line) for line in script.stdout]
        if script.wait():
            sys.exit("the run failed: " + "".join(line for _, line in moments))
    up = next(moment for moment, line in moments if "is up at" in line)
    begun = [moment for moment, line in moments if "syncing its snapshot" in line]
    ended = [moment for moment, line in moments if ": backed up" in line]
    syncing = sum(end - begin for begin, end in zip(begun, ended, strict=True))
    return (
        f"8 volumes of 16 GiB: SSH after {up:.1f} s; syncs {syncing:.1f} s; first attach {begun[0] - up:.1f} s; "
        f"between the syncs {ended[-1] - begun[0] - syncing:.1f} s; teardown {moments[-1][0] - ended[-1]:.1f} s"
    )


def machine() -> str:
    """What it ran on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    sha = "with" if "sha_ni" in Path("/proc/cpuinfo").read_text() else "without"
    return (
        f"{os.cpu_count()} cores ({model}, {sha} SHA instructions) carrying both ends; Linux {platform.release()}, "
        f"Python {platform.python_version()}, paramiko {paramiko.__version__}"
    )


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--one"]:
        fields = json.loads(sys.argv[2])
        fields["directory"] = Path(fields["directory"])
        keep = dosvob.Keep() if sys.argv[6] == "keep" else dosvob.Keep(0, 0, 0, 0)
        sync_here(Link(**fields), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), keep)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=Path, metavar="SCRIPT", help="makes emulated links; without it only L0")
    parser.add_argument("--links", default=",".join(LINKS), help=f"which of them; default: {','.join(LINKS)}")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp/dosvob-bench"))
    parser.add_argument("--output", type=Path, default=Path("/var/tmp/dosvob-bench.md"))
    parser.add_argument("--memory", action="store_true", help="only the memory over 1, 4 and 16 GiB")
    parser.add_argument("--versions", action="store_true", help="only what keeping a version costs")
    parser.add_argument("--control-plane", action="store_true", help="only a run over 8 volumes of a simulated account")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    keys = arguments.directory / "keys"
    keys.mkdir(exist_ok=True)
    if arguments.control_plane:
        result = control_plane(arguments.directory)
    elif arguments.versions:
        data = make_data(arguments.directory)
        with loopback("L0", keys) as link:
            result = versions_table(link, data, arguments.directory, arguments.repetitions)
    elif arguments.memory:
        with loopback("L0", keys) as link:
            result = memory_table(link, arguments.directory)
    else:
        data = make_data(arguments.directory)
        rows: dict[str, Row] = {}
        links: dict[str, Link] = {}
        for name in arguments.links.split(",") if arguments.link else ["L0"]:
            with emulated(name, arguments.link, keys) if arguments.link else loopback(name, keys) as link:
                links[name] = link
                rows[name] = run_link(link, data, arguments.directory, arguments.repetitions)
        result = f"{table(rows, links, data)}\n\n{machine()}; the median of {arguments.repetitions}."
    print(result)
    arguments.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
