"""The product of lists: every combination once, the invalid ones named, the idle options noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from option_values import another

from gradflow.errors import UsageError
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.grid import DEFAULT_GRID, Cell, expand
from gradflow.specs.run_options import TRAINING_DEFAULTS, RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.stack_fields import BLOCK_OPTIONS

Lists = Mapping[str, Sequence[Any]]


def test_bare_compare_is_the_seed_grid() -> None:
    cells = expand(DEFAULT_GRID).cells
    assert [(c.spec.shortcut, c.spec.norm, c.spec.depth) for c in cells] == list(
        product(("plain", "residual"), ("none", "pre", "post"), (12, 50, 200))
    )
    assert {c.spec.block for c in cells} == {"transformer"}


# Two values of every field, both of which make a network of an mlp or a transformer.
TWO_VALUES: dict[str, list[Any]] = {
    "like": ["gpt2", "llama-7b"],
    "depth": [2, 3],
    "scheme": ["pre-ln", "keel"],
    "block": ["transformer", "ffn"],
    "shortcut": ["residual", "plain"],
    "norm": ["none", "post"],
    "norm_kind": ["layernorm", "rmsnorm"],
    "activation": ["relu", "tanh"],
    "init": ["he", "gpt2"],
    "gain": [0.5, 2.0],
    "weight_var": [1.0, 2.0],
    "bias_var": [0.0, 0.5],
    "norm_eps": [1e-5, 1e-6],
    "width": [64, 128],
    "heads": [2, 4],
    "kv_heads": [2, 4],
    "head_dim": [8, 16],
    "rope": [0.0, 1e4],
    "causal": [True, False],
    "qk_norm": [True, False],
    "ffn_mult": [2, 4],
    "ffn_width": [100, 200],
    "gated": [True, False],
    "bias": ["all", "none"],
    "seq_len": [8, 16],
    "image_size": [8, 16],
    "batch_size": [2, 4],
    "loss": ["cotangent", "ce"],
    "classes": [2, 10],
    "dtype": ["float32", "float64"],
    "device": ["cpu", "cuda"],
    "seed": [0, 1],
    "seeds": [1, 2],
    "timing": [True, False],
    "repeats": [3, 5],
    "time_budget": [0.5, 1.0],
    "raw_range": [True, False],
    "compile": [True, False],
    "together": [True, False],
    "cuda_graphs": [True, False],
    "keep": ["graph", "sqrt"],
    "rebuild": [True, False],
    "memory_limit": ["1GiB", "2GiB"],
    "vanishing": [2.0, 3.0],
    "exploding": [2.0, 3.0],
    "steps": [0, 5],
    "lr": [0.1, 0.2],
    "optimizer": ["adamw", "sgd"],
    "warmup": [0, 5],
    "every": [1, 5],
}
BLOCK_OF = {"image_size": "conv"}


# Folders of weights have tests of their own.
OPTIONS = [f.name for cls in (StackSpec, RunOptions) for f in fields(cls) if f.name != "weights"]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_takes_a_list(name: str) -> None:
    values = TWO_VALUES.get(name) or [first := another(name, None), another(name, first)]
    assert values[0] != values[1]
    block = {"block": [BLOCK_OF.get(name, "transformer")]} if name != "block" else {}
    steps = {"steps": [5]} if name in TRAINING_DEFAULTS else {}
    cells = expand({**block, **steps, name: values}).cells
    assert [getattr(c.spec, name, getattr(c.options, name, None)) for c in cells] == values


def valid(chosen: Mapping[str, Any]) -> StackSpec | None:
    """What the product is checked against: the spec itself decides, option by option."""
    kind = BLOCKS[chosen["block"]]
    kept = {k: v for k, v in chosen.items() if k not in BLOCK_OPTIONS or k in kind.options}
    if kept["norm"] == "none":
        kept.pop("norm_kind", None)
    try:
        return StackSpec(**kept)
    except UsageError:
        return None


@given(
    block=st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=3),
    norm=st.lists(st.sampled_from(["none", "pre", "post"]), min_size=1, max_size=3),
    norm_kind=st.lists(st.sampled_from(["layernorm", "batchnorm", "groupnorm"]), max_size=2),
    heads=st.lists(st.integers(1, 5), max_size=3),
    width=st.lists(st.integers(6, 16), min_size=1, max_size=2),
)
def test_cells_are_the_valid_part_of_the_product(**chosen: Any) -> None:
    lists: Lists = {name: values for name, values in chosen.items() if values}
    combinations = [dict(zip(lists, v, strict=True)) for v in product(*lists.values())]
    wanted = [spec for c in combinations if (spec := valid(c))]
    if not wanted:
        with pytest.raises(UsageError):
            expand(lists)
        return
    grid = expand(lists)
    assert [cell.spec for cell in grid.cells] == list(dict.fromkeys(wanted))
    assert bool(grid.skipped) == (len(wanted) < len(combinations))


def test_invalid_cells_are_named_with_the_rule() -> None:
    grid = expand({"block": ["mlp", "attention"], "heads": [4, 3], "depth": [1, 2]})
    assert len(grid.cells) == 4
    assert grid.skipped == (
        "--block attention --heads 3 --depth 1: --heads divides --width",
        "--block attention --heads 3 --depth 2: --heads divides --width",
    )


def test_a_norm_kind_that_a_stream_lacks_is_skipped_there() -> None:
    grid = expand({"block": ["mlp", "ffn"], "norm_kind": ["groupnorm"]})
    assert [cell.spec.block for cell in grid.cells] == ["mlp"]
    rule = "--norm-kind groupnorm is not defined on tokens"
    assert grid.skipped == (f"--block ffn: {rule}",)


def test_equal_cells_are_one() -> None:
    assert len(expand({"depth": [3, 3, 3]}).cells) == 1
    norms = expand({"norm": ["none", "pre"], "norm_kind": ["layernorm", "rmsnorm"]})
    assert [(c.spec.norm, c.spec.norm_kind) for c in norms.cells] == [
        ("none", None),
        ("pre", "layernorm"),
        ("pre", "rmsnorm"),
    ]


@pytest.mark.parametrize(
    ("lists", "note"),
    [
        ({"block": ["mlp", "ffn"], "heads": [4]}, "--heads does not apply to --block mlp"),
        ({"image_size": [8]}, "--image-size does not apply to --block transformer"),
        ({"norm": ["none", "pre"], "norm_kind": ["rmsnorm"]}, "--norm-kind does not apply to"),
    ],
)
def test_options_that_do_not_apply_are_noted(lists: Lists, note: str) -> None:
    assert any(line.startswith(note) for line in expand(lists).notes)


def test_nothing_is_noted_where_all_apply() -> None:
    grid = expand({"block": ["attention", "transformer"], "heads": [2], "norm_kind": ["rmsnorm"]})
    assert (grid.notes, grid.skipped) == ((), ())


@pytest.mark.parametrize("name", ["device", "vanishing", "repeats"])
def test_cells_that_share_their_numbers_stay_apart(name: str) -> None:
    one, other = expand({name: TWO_VALUES[name]}).cells
    assert one.key == other.key
    assert one != other


def test_seeds_have_keys_of_their_own() -> None:
    assert len({cell.key for cell in expand({"seed": [0, 1], "seeds": [1, 2]}).cells}) == 4


@pytest.mark.parametrize("name", ["block", "norm", "init", "activation", "norm_kind", "dtype"])
def test_a_misspelt_name_is_refused_and_the_known_ones_listed(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand({name: ["relu", "tnah"] if name == "activation" else ["tnah"]})
    assert "tnah" in str(caught.value)
    assert StackSpec.__dataclass_fields__[name].metadata["option"].choices[0] in str(caught.value)


def test_a_misspelt_scheme_among_right_ones_is_refused() -> None:
    """Skipped, as a combination that is no network, it would leave a smaller table and exit 0."""
    with pytest.raises(UsageError, match=r"deepnrom.*deepnorm"):
        expand({"scheme": ["pre-ln", "deepnrom"], "depth": [4]})


def test_where_nothing_is_left_the_rule_is_the_error() -> None:
    with pytest.raises(UsageError, match="--heads divides --width"):
        expand({"heads": [3, 5], "width": [128]})


def test_a_measuring_option_that_breaks_a_rule_is_refused() -> None:
    with pytest.raises(UsageError, match="--repeats"):
        expand({"repeats": [3, 0]})


def test_cells_are_hashable_and_compare_by_value() -> None:
    assert {Cell(StackSpec(), RunOptions())} == {Cell(StackSpec(), RunOptions())}
