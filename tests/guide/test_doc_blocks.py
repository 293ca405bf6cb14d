"""Every code block of the README and the guide runs, as printed but for its sizes."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from commandline import CommandLine
from doc_blocks import REPOSITORY, Block, blocks, shown_files
from doc_worlds import WORLDS, make_world

from gradflow.pytest_plugin import FOLDER, Guard
from gradflow.runs.store import load, run_folders

PYTHON = blocks("python")
SHELL = blocks("sh", "yaml")


def cases(found: list[Block]) -> list[Any]:
    """The blocks that are run; those that import large libraries are slow."""
    return [
        pytest.param(block, id=f"{block.page}-{i}", marks=pytest.mark.slow if block.needs else ())
        for i, block in enumerate(found)
        if block.is_run
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def world(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(made))
    return made


@pytest.mark.filterwarnings("default")  # of other libraries, while they load
@pytest.mark.parametrize("block", cases(SHELL))
def test_every_command_works(cli: CommandLine, world: Path, block: Block) -> None:
    def expanded(word: str) -> list[str]:
        return [str(p.relative_to(world)) for p in world.glob(word)] if "*" in word else [word]

    for package in block.needs:
        pytest.importorskip(package)
    commands = block.commands()
    assert commands
    for words in commands:
        done = cli(*(path for word in words for path in expanded(word)))
        assert done.code == 0, (words, done.err)
        assert done.out, words


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("block", cases(PYTHON))
def test_every_python_block_works(world: Path, block: Block) -> None:
    for package in block.needs:
        pytest.importorskip(package)
    with ExitStack() as stack:
        names: dict[str, Any] = {}
        for name in block.given:
            names |= stack.enter_context(WORLDS[name]())
        exec(compile(block.code, block.page, "exec"), names)
        for name in [name for name in names if name.startswith("test_")]:
            for update in (True, False):
                names[name](Guard(world / FOLDER, update))


def test_commands_of_other_programs_are_there() -> None:
    lines = [line for block in SHELL for line in block.text.splitlines()]
    scripts = [word for line in lines for word in re.findall(r"python (\S+\.py)", line)]
    assert all((REPOSITORY / script).exists() for script in scripts)
    pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"gradflow-bench\[(\w+)\]", "\n".join(lines)):
        assert f"\n{extra} = [" in pyproject


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for line in ("pip install -e '.[test]' && pytest", "pip install . && gradflow run --depth 200"):
        assert line in readme
        for part in line.split(" && "):
            assert re.search(
                rf"^ *{re.escape(part).replace('install', 'install -q')}", script, re.MULTILINE
            )


def test_lines_of_code_fit_a_terminal_of_80_columns() -> None:
    guide = [block for block in blocks("python", "sh") if block.page != "README.md"]
    long = [line for block in guide for line in block.text.splitlines() if len(line) > 78]
    assert not long


# The two files that the guide prints


def test_the_guide_shows_two_files_and_a_scheme_takes_ten_lines() -> None:
    assert list(shown_files()) == ["my_scheme.py", "my_block.py"]
    assert len([line for line in shown_files()["my_scheme.py"].splitlines() if line]) <= 10


def test_runs_of_the_shown_files_have_their_names_and_digests(
    cli: CommandLine, world: Path
) -> None:
    shown = "|".join(map(re.escape, shown_files()))
    lines = [w for block in SHELL for w in block.commands() if re.search(shown, " ".join(w))]
    assert {line[0] for line in lines} == {"run", "compare"}
    for number, line in enumerate(lines):
        out = world / f"runs-{number}"
        assert cli(*line, "--out", str(out)).code == 0
        runs = [load(folder) for folder in run_folders(out)]
        names = {str(name) for run in runs for name in (run.spec.scheme, run.spec.block)}
        for file in set(re.findall(r"my_\w+\.py:\w+", " ".join(line))):
            assert any(name.startswith(f"{file}@") for name in names)
