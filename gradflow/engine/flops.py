"""Floating-point operations of passes, counted from the operations that torch runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from gradflow.engine.tape import Network, Tape
from gradflow.engine.walk import vjp
from gradflow.networks.residual import Unit

aten = torch.ops.aten
# Torch's formulas: of matrix products, convolutions and attention; 2 N K M for N x K by K x M. All
# else is memory traffic and not counted. Attention on CPU is not in torch's own table.
FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


# How formulas refuse shapes that they do not know.
REFUSALS = (AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's stubs
    """Adds up `total` while it is entered.

    `is_complete` says whether torch's formulas took everything that they are for.

    Torch's own `FlopCounterMode` follows modules by hooks, which `torch.autograd.grad` refuses.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's stubs
        self.total, self.is_complete = 0, True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first use would import the compiler: a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        found = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            try:
                self.total += formula(*args, **(kwargs or {}), out_val=found)
            except REFUSALS:
                self.is_complete = False
        return found


def network_flops(network: Network) -> tuple[int, int]:
    """FLOPs of one forward pass and of one backward pass through the units, the loss left out.

    A causal mask saves nothing in the count, by torch's convention. The backward pass is that of
    the engine: it has the gradients of all inputs and parameters. Every kind of unit is run once
    for each shape of its input.
    """
    known: dict[object, tuple[int, int, torch.Size]] = {}
    forward, backward, shape = 0, 0, network.x.shape
    for unit in (unit for block in network.blocks for unit in block.units):
        key = (unit.shortcut, shape, *(type(part) for part in unit.modules()))
        if key not in known:
            known[key] = _unit_flops(unit, network.x.new_ones(shape))
        there, back, shape = known[key]
        forward, backward = forward + there, backward + back
    return forward, backward


def _unit_flops(unit: Unit, x: Tensor) -> tuple[int, int, torch.Size]:
    """FLOPs forward and backward, and the shape of the output."""
    branch = x.requires_grad_()
    skip = x.detach().requires_grad_() if unit.shortcut else None
    with FlopCounter() as there:
        y = unit.join(skip, branch)
    with FlopCounter() as back:
        vjp(Tape(1, unit, skip, branch, y), torch.ones_like(y))
    return there.total, back.total, y.shape
