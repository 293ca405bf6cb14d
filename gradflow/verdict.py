"""From the records of a run to one answer: does the gradient reach the first layer?

Everything is in log10 ("decades"), so nothing under- or overflows. Torch-free.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter

import numpy as np
from scipy.special import stdtrit

from gradflow.model_spec import ModelSpec, Spec
from gradflow.records import LayerRecord, Summary
from gradflow.run_options import RunOptions
from gradflow.spec import StackSpec
from gradflow.user_code import shown

# Profiles flatter than this have no trend to speak of.
FLAT_DECADES = 0.1
# Nor have profiles of fewer layers: through two points goes any curve.
TREND_LAYERS = 3
# Extrapolations beyond this depth are not numbers anybody should rely on.
FARTHEST_DEPTH = 1e9


@dataclass(frozen=True)
class Finding:
    """The class of one seed, or of several, and where it shows.

    `step` counts the places in execution order: forward up, then backward down. `counts` tells
    how many seeds have which class, where they disagree.
    """

    verdict: str
    layer: int | None = None
    unit: str | None = None
    direction: str | None = None
    step: int = 0
    counts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Trend:
    """How log10 |g| goes with the layer l: a + rate * l, or a + power * log10(1 + l)."""

    name: str
    coefficient: float

    def healthy_depth(self, options: RunOptions) -> float | None:
        """Depth at which this trend leaves the healthy range; None if beyond all reason."""
        if self.name == "flat":
            return None
        # Towards the input the gradient grows where the profile falls with the layer.
        limit = options.exploding if self.coefficient < 0 else options.vanishing
        decades = limit / abs(self.coefficient)
        if self.name == "power law":
            decades = 10**decades - 1 if decades < math.log10(FARTHEST_DEPTH) else math.inf
        return decades if decades < FARTHEST_DEPTH else None


def summarise(
    records: Iterable[LayerRecord], spec: Spec, options: RunOptions, loss: float | None = None
) -> Summary:
    """A run in a few numbers.

    Args:
        records: all seeds, each from the input up.
        spec: for the advice.
        options: the thresholds.
        loss: mean over the seeds, where the loss is one.
    """
    judged = (row for row in records if row.layer > 0 or spec.input_has_gradient)
    seeds = [digest(rows, options, spec) for _, rows in groupby(judged, key=attrgetter("seed"))]
    finding = combine([seed.finding for seed in seeds])
    profiles = np.array([seed.profile for seed in seeds])
    finite = bool(np.isfinite(profiles).all())
    rate, low, high = _rate(profiles, spec) if finite else (None, None, None)
    long = spec.depth >= TREND_LAYERS
    trend = fit_trend(profiles.mean(axis=0), spec) if finite and long else None
    return Summary(
        verdict=finding.verdict,
        advice=advice(finding, spec, options),
        total_log10_gain=float((profiles[:, 0] - profiles[:, -1]).mean()) if finite else None,
        log10_gain_per_layer=rate,
        log10_gain_per_layer_low=low,
        log10_gain_per_layer_high=high,
        efolding_layers=1 / (abs(rate) * math.log(10)) if rate else None,
        trend=trend.name if trend else None,
        healthy_depth=trend.healthy_depth(options) if trend else None,
        param_grad_spread=_spread(seeds),
        skip_share=_skip_share(seeds),
        first_layer=finding.layer,
        first_unit=finding.unit,
        first_pass=finding.direction,
        loss=loss,
        departures=spec.departures or None,
    )


@dataclass
class Digest:
    """One seed in a few numbers per unit, so that its records need not be held.

    Attributes:
        profile: log10 |g| from the input up.
        shares: skip^2 / (skip^2 + branch^2) of the units that have both.
        spans: smallest and largest log10 |dL/dparameters| of each kind of unit.
        finding: the class of the seed.
    """

    profile: array[float] = field(default_factory=lambda: array("d"))
    shares: array[float] = field(default_factory=lambda: array("d"))
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    finding: Finding = Finding("healthy")


def classify(rows: Iterable[LayerRecord], options: RunOptions) -> Finding:
    """The class of one seed; where values are lost, the first place in execution order.

    Args:
        rows: one seed from the input up.
        options: the thresholds in decades.
    """
    return digest(rows, options).finding


def digest(rows: Iterable[LayerRecord], options: RunOptions, spec: Spec | None = None) -> Digest:
    """What a verdict needs of one seed, in one reading from the input up."""
    found = Digest()
    forward = backward = None
    for step, row in enumerate(rows):
        _take(found, row, row.unit if spec is None else spec.kind_of(row.unit))
        forward = forward or _lost_forward(row, step)
        # Execution goes down here, so the last of the rows is the first place.
        backward = _lost_backward(row, -step) or backward
    lost = forward or (backward and replace(backward, step=2 * step + 1 + backward.step))
    found.finding = lost or _by_total(found.profile, options)
    return found


def _take(found: Digest, row: LayerRecord, kind: str) -> None:
    found.profile.append(_value(row.log10_grad_norm))
    log = row.log10_param_grad_norm
    if log is not None:
        # Infinite where any is not finite: min and max would pass over a NaN.
        log = log if math.isfinite(log) else math.inf
        low, high = found.spans.get(kind, (log, log))
        found.spans[kind] = (min(low, log), max(high, log))
    if row.skip_gain is not None and row.branch_gain is not None:
        energy = row.skip_gain**2 + row.branch_gain**2
        if row.skip_gain + row.branch_gain > 0:
            found.shares.append(row.skip_gain**2 / energy)


def verdict_of(total: float, options: RunOptions) -> str:
    """The class of a gradient that nowhere is lost: `vanishing`, `exploding` or `healthy`.

    Args:
        total: decades from output to input.
        options: the thresholds.
    """
    if total < -options.vanishing:
        return "vanishing"
    return "exploding" if total > options.exploding else "healthy"


def _by_total(profile: Sequence[float], options: RunOptions) -> Finding:
    return Finding(verdict_of(profile[0] - profile[-1], options))


def _lost_forward(row: LayerRecord, step: int) -> Finding | None:
    if math.isfinite(_value(row.act_max_abs)):
        return None
    return Finding("nonfinite", row.layer, row.unit, "forward", step)


def _lost_backward(row: LayerRecord, step: int) -> Finding | None:
    if _is_nonfinite(row):
        return Finding("nonfinite", row.layer, row.unit, "backward", step)
    return Finding("dead", row.layer, row.unit, "backward", step) if _is_dead(row) else None


def combine(findings: Sequence[Finding]) -> Finding:
    """The seeds' common class, or `unstable`; the first place at which any of them loses values."""
    counts = Counter(finding.verdict for finding in findings)
    placed = [finding for finding in findings if finding.layer is not None]
    first = min(placed or findings, key=attrgetter("step"))
    if len(counts) == 1:
        return first
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return replace(first, verdict="unstable", counts=tuple(ranked))


