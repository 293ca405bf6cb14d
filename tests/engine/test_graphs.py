"""Captured passes: nothing in them reads a value, and a replay gives the eager numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from clocks import FakeClock
from no_sync import no_sync
from policy_numbers import numbers
from problems import PROBLEMS, SIZES, name, network, small, thinned
from recorded import GARBAGE, FakeCapture, NoReading, WaitError
from torch import Tensor, nn

import gradflow
from gradflow.engine.build import build_network
from gradflow.engine.cuda_graphs import Graphs, graphs_on
from gradflow.engine.tape import Network
from gradflow.engine.timing import CudaClock, mark_bare, mark_units, stack_timer
from gradflow.engine.walk import walk
from gradflow.errors import MeasurementError
from gradflow.schemes import SCHEMES
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec


def schemed(scheme: str, block: str) -> StackSpec:
    return StackSpec(scheme=scheme, block=block, depth=3, **SIZES[BLOCKS[block].domain])


# Every kind of block, loss and norm, not every combination of them; every kind of unit.
BLOCKWISE = {
    name(spec): spec
    for spec in PROBLEMS
    if (spec.shortcut, spec.norm) == ("residual", "pre")
    and (spec.norm_kind == spec.domain.norm_kind or (spec.block, spec.loss) == ("ffn", "ce"))
}
UNITS = {
    spec.wiring(1, 0).unit: spec
    for scheme in SCHEMES
    if (spec := schemed(scheme, SCHEMES[scheme].blocks[0]))
}
FEW = BLOCKWISE | UNITS
ALL = {name(spec): spec for spec in PROBLEMS} | {
    f"{scheme}-{block}": schemed(scheme, block)
    for scheme in SCHEMES
    for block in SCHEMES[scheme].blocks
}


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: nothing is at hand."""
    monkeypatch.setattr("gradflow.reductions.is_at_hand", lambda _: False)


def captured(spec: StackSpec, net: Network, capture: FakeCapture, **options: Any) -> str:
    """As `test_policies.numbers`, from a replay."""
    found = Graphs(capture, required=True)(partial(walk, spec, 0, net, **options))()
    return repr((found.records(), found.loss.item()))


# Nothing is read


def on_meta(net: Network) -> Network:
    """The stack on a device that has no values: whatever reads one fails."""
    blocks = [block.to("meta") for block in net.blocks]
    for block in blocks:
        for unit in block.units:
            unit.seal()
    loss = net.loss.to("meta")
    for part in loss.modules():  # what is no parameter
        for key, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(part, key, value.to("meta"))
    return Network(blocks, net.x.to("meta"), loss)


@pytest.mark.parametrize("spec", thinned(FEW.values()), ids=FEW)
def test_the_statistics_pass_reads_no_value_and_copies_none_to_the_host(spec: StackSpec) -> None:
    net = on_meta(network(spec))
    with NoReading():
        walk(spec, 0, net)


@pytest.mark.parametrize("spec", thinned(BLOCKWISE.values()), ids=BLOCKWISE)
def test_nor_do_the_timed_passes(spec: StackSpec) -> None:
    net = on_meta(network(spec))
    with NoReading():
        mark_units(net, FakeClock([1.0]))
        mark_bare(net, FakeClock([1.0]))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.ones(3).to("meta") + x,
        lambda x: x.new_empty(3).copy_(torch.ones(3)),
        torch.rand_like,
        nn.functional.dropout,
    ],
)
def test_what_reads_a_value_is_seen(read: Any) -> None:
    """The negative control."""
    x = torch.ones(3, device="meta")
    with NoReading(), pytest.raises(WaitError):
        read(x)


# The same numbers


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("spec", thinned(FEW.values()), ids=FEW)
def test_a_replay_gives_the_eager_numbers_bit_by_bit(spec: StackSpec) -> None:
    net = network(spec)
    assert captured(spec, net, FakeCapture()) == numbers(spec, net)


