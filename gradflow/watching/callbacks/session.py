"""A training under watch that begins with one call and ends with another."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from gradflow.errors import GradflowError, UsageError
from gradflow.runs.staging import check_writable
from gradflow.specs.run_options import RunOptions
from gradflow.watching import Flow, watch


def base_class(library: str, name: str) -> Any:
    """A class of a library that may be missing.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return getattr(import_module(library), name)
    except ImportError:
        package = library.partition(".")[0]
        rule = f"this callback needs {package}"
        raise UsageError(rule, "not installed", f"run pip install {package}") from None


class Watching:
    """What the callbacks have in common.

    Args:
        layers: patterns of module names; None finds the repeated blocks.
        every: measure the first of so many steps.
        out: folder that the run is stored in when training ends; None stores nothing.
        options: thresholds of the verdict.

    Attributes:
        flow: what has been seen; None before training.
        path: folder of the stored run; None before that, and on all ranks but the first.
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
        """Leave the model as it was, and store the run; what fails here must not cost the model."""
        self._stack.close()
        if self.flow is None or self.out is None:
            return
        try:
            self.path = self.flow.save(self.out)
        except GradflowError as error:
            warnings.warn(f"gradflow: {error}", stacklevel=2)
