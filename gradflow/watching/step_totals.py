"""The numbers of one step on the host: of each layer over its passes, then over all ranks.

Micro-batches, and the batches of the ranks, count as one batch: squares, counts and inner products
are added, cosines averaged over the samples, maxima taken. So accumulated gradients give the
numbers of the batch that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradflow.engine.rows import log10
from gradflow.watching.device_rows import (
    FORWARD_NUMBERS,
    GRADIENT_NUMBERS,
    MISSING,
    PARAMETER_NUMBERS,
    Pool,
)
from gradflow.watching.recorder import CallKey, LayerCall, Tap, WatchedPass

# Some columns of `layers.csv`, by name.
ColumnValues = dict[str, Any]
# The rows of each pool on the host.
HostRows = dict[Pool, list[list[float]]]


@dataclass(frozen=True, slots=True)
class TensorTotals:
    """Totals of one watched tensor, or of several that count as one.

    Attributes:
        format: number format of the gradient.
        numel: elements of the tensor.
        y_sq: sum of their squares.
        y_max: the largest |y|.
        y_cos: sum over `y_pairs` samples of the mean cosine, where there are pairs to compare.
        hooked: whether a gradient would have been seen, if one had come.
        g_numel: elements of the gradients that came; `g_sq`, `g_max`, `g_cos` and `g_pairs` are
            for them what the like is for the tensor.
        nonzero: elements of the gradients that are not zero; `nonfinite` those that are NaN or
            infinite; `small` those below the normal numbers of a half-precision format.
    """

    format: torch.dtype
    numel: float
    y_sq: float
    y_max: float
    y_cos: float
    y_pairs: float
    hooked: bool
    g_numel: float = 0.0
    g_sq: float = 0.0
    g_max: float = 0.0
    g_cos: float = 0.0
    g_pairs: float = 0.0
    nonzero: float = 0.0
    nonfinite: float = 0.0
    small: float = 0.0


_MAXIMA = ("y_max", "g_max")
_ADDED = tuple(f.name for f in fields(TensorTotals) if f.name not in ("format", "hooked", *_MAXIMA))


@dataclass(frozen=True, slots=True)
class LayerTotals:
    """Totals of one layer over all its calls.

    Attributes:
        y: of its output.
        compares: whether x and y have one shape in every call.
        below: sum of the squares of the gradient at x; None where none could have come.
        cross: inner product of the gradients at x and y.
    """

    y: TensorTotals
    compares: bool
    below: float | None = None
    cross: float = 0.0


@dataclass(frozen=True)
class RankTotals:
    """Totals of a step on one process: some 20 numbers a layer, which go to all ranks.

    Attributes:
        input: totals of the input of the first layer; None where there is none.
        layers: totals of every layer by call, in execution order.
        shape: of the stream at the first layer; `dtype` and `device` likewise.
    """

    input: TensorTotals | None
    layers: dict[CallKey, LayerTotals]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it cannot change)


@dataclass(frozen=True)
class StepNumbers:
    """A measured step.

    Attributes:
        step: its number.
        input: columns of the input of the first layer.
        layers: columns of every layer by call, in execution order.
        params: a row of `PARAMETER_NUMBERS` for every parameter.
        shape: shape of the stream at the first layer, the batches of all ranks together; `dtype`
            and `device`, on the first rank, likewise.
    """

    step: int
    input: ColumnValues
    layers: dict[CallKey, ColumnValues]
    params: np.ndarray
    shape: tuple[int, ...]
    dtype: str
    device: torch.device


def to_host(pools: Iterable[Pool], others: Sequence[Tensor]) -> tuple[HostRows, list[np.ndarray]]:
    """Bring the rows of each pool, and other tensors, to the host in one transfer."""
    pools = list(pools)
    tensors = [pool.table() for pool in pools] + list(others)
    if not tensors:
        return {}, []
    device = tensors[0].device
    flat = torch.cat([t.reshape(-1).double().to(device) for t in tensors]).cpu().numpy()
    ends = np.cumsum([t.numel() for t in tensors])
    pieces = [p.reshape(t.shape) for p, t in zip(np.split(flat, ends[:-1]), tensors, strict=True)]
    rows = {pool: piece.tolist() for pool, piece in zip(pools, pieces, strict=False)}
    return rows, pieces[len(pools) :]


def rank_totals(passes: Sequence[WatchedPass], rows: HostRows) -> RankTotals:
    """Return what this process has seen of a step, from its passes and their rows."""
    if not passes:
        return RankTotals(None, {})
    inputs = [x for one in passes if (x := one.calls[0].x) is not None]
    stream = passes[0].calls[0].stream
    return RankTotals(
        input=_tensor_totals(inputs, rows) if inputs else None,
        layers={key: _layer_totals(calls, rows) for key, calls in _calls(passes).items()},
        shape=tuple(stream.shape),
        dtype=str(stream.dtype).removeprefix("torch."),
        device=stream.device,
    )


def step_numbers(
    step: int, ranks: Sequence[RankTotals], params: np.ndarray, scale: float
) -> list[StepNumbers]:
    """Return the numbers of a step as a list of one; an empty list if no layer has run.

    Args:
        step: its number.
        ranks: totals of each rank.
        params: a row of `PARAMETER_NUMBERS` for every parameter.
        scale: factor of the loss in the gradients, as a `GradScaler` has it.
    """
    ran = [rank for rank in ranks if rank.layers]
    if not ran:
        return []
    inputs = [rank.input for rank in ran if rank.input is not None]
    # Gradients are averaged over the ranks: that of the whole batch's loss is a part of each.
    shrunk = scale * len(ranks)
    order = merged_order([list(rank.layers) for rank in ran])
    layers = {key: [rank.layers[key] for rank in ran if key in rank.layers] for key in order}
    return [
        StepNumbers(
            step=step,
            input=_tensor_columns(_together(inputs), shrunk) if inputs else {},
            layers={k: _layer_columns(_layers_together(v), shrunk) for k, v in layers.items()},
            params=_unscaled(params, scale),
            shape=_whole_shape([rank.shape for rank in ran]),
            dtype=ran[0].dtype,
            device=ran[0].device,
        )
    ]


def merged_order(sequences: Iterable[Sequence[CallKey]]) -> list[CallKey]:
    """Return one order of all keys: each comes after the one before it in the first list with it.

    Keys that no list has together are in the order of their layers.
    """
    order: list[CallKey] = []
    for keys in sequences:
        order = _merged(order, keys) if order else list(keys)
    return order


def _merged(order: list[CallKey], keys: Sequence[CallKey]) -> list[CallKey]:
    places, own = {key: i for i, key in enumerate(order)}, set(keys)
    after = -1
    added: dict[int, list[CallKey]] = {}
    for key in keys:
        if key in places:
            after = places[key]
            continue
        while after + 1 < len(order) and order[after + 1] not in own and order[after + 1] < key:
            after += 1
        added.setdefault(after, []).append(key)
    return [k for i in range(-1, len(order)) for k in order[max(i, 0) : i + 1] + added.get(i, [])]


def _calls(passes: Sequence[WatchedPass]) -> dict[CallKey, list[LayerCall]]:
    """All calls of every layer, in execution order."""
    order = merged_order([[call.key for call in one.calls] for one in passes])
    calls: dict[CallKey, list[LayerCall]] = {key: [] for key in order}
    for one in passes:
        for call in one.calls:
            calls[call.key].append(call)
    return calls


def _whole_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of the batches of all ranks together, along the first axis."""
    if len(shapes) == 1 or not shapes[0]:
        return shapes[0]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _unscaled(params: np.ndarray, scale: float) -> np.ndarray:
    """Rows of `PARAMETER_NUMBERS` with the scale of the loss taken out of the gradients.

    A scaler has done so before the optimizer used them; where they are still as they came, the
    optimizer itself does it.
    """
    unscaled = params.copy()
    grad, used = (PARAMETER_NUMBERS.index(name) for name in ("grad", "used"))
    seen = params[:, grad] != MISSING
    same = params[:, grad] == params[:, used]
    unscaled[seen, grad] /= scale
    unscaled[seen & same, used] /= scale
    return unscaled


