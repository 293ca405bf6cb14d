"""What the weights of one seed do to the stream of tokens, at finite width.

A unit adds 2 a b x f/n to E x^2, over width n: the tokens of a sample, whose common part f mostly
is, come out larger or smaller together, and so do samples as far as they are alike. What is added
once stays until a norm follows the shortcut. e is the error of E x_r^2, and m that of E x_r x_s,
two tokens of a sample, both over E x_r^2; m changes what attention adds, and so later e. Derived
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
Errors = tuple[float, float, float]


class StreamStep(NamedTuple):
    """One unit.

    Attributes:
        ee, em, me, mm: e after its addition by e and m before it, and m likewise.
        cosine: between tokens, of the output.
        before, after: whether norms of rows are there.
        inner_e, inner_m: ln of what the branch's own norm divides |f|^2 by, by e and m.
        each, common: variance that it adds to e alone, token by token, and to e and m together.
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
        x, y: cosines between tokens of the stream before and after.
        s: share of the branch in E x^2.
        f: cosine between tokens of the branch's output.
    """

    x: Array
    y: Array
    s: Array
    f: Array


def stream_errors(steps: Sequence[StreamStep], layout: Layout) -> list[Errors]:
    """Of the stream before every unit; the input is normal."""
    shape = layout.shape
    first = 2 / shape.width / shape.rows
    state, found = (first, 0.0, first / shape.tokens), []
    for step in steps:
        found.append(state)
        state = _after(step, *state)
    return found


def _after(step: StreamStep, e: float, em: float, m: float) -> Errors:
    """The covariance after a unit's addition; a norm of the output takes e away."""
    one, two = step.ee * e + step.em * em, step.ee * em + step.em * m
    three, four = step.me * e + step.mm * em, step.me * em + step.mm * m
    e = one * step.ee + two * step.em + step.each + step.common
    em = one * step.me + two * step.mm + step.common
    m = three * step.me + four * step.mm + step.common
    if not step.after:
        return e, em, m
    c = step.cosine
    return 0.0, 0.0, m - 2 * c * em + c * c * e


def stream_steps(
    units: Sequence[TemplateUnit], passes: MomentPasses, layout: Layout
) -> list[StreamStep]:
    """Of every unit."""
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
    return list(map(StreamStep, *columns, after, *(column.tolist() for column in rest)))


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
    """Of samples, in the stream and in f; of tokens, in f, where x is all they share; its slope.

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
    """E phi phi/E phi^2 and its derivative by the cosine of the arguments."""
    q, c = math.exp(log_q), np.linspace(0.0, 1.0, _POINTS + 1)
    value, slope = (
        np.asarray(x, dtype=float) for x in ACTIVATION_MOMENTS[activation].pair(q, q, q * c)
    )
    slope = slope * q
    if gated:  # times a factor without an activation
        value, slope = value * c, slope * c + value
    return (value / value[-1]).tolist(), (slope / value[-1]).tolist()
