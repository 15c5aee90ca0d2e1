"""verify names everything that is wrong; repair brings back the same bytes, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from fmrizoo.cli import app
from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.repair import repair
from fmrizoo.data.store import Store, read_index_body, write_index
from fmrizoo.data.verify import verify
from fmrizoo.errors import CorruptStoreError, DataError


@pytest.fixture
def store(tree: Any, tmp_path: Path) -> Path:
    """Three subjects, the first with two runs, and participants.tsv."""
    for subject, run in (("01", "1"), ("01", "2"), ("02", "1"), ("03", "1")):
        tree.add(subject, run, events="onset\tduration\ttrial_type\n2\t2\tface\n")
    (tree.root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\nsub-02\t31\n")
    prepare(tree.root, tmp_path / "s", PrepareConfig(space="native"))
    for file in (tmp_path / "s").glob("*.h5"):
        file.chmod(0o644)
    return tmp_path / "s"


def poke(file: Path, place: int, value: bytes) -> None:
    with open(file, "r+b") as handle:
        os.pwrite(handle.fileno(), value, place)


def hurt_frame(store: Path, run: str, *frames: int) -> None:
    reader = Store(store).open(run)
    for t in frames:
        poke(reader.path, reader._offset + t * reader.row, b"\x55\xaa")


def content(store: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in store.iterdir() if p.is_file()}


def values(store: Path) -> dict[str, np.ndarray]:
    opened = Store(store)
    return {r.name: opened.open(r).read(0, r.n_frames) for r in opened.runs}


def kinds(store: Path) -> list[tuple[str, str]]:
    return [(f.file, f.kind) for f in verify(store).findings]


def test_a_good_store(store: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    result = verify(store, 2, lambda *event: seen.append(event))
    assert result.findings == []
    assert (result.files, result.runs, result.frames) == (5, 4, 48)
    assert result.bytes == sum(p.stat().st_size for p in store.iterdir())
    assert [e[:2] for e in seen] == [(1, 3), (2, 3), (3, 3)]
    assert len({e[2] for e in seen}) == 3


def test_each_frame_is_read_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = os.preadv

    def count(descriptor: int, buffers: Any, offset: int) -> int:
        got = real(descriptor, buffers, offset)
        read.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, got))
        return got

    rows = {r.name: Store(store).open(r).row * r.n_frames for r in Store(store).runs}
    monkeypatch.setattr(os, "preadv", count)
    assert verify(store).findings == []
    assert sum(n for _, _, n in read) == sum(rows.values())
    assert len(read) == len(rows)  # one call for a run as small as these


def spoil_index(store: Path) -> None:
    poke(store / "index.json", 500, b"#")


def other_values(store: Path) -> None:
    body = read_index_body(store)
    body["runs"][0]["tr"] = 2.5
    write_index(store, body["runs"], "x")


def forget_a_run(store: Path) -> None:
    write_index(store, read_index_body(store)["runs"][1:], "x")


def unfinished(store: Path) -> None:
    with h5py.File(store / "sub-02.h5", "r+") as file:
        file.attrs["complete"] = np.uint8(0)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (spoil_index, [("index.json", "index")]),
        (other_values, [("sub-01.h5", "index")]),
        (forget_a_run, [("sub-01.h5", "index")]),
        (unfinished, [("sub-02.h5", "metadata")]),
        (lambda s: (s / "sub-02.h5").unlink(), [("sub-02.h5", "missing")]),
        (lambda s: shutil.copy(s / "sub-02.h5", s / "sub-09.h5"), [("sub-09.h5", "extra")]),
        (lambda s: (s / ".sub-02.h5.part").write_bytes(b""), [(".sub-02.h5.part", "extra")]),
        (lambda s: shutil.copy(s / "sub-03.h5", s / "sub-02.h5"), None),
        (lambda s: os.truncate(s / "sub-02.h5", 3000), [("sub-02.h5", "metadata")]),
        (
            lambda s: (s / "participants.tsv").write_text("participant_id\n"),
            [("participants.tsv", "participants")],
        ),
        (lambda s: (s / "participants.tsv").unlink(), [("participants.tsv", "participants")]),
        (lambda s: hurt_frame(s, "sub-02_task-rest_run-1", 3), [("sub-02.h5", "frames")]),
    ],
)
def test_what_is_wrong_is_found(
    damage: Callable[[Path], object], found: list[tuple[str, str]] | None, store: Path
) -> None:
    damage(store)
    if found is None:  # a foreign file has runs that the index lacks, and lacks those it lists
        found = [("sub-02.h5", "metadata"), ("sub-02.h5", "index")]
    assert kinds(store) == found
    for finding in verify(store).findings:
        assert str(store / finding.file) in finding.message and "\n" not in finding.message


def test_frames_are_counted(store: Path) -> None:
    hurt_frame(store, "sub-01_task-rest_run-2", *range(10))
    (finding,) = verify(store).findings
    assert finding.run == "sub-01_task-rest_run-2"
    assert "10 of 12 frames fail (0, 1, 2, 3, 4, 5, 6, 7, …)" in finding.message


def test_a_changed_table_of_people_is_said(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Store(store).participants is not None and not caplog.text
    (store / "participants.tsv").write_text("participant_id\tage\nsub-01\t99\n")
    assert Store(store).participants is not None
    assert "changed after prepare" in caplog.text


# --- repair ---------------------------------------------------------------------------------------


def several(store: Path) -> None:
    hurt_frame(store, "sub-01_task-rest_run-2", 3, 4)
    os.truncate(store / "sub-02.h5", 3000)
    (store / "participants.tsv").unlink()


@pytest.mark.parametrize("damage", [several, unfinished, spoil_index])
def test_repair_restores_the_values(
    damage: Callable[[Path], object], store: Path, tree: Any
) -> None:
    before, index, good = values(store), (store / "index.json").read_bytes(), content(store)
    damage(store)
    hurt = {name for name, data in good.items() if content(store).get(name) != data}
    inode = (store / "sub-03.h5").stat().st_ino
    planned = repair(store, tree.root, dry_run=True)
    assert not planned.refused and planned.after is None
    assert {n for n, data in good.items() if content(store).get(n) != data} == hurt
    report = repair(store, tree.root)
    assert {*report.restored, *report.others} == hurt == {*planned.restored, *planned.others}
    assert report.renewed == report.removed == []
    assert report.after is not None and not report.after.findings
    after = values(store)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert (store / "index.json").read_bytes() == index
    assert (store / "sub-03.h5").stat().st_ino == inode
    assert content(store).keys() == good.keys()


def test_nothing_to_repair(store: Path, tree: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in store.iterdir()}
    assert repair(store, tree.root).findings == []
    assert before == {p: p.stat().st_mtime_ns for p in store.iterdir()}


def test_leftovers_are_removed(store: Path, tree: Any) -> None:
    shutil.copy(store / "sub-02.h5", store / "sub-02@2.h5")
    (store / ".index.json.abc.part").write_text("{")
    report = repair(store, tree.root)
    assert report.removed == [".index.json.abc.part", "sub-02@2.h5"] and not report.restored
    shutil.copy(store / "sub-02.h5", store / "sub-77.h5")  # whose is it? not ours to delete
    with pytest.raises(CorruptStoreError, match=r"sub-77\.h5 is not in the index"):
        repair(store, tree.root)


@pytest.mark.parametrize("part", ["bold", "mask", "events", "sidecar", "gone"])
def test_another_source_is_refused(part: str, store: Path, tree: Any) -> None:
    several(store)
    before = content(store)
    func = tree.root / "sub-02/func"
    bold = func / "sub-02_task-rest_run-1_bold.nii.gz"
    changed: Path = bold
    if part == "bold":
        tree.add("02", "1", data=np.arange(1440).reshape(5, 6, 4, 12).astype(np.int16))
        changed = bold
    elif part == "mask":
        changed = next((tree.root / "derivatives").rglob("sub-02*mask.nii.gz"))
        mask = nib.load(changed)
        data = np.asarray(mask.dataobj).copy()
        data[0] = 1
        nib.save(nib.Nifti1Image(data, mask.affine), changed)
    elif part == "events":
        changed = func / "sub-02_task-rest_run-1_events.tsv"
        changed.write_text("onset\tduration\n1\t1\n")
    elif part == "sidecar":
        (func / "sub-02_task-rest_run-1_bold.json").write_text('{"RepetitionTime": 2.001}')
    else:
        bold.unlink()
    said = "has no run sub-02_task-rest_run-1" if part == "gone" else str(changed)
    planned = repair(store, tree.root, dry_run=True)
    assert any(said in line for line in planned.refused)
    with pytest.raises(DataError, match="nothing was written") as error:
        repair(store, tree.root)
    assert said in str(error.value)
    assert content(store) == before and not (store / ".staging").exists()


def test_recorded_settings_are_used(tmp_path: Path) -> None:
    settings = {"space": "native", "codec": "gzip", "dummy_scans": 2, "orientation": "LAS"}
    select = {"acquisition": "25mm", "run": "1|2"}
    prepare("sample:haxby2001", tmp_path / "s", PrepareConfig(**settings, select=select))
    before, index = values(tmp_path / "s"), (tmp_path / "s/index.json").read_bytes()
    (tmp_path / "s/sub-001.h5").unlink()
    assert repair(tmp_path / "s", "sample:haxby2001").restored == ["sub-001.h5"]
    after = values(tmp_path / "s")
    assert before.keys() == after.keys() and len(after) == 2
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert (tmp_path / "s/index.json").read_bytes() == index


def test_a_mask_file_is_asked_for(tree: Any, tmp_path: Path) -> None:
    tree.add()
    mask = tmp_path / "mask.nii.gz"
    shutil.copy(next((tree.root / "derivatives").rglob("*mask.nii.gz")), mask)
    prepare(tree.root, tmp_path / "s", PrepareConfig(space="native", mask=str(mask)))
    (tmp_path / "s/sub-01.h5").unlink()
    with pytest.raises(DataError, match="--mask"):
        repair(tmp_path / "s", tree.root)
    assert repair(tmp_path / "s", tree.root, mask=mask).restored == ["sub-01.h5"]


def test_other_checksums_get_another_identity(
    store: Path, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade: the same source gives other metadata, so the index is renewed."""
    old = {r.name: r.uuid for r in Store(store).runs}
    (store / "sub-01.h5").unlink()
    monkeypatch.setattr("fmrizoo.__version__", "99")
    report = repair(store, tree.root)
    assert report.renewed == ["sub-01@2.h5"] and not report.restored
    new = {r.name: r.uuid for r in Store(store).runs}
    assert {n for n in new if new[n] != old[n]} == {n for n in new if n.startswith("sub-01")}
    assert kinds(store) == []
    assert len(prepare(tree.root, store, PrepareConfig(space="native")).kept) == 4


