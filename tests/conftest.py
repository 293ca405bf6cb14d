"""Every test starts from the same state, whatever ran before it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from commandline import CommandLine
from hypothesis import settings

# Examples build networks, so their first one is slow; the same ones each time, so CI is repeatable.
settings.register_profile("gradflow", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("gradflow")

# torch is imported where tests run: the process that hands them to workers need not wait for it.


def pytest_collection_finish() -> None:
    """Take what importing and collecting made out of every later garbage collection.

    There are millions of these objects, none of them is garbage, and to go through them takes a
    third of a second each time: before every pass that is timed, and now and then in between.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.fixture(scope="session", autouse=True)
def small_machine() -> None:
    """One thread, since tensors here are tiny; and a matmul rate of one small product."""
    import torch

    from gradflow.engine import timing

    torch.set_num_threads(1)
    timing._LARGEST["cpu"] = timing.SMALLEST


@pytest.fixture(autouse=True)
def seeded() -> None:
    """pytest-randomly reseeds `random` and numpy, but not torch."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """The command line within this process; runs are stored in the test's own folder."""
    return CommandLine(capsys, tmp_path / "runs")
