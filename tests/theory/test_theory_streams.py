"""Theory of several streams against Pre-LN's rows, and recursions written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from problems import measure, network

from gradflow.engine.tape import record_forward
from gradflow.engine.walk import loss_gradient, vjp
from gradflow.networks.units import depth_mixing
from gradflow.schemes import SCHEMES
from gradflow.specs.stack import StackSpec
from gradflow.theory import Stack, StreamShape, TemplateUnit, WeightMoments, predict_stack
from gradflow.theory.mean_field.layouts import CausalTokens, Exchangeable, Layout
from gradflow.theory.mean_field.norms import Stream
from gradflow.theory.mean_field.recursion import MomentPasses, run_units
from gradflow.theory.streams.bundles import (
    AttendStep,
    BranchStep,
    MixStep,
    NormStep,
    ProjectStep,
    UnitSteps,
)
from gradflow.theory.streams.recursion import run_streams
from gradflow.theory.template import State
from gradflow.theory.unit_theory import UNIT_THEORY, UnitTheory

Rows = NDArray[np.float64]
ENDLESS = 10**9  # features: nothing of finite width is left
TOKENS = 16
LN = "layernorm"


# Rows of the schemes that are Pre-LN, from the gradients of a measured Pre-LN.


def spec_of(scheme: str, **options: Any) -> StackSpec:
    return StackSpec(**{"scheme": scheme, "depth": 12, "width": 64, "batch_size": 4, **options})


def double(scheme: str, **options: Any) -> StackSpec:
    sizes = {"depth": 4, "width": 32, "heads": 4, "seq_len": 6, "batch_size": 2}
    return spec_of(scheme, **{"dtype": "float64", **sizes, **options})


def logs(spec: StackSpec) -> Rows:
    """ln |g_u|^2 - ln |g_D|^2, from the input up."""
    found = np.array([row.log10_grad_norm for row in measure(spec)[0]])
    return np.asarray(2 * math.log(10) * (found - found[-1]))


def levels_of(kind: str, copies: int, base: Sequence[float] | Rows) -> Rows:
    """ln |g_u|^2 - ln |g_D|^2 of a kind of unit, from Pre-LN's."""
    return UNIT_THEORY[kind].levels(np.asarray(base), State(kind, copies))


EXACT = ["denseformer", "mhc", "mhc-uniform", "attnres"]


