"""What training came to: converged, learning, stuck or diverged. Torch-free.

The gap is that between chance (the best loss without looking at the input) and the floor (the best
loss that there is). A batch's loss is noisy, so it is averaged over the last tenth of the steps so
far. `gap_closed` is (chance - average) / (chance - floor): 0 at chance, 1 at the floor. On a user's
own batches neither is known: there it goes by how far the loss fell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from statistics import fmean
from typing import Any

from gradflow.runs.records import StepRecord
from gradflow.text import count

CONVERGED = 0.9
NEAR_CHANCE = 0.1
# Without a floor: what the loss has to fall by, as a part of the first, to count as learning.
FALL = 0.1
# A head that learns nothing but noise at a high learning rate is worse than chance by a tenth.
WORSE = 0.5
WINDOW = 0.1

NO_FLOOR = "The floor of the loss is not known, so what is left of it cannot be said."
ADVICE = {
    "converged": "It closed nine tenths of the gap between chance and the floor.",
    "learning": "It is between chance and the floor: raise --steps to see where it ends.",
    "stuck": "The loss is no better than chance: see what gradient the first layers get.",
    "diverged": "The loss grew beyond chance: lower --lr, or raise --warmup.",
    "unstable": "Seeds disagree.",
}

# Where no floor is known.
BY_FALL = {
    "learning": f"The loss fell by more than a tenth. {NO_FLOOR}",
    "stuck": "The loss did not fall by a tenth: see what gradient the first layers get.",
    "diverged": "The loss grew beyond its start: lower --lr, or raise --warmup.",
}


@dataclass(frozen=True)
class Outcome:
    """What the training of one seed, or of several, came to.

    Attributes:
        name: a key of `ADVICE`.
        step: converged: the first at which the gap was closed so far. diverged: the first loss
            that is not finite, or the first step from which the average stays too large. Else
            the last step.
        loss: average over the last tenth of the steps; NaN where a loss is not finite.
        gap_closed: at the end; NaN where a loss is not finite, None where no floor is known.
        counts: how many seeds came to what, where they disagree.
    """

    name: str
    step: int
    loss: float
    gap_closed: float | None
    counts: tuple[tuple[str, int], ...] = ()

    @property
    def advice(self) -> str:
        """What it means, and what to do."""
        told = ", ".join(f"{number} {name}" for name, number in self.counts)
        if self.gap_closed is None and self.name in BY_FALL:
            return BY_FALL[self.name]
        return ADVICE[self.name] + (f" Of {sum(n for _, n in self.counts)}: {told}." * bool(told))


def judge(records: Sequence[StepRecord]) -> Outcome:
    """The outcome of one seed.

    `diverged`: a loss is not finite, or the end is worse than the start, and worse than chance by
    half of the gap; `converged`: nine tenths of the gap are closed at the end; `learning`: more
    than one tenth; `stuck`: less.

    Args:
        records: one seed, every step in order.
    """
    lost = next((row.step for row in records if not math.isfinite(row.loss)), None)
    if lost is not None:
        return Outcome("diverged", lost, math.nan, math.nan)
    averages = list(running_mean([row.loss for row in records]))
    end = records[-1]
    if end.loss_chance is None or end.loss_floor is None:
        return _by_fall(records, averages)
    gap = end.loss_chance - end.loss_floor
    closed = [(end.loss_chance - average) / gap for average in averages]
    limit = max(end.loss_chance + WORSE * gap, records[0].loss)
    if averages[-1] > limit:
        below = (i for i, average in enumerate(averages) if average <= limit)
        name, place = "diverged", 1 + max(below)
    elif closed[-1] >= CONVERGED:
        name, place = "converged", next(i for i, part in enumerate(closed) if part >= CONVERGED)
    else:
        name, place = ("learning" if closed[-1] >= NEAR_CHANCE else "stuck"), -1
    return Outcome(name, records[place].step, averages[-1], closed[-1])


def _by_fall(records: Sequence[StepRecord], averages: Sequence[float]) -> Outcome:
    """The outcome where neither floor nor chance are known: by the first loss and the last ones."""
    first, last, end = records[0].loss, averages[-1], records[-1].step
    if last > first + FALL * abs(first):
        return Outcome("diverged", end, last, None)
    return Outcome("learning" if last < first - FALL * abs(first) else "stuck", end, last, None)


def running_mean(losses: Sequence[float]) -> Iterator[float]:
    """The mean of each loss and those before it, as many as a tenth of all."""
    window = math.ceil(WINDOW * len(losses))
    return (fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses)))


def by_seed(records: Sequence[StepRecord]) -> list[list[StepRecord]]:
    """The steps of each seed."""
    return [list(rows) for _, rows in groupby(records, key=attrgetter("seed"))]


def combine(outcomes: Sequence[Outcome]) -> Outcome:
    """The seeds' common outcome, or `unstable`: the first step of a fault, the last of a success.

    Loss and closed gap are means over the seeds.
    """
    names = Counter(outcome.name for outcome in outcomes)
    steps = [outcome.step for outcome in outcomes]
    loss = fmean(outcome.loss for outcome in outcomes)
    gaps = [outcome.gap_closed for outcome in outcomes if outcome.gap_closed is not None]
    closed = fmean(gaps) if gaps else None
    if len(names) == 1:
        name = outcomes[0].name
        return Outcome(name, min(steps) if name == "diverged" else max(steps), loss, closed)
    counts = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    return Outcome("unstable", max(steps), loss, closed, tuple(counts))


def summary_of(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The fields of `records.Summary` that tell what training came to; none without steps."""
    if not records:
        return {}
    found = combine([judge(rows) for rows in by_seed(records)])
    return {
        "outcome": found.name,
        "outcome_step": found.step,
        "outcome_advice": found.advice,
        "final_loss": found.loss,
        "loss_floor": records[0].loss_floor,
        "loss_chance": records[0].loss_chance,
        "gap_closed": found.gap_closed,
    }


def outcome_sentence(outcome: str, step: int | None) -> str:
    """`converged at step 90`, `stuck after 150 steps`."""
    if outcome in ("converged", "diverged"):
        return f"{outcome} at step {step}"
    return f"{outcome} after {count(step or 0, 'step')}"
