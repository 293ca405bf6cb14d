"""`measure`: one specification, all its seeds, one device; from a spec to a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch

from gradflow.engine import compiled
from gradflow.engine.build import build_network, build_timed
from gradflow.engine.cuda_graphs import Graphs, graphs_on
from gradflow.engine.environment import describe, resolve_device
from gradflow.engine.memory import (
    available_bytes,
    least_bytes,
    make_plan,
    out_of_memory,
    peak_bytes,
    reset_peak,
)
from gradflow.engine.plan import Plan
from gradflow.engine.rows import Tables, new_tables
from gradflow.engine.seeds.blocks import SeedBlocks
from gradflow.engine.seeds.walk import SeedWalk, seed_network, walk_seeds
from gradflow.engine.tape import Network, visits
from gradflow.engine.timing import Clock, clock_for, matmul_flop_per_s, stack_timer, take_times
from gradflow.engine.walk import Walk, walk
from gradflow.errors import MeasurementError, is_out_of_memory
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

WalkT = TypeVar("WalkT", Walk, SeedWalk)


@dataclass(frozen=True)
class Found:
    """All seeds.

    Attributes:
        tables: the rows, seed by seed.
        losses: one of each seed, at initialisation.
        passes: seconds that statistics took of a seed; empty where none went by itself.
        steps: of training.
        timing: of the first seed, where it was timed.
        peak: bytes.
        warnings: what the run has to say.
    """

    tables: Tables
    losses: Sequence[float]
    passes: Sequence[float]
    steps: Sequence[StepRecord]
    timing: Timing | None
    peak: int
    warnings: Sequence[str]

    @property
    def pass_s(self) -> float | None:
        """Seconds of a seed's statistics; None where none went by itself."""
        return median(self.passes) if self.passes else None


