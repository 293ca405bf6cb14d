"""Parameters of the watched layers through a step: gradients as they come, clipped, and the update.

A gradient is measured when backward has written it (after every micro-batch, so the last one
counts), and again when the optimizer is about to use it if it has been changed since, as clipping
and unscaling do. Changes through `.data` or a view of another tensor are not seen.

Where ranks share the model, gradients are measured once backward has averaged them, and the norms
of shards are put together to those of whole parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from gradflow.reductions import count_nonfinite, norm
from gradflow.torch_internals import (
    at_end_of_backward,
    foreach_copy,
    foreach_norm,
    foreach_subtract,
    version_of,
)
from gradflow.watching import device_rows
from gradflow.watching.device_rows import MISSING, PARAMETER_NUMBERS, GraphParameters
from gradflow.watching.discovery import WatchedLayer
from gradflow.watching.distributed import Ranks, copies_of, is_sharded, local_part

# Exponent of each number of a shard at which the sum over shards is the whole parameter's.
_POWERS = np.array([1 if name == "nonfinite" else 2 for name in PARAMETER_NUMBERS])
# Below so many elements a call costs more than what it computes.
_SMALL = 1 << 13


@dataclass(frozen=True)
class OwnedParameter:
    """A parameter, its dotted name inside its innermost watched layer, and that layer's index."""

    place: int
    name: str
    parameter: nn.Parameter


@dataclass(frozen=True, slots=True)
class SeenGradient:
    """A gradient as it came: its norm and non-finite count, and which tensor in which version."""

    size: Tensor
    nonfinite: Tensor | float
    identity: int
    version: int

    def still(self, grad: Tensor) -> bool:
        """Return whether the gradient was neither replaced nor written to; no for DTensors."""
        # The version of a DTensor does not tell of writes to its shard.
        known = self.identity, self.version
        return not is_sharded(grad) and known == (id(grad), version_of(grad))


def owned_parameters(
    layers: Sequence[WatchedLayer], kept: Collection[int] | None = None
) -> list[OwnedParameter]:
    """Return every parameter of the layers once: a tied one belongs to the first that has it.

    `kept` has the indices of the layers that count; None is all.
    """
    counting = [(i, layer) for i, layer in enumerate(layers) if kept is None or i in kept]
    places = {id(layer.module): i for i, layer in counting}
    owned: dict[int, OwnedParameter] = {}
    for place, layer in counting:
        for name, parameter in layer.module.named_parameters():
            if is_lazy(parameter) or id(parameter) in owned:
                continue
            if _innermost(layer.module, name, places) == place:
                owned[id(parameter)] = OwnedParameter(place, name, parameter)
    return sorted(owned.values(), key=lambda one: one.place)


def _innermost(module: nn.Module, name: str, places: dict[int, int]) -> int:
    inner = places[id(module)]
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        inner = places.get(id(module), inner)
    return inner


