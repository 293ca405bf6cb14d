"""The house in numbers: names, rooms, arrows, prose and size of the package, each beside its limit.

Run with `python benchmarks/house.py`; writes results/benchmarks/house.md. With `--places` it prints
the places of what has the limit 0, and of names that are defined twice, and measures nothing. The
functions read the source alone; tests/test_house.py holds the limits.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from side_by_side import write_table

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "gradflow"
TESTS = REPOSITORY / "tests"
# The one module that may touch private parts of torch.
TORCH_INTERNALS = "gradflow.torch_internals"
# A docstring opens with a fragment where its first word hangs on a noun that stands elsewhere: a
# relative word, a preposition or a pronoun; or where it asks for one ("What it ...").
FRAGMENT = re.compile(
    r"(That|Those|Which|Whose|Where|Of|As|With|Without|But|Nor|Also|Likewise|Its?|Their|They|"
    r"Them|The same|What (it|its|they|their|these|those|this|that))\b"
)
LEAST_WORDS = 5
# Attributes that torch keeps private, whoever reads or writes them.
TORCH_ATTRIBUTES = {"_modules", "_parameters", "_buffers", "_version", "_orig_mod", "_scale"}
# Objects whose private attributes are not torch's: Python's own, and `aten`, whose operators have
# names like any other.
FOREIGN = {"os", "sys", "self", "cls", "aten"}
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ROUNDS = 5


@dataclass(frozen=True)
class Source:
    """One module of the package: its dotted name, its text and its syntax tree."""

    name: str
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """Lines of the file, empty ones and comments too."""
        return len(self.text.splitlines())


@cache
def sources() -> tuple[Source, ...]:
    """Every module of the package."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = file.read_text(encoding="utf-8")
        found.append(Source(name, text, ast.parse(text)))
    return tuple(found)


# Names


