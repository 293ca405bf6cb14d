"""A small llama written by hand, and checkpoints made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from problems import CPU
from safetensors.torch import save_file
from torch import Tensor

from gradflow.engine.build import build_network
from gradflow.engine.walk import walk
from gradflow.runs.records import LayerRecord, ParamRecord
from gradflow.specs.stack import StackSpec

D, HEADS, KV, C, HIDDEN, VOCABULARY, DEPTH = 8, 4, 2, 6, 12, 11, 2
CONFIG: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": D, "num_hidden_layers": DEPTH, "head_dim": C},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV, "intermediate_size": HIDDEN},
    **{"vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "rope_theta": 100.0, "hidden_act": "silu"},
}
LAYER = {
    "input_layernorm": (D,),
    "self_attn.q_proj": (HEADS * C, D),
    "self_attn.k_proj": (KV * C, D),
    "self_attn.v_proj": (KV * C, D),
    "self_attn.o_proj": (D, HEADS * C),
    "post_attention_layernorm": (D,),
    "mlp.gate_proj": (HIDDEN, D),
    "mlp.up_proj": (HIDDEN, D),
    "mlp.down_proj": (D, HIDDEN),
}


# By our names.
OURS = {
    "attention": {n: f"{n[0]}_proj" for n in ("q", "k", "v", "out")},
    "ffn": {n: f"{n}_proj" for n in ("gate", "up", "down")},
}


def by_hand() -> dict[str, Tensor]:
    """The tensors of a llama of two layers, in bfloat16."""
    shapes = {"model.embed_tokens": (VOCABULARY, D), "model.norm": (D,), "lm_head": (VOCABULARY, D)}
    for layer in range(DEPTH):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    source = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=source).bfloat16()
        for name, shape in shapes.items()
    }


def write(folder: Path, tensors: dict[str, Tensor], files: int = 1, **config: Any) -> Path:
    """A checkpoint of so many files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    where = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for file in names:
        save_file({t: v for t, v in tensors.items() if where[t] == file}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def spec_of(folder: Path, **options: Any) -> StackSpec:
    return StackSpec(weights=str(folder), batch_size=2, seq_len=5, **options)


def measured(spec: StackSpec, seed: int = 0) -> tuple[list[LayerRecord], list[ParamRecord]]:
    """The engine's records of one seed."""
    return walk(spec, seed, build_network(spec, seed, CPU)).records()
