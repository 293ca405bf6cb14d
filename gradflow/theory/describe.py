"""The `Stack` of template units that theory sees in a `StackSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gradflow.schemes import UNIT_KINDS, Place, Wiring
from gradflow.schemes.wiring import OUTPUT_PROJECTIONS
from gradflow.specs.initial_variances import bias_variance, weight_moment
from gradflow.specs.stack import StackSpec
from gradflow.specs.user_files import is_user_name
from gradflow.theory.template import (
    NORM_EPS,
    Head,
    NoTheoryError,
    Stack,
    State,
    StreamShape,
    TemplateUnit,
    WeightMoments,
)
from gradflow.theory.unit_theory import UNIT_THEORY, UnitTheory

# An activation that theory takes for another, never further than 5e-4 apart.
ALIKE = {"gelu-tanh": "gelu"}

_NO_FORMULA = UnitTheory()
_LEAST_VALUES = 64  # features; seeds scatter by more than the band below it


def weights(
    spec: StackSpec, fan_in: int, fan_out: int, *, feeds: bool = False, output: bool = False
) -> WeightMoments:
    """Return the moments of a matrix and its bias; the arguments are those of `weight_moment`."""
    scale = weight_moment(spec, fan_in, fan_out, feeds=feeds, output=output)
    return WeightMoments(scale, bias_variance(spec, fan_in))


def describe_stack(spec: StackSpec) -> Stack:
    """Return the stack of template units that a specification builds at initialisation.

    Raises:
        NoTheoryError: a unit is wired, or made of parts, that no formula covers.
    """
    if spec.weights:
        raise NoTheoryError("no formula for trained weights")
    if spec.norm_eps > NORM_EPS and spec.normalises:
        raise NoTheoryError("no formula for another epsilon of the norms")
    scale = spec.scheme_record.input_scale(spec.depth) if spec.scheme else 1.0
    wired = _wired(spec)
    state = _state(spec, [wiring for _, wiring in wired])
    return Stack(_shape(spec), _units(spec, wired), scale**2, _head(spec, state), state)


def _theory(wiring: Wiring) -> UnitTheory:
    return UNIT_THEORY.get(wiring.unit, _NO_FORMULA)


def _state(spec: StackSpec, wirings: Sequence[Wiring]) -> State | None:
    """Return what the units hand on in place of one stream, or None for one stream."""
    theories = {wiring.unit: _theory(wiring) for wiring in wirings}
    norm = str(spec.norm_kind or spec.domain.norm_kind)
    beyond = any({"value", "shared"} & set(wiring.norms) for wiring in wirings)
    if beyond and spec.kind.domain != "tokens":
        raise NoTheoryError("no formula for a norm of shortcut and branch alike, but of tokens")
    if all(theory.norms is None for theory in theories.values()):
        return State("template", 1, norm, spec.head_size) if beyond else None
    if len(theories) > 1:
        kinds = " and ".join(sorted(theories))
        raise NoTheoryError(f"no formula for units of {kinds} in one stack")
    ((kind, theory),) = theories.items()
    if spec.readout != UNIT_KINDS[kind].readout:
        raise NoTheoryError(f"no formula for units of {kind} with the readout {spec.readout}")
    for settings in dict.fromkeys(map(_stream_settings, wirings)):
        _check_streams(kind, theory, settings)
    copies = int(wirings[0].settings.get("streams", 1))
    return State(kind, copies, norm, spec.head_size, spec.units_per_block)


class _StreamSettings(NamedTuple):
    """What decides whether theory covers a unit that hands on several streams."""

    norms: tuple[str, ...]
    scaled: bool
    first_values_share: float


def _stream_settings(wiring: Wiring) -> _StreamSettings:
    scaled = (wiring.b, wiring.c) != (1.0, 1.0)
    return _StreamSettings(wiring.norms, scaled, float(wiring.settings.get("weight", 0.5)))


def _check_streams(kind: str, theory: UnitTheory, settings: _StreamSettings) -> None:
    beyond = set(settings.norms) - set(theory.norms or ())
    if theory.needs_out_norm and "out" not in settings.norms:
        raise NoTheoryError(f"no formula for units of {kind} without the norm of their output")
    if beyond:
        raise NoTheoryError(f"no formula for a norm at {', '.join(sorted(beyond))} of {kind}")
    if settings.scaled and not theory.takes_scalars:
        raise NoTheoryError(f"no formula for scaled branches of {kind}")
    if settings.first_values_share != 0.5:
        raise NoTheoryError("no formula for values that are not averaged evenly")


def _check_parts(spec: StackSpec) -> None:
    """Refuse parts of attention and ffn that no formula here covers."""
    # Under a mask, rotations move the profile by less than its band (test_theory_measured.py).
    if spec.rope and not spec.causal:
        raise NoTheoryError("no formula for rotary positions without a causal mask")
    if spec.bias == "qkv":
        raise NoTheoryError("no formula for biases of queries, keys and values alone")


def _check_values(spec: StackSpec) -> None:
    """Refuse few value features in a wide stream: all tokens share how these are drawn."""
    values = (spec.kv_heads or spec.head_count) * spec.head_size
    if values < min(_LEAST_VALUES, spec.width):
        raise NoTheoryError(f"values of {values} features are too few: theory is of infinite width")


def _wired(spec: StackSpec) -> list[tuple[Place, Wiring]]:
    """Return every unit's place and wiring; of one layer where no scheme tells layers apart."""
    if spec.scheme is not None:
        return list(spec.wirings())
    units = range(spec.units_per_block)
    return [(spec.place(1, unit), spec.wiring(1, unit)) for unit in units]


