"""Code from a user's own file: found, held to its interface, never run by reading a stored run."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from commandline import CommandLine
from torch import nn
from user_files import LINEAR, branch_file, scheme_file, write

from gradflow import from_file, measure
from gradflow.errors import UsageError, closest_first
from gradflow.networks.blocks import BRANCHES
from gradflow.networks.norms import Norm
from gradflow.networks.stack import build_block, unit_class
from gradflow.networks.units.template import Unit
from gradflow.runs.naming import names
from gradflow.runs.records import LayerRecord, Run
from gradflow.runs.results import read_results
from gradflow.runs.store import load, save
from gradflow.schemes import READOUTS, SCHEMES, UNIT_KINDS, Place, Wiring
from gradflow.specs import user_files
from gradflow.specs.block_kinds import BLOCKS
from gradflow.specs.grid import Cell, expand
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.stack_fields import block_kind
from gradflow.sweeps.cells import make_executor, measure_cell
from gradflow.theory.describe import describe_stack
from gradflow.theory.template import NoTheoryError

CPU = torch.device("cpu")
TINY = {"depth": 3, "width": 8, "seq_len": 3, "batch_size": 2, "dtype": "float64"}
QUICK = RunOptions(timing=False, device="cpu")
DEEPNORM = (
    "lambda at: Wiring(a=(2 * at.depth) ** 0.25, norms=('out',),"
    " gains=dict.fromkeys(('v', 'out', 'up', 'down'), (8 * at.depth) ** -0.25))"
)
# Without the attributes that make it the built-in one, this is another initialisation.
FFN = """self.up = nn.Linear(spec.width, 4 * spec.width)
        self.down = nn.Linear(4 * spec.width, spec.width)"""
FFN_CLASS = {
    "attributes": "feeds_activation, output = ('up',), 'down'",
    "returned": "return self.down(torch.nn.functional.gelu(self.up(x)))",
}


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Start as another process would: with no file loaded."""
    return lambda: monkeypatch.setattr(user_files, "LOADED", {})


def measured(**options: Any) -> Run:
    return measure(StackSpec(**TINY | options), QUICK)


def numbers(run: Run) -> list[tuple[Any, ...]]:
    """Every number of the layers, the names of units aside."""
    kept = [f.name for f in fields(LayerRecord) if f.name != "unit"]
    return [tuple(getattr(row, name) for name in kept) for row in run.layer_records]


# Schemes


def test_a_scheme_from_a_file_is_the_published_one_number_for_number(tmp_path: Path) -> None:
    own = from_file(scheme_file(tmp_path, wire=DEEPNORM, defaults="{'init': 'xavier'}"))
    assert numbers(measured(scheme=own)) == numbers(measured(scheme="deepnorm"))
    wrong = from_file(scheme_file(tmp_path, wire=DEEPNORM.replace("-0.25", "0.25")))
    assert numbers(measured(scheme=wrong)) != numbers(measured(scheme="deepnorm"))


def test_theory_takes_a_users_scheme_and_no_users_block(tmp_path: Path) -> None:
    own = from_file(scheme_file(tmp_path, wire=DEEPNORM, defaults="{'init': 'xavier'}"))
    described = describe_stack(StackSpec(**TINY, scheme=own))
    assert described == describe_stack(StackSpec(**TINY, scheme="deepnorm"))
    block = from_file(branch_file(tmp_path))
    with pytest.raises(NoTheoryError):
        describe_stack(StackSpec(**TINY, block=block))


def unit(kind: str, **settings: object) -> dict[str, str]:
    """The wire of units of a kind."""
    items = ", ".join(f"{name!r}: {source}" for name, source in settings.items())
    return {"wire": f"lambda at: Wiring(norms=('in',), unit={kind!r}, settings={{{items}}})"}


