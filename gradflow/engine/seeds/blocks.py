"""LazyLayers that hold the weights of several seeds and compute them all by one call: `torch.vmap`.

A narrow unit takes about as long as its operations take to start, so an operation on a pile of
seeds costs little more than on one. Every layer is drawn when it is asked for, seed by seed, by one
module that serves all layers of its kind; the weights of a seed become a row of a table.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradflow.engine.build import LazyLayers
from gradflow.networks.stack import Block, build_block, layer_kind, redraw
from gradflow.networks.units.template import Unit
from gradflow.reductions import SeedReductions
from gradflow.specs.stack import StackSpec
from gradflow.torch_internals import with_children


class SeedBlocks(LazyLayers):
    """The layers of a stack for all seeds: streams and weights have an axis of seeds in front."""

    def __init__(self, spec: StackSpec, seeds: Sequence[int], device: torch.device) -> None:
        super().__init__(spec.depth)
        self._spec, self._seeds, self._device = spec, seeds, device
        self._templates: dict[Hashable, _Template] = {}

    def in_shared_module(self, layer: int) -> Block:
        """Return the layer in a module of its own: only the drawing is shared."""
        return self.in_own_module(layer)

    def in_own_module(self, layer: int) -> Block:
        """Return the layer, drawn anew for every seed."""
        kind, first = layer_kind(self._spec, layer), self._seeds[0]
        if kind in self._templates:
            redraw(self._templates[kind].block, self._spec, first, layer, self._device)
        else:
            block = build_block(self._spec, first, layer, self._device)
            # One template: where every layer is of its own kind, all would be a second stack.
            self._templates = {kind: _Template(block)}
        return self._with_all_seeds(self._templates[kind], layer)

    def _with_all_seeds(self, template: _Template, layer: int) -> Block:
        """Return the layer of all seeds; the template has the weights of the first one."""
        flat = template.block.source.flat
        table = flat.new_empty((len(self._seeds), flat.numel()))
        for row, seed in zip(table, self._seeds, strict=True):
            if seed != self._seeds[0]:
                redraw(template.block, self._spec, seed, layer, self._device)
            row.copy_(flat)
        return template.with_weights(table)


class _Template:
    """A block of one seed whose units compute the units of every seed."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self._joins = [VmappedJoin(unit) for unit in block.units]

    def with_weights(self, table: Tensor) -> Block:
        """Return a block with weights from a table (seeds, numbers of the block)."""
        pairs = zip(self.block.named_children(), self._joins, strict=True)
        units = {name: _of_seeds(unit, join, table) for (name, unit), join in pairs}
        return with_children(self.block, units)


def _of_seeds(unit: nn.Module, join: VmappedJoin, table: Tensor) -> Unit:
    assert isinstance(unit, Unit)
    weights = [nn.Parameter(_columns(table, p)) for p in unit.weights]
    return unit.of_seeds(weights, [SeedReductions.norms(w.detach()) for w in weights], join)


def _columns(table: Tensor, p: Tensor) -> Tensor:
    """Return the parameter of every seed, (seeds, *shape), from rows of flat buffers."""
    return table[:, p.storage_offset() : p.storage_offset() + p.numel()].view(-1, *p.shape)


class _Join(nn.Module):
    """`Unit.join` as the call of a module, which is what `functional_call` replaces weights in."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        return self.unit.join(x_skip, x_branch)


class VmappedJoin:
    """`Unit.join` for all seeds at once, made from the unit of one, in place of a compiled one."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self._join = _Join(unit)
        self._names = [name for name, _ in self._join.named_parameters()]

    def __call__(self, owner: Unit, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        """Return y of every seed, (seeds, batch, ...), with the weights of `owner`."""
        weights = dict(zip(self._names, owner.weights, strict=True))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel would take the seeds one by one
            if x_skip is None:
                return torch.vmap(lambda w, x: self._of_one(w, None, x))(weights, x_branch)
            return torch.vmap(self._of_one)(weights, x_skip, x_branch)

    def _of_one(self, weights: Mapping[str, Tensor], x_skip: Tensor | None, x: Tensor) -> Tensor:
        return functional_call(self._join, dict(weights), (x_skip, x))