def _units(spec: StackSpec, wired: Sequence[tuple[Place, Wiring]]) -> tuple[TemplateUnit, ...]:
    """Return the units; those of equal wiring are one object, so that deep stacks are quick."""
    units: list[TemplateUnit] = []
    last: list[tuple[Wiring, TemplateUnit] | None] = [None] * spec.units_per_block
    for place, wiring in wired:
        theory = _theory(wiring)
        # Settings change the branch of a highway alone.
        bare = wiring.settings and not theory.has_gate
        own = replace(wiring, settings={}) if bare else wiring
        before = last[place.unit]
        unit = before[1] if before and before[0] == own else _unit(spec, own, place.kind)
        last[place.unit] = own, unit
        units.append(theory.restate(unit, place, wiring) if theory.restate else unit)
    return tuple(units) * (1 if spec.scheme else spec.depth)


def _head(spec: StackSpec, state: State | None) -> Head | None:
    if spec.loss != "ce":
        return None
    norm = str(spec.norm_kind or spec.domain.norm_kind) if spec.has_final_norm else None
    count, read = spec.depth * spec.units_per_block, 1.0
    if state is not None:
        read = UNIT_THEORY[state.kind].output_scale(state, count, spec.width)
    return Head(spec.classes, weights(spec, spec.width, spec.classes), norm, read)


def _shape(spec: StackSpec) -> StreamShape:
    return StreamShape(
        domain=spec.kind.domain,
        width=spec.width,
        batch=spec.batch_size,
        tokens=spec.tokens,
        side=spec.side,
        hidden=spec.hidden,
        heads=spec.head_count,
        causal=bool(spec.causal),
    )


def _unit(spec: StackSpec, wiring: Wiring, kind: str) -> TemplateUnit:
    is_silent = _is_silent(wiring, kind)
    places = ("in", "mid") if kind == "resnet" and "in" in wiring.norms else wiring.norms
    if not is_silent:
        _check_wiring(spec, wiring, kind)
        _check_parts(spec)
    norms: dict[str, Any] = {
        f"norm_{place}": wiring.kinds.get("in" if kind == "resnet" else place, str(spec.norm_kind))
        for place in _TEMPLATE_NORMS
        if place in places
    }
    if is_silent:
        return TemplateUnit(
            kind="ffn", w_out=WeightMoments(0.0), a=wiring.a, norm_out=norms.get("norm_out")
        )
    return TemplateUnit(
        kind=kind,
        activation=ALIKE.get(spec.activation, spec.activation),
        a=wiring.a,
        b=wiring.b,
        c=wiring.c,
        qk_norm="query-key" in wiring.norms,
        # The power 1/2 gives logits the variance of q times that of k.
        logits=spec.head_size ** (1 - 2 * wiring.logit_power) if kind == "attention" else 1.0,
        alpha=wiring.alpha,
        gate_bias=float(wiring.settings.get("gate_bias", 0.0)),
        **norms,
        **_matrices(spec, wiring, kind),
    )


