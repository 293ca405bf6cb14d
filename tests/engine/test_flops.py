"""FLOPs against closed forms and torch's own counter; the matmul rate from a scripted clock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from clocks import FakeClock
from problems import CPU, network, small
from records import layer_rows, run_of, spec_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gradflow
from gradflow.engine import timing
from gradflow.engine.flops import FlopCounter, network_flops
from gradflow.engine.timing import LONG_ENOUGH_S, SMALLEST, CpuClock, matmul_flop_per_s, timed_pass
from gradflow.measuring.columns import with_times
from gradflow.runs.records import Summary, TimeRecord, Timing
from gradflow.showing.terminal.one_run import speed_lines
from gradflow.specs.grid import Cell
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.sweeps import rounds

# Counting


def test_a_product_of_n_by_k_and_k_by_m_has_2_n_k_m() -> None:
    n, k, m = 3, 5, 7
    with FlopCounter() as counter:
        torch.ones(n, k) @ torch.ones(k, m) + 1
    assert counter.total == 2 * n * k * m


def test_products_by_groups_are_those_of_their_parts() -> None:
    """What experts do to the tokens that come to them, forward and backward."""
    tokens, experts, n, m = (6, 2), 2, 8, 4
    x, w = torch.ones(sum(tokens), n, requires_grad=True), torch.ones(experts, n, m)
    ends = torch.tensor(tokens).cumsum(0, dtype=torch.int32)
    with FlopCounter() as counter:
        torch._grouped_mm(x, w.requires_grad_(), offs=ends).square().sum().backward()
    assert counter.is_complete
    assert counter.total == sum(3 * 2 * rows * n * m for rows in tokens)


@torch.library.custom_op("gradflow_tests::product", mutates_args=())
def own_product(x: Tensor) -> Tensor:
    return x @ x


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "lstm": nn.LSTM(4, 4),
    "bilinear": lambda x: nn.Bilinear(4, 4, 2)(x, x),
    "sparse": lambda x: torch.sparse.mm(torch.eye(4).to_sparse(), x.detach()),
    "own operation": own_product,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_products_inside_an_operation_are_not_counted_as_none(name: str) -> None:
    with FlopCounter() as counter:
        UNKNOWN[name](torch.ones(4, 4, requires_grad=True))
    assert not counter.is_complete


# Of one layer, forward; its backward pass has twice the products.
PRODUCTS: dict[str, tuple[StackSpec, int]] = {
    "mlp": (small("mlp"), 2 * 6 * 32 * 32),
    "conv": (small("conv"), 2 * 4 * 5 * 5 * 9 * 16 * 16),
    "resnet": (small("resnet"), 2 * 2 * 4 * 5 * 5 * 9 * 16 * 16),
    "ffn": (small("ffn"), 2 * 2 * 15 * 12 * 24),
    "gated": (small("ffn", gated=True), 3 * 2 * 15 * 12 * 24),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_branches_of_products_have_their_closed_form(name: str) -> None:
    spec, forward = PRODUCTS[name]
    assert network_flops(network(spec)) == (spec.depth * forward, spec.depth * 2 * forward)


@pytest.mark.parametrize("heads", [{}, {"heads": 6, "kv_heads": 2, "head_dim": 4, "causal": True}])
def test_attention_has_two_products_of_tokens_by_tokens_and_computes_one_again(
    heads: dict[str, int],
) -> None:
    """Scores and mix are 2 products forward; backward 4, and the scores again: 5."""
    spec = small("attention", **heads)
    batch, tokens, size, count = 3, 5, spec.head_size, int(spec.heads or 1)
    queries, keys = count * size, int(spec.kv_heads or count) * size
    linear = 2 * batch * tokens * spec.width * (2 * queries + 2 * keys)
    product = 2 * batch * count * tokens * tokens * size
    forward, backward = network_flops(network(spec))
    assert forward == spec.depth * (linear + 2 * product)
    assert backward == spec.depth * (2 * linear + 5 * product)


@pytest.mark.parametrize("name", PRODUCTS)
def test_torchs_own_counter_agrees(name: str) -> None:
    made = network(PRODUCTS[name][0])
    with FlopCounterMode(display=False) as counter:
        y = made.x.clone().requires_grad_()
        for block in made.blocks:
            y = block(y)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert (forward, counter.get_total_flops() - forward) == network_flops(made)


COUNTED = (
    small("transformer"),
    small("transformer", norm="post", depth=4),
    *(
        StackSpec(scheme=scheme, depth=4, width=16, batch_size=2)
        for scheme in ("stochastic-depth", "deepscalelm", "hyper-connections", "denseformer")
    ),
)


@pytest.mark.parametrize("spec", COUNTED, ids=lambda spec: spec.slug)
def test_the_sum_over_the_units_is_that_of_the_whole_pass(spec: StackSpec) -> None:
    made = network(spec)
    with FlopCounter() as counter:
        timed_pass(made, CpuClock())
    assert sum(network_flops(made)) == counter.total


def test_counting_leaves_nothing_behind() -> None:
    made = network(small("transformer"))
    before, state = made.x.clone(), torch.get_rng_state()
    network_flops(made)
    assert torch.equal(made.x, before)
    assert not made.x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.grad for block in made.blocks for p in block.parameters()} == {None}


@pytest.mark.slow  # a process of its own
def test_counting_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from gradflow.engine.build import build_network\n"
        "from gradflow.engine.flops import network_flops\n"
        "from gradflow.specs.stack import StackSpec\n"
        "made = build_network(StackSpec(depth=1, width=8), 0, torch.device('cpu'))\n"
        "assert network_flops(made)[0] > 0\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# The device's rate


def rate(*steps: float) -> float:
    return matmul_flop_per_s(CPU, "float32", FakeClock(steps))


def test_the_rate_is_that_of_the_median_product() -> None:
    """The first step of the script comes before the first mark."""
    assert rate(0.0, 1.0, 9.0, 2.0) == 2 * SMALLEST**3 / 2.0


def test_products_grow_until_they_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing._LARGEST, "cpu", 4 * SMALLEST)
    short = [LONG_ENOUGH_S / 2] * 4
    assert rate(*short, *[1.0] * 4) == 2 * (2 * SMALLEST) ** 3 / 1.0


def test_products_grow_no_further_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing._LARGEST, "cpu", 2 * SMALLEST)
    assert rate(LONG_ENOUGH_S / 4) == pytest.approx(2 * (2 * SMALLEST) ** 3 / (LONG_ENOUGH_S / 4))


def test_the_rate_of_a_real_clock_is_that_of_a_product() -> None:
    state = torch.get_rng_state()
    assert 1e6 < matmul_flop_per_s(CPU, "float64", CpuClock()) < 1e15
    assert torch.equal(torch.get_rng_state(), state)


# What is made of them


def summary_with(flops: tuple[int, int] | None, device: float | None, depth: int = 2) -> Summary:
    """One of `depth` layers was timed: 0.5 s forward, 2 s backward."""
    units = ((0.5, 0.0, 2.0, 0.0),)
    rows = (TimeRecord(0, 1, "mlp", 0.5, 2.0),)
    spec = spec_of(depth=depth)
    run = run_of(spec, list(layer_rows(spec, [0.0] * (depth + 1))))
    timing = Timing(units, rows, 2.5, None, None, 0.0, flops, device)
    return with_times(run, timing).summary


def test_layers_that_were_not_timed_count_as_those_that_were() -> None:
    found = summary_with((1_000_000, 2_000_000), 5e6)
    assert (found.forward_flop, found.backward_flop) == (2_000_000, 4_000_000)
    assert (found.forward_flop_per_s, found.backward_flop_per_s) == (2e6, 1e6)
    assert found.matmul_flop_per_s == 5e6


def test_what_was_not_counted_is_missing() -> None:
    found = summary_with(None, None)
    assert (found.forward_flop, found.backward_flop) == (None, None)
    assert (found.forward_flop_per_s, found.backward_flop_per_s) == (None, None)
    assert list(speed_lines(found)) == []


def lines(summary: Summary) -> list[str]:
    return [line.plain for line in speed_lines(summary)]


def test_the_speed_is_said_with_its_share_of_the_matmul_rate() -> None:
    found = summary_with((6_150_000_000, 20_000_000_000), 27.5e9)
    forward = "Speed: forward 12.3 GFLOP/s, 45% of this machine's matmul rate"
    assert lines(found) == [f"{forward}; backward 10.0 GFLOP/s, 36%."]
    alone = replace(found, matmul_flop_per_s=None, forward_flop_per_s=2.5e13)
    assert lines(alone) == ["Speed: forward 25,000 GFLOP/s, backward 10.0 GFLOP/s."]


def test_where_no_product_is_made_nothing_is_said() -> None:
    assert lines(summary_with((0, 0), 1e9)) == []


def measured(spec: StackSpec, options: RunOptions) -> Summary:
    return gradflow.measure(spec, options, clock=FakeClock([1.0])).summary


def test_a_run_has_them() -> None:
    spec = small("mlp", depth=2)
    found = measured(spec, RunOptions(device="cpu", repeats=1, time_budget=1e-9))
    forward = 2 * 2 * 6 * 32 * 32
    assert (found.forward_flop, found.backward_flop) == (forward, 2 * forward)
    assert (found.forward_flop_per_s, found.backward_flop_per_s) == (forward / 2, forward)
    assert found.matmul_flop_per_s == 2 * SMALLEST**3


def test_a_run_without_times_has_none_and_multiplies_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "product_seconds", None)
    found = measured(small("mlp", depth=2), RunOptions(device="cpu", timing=False))
    assert (found.forward_flop, found.matmul_flop_per_s) == (None, None)


def of_cells(*dtypes: str) -> Sequence[Timing | None]:
    options = RunOptions(device="cpu", repeats=1, time_budget=1e-9)
    cells = [Cell(spec_of(depth=1, dtype=dtype), options) for dtype in dtypes]
    taken = rounds.Rounds(cells, FakeClock([1.0]))
    taken.run()
    return [taken.timing(cell) for cell in cells]


def test_cells_of_a_sweep_have_them_and_the_rate_of_their_dtype_is_measured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def fake(_: torch.device, dtype: str, __: object) -> float:
        asked.append(dtype)
        return {"float32": 2.0, "float64": 1.0}[dtype]

    monkeypatch.setattr(rounds, "matmul_flop_per_s", fake)
    found = of_cells("float32", "float64", "float32")
    assert [each and each.matmul_flop_per_s for each in found] == [2.0, 1.0, 2.0]
    assert asked == ["float32", "float64"]
    assert all(each and each.flops and each.flops[0] > 0 for each in found)
