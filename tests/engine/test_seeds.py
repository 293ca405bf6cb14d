"""All seeds in one pass: the numbers are those of one seed after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from problems import CPU, SIZES, network, retyped, small, thinned
from recorded import FakeCapture
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradflow
from gradflow.engine.cuda_graphs import Graphs
from gradflow.engine.memory import footprint, make_plan
from gradflow.engine.plan import (
    LEAST_SEEDS,
    MOST_SEEDS,
    MOST_WORK,
    Footprint,
    Plan,
    choose,
    with_seeds,
)
from gradflow.engine.rows import new_tables
from gradflow.engine.seeds.blocks import SeedBlocks
from gradflow.engine.seeds.walk import seed_network, walk_seeds
from gradflow.engine.tape import count_saved
from gradflow.engine.walk import walk
from gradflow.errors import MeasurementError, UsageError
from gradflow.networks.ends import stream_shape
from gradflow.networks.initial import Weights
from gradflow.networks.stack import build_block
from gradflow.reductions import SeedReductions, forward_sums, grad_norm, gradient_sums, part_sums
from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.schemes import SCHEMES
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

SEEDS = (3, 8)
Records = list[LayerRecord | ParamRecord]


def at_once(spec: StackSpec, **options: Any) -> dict[int, Records]:
    """Every seed's rows by one pass."""
    tables = {seed: new_tables(None) for seed in SEEDS}
    blocks = SeedBlocks(spec, SEEDS, CPU)
    net = seed_network(spec, SEEDS, blocks if options.get("spans") else blocks[:], CPU)
    walk_seeds(spec, net, tables, **options).finish()
    return {seed: [*found.layers, *found.params] for seed, found in tables.items()}


def one_by_one(spec: StackSpec, **options: Any) -> dict[int, Records]:
    """The oracle: one pass for each seed."""
    walks = {seed: walk(spec, seed, network(spec, seed), **options) for seed in SEEDS}
    return {seed: [*layers, *params] for seed, (layers, params) in records(walks)}


def records(walks: dict[int, Any]) -> Iterable[tuple[int, Any]]:
    return ((seed, found.records()) for seed, found in walks.items())


# What float64 may leave of terms that cancel, as those of the gradient of keys' biases. The terms
# are of the size of the cotangent, whose norm is 1, and a sum of a few hundred of them rounds by a
# few times 2.2e-16. A bound relative to what is left, however small, would say nothing of the code.
ROUNDING = 1e-14


def agree(ours: Records, theirs: Records, tolerance: float) -> bool:
    """Whether all cells are the same, numbers to the tolerance."""
    return all(
        same(f.name, getattr(mine, f.name), getattr(other, f.name), tolerance)
        for mine, other in zip(ours, theirs, strict=True)
        for f in fields(mine)
    )


