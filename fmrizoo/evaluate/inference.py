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
        outputs = predict(batch).float().cpu().tolist()
        for sample, scores in zip(compact.samples, outputs, strict=True):
            # Not of the batch: there an age of 31.4 has been rounded to float32.
            if sample.target is None:
                raise DataError(f"a clip of run {sample.run} has no label to be compared with")
            row = (sample.unit, sample.subject, sample.run, float(sample.target), tuple(scores))
            rows.append(Prediction(*row))
    return aggregate(rows)
