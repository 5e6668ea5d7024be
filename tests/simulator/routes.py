"""The API's calls: which path does what, with which scopes, and what the answer looks like."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from .catalogue import IMAGES, REGIONS, SIZES, Json
from .cloud import Cloud, Refusal, not_found, unprocessable
from .faults import Fault
from .resources import Action, Droplet, Key, Resource, Snapshot, Tag, Volume

_PAGE = 20
_LARGEST_PAGE = 200


@dataclass(frozen=True)
class Call:
    """A request as the routes see it."""

    method: str
    path: str
    query: dict[str, str]
    body: Json
    base_url: str
    faults: Sequence[Fault] = ()


@dataclass(frozen=True)
class Answer:
    """Status and body of an answer; a body of `None` is empty."""

    status: int
    body: Json | None = None
    headers: dict[str, str] = field(default_factory=dict)


Handler = Callable[..., Answer]


@dataclass(frozen=True)
class Route:
    """One call of the API."""

    method: str
    pattern: re.Pattern[str]
    scopes: tuple[str, ...]
    handler: Handler


class Routes:
    """All calls, bound to a cloud."""

    def __init__(self, cloud: Cloud) -> None:
        """Serve this cloud."""
        self._cloud = cloud
        self._empty_lists = itertools.count()
        self._table = [
            Route(method, re.compile(_expand(path)), tuple(scopes.split()), handler)
            for method, path, scopes, handler in (
                ("GET", "/account", "account:read", self._account),
                ("GET", "/account/keys", "ssh_key:read", self._list_keys),
                ("POST", "/account/keys", "ssh_key:create", self._create_key),
                ("GET", "/account/keys/{key}", "ssh_key:read", self._get_key),
                ("DELETE", "/account/keys/{key}", "ssh_key:delete", self._delete_key),
                ("GET", "/actions", "actions:read", self._list_actions),
                ("GET", "/actions/{number}", "actions:read", self._get_action),
                ("GET", "/droplets", "droplet:read", self._list_droplets),
                ("POST", "/droplets", "droplet:create", self._create_droplet),
                ("DELETE", "/droplets", "droplet:delete tag:read", self._delete_droplets_by_tag),
                ("GET", "/droplets/{number}", "droplet:read", self._get_droplet),
                ("DELETE", "/droplets/{number}", "droplet:delete", self._delete_droplet),
                ("GET", "/droplets/{number}/actions", "droplet:read", self._list_droplet_actions),
                ("GET", "/droplets/{number}/actions/{number}", "droplet:read", self._get_droplet_action),
                ("GET", "/images", "image:read", self._list_images),
                ("GET", "/images/{name}", "image:read", self._get_image),
                ("GET", "/regions", "regions:read", self._list_regions),
                ("GET", "/sizes", "sizes:read", self._list_sizes),
                ("GET", "/snapshots", "snapshot:read", self._list_snapshots),
                ("GET", "/snapshots/{name}", "snapshot:read", self._get_snapshot),
                ("DELETE", "/snapshots/{name}", "snapshot:delete", self._delete_snapshot),
                ("GET", "/tags", "tag:read", self._list_tags),
                ("POST", "/tags", "tag:create", self._create_tag),
                ("GET", "/tags/{name}", "tag:read", self._get_tag),
                ("DELETE", "/tags/{name}", "tag:delete", self._delete_tag),
                ("POST", "/tags/{name}/resources", "tag:create", self._tag_resources),
                ("DELETE", "/tags/{name}/resources", "tag:delete", self._untag_resources),
                ("GET", "/volumes", "block_storage:read", self._list_volumes),
                ("POST", "/volumes", "block_storage:create", self._create_volume),
                ("DELETE", "/volumes", "block_storage:delete", self._delete_volume_by_name),
                ("GET", "/volumes/snapshots/{name}", "block_storage_snapshot:read", self._get_snapshot),
                ("DELETE", "/volumes/snapshots/{name}", "block_storage_snapshot:delete", self._delete_snapshot),
                ("GET", "/volumes/{name}", "block_storage:read", self._get_volume),
                ("DELETE", "/volumes/{name}", "block_storage:delete", self._delete_volume),
                ("GET", "/volumes/{name}/actions", "block_storage_action:read", self._list_volume_actions),
                ("POST", "/volumes/{name}/actions", "block_storage_action:create", self._create_volume_action),
                ("GET", "/volumes/{name}/actions/{number}", "block_storage_action:read", self._get_volume_action),
                ("GET", "/volumes/{name}/snapshots", "block_storage_snapshot:read", self._list_volume_snapshots),
                ("POST", "/volumes/{name}/snapshots", "block_storage_snapshot:create", self._create_snapshot),
            )
        ]

    def answer(self, call: Call, lacking: set[str]) -> Answer:
        """Carry out a call, unless the token lacks one of its scopes."""
        for route in self._table:
            found = route.pattern.fullmatch(call.path)
            if found and route.method == call.method:
                if lacking.intersection(_scopes_needed(route, call)):
                    raise Refusal(403, "Forbidden", "You are not authorized to perform this operation")
                return route.handler(call, *found.groups())
        raise not_found()

    def remove(self, name: str) -> None:
        """Delete what a test has put there by this name, as somebody else does meanwhile."""
        for item in self._cloud.ever:
            if item.name == name and item.decoy and item.deleted is None:
                self._cloud.remove(item)

    # -- account, keys, tags

    def _account(self, call: Call) -> Answer:
        account = {
            "droplet_limit": self._cloud.behaviour.droplet_limit,
            "floating_ip_limit": 3,
            "volume_limit": self._cloud.behaviour.volume_limit,
            "email": "sammy@example.com",
            "name": "Sammy the Shark",
            "uuid": "b6fc48dbf6d9906cace5f3c78dc9851e757381ef",
            "email_verified": True,
            "status": "active",
            "status_message": "",
            "team": {"uuid": "5df3e3004a17e242b7c20ca6c9fc25b701a47ece", "name": "My Team"},
        }
        return Answer(200, {"account": account})

    def _list_keys(self, call: Call) -> Answer:
        return _page(call, "ssh_keys", [key.as_json() for key in self._cloud.listed(Key)])

    def _create_key(self, call: Call) -> Answer:
        key = self._cloud.create_key(str(call.body.get("name") or ""), str(call.body.get("public_key") or ""))
        return Answer(201, {"ssh_key": key.as_json()})

    def _get_key(self, call: Call, identifier: str) -> Answer:
        return Answer(200, {"ssh_key": self._cloud.find_key(identifier).as_json()})

    def _delete_key(self, call: Call, identifier: str) -> Answer:
        self._cloud.delete_key(identifier)
        return Answer(204)

    def _list_tags(self, call: Call) -> Answer:
        return _page(call, "tags", [self._tag_json(tag) for tag in self._cloud.listed(Tag)])

    def _create_tag(self, call: Call) -> Answer:
        tag = self._cloud.create_tag(str(call.body.get("name") or ""))
        return Answer(201, {"tag": self._tag_json(tag)})

    def _get_tag(self, call: Call, name: str) -> Answer:
        return Answer(200, {"tag": self._tag_json(self._cloud.find(Tag, name))})

    def _delete_tag(self, call: Call, name: str) -> Answer:
        self._cloud.delete_tag(name)
        return Answer(204)

    def _tag_resources(self, call: Call, name: str) -> Answer:
        self._cloud.tag_resources(name, _resources_of(call.body))
        return Answer(204)

    def _untag_resources(self, call: Call, name: str) -> Answer:
        self._cloud.tag_resources(name, _resources_of(call.body), remove=True)
        return Answer(204)

    def _tag_json(self, tag: Tag) -> Json:
        groups: tuple[tuple[str, type[Resource]], ...] = (
            ("droplets", Droplet),
            ("volumes", Volume),
            ("volume_snapshots", Snapshot),
        )
        counts = {name: sum(tag.name in item.tags for item in self._cloud.living(kind)) for name, kind in groups}
        resources: Json = {name: {"count": count} for name, count in counts.items()}
        resources |= {"images": {"count": 0}, "databases": {"count": 0}, "count": sum(counts.values())}
        return {"name": tag.name, "resources": resources}

    # -- what is on offer

    def _list_images(self, call: Call) -> Answer:
        wanted = call.query.get("type") != "application" and call.query.get("private") != "true"
        return _page(call, "images", [image.as_json() for image in IMAGES.values() if wanted])

    def _get_image(self, call: Call, identifier: str) -> Answer:
        found = [image for image in IMAGES.values() if identifier in (image.slug, str(image.id))]
        if not found:
            raise not_found()
        return Answer(200, {"image": found[0].as_json()})

    def _list_regions(self, call: Call) -> Answer:
        return _page(call, "regions", [region.as_json() for region in REGIONS.values()])

    def _list_sizes(self, call: Call) -> Answer:
        return _page(call, "sizes", [size.as_json() for size in SIZES.values()])

    # -- droplets

    def _list_droplets(self, call: Call) -> Answer:
        tag, name = call.query.get("tag_name"), call.query.get("name")
        droplets = [
            droplet
            for droplet in self._cloud.listed(Droplet)
            if (not tag or tag in droplet.tags) and (not name or droplet.name == name)
        ]
        return _page(call, "droplets", [self._shown(droplet) for droplet in droplets])

    def _create_droplet(self, call: Call) -> Answer:
        if "name" not in call.body and "names" in call.body:
            raise unprocessable("the simulator creates one droplet at a time")
        droplet, action = self._cloud.create_droplet(call.body, call.faults)
        link = {"id": action.id, "rel": "create", "href": f"{call.base_url}/v2/actions/{action.id}"}
        return Answer(202, {"droplet": self._shown(droplet), "links": {"actions": [link]}})

    def _get_droplet(self, call: Call, droplet_id: str) -> Answer:
        return Answer(200, {"droplet": self._shown(self._cloud.find(Droplet, droplet_id))})

    def _delete_droplet(self, call: Call, droplet_id: str) -> Answer:
        self._cloud.delete_droplet(droplet_id)
        return Answer(204)

    def _delete_droplets_by_tag(self, call: Call) -> Answer:
        tag = call.query.get("tag_name")
        if not tag:
            raise unprocessable("tag_name is required")
        self._cloud.find(Tag, tag)
        for droplet in self._cloud.living(Droplet):
            if tag in droplet.tags:
                self._cloud.delete_droplet(droplet.id)
        return Answer(204)

    # -- actions

    def _list_actions(self, call: Call) -> Answer:
        return self._actions_page(call, lambda action: True)

    def _list_droplet_actions(self, call: Call, droplet_id: str) -> Answer:
        self._cloud.find(Droplet, droplet_id)
        return self._actions_page(call, lambda action: action.droplet_id == droplet_id)

    def _list_volume_actions(self, call: Call, volume_id: str) -> Answer:
        self._cloud.find(Volume, volume_id)
        return self._actions_page(call, lambda action: action.volume_id == volume_id)

    def _actions_page(self, call: Call, wanted: Callable[[Action], bool]) -> Answer:
        actions = [action for action in list(self._cloud.actions.values()) if wanted(action)]
        return _page(call, "actions", [action.as_json() for action in reversed(actions)])

    def _get_action(self, call: Call, action_id: str) -> Answer:
        return self._one_action(action_id, lambda action: True)

    def _get_droplet_action(self, call: Call, droplet_id: str, action_id: str) -> Answer:
        return self._one_action(action_id, lambda action: action.droplet_id == droplet_id)

    def _get_volume_action(self, call: Call, volume_id: str, action_id: str) -> Answer:
        return self._one_action(action_id, lambda action: action.volume_id == volume_id)

    def _one_action(self, action_id: str, wanted: Callable[[Action], bool]) -> Answer:
        action = self._cloud.actions.get(int(action_id))
        if action is None or not wanted(action):
            raise not_found()
        return Answer(200, {"action": action.as_json()})

    def _create_volume_action(self, call: Call, volume_id: str) -> Answer:
        action = self._cloud.volume_action(volume_id, call.body, call.faults)
        return Answer(202, {"action": action.as_json()})

    # -- volumes and snapshots

    def _list_volumes(self, call: Call) -> Answer:
        return _page(call, "volumes", [self._shown(volume) for volume in self._volumes_named(call)])

    def _volumes_named(self, call: Call) -> list[Volume]:
        name, region = call.query.get("name"), call.query.get("region")
        return [
            volume
            for volume in self._cloud.listed(Volume)
            if (not name or volume.name == name) and (not region or volume.region == region)
        ]

    def _create_volume(self, call: Call) -> Answer:
        return Answer(201, {"volume": self._shown(self._cloud.create_volume(call.body))})

    def _get_volume(self, call: Call, volume_id: str) -> Answer:
        return Answer(200, {"volume": self._shown(self._cloud.find(Volume, volume_id))})

    def _delete_volume(self, call: Call, volume_id: str) -> Answer:
        self._cloud.delete_volume(volume_id)
        return Answer(204)

    def _delete_volume_by_name(self, call: Call) -> Answer:
        found = self._volumes_named(call) if call.query.get("name") and call.query.get("region") else []
        if not found:
            raise not_found()
        self._cloud.delete_volume(found[0].id)
        return Answer(204)

    def _list_snapshots(self, call: Call) -> Answer:
        wanted = call.query.get("resource_type")
        snapshots = [item for item in self._cloud.listed(Snapshot) if not wanted or item.resource_type == wanted]
        return _page(call, "snapshots", [self._shown(snapshot) for snapshot in snapshots])

    def _list_volume_snapshots(self, call: Call, volume_id: str) -> Answer:
        self._cloud.find(Volume, volume_id)
        snapshots = [item for item in self._cloud.listed(Snapshot) if item.volume_id == volume_id]
        return _page(call, "snapshots", [self._shown(snapshot) for snapshot in snapshots])

    def _create_snapshot(self, call: Call, volume_id: str) -> Answer:
        return Answer(201, {"snapshot": self._shown(self._cloud.create_snapshot(volume_id, call.body))})

    def _get_snapshot(self, call: Call, snapshot_id: str) -> Answer:
        return Answer(200, {"snapshot": self._shown(self._cloud.find(Snapshot, snapshot_id))})

    def _delete_snapshot(self, call: Call, snapshot_id: str) -> Answer:
        self._cloud.delete_snapshot(snapshot_id)
        return Answer(204)

    def _shown(self, item: Droplet | Volume | Snapshot) -> Json:
        """A resource's JSON; every other empty list is `null`, where the specification allows it."""
        shown = item.as_json()
        for name in () if isinstance(item, Droplet) else ("tags", "droplet_ids"):
            if shown.get(name) == [] and next(self._empty_lists) % 2 and self._cloud.behaviour.null_lists:
                shown[name] = None
        return shown


