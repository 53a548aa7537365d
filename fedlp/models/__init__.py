"""Models by config: FedLP's CNN and MLPs, torchvision classifiers and transformers' causal language models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedlp.errors import ConfigError
from fedlp.models.spec import (
    Blueprint,
    ModelSpec,
    Task,
    TensorInfo,
    describe_blueprint,
    forward_logits,
    leading_layers,
    state_tensors,
)

if TYPE_CHECKING:
    from fedlp.config import ModelConfig

__all__ = [
    "ModelSpec",
    "Task",
    "TensorInfo",
    "describe_model",
    "forward_logits",
    "leading_layers",
    "state_tensors",
]

_LANGUAGE_SOURCES = ("llama", "hf")


def describe_model(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int, task: Task) -> ModelSpec:
    """Return the spec of the configured model for data of this shape.

    Parameters
    ----------
    config : ModelConfig
        The config group ``model``.
    input_shape : tuple of int
        One example as the model reads it: (C, H, W), (features,), or (tokens,) of a language task.
    num_classes : int
        Classes, or tokens in the vocabulary.
    task : "classification" or "language"
        What the data set is for.

    Raises
    ------
    ConfigError
        If the model does not exist, is of another task, or cannot take such inputs.
    """
    is_language = config.source in _LANGUAGE_SOURCES
    if is_language != (task == "language"):
        kinds = ("a classifier", "a language model")
        raise ConfigError(
            f"model {config.name} is {kinds[is_language]}, but the data set needs {kinds[task == 'language']}"
        )
    blueprint = _language_blueprint if is_language else _classifier_blueprint
    found = blueprint(config, input_shape, num_classes)
    return describe_blueprint(found, task, input_shape, num_classes, config.frozen)


def _classifier_blueprint(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int) -> Blueprint:
    from fedlp.models.cnn import MLP_WIDTHS, FedLPCNNBlueprint, MLPBlueprint, SmallCNNBlueprint

    match config.source:
        case "fedlp_cnn":
            return FedLPCNNBlueprint(input_shape, num_classes)
        case "small_cnn":
            return SmallCNNBlueprint(input_shape, num_classes)
        case "fedlp_mlp":
            if config.variant not in MLP_WIDTHS:
                raise ConfigError(f"model.variant={config.variant} is none of {', '.join(MLP_WIDTHS)}")
            return MLPBlueprint(math.prod(input_shape), MLP_WIDTHS[config.variant], num_classes)
        case "torchvision":
            from fedlp.models.vision import TorchvisionBlueprint

            if config.norm not in ("batch", "group"):
                raise ConfigError(f"model.norm={config.norm} is neither batch nor group")
            return TorchvisionBlueprint(config.name, config.norm, config.pretrained, input_shape, num_classes)
        case "cifar_resnet":
            from fedlp.models.cifar_resnet import CifarResNetBlueprint

            return CifarResNetBlueprint(config.name, config.path, input_shape, num_classes)
        case source:
            known = ("fedlp_cnn", "fedlp_mlp", "small_cnn", "cifar_resnet", "torchvision", *_LANGUAGE_SOURCES)
            raise ConfigError(f"model.source={source} is none of {', '.join(known)}")


def _language_blueprint(config: ModelConfig, input_shape: tuple[int, ...], num_classes: int) -> Blueprint:
    from fedlp.models.language import load_hf, make_llama

    if len(input_shape) != 1:
        raise ConfigError(f"model {config.name} reads sequences of tokens, but the data set has shape {input_shape}")
    make = make_llama if config.source == "llama" else load_hf
    return make(config, num_classes, input_shape[0])
