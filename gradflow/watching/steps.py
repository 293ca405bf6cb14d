"""When a training step ends: an optimizer that holds parameters of the model has stepped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradflow.torch_internals import UpdateAfter, scale_tensor


class Steps:
    """Calls `before` and `after` around the steps of one optimizer, or of any that fits.

    Args:
        parameters: of the model.
        optimizer: the only one that counts; None is any that holds one of the parameters.
        before: called before such a step.
        after: called after it.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        optimizer: torch.optim.Optimizer | None,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self.ids = {id(p) for p in parameters}
        self.optimizer = optimizer
        self.before, self.after = before, after

    def counts(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer is one of the model."""
        if self.optimizer is not None:
            return optimizer is self.optimizer
        held = (p for group in optimizer.param_groups for p in group["params"])
        return any(id(p) in self.ids for p in held)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Hooks on all optimizers, gone at the end."""
        with ExitStack() as stack:
            pre = register_optimizer_step_pre_hook(self._called(self.before))
            stack.callback(pre.remove)
            post = register_optimizer_step_post_hook(self._called(self.after))
            stack.callback(post.remove)
            yield

    def _called(self, action: Callable[[], None]) -> Any:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if self.counts(optimizer):
                action()

        return hook


@contextmanager
def followed_scaler(scaler: Any, end: Callable[[], None]) -> Iterator[None]:
    """Call `end` before a scaler changes its scale: it leaves out steps with infinities."""
    if scaler is None:
        yield
        return
    scaler.update = UpdateAfter(scaler, scaler.update, end)
    try:
        yield
    finally:
        del scaler.update


def scale_of(scaler: Any) -> list[Tensor]:
    """The factor in the gradients as a tensor on its device; empty without a scaler."""
    if scaler is None or not scaler.is_enabled():
        return []
    scale = scale_tensor(scaler)
    return [torch.ones(1) * scaler.get_scale() if scale is None else scale.reshape(1)]
