"""The `Stack` of a `StackSpec`: the variances that `gradflow.initial` gives its weights.

`gradflow.initial.weight_std` is the same rule as code that needs torch; a test holds them together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradflow.spec import StackSpec
from gradflow.theory.units import Head, Shape, Stack, Unit, Weights

RECTIFIERS = ("relu", "gelu", "silu")


def weights(
    spec: StackSpec, fan_in: int, fan_out: int, *, feeds: bool = False, output: bool = False
) -> Weights:
    """Variance times fan_in of a matrix, and the variance of its bias.

    Args:
        spec: `init`, `gain`, `weight_var`, `bias_var` and `activation` decide.
        fan_in: inputs, the positions of a kernel counted.
        fan_out: outputs, likewise.
        feeds: whether its output goes into the activation.
        output: whether it is the output projection.
    """
    uniform = spec.init == "torch" and spec.weight_var is None
    bias = spec.gain**2 / (3 * fan_in) if uniform else 0.0
    scale = spec.gain**2 * _scale(spec, fan_in, fan_out, feeds=feeds, output=output)
    return Weights(scale, bias if spec.bias_var is None else spec.bias_var)


def _scale(spec: StackSpec, fan_in: int, fan_out: int, *, feeds: bool, output: bool) -> float:
    """Variance times fan_in at gain 1; sources in `gradflow.initial`."""
    if spec.weight_var is not None:
        return spec.weight_var
    if spec.init == "gpt2":
        return 4e-4 * fan_in / (spec.depth * spec.units_per_block if output else 1)
    he = 2.0 if feeds and spec.activation in RECTIFIERS else 1.0
    return {
        "he": he,
        "orthogonal": he,
        "xavier": 2.0 * fan_in / (fan_in + fan_out),
        "lecun": 1.0,
        "torch": 1.0 / 3.0,
    }[spec.init]


def describe(spec: StackSpec) -> Stack:
    """What theory knows of the stack."""
    block = tuple(_unit(spec, kind) for kind in spec.kind.units)
    return Stack(_shape(spec), block * spec.depth, head=_head(spec))


def _head(spec: StackSpec) -> Head | None:
    if spec.loss != "ce":
        return None
    norm = spec.norm_kind if spec.norm == "pre" else None
    return Head(spec.classes, weights(spec, spec.width, spec.classes), norm)


def _shape(spec: StackSpec) -> Shape:
    return Shape(
        domain=spec.kind.domain,
        width=spec.width,
        batch=int(spec.batch_size or 1),
        tokens=int(spec.seq_len or 1),
        side=int(spec.image_size or 1),
        hidden=spec.width * int(spec.ffn_mult or 1),
        heads=int(spec.heads or 1),
        causal=bool(spec.causal),
    )


def _unit(spec: StackSpec, kind: str) -> Unit:
    unit = Unit(
        kind=kind,
        activation=str(spec.activation),
        a=float(spec.has_shortcut),
        norm_in=spec.norm_kind if spec.norm == "pre" else None,
        norm_out=spec.norm_kind if spec.norm == "post" else None,
    )
    return replace(unit, **_matrices(spec, kind))


def _matrices(spec: StackSpec, kind: str) -> dict[str, Any]:
    d = spec.width
    if kind == "ffn":
        hidden = d * int(spec.ffn_mult or 1)
        up, down = weights(spec, d, hidden, feeds=True), weights(spec, hidden, d, output=True)
        return {"w_in": up, "w_out": down}
    if kind == "attention":
        square = weights(spec, d, d)
        key = Weights(square.scale, 0.0)  # no bias: softmax would not see it
        out = weights(spec, d, d, output=True)
        return {"w_in": square, "w_out": out, "w_query": square, "w_key": key}
    kernel = 9 if kind == "conv" else 1
    return {"w_in": weights(spec, d * kernel, d * kernel, feeds=True)}
