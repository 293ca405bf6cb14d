"""DDP and FSDP2: every rank has the numbers that one process has of the whole batch."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from cells import differences
from rank_cases import FOUR, JOBS, Job, together, train

# Of one rank's samples, and of its own loss: another number than that of one process.
OWN = ("grad_cos", "headroom_log2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, tmp_path_factory.mktemp("two"), list(JOBS))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(4, tmp_path_factory.mktemp("four"), list(FOUR))


def assert_alike(found: list[dict[str, Any]], name: str, job: Job) -> None:
    alone = train(job).run
    for layers, params, spec, _ in (one[name] for one in found):
        assert spec == alone.spec
        assert differences(layers, alone.layer_records, 1e-9, OWN) == {}
        assert differences(params, alone.param_records, 1e-9) == {}


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_have_the_numbers_of_one_process(two: list[dict[str, Any]], name: str) -> None:
    assert_alike(two, name, JOBS[name])


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_have_the_numbers_of_one_process(four: list[dict[str, Any]], name: str) -> None:
    assert_alike(four, name, FOUR[name])


@pytest.mark.parametrize("name", [n for n, job in JOBS.items() if not job.spoil])
def test_all_ranks_have_the_very_same_numbers(two: list[dict[str, Any]], name: str) -> None:
    first, second = (one[name][:2] for one in two)
    assert repr(first) == repr(second)


def test_only_the_first_rank_stores_the_run(two: list[dict[str, Any]]) -> None:
    first, second = (one["ddp"][3] for one in two)
    assert second is None
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_other_ways_of_spreading_a_model_are_refused(two: list[dict[str, Any]]) -> None:
    found = two[0]["refused"]
    assert "tensor parallelism; shard with" in found["tensor parallel"]
    assert "split twice, as by tensor parallelism; shard with" in found["both"]
    assert "got FullyShardedDataParallel; shard with" in found["fsdp1"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_headroom_is_that_of_a_ranks_own_gradient(two: list[dict[str, Any]], name: str) -> None:
    alone = train(JOBS[name]).run.layer_records
    for mine, other in zip(two[0][name][0], alone, strict=True):
        assert other.headroom_log2 - mine.headroom_log2 == pytest.approx(1, abs=1e-9)


def test_every_job_has_numbers_in_every_column_that_it_compares() -> None:
    row = train(JOBS["ddp, clipped"]).run.layer_records[1]
    empty = {name for name, value in asdict(row).items() if value is None}
    assert not empty & {"gain", "identity_share", "act_cos", "param_grad_norm", "update_ratio"}
    assert row.clipped_param_grad_norm < row.param_grad_norm / 2


@pytest.mark.parametrize("rank", [0, 1])
def test_half_of_the_batch_gives_other_numbers(rank: int) -> None:
    """Else the ranks would not have to talk to each other."""
    half = replace(JOBS["ddp"], part=(rank, 2))
    whole, mine = (train(job).run.layer_records[-1] for job in (JOBS["ddp"], half))
    for name in ("act_rms", "act_cos", "grad_norm", "gain", "param_grad_norm", "update_ratio"):
        assert not math.isclose(getattr(whole, name), getattr(mine, name), rel_tol=1e-6)
