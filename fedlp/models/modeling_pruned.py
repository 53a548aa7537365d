"""Transformers with blocks of unequal width, loaded by the transformers library with ``trust_remote_code=True``.

This file travels with the weights, beside their ``config.json``, and needs torch and transformers only. ``PrunedX``,
for any class ``X`` of transformers whose architecture is among ``LAYOUTS``, builds a model as ``X`` does and then
resizes it block by block. The config's ``pruned_blocks`` has one entry per block:

* ``attention_heads``, ``key_value_heads``, ``head_dim``, ``intermediate_size``: its sizes; without heads or neurons the
  block has no attention or no MLP, nor the norm before it, and adds a bias in its place, or nothing;
* ``attention_output_bias``, ``mlp_output_bias``: whether the last layer of its attention and of its MLP has a bias.

Longer than other files: it travels alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Layout(NamedTuple):
    """Location of an architecture's blocks, and their layers of variable size.

    Attributes
    ----------
    blocks, attention : str
        Path of the list of blocks in the base model, and of the attention in each block.
    layers : mapping from name in the block to two letters
        Outputs and inputs of each layer: ``h`` hidden, ``q`` queries, ``k`` keys or values, ``f`` all queries, all keys
        and all values in a row, ``i`` queries, key and value of one head or group after those of another, ``n``
        neurons, ``g`` gates and neurons in a row.
    neurons : str
        Name of ``intermediate_size`` in the config.
    reads_config : bool
        Whether the attention reads its number of heads from the config at run time.
    norms : tuple of str
        Names in the block of the norms before the attention and before the MLP, where each has its own and the block
        adds the outputs of both to a residual stream: either may then be absent. Empty names where norms follow the
        sums instead, and stay; empty elsewhere.
    """

    blocks: str
    attention: str
    layers: Mapping[str, str]
    neurons: str = "intermediate_size"
    reads_config: bool = False
    norms: tuple[str, ...] = ()


_ATTENTION = {"q_proj": "qh", "k_proj": "kh", "v_proj": "kh"}
_GATED = {"gate_proj": "nh", "up_proj": "nh", "down_proj": "hn"}


def _llama(mlp: Mapping[str, str] = _GATED, output: str = "o_proj") -> Layout:
    attention = {f"self_attn.{name}": letters for name, letters in (_ATTENTION | {output: "hq"}).items()}
    return Layout("layers", "self_attn", attention | {f"mlp.{name}": letters for name, letters in mlp.items()})


def _neox(blocks: str, attention: str, fused: str, neurons: str) -> Layout:
    layers = {f"{attention}.query_key_value": f"{fused}h", f"{attention}.dense": "hq"}
    return Layout(blocks, attention, layers | {"mlp.dense_h_to_4h": "nh", "mlp.dense_4h_to_h": "hn"}, neurons)


_LLAMA = _llama()
_RESIDUAL_LLAMA = _LLAMA._replace(norms=("input_layernorm", "post_attention_layernorm"))
_GATES = {"gate_up_proj": "gh", "down_proj": "hn"}
_UNGATED = _llama({"up_proj": "nh", "down_proj": "hn"})
_GPT2 = Layout(
    "h",
    "attn",
    {"attn.c_attn": "fh", "attn.c_proj": "hq", "mlp.c_fc": "nh", "mlp.c_proj": "hn"},
    "n_inner",
    norms=("ln_1", "ln_2"),
)
_OPT = Layout(
    "decoder.layers",
    "self_attn",
    {f"self_attn.{name}": letters for name, letters in (_ATTENTION | {"out_proj": "hq"}).items()}
    | {"fc1": "nh", "fc2": "hn"},
    "ffn_dim",
    norms=("self_attn_layer_norm", "final_layer_norm"),
)
_BERT = Layout(
    "encoder.layer",
    "attention.self",
    {
        "attention.self.query": "qh",
        "attention.self.key": "kh",
        "attention.self.value": "kh",
        "attention.output.dense": "hq",
        "intermediate.dense": "nh",
        "output.dense": "hn",
    },
    norms=("", ""),
)
_LLAMA_LIKE = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "ministral", "ministral3", "seed_oss", "helium"),
    *("ernie4_5", "cwm", "hunyuan_v1_dense", "exaone4", "cohere", "cohere2", "stablelm", "hyperclovax"),
    *("olmo", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text"),
)
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(_LLAMA_LIKE, _LLAMA),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _RESIDUAL_LLAMA),
    **dict.fromkeys(("arcee", "nemotron", "apertus"), _UNGATED),
    **dict.fromkeys(("glm", "glm4"), _llama(_GATES)),
    "starcoder2": _llama({"c_fc": "nh", "c_proj": "hn"}),
    "phi": _llama({"fc1": "nh", "fc2": "hn"}, output="dense"),
    "phi3": Layout(
        "layers",
        "self_attn",
        {"self_attn.qkv_proj": "fh", "self_attn.o_proj": "hq", "mlp.gate_up_proj": "gh", "mlp.down_proj": "hn"},
        reads_config=True,
    ),
    "gpt2": _GPT2,
    "gpt_neox": _neox("layers", "attention", "i", "intermediate_size"),
    "bloom": _neox("h", "self_attention", "i", "pruned_intermediate_size"),
    "falcon": _neox("h", "self_attention", "i", "ffn_hidden_size"),
    "opt": _OPT,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _BERT),
}
OUTPUT_BIASES = {"hq": "attention_output_bias", "hn": "mlp_output_bias"}
_HEAD_DIMS = ("head_dim", "head_size", "attention_head_size")


class NoUnits(nn.Module):
    """Layer without outputs.

    Attributes
    ----------
    weight : (0, inputs)
        Not a parameter.
    """

    bias = None

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, 0

    @property
    def weight(self) -> Tensor:
        """Empty weight, for its shape."""
        return torch.empty(0, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., inputs) to (..., 0)."""
        return inputs.new_empty((*inputs.shape[:-1], 0))


