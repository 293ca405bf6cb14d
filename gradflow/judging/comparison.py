"""Runs side by side: gradient and cost of each against a reference. Torch-free.

A difference in time is called one only if it is significant (the 95 % interval of the ratio, over
repeats that took turns, leaves 1 out) and larger than a noise threshold. Runs that were not
measured alike are never ratioed.
"""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING

import numpy as np

from gradflow.judging.verdicts import verdict_named
from gradflow.runs.naming import RunName, names
from gradflow.runs.records import LayerRecord, Run, Summary, TimeRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Floats = NDArray[np.float64]

# Two runs are compared in speed only where these agree.
SPEED_KEYS = ("device", "device_name", "threads", "torch", "dtype", "matmul_precision")
_NOISE = 0.01


@dataclass(frozen=True)
class Ratio:
    """Time per layer over that of the reference, with its 95 % interval.

    `value` is None, and `reason` says why, where the two cannot be compared. `interleaved` tells
    whether the repeats of the two took turns; where they did not, a slow minute of the machine
    looks like a slow network, so nothing is called a difference.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    interleaved: bool = False

    def differs(self, noise: float = _NOISE) -> bool:
        """Whether the ratio is both significant and above the noise threshold."""
        if self.value is None or self.low is None or self.high is None:
            return False
        significant = self.interleaved and (self.low > 1 or self.high < 1)
        return significant and abs(self.value - 1) > noise


@dataclass(frozen=True)
class ComparedRun:
    """One run beside the reference; its name says what tells it from the other runs."""

    run: Run
    name: RunName
    profile: tuple[float, ...]
    forward: Ratio
    backward: Ratio
    total: Ratio
    is_reference: bool

    @property
    def design(self) -> str:
        """The part of the name that runs of other depths share."""
        return self.name.without_depth

    @property
    def depth(self) -> int:
        """Number of blocks of the network."""
        return self.name.depth

    @property
    def summary(self) -> Summary:
        """The run in a few numbers."""
        return self.run.summary


@dataclass(frozen=True)
class Comparison:
    """Runs beside a reference: designs from the healthiest, depths rising within each.

    `failures` has one line for each cell without a run, or without times.
    """

    rows: tuple[ComparedRun, ...]
    reference: Run
    noise: float
    failures: tuple[str, ...] = ()


def compare_runs(
    runs: Sequence[Run], reference: Run, noise: float = _NOISE, failures: Sequence[str] = ()
) -> Comparison:
    """Put runs beside a reference.

    Args:
        runs: in the order of their numbers.
        reference: the run that times are divided by; it joins the runs if it is not one of them.
        noise: relative difference in time below which nothing is called one.
        failures: what could not be measured, a line each.
    """
    if not any(run is reference for run in runs):
        runs = [reference, *runs]
    rows = [
        ComparedRun(
            run=run,
            name=name,
            profile=mean_profile(run.first_records),
            forward=time_ratio(run, reference, ("forward_s",)),
            backward=time_ratio(run, reference, ("backward_s",)),
            total=time_ratio(run, reference, ("forward_s", "backward_s")),
            is_reference=run is reference,
        )
        for run, name in zip(runs, names(runs), strict=True)
    ]
    return Comparison(tuple(_sorted(rows)), reference, noise, tuple(failures))


def mean_profile(
    records: Iterable[LayerRecord], column: str = "log10_grad_norm"
) -> tuple[float, ...]:
    """A column from the input up, the mean over the seeds; NaN where a value is missing."""
    values = map(attrgetter("seed", column), records)
    seeds = [
        array("d", (math.nan if log is None else log for _, log in rows))
        for _, rows in groupby(values, key=itemgetter(0))
    ]
    return tuple(sum(logs) / len(logs) for logs in zip(*seeds, strict=False))


def _sorted(rows: Iterable[ComparedRun]) -> list[ComparedRun]:
    """Put runs of a design together, first designs that lose the gradient at fewest depths."""
    by_design = sorted(rows, key=attrgetter("design", "depth"))
    groups = [list(group) for _, group in groupby(by_design, key=attrgetter("design"))]
    return [row for group in sorted(groups, key=_badness) for row in group]


def _badness(group: Sequence[ComparedRun]) -> tuple[int, float]:
    """Number of depths at which a design loses the gradient; then |decades| at the largest."""
    lost = sum(not verdict_named(row.summary.verdict).passes for row in group)
    total = group[-1].summary.total_log10_gain
    return lost, np.inf if total is None else abs(total)


def time_ratio(run: Run, reference: Run, fields: Sequence[str]) -> Ratio:
    """Time per layer of `run` over that of `reference`: geometric mean over the repeats.

    Repeats of one sweep took turns, so they are compared pair by pair (a one-sample t interval
    of the log ratios); others by Welch's t interval.
    """
    why = "; ".join(_obstacles(run, reference))
    if why:
        return Ratio(None, reason=why)
    if run is reference:
        return Ratio(1.0, 1.0, 1.0, interleaved=True)
    mine, theirs = (_log_seconds(each, fields) for each in (run, reference))
    if not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
        return Ratio(None, reason="a time is not a positive number")
    paired = _same_sweep(run, reference) and len(mine) == len(theirs)
    low, high = _interval(mine, theirs, paired=paired)
    return Ratio(_exp(mine.mean() - theirs.mean()), low, high, interleaved=paired)


def _obstacles(run: Run, reference: Run) -> Iterator[str]:
    """Yield the reasons why the times of two runs cannot be divided."""
    if not run.time_records or not reference.time_records:
        yield "not timed" if not run.time_records else "the reference is not timed"
        return
    if run.environment.get("contended") or reference.environment.get("contended"):
        whose = "contended" if run.environment.get("contended") else "the reference is contended"
        yield f"{whose}: timed beside other work"
    if run.options.compile != reference.options.compile:
        compiled, other = ("compiled", "eager") if run.options.compile else ("eager", "compiled")
        yield f"{compiled} against {other}"
    if run.environment.get("cuda_graphs") != reference.environment.get("cuda_graphs"):
        replayed = ("CUDA graphs", "eager")
        yield " against ".join(replayed if run.environment.get("cuda_graphs") else replayed[::-1])
    for key in SPEED_KEYS:
        mine, theirs = run.environment.get(key), reference.environment.get(key)
        if mine != theirs:
            yield f"{key.replace('_', ' ')} {mine} against {theirs}"


def _log_seconds(run: Run, fields: Sequence[str]) -> _Floats:
    """Natural logarithm of the seconds per layer in each repeat."""
    with np.errstate(divide="ignore", invalid="ignore"):
        layers = len({record.layer for record in run.time_records})
        return np.log(_repeat_totals(run.time_records, fields) / layers)


def _repeat_totals(records: Sequence[TimeRecord], fields: Sequence[str]) -> _Floats:
    """Seconds of each repeat, summed over the units and the given columns."""
    totals: dict[int, float] = {}
    for record in records:
        seconds = sum(getattr(record, field) for field in fields)
        totals[record.repeat] = totals.get(record.repeat, 0.0) + seconds
    return np.array([totals[repeat] for repeat in sorted(totals)])


def _same_sweep(run: Run, other: Run) -> bool:
    sweep = run.environment.get("sweep")
    return sweep is not None and sweep == other.environment.get("sweep")


def _interval(mine: _Floats, theirs: _Floats, *, paired: bool) -> tuple[float | None, float | None]:
    """95 % interval of the ratio; None where there are too few repeats for one."""
    from scipy import stats  # a second to import, and only where there are times

    if min(len(mine), len(theirs)) < 2:
        return None, None
    with warnings.catch_warnings():
        # Repeats without any spread: the interval is a point.
        warnings.simplefilter("ignore", RuntimeWarning)
        if paired:
            test = stats.ttest_rel(mine, theirs)
        else:
            test = stats.ttest_ind(mine, theirs, equal_var=False)
        interval = test.confidence_interval(0.95)
    if not np.isfinite(interval.low):
        point = _exp(mine.mean() - theirs.mean())
        return point, point
    return _exp(interval.low), _exp(interval.high)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))
