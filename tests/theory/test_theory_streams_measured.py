"""Theory of several streams, and of norms beyond the template, beside measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from problems import measure, network
from theory_profiles import profiles, worst

import gradflow
from gradflow.schemes import SCHEMES, UNIT_KINDS, Place, Scheme, Wiring
from gradflow.specs.stack import StackSpec
from gradflow.theory import describe_stack, predict
from gradflow.theory.predict import layout_of
from gradflow.theory.unit_theory import UNIT_THEORY, with_omegas

NAMES = ("b2t", "residual-dual", "siamesenorm", "value-residual", "hybridnorm")
RESTATED = ("sandwich-ln", "admin", "ngpt")
PRE_LN = ("hyper-connections", "mhc", "mhc-uniform", "attnres", "denseformer")


def spec_of(scheme: str, **options: Any) -> StackSpec:
    sizes = {"depth": 6, "width": 64, "batch_size": 4, "seq_len": 16}
    return StackSpec(**{"scheme": scheme, **sizes, **options})


MEASURED: list[tuple[str, dict[str, Any]]] = [
    ("hyper-connections", {}),
    ("hyper-connections", {"causal": True, "loss": "ce", "depth": 3}),
    ("mhc", {"block": "ffn"}),
    ("mhc-uniform", {"gated": True, "activation": "silu", "depth": 3}),
    ("attnres", {"depth": 3}),
    ("attnres", {"norm_kind": "dyt", "block": "ffn"}),
    ("denseformer", {"causal": True}),
    ("b2t", {"depth": 3}),
    ("b2t", {"causal": True, "activation": "relu", "init": "he"}),
    ("residual-dual", {"depth": 3, "causal": True}),
    ("residual-dual", {"block": "ffn", "norm_kind": "rmsnorm"}),
    ("siamesenorm", {"init": "he", "activation": "relu"}),
    ("siamesenorm", {"causal": True, "loss": "ce", "depth": 3}),
    ("value-residual", {}),
    ("value-residual", {"block": "attention", "causal": True, "depth": 12}),
    ("hybridnorm", {"init": "he", "causal": True}),
    ("hybridnorm", {"depth": 3, "gated": True}),
    ("sandwich-ln", {}),
    ("sandwich-ln", {"causal": True, "init": "he", "norm_kind": "rmsnorm"}),
    ("admin", {"activation": "relu"}),
    ("admin", {"block": "ffn", "depth": 12}),
    ("ngpt", {}),
    ("ngpt", {"causal": True, "loss": "ce", "block": "attention"}),
]


def name_of(value: Any) -> str | None:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


@pytest.mark.parametrize(("scheme", "options"), MEASURED, ids=name_of)
def test_measured_states_lie_in_the_band(scheme: str, options: dict[str, Any]) -> None:
    spec = spec_of(scheme, **options)
    told = predict(spec)
    assert worst(profiles(spec, range(100, 103)), told) < 1
    rows = measure(spec)[0]
    assert told.act_rms == pytest.approx([row.act_rms for row in rows], rel=0.15)
    assert told.act_cos == pytest.approx([row.act_cos for row in rows], abs=0.15)


POST = ("b2t", "residual-dual", "admin")
STATED = [
    (name, causal) for name in (*NAMES, *RESTATED, "hyper-connections") for causal in (None, True)
]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [4, 12, 24])
@pytest.mark.parametrize(("scheme", "causal"), STATED)
def test_transformers_keep_the_stated_tolerance(
    scheme: str, causal: bool | None, depth: int
) -> None:
    """0.05 decades of |g|^2, 0.2 for post-norm and masks; the mean's own error is allowed for."""
    sizes = {"depth": depth, "width": 128, "seq_len": 32, "batch_size": 2}
    spec = spec_of(scheme, init="he", activation="relu", causal=causal, **sizes)
    measured = 2 * profiles(spec, range(4))
    error = measured.std(axis=0, ddof=1).max() / math.sqrt(len(measured))
    decades = 0.2 if causal or scheme in POST else 0.05
    apart = measured.mean(axis=0) - 2 * np.array(predict(spec).log10_grad_norm)
    assert np.abs(apart).max() < decades + 2 * error


# Negative controls: what is easily taken for it is told apart.

WRONG: list[tuple[str, str, dict[str, Any]]] = [
    ("hyper-connections", "mhc", {}),
    ("hyper-connections", "pre-ln", {}),
    ("attnres", "denseformer", {}),
    ("b2t", "post-ln", {"depth": 12}),
    ("residual-dual", "pre-ln", {}),
    ("residual-dual", "post-ln", {}),
    ("siamesenorm", "pre-ln", {}),
    ("value-residual", "pre-ln", {"block": "attention"}),
    ("hybridnorm", "pre-ln", {}),
    ("sandwich-ln", "pre-ln", {}),
    ("admin", "post-ln", {"depth": 12}),
    ("ngpt", "peri-ln", {}),
]


