"""The main job, without an account: three simulated volumes are backed up, changed, backed up again, looked into.

Everything but the account is real: the script, HTTP, SSH, the file system. Exit code 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from simulator import Simulator, Volume
from simulator.storage import LoopDevice

SCRIPT = Path(__file__).resolve().parent.parent / "dosvob.py"
MIB = 1 << 20


def tell(text: str) -> None:
    """Say what comes next."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def run(*command: str | Path) -> None:
    """Run a command quietly; its failure ends the demonstration."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def mounted(disk: Path, directory: Path, options: str) -> Iterator[Path]:
    """A file with a file system, mounted while the context lasts."""
    directory.mkdir(exist_ok=True)
    device = LoopDevice(disk)
    try:
        run("mount", "-o", options, device.path, directory)
        try:
            yield directory
        finally:
            run("umount", directory)
    finally:
        device.close()


def list_files(directory: Path) -> str:
    """All files with their sizes and first lines."""
    lines = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            first = path.read_bytes().splitlines()[0][:60]
            text = first.decode() if first.isascii() else "(binary)"
            lines.append(f"  {path.relative_to(directory)!s:24} {path.stat().st_size:>10,} bytes   {text}")
    return "\n".join(lines)


def fill(volumes: dict[str, Volume], scratch: Path) -> None:
    """Give the volumes their first content."""
    run("mkfs.ext4", "-q", volumes["files"].path)
    with mounted(volumes["files"].path, scratch, "rw") as root:
        (root / "letters").mkdir()
        (root / "letters/to-ada.txt").write_text("Dear Ada, the engine works.\n")
        (root / "letters/to-grace.txt").write_text("Dear Grace, we found a moth.\n")
        (root / "photo.raw").write_bytes(random.randbytes(20 * MIB))
    with volumes["noise"].path.open("r+b") as file:
        for _ in range(100):
            file.write(random.randbytes(MIB))


def change(volumes: dict[str, Volume], scratch: Path) -> None:
    """Change a little: a file, a new file, and a few places of the raw volume."""
    with mounted(volumes["files"].path, scratch, "rw") as root:
        with (root / "letters/to-ada.txt").open("a") as file:
            file.write("P.S. It prints Bernoulli numbers.\n")
        (root / "letters/to-alan.txt").write_text("Dear Alan, does it halt?\n")
    with volumes["noise"].path.open("r+b") as file:
        for offset in (0, 7 * MIB + 4711, 90 * MIB):
            file.seek(offset)
            file.write(random.randbytes(10_000))


def back_up(home: Path, simulator: Simulator) -> None:
    """Run the script as a user does."""
    print("$ python dosvob.py", flush=True)
    environment = {**os.environ, **simulator.environment()}
    subprocess.run([sys.executable, SCRIPT], cwd=home, env=environment, check=True)


def compare(home: Path, volumes: dict[str, Volume]) -> None:
    """Show that each image equals its volume; exit if one does not."""
    for name, volume in volumes.items():
        image = home / "backups" / name
        print(f"$ cmp backups/{name} {name}", flush=True)
        run("cmp", image, volume.path)
        status = image.stat()
        print(f"  the same {status.st_size // MIB} MiB, which take {status.st_blocks * 512 // MIB} MiB of this disk")


def demonstrate(directory: Path, simulator: Simulator) -> None:
    """The story."""
    home, scratch, restored = directory / "home", directory / "scratch", directory / "mnt"
    home.mkdir()
    tell("A DigitalOcean account, simulated, with three volumes: files (ext4), noise (random data), empty (all zeros)")
    volumes = {name: simulator.add_volume(name) for name in ("files", "noise", "empty")}
    fill(volumes, scratch)
    conf = home / "conf.json"
    conf.write_text(json.dumps({"do_token": simulator.token, "region": "fra1"}))
    conf.chmod(0o600)

    tell("The first backup fetches all that is not zeros")
    back_up(home, simulator)
    tell("Each image is, byte for byte, its volume")
    compare(home, volumes)

    tell("Now the volumes change: one letter grows, one is new, and 3 places of the random data are overwritten")
    change(volumes, scratch)
    tell("The second backup fetches only the changes")
    back_up(home, simulator)
    tell("Again each image is its volume")
    compare(home, volumes)

    tell("Restoring a file: the image is mounted read-only, and here are the files")
    print("$ mount -o ro,loop backups/files /mnt")
    with mounted(home / "backups" / "files", restored, "ro,noload") as root:
        print(list_files(root))
        if not (root / "letters/to-ada.txt").read_text().endswith("Bernoulli numbers.\n"):
            sys.exit("The restored letter is not the latest one.")

    tell("The account has its three volumes, and nothing that costs money was left behind")
    if simulator.alive():
        sys.exit(f"Left behind: {simulator.alive()}")


def main() -> None:
    """Run the demonstration in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="dosvob-demo-") as name:
        directory = Path(name)
        with Simulator(directory / "cloud", openapi=os.environ.get("DIGITALOCEAN_OPENAPI")) as simulator:
            try:
                demonstrate(directory, simulator)
            except subprocess.CalledProcessError as problem:
                sys.exit(f"Failed: {problem}")
    tell("All is well; the temporary directory is removed.")


if __name__ == "__main__":
    main()
