"""Volumes in several regions: where images are, how they are named, and how they get from one layout to another."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPT, Home, same, sampled, write_at
from simulator import Behaviour, Droplet, Fault, Simulator, Volume
from storage_support import cannot_read
from trouble_support import FAST, GIB, assert_nothing_left, run, small_volumes, start, until

import dosvob

KIB = 1 << 10
SEVERAL = ["fra1", "nyc3"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_volumes(monkeypatch)


@pytest.fixture
def behaviour() -> Behaviour:
    return FAST


def volume_in(sim: Simulator, region: str, name: str = "data") -> Volume:
    """A volume in a region, with content of its own."""
    volume = sim.add_volume(name, region)
    write_at(volume.path, 3 << 20, f"{region}/{name}".encode() * 100_000)
    return volume


def assert_images(home: Home, *volumes: Volume) -> None:
    """There is an image of each volume in its region's directory, and it is the volume's content."""
    for volume in volumes:
        assert same(home.image(f"{volume.region}/{volume.name}"), volume.path), volume.name
    assert_nothing_left(home.simulator)


def outcomes(output: str) -> list[tuple[str, str]]:
    """The names in the table at the end, and what became of them."""
    return re.findall(r"^\S+\+00:00 (\S+) .* (ok|FAILED)$", output, re.MULTILINE)


def regions_of_droplets(sim: Simulator) -> list[str]:
    return [item.region for item in sim.ever if isinstance(item, Droplet) and not item.decoy]


def sent(sim: Simulator) -> int:
    """Bytes that all droplets so far have sent over the network."""
    return sum(item.bytes_sent for item in sim.ever if isinstance(item, Droplet))


def tree(home: Home) -> dict[str, int]:
    """The files of the home with their inodes, but for what every run writes."""
    found = {str(path.relative_to(home.backups)): path.stat().st_ino for path in home.backups.rglob("*")
             if path.is_file()}  # fmt: skip
    return {name: inode for name, inode in found.items() if not re.search(r"wanted\.json|lock$|state(\.new)?$", name)}


# -- a run


def test_each_region_has_a_droplet_and_a_directory(home: Home, sim: Simulator) -> None:
    """Equal names do not meet; there is one table, one cost, one exit code; the next run fetches only what changed."""
    volumes = [volume_in(sim, "fra1"), volume_in(sim, "nyc3"), volume_in(sim, "nyc3", "more"), volume_in(sim, "ams3")]
    home.configure(region=SEVERAL)
    done = run(home)
    assert_images(home, *volumes[:3])
    assert regions_of_droplets(sim) == SEVERAL
    assert outcomes(done.stdout) == [(name, "ok") for name in ("fra1/data", "nyc3/data", "nyc3/more")]
    assert done.stdout.count("VOLUME ") == done.stdout.count("this run cost about") == 1
    assert "not backed up, because in another region than fra1, nyc3: data (ams3)" in done.stdout
    assert {path.name for path in home.backups.iterdir()} == {".dosvob", *SEVERAL}
    dollars = re.search(r"this run cost about \$([\d.]+)", done.stdout)
    assert dollars
    assert float(dollars[1]) >= 0.05  # two droplets and three snapshots

    before = sent(sim)
    write_at(volumes[1].path, 5 << 20, b"changed" * 1000)
    run(home)
    assert_images(home, *volumes[:3])
    assert sent(sim) - before < 200 * KIB


def test_a_region_that_fails_does_not_stop_the_other(home: Home, sim: Simulator) -> None:
    sim.faults.add(Fault("error", method="POST", path="^/v2/droplets$", status=422, times=3))  # all sizes
    volumes = [volume_in(sim, region) for region in SEVERAL]
    home.configure(region=SEVERAL)
    done = run(home, expect=1)
    assert_images(home, volumes[1])
    assert not home.image("fra1/data").exists()
    assert outcomes(done.stdout) == [("fra1/data", "FAILED"), ("nyc3/data", "ok")]
    run(home)
    assert_images(home, *volumes)


@pytest.mark.parametrize(
    ("region", "says"), [("mars1", 'there is no region "mars1"'), ("lon1", "there are no volumes in lon1")]
)
def test_a_region_without_volumes_is_an_error_of_its_own(home: Home, sim: Simulator, region: str, says: str) -> None:
    """A region that was mistyped would else never be backed up, and nobody would know."""
    volume = volume_in(sim, "nyc3")
    home.configure(region=[region, "nyc3"])
    done = run(home, expect=1)
    assert says in done.stderr
    assert_images(home, volume)
    home.configure(region=[region])
    assert says in run(home, expect=2).stderr


def test_a_droplet_that_a_region_does_not_have_is_no_matter_of_the_others(home: Home, sim: Simulator) -> None:
    volumes = [volume_in(sim, region) for region in ("fra1", "tor1")]
    home.configure(region=["fra1", "tor1"], droplet_size="s-1vcpu-512mb-10gb")
    done = run(home, expect=1)
    assert 'tor1: droplet size "s-1vcpu-512mb-10gb" is not to be had in tor1' in done.stderr
    assert outcomes(done.stdout) == [("fra1/data", "ok"), ("tor1/data", "FAILED")]
    assert_images(home, volumes[0])


def test_all_regions(home: Home, sim: Simulator) -> None:
    """Also that one in which there was no volume yesterday."""
    home.configure(region="all")
    assert "there are no volumes in the account" in run(home, expect=2).stderr
    volumes = [volume_in(sim, "fra1")]
    run(home)
    volumes.append(volume_in(sim, "syd1"))
    run(home)
    assert_images(home, *volumes)


def test_a_signal_ends_all_regions(home: Home, sim: Simulator) -> None:
    volumes = [volume_in(sim, region) for region in ("ams3", *SEVERAL)]
    home.configure(region="all")
    running = start(home)
    until(lambda: [item for item in sim.droplets if item.region == "fra1"] or running.process.poll() is not None)
    running.signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGTERM
    assert "interrupted; complete: ams3/data; " in running.output
    assert re.search(r"not begun: .*nyc3/data; to see", running.output)
    assert_images(home, volumes[0])
    assert regions_of_droplets(sim) == ["ams3", "fra1"]


def test_two_homes_at_the_same_time(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """One with several regions, one with one of them: neither disturbs the other."""
    volumes = [volume_in(sim, region) for region in SEVERAL]
    other = Home(tmp_path / "other", sim)
    home.configure(region=SEVERAL)
    running = [start(each) for each in (home, other)]
    assert [each.end() for each in running] == [0, 0], [each.output for each in running]
    assert_images(home, *volumes)
    assert same(other.image("data"), volumes[0].path)


# -- names


def test_names_on_the_command_line(home: Home, sim: Simulator) -> None:
    for region in SEVERAL:
        for name in ("data", "more"):
            volume_in(sim, region, name)
    home.configure(region=SEVERAL)

    def chosen(*names: str) -> list[str]:
        return re.findall(r"would back up (\S+),", run(home, "--dry-run", *names).stdout)

    assert chosen() == ["fra1/data", "fra1/more", "nyc3/data", "nyc3/more"]
    assert chosen("data") == ["fra1/data", "nyc3/data"]
    assert chosen("nyc3/data") == ["nyc3/data"]
    assert chosen("nyc3/*", "m*") == ["fra1/more", "nyc3/data", "nyc3/more"]
    home.configure(region=SEVERAL, include=["data", "nyc3/*"], exclude=["fra1/d*"])
    assert chosen() == ["nyc3/data", "nyc3/more"]
    assert 'no volume in fra1, nyc3 matches "ams3/data"' in run(home, "ams3/data", expect=2).stderr
    run(home, "nyc3/data")
    assert regions_of_droplets(sim) == ["nyc3"]


def test_names_offline(home: Home, sim: Simulator, tmp_path: Path) -> None:
    volumes = [volume_in(sim, region) for region in SEVERAL]
    volumes.append(volume_in(sim, "nyc3", "more"))
    home.configure(region=SEVERAL)
    run(home)
    for command, says, names, expected in (
        ("list", r"(\S+): \w+, ", [], ["fra1/data", "nyc3/data", "nyc3/more"]),
        ("list", r"(\S+): \w+, ", ["data"], ["fra1/data", "nyc3/data"]),
        ("verify", r"\S+ (\S+): sound", ["nyc3/data", "more"], ["nyc3/data", "nyc3/more"]),
        ("health", r"\S+ (\S+): its last", [], ["fra1/data", "nyc3/data", "nyc3/more"]),
        ("health", r"\S+ (\S+): its last", ["data"], ["fra1/data", "nyc3/data"]),
    ):
        assert re.findall(f"(?m)^{says}", run(home, command, *names).stdout) == expected, (command, names)
    assert "did you mean nyc3/more" in run(home, "list", "nyc3/mores", expect=2).stderr
    assert "fra1/data or nyc3/data: say which" in run(home, "restore", "data", "file", expect=2).stderr
    run(home, "restore", "nyc3/data", "file")
    assert same(home.directory / "file", volumes[1].path)
    run(home, "restore", "more", "another")
    assert same(home.directory / "another", volumes[2].path)
    home.image("nyc3/data").unlink()
    assert "nyc3/data: " in run(home, "health", expect=1).stderr


def test_a_home_within_is_not_a_region(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """It has a lock of its own, so nothing of it is touched."""
    volume_in(sim, "fra1")
    run(home)
    run(home, "--backups", "backups/nyc3")
    assert "nyc3" not in run(home, "list").stdout
    volume_in(sim, "nyc3")
    before = tree(home)
    home.configure(region=["nyc3"])
    said = run(home, expect=1).stderr
    assert "nyc3 is a backups directory of its own" in said
    assert {name: before[name] for name in before if "nyc3" in name} == {
        name: inode for name, inode in tree(home).items() if "nyc3" in name
    }
    assert "sweep --backups backups/nyc3 and then delete backups/nyc3/.dosvob/home" in said
    run(home, "sweep", "--backups", "backups/nyc3")
    (home.backups / "nyc3" / ".dosvob" / "home").unlink()
    run(home)
    assert "nyc3/data: " in run(home, "list").stdout


def test_an_image_of_a_home_within_is_not_moved_out_of_it(home: Home, sim: Simulator) -> None:
    volume = volume_in(sim, "nyc3")
    home.configure(region="nyc3")
    home.backups.mkdir()
    run(home, "--backups", "backups/nyc3")
    before = tree(home)
    run(home)
    assert {name: inode for name, inode in tree(home).items() if name.startswith("nyc3/")} == before
    assert same(home.image("data"), volume.path)


def test_verifying_one_regions_directory_does_not_make_a_home_of_it(home: Home, sim: Simulator) -> None:
    volumes = [volume_in(sim, "fra1"), volume_in(sim, "nyc3")]
    home.configure(region=["fra1", "nyc3"])
    run(home)
    assert "data: sound" in run(home, "verify", "--backups", "backups/fra1").stdout
    run(home)
    assert_images(home, *volumes)
    assert "fra1/data: " in run(home, "list").stdout


def test_a_region_that_is_named_by_itself_has_the_lock_of_its_home(home: Home, sim: Simulator, tmp_path: Path) -> None:
    """Else `verify` takes back what a run is writing to an image there, and a restore reads it meanwhile."""
    volume_in(sim, "fra1")
    home.configure(region=["fra1"])
    run(home)
    region = ("--backups", "backups/fra1")
    with dosvob.Home(home.backups, "a backup").locked():
        for words in (("verify",), ("restore", "data", str(tmp_path / "copy"))):
            assert "at work in backups/fra1, a backup since" in run(home, *region, *words, expect=2).stderr
    with dosvob.Home(home.backups / "fra1", "a restore").unchanged():
        assert "at work in backups, a restore since" in run(home, expect=2).stderr
    run(home, *region, "verify")


def test_a_home_within_another_has_a_lock_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first run on, in which it gets its id; and whoever may not look above it still has that."""
    with dosvob.Home(tmp_path).locked():
        pass
    within = tmp_path / "backups"
    with dosvob.Home(within, "a backup").locked():
        with pytest.raises(dosvob.Busy, match="a backup since"), dosvob.Home(within).locked():
            pass
        with dosvob.Home(tmp_path).locked():
            pass
    (within / ".dosvob" / "home").unlink()
    exists = dosvob.exists

    def refuse(path: Path, *, follow_symlinks: bool = True) -> bool:
        if path.parent.parent == tmp_path:
            raise PermissionError(path)
        return exists(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(dosvob, "exists", refuse)
    with dosvob.Home(within, "a backup").locked(), pytest.raises(dosvob.Busy), dosvob.Home(within).unchanged():
        pass


# -- from one region to several, and back


@pytest.mark.parametrize(("before", "after"), [("fra1", ["fra1"]), (["fra1", "nyc3"], "fra1")])
def test_what_is_left_of_a_volume_that_is_there_is_not_told_to_be_gone(
    home: Home, sim: Simulator, before: str | list[str], after: str | list[str]
) -> None:
    """Its first backup was interrupted where `region` had it go before, and this run is of another one."""
    volume_in(sim, "fra1")
    volume_in(sim, "nyc3" if isinstance(before, list) else "fra1", "big")
    home.configure(region=before)
    run(home, "data")
    left = home.backups / ("nyc3" if isinstance(before, list) else "") / "big.partial"
    (left.parent / ".dosvob").mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half of it")
    home.configure(region=after)
    done = run(home, "data")
    assert "the account has no volume" not in done.stdout
    left.rename(left.with_name("gone.partial"))
    assert "the account has no volume" in run(home, "data").stdout


def with_history(home: Home, sim: Simulator, region: str = "fra1") -> list[Volume]:
    """A home with one region and two volumes, one of which has a version, and with an image that was set aside."""
    volumes = [volume_in(sim, region), volume_in(sim, region, "more")]
    run(home)
    write_at(volumes[0].path, 9 << 20, b"changed" * 1000)
    sim.remove_volume(volumes[1])
    volumes[1] = volume_in(sim, region, "more")
    assert "set aside" in run(home).stderr
    return volumes


def test_from_one_region_to_several_and_back(home: Home, sim: Simulator) -> None:
    """Images, versions and what was set aside are moved, not fetched; the way back is the same."""
    volumes = with_history(home, sim)
    one = tree(home)
    (aside,) = [name for name in one if "set-aside" in name and "/" not in name]
    (version,) = [name for name in one if name.startswith(".dosvob/data.versions/")]
    volumes.append(volume_in(sim, "nyc3"))
    home.configure(region=SEVERAL)
    planned = run(home, "--dry-run").stdout
    assert "to backups/fra1/data (where backups/data goes first): changes only" in planned
    assert tree(home) == one
    done = run(home, "fra1/*")
    assert 'data: its image is backups/fra1/data now, for "region" in conf.json' in done.stdout
    assert_images(home, *volumes[:2])
    assert sent(sim) < 10_000_000
    several = tree(home)
    for name in ("data", "more", aside, version):
        assert several[f"fra1/{name}"] == one[name]
    assert not [name for name in several if not name.startswith(("fra1/", ".dosvob/home"))]
    before = sent(sim)
    run(home)
    assert_images(home, *volumes)
    assert sent(sim) - before < 3_000_000  # the other region's first backup
    run(home, "restore", "fra1/data", "old", "--at", version_time(version))
    assert "fra1/more.set-aside-" in run(home, "list").stdout

    home.configure(region="fra1")
    before = sent(sim)
    done = run(home)
    assert 'fra1/data: its image is backups/data now, for "region" in conf.json' in done.stdout
    assert sent(sim) - before < 200 * KIB
    back = tree(home)
    for name in ("data", "more", aside, version):
        assert back[name] == one[name]
    assert not [name for name in back if name.startswith("fra1/")]
    assert same(home.image("nyc3/data"), volumes[2].path)
    assert same(home.image("data"), volumes[0].path)


def test_a_dry_run_counts_what_will_be_moved_as_there(home: Home, sim: Simulator) -> None:
    """An image, and what an interrupted first backup has: of that the rest is needed."""
    begun = [volume_in(sim, "fra1"), volume_in(sim, "fra1", "begun")][1]
    home.configure(region=SEVERAL[:1])
    run(home)
    paths = dosvob.ImagePaths(home.backups, "fra1/begun")
    paths.image.rename(paths.partial)
    paths.state.unlink()
    home.configure(region="fra1")
    rest = dosvob.human_size(begun.path.stat().st_size - paths.partial.stat().st_blocks * 512)
    told = run(home, "--dry-run").stdout
    assert f"first backups take up to {rest}, for 1 volume" in told
    assert "(where backups/fra1/data goes first): changes only" in told


def version_time(path: str) -> str:
    return re.sub(r".*/(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z", r"\1-\2-\3T\4:\5:\6+00:00", path)


CRASHING = """
import os, sys
sys.path.insert(0, {directory!r})
import dosvob
dosvob.GIB = {gib}
left = {count}
def crashing(function):
    def call(old, new):
        global left
        if "backups" in str(old) and "home" not in str(old) and "wanted" not in str(old):
            left -= 1
            if left < 0:
                os._exit(99)
        return function(old, new)
    return call
{crash}
sys.exit(dosvob.main([]))
"""


def crash(home: Home, how: str, count: int = 0) -> None:
    """A run that a power cut ends at the call that `how` replaces, after so many of them."""
    code = CRASHING.format(directory=str(SCRIPT.parent), gib=GIB, count=count, crash=how)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=home.directory,
        env=home.environment(),
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 99, ended.stderr


@pytest.mark.parametrize("target", [SEVERAL, "fra1"])
def test_a_crash_while_images_are_moved(
    home: Home, sim: Simulator, pytestconfig: pytest.Config, target: list[str] | str
) -> None:
    """Wherever it comes, the next run completes the move: nothing is lost, and nothing fetched anew."""
    source = "fra1" if target == SEVERAL else SEVERAL
    volume = volume_in(sim, "fra1")
    volume_in(sim, "nyc3")
    home.configure(region=source)
    run(home)
    write_at(volume.path, 9 << 20, b"changed" * 1000)
    run(home)
    inodes = set(tree(home).values())
    for count in sampled(pytestconfig, range(3), 1):  # the image, the versions, the state
        home.configure(region=target)
        crash(home, "os.rename = crashing(os.rename)", count)
        before = sent(sim)
        run(home, "data" if target == "fra1" else "fra1/data")
        image = home.image("data" if target == "fra1" else "fra1/data")
        assert same(image, volume.path)
        assert sent(sim) - before < 200 * KIB
        assert inodes - set(tree(home).values()) <= set()
        assert "sound" in run(home, "verify", "fra1/data" if target == SEVERAL else "data").stdout
        home.configure(region=source)
        run(home, "data" if source == "fra1" else "fra1/data")


def commands_of(error: str) -> str:
    """The commands that a message gives."""
    found = re.search(r": ((?:mkdir|mv) .*?); otherwise", error)
    assert found, error
    return found[1]


@pytest.mark.parametrize("what", ["data", "data.partial"])
def test_nothing_tells_of_which_region_an_image_is(home: Home, sim: Simulator, what: str) -> None:
    """It is not backed up, and left as it is; the commands that the message gives mend it."""
    volume, other = volume_in(sim, "fra1"), volume_in(sim, "nyc3", "other")
    run(home)
    (home.backups / ".dosvob" / "data.state").unlink()
    home.image("data").rename(home.backups / what)
    home.configure(region=SEVERAL)
    inode, before = (home.backups / what).stat().st_ino, sent(sim)
    error = run(home, expect=1).stderr
    assert f"data: nothing tells of which region backups/{what} is" in error
    assert_images(home, other)
    assert not home.image("fra1/data").exists()
    subprocess.run(["/bin/sh", "-e", "-c", commands_of(error)], cwd=home.directory, check=True)
    run(home)
    assert_images(home, volume)
    assert home.image("fra1/data").stat().st_ino == inode
    assert sent(sim) - before < 3_000_000  # of the other one


def test_two_images_do_not_meet_in_one_file(home: Home, sim: Simulator) -> None:
    """Both stay as they are until the user has moved one of them."""
    volume = volume_in(sim, "fra1")
    run(home)
    home.configure(region=["fra1"])
    (home.backups / "fra1").mkdir()
    home.image("fra1/data").write_bytes(b"another")
    before = tree(home)
    done = run(home, expect=1)
    assert "backups/data belongs where backups/fra1/data is already" in done.stderr
    assert tree(home) == before
    assert home.image("fra1/data").read_bytes() == b"another"
    home.image("fra1/data").unlink()
    run(home)
    assert_images(home, volume)


def test_a_volume_that_is_called_like_its_region(home: Home, sim: Simulator) -> None:
    """The commands that the message gives make room for the directory, and nothing is fetched anew."""
    volume = volume_in(sim, "fra1", "fra1")
    run(home)
    inode = home.image("fra1").stat().st_ino
    home.configure(region=SEVERAL)
    error = run(home, expect=1).stderr
    assert "backups/fra1 is a file, and the images of the region fra1 go into a directory" in error
    assert home.image("fra1").stat().st_ino == inode
    subprocess.run(["/bin/sh", "-e", "-c", commands_of(error)], cwd=home.directory, check=True)
    before = sent(sim)
    run(home, expect=1)  # there are no volumes in nyc3
    assert_images(home, volume)
    assert home.image("fra1/fra1").stat().st_ino == inode
    assert sent(sim) - before < 200 * KIB
    home.configure(region="fra1")
    assert "backups/fra1 is already: move one of them elsewhere" in run(home, expect=1).stderr


def test_a_volume_that_is_called_like_a_file_of_the_home(home: Home, sim: Simulator) -> None:
    volume_in(sim, "fra1", "wanted")
    run(home)
    home.configure(region=["fra1"])
    run(home)
    assert json.loads((home.backups / ".dosvob" / "wanted.json").read_text()) == ["fra1/wanted"]
    assert "fra1/wanted" in run(home, "health").stdout
    home.configure(region="fra1")
    assert "all of it" not in run(home).stdout
    assert home.image("wanted").exists()


def test_an_image_that_is_a_link_is_moved_as_one(home: Home, sim: Simulator) -> None:
    volume = volume_in(sim, "fra1")
    run(home)
    home.image("data").rename(home.directory / "elsewhere.img")
    home.image("data").symlink_to("../elsewhere.img")
    home.configure(region=["fra1"])
    before = sent(sim)
    run(home)
    assert home.image("fra1/data").is_symlink()
    assert_images(home, volume)
    assert sent(sim) - before < 200 * KIB


def test_an_image_that_the_disk_cannot_find_is_not_parted_from_the_rest(home: Home, sim: Simulator) -> None:
    with_history(home, sim)
    before = tree(home)
    home.configure(region=SEVERAL)
    volume_in(sim, "nyc3")
    done = run(home, wrapper=cannot_read(home.image("data"), "EIO", "%file"), expect=1)
    assert "error: data: backups/data: Input/output error" in done.stderr
    after = tree(home)
    for name in before:
        if name.startswith(("data", ".dosvob/data.")):
            assert after[name] == before[name], name
    assert not [name for name in after if name.startswith(("fra1/data", "fra1/.dosvob/data"))]
    assert same(home.image("nyc3/data"), sim.volumes[-1].path)


def test_an_undo_is_put_back_in_a_regions_directory(home: Home, sim: Simulator) -> None:
    """After a crash while the image was written, offline, by whatever command starts next."""
    volume = volume_in(sim, "nyc3")
    home.configure(region=SEVERAL[1:])
    run(home)
    write_at(volume.path, 0, bytes(range(256)) * 16_000)
    crash(home, "os.utime = lambda *_, **__: os._exit(99)")
    assert "must still be taken back" in run(home, "health", expect=1).stderr
    done = run(home, "verify")
    assert "nyc3/data: an interrupted backup was taken back" in done.stdout
    run(home, "sweep")
    run(home)
    assert_images(home, volume)
