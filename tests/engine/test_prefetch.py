"""The next layer is drawn while this one computes: the order of it, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count

import pytest
import torch
from no_sync import no_sync
from policy_numbers import SPANS, numbers
from problems import CPU, network, small, thinned
from recorded import NoReading
from torch import Tensor

from gradflow.engine.build import RebuiltBlocks, build_network, prefetcher_on
from gradflow.engine.memory import footprint
from gradflow.engine.plan import Footprint, Plan, choose
from gradflow.engine.tape import Network
from gradflow.engine.timing import CudaClock, bare_pass, timed_pass
from gradflow.engine.walk import walk
from gradflow.networks.stack import build_block, redraw
from gradflow.schemes import SCHEMES
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec


class Fake:
    """Does the work at once: the earliest that a second stream could."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.owned: list[Tensor] = []
        self._names = count(1)

    def owns(self, tensors: Iterable[Tensor]) -> None:
        self.owned += tensors

    def start(self, work: Callable[[], None]) -> Callable[[], None]:
        name = next(self._names)
        self.log.append(f"start {name}")
        return self._begun(work, lambda: self.log.append(f"wait {name}"))

    def _begun(self, work: Callable[[], None], waited: Callable[[], None]) -> Callable[[], None]:
        work()
        return waited

    def wait(self, done: Callable[[], None]) -> None:
        done()


class Late(Fake):
    """Does the work when it is waited for: the latest that a second stream could."""

    def _begun(self, work: Callable[[], None], waited: Callable[[], None]) -> Callable[[], None]:
        def finish() -> None:
            work()
            waited()

        return finish


def rebuilt(spec: StackSpec, ahead: Fake | None, alive: int = 1) -> Network:
    return replace(network(spec), blocks=RebuiltBlocks(spec, 0, CPU, alive, prefetcher=ahead))


@pytest.mark.parametrize("kind", [Fake, Late])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("depth", thinned([9, 1, 4]))
def test_the_numbers_are_those_of_layers_that_are_drawn_when_they_are_asked_for(
    depth: int, spans: tuple[int, ...], kind: type[Fake]
) -> None:
    spec = small("transformer", depth=depth)
    plain = numbers(spec, rebuilt(spec, None, spans[-1]), spans)
    assert numbers(spec, rebuilt(spec, kind(), spans[-1]), spans) == plain


@pytest.mark.parametrize("kind", [Fake, Late])
@pytest.mark.parametrize("scheme", ["mix-ln", "stochastic-depth", "ngpt", "admin", "denseformer"])
def test_so_they_are_where_layers_are_of_several_kinds(scheme: str, kind: type[Fake]) -> None:
    spec = StackSpec(scheme=scheme, depth=8, width=16, batch_size=2)
    plain = numbers(spec, rebuilt(spec, None), (3, 1))
    assert numbers(spec, rebuilt(spec, kind()), (3, 1)) == plain


def asked(blocks: RebuiltBlocks, *layers: int) -> None:
    for layer in layers:
        _ = blocks[layer - 1]


def test_each_layer_is_started_before_the_last_is_done_and_waited_for_before_it_is_used() -> None:
    """Up and down again; the first two have no module yet that could be drawn ahead."""
    fake = Fake()
    blocks = RebuiltBlocks(small("mlp", depth=5), 0, CPU, prefetcher=fake)
    asked(blocks, 1, 2)
    assert fake.log == ["start 1"]
    asked(blocks, 3)
    assert fake.log == ["start 1", "wait 1", "start 2"]
    asked(blocks, 4, 5)
    assert fake.log[3:] == ["wait 2", "start 3", "wait 3"]  # there is none above the top
    asked(blocks, 4, 3, 2, 1)
    down = ["start 4", "wait 4", "start 5", "wait 5", "start 6", "wait 6"]
    assert fake.log[6:] == down


def test_a_layer_that_nobody_came_for_is_waited_for_all_the_same() -> None:
    """It may be drawn into the module that the layer in its place will have."""
    fake = Late()
    spec = small("mlp", depth=9)
    blocks = RebuiltBlocks(spec, 0, CPU, prefetcher=fake)
    asked(blocks, 1, 2, 3)
    block = blocks[5]  # layer 6, where 4 was expected
    assert fake.log[-3:] == ["start 2", "wait 2", "start 3"]
    fresh = RebuiltBlocks(spec, 0, CPU)[5]
    assert all(
        torch.equal(p, q) for p, q in zip(block.parameters(), fresh.parameters(), strict=True)
    )


