"""What the fields of a stack must hold to, one with another. Imports no torch."""

from __future__ import annotations

from gradflow.errors import UsageError
from gradflow.specs.block_kinds import BLOCKS, GROUPS, POINTWISE
from gradflow.specs.fields import flag
from gradflow.specs.fixed_options import check_unit
from gradflow.specs.stack_fields import BLOCK_OPTIONS, StackFields
from gradflow.specs.user_files import is_user_name
from gradflow.specs.user_schemes import check_wirings


def check_user_code(spec: StackFields) -> None:
    """Refuse a user's scheme or block, once loaded, that breaks the interface in any unit.

    Raises:
        UsageError: a wiring breaks a rule of the interface.
    """
    own = [name for name in (spec.scheme, spec.block) if is_user_name(name)]
    if not own or spec.scheme is None or any(map(spec.is_stored, own)):
        return
    check_wirings(spec.scheme, spec.block, spec.wirings(), spec.domain.norm_kinds)
    for _, wiring in spec.wirings():
        check_unit(spec, wiring)


def check_fit(spec: StackFields) -> None:
    """Refuse options that the block does not have, or that exclude one another.

    Raises:
        UsageError: the rule, with what was given.
    """
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
