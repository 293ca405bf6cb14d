"""Training: the loop against one written out, measurements that change nothing, both engines."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import CPU, small
from torch import Tensor, nn

from gradflow.errors import UsageError
from gradflow.measuring.stack import measure
from gradflow.runs.records import LayerRecord, Run
from gradflow.specs.requests import as_trained
from gradflow.specs.run_options import TRAINING_DEFAULTS, RunOptions
from gradflow.specs.stack import StackSpec, run_key
from gradflow.training.steps import Problem, TaskNetwork, train, train_stack
from gradflow.training.tasks import build_task

Pair = tuple[Tensor, Tensor]
STACKS = {
    "tokens": small("transformer", norm="pre", depth=2),
    "vectors": small("mlp", norm="pre", depth=2),
    "images": small("resnet", norm="post", depth=2),
    "shared scalars": small("transformer", scheme="rezero", depth=2),
}


def options(**changes: Any) -> RunOptions:
    return RunOptions(**{"steps": 4, "every": 2, "lr": 0.01, "timing": False, **changes})


def trained(spec: StackSpec, chosen: RunOptions) -> Run:
    return measure(spec, chosen)


# The loop, for any module


def model_of() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches_of() -> list[Pair]:
    source = torch.Generator().manual_seed(2)
    draw = [torch.randn(5, 5, generator=source, dtype=torch.float64) for _ in range(9)]
    return [(x[:, :3], x[:, 3:]) for x in draw]


def loss_of(model: nn.Module, batch: Pair) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_sgd_is_what_one_would_write_by_hand() -> None:
    model, twin = model_of(), model_of()
    chosen = options(steps=8, lr=0.3, warmup=4, optimizer="sgd")
    steps = list(train(Problem(model, batches_of(), loss_of), chosen))
    assert [step.step for step in steps] == list(range(9))
    for i, (step, batch) in enumerate(zip(steps, batches_of(), strict=True)):
        loss = loss_of(twin, batch)
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        assert step.loss == pytest.approx(loss.item(), rel=1e-12)
        assert step.grad_norm == pytest.approx(norm, rel=1e-12)
        if i == 8:
            assert (step.lr, step.update_ratio) == (None, None)
            break
        lr = 0.3 * min(1, (i + 1) / 4)
        size = total([p.detach() for p in twin.parameters()])
        assert step.lr == pytest.approx(lr, rel=1e-12)
        assert step.update_ratio == pytest.approx(lr * norm / size, rel=1e-9)
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads, strict=True):
                p.sub_(lr * g)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12)


def test_the_first_step_of_adamw_moves_each_number_by_the_learning_rate() -> None:
    model = model_of()
    before = [p.detach().clone() for p in model.parameters()]
    list(train(Problem(model, batches_of(), loss_of), options(steps=1, lr=0.01)))
    for old, p in zip(before, model.parameters(), strict=True):
        # m / sqrt(v) = sign g; torch's weight decay is 0.01.
        moved = (p - old * (1 - 0.01 * 0.01)).abs()
        assert torch.allclose(moved, torch.full_like(moved, 0.01), rtol=1e-4)


def test_the_observer_comes_every_so_many_steps_and_at_the_last() -> None:
    seen: list[int] = []
    problem = Problem(model_of(), batches_of(), loss_of)
    list(train(problem, options(steps=7, every=3), lambda step, _: seen.append(step)))
    assert seen == [0, 3, 6, 7]


def test_a_loss_that_is_not_finite_is_the_last_and_is_observed() -> None:
    seen: list[int] = []
    batches = batches_of()
    batches[5][0].fill_(math.nan)
    problem = Problem(model_of(), batches, loss_of)
    steps = list(train(problem, options(steps=8, every=3), lambda step, _: seen.append(step)))
    assert [step.step for step in steps] == list(range(6))
    assert seen == [0, 3, 5]
    assert math.isnan(steps[-1].loss)
    assert steps[-1].lr is None


def test_frozen_and_unused_parameters_stay() -> None:
    model = model_of()
    model.add_module("spare", nn.Linear(2, 2).double())
    model[0].weight.requires_grad_(requires_grad=False)  # type: ignore[index]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = Problem(
        model, batches_of(), lambda m, b: (m[2](m[1](m[0](b[0]))) - b[1]).square().mean()
    )  # type: ignore[index]
    list(train(loss, options(steps=2)))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.bias", "2.weight", "2.bias"}


def test_warmup_is_linear() -> None:
    chosen = options(lr=0.8, warmup=4)
    assert [chosen.training.learning_rate(step) for step in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    )
    assert options(lr=0.8).training.learning_rate(0) == 0.8


# A built stack: both engines see the same network


@pytest.mark.parametrize("name", STACKS)
def test_measured_gradients_are_those_that_train(name: str) -> None:
    spec = as_trained(replace(STACKS[name], dtype="float64"), options())
    found = train_stack(spec, 0, CPU, options())
    model = TaskNetwork(spec, 0, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(3):
        optimizer.zero_grad()
        model(build_task(spec, CPU).batch(0, step)).backward()
        if step % 2 == 0:
            every = [p.grad for p in model.parameters()]
            assert found.steps[step].grad_norm == pytest.approx(total(every), rel=1e-9)
            rows = [row for row in found.params if row.step == step]
            inside = [p for block in model.blocks for u in block.units for p in u.weights]
            norms = [float(p.detach().norm()) for p in inside]
            assert [row.norm for row in rows] == pytest.approx(norms, rel=1e-9)
            if "shared" not in name:  # what two units share has a part of its gradient in each
                grads = [total([p.grad]) for p in inside]
                assert [row.grad_norm for row in rows] == pytest.approx(grads, rel=1e-9)
        optimizer.step()


def branches(model: TaskNetwork) -> list[float]:
    """b_l of each layer."""
    return [unit.scale.factor for block in model.blocks for unit in block.units]


def test_stochastic_depth_draws_anew_for_each_batch() -> None:
    spec = as_trained(small("resnet", scheme="stochastic-depth", depth=4), options())
    model, shares = TaskNetwork(spec, 0, CPU), torch.zeros(4)
    for step in range(1000):
        model.begin(step)
        shares += torch.tensor(branches(model)) / 1000
    for layer, share in enumerate(shares.tolist(), 1):  # 5 standard deviations
        p = 1 - layer / 4 * 0.5
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 1000))


def test_a_dropped_branch_is_dropped_in_its_own_step_of_training() -> None:
    spec = as_trained(small("resnet", scheme="stochastic-depth", depth=4), options())
    found = train_stack(spec, 0, CPU, options(steps=6, every=1))
    model, seen = TaskNetwork(spec, 0, CPU), set()
    assert branches(model) == [float(b) for b in kept_at(found.layers, 0)]
    for step in range(7):
        model.begin(step)
        assert branches(model) == [float(b) for b in kept_at(found.layers, step)]
        seen.add(tuple(branches(model)))
    assert len(seen) > 1


def kept_at(rows: Sequence[LayerRecord], step: int) -> list[bool]:
    """Which branches got a gradient at a step, layer by layer."""
    return [row.branch_gain > 0 for row in rows if row.step == step and row.unit != "input"]


def normalise(model: TaskNetwork) -> None:
    """Every vector of a matrix along the embedding to length 1."""
    for name, p in model.named_parameters():
        if ".branch." in name and p.ndim == 2:
            columns = "down" in name or "out" in name
            p.data.div_(p.data.norm(dim=0 if columns else 1, keepdim=True))


def test_ngpt_keeps_its_vectors_at_length_1_after_every_update() -> None:
    sphere = small("transformer", scheme="ngpt", depth=2, dtype="float64", bias_var=None)
    spec = as_trained(sphere, options())
    found = train_stack(spec, 0, CPU, options(every=1))
    twin = TaskNetwork(spec, 0, CPU)
    optimizer = torch.optim.AdamW(twin.parameters(), 0.01)
    for step in found.steps:
        optimizer.zero_grad()
        loss = twin(build_task(spec, CPU).batch(0, step.step))
        loss.backward()
        assert step.loss == pytest.approx(loss.item(), rel=1e-9)
        (norm,) = {
            r.norm for r in found.params if (r.step, r.layer, r.param) == (step.step, 1, DOWN)
        }
        assert norm == pytest.approx(math.sqrt(spec.hidden), rel=1e-12)
        if step.update_ratio is None:
            break
        before = [p.detach().clone() for p in twin.parameters()]
        optimizer.step()
        normalise(twin)
        moved = [p.detach() - old for p, old in zip(twin.parameters(), before, strict=True)]
        assert step.update_ratio == pytest.approx(total(moved) / total(before), rel=1e-6)
    assert step.step == 4


DOWN = "branch.down.weight"


def total(tensors: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in tensors if x is not None))


@pytest.mark.parametrize("name", STACKS)
def test_measuring_changes_nothing_in_the_trajectory(name: str) -> None:
    often = trained(STACKS[name], options(every=1)).step_records
    never = trained(STACKS[name], options(every=1000)).step_records
    assert list(often) == list(never)
    assert len(often) == 5


def test_the_same_seed_is_the_same_trajectory_and_another_is_not() -> None:
    first = trained(STACKS["vectors"], options(seeds=2))
    torch.manual_seed(99)
    again = trained(STACKS["vectors"], options(seeds=2))
    assert first.step_records == again.step_records
    assert first.layer_records == again.layer_records
    one, two = ([r.loss for r in first.step_records if r.seed == seed] for seed in (0, 1))
    assert one != two
    alone = trained(STACKS["vectors"], options(seed=1))
    assert [r.loss for r in alone.step_records] == two


def test_every_measured_step_has_all_its_rows_and_current_weights() -> None:
    run = trained(STACKS["tokens"], options(steps=5))
    assert sorted({row.step for row in run.layer_records}) == [0, 2, 4, 5]
    assert sorted({row.step for row in run.param_records}) == [0, 2, 4, 5]
    for step in (0, 5):
        assert len([row for row in run.layer_records if row.step == step]) == 5
    norms = [[row.norm for row in run.param_records if row.step == step] for step in (0, 2)]
    assert norms[0] != norms[1]
    assert run.first_records == [row for row in run.layer_records if row.step == 0]
    # The verdict is that of the first step, whatever training does.
    assert run.summary.total_log10_gain == pytest.approx(
        run.first_records[0].log10_grad_norm - run.first_records[-1].log10_grad_norm  # type: ignore[operator]
    )
    assert run.summary.loss == run.step_records[0].loss


def test_training_that_breaks_down_is_a_finding() -> None:
    run = trained(STACKS["vectors"], options(steps=20, lr=1e30, optimizer="sgd"))
    assert run.summary.outcome == "diverged"
    assert run.summary.outcome_step == run.step_records[-1].step < 20
    assert run.layer_records[-1].step == run.step_records[-1].step
    assert run.summary.verdict == "healthy"
    assert math.isnan(run.summary.final_loss or 0.0)


def test_a_small_stack_learns_its_task() -> None:
    run = trained(
        small("mlp", depth=2, width=16, batch_size=64, classes=4, norm="pre"),
        options(steps=150, every=150),
    )
    assert run.summary.outcome == "converged"
    losses = [row.loss for row in run.step_records]
    assert sum(losses[-40:]) / 40 > 0.8 * (run.summary.loss_floor or 0.0)


# What training makes of a specification


def test_training_is_causal_and_has_a_loss_of_its_own() -> None:
    spec = as_trained(small("transformer", causal=False), options())
    assert (spec.causal, spec.loss) == (True, "ce")
    assert as_trained(spec, options()) == spec
    assert as_trained(small("mlp"), RunOptions()) == small("mlp")
    assert as_trained(small("ffn"), options()).causal is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (small("mlp", loss="mse"), "--loss mse"),
        (small("ffn", norm="pre", norm_kind="batchnorm"), "--norm-kind batchnorm"),
        (small("mlp", classes=33), "--classes 33"),
        (small("mlp", dtype="float16"), "--dtype float16"),
    ],
)
def test_what_cannot_be_trained_is_refused(spec: StackSpec, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        measure(spec, options())


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0.0}, {"lr": math.inf}, {"warmup": -1}, {"every": 0}, {"optimizer": "adam"}],
)
def test_bad_options_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(changes))}"):
        options(**changes)


@pytest.mark.parametrize("name", TRAINING_DEFAULTS)
def test_options_of_training_need_steps(name: str) -> None:
    with pytest.raises(UsageError, match="applies to training"):
        RunOptions(**{name: TRAINING_DEFAULTS[name]})


def test_steps_are_part_of_the_key_and_without_them_it_is_the_old_one() -> None:
    spec = StackSpec()
    keys = {run_key(spec, options(**changes)) for changes in ({}, {"steps": 9}, {"lr": 0.5})}
    assert len(keys | {run_key(spec, RunOptions())}) == 4
    before = {"spec": spec.to_json(), "seed": 0, "seeds": 1, "raw_range": False}
    digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert run_key(spec, RunOptions()) == digest[:8]
