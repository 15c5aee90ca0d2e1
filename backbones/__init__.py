"""This folder is the package ``fmrizoo.backbones`` (see pyproject.toml)."""

if __name__ != "fmrizoo.backbones":
    raise ImportError("import fmrizoo.backbones, not the bare folder 'backbones'")
