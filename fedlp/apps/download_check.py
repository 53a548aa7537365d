"""Check of the encoding of downloads before a run: it is for frozen tensors, which it must not thin out."""

from __future__ import annotations

from fedlp.config import RunConfig
from fedlp.errors import ConfigError
from fedlp.federation.submodels import SubModels
from fedlp.federation.wire.encodings.base import is_plain
from fedlp.federation.wire.encodings.topk import TopK


def check_download(config: RunConfig, submodels: SubModels) -> None:
    """Raise ConfigError, with the remedy, if nothing would be encoded, or frozen tensors would lose entries."""
    name, encoding = config.download.name, config.download.make()
    if not is_plain(encoding) and not submodels.spec.frozen:
        raise ConfigError(
            f"download={name} is for frozen tensors, but nothing is: drop it, or set adapter=lora or model.frozen"
        )
    if isinstance(encoding, TopK):
        raise ConfigError(
            f"download={name} would set most weights to zero: it is for differences; choose int8, block4 or nf4"
        )
