"""What `StackSpec` and `RunOptions` take, refuse and write."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from one_line import assert_one_line
from option_values import another
from problems import CELLS, cell

from gradflow.errors import UsageError
from gradflow.specs.block_kinds import ACTIVATIONS, BLOCKS, NORM_KINDS
from gradflow.specs.published_shapes import SHAPES
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec, run_key
from gradflow.specs.stack_fields import DTYPES, INITS, LOSS_KINDS, NORMS, SHORTCUTS

NAMES = {
    "block": tuple(BLOCKS),
    "shortcut": SHORTCUTS,
    "norm": NORMS,
    "norm_kind": NORM_KINDS,
    "activation": ACTIVATIONS,
    "init": INITS,
    "loss": LOSS_KINDS,
    "dtype": DTYPES,
}

# Options, then what the one line has to name: the rule, what arrived, what to do.
REFUSED: list[tuple[dict[str, Any], tuple[str, str, str]]] = [
    ({"depth": 0}, ("--depth is a whole number of at least 1", "got 0", "use --depth 1")),
    ({"depth": -1}, ("--depth is a whole number of at least 1", "got -1", "use --depth 1")),
    ({"depth": 2.0}, ("--depth is a whole number", "got 2.0", "use --depth")),
    ({"depth": True}, ("--depth is a whole number", "got True", "use --depth")),
    ({"depth": "12"}, ("--depth is a whole number", "got 12", "use --depth")),
    ({"width": 0}, ("--width is a whole number", "got 0", "use --width")),
    ({"width": False}, ("--width is a whole number", "got False", "use --width")),
    ({"batch_size": 0}, ("--batch-size is a whole number", "got 0", "use --batch-size")),
    ({"seq_len": 0}, ("--seq-len is a whole number", "got 0", "use --seq-len")),
    ({"heads": 0}, ("--heads is a whole number", "got 0", "use --heads")),
    ({"heads": True}, ("--heads is a whole number", "got True", "use --heads")),
    ({"ffn_mult": -4}, ("--ffn-mult is a whole number", "got -4", "use --ffn-mult")),
    ({"block": "conv", "image_size": 0}, ("--image-size is a whole number", "got 0", "use")),
    ({"classes": 1}, ("--classes is a whole number of at least 2", "got 1", "--classes 2")),
    ({"heads": 5}, ("--heads divides --width", "--width 128 --heads 5", "--heads 4")),
    ({"kv_heads": 3}, ("--kv-heads divides --heads", "--heads 4 --kv-heads 3", "--kv-heads 2")),
    ({"head_dim": 0}, ("--head-dim is a whole number", "got 0", "use --head-dim")),
    ({"head_dim": 3, "rope": 10.0}, ("--rope rotates pairs", "got 3", "even --head-dim")),
    ({"rope": -1.0}, ("--rope is a finite number", "got -1.0", "use")),
    ({"norm_eps": 0.0}, ("--norm-eps is a finite number above 0", "got 0.0", "use")),
    ({"gated": 1}, ("--gated is true or false", "got 1", "use --gated or --no-gated")),
    (
        {"ffn_mult": 4, "ffn_width": 512},
        ("an ffn has one hidden width", "--ffn-mult 4 --ffn-width 512", "leave out"),
    ),
    ({"heads": 256}, ("--heads divides --width", "--width 128 --heads 256", "--heads 128")),
    ({"gain": 0.0}, ("--gain is a finite number above 0", "got 0.0", "use")),
    ({"gain": True}, ("--gain is a finite number above 0", "got True", "use")),
    *(
        ({name: bad}, (f"--{name.replace('_', '-')} is a finite number", f"got {bad!r}", "use"))
        for name in ("gain", "weight_var", "bias_var")
        for bad in (-1.0, math.nan, math.inf, -math.inf)
    ),
    ({"weight_var": 0.0}, ("--weight-var is a finite number above 0", "got 0.0", "use")),
    (
        {"block": "conv", "norm_kind": "rmsnorm"},
        ("rmsnorm is not defined on images", "--block conv", "batchnorm, layernorm, groupnorm"),
    ),
    (
        {"block": "ffn", "norm_kind": "groupnorm"},
        ("groupnorm is not defined on tokens", "--block ffn", "layernorm, rmsnorm, batchnorm"),
    ),
    (
        {"block": "mlp", "norm_kind": "groupnorm", "width": 12},
        ("groups divide --width", "got 12", "multiple of 8"),
    ),
    (
        {"block": "mlp", "norm_kind": "batchnorm", "batch_size": 1},
        ("batchnorm takes its statistics from two values", "one", "raise --width"),
    ),
    (
        {"causal": True, "norm_kind": "batchnorm"},
        ("batchnorm mixes the tokens", "--causal --norm-kind batchnorm", "layernorm"),
    ),
    *(
        (
            {"block": block, name: value},
            (f"--{flag} applies to", f"got --block {block}", f"leave out --{flag}"),
        )
        for block, name, flag, value in (
            ("mlp", "heads", "heads", 4),
            ("ffn", "heads", "heads", 4),
            ("ffn", "causal", "causal", True),
            ("attention", "ffn_mult", "ffn-mult", 4),
            ("attention", "gated", "gated", True),
            ("mlp", "bias", "bias", "none"),
            ("ffn", "rope", "rope", 10_000.0),
            ("conv", "seq_len", "seq-len", 32),
            ("transformer", "image_size", "image-size", 16),
        )
    ),
    *(
        ({name: "nonsense"}, ("is one of the known names", "got nonsense", ", ".join(known)))
        for name, known in NAMES.items()
    ),
]


def ident(case: object) -> str:
    return " ".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("options", "parts"), REFUSED, ids=ident)
def test_a_bad_value_is_refused_in_one_line(
    options: dict[str, Any], parts: tuple[str, str, str]
) -> None:
    with pytest.raises(UsageError) as caught:
        StackSpec(**options)
    assert_one_line(caught.value, parts)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"seed": -1}, "--seed is a whole number of at least 0"),
        ({"seed": True}, "--seed is a whole number"),
        ({"seeds": 0}, "--seeds is a whole number of at least 1"),
        ({"repeats": 0}, "--repeats is a whole number of at least 1"),
        *(
            ({name: bad}, f"--{name.replace('_', '-')} is a finite number above 0")
            for name in ("time_budget", "vanishing", "exploding")
            for bad in (-1.0, math.nan, math.inf)
        ),
    ],
    ids=ident,
)
def test_a_bad_option_is_refused_in_one_line(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError) as caught:
        RunOptions(**options)
    (bad,) = options.values()
    assert_one_line(caught.value, (rule, f"got {bad!r}", "use"))


def test_the_table_leaves_out_only_norms_that_do_not_exist() -> None:
    """A cell is refused where its norm is not defined on its stream, and nowhere else."""
    undefined = {
        *product(("conv", "resnet"), ("rmsnorm",)),
        *product(("attention", "ffn", "transformer"), ("groupnorm",)),
    }
    refused = {c for c in CELLS if cell(*c) is None}
    assert refused == {c for c in CELLS if c[2] != "none" and (c[0], c[3]) in undefined}


@pytest.mark.parametrize("cls", [StackSpec, RunOptions])
def test_an_unknown_field_lists_the_known_ones(cls: Any) -> None:
    with pytest.raises(UsageError) as caught:
        cls.from_json({"dept": 3})
    assert_one_line(caught.value, (cls.__name__, "got dept", "use "))
    assert all(f.name in caught.value.remedy for f in fields(cls))


def test_defaults_depend_on_the_block() -> None:
    got = {
        block: (spec.norm_kind, spec.activation, spec.batch_size, spec.heads, spec.image_size)
        for block in BLOCKS
        for spec in (StackSpec(block=block),)
    }
    assert got == {
        "mlp": ("layernorm", "relu", 64, None, None),
        "conv": ("batchnorm", "relu", 8, None, 16),
        "resnet": ("batchnorm", "relu", 8, None, 16),
        "attention": ("layernorm", "gelu", 8, 4, None),
        "ffn": ("layernorm", "gelu", 8, None, None),
        "transformer": ("layernorm", "gelu", 8, 4, None),
    }


def test_a_spec_is_frozen() -> None:
    with pytest.raises(AttributeError):
        StackSpec().depth = 3  # type: ignore[misc]


maybe = st.none


def numbers(low: float) -> Any:
    return st.floats(low, 1e6, allow_nan=False)


OPTIONAL = ("shortcut", "norm", "norm_kind", "activation", "init")
SPECS = st.fixed_dictionaries(
    {
        "like": maybe() | st.sampled_from(list(SHAPES)),
        **{name: st.sampled_from(known) for name, known in NAMES.items() if name not in OPTIONAL},
        **{name: maybe() | st.sampled_from(NAMES[name]) for name in OPTIONAL},
        "depth": maybe() | st.integers(1, 10_000),
        "width": maybe() | st.sampled_from([8, 12, 64, 128]),
        "batch_size": maybe() | st.integers(1, 100),
        "gain": numbers(1e-6),
        "weight_var": maybe() | numbers(1e-6),
        "bias_var": maybe() | numbers(0),
        "classes": st.integers(2, 1000),
    }
)
OWN = {
    "heads": st.sampled_from([1, 2, 4]),
    "kv_heads": st.sampled_from([1, 2]),
    "head_dim": st.sampled_from([2, 16]),
    "rope": st.sampled_from([0, 10_000]),
    "gated": st.booleans(),
    "causal": st.booleans(),
    "ffn_mult": st.integers(1, 8),
    "seq_len": st.integers(1, 64),
    "image_size": st.integers(1, 32),
}


@given(options=SPECS, own=st.fixed_dictionaries({}, optional=OWN))
def test_json_brings_back_the_same_spec(options: dict[str, Any], own: dict[str, Any]) -> None:
    known = BLOCKS[options["block"]].options
    try:
        spec = StackSpec(**options, **{k: v for k, v in own.items() if k in known})
    except UsageError:
        assume(False)
    again = StackSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert run_key(again, RunOptions()) == run_key(spec, RunOptions())


@given(
    st.builds(
        RunOptions,
        seed=st.integers(0, 2**63),
        seeds=st.integers(1, 100),
        raw_range=st.booleans(),
        repeats=st.integers(1, 100),
        vanishing=numbers(1e-6),
        time_budget=numbers(1e-6),
    )
)
def test_json_brings_back_the_same_options(options: RunOptions) -> None:
    assert RunOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    assert len(options.all_seeds) == options.seeds
    assert options.all_seeds[0] == options.seed


# For every field a value other than the one in BASES.
BASES = {
    "tokens": StackSpec(block="transformer"),
    "images": StackSpec(block="resnet"),
}
CHANGES: dict[str, Any] = {
    "like": "gpt2",
    "depth": 13,
    "scheme": "pre-ln",
    "block": "attention",
    "shortcut": "plain",
    "norm": "post",
    "norm_kind": "batchnorm",
    "activation": "tanh",
    "init": "torch",
    "gain": 1.5,
    "weight_var": 1.0,
    "bias_var": 0.0,
    "norm_eps": 1e-6,
    "width": 64,
    "heads": 2,
    "kv_heads": 2,
    "head_dim": 16,
    "rope": 10_000.0,
    "causal": True,
    "qk_norm": True,
    "ffn_mult": 2,
    "ffn_width": 300,
    "gated": True,
    "bias": "none",
    "seq_len": 16,
    "image_size": 8,
    "batch_size": 4,
    "loss": "ce",
    "classes": 20,
    "dtype": "float64",
}


@pytest.mark.parametrize("name", [f.name for f in fields(StackSpec) if f.name != "weights"])
def test_the_key_depends_on_every_field(name: str) -> None:
    base = BASES["images" if name == "image_size" else "tokens"]
    without = {
        "block": {"ffn_mult": None, "gated": None},
        "ffn_width": {"ffn_mult": None},
        "scheme": {"norm": None},
    }.get(name, {})
    usual = getattr(base, name)
    changes = {name: CHANGES[name] if name in CHANGES else another(name, usual)} | without
    assert run_key(replace(base, **changes), RunOptions()) != run_key(base, RunOptions())


def test_the_key_names_the_numbers_and_not_how_they_are_timed() -> None:
    key = run_key(StackSpec(), RunOptions())
    for other in ({"seed": 1}, {"seeds": 2}, {"raw_range": True}):
        assert run_key(StackSpec(), RunOptions(**other)) != key
    for same in ({"timing": False}, {"repeats": 9}, {"vanishing": 5.0}, {"device": "cpu"}):
        assert run_key(StackSpec(), RunOptions(**same)) == key


def test_the_key_is_the_same_in_another_process() -> None:
    code = (
        "from gradflow.specs.run_options import RunOptions\n"
        "from gradflow.specs.stack import StackSpec, run_key\n"
        "print(run_key(StackSpec(), RunOptions()))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {run_key(StackSpec(), RunOptions())}
    assert all(len(key) == 8 and int(key, 16) >= 0 for key in keys)


@pytest.mark.parametrize("name", ["weight_var", "bias_var", "gain"])
def test_equal_specs_have_equal_keys(name: str) -> None:
    whole, real = StackSpec(**{name: 2}), StackSpec(**{name: 2.0})
    assert whole == real
    assert run_key(whole, RunOptions()) == run_key(real, RunOptions())


@pytest.mark.parametrize("bad", ["no", 1, 0.0])
def test_causal_is_true_or_false(bad: object) -> None:
    with pytest.raises(UsageError):
        StackSpec(causal=bad)  # type: ignore[arg-type]


def test_an_unknown_norm_kind_is_refused_without_a_norm_too() -> None:
    with pytest.raises(UsageError):
        StackSpec(norm="none", norm_kind="nonsense")


@pytest.mark.parametrize(
    "options",
    [
        {"block": "ffn", "norm_kind": "batchnorm", "batch_size": 1, "seq_len": 1},
        {"block": "conv", "norm_kind": "batchnorm", "batch_size": 1, "image_size": 1},
        {"block": "mlp", "norm_kind": "groupnorm", "batch_size": 1, "width": 8},
    ],
    ids=ident,
)
def test_a_norm_over_a_single_value_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        StackSpec(**options)
