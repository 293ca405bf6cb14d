"""How deep a design can be, from runs at several depths."""

from __future__ import annotations

import json
import math

import pytest
from records import layer_rows, run_of, spec_of

from gradflow.compare_formats import as_json, as_markdown
from gradflow.compare_tables import depth_lines
from gradflow.comparison import Comparison, compare
from gradflow.records import Run
from gradflow.trainable import TrainableDepth, trainable_depths


def run(depth: int, profile: list[float], **options: str) -> Run:
    spec = spec_of(depth=depth, **options)
    return run_of(spec, list(layer_rows(spec, profile)))


def exponential(depth: int, rate: float = -0.1) -> Run:
    """`rate` decades a layer from output to input: the threshold of 3 is at depth 3 / |rate|."""
    return run(depth, [rate * (depth - layer) for layer in range(depth + 1)])


def power_law(depth: int) -> Run:
    """|g| = (1 + D) / (1 + l): three decades at depth 999."""
    return run(depth, [math.log10((1 + depth) / (1 + layer)) for layer in range(depth + 1)])


def judged(*runs: Run) -> Comparison:
    return compare(runs, runs[0])


def only(*runs: Run) -> TrainableDepth:
    (found,) = trainable_depths(judged(*runs))
    return found


@pytest.mark.parametrize("rate", [-0.1, 0.1])
@pytest.mark.parametrize(
    ("depths", "healthy", "lost", "source"),
    [
        ((12, 20), 20, None, "trend"),
        ((10, 20, 40, 80), 20, 40, "interpolated"),
        ((40, 80), None, 40, "trend"),
    ],
)
def test_an_exponential_design_has_the_depth_of_its_rate(
    rate: float, depths: tuple[int, ...], healthy: int | None, lost: int | None, source: str
) -> None:
    found = only(*(exponential(depth, rate) for depth in depths))
    assert (found.healthy, found.lost, found.source) == (healthy, lost, source)
    assert found.depth == pytest.approx(30)


def test_a_power_law_has_the_depth_of_its_power() -> None:
    assert only(power_law(30), power_law(100)).depth == pytest.approx(999, rel=0.01)
    found = only(power_law(300), power_law(3000))
    assert (found.healthy, found.lost) == (300, 3000)
    assert found.depth == pytest.approx(999, rel=0.01)


def test_a_flat_design_has_no_end() -> None:
    found = only(run(3, [0.0] * 4), run(30, [0.0] * 31))
    assert (found.healthy, found.lost, found.depth, found.source) == (30, None, None, None)
    assert found.sentence.endswith(": beyond 30, no end by its trend")


def test_where_values_are_lost_only_the_two_depths_are_known() -> None:
    found = only(exponential(10), run(20, [math.nan] * 20 + [0.0]))
    assert (found.healthy, found.lost, found.depth) == (10, 20, None)
    assert found.sentence.endswith(": between 10 and 20")


def test_designs_at_one_depth_say_nothing() -> None:
    assert trainable_depths(judged(exponential(10), power_law(10))) == []


def test_every_output_shows_it() -> None:
    shown = judged(exponential(20), exponential(40), exponential(80))
    line = "about 30, between 20 and 40"
    assert line in depth_lines(shown)[0]
    assert line in as_markdown(shown)
    (stored,) = json.loads(as_json(shown))["trainable_depths"]
    assert (stored["healthy"], stored["lost"]) == (20, 40)
    assert "Trainable" not in as_markdown(judged(exponential(20)))
