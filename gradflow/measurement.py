"""`measure`: one specification, all its seeds, one device; from a spec to a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch

from gradflow.engine import compiled
from gradflow.engine.ahead import ahead_on
from gradflow.engine.collect import Tables
from gradflow.engine.compiled import use
from gradflow.engine.environment import describe, resolve_device
from gradflow.engine.graphs import Graphs, graphs_on
from gradflow.engine.matmul import matmul_flop_per_s
from gradflow.engine.memory import (
    available_bytes,
    least_bytes,
    make_plan,
    out_of_memory,
    peak_bytes,
    reset_peak,
)
from gradflow.engine.plan import Plan
from gradflow.engine.rebuilt import RebuiltBlocks
from gradflow.engine.seed_blocks import SeedBlocks
from gradflow.engine.seed_walk import seed_network, walk_seeds
from gradflow.engine.tape import Network, visits
from gradflow.engine.timing import Clock, clock_for, stack_timer, take_times
from gradflow.engine.walk import walk
from gradflow.errors import MeasurementError, is_out_of_memory
from gradflow.judging.cost import with_times
from gradflow.judging.expected import with_theory
from gradflow.judging.outcome import summary_of
from gradflow.judging.verdict import summarise
from gradflow.learning.training import train_stack
from gradflow.networks.inputs import input_batch
from gradflow.networks.losses import build_loss
from gradflow.networks.residual import Compiled
from gradflow.networks.stack import Block, build_block, build_stack
from gradflow.runs.records import LayerRecord, ParamRecord, Run, StepRecord, Timing, first_step
from gradflow.runs.spool import Spool
from gradflow.specs.recipe import as_trained
from gradflow.specs.run_options import RunOptions
from gradflow.specs.spec import StackSpec

MOST_CALLS = 1000

# (what is going on, steps done, steps in all)
Progress = Callable[[str, int, int], None]


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
            loss are those of a task, see `recipe.as_trained`.
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
        work = _Work(spec, options, device, plan, progress, clock or clock_for(device))
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


def new_tables(scratch: Path | None) -> Tables:
    """Empty ones; what does not fit into memory goes to the folder."""
    return Tables(Spool(LayerRecord, scratch), Spool(ParamRecord, scratch))


@dataclass(frozen=True)
class _Found:
    """All seeds; `pass_s` is the median of the seconds that statistics took of the timed layers."""

    tables: Tables
    losses: Sequence[float]
    pass_s: float | None
    steps: Sequence[StepRecord]
    timing: Timing | None
    peak: int
    warnings: Sequence[str] = ()


def build_network(
    spec: StackSpec,
    seed: int,
    device: torch.device,
    plan: Plan | None = None,
    join: Compiled | None = None,
) -> Network:
    """One seed of a stack: resident on the device, or built as the plan says."""
    if plan and plan.rebuild:
        blocks: Sequence[Block] = RebuiltBlocks(
            spec, seed, device, plan.alive, join=join, ahead=ahead_on(device)
        )
    else:
        blocks = [use(join, block) for block in build_stack(spec, seed, device)]
    return Network(blocks, input_batch(spec, seed, device), build_loss(spec, seed, device))


def build_timed(
    spec: StackSpec, seed: int, device: torch.device, plan: Plan, join: Compiled | None = None
) -> Network:
    """The layers that are timed, as a stack of their own."""
    blocks = [use(join, build_block(spec, seed, layer, device)) for layer in plan.timed_layers]
    x, loss = input_batch(spec, seed, device), build_loss(spec, seed, device)
    return Network(blocks, x, loss, plan.timed_layers)


@dataclass(frozen=True)
class _Work:
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

    def all_seeds(self, scratch: Path | None) -> _Found:
        if self.plan.seeds > 1:
            return self._at_once(scratch)
        tables = new_tables(scratch)
        timing = self._time_sample() if self.plan.is_sampled else None
        losses: list[float] = []
        passes: list[float] = []
        steps: list[StepRecord] = []
        for seed in self.options.all_seeds:
            self.progress("building", 0, 1)
            network = build_network(self.spec, seed, self.device, self.plan, self.join)
            if self.options.timing and timing is None:
                timing = self._time(network)
            if self.options.steps:
                del network  # the trained one takes its place
                new = self._train(seed, tables)
                steps += new
                losses.append(new[0].loss)
                continue
            seconds, loss = self._walk(seed, network, tables)
            passes.append(seconds)
            losses.append(loss)
            del network  # or the next one would be built beside it
        return self._found(tables, losses, passes, steps, timing)

    def _at_once(self, scratch: Path | None) -> _Found:
        """All seeds in one pass, whose seconds are shared among them."""
        timing = self._time_sample() if self.plan.timed else None
        self.progress("building", 0, 1)
        seeds = self.options.all_seeds
        each = [new_tables(scratch) for _ in seeds]
        blocks: Sequence[Block] = SeedBlocks(self.spec, seeds, self.device)
        network = seed_network(
            self.spec, seeds, blocks if self.plan.rebuild else blocks[:], self.device
        )
        tick = _counter(self.progress, f"gradients, {len(seeds)} seeds", self._visits)
        start = self.clock.mark()
        found = walk_seeds(
            self.spec,
            network,
            dict(zip(seeds, each, strict=True)),
            spans=self.plan.spans,
            raw_range=self.options.raw_range,
            tick=tick,
        )
        (seconds,) = self.clock.seconds([start, self.clock.mark()])
        found.finish()
        tables = each[0]
        for other in each[1:]:
            tables.layers.extend(other.layers)
            tables.params.extend(other.params)
        return self._found(tables, found.losses.tolist(), [seconds / len(seeds)], [], timing)

    def _found(
        self,
        tables: Tables,
        losses: Sequence[float],
        passes: Sequence[float],
        steps: Sequence[StepRecord],
        timing: Timing | None,
    ) -> _Found:
        share = max(self.plan.timed, 1) / self.spec.depth
        pass_s = median(passes) * share if passes else None
        peak, warnings = peak_bytes(self.device), self.graphs.warnings if self.graphs else ()
        return _Found(tables, losses, pass_s, steps, timing, peak, warnings)

    @property
    def _visits(self) -> int:
        """Layers that a pass computes, forward and back."""
        return visits(self.spec.depth, self.plan.spans) + self.spec.depth

    def _time_sample(self) -> Timing:
        self.progress("building", 0, 1)
        seed = self.options.seed
        return self._time(build_timed(self.spec, seed, self.device, self.plan, self.join))

    def _time(self, network: Network) -> Timing:
        tick = _counter(self.progress, "timing", self.options.repeats)
        timer = stack_timer(network, self.graphs)
        found = take_times(timer, self.options, self.clock, tick)
        del timer  # and with it the memory of its graphs
        assert found is not None  # every unit of a stack is timed
        rate = matmul_flop_per_s(self.device, self.spec.dtype, self.clock)
        return replace(found, matmul_flop_per_s=rate)

    def _train(self, seed: int, tables: Tables) -> Sequence[StepRecord]:
        """The steps; what was measured on the way goes to the tables."""
        total = int(self.options.steps or 0) + 1
        tick = _counter(self.progress, f"training, seed {seed}", total)
        trained = train_stack(self.spec, seed, self.device, self.options, tick)
        tables.layers.extend(trained.layers)
        tables.params.extend(trained.params)
        return trained.steps

    def _walk(self, seed: int, network: Network, tables: Tables) -> tuple[float, float]:
        """Seconds of the pass, and the loss."""
        work = partial(
            walk,
            self.spec,
            seed,
            network,
            spans=self.plan.spans,
            raw_range=self.options.raw_range,
            tables=tables,
            tick=_counter(self.progress, f"gradients, seed {seed}", self._visits),
        )
        do = self.graphs(work) if self.graphs else work
        marks = [self.clock.mark()]
        found = do()
        marks.append(self.clock.mark())
        (seconds,) = self.clock.seconds(marks)
        found.finish()
        return seconds, found.loss.item()


def _counter(progress: Progress, phase: str, total: int) -> Callable[[], None]:
    done = 0
    # A bar has no more than so many places, and each call takes as long as a small layer.
    stride = max(1, total // MOST_CALLS)

    def tick() -> None:
        nonlocal done
        done += 1
        if done % stride == 0 or done == total:
            progress(phase, min(done, total), total)

    return tick


def _to_run(
    spec: StackSpec, options: RunOptions, environment: dict[str, object], found: _Found
) -> Run:
    loss = None if spec.loss == "cotangent" else mean(found.losses)
    layers = found.tables.layers
    rows = first_step(layers) if options.steps else layers
    summary = summarise(rows, spec, options, loss)
    run = Run(
        spec=spec,
        options=options,
        summary=replace(summary, peak_bytes=found.peak, **summary_of(found.steps)),
        environment=environment,
        overhead=None,
        warnings=tuple(found.warnings),
        layer_records=found.tables.layers,
        param_records=found.tables.params,
        time_records=(),
        step_records=found.steps,
    )
    run = with_theory(run)
    return with_times(run, found.timing, found.pass_s) if found.timing else run
