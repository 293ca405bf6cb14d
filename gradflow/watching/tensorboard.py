"""Rows of `layers.csv` as scalars of TensorBoard. Needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradflow.errors import UsageError
from gradflow.runs.records import LayerRecord, columns

# What names a row, and is no number to draw.
KEYS = ("seed", "step", "layer", "unit")


def write_events(rows: Sequence[LayerRecord], folder: Path | str) -> Path:
    """Write a scalar `column/unit` at its step for every cell; missing cells are left out.

    The numbers are float32 there, as TensorBoard keeps scalars.

    Args:
        rows: of one seed.
        folder: gets one more event file.

    Returns:
        The folder.

    Raises:
        UsageError: the extra is not installed, or the folder cannot be written to.
    """
    names = [name for name in columns(LayerRecord) if name not in KEYS]
    writer = _writer(folder)
    try:
        for row in rows:
            for name in names:
                if (value := getattr(row, name)) is not None:
                    writer.add_scalar(f"{name}/{row.unit}", value, row.step)
    finally:
        writer.close()
    return Path(folder)


def _writer(folder: Path | str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        rule = "TensorBoard's files need the extra `tensorboard`"
        remedy = "run pip install 'gradflow-bench[tensorboard]'"
        raise UsageError(rule, "none installed", remedy) from None
    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        got = f"{folder} ({error.strerror})"
        raise UsageError("a folder that can be written to", got, "choose another") from None
