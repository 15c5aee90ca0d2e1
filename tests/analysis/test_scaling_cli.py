"""CSV files with their errors, compute budgets, and ``fmrizoo scaling fit`` as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fmrizoo.analysis.scaling import Law, Points, compute_of, fit_law, isoflop, pf_days, read_points
from fmrizoo.cli import app
from fmrizoo.errors import DataError, RecipeError

Run = Callable[..., Result]
LAW = Law(0.55, 40.0, 0.28, 400.0, 0.36)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["scaling", "fit", *arguments], catch_exceptions=False)

    return run


def planted(path: Path) -> Path:
    """Four budgets of six sizes, two seeds."""
    random = np.random.default_rng(0)
    lines = ["# planted", "n,d,loss,seed,flops,name"]
    for budget in np.geomspace(6e14, 6e18, 4):
        middle = 1e6 * np.sqrt(budget / 6e14)
        for n in middle * np.geomspace(0.1, 10, 6):
            d = budget / 6 / n
            for seed in (0, 1):
                loss = float(LAW.loss(n, d)) * np.exp(0.001 * random.standard_normal())
                lines.append(f"{n:.8g},{d:.8g},{loss:.8g},{seed},{budget / 4:.8g},run")
    path.write_text("\n".join(lines) + "\n")
    return path


# --- CSV ------------------------------------------------------------------------------------------


def test_points_are_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "# of a sweep\nLoss, N ,d,unique,seed\n2.5,1e6,3e7,1e7,a\n\n2.0,1e7,3e7,3e7,b\n"
    )
    points = read_points(path)
    assert points.n is not None and points.d is not None and points.unique is not None
    assert points.loss.tolist() == [2.5, 2.0] and points.n.tolist() == [1e6, 1e7]
    assert points.unique.tolist() == [1e7, 3e7] and points.seed == ("a", "b")
    assert points.flops is None and points.noise is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("n,d,loss\n", "holds no point below its header"),
        ("n,loss\n1e6,2\n", "lacks the column d; it has n, loss"),
        ("params,tokens,loss\n1,1,1\n", "lacks the columns n, d"),
        ("n,d,loss,n\n1,1,1,1\n", "has the column n twice"),
        ("n,d,loss\n1e6,1e7,2\n1e6,1e8,nan\n", "line 3: loss is nan"),
        ("n,d,loss\n1e6,1e7,inf\n", "line 2: loss is inf"),
        ("n,d,loss\n# note\n1e6,-1,2\n", "line 3: d is -1"),
        ("n,d,loss\n0,1e7,2\n", "line 2: n is 0"),
        ("n,d,loss\n51M,1e7,2\n", "line 2: n is '51M', not a number"),
        ("n,d,loss\n1e6,,2\n", "line 2: d is '', not a number"),
        ("n,d,loss\n1e6,1e7\n", "line 2: 2 values for 3 columns"),
        ("n,d,loss,unique\n1e6,1e7,2,2e7\n", "line 2: unique is 2e\\+07, more than the d"),
        (
            "n,d,loss,seed\n1e6,1e7,2,0\n1e6,1e7,2,0\n",
            "line 3: the same setting and seed '0' as in",
        ),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_points(path)
    assert "p.csv" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone.csv: No such file"):
        read_points(tmp_path / "gone.csv")


def test_a_law_of_one_axis_needs_one_column(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("n,loss\n1e6,2\n")
    assert read_points(path, "n").d is None
    with pytest.raises(DataError, match="lacks the column d"):
        read_points(path, "d")


# --- compute --------------------------------------------------------------------------------------


def test_compute_is_given_or_6nd_with_a_warning() -> None:
    n, d = np.array([1e6]), np.array([1e8])
    flops, said = compute_of(Points(np.ones(1), n, d)) or (np.zeros(1), "")
    assert flops.tolist() == [6e14] and "several times too high for hierarchical" in said
    flops, said = compute_of(Points(np.ones(1), n, d, flops=np.array([1e14]))) or (n, "")
    assert flops.tolist() == [1e14] and said == "the column flops"
    assert compute_of(Points(np.ones(1), n)) is None
    assert pf_days(8.64e19) == pytest.approx(1.0)


def test_parabolas_per_budget_and_their_bias(tmp_path: Path) -> None:
    points = read_points(planted(tmp_path / "p.csv"))
    found = isoflop(points)
    assert [one.flops for one in found] == pytest.approx(np.geomspace(1.5e14, 1.5e18, 4))
    assert [len(one.n) for one in found] == [12] * 4
    # Lowest point at a budget of the planted law: N = (alpha A / beta B)^(1/(a+b)) (C/6)^(b/(a+b)).
    total = 0.28 + 0.36
    for one in found:
        true = (0.28 * 40 / (0.36 * 400)) ** (1 / total) * (one.flops * 4 / 6) ** (0.36 / total)
        assert one.best_n == pytest.approx(true, rel=0.6)
    # Without noise and centred on the true minimum, the parabola of an uneven law still misses it.
    budget = 1e18
    true = (0.28 * 40 / (0.36 * 400)) ** (1 / total) * (budget / 6) ** (0.36 / total)
    n = true * np.geomspace(0.05, 20, 9)
    d = budget / 6 / n
    (one,) = isoflop(Points(LAW.loss(n, d), n, d))
    assert one.best_n is not None and abs(np.log(one.best_n / true)) > 0.02


def test_a_budget_without_a_minimum_has_none() -> None:
    n = np.geomspace(1e6, 1e8, 5)
    (one,) = isoflop(Points(np.linspace(3, 2, 5), n, 1e15 / n))
    assert one.best_n is None
    assert isoflop(Points(np.linspace(3, 2, 3), n[:3], 1e15 / n[:3])) == []


# --- as typed -------------------------------------------------------------------------------------


def test_fit_as_typed(cli: Run, tmp_path: Path) -> None:
    planted(tmp_path / "p.csv")
    done = cli(
        "p.csv", "--out", "law", "--target", "1e10,1e12", "--unit", "tokens", "--draws", "50"
    )
    assert done.exit_code == 0
    text = done.stdout
    assert "L(N, D) = E + A·N^-alpha + B·D^-beta" in text
    assert "extrapolation factor: N × 10, D × 10 (beyond the points)" in text
    assert "measured on repeated points with 24 degrees of freedom" in text
    assert "tokens (decades: N 4.00, D 4.00)" in text
    assert "gradient vanishes" in text and "the column flops" in text
    assert "wrote law/scaling.json and law/scaling.svg" in text
    values = json.loads(Path("law/scaling.json").read_text())
    assert values["schema"] == "fmrizoo.scaling/1" and values["converged"] is True
    alpha = values["estimates"]["alpha"]
    assert alpha["low"] < alpha["value"] < alpha["high"]
    assert alpha["value"] == pytest.approx(0.28, rel=0.05)
    assert values["target"]["extrapolation"] == pytest.approx({"N": 10, "D": 10})
    assert values["target"]["loss"] == pytest.approx(float(LAW.loss(1e10, 1e12)), rel=0.02)
    assert len(values["isoflop"]) == 4
    picture = Path("law/scaling.svg").read_text()
    assert picture.startswith("<?xml")
    first = Path("law/scaling.json").read_bytes(), picture
    cli("p.csv", "--out", "law", "--target", "1e10,1e12", "--unit", "tokens", "--draws", "50")
    assert (Path("law/scaling.json").read_bytes(), Path("law/scaling.svg").read_text()) == first


def test_one_axis_as_typed(cli: Run, tmp_path: Path) -> None:
    n = np.geomspace(1e6, 1e8, 8)
    loss = Law(0.55, 12.0, 0.28).loss(n)
    rows = [f"{a:.8g},{b:.8g}" for a, b in zip(n, loss, strict=True)]
    Path("p.csv").write_text("\n".join(["n,loss", *rows]))
    given = ["p.csv", "--out", "law", "--law", "n", "--noise", "0.001", "--draws", "50"]
    done = cli(*given, "--target", "1e10")
    assert "FAR: the law was never tested there" in done.stdout
    assert "exponent with one setting left out: 0.28" in done.stdout
    assert "without a floor the same points give an exponent of 0.0554" in done.stdout
    values = json.loads(Path("law/scaling.json").read_text())
    assert values["noise"] == {
        "relative_sd": pytest.approx(0.001),
        "origin": "given",
        "degrees_of_freedom": None,
    }
    assert values["pure_power_exponent"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--law", "both"], "--law takes nd, repeated, n, d, got 'both'"),
        (["--target", "1e9"], "--target takes two positive numbers"),
        (["--target", "1e9,-1"], "--target takes two positive numbers"),
        (["--target", "big,1"], "got 'big,1'"),
    ],
)
def test_options_that_make_no_sense(
    cli: Run, tmp_path: Path, arguments: list[str], said: str
) -> None:
    planted(tmp_path / "p.csv")
    with pytest.raises(RecipeError, match=said):
        cli("p.csv", "--out", "law", *arguments)
    assert not Path("law").exists()


def test_the_sources_figure_3() -> None:
    """What can be said with the readings that are known; see docs/scaling.md."""
    n = np.array([3.7e7, 1.2e9])
    read = np.array([0.143, 0.125])
    printed = (n / 1.92e-10) ** -0.48
    plotted = (n / 1.92e-10) ** -0.048
    assert np.all(printed < 1e-8)  # the formula as printed: seven orders of magnitude below
    assert plotted == pytest.approx(read, rel=0.05)
    between = -np.log(read[1] / read[0]) / np.log(n[1] / n[0])
    assert between == pytest.approx(0.039, abs=0.001)
    with pytest.raises(DataError, match="2 points cannot determine E, A, alpha"):
        fit_law(Points(read, n), "n")
