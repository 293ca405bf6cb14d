"""What a scheme is: a choice of the template's scalars, norms and weight gains, place by place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradflow.schemes.wiring import Place, Wiring

TOKEN_BLOCKS = ("transformer", "attention", "ffn")
ALL_BUT_RESNET = (*TOKEN_BLOCKS, "mlp", "conv")


def one_stream(_: Place) -> int:
    """Return 1: the unit at this place hands on one stream."""
    return 1


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A published scheme, or a user's own: how every unit of a stack is wired and initialised.

    Attributes:
        equation: one unit, in words and symbols.
        init: the initialisation, in words.
        paper: authors, year, arXiv number.
        claim: what it promises at initialisation, as a law that can be tested.
        wire: the wiring of the unit at a place.
        blocks: the blocks that it is defined on, the usual one first.
        defaults: fields of `StackSpec` that it brings; options override them.
        constants: named numbers at a place, for `gradflow schemes NAME`.
        plain: units have no shortcut.
        normalises: whether it has norms at all.
        final_norm: whether the stream is normalised after the last layer.
        final_activation: whether the activation follows that norm.
        input_norm: what normalises the input: `norm` the stack's own kind, `unit` to length 1.
        input_scale: factor on the input, by depth.
        streams: streams in the output of the unit at a place.
        readout: how several streams become the output, a name of `schemes.READOUTS`.
        profiled: the shortcuts' weights are measured in a forward pass at initialisation.
        lacks: what the paper has, or leaves open, and is not here.
        pitfalls: what goes wrong in public re-implementations.
    """

    equation: str
    init: str
    paper: str
    claim: str
    wire: Callable[[Place], Wiring]
    blocks: tuple[str, ...] = TOKEN_BLOCKS
    defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Callable[[Place], Mapping[str, float]] = lambda _: {}
    plain: bool = False
    normalises: bool = True
    final_norm: bool = False
    final_activation: bool = False
    input_norm: str | None = None
    input_scale: Callable[[int], float] = lambda _: 1.0
    streams: Callable[[Place], int] = one_stream
    readout: str | None = None
    profiled: bool = False
    lacks: tuple[str, ...] = ()
    pitfalls: tuple[str, ...] = ()
