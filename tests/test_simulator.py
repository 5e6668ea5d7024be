"""The simulator itself, driven by DigitalOcean's official client and real SSH."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paramiko
import pydo
import pytest
import requests
import yaml
from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import HttpResponseError
from azure.core.pipeline.policies import AzureKeyCredentialPolicy, RetryPolicy
from simulator import FOREVER, Behaviour, Fault, Simulator, Volume

PATIENCE = 60.0
RULE = "/etc/udev/rules.d/99-digitalocean-automount.rules"
FAST = Behaviour(
    boot_seconds=0.05,
    address_seconds=0.01,
    ssh_seconds=0.02,
    action_seconds=0.03,
    device_seconds=0.02,
    release_seconds=0.05,
)


@pytest.fixture
def simulator(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Simulator]:
    """A running account, with the changes of behaviour that `behaving` gives; it must leave nothing behind."""
    behaviour = replace(FAST, **getattr(request, "param", {}))
    with Simulator(tmp_path, behaviour, os.environ.get("DIGITALOCEAN_OPENAPI") or None) as running:
        yield running
    assert running.violations == []
    with contextlib.suppress(AssertionError):  # a mount goes when the kernel gets round to its namespace
        until(lambda: not footprint(tmp_path))
    assert footprint(tmp_path) == []


def behaving(**changes: Any) -> pytest.MarkDecorator:
    """Change the behaviour of a test's simulator."""
    return pytest.mark.parametrize("simulator", [changes], indirect=True, ids=["changed"])


def footprint(directory: Path) -> list[str]:
    """What simulators in `directory` and of this process have on this machine."""
    loops = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it was another test's, and is free by now
            loops.append(path.read_text())
    return [
        *(str(path) for path in directory.iterdir()),
        *(path for path in loops if path.startswith(str(directory))),
        *machine_processes(os.getpid()),
    ]


def machine_processes(owner: int) -> list[str]:
    """The processes that are the roots of a simulator's droplets."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [command for command in found if "machine_init.py" in command and f"-{owner}-" in command]


STATUSES: list[int] = []  # of the answers that the clients have got


def client(simulator: Simulator, token: str = "") -> Any:
    """DigitalOcean's own client; it insists on TLS unless the header is put there by hand."""
    policy = AzureKeyCredentialPolicy(AzureKeyCredential(token or simulator.token), "Authorization", prefix="Bearer")
    return pydo.Client(
        "unused",
        endpoint=simulator.url,
        authentication_policy=policy,
        retry_policy=RetryPolicy.no_retries(),
        raw_response_hook=lambda response: STATUSES.append(response.http_response.status_code),
    )


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something to become true, and return it."""
    give_up = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.01)
    return found


def refusal(call: Callable[[], Any]) -> tuple[int, str]:
    """Status and message with which the API refuses a call.

    The client raises for some refusals, and returns the body of others as if all was well: a 404, and a 400 too.
    """
    STATUSES.clear()
    try:
        answer = call()
    except HttpResponseError as error:
        response: Any = error.response
        answer = response.json()
    assert STATUSES[-1] >= 400, answer
    assert answer["request_id"]
    return STATUSES[-1], answer["message"]


@dataclass(frozen=True)
class Keys:
    """The client's key and the droplet's."""

    login: paramiko.PKey
    host: paramiko.PKey

    @classmethod
    def fresh(cls) -> Keys:
        """New ones."""
        return cls(paramiko.ECDSAKey.generate(), paramiko.ECDSAKey.generate())

    @property
    def public(self) -> str:
        """The client's public key, as the API takes it."""
        return f"{self.login.get_name()} {self.login.get_base64()}"

    def user_data(self, *, disarmed: bool = True) -> str:
        """A cloud-config with the host key."""
        private = io.StringIO()
        self.host.write_private_key(private)
        public = f"{self.host.get_name()} {self.host.get_base64()}"
        config = {
            "disable_root": False,
            "ssh_keys": {"ecdsa_private": private.getvalue(), "ecdsa_public": public},
            "bootcmd": [["rm", "-f", RULE]] if disarmed else [],
        }
        return "#cloud-config\n" + yaml.safe_dump(config)


