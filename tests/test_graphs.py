"""Captured passes: nothing in them reads a value, and a replay gives the eager numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from problems import PROBLEMS, SIZES, name, network
from recorded import FakeCapture, NoReading, WaitError
from test_policies import numbers
from torch import Tensor, nn

from gradflow.engine.graphs import Graphs
from gradflow.engine.tape import Network
from gradflow.engine.timing import FakeClock, mark_bare, mark_units
from gradflow.engine.walk import walk
from gradflow.schemes import SCHEMES
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.spec import StackSpec

IN_BLOCKS = [(name, block) for name, scheme in SCHEMES.items() for block in scheme.blocks]
SCHEMED = {
    f"{scheme}-{block}": StackSpec(
        scheme=scheme, block=block, depth=3, **SIZES[BLOCKS[block].domain]
    )
    for scheme, block in IN_BLOCKS
}
ALL = {name(spec): spec for spec in PROBLEMS} | SCHEMED


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: nothing is at hand."""
    monkeypatch.setattr("gradflow.stats.is_at_hand", lambda _: False)


def captured(spec: StackSpec, net: Network, capture: FakeCapture, **options: Any) -> str:
    """As `test_policies.numbers`, from a replay."""
    found = Graphs(capture, required=True)(partial(walk, spec, 0, net, **options))()
    return repr((found.records(), found.loss.item()))


# Nothing is read


def on_meta(net: Network) -> Network:
    """The stack on a device that has no values: whatever reads one fails."""
    blocks = [block.to("meta") for block in net.blocks]
    for block in blocks:
        for unit in block.units:
            unit.seal()
    loss = net.loss.to("meta")
    for part in loss.modules():  # what is no parameter
        for key, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(part, key, value.to("meta"))
    return Network(blocks, net.x.to("meta"), loss)


@pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
def test_no_pass_reads_a_value_or_copies_one_to_the_host(spec: StackSpec) -> None:
    net = on_meta(network(spec))
    with NoReading():
        walk(spec, 0, net)
        mark_units(net, FakeClock([1.0]))
        mark_bare(net, FakeClock([1.0]))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.ones(3).to("meta") + x,
        lambda x: x.new_empty(3).copy_(torch.ones(3)),
        torch.rand_like,
        nn.functional.dropout,
    ],
)
def test_what_reads_a_value_is_seen(read: Any) -> None:
    """The negative control."""
    x = torch.ones(3, device="meta")
    with NoReading(), pytest.raises((WaitError, NotImplementedError, RuntimeError)):
        read(x)


# The same numbers


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
def test_a_replay_gives_the_eager_numbers_bit_by_bit(spec: StackSpec) -> None:
    net = network(spec)
    assert captured(spec, net, FakeCapture()) == numbers(spec, net)
