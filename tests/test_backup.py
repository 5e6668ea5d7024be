"""The main job, as its user sees it: images that equal the volumes, little traffic, and an account left as it was."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import MIB, Home, data_places, same, sampled, wait_for, write_at
from simulator import FOREVER, Behaviour, Droplet, Fault, Resource, Simulator, Volume
from simulator.storage import mounted
from trouble_support import PausingPython

KIB = 1 << 10
UNITS = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": 1 << 30}
PAGE = 4096
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 ")


# ── What the tests ask


def fetched(output: str) -> dict[str, float]:
    """Bytes fetched per volume, as the table at the end tells."""
    rows = re.findall(r"^\S+ (\S+) +\S+ \w+ +\S+ \w+ +(\S+) (\w+) +\S+ \S+ +\S.* +ok$", output, re.MULTILINE)
    return {name: float(number) * UNITS[unit] for name, number, unit in rows}


def sent(sim: Simulator) -> int:
    """Bytes that all droplets so far have sent over the network, SSH and all."""
    return sum(item.bytes_sent for item in sim.ever if isinstance(item, Droplet))


def posts(sim: Simulator, path: str) -> list[tuple[int, str]]:
    """Number and path of the requests that created something, by a pattern of their path."""
    return [(r.number, r.path) for r in sim.requests if r.method == "POST" and re.search(path, r.path)]


def occupied(path: Path) -> int:
    """Bytes that a file takes on the disk."""
    return path.stat().st_blocks * 512


def assert_backed_up(home: Home, *volumes: Volume) -> None:
    """Each image is its volume; and the account holds nothing of ours."""
    for volume in volumes:
        assert same(home.image(volume.name), volume.path), volume.name
    assert not home.simulator.alive()


def files(directory: Path) -> dict[str, bytes]:
    """The content of all files."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def random_volume(sim: Simulator, name: str, mib: int = 1, size_gib: int = 1) -> Volume:
    """A volume with so many MiB of random data, in its middle."""
    volume = sim.add_volume(name, size_gib=size_gib)
    write_at(volume.path, 300 * MIB, random.randbytes(mib * MIB))
    return volume


# ── The images


