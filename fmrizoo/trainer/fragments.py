"""The parts of a model that one rank keeps: fp32 weights, Adam's moments, running means.

DeepSpeed lays trained parameters out flat and deals them over ranks, at each ZeRO stage in another
way. Here every part has the name of its parameter and its place in it, so that what one layout
wrote any other can read. Where DeepSpeed keeps the parts is known in this file only:

- stage 0: whole parameters, the same on all ranks;
- stages 1 and 2 (and bf16): ``parameter._hp_mapping`` says which stretch of the rank's flat fp32
  partition belongs to which stretch of the parameter (None: nothing of it is here);
- stage 3: ``grad_position`` says where a parameter's share begins in which flat partition; shares
  are of equal size, the last one is filled up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT = "weight"
MEAN = "mean"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements ``start`` … ``start + numel - 1`` of a flattened parameter or buffer.

    Attributes:
        name: In the model's ``state_dict``.
        shape: Of the whole tensor.
        start, numel: Which elements.
        trained: False for buffers and frozen parameters.
        aliases: Further names of a shared parameter.
        tensors: Kind (``weight``, ``exp_avg``, ``exp_avg_sq``, ``mean``) → ``(numel,)``, views of
            what is trained.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    trained: bool
    tensors: dict[str, Tensor] = field(repr=False)
    aliases: tuple[str, ...] = ()


class Fragments:
    """What this rank writes into a checkpoint, and reads from one.

    Args:
        model: After ``deepspeed.initialize``.
        engine: DeepSpeed's engine around it.
        stage: ZeRO stage in effect.
        rank: Of this process; what all ranks hold alike is written by rank 0.
    """

    def __init__(self, model: nn.Module, engine: Any, stage: int, rank: int) -> None:
        self._model, self._stage, self._rank = model, stage, rank
        self._outer = engine.optimizer
        self._inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", self._outer)
        self._means: dict[Tensor, Tensor] = {}

    # -- where things are -------------------------------------------------------------------

    def _flats(self) -> list[Tensor]:
        """The tensors that the optimizer updates on this rank."""
        if self._stage == 3:
            return list(self._outer.fp32_partitioned_groups_flat)
        return [p for group in self._inner.param_groups for p in group["params"]]

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        """Of a trained parameter: flat tensor, offset in it, first element, elements."""
        if self._stage == 0:
            return parameter, 0, 0, parameter.numel()
        if self._stage == 3:
            whole: Any = parameter
            group, offset, share = self._outer.grad_position[self._outer.get_param_id(parameter)]
            start = min(self._rank * share, whole.ds_numel)
            numel = min(share, whole.ds_numel - start)
            return self._outer.fp32_partitioned_groups_flat[group], offset, start, numel
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
        if mapping is None:
            return None
        flat = self._inner.param_groups[mapping.param_group_index]["params"][0]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, here.start, there.start, there.numel

    def here(self) -> Iterator[Fragment]:
        """All parts that this rank holds, in the order of the model's names."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        for parameter, (name, *others) in names.items():
            found = self._of(name, parameter)
            if found is not None and found.numel:
                yield replace(found, aliases=tuple(others))
        taken = {name for each in names.values() for name in each}
        for name, value in self._model.state_dict().items():
            if name not in taken:
                yield _whole(name, value)

    def _of(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        whole: Any = parameter
        if not parameter.requires_grad:
            if self._stage < 3:
                return _whole(name, parameter.data)
            share = whole.ds_tensor.numel()
            start = min(self._rank * share, whole.ds_numel)
            numel = min(share, whole.ds_numel - start)
            tensors = {WEIGHT: whole.ds_tensor.data.view(-1)[:numel]}
            return Fragment(name, tuple(whole.ds_shape), start, numel, False, tensors)
        place = self._place(parameter)
        if place is None:
            return None
        flat, offset, start, numel = place
        state = self._inner.state.get(flat, {})
        kinds = {WEIGHT: flat, **{k: state[k] for k in MOMENTS if k in state}}
        if flat in self._means:
            kinds[MEAN] = self._means[flat]
        tensors = {k: v.data.view(-1).narrow(0, offset, numel) for k, v in kinds.items()}
        shape = tuple(whole.ds_shape if self._stage == 3 else parameter.shape)
        return Fragment(name, shape, start, numel, True, tensors)

    def written(self) -> Iterator[Fragment]:
        """The parts that this rank writes: all ranks together write every element once."""
        for part in self.here():
            replicated = self._stage == 0 or (
                not part.trained and part.numel == torch.Size(part.shape).numel()
            )
            if self._rank == 0 or not replicated:
                yield part

    # -- the optimizer ----------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Updates that Adam has taken."""
        states = (self._inner.state.get(flat) for flat in self._flats())
        return next((int(state["step"]) for state in states if state), 0)

    def begin(self, steps: int) -> None:
        """Give the optimizer moments to load into, as after so many updates."""
        for flat in self._flats():
            self._inner.state[flat] = {
                "step": torch.tensor(float(steps), dtype=torch.float32),
                **{kind: torch.zeros_like(flat.data) for kind in MOMENTS},
            }

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the weights that the model computes with up to the fp32 ones (all ranks)."""
        if self._stage == 0:
            return
        if self._stage < 3:
            self._outer.update_lp_params()
            return
        for group in range(len(self._outer.fp32_partitioned_groups_flat)):
            self._outer._reassign_or_swap_out_partitioned_parameters(group)
        if kept := self._outer.persistent_parameters:
            # Small ones stay whole on every rank: part and gather them anew.
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    # -- running means ----------------------------------------------------------------------

    def start_means(self) -> None:
        """Keep a running mean of the weights, from here on."""
        self._means = {flat: flat.detach().clone() for flat in self._flats()}

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """mean ← decay · mean + (1 − decay) · weights."""
        for flat, mean in self._means.items():
            mean.lerp_(flat.data, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the mean weights inside (all ranks)."""
        if not self._means:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for flat, mean in self._means.items():
            kept = flat.detach().clone()
            flat.data.copy_(mean)
            mean.copy_(kept)
        self.refresh()


def _whole(name: str, value: Tensor) -> Fragment:
    shape, flat = tuple(value.shape), value.detach().reshape(-1)
    return Fragment(name, shape, 0, value.numel(), False, {WEIGHT: flat})
