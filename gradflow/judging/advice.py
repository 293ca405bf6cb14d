"""What a verdict means, and what to do about it in this very stack. Torch-free."""

from __future__ import annotations

from gradflow.judging.verdicts import Finding
from gradflow.specs.model_spec import ModelSpec, Spec
from gradflow.specs.run_options import RunOptions
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import without_digest


def advice(finding: Finding, spec: Spec, options: RunOptions) -> str:
    """What the verdict means, and what to do about it in this very stack."""
    if isinstance(spec, ModelSpec):
        remedy = finding.verdict.model_remedy
    else:
        assert isinstance(spec, StackSpec)
        remedy = _remedy(finding, spec, options)
    return f"{finding.verdict.meaning} {remedy}".strip()


def _remedy(finding: Finding, spec: StackSpec, options: RunOptions) -> str:
    if finding.verdict.passes:
        return ""
    if finding.counts:
        counts = ", ".join(f"{number} {verdict}" for verdict, number in finding.counts)
        return f"Of {options.seeds}: {counts}. Raise --seeds to see how often each occurs."
    if finding.direction == "backward" and options.raw_range:
        return f"Leave out --raw-range to measure beyond the range of {spec.dtype}."
    if spec.weights:
        return "These weights are trained: the layers where the profile bends say where."
    if finding.direction == "forward" and spec.dtype != "float64":
        normalise = "Normalise (--norm pre), lower" if spec.norm == "none" else "Lower"
        wider = "float64" if spec.dtype == "float32" else "float32"
        return f"{normalise} {_scale(spec)}, or try --dtype {wider}."
    return _redesign(spec)


def _redesign(spec: StackSpec) -> str:
    if spec.scheme is not None:
        return f"{without_digest(spec.scheme)} does so here; `gradflow schemes` lists the others."
    if not spec.has_shortcut:
        return "Add shortcuts: --shortcut residual."
    if spec.norm == "none":
        return "Normalise: --norm pre."
    if spec.norm == "post":
        return "Move the norm into the branch: --norm pre."
    with_depth = "" if spec.init == "gpt2" or spec.weight_var else " with depth: --init gpt2, or"
    return f"Scale the branches down{with_depth or ':'} a smaller {_scale(spec)}."


def _scale(spec: StackSpec) -> str:
    """The option that scales the weights of this stack."""
    return "--gain" if spec.weight_var is None else "--weight-var"
