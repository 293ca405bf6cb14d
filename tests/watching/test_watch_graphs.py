"""CUDA graphs under watch: on CPU by a graph that reruns its operations, and on a GPU for real."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cells import differences
from fake_graph import FakeGraph
from torch import Tensor, nn
from zoo import WIDTH, Residual, Universal, chain

import gradflow
from gradflow.errors import MeasurementError, UsageError
from gradflow.watching import Flow, device_rows
from gradflow.watching.layer_hooks import _tap, _tap_gradient

STEPS, SAMPLES = 5, 4
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> FakeGraph:
    """A graph that this machine can capture."""
    made = FakeGraph()
    monkeypatch.setattr(device_rows, "CAPTURABLE", ("cpu",))
    monkeypatch.setattr(device_rows, "is_capturing", lambda: made.capturing)
    return made


def model_of(make: Callable[[], nn.Module] = lambda: chain(Residual)) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def batches(count: int = STEPS, device: str = "cpu") -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    shape = SAMPLES, 3, WIDTH
    return [
        torch.randn(shape, dtype=torch.float64, generator=source).to(device) for _ in range(count)
    ]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def eager(pieces: int = 1, clip: float | None = None, **how: Any) -> Flow:
    """The training without a graph."""
    make = how.pop("make", lambda: chain(Residual))
    model = model_of(make)
    optimizer = optimizer_of(model)
    with gradflow.watch(model, **how) as flow:
        for step in np.array_split(np.arange(STEPS * pieces), STEPS):
            optimizer.zero_grad(set_to_none=False)
            for i in step:
                backward(model, batches(STEPS * pieces)[i])
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return flow


def alike(graphed: Flow, bare: Flow) -> None:
    mine, other = graphed.run, bare.run
    assert mine.spec == other.spec
    assert differences(mine.layer_records, other.layer_records, 1e-12) == {}
    assert differences(mine.param_records, other.param_records, 1e-12) == {}


def captured_step(graph: FakeGraph, *, clip: float | None = None, **how: Any) -> Flow:
    """Forward, backward and optimizer in one graph, after a step that warms up."""
    model = model_of(how.pop("make", lambda: chain(Residual)))
    optimizer, x = optimizer_of(model), batches()[0].clone()

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        backward(model, x)
        if clip:  # one by one: a dispatch mode hides that `foreach` writes to them
            nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)
        optimizer.step()

    with gradflow.watch(model, **how) as flow:
        step()
        with graph:
            step()
        for batch in batches()[1:]:
            x.copy_(batch)
            graph.replay()
            flow.end_step()
    return flow


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_captured_step_gives_the_numbers_of_every_replay(
    graph: FakeGraph, clip: float | None
) -> None:
    flow = captured_step(graph, clip=clip)
    assert list(flow.layers.step.unique()) == list(range(STEPS))
    alike(flow, eager(clip=clip))


def test_every_is_a_matter_of_the_host(graph: FakeGraph) -> None:
    """The capture is in a step that is not measured, and measures all the same."""
    flow = captured_step(graph, every=2)
    assert list(flow.layers.step.unique()) == [0, 2, 4]
    alike(flow, eager(every=2))


def test_a_block_that_is_called_again_is_found_in_a_graph(graph: FakeGraph) -> None:
    alike(captured_step(graph, make=Universal), eager(make=Universal))
    assert len(eager(make=Universal).run.layer_records) == 4 * STEPS


def captured_backward(
    graph: FakeGraph, *, pieces: int = 1, clip: float | None = None, **how: Any
) -> Flow:
    """Forward and backward in a graph; the optimizer steps outside, as with a `GradScaler`."""
    model = model_of()
    optimizer, x = optimizer_of(model), batches()[0].clone()
    with gradflow.watch(model, **how) as flow:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with graph:
            backward(model, x)
        for step in np.array_split(np.arange(STEPS * pieces), STEPS):
            optimizer.zero_grad(set_to_none=False)
            for i in step:
                x.copy_(batches(STEPS * pieces)[i])
                graph.replay()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return flow


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_captured_backward_pass_gives_the_numbers_of_all_its_replays(
    graph: FakeGraph, pieces: int, clip: float | None
) -> None:
    """Replays add up until the optimizer steps, as micro-batches do."""
    alike(captured_backward(graph, pieces=pieces, clip=clip), eager(pieces=pieces, clip=clip))


def test_steps_with_and_without_the_graph_take_turns(graph: FakeGraph) -> None:
    model = model_of()
    optimizer, x = optimizer_of(model), batches()[0].clone()
    with gradflow.watch(model) as flow:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with graph:
            backward(model, x)
        for i, batch in enumerate(batches()):
            optimizer.zero_grad(set_to_none=False)
            x.copy_(batch)
            if i % 2:
                backward(model, x)
            else:
                graph.replay()
            optimizer.step()
    alike(flow, eager())


def test_two_graphs_of_one_model_do_not_disturb_each_other(
    graph: FakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = FakeGraph()
    monkeypatch.setattr(device_rows, "is_capturing", lambda: graph.capturing or second.capturing)
    model = model_of()
    optimizer, x = optimizer_of(model), batches()[0].clone()
    with gradflow.watch(model) as flow:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for one in (graph, second):
            with one:
                backward(model, x)
        for i, batch in enumerate(batches()):
            optimizer.zero_grad(set_to_none=False)
            x.copy_(batch)
            (graph, second)[i % 2].replay()
            optimizer.step()
    alike(flow, eager())


def test_replays_write_where_the_first_did_and_take_no_memory(graph: FakeGraph) -> None:
    model = model_of()
    optimizer, x = optimizer_of(model), batches()[0].clone()
    with gradflow.watch(model) as flow:
        (pool,) = flow._recorder.graph_pools.values()
        (table,) = flow._parameters._graphed._tables
        places = pool.sums.data_ptr(), table.data_ptr()
        backward(model, x)
        optimizer.step()
        with graph:
            backward(model, x)
            optimizer.step()
        taken, rows = pool.taken, len(pool.sums)
        for _ in range(3):
            graph.replay()
            flow.end_step()
            assert (pool.sums.data_ptr(), table.data_ptr()) == places
            assert (pool.taken, len(pool.sums)) == (taken, rows)
            assert not pool.sums.any()  # read, and laid out anew
    assert flow._recorder.pools.keys() == {torch.device("cpu")}


def test_a_graph_that_is_not_replayed_is_no_step(graph: FakeGraph) -> None:
    model, x = model_of(), batches()[0]
    with gradflow.watch(model) as flow:
        with graph:
            backward(model, x)
        for _ in range(3):
            flow.end_step()
    with pytest.raises(MeasurementError, match="no watched layer"):
        flow.table()


def test_nothing_is_left_on_a_model_whose_step_was_captured(graph: FakeGraph) -> None:
    model, x = model_of(), batches()[0]
    with gradflow.watch(model):
        with graph:
            backward(model, x)
        graph.replay()
    modules = list(model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    graph.replay()  # the graph itself goes on


def test_more_calls_than_there_is_room_for_are_an_error_that_says_what_to_do(
    graph: FakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rows, "ROWS_PER_LAYER", 1)
    model, x = model_of(), batches()[0]
    with pytest.raises(UsageError, match=r"have \d+ rows.*watch fewer layers"):  # noqa: SIM117
        with gradflow.watch(model), graph:
            backward(model, x)


def test_a_build_for_cuda_on_a_machine_without_a_driver_can_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There torch raises when it is asked about its stream."""

    def no_driver() -> bool:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", no_driver)
    assert not runpy.run_path(device_rows.__file__)["is_capturing"]()