def create_droplet(api: Any, keys: Keys, **changes: Any) -> int:
    """The id of a new droplet with our keys."""
    found = [key for key in api.ssh_keys.list()["ssh_keys"] if key["public_key"] == keys.public]
    key = found[0] if found else api.ssh_keys.create({"name": "ours", "public_key": keys.public})["ssh_key"]
    body = {
        "name": "worker",
        "region": "fra1",
        "size": "s-1vcpu-512mb-10gb",
        "image": "debian-12-x64",
        "ssh_keys": [key["id"]],
        "user_data": keys.user_data(),
        "tags": ["ours"],
        **changes,
    }
    return int(api.droplets.create(body)["droplet"]["id"])


def public_address(api: Any, droplet_id: int) -> str:
    """The public address, once it is there."""

    def address() -> Any:
        networks = api.droplets.get(droplet_id)["droplet"]["networks"]["v4"]
        return next((network["ip_address"] for network in networks if network["type"] == "public"), None)

    return str(until(address))


def connect(address: str, keys: Keys) -> paramiko.SSHClient:
    """Log in, with the host key checked, as soon as sshd is there."""

    def attempt() -> paramiko.SSHClient | None:
        ssh = paramiko.SSHClient()
        ssh.get_host_keys().add(address, keys.host.get_name(), keys.host)
        try:
            ssh.connect(
                address, username="root", pkey=keys.login, allow_agent=False, look_for_keys=False, timeout=PATIENCE
            )
        except paramiko.ssh_exception.NoValidConnectionsError:
            return None
        return ssh

    found: paramiko.SSHClient = until(attempt)
    return found


def run(ssh: paramiko.SSHClient, command: str) -> bytes:
    """What a command prints on the droplet."""
    return bytes(ssh.exec_command(command, timeout=PATIENCE)[1].read())


def is_over(ssh: paramiko.SSHClient) -> bool:
    """Whether the connection has ended."""
    transport = ssh.get_transport()
    return transport is None or not transport.is_active()


def act(api: Any, volume_id: str, droplet_id: int, kind: str) -> str:
    """Attach or detach a volume and wait; the action's last status."""
    body = {"type": kind, "droplet_id": droplet_id, "region": "fra1"}
    action = api.volume_actions.post_by_id(volume_id, body)["action"]

    def status() -> Any:
        found = api.volume_actions.get(volume_id, action["id"])["action"]["status"]
        return found != "in-progress" and found

    return str(until(status))


def write(volume: Volume, offset: int, data: bytes) -> None:
    """Change a volume's contents."""
    with volume.path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def clone_of(api: Any, volume: Volume, name: str = "clone") -> str:
    """The id of a clone of a volume as it is now."""
    snapshot = api.volume_snapshots.create(volume.id, {"name": f"of-{name}"})["snapshot"]
    request = {"name": name, "region": "fra1", "size_gigabytes": volume.size_gib, "snapshot_id": snapshot["id"]}
    clone = api.volumes.create(request)["volume"]
    api.snapshots.delete(snapshot["id"])
    return str(clone["id"])


# -- the whole life