A_LIST = "blocks of my_scheme.py:SCHEME is a tuple of names"
# Fields of the scheme, then what the line says.
BROKEN: list[tuple[dict[str, str], str, str]] = [
    ({"wire": "lambda at: 3"}, "gives a gradflow.schemes.Wiring", "got int"),
    (
        {"wire": "lambda at: Wiring(a=1 / (at.depth - at.layer), norms=('in',))"},
        "wire of",
        "ZeroDivisionError",
    ),
    ({"wire": "7"}, "wire of", "TypeError: 'int' object is not callable"),
    ({"wire": "lambda at: Wiring(a='2', norms=('in',))"}, "a of my_scheme.py", "got '2'"),
    ({"wire": "lambda at: Wiring(b=True, norms=('in',))"}, "b of my_scheme.py", "got True"),
    ({"wire": "lambda at: Wiring(c=float('nan'), norms=('in',))"}, "c of my_scheme", "got nan"),
    ({"wire": "lambda at: Wiring(norms='in')"}, "norms of", "got 'in'"),
    ({"wire": "lambda at: Wiring(norms=('front',))"}, "norms of", "got 'front'; use in, branch"),
    ({"wire": "lambda at: Wiring(norms=('value',))"}, "stands inside attention", "(ffn)"),
    ({"wire": "lambda at: Wiring(norms=('in',), learned='all')"}, "learned of", "got 'all'"),
    ({"wire": "lambda at: Wiring(norms=('in',), gains={'W_v': 2})"}, "gains of", "got 'W_v'"),
    ({"wire": "lambda at: Wiring(norms=('in',), gains={'v': -2})"}, "at least 0", "'v': -2"),
    ({"wire": "lambda at: Wiring(norms=('in',), gains=2)"}, "is a dictionary", "got 2"),
    ({"wire": "lambda at: Wiring(norms=('in',), kinds={'in': 'l3'})"}, "kinds of", "got 'l3'"),
    ({"wire": "lambda at: Wiring(norms=('in',), unit='mine')"}, "unit of a Wiring", "got mine"),
    ({"wire": "lambda at: Wiring()"}, "normalises where a unit has norms", "normalises=False"),
    ({"wire": "lambda at: Wiring(a=0, norms=('in',))"}, "is plain where", "say plain=True"),
    ({"plain": "True"}, "is plain where", "say plain=False"),
    ({"plain": "'no'"}, "plain of my_scheme.py:SCHEME is True or False", "got 'no'"),
    ({"input_norm": "'l2'"}, "input_norm of", "got 'l2'; use norm, unit"),
    (unit("mhc"), "have first, streams, pre, off_diagonal for mhc", "got {}; give first"),
    (unit("highway", gate_bias=-1), "--block for units of the kind highway", "got transformer"),
    (unit("siamesenorm", first=True, divisor="'c'"), "have first, divisor", "give divisor"),
    (
        unit("attnres", first=False),
        "first of my_scheme.py:SCHEME at layer 1 (attention) is True",
        "got False",
    ),
    (unit("denseformer", first="at.index == 1", averaged=1), "averaged of", "is 0; got 1"),
    (
        unit("hyper-connections", first="at.index == 1", streams=4, stream=4),
        "stream of",
        "from 0 to 3; got 4",
    ),
    (
        unit("mhc", first="at.index == 1", streams=0, pre=0, off_diagonal=0),
        "streams of",
        "a whole number of at least 1; got 0",
    ),
    (unit("residual-dual", first="at.index == 1"), "streams of", "is 2, what units of the kind"),
    (
        unit("residual-dual", first="at.index == 1") | {"streams": "lambda at: 2"},
        "has a readout where its last unit gives several streams",
        "readout=None with 2",
    ),
    (
        unit("attnres", first="at.index == 1")
        | {"streams": "lambda at: at.index + 1", "readout": "'dual'"},
        "takes 2 streams",
        "got 5",
    ),
    (
        unit("residual-dual", first="at.index == 1")
        | {"streams": "lambda at: 2", "readout": "'a'"},
        "readout of my_scheme.py:SCHEME is one of",
        "got a; use first",
    ),
    ({"readout": "'sum'"}, "has a readout where its last unit gives", "readout='sum' with 1"),
    ({"streams": "lambda at: 3"}, "is 1, what units of the kind template give", "got 3"),
    ({"streams": "lambda at: at.n"}, "streams of", "AttributeError"),
    ({"streams": "lambda at: 1.0"}, "streams of", "got float"),
    (
        {"wire": "lambda at: Wiring(a=2, norms=('out',), unit='admin')", "profiled": "True"},
        "a of my_scheme.py:SCHEME at layer 1 (attention) is 1",
        "got 2",
    ),
    ({"profiled": "True"}, "is profiled where all its units", "profiled=True with template"),
    (unit("admin"), "is profiled where all its units", "profiled=False with admin"),
    (
        {
            "wire": "lambda at: Wiring(norms=('in',), settings={'first': at.index == 1},"
            " unit='template' if at.index > 1 else 'residual-dual')",
            "streams": "lambda at: 2 if at.index == 1 else 1",
        },
        "are of one kind where one carries several streams",
        "got residual-dual, template",
    ),
    ({"constants": "lambda at: {'c': 1 / (at.layer - 1)}"}, "constants of", "ZeroDivisionError"),
    ({"constants": "lambda at: {'c': 'large'}"}, "a dictionary of numbers", "'large'"),
    ({"constants": "lambda at: 3"}, "constants of", "got int"),
    ({"blocks": "'ffn'"}, A_LIST, "got 'ffn'"),
    ({"blocks": "('fnn',)"}, "blocks of", "got 'fnn'; use mlp"),
    ({"defaults": "{'int': 'he'}"}, "defaults of", "got 'int'"),
    ({"defaults": "{'init': 'hi'}"}, "--init is one of the known names", "got hi"),
    ({"defaults": "{'norm': 'pre'}"}, "defaults of", "got 'norm'"),
    ({"paper": "5"}, "paper of", "got 5"),
    ({"input_scale": "lambda depth: 'large'"}, "input_scale of", "got str"),
]


