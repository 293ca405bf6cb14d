"""A user's own code: objects that files define, and models that modules or files build. Torch-free.

Two words name such code, and each stands for a content that its digest tells:

* `my_scheme.py:SCHEME` is an object of one file that stands alone: a scheme or a branch. Such a
  file runs by `from_file` alone, which returns `my_scheme.py:SCHEME@1a2b3c4d`, and keeps the object
  under that name in `LOADED`, the one piece of state of this process that specs read.
* `my_pkg.models:build`, or `models.py:build`, is an import: a model or its batches. `locate_import`
  finds it without running it; the `LocatedName` that it returns carries where imports begin.

A spec and a stored run hold these names alone, so reading a run never runs anybody's code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gradflow.errors import UsageError, closest_first, is_out_of_memory

IMPORT_EXAMPLE = "my_pkg.models:build"
_FILE_EXAMPLE = "my_scheme.py:SCHEME"
_SHOWN_NAMES = 5
_FILE_REFERENCE = re.compile(r"(?P<file>.+\.py):(?P<thing>\w+)")
_IMPORT_REFERENCE = re.compile(r"(?P<module>[\w.]+|.*\.py):(?P<thing>\w+)")
# A comma would part a list of options, a slash would be a folder.
_FILE = r"[\w .+-]+\.py"
_USER_NAME = re.compile(rf"{_FILE}:[^\W\d]\w*@[0-9a-f]{{8}}")
_DIGESTED = re.compile(r"(?P<shown>.*:.*)@[0-9a-f]{8}", re.DOTALL)


@dataclass(frozen=True)
class LoadedObject:
    """An object that a user's file defines; `reference` is `path:name`, the path absolute."""

    reference: str
    value: Any


# Keyed by name with the digest of the content: it does not matter who loaded a file, or how often.
LOADED: dict[str, LoadedObject] = {}


@dataclass(frozen=True)
class ImportTarget:
    """The place of a model, of its batches or of its folder of weights.

    Attributes:
        folder: where imports begin; or the folder of weights.
        module: dotted name of the module, or a file in the folder.
        thing: name of the object in the module.
    """

    folder: Path
    module: str = ""
    thing: str = ""


class LocatedName(str):
    """A name with the digest of what it stands for: `my_pkg.models:build@1a2b3c4d`.

    The name carries the target also to another process, for as long as it is not stored.

    Attributes:
        target: what the name stands for; None where the name was read from a run.
    """

    target: ImportTarget | None = None

    def where(self) -> ImportTarget:
        """Return what the name stands for; UsageError where that is not known."""
        if self.target is None:
            rule = "a model is measured from where it lies"
            raise UsageError(rule, f"the name {self} alone", f"give {IMPORT_EXAMPLE} itself")
        return self.target


def names_file_object(text: str) -> bool:
    """Whether the text names an object in a file: `path/my_scheme.py:SCHEME`."""
    return _FILE_REFERENCE.fullmatch(text) is not None


def names_import(text: str) -> bool:
    """Whether the text names an object to import: `my_pkg.models:build`, `models.py:build`."""
    return not text.startswith("hf:") and _IMPORT_REFERENCE.fullmatch(text) is not None


def is_user_name(name: object) -> bool:
    """Whether the name is one that `from_file` returns; published names are not."""
    return isinstance(name, str) and _USER_NAME.fullmatch(name) is not None


def without_digest(name: str) -> str:
    """Return a name as a person wrote it: a user's without its digest, others as they are."""
    match = _DIGESTED.fullmatch(name)
    return match["shown"] if match else name


def object_name(name: str) -> str:
    """Return what the object of a user's name is called in its file."""
    return without_digest(name).rpartition(":")[2]


def is_loaded(name: str) -> bool:
    """Whether the object of that name was loaded in this process."""
    return name in LOADED


def loaded(name: str) -> Any:
    """Return the object that was loaded under a name; UsageError where none was in this process."""
    if name not in LOADED:
        rule = "what a file defines is measured after the file was loaded"
        remedy = "give the file itself, in Python with gradflow.from_file"
        raise UsageError(rule, name, remedy)
    return LOADED[name].value


def reference_of(name: str) -> str | None:
    """Return `path:name` of a loaded object, for another process; None for published names."""
    return LOADED[name].reference if name in LOADED else None


