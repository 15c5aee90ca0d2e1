"""Is a row better than chance? Labels permuted where they are exchangeable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.predictions import Prediction
from fmrizoo.evaluate.resampled import (
    CELLS,
    TIE,
    Array,
    Tables,
    distinct,
    plain,
    together,
    widening,
)


def permutation_p(
    tables: Tables, kind: str, metric: str, *, draws: int = 1000, seed: int = 0
) -> float | None:
    """One-sided p that the row is no better than chance: labels permuted, the metric recomputed.

    Labels move between things that are exchangeable if there is no effect: events within their run;
    whole runs within a subject where a run has one label; whole subjects within a fold where a
    subject has one label (traits). A unit gets the same label in the tables of all seeds, whose
    predictions are alike. p = (b + 1) / (m + 1) (Phipson & Smyth 2010, Stat. Appl. Genet. Mol.
    Biol. 9:39). Over several folds permuted scores lie √2 times farther from their mean: see
    :func:`fmrizoo.evaluate.resampled.widening`.

    The models are not trained again, so p speaks about these predictions: could labels that have
    nothing to do with them score as high? ``docs/evaluation.md`` says when to train again.

    Returns:
        None where the metric is undefined or no label can move.
    """
    kept = [table for table in tables if table]
    if not kept or (seen := plain(kept, kind, metric)) is None:
        return None
    items, blocks = _exchangeable(kept)
    if all(len({label for _, label in own}) < 2 for own in blocks.values()):
        return None
    sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
    rng, found = np.random.default_rng(seed), []
    step = max(1, CELLS // max(map(len, kept)))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        moved: dict[str, Array] = {}
        for own in blocks.values():
            labels = np.array([label for _, label in own], dtype=np.float64)
            drawn = rng.permuted(np.tile(labels, (size, 1)), axis=1)
            moved.update((item, drawn[:, i]) for i, (item, _) in enumerate(own))
        targets = [np.stack([moved[items[p.unit]] for p in t], axis=1) for t in kept]
        weights = [np.ones((1, len(t))) for t in kept]
        values = together(kept, kind, metric, weights, targets)
        found.append(sign * values[np.isfinite(values)])
    permuted = np.concatenate(found)
    permuted = permuted.mean() + widening(kept) * (permuted - permuted.mean())
    above = int((permuted >= sign * seen - TIE * max(1.0, abs(seen))).sum())
    return (above + 1) / (len(permuted) + 1)


def _exchangeable(tables: Tables) -> tuple[dict[str, str], dict[str, list[tuple[str, float]]]]:
    """Unit → the item that carries its label; block → its items with their labels."""
    units = distinct(tables)

    def varies(by: Callable[[Prediction], str]) -> bool:
        labels: dict[str, float] = {}
        return any(labels.setdefault(by(p), p.target) != p.target for p in units.values())

    if varies(lambda p: f"{p.subject}\t{p.run}"):
        items = {u: f"{p.subject}\t{p.run}\t{u}" for u, p in units.items()}
        within = {u: f"{p.subject}\t{p.run}" for u, p in units.items()}
    elif varies(lambda p: p.subject):
        items = {u: f"{p.subject}\t{p.run}" for u, p in units.items()}
        within = {u: p.subject for u, p in units.items()}
    else:
        items = {u: p.subject for u, p in units.items()}
        within = dict.fromkeys(units, "")
    folds = _folds(tables, items)
    blocks: dict[str, dict[str, float]] = {}
    for u, p in units.items():
        blocks.setdefault(f"{folds[items[u]]}\t{within[u]}", {})[items[u]] = p.target
    return items, {name: list(own.items()) for name, own in blocks.items()}


def _folds(tables: Tables, items: dict[str, str]) -> dict[str, int]:
    """Item → its fold. Tables that share items are one: those of other seeds; in repeated k-fold,
    where every fold of one repetition overlaps some of another, all."""
    fold: dict[str, int] = {}
    for number, table in enumerate(tables):
        own = {items[p.unit] for p in table}
        met = {fold[item] for item in own if item in fold}
        fold = {item: number if f in met else f for item, f in fold.items()}
        fold |= dict.fromkeys(own, number)
    return fold
