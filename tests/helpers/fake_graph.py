"""What a CUDA graph does, on CPU: operations noted once, and run again at the same addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class FakeGraph(TorchDispatchMode):
    """Notes every operation while it is entered; nothing that was there before is changed by that.

    Attributes:
        capturing: what `is_capturing` has to say.
        operations: the function, what it was given, and what it returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.capturing = False
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> FakeGraph:
        self.capturing = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.capturing = False
        for whole, values in self._before.values():
            whole.copy_(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._note(tensors((args, kwargs)))
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        found = func(*args, **kwargs)
        made = {t.untyped_storage().data_ptr() for t in tensors(found)} - given
        self._own |= made
        self.operations.append((func, args, kwargs, found))
        return found

    def _note(self, given: list[Tensor]) -> None:
        """Remember what memory that was there before has held."""
        for x in given:
            place = x.untyped_storage().data_ptr()
            if place not in self._own and place not in self._before:
                whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                self._before[place] = whole, whole.clone()

    @torch.no_grad()
    def replay(self) -> None:
        """Run everything again; the tensors are those of the capture."""
        for func, args, kwargs, before in self.operations:
            found = func(*args, **kwargs)
            for old, new in zip(tensors(before), tensors(found), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
