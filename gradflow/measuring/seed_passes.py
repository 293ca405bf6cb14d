"""The passes of one measurement: times, then statistics, of every seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from gradflow.engine import compiled
from gradflow.engine.built import build_network, build_timed
from gradflow.engine.collect import Tables, new_tables
from gradflow.engine.cuda_graphs import Graphs, graphs_on
from gradflow.engine.matmul import matmul_flop_per_s
from gradflow.engine.memory import peak_bytes
from gradflow.engine.plan import Plan
from gradflow.engine.seeds.blocks import SeedBlocks
from gradflow.engine.seeds.walk import SeedWalk, seed_network, walk_seeds
from gradflow.engine.tape import Network, visits
from gradflow.engine.timing import Clock, stack_timer, take_times
from gradflow.engine.walk import Walk, walk
from gradflow.networks.stack import Block
from gradflow.networks.units.template import Compiled
from gradflow.progress import Progress, counter
from gradflow.runs.records import StepRecord, Timing
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
