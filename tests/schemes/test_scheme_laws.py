"""What schemes promise at initialisation, measured; mostly width 128, 64 tokens, He, ReLU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from problems import network

from gradflow.engine.walk import walk
from gradflow.runs.records import LayerRecord
from gradflow.schemes import SCHEMES, Place, Wiring
from gradflow.specs.stack import StackSpec
from gradflow.theory.predict import predict

SEEDS = range(3)


def stack(scheme: str, **options: Any) -> StackSpec:
    common = {"width": 128, "seq_len": 64, "init": "he", "activation": "relu"}
    return StackSpec(scheme=scheme, **(common | options))


def profiles(spec: StackSpec) -> list[list[LayerRecord]]:
    return [walk(spec, seed, network(spec, seed)).records()[0] for seed in SEEDS]


def squared_ratio(spec: StackSpec) -> float:
    """|g_input|^2 / |g_output|^2, the mean over the seeds of its logarithm."""
    decades = [rows[0].log10_grad_norm - rows[-1].log10_grad_norm for rows in profiles(spec)]
    return 10 ** (2 * sum(decades) / len(decades))


def final_square(spec: StackSpec) -> float:
    """Mean square of the stream after the last unit."""
    return sum(rows[-1].act_rms ** 2 for rows in profiles(spec)) / len(SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [12, 24])
def test_gpt2_keeps_the_squared_gradient_at_1_56_whatever_the_depth(depth: int) -> None:
    assert squared_ratio(stack("gpt2", depth=depth)) == pytest.approx(1.56, abs=0.08)
    assert squared_ratio(stack("pre-ln", depth=depth)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["deepnorm", "keel"])
def test_deepnorm_and_keel_keep_the_gradient(scheme: str) -> None:
    assert math.log10(squared_ratio(stack(scheme, depth=24))) == pytest.approx(0, abs=0.02)


@pytest.mark.slow
def test_lns_grows_like_the_logarithm_of_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.76 at 24 blocks; Pre-LN, which is LNS without its factor, 39.9."""
    assert final_square(stack("lns", depth=24)) == pytest.approx(5.76, abs=0.5)
    monkeypatch.setitem(SCHEMES, "lns", replace(SCHEMES["lns"], wire=SCHEMES["pre-ln"].wire))
    assert final_square(stack("lns", depth=24)) == pytest.approx(39.9, rel=0.15)


@pytest.mark.slow
def test_deepscalelm_keeps_the_gradient_and_the_stream_over_192_layers() -> None:
    spec = stack("deepscalelm", block="ffn", depth=192, width=128)
    assert squared_ratio(spec) == pytest.approx(1, abs=0.1)
    assert final_square(spec) == pytest.approx(1, abs=0.1)


def test_norms_on_both_sides_of_the_branch_make_the_weights_scale_void() -> None:
    """Peri-LN and CogView's Sandwich-LN; Pre-LN's profile moves. Decades, all rows."""
    for scheme in ("peri-ln", "sandwich-ln"):
        assert moved_by_gain(stack(scheme, depth=6, width=64, block="ffn")) < 1e-3
    assert moved_by_gain(stack("pre-ln", depth=6, width=64, block="ffn")) > 0.1


def test_pb_relax_takes_the_norm_s_eps_out_of_small_branches() -> None:
    """Under N(0, 0.02) branches are so small that eps shrinks what LN(f) should make 1."""
    sizes: dict[str, Any] = {"depth": 6, "width": 64, "block": "attention", "init": "normal"}
    assert moved_by_gain(stack("sandwich-ln", **sizes), 0.25) < 0.01
    assert moved_by_gain(stack("peri-ln", **sizes), 0.25) > 0.02


def moved_by_gain(spec: StackSpec, gain: float = 4.0) -> float:
    """Largest change of log10|g| when all weights change their scale."""
    small = profile(spec)
    return float(np.abs(profile(replace(spec, gain=gain)) - small).max())


def profile(spec: StackSpec) -> np.ndarray:
    rows, _ = walk(spec, 0, network(spec)).records()
    return np.array([row.log10_grad_norm for row in rows])


def test_stochastic_depth_keeps_three_quarters_of_the_layers() -> None:
    """E = (3L - 1)/4: 40.25 of 54 (Huang et al. 2016)."""
    keep = SCHEMES["stochastic-depth"].constants
    total = sum(keep(Place(54, layer, 0, 1, "resnet"))["p"] for layer in range(1, 55))
    assert total == pytest.approx(40.25, rel=1e-12)