class Constant(nn.Module):
    """Layer without inputs: its bias, or zeros, at every position.

    Attributes
    ----------
    weight : (outputs, 0)
        Not a parameter.
    """

    def __init__(self, outputs: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = 0, outputs, bias

    @property
    def weight(self) -> Tensor:
        """Empty weight, for its shape."""
        return torch.empty(self.out_features, 0)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., any) to (..., outputs), without memory of its own."""
        values = inputs.new_zeros(self.out_features) if self.bias is None else self.bias
        return values.expand(*inputs.shape[:-1], self.out_features)


class NoAttention(nn.Module):
    """Attention without heads: the bias of its output layer, or zeros.

    It keeps the count of tokens in a cache of keys and values, since models read that of their first block.
    """

    def __init__(self, attention: Any, output: str) -> None:
        super().__init__()
        self.head_dim, self.layer_idx, self._output = head_dim_of(attention), attention.layer_idx, output  # "": not its
        for name, layer in attention.named_children():
            if isinstance(layer, NoUnits | Constant):
                self.add_module(name, layer)

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> tuple[Tensor, None]:
        """Map (batch, tokens, hidden) to the same shape, and None for the attention's weights."""
        if past_key_values is not None:
            empty = hidden_states.new_zeros((hidden_states.shape[0], 1, hidden_states.shape[1], 1))
            past_key_values.update(empty, empty, self.layer_idx)
        return self.get_submodule(self._output)(hidden_states) if self._output else hidden_states, None


def drop_branches(model: nn.Module) -> None:
    """Replace the attentions without heads and MLPs without neurons of a model, and the norms before them."""
    config: Any = model.config
    for block in model.get_submodule(path_of_blocks(model)).children():
        _drop_empty(block, LAYOUTS[config.model_type])


def _drop_empty(block: Any, layout: Layout) -> None:
    for letters, norm in zip(OUTPUT_BIASES, layout.norms, strict=False):
        output = next(name for name, both in layout.layers.items() if both == letters)
        if block.get_submodule(output).weight.numel() or (norm and isinstance(block.get_submodule(norm), nn.Identity)):
            continue
        prefix, is_attention = f"{layout.attention}.", is_of_attention(letters)
        for name, both in layout.layers.items():
            layer: Any = block.get_submodule(name)
            if both == letters:
                block.set_submodule(name, Constant(layer_shape(layer)[0], layer.bias))
            elif is_of_attention(both) == is_attention:
                block.set_submodule(name, NoUnits(layer_shape(layer)[1]))
        if is_attention and not isinstance(attention := block.get_submodule(layout.attention), NoAttention):
            own = output.removeprefix(prefix) if output.startswith(prefix) else ""
            block.set_submodule(layout.attention, NoAttention(attention, own))
        if norm:
            block.set_submodule(norm, nn.Identity())


def is_of_attention(letters: str) -> bool:
    """Return whether a layer is an attention's, by the letters of its sizes; else it is an MLP's."""
    return not set(letters).isdisjoint("qkfi")


def layer_shape(layer: Any) -> tuple[int, int]:
    """Return the outputs and inputs of a layer."""
    first, second = layer.weight.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def path_of_blocks(model: nn.Module) -> str:
    """Return the path of a model's list of blocks."""
    config: Any = model.config
    base: Any = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    return prefix + LAYOUTS[config.model_type].blocks


def head_dim_of(attention: Any) -> int:
    """Return the size of an attention's heads."""
    return int(next(getattr(attention, name) for name in _HEAD_DIMS if hasattr(attention, name)))


