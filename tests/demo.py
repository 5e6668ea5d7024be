"""The main job, without an account: three simulated volumes are backed up, changed, backed up again, looked into.

Then a file is lost on a volume, and comes back from an older version; a whole volume is deleted, and comes back as a
new one; and another one is damaged, and comes back by its difference.
Everything but the account is real: the script, HTTP, SSH, the file system. Exit code 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from signals import Stop, Stopped, ignore_for_ourselves_only
from simulator import Simulator, Volume
from simulator.storage import mounted

SCRIPT = Path(__file__).resolve().parent.parent / "dosvob.py"
MIB = 1 << 20
ENDING_LIMIT = 30  # seconds for the script to remove what it created


def tell(text: str) -> None:
    """Say what comes next."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def run(*command: str | Path) -> None:
    """Run a command quietly; its failure ends the demonstration."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


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
    with mounted(volumes["files"].path, scratch) as root:
        (root / "letters").mkdir()
        (root / "letters/to-ada.txt").write_text("Dear Ada, the engine works.\n")
        (root / "letters/to-grace.txt").write_text("Dear Grace, we found a moth.\n")
        (root / "photo.raw").write_bytes(random.randbytes(20 * MIB))
    with volumes["noise"].path.open("r+b") as file:
        for _ in range(100):
            file.write(random.randbytes(MIB))


def change(volumes: dict[str, Volume], scratch: Path) -> None:
    """Change a little: a file, a new file, and a few places of the raw volume."""
    with mounted(volumes["files"].path, scratch) as root:
        with (root / "letters/to-ada.txt").open("a") as file:
            file.write("P.S. It prints Bernoulli numbers.\n")
        (root / "letters/to-alan.txt").write_text("Dear Alan, does it halt?\n")
    with volumes["noise"].path.open("r+b") as file:
        for offset in (0, 7 * MIB + 4711, 90 * MIB):
            file.seek(offset)
            file.write(random.randbytes(10_000))


def delete(volumes: dict[str, Volume], scratch: Path) -> None:
    """Delete a letter, as happens."""
    with mounted(volumes["files"].path, scratch) as root:
        (root / "letters/to-ada.txt").unlink()


def dosvob(home: Path, simulator: Simulator, *arguments: str) -> None:
    """Run the script as a user does; when the demonstration is stopped, the script is too, and ends in order."""
    print(f"$ {shlex.join(['python', 'dosvob.py', *arguments])}", flush=True)
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, str(SCRIPT), *arguments]
    process = subprocess.Popen(command, cwd=home, env={**os.environ, **simulator.environment()})
    try:
        code = process.wait()
    except Stopped:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_LIMIT)
        process.kill()
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, "dosvob.py")


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
    dosvob(home, simulator)
    tell("Each image is, byte for byte, its volume")
    compare(home, volumes)

    tell("Now the volumes change: one letter grows, one is new, and 3 places of the random data are overwritten")
    change(volumes, scratch)
    tell("The second backup fetches only the changes")
    dosvob(home, simulator)
    tell("Again each image is its volume")
    compare(home, volumes)

    tell("Restoring a file: a copy of the image is mounted, and here are the files")
    dosvob(home, simulator, "restore", "files", "files.img")
    print("$ mount -o loop files.img /mnt")
    with mounted(home / "files.img", restored) as root:
        print(list_files(root))
        if not (root / "letters/to-ada.txt").read_text().endswith("Bernoulli numbers.\n"):
            sys.exit("The restored letter is not the latest one.")

    tell("One letter is deleted from the volume by mistake, and a third backup is made before anybody notices")
    delete(volumes, scratch)
    dosvob(home, simulator)
    dosvob(home, simulator, "list", "files")
    time = version_before(home)

    bring_volumes_back(directory, simulator, volumes)

    tell("The deleted letter is in the backup before: every one is there as a file, at once, and can be mounted")
    with shown(home) as directory_of_versions:
        file = directory_of_versions / "files" / time
        print(f"$ ls shown/files\n  {'  '.join(sorted(path.name for path in file.parent.iterdir()))}")
        print(f"$ mount -o loop shown/files/{time} /mnt")
        restored.mkdir(exist_ok=True)
        run("mount", "-o", "loop", file, restored)
        try:
            print(list_files(restored))
            is_there = (restored / "letters/to-ada.txt").read_text().endswith("Bernoulli numbers.\n")
        finally:
            run("umount", restored)
    if not is_there:
        sys.exit("The letter did not come back.")


@contextlib.contextmanager
def shown(home: Path) -> Iterator[Path]:
    """Where `mount` shows all versions."""
    directory = home / "shown"
    directory.mkdir()
    print("$ python dosvob.py mount shown &", flush=True)
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, str(SCRIPT), "mount", "shown"]
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        print(process.stdout.readline(), end="", flush=True)
        try:
            yield directory
        finally:
            run("umount", "--lazy", directory)
        if process.wait():
            sys.exit("mount failed.")


def bring_volumes_back(directory: Path, simulator: Simulator, volumes: dict[str, Volume]) -> None:
    """The end of the story."""
    home = directory / "home"
    tell("The volume noise is deleted, all of it; and comes back, as a new volume with the very bytes")
    lost = directory / "noise"
    run("cp", "--sparse=always", volumes["noise"].path, lost)
    simulator.remove_volume(volumes["noise"])
    dosvob(home, simulator, "restore", "noise", "--to-volume", "noise-again")
    (made,) = (volume for volume in simulator.volumes if volume.name == "noise-again")
    print("$ cmp noise noise-again", flush=True)
    run("cmp", lost, made.path)

    tell("Letters and half of a photo on the volume files are destroyed; it comes back as a new one, by what differs")
    was = directory / "files"
    run("cp", "--sparse=always", volumes["files"].path, was)
    with mounted(volumes["files"].path, directory / "scratch") as root:
        shutil.rmtree(root / "letters")
        with (root / "photo.raw").open("r+b") as file:
            file.write(b"nonsense" * (10 * MIB // 8))
    dosvob(home, simulator, "restore", "files", "--to-volume", "files-whole")
    (whole,) = (volume for volume in simulator.volumes if volume.name == "files-whole")
    print("$ cmp files files-whole", flush=True)
    run("cmp", was, whole.path)

    tell("The account has its two volumes and the new ones, and nothing else that costs money was left behind")
    if simulator.alive() != [made, whole]:
        sys.exit(f"Left behind: {simulator.alive()}")


def version_before(home: Path) -> str:
    """The name that `mount` gives the second backup of the volume files, by what `list --json` tells."""
    command = [sys.executable, str(SCRIPT), "list", "files", "--json"]
    told = subprocess.run(command, cwd=home, check=True, capture_output=True).stdout
    moment = datetime.datetime.fromisoformat(json.loads(told)["volumes"][0]["versions"][1]["time"])
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H%M%SZ")


def unmount_all(directory: Path) -> None:
    """Unmount what is still mounted below a directory, when the story was stopped in the middle."""
    targets = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for target in targets:
        if Path(target).is_relative_to(directory):
            subprocess.run(["umount", "--lazy", target], check=False)


def show() -> None:
    """Tell the story in a temporary directory, and remove everything at its end, however that comes."""
    stop = Stop()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dosvob-demo-")))
        stack.callback(unmount_all, directory)
        simulator = Simulator(directory / "cloud", openapi=os.environ.get("DIGITALOCEAN_OPENAPI"))
        stack.enter_context(simulator)
        with stop.ends_this():
            demonstrate(directory, simulator)


def main() -> None:
    """Run the demonstration; a signal is answered by a line, and by its exit code, as is a reader who has gone."""
    ignore_for_ourselves_only()
    try:
        show()
        tell("All is well; the temporary directory is removed.")
    except subprocess.CalledProcessError as problem:
        sys.exit(f"Failed: {problem}")
    except Stopped as stopped:
        leave(stopped.number, f"{stopped.number.name}: the demonstration is over; its directory is removed.")
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe or a terminal that has gone
            raise
        leave(signal.SIGPIPE, "")


def leave(number: signal.Signals, last_words: str) -> NoReturn:
    """Exit as programs do that a signal ended, also when there is nobody any more to write to."""
    with contextlib.suppress(OSError):
        print(last_words, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(128 + number)  # all is done: Python would only complain of what it cannot write


if __name__ == "__main__":
    main()
