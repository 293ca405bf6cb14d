"""Ratios against formulas written out here; what is not alike is never ratioed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import ENVIRONMENT, layer_rows, run_of, spec_of
from scipy.special import stdtrit

from gradflow.judging.comparison import Comparison, Ratio, compare_runs, mean_profile, time_ratio
from gradflow.runs.records import Run, TimeRecord
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

HERE = ENVIRONMENT | {"torch": "2.13.0", "matmul_precision": "highest", "sweep": "s1"}
BOTH = ("forward_s", "backward_s")


def timed(
    seconds: Sequence[float],
    *,
    spec: StackSpec | None = None,
    where: dict[str, Any] | None = None,
    **fields: Any,
) -> Run:
    """A run whose passes took these seconds: a third forward, the rest backward, over its units."""
    spec = spec or spec_of()
    units = spec.depth * spec.units_per_block
    times = [
        TimeRecord(repeat, layer, "mlp", s / units / 3, s / units * 2 / 3)
        for repeat, s in enumerate(seconds)
        for layer in range(1, units + 1)
    ]
    return run_of(spec, times=times, environment=HERE | (where or {}), **fields)


def paired_interval(mine: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Student: mean of log ratios +- t(n-1) s / sqrt(n), written out."""
    d = np.log(mine / theirs)
    n = len(d)
    half = stdtrit(n - 1, 0.975) * math.sqrt(((d - d.mean()) ** 2).sum() / (n - 1)) / math.sqrt(n)
    return _exp(d.mean(), half)


def welch_interval(mine: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Welch 1947, with Satterthwaite's degrees of freedom, written out."""
    a, b = np.log(mine), np.log(theirs)
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = stdtrit(freedom, 0.975) * math.sqrt(va + vb)
    return _exp(a.mean() - b.mean(), half)


def _exp(mean: float, half: float) -> tuple[float, float, float]:
    with np.errstate(over="ignore"):
        return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


SECONDS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12).filter(lambda s: np.ptp(s) > 1e-6)


@given(seconds=SECONDS, factor=st.floats(0.5, 2), data=st.data())
def test_interleaved_repeats_are_compared_pair_by_pair(
    seconds: list[float], factor: float, data: st.DataObject
) -> None:
    noise = data.draw(st.lists(st.floats(0.9, 1.1), min_size=len(seconds), max_size=len(seconds)))
    mine = [s * factor * e for s, e in zip(seconds, noise, strict=True)]
    ratio = time_ratio(timed(mine), timed(seconds), BOTH)
    value, low, high = paired_interval(np.array(mine), np.array(seconds))
    assert ratio.interleaved
    assert ratio.value == pytest.approx(value)
    if np.ptp(noise) > 1e-3:
        assert (ratio.low, ratio.high) == pytest.approx((low, high), rel=1e-6)


@given(mine=SECONDS, theirs=SECONDS)
def test_other_repeats_by_welch(mine: list[float], theirs: list[float]) -> None:
    ratio = time_ratio(timed(mine, where={"sweep": "s2"}), timed(theirs), BOTH)
    value, low, high = welch_interval(np.array(mine), np.array(theirs))
    assert not ratio.interleaved
    assert ratio.value == pytest.approx(value)
    with np.errstate(over="ignore"):
        assert (ratio.low, ratio.high) == pytest.approx((low, high), rel=1e-5)


def test_times_are_per_layer_and_by_direction() -> None:
    deep = timed([6.0, 6.2, 6.1], spec=spec_of(depth=6))
    shallow = timed([3.0, 3.1, 3.05])
    for fields in (("forward_s",), ("backward_s",), BOTH):
        assert time_ratio(deep, shallow, fields).value == pytest.approx(1.0)


def test_forward_and_backward_are_told_apart() -> None:
    slow = timed([3.0, 3.1, 3.2])
    slow = replace(
        slow,
        time_records=[replace(t, backward_s=t.backward_s * 2) for t in slow.time_records],
    )
    reference = timed([3.0, 3.1, 3.2])
    assert time_ratio(slow, reference, ("forward_s",)).value == pytest.approx(1.0)
    assert time_ratio(slow, reference, ("backward_s",)).value == pytest.approx(2.0)


