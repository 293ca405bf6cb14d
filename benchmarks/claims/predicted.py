"""Theory beside measurement for every scheme: the table, and the rows of its chart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from claims.readings import Profile, gradients
from gradflow.schemes import SCHEMES
from gradflow.specs.stack import StackSpec
from gradflow.text import markdown_table
from gradflow.theory import Prediction, predict

SEEDS = range(8)
SIZES: dict[str, Any] = {"block": "transformer", "depth": 24, "width": 128, "seq_len": 64}
INITS: dict[str, dict[str, Any]] = {"he, relu": {"init": "he", "activation": "relu"}, "own": {}}
CLOSE, WIDE = 0.05, 0.2  # decades of |g|^2; the latter for these schemes and for causal masks
LOOSE = ("post-ln", "mix-ln", "admin", "b2t", "residual-dual")

IMAGES: dict[str, Any] = {"depth": 12, "width": 128, "image_size": 8, "batch_size": 16}
BLOCKS: dict[str, dict[str, Any]] = {
    "mlp": {"depth": 12, "width": 512},
    "conv": IMAGES,
    "resnet": IMAGES,
    "ffn": {"depth": 24, "width": 128, "seq_len": 64, "batch_size": 8},
}
# Pre-LN transformers with other norms.
NORMS: tuple[dict[str, Any], ...] = (
    *({"norm_kind": kind} for kind in ("rmsnorm", "dyt", "derf")),
    {"qk_norm": True},
)

NUMBERS = ["predicted", "measured", "worst row", "stated", "within", "band", "in band"]
HEADINGS = ["scheme", "init", "mask", *NUMBERS]
NOTE = """\
log10 of |g_0|^2 / |g_D|^2, g the gradient at the input and at the output, for every scheme that has
a prediction. Transformer, depth 24, width 128, 8 x 64 tokens, float32; *he, relu* is `--init he
--activation relu`, *own* is what the scheme brings (GELU, but where it says otherwise). Measured:
mean ± standard deviation over 8 seeds. Worst row: measured mean less theory where they lie farthest
apart, of all 49 rows. Stated: 0.05 decades, 0.2 for causal masks and for Post-LN, Mix-LN, Admin,
B2T and ResiDual, whose norms follow the shortcut. Band: tolerance of the formulas plus two standard
deviations of the mean over the seeds, in this row; in band: all rows are. Schemes of several
streams: g is the gradient of all of them together, of the last state at the output.
"""


OTHERS = """\
## Other blocks, other norms

The same for blocks other than the transformer, each scheme with its own initialisation: mlp, depth
12, width 512; ffn, depth 24, width 128, 8 x 64 tokens; conv and resnet, depth 12, width 128, 16
images of 8 x 8. And Pre-LN transformers, as above, with norms other than layernorm. Plain nets
scatter so much that 8 seeds do not fix their mean to 0.05 decades: their band says so.
"""


@dataclass(frozen=True)
class Held:
    """A scheme with its prediction and its profiles, log10 |g_u| / |g_D| by seed and row.

    `init` is the name of the initialisation, or else of what sets the stack apart.
    """

    scheme: str
    init: str
    spec: StackSpec
    told: Prediction
    profiles: Profile

    @property
    def apart(self) -> Profile:
        """Mean of the seeds less theory, row by row, decades of |g|^2."""
        return np.asarray(2 * (self.profiles.mean(axis=0) - self.told.log10_grad_norm))

    @property
    def stated(self) -> float:
        """Tolerance as stated, decades of |g|^2."""
        return WIDE if self.scheme in LOOSE or self.spec.causal else CLOSE

    @property
    def band(self) -> Profile:
        """Half of the band of the mean, row by row, decades of |g|^2."""
        ends = np.array(self.told.band(len(self.profiles)))
        return np.asarray(ends[:, 1] - ends[:, 0])

    @property
    def is_within(self) -> bool:
        """Whether all rows are within the stated tolerance."""
        return bool(np.abs(self.apart).max() <= self.stated)

    @property
    def is_in_band(self) -> bool:
        """Whether all rows are within their band; the output's row is 0 by definition."""
        return bool((np.abs(self.apart) <= self.band).all())


