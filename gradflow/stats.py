"""Statistics of activations and gradients in two steps: reduce on the device, finish on the host.

During a pass each tensor is reduced to a few float64 sums that stay on its device; nothing waits
for the device, and there are as few operations as possible, because each costs as much as a small
matrix product. After the pass the sums of all units come to the host at once and are
finished together, as vectors over the units. Every norm accumulates in float64 and drops no value:
a NaN or an infinity in the tensor is one in the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Sums = dict[str, Tensor | float]
Numbers = dict[str, Tensor]

ACTIVATIONS = ("act_rms", "act_max_abs", "act_cos")
PART_SUMS = ("skip_sq", "branch_sq", "cross")
GAINS = ("gain", "skip_gain", "branch_gain", "skip_branch_cos")


# vector_norm converts and adds element by element; converting first lets BLAS add, which is
# faster on CPU from here on. On CUDA the fused kernel wins, and needs no room.
_BLAS_FROM = 1 << 15


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over all elements, accumulated in float64; 0-d."""
    if x.device.type == "cpu" and x.numel() >= _BLAS_FROM:
        wide = x.reshape(-1).double()
        return torch.dot(wide, wide).sqrt()
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _lengths(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of float64 rows (..., n, features), and the lengths (...) of their resultants.

    A resultant is the sum of the unit rows. Where a row has no direction its length is NaN.
    """
    norms = torch.linalg.vector_norm(rows, dim=-1)
    resultants = norms.reciprocal().unsqueeze(-2) @ rows
    return norms, torch.linalg.vector_norm(resultants, dim=(-2, -1))


def mean_cosine(lengths: Tensor, count: int) -> Tensor:
    """Mean cosine over all pairs of `count` different unit vectors u_i with |sum u_i| = length.

    mean over i != j of u_i . u_j = (|sum u_i|^2 - n) / (n (n - 1)), which needs no n x n matrix.

    """
    return (lengths.square() - count) / (count * (count - 1))


def forward_sums(y: Tensor, *, tokens: bool) -> Sums:
    """Sums behind `act_rms`, `act_max_abs` and `act_cos` of the output y of a unit.

    Args:
        y: (batch, tokens, features), or (batch, ...) where the stream has no tokens.
        tokens: cosines between the tokens of a sample, else between samples.
    """
    norms, lengths = _lengths((y if tokens else y.flatten(1)).double())
    low, high = torch.aminmax(y)
    return {"y_norms": norms, "y_lengths": lengths, "low": low, "high": high}


def stack_sums(sums: Sequence[Sums]) -> Numbers:
    """Sums of units of one shape, stacked on axis 0."""
    return {n: torch.stack([torch.as_tensor(each[n]) for each in sums]) for n in sums[0]}


def forward_stats(sums: Numbers, numel: int) -> Numbers:
    """`act_rms`, `act_max_abs`, `act_cos` from `forward_sums` of units stacked on axis 0."""
    norms, count = sums["y_norms"], sums["y_norms"].shape[-1]
    numbers = {
        "act_rms": (norms.flatten(1).square().sum(1) / numel).sqrt(),
        "act_max_abs": torch.maximum(-sums["low"], sums["high"]),
    }
    if count > 1:
        cosines = mean_cosine(sums["y_lengths"], count)
        numbers["act_cos"] = cosines.reshape(len(cosines), -1).mean(1)
    return numbers


def gradient_sums(g: Tensor) -> Sums:
    """Sums behind `grad_norm`, `nonfinite`, `zero_fraction`, `grad_cos` of g (batch, ...)."""
    norms, length = _lengths(g.flatten(1).double())
    size = torch.linalg.vector_norm(norms)
    return {
        "grad_norm": size,
        "g_lengths": length,
        "nonzero": torch.count_nonzero(g),
        "nonfinite": count_nonfinite(g, size),
    }


def gradient_stats(sums: Numbers, shape: torch.Size) -> Numbers:
    """The columns from `gradient_sums` of units stacked on axis 0; cosines between samples."""
    numbers = {
        "grad_norm": sums["grad_norm"],
        "nonfinite": sums["nonfinite"],
        "zero_fraction": 1 - sums["nonzero"] / shape.numel(),
    }
    if shape[0] > 1:
        numbers["grad_cos"] = mean_cosine(sums["g_lengths"], shape[0])
    return numbers


def count_nonfinite(x: Tensor, size: Tensor) -> Tensor | float:
    """Number of NaN and infinite elements; `size` is the norm of `x`.

    A finite norm proves that there are none, which saves the pass where reading it is free.
    x - x is 0 exactly where x is finite, and costs a fifth of `isfinite`.
    """
    if x.device.type == "cpu" and math.isfinite(size.item()):
        return 0.0
    return torch.count_nonzero(x - x)


def grad_norm(d: Tensor) -> tuple[Tensor, Tensor | float]:
    """Norm and non-finite count of one parameter's gradient."""
    size = norm(d)
    return size, count_nonfinite(d, size)


def part_sums(skip: Tensor, branch: Tensor) -> Sums:
    """Sums behind the two parts of a gain: dL/dx through the shortcut and through the branch."""
    s, b = skip.reshape(-1).double(), branch.reshape(-1).double()
    return {"skip_sq": torch.dot(s, s), "branch_sq": torch.dot(b, b), "cross": torch.dot(s, b)}


def part_stats(sums: Numbers, below: Tensor, above: Tensor) -> Numbers:
    """The gains of units, with gain^2 = skip^2 + branch^2 + 2 cos skip branch.

    Args:
        sums: `part_sums` of the units stacked on axis 0; empty where units are plain.
        below: norms of dL/dx.
        above: norms of dL/dy.
    """
    gain = below / above
    if not sums:
        return {"gain": gain, "skip_gain": torch.zeros_like(gain), "branch_gain": gain}
    skip, branch = sums["skip_sq"].sqrt(), sums["branch_sq"].sqrt()
    return {
        "gain": gain,
        "skip_gain": skip / above,
        "branch_gain": branch / above,
        "skip_branch_cos": sums["cross"] / (skip * branch),
    }
