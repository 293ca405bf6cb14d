"""The command line: what goes to stdout, what to stderr, how fast it answers."""

from __future__ import annotations

import ast
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from commandline import PROGRAM, TINY, CommandLine, finish, start

import gradflow
from gradflow.cli.app import app
from gradflow.errors import EXIT_INTERRUPTED
from gradflow.measuring import stack
from gradflow.runs import store

HEAVY = ("torch", "pandas", "altair", "scipy", "numpy", "rich.console", "gradflow.engine.walk")


# Output


def test_a_run_is_shown_and_stored(cli: CommandLine) -> None:
    done = cli.run()
    (folder,) = cli.out.iterdir()
    assert done.code == 0
    assert done.out.splitlines()[-1] == f"stored in {folder}"
    for part in ("residual transformer, pre-layernorm, depth 2", "log10|g|", "healthy.", "┤"):
        assert part in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines()[:-1])
    assert store.load(folder).spec.depth == 2


def test_warnings_go_to_stderr_in_a_line_each(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradflow.measuring.columns._NOISY_SPREAD", -1.0)
    for more in ([], ["--json"], ["--quiet"]):
        done = cli.run(*more)
        noisy = [line for line in done.err.splitlines() if "timings vary" in line]
        assert len(noisy) == 1
        assert noisy[0].startswith("warning: ")
        assert "timings vary" not in done.out


def test_quiet_prints_nothing_and_stores(cli: CommandLine) -> None:
    done = cli.run("--quiet", "--no-timing")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert len(store.run_folders(cli.out)) == 1


def test_every_run_gets_a_folder_of_its_own(cli: CommandLine) -> None:
    for _ in range(3):
        cli.run("--quiet", "--no-timing")
    assert len(store.run_folders(cli.out)) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ("--json",)),
        ((), ("--json", "-")),
        ((), ("--json=-",)),
        (("--json",), ("--seed", "3")),
        (("--json", "-"), ("--no-timing",)),
        (("--json", "-q"), ()),
    ],
)
def test_json_on_stdout_is_one_object_and_nothing_else(
    cli: CommandLine, before: Sequence[str], after: Sequence[str]
) -> None:
    done = cli("run", *before, *TINY, "--out", str(cli.out), *after)
    assert done.code == 0
    shown = json.loads(done.out)
    assert list(shown) == ["run", "spec", "summary", "verdict"]
    run = store.load(shown["run"])
    assert shown["spec"] == run.spec.to_json()
    assert shown["verdict"] == run.summary.verdict == shown["summary"]["verdict"]


