"""The product of lists of options: which cells a sweep has, and which make no network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.fields import check_choice, flag
from gradflow.specs.model_spec import ModelRequest, locate_model
from gradflow.specs.requests import STACK_FIELDS, Asked, specification
from gradflow.specs.run_options import TRAINING_DEFAULTS, RunOptions
from gradflow.specs.stack import StackSpec, run_key
from gradflow.specs.stack_fields import BLOCK_OPTIONS, DEFAULT_BLOCK, block_kind
from gradflow.specs.user_files import is_user_name, reference_of, without_digest
from gradflow.specs.user_schemes import scheme_named

# What bare `gradflow compare` measures.
DEFAULT_GRID: dict[str, list[Any]] = {
    "shortcut": ["plain", "residual"],
    "norm": ["none", "pre", "post"],
    "depth": [12, 50, 200],
}

# Where cells are measured; the executors themselves need torch, so their names stand here.
EXECUTORS = ("auto", "serial", "processes", "ray")

_MEASURING = {f.name for f in fields(RunOptions)}
# Layers of a model that does not say how many it has.
_USUAL_DEPTH = 12


@dataclass(frozen=True)
class Cell:
    """One network of a sweep, with how it is measured.

    Attributes:
        code: names of the user's code in it, with what loads each in another process.
    """

    spec: Asked
    options: RunOptions
    code: tuple[tuple[str, str], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.spec, ModelRequest):  # whose names carry where they lie
            object.__setattr__(self, "code", ())
            return
        names = [str(name) for name in (self.spec.scheme, self.spec.block)]
        code = [(name, reference_of(name)) for name in names]
        object.__setattr__(self, "code", tuple(pair for pair in code if pair[1]))

    @property
    def key(self) -> str:
        """The name of the cell's numbers, as folders of runs have it; devices share it."""
        return run_key(self.spec, self.options)

    @property
    def layers(self) -> int:
        """The number of layers; a guess for a model that does not say how many it has."""
        return self.spec.depth or _USUAL_DEPTH

    @property
    def is_lasting(self) -> bool:
        """Whether a run can stand for the cell: not where code without a digest decides."""
        return isinstance(self.spec, StackSpec) or not self.spec.is_own


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep in order, each once.

    Attributes:
        skipped: one line for each combination that is no network, with the rule.
        notes: one line for each option that was left out where it does not apply.
    """

    cells: tuple[Cell, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def expand(lists: Mapping[str, Sequence[Any]]) -> Grid:
    """Return the cells of every combination of the lists; the last option varies fastest.

    An option that a block does not have is left out of that block's cells, as is a norm kind where
    there is no norm; cells that come out equal are one. Combinations that break a rule are named
    with it. An unknown name, a broken rule of measuring, or no network at all raises UsageError.
    """
    _check_names(lists)
    cells: dict[Cell, None] = {}
    refused: dict[str, UsageError] = {}
    for values in product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        kept = {name: value for name, value in chosen.items() if not _idle(name, chosen)}
        RunOptions(**{k: v for k, v in kept.items() if k in _MEASURING})
        try:
            spec, options = specification(kept)
        except UsageError as error:
            refused.setdefault(f"{_spelled(kept, lists)}: {error.rule}", error)
        else:
            cells.setdefault(Cell(spec, options))
    if not cells:
        raise next(iter(refused.values()))
    return Grid(tuple(cells), tuple(refused), tuple(_notes(lists)))


def _check_names(lists: Mapping[str, Sequence[Any]]) -> None:
    """A misspelt name is a mistake, not a combination to skip; so is a user's code that breaks."""
    if "model" in lists:
        for model in lists["model"]:
            locate_model(model)
        return
    for name, values in lists.items():
        for value in values:
            _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    if is_user_name(value):
        StackSpec(**{name: value})
    elif name == "scheme" and value is not None:
        scheme_named(value)
    elif name in STACK_FIELDS and (choices := STACK_FIELDS[name].metadata["option"].choices):
        check_choice(flag(name), value, choices)


def _idle(name: str, chosen: Mapping[str, Any]) -> bool:
    """Whether an option changes nothing in a cell with these other options."""
    if name in TRAINING_DEFAULTS:
        return not chosen.get("steps")
    if "model" in chosen:
        return False
    if name == "norm_kind":
        has_none = chosen.get("norm") == "none" or not _has_norms(chosen)
        return has_none and not chosen.get("qk_norm")
    return name in BLOCK_OPTIONS and name not in block_kind(_block(chosen)).options


def _has_norms(chosen: Mapping[str, Any]) -> bool:
    scheme = chosen.get("scheme")
    return scheme is None or scheme_named(scheme).normalises


def _block(chosen: Mapping[str, Any]) -> str:
    scheme = None if {"like", "weights"} & chosen.keys() else chosen.get("scheme")
    usual = DEFAULT_BLOCK if scheme is None else scheme_named(scheme).blocks[0]
    return str(chosen.get("block", usual))


def _notes(lists: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Name the options of a grid that do not apply to some of its cells."""
    if 0 in lists.get("steps", [0]):
        yield from (
            f"{flag(n)} does not apply to --steps 0" for n in lists if n in TRAINING_DEFAULTS
        )
    if "model" not in lists:
        for name in (n for n in lists if n not in TRAINING_DEFAULTS):
            yield from _left_out(name, lists)


def _left_out(name: str, lists: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    by_norm = ("norm", "scheme") if name == "norm_kind" else ("block", "scheme")
    for decides in by_norm:
        if decides == "scheme" and by_norm[0] in lists:
            continue
        usual = [DEFAULT_BLOCK] if decides == "block" and "scheme" not in lists else []
        for value in lists.get(decides, usual):
            if _idle(name, {decides: value}):
                yield f"{flag(name)} does not apply to {flag(decides)} {value}"


def _spelled(chosen: Mapping[str, Any], lists: Mapping[str, Sequence[Any]]) -> str:
    varying = {name: chosen[name] for name in chosen if len(lists[name]) > 1} or chosen
    return " ".join(f"{flag(n)} {without_digest(str(value))}" for n, value in varying.items())


_RANGE = re.compile(r"(\d+)\.\.(\d+)(?::(log)?(\d+)?)?")
# Of a logarithmic range without a count: 10, 32, 100, ...
_PER_DECADE = 2


def expand_range(word: str) -> list[int] | None:
    """Return the whole numbers of a range, each once and rising; None where the word is no range.

    `a..b` counts in ones, `a..b:s` in steps of s, `a..b:log` goes in half decades and `a..b:logN`
    in N numbers, both ends among them. A range that holds nothing raises ValueError.
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
    step = 10 ** (1 / _PER_DECADE)
    numbers, place = [], 0
    while low * step**place < high * (1 - 1e-9):
        numbers.append(low * step**place)
        place += 1
    return _rounded([*numbers, high], high)


def _rounded(numbers: list[float], high: int) -> list[int]:
    return list(dict.fromkeys(min(high, round(number)) for number in numbers))
