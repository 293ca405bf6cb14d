"""Memory of the machine: what is free, what a stack needs, and the peak of a measurement."""

from __future__ import annotations

import ctypes
import math
import resource
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from gradflow.errors import MeasurementError
from gradflow.saved import SavedBytes
from gradflow.spec import RunOptions, StackSpec, flag
from gradflow.stack import Block, build_block, input_shape, stream_shape
from gradflow.units import gib

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")
# Samples that stand for the whole batch in the estimate; batchnorm needs two.
_FEW = 2


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of the host within its container's limit."""
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


def needed_bytes(spec: StackSpec, options: RunOptions, device: torch.device) -> int:
    """Estimate for the resident stack: parameters, and what autograd keeps for the backward.

    Measured on one block and a few samples, because one layer and its batch may already be too
    much; a state of several streams, which may grow, on the first layer, the second and the last.
    Timing adds the gradients of all parameters: the bare pass holds them together.
    """
    few = replace(spec, batch_size=min(_FEW, int(spec.batch_size or 1)))
    layers = (1, min(2, spec.depth), spec.depth) if spec.has_streams else (1, 1, 1)
    blocks = {layer: build_block(few, options.seed, layer, device) for layer in layers}
    parameters = max(sum(p.nbytes for p in block.parameters()) for block in blocks.values())
    sizes = {layer: _kept(few, layer, block) for layer, block in blocks.items()}
    first, second, last = (sizes[layer] for layer in layers)
    kept = first + (spec.depth - 1) * (second + last) / 2  # a state grows by equal steps
    kept *= int(spec.batch_size or 1) / int(few.batch_size or 1)
    return spec.depth * parameters * (2 if options.timing else 1) + int(kept)


def _kept(spec: StackSpec, layer: int, block: Block) -> int:
    """What autograd keeps for the backward of one layer, its inputs among it."""
    saved, like = SavedBytes(), next(block.parameters())
    inputs = (like.new_ones(input_shape(spec, layer, u)) for u in range(spec.units_per_block))
    return sum(saved.of(unit, x) for unit, x in zip(block.units, inputs, strict=True))


def least_bytes(spec: StackSpec) -> int:
    """A bound from below that allocates nothing: parameters, and one stream for each unit."""
    shapes = [s for part in Block(spec).modules() for s in getattr(part, "shapes", {}).values()]
    rows = math.prod(stream_shape(spec)) // spec.width
    head = spec.classes * (spec.width + rows) if spec.loss == "ce" else 0
    ends = [
        spec.streams(layer, u) for layer in (1, spec.depth) for u in range(spec.units_per_block)
    ]
    streams = sum(ends) * math.prod(stream_shape(spec)) // 2  # a state grows by equal steps
    numbers = spec.depth * (sum(map(math.prod, shapes)) + streams) + head
    return numbers * int(getattr(torch, spec.dtype).itemsize)


def check_room(spec: StackSpec, options: RunOptions, device: torch.device) -> int:
    """Refuse a stack that cannot fit, before the system kills the process for it.

    Returns:
        Bytes that it needs.

    Raises:
        MeasurementError: more is needed than is available.
    """
    needed, free = least_bytes(spec), available_bytes(device)
    if needed <= free:
        needed = needed_bytes(spec, options, device)
    if needed > free:
        raise out_of_memory(needed, free, spec, options)
    return needed


def out_of_memory(needed: int, free: int, spec: StackSpec, options: RunOptions) -> MeasurementError:
    """The error that says how much is needed and which options lower it."""
    sizes = ("depth", "batch_size", "seq_len", "image_size", "ffn_mult", "width")
    lower = ", ".join(flag(name) for name in sizes if getattr(spec, name) is not None)
    timing = ", or leave out the timing (--no-timing)" if options.timing else ""
    return MeasurementError(
        f"out of memory: this stack needs at least {gib(needed)}, {gib(free)} are free; "
        f"lower {lower}{timing}"
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed to allocate, on CUDA or on the host."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text


def reset_peak(device: torch.device) -> None:
    """Begin a new high-water mark, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(AttributeError, OSError):  # glibc's: what was freed before counts as in use
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Largest memory in use: allocated on the GPU, or resident in the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
