"""Predictions against closed forms and published recursions; nothing is measured here."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gradflow.networks.blocks import PHI
from gradflow.specs.stack import StackSpec
from gradflow.theory import (
    Head,
    Prediction,
    Stack,
    StreamShape,
    TemplateUnit,
    WeightMoments,
    predict,
    predict_stack,
    total_decades,
)
from gradflow.theory.mean_field.branches import BRANCH_MOMENTS
from gradflow.theory.mean_field.layouts import Exchangeable
from gradflow.theory.mean_field.norms import Stream

WIDE = 8192  # where nothing of finite width is left
LN = "layernorm"


def plain(**options: Any) -> StackSpec:
    return StackSpec(block="mlp", shortcut="plain", norm="none", width=WIDE, **options)


def ffn(**options: Any) -> StackSpec:
    return StackSpec(block="ffn", width=WIDE, **{"depth": 100, "activation": "relu", **options})


def squared(spec: StackSpec) -> float:
    """log10 of |g_0|^2 / |g_L|^2."""
    return 2 * total_decades(spec)


# Plain nets: ln chi per layer as fitted to measurements (Poole, Schoenholz), None: unknown.
SLOPES = [
    ("relu", 1.6, None, -0.2231),
    ("relu", 2.0, None, 0.0),
    ("relu", 2.4, None, 0.1823),
    ("tanh", 1.0, 0.05, -0.2798),
    ("tanh", 2.5, 0.05, 0.1255),
    ("erf", 1.5, 0.05, 0.0328),
    ("silu", 1.5, 0.05, None),
    ("gelu", 1.5, 0.05, None),
]


@pytest.mark.parametrize(("activation", "weight_var", "bias_var", "published"), SLOPES)
def test_a_plain_net_has_the_slope_of_its_fixed_point(
    activation: str, weight_var: float, bias_var: float | None, published: float | None
) -> None:
    options = {"activation": activation, "weight_var": weight_var, "bias_var": bias_var}
    deep, deeper = (total_decades(plain(depth=depth, **options)) for depth in (180, 200))
    slope = 2 * math.log(10) * (deeper - deep) / 20
    assert slope == pytest.approx(math.log(chi(activation, weight_var, bias_var or 0.0)), abs=1e-4)
    assert published is None or slope == pytest.approx(published, abs=0.005)


def chi(activation: str, weight_var: float, bias_var: float) -> float:
    """weight_var E phi'^2 at q = weight_var E phi^2 + bias_var, by torch and a plain sum."""
    z = torch.linspace(-12, 12, 20_000, dtype=torch.float64)
    weight = torch.exp(-0.5 * z * z) / torch.exp(-0.5 * z * z).sum()
    q = 1.0
    for _ in range(200):
        q = weight_var * float((weight * PHI[activation](math.sqrt(q) * z) ** 2).sum()) + bias_var
    x = (math.sqrt(q) * z).requires_grad_()
    (slope,) = torch.autograd.grad(PHI[activation](x).sum(), x)
    return weight_var * float((weight * slope**2).sum())


def test_the_profile_of_a_plain_relu_net_is_a_straight_line() -> None:
    found = predict(plain(depth=50, activation="relu", weight_var=1.6))
    want = 0.5 * math.log10(0.8) * np.arange(50, -1, -1)
    assert np.asarray(found.log10_grad_norm) == pytest.approx(want, abs=0.01)  # 5 L/n of bias
    rms = math.sqrt(0.8) ** np.arange(51)
    assert found.act_rms == pytest.approx(rms, rel=1e-9)


def test_hundreds_of_decades_are_carried() -> None:
    """0.5^L, beyond float64, while biases keep the stream at 1."""
    spec = plain(depth=3000, activation="linear", weight_var=0.5, bias_var=0.5)
    assert squared(spec) == pytest.approx(-3000 * math.log10(2), rel=1e-9)


@pytest.mark.parametrize("v", [0.1, 0.01])
def test_a_residual_net_without_norm_multiplies_by_1_plus_v(v: float) -> None:
    """(1 + v)^100 = 13,780 and 2.705."""
    spec = ffn(norm="none", weight_var=math.sqrt(2 * v))
    assert 10 ** squared(spec) == pytest.approx((1 + v) ** 100, rel=1e-9)


