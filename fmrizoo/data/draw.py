"""Which clip comes at which position of the endless training sequence, from counters alone.

Without any option an epoch is one random order of all clips. Three options change what is drawn;
all stay functions of (seed, position), so that any step can be resumed at once and neither threads
nor world size change what comes:

``data.balance=subject``
    Subjects take turns: every ``S`` draws hold each of the ``S`` subjects once.
``data.stores`` with weights
    An epoch is shared out: every store has its quota of the epoch's positions.
``data.clips_per_visit=K``
    A run that is opened gives ``K`` clips before the next one. Positions are dealt to lanes (the
    places of a batch), so that a visit belongs to one rank; within a lane the clips of several
    visits are shuffled.

How often a clip comes: the clips of a *deck* (all clips; those of a store; those of a subject) come
once each before any comes again. So after any number of epochs two clips of one deck differ by at
most one, and with one deck every clip comes exactly once an epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np

from fmrizoo.config import DataConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.order import derived, permuted
from fmrizoo.errors import DataError

# Clips over all lanes that are shuffled among each other where a run gives several.
_MIXED = 64


@dataclass(frozen=True)
class Stretch:
    """Neighbouring clips of one run in the table."""

    first: int
    count: int
    subject: str
    data_set: str


class _Dealer(Protocol):
    def clip(self, draw: int) -> int:
        """The clip of draw 0, 1, 2, … without end."""
        ...


class _Deck:
    """Clips of several runs, all of them dealt once before any is dealt again.

    With ``visit > 1``, draws ``visit · v … visit · v + visit − 1`` are clips of one run. What a
    run has beyond a multiple of ``visit`` is dealt one by one at the end of the cycle.
    """

    def __init__(self, first: Sequence[int], count: Sequence[int], seed: int, visit: int) -> None:
        self._first, self._count = first, count
        self._seed, self._visit = seed, visit
        self._ends = list(accumulate(count))
        self.size = self._ends[-1]
        if visit > 1:
            self._visits = list(accumulate(c // visit for c in count))
            self._rests = list(accumulate(c % visit for c in count))

    @classmethod
    def of(cls, stretches: Sequence[Stretch], seed: int, visit: int) -> _Deck:
        """The clips of ``stretches``."""
        return cls([s.first for s in stretches], [s.count for s in stretches], seed, visit)

    def clip(self, draw: int) -> int:
        cycle, i = divmod(draw, self.size)
        if self._visit == 1:
            i = permuted(i, self.size, self._seed, cycle)
            run = bisect_right(self._ends, i)
            return self._first[run] + i - (self._ends[run] - self._count[run])
        whole = self._visits[-1] * self._visit
        if i < whole:
            v, k = divmod(i, self._visit)
            v = permuted(v, self._visits[-1], self._seed, cycle)
            run = bisect_right(self._visits, v)
            before = self._visits[run] - self._count[run] // self._visit
            i = (v - before) * self._visit + k
        else:
            i = permuted(i - whole, self.size - whole, derived(self._seed, 0), cycle)
            run = bisect_right(self._rests, i)
            rest = self._count[run] % self._visit
            i += self._count[run] - rest - (self._rests[run] - rest)
        # Which clips of the run share a visit changes from cycle to cycle.
        own = derived(self._seed, run + 1)
        return self._first[run] + permuted(i, self._count[run], own, cycle)


class _Turns:
    """Subjects take turns in a new random order each round, ``visit`` clips a turn."""

    def __init__(self, stretches: Sequence[Stretch], seed: int, visit: int) -> None:
        own: dict[str, list[Stretch]] = {}
        for stretch in stretches:
            own.setdefault(stretch.subject, []).append(stretch)
        self._decks = [
            _Deck.of(listed, derived(seed, k), visit) for k, listed in enumerate(own.values())
        ]
        self._seed, self._visit = seed, visit

    def __len__(self) -> int:
        return len(self._decks)

    def clip(self, draw: int) -> int:
        turn, k = divmod(draw, self._visit)
        turns, i = divmod(turn, len(self._decks))
        subject = permuted(i, len(self._decks), self._seed, turns)
        return self._decks[subject].clip(turns * self._visit + k)


@dataclass(frozen=True)
class Share:
    """What one store gives to an epoch.

    Attributes:
        data_set: Its name; empty for the only store.
        clips: In the table.
        draws: In one epoch.
    """

    data_set: str
    clips: int
    draws: int


class Order:
    """The clip at every position of the endless sequence of epochs.

    Args:
        table: Which clips.
        config: ``balance``, ``stores`` (weights) and ``clips_per_visit``.
        seed: Of the order.
        lanes: Places of a batch (over all ranks); matters with ``clips_per_visit > 1`` only.
        stretches: Only these clips of the table; None: all.

    Raises:
        DataError: a weighted store without a clip in the table, or one whose share is none.
    """

    def __init__(
        self,
        table: ClipTable,
        config: DataConfig,
        seed: int,
        lanes: int = 1,
        stretches: Sequence[Stretch] | None = None,
    ) -> None:
        self._table, self._given = table, stretches
        self._seed, self._visit = seed, config.clips_per_visit
        self._dealers: list[_Dealer] = []
        weights = {name: s.weight for name, s in config.stores.items() if s.weight is not None}
        if weights or config.balance == "subject":
            self._share_out(weights, config.balance == "subject")
        else:
            # One deck of everything: with tens of thousands of runs, names would cost a second.
            firsts, counts = _bounds(table)
            if stretches is not None:
                firsts, counts = [s.first for s in stretches], [s.count for s in stretches]
            self._size = sum(counts)
            self._quotas = [self._size]
            self._dealers.append(_Deck(firsts, counts, seed, self._visit))
        self._ends = list(accumulate(self._quotas))
        self.lanes = min(lanes, self._size)
        self.mixed_visits = max(2, -(-_MIXED // (self.lanes * self._visit)))

    def _share_out(self, weights: dict[str, float], turns: bool) -> None:
        """A dealer for each weighted store, or of all subjects in turn."""
        stretches = self._stretches()
        pools = _pools(stretches, weights)
        for k, own in enumerate(pools.values()):
            # The only pool keeps the seed itself: the order of runs from before there were pools.
            of = self._seed if len(pools) == 1 else derived(self._seed, k)
            self._dealers.append((_Turns if turns else _Deck.of)(own, of, self._visit))
        self._size = sum(s.count for s in stretches)
        if turns and len(pools) == 1:
            turn = self._visit * len({s.subject for s in stretches})
            self._size = turn * max(1, round(self._size / turn))
        self._quotas = _quotas(self._size, [weights.get(name, 1.0) for name in pools])
        self.shares = _shares(stretches, pools, self._quotas, turns)

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """What each store gives to an epoch."""
        stretches = self._stretches()
        return _shares(stretches, _pools(stretches, {}), self._quotas, False)

    def _stretches(self) -> Sequence[Stretch]:
        return stretches_of(self._table) if self._given is None else self._given

    def __len__(self) -> int:
        """Positions in one epoch."""
        return self._size

    def clip(self, position: int) -> int:
        """The clip at a global position."""
        epoch, within = divmod(position, self._size)
        if self._visit > 1:
            within = self._laned(within, epoch)
        elif len(self._dealers) > 1:
            within = permuted(within, self._size, self._seed, epoch)
        pool = bisect_right(self._ends, within)
        own = within - (self._ends[pool] - self._quotas[pool])
        return self._dealers[pool].clip(epoch * self._quotas[pool] + own)

    def _laned(self, within: int, epoch: int) -> int:
        """Lane ``l`` reads its own part of the epoch's draws, shuffled in blocks of a few visits.

        Positions ``l, l + lanes, …`` are lane ``l``; parts differ in length by one at most.
        """
        row, lane = divmod(within, self.lanes)
        length, longer = divmod(self._size, self.lanes)
        start = lane * length + min(lane, longer)
        length += lane < longer
        block = self._visit * self.mixed_visits
        number, place = divmod(row, block)
        size = min(block, length - number * block)
        own = derived(derived(self._seed, lane), number)
        return start + number * block + permuted(place, size, own, epoch)


def _bounds(table: ClipTable) -> tuple[list[int], list[int]]:
    """First clip, and number of clips, of each stretch of neighbouring clips of one run."""
    first = np.r_[0, np.flatnonzero(table.run[1:] != table.run[:-1]) + 1]
    return first.tolist(), np.diff(first, append=len(table)).tolist()


def stretches_of(table: ClipTable) -> list[Stretch]:
    """The runs of a table, in its order."""
    found = []
    for first, count in zip(*_bounds(table), strict=True):
        key = table.runs[table.run[first]].key
        found.append(Stretch(first, count, key.subject, key.data_set))
    return found


def _pools(stretches: Sequence[Stretch], weights: dict[str, float]) -> dict[str, Sequence[Stretch]]:
    """What is dealt on its own: each weighted store, or everything together."""
    if not weights:
        return {"": stretches}
    pools = {name: [s for s in stretches if s.data_set == name] for name in weights}
    for name, own in pools.items():
        if not own:
            raise DataError(
                f"data.stores.{name} has weight {weights[name]:g} but no clip to train on: choose "
                "another split, or leave it out"
            )
    return dict(pools)


def _quotas(size: int, weights: Sequence[float]) -> list[int]:
    """``size`` shared out by weight: whole numbers, each within one of its exact share."""
    exact = [size * w / sum(weights) for w in weights]
    quotas = [int(e) for e in exact]
    behind = sorted(range(len(exact)), key=lambda k: quotas[k] - exact[k])
    for k in behind[: size - sum(quotas)]:
        quotas[k] += 1
    return quotas


def _shares(
    stretches: Sequence[Stretch],
    pools: dict[str, Sequence[Stretch]],
    quotas: Sequence[int],
    turns: bool,
) -> tuple[Share, ...]:
    if len(pools) > 1:
        found = [
            Share(name, sum(s.count for s in own), quota)
            for (name, own), quota in zip(pools.items(), quotas, strict=True)
        ]
        for share in found:
            if not share.draws:
                raise DataError(
                    f"the weight of data.stores.{share.data_set} gives it none of the "
                    f"{sum(quotas)} clips of an epoch: raise it, or leave the store out"
                )
        return tuple(found)
    clips: dict[str, int] = {}
    subjects: dict[str, set[str]] = {}
    for s in stretches:
        clips[s.data_set] = clips.get(s.data_set, 0) + s.count
        subjects.setdefault(s.data_set, set()).add(s.subject)
    # Together in one pool: by clips, or by subjects where these take turns.
    size = {name: len(subjects[name]) if turns else n for name, n in clips.items()}
    total = sum(size.values())
    return tuple(Share(name, clips[name], quotas[0] * size[name] // total) for name in clips)
