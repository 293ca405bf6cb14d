"""gradflow measures gradient flow in deep networks: does it reach the first layer, at what cost?

The names below are loaded when they are first used, so `import gradflow` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradflow.version import __version__ as __version__

if TYPE_CHECKING:
    from gradflow.measuring.stack import measure as measure
    from gradflow.runs.records import Run as Run
    from gradflow.runs.store import load as load
    from gradflow.runs.store import save as save
    from gradflow.specs.run_options import RunOptions as RunOptions
    from gradflow.specs.stack import StackSpec as StackSpec
    from gradflow.specs.user_files import from_file as from_file
    from gradflow.watching import watch as watch

_HOMES = {
    "measure": "gradflow.measuring.stack",
    "Run": "gradflow.runs.records",
    "RunOptions": "gradflow.specs.run_options",
    "StackSpec": "gradflow.specs.stack",
    "load": "gradflow.runs.store",
    "save": "gradflow.runs.store",
    "watch": "gradflow.watching",
    "from_file": "gradflow.specs.user_files",
}

__all__ = [
    "Run",
    "RunOptions",
    "StackSpec",
    "__version__",
    "from_file",
    "load",
    "measure",
    "save",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gradflow' has no attribute {name!r}")
