"""Arbitrary and mutated files: every reader answers, or says in one sentence what is wrong.

Hangs are the watchdog's business: pytest-timeout ends a test that takes minutes.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fmrizoo.config import PrepareConfig, SplitConfig, compose, to_yaml
from fmrizoo.data.bids import RunFile, find_runs
from fmrizoo.data.nifti import load_run, read_events
from fmrizoo.data.prepare import prepare
from fmrizoo.data.splits import Split
from fmrizoo.data.store import Store, index_checksum, records
from fmrizoo.data.verify import verify
from fmrizoo.errors import FmrizooError
from fmrizoo.files import canonical
from fmrizoo.types import RunKey
from fmrizoo.zoo import load_recipe

pytestmark = pytest.mark.timeout(240)

# The fast profile is drawn from a fixed seed, the big one anew each time:
# `pytest tests/data/test_fuzz.py -m slow -k big`.
PROFILES = [
    pytest.param(50, id="fast"),
    pytest.param(3000, id="big", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
]
NATIVE = PrepareConfig(space="native")
DEEP = 5000  # brackets: deeper than the recursion of any parser here


@st.composite
def mutated(draw: st.DrawFn, good: bytes, tokens: list[bytes]) -> bytes:
    """``good`` with a few bytes flipped, stretches cut, doubled or exchanged for ``tokens``."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 60, 1000]))
        kind = draw(st.sampled_from(["flip", "set", "cut", "end", "double", "token", "token"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at : at + 2] = draw(st.binary(min_size=2, max_size=2))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "end":
            del content[at:]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        elif kind == "token":
            content[at : at + draw(st.integers(0, 8))] = draw(st.sampled_from(tokens))
    return bytes(content)


def fuzz(read: Callable[[Any], object], inputs: st.SearchStrategy[Any], examples: int) -> None:
    """``read`` may return or raise an error made for users: one sentence, nothing else."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
    @given(inputs)
    def run(value: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries' advice is not what is tested
            try:
                read(value)
            except FmrizooError as error:
                assert str(error).strip() and "Traceback" not in str(error)

    run()


@pytest.fixture
def work() -> Any:
    """A folder that all examples of one test share."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    yield folder
    shutil.rmtree(folder)


def bold_file(ending: str) -> bytes:
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.integers(1, 900, (3, 4, 2, 5)).astype(np.int16), np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(np.eye(4), 1)
    plain: bytes = image.to_bytes()
    return plain if ending == ".nii" else gzip.compress(plain, mtime=0)


NUMBERS = [
    np.array(v, t).tobytes()
    for v, t in [
        (0, "<i2"), (-1, "<i2"), (32767, "<i2"), (7, "<i2"), (2304, "<i2"), (128, "<i2"),
        (np.nan, "<f4"), (np.inf, "<f4"), (0, "<f4"), (-1e30, "<f4"), (1e9, "<f4"), (2.5, "<f4"),
        (2**31 - 1, "<i4"), (-5, "<i4"),
    ]
]  # fmt: skip


# --- NIfTI ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", PROFILES)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti(ending: str, examples: int, work: Path) -> None:
    path = work / f"bold{ending}"
    plain = bold_file(".nii")

    def read(content: bytes) -> None:
        # Inside the gzip file it is the header that is fuzzed; then also the gzip stream.
        path.write_bytes(content)
        mask = "compute" if len(content) % 8 == 0 else str(path)
        load_run(RunFile(RunKey("1"), path, tr=2.0), PrepareConfig(space="native", mask=mask))

    header = mutated(plain[:352], NUMBERS).map(lambda h: h + plain[352:])
    inputs = st.one_of(header, mutated(plain, NUMBERS), st.binary(max_size=400))
    if ending == ".nii.gz":
        packed = inputs.map(lambda c: gzip.compress(c, 1, mtime=0))
        inputs = st.one_of(packed, mutated(bold_file(ending), NUMBERS))
    fuzz(read, inputs, examples)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "dim", [(32767,) * 4, (32767, 32767, 1, 5), (3, 4, 2, 32767), (0, 4, 2, 5)]
)
def test_nifti_that_promises_more_than_it_holds(
    ending: str, dim: tuple[int, ...], work: Path
) -> None:
    content = bytearray(bold_file(".nii"))
    content[42:50] = np.array(dim, "<i2").tobytes()
    path = work / f"bold{ending}"
    path.write_bytes(content if ending == ".nii" else gzip.compress(content))
    with pytest.raises(FmrizooError, match=str(path)):
        load_run(RunFile(RunKey("1"), path, tr=2.0), PrepareConfig(mask="compute"))


# --- BIDS and tables ------------------------------------------------------------------------------

JSON = [
    b"[" * DEEP, b'{"a":' * 3000, b"null", b"NaN", b"1e999", b"-1", b'"\\ud800"', b"\xff", b"{}",
    b"[]", b'""', b"9" * 5000, b"1" + b"0" * 400, b"true", b"\x00", b",", b":", b"}", b"2.5",
]  # fmt: skip


@pytest.mark.parametrize("examples", PROFILES)
def test_sidecar(examples: int, work: Path, tree: Any) -> None:
    sidecar = tree.add().with_name("sub-01_task-rest_run-1_bold.json")

    def read(content: bytes) -> None:
        sidecar.write_bytes(content)
        find_runs(tree.root, NATIVE)

    good = b'{"RepetitionTime": 2.0, "TaskName": "rest", "SliceTiming": [0, 1]}'
    values = [b'{"RepetitionTime": %b}' % v for v in JSON]
    fuzz(
        read,
        st.one_of(mutated(good, JSON), st.sampled_from(values + JSON), st.binary(max_size=99)),
        examples,
    )


TSV = [
    b"\t", b"\n", b"\r", b"\r\n", b'"', b'""', b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"n/a",
    b"nan", b"inf", b"1e400", b"onset", b"onset\tonset", b"1_0", b"\t\t\t\t", b"#", b"\\",
    b"x" * 5000, b"-5", b"../../..", b"/dev/zero", b"participant_id",
]  # fmt: skip


def tables(good: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(
        mutated(good, TSV),
        st.lists(st.sampled_from([*TSV, b"1", b"2", b"duration"])).map(b"".join),
        st.binary(max_size=60),
    )


@pytest.mark.parametrize("examples", PROFILES)
def test_events(examples: int, work: Path) -> None:
    def read(content: bytes) -> None:
        (work / "events.tsv").write_bytes(content)
        json.dumps(read_events(work / "events.tsv", 2.0), allow_nan=False)

    fuzz(read, tables(b"onset\tduration\ttrial_type\n0\t1.5\tface\n9\tn/a\thouse\n"), examples)


@pytest.mark.parametrize("examples", PROFILES)
def test_participants(examples: int, work: Path, tree: Any) -> None:
    tree.add()
    prepare(tree.root, work / "s", NATIVE)
    store = Store(work / "s")

    def read(content: bytes) -> None:
        (work / "s/participants.tsv").write_bytes(content)
        table = store.participants
        assert table is not None
        for row in records(table):
            assert all(isinstance(cell, str) for cell in row.values())

    fuzz(read, tables(b"participant_id\tage\tsex\nsub-01\t30\tF\nsub-02\tn/a\tM\n"), examples)


@pytest.mark.parametrize("examples", PROFILES)
def test_file_list(examples: int, work: Path) -> None:
    (work / "a.nii").write_bytes(b"")
    (work / "mask.nii").write_bytes(b"")

    def read(content: bytes) -> None:
        (work / "list.tsv").write_bytes(content)
        find_runs(work / "list.tsv", NATIVE)

    good = (
        b"path\tsubject\tsession\trun\ttr\tmask\na.nii\t01\t\t1\t2.0\tmask.nii\na.nii\t2\t\t1\t\t\n"
    )
    fuzz(read, tables(good), examples)


@pytest.mark.parametrize("examples", PROFILES)
def test_names_of_files(examples: int, work: Path) -> None:
    """Whatever files lie in a BIDS folder."""
    parts = st.sampled_from(
        ["sub-1", "sub-", "sub-2", "task-a", "run-1", "space-x", "desc-preproc", "-", "_", "bold",
         "mask", "events", "é", " ", "echo-1", "a-b-c", ".", "part-phase", "desc-brain", "\n"]
    )  # fmt: skip
    names = st.lists(st.lists(parts, min_size=1, max_size=5).map("_".join), min_size=1, max_size=4)
    func = work / "sub-1" / "func"

    def read(stems: list[str]) -> None:
        shutil.rmtree(work / "sub-1", ignore_errors=True)
        func.mkdir(parents=True)
        for stem in stems:
            for ending in ("_bold.nii.gz", "_mask.nii.gz", "_bold.json", "_events.tsv"):
                (func / (stem + ending)).write_bytes(b"{}")
        find_runs(work, NATIVE)

    fuzz(read, names, examples)


def test_an_entity_without_a_value_is_none(work: Path) -> None:
    """Both files would be run sub-1; found by test_names_of_files."""
    (work / "sub-1" / "func").mkdir(parents=True)
    for name in ("sub-1_bold.nii.gz", "sub-1_-_bold.nii.gz"):
        (work / "sub-1" / "func" / name).write_bytes(b"")
    with pytest.raises(FmrizooError, match="are both run sub-1"):
        find_runs(work, NATIVE)


# --- recipes --------------------------------------------------------------------------------------

YAML = [
    b"\t", b": ", b"- ", b"[", b"{", b"}", b"&a ", b"*a", b"!!python/object:os.system ", b"!!set ",
    b"${", b"${data.store}", b"${oc.env:HOME}", b"${nope:1}", b"???", b"null", b"NaN", b".inf",
    b"2020-01-01", b"0x1g", b"1e400", b"|", b">", b"---\n", b"? [a]: b\n", b"\x00", b"\xff",
    b"[" * 3000, b"{a: " * 600, b"defaults: [x]\n", b"data: ", b"train: [1]\n", b"<<: 1\n",
    b"1: 2\n",
    b"a: &a {b: *a}\n", b"true", b"'", b'"', b"backbone: ", b"!!binary x", b"~: 1\n", b"%TAG", b"@",
]  # fmt: skip


@pytest.mark.parametrize("examples", PROFILES)
def test_recipe(examples: int, work: Path) -> None:

    def read(content: bytes) -> None:
        (work / "recipe.yaml").write_bytes(content)
        load_recipe(work / "recipe.yaml")

    fuzz(
        read,
        st.one_of(mutated(RECIPE, YAML), st.lists(st.sampled_from(YAML)).map(b"".join)),
        examples,
    )


RECIPE = b"""# A whole recipe
backbone: {name: swin4d, embed_dim: 8, depths: [1, 1], num_heads: [1, 2]}
objective: simmim
data: {store: s, clip_frames: 8, select: {task: rest}}
train:
  steps: 10
  lr: 1e-3
prepare: {grid: [8, 8, 8], center: [0, 0, 0], codec: int8}
split: {by: subject, folds: 3}
"""


def test_a_recipe_of_many_aliases(work: Path) -> None:
    """Ten lines that would expand to 10¹⁰ values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 10)]
    (work / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(FmrizooError, match="not a YAML recipe"):
        load_recipe(work / "recipe.yaml")


@pytest.mark.parametrize("value", ["${nope:1}", "${data.store}", "${", "???"])
@pytest.mark.parametrize("section", ["backbone", "objective", "data", "train"])
def test_sections_that_point_nowhere(section: str, value: str, work: Path) -> None:
    """Found by test_recipe and test_overrides."""
    (work / "recipe.yaml").write_text(f"{section}: {value}\n")
    said = "recipe|cannot be merged|give it a value|is missing"
    with pytest.raises(FmrizooError, match=said):
        load_recipe(work / "recipe.yaml")
    with pytest.raises(FmrizooError, match=f"{said}|overrides"):
        compose({"split": {"folds": 3}}, [f"{section}={value}"])


@pytest.mark.parametrize("examples", PROFILES)
def test_overrides(examples: int) -> None:
    keys = st.sampled_from(
        ["data.store", "train.steps", "prepare.grid", "backbone", "backbone.depths", "head",
         "data.select", "a.b.c", "data", "", ".", "data.", "[0]", "prepare.grid[0]", "split.folds",
         "parametrization.base", "task.targets", "x y", "data.select.task", "train.lr", "=", "${x}"]
    )  # fmt: skip
    values = st.one_of(
        st.sampled_from([token.decode("latin-1") for token in YAML]),
        st.text(max_size=20),
        st.integers().map(str),
        st.sampled_from(
            ["swin4d", "{name: swin4d}", "[1,2", "{a", "1|2", "None", "1e-3", "[[[1]]]"]
        ),
    )
    items = st.lists(st.tuples(keys, values).map("=".join), max_size=4)

    def read(overrides: list[str]) -> None:
        to_yaml(compose({"backbone": "swin4d", "objective": "simmim"}, overrides))

    fuzz(read, items, examples)


# --- split files and the index --------------------------------------------------------------------


@pytest.mark.parametrize("examples", PROFILES)
def test_split_file(examples: int, work: Path) -> None:
    Split(["a", "b"], ["c"], ["d"], SplitConfig()).save(work / "good.json")

    def read(content: bytes) -> None:
        (work / "split.json").write_bytes(content)
        Split.load(work / "split.json")

    good = (work / "good.json").read_bytes()
    fuzz(read, st.one_of(mutated(good, JSON), st.sampled_from(JSON)), examples)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        found += paths_of(inner, (*path, key))
    return found


def test_an_index_that_names_a_file_no_file_system_takes(work: Path, tree: Any) -> None:
    """Found by test_index."""
    tree.add()
    prepare(tree.root, work / "s", NATIVE)
    body = json.loads((work / "s/index.json").read_bytes())
    body["runs"][0]["file"] = "a" * 300
    body["sha256"] = index_checksum(body)
    (work / "s/index.json").write_bytes(canonical(body))
    assert [f.kind for f in verify(work / "s").findings] == ["missing", "extra"]
    assert Store(work / "s").summary()["missing_files"] == ["a" * 300]


@pytest.mark.parametrize("examples", PROFILES)
def test_index(examples: int, work: Path, tree: Any) -> None:
    """Mutated bytes, and wrong values under a right checksum."""
    tree.add(events="onset\tduration\n1\t1\n")
    prepare(tree.root, work / "s", NATIVE)
    index = work / "s/index.json"
    good = index.read_bytes()
    places = paths_of(json.loads(good))
    strange = st.sampled_from(
        [None, -1, 0, "", "x", [], {}, [1], {"a": 1}, 1e308, True, "../x", "\x00", "a" * 300, 2**70]
    )

    def forge(place: tuple[Any, ...], value: Any, drop: bool) -> bytes:
        body = json.loads(good)
        inner = body
        for key in place[:-1]:
            inner = inner[key]
        if drop:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
        if "sha256" in body and place != ("sha256",):
            body["sha256"] = index_checksum(body)
        return canonical(body)

    def read(content: bytes) -> None:
        index.write_bytes(content)
        verify(work / "s", 1)
        store = Store(work / "s")
        store.summary()
        for run in store.runs:
            reader = store.open(run)
            reader.read(0, reader.n_frames)

    forged = st.builds(forge, st.sampled_from(places), strange, st.booleans())
    fuzz(read, st.one_of(mutated(good, JSON), forged, forged, st.sampled_from(JSON)), examples)
