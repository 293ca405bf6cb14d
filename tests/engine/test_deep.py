"""Stacks beyond the memory, from the measurement to the folder: same run, whatever is kept."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from clocks import FakeClock
from commandline import CommandLine, finish, start
from problems import small

from gradflow.engine import rows
from gradflow.measuring.stack import measure
from gradflow.runs import store
from gradflow.runs.disk_rows import Spool
from gradflow.runs.records import Run
from gradflow.runs.staging import STAGING
from gradflow.showing.terminal.one_run import end_rows, run_view
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

# Options, and the policy that they lead to.
POLICIES: dict[str, tuple[dict[str, Any], tuple[str, bool]]] = {
    "boundaries": ({"keep": "boundaries"}, ("boundaries", False)),
    "sqrt": ({"keep": "sqrt"}, ("sqrt", False)),
    "rebuilt": ({"keep": "boundaries", "rebuild": True}, ("boundaries", True)),
    "little": ({"memory_limit": "700KiB"}, ("boundaries", True)),
    "graph, rebuilt": ({"keep": "graph", "rebuild": True}, ("graph", True)),
}


def measured(spec: StackSpec, **options: Any) -> Run:
    return measure(spec, RunOptions(device="cpu", **{"timing": False, **options}))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capsys, tmp_path)


@pytest.mark.parametrize(("options", "policy"), POLICIES.values(), ids=POLICIES)
def test_a_run_does_not_depend_on_the_policy(
    options: dict[str, Any], policy: tuple[str, bool]
) -> None:
    spec = small("transformer", depth=40, loss="ce")
    plain, other = (measured(spec, seeds=2, **each) for each in ({"keep": "graph"}, options))
    assert other.layer_records == plain.layer_records
    assert other.param_records == plain.param_records
    assert other.summary.loss == plain.summary.loss
    assert (other.environment["keep"], other.environment["rebuild"]) == policy


def test_tens_of_thousands_of_decades_are_exact() -> None:
    """An orthogonal linear stack multiplies the gradient by its gain: log10 = depth * log10(gain).

    Activations underflow to zero on the way; no part of the gradient at y depends on them.
    """
    depth, decades = 2000, -12
    gain = 10.0**decades
    spec = StackSpec(
        **{"depth": depth, "block": "mlp", "shortcut": "plain", "norm": "none", "width": 4},
        **{"activation": "linear", "init": "orthogonal", "gain": gain, "dtype": "float64"},
        batch_size=2,
    )
    run = measured(spec, keep="sqrt", rebuild=True)
    for row in run.layer_records:
        exact = (depth - row.layer) * math.log10(gain)
        assert row.log10_grad_norm == pytest.approx(exact, rel=1e-12, abs=1e-12)
    assert run.summary.total_log10_gain == pytest.approx(depth * decades, rel=1e-12)


@pytest.mark.slow
def test_a_sample_of_layers_is_timed_and_said() -> None:
    spec = small("transformer", depth=31)
    options = RunOptions(device="cpu", rebuild=True, repeats=2, time_budget=1e-9)
    run = measure(spec, options, clock=FakeClock([1.0]))
    timed = sorted({row.layer for row in run.time_records})
    assert timed == list(range(1, 32, 2))
    assert [row.layer for row in run.layer_records if row.forward_s is not None] == [
        layer for layer in timed for _ in range(2)
    ]
    # Two units a layer, a second each.
    assert (run.summary.forward_s_per_layer, run.summary.forward_s) == (2.0, 62.0)
    assert "times are those of 16 of 31 layers" in run.warnings[0]
    # A pass over all layers takes a second on this clock, as does the bare pass over 16 of them.
    assert run.overhead
    assert run.overhead["statistics_over_bare"] == pytest.approx(16 / 31)


def test_few_layers_that_are_rebuilt_are_timed_all_in_a_stack_of_their_own() -> None:
    options = RunOptions(device="cpu", keep="boundaries", rebuild=True, repeats=1, time_budget=1e-9)
    run = measure(small("mlp"), options, clock=FakeClock([1.0]))
    assert [row.layer for row in run.time_records] == [1, 2, 3]
    assert not any("layers" in line for line in run.warnings)


def test_the_progress_counts_what_is_computed_again() -> None:
    calls: list[tuple[str, int, int]] = []
    options = RunOptions(device="cpu", timing=False, keep="boundaries")
    measure(small("mlp", depth=10), options, progress=lambda *call: calls.append(call))
    walked = [call for call in calls if call[0] == "gradients, seed 0"]
    # Forward 10, again all but the last, back 10.
    assert [(done, total) for _, done, total in walked] == [(i, 29) for i in range(1, 30)]


@pytest.mark.slow
def test_a_deep_run_is_stored_and_loaded_and_shown(cli: CommandLine) -> None:
    size = ("--block", "mlp", "--width", "4", "--batch-size", "2", "--depth", "700")
    words = (*size, "--keep", "sqrt", "--rebuild", "--no-timing", "--quiet", "--out")
    found = cli("run", *words, str(cli.out))
    assert (found.code, found.err) == (0, "")
    (folder,) = store.run_folders(cli.out)
    run = store.load(folder)
    assert [row.layer for row in run.layer_records] == list(range(701))
    again = measured(run.spec)
    # As text, because a cosine with a branch that has died is NaN.
    assert repr(list(again.layer_records)) == repr(list(run.layer_records))
    assert repr(list(again.param_records)) == repr(list(run.param_records))
    shown, hidden = end_rows(run.layer_records)
    assert [row.layer for row in shown] == [*range(8), *range(693, 701)]
    assert hidden == 685
    assert run_view(run)


def test_the_policy_is_shown_and_stored(cli: CommandLine) -> None:
    shown = cli.run("--keep", "boundaries", "--no-timing").out
    assert "Memory policy: 2 streams and 1 graph kept of 2 layers" in " ".join(shown.split())
    (folder,) = store.run_folders(cli.out)
    assert store.load(folder).options.keep == "boundaries"


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_while_rows_leave(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.run("--no-timing", "--quiet")
    before = sorted(cli.out.rglob("*"))
    monkeypatch.setattr(Spool, "add_chunk", full)
    failed = cli.run("--no-timing", "--seed", "5")
    assert failed.code == 3
    assert "No space left on device; free some space" in failed.complaint
    assert sorted(cli.out.rglob("*")) == before


def test_rows_leave_for_the_folder_that_the_run_will_lie_in(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path | None] = []

    class Watched(Spool):  # type: ignore[type-arg]
        def __init__(self, record: Any, folder: Path | None = None, rows: Any = ()) -> None:
            places.append(folder)
            super().__init__(record, folder, rows)

    monkeypatch.setattr(rows, "Spool", Watched)
    cli.out = cli.out / "not" / "there"
    cli.run("--no-timing", "--quiet")
    assert set(places) == {cli.out.parent.parent}


DEPTH = 3000
DEEP = ("run", "--block", "mlp", "--width", "16", "--batch-size", "4", "--depth", str(DEPTH))
SPILLED = (*DEEP, "--memory-limit", "2MiB", "--no-timing", "--quiet", "--device", "cpu", "--out")


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("moment", [0.0, 0.5])
def test_a_deep_run_that_is_stopped_leaves_nothing(
    tmp_path: Path, sign: signal.Signals, moment: float
) -> None:
    """From the moment at which rows leave for the disk."""
    process = start(*SPILLED, str(tmp_path))
    while not spilled(process, tmp_path) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(moment)
    stopped = process.poll() is None
    process.send_signal(sign)
    code = finish(process).code
    assert code == (-sign if sign == signal.SIGKILL else 130) or not stopped
    visible = [path for path in tmp_path.iterdir() if not path.name.startswith(STAGING)]
    assert all(len(store.load(path).layer_records) == DEPTH + 1 for path in visible)
    finish(start(*SPILLED, str(tmp_path)))
    assert list(tmp_path.glob(".*")) == []
    assert len(store.load(store.run_folders(tmp_path)[-1]).layer_records) == DEPTH + 1


def spilled(process: subprocess.Popen[str], folder: Path) -> bool:
    """Whether the process has a file without a name in the folder."""
    try:
        targets = [os.readlink(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]  # noqa: PTH115
    except OSError:
        return False
    return any(str(folder) in target and "deleted" in target for target in targets)


PEAK = """
import resource, sys
import torch
torch.set_num_threads(1)
from gradflow.cli.app import run_app
run_app(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_depth(tmp_path: Path) -> None:
    def peak(depth: int) -> int:
        words = [*SPILLED, str(tmp_path), "--depth", str(depth)]
        command = [sys.executable, "-W", "ignore", "-c", PEAK, *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout)

    shallow, deep = peak(500), peak(5000)
    assert deep - shallow < 10 << 10  # KiB; all graphs and parameters would take 100 MiB
