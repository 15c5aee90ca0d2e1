"""One rank runs the ZeRO stage that it is told: the stages themselves are tested here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fmrizoo.trainer import zero


@pytest.fixture(scope="module", autouse=True)
def stages_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "STAGES_ALONE", True)
        yield
