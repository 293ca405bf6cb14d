"""The callback that watches a `lightning.Trainer`."""

from __future__ import annotations

from typing import Any

from gradflow.watching.callbacks import TrainingWatch, base_class

_Base: Any = base_class("lightning.pytorch", "Callback")


class LightningCallback(TrainingWatch, _Base):  # type: ignore[misc]  # Any where it is not installed
    """Watches a `lightning.Trainer`: `Trainer(..., callbacks=[LightningCallback(every=10)])`.

    Steps are the optimizer's, so accumulated batches count as one; evaluations are left out.
    Names of layers are those in the LightningModule. Arguments and attributes are those of
    `TrainingWatch`.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the model, with what the strategy has wrapped around it."""
        del pl_module
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._begin(trainer.strategy.model, scaler=scaler)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Pause: nothing else tells a `validation_step`, which does not call the model, apart."""
        del trainer, pl_module
        if self.flow is not None:
            self._evaluation.enter_context(self.flow.paused())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Go on after the validation."""
        del trainer, pl_module
        self._evaluation.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Store the run, as training ends."""
        del trainer, pl_module
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the model as it was, without storing a run."""
        del trainer, pl_module
        self._stack.__exit__(type(exception), exception, exception.__traceback__)
