"""Runs of a watched model are runs like any other: stored, read, named, compared, judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from records import run_of, spec_of
from zoo import WIDTH, Residual, Words, chain

import gradflow
from gradflow.errors import UsageError
from gradflow.judging.gate import Bounds, against_baseline, judge_run
from gradflow.judging.remarks import same_network
from gradflow.runs.naming import names, shared
from gradflow.runs.records import Run
from gradflow.runs.results import read_results
from gradflow.showing.page.report import page
from gradflow.specs.model_spec import ModelSpec, spec_from_json
from gradflow.specs.stack import StackSpec, run_key


def spec(**fields: object) -> ModelSpec:
    made = {
        "model": "GPT2Model",
        "units": "h.0 h.1 h.1#2 head",
        "kinds": "Block Block Block Linear",
        "shape": "2x7x32",
        "dtype": "float32",
        "parameters": 1234,
    }
    return ModelSpec(**(made | fields))


def watched(model: torch.nn.Module, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    with gradflow.watch(model) as flow:
        model(torch.randn(4, WIDTH)).square().sum().backward()
    return flow.run


def model_of(depth: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    return chain(Residual, depth=depth)


def test_a_model_spec_says_what_the_readers_ask() -> None:
    made = spec()
    assert (made.depth, made.units_per_block, made.block) == (4, 1, "GPT2Model")
    assert made.title == "GPT2Model, 4 layers (Block, Linear)"
    assert made.details == "stream 2x7x32, 1,234 parameters watched, training mode"
    assert made.slug == "GPT2Model-d4"
    assert (made.kind_of("h.1#2"), made.kind_of("head")) == ("Block", "Linear")


def test_both_kinds_of_spec_go_through_json() -> None:
    for made in (spec(), spec(training=False, input_has_gradient=False), spec_of(norm="post")):
        again = spec_from_json(json.loads(json.dumps(made.to_json())))
        assert again == made
        assert type(again) is type(made)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (spec().to_json() | {"color": 1}, UsageError),
        (spec().to_json() | {"units": "", "kinds": ""}, UsageError),
        (spec().to_json() | {"kinds": "Block"}, UsageError),
        (spec().to_json() | {"parameters": "many"}, TypeError),
        ([], TypeError),
    ],
)
def test_a_damaged_spec_is_refused(values: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        spec_from_json(values)


def test_a_stored_run_is_read_back(tmp_path: Path) -> None:
    run = gradflow.save(watched(model_of()), tmp_path)
    assert run.path is not None
    again = gradflow.load(run.path)
    assert again.spec == run.spec
    assert again.summary == run.summary
    assert list(again.layer_records) == list(run.layer_records)
    assert list(again.param_records) == list(run.param_records)
    assert "Chain-d4" in run.path.name


def test_two_trainings_of_one_model_are_not_said_to_be_one_network() -> None:
    one, other = (watched(model_of(), seed) for seed in (0, 1))
    assert run_key(one.spec, one.options) == run_key(other.spec, other.options)
    assert list(same_network([("one", one), ("other", other)])) == []


def test_the_report_shows_it_beside_a_stack(tmp_path: Path) -> None:
    gradflow.save(watched(model_of()), tmp_path)
    gradflow.save(watched(Words()), tmp_path)
    stack = StackSpec(depth=3, block="mlp", width=8, batch_size=4)
    gradflow.save(gradflow.measure(stack, gradflow.RunOptions(timing=False)), tmp_path)
    results = read_results(tmp_path)
    assert results.skipped == ()
    assert {run.spec.block for run in results.runs} == {"Chain", "Words", "mlp"}
    text = page(results)
    assert "Chain" in text
    assert "Words" in text


def test_models_are_named_by_their_class() -> None:
    runs = [watched(model_of(2)), watched(model_of(4)), watched(Words())]
    found = [name.run for name in names(runs)]
    assert found == ["Chain, depth 2", "Chain, depth 4", "Words, depth 2"]
    mixed = [name.design for name in names([watched(Words()), run_of()])]
    assert mixed[0] == "Words"
    assert mixed[1].startswith("residual mlp, pre-norm")
    assert "own loss" in shared(runs[:2])


def test_the_gate_takes_models() -> None:
    run = watched(model_of())
    assert judge_run(run, Bounds(max_decades=1)).passed
    assert not judge_run(run, Bounds(max_decades=1e-9)).passed
    assert against_baseline(run, watched(model_of()), 0.01).passed
    frozen = model_of()
    frozen.blocks[1].requires_grad_(requires_grad=False)
    reasons = judge_run(watched(frozen), Bounds(max_decades=1)).reasons
    assert any("blocks.1" in reason for reason in reasons)


def test_the_gate_judges_every_step(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradflow.watch(model) as flow:
        for scale in (1.0, 1.0, 0.0):
            optimizer.zero_grad()
            (scale * model(torch.ones(2, WIDTH)).square().sum()).backward()
            optimizer.step()
    run = gradflow.load(flow.save(tmp_path))
    reasons = judge_run(run, Bounds(max_decades=1)).reasons
    assert reasons
    assert all(reason.startswith("seed 0, step 2") for reason in reasons if "more" not in reason)


def test_an_input_without_gradient_is_missing_and_not_a_fault() -> None:
    model = model_of()
    del model.first
    model.first = torch.nn.Identity()
    run = watched(model)
    assert not run.spec.input_has_gradient
    assert run.layer_records[0].grad_norm is None
    assert run.summary.verdict == "healthy"
    first, last = run.layer_records[1], run.layer_records[-1]
    total = first.log10_grad_norm - last.log10_grad_norm
    assert run.summary.total_log10_gain == pytest.approx(total, rel=1e-12)
    assert judge_run(run, Bounds(max_decades=1)).passed
