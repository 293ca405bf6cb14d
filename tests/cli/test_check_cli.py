"""`gradflow check` as a script meets it: what it prints, and above all how it exits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from commandline import TINY, CommandLine, Outcome
from damaged_runs import FILES, corrupt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import ENVIRONMENT, layer_rows, run_of, spec_of

from gradflow.runs import store
from gradflow.runs.records import Run


@pytest.fixture
def gradflow(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capsys, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A healthy run."""
    return stored(tmp_path_factory.mktemp("runs"), run_of())


def stored(out: Path, run: Run) -> str:
    return str(store.save(run, out).path)


def with_profile(*profile: float) -> Run:
    spec = spec_of(depth=len(profile) - 1)
    return run_of(spec, list(layer_rows(spec, profile)), summary=run_of().summary)


def test_a_healthy_run_passes_and_what_was_compared_is_printed(
    gradflow: CommandLine, folder: str
) -> None:
    found = gradflow("check", folder)
    assert (found.code, found.err) == (0, "")
    assert found.out.splitlines() == [
        f"ok  {Path(folder).name}",
        "    compared: a finite gradient, not zero, at 4 places in each of 1 seeds",
        "    compared: decades between output and input, at most 3, found 0.00",
    ]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--max-decades", "0"), 0),
        (("--min-gain", "1"), 0),
        (("--min-gain", "1.3"), 1),
        (("--max-gain", "1.2"), 1),
        (("--max-gain", "0"), 1),
        (("--no-nonfinite",), 0),
    ],
)
def test_bounds(gradflow: CommandLine, folder: str, words: tuple[str, ...], code: int) -> None:
    assert gradflow("check", folder, *words).code == code


def test_reasons_are_printed_and_the_run_is_named(gradflow: CommandLine) -> None:
    bad = stored(gradflow.out, with_profile(-9.0, -6.0, -3.0, 0.0))
    found = gradflow("check", bad, "--max-decades", "3")
    assert found.code == 1
    assert found.complaint == f"gradflow: check failed for {Path(bad).name}"
    lines = found.out.splitlines()
    assert lines[0] == f"FAILED  {Path(bad).name}"
    assert lines[-1] == "    reason: seed 0: -9.00 decades from output to input"


def test_all_runs_are_judged_and_one_failure_fails(gradflow: CommandLine, folder: str) -> None:
    bad = stored(gradflow.out, with_profile(-9.0, 0.0))
    found = gradflow("check", bad, folder)
    assert found.code == 1
    assert "FAILED" in found.out
    assert "ok  " in found.out


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize(
    "words", [(), ("--max-decades", "1e9"), ("--min-gain", "0"), ("--max-gain", "1e300")]
)
def test_a_gradient_that_is_none_never_passes(
    gradflow: CommandLine, value: float, words: tuple[str, ...]
) -> None:
    bad = stored(gradflow.out, with_profile(0.0, value, 0.0))
    assert gradflow("check", bad, *words).code == 1
    assert gradflow("check", bad, *words, "--baseline", bad, "--rtol", "1e9").code == 1


def test_json_on_stdout_is_one_object_and_nothing_else(gradflow: CommandLine, folder: str) -> None:
    bad = stored(gradflow.out, with_profile(-9.0, 0.0))
    (gradflow.out / "foreign").mkdir()
    found = gradflow("check", folder, bad, str(gradflow.out / "foreign"), "--json")
    assert found.code == 1
    content = json.loads(found.out)
    assert (content["passed"], len(content["unreadable"])) == (False, 1)
    good, failed = content["runs"]
    assert good == {
        "run": Path(folder).name,
        "passed": True,
        "compared": [
            "a finite gradient, not zero, at 4 places in each of 1 seeds",
            "decades between output and input, at most 3, found 0.00",
        ],
        "reasons": [],
    }
    assert (failed["run"], failed["passed"]) == (Path(bad).name, False)
    assert failed["reasons"] == ["seed 0: -9.00 decades from output to input"]


