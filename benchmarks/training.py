"""What shortcuts do for learning: the outcome of one training recipe for every design.

Run with `python benchmarks/training.py`; writes results/benchmarks/training.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from side_by_side import write_table

from gradflow.judging.training_outcome import outcome_sentence
from gradflow.measuring.stack import measure
from gradflow.runs.records import Run
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

RECIPE = RunOptions(steps=150, lr=3e-3, every=150, seeds=3, timing=False)
SIZES: dict[str, dict[str, Any]] = {
    "transformer, 12 blocks": {"depth": 12, "width": 64, "seq_len": 32},
    "mlp, 50 layers": {"block": "mlp", "depth": 50},
}
DESIGNS = [
    (shortcut, norm) for shortcut in ("residual", "plain") for norm in ("none", "pre", "post")
]
HEADINGS = ["stack", "shortcut", "norm", "outcome", "final loss", "floor", "chance", "closed"]


def rows() -> Iterator[list[str]]:
    """A row per design."""
    for title, size in SIZES.items():
        for shortcut, norm in DESIGNS:
            run = measure(StackSpec(**size, shortcut=shortcut, norm=norm), RECIPE)
            yield [title, shortcut, norm, *cells(run)]


def cells(run: Run) -> list[str]:
    """What training came to."""
    found = run.summary
    numbers = (found.final_loss, found.loss_floor, found.loss_chance)
    told = outcome_sentence(str(found.outcome), found.outcome_step)
    closed = found.gap_closed
    part = f"{closed:.0%}" if closed is not None and abs(closed) < 10 else f"{closed:.1e}"
    return [told, *(f"{value:.4g}" for value in numbers), part]


def main() -> None:
    """Train everything and write the table."""
    write_table(
        "training",
        "What shortcuts do for learning",
        HEADINGS,
        list(rows()),
        f"{RECIPE.steps} steps of {RECIPE.optimizer}, lr {RECIPE.lr:g}, no warm-up, the same for "
        f"every design; means over {RECIPE.seeds} seeds. Losses in nats; closed: part of the way "
        "from chance to the floor.",
    )


if __name__ == "__main__":
    main()
