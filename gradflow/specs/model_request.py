"""A model of somebody's own, or of `transformers`, as it is asked for. Torch-free."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.fields import Whole, check_choice, flag, keyed, known_fields, option
from gradflow.specs.located import EXAMPLE, Located, is_reference, locate_code, locate_folder
from gradflow.specs.stack_fields import DTYPES, LOSSES

LIBRARY = "hf:"
OWN_LOSS = "own"
MODEL_LOSSES = (*LOSSES, OWN_LOSS)
# Sizes of the input that gradflow makes for a model of `transformers`, and of the model itself.
SIZES = ("depth", "width", "batch_size", "seq_len", "image_size")
SWITCHES = {"true": True, "false": False, "null": None}
_SHAPE = re.compile(r"\d+(,\d+)*")
_SETTING = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A model with its input and its loss: everything that decides the numbers but the seed.

    Attributes:
        batch_size: of inputs that gradflow makes: 8 samples. `seq_len` (32) and `image_size`, that
            of the model's own configuration, likewise.

    Raises:
        UsageError: a value breaks a rule; the message says which and what to do.
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
        if not isinstance(self.model, Located):
            object.__setattr__(self, "model", locate_model(self.model))
        if self.input and is_reference(self.input):
            if not isinstance(self.input, Located):
                object.__setattr__(self, "input", locate_code(self.input))
        elif self.input is not None and not isinstance(self.input, Located):
            self._check_shape(self.input)
        for name in SIZES:
            if getattr(self, name) is not None:
                Whole(1).check(name, getattr(self, name))
        check_choice("--loss", self.loss, MODEL_LOSSES)
        check_choice("--dtype", self.dtype, DTYPES)
        _ = self.settings
        self._check_fit()

    @property
    def is_from_library(self) -> bool:
        """Whether `transformers` builds it."""
        return self.model.startswith(LIBRARY)

    @property
    def is_own(self) -> bool:
        """Whether code of the user's decides its numbers, which a digest cannot cover."""
        return not self.is_from_library or isinstance(self.input, Located)

    @property
    def title(self) -> str:
        """In a few words."""
        return ", ".join(filter(None, (without_digest(self.model), self.departures)))

    @property
    def departures(self) -> str:
        """Where it departs from what the model is by itself; or empty."""
        sizes = {"depth": self.depth, "width": self.width}
        words = [f"{name} {size}" for name, size in sizes.items() if size is not None]
        return ", ".join(words + (self.set or "").split())

    @property
    def settings(self) -> dict[str, Any]:
        """What `set` gives, as Python values: numbers, True, None, lists, else text."""
        return dict(_setting(word) for word in (self.set or "").split())

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Sizes of the input, where they are given."""
        if self.input is None or isinstance(self.input, Located) or ":" in self.input:
            return None
        return tuple(map(int, self.input.split(",")))

    @property
    def patterns(self) -> list[str] | None:
        """Names of the layers, where they are given."""
        return None if self.layers is None else re.split(r"[\s,]+", self.layers.strip())

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_json` takes."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """The values that decide the numbers, by field."""
        return keyed(ModelRequest, self.to_json())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelRequest:
        """The request that `to_json` wrote; where its model lies was not stored.

        Raises:
            UsageError: an unknown field, or a value that breaks a rule.
        """
        known = known_fields(cls, values)
        known["model"] = Located(known["model"])
        if known.get("input") and ":" in known["input"]:
            known["input"] = Located(known["input"])
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


def locate_model(text: object) -> Located:
    """The model that a word names.

    Raises:
        UsageError: it names none, or no such module, file or folder is there.
    """
    word = str(text or "").strip()
    if is_reference(word):
        return locate_code(word)
    name = word.removeprefix(LIBRARY)
    if name == word or not name:
        raise UsageError("--model names a model", repr(word), f"use {EXAMPLE}, or hf:gpt2")
    return Located(word) if re.fullmatch(r"[\w-]+", name) else locate_folder(name)


def without_digest(name: str) -> str:
    """A model's name as a person wrote it."""
    return name.rpartition("@")[0] or name


def _setting(word: str) -> tuple[str, Any]:
    match = _SETTING.fullmatch(word)
    if match is None:
        raise UsageError("--set takes name=value", repr(word), "use for example --set n_layer=48")
    name, value = match.groups()
    if value in SWITCHES:
        return name, SWITCHES[value]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value
