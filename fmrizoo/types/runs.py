"""Names of runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from fmrizoo.errors import DataError


@dataclass(frozen=True)
class RunKey:
    """BIDS identity of one run. ``str()`` gives the BIDS-like name used in splits and tables."""

    subject: str
    session: str = ""
    task: str = ""
    acquisition: str = ""
    run: str = ""
    extra: tuple[tuple[str, str], ...] = field(default=())

    def __str__(self) -> str:
        parts = [("sub", self.subject), ("ses", self.session), ("task", self.task)]
        parts += [("acq", self.acquisition), ("run", self.run), *self.extra]
        return "_".join(f"{k}-{v}" for k, v in parts if v)

    @classmethod
    def parse(cls, name: str) -> RunKey:
        """Inverse of ``str()``.

        Raises:
            DataError: ``name`` is not made of ``key-value`` pairs with a subject.
        """
        pairs = [part.partition("-") for part in name.split("_")]
        found = {key: value for key, _, value in pairs}
        if not all(value for _, _, value in pairs) or "sub" not in found:
            raise DataError(f"{name!r} is no run name of the form sub-01_task-rest_run-01")
        known = {"ses": "session", "task": "task", "acq": "acquisition", "run": "run"}
        fields_ = {known[k]: v for k, v in found.items() if k in known}
        extra = tuple((k, v) for k, v in found.items() if k not in known and k != "sub")
        return cls(found["sub"], extra=extra, **fields_)
