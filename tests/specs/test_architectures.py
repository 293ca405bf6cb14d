"""Architectures of `transformers`, small and random: their blocks are found without hints."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import gradflow

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HIDDEN, DEPTH = 32, 3
LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
GEMMA = LLAMA | {"head_dim": 8}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_layer": DEPTH, "n_head": 4, "vocab_size": 50},
    "llama": LLAMA,
    "qwen3": GEMMA,
    "mistral": LLAMA,
    "gemma2": GEMMA,
    "bert": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "t5": {
        "d_model": HIDDEN,
        "d_ff": 64,
        "d_kv": 8,
        "num_layers": DEPTH,
        "num_heads": 4,
        "vocab_size": 50,
    },
    "vit": {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    },
    "deepseek_v3": LLAMA
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}
BLOCKS = {
    "gpt2": ["h.{}"],
    "bert": ["encoder.layer.{}"],
    "t5": ["encoder.block.{}", "decoder.block.{}"],
    "vit": None,
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES[kind])
    return transformers.AutoModel.from_config(config)


def loss(kind: str, model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    if kind == "vit":
        return model(pixel_values=torch.randn(2, 3, 16, 16)).last_hidden_state.square().sum()
    ids = torch.randint(50, (2, 7))
    more = {"decoder_input_ids": ids} if kind == "t5" else {}
    return model(input_ids=ids, **more).last_hidden_state.cumsum(-1).square().mean()


@pytest.mark.parametrize("kind", SIZES)
def test_the_blocks_are_found_and_every_one_has_its_numbers(kind: str) -> None:
    model, twin = build(kind), build(kind)
    with gradflow.watch(model) as flow:
        loss(kind, model).backward()
    loss(kind, twin).backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    for mine, other in pairs:
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, other.grad)
    rows = flow.run.layer_records[1:]
    patterns = BLOCKS.get(kind, ["layers.{}"])
    units = [row.unit for row in rows]
    if patterns:
        assert units == [pattern.format(i) for pattern in patterns for i in range(DEPTH)]
    else:
        assert len(units) == DEPTH
        assert all(unit.endswith(f".{i}") for i, unit in enumerate(units))
    assert all(row.grad_norm for row in rows)
    assert all(0 < row.identity_share <= 1 for row in rows)
    chain = rows if kind != "t5" else rows[:DEPTH]
    for below, row in itertools.pairwise(chain):
        assert row.gain == pytest.approx(below.grad_norm / row.grad_norm, rel=1e-12)
