"""The engine's double: slow, obvious, and without a line of the engine's arithmetic.

Every unit is written out from its equation in plain float64 tensor operations, one autograd graph
spans the stack, and every column is computed from its meaning as `gradflow.runs.records` states it.
Taken from the package are only numbers: the weights of the built blocks, the input, and the loss's
cotangent, target and labels.

Axes: B batch, T tokens, d width, h heads, C channels, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradflow.engine.tape import Network
from gradflow.specs.stack import StackSpec

GROUPS = 8

Params = dict[str, Tensor]
Columns = dict[str, Any]

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu-tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "tanh": torch.tanh,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "erf": torch.erf,
    "linear": lambda x: x,
}


def affine(p: Params, at: str, x: Tensor) -> Tensor:
    """W x + b over the last axis."""
    y = x @ p[f"{at}.weight"].T
    return y + p[f"{at}.bias"] if f"{at}.bias" in p else y


def conv3x3(p: Params, at: str, x: Tensor) -> Tensor:
    """Zero-padded 3x3 convolution."""
    return torch.nn.functional.conv2d(x, p[f"{at}.weight"], p.get(f"{at}.bias"), padding=1)


def standardise(x: Tensor, over: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over some axes."""
    centred = x - x.mean(over, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(over, keepdim=True) + eps)


def normalise(spec: StackSpec, x: Tensor) -> Tensor:
    """The norm of the spec, without its affine map."""
    images, others, eps = x.ndim == 4, tuple(range(x.ndim)), spec.norm_eps
    match spec.norm_kind:
        case "layernorm":
            return standardise(x, others[1:] if images else others[-1:], eps)
        case "rmsnorm":
            return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)
        case "batchnorm":
            return standardise(x, (0, 2, 3) if images else others[:-1], eps)
        case "groupnorm":
            groups = x.reshape(x.shape[0], GROUPS, -1)
            return standardise(groups, (2,), eps).reshape(x.shape)
    raise ValueError(spec.norm_kind)


def pointwise(spec: StackSpec, p: Params, at: str, x: Tensor) -> Tensor:
    """tanh(alpha x) and erf(alpha x + shift), in the place of a norm."""
    if spec.norm_kind == "dyt":
        return torch.tanh(p[f"{at}.alpha"] * x)
    return torch.erf(p[f"{at}.alpha"] * x + p[f"{at}.shift"])


def norm(spec: StackSpec, p: Params, at: str, x: Tensor) -> Tensor:
    """The norm of the spec and its affine map, per feature or channel."""
    over = (1, -1, 1, 1) if x.ndim == 4 else (-1,)
    is_pointwise = spec.norm_kind in ("dyt", "derf")
    y = pointwise(spec, p, at, x) if is_pointwise else normalise(spec, x)
    y = y * p[f"{at}.weight"].view(over)
    return y + p[f"{at}.bias"].view(over) if f"{at}.bias" in p else y


def mlp(spec: StackSpec, p: Params, x: Tensor) -> Tensor:
    return PHI[spec.activation](affine(p, "branch.linear", x))


def conv(spec: StackSpec, p: Params, x: Tensor) -> Tensor:
    return PHI[spec.activation](conv3x3(p, "branch.conv", x))


def resnet(spec: StackSpec, p: Params, x: Tensor) -> Tensor:
    """He et al. 2015 (post) and 2016 (pre); none is pre without its norms."""
    phi = PHI[spec.activation]
    if spec.norm == "post":
        hidden = phi(norm(spec, p, "branch.norm1", conv3x3(p, "branch.conv1", x)))
        return norm(spec, p, "branch.norm2", conv3x3(p, "branch.conv2", hidden))
    for i in (1, 2):
        x = norm(spec, p, f"branch.norm{i}", x) if spec.norm == "pre" else x
        x = conv3x3(p, f"branch.conv{i}", phi(x))
    return x


