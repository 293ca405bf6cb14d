"""What `gradflow.watch` adds to a training step, beside what people use today.

Run with `python benchmarks/watch_overhead.py`; writes results/benchmarks/watch_overhead.md. wandb
and TorchLens are measured where they are installed.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack

import torch
from side_by_side import Contest, shown, take_turns, write_table
from torch import Tensor, nn

import gradflow

WIDTH, DEPTH, BATCH, TOKENS = 256, 24, 8, 256
ROUNDS, COMPILED_ROUNDS, GROUPS = 9, 9, 3
Step = Callable[[], None]


class Trainer:
    """A model, its optimizer and a batch; every contestant has its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.model = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x = torch.randn(BATCH, TOKENS, WIDTH)
        self.run: Callable[[Tensor], Tensor] = self.model

    def step(self) -> None:
        """Forward, backward, clipping, update."""
        self.optimizer.zero_grad()
        self.run(self.x).square().mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def bare(_: ExitStack) -> Step:
    """The step alone."""
    return Trainer().step


def watched(stack: ExitStack, every: int = 1) -> Step:
    """All statistics of `gradflow.watch`."""
    trainer = Trainer()
    stack.enter_context(gradflow.watch(trainer.model, every=every))
    return trainer.step


def compiled(stack: ExitStack, *, watch: bool) -> Step:
    """The model in one compiled graph."""
    trainer = Trainer()
    if watch:
        stack.enter_context(gradflow.watch(trainer.model))
    trainer.run = torch.compile(trainer.model, fullgraph=True)
    return trainer.step


def item_per_hook(_: ExitStack) -> Step:
    """A hook per parameter that reads its gradient norm at once."""
    trainer, norms = Trainer(), []
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda g: norms.append(g.norm().item()))
    return trainer.step


def profiler(_: ExitStack) -> Step:
    """torch.profiler around the step."""
    trainer = Trainer()

    def step() -> None:
        with torch.profiler.profile():
            trainer.step()

    return step


def detect_anomaly(_: ExitStack) -> Step:
    """torch.autograd.detect_anomaly around the step."""
    trainer = Trainer()

    def step() -> None:
        with torch.autograd.set_detect_anomaly(True):
            trainer.step()

    return step


def wandb_watch(stack: ExitStack) -> Step:
    """wandb.watch with gradients and parameters at every step, logged offline."""
    import wandb

    os.environ["WANDB_SILENT"] = "true"
    trainer = Trainer()
    run = wandb.init(mode="offline", dir=tempfile.mkdtemp(), project="benchmark")
    stack.callback(run.finish)
    run.watch(trainer.model, log="all", log_freq=1)

    def step() -> None:
        trainer.step()
        run.log({"step": 1})

    return step


def torchlens(_: ExitStack) -> Step:
    """TorchLens' trace of forward and backward with all gradients; it takes no optimizer step."""
    import torchlens

    trainer = Trainer()
    capture = torchlens.options.CaptureOptions(backward_ready=True, save_grads="all")

    def step() -> None:
        trace = torchlens.trace(trainer.model, trainer.x, capture=capture)
        trace.log_backward(trace[trace.output_layers[0]].out.square().mean())
        trainer.optimizer.zero_grad()

    return step


EAGER: dict[str, Callable[[ExitStack], Step]] = {
    "bare step": bare,
    "gradflow.watch, every step": watched,
    "`.item()` in a hook per parameter": item_per_hook,
    "torch.profiler": profiler,
    "detect_anomaly": detect_anomaly,
}
WHERE_INSTALLED = {"wandb": wandb_watch, "torchlens": torchlens}
LIMITS = {
    "gradflow.watch, every step": "1.05",
    "gradflow.watch, every=10": "1.01",
    "gradflow.watch, compiled": "1.05",
}


def ten_times(step: Step) -> Step:
    """Ten steps, one of which is measured."""

    def steps() -> None:
        for _ in range(10):
            step()

    return steps


def contest_of(makers: dict[str, Callable[[ExitStack], Step]], rounds: int) -> Contest:
    """All contestants in turn, each with a model of its own."""
    with ExitStack() as stack:
        return take_turns({name: make(stack) for name, make in makers.items()}, rounds)


def rows_of(contest: Contest, base: str, steps: int = 1) -> list[list[str]]:
    """One row for each contestant but, from the second table on, the base."""
    return [
        [
            name,
            f"{contest.time(name) / steps * 1e3:.0f} ms",
            shown(contest.ratio(name, base)),
            LIMITS.get(name, ""),
        ]
        for name in contest.seconds
    ]


def main() -> None:
    """Measure all and write the table."""
    makers = dict(EAGER)
    makers |= {m: make for m, make in WHERE_INSTALLED.items() if importlib.util.find_spec(m)}
    rows = rows_of(contest_of(makers, ROUNDS), "bare step")
    sparse = {
        "bare step, ten of them": lambda stack: ten_times(bare(stack)),
        "gradflow.watch, every=10": lambda stack: ten_times(watched(stack, every=10)),
    }
    rows += rows_of(contest_of(sparse, GROUPS), "bare step, ten of them", 10)
    graphs = {
        "compiled step": lambda stack: compiled(stack, watch=False),
        "gradflow.watch, compiled": lambda stack: compiled(stack, watch=True),
    }
    rows += rows_of(contest_of(graphs, COMPILED_ROUNDS), "compiled step")
    write_table(
        "watch_overhead",
        f"Training a {DEPTH}-layer transformer of width {WIDTH}, watched",
        ["contestant", "step, median", "ratio to its bare step [quartiles]", "at most"],
        rows,
        f"Batch {BATCH} x {TOKENS} tokens, float32, AdamW with clipping, in turn. gradflow's "
        "numbers are the stream and its gradients at every layer, all parameters and their "
        "gradients before and after clipping, and the updates.",
    )


if __name__ == "__main__":
    main()
