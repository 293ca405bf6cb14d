"""Memory of the machine: what is free, what a stack needs, the plan, and the peak."""

from __future__ import annotations

import ctypes
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from gradflow.engine.plan import (
    Footprint,
    Plan,
    choose,
    pays_as_graphs,
    room_unasked,
    with_graphs,
    with_seeds,
)
from gradflow.engine.tape import SavedBytes
from gradflow.errors import MeasurementError, UsageError, is_out_of_memory
from gradflow.networks.ends import input_shape, stream_shape
from gradflow.networks.stack import Block, build_block, layer_kind
from gradflow.specs.fields import flag
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.text import gib

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")
# Samples that stand for the whole batch in the estimate; batchnorm needs two.
_FEW = 2
# Parameters, their gradients, two moments of the optimizer, and the values before an update.
_TRAINED_COPIES = 5
# Bytes that Python and torch take for a module with its parameters, and for what stays of a unit.
_MODULE, _ROW = 3 << 10, 48
# Kernels of a unit in all its passes, and what a graph keeps of one: arguments, 4 KiB at most.
_KERNELS, _NODE = 300, 4 << 10


def available_bytes(device: torch.device) -> int:
    """Return the free bytes of the GPU, or of the host within its container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return min(psutil.virtual_memory().available, _cgroup_room())


def _cgroup_room() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - used)


def footprint(spec: StackSpec, seed: int, device: torch.device) -> Footprint:
    """Estimate the memory of a layer: its parameters, its autograd graph, its stream.

    Measured on one block and a few samples, because one layer and its batch may already be too
    much; where layers are of several kinds, on the first and the last. A state of several streams
    may grow: there the second layer and the last are averaged.
    """
    few = replace(spec, batch_size=min(_FEW, spec.batch_size))
    scale = spec.batch_size / few.batch_size
    ends = (min(2, spec.depth), spec.depth) if spec.has_streams else (1, spec.depth)
    kinds = {layer_kind(spec, layer): layer for layer in ends}
    layers = ends if spec.has_streams else tuple(kinds.values())
    blocks = [build_block(few, seed, layer, device) for layer in layers]
    kept = [_kept(few, layer, block) for layer, block in zip(layers, blocks, strict=True)]
    itemsize = int(getattr(torch, spec.dtype).itemsize)
    streams = sum(spec.streams(layer, spec.units_per_block - 1) for layer in ends) / 2
    parameters = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    return Footprint(
        parameters=parameters,
        objects=max(_MODULE * len(list(block.modules())) for block in blocks),
        graph=int((sum(kept) / len(kept) if spec.has_streams else max(kept)) * scale),
        stream=int(streams * math.prod(stream_shape(spec)) * itemsize),
        rows=_ROW * spec.units_per_block,
        prefetched_layers=int(device.type == "cuda"),
        # Each weight meets each vector of the stream.
        work=parameters // itemsize * math.prod(stream_shape(spec)) // spec.width,
        scores=_score_bytes(spec, itemsize),
        nodes=_KERNELS * _NODE * spec.units_per_block,
    )


def _kept(spec: StackSpec, layer: int, block: Block) -> int:
    """Return the bytes that autograd keeps for the backward of one layer, its inputs included."""
    saved, like = SavedBytes(), next(block.parameters())
    inputs = (like.new_ones(input_shape(spec, layer, u)) for u in range(spec.units_per_block))
    return sum(saved.of(unit, x) for unit, x in zip(block.units, inputs, strict=True))


def _score_bytes(spec: StackSpec, itemsize: int) -> int:
    """Return the bytes of attention scores: a float32 or wider for each head and token pair."""
    pairs = spec.batch_size * int(spec.heads or 0) * int(spec.seq_len or 0) ** 2
    return spec.kind.units.count("attention") * pairs * max(4, itemsize)


def resident_bytes(size: Footprint, layers: int) -> int:
    """Return the bytes of the parameters and autograd graphs of so many layers."""
    return layers * (size.parameters + size.graph)


def least_bytes(spec: StackSpec) -> int:
    """Return a lower bound of the bytes needed, without allocating: one layer, fewest streams."""
    shapes = [s for part in Block(spec).modules() for s in getattr(part, "shapes", {}).values()]
    last = spec.units_per_block - 1
    ends = [spec.streams(layer, last) for layer in (1, spec.depth)]  # a state grows by equal steps
    rows = math.prod(stream_shape(spec)) // spec.width
    stream = math.prod(stream_shape(spec)) * sum(ends) // 2
    head = spec.classes * (spec.width + rows) if spec.loss == "ce" else 0
    streams = stream * max(spec.units_per_block, math.isqrt(spec.depth))
    numbers = sum(map(math.prod, shapes)) + streams + head
    size = int(getattr(torch, spec.dtype).itemsize)
    return numbers * size + _ROW * spec.units_per_block * spec.depth


def make_plan(spec: StackSpec, options: RunOptions, device: torch.device) -> Plan:
    """Choose the memory policy; refuse a stack before the system kills the process.

    Raises:
        UsageError: the policy does not go with training, or with the device.
        MeasurementError: more is needed than is available, or allowed.
    """
    if options.cuda_graphs:
        options = _for_graphs(options, device)
    free = available_bytes(device)
    limit = options.memory_limit_bytes
    room = free if limit is None else min(free, limit)
    least = least_bytes(spec)
    if least > room:
        raise out_of_memory(least, room, spec, options)
    with refusing_when_full(least, spec, options, device):
        size = footprint(spec, options.seed, device)
    if options.steps:
        options, size = _for_training(options, size)
    plan, fits = choose(spec.depth, size, options, free)
    if fits:
        plan, fits = with_seeds(plan, spec, options, size, free)
    if _is_captured(plan, spec, options, size, device):
        captured = with_graphs(plan, size)
        if options.cuda_graphs or captured.needed <= room_unasked(options, free):
            plan, fits = captured, captured.needed <= room
    if not fits:
        raise out_of_memory(plan.needed, room, spec, options)
    return plan


@contextmanager
def refusing_when_full(
    needed: int, spec: StackSpec, options: RunOptions, device: torch.device
) -> Iterator[None]:
    """Raise a MeasurementError that says what to lower where torch cannot allocate.

    It tells the bytes that are needed at least, and those that are free on the device.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(needed, available_bytes(device), spec, options) from None


