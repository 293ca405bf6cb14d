"""What is measured: `StackSpec`, frozen, validated, JSON both ways. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from gradflow.errors import UsageError
from gradflow.specs import user_code
from gradflow.specs.checkpoint_folders import Pretrained, locate
from gradflow.specs.fields import flag, keyed, known_fields, options_of
from gradflow.specs.fixed_options import check_norm_kind, check_unit, own_forms
from gradflow.specs.published_shapes import SHAPES, changed, missing
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack_fields import BLOCK_OPTIONS, DEFAULT_BLOCK, StackFields
from gradflow.specs.stack_rules import (
    check_fit,
    check_name,
    check_numbers,
    check_scheme_options,
    check_stored,
    check_user_code,
)


class Storable(Protocol):
    """What a key can be made of."""

    def identity(self) -> dict[str, Any]:
        """Plain values that decide the numbers, with the options."""
        ...


@dataclass(frozen=True, kw_only=True)
class StackSpec(StackFields):
    """One network with its input and loss: everything that decides the gradients but the seed.

    Options left at None take the value of the published shape (`like`), if there is one, or the
    default of the scheme, the block or the option (`BLOCKS`, `DOMAINS`, `Option.fill`);
    options that a block does not have stay None.

    Raises:
        UsageError: a value breaks a rule; the message says which and what to do.
    """

    def __post_init__(self) -> None:
        check_stored(self)
        self._resolve_weights()
        self._resolve_shape()
        self._resolve_design()
        for name in ("block", "shortcut", "norm", "norm_kind", "init", "bias", "loss", "dtype"):
            check_name(self, name)
        self._resolve_details()
        check_name(self, "activation")
        check_numbers(self)
        # 2 and 2.0 are one network, so they have one key.
        for name in ("gain", "weight_var", "bias_var", "norm_eps", "rope"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        check_fit(self)
        if not self.is_stored(self.scheme):
            check_unit(self, self.wiring(1, 0))  # a scheme refuses what it is not defined for
        check_user_code(self)

    def _resolve_weights(self) -> None:
        """The fields that a trained checkpoint decides; others than its own are refused."""
        if self.weights is None:
            return
        if not isinstance(self.weights, Pretrained):
            object.__setattr__(self, "weights", locate(self.weights))
        for name in ("like", "scheme", "init", "weight_var", "bias_var"):
            if getattr(self, name) is not None:
                raise UsageError(
                    "--weights has values of its own", flag(name), f"leave out {flag(name)}"
                )
        own = {"block": DEFAULT_BLOCK, "shortcut": "residual"} | self.checkpoint.fields
        for name, value in own.items():
            given = getattr(self, name)
            if given not in (None, value):
                rule = f"--weights {self.weights} has {flag(name)} {value}"
                raise UsageError(rule, f"{flag(name)} {given}", f"leave out {flag(name)}")
            object.__setattr__(self, name, value)

    def _resolve_shape(self) -> None:
        """The fields that a published shape brings; all are transformers."""
        if self.like is None or self.is_stored(self.scheme):
            return
        values = missing(self.like, vars(self))
        self._resolve("block", DEFAULT_BLOCK)
        check_name(self, "block")
        # What a scheme brings goes before the published shape.
        own = self.scheme_record.defaults if self.scheme else {}
        # Last the kind of norm, which queries and keys may need.
        for name, value in sorted(values.items(), key=lambda item: item[0] == "norm_kind"):
            fits = name not in BLOCK_OPTIONS or name in self.kind.options
            idle = name == "norm_kind" and not self._has_norms
            if fits and not idle and name not in own:
                self._resolve(name, value)

    def _resolve_details(self) -> None:
        """The sizes, and the defaults that depend on the block and its norms."""
        for field, about in options_of(self):
            if not about.of_block:
                self._resolve(field.name, about.fill)
        self._resolve("activation", self.kind.activation)
        for name, value in own_forms(self).items():
            self._resolve(name, value)
        self._resolve_norm_kind()
        self._resolve("batch_size", self.domain.batch_size)
        for name, default in BLOCK_OPTIONS.items():
            if name in self.kind.options and not (name == "ffn_mult" and self.ffn_width):
                self._resolve(name, default)

    def _resolve_norm_kind(self) -> None:
        """That of the stream's domain; none without norms."""
        if self._has_norms:
            self._resolve("norm_kind", self.domain.norm_kind)
            return
        check_norm_kind(self)
        object.__setattr__(self, "norm_kind", None)

    @property
    def _has_norms(self) -> bool:
        """Of the units, or of queries and keys."""
        return self.normalises or bool(self.qk_norm)

    def _resolve_design(self) -> None:
        """The fields that a scheme decides, or their defaults where there is none."""
        if self.scheme is None:
            defaults = {"block": DEFAULT_BLOCK, "shortcut": "residual", "norm": "pre"}
            defaults |= {} if self.weights else {"init": "he"}
        elif self.is_stored(self.scheme):
            defaults = {}
        else:
            check_scheme_options(self, self.scheme_record)
            shortcut = "plain" if self.scheme_record.plain else "residual"
            own = {"block": self.scheme_record.blocks[0], "shortcut": shortcut, "init": "he"}
            defaults = own | dict(self.scheme_record.defaults)
        for name, value in defaults.items():
            self._resolve(name, value)

    def _resolve(self, name: str, default: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    @property
    def departures(self) -> str:
        """Where options replace what the scheme brings: `init he in place of xavier`; or empty."""
        if self.scheme is None or self.is_stored(self.scheme):
            return ""
        brought = dict(self.scheme_record.defaults)
        if "init" in brought:  # these three change what such an init says
            brought = {"weight_var": None, "bias_var": None, "gain": 1.0} | brought
        parts = {name: (getattr(self, name), own) for name, own in brought.items()}
        return "; ".join(
            f"{name.replace('_', ' ')} {given} in place of {'none' if own is None else own}"
            for name, (given, own) in sorted(parts.items())
            if given != own
        )

    @property
    def title(self) -> str:
        """The stack in a few words, for headings."""
        return f"{self._model}: {self._design}" if self._model else self._design

    @property
    def _model(self) -> str | None:
        """The published shape, or the name of the checkpoint."""
        return self.checkpoint.name if self.weights else self.like

    @property
    def origin(self) -> str:
        """Whose shape or values it has, and where it departs from them; empty where nobody's."""
        if self.weights:
            return f"trained weights {self.weights}"
        if self.like is None:
            return ""
        values = changed(self.like, vars(self))
        others = " ".join(f"{flag(k)} {user_code.shown(str(v))}" for k, v in values.items())
        shape = f"shape of {self.like}, {SHAPES[self.like].source}"
        return f"{shape}; but for {others}" if others else shape

    @property
    def _design(self) -> str:
        block = user_code.shown(str(self.block))
        if self.scheme is not None:
            kind = f"{self.norm_kind}, " if self.norm_kind else ""
            return f"{user_code.shown(self.scheme)} {block}, {kind}depth {self.depth}"
        norm = "no norm" if self.norm == "none" else f"{self.norm}-{self.norm_kind}"
        return f"{self.shortcut} {block}, {norm}, depth {self.depth}"

    @property
    def details(self) -> str:
        """Sizes, activation and initialisation, in one line."""
        size = {
            "vectors": f"{self.batch_size} vectors",
            "tokens": f"{self.batch_size} x {self.seq_len} tokens",
            "images": f"{self.batch_size} images of {self.image_size} x {self.image_size}",
        }[self.kind.domain]
        init = f", init {self.init}" if self.init else ""
        return f"width {self.width}, {size}, {self.activation}{init}"

    @property
    def input_has_gradient(self) -> bool:
        """The engines take the gradient at the input of every stack."""
        return True

    def kind_of(self, unit: str) -> str:
        """Units of one branch can be compared with each other."""
        return unit

    @property
    def slug(self) -> str:
        """The stack as a part of a folder name."""
        design = user_code.shown(self.scheme or f"{self.shortcut}-{self.norm}")
        text = f"{self._model or user_code.shown(str(self.block))}-{design}-d{self.depth}"
        return re.sub(r"[^\w.-]+", "-", text)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_json` takes."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The values that decide the numbers, by field."""
        return keyed(self, self.to_json())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StackSpec:
        """The spec that `to_json` wrote.

        Raises:
            UsageError: an unknown field, or a value that breaks a rule.
        """
        known = known_fields(cls, values)
        if known.get("weights") is not None and not isinstance(known["weights"], Pretrained):
            known["weights"] = Pretrained(known["weights"])  # its folder was not stored
        return cls(**known)


def run_key(spec: Storable, options: RunOptions) -> str:
    """Eight hexadecimal digits that name the numbers a run will hold, timings aside."""
    numbers = keyed(options, options.to_json())
    text = json.dumps({"spec": spec.identity(), **numbers}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
