"""What the code blocks of the README and the guide take for granted: files, models, runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import torch
from doc_blocks import shown_files
from torch import Tensor, nn

import gradflow

MODULE = """
from torch import nn

def build(depth=2, dropout=0.0):
    def layer():
        return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(dropout), nn.ReLU())
    layers = [layer() for _ in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
"""
DATA = """
import torch

def batches():
    return [(torch.ones(2, 3, 8, 8), torch.zeros(2).long())] * 2
"""
SMALL = {"depth": 2, "width": 8, "heads": 2, "seq_len": 3, "batch_size": 2}


def make_world(folder: Path) -> None:
    """Write the files that the commands of the pages name into a folder."""
    (folder / "my_pkg").mkdir()
    files = {"models.py": MODULE, "data.py": DATA, "my_pkg/models.py": MODULE} | shown_files()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("my-checkpoint", "path/to/checkpoint"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write(folder / name, checkpoints.by_hand())
    spec = gradflow.StackSpec(norm="pre", **SMALL)
    run = gradflow.measure(spec, gradflow.RunOptions(timing=False, device="cpu"))
    stored = gradflow.save(run, folder / "results").path
    for name in ("results/NEW", "results/OLD", "results/examples/NEW", "baselines/pre-48"):
        shutil.copytree(stored, folder / name)


class Layer(nn.Module):
    """y = x + tanh(Wx), of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.linear(x))
        return y


def stack() -> nn.Module:
    """A model of three layers."""
    return nn.Sequential(*(Layer() for _ in range(3)))


def training() -> dict[str, Any]:
    """A model, batches, an optimizer and a loss."""
    model = stack()
    batches = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {
        **{"gradflow": gradflow, "model": model, "batches": batches},
        **{"optimizer": optimizer, "criterion": nn.MSELoss()},
    }


def train(names: dict[str, Any], model: nn.Module) -> None:
    """Two steps of the training above, of this model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in names["batches"]:
        optimizer.zero_grad()
        names["criterion"](model(x), y).backward()
        optimizer.step()


@contextmanager
def in_a_training() -> Iterator[dict[str, Any]]:
    """What a training loop has at hand."""
    yield training()


@contextmanager
def with_a_flow() -> Iterator[dict[str, Any]]:
    """A training that was watched."""
    names = training()
    with gradflow.watch(names["model"]) as flow:
        train(names, names["model"])
    yield names | {"flow": flow}


@contextmanager
def on_one_rank() -> Iterator[dict[str, Any]]:
    """A process group of this process alone."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    names = training()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        more = {"train": lambda model: train(names, model)}
        yield names | more | {"DistributedDataParallel": DistributedDataParallel}
    finally:
        distributed.destroy_process_group()


@contextmanager
def in_a_test() -> Iterator[dict[str, Any]]:
    """What a test file has imported."""
    yield {"torch": torch, "MyModel": stack}


@contextmanager
def with_trainers() -> Iterator[dict[str, Any]]:
    """The two libraries with a model, arguments and data."""
    import lightning.pytorch
    import transformers

    args = transformers.TrainingArguments("trainer", report_to=[], use_cpu=True)
    trainers = {"lightning": lightning.pytorch, "transformers": transformers, "args": args}
    yield trainers | {"model": stack(), "data": [SimpleNamespace()]}


WORLDS: dict[str, Callable[[], Any]] = {
    "model, batches, optimizer, criterion": in_a_training,
    "flow": with_a_flow,
    "one rank": on_one_rank,
    "pytest": in_a_test,
    "trainers": with_trainers,
}