def test_whole_life_of_a_backup(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    volume = simulator.add_volume("data")
    write(volume, 4096, b"as it was")
    droplet_id = create_droplet(api, keys)
    snapshot = api.volume_snapshots.create(volume.id, {"name": "now", "tags": ["ours"]})["snapshot"]
    write(volume, 4096, b"changed!!")
    request = {"name": "clone", "region": "fra1", "size_gigabytes": 1, "snapshot_id": snapshot["id"], "tags": ["ours"]}
    clone = api.volumes.create(request)["volume"]
    api.snapshots.delete(snapshot["id"])
    address = public_address(api, droplet_id)
    assert act(api, clone["id"], droplet_id, "attach") == "completed"
    assert api.volumes.get(clone["id"])["volume"]["droplet_ids"] == [droplet_id]

    with connect(address, keys) as ssh:
        device = "/dev/disk/by-id/scsi-0DO_Volume_clone"
        until(lambda: run(ssh, f"test -b {device} && echo there"))
        assert run(ssh, f"dd if={device} skip=4096 bs=1 count=9 2>/dev/null") == b"as it was"
        assert run(ssh, f"blockdev --getsize64 {device}") == b"%d\n" % 1024**3
        assert run(ssh, "hostname; command -v python3") == b"worker\n/usr/bin/python3\n"
        assert b"/dev/loop" not in run(ssh, "cat /proc/mounts")
        assert run(ssh, f"blockdev --setro {device}; blockdev --getro {device}") == b"1\n"
        run(ssh, "head -c 1000000 /dev/zero")
        assert simulator.droplets[0].bytes_sent > 1_000_000
        assert act(api, clone["id"], droplet_id, "detach") == "completed"
        assert run(ssh, f"test -e {device} || echo gone") == b"gone\n"

    api.volumes.delete(clone["id"])
    api.droplets.destroy(droplet_id)
    for key in api.ssh_keys.list()["ssh_keys"]:
        api.ssh_keys.delete(key["id"])
    assert simulator.alive() == []
    assert [item for item in simulator.ever if item.billed and not item.decoy and item.deleted is None] == []
    assert refusal(lambda: api.droplets.get(droplet_id))[0] == 404
    assert all(simulator.token not in repr(request) for request in simulator.requests)
    assert "pydo" in simulator.requests[0].headers["user-agent"]
    assert machine_processes(os.getpid()) == []


def test_snapshots_keep_their_moment_and_their_holes(simulator: Simulator) -> None:
    volume = simulator.add_volume("data", size_gib=50)
    write(volume, 0, b"first")
    write(volume, 40 * 1024**3, b"far away")
    snapshot = simulator.add_snapshot(volume, "then")
    write(volume, 0, b"second")
    volume.grow(60)
    with snapshot.path.open("rb") as file:
        assert file.read(6) == b"first\0"
        file.seek(40 * 1024**3)
        assert file.read(8) == b"far away"
    assert snapshot.path.stat().st_blocks * 512 < 1024**2
    assert snapshot.path.stat().st_size == 50 * 1024**3


# -- lists


def test_lists_are_paged(simulator: Simulator) -> None:
    for number in range(45):
        simulator.add_volume(f"volume-{number}", tags=["many"] if number % 2 else [])
    api = client(simulator)
    first = api.volumes.list()
    assert (len(first["volumes"]), first["meta"]["total"]) == (20, 45)
    assert {volume["tags"] is None for volume in first["volumes"]} == {True, False}
    names: list[str] = []
    url: str | None = f"{simulator.url}/v2/volumes"
    while url:
        page = requests.get(url, headers={"Authorization": f"Bearer {simulator.token}"}, timeout=PATIENCE).json()
        names += [volume["name"] for volume in page["volumes"]]
        url = page["links"].get("pages", {}).get("next")
    assert names == [f"volume-{number}" for number in range(45)]
    assert len(api.volumes.list(per_page=200)["volumes"]) == 45
    assert len(api.volumes.list(name="volume-7", region="fra1")["volumes"]) == 1
    assert refusal(lambda: api.volumes.list(per_page=201))[0] == 422


def test_what_is_on_offer(simulator: Simulator) -> None:
    api = client(simulator)
    assert api.account.get()["account"]["status"] == "active"
    regions = api.regions.list()["regions"]
    assert any("storage" not in region["features"] for region in regions)
    assert any(not region["available"] for region in regions)
    assert all("price_hourly" in size for size in api.sizes.list()["sizes"])
    images = {image["slug"]: image for image in api.images.list(type="distribution")["images"]}
    assert images["debian-10-x64"]["status"] == "retired"
    assert "blr1" not in images["debian-13-x64"]["regions"]


def test_tags(simulator: Simulator) -> None:
    api = client(simulator)
    decoy = simulator.add_droplet("web", tags=["ours"])
    simulator.add_volume("data", tags=["ours"])
    simulator.add_key("laptop")
    assert api.tags.get("ours")["tag"]["resources"]["droplets"]["count"] == 1
    assert [found["name"] for found in api.droplets.list(tag_name="ours")["droplets"]] == ["web"]
    resources = {"resources": [{"resource_id": decoy.id, "resource_type": "droplet"}]}
    api.tags.unassign_resources("ours", resources)
    assert api.droplets.list(tag_name="ours")["droplets"] == []
    api.tags.assign_resources("ours", resources)
    api.droplets.destroy_by_tag(tag_name="ours")
    assert decoy.deleted is not None
    api.tags.create({"name": "another"})
    api.tags.delete("another")
    assert [tag["name"] for tag in api.tags.list()["tags"]] == ["ours"]


def test_what_describes_a_volume(simulator: Simulator) -> None:
    api = client(simulator)
    request = {"name": "data", "region": "fra1", "size_gigabytes": 1, "description": "restored by somebody"}
    made = api.volumes.create(request)["volume"]
    assert made["description"] == "restored by somebody"
    assert [volume["description"] for volume in api.volumes.list()["volumes"]] == ["restored by somebody"]
    limits = api.account.get()["account"]
    assert (limits["volume_limit"], limits["droplet_limit"]) == (100, 25)


# -- refusals


def test_calls_that_can_do_nothing_tell_whether_they_are_allowed(simulator: Simulator) -> None:
    api = client(simulator)
    nothing, tags = "00000000-0000-0000-0000-000000000000", {"tags": ["ours"]}
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "block_storage:create": (lambda: api.volumes.create(tags), 422),
        "block_storage:delete": (lambda: api.volumes.delete(nothing), 404),
        "block_storage_action:create": (lambda: api.volume_actions.post_by_id(nothing, tags), 404),
        "block_storage_action:read": (lambda: api.volume_actions.get(nothing, 0), 404),
        "droplet:create": (lambda: api.droplets.create(tags), 422),
        "droplet:delete": (lambda: api.droplets.destroy(0), 404),
        "ssh_key:create": (lambda: api.ssh_keys.create(tags), 422),
        "ssh_key:delete": (lambda: api.ssh_keys.delete(0), 404),
        "actions:read": (lambda: api.actions.get(0), 404),
    }
    for scope, (call, status) in calls.items():
        assert refusal(call)[0] == status, scope
        simulator.token_lacks(scope)
        assert refusal(call)[0] == 403, scope
        simulator.token_lacks()
    assert not simulator.ever


