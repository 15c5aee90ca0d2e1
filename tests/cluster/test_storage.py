"""The planner's arithmetic against an independent calculation for 50,000 subjects of 490 frames."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fmrizoo.cli import app
from fmrizoo.cluster.storage import DataSet, costs, demand, table
from fmrizoo.errors import RecipeError

BIOBANK = DataSet(50_000, 490, brain=253_763 / 96**3, clips_per_visit=8)
# TB in all, files, MB a subject, MB a clip, GB/s of a node: an earlier study's own arithmetic.
KNOWN = {
    ".pt per frame, fp16": (43.4, 24_500_000, 868, 35.39, 0.971),
    ".pt per frame, SwiFT's crop": (27.7, 24_500_000, 554, 22.61, 0.621),
    "NIfTI .nii.gz, whole": (11.9, 50_000, 238, 237.57, 6.519),
    "HDF5 gzip, 20 frames a chunk": (11.9, 50_000, 238, 18.98, 0.521),
    "HDF5 gzip, 1 frame a chunk": (11.9, 50_000, 238, 9.73, 0.267),
    "fmrizoo int8": (6.3, 50_000, 126, 5.33, 0.146),
}


@pytest.mark.parametrize("layout", KNOWN)
def test_rows_agree_with_an_earlier_study(layout: str) -> None:
    cost = next(c for c in costs(BIOBANK) if c.layout == layout)
    found = (
        BIOBANK.subjects * cost.subject_bytes / 1e12,
        cost.files,
        cost.subject_bytes / 1e6,
        cost.clip_bytes / 1e6,
        demand(BIOBANK, cost, 1).bandwidth / 1e9,
    )
    assert found == pytest.approx(KNOWN[layout], rel=0.012)


def test_demand_grows_with_the_nodes_and_divided_memory_shrinks() -> None:
    for _, (one, many) in table(BIOBANK, [1, 128]):
        assert many.bandwidth == pytest.approx(128 * one.bandwidth)
        assert many.opens == pytest.approx(128 * one.opens)
        assert many.staged == one.staged == one.divided == pytest.approx(128 * many.divided)


def test_more_clips_a_visit_cost_less_of_our_layout_alone() -> None:
    few, many = (costs(DataSet(10, 490, clips_per_visit=k)) for k in (1, 8))
    for a, b in zip(few, many, strict=True):
        if a.layout == "fmrizoo int8":
            assert b.clip_bytes < a.clip_bytes and b.clip_opens == a.clip_opens / 8
        else:
            assert a == b


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"subjects": 0}, "subjects must be > 0"),
        ({"brain": 1.5}, "brain is a share"),
        ({"clip_frames": 500}, "a clip of 500 frames is longer than 490"),
        ({"grid": (0, 1, 1)}, "a grid of positive numbers"),
    ],
)
def test_nonsense_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        DataSet(**{"subjects": 1, "frames": 490, **given})  # type: ignore[arg-type]


def test_the_command_prints_every_layout_and_json() -> None:
    run = CliRunner()
    done = run.invoke(app, ["plan", "data", "--subjects", "100", "--nodes", "1,16"])
    assert done.exit_code == 0
    for cost in costs(DataSet(100, 490)):
        assert done.output.count(cost.layout) == 3  # stored, and asked for by 1 and 16 nodes
    plain = json.loads(run.invoke(app, ["plan", "data", "--json"]).output)
    assert plain["data"]["subjects"] == 50_000 and len(plain["layouts"]) == 8
    for bad in (["--grid", "96,96"], ["--nodes", "two"], ["--nodes", "0"]):
        failed = run.invoke(app, ["plan", "data", *bad])
        assert isinstance(failed.exception, RecipeError) and bad[1] in str(failed.exception)
