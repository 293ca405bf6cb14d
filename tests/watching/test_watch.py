"""The watching engine: the walk engine and float64 autograd agree, and the model is left alone."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import STACKS, measure, name, network, retyped, thinned
from torch import Tensor, nn
from zoo import WIDTH, ZOO, Animal, InPlace, Output, Residual, chain

import gradflow
from gradflow.errors import MeasurementError, UsageError
from gradflow.runs.records import LayerRecord
from gradflow.specs.stack import StackSpec
from gradflow.watching import Flow
from gradflow.watching.recorder import Tap, WatchedPass

COMMON = (
    "act_rms",
    "act_max_abs",
    "act_cos",
    "grad_norm",
    "log10_grad_norm",
    "gain",
    "param_norm",
    "param_grad_norm",
    "log10_param_grad_norm",
    "grad_cos",
    "nonfinite",
    "zero_fraction",
)
# Their graphs cannot be asked for the gradient at what a layer returned: it has changed since, or
# its first run had no graph.
CHANGED = ("in-place residual", "in-place view", "resnet", "reentrant checkpoint")


def watched_stack(spec: StackSpec) -> Flow:
    """A built stack, its units watched as the modules of somebody's model."""
    net = network(spec)
    x = net.x.clone().requires_grad_()
    with gradflow.watch(nn.Sequential(*net.blocks), "*.*") as flow:
        net.loss(nn.Sequential(*net.blocks)(x)).backward()
    return flow


def values(record: LayerRecord | dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    given = record if isinstance(record, dict) else {n: getattr(record, n) for n in names}
    return {n: given[n] for n in names if given.get(n) is not None}


@pytest.mark.parametrize("spec", thinned(STACKS), ids=name)
def test_watch_agrees_with_the_walk_engine(spec: StackSpec) -> None:
    flow = watched_stack(spec)
    layers, params = measure(spec, raw_range=True)
    assert len(flow.run.layer_records) == len(layers)
    for mine, other in zip(flow.run.layer_records, layers, strict=True):
        assert values(mine, COMMON) == pytest.approx(values(other, COMMON), rel=1e-6, abs=1e-9)
    for mine, other in zip(flow.run.param_records, params, strict=True):
        assert (mine.param, mine.shape, mine.numel) == (other.param, other.shape, other.numel)
        assert mine.norm == pytest.approx(other.norm, rel=1e-6)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)


@pytest.mark.parametrize("spec", STACKS[::3], ids=name)
def test_watch_agrees_with_float64_autograd(spec: StackSpec) -> None:
    wide = retyped(spec, dtype="float64")
    layers, params = oracle.measure(wide, network(wide))
    run = watched_stack(wide).run
    for mine, other in zip(run.layer_records, layers, strict=True):
        assert values(mine, COMMON) == pytest.approx(values(other, COMMON), rel=1e-9, abs=1e-12)
    for mine, other in zip(run.param_records, params, strict=True):
        assert mine.norm == pytest.approx(other["norm"], rel=1e-9)
        assert mine.grad_norm == pytest.approx(other["grad_norm"], rel=1e-9)


@pytest.mark.parametrize("spec", [s for s in STACKS if s.has_shortcut][::5], ids=name)
def test_the_identity_share_is_the_squared_cosine_of_the_gradients_at_both_ends(
    spec: StackSpec,
) -> None:
    wide = retyped(spec, dtype="float64")
    steps = oracle.forward(wide, network(wide))
    oracle.total_loss(wide, network(wide).loss, steps[-1].y).backward()
    found = watched_stack(wide).run.layer_records[1:]
    for step, row in zip(steps, found, strict=True):
        x, y = step.x.grad.flatten(), step.y.grad.flatten()
        share = (x @ y / (oracle.size(x) * oracle.size(y))).item() ** 2
        assert row.identity_share == pytest.approx(share, rel=1e-9)


def outcome(model: nn.Module, animal: Animal, x: Tensor) -> list[Tensor | None]:
    """The loss, every gradient and every buffer after a pass from one state of the generator."""
    torch.manual_seed(3)
    loss = animal.call(model, x)
    loss.backward()
    grads = [p.grad.to_dense() if p.grad is not None else None for p in model.parameters()]
    return [loss.detach(), x.grad, *grads, *model.buffers(), torch.rand(2)]


def equal(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    pairs = zip(a, b, strict=True)
    return all((u is None and v is None) or torch.equal(u, v) for u, v in pairs)


def traces(model: nn.Module) -> list[Any]:
    """All that a tool could leave behind on a model."""
    found: list[Any] = []
    for module in model.modules():
        found.append({k: v for k, v in vars(module).items() if "hooks" in k or k == "training"})
        found.append(sorted(vars(module)))
    for parameter in model.parameters():
        found += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks or None]
        found.append(parameter.requires_grad)
    return found


