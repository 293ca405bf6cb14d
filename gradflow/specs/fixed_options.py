"""Parts that some units and schemes have in a form of their own, and options that would be idle.

An option that changes nothing is a mistake of whoever gives it, so it is refused; what the unit
has is written into the spec, so that one network has one key. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradflow.errors import UsageError
from gradflow.schemes import UNIT_KINDS, Wiring
from gradflow.specs.block_kinds import BlockKind
from gradflow.specs.fields import flag
from gradflow.specs.stack_fields import StackFields
from gradflow.specs.user_files import without_digest


def own_forms(unit: str, block: BlockKind) -> dict[str, Any]:
    """What a kind of unit has in the place of options that the block has."""
    forms = _fixed_options(unit)
    return {name: value for name, value in forms.items() if name in block.options}


def _fixed_options(unit: str) -> Mapping[str, Any]:
    """Return the fixed options of a kind of unit; none of an unknown kind, refused elsewhere."""
    return UNIT_KINDS[unit].fixed_options if unit in UNIT_KINDS else {}


def check_unit(spec: StackFields, wiring: Wiring) -> None:
    """Refuse options that this kind of unit has no place for.

    Raises:
        UsageError: such an option was given.
    """
    for name, value in _fixed_options(wiring.unit).items():
        given, same = getattr(spec, name), _same(spec, name)
        if given not in (None, value, same):
            remedy = f"use {_option(name, value if same is None else same)}"
            left_out = value is None and same is None
            raise UsageError(
                f"--scheme {without_digest(str(spec.scheme))} decides {flag(name)} itself",
                _option(name, given),
                f"leave out {flag(name)}" if left_out else remedy,
            )
    if wiring.unit in UNIT_KINDS and UNIT_KINDS[wiring.unit].carries_values:
        _check_values(spec)


def _same(spec: StackFields, name: str) -> int | None:
    """The number that means the same as leaving the option out."""
    heads = spec.head_count
    return {"kv_heads": heads, "head_dim": spec.width // heads}.get(name)


def _option(name: str, value: object) -> str:
    """As it is written on the command line."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {value:g}" if isinstance(value, float) else f"{flag(name)} {value}"


def check_no_norm_kind(scheme: str | None, norm_kind: str | None) -> None:
    """Refuse a kind of norm for a scheme that has no norms.

    Raises:
        UsageError: a kind of norm is given.
    """
    if norm_kind is not None and scheme is not None:
        rule = f"--scheme {without_digest(scheme)} has no norms"
        raise UsageError(rule, _option("norm_kind", norm_kind), "leave out --norm-kind")


def _check_values(spec: StackFields) -> None:
    """A state holds values beside the stream, so they have its width."""
    heads = spec.head_count
    if (spec.kv_heads or heads) * spec.head_size != spec.width:
        parts = {"heads": heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
        got = " ".join(_option(name, part) for name, part in parts.items() if part is not None)
        rule = f"--scheme {without_digest(str(spec.scheme))} hands on values as wide as the stream"
        remedy = f"use --kv-heads {heads} --head-dim {max(spec.width // heads, 1)}"
        raise UsageError(rule, f"--width {spec.width} {got}", remedy)
