"""`--model`: a user's own model, from the command line to its numbers."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
import user_models
from clocks import FakeClock
from commandline import CommandLine
from torch import Tensor, nn
from zoo import WIDTH, Residual

from gradflow.errors import UsageError
from gradflow.measuring.models.run import measure_model
from gradflow.runs import store
from gradflow.runs.records import Run
from gradflow.specs.model_spec import ModelRequest, ModelSpec
from gradflow.specs.run_options import RunOptions

SIZES = {"input": "5,6", "dtype": "float64"}
OPTIONS = RunOptions(timing=False, raw_range=True, device="cpu")


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """In a folder with the user's module, like `python -m`."""
    monkeypatch.chdir(Path(user_models.__file__).parent)
    return CommandLine(capsys, tmp_path)


def request_for(thing: str, **values: Any) -> ModelRequest:
    return ModelRequest(model=f"user_models:{thing}", **SIZES | values)


def measured(thing: str, options: RunOptions = OPTIONS, **values: Any) -> Run:
    return measure_model(request_for(thing, **values), options)


def logs(run: Run) -> list[float]:
    return [math.nan if r.grad_norm is None else r.grad_norm for r in run.layer_records]


def half_frozen() -> nn.Module:
    """Of four layers two have a backward pass, and one of these an input that takes a gradient."""
    model = nn.Sequential(*(Residual() for _ in range(4)))
    model[:2].requires_grad_(False)
    return model


def test_layers_without_a_backward_pass_have_no_times_and_this_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(user_models, "half_frozen", half_frozen, raising=False)
    options = RunOptions(device="cpu", repeats=1, time_budget=1e-9)
    request = ModelRequest(model="user_models:half_frozen", input=f"5,{WIDTH}")
    run = measure_model(request, options, clock=FakeClock([1.0]))
    assert [row.layer for row in run.layer_records if row.forward_s is not None] == [4]
    assert any(
        "1 of 4 layers, that have a backward pass; totals are theirs" in line
        for line in run.warnings
    )
    assert run.summary.forward_s == run.summary.forward_s_per_layer == 1.0  # of the fake clock


def by_hand(seed: int, loss: str) -> tuple[list[float], float]:
    """Norms at the input of the first layer and at every output, by autograd alone."""
    torch.manual_seed(seed)
    model = user_models.Net().double()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).double()
    streams = [model.entry(x)]
    for layer in model.layers:
        streams.append(layer(streams[-1]))
    y = model.head(streams[-1])
    source = torch.Generator().manual_seed(seed)
    values = {
        "cotangent": lambda: projected(y, source),
        "mse": lambda: (y - torch.randn(y.shape, generator=source)).square().mean(),
        "ce": lambda: F.cross_entropy(y, torch.randint(4, (5,), generator=source)),
        "own": lambda: y.square().sum(),
    }
    value = values[loss]()
    gradients = torch.autograd.grad(value, streams)
    return [float(g.norm()) for g in gradients], value.item()


def projected(y: Tensor, source: torch.Generator) -> Tensor:
    c = torch.randn(y.shape, generator=source, dtype=torch.float64)
    return (c / c.norm() * y).sum()


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cotangent", "mse", "ce", "own"])
def test_norms_are_those_of_autograd(loss: str) -> None:
    run = measured("WithLoss" if loss == "own" else "Net", loss=loss)
    want, value = by_hand(0, loss)
    assert logs(run) == pytest.approx(want, rel=1e-12)
    assert run.summary.loss == (None if loss == "cotangent" else pytest.approx(value, rel=1e-12))


def test_every_seed_has_weights_and_input_of_its_own() -> None:
    run = measured("Net", replace(OPTIONS, seed=3, seeds=2))
    want = [*by_hand(3, "cotangent")[0], *by_hand(4, "cotangent")[0]]
    assert logs(run) == pytest.approx(want, rel=1e-12)
    assert [row.seed for row in run.layer_records] == [3] * 4 + [4] * 4
    assert want[0] != pytest.approx(want[4])


def test_seeds_reach_what_numpy_and_python_draw() -> None:
    first, again = measured("drawn_by_others"), measured("drawn_by_others")
    assert logs(first) == logs(again)
    assert logs(first) != logs(measured("drawn_by_others", replace(OPTIONS, seed=1)))


def test_sizes_and_settings_are_arguments() -> None:
    run = measured("Net", depth=5, width=8, set="classes=9")
    assert run.spec.depth == 5
    assert isinstance(run.spec, ModelSpec)
    assert run.spec.shape == "5x8"
    sizes = {row.param: row.shape for row in run.param_records if row.layer == 5}
    assert sizes == {"f.0.weight": "8x8", "f.0.bias": "8"}


