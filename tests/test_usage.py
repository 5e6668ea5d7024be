"""The command line, and what a user may get wrong: a line that says what, exit code 2, and nothing is created."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Home, same, wait_for
from simulator import Simulator


def listing(directory: Path) -> dict[str, bytes]:
    """All files below a directory, but for the lock and the id of the home, with their content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("lock", "home")
    }


def assert_refused(
    home: Home,
    *arguments: str,
    says: tuple[str, ...],
    code: int = 2,
    wrapper: tuple[str, ...] = (),
    **variables: Any,
) -> str:
    """The script ends with a message of a line or two that says all this, and has changed nothing; returns it."""
    before = listing(home.directory)
    done = home.run(*arguments, expect=code, wrapper=wrapper, **variables)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for text in says:
        assert text in errors[0]
    assert {request.method for request in home.simulator.requests} <= {"GET"}
    assert listing(home.directory) == before
    assert home.simulator.token not in done.stdout + done.stderr
    return errors[0]


# ── The command line


def test_help_and_version(sim: Simulator, home: Home) -> None:
    text = home.run("--help").stdout
    assert re.search(r"^ +python dosvob\.py +back up", text, re.MULTILINE)  # an example
    for option in ("--config", "--backups", "--dry-run", "--reread", "--verbose", "--quiet", "--version"):
        assert option in text
    for command in ("sweep", "verify"):
        assert f"dosvob.py {command}" in text
    assert re.search(r"exit codes:\n +0 .*\n +1 .*\n +2 ", text)
    assert re.fullmatch(r"dosvob \d+\.\d+\.\d+\n", home.run("--version").stdout)
    assert not sim.requests


def test_config_and_backups_may_be_elsewhere(sim: Simulator, home: Home, tmp_path: Path) -> None:
    volume = sim.add_volume("data")
    config = tmp_path / "my conf.json"
    (home.directory / "conf.json").rename(config)
    backups = tmp_path / "big disk"
    backups.mkdir()
    home.run("--config", str(config), "--backups", str(backups))
    assert same(backups / "data", volume.path)
    assert not home.backups.exists()
    assert "data: sound" in home.run("verify", "--backups", str(backups)).stdout


def test_a_terminal_of_few_characters(sim: Simulator, home: Home) -> None:
    """What it cannot show is replaced; no line is lost."""
    sim.add_volume("data")

    def said(encoding: str) -> list[str]:
        """Lines without what differs between two runs: the time, and what is free on a disk that others use."""
        text = home.run("--verbose", "--dry-run", PYTHONIOENCODING=encoding).stdout
        text = re.sub(r"^\S+ |[\d.]+ .iB(?= are free)", "", text, flags=re.MULTILINE)
        return text.splitlines()

    lines, shown = said("utf-8"), said("ascii")
    assert any(not line.isascii() for line in lines)
    assert shown == [line.encode("ascii", errors="replace").decode() for line in lines]


@pytest.mark.parametrize("variable", ["DIGITALOCEAN_ACCESS_TOKEN", "DIGITALOCEAN_TOKEN"])
def test_the_token_may_be_in_the_environment(sim: Simulator, home: Home, variable: str) -> None:
    sim.add_volume("data")
    home.configure(do_token=None)
    (home.directory / "conf.json").chmod(0o644)  # holds no secret now
    variables: Any = {variable: sim.token}
    done = home.run("--dry-run", **variables)
    assert "would back up data" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("arguments", [("--no-such-option",), ("--config",)])
def test_wrong_options(sim: Simulator, home: Home, arguments: tuple[str, ...]) -> None:
    done = home.run(*arguments, expect=2)
    assert done.stderr.startswith("usage: ")
    assert arguments[0] in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not sim.requests


@pytest.mark.parametrize("argument", ["sweeep", "Verify", "no-such-volume", "db-*"])
def test_a_name_that_no_volume_has(sim: Simulator, home: Home, argument: str) -> None:
    sim.add_volume("data")
    sim.add_volume("web")
    assert_refused(home, argument, says=(f'"{argument}"', "data, web", "fra1"))


def test_sweep_and_verify_want_no_more_than_they_use(sim: Simulator, home: Home) -> None:
    assert_refused(home, "sweep", "data", says=("sweep takes no names",))
    assert_refused(home, "verify", says=("there is no backups", "--backups"))
    home.backups.mkdir()
    assert_refused(home, "verify", "data", says=("there is no image of data",))


