"""A model's predictions of labelled clips, one row per unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fmrizoo.data.batch import CompactBatch
from fmrizoo.errors import DataError
from fmrizoo.evaluate.predictions import Prediction, aggregate
from fmrizoo.types import Batch


@torch.no_grad()
def predict_units(
    predict: Callable[[Batch], Tensor],
    batches: Iterable[CompactBatch],
    device: torch.device | str = "cpu",
) -> list[Prediction]:
    """Run ``predict`` over labelled clips and average the outputs of each unit's clips.

    Args:
        predict: ``Batch`` → ``(b, classes)`` logits or ``(b, 1)`` values, such as
            :meth:`fmrizoo.model.DownstreamModel.predict`; put the model in ``eval()`` first.
        batches: Clips of one part of a split, each once (``Loader.epoch()``).

    Raises:
        DataError: clips without a target.
    """
    rows = []
    for compact in batches:
        batch = compact.to_batch(device)
        if batch.target is None:
            raise DataError(f"clips of run {batch.run[0]} have no label to be compared with")
        outputs = predict(batch).float().cpu().tolist()
        labels = batch.target.tolist()
        columns = (compact.units, batch.subject, batch.run, labels, outputs)
        rows += [
            Prediction(unit, subject, run, float(y), tuple(scores))
            for unit, subject, run, y, scores in zip(*columns, strict=True)
        ]
    return aggregate(rows)
