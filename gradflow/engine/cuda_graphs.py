"""Passes that are captured once as CUDA graphs and replayed: what `--cuda-graphs` does.

In a narrow stack a kernel takes less time than its launch; a graph launches all kernels of a pass
at once, the same as in the eager pass. Passes can be captured because they read nothing from the
device: what they return are tensors and events, to be read after a replay. Each seed is captured
anew, and with it what differs beside the weights, such as the coins of stochastic depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from gradflow.engine.timing import collector_paused
from gradflow.errors import MeasurementError, first_line
from gradflow.specs.run_options import RunOptions
from gradflow.torch_internals import release_graph_pool

_ResultT = TypeVar("_ResultT")


class Capture(Protocol):
    """Makes work on a device repeatable without issuing it from Python."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work once, eagerly, so that libraries load and allocate what they need."""

    def capture(self, work: Callable[[], _ResultT]) -> Callable[[], _ResultT]:
        """Record what the work issues, without doing it.

        Returns:
            A function that does the work; it returns what the work returned, with new values.

        Raises:
            RuntimeError: the work waits for the device, or does what no graph can hold.
        """


class CudaCapture:
    """CUDA graphs, each with a memory pool of its own.

    Warm-up and capture share a stream, so that the workspaces that libraries keep for it are not
    allocated in a pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's stubs

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work on the stream of the capture; the current stream goes on after it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], _ResultT]) -> Callable[[], _ResultT]:
        """Capture the work as a graph, which is replayed in the stream that is current then."""
        # The outer stream context: that of torch's own does not end where a capture fails.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), collector_paused():
            graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            with _given_back(pool), torch.cuda.graph(graph, pool=pool, stream=self._stream):
                result = work()
        return _Replay(graph, work, result)


@dataclass(frozen=True)
class _Replay(Generic[_ResultT]):
    """A graph; `work` holds the tensors that it reads, and `result` the tensors that it fills."""

    graph: torch.cuda.CUDAGraph
    work: Callable[[], _ResultT]
    result: _ResultT

    def __call__(self) -> _ResultT:
        self.graph.replay()
        return self.result


@contextmanager
def _given_back(pool: tuple[int, int]) -> Iterator[None]:
    """Give the pool back if the capture inside fails, which torch itself leaves undone."""
    try:
        yield
    except RuntimeError:
        release_graph_pool(torch.cuda.current_device(), pool)
        raise


class Graphs:
    """Captures passes as CUDA graphs until one cannot be captured; a `timing.Repeat`.

    Args:
        capture: makes work repeatable.
        required: whether a pass that cannot be captured is an error; if not, it runs eagerly, and
            so do all passes after it.

    Attributes:
        captured: number of passes that were captured.
        failure: why a pass could not be captured; None if all were.
    """

    def __init__(self, capture: Capture, *, required: bool) -> None:
        self._capture, self._required = capture, required
        self._warm: set[object] = set()
        self.captured = 0
        self.failure: str | None = None

    def __call__(self, work: Callable[[], _ResultT], /) -> Callable[[], _ResultT]:
        """Return the work as a graph, or as it is where it cannot be captured.

        Raises:
            MeasurementError: the work cannot be captured, but is required to be.
        """
        if self.failure:
            return work
        self._warm_up(work)
        try:
            replay = self._capture.capture(work)
        except RuntimeError as error:
            self.failure = first_line(_cause(error))
            if self._required:
                what = "--cuda-graphs could not capture a pass"
                raise MeasurementError(f"{what}: {self.failure}; leave it out") from None
            return work
        self.captured += 1
        return replay

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines that the run shows: why passes ran eagerly."""
        said = "a pass could not be captured as a CUDA graph, and ran eagerly"
        return (f"{said}: {self.failure}; --no-cuda-graphs runs all so",) if self.failure else ()

    def _warm_up(self, work: Callable[[], object]) -> None:
        """Warm up once for each kind of pass: the next seed has the same kernels."""
        kind = work.func if isinstance(work, partial) else work
        if kind not in self._warm:
            self._capture.warm_up(work)
            self._warm.add(kind)


def _cause(error: BaseException) -> BaseException:
    """Return the first of two errors: ending a failed capture fails too, with less to say."""
    return error.__context__ if isinstance(error.__context__, RuntimeError) else error


def graphs_on(device: torch.device, options: RunOptions) -> Graphs:
    """Return what captures the passes on a CUDA device."""
    return Graphs(CudaCapture(device), required=bool(options.cuda_graphs))
