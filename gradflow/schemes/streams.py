"""Schemes that carry several streams between their units; each has a class of unit of its own."""

from __future__ import annotations

import math

from gradflow.schemes.scheme import Scheme
from gradflow.schemes.wiring import Place, Wiring


def _b2t(_: Place) -> Wiring:
    return Wiring(norms=("out",), unit="b2t")


def _residual_dual(place: Place) -> Wiring:
    return Wiring(norms=("out",), unit="residual-dual", settings={"first": place.index == 1})


def siamese_constants(place: Place) -> dict[str, float]:
    """c = sqrt(2 l), l the block from 1."""
    return {"c": math.sqrt(2 * place.layer)}


def _siamesenorm(place: Place) -> Wiring:
    settings = {"first": place.index == 1, "divisor": siamese_constants(place)["c"]}
    return Wiring(norms=("in",), unit="siamesenorm", settings=settings)


HYPER_STREAMS = 4  # n, in both papers


def _hyper(place: Place) -> Wiring:
    settings = {
        "first": place.index == 1,
        "streams": HYPER_STREAMS,
        # k mod n, k the unit from 0: each reads another stream than the one before.
        "stream": (place.index - 1) % HYPER_STREAMS,
    }
    return Wiring(norms=("in",), unit="hyper-connections", settings=settings)


def _mhc(place: Place, *, pre: float, off_diagonal: float) -> Wiring:
    biases = {"pre": pre, "off_diagonal": off_diagonal}
    settings = {"first": place.index == 1, "streams": HYPER_STREAMS, **biases}
    return Wiring(norms=("in",), unit="mhc", settings=settings)


def _mhc_identity(place: Place) -> Wiring:
    """H_pre = 1/n, the logit of it being -log(n - 1); e^-8 beside the diagonal of H_res."""
    return _mhc(place, pre=-math.log(HYPER_STREAMS - 1), off_diagonal=-8.0)


def _mhc_uniform(place: Place) -> Wiring:
    return _mhc(place, pre=0.0, off_diagonal=0.0)


def _attnres(place: Place) -> Wiring:
    return Wiring(norms=("in",), unit="attnres", settings={"first": place.index == 1})


def _denseformer(place: Place) -> Wiring:
    closes = place.unit == place.units - 1
    settings = {"first": place.index == 1, "averaged": place.layer + 1 if closes else 0}
    return Wiring(norms=("in",), unit="denseformer", settings=settings)


def _value_residual(place: Place) -> Wiring:
    settings = {"first": place.index == 1, "weight": 0.5}
    return Wiring(norms=("in",), unit="value-residual", settings=settings)


B2T = Scheme(
    equation="h = LN(x + attn(x)), x' = LN(x + h + ffn(h)); state (h, x) between the two",
    init="Xavier",
    paper="Takase et al. 2023 (B2T connection), arXiv:2206.00330",
    claim="the shortcut over the whole block keeps the gradient that post-ln loses",
    wire=_b2t,
    blocks=("transformer",),
    defaults={"init": "xavier"},
    streams=lambda place: 2 if place.unit == 0 else 1,
    pitfalls=(
        "the shortcut around the last LN of the block: it is added before that LN",
        "the authors' code also multiplies every matrix by N^(-1/2), N blocks: --gain does it",
    ),
)

RESIDUAL_DUAL = Scheme(
    equation="p' = LN(p + f(p)), r' = r + f(p), p_0 = r_0 = x; output p + LN(r); state (p, r)",
    init="Xavier",
    paper="Xie et al. 2023 (ResiDual), arXiv:2304.14802",
    claim="the gradient does not vanish: r carries it as in pre-ln",
    wire=_residual_dual,
    defaults={"init": "xavier"},
    streams=lambda _: 2,
    readout="dual",
    pitfalls=("r_0 = 0: r starts as the input", "f read from r: both streams share f(p)"),
)

SIAMESENORM = Scheme(
    equation="q = LN(p), z = f(LN(q + LN(y))), p' = q + z/c, y' = y + z, p_0 = y_0 = x; "
    "output LN(LN(p) + LN(y)); state (p, y)",
    init="N(0, 0.02)",
    paper="Li et al. 2026 (SiameseNorm), arXiv:2602.08064",
    claim="the p stream is normalised at every unit, the y stream never",
    wire=_siamesenorm,
    blocks=("transformer",),
    defaults={"init": "normal"},
    constants=siamese_constants,
    streams=lambda _: 2,
    readout="siamese",
    pitfalls=("c of the unit: it is that of the block, the same for attention and ffn",),
)