def test_refusals_without_a_droplet(simulator: Simulator) -> None:
    api = client(simulator)
    key = simulator.add_key("laptop")
    volume = simulator.add_volume("data")
    request = {"name": "data", "region": "fra1", "size_gigabytes": 1}
    assert refusal(lambda: api.volumes.create(request))[0] == 409
    assert refusal(lambda: api.volumes.create({**request, "name": "Data"}))[0] == 422
    assert refusal(lambda: api.volumes.create({**request, "name": "a" * 65}))[0] == 422
    assert refusal(lambda: api.volumes.create({**request, "region": "sfo1"}))[0] == 422
    assert refusal(lambda: api.volumes.create({**request, "name": "huge", "size_gigabytes": 16384}))[0] != 201
    assert api.volumes.create({**request, "region": "nyc3"})["volume"]["name"] == "data"
    again = {"name": "again", "public_key": key.public_key}
    assert refusal(lambda: api.ssh_keys.create(again)) == (422, "SSH Key is already in use on your account")
    assert refusal(lambda: api.ssh_keys.create({"name": "bad", "public_key": "nonsense"}))[0] == 422
    droplet = {"name": "x", "region": "fra1", "size": "s-1vcpu-1gb", "image": "debian-12-x64"}
    for wrong in (
        {"size": "512mb"},
        {"size": "no-such-size"},
        {"image": "debian-10-x64"},
        {"image": "debian-13-x64", "region": "blr1"},
        {"region": "nyc2"},
        {"name": "no spaces"},
        {"ssh_keys": [1]},
        {"user_data": "x" * 70_000},
    ):
        assert refusal(lambda wrong=wrong: api.droplets.create({**droplet, **wrong}))[0] == 422  # type: ignore[misc]
    simulator.remove_volume(volume)
    assert refusal(lambda: api.volumes.delete(volume.id))[0] == 404


@behaving(snapshot_interval=600, snapshots_per_volume=3)
def test_one_snapshot_per_volume_in_ten_minutes(simulator: Simulator) -> None:
    api = client(simulator)
    volume, other = simulator.add_volume("data"), simulator.add_volume("other")
    api.volume_snapshots.create(volume.id, {"name": "one"})
    status, message = refusal(lambda: api.volume_snapshots.create(volume.id, {"name": "two"}))
    assert status == 429
    assert message == "failed to create snapshot: this operation is rate-limited - one request per 10m0s"
    for number in range(3):
        simulator.add_snapshot(other, f"old-{number}")
    assert refusal(lambda: api.volume_snapshots.create(other.id, {"name": "four"}))[0] == 403
    assert len(api.volume_snapshots.list(other.id)["snapshots"]) == 3
    assert len(api.snapshots.list(resource_type="volume")["snapshots"]) == 4


