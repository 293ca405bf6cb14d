"""How a unit is wired: the template that about twenty published schemes fill in, as data.

    x' = Np(a x + b No(f(c Ni(x))))

f is the branch; the norms N and the scalars a, b, c are the scheme. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Where a unit can normalise.
NORM_PLACES = {
    "in": "the branch's input (Ni)",
    "branch": "the branch's output, before the addition (No)",
    "out": "after the addition (Np)",
    "mid": "inside the branch, before its output projection",
    "query-key": "queries and keys, per head",
    "value": "values, per head",
    "shared": "the unit's input, for shortcut and branch alike",
}

# What b is, where it is no constant.
LEARNED = {
    "scalar": "one parameter for the unit",
    "shared scalar": "one parameter for all units of the block",
    "vector": "a parameter per feature",
}

# The output projection of a branch that has several matrices.
OUTPUT_PROJECTIONS = {"resnet": "conv2", "ffn": "down", "attention": "out"}


@dataclass(frozen=True)
class Place:
    """The place of a unit in its stack.

    Attributes:
        depth: layers (blocks) in the stack.
        layer: its block, from 1.
        unit: its number in the block, from 0.
        units: units per block.
        kind: its branch: `mlp`, `attention`, ...
    """

    depth: int
    layer: int
    unit: int
    units: int
    kind: str

    @property
    def total(self) -> int:
        """Return the number of units (sub-layers) in the whole stack."""
        return self.depth * self.units

    @property
    def index(self) -> int:
        """Return the number of the unit in the whole stack, from 1."""
        return (self.layer - 1) * self.units + self.unit + 1


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How one unit is wired: the scalars, norms and gains of the template.

    Attributes:
        a: weight of the shortcut; 0 = plain, no shortcut.
        b: weight of the branch's output; where `learned`, its initial value.
        c: weight of the branch's input.
        learned: one of `LEARNED`, or None: b is a constant.
        norms: places of `NORM_PLACES` that are normalised.
        kinds: kind of norm at a place, where it is not the stack's own.
        alpha: of the pointwise kinds dyt and derf.
        logit_power: attention's logits are q.k / c^logit_power, c the features of a head.
        gains: factors on the standard deviation of the branch's matrices, by name; 0 = zero.
        unit: its kind, a name of `schemes.UNIT_KINDS`; `template` computes the equation above.
        settings: what the other kinds need, see `UnitKind.settings`.
    """

    a: float = 1.0
    b: float = 1.0
    c: float = 1.0
    learned: str | None = None
    norms: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    alpha: float = 0.5
    logit_power: float = 0.5
    gains: Mapping[str, float] = field(default_factory=dict)
    unit: str = "template"
    settings: Mapping[str, Any] = field(default_factory=dict)