@pytest.mark.parametrize(("broken", "rule", "rest"), BROKEN, ids=lambda b: str(b)[:40])
def test_a_scheme_that_breaks_the_interface_is_refused_in_one_line(
    tmp_path: Path, cli: CommandLine, broken: dict[str, str], rule: str, rest: str
) -> None:
    texts = {key: broken[key] for key in broken if key == "paper"}
    more = f"TEXTS.update({', '.join(f'{k}={v}' for k, v in texts.items())})"
    own = scheme_file(tmp_path, more, **{k: v for k, v in broken.items() if k not in texts})
    told = [cli.run("--no-timing", "--scheme", own), cli("schemes", own)]
    for done in told:
        assert (done.code, done.out) == (2, "")
        assert rule in done.complaint
    assert rest in told[0].complaint
    assert not cli.out.exists() or not any(cli.out.iterdir())


@pytest.mark.parametrize("name", SCHEMES)
def test_a_published_scheme_holds_to_the_interface(tmp_path: Path, name: str) -> None:
    text = f"from gradflow.schemes import SCHEMES\nSCHEME = SCHEMES[{name!r}]\n"
    own = from_file(write(tmp_path / "copy.py", text, "SCHEME"))
    for depth in (3, 4):
        StackSpec(scheme=own, depth=depth)


def test_names_that_a_scheme_can_give_are_those_of_the_classes() -> None:
    assert all(issubclass(unit_class(kind), Unit) for kind in UNIT_KINDS)
    assert all(issubclass(resolve_name(row.implementation), nn.Module) for row in READOUTS.values())
    read: dict[str, set[str]] = {}
    for scheme in SCHEMES.values():
        kinds = block_kind(scheme.blocks[0]).units
        wiring = scheme.wire(Place(6, 2, 0, len(kinds), kinds[0]))
        read.setdefault(wiring.unit, set()).update(wiring.settings)
    assert read == {kind: set(row.settings) for kind, row in UNIT_KINDS.items()}


def test_a_wiring_that_breaks_deep_in_the_stack_is_found_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    own = from_file(scheme_file(tmp_path, wire="lambda at: Wiring(a=9 - at.layer, norms=('in',))"))
    StackSpec(**TINY | {"depth": 8}, scheme=own)
    late = "lambda at: Wiring(a='x' if at.layer > 8 else 1.0, norms=('in',))"
    own = from_file(scheme_file(tmp_path, wire=late))
    with pytest.raises(UsageError, match="at layer 9"):
        StackSpec(**TINY | {"depth": 9}, scheme=own)


@pytest.mark.parametrize("kind", BRANCHES)
def test_matrices_and_places_that_a_scheme_may_name_are_those_of_the_branches(kind: str) -> None:
    spec = StackSpec(block=kind, width=8, gated=True if kind == "ffn" else None)
    branch = BRANCHES[kind](spec, Wiring())
    matrices = [name for part, name in branch.roles().items() if hasattr(part, "shapes")]
    assert tuple(matrices) == BLOCKS[kind].matrices
    places = {place for row in BLOCKS.values() for place in row.inner_norms}
    for place in places if kind != "resnet" else ():  # which places norms itself
        parts = BRANCHES[kind](spec, Wiring(norms=(place,))).modules()
        inside = place in BLOCKS[kind].inner_norms
        assert any(isinstance(part, Norm) for part in parts) == inside


