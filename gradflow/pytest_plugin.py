"""The pytest plugin: gradient flow as an assertion. Imports no torch until it is used.

PYTEST_DONT_REWRITE: the module has no assertions of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Guard", "assert_gradient_flow"]

FOLDER = "gradflow_baselines"


def assert_gradient_flow(
    model: nn.Module,
    batch: Any,
    max_decades: float | None = 3,
    *,
    loss: Callable[[Any], Any] | None = None,
    baseline: Path | str | None = None,
    rtol: float = 0.1,
    update: bool = False,
) -> None:
    """Fail where the gradient of one backward pass is lost, leaves its bounds or has moved.

    Args:
        model: any module; it is left as it was.
        batch: one tensor, a tuple or list of arguments, or a mapping of names to them.
        max_decades: limit on |log10(|g_first| / |g_last|)|; None is no limit.
        loss: a scalar from the output; None takes a random cotangent of norm 1.
        baseline: CSV file of norms to hold the model's against; None is no comparison.
        rtol: relative difference from the baseline that passes.
        update: write the baseline instead of reading it, if the bounds hold.

    Raises:
        AssertionError: with the verdict, the reasons, the layer and a small profile.
        UsageError: a limit is negative or NaN, `model` is no module, or nothing takes a gradient.
    """
    __tracebackhide__ = True
    from gradflow.judging.gate import Bounds, check_limits
    from gradflow.measuring.guard import NormsFile, guard

    bounds = Bounds(max_decades, no_nonfinite=True)
    check_limits(bounds, rtol)
    kept = None if baseline is None else NormsFile(Path(baseline), rtol, update)
    if lines := guard(model, batch, bounds, loss, kept):
        raise AssertionError("\n".join(lines))


@dataclass(frozen=True)
class Guard:
    """The fixture `gradflow`: knows where the test's baselines are and whether to rewrite them."""

    folder: Path
    update: bool

    def assert_gradient_flow(
        self,
        model: nn.Module,
        batch: Any,
        max_decades: float | None = 3,
        *,
        baseline: str | None = None,
        **options: Any,
    ) -> None:
        """Fail as `assert_gradient_flow` does; `baseline` names a file in `gradflow_baselines/`."""
        __tracebackhide__ = True
        file = None if baseline is None else self.folder / f"{baseline}.csv"
        options = {"update": self.update} | options
        assert_gradient_flow(model, batch, max_decades, baseline=file, **options)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--gradflow-update` to pytest."""
    group = parser.getgroup("gradflow")
    group.addoption("--gradflow-update", action="store_true", help="rewrite gradient baselines")


@pytest.fixture
def gradflow(request: pytest.FixtureRequest) -> Guard:
    """Assert gradient flow, with baselines in a folder beside the test file."""
    return Guard(request.path.parent / FOLDER, bool(request.config.getoption("gradflow_update")))