def _expand(path: str) -> str:
    """A path with placeholders as a regular expression."""
    parts = {"{number}": r"(\d+)", "{name}": r"([^/]+)", "{key}": r"([0-9a-f:]+)"}
    for placeholder, expression in parts.items():
        path = path.replace(placeholder, expression)
    return "/v2" + path


def _scopes_needed(route: Route, call: Call) -> list[str]:
    """The scopes of a call: its own, and those of the tags that it mentions."""
    scopes = list(route.scopes)
    if call.method == "GET" and call.query.get("tag_name"):
        scopes.append("tag:read")
    if call.method == "POST" and call.body.get("tags"):
        scopes.append("tag:create")
    return scopes


def _resources_of(body: Json) -> list[tuple[str, str]]:
    return [(str(item.get("resource_type")), str(item.get("resource_id"))) for item in body.get("resources") or []]


def _page(call: Call, name: str, items: list[Any]) -> Answer:
    """One page of a list, with links to the others."""
    page, size = _positive(call.query.get("page"), 1), _positive(call.query.get("per_page"), _PAGE)
    if size > _LARGEST_PAGE:
        raise unprocessable("per_page must be between 1 and 200")
    last = max(1, -(-len(items) // size))
    links: Json = {"pages": _page_links(call, page, last)} if last > 1 else {}
    shown = items[(page - 1) * size : page * size]
    return Answer(200, {name: shown, "links": links, "meta": {"total": len(items)}})


def _page_links(call: Call, page: int, last: int) -> dict[str, str]:
    numbers: dict[str, int] = {}
    if page > 1:
        numbers |= {"first": 1, "prev": page - 1}
    if page < last:
        numbers |= {"next": page + 1, "last": last}
    base = f"{call.base_url}{call.path}"
    return {relation: f"{base}?{urlencode({**call.query, 'page': number})}" for relation, number in numbers.items()}


def _positive(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise unprocessable("page and per_page must be positive integers")
    return int(text)
