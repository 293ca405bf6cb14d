"""Which memory policy is chosen, and whether it keeps what it promises."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.engine.plan import Footprint, Plan, choose
from gradflow.errors import UsageError
from gradflow.specs.run_options import RunOptions
from gradflow.text import size_in_bytes

KIB, MIB = 1 << 10, 1 << 20
# 1 MiB of parameters, 2 MiB of graph and 64 KiB of stream: a transformer of width 128, about.
SIZE = Footprint(parameters=MIB, objects=40 * KIB, graph=2 * MIB, stream=64 * KIB, rows=96)
HUGE = 1 << 50


def chosen(depth: int = 1000, free: int = HUGE, size: Footprint = SIZE, **options: Any) -> Plan:
    plan, fits = choose(depth, size, RunOptions(**{"timing": False, **options}), free)
    assert fits
    return plan


def policy(plan: Plan) -> tuple[str, bool, int]:
    return plan.keep, plan.rebuild, len(plan.spans)


def test_less_memory_means_a_slower_policy() -> None:
    limits = [HUGE, 1500 * MIB, 100 * MIB, 20 * MIB]
    plans = [chosen(memory_limit=f"{limit}B") for limit in limits]
    assert [policy(plan) for plan in plans] == [
        ("graph", False, 0),
        ("sqrt", False, 1),
        ("sqrt", True, 1),
        ("sqrt", True, 2),
    ]
    assert all(plan.needed <= limit for plan, limit in zip(plans, limits, strict=True))
    assert all(more.needed > less.needed for more, less in pairwise(plans))


def test_of_free_memory_half_is_taken_without_being_asked() -> None:
    needed = chosen().needed
    assert policy(chosen(free=int(needed * 2.01))) == ("graph", False, 0)
    assert policy(chosen(free=int(needed * 1.99))) == ("sqrt", False, 1)
    assert policy(chosen(free=int(needed * 1.01), keep="graph")) == ("graph", False, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": "graph"}, ("graph", False, 0)),
        ({"keep": "graph", "rebuild": True}, ("graph", True, 0)),
        ({"keep": "boundaries"}, ("boundaries", False, 1)),
        ({"keep": "boundaries", "rebuild": True}, ("boundaries", True, 1)),
        ({"keep": "sqrt"}, ("sqrt", False, 1)),
        ({"rebuild": True}, ("sqrt", True, 1)),
        ({"rebuild": False}, ("graph", False, 0)),
    ],
)
def test_options_restrict_the_choice(options: dict[str, Any], expected: Any) -> None:
    assert policy(chosen(**options)) == expected


def test_deep_stacks_are_rebuilt_without_being_asked() -> None:
    assert policy(chosen(2000)) == ("graph", False, 0)
    assert policy(chosen(2001)) == ("sqrt", True, 1)
    assert policy(chosen(2001, keep="graph")) == ("graph", False, 0)
    assert policy(chosen(2001, rebuild=False)) == ("graph", False, 0)


def test_what_cannot_fit_says_so_and_names_the_smallest() -> None:
    plan, fits = choose(10_000, SIZE, RunOptions(memory_limit="1MiB"), HUGE)
    assert not fits
    assert policy(plan) == ("sqrt", True, 2)


@given(depth=st.integers(1, 10**5), stream=st.integers(1, 10**8), graph=st.integers(1, 10**8))
def test_no_other_span_needs_clearly_less(depth: int, stream: int, graph: int) -> None:
    size = Footprint(parameters=10, objects=1, graph=graph, stream=stream, rows=1)
    plan = chosen(depth, size=size, keep="sqrt", rebuild=False)
    (span,) = plan.spans

    def kept(length: int) -> int:
        return math.ceil(depth / length) * stream + length * graph

    assert 1 <= span <= depth
    best = min(kept(max(1, min(depth, round(span * factor)))) for factor in (0.5, 0.8, 1.25, 2))
    assert kept(span) <= best + stream + graph


def test_few_layers_with_much_in_them_keep_every_stream() -> None:
    """A graph that outweighs all streams: a span of one layer, which is what boundaries are."""
    size = Footprint(parameters=3 << 30, objects=0, graph=2 << 30, stream=50 << 20, rows=96)
    plan = chosen(96, size=size, rebuild=True)
    assert policy(plan) == ("boundaries", True, 1)


def test_the_sentence_says_what_was_chosen_and_what_it_costs() -> None:
    assert chosen(keep="graph").sentence.startswith("all graphs kept, parameters resident: about ")
    text = chosen(10_000, keep="sqrt", rebuild=True, memory_limit="200MiB").sentence
    assert "streams and 14 graphs kept of 10,000 layers, each built and computed twice" in text
    assert "MiB instead of 35.6 GiB" in text
    assert "computed three times" in chosen(memory_limit="20MiB").sentence


@pytest.mark.parametrize(
    ("depth", "options", "timed"),
    [
        (100, {}, 100),
        (100, {"timing": False}, 0),
        (100, {"rebuild": True}, 16),
        (2001, {}, 16),
        (5, {"rebuild": True}, 5),
        (10_000, {"memory_limit": "40MiB"}, 7),
    ],
)
def test_how_many_layers_are_timed(depth: int, options: dict[str, Any], timed: int) -> None:
    plan = chosen(depth, **{"timing": True, **options})
    assert plan.timed == timed
    layers = plan.timed_layers
    assert len(set(layers)) == timed
    assert all(1 <= layer <= depth for layer in layers)
    assert timed < 2 or (layers[0], layers[-1]) == (1, depth)


def test_one_timed_layer_is_in_the_middle() -> None:
    assert Plan(9, (), rebuild=False, timed=1).timed_layers == (5,)


SIZES = {"4": 4 << 30, "4GiB": 4 << 30, " 1.5 MiB ": 3 << 19, "10KiB": 10240, "7B": 7}


@pytest.mark.parametrize(("text", "count"), SIZES.items())
def test_sizes(text: str, count: int) -> None:
    assert size_in_bytes(text) == count
    assert RunOptions(memory_limit=text).memory_limit_bytes == count


@pytest.mark.parametrize("text", ["", "0", "-1", "4GB", "many", "1e3", "1.2.3", "9" * 400, 4])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(UsageError, match="--memory-limit is a size"):
        RunOptions(memory_limit=text)


def test_other_policies_are_refused() -> None:
    with pytest.raises(UsageError, match="use auto, graph, boundaries, sqrt"):
        RunOptions(keep="everything")
    with pytest.raises(UsageError, match="use --rebuild or --no-rebuild"):
        RunOptions(rebuild="yes")
