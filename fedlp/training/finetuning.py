"""Fine-tuning of a pruned model: all weights, or low-rank adapters merged into the weights."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from torch import nn

from fedlp.config import FinetuneConfig, LocalConfig
from fedlp.data.datasets import DataInfo, Examples
from fedlp.data.examples import subset
from fedlp.errors import ConfigError
from fedlp.tasks import task_of
from fedlp.training.loop import train_locally


def finetune(
    model: nn.Module, info: DataInfo, examples: Examples, config: FinetuneConfig, rng: np.random.Generator
) -> None:
    """Fine-tune ``model`` in place by the config; it ends in evaluation mode.

    Raises
    ------
    ConfigError
        For adapters on a classifier, or if peft is not installed.
    """
    if config.name == "none":
        return
    examples = subset(examples, config.max_examples, rng)
    local = LocalConfig(optimizer="adam", epochs=config.epochs, batch_size=config.batch_size, lr=config.lr)
    if config.name == "full":
        train_locally(model, examples, info, local, rng)
    else:
        adapted = _add_adapters(model, info, config)
        train_locally(adapted, examples, info, local, rng)
        adapted.merge_and_unload()
        model.requires_grad_(True)
    model.eval()


def _add_adapters(model: nn.Module, info: DataInfo, config: FinetuneConfig) -> Any:
    if not (peft_type := task_of(info).peft_type):
        raise ConfigError("finetune=lora is for language models; choose finetune=full")
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError('finetune=lora needs the package peft; run: pip install "fedlp[finetune]"') from error
    adapters = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear", task_type=peft_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what the one library says of the other
        return peft.get_peft_model(model, adapters)
