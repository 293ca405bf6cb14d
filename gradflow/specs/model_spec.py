"""A model as it is asked for, `ModelRequest`, and as a run has it, `ModelSpec`. Imports no torch.

Everything that reads a run sees its spec, of a stack or of a model, through `Spec`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.checkpoints import CONFIG, checkpoint_digest
from gradflow.specs.fields import Stored, Whole, check_choice, flag, known_fields, option, typed
from gradflow.specs.stack import StackSpec
from gradflow.specs.stack_fields import DTYPES, LOSS_KINDS
from gradflow.specs.user_files import (
    IMPORT_EXAMPLE,
    ImportTarget,
    LocatedName,
    locate_import,
    located_name,
    names_import,
    without_digest,
)

HF_PREFIX = "hf:"
_OWN_LOSS = "own"
_MODEL_LOSSES = (*LOSS_KINDS, _OWN_LOSS)
# Sizes of the input that gradflow makes for a model of `transformers`, and of the model itself.
_SIZES = ("depth", "width", "batch_size", "seq_len", "image_size")
_SWITCHES = {"true": True, "false": False, "null": None}
_SHAPE = re.compile(r"\d+(,\d+)*")
_SETTING = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ModelRequest(Stored):
    """A model with its input and its loss: everything that decides the numbers but the seed.

    Inputs that gradflow makes have 8 samples of 32 tokens, or of the image size in the model's own
    configuration. A value that breaks a rule raises UsageError, which says what to do.
    """

    model: str = option(
        None, "a model instead of a stack: my_pkg.models:build, models.py:build, hf:gpt2, hf:DIR"
    )
    set: str | None = option(
        None,
        "settings of the model, name=value; several: once for each",
        metavar="NAME=VALUE",
        repeated=True,
    )
    input: str | None = option(
        None,
        "its input: sizes (8,3,32,32), or what yields batches (my_pkg.data:batches)",
        metavar="SIZES|NAME",
        whole=True,
    )
    layers: str | None = option(
        None,
        "its layers by name (blocks.*); found by itself if left out",
        metavar="PATTERN",
        whole=True,
    )
    depth: int | None = None
    width: int | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    image_size: int | None = None
    loss: str = "cotangent"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.model, LocatedName):
            object.__setattr__(self, "model", locate_model(self.model))
        if self.input and names_import(self.input):
            if not isinstance(self.input, LocatedName):
                object.__setattr__(self, "input", locate_import(self.input))
        elif self.input is not None and not isinstance(self.input, LocatedName):
            self._check_shape(self.input)
        for name in _SIZES:
            if getattr(self, name) is not None:
                Whole(1).check(name, getattr(self, name))
        check_choice("--loss", self.loss, _MODEL_LOSSES)
        check_choice("--dtype", self.dtype, DTYPES)
        _ = self.settings
        self._check_fit()

    @property
    def is_from_library(self) -> bool:
        """Whether `transformers` builds the model."""
        return self.model.startswith(HF_PREFIX)

    @property
    def is_own(self) -> bool:
        """Whether code of the user's decides its numbers, which a digest cannot cover."""
        return not self.is_from_library or isinstance(self.input, LocatedName)

    @property
    def title(self) -> str:
        """The model and its departures in a few words."""
        return ", ".join(filter(None, (without_digest(self.model), self.departures)))

    @property
    def departures(self) -> str:
        """Sizes and settings that differ from the model's own; or empty."""
        sizes = {"depth": self.depth, "width": self.width}
        words = [f"{name} {size}" for name, size in sizes.items() if size is not None]
        return ", ".join(words + (self.set or "").split())

    @property
    def settings(self) -> dict[str, Any]:
        """What `set` gives, as Python values: numbers, True, None, lists, else text."""
        return dict(_setting(word) for word in (self.set or "").split())

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Sizes of the input, where the request gives them."""
        if self.input is None or isinstance(self.input, LocatedName) or ":" in self.input:
            return None
        return tuple(map(int, self.input.split(",")))

    @property
    def patterns(self) -> list[str] | None:
        """Patterns of the layers' names, where the request gives them."""
        return None if self.layers is None else re.split(r"[\s,]+", self.layers.strip())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelRequest:
        """Return the request that `to_json` wrote, without the place of the model."""
        known = known_fields(cls, values)
        known["model"] = LocatedName(known["model"])
        if known.get("input") and ":" in known["input"]:
            known["input"] = LocatedName(known["input"])
        return cls(**known)

    @staticmethod
    def _check_shape(text: str) -> None:
        if not _SHAPE.fullmatch(text) or "0" in text.split(","):
            rule = "--input is sizes, or the name of what yields batches"
            raise UsageError(rule, repr(text), "use for example 8,3,32,32 or my_pkg.data:batches")

    def _check_fit(self) -> None:
        if self.is_from_library:
            if self.shape is not None:
                rule = "the input of a hf: model follows from its configuration"
                raise UsageError(rule, f"--input {self.input}", "use --batch-size and --seq-len")
            return
        for name in ("seq_len", "image_size", "batch_size"):
            if getattr(self, name) is not None:
                rule = f"{flag(name)} is for stacks and hf: models"
                raise UsageError(rule, f"--model {without_digest(self.model)}", "use --input")
        if self.input is None:
            rule = "a model of your own needs an input"
            raise UsageError(rule, "none", "add for example --input 8,3,32,32")


