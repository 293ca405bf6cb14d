"""Stacks beyond the memory: peak memory, time per layer, and how both go with the depth.

Every row is `gradflow run` in a process of its own with one thread; it is stored, loaded modules
and start included in the peak but not in the times. Memory is held against `import torch` alone. On
a shared machine CPU time counts. At the depths where everything also fits into memory the stored
layers.csv and params.csv are compared byte by byte.

    python benchmarks/deep.py [--quick]
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from side_by_side import write_table

TRANSFORMER = ("--block", "transformer", "--width", "128", "--batch-size", "4", "--seq-len", "32")
MLP = ("--block", "mlp", "--width", "64")
RESIDENT = ("--keep", "graph", "--no-rebuild")
LITTLE = ("--memory-limit", "32MiB", "--rebuild", "--keep", "sqrt")
ROUNDS = 3

WORKER = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
import gradflow.cli.run, gradflow.measuring.stack, gradflow.showing.terminal.one_run
import rich.console, plotext
from gradflow.cli.app import run_app
run_app(["run", "--depth", "2", "--no-timing", "--quiet", "--out", sys.argv[1] + "/warm-up"])
wall, cpu = time.perf_counter(), time.process_time()
code = run_app(["run", *sys.argv[2:], "--no-timing", "--device", "cpu", "--out", sys.argv[1]])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("\\n" + json.dumps({"code": code, "wall": wall, "cpu": cpu, "peak": peak * 1024}))
"""
ALONE = "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


@dataclass(frozen=True)
class Result:
    """One row: seconds are medians over the rounds, bytes the largest."""

    depth: int
    wall: float
    cpu: float
    peak: int
    folder: Path

    @property
    def cpu_per_layer(self) -> float:
        """Seconds."""
        return self.cpu / self.depth

    @property
    def about(self) -> dict[str, dict[str, str]]:
        """What `run.json` says."""
        return json.loads((self.folder / "run.json").read_text())


def python(code: str, *words: str) -> str:
    """What a script prints last."""
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.splitlines()[-1]


def measured(out: Path, depth: int, options: tuple[str, ...], rounds: int = 1) -> Result:
    """`gradflow run`, each round with its start anew."""
    folder = Path(tempfile.mkdtemp(dir=out))
    words = (*options, "--depth", str(depth))
    found = [json.loads(python(WORKER, str(folder), *words)) for _ in range(rounds)]
    assert all(one["code"] == 0 for one in found)
    (stored, *_) = (path.parent for path in folder.glob("*/run.json"))
    wall, cpu = (median(one[what] for one in found) for what in ("wall", "cpu"))
    return Result(depth, wall, cpu, max(one["peak"] for one in found), stored)


def same_numbers(one: Result, other: Result) -> bool:
    """Whether two runs stored the same tables, byte by byte."""
    names = ("layers.csv", "params.csv")
    return all((one.folder / n).read_bytes() == (other.folder / n).read_bytes() for n in names)


def exponent(results: list[Result]) -> float:
    """Of the power of the depth with which CPU time goes, by least squares in the logarithms."""
    x, y = [math.log(r.depth) for r in results], [math.log(r.cpu) for r in results]
    centre, middle = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - centre) * (b - middle) for a, b in zip(x, y, strict=True))
    return slope / sum((a - centre) ** 2 for a in x)


def row(name: str, result: Result, alone: int) -> list[str]:
    """The cells of one result."""
    return [
        name,
        f"{result.depth:,}",
        result.about["environment"]["memory_policy"].partition(":")[0],
        f"{result.wall:.1f}",
        f"{result.cpu:.1f}",
        f"{result.cpu_per_layer * 1e3:.2f}",
        f"{(result.peak - alone) / 2**20:.0f}",
    ]


def main(out: Path, *, quick: bool) -> None:
    """Measure all and write the table."""
    alone = int(python(ALONE))
    deepest, rounds = (1_000, 1) if quick else (10_000, ROUNDS)
    depths = [depth for depth in (100, 1_000, 10_000) if depth <= deepest]
    resident = measured(out, 100, (*TRANSFORMER, *RESIDENT), rounds)
    deep = [measured(out, d, (*TRANSFORMER, *LITTLE), rounds if d < 1_000 else 1) for d in depths]
    mlp = measured(out, 10 * deepest, (*MLP, *LITTLE))
    pairs = [(resident, deep[0])]
    pairs += [(measured(out, 1_000, (*TRANSFORMER, *RESIDENT)), deep[1])]
    pairs += [tuple(measured(out, 1_000, (*MLP, *how)) for how in (RESIDENT, LITTLE))]
    rows = [row("transformer, width 128, 4 x 32 tokens", each, alone) for each in (resident, *deep)]
    rows.append(row("mlp, width 64, 64 vectors", mlp, alone))
    note = (
        f"`import torch` alone takes {alone / 2**20:.0f} MiB. A layer of depth {deepest:,} costs "
        f"{deep[-1].cpu_per_layer / resident.cpu_per_layer:.2f} times one of depth 100 with "
        "everything resident; time goes with the depth to the power "
        f"{exponent(deep):.3f}. Stored tables of resident and rebuilt runs are the same byte by "
        f"byte in {sum(same_numbers(*pair) for pair in pairs)} of {len(pairs)} pairs (transformer "
        "at 100 and 1,000 layers, mlp at 1,000). Load average "
        f"{os.getloadavg()[1]:.1f}: where it is above 1, only CPU time counts."
    )
    headings = ["stack", "depth", "memory policy", "wall s", "CPU s", "CPU ms per layer"]
    write_table("deep", "Beyond memory", [*headings, "MiB above torch"], rows, note)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), quick="--quick" in sys.argv[1:])
