"""Schemes that differ in where a transformer normalises, and in the weight of its branches."""

from __future__ import annotations

import math

from gradflow.schemes.scheme import Scheme
from gradflow.schemes.unit_kinds import UnitKind
from gradflow.schemes.wiring import Place, Wiring


def layerscale_constants(place: Place) -> dict[str, float]:
    """Return lambda: 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond."""
    return {"lambda": 0.1 if place.depth <= 18 else 1e-5 if place.depth <= 24 else 1e-6}


LAYERSCALE = Scheme(
    equation="x' = x + diag(lambda) f(LN(x)), a final LN",
    init="N(0, 0.02); lambda = 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond",
    paper="Touvron et al. 2021 (CaiT), arXiv:2103.17239",
    claim="q_L = q_0 + lambda^2 v L: the stream and the gradient hardly change",
    wire=lambda place: Wiring(
        norms=("in",), b=layerscale_constants(place)["lambda"], learned="vector"
    ),
    defaults={"init": "normal"},
    constants=layerscale_constants,
    final_norm=True,
    pitfalls=("one lambda for all depths", "one number in place of a vector"),
)


POST_LN = Scheme(
    equation="x' = LN(x + f(x))",
    init="Xavier",
    paper="Vaswani et al. 2017, arXiv:1706.03762",
    claim="the gradient shrinks towards the input, by attention and token correlation",
    wire=lambda _: Wiring(norms=("out",)),
    defaults={"init": "xavier"},
    pitfalls=("a final LN on top: the last unit has normalised already",),
)

PRE_LN = Scheme(
    equation="x' = x + f(LN(x)), a final LN after the last layer",
    init="the stack's own",
    paper="Xiong et al. 2020, arXiv:2002.04745",
    claim="|g_l|^2 grows towards the input as a power law: (q_L / q_l)^(kappa/v)",
    wire=lambda _: Wiring(norms=("in",)),
    final_norm=True,
    pitfalls=("no final LN: the output then grows with the depth",),
)


def output_gain(place: Place) -> dict[str, float]:
    """Return the gain 1/sqrt(2L) of output projections, 2L the number of units."""
    return {"output gain": 1 / math.sqrt(place.total)}


def _scaled_outputs(place: Place) -> dict[str, float]:
    return dict.fromkeys(("out", "down"), output_gain(place)["output gain"])


GPT2 = Scheme(
    equation="x' = x + f(LN(x)), a final LN after the last layer",
    init="N(0, 0.02); output projections over sqrt(2L), L blocks",
    paper="Radford et al. 2019 (GPT-2)",
    claim="|g_0|^2 / |g_L|^2 stays of order 1 at any depth",
    wire=lambda place: Wiring(norms=("in",), gains=_scaled_outputs(place)),
    defaults={"init": "normal"},
    constants=output_gain,
    final_norm=True,
    pitfalls=("2L counts sub-layers, not blocks",),
)

PERI_LN = Scheme(
    equation="x' = x + LN(f(LN(x))), LN of the embedding and after the last layer",
    init="the stack's own",
    paper="Kim et al. 2025, arXiv:2502.02732",
    claim="the variance grows by 1 per unit, and gradients do not depend on the weights' scale",
    wire=lambda _: Wiring(norms=("in", "branch")),
    final_norm=True,
    input_norm="norm",
    pitfalls=("OLMo-2 normalises the output of the branch only",),
)

PB_RELAX_UNIT = UnitKind(
    implementation="gradflow.networks.units.pb_relax:PbRelaxUnit",
    blocks=None,
    has_own_shortcut=False,
)

SANDWICH_LN = Scheme(
    equation="x' = x + LN(f(LN(x))), every LN of 8 x / max|x| (PB-relax), a final LN",
    init="N(0, 0.02); output projections over sqrt(2L), L blocks",
    paper="Ding et al. 2021 (CogView), arXiv:2105.13290",
    claim="the variance grows by 1 per unit, whatever the branches do",
    wire=lambda place: Wiring(
        norms=("in", "branch"), gains=_scaled_outputs(place), unit="pb-relax"
    ),
    defaults={"init": "normal"},
    constants=output_gain,
    final_norm=True,
    pitfalls=("the gradient let through max|x|",),
)


def sub_ln_constants(place: Place) -> dict[str, float]:
    """Return gamma = sqrt(ln 2N), N blocks of an encoder or a decoder alone."""
    return {"gamma": math.sqrt(math.log(2 * place.depth))}


