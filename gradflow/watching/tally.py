"""One step's numbers on the host: passes put together, in columns of `layers.csv`.

Micro-batches count as one batch: squares, counts and inner products are added, cosines averaged,
maxima taken. So accumulated gradients give the numbers of the batch that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradflow.engine.rows import log10
from gradflow.watching.meter import FORWARD, GRADIENT, Pool
from gradflow.watching.parameters import COLUMNS, MISSING
from gradflow.watching.passes import Call, Pass, Tap

Key = tuple[int, int]
Columns = dict[str, Any]
Tables = dict[Pool, np.ndarray]


@dataclass(frozen=True)
class Tally:
    """A measured step.

    Attributes:
        step: its number.
        input: columns of the input of the first layer.
        layers: columns of every layer by place and call, in execution order.
        params: a row of `parameters.COLUMNS` for every parameter.
        shape: of the stream at the first layer; `dtype` and `device` likewise.
    """

    step: int
    input: Columns
    layers: dict[Key, Columns]
    params: np.ndarray
    shape: tuple[int, ...]
    dtype: str
    device: torch.device


def to_host(pools: Iterable[Pool], others: Sequence[Tensor]) -> tuple[Tables, list[np.ndarray]]:
    """Everything in one transfer: the rows of each pool, and other tensors."""
    pools = list(pools)
    tensors = [pool.table() for pool in pools] + list(others)
    if not tensors:
        return {}, []
    device = tensors[0].device
    flat = torch.cat([t.reshape(-1).double().to(device) for t in tensors]).cpu().numpy()
    ends = np.cumsum([t.numel() for t in tensors])
    pieces = [p.reshape(t.shape) for p, t in zip(np.split(flat, ends[:-1]), tensors, strict=True)]
    return dict(zip(pools, pieces, strict=False)), pieces[len(pools) :]


def put_together(passes: Sequence[Pass], tables: Tables, scale: float) -> dict[Key, Columns]:
    """The columns of every layer, in execution order."""
    order = in_order([[call.key for call in one.calls] for one in passes])
    calls: dict[Key, list[Call]] = {key: [] for key in order}
    for one in passes:
        for call in one.calls:
            calls[call.key].append(call)
    return {key: _layer(found, tables, scale) for key, found in calls.items()}


def in_order(sequences: Iterable[Sequence[Key]]) -> list[Key]:
    """One order of all keys: each comes after the one before it in the first list that has it."""
    order: list[Key] = []
    for keys in sequences:
        if not order:
            order = list(keys)  # all passes of most models are alike
            continue
        places = {key: i for i, key in enumerate(order)}
        after = -1
        added: dict[int, list[Key]] = {}
        for key in keys:
            if key in places:
                after = places[key]
            else:
                added.setdefault(after, []).append(key)
        order = [
            k for i in range(-1, len(order)) for k in order[max(i, 0) : i + 1] + added.get(i, [])
        ]
    return order


def _layer(calls: Sequence[Call], tables: Tables, scale: float) -> Columns:
    outputs = [call.y for call in calls if call.y is not None]
    inputs = [call.x for call in calls if call.x is not None]
    columns = tap_columns(outputs, tables, scale)
    if len(inputs) == len(calls) and all(call.keeps_shape for call in calls):
        below, above = _energy(inputs, tables), _energy(outputs, tables)
        if below is not None and above is not None:
            cross = sum(float(tables[pool][row, 0]) for c in calls for pool, row in c.crosses)
            columns["gain"] = _ratio(math.sqrt(below), math.sqrt(above))
            columns["identity_share"] = _ratio(_ratio(cross, above) * cross, below)
    return columns


def _ratio(a: float, b: float) -> float:
    """a / b; infinite or NaN where b is 0."""
    if b:
        return a / b
    return math.inf if a > 0 else math.nan


def _energy(taps: Sequence[Tap], tables: Tables) -> float | None:
    """Sum of the squares of the gradient; None where it could not have come."""
    if not any(tap.hooked for tap in taps):
        return None
    return float(sum(tables[pool][row, 0] for tap in taps for pool, row in tap.gradients))


def unscaled(params: np.ndarray, scale: float) -> np.ndarray:
    """Rows of `parameters.COLUMNS` with the scale of the loss taken out of the gradients.

    A scaler has done so before the optimizer used them; where they are still as they came, the
    optimizer itself does it.
    """
    found = params.copy()
    grad, used = COLUMNS.index("grad"), COLUMNS.index("used")
    seen = params[:, grad] != MISSING
    same = params[:, grad] == params[:, used]
    found[seen, grad] /= scale
    found[seen & same, used] /= scale
    return found


def tap_columns(taps: Sequence[Tap], tables: Tables, scale: float) -> Columns:
    """The columns of one watched tensor in all passes; `scale` multiplies its gradient."""
    if not taps:
        return {}
    rows = np.array([tables[pool][row, : len(FORWARD)] for pool, row in (t.forward for t in taps)])
    squares, cosines, largest = rows.T
    columns: Columns = {
        "act_rms": math.sqrt(squares.sum() / sum(tap.shape.numel() for tap in taps)),
        "act_max_abs": float(largest.max()),
        "act_cos": float(cosines.mean()) if _has_pairs(taps[0].shape, tokens=True) else None,
    }
    if any(tap.hooked for tap in taps):
        columns |= _gradient_columns(taps, tables, scale)
    return columns


def _gradient_columns(taps: Sequence[Tap], tables: Tables, scale: float) -> Columns:
    """A loss that does not depend on the tensor has gradient 0 there."""
    found = [tables[pool][row, : len(GRADIENT)] for tap in taps for pool, row in tap.gradients]
    if not found:
        return {
            "grad_norm": 0.0,
            "log10_grad_norm": -math.inf,
            "nonfinite": 0,
            "zero_fraction": 1.0,
        }
    squares, nonzero, nonfinite, cosines, largest, small = np.array(found).T
    numel = sum(tap.shape.numel() * len(tap.gradients) for tap in taps)
    size = math.sqrt(squares.sum()) / scale
    format = torch.finfo(taps[0].format)
    return {
        "grad_norm": size,
        "log10_grad_norm": log10(size, 0),
        "nonfinite": int(nonfinite.sum()),
        "zero_fraction": float(1 - nonzero.sum() / numel),
        "grad_cos": float(cosines.mean()) if _has_pairs(taps[0].shape, tokens=False) else None,
        "underflow_fraction": float(small.sum() / numel) if format.bits == 16 else None,
        "headroom_log2": _headroom(float(format.max), float(largest.max())),
    }


def _headroom(most: float, largest: float) -> float | None:
    """log2 of the room above the largest value; -inf if it has left the format."""
    if not math.isfinite(largest):
        return -math.inf
    return math.log2(most) - math.log2(largest) if largest else None


def _has_pairs(shape: Sequence[int], *, tokens: bool) -> bool:
    return len(shape) > 1 and shape[1 if tokens and len(shape) == 3 else 0] > 1
