"""The simulator as tests use it."""

from __future__ import annotations

import base64
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from .behaviour import Behaviour
from .clock import Clock
from .cloud import Cloud
from .contract import Contract
from .faults import Faults
from .ownership import own_mark, sweep
from .resources import Droplet, Key, Resource, Snapshot, Tag, Volume
from .routes import Routes
from .server import Front, RequestRecord, Server, Token


class Simulator:
    """A DigitalOcean account. Use it as a context manager: at its end nothing of it is left on this machine.

    Several can run at once, in one process or in many.
    """

    def __init__(
        self,
        directory: str | Path,
        behaviour: Behaviour | None = None,
        openapi: str | Path | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        """Volumes lie below `directory`; with `openapi`, every call is checked against that document."""
        self.behaviour = behaviour or Behaviour()
        self.token = f"dop_v1_{secrets.token_hex(32)}"
        self.faults = Faults()
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        mark = own_mark()
        self._files = self._directory / f"{mark}-{secrets.token_hex(4)}"
        self._token = Token(self.token)
        self._clock = Clock()
        self._cloud = Cloud(self._files, self.behaviour, self._clock, mark)
        self._contract = Contract(Path(openapi) if openapi else None)
        front = Front(Routes(self._cloud), self.behaviour, self._token, self.faults, self._contract)
        self._server = Server((host, port), front)
        self.url = f"http://{host}:{self._server.server_address[1]}"

    def __enter__(self) -> Simulator:
        """Sweep what killed simulators left, and serve."""
        sweep(self._directory)
        self._files.mkdir()
        self._clock.start()
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove everything."""
        self._server.stop()
        self._clock.stop()
        self._cloud.shut_down()
        shutil.rmtree(self._files, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """The environment variable that leads clients here."""
        return {"DIGITALOCEAN_API_URL": self.url}

    # -- what has happened

    @property
    def requests(self) -> list[RequestRecord]:
        """All requests so far, oldest first."""
        return self._server.front.requests

    @property
    def ever(self) -> list[Resource]:
        """Every resource that ever existed, decoys too, oldest first."""
        return self._cloud.ever

    @property
    def violations(self) -> list[str]:
        """Calls and answers that are against the OpenAPI document, and errors of the simulator itself."""
        return self._contract.violations + self._server.front.errors + self._clock.errors

    def alive(self, *, decoys: bool = False) -> list[Resource]:
        """What was created through the API and still exists, but for tags, which are free and harmless.

        With `decoys`, what the test has put there too.
        """
        return [
            item
            for item in list(self._cloud.ever)
            if item.deleted is None and item.kind != "tag" and (decoys or not item.decoy)
        ]

    @property
    def droplets(self) -> list[Droplet]:
        """The droplets that exist and are not decoys."""
        return [droplet for droplet in self._cloud.living(Droplet) if not droplet.decoy]

    @property
    def volumes(self) -> list[Volume]:
        """The volumes that exist."""
        return self._cloud.living(Volume)

    @property
    def snapshots(self) -> list[Snapshot]:
        """The snapshots that exist."""
        return self._cloud.living(Snapshot)

    @property
    def lost_requests(self) -> int:
        """Requests that came over connections that were forgotten, and were lost."""
        return self._server.front.lost

    # -- limits

    def limit_snapshots(self, interval: float, *, retry_after: bool = False) -> None:
        """From now on a volume's next snapshot is refused until so many seconds after its last one."""
        self.behave(replace(self.behaviour, snapshot_interval=interval, snapshot_retry_after=retry_after))

    def limit_volumes(self, count: int) -> None:
        """From now on the account has at most so many volumes."""
        self.behave(replace(self.behaviour, volume_limit=count))

    def behave(self, behaviour: Behaviour) -> None:
        """From now on the account's delays and limits are these; but for those of requests."""
        self.behaviour = self._cloud.behaviour = behaviour

    # -- the token

    def token_lacks(self, *scopes: str) -> None:
        """From now on the token lacks these scopes, e.g. "droplet:delete"; without any, it has them all again."""
        self._token.lacking = set(scopes)

    def revoke_token(self, revoked: bool = True) -> None:
        """From now on the token is refused."""
        self._token.revoked = revoked

    # -- what was there before

    def add_volume(self, name: str, region: str = "fra1", size_gib: int = 1, tags: Sequence[str] = ()) -> Volume:
        """A volume full of zeros that exists already; write into its `path` at any time."""
        request = {"name": name, "region": region, "size_gigabytes": size_gib, "tags": list(tags)}
        return self._cloud.create_volume(request, decoy=True)

    def add_snapshot(self, volume: Volume, name: str, tags: Sequence[str] = ()) -> Snapshot:
        """A snapshot that exists already; it does not count for the interval."""
        return self._cloud.create_snapshot(volume.id, {"name": name, "tags": list(tags)}, decoy=True)

    def add_droplet(
        self,
        name: str,
        tags: Sequence[str] = (),
        region: str = "fra1",
        size: str = "s-1vcpu-1gb",
        image: str = "debian-12-x64",
        volumes: Sequence[Volume] = (),
    ) -> Droplet:
        """An active droplet that exists already, with volumes attached; there is no machine behind it."""
        request = {"name": name, "tags": list(tags), "region": region, "size": size, "image": image}
        droplet, action = self._cloud.create_droplet(request, decoy=True)
        action.status, droplet.running_actions, droplet.status = "completed", 0, "active"
        droplet.private_address, droplet.public_address = "10.135.0.2", "203.0.113.10"
        for volume in volumes:
            volume.droplet_id = droplet.id
            droplet.volume_ids.append(volume.id)
        return droplet

    def add_key(self, name: str, public_key: str = "") -> Key:
        """A public key that exists already in the account; a random one if none is given."""
        return self._cloud.create_key(name, public_key or _random_public_key(), decoy=True)

    def add_tag(self, name: str) -> Tag:
        """A tag that exists already."""
        return self._cloud.create_tag(name, decoy=True)

    def remove_droplet(self, droplet: Droplet) -> None:
        """Somebody deletes a droplet, in the control panel or elsewhere; nobody answers at its address."""
        self._cloud.delete_droplet(droplet.id, keep_address=True)

    def remove_volume(self, volume: Volume) -> None:
        """The user deletes a volume."""
        self._cloud.delete_volume(volume.id)


def _random_public_key() -> str:
    kind = b"ssh-ed25519"
    blob = len(kind).to_bytes(4, "big") + kind + (32).to_bytes(4, "big") + secrets.token_bytes(32)
    return f"ssh-ed25519 {base64.b64encode(blob).decode()} decoy"
