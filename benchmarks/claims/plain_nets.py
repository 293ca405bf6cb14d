"""Claims about nets without attention: plain, with batchnorm, residual."""

from __future__ import annotations

import math
from typing import Any

from claims.claim import Claim, Quantity, about, at_least
from claims.direct import cosine_exponent, cosine_factor
from claims.readings import branch_share, factor_per_layer, nats_per_layer

MLP: dict[str, Any] = {"block": "mlp", "shortcut": "plain", "norm": "none", "width": 256}
RELU = {**MLP, "activation": "relu", "depth": 50, "batch_size": 16}
TANH = {**MLP, "activation": "tanh", "depth": 50, "batch_size": 16, "bias_var": 0.05}
BATCHNORM = {**MLP, "norm": "post", "norm_kind": "batchnorm", "depth": 20}


def _growth(activation: dict[str, Any], variance: float, chi: float, wrong: float) -> Quantity:
    """Nats of |g|^2 per layer; `chi` is the factor that mean-field theory has for them."""
    bias = f", biases {activation['bias_var']}" if "bias_var" in activation else ""
    return Quantity(
        name=f"nats of |g|^2 per layer, variance {variance}/fan_in{bias}",
        options={**activation, "weight_var": variance},
        read=nats_per_layer,
        expected=about(math.log(chi), 0.03 if bias else 0.02, f"ln {chi:.4g}"),
        wrong={"weight_var": wrong},
    )


HE = Claim(
    title="He et al. 2015: the variance 2/fan_in",
    source="He et al. 2015, arXiv:1502.01852, section 2.2",
    setting="plain ReLU net, width 256, depth 50, 16 vectors; least squares over the layers",
    says="With weights of variance s/n a layer of rectifiers multiplies |g|^2 by s/2; s = 2 keeps "
    "it, and any other factor is exponential in depth.",
    quantities=(
        _growth(RELU, 1.6, 0.8, 2.0),
        _growth(RELU, 2.0, 1.0, 2.4),
        _growth(RELU, 2.4, 1.2, 1.6),
    ),
    seeds=5,
    note="A net of width n lies 2.5/n nats per layer lower (Hanin & Nica 2019): 0.01 here.",
)

# chi = s E phi'(z)^2 at the fixed point of the variance; tests/test_claims.py computes it anew.
PHASES = Claim(
    title="Poole, Schoenholz et al.: order and chaos",
    source="Poole et al. 2016, arXiv:1606.05340; Schoenholz et al. 2017, arXiv:1611.01232",
    setting="plain tanh net, biases of variance 0.05, width 256, depth 50, 16 vectors",
    says="Gradients vanish in the ordered phase and explode in the chaotic one, as chi^depth, "
    "chi = s E phi'^2; at the edge of chaos, chi = 1, they pass.",
    quantities=(
        _growth(TANH, 1.0, 0.7590, 1.76),
        _growth(TANH, 1.76, 1.0, 2.5),
        _growth(TANH, 2.5, 1.1337, 1.0),
    ),
    seeds=5,
)

YANG = Claim(
    title="Yang et al. 2019: batchnorm makes gradients explode",
    source="Yang et al. 2019, arXiv:1902.08129",
    setting="plain net, batchnorm after every layer, width 256, depth 20",
    says="ReLU, large batches: |g|^2 multiplies by pi/(pi - 1) per layer (|g| by 1.211). "
    "Linear, batch B: by (B - 2)/(B - 3).",
    quantities=(
        Quantity(
            name="factor of |g|^2 per layer, ReLU, B = 256",
            options={**BATCHNORM, "activation": "relu", "batch_size": 256},
            read=factor_per_layer,
            expected=about(math.pi / (math.pi - 1), 0.05, "pi/(pi - 1)"),
            wrong={"norm": "none"},
        ),
        Quantity(
            name="factor of |g|^2 per layer, linear, B = 8",
            options={**BATCHNORM, "activation": "linear", "batch_size": 8},
            read=factor_per_layer,
            expected=about(6 / 5, 0.05, "6/5"),
            wrong={"batch_size": 32},
        ),
    ),
)

