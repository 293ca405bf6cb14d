"""The multi-stream zoo against its equations, written a second time (`stream_oracle`)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import stream_oracle
import torch
from problems import CPU, network, retyped
from torch import Tensor, nn
from walk_checks import assert_layers, assert_params, cells, unit_by_unit, whole_graph

from gradflow.engine import memory
from gradflow.engine.tape import Network, SavedBytes, record_forward
from gradflow.engine.walk import loss_gradient, vjp, walk
from gradflow.errors import UsageError
from gradflow.networks.ends import ReduceStreams, input_shape, state_shape
from gradflow.networks.stack import build_block
from gradflow.networks.units import depth_mixing, hyper
from gradflow.networks.units.hyper import sinkhorn
from gradflow.runs.records import LayerRecord
from gradflow.schemes import READOUTS, SCHEMES, Place, Wiring
from gradflow.specs.stack import StackSpec

NAMES = tuple(stream_oracle.EQUATIONS)
CASES = tuple((name, block) for name in NAMES for block in SCHEMES[name].blocks)


def small(scheme: str, block: str = "transformer", **options: Any) -> StackSpec:
    sizes = {"depth": 3, "width": 12, "batch_size": 3, "seq_len": 5}
    own = {} if block == "ffn" else {"heads": 3}
    own |= {} if block == "attention" else {"ffn_mult": 2}
    given = {"scheme": scheme, "block": block, "dtype": "float64", **sizes, **own, **options}
    return StackSpec(**given)


def perturbed(spec: StackSpec) -> Network:
    """The stack with every parameter moved, so that no weight is 0 or 1 any more."""
    net = network(spec)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in nn.ModuleList([*net.blocks, net.loss]).parameters():
            p.add_(torch.randn(p.shape, generator=source, dtype=p.dtype), alpha=0.2)
    for block in net.blocks:
        for unit in block.units:
            unit.seal()
    return net


def engine(net: Network) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The state after the last unit, dL/dx of the input, and dL/dparameters, unit by unit."""
    tapes = list(record_forward(net))
    _, g = loss_gradient(net.loss, tapes[-1].y)
    weights: list[Tensor | None] = []
    for tape in reversed(tapes):
        parts, grads = vjp(tape, g)
        g, weights = parts[0] + parts[1], [*grads, *weights]
    return tapes[-1].y.detach(), g, weights


def distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def output(net: Network, state: Tensor) -> Tensor:
    return (net.loss.readout(state) if hasattr(net.loss, "readout") else state).detach()


def largest_error(spec: StackSpec, net: Network) -> float:
    """Of the output, of dL/dinput, and of the gradient of every parameter, the readout's too."""
    truth = stream_oracle.backward(spec, net)
    state, g, weights = engine(net)
    errors = [distance(output(net, state), truth.output.detach())]
    errors.append(distance(g, truth.steps[0].x[0].grad))
    true = [p.grad for step in truth.steps for p in step.params.values()]
    # A shift before a softmax has no gradient but for rounding.
    floor = 1e-6 * max(want.norm().item() for want in true)
    for got, want in zip(weights, true, strict=True):
        errors.append(((got - want).norm() / (want.norm() + floor)).item())
    errors += readout_errors(net, state, truth.readout)
    return max(errors)


def readout_errors(net: Network, state: Tensor, truth: dict[str, Tensor]) -> list[float]:
    if not truth:
        return []
    weights = list(net.loss.readout.parameters())
    grads = torch.autograd.grad(net.loss(state), weights)
    return [distance(g, want.grad) for g, want in zip(grads, truth.values(), strict=True)]


# Conformance: forward and every gradient.


