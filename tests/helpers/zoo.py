"""Odd models: what people's code does to a tool that watches it.

Each entry builds a model and calls it on one input until there is a loss. All are small, and
every one has a loss that at least one parameter takes part in.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6
Call = Callable[[nn.Module, Tensor], Tensor]


class Residual(nn.Module):
    """y = x + tanh(Wx)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class InPlace(Residual):
    """x += f(x), on the very tensor that the layer was given."""

    def forward(self, x: Tensor) -> Tensor:
        x += torch.tanh(self.linear(x * 2))
        return x


class InPlaceReLU(nn.Sequential):
    """The usual convolution idiom."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))


class Tuple(Residual):
    """A cache comes back beside the stream, before it and of another shape."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y.mean(0), y


Pair = namedtuple("Pair", ["weights", "hidden"])


class NamedTuple(Residual):
    """A named tuple, the stream last."""

    def forward(self, x: Tensor) -> Pair:
        y = super().forward(x)
        return Pair(y.sum(-1), y)


class Dict(Residual):
    """A dictionary."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = super().forward(x)
        return {"attention": y.detach() * 0, "hidden_states": y}


@dataclass
class Output:
    """What libraries return."""

    loss: Tensor | None
    hidden_states: Tensor


class Dataclass(Residual):
    """A dataclass with an empty field."""

    def forward(self, x: Tensor) -> Output:
        return Output(None, super().forward(x))


def stream(value: object) -> Tensor:
    """What the next layer takes of what one returns."""
    if isinstance(value, Pair):
        return value.hidden
    if isinstance(value, tuple):
        return value[1]
    if isinstance(value, dict):
        return value["hidden_states"]
    return value.hidden_states if isinstance(value, Output) else value


class Chain(nn.Module):
    """Layers one after the other, whatever they return."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = stream(block(x))
        return x


class Keywords(Chain):
    """Layers are called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x=x)
        return x


class Recursive(Chain):
    """One layer, run three times."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.blocks[0](x)
        return x


class Inner(nn.Module):
    """Holds one block, and runs it three times."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList([Residual()])
        self.steps = nn.Embedding(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.groups[0](x + self.steps.weight[i])
        return x


class Universal(nn.Module):
    """One block for all steps, deep inside; a part that the loss does not see comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder = nn.Linear(WIDTH, WIDTH), Inner()
        self.pooler = nn.Sequential(nn.Linear(WIDTH, 2), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.first(x))
        self.pooler(y)
        return y


class LoopedStack(nn.Module):
    """Two blocks, run through twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Residual(), Residual())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.blocks(x))
        return y


class Checkpointed(Chain):
    """Layers are run again in backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Reentrant(Checkpointed):
    """The old checkpoint, whose first run has no graph."""

    reentrant = True


class Skipping(Chain):
    """Stochastic depth: the second layer is left out."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = x if i == 1 else block(x)
        return x


class Experts(nn.Module):
    """A router sends each sample to one of four experts; some get none, and none is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        chosen = scores.argmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if i != 2:
                y = y.index_put((mine,), expert(x[mine]) * scores[mine, i : i + 1])
        return y


class Recurrent(nn.Module):
    """A cell over the time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(3):
            state = self.cell(x, state)
        return self.head(state)


class Lstm(nn.Module):
    """Layers that return (output, (h, c))."""

    def __init__(self) -> None:
        super().__init__()
        self.rnns = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1).repeat(1, 4, 1)
        for rnn in self.rnns:
            x, _ = rnn(x)
        return x


class BasicBlock(nn.Module):
    """Convolution, batch norm, in-place ReLU, shortcut."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += self.down(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Stages of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 8), BasicBlock(8, 8))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        images = x.unsqueeze(1).unsqueeze(-1).repeat(1, 1, 1, 5)
        return self.pool(self.layer2(self.layer1(self.stem(images))))


class UNet(nn.Module):
    """Outputs are used twice, and shapes change."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, 3)
        self.bottom = nn.Linear(3, 3)
        self.up = nn.Linear(3 + 3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.tanh(self.down(x))
        return self.up(torch.cat([low, self.bottom(low)], -1))


class Cross(nn.Module):
    """y = x + tanh(Wx + Vm)."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + torch.tanh(self.own(x) + self.other(memory))


class EncoderDecoder(nn.Module):
    """Two stacks; every decoder layer looks at the encoder's output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Residual() for _ in range(2))
        self.decoder = nn.ModuleList(Cross() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        memory = x
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            x = layer(x, memory)
        return x


class Words(nn.Module):
    """Whole numbers go in; the head is tied to the embedding."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH, sparse=sparse)
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.head = nn.Linear(WIDTH, 9, bias=False)
        if not sparse:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed((x * 3).long().abs() % 9)
        for block in self.blocks:
            y = block(y)
        return self.head(y)


