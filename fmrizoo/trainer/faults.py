"""A loss or a gradient that is not finite: whose clips, a file of them, and what then.

``faults/step-000012-rank-00003.safetensors`` of the run folder holds a micro-batch as the model saw
it; :func:`read_dump` gives it back. Which rank a bad gradient came from cannot be told, for ranks
add theirs up; then those with the largest losses write theirs.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fmrizoo.config import TrainConfig
from fmrizoo.errors import CheckpointError, DivergedError
from fmrizoo.files import replace_content
from fmrizoo.trainer.device import rng_state, set_rng_state
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.inputs import CompactSamples
from fmrizoo.trainer.ranks import Ranks
from fmrizoo.types import Batch, ReadBatch

log = logging.getLogger(__name__)

FOLDER = "faults"
RANKS = 4  # ranks that write a file at one step
FILES = 16  # such files of a run, over all its starts
BYTES = 128 << 20  # of clips in a file; at least one clip is written


@dataclass(frozen=True)
class Seen:
    """A micro-batch that this step has used: what it came from, and its loss (scalar)."""

    samples: CompactSamples
    subjects: list[str]
    loss: Tensor


@dataclass(frozen=True)
class Dump:
    """What :func:`read_dump` finds.

    Attributes:
        batch: The clips, on the CPU in the dtype of training.
        what: ``loss`` or ``gradient``: what was not finite.
        step, rank: When and where.
        loss: Of the whole micro-batch, also of clips that were left out for their size.
        clip_loss: ``(b,)`` losses of the clips by themselves, without dropout; None at ZeRO 3,
            where no rank can compute alone.
    """

    batch: Batch | ReadBatch
    what: str
    step: int
    rank: int
    loss: float
    clip_loss: Tensor | None


@dataclass(frozen=True)
class _Found:
    """What a rank tells the others about its part of the step."""

    subjects: list[str]
    bad: bool
    largest: float


@dataclass(frozen=True)
class _Written:
    """What a rank tells the others about its file."""

    file: str = ""
    failed: str = ""
    suspects: tuple[str, ...] = ()


class NotFinite:
    """Answers what is not finite in a step: stops the run, or leaves the step out.

    Args:
        train: ``not_finite`` and ``max_skips`` decide.
        out: Run folder.
        engine, ranks: Of the run.
        model: What the engine trains.

    Attributes:
        skipped: Steps of the run that were left out.
    """

    def __init__(
        self, train: TrainConfig, out: Path, engine: Engine, ranks: Ranks, model: nn.Module
    ) -> None:
        self._train, self._out, self._engine, self._ranks = train, out, engine, ranks
        self._model = model
        self.skipped = 0
        self._kept: list[Tensor] = []

    def before_step(self) -> None:
        """Keep the running statistics, which the forward pass changes."""
        if self._train.not_finite == "skip":
            self._kept = [buffer.clone() for buffer in self._statistics()]

    def _statistics(self) -> list[Tensor]:
        norms = (nn.modules.batchnorm._NormBase,)  # all layers that keep running statistics
        return [b for m in self._model.modules() if isinstance(m, norms) for b in m.buffers(False)]

    def answer(self, what: str, step: int, seen: Sequence[Seen]) -> None:
        """Write the clips and say whose they are; every rank calls this.

        Args:
            what: ``loss`` (gradients are still to be dropped) or ``gradient`` (they have been).
            step: The step that was being taken.
            seen: Its micro-batches on this rank.

        Raises:
            DivergedError: unless the step is to be left out and may be.
        """
        losses = [float(one.loss) for one in seen]
        bad = [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
        worst = bad[0] if bad else max(range(len(seen)), key=losses.__getitem__)
        found = self._ranks.gathered(
            _Found(
                subjects=[name for one in seen for name in one.subjects],
                bad=bool(bad),
                largest=math.inf if bad else losses[worst],
            )
        )
        mine = self._ranks.world.rank in self._writers(what, found)
        written = self._ranks.gathered(self._dump(what, step, seen[worst]) if mine else _Written())
        text = self._sentence(what, step, found, written)
        if self._train.not_finite != "skip":
            raise DivergedError(
                f"{text} Look at their data, or lower train.lr ({self._train.lr:g}) or "
                f"train.clip_norm ({self._train.clip_norm:g}), or leave such steps out with "
                f"train.not_finite=skip. Checkpoints in {self._out / 'checkpoints'} are from "
                f"before."
            )
        self._skip(what, text)

    def _skip(self, what: str, text: str) -> None:
        limit = self._train.max_skips
        if self.skipped >= limit:
            raise DivergedError(
                f"{text} {self.skipped} steps of this run were left out already "
                f"(train.max_skips={limit}): lower train.lr ({self._train.lr:g}), or mend the data"
            )
        if what == "loss":
            self._engine.skip()
        with torch.no_grad():
            for buffer, kept in zip(self._statistics(), self._kept, strict=True):
                buffer.copy_(kept)
        self.skipped += 1
        if self._ranks.world.main:
            log.warning("%s The step is left out (%d of %d)", text, self.skipped, limit)

    def _writers(self, what: str, found: Sequence[_Found]) -> list[int]:
        """Ranks that write a file: bad ones (or those with the largest losses), a few of them."""

        def there() -> int:
            return len(list((self._out / FOLDER).glob("step-*.safetensors")))

        room = FILES - self._ranks.on_main(there)
        ranks = sorted(range(len(found)), key=lambda rank: (-found[rank].largest, rank))
        if what == "loss":
            ranks = [rank for rank in ranks if found[rank].bad]
        return ranks[: max(0, min(RANKS, room))]

    def _sentence(
        self, what: str, step: int, found: Sequence[_Found], written: Sequence[_Written]
    ) -> str:
        names = sorted({name for one in found for name in one.subjects})
        text = f"the {what} of step {step} is not finite; the step's clips are of "
        text += ", ".join(names)
        if suspects := [name for one in written for name in one.suspects]:
            text += f" (not finite: {', '.join(suspects)})"
        if files := [one.file for one in written if one.file]:
            text += f", and those of {'ranks' if len(files) > 1 else 'the rank'} in question are "
            text += f"in {', '.join(files)}"
        if failed := [one.failed for one in written if one.failed]:
            text += f", which could not be written to a file ({failed[0]})"
        if not files and not failed:
            text += f", and {self._out / FOLDER} holds {FILES} files already: no more are written"
        return f"{text}."

    # -- the file ---------------------------------------------------------------------------

    def _dump(self, what: str, step: int, seen: Seen) -> _Written:
        rank = self._ranks.world.rank
        path = self._out / FOLDER / f"step-{step:06d}-rank-{rank:05d}.safetensors"
        batch = seen.samples.to_batch(self._engine.device, dtype=self._engine.dtype)
        losses = self._clip_losses(batch)
        finite = torch.stack([_finite(batch, i) for i in range(len(batch))])
        if losses is not None:
            finite &= losses.isfinite()
        # The bad ones first, should there be no room for all.
        order = sorted(range(len(batch)), key=lambda i: bool(finite[i]))
        order = sorted(order[: max(1, BYTES // _bytes(batch))])
        tensors = _tensors(batch, order)
        if losses is not None:
            tensors["clip_loss"] = losses[order]
        facts: dict[str, Any] = {
            "what": what,
            "step": step,
            "rank": rank,
            "loss": repr(float(seen.loss)),
            "clips": len(batch),
            "subject": [batch.subject[i] for i in order],
        }
        suspects = {batch.subject[i] for i in range(len(batch)) if not finite[i]}
        if isinstance(batch, Batch):
            facts["run"] = [batch.run[i] for i in order]
            suspects = {
                f"run {batch.run[i]}, frame {int(batch.start[i])}"
                for i in range(len(batch))
                if not finite[i]
            }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_content(path, save(tensors, {"fmrizoo": json.dumps(facts)}))
        except OSError as error:
            # What is to be told is the number that is not finite, not this.
            return _Written(failed=f"{path}: {error.strerror or error}", suspects=_some(suspects))
        return _Written(file=str(path), suspects=_some(suspects))

    def _clip_losses(self, batch: Batch | ReadBatch) -> Tensor | None:
        """``(b,)`` losses of the clips one by one; None where ranks cannot compute alone."""
        if self._engine.stage == 3:
            return None
        state = rng_state(self._engine.device)
        kept = [buffer.clone() for buffer in self._statistics()]
        self._model.eval()
        try:
            with torch.no_grad():
                losses = [self._model(_one(batch, i))[0].float() for i in range(len(batch))]
                for buffer, before in zip(self._statistics(), kept, strict=True):
                    buffer.copy_(before)
        finally:
            self._model.train()
            set_rng_state(state, self._engine.device)
        return torch.stack(losses).cpu()


def _some(names: set[str]) -> tuple[str, ...]:
    """The first few, for a sentence."""
    return tuple(sorted(names)[:4])


def _data(batch: Batch | ReadBatch) -> tuple[Tensor, ...]:
    """What the model computes with, ``(b, …)`` each."""
    return (batch.bold,) if isinstance(batch, Batch) else batch.read


def _finite(batch: Batch | ReadBatch, i: int) -> Tensor:
    return torch.stack([part[i].isfinite().all() for part in _data(batch)]).all().cpu()


def _bytes(batch: Batch | ReadBatch) -> int:
    """Of one clip."""
    return sum(part[0].numel() * part.element_size() for part in _data(batch))


def _optional(value: Tensor | None, rows: Sequence[int]) -> Tensor | None:
    return None if value is None else value[list(rows)]


def _one(batch: Batch | ReadBatch, i: int) -> Batch | ReadBatch:
    """Clip ``i`` by itself."""
    if isinstance(batch, ReadBatch):
        read = tuple(part[i : i + 1] for part in batch.read)
        return ReadBatch(read, [batch.subject[i]], _optional(batch.target, [i]))
    return Batch(
        batch.bold[i : i + 1],
        batch.mask[i : i + 1],
        batch.tr[i : i + 1],
        [batch.subject[i]],
        [batch.run[i]],
        batch.start[i : i + 1],
        _optional(batch.target, [i]),
        _optional(batch.seed, [i]),
    )


def _tensors(batch: Batch | ReadBatch, rows: Sequence[int]) -> dict[str, Tensor]:
    """The named tensors of some clips, on the CPU."""
    named: dict[str, Tensor | None] = {"target": batch.target}
    if isinstance(batch, Batch):
        named |= {name: getattr(batch, name) for name in ("bold", "mask", "tr", "start", "seed")}
    else:
        named |= {f"read.{k}": part for k, part in enumerate(batch.read)}
    return {
        name: value[list(rows)].detach().cpu().contiguous()
        for name, value in named.items()
        if value is not None
    }


def read_dump(path: str | Path) -> Dump:
    """The clips of a file below ``faults/``: ``loss, logs = model(read_dump(path).batch)``.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["fmrizoo"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no clips of a step ({error})") from None
    target, subject = tensors.get("target"), facts["subject"]
    batch: Batch | ReadBatch
    if "bold" in tensors:
        bold, mask, tr, start = (tensors[name] for name in ("bold", "mask", "tr", "start"))
        batch = Batch(bold, mask, tr, subject, facts["run"], start, target, tensors.get("seed"))
    else:
        count = sum(name.startswith("read.") for name in tensors)
        batch = ReadBatch(tuple(tensors[f"read.{k}"] for k in range(count)), subject, target)
    return Dump(
        batch=batch,
        what=facts["what"],
        step=facts["step"],
        rank=facts["rank"],
        loss=float(facts["loss"]),
        clip_loss=cast("Tensor | None", tensors.get("clip_loss")),
    )