def test_json_says_passed_where_the_exit_code_does(gradflow: CommandLine, folder: str) -> None:
    file = gradflow.out / "check.json"
    foreign = gradflow.out / "foreign"
    foreign.mkdir()
    for words, code in (((folder,), 0), ((folder, str(foreign)), 2)):
        found = gradflow("check", *words, "--json", str(file))
        assert found.code == code
        assert "ok  " in found.out  # beside a file, the words are still there
        assert json.loads(file.read_text())["passed"] is (code == 0)


def test_json_of_a_measured_run_is_one_object(gradflow: CommandLine) -> None:
    (run,) = json.loads(measured(gradflow, "--json", "-").out)["runs"]
    assert run["passed"]


# --- baselines ----------------------------------------------------------------------------------


def test_a_run_is_its_own_baseline(gradflow: CommandLine, folder: str) -> None:
    found = gradflow("check", folder, "--baseline", folder, "--rtol", "0")
    assert found.code == 0
    assert "gradient norms at 4 places, each within 0 of the baseline" in found.out


def test_a_run_that_has_changed_fails(gradflow: CommandLine) -> None:
    base = stored(gradflow.out, with_profile(0.0, 0.0, 0.0))
    now = stored(gradflow.out, with_profile(0.2, 0.0, 0.0))
    found = gradflow("check", now, "--baseline", base)
    assert found.code == 1
    assert "|g| 10^0.2000, baseline 10^0.0000" in found.out
    assert gradflow("check", now, "--baseline", base, "--rtol", "0.6").code == 0


def test_bounds_and_baseline_together(gradflow: CommandLine, folder: str) -> None:
    found = gradflow("check", folder, "--baseline", folder, "--max-gain", "1")
    assert found.code == 1
    assert "gain of every unit" in found.out
    assert "of the baseline" in found.out


@pytest.mark.parametrize("baseline", ["no-such-run", ".", ""])
def test_no_baseline_is_4(gradflow: CommandLine, folder: str, baseline: str) -> None:
    found = gradflow("check", folder, f"--baseline={baseline}")
    assert found.code == 4
    assert found.complaint.startswith("gradflow: no baseline")


def test_a_damaged_baseline_is_4(gradflow: CommandLine, folder: str) -> None:
    base = stored(gradflow.out, run_of())
    (Path(base) / "layers.csv").write_text("")
    assert gradflow("check", folder, "--baseline", base).code == 4


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (run_of(spec_of(depth=5)), "depth 5 there, 3 here"),
        (run_of(environment=ENVIRONMENT | {"device": "cuda"}), "device cuda there, cpu here"),
    ],
)
def test_a_baseline_of_something_else_is_4_and_the_differences_are_named(
    gradflow: CommandLine, folder: str, other: Run, says: str
) -> None:
    found = gradflow("check", folder, "--baseline", stored(gradflow.out, other))
    assert found.code == 4
    assert says in found.complaint


# --- measuring ------------------------------------------------------------------------------------


def measured(gradflow: CommandLine, *words: str) -> Outcome:
    return gradflow("check", *TINY, "--out", str(gradflow.out), *words)


def test_with_options_it_measures_then_judges(gradflow: CommandLine) -> None:
    assert measured(gradflow).code == 0
    (folder,) = store.run_folders(gradflow.out)
    assert not store.load(folder).time_records  # nobody asked for times
    assert measured(gradflow, "--max-gain", "0.1").code == 1
    assert measured(gradflow, "--baseline", str(folder), "--rtol", "1e-6").code == 0
    assert measured(gradflow, "--baseline", str(folder), "--seed", "1").code == 4


def test_a_missing_baseline_is_found_before_anything_is_measured(gradflow: CommandLine) -> None:
    assert measured(gradflow, "--baseline", "no-such-run").code == 4
    assert store.run_folders(gradflow.out) == []


def test_a_vanishing_stack_fails_by_default(gradflow: CommandLine) -> None:
    found = measured(gradflow, "--plain", "--norm", "none", "--gain", "0.01", "--depth", "5")
    assert found.code == 1
    assert "decades from output to input" in found.out


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--max-decades", "-1"),
        ("--max-decades", "nan"),
        ("--max-decades", "inf"),
        ("--min-gain", "-0.5"),
        ("--max-gain", "many"),
        ("--min-gain", "2", "--max-gain", "1"),
        ("--rtol", "0.1"),
        ("--rtol", "nan", "--baseline", "x"),
        ("--depth", "3"),
        ("--no-such-option",),
        ("--json", "no/such/folder.json"),
    ],
)
def test_bad_values_are_2_and_one_line(
    gradflow: CommandLine, folder: str, words: tuple[str, ...]
) -> None:
    found = gradflow("check", folder, *words)
    assert (found.code, found.out) == (2, "")
    assert found.complaint


