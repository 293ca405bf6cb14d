"""Published shapes: their numbers against the published ones, and what overrules them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from commandline import CommandLine
from one_line import assert_one_line
from problems import measure
from user_files import scheme_file

from gradflow.errors import UsageError
from gradflow.networks.stack import Block
from gradflow.runs.naming import word
from gradflow.schemes import SCHEMES
from gradflow.specs.grid import expand
from gradflow.specs.published_shapes import SHAPES
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import from_file
from gradflow.theory import predict


def untied(spec: StackSpec) -> int:
    """Token embedding, head and final RMSNorm."""
    return (2 * spec.classes + 1) * spec.width


def gpt(spec: StackSpec) -> int:
    """Token embedding (also the head), positions, final LayerNorm."""
    return (spec.classes + int(spec.seq_len or 0) + 2) * spec.width


def bert(spec: StackSpec) -> int:
    """Tokens, positions, two segments, LayerNorm; the pooler."""
    return (spec.classes + 512 + 2 + 2) * spec.width + spec.width * (spec.width + 1)


def vit(spec: StackSpec) -> int:
    """16 x 16 patches of 3 colours, class token, positions, final LayerNorm."""
    return (16 * 16 * 3 + 1 + 1 + 197 + 2) * spec.width


OUTSIDE = {"gpt": gpt, "bert": bert, "vit": vit}
DEEPNET = "deepnet-1000"


def block_parameters(spec: StackSpec) -> int:
    """Of one layer; published ones have biases of keys, which no gradient reaches."""
    parts = (getattr(part, "shapes", {}) for part in Block(spec).modules())
    keys = spec.width if spec.bias == "all" else 0
    return keys + sum(math.prod(shape) for shapes in parts for shape in shapes.values())


@pytest.mark.parametrize("name", [name for name in SHAPES if name != DEEPNET])
def test_the_parameters_add_up_to_the_published_number(name: str) -> None:
    spec = StackSpec(like=name)
    outside = next((f for part, f in OUTSIDE.items() if name.startswith(part)), untied)(spec)
    total, published = spec.depth * block_parameters(spec) + outside, SHAPES[name].parameters
    if published % 1_000_000:  # an exact count
        assert total == published
    assert total == pytest.approx(published, rel=0.015)
    assert 0 < outside < 0.35 * total


def test_the_thousand_layers_leave_an_embeddings_share_of_the_published_number() -> None:
    """500 of the published layers have cross-attention too; the vocabulary is not known."""
    spec = StackSpec(like=DEEPNET)
    cross = 4 * (spec.width + 1) * spec.width + 2 * spec.width
    share = (spec.depth * block_parameters(spec) + 500 * cross) / SHAPES[DEEPNET].parameters
    assert 0.95 < share < 1


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "qwen3-8b", "bert-large"])
def test_another_shape_has_another_number(name: str) -> None:
    """Negative control: one field off, and the sum is far off."""
    spec = StackSpec(like=name)
    hidden = {"ffn_mult": None, "ffn_width": spec.hidden * 9 // 8}
    for other in ({"depth": spec.depth + 1}, hidden, {"gated": not spec.gated}):
        wrong = replace(spec, **other)
        got = wrong.depth * block_parameters(wrong)
        assert abs(got / (spec.depth * block_parameters(spec)) - 1) > 0.02


def test_qwen3_has_the_published_number_outside_its_embeddings() -> None:
    """6.95 billion, Qwen3-8B's model card."""
    spec = StackSpec(like="qwen3-8b")
    assert round(spec.depth * block_parameters(spec) / 1e9, 2) == 6.95


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_that_of_its_table(name: str) -> None:
    spec = StackSpec(like=name)
    assert {field: getattr(spec, field) for field in SHAPES[name].fields} == SHAPES[name].fields
    assert spec.origin == f"shape of {name}, {SHAPES[name].source}"
    assert StackSpec.from_json(spec.to_json()) == spec


# What is given beside `like`, then some fields that come out.
OVERRULED: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("gpt3-175b", {"depth": 4}, {"depth": 4, "width": 12_288, "heads": 96, "seq_len": 2048}),
    ("llama-7b", {"ffn_mult": 2}, {"ffn_mult": 2, "ffn_width": None}),
    ("gpt2", {"ffn_width": 9}, {"ffn_mult": None, "ffn_width": 9}),
    ("gpt2", {"norm": "post"}, {"norm": "post", "init": "gpt2", "scheme": None}),
    ("gpt2", {"norm": "none"}, {"norm_kind": None}),
    ("gpt2", {"scheme": "deepnorm"}, {"norm": None, "init": "xavier", "scheme": "deepnorm"}),
    ("gpt2", {"block": "attention"}, {"ffn_mult": None, "heads": 12}),
    ("gpt2", {"block": "mlp"}, {"heads": None, "width": 768, "causal": None}),
    ("deepnet-1000", {"norm": "post"}, {"scheme": None, "norm": "post"}),
    ("llama-70b", {"kv_heads": 64, "rope": 0}, {"kv_heads": 64, "rope": 0.0}),
)


