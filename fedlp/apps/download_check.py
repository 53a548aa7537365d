"""Check of the encoding of downloads before a run: it must have tensors to encode, and must not thin them out."""

from __future__ import annotations

from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.federation.wire.encodings.topk import TopK


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
