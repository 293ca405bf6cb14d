"""Initial weights: the law of every rule, and what the draws depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import CPU, network, small
from scipy import stats as laws
from torch import Tensor, nn

from gradflow.engine.walk import walk
from gradflow.networks.ends import build_loss, input_batch
from gradflow.networks.initial import generator_seed
from gradflow.networks.stack import build_block
from gradflow.specs.stack import StackSpec
from gradflow.specs.stack_fields import INITS

DEPTH = 6
# Wide enough that a variance is known to some percent.
BLOCKS: dict[str, dict[str, int]] = {
    "mlp": {"width": 160},
    "conv": {"width": 40},
    "resnet": {"width": 40},
    "attention": {"width": 160},
    "ffn": {"width": 96},
    "transformer": {"width": 96},
}
# Matrices that feed a rectifier, and output projections, by name.
FEED = ("linear", "conv", "conv1", "conv2", "up")
OUTPUT = ("conv2", "out", "down")


def spec_of(block: str, **options: Any) -> StackSpec:
    return StackSpec(**{"block": block, "depth": DEPTH, **BLOCKS[block], **options})


def parameters(spec: StackSpec, seed: int = 0, layer: int = 1) -> dict[str, Tensor]:
    """Weights and biases of the linear maps of one layer, by unit and name; norms left out."""
    block = build_block(spec, seed, layer, CPU)
    return {
        f"{unit.name}.{key.removeprefix('branch.')}": p.detach()
        for unit in block
        for key, p in unit.named_parameters()
        if "norm" not in key and not key.startswith(("before", "after"))
    }


def weights(spec: StackSpec, seed: int = 0, layer: int = 1) -> dict[str, Tensor]:
    return {k: w for k, w in parameters(spec, seed, layer).items() if k.endswith("weight")}


def biases(spec: StackSpec, seed: int = 0, layer: int = 1) -> dict[str, Tensor]:
    return {k: b for k, b in parameters(spec, seed, layer).items() if k.endswith("bias")}


def role(key: str) -> str:
    """`up` of `ffn.up.weight`."""
    return key.split(".")[1]


def fans(weight: Tensor) -> tuple[int, int]:
    """Inputs and outputs of one output and one input element."""
    kernel = weight[0, 0].numel()
    return weight.shape[1] * kernel, weight.shape[0] * kernel


Rule = Callable[[str, int, int, int], float]

# Variance of a weight: of its role, fan_in, fan_out and the number of residual units.
RULES: dict[str, Rule] = {
    "he": lambda name, i, o, units: (2 if name in FEED else 1) / i,
    "xavier": lambda name, i, o, units: 2 / (i + o),
    "lecun": lambda name, i, o, units: 1 / i,
    "normal": lambda name, i, o, units: 0.02**2,
    "gpt2": lambda name, i, o, units: 0.02**2 / (units if name in OUTPUT else 1),
    "orthogonal": lambda name, i, o, units: (2 if name in FEED else 1) / i,
    "torch": lambda name, i, o, units: 1 / (3 * i),
}


def assert_variance(values: Tensor, variance: float) -> None:
    """Within 5 standard errors of a Gaussian's sample variance, sqrt(2 / n); mean as close."""
    wide, n = values.double(), values.numel()
    assert wide.square().mean().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))
    assert abs(wide.mean().item()) < 5 * math.sqrt(variance / n)


def test_every_rule_has_its_law() -> None:
    assert set(RULES) == set(INITS)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("init", INITS)
def test_every_matrix_has_the_variance_of_its_rule(block: str, init: str) -> None:
    spec = spec_of(block, init=init, activation="relu")
    units = DEPTH * spec.units_per_block
    for key, weight in weights(spec).items():
        assert_variance(weight, RULES[init](role(key), *fans(weight), units))


@pytest.mark.parametrize(("activation", "gain"), [("gelu", 2), ("silu", 2), ("tanh", 1)])
@pytest.mark.parametrize("init", ["he", "orthogonal"])
def test_he_doubles_the_variance_before_rectifiers_alone(
    init: str, activation: str, gain: int
) -> None:
    weight = weights(spec_of("ffn", init=init, activation=activation))["ffn.up.weight"]
    assert_variance(weight, gain / fans(weight)[0])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("init", set(INITS) - {"torch"})
