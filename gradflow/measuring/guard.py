"""The guard of a test suite: one backward pass through a model, held against bounds and a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import UsageError
from gradflow.judging.gate import Bounds, judge_run
from gradflow.judging.remarks import place
from gradflow.measuring.models.subjects import called, projection, untouched
from gradflow.runs.records import LayerRecord, Run
from gradflow.watching import watch

_STORED = ("unit", "log10_grad_norm", "log10_param_grad_norm")
# Lines of the profile in a failure; the rows between them are left out.
_LINES = 12
_Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class NormsFile:
    """A CSV file of gradient norms, which is written instead of read if `update` is set.

    `rtol` is the relative difference of a norm that passes.
    """

    file: Path
    rtol: float = 0.1
    update: bool = False


def guard(
    model: nn.Module,
    batch: Any,
    bounds: Bounds,
    loss: _Loss | None = None,
    baseline: NormsFile | None = None,
) -> list[str]:
    """Return lines that say what is wrong, with verdict and profile; none where all holds.

    Model, batch and loss are those of `flow_of`; the model's norms are held against the baseline.
    """
    run = flow_of(model, batch, loss)
    reasons = list(judge_run(run, bounds).reasons)
    if baseline is not None and baseline.update and not reasons:
        _write(run, baseline.file)
    elif baseline is not None and not baseline.update:
        reasons += _against(run, baseline)
    return _failure(run, reasons) if reasons else []


def flow_of(model: nn.Module, batch: Any, loss: _Loss | None = None, seed: int = 0) -> Run:
    """Watch one forward and one backward pass of a model, which is left as it was.

    Gradients, buffers and the random state are put back.

    Args:
        model: any module.
        batch: its input: one tensor, a tuple or list of arguments, or a mapping of names to them.
        loss: a scalar from the output; None takes <c, y> with a random c of norm 1, where y is the
            first floating tensor of the output.
        seed: of c, and of dropout.

    Raises:
        UsageError: `model` is no module, or nothing in its output takes a gradient.
    """
    if not isinstance(model, nn.Module):
        raise UsageError("the model is an nn.Module", type(model).__name__, "pass the module")
    with untouched(model), torch.enable_grad(), watch(model) as flow:
        torch.manual_seed(seed)
        output = called(model, batch)
        scalar = projection(output, seed) if loss is None else loss(output)
        scalar.backward()  # type: ignore[no-untyped-call]  # torch's stubs
    return flow.run


def _write(run: Run, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_STORED)
        writer.writerows([getattr(row, name) for name in _STORED] for row in run.layer_records)


def _against(run: Run, baseline: NormsFile) -> Iterator[str]:
    if not baseline.file.is_file():
        yield f"no baseline {baseline.file.name}: write it with --gradflow-update"
        return
    stored = _stored(baseline.file)
    if [row["unit"] for row in stored] != [row.unit for row in run.layer_records]:
        yield f"{baseline.file.name} has other layers: write it anew with --gradflow-update"
        return
    limit = math.log10(1 + baseline.rtol)
    for row, base in zip(run.layer_records, stored, strict=True):
        for name in _STORED[1:]:
            if not _close(mine := getattr(row, name), base[name], limit):
                yield f"{row.unit}: {name} {mine}, baseline {base[name] or 'none'}"


def _stored(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as given:
        header, *rows = list(csv.reader(given)) or [[]]
    if tuple(header) != _STORED or any(len(row) != len(_STORED) for row in rows):
        rule = f"a baseline has the columns {', '.join(_STORED)}"
        raise UsageError(rule, file.name, "write it anew with --gradflow-update")
    return [dict(zip(_STORED, row, strict=True)) for row in rows]


def _close(mine: float | None, stored: str, limit: float) -> bool:
    if mine is None or not stored:
        return mine is None and not stored
    return mine == float(stored) or abs(mine - float(stored)) <= limit


def _failure(run: Run, reasons: Sequence[str]) -> list[str]:
    summary = run.summary
    where = "" if summary.first_layer is None else place(summary)
    rows = [row for row in run.layer_records if row.log10_grad_norm is not None]
    return [
        f"gradient flow: {summary.verdict}{f' ({where})' if where else ''}",
        *(f"  {reason}" for reason in reasons),
        *(f"  {line}" for line in run.warnings),
        *_steepest(rows),
        "  log10 |g| from input to output:",
        *_profile(rows),
    ]


def _steepest(rows: Sequence[LayerRecord]) -> Iterator[str]:
    steps = [(_decades(below) - _decades(above), above.unit) for below, above in pairwise(rows)]
    if finite := [(abs(change), change, unit) for change, unit in steps if math.isfinite(change)]:
        _, change, unit = max(finite)
        yield f"  largest change in one layer: {change:+.2f} decades, through {unit}"


def _decades(row: LayerRecord) -> float:
    return math.nan if row.log10_grad_norm is None else row.log10_grad_norm


def _profile(rows: Sequence[LayerRecord]) -> Iterator[str]:
    finite = [v for row in rows if math.isfinite(v := _decades(row))]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    count = min(_LINES, len(rows))
    for i in range(count):
        row = rows[i * (len(rows) - 1) // max(count - 1, 1)]
        value = _decades(row)
        share = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0
        yield f"    {row.unit:<24} {value:+8.2f} {'#' * round(24 * share)}".rstrip()
