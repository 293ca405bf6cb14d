"""The memory policy of a stack, chosen from an estimate: what is kept, rebuilt and timed.

Torch-free. The numbers do not depend on the policy; memory and time do.

All seeds are measured in one pass where that is faster: an operation on a small tensor takes as
long as it takes to start. On 2 cores the border lay near 4 million multiply-adds in a layer
(benchmarks/seeds.py); below 4 seeds, or with more than 512 KiB of attention scores, there was
nothing to win. Each seed has two tables, which may be files, and a process 1,024 open files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gradflow.errors import UsageError
from gradflow.schemes import UNIT_KINDS
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import is_user_name
from gradflow.text import count, gib

# Share of the free memory that is used where no limit is given; a given limit is used whole.
_AUTO_SHARE = 0.5
# Deeper stacks are rebuilt without being asked: to make so many modules costs more than to draw
# their weights twice. They are timed by a sample of layers, as are all that are not resident.
_DEEP, _SAMPLE = 2000, 16
# A kernel is launched in about 5 microseconds. Up to this width and size of the stream most take no
# longer: a GPU moves 4 MiB in and out, or multiplies 256 rows by 512 x 512, in about that time.
_NARROW, _SMALL = 512, 4 << 20
_MARGIN = 1.2  # what allocators lose: 18 % at 400 units of width 128
# Fewest and most seeds, and the largest layer, that are measured in one pass unasked.
LEAST_SEEDS, MOST_SEEDS = 4, 256
MOST_WORK, MOST_SCORES = 1 << 22, 1 << 19


@dataclass(frozen=True)
class Footprint:
    """Memory that one layer takes, by what takes it, in bytes.

    Attributes:
        objects: Python objects of a layer's modules.
        graph: tensors that autograd keeps for the backward pass of a layer.
        stream: the stream between two layers.
        rows: numbers that stay of a layer until its row is written.
        prefetched_layers: number of layers that are drawn before they are visited, where layers
            are rebuilt.
        work: number of multiply-adds of a layer's weights in one forward pass.
        scores: attention scores between all tokens; kept only where seeds share a pass.
        transient_bytes: peak of the temporaries while one layer is computed.
        nodes: memory of the device for one layer's passes as nodes of CUDA graphs.
    """

    parameters: int
    objects: int
    graph: int
    stream: int
    rows: int
    prefetched_layers: int = 0
    work: int = 0
    scores: int = 0
    transient_bytes: int = 0
    nodes: int = 0

    @property
    def working(self) -> int:
        """Bytes while a layer is computed: it, its gradients, and its statistics in float64."""
        return 2 * self.parameters + self.graph + 10 * self.stream + self.transient_bytes


@dataclass(frozen=True)
class Plan:
    """A memory policy for one stack.

    Attributes:
        spans: which streams are kept, see `tape.record_backward`.
        rebuild: whether layers are built at each visit, into modules that are used again.
        needed: estimated bytes under this policy.
        everything: estimated bytes with all graphs kept and all parameters resident.
        timed: number of layers that are timed.
        seeds: number of seeds in one pass.
        graphs: whether passes are captured as CUDA graphs.
    """

    depth: int
    spans: tuple[int, ...]
    rebuild: bool
    needed: int = 0
    everything: int = 0
    timed: int = 0
    seeds: int = 1
    graphs: bool = False

    @property
    def keep(self) -> str:
        """The name of the policy, as `--keep` has it."""
        if not self.spans:
            return "graph"
        return "boundaries" if self.spans == (1,) else "sqrt"

    @property
    def alive(self) -> int:
        """Number of layers whose graphs are kept at the same time."""
        return min(self.depth, self.spans[-1]) if self.spans else self.depth

    @property
    def streams(self) -> int:
        """Number of streams that are kept at the same time."""
        lengths = (self.depth, *self.spans)
        return sum(math.ceil(n / s) for n, s in zip(lengths, self.spans, strict=False))

    @property
    def sentence(self) -> str:
        """The policy and its estimated memory in words, as run.json has them."""
        return self._policy + (f"; {self.seeds} seeds in one pass" if self.seeds > 1 else "")

    @property
    def _policy(self) -> str:
        size = f"about {gib(self.needed)}"
        if self.keep == "graph":
            where = "layers built as they are visited" if self.rebuild else "parameters resident"
            how = ", passes replayed as CUDA graphs" if self.graphs else ""
            return f"all graphs kept, {where}{how}: {size}"
        times = {1: "twice", 2: "three times"}[len(self.spans)]
        done = "built and computed" if self.rebuild else "computed"
        kept = f"{count(self.streams, 'stream')} and {count(self.alive, 'graph')}"
        return (
            f"{kept} kept of {count(self.depth, 'layer')}, each {done} {times}: "
            f"{size} instead of {gib(self.everything)}"
        )

    @property
    def is_sampled(self) -> bool:
        """Whether timed layers are built for timing alone, because not all layers stay in memory.

        A timed pass needs the graphs of all its layers, and with them their weights.
        """
        return self.timed > 0 and (self.rebuild or self.timed < self.depth)

    @property
    def timed_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that are timed, spread evenly from the first to the last."""
        if self.timed < 2:
            return ((self.depth + 1) // 2,) * self.timed
        step = (self.depth - 1) / (self.timed - 1)
        return tuple(1 + round(i * step) for i in range(self.timed))


def choose(depth: int, size: Footprint, options: RunOptions, free: int) -> tuple[Plan, bool]:
    """The fastest policy among those that the options allow and that fit, or else the smallest.

    Args:
        depth: number of layers.
        size: estimated memory of a layer.
        options: `keep`, `rebuild`, `memory_limit`, `timing`.
        free: bytes that are available; the plan comes with whether it fits into them.
    """
    limit = options.memory_limit_bytes
    most = free if limit is None else min(free, limit)
    room = room_unasked(options, free)
    plans = [_sized(plan, size) for plan in _candidates(depth, size, options)]
    fitting = [plan for plan in plans if plan.needed <= room]
    chosen = fitting[0] if fitting else min(plans, key=lambda plan: plan.needed)
    return _with_times(chosen, size, options, most), chosen.needed <= most


def room_unasked(options: RunOptions, free: int) -> int:
    """Bytes that a policy may take which the user has not asked for."""
    limit = options.memory_limit_bytes
    return int(free * _AUTO_SHARE) if limit is None else min(free, limit)


def with_graphs(plan: Plan, size: Footprint) -> Plan:
    """Return the plan with its passes captured as CUDA graphs.

    Each captured pass has memory of its own. So the bare pass, which has the gradients of all
    parameters, does not share the memory of the timed pass.
    """
    each = size.parameters + size.graph + size.nodes
    return replace(plan, graphs=True, needed=plan.needed + int(_MARGIN * plan.depth * each))


def pays_as_graphs(plan: Plan, width: int, size: Footprint) -> bool:
    """Whether CUDA graphs save time: a whole pass is repeated, and its kernels are short."""
    whole = plan.keep == "graph" and not plan.rebuild and plan.timed > 0
    return whole and width <= _NARROW and size.stream <= _SMALL


def _candidates(depth: int, size: Footprint, options: RunOptions) -> Iterator[Plan]:
    """Policies from the fastest to the smallest."""
    ways = (False, True) if options.rebuild is None else (options.rebuild,)
    if options.keep == "auto" and options.rebuild is None and depth > _DEEP:
        ways = (True,)
    # Graphs of all layers need the weights of all: to rebuild them saves nothing.
    if options.keep == "graph" or (options.keep == "auto" and False in ways):
        yield Plan(depth, (), ways[0])
    if options.keep == "boundaries":
        yield from (Plan(depth, (1,), rebuild) for rebuild in ways)
    if options.keep in ("auto", "sqrt"):
        yield from (Plan(depth, (_segment(depth, size, rebuild),), rebuild) for rebuild in ways)
        yield from (Plan(depth, (math.ceil(math.sqrt(depth)), 1), rebuild) for rebuild in ways)


def _segment(depth: int, size: Footprint, rebuild: bool) -> int:
    """Span length n that minimises the memory of depth / n streams and n graphs."""
    graph = size.graph + (size.parameters + size.objects if rebuild else 0)
    return max(1, min(depth, round(math.sqrt(depth * size.stream / max(graph, 1)))))


def _sized(plan: Plan, size: Footprint) -> Plan:
    everything = Plan(plan.depth, (), rebuild=False)
    needed, most = (_needed(each, size) for each in (plan, everything))
    return replace(plan, needed=needed, everything=most)


def _needed(plan: Plan, size: Footprint) -> int:
    layers = plan.alive + size.prefetched_layers if plan.rebuild else plan.depth
    kept = layers * (size.parameters + size.objects) + plan.alive * size.graph
    kept += plan.streams * size.stream + size.working
    return int(_MARGIN * kept) + plan.depth * size.rows


def _with_times(plan: Plan, size: Footprint, options: RunOptions, room: int) -> Plan:
    """Return the plan with the number of timed layers: all, or a sample that fits."""
    if not options.timing:
        return plan
    each = 2 * size.parameters + size.objects + size.graph
    fits = max(1, int(room / _MARGIN - size.working) // each)
    whole = plan.keep == "graph" and not plan.rebuild and plan.depth <= min(_DEEP, fits)
    return replace(plan, timed=plan.depth if whole else min(plan.depth, _SAMPLE, fits))


def with_seeds(
    plan: Plan, spec: StackSpec, options: RunOptions, size: Footprint, free: int
) -> tuple[Plan, bool]:
    """Return the plan for all seeds in one pass, or `plan` for one seed after the other.

    `plan` and `size` are those of a single seed, which fits into the `free` bytes. The plan comes
    with whether it fits into memory; one pass that was asked for may not.

    Raises:
        UsageError: one pass was asked for, and this stack does not allow it.
    """
    reason = _refusal(spec, options)
    if options.together and reason:
        raise UsageError(f"--together is not for {reason}", "--together", "leave it out")
    if options.seeds == 1 or reason or options.together is False:
        return plan, True
    if options.together is None and not pays(options.seeds, size):
        return plan, True
    all_seeds, fits = choose(spec.depth, _for_seeds(size, options.seeds), options, free)
    is_as_fast = (all_seeds.spans, all_seeds.rebuild) == (plan.spans, plan.rebuild)
    if not options.together and not (fits and is_as_fast):
        return plan, True
    return replace(all_seeds, timed=plan.timed, seeds=options.seeds), fits


def pays(seeds: int, size: Footprint) -> bool:
    """Whether so many seeds are faster in one pass than one after the other."""
    is_small = size.work <= MOST_WORK and size.scores <= MOST_SCORES
    return is_small and seeds >= LEAST_SEEDS


def _refusal(spec: StackSpec, options: RunOptions) -> str | None:
    """The first property that rules out one pass for all seeds; None if there is none."""
    kinds = (UNIT_KINDS[spec.wiring(1, u).unit] for u in range(spec.units_per_block))
    against = {
        "training": options.steps > 0,
        "--compile": options.compile,
        "weights of a checkpoint": bool(spec.weights),
        "a block of your own": is_user_name(spec.block),
        "a scheme of your own": is_user_name(spec.scheme or ""),
        "branches that are dropped at random": any(kind.draws_each_step for kind in kinds),
        f"more than {MOST_SEEDS} seeds": options.seeds > MOST_SEEDS,
        "a scheme that profiles each seed": spec.scheme is not None and spec.scheme_record.profiled,
    }
    return next((reason for reason, is_so in against.items() if is_so), None)


def _for_seeds(size: Footprint, seeds: int) -> Footprint:
    """The footprint of all seeds: modules are shared, and attention keeps its scores."""
    return replace(
        size,
        parameters=seeds * size.parameters,
        stream=seeds * size.stream,
        rows=seeds * size.rows,
        graph=seeds * (size.graph + size.scores),
        transient_bytes=seeds * size.scores,
    )
