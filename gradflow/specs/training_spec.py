"""What training does to a specification, and what it trains on, in words. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from gradflow.errors import UsageError
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec

# The built-in task of each shape of the stream; `gradflow.training.tasks` has the tasks themselves.
MEANINGS = {
    "tokens": "next token of a Markov source of {} symbols",
    "vectors": "{} prototypes in noise",
    "images": "{} colours in noise",
}

# Three tables of 8 bytes a pair: 400 MB.
MOST_SYMBOLS = 4096


def as_trained(spec: StackSpec, options: RunOptions) -> StackSpec:
    """The specification that these options measure: on a task where they train, else as it is.

    The loss becomes the cross-entropy of the task, and attention is causal, because the next
    token must not be seen.

    Raises:
        UsageError: trained weights, another loss, a norm that lets a token see the next one, more
            classes than prototypes that are orthogonal, or a number format that the optimizer
            cannot use.
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
    if spec.classes > MOST_SYMBOLS:
        rule = f"the Markov source has at most {MOST_SYMBOLS:,} symbols, for its table of all pairs"
        raise UsageError(rule, f"--classes {spec.classes}", "use for example --classes 64")
    if spec.norm_kind == "batchnorm":
        rule = "batchnorm mixes a token with the next, which training predicts"
        raise UsageError(rule, "--norm-kind batchnorm --steps", "use --norm-kind layernorm")


def training_line(spec: StackSpec, options: RunOptions) -> str:
    """The task and how it is trained, in one line."""
    task = MEANINGS[spec.kind.domain].format(spec.classes)
    causal = ", causal attention" if spec.causal else ""
    warmup = f", {options.warmup} steps of warm-up" if options.warmup else ""
    how = f"{options.steps} steps of {options.optimizer}, lr {options.lr:g}{warmup}"
    return f"trained: {task}{causal}; {how}"
