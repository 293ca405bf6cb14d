"""What adds up: the numbers of each layer in one step, over its passes and then over all ranks.

Micro-batches, and the batches of the ranks, count as one batch: squares, counts and inner products
are added, cosines averaged over the samples, maxima taken. So accumulated gradients give the
numbers of the batch that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from gradflow.engine.rows import log10
from gradflow.watching.calls import Call, Tap
from gradflow.watching.device_rows import FORWARD, GRADIENT, Pool

Columns = dict[str, Any]
# The rows of each pool on the host.
Tables = dict[Pool, list[list[float]]]


@dataclass(frozen=True, slots=True)
class Sums:
    """One watched tensor, or several that count as one.

    Attributes:
        format: number format of the gradient.
        numel: elements of the tensor; `y_sq` is the sum of their squares, `y_max` the largest |y|.
        y_cos: sum over `y_pairs` samples of the mean cosine, where there are pairs to compare.
        hooked: a gradient would have been seen, if one had come.
        g_numel: elements of the gradients that came, and so on; `small` are below the normal
            numbers of a half-precision format.
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


LARGEST = ("y_max", "g_max")
ADDED = tuple(
    f.name for f in fields(Sums) if f.name not in ("format", "hooked") and f.name not in LARGEST
)


@dataclass(frozen=True, slots=True)
class LayerSums:
    """One layer in all its calls.

    Attributes:
        y: its output.
        compares: x and y have one shape in every call.
        below: sum of the squares of the gradient at x; None where none could have come.
        cross: inner product of the gradients at x and y.
    """

    y: Sums
    compares: bool
    below: float | None = None
    cross: float = 0.0


def tensor_sums(taps: Sequence[Tap], tables: Tables) -> Sums:
    """One watched tensor in all passes."""
    return together([_tap_sums(tap, tables) for tap in taps])


def layer_sums(calls: Sequence[Call], tables: Tables) -> LayerSums:
    """One layer in all passes."""
    y = tensor_sums([call.y for call in calls if call.y is not None], tables)
    if not all(call.keeps_shape for call in calls):
        return LayerSums(y, compares=False)
    inputs = [call.x for call in calls if call.x is not None]
    cross = sum(tables[pool][row][0] for call in calls for pool, row in call.crosses)
    return LayerSums(y, True, _energy(inputs, tables), cross)


def together(sums: Sequence[Sums]) -> Sums:
    """Several tensors as one."""
    if len(sums) == 1:
        return sums[0]
    found: dict[str, Any] = {name: sum(getattr(one, name) for one in sums) for name in ADDED}
    found |= {name: _largest(getattr(one, name) for one in sums) for name in LARGEST}
    return replace(sums[0], hooked=any(one.hooked for one in sums), **found)


def layers_together(sums: Sequence[LayerSums]) -> LayerSums:
    """The same layer on several ranks."""
    if len(sums) == 1:
        return sums[0]
    below = [one.below for one in sums if one.below is not None]
    return LayerSums(
        together([one.y for one in sums]),
        all(one.compares for one in sums),
        sum(below) if below else None,
        sum(one.cross for one in sums),
    )


def layer_columns(layer: LayerSums, scale: float) -> Columns:
    """The columns of one layer; `scale` multiplies its gradients."""
    columns, above = tensor_columns(layer.y, scale), layer.y.g_sq
    if layer.compares and layer.below is not None and layer.y.hooked:
        columns["gain"] = _ratio(math.sqrt(layer.below), math.sqrt(above))
        columns["identity_share"] = _ratio(_ratio(layer.cross, above) * layer.cross, layer.below)
    return columns


def tensor_columns(sums: Sums, scale: float) -> Columns:
    """The columns of one watched tensor; `scale` multiplies its gradient."""
    columns: Columns = {
        "act_rms": math.sqrt(sums.y_sq / sums.numel),
        "act_max_abs": sums.y_max,
        "act_cos": sums.y_cos / sums.y_pairs if sums.y_pairs else None,
    }
    return columns | _gradient_columns(sums, scale) if sums.hooked else columns


def _gradient_columns(sums: Sums, scale: float) -> Columns:
    """A loss that does not depend on the tensor has gradient 0 there."""
    size, zeros = math.sqrt(sums.g_sq) / scale, 1.0
    columns: Columns = {}
    if sums.g_numel:
        format = torch.finfo(sums.format)
        zeros = 1 - sums.nonzero / sums.g_numel
        columns = {
            "grad_cos": sums.g_cos / sums.g_pairs if sums.g_pairs else None,
            "underflow_fraction": sums.small / sums.g_numel if format.bits == 16 else None,
            "headroom_log2": _headroom(format.max, sums.g_max),
        }
    return {
        "grad_norm": size,
        "log10_grad_norm": log10(size, 0),
        "nonfinite": int(sums.nonfinite),
        "zero_fraction": zeros,
        **columns,
    }


def _tap_sums(tap: Tap, tables: Tables) -> Sums:
    pool, row = tap.forward
    square, cosine, largest = tables[pool][row][: len(FORWARD)]
    times = pool.times(tables[pool][row])
    pairs = _with_pairs(tap.shape, tokens=True)
    return Sums(
        format=tap.format,
        numel=tap.shape.numel() * times,
        y_sq=square,
        y_max=largest,
        y_cos=cosine * pairs if pairs else 0.0,
        y_pairs=pairs * times,
        hooked=tap.hooked,
        **_gradient_sums(tap, tables),
    )


def _gradient_sums(tap: Tap, tables: Tables) -> dict[str, float]:
    """The numbers of every gradient that came."""
    rows = [tables[pool][row][: len(GRADIENT)] for pool, row in tap.gradients]
    times = sum(pool.times(tables[pool][row]) for pool, row in tap.gradients)
    if not times:
        return {}
    squares, nonzero, nonfinite, cosines, sizes, small = zip(*rows, strict=True)
    pairs = _with_pairs(tap.shape, tokens=False)
    return {
        "g_numel": tap.shape.numel() * times,
        "g_sq": sum(squares),
        "g_max": _largest(sizes),
        "g_cos": sum(cosines) * pairs if pairs else 0.0,
        "g_pairs": times * pairs,
        "nonzero": sum(nonzero),
        "nonfinite": sum(nonfinite),
        "small": sum(small),
    }


def _energy(taps: Sequence[Tap], tables: Tables) -> float | None:
    """Sum of the squares of the gradient; None where it could not have come."""
    if not any(tap.hooked for tap in taps):
        return None
    return sum(tables[pool][row][0] for tap in taps for pool, row in tap.gradients)


def _largest(values: Iterable[float]) -> float:
    """The largest; NaN if one is."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


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


def _with_pairs(shape: Sequence[int], *, tokens: bool) -> int:
    """How many samples have two vectors to compare, each with the other tokens or samples."""
    has = len(shape) > 1 and shape[1 if tokens and len(shape) == 3 else 0] > 1
    return shape[0] if has else 0
