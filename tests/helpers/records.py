"""Hand-made records and runs: whatever a test wants to be true, without measuring anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from hypothesis import strategies as st

from gradflow.judging.assembly import summarise_run
from gradflow.runs.records import LayerRecord, ParamRecord, Record, Run, StepRecord, TimeRecord
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

ENVIRONMENT: dict[str, Any] = {
    "start_utc": "2026-01-02T03:04:05+00:00",
    "duration_s": 1.5,
    "torch": "2.13.0",
    "dtype": "float32",
    "device": "cpu",
    "device_name": "a processor",
    "threads": 1,
}
OVERHEAD = {"statistics_over_bare": 1.25, "timed_over_bare": 1.01}


def spec_of(**options: Any) -> StackSpec:
    """A stack of three layers of one unit each."""
    return StackSpec(**{"depth": 3, "block": "mlp", **options})


def layer_rows(
    spec: StackSpec, profile: Sequence[float | None], seed: int = 0, **columns: Any
) -> Iterator[LayerRecord]:
    """One seed whose log10 gradient norms are `profile`, from the input up.

    `columns` replaces a column in every row; a mapping replaces it in the rows it names by their
    place, the input being 0.
    """
    places = [(0, "input")]
    places += [(layer, u) for layer in range(1, spec.depth + 1) for u in spec.kind.units]
    for i, ((layer, unit), log) in enumerate(zip(places, profile, strict=True)):
        row = LayerRecord(seed, 0, layer, unit, 1.0, 3.0, 1.0, log, nonfinite=0, zero_fraction=0.0)
        if layer:
            row = replace(row, **_unit_columns())
        yield replace(row, **_chosen(columns, i))


def _unit_columns() -> dict[str, float]:
    gains = {"gain": 1.25, "skip_gain": 1.0, "branch_gain": 0.75, "skip_branch_cos": 0.0}
    return {**gains, "param_norm": 8.0, "param_grad_norm": 1.0, "log10_param_grad_norm": 0.0}


def _chosen(columns: Mapping[str, Any], place: int) -> dict[str, Any]:
    chosen = {}
    for name, value in columns.items():
        if not isinstance(value, Mapping):
            chosen[name] = value
        elif place in value:
            chosen[name] = value[place]
    return chosen


def run_of(
    spec: StackSpec | None = None,
    layers: Sequence[LayerRecord] | None = None,
    *,
    params: Sequence[ParamRecord] = (),
    times: Sequence[TimeRecord] = (),
    steps: Sequence[StepRecord] = (),
    options: RunOptions | None = None,
    **fields: Any,
) -> Run:
    """A run as `measure` returns it, with the summary that its records have."""
    spec, options = spec or spec_of(), options or RunOptions()
    units = spec.depth * spec.units_per_block
    layers = layers if layers is not None else list(layer_rows(spec, [0.0] * (units + 1)))
    made = {"environment": ENVIRONMENT, "overhead": OVERHEAD, "warnings": ("a warning",)} | fields
    if "summary" not in made:
        made["summary"] = summarise_run(layers, spec, options)
    return Run(
        spec=spec,
        options=options,
        layer_records=layers,
        param_records=params,
        time_records=times,
        step_records=steps,
        **made,
    )


# Names as they occur: no name of a unit or a parameter needs more.
NAMES = st.text("abcxyz_.0123456789", min_size=1, max_size=12)
_CELLS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, 2**53),
    float: st.floats(),
    str: NAMES,
    type(None): st.none(),
}


def records_of(record: type[Record]) -> st.SearchStrategy[Any]:
    """Any row of a table: NaN, infinities and missing cells included."""
    hints = get_type_hints(record)
    cells = {
        name: st.one_of(*(_CELLS[kind] for kind in get_args(hint) or (hint,)))
        for name, hint in hints.items()
    }
    return st.builds(record, **cells)


RUNS = st.builds(
    run_of,
    layers=st.lists(records_of(LayerRecord), min_size=1, max_size=4),
    params=st.lists(records_of(ParamRecord), max_size=4),
    times=st.lists(records_of(TimeRecord), max_size=4),
    steps=st.lists(records_of(StepRecord), max_size=4),
    summary=st.just(run_of().summary),
)
