"""Times from a scripted clock: what is marked, in which order, and what is made of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from clocks import FakeClock
from problems import network, small
from records import layer_rows, run_of, spec_of

from gradflow.engine import timing
from gradflow.engine.tape import Network
from gradflow.engine.timing import (
    Clock,
    CpuClock,
    bare_pass,
    collector_paused,
    stack_timer,
    summarise_times,
    take_times,
    timed_pass,
)
from gradflow.measuring.columns import with_times
from gradflow.runs.records import Run, TimeRecord, Timing
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

MLP = small("mlp")
TRANSFORMER = small("transformer")


def net(spec: StackSpec = MLP) -> Network:
    return network(spec)


def timed(spec: StackSpec = MLP, steps: Sequence[float] = (1.0,), **options: float) -> Timing:
    chosen = RunOptions(**{"repeats": 3, "time_budget": 1e-9, **options})
    return take_times(stack_timer(net(spec)), chosen, FakeClock(steps))


# What is marked


class LoggingClock(FakeClock):
    """Also notes its marks in a log that the network writes to."""

    def __init__(self, log: list[str]) -> None:
        super().__init__([1.0])
        self.log = log

    def mark(self) -> float:
        self.log.append("mark")
        return super().mark()


def logged(spec: StackSpec) -> tuple[Network, list[str]]:
    """A network that notes the forward and the backward of its units, and its loss."""
    log: list[str] = []
    made = net(spec)
    for layer, block in enumerate(made.blocks, start=1):
        for unit in block.units:
            name = f"{unit.name}{layer}"
            unit.after.register_forward_hook(lambda *_, name=name: log.append(f"forward {name}"))
            weight = unit.weights[0]
            weight.register_hook(lambda _, name=name: log.append(f"backward {name}"))
    made.loss.register_forward_hook(lambda *_: log.append("loss"))
    return made, log


def test_marks_stand_between_units_and_the_loss_outside() -> None:
    spec = small("transformer", depth=2, norm="post")
    made, log = logged(spec)
    timed_pass(made, LoggingClock(log))
    units = ["attention1", "ffn1", "attention2", "ffn2"]
    forward = [word for unit in units for word in (f"forward {unit}", "mark")]
    backward = [word for unit in reversed(units) for word in (f"backward {unit}", "mark")]
    assert log == ["mark", *forward, "loss", "mark", *backward]


def test_a_bare_pass_is_marked_at_its_ends() -> None:
    made, log = logged(small("mlp", depth=2, norm="post"))
    bare_pass(made, LoggingClock(log))
    expected = ["forward mlp1", "forward mlp2", "loss", "backward mlp2", "backward mlp1"]
    assert log == ["mark", *expected, "mark"]


def test_backward_times_are_told_first_unit_first() -> None:
    forward, backward = timed_pass(net(TRANSFORMER), FakeClock([1.0, 2, 3, 4, 5, 6, 7] * 2))
    assert forward == [2, 3, 4, 5, 6, 7]
    assert backward == [7, 6, 5, 4, 3, 2]


@pytest.mark.parametrize("loss", ["cotangent", "ce"])
def test_a_pass_leaves_no_gradient(loss: str) -> None:
    made = net(small("ffn", loss=loss))
    bare_pass(made, CpuClock())
    timed_pass(made, CpuClock())
    parameters = [p for block in made.blocks for p in block.parameters()]
    assert [p.grad for p in (*parameters, *made.loss.parameters())] == [None] * (
        len(parameters) + len(list(made.loss.parameters()))
    )
    assert made.x.grad is None
    assert not made.x.requires_grad


def test_a_bare_pass_computes_every_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made = net(TRANSFORMER)
    seen: list[bool] = []

    def look(module: torch.nn.Module) -> None:
        seen.extend(p.grad is not None for p in module.parameters())

    monkeypatch.setattr(torch.nn.Module, "zero_grad", look)
    bare_pass(made, CpuClock())
    assert seen
    assert all(seen)


# How many passes


class CountedPasses:
    """Stands in for the two passes and notes their turns; both take as long as they are told."""

    def __init__(self, seconds: float) -> None:
        self.turns: list[str] = []
        self.paused: list[bool] = []
        self._seconds = seconds
        self.timer = replace(stack_timer(net()), timed=self.timed, bare=self.bare)

    def timed(self, _: Clock) -> tuple[tuple[list[float], list[float]], float]:
        self._note("timed")
        share = self._seconds / 12  # six units' passes take half, the bare pass the other half
        return ([share] * 3, [share] * 3), self._seconds / 2

    def bare(self, _: Clock) -> float:
        self._note("bare")
        return self._seconds / 2

    def _note(self, turn: str) -> None:
        self.turns.append(turn)
        self.paused.append(not gc.isenabled())


@pytest.mark.parametrize(
    ("repeats", "budget", "pairs"), [(3, 0.5, 3), (3, 4.5, 5), (1, 1.0, 1), (7, 7.0, 7)]
)
def test_repeats_until_both_the_least_number_and_the_budget(
    repeats: int, budget: float, pairs: int
) -> None:
    passes = CountedPasses(seconds=1.0)
    ticks: list[None] = []
    options = RunOptions(repeats=repeats, time_budget=budget)
    found = take_times(passes.timer, options, FakeClock([1.0]), lambda: ticks.append(None))
    assert passes.turns == ["timed", "bare"] * (pairs + 1)
    assert all(passes.paused)
    assert gc.isenabled()
    assert len(ticks) == pairs
    assert {record.repeat for record in found.repeats} == set(range(pairs))


def test_the_warm_up_is_not_stored() -> None:
    marks = len(TRANSFORMER.kind.units) * TRANSFORMER.depth + 1
    slow_warm_up = [100.0] * (2 * marks + 2) + [1.0] * 10_000
    found = timed(TRANSFORMER, slow_warm_up)
    assert {(r.forward_s, r.backward_s) for r in found.repeats} == {(1.0, 1.0)}
    assert found.bare_s == 1.0


def test_every_repeat_of_every_unit_is_a_record() -> None:
    found = timed(small("transformer", depth=1), repeats=2)
    assert [(r.repeat, r.layer, r.unit) for r in found.repeats] == [
        *[(0, 1, "attention"), (0, 1, "ffn")],
        *[(1, 1, "attention"), (1, 1, "ffn")],
    ]


def test_the_collector_comes_back_as_it_was() -> None:
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


# What is made of them

UNITS = [(1, "attention"), (1, "ffn")]
# Repeats x (forward, backward) x units.
PASSES = np.array([[[1, 2], [3, 4]], [[5, 2], [1, 8]], [[3, 2], [2, 0]], [[9, 2], [8, 4]]], float)


def pairs(table: np.ndarray) -> list[tuple[list[float], list[float]]]:
    return [(forward, backward) for forward, backward in table.tolist()]


def test_medians_and_interquartile_ranges_are_exact() -> None:
    found = summarise_times(UNITS, pairs(PASSES), [10.0, 20.0, 30.0])
    assert found.units == ((4.0, 3.5, 2.5, 2.5), (2.0, 0.0, 4.0, 2.0))
    assert found.total_s == 13.0  # of 10, 16, 7, 23
    assert found.spread == (17.75 - 9.25) / 13.0
    assert (found.bare_s, found.bare_iqr_s) == (20.0, 10.0)


def test_one_repeat_has_no_spread() -> None:
    found = summarise_times(UNITS, pairs(PASSES[:1]), [10.0])
    assert found.units == ((1.0, 0.0, 3.0, 0.0), (2.0, 0.0, 4.0, 0.0))
    assert (found.spread, found.bare_iqr_s) == (0.0, 0.0)


def test_without_bare_passes_there_is_nothing_to_reconcile_with() -> None:
    found = summarise_times(UNITS, pairs(PASSES))
    assert (found.bare_s, found.bare_iqr_s) == (None, None)


def test_records_hold_the_raw_repeats() -> None:
    found = summarise_times(UNITS, pairs(PASSES))
    assert found.repeats[2:4] == (
        TimeRecord(1, 1, "attention", 5, 1),
        TimeRecord(1, 1, "ffn", 2, 8),
    )


def with_total(total: float = 1.0, bare: float | None = 1.0, spread: float = 0.0) -> Run:
    """A run of one unit that takes `total`, a quarter of it forward."""
    spec = spec_of(depth=1)
    units = ((total / 4, 0.01, total * 3 / 4, 0.02),)
    bare_iqr = None if bare is None else 0.125
    found = Timing(units, (TimeRecord(0, 1, "mlp", 0.25, 0.75),), total, bare, bare_iqr, spread)
    layers = [row for seed in (0, 1) for row in layer_rows(spec, [0.0, 0.0], seed)]
    run = run_of(spec, layers, options=RunOptions(seeds=2), warnings=(), overhead=None)
    return with_times(run, found, [2.0])


def test_times_go_to_the_units_of_the_first_seed() -> None:
    rows = with_total().layer_records
    times = [(r.forward_s, r.forward_s_iqr, r.backward_s, r.backward_s_iqr) for r in rows]
    assert times == [(None,) * 4, (0.25, 0.01, 0.75, 0.02), (None,) * 4, (None,) * 4]


def test_the_sum_is_reconciled_with_the_bare_pass() -> None:
    run = with_total(1.0, bare=0.8)
    assert run.overhead == {
        "statistics_pass_s": 2.0,
        "bare_pass_s": 0.8,
        "bare_pass_iqr_s": 0.125,
        "timed_pass_s": 1.0,
        "statistics_over_bare": 2.5,
        "timed_over_bare": 1.25,
    }
    assert (run.summary.forward_s, run.summary.backward_s) == (0.25, 0.75)
    assert run.summary.forward_s_per_layer == 0.25
    assert len(run.time_records) == 1


def warnings_of(**found: float | None) -> str:
    return " | ".join(with_total(**found).warnings)


def test_steady_times_that_add_up_raise_no_warning() -> None:
    assert warnings_of(total=1.09, spread=0.09) == ""


def test_a_large_spread_is_said_with_its_remedy() -> None:
    said = warnings_of(spread=0.25)
    assert "timings vary by 25% between repeats" in said
    assert "close other programs" in said
    assert "--repeats or --time-budget" in said


@pytest.mark.parametrize(("total", "share"), [(1.5, "150%"), (0.5, "50%")])
def test_a_sum_that_does_not_add_up_is_said_with_its_remedy(total: float, share: str) -> None:
    said = warnings_of(total=total)
    assert f"add up to {share} of the bare pass" in said
    assert "take a larger batch" in said


def test_without_a_bare_pass_nothing_is_said_of_the_sum() -> None:
    run = with_total(5.0, bare=None)
    assert (run.warnings, run.overhead) == ((), None)


# Clocks


def test_the_fake_clock_repeats_its_script() -> None:
    clock = FakeClock([1.0, 2.0])
    marks = [clock.mark() for _ in range(5)]
    assert clock.seconds(marks) == [2.0, 1.0, 2.0, 1.0]


def moments() -> Iterator[float]:
    clock = CpuClock()
    yield from (clock.mark() for _ in range(3))


def test_the_cpu_clock_counts_seconds_and_never_back() -> None:
    differences = CpuClock().seconds(list(moments()))
    assert len(differences) == 2
    assert all(0 <= seconds < 60 for seconds in differences)


def test_the_clock_fits_the_device() -> None:
    assert isinstance(timing.clock_for(torch.device("cpu")), CpuClock)
    assert isinstance(timing.clock_for(torch.device("cuda")), timing.CudaClock)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cuda_clock_times_the_work_and_not_its_launch() -> None:
    device = torch.device("cuda")
    clock = timing.clock_for(device)
    x = torch.randn(4096, 4096, device=device)
    marks = [clock.mark()]
    for repeats in (1, 20):
        for _ in range(repeats):
            x @ x
        marks.append(clock.mark())
    once, often = clock.seconds(marks)
    assert often > 5 * once


def test_real_times_of_a_real_network_are_positive() -> None:
    found = take_times(stack_timer(net()), RunOptions(repeats=2, time_budget=1e-9), CpuClock())
    assert len(found.units) == 3
    assert all(forward > 0 and backward > 0 for forward, _, backward, _ in found.units)
    assert found.bare_s is not None
    assert found.bare_s > 0
