"""The branches and norms against their equations, and what residual wiring promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from problems import CPU, MODERN, PROBLEMS, STACKS, name, network, retyped, small
from torch import Tensor

from gradflow import networks
from gradflow.engine.tape import Network
from gradflow.engine.walk import walk
from gradflow.networks.blocks import rotate
from gradflow.networks.ends import input_batch
from gradflow.networks.stack import Block, build_block
from gradflow.specs.block_kinds import ACTIVATIONS, BLOCKS
from gradflow.specs.stack import StackSpec

IDENTITIES = tuple(
    spec for spec in STACKS if spec.shortcut == "residual" and spec.norm in {"none", "pre"}
)


def perturbed(spec: StackSpec) -> Block:
    """Layer 1 with every parameter moved, so that no scale is 1 and no shift is 0."""
    block = build_block(spec, 0, 1, CPU)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return block


def equation(spec: StackSpec, block: Block, x: Tensor) -> Tensor:
    """The block as the oracle writes it."""
    for unit, kind in zip(block, spec.kind.units, strict=True):
        x = oracle.unit(spec, kind, oracle.doubles(unit), x, x)
    return x


EQUATIONS = [
    *(retyped(spec, dtype="float64") for spec in STACKS),
    *(small(b, activation=phi, dtype="float64") for b in BLOCKS for phi in ACTIVATIONS),
    *(small(b, causal=True, dtype="float64") for b in ("attention", "transformer")),
    *(retyped(spec, dtype="float64") for spec in MODERN),
]


@pytest.mark.parametrize("spec", EQUATIONS, ids=name)
def test_a_block_is_its_equation(spec: StackSpec) -> None:
    block = perturbed(spec)
    x = input_batch(spec, 0, CPU).requires_grad_()
    y, truth = block(x), equation(spec, block, x)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    (got,), (want,) = (torch.autograd.grad(out, x, g) for out in (y, truth))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_the_equations_can_tell_wirings_apart() -> None:
    """Negative control: the equation of another placement, shortcut or activation is refused."""
    spec = small("resnet", norm="pre", dtype="float64")
    block, x = perturbed(spec), input_batch(spec, 0, CPU)
    for other in ({"norm": "post"}, {"shortcut": "plain"}, {"activation": "gelu"}):
        wrong = equation(retyped(spec, **other), block, x)
        assert (block(x) - wrong).abs().max() > 0.1


WRONG: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, {"activation": "gelu"}),
    (1, {"norm_eps": 1e-5}),
    (3, {"causal": False}),
    (4, {"rope": 9_000.0}),
    (5, {"qk_norm": False}),
    (7, {"rope": 0.0}),
)


@pytest.mark.parametrize(("number", "other"), WRONG)
def test_the_equations_can_tell_parts_apart(number: int, other: dict[str, Any]) -> None:
    spec = retyped(MODERN[number], dtype="float64")
    block, x = perturbed(spec), input_batch(spec, 0, CPU)
    wrong = equation(retyped(spec, **other), block, x)
    assert (block(x) - wrong).abs().max() > 1e-6


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 6, 8)
    scores = (rotate(q, 100.0) @ rotate(k, 100.0).transpose(2, 3))[0, 0]
    for distance in range(-5, 6):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-5, atol=1e-6)
    assert scores.std() > 0.1
    torch.testing.assert_close(rotate(q, 100.0).norm(dim=-1), q.norm(dim=-1))


def test_a_quarter_turn() -> None:
    """The first pair turns by one radian per token, the second by base^(-1/2)."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 1, 4, 4)
    t = torch.arange(4, dtype=torch.float64)
    want = torch.stack([t.cos(), (t / 4).cos(), t.sin(), (t / 4).sin()], 1)
    torch.testing.assert_close(rotate(x, 16.0)[0, 0], want, rtol=0, atol=1e-6)


def silent(spec: StackSpec) -> Network:
    """The stack with f = 0: the parameters of every branch are zero."""
    net = network(spec)
    with torch.no_grad():
        for unit in (unit for block in net.blocks for unit in block.units):
            for p in unit.branch.parameters():
                p.zero_()
    return net


@pytest.mark.parametrize("spec", IDENTITIES, ids=name)
def test_with_f_zero_a_residual_unit_is_the_identity(spec: StackSpec) -> None:
    """Forward and backward, to the last bit."""
    net = silent(spec)
    x = net.x.clone().requires_grad_()
    y = x
    for block in net.blocks:
        y = block(y)
    assert torch.equal(y, x)
    (g,) = torch.autograd.grad(y, x, net.loss.v)
    assert torch.equal(g, net.loss.v)


@pytest.mark.parametrize("spec", IDENTITIES, ids=name)
def test_with_f_zero_the_engine_measures_the_identity(spec: StackSpec) -> None:
    """Its columns too, but for the roundings of their own sums, which are float64's."""
    first, *units = walk(spec, 0, silent(spec)).records()[0]
    for row in units:
        assert (row.gain, row.branch_gain) == (1, 0)
        assert row.skip_gain == pytest.approx(1, abs=1e-14)
        assert (row.grad_norm, row.act_rms) == (first.grad_norm, first.act_rms)
        assert row.log10_grad_norm == pytest.approx(first.log10_grad_norm, abs=1e-14)


@pytest.mark.parametrize("block", ["attention", "transformer"])
def test_a_causal_stack_does_not_look_ahead(block: str) -> None:
    for causal in (True, False):
        net = network(small(block, causal=causal))
        x = net.x.clone().requires_grad_()
        y = x
        for layer in net.blocks:
            y = layer(y)
        (g,) = torch.autograd.grad(y[:, 1].sum(), x)
        assert (g[:, 2:] == 0).all() == causal
        assert (g[:, :2] != 0).any()


@pytest.mark.parametrize("spec", [s for s in STACKS if s.norm_kind == "batchnorm"], ids=name)
def test_batchnorm_uses_the_statistics_of_the_batch_in_either_mode(spec: StackSpec) -> None:
    block, x = perturbed(spec), input_batch(spec, 0, CPU)
    assert torch.equal(block.train()(x), block.eval()(x))
    assert not list(block.buffers())


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_has_its_units_in_order(block: str) -> None:
    spec = small(block)
    rows, params = walk(spec, 0, network(spec)).records()
    units = BLOCKS[block].units
    want = [(0, "input"), *((layer, unit) for layer in (1, 2, 3) for unit in units)]
    assert [(row.layer, row.unit) for row in rows] == want
    assert list(dict.fromkeys((row.layer, row.unit) for row in params)) == want[1:]


def test_every_problem_is_there() -> None:
    """blocks x shortcuts x losses x (no norm + two placements of each kind of the stream).

    The two kinds without statistics meet one loss.
    """
    kinds = {"mlp": 4, "conv": 3, "resnet": 3, "attention": 3, "ffn": 3, "transformer": 3}
    assert len(PROBLEMS) == sum(2 * (3 * (1 + 2 * n) + 2 * 2) for n in kinds.values())


def test_the_guide_names_what_a_branch_may_be_made_of() -> None:
    page = (Path(networks.__file__).parents[1] / "guide" / "your-own.md").read_text()
    assert all(hasattr(networks, name) and f"`{name}`" in page for name in networks.__all__)
