"""Shared by all tests: the sample's store, made once, and small settings for speed."""

from __future__ import annotations

import os

# Before torch is imported: waiting threads sleep, and DeepSpeed looks for no accelerator.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A console keeps the width that it finds when it is made; test runners set one.
os.environ.pop("COLUMNS", None)

from pathlib import Path

import pytest
import torch

# Small enough that every job of the pipeline takes seconds.
TINY = [
    "backbone.embed_dim=8",
    "backbone.num_heads=[1,2]",
    "train.steps=4",
    "train.batch_size=4",
    "train.validate_every=2",
]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test, fixtures of its module too, draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped sample, prepared."""
    from fmrizoo.config import PrepareConfig
    from fmrizoo.data.prepare import prepare

    store = tmp_path_factory.mktemp("sample") / "store"
    prepare("sample:haxby2001", store, PrepareConfig(space="native"))
    return store


@pytest.fixture
def tiny() -> list[str]:
    """Overrides that make the demo recipes run in seconds."""
    return list(TINY)