def test_the_checks_pass_a_published_scheme_as_a_users(tmp_path: Path) -> None:
    own = from_file(write(tmp_path / "zoo.py", "from gradflow.schemes import SCHEMES", "SCHEMES"))
    with pytest.raises(UsageError, match=r"is a gradflow\.schemes\.Scheme; got dict"):
        StackSpec(scheme=own)
    text = "from gradflow.schemes import SCHEMES\nKEEL = SCHEMES['keel']"
    own = from_file(write(tmp_path / "zoo.py", text, "KEEL"))
    assert numbers(measured(scheme=own)) == numbers(measured(scheme="keel"))


# Files


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("gone.py", None, ("the file can be read", "No such file")),
        ("broken.py", "x = (", ("the file runs", "broken.py (SyntaxError")),
        ("broken.py", "x = 1\nx.y", ("AttributeError: 'int' object", "line 2")),
        ("broken.py", "import no_such_module", ("ModuleNotFoundError",)),
        ("broken.py", "raise SystemExit(3)", ("the file runs", "SystemExit: 3")),
        ("lacks.py", "SCHEMA = 1", ("lacks.py defines", "got SCHEME", "use SCHEMA")),
        ("a,b.py", "SCHEME = 1", ("the name of a file is plain",)),
        ("number.py", "SCHEME = 1", ("is a gradflow.schemes.Scheme", "got int")),
    ],
)
def test_a_file_that_does_not_serve_is_one_line(
    tmp_path: Path, cli: CommandLine, file: str, text: str | None, parts: tuple[str, ...]
) -> None:
    if text is not None:
        (tmp_path / file).write_text(text)
    done = cli.run("--scheme", f"{tmp_path / file}:SCHEME")
    assert (done.code, done.out) == (2, "")
    assert all(part in done.complaint for part in parts), done.complaint


def test_what_a_file_prints_does_not_get_into_the_json(tmp_path: Path, cli: CommandLine) -> None:
    own = scheme_file(tmp_path, "print('hello')")
    done = cli.run("--no-timing", "--scheme", own, "--json", "-")
    assert json.loads(done.out)["spec"]["scheme"].startswith("my_scheme.py:SCHEME@")
    assert "hello" in done.err


def test_an_edited_file_is_another_run_and_a_moved_one_is_not(tmp_path: Path) -> None:
    first = from_file(scheme_file(tmp_path))
    (tmp_path / "b").mkdir()
    assert from_file(scheme_file(tmp_path / "b")) == first
    edited = from_file(scheme_file(tmp_path, "# a note"))
    assert edited != first
    cells = [Cell(StackSpec(scheme=name), QUICK) for name in (first, edited)]
    assert cells[0].key != cells[1].key


def test_names_show_the_digest_only_where_it_tells_files_apart(tmp_path: Path) -> None:
    first = measured(scheme=from_file(scheme_file(tmp_path)))
    other = measured(scheme="pre-ln")
    edited = measured(scheme=from_file(scheme_file(tmp_path, "# a note")))
    assert names([first, other])[0].design == "my_scheme.py:SCHEME"
    assert names([first, edited])[0].design == first.spec.scheme
    assert first.spec.title == "my_scheme.py:SCHEME transformer, layernorm, depth 3"
    assert re.fullmatch(r"[\w.-]+", first.spec.slug)


# Stored runs


def stored_run(tmp_path: Path) -> tuple[Run, Path]:
    """A run of a user's scheme and block, and a file that its code leaves when it runs again."""
    trace = tmp_path / "trace"
    scheme = from_file(scheme_file(tmp_path, wire="lambda at: Wiring(norms=('out',))"))
    block = from_file(branch_file(tmp_path))
    run = save(measured(scheme=scheme, block=block), tmp_path / "runs")
    for name in ("my_scheme.py", "my_block.py"):
        (tmp_path / name).write_text(f"open({str(trace)!r}, 'w')")
    return run, trace


