"""When passes are captured, what is asked of torch for it, and what a run says of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clocks import FakeClock
from commandline import CommandLine
from problems import CPU, network, small
from recorded import FakeCapture
from records import run_of

import gradflow
from gradflow.engine.cuda_graphs import Graphs, graphs_on
from gradflow.engine.memory import footprint, make_plan
from gradflow.engine.plan import Footprint, Plan, choose, pays_as_graphs, with_graphs
from gradflow.engine.timing import CudaClock, mark_bare, mark_units
from gradflow.engine.walk import walk
from gradflow.errors import MeasurementError, UsageError
from gradflow.judging.comparison import time_ratio
from gradflow.measuring.any import timer_for
from gradflow.runs.records import TimeRecord
from gradflow.specs.grid import Cell
from gradflow.specs.run_options import RunOptions
from gradflow.sweeps.sweep import _timed_well


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: nothing is at hand."""
    monkeypatch.setattr("gradflow.reductions.is_at_hand", lambda _: False)


# What is asked of torch


class FakeCuda:
    """Stands in for torch.cuda, and notes what is asked of it and on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: bool = False) -> None:
        self.log: list[str] = []
        self.now, self.broken = "default", broken
        replaced = {
            "Stream": lambda device: FakeStream(self, f"side of {device}"),
            "current_stream": lambda _: FakeStream(self, self.now),
            "stream": lambda stream: self.inside(stream.name),
            "device": lambda _: nullcontext(),
            "current_device": lambda: 1,
            "graph_pool_handle": lambda: (0, 7),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": lambda _, pool, stream: self.capturing(pool, stream.name),
            "Event": lambda **options: FakeEvent(self, options),
        }
        for word, fake in replaced.items():
            monkeypatch.setattr(torch.cuda, word, fake)
        for word in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, word, partial(self.left, word), raising=False)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        before, self.now = self.now, name
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def capturing(self, pool: tuple[int, int], name: str) -> Iterator[None]:
        """Torch's own does not restore the stream where the end of a capture fails."""
        self.now = name
        self.log.append(f"begin {pool}")
        yield
        self.log.append("end")

    def left(self, what: str, device: int, pool: tuple[int, int]) -> None:
        self.log.append(f"{what} {device} {pool}")

    def work(self) -> str:
        self.log.append(f"work on {self.now}, collector {gc.isenabled()}")
        if self.broken and "begin (0, 7)" in self.log:
            raise RuntimeError("operation not permitted")
        return "found"


@dataclass
class FakeStream:
    cuda: FakeCuda
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(f"{self.name} after {other.name}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"wait for {self.name}")


@dataclass
class FakeEvent:
    cuda: FakeCuda
    options: dict[str, bool]

    def record(self, stream: FakeStream) -> None:
        self.cuda.log.append(f"event {self.options} on {stream.name}")

    def elapsed_time(self, _: FakeEvent) -> float:
        return 5.0


SIDE = "side of cuda:1"


def test_passes_are_warmed_up_and_captured_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    replay = graphs_on(torch.device("cuda:1"), RunOptions(cuda_graphs=True))(cuda.work)
    assert cuda.log == [
        f"{SIDE} after default",
        f"work on {SIDE}, collector True",
        f"default after {SIDE}",
        "begin (0, 7)",
        f"work on {SIDE}, collector False",
        "end",
    ]
    assert [replay(), replay()] == ["found", "found"]
    assert cuda.log[6:] == ["replay", "replay"]
    assert cuda.now == "default"


def test_after_a_capture_that_failed_torch_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, broken=True)
    graphs = graphs_on(torch.device("cuda:1"), RunOptions())
    assert graphs(cuda.work) == cuda.work
    assert cuda.log[-2:] == [
        "_cuda_endAllocateToPool 1 (0, 7)",
        "_cuda_releasePool 1 (0, 7)",
    ]
    assert "operation not permitted" in graphs.warnings[0]
    assert (cuda.now, gc.isenabled()) == ("default", True)


def test_a_pool_that_torch_gave_back_is_not_given_back_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch, broken=True)

    def ended(*_: object) -> None:
        raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    graphs_on(torch.device("cuda:1"), RunOptions())(cuda.work)
    assert not [line for line in cuda.log if line.startswith("_cuda_releasePool")]


def test_marks_are_events_that_replays_record_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    clock = CudaClock(torch.device("cuda:1"))
    assert clock.seconds([clock.mark(), clock.mark()]) == [0.005]
    external = {"enable_timing": True, "external": True}
    assert cuda.log == [f"event {external} on default"] * 2 + ["wait for default"]


