"""The gate of `gradflow check`: bounds and baselines that a run keeps or breaks. Torch-free.

Zero is not success: a gradient that is exactly zero, missing or not finite never passes, whatever
the bounds are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradflow.errors import BaselineError, RunFolderError, UsageError
from gradflow.judging.remarks import SAME_NETWORK, place
from gradflow.judging.verdicts import NONFINITE
from gradflow.runs.records import LayerRecord, Run
from gradflow.runs.store import load
from gradflow.specs.fields import deciding
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import run_key
from gradflow.text import count

_NAN_OR_INFINITY = "NaN or infinity"
# A row, and what is wrong there.
_Lost = tuple[LayerRecord, str]
# Reasons of one kind that are listed one by one; the rest is counted.
_SHOWN = 3
# These move gradients by rounding only; that is what a tolerance is for, so they are only said.
_SAID = ("device_name", "gradflow", "torch", "threads", "matmul_precision")


@dataclass(frozen=True)
class Bounds:
    """Limits that hold for every seed; None is no limit.

    Attributes:
        max_decades: on |log10(|g_input| / |g_output|)|.
        min_gain: on the gain of every unit, as is `max_gain`.
        no_nonfinite: no NaN or infinity in any activation, gradient or parameter gradient.
    """

    max_decades: float | None = None
    min_gain: float | None = None
    max_gain: float | None = None
    no_nonfinite: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return self == Bounds()


# Asked of every run where no bound and no baseline is given.
DEFAULT_BOUNDS = Bounds(max_decades=3.0)


def check_limits(bounds: Bounds, rtol: float, spelled: Callable[[str], str] = "{}=".format) -> None:
    """Refuse limits that make no sense.

    Args:
        bounds: the limits.
        rtol: relative difference from a baseline that passes.
        spelled: how the caller's user writes the name of a limit: `max_decades=` in Python,
            `--max-decades` on the command line.

    Raises:
        UsageError: a negative limit, NaN, or an empty range.
    """
    limits = {name: getattr(bounds, name) for name in ("max_decades", "min_gain", "max_gain")}
    for name, value in (limits | {"rtol": rtol}).items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            rule = f"{spelled(name)} is a finite number of at least 0"
            example = f"{spelled(name)} 1".replace("= ", "=")
            raise UsageError(rule, value, f"use for example {example}")
    low, high = bounds.min_gain, bounds.max_gain
    if low is not None and high is not None and low > high:
        rule = f"{spelled('min_gain')} is at most {spelled('max_gain')}"
        raise UsageError(rule, f"{low} and {high}", "swap the two")


@dataclass(frozen=True)
class Judgement:
    """The answer of a gate: what was compared, and the reasons why it does not pass."""

    compared: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reasons

    def __add__(self, other: Judgement) -> Judgement:
        """The answer of both gates together; lines that both have are said once."""
        return Judgement(
            tuple(dict.fromkeys(self.compared + other.compared)),
            tuple(dict.fromkeys(self.reasons + other.reasons)),
        )


def judge_run(run: Run, bounds: Bounds) -> Judgement:
    """Hold every seed of a run against bounds; gradients that are lost never pass."""
    found = _arrives(run)
    if bounds.max_decades is not None:
        found += _decades(run, bounds.max_decades)
    if bounds.min_gain is not None or bounds.max_gain is not None:
        low = 0.0 if bounds.min_gain is None else bounds.min_gain
        high = math.inf if bounds.max_gain is None else bounds.max_gain
        found += _gains(run, low, high)
    if bounds.no_nonfinite:
        found += _nonfinite(run)
    return found


def against_baseline(run: Run, baseline: Run, rtol: float) -> Judgement:
    """Hold every gradient norm of a run against those of a baseline.

    Raises:
        BaselineError: the baseline measured something else.
    """
    _check_comparable(run, baseline)
    pairs = list(zip(run.first_records, baseline.first_records, strict=True))
    limit = math.log10(1 + rtol)
    reasons = [
        *_apart(pairs, "|g|", "log10_grad_norm", limit),
        *_apart(pairs, "|dW|", "log10_param_grad_norm", limit),
    ]
    what = f"gradient norms at {len(pairs)} places, each within {rtol:g} of the baseline"
    elsewhere = [f"  beside a baseline with {line}" for line in _differences(run, baseline, _SAID)]
    return _arrives(run) + Judgement((what, *elsewhere), tuple(reasons))


def load_baseline(path: Path) -> Run:
    """Read the run that others are held against.

    Raises:
        BaselineError: it is missing or cannot be read.
    """
    try:
        return load(path)
    except RunFolderError as error:
        raise BaselineError(f"no baseline: {error}") from None


def _check_comparable(run: Run, baseline: Run) -> None:
    differing = [*_other_settings(run, baseline), *_differences(run, baseline, SAME_NETWORK)]
    if differing or run_key(run.spec, run.options) != run_key(baseline.spec, baseline.options):
        raise BaselineError(
            f"the baseline measured another network: {', '.join(differing)}; "
            "measure a baseline with the same options"
        )
    places = [[(row.seed, row.layer, row.unit) for row in r.first_records] for r in (run, baseline)]
    if places[0] != places[1]:
        raise BaselineError("the rows of the baseline are those of other units; measure it anew")


def _other_settings(run: Run, baseline: Run) -> Iterator[str]:
    mine, theirs = _settings(run), _settings(baseline)
    for name in dict.fromkeys([*mine, *theirs]):
        here, there = mine.get(name), theirs.get(name)
        if here != there:
            yield f"{name} {there} there, {here} here"


def _differences(run: Run, baseline: Run, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        mine, theirs = run.environment.get(key), baseline.environment.get(key)
        if mine != theirs:
            yield f"{key.replace('_', ' ')} {theirs} there, {mine} here"


def _settings(run: Run) -> dict[str, object]:
    numbers = deciding(RunOptions, "numbers")
    return run.spec.to_json() | {name: getattr(run.options, name) for name in numbers}


def _seeds(run: Run) -> Iterator[tuple[str, list[LayerRecord]]]:
    """Yield the name and rows of every seed, or of every step of a seed where there are several."""
    judged = [r for r in run.layer_records if r.layer > 0 or run.spec.input_has_gradient]
    for seed in run.options.all_seeds:
        rows = [row for row in judged if row.seed == seed]
        steps = dict.fromkeys(row.step for row in rows)
        if len(steps) < 2:
            yield str(seed), rows
        for step in steps if len(steps) > 1 else ():
            yield f"{seed}, step {step}", [row for row in rows if row.step == step]


def _arrives(run: Run) -> Judgement:
    """Judge whether a finite gradient, not zero, reaches every unit and its parameters."""
    trained = {(row.seed, row.layer, row.unit) for row in run.param_records}
    wanted = run.spec.depth * run.spec.units_per_block + run.spec.input_has_gradient
    absent: list[str] = []
    lost: list[_Lost] = []
    for seed, rows in _seeds(run):
        if len(rows) != wanted:
            absent.append(f"seed {seed}: {len(rows)} of {wanted} places have a gradient")
        lost += [*_lost_gradients(rows), *_lost_parameters(rows, trained)]
    what = f"a finite gradient, not zero, at {wanted} places in each of {run.options.seeds} seeds"
    reasons = [*_shortened(absent), *_by_kind(lost)]
    return Judgement((what,), (*_beginning(run), *reasons) if reasons else ())


def _beginning(run: Run) -> Iterator[str]:
    """Name the first place at which values were lost; later ones follow from it."""
    if run.summary.verdict == NONFINITE.word and (where := place(run.summary)):
        yield f"NaN or infinity begins at {where}"


def _lost_gradients(rows: Sequence[LayerRecord]) -> Iterator[_Lost]:
    for row in rows:
        if fault := _fault(row.log10_grad_norm) or (_NAN_OR_INFINITY if row.nonfinite else ""):
            yield row, f"gradient is {fault}"


def _lost_parameters(
    rows: Sequence[LayerRecord], trained: set[tuple[int, int, str]]
) -> Iterator[_Lost]:
    for row in rows:
        has_any = row.param_norm is not None or (row.seed, row.layer, row.unit) in trained
        if has_any and (fault := _fault(row.log10_param_grad_norm)):
            yield row, f"gradient of the parameters is {fault}"


def _fault(decades: float | None) -> str:
    """Fault of a gradient by log10 of its norm; empty if it is finite and not zero."""
    if decades is None:
        return "missing"
    if decades == -math.inf:
        return "zero"
    return "" if math.isfinite(decades) else _NAN_OR_INFINITY


def _place(row: LayerRecord) -> str:
    step = f", step {row.step}" if row.step else ""
    return f"seed {row.seed}{step}, layer {row.layer} ({row.unit})"


def _decades(run: Run, limit: float) -> Judgement:
    reasons, found = [], []
    for seed, rows in _seeds(run):
        ends = [row.log10_grad_norm for row in (rows[0], rows[-1])] if rows else []
        finite = [end for end in ends if end is not None and math.isfinite(end)]
        if len(finite) < 2:
            continue  # `_arrives` has said so
        total = finite[0] - finite[1]
        found.append(abs(total))
        if abs(total) > limit:
            reasons.append(f"seed {seed}: {total:+.2f} decades from output to input")
    worst = f", found {max(found):.2f}" if found else ""
    what = f"decades between output and input, at most {limit:g}{worst}"
    return Judgement((what,), tuple(_shortened(reasons)))


def _gains(run: Run, low: float, high: float) -> Judgement:
    units = [row for row in run.first_records if row.layer > 0]
    found = [row.gain for row in units if row.gain is not None and not math.isnan(row.gain)]
    lost = [
        (row, f"gain is {'missing' if row.gain is None else 'NaN'}")
        for row in units
        if row.gain is None or math.isnan(row.gain)
    ]
    beyond = (
        f"{_place(row)}: gain is {row.gain:.4g}"
        for row in units
        if row.gain is not None and (row.gain < low or row.gain > high)
    )
    seen = f", found {min(found):.4g} to {max(found):.4g}" if found else ""
    what = f"gain of every unit, {low:g} to {high:g}{seen}"
    return Judgement((what,), (*_by_kind(lost), *_shortened(beyond)))


def _nonfinite(run: Run) -> Judgement:
    lost = [
        (row, _NAN_OR_INFINITY)
        for row in run.layer_records
        if row.nonfinite or not all(map(_finite, (row.act_max_abs, row.act_rms, row.gain)))
    ]
    reasons = (*_beginning(run), *_by_kind(lost)) if lost else ()
    return Judgement(("no NaN or infinity in any layer",), reasons)


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _apart(
    pairs: Sequence[tuple[LayerRecord, LayerRecord]], name: str, column: str, limit: float
) -> Iterator[str]:
    lost: list[_Lost] = []
    apart: list[str] = []
    for row, base in pairs:
        mine, theirs = getattr(row, column), getattr(base, column)
        if mine is None and theirs is None:
            continue
        faults = _fault(mine), _fault(theirs)
        if any(faults):
            here, there = (fault or "a number" for fault in faults)
            lost.append((row, f"{name} is {here}, in the baseline {there}"))
        elif abs(mine - theirs) > limit:
            apart.append(f"{_place(row)}: {name} 10^{mine:.4f}, baseline 10^{theirs:.4f}")
    yield from _by_kind(lost)
    yield from _shortened(apart)


def _by_kind(lost: Iterable[_Lost]) -> Iterator[str]:
    """One line for each thing that is wrong: where it is first, and at how many more places."""
    found: dict[str, tuple[LayerRecord, int]] = {}
    for row, what in lost:
        first, more = found.get(what, (row, -1))
        found[what] = first, more + 1
    for what, (row, more) in found.items():
        rest = f", and at {count(more, 'more place')}" if more else ""
        yield f"{_place(row)}: {what}{rest}"


def _shortened(reasons: Iterable[str]) -> Iterator[str]:
    """The first few reasons of one kind, and how many more there are."""
    every = list(reasons)
    yield from every[:_SHOWN]
    if len(every) > _SHOWN:
        yield f"... and {len(every) - _SHOWN} more like the last"
