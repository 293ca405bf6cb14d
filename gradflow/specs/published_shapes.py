"""Published shapes of transformers, as data on one page: `--like NAME` fills in what is not given.

A shape is a choice of fields of `StackSpec`. What a paper leaves open (an initialisation, the eps
of a norm) is that of the released code, named beside it. Embeddings are no layers, so they are
left out; `parameters` counts them, and the tests hold that number against the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradflow.specs.fields import check_choice


@dataclass(frozen=True)
class PublishedShape:
    """The sizes and choices of one published network.

    Attributes:
        fields: of `StackSpec`, those that differ from its defaults and the sizes.
        parameters: published number, embeddings included; exact where the release is counted.
        source: where all this is from.
    """

    fields: Mapping[str, Any]
    parameters: int
    source: str


# One sample of the full context; `--batch-size` and `--seq-len` override.
_COMMON = {"batch_size": 1, "shortcut": "residual"}
_GPT2 = _COMMON | {
    **{"norm": "pre", "norm_kind": "layernorm", "norm_eps": 1e-5, "activation": "gelu-tanh"},
    **{"init": "gpt2", "causal": True, "ffn_mult": 4, "classes": 50_257},
}
_LLAMA = _COMMON | {
    **{"norm": "pre", "norm_kind": "rmsnorm", "norm_eps": 1e-5, "activation": "silu"},
    **{"init": "normal", "causal": True, "gated": True, "bias": "none"},
}
_LLAMA3 = _LLAMA | {"kv_heads": 8, "seq_len": 8192, "rope": 500_000.0, "classes": 128_256}
_BERT = _COMMON | {
    **{"norm": "post", "norm_kind": "layernorm", "norm_eps": 1e-12, "activation": "gelu"},
    **{"init": "normal", "ffn_mult": 4, "seq_len": 512, "classes": 30_522},
}

_gpt2 = partial(PublishedShape, source="Radford et al. 2019 (GPT-2), table 2; sizes as released")
_llama3 = partial(
    PublishedShape,
    source="Llama Team 2024, arXiv:2407.21783, table 3; init of the release's library",
)
_bert = partial(PublishedShape, source="Devlin et al. 2018, arXiv:1810.04805, section 3")

SHAPES: dict[str, PublishedShape] = {
    "gpt2": _gpt2(_GPT2 | {"depth": 12, "width": 768, "heads": 12, "seq_len": 1024}, 124_439_808),
    "gpt2-medium": _gpt2(
        _GPT2 | {"depth": 24, "width": 1024, "heads": 16, "seq_len": 1024}, 354_823_168
    ),
    "gpt2-large": _gpt2(
        _GPT2 | {"depth": 36, "width": 1280, "heads": 20, "seq_len": 1024}, 774_030_080
    ),
    "gpt2-xl": _gpt2(
        _GPT2 | {"depth": 48, "width": 1600, "heads": 25, "seq_len": 1024}, 1_557_611_200
    ),
    # Every second layer of the original has banded attention; here all are dense.
    "gpt3-175b": PublishedShape(
        _GPT2 | {"depth": 96, "width": 12_288, "heads": 96, "seq_len": 2048},
        174_600_000_000,
        "Brown et al. 2020, arXiv:2005.14165, tables 2.1 and D.1",
    ),
    "llama-7b": PublishedShape(
        _LLAMA
        | {"depth": 32, "width": 4096, "heads": 32, "ffn_width": 11_008, "seq_len": 2048}
        | {"rope": 10_000.0, "classes": 32_000, "norm_eps": 1e-6},
        6_738_415_616,
        "Touvron et al. 2023, arXiv:2302.13971, table 2; ffn and init of the release",
    ),
    "llama-70b": PublishedShape(
        _LLAMA
        | {"depth": 80, "width": 8192, "heads": 64, "ffn_width": 28_672, "seq_len": 4096}
        | {"kv_heads": 8, "rope": 10_000.0, "classes": 32_000},
        68_976_648_192,
        "Touvron et al. 2023 (Llama 2), arXiv:2307.09288, table 1; ffn and init of the release",
    ),
    "llama3-8b": _llama3(
        _LLAMA3 | {"depth": 32, "width": 4096, "heads": 32, "ffn_width": 14_336}, 8_030_261_248
    ),
    "llama3-70b": _llama3(
        _LLAMA3 | {"depth": 80, "width": 8192, "heads": 64, "ffn_width": 28_672}, 70_553_706_496
    ),
    "llama3-405b": _llama3(
        _LLAMA3 | {"depth": 126, "width": 16_384, "heads": 128, "ffn_width": 53_248},
        405_853_388_800,
    ),
    "qwen3-8b": PublishedShape(
        _LLAMA
        | {"depth": 36, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}
        | {"ffn_width": 12_288, "seq_len": 32_768, "rope": 1_000_000.0, "qk_norm": True}
        | {"classes": 151_936, "norm_eps": 1e-6},
        8_190_735_360,
        "Qwen Team 2025, arXiv:2505.09388, table 1; widths and init of the release",
    ),
    "bert-base": _bert(_BERT | {"depth": 12, "width": 768, "heads": 12}, 110_000_000),
    "bert-large": _bert(_BERT | {"depth": 24, "width": 1024, "heads": 16}, 340_000_000),
    # 196 patches of 16 x 16 pixels and the class token.
    "vit-b": PublishedShape(
        _COMMON
        | {"depth": 12, "width": 768, "heads": 12, "ffn_mult": 4, "seq_len": 197}
        | {"norm": "pre", "norm_kind": "layernorm", "norm_eps": 1e-6, "activation": "gelu"}
        | {"init": "xavier", "classes": 1000},
        86_000_000,
        "Dosovitskiy et al. 2020 (ViT-B/16), arXiv:2010.11929, table 1; init of the release",
    ),
    # 500 encoder and 500 decoder layers in the paper; here an encoder of 1,000, of the width that
    # the published number of parameters leaves room for.
    "deepnet-1000": PublishedShape(
        {"scheme": "deepnorm", "depth": 1000, "width": 512, "heads": 8, "ffn_mult": 4}
        | {"activation": "relu", "batch_size": 1},
        3_800_000_000,
        "Wang et al. 2022 (DeepNet), arXiv:2203.00555, multilingual translation",
    ),
}

# What is left to the user where an option that says the same, or overrules it, is given.
_OVERRULES: dict[str, tuple[str, ...]] = {
    "ffn_mult": ("ffn_width",),
    "ffn_width": ("ffn_mult",),
    "norm": ("scheme",),
    "shortcut": ("scheme",),
    "scheme": ("norm", "shortcut", "init"),
}


def _shape_fields(name: str) -> Mapping[str, Any]:
    check_choice("--like", name, tuple(SHAPES))
    return SHAPES[name].fields


def missing(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a shape that are not given, nor overruled by a field that is given.

    `given` holds values by field, None where there is none. An unknown name raises UsageError.
    """
    present = {field for field, value in given.items() if value is not None}
    overruled = {other for field in present for other in _OVERRULES.get(field, ())}
    shape = _shape_fields(name)
    return {field: shape[field] for field in shape if field not in present | overruled}


def changed(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ from those of the shape, a transformer's; None differs not."""
    shape = {"block": "transformer"} | dict(_shape_fields(name))
    return {
        field: values[field]
        for field in shape
        if values[field] is not None and values[field] != shape[field]
    }
