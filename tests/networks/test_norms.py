"""Norms in half precision: each number is the float64 one, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from gradflow.networks.norms import HALF, NORMALISE, Normalise, unit_norm

SHAPES = {"vectors": (64, 256), "tokens": (4, 32, 256), "images": (8, 32, 8, 8)}
# A mean beside the spread: statistics in half precision would lose digits on it.
MEAN = 10.0
Found = tuple[Tensor, Tensor, Tensor, Tensor | None]


def inputs(domain: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dL/dy, weight and bias, in values that the format has."""
    source = torch.Generator().manual_seed(0)
    shape = SHAPES[domain]
    width = shape[1] if domain == "images" else shape[-1]
    x, g = (torch.randn(shape, generator=source) for _ in range(2))
    weight, bias = (torch.randn(width, generator=source) for _ in range(2))
    parts = (x + MEAN, g, weight, bias)
    return tuple(part.to(dtype) for part in parts)  # type: ignore[return-value]


def passed(
    norm: Normalise, parts: tuple[Tensor, ...], dtype: torch.dtype, device: str = "cpu"
) -> Found:
    """y, and the gradients of x, weight and bias."""
    x, g, weight, bias = (part.detach().to(device, dtype) for part in parts)
    leaves = [part.requires_grad_() for part in (x, weight, bias)]
    y = norm(x, weight, bias, 1e-5)
    grads = torch.autograd.grad(y, leaves, g, allow_unused=True)
    return tuple(v if v is None else v.cpu() for v in (y.detach(), *grads))  # type: ignore[return-value]


def relative(found: Tensor | None, exact: Tensor | None) -> float:
    if found is None or exact is None:
        assert found is exact
        return 0.0
    return ((found.double() - exact).norm() / exact.norm()).item()


def errors(norm: Normalise, domain: str, dtype: torch.dtype, device: str = "cpu") -> list[float]:
    parts = inputs(domain, dtype)
    exact = passed(norm, parts, torch.float64)
    pairs = zip(passed(norm, parts, dtype, device), exact, strict=True)
    return [relative(found, exact) for found, exact in pairs]


def rounded_once(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a number: half the distance of two neighbours."""
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("kind", "domain"), NORMALISE)
def test_what_norms_compute_in_half_precision_is_rounded_once(
    kind: str, domain: str, dtype: torch.dtype
) -> None:
    found = errors(NORMALISE[kind, domain], domain, dtype)
    assert max(found) < rounded_once(dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("kind", "domain"), NORMALISE)
def test_on_a_gpu_their_sums_are_float32(kind: str, domain: str, dtype: torch.dtype) -> None:
    """A product with the affine map may round once more."""
    found = errors(NORMALISE[kind, domain], domain, dtype, "cuda")
    assert max(found) < 2 * rounded_once(dtype)


def narrow_batch_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def narrow_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norm", [narrow_batch_norm, narrow_layer_norm])
def test_torch_by_itself_would_round_more_often(norm: Normalise, dtype: torch.dtype) -> None:
    """The negative control; once it fails, torch adds up in float32 and `norms` need not."""
    assert max(errors(norm, "vectors", dtype)) > 2 * rounded_once(dtype)


def naive(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def off_one(normalise: Callable[[Tensor], Tensor], dtype: torch.dtype) -> float:
    """How far the mean length is from 1."""
    x = inputs("tokens", dtype)[0]
    lengths = torch.linalg.vector_norm(normalise(x).double(), dim=-1)
    return (lengths - 1).abs().mean().item()


@pytest.mark.parametrize("dtype", HALF)
def test_vectors_of_norm_one_have_it_but_for_the_rounding_of_their_elements(
    dtype: torch.dtype,
) -> None:
    assert unit_norm(inputs("tokens", dtype)[0]).dtype == dtype
    assert off_one(unit_norm, dtype) < rounded_once(dtype) / 4 < off_one(naive, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_formats_are_left_as_they_are(dtype: torch.dtype) -> None:
    x, _, weight, bias = inputs("vectors", dtype)
    layer, batch = (NORMALISE[kind, "vectors"] for kind in ("layernorm", "batchnorm"))
    assert torch.equal(layer(x, weight, bias, 1e-5), narrow_layer_norm(x, weight, bias, 1e-5))
    assert torch.equal(batch(x, weight, bias, 1e-5), narrow_batch_norm(x, weight, bias, 1e-5))
    assert torch.equal(unit_norm(x), naive(x))
