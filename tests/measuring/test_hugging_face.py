"""`--model hf:`: models of transformers, found, sized, measured and trained without a download."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import CommandLine

from gradflow.errors import MeasurementError, UsageError
from gradflow.measuring.models.hugging_face import changes, hugging_face_build
from gradflow.measuring.models.run import measure_model
from gradflow.runs import store
from gradflow.runs.records import Run
from gradflow.specs.model_spec import ModelRequest, ModelSpec
from gradflow.specs.run_options import RunOptions
from gradflow.watching.discovery import find_layers

pytestmark = pytest.mark.slow  # transformers takes seconds to import
transformers = pytest.importorskip("transformers")

OPTIONS = RunOptions(timing=False, raw_range=True, device="cpu")
SMALL = {"width": 32, "depth": 2, "batch_size": 2, "seq_len": 5, "dtype": "float64"}
FEW = "vocab_size=29"
# What a small one needs beside its width and depth, its class, and the layers that it has then.
TYPES = {
    "gpt2": (f"{FEW} n_head=4", "GPT2LMHeadModel", 2),
    "llama": (f"{FEW} num_attention_heads=4 num_key_value_heads=2", "LlamaForCausalLM", 2),
    "qwen3": (f"{FEW} num_attention_heads=4 num_key_value_heads=2", "Qwen3ForCausalLM", 2),
    "mistral": (f"{FEW} num_attention_heads=4 num_key_value_heads=2", "MistralForCausalLM", 2),
    "gemma2": (f"{FEW} num_attention_heads=4 num_key_value_heads=2", "Gemma2ForCausalLM", 2),
    "bert": (f"{FEW} num_attention_heads=4", "BertModel", 2),
    "distilbert": (f"{FEW} n_heads=4", "DistilBertModel", 2),
    "albert": (f"{FEW} num_attention_heads=4 embedding_size=16", "AlbertModel", 2),
    "t5": (f"{FEW} num_heads=4", "T5Model", 4),
    "bart": (FEW, "BartModel", 4),
    "vit": ("num_attention_heads=4 image_size=32", "ViTModel", 2),
    "deepseek_v3": (
        f"{FEW} n_routed_experts=8 moe_intermediate_size=16",
        "DeepseekV3ForCausalLM",
        2,
    ),
}


def small(name: str, **values: Any) -> ModelRequest:
    sizes = {k: v for k, v in SMALL.items() if name != "vit" or k != "seq_len"}
    given = {"model": f"hf:{name}", "set": TYPES[name][0]} | sizes | values
    return ModelRequest(**given)


def measured(name: str, **values: Any) -> Run:
    return measure_model(small(name, **values), OPTIONS)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_built_sized_and_measured(name: str) -> None:
    _, model_class, layers = TYPES[name]
    run = measured(name)
    assert isinstance(run.spec, ModelSpec)
    assert (run.spec.model, run.spec.depth) == (model_class, layers)
    assert run.spec.shape.endswith("x32")
    assert all(row.grad_norm and math.isfinite(row.grad_norm) for row in run.layer_records[1:])


def test_norms_are_those_of_autograd() -> None:
    """GPT-2 without dropout, its logits on a random cotangent, by autograd alone."""
    still = f"{TYPES['gpt2'][0]} resid_pdrop=0 embd_pdrop=0 attn_pdrop=0"
    request = small("gpt2", set=still)
    run = measure_model(request, OPTIONS)
    torch.manual_seed(0)
    model = hugging_face_build(request).model().double()
    ids = torch.randint(29, (2, 5), generator=torch.Generator().manual_seed(0))
    out = model(ids, output_hidden_states=True)
    source = torch.Generator().manual_seed(0)
    c = torch.randn(out.logits.shape, generator=source, dtype=torch.float64)
    # The last of the hidden states is behind the final norm.
    below = out.hidden_states[:2]
    want = torch.autograd.grad((c / c.norm() * out.logits).sum(), below)
    got = [row.grad_norm for row in run.layer_records[:2]]
    assert got == pytest.approx([float(g.norm()) for g in want], rel=1e-9)


# What a type's default configuration has: its blocks, and no parts of them.
BLOCKS = {
    "switch_transformers": (24, "SwitchTransformersBlock"),  # every other one has experts
    "zamba2": (54, "Zamba2MambaDecoderLayer Zamba2HybridLayer"),
    "xlm": (24, "MultiHeadAttention TransformerFFN"),  # lists of both, and of norms
    "swin": (12, "SwinLayer"),
    "resnet": (16, "ResNetBottleNeckLayer"),  # the first of each stage has a projection
    "regnet": (22, "RegNetYLayer"),
    "cvt": (13, "CvtLayer"),  # the first stage has one block
    "convnext": (18, "ConvNextLayer"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_are_found_and_not_their_parts(name: str) -> None:
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(name)
        found = find_layers(transformers.AutoModel.from_config(config))
    count, kinds = BLOCKS[name]
    assert len(found) == count
    assert {place.kind for place in found} == set(kinds.split())


def test_the_shared_block_of_albert_has_a_row_for_each_call() -> None:
    run = measure_model(
        small("albert", depth=4), replace(OPTIONS, timing=True, repeats=1, time_budget=1e-9)
    )
    unit = "encoder.albert_layer_groups.0"
    units = [unit, *(f"{unit}#{n}" for n in (2, 3, 4))]
    assert [row.unit for row in run.layer_records] == ["input", *units]
    assert [row.unit for row in run.time_records] == units
    model = hugging_face_build(run.spec.request).model().double()
    assert {row.unit for row in run.param_records} == {unit}  # all calls take part in its gradient
    assert len(run.param_records) == len(list(model.get_submodule(unit).parameters()))
    torch.manual_seed(0)
    model = hugging_face_build(run.spec.request).model().double()
    ids = torch.randint(29, (2, 5), generator=torch.Generator().manual_seed(0))
    out = model(ids, output_hidden_states=True)
    source = torch.Generator().manual_seed(0)
    y = out.last_hidden_state
    c = torch.randn(y.shape, generator=source, dtype=torch.float64)
    want = torch.autograd.grad((c / c.norm() * y).sum(), out.hidden_states)
    got = [row.grad_norm for row in run.layer_records]
    assert got == pytest.approx([float(g.norm()) for g in want], rel=1e-9)


def test_depth_and_width_go_by_each_configurations_own_names() -> None:
    asked = ModelRequest(model="hf:llama", depth=3, width=512)
    config = hugging_face_build(asked).config
    assert (config.num_hidden_layers, config.hidden_size) == (3, 512)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 1376)
    found = changes(transformers.T5Config(), ModelRequest(model="hf:t5", depth=3, width=256))
    assert found == {
        **{"num_layers": 3, "num_decoder_layers": 3, "d_model": 256},
        **{"num_heads": 4, "d_ff": 1024},
    }


def test_lists_with_an_item_for_each_layer_follow_the_depth() -> None:
    config = hugging_face_build(ModelRequest(model="hf:gemma2", depth=3)).config
    assert len(config.layer_types) == 3


def test_a_class_may_be_named() -> None:
    run = measured("bert", model="hf:BertForMaskedLM")
    assert isinstance(run.spec, ModelSpec)
    assert run.spec.model == "BertForMaskedLM"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"model": "hf:gtp2"}, "got gtp2; use for example gpt2"),
        ({"model": "hf:gpt2", "set": "n_layers=3"}, "got n_layers; use for example n_layer"),
        ({"model": "hf:gpt2", "seq_len": 2000}, "has positions for 1024 tokens"),
        ({"model": "hf:gpt2", "set": "n_head=5"}, "hf:gpt2 runs; got ValueError"),
        ({"model": "hf:resnet", "depth": 3}, "sets the number of layers of hf:resnet"),
        ({"model": "hf:swin", "depth": 3}, "sets the number of layers of hf:swin"),
        ({"model": "hf:gpt2", "depth": 3, "set": "n_layer=2"}, "--depth and --set n_layer say"),
        ({"model": "hf:gpt2", "image_size": 8}, "--image-size is for models of images"),
        ({"model": "hf:logging"}, "got logging; use for example"),
        ({"model": "hf:whisper"}, "takes input_features"),
        ({"model": "hf:./nowhere"}, "or a folder; got './nowhere'"),
    ],
)
def test_a_mistake_is_named(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        measure_model(ModelRequest(**values), OPTIONS)


def test_what_does_not_fit_is_refused_before_it_is_built() -> None:
    with pytest.raises(MeasurementError, match=r"hf:llama needs at least .* GiB"):
        measure_model(ModelRequest(model="hf:llama", depth=4000), OPTIONS)


def test_a_folder_has_weights_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(7)
    request = small("llama", dtype="float32")
    model = hugging_face_build(request).model()
    model.save_pretrained(tmp_path / "mine")  # type: ignore[operator]
    asked = ModelRequest(model=f"hf:{tmp_path}/mine", batch_size=2, seq_len=5)
    run = measure_model(asked, OPTIONS)
    assert isinstance(run.spec, ModelSpec)
    assert run.spec.block == "hf:mine"
    norms = {(r.unit, r.param): r.norm for r in run.param_records}
    want = dict(model.named_parameters())
    for (unit, name), norm in norms.items():
        assert norm == pytest.approx(float(want[f"{unit}.{name}"].detach().double().norm()))
    assert str(tmp_path) not in json.dumps(run.spec.to_json())


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    model = hugging_face_build(small("llama", dtype="float32")).model()
    model.save_pretrained(tmp_path / "mine")  # type: ignore[operator]
    asked = ModelRequest(model=f"hf:{tmp_path}/mine", depth=3, batch_size=2, seq_len=5)
    with pytest.raises(UsageError, match=r"9 without: model\.layers\.2\."):
        measure_model(asked, OPTIONS)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = hugging_face_build(small("llama", dtype="float32")).model()
    model.config.save_pretrained(tmp_path)  # type: ignore[union-attr]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="which can run code"):
        ModelRequest(model=f"hf:{tmp_path}/")


def test_a_causal_model_learns_the_markov_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli = CommandLine(capsys, tmp_path)
    words = ("--model", "hf:gpt2", "--width", "32", "--depth", "2", "--set", TYPES["gpt2"][0])
    how = ("--steps", "80", "--lr", "0.01", "--every", "40", "--seq-len", "16")
    done = cli("run", "--out", str(tmp_path), *words, *how, "--json", "-", "--no-timing")
    assert done.code == 0, done.err
    summary = json.loads(done.out)["summary"]
    assert summary["gap_closed"] > 0.3
    assert math.isfinite(summary["final_loss"])


def test_an_encoder_has_no_next_token_to_learn() -> None:
    options = RunOptions(steps=3, timing=False, raw_range=True)
    with pytest.raises(UsageError, match="a causal model's next token"):
        measure_model(small("bert", loss="ce"), options)


def test_a_grid_of_types_is_reused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli = CommandLine(capsys, tmp_path)
    words = ("--model", "hf:gpt2,hf:llama", "--depth", "2,3", "--width", "32", "--set", FEW)
    how = ("--seq-len", "5", "--repeats", "1", "--time-budget", "1e-9", "--executor", "serial")
    done = cli("compare", "--out", str(tmp_path), *words, "--set", "num_attention_heads=4", *how)
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80
    runs = [store.load(folder) for folder in store.run_folders(tmp_path)]
    assert sorted(run.spec.depth for run in runs) == [2, 2, 3, 3]
    assert all(run.environment["transformers"] == transformers.__version__ for run in runs)
    assert all(row.backward_s for run in runs for row in run.layer_records if row.layer)
    again = cli("compare", "--out", str(tmp_path), *words, "--set", "num_attention_heads=4", *how)
    assert "4 of 4 cells stored already" in again.err