def test_parameters_of_which_a_rank_has_a_shard_have_a_row_in_graphs(
    graph: FakeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is another tensor whenever it is asked for."""
    monkeypatch.setattr("gradflow.watching.parameters.local_part", lambda x: x.detach())
    alike(captured_step(graph), eager())


# What no tap may do: wait for the device.


def test_taps_read_nothing_and_a_step_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of `meta` have no numbers: whatever asks for one raises."""
    read: list[int] = []

    def counted(pools: Any, others: Any) -> Any:
        tables = {pool: [[1.0] * table.shape[1]] * len(table) for pool, table in shapes(pools)}
        read.append(sum(map(len, tables.values())))
        return tables, [np.ones(tuple(other.shape)) for other in others]

    monkeypatch.setattr("gradflow.watching.flow.to_host", counted)
    monkeypatch.setattr(
        "gradflow.watching.recorder._format", lambda x: x.dtype
    )  # no autocast there
    model = chain(Residual).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradflow.watch(model, every=2) as flow:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.empty(SAMPLES, 3, WIDTH, device="meta")).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            optimizer.step()
    assert len(read) == 3
    assert all(read)
    assert list(flow.layers.step.unique()) == [0, 2, 4]


def shapes(pools: Any) -> Iterator[tuple[Any, Tensor]]:
    for pool in pools:
        yield pool, pool.table()