SAMPLES: dict[str, Any] = {"activation": "relu", "width": 256, "batch_size": 64}
PLAIN_BN = {**SAMPLES, "block": "mlp", "shortcut": "plain", "norm": "pre", "depth": 4}
RESIDUAL = {**SAMPLES, "block": "ffn", "seq_len": 1, "ffn_mult": 1}
FROZEN = {"norm_kind": "batchnorm"}

BALDUZZI = Claim(
    title="Balduzzi et al. 2017: shattered gradients",
    source="Balduzzi et al. 2017, arXiv:1702.08591",
    setting="ReLU, width 256, 64 independent inputs, one cotangent for all, the statistics of "
    "batchnorm taken as constants; mean cosine between samples of dL/d(input)",
    says="The correlation between gradients falls as 2^-L in a plain net and as (3/4)^L in a "
    "residual one; with normalised branches it falls sublinearly, like 1/sqrt(L).",
    quantities=(
        Quantity(
            name="plain with batchnorm: factor per layer, L = 4",
            options={**PLAIN_BN, **FROZEN},
            read=cosine_factor,
            expected=about(0.5, 0.03),
            wrong={"shortcut": "residual"},
        ),
        Quantity(
            name="residual without norms: factor per layer, L = 2",
            options={**RESIDUAL, "norm": "none", "depth": 2},
            read=cosine_factor,
            expected=about(0.75, 0.05),
            wrong={"shortcut": "plain"},
        ),
        Quantity(
            name="the same, L = 20",
            options={**RESIDUAL, "norm": "none", "depth": 20},
            read=cosine_factor,
            expected=about(0.75, 0.05),
            wrong={"shortcut": "plain"},
        ),
        Quantity(
            name="residual with batchnorm: exponent of L, L = 8 ... 64",
            options={**RESIDUAL, **FROZEN},
            read=cosine_exponent,
            expected=at_least(-1),
            # (3/4)^L. A plain net with batchnorm would be no control: at L = 64 it has amplified
            # rounding to the size of its cosines, and their slope depends on the processor.
            wrong={"norm": "none", "norm_kind": None},
        ),
        Quantity(
            name="the same, against 1/sqrt(L)",
            options={**RESIDUAL, **FROZEN},
            read=cosine_exponent,
            expected=about(-0.5, 0.15),
            wrong={"shortcut": "plain"},
        ),
    ),
    seeds=5,
    note="(3/4)^L and 1/sqrt(L) hold for independent rows. Without norms the branches' rows grow "
    "alike with depth, and gradients shatter more slowly than (3/4)^L. ReLU also gives the "
    "samples a common mean, which batchnorm takes out of the variance by which it divides: "
    "1/l becomes 1.47/l, and the exponent -0.73. Plain nets without batchnorm shatter more "
    "slowly too.",
)

DE_SMITH = Claim(
    title="De & Smith 2020: batchnorm makes deep branches small",
    source="De & Smith 2020, arXiv:2002.10444",
    setting="he-v2 (x + W_2 phi(BN(W_1 phi(BN(x))))), width 32, 16 images of 8 x 8, depth 16",
    says="The stream's variance grows linearly, so that the branch of block l has a share of "
    "1/(l + 1): normalised branches shrink by the square root of the depth.",
    quantities=(
        Quantity(
            name="(l + 1) times the share of branch l, mean over l = 9 ... 16",
            options={
                **{"scheme": "he-v2", "block": "resnet", "depth": 16, "width": 32},
                **{"batch_size": 16, "image_size": 8},
            },
            read=branch_share,
            expected=about(1, 0.1),
            wrong={"scheme": None, "norm": "none"},
        ),
    ),
    seeds=5,
)

CLAIMS = (HE, PHASES, YANG, BALDUZZI, DE_SMITH)
