"""File systems as people have them at home, mounted for a test, over whatever Debian has of them."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from simulator.storage import LoopDevice

MIB = 1 << 20


def run(*command: object) -> None:
    """Run a command, which must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)


def with_error(calls: str, name: str, *options: str) -> tuple[str, ...]:
    """A wrapper in which a command's calls of some kinds fail with the error of that name."""
    begin = ("strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null")
    return (*begin, *options, "-e", f"trace={calls}", f"--inject={calls}:error={name}")


def cannot_read(path: Path, name: str, calls: str = "read,pread64") -> tuple[str, ...]:
    """A wrapper in which a command, run in the home's directory, cannot read one of the home's files."""
    there = [os.path.relpath(path, parent) for parent in path.parents if (parent / "conf.json").exists()]
    return with_error(calls, name, *(word for each in (path, *there) for word in ("-P", str(each))))


class Storage:
    """A file system of a kind that is mounted on `path`; what it is made of is in `store`, of `size` bytes."""

    TOOLS = {  # noqa: RUF012 - what is needed, and the package that has it
        "sshfs": ("sshfs", "sshfs"),
        "mergerfs": ("mergerfs", "mergerfs"),
        "exfat-fuse": ("mount.exfat-fuse", "exfat-fuse"),
        "ntfs-3g": ("ntfs-3g", "ntfs-3g"),
        "gocryptfs": ("gocryptfs", "gocryptfs"),
        "btrfs": ("mkfs.btrfs", "btrfs-progs"),
        "ext4": ("mkfs.ext4", "e2fsprogs"),
    }

    PORT = 2222  # of the SSH server
    SFTP = "internal-sftp"

    def __init__(self, kind: str, directory: Path, *, size: int = 256 * MIB, options: Sequence[str] = ()) -> None:
        tool, package = self.TOOLS[kind]
        if shutil.which(tool) is None or (kind == "exfat-fuse" and shutil.which("mkfs.exfat") is None):
            pytest.skip(f"{kind}: there is no {tool}, which is in the package {package}")
        if kind not in ("btrfs", "ext4") and not Path("/dev/fuse").exists():
            pytest.skip(f"{kind}: there is no /dev/fuse")
        self.path = directory / "storage"
        self.store = directory / "store"
        self._kind = kind
        self._options = options
        self._sshd: subprocess.Popen[bytes] | None = None
        self._device: LoopDevice | None = None
        self.path.mkdir(parents=True)
        if kind in ("sshfs", "mergerfs", "gocryptfs"):
            self.store.mkdir()
        else:
            with self.store.open("xb") as file:
                file.truncate(size)
        self._prepare(directory)
        self.mount()

    def _prepare(self, directory: Path) -> None:
        """Make what is to be mounted."""
        makers = {
            "exfat-fuse": ("mkfs.exfat", self.store),
            "ntfs-3g": ("mkntfs", "--force", "--fast", "--quiet", self.store),
            "gocryptfs": ("gocryptfs", "-q", "-init", "-scryptn", "10", "-extpass", "echo secret", self.store),
            "btrfs": ("mkfs.btrfs", "--quiet", self.store),
            "ext4": ("mkfs.ext4", "-q", "-F", self.store),
        }
        if self._kind in makers:
            run(*makers[self._kind])
        if self._kind == "mergerfs":
            for branch in ("one", "two"):
                (self.store / branch).mkdir()
        if self._kind == "sshfs":
            self._start_sshd(directory)

    def _start_sshd(self, directory: Path) -> None:
        """A real SSH server at an address of its own, and a key that it lets in."""
        self._address = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
        self._key = directory / "key"
        for key in (self._key, directory / "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        Path("/run/sshd").mkdir(exist_ok=True)
        config = directory / "sshd_config"
        config.write_text(
            f"ListenAddress {self._address}:{self.PORT}\nHostKey {directory}/host_key\nPidFile none\nStrictModes no\n"
            f"AuthorizedKeysFile {self._key}.pub\nPermitRootLogin yes\nUsePAM no\nSubsystem sftp {self.SFTP}\n"
        )
        self._sshd = subprocess.Popen([str(shutil.which("sshd", path="/usr/sbin:/usr/bin")), "-D", "-f", str(config)])
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                socket.create_connection((self._address, self.PORT), timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return

    def mount(self, *more: str) -> None:
        """Mount it, with more options perhaps."""
        options = ["-o", ",".join([*self._options, *more])] if self._options or more else []
        if self._kind == "sshfs":
            known = "StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,LogLevel=ERROR"
            where = f"port={self.PORT},IdentityFile={self._key},{known}"
            run("sshfs", "-o", where, *options, f"root@{self._address}:{self.store}", self.path)
        elif self._kind == "mergerfs":
            run("mergerfs", *options, f"{self.store}/one:{self.store}/two", self.path)
        elif self._kind == "exfat-fuse":
            self._device = self._device or LoopDevice(self.store)
            run("mount.exfat-fuse", *options, self._device.path, self.path)
        elif self._kind == "ntfs-3g":
            run("ntfs-3g", *options, self.store, self.path)
        elif self._kind == "gocryptfs":
            run("gocryptfs", "-q", "-extpass", "echo secret", *options, self.store, self.path)
        else:
            run("mount", "-o", ",".join(["loop", *self._options]), self.store, self.path)

    def unmount(self) -> None:
        """Take it away, for now."""
        run("umount", self.path)

    def close(self) -> None:
        """Take it away for good."""
        subprocess.run(["umount", "--lazy", self.path], check=False, stderr=subprocess.DEVNULL)
        if self._device is not None:
            self._device.close()
        if self._sshd is not None:
            self._sshd.kill()
            self._sshd.wait()


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A file system of the kind that is the test's parameter."""
    made = Storage(request.param, tmp_path / "storage")
    yield made
    made.close()
