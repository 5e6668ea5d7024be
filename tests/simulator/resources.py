"""The things an account holds, and how the API shows each of them."""

from __future__ import annotations

import base64
import hashlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from .catalogue import IMAGES, REGIONS, SIZES, Json
from .machine import Machine
from .storage import GIB

ResourceKind = Literal["volume", "snapshot", "droplet", "key", "tag"]
BILLED: frozenset[str] = frozenset(("volume", "snapshot", "droplet"))


def timestamp(seconds: float) -> str:
    """As the API writes times."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(eq=False, kw_only=True)
class Resource:
    """Anything with an identity that was created and may be deleted. Times are of the epoch, in seconds."""

    kind: ResourceKind
    id: str
    """For droplets and keys the decimal number, for tags the name."""
    name: str
    region: str = ""
    tags: list[str] = field(default_factory=list)
    decoy: bool = False
    """Put there by the test, not created through the API."""
    created: float = field(default_factory=time.time)
    deleted: float | None = None
    visible: float = 0.0
    """When lookups find it, in monotonic seconds; lists may be later."""
    listed: float = 0.0

    @property
    def billed(self) -> bool:
        """Whether it costs money while it exists."""
        return self.kind in BILLED

    def __repr__(self) -> str:
        """Short, for failing assertions."""
        return f"<{self.kind} {self.name!r} {self.id}{' decoy' if self.decoy else ''}>"


@dataclass(eq=False, kw_only=True, repr=False)
class Volume(Resource):
    """A volume; its contents are the file `path`, which tests may change at any time."""

    path: Path
    size_gib: int
    description: str = ""
    snapshot_id: str = ""
    droplet_id: str = ""
    """The droplet that it is attached to, or still counts as attached to."""
    snapshotted: float = 0.0
    """When the last snapshot was made, in monotonic seconds."""

    def grow(self, size_gib: int) -> None:
        """Make it larger; volumes never shrink."""
        if size_gib < self.size_gib:
            raise ValueError("volumes never shrink")
        with self.path.open("r+b") as file:
            file.truncate(size_gib * GIB)
        self.size_gib = size_gib

    def as_json(self) -> Json:
        """As the API shows it."""
        return {
            "id": self.id,
            "region": REGIONS[self.region].as_json(),
            "droplet_ids": [int(self.droplet_id)] if self.droplet_id else [],
            "name": self.name,
            "description": self.description,
            "size_gigabytes": self.size_gib,
            "created_at": timestamp(self.created),
            "filesystem_type": "",
            "filesystem_label": "",
            "tags": list(self.tags),
        }


@dataclass(eq=False, kw_only=True, repr=False)
class Snapshot(Resource):
    """A volume's snapshot; its contents are the file `path`."""

    path: Path
    volume_id: str
    size_gib: int
    resource_type: Literal["volume", "droplet"] = "volume"

    def as_json(self) -> Json:
        """As the API shows it."""
        return {
            "id": self.id,
            "name": self.name,
            "regions": [self.region],
            "created_at": timestamp(self.created),
            "resource_id": self.volume_id,
            "resource_type": self.resource_type,
            "min_disk_size": self.size_gib,
            "size_gigabytes": float(self.size_gib),
            "tags": list(self.tags),
        }


@dataclass(eq=False, kw_only=True, repr=False)
class Key(Resource):
    """A public SSH key of the account."""

    public_key: str

    @property
    def fingerprint(self) -> str:
        """The MD5 fingerprint, which the API takes for an id too."""
        digest = hashlib.md5(base64.b64decode(self.public_key.split()[1]), usedforsecurity=False).hexdigest()
        return ":".join(digest[i : i + 2] for i in range(0, 32, 2))

    def as_json(self) -> Json:
        """As the API shows it."""
        return {"id": int(self.id), "fingerprint": self.fingerprint, "public_key": self.public_key, "name": self.name}


@dataclass(eq=False, kw_only=True, repr=False)
class Tag(Resource):
    """A tag; what it is on, the cloud knows."""


@dataclass(eq=False, kw_only=True, repr=False)
class Droplet(Resource):
    """A droplet; `machine` is the real one behind it, unless it is a decoy or still being started."""

    size: str
    image: str
    status: Literal["new", "active", "off"] = "new"
    user_data: str = ""
    private_address: str = ""
    public_address: str = ""
    """As far as the API shows them."""
    has_keys: bool = True
    """Without any, DigitalOcean mails a root password."""
    machine: Machine | None = None
    running_actions: int = 0
    volume_ids: list[str] = field(default_factory=list)

    @property
    def bytes_sent(self) -> int:
        """What it has sent over the network so far; remembered after its end."""
        return self.machine.bytes_sent if self.machine else 0

    @property
    def address(self) -> str:
        """The address of the machine, whether the API shows it yet or not."""
        return self.machine.address if self.machine else self.public_address

    def kill(self) -> None:
        """Power it off, as by a failing host; it stays in the account, with status `off`, and is billed."""
        self.status = "off"
        if self.machine:
            self.machine.power_off()

    def cut(self) -> None:
        """Cut all its SSH connections; it takes new ones."""
        if self.machine:
            self.machine.cut()

    def stall(self) -> None:
        """From now on all packets to and from it are silently lost."""
        if self.machine:
            self.machine.stall()

    def resume(self) -> None:
        """Undo `stall`."""
        if self.machine:
            self.machine.resume()

    def as_json(self) -> Json:
        """As the API shows it."""
        size, image = SIZES[self.size], IMAGES[self.image]
        return {
            "id": int(self.id),
            "name": self.name,
            "memory": size.memory,
            "vcpus": size.vcpus,
            "disk": size.disk,
            "locked": self.status == "new",
            "status": self.status,
            "kernel": None,
            "created_at": timestamp(self.created),
            "features": ["private_networking", "droplet_agent"],
            "backup_ids": [],
            "next_backup_window": None,
            "snapshot_ids": [],
            "image": image.as_json(),
            "volume_ids": list(self.volume_ids),
            "size": size.as_json(),
            "size_slug": self.size,
            "networks": {"v4": self._networks(), "v6": []},
            "region": REGIONS[self.region].as_json(),
            "tags": list(self.tags),
            "vpc_uuid": "760e09ef-dc84-11e8-981e-3cfdfeaae000",
        }

    def _networks(self) -> list[Json]:
        """The private one first, as it may come."""
        shown = (("private", self.private_address), ("public", self.public_address))
        return [
            {
                "ip_address": address,
                "netmask": "255.255.240.0",
                "gateway": "" if network == "private" else f"{address.rpartition('.')[0]}.1",
                "type": network,
            }
            for network, address in shown
            if address
        ]


@dataclass(eq=False, kw_only=True)
class Action:
    """Something asynchronous."""

    id: int
    type: str
    resource_type: str
    region: str
    droplet_id: str = ""
    volume_id: str = ""
    status: Literal["in-progress", "completed", "errored"] = "in-progress"
    started: float = field(default_factory=time.time)
    completed: float | None = None

    def as_json(self) -> Json:
        """As the API shows it."""
        return {
            "id": self.id,
            "status": self.status,
            "type": self.type,
            "started_at": timestamp(self.started),
            "completed_at": timestamp(self.completed) if self.completed else None,
            "resource_id": int(self.droplet_id) if self.resource_type == "droplet" else None,
            "resource_type": self.resource_type,
            "region": REGIONS[self.region].as_json(),
            "region_slug": self.region,
        }
