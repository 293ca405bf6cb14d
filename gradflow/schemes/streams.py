"""Schemes that carry several streams between their units, with the kinds of unit that they have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradflow.schemes.scheme import Scheme
from gradflow.schemes.unit_kinds import Readout, UnitKind, is_first
from gradflow.schemes.wiring import Place, Wiring

# By name: `Scheme.readout`.
_REDUCE = Readout("gradflow.networks.ends:ReduceStreams")
READOUTS = {
    **dict.fromkeys(("first", "last", "sum", "mean"), _REDUCE),
    "dual": Readout("gradflow.networks.units.two_streams:DualReadout", 2),
    "siamese": Readout("gradflow.networks.units.two_streams:SiameseReadout", 2),
    "depth attention": Readout("gradflow.networks.units.depth_mixing:DepthAttention"),
}

B2T_UNIT = UnitKind(
    implementation="gradflow.networks.units.two_streams:B2tUnit",
    blocks=("transformer",),
    streams=lambda place: 2 if place.unit == 0 else 1,
)

B2T = Scheme(
    equation="h = LN(x + attn(x)), x' = LN(x + h + ffn(h)); state (h, x) between the two",
    init="Xavier",
    paper="Takase et al. 2023 (B2T connection), arXiv:2206.00330",
    claim="the shortcut over the whole block keeps the gradient that post-ln loses",
    wire=lambda _: Wiring(norms=("out",), unit="b2t"),
    blocks=("transformer",),
    defaults={"init": "xavier"},
    streams=B2T_UNIT.streams,
    pitfalls=(
        "the shortcut around the last LN of the block: it is added before that LN",
        "the authors' code also multiplies every matrix by N^(-1/2), N blocks: --gain does it",
    ),
)

RESIDUAL_DUAL_UNIT = UnitKind(
    implementation="gradflow.networks.units.two_streams:DualUnit",
    settings=("first",),
    placed=is_first,
    streams=lambda _: 2,
    readout="dual",
)

RESIDUAL_DUAL = Scheme(
    equation="p' = LN(p + f(p)), r' = r + f(p), p_0 = r_0 = x; output p + LN(r); state (p, r)",
    init="Xavier",
    paper="Xie et al. 2023 (ResiDual), arXiv:2304.14802",
    claim="the gradient does not vanish: r carries it as in pre-ln",
    wire=lambda place: Wiring(norms=("out",), unit="residual-dual", settings=is_first(place)),
    defaults={"init": "xavier"},
    streams=RESIDUAL_DUAL_UNIT.streams,
    readout="dual",
    pitfalls=("r_0 = 0: r starts as the input", "f read from r: both streams share f(p)"),
)


def siamese_constants(place: Place) -> dict[str, float]:
    """Return the divisor c = sqrt(2 l), l the block from 1."""
    return {"c": math.sqrt(2 * place.layer)}


def _siamesenorm(place: Place) -> Wiring:
    settings = {**is_first(place), "divisor": siamese_constants(place)["c"]}
    return Wiring(norms=("in",), unit="siamesenorm", settings=settings)


SIAMESENORM_UNIT = UnitKind(
    implementation="gradflow.networks.units.two_streams:SiameseUnit",
    settings=("first", "divisor"),
    placed=is_first,
    blocks=("transformer",),
    streams=lambda _: 2,
    readout="siamese",
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
    streams=SIAMESENORM_UNIT.streams,
    readout="siamese",
    pitfalls=("c of the unit: it is that of the block, the same for attention and ffn",),
)

_HYPER_STREAMS = 4  # n, in the papers of hyper-connections and of mHC


def _hyper(place: Place) -> Wiring:
    settings = {
        **is_first(place),
        "streams": _HYPER_STREAMS,
        # k mod n, k the unit from 0: each reads another stream than the one before.
        "stream": (place.index - 1) % _HYPER_STREAMS,
    }
    return Wiring(norms=("in",), unit="hyper-connections", settings=settings)


HYPER_CONNECTIONS_UNIT = UnitKind(
    implementation="gradflow.networks.units.hyper:HyperUnit",
    settings=("first", "streams", "stream"),
    placed=is_first,
    counts={
        "streams": lambda _: (1, math.inf),
        "stream": lambda settings: (0, settings["streams"] - 1),
    },
    readout="sum",
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
    constants=lambda place: {"stream": float((place.index - 1) % _HYPER_STREAMS)},
    final_norm=True,
    streams=lambda _: _HYPER_STREAMS,
    readout="sum",
    pitfalls=(
        "k counts sub-layers, not blocks",
        "output projections scaled by sqrt(n), a factor of the paper: then no longer pre-ln",
        "one random stream for each unit in place of k mod n",
    ),
)


def _mhc(place: Place, *, pre: float, off_diagonal: float) -> Wiring:
    biases = {"pre": pre, "off_diagonal": off_diagonal}
    settings = {**is_first(place), "streams": _HYPER_STREAMS, **biases}
    return Wiring(norms=("in",), unit="mhc", settings=settings)


def _mhc_identity(place: Place) -> Wiring:
    """Wire with H_pre = 1/n, whose logit is -log(n - 1), and e^-8 beside the diagonal of H_res."""
    return _mhc(place, pre=-math.log(_HYPER_STREAMS - 1), off_diagonal=-8.0)


def _mhc_uniform(place: Place) -> Wiring:
    return _mhc(place, pre=0.0, off_diagonal=0.0)


MHC_UNIT = UnitKind(
    implementation="gradflow.networks.units.hyper:ManifoldUnit",
    settings=("first", "streams", "pre", "off_diagonal"),
    placed=is_first,
    counts={"streams": lambda _: (1, math.inf)},
    readout="mean",
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
    streams=lambda _: _HYPER_STREAMS,
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
    streams=lambda _: _HYPER_STREAMS,
    readout="mean",
    pitfalls=("transformers draws phi from N(0, 0.02) with alpha = 1, the paper has 0.01",),
)

ATTNRES_UNIT = UnitKind(
    implementation="gradflow.networks.units.depth_mixing:DepthAttentionUnit",
    settings=("first",),
    placed=is_first,
    streams=lambda place: place.index + 1,
    readout="depth attention",
)

ATTNRES = Scheme(
    equation="v_l = f(LN(h_l)), h_l = sum_(i<l) softmax_i(w_l RMSNorm(v_i)) v_i, v_0 = x; "
    "output h_(L+1); state (v_0, ..., v_l)",
    init="the stack's own; w_l = 0",
    paper="Kimi Team 2026 (Attention Residuals), arXiv:2603.15031",
    claim="at initialisation h_l is pre-ln's stream over l, so that output and input gradient "
    "are those of pre-ln over the number of units + 1, exactly as --norm-eps goes to 0 and to "
    "2e-4 at 1e-5",
    wire=lambda place: Wiring(norms=("in",), unit="attnres", settings=is_first(place)),
    final_norm=True,
    streams=ATTNRES_UNIT.streams,
    readout="depth attention",
    pitfalls=(
        "one query per block: each sub-layer has its own",
        "normalised values: only the keys are",
        "queries drawn at random",
    ),
)


def _closes_block(place: Place) -> bool:
    return place.unit == place.units - 1


def _averaged(place: Place) -> Mapping[str, Any]:
    """Return `first`, and how many outputs of blocks are averaged after the unit, the input too."""
    return {**is_first(place), "averaged": place.layer + 1 if _closes_block(place) else 0}


DENSEFORMER_UNIT = UnitKind(
    implementation="gradflow.networks.units.depth_mixing:DenseUnit",
    settings=("first", "averaged"),
    placed=_averaged,
    streams=lambda place: place.layer + (2 if _closes_block(place) else 1),
    readout="last",
)

DENSEFORMER = Scheme(
    equation="X_i = block_i(Y_(i-1)) of pre-norm units, Y_i = sum_(j<=i) alpha_ij X_j, "
    "X_0 = Y_0 = x; output Y_L; state (X_0, ..., X_i, Y_i)",
    init="the stack's own; alpha_ij = 1 for j = i, else 0",
    paper="Pagliardini et al. 2024, arXiv:2402.02622",
    claim="at initialisation it is pre-ln, exactly",
    wire=lambda place: Wiring(norms=("in",), unit="denseformer", settings=_averaged(place)),
    final_norm=True,
    streams=DENSEFORMER_UNIT.streams,
    readout="last",
    pitfalls=("averages of averages: X_j, not Y_j, is averaged",),
)


def _value_residual(place: Place) -> Wiring:
    settings = {**is_first(place), "weight": 0.5}
    return Wiring(norms=("in",), unit="value-residual", settings=settings)


VALUE_RESIDUAL_UNIT = UnitKind(
    implementation="gradflow.networks.units.value_residual:ValueResidualUnit",
    settings=("first", "weight"),
    placed=is_first,
    blocks=("transformer", "attention"),
    streams=lambda _: 2,
    readout="first",
    carries_values=True,
)

VALUE_RESIDUAL = Scheme(
    equation="x' = x + f(LN(x)), attention on V_l <- (V_1 + V_l)/2; state (x, V_1)",
    init="the stack's own",
    paper="Zhou et al. 2024 (ResFormer), arXiv:2410.17897",
    claim="the values of the first layer get a gradient from every layer",
    wire=_value_residual,
    blocks=("transformer", "attention"),
    final_norm=True,
    streams=VALUE_RESIDUAL_UNIT.streams,
    readout="first",
    pitfalls=("V_1 mixed from layer to layer: it is that of the first layer throughout",),
)
