"""What is said of runs beside their numbers: where a finding is, what theory says, what is odd.

A stored run whose table was edited, or damaged within its numbers, still says in its run.json what
it was; and copies of a run folder look like several measurements. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradflow.judging.verdicts import verdict_named
from gradflow.runs.naming import NamedRun
from gradflow.runs.records import BrokenRows, Summary
from gradflow.runs.results import Results
from gradflow.specs.model_spec import ModelSpec
from gradflow.specs.stack import run_key
from gradflow.text import printable, signed

NOT_FINITE = "the measured gradient is not finite everywhere"
# A GPU draws other random numbers than a CPU, so its weights are others.
SAME_NETWORK = ("device", "dtype")
_SHOWN_NAMES, _SHOWN_KEYS = 3, 10


def place(summary: Summary) -> str:
    """Layer, unit and direction at which a verdict shows; empty if it has no place."""
    if summary.first_layer is None:
        return ""
    where = "the input" if summary.first_layer == 0 else f"layer {summary.first_layer}"
    unit = "" if summary.first_layer == 0 else f" ({summary.first_unit})"
    return f"{where}{unit}, {summary.first_pass} pass"


def agrees(summary: Summary) -> bool | None:
    """Whether the measured profile lies in the band of theory; None where there is none."""
    if summary.theory_deviation is None or summary.theory_band is None:
        return None
    return abs(summary.theory_deviation) <= summary.theory_band


def theory_sentence(summary: Summary) -> str:
    """Whether theory predicts the profile, how far it is off, or why there is no theory.

    Empty for runs that know nothing of theory.
    """
    apart, band = summary.theory_deviation, summary.theory_band
    if apart is None or band is None:
        return f"No theory to compare with: {summary.theory_reason}." * bool(summary.theory_reason)
    if agrees(summary):
        return f"As theory predicts, to {abs(apart):.2f} decades (band ±{band:.2f})."
    side = "above" if apart > 0 else "below"
    return f"Not as theory predicts: {abs(apart):.2f} decades {side} it (band ±{band:.2f})."


def theory_cell(summary: Summary) -> str:
    """The deviation for a table, with `!` where it is beyond the band; empty without theory."""
    apart = summary.theory_deviation
    if apart is None:
        return ""
    text = signed(apart) if abs(apart) < 100 else f"{apart:+.0e}"
    return f"{text}!" if agrees(summary) is False else text


def oddities(results: Results) -> list[str]:
    """One printable line for each thing in stored runs that does not fit together."""
    lines = [
        line
        for run in results.runs
        for line in contradiction(run.name, run.summary.verdict, results.broken.get(run.number))
    ]
    lines += same_network([(run.name, run) for run in results.runs])
    return list(map(printable, lines))


def contradiction(name: str, verdict: str, broken: BrokenRows | None) -> Iterator[str]:
    """Yield a line if rows of a run are not finite although its verdict says that they are."""
    if broken and verdict_named(verdict).finite:
        layer, unit, rows = broken
        more = f" and in {rows - 1} more rows" if rows > 2 else " and in 1 more row"
        where = f"layer {layer} ({unit}){more if rows > 1 else ''}"
        yield f"{name} is stored as {verdict}, but its layers.csv is not finite at {where}"


def same_network(named: Sequence[tuple[str, NamedRun]]) -> Iterator[str]:
    """Yield a line for each network that several of these runs measured, as copies of a folder do.

    A watched model is told by its layers alone, which have other weights in every training.
    """
    measured: dict[tuple[str, ...], list[str]] = {}
    for name, run in named:
        if isinstance(run.spec, ModelSpec) and run.spec.request is None:
            continue
        where = (str(run.environment.get(key)) for key in SAME_NETWORK)
        measured.setdefault((run_key(run.spec, run.options), *where), []).append(name)
    several = [(key, names) for (key, *_), names in measured.items() if len(names) > 1]
    for key, names in several[:_SHOWN_KEYS]:
        yield f"{_listed(names)} measured the same network (key {key})"
    if len(several) > _SHOWN_KEYS:
        yield f"{len(several) - _SHOWN_KEYS} more networks were measured more than once"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    *first, last = [*names[:_SHOWN_NAMES], *([f"{more} more"] if more > 0 else [])]
    return f"{', '.join(first)} and {last}"
