"""Runs in words: the answer for many of them, and sentences about one. Without Rich."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isfinite

from gradflow.judging.remarks import theory_sentence
from gradflow.judging.training_outcome import outcome_sentence
from gradflow.judging.verdicts import VERDICTS, verdict_named
from gradflow.runs.naming import NamedRun, RunName
from gradflow.runs.records import Summary
from gradflow.runs.results import Results, StoredRun
from gradflow.specs.user_files import without_digest
from gradflow.text import count, in_superscript, number, signed, two_digits

_MOST_DESIGNS = 6
# Nobody needs to know of a change by fewer decades.
_SAME_DECADES = 0.1


# Many runs


def answer(runs: Sequence[NamedRun]) -> str:
    """How many runs let the gradient through, and what happens in the others."""
    total, often = len(runs), Counter(run.summary.verdict for run in runs)
    through = sum(often.pop(v.word, 0) for v in VERDICTS.values() if v.passes)
    if total == 1:
        return f"One run: {verdict_named(runs[0].summary.verdict).of_many}."
    if through == total:
        return f"In all {total:,} runs the gradient reaches the first layer."
    start = f"In {through:,} of {total:,} runs" if through else f"In none of {total:,} runs"
    verb = "the gradient reaches" if through else "does the gradient reach"
    rest = [f"in {n:,} {verdict_named(verdict).of_many}" for verdict, n in often.most_common()]
    return f"{start} {verb} the first layer; {', '.join(rest)}."


def designs_through(runs: Sequence[NamedRun], called: Sequence[RunName]) -> str:
    """The designs that let the gradient through, or those that do not: the shorter of both lists.

    Args:
        runs: the runs.
        called: their names, in the same order.
    """
    through: dict[str, set[int]] = {}
    lost: dict[str, set[int]] = {}
    for run, name in zip(runs, called, strict=True):
        depths = through if verdict_named(run.summary.verdict).passes else lost
        depths.setdefault(name.design, set()).add(run.spec.depth)
    if not through or not lost:
        return ""
    few, start = through, "It gets through in"
    if len(through) > len(lost):
        few, start = lost, "It gets through in all but these"
    ranked = sorted(few, key=lambda design: (design in through and design in lost, design))
    listed = [f"{design} ({_depths(few[design])})" for design in ranked[:_MOST_DESIGNS]]
    more = len(ranked) - len(listed)
    tail = f"; and in {count(more, 'other design')}" if more else ""
    return f"{start}: {'; '.join(listed)}{tail}."


def _depths(depths: set[int]) -> str:
    ordered = sorted(depths)
    if len(ordered) == 1:
        return f"depth {ordered[0]}"
    if len(ordered) > 3:
        return f"depths {ordered[0]} to {ordered[-1]}"
    return f"depths {', '.join(map(str, ordered[:-1]))} and {ordered[-1]}"


def answer_lines(runs: Sequence[NamedRun], called: Sequence[RunName]) -> list[str]:
    """The answer for many runs, and the designs that let the gradient through."""
    return [line for line in (answer(runs), designs_through(runs, called)) if line]


def design_by_design(results: Results) -> list[tuple[StoredRun, RunName]]:
    """The runs of a results folder with their names: design by design, depths rising in each."""
    called = zip(results.runs, results.names, strict=True)
    return sorted(called, key=lambda pair: (pair[1].design, pair[1].depth, pair[1].copy))


# One run


def run_sentence(run: StoredRun) -> str:
    """The verdict of a run as a student would understand it, what to do, and what theory says."""
    summary, depth = run.summary, run.spec.depth
    verdict = verdict_named(summary.verdict)
    told = [f"{verdict.of_one}{_where(summary)}{_change(summary, depth)}."]
    if summary.departures:
        told.append(f"This is {without_digest(str(run.spec.scheme))} with {summary.departures}.")
    advice = [] if verdict.passes else [summary.advice]
    trained = _training_sentence(summary) if summary.outcome else ""
    return " ".join(filter(None, [*told, *advice, theory_sentence(summary), trained]))


def _where(summary: Summary) -> str:
    if summary.first_layer is None:
        return ""
    layer = "the input" if summary.first_layer == 0 else f"layer {summary.first_layer}"
    if summary.first_pass == "forward":
        return f" in {layer}, on the way forward"
    return f" at {layer}, on its way back from the output"


def _change(summary: Summary, depth: int) -> str:
    decades = summary.total_log10_gain
    if decades is None:
        return ""
    way = f": on its way back through {count(depth, 'layer')} it"
    if abs(decades) < _SAME_DECADES:
        return f"{way} keeps its size"
    larger = "larger" if decades > 0 else "smaller"
    return f"{way} becomes {factor_in_words(abs(decades))} {larger}"


def factor_in_words(decades: float) -> str:
    """The factor 10^decades: `2.4 times`, `about 10⁷ times`."""
    if decades >= 4:
        return f"about 10{in_superscript(round(decades))} times"
    factor = 10**decades
    digits = 1 if factor < 10 else 0
    rounded = round(factor, digits) if factor < 100 else float(f"{factor:.2g}")
    return f"{rounded:,.{digits}f} times"


def _training_sentence(summary: Summary) -> str:
    outcome = outcome_sentence(str(summary.outcome), summary.outcome_step)
    return f"Training {outcome}: the {loss_words(summary)}."


def loss_words(summary: Summary) -> str:
    """The loss at the end, with its floor and chance where they are known."""
    if summary.loss_floor is None and summary.final_loss is not None:
        return f"loss ends at {number(summary.final_loss, '.3f')}"
    loss, floor, chance = (
        "not finite" if value is None or not isfinite(value) else number(value, ".3f")
        for value in (summary.final_loss, summary.loss_floor, summary.loss_chance)
    )
    closed = summary.gap_closed
    part = f"; {closed:.0%} of the gap closed" if closed is not None and closed >= 0 else ""
    return f"loss ends at {loss} (floor {floor}, chance {chance}{part})"


def gain_sentence(summary: Summary) -> str:
    """Total gain in decades, and its rate per layer with the 95 % interval."""
    text = f"From output to input: {signed(summary.total_log10_gain)} decades"
    rate, high = summary.log10_gain_per_layer, summary.log10_gain_per_layer_high
    if rate is not None:
        text += f", {signed(rate, 4)}" + (f" ± {high - rate:.4f}" if high is not None else "")
        text += " per layer"
    return text + (" (95 %)." if high is not None else ".")


def trend_sentence(summary: Summary) -> str:
    """How the profile goes on with depth; empty for a profile without a trend."""
    trends = {"exponential": "exponential", "power law": "a power law"}
    if summary.trend not in trends:
        return ""
    text = f"The profile is {trends[summary.trend]} in depth"
    if summary.trend == "exponential" and summary.efolding_layers is not None:
        text += f", a factor e every {summary.efolding_layers:.3g} layers"
    if summary.healthy_depth is None:
        return text + "; it stays in the healthy range at any depth."
    return text + f"; it leaves the healthy range near depth {two_digits(summary.healthy_depth)}."
