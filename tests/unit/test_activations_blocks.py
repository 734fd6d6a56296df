"""Facts about finding the repeated blocks of a model."""

from __future__ import annotations

import pytest
from torch import nn

from narrowcast.activations.blocks import repeated_blocks
from narrowcast.errors import UsageError
from narrowcast.recipes.load import load_recipe


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)


class Decoder(Block):
    pass


class Expert(Block):
    pass


class Mixture(Block):
    """A block that holds nearly all of its parameters in experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(8))


class Stage(nn.Module):
    """A stage of a vision model: blocks in a row, and a step down."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.down = nn.Linear(8, 8)


class Model(nn.Module):
    def __init__(self, **stacks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 8)
        for name, stack in stacks.items():
            self.add_module(name, stack)


def several(kind: type[nn.Module], count: int = 3) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(count))


@pytest.mark.parametrize(
    ("recipe", "blocks"),
    [
        (("austen",), ["blocks.0", "blocks.1"]),
        (("fashion", "model=vit"), ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        (("fashion", "model=resnet"), ["3", "4", "5"]),
    ],
    ids=["gpt", "vit", "resnet"],
)
def test_the_built_in_models_are_stacks_of_their_blocks(
    recipe: tuple[str, ...], blocks: list[str]
) -> None:
    """Transformer layers of GPT and ViT, residual blocks of the ResNet."""
    model = load_recipe(recipe[0], recipe[1:]).build_model()

    assert repeated_blocks(model) == blocks


def test_encoder_and_decoder_are_both_taken() -> None:
    """Two stacks of different classes, side by side."""
    model = Model(encoder=several(Block), decoder=several(Decoder, 2))

    assert repeated_blocks(model) == [*(f"encoder.{i}" for i in range(3)), "decoder.0", "decoder.1"]


def test_torchs_own_transformer_is_known() -> None:
    """``nn.Transformer`` keeps its layers in ModuleLists."""
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)

    assert repeated_blocks(model) == [f"{s}coder.layers.{i}" for s in ("en", "de") for i in (0, 1)]


def test_a_block_is_not_its_experts() -> None:
    """Experts hold the most parameters and are parts of a block."""
    assert repeated_blocks(Model(layers=several(Mixture))) == ["layers.0", "layers.1", "layers.2"]


def test_a_stage_gives_way_to_its_blocks() -> None:
    """Where a stage runs a Sequential of blocks, the blocks are what repeats."""
    model = Model(stages=nn.Sequential(Stage(), Stage()))

    assert repeated_blocks(model) == [f"stages.{s}.blocks.{b}" for s in (0, 1) for b in range(3)]


def test_plain_sequentials_are_blocks_where_nothing_else_is() -> None:
    """A VGG-like model that is built from unnamed groups of layers."""
    groups = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))

    assert repeated_blocks(groups) == ["0", "1", "2"]


def test_a_block_that_is_held_twice_is_named_once() -> None:
    """By the first of its names."""
    block = Block()
    model = Model(first=nn.ModuleList([block, Block()]), second=nn.ModuleList([block]))

    assert repeated_blocks(model) == ["first.0", "first.1"]


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "modules: 0, 1, 2"),
        (Model(body=nn.ModuleList([Block()])), "modules: body, body.0"),
        (nn.Linear(2, 2), "such as modules='encoder.*'"),
    ],
    ids=["mlp", "one block", "no children"],
)
def test_a_model_without_blocks_is_an_error_that_names_its_modules(
    model: nn.Module, hint: str
) -> None:
    """The error says that there are none and what to write instead."""
    with pytest.raises(UsageError, match="has no repeated blocks") as caught:
        repeated_blocks(model)

    assert hint in caught.value.hint
