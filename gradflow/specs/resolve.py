"""From the options of a stack that are given to all its fields. Imports no torch.

`resolve` is a chain of pure steps. Each step takes what is known so far, a `GivenStack`, and
returns the fields that it fills in; what is given goes before what a step would choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gradflow.errors import UsageError
from gradflow.schemes import Place, Scheme
from gradflow.specs.block_kinds import BLOCKS, DOMAINS, BlockKind
from gradflow.specs.checkpoints import Pretrained, locate_checkpoint
from gradflow.specs.fields import (
    Real,
    Whole,
    check_choice,
    check_names,
    check_values,
    flag,
    options_of,
)
from gradflow.specs.published_shapes import missing
from gradflow.specs.stack_fields import BLOCK_OPTIONS, DEFAULT_BLOCK, StackFields, kind_of
from gradflow.specs.stack_rules import check_no_norm_kind, own_forms
from gradflow.specs.user_files import is_user_name, loaded, without_digest
from gradflow.specs.user_schemes import check_scheme, scheme_named

# What a scheme may bring: its units it wires itself.
_BROUGHT = tuple(
    field.name
    for field, _ in options_of(StackFields)
    if field.name not in ("scheme", "block", "shortcut", "norm")
)
# What a spec has to tell of a user's code that is not loaded.
_TOLD = ("block", "shortcut", "init", "activation", "batch_size")


@dataclass(frozen=True)
class GivenStack:
    """The options of a stack by field; None: not given, and not filled in yet."""

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """The value of a field."""
        return self.values[name]

    def after(self, *steps: Callable[[GivenStack], dict[str, Any]]) -> GivenStack:
        """The options with the fields that these steps fill in, one step after the other."""
        given = self
        for step in steps:
            given = GivenStack({**given.values, **step(given)})
        return given

    def filled(self, defaults: Mapping[str, Any]) -> GivenStack:
        """The options with these defaults in the place of None."""
        return GivenStack({**self.values, **self.lacking(defaults)})

    def lacking(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults of the fields that are None."""
        return {name: value for name, value in defaults.items() if self[name] is None}

    @property
    def kind(self) -> BlockKind:
        """What is known of the block."""
        return kind_of(self.values)

    @property
    def is_stored_scheme(self) -> bool:
        """Whether the scheme is a user's whose file is not loaded."""
        return StackFields.is_stored(self["scheme"])

    @property
    def scheme_record(self) -> Scheme | None:
        """The scheme, where there is one that is known."""
        known = self["scheme"] is not None and not self.is_stored_scheme
        return scheme_named(self["scheme"]) if known else None

    @property
    def has_norms(self) -> bool:
        """Whether the units have norms, or queries and keys."""
        if self["qk_norm"]:
            return True
        if self.is_stored_scheme:
            return self["norm_kind"] is not None
        return self.scheme_record.normalises if self.scheme_record else self["norm"] != "none"


def resolve(given: GivenStack) -> dict[str, Any]:
    """Return every field of a stack, by name.

    A value that is given goes first; then come those of the checkpoint, of the published shape, of
    the scheme, of the block, and of the option itself. Options that the block does not have, and
    that are not given, stay None. A contradiction, or a broken rule, raises UsageError.
    """
    _check_stored(given)
    given = given.after(_by_weights, _by_shape, _by_scheme)
    named = {} if not is_user_name(given["block"]) else {"block": None}
    check_names(StackFields, {**given.values, **named})
    given = given.after(_by_option, _by_unit, _by_domain, _by_block)
    check_names(StackFields, {**given.values, **named})
    check_values(StackFields, given.values)
    # 2 and 2.0 are one network, so they have one key.
    reals = (f.name for f, about in options_of(StackFields) if isinstance(about.values, Real))
    return {**given.values, **{n: float(given[n]) for n in reals if given[n] is not None}}


def _check_stored(given: GivenStack) -> None:
    """Refuse the name of a user's code that is not loaded, where the values do not tell of it."""
    for name in filter(StackFields.is_stored, (given["scheme"], given["block"])):
        if any(given[field] is None for field in _TOLD):
            loaded(name)  # which says what to do


def _by_weights(given: GivenStack) -> dict[str, Any]:
    """The fields that a trained checkpoint decides; other values of them are refused."""
    weights = given["weights"]
    if weights is None:
        return {}
    weights = weights if isinstance(weights, Pretrained) else locate_checkpoint(weights)
    for name in ("like", "scheme", "init", "weight_var", "bias_var"):
        if given[name] is not None:
            remedy = f"leave out {flag(name)}"
            raise UsageError("--weights has values of its own", flag(name), remedy)
    own = {"block": DEFAULT_BLOCK, "shortcut": "residual"} | weights.fields
    for name, value in own.items():
        if given[name] not in (None, value):
            rule = f"--weights {weights} has {flag(name)} {value}"
            raise UsageError(rule, f"{flag(name)} {given[name]}", f"leave out {flag(name)}")
    return {"weights": weights, **own}


