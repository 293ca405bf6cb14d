"""What users may import: the names of the documented modules, and nothing else in the pages."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec

import pytest
from doc_blocks import PAGES, blocks
from reference_tables import PUBLIC_MODULES, public_names

# Names that need an extra, or a GPU, are looked up where they can be.
NEEDS = {"HuggingFaceCallback": "transformers", "LightningCallback": "lightning"}


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_name_is_there_once_and_says_what_it_is(module: str) -> None:
    names = public_names(module)
    assert names
    assert len(names) == len(set(names))
    for name in names:
        if name not in NEEDS:
            thing = getattr(import_module(module), name)
            assert not callable(thing) or thing.__doc__, name


@pytest.mark.slow  # for what they import
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NEEDS)
def test_every_callback_is_there(name: str) -> None:
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    assert getattr(import_module("gradflow.watching.callbacks"), name)


def imported(code: str) -> list[tuple[str, str]]:
    """Module and name of each import from gradflow in a text, and of each `gradflow.name`."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gradflow"):
            found += [(str(node.module), alias.name) for alias in node.names]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "gradflow":
            found.append(("gradflow", node.attr))
    return found


def test_pages_import_public_names_alone() -> None:
    used = {pair for block in blocks("python") for pair in imported(block.text)}
    assert ("gradflow.schemes", "Wiring") in used
    fixture = ("gradflow", "assert_gradient_flow")  # a test's argument has the package's name
    public = {(module, name) for module in PUBLIC_MODULES for name in public_names(module)}
    assert used - {fixture} <= public


def test_pages_name_public_modules_alone() -> None:
    """Folders that the pages tell of are no modules that they import from."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line
            for line in text.splitlines()
            if line.startswith(("from gradflow", "import gradflow"))
        ]
        assert all(line.split()[1] in PUBLIC_MODULES for line in lines)
