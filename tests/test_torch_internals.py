"""Private parts of torch: each does what gradflow relies on, and stands in one module."""

from __future__ import annotations

import ast
import copy
import inspect
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow import torch_internals
from gradflow.torch_internals import (
    Hook,
    OperationMode,
    UpdateAfter,
    at_end_of_backward,
    compile_errors,
    compiled_inner,
    foreach_copy,
    foreach_norm,
    foreach_subtract,
    in_backward,
    in_transform,
    is_compiled,
    map_tensors,
    operation,
    registered,
    release_graph_pool,
    run_backward,
    scale_tensor,
    uncompiled,
    version_of,
    with_children,
)

PACKAGE = Path(gradflow.__file__).parent


# Autograd


def test_run_backward() -> None:
    x, unused = torch.randn(3, requires_grad=True), torch.ones(2, requires_grad=True)
    g = torch.randn(3)
    y = x.exp() * x
    (expected,) = torch.autograd.grad(y, [x], g, retain_graph=True)
    found, none = run_backward(y, g, (x, unused))
    assert found is not None
    assert torch.equal(found, expected)
    assert none is None
    assert x.grad is None
    with pytest.raises(RuntimeError, match="freed"):
        run_backward(y, g, (x,))


def test_in_backward() -> None:
    x = torch.ones(2, requires_grad=True)
    seen: list[bool] = []
    x.register_hook(lambda _: seen.append(in_backward()))
    assert not in_backward()
    (2 * x).sum().backward()
    assert seen == [True]
    assert not in_backward()


def test_at_end_of_backward() -> None:
    x = torch.ones(2, requires_grad=True)
    seen: list[Tensor | None] = []
    y = 2 * x
    y.register_hook(lambda _: at_end_of_backward(lambda: seen.append(x.grad)))
    y.sum().backward()
    assert len(seen) == 1
    assert seen[0] is x.grad is not None


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev])
def test_in_transform(transform: Callable[..., Any]) -> None:
    seen: list[bool] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(in_transform())
        return x.square().sum()

    transform(watched)(torch.ones(2))
    assert seen == [True]
    assert not in_transform()


def test_version_of() -> None:
    x = torch.ones(2)
    before = version_of(x)
    assert version_of(x.detach()) == before
    x.mul_(2)
    assert version_of(x) == before + 1
    with torch.inference_mode():
        assert version_of(torch.ones(2)) == -1


# Modules


def test_registered() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    model.register_module("absent", None)
    assert list(registered(model).items()) == [
        ("0", shared),
        ("1", model[1]),
        ("2", shared),
        ("absent", None),
    ]
    assert [name for name, _ in model.named_children()] == ["0", "1"]


def test_with_children() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Identity()
    found = with_children(model, {"0": other})
    assert list(found) == [other]
    assert len(model) == 2
    assert torch.equal(found(torch.ones(2)), torch.ones(2))


