"""The command line, run within this process for speed, or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradflow.cli.app import run_app

PROGRAM = str(Path(sys.executable).with_name("gradflow"))
# A stack and options that take no time.
TINY = (
    *("--depth", "2", "--width", "8", "--heads", "2", "--seq-len", "3", "--batch-size", "2"),
    *("--repeats", "1", "--time-budget", "1e-9", "--device", "cpu"),
)


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr."""
        (line,) = self.err.splitlines()
        return line


class CommandLine:
    """Runs commands here; runs are stored in `out`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], out: Path) -> None:
        self._capsys, self.out = capsys, out

    def __call__(self, *words: str) -> Outcome:
        self._capsys.readouterr()
        code = run_app(list(words))
        return Outcome(code, *self._capsys.readouterr())

    def run(self, *words: str) -> Outcome:
        """`gradflow run` of a tiny stack."""
        return self("run", *TINY, "--out", str(self.out), *words)


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """A real process with one thread, its pipes open."""
    pipe = subprocess.PIPE
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([PROGRAM, *words], stdout=pipe, stderr=pipe, text=True, env=env)


def finish(process: subprocess.Popen[str]) -> Outcome:
    """What a started process comes to."""
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)
