"""What theory knows of every kind of unit at initialisation: one row a kind.

A kind of unit is the template of `gradflow.theory.template`, as it stands or restated in the
template's terms; or several streams that are Pre-LN's (`streams.preln_equivalents`); or several
streams that go through steps of their own (`streams.bundles`); or it has no formula, and the row
says why. A new kind needs a row here, and the functions that the row names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from gradflow.schemes import Place, Wiring
from gradflow.schemes.deep import NGPT_ALPHA
from gradflow.theory.maths import Array
from gradflow.theory.mean_field.layouts import Layout, scaled_moments
from gradflow.theory.mean_field.norms import POINTWISE_PHI, Stream
from gradflow.theory.mean_field.recursion import unit_forward
from gradflow.theory.streams import preln_equivalents as preln
from gradflow.theory.streams.bundles import (
    AttendStep,
    BranchStep,
    MixStep,
    NormStep,
    ProjectStep,
    UnitSteps,
)
from gradflow.theory.template import NoTheoryError, Stack, State, TemplateUnit, WeightMoments

# Times the mean square of a norm's input: nothing of the norm's eps is left.
_LARGE = 1e30
_PRELN_NORMS = ("in", "branch", "mid", "query-key")
_POSTNORM_NORMS = ("in", "out", "mid", "query-key")
_TWICE = MixStep(((1.0,), (1.0,)))


@dataclass(frozen=True, kw_only=True)
class UnitTheory:
    """What theory knows of one kind of unit, a value of `Wiring.unit`.

    Attributes:
        reason: why there is no formula; None where there is one.
        is_template: whether its units are the template's as they stand.
        has_gate: whether a highway's gate T(x) weighs branch and shortcut.
        restate: the unit in the template's terms, from the template's unit of its branch, its
            place and its wiring; None where that unit stands as it is.
        norms: places of `wiring.NORM_PLACES` that the formulas cover, where the units hand on more
            than one stream of the template; None where they do not.
        needs_out_norm: whether the formulas need a norm after the addition.
        takes_scalars: whether the formulas hold for branches of other weights than 1.
        prepare: the stack in the template's terms, from a stack of one stream; None where the
            stack stands as it is.
        steps: the steps of a unit, from its branch, the state, and whether it is the first;
            None where the units are passed as those of one stream.
        read_steps: the steps from the last streams to the output.
        norms_see_all: whether the units' norms are of all that they hand on.
        output_scale: the output over that of the template with the same branches, from the state,
            the number of units and the width.
        levels: ln of |g|^2 over that at the output, from that of the units as they are passed.
        answers: the derivative of `levels`, row by row.
        streams: the streams of each row together, from the stream of the units as passed.
    """

    reason: str | None = None
    is_template: bool = False
    has_gate: bool = False
    restate: Callable[[TemplateUnit, Place, Wiring], TemplateUnit] | None = None
    norms: tuple[str, ...] | None = None
    needs_out_norm: bool = False
    takes_scalars: bool = False
    prepare: Callable[[Stack, Layout], Stack] | None = None
    steps: Callable[[TemplateUnit, State, bool], UnitSteps] | None = None
    read_steps: Callable[[State], UnitSteps] = lambda _: ()
    norms_see_all: bool = True
    output_scale: Callable[[State, int, int], float] = lambda *_: 1.0
    levels: Callable[[Array, State], Array] = lambda base, _: base
    answers: Callable[[Array, State], Array] = lambda base, _: np.ones(len(base))
    streams: Callable[[Sequence[Stream], State, Layout], list[Stream]] = lambda x, *_: list(x)

    def unit_steps(self, units: Sequence[TemplateUnit], state: State) -> list[UnitSteps]:
        """Return the steps of every unit; equal units share theirs."""
        assert self.steps is not None
        make = lru_cache(maxsize=None)(self.steps)
        return [make(unit, state, place == 0) for place, unit in enumerate(units)]


# The template's terms.


def _mhc(unit: TemplateUnit, _: Place, wiring: Wiring) -> TemplateUnit:
    """Return Pre-LN's unit, whose branch reads n sigma(pre) times the equal streams."""
    gate = 1 / (1 + math.exp(-float(wiring.settings["pre"])))
    return _reading(unit, int(wiring.settings["streams"]) * gate)


@lru_cache(maxsize=256)
def _reading(unit: TemplateUnit, read: float) -> TemplateUnit:
    return replace(unit, read=read)


def _attnres(unit: TemplateUnit, place: Place, _: Wiring) -> TemplateUnit:
    """Return Pre-LN's unit, which reads the mean of the input and of all branches before it."""
    return replace(unit, read=1 / place.index)


def _siamesenorm(unit: TemplateUnit, _: Place, wiring: Wiring) -> TemplateUnit:
    """Return the unit with b the branch's weight in the stream that has norms."""
    return replace(unit, b=1 / float(wiring.settings["divisor"]))


