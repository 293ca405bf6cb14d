"""Where a user's model, its batches or its folder of weights lies. Torch-free.

What a spec keeps, and all that is ever stored, is a name with a digest. The name carries the place
that it stands for, also to another process, for as long as it is not stored.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradflow.errors import UsageError, closest_first, is_out_of_memory
from gradflow.specs.checkpoint_folders import CONFIG, digest_of
from gradflow.specs.user_code import told

EXAMPLE = "my_pkg.models:build"
SHOWN_NAMES = 5
_REFERENCE = re.compile(r"(?P<module>[\w.]+|.*\.py):(?P<thing>\w+)")


@dataclass(frozen=True)
class Place:
    """What a name stands for.

    Attributes:
        folder: where imports begin; or the folder of weights.
        module: its dotted name, or a file in the folder.
        thing: what it is called there.
    """

    folder: Path
    module: str = ""
    thing: str = ""


class Located(str):
    """A name with the digest of what it stands for: `my_pkg.models:build@1a2b3c4d`.

    Attributes:
        place: where that is; None where the name was read from a run.
    """

    place: Place | None = None

    @property
    def shown(self) -> str:
        """The name as a person wrote it, less its folders."""
        return self.rpartition("@")[0]

    def where(self) -> Place:
        """The place.

        Raises:
            UsageError: it is not known.
        """
        if self.place is None:
            rule = "a model is measured from where it lies"
            raise UsageError(rule, f"the name {self} alone", f"give {EXAMPLE} itself")
        return self.place


def is_reference(text: str) -> bool:
    """Whether it names a thing in a module or a file: `my_pkg.models:build`, `models.py:build`."""
    return not text.startswith("hf:") and _REFERENCE.fullmatch(text) is not None


def locate_code(text: str, root: Path | None = None) -> Located:
    """What a reference names; its module is looked for, and not run.

    Args:
        text: `my_pkg.models:build`, or `models.py:build` with or without folders.
        root: where imports begin; the working directory if None.

    Raises:
        UsageError: no such module or file.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise UsageError("a model is given by its module and its name", text, f"use {EXAMPLE}")
    module, thing = match["module"], match["thing"]
    if module.endswith(".py"):
        file = Path(module).resolve()
        place = Place(file.parent, file.name, thing)
    else:
        place = Place((root or Path.cwd()).resolve(), module, thing)
        file = _file_of(place)
    digest = hashlib.sha256(_content(file)).hexdigest()[:8]
    return _named(f"{place.module}:{thing}", digest, place)


def locate_folder(text: str) -> Located:
    """A folder with config.json and safetensors, as Hugging Face has it.

    Raises:
        UsageError: a file is missing.
    """
    folder = Path(text).resolve()
    if not (folder / CONFIG).is_file():
        rule = "hf: names a model type of transformers, one of its classes, or a folder"
        raise UsageError(rule, repr(text), "use for example hf:gpt2, or a folder with config.json")
    return _named(f"hf:{folder.name}", digest_of(folder), Place(folder))


def load(name: Located) -> Any:
    """Import what a name stands for; its folder stays among those that imports look into.

    Raises:
        UsageError: it does not run, or has no such name.
    """
    place = name.where()
    with users_own(name.shown):
        module = _imported(place)
    known = [n for n in vars(module) if not n.startswith("_")]
    if place.thing not in vars(module):
        nearest = ", ".join(closest_first(place.thing, known)[:SHOWN_NAMES])
        rule = f"{place.module} defines the name that is asked for"
        raise UsageError(rule, place.thing, f"use {nearest or 'a module that defines it'}")
    return vars(module)[place.thing]


@contextmanager
def users_own(what: str) -> Iterator[None]:
    """Errors of a user's code in one line that says where they arose; its output on stderr.

    Raises:
        UsageError: anything but running out of memory went wrong in it.
    """
    try:
        with redirect_stdout(sys.stderr):  # stdout may be a JSON object
            yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{what} runs", told(error), "mend it") from error


def _imported(place: Place) -> Any:
    if str(place.folder) not in sys.path:
        sys.path.insert(0, str(place.folder))
    if not place.module.endswith(".py"):
        return importlib.import_module(place.module)
    return _run_file(place.folder / place.module)


def _run_file(file: Path) -> Any:
    """The module of a file, under a name that is no other module's."""
    name = f"gradflow_user_{hashlib.sha256(bytes(file)).hexdigest()[:8]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _file_of(place: Place) -> Path:
    """The file of a module, looked up from the folder; its parent packages are imported for it."""
    if str(place.folder) not in sys.path:
        sys.path.insert(0, str(place.folder))
    with users_own(place.module):
        try:
            found = importlib.util.find_spec(place.module)
        except ModuleNotFoundError:
            found = None
    if found is None or not found.origin or not Path(found.origin).is_file():
        rule = "a model's module can be imported from here"
        raise UsageError(rule, place.module, f"use {EXAMPLE}, or models.py:build")
    return Path(found.origin)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        got = f"{file.name} ({error.strerror})"
        raise UsageError("the file can be read", got, "use for example models.py:build") from None


def _named(shown: str, digest: str, place: Place) -> Located:
    name = Located(f"{shown}@{digest}")
    name.place = place
    return name
