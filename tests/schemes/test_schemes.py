"""The single-stream zoo against its equations, written a second time (`scheme_oracle`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import scheme_oracle
import torch
from problems import CPU, SIZES, network, thinned
from torch import Tensor
from walk_checks import (
    assert_layers,
    assert_params,
    cells,
    saved_storages,
    unit_by_unit,
    whole_graph,
)

from gradflow.engine.tape import Network, record_forward
from gradflow.engine.walk import loss_gradient, vjp, walk
from gradflow.errors import UsageError
from gradflow.networks.ends import build_loss, input_batch
from gradflow.networks.stack import build_block
from gradflow.schemes import SCHEMES, Place, Wiring
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.stack import StackSpec

NAMES = tuple(scheme_oracle.EQUATIONS)
OWN = {"heads": 3, "ffn_mult": 2, "seq_len": 5, "image_size": 5}


def small(scheme: str, block: str, **options: Any) -> StackSpec:
    """Four layers, the fewest of which mix-ln makes one a Post-LN block."""
    kind = BLOCKS[block]
    own = {name: OWN[name] for name in kind.options if name in OWN}
    sizes = SIZES[kind.domain] | own | {"depth": 4, "dtype": "float64"}
    return StackSpec(**{"scheme": scheme, "block": block, **sizes, **options})


def perturbed(spec: StackSpec, seed: int = 0) -> Network:
    """The stack with every parameter moved, so that no scale is 0 or 1 and no shift is 0."""
    net = network(spec, seed)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in net.blocks:
            for p in block.parameters():
                p.add_(torch.randn(p.shape, generator=source, dtype=p.dtype), alpha=0.2)
            for unit in block.units:
                unit.seal()
    return net


def engine(net: Network) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output, dL/dx of every unit's input, and dL/dparameters, unit by unit."""
    tapes = list(record_forward(net))
    _, g = loss_gradient(net.loss, tapes[-1].y)
    inputs, weights = [], []
    for tape in reversed(tapes):
        parts, grads = vjp(tape, g)
        g = sum(parts)
        inputs, weights = [g, *inputs], [*grads, *weights]
    return tapes[-1].y.detach(), inputs, weights


