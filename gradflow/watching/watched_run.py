"""From the steps that were watched to a `Run`: the records, the verdict and what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
from torch import nn

from gradflow.engine.environment import describe
from gradflow.engine.rows import log10
from gradflow.errors import MeasurementError
from gradflow.judging.assembly import Measured, assembled_run
from gradflow.judging.findings import findings
from gradflow.judging.verdicts import classify
from gradflow.runs.records import LayerRecord, ParamRecord, Run
from gradflow.specs.model_spec import ModelSpec, Spec
from gradflow.specs.run_options import RunOptions
from gradflow.watching.discovery import Place, unit_name
from gradflow.watching.graph_parameters import MISSING
from gradflow.watching.host_totals import Key, Tally, in_order
from gradflow.watching.parameters import Owned, owned_parameters
from gradflow.watching.ranks import Ranks, class_of
from gradflow.watching.step_totals import Columns

# Columns without a default, where nothing has been measured.
EMPTY: Columns = dict.fromkeys(("act_rms", "act_max_abs", "grad_norm", "log10_grad_norm"))


@dataclass(frozen=True)
class Numbers:
    """A row of `parameters.COLUMNS`; None is missing."""

    norm: float | None
    grad: float | None
    nonfinite: float | None
    used: float | None
    update: float | None


@dataclass(frozen=True)
class Watched:
    """What is watched.

    Attributes:
        model: the model.
        places: its layers, and behind them the candidates that may count in their stead.
        found: how many of them are layers.
        ranks: the processes that share the model.
        kept: the places that count; None until the model has run.
    """

    model: nn.Module
    places: Sequence[Place]
    found: int
    ranks: Ranks | None = None
    kept: Collection[int] | None = None

    @property
    def layers(self) -> list[Place]:
        """Those that count."""
        kept = range(self.found) if self.kept is None else self.kept
        return [self.places[i] for i in sorted(kept)]

    @cached_property
    def owned(self) -> list[Owned]:
        """The parameters of the places that count, or may."""
        return owned_parameters(self.places, self.kept)

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """First and last place in `owned` of the parameters of each layer, which lie together."""
        found: dict[int, tuple[int, int]] = {}
        for i, one in enumerate(self.owned):
            found[one.place] = found.get(one.place, (i, i))[0], i + 1
        return found

    def unit(self, key: Key) -> str:
        """Name of a row."""
        place, number = key
        return unit_name(self.places[place].name, number)


def to_run(
    watched: Watched, tallies: Sequence[Tally], options: RunOptions, when: dict[str, Any]
) -> Run:
    """All measured steps as one run.

    Raises:
        MeasurementError: no layer has run.
    """
    if not tallies or not tallies[0].layers:
        raise nothing_ran(watched)
    order = in_order([list(tally.layers) for tally in tallies])
    spec = _spec(watched, order, tallies[0])
    layers = [r for tally in tallies for r in _layer_rows(watched, order, tally, options.seed)]
    params = [r for tally in tallies for r in _param_rows(watched, order, tally, options.seed)]
    step = verdict_step(spec, layers, options)
    judged_layers = [row for row in layers if row.step == step]
    judged_params = [row for row in params if row.step == step]
    return assembled_run(
        Measured(
            spec,
            options,
            describe(spec, tallies[0].device) | when,
            layers=layers,
            params=params,
            warnings=list(findings(judged_layers, judged_params, spec)),
            judged_step=step,
        )
    )


def of_step(run: Run, step: int) -> Run:
    """The run with the layers of one step alone."""
    return replace(run, layer_records=[row for row in run.layer_records if row.step == step])


def nothing_ran(watched: Watched) -> MeasurementError:
    """The error for a step in which no layer has run."""
    names = ", ".join(place.name for place in watched.places[:3])
    return MeasurementError(
        f"no watched layer of {type(watched.model).__name__} has run with gradients ({names}); "
        "run a forward and a backward pass inside `with gradflow.watch(...)`; a function that "
        "was compiled before needs torch.compiler.reset() first"
    )


def verdict_step(spec: Spec, layers: Sequence[LayerRecord], options: RunOptions) -> int:
    """The first step in which values are lost, else the first step."""
    steps = {step: list(rows) for step, rows in groupby(layers, key=attrgetter("step"))}
    for step, rows in steps.items():
        judged = [row for row in rows if row.layer > 0 or spec.input_has_gradient]
        if classify(judged, options).layer is not None:
            return step
    return next(iter(steps))


def _spec(watched: Watched, order: Sequence[Key], tally: Tally) -> ModelSpec:
    modules = [watched.places[place] for place, _ in order]
    return ModelSpec(
        model=class_of(watched.model).__name__,
        units=" ".join(map(watched.unit, order)),
        kinds=" ".join(place.kind for place in modules),
        shape="x".join(map(str, tally.shape)),
        dtype=tally.dtype,
        parameters=sum(one.parameter.numel() for one in watched.owned),
        training=watched.model.training,
        input_has_gradient=tally.input.get("grad_norm") is not None,
    )


def _layer_rows(
    watched: Watched, order: Sequence[Key], tally: Tally, seed: int
) -> Iterator[LayerRecord]:
    """From the input up; a layer that did not run in this step has no row."""
    yield LayerRecord(seed, tally.step, 0, "input", **EMPTY | tally.input)
    for layer, key in enumerate(order, start=1):
        if key in tally.layers:
            columns = EMPTY | tally.layers[key] | _parameter_columns(watched, key, tally.params)
            yield LayerRecord(seed, tally.step, layer, watched.unit(key), **columns)


def _owned_rows(watched: Watched, key: Key, params: np.ndarray) -> list[tuple[Owned, Numbers]]:
    """The parameters of a layer; those of a module that is called again are its first call's."""
    place, number = key
    own = range(*watched.spans.get(place, (0, 0))) if number == 0 else ()
    found = ((watched.owned[i], params[i].tolist()) for i in own)
    return [(one, Numbers(*(None if v == MISSING else v for v in row))) for one, row in found]


def _parameter_columns(watched: Watched, key: Key, params: np.ndarray) -> Columns:
    own = [numbers for _, numbers in _owned_rows(watched, key, params)]
    if not own:
        return {}
    size = _length([one.norm for one in own])
    grad, update = (_length([getattr(one, name) for one in own]) for name in ("grad", "update"))
    return {
        "param_norm": size,
        "param_grad_norm": grad,
        "log10_param_grad_norm": log10(grad, 0),
        "clipped_param_grad_norm": _length([one.used for one in own])
        if update is not None
        else None,
        "update_ratio": update / size if update is not None and size else None,
    }


def _length(values: Sequence[float | None]) -> float | None:
    """Norm of what has these norms together, left-out ones not counted."""
    present = [value for value in values if value is not None]
    return math.hypot(*present) if present else None


def _param_rows(
    watched: Watched, order: Sequence[Key], tally: Tally, seed: int
) -> Iterator[ParamRecord]:
    for layer, key in enumerate(order, start=1):
        for one, numbers in _owned_rows(watched, key, tally.params) if key in tally.layers else ():
            yield ParamRecord(
                seed,
                tally.step,
                layer,
                watched.unit(key),
                one.name,
                "x".join(map(str, one.parameter.shape)),
                one.parameter.numel(),
                math.nan if numbers.norm is None else numbers.norm,
                numbers.grad,
                log10(numbers.grad, 0),
                None if numbers.nonfinite is None else int(numbers.nonfinite),
            )
