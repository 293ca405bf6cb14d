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

# Part of the gap between chance and the floor that is closed.
_CONVERGED_FROM, _LEARNING_FROM = 0.9, 0.1
# Without a floor: what the loss has to fall by, as a part of the first, to count as learning.
_FALL = 0.1
# A head that learns nothing but noise at a high learning rate is worse than chance by a tenth.
_WORSE = 0.5
_WINDOW = 0.1

_NO_FLOOR = "The floor of the loss is not known, so what is left of it cannot be said."


@dataclass(frozen=True)
class TrainingClass:
    """One class of what training came to.

    Attributes:
        word: how run.json, tables and command line call the class.
        advice: what it means, and what to do.
        advice_by_fall: the same where no floor of the loss is known; empty if that cannot be.
        colour: in the terminal.
        at_step: whether its step is the one at which it happened, not the last one.
        fails: whether it is a fault, which seeds together have from the first of them on.
    """

    word: str
    advice: str
    advice_by_fall: str = ""
    colour: str = "red"
    at_step: bool = False
    fails: bool = False


CONVERGED = TrainingClass(
    "converged",
    "It closed nine tenths of the gap between chance and the floor.",
    colour="green",
    at_step=True,
)
LEARNING = TrainingClass(
    "learning",
    "It is between chance and the floor: raise --steps to see where it ends.",
    f"The loss fell by more than a tenth. {_NO_FLOOR}",
    colour="yellow",
)
STUCK = TrainingClass(
    "stuck",
    "The loss is no better than chance: see what gradient the first layers get.",
    "The loss did not fall by a tenth: see what gradient the first layers get.",
)
DIVERGED = TrainingClass(
    "diverged",
    "The loss grew beyond chance: lower --lr, or raise --warmup.",
    "The loss grew beyond its start: lower --lr, or raise --warmup.",
    at_step=True,
    fails=True,
)
DISAGREEING = TrainingClass("unstable", "Seeds disagree.", colour="yellow")
TRAINING_CLASSES = {each.word: each for each in (CONVERGED, LEARNING, STUCK, DIVERGED, DISAGREEING)}


@dataclass(frozen=True)
class TrainingOutcome:
    """What the training of one seed, or of several, came to.

    Attributes:
        kind: its class.
        step: converged: the first at which the gap was closed so far. diverged: the first loss
            that is not finite, or the first step from which the average stays too large. Else
            the last step.
        loss: average over the last tenth of the steps; NaN where a loss is not finite.
        gap_closed: at the end; NaN where a loss is not finite, None where no floor is known.
        counts: how many seeds came to what, where they disagree.
    """

    kind: TrainingClass
    step: int
    loss: float
    gap_closed: float | None
    counts: tuple[tuple[str, int], ...] = ()

    @property
    def advice(self) -> str:
        """What the class means, what to do, and how many seeds came to what."""
        if self.gap_closed is None and self.kind.advice_by_fall:
            return self.kind.advice_by_fall
        told = ", ".join(f"{number} {word}" for word, number in self.counts)
        return self.kind.advice + (f" Of {sum(n for _, n in self.counts)}: {told}." * bool(told))


def outcome_of(records: Sequence[StepRecord]) -> TrainingOutcome:
    """The outcome of a training with one seed.

    `diverged`: a loss is not finite, or the end is worse than the start, and worse than chance by
    half of the gap; `converged`: nine tenths of the gap are closed at the end; `learning`: more
    than one tenth; `stuck`: less.

    Args:
        records: one seed, every step in order.
    """
    lost = next((row.step for row in records if not math.isfinite(row.loss)), None)
    if lost is not None:
        return TrainingOutcome(DIVERGED, lost, math.nan, math.nan)
    averages = list(running_mean([row.loss for row in records]))
    end = records[-1]
    if end.loss_chance is None or end.loss_floor is None:
        return _by_fall(records, averages)
    gap = end.loss_chance - end.loss_floor
    closed = [(end.loss_chance - average) / gap for average in averages]
    limit = max(end.loss_chance + _WORSE * gap, records[0].loss)
    if averages[-1] > limit:
        below = (i for i, average in enumerate(averages) if average <= limit)
        kind, place = DIVERGED, 1 + max(below)
    elif closed[-1] >= _CONVERGED_FROM:
        kind = CONVERGED
        place = next(i for i, part in enumerate(closed) if part >= _CONVERGED_FROM)
    else:
        kind, place = (LEARNING if closed[-1] >= _LEARNING_FROM else STUCK), -1
    return TrainingOutcome(kind, records[place].step, averages[-1], closed[-1])


def _by_fall(records: Sequence[StepRecord], averages: Sequence[float]) -> TrainingOutcome:
    """The outcome where neither floor nor chance are known: by the first loss and the last ones."""
    first, last, end = records[0].loss, averages[-1], records[-1].step
    if last > first + _FALL * abs(first):
        return TrainingOutcome(DIVERGED, end, last, None)
    kind = LEARNING if last < first - _FALL * abs(first) else STUCK
    return TrainingOutcome(kind, end, last, None)


def running_mean(losses: Sequence[float]) -> Iterator[float]:
    """Means of each loss and the losses before it, over a tenth of all steps."""
    window = math.ceil(_WINDOW * len(losses))
    return (fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses)))


def by_seed(records: Sequence[StepRecord]) -> list[list[StepRecord]]:
    """The steps of a training, a list for each seed."""
    return [list(rows) for _, rows in groupby(records, key=attrgetter("seed"))]


def common_outcome(outcomes: Sequence[TrainingOutcome]) -> TrainingOutcome:
    """The seeds' common class, or `DISAGREEING`: the first step of a fault, the last of a success.

    Loss and closed gap are means over the seeds.
    """
    words = Counter(outcome.kind.word for outcome in outcomes)
    steps = [outcome.step for outcome in outcomes]
    loss = fmean(outcome.loss for outcome in outcomes)
    gaps = [outcome.gap_closed for outcome in outcomes if outcome.gap_closed is not None]
    closed = fmean(gaps) if gaps else None
    if len(words) == 1:
        kind = outcomes[0].kind
        return TrainingOutcome(kind, min(steps) if kind.fails else max(steps), loss, closed)
    counts = sorted(words.items(), key=lambda item: (-item[1], item[0]))
    return TrainingOutcome(DISAGREEING, max(steps), loss, closed, tuple(counts))


def summary_of(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The fields of `records.Summary` that tell what training came to; none without steps."""
    if not records:
        return {}
    outcome = common_outcome([outcome_of(rows) for rows in by_seed(records)])
    return {
        "outcome": outcome.kind.word,
        "outcome_step": outcome.step,
        "outcome_advice": outcome.advice,
        "final_loss": outcome.loss,
        "loss_floor": records[0].loss_floor,
        "loss_chance": records[0].loss_chance,
        "gap_closed": outcome.gap_closed,
    }


def training_class_named(word: str) -> TrainingClass:
    """The class of that word; one that nothing is known of, for words of other versions."""
    return TRAINING_CLASSES.get(word) or TrainingClass(word, "")


def outcome_sentence(outcome: str, step: int | None) -> str:
    """An outcome with its step: `converged at step 90`, `stuck after 150 steps`."""
    if training_class_named(outcome).at_step:
        return f"{outcome} at step {step}"
    return f"{outcome} after {count(step or 0, 'step')}"
