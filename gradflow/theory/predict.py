"""`predict`: the gradient's profile of a stack by theory, with its band, or why there is none.

The prediction is log10 of |dL/dy_u| relative to |dL/dy_D|. It holds for every loss whose gradient
at y_D has independent elements that do not depend on the stack's weights: for the default cotangent
exactly, for cross-entropy through a head after these derivations, v the logits' variance, c their
cosine between two tokens, C the number of classes:

- g = W^T (p - e), p the softmax and e a random label. With E sum p p' = (1 + h)/C, h the excess of
  `mean_field.attention`, and E p_label = 1/C: E |p - e|^2 = 1 - 1/C + h(v)/C, and for two tokens
  E (p - e).(p' - e') = h(v c)/C. The head's norm scales both alike.
- Scatter of ln |g_u|^2/|g_D|^2: let the token mean have the share R_u of |g_u|^2. If its energy at
  the output is off by d, relatively, the ratio moves by (R_u - R_D) d. The softmax's common part is
  the share a of that energy, of relative variance k (`scatter`), and the labels the rest, a sum of
  C - 1 squared normals: Var d = (a^2 k + (1 - a)^2 2/(C - 1))/B for B independent samples.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from gradflow.specs.stack import StackSpec
from gradflow.theory.describe import describe_stack
from gradflow.theory.finite_width.band import LevelNoise, finite_width
from gradflow.theory.highway import run_highway
from gradflow.theory.limits import check_passes, check_spec, check_stack
from gradflow.theory.maths import Array
from gradflow.theory.mean_field.attention import LOGIT_LIMIT, excess, excess_array, scatter
from gradflow.theory.mean_field.layouts import CausalTokens, Exchangeable, Layout, Moments
from gradflow.theory.mean_field.norms import Stream, normalise
from gradflow.theory.mean_field.recursion import MomentPasses, run_units
from gradflow.theory.streams.recursion import run_streams
from gradflow.theory.template import Head, NoTheoryError, Stack
from gradflow.theory.unit_theory import UNIT_THEORY, UnitTheory

_NATS_OF_SQUARE = 0.5 / math.log(10)  # decades of a norm per nat of its square
_ONE_STREAM = UnitTheory()


@dataclass(frozen=True)
class Prediction:
    """What theory says of a stack; one entry per row of `LayerRecord`: the input, then the units.

    Attributes:
        log10_grad_norm: log10 of the gradient's norm over that at the output; None where theory
            has no answer.
        spread: standard deviation of one seed about `log10_grad_norm`, decades.
        tolerance: what theory itself may be off by, decades.
        act_rms: root mean square of the stream.
        act_cos: cosine between tokens of the stream (between samples, where there are no tokens).
        reason: why there is no prediction, else None.
    """

    log10_grad_norm: tuple[float, ...] | None
    spread: tuple[float, ...] = ()
    tolerance: tuple[float, ...] = ()
    act_rms: tuple[float, ...] = ()
    act_cos: tuple[float, ...] = ()
    reason: str | None = None

    def band(self, seeds: int = 1) -> tuple[tuple[float, float], ...]:
        """Return the lowest and highest value expected of the mean over `seeds`, row by row.

        The band is the tolerance plus two standard deviations; empty where there is no prediction.
        """
        if self.log10_grad_norm is None:
            return ()
        halves = (
            t + 2 * s / math.sqrt(seeds) for t, s in zip(self.tolerance, self.spread, strict=True)
        )
        return tuple((x - h, x + h) for x, h in zip(self.log10_grad_norm, halves, strict=True))


def predict(spec: StackSpec) -> Prediction:
    """Predict the gradient's profile of a stack that gradflow builds.

    The seed and the dtype do not matter. Where theory has no answer, the prediction's `reason` says
    why.
    """
    try:
        check_spec(spec)
        with _uncollected():
            stack = describe_stack(spec)
    except NoTheoryError as limit:
        return Prediction(None, reason=str(limit))
    return predict_stack(stack)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switch off the cyclic garbage collector, and restore it.

    The tapes of a deep stack are a million tuples without a cycle, which the collector would search
    again and again: a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def predict_stack(stack: Stack) -> Prediction:
    """Predict the gradient's profile of units of the template, as a scheme makes them."""
    try:
        with _uncollected():
            stack, layout, passes = _both_passes(stack)
            noise = _noise(stack, passes, layout)
            rows = check_passes(stack, passes, layout, noise)
            return _to_prediction(stack, passes, layout, noise, rows)
    except NoTheoryError as limit:
        return Prediction(None, reason=str(limit))


def total_decades(spec: StackSpec) -> float:
    """Return log10 of the gradient norm at the input over that at the output, at infinite width.

    Raises:
        NoTheoryError: there is no prediction; finite width is no obstacle here.
    """
    check_spec(spec)
    stack, _, passes = _both_passes(describe_stack(spec))
    return float(_NATS_OF_SQUARE * _of_state(stack, np.array(passes.levels))[0])


def _both_passes(stack: Stack) -> tuple[Stack, Layout, MomentPasses]:
    """Return the stack as it is passed, the layout of its moments, and both passes."""
    check_stack(stack)
    layout = layout_of(stack)
    if any(unit.w_transform is not None for unit in stack.units):
        return stack, layout, run_highway(stack.units, stack.input_square, layout)
    theory = _theory(stack)
    if theory.prepare is not None:
        stack, theory = theory.prepare(stack, layout), _ONE_STREAM
    start = Stream(layout.start(stack.input_square), common=0.0 if layout.shape.side > 1 else None)
    last = partial(_start, stack, layout=layout)
    if stack.state is None or theory.steps is None:
        return stack, layout, run_units(stack.units, start, last, layout)
    steps, readout = theory.unit_steps(stack.units, stack.state), theory.read_steps(stack.state)
    return stack, layout, run_streams(steps, readout, start, last, layout)


