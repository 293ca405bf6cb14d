"""What is measured (`StackSpec`) and how (`RunOptions`): frozen, validated, JSON both ways.

The command-line options are made from these fields, so adding an option touches this file only.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from gradflow import user_code
from gradflow.errors import UsageError
from gradflow.pretrained import Pretrained, locate
from gradflow.schemes import Scheme
from gradflow.shapes import SHAPES, changed, missing
from gradflow.units import size_in_bytes
from gradflow.user_blocks import declared, declared_options
from gradflow.user_schemes import check_scheme, check_wirings, scheme_named
from gradflow.wiring import Place, Wiring


class Storable(Protocol):
    """What a key can be made of."""

    def identity(self) -> dict[str, Any]:
        """Plain values that decide the numbers, with the options."""
        ...


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


ATTENTION_OPTIONS = ("heads", "kv_heads", "head_dim", "rope", "causal", "qk_norm")
FFN_OPTIONS = ("ffn_mult", "ffn_width", "gated")

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
        (*ATTENTION_OPTIONS, "bias", "seq_len"),
    ),
    "ffn": BlockKind(
        ("ffn",),
        "tokens",
        "gelu",
        "Linear, activation, Linear",
        (*FFN_OPTIONS, "bias", "seq_len"),
    ),
    "transformer": BlockKind(
        ("attention", "ffn"),
        "tokens",
        "gelu",
        "an attention unit, then an ffn unit",
        (*ATTENTION_OPTIONS, *FFN_OPTIONS, "bias", "seq_len"),
    ),
}


def block_kind(name: str) -> BlockKind:
    """The entry of `BLOCKS`, or what a user's own block says of itself (`user_blocks`).

    Raises:
        UsageError: the file of a user's block was not loaded, or an attribute breaks the interface.
    """
    if not user_code.is_user_name(name):
        return BLOCKS[name]
    # Queries and keys are inside a branch: only its own code could normalise them.
    known = [option for option in BLOCK_OPTIONS if option != "qk_norm"]
    domain = declared(name, "domain", "tokens", DOMAINS)
    usual = "gelu" if domain == "tokens" else "relu"
    activation = declared(name, "activation", usual, ACTIVATIONS)
    options = (*declared_options(name, known), *DOMAINS[domain].sizes)
    unit = user_code.thing(name)
    return BlockKind((unit,), domain, activation, "a branch of your own", options)


# f(alpha x) in the place of a norm: no statistics.
POINTWISE = ("dyt", "derf")


@dataclass(frozen=True)
class Domain:
    """Defaults of one shape of the stream, the norm kinds defined on it, and its own sizes."""

    norm_kind: str
    batch_size: int
    norm_kinds: tuple[str, ...]
    sizes: tuple[str, ...] = ()


DOMAINS: dict[str, Domain] = {
    "vectors": Domain(
        "layernorm", 64, ("layernorm", "rmsnorm", "batchnorm", "groupnorm", *POINTWISE)
    ),
    "tokens": Domain(
        "layernorm", 8, ("layernorm", "rmsnorm", "batchnorm", *POINTWISE), ("seq_len",)
    ),
    "images": Domain(
        "batchnorm", 8, ("batchnorm", "layernorm", "groupnorm", *POINTWISE), ("image_size",)
    ),
}

# Options that belong to some blocks only, with the value used where they apply.
BLOCK_OPTIONS: dict[str, Any] = {
    "heads": 4,
    "kv_heads": None,
    "head_dim": None,
    "rope": 0.0,
    "causal": False,
    "qk_norm": False,
    "ffn_width": None,
    "ffn_mult": 4,
    "gated": False,
    "bias": "all",
    "seq_len": 32,
    "image_size": 16,
}

# Options of every block that a published shape fills in.
SIZES: dict[str, Any] = {"depth": 12, "width": 128, "classes": 10, "norm_eps": 1e-5}

DEFAULT_BLOCK = "transformer"
SHORTCUTS = ("residual", "plain")
NORMS = ("none", "pre", "post")
NORM_KINDS = ("layernorm", "rmsnorm", "batchnorm", "groupnorm", *POINTWISE)
ACTIVATIONS = ("relu", "gelu", "gelu-tanh", "tanh", "silu", "erf", "linear")
BIASES = ("all", "qkv", "none")
INITS = ("he", "xavier", "lecun", "normal", "gpt2", "orthogonal", "torch")
LOSSES = ("cotangent", "mse", "ce")
KEEPS = ("auto", "graph", "boundaries", "sqrt")
DTYPES = ("float32", "float64", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "sgd")

# Options that mean something while training only, with the value used there.
TRAINING: dict[str, Any] = {"lr": 1e-3, "optimizer": "adamw", "warmup": 0, "every": 10}

# Torch's own number of groups would not divide narrow widths; 8 is GroupNorm's usual small choice.
GROUPS = 8


def option(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line option, with its help text."""
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """One network with its input and loss: everything that decides the gradients but the seed.

    Options left at None take the value of the published shape (`like`), if there is one, or the
    default of the scheme or the block (`SIZES`, `BLOCKS`, `DOMAINS`, `BLOCK_OPTIONS`);
    options that a block does not have stay None.

    Raises:
        UsageError: a value breaks a rule; the message says which and what to do.
    """

    like: str | None = option(None, "a published shape, for what is not given", tuple(SHAPES))
    weights: str | None = option(None, "folder of a trained checkpoint, for shape and values")
    depth: int = option(None, "number of blocks (layers) (12)")
    scheme: str | None = option(
        None, "a published recipe: `gradflow schemes` lists them; or yours: my_scheme.py:SCHEME"
    )
    block: str | None = option(
        None, "what one layer is (transformer); yours: my_block.py:MyBranch; known", tuple(BLOCKS)
    )
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
    norm_eps: float = option(None, "what norms add to the mean square (1e-5)")
    width: int = option(None, "features, or channels, of the stream (128)")
    heads: int | None = option(None, "attention heads (4)")
    kv_heads: int | None = option(None, "heads of keys and values, shared in groups (as --heads)")
    head_dim: int | None = option(None, "features of a head (--width over --heads)")
    rope: float | None = option(None, "base of rotary positions; 0: none (0)")
    causal: bool | None = option(None, "mask the future in attention")
    qk_norm: bool | None = option(None, "normalise queries and keys, per head")
    ffn_mult: int | None = option(None, "hidden width of an ffn over the width (4)")
    ffn_width: int | None = option(None, "hidden width of an ffn, in place of --ffn-mult")
    gated: bool | None = option(None, "ffn with a gate: down(phi(gate x) * up x)")
    bias: str | None = option(None, "linear maps of token blocks that have one (all)", BIASES)
    seq_len: int | None = option(None, "tokens in a sample (32)")
    image_size: int | None = option(None, "pixels on a side (16)")
    batch_size: int | None = option(None, "samples (8; 64 for mlp)")
    loss: str = option(
        "cotangent", "what puts the gradient in at the output; of a model also own", LOSSES
    )
    classes: int = option(None, "classes of the ce head (10)")
    dtype: str = option("float32", "number format of the whole pass", DTYPES)

    def __post_init__(self) -> None:
        _check_stored(self)
        self._resolve_weights()
        self._resolve_shape()
        self._resolve_design()
        for name in ("block", "shortcut", "norm", "norm_kind", "init", "bias", "loss", "dtype"):
            _check_name(self, name)
        self._resolve_details()
        _check_name(self, "activation")
        _check_numbers(self)
        # 2 and 2.0 are one network, so they have one key.
        for name in ("gain", "weight_var", "bias_var", "norm_eps", "rope"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        _check_fit(self)
        if not self.is_stored(self.scheme):
            _check_own_forms(self, self.wiring(1, 0))  # a scheme refuses what it is not defined for
        _check_user_code(self)

    def _resolve_weights(self) -> None:
        """The fields that a trained checkpoint decides; others than its own are refused."""
        if self.weights is None:
            return
        if not isinstance(self.weights, Pretrained):
            object.__setattr__(self, "weights", locate(self.weights))
        for name in ("like", "scheme", "init", "weight_var", "bias_var"):
            if getattr(self, name) is not None:
                raise UsageError(
                    "--weights has values of its own", flag(name), f"leave out {flag(name)}"
                )
        own = {"block": DEFAULT_BLOCK, "shortcut": "residual"} | self.checkpoint.fields
        for name, value in own.items():
            given = getattr(self, name)
            if given not in (None, value):
                rule = f"--weights {self.weights} has {flag(name)} {value}"
                raise UsageError(rule, f"{flag(name)} {given}", f"leave out {flag(name)}")
            object.__setattr__(self, name, value)

    def _resolve_shape(self) -> None:
        """The fields that a published shape brings; all are transformers."""
        if self.like is None or self.is_stored(self.scheme):
            return
        values = missing(self.like, vars(self))
        self._resolve("block", DEFAULT_BLOCK)
        _check_name(self, "block")
        own = self.recipe.defaults if self.scheme else {}  # what is given goes before the shape
        for name, value in values.items():
            fits = name not in BLOCK_OPTIONS or name in self.kind.options
            if fits and name not in own:
                self._resolve(name, value)

    def _resolve_details(self) -> None:
        """The sizes, and the defaults that depend on the block and its norms."""
        for name, size in SIZES.items():
            self._resolve(name, size)
        self._resolve("activation", self.kind.activation)
        if self.normalises:
            self._resolve("norm_kind", self.domain.norm_kind)
        else:
            object.__setattr__(self, "norm_kind", None)
        self._resolve("batch_size", self.domain.batch_size)
        for name, default in BLOCK_OPTIONS.items():
            if name in self.kind.options and not (name == "ffn_mult" and self.ffn_width):
                self._resolve(name, default)

    def _resolve_design(self) -> None:
        """The fields that a scheme decides, or their defaults where there is none."""
        if self.scheme is None:
            defaults = {"block": DEFAULT_BLOCK, "shortcut": "residual", "norm": "pre"}
            defaults |= {} if self.weights else {"init": "he"}
        elif self.is_stored(self.scheme):
            defaults = {}
        else:
            _check_scheme(self, self.recipe)
            shortcut = "plain" if self.recipe.plain else "residual"
            own = {"block": self.recipe.blocks[0], "shortcut": shortcut, "init": "he"}
            defaults = own | dict(self.recipe.defaults)
        for name, value in defaults.items():
            self._resolve(name, value)

    @staticmethod
    def is_stored(name: str | None) -> bool:
        """Whether it names a user's code that is not loaded: then the fields have its choices."""
        return user_code.is_user_name(name) and not user_code.is_loaded(str(name))

    def _resolve(self, name: str, default: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    @property
    def kind(self) -> BlockKind:
        """The entry of `BLOCKS`, or what a user's own block says of itself."""
        if self.is_stored(self.block):
            return _stored_kind(self)
        return block_kind(str(self.block))

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
    def checkpoint(self) -> Pretrained:
        """Where the weights are read from; only where `weights` is not None."""
        assert isinstance(self.weights, Pretrained)
        return self.weights

    @property
    def hidden(self) -> int:
        """Hidden width of an ffn."""
        return self.ffn_width or self.width * int(self.ffn_mult or 1)

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.head_dim or self.width // int(self.heads or 1)

    def has_bias(self, role: str) -> bool:
        """Whether a linear map of attention or an ffn has a bias, by its name in the branch.

        Keys have none unless rotated: softmax does not change when all logits of a row move
        together, so the gradient would be zero.
        """
        if self.bias == "qkv":
            return role in ("q", "k", "v")
        return self.bias != "none" and (role != "k" or bool(self.rope))

    @property
    def recipe(self) -> Scheme:
        """The scheme; only where `scheme` is not None, and a user's own once it is loaded."""
        return scheme_named(str(self.scheme))

    @property
    def normalises(self) -> bool:
        """Whether its units have norms."""
        if self.is_stored(self.scheme):
            return self.norm_kind is not None
        return self.norm != "none" if self.scheme is None else self.recipe.normalises

    @property
    def has_final_norm(self) -> bool:
        """Whether a head normalises the stream first, as nets with norms in the branch need it."""
        return self.norm == "pre" if self.scheme is None else self.recipe.final_norm

    @property
    def departures(self) -> str:
        """Where options replace what the scheme brings: `init he in place of xavier`; or empty."""
        if self.scheme is None or self.is_stored(self.scheme):
            return ""
        brought = dict(self.recipe.defaults)
        if "init" in brought:  # these three change what such an init says
            brought = {"weight_var": None, "bias_var": None, "gain": 1.0} | brought
        parts = {name: (getattr(self, name), own) for name, own in brought.items()}
        return "; ".join(
            f"{name.replace('_', ' ')} {given} in place of {'none' if own is None else own}"
            for name, (given, own) in sorted(parts.items())
            if given != own
        )

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

    def wirings(self) -> Iterator[tuple[Place, Wiring]]:
        """Every unit, first to last."""
        for layer in range(1, self.depth + 1):
            for unit in range(self.units_per_block):
                yield self.place(layer, unit), self.wiring(layer, unit)

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
        """The stack in a few words, for headings."""
        return f"{self._model}: {self._design}" if self._model else self._design

    @property
    def _model(self) -> str | None:
        """The published shape, or the name of the checkpoint."""
        return self.checkpoint.name if self.weights else self.like

    @property
    def origin(self) -> str:
        """Whose shape or values it has, and where it departs from them; empty where nobody's."""
        if self.weights:
            return f"trained weights {self.weights}"
        if self.like is None:
            return ""
        values = changed(self.like, vars(self))
        others = " ".join(f"{flag(k)} {user_code.shown(str(v))}" for k, v in values.items())
        shape = f"shape of {self.like}, {SHAPES[self.like].source}"
        return f"{shape}; but for {others}" if others else shape

    @property
    def _design(self) -> str:
        block = user_code.shown(str(self.block))
        if self.scheme is not None:
            kind = f"{self.norm_kind}, " if self.norm_kind else ""
            return f"{user_code.shown(self.scheme)} {block}, {kind}depth {self.depth}"
        norm = "no norm" if self.norm == "none" else f"{self.norm}-{self.norm_kind}"
        return f"{self.shortcut} {block}, {norm}, depth {self.depth}"

    @property
    def details(self) -> str:
        """Sizes, activation and initialisation, in one line."""
        size = {
            "vectors": f"{self.batch_size} vectors",
            "tokens": f"{self.batch_size} x {self.seq_len} tokens",
            "images": f"{self.batch_size} images of {self.image_size} x {self.image_size}",
        }[self.kind.domain]
        init = f", init {self.init}" if self.init else ""
        return f"width {self.width}, {size}, {self.activation}{init}"

    @property
    def input_has_gradient(self) -> bool:
        """The engines take the gradient at the input of every stack."""
        return True

    def kind_of(self, unit: str) -> str:
        """Units of one branch can be compared with each other."""
        return unit

    @property
    def slug(self) -> str:
        """The stack as a part of a folder name."""
        design = user_code.shown(self.scheme or f"{self.shortcut}-{self.norm}")
        text = f"{self._model or user_code.shown(str(self.block))}-{design}-d{self.depth}"
        return re.sub(r"[^\w.-]+", "-", text)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values that `from_json` takes."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """All of it decides the numbers."""
        return self.to_json()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StackSpec:
        """The spec that `to_json` wrote.

        Raises:
            UsageError: an unknown field, or a value that breaks a rule.
        """
        known = known_fields(cls, values)
        if known.get("weights") is not None and not isinstance(known["weights"], Pretrained):
            known["weights"] = Pretrained(known["weights"])  # its folder was not stored
        return cls(**known)


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
    compile: bool = option(False, "compile one unit and use it for all layers")
    keep: str = option("auto", "what stays in memory for the backward pass", KEEPS)
    rebuild: bool | None = option(
        None, "build each layer again when it is visited, instead of keeping all parameters"
    )
    memory_limit: str | None = option(
        None, "memory the stack may take, for example 4GiB (half of what is free)"
    )
    vanishing: float = option(3.0, "decades of shrinking that count as vanishing")
    exploding: float = option(3.0, "decades of growth that count as exploding")
    steps: int = option(0, "training steps on the built-in task; 0 does not train")
    lr: float | None = option(None, "learning rate (0.001)")
    optimizer: str | None = option(None, "what makes the steps (adamw)", OPTIMIZERS)
    warmup: int | None = option(None, "steps in which the learning rate rises linearly (0)")
    every: int | None = option(None, "steps from one measurement to the next (10)")

    def __post_init__(self) -> None:
        self._resolve_training()
        at_least(self, "seed", 0)
        at_least(self, "seeds", 1)
        at_least(self, "repeats", 1)
        for name in ("time_budget", "vanishing", "exploding"):
            positive(self, name)
        check_choice("--keep", self.keep, KEEPS)
        self._check_memory()
        self._check_compile()

    def _check_compile(self) -> None:
        if not isinstance(self.compile, bool):
            raise UsageError("--compile is a flag", self.compile, "use --compile or --no-compile")
        if self.compile and self.steps:
            rule = "--compile applies to initialisation, not to training"
            raise UsageError(rule, f"--steps {self.steps}", "leave out one of the two")

    def _check_memory(self) -> None:
        if not isinstance(self.rebuild, bool | None):
            raise UsageError("--rebuild is a flag", self.rebuild, "use --rebuild or --no-rebuild")
        try:
            _ = self.memory_limit_bytes
        except (ValueError, TypeError, OverflowError):
            rule = "--memory-limit is a size: a number with B, KiB, MiB or GiB"
            raise UsageError(rule, self.memory_limit, "use for example 4GiB") from None

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes; None if there is none."""
        return None if self.memory_limit is None else size_in_bytes(self.memory_limit)

    @property
    def is_policy_given(self) -> bool:
        """Whether the memory policy is restricted by more than a limit."""
        return self.keep != "auto" or self.rebuild is not None

    def _resolve_training(self) -> None:
        """The options of training: their defaults, or none where nothing is trained."""
        at_least(self, "steps", 0)
        for name, default in TRAINING.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default if self.steps else None)
            elif not self.steps:
                rule = f"{flag(name)} applies to training"
                raise UsageError(rule, "--steps 0", "use for example --steps 100")
        if self.steps:
            check_choice("--optimizer", self.optimizer, OPTIMIZERS)
            positive(self, "lr")
            object.__setattr__(self, "lr", float(self.lr or 0))
            at_least(self, "warmup", 0)
            at_least(self, "every", 1)

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
        return cls(**known_fields(cls, values))


def run_key(spec: Storable, options: RunOptions) -> str:
    """Eight hexadecimal digits that name the numbers a run will hold, timings aside."""
    numbers: dict[str, Any] = {
        "seed": options.seed,
        "seeds": options.seeds,
        "raw_range": options.raw_range,
    }
    if options.compile:  # other code rounds in other places
        numbers["compile"] = True
    if options.steps:
        numbers |= {name: getattr(options, name) for name in ("steps", *TRAINING)}
    text = json.dumps({"spec": spec.identity(), **numbers}, sort_keys=True)
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


def known_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by field, if the class has all these fields.

    Raises:
        UsageError: an unknown field.
    """
    known = tuple(f.name for f in fields(cls))
    for name in values:
        check_choice(f"a field of {cls.__name__}", name, known)
    return dict(values)


def _check_name(spec: StackSpec, name: str) -> None:
    choices = StackSpec.__dataclass_fields__[name].metadata["choices"]
    value = getattr(spec, name)
    if value is not None and not (name == "block" and user_code.is_user_name(value)):
        check_choice(flag(name), value, choices)


def _check_stored(spec: StackSpec) -> None:
    """The name of code that is not loaded will do where the spec has all that was made of it."""
    resolved = ("block", "shortcut", "init", "activation", "batch_size")
    for name in filter(spec.is_stored, (spec.scheme, spec.block)):
        if any(getattr(spec, field) is None for field in resolved):
            user_code.loaded(str(name))  # which says what to do


def _stored_kind(spec: StackSpec) -> BlockKind:
    """What a resolved spec tells of a user's block; its sizes are those of its stream."""
    options = tuple(name for name in BLOCK_OPTIONS if getattr(spec, name) is not None)
    sized = (domain for domain, facts in DOMAINS.items() if {*facts.sizes} & {*options})
    unit = user_code.thing(str(spec.block))
    return BlockKind((unit,), next(sized, "vectors"), str(spec.activation), "", options)


def _check_user_code(spec: StackSpec) -> None:
    """A user's scheme or block, once loaded, holds to the interface in every unit."""
    own = [name for name in (spec.scheme, spec.block) if user_code.is_user_name(name)]
    if not own or spec.scheme is None or any(map(spec.is_stored, own)):
        return
    check_wirings(spec.scheme, spec.wirings(), spec.domain.norm_kinds)


# What a scheme may bring: its units it wires itself.
_BROUGHT = tuple(
    f.name for f in fields(StackSpec) if f.name not in ("scheme", "block", "shortcut", "norm")
)


def _check_scheme(spec: StackSpec, recipe: Scheme) -> None:
    """A scheme decides where units add and normalise; a block that it is not defined on fails."""
    if user_code.is_user_name(spec.scheme):
        check_scheme(str(spec.scheme), _BROUGHT, BLOCKS)
    own = {"norm": None, "shortcut": "plain" if recipe.plain else "residual"}
    for name, value in own.items():
        given = getattr(spec, name)
        if given not in (None, value):
            rule = f"--scheme {user_code.shown(str(spec.scheme))} wires its units itself"
            raise UsageError(rule, f"{flag(name)} {given}", f"leave out {flag(name)}, or --scheme")
    title = user_code.shown(str(spec.scheme))
    if user_code.is_user_name(spec.block):
        domains = tuple(dict.fromkeys(BLOCKS[block].domain for block in recipe.blocks))
        check_choice(f"the domain of a block for --scheme {title}", spec.kind.domain, domains)
    elif spec.block is not None:
        check_choice(f"--block for --scheme {title}", spec.block, tuple(recipe.blocks))


COUNTS = ("heads", "kv_heads", "head_dim", "ffn_mult", "ffn_width", "seq_len", "image_size")


def _check_numbers(spec: StackSpec) -> None:
    for name in ("depth", "width", "batch_size"):
        at_least(spec, name, 1)
    at_least(spec, "classes", 2)
    positive(spec, "gain")
    positive(spec, "norm_eps")
    for name in COUNTS:
        if getattr(spec, name) is not None:
            at_least(spec, name, 1)
    for name in ("weight_var", "bias_var", "rope"):
        if getattr(spec, name) is not None:
            positive(spec, name, zero=name != "weight_var")
    for name in ("causal", "qk_norm", "gated"):
        _check_switch(spec, name)


def _check_switch(spec: StackSpec, name: str) -> None:
    given = getattr(spec, name)
    if given is not None and not isinstance(given, bool):
        remedy = f"use {flag(name)} or {flag('no_' + name)}"
        raise UsageError(f"{flag(name)} is true or false", given, remedy)


def _check_fit(spec: StackSpec) -> None:
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
    if most is not None and int(spec.seq_len or 1) > most:
        rule = f"--weights {spec.weights} has positions for {most} tokens"
        raise UsageError(rule, f"--seq-len {spec.seq_len}", f"use --seq-len {most} or less")
    if spec.norm_kind is not None:
        _check_norm_kind(spec)


# Parts that units of a kind (`Wiring.unit`) have in a form of their own; neither has biases.
OWN_FORMS = {"ngpt": ("kv_heads", "head_dim", "rope", "bias"), "fixup": ("gated", "bias")}


def _check_own_forms(spec: StackSpec, wiring: Wiring) -> None:
    """Refuse options that units of this kind would pass over."""
    heads = spec.heads or 1
    usual = {
        "kv_heads": (heads, f"--kv-heads {heads}"),
        "head_dim": (spec.width // heads, f"--head-dim {spec.width // heads}"),
        "rope": (0.0, "--rope 0"),
        "gated": (False, "--no-gated"),
        "bias": ("none", "--bias none"),
    }
    for name in OWN_FORMS.get(wiring.unit, ()):
        given, (value, remedy) = getattr(spec, name), usual[name]
        if given not in (None, value, BLOCK_OPTIONS[name]):
            rule = f"--scheme {user_code.shown(str(spec.scheme))} decides {flag(name)} itself"
            raise UsageError(rule, f"{flag(name)} {given}", f"use {remedy}")


def _check_heads(spec: StackSpec, heads: int) -> None:
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
