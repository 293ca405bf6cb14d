"""Many runs in words: the answer first, a sentence for each run, a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import isfinite

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradflow.judging.naming import Name, names
from gradflow.judging.theory_words import theory_sentence
from gradflow.judging.training_outcome import outcome_sentence
from gradflow.runs.described import Described
from gradflow.runs.reading import Results, StoredRun
from gradflow.runs.summary import Summary
from gradflow.specs.user_code import shown
from gradflow.text import count, escape_markdown, markdown_table, milliseconds, number, signed

HEALTHY = "healthy"
# What a verdict says of the gradient, about one run and about many.
SAYINGS = {
    HEALTHY: ("The gradient reaches the first layer", "it reaches the first layer"),
    "vanishing": ("The gradient vanishes", "it vanishes"),
    "exploding": ("The gradient explodes", "it explodes"),
    "dead": ("The gradient is lost", "it is lost"),
    "nonfinite": ("The numbers break down", "it is NaN or infinite"),
    "unstable": ("The seeds disagree", "the seeds disagree"),
}
STYLES = {HEALTHY: "green", "unstable": "yellow"}
TIMES = ("fwd ms", "bwd ms")
NUMBERS = ("depth", "decades", "per layer")
SHOWN_ROWS = 30
SHOWN_DESIGNS = 6
# A change by less than this is none that a person needs to know.
SAME_DECADES = 0.1
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def answer(runs: Sequence[Described]) -> str:
    """How many runs let the gradient through, and what happens in the others."""
    total, often = len(runs), Counter(run.summary.verdict for run in runs)
    through = often.pop(HEALTHY, 0)
    if total == 1:
        return f"One run: {_told(runs[0].summary.verdict)[1]}."
    if through == total:
        return f"In all {total:,} runs the gradient reaches the first layer."
    start = f"In {through:,} of {total:,} runs" if through else f"In none of {total:,} runs"
    verb = "the gradient reaches" if through else "does the gradient reach"
    rest = [f"in {n:,} {_told(verdict)[1]}" for verdict, n in often.most_common()]
    return f"{start} {verb} the first layer; {', '.join(rest)}."


def designs_through(runs: Sequence[Described], called: Sequence[Name]) -> str:
    """Which designs let the gradient through, or which do not: whichever list is shorter."""
    through: dict[str, set[int]] = {}
    lost: dict[str, set[int]] = {}
    for run, name in zip(runs, called, strict=True):
        kind = through if run.summary.verdict == HEALTHY else lost
        kind.setdefault(name.design, set()).add(run.spec.depth)
    if not through or not lost:
        return ""
    told, start = (
        (through, "It gets through in")
        if len(through) <= len(lost)
        else (
            lost,
            "It gets through in all but these",
        )
    )
    ranked = sorted(told, key=lambda design: (design in through and design in lost, design))
    shown = [f"{design} ({_depths(told[design])})" for design in ranked[:SHOWN_DESIGNS]]
    more = len(ranked) - len(shown)
    tail = f"; and in {count(more, 'other design')}" if more else ""
    return f"{start}: {'; '.join(shown)}{tail}."


def _depths(depths: set[int]) -> str:
    ordered = sorted(depths)
    if len(ordered) == 1:
        return f"depth {ordered[0]}"
    if len(ordered) > 3:
        return f"depths {ordered[0]} to {ordered[-1]}"
    return f"depths {', '.join(map(str, ordered[:-1]))} and {ordered[-1]}"


def sentence(run: StoredRun) -> str:
    """The verdict of a run as a student would understand it, what to do, and what theory says."""
    summary, depth = run.summary, run.spec.depth
    saying = _told(summary.verdict)[0]
    told = [f"{saying}{_where(summary)}{_change(summary, depth)}."]
    if summary.departures:
        told.append(f"This is {shown(str(run.spec.scheme))} with {summary.departures}.")
    advice = [] if summary.verdict == HEALTHY else [summary.advice]
    trained = training_sentence(summary) if summary.outcome else ""
    return " ".join(filter(None, [*told, *advice, theory_sentence(summary), trained]))


def training_sentence(summary: Summary) -> str:
    """What training came to."""
    what = outcome_sentence(str(summary.outcome), summary.outcome_step)
    return f"Training {what}: the {loss_words(summary)}."


def loss_words(summary: Summary) -> str:
    """Where the loss ends, between its floor and chance where these are known."""
    if summary.loss_floor is None and summary.final_loss is not None:
        return f"loss ends at {number(summary.final_loss, '.3f')}"
    loss, floor, chance = (
        "not finite" if value is None or not isfinite(value) else number(value, ".3f")
        for value in (summary.final_loss, summary.loss_floor, summary.loss_chance)
    )
    closed = summary.gap_closed
    part = f"; {closed:.0%} of the gap closed" if closed is not None and closed >= 0 else ""
    return f"loss ends at {loss} (floor {floor}, chance {chance}{part})"


def _told(verdict: str) -> tuple[str, str]:
    return SAYINGS.get(verdict, (f"The verdict is {verdict}", f"the verdict is {verdict}"))


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
    if abs(decades) < SAME_DECADES:
        return f"{way} keeps its size"
    return f"{way} becomes {times(abs(decades))} {'larger' if decades > 0 else 'smaller'}"


def times(decades: float) -> str:
    """A factor of 10^decades in words: `2.4 times`, `about 10⁷ times`."""
    if decades >= 4:
        return f"about 10{str(round(decades)).translate(SUPERSCRIPTS)} times"
    factor = 10**decades
    digits = 1 if factor < 10 else 0
    rounded = round(factor, digits) if factor < 100 else float(f"{factor:.2g}")
    return f"{rounded:,.{digits}f} times"


def in_order(results: Results) -> list[tuple[StoredRun, Name]]:
    """The runs with their names: design by design, each by depth."""
    called = zip(results.runs, names(results.runs), strict=True)
    return sorted(called, key=lambda pair: (pair[1].design, pair[1].depth, pair[1].copy))


def summary_view(results: Results) -> RenderableType:
    """What `gradflow report` shows in the terminal."""
    through = designs_through(results.runs, names(results.runs))
    return Group(
        Text(answer(results.runs), style="bold"),
        *([Text(through)] if through else []),
        Text(),
        runs_table(in_order(results)),
    )


def runs_table(rows: Sequence[tuple[StoredRun, Name]]) -> Table:
    """One row per run, within 80 columns; the middle of a long list left out."""
    timed = any(run.summary.forward_s_per_layer is not None for run, _ in rows)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for heading in (*NUMBERS, *(TIMES if timed else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    ends = len(rows) if len(rows) <= SHOWN_ROWS else SHOWN_ROWS // 2
    for run, name in rows[:ends]:
        table.add_row(*_cells(run, name, timed))
    if ends < len(rows):
        table.add_row(f"… {len(rows) - 2 * ends:,} more", style="dim")
        for run, name in rows[-ends:]:
            table.add_row(*_cells(run, name, timed))
    return table


def _cells(run: StoredRun, name: Name, timed: bool) -> Iterator[Text]:
    summary = run.summary
    yield Text(name.without_depth)
    yield Text(summary.verdict, style=STYLES.get(summary.verdict, "red"))
    yield Text(f"{name.depth:,}")
    yield Text(signed(summary.total_log10_gain))
    yield Text(signed(summary.log10_gain_per_layer, 4))
    if timed:
        yield Text(milliseconds(summary.forward_s_per_layer))
        yield Text(milliseconds(summary.backward_s_per_layer))


def runs_as_markdown(results: Results) -> str:
    """The answer, and the table of runs with their sentences, as Markdown."""
    through = designs_through(results.runs, names(results.runs))
    told = [escape_markdown(text) for text in (answer(results.runs), through) if text]
    rows = []
    for run, name in in_order(results):
        design, verdict, *numbers = (text.plain for text in _cells(run, name, timed=True))
        rows.append((design, verdict, sentence(run), *numbers))
    headings = ("run", "verdict", "what it means", *NUMBERS, *TIMES)
    return "\n".join([*told, "", *markdown_table(headings, rows, left=3)]) + "\n"