# When


NARROW = Footprint(parameters=100, objects=0, graph=1000, stream=4 << 20, rows=0, nodes=10)


@pytest.mark.parametrize(
    ("changes", "width", "stream", "pays"),
    [
        ({}, 512, 4 << 20, True),
        ({}, 513, 4 << 20, False),
        ({}, 512, (4 << 20) + 1, False),
        ({"timed": 0}, 8, 8, False),
        ({"rebuild": True}, 8, 8, False),
        ({"spans": (1,)}, 8, 8, False),
    ],
)
def test_graphs_pay_where_timed_stacks_are_whole_and_narrow(
    changes: dict[str, Any], width: int, stream: int, pays: bool
) -> None:
    plan = replace(Plan(9, (), rebuild=False, timed=9), **changes)
    assert pays_as_graphs(plan, width, replace(NARROW, stream=stream)) is pays


def test_the_plan_accounts_for_the_memory_of_the_graphs() -> None:
    options = RunOptions(keep="graph")
    plan, _ = choose(10, NARROW, options, 1 << 40)
    more = with_graphs(plan, NARROW)
    assert more.graphs
    # A pass of its own: what autograd keeps, the gradients, the nodes.
    assert more.needed - plan.needed == int(1.2 * 10 * (1000 + 100 + 10))
    assert "parameters resident, passes replayed as CUDA graphs: about" in more.sentence
    assert "CUDA" not in plan.sentence


class Gpu:
    """Looks like a GPU to the plan, and allocates on the CPU."""

    type = "cuda"


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, True),
        ({"timing": False}, False),
        ({"cuda_graphs": False}, False),
        ({"cuda_graphs": True, "timing": False}, True),
        ({"keep": "sqrt"}, False),
        ({"steps": 5}, False),
    ],
)
def test_they_are_chosen_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], graphs: bool
) -> None:
    spec = small("mlp")
    size = footprint(spec, 0, CPU)
    monkeypatch.setattr("gradflow.engine.memory.available_bytes", lambda _: 1 << 34)
    monkeypatch.setattr("gradflow.engine.memory.footprint", lambda *_: size)
    assert make_plan(spec, RunOptions(**options), Gpu()).graphs is graphs
    assert not make_plan(spec, RunOptions(**options | {"cuda_graphs": None}), CPU).graphs


def test_they_are_left_out_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("mlp")
    size = footprint(spec, 0, CPU)
    monkeypatch.setattr("gradflow.engine.memory.footprint", lambda *_: size)
    monkeypatch.setattr("gradflow.engine.memory.available_bytes", lambda _: 1 << 34)
    needed = make_plan(spec, RunOptions(cuda_graphs=False), Gpu()).needed
    monkeypatch.setattr("gradflow.engine.memory.available_bytes", lambda _: 2 * needed + 1000)
    plan = make_plan(spec, RunOptions(), Gpu())
    assert (plan.graphs, plan.keep, plan.needed) == (False, "graph", needed)
    monkeypatch.setattr("gradflow.engine.memory.available_bytes", lambda _: needed + 1000)
    with pytest.raises(MeasurementError, match="or leave out --cuda-graphs"):
        make_plan(spec, RunOptions(cuda_graphs=True), Gpu())


@pytest.mark.whole
def test_the_kernels_of_a_unit_are_not_more_than_the_plan_counts() -> None:
    """Operations of torch, of which many have no kernel."""
    spec = small("transformer", loss="ce", depth=2)
    net, counted = network(spec), 0
    passes = (
        partial(walk, spec, 0),
        *(partial(p, clock=FakeClock([1])) for p in (mark_units, mark_bare)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradflow.reductions.is_at_hand", lambda _: False)
        for work in passes:
            capture = FakeCapture()
            Graphs(capture, required=True)(partial(work, net))
            counted += sum(bool(step.out) for step in capture.steps)
    assert counted / 4 < footprint(spec, 0, CPU).nodes / 2 / 4096


# Options


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", "5"), "--cuda-graphs applies to initialisation, not to training; got --steps"),
        (("--keep", "sqrt"), "--cuda-graphs keeps the whole stack; got --keep sqrt"),
        (("--rebuild",), "--cuda-graphs keeps the whole stack; got --rebuild"),
        (("--model", "hf:gpt2"), "--cuda-graphs is for stacks"),
        (("--device", "cpu"), "--cuda-graphs needs a GPU; got --device cpu; leave it out"),
    ],
)
def test_what_does_not_go_with_graphs_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: Sequence[str], says: str
) -> None:
    found = CommandLine(capsys, tmp_path)("run", "--cuda-graphs", *words)
    assert found.code == 2
    assert says in found.complaint
    assert found.complaint.count("\n") <= 1