@pytest.mark.parametrize(("name", "block"), CASES)
def test_output_and_every_gradient_are_those_of_the_equation(name: str, block: str) -> None:
    for options in ({}, {"loss": "ce"}):
        spec = small(name, block, **options)
        assert largest_error(spec, perturbed(spec)) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_so_they_are_with_rmsnorm_a_mask_and_mse(name: str) -> None:
    spec = small(name, norm_kind="rmsnorm", loss="mse", causal=True)
    assert largest_error(spec, perturbed(spec)) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_every_column_is_that_of_the_oracle(name: str) -> None:
    spec = small(name)
    net = perturbed(spec)
    layers, params = walk(spec, 0, net).records()
    true_layers, true_params = stream_oracle.measure(spec, net)
    assert_layers(spec, [cells(row) for row in layers], true_layers)
    assert_params(spec, [cells(row) for row in params], true_params)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_bitwise_those_of_the_whole_graph(name: str) -> None:
    spec = small(name, dtype="float32")
    net = perturbed(spec)
    for got, want in zip(unit_by_unit(net), whole_graph(net), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_gains_multiply_and_their_parts_add(name: str, dtype: str) -> None:
    spec = small(name, depth=5, dtype=dtype)
    first, *units = walk(spec, 0, network(spec)).records()[0]
    product = math.prod(row.gain for row in units)
    assert product == pytest.approx(first.grad_norm / units[-1].grad_norm, rel=1e-6)
    for row in units:
        cross = 2 * row.skip_branch_cos * row.skip_gain * row.branch_gain
        assert row.gain**2 == pytest.approx(row.skip_gain**2 + row.branch_gain**2 + cross, rel=1e-5)


def test_skip_passes_the_branch_by_and_branch_passes_it() -> None:
    """With a branch that gives nothing, nothing comes through it, whatever the scheme."""
    for name in NAMES:
        spec = small(name)
        net = network(spec)
        for block in net.blocks:
            for unit in block.units:
                last = getattr(unit.branch, str(unit.branch.output))
                with torch.no_grad():
                    last.weight.zero_()
        _, *rows = walk(spec, 0, net).records()[0]
        # The values of the first attention are handed on beside the branch's output.
        assert all(row.branch_gain == 0 for row in rows[name == "value-residual" :]), name
        assert all(row.skip_gain > 0 for row in rows), name


# At initialisation.


def pre_ln(spec: StackSpec) -> Network:
    return network(replace(spec, scheme="pre-ln"))


def against_pre_ln(name: str, **options: Any) -> tuple[float, float, float, float]:
    """Output and dL/dinput over those of pre-ln: factor and relative distance of each."""
    sizes = {"depth": 16, "width": 32, "heads": 4, "seq_len": 8, "batch_size": 2}
    spec = small(name, **{**sizes, **options})
    net, plain = network(spec), pre_ln(spec)
    (state, g, _), (y, g_plain, _) = engine(net), engine(plain)
    return (*factor(output(net, state), y), *factor(g, g_plain))


def factor(got: Tensor, want: Tensor) -> tuple[float, float]:
    """The best c with got = c want, and how far from it they are."""
    c = ((got * want).sum() / (want * want).sum()).item()
    return c, distance(got, c * want)


# The factor: n streams summed, or one; AttnRes averages the input and the outputs of 32 units.
SAME = {
    "hyper-connections": 4.0,
    "mhc": 1.0,
    "mhc-uniform": 1.0,
    "denseformer": 1.0,
    "attnres": 1 / 33,
}


@pytest.mark.parametrize("name", [name for name in SAME if name != "attnres"])
def test_output_and_input_gradient_are_those_of_pre_ln(name: str) -> None:
    """The sum of n equal streams is n times one; mean and last are one.

    To rounding; but mhc-uniform reads twice the stream, and eps counts a quarter in its norm.
    """
    tolerance = 1e-4 if name == "mhc-uniform" else 1e-12
    y, y_error, g, g_error = against_pre_ln(name)
    assert y == pytest.approx(SAME[name], rel=tolerance)
    assert g == pytest.approx(SAME[name], rel=tolerance)
    assert max(y_error, g_error) < tolerance


@pytest.mark.parametrize("name", SAME)
def test_so_they_are_without_any_factor_where_a_final_norm_follows(name: str) -> None:
    spec = small(name, loss="ce", depth=16, width=32, heads=4, seq_len=8, batch_size=2)
    net, plain = network(spec), pre_ln(spec)
    (state, g, _), (y, g_plain, _) = engine(net), engine(plain)
    assert net.loss(state).item() == pytest.approx(plain.loss(y).item(), rel=1e-4)
    normed = net.loss.loss.norm(output(net, state)).detach()
    tolerance = 3 * EPS_OF_A_MEAN if name == "attnres" else 1e-4
    assert distance(normed, plain.loss.norm(y).detach()) < tolerance
    assert distance(g, g_plain) < tolerance


# AttnRes normalises the mean of k streams where pre-ln normalises their sum, so that the norm's
# eps, 1e-5, weighs k^2 times as much.
EPS_OF_A_MEAN = 2e-4


def test_attnres_is_pre_ln_over_the_number_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for eps: without it the two are equal."""
    y, y_error, g, g_error = against_pre_ln("attnres")
    assert y == pytest.approx(1 / 33, rel=EPS_OF_A_MEAN)
    assert g == pytest.approx(1 / 33, rel=EPS_OF_A_MEAN)
    assert max(y_error, g_error) < EPS_OF_A_MEAN
    y, y_error, g, g_error = against_pre_ln("attnres", norm_eps=1e-6)  # llama's
    assert (y, g) == (pytest.approx(1 / 33, rel=1e-4), pytest.approx(1 / 33, rel=1e-4))
    assert max(y_error, g_error) < 1e-4
    monkeypatch.setattr(depth_mixing, "KIND_EPS", 1e-16)
    y, y_error, g, g_error = against_pre_ln("attnres", norm_eps=1e-16)
    assert y == pytest.approx(1 / 33, rel=1e-9)
    assert g == pytest.approx(1 / 33, rel=1e-9)
    assert max(y_error, g_error) < 1e-9


@pytest.mark.parametrize("name", ["mhc", "mhc-uniform"])
def test_rows_of_mhc_are_those_of_pre_ln_over_the_root_of_n(name: str) -> None:
    """n equal streams share the gradient of one equally: g / n each, g / sqrt(n) together."""
    spec = small(name, depth=6)
    tolerance = 1e-4 if name == "mhc-uniform" else 1e-12
    first, *rows = walk(spec, 0, network(spec)).records()[0]
    true_first, *true = walk(spec, 0, pre_ln(spec)).records()[0]
    assert first.grad_norm == pytest.approx(true_first.grad_norm, rel=tolerance)
    for row, want in zip(rows, true, strict=True):
        assert row.grad_norm == pytest.approx(want.grad_norm / 2, rel=tolerance)
        assert row.act_rms == pytest.approx(want.act_rms, rel=tolerance)


def test_the_first_values_get_a_gradient_from_every_layer() -> None:
    """In value-residual the second stream's gradient grows towards the first layer."""
    spec = small("value-residual", depth=6)
    net = network(spec)
    tapes = list(record_forward(net))
    _, g = loss_gradient(net.loss, tapes[-1].y)
    sizes = []
    for tape in reversed(tapes[1:]):
        g = sum(vjp(tape, g)[0])
        sizes.append(g[:, 1].norm().item())
    assert sizes[0] == 0  # the last unit is an ffn
    assert all(a <= b for a, b in pairwise(sizes))
    assert sizes[-1] > 2 * sizes[1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_gated_ffn_goes_with_every_state(name: str) -> None:
    if "transformer" in SCHEMES[name].blocks:
        spec = small(name, gated=True, activation="silu")
        assert largest_error(spec, perturbed(spec)) < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "heads", [{"kv_heads": 1}, {"head_dim": 8}, {"kv_heads": 1, "head_dim": 2}]
)
def test_values_of_another_width_go_with_every_state_but_one_that_holds_them(
    name: str, heads: dict[str, int]
) -> None:
    if name == "value-residual":
        rule = "--scheme value-residual hands on values as wide as the stream; got --width 12"
        with pytest.raises(UsageError, match=f"{rule}.*use --kv-heads 3 --head-dim 4"):
            small(name, **heads)
        return
    spec = small(name, **heads)
    assert walk(spec, 0, network(spec)).records()[0][0].grad_norm > 0


def test_fewer_but_wider_values_fit_a_state_of_values() -> None:
    spec = small("value-residual", heads=6, kv_heads=3, head_dim=4)
    assert walk(spec, 0, network(spec)).records()[0][0].grad_norm > 0


# Constants.


@pytest.mark.parametrize("depth", [6, 24, 96])
def test_constants_at_three_depths(depth: int) -> None:
    for layer in (1, 2, depth):
        place = Place(depth, layer, 1, 2, "ffn")
        siamese = SCHEMES["siamesenorm"]
        assert siamese.constants(place)["c"] == siamese.wire(place).settings["divisor"]
        assert siamese.constants(place)["c"] == pytest.approx((2 * layer) ** 0.5)
        hyper_connections = SCHEMES["hyper-connections"]
        # Units 0, 1, 2, ...: the ffn of block l is number 2 l - 1.
        assert hyper_connections.constants(place)["stream"] == (2 * layer - 1) % 4
        assert hyper_connections.wire(place).settings["stream"] == (2 * layer - 1) % 4


def starts(name: str, layer: int, unit: int) -> dict[str, Tensor]:
    block = build_block(small(name, depth=6), 0, layer, CPU)
    return {key: p.detach() for key, p in block[unit].named_parameters()}


@pytest.mark.parametrize(("layer", "unit"), [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)])
def test_hyper_connections_start_as_published(layer: int, unit: int) -> None:
    p = starts("hyper-connections", layer, unit)
    k = 2 * (layer - 1) + unit
    assert p["connection.a_m"].tolist() == [float(s == k % 4) for s in range(4)]
    assert torch.equal(p["connection.a_r"], torch.eye(4, dtype=torch.float64))
    assert (p["connection.b"] == 1).all()
    for name in ("w_m", "w_r", "w_b"):
        assert (p[f"connection.{name}"] == 0).all()
    for name in ("s_a", "s_b"):
        assert p[f"connection.{name}"].item() == pytest.approx(0.01)


