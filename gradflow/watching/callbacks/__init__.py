"""`watch` from the first training step to the last, in the trainers of other libraries.

Each name is loaded when it is first used, and needs its library then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradflow.watching.callbacks.hugging_face import HuggingFaceCallback as HuggingFaceCallback
    from gradflow.watching.callbacks.lightning import LightningCallback as LightningCallback

_HOMES = {
    "HuggingFaceCallback": "gradflow.watching.callbacks.hugging_face",
    "LightningCallback": "gradflow.watching.callbacks.lightning",
}

__all__ = ["HuggingFaceCallback", "LightningCallback"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gradflow.watching.callbacks' has no attribute {name!r}")
