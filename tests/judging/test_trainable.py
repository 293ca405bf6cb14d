"""How deep a design can be, from runs at several depths."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from records import layer_rows, run_of, spec_of

from gradflow.errors import UsageError
from gradflow.judging.comparison import Comparison, compare_runs
from gradflow.judging.outlook import Reach, healthy_reach
from gradflow.judging.remarks import NOT_FINITE
from gradflow.judging.trainable import TrainableDepth, trainable_depths
from gradflow.measuring.columns import TRAINED, with_theory
from gradflow.runs.records import LayerRecord, Run
from gradflow.showing.formats import (
    comparison_csv,
    comparison_json,
    comparison_markdown,
    comparison_rows,
)
from gradflow.showing.terminal.many_runs import depth_lines
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.theory import predict, total_decades


def run(depth: int, profile: list[float], **options: str) -> Run:
    spec = spec_of(depth=depth, **options)
    return run_of(spec, list(layer_rows(spec, profile)))


def exponential(depth: int, rate: float = -0.1) -> Run:
    """`rate` decades a layer from output to input: the threshold of 3 is at depth 3 / |rate|."""
    return run(depth, [rate * (depth - layer) for layer in range(depth + 1)])


def power_law(depth: int) -> Run:
    """|g| = (1 + D) / (1 + l): three decades at depth 999."""
    return run(depth, [math.log10((1 + depth) / (1 + layer)) for layer in range(depth + 1)])


def judged(*runs: Run) -> Comparison:
    return compare_runs(runs, runs[0])


def only(*runs: Run) -> TrainableDepth:
    (found,) = trainable_depths(judged(*runs))
    return found


@pytest.mark.parametrize("rate", [-0.1, 0.1])
@pytest.mark.parametrize(
    ("depths", "healthy", "lost", "source"),
    [
        ((12, 20), 20, None, "trend"),
        ((10, 20, 40, 80), 20, 40, "interpolated"),
        ((40, 80), None, 40, "trend"),
    ],
)
def test_an_exponential_design_has_the_depth_of_its_rate(
    rate: float, depths: tuple[int, ...], healthy: int | None, lost: int | None, source: str
) -> None:
    found = only(*(exponential(depth, rate) for depth in depths))
    assert (found.healthy, found.lost, found.source) == (healthy, lost, source)
    assert found.depth == pytest.approx(30)


def test_a_power_law_has_the_depth_of_its_power() -> None:
    assert only(power_law(30), power_law(100)).depth == pytest.approx(999, rel=0.01)
    found = only(power_law(300), power_law(3000))
    assert (found.healthy, found.lost) == (300, 3000)
    assert found.depth == pytest.approx(999, rel=0.01)


def test_a_flat_design_has_no_end() -> None:
    found = only(run(3, [0.0] * 4), run(30, [0.0] * 31))
    assert (found.healthy, found.lost, found.depth, found.source) == (30, None, None, None)
    assert found.sentence.endswith(": beyond 30, no end by its trend")


def test_where_values_are_lost_only_the_two_depths_are_known() -> None:
    found = only(exponential(10), run(20, [math.nan] * 20 + [0.0]))
    assert (found.healthy, found.lost, found.depth) == (10, 20, None)
    assert found.sentence.endswith(": between 10 and 20")


def test_designs_at_one_depth_say_nothing() -> None:
    assert trainable_depths(judged(exponential(10), power_law(10))) == []


def plain_linear(weight_var: float) -> StackSpec:
    """Plain linear layers without a norm."""
    return spec_of(
        shortcut="plain", norm="none", activation="linear", init="normal", weight_var=weight_var
    )


def predicted(spec: StackSpec, depths: tuple[int, ...] = (4, 8)) -> TrainableDepth:
    """Of runs that measured what theory says."""
    runs = [replace(spec, depth=depth) for depth in depths]
    return only(*(with_theory(run_of(each, rows_by_theory(each))) for each in runs))


def rows_by_theory(spec: StackSpec) -> list[LayerRecord]:
    profile = predict(spec).log10_grad_norm
    assert profile is not None
    return list(layer_rows(spec, profile))


@pytest.mark.parametrize("weight_var", [0.5, 0.9, 2.0])
def test_theory_has_linear_layers_lose_the_gradient_at_the_depth_of_their_variance(
    weight_var: float,
) -> None:
    """|dL/dx| / |dL/dy| is sqrt(weight_var): three decades after 6 / |log10 weight_var| layers."""
    found = predicted(plain_linear(weight_var))
    assert found.predicted == math.floor(6 / abs(math.log10(weight_var)))
    assert found.predicted_at_least is False
    assert found.sentence.endswith(f"; by theory {found.predicted}")


def test_theory_has_linear_layers_of_variance_one_healthy_at_every_depth_that_is_tried() -> None:
    found = predicted(plain_linear(1.0), (4, 8))
    assert (found.predicted, found.predicted_at_least) == (1000, True)
    assert found.sentence.endswith("; by theory 1,000 at least")
    deeper = predicted(replace(plain_linear(1.0), width=4096), (4, 1500))
    assert (deeper.predicted, deeper.predicted_at_least) == (1500, True)


def test_theory_may_have_a_design_healthy_at_no_depth() -> None:
    found = predicted(plain_linear(1e-7))
    assert (found.predicted, found.predicted_at_least) == (0, False)
    assert found.sentence.endswith("; by theory at no depth")


@pytest.mark.parametrize(
    ("reason", "has_theory"), [(None, True), (NOT_FINITE, True), (TRAINED, False)]
)
def test_there_is_no_prediction_where_theory_is_withheld(
    reason: str | None, has_theory: bool
) -> None:
    run = with_theory(exponential(10))
    summary = replace(run.summary, theory_reason=reason)
    if reason:
        summary = replace(summary, theory_band=None)
    other = replace(exponential(20), summary=replace(exponential(20).summary, theory_band=None))
    found = only(replace(run, summary=summary), other)
    assert (found.predicted is not None) == has_theory
    assert (found.predicted_at_least is not None) == has_theory
    assert ("theory" in found.sentence) == has_theory


def test_every_output_shows_it() -> None:
    shown = judged(exponential(20), exponential(40), exponential(80))
    line = "about 30, between 20 and 40"
    assert line in depth_lines(shown)[0]
    assert line in comparison_markdown(shown)
    (stored,) = json.loads(comparison_json(shown))["trainable_depths"]
    assert (stored["healthy"], stored["lost"]) == (20, 40)
    assert "trainable_depth,predicted_trainable_depth" in comparison_csv(shown)
    (row, *_) = comparison_rows(shown)
    assert row["trainable_depth"] == pytest.approx(30)
    assert row["predicted_trainable_depth"] is None
    assert "Trainable" not in comparison_markdown(judged(exponential(20)))


def test_every_output_shows_the_prediction_beside_it() -> None:
    specs = [replace(plain_linear(0.5), depth=depth) for depth in (10, 20)]
    shown = judged(*(with_theory(run_of(spec, rows_by_theory(spec))) for spec in specs))
    assert depth_lines(shown)[0].endswith("; by theory 19")
    assert "; by theory 19" in comparison_markdown(shown)
    content = json.loads(comparison_json(shown))
    assert content["trainable_depths"][0]["predicted"] == 19
    for row in content["rows"]:
        assert row["predicted_trainable_depth"] == 19
        assert row["predicted_trainable_depth_at_least"] is False
    first, *_ = csv.DictReader(io.StringIO(comparison_csv(shown)))
    assert first["predicted_trainable_depth"] == "19"


def test_a_scheme_that_few_layers_cannot_have_is_predicted() -> None:
    with pytest.raises(UsageError, match="--depth 1"):
        StackSpec(scheme="deepscalelm", depth=1)
    spec = StackSpec(scheme="deepscalelm", depth=10)
    assert abs(total_decades(replace(spec, depth=20))) < 3
    assert healthy_reach(spec, RunOptions(), 20) == Reach(20, at_least=True)
