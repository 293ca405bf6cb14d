"""What the weights of one seed do to the stream of tokens, and to |g|^2 on its way back.

Derived here for width n, T tokens a sample, to first order in 1/n; r and s are tokens of a sample.

Stream. A unit takes x to a x + b f, f = W h with W of zero mean, s its share in E y^2. The inner
product 2 a b x.f/n has the variance 4 s (1 - s)/n over (E y^2)^2; |f|^2/n has s^2 times 2/n by the
last matrix, and 2/n more by attention's values, or E phi^4/(E phi^2)^2 - 1 over the hidden width
by an ffn's activation: relu's 5, taken for all. For two rows these errors are covariant by the
products of the rows' cosines, x_r.x_s f_r.f_s and (f_r.f_s)^2: common to the tokens of a sample,
whose f is mostly common, and to samples as far as they are alike. Let e be the error of E x_r^2
and m that of E x_r x_s, over E x_r^2. Attention's f is the mean over the tokens, so its size
follows m; an ffn's follows e, and its cosine that of its input through phi's kernel; a norm before
the branch leaves of both only the cosine's m - c e, and one inside the branch divides f by its own
size. So (e, m) go through linear maps (`ee` ... `mm`) and gain what each unit adds. A norm after
the shortcut makes e = 0 and m' = m - c e.

Gradient. Attention hands all tokens of a sample the same W^T (mean gradient). So |g|^2 has two
parts, the mean's R |g|^2 and the rest's: of the first there is one probe a sample, of the second
T - 1. The ln of a part that a unit's branch has the share w of moves by w times the ln of the
branch's gain: by its weights, `mean_noise` and `rest_noise`, and by e and m through what norms
divide by, before and inside the branch (and after the shortcut, where |y|^2 is divided out of
both parts). An ffn moves gradient between the parts: of q and p it makes a q and b p, so 1 - b/a
of the mean's part leaves it, of which 1/T comes back. Carried from the output back are the
covariance of the two parts' ln, and their derivatives by e and m of the stream there (`answers`),
which meet the errors that units before have left: Var = noise + answers . Cov(e, m) . answers.
Neglected: order 1/n^2, and errors of e, m that the gradient's own weights share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gradflow.theory.maths import Array
from gradflow.theory.mean_field.activations import ACTIVATION_MOMENTS
from gradflow.theory.mean_field.layouts import Layout
from gradflow.theory.mean_field.norms import ROW_NORMS
from gradflow.theory.mean_field.recursion import MomentPasses
from gradflow.theory.template import TemplateUnit

_POINTS = 256  # of a table
_LEAST = 1e-12

# Var e, Cov (e, m), Var m.
_Errors = tuple[float, float, float]
# Covariance of the ln of the mean's part and of the rest's: of the mean, of both, of the rest.
_Covariance = tuple[float, float, float]
# Derivatives of the ln of the mean's part by e and m of the stream there, and of the rest's.
_Answers = tuple[float, float, float, float]


class _StreamStep(NamedTuple):
    """What one unit does to the errors e and m of the stream.

    Attributes:
        ee, em: derivatives of e after the addition, by e and by m before the unit.
        me, mm: derivatives of m after the addition, by e and by m before the unit.
        cosine: between tokens, of the output.
        before, after: whether a norm of rows is before the branch, and after the addition.
        inner_e, inner_m: derivatives by e and m of ln of what the branch's norm divides |f|^2 by.
        each: variance that the unit adds to e alone, token by token.
        common: variance that the unit adds to e and m together.
        branch: variance of the ln of what the branch's own norm divides by.
    """

    ee: float
    em: float
    me: float
    mm: float
    cosine: float
    before: bool
    after: bool
    inner_e: float
    inner_m: float
    each: float
    common: float
    branch: float


class _Added(NamedTuple):
    """What every unit adds to the stream, before a norm.

    Attributes:
        x, y: cosines between tokens of the stream before and after the unit.
        s: share of the branch in E y^2.
        f: cosine between tokens of the branch's output.
    """

    x: Array
    y: Array
    s: Array
    f: Array


def _stream_errors(steps: Sequence[_StreamStep], layout: Layout) -> list[_Errors]:
    """Return the errors of the stream before every unit; the input is normal."""
    shape = layout.shape
    first = 2 / shape.width / shape.rows
    state, found = (first, 0.0, first / shape.tokens), []
    for step in steps:
        found.append(state)
        state = _after(step, *state)
    return found


def _after(step: _StreamStep, e: float, em: float, m: float) -> _Errors:
    """Return the covariance of (e, m) after a unit; a norm of the output takes e away."""
    one, two = step.ee * e + step.em * em, step.ee * em + step.em * m
    three, four = step.me * e + step.mm * em, step.me * em + step.mm * m
    e = one * step.ee + two * step.em + step.each + step.common
    em = one * step.me + two * step.mm + step.common
    m = three * step.me + four * step.mm + step.common
    if not step.after:
        return e, em, m
    c = step.cosine
    return 0.0, 0.0, m - 2 * c * em + c * c * e


def _stream_steps(
    units: Sequence[TemplateUnit], passes: MomentPasses, layout: Layout
) -> list[_StreamStep]:
    """Return what every unit does to the errors of the stream."""
    shape, added = layout.shape, _added(units, passes, layout)
    attends = np.array([unit.kind == "attention" for unit in units])
    between, new, value, slope = _cosines(units, passes, added, layout)
    before = np.array([_by_rows(tape.before and tape.before.kind) for tape in passes.tapes])
    inner = np.array([_by_rows(unit.norm_branch) for unit in units])
    x, y, s, f = added
    # e and m of f by those of the stream, over E f^2.
    fall = np.where(before, -slope * x, 0.0)
    ee, em = np.where(attends, fall, ~before), np.where(attends, slope, 0.0)
    me = np.where(attends, fall, np.where(before, 0.0, value) - slope * x)
    inner_e, inner_m = inner * ee, inner * em
    mm = slope - f * inner_m
    me, ee, em = me - f * inner_e, ee - inner_e, em - inner_m
    size = 2 / shape.width + np.where(attends, 2 / shape.width, 5 / shape.hidden)
    cross, own = 4 * s * (1 - s) / shape.width, ~inner * s * s * size
    within, across = cross * x * f + own * f * f, cross * between * new + own * new * new
    after = [_by_rows(unit.norm_out) for unit in units]
    each, common = (cross + own - within) / shape.rows, within / shape.batch
    common = common + across * (1 - 1 / shape.batch)
    kept = (1 - s + s * ee, s * em, s * me, 1 - s + s * mm)
    rest = (inner_e, inner_m, each, common, inner * size / shape.batch)
    columns = [column.tolist() for column in (*kept, y, before)]
    return list(map(_StreamStep, *columns, after, *(column.tolist() for column in rest)))


def _by_rows(norm: str | None) -> bool:
    return norm in ROW_NORMS


def _added(units: Sequence[TemplateUnit], passes: MomentPasses, layout: Layout) -> _Added:
    cosines = np.clip(layout.cosines([x.s for x in passes.streams]), 0.0, 1.0)
    squares, a = np.array(passes.squares), np.array([unit.a for unit in units])
    afters = [tape.after for tape in passes.tapes]
    scales = np.array([1.0 if norm is None else layout.mean_square(norm.scale) for norm in afters])
    kept = np.clip(a * a * squares[:-1] * scales / squares[1:], 0.0, 1.0)
    outputs = (cosines[1:] - kept * cosines[:-1]) / np.maximum(1 - kept, _LEAST)
    return _Added(cosines[:-1], cosines[1:], 1 - kept, np.clip(outputs, 0.0, 1.0))


def _cosines(
    units: Sequence[TemplateUnit], passes: MomentPasses, added: _Added, layout: Layout
) -> tuple[Array, Array, Array, Array]:
    """Return cosines of samples in the stream and in f; of tokens in f, with its slope by x.

    Attention takes the mean over the tokens, an ffn each of them through `_table`.
    """
    between, tokens, found = 0.0, layout.shape.tokens, []
    for unit, tape, x, s in zip(
        units, passes.tapes, added.x.tolist(), added.s.tolist(), strict=True
    ):
        if unit.kind == "attention":
            seen = x + (1 - x) / tokens
            value, slope, new = 1.0, 1 / seen, min(between / seen, 1.0)
        else:
            log_q = round(math.log(layout.mean_square(tape.inside.hidden)), 1)
            values, slopes = _table(unit.activation, unit.w_gate is not None, log_q)
            place = int(x * _POINTS)
            value, slope, new = values[place], slopes[place], values[int(between * _POINTS)]
        found.append((between, new, value, slope))
        between += s * (new - between)
    columns = np.array(found).T
    return columns[0], columns[1], columns[2], columns[3]


@lru_cache(maxsize=256)
def _table(activation: str, gated: bool, log_q: float) -> tuple[list[float], list[float]]:
    """Return tables of E phi phi/E phi^2 and its derivative by the cosine of the arguments."""
    q, c = math.exp(log_q), np.linspace(0.0, 1.0, _POINTS + 1)
    value, slope = (
        np.asarray(x, dtype=float) for x in ACTIVATION_MOMENTS[activation].pair(q, q, q * c)
    )
    slope = slope * q
    if gated:  # times a factor without an activation
        value, slope = value * c, slope * c + value
    return (value / value[-1]).tolist(), (slope / value[-1]).tolist()


@dataclass(frozen=True)
class GradientParts:
    """The gradient's mean over the tokens of a sample, and the rest.

    Attributes:
        level: share R of the mean in |g|^2, at the input and after every unit.
        mean, rest: share of every unit's branch in the mean's part, and in the rest.
    """

    level: Array
    mean: Array
    rest: Array


def gradient_parts(passes: MomentPasses, layout: Layout) -> GradientParts:
    """Return the parts: R = (1 + (T - 1) c)/T, c the cosine between tokens of the gradient.

    A shortcut hands both parts on alike, so what a part has beyond it came through the branch.
    """
    tokens = layout.shape.tokens
    level = (1 + (tokens - 1) * layout.cosines(passes.gradients)) / tokens
    level = np.clip(level, _LEAST, 1 - _LEAST)
    kept, below, above = 1 - np.array(passes.shares), level[:-1], level[1:]
    mean, rest = (kept * x for x in (above / below, (1 - above) / (1 - below)))
    return GradientParts(level, 1 - np.minimum(mean, 1.0), 1 - np.minimum(rest, 1.0))


def _moved(parts: GradientParts, mixes: Array, tokens: int) -> tuple[Array, Array]:
    """Return the share of the mean's part that was in the rest above each unit, and the converse.

    `mixes` tells which units move gradient between the parts: an ffn does, attention does not.
    """
    below, above, one = parts.level[:-1], parts.level[1:], 1 / tokens
    ratio = np.clip((below - one) / np.maximum(above - one, _LEAST), 0.0, 1.0)
    left = np.where(mixes, 1 - ratio, 0.0)
    into = left * (1 - above) * one / below
    return np.minimum(into, 1.0), np.minimum(left * above * (1 - one) / (1 - below), 1.0)


class _GradientStep(NamedTuple):
    """What one unit does to the two parts of |g|^2.

    Attributes:
        share: share of the mean in |g|^2 before the unit.
        into: share of the mean's part that was in the rest above the unit.
        out: share of the rest that was in the mean's part above the unit.
        mean, rest: the branch's shares in the mean's part and in the rest.
        mean_noise, rest_noise: variances that the unit's weights add to the ln of each part.
        stream: what the unit does to the stream.
        errors: errors of the stream before the unit.
    """

    share: float
    into: float
    out: float
    mean: float
    rest: float
    mean_noise: float
    rest_noise: float
    stream: _StreamStep
    errors: _Errors


def tokens_variance(
    units: Sequence[TemplateUnit],
    passes: MomentPasses,
    parts: GradientParts,
    noises: tuple[Array, Array],
    layout: Layout,
) -> Array:
    """Return the variance of ln |g|^2 at the input and after every unit.

    `noises` are the variances that each unit's weights add to the ln of the mean's part, and of the
    rest.
    """
    mixes = np.array([unit.kind != "attention" for unit in units])
    moves, stream = _moved(parts, mixes, layout.shape.tokens), _stream_steps(units, passes, layout)
    columns = (parts.level[:-1], *moves, parts.mean, parts.rest, *noises)
    numbers = [column.tolist() for column in columns]
    steps = list(map(_GradientStep, *numbers, stream, _stream_errors(stream, layout)))
    noise, answers, found = (0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), [0.0]
    for step in reversed(steps):
        noise, answers = _before(step, noise, answers)
        found.append(_whole(step, noise, answers))
    return np.array(found[::-1])


def _whole(step: _GradientStep, noise: _Covariance, answers: _Answers) -> float:
    """Return the variance of the ln of both parts together, before the unit."""
    (one, both, two), (mean_e, mean_m, rest_e, rest_m) = noise, answers
    (var_e, covariance, var_m), share, other = step.errors, step.share, 1 - step.share
    e, m = share * mean_e + other * rest_e, share * mean_m + other * rest_m
    own = share * share * one + 2 * share * other * both + other * other * two
    return own + e * e * var_e + 2 * e * m * covariance + m * m * var_m


def _before(
    step: _GradientStep, noise: _Covariance, answers: _Answers
) -> tuple[_Covariance, _Answers]:
    """Return noise and answers before the unit, from those after it."""
    noise, answers = _by_stream(step.stream, noise, answers)
    if step.into or step.out:
        noise, answers = _mixed(step.into, step.out, noise, answers)
    (one, both, two), (mean_e, mean_m, rest_e, rest_m) = noise, answers
    w, v, stream = step.mean, step.rest, step.stream
    own, pair = stream.before + stream.inner_e, stream.inner_m
    one += step.mean_noise + w * w * stream.branch
    two += step.rest_noise + v * v * stream.branch
    both += w * v * stream.branch
    return (one, both, two), (
        mean_e - w * own,
        mean_m - w * pair,
        rest_e - v * own,
        rest_m - v * pair,
    )


def _by_stream(
    unit: _StreamStep, noise: _Covariance, answers: _Answers
) -> tuple[_Covariance, _Answers]:
    """Add what the unit adds to the stream's errors; take answers to the errors before it."""
    (one, both, two), (mean_e, mean_m, rest_e, rest_m) = noise, answers
    if unit.after:
        mean_e, rest_e = -1 - unit.cosine * mean_m, -1 - unit.cosine * rest_m
    mean, rest, each, common = mean_e + mean_m, rest_e + rest_m, unit.each, unit.common
    one += each * mean_e * mean_e + common * mean * mean
    both += each * mean_e * rest_e + common * mean * rest
    two += each * rest_e * rest_e + common * rest * rest
    return (one, both, two), (
        mean_e * unit.ee + mean_m * unit.me,
        mean_e * unit.em + mean_m * unit.mm,
        rest_e * unit.ee + rest_m * unit.me,
        rest_e * unit.em + rest_m * unit.mm,
    )


def _mixed(
    into: float, out: float, noise: _Covariance, answers: _Answers
) -> tuple[_Covariance, _Answers]:
    """Mix the parts: the mean's takes `into` from the rest's, the rest's `out` from the mean's."""
    (one, both, two), (mean_e, mean_m, rest_e, rest_m) = noise, answers
    stay, keep = 1 - into, 1 - out
    return (
        stay * stay * one + 2 * stay * into * both + into * into * two,
        stay * out * one + (stay * keep + into * out) * both + into * keep * two,
        out * out * one + 2 * out * keep * both + keep * keep * two,
    ), (
        stay * mean_e + into * rest_e,
        stay * mean_m + into * rest_m,
        out * mean_e + keep * rest_e,
        out * mean_m + keep * rest_m,
    )
