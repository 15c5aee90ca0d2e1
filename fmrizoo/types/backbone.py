"""What every backbone offers.

Shape letters: ``b`` samples, ``c`` channels (1 for BOLD), ``x y z t`` voxels and frames, ``n``
tokens, ``d`` features of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fmrizoo.config import CHECKPOINTING
from fmrizoo.errors import RecipeError
from fmrizoo.types.batch import Batch
from fmrizoo.types.features import Features, Tokens
from fmrizoo.types.grid import Grid

if TYPE_CHECKING:
    from fmrizoo.mup import Parametrization


class Backbone(nn.Module):
    """Base of every backbone: ``tokenize`` (patches → tokens) and ``encode`` (tokens → features).

    Attributes:
        embed_dim: Width of ``Tokens.values``.
        num_features: Width of ``Features.values``.
        stage_features: The same after each stage.
        patch_size: Voxels/frames per input token along x, y, z, t.
        reduction: Voxels/frames per output token along x, y, z, t.
        clip_grid: Voxels and frames of a clip after padding.
        any_length: Takes clips of any number of frames (that ``patch_size[3]`` divides), not only
            of up to ``clip_grid.t``.
        causal_unit: What ``encode(causal=True)`` keeps from looking ahead: ``time`` (no feature
            depends on a later time slot) or ``token`` (nor on a later token of the sequence).
        parametrization: Of a backbone built alone; None: PyTorch's own. (A model with an objective
            or a head has one for itself and its backbone together.)
    """

    embed_dim: int
    num_features: int
    stage_features: tuple[int, ...]
    patch_size: tuple[int, int, int, int]
    reduction: tuple[int, int, int, int]
    clip_grid: Grid
    any_length: ClassVar[bool] = False
    causal_unit: ClassVar[str] = "time"
    parametrization: Parametrization | None = None

    @classmethod
    def supports(cls, config: Any) -> frozenset[str]:
        """What objectives and heads may ask of a backbone of this ``config``.

        ``causal``: see ``causal_unit``. ``prompts``: see :meth:`encode_stages`.
        """
        return frozenset()

    def tokenize(
        self,
        bold: Tensor,
        mask: Tensor | None = None,
        *,
        background: Tensor | None = None,
        tr: Tensor | None = None,
    ) -> Tokens:
        """Clips → tokens.

        Args:
            bold: ``(b, c, x, y, z, t)``.
            mask: ``(b, x, y, z)`` True = brain. What lies outside cannot change the tokens: it is
                read as ``background``.
            background: ``(b,)``; None: the lowest value (in the brain, if a mask is given) of each
                clip's first frame.
            tr: ``(b,)`` seconds between frames, for backbones that place tokens in seconds.

        Raises:
            DataError: a clip that the backbone cannot take.
        """
        raise NotImplementedError

    def read(self, batch: Batch) -> Tokens:
        """Tokens of a batch, compact or dense."""
        return self.tokenize(batch.bold, batch.mask, background=batch.background, tr=batch.tr)

    def encode_stages(
        self,
        tokens: Tokens,
        indices: Sequence[int] | None = None,
        *,
        causal: bool = False,
        prompts: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """Run the trunk and keep the features after some of its stages.

        Args:
            tokens: From :meth:`tokenize` or :meth:`read`.
            indices: Stages in the order wanted (None: all; negative counts from the end). The last
                one's features are those of :meth:`encode`. Stages after the last one wanted need
                not run.
            causal: See ``causal_unit``.
            prompts: Learned tokens ``(p, width)`` for every layer, of the widths that
                :meth:`prompt_widths` gives; every window, or every sequence, sees them. They have
                no position and no feature of their own. Only if ``supports`` holds ``prompts``.

        Raises:
            RecipeError: a stage that does not exist, prompts that do not fit, or what the backbone
                as configured cannot do.
        """
        raise NotImplementedError

    def encode(self, tokens: Tokens, *, causal: bool = False) -> Features:
        """Features after the last stage. ``causal``: see ``causal_unit``."""
        return self.encode_stages(tokens, (-1,), causal=causal)[0]

    def forward(self, bold: Tensor, mask: Tensor | None = None) -> Features:
        """``encode(tokenize(bold, mask))``."""
        return self.encode(self.tokenize(bold, mask))

    def forward_intermediates(
        self, bold: Tensor, mask: Tensor | None = None, indices: Sequence[int] | None = None
    ) -> list[Features]:
        """Features after the stages in ``indices`` (see :meth:`encode_stages`)."""
        return self.encode_stages(self.tokenize(bold, mask), indices)

    def prompt_widths(self) -> tuple[int, ...]:
        """Width of the prompts of each layer, in the order the layers run.

        Only if ``supports`` holds ``prompts``.
        """
        raise NotImplementedError

    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        """Names of the modules and parameters that make up each layer, from input to output.

        The first entry holds what comes before the first layer (the patch embedding), each further
        one a layer (one Swin or Mamba block) with what belongs to it; what follows the last layer
        belongs to the last. Every parameter is or lies in exactly one of them.
        """
        raise NotImplementedError

    def place(self, patches: Tensor, index: Tensor, tr: Tensor | None = None) -> Tensor:
        """Token values of raw ``patches (b, n, px·py·pz·pt)`` at ``index (b, n, 4)``.

        Only where ``causal_unit`` is ``token``: what a forecast feeds back.
        """
        raise NotImplementedError

    def extend(self, values: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Go on with a sequence: ``(b, n, embed_dim)`` next tokens → ``(b, n, num_features)``.

        Only where ``causal_unit`` is ``token``. ``state`` is what the call before returned (None at
        the start); calls one after the other equal one ``encode`` of the whole sequence.
        """
        raise NotImplementedError

    def set_checkpointing(self, mode: str) -> None:
        """Which activations are recomputed in the backward pass (``CHECKPOINTING``)."""
        raise NotImplementedError

    def lora_targets(self) -> tuple[str, ...]:
        """Suffixes of the names of the Linear modules that low-rank adapters may wrap."""
        raise NotImplementedError

    def flops(self, grid: Grid, mask: Tensor | None = None) -> dict[str, int]:
        """Multiply-adds × 2 of one forward pass of one clip of ``grid`` voxels, by part.

        ``mask (x, y, z)``: count what is computed for a clip with this brain.
        """
        raise NotImplementedError


def chosen_stages(indices: Sequence[int] | None, count: int) -> list[int]:
    """``indices`` (None: all; negative from the end) as stage numbers.

    Raises:
        RecipeError: there is no such stage.
    """
    wanted = list(range(count)) if indices is None else list(indices)
    if bad := [i for i in wanted if not -count <= i < count]:
        raise RecipeError(f"stages {bad} do not exist: the backbone has {count}")
    return [i % count for i in wanted]


def check_checkpointing(mode: str) -> str:
    """``mode``, or :class:`RecipeError` if it is none of ``CHECKPOINTING``."""
    if mode not in CHECKPOINTING:
        raise RecipeError(f"checkpointing must be one of {', '.join(CHECKPOINTING)}, got {mode!r}")
    return mode
