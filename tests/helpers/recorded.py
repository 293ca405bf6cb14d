"""A CUDA graph on the CPU: operations with their tensors, done again in the same memory.

As on the device, what a capture leaves behind holds nothing of use until a replay, and nothing may
be read while it goes on. Unlike there, the work is done while it is recorded; so all that it wrote
is overwritten with other numbers afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Found = TypeVar("Found")
GARBAGE = 77


class WaitError(RuntimeError):
    """What torch says where work that is captured waits for the device."""


def waits(func: Any) -> bool:
    """Whether the host reads values: what is returned, or its shape, depends on them."""
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(tags & set(func.tags))


def draws(func: Any, args: Any) -> bool:
    """Whether it takes random numbers; attention takes none where nothing is dropped."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    return "dropout_p" not in {a.name for a in func._schema.arguments} or bool(
        given.get("dropout_p", 0.0)
    )


def tensors(*parts: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]


class NoReading(TorchDispatchMode):
    """What reads a value, or copies between devices, raises; random numbers as well."""

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func) or draws(func, args):
            raise WaitError(f"{func} in a pass that is captured")
        found = func(*args, **kwargs)
        # A number on the host may go into a kernel as an argument.
        places = {x.device.type for x in tensors(args, kwargs, found) if x.ndim}
        if len(places) > 1:
            raise WaitError(f"{func} copies between {places} in a pass that is captured")
        return found


@dataclass
class Step:
    """One operation; `out` are the tensors that it made, not those that it changed in place."""

    func: Any
    args: Any
    kwargs: Any
    out: list[Tensor]

    def again(self) -> None:
        with torch.no_grad():
            for old, new in zip(self.out, self.fresh(), strict=True):
                old.copy_(new)

    def fresh(self) -> list[Tensor]:
        return made(self.func, self.func(*self.args, **self.kwargs))


def made(func: Any, found: Any) -> list[Tensor]:
    """The results that have memory of their own."""
    results = found if isinstance(found, tuple) else (found,)
    returns = func._schema.returns
    if len(returns) != len(results):  # a list of tensors, all alike
        results, returns = tree_leaves(found), [returns[0]] * len(tree_leaves(found))
    pairs = zip(results, returns, strict=True)
    return [x for x, one in pairs if isinstance(x, Tensor) and one.alias_info is None]


class Recorder(NoReading):
    """Notes every operation."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self._steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        self._steps.append(Step(func, args, kwargs or {}, made(func, found)))
        return found


@dataclass
class FakeCapture:
    """A `Capture` for tests; the log tells what was asked of it.

    Attributes:
        broken: the capture fails with this reason.
    """

    broken: str | None = None
    log: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def warm_up(self, work: Callable[[], object]) -> None:
        self.log.append("warm-up")
        work()

    def capture(self, work: Callable[[], Found]) -> Callable[[], Found]:
        self.log.append("capture")
        if self.broken:
            self._fail()
        steps: list[Step] = []
        with Recorder(steps):
            found = work()
        for x in everything(steps):
            x.data.fill_(GARBAGE)
        self.steps = steps

        def replay() -> Found:
            self.log.append("replay")
            for step in steps:
                step.again()
            return found

        return replay

    def _fail(self) -> None:
        """As torch does: the end of a failed capture fails too."""
        try:
            raise RuntimeError(f"CUDA error: {self.broken}\nCompile with TORCH_USE_CUDA_DSA")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")


def everything(steps: list[Step]) -> Iterator[Tensor]:
    """All that was written."""
    for step in steps:
        yield from step.out
