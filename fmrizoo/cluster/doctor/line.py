"""One line of ``fmrizoo doctor``."""

from __future__ import annotations

from dataclasses import dataclass

STATES = ("ok", "warning", "broken")


@dataclass(frozen=True)
class Line:
    """What one check found.

    Attributes:
        check: What was looked at.
        state: ``ok``, ``warning`` (works, but badly or not for everything) or ``broken``.
        found: The value.
        fix: One command or setting; empty where nothing is to be fixed.
    """

    check: str
    state: str
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"a check is one of {STATES}, got {self.state!r}")
        if (self.state == "ok") != (not self.fix):
            raise ValueError(f"{self.check} is {self.state} and its fix is {self.fix!r}")


def ok(check: str, found: str) -> Line:
    """Nothing to do."""
    return Line(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Line:
    """Works, but badly or not for everything."""
    return Line(check, "warning", found, fix)


def broken(check: str, found: str, fix: str) -> Line:
    """Does not work."""
    return Line(check, "broken", found, fix)
