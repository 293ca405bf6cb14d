"""Models of `transformers` with random weights from their configuration, or those of a folder.

Nothing is downloaded, and no pickle is read. `transformers` is the extra `hf`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import UsageError, closest_first
from gradflow.specs.located import Located, users_own
from gradflow.specs.model_request import LIBRARY, ModelRequest, without_digest

EXTRA = "gradflow-bench[hf]"
TOKENS, PIXELS = "input_ids", "pixel_values"
BATCH_SIZE, SEQ_LEN = 8, 32
SHOWN_NAMES = 5
# What configurations call the same thing, beside the names that their attribute_map translates.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers")
DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")
WIDTHS = ("hidden_size", "d_model")
# Sizes that go with the width: heads keep their size, and hidden widths their ratio.
WITH_WIDTH = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "ffn_dim",
    "hidden_dim",
)


@dataclass(frozen=True)
class Build:
    """What a request names in `transformers`.

    Attributes:
        config: the configuration with all that was asked for.
        model_class: what makes the model of it.
        is_causal: whether it predicts the next token from those before.
        folder: of the weights; None for random ones.
    """

    config: Any
    model_class: Any
    is_causal: bool
    folder: str | None = None

    @property
    def parameters(self) -> int:
        """Numbers in the model, counted without allocating one."""
        with torch.device("meta"):
            model = self._from_config()
        return sum(p.numel() for p in model.parameters())

    def model(self) -> nn.Module:
        """The model in training mode, in float32."""
        if self.folder is None:
            return self._from_config().train()
        read = self.model_class.from_pretrained(
            self.folder,
            config=self.config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
        )
        assert isinstance(read, nn.Module)
        return read.train()

    def _from_config(self) -> nn.Module:
        made = self.model_class._from_config(self.config)
        assert isinstance(made, nn.Module)
        return made


def library() -> Any:
    """`transformers`, told to stay offline and quiet.

    Raises:
        UsageError: it is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError:
        rule = "hf: models need transformers"
        raise UsageError(rule, "not installed", f"pip install '{EXTRA}'") from None
    found: Any = transformers
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def resolve(request: ModelRequest) -> Build:
    """The configuration and the class that a request names.

    Raises:
        UsageError: no such type or class, or a setting that it does not have or that breaks it.
    """
    hf = library()
    name = request.model.removeprefix(LIBRARY)
    place = request.model.place if isinstance(request.model, Located) else None
    if place is None and "@" in name:
        request.model.where()  # type: ignore[attr-defined]  # which says what to do
    folder = str(place.folder) if place else None
    named: Any = None if folder else getattr(hf, name, None)
    if named is not None and issubclass(named, hf.PreTrainedModel):
        default, model_class = named.config_class(), named
    else:
        default = _default_config(hf, name, folder)
        model_class = _class_of(hf, default)
    with users_own(without_digest(request.model)):
        config = _with(default, changes(default, request), folder)
    config.use_cache = False  # what a decoder keeps for later tokens is nothing to a gradient
    causal = model_class.__name__ in _causal(hf).values()
    return Build(config, model_class, causal, folder)


def changes(default: Any, request: ModelRequest) -> dict[str, Any]:
    """The settings of a configuration that a request asks for, by the configuration's own names.

    Raises:
        UsageError: it has no such setting.
    """
    found: dict[str, Any] = {}
    if request.depth is not None:
        found |= dict.fromkeys(_depth_names(default, request), request.depth)
    if request.width is not None:
        found |= _widths(default, request, request.width)
    for name, value in request.settings.items():
        found[_own_name(default, name, request)] = value
    return found


def inputs(build: Build, request: ModelRequest, seed: int) -> dict[str, Tensor]:
    """Random tokens, or normal pixels, as the configuration has them.

    Raises:
        UsageError: the model takes something else, or fewer tokens.
    """
    config, samples = build.config, request.batch_size or BATCH_SIZE
    source = torch.Generator().manual_seed(seed)
    kind = build.model_class.main_input_name
    if kind == PIXELS:
        size = request.image_size or config.image_size
        pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return {PIXELS: torch.randn(samples, config.num_channels, *pair, generator=source)}
    if kind != TOKENS:
        rule = f"{without_digest(request.model)} takes {kind}, which gradflow does not make"
        raise UsageError(rule, "no --input", "give --input my_pkg.data:batches")
    ids = torch.randint(config.vocab_size, (samples, tokens(build, request)), generator=source)
    return as_inputs(build, ids)


