"""The gate: bounds and baselines against hand-made runs; what has no gradient never passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import ENVIRONMENT, layer_rows, run_of, spec_of

from gradflow.errors import BaselineError
from gradflow.judging.gate import Bounds, against_baseline, judge_run
from gradflow.runs.records import LayerRecord, ParamRecord, Run
from gradflow.specs.run_options import RunOptions

ANYTHING = Bounds()
GENEROUS = Bounds(max_decades=1e9, min_gain=0.0, max_gain=1e9, no_nonfinite=True)


def run_with(profile: list[float | None], seeds: int = 1, **columns: Any) -> Run:
    spec = spec_of(depth=len(profile) - 1)
    rows = [row for seed in range(seeds) for row in layer_rows(spec, profile, seed, **columns)]
    return run_of(spec, rows, options=RunOptions(seeds=seeds), summary=run_of().summary)


HEALTHY = run_with([0.1, 0.0, 0.2, 0.0])


# --- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "limit", "passes"),
    [
        ([2.0, 0.0, 0.0, 0.0], 2.0, True),
        ([2.0, 0.0, 0.0, 0.0], 1.99, False),
        ([-2.0, 0.0, 0.0, 0.0], 2.0, True),
        ([-2.0, 0.0, 0.0, 0.0], 1.99, False),
        ([0.0, 9.0, -9.0, 0.0], 0.0, True),  # the ends count
        ([1.0, 0.0, 0.0, 1.0], 0.0, True),
    ],
)
def test_decades_between_the_ends(profile: list[float | None], limit: float, passes: bool) -> None:
    assert judge_run(run_with(profile), Bounds(max_decades=limit)).passed is passes


@pytest.mark.parametrize(
    ("low", "high", "passes"),
    [
        (None, 1.25, True),
        (None, 1.24, False),
        (1.25, None, True),
        (1.26, None, False),
        (1.0, 1.5, True),
        (None, 0.0, False),  # zero is a bound, too
        (0.0, None, True),
    ],
)
def test_gains_of_all_units(low: float | None, high: float | None, passes: bool) -> None:
    assert judge_run(HEALTHY, Bounds(min_gain=low, max_gain=high)).passed is passes


def test_one_unit_of_one_seed_breaks_the_bound() -> None:
    spec = spec_of()
    rows = [
        *layer_rows(spec, [0.0] * 4),
        *layer_rows(spec, [0.0] * 4, seed=1, gain={2: 7.0}),
    ]
    found = judge_run(run_of(spec, rows, options=RunOptions(seeds=2)), Bounds(max_gain=2.0))
    assert found.reasons == ("seed 1, layer 2 (mlp): gain is 7",)


def test_what_was_compared_is_said_with_what_was_found() -> None:
    found = judge_run(HEALTHY, Bounds(3.0, 0.5, 2.0, no_nonfinite=True))
    assert found.compared == (
        "a finite gradient, not zero, at 4 places in each of 1 seeds",
        "decades between output and input, at most 3, found 0.10",
        "gain of every unit, 0.5 to 2, found 1.25 to 1.25",
        "no NaN or infinity in any layer",
    )
    assert found.passed


def test_many_reasons_are_counted() -> None:
    found = judge_run(run_with([0.0] * 10), Bounds(max_gain=1.0))
    assert len(found.reasons) == 4
    assert found.reasons[-1] == "... and 6 more like the last"


@pytest.mark.parametrize("column", ["act_max_abs", "act_rms", "gain"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_anywhere_fails_where_it_is_asked_for(column: str, value: float) -> None:
    run = run_with([0.0] * 4, **{column: {2: value}})
    assert not judge_run(run, Bounds(no_nonfinite=True)).passed


# --- zero is not success ------------------------------------------------------------------------

BAD = (math.nan, math.inf, -math.inf, None)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("bounds", [ANYTHING, GENEROUS], ids=["no bounds", "generous bounds"])
def test_a_gradient_that_is_none_never_passes(
    value: float | None, place: int, bounds: Bounds
) -> None:
    profile: list[float | None] = [0.0] * 4
    profile[place] = value
    assert not judge_run(run_with(profile), bounds).passed
    assert not judge_run(run_with(profile, seeds=3), bounds).passed


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", [1, 2, 3])
def test_parameters_without_a_gradient_never_pass(value: float | None, place: int) -> None:
    run = run_with([0.0] * 4, log10_param_grad_norm={place: value})
    assert not judge_run(run, GENEROUS).passed


def test_parameters_whose_norm_is_missing_are_not_forgotten() -> None:
    columns = {"param_norm": {2: None}, "log10_param_grad_norm": {2: None}}
    run = run_with([0.0] * 4, **columns)
    param = ParamRecord(0, 0, 2, "mlp", "weight", "2x2", 4, 1.0, 1.0, 0.0, 0)
    assert judge_run(run, GENEROUS).passed  # a unit without parameters
    assert not judge_run(replace(run, param_records=[param]), GENEROUS).passed


def test_a_run_that_is_not_finite_is_told_by_where_that_begins_and_one_line_for_each_kind() -> None:
    """Layer 2 overflows on the way forward; whatever follows is NaN."""
    nan, inf = math.nan, math.inf
    spec = spec_of()
    columns = {
        "act_max_abs": {2: inf, 3: nan},
        "gain": dict.fromkeys((1, 2, 3), nan),
        "log10_param_grad_norm": dict.fromkeys((1, 2, 3), nan),
    }
    rows = [row for seed in (0, 1) for row in layer_rows(spec, [nan] * 4, seed, **columns)]
    run = run_of(spec, rows, options=RunOptions(seeds=2))
    assert run.summary.verdict == "nonfinite"
    found = judge_run(run, Bounds(3.0, 0.5, 2.0, no_nonfinite=True))
    lost = "is NaN or infinity"
    assert found.reasons == (
        "NaN or infinity begins at layer 2 (mlp), forward pass",
        f"seed 0, layer 0 (input): gradient {lost}, and at 7 more places",
        f"seed 0, layer 1 (mlp): gradient of the parameters {lost}, and at 5 more places",
        "seed 0, layer 1 (mlp): gain is NaN, and at 5 more places",
        "seed 0, layer 1 (mlp): NaN or infinity, and at 5 more places",
    )
    assert "nan" not in " ".join(found.compared)
    against = against_baseline(run, run_with([0.0] * 4, seeds=2), 0.1).reasons
    there = "in the baseline a number"
    assert against == (
        *found.reasons[:3],
        f"seed 0, layer 0 (input): |g| {lost}, {there}, and at 7 more places",
        f"seed 0, layer 1 (mlp): |dW| {lost}, {there}, and at 5 more places",
    )


def test_kinds_are_counted_each_by_itself() -> None:
    found = judge_run(run_with([-math.inf, 0.0, None, -math.inf, math.nan, 0.0]), ANYTHING)
    assert found.reasons == (
        "seed 0, layer 0 (input): gradient is zero, and at 1 more place",
        "seed 0, layer 2 (mlp): gradient is missing",
        "seed 0, layer 4 (mlp): gradient is NaN or infinity",
    )


def test_elements_that_are_not_finite_never_pass() -> None:
    assert not judge_run(run_with([0.0] * 4, nonfinite={1: 1}), ANYTHING).passed


@pytest.mark.parametrize("keep", range(4))
def test_rows_that_are_not_there_never_pass(keep: int) -> None:
    run = replace(HEALTHY, layer_records=HEALTHY.layer_records[:keep])
    assert not judge_run(run, GENEROUS).passed


def test_a_seed_that_is_not_there_never_passes() -> None:
    run = replace(HEALTHY, options=RunOptions(seeds=2))
    assert judge_run(run, ANYTHING).reasons == ("seed 1: 0 of 4 places have a gradient",)


@pytest.mark.parametrize("value", BAD)
def test_gains_that_are_none_break_every_bound(value: float | None) -> None:
    run = run_with([0.0] * 4, gain={2: value})
    assert not judge_run(run, Bounds(min_gain=0.0, max_gain=1e300)).passed


CELLS = st.sampled_from([None, math.nan, math.inf, -math.inf, 0.0, 1.0, -5.0])


@given(
    profile=st.lists(CELLS, min_size=4, max_size=4),
    params=st.lists(CELLS, min_size=4, max_size=4),
    rtol=st.floats(0, 1e6),
)
def test_whatever_passes_has_a_finite_gradient_everywhere(
    profile: list[float | None], params: list[float | None], rtol: float
) -> None:
    run = run_with(profile, log10_param_grad_norm=dict(enumerate(params)))
    finite = all(v is not None and math.isfinite(v) for v in [*profile, *params[1:]])
    for found in (judge_run(run, GENEROUS), against_baseline(run, run, rtol)):
        assert found.passed is finite


# --- baselines ----------------------------------------------------------------------------------


def shifted(run: Run, column: str, factor: float, place: int = 2) -> Run:
    rows = list(run.layer_records)
    value = getattr(rows[place], column) + math.log10(factor)
    rows[place] = replace(rows[place], **{column: value})
    return replace(run, layer_records=rows)


@pytest.mark.parametrize("column", ["log10_grad_norm", "log10_param_grad_norm"])
@pytest.mark.parametrize(
    ("factor", "rtol", "passes"),
    [(1.0, 0.0, True), (1.09, 0.1, True), (1.11, 0.1, False), (1 / 1.11, 0.1, False)],
)
def test_norms_are_held_against_the_baseline(
    column: str, factor: float, rtol: float, passes: bool
) -> None:
    found = against_baseline(shifted(HEALTHY, column, factor), HEALTHY, rtol)
    assert found.passed is passes
    if not passes:
        assert found.reasons[0].startswith("seed 0, layer 2 (mlp): |")


def test_differences_beyond_float64_are_seen() -> None:
    low, lower = run_with([-3000.0] * 4), run_with([-3001.0] * 4)
    assert not against_baseline(low, lower, 1.0).passed


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (run_of(spec_of(width=64)), "width 64 there, 128 here"),
        (run_of(spec_of(init="xavier")), "init xavier there, he here"),
        (run_of(options=RunOptions(seed=1)), "seed 1 there, 0 here"),
        (run_of(options=RunOptions(raw_range=True)), "raw_range True there, False here"),
        (run_of(options=RunOptions(compile=True)), "compile True there, False here"),
        (run_of(environment=ENVIRONMENT | {"device": "cuda"}), "device cuda there, cpu here"),
    ],
)
def test_a_baseline_of_another_network_is_refused(other: Run, says: str) -> None:
    with pytest.raises(BaselineError, match=says):
        against_baseline(run_of(), other, 0.1)


def test_a_baseline_with_other_rows_is_refused() -> None:
    rows: list[LayerRecord] = [replace(row, unit="conv") for row in HEALTHY.layer_records]
    with pytest.raises(BaselineError, match="other units"):
        against_baseline(HEALTHY, replace(HEALTHY, layer_records=rows), 0.1)


def test_where_the_baseline_was_measured_is_said() -> None:
    other = run_of(environment=ENVIRONMENT | {"torch": "2.12.0", "threads": 9})
    found = against_baseline(run_of(), other, 0.1)
    assert found.passed
    assert found.compared[-2:] == (
        "  beside a baseline with torch 2.12.0 there, 2.13.0 here",
        "  beside a baseline with threads 9 there, 1 here",
    )


def test_limits_and_measuring_options_are_no_other_network() -> None:
    other = run_of(options=RunOptions(repeats=9, vanishing=1.0, timing=False))
    assert against_baseline(run_of(), other, 0.1).passed


def test_two_judgements_say_together_what_both_say_once() -> None:
    both = judge_run(HEALTHY, ANYTHING) + against_baseline(HEALTHY, HEALTHY, 0.1)
    assert len(both.compared) == 2


def test_every_measured_step_of_a_training_is_judged() -> None:
    spec, options = spec_of(), RunOptions(steps=1)
    first = list(layer_rows(spec, [0.0] * 4))
    later = [replace(row, step=1) for row in layer_rows(spec, [-9.0, -6.0, -3.0, 0.0])]
    assert judge_run(run_of(spec, first), Bounds(max_decades=1.0)).passed
    judgement = judge_run(run_of(spec, [*first, *later], options=options), Bounds(max_decades=1.0))
    assert not judgement.passed
    assert "step 1" in judgement.reasons[0]
    broken = [replace(row, nonfinite=3) for row in later]
    lost = run_of(spec, [*first, *broken], options=options)
    assert not judge_run(lost, Bounds(no_nonfinite=True)).passed
