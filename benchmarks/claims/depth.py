"""Claims about schemes that scale with the depth, and about branches that start at zero."""

from __future__ import annotations

from claims.claim import Claim, Quantity, about, exactly
from claims.readings import (
    final_square,
    last_matrix_exponent,
    squared_decades,
    squared_ratio,
    unevenness,
    update_exponent,
    weight_gradient,
)

# One set of sizes, at which attention is not dominated by the token itself.
STACK = {
    **{"block": "transformer", "depth": 24, "width": 128, "seq_len": 64, "batch_size": 4},
    **{"init": "he", "activation": "relu"},
}
OWN = {**STACK, "init": None}
SIZES = "transformer, ReLU, width 128, 4 x 64 tokens, He"
CLASSIFIER = {
    **{"width": 128, "seq_len": 32, "batch_size": 8, "activation": "relu", "init": "xavier"},
    **{"loss": "ce", "classes": 512},
}

XIONG = Claim(
    title="Xiong et al. 2020: the last layer's gradient, Post-LN and Pre-LN",
    source="Xiong et al. 2020, arXiv:2002.04745, theorem 1",
    setting="transformer, ReLU, width 128, 8 x 32 tokens, Xavier, cross-entropy over 512 classes, "
    "depths 6, 12, 24, 48; |dL/dW_2| of the last ffn",
    says="With Post-LN it does not depend on the depth, with Pre-LN it falls as 1/sqrt(L).",
    quantities=(
        Quantity(
            name="Post-LN: exponent of the depth",
            options={**CLASSIFIER, "scheme": "post-ln"},
            read=last_matrix_exponent,
            expected=about(0, 0.1),
            wrong={"scheme": "pre-ln"},
        ),
        Quantity(
            name="Pre-LN: exponent of the depth",
            options={**CLASSIFIER, "scheme": "pre-ln"},
            read=last_matrix_exponent,
            expected=about(-0.5, 0.1),
            wrong={"scheme": "post-ln"},
        ),
    ),
    note="The law needs many classes: of 10, few directions carry the loss, and single seeds give "
    "exponents from -0.48 to -0.19 for Pre-LN, from 0.01 to 0.24 for Post-LN.",
)


def _gpt2(depth: int) -> Quantity:
    return Quantity(
        name=f"|g_0|^2 / |g_D|^2, depth {depth}",
        options={**STACK, "scheme": "gpt2", "depth": depth},
        read=squared_ratio,
        expected=about(1.56, 0.08),
        wrong={"scheme": "pre-ln"},
    )


GPT = Claim(
    title="GPT-2: output projections over sqrt(2L)",
    source="Radford et al. 2019 (GPT-2)",
    setting=f"scheme gpt2, {SIZES}",
    says="Scaling them by 1/sqrt(2L) makes up for the accumulation along the shortcuts; the "
    "recursion of Pre-LN then gives 1.56 at any depth.",
    quantities=(_gpt2(12), _gpt2(24), _gpt2(48)),
)

DEEPNORM = Claim(
    title="Wang et al. 2022: DeepNorm",
    source="Wang et al. 2022, arXiv:2203.00555, theorem 4.2",
    setting=f"scheme deepnorm, {SIZES}; for the update its own Xavier, depths 6, 12, 24, 48",
    says="LN(alpha x + f(x)) with small weights keeps the gradient, and the first update of the "
    "model is bounded by a constant at any depth, where that of Post-LN grows.",
    quantities=(
        Quantity(
            name="log10 |g_0|^2 / |g_D|^2, depth 24",
            options={**STACK, "scheme": "deepnorm"},
            read=squared_decades,
            expected=about(0, 0.02),
            wrong={"scheme": "post-ln"},
        ),
        Quantity(
            name="exponent of the depth in |dL/dW|^2 of all matrices: the update per learning rate",
            options={**OWN, "scheme": "deepnorm"},
            read=update_exponent,
            expected=about(0, 0.05),
            wrong={"scheme": "post-ln"},
        ),
    ),
    note="The theorem counts matrices. Biases and the gains of norms, which it leaves out, have "
    "updates that do grow with the depth.",
)

