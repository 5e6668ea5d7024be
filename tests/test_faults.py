"""Trouble with the API: whatever a call answers, the run completes or says why not, and nothing stays behind."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, sampled, write_at
from simulator import FOREVER, Droplet, Fault, RequestRecord, Simulator, Snapshot, Volume
from simulator.faults import ActionKind, CallKind, DropletKind
from trouble_support import (
    FAST,
    QUICK,
    SOON,
    PausingPython,
    account,
    add_volume,
    assert_backed_up,
    assert_named,
    assert_nothing_left,
    run,
    small_volumes,
    start,
    until,
)

pytestmark = pytest.mark.small


def behaving(**changes: Any) -> pytest.MarkDecorator:
    """Change the behaviour of a test's account."""
    return pytest.mark.parametrize("behaviour", [changes], indirect=True, ids=["changed"])


# -- every call, every fault


@dataclass(frozen=True)
class Call:
    """The `nth` call of this method to paths like this one, in a run."""

    method: str
    path: str
    nth: int

    @property
    def is_poll(self) -> bool:
        """Whether it asks for the state of one thing, as often as it takes."""
        return self.method == "GET" and "\\d" in self.path

    @property
    def is_of_a_release(self) -> bool:
        """Whether it may detach or delete a clone that was synced, for which the run may end too soon."""
        return (self.method, "/v2/volumes/" in self.path) in (("POST", True), ("DELETE", True))

    @property
    def is_of_the_end(self) -> bool:
        """Whether it may be a list that shows what is left, of which a teardown asks for as many as it takes."""
        return self.method == "GET" and self.nth > 2


def calls_of(requests: list[RequestRecord]) -> list[Call]:
    """The calls of a run, such that those of another run can be told by them."""
    seen: dict[tuple[str, str], int] = {}
    calls = []
    for record in requests:
        path = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "[0-9a-f-]{36}", record.path)
        path = "^" + re.sub(r"/\d+(?=/|$)", r"/\\d+", path) + "$"
        nth = seen[record.method, path] = seen.get((record.method, path), 0) + 1
        calls.append(Call(record.method, path, nth))
    return calls


def add_three(sim: Simulator) -> list[Volume]:
    """As many as it takes for the first clone to be detached and deleted while the run goes on."""
    return [add_volume(sim, name) for name in ("data", "more", "other")]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """The calls of a run in which nothing goes wrong."""
    directory = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as monkeypatch, account(directory / "account") as (sim, home):
        small_volumes(monkeypatch)
        volumes = add_three(sim)
        run(home)
        assert_backed_up(home, *volumes)
        assert_nothing_left(sim)
        found = calls_of(sim.requests)
    assert len(found) > 30
    return found


FAULTS = {
    "5xx-before": Fault("error", status=503),
    "5xx-after": Fault("error", status=500, effect=True),
    "lost-before": Fault("lost", effect=False),
    "lost-after": Fault("lost"),
    "missing": Fault("missing", seconds=0.4),
    "too-many": Fault("rate-limit", seconds=1),
    "too-many-until": Fault("rate-limit-reset", seconds=1),
    "malformed": Fault("malformed"),
    "html": Fault("html", effect=True),
    "html-5xx": Fault("html", status=502),
}


def test_any_call_goes_wrong_once(pytestconfig: pytest.Config, tmp_path: Path, calls: list[Call]) -> None:
    problems = []
    cases = [(fault, call) for fault in FAULTS for call in calls]
    for fault, call in sampled(pytestconfig, cases, 8):
        directory = tmp_path / f"{fault}-{cases.index((fault, call))}"
        try:
            run_with_fault(directory, replace(FAULTS[fault], method=call.method, path=call.path, nth=call.nth), call)
        except (AssertionError, pytest.fail.Exception) as problem:
            problems.append(f"{fault} at {call}: {problem}")
    assert not problems, "\n\n".join(problems)


def run_with_fault(directory: Path, fault: Fault, call: Call) -> None:
    """One run with the fault; then one without, which is as any other."""
    with account(directory) as (sim, home):
        volumes = add_three(sim)
        sim.faults.add(fault)
        done = run(home, expect=None)
        assert sim.faults.fired or call.is_poll or call.is_of_a_release or call.is_of_the_end
        assert_nothing_left(sim)
        if done.returncode == 0:
            assert_backed_up(home, *volumes)
        else:  # what may pass is to be overcome
            assert fault.kind == "missing", done.stderr


LAGGING = replace(FAST, fresh_seconds=0.3, list_lag_seconds=0.4)
UNANSWERED: tuple[CallKind, ...] = ("lost", "html", "error")
CREATIONS = ("account/keys", "droplets", "volumes/.*/snapshots", "volumes")