def public_names(source: Source) -> set[str]:
    """The names without an underscore that a module defines at its top level."""
    found: set[str] = set()
    for node in source.tree.body:
        if isinstance(node, Definition):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            found |= {n.id for n in ast.walk(target or ast.Pass()) if isinstance(n, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def names_defined_twice() -> dict[str, list[str]]:
    """Public top-level names that two modules or more define, with these modules."""
    homes: dict[str, list[str]] = defaultdict(list)
    for source in sources():
        for name in public_names(source):
            homes[name].append(source.name)
    return {name: modules for name, modules in sorted(homes.items()) if len(modules) > 1}


# Rooms and arrows


def top_level() -> tuple[list[str], list[str]]:
    """Folders and files at the top of the package."""
    entries = [e for e in PACKAGE.iterdir() if not e.name.startswith(("__pycache__", "."))]
    folders = sorted(e.name for e in entries if e.is_dir())
    return folders, sorted(e.name for e in entries if e.is_file())


@cache
def layers() -> dict[str, int]:
    """The rooms with their height: 0 is the lowest layer of the import contract."""
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = pyproject["tool"]["importlinter"]["contracts"]
    (rows,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {
        room.strip(): height
        for height, row in enumerate(reversed(rows))
        for room in re.split("[|:]", row)
    }


def imports(source: Source) -> set[str]:
    """The modules and names of gradflow that a module imports when it runs, at any depth in it."""
    found: set[str] = set()
    for node in _run_time_nodes(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "gradflow"}


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree without what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _run_time_nodes(node)


def room(name: str) -> str:
    """The room that a module or a name in it belongs to; `gradflow` for the package itself."""
    parts = name.split(".")[:2]
    return ".".join(parts) if ".".join(parts) in layers() else "gradflow"


def arrows_up() -> list[str]:
    """Imports from a room into a higher one, or into another of its own layer."""
    heights = layers()
    found = []
    for source in sources():
        start = room(source.name)
        for name in sorted(imports(source)):
            end = room(name)
            if "gradflow" in (start, end) or start == end:
                continue
            if heights[end] >= heights[start]:
                found.append(f"{source.name} -> {name}")
    return found


def rooms_without_layer() -> list[str]:
    """Modules that the import contract does not place, but for the package's own two."""
    names = {source.name for source in sources()} - {"gradflow", "gradflow.__main__"}
    return sorted(name for name in names if room(name) == "gradflow")


# Private parts of torch


def private_torch() -> list[str]:
    """Uses of private parts of torch outside the module that is their home.

    A use is an import from torch with a part that begins with an underscore; an attribute that
    torch keeps private; or any attribute with an underscore that no class of the package has.
    """
    own = {name for source in sources() for name in _members(source.tree)}
    found = []
    for source in sources():
        if source.name == TORCH_INTERNALS or "torch" not in source.text:
            continue
        for node in ast.walk(source.tree):
            found += [f"{source.name}:{node.lineno} {use}" for use in _private_uses(node, own)]
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _members(tree: ast.Module) -> Iterator[str]:
    """The names of methods and attributes of a module's own classes, and of its functions."""
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                yield from (n.id for n in ast.walk(statement) if isinstance(n, ast.Name))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr if ast.unparse(node.value) == "self" else ""


def _private_uses(node: ast.AST, own: set[str]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
        parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        yield from (f"import of {part}" for part in parts if _is_private(part))
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        yield from (f"import of {name}" for name in names if any(map(_is_private, name.split("."))))
    if isinstance(node, ast.Attribute):
        yield from _private_attribute(ast.unparse(node.value), node.attr, own)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
        value, name = node.args[:2]
        if isinstance(name, ast.Constant):
            yield from _private_attribute(ast.unparse(value), str(name.value), own)


def _private_attribute(value: str, name: str, own: set[str]) -> Iterator[str]:
    known = (own | OF_NAMED_TUPLES) - TORCH_ATTRIBUTES
    if _is_private(name) and value not in FOREIGN and name not in known:
        yield f"{value}.{name}"


# Prose


def docstrings() -> Iterator[tuple[str, bool, str]]:
    """Every docstring: where it stands, whether that name is public, and its text."""
    for source in sources():
        yield from _docstrings(source.tree, source.name, public=True)


def _docstrings(node: ast.AST, where: str, *, public: bool) -> Iterator[tuple[str, bool, str]]:
    if isinstance(node, ast.Module | Definition):
        text = ast.get_docstring(node)
        if text is not None:
            yield where, public, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            inside = isinstance(node, ast.Module | ast.ClassDef)
            is_public = public and inside and not child.name.startswith("_")
            yield from _docstrings(child, f"{where}.{child.name}", public=is_public)
        else:
            yield from _docstrings(child, where, public=public)


def short_docstrings() -> list[str]:
    """Docstrings of public names that have fewer than five words."""
    return [
        f"{where}: {text}"
        for where, public, text in docstrings()
        if public and len(text.split()) < LEAST_WORDS
    ]


def fragments() -> list[str]:
    """Docstrings that open with a fragment: a word that needs the sentence before it."""
    return [
        f"{where}: {text.splitlines()[0]}"
        for where, _, text in docstrings()
        if FRAGMENT.match(text)
    ]


# Size


def readme_bytes() -> int:
    """The bytes of the README."""
    return len((REPOSITORY / "README.md").read_bytes())


def package_lines() -> int:
    """The lines of all modules of the package."""
    return sum(source.lines for source in sources())


def modules_by_room() -> Counter[str]:
    """The number of modules in each folder of the package; `top` are those in none."""
    folders = {f"gradflow.{folder}" for folder in top_level()[0]}
    rooms = (".".join(source.name.split(".")[:2]) for source in sources())
    return Counter(name.partition(".")[2] if name in folders else "top" for name in rooms)


def tests_by_room() -> dict[str, int]:
    """The test functions in each folder of the tests; a table of cases counts once."""
    found: Counter[str] = Counter()
    for file in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        folder = file.parent.relative_to(TESTS).as_posix().replace(".", "top")
        found[folder] += sum(function.name.startswith("test_") for function in functions)
    return dict(found)


# The start of the program


def cpu_seconds(*command: str) -> float:
    """The median of the CPU times of a command, in seconds: other work does not change it much."""
    times = []
    for _ in range(ROUNDS):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        user, system = after.children_user, after.children_system
        times.append(user + system - before.children_user - before.children_system)
    return median(times)


def import_loads_torch() -> bool:
    """Whether `import gradflow` loads torch."""
    code = "import sys, gradflow; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip() == "True"


# The table


@dataclass(frozen=True)
class Figure:
    """One row of the table: what is counted, its limit, and the count."""

    name: str
    limit: str
    value: str


def figures() -> list[Figure]:
    """Every figure of the house with its limit."""
    folders, files = top_level()
    program = str(Path(sys.executable).with_name("gradflow"))
    return [
        Figure(
            "public top-level names in two modules or more", "5", str(len(names_defined_twice()))
        ),
        Figure("folders at the top of the package", "14", str(len(folders))),
        Figure("files at the top of the package", "8", str(len(files))),
        Figure("import arrows that go up", "0", str(len(arrows_up()))),
        Figure("private parts of torch outside their module", "0", str(len(private_torch()))),
        Figure("bytes of the README", "12,288", f"{readme_bytes():,}"),
        Figure("public docstrings under five words", "0", str(len(short_docstrings()))),
        Figure("docstrings that open with a fragment", "0", str(len(fragments()))),
        Figure("lines of the package", "26,500", f"{package_lines():,}"),
        Figure("modules of the package", "170", str(len(sources()))),
        *_path_figures(),
        Figure("`gradflow --help`, CPU seconds", "0.25", f"{cpu_seconds(program, '--help'):.2f}"),
        Figure(
            "`import gradflow`, CPU seconds above Python's own start",
            "",
            f"{_import_seconds():.3f}",
        ),
        Figure("`import gradflow` loads torch", "no", "yes" if import_loads_torch() else "no"),
    ]


def _import_seconds() -> float:
    with_it = cpu_seconds(sys.executable, "-c", "import gradflow")
    return with_it - cpu_seconds(sys.executable, "-c", "")


def _path_figures() -> list[Figure]:
    from run_path import direct_path, entered_twice, traced_run  # loads torch

    trace = traced_run()
    return [
        Figure("files on the direct path of a stack run", "20", str(len(direct_path(trace)))),
        Figure("files on that path entered twice", "0", str(len(entered_twice(trace)))),
    ]


def print_places() -> None:
    """Print every place that a limit is about."""
    for name, modules in names_defined_twice().items():
        print(f"{name}: {', '.join(modules)}")
    for places in (arrows_up(), private_torch(), short_docstrings(), fragments()):
        print("", *places, sep="\n")


def main() -> None:
    """Measure the house and write the table."""
    rows = [(figure.name, figure.limit, figure.value) for figure in figures()]
    tests = ", ".join(f"{room} {number}" for room, number in tests_by_room().items())
    modules = ", ".join(f"{room} {n}" for room, n in modules_by_room().most_common())
    note = f"Test functions by folder: {tests}.\n\nModules by folder: {modules}."
    write_table("house", "The house in numbers", ("figure", "at most", "is"), rows, note)


if __name__ == "__main__":
    print_places() if "--places" in sys.argv else main()