@behaving(boot_seconds=4, action_seconds=4, release_seconds=4)
def test_conflicts_of_attachments(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    first, second = simulator.add_volume("first"), simulator.add_volume("second")
    elsewhere = simulator.add_volume("elsewhere", region="nyc3")
    droplet_id = create_droplet(api, keys)
    attach = {"type": "attach", "droplet_id": droplet_id}
    pending = (422, "Droplet already has a pending event.")
    assert refusal(lambda: api.volume_actions.post_by_id(first.id, attach)) == pending
    public_address(api, droplet_id)
    assert refusal(lambda: api.volume_actions.post_by_id(elsewhere.id, attach))[0] == 422
    api.volume_actions.post_by_id(first.id, attach)
    assert refusal(lambda: api.volume_actions.post_by_id(second.id, attach)) == pending
    until(lambda: first.droplet_id)
    already = (422, "This volume is already attached")
    assert refusal(lambda: api.volume_actions.post_by_id(first.id, attach)) == already
    detach = {"type": "detach", "droplet_id": droplet_id}
    assert refusal(lambda: api.volume_actions.post_by_id(second.id, detach))[1] == "Attachment not found"
    assert refusal(lambda: api.volumes.delete(first.id))[0] == 409
    api.droplets.destroy(droplet_id)
    assert refusal(lambda: api.volumes.delete(first.id))[0] == 409
    until(lambda: not first.droplet_id)
    api.volumes.delete(first.id)


def test_token_scopes_and_revocation(simulator: Simulator) -> None:
    api = client(simulator)
    simulator.token_lacks("tag:read")
    assert api.droplets.list()["droplets"] == []
    assert refusal(lambda: api.droplets.list(tag_name="x"))[0] == 403
    simulator.token_lacks()
    assert api.droplets.list(tag_name="x")["droplets"] == []
    assert refusal(client(simulator, "wrong").account.get)[0] == 401
    simulator.revoke_token()
    assert refusal(api.account.get) == (401, "Unable to authenticate you")


@behaving(fresh_seconds=1000, requests_per_minute=20, key_lists_per_minute=1)
def test_lagging_and_limited(simulator: Simulator) -> None:
    api = client(simulator)
    volume = api.volumes.create({"name": "fresh", "region": "fra1", "size_gigabytes": 1})["volume"]
    assert refusal(lambda: api.volumes.get(volume["id"]))[0] == 404
    assert api.volumes.list()["volumes"] == []
    simulator.volumes[0].visible = simulator.volumes[0].listed = 0.0
    assert api.volumes.list()["volumes"]
    api.ssh_keys.list()
    assert refusal(api.ssh_keys.list)[0] == 429
    while len(simulator.requests) < 20:
        api.account.get()
    assert refusal(api.account.get)[0] == 429


# -- faults


def test_an_answer_that_trickles(simulator: Simulator) -> None:
    """Each byte comes well within a time limit, and the call takes effect."""
    key = simulator.add_key("mine")
    simulator.faults.add(Fault("trickle", seconds=0.002))
    address = urllib.parse.urlsplit(simulator.url)
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE) as connection:
        request = f"DELETE /v2/account/keys/{key.id} HTTP/1.1\r\nAuthorization: Bearer {simulator.token}\r\n\r\n"
        connection.sendall(request.encode())
        received = b""
        while len(received) < 500:
            received += connection.recv(500)
    assert received.startswith(b"HTTP/1.1 204 ")
    assert received.endswith(b"x" * 100)
    assert key.deleted


