"""From a spec to a network: `build_block`, every layer with its weights.

Layer l depends on (spec, seed, l) alone, never on torch's global generator or on the layers before
it, so any layer can be replayed by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pkgutil import resolve_name

import torch
from torch import nn

from gradflow.networks.checkpoint import load_layer
from gradflow.networks.ends import input_batch
from gradflow.networks.initial import Weights, fill, generator
from gradflow.networks.units.admin import AdminUnit, Profile
from gradflow.networks.units.template import Scale, Unit
from gradflow.schemes import UNIT_KINDS
from gradflow.specs.fields import check_choice
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import is_user_name


@cache
def unit_class(kind: str) -> type[Unit]:
    """Return the class of a kind of unit, which `schemes.UNIT_KINDS` names."""
    cls = resolve_name(UNIT_KINDS[kind].implementation)
    assert isinstance(cls, type)
    assert issubclass(cls, Unit)
    return cls


class Block(nn.Sequential):
    """One layer of the stack: its units in order."""

    source: Weights

    def __init__(self, spec: StackSpec, layer: int = 1) -> None:
        wirings = [spec.wiring(layer, unit) for unit in range(spec.units_per_block)]
        for wiring in wirings:
            check_choice("unit of a Wiring", wiring.unit, tuple(UNIT_KINDS))
        named = zip(wirings, spec.kind.units, strict=True)
        super().__init__(*(unit_class(wiring.unit)(spec, wiring, name) for wiring, name in named))

    @property
    def units(self) -> Iterator[Unit]:
        """Yield the units of the layer, first to last."""
        for unit in self:
            assert isinstance(unit, Unit)
            yield unit


def layer_kind(spec: StackSpec, layer: int) -> Hashable:
    """Return what is equal for layers that differ in weights alone: one module plays them all."""
    if spec.scheme is None:
        return spec
    units = range(spec.units_per_block)
    return (spec, *(repr(spec.wiring(layer, unit)) for unit in units))


def build_block(spec: StackSpec, seed: int, layer: int, device: torch.device) -> Block:
    """Return layer `layer` (from 1) with the weights of this seed or of the checkpoint."""
    block = _draw_block(spec, seed, layer, device)
    _set_measured(block, spec, seed, layer, device)
    for unit in block.units:
        unit.seal()
    return block


def redraw(block: Block, spec: StackSpec, seed: int, layer: int, device: torch.device) -> None:
    """Give a block the weights of another layer of its kind, in place."""
    block.source.draw(generator(device, seed, "layer", layer))
    for unit in block.units:
        unit.settle(seed, layer)
    _set_measured(block, spec, seed, layer, device)
    for unit in block.units:
        unit.forget()


def _draw_block(spec: StackSpec, seed: int, layer: int, device: torch.device) -> Block:
    """Return a layer with all values that do not depend on a forward pass."""
    block = Block(spec, layer)
    if is_user_name(spec.block):  # whose modules may have buffers
        block.to(device, getattr(torch, spec.dtype))
    slots = [slot for unit in block.units for slot in unit.slots(spec)]
    block.source = fill(slots, spec, device, generator(device, seed, "layer", layer))
    _share_scales(block)
    for unit in block.units:
        unit.settle(seed, layer)
    return block


def _set_measured(
    block: Block, spec: StackSpec, seed: int, layer: int, device: torch.device
) -> None:
    """Set the values that no draw decides: a checkpoint's, or those of a pass at initialisation."""
    if spec.weights:
        load_layer(spec.checkpoint, layer, block)
    if spec.scheme and spec.scheme_record.profiled:
        omegas = _profile(spec, seed, device).omegas(layer)
        for unit, omega in zip(block.units, omegas, strict=True):
            assert isinstance(unit, AdminUnit)
            unit.set_omega(omega)


# Each layer of a stack asks for the same one; it holds one stream, so few are kept.
@lru_cache(maxsize=2)
def _profile(spec: StackSpec, seed: int, device: torch.device) -> Profile:
    def draw(layer: int) -> list[Unit]:
        return list(_draw_block(spec, seed, layer, device).units)

    return Profile(draw, input_batch(spec, seed, device))


def _share_scales(block: Block) -> None:
    """Give all units of a block one parameter b, where the wiring says so."""
    shared = [u.scale for u in block.units if isinstance(u.scale, Scale) and u.scale.is_shared]
    for scale in shared[1:]:
        scale.weight = shared[0].weight


def rehearse(spec: StackSpec) -> None:
    """Run one layer on two samples, on the CPU, to find what is wrong with a user's own block.

    Raises:
        UsageError: the block breaks the interface.
    """
    few = replace(spec, batch_size=min(2, spec.batch_size))
    device = torch.device("cpu")
    build_block(few, 0, 1, device)(input_batch(few, 0, device))


def build_stack(spec: StackSpec, seed: int, device: torch.device) -> list[Block]:
    """Return all layers of the stack, each with its weights in memory."""
    return [build_block(spec, seed, layer, device) for layer in range(1, spec.depth + 1)]
