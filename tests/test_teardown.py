"""However a run ends, nothing of it stays in the account: signals at any moment, crashes, and what resists removal."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import Home, sampled
from simulator import FOREVER, Fault, Simulator
from trouble_support import (
    FAST,
    PATIENCE,
    QUICK,
    SOON,
    PausingPython,
    Running,
    account,
    add_volume,
    answered,
    assert_backed_up,
    assert_named,
    assert_nothing_left,
    run,
    start,
    until,
)

import dosvob

pytestmark = pytest.mark.small

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CALLS = 60  # about as many as a run with three volumes makes; a run that has made fewer has ended, which is fine


def after_call(running: Running, sim: Simulator, number: int) -> None:
    """Wait until the run has made so many calls, or has ended."""
    until(lambda: len(sim.requests) >= number or running.process.poll() is not None)


# -- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_after_any_call(pytestconfig: pytest.Config, tmp_path: Path, number: signal.Signals) -> None:
    moments = list(range(1, CALLS + 1))
    turn = SIGNALS.index(number) * CALLS // len(SIGNALS)  # so that a sample is another one for each signal
    for moment in sampled(pytestconfig, moments[turn:] + moments[:turn], 1):
        with account(tmp_path / str(moment)) as (sim, home):
            for name in ("data", "more", "other"):
                add_volume(sim, name)
            running = start(home)
            after_call(running, sim, moment)
            running.signal(number)
            code = running.end()
            assert_nothing_left(sim)
            assert "Traceback" not in running.output
            assert "error: " not in running.output
            if "this run cost" in running.output:  # it had just ended, or its work was done
                assert code in (0, 128 + number, -number)
            else:
                assert code == 128 + number, (moment, running.output)
                assert f"{number.name}: stopping, and removing what was created" in running.output


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_during_the_sync(home: Home, sim: Simulator, tmp_path: Path, number: signal.Signals) -> None:
    add_volume(sim, "data", size=12 << 20)
    pausing = PausingPython(tmp_path, 6 << 20)
    sim.faults.add(pausing.fault)
    running = start(home)
    pausing.wait()
    running.signal(number)
    assert running.end() == 128 + number
    assert_nothing_left(sim)
    assert home.image("data.partial").exists()


def test_second_signal_does_not_stop_the_teardown(pytestconfig: pytest.Config, home: Home, sim: Simulator) -> None:
    """It says what is still being done."""
    add_volume(sim, "data")
    sim.faults.add(Fault("never-active"))
    undeletable = Fault("error", method="DELETE", path="^/v2/droplets/", status=409, times=FOREVER)
    sim.faults.add(undeletable)
    running = start(home)
    until(lambda: sim.droplets)
    running.signal(signal.SIGINT)
    until(lambda: any(fault is undeletable for _, fault in sim.faults.fired))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        said = running.output.count("still at work")
        running.signal(number)
        until(lambda said=said: running.output.count("still at work") > said)  # type: ignore[misc]
    assert running.process.poll() is None
    assert "still at work: removing " in running.output
    sim.faults.clear()
    assert running.end() == 128 + signal.SIGINT
    assert_nothing_left(sim)


@pytest.mark.parametrize("how", ["run", "sweep"])
def test_killed_after_any_call(pytestconfig: pytest.Config, tmp_path: Path, how: str) -> None:
    """The next run removes what is left, and so does a sweep."""
    moments = list(range(8, CALLS + 1))
    turn = len(moments) // 2 if how == "run" else 0
    for moment in sampled(pytestconfig, moments[turn:] + moments[:turn], 1):
        with account(tmp_path / str(moment)) as (sim, home):
            volumes = [add_volume(sim, name) for name in ("data", "more", "other")]
            running = start(home)
            after_call(running, sim, moment)
            running.signal(signal.SIGKILL)
            running.end()
            answered(sim)
            left = sim.alive()
            done = run(home, *([how] if how == "sweep" else []))
            for item in left:
                assert f"left over from an earlier run: {'SSH key' if item.kind == 'key' else item.kind}" in done.stdout
            assert_nothing_left(sim)
            if how == "run":
                assert_backed_up(home, *volumes)


def test_nothing_of_the_users_is_swept(home: Home, sim: Simulator) -> None:
    """Only what has dosvob's tag or prefix is."""
    volume = sim.add_volume("dosvob-data")
    volumes = [volume, sim.add_volume("ephemeral"), sim.add_volume("elsewhere", "nyc1")]
    kept = [
        *volumes,
        sim.add_snapshot(volume, "dosvob"),
        sim.add_droplet("web", tags=["dosvob"]),
        sim.add_key("laptop"),
    ]
    stale = [
        sim.add_volume("dosvob-ephemeral-12345678-0"),
        sim.add_volume("tagged", tags=["dosvob-ephemeral"]),
        sim.add_volume("dosvob-ephemeral-12345678-1", "nyc1"),
        sim.add_snapshot(volume, "dosvob-ephemeral-12345678-0"),
        sim.add_droplet("dosvob-ephemeral-12345678-droplet"),
        sim.add_key("dosvob-ephemeral-12345678-key"),
    ]
    dry = run(home, "sweep", "--dry-run")
    assert all(item.deleted is None for item in stale)
    assert all(f"(id {item.id}" in dry.stdout for item in stale)
    run(home, "sweep")
    assert all(item.deleted for item in stale)
    assert not any(item.deleted for item in kept)


