"""How fast a device multiplies matrices: what the speed of a pass is held against."""

from __future__ import annotations

from statistics import median

import torch

from gradflow.engine.timing import Clock
from gradflow.networks.initial import generator

# A product that takes less than this is mostly its launch; one of twice the size takes 8 times as
# long, so that all products together take about a tenth of a second.
LONG_ENOUGH_S = 2e-3
SMALLEST, REPEATS = 256, 3
LARGEST = {"cpu": 2048, "cuda": 8192}


def matmul_flop_per_s(device: torch.device, dtype: str, clock: Clock) -> float:
    """FLOP/s of a square matrix product, the median of a few.

    Args:
        device: where.
        dtype: of the matrices; float32 with the matmul precision that is set.
        clock: real or fake.
    """
    size = SMALLEST
    seconds = product_seconds(size, device, dtype, clock)
    while seconds < LONG_ENOUGH_S and size < LARGEST[device.type]:
        size *= 2
        seconds = product_seconds(size, device, dtype, clock)
    return 2 * size**3 / seconds


def product_seconds(size: int, device: torch.device, dtype: str, clock: Clock) -> float:
    """Median seconds of a product of two size x size matrices, after one that warms up."""
    source = generator(device, 0, "matmul")
    wide = torch.empty(size, size, device=device).normal_(generator=source)
    a = wide.to(getattr(torch, dtype))
    out = a @ a
    marks = [clock.mark()]
    for _ in range(REPEATS):
        torch.mm(a, a, out=out)
        marks.append(clock.mark())
    return median(clock.seconds(marks))
