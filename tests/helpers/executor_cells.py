"""Cells for the executors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.runs.tables import write_records
from gradflow.specs.grid import Cell
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.sweeps.cells import CellResult

OPTIONS = RunOptions(device="cpu", seeds=2, timing=False)


def tiny(depth: int = 2, **options: Any) -> Cell:
    spec = {"block": "mlp", "width": 8, "batch_size": 4, **options}
    return Cell(StackSpec(depth=depth, **spec), OPTIONS)


NO_GPU = Cell(StackSpec(), replace(OPTIONS, device="cuda:99"))


TOO_LARGE = tiny(10**9, width=4096)


def in_bytes(outcome: CellResult, folder: Path) -> tuple[bytes, bytes]:
    assert outcome.run is not None
    write_records(folder / "layers.csv", LayerRecord, outcome.run.layer_records)
    write_records(folder / "params.csv", ParamRecord, outcome.run.param_records)
    return (folder / "layers.csv").read_bytes(), (folder / "params.csv").read_bytes()