def test_faults_of_calls(simulator: Simulator) -> None:
    api = client(simulator)
    get = {"Authorization": f"Bearer {simulator.token}"}
    account = f"{simulator.url}/v2/account"
    simulator.faults.add(Fault("error", path="account$", status=503, times=2))
    assert [requests.get(account, headers=get, timeout=PATIENCE).status_code for _ in range(3)] == [503, 503, 200]
    simulator.faults.clear()
    simulator.faults.add(Fault("lost", method="POST", path="/volumes$"))
    with pytest.raises(requests.ConnectionError):
        requests.post(
            f"{simulator.url}/v2/volumes",
            json={"name": "orphan", "region": "fra1", "size_gigabytes": 1},
            headers=get,
            timeout=PATIENCE,
        )
    assert [volume["name"] for volume in api.volumes.list()["volumes"]] == ["orphan"]
    simulator.faults.add(
        Fault("malformed", nth=1), Fault("html", nth=2), Fault("redirect", nth=3), Fault("rate-limit", nth=4, seconds=7)
    )
    simulator.faults.add(Fault("rate-limit-reset", nth=5, seconds=60), Fault("missing", nth=6))
    malformed, html, redirect, limited, reset, missing = (
        requests.get(account, headers=get, timeout=PATIENCE, allow_redirects=False) for _ in range(6)
    )
    with pytest.raises(requests.JSONDecodeError):
        malformed.json()
    assert "<html>" in html.text
    assert redirect.headers["location"].startswith("http://elsewhere.invalid/")
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "7")
    assert "retry-after" not in reset.headers
    assert int(reset.headers["ratelimit-reset"]) > time.time() + 5
    assert missing.status_code == 404
    odd = Fault("odd", path="/volumes$", text='{"links": 1, "volumes": {"size_gigabytes": "one"}}')
    simulator.faults.add(odd, Fault("rate-limit", path="account$", text="-5"))
    answer = requests.get(f"{simulator.url}/v2/volumes", headers=get, timeout=PATIENCE).json()
    assert (answer["links"], answer["volumes"][0]["size_gigabytes"]) == (1, "one")
    assert answer["volumes"][0]["name"] == "orphan"
    assert requests.get(account, headers=get, timeout=PATIENCE).headers["retry-after"] == "-5"
    simulator.faults.add(Fault("error", call=len(simulator.requests) + 2))
    assert [requests.get(account, headers=get, timeout=PATIENCE).status_code for _ in range(3)] == [200, 500, 200]


def test_faults_of_actions_and_sizes(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    volume = simulator.add_volume("data")
    simulator.faults.add(Fault("sold-out", size="s-1vcpu-512mb-10gb", times=FOREVER))
    assert refusal(functools.partial(create_droplet, api, keys)) == (422, "Size is not available in this region.")
    simulator.faults.add(Fault("action-errored", path="/volumes/"), Fault("action-stuck", path="/volumes/", nth=2))
    droplet_id = create_droplet(api, keys, size="s-1vcpu-1gb")
    public_address(api, droplet_id)
    assert act(api, volume.id, droplet_id, "attach") == "errored"
    api.volume_actions.post_by_id(volume.id, {"type": "attach", "droplet_id": droplet_id})
    time.sleep(3 * FAST.action_seconds)
    assert refusal(lambda: act(api, volume.id, droplet_id, "attach"))[0] == 422
    api.droplets.destroy(droplet_id)


def test_droplets_that_never_come_up(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    simulator.faults.add(Fault("never-active"), Fault("no-address", nth=2), Fault("ssh-refused", nth=3))
    asleep, nameless, deaf = (create_droplet(api, keys, name=name) for name in ("asleep", "nameless", "deaf"))
    address = public_address(api, deaf)
    until(lambda: api.droplets.get(nameless)["droplet"]["status"] == "active")
    assert api.droplets.get(asleep)["droplet"]["status"] == "new"
    assert len(api.droplets.get(nameless)["droplet"]["networks"]["v4"]) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, 22), timeout=PATIENCE)


