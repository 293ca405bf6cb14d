"""Floating-point operations of passes, counted from the operations that torch runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from gradflow.engine.tape import Network, Tape
from gradflow.engine.walk import vjp
from gradflow.networks.units.template import Unit
from gradflow.torch_internals import OperationMode, operation


def _grouped_flop(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of products by groups: of rows, of columns, or of the summed dimension."""
    rows = a.shape[-2:] if b.ndim == 2 else a.shape
    return 2 * rows.numel() * b.shape[-1]


# Formulas of matrix products, convolutions and attention; 2 N K M for N x K by K x M. All else is
# memory traffic and not counted. The last three are not in torch's own table.
FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    operation("_grouped_mm"): _grouped_flop,
    operation("_scaled_dot_product_flash_attention_for_cpu"): sdpa_flop,
    operation("_scaled_dot_product_flash_attention_for_cpu_backward"): sdpa_backward_flop,
}
# Operations of torch that have products inside them and no formula.
_RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
_OPAQUE = {
    *(operation(f"{name}{way}") for name in _RECURRENT for way in ("", "_backward")),
    *(operation(name) for name in ("_trilinear", "_sparse_addmm", "_scaled_grouped_mm")),
}
# Operations of any other namespace may have products inside them.
_NAMESPACES = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "gradflow")

# How formulas refuse shapes that they do not know.
_REFUSALS = (AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


class FlopCounter(OperationMode):  # type: ignore[no-untyped-call]  # torch's stubs
    """Adds up the FLOPs of all operations in `total` while it is entered.

    `is_complete` says whether there was a formula for everything that may have products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total, self.is_complete = 0, True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        found = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is None:
            known = func.namespace in _NAMESPACES and func.overloadpacket not in _OPAQUE
            self.is_complete = self.is_complete and known
        else:
            try:
                self.total += formula(*args, **(kwargs or {}), out_val=found)
            except _REFUSALS:
                self.is_complete = False
        return found


def network_flops(network: Network) -> tuple[int, int] | None:
    """Return the FLOPs of one forward and of one backward pass through the units, without the loss.

    None where there is no formula for an operation in a branch.

    A causal mask saves nothing in the count, by torch's convention. The backward pass computes
    the gradients of all inputs and parameters, as the engine does. Every kind of unit is run once
    for each shape of its input.
    """
    known: dict[object, tuple[int, int, torch.Size] | None] = {}
    forward, backward, shape = 0, 0, network.x.shape
    for unit in (unit for block in network.blocks for unit in block.units):
        key = (unit.shortcut, shape, *(type(part) for part in unit.modules()))
        if key not in known:
            known[key] = _unit_flops(unit, network.x.new_ones(shape))
        found = known[key]
        if found is None:
            return None
        there, back, shape = found
        forward, backward = forward + there, backward + back
    return forward, backward


def _unit_flops(unit: Unit, x: Tensor) -> tuple[int, int, torch.Size] | None:
    """Return FLOPs forward and backward, and the output's shape; None where some are unknown."""
    branch = x.requires_grad_()
    skip = x.detach().requires_grad_() if unit.shortcut else None
    with FlopCounter() as there:
        y = unit.join(skip, branch)
    with FlopCounter() as back:
        vjp(Tape(1, unit, skip, branch, y), torch.ones_like(y))
    complete = there.is_complete and back.is_complete
    return (there.total, back.total, y.shape) if complete else None
