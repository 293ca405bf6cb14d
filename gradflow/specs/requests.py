"""From options by name to what is measured: a stack or a model, and what training makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.fields import flag, options_of
from gradflow.specs.model_spec import ModelRequest
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import without_digest

Asked = StackSpec | ModelRequest
STACK_FIELDS = {f.name: f for f in fields(StackSpec)}
MODEL_FIELDS = {f.name: f for f in fields(ModelRequest)}
# Models keep all their graphs, and run as they are.
_BUILT_ONLY = frozenset(f.name for f, about in options_of(RunOptions) if about.built_only)


def specification(values: Mapping[str, Any]) -> tuple[Asked, RunOptions]:
    """Return what the given options measure, and how; all other options have their defaults.

    A UsageError tells of a value that breaks a rule, or does not go with --model.
    """
    if "model" in values:
        return _model(values)
    given = {name: value for name, value in values.items() if name in STACK_FIELDS}
    for name in values:
        if name in MODEL_FIELDS and name not in STACK_FIELDS:
            remedy = "add for example --model hf:gpt2"
            raise UsageError(f"{flag(name)} goes with --model", "no --model", remedy)
    options = RunOptions(**{k: v for k, v in values.items() if k not in STACK_FIELDS})
    return as_trained(StackSpec(**given), options), options


def _model(values: Mapping[str, Any]) -> tuple[Asked, RunOptions]:
    request = ModelRequest(**{k: v for k, v in values.items() if k in MODEL_FIELDS})
    shown = without_digest(request.model)
    for name, value in values.items():
        if (name in STACK_FIELDS and name not in MODEL_FIELDS) or (name in _BUILT_ONLY and value):
            remedy = f"leave out {flag(name)}; --set changes a setting of the model"
            raise UsageError(f"{flag(name)} is for stacks", f"--model {shown}", remedy)
    # A model runs as it is: its gradients stay as its number format delivers them.
    others = {k: v for k, v in values.items() if k not in MODEL_FIELDS}
    options = RunOptions(**others | {"raw_range": True})
    if options.steps and request.loss == "cotangent":
        request = replace(request, loss="ce")
    return request, options


# The built-in task of each shape of the stream; `gradflow.training.tasks` has the tasks themselves.
_MEANINGS = {
    "tokens": "next token of a Markov source of {} symbols",
    "vectors": "{} prototypes in noise",
    "images": "{} colours in noise",
}

# Three tables of 8 bytes a pair: 400 MB.
_MOST_SYMBOLS = 4096


def as_trained(spec: StackSpec, options: RunOptions) -> StackSpec:
    """Return the specification that these options measure: on a task where they train.

    The loss becomes the cross-entropy of the task, and attention is causal, because the next
    token must not be seen. What the task or the optimizer cannot do raises UsageError.
    """
    if not options.steps:
        return spec
    if spec.weights:
        rule = "training on the built-in task starts from initial weights"
        raise UsageError(rule, f"--weights {spec.weights}", "leave out --weights, or --steps")
    if spec.loss == "mse":
        rule = "training minimises the cross-entropy of the built-in task"
        raise UsageError(rule, "--loss mse", "leave out --loss, or use --loss ce")
    if spec.dtype == "float16" and options.optimizer == "adamw":
        rule = "the epsilon of adamw, 1e-8, is 0 in float16"
        raise UsageError(rule, "--dtype float16", "use --dtype bfloat16, or --optimizer sgd")
    if spec.kind.domain == "tokens":
        _check_tokens(spec)
    elif spec.classes > spec.width:
        rule = "the prototypes of the --classes are orthogonal in --width dimensions"
        raise UsageError(rule, f"--classes {spec.classes}", f"use --classes {spec.width} or fewer")
    return replace(spec, loss="ce", causal=True if "causal" in spec.kind.options else None)


def _check_tokens(spec: StackSpec) -> None:
    if spec.classes > _MOST_SYMBOLS:
        rule = (
            f"the Markov source has at most {_MOST_SYMBOLS:,} symbols, for its table of all pairs"
        )
        raise UsageError(rule, f"--classes {spec.classes}", "use for example --classes 64")
    if spec.norm_kind == "batchnorm":
        rule = "batchnorm mixes a token with the next, which training predicts"
        raise UsageError(rule, "--norm-kind batchnorm --steps", "use --norm-kind layernorm")


def training_line(spec: StackSpec, options: RunOptions) -> str:
    """Return the task and how it is trained, in one line."""
    task = _MEANINGS[spec.kind.domain].format(spec.classes)
    causal = ", causal attention" if spec.causal else ""
    warmup = f", {options.warmup} steps of warm-up" if options.warmup else ""
    how = f"{options.steps} steps of {options.optimizer}, lr {options.lr:g}{warmup}"
    return f"trained: {task}{causal}; {how}"
