"""Attention whose values are another stream than that of its queries and keys.

`attention` has the moments of the weights A; here they mix values v of any covariance that are
independent of the logits. Backward the two ways part: A^T g to the values, and dl_ts = A_ts (v_s -
mean v) g_t through queries and keys to the input. Derived here as there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gradflow.theory.maths import Array, Number
from gradflow.theory.mean_field.attention import MixTape, mix, pull_mix
from gradflow.theory.mean_field.moment_sums import Moments
from gradflow.theory.template import Unit, Weights

_SMALL = 1e-12


class AttendTape(NamedTuple):
    """Both ways back, as `attention.pull_mix` takes them: the mixing alone, and all of it."""

    mixing: MixTape
    whole: MixTape


def attend(unit: Unit, u: Moments, values: Moments, tokens: int) -> tuple[Moments, AttendTape]:
    """Moments of W_out softmax(q k) v, q and k of the input u."""
    _, tape = mix(_with_bare_values(unit), u, tokens)
    ratio = np.maximum(_gap(values) / np.maximum(_gap(u), _SMALL), _SMALL)
    rows = len(u) == 2
    mixed = _mixed_rows(values, tape.h, tokens) if rows else _mixed_past(values, tape.h)
    whole = _retaped(tape, float(ratio) if rows else _by_first(ratio))
    out = tuple([unit.w_out.scale * entry + unit.w_out.bias for entry in mixed])
    return out, AttendTape(_retaped(tape, 1.0, logits=0.0), whole)


def pull_attend(unit: Unit, tape: AttendTape, g: Moments, tokens: int) -> tuple[Moments, Moments]:
    """Moments of the gradient at the input, through the logits, and at the values."""
    g = tuple([unit.w_out.scale * entry for entry in g])
    to_values = pull_mix(tape.mixing, g, tokens)
    both = pull_mix(tape.whole, g, tokens)
    return tuple([b - v for b, v in zip(both, to_values, strict=True)]), to_values


@lru_cache(maxsize=64)
def _with_bare_values(unit: Unit) -> Unit:
    return replace(unit, w_in=Weights(1.0))


def _retaped(tape: MixTape, ratio: Number, logits: float = 1.0) -> MixTape:
    """With values that differ `ratio` times as much as the input does, so that keys do not."""
    return MixTape(
        values=1.0,
        gap=tape.gap * ratio,
        query=tape.query,
        keys=tape.keys / ratio,
        to_query=logits * tape.to_query,
        to_key=logits * tape.to_key,
        h=tape.h,
    )


def _mixed_rows(values: Moments, h: Moments, tokens: int) -> Moments:
    """p + (q - p)(1 + h)/T."""
    q, p = values
    return tuple([p + (q - p) * (1 + x) / tokens for x in h])


def _mixed_past(values: Moments, h: Moments) -> Moments:
    """The same with the sums over each token's past."""
    k, t = np.asarray(values[0]), np.arange(1, len(np.asarray(values[0])) + 1)
    past = k.cumsum(0).cumsum(1) / np.multiply.outer(t, t)
    return (past + h[0] * _by_first(_gap(values)) / np.maximum.outer(t, t),)


def _gap(x: Moments) -> Array:
    """E (x - mean x)^2 over the tokens seen, as an unbiased variance: for every token."""
    if len(x) == 2:
        return np.asarray(x[0] - x[1])
    k = np.asarray(x[0])
    t = np.arange(1.0, len(k) + 1)
    means = (k.cumsum(0).cumsum(1)).diagonal() / (t * t)
    return np.maximum(k.diagonal().cumsum() / t - means, 0.0) * t / np.maximum(t - 1, 1)


def _by_first(x: Array) -> Array:
    """Of the earlier of two tokens, T x T."""
    t = np.arange(len(x))
    return x[np.minimum.outer(t, t)]
