"""What observing costs: the statistics pass, whole processes, memory and the sum of unit times.

Run with `python benchmarks/overhead.py`; writes results/benchmarks/overhead.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

import torch
from side_by_side import Contest, shown, take_turns, write_table

from gradflow.engine.build import build_network
from gradflow.engine.tape import Network
from gradflow.engine.timing import CpuClock, bare_pass, timed_pass
from gradflow.engine.walk import walk
from gradflow.specs.stack import StackSpec

CPU = torch.device("cpu")
CLOCK = CpuClock()
STACKS = {
    "depth 200, width 128, 8 x 32 tokens": (StackSpec(depth=200), 1.25),
    "depth 24, width 512, 8 x 32 tokens": (StackSpec(depth=24, width=512), 1.10),
}
ROUNDS = 15

# The shortest script that a person would write for the same question.
BY_HAND = """
import csv, torch
from torch import nn
torch.manual_seed(0)
class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
    def forward(self, x):
        h = self.n1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.ffn(self.n2(x))
blocks = [Block(128, 4) for _ in range(200)]
x = torch.randn(8, 32, 128, requires_grad=True)
stream = [x]
for block in blocks:
    stream.append(block(stream[-1]))
    stream[-1].retain_grad()
v = torch.randn(8, 32, 128)
(stream[-1] * v / v.norm()).sum().backward()
with open("norms.csv", "w") as file:
    writer = csv.writer(file)
    writer.writerow(["layer", "grad_norm"])
    writer.writerows([i, y.grad.norm().item()] for i, y in enumerate(stream))
with open("params.csv", "w") as file:
    writer = csv.writer(file)
    writer.writerow(["layer", "param", "norm", "grad_norm"])
    for i, block in enumerate(blocks, start=1):
        for name, p in block.named_parameters():
            writer.writerow([i, name, p.norm().item(), p.grad.norm().item()])
"""
TOOL = "from gradflow.cli.app import main; main()"

# Peak resident memory of one pass in a process of its own.
PEAK = """
import sys, torch
from gradflow.engine.build import build_network
from gradflow.engine.memory import peak_bytes, reset_peak
from gradflow.specs.stack import StackSpec
from gradflow.engine.timing import CpuClock, bare_pass
from gradflow.engine.walk import walk
spec = StackSpec(depth=200)
network = build_network(spec, 0, torch.device("cpu"))
reset_peak(network.x.device)
before = peak_bytes(network.x.device)
if sys.argv[1] == "bare":
    bare_pass(network, CpuClock())
else:
    walk(spec, 0, network)
print(peak_bytes(network.x.device) - before)
"""


def passes(spec: StackSpec) -> Contest:
    """Bare, statistics and timed pass of one stack."""
    network = build_network(spec, 0, CPU)
    contestants = {
        "bare": lambda: bare_pass(network, CLOCK),
        "statistics": lambda: walk(spec, 0, network),
        "timed": lambda: timed_pass(network, CLOCK),
    }
    return take_turns(contestants, ROUNDS)


def sum_of_units(network: Network) -> float:
    """Sum of the unit times over a bare pass right after it."""
    forward, backward = timed_pass(network, CLOCK)
    return (sum(forward) + sum(backward)) / bare_pass(network, CLOCK)


def processes() -> Contest:
    """The whole command against the script by hand, each a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["run", "--depth", "200", "--norm", "pre", "--no-timing", "--out", folder]

        def start(*words: str) -> None:
            subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)

        return take_turns(
            {
                "by hand": lambda: start("-c", BY_HAND),
                "gradflow run": lambda: start("-c", TOOL, *command),
            },
            rounds=7,
        )


def peak(kind: str) -> int:
    """Bytes above the network itself."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def main() -> None:
    """Measure everything and write the table."""
    rows = []
    for name, (spec, limit) in STACKS.items():
        contest = passes(spec)
        time = f"{contest.time('bare') * 1e3:.0f} ms"
        statistics = shown(contest.ratio("statistics", "bare"))
        rows.append([f"statistics pass / bare pass, {name}", statistics, f"{limit:.2f}", time])
        network = build_network(spec, 0, CPU)
        sums = [sum_of_units(network) for _ in range(ROUNDS)]
        within = shown(Contest({"sum": sums, "bare": [1.0] * ROUNDS}).ratio("sum", "bare"))
        rows.append([f"sum of unit times / bare pass, {name}", within, "0.90 to 1.10", time])
    whole = processes()
    ratio = shown(whole.ratio("gradflow run", "by hand"))
    seconds = f"{whole.time('by hand'):.2f} s"
    rows.append(["`gradflow run --depth 200 --no-timing` / script by hand", ratio, "1.25", seconds])
    bare, statistics_peak = peak("bare"), peak("statistics")
    memory = f"{statistics_peak / bare:.2f}"
    rows.append(["peak memory, statistics / bare", memory, "1.00", f"{bare / 2**20:.0f} MiB"])
    write_table(
        "overhead",
        "What observing costs",
        ["ratio", "median [quartiles]", "at most", "denominator"],
        rows,
        "Side by side in one run, in turn; the transformer block, pre-norm, float32.",
    )


if __name__ == "__main__":
    main()
