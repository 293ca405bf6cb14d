"""What a kind of unit is: every fact of it that needs no torch, in one row.

The rows stand beside the schemes whose units they are; `gradflow.schemes.UNIT_KINDS` gathers them.
A row names its implementation, so that a new kind is a row and a file in `networks/units`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradflow.schemes.scheme import TOKEN_BLOCKS, one_stream
from gradflow.schemes.wiring import Place, Wiring

Settings = Mapping[str, Any]


def is_first(place: Place) -> dict[str, bool]:
    """Return the setting `first`: whether the unit makes the streams from the stack's input."""
    return {"first": place.index == 1}


@dataclass(frozen=True, kw_only=True)
class UnitKind:
    """One kind of unit, whose name in `UNIT_KINDS` is a value of `Wiring.unit`.

    Attributes:
        implementation: `module:class` of its subclass of `networks.units.template.Unit`.
        settings: names that `Wiring.settings` must have.
        placed: the settings that the unit's place decides, with their values.
        counts: settings that are whole numbers, each with its least and its largest value as a
            function of all settings.
        blocks: the blocks that the kind is defined on; None = all.
        streams: streams in its output, by place, where no setting `streams` says it.
        readout: how its paper makes the output of several streams, a name of `READOUTS`.
        fixed_options: options that the unit has in a form of its own, each with the value that
            describes this form; None = the option does not apply.
        has_own_shortcut: whether a is 1 because the unit's own equation says how it adds.
        carries_values: whether its state holds attention's values, which are then as wide as the
            stream.
        draws_each_step: whether it draws numbers beyond its weights.
        profiled: whether a forward pass at initialisation measures its shortcut's weight.
    """

    implementation: str
    settings: tuple[str, ...] = ()
    placed: Callable[[Place], Settings] = lambda _: {}
    counts: Mapping[str, Callable[[Settings], tuple[int, float]]] = field(default_factory=dict)
    blocks: tuple[str, ...] | None = TOKEN_BLOCKS
    streams: Callable[[Place], int] = one_stream
    readout: str | None = None
    fixed_options: Mapping[str, Any] = field(default_factory=dict)
    has_own_shortcut: bool = True
    carries_values: bool = False
    draws_each_step: bool = False
    profiled: bool = False

    @property
    def has_streams(self) -> bool:
        """Tell whether units of the kind hand on several streams."""
        return "streams" in self.settings or self.streams is not one_stream

    def streams_after(self, place: Place, wiring: Wiring) -> int:
        """Return the number of streams in the output of a unit of this kind."""
        if "streams" in self.settings:
            return int(wiring.settings["streams"])
        return self.streams(place)

    @property
    def has_biases(self) -> bool:
        """Tell whether the linear maps of its branches may have biases."""
        return self.fixed_options.get("bias") != "none"


@dataclass(frozen=True)
class Readout:
    """How several streams (B, n, T, d) become the output (B, T, d).

    Attributes:
        implementation: `module:class` of a module that is made from a `StackSpec`.
        streams: the number n that it takes; None = any.
    """

    implementation: str
    streams: int | None = None


TEMPLATE_UNIT = UnitKind(
    implementation="gradflow.networks.units.template:Unit",
    blocks=None,
    has_own_shortcut=False,
)