def test_index_and_a_file_damaged_together(store: Path, tree: Any) -> None:
    spoil_index(store)
    hurt_frame_of_damaged = store / "sub-02.h5"
    os.truncate(hurt_frame_of_damaged, 3000)
    with pytest.raises(DataError, match=r"then prepare.*:\n.*sub-02\.h5"):
        repair(store, tree.root)
    prepare(tree.root, store, PrepareConfig(space="native"))
    assert kinds(store) == []


def lose_index(store: Path) -> None:
    (store / "index.json").unlink()


def cut_index(store: Path) -> None:
    os.truncate(store / "index.json", 700)


@pytest.mark.parametrize("damage", [lose_index, cut_index, spoil_index])
@pytest.mark.parametrize("hurt", [False, True])
def test_an_index_is_rebuilt_from_the_files(
    damage: Callable[[Path], None], hurt: bool, store: Path, tree: Any
) -> None:
    """Also where frames are damaged: their file's metadata still say what it holds."""
    before, whole = values(store), content(store)
    if hurt:
        hurt_frame(store, "sub-01_task-rest_run-2", 3, 7)
    damage(store)
    with pytest.raises(CorruptStoreError, match=rf"`fmrizoo repair {store} SOURCE` rebuilds it"):
        Store(store)
    found = verify(store)
    assert [f.kind for f in found.findings] == ["index"] + ["frames"] * hurt
    assert f"fmrizoo repair {store} SOURCE" in found.findings[0].message
    assert (found.runs, found.frames) == (4, 48)
    at_fault = content(store)
    planned = repair(store, tree.root, dry_run=True)
    assert planned.others == ["index.json"] and planned.restored == ["sub-01.h5"] * hurt
    assert content(store) == at_fault, "a dry run writes nothing"
    report = repair(store, tree.root)
    assert report.others == ["index.json"] and report.restored == ["sub-01.h5"] * hurt
    assert not report.renewed and kinds(store) == []
    assert content(store)["index.json"] == whole["index.json"]
    after = values(store)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert {n: b for n, b in content(store).items() if n != "sub-01.h5"} == {
        n: b for n, b in whole.items() if n != "sub-01.h5"
    }


