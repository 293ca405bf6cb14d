"""What is known of each block, and of the shape of its stream, before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


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

NORM_KINDS = ("layernorm", "rmsnorm", "batchnorm", "groupnorm", *POINTWISE)
ACTIVATIONS = ("relu", "gelu", "gelu-tanh", "tanh", "silu", "erf", "linear")

# Torch's own number of groups would not divide narrow widths; 8 is GroupNorm's usual small choice.
GROUPS = 8
