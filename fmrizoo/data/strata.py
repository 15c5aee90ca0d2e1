"""Folds with the same mix of classes in every part (``split.stratify``)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Sequence

from fmrizoo.config import SplitConfig
from fmrizoo.data.people import People, binned
from fmrizoo.errors import DataError

log = logging.getLogger(__name__)


def stratified(
    names: Sequence[str], subjects: dict[str, set[str]], people: People, config: SplitConfig
) -> tuple[list[str], list[str]]:
    """Test units of ``config.fold``, and the others in an order that mixes the classes evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    every = sorted(set().union(*subjects.values()))
    cells = []
    for name in config.stratify:
        found = people.column(name, every, "split.stratify")
        cells.append(binned([found[s] for s in every], config.bins))
    classes = dict(zip(every, map(" · ".join, zip(*cells, strict=True)), strict=True))
    # One sample for each subject in a unit; a session or run counts as its subject.
    pairs = [(u, s) for u in sorted(subjects) for s in sorted(subjects[u])]
    labels = [classes[s] for _, s in pairs]
    rare = sorted({c for c in labels if labels.count(c) < config.folds})
    if rare:
        log.warning(
            "split.stratify: %d of %d classes have fewer members than the %d folds (%s): not every "
            "part can have them",
            len(rare), len(set(labels)), config.folds, "; ".join(rare[:5]),
        )  # fmt: skip
    kept = [c if c not in rare else "rare" for c in labels]
    if kept.count("rare") < config.folds and len(set(kept)) > 1:
        common = max(sorted(set(kept) - {"rare"}), key=kept.count)
        kept = [common if c == "rare" else c for c in kept]
    folds = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parts = list(folds.split(kept, kept, [u for u, _ in pairs]))
    except (ValueError, UserWarning) as error:
        raise DataError(f"split.stratify={list(config.stratify)} cannot be kept: {error}") from None
    test = {pairs[i][0] for i in parts[config.fold][1]}
    if not all(len(own) for _, own in parts):
        raise DataError(
            f"split.stratify={list(config.stratify)}: the {len(subjects)} {config.by}(s) differ so "
            f"much in size that one of the {config.folds} folds has none: lower split.folds"
        )
    chosen = [u for u in names if u in test]
    return chosen, _interleaved([u for u in names if u not in test], subjects, classes)


def _interleaved(
    names: Sequence[str], subjects: dict[str, set[str]], classes: dict[str, str]
) -> list[str]:
    """``names`` so that every class is spread evenly; their order decides within a class."""
    own: dict[str, list[str]] = {}
    for name in names:
        members: Collection[str] = sorted(classes[s] for s in subjects[name])
        own.setdefault(max(members, key=list(members).count), []).append(name)
    place = {
        name: ((i + 0.5) / len(members), number)
        for number, (_, members) in enumerate(sorted(own.items()))
        for i, name in enumerate(members)
    }
    return sorted(names, key=lambda name: place[name])
