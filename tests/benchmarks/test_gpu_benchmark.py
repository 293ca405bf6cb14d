"""The GPU benchmark where there is no GPU, and its table from given figures."""

from __future__ import annotations

from pathlib import Path

import gpu
import pytest
import side_by_side
import torch

FOUND = gpu.Figures(
    seconds=12.34,
    peak=35 * 2**30 + 2**29,
    share=0.617,
    wide=(1.014, 1.011, 1.019),
    narrow=(0.41, 0.40, 0.43),
    narrow_bare=(0.2, 0.19, 0.21),
    wide_s=0.0123,
    narrow_s=0.2,
)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path / "benchmarks")
    return tmp_path / "benchmarks"


def test_without_a_gpu_it_says_so_in_a_line_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], results: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 3
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "benchmarks/gpu.py needs a GPU that torch can use; nothing measured\n",
    )
    assert not results.exists()


def test_the_table_shows_every_figure_beside_what_is_wanted(results: Path) -> None:
    gpu.write(FOUND)
    text = (results / "gpu.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["what", "measured", "wanted", "denominator"],
        ["---"] * 4,
        ["gpt3-175b, 1 x 2,048 tokens, bfloat16: seconds", "12.3", "< 15", ""],
        ["the same: peak GiB on the device", "35.5", "< 40", ""],
        ["the same: FLOP/s of its layers, weights at hand", "62%", ">= 50%", "matrix product"],
        [
            *("statistics pass, 8 layers of width 4,096", "1.01 [1.01, 1.02]", "<= 1.02"),
            "bare pass, 12.3 ms",
        ],
        [
            *("statistics pass as a graph, 200 of 256", "0.41 [0.40, 0.43]", "< 1.00"),
            "eager bare pass, 200.0 ms",
        ],
        [
            *("bare pass as a graph, 200 of 256", "0.20 [0.19, 0.21]", "< 1.00"),
            "eager bare pass, 200.0 ms",
        ],
    ]
    assert "python benchmarks/gpu.py" in text
    assert f"torch {torch.__version__}" in text


def test_the_stacks_are_those_that_the_table_names() -> None:
    assert (gpu.GPT3.depth, gpu.GPT3.width, gpu.GPT3.seq_len) == (96, 12288, 2048)
    assert (gpu.WIDE.depth, gpu.WIDE.width) == (8, 4096)
    assert (gpu.NARROW.depth, gpu.NARROW.width) == (200, 256)
