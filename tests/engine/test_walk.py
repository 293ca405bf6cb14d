"""The engine against its double (`oracle`), against whole-graph autograd bit by bit, and itself."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import MODERN, PROBLEMS, STACKS, measure, name, network, retyped, small, thinned
from torch import Tensor, nn
from walk_checks import (
    ABSOLUTE,
    RELATIVE,
    TOLERANCE,
    assert_layers,
    assert_params,
    cells,
    differences,
    saved_storages,
    unit_by_unit,
    whole_graph,
)

from gradflow import reductions
from gradflow.engine.tape import record_forward
from gradflow.engine.walk import walk
from gradflow.runs.records import LayerRecord
from gradflow.specs.block_kinds import ACTIVATIONS, BLOCKS
from gradflow.specs.stack import StackSpec
from gradflow.specs.stack_fields import LOSS_KINDS

# Every activation, mask, head and initialisation at least once.
VARIANTS = (
    *(small(block, activation=phi) for block in ("mlp", "resnet", "ffn") for phi in ACTIVATIONS),
    *(small(b, causal=True, norm=n) for b in ("attention", "transformer") for n in ("pre", "none")),
    *(small("transformer", init=i, bias_var=None) for i in ("gpt2", "orthogonal", "torch")),
    *MODERN,
    small("attention", heads=1, seq_len=1),
    small("ffn", batch_size=1),
    small("mlp", norm="none", batch_size=1),
)


def assert_right(spec: StackSpec) -> None:
    net = network(spec)
    layers, params = walk(spec, 0, net).records()
    true_layers, true_params = oracle.measure(spec, net)
    assert_layers(spec, [cells(row) for row in layers], true_layers)
    assert_params(spec, [cells(row) for row in params], true_params)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spec", thinned([*PROBLEMS, *VARIANTS], 4), ids=name)
def test_every_column_is_that_of_the_oracle(spec: StackSpec, dtype: str) -> None:
    assert_right(retyped(spec, dtype=dtype))


def test_the_comparison_can_fail() -> None:
    """Negative control: an error just beyond the tolerance, in any column, is found."""
    spec = small("transformer", dtype="float64")
    (*_, row), _ = measure(spec)
    got = cells(row)
    for column in sorted(RELATIVE - {"norm"} | ABSOLUTE):
        true = got | {column: got[column] * (1 + 3e-9) + 3e-9}
        assert set(differences(got, true, 1e-9)) == {column}
    assert set(differences(got, got | {"nonfinite": 1, "act_cos": None}, 1e-9)) == {
        "nonfinite",
        "act_cos",
    }


def test_the_oracle_covers_every_measured_column() -> None:
    spec = small("transformer")
    rows, _ = oracle.measure(spec, network(spec))
    not_measured = {"seed", "step", "saved_bytes"}
    timed = {"forward_s", "forward_s_iqr", "backward_s", "backward_s_iqr"}
    theory = {name for name in LayerRecord.__dataclass_fields__ if name.startswith("theory_")}
    watched = {"identity_share", "clipped_param_grad_norm", "update_ratio"}
    ranges = {"underflow_fraction", "headroom_log2"}
    others = not_measured | timed | theory | watched | ranges
    assert set(rows[-1]) == set(LayerRecord.__dataclass_fields__) - others


@pytest.mark.parametrize("spec", thinned([*STACKS, *VARIANTS, *PROBLEMS[2::9]]), ids=name)
def test_gradients_are_bitwise_those_of_the_whole_graph(spec: StackSpec) -> None:
    """Tensors as the engine holds them, and with nothing rescaled the norms that it writes."""
    net = network(spec)
    at_outputs, of_weights = whole_graph(net)
    for engine, autograd in zip(unit_by_unit(net), (at_outputs, of_weights), strict=True):
        assert all(g is not None for g in engine)
        assert all(torch.equal(g, want) for g, want in zip(engine, autograd, strict=True))
    layers, params = walk(spec, 0, net, raw_range=True).records()
    assert [row.grad_norm for row in layers] == [reduced(g) for g in at_outputs]
    assert [row.grad_norm for row in params] == [reductions.norm(g).item() for g in of_weights]
    for row, g in zip(layers, at_outputs, strict=True):
        assert row.zero_fraction == pytest.approx((g == 0).double().mean().item(), abs=1e-15)


def reduced(g: Tensor) -> float:
    """`grad_norm` as the engine reduces it."""
    return float(reductions.gradient_sums(g)["grad_norm"])


@pytest.mark.parametrize("spec", [small("transformer"), small("resnet", loss="ce")], ids=name)
def test_walking_leaves_nothing_behind(spec: StackSpec) -> None:
    net = network(spec)
    modules = nn.ModuleList([*net.blocks, net.loss])
    before = {n: p.detach().clone() for n, p in modules.named_parameters()}
    x = net.x.clone()
    walk(spec, 0, net).records()
    assert torch.equal(net.x, x)
    assert net.x.grad is None
    assert not net.x.requires_grad
    for key, p in modules.named_parameters():
        assert torch.equal(p, before[key])
        assert p.grad is None
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks
    for part in modules.modules():
        hooks = [kept for attribute, kept in vars(part).items() if "hooks" in attribute]
        assert not any(hooks), part


def test_a_second_walk_sees_the_same() -> None:
    spec = small("transformer", loss="ce")
    net = network(spec)
    assert walk(spec, 0, net).records() == walk(spec, 0, net).records()


@pytest.mark.parametrize("spec", PROBLEMS[::7], ids=name)
def test_identical_spec_and_seed_give_identical_records(spec: StackSpec) -> None:
    assert repr(measure(spec, 3)) == repr(measure(spec, 3))


def test_seeds_differ_and_are_written() -> None:
    spec = small("mlp")
    runs = {seed: measure(spec, seed) for seed in (0, 1)}
    assert runs[0][0][0].grad_norm != runs[1][0][0].grad_norm
    assert all(row.seed == seed for seed, tables in runs.items() for t in tables for row in t)


@pytest.mark.parametrize("spec", thinned(STACKS), ids=name)
def test_rescaling_rounds_nothing(spec: StackSpec) -> None:
    """Multiples by powers of two are exact: all columns but the logarithms (a sum) are the same."""
    for scaled, raw in zip(measure(spec), measure(spec, raw_range=True), strict=True):
        for a, b in zip(scaled, raw, strict=True):
            assert not {c for c in differences(cells(a), cells(b), 0) if "log10" not in c}
            assert a.log10_grad_norm == pytest.approx(b.log10_grad_norm, abs=1e-12)


@given(
    spec=st.sampled_from(STACKS),
    seed=st.integers(0, 10),
    k=st.integers(-400, 400),
)
def test_scaling_the_cotangent_by_2_to_the_k_adds_k(spec: StackSpec, seed: int, k: int) -> None:
    """In float64, where the squares of the cotangent neither over- nor underflow."""
    spec = retyped(spec, dtype="float64")
    base, scaled = network(spec, seed), network(spec, seed)
    scaled.loss.v.mul_(2.0**k)
    for tables in zip(*(walk(spec, seed, net).records() for net in (base, scaled)), strict=True):
        for a, b in zip(*tables, strict=True):
            assert math.ldexp(a.grad_norm, k) == b.grad_norm
            assert b.log10_grad_norm - a.log10_grad_norm == pytest.approx(
                k * math.log10(2), rel=1e-14, abs=1e-12
            )


@given(
    spec=st.sampled_from(STACKS),
    depth=st.integers(1, 12),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(sorted(TOLERANCE)),
)
def test_gains_multiply_and_their_parts_add(
    spec: StackSpec, depth: int, seed: int, dtype: str
) -> None:
    first, *units = measure(retyped(spec, depth=depth, dtype=dtype), seed)[0]
    product = math.prod(row.gain for row in units)
    assert product == pytest.approx(first.grad_norm / units[-1].grad_norm, rel=1e-6)
    for row in units:
        cos = row.skip_branch_cos or 0.0  # empty where plain, and the skip is 0
        parts = row.skip_gain**2 + row.branch_gain**2 + 2 * cos * row.skip_gain * row.branch_gain
        assert row.gain**2 == pytest.approx(parts, rel=1e-5)


def tanh_mlp(**options: Any) -> StackSpec:
    """Plain tanh, ordered phase: the gradient shrinks exponentially towards the input."""
    sizes = {"width": 32, "batch_size": 8, "bias_var": 0.05}
    options = {"depth": 2000, "weight_var": 1.0, **sizes, **options}
    return StackSpec(block="mlp", shortcut="plain", norm="none", activation="tanh", **options)


@pytest.mark.slow
def test_depth_2000_is_finite_and_raw_range_says_where_float32_dies() -> None:
    spec = tanh_mlp()
    (rows, params), (raw, _) = measure(spec), measure(spec, raw_range=True)
    assert len(rows) == 2001
    assert rows[0].log10_grad_norm < -100
    assert all(math.isfinite(row.log10_grad_norm) for row in (*rows, *params))
    assert all(row.nonfinite == 0 and row.zero_fraction < 0.01 for row in rows)
    dead = [row for row in raw if row.grad_norm == 0]
    assert [row.layer for row in dead] == list(range(len(dead)))
    assert len(dead) > 100
    assert all(row.log10_grad_norm == -math.inf and row.zero_fraction == 1 for row in dead)
    # Between float32's smallest normal number, 10^-37.9, and its smallest, 10^-44.9.
    assert -46 < rows[len(dead) - 1].log10_grad_norm < -37
    assert -46 < raw[len(dead)].log10_grad_norm < -37


def test_the_logarithm_goes_on_where_float64_ends() -> None:
    rows, params = measure(tanh_mlp(weight_var=0.1, depth=1000))
    assert rows[0].grad_norm == params[0].grad_norm == rows[1].param_grad_norm == 0
    assert -2000 < rows[0].log10_grad_norm < -400
    assert -2000 < params[0].log10_grad_norm < -400
    total = sum(math.log10(row.gain) for row in rows[1:])
    assert rows[0].log10_grad_norm == pytest.approx(total, rel=1e-9, abs=1e-6)


def test_the_logarithm_goes_on_above_float64() -> None:
    rows, _ = measure(tanh_mlp(weight_var=400.0, width=64, depth=1000))
    assert rows[0].grad_norm == math.inf
    assert 308.3 < rows[0].log10_grad_norm < 2000
    assert all(row.nonfinite == 0 for row in rows)


def test_a_single_unit_may_shrink_the_gradient_to_subnormals() -> None:
    spec = small("mlp", shortcut="plain", norm="none", activation="linear", bias_var=None)
    rows, _ = measure(retyped(spec, weight_var=1e-80))
    for row in rows:
        assert row.nonfinite == 0
        assert row.log10_grad_norm == pytest.approx(-40 * (spec.depth - row.layer), abs=0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("layer", [1, 3, 5])
def test_a_planted_nonfinite_weight_shows(layer: int, bad: float) -> None:
    spec = small("mlp", depth=5, norm="none", activation="linear", dtype="float64")
    net = network(spec)
    with torch.no_grad():
        net.blocks[layer - 1][0].branch.linear.weight[0, 0] = bad
    rows, _ = walk(spec, 0, net).records()
    truth, _ = oracle.measure(spec, net)
    assert [row.nonfinite for row in rows] == [true["nonfinite"] for true in truth]
    assert all(row.nonfinite > 0 for row in rows[:layer])
    assert all(row.nonfinite == 0 for row in rows[layer:])
    finite = [math.isfinite(row.act_max_abs) and math.isfinite(row.act_rms) for row in rows]
    assert finite == [row.layer < layer for row in rows]


def test_a_dead_layer_is_an_exact_zero_below_it() -> None:
    spec = small("mlp", shortcut="plain", norm="none", depth=5)
    net = network(spec)
    with torch.no_grad():
        net.blocks[2][0].branch.linear.weight.zero_()
    rows, params = walk(spec, 0, net).records()
    assert [row.grad_norm == 0 for row in rows] == [row.layer < 3 for row in rows]
    assert [row.zero_fraction == 1 for row in rows] == [row.layer < 3 for row in rows]
    assert [row.log10_grad_norm == -math.inf for row in rows] == [row.layer < 3 for row in rows]
    assert all((row.grad_norm == 0) == (row.layer < 3) for row in params)


@pytest.mark.parametrize("spec", thinned(STACKS), ids=name)
def test_saved_bytes_are_those_that_the_graph_holds(spec: StackSpec) -> None:
    net = network(spec)
    rows, _ = walk(spec, 0, net).records()
    for row, tape in zip(rows[1:], record_forward(net), strict=True):
        own = {p.untyped_storage().data_ptr() for p in tape.unit.parameters()}
        assert row.saved_bytes == saved_storages(tape.y, own)


def test_a_relu_layer_keeps_its_input_and_its_output() -> None:
    rows, _ = measure(small("mlp", shortcut="plain", norm="none"))
    batch_of_float32 = 6 * 32 * 4
    assert [row.saved_bytes for row in rows] == [None, *[2 * batch_of_float32] * 3]


@pytest.mark.parametrize("loss", LOSS_KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_loss_is_that_of_the_oracle(block: str, loss: str) -> None:
    spec = small(block, loss=loss, dtype="float64")
    net = network(spec)
    true = oracle.total_loss(spec, net.loss, oracle.forward(spec, net)[-1].y)
    assert walk(spec, 0, net).loss.item() == pytest.approx(true.item(), rel=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_cotangent_has_norm_1(block: str) -> None:
    rows, _ = measure(small(block, dtype="float64"))
    assert rows[-1].grad_norm == pytest.approx(1, abs=1e-14)
    assert rows[-1].log10_grad_norm == pytest.approx(0, abs=1e-14)
