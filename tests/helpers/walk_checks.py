"""Checks that both engines and every scheme share: rows held against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradflow.engine.tape import Network, record_forward
from gradflow.engine.walk import loss_gradient, vjp
from gradflow.runs.records import LayerRecord, ParamRecord, columns
from gradflow.specs.stack import StackSpec

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


RELATIVE = {
    *("act_rms", "act_max_abs", "grad_norm", "gain", "skip_gain", "branch_gain"),
    *("param_norm", "param_grad_norm", "norm"),
}


ABSOLUTE = {
    *("act_cos", "grad_cos", "skip_branch_cos", "zero_fraction"),
    *("log10_grad_norm", "log10_param_grad_norm"),
}


Row = dict[str, Any]


def cells(record: LayerRecord | ParamRecord) -> Row:
    """A record by column; `dataclasses.asdict` would copy every value."""
    return {column: getattr(record, column) for column in columns(type(record))}


def agree(column: str, got: Any, want: Any, tolerance: float, floor: float = 0.0) -> bool:
    """Whether a cell of a table is right; NaN and missing cells match only their like."""
    if want is None or got is None or column not in RELATIVE | ABSOLUTE:
        return bool(got == want)
    if not math.isfinite(want):
        return math.isnan(got) if math.isnan(want) else bool(got == want)
    relative = tolerance if column in RELATIVE else 0.0
    absolute = tolerance if column in ABSOLUTE else floor
    return math.isclose(got, want, rel_tol=relative, abs_tol=absolute)


def differences(
    got: Row, want: Row, tolerance: float, floor: float = 0.0
) -> dict[str, tuple[Any, Any]]:
    """Cells of a row that are wrong: what was measured, what is true."""
    return {
        column: (got[column], value)
        for column, value in want.items()
        if not agree(column, got[column], value, tolerance, floor)
    }


def true_layer(spec: StackSpec, true: Row) -> Row:
    """A row of the oracle, less what float32 itself decides.

    Where terms cancel, float32 may round to exactly 0; `zero_fraction` is compared with
    float32 autograd instead.
    """
    return {c: v for c, v in true.items() if spec.dtype == "float64" or c != "zero_fraction"}


def assert_layers(spec: StackSpec, rows: list[Row], truth: list[Row]) -> None:
    for row, true in zip(rows, truth, strict=True):
        wrong = differences(row, true_layer(spec, true), TOLERANCE[spec.dtype])
        assert not wrong, (row["layer"], row["unit"], wrong)


def assert_params(spec: StackSpec, rows: list[Row], truth: list[Row]) -> None:
    """Relative to each gradient, but for a floor of some roundings of the unit's largest.

    A batchnorm takes away what a bias before it adds: that gradient is zero, and both sides
    hold only rounding. Plain attention makes its tokens alike: the gradient of its queries is
    what is left where nearly all cancels, and float32 keeps few digits of it.
    """
    for row, true in zip(rows, truth, strict=True):
        same_unit = [t for t in truth if (t["layer"], t["unit"]) == (true["layer"], true["unit"])]
        largest = max(t["grad_norm"] for t in same_unit)
        floor = 16 * torch.finfo(getattr(torch, spec.dtype)).eps * largest
        logarithm = true.pop("log10_grad_norm")
        wrong = differences(row, true, TOLERANCE[spec.dtype], floor)
        assert not wrong, (row["layer"], row["unit"], row["param"], wrong, largest)
        if true["grad_norm"] > 1e-4 * largest:
            assert row["log10_grad_norm"] == pytest.approx(logarithm, abs=TOLERANCE[spec.dtype])


def whole_graph(net: Network) -> tuple[list[Tensor], list[Tensor]]:
    """dL/dy of y_0 and every unit, and dL/dparameters, from one graph over the whole stack."""
    stack = nn.Sequential(*(unit for block in net.blocks for unit in block))
    ys = [net.x.clone().requires_grad_()]
    for unit in stack:
        ys.append(unit(ys[-1]))
    weights = list(stack.parameters())
    grads = torch.autograd.grad(net.loss(ys[-1]), [*ys, *weights])
    return list(grads[: len(ys)]), list(grads[len(ys) :])


def unit_by_unit(net: Network) -> tuple[list[Tensor], list[Tensor | None]]:
    """The same as the engine goes: one VJP per unit, nothing rescaled."""
    tapes = list(record_forward(net))
    _, g = loss_gradient(net.loss, tapes[-1].y)
    at_outputs, of_weights = [g], []
    for tape in reversed(tapes):
        parts, grads = vjp(tape, g)
        g = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        at_outputs, of_weights = [g, *at_outputs], grads + of_weights
    return at_outputs, of_weights


def saved_storages(y: Tensor, params: set[int]) -> int:
    """Bytes of the distinct storages in the `_saved_*` attributes of a graph, parameters aside."""
    kept: dict[int, int] = {}
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [below for below, _ in node.next_functions]
        for attribute in filter(lambda a: a.startswith("_saved_"), dir(node)):
            value = getattr(node, attribute)
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
    return sum(n for address, n in kept.items() if address not in params)