def _by_shape(given: GivenStack) -> dict[str, Any]:
    """The fields that a published shape brings; every shape is a transformer's.

    Options that the block does not have are left out, and a kind of norm where there is no norm.
    What a scheme that is given brings goes before the shape.
    """
    if given["like"] is None or given.is_stored_scheme:
        return {}
    shape = missing(given["like"], given.values)
    given = given.filled({"block": DEFAULT_BLOCK})
    if not is_user_name(given["block"]):
        check_choice("--block", given["block"], tuple(BLOCKS))
    brought = given.scheme_record.defaults if given.scheme_record else {}
    other = BLOCK_OPTIONS.keys() - {*given.kind.options}
    fitting = {n: v for n, v in shape.items() if n not in brought and n not in other}
    norm_kind = fitting.pop("norm_kind", None)
    filled = given.filled(fitting)
    return dict(filled.filled({"norm_kind": norm_kind} if filled.has_norms else {}).values)


def _by_scheme(given: GivenStack) -> dict[str, Any]:
    """The fields that a scheme decides, or their defaults where there is none."""
    if given["scheme"] is None:
        defaults = {"block": DEFAULT_BLOCK, "shortcut": "residual", "norm": "pre"}
        return given.lacking(defaults if given["weights"] else defaults | {"init": "he"})
    record = given.scheme_record
    if record is None:
        return {}
    _check_scheme_fits(given, record)
    own = {"block": record.blocks[0], "shortcut": _shortcut(record), "init": "he"}
    return given.lacking(own | dict(record.defaults))


def _shortcut(record: Scheme) -> str:
    return "plain" if record.plain else "residual"


def _check_scheme_fits(given: GivenStack, record: Scheme) -> None:
    """Refuse options that the scheme decides itself, and a block that it is not defined on."""
    if is_user_name(given["scheme"]):
        check_scheme(given["scheme"], _BROUGHT, BLOCKS)
    title = without_digest(given["scheme"])
    for name, value in {"norm": None, "shortcut": _shortcut(record)}.items():
        if given[name] not in (None, value):
            remedy = f"leave out {flag(name)}, or --scheme"
            rule = f"--scheme {title} wires its units itself"
            raise UsageError(rule, f"{flag(name)} {given[name]}", remedy)
    if is_user_name(given["block"]):
        domains = tuple(dict.fromkeys(BLOCKS[block].domain for block in record.blocks))
        what = f"the domain of a block for --scheme {title}"
        check_choice(what, given.kind.domain, domains)
    elif given["block"] is not None:
        check_choice(f"--block for --scheme {title}", given["block"], tuple(record.blocks))


def _by_option(given: GivenStack) -> dict[str, Any]:
    """The values that every stack has, whatever its block."""
    return given.lacking(
        {
            field.name: field.default if about.fill is None else about.fill
            for field, about in options_of(StackFields)
            if not about.of_block
        }
    )


def _by_unit(given: GivenStack) -> dict[str, Any]:
    """The activation of the block, and what the first unit has in the place of options."""
    fills: dict[str, Any] = {"activation": given.kind.activation}
    if given.scheme_record:
        Whole(1).check("depth", given["depth"])
        units = given.kind.units
        first = given.scheme_record.wire(Place(given["depth"], 1, 0, len(units), units[0]))
        fills |= own_forms(first.unit, given.kind)
    return given.lacking(fills)


def _by_domain(given: GivenStack) -> dict[str, Any]:
    """The kind of norm and the number of samples that are usual in the stream's domain."""
    domain = DOMAINS[given.kind.domain]
    fills = given.lacking({"batch_size": domain.batch_size})
    if given.has_norms:
        return fills | given.lacking({"norm_kind": domain.norm_kind})
    check_no_norm_kind(given["scheme"], given["norm_kind"])
    return fills | {"norm_kind": None}


def _by_block(given: GivenStack) -> dict[str, Any]:
    """The options of the block; an ffn whose hidden width is given needs no multiple."""
    options = {name: BLOCK_OPTIONS[name] for name in BLOCK_OPTIONS if name in given.kind.options}
    if given["ffn_width"]:
        options.pop("ffn_mult", None)
    return given.lacking(options)
