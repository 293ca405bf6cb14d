"""Schemes whose constants depend on the depth, or keep the scale of the stream by other means."""

from __future__ import annotations

import math
from functools import lru_cache

from gradflow.errors import UsageError
from gradflow.schemes.scheme import Scheme
from gradflow.schemes.unit_kinds import UnitKind
from gradflow.schemes.wiring import Place, Wiring


def deepnorm_constants(place: Place) -> dict[str, float]:
    """Return alpha = (2N)^(1/4), beta = (8N)^(-1/4), N blocks of an encoder or a decoder alone."""
    return {"alpha": (2 * place.depth) ** 0.25, "beta": (8 * place.depth) ** -0.25}


def _deepnorm(place: Place) -> Wiring:
    alpha, beta = deepnorm_constants(place).values()
    return Wiring(a=alpha, norms=("out",), gains=dict.fromkeys(("v", "out", "up", "down"), beta))


DEEPNORM = Scheme(
    equation="x' = LN(alpha x + f(x))",
    init="Xavier; W_v, W_o, W_1, W_2 times beta, queries and keys times 1",
    paper="Wang et al. 2022, arXiv:2203.00555",
    claim="the first update of the model is bounded by a constant at any depth",
    wire=_deepnorm,
    defaults={"init": "xavier"},
    constants=deepnorm_constants,
    pitfalls=(
        "alpha on the branch, LN(x + alpha f(x)), in place of the shortcut",
        "beta inverted, (8N)^(+1/4)",
        "alpha fixed at its value for N = 32",
    ),
)

ADMIN_UNIT = UnitKind(implementation="gradflow.networks.units.admin:AdminUnit", profiled=True)

ADMIN = Scheme(
    equation="x' = LN(omega_i x + f_i(x)), omega_i^2 = 1 + sum over j < i of Var f_j",
    init="Xavier; omega, a vector, from one forward pass at initialisation",
    paper="Liu et al. 2020, arXiv:2004.08249",
    claim="forward it is Pre-LN up to scale: omega_L^2 = q_L of Pre-LN",
    wire=lambda _: Wiring(norms=("out",), unit="admin"),
    defaults={"init": "xavier"},
    profiled=True,
    pitfalls=("omega guessed from the depth: the paper measures it",),
)

KEEL = Scheme(
    equation="x' = LN(alpha x + f(LN(x)))",
    init="the stack's own",
    paper="Chen & Wei 2026, arXiv:2601.19895",
    claim="|g_0| / |g_L| stays within 0.02 decades of 1",
    wire=lambda place: Wiring(a=float(place.total), norms=("in", "out")),
    constants=lambda place: {"alpha": float(place.total)},
    pitfalls=("alpha = number of blocks: it is that of sub-layers",),
)


# What both parameterisations say of the head.
_MUP_LACKS = ("an output multiplier of 1 over the width on the head's logits",)


def _mup(weight: float) -> Wiring:
    """Return the wiring of muP, Yang et al. 2022 (arXiv:2203.03466): logits are over d_head."""
    return Wiring(norms=("in",), b=weight, logit_power=1.0)


def depth_mup_constants(place: Place) -> dict[str, float]:
    """Return the branch weight L^(-1/2), L the number of blocks."""
    return {"branch weight": place.depth**-0.5}


DEPTH_MUP = Scheme(
    equation="x' = x + L^(-1/2) f(LN(x)), L blocks; attention logits q.k / d_head; a final LN",
    init="the stack's own, variance of order 1/fan_in; output projections not scaled",
    paper="Yang et al. 2023, arXiv:2310.02244; Bordelon et al. 2023, arXiv:2309.16620",
    claim="|g_0|^2 / |g_L|^2 tends to a constant of order 1",
    wire=lambda place: _mup(depth_mup_constants(place)["branch weight"]),
    constants=depth_mup_constants,
    final_norm=True,
    lacks=(*_MUP_LACKS, "learning rates by width and depth: --lr is that of all parameters"),
    pitfalls=("output projections over sqrt(2L) as well", "attention logits over sqrt(d_head)"),
)

# The depth at which the authors' examples have branch weight 1 (nanoGPT-mup, branch completep).
_BASE_DEPTH = 2


def completep_constants(place: Place) -> dict[str, float]:
    """Return the branch weight L_base / L, L the number of blocks."""
    return {"branch weight": _BASE_DEPTH / place.depth}