def rotated(spec: StackSpec, x: Tensor) -> Tensor:
    """Feature pairs (i, i + c/2) as complex numbers, times e^(i angle); x: (B, T, h, c).

    Angles, cosines and sines are float32's, as the published models have them.
    """
    if not spec.rope:
        return x
    half = x.shape[-1] // 2
    speed = 1.0 / spec.rope ** (torch.arange(half).float() / half)
    angles = torch.arange(x.shape[1]).float()[:, None] * speed
    turns = torch.complex(angles.cos(), angles.sin()).to(torch.complex128)
    turned = torch.complex(x[..., :half], x[..., half:]) * turns[None, :, None]
    return torch.cat([turned.real, turned.imag], -1)


def attention(spec: StackSpec, p: Params, x: Tensor) -> Tensor:
    """out(concat_h softmax(q k^T / sqrt(c)) v), head by head; keys and values in groups."""
    size = spec.head_dim or spec.width // spec.heads
    q, k, v = (affine(p, f"branch.{at}", x).unflatten(-1, (-1, size)) for at in "qkv")
    if spec.qk_norm:
        q = norm(spec, p, "branch.q_norm", q.flatten(0, 1)).view(q.shape)
        k = norm(spec, p, "branch.k_norm", k.flatten(0, 1)).view(k.shape)
    q, k = rotated(spec, q), rotated(spec, k)
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() & bool(spec.causal)
    mixed = []
    for head in range(spec.heads):
        group = head * k.shape[2] // spec.heads
        logits = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(size)
        logits = logits.masked_fill(future, -math.inf)
        weights = torch.exp(logits - logits.amax(-1, keepdim=True).detach())
        mixed.append(weights / weights.sum(-1, keepdim=True) @ v[:, :, group])
    return affine(p, "branch.out", torch.cat(mixed, -1))


def ffn(spec: StackSpec, p: Params, x: Tensor) -> Tensor:
    up, phi = affine(p, "branch.up", x), PHI[spec.activation]
    hidden = phi(affine(p, "branch.gate", x)) * up if spec.gated else phi(up)
    return affine(p, "branch.down", hidden)


BRANCHES = {"mlp": mlp, "conv": conv, "resnet": resnet, "attention": attention, "ffn": ffn}


def unit(spec: StackSpec, kind: str, p: Params, skip: Tensor, branch: Tensor) -> Tensor:
    """y from the two uses of x; a plain unit ignores the first."""
    inside = kind == "resnet"
    if spec.norm == "pre" and not inside:
        branch = norm(spec, p, "before", branch)
    y = BRANCHES[kind](spec, p, branch)
    y = skip + y if spec.shortcut == "residual" else y
    if spec.norm == "post":
        y = PHI[spec.activation](y) if inside else norm(spec, p, "after", y)
    return y


def cross_entropy(spec: StackSpec, p: Params, labels: Tensor, y: Tensor) -> Tensor:
    """Head and loss: a final norm if pre-norm, mean over pixels, projection, -log softmax."""
    y = norm(spec, p, "norm", y) if spec.norm == "pre" else y
    rows = y.mean((2, 3)) if y.ndim == 4 else y.reshape(-1, y.shape[-1])
    logits = affine(p, "project", rows)
    chosen = logits[torch.arange(len(rows)), labels]
    return (torch.log(torch.exp(logits).sum(1)) - chosen).mean()


def total_loss(spec: StackSpec, loss: torch.nn.Module, y: Tensor) -> Tensor:
    """The scalar that the gradient is of."""
    match spec.loss:
        case "cotangent":
            return (y * loss.v.double()).sum()
        case "mse":
            return ((y - loss.target.double()) ** 2).sum() / y.numel()
    return cross_entropy(spec, doubles(loss), loss.labels, y)


def doubles(module: torch.nn.Module) -> Params:
    """The weights of a built module as float64 leaves."""
    return {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}


@dataclass
class Step:
    """One unit: where it stands, its weights, its input x and its output y."""

    layer: int
    kind: str
    params: Params
    x: Tensor
    y: Tensor


