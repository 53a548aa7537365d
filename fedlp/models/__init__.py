"""Models by config: FedLP's CNN and MLPs, torchvision classifiers and transformers' causal language models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fedlp.errors import ConfigError, FedLPError, one_line
from fedlp.models.adapters import AdaptedBlueprint, LoraOptions
from fedlp.models.blueprint import Blueprint, ModelTask, ModuleBlueprint, find_task
from fedlp.models.forward import forward_logits
from fedlp.models.layer_order import Layer
from fedlp.models.spec import ModelSpec, TensorInfo, describe_blueprint, leading_layers, state_tensors
from fedlp.models.torchvision_compat import ensure_operators
from fedlp.registry import register

if TYPE_CHECKING:
    from fedlp.config import AdapterConfig, ModelConfig

__all__ = [
    "Layer",
    "ModelSpec",
    "ModelTask",
    "TensorInfo",
    "describe_model",
    "forward_logits",
    "leading_layers",
    "state_tensors",
]


def describe_model(
    config: ModelConfig,
    input_shape: tuple[int, ...],
    num_classes: int,
    task: ModelTask | str,
    vocabulary: int | None = None,
    adapter: AdapterConfig | None = None,
) -> ModelSpec:
    """Return the spec of the configured model for data of this shape.

    Parameters
    ----------
    config : ModelConfig
        The config group ``model``.
    input_shape : tuple of int
        One example as the model reads it: (C, H, W), (features,), or (tokens,) of a language task.
    num_classes : int
        Outputs: classes, values, or the tokens of a language model's vocabulary.
    task : ModelTask or str
        The task of the data set, or its name.
    vocabulary : int or None
        Number of tokens, where inputs are tokens and ``num_classes`` is not their number.
    adapter : AdapterConfig or None
        Adapters of the model's layers.

    Raises
    ------
    ConfigError
        If the model does not exist, is of another task, or cannot take such inputs.
    """
    task = find_task(task)
    given = {"input_shape": input_shape, "num_classes": num_classes, "in_channels": input_shape[0]}
    given |= {"in_features": math.prod(input_shape), "task": task, "vocabulary": vocabulary or num_classes}
    found = _blueprint(config, given)
    if found.is_language is not None and found.is_language != task.reads_tokens:
        kinds = ("a classifier", "a language model")
        raise ConfigError(
            f"model {config.name} is {kinds[found.is_language]}, but the data set needs {kinds[task.reads_tokens]}"
        )
    return describe_blueprint(adapted(found, adapter), task, input_shape, num_classes, config.frozen, vocabulary)


def lora_options(adapter: AdapterConfig) -> LoraOptions:
    """Return the options of a config's adapters; ConfigError for one out of range."""
    targets = tuple(adapter.targets)
    return LoraOptions(
        adapter.rank, adapter.alpha, targets, adapter.dropout, adapter.freeze_a, adapter.cut, adapter.base
    )


def adapted(blueprint: Blueprint, adapter: AdapterConfig | None) -> Blueprint:
    """Return the blueprint with the adapters of a config."""
    if adapter is None or adapter.name == "none":
        return blueprint
    return AdaptedBlueprint(blueprint, lora_options(adapter))


def _blueprint(config: ModelConfig, given: dict[str, Any]) -> Blueprint:
    """Return the blueprint that a model part gives, or one around the module that it makes."""
    from torch import nn

    made = _call(config, given)
    if isinstance(made, Blueprint):
        return made
    if not isinstance(made, nn.Module):
        raise ConfigError(f"model={config.source} gives a {type(made).__name__}; it must give a torch.nn.Module")
    depths = getattr(made, "num_depths", 1)
    return ModuleBlueprint(config.name, lambda: _call(config, given), depths if isinstance(depths, int) else 1)


def _call(config: ModelConfig, given: dict[str, Any]) -> Any:
    if ":" in config.source:
        ensure_operators()  # the user's code may import transformers or torchvision by itself
    try:
        return config.make(**given)
    except FedLPError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model={config.source} cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error


@register("model", "object")
def model_object() -> Blueprint:
    """Model that was given to ``fedlp.simulate`` as an object; a config cannot build it again."""
    raise ConfigError("the run's model was given as an object to fedlp.simulate; it cannot be built from a config")
