"""Planted faults: each is found, and its layer is named. The sound twin has no finding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import chain

import gradflow
from gradflow.records import Run

WIDTH, DEPTH, PLACE = 32, 6, 3
NAME = f"blocks.{PLACE}"


class Block(nn.Module):
    """y = x + W tanh(LN(x)): the sound layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Plain(Block):
    """Its shortcut is missing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)


class Detached(Block):
    """Its input is detached."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Poisoned(Block):
    """One NaN in the forward pass, deep inside."""

    def branch(self, x: Tensor) -> Tensor:
        y = super().branch(x)
        poison = torch.zeros_like(y)
        poison[0, 0] = math.nan
        return y + poison


class Infinite(torch.autograd.Function):
    """The identity, with an infinity in its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        g = g.clone()
        g[0, 0] = math.inf
        return g


class InfiniteBackward(Block):
    """Sound forward; backward puts an infinity into the gradient of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Infinite.apply(x))


def model_with(kind: type[Block] = Block) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList(kind() if i == PLACE else Block() for i in range(DEPTH))
    model.forward = lambda x: chained(model, x)  # type: ignore[method-assign]
    return model


def chained(model: nn.Module, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def watched(model: nn.Module, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Run:
    model = model.to(dtype)
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradflow.watch(model, "blocks.*") as flow:
        y = model(x)
        weights = torch.arange(y.numel()).cos().view(y.shape)
        (y.float() * weights * scale).sum().backward()
        optimizer.step()
    return flow.run


def test_a_sound_model_has_no_finding() -> None:
    run = watched(model_with())
    assert run.summary.verdict == "healthy"
    assert run.warnings == ()


def named(run: Run, *words: str) -> bool:
    return any(all(word in line for word in (f"{NAME}", *words)) for line in run.warnings)


def test_a_nan_in_the_forward_pass() -> None:
    summary = watched(model_with(Poisoned)).summary
    assert (summary.verdict, summary.first_unit, summary.first_pass) == (
        "nonfinite",
        NAME,
        "forward",
    )


def test_an_infinity_in_the_backward_pass_alone() -> None:
    run = watched(model_with(InfiniteBackward))
    summary = run.summary
    # The block's own output has a finite gradient; its parameters, and what is below, have not.
    assert summary.verdict == "nonfinite"
    assert summary.first_pass == "backward"
    assert summary.first_unit == f"blocks.{PLACE - 1}"
    rows = {row.unit: row for row in run.layer_records}
    assert rows[NAME].nonfinite == 0
    assert rows[f"blocks.{PLACE - 1}"].nonfinite == 1


def test_a_detached_layer() -> None:
    run = watched(model_with(Detached))
    assert run.summary.verdict == "dead"
    assert run.summary.first_unit == f"blocks.{PLACE - 1}"
    assert named(run, "no gradient", "detached", f"blocks.{PLACE - 1}")


def test_a_frozen_layer() -> None:
    model = model_with()
    model.blocks[PLACE].requires_grad_(requires_grad=False)
    run = watched(model)
    assert (run.summary.verdict, run.summary.first_unit) == ("dead", NAME)
    assert named(run, "frozen")
    assert run.layer_records[PLACE + 1].grad_norm is not None  # the stream passes all the same


def test_a_missing_shortcut() -> None:
    run = watched(model_with(Plain))
    assert named(run, "shortcut")
    assert len(run.warnings) == 1


def test_a_model_without_any_shortcut_misses_none() -> None:
    torch.manual_seed(0)
    run = watched(chain(Plain))
    assert not any("shortcut" in line for line in run.warnings)


@pytest.mark.parametrize("factor", [100.0, 1000.0])
def test_a_layer_initialised_too_large(factor: float) -> None:
    model = model_with()
    with torch.no_grad():
        for parameter in model.blocks[PLACE].parameters():
            parameter.mul_(factor)
    assert named(watched(model), f"{factor:.3g} times as large")


def test_underflow_in_half_precision() -> None:
    run = watched(model_with(), scale=2.0**-14, dtype=torch.float16)
    assert any("below the normal numbers" in line for line in run.warnings)
    sound = watched(model_with(), scale=1.0, dtype=torch.float16)
    assert not any("below the normal numbers" in line for line in sound.warnings)


def test_a_gradient_at_the_end_of_its_range() -> None:
    run = watched(model_with(), scale=40000.0, dtype=torch.float16)
    assert any("fills the range" in line for line in run.warnings)


def test_a_later_step_that_loses_values_gives_the_verdict() -> None:
    model = model_with()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradflow.watch(model, "blocks.*") as flow:
        for step in range(3):
            x = torch.full((2, WIDTH), math.nan if step == 1 else 1.0)
            model(x).sum().backward()
            optimizer.step()
    assert (flow.run.summary.verdict, flow.run.summary.first_layer) == ("nonfinite", 1)


@pytest.mark.parametrize("make", [model_with])
def test_the_findings_are_printed(
    make: Callable[..., nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(Plain)
    with gradflow.watch(model, "blocks.*") as flow:
        model(torch.randn(4, WIDTH)).square().sum().backward()
    flow.table()
    shown = capsys.readouterr().out
    assert NAME in shown
    assert "is its shortcut missing?" in " ".join(shown.split())