# --- what may be called a difference ---------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "differs"),
    [
        (Ratio(1.5, 1.4, 1.6, interleaved=True), True),
        (Ratio(0.5, 0.4, 0.6, interleaved=True), True),
        (Ratio(1.5, 0.9, 2.4, interleaved=True), False),  # not significant
        (Ratio(1.005, 1.004, 1.006, interleaved=True), False),  # below the noise threshold
        (Ratio(1.5, 1.4, 1.6, interleaved=False), False),  # the repeats took no turns
        (Ratio(1.5, None, None, interleaved=True), False),  # a single repeat
        (Ratio(None, reason="not timed"), False),
    ],
)
def test_a_difference_is_significant_and_above_the_noise(ratio: Ratio, differs: bool) -> None:
    assert ratio.differs(0.01) is differs


def test_the_noise_threshold_is_an_option() -> None:
    ratio = Ratio(1.005, 1.004, 1.006, interleaved=True)
    assert ratio.differs(0.004)
    assert not ratio.differs(0.006)


def simulated(rng: np.random.Generator, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Interleaved passes of two equal networks on a machine that drifts and is noisy."""
    drift = np.cumsum(rng.normal(0, 0.05, repeats))
    mine, theirs = np.exp(drift + rng.normal(0, 0.03, (2, repeats)))
    return mine, theirs


@pytest.mark.parametrize("repeats", [3, 5, 20])
def test_equal_networks_are_called_different_in_five_of_a_hundred(repeats: int) -> None:
    rng, trials = np.random.default_rng(1), 700
    wrong = sum(ratio_of(*simulated(rng, repeats)).differs(0.0) for _ in range(trials))
    # 5 % +- 3.3 standard errors of a binomial count.
    assert abs(wrong / trials - 0.05) < 3.3 * math.sqrt(0.05 * 0.95 / trials)


def test_a_network_that_is_slower_is_found() -> None:
    rng = np.random.default_rng(2)
    trials = [simulated(rng, 5) for _ in range(100)]
    assert sum(ratio_of(1.2 * mine, theirs).differs() for mine, theirs in trials) > 95


def ratio_of(mine: np.ndarray, theirs: np.ndarray) -> Ratio:
    return time_ratio(
        timed([float(s) for s in mine], spec=spec_of(depth=1)),
        timed([float(s) for s in theirs], spec=spec_of(depth=1)),
        BOTH,
    )


def test_repeats_without_spread_have_a_point_for_an_interval() -> None:
    ratio = time_ratio(timed([2.0, 2.0, 2.0]), timed([1.0, 1.0, 1.0]), BOTH)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio.differs()


def test_a_single_repeat_has_no_interval() -> None:
    ratio = time_ratio(timed([2.0]), timed([1.0]), BOTH)
    assert ratio.value == pytest.approx(2.0)
    assert (ratio.low, ratio.high, ratio.differs()) == (None, None, False)


def test_extreme_times_overflow_to_infinity_quietly() -> None:
    ratio = time_ratio(timed([1e-300, 1e300]), timed([1e300, 1e-300]), BOTH)
    assert ratio.high == math.inf
    assert not ratio.differs()


# --- like with like -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"device": "cuda"}, "device cuda against cpu"),
        ({"device_name": "another"}, "device name another against a processor"),
        ({"dtype": "float64"}, "dtype float64 against float32"),
        ({"torch": "2.12.0"}, "torch 2.12.0 against 2.13.0"),
        ({"threads": 2}, "threads 2 against 1"),
        ({"matmul_precision": "high"}, "matmul precision high against highest"),
        ({"threads": 2, "device": "cuda"}, "device cuda against cpu; threads 2 against 1"),
        ({"contended": True}, "contended: timed beside other work"),
    ],
)
def test_what_is_not_alike_is_not_ratioed(where: dict[str, Any], reason: str) -> None:
    ratio = time_ratio(timed([1.0, 1.1], where=where), timed([1.0, 1.1]), BOTH)
    assert (ratio.value, ratio.low, ratio.high, ratio.reason) == (None, None, None, reason)
    turned = time_ratio(timed([1.0, 1.1]), timed([1.0, 1.1], where=where), BOTH)
    assert turned.value is None
    assert turned.reason


def test_what_has_no_times_is_not_ratioed() -> None:
    untimed = run_of(environment=HERE)
    assert time_ratio(untimed, timed([1.0]), BOTH).reason == "not timed"
    assert time_ratio(timed([1.0]), untimed, BOTH).reason == "the reference is not timed"
    assert time_ratio(untimed, untimed, BOTH).value is None


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_are_not_ratioed(bad: float) -> None:
    assert time_ratio(timed([1.0, bad]), timed([1.0, 1.0]), BOTH).value is None
    assert time_ratio(timed([1.0, 1.0]), timed([1.0, bad]), BOTH).reason


def test_what_was_noted_of_neither_is_alike() -> None:
    old = {key: value for key, value in HERE.items() if key != "matmul_precision"}
    runs = [replace(timed([1.0, 1.1]), environment=old) for _ in range(2)]
    assert time_ratio(runs[0], runs[1], BOTH).value is not None


# --- rows -----------------------------------------------------------------------------------


def stack(shortcut: str, depth: int, per_layer: float) -> Run:
    spec = spec_of(shortcut=shortcut, depth=depth, norm="none")
    profile = [per_layer * (depth - layer) for layer in range(depth + 1)]
    return run_of(spec, list(layer_rows(spec, profile)), environment=HERE)


def side_by_side(*runs: Run) -> Comparison:
    return compare_runs(runs, runs[0])


def test_designs_are_together_the_healthiest_first_and_depths_rise() -> None:
    runs = [
        stack(shortcut, depth, rate)
        for depth in (50, 12, 200)
        for shortcut, rate in (("plain", -0.2), ("residual", 0.001))
    ]
    rows = side_by_side(*runs).rows
    assert [row.depth for row in rows] == [12, 50, 200] * 2
    assert [row.design for row in rows] == ["residual, no norm"] * 3 + ["plain, no norm"] * 3


def test_rows_without_a_total_come_last() -> None:
    spec = spec_of(shortcut="plain")
    lost = run_of(spec, list(layer_rows(spec, [math.nan, 0.0, 0.0, 0.0], nonfinite=1)))
    rows = side_by_side(lost, stack("residual", 3, 5.0)).rows
    assert [row.summary.verdict for row in rows] == ["exploding", "nonfinite"]


def test_runs_that_differ_in_their_seed_have_names_of_their_own() -> None:
    runs = [run_of(options=RunOptions(seed=seed)) for seed in (0, 1)]
    assert len({row.design for row in side_by_side(*runs).rows}) == 2


def test_runs_of_one_network_are_counted() -> None:
    assert len({row.design for row in side_by_side(run_of(), run_of(), run_of()).rows}) == 3


def test_the_reference_is_marked_and_is_one() -> None:
    reference = timed([1.0, 2.0])
    rows = compare_runs([timed([2.0, 4.0]), reference], reference).rows
    assert [row.total.value for row in rows if row.is_reference] == [1.0]
    assert [row.total.value for row in rows if not row.is_reference] == [pytest.approx(2.0)]


def test_profiles_are_means_over_the_seeds_and_miss_what_is_missing() -> None:
    spec = spec_of(depth=2)
    rows = [*layer_rows(spec, [2.0, 1.0, None]), *layer_rows(spec, [4.0, 3.0, 0.0], seed=1)]
    profile = mean_profile(rows)
    assert profile[:2] == (3.0, 2.0)
    assert math.isnan(profile[2])


def test_opposite_infinities_make_no_mean() -> None:
    spec = spec_of(depth=1)
    rows = [*layer_rows(spec, [math.inf, 0.0]), *layer_rows(spec, [-math.inf, 0.0], seed=1)]
    assert math.isnan(mean_profile(rows)[0])
