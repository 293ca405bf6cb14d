"""Forward and backward through a stack: second moments of the stream, and of its gradient.

x' = Np(a x + b No(f(c Ni(x)))), G' = E |dL/dx|^2 per feature. The branch's last weights are
independent of its input and of zero mean, so shortcut and branch add in the mean square; only
phi(Wx), which has a mean, needs the cross term of the means. Poole et al. 2016 (arXiv:1606.05340)
and Schoenholz et al. 2017 (arXiv:1611.01232) for plain nets; Yang & Schoenholz 2017
(arXiv:1712.08969) for residual ones. Limits: width to infinity at fixed depth; the gradient at the
output independent of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradflow.theory.mean_field.branches import BRANCH_MOMENTS, BranchTape, pull_branch
from gradflow.theory.mean_field.layouts import Layout, Moments, plus_moments, scaled_moments
from gradflow.theory.mean_field.norms import NormTape, Stream, is_zero, normalise, pull_norm
from gradflow.theory.template import NoTheoryError, TemplateUnit

_LEAST_SQUARE, _MOST_SQUARE = 1e-70, 1e70


class UnitTape(NamedTuple):
    """One unit after its forward pass.

    Attributes:
        u: moments of the branch's input.
        before, branch, after: the tapes of the norms Ni, No and Np, or None.
        inside: the tape of the branch.
    """

    u: Moments
    before: NormTape | None
    inside: BranchTape
    branch: NormTape | None
    after: NormTape | None

    @property
    def norms(self) -> list[NormTape]:
        """The tapes of the norms that the unit has."""
        placed = (self.before, self.inside.mid, self.branch, self.after)
        return [norm for norm in placed if norm is not None]


def unit_forward(unit: TemplateUnit, x: Stream, layout: Layout) -> tuple[Stream, UnitTape]:
    """Return the stream after the unit, and what the way back needs."""
    u = x if unit.read == 1.0 else Stream(scaled_moments(unit.read**2, x.s), x.mean * unit.read)
    u, before = normalise(unit.norm_in, u, layout, alpha=unit.alpha)
    u = u if unit.c == 1.0 else Stream(scaled_moments(unit.c**2, u.s), u.mean * unit.c)
    f, inside = BRANCH_MOMENTS[unit.kind](unit, u, layout)
    f, branch = normalise(unit.norm_branch, f, layout)
    y = _joined(unit, x, f)
    if unit.norm_out is None:
        return y, UnitTape(u.s, before, inside, branch, None)
    fixed = _kept(unit, x, y, layout) if unit.norm_out == x.normed else 0.0
    y, after = normalise(unit.norm_out, y, layout, fixed)
    return y, UnitTape(u.s, before, inside, branch, after)


def unit_backward(
    unit: TemplateUnit, tape: UnitTape, g: Moments, layout: Layout
) -> tuple[Moments, float, float]:
    """Return the gradient's moments at the unit's input, |g|^2, and the branch's share in it."""
    g = pull_norm(tape.after, g, layout)
    through_f = pull_norm(tape.branch, scaled_moments(unit.b**2, g), layout)
    through_f = pull_branch(unit, tape.inside, through_f, layout)
    through_f = pull_norm(tape.before, scaled_moments(unit.c**2, through_f), layout)
    through_f = scaled_moments(unit.read**2, through_f)
    if not unit.a:
        return through_f, layout.mean_square(through_f), 1.0
    total = plus_moments(scaled_moments(unit.a**2, g), through_f)
    square = layout.mean_square(total)
    return total, square, layout.mean_square(through_f) / square


def _kept(unit: TemplateUnit, x: Stream, y: Stream, layout: Layout) -> float:
    """Return the shortcut's share in the mean square of y."""
    return unit.a**2 * layout.mean_square(x.s) / layout.mean_square(y.s)


def _joined(unit: TemplateUnit, x: Stream, f: Stream) -> Stream:
    """Return the moments of a x + b f; x and f share only their means over the features."""
    if not unit.a:
        return Stream(scaled_moments(unit.b**2, f.s), unit.b * f.mean, f.source)
    s = plus_moments(scaled_moments(unit.a**2, x.s), scaled_moments(unit.b**2, f.s))
    if not (is_zero(x.mean) or is_zero(f.mean)):
        common = 2 * unit.a * unit.b * x.mean * f.mean
        s = tuple([entry + common for entry in s])
    mean = unit.a * x.mean + unit.b * f.mean
    if x.common is None or f.common is None:
        return Stream(s, mean)
    return Stream(s, mean, common=unit.a**2 * x.common + unit.b**2 * f.common)


@dataclass(frozen=True)
class MomentPasses:
    """The moments that both passes through a stack find.

    Attributes:
        streams: the stream at the input and after every unit.
        squares: mean squares of the streams.
        gradients: moments of the gradient at the input and after every unit, up to a factor.
        levels: ln of the mean square of the gradient over that at the output.
        tapes: the tape of every unit.
        shares: share of every unit's branch in |g|^2 at the unit's input.
        scatter: variance of ln |g|^2 that a kind of unit adds (`highway`); empty for none.
        drift: as in `band.LevelNoise`.
    """

    streams: list[Stream]
    squares: list[float]
    gradients: list[Moments]
    levels: list[float]
    tapes: list[UnitTape]
    shares: list[float]
    scatter: Sequence[float] = ()
    drift: float = 0.0


def run_units(
    units: Sequence[TemplateUnit], x: Stream, g_last: Callable[[Stream], Moments], layout: Layout
) -> MomentPasses:
    """Run the moments of the input x forward through the units, then those of the gradient back.

    `g_last` gives the moments of the gradient at the output, as a function of the output.

    Raises:
        NoTheoryError: the stream leaves the range of float32, or the logits that of theory.
    """
    streams, squares, tapes = [x], [layout.mean_square(x.s)], []
    for unit in units:
        x, tape = unit_forward(unit, x, layout)
        streams.append(x)
        squares.append(check_range(layout.mean_square(x.s)))
        tapes.append(tape)
    g = g_last(x)
    carried = -math.log(layout.mean_square(g))
    gradients, shares, levels = [g], [], [0.0]
    for unit, tape in zip(reversed(units), reversed(tapes), strict=True):
        g, size, share = unit_backward(unit, tape, g, layout)
        levels.append(carried + math.log(size))
        if not 1e-50 < size < 1e50:  # the pass is linear: carry the scale, lose no digits
            g, carried = scaled_moments(1 / size, g), carried + math.log(size)
        gradients.append(g)
        shares.append(share)
    return MomentPasses(streams, squares, gradients[::-1], levels[::-1], tapes, shares[::-1])


def check_range(square: float) -> float:
    """Return the mean square of a stream.

    Raises:
        NoTheoryError: the mean square leaves the range of float32.
    """
    if not _LEAST_SQUARE < square < _MOST_SQUARE:
        raise NoTheoryError(f"a stream of mean square {square:.0e} leaves the range of float32")
    return square
