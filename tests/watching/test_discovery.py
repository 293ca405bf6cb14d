"""Which modules are taken for the layers of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import ZOO, Chain, EncoderDecoder, Residual, ResNet

from gradflow.errors import UsageError
from gradflow.watching.discovery import find_layers, fits


def names(model: nn.Module, patterns: list[str] | None = None) -> list[str]:
    return [place.name for place in find_layers(model, patterns)]


def block(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


class Named(nn.Module):
    """A model with these children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Unit(nn.Module):
    """A layer of its own class."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


class Other(Unit):
    """One of another class."""


class Expert(nn.Module):
    """A layer with experts inside."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Unit() for _ in range(4))


class Stage(nn.Module):
    """Blocks of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Unit(width) for _ in range(depth))


class Layer(nn.Module):
    """Dense, or with experts, as in mixtures of both."""

    def __init__(self, *, experts: bool) -> None:
        super().__init__()
        self.mix, self.mlp = Unit(), Expert() if experts else Unit()


class Convs(nn.Module):
    """A stage whose first block has a projection; every block is two convolutions with norms."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Conv(width, first=i == 0) for i in range(depth)))


class Conv(nn.Module):
    """One block of it."""

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.parts = nn.Sequential(Unit(width), Unit(width))
        self.down = nn.Linear(width, width) if first else nn.Identity()


CASES: dict[str, tuple[nn.Module, list[str]]] = {
    "a list": (Named(embed=nn.Linear(2, 2), h=nn.ModuleList([Unit(), Unit()])), ["h.0", "h.1"]),
    "two lists": (EncoderDecoder(), ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]),
    "stages of blocks": (ResNet(), ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
    "stages of their own class": (
        Named(stages=nn.ModuleList([Stage(4, 2), Stage(8, 1)])),
        ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"],
    ),
    "experts are inside": (Named(h=nn.ModuleList([Expert(), Expert()])), ["h.0", "h.1"]),
    "every second one has experts": (
        Named(h=nn.ModuleList(Layer(experts=i % 2 == 1) for i in range(5))),
        [f"h.{i}" for i in range(5)],
    ),
    "the first ones have no experts": (
        Named(h=nn.ModuleList(Layer(experts=i > 1) for i in range(4))),
        [f"h.{i}" for i in range(4)],
    ),
    "a first block that fits the width": (
        Named(stages=nn.ModuleList([Convs(4, 2), Convs(8, 3), Convs(9, 1)])),
        [f"stages.{s}.blocks.{i}" for s, depth in enumerate((2, 3, 1)) for i in range(depth)],
    ),
    "lists beside each other are not called": (
        Named(h=nn.ModuleList([Unit(), Unit()]), norms=nn.ModuleList([nn.LayerNorm(4)])),
        ["h.0", "h.1"],
    ),
    "lists of lists": (
        Named(h=nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))),
        ["h.0.0", "h.0.1", "h.1.0", "h.1.1"],
    ),
    "hybrid": (Named(h=nn.ModuleList([Unit(), Other(), Unit()])), ["h.0", "h.1", "h.2"]),
    "a wrapper": (Named(model=Named(h=nn.Sequential(Unit(), Unit()))), ["model.h.0", "model.h.1"]),
    "no repetition": (Named(a=Unit(), b=nn.ReLU(), c=Other()), ["a", "b", "c"]),
    "a list without repetition": (Named(a=Unit(), b=nn.ModuleList([Other()])), ["a", "b.0"]),
    "bare linear layers in a list": (
        Named(a=nn.ReLU(), h=nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])),
        ["h.0", "h.1"],
    ),
    "one module three times": (Chain(*[Residual()] * 3), ["blocks.0"]),
    "a leaf": (nn.Linear(2, 2), ["Linear"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_repeated_blocks_are_found(case: str) -> None:
    model, wanted = CASES[case]
    assert names(model) == wanted


@pytest.mark.parametrize("kind", ZOO)
def test_every_model_has_layers(kind: str) -> None:
    torch.manual_seed(0)
    model = ZOO[kind].make()
    found = find_layers(model)
    assert found
    assert len({id(place.module) for place in found}) == len(found)


@pytest.mark.parametrize(
    ("name", "pattern", "does"),
    [
        ("blocks.0", "blocks.*", True),
        ("blocks.10", "blocks.*", True),
        ("blocks.0.linear", "blocks.*", False),
        ("blocks.0.linear", "blocks.*.linear", True),
        ("blocks.0.linear", "**", True),
        ("blocks.0.linear", "**.linear", True),
        ("linear", "**.linear", True),
        ("blocks", "blocks.*", False),
        ("blocks.0", "blocks.[1-9]", False),
        ("layer12", "layer*", True),
    ],
)
def test_patterns_go_part_by_part(name: str, pattern: str, does: bool) -> None:
    assert fits(name, pattern) is does


def test_patterns_choose_modules_in_the_order_of_the_model() -> None:
    model = Chain(Residual(), Residual())
    assert names(model, ["blocks.*.linear", "first"]) == [
        "first",
        "blocks.0.linear",
        "blocks.1.linear",
    ]


def test_a_pattern_that_fits_nothing_is_an_error_with_the_known_names() -> None:
    with pytest.raises(UsageError, match=r"layers= names modules.*got h\.\*; known: first, blocks"):
        find_layers(Chain(Residual()), ["h.*"])


def test_neighbours_in_a_list_know_each_other() -> None:
    found = find_layers(EncoderDecoder())
    assert [place.previous for place in found] == [None, 0, None, 2]