@pytest.mark.parametrize(("scheme", "other", "options"), WRONG)
def test_the_theory_of_another_scheme_is_told_apart(
    scheme: str, other: str, options: dict[str, Any]
) -> None:
    phi = {} if options.get("block") == "attention" else {"activation": "relu"}
    options = options | ({} if scheme == "ngpt" else {"init": "he"})
    spec = spec_of(scheme, **phi, **options)
    measured = profiles(spec, range(2))
    assert worst(measured, predict(spec)) < 1
    assert worst(measured, predict(replace(spec, scheme=other))) > 1.2


@pytest.mark.parametrize("scheme", [*NAMES, *PRE_LN, *RESTATED])
def test_theory_answers_wherever_such_a_scheme_is_defined(scheme: str) -> None:
    for block in SCHEMES[scheme].blocks:
        for causal in (None, True) if block != "ffn" else (None,):
            found = predict(spec_of(scheme, block=block, causal=causal))
            assert found.reason is None
            assert len(found.act_rms) == len(found.log10_grad_norm or ())


def test_a_run_is_held_against_theory_at_its_own_output() -> None:
    """The gradient of the last state has norm 2 where four streams are summed."""
    run = gradflow.measure(spec_of("hyper-connections"))
    last = run.layer_records[-1]
    assert last.grad_norm == pytest.approx(2.0, rel=1e-5)
    assert last.theory_log10_grad_norm == last.log10_grad_norm
    assert abs(run.summary.theory_deviation) < run.summary.theory_band


# Where the formulas end.


def changed(scheme: str, **changes: Any) -> Scheme:
    """A scheme with other fields, or with other wirings in `wiring`."""
    base, wiring = SCHEMES[scheme], changes.pop("wiring", {})

    def wire(place: Place) -> Wiring:
        return replace(base.wire(place), **wiring)

    return replace(base, wire=wire, **changes)


def other_weight(weight: float) -> Mapping[str, Any]:
    return {"settings": {"first": False, "weight": weight}}


ENDS = [
    (changed("hyper-connections", readout="mean"), "with the readout mean"),
    (changed("b2t", wiring={"norms": ()}), "without the norm of their output"),
    (changed("siamesenorm", wiring={"norms": ("in", "branch")}), "a norm at branch of siamesenorm"),
    (changed("residual-dual", wiring={"b": 0.5}), "scaled branches of residual-dual"),
    (changed("value-residual", wiring=other_weight(0.3)), "not averaged evenly"),
    (changed("hybridnorm", wiring={"norms": ("value", "mid")}), "beside one of the branch"),
]


@pytest.mark.parametrize(("scheme", "reason"), ENDS)
def test_what_no_formula_covers_is_refused(
    scheme: Scheme, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEMES, "pre-ln", scheme)
    assert reason in str(predict(spec_of("pre-ln")).reason)


@pytest.mark.parametrize("kind", ["dyt", "derf"])
def test_pb_relax_of_pointwise_norms_is_refused(kind: str) -> None:
    assert "under norms of rows" in str(predict(spec_of("sandwich-ln", norm_kind=kind)).reason)


def test_omegas_are_those_that_the_profile_measures() -> None:
    spec = spec_of("admin", width=256)
    stack = describe_stack(spec)
    told = [unit.a for unit in with_omegas(stack, layout_of(stack)).units]
    measured = [
        float(u.omega.weight.detach()[0]) for block in network(spec).blocks for u in block.units
    ]
    assert told == pytest.approx(measured, rel=0.03)
    assert told[-1] > 1.4 * told[1]


def test_units_of_two_kinds_in_one_stack_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two = SCHEMES["mhc"], SCHEMES["hyper-connections"]
    mixed = replace(two[0], wire=lambda place: two[place.unit].wire(place))
    monkeypatch.setitem(SCHEMES, "mhc", mixed)
    assert "units of hyper-connections and mhc" in str(predict(spec_of("mhc")).reason)


@pytest.mark.parametrize("kind", ["dyt", "derf", "batchnorm"])
def test_other_norms_of_a_shortcut_are_refused(kind: str) -> None:
    spec = spec_of("residual-dual", block="ffn", norm_kind=kind)
    assert f"no formula for {kind}" in str(predict(spec).reason)


def test_cross_entropy_ends_where_two_streams_make_large_logits() -> None:
    """Xavier's 2d/(d + classes) times a mean square of up to 4."""
    few, many = (spec_of("residual-dual", loss="ce", classes=n) for n in (10, 1000))
    assert "logits of variance" in str(predict(few).reason)
    assert predict(many).reason is None


def test_every_kind_has_the_readout_of_its_scheme() -> None:
    known = {scheme.wire(Place(3, 2, 1, 2, "ffn")).unit: scheme for scheme in SCHEMES.values()}
    assert set(UNIT_THEORY) <= set(UNIT_KINDS)
    for kind, scheme in known.items():
        assert UNIT_KINDS[kind].readout == scheme.readout
