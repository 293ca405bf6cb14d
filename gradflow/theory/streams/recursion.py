"""Both passes through units of several streams; a row of the result holds all streams together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradflow.theory.maths import Array
from gradflow.theory.mean_field.branches import BranchTape
from gradflow.theory.mean_field.layouts import Layout, Moments
from gradflow.theory.mean_field.norms import NormTape, Stream
from gradflow.theory.mean_field.recursion import MomentPasses, UnitTape, check_range
from gradflow.theory.streams.bundles import (
    BranchStep,
    Bundle,
    NormStep,
    UnitSteps,
    bundle_of,
    go_ahead,
    go_back,
    to_moments,
    without_branches,
)


def run_streams(
    units: Sequence[UnitSteps],
    readout: UnitSteps,
    x: Stream,
    g_last: Callable[[Stream], Moments],
    layout: Layout,
) -> MomentPasses:
    """Run all streams forward, then their gradients backward, as `mean_field.recursion.run_units`.

    |g|^2 and the streams in the result are those of all streams together. `readout` are the steps
    from the last streams to the output.

    Raises:
        NoTheoryError: the stream leaves the range of float32, or the logits that of theory.
    """
    ahead = _ahead(units, x, layout)
    output, taped = go_ahead(readout, ahead.bundle)
    g = go_back(readout, taped, bundle_of(g_last(Stream(output.of(0))), layout).s)
    gradients, shares, levels = [_summed(g)], [], [0.0]
    carried = -math.log(_square(g, layout) * len(g))
    for each, taped in zip(reversed(units), reversed(ahead.kept), strict=True):
        around = go_back(without_branches(each), taped, g)
        g = go_back(each, taped, g)
        size = _square(g, layout) * len(g)
        levels.append(carried + math.log(size))
        shares.append(max(1 - _square(around, layout) * len(g) / size, 0.0))
        if not 1e-50 < size < 1e50:  # the pass is linear: carry the scale, lose no digits
            g, carried = g / size, carried + math.log(size)
        gradients.append(_summed(g))
    squares = [layout.mean_square(x.s) for x in ahead.streams]
    return MomentPasses(
        ahead.streams, squares, gradients[::-1], levels[::-1], ahead.tapes, shares[::-1]
    )


class _Ahead(NamedTuple):
    """The pass forward: the last bundle, `MomentPasses.streams` and `.tapes`, each step's tapes."""

    bundle: Bundle
    streams: list[Stream]
    tapes: list[UnitTape]
    kept: list[list[Any]]


def _ahead(steps: Sequence[UnitSteps], x: Stream, layout: Layout) -> _Ahead:
    bundle = bundle_of(x.s, layout)
    streams, tapes, kept = [x], [], []
    for each in steps:
        square = _square(bundle.s, layout)
        bundle, taped = go_ahead(each, bundle)
        check_range(_square(bundle.s, layout))
        streams.append(_together(bundle.s, layout))
        tapes.append(_tape(each, taped, square, layout))
        kept.append(taped)
    return _Ahead(bundle, streams, tapes, kept)


def _summed(s: Array) -> Moments:
    """Return the sum over the streams of their own moments."""
    return to_moments(np.asarray(np.einsum("ii...->...", s)))


def _square(s: Array, layout: Layout) -> float:
    """Return the mean square over streams and tokens."""
    return layout.mean_square(_summed(s)) / len(s)


def _together(s: Array, layout: Layout) -> Stream:
    """Return the mean square of all streams, and the mean of their cosines between tokens."""
    squares = [layout.mean_square(to_moments(s[i, i])) for i in range(len(s))]
    alike = sum((s[i, i] / square for i, square in enumerate(squares)), np.zeros(s.shape[2:]))
    return Stream(to_moments(alike * (sum(squares) / len(s) ** 2)))


def _tape(steps: UnitSteps, tapes: Sequence[Any], square: float, layout: Layout) -> UnitTape:
    """Return the unit as `limits` and `finite_width` read it: its branch, the first stream's norm.

    `square` is the mean square of the streams before the unit.
    """
    ones = layout.start(1.0)
    norm, branch = None, UnitTape(ones, None, BranchTape(ones), None, None)
    for step, tape in zip(steps, tapes, strict=True):
        if isinstance(step, BranchStep):
            branch = tape.tape
        if isinstance(step, NormStep) and step.stream == 0 and norm is None:
            norm = tape.norm
    after = None if norm is None else _as_after(norm, square, layout)
    return UnitTape(branch.u, branch.before, branch.inside, branch.branch, after)


def _as_after(norm: NormTape, square: float, layout: Layout) -> NormTape:
    """Return the norm with a scale that, times `square`, is the share that earlier norms fixed."""
    fixed = max(1 - (norm.gain - 1) * norm.number, 0.0) ** 0.5
    root = (fixed / square) ** 0.5
    scale = layout.outer(root * layout.diagonal(layout.start(1.0)))
    return NormTape(norm.kind, scale, norm.gain, norm.number)
