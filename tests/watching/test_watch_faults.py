"""Planted faults: each is found, and its layer is named. The sound twin has no finding."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow.runs.records import Run

WIDTH, DEPTH, PLACE = 32, 6, 3
NAME = f"blocks.{PLACE}"


class Infinite(torch.autograd.Function):
    """The identity, with an infinity in its gradient."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, g: Tensor) -> Tensor:
        g = g.clone()
        g[0, 0] = math.inf
        return g


def poisoned(x: Tensor) -> Tensor:
    """x with one NaN."""
    y = x.clone()
    y[0, 0] = math.nan
    return y


# What is done to the input of a layer.
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": poisoned,
    "infinite backward": Infinite.apply,
    "detached": Tensor.detach,
}


class Block(nn.Module):
    """y = x + tanh(W LN(x)), or what a fault makes of it."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        x = FAULTS.get(self.fault, lambda x: x)(x)
        f = torch.tanh(self.linear(self.norm(x)))
        return f if self.fault == "plain" else x + f


class Model(nn.Module):
    """Six layers, the fourth of which may have a fault."""

    def __init__(self, fault: str = "", *, everywhere: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        faults = [fault if everywhere or i == PLACE else "" for i in range(DEPTH)]
        self.blocks = nn.Sequential(*map(Block, faults))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def watched(model: nn.Module, *, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Run:
    model = model.to(dtype)
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradflow.watch(model) as flow:
        y = model(x)
        weights = torch.arange(y.numel()).cos().view(y.shape)
        (y.float() * weights * scale).sum().backward()
        optimizer.step()
    return flow.run


def test_a_sound_model_has_no_finding() -> None:
    run = watched(Model())
    assert run.summary.verdict == "healthy"
    assert run.warnings == ()


def named(run: Run, *words: str) -> bool:
    return any(all(word in line for word in (NAME, *words)) for line in run.warnings)


def test_a_nan_in_the_forward_pass() -> None:
    run = watched(Model("nan"))
    assert run.warnings == ()  # the verdict says it all
    summary = run.summary
    assert (summary.verdict, summary.first_unit, summary.first_pass) == (
        "nonfinite",
        NAME,
        "forward",
    )


def test_an_infinity_in_the_backward_pass_alone() -> None:
    run = watched(Model("infinite backward"))
    summary = run.summary
    # The block's own output has a finite gradient; its parameters, and what is below, have not.
    assert summary.verdict == "nonfinite"
    assert summary.first_pass == "backward"
    assert summary.first_unit == f"blocks.{PLACE - 1}"
    rows = {row.unit: row for row in run.layer_records}
    assert rows[NAME].nonfinite == 0
    assert rows[f"blocks.{PLACE - 1}"].nonfinite == 1
    # Of the two, it is the block above that has lost them.
    assert named(run, "backward pass", f"blocks.{PLACE - 1}")


def test_a_detached_layer() -> None:
    run = watched(Model("detached"))
    assert run.summary.verdict == "dead"
    assert run.summary.first_unit == f"blocks.{PLACE - 1}"
    assert named(run, "no gradient", "detached", f"blocks.{PLACE - 1}")


def test_a_frozen_layer() -> None:
    model = Model()
    model.blocks[PLACE].requires_grad_(requires_grad=False)
    run = watched(model)
    assert (run.summary.verdict, run.summary.first_unit) == ("dead", NAME)
    assert named(run, "frozen")
    assert run.layer_records[PLACE + 1].grad_norm is not None  # the stream passes all the same


def test_a_missing_shortcut() -> None:
    run = watched(Model("plain"))
    assert named(run, "shortcut")
    assert len(run.warnings) == 1


def test_a_model_without_any_shortcut_misses_none() -> None:
    assert watched(Model("plain", everywhere=True)).warnings == ()


@pytest.mark.parametrize("factor", [100.0, 1000.0])
def test_a_layer_initialised_too_large(factor: float) -> None:
    model = Model()
    with torch.no_grad():
        for parameter in model.blocks[PLACE].parameters():
            parameter.mul_(factor)
    lines = [line for line in watched(model).warnings if "times as large" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{NAME}: ")
    found = float(re.search(r"are (\S+) times", lines[0])[1])
    assert found == pytest.approx(factor, rel=0.05)


def test_underflow_in_half_precision() -> None:
    run = watched(Model(), scale=2.0**-14, dtype=torch.float16)
    assert any("below the normal numbers" in line for line in run.warnings)
    sound = watched(Model(), scale=1.0, dtype=torch.float16)
    assert not any("below the normal numbers" in line for line in sound.warnings)


def test_a_gradient_at_the_end_of_its_range() -> None:
    run = watched(Model(), scale=40000.0, dtype=torch.float16)
    assert any("fills the range" in line for line in run.warnings)


def test_a_later_step_that_loses_values_gives_the_verdict() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradflow.watch(model) as flow:
        for step in range(3):
            x = torch.full((2, WIDTH), math.nan if step == 1 else 1.0)
            model(x).sum().backward()
            optimizer.step()
    assert (flow.run.summary.verdict, flow.run.summary.first_layer) == ("nonfinite", 1)


def test_the_findings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model("plain")
    with gradflow.watch(model) as flow:
        model(torch.randn(4, WIDTH)).square().sum().backward()
    flow.table()
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{NAME}: " in shown
    assert "is its shortcut missing?" in shown
