"""Units with several streams, or with norms beyond the template, as steps of `bundle`.

Each function gives the steps of one unit; `f` is its branch without a shortcut. Matrices have one
row for each stream that they make. The equations are those of `gradflow.schemes.streams`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from gradflow.theory.streams.moments import Attend, Branch, Mix, Norm, Project, Step
from gradflow.theory.template import NoTheoryError, State, TemplateUnit

Steps = tuple[Step, ...]

TWICE = Mix(((1.0,), (1.0,)))


@lru_cache(maxsize=4096)
def _f(unit: TemplateUnit) -> TemplateUnit:
    """The branch alone: c Ni(x) through f."""
    return replace(unit, a=0.0, b=1.0, norm_out=None, norm_value=None, norm_shared=None)


def _b2t(unit: TemplateUnit) -> Steps:
    """(x) to (LN(x + f(x)), x), and (h, x) to LN(x + h + f(h))."""
    norm = Norm(0, str(unit.norm_out))
    if unit.kind == "attention":
        return (TWICE, Branch(1, _f(unit)), Mix(((1, 0, 1), (0, 1, 0))), norm)
    return (Branch(0, _f(unit)), Mix(((1, 1, 1),)), norm)


def _dual(unit: TemplateUnit, *, first: bool) -> Steps:
    """(p, r) to (LN(p + f(p)), r + f(p))."""
    start = (TWICE,) if first else ()
    add = Mix(((1, 0, 1), (0, 1, 1)))
    return (*start, Branch(0, _f(unit)), add, Norm(0, str(unit.norm_out)))


def _siamese(unit: TemplateUnit, norm: str, *, first: bool) -> Steps:
    """(p, y): q = LN(p), z = f(LN(q + LN(y))), to (q + b z, y + z)."""
    start = (TWICE,) if first else ()
    norms = (Norm(0, norm), Mix(((1, 0), (0, 1), (0, 1))), Norm(2, norm))
    read = Mix(((1, 0, 0), (0, 1, 0), (1, 0, 1)))
    write = Mix(((1, 0, 0, unit.b), (0, 1, 0, 1)))
    return (*start, *norms, read, Branch(2, _f(unit)), write)


def _value_residual(unit: TemplateUnit, *, first: bool) -> Steps:
    """(x, V) to (x + f(x), V), attention on the mean of V and its own values; V those at first."""
    if unit.kind != "attention":
        return (Branch(0, _f(unit)), Mix(((1, 0, 1), (0, 1, 0))))
    if unit.norm_in is None:
        raise NoTheoryError("no formula for values that are averaged over layers without norms")
    if first:
        read = (TWICE, Norm(1, unit.norm_in), Project(1, unit.w_in))
        return (*read, Attend(1, 2, unit), Mix(((1, 0, 0, 1), (0, 0, 1, 0))))
    read = (Mix(((1, 0), (0, 1), (1, 0))), Norm(2, unit.norm_in), Project(2, unit.w_in))
    mean = Mix(((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0.5, 0, 0.5)))
    return (*read, mean, Attend(2, 3, unit), Mix(((1, 0, 0, 0, 1), (0, 1, 0, 0, 0))))


def _template(unit: TemplateUnit, head_size: int) -> Steps:
    """Np(a N(x) + b f(N(x))), N the shared norm; values normalised where the unit has it so."""
    before = (Norm(0, unit.norm_shared),) if unit.norm_shared else ()
    after = (Norm(0, unit.norm_out),) if unit.norm_out else ()
    if unit.norm_value is None:
        return (*before, Branch(0, _f(unit)), Mix(((unit.a, unit.b),)), *after)
    join = Mix(((unit.a, 0, 0, unit.b),))
    return (*before, *_own_values(unit, head_size), join, *after)


def _own_values(unit: TemplateUnit, head_size: int) -> Steps:
    if unit.c != 1 or unit.norm_branch or unit.norm_mid:
        raise NoTheoryError("no formula for a norm of the values beside one of the branch")
    before = (Norm(1, unit.norm_in),) if unit.norm_in else ()
    values = (Project(1, unit.w_in), Norm(2, str(unit.norm_value), head_size))
    return (TWICE, *before, *values, Attend(1, 2, unit))


# Kinds of state with the steps of a unit.
PROGRAMS: dict[str, Callable[[TemplateUnit, State, bool], Steps]] = {
    "b2t": lambda unit, state, first: _b2t(unit),
    "residual-dual": lambda unit, state, first: _dual(unit, first=first),
    "siamesenorm": lambda unit, state, first: _siamese(unit, state.norm, first=first),
    "value-residual": lambda unit, state, first: _value_residual(unit, first=first),
    "template": lambda unit, state, first: _template(unit, state.head_size),
}


def program(units: Sequence[TemplateUnit], state: State) -> list[Steps]:
    """The steps of every unit."""
    make = lru_cache(maxsize=None)(PROGRAMS[state.kind])
    return [make(unit, state, place == 0) for place, unit in enumerate(units)]


def readout(state: State) -> Steps:
    """From the last state to the output: the first stream, or as `networks.readouts` has it."""
    kind = state.norm
    if state.kind == "residual-dual":
        return (Norm(1, kind), Mix(((1, 1),)))
    if state.kind == "siamesenorm":
        return (Norm(0, kind), Norm(1, kind), Mix(((1, 1),)), Norm(0, kind))
    return (Mix(((1, 0),)),) if state.kind == "value-residual" else ()
