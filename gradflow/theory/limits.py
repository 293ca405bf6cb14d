"""Limits of the theory, and how closely it holds; tests/theory/test_theory_measured.py has both."""

from __future__ import annotations

import numpy as np

from gradflow.specs.stack import StackSpec
from gradflow.theory.finite_width.band import LevelNoise
from gradflow.theory.maths import Array
from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS
from gradflow.theory.mean_field.branches import BRANCH_MOMENTS, BranchTape
from gradflow.theory.mean_field.layouts import Layout, Moments
from gradflow.theory.mean_field.norms import KNOWN_NORMS, POINTWISE_PHI
from gradflow.theory.mean_field.recursion import MomentPasses
from gradflow.theory.template import NoTheoryError, Stack, TemplateUnit

_LEAST_WIDTH = 32
_LEAST_ELEMENTS = 64  # elements that a norm averages
_LEAST_ROWS = 16  # rows that a batchnorm averages
_MOST_NOISE = 4.0  # nats^2 of |g|^2
_MOST_DRIFT = 0.02  # nats^2 of |g|^2
_MOST_TOLERANCE = 0.15  # decades of |g|
_MOST_ENTRIES = 1 << 23  # entries, of 50 bytes each, of the T x T kernels of all causal units

_BORDER = 0.2  # share of the profile times the pixels on a side; measured: up to 0.15
_CLOSE, _WIDE = 0.025, 0.1  # decades of |g|; the latter for post-norm and causal


def check_spec(spec: StackSpec) -> None:
    """Refuse a specification whose loss has no formula.

    Raises:
        NoTheoryError: the loss is mse.
    """
    if spec.loss == "mse":
        raise NoTheoryError("the gradient of mse contains the output, and so the weights")


def check_stack(stack: Stack) -> None:
    """Refuse a stack with a unit, norm or size that the formulas do not cover.

    Raises:
        NoTheoryError: the message says which.
    """
    if stack.shape.width < _LEAST_WIDTH:
        raise NoTheoryError(f"width {stack.shape.width} is too small: theory is of infinite width")
    units = tuple(dict.fromkeys(stack.units))
    for unit in units:
        _check_unit(unit)
        for norm in unit.norms:
            if norm not in KNOWN_NORMS:
                raise NoTheoryError(f"the norm {norm} has no formula")
    if any(unit.w_transform is not None for unit in units):
        _check_highway(stack, units)
    if stack.head is not None:
        _check_head(stack, units)
    if any(unit.kind == "attention" for unit in units):
        _check_tokens(stack, units)


def _check_highway(stack: Stack, units: tuple[TemplateUnit, ...]) -> None:
    for unit in units:
        if unit.w_transform is None or not unit.is_single or unit.norms:
            raise NoTheoryError("highway layers beside other units, or of other parts")
    if stack.head is not None and stack.shape.domain == "images":
        raise NoTheoryError("highway layers under cross-entropy: pixels share one gradient")


def _check_head(stack: Stack, units: tuple[TemplateUnit, ...]) -> None:
    if not any(unit.a or unit.norms for unit in units):
        raise NoTheoryError("cross-entropy leans on the output, which a plain net amplifies")
    for norm in ("batchnorm", "groupnorm") if stack.shape.domain == "images" else ():
        # These norms average over few samples or pixels, whose gradients are alike here.
        if any(norm in unit.norms for unit in units):
            raise NoTheoryError(f"{norm} under cross-entropy: an image's pixels share one gradient")


def _check_tokens(stack: Stack, units: tuple[TemplateUnit, ...]) -> None:
    if any("batchnorm" in unit.norms for unit in units):
        raise NoTheoryError("batchnorm beside attention: tokens of one sample and of others differ")
    if stack.shape.causal and len(stack.units) * stack.shape.tokens**2 > _MOST_ENTRIES:
        raise NoTheoryError(
            f"a causal mask over {stack.shape.tokens} tokens in {len(stack.units):,} units: "
            "theory would hold too many T x T kernels"
        )


def _check_unit(unit: TemplateUnit) -> None:
    if unit.kind not in BRANCH_MOMENTS:
        raise NoTheoryError(f"the branch {unit.kind} has no formula")
    if unit.kind == "attention" and not unit.a:
        raise NoTheoryError("attention without a shortcut collapses the tokens at once")
    if unit.kind in ("ffn", "resnet") and not unit.a and "batchnorm" in unit.norms:
        raise NoTheoryError(f"batchnorm in a plain {unit.kind}: the rows' own sizes drift apart")
    if unit.w_gate is not None and not unit.a:
        raise NoTheoryError("a gated ffn without a shortcut: its products come far apart")
    odd = unit.activation in ACTIVATION_MOMENTS and ACTIVATION_MOMENTS[unit.activation].odd
    if unit.activation not in ACTIVATION_MOMENTS:
        raise NoTheoryError(f"the activation {unit.activation} has no moments")
    if unit.is_single and not odd and set(unit.norms) & set(POINTWISE_PHI):
        raise NoTheoryError(
            f"dyt and derf of a stream with a mean, as {unit.activation}(Wx) has, have no formula"
        )
    if unit.is_single and unit.a and not (odd or unit.norms or unit.w_transform):
        raise NoTheoryError(
            f"x + {unit.activation}(Wx): its mean adds up along the shortcut, and the gradient "
            "gathers in that one direction"
        )


