"""Every way to get muP wrong is seen by the layers of checks that must see it."""

from __future__ import annotations

from functools import cache

import pytest
from mup_mutations import MUTATIONS, Bench, Mutation, for_backbone

NAMES = [
    f"pretrain/{backbone}_{objective}"
    for backbone in ("swin4d", "swin_factorized", "neuromamba")
    for objective in ("simmim", "ar")
]


def cases(names: list[str]) -> list[tuple[str, Mutation]]:
    return [
        (name, mutation)
        for name in names
        for mutation in for_backbone(name.removeprefix("pretrain/").rsplit("_", 1)[0])
    ]


def said(value: object) -> str:
    return value.name if isinstance(value, Mutation) else str(value).removeprefix("pretrain/")


@cache
def bench(name: str) -> Bench:
    return Bench(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_right_rules_pass_table_and_first_step(name: str) -> None:
    assert not bench(name).off_the_shapes(None)
    assert bench(name).first_step(None).passed


def test_there_are_ten_mutations_or_more_for_every_backbone() -> None:
    assert all(len(cases([name])) >= 10 for name in NAMES)
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    assert all(mutation.caught for mutation in MUTATIONS)


@pytest.mark.parametrize(("name", "mutation"), cases(NAMES[::4]), ids=said)
def test_table_and_first_step_see_what_they_must(name: str, mutation: Mutation) -> None:
    assert bool(bench(name).off_the_shapes(mutation)) == ("table" in mutation.caught)
    assert bool(bench(name).first_step(mutation).off) == ("step" in mutation.caught)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutation"), cases(["pretrain/swin_factorized_ar"]), ids=said)
def test_table_and_first_step_see_the_same_in_the_third(name: str, mutation: Mutation) -> None:
    test_table_and_first_step_see_what_they_must(name, mutation)


FAST = ("one projection forgotten", "input rates / m", "no readout multiplier")


@pytest.mark.parametrize(
    ("name", "mutation"),
    [(n, m) for n, m in cases(["pretrain/neuromamba_simmim"]) if m.name in FAST],
    ids=said,
)
def test_coordinates_see_some(name: str, mutation: Mutation) -> None:
    found = bench(name).coordinates(mutation)
    assert found.proves_something and found.failed, found.says


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mutation"), [c for c in cases(NAMES) if "coordinates" in c[1].caught], ids=said
)
def test_coordinates_see_what_they_must(name: str, mutation: Mutation) -> None:
    found = bench(name).coordinates(mutation)
    assert found.failed, found.says
