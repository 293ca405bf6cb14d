"""Values as text: human units, narrow numbers, Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradflow.text import (
    WIDEST,
    count,
    csv_table,
    escape_markdown,
    gib,
    in_superscript,
    json_text,
    markdown_table,
    milliseconds,
    number,
    signed,
    two_digits,
)

NAN, INF = math.nan, math.inf

# Human units

UNITS: list[tuple[Callable[..., str], tuple[Any, ...], str]] = [
    (milliseconds, (None,), ""),
    (milliseconds, (0.0,), "0.000"),
    (milliseconds, (1e-9,), "1.0e-06"),
    (milliseconds, (5e-6,), "0.005"),
    (milliseconds, (0.00123,), "1.23"),
    (milliseconds, (0.0123,), "12.3"),
    (milliseconds, (0.09996,), "100"),
    (milliseconds, (0.1234,), "123"),
    (milliseconds, (12.0,), "12000"),
    (number, (None, ".3f"), ""),
    (number, (0.0, ".3f"), "0.000"),
    (number, (1e-7, ".3f"), "1.0e-07"),
    (number, (999.9994, ".3f"), "999.999"),
    (number, (1000.0, ".3f"), "1.0e+03"),
    (number, (-12.3456, "+.3f"), "-12.346"),
    (number, (-3000.123, "+.3f"), "-3000.1"),
    (number, (-1e-9, "+.3f"), "+0.000"),
    (number, (170.2, "#.3g"), "170"),
    (number, (1.0, "#.3g"), "1.00"),
    (number, (NAN, "+.3f"), "nan"),
    (number, (-INF, "+.3f"), "-inf"),
    (gib, (0,), "0 B"),
    (gib, (1023,), "1023 B"),
    (gib, (300 << 10,), "300 KiB"),
    (gib, (3 << 20,), "3 MiB"),
    (gib, (3 << 29,), "1.5 GiB"),
    (gib, (1 << 50,), "1,048,576.0 GiB"),
    (two_digits, (29481636.7,), "29,000,000"),
    (two_digits, (0.94,), "1"),
    (signed, (None,), ""),
    (signed, (1.005,), "+1.00"),
    (count, (1, "seed"), "1 seed"),
    (count, (2, "seed"), "2 seeds"),
]


@pytest.mark.parametrize(("write", "value", "text"), UNITS)
def test_human_units(write: Callable[..., str], value: tuple[Any, ...], text: str) -> None:
    assert write(*value) == text


def formats() -> Iterator[str]:
    yield from (".3f", "#.3g", "+.3f", "+.2f")


@given(
    st.floats(-9999, -1e-99) | st.just(0.0) | st.floats(1e-99, 1e99),
    st.sampled_from(list(formats())),
)
def test_a_number_is_narrow_and_not_hidden(value: float, digits: str) -> None:
    is_logarithm = "+" in digits
    assume(abs(value) <= 9999 or not is_logarithm)
    value = value if is_logarithm else abs(value)
    text = number(value, digits)
    assert len(text) <= WIDEST
    assert not text.endswith(".")
    if value > 0 and not is_logarithm:
        assert float(text) == pytest.approx(value, rel=0.5)


# Tables


def test_markdown_escapes_what_would_be_markup() -> None:
    assert escape_markdown("a|b `c` *d* <e>\n~f~") == r"a\|b \`c\` \*d\* &lt;e&gt; \~f\~"


def test_markdown_aligns_the_first_columns_left() -> None:
    assert list(markdown_table(["a", "b"], [["x", "1"], ["y|z", "2"]])) == [
        *("| a | b |", "| --- | --: |"),
        *("| x | 1 |", "| y\\|z | 2 |"),
    ]


def test_csv_has_every_key_and_empty_cells_for_what_is_missing() -> None:
    assert csv_table([{"a": 1, "b": None}, {"a": "x,y", "c": 0.5}]) == 'a,b,c\n1,,\n"x,y",,0.5\n'


def test_json_has_no_word_for_what_is_not_finite() -> None:
    assert json_text({"é": 1}) == '{\n  "\\u00e9": 1\n}\n'
    assert json_text(["é"], ascii_only=False) == '[\n  "é"\n]\n'
    with pytest.raises(ValueError, match="JSON"):
        json_text(NAN)


def test_exponents_are_superscripts() -> None:
    assert in_superscript(-120) == "⁻¹²⁰"
