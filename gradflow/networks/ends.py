"""The two ends of a stack: its input batch y_0, and the loss of its output y_D.

The loss reads several streams out first, where the scheme has them.
"""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.networks.blocks import PHI, Linear
from gradflow.networks.checkpoint import embed, load_head
from gradflow.networks.initial import fill, generator, module_slots
from gradflow.networks.norms import stream_norm, unit_norm
from gradflow.schemes import READOUTS
from gradflow.specs.stack import StackSpec


def stream_shape(spec: StackSpec) -> tuple[int, ...]:
    """Return the shape of y_0 ... y_D, of one stream."""
    batch = spec.batch_size
    return {
        "vectors": (batch, spec.width),
        "tokens": (batch, spec.tokens, spec.width),
        "images": (batch, spec.width, spec.side, spec.side),
    }[spec.kind.domain]


def state_shape(spec: StackSpec, layer: int, unit: int) -> tuple[int, ...]:
    """Return the shape of the output of unit number `unit` (from 0) of layer `layer` (from 1)."""
    batch, *rest = stream_shape(spec)
    streams = spec.streams(layer, unit)
    return (batch, *rest) if streams == 1 else (batch, streams, *rest)


def input_shape(spec: StackSpec, layer: int, unit: int) -> tuple[int, ...]:
    """Return the shape of the input of unit number `unit` (from 0) of layer `layer` (from 1)."""
    if (layer, unit) == (1, 0):
        return stream_shape(spec)
    before = (layer, unit - 1) if unit else (layer - 1, spec.units_per_block - 1)
    return state_shape(spec, *before)


def input_batch(spec: StackSpec, seed: int, device: torch.device) -> Tensor:
    """Return y_0: standard normal elements, scaled or normalised as the scheme has it.

    The input of a trained checkpoint is the embeddings of random tokens, so that the stream has its
    trained scale.
    """
    if spec.weights:
        rows = embed(spec.checkpoint, token_ids(spec, seed)[:, :-1], spec.width)
        return rows.to(device, getattr(torch, spec.dtype))
    x = standard_normal(spec, stream_shape(spec), generator(device, seed, "input"))
    return scaled_input(spec, x).detach()


def token_ids(spec: StackSpec, seed: int) -> Tensor:
    """Return uniform random tokens, (B, T + 1): the inputs and, one on, what comes next."""
    shape = (spec.batch_size, spec.tokens + 1)
    source = generator(torch.device("cpu"), seed, "tokens")
    return torch.randint(spec.classes, shape, generator=source)


def scaled_input(spec: StackSpec, x: Tensor) -> Tensor:
    """Return x scaled or normalised as the scheme has it."""
    if spec.scheme is None:
        return x
    scale = spec.scheme_record.input_scale(spec.depth)
    return _normalised_input(spec, x if scale == 1 else x * scale)


def _normalised_input(spec: StackSpec, x: Tensor) -> Tensor:
    if spec.scheme_record.input_norm == "unit":
        return unit_norm(x)
    if spec.scheme_record.input_norm is None:
        return x
    norm = stream_norm(spec)
    fill(module_slots(spec, norm), spec, x.device, generator(x.device, 0, "input norm"))
    return norm.requires_grad_(False)(x)


def standard_normal(spec: StackSpec, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Return standard normal elements in the number format of the spec."""
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
        self.target = standard_normal(spec, stream_shape(spec), generator(device, seed, "target"))

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
        self.norm = stream_norm(spec) if spec.has_final_norm else nn.Identity()
        active = spec.scheme is not None and spec.scheme_record.final_activation
        self.phi = PHI[spec.activation if active else "linear"]
        self.project = Linear(spec.width, spec.classes)
        _fill_all(self, spec, device, generator(device, seed, "head"))
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


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, through a checkpoint's own final norm and head.

    Token ids are random, and the labels are the tokens that come next: the loss is that of the
    model on text without any order.
    """

    def __init__(self, spec: StackSpec, seed: int, device: torch.device) -> None:
        super().__init__()
        self.norm = stream_norm(spec)
        self.project = Linear(spec.width, spec.classes, bias=False)
        _fill_all(self, spec, device, generator(device, seed, "head"))
        load_head(spec.checkpoint, self.norm, self.project)
        self.labels = token_ids(spec, seed)[:, 1:].flatten().to(device)

    def forward(self, y: Tensor) -> Tensor:
        return F.cross_entropy(self.project(self.norm(y)).flatten(0, 1), self.labels)


def _fill_all(
    module: nn.Module, spec: StackSpec, device: torch.device, source: torch.Generator
) -> None:
    """Give the parameters of a module and of all its parts their values."""
    fill(
        (slot for part in module.modules() for slot in module_slots(spec, part)),
        spec,
        device,
        source,
    )


_LOSSES: dict[str, type[nn.Module]] = {
    "cotangent": CotangentLoss,
    "mse": MseLoss,
    "ce": CrossEntropyLoss,
}


class ReduceStreams(nn.Module):
    """A readout without parameters: the first stream, the last, the sum or the mean of all.

    x: (B, n, T, d), the output (B, T, d).
    """

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.reduce = _REDUCTIONS[str(spec.readout)]

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(x)


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
}


class ReadoutLoss(nn.Module):
    """loss(readout(state)), where the last state has several streams.

    A final norm of the loss comes after the readout.
    """

    def __init__(self, readout: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.readout, self.loss = readout, loss

    def forward(self, state: Tensor) -> Tensor:
        return self.loss(self.readout(state))


def build_loss(spec: StackSpec, seed: int, device: torch.device) -> nn.Module:
    """Return the map from y_D to the scalar loss, with the weights of this seed."""
    if spec.weights and spec.loss == "ce":
        return NextTokenLoss(spec, seed, device)
    loss = _LOSSES[spec.loss](spec, seed, device)
    if spec.readout is None:
        return loss
    readout = resolve_name(READOUTS[spec.readout].implementation)(spec)
    _fill_all(readout, spec, device, generator(device, seed, "readout"))
    return ReadoutLoss(readout, loss)
