"""The account and what can be done with it. It knows nothing of HTTP but the status and words of its refusals."""

from __future__ import annotations

import base64
import itertools
import math
import random
import re
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from .behaviour import Behaviour
from .catalogue import REGIONS, SIZES, Image, Json, find_image
from .clock import Clock
from .faults import Fault
from .machine import Machine, MachineOptions
from .resources import Action, Droplet, Key, Resource, Snapshot, Tag, Volume
from .storage import GIB, copy_sparse, create_sparse

R = TypeVar("R", bound=Resource)

_VOLUME_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")
_DROPLET_NAME = re.compile(r"[a-zA-Z0-9]?[a-z0-9A-Z.\-]*[a-z0-9A-Z]")
_TAG_NAME = re.compile(r"[a-zA-Z0-9_\-:]{1,255}")
_PUBLIC_KEY = re.compile(r"(ssh-(rsa|ed25519|dss)|ecdsa-sha2-nistp\d+|sk-\S+) [A-Za-z0-9+/]+=*( .*)?")
_USER_DATA_LIMIT = 64 * 1024
_MAX_VOLUME_GIB = 16384
_SNAPSHOT_TOO_SOON = "failed to create snapshot: this operation is rate-limited - one request per 10m0s"
_STILL_ATTACHED = "A volume that's attached to a Droplet cannot be deleted. Please detach it first before deleting."


