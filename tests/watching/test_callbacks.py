"""Callbacks of other trainers: the numbers of a loop written by hand, and nothing left behind."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cells import differences
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo import WIDTH, Residual, chain

import gradflow
from gradflow.errors import UsageError
from gradflow.watching import Flow, callbacks
from gradflow.watching.callbacks import TrainingWatch, base_class

STEPS, BATCH, LR, CLIP = 4, 4, 0.1, 0.05
# The trainers round the learning rate and the clipping in their own ways.
ALIKE = 1e-5


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return chain(Residual, depth=3)


def samples(count: int = STEPS * BATCH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(WIDTH, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def by_hand(pieces: int = 1, **options: Any) -> Flow:
    """The loop that the trainers are asked to make."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with gradflow.watch(model, **options) as flow:
        for x in torch.stack(samples()).split(BATCH):
            optimizer.zero_grad()
            for piece in x.chunk(pieces):
                (loss_of(model, piece) / pieces).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    return flow


def assert_same_run(found: Flow, wanted: Flow) -> None:
    """Alike but for the names: a trainer's model has the layers inside another."""
    mine, other = (flow.run.layer_records for flow in (found, wanted))
    assert differences(mine, other, ALIKE, leave_out=["unit"]) == {}


def has_hooks(model: nn.Module) -> bool:
    named = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    grads = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    return bool(named or grads)


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="needs nowhere; got not installed; run pip install now"):
        base_class("nowhere.at_all", "Callback")


@pytest.mark.parametrize("name", callbacks.__all__)
def test_nothing_is_imported_before_it_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = {"HuggingFaceCallback": "transformers", "LightningCallback": "lightning"}[name]
    home = callbacks._HOMES[name]
    monkeypatch.delitem(sys.modules, home, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.pytorch", None)
    with pytest.raises(UsageError, match=f"run pip install {library}$"):
        getattr(callbacks, name)
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        _ = callbacks.Nobody


def test_what_cannot_be_stored_is_said_before_training(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(UsageError, match="can be written to"):
        TrainingWatch(out=place)._begin(model_of())


def test_a_run_that_cannot_be_stored_does_not_cost_the_training(tmp_path: Path) -> None:
    watching = TrainingWatch(out=tmp_path)
    watching._begin(model_of())
    with pytest.warns(UserWarning, match="gradflow: no watched layer of Chain has run"):
        watching._end()
    assert (watching.path, list(tmp_path.iterdir())) == (None, [])


def test_the_next_training_takes_the_hooks_of_one_that_failed_away(tmp_path: Path) -> None:
    watching, failed = TrainingWatch(out=tmp_path), model_of()
    watching._begin(failed)
    assert has_hooks(failed)
    watching._begin(model_of())
    assert not has_hooks(failed)
    watching._stack.close()


# Hugging Face.


class WithLoss(nn.Module):
    """What the Trainer asks of a model: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model_of()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net, x)}


def trained_by_hugging_face(folder: Path, callback: Any, **arguments: Any) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    settings = {"per_device_train_batch_size": BATCH} | arguments
    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        optim="sgd",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    data = [{"x": x} for x in samples()]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    model = WithLoss()
    trainer = InOrder(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback])
    trainer.train()
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_hugging_face_trainer_is_watched(tmp_path: Path, pieces: int) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    callback = callbacks.HuggingFaceCallback("net.blocks.*", every=2, out=tmp_path / "runs")
    model = trained_by_hugging_face(
        tmp_path,
        callback,
        per_device_train_batch_size=BATCH // pieces,
        gradient_accumulation_steps=pieces,
        eval_strategy="steps",
        eval_steps=1,
    )
    assert_same_run(callback.flow, by_hand(pieces, every=2))
    assert gradflow.load(callback.path).layers.shape == callback.flow.layers.shape
    assert not has_hooks(model)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "shared"), [("distributed", True), ("not_parallel", False)])
def test_the_module_inside_ddp_is_watched_with_its_group(
    monkeypatch: pytest.MonkeyPatch, mode: str, shared: bool
) -> None:
    pytest.importorskip("transformers")
    given: dict[str, Any] = {}
    callback = callbacks.HuggingFaceCallback(out=None)
    monkeypatch.setattr(callback, "_begin", lambda model, **more: given.update(more))
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD="world"))
    args = SimpleNamespace(deepspeed=None, parallel_mode=SimpleNamespace(value=mode))
    optimizer = SimpleNamespace(scaler="scaler")
    callback.on_train_begin(args, None, None, model=model_of(), optimizer=optimizer)
    assert given == {"scaler": "scaler", "group": "world" if shared else None}
    args.deepspeed = "zero3.json"
    with pytest.raises(UsageError, match="got DeepSpeed; leave the callback out"):
        callback.on_train_begin(args, None, None, model=model_of())


# Lightning.


def lightning_module() -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model_of()

        def training_step(self, batch: Tensor) -> Tensor:
            return loss_of(self.net, batch)

        def validation_step(self, batch: Tensor) -> None:
            loss_of(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    return Module()


def trained_by_lightning(folder: Path, callback: Any, pieces: int = 1, model: Any = None) -> Any:
    from lightning.pytorch import Trainer

    model = model or lightning_module()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=CLIP,
        accumulate_grad_batches=pieces,
        val_check_interval=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = samples()
    trainer.fit(model, DataLoader(data, BATCH // pieces), DataLoader(data, BATCH))
    return model


lightning = pytest.mark.filterwarnings("default")  # it warns of few workers, and of its imports


@pytest.mark.slow
@lightning
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_lightning_trainer_is_watched(tmp_path: Path, pieces: int) -> None:
    pytest.importorskip("lightning")
    callback = callbacks.LightningCallback("net.blocks.*", every=2, out=tmp_path / "runs")
    model = trained_by_lightning(tmp_path, callback, pieces)
    assert_same_run(callback.flow, by_hand(pieces, every=2))
    assert gradflow.load(callback.path).layers.shape == callback.flow.layers.shape
    assert not has_hooks(model)


@pytest.mark.slow
@lightning
def test_a_lightning_training_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    model = lightning_module()
    model.training_step = lambda batch: 1 / 0
    callback = callbacks.LightningCallback(out=tmp_path / "runs")
    with pytest.raises(ZeroDivisionError):
        trained_by_lightning(tmp_path, callback, model=model)
    assert not has_hooks(model)
    assert not (tmp_path / "runs").exists()
