"""Damage of every kind: reading raises one clear sentence or gives the written bytes, always."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_tools
import pytest
from fault_tools import Bench, Fault, digest, flips, table, whole

from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store

TINY = {
    "int8": {"codec": "int8", "max_error": 0.5},
    "int16": {"codec": "int8", "max_error": 1e-3},
    "float16": {"codec": "gzip", "max_error": 0.5},
    "float32": {"codec": "gzip", "max_error": 1e-4},
}


@pytest.fixture
def tiny(tree: Any, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Two stores of the same two subjects and three runs in the given kind."""

    def make(kind: str) -> tuple[Path, Path]:
        for subject, run in (("01", "1"), ("01", "2"), ("02", "1")):
            tree.add(subject, run, events="onset\tduration\ttrial_type\n2\t2\tface\n")
        for name in ("one", "two"):
            prepare(tree.root, tmp_path / name, PrepareConfig(space="native", **TINY[kind]))
        assert {run.kind for run in Store(tmp_path / "one").runs} == {kind}
        return tmp_path / "one", tmp_path / "two"

    return make


def no_lies(bench: Bench) -> None:
    assert not bench.bad, f"{len(bench.bad)} bad:\n" + "\n".join(map(str, bench.bad[:10]))


def tell(capsys: pytest.CaptureFixture[str], title: str, counts: dict[str, Counter[str]]) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{title}\n{table(counts)}\n")


@pytest.mark.parametrize("kind", sorted(TINY))
def test_tiny_stores(
    kind: str,
    tiny: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, foreign = tiny(kind)
    bench = Bench(store, tmp_path / "bench")
    name = min(p.name for p in store.glob("sub-*.h5"))
    every = {
        "no fault": [Fault("append", name)] * 3,
        "bit flips": flips(store, 100, 1),
        **whole(store, 3, 2, foreign),
    }
    bench.run_all(every)
    assert bench.counts["no fault"] == {"harmless": 3}
    tell(capsys, f"tiny {kind}", bench.counts)
    no_lies(bench)
    assert sum(bench.counts.values(), Counter())["raised"] > 100


def test_the_sample(sample_store: Store, tmp_path: Path) -> None:
    bench = Bench(sample_store.path, tmp_path / "bench")
    counts = bench.run("bit flips", flips(sample_store.path, 60, 3))
    no_lies(bench)
    assert counts["raised"] > 40


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_faults(
    sample_store: Store,
    tiny: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare("sample:haxby2001", tmp_path / "again", PrepareConfig(space="native"))
    total: Counter[str] = Counter()
    for name in ("sample", *TINY):
        pair = (sample_store.path, tmp_path / "again") if name == "sample" else tiny(name)
        bench = Bench(pair[0], tmp_path / f"bench-{name}")
        number = 1200 if name == "sample" else 700
        bench.run_all({"bit flips": flips(pair[0], number, 5), **whole(pair[0], 25, 6, pair[1])})
        tell(capsys, f"store {name}", bench.counts)
        no_lies(bench)
        total += bench.counts["bit flips"]
        for path in tmp_path.glob("one"), tmp_path.glob("two"), tmp_path.glob("bids"):
            for folder in path:
                shutil.rmtree(folder)
    assert total.total() >= 3000


# --- the bench itself -----------------------------------------------------------------------------


def test_the_bench_sees_silence_crashes_and_hangs(
    tiny: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that lies, dies or waits is found out: the counts above mean something."""
    store, _ = tiny("int8")
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "said = {'flip': ['silent', ''], 'append': ['raised', '']}\n"
        "for line in sys.stdin:\n"
        "    kind = json.loads(line)['kind']\n"
        "    if kind == 'zero': os.abort()\n"
        "    if kind == 'pipe': time.sleep(100)\n"
        "    print(json.dumps(said[kind]), flush=True)\n"
    )
    bench = Bench(store, tmp_path / "bench")
    monkeypatch.setattr(fault_tools, "__file__", str(script))
    monkeypatch.setattr(fault_tools, "PATIENCE", 1.0)
    kinds = ("append", "zero", "flip", "pipe", "append")
    counts = bench.run("planted", [Fault(kind, "sub-01.h5") for kind in kinds])
    assert counts == {"raised": 2, "crash": 1, "silent": 1, "hang": 1}
    assert [fault.kind for fault, _, _ in bench.bad] == ["zero", "flip", "pipe"]


def test_a_checksum_left_out_would_be_seen(
    tiny: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = tiny("int8")
    good = digest(store)
    reader = Store(store).open(Store(store).runs[0])
    (store / "sub-01.h5").chmod(0o644)
    fault_tools.flip(store / "sub-01.h5", Fault("flip", "", (reader._offset, 0)))
    assert fault_tools.judge(store, good, ["sub-01.h5"])[0] == "raised"
    expected = dict(zip(reader._seeds, reader._crc, strict=True))
    monkeypatch.setattr("fmrizoo.data.reader.frame_crc", lambda _, seed: expected.get(seed, -1))
    opened = Store(store)
    opened.open(opened.runs[0]).read_compact(0, 1)  # as planned, this one is blind
    monkeypatch.setattr(
        "fmrizoo.data.reader.RunReader.read_compact",
        lambda self, start, n, *_: fault_tools.np.zeros((n, self.row), self.dtype),
    )
    assert fault_tools.judge(store, good, ["sub-01.h5"])[0] == "silent"


# --- files that change under the reader -----------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_files_replaced_while_being_read(
    in_place: bool, tiny: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    one, two = tiny("int8")
    live = tmp_path / "live"
    shutil.copytree(one, live)
    for file in live.iterdir():
        file.chmod(0o644)
    good = [digest(one), digest(two)]
    assert good[0] != good[1]
    command = [sys.executable, "-W", "ignore", fault_tools.__file__, "watch", str(live), "3"]
    reader = subprocess.Popen([*command, *good], stdout=subprocess.PIPE, text=True)
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for source in (two, one):
                for name in ("sub-01.h5", "index.json", "sub-02.h5"):
                    if in_place:
                        shutil.copyfile(source / name, live / name)
                    else:
                        shutil.copyfile(source / name, tmp_path / "new")
                        (tmp_path / "new").rename(live / name)
                    stop.wait(0.003)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        said, _ = reader.communicate(timeout=120)
    finally:
        stop.set()
        writer.join()
    assert reader.returncode == 0
    counts = json.loads(said)
    assert counts.get("raised", 0) > 0 and "silent" not in counts


def test_an_open_reader_keeps_the_file_it_opened(
    tiny: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    one, two = tiny("float16")
    store = Store(one)
    reader = store.open(store.runs[0])
    before = reader.read_compact(0, reader.n_frames)
    shutil.copyfile(two / "sub-01.h5", tmp_path / "new")
    (tmp_path / "new").rename(one / "sub-01.h5")
    assert (reader.read_compact(0, reader.n_frames) == before).all()
