"""Arrows between the rooms point down only, and `import fmrizoo` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {
    4: ("cli", "__main__", "cluster", "report", "pipeline", "inspection", "screens", "sklearn"),
    3: ("trainer", "evaluate", "analysis", "forecast"),
    2: ("heads", "objectives", "data", "model", "weights", "zoo"),
    1: ("backbones",),
    0: ("config", "sections", "registry", "types", "layers", "errors", "files", "mup"),
}
LEVEL = {room: level for level, rooms in LEVELS.items() for room in rooms}
# Rooms of one level, or an arrow down, that must not meet all the same.
STRANGERS = {
    "objectives": {"backbones", "heads", "data", "weights", "zoo", "model"},
    "heads": {"backbones", "objectives", "data", "weights", "zoo", "model"},
    "data": {"backbones", "objectives", "heads", "weights", "zoo", "model"},
    "model": {"backbones", "objectives", "heads", "data", "weights", "zoo"},
    "layers": {"config", "sections", "registry"},
}
# Reading an exported model needs the trainer's file format, when a function asks for it.
LAZY = {("zoo", "fmrizoo.trainer.export"), ("weights", "fmrizoo.trainer.export")}
# Parts of a backbone in files of their own; a backbone imports no other backbone.
PARTS = {
    f"fmrizoo.backbones.{name}" for name in ("ssd", "mamba2", "mamba2_slices", "mamba2_kernels")
}
TOP = ("backbones", "objectives", "recipes")


@cache
def sources() -> dict[str, str]:
    """Module name → source of everything in the package."""
    found = {}
    for folder in ("fmrizoo", *TOP):
        for path in (ROOT / folder).rglob("*.py"):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            name = ".".join(parts if parts[0] == "fmrizoo" else ["fmrizoo", *parts])
            found[name] = path.read_text(encoding="utf-8")
    return found


def room(module: str) -> str:
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else ""


@cache
def statements(text: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement, and whether it is inside a function."""
    tree = ast.parse(text)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    return [
        (node, id(node) in inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def imports(module: str, text: str, modules: set[str]) -> Iterator[tuple[str, bool]]:
    """(imported fmrizoo module, imported inside a function) for every import statement."""
    for node, lazy in statements(text):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                own = module.split(".")[: -node.level]
                base = ".".join([*own, base] if base else own)
            full = [f"{base}.{alias.name}" for alias in node.names]
            names = [n if n in modules or f"{n}.__init__" in modules else base for n in full]
        for name in names:
            if name.split(".")[0] == "fmrizoo":
                yield name, lazy


def violations(files: Mapping[str, str]) -> list[str]:
    """Every import that points up, or meets a room it must not know."""
    wrong, modules = [], set(files)
    for module, text in files.items():
        here = room(module)
        if here in ("", "__init__", "recipes"):  # the lazy front door, and no code
            continue
        for name, lazy in imports(module, text, modules):
            there = room(name)
            if there in ("", "__init__"):
                continue
            if there == here:
                if here == "backbones" and not module.endswith("__init__") and name not in PARTS:
                    wrong.append(f"{module} imports its sibling {name}")
                continue
            if LEVEL[there] > LEVEL[here] and not (lazy and (here, name) in LAZY):
                wrong.append(f"{module} imports {name}, which is above it")
            elif there in STRANGERS.get(here, ()):
                wrong.append(f"{module} must not know {name}")
    return wrong


def test_every_room_has_a_level() -> None:
    rooms = {room(name) for name in sources()} - {"", "__init__", "recipes"}
    assert rooms == set(LEVEL)


def test_arrows_point_down_only() -> None:
    files = sources()
    assert len(files) > 40
    assert not violations(files)


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("fmrizoo.data.store", "from fmrizoo.trainer.loop import train", "above"),
        ("fmrizoo.data.store", "def f():\n    import fmrizoo.evaluate.metrics", "above"),
        ("fmrizoo.data.store", "from fmrizoo import pipeline", "above"),
        ("fmrizoo.data.store", "from ..cli import app", "above"),
        ("fmrizoo.types", "from fmrizoo.backbones import Swin4D", "above"),
        ("fmrizoo.layers.mlp", "from . import patches\nfrom .. import model", "above"),
        ("fmrizoo.trainer.loop", "from fmrizoo.report.html import write_report", "above"),
        ("fmrizoo.zoo", "from fmrizoo.trainer.export import read_model", "above"),
        ("fmrizoo.zoo", "def f():\n    from fmrizoo.trainer.loop import train", "above"),
        ("fmrizoo.objectives.simmim", "from fmrizoo.backbones.swin4d import Swin4D", "not know"),
        ("fmrizoo.heads.linear", "from fmrizoo.data.store import Store", "not know"),
        ("fmrizoo.backbones.other", "from fmrizoo.backbones.swin4d import Swin4D", "sibling"),
        (
            "fmrizoo.backbones.swin4d",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fmrizoo.data.clips",
            "above",
        ),
    ],
)
def test_a_planted_arrow_is_caught(module: str, line: str, said: str) -> None:
    (found,) = violations({**sources(), module: line})
    assert found.startswith(module) and said in found


def test_the_allowed_late_import_is_allowed() -> None:
    late = "def f():\n    from fmrizoo.trainer.export import read_model"
    assert not violations({**sources(), "fmrizoo.zoo": late, "fmrizoo.weights.swift": late})


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_import_fmrizoo_loads_nothing_heavy() -> None:
    heavy = "torch deepspeed mamba_ssm nilearn matplotlib sklearn scipy pandas h5py wandb"
    done = python(f"import fmrizoo, sys; print([m for m in '{heavy}'.split() if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_command_line_starts_without_torch() -> None:
    done = python("import fmrizoo.cli, sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_models_are_built_without_the_engine_or_the_data_libraries() -> None:
    heavy = "deepspeed mamba_ssm nilearn matplotlib sklearn"
    code = (
        "import fmrizoo, sys; fmrizoo.list_recipes(); fmrizoo.create_backbone('swin4d',"
        "img_size=[8,8,8,4], patch_size=[2,2,2,1], embed_dim=8, depths=[1,1], num_heads=[1,2]);"
        f"print([m for m in '{heavy}'.split() if m in sys.modules])"
    )
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", TOP)
def test_bare_folders_refuse_to_be_imported(name: str) -> None:
    done = python(f"import {name}")
    assert done.returncode == 1
    assert f"ImportError: import fmrizoo.{name}, not the bare folder" in done.stderr


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    import fmrizoo

    for name in fmrizoo.__all__:
        assert getattr(fmrizoo, name) is not None
    assert set(dir(fmrizoo)) == set(fmrizoo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'buidl'"):
        fmrizoo.buidl  # noqa: B018


def packages_on_disk() -> set[str]:
    found = set()
    for folder in ("fmrizoo", *TOP):
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "fmrizoo" else ("fmrizoo", *parts)))
    return found


def test_every_package_is_listed_in_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(packages_on_disk())
    assert set(settings["package-dir"]) == {"fmrizoo", *(f"fmrizoo.{name}" for name in TOP)}


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in ("fmrizoo", *TOP):
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path
