"""Checks of differential privacy before a run: noise needs uploads that it covers, and no other channel."""

from __future__ import annotations

import logging

import torch

from fedlp.allocation.evidence import needs_of
from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.submodels import SubModels
from fedlp.training.calibration_data import make_method

log = logging.getLogger("fedlp")
_WHAT = "privacy=local_dp"


def check_privacy(config: RunConfig, submodels: SubModels) -> None:
    """Raise ConfigError, with the remedy, if uploads cannot be noised or would not be private."""
    if config.privacy.name == "central_dp":
        check_central_privacy(config, submodels)
    if config.privacy.name != "local_dp":
        return
    _refuse_options(config, "noise_multiplier", "clipping_quantile", "secure_noise")
    options, fleet = config.strategy.options, config.fleet
    rates = options.get("layer_preserving_rate", 1.0)
    if min(rates if isinstance(rates, list) else [rates]) < 1:
        raise ConfigError(f"{_WHAT} needs strategy.layer_preserving_rate=1: clients must return all that they received")
    if config.upload.name != "float32" or config.upload.values != "weights":
        raise ConfigError(
            f"{_WHAT} needs upload=float32 and upload.values=weights (and error_feedback=false), which is what "
            "Flower's mod clips"
        )
    if "sparsity" in options:
        limits_uploads = bool(fleet.devices) or (bool(fleet.fractions) and "upload_bytes" in fleet.limited)
        if options["sparsity"] > 0 or limits_uploads:
            raise ConfigError(
                f"{_WHAT} needs strategy.sparsity=0 and a fleet that does not limit uploads, since clients must return "
                "all units that they received; limit what they hold instead: fleet=tiers"
            )
        if make_method(config.pruner).score.needs:
            raise ConfigError(
                f"{_WHAT} needs pruner=random: scores of units would tell of a client's data without any noise"
            )
    for name, tensor in submodels.spec.tensors.items():
        if not tensor.trainable or tensor.dtype != torch.float32:
            kind = f"{'a trained' if tensor.trainable else 'an untrained'} {str(tensor.dtype).removeprefix('torch.')}"
            raise ConfigError(
                f"{_WHAT} needs a model of trained float32 tensors alone, but {name} is {kind} tensor, which noise "
                "would spoil; choose a model without batch norm, such as model=small_cnn, or model.norm=group"
            )
    if config.privacy.epsilon is not None and config.privacy.epsilon >= 1:
        log.warning("privacy.epsilon=%g: the Gaussian mechanism promises nothing from 1 on", config.privacy.epsilon)


# ---- central
def check_central_privacy(config: RunConfig, submodels: SubModels) -> None:
    """Raise ConfigError, with the remedy, where a run shows more of clients than the server's noise covers."""
    privacy, options = config.privacy, config.strategy.options
    _refuse_options(config, "seeded")
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        raise ConfigError(
            f"{_CENTRAL} needs one of privacy.noise_multiplier=1 (the noise) and privacy.epsilon=8 (of the whole run, "
            "for which the noise is found)"
        )
    for holds, remedy in (
        (config.aggregator.name == "coverage_average", "aggregator=coverage_average: only a sum can be noised"),
        (config.aggregator.weighting == "equal", "aggregator.weighting=equal: each client counts once"),
        (config.min_clients <= 1, "min_clients=1: whether a round counts must not depend on who answers"),
        (not config.fleet.extra_clients, "fleet.extra_clients=0: which answers count must not depend on others"),
        (
            config.evaluation.name == "central",
            "evaluation=central: what clients measure on their data would be published without noise",
        ),
        (
            options.get("unit_selection") != "client",
            "strategy.unit_selection=server: the server must know who returns what",
        ),
        (options.get("submodels") != "pruned", "strategy.submodels=slices: pruning looks at examples without noise"),
        (
            "regrow" not in options or options["regrow"] == 0,
            "strategy.regrow=0: which units were returned last depends on who took part",
        ),
        (
            "unit_selection" not in options or not make_method(config.pruner).score.needs,
            "pruner=random: scores of units would tell of clients' data without any noise",
        ),
        (
            "unit_selection" not in options or "input_norms" not in needs_of(config.allocator.make()),
            "allocator=uniform: norms of clients' inputs would be pooled without noise",
        ),
    ):
        if not holds:
            raise ConfigError(f"{_CENTRAL} needs {remedy}")
    for name, tensor in submodels.spec.tensors.items():
        if name not in submodels.spec.frozen and not (tensor.trainable and tensor.dtype.is_floating_point):
            raise ConfigError(
                f"{_CENTRAL} needs a model without buffers that clients change, but {name} is one; choose a model "
                "without batch norm, such as model=small_cnn, or model.norm=group"
            )


_CENTRAL = "privacy=central_dp"


def _refuse_options(config: RunConfig, *names: str) -> None:
    """Raise ConfigError for an option of another kind of privacy."""
    for name in names:
        if getattr(config.privacy, name) not in (None, False):
            raise ConfigError(f"privacy.{name} is no option of privacy={config.privacy.name}; drop it")
