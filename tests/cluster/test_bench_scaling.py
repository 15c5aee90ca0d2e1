"""Throughput against nodes: the source's table again, ranges, limits, CSV files good and bad."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fmrizoo.cli import app
from fmrizoo.cluster.scaling import Point, Series, baselines_of, limits, rows_of, series_of
from fmrizoo.cluster.scaling_table import read_table, to_csv
from fmrizoo.errors import DataError, FmrizooError, RecipeError
from fmrizoo.report.throughput import FILES, draw, headline, save_scaling, shown

# The source's own columns: efficiency in percent against 1 node and against 64.
SOURCE = {
    1: (27.44, None, None),
    4: (83.85, 76.4, None),
    16: (276.29, 62.9, None),
    64: (877.98, 50.0, None),
    256: (2934.31, 41.8, 83.6),
    512: (4251.88, 30.3, 60.5),
}


def aurora() -> Series:
    (found,) = read_table(Path("aurora"))
    return found


def here(rates: Sequence[tuple[float, ...]], stalls: Sequence[float], cores: int = 8) -> Series:
    """Rounds at 1, 2, 4, … ranks of one node."""
    points = [
        Point(
            1,
            sorted(rounds)[len(rounds) // 2],
            ranks=2**k,
            rounds=rounds,
            low=min(rounds),
            high=max(rounds),
            batch=16,
            stall=stall,
            threads=1,
            cores=cores,
        )
        for k, (rounds, stall) in enumerate(zip(rates, stalls, strict=True))
    ]
    return series_of("here", points)


def test_the_sources_table_comes_out_again() -> None:
    rows = rows_of(aurora(), [1, 64])
    assert [row.size for row in rows] == list(SOURCE)
    for row in rows:
        rate, of_one, of_64 = SOURCE[row.size]
        assert row.point.rate == rate and row.point.per_node == 12
        assert row.speedup == pytest.approx(rate / 27.44)
        for base, percent in ((1, of_one), (64, of_64)):
            found = row.efficiency[base]
            if percent is not None:
                assert found is not None and round(100 * found.value, 1) == percent
        assert (row.efficiency[64] is None) == (row.size < 64)
    last = rows[-1].efficiency
    assert last[1] is not None and last[64] is not None
    assert (last[1].ideal, last[64].ideal) == pytest.approx((14049.28, 7023.84))  # source: 7023.83
    assert "30.3%" in headline(aurora(), [1, 64]) and "60.5%" in headline(aurora(), [1, 64])
    # A doubling keeps (4251.88 / 2934.31) / 2 there; the next worst step is 1 → 4.
    assert limits(aurora())[0].startswith(
        "Most is lost from 256 to 512 nodes: a doubling keeps 72%"
    )


@given(
    st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4)), min_size=3, max_size=9).filter(
        lambda pairs: len(pairs) % 2 == 1
    )
)
def test_the_efficiency_lies_in_its_range(pairs: list[tuple[float, float]]) -> None:
    one, two = (tuple(values) for values in zip(*pairs, strict=True))
    found = rows_of(here([one, two], [0.0, 0.0]))[1].efficiency[1]
    assert found is not None and found.low is not None and found.high is not None
    assert found.low * (1 - 1e-12) <= found.value <= found.high * (1 + 1e-12)


def test_rounds_side_by_side_take_a_slow_machine_out_of_the_range() -> None:
    """Every round of the machine is slower than the one before; the ratio is the same."""
    found = rows_of(here([(100, 50, 10), (160, 80, 16)], [0.0, 0.0]))[1]
    assert found.speedup == pytest.approx(1.6)
    one = found.efficiency[1]
    assert one is not None and (one.low, one.value, one.high) == pytest.approx((0.8, 0.8, 0.8))


def test_ranges_without_rounds_are_the_widest() -> None:
    points = [Point(1, 10, low=9, high=12), Point(2, 16, low=15, high=20), Point(4, 30)]
    rows = rows_of(series_of("x", points))
    first, second, third = (row.efficiency[1] for row in rows)
    assert first is not None and first.low is None
    assert second is not None and (second.low, second.high) == pytest.approx((15 / 24, 20 / 18))
    assert third is not None and third.low is None and third.value == 0.75


def test_weak_scaling_counts_clips_too() -> None:
    points = [Point(n, rate, ranks=n, batch=4 * n) for n, rate in ((1, 10.0), (2, 18.0))]
    found = series_of("x", points, mode="weak")
    row = rows_of(found)[1]
    assert row.efficiency[1] is not None and row.efficiency[1].value == 0.9
    assert [p.seconds for p in found.points] == pytest.approx([0.4, 8 / 18])


def test_the_loader_is_named_where_it_limits() -> None:
    (said,) = limits(here([(100,), (110,)], [0.0, 0.45]))
    assert "the loader limits: steps wait 45%" in said and "100%" in said
    (said,) = limits(here([(100,), (110,)], [0.0, 0.01]))
    assert "loader is not the reason" in said and "(16 → 8 a rank)" in said
    (said,) = limits(here([(100,), (195,)], [0.0, 0.0]))
    assert "nothing limits" in said


def test_rounds_that_disagree_say_nothing_about_limits() -> None:
    found = here([(10, 10, 10), (10, 4, 16)], [0.0, 0.0])
    (said,) = limits(found)
    assert "is 50%, but 20% … 80% over the rounds: too uncertain" in said
    assert "50.0% (20.0% … 80.0%) of ideal growth from 1" in headline(found)


def test_more_threads_than_cores_is_said_and_not_counted() -> None:
    found = here([(100,), (190,), (200,)], [0.0, 0.0, 0.0], cores=2)
    said = limits(found)
    assert said[0].startswith("Rows marked * are not scaling: 4 ranks a node of 1 thread each")
    assert "At 2 ranks the efficiency is 95%" in said[-1]
    words = shown(found)
    assert [row[0][0] for row in words.rows] == ["1", "2", "4*"] and words.crowded
    assert "on 2 ranks" in headline(found)
    alone = here([(100,), (90,)], [0.0, 0.0], cores=1)
    assert "nothing is said about limits" in limits(alone)[-1]


def test_sizes_count_what_differs() -> None:
    ranks = [Point(1, 10.0 * n, ranks=n) for n in (1, 2)]
    assert series_of("x", ranks[::-1]).sizes == [1, 2]
    assert series_of("x", ranks).unit == "ranks"
    nodes = [Point(n, 10.0 * n, ranks=4 * n) for n in (2, 1)]
    assert (series_of("x", nodes).unit, series_of("x", nodes).sizes) == ("nodes", [1, 2])
    assert series_of("x", nodes, by="ranks").sizes == [4, 8]
    unequal = [Point(1, 10, ranks=4), Point(2, 20, ranks=4)]
    with pytest.raises(DataError, match=r"1 nodes have 4 ranks each and 2 nodes 2.*--by ranks"):
        series_of("x", unequal)
    with pytest.raises(DataError, match="two rows of 1 ranks"):
        series_of("x", [ranks[0], ranks[0]], by="ranks")


def test_a_baseline_without_a_row_is_refused() -> None:
    points = [Point(4, 10), Point(8, 19)]
    with pytest.raises(RecipeError, match=r"no row of 1 nodes to be the baseline; there are 4, 8"):
        baselines_of(series_of("x", points), [1])
    assert baselines_of(series_of("x", points)) == [4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# only words\n", "is empty"),
        ("nodes,samples_per_second\n", "no row"),
        ("nodes\n1\n", "needs the columns nodes and samples_per_second"),
        ("nodes,samples_per_second,clips_per_second\n1,2,2\n", "not both"),
        ("nodes,samples_per_second,speed\n1,2,3\n", "unknown column 'speed'"),
        ("nodes,nodes,samples_per_second\n1,1,2\n", "'nodes' is there twice"),
        ("nodes,samples_per_second\n1,fast\n", "line 2: samples_per_second is a number"),
        ("nodes,samples_per_second\n1,nan\n", "line 2: clips a second must be a number > 0"),
        ("nodes,samples_per_second\n1,-3\n", "line 2: clips a second must be a number > 0"),
        ("nodes,samples_per_second\n# x\n1.5,3\n", "line 3: nodes is a whole number"),
        ("nodes,samples_per_second\n0,3\n", "line 2: nodes is a whole number"),
        ("nodes,samples_per_second\n1,\n", "line 2: samples_per_second is empty"),
        ("nodes,samples_per_second\n1,2,3\n", "line 2: 3 cells under 2 columns"),
        ("nodes,samples_per_second\n1,2\n1,3\n", "two rows of 1 nodes"),
        ("nodes,samples_per_second,low\n1,2,1\n", "both ends of a range"),
        ("nodes,samples_per_second,low,high\n1,2,3,4\n", "does not hold 2"),
        ("nodes,samples_per_second,stall\n1,2,30\n", "stall is a share"),
        ("nodes,samples_per_second,mode\n1,2,fast\n", "--mode is strong or weak, got 'fast'"),
        ('nodes,samples_per_second\n1,"2\n3"\n', "line 3: samples_per_second is a number"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(FmrizooError) as caught:
        read_table(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_binary_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nope.*shipped tables: aurora"):
        read_table(tmp_path / "nope.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00nodes")
    with pytest.raises(DataError, match="no UTF-8"):
        read_table(tmp_path / "binary.csv")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = [aurora(), here([(100, 90, 110), (150, 160, 140)], [0.01, 0.02], cores=1)]
    path = tmp_path / "scaling.csv"
    path.write_text(to_csv(found))
    again = read_table(path)
    assert [(s.name, s.mode, s.unit, s.sizes) for s in again] == [
        (s.name, s.mode, s.unit, s.sizes) for s in found
    ]
    for old, new in zip(found, again, strict=True):
        for a, b in zip(old.points, new.points, strict=True):
            assert (a.rate, a.low, a.high, a.batch, a.stall) == (
                b.rate, b.low, b.high, b.batch, b.stall
            )  # fmt: skip
            assert a.crowded == b.crowded and a.per_node == b.per_node


def test_two_systems_in_one_table(tmp_path: Path) -> None:
    path = tmp_path / "both.csv"
    path.write_text("system,nodes,samples_per_second\na,2,10\nb,1,3\na,1,6\nb,4,9\n")
    one, other = read_table(path, mode="weak")
    assert (one.name, one.sizes, other.name, other.sizes) == ("a", [1, 2], "b", [1, 4])
    assert one.mode == "weak"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["bench", "scaling", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_the_command_writes_table_page_and_picture(cli: Callable[..., str], tmp_path: Path) -> None:
    said = cli("--table", "aurora", "--baseline", "1,64", "--out", "x")
    assert "30.3%" in said and "60.5%" in said and "4,251.88" in said
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == sorted(FILES)
    told = json.loads((tmp_path / "x/scaling.json").read_text())
    (series,) = told["series"]
    assert series["baselines"] == [1, 64] and series["unit"] == "nodes"
    assert series["rows"][-1]["efficiency"]["64"]["value"] == pytest.approx(0.60535, abs=1e-5)
    page = (tmp_path / "x/scaling.html").read_text()
    assert "60.5%" in page and "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "x/scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to measure"),
        (("--table", "aurora", "--baseline", "2"), "no row of 2 nodes"),
        (("--table", "aurora", "--baseline", "one"), "--baseline takes whole numbers"),
        (("--table", "aurora", "--by", "cores"), "--by is nodes or ranks"),
        (("--table", "aurora", "--mode", "both"), "--mode is strong or weak"),
        (("--logs", "nothing/*"), "nothing matches"),
        (("pretrain/haxby_slice", "--ranks", "2,1"), "--ranks takes rising numbers"),
        (("pretrain/haxby_slice", "--ranks", "1,0"), "--ranks takes whole numbers"),
        (("pretrain/haxby_slice", "--baseline", "8"), "--baseline 8 is not among --ranks 1,2,4"),
        (("pretrain/haxby_slice", "--steps", "1"), "--steps must be ≥ 2"),
        (("pretrain/haxby_slice", "--rounds", "0"), "--rounds must be ≥ 1"),
        (("pretrain/haxby_slice", "train.batch_size=6"), "4 ranks, strong scaling: train.batch"),
        (
            ("pretrain/haxby_slice", "--mode", "weak", "--ranks", "4,8", "train.batch_size=6"),
            "cannot be divided over its 4 ranks",
        ),
        (("finetune/haxby_slice",), "bench scaling measures pretraining"),
        (("pretrain/haxby_slice", "train.batch_size=8"), "data.store"),
    ],
)
def test_bad_commands_write_nothing(
    cli: Callable[..., str], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(FmrizooError) as caught:
        cli(*words, "--out", "x")
    assert said in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_marks_are_hollow_where_rows_do_not_count_and_axes_are_logarithmic(tmp_path: Path) -> None:
    found = here([(100, 90, 95), (190, 180, 170), (200, 210, 220)], [0.0] * 3, cores=2)
    figure = draw([found, aurora()])
    left, right = figure.axes
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    marks = [line for line in left.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, False, True]
    ideal = [line for line in left.lines if line.get_linestyle() == "--"]
    assert list(ideal[0].get_ydata()) == pytest.approx([95, 380])
    assert right.get_ylim()[0] == 0
    save_scaling([found, aurora()], tmp_path / "both")
    page = (tmp_path / "both/scaling.html").read_text()
    assert "not scaling: 4 ranks a node" in page and "More" not in headline(found)