def _theory(stack: Stack) -> UnitTheory:
    """Return the theory of what the stack's units hand on."""
    return _ONE_STREAM if stack.state is None else UNIT_THEORY[stack.state.kind]


def _noise(stack: Stack, passes: MomentPasses, layout: Layout) -> LevelNoise:
    """Return the noise of one seed in the levels of the rows."""
    theory = _theory(stack)
    fewer, whole = _fewer_probes(stack), theory.norms_see_all
    noise = finite_width(stack.units, passes, layout, fewer, whole=whole)
    if stack.state is not None:
        answers = theory.answers(np.array(passes.levels), stack.state)
        noise = replace(noise, variance=noise.variance * answers**2)
    noise = noise.plus(_start_noise(stack, passes, layout))
    return noise.plus(np.array(passes.scatter or 0.0))


def _of_state(stack: Stack, levels: Array) -> Array:
    """Return the levels of the rows, which hold all streams of a state."""
    return levels if stack.state is None else _theory(stack).levels(levels, stack.state)


def layout_of(stack: Stack) -> Layout:
    """Return the layout of the stream's moments: which of its rows differ."""
    attends = any(unit.kind == "attention" for unit in stack.units)
    return (CausalTokens if stack.shape.causal and attends else Exchangeable)(stack.shape)


def _to_prediction(
    stack: Stack, passes: MomentPasses, layout: Layout, noise: LevelNoise, rows: Array
) -> Prediction:
    level = _of_state(stack, np.array(passes.levels) + noise.bias)
    streams, squares = passes.streams, passes.squares
    if stack.state is not None:
        streams = _theory(stack).streams(streams, stack.state, layout)
        squares = [layout.mean_square(x.s) for x in streams]
    return Prediction(
        tuple((_NATS_OF_SQUARE * level).tolist()),
        tuple((_NATS_OF_SQUARE * np.sqrt(noise.variance)).tolist()),
        tuple(rows.tolist()),
        tuple(np.sqrt(squares).tolist()),
        tuple(layout.cosines([x.s for x in streams]).tolist()),
    )


def _fewer_probes(stack: Stack) -> float:
    """Return what cross-entropy adds to 1/N: few classes; one gradient for an image's pixels."""
    if stack.head is None:
        return 0.0
    pooled = 1 / stack.shape.batch if stack.shape.domain == "images" else 0.0
    return 1 / (stack.head.classes - 1) + pooled


def _start_noise(stack: Stack, passes: MomentPasses, layout: Layout) -> Array:
    """Return the variance of ln |g|^2 by what tokens share under cross-entropy (see the top)."""
    if stack.head is None or stack.shape.domain != "tokens":
        return np.zeros(len(passes.gradients))
    tokens, classes = stack.shape.tokens, stack.head.classes
    means = (1 + (tokens - 1) * layout.cosines(passes.gradients)) / tokens
    softmax = max(1 - 1 / (tokens * means[-1]), 0.0)
    logits = _head_input(stack.head, passes.streams[-1], layout)
    common = stack.head.weights.scale * layout.mean(layout.diagonal(logits.s))
    common *= max(layout.cosine(logits.s), 0.0)
    each = softmax**2 * scatter(common, classes) + (1 - softmax) ** 2 * 2 / (classes - 1)
    return np.asarray((means - means[-1]) ** 2 * each / stack.shape.batch)


def _start(stack: Stack, y: Stream, layout: Layout) -> Moments:
    """Return the moments of the gradient at y_D over its mean square: 1, and what rows share."""
    if stack.head is None or stack.shape.domain != "tokens":
        return layout.start(1.0)
    logits = _head_input(stack.head, y, layout)
    s = tuple(stack.head.weights.scale * x + stack.head.weights.bias for x in logits.s)
    _check_head_logits(stack, layout.mean(layout.diagonal(s)))
    classes = stack.head.classes
    if len(s) == 2:
        own, cross = (excess(float(x), classes) for x in s)
        return 1.0, cross / (classes - 1 + own)
    return (_shared_softmax(np.asarray(s[0]), classes),)


def _check_head_logits(stack: Stack, variance: float) -> None:
    """Refuse logits beyond the softmax's moments: streams that add up without a final norm."""
    if stack.state is not None and variance > LOGIT_LIMIT:
        raise NoTheoryError(
            f"cross-entropy over logits of variance {variance:.2g}, above {LOGIT_LIMIT:g}, of "
            "streams without a final norm"
        )


def _head_input(head: Head, y: Stream, layout: Layout) -> Stream:
    """Return the stream that the head projects."""
    read = tuple([head.read**2 * entry for entry in y.s])
    return normalise(head.norm, Stream(read, head.read * y.mean), layout)[0]


def _shared_softmax(logits: Array, classes: int) -> Array:
    """Return the T x T covariance of the gradients of causal tokens over their mean square."""
    h = excess_array(logits, np.full(logits.shape, classes))
    g: Array = h / (classes - 1 + np.diagonal(h).mean())
    np.fill_diagonal(g, 1.0)
    return g
