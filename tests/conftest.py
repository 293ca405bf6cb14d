"""Every test starts from the same state, whatever ran before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import CommandLine
from hypothesis import settings

# Examples build networks, so their first one is slow; the same ones each time, so CI is repeatable.
settings.register_profile("gradflow", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("gradflow")

# torch is imported where tests run: the process that hands them to workers need not wait for it.


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors here are tiny: threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """pytest-randomly reseeds `random` and numpy, but not torch."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """The command line within this process; runs are stored in the test's own folder."""
    return CommandLine(capsys, tmp_path / "runs")
