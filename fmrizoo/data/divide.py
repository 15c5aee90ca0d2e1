"""Subjects divided between nodes: ``data.divide=N``.

The training subjects are dealt to N portions with equally many clips, and the places of a batch to
the same N: portion 0 fills the first ``lanes / N`` places of every batch, and so on. Ranks take
neighbouring places, so with N nodes each node's ranks draw from one portion, and only that portion
need be near them (its page cache, ``data.stage``).

What is given up: clips of two subjects of one portion never compete for a place with those of
another; the order is another one for every N. What stays: the order is a function of the seed, the
batch size and N alone. Neither threads nor the number of ranks or nodes change which clips make up
a batch, any step can be resumed at once, and every clip comes exactly once an epoch.

That last point needs equal portions. Whole subjects, in a random order, are laid end to end and cut
into N stretches of ``n // N`` clips: up to N − 1 subjects lie in two portions. The ``n % N`` clips
at the end belong to no portion; portions take turns at them, one more draw in that epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

from fmrizoo.config import DataConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.draw import Order, Stretch, stretches_of
from fmrizoo.data.order import derived, permuted
from fmrizoo.errors import DataError

_DEAL = 0x6465616C  # salt of the seed that deals subjects


def divided(
    stretches: Sequence[Stretch], count: int, seed: int
) -> tuple[list[list[Stretch]], list[int]]:
    """``count`` portions with equally many clips, and the clips (fewer than ``count``) left over.

    Args:
        stretches: All clips.
        count: ≥ 1, at most as many as there are clips.
        seed: Of the order in which subjects are dealt.
    """
    own: dict[str, list[Stretch]] = {}
    for stretch in stretches:
        own.setdefault(stretch.subject, []).append(stretch)
    subjects = list(own.values())
    order = (subjects[permuted(k, len(subjects), seed, 0)] for k in range(len(subjects)))
    each = sum(s.count for s in stretches) // count
    portions: list[list[Stretch]] = [[] for _ in range(count)]
    over: list[int] = []
    portion, room = 0, each
    for stretch in (stretch for listed in order for stretch in listed):
        first, left = stretch.first, stretch.count
        while left and portion < count:
            taken = min(left, room)
            portions[portion].append(Stretch(first, taken, stretch.subject, stretch.data_set))
            first, left, room = first + taken, left - taken, room - taken
            if not room:
                portion, room = portion + 1, each
        over += range(first, first + left)
    return portions, over


class DividedOrder:
    """As :class:`fmrizoo.data.draw.Order`, with every place of the batch bound to a portion.

    Args:
        table: Which clips.
        config: With ``divide > 1``, without ``balance`` and weights.
        seed: Of the order.
        lanes: Places of a batch over all ranks; a multiple of ``divide``.

    Attributes:
        shares, lanes, mixed_visits: As those of an Order.

    Raises:
        DataError: fewer clips than portions, or places that cannot be divided.
    """

    def __init__(self, table: ClipTable, config: DataConfig, seed: int, lanes: int) -> None:
        self._count = config.divide
        if lanes % self._count:
            raise DataError(
                f"data.divide={self._count} divides the {lanes} places of a batch "
                f"(train.batch_size): make one a multiple of the other"
            )
        if len(table) < self._count:
            raise DataError(
                f"data.divide={self._count} needs as many training clips, got {len(table)}"
            )
        found = divided(stretches_of(table), self._count, derived(seed, _DEAL))
        self.portions, self._over = found
        self._places = lanes // self._count
        self._orders = [
            Order(table, config, derived(seed, k), self._places, own)
            for k, own in enumerate(self.portions)
        ]
        self._size, self._each = len(table), len(self._orders[0])
        self.lanes, self.mixed_visits = lanes, self._orders[0].mixed_visits
        self.shares = Order(table, config, seed, lanes).shares

    def __len__(self) -> int:
        """Clips in one epoch."""
        return self._size

    def clip(self, position: int) -> int:
        """The clip at a global position: step · lanes + place."""
        step, place = divmod(position, self.lanes)
        portion, k = divmod(place, self._places)
        draw = step * self._places + k
        # Portions draw n / N clips an epoch on average; which epoch this is, is off by one at most.
        epoch = draw * self._count // self._size
        while self.start(portion, epoch) > draw:
            epoch -= 1
        while self.start(portion, epoch + 1) <= draw:
            epoch += 1
        within = draw - self.start(portion, epoch)
        if within < self._each:
            return self._orders[portion].clip(epoch * self._each + within)
        return self._over[(portion - epoch * len(self._over)) % self._count]

    def start(self, portion: int, epoch: int) -> int:
        """Draws of a portion before an epoch: its own clips, and its turns at those left over.

        Turn ``t = 0, 1, …`` is portion ``t % N``'s; an epoch has as many as clips are left over.
        """
        turns = epoch * len(self._over)
        return epoch * self._each + (turns - portion + self._count - 1) // self._count

    def stretches(self, places: range) -> list[Stretch]:
        """The clips of all portions that some places of a batch draw from, but those left over."""
        wanted = sorted({place // self._places for place in places})
        return [stretch for portion in wanted for stretch in self.portions[portion]]
