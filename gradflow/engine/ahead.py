"""Work on a second CUDA stream, beside that of the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Ahead(Protocol):
    """Does work beside the pass. The pass must not touch what it writes before it has waited."""

    def owns(self, tensors: Iterable[Tensor]) -> None:
        """The work will write into these, so their memory outlives it."""

    def start(self, work: Callable[[], None]) -> Any:
        """Begin once all that was issued before is done; returns what to wait for."""

    def wait(self, done: Any) -> None:
        """What is issued from now on comes after that work."""


class CudaAhead:
    """A second stream; nothing here waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's stubs

    def owns(self, tensors: Iterable[Tensor]) -> None:
        """Tell the allocator, or it could give the memory away while the work still runs."""
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def start(self, work: Callable[[], None]) -> torch.cuda.Event:
        """An event behind the work."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
            return self._stream.record_event()

    def wait(self, done: torch.cuda.Event) -> None:
        """In the stream of the pass."""
        torch.cuda.current_stream(self._device).wait_event(done)


def ahead_on(device: torch.device) -> Ahead | None:
    """None on CPU, where all cores are busy with the pass."""
    return CudaAhead(device) if device.type == "cuda" else None
