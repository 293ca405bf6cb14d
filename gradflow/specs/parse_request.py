"""From options by name to what is measured: a stack, or somebody's model. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from gradflow.errors import UsageError
from gradflow.specs.fields import flag, options_of
from gradflow.specs.model_request import ModelRequest, without_digest
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.training_spec import as_trained

Asked = StackSpec | ModelRequest
STACK_FIELDS = {f.name: f for f in fields(StackSpec)}
MODEL_FIELDS = {f.name: f for f in fields(ModelRequest)}
# Models keep all their graphs, and run as they are.
_BUILT_ONLY = frozenset(f.name for f, about in options_of(RunOptions) if about.built_only)


def specification(values: Mapping[str, Any]) -> tuple[Asked, RunOptions]:
    """What the given options measure, and how; the rest are defaults.

    Raises:
        UsageError: a value breaks a rule, or does not go with --model.
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