def locate_model(text: object) -> LocatedName:
    """Return the name of the model that a word stands for; UsageError where there is none."""
    word = str(text or "").strip()
    if names_import(word):
        return locate_import(word)
    name = word.removeprefix(HF_PREFIX)
    if name == word or not name:
        raise UsageError("--model names a model", repr(word), f"use {IMPORT_EXAMPLE}, or hf:gpt2")
    return LocatedName(word) if re.fullmatch(r"[\w-]+", name) else _locate_folder(name)


def _locate_folder(text: str) -> LocatedName:
    """Return the name of a folder with config.json and safetensors, as Hugging Face has it."""
    folder = Path(text).resolve()
    if not (folder / CONFIG).is_file():
        rule = "hf: names a model type of transformers, one of its classes, or a folder"
        raise UsageError(rule, repr(text), "use for example hf:gpt2, or a folder with config.json")
    return located_name(f"hf:{folder.name}", checkpoint_digest(folder), ImportTarget(folder))


def _setting(word: str) -> tuple[str, Any]:
    match = _SETTING.fullmatch(word)
    if match is None:
        raise UsageError("--set takes name=value", repr(word), "use for example --set n_layer=48")
    name, value = match.groups()
    if value in _SWITCHES:
        return name, _SWITCHES[value]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Stored):
    """A model that was watched, and its layers; every unit has a kind.

    Attributes:
        model: its class.
        units: name of each layer in execution order, joined by spaces; the second call of a module
            is `name#2`.
        kinds: class of each, likewise.
        shape: sizes of the stream at the first layer, joined by x.
        parameters: numbers in the watched layers.
        training: whether the model was in training mode.
        input_has_gradient: whether the input of the first layer takes a gradient.
        loss: what puts the gradient in: the user's own, or the one asked for.
        request: what was asked for, where gradflow made the model.
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

    # A model follows no scheme that options could depart from, and each of its layers is one row.
    scheme = None
    departures = ""
    units_per_block = 1

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
        """Sizes and settings that differ from the model's own; or empty."""
        return self.request.departures if self.request else ""

    @property
    def title(self) -> str:
        """The model and the kinds of its layers."""
        kinds = ", ".join(dict.fromkeys(self.kinds.split()))
        name = f"{self.block} ({self.model})" if self.request else self.model
        return f"{name}, {self.depth} layers ({kinds})"

    @property
    def details(self) -> str:
        """Settings, sizes of the stream, parameters and mode."""
        mode = "training" if self.training else "evaluation"
        asked = f"{self.settings}, " if self.settings else ""
        return f"{asked}stream {self.shape}, {self.parameters:,} parameters watched, {mode} mode"

    @property
    def slug(self) -> str:
        """The model as a part of a folder name."""
        name = re.sub(r"[^A-Za-z0-9_-]+", "-" if self.request else "", self.block).strip("-")
        return f"{name or 'model'}-d{self.depth}"

    def kind_of(self, unit: str) -> str:
        """Return the class of a layer."""
        return self._kinds.get(unit, unit)

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return dict(zip(self.units.split(), self.kinds.split(), strict=True))

    def identity(self) -> dict[str, Any]:
        """Return the values of the request, which decide the rest; else all values."""
        return self.request.identity() if self.request else self.to_json()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Return the spec that `to_json` wrote; UsageError for an unknown field."""
        known = known_fields(cls, values)
        if known.get("request") is not None:
            known["request"] = ModelRequest.from_json(typed(ModelRequest, known["request"]))
        return cls(**known)


# Every reader of runs sees the network of a run as one of these two.
Spec = StackSpec | ModelSpec


def spec_from_json(values: object) -> Spec:
    """Return the spec of a run from its file; the spec of a model has the key `model`.

    A value of another type than its field is a TypeError, one that breaks a rule a UsageError.
    """
    if isinstance(values, dict) and "model" in values:
        plain = {name: value for name, value in values.items() if name != "request"}
        return ModelSpec.from_json(typed(ModelSpec, plain) | {"request": values.get("request")})
    return StackSpec.from_json(typed(StackSpec, values))


def asked_for(spec: Spec | ModelRequest) -> Spec | ModelRequest:
    """Return what a run was made from: the spec of a stack, or the request for a model."""
    return getattr(spec, "request", None) or spec