def test_verify_needs_no_configuration(sim: Simulator, home: Home) -> None:
    home.backups.mkdir()
    home.image("data").write_bytes(bytes(1 << 20))
    (home.directory / "conf.json").unlink()
    assert "data: no digests are recorded yet" in home.run("verify").stdout
    assert not sim.requests


# ── conf.json


def write_conf(home: Home, text: str) -> None:
    """A conf.json with this text."""
    (home.directory / "conf.json").write_text(text)


def test_no_conf(home: Home) -> None:
    (home.directory / "conf.json").unlink()
    assert_refused(home, says=("conf.json", "conf.json.example"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n    "do_token": "x",\n    "region" "fra1"\n}', "line 3, column 14"),
        ('{"do_token": "x",}', "line 1, column "),
        ("", "line 1, column 1"),
        ("[]", "{…}"),
        ('"fra1"', "{…}"),
    ],
)
def test_conf_is_not_json(sim: Simulator, home: Home, text: str, says: str) -> None:
    write_conf(home, text)
    assert_refused(home, says=("conf.json", says))
    assert not sim.requests


def test_conf_is_not_text(sim: Simulator, home: Home) -> None:
    (home.directory / "conf.json").write_bytes(b'{"do_token": "\xff"}')
    assert_refused(home, says=("cannot read conf.json",))


def test_conf_is_a_directory(sim: Simulator, home: Home) -> None:
    (home.directory / "conf.json").unlink()
    (home.directory / "conf.json").mkdir()
    assert_refused(home, says=("cannot read conf.json", "directory"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"do_token": None}, ('"do_token"', "https://cloud.digitalocean.com/account/api/tokens")),
        ({"do_token": ""}, ('"do_token"',)),
        ({"do_token": "has spaces"}, ("token", "space")),
        ({"do_token": 42}, ('"do_token" must be a text',)),
        ({"region": None}, ('"region" is missing', "fra1")),
        ({"region": 1}, ('"region" must be a region in quotes, such as "fra1", or ["fra1", "nyc3"]', '"all"')),
        ({"region": ["fra1", 1]}, ('"region" must be a region',)),
        ({"region": []}, ('"region" is missing',)),
        ({"regoin": "fra1"}, ('unknown key "regoin"', 'did you mean "region"?')),
        ({"dotoken": "x"}, ('unknown key "dotoken"', 'did you mean "do_token"?')),
        ({"colour": "red"}, ('unknown key "colour"', "do_token, region")),
        ({"include": "data"}, ('"include" must be a list', '["data", "db-*"]')),
        ({"exclude": ["data", 1]}, ('"exclude" must be a list',)),
        ({"droplet_size": 1}, ('"droplet_size" must be a text',)),
        ({"droplet_image": False}, ('"droplet_image" must be a text',)),
    ],
)
def test_wrong_keys(sim: Simulator, home: Home, keys: dict[str, Any], says: tuple[str, ...]) -> None:
    home.configure(**keys)
    assert_refused(home, says=("conf.json", *says) if "has spaces" not in keys.values() else says)
    assert not sim.requests


def test_the_example_as_it_is(sim: Simulator, home: Home) -> None:
    """It is valid, and the placeholder is recognised; with a token in its place it works."""
    example = (Path(__file__).resolve().parent.parent / "conf.json.example").read_text()
    write_conf(home, example)
    assert_refused(home, says=('"do_token" is still the placeholder',))
    content = json.loads(example)
    write_conf(home, example.replace(content["do_token"], sim.token))
    sim.add_volume("data", region=content["region"])
    assert "would back up data" in home.run("--dry-run").stdout


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_token_that_others_can_read_is_warned_about(sim: Simulator, home: Home, mode: int, warned: bool) -> None:
    sim.add_volume("data")
    (home.directory / "conf.json").chmod(mode)
    done = home.run("--dry-run")
    assert ("chmod 600 conf.json" in done.stderr) == warned
    assert ("warning" in done.stderr) == warned


