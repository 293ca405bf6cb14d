"""How deep a design can be: where its runs leave the healthy range, and where theory does.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from operator import attrgetter

from gradflow.judging.comparison import ComparedRun, Comparison
from gradflow.judging.outlook import DEEPEST, MOST_UNITS, Reach, healthy_reach
from gradflow.judging.remarks import NOT_FINITE
from gradflow.judging.verdicts import verdict_named
from gradflow.runs.records import Run, Summary
from gradflow.specs.stack import StackSpec
from gradflow.text import two_digits


@dataclass(frozen=True)
class TrainableDepth:
    """Depth at which a design leaves the healthy range, from its runs at several depths.

    Attributes:
        design: the design.
        healthy: deepest run up to which all are healthy; None if the shallowest is not.
        lost: the next deeper run, which is not healthy; None if there is none.
        depth: where the threshold is crossed: between the two by interpolation, beyond them by the
            trend of the nearest run; None where neither tells.
        predicted: largest depth at which theory has the design healthy, 0 if at none; None without
            theory.
        predicted_at_least: it may be more, for theory or the search ends there.
    """

    design: str
    healthy: int | None
    lost: int | None
    depth: float | None
    predicted: int | None = None
    predicted_at_least: bool | None = None

    @property
    def source(self) -> str | None:
        """How `depth` was found: `interpolated` or `trend`."""
        if self.depth is None:
            return None
        return "trend" if self.healthy is None or self.lost is None else "interpolated"

    @property
    def sentence(self) -> str:
        """The depth in words, by measurement and by theory."""
        about = "" if self.depth is None else f"about {two_digits(self.depth)}"
        if self.healthy is None:
            found = f"below {self.lost:,}" + (f", {about} by its trend" if about else "")
        elif self.lost is None:
            more = f"{about} by its trend" if about else "no end by its trend"
            found = f"beyond {self.healthy:,}, {more}"
        else:
            between = f"between {self.healthy:,} and {self.lost:,}"
            found = f"{about}, {between}" if about else between
        return f"{self.design}: {found}{self._theory}"

    @property
    def _theory(self) -> str:
        if self.predicted is None:
            return ""
        if not self.predicted:
            return "; by theory at no depth"
        return f"; by theory {self.predicted:,}{' at least' if self.predicted_at_least else ''}"


def trainable_depths(comparison: Comparison) -> list[TrainableDepth]:
    """The trainable depth of each design with two depths or more, in the order of the rows."""
    groups = (list(rows) for _, rows in groupby(comparison.rows, key=attrgetter("design")))
    return [_of_design(rows) for rows in groups if len({row.depth for row in rows}) > 1]


def _of_design(rows: Sequence[ComparedRun]) -> TrainableDepth:
    """The trainable depth of one design from its runs, which have rising depths."""
    healthy = list(takewhile(_is_healthy, rows))
    lost = rows[len(healthy)] if len(healthy) < len(rows) else None
    last = healthy[-1] if healthy else None
    if last and lost:
        depth = _crossing(last, lost)
    else:
        depth = _by_trend((last or rows[0]).summary, last, lost)
    reached, missed = last.depth if last else None, lost.depth if lost else None
    theory = _predicted([row.run for row in rows])
    told = (theory.depth, theory.at_least) if theory else (None, None)
    return TrainableDepth(rows[0].design, reached, missed, depth, *told)


def _predicted(runs: Sequence[Run]) -> Reach | None:
    """The depth by theory; None where theory has no prediction for the runs themselves."""
    run = runs[0]
    if not any(map(_has_theory, runs)) or not isinstance(run.spec, StackSpec):
        return None
    if any(map(run.spec.is_stored, (run.spec.scheme, run.spec.block))):
        return None  # a user's own, whose file was not loaded
    most = min(runs[-1].spec.depth, MOST_UNITS // run.spec.units_per_block)
    reach = healthy_reach(run.spec, run.options, max(DEEPEST, most))
    return reach if reach.depth or not reach.at_least else None


def _has_theory(run: Run) -> bool:
    """Whether theory predicts the profile of a run, be it comparable or not."""
    return run.summary.theory_band is not None or run.summary.theory_reason == NOT_FINITE


def _is_healthy(row: ComparedRun) -> bool:
    return verdict_named(row.summary.verdict).passes


def _by_trend(summary: Summary, last: ComparedRun | None, lost: ComparedRun | None) -> float | None:
    """The depth at which a trend leaves the healthy range, unless other runs contradict it."""
    depth = summary.healthy_depth
    if depth is None or (last and depth < last.depth) or (lost and depth > lost.depth):
        return None
    return depth


def _crossing(last: ComparedRun, lost: ComparedRun) -> float | None:
    """Depth at which the decades reach the threshold, on a line through both runs.

    The line is straight in the depth where the deeper profile is exponential, else in the
    logarithm of the depth.
    """
    low, high = last.summary.total_log10_gain, lost.summary.total_log10_gain
    if low is None or high is None or low == high:
        return None
    options = lost.run.options
    limit = options.exploding if high > 0 else -options.vanishing
    share = (limit - low) / (high - low)
    if not 0 <= share <= 1:
        return None
    if lost.summary.trend == "exponential":
        return last.depth + share * (lost.depth - last.depth)
    return math.exp(math.log(last.depth) + share * math.log(lost.depth / last.depth))
