"""`gradflow schemes`: the list, the pages, what they import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import CommandLine
from user_files import scheme_file

from gradflow.schemes import SCHEMES
from gradflow.showing.terminal.schemes import scheme_constants
from gradflow.specs.block_kinds import BLOCKS

HEAVY = ("torch", "pandas", "polars", "altair", "scipy")


def words(text: str) -> str:
    """Text without its line breaks and columns."""
    return re.sub(r"\s+", "", text)


def test_the_list_names_every_scheme_within_80_columns(cli: CommandLine) -> None:
    done = cli("schemes")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    first = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert [name for name in first if name in SCHEMES] == list(SCHEMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_page_holds_all_that_is_known_of_a_scheme(cli: CommandLine, name: str) -> None:
    done, scheme = cli("schemes", name), SCHEMES[name]
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    texts = (name, scheme.equation, scheme.init, scheme.paper, scheme.claim, *scheme.pitfalls)
    for text in (*texts, *scheme.blocks, *scheme.lacks):
        assert words(text) in words(done.out), text
    for brought in scheme.defaults.values():
        assert str(brought) in done.out


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_documented(name: str) -> None:
    scheme = SCHEMES[name]
    for text in (scheme.equation, scheme.init, scheme.paper, scheme.claim):
        assert len(text.strip()) > 3, text
    assert set(scheme.blocks) <= set(BLOCKS)


def test_constants_are_those_of_the_paper_at_the_depth(cli: CommandLine) -> None:
    """DeepNorm, Wang et al. 2022, table 1: alpha = (2N)^(1/4), beta = (8N)^(-1/4)."""
    page = json.loads(cli("schemes", "deepnorm", "--depth", "8", "--json").out)
    (row,) = page["constants"]
    assert (row["depth"], row["alpha"], row["beta"]) == (8, 2.0, pytest.approx(64**-0.25))
    shown = cli("schemes", "deepnorm", "--depth", "8").out.splitlines()
    assert shown[-1].split() == ["8", "2", "0.353553"]
    depths = [row["depth"] for row in json.loads(cli("schemes", "keel", "--json").out)["constants"]]
    assert depths == sorted(depths)
    assert len(depths) > 3


def test_constants_that_vary_are_shown_by_layer_and_by_unit(
    cli: CommandLine, tmp_path: Path
) -> None:
    per_layer = "lambda at: {'c': at.layer ** -0.5}"
    own = scheme_file(tmp_path, constants=per_layer)
    rows = json.loads(cli("schemes", own, "--depth", "4", "--json").out)["constants"]
    assert [(row["layer"], row["unit"], row["c"]) for row in rows] == [(1, None, 1), (4, None, 0.5)]
    shown = cli("schemes", own, "--depth", "4").out.splitlines()
    assert [line.split() for line in shown[-3:]] == [
        ["depth", "layer", "c"],
        ["4", "1", "1"],
        ["4", "4", "0.5"],
    ]
    per_unit = "lambda at: {'k': 2.0 if at.kind == 'ffn' else 1.0}"
    own = scheme_file(tmp_path, constants=per_unit)
    rows = json.loads(cli("schemes", own, "--depth", "4", "--json").out)["constants"]
    assert [(row["layer"], row["unit"], row["k"]) for row in rows] == [
        (1, "attention", 1.0),
        (1, "ffn", 2.0),
    ]


# What is known to be missing, by a word of the line that says so.
LACKS = {
    "depth-mup": ("output multiplier", "learning rates"),
    "completep": ("output multiplier", "Adam's eps and weight decay"),
    "fixup": ("a classifier that starts at 0", "activation after the addition"),
    "mhc": ("H_pre and H_post are Table 1's, H_res is mHC-lite's",),
    "ngpt": ("s_z in the head",),
}


@pytest.mark.parametrize("name", LACKS)
def test_a_page_says_what_is_not_there(cli: CommandLine, name: str) -> None:
    out = cli("schemes", name).out
    assert out.count("not here") == len(LACKS[name])
    for told in LACKS[name]:
        assert words(told) in words(out)
    assert json.loads(cli("schemes", name, "--json").out)["lacks"] == list(SCHEMES[name].lacks)


def test_attnres_says_how_closely_it_is_pre_ln(cli: CommandLine) -> None:
    out = words(cli("schemes", "attnres").out)
    assert words("exactly as --norm-eps goes to 0 and to 2e-4 at 1e-5") in out


def test_a_scheme_without_constants_has_no_table() -> None:
    assert all(not row.values for row in scheme_constants(SCHEMES["pre-ln"], (12,)))


def test_json_is_the_zoo_and_nothing_else(cli: CommandLine, tmp_path: Path) -> None:
    listed = json.loads(cli("schemes", "--json").out)
    assert [entry["name"] for entry in listed] == list(SCHEMES)
    for entry in listed:
        assert (entry["equation"], entry["paper"]) == (
            SCHEMES[entry["name"]].equation,
            SCHEMES[entry["name"]].paper,
        )
    file = tmp_path / "zoo.json"
    assert "deepnorm" in cli("schemes", "--json", str(file)).out
    assert json.loads(file.read_text()) == listed


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("deepnrm",), "got deepnrm; use deepnorm, "),
        (("PRE-LN",), "a scheme is one of the known names"),
        (("deepnorm", "--depth", "0"), "--depth is a whole number of at least 1; got 0"),
        (("gone.py:SCHEME",), "the file can be read"),
        (("dyt",), "use --scheme pre-ln --norm-kind dyt"),
        (("qk-norm",), "use --scheme pre-ln --qk-norm"),
    ],
)
def test_a_bad_word_is_one_line(cli: CommandLine, given: tuple[str, ...], told: str) -> None:
    done = cli("schemes", *given)
    assert (done.code, done.out) == (2, "")
    assert told in done.complaint
    if given == ("deepnrm",):
        assert all(name in done.complaint for name in SCHEMES)


def test_constants_of_a_file_that_fail_are_one_line(cli: CommandLine, tmp_path: Path) -> None:
    for broken, told in (("lambda at: at.deep", "AttributeError"), ("lambda at: 3", "got int")):
        done = cli("schemes", scheme_file(tmp_path, constants=broken))
        assert (done.code, done.out) == (2, "")
        assert told in done.complaint


def test_it_imports_no_torch() -> None:
    code = (
        "import sys; from gradflow.cli.app import run_app;"
        "codes = [run_app(w) for w in (['schemes'], ['schemes', 'keel'], ['schemes', '--json'])];"
        f"print([m for m in {HEAVY} if m in sys.modules], codes, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[] [0, 0, 0]"