def test_answer_is_lost_and_lists_lag(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """What was created by a call whose answer was lost is found when a list shows it, and not created twice."""
    faults = [
        Fault(kind, method="POST", path=f"^/v2/{path}$", effect=True) for kind in UNANSWERED for path in CREATIONS
    ]
    for number, fault in enumerate(sampled(pytestconfig, faults, 3)):
        with account(tmp_path / str(number), LAGGING) as (sim, home):
            volume = add_volume(sim, "data")
            sim.faults.add(fault)
            run(home, constants={"LIST_LAG": 3})
            assert sim.faults.fired
            assert_backed_up(home, volume)
            assert_nothing_left(sim)
            created = sorted(item.kind for item in sim.ever if not item.decoy)
            assert created == ["droplet", "key", "snapshot", "tag", "volume"], fault


UNIQUE = {  # what may exist once only, so that it is not created again while no list shows it
    "account/keys": "key",
    "volumes": "volume",
}


@behaving(list_lag_seconds=1000)
@pytest.mark.parametrize("path", UNIQUE)
def test_answer_is_lost_and_no_list_shows_what_was_created(home: Home, sim: Simulator, path: str) -> None:
    """Longer than lists are known to lag: it is not created twice, and removed by whatever run finds it listed."""
    add_volume(sim, "data")
    sim.faults.add(Fault("lost", method="POST", path=f"^/v2/{path}$"))
    done = run(home, expect=1, constants={"LIST_LAG": 0.3, "PATIENCE": 3})
    (left,) = sim.alive()
    assert left.kind == UNIQUE[path]
    assert "LEFT BEHIND" not in done.stderr  # the lists were had, and there is nothing in them to be removed
    left.listed = 0
    run(home, "sweep")
    assert_nothing_left(sim)


@behaving(list_lag_seconds=4)
@pytest.mark.parametrize("path", UNIQUE)
def test_answer_is_lost_and_a_list_shows_what_was_created_late(home: Home, sim: Simulator, path: str) -> None:
    """Until then it is refused when it is asked for again, which means to look again."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("lost", method="POST", path=f"^/v2/{path}$"))
    run(home, constants={"LIST_LAG": 0.3})
    refused = [record.status for record in sim.requests if record.method == "POST" and record.path == f"/v2/{path}"]
    assert set(refused[1:]) <= {409, 422}
    assert len(refused) > 1
    assert_backed_up(home, volume)
    assert len([item for item in sim.ever if item.kind == UNIQUE[path] and not item.decoy]) == 1
    for item in sim.alive():  # what was created last may be listed too late for a teardown that takes lists to be quick
        item.listed = 0
    run(home, "sweep")
    assert_nothing_left(sim)


@behaving(list_lag_seconds=1000, snapshot_interval=4)
def test_answer_is_lost_and_no_list_shows_the_snapshot(home: Home, sim: Simulator) -> None:
    """Of which there is one in ten minutes: another one is taken then."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("lost", method="POST", path="^/v2/volumes/.*/snapshots$"))
    done = run(home, constants={"LIST_LAG": 0.3})
    assert "one snapshot of a volume per 10 minutes" in done.stdout
    assert_backed_up(home, volume)
    (left,) = sim.alive()
    assert left.kind == "snapshot"
    left.listed = 0
    run(home, "sweep")
    assert_nothing_left(sim)


@pytest.mark.parametrize("path", CREATIONS)
def test_answer_is_lost_and_there_are_no_more_lists(home: Home, sim: Simulator, path: str) -> None:
    """Whether it was created cannot be known, so that it may be there is said, by its name."""
    add_volume(sim, "data")
    kind = "snapshot" if "snapshots" in path else path.rpartition("/")[2].removesuffix("s")
    lists = {"snapshot": "snapshots"}.get(kind, path)
    before = {"volume": 3, "key": 2, "snapshot": 2, "droplet": 2}[kind]  # what comes before the creation has its lists
    sim.faults.add(
        Fault("lost", method="POST", path=f"^/v2/{path}$"),
        Fault("error", method="GET", path=f"^/v2/{lists.replace('volumes/.*/', '')}$", nth=before, times=FOREVER),
    )
    if kind == "key":
        sim.faults.add(Fault("never-active"))
    done = run(home, expect=1, constants={"PATIENCE": 2, "TEARDOWN_PATIENCE": 2, "LIMIT": 1})
    (left,) = [item for item in sim.alive() if item.kind != "tag"]
    assert left.kind == kind
    (line,) = [line for line in done.stderr.splitlines() if "LEFT BEHIND" in line]
    assert "there may be something LEFT BEHIND, and billed until you remove it" in line
    assert f" {left.name} " in line
    assert "https://cloud.digitalocean.com/" in line
    assert "dosvob.py sweep" in line
    sim.faults.clear()
    run(home, "sweep")
    assert_nothing_left(sim)


@behaving(list_lag_seconds=1000)
def test_answer_is_lost_and_what_is_asked_for_again_is_refused(home: Home, sim: Simulator) -> None:
    """The refusal says nothing of what may have been created before."""
    add_volume(sim, "data")
    sim.faults.add(Fault("lost", method="POST", path="^/v2/droplets$"))
    sim.faults.add(Fault("error", method="POST", path="^/v2/droplets$", status=422, nth=2, times=FOREVER))
    running = start(home, constants={"PATIENCE": 20, "TEARDOWN_PATIENCE": 0.3, "LIMIT": 1, "LIST_LAG": 5})
    until(lambda: sum(record.method == "POST" and record.path == "/v2/droplets" for record in sim.requests) >= 2)
    sim.faults.add(Fault("error", method="GET", path="^/v2/droplets$", status=503, times=FOREVER))
    assert running.end() == 1
    left = next(item for item in sim.alive() if item.kind == "droplet")
    lines = [line for line in running.output.splitlines() if "LEFT BEHIND" in line and f" {left.name} " in line]
    assert len(lines) == 1, running.output


@behaving(list_lag_seconds=1.5)
def test_answer_makes_no_sense_when_the_run_has_gone_on_for_long(home: Home, sim: Simulator) -> None:
    """What was created is in no books: it is found by a list that was asked for late enough after its creation."""
    add_volume(sim, "data")
    sim.faults.add(Fault("delay", method="POST", path="^/v2/account/keys$", seconds=3))
    sim.faults.add(Fault("odd", method="POST", path="^/v2/droplets$", text='{"droplet": []}'))
    run(home, expect=1, constants={"LIST_LAG": 2})
    assert_nothing_left(sim)


@behaving(list_lag_seconds=1000)
def test_answer_is_lost_and_a_list_shows_the_droplet_at_the_end(home: Home, sim: Simulator) -> None:
    """There are two by then; the late one is removed as part of the run, too."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("lost", method="POST", path="^/v2/droplets$"))
    sim.faults.add(Fault("delay", method="DELETE", path="^/v2/account/keys/", seconds=3))  # lists come after it
    running = start(home, constants={"LIST_LAG": 1})
    until(lambda: any(item.kind == "droplet" and item.deleted for item in sim.ever))
    late, _ = [item for item in sim.ever if item.kind == "droplet"]
    assert not late.deleted
    late.listed = 0
    assert running.end() == 0
    assert "warning" not in running.output
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


@behaving(list_lag_seconds=1000)
def test_a_refusal_does_not_answer_for_what_was_lost_before(home: Home, sim: Simulator) -> None:
    """The first size's droplet may exist, although it is refused when it is asked for again, and in the next size."""
    add_volume(sim, "data")
    sim.faults.add(
        Fault("lost", method="POST", path="^/v2/droplets$"),
        Fault("error", method="POST", path="^/v2/droplets$", nth=2, status=422, times=FOREVER),
        Fault("delay", method="DELETE", path="^/v2/account/keys/", seconds=2),  # lists come after it
    )
    running = start(home, constants={"LIST_LAG": 0.3, "PATIENCE": 1})
    running.wait_for("removing ")
    sim.token_lacks("droplet:read")
    assert running.end() == 1
    (left,) = sim.alive()
    assert re.search(rf"there may be something LEFT BEHIND, .*{left.name} ", running.output)
    sim.token_lacks()
    left.listed = 0
    run(home, "sweep")
    assert_nothing_left(sim)


def test_signal_before_anything_went_out(home: Home, sim: Simulator) -> None:
    """What was asked for and refused, or not asked for at all, cannot be left behind."""
    add_volume(sim, "data")
    sim.faults.add(Fault("rate-limit", method="POST", path="^/v2/(volumes|account/keys)$", seconds=60, times=FOREVER))
    running = start(home)
    until(lambda: running.output.count("trying again in 60 s") == 2)
    running.signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGTERM
    assert "error: " not in running.output
    assert_nothing_left(sim)


def test_signal_before_a_creation_of_a_kind_that_was_in_doubt_before(home: Home, sim: Simulator) -> None:
    """That an earlier clone's answer was lost says nothing of one that was not asked for."""
    add_volume(sim, "data")
    add_volume(sim, "other")
    snapshots = "^/v2/volumes/.*/snapshots$"
    sim.faults.add(Fault("lost", method="POST", path="^/v2/volumes$"))
    sim.faults.add(Fault("delay", method="POST", path=snapshots, nth=2, seconds=1.5))
    running = start(home)
    until(lambda: sum(record.method == "POST" and "snapshots" in record.path for record in sim.requests) == 2)
    running.signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGTERM, running.output
    assert "error: " not in running.output
    assert_nothing_left(sim)


def test_api_is_down_for_good(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    sim.faults.add(Fault("error", status=503, times=FOREVER))
    done = run(home, expect=1, constants={"PATIENCE": 0.5})
    assert "HTTP 503" in done.stderr
    assert "https://status.digitalocean.com" in done.stderr
    assert_nothing_left(sim)


def test_an_answer_that_trickles_for_ever(home: Home, sim: Simulator) -> None:
    """Each byte comes in time, the answer never does: the call ends, is repeated for a while, and then the run ends."""
    add_volume(sim, "data")
    sim.faults.add(Fault("trickle", method="GET", path=r"^/v2/droplets/\d+$", times=FOREVER, seconds=0.1))
    done = run(home, expect=1, constants={"CALL_LIMIT": SOON, "PATIENCE": 4})
    assert re.search(
        r"error: nothing can be done for want of a droplet: GET /v2/droplets/\d+: no complete answer", done.stderr
    )
    assert_nothing_left(sim)


def test_an_answer_to_a_creation_trickles_for_ever(home: Home, sim: Simulator) -> None:
    """What was created is found in the list."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("trickle", method="POST", path="^/v2/volumes$", seconds=0.1))
    run(home, constants={"CALL_LIMIT": SOON})
    assert len([record for record in sim.requests if (record.method, record.path) == ("POST", "/v2/volumes")]) == 1
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_a_list_without_an_end(home: Home, sim: Simulator) -> None:
    """Each page says that there is a next one, and has something on it."""
    add_volume(sim, "data")
    endless = {"regions": [{"slug": "fra1"}], "links": {"pages": {"next": f"{sim.url}/v2/regions?page=2"}}}
    sim.faults.add(Fault("odd", path="^/v2/regions$", text=json.dumps(endless), times=FOREVER))
    done = run(home, expect=1, constants={"MOST_PAGES": 3})
    assert "error: DigitalOcean's answers to GET /v2/regions have no end" in done.stderr
    assert [record.query["page"] for record in sim.requests if record.path == "/v2/regions"] == ["1", "2", "3"]
    assert_nothing_left(sim)


def test_a_volume_is_deleted_between_two_pages(home: Home, sim: Simulator) -> None:
    """It hides the first one of the next page, in the list of what to back up."""
    for name in ("a", "b"):
        sim.add_volume(name, region="nyc1")
    volumes = [add_volume(sim, name) for name in ("data", "other")]
    sim.faults.add(Fault("removes", path="^/v2/volumes$", nth=3, text="a"))  # the first two are the sweep's
    run(home, constants={"PAGE_SIZE": 2, "READING_PAUSE": 0.1})
    assert sim.faults.fired
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


@pytest.mark.parametrize("nth", [1, 2])
def test_something_is_deleted_between_two_pages_of_what_may_be_left(home: Home, sim: Simulator, nth: int) -> None:
    """Neither the sweep nor the last look takes it for an empty list."""
    for name in ("a", "b"):
        sim.add_droplet(name)
    add_volume(sim, "data")
    left = sim.add_droplet("dosvob-ephemeral-00000000-droplet")
    sim.faults.add(Fault("removes", method="GET", path="^/v2/droplets$", nth=nth, text="a"))
    if nth == 2:  # it is listed at the end only
        left.listed = math.inf
        sim.faults.add(Fault("delay", method="POST", path="/snapshots$", seconds=1))
    running = start(home, constants={"PAGE_SIZE": 2, "READING_PAUSE": 0.1})
    until(lambda: sim.droplets)
    left.listed = 0
    assert running.end() == 0, running.output
    assert left.deleted
    assert ("left over from an earlier run" in running.output) == (nth == 1)


def test_a_list_that_never_stays_as_it_is(home: Home, sim: Simulator) -> None:
    for number in range(9):
        sim.add_volume(f"v{number}", region="nyc1")
    add_volume(sim, "data")
    sim.faults.add(*(Fault("removes", path="^/v2/volumes$", nth=n + 1, text=f"v{n}") for n in range(9)))
    done = run(home, expect=1, constants={"PAGE_SIZE": 4, "READING_PAUSE": 0.1, "MOST_READINGS": 2})
    assert "error: the list of GET /v2/volumes changed each time that it was read" in done.stderr


def test_a_list_that_fails_does_not_keep_the_rest_from_being_removed(home: Home, sim: Simulator) -> None:
    """The lists of the teardown fail for ever: what is known is deleted, and that more may be there is said."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("error", method="GET", path="^/v2/droplets$", nth=2, times=FOREVER))
    done = run(home, expect=1, constants={"PATIENCE": 0.3, "LIMIT": 1})
    assert_nothing_left(sim)
    assert_backed_up(home, volume)
    assert re.search(r"there may be something LEFT BEHIND.*droplet dosvob-ephemeral-\*", done.stderr)
    first = next(record.number for record in sim.requests if record.method == "DELETE" and "droplets" in record.path)
    assert first < min(number for number, _ in sim.faults.fired)  # a list that takes its time costs no droplet's time


# -- actions and droplets


def test_attach_fails_once(home: Home, sim: Simulator) -> None:
    """It is tried once more."""
    volumes = [add_volume(sim, "data"), add_volume(sim, "other")]
    sim.faults.add(Fault("action-errored"))
    run(home)
    assert sim.faults.fired
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_attach_fails_twice(home: Home, sim: Simulator) -> None:
    """The volume fails, the other one is backed up. The message is not about a volume that is called "the"."""
    add_volume(sim, "the")
    other = add_volume(sim, "zzz")
    sim.faults.add(Fault("action-errored", times=2))
    done = run(home, expect=1)
    assert re.search(r"error: the: the attach of \S+ failed on DigitalOcean's side", done.stderr)
    assert_backed_up(home, other)
    assert not home.image("the").exists()
    assert_nothing_left(sim)


def droplets_ever(sim: Simulator) -> int:
    return sum(item.kind == "droplet" for item in sim.ever)


def assert_one_droplet_is_lost(home: Home, sim: Simulator, volumes: list[Volume], told: str) -> None:
    """An action that has no end is told, and costs a droplet and no volume."""
    done = run(home, constants={"ACTION_LIMIT": SOON})
    assert told in done.stderr
    assert droplets_ever(sim) == 2
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_attach_never_ends(home: Home, sim: Simulator, nth: int) -> None:
    """The droplet takes no other event then; another one does."""
    volumes = [add_volume(sim, name) for name in ("a", "b", "c", "d", "e")]
    sim.faults.add(Fault("action-stuck", nth=nth))
    assert_one_droplet_is_lost(home, sim, volumes, f"did not end within {SOON} s; making another one")


def test_attach_that_never_ends_was_done_all_the_same(home: Home, sim: Simulator) -> None:
    """Which the volume tells."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("odd", path=r"^/v2/volumes/[^/]+/actions/\d+$", times=FOREVER, text=IN_PROGRESS))
    run(home, constants={"ACTION_LIMIT": SOON})
    assert droplets_ever(sim) == 1
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


IN_PROGRESS = json.dumps({"action": {"id": 1, "status": "in-progress"}})


def test_attach_never_ends_on_any_droplet(home: Home, sim: Simulator) -> None:
    """After three the volume fails, for it may be its own fault; the others have another one."""
    add_volume(sim, "data")
    others = [add_volume(sim, name) for name in ("more", "other", "still")]
    sim.faults.add(Fault("action-stuck", times=3))
    done = run(home, expect=1, constants={"ACTION_LIMIT": SOON})
    assert re.search("error: data: .* did not end within .*; 3 droplets were lost over it", done.stderr)
    assert droplets_ever(sim) == 4
    assert_backed_up(home, *others)
    assert_nothing_left(sim)


def test_attach_never_ends_at_all(home: Home, sim: Simulator) -> None:
    """It ends after four droplets, and no clones are made for the volumes that are not reached."""
    volumes = [add_volume(sim, f"volume-{number}") for number in range(7)]
    sim.faults.add(Fault("action-stuck", times=FOREVER))
    done = run(home, expect=1, constants={"ACTION_LIMIT": SOON})
    assert "nothing can be done for want of a droplet, 4 were lost in a row" in done.stderr
    assert droplets_ever(sim) == 4
    assert sum(item.kind == "snapshot" for item in sim.ever) < len(volumes)
    assert_nothing_left(sim)


def test_droplet_dies_while_an_attach_is_pending(home: Home, sim: Simulator) -> None:
    """Nobody waits until the attach would have had to end."""
    volumes = [add_volume(sim, "data"), add_volume(sim, "other")]
    sim.faults.add(Fault("action-stuck"))
    running = start(home)
    until(lambda: any(record.path.endswith("/actions") for record in sim.requests))
    sim.droplets[0].kill()
    assert running.end() == 0, running.output  # which waits for less long than an action may take
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


@behaving(volume_limit=5)
def test_detach_for_the_quota_never_ends(home: Home, sim: Simulator) -> None:
    """Another droplet frees what is attached to this one."""
    volumes = [add_volume(sim, name) for name in ("data", "more", "other", "still")]
    sim.faults.add(Fault("action-stuck", nth=2))
    assert_one_droplet_is_lost(home, sim, volumes, "the detach of")


def test_snapshot_is_not_known_for_a_moment(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("error", method="POST", path="^/v2/volumes$", status=404, times=2))
    run(home)
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


SCARCE = [{"volume_limit": 5}, {"capacity_gib": 5}]


@pytest.mark.parametrize("behaviour", SCARCE, indirect=True, ids=["by-count", "by-size"])
def test_quota_has_room_for_one_clone(home: Home, sim: Simulator) -> None:
    """Each waits for the one before to be synced and let go, with its snapshot, of which none is bought twice."""
    volumes = [add_volume(sim, name) for name in ("data", "more", "other", "still")]
    run(home)
    assert_backed_up(home, *volumes)
    assert len([item for item in sim.ever if item.kind == "snapshot"]) == len(volumes)
    assert_nothing_left(sim)


@behaving(capacity_gib=12)
def test_quota_has_no_room_for_the_large_ones(home: Home, sim: Simulator) -> None:
    """They fail, and the second one costs no snapshot; what is smaller is backed up, before and after."""
    large = [sim.add_volume(name, size_gib=4) for name in ("b-large", "c-large")]
    small = [add_volume(sim, name) for name in ("a-small", "d-small")]
    done = run(home, expect=1)
    assert 'error: b-large: DigitalOcean refused POST /v2/volumes: "failed to create volume' in done.stderr
    assert "error: c-large: DigitalOcean refused a clone of" in done.stderr
    snapshots = [item.volume_id for item in sim.ever if isinstance(item, Snapshot)]
    assert large[1].id not in snapshots
    assert_backed_up(home, *small)
    assert_nothing_left(sim)


def test_volume_grows_before_its_snapshot(home: Home, sim: Simulator) -> None:
    """Its clone must be as large as the snapshot, and the image is."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("delay", method="POST", path="/snapshots$", seconds=3))
    running = start(home)
    until(lambda: sim.droplets)
    volume.grow(2)
    assert running.end() == 0, running.output
    assert volume.path.stat().st_size == home.image("data").stat().st_size
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_attach_is_refused_for_a_moment(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("error", method="POST", path="/actions$", status=422, times=2))
    run(home, constants={"DEVICE_LIMIT": 10})
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


@pytest.mark.parametrize("kind", ["action-errored", "action-stuck"])
def test_detach_fails(home: Home, sim: Simulator, kind: ActionKind) -> None:
    """What has been backed up is; the teardown removes the clone."""
    volumes = [add_volume(sim, "data"), add_volume(sim, "more"), add_volume(sim, "other", size=12 << 20)]
    sim.faults.add(Fault("delay", method="POST", path="/snapshots$", nth=3, seconds=3))
    sim.faults.add(Fault(kind, nth=3))  # the first two are attaches
    run(home, constants={"ACTION_LIMIT": 3, "HOUR_ENDS": 0})
    assert sim.faults.fired
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


@pytest.mark.parametrize(
    ("kind", "constants", "message"),
    [
        ("never-active", {"ADDRESS_LIMIT": 0.5}, "was not active, with an address, within"),
        ("creation-errored", {}, "failed on DigitalOcean's side"),
        ("no-address", {"ADDRESS_LIMIT": 0.5}, "was not active, with an address, within"),
        ("ssh-refused", {"SSH_LIMIT": 0.5}, "no connection to the droplet at 10.78"),
    ],
)
def test_droplet_is_not_to_be_had(
    home: Home, sim: Simulator, kind: DropletKind, constants: dict[str, float], message: str
) -> None:
    """Nor is a second one, with which it is tried once."""
    add_volume(sim, "data")
    add_volume(sim, "other")
    sim.faults.add(Fault(kind, times=FOREVER))
    done = run(home, expect=1, constants=constants)
    first, second = done.stderr.splitlines()
    assert "warning: " in first
    assert message in first
    assert "making another one" in first
    assert "error: nothing can be done for want of a droplet, a second one too: " in second
    assert message in second
    assert len(re.findall(r"(data|other) .* FAILED", done.stdout)) == 2
    assert len([item for item in sim.ever if item.kind == "droplet"]) == 2
    assert_nothing_left(sim)


@pytest.mark.parametrize(
    "fault", [Fault("never-active"), Fault("creation-errored"), Fault("no-address"), Fault("ssh-refused")]
)
def test_another_droplet_takes_the_place_of_one_that_does_not_come_up(home: Home, sim: Simulator, fault: Fault) -> None:
    volumes = [add_volume(sim, "data"), add_volume(sim, "other")]
    sim.faults.add(fault)
    done = run(home, constants={"ADDRESS_LIMIT": 12, "SSH_LIMIT": 12})
    assert re.fullmatch(r"\S+ warning: .*; making another one\n", done.stderr)
    assert sim.faults.fired
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


@pytest.mark.parametrize("kills", [1, 2])
def test_droplet_dies_during_the_sync(home: Home, sim: Simulator, tmp_path: Path, kills: int) -> None:
    """Another one goes on from where it was; and if that dies as well, what had arrived is kept for the next run."""
    volume = add_volume(sim, "data", size=12 << 20)
    pausing = PausingPython(tmp_path, 6 << 20)
    sim.faults.add(pausing.fault)
    running = start(home, constants={"STALL_LIMIT": 8, "SSH_LIMIT": 8})
    pausing.wait()
    partial = home.image("data.partial")
    until(lambda: partial.exists() and partial.stat().st_blocks * 512 >= 5 << 20)  # what is on its way is lost
    if kills == 2:
        sim.faults.add(Fault("ssh-refused", times=FOREVER))
    sim.droplets[0].kill()
    if kills == 1:
        assert running.end() == 0, running.output
        assert running.output.count("making another one") == 1
        assert "another run with the same backups directory may have removed it" in running.output
        assert_backed_up(home, volume)
        assert_nothing_left(sim)
        (fetched,) = re.findall(r"([\d.]+) MiB were fetched", running.output)
        assert float(fetched) > 12  # from both
        first, second = [item for item in sim.ever if isinstance(item, Droplet)]
        assert first.bytes_sent + second.bytes_sent < (12 << 20) * 1.3  # what had arrived is not fetched again
        return
    assert running.end() == 1
    assert re.search(r"error: nothing can be done .* a second one too: no connection to the droplet", running.output)
    assert_nothing_left(sim)
    assert home.image("data.partial").exists()
    sim.faults.clear()
    run(home)
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


# -- the account's limits


LIMITS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"volume_limit": 2}, "capacity limit exceeded"),
    ({"capacity_gib": 2}, "capacity limit exceeded"),
    ({"snapshot_limit": 0}, "snapshot limit exceeded"),
    ({"snapshots_per_volume": 0}, "snapshot limit exceeded"),
    ({"droplet_limit": 0}, "exceed your droplet limit"),
    ({"sold_out": frozenset({"s-1vcpu-512mb-10gb", "s-1vcpu-1gb", "s-1vcpu-2gb"})}, "Size is not available in this"),
)


