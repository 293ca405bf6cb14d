"""Statistics of tensors with an axis of seeds in front: every sum is one number per seed."""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.reductions import ReducedSums


class SeedReductions:
    """The functions of `gradflow.reductions` for all seeds at once; every sum is (seeds,)."""

    @staticmethod
    def forward_sums(y: Tensor, *, tokens: bool) -> ReducedSums:
        """Reduce outputs y (seeds, batch, ...)."""
        wide = y.detach().double()
        lengths, resultants = _lengths(wide if tokens else wide.flatten(2))
        flat = y.detach().flatten(1)
        return {
            "y_norm": _norm(lengths),
            "y_length": _norm(resultants),
            "low": flat.amin(1),
            "high": flat.amax(1),
        }

    @staticmethod
    def gradient_sums(g: Tensor) -> ReducedSums:
        """Reduce gradients g (seeds, batch, ...)."""
        lengths, resultants = _lengths(g.double().flatten(2))
        return {
            "grad_norm": _norm(lengths),
            "g_length": resultants,
            "nonzero": torch.count_nonzero(g.flatten(1), dim=1),
            "nonfinite": _nonfinite(g),
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
        return SeedReductions.norms(d), _nonfinite(d)

    @staticmethod
    def norms(x: Tensor) -> Tensor:
        """Return the Euclidean norm of each seed's part of x, accumulated in float64."""
        return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)


def _lengths(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of rows (seeds, ..., n, features), and lengths of the sums of their unit rows."""
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    resultants = lengths.reciprocal().unsqueeze(-2) @ rows
    return lengths, torch.linalg.vector_norm(resultants, dim=(-2, -1))


def _nonfinite(x: Tensor) -> Tensor:
    return torch.count_nonzero((x - x).flatten(1), dim=1)
