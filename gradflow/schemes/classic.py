"""Schemes without norms, and those of convolutional nets."""

from __future__ import annotations

import math

from gradflow.schemes.scheme import ALL_BUT_RESNET, TOKEN_BLOCKS, Scheme
from gradflow.schemes.unit_kinds import UnitKind
from gradflow.schemes.wiring import OUTPUT_PROJECTIONS, Place, Wiring

PLAIN = Scheme(
    equation="x' = f(x)",
    init="He: variance 2/fan_in before a rectifier",
    paper="He et al. 2015, arXiv:1502.01852",
    claim="|g_l|^2 = |g_L|^2 times the product of chi = weight_var E phi'^2",
    wire=lambda _: Wiring(a=0.0),
    blocks=("mlp", "conv", "transformer", "attention", "ffn"),
    plain=True,
    normalises=False,
)

HE_V1 = Scheme(
    equation="x' = phi(x + BN(W_2 phi(BN(W_1 x))))",
    init="He: variance 2/fan_in",
    paper="He et al. 2015, arXiv:1512.03385",
    claim="the activation after the addition stops the shortcut: the stream only grows",
    wire=lambda _: Wiring(norms=("out",)),
    blocks=("resnet",),
    pitfalls=("the last activation left out, or put before the addition",),
)

HE_V2 = Scheme(
    equation="x' = x + W_2 phi(BN(W_1 phi(BN(x)))), BN and phi after the last block",
    init="He: variance 2/fan_in",
    paper="He et al. 2016, arXiv:1603.05027",
    claim="the variance grows linearly: the branch of block l has a share of 1/(l + 1)",
    wire=lambda _: Wiring(norms=("in",)),
    blocks=("resnet",),
    final_norm=True,
    final_activation=True,
    pitfalls=("no BN and activation between the last block and the pooling",),
)

# "e.g. -1, -3 etc.", section 2.2 of arXiv:1507.06228.
_GATE_BIAS = -1.0

HIGHWAY_UNIT = UnitKind(
    implementation="gradflow.networks.units.highway:HighwayUnit",
    settings=("gate_bias",),
    blocks=("mlp", "conv"),
)

HIGHWAY = Scheme(
    equation="x' = T(x) f(x) + (1 - T(x)) x, T(x) = sigmoid(W_T x + b_T)",
    init="the stack's own; b_T = -1",
    paper="Srivastava et al. 2015, arXiv:1505.00387",
    claim="|g_0|^2 / |g_L|^2 is about ((1 - t)^2 + t^2 chi)^L, t = sigmoid(b_T)",
    wire=lambda _: Wiring(unit="highway", settings={"gate_bias": _GATE_BIAS}),
    blocks=("mlp", "conv"),
    constants=lambda _: {"b_T": _GATE_BIAS, "t": 1 / (1 + math.exp(-_GATE_BIAS))},
    normalises=False,
    pitfalls=("b_T = 0: half of the stream is gone after each layer",),
)

SKIPINIT = Scheme(
    equation="x' = x + alpha f(x)",
    init="alpha = 0; no norms",
    paper="De & Smith 2020, arXiv:2002.10444",
    claim="output = input; the gradient is the same at every layer, exactly",
    wire=lambda _: Wiring(b=0.0, learned="scalar"),
    blocks=("resnet", *ALL_BUT_RESNET),
    constants=lambda _: {"alpha": 0.0},
    normalises=False,
    pitfalls=("alpha per channel: it is one number per branch",),
)

REZERO = Scheme(
    equation="x' = x + alpha_l f(x), one alpha for the units of a block",
    init="alpha_l = 0",
    paper="Bachlechner et al. 2020, arXiv:2003.04887",
    claim="output = input; the gradient is the same at every layer, exactly",
    wire=lambda _: Wiring(b=0.0, learned="shared scalar"),
    blocks=ALL_BUT_RESNET,
    constants=lambda _: {"alpha": 0.0},
    normalises=False,
    pitfalls=("an alpha for each sub-layer: the official encoder shares one per layer",),
)

# m, the matrices of a branch one after the other. The authors' Transformer counts 4 in attention.
_BRANCH_MATRICES = {"resnet": 2, "ffn": 2, "attention": 4}
_FIXUP_INNER = {"resnet": ("conv1",), "ffn": ("up",), "attention": ("q", "k", "v")}


