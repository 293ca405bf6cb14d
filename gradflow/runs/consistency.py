"""What does not fit together in stored runs that can be read: each is named in one line.

A run whose table was edited, or damaged within its numbers, still says in its run.json what it
was; and copies of a run folder look like several measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradflow.runs.described import Described
from gradflow.runs.records import LayerRecord
from gradflow.specs.model_spec import ModelSpec
from gradflow.specs.stack import run_key

# Verdicts that only finite numbers have.
FINITE_VERDICTS = ("healthy", "vanishing", "exploding")
# Finite in every row of such a run.
FINITE = ("act_rms", "act_max_abs", "log10_grad_norm", "gain", "log10_param_grad_norm")
# These may leave float64's range, to 0 or inf, where their logarithms do not.
NUMBERS = ("grad_norm", "param_grad_norm")
# A GPU draws other random numbers than a CPU, so its weights are others.
SAME_NETWORK = ("device", "dtype")
SHOWN_NAMES, SHOWN_KEYS = 3, 10

# Layer and unit of the first row that is not finite, and how many rows are not.
Broken = tuple[int, str, int]


def is_broken(row: LayerRecord) -> bool:
    """Whether a row holds what no run with a finite verdict can hold."""
    finite = (getattr(row, name) for name in FINITE)
    numbers = (getattr(row, name) for name in NUMBERS)
    return (
        bool(row.nonfinite)
        or any(value is not None and not math.isfinite(value) for value in finite)
        or any(value is not None and math.isnan(value) for value in numbers)
    )


def first_broken(rows: Sequence[LayerRecord]) -> Broken | None:
    """The first row of these that is broken, and how many are; None if none is."""
    broken = [row for row in rows if is_broken(row)]
    return (broken[0].layer, broken[0].unit, len(broken)) if broken else None


def contradiction(name: str, verdict: str, broken: Broken | None) -> Iterator[str]:
    """A line if the rows of a run are not finite although its stored verdict says otherwise."""
    if broken and verdict in FINITE_VERDICTS:
        layer, unit, rows = broken
        more = f" and in {rows - 1} more rows" if rows > 2 else " and in 1 more row"
        where = f"layer {layer} ({unit}){more if rows > 1 else ''}"
        yield f"{name} is stored as {verdict}, but its layers.csv is not finite at {where}"


def same_network(named: Sequence[tuple[str, Described]]) -> Iterator[str]:
    """A line for each network that several of these runs measured, as copies of a folder do.

    A watched model is told by its layers alone, which have other weights in every training.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for name, run in named:
        if isinstance(run.spec, ModelSpec) and run.spec.request is None:
            continue
        where = (str(run.environment.get(key)) for key in SAME_NETWORK)
        found.setdefault((run_key(run.spec, run.options), *where), []).append(name)
    several = [(key, names) for (key, *_), names in found.items() if len(names) > 1]
    for key, names in several[:SHOWN_KEYS]:
        yield f"{_listed(names)} measured the same network (key {key})"
    if len(several) > SHOWN_KEYS:
        yield f"{len(several) - SHOWN_KEYS} more networks were measured more than once"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    *first, last = [*names[:SHOWN_NAMES], *([f"{more} more"] if more > 0 else [])]
    return f"{', '.join(first)} and {last}"
