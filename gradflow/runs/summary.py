"""A run in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers. Decades are powers of ten; None is missing.

    `log10_gain_per_layer` is negative where the gradient shrinks towards the input. The interval
    covers 95 % over seeds and layers. `trend` is `exponential` or `power law` in depth, whichever
    fits the profile better, and `healthy_depth` the depth at which that trend leaves the
    healthy range. `departures` tells which parts of a scheme options have replaced. `outcome`, and
    what follows it, is what training came to (see `judging.outcome`); the verdict and all else is
    that of the first step.

    `forward_flop` and `backward_flop` are floating-point operations of one pass, those of matrix
    products, convolutions and attention; `matmul_flop_per_s` is what the device did of them per
    second in a bare matrix product.

    `theory_deviation` is the measured mean less theory, where the two lie farthest apart, in
    decades; `theory_band` what it may be there; `theory_reason` says why there is no theory.
    """

    verdict: str
    advice: str
    total_log10_gain: float | None
    log10_gain_per_layer: float | None
    log10_gain_per_layer_low: float | None
    log10_gain_per_layer_high: float | None
    efolding_layers: float | None
    trend: str | None
    healthy_depth: float | None
    param_grad_spread: float | None
    skip_share: float | None
    first_layer: int | None = None
    first_unit: str | None = None
    first_pass: str | None = None
    loss: float | None = None
    outcome: str | None = None
    outcome_step: int | None = None
    outcome_advice: str | None = None
    final_loss: float | None = None
    loss_floor: float | None = None
    loss_chance: float | None = None
    gap_closed: float | None = None
    forward_s: float | None = None
    backward_s: float | None = None
    forward_s_per_layer: float | None = None
    backward_s_per_layer: float | None = None
    forward_flop: int | None = None
    backward_flop: int | None = None
    forward_flop_per_s: float | None = None
    backward_flop_per_s: float | None = None
    matmul_flop_per_s: float | None = None
    peak_bytes: int | None = None
    theory_deviation: float | None = None
    theory_band: float | None = None
    theory_reason: str | None = None
    departures: str | None = None