class Refusal(Exception):
    """The API's answer to what cannot be done."""

    def __init__(self, status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        """Status, `id` (the reason) and `message` of the answer."""
        super().__init__(message)
        self.status, self.reason, self.message, self.headers = status, reason, message, headers or {}


def not_found() -> Refusal:
    """For what does not exist, or not yet, or not any more."""
    return Refusal(404, "not_found", "The resource you were accessing could not be found.")


def unprocessable(message: str) -> Refusal:
    """For a request that makes no sense."""
    return Refusal(422, "unprocessable_entity", message)


class Cloud:
    """All resources, living and dead, and the operations on them. Thread-safe."""

    def __init__(self, files: Path, behaviour: Behaviour, clock: Clock, mark: str) -> None:
        """An empty account whose volumes lie in `files`."""
        self.behaviour = behaviour
        self.lock = threading.RLock()
        self.ever: list[Resource] = []
        self.actions: dict[int, Action] = {}
        self._files = files
        self._clock = clock
        self._mark = mark
        self._machines = itertools.count(1)
        self._numbers = itertools.count(random.randrange(400_000_000, 500_000_000))

    # -- looking

    def living(self, kind: type[R]) -> list[R]:
        """All resources of a kind that exist, whether the API shows them yet or not."""
        with self.lock:
            return [item for item in self.ever if isinstance(item, kind) and item.deleted is None]

    def listed(self, kind: type[R]) -> list[R]:
        """Those that a list shows."""
        now = time.monotonic()
        return [item for item in self.living(kind) if item.listed <= now]

    def find(self, kind: type[R], identifier: str, *, fresh: bool = False) -> R:
        """A resource by its id; one that is too fresh only if asked for."""
        now = time.monotonic()
        for item in self.living(kind):
            if item.id == identifier and (fresh or item.visible <= now):
                return item
        raise not_found()

    def find_key(self, identifier: str, *, fresh: bool = False) -> Key:
        """A key by its id or fingerprint."""
        for key in self.living(Key):
            if key.fingerprint == identifier:
                return key
        return self.find(Key, identifier, fresh=fresh)

    # -- keys and tags

    def create_key(self, name: str, public_key: str, *, decoy: bool = False) -> Key:
        """Add a public key to the account."""
        public_key = public_key.strip()
        if not name:
            raise unprocessable("Name can't be blank")
        if not _PUBLIC_KEY.fullmatch(public_key) or not _is_base64(public_key.split()[1]):
            raise unprocessable("Key invalid, key should be of the format `type key [comment]`")
        with self.lock:
            if any(key.public_key.split()[1] == public_key.split()[1] for key in self.living(Key)):
                raise unprocessable("SSH Key is already in use on your account")
            key = Key(kind="key", id=self._number(), name=name, public_key=public_key, decoy=decoy)
            return self._add(key)

    def create_tag(self, name: str, *, decoy: bool = False) -> Tag:
        """A tag, new or the one that exists."""
        if not _TAG_NAME.fullmatch(name):
            raise unprocessable("Tag name may only contain letters, numbers, colons, dashes, and underscores")
        with self.lock:
            existing = next((tag for tag in self.living(Tag) if tag.name.lower() == name.lower()), None)
            return existing or self._add(Tag(kind="tag", id=name, name=name, decoy=decoy))

    def delete_tag(self, name: str) -> None:
        """Delete a tag, and take it off everything."""
        with self.lock:
            self._delete(self.find(Tag, name, fresh=True))
            for item in self.ever:
                item.tags = [tag for tag in item.tags if tag != name]

    def delete_key(self, identifier: str) -> None:
        """Delete a key; the droplets that have it keep it."""
        with self.lock:
            self._delete(self.find_key(identifier, fresh=True))

    def tag_resources(self, name: str, resources: Sequence[tuple[str, str]], *, remove: bool = False) -> None:
        """Put a tag on resources, given as type and id, or take it off."""
        kinds: dict[str, type[Resource]] = {"droplet": Droplet, "volume": Volume, "volume_snapshot": Snapshot}
        with self.lock:
            tag = self.find(Tag, name)
            for kind, identifier in resources:
                if kind not in kinds:
                    raise not_found()
                item = self.find(kinds[kind], identifier)
                item.tags = [other for other in item.tags if other != tag.name] + ([] if remove else [tag.name])

    # -- volumes and snapshots

    def create_volume(self, body: Json, *, decoy: bool = False) -> Volume:
        """A new volume, empty or from a snapshot."""
        name, region, size = body.get("name"), body.get("region"), body.get("size_gigabytes")
        self._check_volume_request(name, region, size)
        assert isinstance(name, str)
        assert isinstance(region, str)
        assert isinstance(size, int)
        with self.lock:
            snapshot = self._source_snapshot(body.get("snapshot_id") or "", region, size)
            self._check_volume_limits(name, region, 0 if decoy else size)
            identifier = str(uuid.uuid4())
            volume = Volume(
                kind="volume",
                id=identifier,
                name=name,
                region=region,
                tags=self._tags(body, decoy=decoy),
                decoy=decoy,
                path=self._files / f"volume-{identifier}",
                size_gib=size,
                description=body.get("description") or "",
                snapshot_id=snapshot.id if snapshot else "",
            )
            self._add(volume, hidden=True)
        if snapshot:
            copy_sparse(snapshot.path, volume.path, size * GIB)
        else:
            create_sparse(volume.path, size * GIB)
        return self._show(volume)

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume and its contents."""
        with self.lock:
            volume = self.find(Volume, volume_id, fresh=True)
            if volume.droplet_id:
                raise Refusal(409, "conflict", _STILL_ATTACHED)
            self._delete(volume)
        volume.path.unlink(missing_ok=True)

    def create_snapshot(self, volume_id: str, body: Json, *, decoy: bool = False) -> Snapshot:
        """A snapshot of a volume as it is now."""
        name = body.get("name")
        if not name or not isinstance(name, str):
            raise unprocessable("snapshot name is required")
        with self.lock:
            volume = self.find(Volume, volume_id)
            if not decoy:
                self._check_snapshot_limits(volume)
                volume.snapshotted = time.monotonic()
            identifier = str(uuid.uuid4())
            snapshot = Snapshot(
                kind="snapshot",
                id=identifier,
                name=name,
                region=volume.region,
                tags=self._tags(body, decoy=decoy),
                decoy=decoy,
                path=self._files / f"snapshot-{identifier}",
                volume_id=volume.id,
                size_gib=volume.size_gib,
            )
            self._add(snapshot, hidden=True)
        copy_sparse(volume.path, snapshot.path)
        return self._show(snapshot)

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete a snapshot; clones of it live on."""
        with self.lock:
            snapshot = self.find(Snapshot, snapshot_id, fresh=True)
            self._delete(snapshot)
        snapshot.path.unlink(missing_ok=True)

    def _check_volume_request(self, name: object, region: object, size: object) -> None:
        """Refuse what is wrong without looking at the account."""
        if not isinstance(name, str) or not _VOLUME_NAME.fullmatch(name):
            raise unprocessable(
                "name must be lowercase letters, digits and dashes, beginning with a letter, at most 64 characters"
            )
        if not isinstance(region, str) or region not in REGIONS:
            raise unprocessable("invalid region")
        if not REGIONS[region].available or not REGIONS[region].storage:
            raise unprocessable("region does not support volumes")
        if not isinstance(size, int) or not 1 <= size <= _MAX_VOLUME_GIB:
            raise unprocessable("invalid size_gigabytes: must be between 1 and 16384")

    def _check_volume_limits(self, name: str, region: str, size: int) -> None:
        """Refuse what the account has no room for."""
        volumes = self.living(Volume)
        if any(volume.name == name and volume.region == region for volume in volumes):
            raise Refusal(409, "conflict", "failed to create volume: already exists")
        used = sum(volume.size_gib for volume in volumes)
        if size and (used + size > self.behaviour.capacity_gib or len(volumes) >= self.behaviour.volume_limit):
            raise Refusal(403, "forbidden", "failed to create volume: capacity limit exceeded")

    def _source_snapshot(self, snapshot_id: str, region: str, size: int) -> Snapshot | None:
        """The snapshot that a new volume is made from."""
        if not snapshot_id:
            return None
        snapshot = self.find(Snapshot, snapshot_id)
        if snapshot.region != region:
            raise unprocessable("snapshot is not available in this region")
        if size < snapshot.size_gib:
            raise unprocessable(f"size_gigabytes must be at least the snapshot's {snapshot.size_gib}")
        return snapshot

    def _check_snapshot_limits(self, volume: Volume) -> None:
        """Refuse snapshots too soon or too many."""
        wait = volume.snapshotted + self.behaviour.snapshot_interval - time.monotonic()
        if volume.snapshotted and wait > 0:
            headers = {"retry-after": str(int(wait) + 1)} if self.behaviour.snapshot_retry_after else {}
            raise Refusal(429, "too_many_requests", _SNAPSHOT_TOO_SOON, headers)
        snapshots = self.living(Snapshot)
        of_volume = sum(snapshot.volume_id == volume.id for snapshot in snapshots)
        if of_volume >= self.behaviour.snapshots_per_volume or len(snapshots) >= self.behaviour.snapshot_limit:
            raise Refusal(403, "forbidden", "failed to create snapshot: snapshot limit exceeded")

    # -- droplets

    def create_droplet(
        self, body: Json, faults: Sequence[Fault] = (), *, decoy: bool = False
    ) -> tuple[Droplet, Action]:
        """A new droplet, and the action of its creation."""
        region, image = self._check_droplet_request(body, faults)
        keys = self._keys(body.get("ssh_keys") or [])
        with self.lock:
            if not decoy and len(self.living(Droplet)) >= self.behaviour.droplet_limit:
                raise unprocessable("creating this/these droplet(s) will exceed your droplet limit")
            droplet = Droplet(
                kind="droplet",
                id=self._number(),
                name=body["name"],
                region=region,
                tags=self._tags(body, decoy=decoy),
                decoy=decoy,
                size=body["size"],
                image=image.slug,
                user_data=body.get("user_data") or "",
                has_keys=bool(keys),
            )
            action = self._new_action("create", "droplet", region, droplet)
            self._add(droplet)
        if not decoy:
            public_keys = [key.public_key for key in keys]
            self._clock.launch(lambda: self._start(droplet, action, public_keys, faults, body.get("volumes") or []))
        return droplet, action

    def delete_droplet(self, droplet_id: str, *, keep_address: bool = False) -> None:
        """Delete a droplet; its volumes count as attached for a while. A kept address is nobody else's, and silent."""
        with self.lock:
            droplet = self.find(Droplet, droplet_id, fresh=True)
            self._delete(droplet)
            attached = [volume for volume in self.living(Volume) if volume.droplet_id == droplet.id]
        if droplet.machine and keep_address:
            droplet.machine.power_off()
        elif droplet.machine:
            droplet.machine.destroy()
        self._clock.after(self.behaviour.release_seconds, lambda: self._release(attached, droplet))

    def _release(self, volumes: Sequence[Volume], droplet: Droplet) -> None:
        """The cloud notices that these volumes' droplet is gone."""
        with self.lock:
            for volume in volumes:
                if volume.droplet_id == droplet.id:
                    volume.droplet_id = ""

    def _check_droplet_request(self, body: Json, faults: Sequence[Fault]) -> tuple[str, Image]:
        """Refuse what is wrong; the region and image are returned."""
        name, size, region = body.get("name"), body.get("size"), body.get("region") or "nyc3"
        if not isinstance(name, str) or len(name) > 255 or not _DROPLET_NAME.fullmatch(name):
            raise unprocessable("Only valid hostname characters are allowed. (a-z, A-Z, 0-9, . and -)")
        if not isinstance(size, str) or size not in SIZES:
            raise unprocessable("You specified an invalid size for Droplet creation.")
        if region not in REGIONS or not REGIONS[region].available:
            raise unprocessable("You specified an invalid region for Droplet creation.")
        image = find_image(body.get("image"))
        if image is None or image.status != "available":
            raise unprocessable("You specified an invalid image for Droplet creation.")
        if region not in image.regions:
            raise unprocessable("Image is not available in this region.")
        if region not in SIZES[size].regions or not SIZES[size].available or self._sold_out(size, faults):
            raise unprocessable("Size is not available in this region.")
        if len((body.get("user_data") or "").encode()) > _USER_DATA_LIMIT:
            raise unprocessable("User data is limited to 64 KiB.")
        return region, image

    def _sold_out(self, size: str, faults: Sequence[Fault]) -> bool:
        by_fault = any(fault.kind == "sold-out" and fault.size in ("", size) for fault in faults)
        return by_fault or size in self.behaviour.sold_out

    def _keys(self, identifiers: Sequence[object]) -> list[Key]:
        """The keys that a new droplet asks for."""
        try:
            return [self.find_key(str(identifier), fresh=True) for identifier in identifiers]
        except Refusal:
            raise unprocessable(f"{identifiers} are invalid key identifiers for Droplet creation.") from None

    def _start(
        self,
        droplet: Droplet,
        action: Action,
        public_keys: list[str],
        faults: Sequence[Fault],
        volume_ids: Sequence[str],
    ) -> None:
        """Start the machine of a droplet and let it become active in time."""
        begun = time.monotonic()
        if droplet.deleted is not None:
            return
        machine = self._boot(droplet, public_keys, faults)
        with self.lock:
            droplet.machine = machine
            too_late = droplet.deleted is not None
        if too_late:
            machine.destroy()
            return
        boot = self.behaviour.boot_seconds
        spent = time.monotonic() - begun
        kinds = {fault.kind for fault in faults}
        self._clock.after(boot / 2 - spent, lambda: self._show_private_address(droplet))
        if "creation-errored" in kinds:
            self._clock.after(boot - spent, lambda: self._finish(action, "errored"))
        if kinds & {"never-active", "creation-errored"}:
            return
        outcome: Literal["completed", "errored"] = "errored" if "action-errored" in kinds else "completed"
        if "action-stuck" not in kinds:
            self._clock.after(boot - spent, lambda: self._finish(action, outcome))
        self._clock.after(boot - spent, lambda: self._activate(droplet, faults, volume_ids))

    def _boot(self, droplet: Droplet, public_keys: list[str], faults: Sequence[Fault]) -> Machine:
        by_kind = {fault.kind: fault for fault in faults}
        cut, stall, python = by_kind.get("ssh-cut"), by_kind.get("ssh-stalled"), by_kind.get("python")
        deaf, slow = by_kind.get("ssh-deaf"), by_kind.get("ssh-slow")
        options = MachineOptions(
            own_host_key="wrong-host-key" not in by_kind,
            cut_after=cut.bytes if cut else 0,
            cut_connections=cut.times_on_droplet if cut else 0,
            stall_after=stall.bytes if stall else 0,
            stall_connections=stall.times_on_droplet if stall else 0,
            deaf_connections=deaf.times_on_droplet if deaf else 0,
            bytes_per_second=slow.bytes if slow else 0,
            largest_packet=by_kind["small-path"].bytes if "small-path" in by_kind else 0,
            python=python.text if python else "",
            sshd_config=by_kind["hardened"].text if "hardened" in by_kind else "",
            late_automount="late-automount" in by_kind,
            holds_devices="device-held" in by_kind,
        )
        log = self._files / f"droplet-{droplet.id}.log"
        return Machine(
            next(self._machines),
            droplet.name,
            mark=self._mark,
            user_data=droplet.user_data,
            public_keys=public_keys,
            log=log,
            options=options,
        )

    def _show_private_address(self, droplet: Droplet) -> None:
        if droplet.machine:
            droplet.private_address = droplet.machine.address.replace("10.78.", "10.79.", 1)

    def _activate(self, droplet: Droplet, faults: Sequence[Fault], volume_ids: Sequence[str]) -> None:
        """The droplet becomes active; addresses and SSH follow."""
        if droplet.deleted is not None:
            return
        droplet.status = "active"
        kinds = {fault.kind: fault for fault in faults}
        machine = droplet.machine
        assert machine is not None
        if "no-address" not in kinds:
            self._clock.after(self.behaviour.address_seconds, lambda: self._show_public_address(droplet))
        if "ssh-refused" not in kinds:
            self._clock.after(self.behaviour.ssh_seconds, machine.open_ssh)
        if "dies" in kinds:
            self._clock.after(kinds["dies"].seconds, droplet.kill)
        for volume_id in volume_ids:
            self._attach(self.find(Volume, volume_id), droplet)

    def _show_public_address(self, droplet: Droplet) -> None:
        if droplet.machine:
            droplet.public_address = droplet.machine.address

    # -- actions

    def volume_action(self, volume_id: str, body: Json, faults: Sequence[Fault] = ()) -> Action:
        """Begin to attach, detach or resize a volume."""
        kind = body.get("type")
        with self.lock:
            volume = self.find(Volume, volume_id)
            if body.get("region") and body["region"] != volume.region:
                raise unprocessable("volume is not in this region")
            if kind == "attach":
                return self._begin_attach(volume, self._droplet_of(body), faults)
            if kind == "detach":
                return self._begin_detach(volume, self._droplet_of(body), faults)
            if kind == "resize":
                return self._begin_resize(volume, body.get("size_gigabytes"))
        raise unprocessable("invalid action type")

    def _droplet_of(self, body: Json) -> Droplet:
        return self.find(Droplet, str(body.get("droplet_id")))

    def _begin_attach(self, volume: Volume, droplet: Droplet, faults: Sequence[Fault]) -> Action:
        if droplet.region != volume.region:
            raise unprocessable("Droplet and Volume are in different regions")
        if volume.droplet_id:
            raise unprocessable("This volume is already attached")
        self._check_idle(droplet)
        if len(droplet.volume_ids) >= self.behaviour.volumes_per_droplet:
            raise unprocessable("Droplet has reached the maximum number of attached volumes")
        return self._begin("attach", volume, droplet, faults, lambda: self._attach(volume, droplet))

    def _begin_detach(self, volume: Volume, droplet: Droplet, faults: Sequence[Fault]) -> Action:
        if volume.droplet_id != droplet.id:
            raise Refusal(422, "unprocessable_entity", "Attachment not found")
        self._check_idle(droplet)
        return self._begin("detach", volume, droplet, faults, lambda: self._detach(volume, droplet))

    def _begin_resize(self, volume: Volume, size: Any) -> Action:
        if not isinstance(size, int) or not volume.size_gib < size <= _MAX_VOLUME_GIB:
            raise unprocessable("size_gigabytes must be larger than the volume")
        volume.grow(size)
        action = self._new_action("resize", "volume", volume.region, None, volume)
        self._clock.after(self.behaviour.action_seconds, lambda: self._finish(action, "completed"))
        return action

    def _check_idle(self, droplet: Droplet) -> None:
        if droplet.running_actions:
            raise unprocessable("Droplet already has a pending event.")

    def _begin(self, kind: str, volume: Volume, droplet: Droplet, faults: Sequence[Fault], effect: Any) -> Action:
        """Start an action on a droplet that ends as the faults say."""
        kinds = {fault.kind for fault in faults}
        action = self._new_action(f"{kind}_volume", "backend", volume.region, droplet, volume)

        def end() -> None:
            if droplet.deleted is not None or "action-errored" in kinds:
                self._finish(action, "errored")
                return
            effect()
            self._finish(action, "completed")

        if "action-stuck" not in kinds:
            self._clock.after(self.behaviour.action_seconds, end)
        return action

    def _attach(self, volume: Volume, droplet: Droplet) -> None:
        """The attach has come about; the device follows. A droplet that is deleted at this moment gets no more."""
        with self.lock:
            if droplet.deleted is not None:
                return
            volume.droplet_id = droplet.id
            droplet.volume_ids.append(volume.id)
        self._clock.after(self.behaviour.device_seconds, lambda: self._plug(volume, droplet))

    def _plug(self, volume: Volume, droplet: Droplet) -> None:
        if volume.droplet_id == droplet.id and droplet.deleted is None and droplet.machine:
            droplet.machine.plug(volume.name, volume.path)

    def _detach(self, volume: Volume, droplet: Droplet) -> None:
        """The detach has come about."""
        with self.lock:
            volume.droplet_id = ""
            droplet.volume_ids.remove(volume.id)
        if droplet.machine:
            droplet.machine.unplug(volume.name)

    def _new_action(
        self, kind: str, resource_type: str, region: str, droplet: Droplet | None, volume: Volume | None = None
    ) -> Action:
        with self.lock:
            action = Action(
                id=int(self._number()),
                type=kind,
                resource_type=resource_type,
                region=region,
                droplet_id=droplet.id if droplet else "",
                volume_id=volume.id if volume else "",
            )
            self.actions[action.id] = action
            if droplet:
                droplet.running_actions += 1
            return action

    def _finish(self, action: Action, status: Literal["completed", "errored"]) -> None:
        with self.lock:
            action.status, action.completed = status, time.time()
            for droplet in self.ever:
                if isinstance(droplet, Droplet) and droplet.id == action.droplet_id:
                    droplet.running_actions -= 1

    # -- keeping the books

    def shut_down(self) -> None:
        """Power off all machines."""
        for item in self.ever:
            if isinstance(item, Droplet) and item.machine:
                item.machine.destroy()

    def _number(self) -> str:
        return str(next(self._numbers))

    def _tags(self, body: Json, *, decoy: bool = False) -> list[str]:
        """The tags of a request; those that do not exist are made, as DigitalOcean does."""
        tags = body.get("tags") or []
        for name in tags:
            self.create_tag(name, decoy=decoy)
        return list(tags)

    def _add(self, item: R, *, hidden: bool = False) -> R:
        """It exists from now on; `hidden`, nobody sees it before `_show`."""
        item.created += self.behaviour.clock_seconds
        self.ever.append(item)
        if not hidden:
            return self._show(item)
        item.visible = item.listed = math.inf
        return item

    def _show(self, item: R) -> R:
        """The API shows it, as soon as it shows fresh resources."""
        behaviour, now = self.behaviour, time.monotonic()
        item.visible = 0.0 if item.decoy else now + behaviour.fresh_seconds
        item.listed = 0.0 if item.decoy else now + behaviour.fresh_seconds + behaviour.list_lag_seconds
        return item

    def remove(self, item: Resource) -> None:
        """Delete it, whatever it is."""
        with self.lock:
            self._delete(item)

    def _delete(self, item: Resource) -> None:
        item.deleted = time.time() + self.behaviour.clock_seconds


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return True
