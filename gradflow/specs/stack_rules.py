"""What the fields of a stack must hold to, with one another and with its units. Imports no torch.

An option that changes nothing is a mistake of whoever gives it, so it is refused. What a unit has
in a form of its own is written into the spec, so that one network has one key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradflow.errors import UsageError
from gradflow.schemes import UNIT_KINDS, Wiring
from gradflow.specs.block_kinds import BLOCKS, GROUPS, POINTWISE, BlockKind
from gradflow.specs.fields import flag
from gradflow.specs.stack_fields import BLOCK_OPTIONS, StackFields
from gradflow.specs.user_files import is_user_name, without_digest
from gradflow.specs.user_schemes import check_wirings


def check_user_code(spec: StackFields) -> None:
    """Raise a UsageError where a user's scheme or block, once loaded, breaks the interface."""
    own = [name for name in (spec.scheme, spec.block) if is_user_name(name)]
    if not own or spec.scheme is None or any(map(spec.is_stored, own)):
        return
    check_wirings(spec.scheme, spec.block, spec.wirings(), spec.domain.norm_kinds)
    for _, wiring in spec.wirings():
        check_unit(spec, wiring)


def check_fit(spec: StackFields) -> None:
    """Raise a UsageError for options that the block does not have, or that exclude one another."""
    for name in BLOCK_OPTIONS:
        if getattr(spec, name) is not None and name not in spec.kind.options:
            blocks = ", ".join(b for b, kind in BLOCKS.items() if name in kind.options)
            rule = f"{flag(name)} applies to {blocks}"
            raise UsageError(rule, f"--block {spec.block}", f"leave out {flag(name)}")
    if spec.heads is not None:
        _check_heads(spec, spec.heads)
    if spec.ffn_mult is not None and spec.ffn_width is not None:
        got = f"--ffn-mult {spec.ffn_mult} --ffn-width {spec.ffn_width}"
        raise UsageError("an ffn has one hidden width", got, "leave out one of the two")
    if spec.weights and spec.gain != 1:
        raise UsageError("--weights has values of its own", f"--gain {spec.gain}", "leave it out")
    most = spec.checkpoint.most_tokens if spec.weights else None
    if most is not None and spec.tokens > most:
        rule = f"--weights {spec.weights} has positions for {most} tokens"
        raise UsageError(rule, f"--seq-len {spec.seq_len}", f"use --seq-len {most} or less")
    if spec.norm_kind is not None:
        _check_norm_kind(spec)


def _check_heads(spec: StackFields, heads: int) -> None:
    if spec.head_dim is None:
        _check_divides("heads", heads, "width", spec.width)
    if spec.kv_heads is not None:
        _check_divides("kv_heads", spec.kv_heads, "heads", heads)
    if spec.rope and spec.head_size % 2:
        rule = "--rope rotates pairs of features, so a head has an even number"
        raise UsageError(rule, spec.head_size, "use an even --head-dim, or --rope 0")


def _check_divides(name: str, part: int, of: str, whole: int) -> None:
    """Refuse a number of parts that does not divide the whole, and name the nearest that does."""
    if whole % part:
        got = f"{flag(of)} {whole} {flag(name)} {part}"
        near = next(n for n in range(min(part, whole), 0, -1) if whole % n == 0)
        raise UsageError(
            f"{flag(name)} divides {flag(of)}", got, f"use for example {flag(name)} {near}"
        )


def _check_norm_kind(spec: StackFields) -> None:
    if spec.norm_kind not in spec.domain.norm_kinds:
        rule = f"--norm-kind {spec.norm_kind} is not defined on {spec.kind.domain}"
        remedy = f"use {', '.join(spec.domain.norm_kinds)}"
        raise UsageError(rule, f"--block {spec.block}", remedy)
    if spec.norm_kind == "groupnorm" and spec.width % GROUPS:
        rule = f"groupnorm's {GROUPS} groups divide --width"
        raise UsageError(rule, spec.width, f"use a multiple of {GROUPS}")
    if spec.norm_kind == "batchnorm" and spec.causal:
        rule = "batchnorm mixes the tokens that a causal mask keeps apart"
        raise UsageError(rule, "--causal --norm-kind batchnorm", "use --norm-kind layernorm")
    if spec.norm_kind not in POINTWISE and _values_per_statistic(spec) < 2:
        rule = f"{spec.norm_kind} takes its statistics from two values or more"
        raise UsageError(rule, "one", "raise --width, --batch-size, --seq-len or --image-size")


def _values_per_statistic(spec: StackFields) -> int:
    """Return how many numbers each mean square of the norm is taken over."""
    places = spec.tokens * spec.side**2
    if spec.norm_kind == "batchnorm":
        return spec.batch_size * places
    pixels = places if spec.kind.domain == "images" else 1
    return spec.width * pixels // (GROUPS if spec.norm_kind == "groupnorm" else 1)


def own_forms(unit: str, block: BlockKind) -> dict[str, Any]:
    """Return what a kind of unit has in the place of options that the block has."""
    forms = _fixed_options(unit)
    return {name: value for name, value in forms.items() if name in block.options}


def _fixed_options(unit: str) -> Mapping[str, Any]:
    """Return the fixed options of a kind of unit; none of an unknown kind, refused elsewhere."""
    return UNIT_KINDS[unit].fixed_options if unit in UNIT_KINDS else {}


def check_unit(spec: StackFields, wiring: Wiring) -> None:
    """Raise a UsageError for an option that this kind of unit has no place for."""
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
    """Return the number that means the same as leaving the option out."""
    heads = spec.head_count
    return {"kv_heads": heads, "head_dim": spec.width // heads}.get(name)


def _option(name: str, value: object) -> str:
    """Return an option as it is written on the command line."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {value:g}" if isinstance(value, float) else f"{flag(name)} {value}"


def check_no_norm_kind(scheme: str | None, norm_kind: str | None) -> None:
    """Raise a UsageError for a kind of norm beside a scheme that has no norms."""
    if norm_kind is not None and scheme is not None:
        rule = f"--scheme {without_digest(scheme)} has no norms"
        raise UsageError(rule, _option("norm_kind", norm_kind), "leave out --norm-kind")


def _check_values(spec: StackFields) -> None:
    """Refuse values of another width than the stream: a state holds them beside it."""
    heads = spec.head_count
    if (spec.kv_heads or heads) * spec.head_size != spec.width:
        parts = {"heads": heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
        got = " ".join(_option(name, part) for name, part in parts.items() if part is not None)
        rule = f"--scheme {without_digest(str(spec.scheme))} hands on values as wide as the stream"
        remedy = f"use --kv-heads {heads} --head-dim {max(spec.width // heads, 1)}"
        raise UsageError(rule, f"--width {spec.width} {got}", remedy)
