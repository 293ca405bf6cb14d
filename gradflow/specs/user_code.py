"""Schemes and blocks from a user's own file: `my_scheme.py:SCHEME`.

`from_file` is the only way by which such a file runs: the command line calls it for what stands
in an option, a person calls it from Python, a worker for the cells that it is given. What it
returns is a name with the digest of the file's content, `my_scheme.py:SCHEME@1a2b3c4d`. That name
is all that a spec and a stored run hold, so reading a run never runs anybody's code.
"""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gradflow.errors import UsageError, closest_first

EXAMPLE = "my_scheme.py:SCHEME"
SHOWN_NAMES = 5
_REFERENCE = re.compile(r"(?P<file>.+\.py):(?P<thing>\w+)")
# A comma would part a list of options, a slash would be a folder.
_FILE = r"[\w .+-]+\.py"
_NAME = re.compile(rf"(?P<shown>{_FILE}:[^\W\d]\w*)@[0-9a-f]{{8}}")


@dataclass(frozen=True)
class UserCode:
    """What a file holds under a name.

    Attributes:
        reference: `path:name`, the path absolute.
        value: the object.
    """

    reference: str
    value: Any


# Keyed by content, so it does not matter who loaded a file, or how often.
_LOADED: dict[str, UserCode] = {}


def is_reference(text: str) -> bool:
    """Whether it names a thing in a file: `path/my_scheme.py:SCHEME`."""
    return _REFERENCE.fullmatch(text) is not None


def is_user_name(name: object) -> bool:
    """Whether it is what `from_file` returns; published names are not."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def shown(name: str) -> str:
    """The name as a person wrote it, without the digest; published names as they are."""
    match = _NAME.fullmatch(name)
    return match["shown"] if match else name


def thing(name: str) -> str:
    """What it is called in its file."""
    return shown(name).rpartition(":")[2]


def is_loaded(name: str) -> bool:
    """Whether its file was loaded in this process."""
    return name in _LOADED


def loaded(name: str) -> Any:
    """The object of that name.

    Raises:
        UsageError: its file was not loaded in this process.
    """
    if name not in _LOADED:
        rule = "what a file defines is measured after the file was loaded"
        remedy = "give the file itself, in Python with gradflow.from_file"
        raise UsageError(rule, name, remedy)
    return _LOADED[name].value


def reference_of(name: str) -> str | None:
    """`path:name` of what was loaded, for another process to load; None for published names."""
    return _LOADED[name].reference if name in _LOADED else None


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
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError("a file is given with a name in it", reference, f"use {EXAMPLE}")
    path = Path(match["file"])
    source = _read(path)
    digest = hashlib.sha256(source).hexdigest()[:8]
    name = f"{path.name}:{match['thing']}@{digest}"
    if name in _LOADED:
        value = _LOADED[name].value
    else:
        value = _take(_run(path, source, digest), path, match["thing"])
    # The same content may have been read elsewhere before, where it is another by now.
    _LOADED[name] = UserCode(f"{path.resolve()}:{match['thing']}", value)
    return name


def load_again(name: str, reference: str) -> None:
    """Load in this process what another loaded under `name`.

    Raises:
        UsageError: the file is not there, or another one by now.
    """
    if name not in _LOADED and from_file(reference) != name:
        rule = "a file stays as it is while it is measured"
        raise UsageError(rule, f"another {shown(name)}", "start again")


def _read(path: Path) -> bytes:
    if not re.fullmatch(_FILE, path.name):
        remedy = "rename it: letters, digits, and . _ + - or spaces"
        raise UsageError("the name of a file is plain", path.name, remedy)
    try:
        return path.read_bytes()
    except OSError as error:
        got = f"{path} ({error.strerror})"
        raise UsageError("the file can be read", got, f"use {EXAMPLE}") from None


def _run(path: Path, source: bytes, digest: str) -> ModuleType:
    """The module of exactly this content; a cached compilation could be of another."""
    module = ModuleType(f"gradflow_user_{digest}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        with redirect_stdout(sys.stderr):  # stdout may be a JSON object
            exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a user's code may raise anything)
        del sys.modules[module.__name__]
        got = f"{path.name} ({told(error, path)})"
        raise UsageError("the file runs", got, "mend it") from None
    return module


def told(error: BaseException, path: Path | None = None) -> str:
    """An error of a user's code in a few words: its kind, its first line, and where it arose."""
    text = next(iter(str(error).strip().splitlines()), "")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if path and frame.filename == str(path)]
    where = f", line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _take(module: ModuleType, path: Path, wanted: str) -> Any:
    names = [name for name in vars(module) if not name.startswith("__")]
    if wanted not in names:
        nearest = ", ".join(closest_first(wanted, names)[:SHOWN_NAMES])
        rule = f"{path.name} defines the name that is asked for"
        raise UsageError(rule, wanted, f"use {nearest or 'a file that defines it'}")
    return vars(module)[wanted]
