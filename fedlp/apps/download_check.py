"""Checks of the encoding of downloads before a run: of trained and frozen tensors, and of a base that stays encoded."""

from __future__ import annotations

from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.strategies.policy import Policy
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.federation.wire.encodings.topk import TopK


def check_base(config: RunConfig, policy: Policy) -> None:
    """Raise ConfigError, with the remedy, if clients hold an encoded base that they must read as values."""
    if config.adapter.name == "none" or config.adapter.base != "encoded":
        return
    what, cases = "adapter.base=encoded", policy.cases(range(config.num_clients))
    if is_plain(config.download.make()):
        raise ConfigError(f"{what} keeps the base as it was sent, in float32; choose download=nf4, block8 or another")
    if any(case.submodel.nested_levels for case in cases):
        raise ConfigError(
            f"{what} does not go with strategy={config.strategy.name}, which slices the base at every step; choose "
            "fedavg, heterofl or fedlp_plan"
        )
    if getattr(policy, "scores_on_clients", False):
        raise ConfigError(
            f"{what} does not go with scores of units that clients measure on the whole weights; set "
            "strategy.submodels=pruned or strategy.unit_selection=random"
        )


def check_download(config: RunConfig, submodels: SubModels) -> None:
    """Raise ConfigError, with the remedy, if nothing would be encoded, or tensors would lose entries or drift."""
    name, encoding = config.download.name, config.download.make()
    covers_trained = config.download.tensors == "all"
    if not is_plain(encoding) and not submodels.spec.frozen and not covers_trained:
        raise ConfigError(
            f"download={name} is for frozen tensors, but nothing is: drop it, set adapter=lora or model.frozen, or "
            "encode trained tensors too, with download.tensors=all"
        )
    if isinstance(encoding, TopK):
        raise ConfigError(
            f"download={name} would set most weights to zero: it is for differences; choose int8, block4 or nf4"
        )
    if covers_trained and is_plain(encoding):
        raise ConfigError(
            f"download.tensors=all encodes nothing with download={name}: choose bfloat16, int8, block8, block4 or nf4, "
            "or drop it"
        )
    if covers_trained and config.upload.values != "deltas":
        raise ConfigError(
            "download.tensors=all needs upload.values=deltas: averages of weights would take over the error of the "
            "encoding in every round"
        )
