"""Tasks with a known optimum: a Markov source, and prototypes in noise.

No model has a smaller expected cross-entropy than the floor, and one that knows the task has the
floor; the best that a model can do without looking at its input is chance. All are in nats. A
task is fixed by the specification; its batches by seed and step, so that any can be drawn again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from gradflow.networks.ends import stream_shape
from gradflow.networks.initial import generator
from gradflow.specs.stack import StackSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Floats = NDArray[np.float64]

_CPU = torch.device("cpu")
# Logits of the transition probabilities are normal with this standard deviation.
_SHARPNESS = 2.0
# Length of a prototype over the standard deviation of the noise in one direction.
SEPARATION = 4.0


@dataclass(frozen=True)
class Batch:
    """One batch of a task: the input x of a model, and the labels that it predicts.

    They are ids (B, T) and the next ids (B * T,), or samples like the stream and labels (B,).
    """

    x: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Samples:
    """The samples of a task: how many symbols or prototypes, and the shape of a batch.

    The shape is (B, T) of ids, or (B, C, ...) of vectors or images in the number format `dtype`.
    """

    classes: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class Task(Protocol):
    """A source of batches with the floor and the chance level of the cross-entropy."""

    floor: float
    chance: float

    def batch(self, seed: int, step: int) -> Batch:
        """Return the batch of one step; every step has new samples."""
        ...


class MarkovTask:
    """Next-token prediction on a Markov chain with `classes` states.

    P = softmax(2 N(0, 1)) row by row; sequences start in the stationary distribution pi. The floor
    is the entropy rate, -sum_i pi_i sum_j P_ij log P_ij (Cover & Thomas 2006, theorem 4.2.4), and
    chance the entropy of pi.
    """

    def __init__(self, samples: Samples, device: torch.device) -> None:
        logits = torch.empty(samples.classes, samples.classes, dtype=torch.float64)
        logits.normal_(generator=generator(_CPU, 0, "transitions"))
        self.transitions = torch.softmax(_SHARPNESS * logits, dim=1)
        self.stationary = stationary(self.transitions)
        rates = torch.special.entr(self.transitions).sum(1)
        self.floor = float(self.stationary @ rates)
        self.chance = float(torch.special.entr(self.stationary).sum())
        self._shape = samples.shape
        self._start = self.stationary.cumsum(0).to(device)
        self._next = self.transitions.cumsum(1).to(device)

    def batch(self, seed: int, step: int) -> Batch:
        """Return sequences of T + 1 states: the first T are seen, the last T predicted."""
        device, (samples, tokens) = self._start.device, self._shape
        u = torch.empty(tokens + 1, samples, 1, dtype=torch.float64, device=device)
        u.uniform_(generator=generator(device, seed, "batch", step))
        state = _inverse(self._start, u[0])
        states = [state]
        for draw in u[1:]:
            state = _inverse(self._next[state], draw)
            states.append(state)
        ids = torch.stack(states, dim=1)
        return Batch(ids[:, :-1], ids[:, 1:].flatten())


def _inverse(cumulative: Tensor, u: Tensor) -> Tensor:
    """Return the state whose stretch of the unit interval holds u. (..., K), (B, 1) to (B,)."""
    # The last sum is 1 but for rounding, so it bounds nothing.
    return (cumulative[..., :-1] <= u).sum(-1)


def stationary(transitions: Tensor) -> Tensor:
    """Return pi with pi P = pi and sum pi = 1, P positive. (K, K) to (K,).

    P is squared until it is P^(2^20), all rows of which are pi.
    """
    power = transitions
    for _ in range(20):
        power = power @ power
        power = power / power.sum(1, keepdim=True)  # or rounding would grow with the power
    return power[0]


class PrototypeTask:
    """Classification: which of `classes` prototypes lies under standard normal noise?

    x = a u_k + noise with orthonormal u_k, a = 4 and k uniform. For images u_k is a colour:
    constant over the pixels. Only the projections z_j = u_j x tell the classes apart, and the best
    model has the logits a z_j. Chance is log K.
    """

    def __init__(self, samples: Samples, device: torch.device) -> None:
        self._samples, self._device = samples, device
        draw = torch.empty(samples.shape[1], samples.classes, dtype=torch.float64)
        draw.normal_(generator=generator(_CPU, 0, "prototypes"))
        self.prototypes = torch.linalg.qr(draw).Q.T.to(device)
        self.floor = prototype_floor(samples.classes, SEPARATION)
        self.chance = math.log(samples.classes)

    def batch(self, seed: int, step: int) -> Batch:
        """Return samples with the shape of the stream, and their classes."""
        shape, source = self._samples.shape, generator(self._device, seed, "batch", step)
        noise = torch.empty(shape, device=self._device).normal_(generator=source)
        labels = torch.randint(
            self._samples.classes, shape[:1], generator=source, device=self._device
        )
        pixels = math.prod(shape[2:])
        mean = SEPARATION / math.sqrt(pixels) * self.prototypes[labels]
        x = noise + mean.view(*shape[:2], *(1 for _ in shape[2:]))
        return Batch(x.to(self._samples.dtype), labels)


# Grid of the floor's two integrals, and the ends of the outer one. Both integrands are analytic
# and vanish at the ends, where the trapezoidal rule is exact but for rounding: below 1e-9.
_FINE, _LOWEST, _HIGHEST, _DEVIATIONS = 0.05, -60.0, 40.0, 10.0


def prototype_floor(classes: int, separation: float) -> float:
    """Return the cross-entropy of the best model of `PrototypeTask`, in nats.

    With z = noise + a e_k it is E log S - a^2, where S = sum_j exp(a z_j) is a sum of independent
    terms. Frullani's integral log S = int_0^oo (e^-t - e^-tS) dt/t, with t = e^u, makes the mean
    of the exponential a product: E e^-tS = E exp(-t e^(a n + a^2)) (E exp(-t e^(a n)))^(K-1).

    Args:
        classes: K, the number of prototypes.
        separation: a.
    """
    n = np.arange(-_DEVIATIONS, _DEVIATIONS + _FINE, _FINE)
    density = np.exp(-(n**2) / 2)
    density /= density.sum()  # or the rounding of its sum would be raised to K - 1
    # S e^(-a^2) is of order 1, and its logarithm is what remains once a^2 is subtracted.
    u = np.arange(_LOWEST, _HIGHEST, _FINE)[:, None]
    own = _laplace(u + separation * n) @ density
    other = _laplace(u + separation * n - separation**2) @ density
    return float(_FINE * (_laplace(u[:, 0]) - own * other ** (classes - 1)).sum())


def _laplace(log: _Floats) -> _Floats:
    """Return exp(-e^log), which is 0 long before e^log overflows."""
    return np.exp(-np.exp(np.minimum(log, 20.0)))


def build_task(spec: StackSpec, device: torch.device) -> Task:
    """Return the task that fits the stream of a stack: a source of tokens, or prototypes."""
    make = MarkovTask if spec.kind.domain == "tokens" else PrototypeTask
    return make(samples_of(spec), device)


def samples_of(spec: StackSpec) -> Samples:
    """Return the classes, shape and dtype of a stack's task."""
    shape = stream_shape(spec)
    ids = spec.kind.domain == "tokens"
    return Samples(spec.classes, shape[:2] if ids else shape, getattr(torch, spec.dtype))