# From rows to totals


def _tensor_totals(taps: Sequence[Tap], rows: HostRows) -> TensorTotals:
    return _together([_tap_totals(tap, rows) for tap in taps])


def _layer_totals(calls: Sequence[LayerCall], rows: HostRows) -> LayerTotals:
    y = _tensor_totals([call.y for call in calls if call.y is not None], rows)
    if not all(call.keeps_shape for call in calls):
        return LayerTotals(y, compares=False)
    inputs = [call.x for call in calls if call.x is not None]
    cross = sum(rows[pool][row][0] for call in calls for pool, row in call.crosses)
    return LayerTotals(y, True, _energy(inputs, rows), cross)


def _tap_totals(tap: Tap, rows: HostRows) -> TensorTotals:
    pool, row = tap.forward
    square, cosine, largest = rows[pool][row][: len(FORWARD_NUMBERS)]
    times = pool.times(rows[pool][row])
    pairs = _with_pairs(tap.shape, tokens=True)
    return TensorTotals(
        format=tap.format,
        numel=tap.shape.numel() * times,
        y_sq=square,
        y_max=largest,
        y_cos=cosine * pairs if pairs else 0.0,
        y_pairs=pairs * times,
        hooked=tap.hooked,
        **_gradient_totals(tap, rows),
    )


