"""One step of the stream: the residual wiring of a branch (`gradflow.schemes.wiring`), as a module.

Other kinds of unit are subclasses of `Unit`, or of `StreamUnit` where the stream is a state of
several streams; `schemes.UNIT_KINDS` names the class of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from gradflow.networks.blocks import BRANCHES, PHI, Branch, MakeBranch
from gradflow.networks.initial import ConstantStart, Slot, module_slots
from gradflow.networks.norms import make_norm
from gradflow.networks.user_branch import UserBranch, make_branch
from gradflow.reductions import norm
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec


class _Activation(nn.Module):
    """The activation as a module, where it follows the addition."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.phi = PHI[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.phi(x)


@dataclass(frozen=True)
class ParamInfo:
    """The facts of one parameter that need no pass; `norm` is the norm of its value."""

    name: str
    shape: str
    numel: int
    norm: Tensor | float

    @property
    def at_hand(self) -> ParamInfo:
        """Return the same with the norm as a number."""
        return ParamInfo(self.name, self.shape, self.numel, float(self.norm))


class Scale(ConstantStart):
    """b x, b a parameter: one number, or one for each feature."""

    weight: Tensor

    def __init__(self, spec: StackSpec, learned: str, start: float) -> None:
        super().__init__()
        self.shapes = {"weight": (spec.width if learned == "vector" else 1,)}
        self.starts = {"weight": start}
        self.is_shared = learned == "shared scalar"
        self.channels = learned == "vector" and spec.kind.domain == "images"

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight.view(-1, 1, 1) if self.channels else self.weight)


