"""Blocks that a model calls again and again, which no list of modules shows, but only a run.

ALBERT has one block for all its layers; universal transformers and other recurrences have one for
all their steps. Where no modules repeat, every module that could be such a block is watched beside
the layers that were found without it, until the model has run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from gradflow.torch_internals import registered
from gradflow.watching.discovery import UNCALLED, WatchedLayer
from gradflow.watching.recorder import WatchedPass


def candidates(model: nn.Module, layers: Sequence[WatchedLayer]) -> list[WatchedLayer]:
    """Return the modules, beside the layers, that may turn out to be called again."""
    known = {id(layer.module) for layer in layers}
    named = ((name, module) for name, module in model.named_modules() if name)
    return [WatchedLayer(name, m) for name, m in named if id(m) not in known and _is_block(m)]


def _is_block(module: nn.Module) -> bool:
    """Whether a module can be called, and has children and parameters."""
    return (
        bool(registered(module))
        and not isinstance(module, UNCALLED)
        and next(module.parameters(), None) is not None
    )


def called_again(layers: Sequence[WatchedLayer], passes: Sequence[WatchedPass]) -> list[int]:
    """Return the indices of the outermost blocks that one pass has called more than once.

    A call counts only if its input has the shape of its output, as one step of a recurrence has.
    """
    again = {
        call.place
        for one in passes
        for call in one.calls
        if call.number and call.keeps_shape and _is_block(layers[call.place].module)
    }
    names = {layers[i].name for i in again}
    return sorted(i for i in again if not _is_inside(layers[i].name, names))


def _is_inside(name: str, others: Collection[str]) -> bool:
    """Whether a module lies in one of others, by their dotted names."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))