def fit_trend(profile: np.ndarray, spec: Spec) -> Trend:
    """Exponential or power law in depth, whichever leaves the smaller squares.

    Args:
        profile: log10 |g| from the input up, one value per unit and one for the input.
        spec: tells how many units make a layer.
    """
    layer = np.arange(len(profile)) / spec.units_per_block
    if np.ptp(profile) < FLAT_DECADES:
        return Trend("flat", 0.0)
    (rate, _), exponential = np.polyfit(layer, profile, 1, full=True)[:2]
    (power, _), power_law = np.polyfit(np.log10(1 + layer), profile, 1, full=True)[:2]
    # numpy leaves the residuals out where the fit is exact.
    if power_law.sum() < exponential.sum():
        return Trend("power law", float(power))
    return Trend("exponential", float(rate))


ADVICE = {
    "healthy": "The gradient reaches the first layer.",
    "vanishing": "The first layers hardly learn.",
    "exploding": "The first layers get huge updates.",
    "dead": "No gradient arrives.",
    "nonfinite": "Values leave the number format.",
    "unstable": "Seeds disagree.",
}


# Of a person's own model no option can be named.
MODEL_REMEDIES = {
    "healthy": "",
    "vanishing": "Look where the gain is below 1: add a shortcut or a norm, or larger weights.",
    "exploding": "Look where the gain is above 1: normalise, or scale the branches down.",
    "dead": "Look for a detached output, a frozen layer or one that the loss does not use.",
    "nonfinite": "Look at this layer first: what comes later follows from it.",
    "unstable": "",
}


