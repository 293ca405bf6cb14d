"""A sweep of 40 cells that is killed in the middle, parent or workers, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import PROGRAM, Outcome, finish

from gradflow.runs import store
from gradflow.sweeps.sweep import SHELF_PREFIX

pytestmark = pytest.mark.slow

DEPTHS = range(160, 200)
GRID = (
    *("--block", "mlp", "--width", "64", "--batch-size", "8", "--device", "cpu"),
    *("--depth", ",".join(map(str, DEPTHS)), "--repeats", "2", "--time-budget", "1e-9"),
    *("--executor", "processes", "--workers", "2", "--json", "-"),
)
PATIENCE = 120


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell starts it.

    With one thread: those of two sweeps would wait for one another on two cores.
    """
    pipe = subprocess.PIPE
    command = [PROGRAM, "compare", *GRID, "--out", str(out), *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=env
    )


def wait_until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def on_shelf(out: Path) -> list[Path]:
    return sorted(out.glob(f"{SHELF_PREFIX}*/cell-*"))


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def durations(folders: list[Path]) -> dict[int, float]:
    """Seconds that each cell took, by its depth: no two measurements have the same."""
    runs = [store.load(folder) for folder in folders]
    return {run.spec.depth: run.environment["duration_s"] for run in runs}


def kill_parent(process: subprocess.Popen[str]) -> None:
    family = [psutil.Process(process.pid), *workers(process)]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert not alive, "workers outlived their parent by more than a cell"


def is_complete(found: Outcome, out: Path) -> None:
    assert found.code == 0, found.err
    rows = json.loads(found.out)["rows"]
    assert sorted(row["depth"] for row in rows) == list(DEPTHS)
    assert all(row["forward_s_per_layer"] > 0 for row in rows)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("cells", "phase"), [(8, "measuring"), (len(DEPTHS), "timing")])
def test_the_parent_is_killed_and_nothing_is_measured_twice(
    tmp_path: Path, cells: int, phase: str
) -> None:
    sweep = start(tmp_path)
    wait_until(lambda: len(on_shelf(tmp_path)) >= cells)
    kill_parent(sweep)
    kept = durations(on_shelf(tmp_path))
    assert len(kept) >= cells
    assert (len(kept) < len(DEPTHS)) == (phase == "measuring")

    found = finish(start(tmp_path))
    is_complete(found, tmp_path)
    assert found.complaint == f"{len(kept)} of 40 cells stored already but for their times"
    runs = store.run_folders(tmp_path)
    assert len(runs) == len(DEPTHS)
    after = durations(runs)
    assert {depth: after[depth] for depth in kept} == kept

    again = finish(start(tmp_path))
    is_complete(again, tmp_path)
    assert again.complaint == "40 of 40 cells stored already (--fresh measures anew)"
    assert store.run_folders(tmp_path) == runs


def test_results_without_times_are_kept_at_their_place(tmp_path: Path) -> None:
    sweep = start(tmp_path, "--no-timing")
    wait_until(lambda: len(store.run_folders(tmp_path)) >= 8)
    kill_parent(sweep)
    kept = set(store.run_folders(tmp_path))
    found = finish(start(tmp_path, "--no-timing"))
    assert found.complaint.startswith(f"{len(kept)} of 40 cells stored already")
    assert len(json.loads(found.out)["rows"]) == len(DEPTHS)
    assert kept < set(store.run_folders(tmp_path))
    assert len(store.run_folders(tmp_path)) == len(DEPTHS)


def test_workers_are_killed_and_the_table_is_complete(tmp_path: Path) -> None:
    sweep = start(tmp_path)
    for cells in (4, 12):
        wait_until(lambda wanted=cells: len(on_shelf(tmp_path)) >= wanted)
        for worker in workers(sweep)[:1]:
            worker.kill()
    found = finish(sweep)
    is_complete(found, tmp_path)
    assert found.err == ""


MOMENTS: dict[str, Callable[[Path, subprocess.Popen[str]], Any]] = {
    "loading": lambda out, _: list(out.glob(f"{SHELF_PREFIX}*")),
    "starting workers": lambda _, sweep: workers(sweep),
    "measuring": lambda out, _: len(on_shelf(out)) >= 4,
    "timing": lambda out, _: len(on_shelf(out)) == len(DEPTHS),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_all_with_one_line(tmp_path: Path, moment: str) -> None:
    sweep = start(tmp_path)
    wait_until(lambda: MOMENTS[moment](tmp_path, sweep))
    family = psutil.Process(sweep.pid).children(recursive=True)
    os.killpg(sweep.pid, signal.SIGINT)
    found = finish(sweep)
    assert (found.code, found.out) == (130, "")
    assert found.complaint == "gradflow: interrupted; nothing half-written remains"
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert not alive
    is_complete(finish(start(tmp_path)), tmp_path)


def test_two_sweeps_in_one_place_do_not_disturb_each_other(tmp_path: Path) -> None:
    sweeps = [start(tmp_path) for _ in range(2)]
    found = [finish(sweep) for sweep in sweeps]
    for outcome in found:
        assert outcome.code == 0, outcome.err
        assert len(json.loads(outcome.out)["rows"]) == len(DEPTHS)
    is_complete(finish(start(tmp_path)), tmp_path)
