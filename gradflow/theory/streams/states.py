"""What a spec's scheme hands from unit to unit, where it is more than one stream."""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.schemes.wiring import Wiring
from gradflow.specs.stack import StackSpec
from gradflow.theory.template import NoTheoryError, State

# Kinds of unit with a formula, and the readout that it holds for.
READOUT_OF = {
    "hyper-connections": "sum",
    "mhc": "mean",
    "attnres": "depth attention",
    "denseformer": "last",
    "b2t": None,
    "residual-dual": "dual",
    "siamesenorm": "siamese",
    "value-residual": "first",
}
# Those that are pre-ln but for the rows, and those that have a norm after the shortcut.
COPIES = ("hyper-connections", "mhc", "attnres", "denseformer")
POSTNORM = ("b2t", "residual-dual")
# One stream, but for its length, and but for the weights of its shortcuts.
SINGLE = ("ngpt", "admin")

# Places of norms that the units of a state have.
_PLACES = {
    **dict.fromkeys(COPIES, ("in", "branch", "mid", "query-key")),
    **dict.fromkeys(POSTNORM, ("in", "out", "mid", "query-key")),
    "siamesenorm": ("in", "mid", "query-key"),
    "value-residual": ("in", "query-key"),
    "ngpt": (),
    "admin": ("in", "branch", "out", "mid", "query-key"),
}


def state_of(spec: StackSpec, wirings: Sequence[Wiring]) -> State | None:
    """The state of a stack, or None where units hand on one stream of the template.

    Args:
        spec: of the stack.
        wirings: of all its units.

    Raises:
        NoTheoryError: several kinds of unit, a readout or a setting that no formula covers.
    """
    kinds = {wiring.unit for wiring in wirings}
    norm = str(spec.norm_kind or spec.domain.norm_kind)
    beyond = any({"value", "shared"} & set(wiring.norms) for wiring in wirings)
    if beyond and spec.kind.domain != "tokens":
        raise NoTheoryError("no formula for a norm of shortcut and branch alike, but of tokens")
    if not kinds & {*READOUT_OF, *SINGLE}:
        return State("template", 1, norm, spec.head_size) if beyond else None
    if len(kinds) > 1:
        raise NoTheoryError(f"no formula for units of {' and '.join(sorted(kinds))} in one stack")
    (kind,) = kinds
    if spec.readout != READOUT_OF.get(kind):
        raise NoTheoryError(f"no formula for units of {kind} with the readout {spec.readout}")
    for wiring in dict.fromkeys(map(_parts, wirings)):
        _check(kind, *wiring)
    copies = int(wirings[0].settings.get("streams", 1))
    return State(kind, copies, norm, spec.head_size, spec.units_per_block)


def _parts(wiring: Wiring) -> tuple[tuple[str, ...], tuple[float, float], float]:
    """Norms, scalars, and the share of the first values in those of value-residual."""
    return wiring.norms, (wiring.b, wiring.c), float(wiring.settings.get("weight", 0.5))


def _check(kind: str, norms: tuple[str, ...], scalars: tuple[float, float], weight: float) -> None:
    beyond = set(norms) - set(_PLACES[kind])
    if kind in POSTNORM and "out" not in norms:
        raise NoTheoryError(f"no formula for units of {kind} without the norm of their output")
    if beyond:
        raise NoTheoryError(f"no formula for a norm at {', '.join(sorted(beyond))} of {kind}")
    if kind not in (*COPIES, "admin") and scalars != (1.0, 1.0):
        raise NoTheoryError(f"no formula for scaled branches of {kind}")
    if weight != 0.5:
        raise NoTheoryError("no formula for values that are not averaged evenly")


def output_scale(state: State | None, units: int, width: int) -> float:
    """The output over that of the template with the same branches."""
    if state is None:
        return 1.0
    scales = {
        "attnres": 1 / (units + 1),
        "hyper-connections": state.copies,
        "ngpt": width**-0.5,
    }
    return scales.get(state.kind, 1.0)
