"""Readings that gradflow's rows do not hold: computed directly, on the stacks that it builds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from claims.readings import CPU, slope
from gradflow.engine.build import build_network
from gradflow.engine.tape import Network
from gradflow.engine.walk import walk
from gradflow.networks.blocks import Attention
from gradflow.networks.ends import input_batch
from gradflow.networks.norms import Norm
from gradflow.networks.stack import build_block
from gradflow.specs.stack import StackSpec


class SharedCotangent(nn.Module):
    """L = sum over samples of y . v, the same v for all: gradients then differ by the net alone."""

    def __init__(self, v: Tensor) -> None:
        super().__init__()
        self.v = v

    def forward(self, y: Tensor) -> Tensor:
        return (y * self.v).sum()


def frozen_batch_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Batchnorm whose statistics are constants: one sample's gradient does not enter another's."""
    rows = x.detach().reshape(-1, x.shape[-1])
    scale = (rows.var(0, correction=0) + eps).rsqrt() * weight
    normed = (x - rows.mean(0)) * scale
    return normed if bias is None else normed + bias


def gradient_cosine(spec: StackSpec, seed: int) -> float:
    """Mean cosine between samples of dL/d(input), one cotangent for all; see Balduzzi et al."""
    network = build_network(spec, seed, CPU)
    for block in network.blocks:
        for part in block.modules():
            if isinstance(part, Norm) and part.kind == "batchnorm":
                part.apply_norm = frozen_batch_norm
    v = torch.randn(network.x.shape[1:], generator=torch.Generator().manual_seed(seed))
    shared = Network(network.blocks, network.x, SharedCotangent(v))
    return float(walk(spec, seed, shared).records()[0][0].grad_cos or math.nan)


def cosine_factor(spec: StackSpec, seed: int) -> float:
    """By which that cosine multiplies per layer, on geometric average."""
    cosine = gradient_cosine(spec, seed)
    return math.copysign(abs(cosine) ** (1 / spec.depth), cosine)


COSINE_DEPTHS = (8, 16, 32, 64)


def cosine_exponent(spec: StackSpec, seed: int) -> float:
    """p of cosine ~ depth^p; depths of `COSINE_DEPTHS`."""
    found = [gradient_cosine(replace(spec, depth=depth), seed) for depth in COSINE_DEPTHS]
    return slope(np.log(COSINE_DEPTHS), np.log(np.abs(found)))


def logit_variance(spec: StackSpec, seed: int) -> float:
    """Variance of q . k / sqrt(d_head) over all pairs of tokens, in the first attention unit."""
    unit = next(build_block(spec, seed, 1, CPU).units)
    attention = unit.branch
    assert isinstance(attention, Attention)
    with torch.no_grad():
        x = unit.before(input_batch(spec, seed, CPU))
        q = attention.q_norm(_heads(attention.q(x), attention.heads))
        k = attention.k_norm(_heads(attention.k(x), attention.heads))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return float(logits.var())


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, d) to (B, heads, T, d / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
