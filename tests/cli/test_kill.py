"""A run that is killed at a random moment leaves either nothing to be seen or a whole run."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commandline import TINY, finish, start

from gradflow.runs import store

pytestmark = pytest.mark.slow

REPEATS = 50
# From before the first run is stored to after several.
LATEST_S = 0.6

# Loads all once; forks a child that measures and stores runs without end, for each line it reads.
NURSERY = """
import os, sys
import torch
from gradflow.cli.app import run_app
torch.set_num_threads(1)
run_app(sys.argv[1:])  # what is imported on the way is here from now on
print("ready", flush=True)
for _ in sys.stdin:
    child = os.fork()
    if not child:
        while run_app(sys.argv[1:]) == 0:
            pass
        os._exit(1)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@contextmanager
def nursery(*words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", "-c", NURSERY, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        yield parent
        assert parent.stdin is not None
        parent.stdin.close()


def child_of(parent: subprocess.Popen[str]) -> int:
    """A new child that runs without end."""
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write("go\n")
    parent.stdin.flush()
    ready, _, _ = select.select([parent.stdout], [], [], 30)
    assert ready
    return int(parent.stdout.readline())


def assert_all_complete(out: Path) -> int:
    """How many runs can be seen; every one is whole, and nothing else can be seen."""
    visible = [path for path in out.iterdir() if not path.name.startswith(".")]
    for path in visible:
        run = store.load(path)
        assert len(run.layers) == run.spec.depth * run.spec.units_per_block + 1
    return len(visible)


def debris(out: Path) -> list[Path]:
    return list(out.glob(".*"))


def test_killed_fifty_times_every_folder_is_complete(tmp_path: Path) -> None:
    words = ("run", *TINY, "--no-timing", "--quiet", "--out", str(tmp_path))
    chance = random.Random(0)
    with nursery(*words) as parent:
        for _ in range(REPEATS):
            child = child_of(parent)
            time.sleep(chance.uniform(0, LATEST_S))
            os.kill(child, signal.SIGKILL)
            while Path(f"/proc/{child}").exists():
                time.sleep(0.001)
            assert_all_complete(tmp_path)
            assert len(debris(tmp_path)) <= 1  # the next run has removed the last one's
    assert assert_all_complete(tmp_path) > 10  # else every moment came before the first run
    finish(start(*words))
    assert not debris(tmp_path)


@pytest.mark.parametrize("moment", [0.05, 0.3, 1.0, 1.5, 2.0, 2.5])
def test_a_real_process_killed_at_any_time_leaves_whole_runs(tmp_path: Path, moment: float) -> None:
    process = start("run", *TINY, "--quiet", "--out", str(tmp_path))
    time.sleep(moment)
    process.kill()
    assert finish(process).code in (0, -signal.SIGKILL)
    assert_all_complete(tmp_path)
    assert finish(start("run", *TINY, "--quiet", "--out", str(tmp_path))).code == 0
    assert assert_all_complete(tmp_path) >= 1
    assert not debris(tmp_path)


def test_two_processes_in_one_place_do_not_disturb_each_other(tmp_path: Path) -> None:
    words = ("run", *TINY, "--no-timing", "--quiet", "--out", str(tmp_path))
    processes = [start(*words) for _ in range(4)]
    assert [finish(process).code for process in processes] == [0] * 4
    assert assert_all_complete(tmp_path) == 4
    assert not debris(tmp_path)
