"""Splits that know the people: families, sites, strata, matched cohorts."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas
import pytest

from fmrizoo.config import MatchConfig, SplitConfig
from fmrizoo.data.people import binned, numbers
from fmrizoo.data.splits import Split, make_split
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.types import RunKey


@dataclass
class Rows:
    """A store as far as splits look at it."""

    table: dict[str, dict[str, str]]
    runs_each: int = 2
    path: Path = Path("store")
    runs: list[RunInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        for subject in self.table:
            for run in range(self.runs_each):
                key = RunKey(subject, task="rest", run=str(run))
                facts = {f: None for f in RunInfo.__dataclass_fields__}
                self.runs.append(RunInfo(**{**facts, "name": str(key), "key": key}))

    def __getitem__(self, name: str) -> RunInfo:
        return next(run for run in self.runs if run.name == name)

    @property
    def participants(self) -> pandas.DataFrame | None:
        rows = [{"participant_id": f"sub-{s}", **cells} for s, cells in self.table.items()]
        return pandas.DataFrame(rows).replace("", None) if rows and len(rows[0]) > 1 else None


def people(n: int = 60, seed: int = 0) -> dict[str, dict[str, str]]:
    """Cases are older and mostly from site A; families of two, some of them over two sites."""
    rng, rows = np.random.default_rng(seed), {}
    for i in range(n):
        case = i % 3 == 0
        age = rng.normal(45 if case else 35, 9)
        rows[f"{i:03d}"] = {
            "dx": "case" if case else "control",
            "age": f"{age:.1f}",
            "sex": "FM"[int(rng.integers(2))],
            "site": "ABCDEF"[int(rng.integers(6))],
            "family": f"F{i // 2}",
        }
    return rows


def make(rows: Rows, **settings: Any) -> Split:
    return make_split(cast(Store, rows), rows.runs, SplitConfig(**settings))


def parts(split: Split, rows: Rows, column: str) -> list[set[str]]:
    return [
        {rows.table[rows[name].subject][column] for name in names}
        for names in split.parts().values()
    ]


@pytest.mark.parametrize("by", ["family", "site"])
def test_families_and_sites_are_never_divided(by: str) -> None:
    rows = Rows(people())
    n, seen = (5 if by == "family" else 6), Counter[str]()
    for fold in range(n):
        split = make(rows, by=by, folds=n, fold=fold, validation=0.2)
        found = parts(split, rows, by)
        assert sum(map(len, found)) == len(set().union(*found))
        assert len(split.train) + len(split.validation) + len(split.test) == 120
        seen.update(split.test)
    assert set(seen.values()) == {1} and len(seen) == 120
    named = {s: {**row, "centre": row["site"]} for s, row in rows.table.items()}
    other = make(Rows(named), by="site", column="centre", folds=6)
    assert other.test == make(Rows(named), by="site", folds=6).test


def test_a_family_over_two_sites_joins_them() -> None:
    table = {f"{i:02d}": {"site": "ABCDEF"[i // 4], "family": f"F{i}"} for i in range(24)}
    for one, other in (("00", "04"), ("08", "12")):  # a family in A and B, one in C and D
        table[other]["family"] = table[one]["family"]
    rows = Rows(table)
    tested = []
    for fold in range(4):
        split = make(rows, by="site", column="site,family", folds=4, fold=fold, validation=0.3)
        for column in ("site", "family"):
            found = parts(split, rows, column)
            assert sum(map(len, found)) == len(set().union(*found)), column
        tested.append("".join(sorted(parts(split, rows, "site")[2])))
    assert sorted(tested) == ["AB", "CD", "E", "F"]
    # Alone, the site would divide the families.
    alone = [make(rows, by="site", folds=6, fold=f) for f in range(6)]
    assert any(
        sum(map(len, parts(s, rows, "family"))) > len(set().union(*parts(s, rows, "family")))
        for s in alone
    )


def test_strata_are_alike_in_all_folds() -> None:
    rows = Rows(people(120))
    whole = Counter(row["dx"] + row["sex"] for row in rows.table.values())
    tested: Counter[str] = Counter()
    for fold in range(5):
        split = make(rows, stratify=["dx", "sex"], folds=5, fold=fold, validation=0.25)
        tested.update(split.test)
        for names in split.parts().values():
            subjects = {rows[name].subject for name in names}
            share = Counter(rows.table[s]["dx"] + rows.table[s]["sex"] for s in subjects)
            for label, count in whole.items():
                assert abs(share[label] - count * len(subjects) / 120) <= 1.6, (fold, label)
    assert set(tested.values()) == {1} and len(tested) == 240
    again = make(Rows(people(120)), stratify=["dx", "sex"], folds=5, fold=4, validation=0.25)
    assert again == split
    assert (
        make(rows, stratify=["dx", "sex"], seed=1).test != make(rows, stratify=["dx", "sex"]).test
    )


def test_strata_of_numbers_and_whole_families() -> None:
    rows = Rows(people(120))
    ages = [float(row["age"]) for row in rows.table.values()]
    for fold in range(5):
        split = make(rows, stratify=["age"], by="family", fold=fold)
        found = parts(split, rows, "family")
        assert sum(map(len, found)) == len(set().union(*found))
        own = [float(rows.table[rows[n].subject]["age"]) for n in split.test]
        assert abs(np.mean(own) - np.mean(ages)) < 3
    small = [make(rows, stratify=["age"], train_units=k) for k in (10, 20, 48)]
    assert set(small[0].train) < set(small[1].train) < set(small[2].train)
    assert binned(["1", "2", "1"], 2) == ["1", "2", "1"]
    assert binned([str(i) for i in range(8)], 4) == [f"q{i // 2}" for i in range(8)]
    assert numbers(["1", "x"]) is None and numbers(["1", "inf"]) is None


def test_a_rare_class_is_said(caplog: pytest.LogCaptureFixture) -> None:
    table = people(30)
    table["007"]["sex"] = "other"
    with caplog.at_level(logging.WARNING):
        split = make(Rows(table), stratify=["sex"])
    assert "1 of 3 classes have fewer members than the 5 folds (other)" in caplog.text
    assert len(split.train) + len(split.validation) + len(split.test) == 60


def test_matching_makes_the_classes_alike(tmp_path: Path, caplog: Any) -> None:
    rows = Rows(people(90))
    settings = {"match": MatchConfig("dx", ["age", "sex"]), "folds": 3}
    with caplog.at_level(logging.WARNING):
        split = make(rows, **settings)
    found = split.matching[""]
    assert abs(found["before"]["age"]) > 0.5 > 0.2 > abs(found["after"]["age"])
    assert all(abs(v) < 0.25 for v in found["after"].values())
    kept = {s for pair in found["pairs"] for s in pair}
    assert len(kept) == 2 * len(found["pairs"]) and kept.isdisjoint(found["left_out"])
    assert kept | set(found["left_out"]) == set(rows.table)
    assert {rows[n].subject for names in split.parts().values() for n in names} == kept
    assert [{rows.table[s]["dx"] for s in pair} for pair in found["pairs"]] == (
        [{"case", "control"}] * len(found["pairs"])
    )
    assert f"{len(found['pairs'])} pairs of dx alike in age, sex; left out: sub-" in caplog.text
    # The imbalance is what it says.
    ages = {s: float(row["age"]) for s, row in rows.table.items()}
    one, two = (
        np.array([ages[s] for s in ages if rows.table[s]["dx"] == c]) for c in ("case", "control")
    )
    smd = (one.mean() - two.mean()) / np.sqrt((one.var() + two.var()) / 2)
    assert found["before"]["age"] == pytest.approx(smd)
    # The same from the file, which is checked as a whole.
    path = tmp_path / "split.json"
    split.save(path)
    assert Split.load(path) == split
    body = json.loads(path.read_text())
    body["matching"][""]["left_out"] = []
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match="was changed after it was written"):
        Split.load(path)
    shuffled = replace(rows, runs=[])
    shuffled.runs.reverse()
    assert make(shuffled, **settings).sha == split.sha


def test_nobody_is_matched_beyond_the_caliper() -> None:
    table = {f"{i:02d}": {"dx": "ab"[i % 2], "age": str(30 + i)} for i in range(20)}
    table["20"] = {"dx": "a", "age": "90"}
    found = make(Rows(table), match=MatchConfig("dx", ["age"], caliper=0.5)).matching[""]
    assert "20" in found["left_out"]
    far = max(abs(float(table[a]["age"]) - float(table[b]["age"])) for a, b in found["pairs"])
    assert far < 10


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"by": "family", "column": "fam"}, "split.by=family: .* has no column 'fam'"),
        ({"stratify": ["sex", "iq"]}, "split.stratify: .* has no column 'iq'"),
        ({"by": "site"}, r"split.by=site: 1 of 30 subjects have no site in .*\(first: sub-003\)"),
        ({"stratify": ["site"]}, "1 of 30 subjects have no site"),
        ({"by": "family", "folds": 16}, r"60 chosen runs are 15 family\(s\)"),
        ({"match": {"target": "family", "on": ["age"]}}, "needs two classes, the 30 subjects have"),
        ({"match": {"target": "dx", "on": ["site"]}}, "1 of 30 subjects have no site"),
        ({"match": {"target": "dx", "on": ["one"]}}, "no covariate varies"),
        (
            {"match": {"target": "dx", "on": ["age"]}, "folds": 12},
            r"leaves \d+ pairs of 30 subjects \(case: 10, control: 20\), but 12 folds need",
        ),
    ],
)
def test_bad_columns_are_one_sentence(settings: dict[str, Any], said: str) -> None:
    table = people(30)
    for row in table.values():
        row["one"] = "1"
    table["003"]["site"] = ""
    if "match" in settings:
        settings = {**settings, "match": MatchConfig(**settings["match"])}
    with pytest.raises(DataError, match=said) as found:
        make(Rows(table), **settings)
    assert "\n" not in str(found.value)


def test_without_a_table_there_are_no_families() -> None:
    bare = Rows({f"{i}": {} for i in range(9)})
    for settings in ({"by": "site"}, {"stratify": ["sex"]}):
        with pytest.raises(DataError, match=r"participants\.tsv, but store has no such file"):
            make(bare, **settings)
    make(bare)


def test_a_family_in_two_parts_is_refused() -> None:
    rows = Rows(people(8), runs_each=1)
    names = [r.name for r in rows.runs]
    split = Split(names[:3], [], names[3:], SplitConfig(by="family"))
    with pytest.raises(DataError, match="family F1 is divided between the train and the test"):
        split.check(cast(Store, rows))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"by": "person"}, "split.by='person' is not known"),
        ({"column": "site"}, "is for split.by=family or site, not subject"),
        ({"inner": 1}, "split.inner must be 0 or ≥ 2"),
        ({"bins": 1}, "split.bins must be ≥ 2"),
        ({"stratify": ["sex", "sex"]}, "names sex twice"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        SplitConfig(**settings)
    for bad in ({"target": "a"}, {"target": "a", "on": ["a"]}, {"caliper": 0.0}):
        with pytest.raises(RecipeError, match=r"split\.match"):
            MatchConfig(**bad)


def test_old_splits_are_what_they_were(sample_store: Store) -> None:
    # Hashes of files from before families, sites, strata and matching.
    runs = sample_store.select({"acquisition": "1slice"})
    one = make_split(sample_store, runs, SplitConfig(by="run", folds=3, fold=1, seed=4))
    two = make_split(sample_store, runs, SplitConfig(by="run", folds=3, train_units=2))
    assert one.sha == "5320812b7b2f6f322cbdf6777850ab827e7152b390f4bbf16c2ed030422a5e69"
    assert two.sha == "f0fbebd8f49b32d36e918fcce3adeda9e89b41f1b038f8496bf1db642f0831b9"
    assert replace(one, config=replace(one.config, inner=3)).sha == one.sha
