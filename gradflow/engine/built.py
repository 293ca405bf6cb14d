"""The networks of a stack as its plan has them: resident or rebuilt, whole or the timed layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradflow.engine.ahead import ahead_on
from gradflow.engine.compiled import use
from gradflow.engine.plan import Plan
from gradflow.engine.rebuilt import RebuiltBlocks
from gradflow.engine.tape import Network
from gradflow.networks.inputs import input_batch
from gradflow.networks.losses import build_loss
from gradflow.networks.stack import Block, build_block, build_stack
from gradflow.networks.units.template import Compiled
from gradflow.specs.stack import StackSpec


def build_network(
    spec: StackSpec,
    seed: int,
    device: torch.device,
    plan: Plan | None = None,
    join: Compiled | None = None,
) -> Network:
    """One seed of a stack: resident on the device, or built as the plan says."""
    if plan and plan.rebuild:
        blocks: Sequence[Block] = RebuiltBlocks(
            spec, seed, device, plan.alive, join=join, ahead=ahead_on(device)
        )
    else:
        blocks = [use(join, block) for block in build_stack(spec, seed, device)]
    return Network(blocks, input_batch(spec, seed, device), build_loss(spec, seed, device))


def build_timed(
    spec: StackSpec, seed: int, device: torch.device, plan: Plan, join: Compiled | None = None
) -> Network:
    """The layers that are timed, as a stack of their own."""
    blocks = [use(join, build_block(spec, seed, layer, device)) for layer in plan.timed_layers]
    x, loss = input_batch(spec, seed, device), build_loss(spec, seed, device)
    return Network(blocks, x, loss, plan.timed_layers)
