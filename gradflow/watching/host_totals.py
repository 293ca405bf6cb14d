"""One step's numbers on the host, of all ranks, in columns of `layers.csv`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.watching.calls import Call, Pass
from gradflow.watching.device_rows import Pool
from gradflow.watching.graph_parameters import COLUMNS, MISSING
from gradflow.watching.step_totals import (
    Columns,
    LayerSums,
    Sums,
    Tables,
    layer_columns,
    layer_sums,
    layers_together,
    tensor_columns,
    tensor_sums,
    together,
)

Key = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """What one process has seen of a step; some 20 numbers a layer, which go to all ranks.

    Attributes:
        input: of the first layer; None where there is none.
        layers: every layer by place and call, in execution order.
        shape: of the stream at the first layer; `dtype` and `device` likewise.
    """

    input: Sums | None
    layers: dict[Key, LayerSums]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it cannot change)


@dataclass(frozen=True)
class Tally:
    """A measured step.

    Attributes:
        step: its number.
        input: columns of the input of the first layer.
        layers: columns of every layer by place and call, in execution order.
        params: a row of `parameters.COLUMNS` for every parameter.
        shape: of the stream at the first layer, the batches of all ranks together.
        dtype: of this stream; `device` that of the first rank.
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
    tables = {pool: piece.tolist() for pool, piece in zip(pools, pieces, strict=False)}
    return tables, pieces[len(pools) :]


def seen(passes: Sequence[Pass], tables: Tables) -> Part:
    """What this process has seen."""
    if not passes:
        return Part(None, {})
    inputs = [one.calls[0].x for one in passes]
    taps = [x for x in inputs if x is not None]
    stream = passes[0].calls[0].stream
    return Part(
        input=tensor_sums(taps, tables) if taps else None,
        layers={key: layer_sums(calls, tables) for key, calls in _calls(passes).items()},
        shape=tuple(stream.shape),
        dtype=str(stream.dtype).removeprefix("torch."),
        device=stream.device,
    )


def tally(step: int, parts: Sequence[Part], params: np.ndarray, scale: float) -> list[Tally]:
    """The step from what each rank has seen of it; nothing if no layer has run on any.

    Args:
        step: its number.
        parts: of the ranks; of one process that is alone, its own.
        params: rows of `parameters.COLUMNS`.
        scale: of the loss, as a `GradScaler` has it.
    """
    ran = [part for part in parts if part.layers]
    if not ran:
        return []
    inputs = [part.input for part in ran if part.input is not None]
    # Gradients are averaged over the ranks: that of the whole batch's loss is a part of each.
    shrunk = scale * len(parts)
    order = in_order([list(part.layers) for part in ran])
    layers = {key: [p.layers[key] for p in ran if key in p.layers] for key in order}
    found = Tally(
        step=step,
        input=tensor_columns(together(inputs), shrunk) if inputs else {},
        layers={k: layer_columns(layers_together(v), shrunk) for k, v in layers.items()},
        params=unscaled(params, scale),
        shape=_whole_shape([part.shape for part in ran]),
        dtype=ran[0].dtype,
        device=ran[0].device,
    )
    return [found]


def _whole_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """That of the batches of all ranks together, along the first axis."""
    if len(shapes) == 1 or not shapes[0]:
        return shapes[0]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _calls(passes: Sequence[Pass]) -> dict[Key, list[Call]]:
    """All calls of every layer, in execution order."""
    order = in_order([[call.key for call in one.calls] for one in passes])
    calls: dict[Key, list[Call]] = {key: [] for key in order}
    for one in passes:
        for call in one.calls:
            calls[call.key].append(call)
    return calls


def in_order(sequences: Iterable[Sequence[Key]]) -> list[Key]:
    """One order of all keys: each comes after the one before it in the first list that has it.

    Keys that no list has together are in the order of their places.
    """
    order: list[Key] = []
    for keys in sequences:
        order = _merged(order, keys) if order else list(keys)  # those of most models are alike
    return order


def _merged(order: list[Key], keys: Sequence[Key]) -> list[Key]:
    places, own = {key: i for i, key in enumerate(order)}, set(keys)
    after = -1
    added: dict[int, list[Key]] = {}
    for key in keys:
        if key in places:
            after = places[key]
            continue
        while after + 1 < len(order) and order[after + 1] not in own and order[after + 1] < key:
            after += 1
        added.setdefault(after, []).append(key)
    return [k for i in range(-1, len(order)) for k in order[max(i, 0) : i + 1] + added.get(i, [])]


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
