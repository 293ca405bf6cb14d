"""The published claims of results/theory: their table, and that wrong values do not pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from claims import CLAIMS
from claims.claim import Claim, Expected, Finding, Quantity, about, at_least, at_most, hold
from claims.direct import frozen_batch_norm, gradient_cosine, logit_variance
from claims.page import page, verdict
from claims.picture import picture
from claims.plain_nets import PHASES
from claims.predicted import SIZES, Held
from claims.predicted import page as predicted_page
from claims.readings import branch_share, collapse_order, records
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from gradflow.runs.records import LayerRecord
from gradflow.specs.stack import StackSpec
from gradflow.text import escape_markdown
from gradflow.theory import predict

RESULTS = Path(__file__).parent.parent.parent / "results" / "theory"
QUANTITIES = [
    pytest.param(quantity, id=f"{claim.title[:24]}-{place}")
    for claim in CLAIMS
    for place, quantity in enumerate(claim.quantities)
]
# Those that take a moment: the others are in the slow suite.
SIMPLE = ("nats_per_layer", "factor_per_layer", "cosine_factor", "logit_variance", "branch_share")
QUICK = [param for param in QUANTITIES if param.values[0].read.__name__ in SIMPLE]


def test_the_table_is_well_formed() -> None:
    titles = [claim.title for claim in CLAIMS]
    assert len(set(titles)) == len(titles) >= 17
    for claim in CLAIMS:
        assert claim.seeds >= 3
        assert claim.quantities
        assert all(map(str.strip, (claim.source, claim.setting, claim.says)))
        names = [quantity.name for quantity in claim.quantities]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_control_is_another_network(quantity: Quantity) -> None:
    if quantity.is_there:
        assert quantity.wrong_spec != quantity.spec
    else:
        assert "scheme" in quantity.options


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_planted_value_does_not_pass(quantity: Quantity) -> None:
    """Just beyond either end, in one of three seeds by far, or not a number."""
    low, high = quantity.expected.low, quantity.expected.high
    inside = [end for end in (low, high) if math.isfinite(end)]
    assert inside
    for value in inside:
        assert Finding(quantity, [value] * 3, 0.0).agrees
        assert not Finding(quantity, [value, value, math.nan], 0.0).agrees
    for wrong in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf)):
        if math.isfinite(wrong):
            assert not quantity.expected.holds(wrong)


def test_bounds_hold_what_they_say() -> None:
    assert about(2, 0.5).holds(1.5)
    assert not about(2, 0.5).holds(1.4)
    assert at_most(1).holds(-9)
    assert not at_most(1).holds(1.1)
    assert at_least(1).holds(9)
    assert not at_least(1).holds(0.9)
    assert not at_least(1).holds(math.nan)


@pytest.mark.parametrize("quantity", QUICK)
def test_a_quick_claim_tells_its_control_apart(quantity: Quantity) -> None:
    assert not quantity.expected.holds(quantity.read(quantity.wrong_spec, 0))


@pytest.mark.slow
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_claim_tells_its_control_apart(quantity: Quantity) -> None:
    """And reads a number off the right network."""
    if not quantity.is_there:
        pytest.skip(f"no scheme {quantity.options['scheme']}")
    assert math.isfinite(quantity.read(quantity.spec, 0))
    assert not quantity.expected.holds(quantity.read(quantity.wrong_spec, 0))


def normal_mean(function: Callable[[np.ndarray], np.ndarray], square: float) -> float:
    """E f(z), z ~ N(0, square): a sum over a fine grid."""
    z = np.linspace(-10, 10, 2001)
    density = np.exp(-(z**2) / 2)
    return float((function(math.sqrt(square) * z) * density).sum() / density.sum())


@pytest.mark.parametrize("quantity", PHASES.quantities, ids=lambda q: q.name)
def test_the_rates_of_order_and_chaos_are_those_of_the_fixed_point(quantity: Quantity) -> None:
    """q = s E tanh(z)^2 + b; chi = s E (1 - tanh(z)^2)^2."""
    s, b, q = quantity.options["weight_var"], quantity.options["bias_var"], 1.0
    for _ in range(500):
        q = s * normal_mean(lambda z: np.tanh(z) ** 2, q) + b
    chi = s * normal_mean(lambda z: (1 - np.tanh(z) ** 2) ** 2, q)
    middle = (quantity.expected.low + quantity.expected.high) / 2
    assert middle == pytest.approx(math.log(chi), abs=1e-3)


# Readings against other computations, small.


def test_frozen_batch_norm_is_batch_norm_without_the_gradient_of_its_statistics() -> None:
    x = torch.randn(32, 5, dtype=torch.float64).mul_(3).add_(1).requires_grad_()
    weight, bias = torch.rand(2, 5, dtype=torch.float64)
    y = frozen_batch_norm(x, weight, bias, 1e-5)
    want = F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    (g,) = torch.autograd.grad(y[3].sum(), x)
    scale = weight / (x.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(g[3], scale.detach(), rtol=1e-12, atol=1e-12)
    assert not g[:3].any()


def test_gradients_of_a_linear_net_do_not_shatter() -> None:
    """One cotangent for all samples, and a Jacobian that does not depend on them."""
    sizes = {"block": "mlp", "shortcut": "plain", "norm": "none", "depth": 3, "width": 16}
    linear = StackSpec(**sizes, batch_size=6, activation="linear", dtype="float64")
    assert gradient_cosine(linear, 0) == pytest.approx(1, abs=1e-5)
    assert gradient_cosine(replace(linear, activation="relu"), 0) < 0.9


def test_logits_have_the_variance_of_their_weights() -> None:
    """W_q and W_k of variance 1/d times gain^2, a normalised input: gain^4."""
    spec = StackSpec(block="attention", depth=1, width=64, seq_len=32, gain=1.5)
    assert logit_variance(spec, 0) == pytest.approx(1.5**4, rel=0.15)


def planted(monkeypatch: pytest.MonkeyPatch, **columns: list[float]) -> StackSpec:
    """Rows with these values in place of a measurement."""
    spec = StackSpec(block="mlp", depth=len(next(iter(columns.values()))) - 1)
    found, params = records(spec, 0)
    rows = [
        replace(row, **dict(zip(columns, values, strict=True)))
        for row, *values in zip(found, *columns.values(), strict=True)
    ]
    made: tuple[list[LayerRecord], list[object]] = (rows, list(params))
    monkeypatch.setattr("claims.readings.records", lambda *_: made)
    return spec


def test_shares_are_those_of_a_stream_that_grows_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = planted(monkeypatch, act_rms=[math.sqrt(1 + layer) for layer in range(9)])
    assert branch_share(spec, 0) == pytest.approx(1)
    spec = planted(monkeypatch, act_rms=[2 ** (layer / 2) for layer in range(9)])
    assert branch_share(spec, 0) > 2


def test_the_order_of_collapse_is_the_power_of_the_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """e' = e^3 / 2, then e^2 / 2: the constant does not count."""
    spec = planted(monkeypatch, act_cos=[0.0, *(1 - e for e in (0.1, 0.1**3 / 2, 0.1**9 / 16))])
    assert collapse_order(spec, 0) == pytest.approx(3)
    spec = planted(monkeypatch, act_cos=[0.0, *(1 - e for e in (0.1, 0.1**2 / 2, 0.1**4 / 8))])
    assert collapse_order(spec, 0) == pytest.approx(2)


