"""Makes a `Run` of the steps that were watched, and events for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gradflow.engine.environment import describe_environment
from gradflow.engine.rows import log10
from gradflow.errors import MeasurementError, UsageError
from gradflow.judging.advice import findings
from gradflow.judging.assembly import Measured, assembled_run
from gradflow.judging.verdicts import classify
from gradflow.runs.records import LayerRecord, ParamRecord, Run, columns
from gradflow.specs.model_spec import ModelSpec, Spec
from gradflow.specs.run_options import RunOptions
from gradflow.watching.device_rows import MISSING, PARAMETER_NUMBERS
from gradflow.watching.discovery import WatchedLayer, unit_name
from gradflow.watching.distributed import Ranks, class_of
from gradflow.watching.parameters import OwnedParameter, owned_parameters
from gradflow.watching.recorder import CallKey
from gradflow.watching.step_totals import ColumnValues, StepNumbers, merged_order

# Columns without a default, where nothing has been measured.
_EMPTY: ColumnValues = dict.fromkeys(("act_rms", "act_max_abs", "grad_norm", "log10_grad_norm"))
# Columns that name a row, and hold no number to draw.
_ROW_NAMES = ("seed", "step", "layer", "unit")
# The `PARAMETER_NUMBERS` of a parameter by name; None is missing.
_Numbers = dict[str, float | None]


@dataclass(frozen=True)
class Watched:
    """The model that is watched, and its layers.

    Attributes:
        layers: its layers, and behind them the candidates that may count in their stead.
        listed: how many of `layers` are no candidates.
        ranks: the processes that share the model.
        kept: indices of the layers that count; None until the model has run.
    """

    model: nn.Module
    layers: Sequence[WatchedLayer]
    listed: int
    ranks: Ranks | None = None
    kept: Collection[int] | None = None

    @cached_property
    def owned(self) -> list[OwnedParameter]:
        """The parameters of the layers that count, or may."""
        return owned_parameters(self.layers, self.kept)

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """The range of each layer's parameters in `owned`, by the layer's index."""
        spans: dict[int, tuple[int, int]] = {}
        for i, one in enumerate(self.owned):
            spans[one.place] = spans.get(one.place, (i, i))[0], i + 1
        return spans

    def unit(self, key: CallKey) -> str:
        """Return the name of the row of a call."""
        place, number = key
        return unit_name(self.layers[place].name, number)


def watched_run(
    watched: Watched, steps: Sequence[StepNumbers], options: RunOptions, when: dict[str, Any]
) -> Run:
    """Return all measured steps as one run.

    The options have the thresholds of the verdict; `when` has entries of the environment.
    """
    if not steps or not steps[0].layers:
        names = ", ".join(layer.name for layer in watched.layers[:3])
        raise MeasurementError(
            f"no watched layer of {type(watched.model).__name__} has run with gradients ({names}); "
            "run a forward and a backward pass inside `with gradflow.watch(...)`; a function that "
            "was compiled before needs torch.compiler.reset() first"
        )
    order = merged_order([list(step.layers) for step in steps])
    spec = _spec(watched, order, steps[0])
    seed = options.seed
    layers = [row for step in steps for row in _layer_rows(watched, order, step, seed)]
    params = [row for step in steps for row in _param_rows(watched, order, step, seed)]
    judged = verdict_step(spec, layers, options)
    judged_layers = [row for row in layers if row.step == judged]
    judged_params = [row for row in params if row.step == judged]
    return assembled_run(
        Measured(
            spec,
            options,
            describe_environment(spec, steps[0].device) | when,
            layers=layers,
            params=params,
            warnings=list(findings(judged_layers, judged_params, spec)),
            judged_step=judged,
        )
    )


def verdict_step(spec: Spec, layers: Sequence[LayerRecord], options: RunOptions) -> int:
    """Return the first step in which values are lost, else the first step."""
    steps = {step: list(rows) for step, rows in groupby(layers, key=attrgetter("step"))}
    for step, rows in steps.items():
        judged = [row for row in rows if row.layer > 0 or spec.input_has_gradient]
        if classify(judged, options).layer is not None:
            return step
    return next(iter(steps))


def _spec(watched: Watched, order: Sequence[CallKey], step: StepNumbers) -> ModelSpec:
    kinds = (watched.layers[place].kind for place, _ in order)
    return ModelSpec(
        model=class_of(watched.model).__name__,
        units=" ".join(map(watched.unit, order)),
        kinds=" ".join(kinds),
        shape="x".join(map(str, step.shape)),
        dtype=step.dtype,
        parameters=sum(one.parameter.numel() for one in watched.owned),
        training=watched.model.training,
        input_has_gradient=step.input.get("grad_norm") is not None,
    )


def _layer_rows(
    watched: Watched, order: Sequence[CallKey], step: StepNumbers, seed: int
) -> Iterator[LayerRecord]:
    """Rows of one step from the input up; a layer that did not run in it has no row."""
    yield LayerRecord(seed, step.step, 0, "input", **_EMPTY | step.input)
    for layer, key in enumerate(order, start=1):
        if key in step.layers:
            columns = _EMPTY | step.layers[key] | _parameter_columns(watched, key, step.params)
            yield LayerRecord(seed, step.step, layer, watched.unit(key), **columns)


def _owned_rows(
    watched: Watched, key: CallKey, params: np.ndarray
) -> Iterator[tuple[OwnedParameter, _Numbers]]:
    """The parameters of a layer, which belong to the first call of its module."""
    place, number = key
    for i in range(*watched.spans.get(place, (0, 0))) if number == 0 else ():
        values = (None if value == MISSING else value for value in params[i].tolist())
        yield watched.owned[i], dict(zip(PARAMETER_NUMBERS, values, strict=True))


def _parameter_columns(watched: Watched, key: CallKey, params: np.ndarray) -> ColumnValues:
    own = [numbers for _, numbers in _owned_rows(watched, key, params)]
    if not own:
        return {}
    size, grad, used, update = (
        _length([one[name] for one in own]) for name in ("norm", "grad", "used", "update")
    )
    return {
        "param_norm": size,
        "param_grad_norm": grad,
        "log10_param_grad_norm": log10(grad, 0),
        "clipped_param_grad_norm": None if update is None else used,
        "update_ratio": update / size if update is not None and size else None,
    }


def _length(values: Sequence[float | None]) -> float | None:
    """Norm of several tensors together, from their norms; None is left out."""
    present = [value for value in values if value is not None]
    return math.hypot(*present) if present else None


def _param_rows(
    watched: Watched, order: Sequence[CallKey], step: StepNumbers, seed: int
) -> Iterator[ParamRecord]:
    for layer, key in enumerate(order, start=1):
        for one, numbers in _owned_rows(watched, key, step.params) if key in step.layers else ():
            yield ParamRecord(
                seed,
                step.step,
                layer,
                watched.unit(key),
                one.name,
                "x".join(map(str, one.parameter.shape)),
                one.parameter.numel(),
                math.nan if numbers["norm"] is None else numbers["norm"],
                numbers["grad"],
                log10(numbers["grad"], 0),
                None if numbers["nonfinite"] is None else int(numbers["nonfinite"]),
            )


def write_events(rows: Sequence[LayerRecord], folder: Path | str) -> Path:
    """Write a scalar `column/unit` at its step for every cell of one seed; return the folder.

    The numbers are float32 there, as TensorBoard keeps scalars; missing cells are left out.
    """
    names = [name for name in columns(LayerRecord) if name not in _ROW_NAMES]
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