def from_file(reference: str) -> str:
    """Run a Python file and take one object of it, a scheme or a branch.

    The file stands alone: its folder is no place that it can import from, because the digest
    covers its own content only.

    Args:
        reference: `my_scheme.py:SCHEME`, with or without folders.

    Returns:
        The name for `StackSpec`: `my_scheme.py:SCHEME@1a2b3c4d`, with the digest of the content.

    Raises:
        UsageError: no such file or name in it, or the file does not run.
    """
    match = _FILE_REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError("a file is given with a name in it", reference, f"use {_FILE_EXAMPLE}")
    path = Path(match["file"])
    if not re.fullmatch(_FILE, path.name):
        remedy = "rename it: letters, digits, and . _ + - or spaces"
        raise UsageError("the name of a file is plain", path.name, remedy)
    source = _content(path, path, _FILE_EXAMPLE)
    digest = _digest(source)
    name = f"{path.name}:{match['thing']}@{digest}"
    if name in LOADED:
        value = LOADED[name].value
    else:
        value = _object_in(_run_scheme_file(path, source, digest), path.name, match["thing"])
    # The same content may have been read elsewhere before, where it is another by now.
    LOADED[name] = LoadedObject(f"{path.resolve()}:{match['thing']}", value)
    return name


def load_again(name: str, reference: str) -> None:
    """Load what another process loaded under this name; UsageError if the file has changed."""
    if name not in LOADED and from_file(reference) != name:
        rule = "a file stays as it is while it is measured"
        raise UsageError(rule, f"another {without_digest(name)}", "start again")


def locate_import(text: str) -> LocatedName:
    """Return the name of what a reference imports; its module is looked for, and not run.

    The text is `my_pkg.models:build`, or `models.py:build` with or without folders. A UsageError
    tells that there is no such module or file.
    """
    match = _IMPORT_REFERENCE.fullmatch(text)
    if match is None:
        rule = "a model is given by its module and its name"
        raise UsageError(rule, text, f"use {IMPORT_EXAMPLE}")
    module, thing = match["module"], match["thing"]
    if module.endswith(".py"):
        file = Path(module).resolve()
        target = ImportTarget(file.parent, file.name, thing)
    else:
        target = ImportTarget(Path.cwd(), module, thing)
        file = _file_of(target)
    digest = _digest(_content(file, file.name, "models.py:build"))
    return located_name(f"{target.module}:{thing}", digest, target)


def located_name(shown: str, digest: str, target: ImportTarget) -> LocatedName:
    """Return a name with its digest, which carries what it stands for."""
    name = LocatedName(f"{shown}@{digest}")
    name.target = target
    return name


def import_object(name: LocatedName) -> Any:
    """Import what a name stands for; its folder stays among those that imports look into.

    A UsageError tells that the module does not run, or has no such name.
    """
    target = name.where()
    with errors_of_users_code(without_digest(name)):
        module = _imported(target)
    return _object_in(module, target.module, target.thing)


@contextmanager
def errors_of_users_code(what: str) -> Iterator[None]:
    """Raise any error of a user's code but running out of memory as a UsageError of one line.

    The line says what failed; output of the code goes to stderr.
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


def told(error: BaseException, path: Path | None = None) -> str:
    """Return an error of a user's code in words: its kind, its first line, and where it arose."""
    text = next(iter(str(error).strip().splitlines()), "")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if path and frame.filename == str(path)]
    where = f", line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _content(file: Path, title: object, example: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        got = f"{title} ({error.strerror})"
        raise UsageError("the file can be read", got, f"use {example}") from None


def _run_scheme_file(path: Path, source: bytes, digest: str) -> ModuleType:
    try:
        with redirect_stdout(sys.stderr):  # stdout may be a JSON object
            return _run(path, source, digest)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a user's code may raise anything)
        got = f"{path.name} ({told(error, path)})"
        raise UsageError("the file runs", got, "mend it") from None


def _run(path: Path, source: bytes, digest: str) -> ModuleType:
    """The module of exactly this content; a cached compilation could be of another."""
    module = ModuleType(f"gradflow_user_{digest}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _imported(target: ImportTarget) -> ModuleType:
    if str(target.folder) not in sys.path:
        sys.path.insert(0, str(target.folder))
    if not target.module.endswith(".py"):
        return importlib.import_module(target.module)
    file = target.folder / target.module
    digest = _digest(bytes(file))  # by its place: what lies beside a file is a part of it
    name = f"gradflow_user_{digest}_{file.stem}"
    return sys.modules.get(name) or _run(file, file.read_bytes(), digest)


def _file_of(target: ImportTarget) -> Path:
    """The file of a module, looked up from the folder; its parent packages are imported for it."""
    if str(target.folder) not in sys.path:
        sys.path.insert(0, str(target.folder))
    with errors_of_users_code(target.module):
        try:
            spec = importlib.util.find_spec(target.module)
        except ModuleNotFoundError:
            spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        rule = "a model's module can be imported from here"
        raise UsageError(rule, target.module, f"use {IMPORT_EXAMPLE}, or models.py:build")
    return Path(spec.origin)


def _object_in(module: ModuleType, title: str, wanted: str) -> Any:
    if wanted not in vars(module):
        names = [name for name in vars(module) if not name.startswith("_")]
        nearest = ", ".join(closest_first(wanted, names)[:_SHOWN_NAMES])
        rule = f"{title} defines the name that is asked for"
        raise UsageError(rule, wanted, f"use {nearest or 'one that defines it'}")
    return vars(module)[wanted]