# The pages.

LINES = Quantity(
    name="slope | rise",
    options={"block": "mlp", "depth": 2, "width": 8},
    read=lambda spec, seed: float(spec.width + seed),
    expected=about(9, 1),
    wrong={"width": 16},
)
MADE = Claim(title="Made up", source="nobody", setting="none", says="9", quantities=(LINES,))


def test_the_page_says_what_agrees_and_what_does_not() -> None:
    found = hold(LINES, 3)
    assert (found.mean, found.control) == (9, 16)
    assert found.agrees
    assert found.tells_apart
    text = page([MADE], {"Made up": [found]}, ["foot"])
    assert "| slope \\| rise | 9 ± 1 | 9 ± 1 | yes | 16 |" in text
    off = Finding(replace(LINES, expected=Expected(0, 1, "0 to 1")), found.values, 0.5)
    text = page([MADE], {"Made up": [off]}, [])
    assert "| 0 to 1 | 9 ± 1 | no | 0.5 ! |" in text
    assert verdict([found, off]) == "1 of 2"
    assert verdict([]) == "not in this version"


def test_the_table_of_predictions_tells_a_wrong_one() -> None:
    spec = StackSpec(scheme="pre-ln", **{**SIZES, "depth": 4})
    told = predict(spec)
    right = Held("pre-ln", "own", spec, told, np.array([told.log10_grad_norm] * 3))
    assert right.is_within
    assert right.is_in_band
    wrong = replace(right, profiles=1.2 * right.profiles)
    assert not wrong.is_within
    assert not wrong.is_in_band
    text = predicted_page([right, wrong], [right], [])
    assert "1 of 2 within the stated tolerance, 1 in their band." in text
    assert "1 of 1 within the stated tolerance, 1 in their band." in text
    assert "| stochastic-depth |" in text
    assert '"pre-ln"' in picture([replace(right, init="he, relu")]).to_json()


def test_the_stored_pages_hold_every_claim() -> None:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert [
        claim.title for claim in CLAIMS if f"## {escape_markdown(claim.title)}\n" not in text
    ] == []
    assert " ! |" not in text  # every control is told apart
    assert (RESULTS / "predicted.svg").exists()
