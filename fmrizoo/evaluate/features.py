"""Label-free features of a clip for the baselines: whitened components, parcels, connectivity.

Shapes: ``v`` in-brain voxels, ``p`` parcels, ``t`` frames, ``k`` components, ``b`` clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fmrizoo.errors import DataError

Array = NDArray[np.float64]
MAX_COMPONENTS = 120
MAX_PARCELS = 100
MAX_TANGENT = 500  # training series whose geometric mean is taken
MIN_FRAMES, MIN_PARCELS = 8, 3  # of a correlation matrix that is worth the name


def parcels(mask: NDArray[np.bool_], at_most: int = MAX_PARCELS) -> NDArray[np.float64]:
    """Cut the brain into cubes of voxels, without looking at any data.

    The cube's side is the smallest whole number of voxels that leaves at most ``at_most`` cubes;
    cubes cut by the brain's edge are kept if they hold a quarter of the largest one's voxels.

    Args:
        mask: ``(x, y, z)`` brain.

    Returns:
        ``(p, v)`` weights; each row averages one cube's voxels (``v`` in C order of the mask).
    """
    where = np.argwhere(mask)
    if not len(where):
        raise DataError("the brain mask is empty: no parcel can be cut from it")
    where = where - where.min(0)
    for side in range(1, int(where.max()) + 2):
        _, label, size = np.unique(where // side, axis=0, return_inverse=True, return_counts=True)
        if len(size) <= at_most:
            break
    kept = np.flatnonzero(size * 4 >= size.max())
    weights = (label.reshape(-1)[None] == kept[:, None]).astype(np.float64)
    return cast(Array, weights / weights.sum(1, keepdims=True))


def connectivity(series: NDArray[Any]) -> Array:
    """``(b, p, t)`` parcel time courses → ``(b, p (p-1) / 2)`` Fisher z of their correlations.

    A parcel that does not vary within the clip has correlation 0 with all others.
    """
    x = series - series.mean(-1, keepdims=True, dtype=np.float64)
    norm = np.sqrt((x**2).sum(-1, keepdims=True))
    x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 1e-12)
    r = np.einsum("bpt,bqt->bpq", x, x)
    rows, columns = np.triu_indices(series.shape[1], k=1)
    # A perfect correlation has no finite Fisher z.
    return cast(Array, np.arctanh(np.clip(r[:, rows, columns], -0.999, 0.999)))


class Tangent:
    """Connectivity in tangent space (Varoquaux et al. 2010, MICCAI), by nilearn.

    Covariances are shrunk after Ledoit & Wolf (2004) and mapped to the tangent space at their
    geometric mean over the training series. Correlations live on a curved space; there they can be
    subtracted and averaged.
    """

    def __init__(self) -> None:
        from nilearn.connectome import ConnectivityMeasure
        from sklearn.covariance import LedoitWolf

        shrunk = LedoitWolf(store_precision=False)
        # Series are scaled by `_unit`: nilearn's own way to ask for it changes with its version.
        self._measure: Any = ConnectivityMeasure(
            cov_estimator=shrunk, kind="tangent", vectorize=True, standardize=False
        )

    def fit(self, series: Sequence[NDArray[Any]]) -> Tangent:
        """The geometric mean of ``(p, t)`` series, of at most ``MAX_TANGENT`` at even distances.

        Raises:
            ValueError: a covariance that cannot be inverted.
        """
        step = -(-len(series) // MAX_TANGENT)
        self._measure.fit([_unit(x) for x in series[::step]])
        return self

    def __call__(self, series: Sequence[NDArray[Any]]) -> Array:
        """``(n, p (p + 1) / 2)``.

        Raises:
            ValueError: a covariance that cannot be inverted.
        """
        return np.asarray(self._measure.transform([_unit(x) for x in series]), dtype=np.float64)


def _unit(series: NDArray[Any]) -> Array:
    """``(p, t)`` → ``(t, p)`` with mean 0 and unit variance over time; 0 where nothing varies."""
    x = series - series.mean(-1, keepdims=True, dtype=np.float64)
    scale = x.std(-1, keepdims=True)
    return cast(Array, np.divide(x, scale, out=np.zeros_like(x), where=scale > 1e-12).T)


@dataclass(frozen=True)
class Whitening:
    """Principal components of frames, scaled to unit variance on the frames they were fitted on.

    Attributes:
        mean: ``(v,)``.
        components: ``(v, k)``, already divided by the components' s.d.
        explained: Share of the frames' variance that the components hold.
    """

    mean: Array
    components: Array
    explained: float

    def __call__(self, x: NDArray[Any]) -> Array:
        """``(n, v)`` → ``(n, k)``."""
        return (x - self.mean) @ self.components


def fit_whitening(frames: NDArray[Any], seed: int = 0, at_most: int = MAX_COMPONENTS) -> Whitening:
    """Fit on ``frames (n, v)`` without labels.

    Keeps ``at_most`` components or as many as frames and voxels allow; components with less than
    1e-6 of the first one's variance are noise of rounding and are left out.
    """
    from sklearn.decomposition import PCA

    k = min(at_most, frames.shape[0] - 1, frames.shape[1])
    if k < 1:
        raise DataError(f"whitening needs at least two frames, got {frames.shape[0]}")
    pca = PCA(k, random_state=seed).fit(frames)
    variance = pca.explained_variance_
    kept = variance > 1e-6 * max(float(variance[0]), 1e-30)
    if not kept.any():
        raise DataError("the training frames do not vary: there is nothing to whiten")
    scaled = pca.components_[kept].T / np.sqrt(variance[kept])
    return Whitening(pca.mean_, scaled, float(pca.explained_variance_ratio_[kept].sum()))
