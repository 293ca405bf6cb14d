"""Trained weights from safetensors files, layer by layer: only what is asked for is read.

Files are mapped into memory for one call and closed after it, so memory holds one layer of the
checkpoint, whatever its size. Values are converted to the dtype of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gradflow.errors import UsageError
from gradflow.specs.checkpoints import INDEX, ParameterSource, Pretrained, files_of

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_layer(weights: Pretrained, layer: int, block: nn.Module) -> None:
    """Put the values of layer `layer` (from 1) into the parameters of a block, in place.

    Raises:
        UsageError: a file or tensor is missing, broken, or of another shape.
    """
    parts = weights.architecture.parts
    at = weights.architecture.layer.format(layer - 1)
    with _opened(weights) as tensors:
        for name, parameter in block.named_parameters():
            part, _, kind = name.rpartition(".")
            source = parts[part]
            tensors.fill(parameter, f"{at}{source.name}.{kind}", source)


def load_head(weights: Pretrained, norm: nn.Module, project: nn.Module) -> None:
    """Put in the values of the final norm and of the head, which may be the embedding."""
    kind = weights.architecture
    with _opened(weights) as tensors:
        for name, parameter in norm.named_parameters():
            tensors.fill(parameter, f"{kind.norm}.{name}")
        head = kind.embedding if weights.tied else kind.head
        for name, parameter in project.named_parameters():
            tensors.fill(parameter, f"{head}.{name}")


def embed(weights: Pretrained, tokens: Tensor, width: int) -> Tensor:
    """Return the embeddings of tokens, plus those of their positions where these are learned.

    Tokens are (B, T) on the CPU, embeddings (B, T, width) in the checkpoint's own dtype; only the
    rows in question are read.
    """
    kind = weights.architecture
    with _opened(weights) as tensors:
        rows = tensors.rows(f"{kind.embedding}.weight", tokens, width)
        if kind.positions:
            places = torch.arange(tokens.shape[1])
            rows = rows.double() + tensors.rows(f"{kind.positions}.weight", places, width)
    return rows


@contextmanager
def _opened(weights: Pretrained) -> Iterator[Tensors]:
    """Open the tensors of a checkpoint; its files are closed at the end."""
    with ExitStack() as files:
        yield Tensors(weights, files)


class Tensors:
    """The tensors of a checkpoint, by their names without the prefix of the model.

    Its methods raise `UsageError` where a file or tensor is missing, broken, or of another shape.
    """

    def __init__(self, weights: Pretrained, files: ExitStack) -> None:
        self._prefixes = weights.architecture.prefixes
        self._files, self._open = files, dict[Path, Any]()
        files_by_name = files_of(weights.where())
        if isinstance(files_by_name, Path):  # one file has all tensors
            file = files_by_name
            files_by_name = dict.fromkeys(self._file(file).keys(), file)
        self._where = files_by_name

    def fill(self, parameter: Tensor, name: str, source: ParameterSource | None = None) -> None:
        """Copy a tensor, or the part that the source says, into a parameter."""
        source = source or ParameterSource("")
        flip = source.transposed and parameter.ndim == 2
        shape = list(reversed(parameter.shape)) if flip else list(parameter.shape)
        out = shape[-1]
        if source.third is not None:
            shape[-1] *= 3
        values = self._values(name)
        if list(values.shape) != shape:
            raise _unlike(name, values, shape)
        if source.third is not None:
            values = values.narrow(-1, source.third * out, out)
        with torch.no_grad():
            parameter.copy_(values.T if flip else values)

    def rows(self, name: str, places: Tensor, width: int) -> Tensor:
        """Return some rows of a matrix, in the checkpoint's own dtype."""
        values, least = self._values(name), int(places.max()) + 1
        if list(values.shape[1:]) != [width] or len(values) < least:
            raise _unlike(name, values, [least, width])
        return values[places]

    def _values(self, name: str) -> Tensor:
        """Return a tensor as the file has it, mapped: parts that are not used are not read."""
        full, file = self._find(name)
        try:
            values: Tensor = file.get_tensor(full)
        except SafetensorError as error:
            rule = f"{full} is where {INDEX} says"
            raise UsageError(rule, str(error), "copy the folder again") from None
        if values.dtype not in _FLOATS:
            rule = "weights are plain floating-point numbers of 16 bits or more"
            raise UsageError(rule, f"{full} in {values.dtype}", "use a checkpoint without packing")
        return values

    def _find(self, name: str) -> tuple[str, Any]:
        for full in (prefix + name for prefix in self._prefixes):
            if full in self._where:
                return full, self._file(self._where[full])
        rule = "the checkpoint has every tensor of its architecture"
        raise UsageError(rule, f"no {name}", "complete the folder")

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._files.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                rule = f"{file.name} is a whole safetensors file"
                raise UsageError(rule, str(error), "copy it again") from None
        return self._open[file]


def _unlike(name: str, values: Tensor, shape: list[int]) -> UsageError:
    got = f"{name} of {'x'.join(map(str, values.shape))}"
    rule = f"tensors have the shapes of config.json, here {'x'.join(map(str, shape))}"
    return UsageError(rule, got, "use the config.json that belongs to the weights")
