"""What the benchmarks share: interleaved repeats, medians with spread, a table with the machine.

Machines are noisy, so contestants take turns and a ratio is the median of the ratios of neighbours.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"


@dataclass(frozen=True)
class Contest:
    """Seconds of every contestant, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, name: str) -> float:
        """Median seconds."""
        return median(self.seconds[name])

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """Median and quartiles of the ratios round by round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


def take_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> Contest:
    """Run all contestants in turn; one round of warm-up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(-1, rounds):
        for name, work in contestants.items():
            gc.collect()
            begin = perf_counter()
            work()
            if round_number >= 0:
                seconds[name].append(perf_counter() - begin)
    return Contest(seconds)


def shown(ratio: tuple[float, float, float]) -> str:
    """`1.10 [1.08, 1.13]`: median and quartiles."""
    middle, low, high = ratio
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def write_table(
    name: str, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> None:
    """A Markdown table under results/benchmarks, and the same on the terminal."""
    lines = [
        f"# {title}",
        "",
        *([note, ""] if note else []),
        "| " + " | ".join(headings) + " |",
        "|" + "|".join(" --- " for _ in headings) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        machine(),
        "",
        f"Made by `python benchmarks/{name}.py`, {datetime.now(UTC):%Y-%m-%d}.",
        "",
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def machine() -> str:
    """CPU, cores and versions."""
    import torch

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"Machine: {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads{gpu}; "
        f"torch {torch.__version__}, Python {platform.python_version()}."
    )
