"""What is kept: by the definition of each rule, and as conf.json says it."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Home
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dosvob

ROOT = Path(__file__).resolve().parent.parent
Moment = datetime.datetime
NEW_YEAR = Moment(2027, 1, 1, tzinfo=datetime.UTC)  # a Friday in the week 53 of 2026


def chosen_by(count: int, period: Callable[[Moment], Any], moments: list[Moment]) -> set[int]:
    """The newest of each of the last `count` periods that have one, by definition; moments are the newest first."""
    periods = sorted({period(moment) for moment in moments}, reverse=True)[:count]
    return {min(n for n, moment in enumerate(moments) if period(moment) == wanted) for wanted in periods}


def by_definition(keep: dosvob.Keep, moments: list[Moment]) -> set[int]:
    """The numbers of all that is kept, the image's, which is 0, among them."""

    def monday(moment: Moment) -> datetime.date:
        return moment.date() - datetime.timedelta(days=moment.weekday())

    return (
        {0}
        | set(range(min(keep.last + 1, len(moments))))
        | chosen_by(keep.daily, lambda moment: moment.date(), moments)
        | chosen_by(keep.weekly, monday, moments)
        | chosen_by(keep.monthly, lambda moment: (moment.year, moment.month), moments)
    )


KEEPS = st.builds(dosvob.Keep, *[st.integers(0, 6)] * 4)
AGES = st.lists(
    st.one_of(st.integers(0, 3 * 24 * 60), st.integers(0, 60 * 24 * 60), st.integers(0, 800 * 24 * 60)),
    min_size=1,
    max_size=40,
    unique=True,
)


@settings(deadline=None)
@given(KEEPS, AGES)
@example(dosvob.Keep(0, 0, 3, 0), [0, 24 * 60, 4 * 24 * 60, 5 * 24 * 60, 12 * 24 * 60])
def test_what_is_kept_is_what_the_rules_say(keep: dosvob.Keep, ages: list[int]) -> None:
    moments = sorted((NEW_YEAR + datetime.timedelta(days=3, minutes=-age) for age in ages), reverse=True)
    wanted = keep.wanted(moments)
    assert {number for number, is_wanted in enumerate(wanted) if is_wanted} == by_definition(keep, moments)


@settings(deadline=None)
@given(KEEPS, AGES)
def test_what_was_dropped_would_not_be_wanted_later(keep: dosvob.Keep, ages: list[int]) -> None:
    """Thinning at each backup keeps what thinning once, at the end, would keep: nothing is missed for having gone."""
    moments = sorted(NEW_YEAR - datetime.timedelta(minutes=age) for age in ages)
    kept: list[Moment] = []
    for moment in moments:
        kept.insert(0, moment)
        kept = [one for one, is_wanted in zip(kept, keep.wanted(kept), strict=True) if is_wanted]
    everything = moments[::-1]
    once = [one for one, is_wanted in zip(everything, keep.wanted(everything), strict=True) if is_wanted]
    assert kept == once


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(1, 30), st.integers(0, 23))
def test_days_are_those_of_utc(daily: int, days: int, hour: int) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=hour - 11))
    moments = [(NEW_YEAR + datetime.timedelta(hours=5 * n)) for n in range(days * 4)][::-1]
    keep = dosvob.Keep(0, daily, 0, 0)
    as_utc = keep.wanted(moments)
    assert as_utc.count(True) == max(min(daily, len({moment.date() for moment in moments})), 1)
    told = [moment.astimezone(zone).astimezone(datetime.UTC) for moment in moments]
    assert keep.wanted(told) == as_utc


# -- conf.json


def test_the_default_is_that_of_the_example() -> None:
    example_file = json.loads((ROOT / "conf.json.example").read_text())
    assert example_file["keep"] == dataclasses.asdict(dosvob.Keep())
    assert list(example_file) == ["do_token", "region", "keep"]


def loaded(directory: Path, content: str) -> dosvob.Keep:
    """What is to be kept by a conf.json with that."""
    path = directory / "conf.json"
    path.write_text(f'{{"do_token": "dop_v1_{"a" * 64}", "region": "fra1"{content}}}')
    path.chmod(0o600)
    return dosvob.Config.load(path, {}, pytest.fail).keep


def test_what_conf_json_says_is_kept(tmp_path: Path) -> None:
    assert loaded(tmp_path, "") == dosvob.Keep()
    assert loaded(tmp_path, ', "keep": {}') == dosvob.Keep(0, 0, 0, 0)
    assert loaded(tmp_path, ', "keep": {"weekly": 3}') == dosvob.Keep(0, 0, 3, 0)
    assert loaded(tmp_path, ', "keep": {"last": 3, "daily": 7, "weekly": 4, "monthly": 0}') == dosvob.Keep(3, 7, 4, 0)


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ('{"dayly": 7}', 'unknown key in "keep" "dayly": did you mean "daily"?'),
        ('{"yearly": 7}', 'unknown key in "keep" "yearly": '),
        ('{"hours": 7}', 'unknown key in "keep" "hours": known are last, daily, weekly, monthly'),
        ('{"last": -1}', '"last" in "keep" must be a whole number from 0 to 10000'),
        ('{"last": 10001}', '"last" in "keep" must be'),
        ('{"daily": 7.0}', '"daily" in "keep" must be'),
        ('{"daily": "7"}', '"daily" in "keep" must be'),
        ('{"weekly": true}', '"weekly" in "keep" must be'),
        ('{"monthly": null}', '"monthly" in "keep" must be'),
        ('{"monthly": [1]}', '"monthly" in "keep" must be'),
        ("7", '"keep" must be an object such as {"last": '),
        ("null", '"keep" must be an object such as {"last": '),
        ("[]", '"keep" must be an object such as {"last": '),
        ('"all"', '"keep" must be an object such as {"last": '),
    ],
)
def test_a_mistake_in_keep_is_told(home: Home, keep: str, told: str) -> None:
    home.configure(keep=json.loads(keep) if keep != "null" else 0)
    if keep == "null":
        path = home.directory / "conf.json"
        path.write_text(path.read_text().replace('"keep": 0', '"keep": null'))
    for arguments in (("--dry-run",), (), ("sweep",))[: None if "dayly" in keep else 1]:
        done = home.run(*arguments, expect=2)
        assert told in done.stderr
        assert "conf.json" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not home.simulator.ever


def test_the_key_that_holds_it_is_told_as_well(home: Home) -> None:
    home.configure(kep={"last": 1})
    assert 'unknown key "kep": did you mean "keep"?' in home.run("--dry-run", expect=2).stderr
