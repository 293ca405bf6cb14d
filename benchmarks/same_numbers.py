"""Whether a change of the code has changed a number: rows of 40 stacks, byte by byte.

Checks a revision out into a temporary folder, measures 40 varied stacks with the code there and
with the code here, each in a process of its own on this machine, and compares the files layers.csv
and params.csv of the runs.

    python benchmarks/same_numbers.py --against REVISION
"""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from side_by_side import write_table

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("layers.csv", "params.csv")
SMALL = "--width 16 --seq-len 8 --batch-size 4"
FLAT = "--width 16 --batch-size 8"
IMAGES = "--block resnet --width 8 --image-size 8 --batch-size 4"
# What `gradflow run` is called with.
STACKS = (
    f"--depth 4 {SMALL}",
    f"--depth 4 {SMALL} --seeds 3 --norm post",
    f"--depth 4 {SMALL} --norm none --seed 7",
    f"--depth 4 {SMALL} --plain --norm none",
    f"--depth 5 {SMALL} --seeds 5",
    f"--depth 5 {SMALL} --seeds 5 --no-together",
    f"--depth 5 {SMALL} --seeds 5 --together --keep sqrt",
    f"--depth 40 {FLAT} --block mlp --plain --norm none --gain 0.1",
    f"--depth 40 {FLAT} --block mlp --plain --norm none --gain 3 --raw-range",
    f"--depth 90 {FLAT} --block mlp --keep boundaries --rebuild",
    f"--depth 90 {FLAT} --block mlp --keep sqrt",
    f"--depth 2100 {FLAT} --block mlp --norm none",
    f"--depth 6 {FLAT} --block mlp --norm-kind batchnorm",
    f"--depth 6 {FLAT} --block mlp --loss mse --init xavier",
    f"--depth 6 {FLAT} --block mlp --loss ce --init orthogonal --seeds 4",
    f"--depth 6 {FLAT} --block mlp --activation tanh --weight-var 1.2 --bias-var 0.1",
    f"--depth 3 {IMAGES}",
    f"--depth 3 {IMAGES} --block conv --seeds 2",
    f"--depth 4 {SMALL} --block attention --causal --qk-norm",
    f"--depth 4 {SMALL} --block ffn --gated --bias none --ffn-width 24",
    f"--depth 4 {SMALL} --dtype bfloat16 --seeds 2",
    f"--depth 4 {SMALL} --dtype float16 --gain 0.5",
    f"--depth 4 {SMALL} --dtype float64 --norm-kind rmsnorm --rope 100",
    f"--depth 4 {SMALL} --norm-kind dyt --kv-heads 2 --heads 4",
    f"--depth 3 {SMALL} --steps 5 --every 2 --classes 8",
    f"--depth 3 {FLAT} --block mlp --steps 4 --optimizer sgd --lr 0.1 --warmup 2 --seeds 2",
    f"--depth 4 {FLAT} --block mlp --scheme highway",
    f"--depth 4 {SMALL} --scheme deepnorm",
    f"--depth 4 {SMALL} --scheme admin",
    f"--depth 4 {SMALL} --scheme ngpt",
    f"--depth 4 {SMALL} --scheme mhc-uniform --seeds 4",
    f"--depth 4 {SMALL} --scheme mix-ln",
    f"--depth 4 {SMALL} --scheme value-residual",
    f"--depth 4 {SMALL} --scheme siamesenorm",
    f"--depth 4 {SMALL} --scheme hyper-connections",
    f"--depth 4 {SMALL} --scheme rezero --loss ce",
    f"--depth 3 {IMAGES} --scheme stochastic-depth --seeds 2",
    f"--depth 3 {IMAGES} --scheme fixup",
    "--like llama-7b --depth 2 --width 32 --heads 4 --kv-heads 4 --ffn-width 48 --seq-len 8",
    "--like gpt2 --depth 2 --width 24 --heads 4 --seq-len 8 --batch-size 2",
)


def measure_all(out: Path) -> None:
    """Measure every stack with the code that is imported; run i goes into the folder i."""
    import torch  # noqa: F401  # once, for all the processes below

    for i, words in enumerate(STACKS):
        sys.argv = ["gradflow", "run", *words.split(), "--no-timing", "--quiet"]
        sys.argv += ["--device", "cpu", "--out", str(out / str(i))]
        child = os.fork()  # the command ends its process
        if not child:
            runpy.run_module("gradflow", run_name="__main__")
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"gradflow run {words} ended with {status}")


def files_of(code: Path, out: Path) -> list[dict[str, bytes]]:
    """The tables of every stack, measured with the code in a folder."""
    command = [sys.executable, __file__, "--measure", str(out)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(code)}, cwd=out, check=True)
    runs = [next((out / str(i)).iterdir()) for i in range(len(STACKS))]
    return [{name: (run / name).read_bytes() for name in TABLES} for run in runs]


def verdict_of(ours: dict[str, bytes], theirs: dict[str, bytes]) -> str:
    """What the comparison of one stack comes to."""
    differing = [name for name in TABLES if ours[name] != theirs[name]]
    return f"{' and '.join(differing)} differ" if differing else "same bytes"


def compare(revision: str) -> bool:
    """Measure with both and write the table; returns whether all bytes are the same."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "code"
        git("worktree", "add", "--detach", str(there), revision)
        try:
            outs = [Path(folder) / name for name in ("ours", "theirs")]
            for out in outs:
                out.mkdir()
            ours, theirs = (
                files_of(code, out) for code, out in zip((ROOT, there), outs, strict=True)
            )
        finally:
            git("worktree", "remove", "--force", str(there))
    rows = [
        (words, str(sum(map(len, mine.values()))), digest(mine), verdict_of(mine, other))
        for words, mine, other in zip(STACKS, ours, theirs, strict=True)
    ]
    same = sum(row[-1] == "same bytes" for row in rows)
    write(revision, same, rows)
    return same == len(rows)


def git(*words: str) -> None:
    """Run git in this repository."""
    subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True)


def digest(files: dict[str, bytes]) -> str:
    """The first 12 digits of the SHA-256 of both files."""
    return hashlib.sha256(b"".join(files.values())).hexdigest()[:12]


def write(revision: str, same: int, rows: list[tuple[str, ...]]) -> None:
    """The table under results/benchmarks."""
    title = f"The numbers of {len(rows)} stacks beside those of {revision}"
    note = (
        f"{same} of {len(rows)} have the same bytes in layers.csv and params.csv. Both revisions "
        "measured on the machine below, each in a process of its own, with --no-timing on the CPU."
    )
    headings = ("gradflow run", "bytes", "SHA-256 here", "verdict")
    write_table("same_numbers", title, headings, rows, note)


def main(against: str = "", measure: str = "") -> None:
    """Compare with a revision of git; or measure into a folder, with the code that is imported."""
    if measure:
        measure_all(Path(measure))
    elif not against or not compare(against):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
