"""One compiled unit that all layers use: what `--compile` does.

The unit is an argument of the compiled function, its parameters are inputs of the graph, and guards
tell kinds of unit apart. So there is one graph for each kind of unit and shape of the stream,
however deep the stack is, whether its layers are resident or rebuilt; a number that differs from
layer to layer becomes an input too. What needs a graph for every layer is refused.
"""

from __future__ import annotations

from itertools import count
from types import FunctionType

import torch
from torch import Tensor

from gradflow.errors import GradflowError, MeasurementError, UsageError, first_line
from gradflow.networks.stack import Block
from gradflow.networks.units.template import Compiled, Unit

# Who generates the code.
BACKEND = "inductor"
REMEDY = "leave out --compile"

_numbers = count()


def compiled_join() -> Compiled:
    """`Unit.join`, compiled at its first call for each kind of unit.

    Its calls raise `UsageError` where a unit is not one graph, or layers need too many, and
    `MeasurementError` where no code could be generated.
    """
    # Torch counts graphs by code object, and remembers shapes by its name: after a stack of another
    # batch size it would make slower code for any size.
    code = _join.__code__.replace(co_name=f"join_{next(_numbers)}")
    fresh = FunctionType(code, globals())
    # In one graph, or an error: torch would run eagerly what it cannot compile, and say nothing.
    compiled = torch.compile(fresh, backend=BACKEND, fullgraph=True)
    from torch._dynamo import exc  # a second to import, which torch.compile has spent already

    def join(unit: Unit, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
        try:
            return compiled(unit, x_skip, x_branch)
        except exc.FailOnRecompileLimitHit:
            got = f"more kinds of {unit.name} unit than torch compiles"
            raise UsageError("--compile uses one graph for all layers", got, REMEDY) from None
        except exc.TorchDynamoException as error:
            raise _refusal(unit, error) from None

    return join


def _join(unit: Unit, x_skip: Tensor | None, x_branch: Tensor) -> Tensor:
    return unit.join(x_skip, x_branch)


def _refusal(unit: Unit, error: RuntimeError) -> GradflowError:
    from torch._dynamo import exc

    if isinstance(error, exc.BackendCompilerFailed):
        what = f"--compile failed on the {unit.name} unit"
        return MeasurementError(f"{what}: {first_line(error.inner_exception)}; {REMEDY}")
    rule = f"--compile makes one graph of the {unit.name} unit"
    return UsageError(rule, first_line(error), REMEDY)


def use(join: Compiled | None, block: Block) -> Block:
    """The block, whose units now compute by `join`; as it was if None."""
    for unit in block.units:
        unit.compiled = join
    return block
