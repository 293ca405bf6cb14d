"""Whether all seeds are measured in one pass (`seed_walk`): where they can, where that pays.

Torch-free. An operation on a small tensor takes as long as it takes to start, so a pile of seeds
costs little more than one of them; a large one is as fast by itself. On 2 cores the line lay near 4
million multiply-adds in a layer (benchmarks/seeds.py), and below 4 seeds there was nothing to win.
Nor was there with more than 512 KiB of attention's scores: one seed by itself never holds them.
Each seed has two tables, which are files where they are long; a process may have 1,024 open.
"""

from __future__ import annotations

from dataclasses import replace

from gradflow.engine.plan import Footprint, Plan, choose
from gradflow.errors import UsageError
from gradflow.specs import user_code
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

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
        "a block of your own": user_code.is_user_name(spec.block),
        "a scheme of your own": user_code.is_user_name(spec.scheme or ""),
        "branches that are dropped at random": any(w.unit == "stochastic" for w in wirings),
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
