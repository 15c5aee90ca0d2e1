"""How alike two sets of features of the same clips are: CKA and RSA.

Linear CKA (Kornblith et al. 2019) with the unbiased estimator of HSIC (Song et al. 2012), averaged
over minibatches as in Nguyen et al. 2021; RSA as the Spearman correlation of distance matrices
(Kriegeskorte et al. 2008). Both ignore rotations and the overall scale of features; RSA with
correlation distances also each clip's mean and length.

Shapes: ``n`` clips, ``d`` features (of its own for every set).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmrizoo.errors import DataError

Array = NDArray[np.float64]

LEAST = 4  # clips that the unbiased estimator needs


def u_centred(gram: Array) -> Array:
    """``(n, n)`` Gram matrix, centred so that HSIC is a plain sum of products without bias.

    Off the diagonal ``K_ij − Σ_j K_ij / (n−2) − Σ_i K_ij / (n−2) + Σ K / ((n−1)(n−2))`` with the
    diagonal of K set to 0 before (Székely & Rizzo 2014); 0 on it.
    """
    n = len(gram)
    k = gram.copy()
    np.fill_diagonal(k, 0)
    rows = k.sum(1) / (n - 2)
    k += k.sum() / ((n - 1) * (n - 2)) - rows[:, None] - rows[None, :]
    np.fill_diagonal(k, 0)
    return k


class CKA:
    """Debiased linear CKA between every set of one side and every set of the other.

    Features come in minibatches of at least four clips; HSIC is averaged over them with weights
    ``n (n − 3)``, which gives the estimate of all clips at once where there is only one.

    Args:
        first, second: Number of sets on both sides.
    """

    def __init__(self, first: int, second: int) -> None:
        self._cross = np.zeros((first, second))
        self._first, self._second = np.zeros(first), np.zeros(second)

    def update(self, first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> None:
        """Add a minibatch: ``(n, d)`` of each set, the same clips in the same order.

        Raises:
            DataError: fewer than four clips, sets of different lengths, or NaN.
        """
        a, b = self._grams(first), self._grams(second)
        if len({len(g) for g in (*a, *b)}) != 1:
            raise DataError("CKA compares features of the same clips: the sets differ in length")
        self._cross += np.einsum("imn,jmn->ij", a, b)
        self._first += np.einsum("imn,imn->i", a, a)
        self._second += np.einsum("imn,imn->i", b, b)

    @staticmethod
    def _grams(sets: Sequence[ArrayLike]) -> Array:
        grams = []
        for values in sets:
            x = np.asarray(values, np.float64)
            if x.ndim != 2 or len(x) < LEAST or not np.isfinite(x).all():
                raise DataError(
                    f"CKA needs finite features (clips, d) of at least {LEAST} clips, got {x.shape}"
                )
            # The mean changes nothing in theory; in numbers a large one costs digits.
            x = x - x.mean(0)
            grams.append(u_centred(x @ x.T))
        return np.stack(grams)

    def result(self) -> Array:
        """``(first, second)``; NaN for a set that does not vary over clips. May be below 0."""
        scale = np.sqrt(np.outer(self._first, self._second))
        nothing = np.full_like(scale, np.nan)
        found: Array = np.divide(self._cross, scale, out=nothing, where=scale > 0)
        return found


def cka(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], minibatch: int | None = None
) -> Array:
    """:class:`CKA` of all clips, ``minibatch`` at a time (None: at once).

    A rest of fewer than four clips joins the minibatch before it.
    """
    a, b = ([np.asarray(v, np.float64) for v in sets] for sets in (first, second))
    if {len(v) for v in (*a, *b)} != {n := len(a[0])}:
        raise DataError("CKA compares features of the same clips: the sets differ in length")
    size = minibatch or n
    if size < LEAST:
        raise DataError(f"a minibatch of CKA has at least {LEAST} clips, got {size}")
    ends = [*range(size, n - LEAST + 1, size), n] if n > size else [n]
    found, start = CKA(len(a), len(b)), 0
    for end in ends:
        found.update([v[start:end] for v in a], [v[start:end] for v in b])
        start = end
    return found.result()


def distances(features: ArrayLike) -> Array:
    """``(n (n−1) / 2,)`` correlation distances ``1 − r`` between clips.

    Raises:
        DataError: fewer than two features, or a clip whose features are all equal.
    """
    x = np.asarray(features, np.float64)
    x = x - x.mean(1, keepdims=True)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if x.shape[1] < 2 or not (norm > 0).all():
        raise DataError("correlation distances need clips with features that are not all equal")
    x /= norm
    found: Array = 1 - (x @ x.T)[np.triu_indices(len(x), 1)]
    return found


def rsa(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Array:
    """``(first, second)`` Spearman correlations of distance matrices; NaN: all distances equal.

    Raises:
        DataError: fewer than three clips, sets of different lengths, or clips without distances.
    """
    from scipy.stats import rankdata

    a, b = ([rankdata(distances(v)) for v in sets] for sets in (first, second))
    if len({len(v) for v in (*a, *b)}) != 1 or len(a[0]) < 3:
        raise DataError("RSA compares features of the same clips, at least three")
    ranks = [np.stack(v) for v in (a, b)]
    ranks = [r - r.mean(1, keepdims=True) for r in ranks]
    scale = np.outer(*(np.linalg.norm(r, axis=1) for r in ranks))
    nothing = np.full_like(scale, np.nan)
    found: Array = np.divide(ranks[0] @ ranks[1].T, scale, out=nothing, where=scale > 0)
    return found


@dataclass(frozen=True)
class Similarity:
    """Stages of two models (or of one) against each other.

    Attributes:
        first, second: Names of the models.
        stages: Names of the stages of both.
        clips: How many were compared.
        pool: How features were pooled to vectors.
        cka, rsa: ``(stages of first, stages of second)``; None: a stage that does not vary.
        pretraining_loss: Of the pretrained encoder and of the fine-tuned one under the pretraining
            objective, where both exist.
    """

    first: str
    second: str
    stages: tuple[tuple[str, ...], tuple[str, ...]]
    clips: int
    pool: str
    cka: tuple[tuple[float | None, ...], ...]
    rsa: tuple[tuple[float | None, ...], ...]
    pretraining_loss: tuple[float, float] | None = None

    @property
    def per_stage(self) -> tuple[float | None, ...]:
        """CKA of each stage with the same stage of the other model."""
        return tuple(row[k] for k, row in enumerate(self.cka) if k < len(row))
