"""sandwich-ln, admin and ngpt in the terms of the template, against their laws written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from problems import CPU

from gradflow.networks.stack import build_block
from gradflow.schemes import SCHEMES
from gradflow.schemes.deep import NGPT_ALPHA
from gradflow.specs.stack import StackSpec
from gradflow.theory import NoTheoryError, TemplateUnit, describe_stack, predict, total_decades
from gradflow.theory.predict import layout_of
from gradflow.theory.unit_theory import UNIT_THEORY, with_omegas

WIDE = 8192
DEPTH = 20


def ffns(scheme: str, **options: Any) -> StackSpec:
    sizes = {"block": "ffn", "depth": DEPTH, "width": WIDE, "activation": "relu", "init": "he"}
    return StackSpec(scheme=scheme, **{**sizes, **options})


def squared(spec: StackSpec) -> float:
    """|g_0|^2 / |g_D|^2."""
    return float(10 ** (2 * total_decades(spec)))


def test_pb_relax_is_peri_ln_whose_eps_never_counts() -> None:
    """q = 1 + l, and the branch passes g / q: 1 + L in all, at any scale of the weights."""
    for gain in (1.0, 1e-4):
        assert squared(ffns("sandwich-ln", gain=gain)) == pytest.approx(1 + DEPTH, rel=5e-3)
    assert predict(ffns("sandwich-ln", gain=1e-4)).act_rms[-1] == pytest.approx(21**0.5, rel=1e-3)
    # The same placement with an eps that counts.
    assert squared(ffns("peri-ln", gain=1e-4)) == pytest.approx(1.0, abs=0.01)


def test_the_omegas_of_admin_are_the_stream_of_pre_ln() -> None:
    """omega_i^2 = E x_(i-1)^2 of Pre-LN, for attention and ffn alike."""
    spec = StackSpec(scheme="admin", block="transformer", depth=DEPTH)
    stack = describe_stack(spec)
    told = [unit.a for unit in with_omegas(stack, layout_of(stack)).units]
    plain = predict(replace(spec, scheme="pre-ln"))
    assert told == pytest.approx(plain.act_rms[:-1], rel=1e-4)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_admin_multiplies_by_omega_and_the_branch(activation: str) -> None:
    """prod (omega^2 + kappa)/(omega^2 + v) with omega^2 = 1 + v l."""
    spec = ffns("admin", activation=activation, init="lecun")
    z = np.linspace(-12, 12, 20_001)
    weight = np.exp(-z * z / 2) / np.exp(-z * z / 2).sum()
    phi, slope = (np.tanh(z), 1 - np.tanh(z) ** 2) if activation == "tanh" else (z * (z > 0), z > 0)
    v, kappa = float((weight * phi**2).sum()), float((weight * slope**2).sum())
    omegas = 1 + v * np.arange(DEPTH)
    law = np.prod((omegas + kappa) / (omegas + v))
    assert squared(spec) == pytest.approx(law, rel=2e-3)


def test_ngpt_turns_by_a_twentieth() -> None:
    """(0.95^2 + 0.05^2 kappa/v)/(0.95^2 + 0.05^2), kappa/v = 2 of the gated relu."""
    spec = StackSpec(
        scheme="ngpt", block="ffn", depth=DEPTH, width=WIDE, activation="relu", ffn_mult=4
    )
    a, b = 0.95**2, 0.05**2
    assert squared(spec) == pytest.approx(((a + 2 * b) / (a + b)) ** DEPTH, rel=1e-3)
    assert predict(spec).act_rms == pytest.approx([WIDE**-0.5] * (DEPTH + 1), rel=1e-4)


def test_ngpt_turns_as_far_as_its_units_do() -> None:
    spec = StackSpec(scheme="ngpt", depth=1)
    for unit in build_block(spec, 0, 1, CPU).units:
        assert unit.alpha().tolist() == pytest.approx([NGPT_ALPHA] * spec.width)


def test_admin_beside_other_units_or_norms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    admin, post = SCHEMES["admin"], SCHEMES["post-ln"]
    first = replace(post, wire=lambda place: (admin if place.layer == 1 else post).wire(place))
    monkeypatch.setitem(SCHEMES, "post-ln", first)
    spec = StackSpec(scheme="post-ln")
    assert "units of admin and template" in str(predict(spec).reason)
    shared = replace(admin, wire=lambda place: replace(admin.wire(place), norms=("shared",)))
    monkeypatch.setitem(SCHEMES, "post-ln", shared)
    assert "a norm at shared of admin" in str(predict(replace(spec, depth=11)).reason)


def test_only_norms_of_rows_on_both_sides_restate_pb_relax() -> None:
    bare = TemplateUnit(kind="ffn", norm_in="layernorm")
    restate = UNIT_THEORY["pb-relax"].restate
    with pytest.raises(NoTheoryError, match="in and out"):
        restate(bare, None, None)
    unit = restate(replace(bare, norm_branch="rmsnorm"), None, None)
    assert math.isclose(unit.w_out.scale, unit.read**2)
