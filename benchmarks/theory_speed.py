"""How fast theory predicts: seconds for stacks of 1,000 and 10,000 layers, and a map of designs.

Seconds of CPU, the best of 3 rounds after a warm-up; widths are large enough that nothing is
withheld.

    python benchmarks/theory_speed.py
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from side_by_side import write_table

from gradflow.judging.outlook import outlook
from gradflow.specs.grid import DEFAULT_GRID, expand
from gradflow.specs.stack import StackSpec
from gradflow.theory import predict

ROUNDS = 3
DEPTHS = (1_000, 10_000)
WIDE = 2**20
STACKS = {
    "transformer, pre-norm": StackSpec(width=WIDE),
    "transformer, post-norm": StackSpec(width=WIDE, norm="post"),
    "ffn, pre-norm, tanh": StackSpec(width=WIDE, block="ffn", activation="tanh"),
    "mlp, pre-norm": StackSpec(width=WIDE, block="mlp"),
    "plain mlp, no norm, tanh": StackSpec(
        width=WIDE, block="mlp", shortcut="plain", norm="none", activation="tanh", bias_var=0.05
    ),
    "conv, pre-layernorm, 16 x 16": StackSpec(width=WIDE, block="conv", norm_kind="layernorm"),
    "resnet, he-v2, 16 x 16": StackSpec(width=WIDE, scheme="he-v2", block="resnet"),
    "transformer, causal, 16 tokens": StackSpec(width=WIDE, causal=True, seq_len=16),
    **{name: StackSpec(width=WIDE, scheme=name) for name in ("hyper-connections", "ngpt", "b2t")},
}
MAP = {**DEFAULT_GRID, "block": ["mlp", "conv", "ffn", "transformer"]}


def best(work: Callable[[], object]) -> float:
    """CPU seconds of the quickest round."""
    work()
    found = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


def row(name: str, spec: StackSpec) -> list[str]:
    """One line of the table."""
    cells = [name]
    for depth in DEPTHS:
        deep = replace(spec, depth=depth)
        reason = predict(deep).reason
        cells.append(f"{best(partial(predict, deep)):.2f}" if reason is None else reason)
    return cells


def main() -> None:
    """Measure and write the table."""
    cells = expand(MAP).cells
    begin = time.process_time()
    for cell in cells:  # first of all, while nothing is remembered
        outlook(cell.spec, cell.options)
    seconds = time.process_time() - begin
    rows = [row(name, spec) for name, spec in STACKS.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    write_table(
        "theory_speed",
        "Speed of the predictions",
        ["stack", *(f"{depth:,} layers, s" for depth in DEPTHS)],
        rows,
        f"CPU seconds on one core, the best of {ROUNDS} rounds. A map of {len(cells)} designs as "
        f"`gradflow compare --theory-only` makes it, with the depths to which they are healthy: "
        f"{seconds:.2f} s. Peak memory of the whole process: {peak:.0f} MiB.",
    )


if __name__ == "__main__":
    main()
