"""What is known of each block, and of the shape of its stream, before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradflow.specs import user_code
from gradflow.specs.user_blocks import declared, declared_options


@dataclass(frozen=True)
class BlockKind:
    """What the rest of the tool must know of a block before torch is imported.

    `units` are the branches in order; `domain` is the shape of the stream; `options` are those
    that mean something for this block only.
    """

    units: tuple[str, ...]
    domain: str
    activation: str
    meaning: str
    options: tuple[str, ...] = ()


ATTENTION_OPTIONS = ("heads", "kv_heads", "head_dim", "rope", "causal", "qk_norm")
FFN_OPTIONS = ("ffn_mult", "ffn_width", "gated")

BLOCKS: dict[str, BlockKind] = {
    "mlp": BlockKind(("mlp",), "vectors", "relu", "phi(Wx + b)"),
    "conv": BlockKind(("conv",), "images", "relu", "phi(conv3x3(x))", ("image_size",)),
    "resnet": BlockKind(
        ("resnet",), "images", "relu", "two 3x3 convolutions (basic block)", ("image_size",)
    ),
    "attention": BlockKind(
        ("attention",),
        "tokens",
        "gelu",
        "multi-head self-attention",
        (*ATTENTION_OPTIONS, "bias", "seq_len"),
    ),
    "ffn": BlockKind(
        ("ffn",),
        "tokens",
        "gelu",
        "Linear, activation, Linear",
        (*FFN_OPTIONS, "bias", "seq_len"),
    ),
    "transformer": BlockKind(
        ("attention", "ffn"),
        "tokens",
        "gelu",
        "an attention unit, then an ffn unit",
        (*ATTENTION_OPTIONS, *FFN_OPTIONS, "bias", "seq_len"),
    ),
}


def block_kind(name: str) -> BlockKind:
    """The entry of `BLOCKS`, or what a user's own block says of itself (`user_blocks`).

    Raises:
        UsageError: the file of a user's block was not loaded, or an attribute breaks the interface.
    """
    if not user_code.is_user_name(name):
        return BLOCKS[name]
    # Queries and keys are inside a branch: only its own code could normalise them.
    known = [option for option in BLOCK_OPTIONS if option != "qk_norm"]
    domain = declared(name, "domain", "tokens", DOMAINS)
    usual = "gelu" if domain == "tokens" else "relu"
    activation = declared(name, "activation", usual, ACTIVATIONS)
    options = (*declared_options(name, known), *DOMAINS[domain].sizes)
    unit = user_code.thing(name)
    return BlockKind((unit,), domain, activation, "a branch of your own", options)


# f(alpha x) in the place of a norm: no statistics.
POINTWISE = ("dyt", "derf")


@dataclass(frozen=True)
class Domain:
    """Defaults of one shape of the stream, the norm kinds defined on it, and its own sizes."""

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

# Options that belong to some blocks only, with the value used where they apply.
BLOCK_OPTIONS: dict[str, Any] = {
    "heads": 4,
    "kv_heads": None,
    "head_dim": None,
    "rope": 0.0,
    "causal": False,
    "qk_norm": False,
    "ffn_width": None,
    "ffn_mult": 4,
    "gated": False,
    "bias": "all",
    "seq_len": 32,
    "image_size": 16,
}


NORM_KINDS = ("layernorm", "rmsnorm", "batchnorm", "groupnorm", *POINTWISE)
ACTIVATIONS = ("relu", "gelu", "gelu-tanh", "tanh", "silu", "erf", "linear")

# Torch's own number of groups would not divide narrow widths; 8 is GroupNorm's usual small choice.
GROUPS = 8