class ParameterWatch:
    """Norms of parameters, gradients and updates in one step, float64 on their devices.

    Steps are measured while it is `active`; `ranks` are the processes that share the model, if
    there are several.
    """

    def __init__(self, owned: Sequence[OwnedParameter], ranks: Ranks | None = None) -> None:
        self.ranks, self.active = ranks, True
        self._own(owned)
        self._graphed = GraphParameters(self._parameters, device_rows.CAPTURABLE)
        self._copies: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything, as a new step begins."""
        self._waits = self._arrived = False
        self._grads: dict[int, SeenGradient] = {}
        self._used: dict[int, Tensor] = {}
        self._weights: list[Tensor] = []
        self._updates: list[Tensor] = []

    def release(self) -> None:
        """Forget everything, once the numbers of the step have been read."""
        self.reset()
        self._graphed.release()

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hook every parameter; yield what removes the hooks."""
        hook = self._accumulated if self.ranks is None else self._wait
        for parameter in self._parameters:
            if parameter.requires_grad:
                add = parameter.register_post_accumulate_grad_hook
                yield add(hook)  # type: ignore[no-untyped-call]  # torch's stubs

    def keep(self, owned: Sequence[OwnedParameter]) -> None:
        """Go on with some of the parameters, in the given order."""
        places = {id(p): i for i, p in enumerate(self._parameters)}
        order = [places[id(one.parameter)] for one in owned]
        self._copies, self._weights, self._updates = (
            [values[i] for i in order] if values else []
            for values in (self._copies, self._weights, self._updates)
        )
        self._own(owned)

    def _own(self, owned: Sequence[OwnedParameter]) -> None:
        self.owned = owned
        self._parameters = [one.parameter for one in owned]
        self._kept = set(map(id, self._parameters))

    def _accumulated(self, parameter: Tensor) -> None:
        if self._watches() and parameter.grad is not None and id(parameter) in self._kept:
            self._arrived = True
            with torch.no_grad():
                self._see(parameter, parameter.grad)

    def _wait(self, _: Tensor) -> None:
        """Measure all gradients when backward ends: they are not averaged yet."""
        if self._watches() and not self._waits:
            self._waits = self._arrived = True
            # A callback of a callback comes after those by which DDP and FSDP2 finish.
            at_end_of_backward(lambda: at_end_of_backward(self._written))

    @torch.no_grad()
    def _written(self) -> None:
        self._waits = False
        for parameter in self._parameters:
            if self._watches() and parameter.grad is not None:
                self._see(parameter, parameter.grad)

    def _see(self, parameter: Tensor, grad: Tensor) -> None:
        values = _values(grad)
        size = norm(values)
        count = count_nonfinite(values, size)
        self._grads[id(parameter)] = SeenGradient(size, count, id(grad), version_of(grad))
        if device_rows.is_capturing():
            self._graphed.seen.add(id(parameter))
            self._graphed.put(parameter, "grad", size)
            self._graphed.put(parameter, "nonfinite", count)

    def _watches(self) -> bool:
        """Whether what happens now is measured: what a graph captures always is."""
        return self.active or device_rows.is_capturing()

    @torch.no_grad()
    def before_step(self) -> None:
        """Measure the weights, and gradients as the optimizer uses them, before it steps."""
        if not self._watches():
            return
        parameters = self._local()
        self._copies = self._copies or [torch.empty_like(p) for p in parameters]
        foreach_copy(self._copies, parameters)
        self._weights = _norms(self._copies)
        self._put("norm", self._weights)
        self._use()

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure the updates that the optimizer's step has made."""
        if not self._watches():
            return
        if self._arrived:
            self._use()  # the optimizer has called a closure, which clips on its own
        if self._weights:
            foreach_subtract(self._copies, self._local())
            self._updates = _norms(self._copies)
            self._put("update", self._updates)

    def _put(self, name: str, values: Sequence[Tensor]) -> None:
        if device_rows.is_capturing():
            self._graphed.steps = True
            for parameter, value in zip(self._parameters, values, strict=True):
                self._graphed.put(parameter, name, value)

    def _use(self) -> None:
        """Gradients as the optimizer uses them, where they have changed since they came."""
        self._arrived = False
        for parameter in self._parameters:
            key, grad = id(parameter), parameter.grad
            if grad is None:
                continue
            seen = self._grads.get(key)
            if seen is None and key not in self._graphed.seen:
                self._see(parameter, grad)
            elif seen is None or not seen.still(grad):
                self._used[key] = norm(_values(grad))
                if device_rows.is_capturing():
                    self._graphed.put(parameter, "used", self._used[key])

    @torch.no_grad()
    def read(self) -> list[Tensor]:
        """Return for each device a tensor (parameters there, `PARAMETER_NUMBERS`)."""
        if not self._weights and not self._graphed.steps:
            self._weights = _norms(self._local())
        return [self._table(device, places) for device, places in self._by_device().items()]

    def _table(self, device: torch.device, places: Sequence[int]) -> Tensor:
        missing, none = (
            torch.full((), v, dtype=torch.float64, device=device) for v in (MISSING, 0)
        )
        rows: list[Tensor] = []
        for i in places:
            key = id(self._parameters[i])
            seen = self._grads.get(key)
            count = seen.nonfinite if seen else missing
            rows += [
                self._weights[i] if self._weights else missing,
                seen.size if seen else missing,
                count.double() if isinstance(count, Tensor) else none,
                self._used.get(key, seen.size if seen else missing),
                self._updates[i] if self._updates else missing,
            ]
        table = torch.stack(rows).view(-1, len(PARAMETER_NUMBERS))
        return self._graphed.over(table, [self._parameters[i] for i in places])

    def in_order(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        """Return the tables of `read` on the host as one, with a row for each of `owned`."""
        whole = np.full((len(self.owned), len(PARAMETER_NUMBERS)), MISSING)
        for places, table in zip(self._by_device().values(), tables, strict=True):
            whole[places] = table
        return whole

    def whole(self, shards: np.ndarray) -> np.ndarray:
        """Return rows of `PARAMETER_NUMBERS` of whole parameters, from those of this rank's shards.

        Squares and counts are added over the ranks; a shard that several ranks have counts once.
        A number that no rank has seen is missing.
        """
        if self.ranks is None or not any(map(is_sharded, self._parameters)):
            return shards
        held = np.array([[copies_of(p, self.ranks.count)] for p in self._parameters])
        there = shards != MISSING
        powers = np.where(there, shards, 0.0) ** _POWERS
        total, present = self.ranks.add(np.stack([powers / held, there]))
        counts = [name == "nonfinite" for name in PARAMETER_NUMBERS]
        return np.where(present > 0, np.where(counts, np.rint(total), np.sqrt(total)), MISSING)

    def _local(self) -> list[Tensor]:
        return [local_part(parameter) for parameter in self._parameters]

    def _by_device(self) -> dict[torch.device, list[int]]:
        places: dict[torch.device, list[int]] = {}
        for i, parameter in enumerate(self._parameters):
            places.setdefault(parameter.device, []).append(i)
        return places


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`reductions.norm` of each tensor; of small ones, and on a GPU of all, in few calls."""
    sizes: dict[int, Tensor] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, x in enumerate(tensors):
        large = x.device.type == "cpu" and x.numel() > _SMALL
        if large or x.is_complex() or x.is_sparse:
            sizes[i] = norm(_values(x))
        else:
            groups.setdefault((x.device, x.dtype), []).append(i)
    for places in groups.values():
        together = foreach_norm([tensors[i] for i in places])
        sizes |= dict(zip(places, together, strict=True))
    return [sizes[i] for i in range(len(tensors))]


def _values(x: Tensor) -> Tensor:
    """All numbers of a parameter or gradient as real ones; the stored ones of a sparse tensor."""
    x = local_part(x).detach()
    if x.is_sparse:
        x = x.coalesce().values()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