def test_layers_may_be_named() -> None:
    run = measured("Net", layers="layers.0 head")
    assert [row.unit for row in run.layer_records] == ["input", "layers.0", "head"]


def test_token_ids_where_the_model_begins_with_an_embedding() -> None:
    run = measured("language", input="3,4", loss="ce")
    assert isinstance(run.spec, ModelSpec)
    assert run.spec.shape == "3x4x8"


@pytest.mark.parametrize("name", ["batches", "named"])
def test_batches_of_the_users_own(name: str) -> None:
    run = measured("Net", input=f"user_models:{name}")
    torch.manual_seed(0)
    model = user_models.Net().double()
    y = model.entry(torch.ones(2, 6).double())
    assert run.layer_records[0].act_rms == pytest.approx(y.square().mean().sqrt().item())


def test_a_pair_is_input_and_label() -> None:
    run = measured("Net", input="user_models:pairs", loss="ce")
    torch.manual_seed(0)
    x, labels = next(user_models.pairs())
    want = F.cross_entropy(user_models.Net().double()(x.double()), labels)
    assert run.summary.loss == pytest.approx(want.item(), rel=1e-12)


def test_a_model_that_exists_is_left_as_it_was() -> None:
    before = [p.clone() for p in user_models.MODEL.parameters()]
    measured("MODEL", dtype="float32")
    assert all(map(torch.equal, before, user_models.MODEL.parameters()))
    assert all(p.grad is None for p in user_models.MODEL.parameters())
    assert not user_models.MODEL.entry._forward_hooks


def test_an_instance_begins_anew_with_every_seed() -> None:
    options = RunOptions(steps=3, seeds=2, every=3, lr=0.1, timing=False, raw_range=True)
    run = measured("MODEL", options, input="user_models:uneven", loss="ce", dtype="float32")
    first = [row.loss for row in run.step_records if row.step == 0]
    assert first[0] == first[1]


def test_complex_numbers_stay_complex() -> None:
    """In float64: nothing but the turn tells it from the net without."""
    run = measured("Turning")
    torch.manual_seed(0)
    model = user_models.Turning()._apply(user_models.wide)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()
    pairs = torch.view_as_complex(x.unflatten(-1, (3, 2)))
    y = model.entry(torch.view_as_real(pairs * model.turn).flatten(-2))
    assert model.turn.is_complex()
    assert run.layer_records[0].act_rms == pytest.approx(y.square().mean().sqrt().item())


def test_lazy_parameters_are_there_when_they_are_measured() -> None:
    run = measured("lazy")
    assert [row.shape for row in run.param_records if row.param == "0.weight"] == ["6x6"] * 3
    assert all(row.grad_norm for row in run.param_records)


def test_the_world_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for("changes_the_world")
    monkeypatch.chdir(tmp_path)
    assert measure_model(request, OPTIONS).summary.verdict == "healthy"
    assert Path.cwd() == tmp_path
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


# --- times --------------------------------------------------------------------------------------


def timed(thing: str, **values: Any) -> Run:
    options = replace(OPTIONS, timing=True, repeats=2, time_budget=1e-9)
    return measure_model(request_for(thing, **values), options, clock=FakeClock([1.0]))