def made(animal: Animal, *, training: bool) -> nn.Module:
    torch.manual_seed(0)
    return animal.make().train(training)


@given(
    kind=st.sampled_from(sorted(ZOO)),
    batch=st.integers(2, 5),
    training=st.booleans(),
    with_gradient=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_observing_changes_nothing(
    kind: str, batch: int, training: bool, with_gradient: bool, seed: int
) -> None:
    animal = ZOO[kind]
    bare, watched = made(animal, training=training), made(animal, training=training)
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, WIDTH, generator=source)
    inputs = [x.clone().requires_grad_(with_gradient) for _ in range(2)]
    before = copy.deepcopy(traces(watched))
    with gradflow.watch(watched) as flow:
        found = outcome(watched, animal, inputs[0])
    assert equal(found, outcome(bare, animal, inputs[1]))
    assert traces(watched) == before
    rows = flow.run.layer_records
    assert [row.layer for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("kind", ZOO)
def test_every_call_has_a_row(kind: str) -> None:
    animal = ZOO[kind]
    model = made(animal, training=True)
    x = torch.randn(4, WIDTH)
    with gradflow.watch(model) as flow:
        animal.call(model, x).backward()
    rows = flow.run.layer_records
    assert len(rows) == animal.rows + 1
    assert all(row.act_rms is not None and math.isfinite(row.act_rms) for row in rows[1:])


@pytest.mark.parametrize("kind", [k for k in ZOO if k not in CHANGED])
def test_the_zoo_agrees_with_autograd(kind: str) -> None:
    """The gradients at the very tensors that the layers return, asked for one by one."""
    animal = ZOO[kind]
    model = made(animal, training=True)
    x = torch.randn(4, WIDTH)
    torch.manual_seed(5)
    with gradflow.watch(model) as flow:
        animal.call(model, x).backward()
    torch.manual_seed(5)
    squares = asked_for(model, animal, x, {row.unit.split("#")[0] for row in rows_of(flow)})
    compared = 0
    for row in rows_of(flow):
        unit, _, call = row.unit.partition("#")
        if row.grad_norm is not None:
            found = squares[unit][int(call or 1) - 1 :]
            # Two passes before one backward are one batch.
            wanted = sum(found) if kind == "siamese" else found[0]
            assert row.grad_norm == pytest.approx(math.sqrt(wanted), rel=1e-6)
            compared += 1
    assert compared


def rows_of(flow: Flow) -> list[LayerRecord]:
    return list(flow.run.layer_records[1:])


def asked_for(
    model: nn.Module, animal: Animal, x: Tensor, units: set[str]
) -> dict[str, list[float]]:
    """|dL/dy|^2 of each call of each unit, by `autograd.grad`."""
    outputs: dict[str, list[Tensor]] = {unit: [] for unit in units}
    handles = []
    for unit in units:
        module = model if unit == type(model).__name__ else model.get_submodule(unit)
        keep = outputs[unit].append
        handles.append(module.register_forward_hook(lambda _, args, y, keep=keep: keep(main(y))))
    loss = animal.call(model, x)
    for handle in handles:
        handle.remove()
    return {unit: [energy(loss, y) for y in ys if y.numel()] for unit, ys in outputs.items()}


def main(y: Any) -> Tensor:
    """The stream in an output: of the animals of this zoo its largest tensor with a gradient."""
    if isinstance(y, Output):
        y = vars(y)
    items = [y] if isinstance(y, Tensor) else list(y.values() if isinstance(y, dict) else y)
    tensors = [item for item in items if isinstance(item, Tensor)]
    return max(tensors, key=lambda tensor: (tensor.numel(), tensor.requires_grad))


def energy(loss: Tensor, y: Tensor) -> float:
    if not y.requires_grad:
        return 0.0
    (g,) = torch.autograd.grad(loss, y, retain_graph=True, allow_unused=True)
    return 0.0 if g is None else g.abs().double().square().sum().item()


def test_nothing_is_left_after_an_exception() -> None:
    model = chain(Residual)
    before = copy.deepcopy(traces(model))
    outputs: list[Tensor] = []
    with pytest.raises(ZeroDivisionError):
        run_and_fail(model, outputs)
    assert traces(model) == before
    outputs[0].sum().backward()  # the graph has no hooks left, and goes on
    assert all(p.grad is not None for p in model.parameters())


def run_and_fail(model: nn.Module, outputs: list[Tensor]) -> None:
    with gradflow.watch(model):
        outputs.append(model(torch.randn(2, WIDTH)))
        raise ZeroDivisionError


def test_gradients_of_a_graph_that_outlives_the_watch_are_not_recorded() -> None:
    model = chain(Residual)
    with gradflow.watch(model) as flow:
        loss = model(torch.randn(2, WIDTH)).sum()
    loss.backward()
    assert [row.grad_norm for row in flow.run.layer_records[1:]] == [0.0] * 3


def test_a_model_that_did_not_run_is_an_error_that_says_what_to_do() -> None:
    with gradflow.watch(chain(Residual)) as flow:
        pass
    with pytest.raises(MeasurementError, match=r"no watched layer of Chain has run.*forward and a"):
        flow.table()


def test_an_evaluation_in_between_does_not_count() -> None:
    model, x = chain(Residual), torch.randn(3, WIDTH)
    runs = []
    for evaluates in (False, True):
        model.zero_grad()
        with gradflow.watch(model) as flow:
            model(x).square().mean().backward()
            if evaluates:
                with torch.no_grad():
                    model(100 * x)
                model(100 * x)  # nor a pass without a backward
        runs.append(flow.layers)
    assert runs[0].equals(runs[1])


def test_two_watches_at_once_agree() -> None:
    model, x = chain(Residual), torch.randn(3, WIDTH)
    with gradflow.watch(model) as outer, gradflow.watch(model) as inner:
        model(x).square().mean().backward()
    assert outer.layers.equals(inner.layers)


@pytest.mark.parametrize("every", [0, -1, 1.5, "2"])
def test_every_is_a_whole_number(every: Any) -> None:
    with (
        pytest.raises(UsageError, match="every= is a whole number"),
        gradflow.watch(chain(Residual), every=every),
    ):
        pass


def test_a_deep_chain_needs_no_recursion() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(1200)))
    with gradflow.watch(model) as flow:
        model(torch.randn(1, 2)).sum().backward()
    assert len(flow.run.layer_records) == 1201


