"""One compiled unit for all layers: as many graphs at any depth, and the eager numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import user_models
from clocks import FakeClock
from commandline import CommandLine
from problems import CPU, network, small
from records import run_of
from torch._dynamo.utils import counters

import gradflow
from gradflow.engine import compiled
from gradflow.engine.build import RebuiltBlocks
from gradflow.engine.compiled import compiled_join, with_join
from gradflow.engine.flops import network_flops
from gradflow.engine.tape import Network
from gradflow.engine.timing import CpuClock, bare_pass, timed_pass
from gradflow.engine.walk import walk
from gradflow.errors import MeasurementError, UsageError
from gradflow.judging.comparison import time_ratio
from gradflow.measuring.any import timer_for
from gradflow.networks.units.template import Compiled, Unit
from gradflow.runs.naming import names
from gradflow.runs.records import LayerRecord, ParamRecord, TimeRecord
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec, run_key


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """In a folder with the user's module, like `python -m`."""
    monkeypatch.chdir(Path(user_models.__file__).parent)
    return CommandLine(capsys, tmp_path)


@pytest.fixture(autouse=True)
def no_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tracing and differentiation without code generation, which takes most of the time."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def resident(spec: StackSpec, join: Compiled) -> Network:
    made = network(spec)
    return replace(made, blocks=[with_join(join, block) for block in made.blocks])


def rebuilt(spec: StackSpec, join: Compiled, alive: int = 1) -> Network:
    return replace(network(spec), blocks=RebuiltBlocks(spec, 0, CPU, alive, join=join))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def generates_code(test: Any) -> Any:
    """Slow, and needs a compiler; inductor's own imports use what torch has deprecated."""
    ignored = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    has_none = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
    return pytest.mark.slow(ignored(has_none(test)))


Records = tuple[list[LayerRecord], list[ParamRecord]]


def records(spec: StackSpec, net: Network, spans: Sequence[int] = ()) -> Records:
    return walk(spec, 0, net, spans=spans).records()


def scheme(name: str, **options: Any) -> StackSpec:
    return StackSpec(scheme=name, width=16, batch_size=2, **options)


# With the graphs that each needs: kinds of unit, and for streams their first one.
FEW: dict[str, tuple[StackSpec, int]] = {
    "transformer": (small("transformer"), 2),
    "mlp": (small("mlp"), 1),
    "a number for each layer": (scheme("deepscalelm"), 2),
}
MORE: dict[str, tuple[StackSpec, int]] = {
    "post": (small("transformer", norm="post", loss="ce"), 2),
    "modern": (small("transformer", gated=True, heads=6, kv_heads=2, head_dim=4, rope=1e4), 2),
    "plain": (small("mlp", shortcut="plain", norm="none", activation="tanh"), 1),
    "resnet": (small("resnet"), 1),
    "batchnorm": (small("ffn", norm_kind="batchnorm"), 1),
    "parameters for each layer": (scheme("admin"), 2),
    "two streams": (scheme("b2t"), 2),
}
CASES = FEW | MORE
NAMES = [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def with_depth(name: str, depth: int) -> StackSpec:
    return replace(CASES[name][0], depth=depth)


@pytest.mark.parametrize("name", NAMES)
def test_a_deep_stack_has_the_graphs_of_a_shallow_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident and rebuilt, in passes for statistics, for times, and by torch alone."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    for depth in (3, 12):
        torch._dynamo.reset()
        counters.clear()
        join, spec = compiled_join(), with_depth(name, depth)
        made = resident(spec, join)
        records(spec, made)
        timed_pass(made, CpuClock())
        bare_pass(made, CpuClock())
        records(spec, rebuilt(spec, join, alive=2), (2,))
        assert graphs() == CASES[name][1]


def test_a_stack_is_compiled_for_its_own_sizes_whatever_was_compiled_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    symbols: list[object] = []

    def look(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> torch.fx.GraphModule:
        symbols.extend(part for part in inputs if isinstance(part, torch.SymInt))
        return graph

    monkeypatch.setattr(compiled, "BACKEND", look)
    for batch_size in (2, 3, 5):
        spec = small("mlp", batch_size=batch_size)
        records(spec, resident(spec, compiled_join()))
    assert graphs() == 3
    assert symbols == []
    join = compiled_join()
    for batch_size in (2, 3):  # the negative control: one function for both
        spec = small("mlp", batch_size=batch_size)
        records(spec, resident(spec, join))
    assert symbols


def close(mine: Records, eager: Records, rel: float) -> None:
    """Every number, but those of memory and of a graph's kind."""
    for found, wanted in zip(mine, eager, strict=True):
        for a, b in zip(found, wanted, strict=True):
            for field in (name for name in a.__slots__ if name != "saved_bytes"):
                x, y = getattr(a, field), getattr(b, field)
                assert x == (pytest.approx(y, rel=rel, abs=rel) if isinstance(y, float) else y)


QUICK = (("transformer", "float32"), ("mlp", "float64"))
CLOSE = {"float32": 1e-5, "float64": 1e-10}
NUMBERS = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in product(CASES, CLOSE)
]


@pytest.mark.parametrize(("name", "dtype"), NUMBERS)
def test_the_numbers_are_the_eager_ones(name: str, dtype: str) -> None:
    spec = replace(CASES[name][0], dtype=dtype)
    eager, join = records(spec, network(spec)), compiled_join()
    found = records(spec, resident(spec, join))
    close(found, eager, CLOSE[dtype])
    assert records(spec, rebuilt(spec, join), (1,)) == found


def test_another_unit_would_have_other_numbers() -> None:
    """The negative control: a graph that took its constants from the first layer."""
    spec = with_depth("a number for each layer", 4)
    eager, made = records(spec, network(spec)), network(spec)
    (first, *_) = made.blocks[0].units
    for block in made.blocks:
        for unit in block.units:
            unit.wiring = replace(first.wiring, norms=unit.wiring.norms, a=0.5)
    with pytest.raises(AssertionError):
        close(records(spec, made), eager, 1e-5)


def test_the_bytes_are_those_that_the_compiled_unit_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("mlp", activation="gelu", depth=1)
    eager, _ = records(spec, network(spec))
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    same, _ = records(spec, resident(spec, compiled_join()))
    assert same[1].saved_bytes == eager[1].saved_bytes

    def keeping(unit: Unit, x_skip: Any, x_branch: Any) -> Any:
        y = unit.join(x_skip, x_branch)
        return y * torch.ones_like(y, requires_grad=True)  # both factors are kept

    more, _ = records(spec, resident(spec, keeping))
    assert (more[1].saved_bytes or 0) > (eager[1].saved_bytes or 0)


def test_flops_are_those_of_the_unit_as_it_is_written() -> None:
    spec = small("transformer")
    assert network_flops(resident(spec, compiled_join())) == network_flops(network(spec))
    assert graphs() == 0


# What cannot be compiled


def test_a_stack_that_needs_a_graph_for_each_layer_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    spec = scheme("denseformer", depth=4)
    says = "--compile uses one graph for all layers; .* kinds of"
    with torch._dynamo.config.patch(recompile_limit=3), pytest.raises(UsageError, match=says):
        records(spec, resident(spec, compiled_join()))


def test_a_unit_that_is_not_one_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def join(unit: Unit, x_skip: torch.Tensor, x_branch: torch.Tensor) -> torch.Tensor:
        return x_skip + unit.f(x_branch) * (1 if x_branch.sum().item() > 0 else 2)

    monkeypatch.setattr(Unit, "join", join)
    spec = small("mlp")
    with pytest.raises(UsageError, match=r"one graph of the mlp unit; .*; leave out --compile"):
        records(spec, resident(spec, compiled_join()))


def test_a_backend_that_fails_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(compiled, "BACKEND", fail)
    spec = small("mlp")
    with pytest.raises(MeasurementError, match=r"failed on the mlp unit: no compiler here; "):
        records(spec, resident(spec, compiled_join()))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", "5"), "--compile applies to initialisation, not to training; got --steps 5"),
        (("--model", "user_models:Net", "--input", "5,6"), "--compile is for stacks"),
    ],
)
def test_what_has_no_compiled_form_is_a_usage_error(
    cli: CommandLine, words: Sequence[str], says: str
) -> None:
    found = cli("run", "--compile", *words)
    assert found.code == 2
    assert says in found.complaint


