"""What is measured (`StackSpec`) and how (`RunOptions`): frozen, validated, JSON both ways.

The command-line options are made from these fields, so adding an option touches this file only.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from gradflow.errors import UsageError
from gradflow.schemes import Scheme, find
from gradflow.wiring import Place, Wiring


@dataclass(frozen=True)
class BlockKind:
    """What the rest of the tool must know of a block before torch is imported.

    `units` are the branches in order; `domain` is the shape of the stream; `options` are those
    that mean something for this block only.
    """

    units: tuple[str, ...]
    domain: str
    activation: str
    meaning: str
    options: tuple[str, ...] = ()


BLOCKS: dict[str, BlockKind] = {
    "mlp": BlockKind(("mlp",), "vectors", "relu", "phi(Wx + b)"),
    "conv": BlockKind(("conv",), "images", "relu", "phi(conv3x3(x))", ("image_size",)),
    "resnet": BlockKind(
        ("resnet",), "images", "relu", "two 3x3 convolutions (basic block)", ("image_size",)
    ),
    "attention": BlockKind(
        ("attention",),
        "tokens",
        "gelu",
        "multi-head self-attention",
        ("heads", "causal", "qk_norm", "seq_len"),
    ),
    "ffn": BlockKind(
        ("ffn",), "tokens", "gelu", "Linear, activation, Linear", ("ffn_mult", "seq_len")
    ),
    "transformer": BlockKind(
        ("attention", "ffn"),
        "tokens",
        "gelu",
        "an attention unit, then an ffn unit",
        ("heads", "causal", "qk_norm", "ffn_mult", "seq_len"),
    ),
}


# f(alpha x) in the place of a norm: no statistics.
POINTWISE = ("dyt", "derf")


@dataclass(frozen=True)
class Domain:
    """Defaults of one shape of the stream, and the norm kinds that are defined on it."""

    norm_kind: str
    batch_size: int
    norm_kinds: tuple[str, ...]


DOMAINS: dict[str, Domain] = {
    "vectors": Domain(
        "layernorm", 64, ("layernorm", "rmsnorm", "batchnorm", "groupnorm", *POINTWISE)
    ),
    "tokens": Domain("layernorm", 8, ("layernorm", "rmsnorm", "batchnorm", *POINTWISE)),
    "images": Domain("batchnorm", 8, ("batchnorm", "layernorm", "groupnorm", *POINTWISE)),
}

# Options that belong to some blocks only, with the value used where they apply.
BLOCK_OPTIONS: dict[str, Any] = {
    "heads": 4,
    "causal": False,
    "qk_norm": False,
    "ffn_mult": 4,
    "seq_len": 32,
    "image_size": 16,
}

DEFAULT_BLOCK = "transformer"
SHORTCUTS = ("residual", "plain")
NORMS = ("none", "pre", "post")
NORM_KINDS = ("layernorm", "rmsnorm", "batchnorm", "groupnorm", *POINTWISE)
ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "erf", "linear")
INITS = ("he", "xavier", "lecun", "normal", "gpt2", "orthogonal", "torch")
LOSSES = ("cotangent", "mse", "ce")
DTYPES = ("float32", "float64", "bfloat16", "float16")

# Torch's own number of groups would not divide narrow widths; 8 is GroupNorm's usual small choice.
GROUPS = 8


def option(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line option, with its help text."""
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """One network with its input and loss: everything that decides the gradients but the seed.

    Options left at None take the default of the block (`BLOCKS`, `DOMAINS`, `BLOCK_OPTIONS`);
    options that a block does not have stay None.

    Raises:
        UsageError: a value breaks a rule; the message says which and what to do.
    """

    depth: int = option(12, "number of blocks (layers)")
    scheme: str | None = option(None, "a published recipe: `gradflow schemes` lists them")
    block: str | None = option(None, "what one layer is (transformer)", tuple(BLOCKS))
    shortcut: str | None = option(
        None, "residual: y = x + f(x); plain: y = f(x) (residual)", SHORTCUTS
    )
    norm: str | None = option(None, "where a unit normalises (pre)", NORMS)
    norm_kind: str | None = option(
        None, "layernorm for tokens and vectors, batchnorm for images", NORM_KINDS
    )
    activation: str | None = option(None, "gelu for token blocks, relu for the others", ACTIVATIONS)
    init: str | None = option(None, "rule for the initial weights (he)", INITS)
    gain: float = option(1.0, "multiplies the standard deviation of every initial weight")
    weight_var: float | None = option(None, "variance of the weights times fan_in")
    bias_var: float | None = option(None, "variance of the biases (0 by default)")
    width: int = option(128, "features, or channels, of the stream")
    heads: int | None = option(None, "attention heads (4)")
    causal: bool | None = option(None, "mask the future in attention")
    qk_norm: bool | None = option(None, "normalise queries and keys, per head")
    ffn_mult: int | None = option(None, "hidden width of an ffn over the width (4)")
    seq_len: int | None = option(None, "tokens in a sample (32)")
    image_size: int | None = option(None, "pixels on a side (16)")
    batch_size: int | None = option(None, "samples (8; 64 for mlp)")
    loss: str = option("cotangent", "what puts the gradient in at the output", LOSSES)
    classes: int = option(10, "classes of the ce head")
    dtype: str = option("float32", "number format of the whole pass", DTYPES)

    def __post_init__(self) -> None:
        self._resolve_design()
        for name in ("block", "shortcut", "norm", "norm_kind", "init", "loss", "dtype"):
            _check_name(self, name)
        self._resolve_details()
        _check_name(self, "activation")
        _check_numbers(self)
        # 2 and 2.0 are one network, so they have one key.
        for name in ("gain", "weight_var", "bias_var"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        _check_fit(self)

    def _resolve_details(self) -> None:
        """The defaults that depend on the block and its norms."""
        self._resolve("activation", self.kind.activation)
        if self.normalises:
            self._resolve("norm_kind", self.domain.norm_kind)
        else:
            object.__setattr__(self, "norm_kind", None)
        self._resolve("batch_size", self.domain.batch_size)
        for name, default in BLOCK_OPTIONS.items():
            if name in self.kind.options:
                self._resolve(name, default)

    def _resolve_design(self) -> None:
        """The fields that a scheme decides, or their defaults where there is none."""
        if self.scheme is None:
            defaults = {"block": DEFAULT_BLOCK, "shortcut": "residual", "norm": "pre", "init": "he"}
        else:
            _check_scheme(self, self.recipe)
            shortcut = "plain" if self.recipe.plain else "residual"
            own = {"block": self.recipe.blocks[0], "shortcut": shortcut, "init": "he"}
            defaults = own | dict(self.recipe.defaults)
        for name, value in defaults.items():
            self._resolve(name, value)

    def _resolve(self, name: str, default: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    @property
    def kind(self) -> BlockKind:
        """The entry of `BLOCKS`."""
        return BLOCKS[str(self.block)]

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
        """Steps of the stream in one layer."""
        return len(self.kind.units)

    @property
    def recipe(self) -> Scheme:
        """The scheme; only where `scheme` is not None."""
        return find(str(self.scheme))

    @property
    def normalises(self) -> bool:
        """Whether its units have norms."""
        return self.norm != "none" if self.scheme is None else self.recipe.normalises

    @property
    def has_final_norm(self) -> bool:
        """Whether a head normalises the stream first, as nets with norms in the branch need it."""
        return self.norm == "pre" if self.scheme is None else self.recipe.final_norm

    @property
    def readout(self) -> str | None:
        """How several streams become the output; None: there is one."""
        return None if self.scheme is None else self.recipe.readout

    @property
    def has_streams(self) -> bool:
        """Whether units hand on a state of several streams."""
        return self.streams(1, 0) > 1

    def place(self, layer: int, unit: int) -> Place:
        """Where unit number `unit` (from 0) of layer `layer` (from 1) stands."""
        kinds = self.kind.units
        return Place(self.depth, layer, unit, len(kinds), kinds[unit])

    def streams(self, layer: int, unit: int) -> int:
        """Streams in the output of that unit."""
        return 1 if self.scheme is None else self.recipe.streams(self.place(layer, unit))

    def wiring(self, layer: int, unit: int) -> Wiring:
        """How unit number `unit` (from 0) of layer `layer` (from 1) is wired."""
        kinds = self.kind.units
        if self.scheme is not None:
            wiring = self.recipe.wire(self.place(layer, unit))
        else:
            places = {"none": (), "pre": ("in",), "post": ("out",)}[str(self.norm)]
            wiring = Wiring(a=float(self.has_shortcut), norms=places)
        if self.qk_norm and kinds[unit] == "attention":
            wiring = replace(wiring, norms=(*wiring.norms, "query-key"))
        return wiring

    @property
    def title(self) -> str:
        """The stack in a few words, for headings and folder names."""
        if self.scheme is not None:
            kind = f"{self.norm_kind}, " if self.norm_kind else ""
            return f"{self.scheme} {self.block}, {kind}depth {self.depth}"
        norm = "no norm" if self.norm == "none" else f"{self.norm}-{self.norm_kind}"
        return f"{self.shortcut} {self.block}, {norm}, depth {self.depth}"

    @property
    def slug(self) -> str:
        """The stack as a part of a folder name."""
        design = self.scheme or f"{self.shortcut}-{self.norm}"
        return f"{self.block}-{design}-d{self.depth}"

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StackSpec:
        """The spec that `to_json` wrote.

        Raises:
            UsageError: an unknown field, or a value that breaks a rule.
        """
        return cls(**_known_fields(cls, values))


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a spec is measured.

    Raises:
        UsageError: a value breaks a rule.
    """

    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    seed: int = option(0, "first seed")
    seeds: int = option(1, "number of seeds, counted up from the first")
    timing: bool = option(True, "measure forward and backward time per unit")
    repeats: int = option(5, "timed repeats at least")
    time_budget: float = option(1.0, "timed passes go on for at least so many seconds")
    raw_range: bool = option(
        False, "do not rescale the gradient: show where the number format itself dies"
    )
    vanishing: float = option(3.0, "decades of shrinking that count as vanishing")
    exploding: float = option(3.0, "decades of growth that count as exploding")

    def __post_init__(self) -> None:
        at_least(self, "seed", 0)
        at_least(self, "seeds", 1)
        at_least(self, "repeats", 1)
        for name in ("time_budget", "vanishing", "exploding"):
            positive(self, name)

    @property
    def all_seeds(self) -> range:
        """Every seed that is measured."""
        return range(self.seed, self.seed + self.seeds)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunOptions:
        """The options that `to_json` wrote.

        Raises:
            UsageError: an unknown field, or a value that breaks a rule.
        """
        return cls(**_known_fields(cls, values))


def run_key(spec: StackSpec, options: RunOptions) -> str:
    """Eight hexadecimal digits that name the numbers a run will hold, timings aside."""
    numbers = {"seed": options.seed, "seeds": options.seeds, "raw_range": options.raw_range}
    text = json.dumps({"spec": spec.to_json(), **numbers}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def check_choice(what: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a name that is not among the known ones, and list those.

    Raises:
        UsageError: the name is unknown.
    """
    if value not in known:
        raise UsageError(f"{what} is one of the known names", value, f"use {', '.join(known)}")


def at_least(values: Any, name: str, least: int) -> None:
    """Refuse a field that is no whole number from `least` up.

    Raises:
        UsageError: the value is smaller, or no whole number.
    """
    value = getattr(values, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        rule = f"{flag(name)} is a whole number of at least {least}"
        raise UsageError(rule, value, f"use {flag(name)} {max(least, 1)} or more")


def positive(values: Any, name: str, *, zero: bool = False) -> None:
    """Refuse a field that is no finite number above (or at) 0.

    Raises:
        UsageError: the value is negative, not finite, or no number.
    """
    value = getattr(values, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        rule = f"{flag(name)} is a finite number {'of at least' if zero else 'above'} 0"
        raise UsageError(rule, value, f"use for example {flag(name)} 1.0")


def _known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = tuple(f.name for f in fields(cls))
    for name in values:
        check_choice(f"a field of {cls.__name__}", name, known)
    return dict(values)


def _check_name(spec: StackSpec, name: str) -> None:
    choices = StackSpec.__dataclass_fields__[name].metadata["choices"]
    if getattr(spec, name) is not None:
        check_choice(flag(name), getattr(spec, name), choices)


def _check_scheme(spec: StackSpec, recipe: Scheme) -> None:
    """A scheme decides where units add and normalise; a block that it is not defined on fails."""
    own = {"norm": None, "shortcut": "plain" if recipe.plain else "residual"}
    for name, value in own.items():
        given = getattr(spec, name)
        if given not in (None, value):
            rule = f"--scheme {spec.scheme} wires its units itself"
            raise UsageError(rule, f"{flag(name)} {given}", f"leave out {flag(name)}, or --scheme")
    if spec.block is not None:
        check_choice(f"--block for --scheme {spec.scheme}", spec.block, recipe.blocks)


def _check_numbers(spec: StackSpec) -> None:
    for name in ("depth", "width", "batch_size"):
        at_least(spec, name, 1)
    at_least(spec, "classes", 2)
    positive(spec, "gain")
    for name in ("heads", "ffn_mult", "seq_len", "image_size"):
        if getattr(spec, name) is not None:
            at_least(spec, name, 1)
    for name in ("causal", "qk_norm"):
        given = getattr(spec, name)
        if given is not None and not isinstance(given, bool):
            remedy = f"use {flag(name)} or {flag('no_' + name)}"
            raise UsageError(f"{flag(name)} is true or false", given, remedy)
    if spec.weight_var is not None:
        positive(spec, "weight_var")
    if spec.bias_var is not None:
        positive(spec, "bias_var", zero=True)


def _check_fit(spec: StackSpec) -> None:
    for name in BLOCK_OPTIONS:
        if getattr(spec, name) is not None and name not in spec.kind.options:
            blocks = ", ".join(b for b, kind in BLOCKS.items() if name in kind.options)
            rule = f"{flag(name)} applies to {blocks}"
            raise UsageError(rule, f"--block {spec.block}", f"leave out {flag(name)}")
    if spec.heads is not None and spec.width % spec.heads:
        got = f"--width {spec.width} --heads {spec.heads}"
        fewer = range(min(spec.heads, spec.width), 0, -1)
        near = next(heads for heads in fewer if spec.width % heads == 0)
        raise UsageError("--heads divides --width", got, f"use for example --heads {near}")
    if spec.norm_kind is not None:
        _check_norm_kind(spec)


def _check_norm_kind(spec: StackSpec) -> None:
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


def _values_per_statistic(spec: StackSpec) -> int:
    """How many numbers each mean square of the norm is taken over."""
    places = int(spec.seq_len or 1) * int(spec.image_size or 1) ** 2
    if spec.norm_kind == "batchnorm":
        return int(spec.batch_size or 1) * places
    pixels = places if spec.kind.domain == "images" else 1
    return spec.width * pixels // (GROUPS if spec.norm_kind == "groupnorm" else 1)
