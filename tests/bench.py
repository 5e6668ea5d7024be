"""How fast a sync is, against what others take for the same. Run it as `tests/bench`; `--help` says how.

A volume of 4 GiB is synced over real OpenSSH; in turns of 8 MiB it has noise, files of this machine, and twice zeros:

  S1  the first sync                S3  5,000 random pages of 4 KiB changed
  S2  nothing changed               S4  205 MB changed in one piece, half of it noise and half files

With `--peers` each is done by others too, as far as they are installed: `ssh zstd -1`, which can only copy all of it,
`rsync`, `rsync -z`, and for S3 `rsync -B 4096`; in turns with ours, on the same data and with the same cipher. H is
what one thread takes on the droplet's side to read the volume once in 1 MiB reads with SHA-256. In brackets are the
seconds of CPU that this end and the droplet's take, without those of an emulated link. Compared are medians of one run.

With `--apart` each end has one core, as in the field, where the droplet has no more; an emulated link runs on both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paramiko

import dosvob

MIB, GIB = 1 << 20, 1 << 30
EXTENT = 8 * MIB
PAGES_CHANGED = 5000
PIECE = 205_000_000 // MIB * MIB
LINKS = {  # name: (round trip in ms, Mbit/s down, Mbit/s up), 0 for no limit
    "L0": (0, 0, 0),
    "L1": (20, 1000, 1000),
    "L2": (40, 100, 20),
    "80 ms": (80, 1000, 1000),
    "200 ms": (200, 1000, 1000),
}
CELLS = {"S1": ("", "base"), "S2": ("base", "base"), "S3": ("base", "scattered"), "S4": ("scattered", "piece")}
"""What the image and the volume have; no image at first."""
SSH_ZSTD, RSYNC, RSYNC_Z, RSYNC_4096 = "ssh zstd -1", "rsync", "rsync -z", "rsync -B 4096"
PEERS = {
    "S1": (SSH_ZSTD, RSYNC, RSYNC_Z),
    "S2": (RSYNC, RSYNC_Z),
    "S3": (RSYNC, RSYNC_Z, RSYNC_4096),
    "S4": (RSYNC, RSYNC_Z),
}
GOALS = {  # of the time that the best of the peers takes, or of S3's last one; S2's is measured by H
    "S1": {"L0": 0.90, "L1": 0.80, "L2": 0.97},
    "S3": {"L1": 0.75, "L2": 0.50},
    "S4": {"L0": 0.70, "L1": 0.70, "L2": 0.70},
}


# ── The data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def files_of_this_machine() -> Iterator[bytes]:
    """What the files of its system have, in pieces, over and over."""
    while True:
        for directory, directories, names in os.walk("/usr"):
            directories.sort()
            for name in sorted(names):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    with path.open("rb") as file:
                        yield from iter(lambda: file.read(EXTENT), b"")


class Content:
    """Bytes as a volume has them, of one kind or the other; each time others."""

    def __init__(self) -> None:
        self._files = files_of_this_machine()
        self._rest = b""

    def noise(self, size: int) -> bytes:
        """What nothing can compress: media, archives, what is encrypted."""
        return os.urandom(size)

    def files(self, size: int) -> bytes:
        """What files have."""
        while len(self._rest) < size:
            self._rest += next(self._files)
        found, self._rest = self._rest[:size], self._rest[size:]
        return found


def make_data(directory: Path, gib: int) -> dict[str, Path]:
    """Make the contents that a volume has in turn, once per directory and size."""
    paths = {name: directory / f"{name}-{gib}" for name in ("base", "scattered", "piece")}
    if not paths["piece"].exists():
        content, size = Content(), gib * GIB
        with paths["base"].open("wb") as file:
            file.truncate(size)
            for extent in range(0, size // EXTENT, 2):
                file.seek(extent * EXTENT)
                file.write(content.files(EXTENT) if extent % 4 else content.noise(EXTENT))
        with changed(paths["base"], paths["scattered"]) as file:
            for page in random.Random(3).sample(range(size // 4096), PAGES_CHANGED * gib // 4):
                file.seek(page * 4096)
                file.write(os.urandom(4096))
        with changed(paths["scattered"], directory / "making") as file:
            file.seek(size // 8 + 12 * MIB)
            file.write(content.noise(PIECE * gib // 8))
            file.write(content.files(PIECE * gib // 8))
        (directory / "making").rename(paths["piece"])
    return paths


@contextlib.contextmanager
def changed(source: Path, path: Path) -> Iterator[BinaryIO]:
    """A copy, to be changed."""
    copy(source, path)
    with path.open("r+b") as file:
        yield file


def copy(source: Path, target: Path) -> None:
    """A copy with holes for zeros."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, target], check=True)


