"""Random order without a list: the clip at any position of any epoch, computed from counters.

A Feistel network permutes ``0 … 4^h − 1`` (the smallest power of four that holds ``n``); results
outside the table are fed in again until they fall inside ("cycle walking"), which keeps it a
permutation of ``n``. Resuming at any step costs nothing, and no rank holds a shuffled list.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 6
_PARTS = 0x7061727473


def mix(value: int) -> int:
    """A 64-bit hash (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permuted(position: int, n: int, seed: int, epoch: int) -> int:
    """The element at ``position`` of epoch ``epoch``'s random order of ``0 … n − 1``.

    Raises:
        ValueError: position outside the epoch.
    """
    if not 0 <= position < n:
        raise ValueError(f"position {position} is not in 0..{n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    key = mix(mix(seed & _MASK) ^ (epoch & _MASK))
    while True:
        left, right = position >> half, position & low
        for r in range(_ROUNDS):
            left, right = right, left ^ (mix(key ^ mix((r << 40) ^ right)) & low)
        position = (left << half) | right
        if position < n:
            return position


def sample_seed(seed: int, position: int) -> int:
    """A non-negative int64 for the sample at a global position: seeds its masks and the like."""
    # Hashed twice: with one hash each, (seed, position) and (position, seed) would be the same.
    return mix(mix(mix(seed & _MASK)) ^ mix(position)) >> 1


def derived(seed: int, which: int) -> int:
    """Another seed for part ``which`` of what ``seed`` decides."""
    # A sum where permuted and sample_seed use xor, so that none of them meets another's keys.
    return mix(mix(seed & _MASK) + mix(which ^ _PARTS))


def uniform(seed: int, n: int, salt: int = 0) -> int:
    """A number in 0 … n − 1 that a sample's seed decides (``n`` far below 2⁶⁴)."""
    return derived(seed, salt) % n
