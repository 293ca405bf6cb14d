"""Runs side by side, made for tests of tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from records import ENVIRONMENT, layer_rows, run_of, spec_of

from gradflow.judging.comparison import Comparison, compare_runs
from gradflow.runs.records import Run, TimeRecord
from gradflow.specs.stack import StackSpec

HERE = ENVIRONMENT | {"sweep": "s1", "matmul_precision": "highest"}


def timed_run(spec: StackSpec, per_layer: float = 0.0, seconds: float = 1.0, **where: Any) -> Run:
    places = spec.depth * spec.units_per_block
    profile = [per_layer * (places - place) for place in range(places + 1)]
    times = [TimeRecord(r, 1, "mlp", seconds, seconds * 1.001**r) for r in range(3)]
    made = run_of(spec, list(layer_rows(spec, profile)), times=times, environment=HERE | where)
    cost = {"forward_s_per_layer": seconds, "backward_s_per_layer": seconds, "peak_bytes": 2**30}
    return replace(made, summary=replace(made.summary, **cost))


def seed_grid() -> Comparison:
    runs = [
        timed_run(spec_of(shortcut=shortcut, norm=norm, depth=depth), rate)
        for shortcut in ("plain", "residual")
        for norm, rate in (("none", -0.1), ("pre", 0.001), ("post", 0.01))
        for depth in (12, 50, 200)
    ]
    return compare_runs(runs, runs[0])


EXTREME = st.floats(allow_nan=True, allow_infinity=True) | st.none()


SPECS = st.builds(
    StackSpec,
    depth=st.sampled_from([1, 12, 1000]),
    block=st.just("transformer"),
    shortcut=st.sampled_from(["plain", "residual"]),
    norm=st.sampled_from(["none", "pre", "post"]),
    activation=st.sampled_from(["relu", "gelu"]),
    init=st.sampled_from(["he", "orthogonal"]),
    gain=st.sampled_from([1.0, 1 / 3, 1.23456789e-7]),
    width=st.sampled_from([128, 65536]),
    loss=st.sampled_from(["cotangent", "ce"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    runs = []
    for _ in range(draw(st.integers(1, 5))):
        spec = replace(draw(SPECS), depth=1)
        made = timed_run(spec, seconds=draw(st.floats(1e-9, 1e6)))
        numbers = {
            name: draw(EXTREME)
            for name in (
                "total_log10_gain",
                "log10_gain_per_layer",
                "log10_gain_per_layer_high",
                "efolding_layers",
                "skip_share",
                "param_grad_spread",
                "forward_s_per_layer",
                "backward_s_per_layer",
                "theory_deviation",
                "theory_band",
            )
        }
        numbers["peak_bytes"] = draw(st.integers(0, 2**60) | st.none())
        numbers["verdict"] = draw(st.sampled_from(["healthy", "exploding", "nonfinite"]))
        profile = draw(st.lists(EXTREME, min_size=3, max_size=3))
        rows = list(layer_rows(spec, profile))
        runs.append(replace(made, summary=replace(made.summary, **numbers), layer_records=rows))
    return compare_runs(runs, draw(st.sampled_from(runs)))