def test_reading_never_runs_the_file(
    tmp_path: Path, cli: CommandLine, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, trace = stored_run(tmp_path)
    forget()
    monkeypatch.chdir(tmp_path)  # where the names would find the files
    again = load(str(run.path))
    assert again.spec == run.spec
    assert again.spec.title == run.spec.title
    assert (again.spec.domain, again.spec.units_per_block) == (run.spec.domain, 1)
    assert again.layer_records == run.layer_records
    (stored,) = read_results(tmp_path / "runs").runs
    assert stored.spec == run.spec
    assert cli("compare", str(run.path)).code == 0
    assert cli("check", str(run.path)).code == 0
    assert cli("report", "--results", str(tmp_path / "runs")).code == 0
    assert not trace.exists()
    assert user_files.LOADED == {}


def test_a_reference_in_a_stored_run_is_no_name(tmp_path: Path, forget: Callable[[], None]) -> None:
    """Else a run.json from elsewhere could name any file of this machine."""
    run, trace = stored_run(tmp_path)
    forget()
    for name in ("scheme", "block"):
        values = run.spec.to_json() | {name: f"{tmp_path}/my_{name}.py:SCHEME"}
        with pytest.raises(UsageError):
            StackSpec.from_json(values)
    assert not trace.exists()


def test_a_stored_name_alone_measures_nothing(tmp_path: Path, forget: Callable[[], None]) -> None:
    run, _ = stored_run(tmp_path)
    forget()
    for name in ("scheme", "block"):
        with pytest.raises(UsageError, match=r"gradflow\.from_file"):
            StackSpec(**{name: getattr(run.spec, name)})
    with pytest.raises(UsageError, match="after the file was loaded"):
        measure(run.spec, QUICK)


def test_no_folder_of_the_file_is_stored(
    tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", "--depth", "1", "--no-timing", "--out", str(cli.out)]
    own = scheme_file(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradflow", *words, "--scheme", f"pre-ln,{own}"])
    assert cli.run("--no-timing", "--scheme", own).code == 0
    (folder,) = cli.out.iterdir()
    text = "".join(file.read_text() for file in folder.iterdir())
    assert "my_scheme.py:SCHEME@" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("kind", ["scheme", "block"])
def test_json_brings_back_the_spec_with_and_without_the_file(
    tmp_path: Path, forget: Callable[[], None], kind: str
) -> None:
    made = {"scheme": scheme_file, "block": branch_file}[kind](tmp_path)
    spec = StackSpec(**TINY, **{kind: from_file(made)})
    values = json.loads(json.dumps(spec.to_json()))
    assert StackSpec.from_json(values) == spec
    forget()
    assert StackSpec.from_json(values) == spec
    assert replace(StackSpec.from_json(values), depth=5).title == replace(spec, depth=5).title


# Other processes, and grids


def test_a_cell_brings_its_code_to_another_process(
    tmp_path: Path, forget: Callable[[], None]
) -> None:
    names_of = [from_file(scheme_file(tmp_path)), from_file(branch_file(tmp_path))]
    spec = StackSpec(**TINY, scheme=names_of[0], block=names_of[1])
    here = measure(spec, QUICK)
    sent = pickle.dumps(Cell(spec, QUICK))
    forget()
    outcome = measure_cell(pickle.loads(sent))
    assert outcome.run
    assert numbers(outcome.run) == numbers(here)
    forget()
    (tmp_path / "my_scheme.py").write_text("# edited meanwhile")
    changed = measure_cell(pickle.loads(sent))
    assert changed.run is None
    assert "my_scheme.py" in changed.error


def test_a_grid_takes_files_beside_names(tmp_path: Path) -> None:
    scheme, block = from_file(scheme_file(tmp_path)), from_file(branch_file(tmp_path))
    grid = expand({"scheme": ["pre-ln", scheme], "block": ["ffn", block], "ffn_mult": [2]})
    assert [(c.spec.scheme, c.spec.block, c.spec.ffn_mult) for c in grid.cells] == [
        ("pre-ln", "ffn", 2),
        ("pre-ln", block, None),
        (scheme, "ffn", 2),
        (scheme, block, None),
    ]


def test_a_comparison_ends_at_code_that_breaks_and_skips_what_does_not_fit(
    tmp_path: Path, cli: CommandLine
) -> None:
    small = ("--width", "8", "--seq-len", "3", "--depth", "2", "--no-timing")
    words = ("compare", *small, "--executor", "serial", "--out", str(cli.out))
    for own in (
        ("--block", branch_file(tmp_path, returned="return x[:, :1]")),
        ("--scheme", scheme_file(tmp_path, wire="lambda at: 3")),
    ):
        names_known = {"--block": "ffn", "--scheme": "pre-ln"}[own[0]]
        done = cli(*words, own[0], f"{names_known},{own[1]}")
        assert (done.code, done.out) == (2, "")
        assert not list(cli.out.glob("2*"))
    vectors = branch_file(tmp_path, attributes="domain = 'vectors'")
    done = cli(*words, "--scheme", "post-ln", "--block", f"ffn,{vectors}")
    assert done.code == 0
    assert "skipped: --block" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_workers_measure_a_users_code(tmp_path: Path, executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    spec = StackSpec(
        **TINY, scheme=from_file(scheme_file(tmp_path)), block=from_file(branch_file(tmp_path))
    )
    workers = 1 if executor == "processes" else None
    (outcome,) = make_executor(executor, 1, workers).outcomes([Cell(spec, QUICK)])
    assert outcome.run, outcome.error
    assert numbers(outcome.run) == numbers(measure_cell(Cell(spec, QUICK)).run or outcome.run)


# Options that replace a scheme's parts


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ""),
        ({"init": "he"}, "init he in place of xavier"),
        ({"init": "xavier"}, ""),
        ({"weight_var": 2}, "weight var 2.0 in place of none"),
        ({"gain": 2, "init": "he"}, "gain 2.0 in place of 1.0; init he in place of xavier"),
        ({"width": 16}, ""),
    ],
    ids=str,
)
def test_options_that_replace_parts_of_a_scheme_are_named(
    options: dict[str, Any], told: str
) -> None:
    run = measured(scheme="deepnorm", **options)
    assert run.spec.departures == told
    assert run.summary.departures == (told or None)
    (name,) = names([run])
    assert name.design == ", ".join(filter(None, ["deepnorm", *_with(told)]))


def _with(told: str) -> list[str]:
    return [f"with {part}" for part in told.split("; ") if part]


def test_the_run_the_comparison_and_the_report_say_what_was_replaced(cli: CommandLine) -> None:
    done = cli.run("--no-timing", "--scheme", "deepnorm", "--init", "he")
    assert "scheme deepnorm, init he in place of xavier" in done.out.splitlines()
    (folder,) = cli.out.iterdir()
    assert load(folder).summary.departures == "init he in place of xavier"
    told = cli("report", "--results", str(cli.out), "--markdown", "-").out
    assert "This is deepnorm with init he in place of xavier." in told
    assert "deepnorm, with init he in place of xavier" in cli("compare", str(folder)).out
    assert "in place of" not in cli.run("--no-timing", "--scheme", "deepnorm").out


def test_a_replaced_part_that_the_name_says_already_is_not_said_twice() -> None:
    runs = [measured(scheme="deepnorm", init=init) for init in ("he", "xavier")]
    assert [n.design for n in names(runs)] == ["deepnorm, he init", "deepnorm, xavier init"]


# Blocks


@pytest.mark.parametrize("init", ["he", "xavier", "gpt2", "orthogonal", "torch"])
def test_torchs_own_layers_get_the_weights_of_the_built_in_branch(
    tmp_path: Path, init: str
) -> None:
    own = from_file(branch_file(tmp_path, FFN, **FFN_CLASS))
    kept = {"init": init, "bias_var": 0.5 if init == "he" else None}
    assert numbers(measured(block=own, **kept)) == numbers(measured(block="ffn", **kept))
    plain = from_file(branch_file(tmp_path, FFN, returned=FFN_CLASS["returned"]))
    same = init in ("xavier", "torch")  # which ask neither for the activation nor for the output
    assert (
        numbers(measured(block=plain, **kept)) == numbers(measured(block="ffn", **kept))
    ) == same


def test_a_scheme_scales_a_users_layers_by_their_names(tmp_path: Path) -> None:
    own = from_file(branch_file(tmp_path, FFN, **FFN_CLASS))
    ours, theirs = (measured(block=block, scheme="deepnorm") for block in (own, "ffn"))
    assert numbers(ours) == numbers(theirs)
    other = from_file(branch_file(tmp_path))
    with pytest.raises(UsageError, match=r"scales the matrices down, out, up, v; got .* linear;"):
        measured(block=other, scheme="deepnorm")


def test_a_branch_of_gradflows_layers_is_the_built_in_one(tmp_path: Path) -> None:
    own = write(tmp_path / "own.py", "from gradflow.networks.blocks import Ffn as Base\n"
                "class MyFfn(Base):\n"
                "    options = ('ffn_mult',)", "MyFfn")  # fmt: skip
    run = measured(block=from_file(own), ffn_mult=3, norm="post")
    assert numbers(run) == numbers(measured(block="ffn", ffn_mult=3, norm="post"))
    assert [row.unit for row in run.layer_records[:2]] == ["input", "MyFfn"]


@pytest.mark.parametrize(
    ("domain", "made", "shape"),
    [
        ("vectors", "self.linear = nn.Linear(spec.width, spec.width)", (64, 8)),
        ("images", "self.linear = nn.Conv2d(spec.width, spec.width, 3, padding=1)", (8, 8, 16, 16)),
    ],
)
def test_a_branch_names_its_stream(
    tmp_path: Path, domain: str, made: str, shape: tuple[int, ...]
) -> None:
    attributes = f"domain, activation = {domain!r}, 'tanh'"
    own = from_file(branch_file(tmp_path, made, attributes=attributes))
    spec = StackSpec(depth=2, width=8, block=own)
    assert (spec.kind.domain, spec.activation, spec.seq_len) == (domain, "tanh", None)
    y = next(build_block(spec, 0, 1, CPU).units)(torch.randn(shape))
    assert y.shape == shape
    assert StackSpec.from_json(spec.to_json()) == spec


def test_weights_depend_on_spec_seed_and_layer_alone(tmp_path: Path) -> None:
    spec = StackSpec(**TINY, block=from_file(branch_file(tmp_path, FFN, **FFN_CLASS)))

    def weights(state: int, seed: int = 0, layer: int = 1) -> torch.Tensor:
        torch.manual_seed(state)
        before = torch.get_rng_state()
        block = build_block(spec, seed, layer, CPU)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.detach().flatten() for p in block.parameters()])

    assert torch.equal(weights(1), weights(2))
    assert not torch.equal(weights(1), weights(1, seed=1))
    assert not torch.equal(weights(1), weights(1, layer=2))
    assert not torch.equal(weights(1, seed=1), weights(1, layer=2))