# ── What the account does not have


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"region": "mars1"}, ('no region "mars1"', "ams3", "fra1", "nyc1")),
        ({"region": "ams2"}, ('"ams2" has no volumes', "ams3, blr1, fra1")),
        ({"region": "nyc2"}, ('"nyc2"', "closed", "nyc1, nyc3")),
        ({"droplet_size": "s-1vcpu-3gb"}, ('"s-1vcpu-3gb"', "fra1", "s-1vcpu-1gb", '"droplet_size"')),
        ({"droplet_size": "512mb"}, ('"512mb"', "not to be had in fra1")),
        ({"region": "sgp1", "droplet_size": "s-1vcpu-512mb-10gb"}, ('"s-1vcpu-512mb-10gb"', "sgp1")),
        ({"droplet_image": "debian-99-x64"}, ('"debian-99-x64"', "debian-13-x64", '"droplet_image"')),
        ({"region": "blr1", "droplet_image": "debian-13-x64"}, ('"debian-13-x64"', "blr1", "debian-12-x64")),
    ],
)
def test_what_is_not_on_offer(sim: Simulator, home: Home, keys: dict[str, str], says: tuple[str, ...]) -> None:
    for region in ("fra1", "sgp1", "blr1"):
        sim.add_volume("data", region=region)
    home.configure(**keys)
    message = assert_refused(home, says=says)
    for unusable in {"nyc2", "sfo1", "ams2", "512mb", "debian-10-x64"} - set(keys.values()):
        assert not re.search(rf"\b{unusable}(,|$)", message)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"include": ["dta"]}, ('"dta"', '"include"', "conf.json", "data, web")),
        ({"include": ["data", "db-*"]}, ('"db-*"', '"include"', "conf.json", "data, web")),
        ({"exclude": ["scratch"]}, ('"scratch"', '"exclude"', "conf.json", "data, web")),
    ],
)
def test_patterns_that_fit_no_volume(
    sim: Simulator, home: Home, keys: dict[str, list[str]], says: tuple[str, ...]
) -> None:
    """A warning says so, with what there is: a volume may have been deleted. It is an error if nothing is left."""
    sim.add_volume("data")
    sim.add_volume("web")
    home.configure(**keys)
    if keys == {"include": ["dta"]}:
        assert_refused(home, says=("leave no volume", "data, web"))
    done = home.run("--dry-run", expect=None)
    (warning,) = [line for line in done.stderr.splitlines() if "warning: " in line]
    assert [text for text in says if text not in warning] == []
    assert (done.returncode == 0) == ("would back up data" in done.stdout) == (keys != {"include": ["dta"]})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"exclude": ["*"]}, ("leave no volume", "data, web")),
        ({"region": "sgp1"}, ("no volumes in sgp1", "data (fra1), web (fra1)", '"region"')),
    ],
)
def test_volumes_that_are_not_there(sim: Simulator, home: Home, keys: dict[str, Any], says: tuple[str, ...]) -> None:
    sim.add_volume("data")
    sim.add_volume("web")
    home.configure(**keys)
    assert_refused(home, says=says)


def test_an_account_without_volumes(sim: Simulator, home: Home) -> None:
    assert_refused(home, says=("there are no volumes in fra1",))


def test_a_wrong_token(sim: Simulator, home: Home) -> None:
    sim.add_volume("data")
    sim.revoke_token()
    page = "https://cloud.digitalocean.com/account/api/tokens"
    assert_refused(home, says=('the token in "do_token" in conf.json', "401", page))


@pytest.mark.parametrize("url", ["http://api.digitalocean.com", "ftp://localhost", "api.digitalocean.com", "https://"])
def test_the_token_goes_over_https_only(sim: Simulator, home: Home, url: str) -> None:
    assert_refused(home, says=("DIGITALOCEAN_API_URL", url, "https://"), DIGITALOCEAN_API_URL=url)
    assert not sim.requests


# ── The place to run in


def test_backups_is_a_file(sim: Simulator, home: Home) -> None:
    home.backups.write_text("")
    assert_refused(home, says=("cannot write to backups",))
    assert not sim.requests


def test_backups_is_read_only(sim: Simulator, home: Home) -> None:
    home.backups.mkdir()
    in_namespace = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none backups && exec "$0" "$@"')
    assert_refused(home, wrapper=in_namespace, says=("cannot write to backups", "Read-only file system"))
    assert not sim.requests


def test_the_parent_of_backups_does_not_exist(sim: Simulator, home: Home) -> None:
    assert_refused(home, "--backups", "no/such/place", says=("cannot write to no/such/place", "No such file"))


def test_another_run_is_going_on_there(sim: Simulator, home: Home) -> None:
    volume = sim.add_volume("data")
    first = home.start()
    wait_for(lambda: sim.requests)  # it has the lock by now
    os.kill(first.pid, signal.SIGSTOP)
    try:
        for arguments in ((), ("sweep",), ("verify",)):
            done = home.run(*arguments, expect=2, DIGITALOCEAN_API_URL="http://127.0.0.1:9")  # where nobody listens
            assert "another dosvob is at work in backups" in done.stderr
            assert not done.stdout  # a call would be tried again, visibly
            assert len(done.stderr.splitlines()) == 1
    finally:
        os.kill(first.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert same(home.image("data"), volume.path)
    assert not sim.alive()
