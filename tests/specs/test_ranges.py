"""Ranges in lists of options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.cli.options import parse, parse_lists
from gradflow.errors import UsageError
from gradflow.specs.grid import expand_range

RANGES = {
    "10..10000:log": [10, 32, 100, 316, 1000, 3162, 10000],
    "10..10000:log5": [10, 56, 316, 1778, 10000],
    "10..5000:log": [10, 32, 100, 316, 1000, 3162, 5000],
    "12..48:12": [12, 24, 36, 48],
    "12..50:12": [12, 24, 36, 48],
    "1..4": [1, 2, 3, 4],
    "7..7:log": [7],
    "7..7": [7],
    "3..9:log1": [3],
    "1..3:log9": [1, 2, 3],
}


@pytest.mark.parametrize(("word", "numbers"), RANGES.items())
def test_ranges(word: str, numbers: list[int]) -> None:
    assert expand_range(word) == numbers


@given(low=st.integers(1, 10**6), more=st.integers(0, 10**6), count=st.integers(2, 40))
def test_logarithmic_ranges_rise_from_end_to_end(low: int, more: int, count: int) -> None:
    for numbers in (expand_range(f"{low}..{low + more}:log{n}") for n in ("", count)):
        assert numbers is not None
        assert (numbers[0], numbers[-1]) == (low, low + more)
        assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("word", ["9..3", "1..9:0", "0..9:log", "1..9:log0"])
def test_a_range_without_numbers_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        expand_range(word)


@pytest.mark.parametrize("word", ["12", "1..", "..9", "1..9:", "1..9:lin", "1.5..9", "-1..9"])
def test_other_words_are_no_ranges(word: str) -> None:
    assert expand_range(word) is None


def test_lists_and_ranges_mix() -> None:
    assert parse_lists({"depth": "3,10..100:log,200"}) == {"depth": [3, 10, 32, 100, 200]}


@pytest.mark.parametrize("word", ["9..3", "1..x", "1..9:0", ".."])
def test_a_bad_range_says_how_a_good_one_looks(word: str) -> None:
    with pytest.raises(UsageError, match=r"--depth 12\.\.48:12 or --depth 10\.\.1000:log"):
        parse_lists({"depth": word})


def test_a_single_run_takes_no_range() -> None:
    with pytest.raises(UsageError, match="--depth takes a whole number"):
        parse({"depth": "1..3"})
