"""The tasks: floor and chance against computations of another kind, and the samples themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import CPU, small
from scipy.integrate import quad
from scipy.stats import norm

from gradflow.networks.ends import stream_shape
from gradflow.specs.stack import StackSpec
from gradflow.training.tasks import (
    SEPARATION,
    MarkovTask,
    PrototypeTask,
    prototype_floor,
    samples_of,
)

MARKOV = small("transformer", seq_len=32, batch_size=8, classes=6)
IMAGES = small("conv", image_size=4, batch_size=8, classes=5)
VECTORS = small("mlp", batch_size=8, classes=5)


def entropy(p: np.ndarray) -> float:
    return -sum(value * math.log(value) for value in p if value > 0)


def solved(transitions: np.ndarray) -> np.ndarray:
    """The stationary distribution as the left eigenvector with eigenvalue 1."""
    values, vectors = np.linalg.eig(transitions.T)
    vector = vectors[:, np.argmin(abs(values - 1))].real
    return vector / vector.sum()


# The Markov source


def test_the_floor_is_the_entropy_rate_and_chance_the_entropy_of_the_states() -> None:
    task = MarkovTask(samples_of(MARKOV), CPU)
    p = task.transitions.numpy()
    assert p.sum(1) == pytest.approx(np.ones(6), rel=1e-12)
    pi = solved(p)
    assert task.stationary.numpy() == pytest.approx(pi, rel=1e-9)
    rate = sum(pi[i] * entropy(p[i]) for i in range(6))
    assert task.floor == pytest.approx(rate, rel=1e-9)
    assert task.chance == pytest.approx(entropy(pi), rel=1e-9)
    assert 0 < task.floor < task.chance < math.log(6)


def losses_of_best(task: MarkovTask, steps: int, ahead: int = 0) -> list[float]:
    """Batch losses of the model that knows the transitions; `ahead` shifts its guesses."""
    found = []
    for step in range(steps):
        batch = task.batch(0, step)
        p = task.transitions[batch.x.flatten(), (batch.labels + ahead) % 6]
        found.append(float(-p.log().mean()))
    return found


def test_the_true_conditional_distribution_attains_the_floor() -> None:
    task = MarkovTask(samples_of(MARKOV), CPU)
    losses = losses_of_best(task, 400)
    error = np.std(losses) / math.sqrt(len(losses))
    assert error < 0.02
    assert abs(np.mean(losses) - task.floor) < 4 * error
    # The control: the same distribution one state off is far from it.
    assert np.mean(losses_of_best(task, 20, ahead=1)) > task.floor + 0.5


def test_sequences_follow_the_chain_from_its_stationary_start() -> None:
    spec = small("ffn", seq_len=20, batch_size=4000, classes=6)
    task = MarkovTask(samples_of(spec), CPU)
    batch = task.batch(3, 0)
    labels = batch.labels.view(4000, 20)
    assert torch.equal(batch.x[:, 1:], labels[:, :-1])
    for place in (0, 19):
        share = torch.bincount(batch.x[:, place], minlength=6) / 4000
        assert torch.allclose(share.double(), task.stationary, atol=0.04)
    pairs = torch.bincount(6 * batch.x.flatten() + batch.labels, minlength=36).view(6, 6).double()
    assert torch.allclose(
        pairs / pairs.sum(), task.stationary[:, None] * task.transitions, atol=0.01
    )


# Prototypes in noise


@pytest.mark.parametrize("separation", [0.5, 2.0, 4.0])
def test_the_floor_of_two_prototypes_is_a_one_dimensional_integral(separation: float) -> None:
    def integrand(n: float) -> float:
        # z_2 - z_1 = -a + sqrt(2) n, so the logit of the wrong class is -a^2 + sqrt(2) a n.
        return norm.pdf(n) * np.logaddexp(0, -(separation**2) + math.sqrt(2) * separation * n)

    expected, error = quad(integrand, -12, 12, epsabs=1e-12, limit=200)
    assert error < 1e-9
    assert prototype_floor(2, separation) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_the_floor_of_many_prototypes_is_that_of_monte_carlo(classes: int) -> None:
    z = np.random.default_rng(0).normal(size=(40_000, classes)) * 2.0
    z[:, 0] += 4.0
    top = z.max(1)
    losses = np.log(np.exp(z - top[:, None]).sum(1)) + top - z[:, 0]
    error = losses.std() / math.sqrt(len(losses))
    assert error < 0.01
    assert abs(prototype_floor(classes, 2.0) - losses.mean()) < 4 * error


def test_without_separation_the_floor_is_chance() -> None:
    for classes in (2, 10, 1000):
        assert prototype_floor(classes, 1e-6) == pytest.approx(math.log(classes), abs=1e-9)


@pytest.mark.parametrize("spec", [VECTORS, IMAGES], ids=["vectors", "images"])
def test_the_bayes_posterior_attains_the_floor_on_the_samples(spec: StackSpec) -> None:
    task = PrototypeTask(samples_of(spec), CPU)
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(task.prototypes @ task.prototypes.T, eye, atol=1e-12)
    losses = []
    for step in range(500):
        batch = task.batch(0, step)
        assert batch.x.shape == stream_shape(spec)
        x = batch.x.double().view(8, spec.width, -1)
        x = x.sum(-1) / math.sqrt(x.shape[-1])
        losses.append(
            torch.nn.functional.cross_entropy(
                SEPARATION * x @ task.prototypes.T, batch.labels, reduction="none"
            )
        )
    each = torch.cat(losses)
    error = float(each.std() / math.sqrt(len(each)))
    assert error < 0.01
    assert abs(float(each.mean()) - task.floor) < 4 * error
    assert task.chance == math.log(5)


@pytest.mark.parametrize("spec", [MARKOV, VECTORS, IMAGES], ids=["tokens", "vectors", "images"])
def test_a_batch_depends_on_seed_and_step_alone(spec: StackSpec) -> None:
    kind = MarkovTask if spec is MARKOV else PrototypeTask
    first, again = kind(samples_of(spec), CPU), kind(samples_of(spec), CPU)
    torch.manual_seed(7)
    a, b = first.batch(1, 5), again.batch(1, 5)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.labels, b.labels)
    for other in (first.batch(2, 5), first.batch(1, 6)):
        assert not torch.equal(a.x, other.x)
    assert (first.floor, first.chance) == (again.floor, again.chance)
