"""Models that are copied or stored while they are watched: the copy knows nothing of it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from zoo import WIDTH, ZOO, Residual, chain

import gradflow


def stored(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"gradflow" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    data = pickle.dumps(model)
    assert b"gradflow" not in data
    return pickle.loads(data)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.save": stored,
    "pickle": pickled,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_and_is_not_watched(how: str) -> None:
    model, x = chain(Residual), torch.randn(2, WIDTH)
    with gradflow.watch(model) as flow:
        model(x).sum().backward()
        twin = COPIES[how](model)
        twin.zero_grad()
        twin(100 * x).sum().backward()
    with gradflow.watch(chain(Residual)) as alone:
        alone._watched.model.load_state_dict(model.state_dict())
        alone._watched.model(x).sum().backward()
    assert flow.layers.equals(alone.layers)
    assert torch.equal(twin(x), model(x))
    assert all(p.grad is not None for p in twin.parameters())


@pytest.mark.parametrize("kind", ZOO)
def test_every_model_can_be_stored_while_it_is_watched(kind: str) -> None:
    torch.manual_seed(0)
    animal = ZOO[kind]
    model = animal.make()
    x = torch.randn(4, WIDTH)
    with gradflow.watch(model):
        animal.call(model, x).backward()
        copies = [make(model) for make in COPIES.values()]
        torch.manual_seed(1)
        want = animal.call(model, x)
        for other in copies:
            torch.manual_seed(1)
            assert torch.equal(animal.call(other, x), want)


def test_the_copy_s_hooks_are_nobody_else_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process numbers begin anew: a hook with that of a stored one is called like it."""
    model = chain(Residual)
    with gradflow.watch(model):
        data = pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    twin = pickle.loads(data)
    seen: list[Any] = []
    for block in twin.blocks:
        for _ in range(20):
            block.register_forward_pre_hook(lambda *given: seen.append(len(given)))
    twin(torch.randn(2, WIDTH))
    assert seen == [2] * 60  # module and arguments, and no keywords


@pytest.mark.parametrize("make", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
def test_a_scaler_can_be_copied_as_well(make: Callable[[Any], Any]) -> None:
    model, scaler = chain(Residual), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(scaler: Any) -> None:
        scaler.scale(model(torch.randn(2, WIDTH)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    with gradflow.watch(model, scaler=scaler, optimizer=object()) as flow:
        step(scaler)
        twin = make(scaler)
        assert twin.get_scale() == 8.0
        step(twin)  # ends no step: that of the watched scaler does
        step(scaler)
    assert list(flow.layers.step.unique()) == [0, 1]


def test_the_weights_are_stored_as_without_watch() -> None:
    model = chain(Residual)

    def weights() -> bytes:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return file.getvalue()

    before = weights()
    with gradflow.watch(model):
        assert weights() == before


def test_a_model_is_stored_after_watch_as_before() -> None:
    model = chain(Residual)
    before = pickle.dumps(model)
    with gradflow.watch(model):
        assert pickle.dumps(model) != before
    assert pickle.dumps(model) == before


READER = """
import sys
sys.modules["gradflow"] = None  # not installed
import torch
model = torch.load(sys.argv[1], weights_only=False)
x = torch.ones(2, 4)
model(x).sum().backward()
torch.compile(model, fullgraph=True, backend="aot_eager")(x)
torch.save(model(x).detach(), sys.argv[2])
"""


@pytest.mark.slow
def test_a_stored_model_needs_no_gradflow(tmp_path: Path) -> None:
    layers = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
    model, x = nn.Sequential(*layers), torch.ones(2, 4)
    with gradflow.watch(model):
        y: Tensor = model(x)
        y.sum().backward()
        torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", READER, str(tmp_path / "model.pt"), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt"), y.detach())
