"""Calibration examples of pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration examples.

    Attributes
    ----------
    batches : sequence of Tensor
        Prepared inputs.
    labels : sequence of Tensor
        Target of each prediction of a batch: (n,) classes or tokens, or (n, ...) values.
    seed : int
        Seeds random draws.
    loss : callable
        Mean loss of outputs, (n, outputs), and labels.
    shift_invariant : bool
        Whether a constant added to all outputs of an example changes nothing, as with the logits of one softmax.
    """

    batches: Sequence[Tensor]
    labels: Sequence[Tensor]
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    shift_invariant: bool = True

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return sum(len(batch) for batch in self.batches)


def split_examples(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return by batch which examples are in the first half of the data, (examples,) bool: every other one."""
    sizes = torch.tensor([len(batch) for batch in batches])
    return list(torch.split(torch.arange(int(sizes.sum())) % 2 == 0, sizes.tolist()))


def split_rows(examples: Tensor, num_rows: int, is_alone: bool) -> Tensor:
    """Return which vectors are in the first half of the data, (rows,) bool; they lie example by example.

    Parameters
    ----------
    examples : (n,)
        Which examples of the batch are.
    is_alone : bool
        Whether there is no other example in all data: then its first half is, as where vectors per example differ.
    """
    if is_alone or num_rows % len(examples):
        return torch.arange(num_rows) < num_rows // 2
    return examples.repeat_interleave(num_rows // len(examples))


def choose_half(batches: Sequence[Tensor], half: int) -> list[Tensor]:
    """Return the batches of the first half of the data, 1, or of the rest, 2; without empty ones."""
    chosen = [first if half == 1 else ~first for first in split_examples(batches)]
    return [batch[wanted.to(batch.device)] for batch, wanted in zip(batches, chosen, strict=True) if bool(wanted.any())]


def leading_examples(batches: Sequence[Tensor], positions: int) -> list[Tensor]:
    """Return the first batches of token ids, (n, L), with at least some number of positions, and two examples."""
    wanted, found = max(2, -(-positions // batches[0].shape[1])), []
    for batch in batches:
        found.append(batch[:wanted])
        wanted -= len(found[-1])
        if wanted <= 0:
            break
    return found
