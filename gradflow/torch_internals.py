"""Everything in gradflow that depends on private parts of torch, each part in one function.

Each docstring names the public way that the private one replaces, and why that is not enough. The
test of the same name in `tests/test_torch_internals.py` fails when torch changes the part.

Two tricks that are not torch's live elsewhere: `engine.memory.reset_peak` calls glibc's
`malloc_trim`, and `cli.process` ends the process by `os._exit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from itertools import count
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

_M = TypeVar("_M", bound=nn.Module)

# Looked up once: they are called at every call of a watched layer.
_graph_task = torch._C._current_graph_task_id
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_code_numbers = count()


# Autograd


def run_backward(y: Tensor, g: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the products g^T dy/dx for each input x, None for those that y does not use.

    Frees the graph. Replaces `torch.autograd.grad(y, inputs, g, allow_unused=True)`, which imports
    sympy at its first call: 0.4 s.
    """
    keep, create = False, False  # graphs: of y, and of the gradients
    return _engine_run_backward(
        (y,), (g,), keep, create, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )


def in_backward() -> bool:
    """Return whether autograd runs: a layer that is called now is recomputed by a checkpoint.

    No public function tells; hooks on tensors tell when a gradient arrives, not what lies between.
    """
    return _graph_task() != -1


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Call a function once the backward pass that runs now has written all gradients.

    Replaces `register_multi_grad_hook`, which waits for given tensors, some of which may get no
    gradient, and is called before DDP and FSDP2 have averaged the gradients.
    """
    Variable._execution_engine.queue_callback(call)


def in_transform() -> bool:
    """Return whether a transform of `torch.func` runs, inside which tensors hold no numbers yet.

    No public function tells.
    """
    return _innermost_transform() is not None


def version_of(x: Tensor) -> int:
    """Return how often a tensor has been written to in place; -1 for inference tensors.

    No public attribute counts it; comparing values would need a copy and a pass over the tensor.
    """
    return -1 if x.is_inference() else x._version


# Modules


def registered(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Return the children of a module under all their names, in the order of registration.

    Replaces `named_children`, which names a child once that is registered, and runs, three times.
    """
    return module._modules


def with_children(module: _M, children: Mapping[str, nn.Module]) -> _M:
    """Return a shallow copy of a module that has other children; the module keeps its own.

    Replaces `add_module`, which would write into the table that a shallow copy shares.
    """
    twin = copy(module)
    twin._modules = dict(children)
    return twin


def map_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Exchange every parameter, buffer and gradient of a module for what a function makes of it.

    Replaces `Module.to`, which makes real numbers of complex ones; ties between parameters stay.
    """
    module._apply(change)  # type: ignore[no-untyped-call]  # torch's stubs


def compiled_inner(module: nn.Module) -> nn.Module | None:
    """Return the module inside what `torch.compile(module)` returns; None for other modules.

    The wrapper's class and its attribute have no public names.
    """
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled, by `torch.compile(module)` or by `module.compile()`.

    `torch.compiler.is_compiling` tells of tracing alone, and nothing public of a module.
    """
    return module._compiled_call_impl is not None or compiled_inner(module) is not None


class Hook:
    """A hook on a module; a copy of the module, in memory or in a file, has one that does nothing.

    Torch has no hooks that copies leave out. The idle one needs no gradflow where it is read: it is
    the end of an empty `with` block, which takes any arguments and returns None.
    """

    handle: RemovableHandle

    def put(self, register: Callable[..., RemovableHandle], **options: Any) -> RemovableHandle:
        """Register this hook; return what removes it."""
        self.handle = register(self, **options)
        return self.handle

    def __reduce__(self) -> tuple[Any, ...]:
        # With the handle, so that torch gives its number to no later hook of the copy, which
        # would be called like this one.
        return getattr, (nullcontext(self.handle), "__exit__")


# Many tensors by one call


def foreach_copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target.

    Replaces a loop over `Tensor.copy_`, which costs one launch for each tensor.
    """
    torch._foreach_copy_(targets, sources)


def foreach_subtract(targets: list[Tensor], others: list[Tensor]) -> None:
    """Subtract from each target, in place, the tensor at its index.

    Replaces a loop over `Tensor.sub_`, which costs one launch for each tensor.
    """
    torch._foreach_sub_(targets, others)


def foreach_norm(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Return the 2-norm of each tensor, added up in float64.

    Replaces a loop over `torch.linalg.vector_norm`, which costs one launch for each tensor;
    `torch.nn.utils.get_total_norm` returns one norm of all, in the tensors' own format.
    """
    return torch._foreach_norm(tensors, 2, torch.float64)


# Gradient scaling


def scale_tensor(scaler: Any) -> Tensor | None:
    """Return the factor of a `GradScaler` on its device; None before it has scaled anything.

    Replaces `get_scale`, which waits for the device.
    """
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else None


@dataclass(frozen=True)
class UpdateAfter:
    """`scaler.update` that first calls a function; a copy of the scaler has its own update again.

    A `GradScaler` has no hooks, and leaves out the optimizer's step, which has some, where a
    gradient is infinite. Set it as the scaler's attribute `update`.
    """

    scaler: Any
    update: Callable[..., Any]
    first: Callable[[], None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.first()
        return self.update(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.scaler, "update")


# CUDA graphs


def release_graph_pool(device: int, pool: tuple[int, int]) -> None:
    """Give back the memory of a capture that has failed.

    `torch.cuda.graph` does so only where the capture ends well: where its end fails too, it leaves
    the allocator in the middle of the capture.
    """
    with suppress(RuntimeError):  # the capture had ended: torch itself has given the pool back
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


# The compiler


@dataclass(frozen=True)
class CompileErrors:
    """Classes of errors that compiled functions raise.

    Attributes:
        limit: more kinds of arguments than torch compiles for.
        backend: no code could be generated; its `inner_exception` says why.
        any: every other error of the compiler, `backend` among them.
    """

    limit: type[Exception]
    backend: Any
    any: type[RuntimeError]


def compile_errors() -> CompileErrors:
    """Return the classes of the compiler's errors; `torch.compiler` names none of them.

    Called after `torch.compile`, which has imported their module: a second.
    """
    from torch._dynamo import exc as e

    return CompileErrors(e.FailOnRecompileLimitHit, e.BackendCompilerFailed, e.TorchDynamoException)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function like this one that `torch.compile` has never seen.

    Torch counts graphs by code object and remembers shapes by its name: after arguments of another
    size it would make slower code for any size. `torch.compiler.reset` would forget the graphs of
    the user's models as well.
    """
    code, scope = function.__code__, function.__globals__
    fresh = code.replace(co_name=f"{code.co_name}_{next(_code_numbers)}")
    return FunctionType(fresh, scope)


# Operations


class OperationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's stubs
    """Sees every operation while it is entered, by its method `__torch_dispatch__`.

    Replaces `FlopCounterMode`, which follows modules by hooks that `torch.autograd.grad` refuses;
    `torch.overrides.TorchFunctionMode` does not see the operations of a backward pass.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's stubs

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first use would import the compiler: a second


def operation(name: str) -> Any:
    """Return an operation of ATen, also one whose name opens with an underscore.

    A mode sees operations, not the public functions that end in them.
    """
    return getattr(torch.ops.aten, name)