def test_mhc_starts_as_its_biases_say() -> None:
    near, uniform = (starts(name, 2, 0) for name in ("mhc", "mhc-uniform"))
    sigmoid = torch.sigmoid
    assert sigmoid(near["connection.b_pre"]) == pytest.approx(torch.full((4,), 0.25))
    assert sigmoid(uniform["connection.b_pre"]) == pytest.approx(torch.full((4,), 0.5))
    eye = torch.eye(4, dtype=torch.float64)
    beside = math.exp(-8) / (1 + 3 * math.exp(-8))  # doubly stochastic after one iteration
    for p, off in ((near, beside), (uniform, 0.25)):
        assert (2 * sigmoid(p["connection.b_post"]) == 1).all()
        h_res = sinkhorn(p["connection.b_res"])
        assert h_res == pytest.approx(off * (1 - eye) + (1 - 3 * off) * eye, abs=1e-12)
        assert all((v == 0).all() for key, v in p.items() if "phi" in key)
        assert all(p[f"connection.a_{w}"].item() == 0.01 for w in ("pre", "post", "res"))


def test_depth_weights_start_at_the_mean_and_at_the_last() -> None:
    assert (starts("attnres", 3, 1)["depth_attention.query"] == 0).all()
    assert starts("denseformer", 3, 1)["average.weight"].tolist() == [0, 0, 0, 1]
    assert "average.weight" not in starts("denseformer", 3, 0)


