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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gradflow import reductions
from gradflow.engine.rows import Activations, Collector, Row, Tables
from gradflow.engine.tape import Network as Network
from gradflow.engine.tape import SavedBytes, Tick, record_backward
from gradflow.engine.tape import Tape as Tape
from gradflow.engine.tape import record_forward as record_forward
from gradflow.networks.units.template import Unit
from gradflow.reductions import Sums
from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.specs.stack import StackSpec
from gradflow.torch_internals import run_backward

# 2^126 and 2^-126 are normal numbers in float32, in which torch multiplies narrower formats too.
LARGEST_SHIFT = 126


@dataclass(frozen=True)
class Walk:
    """What one pass over one seed found; its last rows may still be on the device."""

    loss: Tensor
    tables: Tables
    collector: Collector

    def finish(self) -> None:
        """Put what is left into the tables; waits for the device."""
        self.collector.finish()

    def records(self) -> tuple[list[LayerRecord], list[ParamRecord]]:
        """All rows of `layers.csv` and `params.csv`; waits for the device."""
        self.finish()
        return list(self.tables.layers), list(self.tables.params)


def walk(
    spec: StackSpec,
    seed: int,
    network: Network,
    *,
    spans: Sequence[int] = (),
    raw_range: bool = False,
    tables: Tables | None = None,
    tick: Tick = lambda: None,
) -> Walk:
    """Measure one seed of a stack.

    Args:
        spec: what `network` was built from.
        seed: written into the records.
        network: its gradients are not stored anywhere.
        spans: which streams are kept, see `tape.record_backward`; the numbers do not depend on it.
        raw_range: leave the cotangent as the number format has it.
        tables: where the rows go; new ones if None.
        tick: called once per layer that is computed, forward or back, for progress.
    """
    tables = tables or Tables()
    tokens = spec.kind.domain == "tokens"
    collector = Collector(seed, tables, tokens=tokens)
    observer = Observer(reductions, Activations(tokens=tokens), SavedBytes(), collector)
    loss = observe(network, observer, spans, raw_range=raw_range, tick=tick)
    return Walk(loss, tables, collector)


class Reductions(Protocol):
    """Tensors to sums: `gradflow.reductions`, or its like for several seeds."""

    def gradient_sums(self, g: Tensor, /) -> Sums: ...
    def part_sums(self, skip: Tensor, branch: Tensor, /) -> Sums: ...
    def grad_norm(self, d: Tensor, /) -> tuple[Tensor, Tensor | float]: ...


class Saved(Protocol):
    """Tells the bytes that autograd keeps for a unit's backward, as `saved.SavedBytes` does."""

    def of(self, unit: Unit, x: Tensor, /) -> int: ...


class Rows(Protocol):
    """Takes the rows of a pass, from the last unit down."""

    def add(self, row: Row, /) -> None: ...


@dataclass(frozen=True)
class Observer:
    """What sees the tensors of a pass; `lead` are the sizes in front of every number, if any."""

    stats: Reductions
    activations: Activations
    saved: Saved
    rows: Rows
    lead: tuple[int, ...] = ()

    def see(self, tape: Tape) -> None:
        """A unit on its way forward."""
        self.activations.see(tape.y.detach())
        self.saved.of(tape.unit, tape.x_branch)


def observe(
    network: Network, observer: Observer, spans: Sequence[int], *, raw_range: bool, tick: Tick
) -> Tensor:
    """One pass forward and back under an observer; returns the loss."""
    observer.activations.see(network.x)
    tapes = record_backward(network, spans, observer.see, tick)
    top = [next(tapes)]
    loss, g = loss_gradient(network.loss, top[0].y)
    way = _Way(observer, raw_range=raw_range, tick=tick)
    for row in way.back(_chained(top, tapes), g):
        observer.rows.add(row)
    return loss


def _chained(first: list[Tape], rest: Iterator[Tape]) -> Iterator[Tape]:
    """All tapes, none of them held here once it is used."""
    while first:
        yield first.pop()
    yield from rest


def loss_gradient(loss: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss at y_D, and its gradient there."""
    leaf = y.detach().requires_grad_()
    value = loss(leaf)
    (g,) = torch.autograd.grad(value.sum() if value.ndim else value, leaf)
    # Memory of its own: a sum over streams gives one gradient to all of them.
    return value.detach(), g.contiguous()


def vjp(tape: Tape, g: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """dL/dx by its parts, in the order of `tape.leaves`, and dL/dparameters; frees the graph."""
    leaves = tape.leaves
    grads = run_backward(tape.y, g, (*leaves, *tape.unit.weights))
    parts = [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, grads, strict=False)]
    return parts, list(grads[len(leaves) :])


def rescale(g: Tensor, size: Tensor) -> tuple[Tensor, Tensor | int]:
    """g * 2^-e with its norm in [0.5, 1), in place and exact, and e.

    Zero, infinite and NaN gradients stay as they are. On CUDA, where the norm cannot be read
    without waiting, one step goes no further than 2^126; the units below go on from there. The
    same holds for several sizes at once, each of a part of g along its first axes.
    """
    if size.ndim == 0 and reductions.is_at_hand(size):
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
    scale = torch.nan_to_num(scale, nan=1.0).view(*size.shape, *(1,) * (g.ndim - size.ndim))
    return g.mul_(scale), exponent.clamp(-LARGEST_SHIFT, LARGEST_SHIFT)


@dataclass(frozen=True)
class _Way:
    """What the way back needs beside the tapes."""

    observer: Observer
    raw_range: bool
    tick: Tick

    def back(self, tapes: Iterable[Tape], g: Tensor) -> Iterator[Row]:
        """Rows from the last unit down to the input; each graph is freed once it has been used."""
        activations, gradient_sums = self.observer.activations, self.observer.stats.gradient_sums
        exponent = _zero(g, self.observer.lead)
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
        yield Row(0, "input", g.shape[len(self.observer.lead) :], sums, {})

    def _through(self, tape: Tape, sums: Sums, g: Tensor) -> tuple[Row, Tensor]:
        """The row of a unit, and the gradient below it."""
        stats = self.observer.stats
        parts, grads = vjp(tape, g)
        row = Row(
            tape.layer,
            tape.unit.name,
            tape.y.shape[len(self.observer.lead) :],
            sums,
            stats.part_sums(*parts) if len(parts) == 2 else {},
            self.observer.saved.of(tape.unit, tape.x_branch),
            tape.unit.infos,
            [None if d is None else stats.grad_norm(d) for d in grads],
        )
        return row, parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _zero(g: Tensor, lead: tuple[int, ...]) -> Tensor | int:
    """The exponent of the cotangent. What is no tensor on CUDA would have to be sent there."""
    if not lead and reductions.is_at_hand(g):
        return 0
    return torch.zeros(lead, dtype=torch.int32, device=g.device)