# ── The link and the two references ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Link:
    """A link that is up: how to reach the droplet's side by SSH, and how to run a command there."""

    name: str
    address: str
    port: int
    directory: Path  # with the keys `id` and `hostkey`
    there: tuple[str, ...]
    server: int  # the process of its sshd

    def ssh(self) -> list[str]:
        """The ssh command, but for `root@address`."""
        return [
            *("ssh", "-F", "none", "-p", str(self.port), "-i", str(self.directory / "id"), "-o", "BatchMode=yes"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
            *("-c", dosvob.CIPHERS[0]),
        ]

    def cpu_there(self) -> float:
        """Seconds of CPU that connections which have ended took on the droplet's side; waits for the end of all."""
        end = time.monotonic() + 60
        while Path(f"/proc/{self.server}/task/{self.server}/children").read_text():
            if time.monotonic() > end:
                sys.exit("a connection does not end")
            time.sleep(0.05)
        fields = Path(f"/proc/{self.server}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")  # cutime, cstime


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
        yield Link(name, "10.77.0.2", 22, directory, there, int((directory / "sshd_droplet.pid").read_text()))
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
        link = Link(name, "127.0.0.1", port, directory, (), server.pid)
        while subprocess.run(
            [*link.ssh(), f"root@{link.address}", "true"], check=False, stderr=subprocess.DEVNULL
        ).returncode:
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


@dataclass(frozen=True)
class Cost:
    """What something took: seconds, and seconds of CPU at this end and at the droplet's."""

    seconds: float
    here: float = 0.0
    there: float = 0.0

    @classmethod
    def median(cls, costs: Sequence[Cost]) -> Cost:
        """The median of each."""
        return cls(*map(statistics.median, zip(*map(dataclasses.astuple, costs), strict=True)))

    def __str__(self) -> str:
        return f"{self.seconds:.1f}" + f" ({self.here:.1f}, {self.there:.1f})" * bool(self.here)


def cpu_here() -> float:
    """Seconds of CPU that the processes took which were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peer(name: str, link: Link, before: Path | None, source: Path, target: Path) -> Cost:
    """What another program takes to make the target, which has what was there before, the source."""
    target.unlink(missing_ok=True)
    if before is not None:
        copy(before, target)
    remote = f"root@{link.address}"
    there, here, start = link.cpu_there(), cpu_here(), time.monotonic()
    if name == SSH_ZSTD:
        with subprocess.Popen([*link.ssh(), remote, f"zstd -q -1 -c {source}"], stdout=subprocess.PIPE) as sender:
            subprocess.run(["zstd", "-q", "-d", "--sparse", "-o", target], stdin=sender.stdout, check=True)
    else:
        how = "--inplace" if before is not None else "--sparse"
        options = [*name.split(), how, "--ignore-times", "-e", shlex.join(link.ssh())]
        subprocess.run([*options, f"{remote}:{source}", target], check=True)
    cost = Cost(time.monotonic() - start, cpu_here() - here, link.cpu_there() - there)
    check_equal(source, target)
    target.unlink()
    return cost


def is_installed(name: str) -> bool:
    """Whether a peer can be measured here."""
    return shutil.which("zstd" if name == SSH_ZSTD else "rsync") is not None


# ── One sync ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measurement:
    """One sync: its cost, bytes received, peak memory here and on the droplet, bytes read and written by calls."""

    cost: Cost
    received: int
    memory: int
    agent_memory: int
    read: int
    written: int


def sync_once(link: Link, source: Path, backups: Path, size: int, *, keep: bool = True) -> Measurement:
    """Sync in a process of its own, so that its memory can be measured."""
    command = [sys.executable, __file__, "--one", json.dumps(dataclasses.asdict(link), default=str)]
    watcher, there = AgentWatcher(), link.cpu_there()
    with watcher:
        done = subprocess.run(
            [*command, str(source), str(backups), str(size), "keep" if keep else "none"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    told = json.loads(done.stdout.splitlines()[-1])
    cost = Cost(told.pop("seconds"), told.pop("cpu"), link.cpu_there() - there)
    return Measurement(cost, agent_memory=watcher.peak, **told)


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

    read_before, written_before = bytes_moved("rchar"), bytes_moved("wchar")
    with contextlib.closing(dosvob.Link(link.address, keys, dosvob.Stop())) as way:
        way.open(60)  # as a run does it while the clone is being made
        start, cpu = time.monotonic(), time.process_time()
        with contextlib.closing(dosvob.Update(paths, snapshot, keep, report.warn)) as update:
            pull = dosvob.Pull(update)
            received = dosvob.converse(
                lambda: way.start_agent(pull.program(str(source))), pull, report.warn, lambda _: None, lambda _: False
            )
            update.finish()
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    memory = peak_memory(Path("/proc/self"))
    moved = {"read": bytes_moved("rchar") - read_before, "written": bytes_moved("wchar") - written_before}
    print(json.dumps({"seconds": seconds, "cpu": cpu, "received": received, "memory": memory, **moved}))


def peak_memory(process: Path) -> int:
    """The most memory that a process has had (bytes); what rusage tells counts the parent's as well."""
    lines = (process / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def bytes_moved(field: str) -> int:
    """Bytes that this process has read (rchar) or written (wchar) by calls, of files and sockets."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields[field])


# ── The runs and the table ───────────────────────────────────────────────────────────────────────────────────────────


class Cell:
    """What was measured of one cell of the table: ours, and costs by the name of a peer, or H."""

    def __init__(self) -> None:
        self.ours: list[Measurement] = []
        self.others: dict[str, list[Cost]] = {}

    def note(self, name: str, cost: Cost) -> None:
        """Keep what somebody else took."""
        self.others.setdefault(name, []).append(cost)

    @property
    def cost(self) -> Cost:
        """The median of ours."""
        return Cost.median([measured.cost for measured in self.ours])

    def seconds(self, name: str) -> float:
        """The median of somebody else's."""
        return Cost.median(self.others[name]).seconds

    def line(self, link: str, name: str) -> str:
        """It as a line of the table."""
        received = statistics.median(measured.received for measured in self.ours) / 1e6
        memory = [max(sizes) / 1e6 for sizes in zip(*((m.memory, m.agent_memory) for m in self.ours), strict=True)]
        fields = [link, name, str(self.cost), f"{received:.1f}", f"{memory[0]:.0f}, {memory[1]:.0f}"]
        fields += [
            str(Cost.median(self.others[peer])) if peer in self.others else ""
            for peer in ("H", *PEERS["S1"], RSYNC_4096)
        ]
        return f"| {' | '.join((*fields, self.verdict(link, name)))} |"

    def verdict(self, link: str, name: str) -> str:
        """How it compares with the goal, if what that is measured by was measured."""
        if name == "S2":
            return f"{self.cost.seconds / (1.25 * self.seconds('H') + 0.5):.2f} of 1.25 H + 0.5 s"
        peers = [peer for peer in PEERS[name] if peer in self.others]
        if not peers:
            return ""
        best = RSYNC_4096 if name == "S3" else min(peers, key=self.seconds)
        goal = GOALS[name].get(link)
        of_goal = f"; the goal is {goal:.2f}" if goal else ""
        return f"{self.cost.seconds / self.seconds(best):.2f} of {best}{of_goal}"


@dataclass(frozen=True)
class Bench:
    """The benchmark: where its files are, the contents of the volume and its size in bytes, and what is measured."""

    directory: Path
    data: dict[str, Path]
    size: int
    cells: list[str]
    peers: bool
    here: Link  # by which images are made that a cell begins with

    def run(self, link: Link, rounds: int) -> dict[str, Cell]:
        """All cells of a link, so many times."""
        cells = {name: Cell() for name in self.cells}
        for number in range(rounds):
            holds: str | None = None  # what the image has
            for name, cell in cells.items():
                before, after = CELLS[name]
                if holds != before:
                    holds = self.prepare(before)
                subprocess.run(["cat", *self.data.values()], stdout=subprocess.DEVNULL, check=True)  # they are cached
                cell.note("H", Cost(reference_h(link, self.data[after])))
                cell.ours.append(sync_once(link, self.data[after], self.backups, self.size))
                check_equal(self.data[after], self.backups / "bench")
                holds = after
                for peer_name in filter(is_installed, PEERS[name] if self.peers else ()):
                    image = self.data.get(before)
                    cell.note(peer_name, peer(peer_name, link, image, self.data[after], self.directory / "peer"))
                print(
                    f"{link.name} {name}, round {number + 1} of {rounds}: {cell.line(link.name, name)}", file=sys.stderr
                )
        return cells

    @property
    def backups(self) -> Path:
        """Where the image is."""
        return self.directory / "backups"

    def prepare(self, content: str) -> str:
        """Have an image with this content, or none."""
        shutil.rmtree(self.backups, ignore_errors=True)
        if content:
            sync_once(self.here, self.data[content], self.backups, self.size)
        return content

    def table(self, measured: dict[str, dict[str, Cell]]) -> str:
        """The table in Markdown."""
        heads = ["link", "what", "seconds (CPU here, droplet)", "MB received", "memory here, droplet (MB)"]
        heads += ["H", *PEERS["S1"], RSYNC_4096, "compared"]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [cell.line(link, name) for link, cells in measured.items() for name, cell in cells.items()]
        return "\n".join(lines)


def check_equal(source: Path, image: Path) -> None:
    """The image must be the volume, or the figures mean nothing."""
    subprocess.run(["cmp", source, image], check=True)


def versions_table(bench: Bench, rounds: int) -> str:
    """What keeping a version costs a sync of a change in one piece (S4), in turns with one that keeps none."""
    runs: dict[bool, list[Measurement]] = {True: [], False: []}
    for _ in range(rounds):
        for keep in (False, True):
            bench.prepare("scattered")
            runs[keep].append(sync_once(bench.here, bench.data["piece"], bench.backups, bench.size, keep=keep))
    lines = ["| 205 MB changed | seconds | MB read | MB written |", "|---|---|---|---|"]
    for keep, name in ((False, "without versions"), (True, "with a version")):
        figures = [statistics.median(getattr(run, what) for run in runs[keep]) for what in ("read", "written")]
        cost = Cost.median([run.cost for run in runs[keep]])
        lines.append(f"| {name} | {cost} | {figures[0] / 1e6:.0f} | {figures[1] / 1e6:.0f} |")
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
    parser.add_argument("--links", type=words, default=["L0", "L1", "L2"], help=f"which, of {','.join(LINKS)}")
    parser.add_argument(
        "--cells", type=words, default=list(CELLS), help=f"which, of {','.join(CELLS)}, or of a restore's"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=int, default=4, help="of the volume, and a part of the changes with it")
    parser.add_argument("--apart", action="store_true", help="one core for each end")
    parser.add_argument("--peers", action="store_true", help="measure others beside it")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp/dosvob-bench"))
    parser.add_argument("--output", type=Path, default=Path("/var/tmp/dosvob-bench.md"))
    parser.add_argument("--memory", action="store_true", help="only the memory over 1, 4 and 16 GiB")
    parser.add_argument("--restore", action="store_true", help="only a restore into a new volume")
    old = "with --restore, --chain and --control-plane: another checkout beside it"
    parser.add_argument("--old", type=Path, metavar="DIRECTORY", help=old)
    parser.add_argument("--versions", action="store_true", help="only what keeping a version costs")
    parser.add_argument("--chain", action="store_true", help="only what a long chain of versions costs")
    parser.add_argument("--control-plane", action="store_true", help="only runs over volumes of a simulated account")
    parser.add_argument("--volumes", type=words, default=["8", "16"], help="with --control-plane: how many, in turn")
    parser.add_argument("--throttled", action="store_true", help="only two unchanged volumes that give 200 MB/s each")
    parser.add_argument("--attachments", type=int, default=15, help="with --control-plane: most that a droplet has")
    arguments = parser.parse_args()
    result = run(arguments)
    print(result)
    arguments.output.write_text(result + "\n")


def words(text: str) -> list[str]:
    """What an option lists."""
    return text.split(",")


def run(arguments: argparse.Namespace) -> str:
    """Measure what is asked for."""
    arguments.directory.mkdir(parents=True, exist_ok=True)
    keys = arguments.directory / "keys"
    keys.mkdir(exist_ok=True)
    # Imported here, since the memory of a sync is measured in a process that has this file as well.
    if arguments.chain:
        import bench_chain  # noqa: PLC0415

        return bench_chain.measure(arguments)
    if arguments.throttled or arguments.control_plane:
        import bench_control  # noqa: PLC0415

        return bench_control.measure(arguments)
    with loopback("L0", keys) as here:
        if arguments.memory:
            return memory_table(here, arguments.directory)
        if arguments.restore:
            import bench_restore  # noqa: PLC0415

            return bench_restore.measure(arguments, keys, here)
        data = make_data(arguments.directory, arguments.gib)
        size = arguments.gib * GIB
        bench = Bench(arguments.directory, data, size, arguments.cells, arguments.peers, here)
        if arguments.versions:
            return versions_table(bench, arguments.rounds)
        measured: dict[str, dict[str, Cell]] = {}
        for name in arguments.links if arguments.link else ["L0"]:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))  # an emulated link has all
            with emulated(name, arguments.link, keys) if arguments.link else contextlib.nullcontext(here) as link:
                if arguments.apart:
                    os.sched_setaffinity(link.server, {0})
                    os.sched_setaffinity(0, {1})  # and what this process starts
                measured[name] = bench.run(link, arguments.rounds)
        return f"{bench.table(measured)}\n\n{machine()}; the median of {arguments.rounds}."


if __name__ == "__main__":
    main()
