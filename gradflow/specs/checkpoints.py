"""Checkpoints of Hugging Face: the folder, what `config.json` says, where each parameter lies.

A spec keeps the name and the digest of a checkpoint. One `Architecture` per `model_type` is data;
what gradflow does not compute as the model does is refused by name, never passed over. Nothing here
imports torch, and no weight is read but a few bytes for the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradflow.errors import UsageError

_Config = Mapping[str, Any]
_Fields = dict[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class ParameterSource:
    """The place of a module's parameters in a layer of the checkpoint, by the module's name there.

    Attributes:
        third: 0, 1 or 2 where queries, keys and values are fused along the outputs.
        transposed: its matrix is (in, out).
    """

    name: str
    third: int | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one family of models writes its checkpoints.

    Attributes:
        fields: the fields of `StackSpec` that a config stands for.
        needs: settings that have to have this value, where they are there.
        layer: what the names of layer {} (from 0) begin with.
        parts: for each module of a block, by its name there, its source.
        norm: the final one.
        positions: embedding of the positions, where they are learned.
        prefixes: what the names of the body may begin with.
        tied: whether head and embedding are one where the config does not say.
    """

    fields: Callable[[_Config], _Fields]
    needs: Mapping[str, Any]
    layer: str
    parts: Mapping[str, ParameterSource]
    embedding: str
    norm: str
    positions: str | None = None
    prefixes: tuple[str, ...] = ("model.", "")
    tied: bool = False
    head: str = "lm_head"


def architecture(config: _Config) -> Architecture:
    """Return the architecture that a config names.

    A UsageError tells of an unknown one, or of a setting that gradflow does not compute.
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


def _setting(config: _Config, name: str, kind: Callable[[Any], Any], default: Any = None) -> Any:
    """Return a number or a text of the config; null counts as missing."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not kind and not (kind is float and type(value) is int):
        rule = f"config.json has {name}, {'text' if kind is str else 'a number'}"
        raise UsageError(rule, value, "complete config.json")
    return kind(value)


def _llama(config: _Config) -> _Fields:
    """llama, qwen2: RMSNorm before, rotary positions, a gated ffn, no bias."""
    heads = _setting(config, "num_attention_heads", int)
    width = _setting(config, "hidden_size", int)
    return {
        **{"norm": "pre", "norm_kind": "rmsnorm", "causal": True, "gated": True, "bias": "none"},
        **{"qk_norm": False, "width": width, "heads": heads},
        "depth": _setting(config, "num_hidden_layers", int),
        "kv_heads": _setting(config, "num_key_value_heads", int, heads),
        "head_dim": _setting(config, "head_dim", int, width // max(1, heads)),
        "ffn_width": _setting(config, "intermediate_size", int),
        "activation": _activation(config, "hidden_act", "silu"),
        "norm_eps": _setting(config, "rms_norm_eps", float, 1e-6),
        "rope": _rope(config),
        "classes": _setting(config, "vocab_size", int),
    }


def _rope(config: _Config) -> float:
    """Return the base of the rotary positions, which configs write in two ways."""
    how: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    how = how if isinstance(how, dict) else {"rope_type": how}
    kind = how.get("rope_type", how.get("type", "default"))
    if kind != "default":
        rule = "gradflow computes rotary positions without stretching"
        raise UsageError(rule, f"rope_type {kind}", "use a checkpoint without it")
    base = _setting(config, "rope_theta", float, 10_000.0)
    turned: float = _setting(how, "rope_theta", float, base)
    return turned


def _activation(config: _Config, name: str, default: str) -> str:
    value = _setting(config, name, str, default)
    if value not in _ACTIVATIONS:
        rule = f"{name} is an activation that gradflow knows"
        raise UsageError(rule, value, f"use {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _gpt2(config: _Config) -> _Fields:
    """LayerNorm before, learned positions, biases everywhere (that of the keys does nothing)."""
    width = _setting(config, "n_embd", int)
    return {
        **{"norm": "pre", "norm_kind": "layernorm", "causal": True, "gated": False, "bias": "all"},
        **{"qk_norm": False, "width": width, "rope": 0.0},
        "depth": _setting(config, "n_layer", int),
        "heads": _setting(config, "n_head", int),
        "ffn_width": _setting(config, "n_inner", int, 4 * width),
        "activation": _activation(config, "activation_function", "gelu_new"),
        "norm_eps": _setting(config, "layer_norm_epsilon", float, 1e-5),
        "classes": _setting(config, "vocab_size", int),
    }


_LLAMA_PARTS = {
    "0.before": ParameterSource("input_layernorm"),
    "0.branch.q": ParameterSource("self_attn.q_proj"),
    "0.branch.k": ParameterSource("self_attn.k_proj"),
    "0.branch.v": ParameterSource("self_attn.v_proj"),
    "0.branch.out": ParameterSource("self_attn.o_proj"),
    "1.before": ParameterSource("post_attention_layernorm"),
    "1.branch.gate": ParameterSource("mlp.gate_proj"),
    "1.branch.up": ParameterSource("mlp.up_proj"),
    "1.branch.down": ParameterSource("mlp.down_proj"),
}
_LLAMA_NAMES: dict[str, Any] = {"layer": "layers.{}.", "embedding": "embed_tokens", "norm": "norm"}
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
            "0.branch.q_norm": ParameterSource("self_attn.q_norm"),
            "0.branch.k_norm": ParameterSource("self_attn.k_norm"),
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
            "0.before": ParameterSource("ln_1"),
            "0.branch.q": ParameterSource("attn.c_attn", 0, transposed=True),
            "0.branch.k": ParameterSource("attn.c_attn", 1, transposed=True),
            "0.branch.v": ParameterSource("attn.c_attn", 2, transposed=True),
            "0.branch.out": ParameterSource("attn.c_proj", transposed=True),
            "1.before": ParameterSource("ln_2"),
            "1.branch.up": ParameterSource("mlp.c_fc", transposed=True),
            "1.branch.down": ParameterSource("mlp.c_proj", transposed=True),
        },
        embedding="wte",
        norm="ln_f",
        positions="wpe",
        prefixes=("transformer.", ""),
        tied=True,
    ),
}


