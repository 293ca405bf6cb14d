"""One compiled unit that all layers use: what `--compile` does.

The unit is an argument of the compiled function, its parameters are inputs of the graph, and guards
tell kinds of unit apart. So there is one graph for each kind of unit and shape of the stream,
however deep the stack is, whether its layers are resident or rebuilt; a number that differs from
layer to layer becomes an input too. What needs a graph for every layer is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradflow.errors import GradflowError, MeasurementError, UsageError, first_line
from gradflow.networks.stack import Block
from gradflow.networks.units.template import Compiled, Unit
from gradflow.torch_internals import compile_errors, uncompiled

# The compiler of torch that generates the code.
BACKEND = "inductor"
_REMEDY = "leave out --compile"


def compiled_join() -> Compiled:
    """Return `Unit.join`, compiled at its first call for each kind of unit.

    Its calls raise `UsageError` where a unit is not one graph, or layers need too many, and
    `MeasurementError` where no code could be generated.
    """
    # In one graph, or an error: torch would run eagerly what it cannot compile, and say nothing.
    compiled = torch.compile(uncompiled(_join), backend=BACKEND, fullgraph=True)
    errors = compile_errors()

    def join(unit: Unit, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        try:
            return compiled(unit, x_skip, x_branch)
        except errors.limit:
            got = f"more kinds of {unit.name} unit than torch compiles"
            raise UsageError("--compile uses one graph for all layers", got, _REMEDY) from None
        except errors.any as error:
            raise _refusal(unit, error) from None

    return join


def _join(unit: Unit, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
    return unit.join(x_skip, x_branch)


def _refusal(unit: Unit, error: Any) -> GradflowError:
    if isinstance(error, compile_errors().backend):
        what = f"--compile failed on the {unit.name} unit"
        return MeasurementError(f"{what}: {first_line(error.inner_exception)}; {_REMEDY}")
    rule = f"--compile makes one graph of the {unit.name} unit"
    return UsageError(rule, first_line(error), _REMEDY)


def with_join(join: Compiled | None, block: Block) -> Block:
    """Return the block, whose units compute by `join` from now on; None leaves them as they are."""
    for unit in block.units:
        unit.compiled = join
    return block