PRENORM = [("relu", None, 101.0, 101.0), ("gelu", 1.0, 56.28, 43.5), ("tanh", 1.0, 75.23, 40.4)]


@pytest.mark.parametrize(("activation", "weight_var", "gradient", "stream"), PRENORM)
def test_a_prenorm_net_is_a_power_law(
    activation: str, weight_var: float | None, gradient: float, stream: float
) -> None:
    """|g_0|^2 / |g_L|^2 and q_L of 100 layers, q_0 = 1."""
    spec = ffn(norm="pre", activation=activation, weight_var=weight_var)
    assert 10 ** squared(spec) == pytest.approx(gradient, rel=2e-3)
    assert predict(spec).act_rms[-1] ** 2 == pytest.approx(stream, rel=2e-3)


def test_a_gated_prenorm_net_is_a_steeper_power_law() -> None:
    """SwiGLU: exponent kappa/v = 1 + E (z phi')^2 / E phi^2 = 2.067; 10^3.09 and 36.58."""
    spec = ffn(norm="pre", activation="silu", weight_var=1.0, gated=True)
    assert squared(spec) == pytest.approx(3.090, abs=5e-3)
    assert predict(spec).act_rms[-1] ** 2 == pytest.approx(36.58, rel=2e-3)
    ungated = replace(spec, gated=False)
    assert squared(ungated) < 2.5


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "tanh"])
@pytest.mark.parametrize("cosine", [0.0, 0.6])
def test_the_moments_of_a_gated_ffn_are_those_of_a_sample(activation: str, cosine: float) -> None:
    """x' = x + W_out (phi(W_gate x) * W_in x) of two rows, both passes, by 10^6 neurons."""
    shape = StreamShape(domain="tokens", width=WIDE, batch=1, tokens=2, hidden=WIDE)
    gate, up = WeightMoments(1.3, 0.1), WeightMoments(0.7, 0.2)
    unit = TemplateUnit(
        kind="ffn", activation=activation, w_in=up, w_gate=gate, w_out=WeightMoments(0.5)
    )
    layout = Exchangeable(shape)
    f, tape = BRANCH_MOMENTS["ffn"](unit, Stream((1.0, cosine)), layout)
    source = np.random.default_rng(0)

    def rows(weights: WeightMoments) -> np.ndarray:
        q, p = (weights.scale * x + weights.bias for x in (1.0, cosine))
        return np.linalg.cholesky([[q, p], [p, q]]) @ source.standard_normal((2, 1_000_000))

    z, h = rows(gate), rows(up)
    phi = torch.tensor(z, requires_grad=True)
    value = PHI[activation](phi)
    slope = torch.autograd.grad(value.sum(), phi)[0].numpy()
    out = value.detach().numpy() * h
    for row, (forward, back) in enumerate(zip(f.s, tape.back, strict=True)):
        pair = lambda x, row=row: float((x[0] * x[row]).mean())  # noqa: E731
        assert forward == pytest.approx(0.5 * pair(out), rel=0.02, abs=2e-3)
        true = up.scale * pair(value.detach().numpy()) + gate.scale * pair(slope * h)
        assert back == pytest.approx(true, rel=0.02, abs=2e-3)


@pytest.mark.parametrize(("alpha", "depth", "decades"), [(0.5, 50, 1.851), (1.0, 200, 6.588)])
def test_dyt_is_a_stretched_exponential(alpha: float, depth: int, decades: float) -> None:
    """the exact recursion of x' = x + W2 W1 tanh(alpha x)."""
    unit = TemplateUnit(kind="ffn", activation="linear", norm_in="dyt", alpha=alpha)
    found = vectors((unit,) * depth)
    assert total_squared(found) == pytest.approx(decades, abs=2e-3)


def test_dyt_with_narrow_slopes() -> None:
    """11.85 at alpha = 2; Gauss-Hermite predicted 27 decades."""
    unit = TemplateUnit(kind="ffn", activation="linear", norm_in="dyt", alpha=2.0)
    assert total_squared(vectors((unit,) * 200)) == pytest.approx(11.85, abs=5e-3)


@pytest.mark.parametrize(
    ("activation", "weight_var", "decades"),
    [("relu", None, 0.0), ("gelu", 1.0, 0.923), ("tanh", 1.0, 2.131)],
)
def test_a_postnorm_ffn_net(activation: str, weight_var: float | None, decades: float) -> None:
    """((1 + kappa)/(1 + v))^100."""
    spec = ffn(norm="post", activation=activation, weight_var=weight_var)
    assert squared(spec) == pytest.approx(decades, abs=5e-3)


