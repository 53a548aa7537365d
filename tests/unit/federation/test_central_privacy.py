"""Clipped, noised sums: what one client can move, the noise against what is claimed, epsilon against the library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedlp.federation.aggregation.noised_sum import NoisedSum
from fedlp.federation.privacy_accounting import Accountant, find_noise
from fedlp.federation.server.central_privacy import CentralPrivacy, secure_normal
from fedlp.types import Keep

OLD = {"w": torch.linspace(-1, 1, 24).view(4, 6), "b": torch.zeros(6), "idle": torch.ones(3)}
NARROW = (Keep.first(2, 4), Keep.from_indices(np.array([0, 2, 5]), 6))
HOLDERS = {"w": {None: 3.0, NARROW: 2.0}, "b": {None: 5.0}}


def silent(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float64)


def private(**changes: object) -> CentralPrivacy:
    return CentralPrivacy(**{"noise_multiplier": 1.0, "sampling_rate": 0.5, "num_clients": 40, **changes})  # type: ignore[arg-type]


def total(clip: float, noise: float = 0.0) -> NoisedSum:
    return NoisedSum(OLD, HOLDERS, clip, noise, silent)


# ---- sensitivity
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e15])
@pytest.mark.parametrize("keeps", [{}, {"w": NARROW}])
def test_no_client_moves_the_sum_by_more_than_the_clipping_norm(
    size: float, keeps: dict[str, tuple[Keep, ...]]
) -> None:
    rng = torch.Generator().manual_seed(1)
    honest = {"w": OLD["w"] + 0.01 * torch.randn(4, 6, generator=rng), "b": torch.full((6,), 0.02)}
    shape = (2, 3) if keeps else (4, 6)
    hostile = {"w": size * torch.randn(shape, generator=rng), "b": size * torch.ones(6)}
    sums = []
    for others in ([], [hostile]):
        accumulator = total(0.5)
        for _ in range(3):
            accumulator.add(honest, {}, 1.0)
        for update in others:
            accumulator.add(update, keeps, 1e9)  # whatever weight it claims
        found, _ = accumulator.result()
        held = {"w": torch.full((4, 6), 3.0).double(), "b": torch.full((6,), 5.0).double()}
        held["w"][np.ix_(NARROW[0].indices(), NARROW[1].indices())] += 2.0
        sums.append(torch.cat([((found[name].double() - OLD[name]) * held[name]).flatten() for name in ("w", "b")]))
    assert float((sums[1] - sums[0]).norm()) <= 0.5 * (1 + 1e-5)


def test_denominators_are_those_of_the_plan_whoever_answers() -> None:
    accumulator = total(1e9)
    accumulator.add({"w": OLD["w"] + 1.0, "b": torch.ones(6)}, {}, 7.0)
    accumulator.add({"w": OLD["w"][:2][:, [0, 2, 5]] + 1.0}, {"w": NARROW}, 1.0)
    found, coverage = accumulator.result()
    moved = (found["w"] - OLD["w"]).double()
    assert moved[0, 0].item() == pytest.approx(2 / 5, rel=1e-6)
    assert moved[3, 3].item() == pytest.approx(1 / 3, rel=1e-6)
    assert found["b"].tolist() == pytest.approx([1 / 5] * 6)
    assert torch.equal(found["idle"], OLD["idle"]), "nobody is ever to return it"
    assert coverage == {"w": 1.0, "b": 1.0, "idle": 0.0}
    assert accumulator.covered("idle") is False
    assert accumulator.covered("w") is True


def test_few_holders_do_not_blow_up_the_noise() -> None:
    rare = NoisedSum({"b": torch.zeros(6)}, {"b": {None: 0.01}}, 1.0, 1.0, lambda n: torch.ones(n, dtype=torch.float64))
    assert rare.result()[0]["b"].tolist() == [1.0] * 6


def test_entries_that_nobody_can_return_stay_and_are_not_covered() -> None:
    one = NoisedSum({"w": OLD["w"]}, {"w": {NARROW: 2.0}}, 1.0, 1.0, lambda n: torch.ones(n, dtype=torch.float64))
    found, coverage = one.result()
    changed = found["w"] != OLD["w"]
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[np.ix_(NARROW[0].indices(), NARROW[1].indices())] = True
    assert torch.equal(changed, mask)
    assert coverage["w"] == pytest.approx(6 / 24)
    covered = one.covered("w")
    assert isinstance(covered, torch.Tensor)
    assert torch.equal(covered, mask)


# ---- noise
def is_variance(values: torch.Tensor, claimed: float) -> bool:
    """Chi-square test at 1e-6, two-sided, of n normal values of mean 0."""
    statistic = float((values.double() / claimed).square().sum())
    return 1e-6 < stats.chi2(values.numel()).cdf(statistic) < 1 - 1e-6


@pytest.mark.parametrize("adaptive", [None, 0.5])
def test_the_noise_has_the_variance_that_is_claimed(adaptive: float | None) -> None:
    params = {"w": torch.zeros(400, 250, dtype=torch.float64)}
    privacy = private(noise_multiplier=1.3, clipping_norm=0.7, clipping_quantile=adaptive)
    found, _ = privacy.begin(3, params, {"w": {None: 20.0}}, {}).result()
    # with a count of sensitivity 1/2 and noise max(20 / 20, 1.3) beside it, the sum takes what is left of 1.3
    multiplier = 1.3 if adaptive is None else (1.3**-2 - (2 * 1.3) ** -2) ** -0.5
    noise = found["w"] * 20.0
    assert is_variance(noise, multiplier * 0.7)
    assert not is_variance(noise, 1.02 * multiplier * 0.7), "a test that can fail"
    again, _ = privacy.begin(3, params, {"w": {None: 20.0}}, {}).result()
    other, _ = privacy.begin(4, params, {"w": {None: 20.0}}, {}).result()
    assert torch.equal(again["w"], found["w"])
    correlation = float((other["w"] * found["w"]).sum() / (other["w"].norm() * found["w"].norm()))
    assert abs(correlation) < 0.02, "each round has its own"


def test_noise_does_not_depend_on_the_order_of_tensors() -> None:
    privacy, holders = private(), {name: {None: 9.0} for name in OLD}
    one = privacy.begin(1, OLD, holders, {}).result()[0]
    other = privacy.begin(1, dict(reversed(OLD.items())), holders, {}).result()[0]
    assert all(torch.equal(one[name], other[name]) for name in OLD)
    assert list(one) == list(OLD)


def test_noise_of_the_operating_system_is_normal_and_new_every_time() -> None:
    drawn = secure_normal(100_001)
    assert drawn.shape == (100_001,)
    assert is_variance(drawn, 1.0)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    assert not torch.equal(drawn, secure_normal(100_001))


# ---- sampling
@pytest.mark.parametrize("is_secure", [False, True])
def test_each_client_is_sampled_for_itself(is_secure: bool) -> None:
    privacy = private(sampling_rate=0.3, is_secure=is_secure)
    sizes = [len(privacy.cohort(server_round, range(40))) for server_round in range(1, 1500)]
    assert np.mean(sizes) == pytest.approx(12, abs=0.5)
    assert np.var(sizes) == pytest.approx(40 * 0.3 * 0.7, rel=0.25), "binomial, not a fixed size"
    assert (privacy.cohort(5, range(40)) == privacy.cohort(5, range(40))) is not is_secure


# ---- the clipping norm
def test_the_clipping_norm_goes_to_the_quantile_of_the_norms() -> None:
    privacy = private(clipping_norm=50.0, clipping_quantile=0.5, num_clients=400)
    norms = np.random.default_rng(0).uniform(1.0, 3.0, size=200)
    memory: dict[str, torch.Tensor] = {"other": torch.ones(1)}
    for server_round in range(1, 60):
        accumulator = privacy.begin(server_round, {"b": torch.zeros(1)}, {"b": {None: 200.0}}, memory)
        for norm in norms:
            accumulator.add({"b": torch.tensor([float(norm)])}, {}, 1.0)
        memory = dict(privacy.remember(memory, server_round, accumulator))
    assert privacy.clip(memory) == pytest.approx(2.0, abs=0.2)
    assert "other" in memory
    fixed = private()
    assert fixed.remember({}, 1, fixed.begin(1, {}, {}, {})) == {}


# ---- epsilon
def test_epsilon_of_dp_sgd_on_mnist_is_the_librarys_and_the_published_one() -> None:
    """TensorFlow Privacy: 60,000 examples, batches of 256, noise 1.1, 60 epochs, delta 1e-5: epsilon 2.60."""
    rate, steps = 256 / 60_000, 60 * 60_000 // 256
    published = Accountant("rdp", 1.1, rate, 1e-5).epsilon(steps)  # before the library, whose first import it guards
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(1.1))
    for name, library in (("rdp", RdpAccountant()), ("pld", PLDAccountant())):
        library.compose(event, steps)
        ours = Accountant(name, 1.1, rate, 1e-5)
        assert ours.epsilon(steps) == pytest.approx(library.get_epsilon(1e-5), rel=1e-9)
        assert ours.epsilon(0) == 0.0
    assert published == pytest.approx(2.60, abs=0.005)


def test_one_gaussian_mechanism_has_the_epsilon_of_the_analytic_formula() -> None:
    """Balle and Wang (ICML 2018), Theorem 8: delta = Phi(1/2z - eps z) - e^eps Phi(-1/2z - eps z)."""
    epsilon = Accountant("pld", 2.0, 1.0, 1e-5).epsilon(1)
    phi = stats.norm.cdf
    delta = phi(1 / 4 - 2 * epsilon) - math.exp(epsilon) * phi(-1 / 4 - 2 * epsilon)
    assert delta == pytest.approx(1e-5, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rdp", "pld"])
def test_the_noise_for_an_epsilon_is_the_least_that_keeps_it(name: str) -> None:
    noise = find_noise(name, 3.0, 1e-5, 0.2, 30)
    assert Accountant(name, noise, 0.2, 1e-5).epsilon(30) <= 3.0
    assert Accountant(name, noise - 0.001, 0.2, 1e-5).epsilon(30) > 3.0
