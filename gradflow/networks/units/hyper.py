"""Hyper-connections: n copies of the stream, read, mixed and written to by small matrices.

Axes: B batch, n streams (s, t), T tokens, d width. H is the state (B, n, T, d). The matrices are
those of the papers, one set for each token: how f's input is read from the streams, how the
streams mix, how f's output is written to them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from gradflow.networks.initial import ConstantStart
from gradflow.networks.norms import Norm
from gradflow.networks.units.template import KIND_EPS, StreamUnit
from gradflow.schemes import Wiring
from gradflow.specs.stack import StackSpec

_SCALE = 0.01  # s and alpha at the start, in both papers


class HyperConnection(ConstantStart):
    """The matrices of Zhu et al. 2024 (arXiv:2409.19606), Eqs. 10 to 14.

        A_m(H) = s_a tanh(N(H) W_m) + A_m,  A_r(H) = s_a tanh(N(H) W_r) + A_r,
        B(H) = s_b tanh(N(H) W_b) + B

    N is the paper's LayerNorm over d, whatever `--norm-kind` is. At the start W = 0, s = 0.01,
    A_m = e_stream, A_r = 1, B = (1, ..., 1): the residual stream of pre-norm, n times.
    """

    a_m: Tensor
    a_r: Tensor
    b: Tensor
    w_m: Tensor
    w_r: Tensor
    w_b: Tensor
    s_a: Tensor
    s_b: Tensor

    def __init__(self, width: int, n: int, stream: int) -> None:
        super().__init__()
        self.shapes = {
            **{"a_m": (n,), "a_r": (n, n), "b": (n,)},
            **{"w_m": (width,), "w_r": (width, n), "w_b": (width,), "s_a": (1,), "s_b": (1,)},
        }
        self.starts = {
            **{"a_m": torch.eye(n)[stream], "a_r": torch.eye(n), "b": 1.0},
            **{"w_m": 0.0, "w_r": 0.0, "w_b": 0.0, "s_a": _SCALE, "s_b": _SCALE},
        }
        self.norm = Norm("layernorm", "tokens", width, KIND_EPS)

    def read(self, h: Tensor) -> Tensor:
        """Return A_m^T H, the input of f: (B, T, d)."""
        weights = self.s_a * torch.tanh(self.norm(h) @ self.w_m) + self.a_m[:, None]
        return (weights.unsqueeze(-1) * h).sum(1)

    def mix(self, h: Tensor) -> Tensor:
        """Return the mixed streams A_r^T H: (B, n, T, d)."""
        weights = self.s_a * torch.tanh(self.norm(h) @ self.w_r) + self.a_r[:, None, :]
        return torch.einsum("bstu,bstd->butd", weights, h)

    def write(self, h: Tensor, f: Tensor) -> Tensor:
        """Return what f adds to the streams, B^T f: (B, n, T, d)."""
        weights = self.s_b * torch.tanh(self.norm(h) @ self.w_b) + self.b[:, None]
        return weights.unsqueeze(-1) * f.unsqueeze(1)


class ManifoldConnection(ConstantStart):
    """The matrices of mHC, Xie et al. 2025 (arXiv:2512.24880), Eqs. 7 to 9.

        x = RMS(vec H),  H_pre = sigma(a_pre x phi_pre + b_pre),
        H_post = 2 sigma(a_post x phi_post + b_post),  H_res = Sinkhorn(a_res x phi_res + b_res)

    RMS over all n d numbers of a token, its weight absorbed in phi. At the start phi = 0 and
    a = 0.01, so the biases alone act.
    """

    b_pre: Tensor
    b_post: Tensor
    b_res: Tensor
    phi_pre: Tensor
    phi_post: Tensor
    phi_res: Tensor
    a_pre: Tensor
    a_post: Tensor
    a_res: Tensor

    def __init__(self, width: int, n: int, pre: float, off_diagonal: float) -> None:
        super().__init__()
        self.n = n
        sizes = {"pre": n, "post": n, "res": n * n}
        self.shapes = {
            **{"b_pre": (n,), "b_post": (n,), "b_res": (n, n)},
            **{f"phi_{name}": (n * width, size) for name, size in sizes.items()},
            **{f"a_{name}": (1,) for name in sizes},
        }
        beside = off_diagonal * (1 - torch.eye(n))
        self.starts = {
            **{"b_pre": pre, "b_post": 0.0, "b_res": beside},
            **{f"phi_{name}": 0.0 for name in sizes},
            **{f"a_{name}": _SCALE for name in sizes},
        }

    def read(self, h: Tensor) -> Tensor:
        """Return H_pre H, the input of f: (B, T, d)."""
        weights = torch.sigmoid(self.a_pre * (_token(h) @ self.phi_pre) + self.b_pre)
        return torch.einsum("bts,bstd->btd", weights, h)

    def mix(self, h: Tensor) -> Tensor:
        """Return the mixed streams H_res H: (B, n, T, d)."""
        batch, _, tokens, _ = h.shape
        dynamic = (_token(h) @ self.phi_res).view(batch, tokens, self.n, self.n)
        weights = sinkhorn(self.a_res * dynamic + self.b_res)
        return torch.einsum("btus,bstd->butd", weights, h)

    def write(self, h: Tensor, f: Tensor) -> Tensor:
        """Return what f adds to the streams, H_post^T f: (B, n, T, d)."""
        weights = 2 * torch.sigmoid(self.a_post * (_token(h) @ self.phi_post) + self.b_post)
        return torch.einsum("bts,btd->bstd", weights, f)


def _token(h: Tensor) -> Tensor:
    """Return all streams of a token side by side, root mean square 1: (B, T, n d)."""
    flat = h.transpose(1, 2).flatten(2)
    return F.rms_norm(flat, flat.shape[-1:], eps=KIND_EPS)


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """Return exp(logits), columns and rows scaled to sum 1 in turn: (..., n, n).

    Eq. 9 of Xie et al. 2025: rows come last, so these sum to 1 exactly and columns nearly;
    20 iterations are the paper's. Sinkhorn & Knopp 1967.
    """
    m = torch.exp(logits)
    for _ in range(iterations):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


class HyperUnit(StreamUnit):
    """H' = mix(H) + write(H, f(read(H))), n copies of the input at the start.

    Skip: H as it is mixed, and as the dynamic weights of mix and write see it; branch: H as it
    is read into f.
    """

    connection: HyperConnection | ManifoldConnection

    def __init__(self, spec: StackSpec, wiring: Wiring, name: str) -> None:
        super().__init__(spec, wiring, name)
        self.n = int(wiring.settings["streams"])
        self.connection = self.connect(spec, wiring)

    def step(self, x_skip: Tensor, x_branch: Tensor) -> Tensor:
        skip, branch = (self.state(x, self.n) for x in (x_skip, x_branch))
        f = self.f(self.connection.read(branch))
        return self.connection.mix(skip) + self.connection.write(skip, f)

    def connect(self, spec: StackSpec, wiring: Wiring) -> HyperConnection | ManifoldConnection:
        """Return the matrices: f reads stream number `settings["stream"]` at the start."""
        return HyperConnection(spec.width, self.n, int(wiring.settings["stream"]))


class ManifoldUnit(HyperUnit):
    """The unit of mHC: a `HyperUnit` with its matrices, whose biases are in `settings`."""

    def connect(self, spec: StackSpec, wiring: Wiring) -> HyperConnection | ManifoldConnection:
        """Return the matrices of mHC with the biases of the settings."""
        settings = wiring.settings
        return ManifoldConnection(
            spec.width, self.n, float(settings["pre"]), float(settings["off_diagonal"])
        )
