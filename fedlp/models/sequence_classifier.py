"""Classifiers of text by transformers: an encoder (BERT, MiniLM) or a decoder with a head that reads one token."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fedlp.models.blueprint import Blueprint
from fedlp.models.stored_dtype import model_dtype
from fedlp.models.transformers_loading import import_transformers, loading, quiet


@dataclass(frozen=True)
class SequenceClassifierBlueprint(Blueprint):
    """Blueprint of a classifier of token sequences by its transformers config.

    Attributes
    ----------
    auto_model : str
        Auto class of transformers that builds it.
    path : str or None
        Name or folder of its pretrained weights; None for fresh ones.
    """

    is_language: ClassVar[bool | None] = True

    name: str
    config: Any
    auto_model: str
    path: str | None

    @classmethod
    def of(
        cls, path: str, sizes: Any, auto_model: str, num_classes: int, pretrained: bool
    ) -> SequenceClassifierBlueprint:
        """Return the blueprint of a model with ``num_classes`` outputs; ``sizes`` is its transformers config."""
        config = copy.deepcopy(sizes)
        config.num_labels = num_classes
        if config.pad_token_id is None:  # decoders read the last token that is no padding
            config.pad_token_id = config.eos_token_id if isinstance(config.eos_token_id, int) else 0
        return cls(path, config, auto_model, path if pretrained else None)

    def build(self) -> nn.Module:
        """Return the model with fresh parameters, float32."""
        factory = getattr(import_transformers(), self.auto_model)
        model: nn.Module = factory.from_config(copy.deepcopy(self.config), dtype=torch.float32)
        return model

    def build_initial(self) -> nn.Module:
        """Return the pretrained model, float32; a head missing from its files is fresh."""
        if self.path is None:
            return self.build()
        factory = getattr(import_transformers(), self.auto_model)
        with quiet(), loading(self.path):
            model: nn.Module = factory.from_pretrained(
                self.path,
                config=copy.deepcopy(self.config),
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
            )
        return model.train()

    def stored_dtype(self) -> torch.dtype:
        """Return the format of a local folder's weights, else that of the model's config."""
        return model_dtype(self.path, self.config)
