"""Initial weights: one draw from one generator fills a whole block.

A block's parameters are views of one flat buffer. The weights (and the biases, where they are
random) come first and are filled by a single call; the rest is constant. Draws are made in float32
whatever the dtype, so the same seed means the same weights in every number format.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from gradflow.specs.initial_variances import bias_std, fans, is_uniform, weight_std
from gradflow.specs.stack import StackSpec


@dataclass(frozen=True)
class Slot:
    """One parameter that waits for its values.

    Attributes:
        owner: the module that will hold it, as `name`.
        std: scale of the draw (standard deviation, or half-width if uniform); None = constant.
        constant: the value, or the values, of a parameter that is not drawn.
        matrix: whether an orthogonal rule applies to it.
    """

    owner: nn.Module
    name: str
    shape: tuple[int, ...]
    std: float | None
    constant: float | Tensor = 0.0
    matrix: bool = False


class Unfilled(nn.Module):
    """A module whose parameters hold nothing until `fill` gives them values.

    Torch's own layers draw from the global generator, and spend more on it than on a pass.

    Attributes:
        shapes: sizes of its own parameters, by name.
    """

    shapes: dict[str, tuple[int, ...]]


class Matrix(Unfilled):
    """A linear map: `weight` is drawn by the rule for matrices, `bias` by the rule for biases."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, *shape: int, bias: bool) -> None:
        super().__init__()
        self.shapes = {"weight": shape} | ({"bias": shape[:1]} if bias else {})
        self.bias = None


class ConstantStart(Unfilled):
    """A module whose parameters start at constants.

    Attributes:
        starts: for each parameter one number for all elements, or one for each.
    """

    starts: Mapping[str, float | Tensor]


def module_slots(
    spec: StackSpec, part: nn.Module, *, feeds: bool = False, output: bool = False, gain: float = 1
) -> Iterator[Slot]:
    """Yield the parameters of one module, those of its children aside; only `Unfilled` has any.

    `feeds` says whether its output goes into the activation, and `output` whether it is the output
    projection of a branch; `gain` multiplies the standard deviation of its matrix.
    """
    if spec.weights and isinstance(part, Unfilled):  # trained values replace them all
        for name, size in part.shapes.items():
            yield Slot(part, name, size, None)
    elif isinstance(part, Matrix):
        shape = part.shapes["weight"]
        std = gain * weight_std(spec, shape, feeds=feeds, output=output)
        yield Slot(part, "weight", shape, std, matrix=True)
        if "bias" in part.shapes:
            yield Slot(part, "bias", part.shapes["bias"], bias_std(spec, fans(shape)[0]))
    elif isinstance(part, ConstantStart):
        for name, size in part.shapes.items():
            yield Slot(part, name, size, None, part.starts[name])


def generator_seed(seed: int, purpose: str, index: int = 0) -> int:
    """Return 32 bits for `torch.Generator`, different for every index of one seed and purpose.

    Torch's CPU generator (mt19937) keeps only the low 32 bits of its seed, so these are mixed
    here: a bijection of (hash of seed and purpose) + index, which keeps neighbours apart.
    """
    x = (_hash(f"{purpose}:{seed}") + index) & 0xFFFFFFFF
    # The finaliser of MurmurHash3 (Appleby), a bijection on 32 bits.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@lru_cache
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def generator(device: torch.device, seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """Return a generator for one purpose, independent of torch's global one."""
    source = torch.Generator(device)
    source.manual_seed(generator_seed(seed, purpose, index))
    return source


class Weights:
    """The parameters of some slots: views of one buffer `flat` that one draw fills, time and again.

    Every slot gets its parameter here; the spec has the rule of the draw.
    """

    def __init__(self, slots: Sequence[Slot], spec: StackSpec, device: torch.device) -> None:
        drawn = [slot for slot in slots if slot.std is not None]
        fixed = [slot for slot in slots if slot.std is None]
        sizes = [math.prod(slot.shape) for slot in drawn + fixed]
        self.flat = torch.empty(sum(sizes), dtype=getattr(torch, spec.dtype), device=device)
        views = []
        for slot, part in zip(drawn + fixed, torch.split(self.flat, sizes), strict=True):
            views.append(part.view(slot.shape))
            setattr(slot.owner, slot.name, nn.Parameter(views[-1]))
        # Brought to the device once: to copy them from the host at each draw would wait for it.
        starts = [
            slot.constant.to(device) if isinstance(slot.constant, Tensor) else slot.constant
            for slot in fixed
        ]
        self._fixed = list(zip(views[len(drawn) :], starts, strict=True))
        self._spec = spec
        stds = [slot.std for slot in slots if slot.std is not None]
        self._drawn = list(zip(views[: len(drawn)], drawn, stds, strict=True))
        self._numbers = self.flat[: sum(sizes[: len(drawn)])]

    def draw(self, source: torch.Generator) -> None:
        """Draw new values by one call of the generator, and set the constants again.

        No graph that saved the old values can be used any more; autograd refuses it.
        """
        _draw(self._numbers, self._spec, source)
        for view, slot, std in self._drawn:
            if slot.matrix and self._spec.init == "orthogonal" and self._spec.weight_var is None:
                _orthogonalise(view)
            view.mul_(std)
        for view, start in self._fixed:
            if isinstance(start, Tensor):
                view.copy_(start)
            else:
                view.fill_(start)


def fill(
    slots: Iterable[Slot], spec: StackSpec, device: torch.device, source: torch.Generator
) -> Weights:
    """Give every slot its parameter, with values from one draw."""
    weights = Weights(list(slots), spec, device)
    weights.draw(source)
    return weights


def _draw(out: Tensor, spec: StackSpec, source: torch.Generator) -> None:
    wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    if is_uniform(spec):
        wide.uniform_(-1, 1, generator=source)
    else:
        wide.normal_(generator=source)
    if wide is not out:
        out.copy_(wide)


def _orthogonalise(weight: Tensor) -> None:
    """Replace a Gaussian matrix by the (semi-)orthogonal one of its QR, entries of variance 1.

    Saxe et al. 2014 (arXiv:1312.6120). Signs are fixed by R's diagonal, so Q is uniform (Haar).
    The scale sqrt(max(rows, columns)) makes the mean square entry 1, as in the draw it replaces.
    """
    matrix = weight.flatten(1).double()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r))
    q = q if tall is matrix else q.T
    weight.copy_((q * math.sqrt(max(matrix.shape))).reshape(weight.shape))
