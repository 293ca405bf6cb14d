"""Softmax attention: moments of the mixed values, and of the gradient through the mixing.

y_t = sum_s A_ts v_s, A_ts = softmax_s l_ts, l_ts = q_t.k_s / sqrt(c). All three weights are
independent and normal. Derived here in the manner of Noci et al. 2022 (arXiv:2206.03126) and Kedia
et al. 2024 (arXiv:2403.09635), for T tokens of moments (q, p), s_v, s_q, s_k the weights' scales:

- Logits. Given the queries, the logits of query t are normal in W_k. What all keys share moves them
  alike and drops out of the softmax; T independent logits of variance g = E q^2 s_k (q - p) are
  left, of covariance g cos for two queries of cosine cos. With E sum_s A_ts A_t's = (1 + h)/T the
  excess h(g) is exact for one query (`excess`), about e^g - 1; for two it is taken at g cos.
- Forward. A and v are independent and sum_s A_ts = 1, so that
  E y_t y_t' = p_v + (q_v - p_v)(1 + h)/T.
- To the values, (A^T g)_s = sum_t A_ts g_t. Its mean square is [q_g (1 + h_own) +
  (T - 1) p_g (1 + h_cross)]/T, and its sum over s is the sum of g.
- To the logits, dl_ts = A_ts (v_s - y_t).g_t, whose sum over s is 0. With d = (q - p)(1 - 1/T) the
  tokens' E (u - mean u)^2, queries get sum_s dl_ts k_s, of mean square s_v d s_k d times
  q_g (1 + h_own)/T; keys get sum_t dl_ts q_t, of mean square s_v d times
  [q_g q_q (1 + h_own) + (T - 1) p_g p_q (1 + h_cross)]/T, and 0 in the sum over s.
- Causal: the same, each sum over the tokens that are seen; of t < t' both see t, and T becomes t'.

Neglected: correlations of A_s and A_s' beyond sum_s A_s = 1, y_t less the mean value (both of
order 1/T), and the scatter of q.k over a head's c features (1/c); measured, attention alone is
off by 13 % of |g|^2 at T = 64. The theory ends at g = 2, beyond which softmax condenses on few
tokens (Giorlandino & Goldt 2025, arXiv:2505.24333).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradflow.theory.maths import Array, Number, least, most
from gradflow.theory.mean_field.layouts import Moments, through_weights
from gradflow.theory.template import NoTheoryError, TemplateUnit, WeightMoments

LOGIT_LIMIT = 2.0

_TABLE_END = 4.0
_TABLE_STEPS = 128
_SCATTER_NUMBERS = 1 << 17
_SMALLEST_LOGITS = 1e-10
_SMALLEST_GAP = 1e-12


@cache
def _excess_table(first: int, last: int) -> Array:
    """Return h(g, t), a row for each t = first ... last, g on an even grid up to `_TABLE_END`.

    1/S^2 = int_0^inf u e^{-uS} du for S = sum e^l makes the mean over t independent logits
    E sum A^2 = t int u E[e^{2l - u e^l}] (E e^{-u e^l})^{t-1} du, exact for any t.
    """
    z = np.linspace(-7.0, 7.0, 71)
    weight = np.exp(-0.5 * z * z) / np.exp(-0.5 * z * z).sum()
    log_u = np.linspace(-np.log(last) - 14.0, 10.0, 241)
    parts = []
    for g in np.linspace(0.0, _TABLE_END, _TABLE_STEPS + 1):  # all at once take 70 MB
        exponent = log_u[:, None] + np.sqrt(g) * z
        decay = np.exp(-np.exp(exponent)) * weight
        parts.append((decay.sum(-1), (decay * np.exp(2 * exponent)).sum(-1)))
    one, two = (np.array(part) for part in zip(*parts, strict=True))
    two *= one ** (first - 1) * (log_u[1] - log_u[0])
    rows = []
    for t in range(first, last + 1):
        rows.append(t * t * two.sum(-1) - 1)
        two *= one
    return np.maximum(np.asarray(rows), 0.0)


@cache
def _excess_list(tokens: int) -> list[float]:
    return list(map(float, _excess_table(tokens, tokens)[0]))


def excess(g: float, tokens: int) -> float:
    """Return h = T E sum_s A_s^2 - 1 for T independent logits of variance g; -e^g h(-g) at g < 0.

    A negative g is that of two queries with anticorrelated logits, where E sum_s A_s A'_s < 1/T.
    """
    place = min(abs(g) / _TABLE_END, 1.0) * _TABLE_STEPS
    low = min(int(place), _TABLE_STEPS - 1)
    table = _excess_list(tokens)
    h = table[low] + (place - low) * (table[low + 1] - table[low])
    return h if g >= 0 else -h * float(np.exp(g))


def excess_array(g: Array, tokens: npt.NDArray[np.int64]) -> Array:
    """Return `excess` element by element, for numbers of tokens that broadcast with g."""
    return _looked_up(g, int(tokens.max()), _row_start(tokens))


def _row_start(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return (tokens - 1) * (_TABLE_STEPS + 1)


def _looked_up(g: Array, last: int, starts: npt.NDArray[np.int64]) -> Array:
    """Return h from the table of 1 ... `last` tokens; `starts` are the first places of its rows."""
    below, steps = _excess_steps(last)
    is_signed = least(g) < 0
    place = (np.abs(g) if is_signed else g) * (_TABLE_STEPS / _TABLE_END)
    floor = np.floor(place if most(place) < _TABLE_STEPS else np.minimum(place, _TABLE_STEPS))
    where = starts + floor.astype(np.int64)
    h = below.take(where) + (place - floor) * steps.take(where)
    return np.where(g < 0, -h * np.exp(np.minimum(g, 0.0)), h) if is_signed else np.asarray(h)


@cache
def _excess_steps(last: int) -> tuple[Array, Array]:
    """Return the table of 1 ... last tokens in one row, and the steps between its entries."""
    table = _excess_table(1, last)
    return table.ravel(), np.diff(table, axis=1, append=table[:, -1:]).ravel()


@cache
def scatter(g: float, tokens: int) -> float:
    """Return the relative variance of sum_s (A_s - 1/T)^2, T logits of variance g, by sampling."""
    if g < _SMALLEST_LOGITS:  # the limit, which rounding would hide
        return 2 / (tokens - 1)
    draws = max(_SCATTER_NUMBERS // tokens, 256)
    logits = np.sqrt(g) * np.random.default_rng(0).standard_normal((draws, tokens))
    weights = np.exp(logits - logits.max(1, keepdims=True))
    off = ((weights / weights.sum(1, keepdims=True) - 1 / tokens) ** 2).sum(1)
    return float(off.var() / off.mean() ** 2)


class MixTape(NamedTuple):
    """What the way back through the mixing needs; covariances between rows as `Moments`.

    Attributes:
        values: scale s_v of the value weights.
        gap: d, the E (u - mean u)^2 over the t tokens seen, times 1 - 1/t; u the branch's input.
        query: covariances of the queries.
        keys: factor from `gap` to the same of the keys.
        to_query, to_key: scales on the way back through the query and the key weights.
        h: the excess, for each class of entries.
    """

    values: float
    gap: Number
    query: Moments
    keys: Number
    to_query: Number
    to_key: Number
    h: Moments


def mix(unit: TemplateUnit, u: Moments, tokens: int) -> tuple[Moments, MixTape]:
    """Return the moments of sum_s A_ts v_s, before the output projection, and the way back's tape.

    Raises:
        NoTheoryError: the logits' variance is above `LOGIT_LIMIT`.
    """
    return _mix_rows(unit, u, tokens) if len(u) == 2 else _mix_causal(unit, u)


def pull_mix(tape: MixTape, g: Moments, tokens: int) -> Moments:
    """Return the moments of the gradient at the branch's input, through values, queries, keys."""
    return _pull_rows(tape, g, tokens) if len(g) == 2 else (_pull_causal(tape, g[0]),)


