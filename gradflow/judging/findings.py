"""What in a watched model looks like a mistake, in sentences that name the layer. Torch-free.

Layers of one kind are compared with each other, so that no absolute limits are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.specs.model_spec import Spec

# Layers of a kind from which on one of them can stand out.
FEWEST = 4
# A shortcut is missing where a layer hands on less than this part of what it would with one ...
LOST_PART = 0.25
# ... if those hand on so much of the gradient that they have one.
LEAST_SHARE = 0.5
# Weights as many times larger than those of the other layers stand out.
OUTLIER = 10.0
UNDERFLOW = 0.01
# Names in a sentence; more are counted.
SHOWN = 4
LEAST_HEADROOM = 1.0


def findings(
    rows: Sequence[LayerRecord], params: Sequence[ParamRecord], spec: Spec
) -> Iterator[str]:
    """Sentences about one step of one model.

    Args:
        rows: from the input up.
        params: their parameters.
        spec: tells which layers are of one kind.
    """
    yield from _lost_on_the_way(rows)
    yield from _without_gradient(rows)
    yield from _frozen(rows)
    yield from _without_shortcut(rows, spec)
    yield from _other_scale(params, spec)
    yield from _out_of_range(rows)


def _lost_on_the_way(rows: Sequence[LayerRecord]) -> Iterator[str]:
    """The layer whose backward pass is given finite numbers and hands on others."""
    if not all(math.isfinite(row.act_max_abs or 0.0) for row in rows):
        return  # it follows from what the verdict names
    for below, row in pairwise(rows):
        if below.nonfinite and row.nonfinite == 0:
            yield (
                f"{row.unit}: the gradient at its output is finite, that at {below.unit} is not; "
                "values are lost in the backward pass between the two."
            )


def _without_gradient(rows: Sequence[LayerRecord]) -> Iterator[str]:
    """Where a gradient arrives above, and no element of it is left below."""
    for below, row in pairwise(rows):
        arrives = row.log10_grad_norm not in (None, -math.inf)
        if arrives and below.log10_grad_norm == -math.inf:
            yield (
                f"{below.unit}: no gradient gets here from {row.unit}; is something detached "
                "between the two, or not used by the loss?"
            )


def _frozen(rows: Sequence[LayerRecord]) -> Iterator[str]:
    owners = [row for row in rows if row.param_norm is not None]
    frozen = [row for row in owners if row.param_grad_norm is None]
    if frozen and len(frozen) < len(owners):
        more = f" and {len(frozen) - SHOWN} more" if len(frozen) > SHOWN else ""
        names = ", ".join(row.unit for row in frozen[:SHOWN])
        yield f"{names}{more}: the parameters get no gradient; are they frozen, or not used?"


def _without_shortcut(rows: Sequence[LayerRecord], spec: Spec) -> Iterator[str]:
    """With y = x + f(x) the share is 1 / gain^2, as far as f's part is orthogonal to it."""
    shares = {r.unit: r.identity_share for r in rows if r.identity_share is not None}
    gains = {r.unit: r.gain or 1.0 for r in rows}
    for unit, share, usual in _beside_others(shares, spec):
        expected = min(usual, 1 / gains[unit] ** 2)
        if usual >= LEAST_SHARE and share < LOST_PART * expected:
            yield (
                f"{unit}: {share:.1%} of its gradient is handed on unchanged, {usual:.1%} in the "
                "others of its kind; is its shortcut missing?"
            )


def _other_scale(params: Sequence[ParamRecord], spec: Spec) -> Iterator[str]:
    """Root mean squares of all parameters of a layer."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for row in params:
        squares[row.unit] = squares.get(row.unit, 0.0) + row.norm**2
        counts[row.unit] = counts.get(row.unit, 0) + row.numel
    sizes = {unit: math.sqrt(squares[unit] / counts[unit]) for unit in squares if counts[unit]}
    for unit, size, usual in _beside_others(sizes, spec):
        if usual > 0 and size > OUTLIER * usual:
            yield (
                f"{unit}: its parameters are {size / usual:.3g} times as large as those of the "
                "others of its kind."
            )


def _out_of_range(rows: Sequence[LayerRecord]) -> Iterator[str]:
    small = [row for row in rows if (row.underflow_fraction or 0.0) > UNDERFLOW]
    if small:
        worst = max(small, key=lambda row: row.underflow_fraction or 0.0)
        yield (
            f"{worst.unit}: {worst.underflow_fraction:.1%} of its gradient is below the normal "
            "numbers of its format; scale the loss up, or use bfloat16."
        )
    # Where values are lost already, the verdict says so.
    whole = [row for row in rows if not row.nonfinite and row.headroom_log2 is not None]
    tight = [row for row in whole if (row.headroom_log2 or 0.0) < LEAST_HEADROOM]
    if tight:
        least = min(tight, key=lambda row: row.headroom_log2 or 0.0)
        yield f"{least.unit}: its gradient fills the range of its format; scale the loss down."


def _beside_others(values: Mapping[str, float], spec: Spec) -> Iterator[tuple[str, float, float]]:
    """Unit, its value, and the median of its kind, where that has enough units."""
    kinds: dict[str, list[str]] = {}
    for unit in values:
        kinds.setdefault(spec.kind_of(unit), []).append(unit)
    for units in kinds.values():
        usual = median(values[unit] for unit in units)
        for unit in units if len(units) >= FEWEST else ():
            yield unit, values[unit], usual
