"""Every multi-stream scheme once more, from its paper's equation, in plain float64.

Streams are a list of tensors (B, T, d) here, never stacked; matrices between streams are written
out element by element. Nothing of the package is used but numbers: the weights of the built units
and of the readout. A unit is a function of its weights and of the two uses of the state: `skip`
around the branch, `branch` through it.
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
    act_cosine,
    affine,
    doubles,
    log10,
    param_columns,
    size,
    standardise,
    stream_columns,
)
from torch import Tensor

from gradflow.engine.tape import Network
from gradflow.specs.stack import StackSpec

EPS = 1e-5
N = 4  # streams of hyper-connections
State = list[Tensor]


@dataclass
class Case:
    """One unit: its stack, its place (number from 0) and its weights."""

    spec: StackSpec
    number: int
    layer: int
    kind: str
    p: Params

    def ln(self, at: str, x: Tensor) -> Tensor:
        return norm(self.p, at, x)

    def f(self, x: Tensor) -> Tensor:
        """The branch without norms."""
        return attend(self, x, affine(self.p, "branch.v", x)) if self.mixes else ffn(self, x)

    @property
    def mixes(self) -> bool:
        return self.kind == "attention"


def norm(p: Params, at: str, x: Tensor) -> Tensor:
    """Layer norm with its affine map; rmsnorm where there is no shift."""
    if f"{at}.bias" in p:
        return standardise(x, (2,)) * p[f"{at}.weight"] + p[f"{at}.bias"]
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * p[f"{at}.weight"]


def ffn(c: Case, x: Tensor) -> Tensor:
    up, phi = affine(c.p, "branch.up", x), PHI[str(c.spec.activation)]
    hidden = phi(affine(c.p, "branch.gate", x)) * up if c.spec.gated else phi(up)
    return affine(c.p, "branch.down", hidden)


def attend(c: Case, x: Tensor, values: Tensor) -> Tensor:
    """out(concat_h softmax(q k^T / sqrt(d/h)) values)."""
    shape = (*x.shape[:2], int(c.spec.heads or 1), -1)
    q, k = (affine(c.p, f"branch.{at}", x).reshape(shape) for at in "qk")
    logits = torch.einsum("bihc,bjhc->bhij", q, k) / math.sqrt(q.shape[-1])
    if c.spec.causal:
        tokens = x.shape[1]
        logits = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    weights = torch.softmax(logits, dim=-1)
    mixed = torch.einsum("bhij,bjhc->bihc", weights, values.reshape(shape))
    return affine(c.p, "branch.out", mixed.reshape(x.shape))


# One function per scheme: the next state.


def b2t(c: Case, skip: State, branch: State) -> State:
    if c.mixes:
        return [c.ln("after", skip[0] + c.f(branch[0])), skip[0].clone()]
    h, x = skip
    return [c.ln("after", x + h + c.f(branch[0]))]


def residual_dual(c: Case, skip: State, branch: State) -> State:
    p, r = skip if c.number else (skip[0], skip[0])
    f = c.f(branch[0])
    return [c.ln("after", p + f), r + f]


def siamesenorm(c: Case, skip: State, branch: State) -> State:
    p, y = skip if c.number else (skip[0], skip[0])
    p_in, y_in = branch if c.number else (branch[0], branch[0])
    z = c.f(c.ln("before", c.ln("norm_p", p_in) + c.ln("norm_y", y_in)))
    return [c.ln("norm_p", p) + z / math.sqrt(2 * c.layer), y + z]


def hyper_connections(c: Case, skip: State, branch: State) -> State:
    w = {
        name: c.p[f"connection.{name}"]
        for name in ["a_m", "a_r", "b", "w_m", "w_r", "w_b", "s_a", "s_b"]
    }
    skip, branch = (s if c.number else s * N for s in (skip, branch))
    barred = [c.ln("connection.norm", h) for h in skip]

    def read(s: int) -> Tensor:
        dynamic = torch.tanh(c.ln("connection.norm", branch[s]) @ w["w_m"])
        return (w["a_m"][s] + w["s_a"] * dynamic)[..., None] * branch[s]

    def mixed(s: int, t: int) -> Tensor:
        dynamic = torch.tanh(barred[s] @ w["w_r"][:, t])
        return (w["a_r"][s, t] + w["s_a"] * dynamic)[..., None] * skip[s]

    f = c.f(c.ln("before", sum(read(s) for s in range(N))))
    write = [w["b"][t] + w["s_b"] * torch.tanh(barred[t] @ w["w_b"]) for t in range(N)]
    return [sum(mixed(s, t) for s in range(N)) + write[t][..., None] * f for t in range(N)]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def doubly_stochastic(logits: list[list[Tensor]]) -> list[list[Tensor]]:
    """20 times: columns over their sums, then rows over theirs."""
    m = [[torch.exp(x) for x in row] for row in logits]
    for _ in range(20):
        sums = [sum(m[t][s] for t in range(N)) for s in range(N)]
        m = [[m[t][s] / sums[s] for s in range(N)] for t in range(N)]
        m = [[x / sum(row) for x in row] for row in m]
    return m


def mhc(c: Case, skip: State, branch: State) -> State:
    p = {name.removeprefix("connection."): w for name, w in c.p.items()}
    skip, branch = (s if c.number else s * N for s in (skip, branch))

    def logits(streams: State, what: str, index: int) -> Tensor:
        x = torch.cat(streams, -1)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
        bias = p[f"b_{what}"].reshape(-1)[index]
        return p[f"a_{what}"] * (x @ p[f"phi_{what}"][:, index]) + bias

    read = [sigmoid(logits(branch, "pre", s))[..., None] * branch[s] for s in range(N)]
    f = c.f(c.ln("before", sum(read)))
    mixing = [[logits(skip, "res", N * t + s) for s in range(N)] for t in range(N)]
    h_res = doubly_stochastic(mixing)
    h_post = [2 * sigmoid(logits(skip, "post", t)) for t in range(N)]
    return [
        sum(h_res[t][s][..., None] * skip[s] for s in range(N)) + h_post[t][..., None] * f
        for t in range(N)
    ]


def depth_attention(p: Params, at: str, streams: State) -> Tensor:
    """sum_i softmax_i(w . RMSNorm(v_i)) v_i."""
    keys = [
        v / torch.sqrt((v * v).mean(-1, keepdim=True) + EPS) * p[f"{at}weight"] for v in streams
    ]
    shares = [torch.exp(key @ p[f"{at}query"])[..., None] for key in keys]
    return sum(a * v for a, v in zip(shares, streams, strict=True)) / sum(shares)


def attnres(c: Case, skip: State, branch: State) -> State:
    h = depth_attention(c.p, "depth_attention.", branch)
    return [*(v.clone() for v in skip), c.f(c.ln("before", h))]


def denseformer(c: Case, skip: State, branch: State) -> State:
    earlier, x = (skip[:-1], skip[-1]) if c.number else (skip, skip[0])
    x = x + c.f(c.ln("before", branch[-1]))
    earlier = [v.clone() for v in earlier]
    if (c.number + 1) % c.spec.units_per_block:
        return [*earlier, x]
    alpha = c.p["average.weight"]
    y = sum(a * v for a, v in zip(alpha, [*skip[: len(earlier)], x], strict=True))
    return [*earlier, x.clone(), y]


def value_residual(c: Case, skip: State, branch: State) -> State:
    normed = c.ln("before", branch[0])
    if not c.mixes:
        return [skip[0] + ffn(c, normed), skip[1].clone()]
    own = affine(c.p, "branch.v", normed)
    if c.number == 0:
        return [skip[0] + attend(c, normed, own), own.clone()]
    mixed = attend(c, normed, 0.5 * branch[1] + 0.5 * own)
    return [skip[0] + mixed, skip[1].clone()]


EQUATIONS: dict[str, Callable[[Case, State, State], State]] = {
    "b2t": b2t,
    "residual-dual": residual_dual,
    "siamesenorm": siamesenorm,
    "hyper-connections": hyper_connections,
    "mhc": mhc,
    "mhc-uniform": mhc,
    "attnres": attnres,
    "denseformer": denseformer,
    "value-residual": value_residual,
}

OUTPUTS: dict[str, Callable[[Params, State], Tensor]] = {
    "b2t": lambda _, s: s[0],
    "residual-dual": lambda p, s: s[0] + norm(p, "norm", s[1]),
    "siamesenorm": lambda p, s: norm(p, "norm", norm(p, "norm_p", s[0]) + norm(p, "norm_y", s[1])),
    "hyper-connections": lambda _, s: s[0] + s[1] + s[2] + s[3],
    "mhc": lambda _, s: (s[0] + s[1] + s[2] + s[3]) / 4,
    "mhc-uniform": lambda _, s: (s[0] + s[1] + s[2] + s[3]) / 4,
    "attnres": lambda p, s: depth_attention(p, "", s),
    "denseformer": lambda _, s: s[-1],
    "value-residual": lambda _, s: s[0],
}


@dataclass
class Step:
    """One unit: its case, its input and its output; `params` as `oracle.param_columns` wants."""

    case: Case
    x: State
    y: State

    @property
    def layer(self) -> int:
        return self.case.layer

    @property
    def kind(self) -> str:
        return self.case.kind

    @property
    def params(self) -> Params:
        return self.case.p


@dataclass
class Pass:
    """The whole stack: its units, its output, and the weights of the readout."""

    steps: list[Step]
    output: Tensor
    readout: Params


def backward(spec: StackSpec, net: Network) -> Pass:
    """All units in one autograd graph, after its backward pass; gradients are kept everywhere."""
    state = [net.x.double().requires_grad_()]
    steps: list[Step] = []
    equation = EQUATIONS[str(spec.scheme)]
    for layer, block in enumerate(net.blocks, start=1):
        for built, kind in zip(block, spec.kind.units, strict=True):
            case = Case(spec, len(steps), layer, kind, doubles(built))
            y = equation(case, state, state)
            for stream in y:
                stream.retain_grad()
            steps.append(Step(case, state, y))
            state = y
    readout = doubles(net.loss.readout) if hasattr(net.loss, "readout") else {}
    output = OUTPUTS[str(spec.scheme)](readout, state)
    output.retain_grad()
    loss_at(spec, getattr(net.loss, "loss", net.loss), output).backward()
    return Pass(steps, output, readout)


def loss_at(spec: StackSpec, loss: torch.nn.Module, y: Tensor) -> Tensor:
    """The loss of an output; the head normalises it first where the scheme has a final norm."""
    if spec.loss == "cotangent":
        return (y * loss.v.double()).sum()
    if spec.loss == "mse":
        return ((y - loss.target.double()) ** 2).mean()
    p = doubles(loss)
    y = norm(p, "norm", y) if "norm.weight" in p else y
    logits = affine(p, "project", y.flatten(0, 1))
    chosen = logits[torch.arange(len(logits)), loss.labels]
    return (torch.logsumexp(logits, 1) - chosen).mean()


def stacked(streams: State) -> Tensor:
    return streams[0] if len(streams) == 1 else torch.stack(streams, 1)


def gradient(streams: State) -> Tensor:
    """Of a state; zero where a stream is used no more."""
    return stacked([torch.zeros_like(x) if x.grad is None else x.grad for x in streams])


def state_columns(state: State) -> Columns:
    """The columns that every row has, of all streams together."""
    y, g = stacked(state).detach(), gradient(state)
    tokens = y if y.ndim == 3 else y.flatten(0, 1)
    return stream_columns(y, g) | {"act_cos": act_cosine(tokens)}


def part_columns(step: Step) -> Columns:
    """The gain and its parts, from two leaves for each stream of the input."""
    g, size_g = gradient(step.y), size(gradient(step.y))
    skip, branch = ([x.detach().clone().requires_grad_() for x in step.x] for _ in range(2))
    y = stacked(EQUATIONS[str(step.case.spec.scheme)](step.case, skip, branch))
    grads = torch.autograd.grad(y, [*skip, *branch], g, allow_unused=True)
    full = [
        torch.zeros_like(x) if d is None else d
        for x, d in zip([*skip, *branch], grads, strict=True)
    ]
    s, b = stacked(full[: len(skip)]), stacked(full[len(skip) :])
    return {
        "gain": size(gradient(step.x)) / size_g,
        "skip_gain": size(s) / size_g,
        "branch_gain": size(b) / size_g,
        "skip_branch_cos": (s * b).sum().item() / (size(s) * size(b)),
    }


def unit_columns(step: Step) -> Columns:
    """One row of `layers.csv`."""
    weights = torch.cat([p.detach().flatten() for p in step.params.values()])
    grads = torch.cat([p.grad.flatten() for p in step.params.values()])
    return {
        "layer": step.layer,
        "unit": step.kind,
        **state_columns(step.y),
        **part_columns(step),
        "param_norm": size(weights),
        "param_grad_norm": size(grads),
        "log10_param_grad_norm": log10(size(grads)),
    }


def measure(spec: StackSpec, net: Network) -> tuple[list[Columns], list[Columns]]:
    """What `layers.csv` and `params.csv` have to say, timings and bytes aside."""
    steps = backward(spec, net).steps
    first = {"layer": 0, "unit": "input", **state_columns(steps[0].x)}
    layers = [first, *(unit_columns(step) for step in steps)]
    return layers, [row for step in steps for row in param_columns(step)]
