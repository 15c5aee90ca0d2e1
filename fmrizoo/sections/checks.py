"""What the sections of a recipe check their own values with."""

from __future__ import annotations

from collections.abc import Sequence

from fmrizoo.errors import RecipeError
from fmrizoo.registry import suggest


def require(ok: bool, message: str) -> None:
    if not ok:
        raise RecipeError(message)


def one_of(key: str, value: str, known: Sequence[str]) -> None:
    require(value in known, f"{key}={value!r} is not known.{suggest(value, list(known))}")
