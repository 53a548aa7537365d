"""Width axes of LLaMA-like causal language models (LLaMA, Mistral, Qwen2, Qwen3), by rule.

* ``hidden``: the residual stream; one feature is a unit.
* ``model.layers.N.self_attn``: one KV head with all queries that attend to it is a unit, so the ratio of query heads
  to KV heads stays what it was.
* ``model.layers.N.mlp``: one intermediate neuron is a unit.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fedlp.errors import ConfigError
from fedlp.models.spec import named_tensors
from fedlp.pruning.slicing import WHOLE, Dim, WidthSpec

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_HIDDEN: Dim = ("hidden", 1)


def is_language_model(model: nn.Module) -> bool:
    """Return whether a model is one of transformers', which are not traced."""
    return hasattr(getattr(model, "config", None), "model_type")


def llama_widths(model: nn.Module) -> WidthSpec:
    """Return the width axes of a LLaMA-like model; widths that differ from block to block are fine.

    Raises
    ------
    ConfigError
        If the model is of another kind, or has a tensor that no rule covers; names it.
    """
    config: Any = model.config
    if config.model_type not in _MODEL_TYPES:
        raise ConfigError(
            f"width slicing has no rules for language models of type {config.model_type}, only for "
            f"{', '.join(_MODEL_TYPES)}"
        )
    layers: Any = model.get_submodule("model.layers")
    axes = {"hidden": _hidden_size(model)}
    dims: dict[str, tuple[Dim, ...]] = {
        "model.embed_tokens.weight": (WHOLE, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (WHOLE, _HIDDEN),
    }
    for index, block in enumerate(layers):
        path = f"model.layers.{index}"
        head_dim = block.self_attn.head_dim
        axes[f"{path}.self_attn"] = block.self_attn.k_proj.out_features // head_dim
        axes[f"{path}.mlp"] = block.mlp.gate_proj.out_features
        queries = block.self_attn.q_proj.out_features // axes[f"{path}.self_attn"]
        dims |= _block_dims(path, (f"{path}.self_attn", queries), (f"{path}.self_attn", head_dim))
    names = named_tensors(model)
    unknown = next((name for name in names if name not in dims), None)
    if unknown is not None:
        raise ConfigError(f"width slicing has no rule for {unknown} of this {config.model_type} model")
    return WidthSpec(axes, {name: dims[name] for name in names})


def match_config(model: nn.Module) -> None:
    """Write a cut model's sizes into its config: exact where blocks agree, of the widest block where they do not."""
    config: Any = model.config
    blocks: Any = model.get_submodule("model.layers")
    config.hidden_size = _hidden_size(model)
    config.head_dim = blocks[0].self_attn.head_dim
    config.intermediate_size = max(block.mlp.gate_proj.out_features for block in blocks)
    config.num_attention_heads = max(block.self_attn.q_proj.out_features for block in blocks) // config.head_dim
    config.num_key_value_heads = max(block.self_attn.k_proj.out_features for block in blocks) // config.head_dim


def _hidden_size(model: nn.Module) -> int:
    return model.get_parameter("model.embed_tokens.weight").shape[1]


def _block_dims(path: str, queries: Dim, keys: Dim) -> dict[str, tuple[Dim, ...]]:
    neurons: Dim = (f"{path}.mlp", 1)
    outputs = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    outputs |= {"mlp.gate_proj": neurons, "mlp.up_proj": neurons}
    inputs = {"self_attn.o_proj": queries, "mlp.down_proj": neurons}
    dims: dict[str, tuple[Dim, ...]] = {}
    for name, dim in outputs.items():
        dims[f"{path}.{name}.weight"], dims[f"{path}.{name}.bias"] = (dim, _HIDDEN), (dim,)
    for name, dim in inputs.items():
        dims[f"{path}.{name}.weight"], dims[f"{path}.{name}.bias"] = (_HIDDEN, dim), (_HIDDEN,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        dims[f"{path}.{name}.weight"] = (_HIDDEN,)
    for name in ("q_norm", "k_norm"):
        dims[f"{path}.self_attn.{name}.weight"] = (WHOLE,)
    return dims