@pytest.mark.parametrize(("name", "given", "want"), OVERRULED)
def test_what_is_given_overrules_the_shape(
    name: str, given: dict[str, Any], want: dict[str, Any]
) -> None:
    spec = StackSpec(like=name, **given)
    assert {field: getattr(spec, field) for field in want} == want
    assert StackSpec.from_json(spec.to_json()) == spec


def test_the_heading_says_what_is_not_the_shapes() -> None:
    spec = StackSpec(like="gpt3-175b", depth=4, seq_len=128)
    assert spec.title == "gpt3-175b: residual transformer, pre-layernorm, depth 4"
    assert spec.origin.endswith("D.1; but for --depth 4 --seq-len 128")
    other = StackSpec(like="gpt3-175b", block="mlp", depth=4)
    assert "but for --block mlp --depth 4" in other.origin
    assert word("like", spec.like) == "gpt3-175b"
    assert StackSpec().origin == ""


def test_an_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        StackSpec(like="gpt5")
    assert_one_line(caught.value, ("--like is one of the known names", "got gpt5", "use gpt2,"))
    assert all(name in str(caught.value) for name in SHAPES)


def test_shapes_make_a_grid() -> None:
    grid = expand({"like": ["gpt2", "llama-7b"], "depth": [1, 2], "heads": [4]})
    assert [(c.spec.like, c.spec.depth, c.spec.gated) for c in grid.cells] == [
        *(("gpt2", 1, False), ("gpt2", 2, False)),
        *(("llama-7b", 1, True), ("llama-7b", 2, True)),
    ]


PARTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"rope": 1e4}, "rotary positions without a causal mask"),
    ({"bias": "qkv"}, "biases of queries, keys and values alone"),
    ({"norm_eps": 1e-3}, "another epsilon of the norms"),
)


@pytest.mark.parametrize(("options", "part"), PARTS)
def test_theory_names_the_part_that_it_has_no_formula_for(
    options: dict[str, Any], part: str
) -> None:
    assert predict(StackSpec(**options)).reason == f"no formula for {part}"
    assert predict(StackSpec(bias="none", activation="gelu-tanh", norm_eps=1e-6)).reason is None


def test_theory_wants_values_of_64_features() -> None:
    few = StackSpec(width=128, kv_heads=1, head_dim=32)
    assert str(predict(few).reason).startswith("values of 32 features are too few")
    assert predict(replace(few, kv_heads=2)).reason is None


@pytest.mark.parametrize("name", ["llama-7b", "llama3-8b", "qwen3-8b"])
def test_theory_covers_shapes_with_gates_groups_and_rotary_positions(name: str) -> None:
    """Their own N(0, 0.02) has logits of variance 2.7 but where queries and keys are normalised."""
    spec = StackSpec(like=name, seq_len=64)
    assert ("softmax condenses" in str(predict(spec).reason)) == (not spec.qk_norm)
    he = predict(replace(spec, init="he", scheme="pre-ln", norm=None, shortcut=None))
    assert he.reason is None
    assert he.log10_grad_norm is not None
    assert len(he.log10_grad_norm) == 2 * spec.depth + 1


def test_theory_covers_the_shape_of_gpt2() -> None:
    spec = StackSpec(like="gpt2", depth=6, width=128, heads=4, seq_len=32, batch_size=4)
    rows = [measure(spec, seed)[0] for seed in range(3)]
    profile = [mean(row.log10_grad_norm for row in layer) for layer in zip(*rows, strict=True)]
    band = predict(spec).band(seeds=3)
    assert len(band) == len(profile)
    end = profile[-1]
    for value, (low, high) in zip(profile, band, strict=True):
        assert low <= value - end <= high


SMALL = ("--depth=1", "--width=16", "--heads=2", "--seq-len=4", "--no-timing")


@pytest.fixture
def gradflow(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capsys, tmp_path)


@pytest.mark.slow
def test_a_run_and_a_comparison_take_shapes(gradflow: CommandLine) -> None:
    out = f"--out={gradflow.out}"
    one = gradflow("run", "--like=gpt2", *SMALL, out)
    assert one.code == 0, one.err
    assert "gpt2: residual transformer" in one.out
    assert "but for --depth 1 --width 16" in " ".join(one.out.split())
    both = gradflow("compare", "--like=gpt2,bert-base", *SMALL, out)
    assert both.code == 0, both.err
    assert "1 of 2 cells stored already" in both.err
    assert "gpt2, residual" in both.out
    assert "bert-base, residual" in both.out


TINY = {"depth": 2, "width": 16, "heads": 2, "seq_len": 4}


