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

from gradflow.theory.mean_field.branches import BRANCHES, BranchTape, pull_branch
from gradflow.theory.mean_field.layouts import Layout
from gradflow.theory.mean_field.moment_sums import Moments, plus, scaled
from gradflow.theory.mean_field.norms import NormTape, Stream, is_zero, normalise, pull_norm
from gradflow.theory.template import NoTheoryError, Unit

_LEAST_SQUARE, _MOST_SQUARE = 1e-70, 1e70


class Tape(NamedTuple):
    """One unit after its forward pass: its norms Ni, No, Np, and its branch, whose input is u."""

    u: Moments
    before: NormTape | None
    inside: BranchTape
    branch: NormTape | None
    after: NormTape | None

    @property
    def norms(self) -> list[NormTape]:
        """Those that the unit has."""
        placed = (self.before, self.inside.mid, self.branch, self.after)
        return [norm for norm in placed if norm is not None]


def forward(unit: Unit, x: Stream, layout: Layout) -> tuple[Stream, Tape]:
    """The stream after the unit."""
    u = x if unit.read == 1.0 else Stream(scaled(unit.read**2, x.s), x.mean * unit.read)
    u, before = normalise(unit.norm_in, u, layout, alpha=unit.alpha)
    u = u if unit.c == 1.0 else Stream(scaled(unit.c**2, u.s), u.mean * unit.c)
    f, inside = BRANCHES[unit.kind](unit, u, layout)
    f, branch = normalise(unit.norm_branch, f, layout)
    y = _joined(unit, x, f)
    if unit.norm_out is None:
        return y, Tape(u.s, before, inside, branch, None)
    fixed = _kept(unit, x, y, layout) if unit.norm_out == x.normed else 0.0
    y, after = normalise(unit.norm_out, y, layout, fixed)
    return y, Tape(u.s, before, inside, branch, after)


def backward(unit: Unit, tape: Tape, g: Moments, layout: Layout) -> tuple[Moments, float, float]:
    """Moments of the gradient at the unit's input; their mean square; the branch's share in it."""
    g = pull_norm(tape.after, g, layout)
    through_f = pull_norm(tape.branch, scaled(unit.b**2, g), layout)
    through_f = pull_branch(unit, tape.inside, through_f, layout)
    through_f = pull_norm(tape.before, scaled(unit.c**2, through_f), layout)
    through_f = scaled(unit.read**2, through_f)
    if not unit.a:
        return through_f, layout.mean_square(through_f), 1.0
    total = plus(scaled(unit.a**2, g), through_f)
    square = layout.mean_square(total)
    return total, square, layout.mean_square(through_f) / square


def _kept(unit: Unit, x: Stream, y: Stream, layout: Layout) -> float:
    """The shortcut's share in the mean square."""
    return unit.a**2 * layout.mean_square(x.s) / layout.mean_square(y.s)


def _joined(unit: Unit, x: Stream, f: Stream) -> Stream:
    """a x + b f; x and f share only their means over the features."""
    if not unit.a:
        return Stream(scaled(unit.b**2, f.s), unit.b * f.mean, f.source)
    s = plus(scaled(unit.a**2, x.s), scaled(unit.b**2, f.s))
    if not (is_zero(x.mean) or is_zero(f.mean)):
        common = 2 * unit.a * unit.b * x.mean * f.mean
        s = tuple([entry + common for entry in s])
    mean = unit.a * x.mean + unit.b * f.mean
    if x.common is None or f.common is None:
        return Stream(s, mean)
    return Stream(s, mean, common=unit.a**2 * x.common + unit.b**2 * f.common)


@dataclass(frozen=True)
class Passes:
    """Both passes through a stack.

    Attributes:
        streams: at the input and after every unit.
        squares: mean squares of the streams.
        gradients: moments of the gradient there, but for a factor.
        levels: ln of the mean square of the gradient over that at the output.
        tapes: of the units.
        shares: of the units' branches in |g|^2 at their inputs.
        scatter: variance of ln |g|^2 that a kind of unit brings of its own (`highway`); `drift` as
            in `spread.Noise`.
    """

    streams: list[Stream]
    squares: list[float]
    gradients: list[Moments]
    levels: list[float]
    tapes: list[Tape]
    shares: list[float]
    scatter: Sequence[float] = ()
    drift: float = 0.0


def run(
    units: Sequence[Unit], x: Stream, g_last: Callable[[Stream], Moments], layout: Layout
) -> Passes:
    """Forward, then backward.

    Args:
        units: first to last.
        x: the input.
        g_last: moments of the gradient at the output, given the output.
        layout: of the moments.

    Raises:
        NoTheoryError: the stream leaves the range of number formats, or attention that of theory.
    """
    streams, squares, tapes = [x], [layout.mean_square(x.s)], []
    for unit in units:
        x, tape = forward(unit, x, layout)
        streams.append(x)
        squares.append(check_range(layout.mean_square(x.s)))
        tapes.append(tape)
    g = g_last(x)
    carried = -math.log(layout.mean_square(g))
    gradients, shares, levels = [g], [], [0.0]
    for unit, tape in zip(reversed(units), reversed(tapes), strict=True):
        g, size, share = backward(unit, tape, g, layout)
        levels.append(carried + math.log(size))
        if not 1e-50 < size < 1e50:  # the pass is linear: carry the scale, lose no digits
            g, carried = scaled(1 / size, g), carried + math.log(size)
        gradients.append(g)
        shares.append(share)
    return Passes(streams, squares, gradients[::-1], levels[::-1], tapes, shares[::-1])


def check_range(square: float) -> float:
    """The mean square of a stream.

    Raises:
        NoTheoryError: it leaves the range of number formats.
    """
    if not _LEAST_SQUARE < square < _MOST_SQUARE:
        raise NoTheoryError(f"a stream of mean square {square:.0e} leaves the range of float32")
    return square
