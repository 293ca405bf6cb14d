"""Short names for runs: only the words in which they differ, so that legends stay readable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gradflow.runs.records import Summary
from gradflow.specs.fields import deciding, options_of
from gradflow.specs.model_spec import ModelRequest, Spec, asked_for
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import without_digest

# Depth is an axis of its own, and these always stand in a name where they differ.
_LEADING = ("like", "weights", "shortcut", "block", "norm")
_DECISIVE = ("like", "weights", "block", "norm", "scheme")
_DEVICE = "device"
_WORDS: dict[str, Callable[[Any], str]] = {
    "norm": lambda norm: "no norm" if norm == "none" else f"{norm}-norm",
    "norm_kind": str,
    "activation": str,
    "init": lambda init: f"{init} init",
    "dtype": str,
    "loss": lambda loss: f"{loss} loss",
    "qk_norm": lambda _: "qk-norm",
    "bias": lambda bias: f"bias {bias}",
    "scheme": without_digest,
    "set": str,
    "input": lambda value: f"input {without_digest(value)}",
    "seeds": lambda seeds: f"{seeds} seeds",
    "compile": lambda _: "compiled",
    "steps": lambda steps: f"{steps} steps",
    "optimizer": str,
    "lr": lambda lr: f"lr {lr:g}",
    _DEVICE: str,
}
# The other options leave their defaults unsaid: nobody looks for those in a name.
_SAID_AT_DEFAULT = (
    *("depth", "width", "classes", "heads", "ffn_mult", "seq_len", "image_size", "seed"),
    *("lr", "optimizer"),
)
# The optimizer stands before its learning rate.
_MEASURED = tuple(
    sorted(deciding(RunOptions, "numbers"), key=lambda name: name in ("lr", "warmup", "every"))
)
_OTHERS = (
    *(name for name in deciding(StackSpec, "numbers") if name not in (*_LEADING, "depth")),
    *(name for name in deciding(ModelRequest, "numbers") if name != "model"),
    *_MEASURED,
    _DEVICE,
)
_UNSAID = {
    field.name: field.default if about.fill is None else about.fill
    for cls in (StackSpec, RunOptions)
    for field, about in options_of(cls)
    if field.name not in _SAID_AT_DEFAULT
}


class NamedRun(Protocol):
    """Anything that has a name like a run: whole runs, runs of a report, and predictions."""

    @property
    def spec(self) -> Spec: ...
    @property
    def options(self) -> RunOptions: ...
    @property
    def summary(self) -> Summary: ...
    @property
    def environment(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class RunName:
    """The name of a run: its design, which runs of other depths share, and its depth.

    Runs of one design and depth are counted by `copy`.
    """

    design: str
    depth: int
    copy: int = 1

    @property
    def without_depth(self) -> str:
        """The name for tables in which the depth has a column of its own."""
        return self.design if self.copy == 1 else f"{self.design} (#{self.copy})"

    @property
    def run(self) -> str:
        """The whole name, with design and depth."""
        copy = "" if self.copy == 1 else f" (#{self.copy})"
        return f"{self.design}, depth {self.depth}{copy}"


def names(runs: Sequence[NamedRun]) -> list[RunName]:
    """A name for each run, all different."""
    words = [name for name in _OTHERS if _differs(runs, name)]
    with_block = len({run.spec.block for run in runs}) > 1
    called = _called(runs)
    seen = Counter[tuple[str, int]]()
    found = []
    for run in runs:
        design = _value(run, "scheme") or _value(run, "shortcut")
        # A model has neither: it is its own design.
        block = run.spec.block if with_block or not design else None
        leading = [called[str(name)] for name in (design, block) if name]
        place = _design(run, words, leading), run.spec.depth
        seen[place] += 1
        found.append(RunName(*place, seen[place]))
    return found


def _called(runs: Sequence[NamedRun]) -> dict[str, str]:
    """Names of schemes and blocks: with the digest only where it tells two files apart."""
    known = {str(_value(run, n)) for run in runs for n in ("scheme", "shortcut", "block")}
    often = Counter(map(without_digest, known))
    return {
        name: without_digest(name) if often[without_digest(name)] == 1 else name for name in known
    }


def shared(runs: Sequence[NamedRun]) -> str:
    """The settings that all runs have in common, in words."""
    both = ("depth", *_LEADING, *_OTHERS)
    common = [n for n in both if len({_value(run, n) for run in runs}) == 1]
    if "loss" in common and runs[0].spec.loss != "ce":  # then no head has classes
        common = [n for n in common if n != "classes"]
    words = [word(n, _value(runs[0], n)) for n in common]
    return ", ".join(w for w in words if w)


def word(name: str, value: object) -> str:
    """A setting in words; empty where it is not set, or not worth a word."""
    if value is None or (name in _UNSAID and value == _UNSAID[name]):
        return ""
    if name in _WORDS:
        return _WORDS[name](value)
    plain = name.replace("_", " ")
    if value is True:
        return plain
    return without_digest(str(value)) if name in _LEADING else f"{plain} {value}"


def _design(run: NamedRun, words: Sequence[str], leading: Sequence[str]) -> str:
    model = _value(run, "weights") or _value(run, "like")
    norm = "" if _value(run, "scheme") else word("norm", _value(run, "norm"))
    rest = [word(name, _value(run, name)) for name in words if name != "scheme"]
    parts = [model, " ".join(leading), norm, *rest, *_departures(run, words)]
    return ", ".join(filter(None, parts))


def _departures(run: NamedRun, words: Sequence[str]) -> list[str]:
    """Parts of the scheme that options replaced, but for those that `words` name."""
    parts = (run.summary.departures or "").split("; ")
    named = tuple(f"{word.replace('_', ' ')} " for word in words)
    return [f"with {part}" for part in parts if part and not part.startswith(named)]


def _value(run: NamedRun, name: str) -> Any:
    if name == _DEVICE:
        return str(run.environment.get(_DEVICE))
    if name in _MEASURED:
        return getattr(run.options, name)
    # A model's own options are those of its request.
    return getattr(run.spec, name, getattr(asked_for(run.spec), name, None))


def _differs(runs: Sequence[NamedRun], name: str) -> bool:
    """Whether a setting says more than those whose defaults set many others."""
    found: dict[tuple[object, ...], object] = {}
    return any(
        found.setdefault(tuple(_value(run, n) for n in _DECISIVE), _value(run, name))
        != _value(run, name)
        for run in runs
    )
