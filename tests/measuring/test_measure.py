"""From a spec to a run: all seeds, summary, overhead, environment, and what cannot be measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import FakeClock
from problems import small

import gradflow
from gradflow.engine import environment, memory
from gradflow.engine.build import build_network
from gradflow.errors import MeasurementError, UsageError
from gradflow.measuring import stack as stack_module
from gradflow.measuring.stack import measure
from gradflow.runs import store
from gradflow.runs.records import TIMING_COLUMNS, Run
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.stack_fields import DTYPES

SMALL = small("transformer", depth=2)
CPU = torch.device("cpu")


def measured(spec: StackSpec = SMALL, **options: Any) -> Run:
    """A run whose clock moves by a second at each mark."""
    chosen = RunOptions(**{"device": "cpu", "repeats": 2, "time_budget": 1e-9, **options})
    return measure(spec, chosen, clock=FakeClock([1.0]))


# Seeds and tables


def test_every_seed_has_its_rows() -> None:
    run = measured(seed=3, seeds=2)
    places = [(0, "input"), (1, "attention"), (1, "ffn"), (2, "attention"), (2, "ffn")]
    found = [(row.seed, row.layer, row.unit) for row in run.layer_records]
    assert found == [(seed, *place) for seed in (3, 4) for place in places]
    assert {row.seed for row in run.param_records} == {3, 4}
    assert len(run.time_records) == 2 * 4


def test_only_the_first_seed_is_timed() -> None:
    run = measured(seeds=2)
    timed = [row.seed for row in run.layer_records if row.forward_s is not None]
    assert timed == [0] * 4


def test_a_seed_does_not_depend_on_those_before_it() -> None:
    both, alone = measured(seeds=2, timing=False), measured(seed=1, timing=False)
    assert both.layer_records[5:] == alone.layer_records


def test_the_same_spec_gives_the_same_numbers_whatever_it_took() -> None:
    torch.manual_seed(7)
    first = measured()
    torch.rand(3)
    second = measure(SMALL, RunOptions(device="cpu", repeats=1), clock=FakeClock([3.0]))
    drop = list(TIMING_COLUMNS)
    assert first.layers.drop(columns=drop).equals(second.layers.drop(columns=drop))
    assert first.params.equals(second.params)
    assert not first.layers[drop].equals(second.layers[drop])


def test_one_network_is_resident_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    class Counted(stack_module.Network):
        def __del__(self) -> None:
            alive.pop()

    def build(*args: Any) -> stack_module.Network:
        assert not alive
        made = build_network(*args)
        alive.append(1)
        return Counted(made.blocks, made.x, made.loss)

    monkeypatch.setattr(stack_module, "build_network", build)
    measured(seeds=3, timing=False)
    assert not alive


# Summary, overhead, progress


def test_the_summary_is_that_of_the_rows() -> None:
    run = measured(seeds=2)
    profiles = run.layers.pivot_table(
        values="log10_grad_norm", index=["layer", "unit"], columns="seed", sort=False
    )
    total = (profiles.iloc[0] - profiles.iloc[-1]).mean()
    assert run.summary.total_log10_gain == pytest.approx(total)
    assert run.summary.log10_gain_per_layer == pytest.approx(total / 2)
    assert run.summary.verdict == "healthy"
    assert run.summary.loss is None
    assert run.summary.peak_bytes is not None
    assert run.summary.peak_bytes > 0
    # Four units, a second each.
    assert (run.summary.forward_s, run.summary.backward_s_per_layer) == (4.0, 2.0)


def test_the_loss_is_the_mean_over_the_seeds() -> None:
    spec = small("ffn", loss="mse")
    losses = [measured(spec, seed=seed, timing=False).summary.loss or 0 for seed in (0, 1)]
    assert measured(spec, seeds=2, timing=False).summary.loss == pytest.approx(sum(losses) / 2)


def test_what_observing_cost_is_recorded() -> None:
    assert measured(seeds=3).overhead == {
        "statistics_pass_s": 1.0,
        "bare_pass_s": 1.0,
        "bare_pass_iqr_s": 0.0,
        "timed_pass_s": 8.0,
        "statistics_over_bare": 1.0,
        "timed_over_bare": 8.0,
    }


def test_without_timing_there_are_no_times_and_no_overhead() -> None:
    run = measured(timing=False)
    assert (run.overhead, run.warnings, list(run.time_records)) == (None, (), [])
    assert run.layers[list(TIMING_COLUMNS)].isna().all(axis=None)
    assert run.summary.forward_s is None


def test_raw_range_is_handed_on() -> None:
    spec = small("mlp", depth=40, shortcut="plain", norm="none", activation="tanh", gain=0.01)
    assert measured(spec, timing=False).summary.verdict == "vanishing"
    assert measured(spec, timing=False, raw_range=True).summary.verdict == "dead"


def test_progress_goes_from_phase_to_phase_and_never_past_its_end() -> None:
    calls: list[tuple[str, int, int]] = []
    options = RunOptions(device="cpu", seeds=2, repeats=2, time_budget=30)
    measure(SMALL, options, clock=FakeClock([1.0]), progress=lambda *call: calls.append(call))
    phases = list(dict.fromkeys(phase for phase, _, _ in calls))
    assert phases == ["building", "timing", "gradients, seed 0", "gradients, seed 1"]
    assert all(0 <= done <= total for _, done, total in calls)
    ends = {phase: (done, total) for phase, done, total in calls}
    assert ends["timing"] == (2, 2)
    assert ends["gradients, seed 1"] == (4, 4)


def test_the_defaults_of_the_library_are_those_of_the_command() -> None:
    run = gradflow.measure(small("mlp"), clock=FakeClock([1.0]))
    assert run.options == RunOptions()
    assert run.path is None


def test_no_module_hides_a_name_of_the_package() -> None:
    """The import system sets a module in its package, over whatever had that name."""
    for name in gradflow.__all__:
        assert getattr(gradflow, name) is getattr(gradflow, name)
        with pytest.raises(ModuleNotFoundError):
            import_module(f"gradflow.{name}")


def test_the_package_loads_its_names_and_no_others() -> None:
    assert gradflow.load is store.load
    assert gradflow.StackSpec is StackSpec
    assert gradflow.Run is Run
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        gradflow.colour  # noqa: B018


# Number formats and devices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_number_format_runs_on_the_cpu(block: str, dtype: str) -> None:
    run = measured(small(block, depth=2, dtype=dtype), timing=False)
    assert run.summary.verdict == "healthy"
    assert run.environment["dtype"] == dtype
    exact = measured(small(block, depth=2, dtype="float64"), timing=False)
    near = {"float16": 0.02, "bfloat16": 0.1}.get(dtype, 1e-4)
    assert run.summary.total_log10_gain == pytest.approx(exact.summary.total_log10_gain, abs=near)


def no_gpu(monkeypatch: pytest.MonkeyPatch, count: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("device", "count", "says"),
    [
        ("cuda", 0, "needs a GPU that torch can use; got none; use --device cpu"),
        ("cuda:0", 0, "needs a GPU"),
        ("cuda:2", 2, "--device cuda:N has N below 2; got cuda:2; use --device cuda:0"),
        ("mps", 0, "--device is auto, cpu, cuda or cuda:N; got mps; use --device auto"),
        ("cuda:x", 0, "got cuda:x"),
        ("", 0, "--device is auto"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, count: int, says: str
) -> None:
    no_gpu(monkeypatch, count)
    with pytest.raises(UsageError, match=says):
        measured(device=device)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    assert environment.resolve_device("auto", "float32") == CPU


def test_a_number_format_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(UsageError, match="cpu computes in --dtype; got float16; use --dtype"):
        measured(small("mlp", dtype="float16"))


# Memory


def free(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: amount)


def test_the_estimate_is_parameters_and_what_autograd_keeps() -> None:
    spec = small("transformer", depth=3, batch_size=6)
    run = measured(spec, timing=False)
    parameters = 4 * int(run.params["numel"].sum())
    kept = int(run.layers["saved_bytes"].sum())
    size = memory.footprint(spec, 0, CPU)
    assert memory.resident_bytes(size, 3) == pytest.approx(parameters + kept, rel=0.01)
    assert size.stream == 6 * 5 * 12 * 4
    plan = memory.make_plan(spec, RunOptions(timing=False), CPU)
    assert memory.least_bytes(spec) < parameters + kept < plan.needed


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (SMALL, "--depth, --batch-size, --seq-len, --ffn-mult, --width"),
        (small("conv"), "--depth, --batch-size, --image-size, --width"),
        (small("mlp"), "--depth, --batch-size, --width"),
    ],
)
def test_out_of_memory_says_how_much_and_which_options_lower_it(
    monkeypatch: pytest.MonkeyPatch, spec: StackSpec, options: str
) -> None:
    free(monkeypatch, 1 << 10)
    with pytest.raises(MeasurementError) as caught:
        measured(spec)
    assert "out of memory: this stack needs at least " in str(caught.value)
    assert str(caught.value).endswith(f", 1 KiB are free; lower {options}")
    with pytest.raises(MeasurementError) as restricted:
        measured(spec, keep="graph")
    assert str(restricted.value).endswith(", or leave --keep and --rebuild to gradflow")
    free(monkeypatch, 1 << 40)
    with pytest.raises(MeasurementError, match=", 10 KiB are allowed; lower"):
        measured(spec, memory_limit="10KiB")


@pytest.mark.parametrize(
    "sizes",
    [
        {"depth": 10**12},
        {"width": 12 * 10**9},
        {"batch_size": 10**12},
        {"seq_len": 10**12},
        {"ffn_mult": 10**12},
        {"loss": "ce", "classes": 10**12},
    ],
    ids=lambda sizes: next(iter(sizes)),
)
def test_what_can_never_fit_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any]
) -> None:
    monkeypatch.setattr(memory, "build_block", None)
    with pytest.raises(MeasurementError, match=r"needs at least [\d,]+\.\d GiB"):
        measured(small("transformer", **sizes))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
@pytest.mark.parametrize("where", ["engine.memory.footprint", "measuring.stack.walk"])
def test_a_failed_allocation_is_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, where: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"gradflow.{where}", fail)
    with pytest.raises(MeasurementError, match=r"out of memory: .* lower --depth"):
        measured()


def test_other_errors_of_torch_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(stack_module, "walk", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measured()


@pytest.mark.parametrize(
    ("limit", "used", "room"), [("max", "5", sys.maxsize), ("100", "30", 70), ("10", "30", 0)]
)
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, room: int
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes(CPU) == min(room, memory.available_bytes(CPU))
    assert memory._cgroup_room() == room


def test_without_a_container_the_machine_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert 0 < memory.available_bytes(CPU) < sys.maxsize


def test_the_peak_is_known_without_proc_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none" / "either")
    memory.reset_peak(CPU)
    assert memory.peak_bytes(CPU) > 2**20


def test_the_peak_falls_back_when_it_is_reset() -> None:
    torch.ones(1 << 24)  # 64 MiB, freed at once
    before = memory.peak_bytes(CPU)
    memory.reset_peak(CPU)
    assert memory.peak_bytes(CPU) <= before


# Environment


def test_the_environment_says_what_a_comparison_must_know() -> None:
    found = measured().environment
    expected = {
        *("gradflow", "torch", "python", "platform", "device", "device_name", "threads"),
        *("dtype", "matmul_precision", "tf32", "deterministic", "git", "argv"),
        *("start_utc", "duration_s", "keep", "rebuild", "memory_policy"),
    }
    assert set(found) == expected
    assert found["torch"] == torch.__version__
    assert found["threads"] == 1
    assert found["device_name"]
    assert found["start_utc"].endswith("+00:00")
    assert found["duration_s"] > 0
    json.dumps(found)


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.describe_environment(SMALL, CPU)["git"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "a")
    (tmp_path / "untracked").write_text("b")
    clean = environment.describe_environment(SMALL, CPU)["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("c")
    assert environment.describe_environment(SMALL, CPU)["git"] == clean | {"dirty": True}


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment.describe_environment(SMALL, CPU)["git"] is None


def test_a_stored_measurement_comes_back(tmp_path: Path) -> None:
    run = store.save(measured(seeds=2), tmp_path)
    again = store.load(run.path)
    assert again.layers.equals(run.layers)
    assert again.params.equals(run.params)
    assert again.times.equals(run.times)
    assert again.summary == run.summary
    assert again.environment == run.environment
    assert all(math.isfinite(value) for value in (again.overhead or {}).values())
