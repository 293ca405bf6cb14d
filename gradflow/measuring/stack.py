"""`measure`: one stack, all its seeds, one device; from a specification to a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from gradflow.engine import compiled
from gradflow.engine.build import build_network, build_timed
from gradflow.engine.cuda_graphs import Graphs, graphs_on
from gradflow.engine.environment import describe_environment, resolve_device
from gradflow.engine.memory import make_plan, peak_bytes, refusing_when_full, reset_peak
from gradflow.engine.plan import Plan
from gradflow.engine.rows import RecordTables, new_tables
from gradflow.engine.seeds.blocks import SeedBlocks
from gradflow.engine.seeds.walk import SeedWalk, seed_network, walk_seeds
from gradflow.engine.tape import Network, Ticker, visits
from gradflow.engine.timing import Clock, clock_for, matmul_flop_per_s, stack_timer, take_times
from gradflow.engine.walk import Walk, walk
from gradflow.errors import MeasurementError
from gradflow.judging.assembly import Measured, assembled_run
from gradflow.measuring.columns import with_theory, with_times
from gradflow.measuring.progress import Progress, counter
from gradflow.networks.stack import Block
from gradflow.networks.units.template import Compiled
from gradflow.runs.records import Run, StepRecord, Timing
from gradflow.specs.requests import as_trained
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.training.steps import train_stack

_WalkT = TypeVar("_WalkT", Walk, SeedWalk)


def measure(
    spec: StackSpec,
    options: RunOptions | None = None,
    *,
    progress: Progress = lambda *_: None,
    clock: Clock | None = None,
    scratch: Path | None = None,
) -> Run:
    """Measure gradient flow, and the time of each unit, in one stack.

    Args:
        spec: the network, its input and its loss; where the options train it, input and loss are
            those of a task, see `training_spec.as_trained`.
        options: seeds, device, timing, memory; the defaults of `RunOptions` if None.
        progress: called as the work goes on.
        clock: clock in the place of the device's own.
        scratch: folder for rows that do not fit into memory; the system's if None.

    Returns:
        The run, not stored yet: `gradflow.save` does that.

    Raises:
        UsageError: the device is not there, or lacks the dtype, or there is no such training.
        MeasurementError: out of memory, or the disk of `scratch` is full.
    """
    options = options or RunOptions()
    spec = as_trained(spec, options)
    return measure_stack(spec, options, progress=progress, clock=clock, scratch=scratch)


def measure_stack(
    spec: StackSpec,
    options: RunOptions,
    *,
    progress: Progress = lambda *_: None,
    clock: Clock | None = None,
    scratch: Path | None = None,
) -> Run:
    """Measure a stack whose input and loss are those of its task already; else as `measure`."""
    device = resolve_device(options.device, spec.dtype)
    environment = describe_environment(spec, device)
    started, begin = datetime.now(UTC), perf_counter()
    clock = clock or clock_for(device)
    plan = make_plan(spec, options, device)
    reset_peak(device)
    work = _StackMeasurement(spec, options, device, plan, progress, clock)
    try:
        with refusing_when_full(plan.needed, spec, options, device):
            results = work.all_seeds(scratch)
    except OSError as error:
        raise MeasurementError(
            f"the rows found no place on disk: {error.strerror or error}; "
            "free some space or choose another --out; nothing half-written remains"
        ) from None
    environment |= {
        "start_utc": started.isoformat(timespec="seconds"),
        "duration_s": perf_counter() - begin,
        "keep": plan.keep,
        "rebuild": plan.rebuild,
        "memory_policy": plan.sentence,
    }
    if options.compile:
        environment["compiled"] = compiled.BACKEND
    if work.graphs and work.graphs.captured:
        environment["cuda_graphs"] = True
    return _run_of(spec, options, environment, results)


@dataclass(frozen=True)
class _SeedResults:
    """What the passes over all seeds leave behind.

    Attributes:
        losses: loss of each seed at initialisation.
        peak: largest memory in use, in bytes.
        pass_seconds: seconds of the statistics pass of each seed, times the share of its layers
            that is timed; empty where seeds share a pass, or are trained.
        timing: times of the first seed; None if it was not timed.
    """

    tables: RecordTables
    losses: Sequence[float]
    peak: int
    warnings: Sequence[str]
    pass_seconds: Sequence[float] = ()
    steps: Sequence[StepRecord] = ()
    timing: Timing | None = None


def _run_of(
    spec: StackSpec, options: RunOptions, environment: dict[str, Any], results: _SeedResults
) -> Run:
    measured = Measured(
        spec,
        options,
        environment,
        layers=results.tables.layers,
        params=results.tables.params,
        steps=results.steps,
        losses=() if spec.loss == "cotangent" else results.losses,
        warnings=results.warnings,
        peak_bytes=results.peak,
    )
    return with_times(with_theory(assembled_run(measured)), results.timing, results.pass_seconds)


@dataclass(frozen=True)
class _StackMeasurement:
    """The passes of one measurement: times, then statistics, of every seed."""

    spec: StackSpec
    options: RunOptions
    device: torch.device
    plan: Plan
    progress: Progress
    clock: Clock

    @cached_property
    def join(self) -> Compiled | None:
        """The compiled forward of units; None if they are not compiled."""
        return compiled.compiled_join() if self.options.compile else None

    @cached_property
    def graphs(self) -> Graphs | None:
        """The CUDA graphs of the passes; None if they are not captured."""
        return graphs_on(self.device, self.options) if self.plan.graphs else None

    def all_seeds(self, scratch: Path | None) -> _SeedResults:
        """Measure every seed; rows that do not fit into memory go to files in the folder."""
        if self.options.steps:
            return self._trained(new_tables(scratch))
        if self.plan.seeds > 1:
            return self._in_one_pass([new_tables(scratch) for _ in self.options.all_seeds])
        return self._one_by_one(new_tables(scratch))

    def _one_by_one(self, tables: RecordTables) -> _SeedResults:
        timing = self._time_apart() if self.plan.is_sampled else None
        losses: list[float] = []
        passes: list[float] = []
        share = max(self.plan.timed, 1) / self.spec.depth
        for seed in self.options.all_seeds:
            self.progress("building", 0, 1)
            network = build_network(self.spec, seed, self.device, self.plan, self.join)
            if self.options.timing and timing is None:
                timing = self._time(network)
            tick = self._ticker(f"gradients, seed {seed}")
            work = partial(walk, self.spec, seed, network, tables=tables, tick=tick, **self._how)
            done, seconds = self._timed(work)
            passes.append(seconds * share)
            losses.append(done.loss.item())
            del work, network  # or the next one would be built beside it
        return self._results(tables, losses, pass_seconds=passes, timing=timing)

    def _in_one_pass(self, each: Sequence[RecordTables]) -> _SeedResults:
        """Measure all seeds in one pass; its seconds are not compared with those of one seed."""
        timing = self._time_apart() if self.options.timing else None
        self.progress("building", 0, 1)
        seeds = self.options.all_seeds
        drawn: Sequence[Block] = SeedBlocks(self.spec, seeds, self.device)
        blocks = drawn if self.plan.rebuild else drawn[:]
        network = seed_network(self.spec, seeds, blocks, self.device)
        tables = dict(zip(seeds, each, strict=True))
        tick = self._ticker(f"gradients, {len(seeds)} seeds")
        work = partial(walk_seeds, self.spec, network, tables, tick=tick, **self._how)
        done, _ = self._timed(work)
        for other in each[1:]:
            each[0].extend(other)
        return self._results(each[0], done.losses.tolist(), timing=timing)

    def _trained(self, tables: RecordTables) -> _SeedResults:
        """Train every seed; the rows of the steps that are measured go to the tables."""
        timing = self._time_apart() if self.options.timing else None
        steps: list[StepRecord] = []
        losses: list[float] = []
        for seed in self.options.all_seeds:
            self.progress("building", 0, 1)
            tick = counter(self.progress, f"training, seed {seed}", self.options.steps + 1)
            trained = train_stack(self.spec, seed, self.device, self.options, tick)
            tables.layers.extend(trained.layers)
            tables.params.extend(trained.params)
            steps += trained.steps
            losses.append(trained.steps[0].loss)
        return self._results(tables, losses, steps=steps, timing=timing)

    def _results(
        self, tables: RecordTables, losses: Sequence[float], **others: Any
    ) -> _SeedResults:
        warnings = self.graphs.warnings if self.graphs else ()
        return _SeedResults(tables, losses, peak_bytes(self.device), warnings, **others)

    @property
    def _how(self) -> dict[str, Any]:
        """Arguments that all walks share."""
        return {"spans": self.plan.spans, "raw_range": self.options.raw_range}

    def _ticker(self, phase: str) -> Ticker:
        """Return a ticker for the layers that a walk computes, forward or back."""
        layers = visits(self.spec.depth, self.plan.spans) + self.spec.depth
        return counter(self.progress, phase, layers)

    def _timed(self, work: Callable[[], _WalkT]) -> tuple[_WalkT, float]:
        """Return a walk, all of it in its tables, and its seconds."""
        do = self.graphs(work) if self.graphs else work
        marks = [self.clock.mark()]
        done = do()
        marks.append(self.clock.mark())
        (seconds,) = self.clock.seconds(marks)
        done.finish()
        return done, seconds

    def _time_apart(self) -> Timing:
        """Time the first seed in a network that is built for it."""
        self.progress("building", 0, 1)
        seed = self.options.seed
        return self._time(build_timed(self.spec, seed, self.device, self.plan, self.join))

    def _time(self, network: Network) -> Timing:
        tick = counter(self.progress, "timing", self.options.repeats)
        timer = stack_timer(network, self.graphs)
        timing = take_times(timer, self.options, self.clock, tick)
        del timer  # and with it the memory of its graphs
        assert timing is not None  # every unit of a stack is timed
        rate = matmul_flop_per_s(self.device, self.spec.dtype, self.clock)
        return replace(timing, matmul_flop_per_s=rate)
