"""What an option says that it decides is heard everywhere: keys, names, gates, tables, sweeps."""

from __future__ import annotations

import csv
import io
from dataclasses import fields, replace
from pathlib import Path

import pytest
from option_values import another
from records import ENVIRONMENT, layer_rows, run_of, spec_of

from gradflow.errors import BaselineError
from gradflow.judging.comparison import compare_runs
from gradflow.judging.gate import against_baseline
from gradflow.runs.naming import names, shared
from gradflow.runs.records import Run
from gradflow.runs.store import save
from gradflow.showing.formats import comparison_csv
from gradflow.specs.fields import deciding
from gradflow.specs.grid import Cell
from gradflow.specs.model_spec import ModelRequest, ModelSpec
from gradflow.specs.run_options import TRAINING_DEFAULTS, RunOptions
from gradflow.specs.stack import StackSpec, run_key
from gradflow.sweeps.sweep import _same_numbers


def two_runs(name: str) -> tuple[Run, Run]:
    """Runs that differ in this option of `RunOptions` alone."""
    options = RunOptions(steps=5 if name in TRAINING_DEFAULTS else 0)
    other = replace(options, **{name: another(name, getattr(options, name))})
    rows = [row for seed in (0, 1, 2) for row in layer_rows(spec_of(), [0.0] * 4, seed)]
    made = [run_of(spec_of(), rows, options=each) for each in (options, other)]
    return made[0], made[1]


def model_run() -> Run:
    request = ModelRequest(model="hf:gpt2", depth=2)
    spec = ModelSpec(
        model="GPT2Model",
        units="h.0 h.1",
        kinds="Block Block",
        shape="2x7x32",
        dtype="float32",
        parameters=9,
        request=request,
    )
    stack = spec_of(depth=2)
    return replace(run_of(stack, list(layer_rows(stack, [0.0] * 3))), spec=spec)


@pytest.mark.parametrize("name", deciding(RunOptions, "numbers"))
def test_an_option_that_decides_numbers_is_heard_everywhere(name: str) -> None:
    run, other = two_runs(name)
    assert run_key(run.spec, run.options) != run_key(other.spec, other.options)
    first, second = names([run, other])
    assert first.design != second.design
    with pytest.raises(BaselineError, match=f"another network: {name} "):
        against_baseline(run, other, 0.1)
    rows = list(csv.DictReader(io.StringIO(comparison_csv(compare_runs([run, other], run)))))
    assert rows[0][name] != rows[1][name]
    cell = Cell(spec_of(), other.options)
    assert _same_numbers(other, cell, ENVIRONMENT)
    assert not _same_numbers(run, cell, ENVIRONMENT)


@pytest.mark.parametrize("name", deciding(RunOptions, "verdict"))
def test_a_run_judged_otherwise_has_the_same_numbers_and_stands_for_no_cell(name: str) -> None:
    run, other = two_runs(name)
    assert run_key(run.spec, run.options) == run_key(other.spec, other.options)
    assert not _same_numbers(run, Cell(spec_of(), other.options), ENVIRONMENT)


@pytest.mark.parametrize("name", [f.name for f in fields(RunOptions)])
def test_every_option_of_a_run_says_what_it_decides(name: str) -> None:
    assert name in deciding(RunOptions, "numbers", "verdict", "times", "memory", "place")


def test_keys_are_those_of_the_runs_that_are_stored() -> None:
    """Computed once by the code that named the folders."""
    assert run_key(spec_of(), RunOptions()) == "8a1df278"
    assert run_key(spec_of(), RunOptions(steps=5, lr=0.01)) == "ef7ba206"
    assert run_key(StackSpec(), RunOptions(compile=True, seeds=3, raw_range=True)) == "71d53a53"


def test_runs_that_share_their_loss_and_not_their_classes_have_words() -> None:
    assert "depth 3" in shared([run_of(spec_of(classes=n)) for n in (3, 4)])


def test_a_stack_beside_a_model_has_words_names_and_a_table(tmp_path: Path) -> None:
    stack, model = run_of(), model_run()
    for runs in ([stack, model], [model, stack]):
        assert len({name.run for name in names(runs)}) == 2
        assert "seed 0" in shared(runs)
        saved = [save(run, tmp_path) for run in runs]
        text = comparison_csv(compare_runs(saved, saved[0]))
        rows = list(csv.DictReader(io.StringIO(text)))
        assert sorted((row["model"], row["block"]) for row in rows) == [
            ("", "mlp"),
            ("hf:gpt2", ""),
        ]


def test_a_stack_is_no_baseline_of_a_model() -> None:
    with pytest.raises(BaselineError, match=r"another network: .*block mlp there, None here"):
        against_baseline(model_run(), run_of(), 0.1)