def forward(spec: StackSpec, network: Network) -> list[Step]:
    """All units in one autograd graph, the gradient retained at every output."""
    x = network.x.double().requires_grad_()
    steps = []
    for layer, block in enumerate(network.blocks, start=1):
        for built, kind in zip(block, spec.kind.units, strict=True):
            p = doubles(built)
            y = unit(spec, kind, p, x, x)
            y.retain_grad()
            steps.append(Step(layer, kind, p, x, y))
            x = y
    return steps


def size(x: Tensor) -> float:
    """Euclidean norm."""
    return (x.double() ** 2).sum().sqrt().item()


def log10(x: float) -> float:
    return math.log10(x) if x > 0 else -math.inf


def mean_cosine(rows: Tensor) -> float | None:
    """Mean over all pairs i != j of cos(row i, row j), pair by pair."""
    n = len(rows)
    if n < 2:
        return None
    lengths = (rows**2).sum(1).sqrt()
    cosines = (rows @ rows.T) / (lengths[:, None] * lengths[None, :])
    return cosines[~torch.eye(n, dtype=torch.bool)].mean().item()


def act_cosine(y: Tensor) -> float | None:
    """Between the tokens of each sample; between samples where there are no tokens."""
    if y.ndim != 3:
        return mean_cosine(y.flatten(1))
    each = [mean_cosine(sample) for sample in y]
    return None if None in each else sum(each) / len(each)


def stream_columns(y: Tensor, g: Tensor) -> Columns:
    """The columns that every row has, the input's too."""
    return {
        "act_rms": (y**2).mean().sqrt().item(),
        "act_max_abs": y.abs().max().item(),
        "act_cos": act_cosine(y),
        "grad_norm": size(g),
        "log10_grad_norm": log10(size(g)),
        "grad_cos": mean_cosine(g.flatten(1)),
        "nonfinite": (~torch.isfinite(g)).sum().item(),
        "zero_fraction": (g == 0).double().mean().item(),
    }


def gain_columns(spec: StackSpec, step: Step) -> Columns:
    """|dL/dx| / |dL/dy|, and its parts by one `autograd.grad` for each use of x."""
    g, gain = step.y.grad, size(step.x.grad) / size(step.y.grad)
    if spec.shortcut == "plain":
        return {"gain": gain, "skip_gain": 0.0, "branch_gain": gain, "skip_branch_cos": None}
    skip, branch = (step.x.detach().clone().requires_grad_() for _ in range(2))
    y = unit(spec, step.kind, step.params, skip, branch)
    (s,) = torch.autograd.grad(y, skip, g, retain_graph=True)
    (b,) = torch.autograd.grad(y, branch, g)
    return {
        "gain": gain,
        "skip_gain": size(s) / size(g),
        "branch_gain": size(b) / size(g),
        "skip_branch_cos": (s * b).sum().item() / (size(s) * size(b)),
    }


def param_columns(step: Step) -> list[Columns]:
    """One row per parameter of a unit."""
    return [
        {
            "layer": step.layer,
            "unit": step.kind,
            "param": name,
            "shape": "x".join(str(n) for n in p.shape),
            "numel": p.numel(),
            "norm": size(p.detach()),
            "grad_norm": size(p.grad),
            "log10_grad_norm": log10(size(p.grad)),
            "nonfinite": (~torch.isfinite(p.grad)).sum().item(),
        }
        for name, p in step.params.items()
    ]


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


def measure(spec: StackSpec, network: Network) -> tuple[list[Columns], list[Columns]]:
    """What `layers.csv` and `params.csv` have to say of a network, timings and bytes aside."""
    steps = forward(spec, network)
    total_loss(spec, network.loss, steps[-1].y).backward()
    x = steps[0].x
    first = {"layer": 0, "unit": "input", **stream_columns(x.detach(), x.grad)}
    layers = [first, *(unit_columns(spec, step) for step in steps)]
    return layers, [row for step in steps for row in param_columns(step)]
