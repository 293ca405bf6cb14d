"""What theory says of a network that nobody has measured: gain, verdict, depth. Torch-free."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gradflow.errors import UsageError
from gradflow.judging.advice import advice
from gradflow.judging.assembly import TREND_LAYERS, fit_trend
from gradflow.judging.verdicts import NO_THEORY, Finding, SeedDigest, verdict_of
from gradflow.runs.records import Summary
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.theory import NoTheoryError, Prediction, predict, total_decades

DEEPEST = 1000  # that is looked at: a second a stack
# Theory holds some kilobytes for each unit, where a measurement holds none.
MOST_UNITS = 10_000


@dataclass(frozen=True)
class Reach:
    """Depth up to which the gradient stays in the healthy range.

    Attributes:
        depth: the largest depth at which it does; 0 if it never does.
        at_least: it may go on beyond: theory, or the search, ends there.
    """

    depth: int
    at_least: bool


@dataclass(frozen=True)
class Outlook:
    """The prediction of a network, with a summary like that of a run.

    Attributes:
        spec: the network.
        options: the thresholds.
        prediction: the profile.
        summary: as that of a run; what it takes a measurement to tell is None. Its verdict is
            `NO_THEORY`'s where there is none.
        band: half the band of one seed in decades from output to input; None without theory.
        reach: None without theory.
        environment: nothing, for nothing was run.
    """

    spec: StackSpec
    options: RunOptions
    prediction: Prediction
    summary: Summary
    band: float | None
    reach: Reach | None
    environment: dict[str, Any] = field(default_factory=dict)


def outlook(spec: StackSpec, options: RunOptions) -> Outlook:
    """Predict gradient, verdict and healthy depth of one network.

    Args:
        spec: the network.
        options: the thresholds; how it would be measured does not matter.
    """
    prediction = predict(spec)
    if prediction.log10_grad_norm is None:
        summary = Summary(NO_THEORY.word, "", theory_reason=prediction.reason)
        return Outlook(spec, options, prediction, summary, None, None)
    low, high = prediction.band()[0]
    summary = _summary(np.array(prediction.log10_grad_norm), spec, options)
    reach = healthy_reach(spec, options)
    return Outlook(spec, options, prediction, summary, (high - low) / 2, reach)


def _summary(profile: np.ndarray, spec: StackSpec, options: RunOptions) -> Summary:
    total = float(profile[0])
    finding = Finding(verdict_of(SeedDigest(array("d", profile)), options))
    return Summary(
        verdict=finding.verdict.word,
        advice=advice(finding, spec, options),
        total_log10_gain=total,
        log10_gain_per_layer=total / spec.depth,
        trend=fit_trend(profile, spec).name if spec.depth >= TREND_LAYERS else None,
    )


def healthy_reach(spec: StackSpec, options: RunOptions, deepest: int = DEEPEST) -> Reach:
    """The depth up to which theory keeps the gradient in the healthy range, by bisection.

    Every depth that is tried is predicted anew, so an init that depends on the depth is no problem;
    that the gradient leaves the range once and for all is taken for granted.

    Args:
        spec: the network, of any depth.
        options: the thresholds.
        deepest: the largest depth that is tried.
    """
    return _reach(replace(spec, depth=deepest), options.vanishing, options.exploding, deepest)


@lru_cache(maxsize=1024)
def _reach(spec: StackSpec, vanishing: float, exploding: float, deepest: int) -> Reach:
    def healthy(depth: int) -> bool | None:
        try:
            return -vanishing <= total_decades(replace(spec, depth=depth)) <= exploding
        except (NoTheoryError, UsageError):  # a scheme may not be defined on few layers
            return None

    if healthy(deepest):
        return Reach(deepest, at_least=True)
    inside, outside = 0, deepest
    while outside - inside > 1:
        middle = round((max(inside, 1) * outside) ** 0.5)
        middle = min(max(middle, inside + 1), outside - 1)
        inside, outside = (middle, outside) if healthy(middle) else (inside, middle)
    return Reach(inside, at_least=healthy(outside) is None)
