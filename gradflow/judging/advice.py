"""What is said to a person: the advice of a verdict, and what in a watched model looks wrong.

Layers of one kind are compared with each other, so that no absolute limits are needed. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

from gradflow.judging.verdicts import Finding
from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.specs.model_spec import ModelSpec, Spec
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import without_digest

# Layers of a kind from which on one of them can stand out.
_FEWEST = 4
# A shortcut is missing where a layer hands on less than this part of what it would with one,
_LOST_PART = 0.25
# if the others of its kind hand on so much of the gradient that they have one.
_LEAST_SHARE = 0.5
# Weights as many times larger than those of the other layers stand out.
_OUTLIER = 10.0
_UNDERFLOW = 0.01
# Names in a sentence; more are counted.
_SHOWN = 4
_LEAST_HEADROOM = 1.0


def advice(finding: Finding, spec: Spec, options: RunOptions) -> str:
    """The meaning of a verdict, and what to do about it in this very stack or model."""
    if isinstance(spec, ModelSpec):
        remedy = finding.verdict.model_remedy
    else:
        assert isinstance(spec, StackSpec)
        remedy = _remedy(finding, spec, options)
    return f"{finding.verdict.meaning} {remedy}".strip()


def _remedy(finding: Finding, spec: StackSpec, options: RunOptions) -> str:
    if finding.verdict.passes:
        return ""
    if finding.counts:
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
        return f"{without_digest(spec.scheme)} does so here; `gradflow schemes` lists the others."
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


def findings(
    rows: Sequence[LayerRecord], params: Sequence[ParamRecord], spec: Spec
) -> Iterator[str]:
    """Yield a sentence for each thing in one step of one model that looks like a mistake.

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
    """Name layers that get a finite gradient and hand on one with NaN or infinity."""
    if not all(math.isfinite(row.act_max_abs or 0.0) for row in rows):
        return  # it follows from what the verdict names
    for below, row in pairwise(rows):
        if below.nonfinite and row.nonfinite == 0:
            yield (
                f"{row.unit}: the gradient at its output is finite, that at {below.unit} is not; "
                "values are lost in the backward pass between the two."
            )


def _without_gradient(rows: Sequence[LayerRecord]) -> Iterator[str]:
    """Name layers that get no gradient although the layer above gets one."""
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
        more = f" and {len(frozen) - _SHOWN} more" if len(frozen) > _SHOWN else ""
        names = ", ".join(row.unit for row in frozen[:_SHOWN])
        yield f"{names}{more}: the parameters get no gradient; are they frozen, or not used?"


def _without_shortcut(rows: Sequence[LayerRecord], spec: Spec) -> Iterator[str]:
    """Name layers that hand on a far smaller share of their gradient unchanged than their kind.

    The share of y = x + f(x) is 1 / gain^2, as far as the gradient through f is orthogonal to it.
    """
    shares = {r.unit: r.identity_share for r in rows if r.identity_share is not None}
    gains = {r.unit: r.gain or 1.0 for r in rows}
    for unit, share, usual in _beside_others(shares, spec):
        expected = min(usual, 1 / gains[unit] ** 2)
        if usual >= _LEAST_SHARE and share < _LOST_PART * expected:
            yield (
                f"{unit}: {share:.1%} of its gradient is handed on unchanged, {usual:.1%} in the "
                "others of its kind; is its shortcut missing?"
            )


def _other_scale(params: Sequence[ParamRecord], spec: Spec) -> Iterator[str]:
    """Name layers whose parameters have a far larger root mean square than those of their kind."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for row in params:
        squares[row.unit] = squares.get(row.unit, 0.0) + row.norm**2
        counts[row.unit] = counts.get(row.unit, 0) + row.numel
    sizes = {unit: math.sqrt(squares[unit] / counts[unit]) for unit in squares if counts[unit]}
    for unit, size, usual in _beside_others(sizes, spec):
        if usual > 0 and size > _OUTLIER * usual:
            yield (
                f"{unit}: its parameters are {size / usual:.3g} times as large as those of the "
                "others of its kind."
            )


def _out_of_range(rows: Sequence[LayerRecord]) -> Iterator[str]:
    small = [row for row in rows if (row.underflow_fraction or 0.0) > _UNDERFLOW]
    if small:
        worst = max(small, key=lambda row: row.underflow_fraction or 0.0)
        yield (
            f"{worst.unit}: {worst.underflow_fraction:.1%} of its gradient is below the normal "
            "numbers of its format; scale the loss up, or use bfloat16."
        )
    # Where values are lost already, the verdict says so.
    whole = [row for row in rows if not row.nonfinite and row.headroom_log2 is not None]
    tight = [row for row in whole if (row.headroom_log2 or 0.0) < _LEAST_HEADROOM]
    if tight:
        least = min(tight, key=lambda row: row.headroom_log2 or 0.0)
        yield f"{least.unit}: its gradient fills the range of its format; scale the loss down."


def _beside_others(values: Mapping[str, float], spec: Spec) -> Iterator[tuple[str, float, float]]:
    """Yield each unit of a kind with enough units, its value, and the median of the kind."""
    kinds: dict[str, list[str]] = {}
    for unit in values:
        kinds.setdefault(spec.kind_of(unit), []).append(unit)
    for units in kinds.values():
        usual = median(values[unit] for unit in units)
        for unit in units if len(units) >= _FEWEST else ():
            yield unit, values[unit], usual