CONFIG = "config.json"
_SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bytes and places of a file that are looked at: two trainings of one shape differ in them.
_SAMPLE, _PLACES = 1024, 64


class Pretrained(str):
    """`NAME@digest` of a checkpoint: what decides the numbers, and all that is ever stored.

    It carries where the checkpoint lies, for as long as it is not stored.

    Attributes:
        folder: the checkpoint; None where this was read from a run.
        config: of the checkpoint.
    """

    folder: Path | None = None
    config: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return self.rpartition("@")[0]

    @property
    def architecture(self) -> Architecture:
        """Names and layout of the checkpoint's tensors; UsageError where the folder is unknown."""
        self.where()
        return architecture(self.config)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `StackSpec` that the checkpoint decides; none where the name is a run's."""
        return self.architecture.fields(self.config) if self.folder else {}

    @property
    def most_tokens(self) -> int | None:
        """How many positions have an embedding; None where samples may have any length."""
        learned = self.folder and self.architecture.positions
        return int(_setting(self.config, "n_positions", int, 1024)) if learned else None

    @property
    def tied(self) -> bool:
        """Whether the head has the embedding's weights."""
        return bool(self.config.get("tie_word_embeddings", self.architecture.tied))

    def where(self) -> Path:
        """Return the folder of the checkpoint; UsageError where it is not known."""
        if self.folder is None:
            rule = "weights are read from their folder"
            raise UsageError(rule, f"the name {self} alone", "give --weights DIR")
        return self.folder


def locate_checkpoint(text: str) -> Pretrained:
    """Return the checkpoint that lies in a folder.

    A UsageError tells of a file that is missing or broken, or of an unknown architecture.
    """
    folder = Path(text).resolve()  # for workers that start elsewhere
    if not folder.is_dir():
        rule = "--weights is a folder with config.json and safetensors files"
        raise UsageError(rule, repr(text), "give the folder of a checkpoint as Hugging Face has it")
    config = _read_json(folder / CONFIG)
    architecture(config)
    found = Pretrained(f"{folder.name}@{checkpoint_digest(folder)}")
    found.folder, found.config = folder, config
    return found


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        rule = f"a checkpoint has {file.name}"
        raise UsageError(rule, f"{file.parent} without it", "complete the folder") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file.name} is JSON", str(error), "copy it again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file.name} is a JSON object", type(content).__name__, "copy it again")
    return content


def files_of(folder: Path) -> dict[str, Path] | Path:
    """Return the file of each tensor by the tensor's name, or the one file of all tensors.

    A UsageError tells of a file that is not there.
    """
    if (folder / INDEX).exists():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UsageError(f"{INDEX} has a weight_map", "none", "copy it again")
        files = {name: _existing(folder / Path(name).name) for name in set(names.values())}
        return {tensor: files[name] for tensor, name in names.items()}
    return _existing(folder / _SINGLE_FILE)


def _existing(file: Path) -> Path:
    if not file.is_file():
        rule = f"a checkpoint has {file.name}"
        pickled = any(file.parent.glob("*.bin"))
        remedy = "convert the .bin files, which can run code" if pickled else "complete the folder"
        raise UsageError(rule, f"{file.parent} without it", remedy)
    return file


def checkpoint_digest(folder: Path) -> str:
    """Return eight hexadecimal digits of config, index, and sizes and samples of weight files."""
    found = files_of(folder)
    files = sorted({found} if isinstance(found, Path) else set(found.values()))
    digest = hashlib.sha256()
    for small in (folder / CONFIG, folder / INDEX):
        digest.update(small.read_bytes() if small.exists() else b"")
    for file in files:
        for part in _samples(file):
            digest.update(part)
    return digest.hexdigest()[:8]


def _samples(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    with file.open("rb") as content:
        for place in range(_PLACES):
            content.seek(max(0, size - _SAMPLE) * place // (_PLACES - 1))
            yield content.read(_SAMPLE)
