"""Claims about norms, attention and several streams."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from claims.claim import Claim, Expected, Quantity, about, at_least, at_most
from claims.depth import SIZES, STACK
from claims.direct import logit_variance
from claims.readings import (
    collapse_order,
    input_shift_from_pre_ln,
    moved_by_weights,
    power_over_stretched,
    query_over_value,
    square_per_unit,
    stream_from_pre_ln,
    token_cosine,
)

PERI = {**STACK, "scheme": "peri-ln"}

PERI_LN = Claim(
    title="Kim et al. 2025: Peri-LN",
    source="Kim et al. 2025, arXiv:2502.02732",
    setting=f"scheme peri-ln, {SIZES}, depth 24",
    says="A norm on both sides of the branch makes the variance grow by 1 per sub-layer, and the "
    "gradients independent of the weights' scale.",
    quantities=(
        Quantity(
            name="what a unit adds to the mean square",
            options=PERI,
            read=square_per_unit,
            expected=about(1, 0.1),
            wrong={"scheme": "lns"},
        ),
        Quantity(
            name="the same, weights x 4, queries and keys normalised",
            options={**PERI, "qk_norm": True, "gain": 4.0},
            read=square_per_unit,
            expected=about(1, 0.1),
            wrong={"scheme": "pre-ln"},
        ),
        Quantity(
            name="change of log10 |g| by weights x 4, queries and keys normalised",
            options={**PERI, "qk_norm": True},
            read=moved_by_weights,
            expected=at_most(1e-3),
            wrong={"scheme": "pre-ln"},
        ),
        Quantity(
            name="the same, queries and keys not normalised",
            options=PERI,
            read=moved_by_weights,
            expected=at_most(1e-3),
            wrong={"scheme": "pre-ln"},
        ),
    ),
    note="The norms stand around attention, not inside: larger queries and keys still sharpen its "
    "softmax, here 256-fold in the logits' variance. The claim needs QK-norm beside it.",
)

TOKENS = {"block": "attention", "width": 128, "seq_len": 64, "batch_size": 2}


def _logits(gain: float) -> Quantity:
    return Quantity(
        name=f"variance of the logits, weights x {gain:g}",
        options={**TOKENS, "depth": 1, "qk_norm": True, "gain": gain},
        read=logit_variance,
        expected=about(1, 0.1),
        wrong={"qk_norm": None},
    )


QK_NORM = Claim(
    title="Henry et al. 2020, Dehghani et al. 2023: QK-norm",
    source="Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023 (ViT-22B), arXiv:2302.05442",
    setting="attention, width 128, 4 heads, 2 x 64 tokens, `--qk-norm`; computed from the layer's "
    "own queries and keys",
    says="Normalised queries and keys keep the logits of attention in bounds whatever the weights; "
    "at initialisation their variance is 1.",
    quantities=(_logits(0.25), _logits(4), _logits(16)),
)

POINTWISE = {
    **{"block": "ffn", "activation": "relu", "depth": 200, "width": 128, "seq_len": 8},
    **{"batch_size": 8, "norm": "pre"},
}


def _profile(kind: str, expected: Expected, wrong: str) -> Quantity:
    return Quantity(
        name=f"{kind}: misfit of ln |g| to sqrt(l) over its misfit to ln l",
        options={**POINTWISE, "norm_kind": kind},
        read=power_over_stretched,
        expected=expected,
        wrong={"norm_kind": wrong},
    )


DYT = Claim(
    title="Alekseev 2026: tanh in the place of a norm",
    source="Alekseev 2026, arXiv:2604.11890",
    setting="x + f(N(x)), f an ffn with ReLU, He, width 128, 8 x 8 tokens, depth 200",
    says="With LayerNorm the gradient grows towards the input as a power law; with DyT or Derf in "
    "its place as a stretched exponential, ln |g| linear in sqrt(l).",
    quantities=(
        _profile("layernorm", at_least(2), "dyt"),
        _profile("dyt", at_most(0.5), "layernorm"),
        _profile("derf", at_most(0.5), "layernorm"),
    ),
)

DEEP_TOKENS = {**TOKENS, "depth": 24, "init": "he"}

RANK = Claim(
    title="Dong et al. 2021, Noci et al. 2022: rank collapse",
    source="Dong et al. 2021, arXiv:2103.03404; Noci et al. 2022, arXiv:2206.03126",
    setting="attention alone, width 128, 2 x 64 tokens, He; depth 3 in float64 without shortcuts, "
    "depth 24 with them",
    says="Without shortcuts all tokens become one, doubly exponentially: the distance is cubed per "
    "layer. With shortcuts they still do in Post-LN, and the gradients of queries and keys "
    "vanish; branches scaled by 1/sqrt(L) prevent it.",
    quantities=(
        Quantity(
            name="no shortcut: order of convergence of 1 - cosine, layers 1 to 3",
            options={
                **TOKENS,
                **{"shortcut": "plain", "norm": "pre", "depth": 3, "dtype": "float64"},
            },
            read=collapse_order,
            expected=about(3, 0.5),
            wrong={"shortcut": "residual"},
        ),
        Quantity(
            name="Post-LN: cosine between tokens",
            options={**DEEP_TOKENS, "scheme": "post-ln"},
            read=token_cosine,
            expected=at_least(0.99),
            wrong={"scheme": "depth-mup"},
        ),
        Quantity(
            name="branches over sqrt(L): cosine between tokens",
            options={**DEEP_TOKENS, "scheme": "depth-mup"},
            read=token_cosine,
            expected=at_most(0.05),
            wrong={"scheme": "pre-ln"},
        ),
        Quantity(
            name="Post-LN: |dL/dW_q| / |dL/dW_v| in the last block",
            options={**DEEP_TOKENS, "scheme": "post-ln"},
            read=query_over_value,
            expected=at_most(0.01),
            wrong={"scheme": "depth-mup"},
        ),
        Quantity(
            name="branches over sqrt(L): |dL/dW_q| / |dL/dW_v| in the last block",
            options={**DEEP_TOKENS, "scheme": "depth-mup"},
            read=query_over_value,
            expected=at_least(0.1),
            wrong={"scheme": "post-ln"},
        ),
    ),
    note="depth-mup's attention logits are over d_head, not its root: that alone divides its ratio "
    "by sqrt(d_head), 5.7 here.",
)


def _as_pre_ln(scheme: str, shift: Expected) -> tuple[Quantity, ...]:
    """The two numbers that make a scheme of n streams the same as pre-ln at initialisation."""
    options: Mapping[str, Any] = {**STACK, "depth": 16, "dtype": "float64", "scheme": scheme}
    wrong = {"scheme": "post-ln"}
    return (
        Quantity(
            name=f"{scheme}: largest relative difference of a stream's size to that of pre-ln",
            options=options,
            read=stream_from_pre_ln,
            expected=at_most(1e-4),
            wrong=wrong,
        ),
        Quantity(
            name=f"{scheme}: log10 |dL/d(input)| above that of pre-ln",
            options=options,
            read=input_shift_from_pre_ln,
            expected=shift,
            wrong=wrong,
        ),
    )


STREAMS = Claim(
    title="Zhu et al. 2024, Xie et al. 2025: hyper-connections and mHC",
    source="Zhu et al. 2024, arXiv:2409.19606; Xie et al. 2025 (mHC), arXiv:2512.24880",
    setting="schemes hyper-connections and mhc (near-identity bias), n = 4 streams, float64, "
    f"{SIZES}, depth 16",
    says="At initialisation they are Pre-LN: every stream is that of Pre-LN, and so is the "
    "gradient at the input, times n where the readout is the sum of the streams.",
    quantities=(
        *_as_pre_ln("hyper-connections", about(math.log10(4), 1e-4, "log10 4")),
        *_as_pre_ln("mhc", about(0, 1e-4)),
    ),
)

CLAIMS = (PERI_LN, QK_NORM, DYT, RANK, STREAMS)
