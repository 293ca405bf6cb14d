"""Initial weights: one draw from one generator fills a whole block.

A block's parameters are views of one flat buffer. The weights (and the biases, where they are
random) come first and are filled by a single call; the rest is constant. Draws are made in float32
whatever the dtype, so the same seed means the same weights in every number format.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from gradflow.specs.stack import StackSpec

RECTIFIERS = ("relu", "gelu", "gelu-tanh", "silu")


@dataclass(frozen=True)
class Slot:
    """One parameter that waits for its values.

    Attributes:
        owner: the module that will hold it.
        name: its name there.
        shape: its sizes.
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


def generator_seed(seed: int, purpose: str, index: int = 0) -> int:
    """32 bits for `torch.Generator`: different for every index of one seed and purpose.

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
    """A generator of its own for one purpose, independent of torch's global one."""
    source = torch.Generator(device)
    source.manual_seed(generator_seed(seed, purpose, index))
    return source


def weight_std(spec: StackSpec, shape: tuple[int, ...], *, feeds: bool, output: bool) -> float:
    """Standard deviation of a weight matrix (half-width for `--init torch`, which is uniform).

    Args:
        spec: `init`, `gain`, `weight_var` and `activation` decide.
        shape: (out, in) or (out, in, height, width); fan_in counts the kernel's positions.
        feeds: whether its output goes into the activation.
        output: whether it is the last matrix of a branch of two or more.

    he: He et al. 2015 (arXiv:1502.01852), variance 2/fan_in before a rectifier, else 1/fan_in.
    xavier: Glorot & Bengio 2010, 2/(fan_in + fan_out). lecun: LeCun et al. 1998, 1/fan_in.
    gpt2: Radford et al. 2019, N(0, 0.02), output projections over sqrt(residual units).
    normal: N(0, 0.02).
    """
    fan_in, fan_out = fans(shape)
    if spec.weight_var is not None:
        return spec.gain * math.sqrt(spec.weight_var / fan_in)
    if spec.init == "gpt2":
        depth = spec.depth * spec.units_per_block
        return spec.gain * 0.02 / (math.sqrt(depth) if output else 1.0)
    if spec.init == "normal":
        return spec.gain * 0.02
    rectified = feeds and spec.activation in RECTIFIERS
    variance = {
        "he": (2.0 if rectified else 1.0) / fan_in,
        "orthogonal": (2.0 if rectified else 1.0) / fan_in,
        "xavier": 2.0 / (fan_in + fan_out),
        "lecun": 1.0 / fan_in,
        "torch": 1.0 / fan_in,
    }[str(spec.init)]
    return spec.gain * math.sqrt(variance)


def bias_std(spec: StackSpec, fan_in: int) -> float | None:
    """Scale of a bias draw (see `weight_std`); None where biases start at 0."""
    if spec.bias_var is not None:
        # U(-1, 1) has variance 1/3.
        return math.sqrt(spec.bias_var * (3 if is_uniform(spec) else 1)) or None
    return 1 / math.sqrt(fan_in) if is_uniform(spec) else None


def is_uniform(spec: StackSpec) -> bool:
    """Whether weights are uniform: torch's own layers draw U(-1, 1) / sqrt(fan_in)."""
    return spec.init == "torch" and spec.weight_var is None


class Weights:
    """The parameters of some slots: views of one flat buffer that one draw fills, time and again.

    Args:
        slots: each gets its parameter here.
        spec: rule and scale of the draw.
        device: where the buffer lies.

    Attributes:
        flat: the buffer.
    """

    def __init__(self, slots: Sequence[Slot], spec: StackSpec, device: torch.device) -> None:
        drawn = [slot for slot in slots if slot.std is not None]
        fixed = [slot for slot in slots if slot.std is None]
        sizes = [math.prod(slot.shape) for slot in drawn + fixed]
        self.flat = torch.empty(sum(sizes), dtype=getattr(torch, spec.dtype), device=device)
        views = [
            part.view(slot.shape)
            for slot, part in zip(drawn + fixed, torch.split(self.flat, sizes), strict=True)
        ]
        for slot, view in zip(drawn + fixed, views, strict=True):
            setattr(slot.owner, slot.name, nn.Parameter(view))
        # Brought to the device once: to copy them from the host at each draw would wait for it.
        starts = [_on(device, slot.constant) for slot in fixed]
        self._fixed = list(zip(views[len(drawn) :], starts, strict=True))
        self._spec = spec
        stds = [slot.std for slot in slots if slot.std is not None]
        self._drawn = list(zip(views[: len(drawn)], drawn, stds, strict=True))
        self._numbers = self.flat[: sum(sizes[: len(drawn)])]

    def draw(self, source: torch.Generator) -> None:
        """New values, by one call of the generator; constants as they were, whatever moved them.

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


def _on(device: torch.device, start: float | Tensor) -> float | Tensor:
    return start.to(device) if isinstance(start, Tensor) else start


def fill(
    slots: Sequence[Slot], spec: StackSpec, device: torch.device, source: torch.Generator
) -> Weights:
    """Give every slot its parameter, with values from one draw."""
    weights = Weights(slots, spec, device)
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


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """fan_in and fan_out of a weight, the positions of a kernel counted."""
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel
