"""Rotary position embedding, Su et al. 2021 (arXiv:2104.09864)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn feature pairs (i, i + c/2) of the token at position t by the angle t base^(-2i/c).

    Scores q_s . k_t then depend on t - s alone. The pairs are the halves of a head, as in the
    checkpoints of Hugging Face; the paper pairs neighbours, which is a permutation of features.

    Args:
        x: (B, heads, T, c) queries or keys, c even.
        base: 10,000 in the paper.

    Returns:
        As x.
    """
    turns = _turns if torch.compiler.is_compiling() else _known_turns
    cos, sin = turns(x.shape[-2], x.shape[-1], base, x.dtype, x.device)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _turns(
    tokens: int, size: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, (T, c/2), in float32 first, as published models have them."""
    frequency = 1.0 / base ** (torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.arange(tokens, device=device).float()[:, None] * frequency
    return angles.cos().to(dtype), angles.sin().to(dtype)


_known_turns = lru_cache(maxsize=8)(_turns)  # the same for every layer
