"""What every memory policy must give alike."""

from __future__ import annotations

from gradflow.engine.tape import Network
from gradflow.engine.walk import walk
from gradflow.specs.stack import StackSpec

SPANS = {"boundaries": (1,), "segments": (2,), "nested": (3, 1), "thrice": (4, 2, 1), "one": (9,)}


def numbers(spec: StackSpec, net: Network, spans: tuple[int, ...] = ()) -> str:
    """Everything that a walk finds, to the last bit (NaN is NaN)."""
    found = walk(spec, 0, net, spans=spans)
    return repr((found.records(), found.loss.item()))
