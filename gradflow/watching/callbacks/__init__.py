"""`watch` from the first training step to the last, in the trainers of other libraries.

Each callback is loaded when it is first used, and needs its library then.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gradflow.errors import GradflowError, UsageError
from gradflow.runs.staging import check_writable
from gradflow.specs.run_options import RunOptions
from gradflow.watching.flow import Flow, watch

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


def base_class(library: str, name: str) -> Any:
    """Return a class of a library that may be missing.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        return getattr(import_module(library), name)
    except ImportError:
        package = library.partition(".")[0]
        rule = f"this callback needs {package}"
        raise UsageError(rule, "not installed", f"run pip install {package}") from None


class TrainingWatch:
    """`watch` from one call to another: what the callbacks have in common.

    Args:
        layers: patterns of module names; None finds the repeated blocks.
        every: measures the first of so many steps.
        out: folder in which the run is stored when training ends; None stores nothing.
        options: thresholds of the verdict.

    Attributes:
        flow: the flow of the training; None before training.
        path: folder of the stored run; None before it is stored, and on all ranks but the first.
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        every: int = 1,
        out: Path | str | None = "results",
        options: RunOptions | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.every, self.out, self.options = layers, every, out, options
        self.flow: Flow | None = None
        self.path: Path | None = None
        self._stack, self._evaluation = ExitStack(), ExitStack()

    def _begin(self, model: nn.Module, **given: Any) -> None:
        """Watch the model; `given` are further arguments of `watch`.

        Raises:
            UsageError: `out` cannot be written to, or what `watch` refuses.
        """
        if self.out is not None:
            check_writable(Path(self.out))  # now, and not when the training is over
        self._stack.close()  # of a training that an error has ended
        watched = watch(model, self.layers, every=self.every, options=self.options, **given)
        self.flow = self._stack.enter_context(watched)

    def _end(self) -> None:
        """Leave the model as it was, and store the run; a failure to store costs no training."""
        self._stack.close()
        if self.flow is None or self.out is None:
            return
        try:
            self.path = self.flow.save(self.out)
        except GradflowError as error:
            warnings.warn(f"gradflow: {error}", stacklevel=2)
