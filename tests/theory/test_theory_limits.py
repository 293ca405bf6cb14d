"""Each reason for which there is no prediction, and that the edges lie where they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gradflow.specs.stack import StackSpec
from gradflow.theory import (
    Head,
    NoTheoryError,
    Stack,
    StreamShape,
    TemplateUnit,
    WeightMoments,
    predict,
    predict_stack,
    total_decades,
)

VECTORS = StreamShape(domain="vectors", width=128, batch=64, hidden=128)
PLAIN_MLP = {"block": "mlp", "shortcut": "plain", "norm": "none"}

SPECS: list[tuple[dict[str, Any], str]] = [
    ({"block": "resnet", "norm": "post"}, "phi after the addition"),
    ({"block": "resnet", "shortcut": "plain"}, "batchnorm in a plain resnet"),
    ({"loss": "mse"}, "the gradient of mse contains the output"),
    ({"width": 16}, "width 16 is too small"),
    ({"shortcut": "plain"}, "attention without a shortcut"),
    ({"norm": "none", "depth": 24}, "attention logits of variance"),
    ({"gain": 2.0}, "attention logits of variance 16, above 2"),
    ({"norm_kind": "batchnorm"}, "batchnorm beside attention"),
    ({"block": "ffn", "shortcut": "plain", "norm_kind": "batchnorm"}, "batchnorm in a plain ffn"),
    ({"block": "mlp", "norm": "none", "activation": "relu"}, "its mean adds up"),
    ({"block": "mlp", "norm_kind": "dyt", "activation": "relu"}, "dyt and derf of a stream"),
    ({"block": "mlp", "norm_kind": "groupnorm", "width": 64}, "groupnorm over 8 independent"),
    ({"block": "mlp", "norm_kind": "layernorm", "width": 48}, "layernorm over 48 independent"),
    ({"block": "mlp", "norm_kind": "batchnorm", "batch_size": 8}, "batchnorm over 8 independent"),
    ({**PLAIN_MLP, "depth": 200}, "width 128 is too small for"),
    ({**PLAIN_MLP, "loss": "ce"}, "cross-entropy leans on the output"),
    ({**PLAIN_MLP, "activation": "silu", "depth": 30}, "a plain net of silu without norms"),
    ({"block": "conv", "loss": "ce"}, "batchnorm under cross-entropy"),
    ({"norm": "post", "depth": 300}, "seeds would differ by"),
    (
        {**PLAIN_MLP, "norm": "pre", "norm_kind": "batchnorm", "activation": "tanh", "depth": 50},
        "batchnorm: rows grow correlated",
    ),
    ({"block": "ffn", "norm": "none", "depth": 300}, "leaves the range of float32"),
    ({"causal": True, "seq_len": 512, "depth": 24}, "too many T x T kernels"),
    ({"scheme": "highway", "block": "mlp", "gain": 1.5, "depth": 24}, "a highway of relu"),
    ({"scheme": "highway", "block": "conv", "loss": "ce"}, "highway layers under cross-entropy"),
]


@pytest.mark.parametrize(("options", "reason"), SPECS)
def test_a_prediction_is_withheld_with_its_reason(options: dict[str, Any], reason: str) -> None:
    found = predict(StackSpec(**{"depth": 6, **options}))
    assert found.log10_grad_norm is None
    assert found.band() == ()
    assert reason in str(found.reason)


UNITS: list[tuple[TemplateUnit, str]] = [
    (
        TemplateUnit(kind="mlp", activation="mish", norm_in="layernorm"),
        "the activation mish has no moments",
    ),
    (
        TemplateUnit(kind="ffn", activation="relu", norm_in="weightnorm"),
        "the norm weightnorm has no",
    ),
    (TemplateUnit(kind="hyena"), "the branch hyena has no formula"),
    (TemplateUnit(kind="ffn", w_transform=WeightMoments()), "highway layers beside other units"),
]


@pytest.mark.parametrize(("unit", "reason"), UNITS)
def test_units_without_a_formula_are_refused(unit: TemplateUnit, reason: str) -> None:
    assert reason in str(predict_stack(Stack(VECTORS, (unit,))).reason)


def test_the_logit_variance_decides() -> None:
    """Queries of scale s on normalised tokens: logits of variance s; at 2 the theory ends."""
    shape = replace(VECTORS, domain="tokens", tokens=16, heads=4)

    def of(scale: float) -> str | None:
        unit = TemplateUnit(kind="attention", w_query=WeightMoments(scale), norm_in="layernorm")
        return predict_stack(Stack(shape, (unit,))).reason

    assert of(1.9) is None
    assert "attention logits of variance 2.1" in str(of(2.1))


def test_qk_norm_holds_the_logit_variance_at_1() -> None:
    """Whatever the weights; so theory goes on where it would end."""
    shape = replace(VECTORS, domain="tokens", tokens=16, heads=4)
    unit = TemplateUnit(kind="attention", norm_in="layernorm", qk_norm=True)
    strong = replace(unit, w_query=WeightMoments(16.0), w_key=WeightMoments(16.0))
    one, sixteen = (predict_stack(Stack(shape, (u,) * 4)) for u in (unit, strong))
    assert sixteen.log10_grad_norm == pytest.approx(one.log10_grad_norm)
    assert predict_stack(Stack(shape, (replace(strong, qk_norm=False),))).reason is not None


def test_groupnorm_under_cross_entropy_is_refused_on_images_only() -> None:
    unit = TemplateUnit(kind="conv", activation="relu", norm_in="groupnorm")
    images = StreamShape(domain="images", width=64, batch=8, side=8)
    headed = Stack(images, (unit,), head=Head(10, WeightMoments()))
    assert "groupnorm under cross-entropy" in str(predict_stack(headed).reason)
    assert predict_stack(replace(headed, head=None)).reason is None


def test_width_is_no_obstacle_to_the_total_of_an_infinite_net() -> None:
    spec = StackSpec(**PLAIN_MLP, activation="relu", depth=500)
    assert predict(spec).reason is not None
    assert total_decades(spec) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(NoTheoryError, match="mse"):
        total_decades(replace(spec, loss="mse"))