CONSTANTS = """self.linear, self.norm = nn.Linear(spec.width, spec.width), nn.LayerNorm(spec.width)
        self.slope = nn.Parameter(torch.arange(1.0, 1 + spec.width))
        self.last = nn.Linear(spec.width, spec.width, bias=False)
        nn.init.zeros_(self.last.weight)
        self.register_buffer('share', torch.full((1,), 0.5))"""


def test_constants_stay_and_buffers_follow_the_number_format(tmp_path: Path) -> None:
    returned = "return self.last(self.norm(self.linear(x)) * self.slope * self.share)"
    spec = StackSpec(**TINY, block=from_file(branch_file(tmp_path, CONSTANTS, returned=returned)))
    block = build_block(spec, 0, 1, CPU)
    found = {name.removeprefix("0.branch.module."): p for name, p in block.named_parameters()}
    one = torch.ones(8, dtype=torch.float64)
    assert torch.equal(found["norm.weight"], one)
    assert torch.equal(found["norm.bias"], 0 * one)
    assert torch.equal(found["slope"], torch.arange(1, 9, dtype=torch.float64))
    assert not found["last.weight"].any()
    assert found["linear.weight"].std() > 0.1
    assert {p.dtype for p in found.values()} == {torch.float64}
    assert next(block.buffers()).dtype == torch.float64
    names_of = {record.param for record in measure(spec, QUICK).param_records}
    assert {"branch.module.slope", "branch.module.last.weight"} <= names_of