def test_a_layer_takes_the_time_between_its_gradients() -> None:
    run = timed("Net")
    # Marks: in and out of each layer, then one at each tensor between two of them.
    times = [(row.forward_s, row.backward_s) for row in run.layer_records]
    assert times == [(None, None), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    assert len(run.time_records) == 2 * 3
    assert run.summary.forward_s == 3.0


@pytest.mark.parametrize("steps", [0, 4])
def test_timing_changes_no_number(steps: int) -> None:
    """How many passes are timed is up to the machine; each draws, and moves the averages."""
    values = {"input": "user_models:pairs", "loss": "ce", "dtype": "float32"}
    how = RunOptions(steps=steps, raw_range=True, device="cpu", timing=False)
    plain = measured("dropping", how, **values)
    timed = measured("dropping", replace(how, timing=True, repeats=3, time_budget=1e-9), **values)
    assert logs(timed) == logs(plain)
    assert [row.loss for row in timed.step_records] == [row.loss for row in plain.step_records]
    assert timed.time_records
    assert timed.summary.forward_flop  # counted in a pass of its own


def test_layers_that_run_again_in_the_backward_pass_have_no_times() -> None:
    run = timed("Checkpointed")
    assert all(row.backward_s is None for row in run.layer_records)
    assert run.time_records == ()


# --- training -----------------------------------------------------------------------------------

TRAINED = ("--lr", "0.01", "--no-timing", "--quiet", "--json", "-", "--every", "30")


def outcome(cli: CommandLine, *words: str) -> dict[str, Any]:
    done = cli("run", "--out", str(cli.out), *words, *TRAINED)
    assert done.code == 0, done.err
    summary: dict[str, Any] = json.loads(done.out)["summary"]
    return summary


def test_a_model_with_an_embedding_learns_the_markov_source(cli: CommandLine) -> None:
    found = outcome(cli, "--model", "user_models:language", "--input", "8,16", "--steps", "90")
    assert found["outcome"] in ("learning", "converged")
    assert found["gap_closed"] > 0.5
    assert found["loss_floor"] < found["final_loss"] < found["loss_chance"]


def test_images_learn_colours(cli: CommandLine) -> None:
    words = ("--model", "user_models:images", "--input", "16,3,4,4", "--steps", "60")
    found = outcome(cli, *words)
    assert found["loss_chance"] == pytest.approx(math.log(3))
    assert found["gap_closed"] > 0.1


def test_on_batches_of_the_users_own_no_floor_is_known(cli: CommandLine) -> None:
    words = ("--model", "user_models:Net", "--input", "user_models:pairs", "--steps", "60")
    found = outcome(cli, *words)
    assert found["outcome"] == "learning"
    assert found["loss_floor"] is found["loss_chance"] is found["gap_closed"] is None
    (folder,) = store.run_folders(cli.out)
    run = store.load(folder)
    assert sorted({row.step for row in run.layer_records}) == [0, 30, 60]
    assert {row.loss_floor for row in run.step_records} == {None}


def test_the_last_batch_may_be_smaller(cli: CommandLine) -> None:
    words = ("--model", "user_models:Net", "--input", "user_models:uneven", "--steps", "30")
    assert outcome(cli, *words)["outcome"] == "learning"


def test_watching_changes_no_step_of_the_training() -> None:
    values = {"input": "user_models:pairs", "loss": "ce"}
    often, seldom = (
        measured("Net", RunOptions(steps=6, every=n, timing=False, raw_range=True), **values)
        for n in (1, 6)
    )
    assert [r.loss for r in often.step_records] == [r.loss for r in seldom.step_records]


# --- the command line ---------------------------------------------------------------------------


def test_a_run_is_shown_stored_and_read(cli: CommandLine) -> None:
    words = ("--model", "user_models.py:Net", "--input", "5,6", "--repeats", "1")
    done = cli("run", "--out", str(cli.out), *words, "--time-budget", "1e-9")
    assert done.code == 0, done.err
    assert "user_models.py:Net (Net), 3 layers (Layer)" in done.out
    (folder,) = store.run_folders(cli.out)
    text = (folder / "run.json").read_text()
    assert str(Path.cwd()) not in text
    run = store.load(folder)
    assert isinstance(run.spec, ModelSpec)
    assert run.spec.request is not None
    assert run.spec.request.model.startswith("user_models.py:Net@")
    with pytest.raises(UsageError, match="measured from where it lies"):
        measure_model(run.spec.request, OPTIONS)
    assert cli("compare", str(folder)).code == 0
    assert cli("report", "--results", str(cli.out)).code == 0


def test_a_grid_of_models(cli: CommandLine) -> None:
    words = ("--model", "user_models:Net", "--depth", "2,3", "--set", "classes=3,5")
    how = ("--input", "4,6", "--executor", "serial", "--repeats", "1", "--time-budget", "1e-9")
    done = cli("compare", "--out", str(cli.out), *words, *how, "--csv", "-")
    assert done.code == 0, done.err
    rows = [(row["model"], row["depth"], row["set"]) for row in csv.DictReader(StringIO(done.out))]
    name = next(iter(rows))[0]
    assert name.startswith("user_models:Net@")
    assert sorted(rows) == [(name, depth, f"classes={n}") for depth in "23" for n in "35"]
    again = cli("compare", "--out", str(cli.out), *words, *how, "--quiet")
    assert "stored already" not in again.err  # what the module imports may have changed


@pytest.mark.slow
def test_workers_import_the_model_from_where_it_lies(cli: CommandLine) -> None:
    words = ("--model", "user_models:Net", "--depth", "2,3", "--input", "4,6", "--no-timing")
    done = cli("compare", "--out", str(cli.out), *words, "--executor", "processes", "--quiet")
    assert done.code == 0, done.err
    assert len(store.run_folders(cli.out)) == 2


def test_the_gate_takes_models(cli: CommandLine) -> None:
    words = ("--out", str(cli.out), "--model", "user_models:Net", "--input", "5,6")
    assert cli("check", *words, "--max-decades", "3").code == 0
    assert cli("check", *words, "--max-gain", "0.1").code == 1


def test_what_a_model_prints_does_not_spoil_the_output(cli: CommandLine) -> None:
    words = ("--model", "user_models:says", "--input", "5,6", "--no-timing", "--json", "-")
    done = cli("run", "--out", str(cli.out), *words)
    assert json.loads(done.out)["verdict"] == "healthy"
    assert "hello" in done.err


COMPLAINTS = {
    "user_models:breaks --input 5,6": "runs; got ValueError: it broke; mend it",
    "user_models:number --input 5,6": "returns an nn.Module; got int; return the model",
    "user_models:WIDTH --input 5,6": "names a function or a class",
    "user_models:MODEL --input 5,6 --depth 3": "is a model already",
    "user_models:Ney --input 5,6": "got Ney; use Net",
    "no_such_module:Net --input 5,6": "can be imported from here; got no_such_module",
    "no_such_file.py:Net --input 5,6": "the file can be read; got no_such_file.py",
    "user_models:Net": "needs an input; got none",
    "user_models:Net --input 5,0": "--input is sizes",
    "user_models:Net --input 5,7": "RuntimeError: mat1 and mat2 shapes",
    "user_models:Net --input 5,6 --set colour=3": "unexpected keyword argument 'colour'",
    "user_models:Net --input 5,6 --set classes": "--set takes name=value; got 'classes'",
    "user_models:Net --input 5,6 --heads 4": "--heads is for stacks",
    "user_models:Net --input 5,6 --seq-len 4": "--seq-len is for stacks and hf: models",
    "user_models:Net --input 5,6 --keep sqrt": "--keep is for stacks",
    "user_models:Net --input 5,6 --loss own": "--loss own is a scalar that the model returns",
    "user_models:Net --input 5,6 --loss hinge": "--loss is one of the known names",
    "user_models:Net --input user_models:no_batches": "yields batches; got none",
    "user_models:Net --input 5,6 --layers nowhere": "names modules of the model; got nowhere",
    "user_models:Leaves --input 5,6": "runs; got SystemExit: 7",
    "user_models:Leaves --input 5,6 --loss ce --steps 3": "runs; got SystemExit: 7",
    "user_models:Net --input 6 --steps 3": "training needs logits",
    "user_models:Net --input user_models:pairs": "for pairs of input and target use --loss ce",
    "user_models:Net --input 5,6 --theory-only": "theory predicts stacks",
    "gpt2": "--model names a model; got 'gpt2'",
}


@pytest.mark.parametrize(("words", "complaint"), COMPLAINTS.items())
def test_a_mistake_is_one_line(cli: CommandLine, words: str, complaint: str) -> None:
    done = cli("run", "--out", str(cli.out), "--no-timing", "--model", *words.split())
    assert (done.code, complaint in done.complaint) == (2, True), done.err
    assert not list(cli.out.iterdir())


def test_options_of_a_model_need_one(cli: CommandLine) -> None:
    assert "--input goes with --model" in cli("run", "--input", "5,6").complaint


def test_a_module_beside_the_file_can_be_imported(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(user_models.__file__, tmp_path / "beside_it.py")
    (tmp_path / "entry.py").write_text("from beside_it import Net as build\n")
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    words = ("--model", str(tmp_path / "entry.py") + ":build", "--input", "5,6", "--no-timing")
    assert cli("run", "--out", str(cli.out / "runs"), *words).code == 0


def test_a_request_comes_back_from_json() -> None:
    asked = request_for("Net", depth=3, set="classes=3", loss="ce", input="user_models:pairs")
    values = json.loads(json.dumps(asked.to_json()))
    assert ModelRequest.from_json(values) == asked
    assert asked.settings == {"classes": 3}


@pytest.mark.parametrize(
    ("text", "value"), [("a=1e-3", 1e-3), ("a=[1,2]", [1, 2]), ("a=true", True), ("a=gelu", "gelu")]
)
def test_settings_are_python_values_or_text(text: str, value: object) -> None:
    assert request_for("Net", set=text).settings == {"a": value}


def test_nothing_stays_on_the_model_after_timing() -> None:
    timed("MODEL", dtype="float32")
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in user_models.MODEL.modules()]
    assert not any(hooks)
    assert isinstance(user_models.MODEL, nn.Module)
