"""Check of local differential privacy before a run: noise needs dense float32 uploads, and no other channel."""

from __future__ import annotations

import logging

import torch

from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.submodels import SubModels
from fedlp.training.calibration_data import make_method

log = logging.getLogger("fedlp")
_WHAT = "privacy=local_dp"


def check_privacy(config: RunConfig, submodels: SubModels) -> None:
    """Raise ConfigError, with the remedy, if uploads cannot be noised or would not be private."""
    if config.privacy.name == "none":
        return
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
    if config.privacy.epsilon >= 1:
        log.warning("privacy.epsilon=%g: the Gaussian mechanism promises nothing from 1 on", config.privacy.epsilon)