def hurt_metadata(store: Path) -> str:
    with h5py.File(store / "sub-02.h5", "r+") as file:
        file["sub-02_task-rest_run-1/meta"][5] ^= 1
    return "sub-02.h5"


def cut_file(store: Path) -> str:
    os.truncate(store / "sub-03.h5", 3000)
    return "sub-03.h5"


def two_of_one(store: Path) -> str:
    shutil.copy(store / "sub-02.h5", store / "sub-02@2.h5")
    return "sub-02@2.h5"


def foreign(store: Path) -> str:
    with h5py.File(store / "sub-9.h5", "w") as file:
        file["fmri_data"] = np.zeros(3)
    return "sub-9.h5"


@pytest.mark.parametrize("spoil", [hurt_metadata, cut_file, two_of_one, foreign])
def test_a_lost_index_is_never_guessed(
    spoil: Callable[[Path], str], store: Path, tree: Any, tmp_path: Path
) -> None:
    before = values(store)
    lose_index(store)
    name = spoil(store)
    at_fault = content(store)
    for dry_run in (True, False):
        with pytest.raises(DataError, match=re.escape(name)):
            repair(store, tree.root, dry_run=dry_run)
        assert content(store) == at_fault
    # What the message says to do, word for word.
    shutil.move(store / name, tmp_path / name)
    repair(store, tree.root)
    prepare(tree.root, store, PrepareConfig(space="native"))
    assert kinds(store) == []
    after = values(store)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[run], after[run]) for run in before)