@dataclass(frozen=True)
class Passes:
    """One measurement under way."""

    spec: StackSpec
    options: RunOptions
    device: torch.device
    plan: Plan
    progress: Progress
    clock: Clock

    @cached_property
    def join(self) -> Compiled | None:
        """What all units compute by, if compiled."""
        return compiled.compiled_join() if self.options.compile else None

    @cached_property
    def graphs(self) -> Graphs | None:
        """What captures the passes, if they are."""
        return graphs_on(self.device, self.options) if self.plan.graphs else None

    def all_seeds(self, scratch: Path | None) -> Found:
        """Every seed; rows that do not fit into memory go to the folder."""
        if self.options.steps:
            return self._trained(new_tables(scratch))
        if self.plan.seeds > 1:
            return self._at_once([new_tables(scratch) for _ in self.options.all_seeds])
        return self._one_by_one(new_tables(scratch))

    def _one_by_one(self, tables: Tables) -> Found:
        timing = self._time_apart() if self.plan.is_sampled else None
        losses: list[float] = []
        passes: list[float] = []
        for seed in self.options.all_seeds:
            self.progress("building", 0, 1)
            network = build_network(self.spec, seed, self.device, self.plan, self.join)
            if self.options.timing and timing is None:
                timing = self._time(network)
            ticks = self._ticks(f"gradients, seed {seed}")
            work = partial(walk, self.spec, seed, network, tables=tables, tick=ticks, **self._how)
            found, seconds = self._timed(work)
            passes.append(seconds)
            losses.append(found.loss.item())
            del work, network  # or the next one would be built beside it
        return self._found(tables, losses, passes, (), timing)

    def _at_once(self, each: Sequence[Tables]) -> Found:
        """All seeds in one pass. Its seconds are not like those of the bare pass, of one seed."""
        timing = self._time_apart() if self.options.timing else None
        self.progress("building", 0, 1)
        seeds = self.options.all_seeds
        drawn: Sequence[Block] = SeedBlocks(self.spec, seeds, self.device)
        blocks = drawn if self.plan.rebuild else drawn[:]
        network = seed_network(self.spec, seeds, blocks, self.device)
        tables = dict(zip(seeds, each, strict=True))
        ticks = self._ticks(f"gradients, {len(seeds)} seeds")
        work = partial(walk_seeds, self.spec, network, tables, tick=ticks, **self._how)
        found, _ = self._timed(work)
        for other in each[1:]:
            each[0].layers.extend(other.layers)
            each[0].params.extend(other.params)
        return self._found(each[0], found.losses.tolist(), (), (), timing)

    def _trained(self, tables: Tables) -> Found:
        """The steps; what was measured on the way goes to the tables."""
        timing = self._time_apart() if self.options.timing else None
        total = int(self.options.steps or 0) + 1
        steps: list[StepRecord] = []
        losses: list[float] = []
        for seed in self.options.all_seeds:
            self.progress("building", 0, 1)
            tick = counter(self.progress, f"training, seed {seed}", total)
            trained = train_stack(self.spec, seed, self.device, self.options, tick)
            tables.layers.extend(trained.layers)
            tables.params.extend(trained.params)
            steps += trained.steps
            losses.append(trained.steps[0].loss)
        return self._found(tables, losses, (), steps, timing)

    def _found(
        self,
        tables: Tables,
        losses: Sequence[float],
        passes: Sequence[float],
        steps: Sequence[StepRecord],
        timing: Timing | None,
    ) -> Found:
        share = max(self.plan.timed, 1) / self.spec.depth
        peak, warnings = peak_bytes(self.device), self.graphs.warnings if self.graphs else ()
        of_timed = [seconds * share for seconds in passes]
        return Found(tables, losses, of_timed, steps, timing, peak, warnings)

    @property
    def _how(self) -> dict[str, Any]:
        """What all walks share."""
        return {"spans": self.plan.spans, "raw_range": self.options.raw_range}

    def _ticks(self, phase: str) -> Callable[[], None]:
        """Called once for each layer that a walk computes, forward or back."""
        return counter(
            self.progress, phase, visits(self.spec.depth, self.plan.spans) + self.spec.depth
        )

    def _timed(self, work: Callable[[], WalkT]) -> tuple[WalkT, float]:
        """What the walk found, all of it in its tables, and its seconds."""
        do = self.graphs(work) if self.graphs else work
        marks = [self.clock.mark()]
        found = do()
        marks.append(self.clock.mark())
        (seconds,) = self.clock.seconds(marks)
        found.finish()
        return found, seconds

    def _time_apart(self) -> Timing:
        """Of a network that is built for it."""
        self.progress("building", 0, 1)
        seed = self.options.seed
        return self._time(build_timed(self.spec, seed, self.device, self.plan, self.join))

    def _time(self, network: Network) -> Timing:
        tick = counter(self.progress, "timing", self.options.repeats)
        timer = stack_timer(network, self.graphs)
        found = take_times(timer, self.options, self.clock, tick)
        del timer  # and with it the memory of its graphs
        assert found is not None  # every unit of a stack is timed
        rate = matmul_flop_per_s(self.device, self.spec.dtype, self.clock)
        return replace(found, matmul_flop_per_s=rate)


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
        spec: the network, its input and its loss; where the options train it, its input and its
            loss are those of a task, see `training_spec.as_trained`.
        options: seeds, device, timing, memory; the defaults of `RunOptions` if None.
        progress: called as the work goes on.
        clock: in place of the device's own.
        scratch: folder for rows that do not fit into memory; the system's if None.

    Returns:
        The run, not stored yet: `gradflow.save` does that.

    Raises:
        UsageError: the device is not there, or lacks the dtype, or there is no such training.
        MeasurementError: out of memory, or the disk of `scratch` is full.
    """
    options = options or RunOptions()
    spec = as_trained(spec, options)
    device = resolve_device(options.device, spec.dtype)
    started, begin = datetime.now(UTC), perf_counter()
    needed = least_bytes(spec)
    try:
        plan = make_plan(spec, options, device)
        needed = plan.needed
        reset_peak(device)
        work = Passes(spec, options, device, plan, progress, clock or clock_for(device))
        found = work.all_seeds(scratch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(needed, available_bytes(device), spec, options) from None
    except OSError as error:
        raise no_scratch(error) from None
    environment = describe(spec, device) | {
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
    return _to_run(spec, options, environment, found)


def no_scratch(error: OSError) -> MeasurementError:
    """The error that says why rows found no place on disk."""
    return MeasurementError(
        f"the rows found no place on disk: {error.strerror or error}; "
        "free some space or choose another --out; nothing half-written remains"
    )


def _to_run(
    spec: StackSpec, options: RunOptions, environment: dict[str, object], found: Found
) -> Run:
    run = assembled_run(
        Measured(
            spec,
            options,
            environment,
            layers=found.tables.layers,
            params=found.tables.params,
            steps=found.steps,
            losses=() if spec.loss == "cotangent" else found.losses,
            warnings=found.warnings,
            peak_bytes=found.peak,
        )
    )
    run = with_theory(run)
    return with_times(run, found.timing, found.pass_s) if found.timing else run
