"""Trained weights: what is read from a checkpoint, against the model of transformers in float64."""

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
from commandline import CommandLine
from problems import CPU
from safetensors.torch import save_file
from test_spec import assert_one_line
from torch import Tensor

from gradflow import RunOptions, measure, save
from gradflow.errors import UsageError
from gradflow.language import token_ids
from gradflow.measurement import build_network
from gradflow.spec import StackSpec, run_key
from gradflow.stack import build_block, input_batch
from gradflow.store import load
from gradflow.theory import predict
from gradflow.walk import walk

D, HEADS, KV, C, HIDDEN, VOCABULARY, DEPTH = 8, 4, 2, 6, 12, 11, 2
CONFIG: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": D, "num_hidden_layers": DEPTH, "head_dim": C},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV, "intermediate_size": HIDDEN},
    **{"vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "rope_theta": 100.0, "hidden_act": "silu"},
}
LAYER = {
    "input_layernorm": (D,),
    "self_attn.q_proj": (HEADS * C, D),
    "self_attn.k_proj": (KV * C, D),
    "self_attn.v_proj": (KV * C, D),
    "self_attn.o_proj": (D, HEADS * C),
    "post_attention_layernorm": (D,),
    "mlp.gate_proj": (HIDDEN, D),
    "mlp.up_proj": (HIDDEN, D),
    "mlp.down_proj": (D, HIDDEN),
}


# By our names.
OURS = {
    "attention": {n: f"{n[0]}_proj" for n in ("q", "k", "v", "out")},
    "ffn": {n: f"{n}_proj" for n in ("gate", "up", "down")},
}


def by_hand() -> dict[str, Tensor]:
    """The tensors of a llama of two layers, in bfloat16."""
    shapes = {"model.embed_tokens": (VOCABULARY, D), "model.norm": (D,), "lm_head": (VOCABULARY, D)}
    for layer in range(DEPTH):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
    source = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=source).bfloat16()
        for name, shape in shapes.items()
    }


def write(folder: Path, tensors: dict[str, Tensor], files: int = 1, **config: Any) -> Path:
    """A checkpoint of so many files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    where = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for file in names:
        save_file({t: v for t, v in tensors.items() if where[t] == file}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny llama", by_hand())


def spec_of(folder: Path, **options: Any) -> StackSpec:
    return StackSpec(weights=str(folder), batch_size=2, seq_len=5, **options)


# Without transformers


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


def measured(spec: StackSpec, seed: int = 0) -> Any:
    """The engine's records of one seed."""
    return walk(spec, seed, build_network(spec, seed, CPU)).records()


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
    tensors["model.norm.weight"] += 1
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
        ("has every tensor of its architecture", Q, "complete the folder"),
    ),
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
    assert "ce loss" in both.out


# Against transformers

SIZES = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3}
GROUPS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = {"bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"vocab_size": 23, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 9}
# Config and options of each architecture.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SIZES | GROUPS,
    "Qwen2": SIZES | GROUPS,
    "Qwen3": SIZES | GROUPS | {"head_dim": 6, "tie_word_embeddings": True},
    "GPT2": GPT2 | PLAIN,
}


