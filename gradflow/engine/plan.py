"""Which memory policy a stack is measured with: chosen from an estimate, and said in a sentence.

Torch-free. The numbers do not depend on the policy; memory and time do.
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

# Of the free memory a choice of its own takes no more than this; a given limit is used whole.
AUTO_SHARE = 0.5
# Deeper stacks are rebuilt without being asked: to make so many modules costs more than to draw
# their weights twice. They are timed by a sample of layers, as are all that are not resident.
DEEP, SAMPLE = 2000, 16
# A kernel is launched in about 5 microseconds. Up to this width and size of the stream most take no
# longer: a GPU moves 4 MiB in and out, or multiplies 256 rows by 512 x 512, in about that time.
NARROW, SMALL = 512, 4 << 20
MARGIN = 1.2  # what allocators lose: 18 % at 400 units of width 128


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer, and of the rest.

    Attributes:
        parameters: of a layer.
        objects: of a layer's modules.
        graph: what autograd keeps of a layer.
        stream: y between two layers.
        rows: what stays of a layer until its row is written.
        ahead: layers that are drawn before they are asked for, where they are rebuilt.
        work: multiply-adds of a layer's weights, forward.
        scores: of attention between all tokens: kept only where seeds share a pass.
        passing: what the work on a layer takes beside, for a moment.
        nodes: what a device takes to hold a layer's passes as CUDA graphs.
    """

    parameters: int
    objects: int
    graph: int
    stream: int
    rows: int
    ahead: int = 0
    work: int = 0
    scores: int = 0
    passing: int = 0
    nodes: int = 0

    @property
    def working(self) -> int:
        """At work: a layer with its gradients, and its statistics in float64."""
        return 2 * self.parameters + self.graph + 10 * self.stream + self.passing