def test_gradients_are_those_of_plain_autograd(tmp_path: Path) -> None:
    """f(x) = W2 (relu(Wg x) * Wu x) written out, float64, three plain layers."""
    made = """self.gate, self.up = (nn.Linear(spec.width, 16, bias=False) for _ in range(2))
        self.down = nn.Linear(16, spec.width, bias=False)"""
    returned = "return self.down(torch.relu(self.gate(x)) * self.up(x))"
    spec = StackSpec(
        **TINY, norm="none", block=from_file(branch_file(tmp_path, made, returned=returned))
    )
    run = measure(spec, QUICK)
    from gradflow.networks.ends import CotangentLoss, input_batch

    x = input_batch(spec, 0, CPU).requires_grad_()
    streams = [x]
    for layer in (1, 2, 3):
        gate, up, down = (p.detach() for p in build_block(spec, 0, layer, CPU).parameters())
        h = streams[-1]
        f = torch.einsum("bth,dh->btd", (h @ gate.T).clamp(min=0) * (h @ up.T), down)
        streams.append(h + f)
    loss = (streams[-1] * CotangentLoss(spec, 0, CPU).v).sum()
    for row, g in zip(run.layer_records, torch.autograd.grad(loss, streams), strict=True):
        assert row.grad_norm == pytest.approx(g.norm().item(), rel=1e-9)