def schemes() -> Iterator[str]:
    """Those defined on transformers."""
    yield from (name for name, scheme in SCHEMES.items() if "transformer" in scheme.blocks)


def specs() -> Iterator[tuple[str, str, StackSpec]]:
    """Scheme, name of the initialisation, stack."""
    for scheme in schemes():
        for init, options in INITS.items():
            spec = StackSpec(scheme=scheme, **SIZES, **options, batch_size=8)
            yield scheme, init, spec
            yield scheme, init, replace(spec, causal=True)


def other_specs() -> Iterator[tuple[str, str, StackSpec]]:
    """Scheme, block or norm, stack: of blocks that are no transformers, and of other norms."""
    for scheme, found in SCHEMES.items():
        for block in found.blocks:
            if block in BLOCKS:
                yield scheme, block, StackSpec(scheme=scheme, block=block, **BLOCKS[block])
    for options in NORMS:
        spec = StackSpec(scheme="pre-ln", **SIZES, **options, batch_size=8)
        name = str(options.get("norm_kind", "qk-norm"))
        yield "pre-ln", name, spec
        yield "pre-ln", name, replace(spec, causal=True)


def hold_all(stacks: Iterable[tuple[str, str, StackSpec]]) -> Iterator[Held]:
    """Every stack that has a prediction, with its measurement."""
    for scheme, init, spec in stacks:
        told = predict(spec)
        if told.reason is None:
            profiles = np.array([gradients(spec, seed) for seed in SEEDS])
            yield Held(scheme, init, spec, told, profiles)


def withheld() -> list[list[str]]:
    """Scheme, reason and other blocks, where theory has no answer for a transformer.

    All with the scheme's own initialisation.
    """
    own = {scheme: spec for scheme, init, spec in specs() if init == "own" and not spec.causal}
    reasons = {scheme: predict(spec).reason for scheme, spec in own.items()}
    without = {scheme: reason for scheme, reason in reasons.items() if reason is not None}
    without |= {name: "not defined on them" for name in SCHEMES if name not in reasons}
    return [[name, reason, ", ".join(predicted_on(name))] for name, reason in without.items()]


def predicted_on(scheme: str) -> Iterator[str]:
    """The blocks of a scheme that theory has an answer for."""
    for block in SCHEMES[scheme].blocks:
        if predict(StackSpec(scheme=scheme, block=block)).reason is None:
            yield block


def page(held: Sequence[Held], others: Sequence[Held], foot: Sequence[str]) -> str:
    """Both tables as Markdown."""
    return "\n".join(
        [
            *("# Predicted against measured", "", NOTE, _count(held)),
            *("", *markdown_table(HEADINGS, map(_row, held), left=3)),
            *("", "Not predicted on transformers:", ""),
            *markdown_table(["scheme", "why", "predicted on"], withheld(), left=3),
            *("", OTHERS, _count(others), ""),
            *markdown_table(
                ["scheme", "block or norm", "mask", *NUMBERS], map(_row, others), left=3
            ),
            *("", *foot, ""),
        ]
    )


def _count(held: Sequence[Held]) -> str:
    good = sum(each.is_within for each in held)
    inside = sum(each.is_in_band for each in held)
    return f"{good} of {len(held)} within the stated tolerance, {inside} in their band."


def _row(held: Held) -> list[str]:
    totals = 2 * held.profiles[:, 0]
    worst = int(np.abs(held.apart).argmax())
    mask = "causal" if held.spec.causal else "full"
    return [
        held.scheme,
        held.init,
        mask if "attention" in held.spec.kind.units else "",
        f"{2 * (held.told.log10_grad_norm or (np.nan,))[0]:+.3f}",
        f"{totals.mean():+.3f} ± {totals.std(ddof=1):.3f}",
        f"{held.apart[worst]:+.3f}",
        f"{held.stated:g}",
        "yes" if held.is_within else "no",
        f"{held.band[worst]:.3f}",
        "yes" if held.is_in_band else "no",
    ]