def test_meta_tensors_do_refuse_to_be_read() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(1, device="meta").item()


def test_taps_are_what_reduce_overhead_leaves_out_of_its_graphs() -> None:
    from torch._inductor import utils

    unsafe = getattr(utils, "is_cudagraph_unsafe_fx_node", None)  # torch 2.13 has it
    found = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        taps = [node for node in graph.graph.nodes if "gradflow" in str(node.target)]
        found.extend(taps)
        if unsafe is not None:
            assert not any(unsafe(node) for node in graph.graph.nodes if node not in taps)
        return graph.forward

    torch.compiler.reset()
    model = chain(Residual)
    with gradflow.watch(model):
        torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, WIDTH))
    assert len(found) == 4
    for node in found:
        target = getattr(node.target, "_opoverload", node.target)
        assert torch.Tag.cudagraph_unsafe in target.tags
    for op in (_tap, _tap_gradient):
        assert torch.Tag.cudagraph_unsafe in op._opoverload.tags


# On a GPU.


def cuda_step(model: nn.Module, x: Tensor, optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=False)
    backward(model, x)
    optimizer.step()


@NEEDS_GPU
def test_a_real_graph_gives_the_numbers_of_every_replay() -> None:
    model = model_of().cuda()
    optimizer, x = optimizer_of(model), batches(device="cuda")[0].clone()
    with gradflow.watch(model) as flow:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cuda_step(model, x, optimizer)
        torch.cuda.current_stream().wait_stream(stream)
        made = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made):
            cuda_step(model, x, optimizer)
        for batch in batches(device="cuda")[1:]:
            x.copy_(batch)
            made.replay()
            flow.end_step()
    same_on_gpu(flow)


@NEEDS_GPU
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reduce_overhead_gives_the_numbers_of_eager() -> None:
    torch.compiler.reset()
    model = model_of().cuda()
    optimizer = optimizer_of(model)
    with gradflow.watch(model) as flow:
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for batch in batches(device="cuda"):
            torch.compiler.cudagraph_mark_step_begin()
            cuda_step(compiled, batch, optimizer)
    same_on_gpu(flow)


def same_on_gpu(flow: Flow) -> None:
    bare = eager()
    for a, b in zip(flow.run.layer_records, bare.run.layer_records, strict=True):
        for name in ("act_rms", "grad_norm", "gain", "identity_share", "param_grad_norm"):
            value = getattr(b, name)
            wanted = value if value is None else pytest.approx(value, rel=1e-6)
            assert getattr(a, name) == wanted


@NEEDS_GPU
def test_taps_do_not_wait_for_the_gpu() -> None:
    model, x = model_of().cuda(), batches(device="cuda")[0]
    optimizer = optimizer_of(model)
    with gradflow.watch(model, every=10**6) as flow:
        cuda_step(model, x, optimizer)
        flow._recorder.active = flow._parameters.active = True
        torch.cuda.set_sync_debug_mode("error")
        try:
            backward(model, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
