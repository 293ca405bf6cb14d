"""Throughput of statistics cells: worker processes against this process, one thread each.

Run with `python benchmarks/executors.py`; writes results/benchmarks/executors.md.
"""

from __future__ import annotations

import os
from statistics import median
from time import perf_counter

from side_by_side import Contest, shown, write_table

from gradflow.specs.grid import Cell
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.sweeps.cells import Serial
from gradflow.sweeps.processes import Processes

CELLS = [
    Cell(StackSpec(depth=24), RunOptions(device="cpu", seed=seed, timing=False))
    for seed in range(24)
]
# Shows that a worker has come up.
GREETING = Cell(StackSpec(depth=1, block="mlp", width=8), RunOptions(device="cpu", timing=False))
ROUNDS = 5


def serial() -> float:
    """Seconds per cell."""
    begin = perf_counter()
    for outcome in Serial().outcomes(CELLS):
        assert outcome.run
    return (perf_counter() - begin) / len(CELLS)


def processes(workers: int) -> tuple[float, float]:
    """Seconds per cell once all workers are up, and seconds until then."""
    begin, ready, greeted, after = perf_counter(), 0.0, 0, 0
    for outcome in Processes(workers).outcomes([GREETING] * workers + CELLS):
        assert outcome.run
        after += ready > 0
        greeted += outcome.cell == GREETING
        if greeted == workers and not ready:
            ready = perf_counter()
    return (perf_counter() - ready) / after, ready - begin


def main() -> None:
    """Measure in turn and write the table."""
    workers = len(os.sched_getaffinity(0))
    alone, together, starts = [], [], []
    for round_number in range(-1, ROUNDS):
        each = serial()
        shared, start = processes(workers)
        if round_number >= 0:
            alone.append(each)
            together.append(shared)
            starts.append(start)
    contest = Contest({"serial": alone, "processes": together})
    throughput = contest.ratio("serial", "processes")
    start = median(starts)
    whole = len(CELLS) * median(alone) / (len(CELLS) * median(together) + start)
    write_table(
        "executors",
        "Throughput of the executors",
        ["statistics cells", "median [quartiles]", "at least"],
        [
            [f"{workers} processes over serial, workers up", shown(throughput), "1.70"],
            [f"the same with their start, {len(CELLS)} cells", f"{whole:.2f}", ""],
            ["serial, seconds per cell", f"{median(alone):.3f}", ""],
            ["start of the workers, seconds", f"{start:.2f}", ""],
        ],
        "Cells are transformer stacks of depth 24 with one thread each; serial and processes take "
        f"turns, {ROUNDS} rounds. Workers start once per sweep (they import torch), which is "
        f"counted by itself. Load average at the end: {os.getloadavg()[0]:.1f}.",
    )


if __name__ == "__main__":
    main()