# Sinkhorn: the approximation gap.


def gaps(logits: Tensor, iterations: int) -> tuple[float, float]:
    """How far row sums and column sums are from 1."""
    m = sinkhorn(logits, iterations)
    return (m.sum(-1) - 1).abs().max().item(), (m.sum(-2) - 1).abs().max().item()


def test_sinkhorn_ends_with_rows_and_leaves_a_gap_in_columns() -> None:
    logits = torch.randn(50, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert gaps(logits, 1)[1] > 0.1
    assert gaps(logits, 20)[1] < 1e-6
    assert 0.001 < gaps(3 * logits, 20)[1] < 0.1  # what mHC-lite objects to
    for scale in (1, 3):
        assert gaps(scale * logits, 20)[0] < 1e-12


# Negative controls: what is wrong is told apart.


def test_conformance_sees_one_sinkhorn_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("mhc")
    net = strongly_mixed(spec)
    assert largest_error(spec, net) < 1e-9
    monkeypatch.setattr(hyper, "sinkhorn", lambda logits: sinkhorn(logits, 1))
    assert largest_error(spec, net) > 1e-3


def test_conformance_sees_rows_before_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("mhc")
    net = strongly_mixed(spec)
    monkeypatch.setattr(hyper, "sinkhorn", lambda logits: sinkhorn(logits.mT).mT)
    assert largest_error(spec, net) > 1e-6


def strongly_mixed(spec: StackSpec) -> Network:
    """Logits of H_res so far apart that 20 iterations do not close the gap."""
    net = perturbed(spec)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in net.blocks:
            for unit in block.units:
                unit.connection.b_res.normal_(std=4.0, generator=source)
    return net


def test_conformance_sees_a_transposed_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("mhc-uniform")
    monkeypatch.setattr(hyper, "sinkhorn", lambda logits: sinkhorn(logits).mT)
    assert largest_error(spec, perturbed(spec)) > 1e-3


def test_conformance_sees_residual_read_from_one_stream() -> None:
    spec = small("residual-dual")
    for index in (0, 1):
        net = perturbed(spec)
        net.loss.readout = ReduceStreams(replace(spec, scheme="denseformer"))
        net.loss.readout.reduce = lambda x, i=index: x[:, i]
        truth = stream_oracle.OUTPUTS["residual-dual"]
        state = engine(net)[0]
        right = perturbed(spec).loss.readout
        want = truth(stream_oracle.doubles(right), list(state.unbind(1)))
        assert distance(output(net, state), want.detach()) > 0.1


def rows_with(monkeypatch: pytest.MonkeyPatch, name: str, **settings: Any) -> list[LayerRecord]:
    """The rows of a scheme with other settings of its units."""
    right = SCHEMES[name]

    def wire(place: Place) -> Wiring:
        wiring = right.wire(place)
        return replace(wiring, settings={**wiring.settings, **settings})

    monkeypatch.setitem(SCHEMES, name, replace(right, wire=wire))
    spec = small(name, depth=6)
    rows = walk(spec, 0, network(spec)).records()[0]
    monkeypatch.setitem(SCHEMES, name, right)
    return rows


def test_rows_see_hyper_connections_without_their_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stream 0 read by all, the input's gradient is the same and the rows are not."""
    wrong = rows_with(monkeypatch, "hyper-connections", stream=0)
    right = rows_with(monkeypatch, "hyper-connections")
    assert wrong[0].grad_norm == pytest.approx(right[0].grad_norm, rel=1e-9)
    # Below the last two units, that is: a single one is the same from whatever stream it reads.
    for row, want in zip(wrong[1:-2], right[1:-2], strict=True):
        assert row.grad_norm != pytest.approx(want.grad_norm, rel=1e-4), row.layer


def test_gates_of_one_and_minus_one_are_not_pre_ln() -> None:
    """The gates of mHC-lite, sigma(+-1): the branch counts 0.77 on average, not 1."""
    spec = small("mhc", depth=16)
    net, plain = network(spec), pre_ln(spec)
    with torch.no_grad():
        for number, block in enumerate(net.blocks):
            for k, unit in enumerate(block.units, start=2 * number):
                for bias in (unit.connection.b_pre, unit.connection.b_post):
                    bias.fill_(-1.0)[k % 4] = 1.0
    error = distance(output(net, engine(net)[0]), engine(plain)[0])
    assert error > 0.05


def test_attnres_with_drawn_queries_is_not_pre_ln() -> None:
    spec = small("attnres", depth=4)
    state = engine(perturbed_queries(spec))[0]
    assert factor(output(network(spec), state), engine(pre_ln(spec))[0])[1] > 0.01


def perturbed_queries(spec: StackSpec) -> Network:
    net = network(spec)
    with torch.no_grad():
        for block in net.blocks:
            for unit in block.units:
                unit.depth_attention.query.normal_(generator=torch.Generator().manual_seed(1))
    return net


# Shapes, memory, and what the other parts of the package ask.


@pytest.mark.parametrize(("name", "block"), CASES)
def test_states_have_the_shape_that_is_said(name: str, block: str) -> None:
    spec = small(name, block)
    tapes = list(record_forward(network(spec)))
    units = [(layer, u) for layer in range(1, 4) for u in range(spec.units_per_block)]
    assert [tuple(t.y.shape) for t in tapes] == [state_shape(spec, *at) for at in units]
    assert [tuple(t.x_branch.shape) for t in tapes] == [input_shape(spec, *at) for at in units]


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_counts_the_states(name: str) -> None:
    """Not below what the units of the whole stack really keep, and at most a sixth above.

    The estimate has the states contiguous; those of mhc are not, and save a copy.
    """
    spec = small(name, depth=12, batch_size=4)
    net, saved = network(spec), SavedBytes()
    kept = sum(saved.of(tape.unit, tape.x_branch) for tape in record_forward(net))
    weights = sum(p.nbytes for block in net.blocks for p in block.parameters())
    needed = memory.resident_bytes(memory.footprint(spec, 0, CPU), spec.depth)
    assert 0.99 < needed / (kept + weights) < 7 / 6
    assert memory.least_bytes(spec) < needed


def test_the_least_estimate_knows_that_states_grow() -> None:
    """At twice the depth states twice as large, of which sqrt(2) times as many are kept."""
    sizes = {"width": 48, "seq_len": 64, "batch_size": 64}
    for name in ("attnres", "denseformer"):
        ten, twenty = (memory.least_bytes(small(name, depth=d, **sizes)) for d in (100, 200))
        assert twenty / ten == pytest.approx(2 * 14 / 10, rel=0.05)
    wide, narrow = (memory.least_bytes(small(n, **sizes)) for n in ("mhc", "pre-ln"))
    assert wide > 3 * narrow


@pytest.mark.parametrize("name", NAMES)
def test_states_grow_by_equal_steps(name: str) -> None:
    """What both estimates rely on."""
    spec = small(name, depth=9)
    for unit in (0, 1):
        counts = [spec.streams(layer, unit) for layer in range(1, 10)]
        assert len({b - a for a, b in pairwise(counts)}) == 1


def test_saved_bytes_grow_with_the_state() -> None:
    spec = small("attnres", depth=4)
    _, *rows = walk(spec, 0, network(spec)).records()[0]
    ffns = [row.saved_bytes for row in rows if row.unit == "ffn"]
    assert all(b > a for a, b in pairwise(ffns))


def test_every_readout_is_used() -> None:
    assert {SCHEMES[name].readout for name in NAMES} - {None} == set(READOUTS)


def test_layers_are_built_alone() -> None:
    for name in NAMES:
        spec = small(name)
        whole = network(spec).blocks[2]
        for a, b in zip(whole.parameters(), build_block(spec, 0, 3, CPU).parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_branches_have_the_weights_of_the_single_stream(name: str) -> None:
    """So that schemes are compared on equal draws."""
    spec = retyped(small(name), init="he")
    plain = pre_ln(spec).blocks[1].state_dict()
    own = network(spec).blocks[1].state_dict()
    for key in (key for key in plain if ".branch." in key):
        assert torch.equal(own[key], plain[key]), key
