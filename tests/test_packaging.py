"""The wheel, installed where no checkout is near, does what the README says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("fmrizoo", "backbones", "objectives", "recipes", "pyproject.toml", "LICENSE", "README.md")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output; a failure shows both streams."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"COLUMNS": "200"}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: leftovers of earlier builds must neither help nor harm."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fresh environment in ``env/`` that has the wheel and borrows the rest."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=folder)
    python = folder / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    # The dependencies of this interpreter, after the environment's own packages. A line of a .pth
    # file adds a folder without reading the .pth files in it, so no editable fmrizoo comes along.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text("".join(f"{p}\n" for p in sorted(here)))
    return folder


def test_the_installed_package_is_used_and_bare_names_do_not_leak(elsewhere: Path) -> None:
    code = (
        "import fmrizoo, importlib.util as u; print(fmrizoo.__file__); "
        "import fmrizoo.backbones, fmrizoo.objectives, fmrizoo.recipes; "
        "print([n for n in ('backbones', 'objectives', 'recipes') if u.find_spec(n)]); "
        "print(fmrizoo.backbones.__file__)"
    )
    package, leaked, backbones = run("env/bin/python", "-c", code, cwd=elsewhere).splitlines()
    site = elsewhere / "env/lib"
    assert Path(package).is_relative_to(site) and Path(backbones).is_relative_to(site)
    assert Path(backbones).parent.parent == Path(package).parent
    assert leaked == "[]"


def test_zoo_and_recipes_are_there(elsewhere: Path) -> None:
    assert "swin4d" in run("env/bin/fmrizoo", "list", "backbones", cwd=elsewhere)
    listed = run("env/bin/fmrizoo", "list", "recipes", cwd=elsewhere)
    shipped = [p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "_base"]
    assert shipped
    for path in shipped:
        name = path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        assert f" {name} " in listed
    printed = run("env/bin/fmrizoo", "recipe", "swin4d_simmim", cwd=elsewhere)
    assert "name: simmim" in printed and "batch_size: 384" in printed


def test_the_sample_is_there_and_becomes_a_store(elsewhere: Path) -> None:
    command = ("prepare", "sample:haxby2001", "store", "prepare.space=native")
    said = run("env/bin/fmrizoo", *command, cwd=elsewhere)
    assert "18 runs prepared, 0 kept, 0 skipped" in said
    assert (elsewhere / "store/index.json").is_file()


def test_wheel_holds_the_package_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        notice = next(n for n in names if n.endswith("haxby2001/LICENCE-haxby2001.rst"))
        assert "Attribution-Share Alike 3.0" in archive.read(notice).decode()
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2 and "fmrizoo" in tops, tops
    for part in ("fmrizoo", "backbones", "objectives", "recipes"):
        for path in (ROOT / part).rglob("*"):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            inner = path.relative_to(ROOT).as_posix()
            assert (inner if part == "fmrizoo" else f"fmrizoo/{inner}") in names, inner
    info = next(t for t in tops if t.endswith(".dist-info"))
    licenses = [n for n in names if n.startswith(f"{info}/licenses/")]
    assert any(n.endswith("/LICENSE") for n in licenses)
    assert any(n.endswith("LICENCE-haxby2001.rst") for n in licenses)
