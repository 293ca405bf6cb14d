"""Statistics of tensors with an axis of seeds in front: every sum is one number per seed."""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.reductions import Sums


def forward_sums(y: Tensor, *, tokens: bool) -> Sums:
    """As `stats.forward_sums`, each (seeds,), of y (seeds, batch, ...)."""
    wide = y.detach().double()
    norms, lengths = _lengths(wide if tokens else wide.flatten(2))
    flat = y.detach().flatten(1)
    return {
        "y_norm": _norm(norms),
        "y_length": _norm(lengths),
        "low": flat.amin(1),
        "high": flat.amax(1),
    }


def gradient_sums(g: Tensor) -> Sums:
    """As `stats.gradient_sums`, each (seeds,), of g (seeds, batch, ...)."""
    norms, lengths = _lengths(g.double().flatten(2))
    return {
        "grad_norm": _norm(norms),
        "g_length": lengths,
        "nonzero": torch.count_nonzero(g.flatten(1), dim=1),
        "nonfinite": _nonfinite(g),
    }


def part_sums(skip: Tensor, branch: Tensor) -> Sums:
    """As `stats.part_sums`, each (seeds,)."""
    s, b = skip.double().flatten(1), branch.double().flatten(1)
    pairs = {"skip_sq": (s, s), "branch_sq": (b, b), "cross": (s, b)}
    return {name: torch.linalg.vecdot(one, other) for name, (one, other) in pairs.items()}


def grad_norm(d: Tensor) -> tuple[Tensor, Tensor]:
    """As `stats.grad_norm`, each (seeds,)."""
    return norms(d), _nonfinite(d)


def norms(x: Tensor) -> Tensor:
    """Euclidean norms (seeds,), accumulated in float64."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)


def _lengths(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the rows, and lengths of their resultants, as in `stats`."""
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    resultants = lengths.reciprocal().unsqueeze(-2) @ rows
    return lengths, torch.linalg.vector_norm(resultants, dim=(-2, -1))


def _nonfinite(x: Tensor) -> Tensor:
    return torch.count_nonzero((x - x).flatten(1), dim=1)
