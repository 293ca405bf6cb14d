"""From a spec to a network: `build_block`, the residual wiring, the input batch and the loss.

Layer l depends on (spec, seed, l) alone, never on torch's global generator or on the layers before
it, so any layer can be replayed by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.blocks import BRANCHES, PHI, Branch, Conv3x3, Linear
from gradflow.checkpoint import load_layer
from gradflow.initial import Slot, bias_std, fans, fill, generator, weight_std
from gradflow.language import NextTokenLoss, embedded_batch
from gradflow.norms import Norm, Pointwise, make_norm, norm_of_kind
from gradflow.spec import StackSpec
from gradflow.stats import norm
from gradflow.wiring import Wiring


class Activation(nn.Module):
    """phi as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.phi = PHI[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(x)


@dataclass(frozen=True)
class ParamInfo:
    """What is known of one parameter without a pass; `norm` is that of its value."""

    name: str
    shape: str
    numel: int
    norm: Tensor


class Scale(nn.Module):
    """b x, b a parameter: one number, or one for each feature; empty as `Linear` is."""

    weight: Tensor

    def __init__(self, spec: StackSpec, learned: str, start: float) -> None:
        super().__init__()
        self.shapes = {"weight": (spec.width if learned == "vector" else 1,)}
        self.starts = {"weight": start}
        self.is_shared = learned == "shared scalar"
        self.channels = learned == "vector" and spec.kind.domain == "images"

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight.view(-1, 1, 1) if self.channels else self.weight)


