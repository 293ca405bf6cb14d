"""What one pass for all seeds saves, and where: widths and kinds of block, whole runs and passes.

Run with `python benchmarks/seeds.py`; writes results/benchmarks/seeds.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import torch
from side_by_side import Contest, shown, take_turns, write_table

from gradflow.engine.build import build_network
from gradflow.engine.memory import footprint
from gradflow.engine.plan import LEAST_SEEDS, MOST_SCORES, MOST_WORK, pays
from gradflow.engine.rows import new_tables
from gradflow.engine.seeds.blocks import SeedBlocks
from gradflow.engine.seeds.walk import seed_network, walk_seeds
from gradflow.engine.walk import walk
from gradflow.specs.stack import StackSpec

CPU = torch.device("cpu")
DEPTH, ROUNDS = 50, 5
STACKS: Mapping[str, Mapping[str, Any]] = {
    "mlp, width 32": {"block": "mlp", "width": 32},
    "mlp, width 64": {"block": "mlp", "width": 64},
    "mlp, width 128": {"block": "mlp", "width": 128},
    "mlp, width 256": {"block": "mlp", "width": 256},
    "ffn, width 32": {"block": "ffn", "width": 32},
    "ffn, width 64": {"block": "ffn", "width": 64},
    "transformer, width 16": {"width": 16},
    "transformer, width 32": {"width": 32},
    "transformer, width 64": {"width": 64},
    "transformer, width 16, 256 tokens": {"width": 16, "batch_size": 1, "seq_len": 256},
    "conv, width 8": {"block": "conv", "width": 8},
    "conv, width 32": {"block": "conv", "width": 32},
}
SEEDS = (2, 4, 16)


def one_by_one(spec: StackSpec, seeds: int, passes: list[float]) -> None:
    """Every seed built and measured by itself; appends the seconds of the passes alone."""
    spent = 0.0
    for seed in range(seeds):
        network = build_network(spec, seed, CPU)
        begin = perf_counter()
        walk(spec, seed, network).finish()
        spent += perf_counter() - begin
    passes.append(spent)


def at_once(spec: StackSpec, seeds: int, passes: list[float]) -> None:
    """All seeds together; appends the seconds of the pass alone."""
    blocks = SeedBlocks(spec, range(seeds), CPU)[:]
    network = seed_network(spec, range(seeds), blocks, CPU)
    begin = perf_counter()
    walk_seeds(spec, network, {seed: new_tables(None) for seed in range(seeds)}).finish()
    passes.append(perf_counter() - begin)


def contest(spec: StackSpec, seeds: int) -> tuple[Contest, Contest]:
    """Whole runs, and their passes alone."""
    passes: dict[str, list[float]] = {"one by one": [], "at once": []}
    work: dict[str, Callable[[], object]] = {
        "one by one": partial(one_by_one, spec, seeds, passes["one by one"]),
        "at once": partial(at_once, spec, seeds, passes["at once"]),
    }
    whole = take_turns(work, ROUNDS)
    return whole, Contest({name: seconds[1:] for name, seconds in passes.items()})  # warm-up


def main() -> None:
    """Every stack with every number of seeds."""
    rows = []
    for name, options in STACKS.items():
        spec = StackSpec(depth=DEPTH, **options)
        size = footprint(spec, 0, CPU)
        for seeds in SEEDS:
            whole, passes = contest(spec, seeds)
            gains = [shown(each.ratio("one by one", "at once")) for each in (passes, whole)]
            each = 1e6 * passes.time("at once") / DEPTH / seeds
            choice = "yes" if pays(seeds, size) else "no"
            rows.append([name, f"{size.work / 1e6:.2f}", str(seeds), f"{each:.0f}", *gains, choice])
    note = (
        f"Depth {DEPTH}, float32; times one seed after the other over times at once: median "
        f"[quartiles] of {ROUNDS} rounds in turn. Beyond the pass a run draws its weights, which "
        "goes faster into modules that are there already. Chosen: what `gradflow run --seeds` "
        f"does by itself, from {LEAST_SEEDS} seeds and {MOST_WORK / 1e6:.1f} million multiply-adds "
        f"down, and {MOST_SCORES >> 10} KiB of attention's scores, which one seed never holds."
    )
    headings = [
        *("stack", "million multiply-adds a layer", "seeds"),
        *("us per layer and seed", "pass", "build and pass", "chosen"),
    ]
    write_table("seeds", "All seeds in one pass", headings, rows, note)


if __name__ == "__main__":
    main()
