"""Name → (factory, config dataclass) tables for backbones, objectives and heads."""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from fmrizoo.errors import MissingExtraError, RecipeError

T = TypeVar("T", bound=Callable[..., Any])


def suggest(name: str, known: list[str], where: str | None = None) -> str:
    """The tail of an error message: the nearest known name, then all of them, or ``where``."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if where is not None:
        return f"{hint} {where}"
    return f"{hint} Available: {', '.join(sorted(known)) or 'none'}."


@dataclass(frozen=True)
class Entry:
    """One registered component: how to build it, its config schema, and what it needs installed."""

    name: str
    factory: Any  # called with the config; usually the component's class
    config: type
    requires: tuple[str, ...] = ()
    extra: str | None = None

    @property
    def missing(self) -> list[str]:
        """Packages of ``requires`` that are not installed here."""
        return [r for r in self.requires if importlib.util.find_spec(r) is None]

    @property
    def summary(self) -> str:
        """First line of the config's docstring."""
        return (self.config.__doc__ or "").strip().splitlines()[0]


class Registry:
    """A table of components of one ``kind`` (the word used in messages)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(
        self,
        name: str,
        config: type,
        *,
        requires: tuple[str, ...] = (),
        extra: str | None = None,
    ) -> Callable[[T], T]:
        """Decorator: add ``factory(config, **context)`` under ``name``.

        Args:
            name: What recipes call it.
            config: Dataclass with a ``name`` field; the schema of its recipe section.
            requires: Importable packages that building it needs.
            extra: The pip extra that installs them.

        Raises:
            TypeError: ``config`` is no dataclass.
            ValueError: the name is taken by a factory of another source location.
        """
        if not is_dataclass(config):
            raise TypeError(f"{self.kind} {name!r}: config must be a dataclass, got {config!r}")

        def decorator(factory: T) -> T:
            old = self._entries.get(name)
            where = (factory.__module__, factory.__qualname__)
            # A notebook cell run twice defines the same thing again: no clash.
            if old and (old.factory.__module__, old.factory.__qualname__) != where:
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by "
                    f"{old.factory.__module__}.{old.factory.__qualname__}"
                )
            self._entries[name] = Entry(name, factory, config, requires, extra)
            return factory

        return decorator

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise RecipeError(f"unknown {self.kind} {name!r}.{suggest(name, list(self._entries))}")
        return self._entries[name]

    def list(self, pattern: str = "*", *, installed: bool = False) -> list[str]:
        """Sorted names matching a shell pattern; ``installed``: only what can be built here."""
        return sorted(
            name
            for name, entry in self._entries.items()
            if fnmatch.fnmatch(name, pattern) and not (installed and entry.missing)
        )

    def build(self, config: Any, **context: Any) -> Any:
        """Build the component that ``config`` (an instance of its dataclass) names.

        Raises:
            MissingExtraError: a package it requires is not installed.
        """
        entry = self[config.name]
        if entry.missing:
            target = f"'fmrizoo[{entry.extra}]'" if entry.extra else " ".join(entry.missing)
            raise MissingExtraError(
                f"{self.kind} {entry.name!r} needs {', '.join(entry.missing)}: pip install {target}"
            )
        return entry.factory(config, **context)


BACKBONES = Registry("backbone")
OBJECTIVES = Registry("objective")
HEADS = Registry("head")
register_backbone = BACKBONES.register
register_objective = OBJECTIVES.register
register_head = HEADS.register
