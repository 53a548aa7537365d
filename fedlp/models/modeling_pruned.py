"""Causal language models whose blocks differ in width, for transformers to load with ``trust_remote_code=True``.

This file travels with the weights, beside their ``config.json``, and needs torch and transformers only. It is written
for the architectures below, which it builds as they are and then resizes block by block. The config's ``pruned_blocks``
has one entry per block:

* ``attention_heads``, ``key_value_heads``, ``head_dim``, ``intermediate_size``: its sizes;
* ``attention_output_bias``, ``mlp_output_bias``: whether the last layer of its attention and of its MLP has a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D


class Layout(NamedTuple):
    """Where the blocks of an architecture are, and which of their layers have sizes of their own.

    Attributes
    ----------
    blocks, attention : str
        Path of the list of blocks, and the attention's name in each.
    layers : mapping from name in the block to two letters
        Outputs and inputs of each layer: ``h`` hidden, ``q`` queries, ``k`` keys or values, ``f`` queries, keys and
        values fused, ``n`` neurons.
    neurons : str
        What the config calls ``intermediate_size``.
    """

    blocks: str
    attention: str
    layers: Mapping[str, str]
    neurons: str


_LLAMA = Layout(
    "model.layers",
    "self_attn",
    {
        "self_attn.q_proj": "qh",
        "self_attn.k_proj": "kh",
        "self_attn.v_proj": "kh",
        "self_attn.o_proj": "hq",
        "mlp.gate_proj": "nh",
        "mlp.up_proj": "nh",
        "mlp.down_proj": "hn",
    },
    "intermediate_size",
)
_GPT2 = Layout(
    "transformer.h",
    "attn",
    {"attn.c_attn": "fh", "attn.c_proj": "hq", "mlp.c_fc": "nh", "mlp.c_proj": "hn"},
    "n_inner",
)
_OPT = Layout(
    "model.decoder.layers",
    "self_attn",
    {
        "self_attn.q_proj": "qh",
        "self_attn.k_proj": "kh",
        "self_attn.v_proj": "kh",
        "self_attn.out_proj": "hq",
        "fc1": "nh",
        "fc2": "hn",
    },
    "ffn_dim",
)
LAYOUTS = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2, "opt": _OPT}
OUTPUT_BIASES = {"hq": "attention_output_bias", "hn": "mlp_output_bias"}


def layer_sizes(block: nn.Module, layout: Layout) -> dict[str, int]:
    """Return what the letters of a layout stand for in one block."""
    sizes: dict[str, int] = {}
    for name, letters in layout.layers.items():
        layer: Any = block.get_submodule(name)
        shape = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
        sizes |= zip(letters, shape, strict=True)
    return sizes


def describe_blocks(model: nn.Module) -> list[dict[str, int | bool]]:
    """Return the entries of ``pruned_blocks`` that describe a model."""
    config: Any = model.config
    layout = LAYOUTS[config.model_type]
    found: list[dict[str, int | bool]] = []
    for block in model.get_submodule(layout.blocks).children():
        sizes = layer_sizes(block, layout)
        attention: Any = block.get_submodule(layout.attention)
        widths: dict[str, int | bool] = {
            "attention_heads": sizes["q"] // attention.head_dim,
            "key_value_heads": sizes.get("k", sizes["q"]) // attention.head_dim,
            "head_dim": attention.head_dim,
            "intermediate_size": sizes["n"],
        }
        for name, letters in layout.layers.items():
            if letters in OUTPUT_BIASES:
                widths[OUTPUT_BIASES[letters]] = block.get_submodule(name).bias is not None
        found.append(widths)
    return found


class _PrunedBlocks(nn.Module):
    """Comes before a native class, whose blocks it gives the sizes in ``config.pruned_blocks``."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layout = LAYOUTS[config.model_type]
        blocks = self.get_submodule(layout.blocks).children()
        for block, widths in zip(blocks, config.pruned_blocks, strict=True):
            _replace_layers(block, layout, config.hidden_size, widths)
            _match_attention(block.get_submodule(layout.attention), config, widths)
            if hasattr(block, "mlp") and hasattr(block.mlp, "intermediate_size"):
                block.mlp.intermediate_size = widths["intermediate_size"]
        self.post_init()  # type: ignore[operator]


def _replace_layers(block: nn.Module, layout: Layout, hidden: int, widths: Mapping[str, Any]) -> None:
    sizes = {
        "h": hidden,
        "q": widths["attention_heads"] * widths["head_dim"],
        "k": widths["key_value_heads"] * widths["head_dim"],
        "f": 3 * widths["attention_heads"] * widths["head_dim"],
        "n": widths["intermediate_size"],
    }
    for name, letters in layout.layers.items():
        outputs, inputs = sizes[letters[0]], sizes[letters[1]]
        old: Any = block.get_submodule(name)
        if isinstance(old, Conv1D):
            block.set_submodule(name, Conv1D(outputs, inputs))
        else:
            bias = widths[OUTPUT_BIASES[letters]] if letters in OUTPUT_BIASES else old.bias is not None
            block.set_submodule(name, nn.Linear(inputs, outputs, bias))


def _match_attention(attention: Any, config: Any, widths: Mapping[str, Any]) -> None:
    heads, head_dim = widths["attention_heads"], widths["head_dim"]
    if getattr(config, "scale_attn_weights", True):
        attention.scaling *= (attention.head_dim / head_dim) ** 0.5
    sizes = {
        "head_dim": head_dim,
        "num_heads": heads,
        "num_key_value_groups": heads // widths["key_value_heads"],
        "split_size": heads * head_dim,
    }
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)


class PrunedLlamaForCausalLM(_PrunedBlocks, LlamaForCausalLM):  # type: ignore[misc]
    """LLaMA with a width of its own for every block."""


class PrunedMistralForCausalLM(_PrunedBlocks, MistralForCausalLM):  # type: ignore[misc]
    """Mistral with a width of its own for every block."""


class PrunedQwen2ForCausalLM(_PrunedBlocks, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2 with a width of its own for every block."""


class PrunedQwen3ForCausalLM(_PrunedBlocks, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3 with a width of its own for every block."""


class PrunedGPT2LMHeadModel(_PrunedBlocks, GPT2LMHeadModel):  # type: ignore[misc]
    """GPT-2 with a width of its own for every block."""


class PrunedOPTForCausalLM(_PrunedBlocks, OPTForCausalLM):  # type: ignore[misc]
    """OPT with a width of its own for every block."""
