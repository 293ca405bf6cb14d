"""Compiled models: the taps are in the graph, which stays whole, and give the eager numbers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import WIDTH, Dict, Residual, Tuple, chain

import gradflow
from gradflow.errors import MeasurementError
from gradflow.runs.records import LayerRecord
from gradflow.watching import Flow
from gradflow.watching.recorder import WatchedPass

NUMBERS = ("act_rms", "act_cos", "grad_norm", "gain", "identity_share", "param_grad_norm")
# Tracing and differentiation without code generation, which takes most of the time.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch() -> Tensor:
    return torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def model_of(kind: Any = Residual) -> nn.Module:
    torch.manual_seed(0)
    return chain(kind)


def step(model: Any, x: Tensor) -> None:
    model(x).square().sum().backward()


def eager(kind: Any = Residual) -> Flow:
    model = model_of(kind)
    with gradflow.watch(model) as flow:
        step(model, batch())
    return flow


def numbers(row: LayerRecord) -> dict[str, float]:
    return {name: getattr(row, name) for name in NUMBERS if getattr(row, name) is not None}


def same(a: Flow, b: Flow, rel: float = 1e-5) -> None:
    assert [row.unit for row in a.run.layer_records] == [row.unit for row in b.run.layer_records]
    for mine, other in zip(a.run.layer_records, b.run.layer_records, strict=True):
        assert numbers(mine) == pytest.approx(numbers(other), rel=rel)


@pytest.mark.parametrize(
    "kind", [Residual, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Tuple, Dict))]
)
def test_compiled_inside_the_watch(kind: type[nn.Module]) -> None:
    model = model_of(kind)
    with gradflow.watch(model) as flow:
        step(torch.compile(model, fullgraph=True, backend=BACKEND), batch())
    same(flow, eager(kind))


@pytest.mark.slow
def test_compiled_and_used_before_the_watch() -> None:
    model = torch.compile(model_of(), fullgraph=True, backend=BACKEND)
    step(model, batch())
    model.zero_grad()
    with gradflow.watch(model) as flow:
        step(model, batch())
    same(flow, eager())
    model.zero_grad()
    step(model, batch())  # compiled again, without taps


@pytest.mark.slow
def test_compiled_in_place() -> None:
    model = model_of()
    model.compile(fullgraph=True, backend=BACKEND)
    step(model, batch())
    model.zero_grad()
    with gradflow.watch(model) as flow:
        step(model, batch())
    same(flow, eager())


def test_one_graph_serves_every_step() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    counter = CompileCounterWithBackend(BACKEND)
    with gradflow.watch(model, every=2) as flow:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(4):
            optimizer.zero_grad()
            step(compiled, batch())
            optimizer.step()
    assert counter.frame_count == 1
    assert list(flow.layers.step.unique()) == [0, 2]
    first, second = (flow.layers[flow.layers.step == n].grad_norm.tolist() for n in (0, 2))
    assert first[1:] == second[1:]


def test_a_function_compiled_before_is_an_error_that_says_what_to_do() -> None:
    model = model_of()
    forward = torch.compile(model, backend=BACKEND)
    step(forward, batch())
    with gradflow.watch(model) as flow:
        step(forward, batch())
    with pytest.raises(MeasurementError, match=r"compiled before needs torch\.compiler\.reset"):
        flow.table()


def test_passes_without_a_backward_are_not_kept() -> None:
    model = model_of()
    with gradflow.watch(model) as flow:
        compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
        for _ in range(4):
            compiled(batch())
            step(compiled, batch())
            flow.end_step()
        gc.collect()
        assert sum(type(one) is WatchedPass for one in gc.get_objects()) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports what torch deprecates
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_generated_code_gives_the_numbers_of_eager(mode: str) -> None:
    model = model_of()
    with gradflow.watch(model) as flow:
        step(torch.compile(model, fullgraph=True, mode=mode), batch())
    same(flow, eager(), rel=1e-4)
