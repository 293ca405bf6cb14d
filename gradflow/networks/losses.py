"""From the output of a stack to a scalar: the losses, and the readout of several streams."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.networks.blocks import PHI, Linear
from gradflow.networks.initial import fill, generator
from gradflow.networks.inputs import normal, stream_shape
from gradflow.networks.language import NextTokenLoss
from gradflow.networks.norms import norm_of_kind
from gradflow.networks.readouts import READOUTS
from gradflow.networks.slots import module_slots
from gradflow.specs.stack import StackSpec


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
        self.target = normal(spec, stream_shape(spec), generator(device, seed, "target"))

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
        active = spec.scheme is not None and spec.scheme_record.final_activation
        self.phi = PHI[spec.activation if active else "linear"]
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