def _pb_relax(unit: TemplateUnit, *_: object) -> TemplateUnit:
    """Return the unit with inputs of its norms so large that their eps never counts.

    Each norm is of 8 x / max|x|, about 1.6 x / sqrt(E x^2): Ding et al. 2021 (arXiv:2105.13290).
    """
    norms = unit.norm_in, unit.norm_branch
    if None in norms or set(norms) & set(POINTWISE_PHI):
        raise NoTheoryError("no formula for 8 x / max|x| but under norms of rows, in and out")
    large = WeightMoments(_LARGE * unit.w_out.scale, _LARGE * unit.w_out.bias)
    return replace(unit, read=_LARGE**0.5, w_out=large)


@lru_cache(maxsize=256)
def _ngpt(unit: TemplateUnit) -> TemplateUnit:
    """x' = N((1 - alpha) x + alpha N(f(x))), in units of x/sqrt(d), d the width.

    Loshchilov et al. 2024 (arXiv:2410.01131). Rows of every matrix have length 1, so it keeps mean
    squares; queries and keys of length 1 times sqrt(d_head) are those of a qk-norm; the ffn is
    gated, u phi(v).
    """
    one = WeightMoments(1.0)
    alike = replace(unit, a=1 - NGPT_ALPHA, b=NGPT_ALPHA, norm_branch="rmsnorm", norm_out="rmsnorm")
    large = WeightMoments(_LARGE)
    alike = replace(alike, w_in=one, w_out=large, w_query=one, w_key=one, qk_norm=True)
    return alike if unit.kind == "attention" else replace(alike, w_gate=one)


def _ngpt_streams(base: Sequence[Stream], _: State, layout: Layout) -> list[Stream]:
    """Return the stream in its own units: vectors of length 1."""
    return [Stream(scaled_moments(1 / layout.shape.width, x.s)) for x in base]


def with_omegas(stack: Stack, layout: Layout) -> Stack:
    """Return the stack with Admin's weights of the shortcuts, which a first pass forward measures.

    x' = LN(omega_i x + f_i(x)), omega_i^2 = 1 + sum over j < i of Var f_j, Liu et al. 2020
    (arXiv:2004.08249). Var f is over all elements of a batch, whose mean is 0: E f^2.
    """
    x, square, units = Stream(layout.start(stack.input_square)), 1.0, []
    for unit in stack.units:
        f, _ = unit_forward(replace(unit, a=0.0, norm_out=None), x, layout)
        units.append(replace(unit, a=math.sqrt(square)))
        square += layout.mean_square(f.s)
        x, _ = unit_forward(units[-1], x, layout)
    return replace(stack, units=tuple(units), state=None)


# Steps of units with several streams, or with norms beyond the template. Each function gives the
# steps of one unit; a matrix has one row for each stream that it makes. The equations are those of
# `gradflow.schemes.streams`.


@lru_cache(maxsize=4096)
def _branch(unit: TemplateUnit) -> TemplateUnit:
    """Return the unit without a shortcut and without what its steps do: f(c Ni(x))."""
    return replace(unit, a=0.0, b=1.0, norm_out=None, norm_value=None, norm_shared=None)


def _b2t(unit: TemplateUnit, _: State, __: bool) -> UnitSteps:
    """Take (x) to (LN(x + f(x)), x) by attention, (h, x) to (LN(x + h + f(h))) by an ffn."""
    norm = NormStep(0, str(unit.norm_out))
    if unit.kind == "attention":
        return (_TWICE, BranchStep(1, _branch(unit)), MixStep(((1, 0, 1), (0, 1, 0))), norm)
    return (BranchStep(0, _branch(unit)), MixStep(((1, 1, 1),)), norm)


def _dual(unit: TemplateUnit, _: State, first: bool) -> UnitSteps:
    """Take (p, r) to (LN(p + f(p)), r + f(p))."""
    start = (_TWICE,) if first else ()
    add = MixStep(((1, 0, 1), (0, 1, 1)))
    return (*start, BranchStep(0, _branch(unit)), add, NormStep(0, str(unit.norm_out)))


def _siamese(unit: TemplateUnit, state: State, first: bool) -> UnitSteps:
    """Take (p, y) to (q + b z, y + z), q = LN(p), z = f(LN(q + LN(y)))."""
    start = (_TWICE,) if first else ()
    norms = NormStep(0, state.norm), MixStep(((1, 0), (0, 1), (0, 1))), NormStep(2, state.norm)
    read = MixStep(((1, 0, 0), (0, 1, 0), (1, 0, 1)))
    write = MixStep(((1, 0, 0, unit.b), (0, 1, 0, 1)))
    return (*start, *norms, read, BranchStep(2, _branch(unit)), write)