def test_batchnorm_has_its_law() -> None:
    """|g|^2 grows by pi/(pi - 1) a layer, Yang et al. 2019."""
    spec = replace(plain(depth=20, activation="relu"), norm="post", norm_kind="batchnorm")
    growth = total_decades(replace(spec, batch_size=WIDE, depth=20)) - total_decades(
        replace(spec, batch_size=WIDE, depth=10)
    )
    assert 10 ** (2 * growth / 10) == pytest.approx(math.pi / (math.pi - 1), rel=1e-4)


@pytest.mark.parametrize("batch", [16, 32, 64])
def test_a_linear_batchnorm_net_has_its_law(batch: int) -> None:
    """(B - 2)/(B - 3) a layer."""
    unit = TemplateUnit(kind="mlp", activation="linear", norm_out="batchnorm", a=0.0)
    found = predict_stack(
        Stack(StreamShape(domain="vectors", width=100_000, batch=batch), (unit,) * 6)
    )
    assert found.log10_grad_norm is not None
    growth = 10 ** (2 * (found.log10_grad_norm[1] - found.log10_grad_norm[5]) / 4)
    assert growth == pytest.approx((batch - 2) / (batch - 3), rel=2e-3)


# The full-block predictor: 24 blocks, 64 tokens, relu ffn.

BLOCKS = 24
SHAPE = StreamShape(domain="tokens", width=WIDE, batch=8, tokens=64, hidden=4 * WIDE, heads=4)
ATTENTION = TemplateUnit(kind="attention", w_query=WeightMoments(1.0), w_key=WeightMoments(1.0))
FFN = TemplateUnit(kind="ffn", activation="relu", w_in=WeightMoments(2.0))
Change = Callable[[TemplateUnit, int], TemplateUnit]


def scaled(unit: TemplateUnit, factor: float, *, values: bool = True) -> TemplateUnit:
    """With the output projection's variance times a factor, and the values' (first matrix's)."""
    w_in = WeightMoments(unit.w_in.scale * (factor if values else 1.0))
    return replace(unit, w_in=w_in, w_out=WeightMoments(unit.w_out.scale * factor))


def transformer(change: Change, **shape: Any) -> Prediction:
    units = [change(u, block) for block in range(1, BLOCKS + 1) for u in (ATTENTION, FFN)]
    return predict_stack(Stack(replace(SHAPE, **shape), tuple(units)))


def vectors(units: tuple[TemplateUnit, ...]) -> Prediction:
    return predict_stack(
        Stack(StreamShape(domain="vectors", width=WIDE, batch=64, hidden=WIDE), units)
    )


def total_squared(found: Prediction) -> float:
    assert found.log10_grad_norm is not None, found.reason
    return 2 * found.log10_grad_norm[0]


def pre(unit: TemplateUnit, _: int = 0) -> TemplateUnit:
    return replace(unit, norm_in=LN)


def post(unit: TemplateUnit, _: int = 0) -> TemplateUnit:
    return replace(unit, norm_out=LN)


def peri(unit: TemplateUnit, _: int = 0) -> TemplateUnit:
    return replace(unit, norm_in=LN, norm_branch=LN)


def deepnorm(unit: TemplateUnit, _: int = 0) -> TemplateUnit:
    return scaled(replace(post(unit), a=(2 * BLOCKS) ** 0.25), (8 * BLOCKS) ** -0.5)


def sub_ln(unit: TemplateUnit, _: int = 0) -> TemplateUnit:
    return scaled(replace(pre(unit), norm_mid=LN), math.log(2 * BLOCKS))


def softer(unit: TemplateUnit, factor: float) -> TemplateUnit:
    """With the variance of the queries times a factor: the logits' is, too."""
    w = unit.w_query
    return replace(unit, w_query=WeightMoments(factor * w.scale, factor * w.bias))


def biased(unit: TemplateUnit, _: int = 0) -> TemplateUnit:
    query, key = WeightMoments(1.2, 0.3), WeightMoments(1.1, 0.2)
    return replace(pre(unit), w_query=query, w_key=key) if unit.kind == "attention" else pre(unit)


