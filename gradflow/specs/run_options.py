"""How a network is measured: `RunOptions`, frozen, validated, JSON both ways. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.fields import (
    at_least,
    check_choice,
    flag,
    known_fields,
    option,
    options_of,
    positive,
)
from gradflow.text import size_in_bytes

KEEPS = ("auto", "graph", "boundaries", "sqrt")
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a spec is measured.

    Raises:
        UsageError: a value breaks a rule.
    """

    device: str = option("auto", "auto, cpu, cuda or cuda:N", decides="place")
    seed: int = option(0, "first seed")
    seeds: int = option(1, "number of seeds, counted up from the first")
    timing: bool = option(True, "measure forward and backward time per unit", decides="times")
    repeats: int = option(5, "timed repeats at least", decides="times")
    time_budget: float = option(
        1.0, "timed passes go on for at least so many seconds", decides="times"
    )
    together: bool | None = option(
        None,
        "measure all seeds in one pass (where that pays: several seeds of a narrow stack)",
        decides="times",
        built_only=True,
    )
    raw_range: bool = option(
        False,
        "do not rescale the gradient: show where the number format itself dies",
        built_only=True,
    )
    # Compiled code rounds in other places.
    compile: bool = option(
        False,
        "compile one unit and use it for all layers",
        built_only=True,
        unkeyed_default=True,
    )
    cuda_graphs: bool | None = option(
        None,
        "replay passes as CUDA graphs (where a timed stack is narrow, on a GPU)",
        decides="times",
        built_only=True,
    )
    keep: str = option(
        "auto",
        "what stays in memory for the backward pass",
        KEEPS,
        decides="memory",
        built_only=True,
    )
    rebuild: bool | None = option(
        None,
        "build each layer again when it is visited, instead of keeping all parameters",
        decides="memory",
        built_only=True,
    )
    memory_limit: str | None = option(
        None,
        "memory the stack may take, for example 4GiB (half of what is free)",
        decides="memory",
        built_only=True,
    )
    vanishing: float = option(
        3.0, "decades of shrinking that count as vanishing", decides="verdict"
    )
    exploding: float = option(3.0, "decades of growth that count as exploding", decides="verdict")
    steps: int = option(
        0, "training steps on the built-in task; 0 does not train", unkeyed_default=True
    )
    lr: float | None = option(None, "learning rate (0.001)", fill=1e-3, unkeyed_default=True)
    optimizer: str | None = option(
        None, "what makes the steps (adamw)", OPTIMIZERS, fill="adamw", unkeyed_default=True
    )
    warmup: int | None = option(
        None, "steps in which the learning rate rises linearly (0)", fill=0, unkeyed_default=True
    )
    every: int | None = option(
        None, "steps from one measurement to the next (10)", fill=10, unkeyed_default=True
    )

    def __post_init__(self) -> None:
        self._resolve_training()
        at_least(self, "seed", 0)
        at_least(self, "seeds", 1)
        at_least(self, "repeats", 1)
        for name in ("time_budget", "vanishing", "exploding"):
            positive(self, name)
        check_choice("--keep", self.keep, KEEPS)
        if not isinstance(self.together, bool | None):
            raise UsageError(
                "--together is a flag", self.together, "use --together or --no-together"
            )
        self._check_memory()
        self._check_compile()
        self._check_graphs()

    def _check_compile(self) -> None:
        if not isinstance(self.compile, bool):
            raise UsageError("--compile is a flag", self.compile, "use --compile or --no-compile")
        if self.compile and self.steps:
            rule = "--compile applies to initialisation, not to training"
            raise UsageError(rule, f"--steps {self.steps}", "leave out one of the two")

    def _check_graphs(self) -> None:
        if not isinstance(self.cuda_graphs, bool | None):
            raise UsageError(
                "--cuda-graphs is a flag", self.cuda_graphs, "use --cuda-graphs or --no-cuda-graphs"
            )
        if not self.cuda_graphs:
            return
        remedy = "leave out one of the two"
        if self.steps:
            rule = "--cuda-graphs applies to initialisation, not to training"
            raise UsageError(rule, f"--steps {self.steps}", remedy)
        if self.keep not in ("auto", "graph") or self.rebuild:
            got = "--rebuild" if self.rebuild else f"--keep {self.keep}"
            raise UsageError("--cuda-graphs keeps the whole stack", got, remedy)

    def _check_memory(self) -> None:
        if not isinstance(self.rebuild, bool | None):
            raise UsageError("--rebuild is a flag", self.rebuild, "use --rebuild or --no-rebuild")
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

    def _resolve_training(self) -> None:
        """The options of training: their defaults, or none where nothing is trained."""
        at_least(self, "steps", 0)
        for name, default in TRAINING_DEFAULTS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default if self.steps else None)
            elif not self.steps:
                rule = f"{flag(name)} applies to training"
                raise UsageError(rule, "--steps 0", "use for example --steps 100")
        if self.steps:
            check_choice("--optimizer", self.optimizer, OPTIMIZERS)
            positive(self, "lr")
            object.__setattr__(self, "lr", float(self.lr or 0))
            at_least(self, "warmup", 0)
            at_least(self, "every", 1)

    @property
    def all_seeds(self) -> range:
        """Every seed that is measured."""
        return range(self.seed, self.seed + self.seeds)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunOptions:
        """The options that `to_json` wrote.

        Raises:
            UsageError: an unknown field, or a value that breaks a rule.
        """
        return cls(**known_fields(cls, values))


# Options that mean something while training only, with the value used there.
TRAINING_DEFAULTS: dict[str, Any] = {
    field.name: about.fill for field, about in options_of(RunOptions) if about.fill is not None
}
