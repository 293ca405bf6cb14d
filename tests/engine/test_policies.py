"""Memory policies: whatever is kept or computed again, the numbers are the same, bit by bit."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from policy_numbers import SPANS, numbers
from problems import CPU, SIZES, STACKS, name, network, retyped, small, thinned

from gradflow.engine.build import RebuiltBlocks
from gradflow.engine.tape import Network, Tape, record_backward, visits
from gradflow.engine.walk import walk
from gradflow.networks.stack import build_block
from gradflow.schemes import SCHEMES
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.stack import StackSpec


def rebuilt(spec: StackSpec, seed: int = 0, alive: int = 1) -> Network:
    resident = network(spec, seed)
    return Network(RebuiltBlocks(spec, seed, CPU, alive), resident.x, resident.loss)


@pytest.mark.parametrize("stack", thinned(STACKS), ids=name)
def test_all_policies_give_the_same_numbers_bit_by_bit(stack: StackSpec) -> None:
    spec = retyped(stack, depth=4)
    plain = numbers(spec, network(spec))
    assert numbers(spec, network(spec), (2,)) == plain
    assert numbers(spec, rebuilt(spec), (1,)) == plain
    assert numbers(spec, rebuilt(spec, alive=3), (3,)) == plain
    assert numbers(spec, rebuilt(spec), (2, 1)) == plain


@pytest.mark.parametrize("scheme", thinned(SCHEMES))
def test_schemes_whose_layers_differ_are_rebuilt_bit_by_bit(scheme: str) -> None:
    spec = StackSpec(scheme=scheme, depth=5, width=16, batch_size=2)
    plain = numbers(spec, network(spec))
    assert numbers(spec, rebuilt(spec), (2, 1)) == plain
    assert numbers(spec, rebuilt(spec, alive=3), (3,)) == plain


IN_BLOCKS = [(name, block) for name, scheme in SCHEMES.items() for block in scheme.blocks]


@pytest.mark.parametrize(("scheme", "block"), thinned(IN_BLOCKS))
def test_every_scheme_is_rebuilt_bit_by_bit_in_every_block(scheme: str, block: str) -> None:
    """Layers that are drawn again at each visit, against layers that stay."""
    spec = StackSpec(scheme=scheme, block=block, depth=3, **SIZES[BLOCKS[block].domain])
    plain, again = network(spec, seed=3), rebuilt(spec, seed=3)
    assert numbers(spec, again, (1,)) == numbers(spec, plain)
    x = plain.x
    for resident, layer in zip(plain.blocks, (1, 2, 3), strict=True):
        played = again.blocks[layer - 1]
        pairs = zip(resident.named_parameters(), played.named_parameters(), strict=True)
        assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)
        assert torch.equal(resident(x), played(x))
        x = resident(x)  # a state of several streams changes its shape on the way


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("depth", [1, 2, 4, 7, 9])
def test_any_spans_at_any_depth(spans: tuple[int, ...], depth: int) -> None:
    spec = small("transformer", depth=depth, loss="ce")
    plain = numbers(spec, network(spec))
    assert numbers(spec, network(spec), spans) == plain
    assert numbers(spec, rebuilt(spec, alive=spans[-1]), spans) == plain


def test_a_module_that_is_reused_too_soon_is_an_error() -> None:
    """The negative control: graphs of three layers, weights of one."""
    spec = small("ffn", depth=6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        numbers(spec, rebuilt(spec), (3,))


@pytest.mark.parametrize("init", ["he", "orthogonal", "torch", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_redrawn_layer_is_that_layer(init: str, dtype: str) -> None:
    spec = small("transformer", init=init, dtype=dtype, depth=6)
    blocks = RebuiltBlocks(spec, 7, CPU)
    for layer in (4, 1, 6, 1):
        fresh, played = build_block(spec, 7, layer, CPU), blocks[layer - 1]
        pairs = zip(fresh.named_parameters(), played.named_parameters(), strict=True)
        assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)
        for mine, theirs in zip(played.units, fresh.units, strict=True):
            assert repr(mine.infos) == repr(theirs.infos)


def test_one_module_plays_all_layers_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("mlp", depth=30)
    made = count()
    build = build_block

    def counted(*args: object) -> object:
        next(made)
        return build(*args)

    monkeypatch.setattr("gradflow.engine.build.build_block", counted)
    numbers(spec, rebuilt(spec, alive=3), (3,))
    assert next(made) == 3


def test_layers_of_different_kinds_never_share_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small("mlp", depth=4)
    monkeypatch.setattr("gradflow.engine.build.layer_kind", lambda _, layer: layer % 2)
    blocks = RebuiltBlocks(spec, 0, CPU)
    assert blocks[0] is blocks[2]
    assert blocks[1] is blocks[3]
    assert blocks[0] is not blocks[1]
    monkeypatch.setattr("gradflow.engine.build.layer_kind", lambda _, layer: layer)
    many = RebuiltBlocks(retyped(spec, depth=100), 0, CPU)
    assert len({id(block) for block in map(many.__getitem__, range(100))}) > 2
    assert len(many._modules) == 8


@pytest.mark.parametrize("spans", [(), *SPANS.values()])
@pytest.mark.parametrize("depth", [1, 3, 10, 16, 17])
def test_visits_are_counted(spans: tuple[int, ...], depth: int) -> None:
    spec = small("mlp", depth=depth)
    ticks, seen = count(), list[int]()
    tapes = record_backward(
        network(spec), spans, lambda tape: seen.append(tape.layer), lambda: next(ticks) and None
    )
    assert [tape.layer for tape in tapes] == list(range(depth, 0, -1))
    assert seen == list(range(1, depth + 1))
    assert next(ticks) == visits(depth, spans)


def test_no_more_graphs_live_than_a_span_has() -> None:
    """Counted by the outputs that are alive while the tapes come."""
    spec = small("mlp", depth=20)
    alive: set[int] = set()

    class Watched(Tape):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradflow.engine.tape.Tape", Watched)
        most = max(len(alive) for _ in record_backward(network(spec), (4,)))
        all_of_them = max(len(alive) for _ in record_backward(network(spec)))
    assert 4 <= most <= 5
    assert all_of_them == 20


@pytest.mark.parametrize("depth", [1, 3, 4, 5, 8, 9])
def test_rows_are_complete_wherever_the_chunks_end(
    monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """Chunks of four rows against one that holds all."""
    spec = small("transformer", depth=depth)
    plain = numbers(spec, network(spec))
    monkeypatch.setattr("gradflow.engine.rows.CHUNK_UNITS", 4)
    assert numbers(spec, network(spec)) == plain


@pytest.mark.parametrize("loss", ["ce", "cotangent"])
def test_rows_that_wait_on_a_device_are_the_same(
    monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """As on CUDA: nothing is read before the pass is over."""
    spec = small("transformer", depth=9, loss=loss)
    plain = numbers(spec, network(spec))
    monkeypatch.setattr("gradflow.engine.rows.CHUNK_UNITS", 4)
    monkeypatch.setattr("gradflow.reductions.is_at_hand", lambda _: False)
    found = walk(spec, 0, rebuilt(spec), spans=(3, 1))
    assert len(found.tables.layers) == 0
    assert repr((found.records(), found.loss.item())) == plain
