"""FLOPs of somebody's model: closed forms, torch's own counter, and what is not counted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import user_models
from clocks import FakeClock
from problems import small
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import WIDTH, Residual, chain

import gradflow
from gradflow.engine import flops
from gradflow.engine.timing import SMALLEST
from gradflow.measuring.models.run import measure_model
from gradflow.runs.records import Summary
from gradflow.specs.model_spec import ModelRequest
from gradflow.specs.run_options import RunOptions
from gradflow.torch_internals import operation
from gradflow.watching.discovery import find_layers
from gradflow.watching.times import counted_step

OPTIONS = RunOptions(device="cpu", repeats=1, time_budget=1e-9)


def measured(model: str, options: RunOptions = OPTIONS, **values: Any) -> Summary:
    request = ModelRequest(model=model, **{"input": f"5,{WIDTH}"} | values)
    return measure_model(request, options, clock=FakeClock([1.0])).summary


def test_layers_have_their_closed_form() -> None:
    found = measured("user_models:Net", depth=4)
    forward = 4 * 2 * 5 * WIDTH * WIDTH
    assert (found.forward_flop, found.backward_flop) == (forward, 2 * forward)
    # Every mark comes a second after the one before: a layer takes one.
    assert (found.forward_flop_per_s, found.backward_flop_per_s) == (forward / 4, forward / 2)
    assert found.matmul_flop_per_s == 2 * SMALLEST**3


def test_a_block_that_is_called_again_counts_each_time() -> None:
    found = measured("zoo:Universal")
    forward = 3 * 2 * 5 * WIDTH * WIDTH
    assert (found.forward_flop, found.backward_flop) == (forward, 2 * forward)


def test_a_first_layer_whose_input_takes_no_gradient_has_one_product_less() -> None:
    found = measured("user_models:Net", layers="entry layers.*")
    product = 2 * 5 * WIDTH * WIDTH
    assert (found.forward_flop, found.backward_flop) == (4 * product, 7 * product)


class Attending(nn.Module):
    """Layers of torch, with attention."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_torchs_own_counter_agrees() -> None:
    """It has no formula for attention on CPU; here it takes ours."""
    model, x = Attending(), torch.randn(3, 4, 8, requires_grad=True)
    places = find_layers(model)
    counted = counted_step(places, lambda: model(x).square().sum().backward())
    assert counted is not None
    with FlopCounterMode(display=False, custom_mapping=extra()) as counter:
        y = model(x)
        forward = counter.get_total_flops()
        y.square().sum().backward()
    assert sum(there for there, _ in counted.values()) == forward
    assert sum(back for _, back in counted.values()) == counter.get_total_flops() - forward


def extra() -> dict[Any, Any]:
    names = ("flash_attention_for_cpu", "flash_attention_for_cpu_backward")
    formulas = {}
    for name in names:
        op = operation(f"_scaled_dot_product_{name}")
        formulas[op] = partial(flops.FORMULAS[op])
        formulas[op]._get_raw = True  # it takes tensors as it is
    return formulas


def test_stacks_and_models_count_alike() -> None:
    """One and the same transformer, measured as a stack and as somebody's model."""
    spec = small("transformer", depth=2)
    stack = gradflow.measure(spec, OPTIONS, clock=FakeClock([1.0])).summary
    found = counted_step(*stack_as_model())
    assert found is not None
    both = [sum(side) for side in zip(*found.values(), strict=True)]
    assert both == [stack.forward_flop, stack.backward_flop]


def stack_as_model() -> tuple[Any, Any]:
    from problems import network

    net = network(small("transformer", depth=2))
    model, x = nn.Sequential(*net.blocks), net.x.clone().requires_grad_()
    return find_layers(model, ["*.*"]), lambda: net.loss(model(x)).backward()


def test_where_torch_has_no_formula_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> int:
        raise AssertionError("a shape that it does not know")

    monkeypatch.setitem(flops.FORMULAS, operation("addmm"), refuses)
    found = measured("user_models:Net")
    assert found.forward_flop is found.backward_flop is found.forward_flop_per_s is None
    assert found.forward_s == 3.0


class Branching(nn.Module):
    """Its branch is taken inside an operation, `torch.cond`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, self.linear, lambda x: self.linear(x).tanh(), (x,))
        return x + y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it from who only prints
def test_a_step_that_refuses_to_be_counted_has_times_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = partial(nn.Sequential, Branching(), Branching())
    monkeypatch.setattr(user_models, "branching", pair, raising=False)
    found = measured("user_models:branching")
    assert found.forward_flop is None
    assert found.forward_s


def test_counting_changes_nothing() -> None:
    model, x = chain(Residual), torch.randn(2, WIDTH)
    state, before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    counted_step(find_layers(model), lambda: model(x).sum().backward())
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model(x).sum().backward()
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters())))
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_times_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradflow.measuring.models.run.counted_step", None)
    found = measured("user_models:Net", RunOptions(device="cpu", timing=False))
    assert found.forward_flop is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it from who only prints
def test_a_model_that_compiles_itself_is_counted_or_left_out() -> None:
    torch.compiler.reset()
    user_models.compiled = compiled
    try:
        found = measured("user_models:compiled")
    finally:
        del user_models.compiled
        torch.compiler.reset()
    assert found.forward_flop in (None, 3 * 2 * 5 * WIDTH * WIDTH)
    assert found.forward_s


def compiled() -> nn.Module:
    """Compiles its layers in place."""
    model = user_models.Net()
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    return model
