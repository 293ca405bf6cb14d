"""What a GPU adds: gpt3-175b in seconds, statistics beside a wide step, narrow stacks as graphs.

Run with `python benchmarks/gpu.py` where there is a GPU that torch can use; writes
results/benchmarks/gpu.md. Elsewhere it says so, exits with 3 and writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from side_by_side import Contest, shown, take_turns, write_table

from gradflow.engine.build import build_network
from gradflow.engine.cuda_graphs import graphs_on
from gradflow.engine.tape import Network
from gradflow.engine.timing import CudaClock, bare_pass, mark_bare
from gradflow.engine.walk import walk
from gradflow.measuring.stack import measure
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

GPU = torch.device("cuda")
GPT3 = StackSpec(like="gpt3-175b", batch_size=1, seq_len=2048, dtype="bfloat16")
WIDE = StackSpec(depth=8, width=4096, heads=32, batch_size=1, seq_len=2048, dtype="bfloat16")
NARROW = StackSpec(depth=200, width=256)
# What the largest may take; its layers are timed by as many as fit beside each other.
LIMIT = "40GiB"
ROUNDS = 15
NO_GPU = 3


@dataclass(frozen=True)
class Figures:
    """What was measured; ratios are medians with quartiles.

    Attributes:
        seconds: of the whole measurement of gpt3-175b, start of the process aside.
        peak: its bytes on the device.
        share: FLOP/s of its layers, weights at hand, over those of a matrix product.
        wide: statistics pass over bare pass, both eager.
        narrow: statistics pass as a CUDA graph over the eager bare pass.
        narrow_bare: bare pass as a CUDA graph over the eager one.
        wide_s: seconds of the wide bare pass.
        narrow_s: seconds of the eager narrow bare pass.
    """

    seconds: float
    peak: int
    share: float
    wide: tuple[float, float, float]
    narrow: tuple[float, float, float]
    narrow_bare: tuple[float, float, float]
    wide_s: float
    narrow_s: float


HEADINGS = ("what", "measured", "wanted", "denominator")


def rows(found: Figures) -> list[list[str]]:
    """The cells of the table."""
    narrow = f"eager bare pass, {found.narrow_s * 1e3:.1f} ms"
    return [
        ["gpt3-175b, 1 x 2,048 tokens, bfloat16: seconds", f"{found.seconds:.1f}", "< 15", ""],
        ["the same: peak GiB on the device", f"{found.peak / 2**30:.1f}", "< 40", ""],
        [
            "the same: FLOP/s of its layers, weights at hand",
            f"{found.share:.0%}",
            ">= 50%",
            "matrix product",
        ],
        [
            "statistics pass, 8 layers of width 4,096",
            shown(found.wide),
            "<= 1.02",
            f"bare pass, {found.wide_s * 1e3:.1f} ms",
        ],
        ["statistics pass as a graph, 200 of 256", shown(found.narrow), "< 1.00", narrow],
        ["bare pass as a graph, 200 of 256", shown(found.narrow_bare), "< 1.00", narrow],
    ]


def waited(work: Callable[[], object]) -> Callable[[], None]:
    """The work, done when the call returns."""

    def done() -> None:
        work()
        torch.cuda.synchronize()

    return done


def wide() -> Contest:
    """Eager passes, in turn."""
    net = build_network(WIDE, 0, GPU)
    return take_turns(
        {"bare": _bare(net), "statistics": waited(partial(walk, WIDE, 0, net))}, ROUNDS
    )


def narrow() -> Contest:
    """Eager and replayed passes, in turn."""
    net, graphs = build_network(NARROW, 0, GPU), graphs_on(GPU, RunOptions(cuda_graphs=True))
    contestants = {
        "bare": _bare(net),
        "bare graph": waited(graphs(partial(mark_bare, net, CudaClock(GPU)))),
        "statistics graph": waited(graphs(partial(walk, NARROW, 0, net))),
    }
    return take_turns(contestants, ROUNDS)


def _bare(net: Network) -> Callable[[], None]:
    return waited(partial(bare_pass, net, CudaClock(GPU)))


def largest() -> tuple[float, int, float]:
    """Seconds, peak bytes and share of the matrix product's rate of gpt3-175b."""
    about = {"device": "cuda", "memory_limit": LIMIT}
    run = measure(GPT3, RunOptions(timing=False, **about))
    timed = measure(GPT3, RunOptions(repeats=3, time_budget=1e-9, **about)).summary
    rate = (timed.forward_flop + timed.backward_flop) / (timed.forward_s + timed.backward_s)
    peak = max(run.summary.peak_bytes, timed.peak_bytes)
    return float(run.environment["duration_s"]), peak, rate / timed.matmul_flop_per_s


def measured() -> Figures:
    """All of it, one after the other."""
    seconds, peak, share = largest()
    eager, replayed = wide(), narrow()
    return Figures(
        seconds,
        peak,
        share,
        wide=eager.ratio("statistics", "bare"),
        narrow=replayed.ratio("statistics graph", "bare"),
        narrow_bare=replayed.ratio("bare graph", "bare"),
        wide_s=eager.time("bare"),
        narrow_s=replayed.time("bare"),
    )


def write(found: Figures) -> None:
    """The table."""
    note = (
        f"Ratios side by side in one process, in turn, {ROUNDS} rounds: median [quartiles]. The "
        f"transformer block, pre-norm; gpt3-175b with `--memory-limit {LIMIT}`, its layers drawn "
        "as they are visited, its rate that of a sample whose weights are there."
    )
    write_table("gpu", "On a GPU", HEADINGS, rows(found), note)


def main() -> int:
    """Measure everything and write the table; returns the exit code."""
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU that torch can use; nothing measured", file=sys.stderr)
        return NO_GPU
    write(measured())
    return 0


if __name__ == "__main__":
    sys.exit(main())
