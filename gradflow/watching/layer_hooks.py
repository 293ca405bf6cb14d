"""Hooks on the layers, and the tap that goes into compiled graphs.

Run by Python, a layer's forward hooks note its tensors and put tensor hooks on them. Inside
`torch.compile` the same hooks are traced: there the tensor passes an operator that is opaque to the
compiler, so that nothing breaks the graph. When the graph runs, that operator calls the same
recorder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradflow.torch_internals import Hook, in_backward
from gradflow.watching.discovery import WatchedLayer, exchanged, stream_of
from gradflow.watching.distributed import class_of
from gradflow.watching.recorder import LayerCall, Recorder, Tap, WatchedPass


class CompiledTaps:
    """The recorder as compiled graphs see it: they know indices of layers, not tensors to hook."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.ran = False  # a tap, inside a compiled graph
        # For the input (True) or output (False) of each layer, the taps whose gradient has not
        # come, newest last: backward goes through the calls in reverse.
        self.waiting: dict[tuple[int, bool], list[tuple[WatchedPass, Tap]]] = {}

    def forward(self, x: Tensor, place: int, *, entering: bool, graph: bool) -> None:
        """Measure the input or output of a layer; `graph` says whether it requires a gradient."""
        self.ran = True
        if in_backward() or not self.recorder.watches() or not x.numel():
            return
        if place not in self.recorder.kept:
            return
        current = self.recorder.current()
        tap = self.recorder.tap(current, x)
        tap.hooked = graph
        if entering:
            current.entered.append(LayerCall(place, current.counted(place), tap))
        else:
            current.complete(self._call(current, place), tap)
        if graph:
            passes = self.recorder.passes  # the taps of passes that are over are given up
            waiting = self.waiting.get((place, entering), [])
            waiting = [item for item in waiting if item[0] in passes]
            self.waiting[place, entering] = [*waiting, (current, tap)]

    def backward(self, g: Tensor, place: int, *, entering: bool) -> None:
        """Measure the gradient of an input or output of a layer."""
        waiting = self.waiting.get((place, entering))
        if waiting:
            owner, tap = waiting.pop()
            self.recorder.gradient(owner, tap, g)

    def forget_graphs(self) -> None:
        """Have torch compile everything again if there are taps in a graph."""
        if self.ran:
            torch.compiler.reset()

    def _call(self, current: WatchedPass, place: int) -> LayerCall:
        """The call that returns; without an own input, x is the output of the layer before."""
        call = current.returned(place)
        if call is None:
            call = LayerCall(place, current.counted(place))
            before = self.recorder.layers[place].previous
            call.x = next((c.y for c in reversed(current.calls) if c.place == before), None)
        return call


_LIVE: dict[int, CompiledTaps] = {}
_NUMBERS = count()


# Taps call Python and keep what they find: reduce-overhead captures what lies between them.
_OUTSIDE_GRAPHS = torch.Tag.cudagraph_unsafe


@torch.library.custom_op("gradflow::tap", mutates_args=(), tags=_OUTSIDE_GRAPHS)
def _tap(x: Tensor, watcher: int, place: int, entering: bool, graph: bool) -> Tensor:
    if watcher in _LIVE:
        _LIVE[watcher].forward(x, place, entering=entering, graph=graph)
    return x.clone()


@torch.library.custom_op("gradflow::tap_gradient", mutates_args=(), tags=_OUTSIDE_GRAPHS)
def _tap_gradient(g: Tensor, watcher: int, place: int, entering: bool) -> Tensor:
    if watcher in _LIVE:
        _LIVE[watcher].backward(g, place, entering=entering)
    return g.clone()


_tap.register_fake(lambda x, *numbers: torch.empty_like(x))
_tap_gradient.register_fake(lambda g, *numbers: torch.empty_like(g))


def _keep_numbers(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch gives it)
    ctx.numbers = inputs[1:4]


def _pass_on(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _tap_gradient(g, *ctx.numbers), None, None, None, None


_tap.register_autograd(_pass_on, setup_context=_keep_numbers)


@contextmanager
def installed(model: nn.Module, recorder: Recorder) -> Iterator[CompiledTaps]:
    """Hook the model and its layers; all hooks are gone at the end, whatever happens."""
    number, taps = next(_NUMBERS), CompiledTaps(recorder)
    _LIVE[number] = taps
    with ExitStack() as stack:
        stack.callback(_LIVE.pop, number)
        for handle in _handles(model, recorder, number):
            stack.callback(handle.remove)
        yield taps


@dataclass(eq=False)
class _BeforeModel(Hook):
    """Begins a pass when the model itself is called, and not a copy of it."""

    model: nn.Module
    recorder: Recorder

    def __call__(self, called: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and called is self.model:
            self.recorder.begin()


class _AfterModel(_BeforeModel):
    """Ends a pass when the model itself has returned."""

    def __call__(self, called: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and called is self.model:
            self.recorder.end()


@dataclass(eq=False)
class _LayerHook(Hook):
    layer: nn.Module
    recorder: Recorder
    watcher: int
    place: int


@dataclass(eq=False)
class _BeforeLayer(_LayerHook):
    """Sees the input of a layer; `first` says that it is no other layer's output."""

    first: bool

    def __call__(self, called: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            if called is self.layer:
                self.recorder.enter(self.place, (args, kwargs))
            return None
        if not self.first:
            return None
        return _tapped((args, kwargs), self.watcher, self.place, entering=True)


class _AfterLayer(_LayerHook):
    """Sees the output of a layer."""

    def __call__(self, called: nn.Module, args: Any, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            if called is self.layer:
                self.recorder.leave(self.place, output)
            return None
        x = stream_of(args)
        shape = None if x is None else x.shape
        return _tapped(output, self.watcher, self.place, entering=False, shape=shape)


def _handles(model: nn.Module, recorder: Recorder, watcher: int) -> Iterator[RemovableHandle]:
    yield _BeforeModel(model, recorder).put(model.register_forward_pre_hook, prepend=True)
    yield _AfterModel(model, recorder).put(model.register_forward_hook)
    for place, layer in enumerate(recorder.layers):
        yield from _on_layer(layer, recorder, watcher, place)


def _on_layer(
    layer: WatchedLayer, recorder: Recorder, watcher: int, place: int
) -> Iterator[RemovableHandle]:
    module = layer.module
    before = _BeforeLayer(module, recorder, watcher, place, first=layer.previous is None)
    # `fully_shard` exchanges what the layer is given: this hook sees it before.
    prepend = class_of(module) is not type(module)
    yield before.put(module.register_forward_pre_hook, with_kwargs=True, prepend=prepend)
    yield _AfterLayer(module, recorder, watcher, place).put(module.register_forward_hook)


def _tapped(
    value: Any, watcher: int, place: int, *, entering: bool, shape: torch.Size | None = None
) -> Any:
    """A value with its stream led through a tap; None where there is nothing to watch."""
    x = stream_of(value, shape)
    if x is None or not torch.is_grad_enabled():
        return None
    graph = x.requires_grad
    return exchanged(value, x, lambda x: _tap(x, watcher, place, entering, graph))
