"""What is said of a measurement beside theory: "is this normal?"."""

from __future__ import annotations

from gradflow.runs.summary import Summary
from gradflow.text import signed

NOT_FINITE = "the measured gradient is not finite everywhere"


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
