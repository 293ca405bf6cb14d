"""The same training step watched by what people use today, beside the bare step.

Run with `python benchmarks/peers.py`; writes results/benchmarks/peers.md. wandb is measured where
it is installed (`pip install wandb`), offline.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable

import torch
from side_by_side import shown, take_turns, write_table
from torch import nn

from gradflow.engine.build import build_network
from gradflow.engine.tape import Network
from gradflow.engine.walk import walk
from gradflow.specs.stack import StackSpec

SPEC = StackSpec(depth=24, width=256)
ROUNDS = 11


def model_of(network: Network) -> nn.Sequential:
    """The stack as the ordinary module that the other tools take."""
    return nn.Sequential(*network.blocks)


def step(network: Network, model: nn.Module) -> None:
    """Forward and backward, gradients stored in `.grad` as in training."""
    network.loss(model(network.x)).backward()
    model.zero_grad()


def item_per_hook(network: Network, model: nn.Module) -> Callable[[], None]:
    """A hook per parameter that reads its gradient norm at once."""
    norms: list[float] = []

    def watched() -> None:
        handles = [
            p.register_hook(lambda g: norms.append(g.norm().item())) for p in model.parameters()
        ]
        step(network, model)
        for handle in handles:
            handle.remove()

    return watched


def profiler(network: Network, model: nn.Module) -> Callable[[], None]:
    """torch.profiler around the step."""

    def watched() -> None:
        with torch.profiler.profile():
            step(network, model)

    return watched


def detect_anomaly(network: Network, model: nn.Module) -> Callable[[], None]:
    """torch.autograd.detect_anomaly around the step."""

    def watched() -> None:
        with torch.autograd.set_detect_anomaly(True):
            step(network, model)

    return watched


def wandb_watch(network: Network, model: nn.Module) -> Callable[[], None]:
    """wandb.watch with gradients and parameters at every step, logged offline."""
    import wandb

    os.environ["WANDB_SILENT"] = "true"
    run = wandb.init(mode="offline", dir=tempfile.mkdtemp(), project="benchmark")
    run.watch(model, log="all", log_freq=1)

    def watched() -> None:
        step(network, model)
        run.log({"step": 1})

    return watched


def main() -> None:
    """Measure all and write the table."""
    device = torch.device("cpu")
    network = build_network(SPEC, 0, device)
    model = model_of(network)
    contestants: dict[str, Callable[[], object]] = {
        "bare step": lambda: step(network, model),
        "gradflow, all statistics": lambda: walk(SPEC, 0, network),
        "`.item()` in a hook per parameter": item_per_hook(network, model),
        "torch.profiler": profiler(network, model),
        "detect_anomaly": detect_anomaly(network, model),
    }
    if importlib.util.find_spec("wandb"):
        other = build_network(SPEC, 0, device)  # its hooks stay on the model
        contestants["wandb.watch(log='all')"] = wandb_watch(other, model_of(other))
    contest = take_turns(contestants, ROUNDS)
    rows = [
        [name, f"{contest.time(name) * 1e3:.0f} ms", shown(contest.ratio(name, "bare step"))]
        for name in contestants
    ]
    write_table(
        "peers",
        "One step of a 24-layer transformer, width 256, watched by what people use today",
        ["contestant", "median", "ratio to the bare step [quartiles]"],
        rows,
        "Batch 8 x 32 tokens, float32, in turn. gradflow's column holds activations, gradients of "
        "the stream with their two parts, and all parameters; the others see less.",
    )


if __name__ == "__main__":
    main()