@dataclass(frozen=True)
class Plan:
    """A memory policy for one stack.

    Attributes:
        depth: layers.
        spans: which streams are kept, see `tape.record_backward`.
        rebuild: layers are built at each visit, into modules that are used again.
        needed: bytes by the estimate.
        everything: bytes with all graphs kept and all parameters resident.
        timed: layers that are timed.
        seeds: that are measured in one pass.
        graphs: passes are captured as CUDA graphs.
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
        """Layers whose graphs are kept together."""
        return min(self.depth, self.spans[-1]) if self.spans else self.depth

    @property
    def streams(self) -> int:
        """Streams that are kept together."""
        lengths = (self.depth, *self.spans)
        return sum(math.ceil(n / s) for n, s in zip(lengths, self.spans, strict=False))

    @property
    def sentence(self) -> str:
        """What was chosen, and what it costs."""
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
        """Whether the layers that are timed are built for it: the others do not stay, or are not.

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
        depth: layers.
        size: the estimate.
        options: `keep`, `rebuild`, `memory_limit`, `timing`.
        free: bytes that can be had.

    Returns:
        The plan, and whether it fits.
    """
    limit = options.memory_limit_bytes
    most = free if limit is None else min(free, limit)
    room = room_unasked(options, free)
    plans = [_sized(plan, size) for plan in _candidates(depth, size, options)]
    fitting = [plan for plan in plans if plan.needed <= room]
    chosen = fitting[0] if fitting else min(plans, key=lambda plan: plan.needed)
    return _with_times(chosen, size, options, most), chosen.needed <= most


def room_unasked(options: RunOptions, free: int) -> int:
    """Bytes that a choice of its own may take."""
    limit = options.memory_limit_bytes
    return int(free * AUTO_SHARE) if limit is None else min(free, limit)


def with_graphs(plan: Plan, size: Footprint) -> Plan:
    """The plan with CUDA graphs.

    The memory of a captured pass is its own. So the bare pass, which has the gradients of all
    parameters, does not share that of the timed one.
    """
    each = size.parameters + size.graph + size.nodes
    return replace(plan, graphs=True, needed=plan.needed + int(MARGIN * plan.depth * each))


def pays_as_graphs(plan: Plan, width: int, size: Footprint) -> bool:
    """Whether a pass is repeated for its times, and its kernels are short."""
    whole = plan.keep == "graph" and not plan.rebuild and plan.timed > 0
    return whole and width <= NARROW and size.stream <= SMALL


def _candidates(depth: int, size: Footprint, options: RunOptions) -> Iterator[Plan]:
    """Policies from the fastest to the smallest."""
    ways = (False, True) if options.rebuild is None else (options.rebuild,)
    if options.keep == "auto" and options.rebuild is None and depth > DEEP:
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
    """Layers of a span with the least sum of streams (depth / n of them) and graphs (n)."""
    graph = size.graph + (size.parameters + size.objects if rebuild else 0)
    return max(1, min(depth, round(math.sqrt(depth * size.stream / max(graph, 1)))))


def _sized(plan: Plan, size: Footprint) -> Plan:
    everything = Plan(plan.depth, (), rebuild=False)
    needed, most = (_needed(each, size) for each in (plan, everything))
    return replace(plan, needed=needed, everything=most)


def _needed(plan: Plan, size: Footprint) -> int:
    layers = plan.alive + size.ahead if plan.rebuild else plan.depth
    kept = layers * (size.parameters + size.objects) + plan.alive * size.graph
    kept += plan.streams * size.stream + size.working
    return int(MARGIN * kept) + plan.depth * size.rows


def _with_times(plan: Plan, size: Footprint, options: RunOptions, room: int) -> Plan:
    """How many layers are timed: all, or a sample that fits."""
    if not options.timing:
        return plan
    each = 2 * size.parameters + size.objects + size.graph
    fits = max(1, int(room / MARGIN - size.working) // each)
    whole = plan.keep == "graph" and not plan.rebuild and plan.depth <= min(DEEP, fits)
    return replace(plan, timed=plan.depth if whole else min(plan.depth, SAMPLE, fits))


LEAST_SEEDS, MOST_SEEDS = 4, 256
MOST_WORK, MOST_SCORES = 1 << 22, 1 << 19


def with_seeds(
    plan: Plan, spec: StackSpec, options: RunOptions, size: Footprint, free: int
) -> tuple[Plan, bool]:
    """The plan for all seeds in one pass, or the plan as it was, for one after the other.

    Args:
        plan: of one seed, which fits.
        spec: the stack.
        options: `together` and `seeds` decide, within the memory that is allowed.
        size: of one seed.
        free: bytes that can still be had.

    Returns:
        The plan, and whether it fits: what was asked for may not.

    Raises:
        UsageError: it was asked for, and this stack cannot do it.
    """
    reason = _refusal(spec, options)
    if options.together and reason:
        raise UsageError(f"--together is not for {reason}", "--together", "leave it out")
    if options.seeds == 1 or reason or options.together is False:
        return plan, True
    if options.together is None and not pays(options.seeds, size):
        return plan, True
    all_seeds, fits = choose(spec.depth, _times(size, options.seeds), options, free)
    is_as_fast = (all_seeds.spans, all_seeds.rebuild) == (plan.spans, plan.rebuild)
    if not options.together and not (fits and is_as_fast):
        return plan, True
    return replace(all_seeds, timed=plan.timed, seeds=options.seeds), fits


def pays(seeds: int, size: Footprint) -> bool:
    """Whether so many seeds are faster together."""
    is_small = size.work <= MOST_WORK and size.scores <= MOST_SCORES
    return is_small and seeds >= LEAST_SEEDS


def _refusal(spec: StackSpec, options: RunOptions) -> str | None:
    """What stands against it."""
    wirings = (spec.wiring(1, unit) for unit in range(spec.units_per_block))
    against = {
        "training": options.steps > 0,
        "--compile": options.compile,
        "weights of a checkpoint": bool(spec.weights),
        "a block of your own": is_user_name(spec.block),
        "a scheme of your own": is_user_name(spec.scheme or ""),
        "branches that are dropped at random": any(
            UNIT_KINDS[w.unit].draws_each_step for w in wirings
        ),
        f"more than {MOST_SEEDS} seeds": options.seeds > MOST_SEEDS,
        "a scheme that profiles each seed": spec.scheme is not None and spec.scheme_record.profiled,
    }
    return next((reason for reason, is_so in against.items() if is_so), None)


def _times(size: Footprint, seeds: int) -> Footprint:
    """Of all seeds; modules are made once for them, and attention keeps its scores."""
    numbers = ("parameters", "stream", "rows")
    graph, passing = seeds * (size.graph + size.scores), seeds * size.scores
    times = {name: seeds * getattr(size, name) for name in numbers}
    return replace(size, graph=graph, passing=passing, **times)
