"""Moments add up over batches and clients, and centring is what a constant input comes to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedlp.pruning.kernels.hessian import Moments, invert_hessian
from fedlp.pruning.kernels.obs import resolve_weight
from fedlp.pruning.tracing.units import input_columns, output_rows, weight_matrix


def draw(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def moments_of(x: Tensor, targets: Tensor | None = None) -> Moments:
    moments = Moments.empty(x.shape[1], 0 if targets is None else targets.shape[1])
    moments.add(x, targets)
    return moments


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [7, 1030])  # one panel, several
def test_hessian_is_the_second_moment(size: int, centred: bool) -> None:
    x = draw(40, size)
    offset = x.mean(dim=0) if centred else 0.0
    expected = 2 / 40 * (x - offset).T @ (x - offset)
    torch.testing.assert_close(moments_of(x).hessian(centred), expected)


def test_moments_of_clients_pool_to_those_of_the_union() -> None:
    x, t = draw(60, 6), draw(60, 3, seed=1)
    parts = [moments_of(x[a:b], t[a:b]) for a, b in ((0, 10), (10, 45), (45, 60))]
    pooled, union = parts[2] + parts[0] + parts[1], moments_of(x, t)
    assert pooled.count == union.count
    for name in ("hessian", "target_hessian"):
        torch.testing.assert_close(getattr(pooled, name)(True), getattr(union, name)(True))
    torch.testing.assert_close(pooled.target_mean, union.target_mean)


@pytest.mark.parametrize("with_targets", [False, True])
def test_moments_can_be_measured_from_anywhere(with_targets: bool) -> None:
    x, by = draw(60, 6), torch.arange(6, dtype=torch.float64)
    t = draw(60, 3, seed=1) if with_targets else None
    found, expected = moments_of(x, t).shifted(by), moments_of(x - by, t)
    torch.testing.assert_close(found.hessian(False), expected.hessian(False))
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.shifted(-by).hessian(True), moments_of(x).hessian(True))
    if with_targets:
        torch.testing.assert_close(found.target_hessian(False), expected.target_hessian(False))


def test_a_centred_fit_is_the_fit_with_a_constant_input_that_stays() -> None:
    x = draw(50, 6)
    weight = draw(4, 6, seed=2)
    kept, removed = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    moments = moments_of(x)
    inverse = invert_hessian(moments.hessian(centred=True), 0.0, "layer", 50)
    solved = resolve_weight(weight, inverse, kept, removed)
    bias = weight @ moments.mean - solved @ moments.mean[kept]
    design = torch.cat((x[:, kept], torch.ones(50, 1, dtype=torch.float64)), dim=1)
    expected = torch.linalg.lstsq(design, x @ weight.T).solution.T
    torch.testing.assert_close(torch.cat((solved, bias[:, None]), dim=1), expected)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, (3, 1), stride=2), nn.Conv2d(3, 5, 2, dilation=2)]
)
def test_a_convolution_is_a_matrix_product_of_its_columns(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = output_rows(conv, conv(x))
        product = input_columns(conv, x) @ weight_matrix(conv).T + conv.bias
    torch.testing.assert_close(product, rows, rtol=1e-4, atol=1e-5)
