"""The pytest plugin, in process; its norms against float64 autograd by hand."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradflow.errors import UsageError
from gradflow.measuring.guard import flow_of
from gradflow.pytest_plugin import assert_gradient_flow

pytest_plugins = ["pytester"]
PLUGIN = ("-p", "gradflow.pytest_plugin", "-p", "no:randomly", "-W", "error")
TEST = """
import torch
from torch import nn

def test_flow(gradflow):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)]
    with torch.no_grad():
        blocks[3][0].weight *= SCALE
    gradflow.assert_gradient_flow(nn.Sequential(*blocks), torch.randn(4, 8), baseline="six")
"""


def stack(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
    with torch.no_grad():
        model[3][0].weight *= scale
    return model


def outcome(pytester: pytest.Pytester, scale: float, *options: str) -> pytest.RunResult:
    pytester.makepyfile(test_it=TEST.replace("SCALE", str(scale)))
    return pytester.runpytest_inprocess(*PLUGIN, *options)


def test_baseline_is_written_held_and_rewritten(pytester: pytest.Pytester) -> None:
    file = pytester.path / "gradflow_baselines" / "six.csv"
    missing = outcome(pytester, 1)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*no baseline six.csv: write it with --gradflow-update"])
    assert not file.exists()
    outcome(pytester, 1, "--gradflow-update").assert_outcomes(passed=1)
    first = file.read_text()
    outcome(pytester, 1).assert_outcomes(passed=1)
    moved = outcome(pytester, 0.5)
    moved.assert_outcomes(failed=1)
    moved.stdout.fnmatch_lines(["*gradient flow: *", "*log10_grad_norm*baseline*"])
    assert file.read_text() == first
    outcome(pytester, 0.5, "--gradflow-update").assert_outcomes(passed=1)
    assert file.read_text() != first


def test_bounds_hold_before_a_baseline_is_written(pytester: pytest.Pytester) -> None:
    outcome(pytester, 1e-6, "--gradflow-update").assert_outcomes(failed=1)
    assert not (pytester.path / "gradflow_baselines").exists()


def test_failure_names_the_layer_and_shows_the_profile() -> None:
    x = torch.randn(4, 8)
    assert_gradient_flow(stack(), x)
    with pytest.raises(AssertionError) as caught:
        assert_gradient_flow(stack(1e-6), x)
    text = str(caught.value)
    assert text.startswith("gradient flow: vanish")
    assert "decades, through 3" in text
    assert "#" in text


def test_norms_are_those_of_autograd() -> None:
    model, x = stack().double(), torch.randn(4, 8, dtype=torch.float64)
    run = flow_of(model, x)
    streams = [x]
    for block in model:
        streams.append(block(streams[-1]))
    c = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = torch.autograd.grad((c / c.norm() * streams[-1]).sum(), streams[1:])
    rows = [row for row in run.layer_records if row.layer > 0]
    expected = [math.log10(g.norm()) for g in grads]
    assert [row.log10_grad_norm for row in rows] == pytest.approx(expected, rel=1e-12)


def test_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))
    model(torch.randn(4, 8)).sum().backward()
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    grads = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    state = torch.get_rng_state()
    flow_of(model, torch.ones(4, 8) * torch.arange(4)[:, None])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(kept[n], t) for n, t in model.state_dict().items())
    for p, (grad, before) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, before)


def test_nan_and_zero_fail_whatever_the_bounds() -> None:
    for bad in (math.nan, 0.0):
        with pytest.raises(AssertionError, match=r"zero|NaN"):
            assert_gradient_flow(stack(bad), torch.randn(4, 8), None)


def test_usage() -> None:
    with pytest.raises(UsageError, match=r"nn\.Module"):
        assert_gradient_flow(lambda x: x, torch.ones(1))  # type: ignore[arg-type]
    limit = (
        r"^max_decades= is a finite number of at least 0; got -1; use for example max_decades=1$"
    )
    with pytest.raises(UsageError, match=limit):
        assert_gradient_flow(stack(), torch.ones(1, 8), max_decades=-1)
    frozen = stack().requires_grad_(False)
    with pytest.raises(UsageError, match="takes a gradient"):
        assert_gradient_flow(frozen, torch.ones(1, 8))


@pytest.mark.parametrize("text", ["", "unit,norm\n0,1\n"])
def test_damaged_baseline(tmp_path: Path, text: str) -> None:
    file = tmp_path / "six.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"a baseline has the columns"):
        assert_gradient_flow(stack(), torch.randn(4, 8), baseline=file)


def test_other_layers_are_said(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    assert_gradient_flow(stack(), x, baseline=tmp_path / "six.csv", update=True)
    with pytest.raises(AssertionError, match=r"other layers"):
        assert_gradient_flow(stack()[:5], x, baseline=tmp_path / "six.csv")


def test_import_needs_no_torch() -> None:
    code = "import sys, gradflow.pytest_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_file_has_one_row_per_layer(pytester: pytest.Pytester) -> None:
    outcome(pytester, 1, "--gradflow-update").assert_outcomes(passed=1)
    with (pytester.path / "gradflow_baselines" / "six.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["unit"] for r in rows if r["unit"] != "input"] == [str(i) for i in range(6)]
