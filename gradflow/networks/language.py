"""The ends of a trained language model: its embedded input, and its head with a real loss.

Token ids are random; the labels are the tokens that come next. So the stream has its trained
scale, and the loss is that of the model on text without any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from gradflow.networks.blocks import Linear
from gradflow.networks.checkpoint import embed, load_head
from gradflow.networks.initial import Slot, fill, generator
from gradflow.networks.norms import norm_of_kind
from gradflow.specs.checkpoints import Pretrained
from gradflow.specs.stack import StackSpec

CPU = torch.device("cpu")


def token_ids(spec: StackSpec, seed: int) -> Tensor:
    """Uniform random tokens, (B, T + 1): the inputs and, one on, what comes next."""
    shape = (spec.batch_size, spec.tokens + 1)
    return torch.randint(spec.classes, shape, generator=generator(CPU, seed, "tokens"))


def embedded_batch(spec: StackSpec, weights: Pretrained, seed: int, device: torch.device) -> Tensor:
    """y_0, (B, T, d): the embeddings of random tokens, of their positions too where learned."""
    rows = embed(weights, token_ids(spec, seed)[:, :-1], spec.width)
    return rows.to(device, getattr(torch, spec.dtype))


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of the next token, through the model's own final norm and head."""

    def __init__(
        self, spec: StackSpec, weights: Pretrained, seed: int, device: torch.device
    ) -> None:
        super().__init__()
        self.norm = norm_of_kind(spec, str(spec.norm_kind), spec.width)
        self.project = Linear(spec.width, spec.classes, bias=False)
        slots = [
            Slot(part, name, shape, None)
            for part in self.children()
            for name, shape in part.shapes.items()  # type: ignore[union-attr,operator]  # both have them
        ]
        fill(slots, spec, device, generator(device, seed, "head"))
        load_head(weights, self.norm, self.project)
        self.labels = token_ids(spec, seed)[:, 1:].flatten().to(device)

    def forward(self, y: Tensor) -> Tensor:
        return F.cross_entropy(self.project(self.norm(y)).flatten(0, 1), self.labels)
