"""fmrizoo: foundation models for functional MRI.

>>> import fmrizoo
>>> model = fmrizoo.build("pretrain/swin4d_simmim", ["backbone.embed_dim=24"])
>>> backbone = fmrizoo.create_backbone("swin4d", img_size=[48, 48, 48, 20])
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a checkout backbones/, objectives/ and recipes/ sit beside this folder (pyproject.toml maps
# them to fmrizoo.backbones, … when installed); let the checkout itself import the same way.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "backbones" / "__init__.py").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fmrizoo.data.store import Store as Store
    from fmrizoo.evaluate.embed import ClipEmbedder as ClipEmbedder
    from fmrizoo.registry import register_backbone as register_backbone
    from fmrizoo.registry import register_head as register_head
    from fmrizoo.registry import register_objective as register_objective
    from fmrizoo.sklearn import Embedder as Embedder
    from fmrizoo.zoo import build as build
    from fmrizoo.zoo import create_backbone as create_backbone
    from fmrizoo.zoo import list_backbones as list_backbones
    from fmrizoo.zoo import list_heads as list_heads
    from fmrizoo.zoo import list_objectives as list_objectives
    from fmrizoo.zoo import list_recipes as list_recipes
    from fmrizoo.zoo import load as load
    from fmrizoo.zoo import load_recipe as load_recipe

# Public names and where they live: imported at first use, so that `import fmrizoo` and the
# command line start without torch.
_PUBLIC = {
    "ClipEmbedder": "fmrizoo.evaluate.embed",
    "Embedder": "fmrizoo.sklearn",
    "Store": "fmrizoo.data.store",
    "build": "fmrizoo.zoo",
    "create_backbone": "fmrizoo.zoo",
    "list_backbones": "fmrizoo.zoo",
    "list_heads": "fmrizoo.zoo",
    "list_objectives": "fmrizoo.zoo",
    "list_recipes": "fmrizoo.zoo",
    "load": "fmrizoo.zoo",
    "load_recipe": "fmrizoo.zoo",
    "register_backbone": "fmrizoo.registry",
    "register_head": "fmrizoo.registry",
    "register_objective": "fmrizoo.registry",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fmrizoo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