def same(name: str, a: object, b: object, tolerance: float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        unknown = math.isnan(a) and math.isnan(b)
        close = math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        return close or unknown or (name.startswith("log10") and same_size(a, b))
    return a == b


def same_size(log_a: float, log_b: float) -> bool:
    """Whether the numbers with these decadic logarithms are equal up to rounding."""
    return abs(10**log_a - 10**log_b) < ROUNDING


def of_scheme(name: str) -> StackSpec:
    block = SCHEMES[name].blocks[0]
    return StackSpec(scheme=name, block=block, depth=3, **SIZES[BLOCKS[block].domain])


def case(spec: StackSpec) -> str:
    return f"{spec.scheme or spec.norm} {spec.block}"


CASES = [
    *(small(block, norm=norm) for block in BLOCKS for norm in ("none", "pre", "post")),
    *(small("mlp", norm="pre", norm_kind=kind) for kind in ("rmsnorm", "batchnorm", "groupnorm")),
    small("mlp", shortcut="plain", activation="tanh"),
    small("transformer", norm_kind="derf"),
    small("transformer", loss="ce"),
    small("mlp", loss="mse"),
    small("transformer", heads=6, kv_heads=2, rope=100.0, gated=True, causal=True),
    *(of_scheme(name) for name in SCHEMES if name != "stochastic-depth"),
]


@pytest.mark.parametrize("stack", thinned(CASES), ids=case)
def test_seeds_together_are_seeds_one_by_one(stack: StackSpec) -> None:
    spec = retyped(stack, dtype="float64")
    ours, theirs = at_once(spec), one_by_one(spec)
    assert all(agree(ours[seed], theirs[seed], 1e-9) for seed in SEEDS)
    assert not agree(ours[3][1:], [replace(r, seed=3) for r in ours[8][1:]], 1e-3)


@pytest.mark.parametrize("spans", [(1,), (2,), (3, 1)])
def test_memory_policies_keep_to_their_numbers_bit_by_bit(spans: tuple[int, ...]) -> None:
    spec = small("transformer", depth=7)
    assert at_once(spec, spans=spans) == at_once(spec)


@pytest.mark.parametrize("scheme", ["pre-ln", "lns"])
def test_no_layer_is_drawn_twice(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Not where all layers are of one kind, nor where each has a factor of its own."""
    drawn: list[object] = []
    draw = Weights.draw

    def counted(self: Weights, source: torch.Generator) -> None:
        drawn.append(source.initial_seed())
        draw(self, source)

    monkeypatch.setattr(Weights, "draw", counted)
    spec = StackSpec(scheme=scheme, depth=4, **SIZES["tokens"])
    assert len(SeedBlocks(spec, SEEDS, CPU)[:]) == 4
    assert len(drawn) == len(set(drawn)) == 4 * len(SEEDS)


SINKING = StackSpec(
    block="mlp", shortcut="plain", norm="none", activation="tanh", gain=0.7, depth=300, width=16
)


def log10(row: LayerRecord | ParamRecord) -> float:
    assert isinstance(row, LayerRecord)
    assert row.log10_grad_norm is not None
    return row.log10_grad_norm


def test_seeds_have_powers_of_two_of_their_own() -> None:
    """A plain net of float32 whose gradient is below every float32, in each seed by itself."""
    ours, theirs = at_once(SINKING), one_by_one(SINKING)
    first = {seed: [log10(rows[0]) for rows in (ours[seed], theirs[seed])] for seed in SEEDS}
    for mine, other in first.values():
        assert mine == pytest.approx(other, abs=1e-3)
        assert mine < -45
    assert abs(first[3][0] - first[8][0]) > 0.1


def test_raw_range_dies_where_it_does_alone() -> None:
    ours, theirs = at_once(SINKING, raw_range=True), one_by_one(SINKING, raw_range=True)
    dead = [[row.grad_norm for row in rows[:301]].count(0.0) for rows in (ours[3], theirs[3])]
    assert dead[0] == dead[1] > 20


ODD = [math.nan, math.inf, -math.inf, 0.0]


@pytest.mark.parametrize("tokens", [True, False])
def test_sums_of_all_seeds_are_those_of_each(tokens: bool) -> None:
    """Also where some elements are odd: by the functions of one seed, slice by slice."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, 5, 6, generator=g, dtype=torch.float64) for _ in range(2))
    for place, value in enumerate(ODD):
        x[1, place % 2, place, : place + 1] = value
    pairs = [
        (
            SeedReductions.forward_sums(y, tokens=tokens),
            lambda i: forward_sums(y[i], tokens=tokens),
        ),
        (SeedReductions.gradient_sums(x), lambda i: gradient_sums(x[i])),
        (SeedReductions.part_sums(x, y), lambda i: part_sums(x[i], y[i])),
        (
            dict(enumerate(SeedReductions.grad_norm(x))),
            lambda i: dict(enumerate(grad_norm(x[i]))),
        ),
    ]
    for together, alone in pairs:
        for i in range(3):
            for name, value in alone(i).items():
                want = torch.as_tensor(value, dtype=torch.float64)
                torch.testing.assert_close(
                    torch.as_tensor(together[name])[i].double(),
                    want,
                    equal_nan=True,
                    rtol=1e-12,
                    atol=0,
                )
    assert SeedReductions.gradient_sums(x)["nonfinite"].tolist() == [0, 6, 0]


def test_a_planted_nan_stays_in_its_seed() -> None:
    spec = small("mlp", depth=4)
    tables = {seed: new_tables(None) for seed in SEEDS}
    blocks = SeedBlocks(spec, SEEDS, CPU)[:]
    (unit,) = blocks[1].units
    with torch.no_grad():
        unit.weights[0][1].fill_(math.nan)  # of the second seed
    walk_seeds(spec, seed_network(spec, SEEDS, blocks, CPU), tables).finish()
    counts = {seed: sum(row.nonfinite for row in found.layers) for seed, found in tables.items()}
    assert counts[3] == 0 < counts[8]


@pytest.mark.parametrize("block", ["mlp", "transformer"])
def test_the_pass_can_be_captured_as_a_graph(monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    """It reads nothing from the device, and a replay gives the eager numbers."""
    spec = small(block, loss="ce")
    plain = at_once(spec)
    monkeypatch.setattr("gradflow.reductions.is_at_hand", lambda _: False)
    tables = {seed: new_tables(None) for seed in SEEDS}
    net = seed_network(spec, SEEDS, SeedBlocks(spec, SEEDS, CPU)[:], CPU)
    Graphs(FakeCapture(), required=True)(partial(walk_seeds, spec, net, tables))().finish()
    assert {seed: [*found.layers, *found.params] for seed, found in tables.items()} == plain


NARROW = StackSpec(block="mlp", width=32, depth=20)


def planned(spec: StackSpec = NARROW, **options: Any) -> Plan:
    return make_plan(spec, RunOptions(device="cpu", timing=False, **options), CPU)


def test_it_is_chosen_where_it_pays() -> None:
    assert planned(seeds=LEAST_SEEDS).seeds == LEAST_SEEDS
    assert planned(seeds=LEAST_SEEDS - 1).seeds == 1
    assert planned(seeds=MOST_SEEDS).seeds == MOST_SEEDS
    assert planned(seeds=MOST_SEEDS + 1).seeds == 1  # or its tables would be too many open files
    assert planned(seeds=8, together=False).seeds == 1
    wide = StackSpec(width=256, depth=2)
    assert footprint(wide, 0, CPU).work > MOST_WORK > footprint(NARROW, 0, CPU).work
    assert planned(wide, seeds=8).seeds == 1
    assert planned(wide, seeds=8, together=True).seeds == 8


LONG = StackSpec(width=8, heads=2, seq_len=512, batch_size=1, depth=6)


def test_long_sequences_go_one_by_one() -> None:
    """Their scores take longer together, and memory that one seed never takes."""
    assert footprint(LONG, 0, CPU).work < MOST_WORK
    assert planned(LONG, seeds=8).seeds == 1
    assert planned(replace(LONG, seq_len=128), seeds=8).seeds == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_plan_knows_what_attention_keeps_of_several_seeds(dtype: str) -> None:
    """The oracle: bytes that autograd saves where torch computes attention step by step."""
    spec = retyped(LONG, dtype=dtype)
    unit = next(iter(build_block(spec, 0, 1, CPU).units))
    x = torch.ones(stream_shape(spec), dtype=getattr(torch, dtype))
    with sdpa_kernel(SDPBackend.MATH):
        kept = count_saved(unit, x)
    assert footprint(spec, 0, CPU).scores == pytest.approx(kept - count_saved(unit, x), rel=0.05)
    assert planned(spec, seeds=3, together=True).needed > 3 * spec.depth * kept


def test_the_work_of_a_layer_is_its_multiply_adds() -> None:
    spec = StackSpec(block="mlp", norm="none", width=32, batch_size=10, depth=1)
    assert footprint(spec, 0, CPU).work == 10 * (32 * 32 + 32)


def test_the_plan_says_so_and_needs_more() -> None:
    alone, together = planned(seeds=8, together=False), planned(seeds=8)
    assert together.sentence.endswith("; 8 seeds in one pass")
    assert "seeds" not in alone.sentence
    assert together.needed > 4 * alone.needed


def test_it_is_not_chosen_where_memory_would_force_another_policy() -> None:
    size = Footprint(parameters=1000, objects=0, graph=9000, stream=1000, rows=0)
    options = RunOptions(seeds=8, memory_limit="400KiB")
    plan, _ = choose(20, size, options, 1 << 40)
    assert plan.keep == "graph"
    assert with_seeds(plan, NARROW, options, size, 1 << 40) == (plan, True)
    asked, fits = with_seeds(plan, NARROW, replace(options, together=True), size, 1 << 40)
    assert fits
    assert asked.keep != "graph"


def test_what_was_asked_for_and_does_not_fit_is_an_error_not_something_else() -> None:
    limit = "400KiB"
    assert planned(seeds=MOST_SEEDS, memory_limit=limit, together=None).seeds == 1
    with pytest.raises(MeasurementError, match=r"400 KiB are allowed; .*or leave out --together$"):
        planned(seeds=MOST_SEEDS, memory_limit=limit, together=True)


def test_more_seeds_than_tables_can_be_open_are_refused() -> None:
    with pytest.raises(UsageError, match="not for more than 256 seeds"):
        planned(seeds=MOST_SEEDS + 1, together=True)


REFUSED = {
    "training": ({}, {"steps": 3}),
    "--compile": ({}, {"compile": True}),
    "dropped at random": ({"scheme": "stochastic-depth", "block": "resnet"}, {}),
    "profiles each seed": ({"scheme": "admin", "block": "transformer"}, {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_is_refused_and_never_chosen(what: str) -> None:
    stack, options = REFUSED[what]
    spec = StackSpec(**{"block": "mlp", "depth": 3, "width": 16} | stack)
    assert planned(spec, seeds=8, **options).seeds == 1
    with pytest.raises(UsageError, match=what):
        planned(spec, seeds=8, together=True, **options)


@pytest.mark.parametrize("policy", [{}, {"keep": "boundaries", "rebuild": True}])
def test_a_run_is_the_same_run(policy: dict[str, Any]) -> None:
    spec = StackSpec(block="mlp", width=16, depth=40, dtype="float64", loss="mse")
    both = [
        gradflow.measure(
            spec, RunOptions(device="cpu", seeds=5, timing=False, together=together, **policy)
        )
        for together in (True, False)
    ]
    together, alone = both
    assert agree(list(together.layer_records), list(alone.layer_records), 1e-9)
    assert agree(list(together.param_records), list(alone.param_records), 1e-9)
    assert together.summary.loss == pytest.approx(alone.summary.loss, rel=1e-12)
    assert together.summary.verdict == alone.summary.verdict
    assert "5 seeds in one pass" in str(together.environment["memory_policy"])


def test_a_pass_of_all_seeds_is_not_divided_by_a_bare_pass_of_one() -> None:
    run = gradflow.measure(NARROW, RunOptions(device="cpu", seeds=5, repeats=1, time_budget=1e-9))
    assert "5 seeds in one pass" in str(run.environment["memory_policy"])
    assert run.overhead is not None
    assert set(run.overhead) == {
        *("bare_pass_s", "bare_pass_iqr_s", "timed_pass_s", "timed_over_bare"),
    }
    assert all(row.forward_s is not None for row in run.layer_records[:21] if row.layer)


def test_a_word_that_is_no_flag_is_refused() -> None:
    with pytest.raises(UsageError, match="use --together or --no-together"):
        RunOptions(together="yes")  # type: ignore[arg-type]
