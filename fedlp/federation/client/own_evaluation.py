"""Evaluation on a client: its sub-model on its own test examples, optionally after a few local steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from fedlp.config import LocalConfig
from fedlp.data.examples import DataInfo, Examples
from fedlp.training.loop import train_locally


def personalise(
    model: nn.Module, examples: Examples, info: DataInfo, local: LocalConfig, steps: int, rng: np.random.Generator
) -> None:
    """Train a model in place for a number of local steps.

    Parameters
    ----------
    examples : Examples
        The client's training examples, in fresh random order whenever all have been seen.
    local : LocalConfig
        Options of local training; its number of epochs is not read.
    steps : int
        Optimizer steps, >= 1.
    """
    wanted = steps * local.accumulation * local.batch_size
    passes = -(-wanted // len(examples))
    order = np.concatenate([rng.permutation(len(examples)) for _ in range(passes)])[:wanted]
    train_locally(model, examples.select(order), info, replace(local, epochs=1), rng)
