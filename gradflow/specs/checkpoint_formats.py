"""Checkpoints of Hugging Face: what `config.json` says as a spec, and where each parameter lies.

One `Architecture` per `model_type`, as data. What gradflow does not compute as the model does is
refused by name, never passed over. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gradflow.errors import UsageError

Config = Mapping[str, Any]
Fields = dict[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Source:
    """Where a module's parameters lie in a layer of the checkpoint.

    Attributes:
        name: of the module there.
        third: 0, 1 or 2 where queries, keys and values are fused along the outputs.
        transposed: its matrix is (in, out).
    """

    name: str
    third: int | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of models.

    Attributes:
        fields: the fields of `StackSpec` that a config stands for.
        needs: settings that have to have this value, where they are there.
        layer: what the names of layer {} (from 0) begin with.
        parts: for each module of a block, by its name there, its source.
        embedding: of the tokens.
        norm: the final one.
        positions: embedding of the positions, where they are learned.
        prefixes: what the names of the body may begin with.
        tied: whether head and embedding are one where the config does not say.
        head: the map to the vocabulary.
    """

    fields: Callable[[Config], Fields]
    needs: Mapping[str, Any]
    layer: str
    parts: Mapping[str, Source]
    embedding: str
    norm: str
    positions: str | None = None
    prefixes: tuple[str, ...] = ("model.", "")
    tied: bool = False
    head: str = "lm_head"


def architecture(config: Config) -> Architecture:
    """That of a config.

    Raises:
        UsageError: unknown, or with a setting that gradflow does not compute.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        rule = "--weights is of an architecture that gradflow knows"
        raise UsageError(rule, f"model_type {kind}", f"use {', '.join(ARCHITECTURES)}")
    found = ARCHITECTURES[str(kind)]
    for name, value in {**found.needs, "quantization_config": None}.items():
        if config.get(name, value) != value:
            rule = f"gradflow computes {kind} with {name} {value}"
            raise UsageError(rule, f"{name} {config[name]}", "use another checkpoint")
    return found


def setting(config: Config, name: str, kind: Callable[[Any], Any], default: Any = None) -> Any:
    """A setting of the config; null counts as missing.

    Raises:
        UsageError: it is missing and has no default, or is no number or text as it should be.
    """
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not kind and not (kind is float and type(value) is int):
        rule = f"config.json has {name}, {'text' if kind is str else 'a number'}"
        raise UsageError(rule, value, "complete config.json")
    return kind(value)


def _llama(config: Config) -> Fields:
    """llama, qwen2: RMSNorm before, rotary positions, a gated ffn, no bias."""
    heads = setting(config, "num_attention_heads", int)
    width = setting(config, "hidden_size", int)
    return {
        **{"norm": "pre", "norm_kind": "rmsnorm", "causal": True, "gated": True, "bias": "none"},
        **{"qk_norm": False, "width": width, "heads": heads},
        "depth": setting(config, "num_hidden_layers", int),
        "kv_heads": setting(config, "num_key_value_heads", int, heads),
        "head_dim": setting(config, "head_dim", int, width // max(1, heads)),
        "ffn_width": setting(config, "intermediate_size", int),
        "activation": _activation(config, "hidden_act", "silu"),
        "norm_eps": setting(config, "rms_norm_eps", float, 1e-6),
        "rope": _rope(config),
        "classes": setting(config, "vocab_size", int),
    }


def _rope(config: Config) -> float:
    """The base of the rotary positions, from either of the two ways to write it.

    Raises:
        UsageError: the positions are stretched.
    """
    how: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    how = how if isinstance(how, dict) else {"rope_type": how}
    kind = how.get("rope_type", how.get("type", "default"))
    if kind != "default":
        rule = "gradflow computes rotary positions without stretching"
        raise UsageError(rule, f"rope_type {kind}", "use a checkpoint without it")
    base = setting(config, "rope_theta", float, 10_000.0)
    turned: float = setting(how, "rope_theta", float, base)
    return turned


def _activation(config: Config, name: str, default: str) -> str:
    value = setting(config, name, str, default)
    if value not in ACTIVATIONS:
        rule = f"{name} is an activation that gradflow knows"
        raise UsageError(rule, value, f"use {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def _gpt2(config: Config) -> Fields:
    """LayerNorm before, learned positions, biases everywhere (that of the keys does nothing)."""
    width = setting(config, "n_embd", int)
    return {
        **{"norm": "pre", "norm_kind": "layernorm", "causal": True, "gated": False, "bias": "all"},
        **{"qk_norm": False, "width": width, "rope": 0.0},
        "depth": setting(config, "n_layer", int),
        "heads": setting(config, "n_head", int),
        "ffn_width": setting(config, "n_inner", int, 4 * width),
        "activation": _activation(config, "activation_function", "gelu_new"),
        "norm_eps": setting(config, "layer_norm_epsilon", float, 1e-5),
        "classes": setting(config, "vocab_size", int),
    }


_LLAMA_PARTS = {
    "0.before": Source("input_layernorm"),
    "0.branch.q": Source("self_attn.q_proj"),
    "0.branch.k": Source("self_attn.k_proj"),
    "0.branch.v": Source("self_attn.v_proj"),
    "0.branch.out": Source("self_attn.o_proj"),
    "1.before": Source("post_attention_layernorm"),
    "1.branch.gate": Source("mlp.gate_proj"),
    "1.branch.up": Source("mlp.up_proj"),
    "1.branch.down": Source("mlp.down_proj"),
}
_LLAMA_NAMES: dict[str, Any] = {
    "layer": "layers.{}.",
    "embedding": "embed_tokens",
    "norm": "norm",
}
_UNBIASED = {"use_sliding_window": False, "attention_bias": False, "mlp_bias": False}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(fields=_llama, needs=_UNBIASED, parts=_LLAMA_PARTS, **_LLAMA_NAMES),
    "qwen2": Architecture(
        fields=lambda config: _llama(config) | {"bias": "qkv"},
        needs={"use_sliding_window": False},
        parts=_LLAMA_PARTS,
        **_LLAMA_NAMES,
    ),
    "qwen3": Architecture(
        fields=lambda config: _llama(config) | {"qk_norm": True},
        needs=_UNBIASED,
        parts={
            **_LLAMA_PARTS,
            "0.branch.q_norm": Source("self_attn.q_norm"),
            "0.branch.k_norm": Source("self_attn.k_norm"),
        },
        **_LLAMA_NAMES,
    ),
    "gpt2": Architecture(
        fields=_gpt2,
        needs={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        layer="h.{}.",
        parts={
            "0.before": Source("ln_1"),
            "0.branch.q": Source("attn.c_attn", 0, transposed=True),
            "0.branch.k": Source("attn.c_attn", 1, transposed=True),
            "0.branch.v": Source("attn.c_attn", 2, transposed=True),
            "0.branch.out": Source("attn.c_proj", transposed=True),
            "1.before": Source("ln_2"),
            "1.branch.up": Source("mlp.c_fc", transposed=True),
            "1.branch.down": Source("mlp.c_proj", transposed=True),
        },
        embedding="wte",
        norm="ln_f",
        positions="wpe",
        prefixes=("transformer.", ""),
        tied=True,
    ),
}