# -- what resists


def test_volume_stays_attached_for_a_while(tmp_path: Path) -> None:
    """It cannot be deleted for some seconds after its droplet; the teardown waits for that."""
    with account(tmp_path / "account", replace(FAST, release_seconds=4)) as (sim, home):
        volume = add_volume(sim, "data")
        run(home)
        refusals = [record for record in sim.requests if record.method == "DELETE" and record.status == 409]
        assert len(refusals) > 1
        assert_backed_up(home, volume)
        assert_nothing_left(sim)


@pytest.mark.parametrize(("path", "kind"), [("volumes", "volume"), ("droplets", "droplet"), ("account/keys", "key")])
def test_what_cannot_be_removed_is_named(home: Home, sim: Simulator, path: str, kind: str) -> None:
    """With its id, what it costs, where to remove it; the next run removes it."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("error", method="DELETE", path=f"^/v2/{path}/", status=409, times=FOREVER))
    done = run(home, expect=1, constants={"LIMIT": 1.5})
    assert_backed_up(home, volume)
    left = [item for item in sim.alive() if item.kind == kind]
    assert len(left) == 1
    lines = [line for line in done.stderr.splitlines() if f"(id {left[0].id}" in line]
    assert len(lines) == 1
    assert "LEFT BEHIND" in lines[0]
    assert "https://cloud.digitalocean.com/" in lines[0]
    assert lines[0].endswith("dosvob.py sweep")
    assert ("a month)" in lines[0]) == (kind != "key")
    sim.faults.clear()
    run(home)
    assert_nothing_left(sim)


def test_droplet_whose_deletion_meets_a_rate_limit_without_an_end(home: Home, sim: Simulator) -> None:
    """It is waited for with an end: the rest is removed, but for what is attached to the droplet."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("rate-limit", method="DELETE", path="^/v2/droplets/", seconds=1, times=FOREVER))
    done = run(home, expect=1, constants={"RATE_LIMIT_PATIENCE": 1.5, "LIMIT": 0.5})
    assert_backed_up(home, volume)
    assert {item.kind for item in sim.alive()} == {"droplet", "volume"}
    assert_named(sim, done.stderr)


