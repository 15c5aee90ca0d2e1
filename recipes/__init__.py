"""This folder is the package ``fmrizoo.recipes`` (see pyproject.toml)."""

if __name__ != "fmrizoo.recipes":
    raise ImportError("import fmrizoo.recipes, not the bare folder 'recipes'")