def test_a_folder_of_other_files_is_no_store(tmp_path: Path, tree: Any) -> None:
    foreign(tmp_path)
    for look in (verify, Store):
        with pytest.raises(DataError, match=r"is not a store \(it has no index\.json\)"):
            look(tmp_path)


# --- the command line -----------------------------------------------------------------------------


def test_commands(store: Path, tree: Any) -> None:
    run = CliRunner()
    good = run.invoke(app, ["verify", str(store)])
    assert good.exit_code == 0 and "all well" in good.output and "GB/s" in good.output
    assert good.output.count("\n") == 1
    several(store)
    bad = run.invoke(app, ["verify", str(store), "--jobs", "1"])
    assert bad.exit_code == 1 and "3 wrong" in bad.output
    facts = run.invoke(app, ["verify", str(store), "--json"])
    assert facts.exit_code == 1
    assert [f["file"] for f in json.loads(facts.output)["findings"]] == [
        "participants.tsv",
        "sub-01.h5",
        "sub-02.h5",
    ]
    planned = run.invoke(app, ["repair", str(store), str(tree.root), "--dry-run"])
    assert planned.exit_code == 0 and "prepare again: sub-02.h5" in planned.output
    done = run.invoke(app, ["repair", str(store), str(tree.root)])
    assert done.exit_code == 0 and "all well now, 48 frames verified" in done.output
    assert "nothing to repair" in run.invoke(app, ["repair", str(store), str(tree.root)]).output