def test_snapshots_that_meet_the_accounts_rate_limit_without_an_end(home: Home, sim: Simulator) -> None:
    """The volume fails with the words for that, not as one whose next snapshot is awaited; nothing is left."""
    add_volume(sim, "data")
    refused = Fault("rate-limit-reset", method="POST", path="^/v2/volumes/[^/]+/snapshots", seconds=1, times=FOREVER)
    sim.faults.add(refused)
    done = run(home, expect=1, constants={"RATE_LIMIT_PATIENCE": 1.5})
    (error,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert re.search(r"data: DigitalOcean refused POST /v2/volumes/\S+: .*Too many requests: try again later", error)
    assert "10 minutes" not in done.stdout + done.stderr
    assert_nothing_left(sim)


def test_signal_while_the_droplet_cannot_be_deleted(home: Home, sim: Simulator) -> None:
    """That something is left is more than that there was a signal: the exit code says so."""
    add_volume(sim, "data")
    sim.faults.add(Fault("never-active"))
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/droplets/", status=409, times=FOREVER))
    running = start(home, constants={"LIMIT": 0.5})
    until(lambda: sim.droplets)
    running.signal(signal.SIGTERM)
    assert running.end() == 1
    assert [item.kind for item in sim.alive()] == ["droplet"]
    assert_named(sim, running.output)


OUTAGES = {"503": Fault("error", status=503), "before": Fault("lost", effect=False), "after": Fault("lost")}


@pytest.mark.parametrize("outage", OUTAGES)
def test_outage_in_the_first_round_of_the_teardown(home: Home, sim: Simulator, outage: str) -> None:
    """However long that round took, there is another one; and what was deleted without an answer is not missed."""
    volume = add_volume(sim, "data")
    ours = "^/v2/(droplets|volumes|account/keys)/"
    sim.faults.add(replace(OUTAGES[outage], method="DELETE", path=ours, times=FOREVER))
    running = start(home, constants={"TEARDOWN_PATIENCE": 1, "LIMIT": 1.2})
    until(lambda: any(record.method == "DELETE" and "keys" in record.path for record in sim.requests))  # the last one
    sim.faults.clear()
    assert running.end() == 0, running.output
    assert "error: " not in running.output
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


@pytest.mark.parametrize("behaviour", [{"list_lag_seconds": 1000}], indirect=True)
def test_outage_in_the_first_round_while_lists_show_nothing(home: Home, sim: Simulator) -> None:
    """What is known to have been created is not forgotten for a list that does not have it."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/(droplets|account/keys)/", status=503, times=FOREVER))
    running = start(home, constants={"TEARDOWN_PATIENCE": 1, "LIST_LAG": 1})
    until(lambda: any(record.method == "DELETE" and "keys" in record.path for record in sim.requests))  # the last one
    sim.faults.clear()
    assert running.end() == 0, running.output
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_what_goes_one_by_one_is_waited_for_as_long_as_it_gets_on(home: Home, sim: Simulator) -> None:
    """Longer than for what does not go."""
    items = [sim.add_volume(f"dosvob-ephemeral-12345678-{number}") for number in range(3)]
    for item, times in zip(items, (5, 6, 8), strict=True):
        sim.faults.add(Fault("error", method="DELETE", path=f"^/v2/volumes/{item.id}", status=409, times=times))
    run(home, "sweep", constants={"LIMIT": 9})
    assert all(item.deleted for item in items)


def test_a_clone_that_is_busy_for_a_moment_is_gone_before_the_end(home: Home, sim: Simulator) -> None:
    """A volume costs as long as it exists; the next ones may take hours."""
    volumes = [add_volume(sim, name) for name in ("data", "more", "other", "still")]
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/volumes/", status=409))
    sim.faults.add(Fault("delay", method="POST", path="/snapshots$", nth=4, seconds=8))
    run(home, constants={"HOUR_ENDS": 0})
    gone = [record.path for record in sim.requests if (record.method, record.status) == ("DELETE", 204)]
    assert next(path.split("/")[2] for path in gone if "snapshots" not in path) == "volumes"
    assert_backed_up(home, *volumes)


def test_one_attach_or_detach_waits_for_another_however_long_that_takes(tmp_path: Path) -> None:
    """A clone is to be detached while the next one is attached."""
    with account(tmp_path / "account", replace(FAST, action_seconds=3)) as (sim, home):
        volumes = [add_volume(sim, name) for name in ("data", "more", "other", "still")]
        run(home, constants={"BUSY_LIMIT": 1, "HOUR_ENDS": 0})
        assert_backed_up(home, *volumes)


def test_answers_to_deletions_trickle_for_ever(home: Home, sim: Simulator) -> None:
    """One of each kind: none keeps the others waiting for long, or from being asked for again."""
    volume = add_volume(sim, "data")
    for path in ("droplets", "volumes", "account/keys"):
        sim.faults.add(Fault("trickle", method="DELETE", path=f"^/v2/{path}/", effect=path == "droplets", seconds=0.1))
    run(home, constants={"CALL_LIMIT": SOON, "TEARDOWN_PATIENCE": 0.3})
    assert len(sim.faults.fired) == 3
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_what_is_deleted_after_a_long_wait_is_not_named(home: Home, sim: Simulator) -> None:
    """It was looked for in vain for longer than anything resists, but for the API's limit."""
    sim.add_volume("dosvob-ephemeral-1", tags=["dosvob-ephemeral"])
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/volumes/", status=409))
    sim.faults.add(Fault("rate-limit", method="GET", path="^/v2/volumes$", nth=3, seconds=3))
    done = run(home, "sweep", constants={"LIMIT": 2.5})
    assert "LEFT BEHIND" not in done.stderr
    assert_nothing_left(sim)


def test_a_snapshot_that_is_not_deleted_at_once_costs_nothing(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/snapshots/", status=403))
    run(home)
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_rate_limit_of_all_calls_without_an_end(home: Home, sim: Simulator) -> None:
    """It is waited for as long as for one call, not for each call, in each round, anew."""
    add_volume(sim, "data")
    first = Fault("rate-limit", method="DELETE", path="^/v2/droplets/", seconds=1)
    sim.faults.add(first)
    running = start(home, constants={"RATE_LIMIT_PATIENCE": 2.5, "LIMIT": 0.5})
    until(lambda: sim.faults.fired)
    sim.faults.add(replace(first, method="", path="", times=FOREVER))
    assert running.end() == 1
    assert running.output.count("trying again in 1 s") <= 2
    assert_named(sim, running.output)


ODD: tuple[dict[str, Any], ...] = ({"links": ["x"]}, {"volumes": {"size_gigabytes": "one"}}, {"volumes": {"tags": 7}})


@pytest.mark.parametrize("fields", ODD, ids=str)
def test_odd_answer_in_the_teardown(home: Home, sim: Simulator, fields: dict[str, Any]) -> None:
    """The list is asked for again, and all the rest is removed in the meantime."""
    volume = add_volume(sim, "data")
    odd = Fault("odd", method="GET", path="^/v2/volumes$", nth=3, text=json.dumps(fields))
    sim.faults.add(odd)  # the first two lists are those of the sweep and of what to back up
    run(home)
    deleted = next(record.number for record in sim.requests if record.method == "DELETE" and "droplets" in record.path)
    assert [number > deleted for number, _ in sim.faults.fired] == [True]
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


LAST_LISTS = {"odd": Fault("odd", text='{"volumes": {"tags": 7}}'), "503": Fault("error", status=503, times=5)}


@pytest.mark.parametrize("how", LAST_LISTS)
def test_last_look_goes_wrong(home: Home, sim: Simulator, how: str) -> None:
    """All is backed up and removed by then; that it could not be looked for more at once is no failure."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("delay", method="DELETE", path="^/v2/account/keys/", seconds=1.5))
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/volumes/", status=409))
    running = start(home, constants={"TEARDOWN_PATIENCE": 0.5})
    until(lambda: any(record.method == "DELETE" and "keys" in record.path for record in sim.requests))
    nth = 2  # the first list shows the volume, which was not to be deleted before; the second one is the last
    sim.faults.add(replace(LAST_LISTS[how], method="GET", path="^/v2/volumes$", nth=nth))
    assert running.end() == 0, running.output
    assert any(fault.method == "GET" for _, fault in sim.faults.fired)
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_killed_after_creations_and_the_next_run_fails_at_once(tmp_path: Path) -> None:
    """Before the lists show what was created: it is waited for."""
    with account(tmp_path / "account", replace(FAST, list_lag_seconds=2)) as (sim, home):
        add_volume(sim, "data")
        running = start(home)
        until(lambda: any(item.kind == "volume" and not item.decoy for item in sim.ever))
        running.signal(signal.SIGKILL)
        running.end()
        sim.faults.add(Fault("error", method="POST", path="^/v2/(account/keys|.*snapshots)$", status=403, times=2))
        run(home, expect=1, constants={"LIST_LAG": 3})
        assert_nothing_left(sim)


@pytest.mark.parametrize("how", ["run", "sweep"])
def test_killed_after_creations_that_lists_show_late(tmp_path: Path, how: str) -> None:
    """What is started at once sees nothing of them at first, and removes them all the same."""
    with account(tmp_path / "account", replace(FAST, list_lag_seconds=1.5)) as (sim, home):
        add_volume(sim, "data")
        running = start(home)
        until(lambda: any(item.kind == "volume" and not item.decoy for item in sim.ever))
        running.signal(signal.SIGKILL)
        running.end()
        assert len(sim.alive()) >= 2
        sim.faults.add(Fault("delay", method="POST", path="^/v2/account/keys$", seconds=1.5))  # a run takes its time
        run(home, *([how] if how == "sweep" else []), constants={"LIST_LAG": 2})
        assert_nothing_left(sim)


def test_what_has_no_home_in_its_name_is_removed_when_it_shows_late(home: Home, sim: Simulator) -> None:
    """An older version's, by the name."""
    add_volume(sim, "data")
    running = start(home)
    until(lambda: sim.droplets)
    late = sim.add_volume("dosvob-ephemeral-12345678-0")
    assert running.end() == 0, running.output
    assert late.deleted


def test_bug_in_the_teardown_keeps_nothing_untold(home: Home, sim: Simulator) -> None:
    add_volume(sim, "data")
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/droplets/", status=409, times=FOREVER))
    done = run(home, expect=1, constants={"LIMIT": {}})
    assert {item.kind for item in sim.alive()} >= {"droplet"}
    assert_named(sim, done.stderr)


def test_next_run_fails_while_something_is_left(home: Home, sim: Simulator) -> None:
    """Volumes are backed up nevertheless."""
    volume = add_volume(sim, "data")
    stuck = sim.add_volume("dosvob-ephemeral-12345678-0")
    sim.faults.add(Fault("error", method="DELETE", path=f"^/v2/volumes/{stuck.id}", status=409, times=FOREVER))
    done = run(home, expect=1, constants={"LIMIT": 0.5})
    assert (
        f"LEFT BEHIND, and billed until you remove it: volume {stuck.name} (id {stuck.id}, $0.10 a month)"
        in done.stderr
    )
    assert len(re.findall(f"LEFT BEHIND.*{stuck.name}", done.stderr)) == 1  # the run's own teardown leaves it alone
    assert_backed_up(home, volume)


def test_sweep_fails_while_something_is_left(home: Home, sim: Simulator) -> None:
    stuck = sim.add_volume("dosvob-ephemeral-12345678-0")
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/volumes/", status=409, times=FOREVER))
    done = run(home, "sweep", expect=1, constants={"LIMIT": 0.5})
    assert f"LEFT BEHIND, and billed until you remove it: volume {stuck.name} (id {stuck.id}" in done.stderr


@pytest.mark.parametrize("path", ["snapshots", "droplets", "account/keys"])
def test_what_is_gone_when_its_deletion_is_asked_for_again_is_gone(home: Home, sim: Simulator, path: str) -> None:
    """The first answer was lost."""
    volume = add_volume(sim, "data")
    sim.faults.add(Fault("lost", method="DELETE", path=f"^/v2/{path}/"))
    run(home, constants={"LIMIT": 3})
    assert any((record.method, record.status) == ("DELETE", 404) for record in sim.requests)
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_usage_error_while_something_is_left(home: Home, sim: Simulator) -> None:
    """That is worse than a configuration that is wrong."""
    add_volume(sim, "data")
    home.configure(include=["old"])
    stuck = sim.add_volume("dosvob-ephemeral-12345678-0")
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/volumes/", status=409, times=FOREVER))
    done = run(home, expect=1, constants={"LIMIT": 0.5})
    assert f"LEFT BEHIND, and billed until you remove it: volume {stuck.name} (id {stuck.id}" in done.stderr
    assert '"old"' in done.stderr


# -- two runs


def test_second_run_in_a_directory_ends_at_once(home: Home, sim: Simulator) -> None:
    volume = add_volume(sim, "data")
    never = Fault("never-active")
    sim.faults.add(never)
    first = start(home)
    until(lambda: sim.droplets)
    for arguments in ([], ["sweep"], ["verify"]):
        before = sorted(path.name for path in home.backups.rglob("*"))
        done = home.run(*arguments, expect=2, DIGITALOCEAN_API_URL="http://127.0.0.1:1")  # not one call is made
        assert "another dosvob is at work in backups" in done.stderr
        assert sorted(path.name for path in home.backups.rglob("*")) == before
    assert sim.droplets
    assert first.process.poll() is None
    first.signal(signal.SIGTERM)
    assert first.end() == 128 + signal.SIGTERM
    assert_nothing_left(sim)
    sim.faults.clear()
    run(home)
    assert_backed_up(home, volume)


def test_droplet_of_another_machine_is_told_of_and_not_touched(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """The other machine's run goes on, and fails or not for reasons of its own."""
    volume = add_volume(sim, "data")
    elsewhere = Home(tmp_path / "elsewhere", sim)
    sim.faults.add(Fault("never-active", times=2))
    other = start(elsewhere, constants={"ADDRESS_LIMIT": 300})
    until(lambda: sim.droplets)
    droplet = sim.droplets[0]
    done = run(home, "sweep")
    assert droplet.deleted is None
    (said,) = [line for line in done.stdout.splitlines() if f"(id {droplet.id}" in line]
    assert "not touched, because it belongs to another backups directory" in said
    assert re.search(r"\b\d+ s old\b", said)
    assert "sweep --all" in said
    assert done.stderr == ""
    assert other.process.poll() is None
    other.signal(signal.SIGTERM)
    assert other.end() == 128 + signal.SIGTERM
    assert_nothing_left(sim)
    sim.faults.clear()
    run(elsewhere)
    assert_backed_up(elsewhere, volume)


ANOTHER_HOMES = "dosvob-ephemeral-12345678-9abcdef0-droplet"


@pytest.mark.parametrize(("seconds", "told"), [(-60, "0 s old"), (3 * 3600 + 30, "3:0"), (100 * 3600, "4 days old")])
def test_how_old_it_is_what_another_home_has(home: Home, sim: Simulator, seconds: int, told: str) -> None:
    """It may be created in what is the future here, and what is older than any run is warned of. Some time may pass."""
    droplet = sim.add_droplet(ANOTHER_HOMES, tags=["dosvob-ephemeral"])
    add_volume(sim, "data")
    for arguments in ([], ["sweep"], ["--dry-run"], ["sweep", "--dry-run"]):
        droplet.created = time.time() - seconds
        done = run(home, *arguments)
        output, other = (done.stderr, done.stdout) if seconds > 24 * 3600 else (done.stdout, done.stderr)
        (said,) = [line for line in output.splitlines() if f"(id {droplet.id}" in line]
        assert told in said
        assert "not touched" in said
        assert ANOTHER_HOMES not in other
        assert droplet.deleted is None
    assert_nothing_left(sim)
    run(home, "sweep", "--all")
    assert droplet.deleted


def test_of_what_a_sweep_of_all_homes_could_not_remove_such_a_sweep_is_named(home: Home, sim: Simulator) -> None:
    sim.add_droplet(ANOTHER_HOMES, tags=["dosvob-ephemeral"])
    sim.faults.add(Fault("error", method="DELETE", status=403, times=FOREVER))
    (said,) = run(home, "sweep", "--all", expect=1).stderr.splitlines()
    assert "LEFT BEHIND" in said
    assert said.endswith("sweep --all")


def test_an_id_that_cannot_be_read_is_not_replaced(home: Home, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what an earlier run left would be taken for another home's."""
    run(home, "sweep")
    path = home.backups / ".dosvob" / "home"
    known = path.read_text()

    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patches:
        patches.setattr(Path, "read_text", fail)
        with pytest.raises(OSError, match="Input/output error"), dosvob.Home(home.backups).locked():
            pass
    assert path.read_text() == known


@pytest.mark.parametrize("age", [-60, 0, 3600])
def test_droplet_of_no_home_is_swept_without_a_warning(home: Home, sim: Simulator, age: int) -> None:
    droplet = sim.add_droplet("dosvob-ephemeral-12345678-droplet", tags=["dosvob-ephemeral"])
    droplet.created = time.time() - age
    assert run(home, "sweep").stderr == ""
    assert droplet.deleted


# -- nobody listens


@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_output_is_closed_in_the_middle(home: Home, sim: Simulator, closed: str) -> None:
    """As with `| head -1`: the backup and the teardown go on, and the exit code is the usual one."""
    volume = add_volume(sim, "data")
    read, write = os.pipe()
    process = subprocess.Popen(
        home.command("--verbose", constants=QUICK),
        cwd=home.directory,
        env=home.environment(),
        stdout=write,
        stderr=write if closed == "both" else subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert os.read(read, 1)
    os.close(read)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, errors
    assert closed == "both" or errors == ""
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def full_pipe() -> tuple[int, int]:
    """A pipe that nobody reads, with no room for another byte: its ends for reading and writing."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write, b"x"):
            pass
    os.set_blocking(write, True)
    return read, write


def test_output_is_not_read(home: Home, sim: Simulator) -> None:
    """As with `| less`, or after ^S: nothing waits for it, the teardown and the end least of all."""
    add_volume(sim, "data")
    sim.faults.add(Fault("never-active"))
    read, write = full_pipe()
    process = subprocess.Popen(
        home.command("--verbose", constants={**QUICK, "STUCK_LIMIT": 0.5}),
        cwd=home.directory,
        env=home.environment(),
        stdout=write,
        stderr=write,
    )
    os.close(write)
    until(lambda: sim.droplets or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    os.close(read)
    assert_nothing_left(sim)


def test_errors_are_read_and_output_is_not(home: Home, sim: Simulator) -> None:
    """As with `| less`: what is left behind is named on the terminal."""
    add_volume(sim, "data")
    sim.faults.add(Fault("never-active"))
    sim.faults.add(Fault("error", method="DELETE", path="^/v2/droplets/", status=409, times=FOREVER))
    read, write = full_pipe()
    process = subprocess.Popen(
        home.command("--verbose", constants={**QUICK, "STUCK_LIMIT": 0.5, "LIMIT": 0.5}),
        cwd=home.directory,
        env=home.environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    until(lambda: sim.droplets or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=PATIENCE)[1]
    os.close(read)
    assert process.returncode == 1
    assert_named(sim, errors)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_output_is_closed_from_the_beginning(home: Home, sim: Simulator, closed: str) -> None:
    """Nothing that is opened later, an image least of all, takes the place of what is closed and gets messages."""
    volume = add_volume(sim, "data")
    home.run(constants=QUICK, wrapper=("sh", "-c", f'exec "$@" {closed}', "sh"))
    assert_backed_up(home, volume)
    assert_nothing_left(sim)


def test_terminal_vanishes(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """The window of the terminal is closed: SIGHUP, and nobody to write to."""
    add_volume(sim, "data", size=12 << 20)
    pausing = PausingPython(tmp_path, 6 << 20)
    sim.faults.add(pausing.fault)
    pid, terminal = pty.fork()
    if pid == 0:  # the child, whose terminal it is
        os.chdir(home.directory)
        command = home.command(constants={**QUICK, "LIVE_INTERVAL": 0.01})
        os.execve(command[0], command, home.environment())
    reader = threading.Thread(target=drain, args=(os.dup(terminal),), daemon=True)
    reader.start()
    pausing.wait()
    os.close(terminal)
    reader.join(PATIENCE)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert_nothing_left(sim)


def drain(terminal: int) -> None:
    """Read what a terminal shows, a while, then close it."""
    try:
        while b"scanned" not in os.read(terminal, 65536):
            pass
    except OSError:
        pass
    finally:
        os.close(terminal)


def test_signal_while_a_creation_without_an_answer_is_looked_for(home: Home, sim: Simulator) -> None:
    """The teardown finds it, so there is no alarm."""
    add_volume(sim, "data")
    sim.faults.add(
        Fault("lost", method="POST", path="^/v2/droplets$"),
        Fault("error", method="GET", path="^/v2/droplets$", nth=2, times=FOREVER, status=503),  # not the sweep's
    )
    running = start(home)
    running.wait_for("HTTP 503")
    running.signal(signal.SIGTERM)
    running.wait_for("stopping, and removing")
    sim.faults.clear()
    assert running.end() == 128 + signal.SIGTERM
    assert "LEFT BEHIND" not in running.output
    assert_nothing_left(sim)


@pytest.mark.parametrize("how", ["forbidden", "failing"])
def test_a_kind_that_cannot_be_listed_does_not_keep_the_others_from_being_swept(
    home: Home, sim: Simulator, how: str
) -> None:
    """They cost money meanwhile."""
    add_volume(sim, "data")
    sim.faults.add(Fault("never-active"))
    running = start(home)
    until(lambda: {item.kind for item in sim.alive()} >= {"key", "droplet", "volume"})
    running.signal(signal.SIGKILL)
    running.end()
    sim.faults.clear()
    if how == "forbidden":
        sim.token_lacks("ssh_key:read")
    else:
        sim.faults.add(Fault("error", method="GET", path="^/v2/account/keys", status=503, times=FOREVER))
    done = run(home, "sweep", expect=1, constants={"PATIENCE": 2, "LIMIT": 3})
    assert "error: DigitalOcean refused GET /v2/account/keys: " in done.stderr
    assert {item.kind for item in sim.alive()} <= {"key"}
    sim.token_lacks()
    sim.faults.clear()
    run(home, "sweep")
    assert_nothing_left(sim)


@pytest.mark.parametrize("behaviour", [{"list_lag_seconds": 2}], indirect=True)
def test_what_may_not_be_removed_does_not_end_the_looking_for_what_lists_show_late(home: Home, sim: Simulator) -> None:
    """A droplet whose creation was not answered is removed, or named, although the key must stay."""
    add_volume(sim, "data")
    sim.token_lacks("ssh_key:delete")
    sim.faults.add(Fault("lost", method="POST", path="^/v2/droplets$"))
    running = start(home, constants={"LIST_LAG": 4})
    until(lambda: sim.droplets)
    running.signal(signal.SIGTERM)
    running.end()
    for item in sim.alive():
        assert f"(id {item.id}" in running.output, item.kind
    sim.token_lacks()
    run(home, "sweep")


def test_cost_counts_the_time_of_a_suspended_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the clock does not that most of the program goes by."""
    ephemeral = dosvob.Ephemeral(cast("dosvob.Api", None), "0" * 8, cast("dosvob.Reporter", None))
    droplet = dosvob.Resource(dosvob.DROPLET, "1", "droplet", hourly=1.5)
    slept = 0.0
    clock_gettime = time.clock_gettime
    monkeypatch.setattr(
        "time.clock_gettime", lambda clock: clock_gettime(clock) + slept * (clock == time.CLOCK_BOOTTIME)
    )
    ephemeral._created[droplet] = dosvob.running_time()
    slept = 7200.0
    assert 3 <= ephemeral.cost() < 3.1
