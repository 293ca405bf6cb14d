"""From a spec to a network: `build_block`, the residual wiring, the input batch and the loss.

Layer l depends on (spec, seed, l) alone, never on torch's global generator or on the layers before
it, so any layer can be replayed by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.blocks import BRANCHES, PHI, Branch, Conv3x3, Linear, Norm, make_norm
from gradflow.initial import Slot, Weights, bias_std, fans, fill, generator, weight_std
from gradflow.spec import StackSpec
from gradflow.stats import norm


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
    norm: Tensor | float

    @property
    def at_hand(self) -> ParamInfo:
        """With the norm as a number."""
        return ParamInfo(self.name, self.shape, self.numel, float(self.norm))


class Unit(nn.Module):
    """One step of the stream: y = after(x + f(before(x))), or y = after(f(before(x))) if plain.

    Attributes:
        weights: its parameters, once they have values.
        structure: equal for units that keep equally much for their backward.
    """

    weights: tuple[nn.Parameter, ...]
    structure: tuple[object, ...]

    def __init__(self, spec: StackSpec, name: str) -> None:
        super().__init__()
        self.name = name
        self.shortcut = spec.has_shortcut
        self.branch: Branch = BRANCHES[name](spec)
        self.before, self.after = _placed_norms(spec, self.branch)

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        """y from the two uses of x, given apart so that their gradients come apart.

        Args:
            x_skip: x as the shortcut takes it; None for a plain unit.
            x_branch: x as the branch takes it.
        """
        f = self.branch(self.before(x_branch))
        return self.after(f if x_skip is None else x_skip + f)

    def seal(self) -> None:
        """Note what the engines ask of every unit in every pass."""
        named = list(self.named_parameters())
        self.weights = tuple(p for _, p in named)
        self._known = [(name, "x".join(map(str, p.shape)), p.numel()) for name, p in named]
        self.structure = (self.shortcut, *(type(part) for part in self.modules()))
        # A list, because a module's own attributes take long to set.
        self._infos: list[ParamInfo] = []

    def forget(self) -> None:
        """The weights have new values: what was known of the old ones is not true any more."""
        self._infos.clear()

    @property
    def infos(self) -> Sequence[ParamInfo]:
        """For each parameter what needs no pass; norms are taken when they are first asked for."""
        if not self._infos:
            self.note_norms()
        return tuple(self._infos)

    def note_norms(self) -> None:
        """Take the norms of the weights, so that no pass has to."""
        pairs = zip(self._known, self.weights, strict=True)
        self._infos[:] = [ParamInfo(*known, norm(p.detach())) for known, p in pairs]

    def forward(self, x: Tensor) -> Tensor:
        # The view gathers the branch's uses of x before the shortcut's is added, in the order
        # in which the engine adds the two parts: the gradients agree bit by bit.
        return self.join(x if self.shortcut else None, x.view_as(x))


def _placed_norms(spec: StackSpec, branch: Branch) -> tuple[nn.Module, nn.Module]:
    if branch.norms_inside:
        last = Activation(str(spec.activation)) if spec.norm == "post" else nn.Identity()
        return nn.Identity(), last
    before = make_norm(spec) if spec.norm == "pre" else nn.Identity()
    after = make_norm(spec) if spec.norm == "post" else nn.Identity()
    return before, after


class Block(nn.Sequential):
    """One layer of the stack: its units in order, with no values in their parameters yet."""

    _source: Weights

    def __init__(self, spec: StackSpec) -> None:
        super().__init__(*(Unit(spec, name) for name in spec.kind.units))

    @property
    def units(self) -> Iterator[Unit]:
        """The units, first to last."""
        for unit in self:
            assert isinstance(unit, Unit)
            yield unit

    def own(self, weights: Weights) -> None:
        """Note where the values of the parameters come from."""
        self._source = weights
        for unit in self.units:
            unit.seal()

    def redraw(self, source: torch.Generator) -> None:
        """The weights of another layer of the same kind, in place."""
        self._source.draw(source)
        for unit in self.units:
            unit.forget()


def layer_kind(spec: StackSpec, layer: int) -> Hashable:  # noqa: ARG001
    """Layers of one kind differ in their drawn weights alone, so one module can play them all."""
    return spec


def build_block(spec: StackSpec, seed: int, layer: int, device: torch.device) -> Block:
    """Layer `layer` (from 1) of the stack, with the weights of this seed."""
    block = Block(spec)
    slots = [slot for unit in block.units for slot in _slots(spec, unit, unit.branch)]
    block.own(fill(slots, spec, device, layer_source(seed, layer, device)))
    return block


def layer_source(seed: int, layer: int, device: torch.device) -> torch.Generator:
    """What the weights of a layer are drawn from."""
    return generator(device, seed, "layer", layer)


def _slots(spec: StackSpec, module: nn.Module, branch: Branch | None) -> Iterator[Slot]:
    """Every parameter below `module`, with the scale of its draw."""
    roles = {part: name for name, part in branch.named_children()} if branch else {}
    for part in module.modules():
        if isinstance(part, Linear | Conv3x3):
            role = roles.get(part)
            feeds = branch is not None and role in branch.feeds_activation
            output = branch is not None and role == branch.output
            shape = part.shapes["weight"]
            std = weight_std(spec, shape, feeds=feeds, output=output)
            yield Slot(part, "weight", shape, std, matrix=True)
            if "bias" in part.shapes:
                yield Slot(part, "bias", part.shapes["bias"], bias_std(spec, fans(shape)[0]))
        elif isinstance(part, Norm):
            for name, size in part.shapes.items():
                yield Slot(part, name, size, None, float(name == "weight"))


def build_stack(spec: StackSpec, seed: int, device: torch.device) -> list[Block]:
    """All layers, resident."""
    blocks = [build_block(spec, seed, layer, device) for layer in range(1, spec.depth + 1)]
    for block in blocks:
        for unit in block.units:
            unit.note_norms()
    return blocks


def stream_shape(spec: StackSpec) -> tuple[int, ...]:
    """Shape of y_0 ... y_D."""
    batch = int(spec.batch_size or 1)
    return {
        "vectors": (batch, spec.width),
        "tokens": (batch, int(spec.seq_len or 1), spec.width),
        "images": (batch, spec.width, int(spec.image_size or 1), int(spec.image_size or 1)),
    }[spec.kind.domain]


def input_batch(spec: StackSpec, seed: int, device: torch.device) -> Tensor:
    """y_0: independent standard normal elements."""
    return _normal(spec, stream_shape(spec), generator(device, seed, "input"))


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
        self.norm = make_norm(spec) if spec.norm == "pre" else nn.Identity()
        self.project = Linear(spec.width, spec.classes)
        fill(list(_slots(spec, self, None)), spec, device, generator(device, seed, "head"))
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
    return LOSSES[spec.loss](spec, seed, device)
