"""A folder with trained weights: what a spec keeps of it, and how its files are found.

Nothing here imports torch, and no weight is read but a few bytes for the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.checkpoint_formats import Architecture, architecture, setting

CONFIG = "config.json"
SINGLE = "model.safetensors"
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
        """That of the folder."""
        return self.rpartition("@")[0]

    @property
    def architecture(self) -> Architecture:
        """Names and layout of its tensors.

        Raises:
            UsageError: the folder is not known.
        """
        self.where()
        return architecture(self.config)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `StackSpec` that it decides; none where it was read from a run."""
        return self.architecture.fields(self.config) if self.folder else {}

    @property
    def most_tokens(self) -> int | None:
        """The positions that it has an embedding of; None where any number will do."""
        learned = self.folder and self.architecture.positions
        return int(setting(self.config, "n_positions", int, 1024)) if learned else None

    @property
    def tied(self) -> bool:
        """Whether its head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", self.architecture.tied))

    def where(self) -> Path:
        """The folder.

        Raises:
            UsageError: it is not known.
        """
        if self.folder is None:
            rule = "weights are read from their folder"
            raise UsageError(rule, f"the name {self} alone", "give --weights DIR")
        return self.folder


def locate(text: str) -> Pretrained:
    """The checkpoint in a folder.

    Raises:
        UsageError: no folder, a file is missing or broken, or the architecture is unknown.
    """
    folder = Path(text).resolve()  # for workers that start elsewhere
    if not folder.is_dir():
        rule = "--weights is a folder with config.json and safetensors files"
        raise UsageError(rule, repr(text), "give the folder of a checkpoint as Hugging Face has it")
    config = read_json(folder / CONFIG)
    architecture(config)
    found = Pretrained(f"{folder.name}@{digest_of(folder)}")
    found.folder, found.config = folder, config
    return found


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        UsageError: there is none.
    """
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
    """The file of each tensor by its name, or the one file of them all.

    Raises:
        UsageError: there is no such file.
    """
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UsageError(f"{INDEX} has a weight_map", "none", "copy it again")
        files = {name: _existing(folder / Path(name).name) for name in set(names.values())}
        return {tensor: files[name] for tensor, name in names.items()}
    return _existing(folder / SINGLE)


def _existing(file: Path) -> Path:
    if not file.is_file():
        rule = f"a checkpoint has {file.name}"
        pickled = any(file.parent.glob("*.bin"))
        remedy = "convert the .bin files, which can run code" if pickled else "complete the folder"
        raise UsageError(rule, f"{file.parent} without it", remedy)
    return file


def digest_of(folder: Path) -> str:
    """Eight hexadecimal digits of config, index, and sizes and samples of the weight files."""
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