def _value_residual(unit: TemplateUnit, _: State, first: bool) -> UnitSteps:
    """Take (x, V) to (x + f(x), V), attention on the mean of V and its values; `first` makes V."""
    if unit.kind != "attention":
        return (BranchStep(0, _branch(unit)), MixStep(((1, 0, 1), (0, 1, 0))))
    if unit.norm_in is None:
        raise NoTheoryError("no formula for values that are averaged over layers without norms")
    if first:
        read = (_TWICE, NormStep(1, unit.norm_in), ProjectStep(1, unit.w_in))
        return (*read, AttendStep(1, 2, unit), MixStep(((1, 0, 0, 1), (0, 0, 1, 0))))
    copied = MixStep(((1, 0), (0, 1), (1, 0)))
    mean = MixStep(((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0.5, 0, 0.5)))
    read = (copied, NormStep(2, unit.norm_in), ProjectStep(2, unit.w_in))
    return (*read, mean, AttendStep(2, 3, unit), MixStep(((1, 0, 0, 0, 1), (0, 1, 0, 0, 0))))


def _beyond_norms(unit: TemplateUnit, state: State, _: bool) -> UnitSteps:
    """Take x to Np(a N(x) + b f(N(x))), N the shared norm; the values may have a norm."""
    before = (NormStep(0, unit.norm_shared),) if unit.norm_shared else ()
    after = (NormStep(0, unit.norm_out),) if unit.norm_out else ()
    if unit.norm_value is None:
        return (*before, BranchStep(0, _branch(unit)), MixStep(((unit.a, unit.b),)), *after)
    join = MixStep(((unit.a, 0, 0, unit.b),))
    return (*before, *_normed_values(unit, state.head_size), join, *after)


def _normed_values(unit: TemplateUnit, head_size: int) -> UnitSteps:
    if unit.c != 1 or unit.norm_branch or unit.norm_mid:
        raise NoTheoryError("no formula for a norm of the values beside one of the branch")
    before = (NormStep(1, unit.norm_in),) if unit.norm_in else ()
    values = (ProjectStep(1, unit.w_in), NormStep(2, str(unit.norm_value), head_size))
    return (_TWICE, *before, *values, AttendStep(1, 2, unit))


def _siamese_output(state: State) -> UnitSteps:
    """Take (p, y) to LN(LN(p) + LN(y))."""
    norms = NormStep(0, state.norm), NormStep(1, state.norm)
    return (*norms, MixStep(((1, 1),)), NormStep(0, state.norm))


_preln_streams = partial(UnitTheory, norms=_PRELN_NORMS, takes_scalars=True)

UNIT_THEORY: dict[str, UnitTheory] = {
    "template": UnitTheory(is_template=True, steps=_beyond_norms, norms_see_all=False),
    "normformer": UnitTheory(is_template=True),
    "fixup": UnitTheory(is_template=True),
    "highway": UnitTheory(has_gate=True),
    "stochastic": UnitTheory(reason="which branches are dropped is drawn from the seed"),
    "pb-relax": UnitTheory(restate=_pb_relax),
    "admin": UnitTheory(
        norms=("in", "branch", "out", "mid", "query-key"), takes_scalars=True, prepare=with_omegas
    ),
    "ngpt": UnitTheory(
        restate=lambda unit, place, wiring: _ngpt(unit),
        norms=(),
        output_scale=lambda state, units, width: width**-0.5,
        streams=_ngpt_streams,
    ),
    "hyper-connections": _preln_streams(
        output_scale=lambda state, units, width: state.copies,
        levels=preln.hyper_levels,
        answers=preln.hyper_answers,
    ),
    "mhc": _preln_streams(restate=_mhc, levels=preln.mhc_levels),
    "attnres": _preln_streams(
        restate=_attnres,
        output_scale=lambda state, units, width: 1 / (units + 1),
        levels=preln.attnres_levels,
        streams=preln.attnres_streams,
    ),
    "denseformer": _preln_streams(streams=preln.denseformer_streams),
    "b2t": UnitTheory(norms=_POSTNORM_NORMS, needs_out_norm=True, steps=_b2t, norms_see_all=False),
    "residual-dual": UnitTheory(
        norms=_POSTNORM_NORMS,
        needs_out_norm=True,
        steps=_dual,
        read_steps=lambda state: (NormStep(1, state.norm), MixStep(((1, 1),))),
        norms_see_all=False,
    ),
    "siamesenorm": UnitTheory(
        restate=_siamesenorm,
        norms=("in", "mid", "query-key"),
        steps=_siamese,
        read_steps=_siamese_output,
        norms_see_all=False,
    ),
    "value-residual": UnitTheory(
        norms=("in", "query-key"), steps=_value_residual, read_steps=lambda _: (MixStep(((1, 0),)),)
    ),
}
