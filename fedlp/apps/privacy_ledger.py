"""Ledger of privacy: epsilon after each round, and the end of a run whose next round would pass its budget."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

from fedlp.config import PrivacyConfig, RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.privacy_accounting import Accountant, find_noise, has_accountant
from fedlp.federation.server.central_privacy import CentralPrivacy
from fedlp.federation.server.checkpoint import ServerState
from fedlp.types import RoundRecord

log = logging.getLogger("fedlp")

_FACTS = ("delta", "noise_multiplier", "sampling_rate")  # on record of every round, and the same in all


class PrivacyLedger:
    """Ledger of a run, told of every round; also a callback, which ends the run at ``privacy.max_epsilon``.

    Central: each round is one Poisson-sampled Gaussian mechanism. Local: each client's uploads compose, without any
    gain from sampling, since the server knows who takes part; epsilon is that of the client that was asked most often.

    Parameters
    ----------
    config : RunConfig
        With ``privacy`` central_dp or local_dp.

    Raises
    ------
    ConfigError
        If dp-accounting is missing, or the first round alone would pass the budget.
    """

    def __init__(self, config: RunConfig) -> None:
        self._privacy, self._is_central = config.privacy, config.privacy.name == "central_dp"
        privacy = config.privacy
        rate = config.clients_per_round / config.num_clients if self._is_central else 1.0
        noise = noise_multiplier(privacy, rate, config.num_rounds)
        self.accountant = Accountant(privacy.accountant, noise, rate, privacy.delta)
        self._uploads: Counter[int] = Counter()
        self._rounds = 0
        limit = privacy.max_epsilon
        if limit is not None and (first := self.accountant.epsilon(1)) > limit:
            raise ConfigError(
                f"privacy.max_epsilon={limit:g}, but the first round alone costs {first:.3g}; raise it, or add noise: "
                + ("privacy.noise_multiplier" if self._is_central else "a smaller privacy.epsilon")
            )

    def note(self, server_round: int, cohort: Sequence[int]) -> dict[str, float]:
        """Count a round in; return its record of privacy."""
        self._uploads.update(cohort)
        self._rounds = server_round
        return {"epsilon": self.accountant.epsilon(self._spent), **self._facts}

    def __call__(self, record: RoundRecord, state: ServerState) -> bool:
        """Return whether another round would pass the budget."""
        return self._is_used_up()

    def recall(self, records: Sequence[RoundRecord]) -> bool:
        """Count earlier rounds in; ConfigError where they were run with other noise, which one total cannot hold."""
        self._uploads = Counter(client_id for record in records for client_id in record.cohort)
        self._rounds = max((record.server_round for record in records), default=0)
        for record in records:
            for name, value in self._facts.items():
                if (before := record.privacy.get(name, value)) != value:
                    raise ConfigError(
                        f"round {record.server_round} was run with {name}={before:g}, but the config now asks for "
                        f"{value:g}; go on with the num_rounds that the run began with"
                    )
        return self._is_used_up()

    @property
    def _spent(self) -> int:
        """Mechanisms that count: rounds, or the most uploads of a client."""
        return self._rounds if self._is_central else max(self._uploads.values(), default=0)

    @cached_property
    def _facts(self) -> dict[str, float]:
        found = self.accountant
        return dict(zip(_FACTS, (found.delta, found.noise_multiplier, found.sampling_rate), strict=True))

    def _is_used_up(self) -> bool:
        limit = self._privacy.max_epsilon
        if limit is None or (following := self.accountant.epsilon(self._spent + 1)) <= limit:
            return False
        log.warning("the run ends: another round would cost epsilon=%.3g of privacy.max_epsilon=%g", following, limit)
        return True


def noise_multiplier(privacy: PrivacyConfig, sampling_rate: float, num_rounds: int) -> float:
    """Return the standard deviation of the noise in units of the sensitivity."""
    if privacy.name == "local_dp":
        assert privacy.epsilon is not None
        return math.sqrt(2.0 * math.log(1.25 / privacy.delta)) / privacy.epsilon  # Flower's LocalDpMod
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None
    return find_noise(privacy.accountant, privacy.epsilon, privacy.delta, sampling_rate, num_rounds)


def make_ledger(config: RunConfig) -> PrivacyLedger | None:
    """Return the ledger of a run; None where nothing is to be accounted, or cannot be and need not."""
    privacy = config.privacy
    if privacy.name not in ("central_dp", "local_dp"):
        return None
    if privacy.name == "local_dp" and privacy.max_epsilon is None and not has_accountant():
        log.warning('epsilon of several uploads is not on record; for that run: pip install "fedlp[dp]"')
        return None
    return PrivacyLedger(config)


def make_central_privacy(config: RunConfig, ledger: PrivacyLedger | None) -> CentralPrivacy | None:
    """Return the mechanism of central differential privacy; None without it."""
    privacy = config.privacy
    if ledger is None or privacy.name != "central_dp":
        return None
    if not privacy.secure_noise:
        log.warning(
            "noise is drawn from the run's seed, which clients and readers of config.yaml know; where that matters: "
            "privacy.secure_noise=true"
        )
    return CentralPrivacy(
        noise_multiplier=ledger.accountant.noise_multiplier,
        sampling_rate=ledger.accountant.sampling_rate,
        num_clients=config.num_clients,
        clipping_norm=privacy.clipping_norm,
        clipping_quantile=privacy.clipping_quantile,
        seed=config.seed,
        is_secure=privacy.secure_noise,
    )


def expected_privacy(config: RunConfig) -> Mapping[str, float]:
    """Return epsilon and noise of a whole run, for a dry run; empty where nothing is accounted."""
    if config.privacy.name != "central_dp":
        return {}
    accountant = PrivacyLedger(config).accountant
    return {"epsilon": accountant.epsilon(config.num_rounds), "noise_multiplier": accountant.noise_multiplier}
