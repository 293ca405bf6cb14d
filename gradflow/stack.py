"""From a spec to a network: `build_block`, the residual wiring, the input batch and the loss.

Layer l depends on (spec, seed, l) alone, never on torch's global generator or on the layers before
it, so any layer can be replayed by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow import user_code
from gradflow.blocks import PHI, Conv3x3, Linear
from gradflow.checkpoint import load_layer
from gradflow.depth_mixing import DenseUnit, DepthAttentionUnit
from gradflow.fields import check_choice
from gradflow.fixup import FixupUnit
from gradflow.hyper import HyperUnit, ManifoldUnit
from gradflow.initial import Slot, Weights, bias_std, fans, fill, generator, weight_std
from gradflow.language import NextTokenLoss, embedded_batch
from gradflow.ngpt import NgptUnit, unit_norm
from gradflow.norms import ConstantStart, norm_of_kind
from gradflow.profiled import AdminUnit, Profile
from gradflow.readouts import READOUTS
from gradflow.residual import ParamInfo as ParamInfo
from gradflow.residual import Scale
from gradflow.residual import Unit as Unit
from gradflow.spec import StackSpec
from gradflow.streams import B2tUnit, DualUnit, SiameseUnit, ValueResidualUnit
from gradflow.unit_kinds import HighwayUnit, NormformerUnit, PbRelaxUnit, StochasticUnit
from gradflow.user_branch import UserBranch

# The template, and wirings of their own (`Wiring.unit`).
UNITS: dict[str, type[Unit]] = {
    "template": Unit,
    "highway": HighwayUnit,
    "stochastic": StochasticUnit,
    "pb-relax": PbRelaxUnit,
    "normformer": NormformerUnit,
    "fixup": FixupUnit,
    "admin": AdminUnit,
    "ngpt": NgptUnit,
    "b2t": B2tUnit,
    "residual-dual": DualUnit,
    "siamesenorm": SiameseUnit,
    "hyper-connections": HyperUnit,
    "mhc": ManifoldUnit,
    "attnres": DepthAttentionUnit,
    "denseformer": DenseUnit,
    "value-residual": ValueResidualUnit,
}


class Block(nn.Sequential):
    """One layer of the stack: its units in order."""

    source: Weights

    def __init__(self, spec: StackSpec, layer: int = 1) -> None:
        wirings = [spec.wiring(layer, unit) for unit in range(spec.units_per_block)]
        for wiring in wirings:
            check_choice("unit of a Wiring", wiring.unit, tuple(UNITS))
        named = zip(wirings, spec.kind.units, strict=True)
        super().__init__(*(UNITS[wiring.unit](spec, wiring, name) for wiring, name in named))

    @property
    def units(self) -> Iterator[Unit]:
        """The units, first to last."""
        for unit in self:
            assert isinstance(unit, Unit)
            yield unit


def layer_kind(spec: StackSpec, layer: int) -> Hashable:
    """Layers of one kind differ in their drawn weights alone, so one module can play them all."""
    if spec.scheme is None:
        return spec
    units = range(spec.units_per_block)
    return (spec, *(repr(spec.wiring(layer, unit)) for unit in units))


def build_block(spec: StackSpec, seed: int, layer: int, device: torch.device) -> Block:
    """Layer `layer` (from 1) of the stack, with the weights of this seed or of the checkpoint."""
    block = _draw_block(spec, seed, layer, device)
    _set_found(block, spec, seed, layer, device)
    for unit in block.units:
        unit.seal()
    return block


def redraw(block: Block, spec: StackSpec, seed: int, layer: int, device: torch.device) -> None:
    """Give a block the weights of another layer of its kind, in place."""
    block.source.draw(generator(device, seed, "layer", layer))
    for unit in block.units:
        unit.settle(seed, layer)
    _set_found(block, spec, seed, layer, device)
    for unit in block.units:
        unit.forget()


def _draw_block(spec: StackSpec, seed: int, layer: int, device: torch.device) -> Block:
    """What does not depend on a forward pass."""
    block = Block(spec, layer)
    if user_code.is_user_name(spec.block):  # whose modules may have buffers
        block.to(device, getattr(torch, spec.dtype))
    slots = [slot for unit in block.units for slot in unit_slots(spec, unit)]
    block.source = fill(slots, spec, device, generator(device, seed, "layer", layer))
    _share_scales(block)
    for unit in block.units:
        unit.settle(seed, layer)
    return block


def _set_found(block: Block, spec: StackSpec, seed: int, layer: int, device: torch.device) -> None:
    """What no draw decides: a checkpoint, or a forward pass at initialisation."""
    if spec.weights:
        load_layer(spec.checkpoint, layer, block)
    if spec.scheme and spec.recipe.profiled:
        _set_omegas(block, _profile(spec, seed, device).omegas(layer))


# Each layer of a stack asks for the same one; it holds one stream, so few are kept.
@lru_cache(maxsize=2)
def _profile(spec: StackSpec, seed: int, device: torch.device) -> Profile:
    def draw(layer: int) -> list[Unit]:
        return list(_draw_block(spec, seed, layer, device).units)

    return Profile(draw, input_batch(spec, seed, device))


def _set_omegas(block: Block, omegas: tuple[float, ...]) -> None:
    for unit, omega in zip(block.units, omegas, strict=True):
        assert isinstance(unit, AdminUnit)
        unit.set_omega(omega)


def _share_scales(block: Block) -> None:
    """One parameter b for all units of a block, where the wiring says so."""
    shared = [u.scale for u in block.units if isinstance(u.scale, Scale) and u.scale.is_shared]
    for scale in shared[1:]:
        scale.weight = shared[0].weight


def unit_slots(spec: StackSpec, unit: Unit) -> Iterator[Slot]:
    """Every parameter of a unit, with the scale of its draw."""
    branch = unit.branch
    roles = branch.roles()
    for part in unit.modules():
        role = roles.get(part, "")
        gain = unit.wiring.gains.get(role, 1.0)
        feeds, output = role in branch.feeds_activation, role == branch.output
        yield from module_slots(spec, part, feeds=feeds, output=output, gain=gain)
    if isinstance(branch, UserBranch):
        yield from branch.slots(spec, unit.wiring.gains)


def module_slots(
    spec: StackSpec, part: nn.Module, *, feeds: bool = False, output: bool = False, gain: float = 1
) -> Iterator[Slot]:
    """The parameters of one module, those of its children aside.

    Args:
        spec: the rule for matrices and biases.
        part: the module.
        feeds: whether its output goes into the activation.
        output: whether it is the output projection of a branch.
        gain: factor on the standard deviation of its matrix.
    """
    if spec.weights:
        # Trained values replace them all.
        for name, size in getattr(part, "shapes", {}).items():
            yield Slot(part, name, size, None)
    elif isinstance(part, Linear | Conv3x3):
        shape = part.shapes["weight"]
        std = gain * weight_std(spec, shape, feeds=feeds, output=output)
        yield Slot(part, "weight", shape, std, matrix=True)
        if "bias" in part.shapes:
            yield Slot(part, "bias", part.shapes["bias"], bias_std(spec, fans(shape)[0]))
    elif isinstance(part, ConstantStart):
        for name, size in part.shapes.items():
            yield Slot(part, name, size, None, part.starts[name])


def rehearse(spec: StackSpec) -> None:
    """One layer on two samples, on the CPU: shows what is wrong with a user's own block.

    Raises:
        UsageError: it breaks the interface.
    """
    few = replace(spec, batch_size=min(2, int(spec.batch_size or 1)))
    device = torch.device("cpu")
    build_block(few, 0, 1, device)(input_batch(few, 0, device))


def build_stack(spec: StackSpec, seed: int, device: torch.device) -> list[Block]:
    """All layers, resident."""
    return [build_block(spec, seed, layer, device) for layer in range(1, spec.depth + 1)]


def stream_shape(spec: StackSpec) -> tuple[int, ...]:
    """Shape of y_0 ... y_D."""
    batch = int(spec.batch_size or 1)
    return {
        "vectors": (batch, spec.width),
        "tokens": (batch, int(spec.seq_len or 1), spec.width),
        "images": (batch, spec.width, int(spec.image_size or 1), int(spec.image_size or 1)),
    }[spec.kind.domain]


def state_shape(spec: StackSpec, layer: int, unit: int) -> tuple[int, ...]:
    """Shape of the output of unit number `unit` (from 0) of layer `layer` (from 1)."""
    batch, *rest = stream_shape(spec)
    streams = spec.streams(layer, unit)
    return (batch, *rest) if streams == 1 else (batch, streams, *rest)


def input_shape(spec: StackSpec, layer: int, unit: int) -> tuple[int, ...]:
    """Shape of the input of that unit."""
    if (layer, unit) == (1, 0):
        return stream_shape(spec)
    before = (layer, unit - 1) if unit else (layer - 1, spec.units_per_block - 1)
    return state_shape(spec, *before)


def input_batch(spec: StackSpec, seed: int, device: torch.device) -> Tensor:
    """y_0: independent standard normal elements, scaled or normalised as the scheme has it.

    Of a trained checkpoint: the embeddings of random tokens.
    """
    if spec.weights:
        return embedded_batch(spec, spec.checkpoint, seed, device)
    x = _normal(spec, stream_shape(spec), generator(device, seed, "input"))
    return scaled_input(spec, x).detach()


def scaled_input(spec: StackSpec, x: Tensor) -> Tensor:
    """x scaled or normalised as the scheme has it."""
    if spec.scheme is None:
        return x
    scale = spec.recipe.input_scale(spec.depth)
    return _normalised_input(spec, x if scale == 1 else x * scale)


def _normalised_input(spec: StackSpec, x: Tensor) -> Tensor:
    if spec.recipe.input_norm == "unit":
        return unit_norm(x)
    if spec.recipe.input_norm is None:
        return x
    norm = norm_of_kind(spec, str(spec.norm_kind), spec.width)
    fill(list(module_slots(spec, norm)), spec, x.device, generator(x.device, 0, "input norm"))
    return norm.requires_grad_(False)(x)


def _normal(spec: StackSpec, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    values = torch.empty(shape, device=source.device).normal_(generator=source)
    return values.to(getattr(torch, spec.dtype))


class CotangentLoss(nn.Module):
    """L = sum(y * v), v random normal with norm 1: puts exactly v in as dL/dy."""

    def __init__(self, spec: StackSpec, seed: int, device: torch.device) -> None:
        super().__init__()
        v = torch.empty(stream_shape(spec), device=device)
        v = v.normal_(generator=generator(device, seed, "cotangent")).double()
        self.v = (v / torch.linalg.vector_norm(v)).to(getattr(torch, spec.dtype))

    def forward(self, y: Tensor) -> Tensor:
        return (y * self.v).sum()


class MseLoss(nn.Module):
    """L = mean((y - t)^2) against a random normal target t."""

    def __init__(self, spec: StackSpec, seed: int, device: torch.device) -> None:
        super().__init__()
        self.target = _normal(spec, stream_shape(spec), generator(device, seed, "target"))

    def forward(self, y: Tensor) -> Tensor:
        return F.mse_loss(y, self.target)


class CrossEntropyLoss(nn.Module):
    """A classifier head with random labels.

    Final norm where the net is pre-norm (with he-v2's activation), mean over the pixels of an
    image, projection to `--classes`; mean cross-entropy over tokens, or over samples where there
    are none.
    """

    def __init__(self, spec: StackSpec, seed: int, device: torch.device) -> None:
        super().__init__()
        kind = str(spec.norm_kind or spec.domain.norm_kind)
        final = spec.has_final_norm
        self.norm = norm_of_kind(spec, kind, spec.width) if final else nn.Identity()
        active = spec.scheme is not None and spec.recipe.final_activation
        self.phi = PHI[str(spec.activation) if active else "linear"]
        self.project = Linear(spec.width, spec.classes)
        slots = [slot for part in self.modules() for slot in module_slots(spec, part)]
        fill(slots, spec, device, generator(device, seed, "head"))
        source = generator(device, seed, "labels")
        self.pool = spec.kind.domain == "images"
        rows = stream_shape(spec)[: 2 if spec.kind.domain == "tokens" else 1]
        self.labels = torch.randint(
            spec.classes, (torch.Size(rows).numel(),), generator=source, device=device
        )

    def forward(self, y: Tensor) -> Tensor:
        y = self.phi(self.norm(y))
        features = y.mean((2, 3)) if self.pool else y.flatten(0, -2)
        return F.cross_entropy(self.project(features), self.labels)


LOSSES: dict[str, type[nn.Module]] = {
    "cotangent": CotangentLoss,
    "mse": MseLoss,
    "ce": CrossEntropyLoss,
}


class ReadoutLoss(nn.Module):
    """loss(readout(state)): the output is what the state becomes, a name of `READOUTS`."""

    def __init__(self, readout: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.readout, self.loss = readout, loss

    def forward(self, state: Tensor) -> Tensor:
        return self.loss(self.readout(state))


def build_loss(spec: StackSpec, seed: int, device: torch.device) -> nn.Module:
    """The map from y_D to the scalar loss."""
    if spec.weights and spec.loss == "ce":
        return NextTokenLoss(spec, spec.checkpoint, seed, device)
    loss = LOSSES[spec.loss](spec, seed, device)
    if spec.readout is None:
        return loss
    readout = READOUTS[spec.readout](spec)
    slots = [slot for part in readout.modules() for slot in module_slots(spec, part)]
    fill(slots, spec, device, generator(device, seed, "readout"))
    return ReadoutLoss(readout, loss)