def test_limit_of_the_account(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """DigitalOcean's words are quoted, with the request id for its support, and the page where limits are."""
    for limit, message in sampled(pytestconfig, LIMITS, 3):
        with account(tmp_path / "-".join(limit), replace(FAST, **limit)) as (sim, home):
            add_volume(sim, "data")
            add_volume(sim, "other")
            done = run(home, expect=1)
            assert re.search(rf'"[^"]*{message}[^"]*" \(HTTP 4\d\d, request [0-9a-f-]{{36}}\)', done.stderr)
            assert "https://cloud.digitalocean.com/account/team/limits" in done.stderr
            assert_nothing_left(sim)


@behaving(sold_out=frozenset({"s-1vcpu-512mb-10gb", "s-1vcpu-1gb"}))
def test_next_size_is_tried(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    assert run(home).stdout.count("trying the next size") == 2
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


@behaving(droplet_limit=1)
def test_a_limit_of_droplets_is_not_told_as_a_size_that_is_not_to_be_had(home: Home, sim: Simulator) -> None:
    sim.add_droplet("web")
    add_volume(sim, "data")
    done = run(home, expect=1)
    assert "is not to be had" not in done.stdout + done.stderr
    assert len([record for record in sim.requests if (record.method, record.path) == ("POST", "/v2/droplets")]) == 1
    assert_nothing_left(sim)


# -- the token

UNUSED = ("account:read", "actions:read", "tag:read", "snapshot:create")
SCOPES = (
    *("droplet:create", "droplet:read", "block_storage:create", "block_storage:read", "block_storage_action:create"),
    *("block_storage_action:read", "block_storage_snapshot:create", "snapshot:read", "ssh_key:create", "ssh_key:read"),
    *("tag:create", "regions:read", "sizes:read", "image:read"),
)
DELETING = {  # what is left behind without the scope, how much of it at most, and where to remove it
    "droplet:delete": ({"droplet", "volume"}, "/droplets"),
    "block_storage:delete": ({"volume"}, "/volumes"),
    "snapshot:delete": ({"snapshot"}, "/images/snapshots/volumes"),
    "ssh_key:delete": ({"key"}, "/account/security"),
}


def test_scopes_that_are_not_needed(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    sim.token_lacks(*UNUSED)
    run(home)
    assert_backed_up(home, volume)


def test_token_lacks_a_scope(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """The message names the call that was refused and the scope that it needs."""
    for scope in sampled(pytestconfig, SCOPES, 3):
        with account(tmp_path / scope.replace(":", "-")) as (sim, home):
            add_volume(sim, "data")
            sim.token_lacks(scope)
            done = run(home, expect=1)
            lines = [line for line in done.stderr.splitlines() if "the token lacks a scope" in line]
            assert any(re.search(rf"refused (GET|POST) /v2/.* needs .*\b{scope}\b", line) for line in lines), done
            assert_nothing_left(sim)


@pytest.mark.parametrize("scope", DELETING)
def test_token_must_not_delete(home: Home, sim: Simulator, scope: str) -> None:
    """What is left is named with id, cost and address; with a better token, sweep removes it."""
    add_volume(sim, "data")
    sim.token_lacks(scope)
    done = run(home, expect=1, constants={"BUSY_LIMIT": 1})
    kinds, page = DELETING[scope]
    assert {item.kind for item in sim.alive()} == kinds
    assert_named(sim, done.stderr)
    assert f"https://cloud.digitalocean.com{page}" in done.stderr
    assert re.search(rf"refused DELETE /v2/.* needs .*\b{scope}\b", done.stderr)
    sim.token_lacks()
    assert "nothing of dosvob's is left" in run(home, "sweep").stdout
    assert_nothing_left(sim)


def test_token_is_revoked_in_the_middle(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    sim.faults.add(Fault("never-active"))
    running = start(home)
    until(lambda: {item.kind for item in sim.alive()} == {"key", "droplet", "volume"})
    sim.revoke_token()
    assert running.end() == 1
    assert_explained_by_token(running.output)
    assert_named(sim, running.output)
    sim.revoke_token(False)
    run(home, "sweep")
    assert_nothing_left(sim)


def test_token_is_revoked_after_a_lost_answer(home: Home, sim: Simulator) -> None:
    """Whether the droplet exists nobody can tell then; that it may is said."""
    sim.faults.add(Fault("lost", method="POST", path="^/v2/droplets$"))
    sim.faults.add(Fault("error", method="GET", path="^/v2/droplets$", nth=2, times=FOREVER))
    add_volume(sim, "data")
    running = start(home)
    until(lambda: sim.droplets)
    sim.revoke_token()
    sim.faults.clear()
    assert running.end() == 1
    assert re.search(r"there may be something LEFT BEHIND.*droplet dosvob-ephemeral-\w+-", running.output)
    sim.revoke_token(False)
    run(home, "sweep")
    assert_nothing_left(sim)


def assert_explained_by_token(output: str) -> None:
    assert "The token is wrong, expired or revoked" in output
    assert "Traceback" not in output


# -- rate limits


def test_rate_limit_is_waited_for_visibly(home: Home, sim: Simulator) -> None:
    """The 429 says how long; a burst of them hits any call."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("rate-limit", nth=5, times=3, seconds=1), Fault("rate-limit-reset", nth=20, seconds=1))
    assert "rate limit is reached; trying again in 1 s" in run(home).stdout
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_rate_limit_that_tells_no_time_worth_waiting(home: Home, sim: Simulator) -> None:
    """A second is waited for each time, and no more requests are made than that."""
    volume = add_volume(sim, "data")
    told = {"/v2/regions": "0", "/v2/sizes": "-5", "/v2/images": "nan", f"/v2/volumes/{volume.id}/snapshots": "0"}
    sim.faults.add(*(Fault("rate-limit", path=f"^{path}$", text=text) for path, text in told.items()))
    output = run(home).stdout
    assert output.count("rate limit is reached; trying again in 1 s") == 3
    assert output.count("the other volumes go first") == 1
    for path in told:
        assert [record.status // 100 for record in sim.requests if record.path == path] == [4, 2]
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_snapshot_meets_the_hourly_limit(home: Home, sim: Simulator) -> None:
    """The account's, which says nothing of the volume: it is waited for as everywhere."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("rate-limit-reset", method="POST", path="^/v2/volumes/.*/snapshots$", seconds=2))
    done = run(home)
    assert "the other volumes go first" not in done.stdout
    assert "DigitalOcean's rate limit is reached; trying again in" in done.stdout
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


DAY = 86400


@behaving(clock_seconds=-1200)
def test_clock_is_ahead(home: Home, sim: Simulator) -> None:
    """The hour's end, as DigitalOcean tells it, is over by this clock; it is waited for all the same."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("rate-limit-reset", nth=5, seconds=3))
    done = run(home)
    assert re.search("rate limit is reached; trying again in [34] s", done.stdout)
    told = "warning: this machine's clock is 2"  # 20:00 or 20:01 min
    assert done.stderr.count(told) == 1
    assert_backed_up(home, volume)
    assert run(home, "--quiet").stderr.count(told) == 1


@behaving(clock_seconds=5 * DAY)
def test_clock_is_days_behind(home: Home, sim: Simulator) -> None:
    """An image has the time that DigitalOcean gives its snapshot, and so have versions."""
    volume = add_volume(sim, "data")
    taken: list[str] = []
    for content in (b"1", b"2"):
        write_at(volume.path, 0, content)
        run(home)
        snapshot = next(item for item in reversed(sim.ever) if isinstance(item, Snapshot))
        taken.append(datetime.fromtimestamp(snapshot.created, UTC).strftime("%Y-%m-%dT%H:%M:%S+00:00"))
    listed = json.loads(run(home, "list", "--json").stdout)
    assert [version["time"] for version in listed["volumes"][0]["versions"]] == taken[::-1]


@pytest.mark.parametrize("seconds", [973 * 365 * DAY, -2e9], ids=["far ahead", "before 2000"])
def test_a_snapshot_has_a_time_that_cannot_be(
    home: Home, sim: Simulator, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """The image has that of its backup: else versions that come after would be named, and thinned, by such a time."""
    volume, born = add_volume(sim, "data"), Snapshot.as_json
    began = datetime.now(UTC) - timedelta(seconds=2)  # its clock is DigitalOcean's, which tells whole seconds

    def told(snapshot: Snapshot) -> dict[str, Any]:
        moment = datetime.fromtimestamp(snapshot.created + seconds, UTC)
        return {**born(snapshot), "created_at": moment.strftime("%Y-%m-%dT%H:%M:%SZ")}

    monkeypatch.setattr(Snapshot, "as_json", told)
    run(home)
    assert_backed_up(home, volume)
    (version,) = json.loads(run(home, "list", "--json").stdout)["volumes"][0]["versions"]
    assert began <= datetime.fromisoformat(version["time"]) <= datetime.now(UTC)


@behaving(clock_seconds=-1200, snapshot_interval=5)
def test_clock_is_ahead_when_a_snapshot_was_taken_a_moment_ago(home: Home, sim: Simulator) -> None:
    """By this clock it was long ago; it is asked for when it is due."""
    volume = add_volume(sim, "data")
    run(home)
    run(home, constants={"SNAPSHOT_INTERVAL": 7})
    asked = [record for record in sim.requests if record.method == "POST" and record.path.endswith("/snapshots")]
    statuses = [record.status for record in asked]
    assert statuses.count(201) == 2
    assert statuses.count(429) <= 1  # none if the machine is slow
    assert_backed_up(home, volume)


def test_a_limit_that_may_be_the_accounts_takes_nothing_from_a_volumes_time(home: Home, sim: Simulator) -> None:
    """The snapshot is refused as too early, then for longer than that would do for a limit of the one or the other."""
    volume = add_volume(sim, "data")
    snapshot = Fault("error", method="POST", path="^/v2/volumes/.*/snapshots$", status=429)
    sim.faults.add(snapshot, replace(snapshot, kind="rate-limit", nth=2, seconds=7), replace(snapshot, nth=3))
    run(home, constants={"SNAPSHOT_INTERVAL": 0.1, "SNAPSHOT_GRACE": 5})
    assert len(sim.faults.fired) == 3
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


@pytest.mark.parametrize(
    "behaviour",
    [{"requests_per_minute": 20}, {"key_lists_per_minute": 2}],
    indirect=True,
    ids=["requests", "lists-of-keys"],
)
def test_limits_of_a_minute(pytestconfig: pytest.Config, home: Home, sim: Simulator) -> None:
    if not pytestconfig.option.exhaustive:
        pytest.skip("takes minutes: with --all only")
    volume = add_volume(sim, "data")
    done = home.run(constants=QUICK, timeout=400)
    assert "rate limit is reached; trying again in " in done.stdout
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


@behaving(key_lists_per_minute=10)
def test_keys_are_listed_seldom(home: Home, sim: Simulator) -> None:
    """Ten lists of keys a minute are enough for a run that removes what another one left, and whose teardown waits."""
    sim.add_key("dosvob-ephemeral-00000000-key")
    add_volume(sim, "data")
    assert "rate limit" not in run(home).stdout
    assert_nothing_left(sim)


@behaving(idle_seconds=4)
def test_a_router_forgets_what_is_idle(home: Home, sim: Simulator) -> None:
    """As during a long sync: no request goes over a connection that was idle for long."""
    volumes = [add_volume(sim, "a", size=8 << 20), *(add_volume(sim, name, size=0) for name in "bcdef")]
    sim.faults.add(Fault("ssh-slow", bytes=1 << 20))
    run(home, constants={"IDLE_LIMIT": 1})
    assert sim.lost_requests == 0
    assert_backed_up(home, *volumes)
    assert_nothing_left(sim)


def test_a_connection_that_breaks_does_not_wait_for_the_hourly_limit(home: Home, sim: Simulator) -> None:
    """What it asks of DigitalOcean, whether the droplet lives, can wait."""
    volume = add_volume(sim, "data", size=12 << 20)
    sim.faults.add(Fault("ssh-cut", bytes=5 << 20))
    running = start(home)
    until(lambda: any(record.path.endswith("/actions") for record in sim.requests))
    sim.faults.add(Fault("rate-limit-reset", method="GET", path=r"^/v2/droplets/\d+$", seconds=3600, times=FOREVER))
    assert running.end() == 0, running.output
    assert "connecting again" in running.output
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


# -- another host


class Elsewhere(BaseHTTPRequestHandler):
    """A host that the token must never reach."""

    seen: list[str]

    def do_GET(self) -> None:
        """Remember the request."""
        self.seen.append(f"{self.command} {self.path} {self.headers}")
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """The address of another host, and the requests that it got."""
    seen: list[str] = []
    handler = type("Handler", (Elsewhere,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v2/droplets"), ("POST", "/v2/droplets"), ("DELETE", "/v2/droplets/.*")]
)
def test_redirect_is_not_followed(
    home: Home, sim: Simulator, elsewhere: tuple[str, list[str]], method: str, path: str
) -> None:
    url, seen = elsewhere
    add_volume(sim, "data")
    sim.faults.add(Fault("redirect", method=method, path=f"^{path}$", text=f"{url}/v2/droplets"))
    done = run(home, expect=None)
    assert sim.faults.fired
    assert seen == []
    assert_nothing_left(sim)
    assert (done.returncode == 0) == (method == "DELETE")
    if done.returncode:
        assert "It redirects, and your token goes nowhere else" in done.stderr
