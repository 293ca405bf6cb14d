"""The verdicts: one row each with all that is said and shown of it, and the rules that give them.

A verdict is the class of a run's gradient at initialisation. A new one is a row of `VERDICTS`; if
the decades between output and input do not tell it, its rule stands here too.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from gradflow.runs.records import LayerRecord
from gradflow.specs.model_spec import Spec
from gradflow.specs.run_options import RunOptions


@dataclass
class SeedDigest:
    """One seed in a few numbers per unit, so that its records need not be held.

    Attributes:
        profile: log10 |g| from the input up.
        shares: skip^2 / (skip^2 + branch^2) of the units that have both.
        spans: smallest and largest log10 |dL/dparameters| of each kind of unit.
    """

    profile: array[float] = field(default_factory=lambda: array("d"))
    shares: array[float] = field(default_factory=lambda: array("d"))
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Decades by which the gradient grows from the output to the input."""
        return self.profile[0] - self.profile[-1]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One class of a run's gradient.

    Attributes:
        word: how run.json, tables and command line call the class.
        meaning: what it means for training, in one sentence; the advice begins with it.
        of_one: start of a sentence about one run.
        of_many: what happens in many runs, as the end of a sentence.
        model_remedy: what to look for in a user's own model, of which no option can be named.
        colour: in the terminal.
        page_mark, page_colour: sign before the word on the page, and its CSS variable there.
        passes: whether the gradient gets through, so that the run needs no advice.
        finite: whether every number of such a run is finite.
        holds: whether a seed that loses no value is of this class; None where another rule tells.
    """

    word: str
    meaning: str = ""
    of_one: str
    of_many: str
    model_remedy: str = ""
    colour: str = "red"
    page_mark: str = "\N{BLACK CIRCLE}"
    page_colour: str = "faint"
    passes: bool = False
    finite: bool = False
    holds: Callable[[SeedDigest, RunOptions], bool] | None = None


HEALTHY = Verdict(
    word="healthy",
    meaning="The gradient reaches the first layer.",
    of_one="The gradient reaches the first layer",
    of_many="it reaches the first layer",
    colour="green",
    page_mark="\N{HEAVY CHECK MARK}",
    page_colour="line-2",
    passes=True,
    finite=True,
)
VANISHING = Verdict(
    word="vanishing",
    meaning="The first layers hardly learn.",
    of_one="The gradient vanishes",
    of_many="it vanishes",
    model_remedy="Look where the gain is below 1: add a shortcut or a norm, or larger weights.",
    page_mark="\N{BLACK DOWN-POINTING TRIANGLE}",
    page_colour="line-0",
    finite=True,
    holds=lambda seed, options: seed.total < -options.vanishing,
)
EXPLODING = Verdict(
    word="exploding",
    meaning="The first layers get huge updates.",
    of_one="The gradient explodes",
    of_many="it explodes",
    model_remedy="Look where the gain is above 1: normalise, or scale the branches down.",
    page_mark="\N{BLACK UP-POINTING TRIANGLE}",
    page_colour="line-1",
    finite=True,
    holds=lambda seed, options: seed.total > options.exploding,
)
DEAD = Verdict(
    word="dead",
    meaning="No gradient arrives.",
    of_one="The gradient is lost",
    of_many="it is lost",
    model_remedy="Look for a detached output, a frozen layer or one that the loss does not use.",
    page_mark="\N{HEAVY MULTIPLICATION X}",
    page_colour="line-4",
)
NONFINITE = Verdict(
    word="nonfinite",
    meaning="Values leave the number format.",
    of_one="The numbers break down",
    of_many="it is NaN or infinite",
    model_remedy="Look at this layer first: what comes later follows from it.",
    page_mark="\N{INFINITY}",
    page_colour="line-3",
)
UNSTABLE = Verdict(
    word="unstable",
    meaning="Seeds disagree.",
    of_one="The seeds disagree",
    of_many="the seeds disagree",
    colour="yellow",
    page_mark="\N{ALMOST EQUAL TO}",
    page_colour="line-5",
)
# The classes of a measured run, from the mildest to the worst; then the one of seeds that differ.
VERDICTS = {
    verdict.word: verdict for verdict in (HEALTHY, VANISHING, EXPLODING, DEAD, NONFINITE, UNSTABLE)
}
# Stands in the place of a verdict where a design was neither measured nor can be predicted.
NO_THEORY = Verdict(
    word="no theory", of_one="Theory says nothing", of_many="theory says nothing", colour="dim"
)


def verdict_named(word: str) -> Verdict:
    """The verdict of that word; one that nothing is known of, for words of other versions."""
    if word == NO_THEORY.word:
        return NO_THEORY
    said = f"verdict is {word}"
    return VERDICTS.get(word) or Verdict(word=word, of_one=f"The {said}", of_many=f"the {said}")


@dataclass(frozen=True)
class Finding:
    """The class of one seed, or of several, and where it shows.

    Attributes:
        verdict: the class.
        layer, unit, direction: the first place in execution order; None where there is none.
        step: number of that place in execution order: forward up, then backward down.
        counts: how many seeds have which class, where they disagree.
    """

    verdict: Verdict
    layer: int | None = None
    unit: str | None = None
    direction: str | None = None
    step: int = 0
    counts: tuple[tuple[str, int], ...] = ()


def classify(rows: Iterable[LayerRecord], options: RunOptions) -> Finding:
    """The class of one seed; where values are lost, the first place in execution order.

    Args:
        rows: one seed from the input up.
        options: the thresholds in decades.
    """
    return seed_digest(rows, options)[1]


def seed_digest(
    rows: Iterable[LayerRecord], options: RunOptions, spec: Spec | None = None
) -> tuple[SeedDigest, Finding]:
    """One seed in a few numbers and its class, in one reading from the input up."""
    digest = SeedDigest()
    forward = backward = None
    for step, row in enumerate(rows):
        _add_row(digest, row, row.unit if spec is None else spec.kind_of(row.unit))
        forward = forward or _lost_forward(row, step)
        # Execution goes down here, so the last of the rows is the first place.
        backward = _lost_backward(row, -step) or backward
    lost = forward or (backward and replace(backward, step=2 * step + 1 + backward.step))
    return digest, lost or Finding(verdict_of(digest, options))


def verdict_of(digest: SeedDigest, options: RunOptions) -> Verdict:
    """The worst class whose rule holds for a seed that loses no value; else `HEALTHY`.

    Args:
        digest: one seed, measured or predicted.
        options: the thresholds.
    """
    worst_first = reversed(VERDICTS.values())
    return next((v for v in worst_first if v.holds and v.holds(digest, options)), HEALTHY)


def common_finding(findings: Sequence[Finding]) -> Finding:
    """The seeds' common class, or `UNSTABLE`; the first place at which any of them loses values."""
    counts = Counter(finding.verdict.word for finding in findings)
    placed = [finding for finding in findings if finding.layer is not None]
    first = min(placed or findings, key=attrgetter("step"))
    if len(counts) == 1:
        return first
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return replace(first, verdict=UNSTABLE, counts=tuple(ranked))