def test_biases_start_at_zero_and_norms_at_one(block: str, init: str) -> None:
    spec = spec_of(block, init=init)
    assert all((b == 0).all() for b in biases(spec).values())
    for key, p in build_block(spec, 0, 1, CPU).named_parameters():
        if "norm" in key or "before" in key:
            assert (p == (1 if key.endswith("weight") else 0)).all()


@pytest.mark.parametrize("block", ["mlp", "conv", "attention", "ffn"])
def test_torch_rule_is_the_law_of_torchs_own_layers(block: str) -> None:
    """Uniform within +-1/sqrt(fan_in), weights and biases, as `nn.Linear` and `nn.Conv2d` draw."""
    ours = parameters(spec_of(block, init="torch"))
    for key, weight in weights(spec_of(block, init="torch")).items():
        bound = 1 / math.sqrt(fans(weight)[0])
        layer = torch_layer(weight)
        for end in ("weight", "bias"):
            values = ours.get(key.replace("weight", end))
            if values is not None:  # the keys of attention have no bias
                assert_uniform(values, getattr(layer, end).detach(), bound)


def torch_layer(weight: Tensor) -> nn.Module:
    """Torch's own layer of this size."""
    fan_out, fan_in = weight.shape[:2]
    return nn.Conv2d(fan_in, fan_out, 3) if weight.ndim == 4 else nn.Linear(fan_in, fan_out)


def assert_uniform(ours: Tensor, theirs: Tensor, bound: float) -> None:
    """Both within the bound, of one law, and that law uniform (Kolmogorov-Smirnov)."""
    one, other = ours.flatten().numpy(), theirs.flatten().numpy()
    assert max(abs(one).max(), abs(other).max()) <= bound * (1 + 1e-6)
    assert laws.ks_2samp(one, other).pvalue > 1e-4
    assert laws.kstest(one, laws.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4


@pytest.mark.parametrize("block", ["mlp", "resnet", "transformer"])
def test_drawn_weights_are_gaussian(block: str) -> None:
    for key, weight in weights(spec_of(block, activation="tanh")).items():
        normal = weight.flatten() * math.sqrt(fans(weight)[0])
        assert laws.kstest(normal.numpy(), "norm").pvalue > 1e-4, key


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", BLOCKS)
def test_orthogonal_matrices_are_orthogonal(block: str, dtype: str) -> None:
    """W W^T or W^T W, whichever is smaller, is a multiple of the identity."""
    for key, weight in weights(spec_of(block, init="orthogonal", dtype=dtype)).items():
        w = weight.flatten(1).double()
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        scale = (2 if role(key) in FEED else 1) / w.shape[1] * max(w.shape)
        tolerance = 1e-12 if dtype == "float64" else 1e-5
        torch.testing.assert_close(
            gram, scale * torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=tolerance * scale
        )


def test_orthogonal_matrices_have_no_preferred_sign() -> None:
    """Without the signs of R, QR gives a lopsided diagonal; of a Haar matrix it is symmetric."""
    drawn = [
        weights(spec_of("mlp", init="orthogonal"), seed)["mlp.linear.weight"] for seed in (0, 1)
    ]
    diagonal = torch.cat([w.diagonal() for w in drawn])
    assert abs((diagonal > 0).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(len(diagonal))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("block", BLOCKS)
def test_weight_var_is_the_variance_times_fan_in(block: str, init: str) -> None:
    for weight in weights(spec_of(block, init=init, weight_var=1.7)).values():
        assert_variance(weight, 1.7 / fans(weight)[0])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("block", ["mlp", "transformer"])
def test_bias_var_is_the_variance_of_the_biases(block: str, init: str) -> None:
    spec = spec_of(block, init=init, bias_var=0.05)
    layers = [biases(spec, layer=layer) for layer in range(1, DEPTH + 1)]
    for key in layers[0]:
        assert_variance(torch.cat([layer[key] for layer in layers]), 0.05)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("block", BLOCKS)
def test_gain_multiplies_every_weight(block: str, init: str) -> None:
    plain, doubled = (weights(spec_of(block, init=init, gain=g)) for g in (1.0, 2.0))
    assert all(torch.equal(doubled[key], 2 * w) for key, w in plain.items())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_layer_does_not_depend_on_the_depth_unless_gpt2(block: str, init: str) -> None:
    short, long = (weights(spec_of(block, init=init, depth=d), layer=2) for d in (2, 8))
    for key, w in short.items():
        if init == "gpt2" and role(key) in OUTPUT:
            torch.testing.assert_close(long[key], w / 2, rtol=1e-6, atol=0)
        else:
            assert torch.equal(long[key], w)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-6), ("bfloat16", 2**-7), ("float16", 2**-10)]
)
def test_every_number_format_has_the_same_weights(dtype: str, tolerance: float, init: str) -> None:
    """To the rounding of the coarser one; an orthogonal matrix is made from the rounded draw."""
    options = {"init": init, "bias_var": 0.05}
    want, got = (parameters(small("transformer", dtype=d, **options)) for d in ("float32", dtype))
    # Below its normal numbers a format is as coarse as its smallest one.
    limits = torch.finfo(getattr(torch, dtype))
    subnormal = 2 * limits.tiny * limits.eps
    for key, p in got.items():
        spread = want[key].abs().max().item()
        floor = 8 * tolerance * spread if init == "orthogonal" else subnormal
        torch.testing.assert_close(p.float(), want[key], rtol=tolerance, atol=floor)
    coarse, fine = (input_batch(small("mlp", dtype=d), 0, CPU) for d in (dtype, "float32"))
    torch.testing.assert_close(coarse.float(), fine, rtol=tolerance, atol=0)