def _mix_rows(unit: TemplateUnit, u: Moments, tokens: int) -> tuple[Moments, MixTape]:
    q, p = (float(x) for x in u)
    query, cross = (unit.w_query.scale * x + unit.w_query.bias for x in (q, p))
    keys, to_query, to_key = unit.w_key.scale, unit.w_query.scale, unit.w_key.scale
    if unit.qk_norm:
        norm = unit.w_key.scale * q + unit.w_key.bias
        keys, to_query, to_key = keys / norm, to_query / query, to_key / norm
        query, cross = 1.0, cross / query
    query, cross, to_query = (unit.logits * x for x in (query, cross, to_query))
    g = max(query * keys * (q - p), 0.0)
    _check_logits(g)
    h = excess(g, tokens), excess(g * cross / query if query else 0.0, tokens)
    values = unit.w_in.scale
    mean = values * p + unit.w_in.bias
    mixed = tuple([mean + values * (q - p) * (1 + x) / tokens for x in h])
    thin = 1 - 1 / tokens
    return mixed, MixTape(values, (q - p) * thin, (query, cross), keys, to_query, to_key, h)


def _check_logits(variance: float) -> None:
    if not variance <= LOGIT_LIMIT:
        raise NoTheoryError(
            f"attention logits of variance {variance:.2g}, above {LOGIT_LIMIT:g}: "
            "softmax condenses on few tokens"
        )


