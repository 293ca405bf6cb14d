"""The engine for built stacks: forward unit by unit, then one VJP per unit backward.

A vector-Jacobian product is linear in the cotangent. So between units the cotangent is multiplied
by a power of two that brings its norm to [0.5, 1), and the exponent is carried beside it: nothing
is rounded, and a gradient of 10^-3000 is measured as such in float32. Shortcut and branch get
two leaves for the same x, so one VJP gives both parts of dL/dx. Parameter gradients are reduced
to norms and freed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradflow.records import LayerRecord, ParamRecord
from gradflow.residual import Unit
from gradflow.rows import Row, to_records
from gradflow.saved import SavedBytes
from gradflow.spec import StackSpec
from gradflow.stack import Block
from gradflow.stats import Sums, forward_sums, grad_norm, gradient_sums, part_sums

Tick = Callable[[], None]

# 2^126 and 2^-126 are normal numbers in float32, in which torch multiplies narrower formats too.
LARGEST_SHIFT = 126


@dataclass(frozen=True)
class Network:
    """One seed of a stack, ready to run: layers 1 to D, y_0, and the map from y_D to the loss."""

    blocks: Sequence[Block]
    x: Tensor
    loss: nn.Module


@dataclass(frozen=True)
class Tape:
    """One unit after its forward pass: its leaves and its output, joined by a graph."""

    layer: int
    unit: Unit
    x_skip: Tensor | None
    x_branch: Tensor
    y: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """The uses of x: shortcut and branch, or the branch alone if plain."""
        return [self.x_branch] if self.x_skip is None else [self.x_skip, self.x_branch]


@dataclass(frozen=True)
class Walk:
    """What one pass over one seed found, still on the device; rows from the input up."""

    seed: int
    tokens: bool
    rows: list[Row]
    loss: Tensor

    def records(self) -> tuple[list[LayerRecord], list[ParamRecord]]:
        """The rows of `layers.csv` and `params.csv`; waits for the device."""
        return to_records(self.seed, self.rows, tokens=self.tokens)


def walk(
    spec: StackSpec,
    seed: int,
    network: Network,
    *,
    raw_range: bool = False,
    tick: Tick = lambda: None,
) -> Walk:
    """Measure one seed of a stack.

    Args:
        spec: what `network` was built from.
        seed: written into the records.
        network: its gradients are not stored anywhere.
        raw_range: leave the cotangent as the number format has it.
        tick: called once per layer and pass, for progress.
    """
    tokens = spec.kind.domain == "tokens"
    saved = SavedBytes()
    tapes: list[Tape] = []
    kept: list[int | None] = [None]
    sums = [forward_sums(network.x, tokens=tokens)]
    for tape in record_forward(network, tick):
        tapes.append(tape)
        sums.append(forward_sums(tape.y.detach(), tokens=tokens))
        kept.append(saved.of(tape.unit, tape.x_branch))
    loss, g = loss_gradient(network.loss, tapes[-1].y)
    rows = list(_backward(tapes, sums, g, kept, raw_range=raw_range, tick=tick))
    return Walk(seed, tokens, rows[::-1], loss)


def record_forward(network: Network, tick: Tick = lambda: None) -> Iterator[Tape]:
    """Forward unit by unit, each from fresh leaves."""
    x = network.x
    for layer, block in enumerate(network.blocks, start=1):
        for unit in block.units:
            x_branch = x.detach().requires_grad_()
            x_skip = x.detach().requires_grad_() if unit.shortcut else None
            tape = Tape(layer, unit, x_skip, x_branch, unit.join(x_skip, x_branch))
            yield tape
            x = tape.y
        tick()


def loss_gradient(loss: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss at y_D, and its gradient there."""
    leaf = y.detach().requires_grad_()
    value = loss(leaf)
    (g,) = torch.autograd.grad(value, leaf)
    # Memory of its own: a sum over streams gives one gradient to all of them.
    return value.detach(), g.contiguous()


def vjp(tape: Tape, g: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """dL/dx by its parts, in the order of `tape.leaves`, and dL/dparameters; frees the graph."""
    leaves = tape.leaves
    inputs = [*leaves, *tape.unit.weights]
    grads = torch.autograd.grad(tape.y, inputs, g, allow_unused=True)
    parts = [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, grads, strict=False)]
    return parts, list(grads[len(leaves) :])


def rescale(g: Tensor, size: Tensor) -> tuple[Tensor, Tensor | int]:
    """g * 2^-e with its norm in [0.5, 1), in place and exact, and e.

    Zero, infinite and NaN gradients stay as they are. On CUDA, where the norm cannot be read
    without waiting, one step goes no further than 2^126; the units below go on from there.
    """
    if size.device.type == "cpu":
        value = size.item()
        shift = math.frexp(value)[1] if math.isfinite(value) else 0
        # In two steps, because 2^-shift itself may lie outside the number format.
        first = max(-LARGEST_SHIFT, min(LARGEST_SHIFT, shift))
        for step in (first, shift - first):
            g = g.mul_(2.0**-step) if step else g
        return g, shift
    # frexp gives size = m * 2^e, so m / size is 2^-e without rounding.
    mantissa, exponent = torch.frexp(size)
    scale = (mantissa / size).clamp(2.0**-LARGEST_SHIFT, 2.0**LARGEST_SHIFT)
    return g.mul_(torch.nan_to_num(scale, nan=1.0)), exponent.clamp(-LARGEST_SHIFT, LARGEST_SHIFT)


def _backward(
    tapes: list[Tape],
    forward: list[Sums],
    g: Tensor,
    kept: list[int | None],
    *,
    raw_range: bool,
    tick: Tick,
) -> Iterator[Row]:
    """Rows from the last unit down to the input; each graph is freed once it has been used."""
    exponent = torch.zeros((), dtype=torch.int32, device=g.device)
    while tapes:
        tape = tapes.pop()
        sums = forward.pop() | gradient_sums(g) | {"exponent": exponent}
        if not raw_range:
            g, shift = rescale(g, torch.as_tensor(sums["grad_norm"]))
            exponent = exponent + shift
        parts, grads = vjp(tape, g)
        g = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        yield Row(
            tape.layer,
            tape.unit.name,
            tape.y.shape,
            sums,
            part_sums(*parts) if len(parts) == 2 else {},
            kept.pop(),
            tape.unit.infos,
            [None if d is None else grad_norm(d) for d in grads],
        )
        if not tapes or tapes[-1].layer != tape.layer:
            tick()
    yield Row(0, "input", g.shape, forward.pop() | gradient_sums(g) | {"exponent": exponent}, {})
