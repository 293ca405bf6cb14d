"""What ranks see, put together: here without processes; `test_distributed.py` has those."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cells import differences
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from zoo import WIDTH, Residual, chain

import gradflow
from gradflow.watching import Flow, flow
from gradflow.watching.device_rows import MISSING, PARAMETER_NUMBERS
from gradflow.watching.distributed import Ranks, ranks_of, unwrapped
from gradflow.watching.parameters import OwnedParameter, ParameterWatch
from gradflow.watching.step_totals import merged_order

# Of the parameters, whose gradients nobody averages here, and of one rank alone.
NOT_STREAMS = ("param_grad_norm", "log10_param_grad_norm", "grad_cos", "headroom_log2")


class Fake:
    """Ranks that have said before what they have seen."""

    is_first, count = True, 0

    def __init__(self, others: list[Any]) -> None:
        self.said = others

    def gather(self, mine: Any) -> list[Any]:
        self.said = [*self.said, mine]
        return self.said


class Skipping(nn.Module):
    """Two blocks; the second runs for those samples alone that begin with a positive number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual()])

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = x[:, 0, 0] > 0, self.blocks[0](x)
        if chosen.any():
            y = torch.cat([self.blocks[1](y[chosen]), y[~chosen]])
        return y


def watched(kind: type[nn.Module], x: Tensor) -> Flow:
    torch.manual_seed(0)
    model = kind().double() if kind is Skipping else chain(kind, depth=2).double()
    with gradflow.watch(model, "blocks.*") as found:
        model(x).square().sum((1, 2)).mean().backward()
    return found


def on_ranks(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], parts: list[Tensor]) -> Flow:
    """The last of the ranks, each with its part of the batch."""
    fake = Fake([])
    with monkeypatch.context() as patch:
        patch.setattr(flow, "ranks_of", lambda *_: fake)
        patch.setattr(ParameterWatch, "whole", lambda _, rows: rows)
        for x in parts:
            found = watched(kind, x)
    return found


def batch(size: int = 6, tokens: int = 3) -> Tensor:
    x = torch.randn(size, tokens, WIDTH, dtype=torch.float64)
    return x[x[:, 0, 0].argsort()]  # negative ones first


@pytest.mark.parametrize("kind", [Residual, Skipping])
@pytest.mark.parametrize("count", [2, 3])
def test_equal_parts_give_the_numbers_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], count: int
) -> None:
    x = batch()
    alone, last = watched(kind, x), on_ranks(monkeypatch, kind, list(x.chunk(count)))
    assert last.run.spec == alone.run.spec
    records = last.run.layer_records, alone.run.layer_records
    assert differences(*records, 1e-9, NOT_STREAMS) == {}
    for mine, other in zip(*(rows[1:] for rows in records), strict=True):
        assert other.headroom_log2 - mine.headroom_log2 == pytest.approx(math.log2(count))


@pytest.mark.parametrize("place", [0, 5])
def test_a_nan_on_one_rank_is_seen_by_all(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    x = batch()
    x[place, 1, 1] = math.nan
    alone, last = watched(Residual, x), on_ranks(monkeypatch, Residual, list(x.chunk(2)))
    assert differences(last.run.layer_records, alone.run.layer_records, 1e-9, NOT_STREAMS) == {}
    assert last.run.layer_records[1].nonfinite > 0
    assert math.isnan(last.run.layer_records[1].act_max_abs)


def test_one_part_alone_gives_other_numbers() -> None:
    x = batch()
    a, b = (watched(Residual, part).run.layer_records for part in (x, x[:3]))
    assert {"act_rms", "grad_norm", "gain"} <= {name for _, name in differences(a, b, 1e-6)}


class Shards:
    """Ranks that hold the shards of one parameter; `add` gives what they have together."""

    def __init__(self, parts: list[Tensor], held: int) -> None:
        self.parts, self.held, self.count = parts, held, len(parts) * held

    def add(self, mine: np.ndarray) -> np.ndarray:
        rows = [[part.norm(), part.norm() / 2, 3.0, MISSING, 0.0] for part in self.parts]
        there = [np.array([row]) != MISSING for row in rows]
        power = [2.0, 2.0, 1.0, 2.0, 2.0]
        sums = [np.where(t, np.array([r]), 0) ** power for t, r in zip(there, rows, strict=True)]
        assert mine.shape == (2, 1, len(PARAMETER_NUMBERS))
        return np.stack([sum(sums), self.held * sum(t.astype(float) for t in there)])


@given(cuts=st.lists(st.integers(0, 12), max_size=3), held=st.integers(1, 3))
@settings(max_examples=20)
def test_norms_of_shards_are_those_of_the_parameter(cuts: list[int], held: int) -> None:
    whole = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [whole[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 12], strict=True)]
    ranks: Any = Shards(parts, held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradflow.watching.parameters.is_sharded", lambda _: True)
        patch.setattr("gradflow.watching.parameters.copies_of", lambda *_: held)
        watch = ParameterWatch([OwnedParameter(0, "weight", nn.Parameter(parts[0]))], ranks)
        mine = np.array([[parts[0].norm().item(), 0.0, 3.0, MISSING, 0.0]])
        (row,) = watch.whole(mine)
    size = whole.norm().item()
    assert row == pytest.approx([size, size / 2, 3.0 * len(parts), MISSING, 0.0], rel=1e-12)


def test_keys_that_no_list_has_together_are_in_the_order_of_their_places() -> None:
    lists = [[(0, 0), (2, 0), (3, 0)], [(0, 0), (1, 0), (3, 0)], [(0, 0), (4, 0), (3, 0)]]
    wanted = [(0, 0), (1, 0), (2, 0), (4, 0), (3, 0)]
    assert merged_order(lists) == wanted
    assert merged_order([[(1, 0), (0, 0)], [(1, 0), (2, 0), (0, 0)]]) == [(1, 0), (2, 0), (0, 0)]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DistributedDataParallel(chain(Residual, depth=2))
    for name in ("gather", "add"):
        monkeypatch.setattr(Ranks, name, lambda *_: pytest.fail("nobody is there"))
    assert ranks_of(model) is None
    assert ranks_of(nn.Linear(2, 2), dist.group.WORLD) is None
    assert unwrapped(model) is model.module
    with gradflow.watch(model) as found:
        model(torch.randn(2, WIDTH)).sum().backward()
    assert found.is_first
    assert "ranks" not in found.run.environment
    assert [row.unit for row in found.run.layer_records] == ["input", "blocks.0", "blocks.1"]