@pytest.mark.parametrize("causal", [False, True])
def test_logits_over_another_power_are_those_of_other_queries(causal: bool) -> None:
    """softmax(s q k) is softmax(q' k) with q' = s q, forward and to the input."""
    by_power = transformer(lambda u, _: replace(biased(u), logits=0.3), causal=causal)
    by_query = transformer(lambda u, _: softer(biased(u), 0.3), causal=causal)
    as_it_was = transformer(biased, causal=causal)
    assert by_power.log10_grad_norm == pytest.approx(by_query.log10_grad_norm, rel=1e-12)
    assert total_squared(by_power) != pytest.approx(total_squared(as_it_was), abs=0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_normalised_queries_may_have_other_logits(causal: bool) -> None:
    """Where queries and keys have mean square 1, so do the logits, times the factor."""

    def normed(unit: TemplateUnit, _: int = 0) -> TemplateUnit:
        return replace(biased(unit), qk_norm=True)

    half = transformer(lambda u, _: replace(normed(u), logits=0.5), causal=causal)
    none = transformer(lambda u, _: replace(normed(u), logits=1e-12), causal=causal)
    flat = transformer(lambda u, _: softer(biased(u), 1e-12), causal=causal)
    assert total_squared(none) == pytest.approx(total_squared(flat), abs=1e-6)
    assert (
        total_squared(none)
        < total_squared(half)
        < total_squared(transformer(normed, causal=causal))
    )


# Measured there: decades of |g_0|^2 / |g_L|^2, final mean square, final cosine; the tolerance.
SCHEMES: list[tuple[str, Change, float, float, float | None, float]] = [
    ("pre-ln", pre, 1.246, 41.2, 0.808, 0.05),
    ("gpt2", lambda u, _: scaled(pre(u), 1 / 48, values=False), 0.192, 1.562, None, 0.05),
    ("post-ln", post, -1.366, 1.0, 1.0, 0.3),
    ("deepnorm", deepnorm, 0.001, 1.0, 0.006, 0.05),
    ("keel", lambda u, _: replace(post(pre(u)), a=48.0), 0.001, 1.0, None, 0.05),
    ("peri-ln", peri, 1.617, 50.8, None, 0.05),
    ("peri-ln-x4", lambda u, _: scaled(peri(u), 16.0, values=False), 1.617, 50.8, None, 0.05),
    ("lns", lambda u, block: replace(pre(u), c=block**-0.5), 0.693, 5.737, 0.465, 0.05),
    ("mix-ln", lambda u, block: (post if block <= 6 else pre)(u), 0.345, 40.6, None, 0.25),
    ("completep", lambda u, _: replace(pre(u), b=1 / 48), 0.005, 1.013, None, 0.05),
    ("sub-ln", sub_ln, 2.688, 190.3, 0.807, 0.05),
]


@pytest.mark.parametrize(
    ("change", "decades", "square", "cosine", "within"),
    [pytest.param(*rest, id=name) for name, *rest in SCHEMES],
)
def test_published_schemes_have_their_profiles(
    change: Change, decades: float, square: float, cosine: float | None, within: float
) -> None:
    found = transformer(change)
    assert total_squared(found) == pytest.approx(decades, abs=within)
    assert found.act_rms[-1] ** 2 == pytest.approx(square, rel=0.1)
    if cosine is not None:
        assert found.act_cos[-1] == pytest.approx(cosine, abs=0.02)


# Negative controls: what public re-implementations get wrong.
WRONG: list[tuple[str, Change, Change, float]] = [
    (
        "deepnorm-with-beta-inverted",
        lambda u, _: scaled(replace(post(u), a=(2 * BLOCKS) ** 0.25), (8 * BLOCKS) ** 0.5),
        deepnorm,
        0.9,
    ),
    (
        "deepnorm-with-alpha-on-the-branch",
        lambda u, _: scaled(replace(post(u), b=(2 * BLOCKS) ** 0.25), (8 * BLOCKS) ** -0.5),
        deepnorm,
        0.3,
    ),
    ("lns-without-its-factor", pre, SCHEMES[7][1], 0.2),
]


@pytest.mark.parametrize(
    ("wrong", "right", "cosine"), [pytest.param(*rest, id=name) for name, *rest in WRONG]
)
def test_wrong_schemes_are_told_apart(wrong: Change, right: Change, cosine: float) -> None:
    found, true = transformer(wrong), transformer(right)
    assert found.act_cos[-1] - true.act_cos[-1] > cosine
    assert abs(total_squared(found) - total_squared(true)) > 0.02


@pytest.mark.parametrize(("depth", "rho"), [(4, 0.190), (8, 0.799), (16, 0.9990)])
def test_uniform_attention_collapses_the_rank(depth: int, rho: float) -> None:
    """q_L = q_0 + m_0 (2^L - 1), q - p conserved; Dong et al. 2021, Noci et al. 2022."""
    assert uniform(depth, 1.0).act_cos[-1] == pytest.approx(rho, abs=1e-3)
    assert uniform(depth, 1 / math.sqrt(depth)).act_cos[-1] < 0.0256


def uniform(depth: int, b: float) -> Prediction:
    unit = TemplateUnit(kind="attention", w_query=WeightMoments(0.0), b=b)
    return predict_stack(Stack(SHAPE, (unit,) * depth))


# Symmetries.


@pytest.mark.parametrize("change", [pre, post, peri])
def test_a_mask_over_one_token_is_no_mask(change: Change) -> None:
    masked = total_squared(transformer(change, tokens=1, causal=True))
    assert masked == pytest.approx(total_squared(transformer(change, tokens=1)), abs=1e-4)


def test_causal_kernels_of_ffns_are_those_of_exchangeable_tokens() -> None:
    """Nothing mixes tokens, so all stay alike; attention with b = 0 brings the T x T form in."""
    idle = replace(ATTENTION, b=0.0, norm_in=LN)
    units = (idle, pre(FFN)) * 6
    masked, free = (
        predict_stack(Stack(replace(SHAPE, tokens=16, causal=causal), units))
        for causal in (True, False)
    )
    assert masked.log10_grad_norm == pytest.approx(free.log10_grad_norm, abs=1e-6)
    assert masked.act_cos == pytest.approx(free.act_cos, abs=1e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_norm_forgets_the_scale(kind: str) -> None:
    """Inputs ten times as large shift the profile of a plain net by 1 decade, at y_0 only."""
    unit = TemplateUnit(kind="mlp", activation="tanh", norm_in=kind, a=0.0)
    shape = StreamShape(domain="vectors", width=WIDE, batch=64)
    one, ten = (predict_stack(Stack(shape, (unit,) * 5, square)) for square in (1.0, 100.0))
    assert one.log10_grad_norm is not None
    assert ten.log10_grad_norm is not None
    shift = np.subtract(one.log10_grad_norm, ten.log10_grad_norm)
    assert shift == pytest.approx([1.0, 0, 0, 0, 0, 0], abs=1e-4)


def test_the_band_holds_tolerance_and_scatter() -> None:
    found = Prediction((1.0, 0.0), (0.3, 0.0), (0.1, 0.0))
    assert found.band() == ((pytest.approx(0.3), pytest.approx(1.7)), (0.0, 0.0))
    assert found.band(9)[0] == (pytest.approx(0.7), pytest.approx(1.3))
    assert Prediction(None, reason="none").band() == ()


def test_wider_nets_scatter_less() -> None:
    """Var ln |g|^2 = 5 L/n for a plain relu net, less what 64 samples average out."""
    wide, narrow = (
        predict(replace(plain(depth=20, activation="relu"), width=width)).spread[0]
        for width in (2048, 512)
    )
    assert narrow / wide == pytest.approx(2.0, rel=0.05)
    one = replace(plain(depth=20, activation="relu"), width=2048, batch_size=1)
    nats = 2 * math.log(10) * predict(one).spread[0]
    assert nats**2 == pytest.approx(5 * 20 / 2048, rel=0.1)


def test_a_head_of_many_classes_is_a_cotangent() -> None:
    """With logits of variance 0 the softmax shares nothing between tokens."""
    units = tuple(pre(u) for u in (ATTENTION, FFN))
    plain_stack = predict_stack(Stack(SHAPE, units))
    headed = predict_stack(Stack(SHAPE, units, head=Head(1000, WeightMoments(1e-6))))
    assert headed.log10_grad_norm == pytest.approx(plain_stack.log10_grad_norm, abs=1e-3)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("width", [64, 8])  # with a prediction, and without one
def test_the_garbage_collector_is_left_as_it_was(width: int, enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        predict(StackSpec(depth=2, width=width, heads=1))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