class Factor(nn.Module):
    """A constant times x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Unit(nn.Module):
    """One step of the stream: y = Np(a x + b No(f(c Ni(x)))), without a x if plain (`wiring`).

    Attributes:
        shortcut: whether it is residual.
        weights: its parameters, once they have values.
        infos: for each what needs no pass.
        structure: equal for units that keep equally much for their backward.
    """

    weights: tuple[nn.Parameter, ...]
    infos: tuple[ParamInfo, ...]
    structure: tuple[object, ...]

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__()
        self.name, self.wiring = name, wiring
        self.shortcut = wiring.a != 0
        self.branch: Branch = BRANCHES[name](spec, wiring)
        inside = self.branch.norms_inside
        self.shared = nn.Identity() if inside else make_norm(spec, wiring, "shared")
        self.before = nn.Identity() if inside else make_norm(spec, wiring, "in")
        self.scale_in = _factor(wiring.c)
        self.branch_norm = make_norm(spec, wiring, "branch")
        self.scale = Scale(spec, wiring.learned, wiring.b) if wiring.learned else _factor(wiring.b)
        self.after = _after(spec, wiring, inside=inside)

    def f(self, x: Tensor) -> Tensor:
        """b No(f(c Ni(x)))."""
        return self.scale(self.branch_norm(self.branch(self.scale_in(self.before(x)))))

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        """y from the two uses of x, given apart so that their gradients come apart.

        Args:
            x_skip: x as the shortcut takes it; None for a plain unit.
            x_branch: x as the branch takes it.
        """
        f = self.f(self.shared(x_branch))
        if x_skip is None:
            return self.after(f)
        skip = self.shared(x_skip)
        return self.after((skip if self.wiring.a == 1 else self.wiring.a * skip) + f)

    def seal(self) -> None:
        """Note what the engines ask of every unit in every pass."""
        named = list(self.named_parameters())
        self.weights = tuple(p for _, p in named)
        self.infos = tuple(
            ParamInfo(name, "x".join(map(str, p.shape)), p.numel(), norm(p.detach()))
            for name, p in named
        )
        scalars = (self.wiring.a, self.shortcut)
        self.structure = (scalars, *(type(part) for part in self.modules()))

    def forward(self, x: Tensor) -> Tensor:
        # The view gathers the branch's uses of x before the shortcut's is added, in the order
        # in which the engine adds the two parts: the gradients agree bit by bit.
        return self.join(x if self.shortcut else None, x.view_as(x))


def _factor(factor: float) -> nn.Module:
    return nn.Identity() if factor == 1 else Factor(factor)


def _after(spec: StackSpec, wiring: Wiring, *, inside: bool) -> nn.Module:
    """What follows the addition: a norm, or the activation of He et al. 2015."""
    if not inside:
        return make_norm(spec, wiring, "out")
    return Activation(str(spec.activation)) if "out" in wiring.norms else nn.Identity()


# The template, and wirings of their own (`Wiring.unit`).
UNITS: dict[str, type[Unit]] = {"template": Unit}


class Block(nn.Sequential):
    """One layer of the stack: its units in order."""

    def __init__(self, spec: StackSpec, layer: int = 1) -> None:
        wirings = [spec.wiring(layer, unit) for unit in range(spec.units_per_block)]
        named = zip(wirings, spec.kind.units, strict=True)
        super().__init__(*(UNITS[wiring.unit](spec, wiring, name) for wiring, name in named))

    @property
    def units(self) -> Iterator[Unit]:
        """The units, first to last."""
        for unit in self:
            assert isinstance(unit, Unit)
            yield unit


def build_block(spec: StackSpec, seed: int, layer: int, device: torch.device) -> Block:
    """Layer `layer` (from 1) of the stack, with the weights of this seed or of the checkpoint."""
    block = Block(spec, layer)
    slots = [slot for unit in block.units for slot in unit_slots(spec, unit)]
    fill(slots, spec, device, generator(device, seed, "layer", layer))
    _share_scales(block)
    if spec.weights:
        load_layer(spec.checkpoint, layer, block)
    for unit in block.units:
        unit.seal()
    return block


def _share_scales(block: Block) -> None:
    """One parameter b for all units of a block, where the wiring says so."""
    shared = [u.scale for u in block.units if isinstance(u.scale, Scale) and u.scale.is_shared]
    for scale in shared[1:]:
        scale.weight = shared[0].weight


def unit_slots(spec: StackSpec, unit: Unit) -> Iterator[Slot]:
    """Every parameter of a unit, with the scale of its draw."""
    branch = unit.branch
    roles = {part: name for name, part in branch.named_children()}
    for part in unit.modules():
        role = roles.get(part, "")
        gain = unit.wiring.gains.get(role, 1.0)
        feeds, output = role in branch.feeds_activation, role == branch.output
        yield from module_slots(spec, part, feeds=feeds, output=output, gain=gain)


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
    elif isinstance(part, Norm | Pointwise | Scale):
        for name, size in part.shapes.items():
            yield Slot(part, name, size, None, part.starts[name])


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


def input_batch(spec: StackSpec, seed: int, device: torch.device) -> Tensor:
    """y_0: independent standard normal elements, times the scheme's own scale.

    Of a trained checkpoint: the embeddings of random tokens.
    """
    if spec.weights:
        return embedded_batch(spec, spec.checkpoint, seed, device)
    x = _normal(spec, stream_shape(spec), generator(device, seed, "input"))
    scale = spec.recipe.input_scale(spec.depth) if spec.scheme else 1.0
    return x if scale == 1 else x * scale


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

    Final norm where the net is pre-norm, mean over the pixels of an image, projection to
    `--classes`; mean cross-entropy over tokens, or over samples where there are none.
    """

    def __init__(self, spec: StackSpec, seed: int, device: torch.device) -> None:
        super().__init__()
        kind = str(spec.norm_kind or spec.domain.norm_kind)
        final = spec.has_final_norm
        self.norm = norm_of_kind(spec, kind, spec.width) if final else nn.Identity()
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
        y = self.norm(y)
        features = y.mean((2, 3)) if self.pool else y.flatten(0, -2)
        return F.cross_entropy(self.project(features), self.labels)


LOSSES: dict[str, type[nn.Module]] = {
    "cotangent": CotangentLoss,
    "mse": MseLoss,
    "ce": CrossEntropyLoss,
}


def build_loss(spec: StackSpec, seed: int, device: torch.device) -> nn.Module:
    """The map from y_D to the scalar loss."""
    if spec.weights and spec.loss == "ce":
        return NextTokenLoss(spec, spec.checkpoint, seed, device)
    return LOSSES[spec.loss](spec, seed, device)
