"""The rule that every error is one line."""

from __future__ import annotations

from gradflow.errors import UsageError


def assert_one_line(error: UsageError, parts: tuple[str, str, str]) -> None:
    """The rule, what arrived and the remedy, in this order."""
    text = str(error)
    places = [text.find(part) for part in parts]
    assert -1 not in places, (text, parts)
    assert places == sorted(places)
    assert "\n" not in text
    assert error.exit_code == 2
