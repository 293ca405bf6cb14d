"""The zoo: published residual, normalisation and initialisation schemes, as data on one page.

A scheme is a choice of the template's scalars, norms and weight gains (`wiring`), place by place,
with the initialisation that its paper states. Sources are those of the papers named; what is
known to go wrong in public re-implementations stands in `pitfalls`.
"""

from __future__ import annotations

import math

from gradflow.errors import UsageError
from gradflow.schemes import streams
from gradflow.schemes.scheme import ALL as ALL
from gradflow.schemes.scheme import TOKENS as TOKENS
from gradflow.schemes.scheme import Scheme as Scheme
from gradflow.wiring import Place, Wiring


def deepnorm_constants(place: Place) -> dict[str, float]:
    """alpha = (2N)^(1/4), beta = (8N)^(-1/4), N the number of blocks (encoder or decoder only)."""
    return {"alpha": (2 * place.depth) ** 0.25, "beta": (8 * place.depth) ** -0.25}


def _deepnorm(place: Place) -> Wiring:
    alpha, beta = deepnorm_constants(place).values()
    gains = {"v": beta, "out": beta, "up": beta, "down": beta}
    return Wiring(a=alpha, norms=("out",), gains=gains)


def _gpt2(place: Place) -> Wiring:
    gain = 1 / math.sqrt(place.total)
    return Wiring(norms=("in",), gains={"out": gain, "down": gain})


SCHEMES: dict[str, Scheme] = {
    "plain": Scheme(
        equation="x' = f(x)",
        init="He: variance 2/fan_in before a rectifier",
        paper="He et al. 2015, arXiv:1502.01852",
        claim="|g_l|^2 = |g_L|^2 times the product of chi = weight_var E phi'^2",
        wire=lambda _: Wiring(a=0.0),
        blocks=("mlp", "conv", "transformer", "attention", "ffn"),
        plain=True,
        normalises=False,
    ),
    "pre-ln": Scheme(
        equation="x' = x + f(LN(x)), a final LN after the last layer",
        init="the stack's own",
        paper="Xiong et al. 2020, arXiv:2002.04745",
        claim="|g_l|^2 grows towards the input as a power law: (q_L / q_l)^(kappa/v)",
        wire=lambda _: Wiring(norms=("in",)),
        final_norm=True,
    ),
    "post-ln": Scheme(
        equation="x' = LN(x + f(x))",
        init="Xavier",
        paper="Vaswani et al. 2017, arXiv:1706.03762",
        claim="the gradient shrinks towards the input, by attention and token correlation",
        wire=lambda _: Wiring(norms=("out",)),
        defaults={"init": "xavier"},
    ),
    "gpt2": Scheme(
        equation="x' = x + f(LN(x)), a final LN after the last layer",
        init="N(0, 0.02); output projections over sqrt(2L), L blocks",
        paper="Radford et al. 2019 (GPT-2)",
        claim="|g_0|^2 / |g_L|^2 stays of order 1 at any depth",
        wire=_gpt2,
        defaults={"init": "normal"},
        constants=lambda place: {"output gain": 1 / math.sqrt(place.total)},
        final_norm=True,
        pitfalls=("2L counts sub-layers, not blocks",),
    ),
    "deepnorm": Scheme(
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
    ),
    "rezero": Scheme(
        equation="x' = x + alpha_l f(x), one alpha for the units of a block",
        init="alpha_l = 0",
        paper="Bachlechner et al. 2020, arXiv:2003.04887",
        claim="output = input; the gradient is the same at every layer, exactly",
        wire=lambda _: Wiring(b=0.0, learned="shared scalar"),
        blocks=ALL,
        normalises=False,
        pitfalls=("an alpha for each sub-layer: the official encoder shares one per layer",),
    ),
    "keel": Scheme(
        equation="x' = LN(alpha x + f(LN(x)))",
        init="the stack's own",
        paper="Chen & Wei 2026, arXiv:2601.19895",
        claim="|g_0| / |g_L| stays within 0.02 decades of 1",
        wire=lambda place: Wiring(a=float(place.total), norms=("in", "out")),
        constants=lambda place: {"alpha": float(place.total)},
        pitfalls=("alpha = number of blocks: it is that of sub-layers",),
    ),
    "b2t": streams.B2T,
    "residual-dual": streams.RESIDUAL_DUAL,
    "siamesenorm": streams.SIAMESENORM,
    "hyper-connections": streams.HYPER_CONNECTIONS,
    "mhc": streams.MHC,
    "mhc-uniform": streams.MHC_UNIFORM,
    "attnres": streams.ATTNRES,
    "denseformer": streams.DENSEFORMER,
    "value-residual": streams.VALUE_RESIDUAL,
}


def find(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in SCHEMES:
        rule = "--scheme is one of the known names"
        raise UsageError(rule, name, f"use {', '.join(SCHEMES)}")
    return SCHEMES[name]