KEEL = Claim(
    title="Chen & Wei 2026: Keel",
    source="Chen & Wei 2026, arXiv:2601.19895",
    setting=f"scheme keel, {SIZES}",
    says="LN(alpha x + f(LN x)), alpha the number of sub-layers, keeps the gradient at any depth.",
    quantities=(
        Quantity(
            name="log10 |g_0|^2 / |g_D|^2, depth 24",
            options={**STACK, "scheme": "keel"},
            read=squared_decades,
            expected=about(0, 0.02),
            wrong={"scheme": "post-ln"},
        ),
    ),
)

LNS = Claim(
    title="Sun et al. 2025: LayerNorm scaling",
    source="Sun et al. 2025, arXiv:2502.05795",
    setting=f"schemes lns and pre-ln, {SIZES}, depth 24; mean square of the output",
    says="1/sqrt(l) on the norm's output makes the variance grow like log l, where Pre-LN's grows "
    "like l; the recursions give 5.76 and 39.9.",
    quantities=(
        Quantity(
            name="LNS",
            options={**STACK, "scheme": "lns"},
            read=final_square,
            expected=about(5.76, 0.5),
            wrong={"scheme": "pre-ln"},
        ),
        Quantity(
            name="Pre-LN",
            options={**STACK, "scheme": "pre-ln"},
            read=final_square,
            expected=about(39.9, 6),
            wrong={"scheme": "lns"},
        ),
    ),
    seeds=5,
)

DEEPSCALELM = Claim(
    title="Kedia et al. 2024: DeepScaleLM",
    source="Kedia et al. 2024, arXiv:2403.09635",
    setting="scheme deepscalelm, ffn, ReLU, width 128, 4 x 64 tokens, 192 layers",
    says="lambda^2 = 1 - 2/N, beta^2 = 2/N keep stream and gradient at any depth.",
    quantities=(
        Quantity(
            name="|g_0|^2 / |g_D|^2",
            options={**STACK, "scheme": "deepscalelm", "block": "ffn", "depth": 192},
            read=squared_ratio,
            expected=about(1, 0.1),
            wrong={"scheme": "pre-ln"},
        ),
    ),
)

ZERO = {**STACK, "depth": 16, "init": None}

REZERO = Claim(
    title="Bachlechner et al. 2020: ReZero",
    source="Bachlechner et al. 2020, arXiv:2003.04887",
    setting="scheme rezero, transformer, ReLU, width 128, 4 x 64 tokens, depth 16",
    says="With alpha = 0 the net is the identity: the gradient is the same at every layer, and no "
    "weight but alpha has one.",
    quantities=(
        Quantity(
            name="largest ||g_l|/|g_D| - 1|",
            options={**ZERO, "scheme": "rezero"},
            read=unevenness,
            expected=exactly(0),
            wrong={"scheme": "pre-ln"},
        ),
        Quantity(
            name="largest |dL/dW|, W the branches' matrices",
            options={**ZERO, "scheme": "rezero"},
            read=weight_gradient,
            expected=exactly(0),
            wrong={"scheme": "pre-ln"},
        ),
    ),
)

FIXUP = Claim(
    title="Zhang et al. 2019: Fixup",
    source="Zhang, Dauphin & Ma 2019, arXiv:1901.09321",
    setting="scheme fixup, ReLU: a transformer of width 128, depth 16; ffn of width 64, 8 x 16 "
    "tokens, depths 6, 12, 24, 48",
    says="The branches start at zero, so that the net is the identity; the first update does not "
    "depend on the depth.",
    quantities=(
        Quantity(
            name="largest ||g_l|/|g_D| - 1|",
            options={**ZERO, "scheme": "fixup"},
            read=unevenness,
            expected=exactly(0),
            wrong={"scheme": "pre-ln"},
        ),
        Quantity(
            name="exponent of the depth in |dL/dW|^2 of all matrices: the update per learning rate",
            options={
                **{"scheme": "fixup", "block": "ffn", "width": 64, "seq_len": 16},
                "activation": "relu",
            },
            read=update_exponent,
            expected=about(0, 0.05),
            wrong={"scheme": None, "norm": "none"},
        ),
    ),
)

CLAIMS = (XIONG, GPT, DEEPNORM, KEEL, LNS, DEEPSCALELM, REZERO, FIXUP)
