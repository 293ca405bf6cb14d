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
from gradflow.specs.model_spec import HF_PREFIX, ModelRequest
from gradflow.specs.user_files import LocatedName, errors_of_users_code, without_digest

_EXTRA = "gradflow-bench[hf]"
_TOKENS, _PIXELS = "input_ids", "pixel_values"
_BATCH_SIZE, _SEQ_LEN = 8, 32
_SHOWN_NAMES = 5
# What configurations call the same thing, beside the names that their attribute_map translates.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers")
_DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")
_WIDTHS = ("hidden_size", "d_model")
# Sizes that go with the width: heads keep their size, and hidden widths their ratio.
_WITH_WIDTH = (
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
    """A model of `transformers` that can be made.

    Attributes:
        config: the configuration, with everything that the request asks for.
        is_causal: whether the model predicts the next token from the tokens before it.
        folder: folder of the weights; None for random weights.
    """

    config: Any
    model_class: Any
    is_causal: bool
    folder: str | None = None

    @property
    def parameters(self) -> int:
        """The number of parameters, counted without allocating any."""
        with torch.device("meta"):
            model = self._from_config()
        return sum(p.numel() for p in model.parameters())

    def model(self) -> nn.Module:
        """Make the model, in training mode and in float32."""
        if self.folder is None:
            return self._from_config().train()
        read, told = self.model_class.from_pretrained(
            self.folder,
            config=self.config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are named here
            output_loading_info=True,
        )
        _check_complete([*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])])
        assert isinstance(read, nn.Module)
        return read.train()

    def _from_config(self) -> nn.Module:
        made = self.model_class._from_config(self.config)
        assert isinstance(made, nn.Module)
        return made


def _check_complete(absent: list[str]) -> None:
    """Raise a UsageError if parameters would stay random because the folder lacks them."""
    if absent:
        names = ", ".join(sorted(absent)[:_SHOWN_NAMES])
        rule = "a folder has the weights of its model, in their sizes"
        got = f"{len(absent)} without: {names}"
        raise UsageError(rule, got, "leave out --depth, --width and --set, or complete it")


def _transformers() -> Any:
    """Return the module `transformers`, set to stay offline and quiet."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError:
        rule = "hf: models need transformers"
        raise UsageError(rule, "not installed", f"pip install '{_EXTRA}'") from None
    library: Any = transformers
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def hugging_face_build(request: ModelRequest) -> Build:
    """The configuration and the class that a request names.

    Raises:
        UsageError: no such type or class, or a setting that it does not have or that breaks it.
    """
    hf = _transformers()
    name = request.model.removeprefix(HF_PREFIX)
    target = request.model.target if isinstance(request.model, LocatedName) else None
    if target is None and "@" in name:
        request.model.where()  # type: ignore[attr-defined]  # which says what to do
    folder = str(target.folder) if target else None
    named: Any = None if folder else getattr(hf, name, None)
    configuration = getattr(named, "config_class", None) if isinstance(named, type) else None
    if configuration is not None:
        default, model_class = configuration(), named
    else:
        default = _default_config(hf, name, folder)
        model_class = _stored_class(hf, default) or _class_of(hf, default)
    with errors_of_users_code(without_digest(request.model)):
        config = _with(default, changes(default, request), folder)
    config.use_cache = False  # what a decoder keeps for later tokens is nothing to a gradient
    causal = model_class.__name__ in _causal(hf).values()
    return Build(config, model_class, causal, folder)


def changes(default: Any, request: ModelRequest) -> dict[str, Any]:
    """Return the settings that a request asks for, by the names that the configuration has."""
    sizes: dict[str, Any] = {}
    if request.depth is not None:
        sizes |= dict.fromkeys(_depth_names(default, request), request.depth)
    if request.width is not None:
        sizes[_width_name(default, request)] = request.width
    own = {_own_name(default, n, request): v for n, v in request.settings.items()}
    for name in sizes.keys() & own.keys():
        option = "--width" if sizes[name] == request.width else "--depth"
        rule = f"{option} and --set {name} say the same"
        raise UsageError(rule, request.title, "leave out one of the two")
    return sizes | _with_width(default, request) | own


def inputs(build: Build, request: ModelRequest, seed: int) -> dict[str, Tensor]:
    """Return random tokens, or normal pixels, in the sizes of the configuration.

    Raises:
        UsageError: the model takes something else, or fewer tokens.
    """
    config, samples = build.config, request.batch_size or _BATCH_SIZE
    source = torch.Generator().manual_seed(seed)
    kind = build.model_class.main_input_name
    if kind == _PIXELS:
        size = request.image_size or config.image_size
        pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return {_PIXELS: torch.randn(samples, config.num_channels, *pair, generator=source)}
    if kind != _TOKENS:
        rule = f"{without_digest(request.model)} takes {kind}, which gradflow does not make"
        raise UsageError(rule, "no --input", "give --input my_pkg.data:batches")
    if request.image_size is not None:
        rule = "--image-size is for models of images"
        raise UsageError(rule, without_digest(request.model), "use --seq-len")
    ids = torch.randint(config.vocab_size, (samples, tokens(build, request)), generator=source)
    return as_inputs(build, ids)


def as_inputs(build: Build, ids: Tensor) -> dict[str, Tensor]:
    """Return the arguments of the model for token ids; encoder and decoder get the same ids."""
    names = (_TOKENS, "decoder_input_ids") if _has_encoder(build.config) else (_TOKENS,)
    return dict.fromkeys(names, ids)


def tokens(build: Build, request: ModelRequest) -> int:
    """Return the number of tokens in a sample.

    Raises:
        UsageError: the model has fewer positions.
    """
    most = getattr(build.config, "max_position_embeddings", None)
    if most is None or request.seq_len is None:
        return request.seq_len or _SEQ_LEN
    if request.seq_len > most:
        rule = f"{without_digest(request.model)} has positions for {most} tokens"
        raise UsageError(rule, f"--seq-len {request.seq_len}", f"use --seq-len {most} or less")
    return request.seq_len


def _default_config(hf: Any, name: str, folder: str | None) -> Any:
    if folder is not None:
        with errors_of_users_code("config.json"):
            return hf.AutoConfig.from_pretrained(folder, local_files_only=True)
    known = list(hf.CONFIG_MAPPING.keys())
    if name not in known:
        nearest = ", ".join(closest_first(name, known)[:_SHOWN_NAMES])
        rule = "hf: names a model type of transformers, one of its classes, or a folder"
        raise UsageError(rule, name, f"use for example {nearest}")
    return hf.AutoConfig.for_model(name)


def _stored_class(hf: Any, config: Any) -> Any:
    """Return the class that the weights were stored from; None if the folder does not say."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(hf, names[0], None)


