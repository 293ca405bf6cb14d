"""Both passes through units of several streams; a row of the state holds all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradflow.theory.bundle import (
    Branch,
    Bundle,
    Norm,
    Step,
    bundle_of,
    go_ahead,
    go_back,
    to_moments,
)
from gradflow.theory.layouts import Layout, Moments
from gradflow.theory.maths import Array
from gradflow.theory.norms import NormTape, Stream
from gradflow.theory.passes import BranchTape, Passes, Tape, check_range
from gradflow.theory.programs import Steps, program, readout
from gradflow.theory.units import State, Unit


def run_several(
    units: Sequence[Unit],
    state: State,
    x: Stream,
    g_last: Callable[[Stream], Moments],
    layout: Layout,
) -> Passes:
    """Forward, then backward, as `passes.run`; |g|^2 and the streams are of the state.

    Args:
        units: first to last, their branches.
        state: how they carry their streams.
        x: the input.
        g_last: moments of the gradient at the output, given the output.
        layout: of the moments.

    Raises:
        NoTheoryError: the stream leaves the range of number formats, or attention that of theory.
    """
    steps = program(units, state)
    bundle = bundle_of(x.s)
    streams, tapes, taped = [x], [], []
    for each in steps:
        before, (bundle, kept) = bundle, go_ahead(each, bundle, layout)
        streams.append(_together(bundle.s, layout))
        check_range(_square(bundle.s, layout))
        tapes.append(kept)
        taped.append(_tape(each, kept, before, bundle, layout))
    out, kept = go_ahead(readout(state), bundle, layout)
    g = np.asarray(bundle_of(g_last(Stream(to_moments(out.s[0, 0])))).s)
    g = go_back(readout(state), kept, g, layout)
    gradients, shares, log_scales = [_summed(g)], [], [0.0]
    for each, kept in zip(reversed(steps), reversed(tapes), strict=True):
        g, share = _pulled(each, kept, g, layout)
        size, log_scale = _square(g, layout) * len(g), log_scales[-1]
        if not 1e-50 < size < 1e50:
            g, log_scale = g / size, log_scale + math.log(size)
        gradients.append(_summed(g))
        shares.append(share)
        log_scales.append(log_scale)
    return Passes(streams, gradients[::-1], log_scales[::-1], taped, shares[::-1])


def _pulled(steps: Steps, tapes: Sequence[Any], g: Array, layout: Layout) -> tuple[Array, float]:
    """The gradient before the unit, and the branch's share in its mean square."""
    whole = go_back(steps, tapes, g, layout)
    around = go_back(steps, tapes, g, layout, branches=False)
    return whole, max(1 - _square(around, layout) / _square(whole, layout), 0.0)


def _summed(g: Array) -> Moments:
    """Over the streams."""
    return to_moments(np.einsum("ii...->...", g))


def _square(s: Array, layout: Layout) -> float:
    """Mean square over streams and tokens."""
    return layout.mean(layout.diagonal(_summed(s))) / len(s)


def _together(s: Array, layout: Layout) -> Stream:
    """The mean square of all streams, and the mean of their cosines between tokens."""
    squares = [layout.mean(layout.diagonal(to_moments(s[i, i]))) for i in range(len(s))]
    alike = sum(s[i, i] / square for i, square in enumerate(squares))
    return Stream(to_moments(np.asarray(alike) * (sum(squares) / len(s) ** 2)))


def _tape(
    steps: Steps, tapes: Sequence[Any], before: Bundle, after: Bundle, layout: Layout
) -> Tape:
    """The unit as `limits` and `spread` look at it: its branch, and a norm after the shortcut.

    That norm's scale stands for the share of the shortcut in what it divides out.
    """
    branch = next((t for s, t in zip(steps, tapes, strict=True) if isinstance(s, Branch)), None)
    if branch is None:
        branch = Tape(
            to_moments(before.s[0, 0]), None, BranchTape(to_moments(before.s[0, 0])), None, None
        )
    last: Step = steps[-1]
    if not isinstance(last, Norm):
        return branch
    norm: NormTape = tapes[-1]
    kept = max(1 - (norm.gain - 1) * norm.count, 0.0) ** 0.5 / _square(before.s, layout)
    root = np.full_like(np.asarray(layout.diagonal(norm.scale)), kept**0.5)
    scale = layout.outer(root if root.ndim else float(root))
    return Tape(
        branch.u,
        branch.before,
        branch.inside,
        branch.branch,
        NormTape(norm.kind, scale, norm.gain, norm.count),
    )
