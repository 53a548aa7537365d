"""Accounting of differential privacy over equal rounds, by Google's ``dp-accounting``.

One round is the Gaussian mechanism on a Poisson sample, under add-or-remove of one client. Privacy loss distributions
("pld"; Koskela et al., AISTATS 2020; Doroshenko et al., PETS 2022) are tight, Renyi divergences ("rdp"; Mironov, CSF
2017) looser and quicker. With less noise than 0.3 clipping norms a distribution would not fit into memory, and epsilon
says little: then "pld" is "rdp".
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cached_property, lru_cache
from typing import Any

from fedlp.errors import ConfigError

_LEAST_NOISE = 0.3  # for which a distribution is computed
_PRECISION = 1e-4  # of noise multipliers
_MOST_NOISE = 2.0**20


class Accountant:
    """Epsilon of a number of equal rounds.

    Parameters
    ----------
    name : "pld" or "rdp"
    noise_multiplier : float
        Standard deviation of the noise in units of the sensitivity, > 0.
    sampling_rate : float
        Probability that a client takes part in a round, in (0, 1].
    delta : float
        In (0, 1).

    Raises
    ------
    ConfigError
        If dp-accounting is not installed.
    """

    def __init__(self, name: str, noise_multiplier: float, sampling_rate: float, delta: float) -> None:
        self._library = _library()
        self.noise_multiplier, self.sampling_rate, self.delta = noise_multiplier, sampling_rate, delta
        self._is_tight = name == "pld" and noise_multiplier >= _LEAST_NOISE
        self._epsilon = lru_cache(maxsize=4)(self._compute)

    def epsilon(self, rounds: int) -> float:
        """Return epsilon after a number of rounds: 0 after none, infinity where there is no bound."""
        return self._epsilon(rounds) if rounds else 0.0

    def _compute(self, rounds: int) -> float:
        with _quiet():
            if self._is_tight:
                return float(self._distribution.self_compose(rounds).get_epsilon_for_delta(self.delta))
            accountant = self._library.rdp.RdpAccountant()
            noise = self._library.GaussianDpEvent(self.noise_multiplier)
            accountant.compose(self._library.PoissonSampledDpEvent(self.sampling_rate, noise), rounds)
            return float(accountant.get_epsilon(self.delta))

    @cached_property
    def _distribution(self) -> Any:
        """Privacy loss distribution of one round."""
        from dp_accounting.pld import privacy_loss_distribution

        return privacy_loss_distribution.from_gaussian_mechanism(
            self.noise_multiplier, sampling_prob=self.sampling_rate
        )


def find_noise(name: str, epsilon: float, delta: float, sampling_rate: float, rounds: int) -> float:
    """Return the least noise multiplier, to 1e-4, with which a number of rounds costs at most epsilon.

    Raises
    ------
    ConfigError
        If no noise is enough, or dp-accounting is not installed.
    """

    def spent(noise: float) -> float:
        return Accountant(name, noise, sampling_rate, delta).epsilon(rounds)

    low, high = 0.0, 1.0
    while spent(high) > epsilon:
        low, high = high, 2.0 * high
        if high > _MOST_NOISE:
            raise ConfigError(f"privacy.epsilon={epsilon:g} cannot be had in {rounds} rounds with any noise; raise it")
    while high - low > _PRECISION * max(high, 1.0):
        middle = (low + high) / 2.0
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return round(math.ceil(high / _PRECISION) * _PRECISION, 4)


def has_accountant() -> bool:
    """Return whether dp-accounting is installed."""
    try:
        _library()
    except ConfigError:
        return False
    return True


def _library() -> Any:
    try:
        with redirect_stderr(sys.__stderr__):  # absl, which it imports, closes a stream that stands in for it
            import dp_accounting
            import dp_accounting.rdp
    except ImportError as error:
        raise ConfigError('epsilon needs the package dp-accounting; run: pip install "fedlp[dp]"') from error
    return dp_accounting


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from naming the Renyi orders that it leaves out."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
