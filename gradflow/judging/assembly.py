"""From what was measured to a `Run`: its summary, verdict, and what training came to.

Stacks, models of other people and watched trainings all come here. Everything of gradients is in
log10 ("decades"), so nothing under- or overflows. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from statistics import mean
from typing import Any

import numpy as np
from scipy.special import stdtrit

from gradflow.judging.advice import advice
from gradflow.judging.training_outcome import summary_of
from gradflow.judging.verdicts import SeedDigest, common_finding, seed_digest
from gradflow.runs.records import LayerRecord, ParamRecord, Run, StepRecord, Summary, first_step
from gradflow.specs.model_spec import Spec
from gradflow.specs.run_options import RunOptions

# Profiles flatter than this have no trend to speak of.
_FLAT_DECADES = 0.1

# Nor have profiles of fewer layers: through two points goes any curve.
TREND_LAYERS = 3

# Extrapolations beyond this depth are not numbers anybody should rely on.
_FARTHEST_DEPTH = 1e9


@dataclass(frozen=True)
class Measured:
    """Everything that a measurement leaves behind, as plain data.

    Attributes:
        spec: what was measured.
        options: how it was measured.
        environment: what it was measured on, as `run.json` has it.
        layers: rows of `layers.csv`, seed by seed, each from the input up.
        params: rows of `params.csv`.
        steps: rows of `steps.csv`; empty without training.
        losses: the loss of each seed at initialisation; empty where the loss is no number to show.
        warnings: lines that the run shows.
        peak_bytes: largest memory in use; None if unknown.
        judged_step: training step that verdict and summary go by; None is the first one.
    """

    spec: Spec
    options: RunOptions
    environment: dict[str, Any]
    layers: Sequence[LayerRecord]
    params: Sequence[ParamRecord]
    steps: Sequence[StepRecord] = ()
    losses: Sequence[float] = ()
    warnings: Sequence[str] = ()
    peak_bytes: int | None = None
    judged_step: int | None = None


def assembled_run(measured: Measured) -> Run:
    """Return the run of a measurement, without times and without theory.

    Verdict and summary are those of one training step over all seeds; `outcome` and what follows
    it in the summary are those of the whole training.
    """
    options = measured.options
    loss = mean(measured.losses) if measured.losses else None
    summary = summarise_run(_judged_rows(measured), measured.spec, options, loss)
    outcome = summary_of(measured.steps)
    return Run(
        spec=measured.spec,
        options=options,
        summary=replace(summary, peak_bytes=measured.peak_bytes, **outcome),
        environment=measured.environment,
        overhead=None,
        warnings=tuple(measured.warnings),
        layer_records=measured.layers,
        param_records=measured.params,
        time_records=(),
        step_records=measured.steps,
    )


def _judged_rows(measured: Measured) -> Sequence[LayerRecord]:
    if measured.judged_step is not None:
        return [row for row in measured.layers if row.step == measured.judged_step]
    # Without training all are of one step, and perhaps too many to hold.
    return first_step(measured.layers) if measured.options.steps else measured.layers


@dataclass(frozen=True)
class Trend:
    """The fit of log10 |g| over the layer l: a + rate * l, or a + power * log10(1 + l)."""

    name: str
    coefficient: float

    def healthy_depth(self, options: RunOptions) -> float | None:
        """Depth at which this trend leaves the healthy range; None beyond `_FARTHEST_DEPTH`."""
        if self.name == "flat":
            return None
        # Towards the input the gradient grows where the profile falls with the layer.
        limit = options.exploding if self.coefficient < 0 else options.vanishing
        decades = limit / abs(self.coefficient)
        if self.name == "power law":
            decades = 10**decades - 1 if decades < math.log10(_FARTHEST_DEPTH) else math.inf
        return decades if decades < _FARTHEST_DEPTH else None


def summarise_run(
    records: Iterable[LayerRecord], spec: Spec, options: RunOptions, loss: float | None = None
) -> Summary:
    """The summary of what was measured: verdict, gain, trend with depth, and spreads.

    Args:
        records: all seeds, each from the input up.
        spec: for the advice.
        options: the thresholds.
        loss: mean over the seeds, where the loss is one.
    """
    judged = (row for row in records if row.layer > 0 or spec.input_has_gradient)
    by_seed = groupby(judged, key=attrgetter("seed"))
    seeds, findings = zip(*(seed_digest(rows, options, spec) for _, rows in by_seed), strict=True)
    finding = common_finding(findings)
    profiles = np.array([seed.profile for seed in seeds])
    finite = bool(np.isfinite(profiles).all())
    rate, low, high = _rate(profiles, spec) if finite else (None, None, None)
    long = spec.depth >= TREND_LAYERS
    trend = fit_trend(profiles.mean(axis=0), spec) if finite and long else None
    return Summary(
        verdict=finding.verdict.word,
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


def fit_trend(profile: np.ndarray, spec: Spec) -> Trend:
    """The trend of a profile: exponential or power law in depth, whichever has smaller residuals.

    Args:
        profile: log10 |g| from the input up, one value per unit and one for the input.
        spec: tells how many units make a layer.
    """
    layer = np.arange(len(profile)) / spec.units_per_block
    if np.ptp(profile) < _FLAT_DECADES:
        return Trend("flat", 0.0)
    (rate, _), exponential = np.polyfit(layer, profile, 1, full=True)[:2]
    (power, _), power_law = np.polyfit(np.log10(1 + layer), profile, 1, full=True)[:2]
    # numpy leaves the residuals out where the fit is exact.
    if power_law.sum() < exponential.sum():
        return Trend("power law", float(power))
    return Trend("exponential", float(rate))


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


def _spread(seeds: Sequence[SeedDigest]) -> float | None:
    """Decades between the largest and the smallest parameter gradient of one kind of unit."""
    spans = [span for seed in seeds for span in seed.spans.values()]
    if not spans or not all(math.isfinite(high) for _, high in spans):
        return None
    return max(high - low for low, high in spans)


def _skip_share(seeds: Sequence[SeedDigest]) -> float | None:
    """Mean of skip^2 / (skip^2 + branch^2): how much of the gradient comes by the shortcut."""
    shares = np.concatenate([seed.shares for seed in seeds])
    mean = float(shares.mean()) if shares.size else math.nan
    return mean if math.isfinite(mean) else None