# Runs


def measured(spec: StackSpec, **options: Any) -> gradflow.Run:
    chosen = RunOptions(device="cpu", repeats=1, time_budget=1e-9, **options)
    return gradflow.measure(spec, chosen, clock=FakeClock([1.0]))


@pytest.mark.parametrize("policy", [{}, {"keep": "boundaries", "rebuild": True}])
def test_a_run_says_that_it_is_compiled(
    policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    spec = small("mlp")
    run, eager = measured(spec, compile=True, **policy), measured(spec, **policy)
    assert graphs() == 1
    assert run.environment["compiled"] == "eager"
    assert "compiled" not in eager.environment
    assert run.summary.total_log10_gain == pytest.approx(eager.summary.total_log10_gain)
    assert run.summary.forward_flop == eager.summary.forward_flop


def test_the_timer_of_a_sweep_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    timer_for(small("mlp"), RunOptions(device="cpu", compile=True), CPU).timed(CpuClock())
    assert graphs() == 1


def test_compiled_and_eager_are_never_ratioed() -> None:
    eager, mine = run_of(), run_of(options=RunOptions(compile=True))
    timed = partial(replace, time_records=[TimeRecord(0, 1, "mlp", 1.0, 2.0)])
    assert time_ratio(timed(mine), timed(eager), ("forward_s",)).reason == "compiled against eager"
    assert time_ratio(timed(eager), timed(mine), ("forward_s",)).reason == "eager against compiled"
    assert time_ratio(timed(mine), timed(mine), ("forward_s",)).reason == ""
    assert [name.design for name in names([mine, eager])] == [
        "residual, pre-norm, compiled",
        "residual, pre-norm",
    ]


def test_a_compiled_run_has_a_key_of_its_own() -> None:
    spec = StackSpec()
    assert run_key(spec, RunOptions(compile=True)) != run_key(spec, RunOptions())


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_it_is_a_flag(value: Any) -> None:
    with pytest.raises(UsageError, match="--compile is a flag"):
        RunOptions(compile=value)


@generates_code
@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-5), ("float64", 1e-10)])
def test_generated_code_gives_the_eager_numbers(
    monkeypatch: pytest.MonkeyPatch, dtype: str, rel: float
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    spec = small("transformer", dtype=dtype, depth=12)
    eager, join = records(spec, network(spec)), compiled_join()
    close(records(spec, resident(spec, join)), eager, rel)
    close(records(spec, rebuilt(spec, join), (1,)), eager, rel)
    assert graphs() == 2


@generates_code
def test_the_command_line_compiles(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    found = cli.run("--compile")
    assert (found.code, "healthy" in found.out) == (0, True)