def fixup_constants(place: Place) -> dict[str, float]:
    """Return the gain L^(-1/(2m-2)) of inner matrices, L branches of m matrices, and the last 0."""
    inner = place.total ** (-1 / (2 * _BRANCH_MATRICES[place.kind] - 2))
    return {"inner gain": inner, "last gain": 0.0}


def _fixup(place: Place) -> Wiring:
    inner, last = fixup_constants(place).values()
    gains = dict.fromkeys(_FIXUP_INNER[place.kind], inner) | {OUTPUT_PROJECTIONS[place.kind]: last}
    return Wiring(b=1.0, learned="scalar", gains=gains, unit="fixup")


FIXUP_UNIT = UnitKind(
    implementation="gradflow.networks.units.fixup:FixupUnit",
    blocks=("resnet", *TOKEN_BLOCKS),
    fixed_options={"gated": False, "bias": "none", "bias_var": None},
    has_own_shortcut=False,
)

FIXUP = Scheme(
    equation="x' = x + s f(x), a scalar bias before each linear map and each activation in f",
    init="He times L^(-1/(2m-2)), L branches of m matrices; the last one 0; s = 1, biases 0",
    paper="Zhang, Dauphin & Ma 2019, arXiv:1901.09321",
    claim="the gradient is the same at every layer; the first update does not depend on L",
    wire=_fixup,
    blocks=("resnet", *TOKEN_BLOCKS),
    constants=fixup_constants,
    normalises=False,
    lacks=(
        "a classifier that starts at 0: the ce head is drawn as every stack's",
        "on resnet the paper's form with the activation after the addition: here it comes first",
    ),
    pitfalls=(
        "L counts residual branches: two per transformer block",
        "L^(-1/2) for every m: it is that of m = 2",
        "biases per channel: they are one number each",
    ),
)


def t_fixup_constants(place: Place) -> dict[str, float]:
    """Return the gain 0.67 N^(-1/4) of an encoder of N blocks, (9N)^(-1/4) for the embedding."""
    return {"gain": 0.67 * place.depth**-0.25, "embedding gain": _embedding_gain(place.depth)}


def _embedding_gain(depth: int) -> float:
    return (9 * depth) ** -0.25


def _t_fixup(place: Place) -> Wiring:
    gain = t_fixup_constants(place)["gain"]
    return Wiring(gains=dict.fromkeys(("v", "out", "up", "down"), gain))


T_FIXUP = Scheme(
    equation="x' = x + f(x), no norms",
    init="Xavier; W_v, W_o, W_1, W_2 times 0.67 N^(-1/4); the embedding times (9N)^(-1/4)",
    paper="Huang et al. 2020, PMLR 119 (T-Fixup), as an encoder",
    claim="the first update is bounded at any depth without norms or warm-up",
    wire=_t_fixup,
    defaults={"init": "xavier"},
    constants=t_fixup_constants,
    normalises=False,
    input_scale=_embedding_gain,
    pitfalls=(
        "the decoder's (9N)^(-1/4) in an encoder, whose gain is 0.67 N^(-1/4)",
        "the authors' extra sqrt(2) on W_v undoes fairseq's 1/sqrt(2), it is no part of the scheme",
        "queries and keys scaled too",
    ),
)


def survival(place: Place) -> dict[str, float]:
    """Return the survival probability p_l = 1 - (l/L)(1 - p_L), p_L = 0.5."""
    return {"p": 1 - place.layer / place.depth * 0.5}


def _stochastic_depth(place: Place) -> Wiring:
    return Wiring(norms=("out",), unit="stochastic", settings={"keep": survival(place)["p"]})


STOCHASTIC_UNIT = UnitKind(
    implementation="gradflow.networks.units.stochastic_depth:StochasticUnit",
    settings=("keep",),
    blocks=None,
    has_own_shortcut=False,
    draws_each_step=True,
)

STOCHASTIC_DEPTH = Scheme(
    equation="x' = phi(x + b_l f(x)), f as in he-v1, b_l = 1 with probability p_l, else 0",
    init="He; p_l = 1 - (l/L)(1 - p_L), p_L = 0.5; b_l is drawn for each batch, for all of it",
    paper="Huang et al. 2016, arXiv:1603.09382",
    claim="(3L - 1)/4 branches are active on average; a dropped one has no gradient",
    wire=_stochastic_depth,
    blocks=("resnet",),
    constants=survival,
    pitfalls=(
        "p_l constant over the layers: it falls linearly from 1",
        "f divided by p_l while training: the paper multiplies by p_l at test time",
        "drawn for each sample (DropPath): the paper drops a layer for the whole batch",
    ),
)