def advice(finding: Finding, spec: Spec, options: RunOptions) -> str:
    """What the verdict means, and what to do about it in this very stack."""
    text = ADVICE[finding.verdict]
    if isinstance(spec, ModelSpec):
        remedy = MODEL_REMEDIES[finding.verdict]
    else:
        assert isinstance(spec, StackSpec)
        remedy = _remedy(finding, spec, options)
    return f"{text} {remedy}" if remedy else text


def _remedy(finding: Finding, spec: StackSpec, options: RunOptions) -> str:
    if finding.verdict == "healthy":
        return ""
    if finding.verdict == "unstable":
        counts = ", ".join(f"{number} {verdict}" for verdict, number in finding.counts)
        return f"Of {options.seeds}: {counts}. Raise --seeds to see how often each occurs."
    if finding.direction == "backward" and options.raw_range:
        return f"Leave out --raw-range to measure beyond the range of {spec.dtype}."
    if spec.weights:
        return "These weights are trained: the layers where the profile bends say where."
    if finding.direction == "forward" and spec.dtype != "float64":
        normalise = "Normalise (--norm pre), lower" if spec.norm == "none" else "Lower"
        wider = "float64" if spec.dtype == "float32" else "float32"
        return f"{normalise} {_scale(spec)}, or try --dtype {wider}."
    return _redesign(spec)


def _redesign(spec: StackSpec) -> str:
    if spec.scheme is not None:
        return f"{shown(spec.scheme)} does so here; `gradflow schemes` lists the others."
    if not spec.has_shortcut:
        return "Add shortcuts: --shortcut residual."
    if spec.norm == "none":
        return "Normalise: --norm pre."
    if spec.norm == "post":
        return "Move the norm into the branch: --norm pre."
    with_depth = "" if spec.init == "gpt2" or spec.weight_var else " with depth: --init gpt2, or"
    return f"Scale the branches down{with_depth or ':'} a smaller {_scale(spec)}."


def _scale(spec: StackSpec) -> str:
    """The option that scales the weights of this stack."""
    return "--gain" if spec.weight_var is None else "--weight-var"


def _is_nonfinite(row: LayerRecord) -> bool:
    norms = (row.log10_grad_norm, row.log10_param_grad_norm)
    overflowed = any(math.isnan(n) or n == math.inf for n in norms if n is not None)
    return bool(row.nonfinite) or overflowed


def _is_dead(row: LayerRecord) -> bool:
    nothing = (None, -math.inf)
    has_parameters = row.param_norm is not None
    no_gradient = row.log10_grad_norm in nothing
    return no_gradient or (has_parameters and row.log10_param_grad_norm in nothing)


def _value(number: float | None) -> float:
    return math.nan if number is None else number


def _rate(profiles: np.ndarray, spec: Spec) -> tuple[float | None, float | None, float | None]:
    """Mean log10 gain of a layer with its 95 % interval (Student's t) over seeds and layers."""
    borders = profiles[:, :: spec.units_per_block]
    gains = (borders[:, :-1] - borders[:, 1:]).ravel()
    if not gains.size:
        return None, None, None
    mean = float(gains.mean())
    if gains.size < 2:
        return mean, None, None
    half = float(stdtrit(gains.size - 1, 0.975) * gains.std(ddof=1) / math.sqrt(gains.size))
    return mean, mean - half, mean + half


def _spread(seeds: Sequence[Digest]) -> float | None:
    """Decades between the largest and the smallest parameter gradient of one kind of unit."""
    spans = [span for seed in seeds for span in seed.spans.values()]
    if not spans or not all(math.isfinite(high) for _, high in spans):
        return None
    return max(high - low for low, high in spans)


def _skip_share(seeds: Sequence[Digest]) -> float | None:
    """Mean of skip^2 / (skip^2 + branch^2): how much of the gradient comes by the shortcut."""
    shares = np.concatenate([seed.shares for seed in seeds])
    mean = float(shares.mean()) if shares.size else math.nan
    return mean if math.isfinite(mean) else None