def test_it_is_a_flag_or_left_to_gradflow() -> None:
    assert RunOptions().cuda_graphs is None
    with pytest.raises(UsageError, match="--cuda-graphs is a flag"):
        RunOptions(cuda_graphs="yes")


# Runs


def measured(
    monkeypatch: pytest.MonkeyPatch, capture: FakeCapture | None, **options: Any
) -> gradflow.Run:
    chosen = RunOptions(device="cpu", repeats=1, time_budget=1e-9, **options)
    if capture is not None:
        graphs = Graphs(capture, required=False)
        monkeypatch.setattr("gradflow.measuring.stack.graphs_on", lambda *_: graphs)
        monkeypatch.setattr(
            "gradflow.measuring.stack.make_plan",
            lambda *words: replace(make_plan(*words), graphs=True),
        )
    return gradflow.measure(small("ffn"), chosen, clock=FakeClock([1.0]))


@pytest.mark.usefixtures("far")
def test_a_run_of_graphs_says_so_and_has_the_eager_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager, capture = measured(monkeypatch, None, seeds=2), FakeCapture()
    run = measured(monkeypatch, capture, seeds=2)
    assert list(run.layer_records) == list(eager.layer_records)
    assert list(run.param_records) == list(eager.param_records)
    assert run.summary.loss == eager.summary.loss
    assert run.environment["cuda_graphs"] is True
    assert "cuda_graphs" not in eager.environment
    assert run.warnings == eager.warnings
    timed = ["warm-up", "capture", "replay"]
    assert [word for word in capture.log if word != "replay"] == [
        *timed[:2],
        *timed[:2],
        *timed[:2],
        "capture",  # units, bare, statistics of two seeds
    ]
    assert capture.log[-2:] == ["capture", "replay"]


@pytest.mark.usefixtures("far")
def test_a_run_that_could_not_be_captured_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = measured(monkeypatch, None)
    run = measured(monkeypatch, FakeCapture(broken="no"))
    assert list(run.layer_records) == list(eager.layer_records)
    assert "cuda_graphs" not in run.environment
    assert "ran eagerly: CUDA error: no" in run.warnings[0]


def test_the_timer_of_a_sweep_is_eager_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture = FakeCapture()
    graphs = Graphs(capture, required=True)
    monkeypatch.setattr("gradflow.measuring.any.graphs_on", lambda *_: graphs)
    monkeypatch.setattr("gradflow.engine.memory._for_graphs", lambda options, _: options)
    timer_for(small("mlp"), RunOptions(), CPU).timed(FakeClock([1.0]))
    assert capture.log == []
    timer_for(small("mlp"), RunOptions(cuda_graphs=True), CPU).timed(FakeClock([1.0]))
    assert capture.log == ["warm-up", "capture", "replay"]


def test_replayed_and_eager_times_are_never_ratioed() -> None:
    eager = run_of()
    mine = replace(eager, environment=eager.environment | {"cuda_graphs": True})
    timed = partial(replace, time_records=[TimeRecord(0, 1, "mlp", 1.0, 2.0)])
    says = ("CUDA graphs against eager", "eager against CUDA graphs", "")
    pairs = ((mine, eager), (eager, mine), (mine, mine))
    found = (time_ratio(timed(a), timed(b), ("forward_s",)).reason for a, b in pairs)
    assert tuple(found) == says


def test_a_sweep_takes_no_times_that_were_taken_in_another_way() -> None:
    repeats = [TimeRecord(n, 1, "mlp", 1.0, 2.0) for n in range(5)]
    eager = replace(run_of(), time_records=repeats)
    replayed = replace(eager, environment=eager.environment | {"cuda_graphs": True})
    plain = Cell(eager.spec, RunOptions())
    asked = Cell(eager.spec, RunOptions(cuda_graphs=True))
    pairs = ((eager, plain), (eager, asked), (replayed, plain), (replayed, asked))
    here = {"threads": eager.environment.get("threads")}
    found = [_timed_well(run, cell, here, shared=False) for run, cell in pairs]
    assert found == [True, False, False, True]