class Complex(nn.Module):
    """A complex stream."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.complex64) for _ in range(3)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.complex(x, x.flip(-1)).to(torch.complex64)
        for layer in self.layers:
            y = layer(y)
        return y.abs()


class Branching(nn.Module):
    """One branch is detached, one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.side, self.unused = Residual(), Residual(), Residual()
        self.last = Residual()

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        return self.last(y + self.side(y).detach())


class Raising(Chain):
    """A layer raises inside, and the model goes on without it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            try:
                x = block(x)
            except ValueError:
                continue
        return x


class Fails(Residual):
    """Raises after its own layer has run."""

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x)
        raise ValueError("on purpose")


class Vector(nn.Module):
    """The stream has a single axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x[0]
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class ViewInPlace(Residual):
    """Writes into a part of its input."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] += self.linear(x * 2)[:, 0].tanh()
        return x


def chain(kind: Callable[[], nn.Module], outer: type[Chain] = Chain, depth: int = 3) -> Chain:
    """A chain of fresh layers of one kind."""
    return outer(*(kind() for _ in range(depth)))


def shared() -> nn.Module:
    """One layer listed three times."""
    layer = Residual()
    return Chain(layer, layer, layer)


def frozen_half() -> nn.Module:
    """The lower layers take no gradient."""
    model = chain(Residual, depth=4)
    for module in (model.first, model.blocks[0], model.blocks[1]):
        module.requires_grad_(requires_grad=False)
    return model


def tied() -> nn.Module:
    """Two layers share a weight."""
    model = chain(Residual)
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    return model


def square(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that weighs every element otherwise."""
    return loss_of(model(x))


def loss_of(y: Tensor) -> Tensor:
    """sum_i cos(i) |y_i|^2, which no norm makes constant."""
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().to(y.abs().dtype)
    return (y.abs().square() * weights.view(y.shape)).sum()


def direct(model: nn.Module, x: Tensor) -> Tensor:
    """`forward` is called by itself: the model's own hooks are skipped."""
    return loss_of(model.forward(x))


def siamese(model: nn.Module, x: Tensor) -> Tensor:
    """Two passes, then one backward."""
    return (model(x) - model(x.flip(0))).square().mean()


@dataclass(frozen=True)
class Animal:
    """A model, how it is called, and how many rows it has below the input."""

    make: Callable[[], nn.Module]
    rows: int
    call: Call = square


def encoder_layer() -> nn.Module:
    """The layer with a fast path in evaluation."""
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True)


ZOO: dict[str, Animal] = {
    "chain": Animal(lambda: chain(Residual), 3),
    "plain mlp": Animal(lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))), 4),
    "mlp with activations": Animal(
        lambda: nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, 2)), 3
    ),
    "in-place residual": Animal(lambda: chain(InPlace), 3),
    "in-place relu": Animal(lambda: chain(InPlaceReLU), 3),
    "in-place view": Animal(lambda: chain(ViewInPlace), 3),
    "tuple": Animal(lambda: chain(Tuple), 3),
    "named tuple": Animal(lambda: chain(NamedTuple), 3),
    "dict": Animal(lambda: chain(Dict), 3),
    "dataclass": Animal(lambda: chain(Dataclass), 3),
    "keywords": Animal(lambda: chain(Residual, Keywords), 3),
    "shared": Animal(shared, 3),
    "recursive": Animal(lambda: chain(Residual, Recursive, depth=1), 3),
    "universal": Animal(Universal, 3),
    "looped stack": Animal(LoopedStack, 4),
    "checkpoint": Animal(lambda: chain(Residual, Checkpointed), 3),
    "reentrant checkpoint": Animal(lambda: chain(Residual, Reentrant), 3),
    "skipped layer": Animal(lambda: chain(Residual, Skipping), 2),
    "experts": Animal(Experts, 2),  # one is not run, one gets no sample
    "gru cell": Animal(Recurrent, 4),
    "lstm": Animal(Lstm, 3),
    "resnet": Animal(ResNet, 4),
    "unet": Animal(UNet, 3),
    "encoder and decoder": Animal(EncoderDecoder, 4),
    "words, tied": Animal(Words, 2),
    "words, sparse": Animal(lambda: Words(sparse=True), 2),
    "complex": Animal(Complex, 3),
    "branching": Animal(Branching, 3),
    "raising": Animal(lambda: Raising(Residual(), Fails(), Residual()), 2),
    "vector": Animal(Vector, 3),
    "frozen half": Animal(frozen_half, 4),
    "tied weights": Animal(tied, 3),
    "identity layers": Animal(lambda: Chain(nn.Sequential(), Residual(), nn.Identity()), 4),
    "dropout": Animal(lambda: nn.Sequential(Residual(), nn.Dropout(0.5), Residual()), 3),
    "direct forward": Animal(lambda: chain(Residual), 3, call=direct),
    "siamese": Animal(lambda: chain(Residual), 3, call=siamese),
    "fast path": Animal(lambda: chain(encoder_layer), 3),
    "one layer": Animal(lambda: nn.Linear(WIDTH, WIDTH), 1),
}
