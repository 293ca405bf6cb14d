"""Stochastic depth, Huang et al. 2016 (arXiv:1603.09382): branches that are dropped at random."""

from __future__ import annotations

import torch

from gradflow.networks.initial import generator
from gradflow.networks.units.template import Factor, Unit


class StochasticUnit(Unit):
    """x' = x + b_l f(x), b_l = 1 with probability `settings["keep"]`, else 0.

    That is the network in training: b_l is drawn once for each batch, from (seed, layer, step)
    alone, on any device alike. A dropped branch has gradients of exactly zero.
    """

    def settle(self, seed: int, layer: int, /) -> None:
        """Draw b_l for the first batch."""
        self.begin(seed, layer, 0)

    def begin(self, seed: int, layer: int, step: int, /) -> None:
        """Draw b_l for the batch of a step of training."""
        purpose = f"stochastic depth, step {step}" if step else "stochastic depth"
        source = generator(torch.device("cpu"), seed, purpose, layer)
        kept = torch.rand((), generator=source).item() < self.wiring.settings["keep"]
        self.scale = Factor(float(kept))
