"""Training steps: accumulation, clipping, updates, mixed precision, and what ends a step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import WIDTH, Residual, chain

import gradflow
from gradflow.watching import Flow

ACCUMULATED = ("act_rms", "act_max_abs", "grad_norm", "gain", "identity_share", "param_grad_norm")


def model_of(depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return chain(Residual, depth=depth).double()


def batch(size: int = 8) -> Tensor:
    return torch.randn(size, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def column(flow: Flow, name: str, step: int = 0) -> list[Any]:
    rows = flow.run.layer_records
    return [getattr(row, name) for row in rows if row.step == step and row.layer > 0]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def block_parameters(model: nn.Module) -> list[list[Tensor]]:
    return [list(block.parameters()) for block in model.blocks]


def test_micro_batches_give_the_numbers_of_the_batch() -> None:
    x, flows = batch(), []
    for pieces in (1, 4):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradflow.watch(model) as flow:
            for piece in x.chunk(pieces):
                model(piece).square().sum().backward()
            optimizer.step()
        flows.append(flow)
    assert len(flows[1].run.layer_records) == 4
    for name in ACCUMULATED:
        assert column(flows[1], name) == pytest.approx(column(flows[0], name), rel=1e-12)
    assert column(flows[1], "nonfinite") == [0, 0, 0]


def test_micro_batches_may_be_pieces_of_a_tensor_with_a_gradient() -> None:
    """A hook on a piece is called for all of them, with no gradient for the others."""
    flows = []
    for pieces in (1, 4):
        model, x = model_of(), batch().requires_grad_()
        with gradflow.watch(model, "blocks.*") as flow:
            for piece in x.chunk(pieces):
                y = piece
                for block in model.blocks:
                    y = block(y)
                y.square().sum().backward(retain_graph=True)
        flows.append(flow)
    for name in ("act_rms", "grad_norm", "gain"):
        assert column(flows[1], name) == pytest.approx(column(flows[0], name), rel=1e-12)


def test_micro_batches_of_two_sizes_count_by_their_elements() -> None:
    x, flows = batch(), []
    for sizes in ([8], [2, 6]):
        model = model_of()
        with gradflow.watch(model) as flow:
            for piece in x.split(sizes):
                model(piece).square().sum().backward()
        flows.append(flow)
    for name in ("act_rms", "grad_norm", "zero_fraction"):
        assert column(flows[1], name) == pytest.approx(column(flows[0], name), rel=1e-12)


def test_clipping_shows_the_gradient_before_and_after() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradflow.watch(model) as flow:
        model(batch()).square().sum().backward()
        before = [norm([p.grad for p in own]) for own in block_parameters(model)]
        total = nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        optimizer.step()
    assert column(flow, "param_grad_norm") == pytest.approx(before, rel=1e-12)
    clipped = [size * 0.5 / (total + 1e-6) for size in before]
    assert column(flow, "clipped_param_grad_norm") == pytest.approx(clipped, rel=1e-9)


def test_without_clipping_both_are_the_same() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradflow.watch(model) as flow:
        model(batch()).square().sum().backward()
        optimizer.step()
    assert column(flow, "clipped_param_grad_norm") == column(flow, "param_grad_norm")


def test_clipping_in_a_closure_that_the_optimizer_calls_is_seen() -> None:
    """As Lightning does it."""
    flows = []
    for inside in (False, True):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(batch()).square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        with gradflow.watch(model) as flow:
            for _ in range(2):
                if inside:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        flows.append(flow)
    assert column(flows[0], "clipped_param_grad_norm") != column(flows[0], "param_grad_norm")
    pairs = zip(flows[0].run.layer_records, flows[1].run.layer_records, strict=True)
    assert all(outside == inside for outside, inside in pairs)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_update_is_the_change_over_the_size_before(kind: Any) -> None:
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.01)
    before = [[p.detach().clone() for p in own] for own in block_parameters(model)]
    with gradflow.watch(model) as flow:
        model(batch()).square().sum().backward()
        optimizer.step()
    after = [[p.detach() for p in own] for own in block_parameters(model)]
    wanted = [
        norm([v - u for u, v in zip(old, new, strict=True)]) / norm(old)
        for old, new in zip(before, after, strict=True)
    ]
    assert column(flow, "update_ratio") == pytest.approx(wanted, rel=1e-12)
    assert column(flow, "param_norm") == pytest.approx([norm(old) for old in before], rel=1e-12)


def test_plain_sgd_updates_by_the_learning_rate_times_the_gradient() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with gradflow.watch(model) as flow:
        model(batch()).square().sum().backward()
        optimizer.step()
    for row in flow.run.layer_records[1:]:
        wanted = 0.25 * row.param_grad_norm / row.param_norm
        assert row.update_ratio == pytest.approx(wanted, rel=1e-9)


class Sparse(nn.Module):
    """Weights of which only some are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter((0.5 * torch.eye(WIDTH)).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sparse.mm(self.weight, x.T).T


def test_sparse_weights_are_those_that_are_stored() -> None:
    model = nn.Sequential(Sparse(), Sparse()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradflow.watch(model) as flow:
        model(batch()).square().sum().backward()
        grads = [norm([p.grad.coalesce().values()]) for p in model.parameters()]
        optimizer.step()
    size = 0.5 * math.sqrt(WIDTH)
    assert column(flow, "param_norm") == pytest.approx([size] * 2)
    assert column(flow, "param_grad_norm") == pytest.approx(grads)
    assert column(flow, "update_ratio") == pytest.approx([0.01 * g / size for g in grads])


def test_without_an_optimizer_there_is_no_update() -> None:
    with gradflow.watch(model_of()) as flow:
        flow._watched.model(batch()).sum().backward()
    assert column(flow, "update_ratio") == [None] * 3
    assert column(flow, "clipped_param_grad_norm") == [None] * 3


def train(model: nn.Module, steps: int, **options: Any) -> Flow:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with gradflow.watch(model, **options) as flow:
        for _ in range(steps):
            optimizer.zero_grad()
            model(batch()).square().sum().backward()
            optimizer.step()
    return flow


def test_every_measures_the_first_of_so_many_steps() -> None:
    all_steps, some = train(model_of(), 7), train(model_of(), 7, every=3)
    assert list(some.layers.step.unique()) == [0, 3, 6]
    kept = all_steps.layers[all_steps.layers.step.isin([0, 3, 6])]
    assert kept.reset_index(drop=True).equals(some.layers)


def test_training_is_the_same_with_and_without_watch() -> None:
    watched, bare = model_of(), model_of()
    train(watched, 5)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        bare(batch()).square().sum().backward()
        optimizer.step()
    pairs = zip(watched.parameters(), bare.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_optimizer_of_another_model_ends_no_step() -> None:
    model, other = model_of(), model_of()
    strangers = torch.optim.SGD(other.parameters(), lr=0.1)
    with gradflow.watch(model) as flow:
        model(batch()).square().sum().backward()
        strangers.step()
        model(batch()).square().sum().backward()
    assert list(flow.layers.step.unique()) == [0]


def test_a_chosen_optimizer_is_the_only_one_that_counts() -> None:
    model = model_of()
    low = torch.optim.SGD(model.blocks[0].parameters(), lr=0.1)
    high = torch.optim.SGD(model.blocks[1].parameters(), lr=0.1)
    with gradflow.watch(model, optimizer=high) as flow:
        for _ in range(2):
            model(batch()).square().sum().backward()
            low.step()
            high.step()
    assert list(flow.layers.step.unique()) == [0, 1]


def test_two_optimizers_of_one_pass_make_one_step() -> None:
    model = model_of()
    halves = [torch.optim.SGD(block.parameters(), lr=0.1) for block in model.blocks]
    with gradflow.watch(model) as flow:
        for _ in range(2):
            model(batch()).square().sum().backward()
            for half in halves:
                half.step()
    assert list(flow.layers.step.unique()) == [0, 1]


def test_end_step_ends_one_where_no_optimizer_does() -> None:
    model = model_of()
    with gradflow.watch(model) as flow:
        for _ in range(3):
            model(batch()).square().sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.001 * p.grad)
            model.zero_grad()
            flow.end_step()
    assert list(flow.layers.step.unique()) == [0, 1, 2]
    assert len(set(column(flow, "param_norm", 0) + column(flow, "param_norm", 1))) == 6


# Mixed precision.


def test_the_scale_of_the_loss_is_taken_out_exactly() -> None:
    """Powers of two: scaled and unscaled gradients of float64 have the same digits."""
    flows = []
    for enabled in (False, True):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, enabled=enabled)
        with gradflow.watch(model, scaler=scaler) as flow:
            scaler.scale(model(batch()).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert "update" not in vars(scaler)
        flows.append(flow)
    for name in (*ACCUMULATED, "clipped_param_grad_norm", "update_ratio", "log10_grad_norm"):
        assert column(flows[1], name) == pytest.approx(column(flows[0], name), rel=1e-14)
    room = zip(column(flows[0], "headroom_log2"), column(flows[1], "headroom_log2"), strict=True)
    assert all(a - b == pytest.approx(13, abs=1e-9) for a, b in room)


def test_a_step_that_the_scaler_leaves_out_is_a_step_all_the_same() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    with gradflow.watch(model, scaler=scaler) as flow:
        for factor in (1.0, math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(model(batch()).square().sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert list(flow.layers.step.unique()) == [0, 1, 2]
    assert column(flow, "update_ratio", 1) == [None] * 3
    # The first finding counts, whatever comes after it.
    assert (flow.run.summary.verdict, flow.run.summary.first_layer) == ("nonfinite", 3)
    assert all(map(math.isfinite, column(flow, "grad_norm", 2)))


def half_gradient(values: list[float], dtype: torch.dtype) -> Any:
    """The row of a layer whose output gets exactly this gradient."""
    model = nn.Sequential(nn.Linear(2, len(values)).to(dtype), nn.Identity())
    g = torch.tensor([values], dtype=torch.float64).to(dtype)
    with gradflow.watch(model, "1") as flow:
        y = model(torch.ones(1, 2, dtype=dtype))
        y.backward(g)
    return flow.run.layer_records[1]


@pytest.mark.parametrize(
    ("dtype", "smallest", "largest"),
    [(torch.float16, 2.0**-14, 65504.0), (torch.bfloat16, 2.0**-126, 3.3895313892515355e38)],
)
def test_the_range_of_half_precision(dtype: torch.dtype, smallest: float, largest: float) -> None:
    row = half_gradient([smallest, smallest / 2, smallest / 4, 0.0, 1.0], dtype)
    assert row.underflow_fraction == 2 / 5
    assert row.zero_fraction == pytest.approx(1 / 5)
    assert row.headroom_log2 == pytest.approx(math.log2(largest), rel=1e-12)
    assert half_gradient([largest, 1.0], dtype).headroom_log2 == 0.0
    assert half_gradient([math.inf, 1.0], dtype).headroom_log2 == -math.inf


def test_norms_of_half_precision_neither_overflow_nor_round() -> None:
    row = half_gradient([60000.0, 60000.0, 2.0**-24], torch.float16)
    wide = float(torch.tensor(60000.0).half())
    assert row.grad_norm == pytest.approx(math.sqrt(2) * wide, rel=1e-15)
    tiny = half_gradient([2.0**-24], torch.float16)
    assert tiny.log10_grad_norm == pytest.approx(-24 * math.log10(2), rel=1e-15)


def test_wide_formats_have_no_underflow_column() -> None:
    assert half_gradient([1e-40, 1.0], torch.float64).underflow_fraction is None
    assert half_gradient([1.0], torch.float32).headroom_log2 == pytest.approx(128, abs=1e-6)


class Widening(nn.Module):
    """The stream is kept in float32 beside autocast, as many models do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * 2


def test_autocast_counts_what_its_format_would_lose() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Widening())
    with gradflow.watch(model, "1") as flow:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(2, WIDTH))
        assert y.dtype == torch.float32
        y.backward(torch.full_like(y, 2.0**-127))
    assert flow.run.layer_records[1].underflow_fraction == 1.0


def test_a_copy_that_is_made_inside_is_not_watched() -> None:
    """As an average of the weights is: its passes are not those of the model."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    x = torch.randn(2, 4)
    with gradflow.watch(model) as flow:
        model(x).sum().backward()
        copy.deepcopy(model)(100 * x).sum().backward()
    with gradflow.watch(model) as alone:
        model.zero_grad()
        model(x).sum().backward()
    norms = [[row.grad_norm for row in each.run.layer_records] for each in (flow, alone)]
    assert norms[0] == norms[1]


def test_the_step_that_breaks_is_kept() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with pytest.raises(ValueError, match="not finite"), gradflow.watch(model) as flow:  # noqa: PT012
        model(torch.full((2, 4), torch.nan)).sum().backward()
        raise ValueError("not finite")
    assert flow.run.summary.verdict == "nonfinite"
    assert not model[0]._forward_hooks


def test_transforms_of_functions_run_unseen() -> None:
    """torch.func hands tensors around that are no numbers yet."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    weights, x = dict(model.named_parameters()), torch.randn(2, 4)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    want = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    with gradflow.watch(model) as flow:
        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
        model(x).sum().backward()
    assert all(torch.equal(got[name], want[name]) for name in weights)
    assert len(flow.run.layer_records) == 4
