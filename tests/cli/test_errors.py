"""Errors: the exit code, and one line that says the rule, what arrived and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradflow import errors
from gradflow.cli.app import app
from gradflow.engine import memory
from gradflow.specs.block_kinds import ACTIVATIONS, BLOCKS, NORM_KINDS
from gradflow.specs.stack_fields import DTYPES, INITS, LOSS_KINDS, NORMS, SHORTCUTS

USAGE, FAILED = 2, 3
COMMANDS = [command.name for command in app.registered_commands]


def one_of(flag: str, names: Sequence[str]) -> tuple[str, ...]:
    return (f"{flag} is one of the known names", "got nonsense", f"use {', '.join(names)}")


NAMED = {
    "--block": BLOCKS,
    "--shortcut": SHORTCUTS,
    "--norm": NORMS,
    "--norm-kind": NORM_KINDS,
    "--activation": ACTIVATIONS,
    "--init": INITS,
    "--loss": LOSS_KINDS,
    "--dtype": DTYPES,
}
# What is wrong with the command line, and what the line says: rule, value, remedy.
USAGE_ERRORS: dict[str, tuple[str, ...]] = {
    "--depth 0": ("--depth is a whole number of at least 1", "got 0", "use --depth 1 or more"),
    "--depth -3": ("--depth is a whole number of at least 1", "got -3", "use --depth 1 or more"),
    "--depth 2.5": ("--depth takes a whole number", "got '2.5'", "for example --depth 12"),
    "--depth twelve": ("--depth takes a whole number", "got 'twelve'", "for example --depth 12"),
    "--depth=": ("--depth takes a whole number", "got ''", "for example --depth 12"),
    "--gain big": ("--gain takes a number", "got 'big'", "for example --gain 1.0"),
    "--gain nan": ("--gain is a finite number above 0", "got nan", "--gain 1.0"),
    "--weight-var -1": ("--weight-var is a finite number above 0", "got -1.0", "use"),
    "--seeds 0": ("--seeds is a whole number of at least 1", "got 0", "use --seeds 1"),
    "--repeats 0": ("--repeats is a whole number of at least 1", "got 0", "use --repeats 1"),
    "--width 10 --heads 4": (
        "--heads divides --width",
        "got --width 10 --heads 4",
        "use for example --heads 2",
    ),
    "--width 8 --heads 1000000000000": ("--heads divides --width", "got --width 8", "--heads 8"),
    "--block mlp --heads 2": ("--heads applies to attention, transformer", "mlp", "leave out"),
    "--block conv --norm-kind rmsnorm": (
        "--norm-kind rmsnorm is not defined on images",
        "got --block conv",
        "use batchnorm, layernorm, groupnorm",
    ),
    "--device cuda": ("--device cuda needs a GPU", "got none", "use --device cpu"),
    "--device tpu": ("--device is auto, cpu, cuda or cuda:N", "got tpu", "use --device auto"),
    "--residual --plain": ("a shortcut or has none", "got --residual --plain", "give one"),
    "--out /proc/x": ("--out is a folder that can be written to", "/proc/x (", "another --out"),
    "--out /dev/null": ("--out is a folder that can be written to", "/dev/null (", "another"),
    "--json /none/x": ("--json names a file that can be written", "got '/none/x'", "another"),
    "--json /": ("--json names a file that can be written", "got '/'", "choose another"),
    "--colour red": ("No such option: --colour", "see --help"),
    "--dept 3": ("No such option: --dept", "--depth", "see --help"),
    "--depth": ("'--depth'", "requires an argument", "see --help"),
    "12": ("unexpected extra argument", "(12)", "see --help"),
    **{f"{name} nonsense": one_of(name, list(known)) for name, known in NAMED.items()},
}


@pytest.mark.parametrize(("words", "says"), USAGE_ERRORS.items(), ids=list(USAGE_ERRORS))
def test_a_usage_error_is_one_line(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, words: str, says: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = cli("run", *words.split())
    assert (done.code, done.out) == (USAGE, "")
    assert done.complaint.startswith("gradflow: ")
    position = -1
    for part in says:  # in this order
        position = done.complaint.index(part, position + 1)


@pytest.mark.parametrize("words", [("nonsense",), ("nonsense", "--depth", "3"), ("",)])
def test_an_unknown_command_lists_the_known_ones(cli: CommandLine, words: Sequence[str]) -> None:
    done = cli(*words)
    assert done.code == USAGE
    assert "the command is one of the known names" in done.complaint
    assert f"got {words[0] or repr('')}; use {', '.join(COMMANDS)}" in done.complaint


def test_a_number_format_that_the_device_lacks(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*_: Any, **__: Any) -> None:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch, "ones", lack)
    done = cli.run("--dtype", "float16")
    assert done.code == USAGE
    assert done.complaint == ("gradflow: cpu computes in --dtype; got float16; use --dtype float32")


def test_a_file_in_the_place_of_out(cli: CommandLine) -> None:
    cli.out.write_text("mine")
    done = cli.run()
    assert done.code == USAGE
    assert f"got {cli.out} (Not a directory); choose another --out" in done.complaint
    assert cli.out.read_text() == "mine"


def test_out_of_memory(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: 5 << 20)
    done = cli.run("--depth", "1000", "--width", "512")  # one layer has 12 MiB of parameters
    assert (done.code, done.out) == (FAILED, "")
    assert "out of memory: this stack needs at least" in done.complaint
    assert "5 MiB are free; lower --depth, --batch-size" in done.complaint
    assert not cli.out.exists()


def test_a_disk_that_fills_up(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = cli.run("--no-timing")
    assert (done.code, done.out) == (FAILED, "")
    assert f"could not be stored in {cli.out}: disk full; free some space" in done.complaint
    assert list(cli.out.iterdir()) == []


def test_a_file_that_cannot_be_written_after_all(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "write_text", fail)
    done = cli.run("--no-timing", "--json", str(cli.out.parent / "x.json"))
    assert done.code == USAGE
    assert "x.json (Input/output error)" in done.complaint


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.FindingError, 1),
        (errors.UsageError, 2),
        (errors.MeasurementError, 3),
        (errors.RunFolderError, 3),
        (errors.BaselineError, 4),
    ],
)
def test_every_kind_of_error_has_its_exit_code(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("rule", "value", "remedy") if kind is errors.UsageError else kind("reason")

    monkeypatch.setattr("gradflow.measuring.any.measure_any", fail)
    assert cli.run().code == code


def break_down(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("gradflow.measuring.any.measure_any", fail)


UNEXPECTED: dict[str, Exception] = {
    "key": KeyError("a"),
    "assertion": AssertionError(),
    "two lines": RuntimeError("first\nsecond"),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "file": PermissionError(errno.EACCES, "Permission denied", "/some/file"),
}


@pytest.mark.parametrize("error", UNEXPECTED.values(), ids=UNEXPECTED)
def test_an_error_nobody_expects_is_one_line_and_70(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.delenv("GRADFLOW_TRACEBACK", raising=False)
    break_down(monkeypatch, error)
    done = cli.run()
    assert (done.code, done.out) == (errors.EXIT_INTERNAL, "") == (70, "")
    assert f"an error of gradflow's own: {type(error).__name__}: " in done.complaint
    assert done.complaint.endswith("; GRADFLOW_TRACEBACK=1 shows the traceback")
    assert not cli.out.exists() or not list(cli.out.iterdir())


@pytest.mark.parametrize(
    ("value", "shown"), [("1", True), ("yes", True), ("0", False), ("", False)]
)
def test_a_variable_shows_the_traceback(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, value: str, shown: bool
) -> None:
    monkeypatch.setenv("GRADFLOW_TRACEBACK", value)
    break_down(monkeypatch, KeyError("a"))
    done = cli.run()
    assert done.code == 70
    assert ("Traceback (most recent call last)" in done.err) == shown
    assert ("in fail" in done.err) == shown
    assert done.err.splitlines()[-1].startswith("gradflow: an error of gradflow's own: KeyError")
    assert done.err.endswith("the traceback is above\n") == shown


def test_a_usage_error_shows_text_as_it_is_and_the_rest_as_python() -> None:
    assert str(errors.UsageError("rule", "--width 3", "do")) == "rule; got --width 3; do"
    assert str(errors.UsageError("rule", None, "do")) == "rule; got None; do"
    assert str(errors.UsageError("rule", "", "do")) == "rule; got ''; do"


def test_a_line_break_on_the_command_line_breaks_no_line(cli: CommandLine) -> None:
    done = cli("run", "--co\nlour")
    assert done.complaint.startswith("gradflow: No such option: --co")


@given(st.text())
def test_an_error_is_one_line_whatever_arrived(text: str) -> None:
    for error in (errors.UsageError("rule", text, "remedy"), errors.RunFolderError(text)):
        assert len(str(error).splitlines()) <= 1


WORDS = st.sampled_from(
    [
        *(f"--block={name}" for name in BLOCKS),
        *(f"--norm={name}" for name in NORMS),
        *(f"--norm-kind={name}" for name in NORM_KINDS),
        *(f"--activation={name}" for name in ACTIVATIONS),
        *(f"--init={name}" for name in INITS),
        *(f"--loss={name}" for name in LOSS_KINDS),
        *(f"--dtype={name}" for name in DTYPES),
        *("--plain", "--causal", "--no-causal", "--raw-range", "--json", "--quiet"),
        *("--width=1", "--width=7", "--width=8", "--heads=1", "--heads=2", "--heads=3"),
        *("--seq-len=1", "--image-size=1", "--image-size=2", "--ffn-mult=1", "--classes=2"),
        *("--batch-size=1", "--batch-size=2", "--seeds=2", "--seed=12345678901234567890"),
        *("--gain=1e-300", "--gain=1e38", "--weight-var=1e-300", "--bias-var=1e300"),
        *("--vanishing=1e-9", "--exploding=1e9"),
    ]
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, max_size=6), depth=st.integers(1, 3))
def test_whatever_the_options_it_runs_or_says_why_in_one_line(
    cli: CommandLine, words: list[str], depth: int
) -> None:
    small = ("--width=8", "--batch-size=3", f"--depth={depth}", "--no-timing", "--device=cpu")
    done = cli("run", *small, *words, f"--out={cli.out}")
    assert done.code in (0, USAGE)
    assert len(done.err.splitlines()) == (done.code != 0)
