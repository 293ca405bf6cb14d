"""What the weights of one seed do to |g|^2 on its way back through attention, at finite width.

Attention hands all tokens of a sample the same: W^T of their mean gradient. So |g|^2 has two parts,
the mean's and the rest's; of the first there is one probe per sample, of the second T - 1. What
happens to the ln of either part stays there, but for what an ffn moves between them; so do the
errors of the stream, which change what the norms divide a part's branch by. Derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gradflow.theory.finite_width.stream import Errors, StreamStep, stream_errors
from gradflow.theory.maths import Array
from gradflow.theory.mean_field.layouts import Layout
from gradflow.theory.mean_field.recursion import MomentPasses

_LEAST = 1e-12


@dataclass(frozen=True)
class Parts:
    """Of the gradient: its mean over the tokens of a sample, and the rest.

    Attributes:
        level: share R of the mean in |g|^2, at the input and after every unit.
        mean: the branches' shares in the mean's part, per unit.
        rest: the same in the rest.
    """

    level: Array
    mean: Array
    rest: Array


def parts_of(passes: MomentPasses, layout: Layout) -> Parts:
    """R = (1 + (T - 1) c)/T, c the cosine between tokens; a shortcut hands both parts on alike."""
    tokens = layout.shape.tokens
    level = (1 + (tokens - 1) * layout.cosines(passes.gradients)) / tokens
    level = np.clip(level, _LEAST, 1 - _LEAST)
    kept, below, above = 1 - np.array(passes.shares), level[:-1], level[1:]
    mean, rest = (kept * x for x in (above / below, (1 - above) / (1 - below)))
    return Parts(level, 1 - np.minimum(mean, 1.0), 1 - np.minimum(rest, 1.0))


def moved(parts: Parts, mixes: Array, tokens: int) -> tuple[Array, Array]:
    """Of the mean's part below each unit what was in the rest above it, and the other way round.

    An ffn multiplies q and p of the gradient by a and b: 1 - b/a of the mean's part leaves it, and
    1/T of that, of all there is, stays.

    Args:
        parts: of the gradient.
        mixes: whether the unit does so; attention does not.
        tokens: T.
    """
    below, above, one = parts.level[:-1], parts.level[1:], 1 / tokens
    ratio = np.clip((below - one) / np.maximum(above - one, _LEAST), 0.0, 1.0)
    left = np.where(mixes, 1 - ratio, 0.0)
    into = left * (1 - above) * one / below
    return np.minimum(into, 1.0), np.minimum(left * above * (1 - one) / (1 - below), 1.0)


class GradientStep(NamedTuple):
    """One unit.

    Attributes:
        share: of the mean in |g|^2 before it.
        into, out: as `moved` has them.
        mean, rest: the branch's shares in both parts.
        mean_noise, rest_noise: variance that it adds to the ln of both.
        stream: what it does to the stream.
        errors: of the stream before it.
    """

    share: float
    into: float
    out: float
    mean: float
    rest: float
    mean_noise: float
    rest_noise: float
    stream: StreamStep
    errors: Errors


def gradient_variance(
    parts: Parts,
    moves: tuple[Array, Array],
    noises: tuple[Array, Array],
    stream: Sequence[StreamStep],
    layout: Layout,
) -> Array:
    """Variance of ln |g|^2 at the input and after every unit.

    Args:
        parts: of the gradient.
        moves: between them, as `moved` has it.
        noises: variance that each unit adds to the ln of the mean's part, and of the rest.
        stream: what each unit does to the stream.
        layout: of the moments.
    """
    columns = (parts.level[:-1], *moves, parts.mean, parts.rest, *noises)
    numbers = [column.tolist() for column in columns]
    steps = list(map(GradientStep, *numbers, stream, stream_errors(stream, layout)))
    noise, answers, found = (0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), [0.0]
    for step in reversed(steps):
        noise, answers = _before(step, noise, answers)
        found.append(_whole(step, noise, answers))
    return np.array(found[::-1])


def _whole(step: GradientStep, noise: _Covariance, answers: _Answers) -> float:
    """Variance of the ln of both parts together, before the unit."""
    (one, both, two), (mean_e, mean_m, rest_e, rest_m) = noise, answers
    (var_e, covariance, var_m), share, other = step.errors, step.share, 1 - step.share
    e, m = share * mean_e + other * rest_e, share * mean_m + other * rest_m
    own = share * share * one + 2 * share * other * both + other * other * two
    return own + e * e * var_e + 2 * e * m * covariance + m * m * var_m


# Covariance of the ln of the mean's part and of the rest's: of the mean, of both, of the rest.
_Covariance = tuple[float, float, float]
# The ln of the mean's part by e and m of the stream there, and of the rest's.
_Answers = tuple[float, float, float, float]


def _before(
    step: GradientStep, noise: _Covariance, answers: _Answers
) -> tuple[_Covariance, _Answers]:
    """Both before the unit, from those after it."""
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
    unit: StreamStep, noise: _Covariance, answers: _Answers
) -> tuple[_Covariance, _Answers]:
    """With what the unit adds to the stream's errors; answers by the errors before it."""
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
    """(1 - into) of the mean's and `into` of the rest's; `out` and 1 - out."""
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
