"""One model on several processes (ranks): which they are, and what all of them have seen.

DDP has all parameters on every rank. FSDP2 (`fully_shard`) has a shard of each, as a DTensor. Under
both every rank has a batch of its own, and gradients are averaged over the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradflow.errors import UsageError
from gradflow.torch_internals import compiled_inner

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model; all of them take part in every call of `add` and `gather`.

    Attributes:
        groups: of processes, one for each axis of the grid of ranks.
        device: on which their backend can add.
    """

    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device

    @property
    def count(self) -> int:
        """Number of processes that share the model."""
        return prod(group.size() for group in self.groups)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return all(group.rank() == 0 for group in self.groups)

    def gather(self, mine: _T) -> list[_T]:
        """Return what each rank has, in one order on all of them."""
        gathered: list[Any] = [mine]
        for group in self.groups:
            lists: list[Any] = [None] * group.size()
            dist.all_gather_object(lists, gathered, group=group)
            gathered = [item for part in lists for item in part]
        return gathered

    def add(self, mine: np.ndarray) -> np.ndarray:
        """Return the sum of an array over all ranks."""
        total = torch.from_numpy(mine).to(self.device)
        for group in self.groups:
            dist.all_reduce(total, group=group)
        return total.cpu().numpy()


def ranks_of(model: nn.Module, group: dist.ProcessGroup | None = None) -> Ranks | None:
    """Return the processes that share a model with its wrappers; None where it is on one alone.

    `group` has the processes of a DDP model whose inner module is given.

    Raises:
        UsageError: parameters are spread in another way than by DDP or FSDP2.
    """
    for kind in _unknown(model):
        rule = "watch takes models of one process, of DDP, and of FSDP2"
        raise UsageError(rule, kind, "shard with torch.distributed.fsdp.fully_shard alone")
    sharded: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    if sharded:
        mesh = sharded[0].device_mesh
        ranks = Ranks(tuple(mesh.get_all_groups()), torch.device(mesh.device_type))
    elif group := group or _replicas(model):
        ranks = Ranks((group,), next(model.parameters()).device)
    else:
        return None
    return ranks if ranks.count > 1 else None


def sharded_again(model: nn.Module) -> None:
    """Put parameters back into the shards that the optimizer holds.

    A forward without a backward leaves the parameters of the root gathered.
    """
    for module in model.modules():
        if class_of(module) is not type(module):
            module.reshard()  # type: ignore[operator]  # of `fully_shard`


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile` and DDP, in which layers have their names."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif (inner := compiled_inner(model)) is not None:
            model = inner
        else:
            return model


def class_of(module: nn.Module) -> type:
    """Return the class of a module as it was written, without the one that `fully_shard` adds."""
    kind = type(module)
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind.__bases__[1] if sharded is not None and sharded in kind.__bases__ else kind


def is_sharded(x: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    # Whoever has a DTensor has imported its module.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def local_part(x: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank: all of it, or its shard."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]  # a DTensor


def copies_of(x: Tensor, count: int) -> int:
    """Return how many of `count` ranks have the part of a parameter that this rank has."""
    if not is_sharded(x):
        return count
    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]  # a DTensor
    return prod(mesh.size(i) for i, at in enumerate(placements) if at.is_replicate())


def _replicas(model: nn.Module) -> dist.ProcessGroup | None:
    """Group of the processes of a DDP model."""
    wrapped = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    return next((m.process_group for m in wrapped), None)


def _unknown(model: nn.Module) -> Iterator[str]:
    """Ways in which parameters are spread whose norms would be wrong here."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    old = () if fsdp is None else fsdp.FullyShardedDataParallel
    if any(isinstance(m, old) for m in model.modules()):
        yield "FullyShardedDataParallel"
    sharded: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    if sharded and not any(class_of(m) is not type(m) for m in model.modules()):
        yield "DTensor parameters without fully_shard, as of tensor parallelism"
    if not all(at.is_replicate() for p in sharded for at in p.placements[:-1]):
        yield "parameters that are split twice, as by tensor parallelism"
    if len({p.device_mesh for p in sharded}) > 1:
        yield "parameters on several device meshes"
