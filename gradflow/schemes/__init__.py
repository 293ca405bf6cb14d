"""The zoo: published residual, normalisation and initialisation schemes, as data.

A scheme is a choice of the template's scalars, norms and weight gains (`wiring`), place by place,
with the initialisation that its paper states. Sources are those of the papers named; what is
known to go wrong in public re-implementations stands in `pitfalls`.
"""

from __future__ import annotations

from gradflow.errors import UsageError
from gradflow.schemes import classic, deep, layernorm, streams
from gradflow.schemes.scheme import ALL as ALL
from gradflow.schemes.scheme import TOKENS as TOKENS
from gradflow.schemes.scheme import Scheme as Scheme

SCHEMES: dict[str, Scheme] = {
    "plain": classic.PLAIN,
    "he-v1": classic.HE_V1,
    "he-v2": classic.HE_V2,
    "highway": classic.HIGHWAY,
    "skipinit": classic.SKIPINIT,
    "rezero": classic.REZERO,
    "fixup": classic.FIXUP,
    "t-fixup": classic.T_FIXUP,
    "stochastic-depth": classic.STOCHASTIC_DEPTH,
    "layerscale": deep.LAYERSCALE,
    "post-ln": layernorm.POST_LN,
    "pre-ln": layernorm.PRE_LN,
    "gpt2": layernorm.GPT2,
    "peri-ln": layernorm.PERI_LN,
    "sandwich-ln": layernorm.SANDWICH_LN,
    "sub-ln": layernorm.SUB_LN,
    "normformer": layernorm.NORMFORMER,
    "mix-ln": layernorm.MIX_LN,
    "lns": layernorm.LNS,
    "hybridnorm": layernorm.HYBRIDNORM,
    "deepnorm": deep.DEEPNORM,
    "admin": deep.ADMIN,
    "keel": deep.KEEL,
    "depth-mup": deep.DEPTH_MUP,
    "completep": deep.COMPLETEP,
    "deepscalelm": deep.DEEPSCALELM,
    "ngpt": deep.NGPT,
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


def published_scheme(name: str) -> Scheme:
    """Return the published scheme of that name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in SCHEMES:
        rule = "--scheme is one of the known names"
        raise UsageError(rule, name, f"use {', '.join(SCHEMES)}")
    return SCHEMES[name]
