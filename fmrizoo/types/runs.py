"""Names of runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fmrizoo.errors import DataError

# Between the name of a data set and a subject's label; no BIDS label can hold it.
_OF = ":"


@dataclass(frozen=True)
class RunKey:
    """BIDS identity of one run. ``str()`` gives the BIDS-like name used in splits and tables.

    Where several stores are read at once, the subject carries its data set's name: subject 001 of
    ``ukb`` is ``ukb:001``, its runs are ``sub-ukb:001_task-rest``.
    """

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

    @property
    def data_set(self) -> str:
        """Name of the data set that the subject is from; empty where it was not named."""
        return self.subject.partition(_OF)[0] if _OF in self.subject else ""

    @property
    def bare(self) -> RunKey:
        """The same run without its data set's name."""
        return replace(self, subject=self.subject.rpartition(_OF)[2])

    def within(self, data_set: str) -> RunKey:
        """The same run as one of ``data_set``."""
        return replace(self, subject=f"{data_set}{_OF}{self.subject}")
