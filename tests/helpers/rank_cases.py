"""What several processes do together in the tests of DDP and FSDP2, and what one does alone."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import WIDTH, Residual

import gradflow
from gradflow.errors import UsageError
from gradflow.watching import Flow

STEPS, SAMPLES, TOKENS = 3, 8, 5
SECONDS = 90.0


class Gated(Residual):
    """y = x + a tanh(Wx): the factor is one number, so that most ranks have none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * torch.tanh(self.linear(x))


class Net(nn.Module):
    """Blocks, the second one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Gated() for _ in range(4))
        self.blocks[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Routed(Net):
    """The two blocks in the middle have half of the samples each: ranks differ in what they run."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0, 0] > 0
        y = self.first(x)
        for block, chosen in zip(self.blocks, (None, first, ~first, None), strict=True):
            if chosen is None:
                y = block(y)
            elif chosen.any():
                y = y.index_copy(0, chosen.nonzero()[:, 0], block(y[chosen]))
        return y


class Looped(nn.Module):
    """One block for all steps: only a run tells that it is the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Gated()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.blocks[0](x)
        return x


@dataclass(frozen=True)
class Job:
    """A training under watch.

    Attributes:
        wrap: puts the model on the ranks.
        make: the model.
        pieces: micro-batches of a step.
        clip: largest norm of all gradients.
        spoil: whether one sample holds a NaN.
        inner: watch the module inside DDP.
        evaluates: call the model without gradients before it is watched.
        every: that of `watch`.
        part: which part of how many one process alone takes.
        layers: patterns of their names.
    """

    wrap: Callable[[nn.Module], nn.Module]
    make: type[nn.Module] = Net
    pieces: int = 1
    clip: float | None = None
    spoil: bool = False
    inner: bool = False
    evaluates: bool = False
    every: int = 1
    part: tuple[int, int] = (0, 1)
    layers: str | None = "blocks.*"


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_unused(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def static(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def hybrid(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


JOBS = {
    "ddp": Job(ddp),
    "ddp, inner module": Job(ddp, inner=True),
    "ddp, clipped": Job(ddp, clip=0.01),
    "ddp, micro-batches": Job(ddp, pieces=2, every=2),
    "ddp, static graph": Job(static),
    "ddp, routed": Job(ddp_unused, Routed),
    "ddp, looped": Job(ddp, Looped, layers=None),
    "ddp, nan": Job(ddp, spoil=True),
    "fsdp2": Job(sharded),
    "fsdp2, evaluated": Job(sharded, evaluates=True),
    "fsdp2, clipped": Job(sharded, clip=0.01),
    "fsdp2, micro-batches": Job(sharded, pieces=2, every=2),
    "fsdp2, looped": Job(sharded, Looped, layers=None),
    "fsdp2, nan": Job(sharded, spoil=True),
}
FOUR = {"fsdp2, copies of shards": Job(hybrid), "fsdp2, empty shards": Job(sharded)}


def batches(job: Job, rank: int, count: int) -> list[Tensor]:
    """The rank's part of every step's batch."""
    numbers = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        x = torch.randn(SAMPLES, TOKENS, WIDTH, dtype=torch.float64, generator=numbers)
        x[:, 0, 0] = torch.where(torch.arange(SAMPLES) < SAMPLES // 2, 1.0, -1.0)
        if job.spoil:
            x[-1, -1, -1] = math.nan
        found.append(x.chunk(count)[rank])
    return found


def train(job: Job, rank: int = 0, count: int = 1) -> Flow:
    """Some steps of a rank's part of the job; alone, the whole of it."""
    torch.manual_seed(0)
    model = job.make().double()
    if count > 1:
        model = job.wrap(model)
    seen, group = (model.module, dist.group.WORLD) if job.inner and count > 1 else (model, None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    if job.evaluates:
        with torch.no_grad():
            model(batches(job, rank, count)[0])
    with gradflow.watch(seen, job.layers, every=job.every, group=group) as flow:
        for x in batches(job, *((rank, count) if count > 1 else job.part)):
            optimizer.zero_grad()
            _backward(model, x, job.pieces)
            if job.clip:
                nn.utils.clip_grad_norm_(model.parameters(), job.clip)
            optimizer.step()
    return flow


def _backward(model: nn.Module, x: Tensor, pieces: int) -> None:
    for number, piece in enumerate(x.chunk(pieces)):
        last = number == pieces - 1
        is_ddp = isinstance(model, DistributedDataParallel)
        with nullcontext() if last or not is_ddp else model.no_sync():
            (model(piece).square().sum((1, 2)).mean() / pieces).backward()


def refused(_: int, count: int) -> dict[str, str]:
    """What `watch` says to other ways of spreading a model."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (count,))
    columns = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    grid = init_device_mesh("cpu", (1, count), mesh_dim_names=("data", "tensor"))
    both = parallelize_module(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), grid["tensor"], {"0": ColwiseParallel()}
    )
    models = {
        "both": fully_shard(both, mesh=grid["data"]),
        "tensor parallel": parallelize_module(columns, mesh, {"0": ColwiseParallel()}),
        "fsdp1": FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")),
    }
    found = {}
    for name, model in models.items():
        try:
            with gradflow.watch(model):
                pass
        except UsageError as error:
            found[name] = str(error)
    return found


def _rank(rank: int, count: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=SECONDS),
    )
    found: dict[str, Any] = {}
    for name in names:
        flow = train((JOBS | FOUR)[name], rank, count)
        path = flow.save(Path(folder) / "runs" / name)
        found[name] = (flow.run.layer_records, flow.run.param_records, flow.run.spec, path)
    found["refused"] = refused(rank, count) if count == 2 else {}
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def together(count: int, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """What each of `count` processes has found; none of them outlives the call."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, count, str(folder), names))
        for rank in range(count)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(SECONDS)
        assert [process.exitcode for process in ranks] == [0] * count
    finally:
        for process in ranks:
            process.kill()
    return [pickle.loads((folder / f"{r}.pickle").read_bytes()) for r in range(count)]