# How the class is made, then what the line says.
BROKEN_BRANCHES: list[tuple[dict[str, str], str]] = [
    ({"returned": "return self.linear(x)[:, :1]"}, "gives a tensor like x, 2 x 3 x 8 float32"),
    ({"returned": "return 3"}, "got int"),
    ({"returned": "return self.linear(x).double()"}, "got 2 x 3 x 8 float64"),
    ({"returned": "return self.linear(x[0, 0, 0])"}, "computes f(x); got"),
    ({"returned": "return x.no_such_thing"}, "'Tensor' object has no attribute"),
    ({"returned": "return nn.functional.dropout(self.linear(x))"}, "a draw from torch's generator"),
    ({"made": "self.linear = nn.Linear(spec.heads // 2, 8)"}, "made from (spec, wiring)"),
    (
        {"made": f"{LINEAR}\n        self.s = nn.Parameter(torch.randn(spec.width))"},
        "got s of shape",
    ),
    ({"made": f"{LINEAR}\n        self.register_buffer('r', torch.randn(3))"}, "got buffer r"),
    (
        {"made": f"{LINEAR}\n        self.b = nn.Linear(8, 8); self.b.weight = self.linear.weight"},
        "tie no weights",
    ),
    (
        {"made": "self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))"},
        "a parametrisation",
    ),
    ({"made": "self.linear = nn.LazyLinear(8)"}, "a lazy layer"),
    (
        {"made": "self.linear = nn.Linear(8, 8, bias=bool(torch.rand(1) < 0.6))"},
        "which layers it has",
    ),
    ({"attributes": "feeds_activation = ('lin',)"}, "name layers of it; got lin; use linear"),
    ({"attributes": "domain = 'graphs'"}, "domain of my_block.py:MyBranch"),
    ({"attributes": "activation = 'swish'"}, "activation of my_block.py:MyBranch"),
    ({"attributes": "options = ('head',)"}, "options of my_block.py:MyBranch"),
    ({"attributes": "options = ('qk_norm',)"}, "options of my_block.py:MyBranch"),
    ({"attributes": "options = 'heads'"}, "is a tuple of names"),
    ({"more": "MyBranch = len", "attributes": "pass\nclass Other:\n    pass"}, "torch.nn.Module"),
]


@pytest.mark.parametrize(("source", "told"), BROKEN_BRANCHES, ids=lambda s: str(s)[:50])
def test_a_branch_that_breaks_the_interface_is_refused_in_one_line(
    tmp_path: Path, cli: CommandLine, source: dict[str, str], told: str
) -> None:
    own = branch_file(tmp_path, **source)
    if "more" in source:
        own = write(tmp_path / "my_block.py", "class MyBranch:\n    pass", "MyBranch")
    words = ("--depth", "2", "--width", "8", "--seq-len", "3", "--batch-size", "2", "--no-timing")
    done = cli("run", *words, "--out", str(cli.out), "--block", own)
    assert (done.code, done.out) == (2, "")
    assert told in done.complaint


def test_a_users_block_and_a_scheme_have_one_stream(tmp_path: Path) -> None:
    own = from_file(branch_file(tmp_path, attributes="domain = 'vectors'"))
    with pytest.raises(UsageError, match="for --scheme post-ln"):
        StackSpec(scheme="post-ln", block=own)
    assert StackSpec(scheme="rezero", block=own).kind.domain == "vectors"
    with pytest.raises(UsageError, match="--heads applies to"):
        StackSpec(block=own, heads=2)


def test_the_closest_name_comes_first() -> None:
    assert closest_first("deepnrm", ["keel", "deepnorm", "plain"])[0] == "deepnorm"
    assert closest_first("", ["b", "a"]) == ["b", "a"]
