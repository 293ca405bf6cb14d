"""How a network is measured: `RunOptions`, frozen, validated, JSON both ways. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.fields import (
    Real,
    Stored,
    Switch,
    Whole,
    check_names,
    check_values,
    flag,
    option,
    options_of,
)
from gradflow.text import size_in_bytes

_KEEPS = ("auto", "graph", "boundaries", "sqrt")
_OPTIMIZERS = ("adamw", "sgd")
_FLAG = Switch("is a flag")
_stack_option = partial(option, built_only=True)
_time_option = partial(option, decides="times")
_memory_option = partial(_stack_option, None, decides="memory")
_training_option = partial(option, None, unkeyed_default=True)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How training steps are made: the options of the same names in `RunOptions`."""

    lr: float
    optimizer: str
    warmup: int
    every: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, from 0: lr (step + 1) / warmup while that rises, then lr."""
        return self.lr * min(1.0, (step + 1) / max(self.warmup, 1))


@dataclass(frozen=True, kw_only=True)
class RunOptions(Stored):
    """How a stack or a model is measured; a value that breaks a rule raises UsageError."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N", decides="place")
    seed: int = option(0, "first seed", values=Whole(0))
    seeds: int = option(1, "number of seeds, counted up from the first", values=Whole(1))
    timing: bool = _time_option(True, "measure forward and backward time per unit", values=_FLAG)
    repeats: int = _time_option(5, "timed repeats at least", values=Whole(1))
    time_budget: float = _time_option(
        1.0, "timed passes go on for at least so many seconds", values=Real()
    )
    together: bool | None = _stack_option(
        None,
        "measure all seeds in one pass (where that pays: several seeds of a narrow stack)",
        decides="times",
        values=_FLAG,
    )
    raw_range: bool = _stack_option(
        False, "do not rescale the gradient: show where the number format itself dies", values=_FLAG
    )
    # Compiled code rounds in other places, so it decides numbers.
    compile: bool = _stack_option(
        False, "compile one unit and use it for all layers", values=_FLAG, unkeyed_default=True
    )
    cuda_graphs: bool | None = _stack_option(
        None,
        "replay passes as CUDA graphs (where a timed stack is narrow, on a GPU)",
        decides="times",
        values=_FLAG,
    )
    keep: str = _stack_option(
        "auto", "what stays in memory for the backward pass", _KEEPS, decides="memory"
    )
    rebuild: bool | None = _memory_option(
        "build each layer again when it is visited, instead of keeping all parameters", values=_FLAG
    )
    memory_limit: str | None = _memory_option(
        "memory the stack may take, for example 4GiB (half of what is free)"
    )
    vanishing: float = option(
        3.0, "decades of shrinking that count as vanishing", decides="verdict", values=Real()
    )
    exploding: float = option(
        3.0, "decades of growth that count as exploding", decides="verdict", values=Real()
    )
    steps: int = option(
        0,
        "training steps on the built-in task; 0 does not train",
        values=Whole(0),
        unkeyed_default=True,
    )
    lr: float | None = _training_option("learning rate (0.001)", values=Real(), fill=1e-3)
    optimizer: str | None = _training_option(
        "what makes the steps (adamw)", _OPTIMIZERS, fill="adamw"
    )
    warmup: int | None = _training_option(
        "steps in which the learning rate rises linearly (0)", values=Whole(0), fill=0
    )
    every: int | None = _training_option(
        "steps from one measurement to the next (10)", values=Whole(1), fill=10
    )

    def __post_init__(self) -> None:
        vars(self).update(_resolved(vars(self)))
        check_names(RunOptions, vars(self))
        self._check_memory_limit()
        if self.compile:
            self._check_initial("compile")
        if self.cuda_graphs:
            self._check_graphs()

    def _check_initial(self, name: str) -> None:
        if self.steps:
            rule = f"{flag(name)} applies to initialisation, not to training"
            raise UsageError(rule, f"--steps {self.steps}", "leave out one of the two")

    def _check_graphs(self) -> None:
        self._check_initial("cuda_graphs")
        if self.keep not in ("auto", "graph") or self.rebuild:
            got = "--rebuild" if self.rebuild else f"--keep {self.keep}"
            raise UsageError("--cuda-graphs keeps the whole stack", got, "leave out one of the two")

    def _check_memory_limit(self) -> None:
        try:
            _ = self.memory_limit_bytes
        except (ValueError, TypeError, OverflowError):
            rule = "--memory-limit is a size: a number with B, KiB, MiB or GiB"
            raise UsageError(rule, self.memory_limit, "use for example 4GiB") from None

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes; None if there is none."""
        return None if self.memory_limit is None else size_in_bytes(self.memory_limit)

    @property
    def is_policy_given(self) -> bool:
        """Whether the memory policy is restricted by more than a limit."""
        return self.keep != "auto" or self.rebuild is not None

    @property
    def training(self) -> Training:
        """How the steps are made; only where `steps` is not 0."""
        return Training(**{name: getattr(self, name) for name in TRAINING_DEFAULTS})

    @property
    def all_seeds(self) -> range:
        """The seeds that are measured, in order."""
        return range(self.seed, self.seed + self.seeds)


# Options that mean something while training only, with the value used there.
TRAINING_DEFAULTS: dict[str, Any] = {
    field.name: about.fill for field, about in options_of(RunOptions) if about.fill is not None
}


def _resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option from those that are given: without steps, the options of training are None."""
    Whole(0).check("steps", given["steps"])
    trained = {name: given[name] for name in TRAINING_DEFAULTS if given[name] is not None}
    if trained and not given["steps"]:
        rule = f"{flag(next(iter(trained)))} applies to training"
        raise UsageError(rule, "--steps 0", "use for example --steps 100")
    values = {**given, **(TRAINING_DEFAULTS | trained if given["steps"] else {})}
    check_values(RunOptions, values)
    return values | ({"lr": float(values["lr"])} if given["steps"] else {})
