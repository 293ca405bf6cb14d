"""What is measured: `StackSpec`, frozen, validated, JSON both ways. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradflow.specs.checkpoints import Pretrained
from gradflow.specs.fields import Stored, flag, known_fields
from gradflow.specs.published_shapes import SHAPES, changed
from gradflow.specs.resolve import GivenStack, resolve
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack_fields import StackFields
from gradflow.specs.stack_rules import check_fit, check_unit, check_user_code
from gradflow.specs.user_files import without_digest


@dataclass(frozen=True, kw_only=True)
class StackSpec(StackFields):
    """One network with its input and loss: everything that decides the gradients but the seed.

    It is made from the options that are given, and holds what `resolve` makes of them. A value
    that breaks a rule raises UsageError, which says what to do.
    """

    input_has_gradient = True  # the engines take the gradient at the input of every stack

    def __post_init__(self) -> None:
        vars(self).update(resolve(GivenStack(vars(self))))
        check_fit(self)
        if not self.is_stored(self.scheme):
            check_unit(self, self.wiring(1, 0))  # a scheme refuses what it is not defined for
        check_user_code(self)

    @property
    def departures(self) -> str:
        """Options in place of what the scheme brings: `init he in place of xavier`; or empty."""
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
        """The published shape or the checkpoint, with the options that differ from it; or empty."""
        if self.weights:
            return f"trained weights {self.weights}"
        if self.like is None:
            return ""
        values = changed(self.like, vars(self))
        others = " ".join(f"{flag(k)} {without_digest(str(v))}" for k, v in values.items())
        shape = f"shape of {self.like}, {SHAPES[self.like].source}"
        return f"{shape}; but for {others}" if others else shape

    @property
    def _design(self) -> str:
        block = without_digest(self.block)
        if self.scheme is not None:
            kind = f"{self.norm_kind}, " if self.norm_kind else ""
            return f"{without_digest(self.scheme)} {block}, {kind}depth {self.depth}"
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

    def kind_of(self, unit: str) -> str:
        """Return the branch of a unit; units of one branch can be compared with each other."""
        return unit

    @property
    def slug(self) -> str:
        """The stack as a part of a folder name."""
        design = without_digest(self.scheme or f"{self.shortcut}-{self.norm}")
        text = f"{self._model or without_digest(self.block)}-{design}-d{self.depth}"
        return re.sub(r"[^\w.-]+", "-", text)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StackSpec:
        """Return the spec that `to_json` wrote; UsageError for an unknown field."""
        known = known_fields(cls, values)
        if known.get("weights") is not None and not isinstance(known["weights"], Pretrained):
            known["weights"] = Pretrained(known["weights"])  # its folder was not stored
        return cls(**known)


def run_key(spec: Stored, options: RunOptions) -> str:
    """Return eight hexadecimal digits that name the numbers of a run, timings aside."""
    text = json.dumps({"spec": spec.identity(), **options.identity()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