def test_faults_of_connections(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    simulator.faults.add(
        Fault("ssh-cut", bytes=100_000), Fault("wrong-host-key", nth=2), Fault("python", nth=3, text="echo")
    )
    cut, wrong, lying = (create_droplet(api, keys, name=name) for name in ("cut", "wrong", "lying"))
    address = public_address(api, cut)
    with connect(address, keys) as ssh:
        assert 50_000 < len(run(ssh, "head -c 1000000 /dev/zero")) < 100_000
    with connect(address, keys) as ssh:
        assert len(run(ssh, "head -c 1000000 /dev/zero")) == 1_000_000
    with pytest.raises(paramiko.BadHostKeyException):
        connect(public_address(api, wrong), keys)
    with connect(public_address(api, lying), keys) as ssh:
        assert run(ssh, "python3 -c 1") == b"-c 1\n"


def test_a_droplet_that_opens_a_channel_and_hears_nothing_more(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    simulator.faults.add(Fault("ssh-deaf"))
    address = public_address(api, create_droplet(api, keys))
    with connect(address, keys) as ssh:
        transport = ssh.get_transport()
        assert transport is not None
        channel = transport.open_session(timeout=PATIENCE)
        closed_at = time.monotonic() + 0.5
        threading.Timer(0.5, transport.close).start()
        with pytest.raises((paramiko.SSHException, EOFError, OSError)):  # whichever notices first that it was closed
            channel.exec_command("echo heard")
        assert time.monotonic() >= closed_at
    with connect(address, keys) as ssh:
        assert run(ssh, "echo heard") == b"heard\n"


def test_droplets_that_fall_silent_or_die(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    address = public_address(api, create_droplet(api, keys))
    droplet = simulator.droplets[0]
    with connect(address, keys) as ssh:
        droplet.stall()
        with pytest.raises(TimeoutError):
            socket.create_connection((address, 22), timeout=0.3)
        droplet.resume()
        assert run(ssh, "echo alive") == b"alive\n"
        droplet.cut()
        until(functools.partial(is_over, ssh))
    with connect(address, keys) as ssh:
        droplet.kill()
        until(functools.partial(is_over, ssh))
    assert api.droplets.get(int(droplet.id))["droplet"]["status"] == "off"
    with pytest.raises(TimeoutError):
        socket.create_connection((address, 22), timeout=0.3)


def test_droplets_that_fall_silent_or_die_by_themselves(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    simulator.faults.add(Fault("ssh-stalled", bytes=100_000), Fault("dies", nth=2, seconds=20))
    silent, mortal = (create_droplet(api, keys, name=name) for name in ("silent", "mortal"))
    with connect(public_address(api, mortal), keys) as ssh:
        until(functools.partial(is_over, ssh))
    with connect(public_address(api, silent), keys) as ssh:
        channel = ssh.exec_command("head -c 1000000 /dev/zero", timeout=PATIENCE)[1].channel
        channel.settimeout(0.5)
        with pytest.raises(TimeoutError):
            channel.makefile("rb").read()
        assert not is_over(ssh)


# -- the machine's own ways


def test_root_login_is_refused_unless_allowed(simulator: Simulator) -> None:
    api, keys = client(simulator), Keys.fresh()
    user_data = keys.user_data().replace("disable_root: false", "disable_root: true")
    address = public_address(api, create_droplet(api, keys, user_data=user_data))
    with connect(address, keys) as ssh:
        assert b"Please login as" in run(ssh, "echo in")


@pytest.mark.parametrize("disarmed", [True, False])
def test_automount_writes_to_the_clone_unless_disarmed(simulator: Simulator, disarmed: bool) -> None:
    api, keys = client(simulator), Keys.fresh()
    volume = simulator.add_volume("data")
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1", volume.path, "64M"], check=True)
    write(volume, 1024**3 - 14, b"DO_FIRST_MOUNT")
    droplet_id = create_droplet(api, keys, user_data=keys.user_data(disarmed=disarmed))
    address = public_address(api, droplet_id)
    clone_id = clone_of(api, volume)
    act(api, clone_id, droplet_id, "attach")
    with connect(address, keys) as ssh:
        device = "/dev/disk/by-id/scsi-0DO_Volume_clone"
        until(lambda: run(ssh, f"test -b {device} && echo there"))
        if disarmed:
            assert run(ssh, f"tail -c 14 {device}") == b"DO_FIRST_MOUNT"
            assert b"/mnt/clone" not in run(ssh, "cat /proc/mounts")
        else:
            until(lambda: b" /mnt/clone ext4 rw" in run(ssh, "cat /proc/mounts"))
            assert run(ssh, f"tail -c 14 {device}") == bytes(14)
    assert "/mnt/clone" not in Path("/proc/mounts").read_text()


def test_what_a_killed_simulator_leaves_is_swept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simulator", "--directory", str(tmp_path), "--volume", "data"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as process:
        try:
            assert process.stdout is not None
            _, url, token = (process.stdout.readline().split()[-1] for _ in range(3))
            body = {"name": "orphan", "region": "fra1", "size": "s-1vcpu-1gb", "image": "debian-12-x64"}
            headers = {"Authorization": f"Bearer {token}"}
            assert requests.post(f"{url}/v2/droplets", json=body, headers=headers, timeout=PATIENCE).status_code == 202
            until(lambda: machine_processes(process.pid))
        finally:
            process.kill()
    until(lambda: not machine_processes(process.pid))
    with Simulator(tmp_path):
        pass
    assert footprint(tmp_path) == []
