"""What a person sees: it fits 80 columns, leaves out the middle and says so, and hides nothing."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import layer_rows, run_of, spec_of
from rich.cells import cell_len
from rich.console import Console, RenderableType

from gradflow.runs.records import LayerRecord, Run, TimeRecord
from gradflow.showing.terminal.one_run import (
    cost_lines,
    layer_table,
    mean_rows,
    profile,
    run_view,
    subtitle,
    verdict_lines,
)

NAN, INF = math.nan, math.inf
TIME = TimeRecord(0, 1, "mlp", 0.001, 0.002)


def shown(*parts: RenderableType, width: int = 80) -> str:
    """Text as a terminal of this width without colours has it."""
    file = io.StringIO()
    console = Console(file=file, width=width)
    for part in parts:
        console.print(part)
    return file.getvalue()


def lines(*parts: RenderableType) -> list[str]:
    return shown(*parts).splitlines()


def deep(depth: int, **columns: Any) -> Run:
    """A timed transformer whose gradient grows by 1.5 decades towards the input."""
    spec = spec_of(depth=depth, block="transformer")
    units = 2 * depth
    times = {"forward_s": 0.0123, "backward_s": 0.0456}
    logs = [1.5 * (1 - i / units) for i in range(units + 1)]
    return run_of(spec, list(layer_rows(spec, logs, **times, **columns)), times=[TIME])


# The table


def test_a_short_stack_is_shown_whole() -> None:
    text = lines(layer_table(deep(3)))
    assert text[0].split() == [
        *("layer", "unit", "log10|g|", "gain", "skip", "branch", "log10|dW|", "act", "rms"),
        *("fwd", "ms", "bwd", "ms"),
    ]
    assert [line.split()[0] for line in text[1:]] == ["0", "1", "1", "2", "2", "3", "3"]
    assert text[2].split() == [
        *("1", "attention", "+1.250", "1.250", "1.000", "0.750", "+0.00", "1.00", "12.3", "45.6")
    ]


@pytest.mark.parametrize(("depth", "hidden"), [(11, 0), (12, 9), (1000, 1985), (9_999, 19_983)])
def test_a_deep_stack_leaves_out_its_middle_and_says_how_much(depth: int, hidden: int) -> None:
    text = lines(layer_table(deep(depth)))
    elided = [line for line in text if "more" in line]
    assert [line.split()[:3] for line in elided] == ([["…", str(hidden), "more"]] if hidden else [])
    rows = len(text) - 1 - len(elided)
    assert rows + hidden == 2 * depth + 1
    assert text[-1].split()[0] == str(depth)


def test_a_stack_of_a_thousand_layers_fits_80_columns_and_one_screen() -> None:
    text = lines(run_view(deep(1000)))
    assert max(map(len, text)) <= 80
    assert len(text) < 50


# From what a gradient is where it dies to what it is where it explodes.
SIZES = st.one_of(st.just(0.0), st.floats(1e-30, 1e30), st.sampled_from([INF, NAN]), st.none())
LOGS = st.one_of(st.floats(-3000, 3000), st.sampled_from([-INF, INF, NAN]))


@settings(max_examples=30)
@given(
    size=SIZES,
    log=LOGS,
    seconds=st.floats(1e-6, 10),
    depth=st.sampled_from([2, 30, 999]),
)
def test_the_table_fits_80_columns_whatever_is_in_it(
    size: float | None, log: float, seconds: float, depth: int
) -> None:
    sizes = dict.fromkeys(("gain", "skip_gain", "branch_gain", "act_rms"), size)
    times = dict.fromkeys(("forward_s", "backward_s"), seconds)
    spec = spec_of(depth=depth, block="transformer")
    logs = [log] * (2 * depth + 1)
    rows = list(layer_rows(spec, logs, log10_param_grad_norm=log, **sizes, **times))
    text = lines(layer_table(run_of(spec, rows, times=[TIME])))
    assert max(map(len, text)) <= 80
    assert len(text) <= 26  # no cell is wrapped
    assert ("…" in "".join(text)) == (depth > 11)  # none is cut


def named_rows(name: str, **options: Any) -> list[str]:
    """The table of a stack whose units are called `name`, with `layer` and `call` put in."""
    spec = spec_of(**options)
    columns = ("gain", "skip_gain", "branch_gain", "act_rms", "forward_s", "backward_s")
    sizes = dict.fromkeys((*columns, "log10_param_grad_norm"), 1.0)
    rows = [
        replace(row, unit=name.format(layer=row.layer, call=row.layer + 9))
        for row in layer_rows(spec, [0.0] * (1 + spec.depth * spec.units_per_block), **sizes)
    ]
    return lines(layer_table(run_of(spec, rows, times=[TIME])))


def test_long_names_keep_the_end_that_tells_them_apart() -> None:
    name = "model.language_model.encoder.layers.{layer}#{call}"
    text = named_rows(name, depth=2, block="transformer")
    assert max(map(len, text)) <= 80
    names = [line.split()[1] for line in text[1:]]
    assert all(name.startswith("…") for name in names)
    assert [name[-len("layers.0#9") :].lstrip(".") for name in names[:1]] == ["layers.0#9"]
    assert names[-1].endswith("layers.2#11")


def test_wide_characters_take_two_columns_each() -> None:
    text = named_rows("層" * 12 + ".{layer}", depth=3, block="mlp")
    names = [line.split()[1] for line in text[1:]]
    assert [name[0] + name[-2:] for name in names] == ["….0", "….1", "….2", "….3"]
    assert max(map(cell_len, text)) <= 80


def test_columns_that_nothing_fills_are_left_out() -> None:
    spec = spec_of(depth=1)
    bare = LayerRecord(0, 0, 0, "input", 1.0, 1.0, 1.0, 0.0)
    heading = lines(layer_table(run_of(spec, [bare, replace(bare, layer=1, unit="mlp")])))[0]
    assert heading.split() == ["layer", "unit", "log10|g|", "act", "rms"]


def test_several_seeds_are_averaged_and_missing_values_left_out() -> None:
    spec = spec_of(depth=1)
    rows = [
        *layer_rows(spec, [1.0, 0.0], seed=0, gain={1: 1.0}, forward_s={1: 0.5}),
        *layer_rows(spec, [2.0, 0.0], seed=1, gain={1: 2.0}),
    ]
    top, bottom = mean_rows(rows)
    assert (top.layer, top.log10_grad_norm, top.gain) == (0, 1.5, None)
    assert (bottom.layer, bottom.gain, bottom.forward_s) == (1, 1.5, 0.5)


# The profile


def test_the_profile_draws_one_line_within_its_frame() -> None:
    text = shown(profile(deep(50).layer_records))
    assert "log10 |dL/dy| over the layers" in text
    assert "1.50┤" in text
    assert "0.00┤" in text
    assert text.splitlines()[-2].split() == ["0", "12", "25", "38", "50"]
    assert not re.search(r"-0\.0+┤", text)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("logs", [[0.0] * 4, [1e-4, 0.0, -1e-4, 0.0], [-2999.0, -2000, -1000, 0]])
def test_any_finite_profile_is_drawn(logs: list[float]) -> None:
    assert "┤" in shown(profile(list(layer_rows(spec_of(), logs))))


def test_a_flat_profile_is_drawn_flat() -> None:
    drawn = shown(profile(list(layer_rows(spec_of(), [0.001, 0.0, 0.002, 0.0]))))
    assert (
        sum(bool(re.search("[\N{BRAILLE PATTERN DOTS-1}-\u28ff]", x)) for x in drawn.split("\n"))
        == 1
    )


def test_lost_values_leave_a_gap_and_no_value_no_profile() -> None:
    some = list(layer_rows(spec_of(), [-INF, NAN, 1.0, 0.0]))
    assert "┤" in shown(profile(some))
    none = list(layer_rows(spec_of(), [-INF, NAN, None, 0.0]))
    assert "no profile" in shown(profile(none))


# The words


def test_the_heading_says_what_was_measured_and_where() -> None:
    for block, size in [
        ("mlp", "64 vectors"),
        ("ffn", "8 x 32 tokens"),
        ("conv", "8 images of 16 x 16"),
    ]:
        first, second = subtitle(run_of(spec_of(block=block)))
        assert size in first
        assert "1 seed" in first
        assert second == "loss cotangent, float32 on a processor"


def test_the_whole_view_of_a_healthy_run() -> None:
    text = shown(run_view(deep(10)))
    for words in (
        "residual transformer, pre-layernorm, depth 10",
        "healthy. The gradient reaches the first layer.",
        "From output to input: +1.50 decades, +0.1500 ± 0.0000 per layer (95 %).",
        "The profile is exponential in depth, a factor e every 2.9 layers; ",
        "leaves the healthy range near depth 20.",
        "Energy of the gradient: 64.0% through the shortcuts, 36.0% through branches.",
    ):
        assert words in " ".join(text.split()), words


VERDICTS: dict[str, tuple[list[float], dict[str, Any], str]] = {
    "nonfinite": ([0.0] * 4, {"nonfinite": {2: 1}}, "nonfinite at layer 2 (mlp), backward pass."),
    "dead": ([-INF, 0, 0, 0], {}, "dead at the input, backward pass."),
    "vanishing": ([-4.0, -3, -2, 0], {}, "vanishing. The first layers hardly learn."),
}


@pytest.mark.parametrize(("logs", "columns", "says"), VERDICTS.values(), ids=VERDICTS)
def test_a_verdict_names_its_place(logs: list[float], columns: dict[str, Any], says: str) -> None:
    run = run_of(layers=list(layer_rows(spec_of(), logs, **columns)))
    assert lines(*verdict_lines(run.summary))[0].startswith(says)


def test_what_is_not_known_is_not_said() -> None:
    summary = replace(
        run_of().summary, total_log10_gain=None, log10_gain_per_layer=None, trend=None, skip_share=0
    )
    assert lines(*verdict_lines(summary)) == ["healthy. The gradient reaches the first layer."]
    assert list(cost_lines(run_of())) == []


def test_one_layer_has_a_rate_without_an_interval() -> None:
    spec = spec_of(depth=1)
    text = lines(*verdict_lines(run_of(spec, list(layer_rows(spec, [1.0, 0.0]))).summary))
    assert text[1] == "From output to input: +1.00 decades, +1.0000 per layer."


@pytest.mark.parametrize(
    ("trend", "healthy_depth", "says"),
    [
        (
            "power law",
            1e8,
            "is a power law in depth; it leaves the healthy range near depth 100,000,000",
        ),
        ("power law", None, "is a power law in depth; it stays in the healthy range at any depth"),
        ("exponential", 12.3, "every 5 layers; it leaves the healthy range near depth 12."),
    ],
)
def test_the_trend_is_a_sentence(trend: str, healthy_depth: float | None, says: str) -> None:
    summary = run_of().summary
    changed = replace(summary, trend=trend, healthy_depth=healthy_depth, efolding_layers=5.0)
    assert says in " ".join(shown(*verdict_lines(changed)).split())


def test_the_cost_is_said_in_milliseconds_and_times_a_bare_pass() -> None:
    run = run_of()
    seconds = {"forward_s": 0.1, "backward_s": 0.25}
    each = {"forward_s_per_layer": 0.001, "backward_s_per_layer": 0.0025}
    run = replace(run, summary=replace(run.summary, peak_bytes=3 << 29, **seconds, **each))
    assert lines(*cost_lines(run)) == [
        "One pass: forward 100 ms, backward 250 ms; per layer 1.00 + 2.50 ms.",
        "Peak memory 1.5 GiB; observing cost 1.25 times a bare pass.",
    ]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_any_width_of_terminal_is_kept(width: int) -> None:
    text = shown(run_view(deep(1000)), width=width)
    assert max(map(len, text.splitlines())) <= width


def test_nothing_is_coloured_where_there_is_no_terminal() -> None:
    assert "\x1b" not in shown(run_view(deep(30)))
