"""Statistics of activations and gradients in two steps: reduce on the device, finish on the host.

During a pass each tensor is reduced to a few float64 sums that stay on its device; nothing waits
for the device, and there are as few operations as possible, because each costs as much as a small
matrix product. After the pass the sums of all units come to the host at once and are
finished together, as vectors over the units. Every norm accumulates in float64 and drops no value:
a NaN or an infinity in the tensor is one in the norm.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Sums of one unit by name, 0-d on the device or on the host.
ReducedSums = dict[str, Tensor | float]
# Numbers of several units by name, one for each unit on axis 0.
StatVectors = dict[str, Tensor]

# Tensors up to this size become float64 in one buffer that is used again and again: allocating each
# anew would leave holes between the tensors that autograd keeps, and cost page faults.
_SCRATCH = 1 << 18

PART_SUMS = ("skip_sq", "branch_sq", "cross")


def is_at_hand(x: Tensor) -> bool:
    """Whether the numbers of x can be read without waiting for a device."""
    return x.device.type == "cpu"


_local = threading.local()


def _wide(x: Tensor, use: str) -> Tensor:
    """x in float64. The next call of the same use on this thread may overwrite it."""
    if x.device.type != "cpu" or x.numel() > _SCRATCH or x.dtype == torch.float64:
        return x.detach().double()
    buffer: Tensor | None = getattr(_local, use, None)
    if buffer is None:
        buffer = torch.empty(_SCRATCH, dtype=torch.float64)
        setattr(_local, use, buffer)
    return buffer[: x.numel()].view(x.shape).copy_(x.detach())  # no graph enters the buffer


# vector_norm converts and adds element by element; converting first lets BLAS add, which is
# faster on CPU from here on. On CUDA the fused kernel wins, and needs no room.
_BLAS_FROM = 1 << 15


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm over all elements, 0-d, accumulated in float64."""
    if x.device.type == "cpu" and x.numel() >= _BLAS_FROM:
        wide = _wide(x.reshape(-1), "vector")
        return torch.dot(wide, wide).sqrt()
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _lengths(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of float64 rows (..., n, features), and the lengths (...) of their resultants.

    A resultant is the sum of the unit rows. Where a row has no direction its length is NaN.
    """
    norms = torch.linalg.vector_norm(rows, dim=-1)
    resultants = norms.reciprocal().unsqueeze(-2) @ rows
    return norms, torch.linalg.vector_norm(resultants, dim=(-2, -1))


def mean_cosine(square: Tensor, count: Tensor | int) -> Tensor:
    """Return the mean cosine over all pairs of `count` unit vectors u_i, square = |sum u_i|^2.

    mean over i != j of u_i . u_j = (|sum u_i|^2 - n) / (n (n - 1)), which needs no n x n matrix.
    Not finite for a single vector, which has no pairs.
    """
    return (square - count) / (count * (count - 1))


def forward_sums(y: Tensor, *, tokens: bool) -> ReducedSums:
    """Reduce the output y of a unit to the sums that `forward_stats` takes.

    Args:
        y: (batch, ..., tokens, features), or (batch, ...) where the stream has no tokens.
        tokens: cosines between the tokens of a sample, else between samples.
    """
    norms, lengths = _lengths(_wide(y if tokens else y.flatten(1), "vector"))
    low, high = torch.aminmax(y)
    size, length = torch.linalg.vector_norm(norms), torch.linalg.vector_norm(lengths)
    return {"y_norm": size, "y_length": length, "low": low, "high": high}


@dataclass(frozen=True)
class Counts:
    """Sizes of the outputs of several units, each (units,).

    Attributes:
        numel: elements of y.
        groups: groups of vectors between which cosines are taken: samples, or one group.
        vectors: vectors in a group: the tokens of a sample, or the samples.
        samples: samples in the batch.
    """

    numel: Tensor
    groups: Tensor
    vectors: Tensor
    samples: Tensor


def counts(shapes: Sequence[torch.Size], *, tokens: bool) -> Counts:
    """Return the sizes of units with outputs of these shapes."""
    rows = [
        (shape.numel(), shape[:-2].numel(), shape[-2], shape[0])
        if tokens
        else (shape.numel(), 1, shape[0], shape[0])
        for shape in shapes
    ]
    return Counts(*torch.tensor(rows, dtype=torch.float64).unbind(1))


def forward_stats(sums: StatVectors, count: Counts) -> StatVectors:
    """Return `act_rms`, `act_max_abs`, `act_cos` from `forward_sums` of several units.

    The cosine of a single vector is not finite.
    """
    return {
        "act_rms": sums["y_norm"] / count.numel.sqrt(),
        "act_max_abs": torch.maximum(-sums["low"], sums["high"]),
        "act_cos": mean_cosine(sums["y_length"].square() / count.groups, count.vectors),
    }


def gradient_sums(g: Tensor) -> ReducedSums:
    """Reduce a gradient g (batch, ...) to the sums that `gradient_stats` takes."""
    norms, length = _lengths(_wide(g.flatten(1), "vector"))
    size = torch.linalg.vector_norm(norms)
    return {
        "grad_norm": size,
        "g_length": length,
        "nonzero": torch.count_nonzero(g),
        "nonfinite": count_nonfinite(g, size),
    }


def gradient_stats(sums: StatVectors, count: Counts) -> StatVectors:
    """Return `grad_norm`, `nonfinite`, `zero_fraction`, `grad_cos` from several `gradient_sums`."""
    return {
        "grad_norm": sums["grad_norm"],
        "nonfinite": sums["nonfinite"],
        "zero_fraction": 1 - sums["nonzero"] / count.numel,
        "grad_cos": mean_cosine(sums["g_length"].square(), count.samples),
    }


def count_nonfinite(x: Tensor, size: Tensor) -> Tensor | float:
    """Return the number of NaN and infinite elements of x; `size` is the norm of x.

    A finite norm proves that there are none, which saves the pass where reading it is free.
    x - x is 0 exactly where x is finite, and costs a fifth of `isfinite`.
    """
    if is_at_hand(size) and math.isfinite(size.item()):
        return 0.0
    return torch.count_nonzero(x - x)


def grad_norm(d: Tensor) -> tuple[Tensor, Tensor | float]:
    """Return norm and non-finite count of the gradient d of one parameter."""
    size = norm(d)
    return size, count_nonfinite(d, size)


def part_sums(skip: Tensor, branch: Tensor) -> ReducedSums:
    """Reduce dL/dx through the shortcut and through the branch to the sums of `part_stats`."""
    s, b = _wide(skip.reshape(-1), "vector"), _wide(branch.reshape(-1), "other")
    return {"skip_sq": torch.dot(s, s), "branch_sq": torch.dot(b, b), "cross": torch.dot(s, b)}


def part_stats(sums: StatVectors, below: Tensor, above: Tensor) -> StatVectors:
    """Return the gains of several units: gain^2 = skip^2 + branch^2 + 2 cos skip branch.

    Args:
        sums: `part_sums` of the units.
        below: norms of dL/dx, (units,).
        above: norms of dL/dy, (units,).
    """
    skip, branch = sums["skip_sq"].sqrt(), sums["branch_sq"].sqrt()
    return {
        "gain": below / above,
        "skip_gain": skip / above,
        "branch_gain": branch / above,
        "skip_branch_cos": sums["cross"] / (skip * branch),
    }


class SeedReductions:
    """The reductions for several seeds at once: tensors (seeds, ...), every sum (seeds,)."""

    @staticmethod
    def forward_sums(y: Tensor, *, tokens: bool) -> ReducedSums:
        """Reduce outputs y (seeds, batch, ...), as `forward_sums` reduces those of one seed."""
        wide, flat = y.detach().double(), y.detach().flatten(1)
        norms, lengths = _lengths(wide if tokens else wide.flatten(2))
        size, length = _norm_per_seed(norms), _norm_per_seed(lengths)
        return {"y_norm": size, "y_length": length, "low": flat.amin(1), "high": flat.amax(1)}

    @staticmethod
    def gradient_sums(g: Tensor) -> ReducedSums:
        """Reduce gradients g (seeds, batch, ...), as `gradient_sums` reduces those of one seed."""
        norms, length = _lengths(g.double().flatten(2))
        return {
            "grad_norm": _norm_per_seed(norms),
            "g_length": length,
            "nonzero": torch.count_nonzero(g.flatten(1), dim=1),
            "nonfinite": _nonfinite_per_seed(g),
        }

    @staticmethod
    def part_sums(skip: Tensor, branch: Tensor) -> ReducedSums:
        """Reduce the two parts of dL/dx, each (seeds, batch, ...)."""
        s, b = skip.double().flatten(1), branch.double().flatten(1)
        pairs = {"skip_sq": (s, s), "branch_sq": (b, b), "cross": (s, b)}
        return {name: torch.linalg.vecdot(one, other) for name, (one, other) in pairs.items()}

    @staticmethod
    def grad_norm(d: Tensor) -> tuple[Tensor, Tensor]:
        """Return norm and non-finite count of a parameter's gradient d (seeds, ...)."""
        return SeedReductions.norms(d), _nonfinite_per_seed(d)

    @staticmethod
    def norms(x: Tensor) -> Tensor:
        """Return the Euclidean norm of each seed's part of x, accumulated in float64."""
        return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)


def _norm_per_seed(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)


def _nonfinite_per_seed(x: Tensor) -> Tensor:
    return torch.count_nonzero((x - x).flatten(1), dim=1)