def test_layers_and_seeds_differ() -> None:
    spec = spec_of("mlp")
    drawn = [weights(spec, seed, layer)["mlp.linear.weight"] for seed in (0, 1) for layer in (1, 2)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            cosine = torch.dot(one.flatten(), other.flatten()) / (one.norm() * other.norm())
            assert abs(cosine) < 5 / math.sqrt(one.numel())


def test_input_target_cotangent_and_labels_have_draws_of_their_own() -> None:
    spec = small("ffn", batch_size=40, seq_len=20)
    x = input_batch(spec, 0, CPU)
    v = build_loss(spec, 0, CPU).v
    target = build_loss(small("ffn", batch_size=40, seq_len=20, loss="mse"), 0, CPU).target
    for one, other in ((x, v), (x, target), (v, target), (x, input_batch(spec, 1, CPU))):
        cosine = torch.dot(one.flatten(), other.flatten()) / (one.norm() * other.norm())
        assert abs(cosine) < 5 / math.sqrt(one.numel())
    assert_variance(x, 1)
    labels = build_loss(small("ffn", batch_size=40, seq_len=20, loss="ce"), 0, CPU).labels
    counts = torch.bincount(labels, minlength=10).numpy()
    assert laws.chisquare(counts).pvalue > 1e-4


def test_the_heads_projection_keeps_the_variance() -> None:
    spec = StackSpec(block="mlp", loss="ce", width=200, classes=100)
    assert_variance(build_loss(spec, 0, CPU).project.weight.detach(), 1 / 200)


def test_generator_seeds_are_distinct_and_fit_32_bits() -> None:
    seeds = [
        generator_seed(seed, purpose, index)
        for seed in (0, 1, 2**40)
        for purpose in ("layer", "input")
        for index in range(2000)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("loss", ["cotangent", "mse", "ce"])
@pytest.mark.parametrize("init", ["he", "orthogonal", "torch"])
def test_the_global_generator_is_untouched_and_irrelevant(init: str, loss: str) -> None:
    spec = small("transformer", init=init, loss=loss, bias_var=None)
    records = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        records.append(walk(spec, 0, network(spec)).records())
        assert torch.equal(torch.get_rng_state(), before)
    assert records[0] == records[1]


def test_a_layer_can_be_replayed_alone() -> None:
    spec = small("transformer")
    whole = network(spec, seed=5).blocks[2].state_dict()
    alone = build_block(spec, 5, 3, CPU).state_dict()
    assert all(torch.equal(alone[key], p) for key, p in whole.items())
