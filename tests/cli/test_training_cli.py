"""`--steps` on the command line: one run, a grid, a breakdown, an interruption."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from commandline import CommandLine

from gradflow.judging.training_outcome import summary_of
from gradflow.runs import store
from gradflow.training import steps
from gradflow.training.steps import TaskNetwork

TRAIN = ("--steps", "3", "--every", "2", "--lr", "0.01", "--no-timing")
GRID = ("--block", "mlp", "--width", "16", "--batch-size", "4", "--depth", "1", "--no-timing")


@pytest.fixture
def gradflow(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capsys, tmp_path)


def test_a_run_trains_says_so_and_stores_its_steps(gradflow: CommandLine) -> None:
    found = gradflow.run(*TRAIN, "--width", "16", "--seeds", "2")
    assert (found.code, found.err) == (0, "")
    *shown, _ = found.out.splitlines()  # the last line is a path
    assert max(map(len, shown)) <= 80
    words = " ".join(found.out.split())
    assert "trained: next token of a Markov source of 10 symbols, causal attention" in words
    assert "3 steps of adamw, lr 0.01" in words
    (folder,) = store.run_folders(gradflow.out)
    run = store.load(folder)
    assert run.spec.causal
    assert [(row.seed, row.step) for row in run.step_records] == [
        (seed, step) for seed in (0, 1) for step in range(4)
    ]
    assert {row.step for row in run.layer_records} == {0, 2, 3}
    told = summary_of(run.step_records)
    assert {name: getattr(run.summary, name) for name in told} == told
    assert run.summary.outcome
    assert gradflow("report", "--results", str(gradflow.out)).code == 0
    assert "Training " in (gradflow.out / "report.html").read_text()


def test_a_breakdown_is_a_finding_with_exit_code_0(gradflow: CommandLine) -> None:
    words = ("--block", "mlp", "--width", "16", "--optimizer", "sgd", "--lr", "1e30")
    sizes = ("--depth", "2", "--steps", "9", "--no-timing", "--out", str(gradflow.out))
    found = gradflow("run", *words, *sizes, "--json", "-")
    assert (found.code, found.err) == (0, "")
    summary = json.loads(found.out)["summary"]
    assert summary["outcome"] == "diverged"
    assert summary["final_loss"] is None
    (folder,) = store.run_folders(gradflow.out)
    assert len(store.load(folder).step_records) == summary["outcome_step"] + 1


def test_a_grid_of_steps_and_rates(gradflow: CommandLine) -> None:
    lists = ("--steps", "0,2", "--lr", "0.01,0.1", "--executor", "serial", "--device", "cpu")
    words = ("compare", *GRID, *lists, "--out", str(gradflow.out))
    found = gradflow(*words)
    assert found.code == 0
    assert "--lr does not apply to --steps 0" in found.err
    assert len(store.run_folders(gradflow.out)) == 3
    assert "stuck after 2 steps" in found.out or "learning after 2 steps" in found.out
    again = gradflow(*words, "--csv", "-")
    assert "3 of 3 cells stored already" in again.err
    rows = list(csv.DictReader(io.StringIO(again.out)))
    assert {(row["steps"], row["lr"]) for row in rows} == {("0", ""), ("2", "0.01"), ("2", "0.1")}
    assert all(bool(row["final_loss"]) == (row["steps"] == "2") for row in rows)


def test_an_interrupted_training_leaves_nothing(
    gradflow: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    class Interrupted(TaskNetwork):
        def forward(self, *batch: object) -> object:  # type: ignore[override]
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return super().forward(*batch)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "TaskNetwork", Interrupted)
    found = gradflow.run(*TRAIN, "--width", "16")
    assert found.code == 130
    assert calls == 3
    assert list(gradflow.out.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("--lr", "1"), "--lr applies to training"),
        (("--steps", "2", "--loss", "mse"), "training minimises the cross-entropy"),
        (("--steps", "2", "--like", "gpt2"), "the Markov source has at most 4,096 symbols"),
        (("--steps", "-1"), "--steps is a whole number of at least 0"),
        (("--steps", "2", "--optimizer", "adam"), "--optimizer is one of the known names"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    gradflow: CommandLine, words: tuple[str, ...], rule: str
) -> None:
    found = gradflow.run(*words)
    assert found.code == 2
    assert rule in found.complaint
    assert list(gradflow.out.iterdir()) == []


# What shortcuts do for optimisation: one rate and one number of steps for all, nothing is tuned.

DESIGNS = {
    "pre-norm": ("--norm", "pre"),
    "post-norm": ("--norm", "post"),
    "plain": ("--plain", "--norm", "none"),
    "plain, pre-norm": ("--plain", "--norm", "pre"),
}


def outcome_of(gradflow: CommandLine, *words: str) -> str:
    fixed = ("--steps", "150", "--every", "150", "--lr", "0.003", "--no-timing", "--json", "-")
    found = gradflow("run", *fixed, *words, "--device", "cpu", "--out", str(gradflow.out))
    return str(json.loads(found.out)["summary"]["outcome"])


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_of_twelve_blocks_without_warmup_pre_norm_alone_solves_its_task(
    gradflow: CommandLine, design: str
) -> None:
    small = ("--depth", "12", "--width", "32", "--seq-len", "16")
    outcome = outcome_of(gradflow, *small, *DESIGNS[design])
    assert outcome == ("converged" if design == "pre-norm" else "stuck")


@pytest.mark.slow
@pytest.mark.parametrize("design", [("--residual", "--norm", "pre"), ("--plain", "--norm", "none")])
def test_fifty_dense_layers_learn_with_shortcuts_and_stay_at_chance_without(
    gradflow: CommandLine, design: tuple[str, ...]
) -> None:
    outcome = outcome_of(gradflow, "--block", "mlp", "--depth", "50", *design)
    assert outcome == ("converged" if "--residual" in design else "stuck")