def test_layerscale_s_variance_grows_by_lambda_squared() -> None:
    """q_L = q_0 + lambda^2 v L, v = 1 for a He ReLU ffn of a normed input."""
    rows, _ = walk(spec := stack("layerscale", block="ffn", depth=18), 0, network(spec)).records()
    growth = rows[-1].act_rms ** 2 - rows[0].act_rms ** 2
    assert growth == pytest.approx(0.1**2 * 18, rel=0.2)


def test_he_v2_s_variance_grows_linearly() -> None:
    """Each branch adds 2 E relu(z)^2 = 1 (De & Smith 2020), less what zero padding takes."""
    spec = StackSpec(scheme="he-v2", depth=16, width=32, batch_size=16, image_size=8)
    seeds = [walk(spec, seed, network(spec, seed)).records()[0] for seed in range(4)]
    inside = ((3 * 8 - 2) / (3 * 8)) ** 2  # neighbours that lie inside the image, on average
    q = np.mean([[row.act_rms**2 for row in rows] for rows in seeds], axis=0)
    assert (q[16] - q[8]) / 8 == pytest.approx(inside, rel=0.1)
    assert (q[8] - q[0]) / 8 == pytest.approx(inside, rel=0.1)


# Predictions follow the wiring.
PREDICTED = (
    *("skipinit", "rezero", "fixup", "t-fixup", "layerscale", "pre-ln", "gpt2", "peri-ln"),
    *("sub-ln", "normformer", "lns", "deepnorm", "keel", "depth-mup", "completep", "deepscalelm"),
)
TOLERANCE = dict.fromkeys(PREDICTED, 0.025) | {"post-ln": 0.1, "mix-ln": 0.1}
WITHHELD = {
    "stochastic-depth": "drawn from the seed",
    "he-v1": "phi after the addition",
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", TOLERANCE)
def test_the_prediction_follows_the_scheme(scheme: str) -> None:
    """Log10 of the norm, every row, the mean of three seeds; twice that for the squared norm."""
    spec = stack(scheme, block="transformer", depth=12)
    predicted = predict(spec).log10_grad_norm
    assert predicted is not None
    rows = [
        [row.log10_grad_norm - each[-1].log10_grad_norm for row in each] for each in profiles(spec)
    ]
    assert np.abs(np.mean(rows, axis=0) - predicted).max() < TOLERANCE[scheme]


PARTS: list[dict[str, Any]] = [
    *({"block": block} for block in ("mlp", "conv", "resnet", "attention", "ffn", "transformer")),
    {"block": "ffn", "gated": True},
    {"block": "attention", "rope": 1e4, "kv_heads": 2, "head_dim": 8, "causal": True},
    {"block": "transformer", "gated": True, "rope": 1e4, "loss": "ce"},
]


@pytest.mark.parametrize("scheme", ["rezero", "skipinit", "fixup"])
@pytest.mark.parametrize("parts", PARTS, ids=lambda p: "-".join(map(str, p.values())))
def test_a_branch_that_starts_at_0_leaves_the_gradient_as_it_is(
    scheme: str, parts: dict[str, Any]
) -> None:
    """Whatever the branch is: predicted and measured as 0 decades, but for rounding."""
    if parts["block"] not in SCHEMES[scheme].blocks or (scheme == "fixup" and "gated" in parts):
        return
    sizes = {"seq_len": 5} if parts["block"] in ("attention", "ffn", "transformer") else {}
    spec = StackSpec(scheme=scheme, depth=3, width=32, batch_size=2, **sizes, **parts)
    told = predict(spec)
    assert told.reason is None
    rows, _ = walk(spec, 0, network(spec)).records()
    got = [row.log10_grad_norm - rows[-1].log10_grad_norm for row in rows]
    for found in (got, told.log10_grad_norm, told.spread):
        assert found == pytest.approx([0.0] * len(rows), abs=1e-14)


def test_a_branch_that_starts_near_0_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(SCHEMES["skipinit"], wire=lambda _: Wiring(b=1e-3, learned="scalar"))
    monkeypatch.setitem(SCHEMES, "skipinit", small)
    assert "adds up along the shortcut" in str(
        predict(StackSpec(scheme="skipinit", block="mlp")).reason
    )
    found = predict(StackSpec(scheme="skipinit", block="resnet")).log10_grad_norm
    assert found is not None
    assert found[0] > 0


@pytest.mark.parametrize("scheme", WITHHELD)
def test_where_there_is_no_formula_the_prediction_says_why(scheme: str) -> None:
    found = predict(StackSpec(scheme=scheme))
    assert found.log10_grad_norm is None
    assert WITHHELD[scheme] in str(found.reason)
