"""Hooks on modules that copies of a model do not take along, neither in memory nor in a file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch.utils.hooks import RemovableHandle


class Hook:
    """A hook on a module. A copy of the module, in memory or in a file, has one that does nothing.

    That one needs no gradflow where it is read: it is the end of an empty `with` block, which takes
    any arguments and returns None.
    """

    handle: RemovableHandle

    def put(self, register: Callable[..., RemovableHandle], **how: Any) -> RemovableHandle:
        """Register this hook; returns what removes it."""
        self.handle = register(self, **how)
        return self.handle

    def __reduce__(self) -> tuple[Any, ...]:
        # With the handle, so that torch gives its number to no later hook of the copy, which
        # would be called like this one.
        return getattr, (nullcontext(self.handle), "__exit__")