COMPLETEP = Scheme(
    equation="x' = x + (L_base / L) f(LN(x)), L blocks, L_base = 2; attention logits q.k / d_head; "
    "a final LN",
    init="the stack's own, variance of order 1/fan_in; output projections not scaled",
    paper="Dey et al. 2025, arXiv:2505.01618",
    claim="|g_0|^2 / |g_L|^2 tends to 1: every layer's share vanishes as 1/L^2",
    wire=lambda place: _mup(completep_constants(place)["branch weight"]),
    constants=completep_constants,
    final_norm=True,
    lacks=(
        *_MUP_LACKS,
        "learning rate, Adam's eps and weight decay by width and depth: they are the same for all",
    ),
    pitfalls=(
        "the exponent 1/2 of depth-muP",
        "output projections over sqrt(2L) as well",
        "attention logits over sqrt(d_head)",
    ),
)

# Cosine between tokens of real text after the embedding, as the authors' code has it.
_TEXT_CORRELATION = 0.221


@lru_cache(maxsize=8)
def token_correlations(depth: int) -> tuple[float, ...]:
    """Return the token correlation r at the input of each block, by the authors' recursion.

    Attention makes all tokens alike, r = 1; an ffn with ReLU takes r to
    r + (sqrt(1 - r^2) - r acos r) / pi; each is mixed in with weight beta^2 = 2/N.
    """
    correlations, r, share = [], _TEXT_CORRELATION, 2 / depth
    for _ in range(depth):
        correlations.append(r)
        r += share * (1 - r)
        r += share * (math.sqrt(1 - r * r) - r * math.acos(r)) / math.pi
    return tuple(correlations)


def deepscalelm_constants(place: Place) -> dict[str, float]:
    """Return lambda and beta, lambda^2 = 1 - 2/N, beta^2 = 2/N, N blocks, and the block's r.

    Raises:
        UsageError: N < 3, where lambda would be 0 or imaginary.
    """
    if place.depth < 3:
        rule = "--scheme deepscalelm has lambda^2 = 1 - 2/N > 0"
        raise UsageError(rule, f"--depth {place.depth}", "use --depth 3 or more")
    share = 2 / place.depth
    correlation = token_correlations(place.depth)[place.layer - 1]
    return {"lambda": math.sqrt(1 - share), "beta": math.sqrt(share), "r": correlation}


def _deepscalelm(place: Place) -> Wiring:
    """Wire with gains on He: W_1, W_2 get var. sqrt(1/2)/d (ffn_mult 4), W_v, W_o sqrt(1/r)/d."""
    shortcut, branch, r = deepscalelm_constants(place).values()
    gains = {"up": 2**-0.75, "down": 2**0.75, "v": r**-0.25, "out": r**-0.25}
    return Wiring(a=shortcut, b=branch, norms=("in",), gains=gains)


DEEPSCALELM = Scheme(
    equation="x' = lambda x + beta f(LN(x)), lambda^2 = 1 - 2/N, beta^2 = 2/N; a final LN",
    init="He times gains for unit variance of each branch: ReLU ffn, tokens of correlation r",
    paper="Kedia et al. 2024, arXiv:2403.09635",
    claim="with a ReLU ffn q_l = 1 and |g_0|^2 / |g_L|^2 = 1 at any depth",
    wire=_deepscalelm,
    constants=deepscalelm_constants,
    final_norm=True,
    pitfalls=(
        "lambda = 1 - 2/N without the square root",
        "attention's gain without r: its branch then loses the variance that averaging takes",
    ),
)

NGPT_ALPHA = 0.05  # the eigen learning rate of both kinds of branch at the start

NGPT_UNIT = UnitKind(
    implementation="gradflow.networks.units.ngpt:NgptUnit",
    fixed_options={
        "kv_heads": None,
        "head_dim": None,
        "rope": 0.0,
        "qk_norm": False,
        "gated": True,
        "bias": "none",
        "gain": 1.0,
        "weight_var": None,
        "bias_var": None,
    },
)

NGPT = Scheme(
    equation="h' = N(h + alpha (N(f(h)) - h)), N(x) = x/|x|; q and k of norm 1 times s_qk, "
    "softmax of sqrt(d_head) q k; gated ffn, u phi(v) with (u, v) = s_uv sqrt(d) W_1 h",
    init="every vector of a matrix along the embedding has norm 1, after every update too; "
    "alpha = 0.05, s_qk = s_uv = 1",
    paper="Loshchilov et al. 2024, arXiv:2410.01131",
    claim="every vector of the stream has norm 1, before and after each unit",
    wire=lambda _: Wiring(unit="ngpt"),
    defaults={"init": "normal", "activation": "silu"},
    constants=lambda _: {"alpha": NGPT_ALPHA, "s_qk": 1.0, "s_uv": 1.0},
    normalises=False,
    input_norm="unit",
    lacks=("rows of norm 1 and the scale s_z in the head: it is that of every stack",),
    pitfalls=(
        "softmax over sqrt(d_head) in place of times sqrt(d_head)",
        "weights not normalised before the first step",
        "alpha as one number: it is a vector, used by its absolute value",
    ),
)