def _pull_rows(tape: MixTape, g: Moments, tokens: int) -> Moments:
    own, cross = (float(x) for x in g)
    others = (tokens - 1) * cross
    seen = (1 + tape.h[0]) / tokens, (1 + tape.h[1]) / tokens
    gap = float(tape.gap)
    by_values = own * seen[0] + others * seen[1]
    by_query = float(tape.to_query * tape.keys) * gap * gap
    by_key = own * seen[0] * tape.query[0] + others * seen[1] * tape.query[1]
    by_key *= float(tape.to_key) * gap
    total = tape.values * (by_values + by_query * own * seen[0] + by_key)
    resultant = tape.values * (own + others + by_query * by_values)
    return float(total), float(resultant - total) / max(tokens - 1, 1)


def _mix_causal(unit: TemplateUnit, u: Moments) -> tuple[Moments, MixTape]:
    k = np.asarray(u[0])
    past = _past(len(k))
    means, average, gap = _gaps(k)
    query = np.asarray(through_weights(unit.w_query, u)[0])
    keys: Number = unit.w_key.scale
    to_query: Number = unit.w_query.scale
    to_key: Number = unit.w_key.scale
    if unit.qk_norm:
        norm = unit.w_key.scale * average + unit.w_key.bias
        lengths = np.sqrt(np.multiply.outer(query.diagonal(), query.diagonal()))
        keys, to_key = keys / norm, (to_key / norm).take(past.first)
        to_query, query = to_query / lengths, query / lengths
    if unit.logits != 1:
        to_query, query = unit.logits * to_query, unit.logits * query
    spread = keys * gap
    _check_logits(most(query.diagonal() * spread))
    root = np.sqrt(spread)
    h = _looked_up(query * root[:, None].dot(root[None]), len(k), past.starts)
    near = gap.take(past.first)
    mixed = through_weights(unit.w_in, (means + h * near / past.most,))
    keys = keys if isinstance(keys, float) else np.asarray(keys).take(past.first)
    back = unit.w_in.scale, near * past.thin, (query,), keys, to_query, to_key, (h,)
    return mixed, MixTape(*back)


def _gaps(k: Array) -> tuple[Array, Array, Array]:
    """Return, over each token's past, E mean u mean u', mean E u^2 and the unbiased variance."""
    past = _past(len(k))
    means = past.means.dot(k).dot(past.means.T)
    average = past.means.dot(k.diagonal())
    return means, average, np.maximum(average - means.diagonal(), 0.0) * past.unbiased


def _pull_causal(tape: MixTape, g: Number) -> Array:
    past = _past(len(np.asarray(g)))
    share = g / past.pairs
    noisy = share * (1 + tape.h[0])
    moved = tape.gap * noisy
    own = noisy - share + moved * tape.query[0] * tape.to_key
    sums = past.later.dot(share).dot(past.later.T)
    spread, same = (own * past.weights).dot(past.later[0]).dot(past.later.T)
    total = sums - spread.take(past.last)
    corner = total.ravel()[:: len(share) + 1]
    corner += spread + same
    total += (tape.to_query * tape.keys) * (tape.gap * past.seen) * moved
    return np.asarray(total if tape.values == 1.0 else tape.values * total)


