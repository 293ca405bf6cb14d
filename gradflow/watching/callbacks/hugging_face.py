"""The callback that watches a `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from gradflow.errors import UsageError
from gradflow.watching.callbacks import TrainingWatch, base_class

_Base: Any = base_class("transformers", "TrainerCallback")


class HuggingFaceCallback(TrainingWatch, _Base):  # type: ignore[misc]  # Any where it is not installed
    """Watches a `transformers.Trainer`: `Trainer(..., callbacks=[HuggingFaceCallback(every=10)])`.

    Steps are the optimizer's, so accumulated batches count as one; evaluations are left out.
    Arguments and attributes are those of `TrainingWatch`.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **given: Any
    ) -> None:
        """Watch the model.

        Raises:
            UsageError: parameters are spread in another way than by DDP or FSDP2.
        """
        del state, control
        if getattr(args, "deepspeed", None):
            rule = "the callback watches models of one process, of DDP, and of FSDP2"
            raise UsageError(rule, "DeepSpeed", "leave the callback out")
        # The trainer hands over the module inside DDP.
        shared = args.parallel_mode.value == "distributed"
        scaler = getattr(given.get("optimizer"), "scaler", None)
        self._begin(model, scaler=scaler, group=dist.group.WORLD if shared else None)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Store the run, as training ends."""
        del args, state, control, given
        self._end()
