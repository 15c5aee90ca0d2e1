"""Models that are built inside ``deepspeed.zero.Init()``, which takes parameters apart at once.

DeepSpeed is never imported here: where it has not been, nothing is partitioned.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ZERO = "deepspeed.runtime.zero.partition_parameters"


@contextmanager
def whole_modules() -> Iterator[None]:
    """Modules that are made inside keep their shapes, though this may be inside ``zero.Init()``."""
    zero: Any = sys.modules.get(_ZERO)
    if zero is None or zero.top_level_context is None:
        yield
        return
    zero.shutdown_init_context()
    try:
        yield
    finally:
        zero.restore_init_context()


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Partitioned parameters are whole inside; what rank 0 writes into them is kept on all ranks.

    A partitioned parameter has the shape (0,) and the attribute ``ds_id``; others are as they are.
    """
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return
    with sys.modules[_ZERO].GatheredParameters(parts, modifier_rank=0):
        yield