def test_json_to_a_file_leaves_the_table(cli: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    done = cli.run("--json", str(file))
    assert "healthy." in done.out
    assert json.loads(file.read_text())["verdict"] == "healthy"


PLAIN = ("--block", "mlp", "--depth", "9", "--width", "8", "--plain", "--norm", "none")


def refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def test_numbers_that_json_lacks_are_null(cli: CommandLine) -> None:
    words = (*PLAIN, "--no-timing", "--gain", "1e-30", "--raw-range", "--json")
    done = cli("run", "--out", str(cli.out), *words)
    shown = json.loads(done.out, parse_constant=refuse)
    assert shown["verdict"] == "dead"
    assert shown["summary"]["total_log10_gain"] is None


@pytest.mark.parametrize(
    ("word", "shortcut"), [("--residual", "residual"), ("--plain", "plain"), ("-q", "residual")]
)
def test_short_words_for_the_shortcut(cli: CommandLine, word: str, shortcut: str) -> None:
    done = cli.run("--no-timing", "--json", word)
    assert json.loads(done.out)["spec"]["shortcut"] == shortcut


def test_options_reach_the_run(cli: CommandLine) -> None:
    words = ("--seeds", "2", "--no-timing", "--causal", "--loss", "ce", "--vanishing", "1.5")
    run = store.load(json.loads(cli.run("--json", *words).out)["run"])
    assert (run.options.seeds, run.options.timing, run.options.vanishing) == (2, False, 1.5)
    assert (run.spec.causal, run.spec.loss, run.spec.heads) == (True, "ce", 2)


def test_a_thousand_layers_fit_the_terminal(cli: CommandLine) -> None:
    words = (*PLAIN, "--no-timing", "--depth", "1000", "--init", "orthogonal")
    done = cli("run", *words, "--out", str(cli.out))
    assert done.code == 0
    assert "985 more" in done.out
    assert max(len(line) for line in done.out.splitlines()[:-1]) <= 80


# Terminals and pipes


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Stderr is a terminal inside; at the end the list holds what it showed."""
    leader, follower = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # how Linux says that the other side is closed
            while chunk := os.read(leader, 4096):
                shown.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        yield shown
    reader.join(timeout=10)
    os.close(leader)


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_for_terminals(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    with terminal(monkeypatch) as shown:
        done = cli.run("--json", "--no-timing", *(["--quiet"] if quiet else []))
    assert json.loads(done.out)["verdict"] == "healthy"
    assert (b"loading torch" in b"".join(shown)) == (not quiet)


def test_progress_is_not_for_pipes(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.run("--no-timing").err == ""


@pytest.mark.parametrize(("variable", "colour"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_colour_is_asked_for_or_refused(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, variable: str, colour: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "1")
    assert ("\x1b[1;32mhealthy" in cli.run("--no-timing").out) == colour


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    process = start("run", *TINY, "--no-timing", "--out", str(tmp_path))
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    done = finish(process)
    assert (done.code, done.err) == (0, "")
    assert len(store.run_folders(tmp_path)) == 1


@pytest.mark.slow
def test_a_terminal_without_unicode_is_no_error(tmp_path: Path) -> None:
    words = ("run", *TINY, "--no-timing", "--out", str(tmp_path))
    done = finish(start(*words, PYTHONIOENCODING="ascii"))
    assert (done.code, done.err) == (0, "")
    assert "healthy." in done.out


# Ctrl-C


@pytest.mark.parametrize("where", ["gradflow.measuring.stack.walk", "gradflow.runs.store.publish"])
def test_ctrl_c_exits_130_and_leaves_nothing(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    done = cli.run()
    assert (done.code, done.out) == (EXIT_INTERRUPTED, "")
    assert done.complaint == "gradflow: interrupted; nothing half-written remains"
    assert not cli.out.exists() or not list(cli.out.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(4))
def test_ctrl_c_in_a_real_process(tmp_path: Path, moment: int) -> None:
    """While torch is loaded, and while it computes: the run below takes for ever."""
    out = tmp_path / "runs"
    process = start("run", "--time-budget", "1e9", "--out", str(out))
    time.sleep(0.5 + moment)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == EXIT_INTERRUPTED
    assert done.complaint == "gradflow: interrupted; nothing half-written remains"
    assert not out.exists()


# Help and version


def test_version(cli: CommandLine) -> None:
    done = cli("--version")
    assert (done.code, done.out) == (0, f"gradflow {gradflow.__version__}\n")


def test_without_a_command_the_help_is_shown(cli: CommandLine) -> None:
    bare, help_page = cli(), cli("--help")
    assert bare == help_page == cli("-h")
    assert bare.code == 0
    assert "Measure one stack" in bare.out
    assert "..." not in bare.out.replace("[ARGS]...", "")  # nothing is cut off


@pytest.mark.parametrize(
    "words", [("--version",), ("--help",), ("run", "--help"), ("run", "--foo")]
)
def test_nothing_heavy_is_imported_to_answer(words: Sequence[str]) -> None:
    code = f"import sys; from gradflow.cli.app import run_app; run_app({list(words)})"
    loaded = f"{code}; print(); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    )
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == []


def cpu_seconds(*words: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([PROGRAM, *words], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_the_answer_takes_a_quarter_of_a_second(word: str) -> None:
    """Of the processor's time, the best of several: the wall clock is other people's too."""
    assert min(cpu_seconds(word) for _ in range(5)) < 0.25


def test_a_bad_value_is_refused_before_torch_is_loaded() -> None:
    code = "import sys; from gradflow.cli.app import run_app; run_app(['run', '--depth', '0'])"
    tail = "; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_every_command_is_there() -> None:
    names = [command.name for command in app.registered_commands]
    assert names[0] == "run"
    assert stack.measure is gradflow.measure


@pytest.mark.slow
@pytest.mark.parametrize("words", [["schemes"], ["--help"], ["--version"]])
def test_a_full_disk_behind_stdout_is_one_line(words: list[str]) -> None:
    """In a process of its own: only there stdout is a file."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "gradflow", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 3
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("gradflow: stdout could not be written: No space left")


@pytest.mark.parametrize("command", ["run", "compare", "check"])
@pytest.mark.parametrize("short", ["--plain", "--residual"])
def test_the_shortcut_is_said_once(cli: CommandLine, command: str, short: str) -> None:
    done = cli(command, short, "--shortcut", "plain")
    assert (done.code, short in done.complaint) == (2, True)


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_the_help_shows_no_private_name(cli: CommandLine, command: str) -> None:
    done = cli(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert [word for word in done.out.split() if word.startswith("_")] == []


@pytest.mark.parametrize(("words", "code"), [("schemes", 0), ("run --depth 0", 2)])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_process_without_its_streams_has_the_exit_code_it_would_have(
    words: str, code: int, closed: str
) -> None:
    command = ["sh", "-c", f"{PROGRAM} {words} {closed}"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
