"""What is read off a stack: functions of (spec, seed), all from gradflow's own rows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from gradflow.engine.build import build_network
from gradflow.engine.walk import walk
from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.specs.stack import StackSpec

CPU = torch.device("cpu")
Profile = NDArray[np.float64]
Records = tuple[list[LayerRecord], list[ParamRecord]]


# Several quantities of one claim read the same rows, one after the other.
@lru_cache(maxsize=32)
def records(spec: StackSpec, seed: int) -> Records:
    """Rows of `layers.csv` and `params.csv` at initialisation."""
    return walk(spec, seed, build_network(spec, seed, CPU)).records()


def gradients(spec: StackSpec, seed: int) -> Profile:
    """log10 |g_u| - log10 |g_D|, from the input up."""
    logs = np.array([row.log10_grad_norm for row in records(spec, seed)[0]], dtype=float)
    return np.asarray(logs - logs[-1])


def squares(spec: StackSpec, seed: int) -> Profile:
    """Mean square of the stream after each layer, from the input up."""
    layers, _ = records(spec, seed)
    last = {row.layer: row.act_rms for row in layers}
    return np.array([last[layer] for layer in sorted(last)], dtype=float) ** 2


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Of the least-squares line."""
    return float(np.polyfit(np.asarray(x), np.asarray(y), 1)[0])


def nats_per_layer(spec: StackSpec, seed: int) -> float:
    """Growth of ln |g|^2 per unit on the way from the output to the input."""
    profile = 2 * math.log(10) * gradients(spec, seed)
    return -slope(np.arange(len(profile)), profile)


def factor_per_layer(spec: StackSpec, seed: int) -> float:
    """By which |g|^2 multiplies per unit on the way to the input."""
    return math.exp(nats_per_layer(spec, seed))


def squared_decades(spec: StackSpec, seed: int) -> float:
    """log10 |g_0|^2 / |g_D|^2."""
    return 2 * float(gradients(spec, seed)[0])


def squared_ratio(spec: StackSpec, seed: int) -> float:
    """|g_0|^2 / |g_D|^2."""
    return 10.0 ** squared_decades(spec, seed)


def unevenness(spec: StackSpec, seed: int) -> float:
    """Largest ||g_u| / |g_D| - 1|; 0 where every layer gets the same gradient."""
    norms = [row.grad_norm for row in records(spec, seed)[0]]
    return max(abs(norm / norms[-1] - 1) for norm in norms)


def moved_by_weights(spec: StackSpec, seed: int) -> float:
    """Largest change of log10 |g_u| when all weights are 4 times as large."""
    strong = replace(spec, gain=4 * spec.gain)
    return float(np.abs(gradients(strong, seed) - gradients(spec, seed)).max())


def final_square(spec: StackSpec, seed: int) -> float:
    """Mean square of the stream at the output."""
    return float(squares(spec, seed)[-1])


def square_per_unit(spec: StackSpec, seed: int) -> float:
    """What a unit adds to the mean square of the stream, on average."""
    found = squares(spec, seed)
    return float(found[-1] - found[0]) / (spec.depth * spec.units_per_block)


def branch_share(spec: StackSpec, seed: int) -> float:
    """(l + 1) times the branch's share in the variance of layer l; mean over the upper half."""
    q = squares(spec, seed)
    layers = np.arange(1, spec.depth + 1)
    shares = (layers + 1) * (1 - q[:-1] / q[1:])
    return float(shares[spec.depth // 2 :].mean())


def weight_gradient(spec: StackSpec, seed: int) -> float:
    """Largest norm of a gradient of the branches' matrices."""
    return max(row.grad_norm or 0.0 for row in _matrices(spec, seed))


def _matrices(spec: StackSpec, seed: int) -> list[ParamRecord]:
    _, params = records(spec, seed)
    return [row for row in params if row.param.startswith("branch.") and "x" in row.shape]


def token_cosine(spec: StackSpec, seed: int) -> float:
    """Mean cosine between the tokens of the output."""
    return float(records(spec, seed)[0][-1].act_cos or math.nan)


def collapse_order(spec: StackSpec, seed: int) -> float:
    """Order of convergence of e = 1 - cosine between tokens over the last three layers.

    e'' / e' = (e' / e)^p. Of float64, e must stay well above 1e-16.
    """
    layers, _ = records(spec, seed)
    first, second, third = (math.log(1 - float(row.act_cos or 0.0)) for row in layers[-3:])
    return (third - second) / (second - first)


def query_over_value(spec: StackSpec, seed: int) -> float:
    """|dL/dW_q| / |dL/dW_v| in the last block."""
    _, params = records(spec, seed)
    last = {row.param: row.grad_norm for row in params if row.layer == spec.depth}
    return float(last["branch.q.weight"] or 0.0) / float(last["branch.v.weight"] or math.nan)


DEPTHS = (6, 12, 24, 48)


def last_matrix_exponent(spec: StackSpec, seed: int) -> float:
    """p of |dL/dW_2| ~ depth^p, W_2 the output matrix of the last ffn; depths of `DEPTHS`."""
    norms = [_last_matrix(replace(spec, depth=depth), seed) for depth in DEPTHS]
    return slope(np.log(DEPTHS), np.log(norms))


def _last_matrix(spec: StackSpec, seed: int) -> float:
    _, params = records(spec, seed)
    last = [row for row in params if row.layer == spec.depth and row.param == "branch.down.weight"]
    return float(last[-1].grad_norm or math.nan)


def update_exponent(spec: StackSpec, seed: int) -> float:
    """p of |dL/dW|^2 ~ depth^p, W all matrices of the branches; depths of `DEPTHS`.

    This is, to first order, what a step of SGD takes off the loss, over the learning rate.
    """
    sums = [_squared_update(replace(spec, depth=depth), seed) for depth in DEPTHS]
    return slope(np.log(DEPTHS), np.log(sums))


def _squared_update(spec: StackSpec, seed: int) -> float:
    return sum(row.grad_norm**2 for row in _matrices(spec, seed) if row.grad_norm is not None)


def power_over_stretched(spec: StackSpec, seed: int) -> float:
    """Misfit of ln |g| as a line in sqrt(l) over its misfit as a line in ln l, from layer 1 on.

    Below 1 the profile is a stretched exponential, above 1 a power law.
    """
    profile = gradients(spec, seed)[1:]
    layers = np.arange(1, len(profile) + 1)
    return _misfit(np.sqrt(layers), profile) / _misfit(np.log(layers), profile)


def _misfit(x: Profile, y: Profile) -> float:
    return float(np.std(y - np.polyval(np.polyfit(x, y, 1), x)))


def input_shift_from_pre_ln(spec: StackSpec, seed: int) -> float:
    """Decades between |dL/d(input)| and that of pre-ln with the same weights and cotangent."""
    plain = replace(spec, scheme="pre-ln")
    ours, theirs = (records(each, seed)[0][0].log10_grad_norm for each in (spec, plain))
    return ours - theirs


def stream_from_pre_ln(spec: StackSpec, seed: int) -> float:
    """Largest relative difference of the streams' root mean squares to those of pre-ln."""
    ours, theirs = (squares(each, seed) for each in (spec, replace(spec, scheme="pre-ln")))
    return float(np.abs(np.sqrt(ours / theirs) - 1).max())