HYPER_CONNECTIONS = Scheme(
    equation="H' = A_r^T H + B^T f(LN(A_m^T H)), n = 4 copies of x at the start; "
    "output the sum; state H",
    init="the stack's own; A_m = e_(k mod n), k the unit from 0, A_r = 1, B = (1, ..., 1), "
    "W = 0, s = 0.01",
    paper="Zhu et al. 2024, arXiv:2409.19606",
    claim="at initialisation every stream is that of pre-ln: output and input gradient are "
    "n times those of pre-ln, and the same after a final LN",
    wire=_hyper,
    constants=lambda place: {"stream": float((place.index - 1) % HYPER_STREAMS)},
    final_norm=True,
    streams=lambda _: HYPER_STREAMS,
    readout="sum",
    pitfalls=(
        "k counts sub-layers, not blocks",
        "output projections scaled by sqrt(n), a factor of the paper: then no longer pre-ln",
        "one random stream for each unit in place of k mod n",
    ),
)

MHC = Scheme(
    equation="x' = H_res x + H_post^T f(LN(H_pre x)), H_res doubly stochastic, n = 4 copies "
    "of x at the start; output the mean; state x",
    init="the stack's own; H_pre = 1/n, H_post = 1, logits of H_res 0 in the diagonal, -8 "
    "beside it; phi = 0, alpha = 0.01, 20 Sinkhorn iterations",
    paper="Xie et al. 2025, arXiv:2512.24880; biases: its Table 1, and Yang et al. 2026 "
    "(mHC-lite), arXiv:2601.05732, for H_res",
    claim="at initialisation every stream is that of pre-ln",
    wire=_mhc_identity,
    final_norm=True,
    lacks=("a start of one paper alone: H_pre and H_post are Table 1's, H_res is mHC-lite's",),
    streams=lambda _: HYPER_STREAMS,
    readout="mean",
    pitfalls=(
        "gates of bias +1 for one stream and -1 for the others (mHC-lite): not pre-ln at the start",
        "rows before columns in the Sinkhorn iteration: columns come first",
        "other public readouts: the sum, or a sigmoid head of its own (DeepSeek-V4)",
    ),
)

MHC_UNIFORM = Scheme(
    equation="as mhc",
    init="the stack's own; all biases 0: H_res = 1/n everywhere, H_pre = 1/2, H_post = 1; "
    "phi = 0, alpha = 0.01, 20 Sinkhorn iterations",
    paper="Xie et al. 2025, arXiv:2512.24880; biases of transformers' DeepseekV4 and GLM-5",
    claim="at initialisation every stream is that of pre-ln; one unit mixes all of them",
    wire=_mhc_uniform,
    final_norm=True,
    streams=lambda _: HYPER_STREAMS,
    readout="mean",
    pitfalls=("transformers draws phi from N(0, 0.02) with alpha = 1, the paper has 0.01",),
)

ATTNRES = Scheme(
    equation="v_l = f(LN(h_l)), h_l = sum_(i<l) softmax_i(w_l RMSNorm(v_i)) v_i, v_0 = x; "
    "output h_(L+1); state (v_0, ..., v_l)",
    init="the stack's own; w_l = 0",
    paper="Kimi Team 2026 (Attention Residuals), arXiv:2603.15031",
    claim="at initialisation h_l is pre-ln's stream over l, so that output and input gradient "
    "are those of pre-ln over the number of units + 1, exactly as --norm-eps goes to 0 and to "
    "2e-4 at 1e-5",
    wire=_attnres,
    final_norm=True,
    streams=lambda place: place.index + 1,
    readout="depth attention",
    pitfalls=(
        "one query per block: each sub-layer has its own",
        "normalised values: only the keys are",
        "queries drawn at random",
    ),
)

DENSEFORMER = Scheme(
    equation="X_i = block_i(Y_(i-1)) of pre-norm units, Y_i = sum_(j<=i) alpha_ij X_j, "
    "X_0 = Y_0 = x; output Y_L; state (X_0, ..., X_i, Y_i)",
    init="the stack's own; alpha_ij = 1 for j = i, else 0",
    paper="Pagliardini et al. 2024, arXiv:2402.02622",
    claim="at initialisation it is pre-ln, exactly",
    wire=_denseformer,
    final_norm=True,
    streams=lambda place: place.layer + (2 if place.unit == place.units - 1 else 1),
    readout="last",
    pitfalls=("averages of averages: X_j, not Y_j, is averaged",),
)

VALUE_RESIDUAL = Scheme(
    equation="x' = x + f(LN(x)), attention on V_l <- (V_1 + V_l)/2; state (x, V_1)",
    init="the stack's own",
    paper="Zhou et al. 2024 (ResFormer), arXiv:2410.17897",
    claim="the values of the first layer get a gradient from every layer",
    wire=_value_residual,
    blocks=("transformer", "attention"),
    final_norm=True,
    streams=lambda _: 2,
    readout="first",
    pitfalls=("V_1 mixed from layer to layer: it is that of the first layer throughout",),
)
