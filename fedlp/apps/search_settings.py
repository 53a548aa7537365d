"""Settings, length and expected costs of a federated search, from its config."""

from __future__ import annotations

import math

from fedlp.apps.model_allocator import rule_names
from fedlp.apps.secagg_check import secagg_settings
from fedlp.config import FederatedSearchConfig
from fedlp.federation.oneshot import costs
from fedlp.federation.oneshot.search_costs import expected_costs
from fedlp.federation.oneshot.settings import OneShotSettings
from fedlp.federation.submodels import SubModels
from fedlp.pruning.reader_layers import Method
from fedlp.pruning.scores.obs import OBS


def count_lines(config: FederatedSearchConfig, submodels: SubModels) -> int:
    """Return the number of lines of ``rounds.jsonl``: of layers, hand rules, generations and the held-out check."""
    search = config.search
    generations = len(search.modes) * -(-search.evaluations // search.population)
    return len(costs.skeleton(search_oneshot_settings(config), submodels)[1]) + 1 + generations + 1


def expected_search_costs(config: FederatedSearchConfig, submodels: SubModels) -> dict[str, float]:
    """Return the expected cost of one client in one line, an upper bound where candidates repeat widths."""
    search, layers = config.search, len(costs.skeleton(search_oneshot_settings(config), submodels)[1])
    generations = len(search.modes) * -(-search.evaluations // search.population)
    candidates = len(search.modes) * search.evaluations * 5 // 4  # a quarter is judged twice
    rules, finalists = len(rule_names()), len(search.modes) + 2
    num_plans = layers + len(search.ratios) * (candidates + rules + finalists + 2 * generations + 1)
    lines = count_lines(config, submodels)
    found = expected_costs(search_oneshot_settings(config), submodels, num_plans, lines)
    if config.run is not None:  # whose model clients are sent
        sent = list(submodels.spec.tensors.values())
        found["params_down_per_client"] += sum(math.prod(x.shape) for x in sent) / lines
        found["bytes_down_per_client"] += sum(math.prod(x.shape) * x.dtype.itemsize for x in sent) / lines
    return found


def search_oneshot_settings(config: FederatedSearchConfig) -> OneShotSettings:
    """Return the settings of clients' answers in a federated search."""
    return OneShotSettings(
        method=Method(OBS(), fisher=True, damping=config.pruner.damping, keeps_batch_norm=True),
        seed=config.seed,
        device=config.device,
        clients_per_round=config.clients_per_round,
        min_clients=config.min_clients,
        timeout_s=config.simulation.round_timeout_s,
        examples=config.calibration.examples,
        batch_size=config.search.batch_size,
        shared=config.pruner.shared,
        wide_sums=config.sums == "float64",
        secagg=secagg_settings(config),
        fitness_examples=config.search.fitness_examples,
        held_out_examples=config.search.held_out_examples,
    )