class _Past(NamedTuple):
    """Constants of a causal mask over T tokens: t counts from 1, [t, t'] is the entry of a pair.

    Attributes:
        seen: min(t, t'), the tokens that both see.
        starts: the first place of the row of `seen` in the table of the excess.
        first, last: the places of min(t, t') and of max(t, t'), from 0.
        most, pairs: max(t, t') and t t'.
        means: 1/t where t' <= t, else 0: a product with it takes the mean over the past.
        later: 1 where t' >= t, else 0: a product with it takes the sum over what comes later.
        weights: two tables; the sum over a row of a symmetric x with the second one, then over
            later rows, is the sum of all x[t, t'] with t, t' >= s; the first divides by `seen` - 1.
        unbiased: t/(t - 1), and 1 at t = 1.
        thin: 1 - 1/`seen`.
    """

    seen: Array
    starts: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    most: Array
    pairs: Array
    means: Array
    later: Array
    weights: Array
    unbiased: Array
    thin: Array


@cache
def _past(tokens: int) -> _Past:
    t = np.arange(1, tokens + 1)
    seen, most = np.minimum.outer(t, t), np.maximum.outer(t, t)
    later = np.triu(np.ones((tokens, tokens)))
    twice = 2 * later - np.eye(tokens)
    return _Past(
        seen=seen.astype(float),
        starts=_row_start(seen),
        first=seen - 1,
        last=most - 1,
        most=most.astype(float),
        pairs=np.multiply.outer(t, t).astype(float),
        means=later.T / t[:, None],
        later=later,
        weights=np.stack([twice / np.maximum(seen - 1, 1), twice]),
        unbiased=t / np.maximum(t - 1, 1),
        thin=1 - 1 / seen,
    )


class AttendTape(NamedTuple):
    """Two tapes for `pull_mix`: `mixing` leads to the values alone, `whole` through logits too."""

    mixing: MixTape
    whole: MixTape


def attend(
    unit: TemplateUnit, u: Moments, values: Moments, tokens: int
) -> tuple[Moments, AttendTape]:
    """Return the moments of W_out softmax(q k) v, q and k of the input u, v of another stream.

    v may have any covariance, and is independent of the logits: `mix` has the moments of A. The
    gradient goes to v as A^T g, and through the logits to u.
    """
    _, tape = mix(_with_bare_values(unit), u, tokens)
    ratio = np.maximum(_gap(values) / np.maximum(_gap(u), _SMALLEST_GAP), _SMALLEST_GAP)
    rows = len(u) == 2
    mixed = _mixed_rows(values, tape.h, tokens) if rows else _mixed_past(values, tape.h)
    whole = _retaped(tape, float(ratio) if rows else ratio.take(_past(len(ratio)).first))
    out = tuple([unit.w_out.scale * entry + unit.w_out.bias for entry in mixed])
    return out, AttendTape(_retaped(tape, 1.0, logits=0.0), whole)


def pull_attend(
    unit: TemplateUnit, tape: AttendTape, g: Moments, tokens: int
) -> tuple[Moments, Moments]:
    """Return the moments of the gradient at the input u, through the logits, and at the values."""
    g = tuple([unit.w_out.scale * entry for entry in g])
    to_values = pull_mix(tape.mixing, g, tokens)
    both = pull_mix(tape.whole, g, tokens)
    return tuple([b - v for b, v in zip(both, to_values, strict=True)]), to_values


@lru_cache(maxsize=64)
def _with_bare_values(unit: TemplateUnit) -> TemplateUnit:
    return replace(unit, w_in=WeightMoments(1.0))


def _retaped(tape: MixTape, ratio: Number, logits: float = 1.0) -> MixTape:
    """Return a tape with `ratio` times the gap of the values, the gap of the keys kept."""
    to_query, to_key = logits * tape.to_query, logits * tape.to_key
    gap, keys = tape.gap * ratio, tape.keys / ratio
    return tape._replace(values=1.0, gap=gap, keys=keys, to_query=to_query, to_key=to_key)


def _mixed_rows(values: Moments, h: Moments, tokens: int) -> Moments:
    """Return p + (q - p)(1 + h)/T for each class."""
    q, p = values
    return tuple([p + (q - p) * (1 + x) / tokens for x in h])


def _mixed_past(values: Moments, h: Moments) -> Moments:
    """Return the same under a causal mask, with sums over each token's past."""
    means, _, gap = _gaps(np.asarray(values[0]))
    past = _past(len(gap))
    return (means + h[0] * gap.take(past.first) / past.most,)


def _gap(x: Moments) -> Array:
    """Return E (x - mean x)^2 over the tokens seen, unbiased: a number, or one for every token."""
    return np.asarray(x[0] - x[1]) if len(x) == 2 else _gaps(np.asarray(x[0]))[2]
