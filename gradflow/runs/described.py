"""What whole runs have in common with those of a report."""

from __future__ import annotations

from typing import Any, Protocol

from gradflow.runs.summary import Summary
from gradflow.specs.model_spec import Spec
from gradflow.specs.run_options import RunOptions


class Described(Protocol):
    """What words about a run are made from."""

    @property
    def spec(self) -> Spec: ...
    @property
    def options(self) -> RunOptions: ...
    @property
    def summary(self) -> Summary: ...
    @property
    def environment(self) -> dict[str, Any]: ...
