"""Shell completion: the scripts that a shell reads, and the words that it offers."""

from __future__ import annotations

import pytest
from commandline import CommandLine, Outcome, finish, start

from gradflow.specs.fields import flag, options_of
from gradflow.specs.stack import StackSpec

COMMANDS = {"run", "compare", "report", "check", "schemes", "guide"}


def completed(line: str) -> Outcome:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return finish(start(_GRADFLOW_COMPLETE="complete_bash", **environment))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(shell: str) -> None:
    without_detection = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = finish(start("--show-completion", shell, **without_detection))
    assert (done.code, done.err) == (0, "")
    assert f"_GRADFLOW_COMPLETE=complete_{shell}" in done.out
    assert finish(start(_GRADFLOW_COMPLETE=f"source_{shell}")).out.strip() == done.out.strip()


def test_commands_are_completed() -> None:
    done = completed("gradflow ")
    assert (done.code, done.err) == (0, "")
    assert set(done.out.split()) == COMMANDS
    assert completed("gradflow re").out.split() == ["report"]


def test_options_are_completed() -> None:
    assert completed("gradflow run --norm").out.split() == ["--norm", "--norm-kind", "--norm-eps"]
    offered = set(completed("gradflow compare --").out.split())
    assert offered >= {flag(field.name) for field, _ in options_of(StackSpec)}
    assert offered >= {"--csv", "--reference", "--executor", "--theory-only"}


def test_a_command_that_does_not_exist_is_no_complaint_of_a_tab() -> None:
    done = completed("gradflow nosuch --")
    assert (done.code, done.err) == (0, "")


def test_zsh_gets_the_meanings_too() -> None:
    asked = {"_TYPER_COMPLETE_ARGS": "gradflow check --rtol"}
    done = finish(start(_GRADFLOW_COMPLETE="complete_zsh", **asked))
    assert (done.code, done.err) == (0, "")
    assert "relative difference from the baseline" in done.out


def test_fish_gets_one_line_for_each_word() -> None:
    asked = {"_TYPER_COMPLETE_ARGS": "gradflow ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = finish(start(_GRADFLOW_COMPLETE="complete_fish", **asked))
    assert {line.partition("\t")[0] for line in done.out.splitlines()} == COMMANDS


def test_a_shell_that_nobody_knows_is_a_bad_value_and_no_finding(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: None)
    done = cli("--show-completion")
    assert (done.code, done.out) == (2, "")
    assert "not supported" in done.complaint