def relative(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """|got - want| / |want|; `floor` is added to |want|."""
    return ((got - want).norm() / (want.norm() + floor)).item() if got.numel() else 0.0


def largest_error(spec: StackSpec, net: Network) -> float:
    """Of the output, the gradient at every unit's input, and that of every parameter."""
    steps = scheme_oracle.backward(spec, net)
    y, inputs, weights = engine(net)
    true = [p.grad for step in steps for p in step.params.values()]
    # Some gradients are zero but for rounding: a dropped branch, a shift before a softmax.
    floor = 1e-6 * max(g.norm().item() for g in true)
    errors = [relative(y, steps[-1].y.detach())]
    errors += [relative(g, step.x.grad) for g, step in zip(inputs, steps, strict=True)]
    errors += [relative(g, want, floor) for g, want in zip(weights, true, strict=True)]
    return max(errors)


CASES = [(name, block) for name in NAMES for block in SCHEMES[name].blocks]
CAUSAL = [(name, "transformer") for name in NAMES if "transformer" in SCHEMES[name].blocks]


@pytest.mark.parametrize(("name", "block"), CASES)
def test_forward_and_every_gradient_are_the_equation_s(name: str, block: str) -> None:
    spec = small(name, block)
    assert largest_error(spec, perturbed(spec)) < 1e-9


@pytest.mark.parametrize(("name", "block"), CAUSAL)
def test_the_same_under_a_causal_mask(name: str, block: str) -> None:
    spec = small(name, block, causal=True)
    assert largest_error(spec, perturbed(spec)) < 1e-9


@pytest.mark.parametrize(("name", "block"), thinned(CASES))
def test_every_column_is_the_equation_s(name: str, block: str) -> None:
    spec = small(name, block)
    net = perturbed(spec)
    layers, params = walk(spec, 0, net).records()
    true_layers, true_params = scheme_oracle.measure(spec, scheme_oracle.backward(spec, net))
    assert_layers(spec, [cells(row) for row in layers], true_layers)
    assert_params(spec, [cells(row) for row in params], true_params)


def test_every_equation_has_a_scheme_and_is_told_apart() -> None:
    """Negative control: no scheme conforms to another's equation, but for twins.

    An equation that asks for weights which the other scheme does not have is refused as well.
    """
    assert set(NAMES) <= set(SCHEMES)
    twins = ({"pre-ln", "gpt2"}, {"skipinit", "rezero"})
    names = [name for name, _ in CAUSAL]
    for name in names:
        spec = small(name, "transformer", depth=5)
        net = perturbed(spec)
        others = [other for other in names if other != name and {other, name} not in twins]
        assert [other for other in others if not differs(spec, net, other)] == []


def differs(spec: StackSpec, net: Network, other: str) -> bool:
    """Whether another scheme's equation does not give this stack's output."""
    try:
        y = scheme_oracle.forward(spec, net, other)[-1].y
    except (KeyError, RuntimeError):  # weights or shapes that the stack does not have
        return True
    return relative(engine(net)[0], y.detach()) > 1e-6


@pytest.mark.parametrize(("name", "block"), thinned(CASES))
def test_gradients_are_bitwise_those_of_the_whole_graph(name: str, block: str) -> None:
    """In float32; those of rezero's shared alpha come unit by unit in the engine."""
    net = perturbed(small(name, block, dtype="float32"))
    (outputs, weights), (true_outputs, true_weights) = unit_by_unit(net), whole_graph(net)
    assert all(torch.equal(g, want) for g, want in zip(outputs, true_outputs, strict=True))
    if name != "rezero":
        assert all(torch.equal(g, want) for g, want in zip(weights, true_weights, strict=True))


@pytest.mark.parametrize(("name", "block"), thinned(CASES))
def test_saved_bytes_are_those_that_the_graph_holds(name: str, block: str) -> None:
    """But for constants of the wiring, which the graph keeps as numbers of 8 bytes."""
    spec = small(name, block)
    net = network(spec)
    rows, _ = walk(spec, 0, net).records()
    for row, tape in zip(rows[1:], record_forward(net), strict=True):
        own = {p.untyped_storage().data_ptr() for p in tape.unit.parameters()}
        assert saved_storages(tape.y, own) - int(row.saved_bytes or 0) in (0, 8, 16)


def test_units_share_rezero_s_alpha_and_their_gradients_add_up() -> None:
    spec = small("rezero", "transformer")
    net = perturbed(spec)
    steps = scheme_oracle.backward(spec, net)
    for block in net.blocks:
        attention, ffn = block.units
        assert attention.scale.weight is ffn.scale.weight
    x = net.x
    for block in net.blocks:
        x = block(x)
    net.loss(x).backward()
    for layer, block in enumerate(net.blocks, start=1):
        parts = [s.params["scale.weight"].grad for s in steps if s.layer == layer]
        assert relative(next(iter(block.units)).scale.weight.grad, sum(parts)) < 1e-9


# From the papers' formulas at N = 6, 24 and 100 blocks of a transformer.
DEPTHS = (6, 24, 100)
CONSTANTS: dict[str, dict[str, tuple[float, float, float]]] = {
    "deepnorm": {
        "alpha": (1.8612097182041991, 2.6321480259049848, 3.7606030930863934),
        "beta": (0.37991784282579627, 0.26864248295588174, 0.18803015465431967),
    },
    "keel": {"alpha": (12.0, 48.0, 200.0)},
    "gpt2": {"output gain": (0.2886751345948129, 0.14433756729740643, 0.07071067811865475)},
    "sandwich-ln": {"output gain": (0.2886751345948129, 0.14433756729740643, 0.07071067811865475)},
    "hybridnorm": {"output gain": (0.2886751345948129, 0.14433756729740643, 0.07071067811865475)},
    "sub-ln": {"gamma": (1.5763586678760644, 1.9675367876885788, 2.301807413001365)},
    "t-fixup": {
        "gain": (0.4280918798450026, 0.30270667120929806, 0.21187260323128143),
        "embedding gain": (0.36889397323344053, 0.26084743001221455, 0.18257418583505536),
    },
    "layerscale": {"lambda": (0.1, 1e-5, 1e-6)},
    "mix-ln": {"post-ln blocks": (1, 6, 25)},
    "depth-mup": {"branch weight": (0.4082482904638631, 0.2041241452319315, 0.1)},
    "completep": {"branch weight": (1 / 3, 1 / 12, 0.02)},
    "deepscalelm": {
        "lambda": (0.816496580927726, 0.9574271077563381, 0.98994949366116647),
        "beta": (0.5773502691896257, 0.28867513459481287, 0.1414213562373095),
    },
    "highway": {"b_T": (-1, -1, -1), "t": (0.2689414213699951,) * 3},
    "skipinit": {"alpha": (0, 0, 0)},
    "rezero": {"alpha": (0, 0, 0)},
    "ngpt": {"alpha": (0.05,) * 3, "s_qk": (1,) * 3, "s_uv": (1,) * 3},
}
# At block 3 of 6, 24 and 100.
BY_LAYER = {
    "lns": {"factor": (0.5773502691896257,) * 3},
    "stochastic-depth": {"p": (0.75, 0.9375, 0.985)},
}


def place(depth: int, layer: int = 1, kind: str = "ffn") -> Place:
    units = 2 if kind in ("attention", "ffn") else 1
    return Place(depth, layer, units - 1, units, kind)


@pytest.mark.parametrize("name", [*CONSTANTS, *BY_LAYER])
def test_constants_are_the_paper_s_at_three_depths(name: str) -> None:
    layer = 3 if name in BY_LAYER else 1
    for constant, values in (CONSTANTS | BY_LAYER)[name].items():
        for depth, value in zip(DEPTHS, values, strict=True):
            got = SCHEMES[name].constants(place(depth, layer))[constant]
            assert got == pytest.approx(value, rel=1e-12)


# L^(-1/(2m-2)): 12, 48 and 200 branches of a transformer; 6, 24 and 100 of a resnet.
FIXUP = {
    "attention": (0.6609010760833647, 0.5245575317108241, 0.41351855420001377),
    "ffn": (0.2886751345948129, 0.14433756729740643, 0.07071067811865475),
    "resnet": (0.4082482904638631, 0.2041241452319315, 0.1),
}


@pytest.mark.parametrize("kind", FIXUP)
def test_fixup_scales_by_the_number_of_matrices_in_a_branch(kind: str) -> None:
    for depth, value in zip(DEPTHS, FIXUP[kind], strict=True):
        got = SCHEMES["fixup"].constants(place(depth, kind=kind))
        assert got == {"inner gain": pytest.approx(value, rel=1e-12), "last gain": 0.0}


def test_deepscalelm_s_token_correlation_is_the_recursion_s() -> None:
    """Two blocks by hand: attention mixes 1 in, the ffn its arc-cosine kernel."""
    share, r = 2 / 24, 0.221
    r = r * (1 - share) + share * 1.0
    kernel = (math.sqrt(1 - r**2) + (math.pi - math.acos(r)) * r) / math.pi
    r = (1 - share) * r + share * kernel
    constants = SCHEMES["deepscalelm"].constants
    assert constants(place(24))["r"] == 0.221
    assert constants(place(24, 2))["r"] == pytest.approx(r, rel=1e-12)
    assert [constants(place(24, n))["r"] for n in range(1, 25)] == sorted(
        constants(place(24, n))["r"] for n in range(1, 25)
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_says_what_it_is(name: str) -> None:
    scheme = SCHEMES[name]
    assert min(map(len, (scheme.equation, scheme.init, scheme.paper, scheme.claim))) > 3
    assert any(character.isdigit() for character in scheme.paper)
    assert set(scheme.blocks) <= set(BLOCKS)
    assert StackSpec(scheme=name).block == scheme.blocks[0]


def test_deepscalelm_refuses_depths_without_a_shortcut() -> None:
    with pytest.raises(UsageError, match="--depth 3 or more"):
        StackSpec(scheme="deepscalelm", depth=2)


# Initial variances of every matrix. N blocks, l the block, i and o fan_in and fan_out.
Rule = Callable[[str, int, int, int, int], float]
N, LAYER = 6, 3
VALUE_PATH = ("v", "out", "up", "down")
OUTPUTS = ("out", "down")


def xavier(_: str, i: int, o: int) -> float:
    return 2 / (i + o)


def he(role: str, i: int) -> float:
    return (2 if role in ("up", "linear", "conv", "conv1", "conv2") else 1) / i


def deepscalelm_rule(role: str, i: int, o: int) -> float:
    """sqrt(1/2)/d for both matrices of the ffn at width 4d, sqrt(1/r)/d for v and out."""
    d, r = min(i, o), SCHEMES["deepscalelm"].constants(place(N, LAYER))["r"]
    if role in ("q", "k"):
        return 1 / d
    return math.sqrt(1 / 2 if role in ("up", "down") else 1 / r) / d


def fixup_rule(role: str, i: int, block: str) -> float:
    if role in ("out", "down", "conv2"):
        return 0.0
    branches = 2 * N if block == "transformer" else N
    exponent = 1 / 6 if role in ("q", "k", "v") else 1 / 2
    return he(role, i) * branches ** (-2 * exponent)


VARIANCES: dict[str, Callable[[str, int, int], float]] = {
    "plain": lambda role, i, o: he(role, i),
    "he-v1": lambda role, i, o: 2 / i,
    "he-v2": lambda role, i, o: 2 / i,
    "stochastic-depth": lambda role, i, o: 2 / i,
    "highway": lambda role, i, o: he(role, i),
    "skipinit": lambda role, i, o: he(role, i),
    "rezero": lambda role, i, o: he(role, i),
    "fixup": lambda role, i, o: fixup_rule(role, i, "transformer"),
    "t-fixup": lambda role, i, o: (
        xavier(role, i, o) * ((0.67 * N**-0.25) ** 2 if role in VALUE_PATH else 1)
    ),
    "layerscale": lambda role, i, o: 0.02**2,
    "post-ln": xavier,
    "pre-ln": lambda role, i, o: he(role, i),
    "gpt2": lambda role, i, o: 0.02**2 / (2 * N if role in OUTPUTS else 1),
    "peri-ln": lambda role, i, o: he(role, i),
    "sandwich-ln": lambda role, i, o: 0.02**2 / (2 * N if role in OUTPUTS else 1),
    "sub-ln": lambda role, i, o: (
        xavier(role, i, o) * (math.log(2 * N) if role in VALUE_PATH else 1)
    ),
    "normformer": lambda role, i, o: he(role, i),
    "mix-ln": lambda role, i, o: he(role, i),
    "lns": lambda role, i, o: he(role, i),
    "hybridnorm": lambda role, i, o: 0.02**2 / (2 * N if role in OUTPUTS else 1),
    "deepnorm": lambda role, i, o: (
        xavier(role, i, o) * ((8 * N) ** -0.5 if role in VALUE_PATH else 1)
    ),
    "admin": xavier,
    "keel": lambda role, i, o: he(role, i),
    "depth-mup": lambda role, i, o: he(role, i),
    "completep": lambda role, i, o: he(role, i),
    "deepscalelm": deepscalelm_rule,
    # Vectors of length 1 along the embedding: those of W_1 and q, k, v are rows, else columns.
    "ngpt": lambda role, i, o: 1 / (o if role in OUTPUTS else i),
}


def matrices(spec: StackSpec) -> list[tuple[str, Tensor]]:
    block = build_block(spec, 0, LAYER, CPU)
    named = [pair for unit in block for pair in unit.named_parameters()]
    return [(name.split(".")[-2], p.detach()) for name, p in named if p.dim() > 1]


def assert_variance(values: Tensor, variance: float) -> None:
    """Within 5 standard errors of a Gaussian's sample variance."""
    mean_square = values.double().square().mean().item()
    assert mean_square == pytest.approx(variance, rel=5 * math.sqrt(2 / values.numel()), abs=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_has_the_variance_of_its_scheme(name: str) -> None:
    blocks = SCHEMES[name].blocks
    block = "transformer" if "transformer" in blocks else blocks[0]
    sizes = {"width": 64} if block != "resnet" else {"width": 32}
    spec = StackSpec(scheme=name, block=block, depth=N, activation="relu", **sizes)
    for role, weight in matrices(spec):
        o, i = weight.shape[0], weight[0].numel()
        variance = 1 / i if role == "gate" else VARIANCES[name](role, i, o)
        assert_variance(weight, variance)


def test_fixup_on_a_resnet_counts_its_own_branches() -> None:
    spec = StackSpec(scheme="fixup", block="resnet", depth=N, width=32)
    for role, weight in matrices(spec):
        assert_variance(weight, fixup_rule(role, weight[0].numel(), "resnet"))


def test_an_option_overrides_a_scheme_s_part_and_its_gains_stay() -> None:
    spec = StackSpec(scheme="deepnorm", depth=N, width=64, init="he", activation="relu")
    for role, weight in matrices(spec):
        beta = (8 * N) ** -0.25 if role in VALUE_PATH else 1
        assert_variance(weight, he(role, weight[0].numel()) * beta**2)


# The input, the head, and what a scheme draws or measures.


def test_inputs_are_scaled_or_normalised_as_the_scheme_has_it() -> None:
    x = input_batch(StackSpec(scheme="pre-ln"), 0, CPU).double()
    scaled = input_batch(StackSpec(scheme="t-fixup", depth=12), 0, CPU).double()
    torch.testing.assert_close(scaled, x * (9 * 12) ** -0.25, rtol=1e-6, atol=1e-7)
    on_sphere = input_batch(StackSpec(scheme="ngpt"), 0, CPU).double()
    torch.testing.assert_close(on_sphere, scheme_oracle.to_sphere(x), rtol=1e-5, atol=1e-6)
    normed = input_batch(StackSpec(scheme="peri-ln"), 0, CPU).double()
    assert normed.mean(-1).abs().max() < 1e-6
    torch.testing.assert_close(normed, scheme_oracle.standardise(x, (2,)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["rmsnorm", "batchnorm", "dyt"])
def test_the_input_s_norm_is_of_the_stack_s_own_kind(kind: str) -> None:
    x = input_batch(StackSpec(scheme="pre-ln"), 0, CPU)
    want = {
        "rmsnorm": x / x.square().mean(-1, keepdim=True).sqrt(),
        "batchnorm": (x - x.mean((0, 1))) / x.std((0, 1), correction=0),
        "dyt": torch.tanh(0.5 * x),
    }[kind]
    got = input_batch(StackSpec(scheme="peri-ln", norm_kind=kind), 0, CPU)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pre-ln", "post-ln", "he-v1", "he-v2"])
def test_the_head_ends_in_the_scheme_s_norm_and_activation(name: str) -> None:
    block = SCHEMES[name].blocks[0]
    spec = small(name, block, loss="ce")
    loss, y = build_loss(spec, 0, CPU), torch.randn_like(input_batch(spec, 0, CPU))
    images = y.dim() == 4
    z = y
    if name in ("pre-ln", "he-v2"):
        z = scheme_oracle.standardise(y, (0, 2, 3) if images else (2,))
    z = torch.relu(z) if name == "he-v2" else z
    rows = z.mean((2, 3)) if images else z.reshape(-1, z.shape[-1])
    logits = rows @ loss.project.weight.T + loss.project.bias
    chosen = torch.log_softmax(logits, 1)[torch.arange(len(rows)), loss.labels]
    assert loss(y).item() == pytest.approx(-chosen.mean().item(), rel=1e-12)


def kept(spec: StackSpec, seed: int, layer: int) -> float:
    (unit,) = build_block(spec, seed, layer, CPU).units
    return float(unit.scale.factor)


def test_stochastic_depth_draws_each_layer_from_its_seed_by_the_linear_rule() -> None:
    spec = StackSpec(scheme="stochastic-depth", depth=10, width=8)
    seeds = range(400)
    for layer in (1, 5, 10):
        p = 1 - layer / 10 * 0.5
        share = sum(kept(spec, seed, layer) for seed in seeds) / len(seeds)
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(seeds)))
    coins = [[kept(spec, seed, layer) for layer in range(1, 11)] for seed in range(8)]
    assert {0.0, 1.0} == {coin for row in coins for coin in row}
    assert len({tuple(row) for row in coins}) > 4
    assert coins[3] == [kept(spec, 3, layer) for layer in range(1, 11)]


def test_a_dropped_branch_has_gradients_of_exactly_zero() -> None:
    spec = small("stochastic-depth", "resnet")
    found = set()
    for seed in range(6):
        net = perturbed(spec, seed)
        _, params = walk(spec, seed, net).records()
        for row in params:
            (unit,) = net.blocks[row.layer - 1].units
            found.add(unit.scale.factor)
            assert (row.grad_norm == 0) == (unit.scale.factor == 0)
    assert found == {0.0, 1.0}


@pytest.mark.parametrize("block", ["transformer", "ffn"])
def test_admin_s_omegas_are_the_profile_of_a_forward_pass(block: str) -> None:
    """omega_i^2 = 1 + sum of the branches' variances, from plain arithmetic in layer order."""
    spec = small("admin", block, init="he")
    blocks = [build_block(spec, 5, layer, CPU) for layer in range(1, spec.depth + 1)]
    x, square = input_batch(spec, 5, CPU), 1.0
    for layer, built in enumerate(blocks, start=1):
        for unit, kind in zip(built.units, spec.kind.units, strict=True):
            case = scheme_oracle.Case(spec, layer, kind, scheme_oracle.doubles(unit), 1.0)
            omega = unit.omega.weight
            assert relative(omega, torch.full_like(omega, math.sqrt(square))) < 1e-12
            f = case.f(x)
            square += ((f - f.mean()) ** 2).mean().item()
            x = case.ln("after", math.sqrt(square_before(omega)) * x + f).detach()
    assert square > 1.5


def square_before(omega: Tensor) -> float:
    return float(omega[0].detach() ** 2)


def test_any_layer_of_admin_stands_alone() -> None:
    """A layer asked for first has the weights that it has in the whole stack."""
    spec = small("admin", "transformer", depth=5)
    last = build_block(spec, 11, 5, CPU)
    stack = [build_block(spec, 11, layer, CPU) for layer in range(1, 6)]
    pairs = zip(last.parameters(), stack[-1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    omegas = [unit.omega.weight[0].item() for block in stack for unit in block.units]
    assert omegas == sorted(omegas)
    assert omegas[0] == 1


def test_admin_forward_is_pre_ln_up_to_scale() -> None:
    """omega of the next unit, squared, is the mean square of Pre-LN's stream (Liu et al. 2020)."""
    sizes: dict[str, Any] = {"depth": 8, "width": 128, "init": "he", "activation": "relu"}
    admin, pre = (StackSpec(scheme=name, **sizes) for name in ("admin", "pre-ln"))
    excess = 0.0  # finite width: the branches of one seed are not quite orthogonal
    for seed in range(3):
        rows, _ = walk(pre, seed, network(pre, seed)).records()
        last = list(build_block(admin, seed, 8, CPU).units)[-1]
        excess += 2 * math.log(last.omega.weight[0].item() / rows[-2].act_rms) / 3
    assert abs(excess) < 0.05


def test_ngpt_s_vectors_have_length_1() -> None:
    spec = small("ngpt", "transformer")
    net = network(spec)
    for unit in (unit for block in net.blocks for unit in block.units):
        for name, p in unit.branch.named_parameters():
            if p.dim() == 2:
                along = 0 if name.startswith(("out", "down")) else 1
                torch.testing.assert_close(
                    p.norm(dim=along), torch.ones(p.shape[1 - along]).double()
                )
    for tape in record_forward(net):
        torch.testing.assert_close(tape.y.norm(dim=-1), torch.ones(tape.y.shape[:2]).double())


# At initialisation the identity, to the last bit.


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name in ("rezero", "skipinit", "fixup") for block in SCHEMES[name].blocks],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_passes_unchanged(name: str, block: str, dtype: str) -> None:
    spec = small(name, block, depth=16, dtype=dtype)
    net = network(spec)
    y, inputs, _ = engine(net)
    assert torch.equal(y, net.x)
    assert all(torch.equal(g, net.loss.v) for g in inputs)


def test_only_alpha_learns_first_under_rezero() -> None:
    spec = small("rezero", "transformer", depth=16)
    _, params = walk(spec, 0, network(spec)).records()
    for row in params:
        assert (row.grad_norm > 0) == (row.param == "scale.weight")


# Negative controls: what public re-implementations get wrong.


def wrong(monkeypatch: pytest.MonkeyPatch, name: str, wire: Callable[[Place], Wiring]) -> None:
    monkeypatch.setitem(SCHEMES, name, replace(SCHEMES[name], wire=wire))


def beta_inverted(where: Place) -> Wiring:
    right = SCHEMES_RIGHT["deepnorm"].wire(where)
    return replace(right, gains={role: 1 / gain for role, gain in right.gains.items()})


def alpha_on_the_branch(where: Place) -> Wiring:
    right = SCHEMES_RIGHT["deepnorm"].wire(where)
    return replace(right, a=1.0, b=right.a)


def no_factor(_: Place) -> Wiring:
    return Wiring(norms=("in",))


def by_blocks(where: Place) -> Wiring:
    return Wiring(a=float(where.depth), norms=("in", "out"))


def sharp_logits(where: Place) -> Wiring:
    return replace(SCHEMES_RIGHT["completep"].wire(where), logit_power=0.5)


SCHEMES_RIGHT = dict(SCHEMES)
WRONG = [
    *(("deepnorm", alpha_on_the_branch), ("lns", no_factor), ("keel", by_blocks)),
    ("completep", sharp_logits),
]


@pytest.mark.parametrize(("name", "wire"), WRONG)
def test_a_wrong_wiring_does_not_conform(
    monkeypatch: pytest.MonkeyPatch, name: str, wire: Callable[[Place], Wiring]
) -> None:
    spec = small(name, "transformer")
    wrong(monkeypatch, name, wire)
    assert largest_error(spec, perturbed(spec)) > 1e-3


def test_an_inverted_beta_does_not_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a fact of the weights: their variances are refused."""
    spec = StackSpec(scheme="deepnorm", depth=N, width=64)
    wrong(monkeypatch, "deepnorm", beta_inverted)
    refused = {
        role
        for role, weight in matrices(spec)
        if weight.square().mean().item()
        != pytest.approx(VARIANCES["deepnorm"](role, weight.shape[1], weight.shape[0]), rel=0.2)
    }
    assert refused == set(VALUE_PATH)


def test_deepnorm_s_mistakes_make_the_tokens_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosine between tokens after 48 blocks: next to 0; for the two mistakes 1 and about 0.4."""
    sizes: dict[str, Any] = {"depth": 48, "width": 64, "seq_len": 64, "batch_size": 2}
    spec = StackSpec(scheme="deepnorm", init="he", activation="relu", **sizes)
    assert last_cosine(spec) < 0.05
    wrong(monkeypatch, "deepnorm", beta_inverted)
    assert last_cosine(spec) > 0.99
    wrong(monkeypatch, "deepnorm", alpha_on_the_branch)
    assert 0.25 < last_cosine(spec) < 0.6


def last_cosine(spec: StackSpec) -> float:
    x = input_batch(spec, 0, CPU)
    with torch.no_grad():
        for layer in range(1, spec.depth + 1):
            x = build_block(spec, 0, layer, CPU)(x)
    return scheme_oracle.stream_columns(x.double(), x.double())["act_cos"]


def test_keel_s_branch_weighs_one_over_the_number_of_sublayers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a He ReLU ffn with a normed input |J^T g| = |g|, so branch over shortcut is 1/alpha."""
    spec = StackSpec(scheme="keel", depth=12, width=64, init="he", activation="relu")
    assert branch_over_skip(spec) == pytest.approx(1 / 24, rel=0.1)
    wrong(monkeypatch, "keel", by_blocks)
    assert branch_over_skip(spec) == pytest.approx(1 / 12, rel=0.1)


def branch_over_skip(spec: StackSpec) -> float:
    rows, _ = walk(spec, 0, network(spec)).records()
    ffns = [row for row in rows if row.unit == "ffn"]
    return sum(row.branch_gain / row.skip_gain for row in ffns) / len(ffns)
