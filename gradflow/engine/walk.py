"""The engine for built stacks: forward unit by unit, then one VJP per unit backward.

A vector-Jacobian product is linear in the cotangent. So between units the cotangent is multiplied
by a power of two that brings its norm to [0.5, 1), and the exponent is carried beside it: nothing
is rounded, and a gradient of 10^-3000 is measured as such in float32. Shortcut and branch get
two leaves for the same x, so one VJP gives both parts of dL/dx. Parameter gradients are reduced
to norms and freed at once, and rows leave for their tables as the walk goes back: what is in memory
does not grow with the depth, but for a few numbers per unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gradflow import reductions
from gradflow.engine.rows import Activations, Collector, RecordTables, UnitRow
from gradflow.engine.tape import Network, SavedBytes, Tape, Ticker, record_backward
from gradflow.networks.units.template import Unit
from gradflow.reductions import ReducedSums
from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.specs.stack import StackSpec
from gradflow.torch_internals import run_backward

# 2^126 and 2^-126 are normal numbers in float32, in which torch multiplies narrower formats too.
_LARGEST_SHIFT = 126


@dataclass(frozen=True)
class Walk:
    """The loss of one pass over one seed, and its tables; last rows may still be on the device."""

    loss: Tensor
    tables: RecordTables
    collector: Collector

    def finish(self) -> None:
        """Put all rows that are left into the tables; waits for the device."""
        self.collector.finish()

    def records(self) -> tuple[list[LayerRecord], list[ParamRecord]]:
        """Return all rows of `layers.csv` and `params.csv`; waits for the device."""
        self.finish()
        return list(self.tables.layers), list(self.tables.params)


def walk(
    spec: StackSpec,
    seed: int,
    network: Network,
    *,
    spans: Sequence[int] = (),
    raw_range: bool = False,
    tables: RecordTables | None = None,
    tick: Ticker = lambda: None,
) -> Walk:
    """Measure one seed of a stack.

    Args:
        spec: specification that `network` was built from.
        seed: seed that the records have.
        network: the stack; its gradients are not stored anywhere.
        spans: which streams are kept, see `tape.record_backward`; the numbers do not depend on it.
        raw_range: leave the cotangent as the number format has it.
        tables: tables that the rows go to; new ones if None.
        tick: called once for each layer that is computed, forward or back.
    """
    tables = tables or RecordTables()
    tokens = spec.kind.domain == "tokens"
    collector = Collector(seed, tables, tokens=tokens)
    observer = Observer(reductions, Activations(tokens=tokens), SavedBytes().of, collector.add)
    loss = observe(network, observer, spans, raw_range=raw_range, tick=tick)
    return Walk(loss, tables, collector)


class Reductions(Protocol):
    """Reduces tensors to sums, as `gradflow.reductions` does for one seed."""

    def gradient_sums(self, g: Tensor, /) -> ReducedSums: ...
    def part_sums(self, skip: Tensor, branch: Tensor, /) -> ReducedSums: ...
    def grad_norm(self, d: Tensor, /) -> tuple[Tensor, Tensor | float]: ...


@dataclass(frozen=True)
class Observer:
    """Reduces the tensors of a pass and hands on its rows.

    Attributes:
        stats: reduces gradients.
        activations: reduces outputs of units, and keeps the sums until the way back.
        saved: returns the bytes that autograd keeps for a unit's backward, as `tape.SavedBytes`.
        add_row: takes the rows of a pass from the last unit down.
        lead: sizes of the axes in front of every number: none, or the number of seeds.
    """

    stats: Reductions
    activations: Activations
    saved: Callable[[Unit, Tensor], int]
    add_row: Callable[[UnitRow], None]
    lead: tuple[int, ...] = ()

    def see_forward(self, tape: Tape) -> None:
        """Reduce the output of a unit in the forward pass."""
        self.activations.push(tape.y.detach())
        self.saved(tape.unit, tape.x_branch)


def observe(
    network: Network, observer: Observer, spans: Sequence[int], *, raw_range: bool, tick: Ticker
) -> Tensor:
    """Run one forward and one backward pass under an observer; return the loss."""
    observer.activations.push(network.x)
    tapes = record_backward(network, spans, observer.see_forward, tick)
    top = [next(tapes)]
    loss, g = loss_gradient(network.loss, top[0].y)
    backward_pass = _BackwardPass(observer, raw_range=raw_range, tick=tick)
    for row in backward_pass.rows(_chained(top, tapes), g):
        observer.add_row(row)
    return loss


def _chained(first: list[Tape], rest: Iterator[Tape]) -> Iterator[Tape]:
    """Yield all tapes; none of them is held here once it was used."""
    while first:
        yield first.pop()
    yield from rest


def loss_gradient(loss: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the output y_D, and dL/dy_D."""
    leaf = y.detach().requires_grad_()
    value = loss(leaf)
    (g,) = torch.autograd.grad(value.sum() if value.ndim else value, leaf)
    # Memory of its own: a sum over streams gives one gradient to all of them.
    return value.detach(), g.contiguous()