def as_inputs(build: Build, ids: Tensor) -> dict[str, Tensor]:
    """Arguments of the model for tokens; a decoder beside an encoder sees the same ones."""
    names = (TOKENS, "decoder_input_ids") if _has_encoder(build.config) else (TOKENS,)
    return dict.fromkeys(names, ids)


def tokens(build: Build, request: ModelRequest) -> int:
    """Tokens in a sample.

    Raises:
        UsageError: the model has fewer positions.
    """
    most = getattr(build.config, "max_position_embeddings", None)
    if most is None or request.seq_len is None:
        return request.seq_len or SEQ_LEN
    if request.seq_len > most:
        rule = f"{without_digest(request.model)} has positions for {most} tokens"
        raise UsageError(rule, f"--seq-len {request.seq_len}", f"use --seq-len {most} or less")
    return request.seq_len


def _default_config(hf: Any, name: str, folder: str | None) -> Any:
    if folder is not None:
        with users_own("config.json"):
            return hf.AutoConfig.from_pretrained(folder, local_files_only=True)
    known = list(hf.CONFIG_MAPPING.keys())
    if name not in known:
        nearest = ", ".join(closest_first(name, known)[:SHOWN_NAMES])
        rule = "hf: names a model type of transformers, one of its classes, or a folder"
        raise UsageError(rule, name, f"use for example {nearest}")
    return hf.AutoConfig.for_model(name)


def _class_of(hf: Any, config: Any) -> Any:
    """A causal model with its head where the type has one, and is no encoder; else the bare one."""
    names, causal = hf.models.auto.modeling_auto, _causal(hf)
    kind = config.model_type
    encoder = kind in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if kind in causal and not encoder and not _has_encoder(config):
        return getattr(hf, causal[kind])
    bare = names.MODEL_MAPPING_NAMES.get(kind)
    if bare is None:
        rule = "hf: takes causal language models and encoders"
        raise UsageError(rule, kind, "give the class itself, for example hf:GPT2LMHeadModel")
    return getattr(hf, bare if isinstance(bare, str) else bare[0])


def _causal(hf: Any) -> dict[str, str]:
    found: dict[str, str] = dict(hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return found


def _with(default: Any, found: dict[str, Any], folder: str | None) -> Any:
    """The configuration made anew, because lists with an item for each layer follow from it."""
    if folder is None:
        return type(default)(**found)
    for name, value in found.items():  # sizes are those of the weights
        setattr(default, name, value)
    return default


def _depth_names(config: Any, request: ModelRequest) -> list[str]:
    own = [config.attribute_map.get(name, name) for name in DEPTHS]
    names = [name for name in own if _has(config, name)][:1]
    names = [name for name in names if name != "num_stages"]
    if not names:
        rule = f"--depth sets the number of layers of {without_digest(request.model)}"
        raise UsageError(rule, "it has none of that name", "use --set, for example depths=[3,3]")
    return names + [name for name in DECODER_DEPTHS if _has(config, name)]


def _widths(config: Any, request: ModelRequest, width: int) -> dict[str, Any]:
    own = [config.attribute_map.get(name, name) for name in WIDTHS]
    name = next((name for name in own if isinstance(getattr(config, name, None), int)), None)
    if name is None:
        rule = f"--width sets the features of {without_digest(request.model)}"
        raise UsageError(rule, "it has none of that name", "use --set")
    ratio = width / getattr(config, name)
    found = {name: width}
    for other in dict.fromkeys(config.attribute_map.get(n, n) for n in WITH_WIDTH):
        if isinstance(value := getattr(config, other, None), int):
            found[other] = max(1, round(value * ratio))
    return found


def _own_name(config: Any, name: str, request: ModelRequest) -> str:
    own = str(config.attribute_map.get(name, name))
    if not _has(config, own):
        known = [key for key in config.to_dict() if not key.startswith("_")]
        nearest = ", ".join(closest_first(name, known)[:SHOWN_NAMES])
        rule = f"--set names a setting of {without_digest(request.model)}"
        raise UsageError(rule, name, f"use for example {nearest}")
    return own


def _has(config: Any, name: str) -> bool:
    return name in config.to_dict()


def _has_encoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))
