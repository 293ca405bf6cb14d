"""What is known of each block, and of the shape of its stream, before torch is imported."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.user_files import loaded, object_name, without_digest


@dataclass(frozen=True)
class BlockKind:
    """Every fact of a block that needs no torch, in one row.

    A block of one unit is also the branch of that unit, in blocks of several units too.

    Attributes:
        units: the branches, in order.
        domain: the shape of the stream.
        options: those of some blocks only that mean something for this one.
        matrices: names of the branch's weights that a wiring can scale.
        inner_norms: places of norms that stand inside the branch.
    """

    units: tuple[str, ...]
    domain: str
    activation: str
    meaning: str
    options: tuple[str, ...] = ()
    matrices: tuple[str, ...] = ()
    inner_norms: tuple[str, ...] = ()


_ATTENTION = ("heads", "kv_heads", "head_dim", "rope", "causal", "qk_norm")
_FFN = ("ffn_mult", "ffn_width", "gated")
_TOKENS = ("bias", "seq_len")
_IMAGES = ("image_size",)

BLOCKS: dict[str, BlockKind] = {
    "mlp": BlockKind(("mlp",), "vectors", "relu", "phi(Wx + b)", matrices=("linear",)),
    "conv": BlockKind(("conv",), "images", "relu", "phi(conv3x3(x))", _IMAGES, ("conv",)),
    "resnet": BlockKind(
        ("resnet",),
        "images",
        "relu",
        "two 3x3 convolutions (basic block)",
        _IMAGES,
        ("conv1", "conv2"),
    ),
    "attention": BlockKind(
        ("attention",),
        "tokens",
        "gelu",
        "multi-head self-attention",
        (*_ATTENTION, *_TOKENS),
        ("q", "k", "v", "out"),
        ("mid", "query-key", "value"),
    ),
    "ffn": BlockKind(
        ("ffn",),
        "tokens",
        "gelu",
        "Linear, activation, Linear",
        (*_FFN, *_TOKENS),
        ("up", "down", "gate"),
        ("mid",),
    ),
    "transformer": BlockKind(
        ("attention", "ffn"),
        "tokens",
        "gelu",
        "an attention unit, then an ffn unit",
        (*_ATTENTION, *_FFN, *_TOKENS),
    ),
}

# f(alpha x) in the place of a norm: no statistics.
POINTWISE = ("dyt", "derf")


@dataclass(frozen=True)
class Domain:
    """What one shape of the stream has: its defaults, its kinds of norm, and its own sizes."""

    norm_kind: str
    batch_size: int
    norm_kinds: tuple[str, ...]
    sizes: tuple[str, ...] = ()


DOMAINS: dict[str, Domain] = {
    "vectors": Domain(
        "layernorm", 64, ("layernorm", "rmsnorm", "batchnorm", "groupnorm", *POINTWISE)
    ),
    "tokens": Domain(
        "layernorm", 8, ("layernorm", "rmsnorm", "batchnorm", *POINTWISE), ("seq_len",)
    ),
    "images": Domain(
        "batchnorm", 8, ("batchnorm", "layernorm", "groupnorm", *POINTWISE), ("image_size",)
    ),
}

NORM_KINDS = ("layernorm", "rmsnorm", "batchnorm", "groupnorm", *POINTWISE)
ACTIVATIONS = ("relu", "gelu", "gelu-tanh", "tanh", "silu", "erf", "linear")

# Torch's own number of groups would not divide narrow widths; 8 is GroupNorm's usual small choice.
GROUPS = 8


def user_block_kind(name: str, options: Collection[str]) -> BlockKind:
    """Return what a user's own branch says of itself in attributes of its class.

    The name is the one that `from_file` returned, and `options` are those of some blocks only. A
    UsageError tells of an attribute that breaks the interface, or of a file that is not loaded.
    """
    # Queries and keys are inside a branch: only its own code could normalise them.
    known = [option for option in options if option != "qk_norm"]
    domain = _declared(name, "domain", "tokens", DOMAINS)
    usual = "gelu" if domain == "tokens" else "relu"
    activation = _declared(name, "activation", usual, ACTIVATIONS)
    own = (*_declared_options(name, known), *DOMAINS[domain].sizes)
    return BlockKind((object_name(name),), domain, activation, "a branch of your own", own)


def branch_class(name: str) -> Any:
    """Return the class of a user's branch; UsageError where it is no class of modules."""
    found = loaded(name)
    if not isinstance(found, type) or not any(map(_is_module, found.__mro__)):
        what = found.__name__ if isinstance(found, type) else type(found).__name__
        rule = f"{without_digest(name)} is a class of torch.nn.Module"
        raise UsageError(rule, what, "derive it from nn.Module, or give another name of the file")
    return found


def _is_module(base: type) -> bool:
    return (base.__module__, base.__name__) == ("torch.nn.modules.module", "Module")


def _declared(name: str, attribute: str, default: str, known: Collection[str]) -> str:
    """Return a class attribute, which has to be one of the known names."""
    value = getattr(branch_class(name), attribute, default)
    _check_declared(name, attribute, value, known)
    return str(value)


def _declared_options(name: str, known: Collection[str]) -> tuple[str, ...]:
    """Return the class attribute `options`: fields of the spec that the branch uses."""
    values = getattr(branch_class(name), "options", ())
    if not isinstance(values, tuple):
        rule = f"options of {without_digest(name)} is a tuple of names"
        raise UsageError(rule, repr(values), "use for example ('heads',)")
    for value in values:
        _check_declared(name, "options", value, known)
    return values


def _check_declared(name: str, attribute: str, value: object, known: Collection[str]) -> None:
    if value not in tuple(known):
        rule = f"{attribute} of {without_digest(name)} is one of the known names"
        raise UsageError(rule, repr(value), f"use {', '.join(known)}")
