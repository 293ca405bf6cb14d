"""The Ray executor on a cluster of two nodes on this machine: nodes and workers may be lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import CommandLine
from executor_cells import NO_GPU, TOO_LARGE, in_bytes, tiny

from gradflow.engine.environment import without_path
from gradflow.errors import UsageError
from gradflow.specs.grid import Cell
from gradflow.sweeps.cells import CellResult, Serial
from gradflow.sweeps.cluster import Ray

pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    # Ray's own, of which nobody here can do anything.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
# Cells that take a while, so that something can happen to them.
SLOW = [tiny(depth, width=512, batch_size=64) for depth in range(300, 308)]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=SMALL)
    made.add_node(num_cpus=1, object_store_memory=SMALL["object_store_memory"])
    made.wait_for_nodes()
    yield made
    ray.shutdown()  # what a test that failed left connected
    made.shutdown()


def measured(cluster: Any, cells: Sequence[Cell]) -> dict[Cell, CellResult]:
    return {outcome.cell: outcome for outcome in Ray(cluster.address).outcomes(cells)}


def test_the_same_bytes_as_here_and_errors_in_one_line(cluster: Any, tmp_path: Path) -> None:
    cells = [tiny(), tiny(3, block="transformer", heads=2, seq_len=4, batch_size=2)]
    found = measured(cluster, [*cells, TOO_LARGE])
    for here in Serial().outcomes(cells):
        assert in_bytes(found[here.cell], tmp_path) == in_bytes(here, tmp_path)
    assert found[TOO_LARGE].error.startswith("out of memory")
    run = found[cells[0]].run
    assert run
    assert run.environment["contended"]
    assert run.environment["argv"] == [without_path(word) for word in sys.argv]


def test_a_device_that_the_cluster_lacks_is_refused_and_not_waited_for(cluster: Any) -> None:
    with pytest.raises(UsageError, match="--device cuda needs a GPU in the cluster"):
        Ray(cluster.address).environment(NO_GPU)
    with pytest.raises(UsageError, match="--device cuda needs a GPU in the cluster"):
        measured(cluster, [tiny(), NO_GPU])


def busy_workers() -> list[psutil.Process]:
    """Ray names a worker by the task that it is at."""
    return [p for p in psutil.process_iter() if p.name().startswith("ray::_on_cluster")]


def wait_until_busy(workers: int) -> None:
    """Until so many workers are at a cell."""
    deadline = time.monotonic() + 30
    while len(busy_workers()) < workers:
        assert time.monotonic() < deadline, f"fewer than {workers} workers are at work"
        time.sleep(0.01)


def test_a_node_that_is_lost_in_mid_sweep_loses_nothing(cluster: Any) -> None:
    sweep = Ray(cluster.address).outcomes(SLOW)
    found = [next(sweep)]
    wait_until_busy(2)  # a worker between two cells has no task to be named by
    cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
    found += sweep
    assert {outcome.cell for outcome in found} == set(SLOW)
    assert [outcome.error for outcome in found] == [""] * len(SLOW)


def test_a_worker_that_dies_is_tried_again(cluster: Any) -> None:
    sweep = Ray(cluster.address).outcomes(SLOW)
    found = [next(sweep)]
    for worker in busy_workers():
        os.kill(worker.pid, signal.SIGKILL)
    found += sweep
    assert [outcome.error for outcome in found] == [""] * len(SLOW)


GRID = (
    *("--block", "mlp", "--width", "8", "--batch-size", "4", "--depth", "2,3,4"),
    *("--repeats", "2", "--time-budget", "1e-9", "--executor", "ray"),
)


def test_compare_on_a_cluster(
    cluster: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gradflow = CommandLine(capfd, tmp_path)
    words = ("compare", *GRID, "--address", cluster.address, "--out", str(tmp_path))
    first = gradflow(*words)
    assert (first.code, first.err) == (0, "")
    assert "contended: timed beside other work" in " ".join(first.out.split())
    again = gradflow(*words, "--json=-")
    assert again.complaint == "3 of 3 cells stored already (--fresh measures anew)"
    rows = json.loads(again.out)["rows"]
    assert [row["time_ratio"] for row in rows] == [None] * 3
    assert all(row["forward_s_per_layer"] > 0 for row in rows)
    stored = next(tmp_path.glob("2*")) / "run.json"
    assert "raylet" not in stored.read_text()


def test_an_address_where_nothing_answers_is_one_line() -> None:
    with pytest.raises(UsageError, match="--address is that of a running Ray cluster") as caught:
        list(Ray("127.0.0.1:1").outcomes([tiny()]))
    assert "\n" not in str(caught.value)


def test_a_cluster_of_its_own_is_started_and_ended() -> None:
    (outcome,) = Ray().outcomes([tiny()])
    assert outcome.run
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    assert not [name for name in names if name.startswith(("ray", "gcs_server"))]