def _class_of(hf: Any, config: Any) -> Any:
    """Return the causal model with its head if the type has one and no encoder; else the bare."""
    names, causal = hf.models.auto.modeling_auto, _causal(hf)
    kind = config.model_type
    is_decoder = getattr(config, "is_decoder", False)
    encoder = kind in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder
    if kind in causal and not encoder and not _has_encoder(config):
        return getattr(hf, causal[kind])
    bare = names.MODEL_MAPPING_NAMES.get(kind)
    if bare is None:
        rule = "hf: takes causal language models and encoders"
        raise UsageError(rule, kind, "give the class itself, for example hf:GPT2LMHeadModel")
    return getattr(hf, bare if isinstance(bare, str) else bare[0])


def _causal(hf: Any) -> dict[str, str]:
    return dict(hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _with(default: Any, found: dict[str, Any], folder: str | None) -> Any:
    """Make the configuration anew, because lists with an item for each layer follow from sizes."""
    if folder is None:
        return type(default)(**found)
    for name, value in found.items():  # sizes are those of the weights
        setattr(default, name, value)
    return default


def _depth_names(config: Any, request: ModelRequest) -> list[str]:
    own = [config.attribute_map.get(name, name) for name in _DEPTHS]
    names = [name for name in own if _has(config, name)][:1]
    if hasattr(config, "depths"):  # which says how many layers each stage has
        names = []
    if not names:
        rule = f"--depth sets the number of layers of {without_digest(request.model)}"
        raise UsageError(rule, "it has none of that name", "use --set, for example depths=[3,3]")
    return names + [name for name in _DECODER_DEPTHS if _has(config, name)]


def _width_name(config: Any, request: ModelRequest) -> str:
    for name in (config.attribute_map.get(name, name) for name in _WIDTHS):
        if isinstance(getattr(config, name, None), int):
            return str(name)
    rule = f"--width sets the features of {without_digest(request.model)}"
    raise UsageError(rule, "it has none of that name", "use --set")


def _with_width(config: Any, request: ModelRequest) -> dict[str, int]:
    """Return the sizes that scale with the width, by its ratio."""
    if request.width is None:
        return {}
    ratio = request.width / getattr(config, _width_name(config, request))
    names = dict.fromkeys(config.attribute_map.get(n, n) for n in _WITH_WIDTH)
    values = {name: getattr(config, name, None) for name in names}
    return {n: max(1, round(v * ratio)) for n, v in values.items() if isinstance(v, int)}


def _own_name(config: Any, name: str, request: ModelRequest) -> str:
    own = str(config.attribute_map.get(name, name))
    if not _has(config, own):
        known = [key for key in config.to_dict() if not key.startswith("_")]
        nearest = ", ".join(closest_first(name, known)[:_SHOWN_NAMES])
        rule = f"--set names a setting of {without_digest(request.model)}"
        raise UsageError(rule, name, f"use for example {nearest}")
    return own


def _has(config: Any, name: str) -> bool:
    return name in config.to_dict()


def _has_encoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))
