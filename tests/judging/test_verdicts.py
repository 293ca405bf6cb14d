"""Verdicts, rates and trends of hand-made profiles."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import layer_rows, spec_of
from scipy import stats

from gradflow.judging.assembly import summarise_run
from gradflow.judging.verdicts import VERDICTS, verdict_named
from gradflow.runs.records import Summary
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

NAN, INF = math.nan, math.inf


def judged(
    profile: list[float | None],
    spec: StackSpec | None = None,
    options: RunOptions | None = None,
    **columns: Any,
) -> Summary:
    """The summary of one seed with this profile, from the input up."""
    spec = spec or spec_of(depth=len(profile) - 1)
    return summarise_run(layer_rows(spec, profile, **columns), spec, options or RunOptions())


def judged_seeds(
    profiles: list[list[float]], spec: StackSpec | None = None, **columns: Any
) -> Summary:
    spec = spec or spec_of(depth=len(profiles[0]) - 1)
    rows = [row for seed, p in enumerate(profiles) for row in layer_rows(spec, p, seed, **columns)]
    return summarise_run(rows, spec, RunOptions(seeds=len(profiles)))


# Profile from the input up, columns that differ, verdict, and where: layer and pass.
CASES: dict[str, tuple[list[float | None], dict[str, Any], str, tuple[int, str] | None]] = {
    "flat": ([0, 0, 0, 0], {}, "healthy", None),
    "just healthy below": ([-3, -2, -1, 0], {}, "healthy", None),
    "just healthy above": ([3, 2, 1, 0], {}, "healthy", None),
    "vanishing": ([-3.1, -2, -1, 0], {}, "vanishing", None),
    "vanishing beyond float64": ([-3000, -2000, -1000, 0], {}, "vanishing", None),
    "exploding": ([3.1, 2, 1, 0], {}, "exploding", None),
    "a dip that recovers": ([0, -9, 9, 0], {}, "healthy", None),
    "zero gradient": ([-INF, -INF, 0, 0], {}, "dead", (1, "backward")),
    "zero at the input": ([-INF, 0, 0, 0], {}, "dead", (0, "backward")),
    "no gradient": ([None, None, 0, 0], {}, "dead", (1, "backward")),
    "zero parameter gradient": (
        [0, 0, 0, 0],
        {"log10_param_grad_norm": {2: -INF}},
        "dead",
        (2, "backward"),
    ),
    "no parameter gradient": (
        [0, 0, 0, 0],
        {"log10_param_grad_norm": {1: None}},
        "dead",
        (1, "backward"),
    ),
    "no parameters": (
        [0, 0, 0, 0],
        {"param_norm": None, "log10_param_grad_norm": None},
        "healthy",
        None,
    ),
    "forward before backward": (
        [0, 0, 0, 0],
        {"act_max_abs": {2: INF, 3: NAN}, "nonfinite": {3: 1}},
        "nonfinite",
        (2, "forward"),
    ),
    "infinite input": ([0, 0, 0, 0], {"act_max_abs": {0: INF}}, "nonfinite", (0, "forward")),
    "unknown activation": ([0, 0, 0, 0], {"act_max_abs": None}, "nonfinite", (0, "forward")),
    "backward from the top": (
        [NAN, NAN, NAN, 0],
        {"nonfinite": {1: 9, 2: 1}},
        "nonfinite",
        (2, "backward"),
    ),
    "norm overflows, no element does": ([0, INF, 0, 0], {}, "nonfinite", (1, "backward")),
    "only a parameter's gradient overflows": (
        [0, 0, 0, 0],
        {"log10_param_grad_norm": {2: INF}},
        "nonfinite",
        (2, "backward"),
    ),
    "lost before it dies": (
        [-INF, -INF, NAN, 0],
        {"nonfinite": {2: 1}},
        "nonfinite",
        (2, "backward"),
    ),
    "dead before it is lost": ([NAN, -INF, 0, 0], {"nonfinite": {0: 1}}, "dead", (1, "backward")),
}


@pytest.mark.parametrize(("profile", "columns", "verdict", "where"), CASES.values(), ids=CASES)
def test_verdict_and_place(
    profile: list[float | None],
    columns: dict[str, Any],
    verdict: str,
    where: tuple[int, str] | None,
) -> None:
    summary = judged(profile, **columns)
    assert summary.verdict == verdict
    assert (summary.first_layer, summary.first_pass) == (where or (None, None))
    assert summary.advice.startswith(VERDICTS[verdict].meaning)


def test_the_unit_is_named_where_a_layer_has_two() -> None:
    spec = spec_of(depth=2, block="transformer")
    lost = judged([0, 0, 0, 0, 0], spec, nonfinite={2: 1, 3: 1})
    assert (lost.first_layer, lost.first_unit) == (2, "attention")


@pytest.mark.parametrize("threshold", ["vanishing", "exploding"])
def test_thresholds_are_options(threshold: str) -> None:
    profile = [-1.0, 0.0] if threshold == "vanishing" else [1.0, 0.0]
    assert judged(profile).verdict == "healthy"
    assert judged(profile, options=RunOptions(**{threshold: 0.9})).verdict == threshold


def test_seeds_that_disagree_are_unstable_and_counted() -> None:
    summary = judged_seeds([[0, 0], [-4, 0], [0, 0]])
    assert summary.verdict == "unstable"
    assert "Of 3: 2 healthy, 1 vanishing." in summary.advice
    assert "--seeds" in summary.advice
    assert summary.first_layer is None


def test_unstable_names_the_place_where_a_seed_loses_values() -> None:
    summary = judged_seeds([[0.0, 0.0, 0.0], [-math.inf, -math.inf, 0.0]])
    assert (summary.verdict, summary.first_layer) == ("unstable", 1)
    assert summary.total_log10_gain is None


SEEDS = st.lists(
    st.lists(st.sampled_from([-INF, -4.0, -1.0, 0.0, 0.5, NAN]), min_size=4, max_size=4),
    min_size=1,
    max_size=3,
)


@given(SEEDS)
def test_verdict_does_not_depend_on_the_order_of_the_seeds(profiles: list[list[float]]) -> None:
    def facts(order: tuple[list[float], ...]) -> tuple[Any, ...]:
        s = judged_seeds(list(order))
        numbers = (s.total_log10_gain, s.log10_gain_per_layer, s.log10_gain_per_layer_high)
        rounded = [None if n is None else round(n, 9) for n in numbers]
        return s.verdict, s.advice, s.first_layer, s.first_pass, s.trend, *rounded

    orders = list(permutations(profiles))
    assert {facts(order) for order in orders} == {facts(orders[0])}


PROFILES = st.lists(st.floats(-50, 50), min_size=3, max_size=12)


@given(PROFILES)
def test_rate_and_interval_are_those_of_scipy(profile: list[float]) -> None:
    summary = judged(list(profile))
    gains = np.array(profile[:-1]) - np.array(profile[1:])
    found = summary.log10_gain_per_layer_low, summary.log10_gain_per_layer_high
    assert summary.total_log10_gain == pytest.approx(gains.sum(), abs=1e-9)
    assert summary.log10_gain_per_layer == pytest.approx(gains.mean(), abs=1e-9)
    error = stats.sem(gains)
    if error > 0:  # scipy has no interval where nothing varies, or where its square underflows
        low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(), error)
        assert found == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_the_rate_counts_layers_not_units() -> None:
    spec = spec_of(depth=2, block="transformer")
    summary = judged([-4.0, -3.0, -2.0, -1.0, 0.0], spec)
    assert summary.log10_gain_per_layer == pytest.approx(-2.0)
    assert summary.efolding_layers == pytest.approx(1 / (2 * math.log(10)))


def test_one_gain_has_no_interval() -> None:
    summary = judged([1.0, 0.0])
    assert summary.log10_gain_per_layer == 1.0
    assert summary.log10_gain_per_layer_low is None
    assert summary.log10_gain_per_layer_high is None


def test_no_change_has_no_efolding_depth() -> None:
    assert judged([0.0, 0.0]).efolding_layers is None


DEPTH = 40
LAYERS = np.arange(DEPTH + 1)
# Law of log10 |g| in the layer, the trend, the depth at which it has changed by three decades.
LAWS: dict[str, tuple[np.ndarray, str, float | None]] = {
    "vanishing by a tenth of a decade": (0.1 * LAYERS, "exponential", 30.0),
    "exploding by a decade": (-1.0 * LAYERS, "exponential", 3.0),
    "so slowly that no depth matters": (-0.0 * LAYERS + 1e-3 * (LAYERS > 20), "flat", None),
    "1 / (1 + l)": (-np.log10(1 + LAYERS), "power law", 999.0),
    "(1 + l)^2": (2 * np.log10(1 + LAYERS), "power law", 10**1.5 - 1),
    "(1 + l)^-0.1": (-0.1 * np.log10(1 + LAYERS), "power law", None),
    "flat": (0.0 * LAYERS, "flat", None),
}


@pytest.mark.parametrize(("law", "trend", "healthy_depth"), LAWS.values(), ids=LAWS)
def test_trend_of_an_exact_law(law: np.ndarray, trend: str, healthy_depth: float | None) -> None:
    summary = judged(law.tolist())
    assert summary.trend == trend
    assert summary.healthy_depth == pytest.approx(healthy_depth)


def test_healthy_depth_uses_the_threshold_of_its_direction() -> None:
    options = RunOptions(vanishing=1.0, exploding=2.0)
    vanishing = judged((0.1 * LAYERS).tolist(), options=options)
    exploding = judged((-0.1 * LAYERS).tolist(), options=options)
    assert vanishing.healthy_depth == pytest.approx(10)
    assert exploding.healthy_depth == pytest.approx(20)


@pytest.mark.parametrize("depth", [1, 2])
def test_two_points_make_no_trend(depth: int) -> None:
    summary = judged([1.0] * depth + [0.0])
    assert (summary.trend, summary.healthy_depth) == (None, None)


def test_spread_of_parameter_gradients_is_within_one_kind_of_unit() -> None:
    spec = spec_of(depth=2, block="transformer")
    logs = {1: 0.0, 2: 5.0, 3: 1.5, 4: 5.5}
    summary = judged([0.0] * 5, spec, log10_param_grad_norm=logs)
    assert summary.param_grad_spread == 1.5


def test_a_dead_parameter_leaves_no_spread() -> None:
    assert judged([0, 0, 0], log10_param_grad_norm={1: -INF}).param_grad_spread is None


@pytest.mark.parametrize(
    ("skip", "branch", "share"), [(1.0, 0.0, 1.0), (0.0, 2.0, 0.0), (3.0, 4.0, 9 / 25)]
)
def test_skip_share_is_of_squares(skip: float, branch: float, share: float) -> None:
    columns = {"skip_gain": {1: skip, 2: skip}, "branch_gain": {1: branch, 2: branch}}
    assert judged([0, 0, 0], **columns).skip_share == pytest.approx(share)


def test_where_nothing_arrives_there_is_no_skip_share() -> None:
    assert judged([0, 0, 0], skip_gain=0.0, branch_gain=0.0).skip_share is None


GONE = [-INF, -INF, 0.0, 0.0]
DOWN, UP = [-9.0, -6.0, -3.0, 0.0], [9.0, 6.0, 3.0, 0.0]
OVER = {"act_max_abs": {2: INF}}
# Profile, columns, spec, options, and what the advice says and does not say.
ADVISED: dict[str, tuple[list[float], dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    "plain": (DOWN, {}, {"shortcut": "plain"}, {}, "--shortcut residual", "--norm"),
    "no norm": (UP, {}, {"norm": "none"}, {}, "--norm pre", "--shortcut"),
    "post-norm": (DOWN, {}, {"norm": "post"}, {}, "--norm pre", "--shortcut"),
    "pre-norm": (UP, {}, {"norm": "pre"}, {}, "--init gpt2", "--norm"),
    "pre-norm with gpt2": (UP, {}, {"init": "gpt2"}, {}, "--gain", "--init"),
    "weight_var": (UP, {}, {"weight_var": 9.0}, {}, "--weight-var", "--gain"),
    "underflow": (GONE, {}, {}, {"raw_range": True}, "Leave out --raw-range", "--shortcut"),
    "dead": (GONE, {}, {"shortcut": "plain"}, {}, "--shortcut residual", "--raw-range"),
    "overflow": ([0.0] * 4, OVER, {"norm": "none"}, {}, "--norm pre", "bfloat16"),
    "overflow with a norm": ([0.0] * 4, OVER, {}, {}, "--dtype float64", "--norm"),
    "overflow of half": ([0.0] * 4, OVER, {"dtype": "float16"}, {}, "--dtype float32", "64"),
    "overflow of double": ([0.0] * 4, OVER, {"dtype": "float64"}, {}, "--init gpt2", "--dtype"),
}


@pytest.mark.parametrize(
    ("profile", "columns", "spec", "options", "says", "does_not"), ADVISED.values(), ids=ADVISED
)
def test_advice_changes_with_the_options_in_use(
    profile: list[float],
    columns: dict[str, Any],
    spec: dict[str, Any],
    options: dict[str, Any],
    says: str,
    does_not: str,
) -> None:
    advice = judged(list(profile), spec_of(**spec), RunOptions(**options), **columns).advice
    assert says in advice
    assert does_not not in advice


def test_a_loss_is_handed_on() -> None:
    spec = spec_of()
    summary = summarise_run(layer_rows(spec, [0.0] * 4), spec, RunOptions(), loss=0.5)
    assert summary.loss == 0.5


def test_each_verdict_is_told_from_the_others_in_words_and_on_the_page() -> None:
    rows = list(VERDICTS.values())
    assert [row.word for row in rows] == list(VERDICTS)
    for name in ("word", "meaning", "of_one", "of_many", "page_mark", "page_colour"):
        assert len({getattr(row, name) for row in rows}) == len(rows)
    assert all(row.meaning.endswith(".") for row in rows)
    assert [row.word for row in rows if row.passes] == ["healthy"]


def test_a_word_of_another_version_has_a_verdict_that_knows_nothing() -> None:
    unknown = verdict_named("chaotic")
    assert (unknown.of_one, unknown.of_many) == ("The verdict is chaotic", "the verdict is chaotic")
    assert not unknown.passes
    assert not unknown.finite
