"""What a user's module may hold: models, batches, and mistakes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Layer(nn.Module):
    """y = x + tanh(Wx)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.f(x)
        return y


class Net(nn.Module):
    """An entry, layers and a head."""

    def __init__(self, depth: int = 3, width: int = WIDTH, classes: int = 4) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


@dataclass
class Output:
    """As libraries return it."""

    loss: Tensor
    logits: Tensor


class WithLoss(Net):
    """Has a loss of its own."""

    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        y = super().forward(x)
        return Output(y.square().sum(), y)


class Checkpointed(Net):
    """Runs its layers again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        y: Tensor = self.head(x)
        return y


def language(depth: int = 2, width: int = 8, symbols: int = 7) -> nn.Module:
    """Begins with an embedding."""
    layers = (Layer(width) for _ in range(depth))
    return nn.Sequential(nn.Embedding(symbols, width), *layers, nn.Linear(width, symbols))


def images(depth: int = 2) -> nn.Module:
    """Logits of three classes for images."""

    def layer() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

    layers = (layer() for _ in range(depth))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


def drawn_by_others() -> nn.Module:
    """Weights from numpy and from Python."""
    model = Net()
    with torch.no_grad():
        model.head.weight.fill_(np.random.rand() + random.random())  # noqa: NPY002
    return model


MODEL = Net()


def batches() -> list[Tensor]:
    """Two inputs."""
    return [torch.ones(2, WIDTH), torch.zeros(2, WIDTH)]


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    """Input and label; three of them, then no more."""
    source = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(16, WIDTH, generator=source)
        yield x, (x[:, 0] > 0).long()


def named() -> dict[str, Tensor]:
    """One batch by the name of its argument."""
    return {"x": torch.ones(2, WIDTH)}


def no_batches() -> list[Tensor]:
    """None."""
    return []


def breaks() -> nn.Module:
    """Does not run."""
    raise ValueError("it broke\nin many lines")


def number() -> int:
    """No model."""
    return 3


def says() -> nn.Module:
    """Prints while it is built."""
    print("hello")  # noqa: T201 (it is what is tested)
    return Net()


class Turning(Net):
    """A complex buffer, as in rotary positions."""

    turn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous())
        return super().forward(torch.view_as_real(pairs * self.turn).flatten(-2))


class Leaves(Net):
    """Ends the process where it is called."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
        raise SystemExit(7)


def changes_the_world() -> nn.Module:
    """Settings that others would find."""
    os.chdir("/")
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    return Net().float()


def uneven() -> list[tuple[Tensor, Tensor]]:
    """The last batch is smaller."""
    return [(torch.ones(n, WIDTH), torch.zeros(n).long()) for n in (4, 4, 2)]


def wide(x: Tensor) -> Tensor:
    """In double precision."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def lazy() -> nn.Module:
    """Sizes that follow from the first input."""
    layers = [nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*layers)


def dropping() -> nn.Module:
    """Random numbers in every pass, and averages that run along."""
    layers = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
        for _ in range(3)
    )
    return nn.Sequential(*layers)
