"""A branch from a user's own file as a `Branch`: its interface held, its parameters drawn by ours.

Torch's layers draw from the global generator when they are made. A layer of a stack must depend on
(spec, seed, layer) alone, so a branch is made twice, from two states of that generator, which is
put back afterwards. What comes out the same is a constant and stays (ones of a norm, a zeroed
output projection); what differs was drawn, and its values are replaced: a parameter of two or more
dimensions is a matrix (out, in, ...) and gets the rule `--init`, the bias beside one the rule for
biases. Any other random number is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from gradflow.errors import UsageError
from gradflow.networks.blocks import Branch, MakeBranch
from gradflow.networks.initial import Slot
from gradflow.schemes import Wiring
from gradflow.specs.block_kinds import branch_class
from gradflow.specs.initial_variances import bias_std, fans, weight_std
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import is_user_name, told, without_digest


def make_branch(
    spec: StackSpec, wiring: Wiring, name: str, branches: Mapping[str, MakeBranch]
) -> Branch:
    """Return the branch of a unit: one of `branches`, or the user's own."""
    if is_user_name(spec.block):
        return UserBranch(spec, wiring)
    return branches[name](spec, wiring)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a user's branch that gradflow's own layers do not hold.

    Attributes:
        owner: the module that holds it, as `name`.
        role: the name of its layer, which gains and `feeds_activation` go by.
        start: its values, where they are constant; None = drawn.
        matrix: sizes of the matrix that its draw goes by: its own, or for a bias the weight's.
    """

    owner: nn.Module
    name: str
    role: str
    shape: tuple[int, ...]
    start: Tensor | None
    matrix: tuple[int, ...]


class UserBranch(Branch):
    """f(x) = module(x), the module of the user's class; its parameters wait for `fill`.

    A class that breaks the interface raises `UsageError`, when it is made or in a forward pass.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring) -> None:
        super().__init__()
        self.title = without_digest(spec.block)
        self.module, other = (_made(spec, wiring, seed) for seed in (0, 1))
        self.norms_inside = bool(getattr(self.module, "norms_inside", False))
        self.feeds_activation = tuple(getattr(self.module, "feeds_activation", ()))
        self.output = getattr(self.module, "output", None)
        _check_kinds(self.title, self.module, other)
        self.parts = tuple(_parameters(self.title, self.module, dict(other.named_parameters())))
        self.shapes = {f"{part.role}.{part.name}": part.shape for part in self.parts}
        for part in self.parts:
            part.owner.register_parameter(part.name, None)
        self._check_names(wiring.gains)
        self.checked = False

    def roles(self) -> dict[nn.Module, str]:
        """Return the layers at any depth with their dotted names."""
        return {part: name for name, part in self.module.named_modules() if name}

    def slots(self, spec: StackSpec, gains: Mapping[str, float]) -> Iterator[Slot]:
        """Yield the parameters of the user's module with the scale of their draws."""
        for part in self.parts:
            yield _slot(spec, part, self, gains.get(part.role, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        # Of a CUDA graph the state cannot be read; its kind of pass was checked in the warm-up.
        if self.checked or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._apply_module(x)
        before = _generator_state(x.device)
        y = self._apply_module(x)
        if not torch.equal(before, _generator_state(x.device)):
            rule = f"{self.title} computes the same each time"
            raise UsageError(rule, "a draw from torch's generator", "leave dropout out of it")
        self.checked = True
        return y

    def _apply_module(self, x: Tensor) -> Tensor:
        try:
            y = self.module(x)
        except Exception as error:
            if "memory" in str(error):  # `measure` tells how much is needed
                raise
            got = f"{told(error)}, with x {_described(x)}"
            raise UsageError(f"{self.title} computes f(x)", got, "mend its forward") from None
        if _described(y) != _described(x):
            rule = f"{self.title} gives a tensor like x, {_described(x)}"
            raise UsageError(rule, _described(y), "mend its forward")
        return y

    def _check_names(self, gains: Mapping[str, float]) -> None:
        """Refuse a name that no layer has: it would change nothing, in silence."""
        known = {*self.roles().values(), *(part.role for part in self.parts)}
        named = {*self.feeds_activation, *([] if self.output is None else [self.output])}
        if unknown := sorted(map(str, named - known)):
            rule = f"feeds_activation and output of {self.title} name layers of it"
            raise UsageError(rule, ", ".join(unknown), f"use {', '.join(sorted(known)) or 'none'}")
        scaled = {name for name, gain in gains.items() if gain != 1}
        if scaled and not scaled & known:
            rule = f"the scheme scales the matrices {', '.join(sorted(scaled))}"
            got = f"{self.title} with {', '.join(sorted(known)) or 'none'}"
            raise UsageError(rule, got, "name the layers of the branch so")


def _made(spec: StackSpec, wiring: Wiring, seed: int) -> nn.Module:
    """Return the module, drawn from this seed; the global generator is left as it was."""
    name = spec.block
    made = branch_class(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            module = made(spec, wiring)
        except Exception as error:  # noqa: BLE001 (a user's code may raise anything)
            rule = f"{without_digest(name)} is made from (spec, wiring)"
            raise UsageError(rule, told(error), "mend its constructor") from None
    assert isinstance(module, nn.Module)
    return module


def _check_kinds(title: str, module: nn.Module, other: nn.Module) -> None:
    """Refuse modules with parameters that could not be drawn anew, or would not be seen."""
    if any(is_parametrized(part) for part in module.modules()):
        rule = f"{title} holds its parameters themselves"
        raise UsageError(rule, "a parametrisation", "write it out in forward")
    everywhere = list(module.named_parameters(remove_duplicate=False))
    if len(everywhere) != len(list(module.parameters())):
        names = ", ".join(name for name, _ in everywhere)
        raise UsageError(f"{title} uses each parameter in one place", names, "tie no weights")
    if any(is_lazy(values) for values in module.parameters()):
        raise UsageError(f"{title} knows its sizes", "a lazy layer", "take them from spec")
    if _sizes(module) != _sizes(other):
        raise _random(title, "which layers it has")
    theirs = dict(other.named_buffers())
    for name, buffer in module.named_buffers():
        if not torch.equal(buffer, theirs[name]):
            raise _random(title, f"buffer {name}")


def _sizes(module: nn.Module) -> dict[str, torch.Size]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.shape for name, tensor in tensors}


def _parameters(title: str, module: nn.Module, other: Mapping[str, Tensor]) -> Iterator[Parameter]:
    """Yield the parameters of a module; `other` are its parameters drawn from another seed."""
    for full, values in module.named_parameters():
        path, _, name = full.rpartition(".")
        owner = module.get_submodule(path)
        role = path if path and name in ("weight", "bias") else full
        shape = tuple(values.shape)
        start = values.detach() if torch.equal(values, other[full]) else None
        weight = getattr(owner, "weight", None) if name == "bias" else values
        matrix = tuple(weight.shape) if isinstance(weight, Tensor) else shape
        if start is None and len(matrix) < 2:
            raise _random(title, f"{full} of shape {shape}")
        yield Parameter(owner, name, role, shape, start, matrix)


def _random(title: str, what: str) -> UsageError:
    rule = f"what {title} draws is a matrix, or the bias of one"
    return UsageError(rule, what, "start it at a constant")


def _slot(spec: StackSpec, part: Parameter, branch: Branch, gain: float) -> Slot:
    if part.start is not None:
        return Slot(part.owner, part.name, part.shape, None, part.start)
    if part.shape != part.matrix:
        return Slot(part.owner, part.name, part.shape, bias_std(spec, fans(part.matrix)[0]))
    feeds, output = part.role in branch.feeds_activation, part.role == branch.output
    std = gain * weight_std(spec, part.shape, feeds=feeds, output=output)
    return Slot(part.owner, part.name, part.shape, std, matrix=True)


def _generator_state(device: torch.device) -> Tensor:
    """Return the state of torch's global generator on the device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _described(value: object) -> str:
    """Return shape, dtype and device of a tensor in words; the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    size = " x ".join(map(str, value.shape))
    return f"{size} {str(value.dtype).removeprefix('torch.')} on {value.device}"
