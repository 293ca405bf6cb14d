"""Where in a network a finding is, in words. Torch-free."""

from __future__ import annotations

from gradflow.runs.summary import Summary


def place(summary: Summary) -> str:
    """Where the finding is: layer, unit and direction; empty where it is nowhere."""
    if summary.first_layer is None:
        return ""
    where = "the input" if summary.first_layer == 0 else f"layer {summary.first_layer}"
    unit = "" if summary.first_layer == 0 else f" ({summary.first_unit})"
    return f"{where}{unit}, {summary.first_pass} pass"
