"""The export to TensorBoard: its own reader finds every cell, and none that is missing."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import WIDTH, Residual, chain

import gradflow
from gradflow.errors import UsageError
from gradflow.runs.records import LayerRecord
from gradflow.watching import Flow
from gradflow.watching.watched_run import _ROW_NAMES, write_events


def row(step: int = 0, **values: Any) -> LayerRecord:
    empty = dict.fromkeys(("act_rms", "act_max_abs", "grad_norm", "log10_grad_norm"))
    return LayerRecord(0, step, 1, "blocks.0", **empty | values)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads: value by step, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = found.Tags()["scalars"]
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in tags}


def trained() -> Flow:
    model = chain(Residual, depth=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradflow.watch(model, every=2) as flow:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, WIDTH)).square().mean().backward()
            optimizer.step()
    return flow


@pytest.mark.slow  # for what it imports
def test_every_cell_of_a_training_is_a_scalar(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    flow = trained()
    assert flow.to_tensorboard(tmp_path / "board") == tmp_path / "board"
    wanted: dict[str, dict[int, float]] = {}
    for layer in flow.layers.to_dict("records"):
        for name, value in layer.items():
            if name not in _ROW_NAMES and value is not None and not math.isnan(value):
                tag = f"{name}/{layer['unit']}"
                wanted.setdefault(tag, {})[layer["step"]] = pytest.approx(value, rel=1e-6)
    assert scalars(tmp_path / "board") == wanted
    assert set(wanted["grad_norm/blocks.2"]) == {0, 2, 4}


@pytest.mark.slow
def test_missing_is_left_out_and_nan_is_not(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    write_events([row(act_rms=0.0), row(7, act_rms=math.nan, gain=math.inf)], tmp_path)
    found = scalars(tmp_path)
    assert set(found) == {"act_rms/blocks.0", "gain/blocks.0"}
    assert found["act_rms/blocks.0"][0] == 0.0
    assert math.isnan(found["act_rms/blocks.0"][7])
    assert found["gain/blocks.0"] == {7: math.inf}


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'gradflow-bench\[tensorboard\]'"):
        write_events([row()], tmp_path)


@pytest.mark.slow
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"can be written to; got .*file \(.*\); choose another"):
        write_events([row()], tmp_path / "file")