def test_nothing_to_check_is_no_pass(gradflow: CommandLine) -> None:
    """`gradflow check $RUNS` with an empty variable must not be green."""
    found = gradflow("check", "--max-decades", "3")
    assert found.code == 2
    assert "neither" in found.complaint


@pytest.mark.parametrize("word", ["no-such-run", "no-such-*", ""])
def test_runs_that_are_not_there_are_no_pass(gradflow: CommandLine, word: str) -> None:
    assert gradflow("check", word).code in (2, 3)


def test_all_that_cannot_be_read_is_named_and_the_rest_is_judged(
    gradflow: CommandLine, folder: str
) -> None:
    foreign, damaged = gradflow.out / "foreign", Path(stored(gradflow.out, run_of()))
    foreign.mkdir()
    (damaged / "layers.csv").write_text("")
    found = gradflow("check", str(foreign), folder, str(damaged))
    assert found.code == 2
    assert f"ok  {Path(folder).name}" in found.out
    first, second, last = found.err.splitlines()
    assert first.startswith(f"not judged: {foreign} is no run folder")
    assert second.startswith(f"not judged: {damaged}")
    assert "2 that cannot" in last
    bad = stored(gradflow.out, with_profile(-9.0, 0.0))
    both = gradflow("check", str(foreign), bad, folder)
    assert both.code == 1  # that a bound is broken is known
    assert both.err.splitlines()[-1] == f"gradflow: check failed for {Path(bad).name}"
    assert "ok  " in both.out


def test_a_glob_passes_over_plain_files(gradflow: CommandLine) -> None:
    run = stored(gradflow.out, run_of())
    (gradflow.out / "report.html").write_text("a page")
    found = gradflow("check", f"{gradflow.out}/*")
    assert (found.code, found.err) == (0, "")
    assert f"ok  {Path(run).name}" in found.out
    listed = gradflow("check", *map(str, sorted(gradflow.out.iterdir())))
    assert listed.code == 2
    assert "report.html is no run folder" in listed.err.splitlines()[0]
    assert gradflow("check", f"{gradflow.out}/*.html").code == 2


def test_a_newer_schema_is_refused(gradflow: CommandLine) -> None:
    folder = stored(gradflow.out, run_of())
    about = json.loads((Path(folder) / "run.json").read_text())
    (Path(folder) / "run.json").write_text(json.dumps(about | {"schema_version": 99}))
    found = gradflow("check", folder)
    assert found.code == 2
    assert "upgrade gradflow" in found.err.splitlines()[0]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_corrupted_run_ends_in_one_line(gradflow: CommandLine, data: st.DataObject) -> None:
    check_corrupted(gradflow, data)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_corrupted_folders_never_end_in_a_traceback(
    gradflow: CommandLine, data: st.DataObject
) -> None:
    check_corrupted(gradflow, data)


def check_corrupted(gradflow: CommandLine, data: st.DataObject) -> None:
    """A change within the numbers may be none that anyone can see; anything else is an error."""
    with TemporaryDirectory() as place:
        good, bad = (stored(Path(place), run_of()) for _ in range(2))
        corrupt(Path(bad) / data.draw(st.sampled_from(FILES)), data)
        for words in (bad,), (bad, "--baseline", good), (good, "--baseline", bad):
            found = gradflow("check", *words)
            # The run is named, and then the command ends with a line of its own.
            assert len(found.err.splitlines()) == {0: 0, 1: 1, 2: 2, 4: 1}[found.code]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_damaged_file_is_no_pass(gradflow: CommandLine, name: str, damage: str) -> None:
    folder = stored(gradflow.out, run_of())
    file = Path(folder) / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    assert gradflow("check", folder).code == 2