def check_passes(stack: Stack, passes: MomentPasses, layout: Layout, noise: LevelNoise) -> Array:
    """Return the `tolerance` of a result, or refuse one beyond the range of its own formulas.

    Raises:
        NoTheoryError: the message says why.
    """
    for kind, count in {(norm.kind, norm.number) for tape in passes.tapes for norm in tape.norms}:
        if count < (_LEAST_ROWS if kind == "batchnorm" else _LEAST_ELEMENTS):
            raise NoTheoryError(f"{kind} over {count:.0f} independent elements is too noisy")
    if not noise.variance[0] <= _MOST_NOISE:
        raise NoTheoryError(
            f"width {stack.shape.width} is too small for this depth: seeds would differ by "
            f"{0.5 / np.log(10) * np.sqrt(noise.variance[0]):.2g} decades"
        )
    if not noise.drift + passes.drift <= _MOST_DRIFT:
        unit = stack.units[0]
        what = "a plain net" if unit.w_transform is None else "a highway"
        raise NoTheoryError(
            f"{what} of {unit.activation} without norms: rows of unlike size come "
            f"further apart, and width {stack.shape.width} makes them unlike"
        )
    rows = tolerance(stack, passes, layout)
    if not rows[0] <= _MOST_TOLERANCE:
        raise NoTheoryError(_imprecise(stack))
    return rows


def _imprecise(stack: Stack) -> str:
    if any("batchnorm" in unit.norms for unit in stack.units):
        return "batchnorm: rows grow correlated at this width and depth"
    return f"width {stack.shape.width} is too small for a plain net of {len(stack.units):,} units"


def tolerance(stack: Stack, passes: MomentPasses, layout: Layout) -> Array:
    """Return what the formulas may be off by, decades of |g|, at the input and after every unit.

    0.05 decades of |g|^2, or 0.2 where a norm follows the shortcut or a mask is causal. Each plain
    unit of width n adds 0.5/n nats of |g|^2, an order that `mean_field.norms` has in part. Each
    unit with batchnorm adds 0.5 nats (1 beside a shortcut), a fitted factor, times the mean square
    correlation between rows that finite width brings (`_correlations`). In a resnet the norms see
    covariances between pixels that the border makes unlike, of which theory has the averages:
    `_BORDER`.
    """
    post = any(unit.norm_out and unit.a for unit in stack.units)
    base = _WIDE if post or stack.shape.causal else _CLOSE
    rows = np.full(len(stack.units) + 1, base)
    if any("batchnorm" in unit.norms for unit in stack.units):
        each = np.array([1.0 if unit.a else 0.5 for unit in stack.units])
        drift = each * np.array(passes.shares) * _correlations(stack, passes, layout)
        rows[:-1] += 0.5 / np.log(10) * drift[::-1].cumsum()[::-1]
    bordered = stack.shape.side > 1 and any(unit.kind == "resnet" for unit in stack.units)
    if bordered and any("batchnorm" in unit.norms for unit in stack.units):
        rows += _BORDER / stack.shape.side * 0.5 / np.log(10) * np.abs(passes.levels)
    plain = np.array([0.0 if unit.a else 0.5 / stack.shape.width for unit in stack.units])
    rows[:-1] += 0.5 / np.log(10) * plain[::-1].cumsum()[::-1]
    rows[-1] = 0.0
    return rows


def _correlations(stack: Stack, passes: MomentPasses, layout: Layout) -> Array:
    """Return E c^2 between rows after each unit: c^2' = r^2 c^2 + 1/n.

    A unit leaves the share r = (a^2 V_x + b^2 s (E phi')^2 V_u)/V_y of a small correlation, V the
    variances without the rows' common part; a convolution averages over 9 pairs of pixels. In a
    resnet only the branch, by its share of V_y, brings the new part 1/n.
    """
    found, c = np.zeros(len(stack.units)), 0.0
    apart = _apart([x.s for x in passes.streams], layout)
    inputs = _apart([tape.u for tape in passes.tapes], layout)
    columns = zip(stack.units, passes.tapes, apart[:-1], apart[1:], inputs, strict=True)
    for place, (unit, tape, own, after, u) in enumerate(columns):
        out = 1.0 if tape.after is None else layout.mean(tape.after.scale[0])
        kept = (unit.a**2 * own + unit.b**2 * _passed(unit, tape.inside, layout) * u) * out / after
        new = 1 - unit.a**2 * own * out / after if unit.kind == "resnet" else 1.0
        c = kept**2 * c + new**2 / stack.shape.width
        found[place] = c
    return found


def _apart(streams: list[Moments], layout: Layout) -> list[float]:
    """Return the streams' variances without the rows' common part, up to a common factor."""
    squares = np.array([layout.mean_square(s) for s in streams])
    return [float(x) for x in squares * (1 - layout.cosines(streams))]


def _passed(unit: TemplateUnit, tape: BranchTape, layout: Layout) -> float:
    """Return the factor of the branch on a small covariance between rows."""
    if tape.back is None:
        return 0.0
    slope = layout.mean(tape.back[1])
    if tape.last is not None:
        norm = 1.0 if tape.mid is None else layout.mean(tape.mid.scale[1])
        return slope / 3 * norm * layout.mean(tape.last[1]) / 3
    return slope / 3 if unit.kind == "conv" else slope * (unit.is_single or unit.w_out.scale)