def vjp(tape: Tape, g: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return dL/dx in the order of `tape.leaves`, and dL/dparameters; the graph is freed."""
    leaves = tape.leaves
    grads = run_backward(tape.y, g, (*leaves, *tape.unit.weights))
    parts = [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, grads, strict=False)]
    return parts, list(grads[len(leaves) :])


def rescale(g: Tensor, size: Tensor) -> tuple[Tensor, Tensor | int]:
    """Multiply g in place, and exactly, by 2^-e that brings its norm to [0.5, 1); return g and e.

    Zero, infinite and NaN gradients stay as they are. On CUDA, where the norm cannot be read
    without waiting, one step goes no further than 2^126; the units below go on from there. The
    same holds for several sizes at once, each of a part of g along its first axes.
    """
    if size.ndim == 0 and reductions.is_at_hand(size):
        value = size.item()
        shift = math.frexp(value)[1] if math.isfinite(value) else 0
        # In two steps, because 2^-shift itself may lie outside the number format.
        first = max(-_LARGEST_SHIFT, min(_LARGEST_SHIFT, shift))
        for step in (first, shift - first):
            g = g.mul_(2.0**-step) if step else g
        return g, shift
    # frexp gives size = m * 2^e, so m / size is 2^-e without rounding.
    mantissa, exponent = torch.frexp(size)
    scale = (mantissa / size).clamp(2.0**-_LARGEST_SHIFT, 2.0**_LARGEST_SHIFT)
    scale = torch.nan_to_num(scale, nan=1.0).view(*size.shape, *(1,) * (g.ndim - size.ndim))
    return g.mul_(scale), exponent.clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT)


@dataclass(frozen=True)
class _BackwardPass:
    """The backward pass of an observed network, which yields its rows."""

    observer: Observer
    raw_range: bool
    tick: Ticker

    def rows(self, tapes: Iterable[Tape], g: Tensor) -> Iterator[UnitRow]:
        """Yield rows from the last unit down to the input; a graph is freed once it was used."""
        activations, gradient_sums = self.observer.activations, self.observer.stats.gradient_sums
        exponent = _zero_exponent(g, self.observer.lead)
        layer = None
        for tape in tapes:
            if layer not in (None, tape.layer):
                self.tick()
            layer = tape.layer
            sums = activations.pop() | gradient_sums(g) | {"exponent": exponent}
            if not self.raw_range:
                g, shift = rescale(g, torch.as_tensor(sums["grad_norm"]))
                exponent = exponent + shift
            row, g = self._through(tape, sums, g)
            yield row
        self.tick()
        sums = activations.pop() | gradient_sums(g) | {"exponent": exponent}
        yield UnitRow(0, "input", g.shape[len(self.observer.lead) :], sums, {})

    def _through(self, tape: Tape, sums: ReducedSums, g: Tensor) -> tuple[UnitRow, Tensor]:
        """Return the row of a unit, and dL/dx below it."""
        stats = self.observer.stats
        parts, grads = vjp(tape, g)
        row = UnitRow(
            tape.layer,
            tape.unit.name,
            tape.y.shape[len(self.observer.lead) :],
            sums,
            stats.part_sums(*parts) if len(parts) == 2 else {},
            self.observer.saved(tape.unit, tape.x_branch),
            tape.unit.infos,
            [None if d is None else stats.grad_norm(d) for d in grads],
        )
        return row, parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _zero_exponent(g: Tensor, lead: tuple[int, ...]) -> Tensor | int:
    """Return the exponent of the cotangent, 0; on CUDA a tensor, or it would be sent there."""
    if not lead and reductions.is_at_hand(g):
        return 0
    return torch.zeros(lead, dtype=torch.int32, device=g.device)
