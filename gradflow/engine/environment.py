"""What a run was measured on: versions, device, number formats, code; no host name, no path."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

import torch

from gradflow.errors import UsageError
from gradflow.specs.model_spec import ModelRequest, Spec, asked_for
from gradflow.version import __version__

_TRANSFORMERS = "transformers"


def resolve_device(name: str, dtype: str) -> torch.device:
    """Return the device that `--device` names; `auto` is CUDA where there is one.

    Raises:
        UsageError: the device is not there, or it cannot compute in this dtype.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError("--device is auto, cpu, cuda or cuda:N", name, "use --device auto")
    device = torch.device(name)
    if device.type == "cuda":
        _check_cuda(device)
    try:
        square = torch.ones(2, 2, dtype=getattr(torch, dtype), device=device)
        square.mm(square)
    except RuntimeError:
        rule = f"{device} computes in --dtype"
        raise UsageError(rule, dtype, "use --dtype float32") from None
    return device


def _check_cuda(device: torch.device) -> None:
    count = torch.cuda.device_count()
    if count == 0:
        rule = "--device cuda needs a GPU that torch can use"
        raise UsageError(rule, "none", "use --device cpu")
    if (device.index or 0) >= count:
        raise UsageError(f"--device cuda:N has N below {count}", str(device), "use --device cuda:0")


def describe_environment(spec: Spec | ModelRequest, device: torch.device) -> dict[str, Any]:
    """Return the environment of a measurement as `run.json` has it."""
    return {
        "gradflow": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": spec.dtype,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "git": _git(),
        "argv": [without_path(word) for word in sys.argv],
        **library_version(spec),
    }


def library_version(spec: Spec | ModelRequest) -> dict[str, str]:
    """Return name and version of the library that builds the model; empty if there is none."""
    asked = asked_for(spec)
    if isinstance(asked, ModelRequest) and asked.is_from_library:
        return {_TRANSFORMERS: version(_TRANSFORMERS)}
    return {}


def without_path(word: str) -> str:
    """Return a word of the command line with its absolute paths cut to their last part."""
    head, equals, tail = word.partition("=")
    if not equals or PurePath(word).is_absolute():
        head, equals, tail = "", "", word
    parts = (PurePath(p).name if PurePath(p).is_absolute() else p for p in tail.split(","))
    return head + equals + ",".join(parts)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (a stream of lines)
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit of the working directory, and whether tracked files differ from it."""
    try:
        commit = _git_output("rev-parse", "HEAD").strip()
        changed = _git_output("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _git_output(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=2, check=True)
    return done.stdout
