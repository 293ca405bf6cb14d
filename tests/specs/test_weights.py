"""Trained weights: what is read from a checkpoint, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import psutil
import pytest
import torch
from checkpoints import (
    CONFIG,
    DEPTH,
    HEADS,
    HIDDEN,
    KV,
    LAYER,
    OURS,
    VOCABULARY,
    C,
    D,
    by_hand,
    measured,
    spec_of,
    write,
)
from commandline import CommandLine
from one_line import assert_one_line
from problems import CPU
from torch import Tensor

from gradflow import RunOptions, measure, save
from gradflow.engine.build import RebuiltBlocks
from gradflow.errors import UsageError
from gradflow.networks.ends import input_batch, token_ids
from gradflow.networks.stack import build_block
from gradflow.runs.store import load
from gradflow.specs.stack import StackSpec, run_key
from gradflow.theory import predict


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny llama", by_hand())


def test_a_block_holds_the_tensors_of_its_layer(folder: Path) -> None:
    tensors = by_hand()
    for dtype in ("float32", "float64", "bfloat16"):
        spec = spec_of(folder, dtype=dtype)
        for layer in (1, 2):
            values = dict(build_block(spec, 0, layer, CPU).named_parameters())
            assert len(values) == len(LAYER)
            want = tensors[f"model.layers.{layer - 1}.self_attn.q_proj.weight"]
            got = values["0.branch.q.weight"]
            assert got.dtype == getattr(torch, dtype)
            assert torch.equal(got, want.to(got.dtype))
            norms = {n: p for n, p in values.items() if "before" in n}
            assert not torch.equal(*norms.values())


def test_the_shape_is_that_of_the_config(folder: Path) -> None:
    spec = spec_of(folder)
    got = (spec.depth, spec.width, spec.heads, spec.kv_heads, spec.head_dim, spec.hidden)
    assert got == (DEPTH, D, HEADS, KV, C, HIDDEN)
    assert (spec.norm_eps, spec.rope, spec.classes) == (1e-6, 100.0, VOCABULARY)
    assert (spec.gated, spec.bias, spec.norm_kind, spec.init) == (True, "none", "rmsnorm", None)
    assert spec.title.startswith("tiny llama: residual transformer, pre-rmsnorm")
    assert spec.slug == "tiny-llama-residual-pre-d2"


def test_shards_hold_the_same_numbers_as_one_file(folder: Path, tmp_path: Path) -> None:
    sharded = write(tmp_path / "sharded", by_hand(), files=3)
    whole, parts = (measured(spec_of(where, loss="ce")) for where in (folder, sharded))
    assert [r.grad_norm for r in whole[0]] == [r.grad_norm for r in parts[0]]
    assert [r.grad_norm for r in whole[1]] == [r.grad_norm for r in parts[1]]


@pytest.mark.parametrize("files", [1, 3])
def test_the_gradients_are_those_of_plain_autograd(tmp_path: Path, files: int) -> None:
    """The hand-written llama, written out from its tensors by their names in the file."""
    tensors = {n: t.double().requires_grad_() for n, t in by_hand().items()}
    spec = spec_of(write(tmp_path / "llama", by_hand(), files), dtype="float64", loss="ce")
    layers, params = measured(spec)
    x = tensors["model.embed_tokens.weight"].detach()[token_ids(spec, 0)[:, :-1]].requires_grad_()
    stream = [x]
    for layer in range(DEPTH):
        at = f"model.layers.{layer}."
        for kind, part in (("attention", "self_attn."), ("ffn", "mlp.")):
            before = "input" if kind == "attention" else "post_attention"
            p = {"n.weight": tensors[f"{at}{before}_layernorm.weight"]}
            for ours, theirs in OURS[kind].items():
                p[f"branch.{ours}.weight"] = tensors[f"{at}{part}{theirs}.weight"]
            stream.append(x := x + oracle.BRANCHES[kind](spec, p, oracle.norm(spec, p, "n", x)))
    for y in stream[1:]:
        y.retain_grad()
    y = oracle.norm(spec, {"n.weight": tensors["model.norm.weight"]}, "n", x)
    logits = (y @ tensors["lm_head.weight"].T).flatten(0, 1)
    labels = token_ids(spec, 0)[:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    want = [y.grad.norm().item() for y in stream]
    assert [r.grad_norm for r in layers] == pytest.approx(want, rel=1e-9)
    queries = [tensors[f"model.layers.{i}.self_attn.q_proj.weight"].grad for i in range(DEPTH)]
    got = [r.grad_norm for r in params if r.param == "branch.q.weight"]
    assert got == pytest.approx([g.norm().item() for g in queries], rel=1e-9)


def resident() -> int:
    """Bytes of this process that are in memory, mapped files among them."""
    return int(psutil.Process().memory_info().rss)


def test_memory_holds_one_layer_of_the_checkpoint(tmp_path: Path) -> None:
    """16 layers of 4 MiB each: all in one file, read one after the other."""
    sizes = {"hidden_size": 256, "intermediate_size": 1280, "num_hidden_layers": 16}
    big = {"input_layernorm": (256,), "post_attention_layernorm": (256,)}
    big |= {f"self_attn.{n}_proj": (256, 256) for n in "qo"} | {
        f"self_attn.{n}_proj": (128, 256) for n in "kv"
    }
    big |= {"mlp.gate_proj": (1280, 256), "mlp.up_proj": (1280, 256), "mlp.down_proj": (256, 1280)}
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.ones(shape)
        for layer in range(16)
        for name, shape in big.items()
    }
    total = sum(t.nbytes for t in tensors.values())
    folder = write(tmp_path / "big", tensors, **sizes, head_dim=64)
    del tensors
    spec = spec_of(folder)
    build_block(spec, 0, 1, CPU)
    before, most = resident(), 0
    for layer in range(1, 17):
        block = build_block(spec, 0, layer, CPU)
        most = max(most, resident() - before)
        del block
    assert most < total / 4


def test_the_input_is_embedded_and_the_labels_are_what_comes_next(folder: Path) -> None:
    spec = spec_of(folder, dtype="float64")
    ids = token_ids(spec, 3)
    want = by_hand()["model.embed_tokens.weight"].double()[ids[:, :-1]]
    assert torch.equal(input_batch(spec, 3, CPU), want)
    assert ids.shape == (2, 6)
    assert not torch.equal(ids, token_ids(spec, 4))


def test_a_run_names_the_checkpoint_and_never_its_path(folder: Path, tmp_path: Path) -> None:
    run = save(measure(spec_of(folder), RunOptions(timing=False)), tmp_path / "runs")
    assert run.path is not None
    text = (run.path / "run.json").read_text()
    assert str(tmp_path) not in text
    assert f'"weights": "tiny llama@{run.spec.weights[-8:]}"' in text
    again = load(run.path)
    assert again.spec == run.spec
    assert run_key(again.spec, again.options) == run_key(run.spec, run.options)
    with pytest.raises(UsageError) as caught:
        measure(again.spec)
    assert_one_line(
        caught.value, ("weights are read from their folder", "tiny llama@", "--weights")
    )


def test_the_key_depends_on_the_weights(folder: Path, tmp_path: Path) -> None:
    key = run_key(spec_of(folder), RunOptions())
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / folder.name))
    assert run_key(spec_of(copy), RunOptions()) == key
    tensors = by_hand()
    tensors["model.norm.weight"] += 1  # another training of the same shape
    write(copy, tensors)
    assert run_key(spec_of(copy), RunOptions()) != key


def test_a_spec_keeps_its_folder_through_pickle_and_replace(folder: Path) -> None:
    spec = spec_of(folder)
    for other in (pickle.loads(pickle.dumps(spec)), replace(spec, batch_size=2)):
        assert other == spec
        assert other.checkpoint.folder == folder.resolve()
        assert other.checkpoint.config == spec.checkpoint.config


def test_theory_says_why_it_has_nothing(folder: Path) -> None:
    found = predict(spec_of(folder))
    assert found.log10_grad_norm is None
    assert "trained weights" in str(found.reason)


CONFLICTS: tuple[tuple[dict[str, Any], tuple[str, str, str]], ...] = (
    ({"depth": 3}, ("has --depth 2", "got --depth 3", "leave out --depth")),
    ({"norm": "post"}, ("has --norm pre", "got --norm post", "leave out --norm")),
    ({"shortcut": "plain"}, ("has --shortcut residual", "--shortcut plain", "leave out")),
    ({"block": "mlp"}, ("has --block transformer", "--block mlp", "leave out --block")),
    ({"rope": 10.0}, ("has --rope 100.0", "--rope 10.0", "leave out --rope")),
    ({"init": "he"}, ("values of its own", "got --init", "leave out --init")),
    ({"like": "gpt2"}, ("values of its own", "got --like", "leave out --like")),
    ({"scheme": "keel"}, ("values of its own", "got --scheme", "leave out --scheme")),
    ({"gain": 2.0}, ("values of its own", "got --gain 2.0", "leave it out")),
)


@pytest.mark.parametrize(("given", "parts"), CONFLICTS)
def test_options_that_contradict_the_checkpoint_are_refused(
    folder: Path, given: dict[str, Any], parts: tuple[str, str, str]
) -> None:
    with pytest.raises(UsageError) as caught:
        StackSpec(weights=str(folder), **given)
    assert_one_line(caught.value, parts)


def test_options_that_agree_with_the_checkpoint_are_not(folder: Path) -> None:
    assert spec_of(folder, depth=2, rope=100.0, norm="pre") == spec_of(folder)


def edit(folder: Path, **settings: Any) -> None:
    """Settings of config.json; None takes one away."""
    config = {k: v for k, v in (CONFIG | settings).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = by_hand()
    change(tensors)
    write(folder, tensors)


def without_a_shard(folder: Path) -> None:
    write(folder, by_hand(), files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


Q = "model.layers.1.self_attn.q_proj.weight"


def misplaced(folder: Path) -> None:
    write(folder, by_hand(), files=3)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q] = next(name for name in names if name != index["weight_map"][Q])
    file.write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, str, str]]] = {
    "folder": (shutil.rmtree, ("--weights is a folder", "tiny llama", "give the folder")),
    "config": (lambda f: (f / "config.json").unlink(), ("has config.json", "without", "complete")),
    "json": (lambda f: (f / "config.json").write_text("{"), ("is JSON", "got", "copy it again")),
    "list": (lambda f: (f / "config.json").write_text("[]"), ("JSON object", "list", "copy")),
    "weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ("a checkpoint has model.safetensors", "without it", "complete the folder"),
    ),
    "pickle": (as_pickle, ("has model.safetensors", "without it", "convert the .bin files")),
    "shard": (without_a_shard, ("has model-00002-of-00003.safetensors", "without it", "complete")),
    "truncated": (truncated, ("model.safetensors is a whole safetensors file", "got", "copy")),
    "tensor": (
        lambda f: rewrite(f, lambda t: t.pop(Q)),
        ("every tensor of its architecture", f"no {Q[6:]}", "complete the folder"),
    ),
    "misplaced": (misplaced, (f"{Q} is where", "does not contain tensor", "copy the folder")),
    "shape": (
        lambda f: rewrite(f, lambda t: t.update({Q: torch.zeros(3, D)})),
        ("shapes of config.json, here 24x8", "q_proj.weight of 3x8", "config.json that belongs"),
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({Q: torch.zeros(24, D, dtype=torch.int8)})),
        ("plain floating-point numbers", "q_proj.weight in torch.int8", "without packing"),
    ),
    "vocabulary": (
        lambda f: edit(f, vocab_size=1000),
        ("shapes of config.json", "embed_tokens.weight of 11x8", "config.json that belongs"),
    ),
    "architecture": (
        lambda f: edit(f, model_type="mamba"),
        ("of an architecture that gradflow knows", "mamba", "llama, qwen2, qwen3, gpt2"),
    ),
    "setting": (lambda f: edit(f, hidden_size=None), ("has hidden_size", "None", "complete")),
    "text": (lambda f: edit(f, hidden_size="8"), ("has hidden_size", "got 8", "complete")),
    "bias": (
        lambda f: edit(f, attention_bias=True),
        ("llama with attention_bias False", "attention_bias True", "another checkpoint"),
    ),
    "stretched": (
        lambda f: edit(f, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        ("rotary positions without stretching", "yarn", "use a checkpoint without it"),
    ),
    "activation": (
        lambda f: edit(f, hidden_act="mish"),
        ("hidden_act is an activation that gradflow knows", "got mish", "use silu"),
    ),
    "quantised": (
        lambda f: edit(f, quantization_config={"bits": 4}),
        ("llama with quantization_config None", "bits", "use another checkpoint"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(folder: Path, name: str) -> None:
    damage, parts = BROKEN[name]
    damage(folder)
    with pytest.raises(UsageError) as caught:
        measured(spec_of(folder))
    assert_one_line(caught.value, parts)


@pytest.mark.slow
def test_a_run_needs_no_other_option(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gradflow = CommandLine(capsys, tmp_path / "runs")
    done = gradflow("run", "--weights", str(folder), "--no-timing", "--out", str(gradflow.out))
    assert done.code == 0, done.err
    assert "tiny llama: residual transformer, pre-rmsnorm, depth 2" in done.out
    assert "trained weights tiny llama@" in done.out
    assert "init" not in done.out
    both = gradflow(
        "compare",
        f"--weights={folder}",
        "--loss=cotangent,ce",
        "--no-timing",
        "--out",
        str(gradflow.out),
    )
    assert both.code == 0, both.err
    assert "1 of 2 cells stored already" in both.err
    assert "ce loss" in both.out


def test_a_rebuilt_layer_has_the_tensors_of_its_own_layer(folder: Path) -> None:
    spec = spec_of(folder)
    blocks = RebuiltBlocks(spec, 0, CPU)
    for layer in (2, 1, 2):
        fresh, played = build_block(spec, 0, layer, CPU), blocks[layer - 1]
        pairs = zip(fresh.named_parameters(), played.named_parameters(), strict=True)
        assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)
    first, second = (dict(build_block(spec, 0, n, CPU).named_parameters()) for n in (1, 2))
    assert not torch.equal(first["0.branch.q.weight"], second["0.branch.q.weight"])


def test_every_policy_gives_the_same_gradients(folder: Path) -> None:
    runs = [
        measure(spec_of(folder, loss="ce"), RunOptions(device="cpu", timing=False, **policy))
        for policy in ({}, {"keep": "graph"}, {"keep": "boundaries", "rebuild": True})
    ]
    norms = [[r.grad_norm for r in run.layer_records] for run in runs]
    assert norms[0] == norms[1] == norms[2]


def test_a_checkpoint_is_not_trained_on(folder: Path) -> None:
    with pytest.raises(UsageError, match="leave out --weights, or --steps") as refused:
        measure(spec_of(folder), RunOptions(device="cpu", steps=2))
    parts = ("starts from initial weights", "--weights tiny llama@", "leave out --weights")
    assert_one_line(refused.value, parts)