@pytest.mark.parametrize("causal", [None, True])
@pytest.mark.parametrize("scheme", EXACT)
def test_measured_rows_are_those_of_a_measured_pre_ln(
    scheme: str, causal: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every row, with the same weights and no eps."""
    monkeypatch.setattr(depth_mixing, "KIND_EPS", 1e-16)
    spec = double(scheme, causal=causal, norm_eps=1e-16)
    kind = SCHEMES[scheme].wire(spec.place(1, 0)).unit
    base = logs(replace(spec, scheme="pre-ln"))
    assert logs(spec) == pytest.approx(
        levels_of(kind, 1 if scheme[0] in "da" else 4, base), abs=1e-9
    )


def gradients(spec: StackSpec) -> list[Rows]:
    """dL/dy of every row."""
    net = network(spec)
    tapes = list(record_forward(net))
    _, g = loss_gradient(net.loss, tapes[-1].y)
    found = [g.numpy()]
    for tape in reversed(tapes):
        g = sum(vjp(tape, g)[0])
        found.append(g.numpy())
    return found[::-1]


def test_measured_rows_of_hyper_connections_are_sums_over_pre_ln() -> None:
    """Stream s has g_D + 4 sum (g_(m-1) - g_m) over the units m above that read it."""
    spec = double("hyper-connections")
    plain, rows = gradients(replace(spec, scheme="pre-ln")), logs(spec)
    square = 4 * (plain[-1] ** 2).sum()
    for u in range(1, len(plain)):
        streams = np.stack([plain[-1]] * 4)
        for m in range(u + 1, len(plain)):
            streams[(m - 1) % 4] += 4 * (plain[m - 1] - plain[m])
        assert rows[u] == pytest.approx(math.log((streams**2).sum() / square), abs=1e-9)
    assert rows[0] == pytest.approx(math.log(16 * (plain[0] ** 2).sum() / square), abs=1e-9)


def test_on_average_these_sums_have_no_cross_terms() -> None:
    """(n + n^2 (R - 1))/n, to 0.03 decades of 256 rows of 64 features; R alone is far from it."""
    spec = spec_of("hyper-connections", depth=8, batch_size=16, seq_len=16)
    base = logs(replace(spec, scheme="pre-ln"))
    told = levels_of("hyper-connections", 4, base)
    assert logs(spec) == pytest.approx(told, abs=0.03 * math.log(10))
    assert np.abs(logs(spec) - base)[1:-1].max() > 0.5 * math.log(10)


# Two engines: the template's, and that of bundles.

SHAPE = StreamShape(domain="tokens", width=ENDLESS, batch=8, tokens=TOKENS, hidden=ENDLESS, heads=4)
ATTENTION = TemplateUnit(
    kind="attention", w_in=WeightMoments(0.9, 0.1), w_query=WeightMoments(0.8), norm_in=LN
)
FFN = TemplateUnit(kind="ffn", activation="gelu", w_in=WeightMoments(1.3, 0.1), norm_in=LN)
PRE = (ATTENTION, FFN) * 5
LAYOUTS = [Exchangeable(SHAPE), CausalTokens(replace(SHAPE, causal=True))]


def post(unit: TemplateUnit) -> TemplateUnit:
    return replace(unit, norm_in=None, norm_out=LN, a=1.3)


Steps = Callable[[TemplateUnit, State, bool], UnitSteps]


def passes(
    units: tuple[TemplateUnit, ...],
    layout: Layout,
    steps: Steps | None = None,
    readout: UnitSteps = (),
) -> MomentPasses:
    start = Stream(layout.start(1.0))
    if steps is None:
        return run_units(units, start, lambda _: layout.start(1.0), layout)
    made = UnitTheory(steps=steps).unit_steps(units, State("own"))
    return run_streams(made, readout, start, lambda _: layout.start(1.0), layout)


@pytest.mark.parametrize("kind", ["hyper-connections", "mhc", "attnres", "denseformer"])
def test_states_answer_to_pre_ln_as_their_levels_do(kind: str) -> None:
    """A central difference, row by row; the last row is the reference and does not move."""
    state, base, step = State(kind, 4), np.array([2.0, 1.4, 0.6, 0.2]), 1e-6
    theory = UNIT_THEORY[kind]
    up, down = (theory.levels(base + h, state) for h in (step, -step))
    assert theory.answers(base, state) == pytest.approx((up - down) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["full", "causal"])
@pytest.mark.parametrize("units", [PRE, tuple(map(post, PRE))], ids=["pre", "post"])
def test_one_stream_in_a_bundle_is_the_template(
    units: tuple[TemplateUnit, ...], layout: Layout
) -> None:
    one, two = passes(units, layout), passes(units, layout, UNIT_THEORY["template"].steps)
    assert two.levels == pytest.approx(one.levels, rel=1e-9)
    assert two.shares == pytest.approx(one.shares, rel=1e-6)
    for a, b in zip(one.streams, two.streams, strict=True):
        for x, y in zip(a.s, b.s, strict=True):
            assert y == pytest.approx(x, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["full", "causal"])
def test_values_of_their_own_input_are_plain_attention(layout: Layout) -> None:
    """Projected, mixed and pulled apart from queries and keys, then together again."""

    def apart(unit: TemplateUnit, *_: Any) -> tuple[Any, ...]:
        if unit.kind == "ffn":
            return (BranchStep(0, replace(unit, a=0.0)), MixStep(((1, 1),)))
        steps = (MixStep(((1,), (1,))), NormStep(1, LN), ProjectStep(1, unit.w_in))
        return (*steps, AttendStep(1, 2, unit), MixStep(((1, 0, 0, 1),)))

    one, two = passes(PRE, layout), passes(PRE, layout, apart)
    assert two.levels == pytest.approx(one.levels, rel=1e-8)


def copied(read: list[float], mix: Rows, write: float) -> Any:
    """n copies, f of sum_s read_s H_s, and mix H + write f."""
    n = len(read)

    def steps(unit: TemplateUnit, _: State, first: bool) -> tuple[Any, ...]:
        start = (MixStep(((1,),) * n),) if first else ()
        gather = MixStep((*map(tuple, np.eye(n)), tuple(read)))
        join = MixStep(tuple((*row, 0, write) for row in mix))
        return (*start, gather, BranchStep(n, replace(unit, a=0.0)), join)

    return steps


@pytest.mark.parametrize("layout", LAYOUTS, ids=["full", "causal"])
def test_rows_of_copies_are_those_of_their_own_matrices(layout: Layout) -> None:
    """The sums of `preln_equivalents` against all moments between four streams."""
    base = passes(PRE, layout).levels
    near = np.full((4, 4), 1e-3) + np.eye(4) * (1 - 4e-3)
    cases = {
        "hyper-connections": (copied([0, 0, 1, 0], np.eye(4), 1), ((1, 1, 1, 1),)),
        "mhc": (copied([0.25] * 4, near, 1), ((0.25,) * 4,)),
    }
    for kind, (steps, out) in cases.items():
        found = passes(PRE, layout, steps, (MixStep(out),)).levels
        assert found == pytest.approx(levels_of(kind, 4, base), rel=1e-6), kind


def test_rows_of_attention_over_depth_are_those_of_a_growing_bundle() -> None:
    layout, units = LAYOUTS[0], PRE[:6]
    number = iter(range(1, len(units) + 1))

    def grown(unit: TemplateUnit, *_: Any) -> tuple[Any, ...]:
        n = next(number)
        mean = MixStep((*map(tuple, np.eye(n)), (1 / n,) * n))
        drop = MixStep(tuple(tuple(row) for row in np.delete(np.eye(n + 2), n, axis=0)))
        return (mean, BranchStep(n, replace(unit, a=0.0)), drop)

    # Units are distinct objects, so that each is asked for its own steps.
    own = tuple(replace(unit, read=1 - 1e-9 * i) for i, unit in enumerate(units))
    found = passes(own, layout, grown, (MixStep(((1 / 7,) * 7,)),)).levels
    base = passes(tuple(replace(u, read=1 / (i + 1)) for i, u in enumerate(units)), layout).levels
    assert found == pytest.approx(levels_of("attnres", 1, base), rel=1e-4)


# Recursions by hand: uniform attention, W_v = W_o = 1, and a ReLU ffn that keeps the mean square.

UNIFORM = TemplateUnit(kind="attention", w_query=WeightMoments(0.0))
RELU = TemplateUnit(kind="ffn", activation="relu", w_in=WeightMoments(2.0))
DEPTH = 6


def told(units: tuple[TemplateUnit, ...], kind: str, **state: Any) -> Rows:
    """|g_u|^2 / |g_D|^2 at endless width."""
    found = predict_stack(Stack(SHAPE, units, state=State(kind, **state)))
    assert found.log10_grad_norm is not None, found.reason
    return np.asarray(10 ** (2 * np.array(found.log10_grad_norm)))


def test_two_streams_of_residual_dual_by_hand() -> None:
    """Of ffns: E p^2 = 1, E r^2 = 1 + l; g_p' / 2 around f, (g_p / sqrt(2) + g_r)^2 through it."""
    units = (replace(RELU, norm_out=LN),) * DEPTH
    p, r, both = 1.0, 1 / (1 + DEPTH), 1 / math.sqrt(1 + DEPTH)
    rows = [p + r]
    for _ in range(DEPTH):
        around, both = p / 2, both / math.sqrt(2)
        p = around + (around + r + 2 * both)
        rows.append(p + r)
    rows[-1] += 2 * both  # p_0 = r_0 = x
    assert told(units, "residual-dual") == pytest.approx(np.array(rows[::-1]) / rows[0], rel=1e-4)


def test_two_streams_of_siamesenorm_by_hand() -> None:
    """Of ffns behind norms, z of mean square 1; moments P, Y, X between p and y."""
    divisors = [math.sqrt(2 * layer) for layer in range(1, DEPTH + 1)]
    units = tuple(replace(RELU, norm_in=LN, b=1 / c) for c in divisors)
    square, tapes = [1.0, 1.0, 1.0], []
    for c in divisors:
        p, y, x = square
        w = 2 + 2 * x / math.sqrt(p * y)
        tapes.append((p, y, w))
        square = [1 + 1 / c**2, y + 1, x / math.sqrt(p) + 1 / c]
    p, y, x = square
    w = 2 + 2 * x / math.sqrt(p * y)
    g = [1 / (w * p), 1 / (w * y), 1 / (w * math.sqrt(p * y))]
    rows = [g[0] + g[1]]
    for c, (p, y, w) in zip(reversed(divisors), reversed(tapes), strict=True):
        through = (g[0] / c**2 + g[1] + 2 * g[2] / c) / w
        both = (g[2] + through / math.sqrt(y)) / math.sqrt(p)
        g = [(g[0] + through) / p, g[1] + through / y, both]
        rows.append(g[0] + g[1])
    rows[-1] += 2 * g[2]
    assert told(units, "siamesenorm") == pytest.approx(np.array(rows[::-1]) / rows[0], rel=1e-4)


def k1(c: float) -> float:
    """ReLU of cosine c, He."""
    return (math.sqrt(max(1 - c * c, 0.0)) + (math.pi - math.acos(c)) * c) / math.pi


def k0(c: float) -> float:
    return 1 - math.acos(max(-1.0, min(1.0, c))) / math.pi


def mean(own: float, cross: float) -> float:
    """What uniform attention makes of two moments: those of the mean over tokens."""
    return (own + (TOKENS - 1) * cross) / TOKENS


def test_the_shortcut_of_b2t_by_hand() -> None:
    """s2 = E (x + a)^2, E h x = 1/sqrt(s2); four moments, of one token and of two."""
    units = (replace(UNIFORM, norm_out=LN), replace(RELU, norm_out=LN)) * DEPTH
    rho, tapes = 0.0, []
    for _ in range(DEPTH):
        a = mean(1.0, rho)
        s2 = 1 + a
        hh, hx = (rho + a) / s2, rho / math.sqrt(s2)
        total = 3 + 2 / math.sqrt(s2)
        tapes.append((s2, total, hh))
        rho = (rho + hh + 2 * hx + k1(hh)) / total
    g, cross = 1.0, 0.0
    rows = [g]
    for s2, total, cosine in reversed(tapes):
        x, x_cross = g / total, cross / total
        h, h_cross = 2 * x, x_cross * (1 + k0(cosine))
        rows.append(x + h)
        through = mean(h, h_cross) / s2
        g = x + h / s2 + 2 * x / math.sqrt(s2) + through
        cross = x_cross + h_cross / s2 + 2 * x_cross / math.sqrt(s2) + through
        rows.append(g)
    assert told(units, "b2t") == pytest.approx(np.array(rows[::-1]), rel=1e-3)


def test_values_of_the_first_layer_by_hand() -> None:
    """a = mean of (V_1 + V_l)/2 over tokens; V_1 gets a quarter of each later gradient."""
    units = (replace(UNIFORM, norm_in=LN),) * DEPTH
    q, p, tapes = 1.0, 0.0, []
    for layer in range(DEPTH):
        tapes.append(q)
        a = 1 / TOKENS if layer == 0 else (1 / TOKENS + mean(1.0, p / q)) / 4
        q, p = q + a, p + a
    g, cross, values = 1.0, 0.0, 0.0
    rows = [g]
    for layer, q in reversed(list(enumerate(tapes))):
        through = mean(g, cross)
        if layer == 0:
            g = g + (through + values) / q
        else:
            values += through / 4
            g, cross = g + through / 4 / q, cross + through / 4 / q
        rows.append(g + (values if layer else 0.0))
    assert told(units, "value-residual") == pytest.approx(np.array(rows[::-1]), rel=1e-4)


def test_the_norms_of_hybridnorm_by_hand() -> None:
    """y = x + mean of v / |v|, x' = N(y) + f(N(y)); queries and keys are 0."""
    units = (replace(UNIFORM, norm_value=LN), replace(RELU, norm_shared=LN)) * DEPTH
    q, p, tapes = 1.0, 0.0, []
    for _ in range(DEPTH):
        a = mean(1.0, p / q)
        y, cosine = q + a, (p + a) / (q + a)
        tapes.append((q, y, cosine))
        q, p = 2.0, cosine + k1(cosine)
    g, cross = 1.0, 0.0
    rows = [g]
    for q, y, cosine in reversed(tapes):
        g, cross = 2 * g / y, (1 + k0(cosine)) * cross / y
        rows.append(g)
        through = mean(g, cross) / q
        g, cross = g + through, cross + through
        rows.append(g)
    found = told(units, "template", head_size=ENDLESS)
    assert found == pytest.approx(np.array(rows[::-1]), rel=1e-4)