@pytest.mark.slow
@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
def test_so_it_does_for_every_stack(spec: StackSpec) -> None:
    net = network(spec)
    assert captured(spec, net, FakeCapture()) == numbers(spec, net)


@pytest.mark.parametrize("raw_range", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_so_it_does_in_other_formats_and_ranges(
    monkeypatch: pytest.MonkeyPatch, dtype: str, raw_range: bool
) -> None:
    """Against a pass that reads as it goes, over several chunks of rows."""
    spec = small("ffn", dtype=dtype, depth=9, gain=1e-2, loss="ce")
    net = network(spec)
    eager = walk(spec, 0, net, raw_range=raw_range)
    plain = repr((eager.records(), eager.loss.item()))
    monkeypatch.setattr("gradflow.engine.rows.CHUNK_UNITS", 4)
    monkeypatch.setattr("gradflow.reductions.is_at_hand", lambda _: False)
    assert captured(spec, net, FakeCapture(), raw_range=raw_range) == plain


def test_without_a_far_device_the_pass_reads_and_cannot_be_captured() -> None:
    """The negative control."""
    spec = small("mlp")
    with pytest.raises(MeasurementError, match="_local_scalar_dense"):
        captured(spec, network(spec), FakeCapture())


@pytest.mark.usefixtures("far")
def test_what_a_capture_leaves_is_read_after_the_replay() -> None:
    spec = small("mlp")
    net, capture = network(spec), FakeCapture()
    replay = Graphs(capture, required=True)(partial(walk, spec, 0, net))
    before = walk(spec, 0, net).loss.item()
    first = replay()
    assert first.loss.item() == before
    first.loss.fill_(GARBAGE)
    assert replay().loss.item() == before
    net.x.mul_(2)  # the memory is that of the capture, the numbers those of the replay
    assert replay().loss.item() == walk(spec, 0, net).loss.item() != before


# Times


def test_replayed_passes_are_timed_by_the_marks_of_their_capture() -> None:
    net, capture, log = network(small("transformer")), FakeCapture(), list[str]()

    class Clock(FakeClock):
        def mark(self) -> float:
            log.append("mark")
            return super().mark()

    timer = stack_timer(net, Graphs(capture, required=True))
    clock = Clock([1.0, 2.0])
    passes = [timer.timed(clock), timer.timed(Clock([5.0]))]
    bare = [timer.bare(clock), timer.bare(clock)]
    assert capture.log == ["warm-up", "capture", "replay", "replay"] * 2
    assert len(log) == 2 * (2 * 7 + 2)  # in each warm-up and capture, and never in a replay
    assert passes[0] == passes[1]
    assert bare[0] == bare[1]
    assert timer.summary(passes, bare).bare_s == bare[0]


def test_a_replayed_bare_pass_leaves_no_gradient() -> None:
    net = network(small("ffn", loss="ce"))
    stack_timer(net, Graphs(FakeCapture(), required=True)).bare(FakeClock([1.0]))
    parameters = [p for block in net.blocks for p in block.parameters()]
    assert all(p.grad is None for p in (*parameters, *net.loss.parameters()))


# What cannot be captured


def test_a_kind_of_pass_is_warmed_up_once() -> None:
    capture = FakeCapture()
    graphs = Graphs(capture, required=False)
    for seed in range(2):
        graphs(partial(torch.full, (2,), seed))()
    graphs(partial(torch.zeros, 2))()
    assert capture.log == [
        *("warm-up", "capture", "replay", "capture", "replay"),
        *("warm-up", "capture", "replay"),
    ]
    assert graphs.captured == 3
    assert graphs.warnings == ()


def test_what_cannot_be_captured_is_done_eagerly_and_nothing_more_is_tried() -> None:
    capture = FakeCapture(broken="operation not permitted when stream is capturing")
    graphs = Graphs(capture, required=False)
    assert [graphs(partial(torch.full, (1,), n))().item() for n in (3, 4)] == [3, 4]
    assert capture.log == ["warm-up", "capture"]
    assert graphs.captured == 0
    (said,) = graphs.warnings
    assert said == (
        "a pass could not be captured as a CUDA graph, and ran eagerly: CUDA error: operation not "
        "permitted when stream is capturing; --no-cuda-graphs runs all so"
    )


def test_it_is_an_error_where_graphs_are_asked_for() -> None:
    graphs = Graphs(FakeCapture(broken="no"), required=True)
    with pytest.raises(MeasurementError) as said:
        graphs(partial(torch.zeros, 2))
    assert str(said.value) == (
        "--cuda-graphs could not capture a pass: CUDA error: no; leave it out"
    )


def test_an_error_of_the_work_itself_is_not_blamed_on_the_capture() -> None:
    def work() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory"):
        Graphs(FakeCapture(), required=False)(work)


# On a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", ["mlp", "transformer", "resnet"])
def test_on_a_gpu_a_replay_gives_the_eager_numbers(block: str, dtype: str) -> None:
    spec = small(block, depth=9, dtype=dtype)
    net, graphs = build_network(spec, 0, GPU), graphs_on(GPU, RunOptions(cuda_graphs=True))
    found = graphs(partial(walk, spec, 0, net))()
    assert repr((found.records(), found.loss.item())) == numbers(spec, net)


@needs_gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_gpu_every_scheme_can_be_captured(scheme: str) -> None:
    spec = schemed(scheme, SCHEMES[scheme].blocks[0])
    net, graphs = build_network(spec, 0, GPU), graphs_on(GPU, RunOptions(cuda_graphs=True))
    assert len(graphs(partial(walk, spec, 0, net))().records()[0]) > 2


@needs_gpu
def test_on_a_gpu_replayed_units_are_timed_one_by_one() -> None:
    net = build_network(small("transformer", depth=9), 0, GPU)
    timer = stack_timer(net, graphs_on(GPU, RunOptions(cuda_graphs=True)))
    clock = CudaClock(GPU)
    for _ in range(2):
        (forward, backward), total = timer.timed(clock)
        assert len(forward) == len(backward) == 18
        assert all(seconds > 0 for seconds in (*forward, *backward, timer.bare(clock)))
        assert total == pytest.approx(sum(forward) + sum(backward))


@needs_gpu
def test_on_a_gpu_a_replay_does_not_wait_for_the_device() -> None:
    spec = small("transformer", depth=9)
    net, graphs = build_network(spec, 0, GPU), graphs_on(GPU, RunOptions(cuda_graphs=True))
    replay = graphs(partial(walk, spec, 0, net))
    with no_sync():
        found = replay()
    assert len(found.records()[0]) == 19


@needs_gpu
def test_on_a_gpu_what_waits_runs_eagerly_and_later_passes_are_not_harmed() -> None:
    graphs = graphs_on(GPU, RunOptions())
    x = torch.ones(3, device=GPU)
    assert graphs(lambda: x.sum().item())() == 3
    assert "ran eagerly: " in graphs.warnings[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    spec = small("transformer")
    again = graphs_on(GPU, RunOptions(cuda_graphs=True))
    net = build_network(spec, 0, GPU)
    found = again(partial(walk, spec, 0, net))()
    assert repr((found.records(), found.loss.item())) == numbers(spec, net)


@needs_gpu
def test_on_a_gpu_a_narrow_run_is_captured_without_being_asked() -> None:
    options = RunOptions(device="cuda", seeds=2, repeats=1, time_budget=1e-9)
    run = gradflow.measure(small("transformer"), options)
    eager = gradflow.measure(small("transformer"), replace(options, cuda_graphs=False))
    assert run.environment["cuda_graphs"] is True
    assert "cuda_graphs" not in eager.environment
    rows = [(r.log10_grad_norm, r.gain, r.act_rms) for r in run.layer_records]
    assert rows == [(r.log10_grad_norm, r.gain, r.act_rms) for r in eager.layer_records]
