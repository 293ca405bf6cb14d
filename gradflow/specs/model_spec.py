"""What a run of somebody's own model is about: `ModelSpec`, and what it has in common with stacks.

Everything that reads a run sees its spec through `Spec`. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

from gradflow.errors import UsageError
from gradflow.specs.fields import Whole, known_fields
from gradflow.specs.json_types import typed
from gradflow.specs.model_request import ModelRequest, without_digest
from gradflow.specs.stack import StackSpec


class Spec(Protocol):
    """What the readers of runs ask of a spec."""

    @property
    def depth(self) -> int:
        """Number of layers."""
        ...

    @property
    def block(self) -> str | None:
        """What a layer is, or the model."""
        ...

    @property
    def scheme(self) -> str | None:
        """The published recipe, where there is one."""
        ...

    @property
    def departures(self) -> str:
        """Where options replace what the scheme brings; or empty."""
        ...

    @property
    def dtype(self) -> str:
        """Number format of the stream."""
        ...

    @property
    def loss(self) -> str:
        """What puts the gradient in."""
        ...

    @property
    def units_per_block(self) -> int:
        """Rows of one layer."""
        ...

    @property
    def input_has_gradient(self) -> bool:
        """Whether the input takes a gradient: if not, profiles begin at layer 1."""
        ...

    @property
    def title(self) -> str:
        """In a few words, for headings."""
        ...

    @property
    def details(self) -> str:
        """The rest, in one line."""
        ...

    @property
    def slug(self) -> str:
        """As a part of a folder name."""
        ...

    def kind_of(self, unit: str) -> str:
        """The kind of a unit: those of one kind can be compared with each other."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that decide the numbers, with the options."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that was watched, and its layers.

    Attributes:
        model: its class.
        units: name of each layer in execution order, joined by spaces; the second call of a module
            is `name#2`.
        kinds: class of each, likewise.
        shape: sizes of the stream at the first layer, joined by x.
        dtype: number format of the stream.
        parameters: numbers in the watched layers.
        training: whether the model was in training mode.
        input_has_gradient: whether the input of the first layer takes a gradient.
        loss: what puts the gradient in: the user's own, or the one asked for.
        request: what was asked for, where gradflow made the model.

    Raises:
        UsageError: no layers, or not as many kinds as units.
    """

    model: str
    units: str
    kinds: str
    shape: str
    dtype: str
    parameters: int
    training: bool = True
    input_has_gradient: bool = True
    loss: str = "own"
    request: ModelRequest | None = None

    def __post_init__(self) -> None:
        Whole(1).check("depth", self.depth)
        if len(self.units.split()) != len(self.kinds.split()):
            raise UsageError("every unit has a kind", self.kinds, "give as many kinds as units")

    @property
    def depth(self) -> int:
        """Number of watched layers; one that is called twice counts twice."""
        return len(self.units.split())

    @property
    def block(self) -> str:
        """The model as it was asked for, or its class."""
        return without_digest(self.request.model) if self.request else self.model

    @property
    def settings(self) -> str:
        """Where it departs from what the model is by itself; or empty."""
        return self.request.departures if self.request else ""

    @property
    def scheme(self) -> None:
        """A model follows none."""
        return

    @property
    def departures(self) -> str:
        """Nothing to depart from."""
        return ""

    @property
    def units_per_block(self) -> int:
        """Every layer is one row."""
        return 1

    @property
    def title(self) -> str:
        """The model and its layers."""
        kinds = ", ".join(dict.fromkeys(self.kinds.split()))
        name = f"{self.block} ({self.model})" if self.request else self.model
        return f"{name}, {self.depth} layers ({kinds})"

    @property
    def details(self) -> str:
        """The stream and the size."""
        mode = "training" if self.training else "evaluation"
        asked = f"{self.settings}, " if self.settings else ""
        return f"{asked}stream {self.shape}, {self.parameters:,} parameters watched, {mode} mode"

    @property
    def slug(self) -> str:
        """The model as a part of a folder name."""
        name = re.sub(r"[^A-Za-z0-9_-]+", "-" if self.request else "", self.block).strip("-")
        return f"{name or 'model'}-d{self.depth}"

    def kind_of(self, unit: str) -> str:
        """The class of a layer."""
        return self._kinds.get(unit, unit)

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return dict(zip(self.units.split(), self.kinds.split(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_json` takes."""
        return asdict(self) | {"request": self.request.to_json() if self.request else None}

    def identity(self) -> dict[str, Any]:
        """What was asked for decides the rest."""
        return self.request.identity() if self.request else self.to_json()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The spec that `to_json` wrote.

        Raises:
            UsageError: an unknown field, or a value that breaks a rule.
        """
        known = known_fields(cls, values)
        if known.get("request") is not None:
            known["request"] = ModelRequest.from_json(typed(ModelRequest, known["request"]))
        return cls(**known)


def spec_from_json(values: object) -> StackSpec | ModelSpec:
    """The spec of a run as its file has it: that of a model names the model.

    Raises:
        UsageError: an unknown field, or a value that breaks a rule.
        TypeError: a value of another type than its field.
    """
    if isinstance(values, dict) and "model" in values:
        plain = {name: value for name, value in values.items() if name != "request"}
        return ModelSpec.from_json(typed(ModelSpec, plain) | {"request": values.get("request")})
    return StackSpec.from_json(typed(StackSpec, values))


def asked_for(spec: Spec | ModelRequest) -> Spec | ModelRequest:
    """What a run was made from: the spec of its stack, or the request for its model."""
    return getattr(spec, "request", None) or spec