def _add_row(digest: SeedDigest, row: LayerRecord, kind: str) -> None:
    digest.profile.append(_or_nan(row.log10_grad_norm))
    log = row.log10_param_grad_norm
    if log is not None:
        # Infinite where any is not finite: min and max would pass over a NaN.
        log = log if math.isfinite(log) else math.inf
        low, high = digest.spans.get(kind, (log, log))
        digest.spans[kind] = (min(low, log), max(high, log))
    if row.skip_gain is not None and row.branch_gain is not None:
        energy = row.skip_gain**2 + row.branch_gain**2
        if row.skip_gain + row.branch_gain > 0:
            digest.shares.append(row.skip_gain**2 / energy)


def _lost_forward(row: LayerRecord, step: int) -> Finding | None:
    if math.isfinite(_or_nan(row.act_max_abs)):
        return None
    return Finding(NONFINITE, row.layer, row.unit, "forward", step)


def _lost_backward(row: LayerRecord, step: int) -> Finding | None:
    if _is_nonfinite(row):
        return Finding(NONFINITE, row.layer, row.unit, "backward", step)
    return Finding(DEAD, row.layer, row.unit, "backward", step) if _is_dead(row) else None


def _is_nonfinite(row: LayerRecord) -> bool:
    norms = (row.log10_grad_norm, row.log10_param_grad_norm)
    overflowed = any(math.isnan(n) or n == math.inf for n in norms if n is not None)
    return bool(row.nonfinite) or overflowed


def _is_dead(row: LayerRecord) -> bool:
    nothing = (None, -math.inf)
    has_parameters = row.param_norm is not None
    no_gradient = row.log10_grad_norm in nothing
    return no_gradient or (has_parameters and row.log10_param_grad_norm in nothing)


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number