def test_what_is_written_ahead_is_made_known() -> None:
    fake = Fake()
    blocks = RebuiltBlocks(small("mlp", depth=5), 0, CPU, prefetcher=fake)
    asked(blocks, 1, 2, 3, 4)
    modules = [blocks[3], blocks[4]]
    known = {p.data_ptr() for p in fake.owned}
    assert known == {p.data_ptr() for block in modules for p in block.parameters()}


def test_without_a_module_more_the_graph_in_use_would_be_overwritten() -> None:
    """The negative control."""
    spec = small("mlp", depth=6)
    made = rebuilt(spec, Fake(), alive=2)
    assert isinstance(made.blocks, RebuiltBlocks)
    made.blocks._places = 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        numbers(spec, made, (2,))


def test_on_cpu_nothing_is_drawn_ahead_and_none_of_it_is_in_the_estimate() -> None:
    assert prefetcher_on(CPU) is None
    assert footprint(small("mlp"), 0, CPU).prefetched_layers == 0


def test_the_estimate_has_the_layer_that_is_drawn_ahead() -> None:
    size = Footprint(parameters=1000, objects=0, graph=0, stream=0, rows=0)
    options = RunOptions(keep="boundaries", rebuild=True, timing=False)
    (plain, _), (more, _) = (
        choose(8, replace(size, prefetched_layers=n), options, 1 << 30) for n in (0, 1)
    )
    assert more.needed - plain.needed == pytest.approx(1200, abs=1)  # with the allocator's share


META = torch.device("meta")
SCHEMED = [scheme for scheme in SCHEMES if scheme not in ("stochastic-depth", "admin")]


@pytest.mark.parametrize("scheme", SCHEMED)
def test_a_layer_is_drawn_again_without_a_copy_from_the_host(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """On a device without values; its random numbers are left out, for it has no generator."""
    monkeypatch.setattr("gradflow.networks.stack.generator", lambda *_: None)
    monkeypatch.setattr("gradflow.networks.initial._draw", lambda *_: None)
    spec = StackSpec(scheme=scheme, block=SCHEMES[scheme].blocks[0], depth=4)
    block = build_block(spec, 0, 2, META)
    with NoReading():
        redraw(block, spec, 0, 3, META)


# On a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
POLICIES = {
    "resident": Plan(9, (), rebuild=False),
    "rebuilt": Plan(9, (1,), rebuild=True),
    "segments": Plan(9, (3,), rebuild=True),
}


@needs_gpu
@pytest.mark.parametrize("plan", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shortcut", ["residual", "plain"])
def test_no_pass_waits_for_the_device(plan: Plan, dtype: str, shortcut: str) -> None:
    spec = small("transformer", depth=9, dtype=dtype, shortcut=shortcut)
    made = build_network(spec, 0, GPU, plan)
    walk(spec, 0, made, spans=plan.spans).records()  # libraries wait when they are first used
    with no_sync():
        found = walk(spec, 0, made, spans=plan.spans)
    assert len(found.records()[0]) == 2 * 9 + 1


@needs_gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_scheme_waits_for_the_device_in_a_pass(scheme: str) -> None:
    spec = StackSpec(scheme=scheme, block=SCHEMES[scheme].blocks[0], depth=6, width=16)
    plan = Plan(6, (1,), rebuild=True)
    made = build_network(spec, 0, GPU, plan)
    walk(spec, 0, made, spans=plan.spans).records()
    with no_sync():
        walk(spec, 0, made, spans=plan.spans)


@needs_gpu
def test_no_timed_pass_waits_for_the_device() -> None:
    class Marks(CudaClock):
        def seconds(self, marks: object) -> list[float]:
            return [1.0] * (len(marks) - 1)  # type: ignore[arg-type]

    made = build_network(small("transformer"), 0, GPU)
    for _ in range(2):
        timed_pass(made, Marks())
        bare_pass(made, Marks())
    with no_sync():
        timed_pass(made, Marks())
        bare_pass(made, Marks())


@needs_gpu
@pytest.mark.parametrize("name", ["rebuilt", "segments"])
def test_on_a_gpu_layers_drawn_ahead_are_those_drawn_in_turn(name: str) -> None:
    spec, plan = small("transformer", depth=9), POLICIES[name]
    made = build_network(spec, 0, GPU, plan)
    plain = replace(made, blocks=RebuiltBlocks(spec, 0, GPU, plan.alive))
    assert numbers(spec, made, plan.spans) == numbers(spec, plain, plan.spans)
