"""Every single-stream scheme once more, from its paper's equation, in plain float64.

Nothing of the package is used but numbers: the weights of the built units, and which branches
stochastic depth has drawn. Constants are computed here from the papers' formulas. A unit is a
function of its weights and of the two uses of x: `skip` around the branch, `x` through it.

N blocks, l the block from 1, d width, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import (
    PHI,
    Columns,
    Params,
    affine,
    conv3x3,
    doubles,
    log10,
    param_columns,
    size,
    standardise,
    stream_columns,
    total_loss,
)
from torch import Tensor

from gradflow.engine.tape import Network
from gradflow.specs.stack import StackSpec

EPS = 1e-5


@dataclass
class Case:
    """One unit: its stack, its place, its weights; `kept`: stochastic depth's coin."""

    spec: StackSpec
    layer: int
    kind: str
    p: Params
    kept: float

    @property
    def n(self) -> int:
        return self.spec.depth

    def phi(self, x: Tensor) -> Tensor:
        return PHI[str(self.spec.activation)](x)

    def ln(self, at: str, x: Tensor) -> Tensor:
        """Layer norm with its affine map; rmsnorm where there is no shift."""
        if f"{at}.bias" in self.p:
            return standardise(x, (x.ndim - 1,)) * self.p[f"{at}.weight"] + self.p[f"{at}.bias"]
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * self.p[f"{at}.weight"]

    def bn(self, at: str, x: Tensor) -> Tensor:
        w, b = (self.p[f"{at}.{part}"][:, None, None] for part in ("weight", "bias"))
        return standardise(x, (0, 2, 3)) * w + b

    def f(self, x: Tensor) -> Tensor:
        """The branch without norms."""
        plain = {"attention": attention, "ffn": ffn, "mlp": mlp, "conv": conv, "resnet": preact}
        return plain[self.kind](self, x)


def same(x: Tensor) -> Tensor:
    return x


def mlp(c: Case, x: Tensor) -> Tensor:
    return c.phi(affine(c.p, "branch.linear", x))


def conv(c: Case, x: Tensor) -> Tensor:
    return c.phi(conv3x3(c.p, "branch.conv", x))


def preact(c: Case, x: Tensor) -> Tensor:
    hidden = conv3x3(c.p, "branch.conv1", c.phi(x))
    return conv3x3(c.p, "branch.conv2", c.phi(hidden))


def ffn(c: Case, x: Tensor, mid: Callable[[Tensor], Tensor] = same) -> Tensor:
    return affine(c.p, "branch.down", mid(c.phi(affine(c.p, "branch.up", x))))


def mixed(c: Case, q: Tensor, k: Tensor, v: Tensor, sharpness: float) -> Tensor:
    """concat_h softmax(sharpness q_h k_h^T) v_h of (B, T, h, d/h)."""
    logits = sharpness * torch.einsum("bihc,bjhc->bhij", q, k)
    if c.spec.causal:
        tokens = q.shape[1]
        logits = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    weights = torch.softmax(logits, dim=-1)
    return torch.einsum("bhij,bjhc->bihc", weights, v)


def heads(c: Case, x: Tensor) -> list[Tensor]:
    """q, k, v as (B, T, h, d/h)."""
    shape = (*x.shape[:2], int(c.spec.heads or 1), -1)
    return [affine(c.p, f"branch.{at}", x).reshape(shape) for at in "qkv"]


def attention(
    c: Case, x: Tensor, mid: Callable[[Tensor], Tensor] = same, sharpness: float | None = None
) -> Tensor:
    q, k, v = heads(c, x)
    joined = mixed(c, q, k, v, sharpness or q.shape[-1] ** -0.5).reshape(x.shape)
    return affine(c.p, "branch.out", mid(joined))


# One function per scheme.


def plain(c: Case, _: Tensor, x: Tensor) -> Tensor:
    return c.f(x)


