"""One seed in a few numbers, and its class: what a verdict needs of its records. Torch-free."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from gradflow.runs.records import LayerRecord
from gradflow.specs.model_spec import Spec
from gradflow.specs.run_options import RunOptions


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
