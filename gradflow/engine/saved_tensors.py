"""How many bytes autograd keeps between a unit's forward and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.networks.units.template import Unit


class SavedBytes:
    """Bytes that autograd keeps for a unit's backward, parameters aside.

    Counted once per structure and shape of the stream, in a forward pass of its own: hooks in the
    measured pass would cost time and could hold tensors.
    """

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def of(self, unit: Unit, x: Tensor) -> int:
        """Bytes of the distinct storages that `unit` saves for an input like x."""
        key = (unit.structure, x.shape)
        if key not in self._known:
            self._known[key] = count_saved(unit, x)
        return self._known[key]


def count_saved(unit: Unit, x: Tensor) -> int:
    """Bytes of the distinct storages saved in one forward pass, the unit's parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in unit.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor.detach()
        return tensor.detach()

    branch = x.detach().requires_grad_()
    skip = x.detach().requires_grad_() if unit.shortcut else None  # one leaf each, as in a pass
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unit.evaluate(skip, branch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