def layer_sizes(block: nn.Module, layout: Layout) -> dict[str, int]:
    """Return the size behind each letter of a layout in one block."""
    sizes: dict[str, int] = {}
    for name, letters in layout.layers.items():
        sizes |= zip(letters, layer_shape(block.get_submodule(name)), strict=True)
    return sizes


def describe_blocks(model: nn.Module) -> list[dict[str, int | bool]]:
    """Return the entries of ``pruned_blocks`` that describe a model."""
    config: Any = model.config
    layout = LAYOUTS[config.model_type]
    found: list[dict[str, int | bool]] = []
    for block in model.get_submodule(path_of_blocks(model)).children():
        sizes, head_dim = layer_sizes(block, layout), head_dim_of(block.get_submodule(layout.attention))
        fused = sizes.get("f", sizes.get("i", 3 * sizes["q"]))
        widths: dict[str, int | bool] = {
            "attention_heads": sizes["q"] // head_dim,
            "key_value_heads": sizes.get("k", (fused - sizes["q"]) // 2) // head_dim,
            "head_dim": head_dim,
            "intermediate_size": sizes["n"],
        }
        for name, letters in layout.layers.items():
            if letters in OUTPUT_BIASES:
                widths[OUTPUT_BIASES[letters]] = block.get_submodule(name).bias is not None
        found.append(widths)
    return found


class _PrunedBlocks(nn.Module):
    """Mixin before a native class; resizes its blocks to ``config.pruned_blocks``."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        layout = LAYOUTS[config.model_type]
        blocks = self.get_submodule(path_of_blocks(self)).children()
        for block, widths in zip(blocks, config.pruned_blocks, strict=True):
            _replace_layers(block, layout, config.hidden_size, widths)
            _drop_empty(block, layout)
            match_attention(block.get_submodule(layout.attention), layout, config, widths)
            if hasattr(block, "mlp") and hasattr(block.mlp, "intermediate_size"):
                block.mlp.intermediate_size = widths["intermediate_size"]
        self.post_init()  # type: ignore[operator]
        self._auto_class = next(
            iter(getattr(config, "auto_map", None) or {}), None
        )  # this file is saved with the weights


def _replace_layers(block: nn.Module, layout: Layout, hidden: int, widths: Mapping[str, Any]) -> None:
    queries, keys = (widths[name] * widths["head_dim"] for name in ("attention_heads", "key_value_heads"))
    neurons = widths["intermediate_size"]
    sizes = {"h": hidden, "q": queries, "k": keys, "n": neurons, "g": 2 * neurons}
    sizes |= dict.fromkeys("fi", queries + 2 * keys)
    for name, letters in layout.layers.items():
        outputs, inputs = sizes[letters[0]], sizes[letters[1]]
        old: Any = block.get_submodule(name)
        if not outputs:
            block.set_submodule(name, NoUnits(inputs))
        elif not inputs:
            constant = nn.Parameter(torch.zeros(outputs)) if widths[OUTPUT_BIASES[letters]] else None
            block.set_submodule(name, Constant(outputs, constant))
        elif isinstance(old, Conv1D):
            block.set_submodule(name, Conv1D(outputs, inputs))
        else:
            bias = widths[OUTPUT_BIASES[letters]] if letters in OUTPUT_BIASES else old.bias is not None
            kind = nn.Linear if type(old) is nn.Linear else type(old)
            block.set_submodule(name, kind(inputs, outputs, bias))


def match_attention(attention: Any, layout: Layout, config: Any, widths: Mapping[str, Any]) -> None:
    """Set the sizes that an attention keeps as attributes; one without heads keeps the size of a head alone."""
    heads, keys, head_dim = (widths[name] for name in ("attention_heads", "key_value_heads", "head_dim"))
    if not heads:
        attention.head_dim = head_dim
        return
    if getattr(config, "scale_attn_weights", True) and hasattr(attention, "scaling"):
        attention.scaling *= (head_dim_of(attention) / head_dim) ** 0.5
    sizes = {
        **dict.fromkeys(_HEAD_DIMS, head_dim),
        **dict.fromkeys(("num_heads", "num_attention_heads"), heads),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), keys),
        "num_key_value_groups": heads // keys,
        **dict.fromkeys(("split_size", "all_head_size"), heads * head_dim),
    }
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if layout.reads_config:
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = heads


def __getattr__(name: str) -> Any:
    """Return the class of models like ``X`` of transformers whose blocks differ in width, for the name ``PrunedX``."""
    native = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if not (isinstance(native, type) and issubclass(native, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    doc = f"{native.__name__} with a width of its own for every block."
    globals()[name] = type(name, (_PrunedBlocks, native), {"__module__": __name__, "__doc__": doc})
    return globals()[name]