def test_map_tensors() -> None:
    model = nn.BatchNorm1d(2)
    model.tied = model.weight
    model.register_parameter("turns", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    map_tensors(model, lambda x: x.double() if x.is_floating_point() else x)
    assert model.weight.dtype == model.running_mean.dtype == torch.float64
    assert model.turns.dtype == torch.complex64
    assert model.tied is model.weight


def test_compiled_inner() -> None:
    model = nn.Tanh()
    assert compiled_inner(model) is None
    assert compiled_inner(torch.compile(model, backend="eager")) is model


def test_is_compiled() -> None:
    model = nn.Tanh()
    assert not is_compiled(model)
    assert is_compiled(torch.compile(model, backend="eager"))
    model.compile(backend="eager")
    assert is_compiled(model)


class _Counting(Hook):
    """Counts the calls of a module."""

    calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


def test_hook() -> None:
    """Torch hands the hooks to the copies, and gives its next number to the next hook."""
    model, hook = nn.Tanh(), _Counting()
    handle = hook.put(model.register_forward_hook)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = _Counting()
        own.put(twin.register_forward_hook)
        twin(torch.ones(2))
        assert own.calls == 1
    assert hook.calls == 0
    model(torch.ones(2))
    assert hook.calls == 1
    handle.remove()
    model(torch.ones(2))
    assert hook.calls == 1


# Many tensors by one call

TENSORS = [torch.tensor([3.0, 4.0]), torch.tensor([[1e30], [1e30]])]


def test_foreach_copy() -> None:
    targets = [torch.zeros_like(x) for x in TENSORS]
    foreach_copy(targets, TENSORS)
    assert all(map(torch.equal, targets, TENSORS))


def test_foreach_subtract() -> None:
    targets = [2 * x for x in TENSORS]
    foreach_subtract(targets, TENSORS)
    assert all(map(torch.equal, targets, TENSORS))


def test_foreach_norm() -> None:
    """In float64: in the tensors' own format the second norm is infinite."""
    five, large = foreach_norm(TENSORS)
    assert five.dtype == torch.float64
    assert five.item() == 5
    assert large.item() == pytest.approx(math.sqrt(2) * 1e30, rel=1e-7)


# Gradient scaling


def test_scale_tensor() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert scale_tensor(scaler) is None
    scaler.scale(torch.ones(1))
    scale = scale_tensor(scaler)
    assert scale is not None
    assert scale.item() == scaler.get_scale() == 8


def test_update_after() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    seen: list[float] = []
    scaler.update = UpdateAfter(scaler, scaler.update, lambda: seen.append(scaler.get_scale()))
    scaler.update(2.0)
    assert seen == [8]
    assert scaler.get_scale() == 2
    twin = pickle.loads(pickle.dumps(scaler))
    twin.scale(torch.ones(1))
    twin.update(4.0)
    assert len(seen) == 1
    assert twin.get_scale() == 4


# CUDA graphs


def test_release_graph_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of builds for CUDA; those for CPUs have none of them."""
    names = ("_cuda_endAllocateToPool", "_cuda_releasePool")
    if torch.backends.cuda.is_built():
        assert all(hasattr(torch._C, name) for name in names)
    called: list[tuple[str, int, tuple[int, int]]] = []
    for name in names:
        note = lambda *given, name=name: called.append((name, *given))  # noqa: E731
        monkeypatch.setattr(torch._C, name, note, raising=False)
    release_graph_pool(1, (0, 7))
    assert called == [(name, 1, (0, 7)) for name in names]


# The compiler


def test_compile_errors() -> None:
    errors = compile_errors()

    def fails(*_: Any) -> Any:
        raise ValueError("no code")

    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(errors.backend) as caught:
        torch.compile(lambda x: x + 1, backend=fails)(torch.ones(2))
    assert str(caught.value.inner_exception) == "no code"
    assert isinstance(caught.value, errors.any)
    with pytest.raises(errors.any):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))
    compiled = torch.compile(uncompiled(_power), backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(torch.ones(2), "one")
        with pytest.raises(errors.limit):
            compiled(torch.ones(2), "two")


def _power(x: Tensor, power: str) -> Tensor:
    return x * x if power == "two" else x + 0


def test_uncompiled() -> None:
    """Another size makes no graph for any size: the function is not the one that was compiled."""
    sizes: list[Any] = []

    def note(graph: Any, inputs: Any) -> Any:
        sizes.extend(x.shape[0] for x in inputs if isinstance(x, Tensor))
        return graph

    for size in (3, 5):
        torch.compile(uncompiled(_power), backend=note)(torch.ones(size), "two")
    assert all(isinstance(size, int) for size in sizes)
    assert uncompiled(_power)(torch.ones(1), "one") == _power(torch.ones(1), "one")


# Operations


class _Names(OperationMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.seen.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def test_operation_mode() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    with _Names() as names:
        torch.autograd.grad((x @ x).sum(), x)
    assert names.seen.count(operation("mm")) == 3


@pytest.mark.slow  # a process of its own
def test_operation_mode_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from gradflow.torch_internals import OperationMode\n"
        "class Quiet(OperationMode):\n"
        "    def __torch_dispatch__(self, func, types, args=(), kwargs=None):\n"
        "        return func(*args, **(kwargs or {}))\n"
        "with Quiet():\n"
        "    torch.ones(2) + 1\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_operation() -> None:
    x, w = torch.ones(4, 8), torch.ones(2, 8, 4)
    with _Names() as names:
        torch._grouped_mm(x, w, offs=torch.tensor([1, 4], dtype=torch.int32))
    assert operation("_grouped_mm") in names.seen
    with pytest.raises(AttributeError):
        operation("no_operation_of_this_name")


# The rule


def test_every_part_has_its_test() -> None:
    """As the module promises; class names are written in lower case."""
    public = [
        name
        for name, value in vars(torch_internals).items()
        if getattr(value, "__module__", "") == torch_internals.__name__ and name[0] != "_"
    ]
    tested = {name for name in globals() if name.startswith("test_")}
    words = {name: "".join(f"_{c.lower()}" if c.isupper() else c for c in name) for name in public}
    missing = {name for name, word in words.items() if f"test_{word.lstrip('_')}" not in tested}
    assert missing == set()
    assert all(inspect.getdoc(getattr(torch_internals, name)) for name in public)


# Underscored attributes of the standard library (os, namedtuple) and of transformers.
OTHERS = {"_exit", "_replace", "_from_config"}


def test_no_other_module_touches_private_torch() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "torch_internals.py"]
    trees = {file: ast.parse(file.read_text()) for file in files}
    own = {name for tree in trees.values() for name in _defined(tree)} | OTHERS
    torch_names = {name for name in dir(nn.Module()) if name[0] == "_"}
    touched = [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file, tree in trees.items()
        for name in _touched(tree)
        if name not in own - torch_names
    ]
    assert touched == []


def _defined(tree: ast.AST) -> Iterator[str]:
    """Names of the methods and attributes of gradflow's own classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (part for one in targets for part in ast.walk(one)):
                if isinstance(target, ast.Name):
                    yield target.id
                elif isinstance(target, ast.Attribute) and _is_self(target.value):
                    yield target.attr


def _touched(tree: ast.AST) -> Iterator[str]:
    """Private names of other objects, and private modules and names that are imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_self(node.value):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.FunctionDef):
            names = [node.name] if node.name in ("_should_skip_dynamo", "_apply") else []
        else:
            names = []
        yield from (name for name in names if name[0] == "_" and not name.startswith("__"))


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
