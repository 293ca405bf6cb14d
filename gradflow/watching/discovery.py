"""Which modules of a model are its layers: those that a pattern names, or the repeated blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from torch import nn
from torch.nn.parameter import is_lazy

from gradflow.errors import UsageError
from gradflow.torch_internals import registered
from gradflow.watching.ranks import class_of

# These are never called.
LISTS = (nn.ModuleList, nn.ModuleDict)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SHOWN = 12


@dataclass(frozen=True)
class Place:
    """One watched module.

    Attributes:
        name: dotted, as in `named_modules`; of several names of a shared module the first.
        previous: place in the list of the sibling that runs before it, if it is one of a run.
    """

    name: str
    module: nn.Module
    previous: int | None = None

    @property
    def kind(self) -> str:
        """The class of the module."""
        return class_of(self.module).__name__


def unit_name(name: str, call: int) -> str:
    """Name of a row: that of the module, and which call it is from the second on."""
    joined = "_".join(name.split())
    return joined if call == 0 else f"{joined}#{call + 1}"


def find_layers(model: nn.Module, patterns: Sequence[str] | None = None) -> list[Place]:
    """The modules to watch.

    With patterns: all whose dotted name fits one; `*` stands for one part of a name, or a piece of
    it, `**` for any number of parts.

    Without: the repeated blocks. A run of sibling modules of one type is repetition, and so is a
    list of modules in which a type occurs twice, as in hybrid models. Siblings most of which
    differ in the shapes of their parameters, or plain containers, are stages if they hold
    runs themselves; then those count. Modules without children make a run only where no others
    do. A model without repetition is watched at its top-level children.

    Raises:
        UsageError: a pattern fits no module.
    """
    if patterns is not None:
        return _places(_matching(model, patterns))
    found = _blocks(model, "", leaves=False) or _blocks(model, "", leaves=True)
    return _places(found or _top(model))


def repeats(model: nn.Module) -> bool:
    """Whether modules that have parts are repeated in it; then those are its layers."""
    return bool(_blocks(model, "", leaves=False))


Named = list[tuple[str, nn.Module]]


def _places(named: Named) -> list[Place]:
    """Each module once; neighbours in a run know each other."""
    seen: dict[int, int] = {}
    places: list[Place] = []
    for name, module in named:
        if id(module) in seen:
            continue
        seen[id(module)] = len(places)
        places.append(Place(name, module, _follows(places, name)))
    return places


def _follows(places: Sequence[Place], name: str) -> int | None:
    """The place before, if its name differs in one number by one."""
    if not places:
        return None
    before, here = places[-1].name.split("."), name.split(".")
    pairs = [(a, b) for a, b in zip(before, here, strict=False) if a != b]
    if len(before) != len(here) or len(pairs) != 1:
        return None
    ((a, b),) = pairs
    together = a.isdigit() and b.isdigit() and int(b) == int(a) + 1
    return len(places) - 1 if together else None


def _matching(model: nn.Module, patterns: Sequence[str]) -> Named:
    named = [(n, m) for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)]
    for pattern in patterns:
        if not any(fits(name, pattern) for name, _ in named):
            known = ", ".join(name for name, _ in named[:SHOWN]) or "none: watch it as a whole"
            raise UsageError("layers= names modules of the model", pattern, f"known: {known}")
    return [(n, m) for n, m in named if any(fits(n, pattern) for pattern in patterns)]


def fits(name: str, pattern: str) -> bool:
    """Whether a dotted name fits a pattern, part by part."""
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


def _blocks(module: nn.Module, prefix: str, *, leaves: bool, staged: bool = False) -> Named:
    """The repeated blocks below a module, in the order of registration.

    In a stage (`staged`) a list with a single member is a stage of one block.
    """
    found: Named = []
    alone = staged and not leaves and isinstance(module, CONTAINERS) and len(module) == 1
    for run in _runs(module, prefix):
        if (len(run) > 1 or alone) and _can_repeat(run[0][1], module, leaves=leaves):
            found += _run(run, leaves=leaves, staged=staged)
        else:
            for name, child in run:
                found += _blocks(child, name, leaves=leaves, staged=staged)
    return found


def _runs(module: nn.Module, prefix: str) -> list[Named]:
    """Neighbours of one type; a list in which a type repeats is one run whatever is between."""
    children = list(_children(module, prefix))
    if isinstance(module, nn.ModuleList) and len({class_of(m) for _, m in children}) < len(
        children
    ):
        return [children]
    return [list(group) for _, group in groupby(children, key=lambda item: class_of(item[1]))]


def _can_repeat(child: nn.Module, parent: nn.Module, *, leaves: bool) -> bool:
    if not leaves:
        return bool(registered(child))
    has_parameters = next(child.parameters(), None) is not None
    return has_parameters and isinstance(parent, CONTAINERS)


def _run(run: Named, *, leaves: bool, staged: bool) -> Named:
    """The members of a run, or, where they are stages, what is repeated in them.

    There are no stages in stages: the first of two blocks may have a projection.
    """
    if (staged or _mostly_alike(run)) and class_of(run[0][1]) not in CONTAINERS:
        return run
    inner = [_blocks(module, name, leaves=leaves, staged=True) for name, module in run]
    found = [item for own, member in zip(inner, run, strict=True) for item in own or [member]]
    return [(name, module) for name, module in found if not isinstance(module, LISTS)]


def _mostly_alike(run: Named) -> bool:
    """Whether most members have a twin: some may have experts where others have none."""
    counts = Counter(_shapes(module) for _, module in run)
    return 2 * sum(n for n in counts.values() if n > 1) >= len(run)


def _shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    known = ((name, p) for name, p in module.named_parameters() if not is_lazy(p))
    return tuple((name, tuple(p.shape)) for name, p in known)


def _top(model: nn.Module) -> Named:
    """The top-level children; a wrapper with one child counts as that child."""
    prefix = ""
    while len(registered(model)) == 1:
        ((prefix, child),) = _children(model, prefix)
        if not registered(child):
            break
        model = child
    return list(_callable(model, prefix)) or [(class_of(model).__name__, model)]


def _callable(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The children, and those of lists and dictionaries in place of these."""
    for name, child in _children(module, prefix):
        if isinstance(child, LISTS):
            yield from _callable(child, name)
        else:
            yield name, child