def _is_captured(
    plan: Plan, spec: StackSpec, options: RunOptions, size: Footprint, device: torch.device
) -> bool:
    """Whether passes are captured: CUDA graphs are asked for, or save time."""
    if options.cuda_graphs is not None:
        return options.cuda_graphs
    return device.type == "cuda" and not options.steps and pays_as_graphs(plan, spec.width, size)


def _for_graphs(options: RunOptions, device: torch.device) -> RunOptions:
    """Return the options with all layers resident and all graphs kept."""
    if device.type != "cuda":
        remedy = "leave it out, or use --device cuda"
        raise UsageError("--cuda-graphs needs a GPU", f"--device {device}", remedy)
    return replace(options, keep="graph", rebuild=False)


def _for_training(options: RunOptions, size: Footprint) -> tuple[RunOptions, Footprint]:
    """Return options and footprint of training, which keeps layers, graphs and optimizer state."""
    if options.keep not in ("auto", "graph") or options.rebuild:
        rule = "training keeps the whole stack"
        raise UsageError(rule, "--keep or --rebuild", "leave them out, or --steps")
    kept = replace(options, keep="graph", rebuild=False)
    return kept, replace(size, parameters=_TRAINED_COPIES * size.parameters)


def out_of_memory(needed: int, room: int, spec: StackSpec, options: RunOptions) -> MeasurementError:
    """Return the error that says how much is needed and which options lower it."""
    sizes = ("depth", "batch_size", "seq_len", "image_size", "ffn_mult", "width")
    lower = ", ".join(flag(name) for name in sizes if getattr(spec, name) is not None)
    policy = ", or leave --keep and --rebuild to gradflow" if options.is_policy_given else ""
    asked = [flag(name) for name in ("together", "cuda_graphs") if getattr(options, name)]
    policy = f", or leave out {' and '.join(asked)}" if asked else policy
    limited = options.memory_limit_bytes is not None and room >= options.memory_limit_bytes
    return MeasurementError(
        f"out of memory: this stack needs at least {gib(needed)}, {gib(room)} are "
        f"{'allowed' if limited else 'free'}; lower {lower}{policy}"
    )


def reset_peak(device: torch.device) -> None:
    """Begin a new high-water mark of the memory in use, where the system allows it.

    The mark of a process counts pages that malloc holds after they were freed. glibc gives them
    back by `malloc_trim`, for which Python has no call.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(AttributeError, OSError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the high-water mark in bytes: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