def test_no_gradient_is_kept_alive() -> None:
    model = chain(Residual, depth=6)
    kept: list[weakref.ref[Tensor]] = []

    def note(g: Tensor) -> None:
        kept.append(weakref.ref(g))

    with gradflow.watch(model):
        y = model(torch.randn(3, WIDTH))
        y.register_hook(note)
        (y * 2).sum().backward()
        gc.collect()
        assert len(kept) == 1
        assert kept[0]() is None


def test_a_layer_that_changes_its_input_in_place_is_measured_before_and_after() -> None:
    model = chain(InPlace, depth=1)
    seen: list[float] = []
    with gradflow.watch(model, "blocks.*") as flow:
        handle = model.first.register_forward_hook(
            lambda *given: seen.append(given[-1].detach().square().mean().sqrt().item())
        )
        y = model(torch.randn(3, WIDTH))
        y.sum().backward()
        handle.remove()
    first, last = flow.run.layer_records
    assert first.act_rms == pytest.approx(seen[0], rel=1e-6)
    assert last.act_rms == pytest.approx(y.detach().square().mean().sqrt().item(), rel=1e-6)
    assert first.act_rms != pytest.approx(last.act_rms, rel=1e-3)


def test_patterns_watch_layers_inside_each_other() -> None:
    model = chain(Residual, depth=2)
    with gradflow.watch(model, ["blocks.*", "blocks.*.linear"]) as flow:
        model(torch.randn(3, WIDTH)).square().sum().backward()
    units = [row.unit for row in flow.run.layer_records[1:]]
    assert units == ["blocks.0.linear", "blocks.0", "blocks.1.linear", "blocks.1"]
    owners = {row.unit for row in flow.run.param_records}
    assert owners == {"blocks.0.linear", "blocks.1.linear"}


def test_two_backward_passes_through_one_graph_count_as_one_batch() -> None:
    model = chain(Residual).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with gradflow.watch(model) as flow:
        y = model(x)
        y[:1].square().sum().backward(retain_graph=True)
        y[1:].square().sum().backward()
    twin = copy.deepcopy(model)
    with gradflow.watch(twin) as once:
        twin(x).square().sum().backward()
    for mine, other in zip(flow.run.layer_records, once.run.layer_records, strict=True):
        # Samples do not mix here, so the squares of the halves add up.
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-12)
        assert mine.identity_share == (
            None if other.identity_share is None else pytest.approx(other.identity_share, rel=1e-12)
        )


def test_steps_leave_numbers_and_no_objects() -> None:
    model = chain(Residual)
    with gradflow.watch(model) as flow:
        for _ in range(3):
            model(torch.randn(3, WIDTH)).sum().backward()
            flow.end_step()
        gc.collect()
        assert not [one for one in gc.get_objects() if type(one) in (Tap, WatchedPass)]
    assert len(flow.run.layer_records) == 3 * 4
