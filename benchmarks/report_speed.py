"""How fast `gradflow report` reads many runs: wall and CPU time, peak memory, size of the page.

Makes runs of 200 transformer layers (401 rows of layers.csv) in a temporary folder, from made-up
records through the store, and times the whole command as a process of its own. Every table that is
read is a file of its own.

    python benchmarks/report_speed.py [RUNS ...]
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import cycle, islice, product
from pathlib import Path

from side_by_side import write_table

from gradflow.engine.environment import describe_environment
from gradflow.judging.assembly import summarise_run
from gradflow.runs.records import LayerRecord, Run
from gradflow.runs.store import run_json, save
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

DEPTH = 200
# Tables that differ; the other runs get copies of them.
DIFFERENT = 48
ROUNDS = 3
COUNTS = (100, 1_000, 10_000)


def specs() -> Iterator[StackSpec]:
    """Designs without end: 2 shortcuts x 3 norms x 8 widths."""
    designs = product(("residual", "plain"), ("none", "pre", "post"), range(64, 576, 64))
    for shortcut, norm, width in cycle(designs):
        yield StackSpec(depth=DEPTH, shortcut=shortcut, norm=norm, width=width)


def records(rate: float, chance: random.Random) -> Iterator[LayerRecord]:
    """A profile that shrinks by `rate` decades per layer, with noise in every digit."""
    for i in range(2 * DEPTH + 1):
        layer, unit = (i + 1) // 2, ("input", "attention", "ffn")[0 if not i else 2 - i % 2]
        log = rate * (DEPTH - layer) + 0.1 * chance.random()
        values = [chance.random() for _ in range(12)]
        yield LayerRecord(
            seed=0,
            step=0,
            layer=layer,
            unit=unit,
            act_rms=1 + values[0],
            act_max_abs=4 + values[1],
            grad_norm=10**log,
            log10_grad_norm=log,
            gain=1 + values[2] if i else None,
            skip_gain=1.0 if i else None,
            branch_gain=values[3] if i else None,
            skip_branch_cos=values[4] if i else None,
            param_norm=10 * values[5] if i else None,
            param_grad_norm=values[6] if i else None,
            log10_param_grad_norm=math.log10(values[6]) if i else None,
            act_cos=values[7],
            grad_cos=values[8],
            nonfinite=0,
            zero_fraction=0.0,
            saved_bytes=167936 if i else None,
            forward_s=values[9] / 1e3 if i else None,
            forward_s_iqr=values[9] / 1e5 if i else None,
            backward_s=values[10] / 1e3 if i else None,
            backward_s_iqr=values[10] / 1e5 if i else None,
        )


def made_run(spec: StackSpec, chance: random.Random) -> Run:
    """A run that nobody measured."""
    import torch

    rows = tuple(records(chance.uniform(-0.03, 0.03), chance))
    options = RunOptions(device="cpu")
    environment = describe_environment(spec, torch.device("cpu"))
    environment |= {"start_utc": "2026-01-01T00:00:00+00:00", "duration_s": 1.0}
    summary = summarise_run(rows, spec, options)
    return Run(spec, options, summary, environment, None, (), rows, (), ())


def make_runs(out: Path, count: int) -> None:
    """Store `DIFFERENT` runs, and copies of them under other specifications."""
    chance = random.Random(0)
    made = [save(made_run(spec, chance), out) for spec in islice(specs(), min(count, DIFFERENT))]
    for number in range(len(made), count):
        run = made[number % len(made)]
        assert run.path is not None
        folder = out / f"{run.path.name}-{number:06}"
        shutil.copytree(run.path, folder)
        content = run_json(run)
        content["spec"] = asdict(run.spec) | {"batch_size": 8 + number % 5}
        (folder / "run.json").write_text(json.dumps(content, indent=2))


def timed(results: Path, page: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak GiB of one `gradflow report`."""
    command = [Path(sys.executable).with_name("gradflow"), "report", "--results", results]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--out", page, "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    assert status == 0, f"gradflow report failed with status {status}"
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def measure(count: int, folder: Path) -> tuple[str, ...]:
    """One row of the table: the best of the rounds, for a busy machine only adds to them."""
    make_runs(folder / "runs", count)
    page = folder / "report.html"
    rounds = [timed(folder / "runs", page) for _ in range(ROUNDS if count <= 1_000 else 1)]
    wall, cpu, _ = min(rounds)
    peak = max(memory for *_, memory in rounds)
    shutil.rmtree(folder / "runs")
    size = page.stat().st_size / 1e6
    return f"{count:,}", f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.2f}", f"{size:.1f}"


def main() -> None:
    """Make runs, measure, write the table."""
    rows = []
    for count in [int(word) for word in sys.argv[1:]] or COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(count, Path(folder)))
            print(*rows[-1])
    versions = ", ".join(f"{n} {version(n)}" for n in ("polars", "altair", "vl-convert-python"))
    note = (
        f"Runs of {DEPTH} transformer layers with {2 * DEPTH + 1} rows each; the whole process "
        f"with its start, the best of {ROUNDS} rounds (one above 1,000 runs). {versions}. "
        f"Load average {os.getloadavg()[0]:.1f}: the machine was shared, so CPU time counts."
    )
    headings = ("runs", "wall s", "CPU s", "peak GiB", "page MB")
    write_table("report_speed", "Speed of `gradflow report`", headings, rows, note)


if __name__ == "__main__":
    main()