def _gradient_totals(tap: Tap, rows: HostRows) -> dict[str, float]:
    """Totals over every gradient that came."""
    gradients = [rows[pool][row][: len(GRADIENT_NUMBERS)] for pool, row in tap.gradients]
    times = sum(pool.times(rows[pool][row]) for pool, row in tap.gradients)
    if not times:
        return {}
    numbers = dict(zip(GRADIENT_NUMBERS, zip(*gradients, strict=True), strict=True))
    pairs = _with_pairs(tap.shape, tokens=False)
    return {name: sum(numbers[name]) for name in ("g_sq", "nonzero", "nonfinite", "small")} | {
        "g_numel": tap.shape.numel() * times,
        "g_max": _largest(numbers["g_max"]),
        "g_cos": sum(numbers["g_cos"]) * pairs if pairs else 0.0,
        "g_pairs": times * pairs,
    }


def _energy(taps: Sequence[Tap], rows: HostRows) -> float | None:
    """Sum of the squares of the gradient; None where it could not have come."""
    if not any(tap.hooked for tap in taps):
        return None
    return sum(rows[pool][row][0] for tap in taps for pool, row in tap.gradients)


def _with_pairs(shape: Sequence[int], *, tokens: bool) -> int:
    """How many samples have two vectors to compare, each with the other tokens or samples."""
    has = len(shape) > 1 and shape[1 if tokens and len(shape) == 3 else 0] > 1
    return shape[0] if has else 0


def _together(totals: Sequence[TensorTotals]) -> TensorTotals:
    if len(totals) == 1:
        return totals[0]
    joined: dict[str, Any] = {name: sum(getattr(one, name) for one in totals) for name in _ADDED}
    joined |= {name: _largest(getattr(one, name) for one in totals) for name in _MAXIMA}
    return replace(totals[0], hooked=any(one.hooked for one in totals), **joined)


def _layers_together(totals: Sequence[LayerTotals]) -> LayerTotals:
    if len(totals) == 1:
        return totals[0]
    below = [one.below for one in totals if one.below is not None]
    return LayerTotals(
        _together([one.y for one in totals]),
        all(one.compares for one in totals),
        sum(below) if below else None,
        sum(one.cross for one in totals),
    )


def _largest(values: Iterable[float]) -> float:
    """Return the largest value; NaN if one is NaN."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


# From totals to columns


def _layer_columns(layer: LayerTotals, scale: float) -> ColumnValues:
    """The columns of one layer; `scale` multiplies its gradients."""
    columns, above = _tensor_columns(layer.y, scale), layer.y.g_sq
    if layer.compares and layer.below is not None and layer.y.hooked:
        columns["gain"] = _ratio(math.sqrt(layer.below), math.sqrt(above))
        columns["identity_share"] = _ratio(_ratio(layer.cross, above) * layer.cross, layer.below)
    return columns


def _tensor_columns(totals: TensorTotals, scale: float) -> ColumnValues:
    """The columns of one watched tensor; `scale` multiplies its gradient."""
    columns: ColumnValues = {
        "act_rms": math.sqrt(totals.y_sq / totals.numel),
        "act_max_abs": totals.y_max,
        "act_cos": totals.y_cos / totals.y_pairs if totals.y_pairs else None,
    }
    return columns | _gradient_columns(totals, scale) if totals.hooked else columns


def _gradient_columns(totals: TensorTotals, scale: float) -> ColumnValues:
    """The columns of a gradient, which is 0 where the loss does not depend on the tensor."""
    size, zeros = math.sqrt(totals.g_sq) / scale, 1.0
    columns: ColumnValues = {}
    if totals.g_numel:
        format = torch.finfo(totals.format)
        zeros = 1 - totals.nonzero / totals.g_numel
        columns = {
            "grad_cos": totals.g_cos / totals.g_pairs if totals.g_pairs else None,
            "underflow_fraction": totals.small / totals.g_numel if format.bits == 16 else None,
            "headroom_log2": _headroom(format.max, totals.g_max),
        }
    return {
        "grad_norm": size,
        "log10_grad_norm": log10(size, 0),
        "nonfinite": int(totals.nonfinite),
        "zero_fraction": zeros,
        **columns,
    }


def _ratio(a: float, b: float) -> float:
    """a / b; infinite or NaN where b is 0."""
    if b:
        return a / b
    return math.inf if a > 0 else math.nan


def _headroom(most: float, largest: float) -> float | None:
    """log2 of the room above the largest value; -inf if it has left the format."""
    if not math.isfinite(largest):
        return -math.inf
    return math.log2(most) - math.log2(largest) if largest else None
