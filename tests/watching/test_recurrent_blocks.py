"""Blocks that are called again and again: found by a run, without being named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clocks import FakeClock
from torch import Tensor, nn
from zoo import WIDTH, Inner, LoopedStack, Recursive, Residual, Universal, chain

import gradflow
from gradflow.measuring.models.run import measure_model
from gradflow.specs.model_spec import ModelRequest
from gradflow.specs.run_options import RunOptions
from gradflow.watching import Flow
from gradflow.watching.discovery import repeats


def watched(model: nn.Module, steps: int = 1, **options: Any) -> Flow:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradflow.watch(model, **options) as flow:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, WIDTH)).square().sum().backward()
            optimizer.step()
    return flow


def units(flow: Flow, step: int = 0) -> list[str]:
    return [row.unit for row in flow.run.layer_records if row.step == step]


def calls(name: str, count: int) -> list[str]:
    return ["input", name, *(f"{name}#{n}" for n in range(2, count + 1))]


class Pairs(nn.Module):
    """An encoder and a decoder, each one block for all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Inner(), nn.Sequential(Inner(), nn.Tanh())
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.decoder(self.encoder(x)))
        return y


class Nested(nn.Module):
    """A loop of loops: the outer block counts."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleDict({"block": nn.Sequential(Inner(), nn.LayerNorm(WIDTH))})

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.outer["block"](x)
        return x


def test_one_block_deep_inside_is_the_layer() -> None:
    flow = watched(Universal())
    assert units(flow) == calls("encoder.groups.0", 3)
    assert [layer.name for layer in flow.watched_layers] == ["encoder.groups.0"]
    # The pooler, which the loss does not see, would make it "dead".
    assert flow.run.summary.verdict == "healthy"


def test_a_block_at_the_top_is_as_well() -> None:
    assert units(watched(chain(Residual, Recursive, depth=1))) == calls("blocks.0", 3)


def test_several_loops_are_in_execution_order() -> None:
    names = ["encoder.groups.0", "decoder.0.groups.0"]
    assert units(watched(Pairs())) == ["input", *calls(names[0], 3)[1:], *calls(names[1], 3)[1:]]


def test_the_outermost_loop_counts() -> None:
    assert units(watched(Nested())) == calls("outer.block", 2)


def test_a_stack_that_is_run_through_again_keeps_its_layers() -> None:
    blocks = ["blocks.0", "blocks.1"]
    assert units(watched(LoopedStack())) == ["input", *blocks, *(f"{name}#2" for name in blocks)]


class Reuses(nn.Module):
    """What is called again here is no layer: parts without parameters, or without parts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Tanh(), nn.Identity())
        self.norm, self.two = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.act(self.one(x)))
        return self.norm(self.act(self.two(x)))


def test_activations_and_norms_that_are_reused_are_no_loop() -> None:
    assert units(watched(Reuses())) == [
        *("input", "one", "act", "norm", "two", "act#2", "norm#2"),
    ]


def test_a_block_that_changes_the_shape_is_no_loop() -> None:
    """Two arms of a twin network are no depth."""

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry = nn.Linear(WIDTH, WIDTH)
            self.arm = nn.Sequential(nn.Linear(WIDTH, 3), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            x = self.entry(x)
            y: Tensor = self.arm(x) - self.arm(x.flip(0))
            return y

    assert units(watched(Twin())) == ["input", "entry", "arm", "arm#2"]


def test_the_parameters_are_those_of_the_block() -> None:
    model = Universal()
    flow = watched(model, steps=3)
    own = {name for name, _ in model.encoder.groups[0].named_parameters()}
    for step in range(3):
        rows = [row for row in flow.run.param_records if row.step == step]
        assert {row.param for row in rows} == own
        assert {row.unit for row in rows} == {"encoder.groups.0"}
        assert all(row.grad_norm for row in rows)
    assert flow.run.spec.parameters == sum(p.numel() for p in model.encoder.groups.parameters())


def test_what_is_found_after_a_step_is_what_naming_it_gives() -> None:
    torch.manual_seed(0)
    found = watched(Universal(), steps=3)
    torch.manual_seed(0)
    named = watched(Universal(), steps=3, layers="encoder.groups.*")
    assert found.layers.equals(named.layers)
    assert found.params.equals(named.params)


def test_a_step_that_is_not_measured_decides_nothing() -> None:
    model = Universal()
    with gradflow.watch(model, every=2) as flow:
        for calls_model in (False, True, True):
            if calls_model:
                model(torch.randn(4, WIDTH)).square().sum().backward()
            else:
                model.first(torch.randn(4, WIDTH)).sum().backward()
            flow.end_step()
    # The first step has no loop; what counts then counts for all steps.
    assert units(flow) == ["input", "first"]
    assert units(flow, 2)[:2] == ["input", "first"]


@pytest.mark.whole
def test_compiled_loops_have_the_numbers_of_eager() -> None:
    flows = []
    for compiles in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Universal()
        with gradflow.watch(model) as flow:
            runs = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
            for _ in range(2):
                runs(torch.ones(4, WIDTH)).square().sum().backward()
                flow.end_step()
        flows.append(flow)
    assert units(flows[1]) == calls("encoder.groups.0", 3)
    for mine, other in zip(*(flow.run.layer_records for flow in flows), strict=True):
        assert mine.unit == other.unit
        for name in ("act_rms", "grad_norm", "gain", "identity_share"):
            a, b = getattr(mine, name), getattr(other, name)
            assert a == (None if b is None else pytest.approx(b, rel=1e-5))


def test_runs_of_such_a_model_have_its_calls_and_their_times() -> None:
    request = ModelRequest(model="zoo:Universal", input=f"4,{WIDTH}")
    options = RunOptions(device="cpu", repeats=1, time_budget=1e-9)
    run = measure_model(request, options, clock=FakeClock([1.0]))
    assert [row.unit for row in run.layer_records] == calls("encoder.groups.0", 3)
    assert [row.unit for row in run.time_records] == calls("encoder.groups.0", 3)[1:]
    assert all(row.forward_s for row in run.layer_records[1:])


@pytest.mark.parametrize(("make", "does"), [(LoopedStack, True), (Universal, False)])
def test_repetition_of_modules_needs_no_run(make: type[nn.Module], *, does: bool) -> None:
    assert repeats(make()) is does