def test_only_changes_are_fetched(sim: Simulator, home: Home) -> None:
    data, grown = random_volume(sim, "data", 48), sim.add_volume("grown")
    home.run()
    assert_backed_up(home, data, grown)
    assert sent(sim) < 49 * MIB
    assert occupied(home.image("data")) <= 49 * MIB
    assert occupied(home.image("grown")) < 64 * KIB  # all zeros

    before = sent(sim)
    home.run()
    assert_backed_up(home, data, grown)
    assert sent(sim) - before < 256 * KIB  # two connections, and a digest for each chunk that is not zeros

    write_at(data.path, 301 * MIB + 17, random.randbytes(3 * MIB))
    write_at(data.path, 308 * MIB, bytes(4 * MIB))
    for place in random.sample(range(32 * MIB // PAGE), 64):
        write_at(data.path, 316 * MIB + place * PAGE + 99, random.randbytes(8))
    grown.grow(2)
    write_at(grown.path, 2047 * MIB, random.randbytes(MIB))
    was_occupied = occupied(home.image("data"))
    moved = fetched(home.run().stdout)
    assert_backed_up(home, data, grown)
    changed = 3 * MIB + 64 * PAGE
    assert changed <= moved["data"] < changed + 96 * KIB  # 1 KiB of page digests for each chunk that differs
    assert MIB <= moved["grown"] < MIB + 16 * KIB
    assert was_occupied - occupied(home.image("data")) >= 4 * MIB - 64 * KIB  # the file system keeps books of its own


def test_file_system(sim: Simulator, home: Home, tmp_path: Path) -> None:
    volume = sim.add_volume("files")
    subprocess.run(["mkfs.ext4", "-q", volume.path], check=True)
    with mounted(volume.path, tmp_path / "volume") as root:
        (root / "letters").mkdir()
        (root / "letters/ada.txt").write_text("The engine works.\n")
        (root / "old.bin").write_bytes(random.randbytes(3 * MIB))
    home.run()
    with mounted(volume.path, tmp_path / "volume") as root:
        with (root / "letters/ada.txt").open("a") as file:
            file.write("It halts, too.\n")
        (root / "old.bin").unlink()
        (root / "new.bin").write_bytes(random.randbytes(2 * MIB))
        expected = files(root)
    home.run()

    assert_backed_up(home, volume)
    check = subprocess.run(["e2fsck", "-fn", home.image("files")], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
    with mounted(home.image("files"), tmp_path / "image", "ro", "noload") as root:
        assert files(root) == expected
    assert expected["letters/ada.txt"].endswith(b"It halts, too.\n")


def test_the_image_is_of_the_moment_of_the_snapshot(sim: Simulator, home: Home, tmp_path: Path) -> None:
    volume = random_volume(sim, "busy", 4)
    frozen = tmp_path / "frozen"
    subprocess.run(["cp", "--sparse=always", volume.path, frozen], check=True)
    process = home.start()
    wait_for(lambda: any(clone.snapshot_id for clone in sim.volumes))  # the snapshot is taken, its clone being made
    writes = 0
    while process.poll() is None:
        write_at(volume.path, 300 * MIB + writes % 1024 * PAGE, random.randbytes(PAGE))
        writes += 1
    assert process.returncode == 0
    assert writes > 10
    assert same(home.image("busy"), frozen)
    assert not same(home.image("busy"), volume.path)


def test_an_image_without_state_is_adopted(sim: Simulator, home: Home) -> None:
    volume = random_volume(sim, "data", 8)
    home.backups.mkdir()
    subprocess.run(["cp", "--sparse=always", volume.path, home.image("data")], check=True)  # as dd would have made it
    inode = home.image("data").stat().st_ino
    write_at(volume.path, 303 * MIB, random.randbytes(MIB))
    moved = fetched(home.run().stdout)
    assert_backed_up(home, volume)
    assert moved["data"] < MIB + 64 * KIB
    assert home.image("data").stat().st_ino == inode


def test_a_new_volume_does_not_overwrite_the_image_of_the_old_one(sim: Simulator, home: Home, tmp_path: Path) -> None:
    old = random_volume(sim, "data", 2)
    kept = tmp_path / "kept"
    subprocess.run(["cp", "--sparse=always", old.path, kept], check=True)
    home.run()
    sim.remove_volume(old)
    new = random_volume(sim, "data", 3)
    done = home.run()
    assert_backed_up(home, new)
    (aside,) = home.backups.glob("data.*")
    assert same(aside, kept)
    assert "warning" in done.stderr
    assert aside.name in done.stderr

    again = home.run()  # and it stays where it is
    assert same(aside, kept)
    assert not again.stderr
    assert_backed_up(home, new)


def test_a_killed_first_sync_is_resumed(sim: Simulator, home: Home, tmp_path: Path) -> None:
    volume = random_volume(sim, "data", 160)
    partial = home.backups / "data.partial"
    pausing = PausingPython(tmp_path, 80 * MIB)
    sim.faults.add(pausing.fault)
    process = home.start()
    pausing.wait()
    wait_for(lambda: partial.exists() and occupied(partial) > 20 * MIB)
    process.send_signal(signal.SIGKILL)
    process.wait()
    got = len(data_places(partial))
    assert not home.image("data").exists()
    assert 20 <= got < 160

    done = home.run()
    assert_backed_up(home, volume)  # the droplet and all else of the killed run is gone, too
    assert fetched(done.stdout)["data"] <= (160 - got + 3) * MIB
    assert not partial.exists()


def test_verify_names_the_damage_and_the_next_backup_heals_it(sim: Simulator, home: Home) -> None:
    volume = random_volume(sim, "data", 4)
    home.run()
    calls = len(sim.requests)
    assert "data: sound" in home.run("verify").stdout
    position = 302 * MIB + 4321
    flip_bit(home.image("data"), position)
    found = home.run("verify", "data", expect=1)
    (start, end) = re.findall(r"data: .* bytes (\d+) to (\d+)", found.stderr)[0]
    assert int(start) <= position <= int(end) < int(start) + MIB
    assert "sound" not in found.stdout
    assert len(sim.requests) == calls  # all of it without the account

    done = home.run("--reread")
    assert re.search(r"warning: data: .*differs from what was recorded", done.stderr)
    assert str(302 * MIB) in done.stderr
    assert_backed_up(home, volume)
    home.run("verify")


def flip_bit(path: Path, position: int) -> None:
    """Change one bit of a file, as a failing disk does: with its modification time as it was."""
    before = path.stat()
    with path.open("rb") as file:
        file.seek(position)
        (byte,) = file.read(1)
    write_at(path, position, bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_somebody_wrote_to_the_image_is_healed_by_the_next_backup(sim: Simulator, home: Home) -> None:
    volume = random_volume(sim, "data", 8)
    home.run()
    write_at(home.image("data"), 305 * MIB, b"oops")  # changes the modification time, so the whole image is read
    done = home.run()
    assert re.search(r"warning: data: .*differs from what was recorded", done.stderr)
    assert_backed_up(home, volume)
    assert fetched(done.stdout)["data"] < 64 * KIB


# ── The account


def test_many_volumes(sim: Simulator, home: Home, pytestconfig: pytest.Config) -> None:
    """By default just more than a droplet can have attached at once: then, and only then, a clone is let go."""
    volumes = [sim.add_volume(f"volume-{number:02}") for number in range(25)]
    volumes = sampled(pytestconfig, volumes, sim.behaviour.volumes_per_droplet + 1)
    home.configure(include=[volume.name for volume in volumes])
    for volume in volumes:
        write_at(volume.path, random.randrange(1000) * MIB, random.randbytes(1000))
    sim.faults.add(Fault("delay", method="POST", path="/snapshots$", seconds=0.3, times=FOREVER))
    done = home.run()
    assert_backed_up(home, *volumes)
    assert set(fetched(done.stdout)) == {volume.name for volume in volumes}

    clones = [item for item in sim.ever if isinstance(item, Volume) and not item.decoy]
    assert len(clones) == len(volumes)
    at_once = [sum(lives_at(clone, other.created) for clone in clones) for other in clones]
    attachments = sim.behaviour.volumes_per_droplet
    assert attachments < max(at_once) <= attachments + 3  # as many as can be attached, and those made ahead
    assert len([item for item in sim.ever if item.kind == "droplet"]) == 1
    detached = [record for record in sim.requests if "/actions" in record.path and "detach" in str(record.body)]
    assert len([record for record in detached if record.status == 202]) == len(volumes) - attachments
    snapshots = [item for item in sim.ever if item.kind == "snapshot"]
    assert max(sum(lives_at(item, other.created) for item in snapshots) for other in snapshots) == 1
    # A droplet takes one attach or detach at a time, and what is gone is not removed again.
    refused = [record for record in sim.requests if record.status in (404, 422)]
    assert {record.answer["message"] for record in refused} == {TOO_MANY}


TOO_MANY = "Droplet has reached the maximum number of attached volumes"


@pytest.mark.parametrize("behaviour", [Behaviour(boot_seconds=20)])
def test_three_clones_are_made_ahead(sim: Simulator, home: Home, tmp_path: Path) -> None:
    """While the droplet boots, and while a volume syncs; they stay attached until the droplet goes."""
    volumes = [sim.add_volume(f"volume-{number}") for number in range(6)]
    write_at(volumes[0].path, 0, random.randbytes(9 * MIB))
    pausing = PausingPython(tmp_path, 4 * MIB)
    sim.faults.add(pausing.fault)
    running = home.start()
    wait_for(lambda: len(clones_of(sim)) == 3)
    assert [droplet.status for droplet in sim.droplets] == ["new"]
    pausing.wait()
    wait_for(lambda: sum(bool(clone.droplet_id) for clone in clones_of(sim)) == 4)  # the first, and three more
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert len(clones_of(sim)) == 4, output
    assert sim.alive() == []


def clones_of(sim: Simulator) -> list[Volume]:
    """All clones that there ever were."""
    return [item for item in sim.ever if isinstance(item, Volume) and not item.decoy]


def test_a_clone_is_let_go_before_it_costs_another_hour(sim: Simulator, home: Home) -> None:
    """Those whose volumes are synced, while the next one waits for its snapshot."""
    volumes = [sim.add_volume(name) for name in ("data", "more", "other", "still")]
    sim.faults.add(Fault("rate-limit", method="POST", path="/snapshots$", nth=4, times=FOREVER, seconds=1))
    running = home.start(constants={"HOUR_ENDS": 3})
    clones = wait_for(lambda: found if len(found := clones_of(sim)) == 3 else None)
    wait_for(lambda: all(clone.deleted for clone in clones))
    sim.faults.clear()
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0, output
    assert_backed_up(home, *volumes)


def lives_at(item: Resource, moment: float) -> bool:
    """Whether a resource existed at that time."""
    return item.created <= moment and (item.deleted is None or item.deleted > moment)


def add_decoys(sim: Simulator, attached: Volume) -> None:
    """What belongs to others, with names and tags that nearly are ours."""
    for number in range(300):
        sim.add_droplet(f"web-{number}", tags=["web"])
    sim.add_droplet("database", volumes=[attached])
    for name in ("my-dosvob-ephemeral-notes", "dosvob-ephemera", "dosvob-ephemeral", "xdosvob-ephemeral-1"):
        sim.add_key(name)
        sim.add_droplet(name)
        volume = sim.add_volume(name, tags=["dosvob-ephemeral-2"])
        sim.add_snapshot(volume, name, tags=["dosvob"])
        sim.add_snapshot(attached, f"old-{name}", tags=["my-dosvob-ephemeral"])
    sim.add_droplet("tagged", tags=["dosvob-ephemeral-2", "not-dosvob-ephemeral"])
    sim.add_tag("dosvob-ephemeral-2")


def add_leftovers(sim: Simulator, attached: Volume) -> list[Resource]:
    """What a killed run leaves, and some that is recognised by its tag or its name alone."""
    clone = sim.add_volume("dosvob-ephemeral-0123abcd-1", tags=["dosvob-ephemeral"])
    return [
        clone,
        sim.add_droplet("dosvob-ephemeral-0123abcd-droplet", tags=["dosvob-ephemeral"], volumes=[clone]),
        sim.add_droplet("renamed", tags=["dosvob-ephemeral"]),
        sim.add_volume("dosvob-ephemeral-0123abcd-2"),
        sim.add_volume("dosvob-ephemeral-0123abcd-3", region="nyc1"),
        sim.add_volume("renamed-too", tags=["web", "dosvob-ephemeral"]),
        sim.add_snapshot(attached, "dosvob-ephemeral-0123abcd-2", tags=["dosvob-ephemeral"]),
        sim.add_snapshot(attached, "dosvob-ephemeral-0123abcd-4"),
        sim.add_key("dosvob-ephemeral-0123abcd-key"),
    ]


@pytest.mark.parametrize("behaviour", [Behaviour(droplet_limit=1000)], ids=["large-account"])
@pytest.mark.parametrize("arguments", [(), ("sweep",)], ids=["backup", "sweep"])
def test_leftovers_go_and_everything_else_stays(sim: Simulator, home: Home, arguments: tuple[str, ...]) -> None:
    volume = random_volume(sim, "data")
    add_decoys(sim, volume)
    others = list(sim.ever)
    leftovers = add_leftovers(sim, volume)
    home.configure(include=["data"])
    done = home.run(*arguments)
    assert [item for item in others if item.deleted is not None] == []
    assert [item for item in leftovers if item.deleted is None] == []
    assert all(item.name in done.stdout for item in leftovers)
    assert not sim.alive()
    created = [item for item in sim.ever if not item.decoy and item.kind != "tag"]
    if arguments:
        assert not created
        assert not home.image("data").exists()
    else:
        assert_backed_up(home, volume)
        assert {item.kind for item in created} == {"key", "droplet", "snapshot", "volume"}
        assert all(item.name.startswith("dosvob-ephemeral-") for item in created)
    assert not any("/v2/tags" in r.path and r.method == "DELETE" for r in sim.requests)


def test_a_dry_run_changes_nothing(sim: Simulator, home: Home) -> None:
    random_volume(sim, "data")
    sim.add_droplet("dosvob-ephemeral-0123abcd-droplet", tags=["dosvob-ephemeral"])
    for arguments in (("--dry-run",), ("sweep", "--dry-run")):
        done = home.run(*arguments)
        assert re.search(r"would remove .*dosvob-ephemeral-0123abcd-droplet", done.stdout)
    assert "would back up data, 1.0 GiB" in home.run("--dry-run").stdout
    assert {request.method for request in sim.requests} == {"GET"}
    assert [path.name for path in home.directory.rglob("*")] == ["conf.json"]


@pytest.mark.parametrize(
    ("keys", "arguments", "chosen"),
    [
        ({}, (), {"data", "db-1", "db-2", "scratch"}),
        ({"include": ["db-*", "data"]}, (), {"data", "db-1", "db-2"}),
        ({"exclude": ["scratch", "db-2"]}, (), {"data", "db-1"}),
        ({"include": ["d*"], "exclude": ["db-?"]}, (), {"data"}),
        ({}, ("data",), {"data"}),
        ({}, ("db-*", "data"), {"data", "db-1", "db-2"}),
        ({"include": ["data"], "exclude": ["scratch"]}, ("scratch", "db-[2]"), {"scratch", "db-2"}),
    ],
)
def test_which_volumes(
    sim: Simulator, home: Home, keys: dict[str, list[str]], arguments: tuple[str, ...], chosen: set[str]
) -> None:
    for name in ("data", "db-1", "db-2", "scratch"):
        sim.add_volume(name)
    sim.add_volume("elsewhere", region="nyc1")
    sim.add_volume("data", region="ams3")
    home.configure(**keys)
    output = home.run("--dry-run", *arguments).stdout
    assert set(re.findall(r"would back up (\S+),", output)) == chosen
    assert re.search(r"not backed up.*data \(ams3\), elsewhere \(nyc1\)", output)


def test_only_the_named_volumes_of_this_region_are_backed_up(sim: Simulator, home: Home) -> None:
    there = random_volume(sim, "data")
    random_volume(sim, "scratch")
    elsewhere = sim.add_volume("data", region="ams3")
    output = home.run("data").stdout
    assert_backed_up(home, there)
    assert not home.image("scratch").exists()
    assert {path for _, path in posts(sim, "snapshots")} == {f"/v2/volumes/{there.id}/snapshots"}
    assert elsewhere.snapshotted == 0
    assert "data (ams3)" in output


@pytest.mark.parametrize(
    ("keys", "size", "image"),
    [
        ({}, "s-1vcpu-512mb-10gb", "debian-13-x64"),
        ({"region": "blr1"}, "s-1vcpu-1gb", "debian-12-x64"),
        ({"droplet_size": "s-2vcpu-4gb"}, "s-2vcpu-4gb", "debian-13-x64"),
        ({"droplet_image": "ubuntu-24-04-x64"}, "s-1vcpu-512mb-10gb", "ubuntu-24-04-x64"),
    ],
)
def test_which_droplet_is_planned(sim: Simulator, home: Home, keys: dict[str, str], size: str, image: str) -> None:
    """The cheapest that will do, and the newest Debian, of those in the region."""
    sim.add_volume("data", region=keys.get("region", "fra1"))
    home.configure(**keys)
    assert f"over a droplet {size} with {image} in" in home.run("--dry-run").stdout


def test_the_droplet_is_as_configured(sim: Simulator, home: Home) -> None:
    volume = random_volume(sim, "data")
    home.configure(droplet_size="s-2vcpu-4gb", droplet_image="ubuntu-24-04-x64")
    home.run()
    assert_backed_up(home, volume)
    (droplet,) = [item for item in sim.ever if isinstance(item, Droplet)]
    assert (droplet.size, droplet.image) == ("s-2vcpu-4gb", "ubuntu-24-04-x64")


def test_a_size_that_is_sold_out_is_replaced_by_the_next(sim: Simulator, home: Home) -> None:
    volume = random_volume(sim, "data")
    sim.faults.add(Fault("sold-out", size="s-1vcpu-512mb-10gb", times=9))
    output = home.run().stdout
    assert_backed_up(home, volume)
    (droplet,) = [item for item in sim.ever if isinstance(item, Droplet)]
    assert (droplet.size, droplet.image) == ("s-1vcpu-1gb", "debian-13-x64")
    assert "s-1vcpu-512mb-10gb is not to be had" in output


@pytest.mark.parametrize("behaviour", [Behaviour(snapshot_interval=3600)], ids=["interval"])
def test_a_snapshot_that_comes_too_soon_is_waited_for_after_the_others(sim: Simulator, home: Home) -> None:
    early, other = random_volume(sim, "a-early"), random_volume(sim, "b-other")
    early.snapshotted = time.monotonic()

    def snapshots(volume: Volume, status: int) -> list[int]:
        path = f"/v2/volumes/{volume.id}/snapshots"
        return [r.number for r in sim.requests if (r.method, r.path, r.status) == ("POST", path, status)]

    process = home.start(constants={"SNAPSHOT_RETRY": 1})
    wait_for(lambda: snapshots(other, 201) and len(snapshots(early, 429)) >= 2)
    early.snapshotted = 0  # the ten minutes are over
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert_backed_up(home, early, other)
    assert snapshots(early, 429)[0] < snapshots(other, 201)[0] < snapshots(early, 201)[0]
    (said,) = re.findall(r"a-early: (.*snapshot.*)", output)
    assert re.search(r"one snapshot of a volume per 10 minutes, .*\d\d:\d\d:\d\d.*; the other volumes go first", said)


# ── The output


def test_a_log_has_times_and_lines(sim: Simulator, home: Home) -> None:
    random_volume(sim, "data", 2)
    done = home.run(constants={"LOG_INTERVAL": 0})
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert all(STAMP.match(line) for line in lines)
    assert "\r" not in done.stdout
    assert any(re.search(r"data: .* of 1\.0 GiB scanned, .* fetched", line) for line in lines)
    assert re.search(r"VOLUME +SIZE +CHANGED +FETCHED +TIME", done.stdout)
    assert re.search(r"data +1\.0 GiB +2\.0 MiB +2\.0 MiB +\d+ s +no file system +ok", done.stdout)
    assert re.search(r"this run cost about \$\d\.\d+, DigitalOcean's minimum charges included", lines[-2])
    assert "nothing of this home's is left" in lines[-1]


def test_a_log_has_few_lines_and_every_call_says_who_it_is(sim: Simulator, home: Home) -> None:
    random_volume(sim, "data", 2)
    assert len(home.run().stdout.splitlines()) < 12
    assert {re.sub(r"[\d.]+$", "N", request.headers["user-agent"]) for request in sim.requests} == {"dosvob/N"}


def test_a_terminal_has_one_live_line(sim: Simulator, home: Home) -> None:
    random_volume(sim, "data", 8)
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "60"], stdin=theirs, check=True)
    with subprocess.Popen(
        home.command(constants={"LIVE_INTERVAL": 0}),
        cwd=home.directory,
        env=home.environment(COLUMNS="0"),  # which would count for more than the terminal's own width
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b"".join(iter(lambda: read_terminal(ours), b"")).decode()
    os.close(ours)
    assert process.returncode == 0
    assert not STAMP.search(shown)
    live = re.findall(r"\r\x1b\[2K([^\r\n]+)(?=\r\x1b)", shown)
    assert any(re.match(r"data: .* scanned", line) for line in live)
    assert max(map(len, live)) < 60
    kept = [line.rpartition("\x1b[2K")[2] for line in shown.split("\r\n")]  # what stays on the screen
    assert not any("scanned" in line for line in kept)
    assert any(re.match(r"data: backed up 1\.0 GiB", line) for line in kept)
    assert any(re.match(r"data +1\.0 GiB .*ok$", line) for line in kept)


def read_terminal(descriptor: int) -> bytes:
    """What is shown next; nothing at its end."""
    with contextlib.suppress(OSError):  # EIO: nobody is at the other side any more
        return os.read(descriptor, 65536)
    return b""


def test_quiet_prints_nothing_on_success(sim: Simulator, home: Home) -> None:
    volume = random_volume(sim, "data")
    sim.add_volume("elsewhere", region="nyc1")
    done = home.run("--quiet")
    assert (done.stdout, done.stderr) == ("", "")
    assert_backed_up(home, volume)


def test_quiet_still_tells_failures(sim: Simulator, home: Home) -> None:
    random_volume(sim, "data")
    sim.faults.add(Fault("error", "POST", "/snapshots$", status=422))
    done = home.run("--quiet", expect=1)
    assert done.stdout == ""
    assert "error: data:" in done.stderr


def test_verbose_tells_every_call_and_never_the_token(sim: Simulator, home: Home) -> None:
    random_volume(sim, "data")
    output = home.run("--verbose").stdout
    for request in sim.requests:
        assert f"{request.method} {request.path} → {request.status}" in output
    assert sim.token not in output