def _sub_ln(place: Place) -> Wiring:
    gains = dict.fromkeys(("v", "out", "up", "down"), sub_ln_constants(place)["gamma"])
    return Wiring(norms=("in", "mid"), gains=gains)


SUB_LN = Scheme(
    equation="x' = x + W_out LN(inner(LN(x))), inner all of the branch before its last matrix",
    init="Xavier; W_v, W_o, W_1, W_2 times gamma = sqrt(ln 2N), queries and keys times 1",
    paper="Wang et al. 2022 (Magneto), arXiv:2210.06423",
    claim="the first update is bounded by a constant at any depth",
    wire=_sub_ln,
    defaults={"init": "xavier"},
    constants=sub_ln_constants,
    final_norm=True,
    pitfalls=("the inner LN of the ffn before the activation: it follows it",),
)


def _normformer(place: Place) -> Wiring:
    second = "branch" if place.kind == "attention" else "mid"
    return Wiring(norms=("in", second), unit="normformer")


NORMFORMER_UNIT = UnitKind(
    implementation="gradflow.networks.units.normformer:NormformerUnit",
    has_own_shortcut=False,
)

NORMFORMER = Scheme(
    equation="x' = x + LN(HeadScaleAttention(LN(x))); x' = x + W_2 LN(phi(W_1 LN(x))); a final LN",
    init="the stack's own; one scale per head, 1 (no ResScale)",
    paper="Shleifer et al. 2021, arXiv:2110.09456",
    claim="at initialisation the head scales change nothing",
    wire=_normformer,
    final_norm=True,
    pitfalls=("the LN of attention before W_o: it follows it",),
)


def mix_ln_constants(place: Place) -> dict[str, float]:
    """Return the number of Post-LN blocks, floor(N / 4), which come first."""
    return {"post-ln blocks": float(place.depth // 4)}


def _mix_ln(place: Place) -> Wiring:
    is_post = place.layer <= mix_ln_constants(place)["post-ln blocks"]
    return Wiring(norms=("out",) if is_post else ("in",))


MIX_LN = Scheme(
    equation="x' = LN(x + f(x)) in the first quarter of the blocks, then x' = x + f(LN(x))",
    init="the stack's own",
    paper="Li et al. 2024, arXiv:2412.13795",
    claim="gradients are larger in the deep layers than with Pre-LN, more even over the depth",
    wire=_mix_ln,
    constants=mix_ln_constants,
    final_norm=True,
    pitfalls=("the Post-LN blocks at the end: they come first",),
)


def lns_constants(place: Place) -> dict[str, float]:
    """Return the factor 1/sqrt(l), l the block from 1."""
    return {"factor": 1 / math.sqrt(place.layer)}


LNS = Scheme(
    equation="x' = x + f(LN(x) / sqrt(l)), l the block from 1; a final LN",
    init="the stack's own, output projections not scaled",
    paper="Sun et al. 2025 (LayerNorm Scaling), arXiv:2502.05795",
    claim="the variance of the stream grows like log l in place of l",
    wire=lambda place: Wiring(norms=("in",), c=lns_constants(place)["factor"]),
    constants=lns_constants,
    final_norm=True,
    pitfalls=(
        "l counted in sub-layers: both units of a block share its factor",
        "output projections over sqrt(2L) as well: that takes most of it away",
    ),
)


def _hybridnorm(place: Place) -> Wiring:
    gains = _scaled_outputs(place)
    if place.kind == "attention":
        return Wiring(norms=("query-key", "value"), gains=gains)
    return Wiring(norms=("shared",), gains=gains)


HYBRIDNORM = Scheme(
    equation="y = x + attention(x) with q, k, v normalised per head; x' = N(y) + ffn(N(y))",
    init="N(0, 0.02); output projections over sqrt(2L), L blocks",
    paper="Zhuo et al. 2025, arXiv:2503.04598",
    claim="stabler than Pre-LN, with the regularising effect of Post-LN",
    wire=_hybridnorm,
    defaults={"init": "normal", "norm_kind": "rmsnorm"},
    constants=output_gain,
    final_norm=True,
    pitfalls=(
        "values not normalised",
        "the shortcut of the ffn taken before the norm",
        "HybridNorm* has a further norm in the first block",
    ),
)
