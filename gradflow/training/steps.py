"""Training, with measurements on the way that change nothing in it.

`train` takes any module, its batches and its loss. `TaskNetwork` is a built stack with an entry
and a head for a task of `gradflow.training.tasks`, which both training and the walk engine can run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.engine.tape import Network
from gradflow.engine.walk import walk
from gradflow.networks.ends import ReadoutLoss, build_loss, scaled_input
from gradflow.networks.initial import generator
from gradflow.networks.stack import build_stack
from gradflow.reductions import norm
from gradflow.runs.records import LayerRecord, ParamRecord, StepRecord
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.training.tasks import Batch, Task, build_task

BatchT = TypeVar("BatchT")
Parameters = list[nn.Parameter]

# With torch's own defaults for what is not an option.
_OPTIMIZERS: dict[str, Callable[[Parameters, float], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class TrainingStep:
    """One step: the loss and the gradient before its update, and the update, where there is one.

    Attributes:
        loss: of a new batch.
        grad_norm: over all parameters.
        lr: learning rate of the update.
        update_ratio: norm of the change of the parameters over their norm.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float | None = None
    update_ratio: float | None = None


@dataclass(frozen=True)
class Problem(Generic[BatchT]):
    """A model with its batches and its loss, for `train`.

    Attributes:
        model: any module; its parameters that require a gradient are changed in place.
        batches: one for each step and one more, for the measurement after the last.
        loss: the scalar to minimise, from model and batch.
        begin: called with the number of each step before anything else of it is done.
        constrain: called after every update, as a part of it.
    """

    model: nn.Module
    batches: Iterable[BatchT]
    loss: Callable[[nn.Module, BatchT], Tensor]
    begin: Callable[[int], None] = lambda _: None
    constrain: Callable[[], None] = lambda: None


def train(
    problem: Problem[BatchT],
    options: RunOptions,
    observe: Callable[[int, BatchT], None] = lambda *_: None,
) -> Iterator[TrainingStep]:
    """Train, and measure on the way.

    Steps are 0 to `options.steps`; the last has a loss but no update. A loss that is not finite
    ends the training: nothing after it means anything.

    `observe` is called before the step's own pass with its number and batch, at every `every`-th
    step and at the last; it must leave parameters, their `.grad` and generators alone.

    Yields:
        Every step as it is done.
    """
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    how = options.training
    optimizer = _OPTIMIZERS[how.optimizer](parameters, how.lr)
    for step, batch in zip(range(options.steps + 1), problem.batches, strict=False):
        problem.begin(step)
        due = step % how.every == 0 or step == options.steps
        if due:
            observe(step, batch)
        optimizer.zero_grad()
        loss = problem.loss(problem.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
        value, size = loss.item(), _total([p.grad for p in parameters if p.grad is not None])
        if not math.isfinite(value) and not due:
            observe(step, batch)
        if not math.isfinite(value) or step == options.steps:
            yield TrainingStep(step, value, size)
            return
        lr = how.learning_rate(step)
        ratio = _update(optimizer, parameters, lr, problem.constrain)
        yield TrainingStep(step, value, size, lr, ratio)


def _update(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    lr: float,
    constrain: Callable[[], None],
) -> float | None:
    """Make one step and return |change| / |parameters|; None where all parameters are 0."""
    before = [p.detach().clone() for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    constrain()
    size = _total(before)
    change = [p.detach() - old for p, old in zip(parameters, before, strict=True)]
    return _total(change) / size if size else None


def _total(tensors: list[Tensor]) -> float:
    """Return the norm over the elements of all tensors."""
    if not tensors:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([norm(x) for x in tensors])))


class TaskNetwork(nn.Module):
    """A stack between the entry and the head of its task; forward gives the loss of a batch.

    Tokens enter by a trained embedding with standard normal weights, and without positions, which a
    Markov source does not need; samples enter as they are. The head is that of the `ce` loss.
    """

    def __init__(self, spec: StackSpec, seed: int, device: torch.device) -> None:
        super().__init__()
        self.spec, self.seed = spec, seed
        self.embedding = _embedding(spec, seed, device) if spec.kind.domain == "tokens" else None
        self.blocks = build_stack(spec, seed, device)
        self.layers = nn.ModuleList(self.blocks)  # a list alone would not register them
        self.head = build_loss(spec, seed, device)

    def enter(self, batch: Batch) -> Tensor:
        """Return y_0, the input of the first layer, of a batch."""
        x = batch.x if self.embedding is None else F.embedding(batch.x, self.embedding)
        return scaled_input(self.spec, x)

    def forward(self, batch: Batch) -> Tensor:
        y = self.enter(batch)
        for block in self.blocks:
            y = block(y)
        self._label(batch)
        return self.head(y)

    def _label(self, batch: Batch) -> None:
        """Give the batch's labels to the classifier, behind whatever makes one of many streams."""
        head = self.head.loss if isinstance(self.head, ReadoutLoss) else self.head
        head.labels = batch.labels

    def begin(self, step: int) -> None:
        """Let the units draw what they draw for each step."""
        for layer, block in enumerate(self.blocks, 1):
            for unit in block.units:
                unit.begin(self.seed, layer, step)

    def constrain(self) -> None:
        """Let the units bring their weights back to their constraints."""
        for block in self.blocks:
            for unit in block.units:
                unit.constrain()

    def network(self, batch: Batch) -> Network:
        """Return the pass of a batch for the walk engine, with the parameters as they are."""
        self._label(batch)
        for block in self.blocks:
            for unit in block.units:
                unit.seal()
        return Network(self.blocks, self.enter(batch).detach(), self.head)


def _embedding(spec: StackSpec, seed: int, device: torch.device) -> nn.Parameter:
    """Return a standard normal embedding (classes, width): y_0 is as large as any stack's."""
    weight = torch.empty(spec.classes, spec.width, device=device)
    weight.normal_(generator=generator(device, seed, "embedding"))
    return nn.Parameter(weight.to(getattr(torch, spec.dtype)))


@dataclass(frozen=True)
class TrainedSeed:
    """The rows that training one seed gives: layers, parameters and steps."""

    layers: list[LayerRecord]
    params: list[ParamRecord]
    steps: list[StepRecord]


def train_stack(
    spec: StackSpec,
    seed: int,
    device: torch.device,
    options: RunOptions,
    tick: Callable[[], None] = lambda: None,
) -> TrainedSeed:
    """Train one seed of a stack on its task, and measure it on the way.

    The spec is that of `training_spec.as_trained`; the seed is that of weights and batches. `tick`
    is called once per step.
    """
    task, trained = build_task(spec, device), TrainedSeed([], [], [])
    model = TaskNetwork(spec, seed, device)

    def observe(step: int, batch: Batch) -> None:
        walked = walk(spec, seed, model.network(batch), raw_range=options.raw_range)
        layers, params = walked.records()
        trained.layers.extend(replace(row, step=step) for row in layers)
        trained.params.extend(replace(row, step=step) for row in params)

    batches = (task.batch(seed, step) for step in range(options.steps + 1))
    problem = Problem(model, batches, nn.Module.__call__, model.begin, model.constrain)
    for step in train(problem, options, observe):
        trained.steps.append(step_record(seed, step, task))
        tick()
    return trained


def step_record(seed: int, step: TrainingStep, task: Task | None) -> StepRecord:
    """Return a row of `steps.csv`; floor and chance are the task's, where there is one."""
    floor, chance = (None, None) if task is None else (task.floor, task.chance)
    return StepRecord(seed=seed, loss_floor=floor, loss_chance=chance, **vars(step))
