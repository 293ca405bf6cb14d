"""The walk over a checkpoint against the model of transformers itself, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import spec_of
from problems import CPU
from torch import Tensor

from gradflow.engine.build import build_network
from gradflow.engine.walk import walk
from gradflow.networks.ends import token_ids
from gradflow.specs.stack import StackSpec

pytestmark = pytest.mark.slow  # transformers takes seconds to import

SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3}
GROUPS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = {"bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"vocab_size": 23, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 9}
# Config and options of each architecture.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SIZES | GROUPS,
    "Qwen2": SIZES | GROUPS,
    "Qwen3": SIZES | GROUPS | {"head_dim": 6, "tie_word_embeddings": True},
    "GPT2": GPT2 | PLAIN,
}


def model_of(name: str) -> Any:
    """A small model with random weights: no scale is 1, no shift 0."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def in_double(model: Any) -> Any:
    """The same model in float64 throughout: transformers rounds to float32 inside its RMSNorm."""
    for part in model.double().modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = lambda x, n=part: (
                n.weight * x / ((x**2).mean(-1, keepdim=True) + n.variance_epsilon).sqrt()
            )
    return model


# By the names of the model: the two norms of a layer, and where each matrix of ours is.
MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
FUSED = {"out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}


def truth(model: Any, spec: StackSpec, loss: Any) -> tuple[list[float], list[dict[str, float]]]:
    """Norms of the gradient at y_0 and after every unit; of every parameter's, layer by layer."""
    body = model.base_model
    layers = body.h if hasattr(body, "h") else body.layers
    ids, stream = token_ids(spec, 0), []

    def keep(x: Tensor) -> None:
        x.retain_grad()
        stream.append(x)

    for layer in layers:
        middle = layer.ln_2 if hasattr(layer, "ln_2") else layer.post_attention_layernorm
        layer.register_forward_pre_hook(lambda _, args: keep(args[0]))
        middle.register_forward_pre_hook(lambda _, args: keep(args[0]))
    layers[-1].register_forward_hook(lambda *given: keep(as_tensor(given[-1])))
    logits = model(input_ids=ids[:, :-1]).logits
    if spec.loss == "ce":
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    else:
        (stream[-1] * loss.v).sum().backward()
    return [x.grad.norm().item() for x in stream], [parameter_norms(layer) for layer in layers]


def as_tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def parameter_norms(layer: Any) -> dict[str, float]:
    """By our names; the biases of gpt2's keys, which nothing reaches, left out."""
    grads = {name: p.grad for name, p in layer.named_parameters()}
    if hasattr(layer, "ln_1"):
        found = {ours: f"{theirs}" for ours, theirs in FUSED.items()}
        norms = {"attention": "ln_1", "ffn": "ln_2"}
        thirds = {
            f"attention branch.{part}.{kind}": grads[f"attn.c_attn.{kind}"].chunk(3, -1)[i]
            for i, part in enumerate("qkv")
            for kind in ("weight", "bias")
            if (part, kind) != ("k", "bias")
        }
    else:
        found, thirds = MATRICES, {}
        norms = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}
    for unit, theirs in norms.items():
        thirds |= renamed(grads, theirs, f"{unit} before")
    for ours, theirs in found.items():
        unit = "ffn" if ours in ("gate", "up", "down") else "attention"
        thirds |= renamed(grads, theirs, f"{unit} branch.{ours}")
    return {name: grad.norm().item() for name, grad in thirds.items()}


def renamed(grads: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    kinds = ("weight", "bias")
    return {f"{ours}.{k}": grads[f"{theirs}.{k}"] for k in kinds if f"{theirs}.{k}" in grads}


def agree(model: Any, spec: StackSpec, stream: float, params: float) -> bool:
    """Whether the engine finds the model's own norms, to these relative differences."""
    network = build_network(spec, 0, CPU)
    layers, rows = walk(spec, 0, network).records()
    model.zero_grad()
    gradients, by_layer = truth(model, spec, network.loss)
    got = {(r.layer, f"{r.unit} {r.param}"): r.grad_norm for r in rows}
    want = {(i, k): norm for i, norms in enumerate(by_layer, 1) for k, norm in norms.items()}
    assert got.keys() == want.keys()
    along = [r.grad_norm for r in layers] == pytest.approx(gradients, rel=stream)
    return along and got == pytest.approx(want, rel=params)


@pytest.mark.parametrize("name", MODELS)
def test_the_walk_is_the_models_own_autograd(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    in_double(model)
    for loss in ("cotangent", "ce"):
        assert agree(model, spec_of(tmp_path, dtype="float64", loss=loss), 1e-9, 1e-9)
        # A parameter's gradient is a sum over tokens, of terms that cancel.
        assert agree(model, spec_of(tmp_path, dtype="float32", loss=loss), 1e-6, 1e-5)


@pytest.mark.parametrize("setting", ["rope_parameters", "rms_norm_eps", "heads"])
def test_another_config_is_another_model(setting: str, tmp_path: Path) -> None:
    """Negative control."""
    model = model_of("Llama")
    model.save_pretrained(tmp_path)
    in_double(model)
    config = json.loads((tmp_path / "config.json").read_text())
    other: dict[str, dict[str, Any]] = {
        "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 9_000.0}},
        "rms_norm_eps": {"rms_norm_eps": 1e-5},
        "heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config | other[setting]))
    assert not agree(model, spec_of(tmp_path, dtype="float64"), 1e-6, 1e-6)