def test_a_shape_goes_with_a_users_own_scheme(tmp_path: Path) -> None:
    """Read from a stored run, where its code is not loaded, it is the same spec."""
    bare = {"wire": "lambda at: Wiring(b=0.5)", "normalises": "False"}
    own = from_file(scheme_file(tmp_path, **bare))
    spec = StackSpec(like="gpt2", scheme=own, **TINY)
    assert (spec.norm_kind, spec.activation, spec.causal) == (None, "gelu-tanh", True)
    values = spec.to_json()
    stored = StackSpec.from_json(values | {"scheme": own[:-8] + "00000000"})
    assert stored.to_json() | {"scheme": own} == values
    assert "scheme.py:SCHEME transformer" in stored.title
    assert "@" not in stored.title + stored.slug + stored.origin


@pytest.mark.parametrize(
    ("scheme", "option"),
    [
        ("ngpt", {"kv_heads": 1}),
        ("ngpt", {"head_dim": 4}),
        ("ngpt", {"rope": 1e4}),
        ("ngpt", {"bias": "qkv"}),
        ("ngpt", {"bias": "all"}),
        ("ngpt", {"qk_norm": True}),
        ("ngpt", {"gated": False}),
        ("ngpt", {"gain": 2.0}),
        ("fixup", {"gated": True}),
        ("fixup", {"bias": "qkv"}),
        ("fixup", {"bias": "all"}),
    ],
)
def test_options_that_a_scheme_s_own_branches_would_pass_over_are_refused(
    scheme: str, option: dict[str, Any]
) -> None:
    kept = {"block": "transformer", "scheme": scheme} | TINY
    StackSpec(**kept | {"bias": "none"})
    with pytest.raises(UsageError, match=f"--scheme {scheme} decides --") as refused:
        StackSpec(**kept | option)
    name = next(iter(option)).replace("_", "-")
    assert_one_line(refused.value, (f"decides --{name} itself", "got --", "use --"))


@pytest.mark.parametrize("scheme", ["ngpt", "fixup"])
@pytest.mark.parametrize("name", ["bias_var", "weight_var"])
def test_variances_that_a_scheme_s_own_branches_would_pass_over_are_refused(
    scheme: str, name: str
) -> None:
    kept = {"block": "transformer", "scheme": scheme, name: 0.5} | TINY
    if (scheme, name) == ("fixup", "weight_var"):
        assert StackSpec(**kept).weight_var == 0.5
        return
    with pytest.raises(UsageError, match=f"--scheme {scheme} decides --.*; leave out --"):
        StackSpec(**kept)


@pytest.mark.parametrize(
    ("scheme", "true"),
    [("ngpt", {"gated": True, "bias": "none", "gain": 1.0}), ("fixup", {"bias": "none"})],
)
def test_saying_what_a_scheme_has_anyway_is_the_same_spec(
    scheme: str, true: dict[str, Any]
) -> None:
    spec = StackSpec(scheme=scheme, block="transformer", **TINY)
    assert spec == StackSpec(scheme=scheme, block="transformer", **TINY, **true)
    assert spec.to_json().items() >= true.items()
    assert StackSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("scheme", [n for n, scheme in SCHEMES.items() if not scheme.normalises])
def test_a_kind_of_norm_is_refused_where_a_scheme_has_none(scheme: str) -> None:
    with pytest.raises(UsageError, match=f"--scheme {scheme} has no norms; got --norm-kind rms"):
        StackSpec(scheme=scheme, norm_kind="rmsnorm")
    assert StackSpec(scheme=scheme).norm_kind is None
    assert expand({"scheme": [scheme, "pre-ln"], "norm_kind": ["rmsnorm"]}).cells


@pytest.mark.parametrize("design", [{"scheme": "rezero"}, {"norm": "none"}])
def test_queries_and_keys_have_the_kind_of_norm_that_is_given(design: dict[str, Any]) -> None:
    spec = StackSpec(**design, qk_norm=True, norm_kind="rmsnorm", **TINY)
    assert dict(Block(spec).named_modules())["0.branch.q_norm"].kind == "rmsnorm"
    shape = StackSpec(**design, like="qwen3-8b", heads=2, depth=2, width=16, head_dim=8, kv_heads=1)
    assert dict(Block(shape).named_modules())["0.branch.q_norm"].kind == "rmsnorm"


def test_a_shape_s_kind_of_norm_is_left_out_where_a_scheme_has_none() -> None:
    assert StackSpec(like="llama3-8b", scheme="rezero").norm_kind is None


@pytest.mark.parametrize("scheme", ["fixup", "ngpt"])
def test_a_scheme_s_own_ffn_has_the_hidden_width_that_is_given(scheme: str) -> None:
    spec = StackSpec(scheme=scheme, block="transformer", ffn_width=24, **TINY)
    down = dict(Block(spec).named_modules())["1.branch.down"]
    assert down.shapes["weight"] == (16, 24)