def _is_silent(wiring: Wiring, kind: str) -> bool:
    """Tell whether the branch gives 0 at initialisation, so that the shortcut alone is left."""
    if not _theory(wiring).is_template:
        return False
    own = not UNIT_KINDS[wiring.unit].has_biases
    last = wiring.gains.get(OUTPUT_PROJECTIONS.get(kind, ""), 1.0) if own else 1.0
    beyond = "shared" in wiring.norms or (kind == "resnet" and "out" in wiring.norms)
    return wiring.b * last == 0 and not beyond


# Places of `wiring.NORM_PLACES` that the template has, as `norm_in` and so on.
_TEMPLATE_NORMS = ("in", "branch", "out", "mid", "value", "shared")
_BIASED = ("attention", "ffn")  # kinds of branch whose biases are an option


def _check_wiring(spec: StackSpec, wiring: Wiring, kind: str) -> None:
    if is_user_name(spec.block):
        raise NoTheoryError("no formula for a branch of your own")
    theory = _theory(wiring)
    if theory.reason:
        raise NoTheoryError(theory.reason)
    if kind == "resnet" and "out" in wiring.norms:
        raise NoTheoryError("phi after the addition: what the stream and a branch share adds up")
    if kind == "resnet" and (set(wiring.norms) - {"in"} or (wiring.norms and wiring.c != 1)):
        raise NoTheoryError("a resnet block places its norms itself: no formula but for pre-norm")
    if theory is _NO_FORMULA:
        raise NoTheoryError(f"{spec.scheme} wires its units beyond the template")
    beyond = set(wiring.norms) - {*_TEMPLATE_NORMS, "query-key"}
    if beyond:
        raise NoTheoryError(f"no formula for a norm at {', '.join(sorted(beyond))}")


def _matrices(spec: StackSpec, wiring: Wiring, kind: str) -> dict[str, Any]:
    d = spec.width

    def scaled(role: str, fan_in: int, fan_out: int, **what: bool) -> WeightMoments:
        made = weights(spec, fan_in, fan_out, **what)
        # `networks.blocks.ResNet` has no biases before its norms.
        bare = not UNIT_KINDS[wiring.unit].has_biases or (kind == "resnet" and wiring.norms)
        biased = not bare and (kind not in _BIASED or spec.has_bias(role))
        bias = made.bias if biased else 0.0
        return replace(made, scale=made.scale * wiring.gains.get(role, 1.0) ** 2, bias=bias)

    if kind == "ffn":
        hidden = spec.hidden
        gated = bool(spec.gated)
        return {
            "w_in": scaled("up", d, hidden, feeds=not gated),
            "w_gate": scaled("gate", d, hidden, feeds=True) if gated else None,
            "w_out": scaled("down", hidden, d, output=True),
        }
    if kind == "attention":
        _check_values(spec)
        heads = spec.head_count
        queries, keys = (n * spec.head_size for n in (heads, spec.kv_heads or heads))
        return {
            "w_in": scaled("v", d, keys),
            "w_out": scaled("out", queries, d, output=True),
            "w_query": scaled("q", d, queries),
            "w_key": scaled("k", d, keys),
        }
    if kind == "resnet":
        return {
            "w_in": scaled("conv1", 9 * d, 9 * d, feeds=True),
            "w_out": scaled("conv2", 9 * d, 9 * d, feeds=True, output=True),
        }
    kernel, role = (9, "conv") if kind == "conv" else (1, "linear")
    made = {"w_in": scaled(role, d * kernel, d * kernel, feeds=True)}
    if not _theory(wiring).has_gate:
        return made
    return made | {"w_transform": weights(spec, d * kernel, d * kernel)}
