"""Finds what to watch in a model: the modules that are layers, and the stream among their tensors.

Layers are the modules that a pattern names, or the repeated blocks. The stream is the main tensor
among those that a layer takes or returns, in a tuple, a dictionary or a dataclass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradflow.errors import UsageError
from gradflow.torch_internals import registered
from gradflow.watching.distributed import class_of

# Containers of modules that are never called.
_UNCALLED = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (nn.Sequential, *_UNCALLED)
# The names that libraries give the stream, where a container holds several tensors.
_STREAM_NAMES = ("last_hidden_state", "hidden_states", "hidden_state")
# Names of modules that an error lists.
_NAMES_SHOWN = 12


@dataclass(frozen=True)
class WatchedLayer:
    """One watched module, with its dotted name as in `named_modules`: the first if it has several.

    `previous` is the index, in the list of layers, of the sibling that runs before this one; None
    where there is no such sibling.
    """

    name: str
    module: nn.Module
    previous: int | None = None

    @property
    def kind(self) -> str:
        """Name of the module's class."""
        return class_of(self.module).__name__


def unit_name(name: str, call: int) -> str:
    """Return the name of a row: the module's, with `#2`, `#3`, ... from its second call on."""
    joined = "_".join(name.split())
    return joined if call == 0 else f"{joined}#{call + 1}"


def find_layers(model: nn.Module, patterns: Sequence[str] | None = None) -> list[WatchedLayer]:
    """Return the modules to watch.

    With patterns, these are all modules whose dotted name fits one; `*` stands for one part of a
    name or a piece of it, `**` for any number of parts.

    Without patterns, these are the repeated blocks. A run of sibling modules of one type is
    repetition, and so is a list of modules in which a type occurs twice, as in hybrid models.
    Siblings that are plain containers, or most of which differ in the shapes of their parameters,
    are stages if they hold runs themselves; then those runs count. Modules without children make a
    run only where no others do. A model without repetition is watched at its top-level children.

    Raises:
        UsageError: a pattern fits no module.
    """
    if patterns is not None:
        return _as_layers(_matching(model, patterns))
    blocks = _blocks(model, "", leaves=False) or _blocks(model, "", leaves=True)
    return _as_layers(blocks or _top(model))


def repeats(model: nn.Module) -> bool:
    """Return whether modules with children are repeated in a model: those are its layers then."""
    return bool(_blocks(model, "", leaves=False))


_Named = list[tuple[str, nn.Module]]


def _as_layers(named: _Named) -> list[WatchedLayer]:
    """Each module once; neighbours in a run know each other."""
    layers: list[WatchedLayer] = []
    known: set[int] = set()
    for name, module in named:
        if id(module) not in known:
            known.add(id(module))
            layers.append(WatchedLayer(name, module, _previous(layers, name)))
    return layers


def _previous(layers: Sequence[WatchedLayer], name: str) -> int | None:
    """Index of the last layer, if its name differs in one number by one."""
    if not layers:
        return None
    before, here = layers[-1].name.split("."), name.split(".")
    pairs = [(a, b) for a, b in zip(before, here, strict=False) if a != b]
    if len(before) != len(here) or len(pairs) != 1:
        return None
    ((a, b),) = pairs
    together = a.isdigit() and b.isdigit() and int(b) == int(a) + 1
    return len(layers) - 1 if together else None


def _matching(model: nn.Module, patterns: Sequence[str]) -> _Named:
    named = [(n, m) for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)]
    for pattern in patterns:
        if not any(fits(name, pattern) for name, _ in named):
            names = ", ".join(name for name, _ in named[:_NAMES_SHOWN])
            remedy = f"known: {names or 'none: watch it as a whole'}"
            raise UsageError("layers= names modules of the model", pattern, remedy)
    return [(n, m) for n, m in named if any(fits(n, pattern) for pattern in patterns)]


def fits(name: str, pattern: str) -> bool:
    """Return whether a dotted name fits a pattern, part by part."""
    return _fits(name.split("."), pattern.split("."))


