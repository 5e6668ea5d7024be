"""A droplet's machine: namespaces on this computer with a real sshd in them. It knows nothing of the API."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from .machine_init import AUTOMOUNT_RULE, PRIVATE
from .network import Link, Relay, create_link
from .storage import LoopDevice, file_system_of

_BOOT_LIMIT = 120.0
_FIRST_MOUNT_MARK = b"DO_FIRST_MOUNT"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin"
_LOGIN_REFUSED = (
    "no-port-forwarding,no-agent-forwarding,no-X11-forwarding,"
    'command="echo \'Please login as the user \\"debian\\" rather than the user \\"root\\".\';echo;exit 142" '
)


@dataclass(frozen=True)
class UserData:
    """What a droplet takes from its cloud-config."""

    host_keys: dict[str, str] = field(default_factory=dict)
    """File name to private key."""
    bootcmd: tuple[str, ...] = ()
    root_login: bool = False

    @classmethod
    def parse(cls, text: str) -> UserData:
        """Read a cloud-config; anything else is ignored, as cloud-init does."""
        first, _, rest = text.partition("\n")
        if first.strip() != "#cloud-config":
            return cls()
        try:
            config: Any = yaml.safe_load(rest)
        except yaml.YAMLError:
            return cls()
        if not isinstance(config, dict):
            return cls()
        keys = config.get("ssh_keys") or {}
        names = [name.removesuffix("_private") for name in keys if name.endswith("_private")]
        commands = config.get("bootcmd") or ()
        return cls(
            host_keys={f"ssh_host_{name}_key": keys[f"{name}_private"] for name in names},
            bootcmd=tuple(item if isinstance(item, str) else shlex.join(map(str, item)) for item in commands),
            root_login=config.get("disable_root") is False,
        )

    @property
    def disarms_automount(self) -> bool:
        """Whether a boot command removes (or covers) the auto-mount rule."""
        return any(
            str(AUTOMOUNT_RULE) in command and re.search(r"\b(rm|mv|unlink)\b|/dev/null", command)
            for command in self.bootcmd
        )


@dataclass(frozen=True)
class MachineOptions:
    """What may be wrong with a machine."""

    own_host_key: bool = True
    """Whether it uses the host key of its user data."""
    cut_after: int = 0
    """Connections are cut when they have sent so many bytes; 0 for never."""
    cut_connections: int = 1
    stall_after: int = 0
    """The machine falls silent when a connection has sent so many bytes; 0 for never."""
    stall_connections: int = 1
    deaf_connections: int = 0
    """So many connections are not heard any more once a channel is open."""
    bytes_per_second: int = 0
    """What a connection takes from it; 0 for no limit."""
    largest_packet: int = 0
    """Larger packets are lost on the way, both ways; 0 for no limit."""
    python: str = ""
    """A command to be run as `python3`."""
    sshd_config: str = ""
    """A line for sshd's configuration, which goes before the others."""
    late_automount: bool = False
    """Whether the auto-mount rule is written once more when SSH opens."""
    holds_devices: bool = False
    """Whether something holds each device exclusively."""

    @property
    def has_relay(self) -> bool:
        """Whether its connections go through a relay."""
        return bool(self.cut_after or self.stall_after or self.deaf_connections or self.bytes_per_second)


