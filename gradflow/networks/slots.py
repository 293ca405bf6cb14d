"""The parameters of a unit or a module, with the scale of their draws."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from gradflow.networks.blocks import Conv3x3, Linear
from gradflow.networks.initial import Slot, bias_std, fans, weight_std
from gradflow.networks.norms import ConstantStart
from gradflow.networks.units.template import Unit
from gradflow.networks.user_branch import UserBranch
from gradflow.specs.stack import StackSpec


def unit_slots(spec: StackSpec, unit: Unit) -> Iterator[Slot]:
    """Every parameter of a unit, with the scale of its draw."""
    branch = unit.branch
    roles = branch.roles()
    for part in unit.modules():
        role = roles.get(part, "")
        gain = unit.wiring.gains.get(role, 1.0)
        feeds, output = role in branch.feeds_activation, role == branch.output
        yield from module_slots(spec, part, feeds=feeds, output=output, gain=gain)
    if isinstance(branch, UserBranch):
        yield from branch.slots(spec, unit.wiring.gains)


def module_slots(
    spec: StackSpec, part: nn.Module, *, feeds: bool = False, output: bool = False, gain: float = 1
) -> Iterator[Slot]:
    """The parameters of one module, those of its children aside.

    Args:
        spec: the rule for matrices and biases.
        part: the module.
        feeds: whether its output goes into the activation.
        output: whether it is the output projection of a branch.
        gain: factor on the standard deviation of its matrix.
    """
    if spec.weights:
        # Trained values replace them all.
        for name, size in getattr(part, "shapes", {}).items():
            yield Slot(part, name, size, None)
    elif isinstance(part, Linear | Conv3x3):
        shape = part.shapes["weight"]
        std = gain * weight_std(spec, shape, feeds=feeds, output=output)
        yield Slot(part, "weight", shape, std, matrix=True)
        if "bias" in part.shapes:
            yield Slot(part, "bias", part.shapes["bias"], bias_std(spec, fans(shape)[0]))
    elif isinstance(part, ConstantStart):
        for name, size in part.shapes.items():
            yield Slot(part, name, size, None, part.starts[name])