def he_v1(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    hidden = torch.relu(c.bn("branch.norm1", conv3x3(c.p, "branch.conv1", x)))
    return torch.relu(skip + c.bn("branch.norm2", conv3x3(c.p, "branch.conv2", hidden)))


def he_v2(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    hidden = conv3x3(c.p, "branch.conv1", torch.relu(c.bn("branch.norm1", x)))
    return skip + conv3x3(c.p, "branch.conv2", torch.relu(c.bn("branch.norm2", hidden)))


def highway(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    gate = affine(c.p, "gate", x) if c.kind == "mlp" else conv3x3(c.p, "gate", x)
    t = 1 / (1 + torch.exp(-gate))
    return t * c.f(x) + (1 - t) * skip


def scaled_branch(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    """SkipInit, ReZero: one number on the branch."""
    return skip + c.p["scale.weight"] * c.f(x)


def fixup(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    def shifted(z: Tensor, name: str) -> Tensor:
        return z + c.p[f"branch.{name}.bias"]

    x = shifted(x, "shift1")
    if c.kind == "resnet":
        hidden = conv3x3(c.p, "branch.conv1", shifted(c.phi(x), "shift2"))
        f = conv3x3(c.p, "branch.conv2", shifted(c.phi(shifted(hidden, "shift3")), "shift4"))
    elif c.kind == "ffn":
        hidden = c.phi(shifted(x @ c.p["branch.up.weight"].T, "shift2"))
        f = shifted(hidden, "shift3") @ c.p["branch.down.weight"].T
    else:
        f = attention(c, x, lambda joined: shifted(joined, "mid"))
    return skip + c.p["scale.weight"] * f


def t_fixup(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return skip + c.f(x)


def stochastic_depth(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    hidden = torch.relu(c.bn("branch.norm1", conv3x3(c.p, "branch.conv1", x)))
    f = c.bn("branch.norm2", conv3x3(c.p, "branch.conv2", hidden))
    return torch.relu(skip + c.kept * f)


def layerscale(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return skip + c.f(c.ln("before", x)) @ torch.diag(c.p["scale.weight"])


def post_ln(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return c.ln("after", skip + c.f(x))


def pre_ln(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return skip + c.f(c.ln("before", x))


def peri_ln(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return skip + c.ln("branch_norm", c.f(c.ln("before", x)))


def sandwich_ln(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    def relaxed(at: str, z: Tensor) -> Tensor:
        return c.ln(at, 8 * z / z.detach().abs().max())

    return skip + relaxed("branch_norm", c.f(relaxed("before", x)))


def sub_ln(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    branch = attention if c.kind == "attention" else ffn
    return skip + branch(c, c.ln("before", x), lambda inner: c.ln("branch.mid", inner))


def normformer(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    if c.kind == "ffn":
        return skip + ffn(c, c.ln("before", x), lambda inner: c.ln("branch.mid", inner))
    q, k, v = heads(c, c.ln("before", x))
    by_head = torch.einsum(
        "bihc,h->bihc", mixed(c, q, k, v, q.shape[-1] ** -0.5), c.p["branch.mid.weight"]
    )
    return skip + c.ln("branch_norm", affine(c.p, "branch.out", by_head.reshape(x.shape)))


def mix_ln(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return (post_ln if c.layer <= math.floor(0.25 * c.n) else pre_ln)(c, skip, x)


def lns(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return skip + c.f(c.ln("before", x) / math.sqrt(c.layer))


def hybridnorm(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    if c.kind == "ffn":
        return c.ln("shared", skip) + c.f(c.ln("shared", x))
    q, k, v = heads(c, x)
    q, k, v = c.ln("branch.q_norm", q), c.ln("branch.k_norm", k), c.ln("branch.v_norm", v)
    joined = mixed(c, q, k, v, q.shape[-1] ** -0.5).reshape(x.shape)
    return skip + affine(c.p, "branch.out", joined)


def deepnorm(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return c.ln("after", (2 * c.n) ** 0.25 * skip + c.f(x))


def admin(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return c.ln("after", skip * c.p["omega.weight"] + c.f(x))


def keel(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    sublayers = c.n * (2 if c.spec.block == "transformer" else 1)
    return c.ln("after", sublayers * skip + c.f(c.ln("before", x)))


def mup(c: Case, x: Tensor) -> Tensor:
    """The branch of muP: attention's logits are q.k over the features of a head."""
    sharpness = int(c.spec.heads or 1) / c.spec.width
    return attention(c, x, sharpness=sharpness) if c.kind == "attention" else c.f(x)


def depth_mup(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return skip + mup(c, c.ln("before", x)) / math.sqrt(c.n)


def completep(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return skip + mup(c, c.ln("before", x)) / (c.n / 2)


def deepscalelm(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    return math.sqrt(1 - 2 / c.n) * skip + math.sqrt(2 / c.n) * c.f(c.ln("before", x))


def to_sphere(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def ngpt(c: Case, skip: Tensor, x: Tensor) -> Tensor:
    d = c.spec.width
    if c.kind == "ffn":
        u, v = (math.sqrt(d) * c.p["branch.s_uv.weight"] * affine(c.p, "branch.up", x)).chunk(2, -1)
        f = affine(c.p, "branch.down", u * c.phi(v))
    else:
        q, k, v = heads(c, x)
        s = (math.sqrt(d) * c.p["branch.s_qk.weight"]).reshape(q.shape[2:])
        q, k = s * to_sphere(q), s * to_sphere(k)
        f = affine(c.p, "branch.out", mixed(c, q, k, v, q.shape[-1] ** 0.5).reshape(x.shape))
    alpha = (0.05 * math.sqrt(d) * c.p["alpha.weight"]).abs()
    return to_sphere(skip + alpha * (to_sphere(f) - skip))


Equation = Callable[[Case, Tensor, Tensor], Tensor]

EQUATIONS: dict[str, Equation] = {
    "plain": plain,
    "he-v1": he_v1,
    "he-v2": he_v2,
    "highway": highway,
    "skipinit": scaled_branch,
    "rezero": scaled_branch,
    "fixup": fixup,
    "t-fixup": t_fixup,
    "stochastic-depth": stochastic_depth,
    "layerscale": layerscale,
    "post-ln": post_ln,
    "pre-ln": pre_ln,
    "gpt2": pre_ln,
    "peri-ln": peri_ln,
    "sandwich-ln": sandwich_ln,
    "sub-ln": sub_ln,
    "normformer": normformer,
    "mix-ln": mix_ln,
    "lns": lns,
    "hybridnorm": hybridnorm,
    "deepnorm": deepnorm,
    "admin": admin,
    "keel": keel,
    "depth-mup": depth_mup,
    "completep": completep,
    "deepscalelm": deepscalelm,
    "ngpt": ngpt,
}


@dataclass
class Step:
    """One unit after the pass over the whole stack; the names are those of `oracle.Step`."""

    case: Case
    x: Tensor
    y: Tensor

    @property
    def layer(self) -> int:
        return self.case.layer

    @property
    def kind(self) -> str:
        return self.case.kind

    @property
    def params(self) -> Params:
        return self.case.p


def forward(spec: StackSpec, net: Network, scheme: str | None = None) -> list[Step]:
    """All units in one autograd graph, with weights of their own where the scheme shares them.

    `scheme` is the equation's, where it is another than the stack's.
    """
    x = net.x.double().requires_grad_()
    equation, steps = EQUATIONS[str(scheme or spec.scheme)], []
    for layer, block in enumerate(net.blocks, start=1):
        for built, kind in zip(block, spec.kind.units, strict=True):
            case = Case(spec, layer, kind, doubles(built), getattr(built.scale, "factor", 1.0))
            y = equation(case, x, x)
            y.retain_grad()
            steps.append(Step(case, x, y))
            x = y
    return steps


def gain_columns(spec: StackSpec, step: Step) -> Columns:
    """|dL/dx| / |dL/dy|, and its parts by one `autograd.grad` for each use of x."""
    g, gain = step.y.grad, size(step.x.grad) / size(step.y.grad)
    if spec.scheme == "plain":
        return {"gain": gain, "skip_gain": 0.0, "branch_gain": gain, "skip_branch_cos": None}
    skip, branch = (step.x.detach().clone().requires_grad_() for _ in range(2))
    y = EQUATIONS[str(spec.scheme)](step.case, skip, branch)
    s, b = torch.autograd.grad(y, (skip, branch), g)
    cosine = (s * b).sum().item() / (size(s) * size(b)) if size(b) else math.nan
    return {
        "gain": gain,
        "skip_gain": size(s) / size(g),
        "branch_gain": size(b) / size(g),
        "skip_branch_cos": cosine,
    }


def unit_columns(spec: StackSpec, step: Step) -> Columns:
    """One row of `layers.csv`."""
    weights = torch.cat([p.detach().flatten() for p in step.params.values()])
    grads = torch.cat([p.grad.flatten() for p in step.params.values()])
    return {
        "layer": step.layer,
        "unit": step.kind,
        **stream_columns(step.y.detach(), step.y.grad),
        **gain_columns(spec, step),
        "param_norm": size(weights),
        "param_grad_norm": size(grads),
        "log10_param_grad_norm": log10(size(grads)),
    }


def backward(spec: StackSpec, net: Network) -> list[Step]:
    """Forward, then gradients everywhere."""
    steps = forward(spec, net)
    total_loss(spec, net.loss, steps[-1].y).backward()
    return steps


def measure(spec: StackSpec, steps: list[Step]) -> tuple[list[Columns], list[Columns]]:
    """What `layers.csv` and `params.csv` have to say, timings and bytes aside."""
    x = steps[0].x
    first = {"layer": 0, "unit": "input", **stream_columns(x.detach(), x.grad)}
    layers = [first, *(unit_columns(spec, step) for step in steps)]
    return layers, [row for step in steps for row in param_columns(step)]