def _fits(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_fits(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _fits(parts[1:], patterns[1:])


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """All children under all their names: a module that is listed three times runs three times."""
    for name, child in registered(module).items():
        if child is not None:
            yield f"{prefix}.{name}" if prefix else name, child


def _blocks(module: nn.Module, prefix: str, *, leaves: bool, staged: bool = False) -> _Named:
    """The repeated blocks below a module, in the order of registration.

    In a stage (`staged`) a list with a single member is a stage of one block.
    """
    blocks: _Named = []
    alone = staged and not leaves and isinstance(module, _CONTAINERS) and len(module) == 1
    for run in _runs(module, prefix):
        if (len(run) > 1 or alone) and _can_repeat(run[0][1], module, leaves=leaves):
            blocks += _run(run, leaves=leaves, staged=staged)
        else:
            for name, child in run:
                blocks += _blocks(child, name, leaves=leaves, staged=staged)
    return blocks


def _runs(module: nn.Module, prefix: str) -> list[_Named]:
    """Neighbours of one type; a list in which a type repeats is one run whatever is between."""
    children = list(_children(module, prefix))
    kinds = {class_of(m) for _, m in children}
    if isinstance(module, nn.ModuleList) and len(kinds) < len(children):
        return [children]
    return [list(group) for _, group in groupby(children, key=lambda item: class_of(item[1]))]


def _can_repeat(child: nn.Module, parent: nn.Module, *, leaves: bool) -> bool:
    if not leaves:
        return bool(registered(child))
    has_parameters = next(child.parameters(), None) is not None
    return has_parameters and isinstance(parent, _CONTAINERS)


def _run(run: _Named, *, leaves: bool, staged: bool) -> _Named:
    """The members of a run, or the blocks that are repeated in them where they are stages.

    There are no stages in stages: the first of two blocks may have a projection.
    """
    if (staged or _mostly_alike(run)) and class_of(run[0][1]) not in _CONTAINERS:
        return run
    inner = [_blocks(module, name, leaves=leaves, staged=True) for name, module in run]
    members = [item for own, member in zip(inner, run, strict=True) for item in own or [member]]
    return [(name, module) for name, module in members if not isinstance(module, _UNCALLED)]


def _mostly_alike(run: _Named) -> bool:
    """Whether most members have a twin: some may have experts where others have none."""
    counts = Counter(_shapes(module) for _, module in run)
    return 2 * sum(n for n in counts.values() if n > 1) >= len(run)


def _shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    known = ((name, p) for name, p in module.named_parameters() if not is_lazy(p))
    return tuple((name, tuple(p.shape)) for name, p in known)


def _top(model: nn.Module) -> _Named:
    """The top-level children; a wrapper with one child counts as that child."""
    prefix = ""
    while len(registered(model)) == 1:
        ((prefix, child),) = _children(model, prefix)
        if not registered(child):
            break
        model = child
    return list(_callable(model, prefix)) or [(class_of(model).__name__, model)]


def _callable(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module; lists and dictionaries give way to their own children."""
    for name, child in _children(module, prefix):
        if isinstance(child, _UNCALLED):
            yield from _callable(child, name)
        else:
            yield name, child


# Blocks that a model calls again and again, as ALBERT does for all its layers, and universal
# transformers for all their steps: no list of modules shows them, but only a run. Where no modules
# repeat, every module that could be one is watched beside the layers, until the model has run.


def candidates(model: nn.Module, layers: Sequence[WatchedLayer]) -> list[WatchedLayer]:
    """Return the modules, beside the layers, that may turn out to be called again."""
    known = {id(layer.module) for layer in layers}
    named = ((name, module) for name, module in model.named_modules() if name)
    return [WatchedLayer(name, m) for name, m in named if id(m) not in known and _is_block(m)]


def outermost_blocks(layers: Sequence[WatchedLayer], places: Collection[int]) -> list[int]:
    """Return those indices of layers whose modules are blocks and lie inside no other of them."""
    again = [i for i in sorted(places) if _is_block(layers[i].module)]
    names = {layers[i].name for i in again}
    return [i for i in again if not _is_inside(layers[i].name, names)]


def _is_block(module: nn.Module) -> bool:
    """Whether a module can be called, and has children and parameters."""
    callable_ = bool(registered(module)) and not isinstance(module, _UNCALLED)
    return callable_ and next(module.parameters(), None) is not None


def _is_inside(name: str, others: Collection[str]) -> bool:
    """Whether a module lies in one of others, by their dotted names."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield every tensor in a value through which a gradient can flow, the likeliest stream first.

    Such a tensor is dense, and floating or complex.
    """
    if isinstance(value, Tensor):
        if value.layout == torch.strided and (value.is_floating_point() or value.is_complex()):
            yield value
    elif isinstance(value, Mapping):
        named = [value[name] for name in _STREAM_NAMES if name in value]
        for item in (*named, *value.values()):
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors({f.name: getattr(value, f.name) for f in fields(value)})


def stream_of(value: object, shape: torch.Size | None = None) -> Tensor | None:
    """Return the first tensor of this shape in a value, else the first; None if it holds none."""
    candidates = _tensors(value)
    first = next(candidates, None)
    if shape is None or first is None or first.shape == shape:
        return first
    return next((x for x in candidates if x.shape == shape), first)


def exchanged(value: Any, old: Tensor, make: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with the tensor `old` in it replaced by `make(old)`, all else as it was."""
    if value is old:
        return make(old)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(exchanged(item, old, make) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(exchanged(item, old, make) for item in value)
    if isinstance(value, Mapping) and any(item is old for item in value.values()):
        items = {name: exchanged(item, old, make) for name, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in fields(value)}
        changed = {n: exchanged(v, old, make) for n, v in held.items() if v is old}
        return replace(value, **changed) if changed else value
    return value
