"""Blocks that a model calls again and again: what no list shows, and only a run tells.

ALBERT has one block for all its layers; universal transformers and other recurrences have one for
all their steps. Where no modules repeat, every one that could be such a block is watched beside
the layers that were found without it, until the model has run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from gradflow.torch_internals import registered
from gradflow.watching.calls import Pass
from gradflow.watching.discovery import LISTS, Place


def candidates(model: nn.Module, places: Sequence[Place]) -> list[Place]:
    """The modules, beside the layers, that may turn out to be called again."""
    known = {id(place.module) for place in places}
    named = ((name, module) for name, module in model.named_modules() if name)
    return [Place(name, m) for name, m in named if id(m) not in known and _is_block(m)]


def _is_block(module: nn.Module) -> bool:
    """Whether it can be called, and has parts and parameters."""
    return (
        bool(registered(module))
        and not isinstance(module, LISTS)
        and next(module.parameters(), None) is not None
    )


def called_again(places: Sequence[Place], passes: Sequence[Pass]) -> list[int]:
    """The blocks that were called again on what has the shape of their output; the outermost."""
    again = {
        call.place
        for one in passes
        for call in one.calls
        if call.number and call.keeps_shape and _is_block(places[call.place].module)
    }
    names = {places[i].name for i in again}
    return sorted(i for i in again if not _is_inside(places[i].name, names))


def _is_inside(name: str, others: Collection[str]) -> bool:
    """Whether a module lies in one of the others."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))