class Factor(nn.Module):
    """A constant factor times its input."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


# A unit and the two uses of its input, shortcut and branch.
Compiled = Callable[["Unit", Tensor | None, Tensor], Tensor]


class Unit(nn.Module):
    """One step of the stream: y = Np(a x + b No(f(c Ni(x)))), without a x if plain (`wiring`).

    Attributes:
        branches: the classes of its branch, by name.
        shortcut: whether it is residual.
        weights: its parameters, once they have values.
        structure: equal for units that keep equally much for their backward.
        compiled: computes `join(unit, x_skip, x_branch)` in its place, where it is set.
    """

    branches: ClassVar[Mapping[str, MakeBranch]] = BRANCHES
    weights: tuple[nn.Parameter, ...]
    structure: tuple[object, ...]
    compiled: Compiled | None = None

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__()
        self.name, self.wiring = name, wiring
        self.shortcut = wiring.a != 0
        self.branch: Branch = make_branch(spec, wiring, name, self.branches)
        inside = self.branch.norms_inside
        self.shared = nn.Identity() if inside else make_norm(spec, wiring, "shared")
        self.before = nn.Identity() if inside else make_norm(spec, wiring, "in")
        self.scale_in = _factor(wiring.c)
        self.branch_norm = make_norm(spec, wiring, "branch")
        self.scale = Scale(spec, wiring.learned, wiring.b) if wiring.learned else _factor(wiring.b)
        self.after = _after(spec, wiring, inside=inside)

    def f(self, x: Tensor) -> Tensor:
        """Return b No(f(c Ni(x))), the part of the branch in the sum."""
        return self.scale(self.branch_norm(self.branch(self.scale_in(self.before(x)))))

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        """Return y from x as the shortcut takes it (None if plain), and as the branch takes it.

        The two uses of x are given apart so that their gradients come apart.
        """
        f = self.f(self.shared(x_branch))
        if x_skip is None:
            return self.after(f)
        skip = self.shared(x_skip)
        return self.after((skip if self.wiring.a == 1 else self.wiring.a * skip) + f)

    def evaluate(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        """Return `join` of both uses of x, by the compiled function where there is one."""
        compiled = self.compiled
        return compiled(self, x_skip, x_branch) if compiled else self.join(x_skip, x_branch)

    def slots(self, spec: StackSpec) -> Iterator[Slot]:
        """Yield every parameter with the scale of its draw."""
        branch, gains = self.branch, self.wiring.gains
        roles = branch.roles()
        for part in self.modules():
            role = roles.get(part, "")
            feeds, output = role in branch.feeds_activation, role == branch.output
            gain = gains.get(role, 1.0)
            yield from module_slots(spec, part, feeds=feeds, output=output, gain=gain)
        if isinstance(branch, UserBranch):
            yield from branch.slots(spec, gains)

    def settle(self, seed: int, layer: int, /) -> None:
        """Change the weights of a layer after their draw, where the kind of unit needs it."""

    def begin(self, seed: int, layer: int, step: int, /) -> None:
        """Draw what a step of training draws before its pass, where the kind of unit does."""

    def constrain(self) -> None:
        """Bring the weights back to their constraint after an update, where the kind has one."""

    def seal(self) -> None:
        """Note what the engines ask of every unit in every pass, now that its weights are there."""
        named = list(self.named_parameters())
        self.weights = tuple(p for _, p in named)
        self._known = [(name, "x".join(map(str, p.shape)), p.numel()) for name, p in named]
        scalars = (self.wiring.a, self.shortcut)
        self.structure = (scalars, *(type(part) for part in self.modules()))
        # A list, because a module's own attributes take long to set.
        self._infos: list[ParamInfo] = []

    def of_seeds(
        self, weights: Sequence[nn.Parameter], norms: Sequence[Tensor], compiled: Compiled
    ) -> Unit:
        """Return a copy of the unit with the weights of several seeds, the seeds as the first axis.

        Weights and their norms, (seeds,) each, are in the order of the unit's own; `compiled`
        computes `join` with such weights.
        """
        unit = copy(self)
        unit.weights, unit.compiled = tuple(weights), compiled
        pairs = zip(self._known, norms, strict=True)
        unit._infos = [ParamInfo(*known, size) for known, size in pairs]
        return unit

    def forget(self) -> None:
        """Drop what was known of the weights, because they have new values."""
        self._infos.clear()

    @property
    def infos(self) -> Sequence[ParamInfo]:
        """Return what is known of each parameter; norms are taken when they are first asked for."""
        if not self._infos:
            pairs = zip(self._known, self.weights, strict=True)
            self._infos[:] = [ParamInfo(*known, norm(p.detach())) for known, p in pairs]
        return tuple(self._infos)

    def forward(self, x: Tensor) -> Tensor:
        # The view gathers the branch's uses of x before the shortcut's is added, in the order
        # in which the engine adds the two parts: the gradients agree bit by bit.
        return self.evaluate(x if self.shortcut else None, x.view_as(x))


def _factor(factor: float) -> nn.Module:
    return nn.Identity() if factor == 1 else Factor(factor)


def _after(spec: StackSpec, wiring: Wiring, *, inside: bool) -> nn.Module:
    """Return what follows the addition: a norm, or the activation of He et al. 2015."""
    if not inside:
        return make_norm(spec, wiring, "out")
    return _Activation(spec.activation) if "out" in wiring.norms else nn.Identity()


# The epsilon of norms that belong to a kind of unit; `--norm-eps` is for the norms of the wiring.
KIND_EPS = 1e-5


class StreamUnit(Unit):
    """A unit whose stream is a state of several streams: one tensor (B, n, T, d).

    The first unit of a stack (`settings["first"]`) makes the state from the input (B, T, d). In all
    subclasses x_branch is what passes the branch f, and x_skip is what goes around it.
    """

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        self.is_first = bool(wiring.settings.get("first"))

    def state(self, x: Tensor, copies: int) -> Tensor:
        """Return (B, n, T, d): x itself, or copies of the stack's input (B, T, d)."""
        return x.unsqueeze(1).expand(-1, copies, -1, -1) if self.is_first else x

    def join(self, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        """Return the next state; these units always have a shortcut."""
        assert x_skip is not None
        return self.step(x_skip, x_branch)

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        """Return the next state from the two uses of this one."""
        raise NotImplementedError  # the interface: each kind has its own

    def forward(self, x: Tensor) -> Tensor:
        # Both uses are gathered in views of their own before they are added: see `Unit.forward`.
        return self.evaluate(x.view_as(x), x.view_as(x))
