"""The fields of a stack, each an option of the command line, and what follows from them.

An option is added here. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gradflow.schemes import Place, Scheme, Wiring
from gradflow.specs.block_kinds import (
    ACTIVATIONS,
    BLOCKS,
    DOMAINS,
    NORM_KINDS,
    BlockKind,
    Domain,
    user_block_kind,
)
from gradflow.specs.checkpoints import Pretrained
from gradflow.specs.fields import Real, Stored, Switch, Whole, option, options_of
from gradflow.specs.published_shapes import SHAPES
from gradflow.specs.user_files import is_loaded, is_user_name, object_name
from gradflow.specs.user_schemes import scheme_named

DEFAULT_BLOCK = "transformer"
SHORTCUTS = ("residual", "plain")
NORMS = ("none", "pre", "post")
_BIASES = ("all", "qkv", "none")
INITS = ("he", "xavier", "lecun", "normal", "gpt2", "orthogonal", "torch")
LOSS_KINDS = ("cotangent", "mse", "ce")
DTYPES = ("float32", "float64", "bfloat16", "float16")

_block_option = partial(option, None, of_block=True)
_count_option = partial(_block_option, values=Whole(1))
_switch_option = partial(_block_option, values=Switch(), fill=False)


@dataclass(frozen=True, kw_only=True)
class StackFields(Stored):
    """The fields of one network with its input and loss, and how its units are made of them.

    The types are those of a resolved stack. A default of None is what was not given: `resolve`
    fills it in, unless the block does not have the option, or no value is needed.
    """

    like: str | None = option(None, "a published shape, for what is not given", tuple(SHAPES))
    weights: str | None = option(None, "folder of a trained checkpoint, for shape and values")
    depth: int = option(None, "number of blocks (layers) (12)", values=Whole(1), fill=12)
    scheme: str | None = option(
        None,
        "a published recipe: `gradflow schemes` lists them; or yours: my_scheme.py:SCHEME",
        from_file=True,
    )
    block: str = option(
        None,
        "what one layer is (transformer); yours: my_block.py:MyBranch; known",
        tuple(BLOCKS),
        from_file=True,
    )
    shortcut: str = option(None, "residual: y = x + f(x); plain: y = f(x) (residual)", SHORTCUTS)
    norm: str | None = option(None, "where a unit normalises (pre)", NORMS)
    norm_kind: str | None = option(
        None, "layernorm for tokens and vectors, batchnorm for images", NORM_KINDS
    )
    activation: str = option(None, "gelu for token blocks, relu for the others", ACTIVATIONS)
    init: str | None = option(None, "rule for the initial weights (he)", INITS)
    gain: float = option(
        1.0, "multiplies the standard deviation of every initial weight", values=Real()
    )
    weight_var: float | None = option(None, "variance of the weights times fan_in", values=Real())
    bias_var: float | None = option(
        None, "variance of the biases (0 by default)", values=Real(zero=True)
    )
    norm_eps: float = option(
        None, "what norms add to the mean square (1e-5)", values=Real(), fill=1e-5
    )
    width: int = option(
        None, "features, or channels, of the stream (128)", values=Whole(1), fill=128
    )
    heads: int | None = _count_option("attention heads (4)", fill=4)
    kv_heads: int | None = _count_option("heads of keys and values, shared in groups (as --heads)")
    head_dim: int | None = _count_option("features of a head (--width over --heads)")
    rope: float | None = _block_option(
        "base of rotary positions; 0: none (0)", values=Real(zero=True), fill=0.0
    )
    causal: bool | None = _switch_option("mask the future in attention")
    qk_norm: bool | None = _switch_option("normalise queries and keys, per head")
    ffn_mult: int | None = _count_option("hidden width of an ffn over the width (4)", fill=4)
    ffn_width: int | None = _count_option("hidden width of an ffn, in place of --ffn-mult")
    gated: bool | None = _switch_option("ffn with a gate: down(phi(gate x) * up x)")
    bias: str | None = _block_option(
        "linear maps of token blocks that have one (all)", _BIASES, fill="all"
    )
    seq_len: int | None = _count_option("tokens in a sample (32)", fill=32)
    image_size: int | None = _count_option("pixels on a side (16)", fill=16)
    batch_size: int = option(None, "samples (8; 64 for mlp)", values=Whole(1))
    loss: str = option(
        "cotangent", "what puts the gradient in at the output; of a model also own", LOSS_KINDS
    )
    classes: int = option(None, "classes of the ce head (10)", values=Whole(2), fill=10)
    dtype: str = option("float32", "number format of the whole pass", DTYPES)

    @staticmethod
    def is_stored(name: str | None) -> bool:
        """Whether a name is of a user's code that is not loaded; the fields then tell of it."""
        return is_user_name(name) and not is_loaded(str(name))

    @property
    def kind(self) -> BlockKind:
        """The entry of `BLOCKS`, or what a user's own block says of itself."""
        return kind_of(vars(self))

    @property
    def domain(self) -> Domain:
        """The entry of `DOMAINS` for this block's stream."""
        return DOMAINS[self.kind.domain]

    @property
    def has_shortcut(self) -> bool:
        """Whether units add their input to their output."""
        return self.shortcut == "residual"

    @property
    def units_per_block(self) -> int:
        """Number of units in one layer."""
        return len(self.kind.units)

    @property
    def checkpoint(self) -> Pretrained:
        """The folder that the weights are read from; `weights` must not be None."""
        assert isinstance(self.weights, Pretrained)
        return self.weights

    @property
    def tokens(self) -> int:
        """Tokens in a sample; 1 where samples are vectors or images."""
        return self.seq_len or 1

    @property
    def side(self) -> int:
        """Pixels on a side of a sample; 1 where samples are no images."""
        return self.image_size or 1

    @property
    def hidden(self) -> int:
        """Hidden width of an ffn branch."""
        return self.ffn_width or self.width * (self.ffn_mult or 1)

    @property
    def head_count(self) -> int:
        """Attention heads; 1 where the block has no attention."""
        return self.heads or 1

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.head_dim or self.width // self.head_count

    def has_bias(self, role: str) -> bool:
        """Whether a linear map of attention or an ffn has a bias, by its name in the branch.

        Keys have none unless rotated: softmax does not change when all logits of a row move
        together, so the gradient would be zero.
        """
        if self.bias == "qkv":
            return role in ("q", "k", "v")
        return self.bias != "none" and (role != "k" or bool(self.rope))

    @property
    def scheme_record(self) -> Scheme:
        """The record that `scheme` names; only where there is one, a user's once it is loaded."""
        return scheme_named(str(self.scheme))

    @property
    def normalises(self) -> bool:
        """Whether the stack's units have norms."""
        if self.is_stored(self.scheme):
            return self.norm_kind is not None
        return self.norm != "none" if self.scheme is None else self.scheme_record.normalises

    @property
    def has_final_norm(self) -> bool:
        """Whether a head normalises the stream first, as nets with norms in the branch need it."""
        return self.norm == "pre" if self.scheme is None else self.scheme_record.final_norm

    @property
    def readout(self) -> str | None:
        """How several streams become the output; None where there is one stream."""
        return None if self.scheme is None else self.scheme_record.readout

    @property
    def has_streams(self) -> bool:
        """Whether units hand on a state of several streams."""
        return self.streams(1, 0) > 1

    def place(self, layer: int, unit: int) -> Place:
        """Return the place of unit number `unit` (from 0) in layer `layer` (from 1)."""
        kinds = self.kind.units
        return Place(self.depth, layer, unit, len(kinds), kinds[unit])

    def wirings(self) -> Iterator[tuple[Place, Wiring]]:
        """Yield place and wiring of every unit, first to last."""
        for layer in range(1, self.depth + 1):
            for unit in range(self.units_per_block):
                yield self.place(layer, unit), self.wiring(layer, unit)

    def streams(self, layer: int, unit: int) -> int:
        """Return the number of streams in the output of a unit."""
        return 1 if self.scheme is None else self.scheme_record.streams(self.place(layer, unit))

    def wiring(self, layer: int, unit: int) -> Wiring:
        """Return the wiring of unit number `unit` (from 0) in layer `layer` (from 1)."""
        kinds = self.kind.units
        if self.scheme is not None:
            wiring = self.scheme_record.wire(self.place(layer, unit))
        else:
            places = {"none": (), "pre": ("in",), "post": ("out",)}[self.norm or "none"]
            wiring = Wiring(a=float(self.has_shortcut), norms=places)
        if self.qk_norm and kinds[unit] == "attention":
            wiring = replace(wiring, norms=(*wiring.norms, "query-key"))
        return wiring


# Options that belong to some blocks only, with the value used where they apply.
BLOCK_OPTIONS: dict[str, Any] = {
    field.name: about.fill for field, about in options_of(StackFields) if about.of_block
}


def block_kind(name: str) -> BlockKind:
    """Return the entry of `BLOCKS`, or what a user's own block says of itself once it is loaded."""
    return user_block_kind(name, BLOCK_OPTIONS) if is_user_name(name) else BLOCKS[name]


def kind_of(values: Mapping[str, Any]) -> BlockKind:
    """Return what is known of the block of a stack, from the values of its fields.

    Of a user's block that is not loaded the values tell all that was made of it: its options, and
    by its sizes the domain of its stream.
    """
    block = values["block"]
    if not StackFields.is_stored(block):
        return block_kind(block)
    options = tuple(name for name in BLOCK_OPTIONS if values[name] is not None)
    sized = (domain for domain, facts in DOMAINS.items() if {*facts.sizes} & {*options})
    unit = object_name(block)
    return BlockKind((unit,), next(sized, "vectors"), values["activation"], "", options)
