"""The table of problems: every stack that `StackSpec` accepts, small."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch

from gradflow.engine.tape import Network
from gradflow.engine.walk import walk
from gradflow.errors import UsageError
from gradflow.networks.ends import build_loss, input_batch
from gradflow.networks.stack import build_stack
from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.specs.block_kinds import BLOCKS, NORM_KINDS, POINTWISE
from gradflow.specs.stack import StackSpec
from gradflow.specs.stack_fields import LOSS_KINDS, NORMS, SHORTCUTS

CPU = torch.device("cpu")

# The parts of published transformers that the default block has not, one by one and together.
PARTS: tuple[dict[str, Any], ...] = (
    {"gated": True, "activation": "silu"},
    {"gated": True, "ffn_width": 7, "ffn_mult": None, "norm_eps": 1e-3},
    {"heads": 6, "kv_heads": 2, "head_dim": 4},
    {"heads": 6, "kv_heads": 1, "causal": True},
    {"rope": 10_000.0},
    {"rope": 100.0, "qk_norm": True, "norm_kind": "rmsnorm"},
    {"bias": "none"},
    {"bias": "qkv", "rope": 5.0, "causal": True},
    {
        **{"heads": 6, "kv_heads": 3, "head_dim": 8, "rope": 500.0, "causal": True},
        **{"gated": True, "bias": "none", "norm_kind": "rmsnorm", "activation": "gelu-tanh"},
    },
)

# Groups and batches are wide enough that no norm sees only two values: it would return +-1
# whatever they are, with a gradient of pure rounding.
SIZES: dict[str, dict[str, int]] = {
    "vectors": {"width": 32, "batch_size": 6},
    "tokens": {"width": 12, "batch_size": 3},
    "images": {"width": 16, "batch_size": 4},
}
OPTIONS = {"heads": 3, "ffn_mult": 2, "seq_len": 5, "image_size": 5}


def small(block: str, **options: Any) -> StackSpec:
    """A stack of three layers; biases are random, so that none of them hides behind a zero."""
    kind = BLOCKS[block]
    own = {name: OPTIONS[name] for name in kind.options if name in OPTIONS}
    sizes = SIZES[kind.domain]
    return StackSpec(**{"depth": 3, "block": block, "bias_var": 0.05, **sizes, **own, **options})


def retyped(spec: StackSpec, **changes: Any) -> StackSpec:
    """The same stack, but for some options."""
    return StackSpec.from_json(spec.to_json() | changes)


def network(spec: StackSpec, seed: int = 0) -> Network:
    """One seed of a stack with its input and loss."""
    return Network(
        build_stack(spec, seed, CPU), input_batch(spec, seed, CPU), build_loss(spec, seed, CPU)
    )


def measure(
    spec: StackSpec, seed: int = 0, *, raw_range: bool = False
) -> tuple[list[LayerRecord], list[ParamRecord]]:
    """The engine's records of one seed."""
    return walk(spec, seed, network(spec, seed), raw_range=raw_range).records()


def thinned(cases: Iterable[Any], keep: int = 3) -> list[Any]:
    """A table of cases of which the fast suite takes one in `keep`; CI takes them all."""
    return [
        case if i % keep == 0 else pytest.param(*_values(case), marks=pytest.mark.whole)
        for i, case in enumerate(cases)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


def cell(block: str, shortcut: str, norm: str, kind: str, loss: str) -> StackSpec | None:
    """One cell of the table, or None where `StackSpec` refuses it."""
    try:
        return small(block, shortcut=shortcut, norm=norm, norm_kind=kind, loss=loss)
    except UsageError:
        return None


def name(spec: StackSpec) -> str:
    """The cell as a test id."""
    parts = (spec.block, spec.shortcut, spec.norm, spec.norm_kind, spec.activation, spec.loss)
    return "-".join(part for part in parts if part)


# Kinds without statistics meet one loss only, to keep the table small.
CELLS = tuple(
    cell
    for cell in product(BLOCKS, SHORTCUTS, NORMS, NORM_KINDS, LOSS_KINDS)
    if cell[3] not in POINTWISE or cell[4] == "cotangent"
)
# Stacks with those parts.
MODERN = tuple(small("transformer", **parts) for parts in PARTS)
# Without a norm all kinds of norm are one problem.
PROBLEMS = tuple(dict.fromkeys(spec for c in CELLS if (spec := cell(*c)) is not None))
# The same without the losses, for what happens below the output.
STACKS = tuple(spec for spec in PROBLEMS if spec.loss == "cotangent")
