"""Files of a user's code, written by the tests."""

from __future__ import annotations

from pathlib import Path

SCHEME = """
from gradflow.schemes import Scheme
from gradflow.schemes import Wiring

TEXTS = dict(equation="x' = a x + f(x)", init="mine", paper="mine", claim="none")
{more}
SCHEME = Scheme(**TEXTS, {fields})
"""

BRANCH = """
import torch
from torch import nn
{more}

class MyBranch(nn.Module):
    {attributes}

    def __init__(self, spec, wiring):
        super().__init__()
        {made}

    def forward(self, x):
        {returned}
"""
# What makes the scheme above a scheme.
WIRED = {"wire": "lambda at: Wiring(norms=('in',))"}
LINEAR = "self.linear = nn.Linear(spec.width, spec.width)"


def scheme_file(folder: Path, more: str = "", **fields: str) -> str:
    """A scheme with these fields, as source; returns the reference."""
    listed = ", ".join(f"{name}={source}" for name, source in (WIRED | fields).items())
    return write(folder / "my_scheme.py", SCHEME.format(more=more, fields=listed), "SCHEME")


def branch_file(folder: Path, made: str = LINEAR, **source: str) -> str:
    """A branch whose constructor does this; returns the reference."""
    given = {"returned": "return self.linear(x)", "attributes": "pass", "more": ""} | source
    return write(folder / "my_block.py", BRANCH.format(made=made, **given), "MyBranch")


def write(file: Path, text: str, name: str) -> str:
    """A file with this text; returns the reference of a name in it."""
    file.write_text(text, encoding="utf-8")
    return f"{file}:{name}"