class Machine:
    """A running machine. Every method may be called after its death and then does nothing."""

    def __init__(
        self,
        number: int,
        name: str,
        *,
        mark: str,
        user_data: str,
        public_keys: list[str],
        log: Path,
        options: MachineOptions,
    ) -> None:
        """Boot: afterwards the machine has its address, and refuses SSH until `open_ssh`."""
        self.name = name
        self.user_data = UserData.parse(user_data)
        self._options = options
        self._public_keys = public_keys
        self._devices: dict[str, LoopDevice] = {}
        self._holders: dict[str, int] = {}
        self._changing = threading.RLock()
        self._off = False
        self._relay: Relay | None = None
        self._bytes_sent = 0
        self._init = 0
        self._network_namespace = -1
        self._log = log
        self._process = self._start_namespaces(mark)
        try:
            self._init = self._find_init()
            self._network_namespace = os.open(f"/proc/{self._init}/ns/net", os.O_RDONLY)
            self.link: Link = create_link(self._init, mark)
            self._prepare()
            if options.largest_packet:
                self._narrow(options.largest_packet)
        except BaseException:
            self._kill_processes()
            if self._network_namespace >= 0:
                os.close(self._network_namespace)
            raise

    @property
    def alive(self) -> bool:
        """Whether it has not been killed and not died by itself."""
        return self._process.poll() is None

    @property
    def address(self) -> str:
        """Its public address."""
        return self.link.address

    @property
    def root(self) -> Path:
        """Its root directory as seen from outside."""
        return Path(f"/proc/{self._init}/root")

    @property
    def automount_rule(self) -> Path:
        """Where the rule is that has volumes mounted as they appear."""
        return self.root.joinpath(*AUTOMOUNT_RULE.parts[1:])

    @property
    def bytes_sent(self) -> int:
        """Bytes that have left it over the network, headers and all."""
        self._bytes_sent = max(self._bytes_sent, self.link.bytes_received)
        return self._bytes_sent

    def open_ssh(self) -> None:
        """Let sshd start."""
        with self._changing:
            if self._off:
                return
            if self._options.late_automount:
                self.automount_rule.write_text("# as a package that is set up late leaves it\n")
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.write(b"ssh\n")
                self._process.stdin.flush()
            if self._options.has_relay:
                self._relay = self._start_relay()

    def restart_ssh(self) -> None:
        """Have sshd read its files again; its connections stay."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGHUP)

    def kernel_setting(self, name: str) -> str:
        """What a setting of its network, such as net.ipv4.tcp_sack, is after those boot commands that speak of it."""
        for command in self.user_data.bootcmd:
            if name in command:
                self._network("sh", "-c", command)
        return self._network("cat", f"/proc/sys/{name.replace('.', '/')}").strip()

    def _narrow(self, largest_packet: int) -> None:
        """Lose larger packets both ways; obey the boot commands about the network, which goes by a default route."""
        for run, interface in ((self._here, self.link.interface), (self._network, "eth0")):
            run("ip", "link", "set", "dev", interface, "gso_max_segs", "1")  # what is sent is what is on the way
            chain = f"inet {interface} path"
            hook = f"add table inet {interface}; add chain {chain} {{ type filter hook prerouting priority -300; }}"
            run("nft", f"{hook}; add rule {chain} iifname {interface} meta length > {largest_packet} drop")
        self._network("ip", "route", "add", "default", "dev", "eth0")
        self._network("sh", "-c", "ip route del $(ip -4 route show scope link proto kernel)")
        for command in self.user_data.bootcmd:
            if "tcp_mtu_probing" in command or "ip route" in command:
                self._network("sh", "-c", command)

    @staticmethod
    def _here(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def plug(self, volume_name: str, backing: Path) -> None:
        """A volume's device appears; the auto-mount rule is obeyed if it is there."""
        with self._changing:
            if self._off or not self.alive:
                return
            device = LoopDevice(backing)
            self._devices[volume_name] = device
            if self._options.holds_devices or self._takes(device.path):
                self._holders[volume_name] = os.open(device.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
            self._by_id(volume_name).symlink_to(device.path)
            if self.automount_rule.is_file():
                self._automount(volume_name, device.path)

    def unplug(self, volume_name: str) -> None:
        """A volume's device goes."""
        with self._changing:
            device = self._devices.pop(volume_name, None)
            if device is None:
                return
            if self.alive:
                self._by_id(volume_name).unlink(missing_ok=True)
                for target in self._mounts_of(device.path):
                    self._inside("umount", "--lazy", target)
            if volume_name in self._holders:
                os.close(self._holders.pop(volume_name))
            device.close()

    def cut(self) -> None:
        """Cut all SSH connections; new ones are welcome."""
        if self._relay is not None:
            self._relay.cut()
        for pid in self._sessions():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def stall(self) -> None:
        """From now on every packet to or from the machine is lost."""
        found = re.search(r"link/ether (\S+)", self._network("ip", "-o", "link", "show", "eth0"))
        if found:
            self.link.remember_neighbour(found[1])
            self._network("ip", "link", "set", "eth0", "down")

    def resume(self) -> None:
        """Undo `stall`."""
        self._network("ip", "link", "set", "eth0", "up")

    def power_off(self) -> None:
        """Everything in it ends at once; its address is still taken, and nobody answers there."""
        with self._changing:
            if self._off:
                return
            self._off = True
            if self._relay is not None:
                self._relay.stop()
            self._kill_processes()
            self.stall()
            for name in list(self._devices):
                self.unplug(name)

    def destroy(self) -> None:
        """Power off, and set free its address and namespaces."""
        self.power_off()
        with self._changing:
            if self._network_namespace >= 0:
                self._bytes_sent = self.bytes_sent  # the counters go
                if self._options.largest_packet:
                    self._here("nft", f"delete table inet {self.link.interface}")
                self.link.delete()
                os.close(self._network_namespace)
                self._network_namespace = -1

    # -- booting

    def _start_namespaces(self, mark: str) -> subprocess.Popen[bytes]:
        """The process whose child is the machine's first process; they die with the simulator."""
        python = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
        init = Path(__file__).with_name("machine_init.py")
        unshare = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        command = ["setpriv", "--pdeathsig", "KILL", *unshare, python, "-I", "-S", str(init), mark]
        with self._log.open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd="/")

    def _find_init(self) -> int:
        """The machine's first process, by its number on the outside."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        give_up = time.monotonic() + _BOOT_LIMIT
        while time.monotonic() < give_up and self.alive:
            found = children.read_text().split()
            if found:
                return int(found[0])
            time.sleep(0.002)
        raise RuntimeError(f"the droplet did not start: {self._log.read_text()}")

    def _prepare(self) -> None:
        """Hand over the settings and wait until the machine is ready."""
        settings = {
            "hostname": re.sub(r"[^A-Za-z0-9.-]", "-", self.name)[:63] or "droplet",
            "address": self.address,
            "automount": not self.user_data.disarms_automount,
            "files": self._files(),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(settings).encode() + b"\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the droplet did not boot: {self._log.read_text()}")

    def _files(self) -> dict[str, tuple[str, int]]:
        """The files of sshd: name to content and mode."""
        host_keys = self.user_data.host_keys if self._options.own_host_key else {}
        host_keys = host_keys or {"ssh_host_ed25519_key": _random_key()}
        prefix = "" if self.user_data.root_login else _LOGIN_REFUSED
        files = {name: (key.rstrip() + "\n", 0o600) for name, key in host_keys.items()}
        files["authorized_keys"] = ("".join(f"{prefix}{key}\n" for key in self._public_keys), 0o600)
        files["sshd_config"] = (self._sshd_config(list(host_keys)), 0o600)
        if self._options.python:
            files["bin/python3"] = (f'#!/bin/sh\nexec {self._options.python} "$@"\n', 0o755)
        return files

    def _sshd_config(self, host_keys: list[str]) -> str:
        path = f"{PRIVATE}/bin:{_PATH}" if self._options.python else _PATH
        lines = [
            self._options.sshd_config,
            f"ListenAddress {'127.0.0.1' if self._options.has_relay else self.address}",
            *(f"HostKey {PRIVATE}/{name}" for name in host_keys),
            f"AuthorizedKeysFile {PRIVATE}/authorized_keys",
            "StrictModes no",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "UsePAM no",
            "UseDNS no",
            "PidFile none",
            "PrintMotd no",
            "PrintLastLog no",
            f"SetEnv PATH={path} HOME=/root",
            *(["Ciphers aes128-gcm@openssh.com"] if self._options.deaf_connections else []),  # the relay must count
            "Subsystem sftp internal-sftp",
        ]
        return "\n".join(lines) + "\n"

    def _start_relay(self) -> Relay:
        options = self._options
        if options.bytes_per_second:
            return Relay(self._init, self.address, 0, 0, None, options.bytes_per_second)
        if options.deaf_connections:
            return Relay(self._init, self.address, 0, options.deaf_connections, None)
        if options.cut_after:
            return Relay(self._init, self.address, options.cut_after, options.cut_connections, None)
        return Relay(self._init, self.address, options.stall_after, options.stall_connections, self.stall)

    # -- inside

    def _by_id(self, volume_name: str) -> Path:
        return self.root / "dev/disk/by-id" / f"scsi-0DO_Volume_{volume_name}"

    def _inside(self, *command: str) -> bool:
        """Run a command in the machine's file system; whether it succeeded."""
        entered = ["nsenter", "--target", str(self._init), "--mount", "--pid", *command]
        return subprocess.run(entered, check=False, capture_output=True).returncode == 0

    def _network(self, *command: str) -> str:
        """Run a command in the machine's network, which outlives its processes; what it printed."""
        if self._network_namespace < 0:
            return ""
        entered = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._network_namespace}", *command]
        return subprocess.run(entered, check=False, capture_output=True, text=True).stdout

    def _automount(self, volume_name: str, device: str) -> None:
        """What DigitalOcean's images do to a volume with a file system when it appears."""
        if not file_system_of(device):
            return
        first, final = f"/mnt/.do-first-mount-{volume_name}", f"/mnt/{volume_name}"
        for directory in (first, final):
            (self.root / directory.lstrip("/")).mkdir(exist_ok=True)
        self._inside("mount", "-o", "ro", device, first)
        self._inside("umount", first)
        (self.root / first.lstrip("/")).rmdir()
        _clear_first_mount_mark(device)
        self._inside("mount", "-o", "defaults,nofail,discard,noatime", device, final)

    def _takes(self, device: str) -> bool:
        """Whether lvm2 or mdadm takes a device that appears, as their rules do by what udev says that it is."""
        places = self.automount_rule.parent.glob("6[12]-*.rules")  # behind what tells it, and before what goes by it
        rules = "".join(path.read_text() for path in places)
        is_told = 'ENV{ID_SERIAL}=="0DO_Volume_*", ENV{ID_FS_TYPE}=""' not in rules
        return is_told and file_system_of(device) in ("LVM2_member", "linux_raid_member")

    def _mounts_of(self, device: str) -> list[str]:
        """Where in the machine a device is mounted."""
        with contextlib.suppress(OSError):
            mounts = [line.split() for line in Path(f"/proc/{self._init}/mounts").read_text().splitlines()]
            return [fields[1] for fields in mounts if fields[0] == device]
        return []

    def _sessions(self) -> list[int]:
        """The sshd processes that serve connections: one for each, and from OpenSSH 10 on another one below it."""
        if not self._init:
            return []
        return [child for child in _descendants(self._init) if _program(child).startswith("sshd")]

    def _kill_processes(self) -> None:
        """End the first process, and with it all others."""
        if self._init and self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _descendants(pid: int) -> list[int]:
    """A process's children, and theirs."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _program(pid: int) -> str:
    """What a process runs; empty once it is over."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _clear_first_mount_mark(device: str) -> None:
    """Clear the mark that DigitalOcean leaves in the last bytes of a volume that was never mounted."""
    with open(device, "r+b", buffering=0) as file:
        file.seek(-len(_FIRST_MOUNT_MARK), os.SEEK_END)
        if file.read(len(_FIRST_MOUNT_MARK)) == _FIRST_MOUNT_MARK:
            file.seek(-len(_FIRST_MOUNT_MARK), os.SEEK_END)
            file.write(bytes(len(_FIRST_MOUNT_MARK)))
            os.fsync(file.fileno())


def _random_key() -> str:
    """A host key as the image would make it at first boot."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
