"""Classification of text by encoders (BERT, MiniLM) and decoders with a head: one class for each text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlp.data.examples import DataInfo, Examples
from fedlp.data.tokenizers import token_types
from fedlp.registry import register
from fedlp.tasks.base import Inputs
from fedlp.tasks.classification import Classification


@register("task", "sequence_classification")
@dataclass(frozen=True)
class SequenceClassification(Classification):
    """Cross-entropy over classes of token sequences; accuracy."""

    targets: ClassVar[str] = "a class for each text"
    reads_tokens: ClassVar[bool] = True
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"

    def prepare(self, inputs: Tensor, info: DataInfo, device: torch.device) -> Inputs:
        """Return token ids and attention mask, (n, longest of the batch); the model's own pad token fills the ids.

        Of two texts there are token types as well: 0 for the first text with the token that ends it, 1 for the second,
        0 for padding.
        """
        tokens = inputs.to(device)
        mask = (tokens >= 0).to(torch.int64)
        longest = max(1, int(mask.sum(dim=1).max()))
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        found = {"input_ids": tokens.clamp(min=0), "attention_mask": mask}
        if info.separator is not None:
            found["token_type_ids"] = token_types(tokens, info.separator) * mask
        return found

    def calibration_batches(self, examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of texts of one length each, the shortest first: all tokens of all examples, no padding."""
        lengths = (examples.inputs >= 0).sum(dim=1)
        for length in sorted({int(length) for length in lengths if length}):
            for index in torch.split((lengths == length).nonzero().flatten(), batch_size):
                yield examples.inputs[index, :length], examples.targets[index]

    def prepare_whole(self, inputs: Tensor, info: DataInfo, device: torch.device) -> Tensor:
        """Return the token ids."""
        return inputs.to(device)

    def draw_examples(self, info: DataInfo, count: int, rng: np.random.Generator) -> Examples:
        """Return random tokens without padding."""
        tokens = rng.integers(0, info.vocabulary or info.num_classes, (count, *info.input_shape))
        return Examples(torch.from_numpy(tokens), self.draw_targets(info, count, rng), None)
