"""Ranges in option lists: `12..48:12` in steps, `10..10000:log` evenly in the logarithm."""

from __future__ import annotations

import re

_RANGE = re.compile(r"(\d+)\.\.(\d+)(?::(log)?(\d+)?)?")
# Of a logarithmic range without a count: 10, 32, 100, ...
PER_DECADE = 2


def expand_range(word: str) -> list[int] | None:
    """The whole numbers of a range, each once and rising; None where the word is no range.

    `a..b` counts in ones, `a..b:s` in steps of s, `a..b:log` goes in half decades and `a..b:logN`
    in N numbers, both ends among them.

    Raises:
        ValueError: a range that holds nothing, or has no steps.
    """
    match = _RANGE.fullmatch(word)
    if match is None or word.endswith(":"):
        return None
    low, high, by = int(match[1]), int(match[2]), int(match[4] or 0)
    if low > high or (match[4] and by < 1):
        raise ValueError(word)
    return _log_range(low, high, by) if match[3] else list(range(low, high + 1, by or 1))


def _log_range(low: int, high: int, count: int) -> list[int]:
    if low < 1:
        raise ValueError(low)
    ratio = high / low
    if count:
        return _rounded([low * ratio ** (i / max(count - 1, 1)) for i in range(count)], high)
    step = 10 ** (1 / PER_DECADE)
    numbers, place = [], 0
    while low * step**place < high * (1 - 1e-9):
        numbers.append(low * step**place)
        place += 1
    return _rounded([*numbers, high], high)


def _rounded(numbers: list[float], high: int) -> list[int]:
    return list(dict.fromkeys(min(high, round(number)) for number in numbers))
