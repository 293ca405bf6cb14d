"""What a published claim is, as data, and how it is held against measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from gradflow.schemes import SCHEMES
from gradflow.specs.stack import StackSpec

# A number of one seed of a stack.
Reading = Callable[[StackSpec, int], float]


@dataclass(frozen=True)
class Expected:
    """Where a mean over seeds has to lie: from `low` to `high`, in words `text`."""

    low: float
    high: float
    text: str

    def holds(self, value: float) -> bool:
        """Whether it lies there; what is not a number never does."""
        return self.low <= value <= self.high


def about(value: float, within: float, name: str = "") -> Expected:
    """A value with its tolerance; `name` says how the value comes about."""
    shown = f"{name} = {value:.4g}" if name else f"{value:.4g}"
    return Expected(value - within, value + within, f"{shown} ± {within:g}")


def exactly(value: float) -> Expected:
    """This value, to the last bit."""
    return Expected(value, value, f"{value:g} exactly")


def at_most(value: float) -> Expected:
    """An upper bound."""
    return Expected(-math.inf, value, f"at most {value:g}")


def at_least(value: float) -> Expected:
    """A lower bound."""
    return Expected(value, math.inf, f"at least {value:g}")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number of a claim.

    Attributes:
        name: what it is, with what sets it apart from the claim's other numbers.
        options: of the stack, fields of `StackSpec`.
        read: the number of one seed.
        expected: what the paper, or its formula, says of the mean over the seeds.
        wrong: options in their place that make another network: a negative control, which must
            not agree.
    """

    name: str
    options: Mapping[str, Any]
    read: Reading
    expected: Expected
    wrong: Mapping[str, Any]

    @property
    def spec(self) -> StackSpec:
        """The stack."""
        return StackSpec(**self.options)

    @property
    def wrong_spec(self) -> StackSpec:
        """The control."""
        return StackSpec(**{**self.options, **self.wrong})

    @property
    def is_there(self) -> bool:
        """Whether this version has the scheme."""
        return self.options.get("scheme") in {None, *SCHEMES}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim.

    Attributes:
        title: whose it is, and of what.
        source: paper and arXiv number.
        setting: the network and what is read off it.
        says: what the paper says.
        quantities: the numbers that decide.
        seeds: how many.
        note: what else a reader must know, for instance why it does not agree.
    """

    title: str
    source: str
    setting: str
    says: str
    quantities: Sequence[Quantity]
    seeds: int = 3
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A quantity beside its measurement; `control` is what the wrong network gives."""

    quantity: Quantity
    values: Sequence[float]
    control: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation of one seed."""
        return stdev(self.values)

    @property
    def agrees(self) -> bool:
        """Whether the mean lies where the claim has it."""
        return self.quantity.expected.holds(self.mean)

    @property
    def tells_apart(self) -> bool:
        """Whether the control does not."""
        return not self.quantity.expected.holds(self.control)


def hold(quantity: Quantity, seeds: int) -> Finding:
    """Measure a quantity, and its control with one seed."""
    values = [quantity.read(quantity.spec, seed) for seed in range(seeds)]
    return Finding(quantity, values, quantity.read(quantity.wrong_spec, 0))
