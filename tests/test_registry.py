"""The tables of components, and their errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fmrizoo.errors import FmrizooError, MissingExtraError, RecipeError
from fmrizoo.registry import Registry, suggest


@dataclass
class Config:
    """A part for tests.

    Second paragraph.
    """

    name: str = "part"
    size: int = 3


def make(config: Config, **context: Any) -> tuple[Config, dict[str, Any]]:
    return config, context


def other(config: Config) -> Config:
    return config


@pytest.fixture
def table() -> Registry:
    registry = Registry("part")
    registry.register("part", Config)(make)
    return registry


def test_build_hands_the_config_and_the_context_to_the_factory(table: Registry) -> None:
    config = Config(size=5)
    assert table.build(config, backbone="b") == (config, {"backbone": "b"})
    assert table["part"].config is Config
    assert table["part"].summary == "A part for tests."


def test_register_gives_the_factory_back(table: Registry) -> None:
    assert table.register("again", Config)(make) is make


def test_names_are_sorted_and_matched_by_shell_patterns(table: Registry) -> None:
    for name in ("swin4d", "swin_factorized", "neuromamba"):
        table.register(name, Config)(make)
    assert table.list() == ["neuromamba", "part", "swin4d", "swin_factorized"]
    assert table.list("swin*") == ["swin4d", "swin_factorized"]
    assert table.list("x*") == []


def test_unknown_name_gets_the_nearest_one(table: Registry) -> None:
    with pytest.raises(RecipeError) as caught:
        table["parts"]
    assert str(caught.value) == "unknown part 'parts'. Did you mean 'part'? Available: part."
    with pytest.raises(RecipeError, match=r"unknown part 'swin4d'. Available: part.$"):
        table.build(Config(name="swin4d"))


def test_suggestion_on_an_empty_table() -> None:
    assert suggest("x", []) == " Available: none."


def test_a_name_is_taken_once_but_the_same_definition_may_come_twice(table: Registry) -> None:
    table.register("part", Config)(make)  # a notebook cell run twice
    with pytest.raises(ValueError, match=r"part 'part' is already registered by .*\.make$"):
        table.register("part", Config)(other)
    assert table["part"].factory is make


def test_config_must_be_a_dataclass(table: Registry) -> None:
    with pytest.raises(TypeError, match="part 'x': config must be a dataclass, got <class 'dict'>"):
        table.register("x", dict)


def test_missing_packages_are_named_with_the_pip_command(table: Registry) -> None:
    table.register("fast", Config, requires=("no_such_package",), extra="mamba")(make)
    table.register("bare", Config, requires=("json", "no_such_package"))(make)
    assert table.list(installed=True) == ["part"]
    assert table.list() == ["bare", "fast", "part"]
    with pytest.raises(MissingExtraError) as caught:
        table.build(Config(name="fast"))
    assert str(caught.value) == "part 'fast' needs no_such_package: pip install 'fmrizoo[mamba]'"
    assert isinstance(caught.value, FmrizooError) and isinstance(caught.value, ImportError)
    with pytest.raises(MissingExtraError, match="needs no_such_package: pip install no_such"):
        table.build(Config(name="bare"))


def test_a_component_from_outside_is_built_by_recipe() -> None:
    """The public decorators put a user's own backbone beside the shipped ones."""
    import fmrizoo
    from fmrizoo.registry import BACKBONES

    @dataclass
    class OwnConfig:
        """Own."""

        name: str = "own_backbone"
        width: int = 7

    class Own:
        def __init__(self, config: OwnConfig) -> None:
            self.width = config.width

    try:
        fmrizoo.register_backbone("own_backbone", OwnConfig)(Own)
        assert "own_backbone" in fmrizoo.list_backbones()
        assert fmrizoo.create_backbone("own_backbone", width=9).width == 9
        with pytest.raises(
            RecipeError, match=r"unknown key 'backbone.widht'. Did you mean 'width'"
        ):
            fmrizoo.create_backbone("own_backbone", widht=9)
    finally:
        BACKBONES._entries.pop("own_backbone", None)