def model_of(name: str) -> Any:
    """A small model with random weights: no scale is 1, no shift 0."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def in_double(model: Any) -> Any:
    """The same model in float64 throughout: transformers rounds to float32 inside its RMSNorm."""
    for part in model.double().modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = lambda x, n=part: (
                n.weight * x / ((x**2).mean(-1, keepdim=True) + n.variance_epsilon).sqrt()
            )
    return model


# By the names of the model: the two norms of a layer, and where each matrix of ours is.
MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
FUSED = {"out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}


def truth(model: Any, spec: StackSpec, loss: Any) -> tuple[list[float], list[dict[str, float]]]:
    """Norms of the gradient at y_0 and after every unit; of every parameter's, layer by layer."""
    body = model.base_model
    layers = body.h if hasattr(body, "h") else body.layers
    ids, stream = token_ids(spec, 0), []

    def keep(x: Tensor) -> None:
        x.retain_grad()
        stream.append(x)

    for layer in layers:
        middle = layer.ln_2 if hasattr(layer, "ln_2") else layer.post_attention_layernorm
        layer.register_forward_pre_hook(lambda _, args: keep(args[0]))
        middle.register_forward_pre_hook(lambda _, args: keep(args[0]))
    layers[-1].register_forward_hook(lambda *given: keep(as_tensor(given[-1])))
    logits = model(input_ids=ids[:, :-1]).logits
    if spec.loss == "ce":
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    else:
        (stream[-1] * loss.v).sum().backward()
    return [x.grad.norm().item() for x in stream], [parameter_norms(layer) for layer in layers]


def as_tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def parameter_norms(layer: Any) -> dict[str, float]:
    """By our names; the biases of gpt2's keys, which nothing reaches, left out."""
    grads = {name: p.grad for name, p in layer.named_parameters()}
    if hasattr(layer, "ln_1"):
        found = {ours: f"{theirs}" for ours, theirs in FUSED.items()}
        norms = {"attention": "ln_1", "ffn": "ln_2"}
        thirds = {
            f"attention branch.{part}.{kind}": grads[f"attn.c_attn.{kind}"].chunk(3, -1)[i]
            for i, part in enumerate("qkv")
            for kind in ("weight", "bias")
            if (part, kind) != ("k", "bias")
        }
    else:
        found, thirds = MATRICES, {}
        norms = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}
    for unit, theirs in norms.items():
        thirds |= renamed(grads, theirs, f"{unit} before")
    for ours, theirs in found.items():
        unit = "ffn" if ours in ("gate", "up", "down") else "attention"
        thirds |= renamed(grads, theirs, f"{unit} branch.{ours}")
    return {name: grad.norm().item() for name, grad in thirds.items()}


def renamed(grads: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    kinds = ("weight", "bias")
    return {f"{ours}.{k}": grads[f"{theirs}.{k}"] for k in kinds if f"{theirs}.{k}" in grads}


def agree(model: Any, spec: StackSpec, stream: float, params: float) -> bool:
    """Whether the engine finds the model's own norms, to these relative differences."""
    network = build_network(spec, 0, CPU)
    layers, rows = walk(spec, 0, network).records()
    model.zero_grad()
    gradients, by_layer = truth(model, spec, network.loss)
    got = {(r.layer, f"{r.unit} {r.param}"): r.grad_norm for r in rows}
    want = {(i, k): norm for i, norms in enumerate(by_layer, 1) for k, norm in norms.items()}
    assert got.keys() == want.keys()
    along = [r.grad_norm for r in layers] == pytest.approx(gradients, rel=stream)
    return along and got == pytest.approx(want, rel=params)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_walk_is_the_models_own_autograd(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    in_double(model)
    for loss in ("cotangent", "ce"):
        assert agree(model, spec_of(tmp_path, dtype="float64", loss=loss), 1e-9, 1e-9)
        # A parameter's gradient is a sum over tokens, of terms that cancel.
        assert agree(model, spec_of(tmp_path, dtype="float32", loss=loss), 1e-6, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["rope_parameters", "rms_norm_eps", "heads"])
def test_another_config_is_another_model(setting: str, tmp_path: Path) -> None:
    """Negative control."""
    model = model_of("Llama")
    model.save_pretrained(tmp_path)
    in_double(model)
    config = json.loads((tmp_path / "config.json").read_text())
    other: dict[str, dict[str, Any]] = {
        "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 9_000.0}},
        "rms_norm_eps": {"rms_norm_eps": 1e-5},
        "heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config | other[setting]))
    assert not agree(model, spec_of(tmp_path, dtype="float64"), 1e-6, 1e-6)
