"""Width axes of causal language models, by rule: one table per family of decoders.

* ``hidden``: the residual stream; one feature is a unit.
* ``BLOCK.self_attn`` (GPT-2: ``BLOCK.attn``): one KV head with all queries that attend to it is a unit, so the ratio of
  query heads to KV heads stays what it was, and so does the size of a head.
* ``BLOCK.mlp``: one intermediate neuron is a unit.

``BLOCK`` is ``model.layers.N``, ``transformer.h.N`` of GPT-2 or ``model.decoder.layers.N`` of OPT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedlp.errors import ConfigError
from fedlp.models.adapters import PARTS
from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.slicing import WHOLE, Dim, WidthSpec

_HIDDEN = Dim("hidden", 1)


@dataclass(frozen=True)
class _Family:
    """What the decoders of one family are made of.

    Attributes
    ----------
    blocks, attention : str
        Path of the list of blocks, and the attention's name in each.
    outside, inside : mapping from module name to str
        Modules outside the blocks and in every block. One letter per dimension of the weight, then of the bias:
        ``.`` whole, ``h`` hidden, ``e`` embedding (hidden, unless a layer projects it to hidden), ``q`` queries, ``k``
        keys or values (or queries, where they are as many), ``f`` queries, keys and values fused, ``n`` neurons.
    neurons : str
        What the config calls their number.
    has_head_dim : bool
        Whether the config holds the size of a head; otherwise it is hidden size / heads.
    """

    blocks: str
    attention: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    neurons: str
    has_head_dim: bool


_LLAMA = _Family(
    blocks="model.layers",
    attention="self_attn",
    outside={"model.embed_tokens": ".h", "model.norm": "h", "lm_head": ".h"},
    inside={
        "input_layernorm": "h",
        "self_attn.q_proj": "qh q",
        "self_attn.k_proj": "kh k",
        "self_attn.v_proj": "kh k",
        "self_attn.q_norm": ".",
        "self_attn.k_norm": ".",
        "self_attn.o_proj": "hq h",
        "post_attention_layernorm": "h",
        "mlp.gate_proj": "nh n",
        "mlp.up_proj": "nh n",
        "mlp.down_proj": "hn h",
    },
    neurons="intermediate_size",
    has_head_dim=True,
)
_GPT2 = _Family(  # its layers keep their weights as (in, out)
    blocks="transformer.h",
    attention="attn",
    outside={"transformer.wte": ".h", "transformer.wpe": ".h", "transformer.ln_f": "h h", "lm_head": ".h"},
    inside={
        "ln_1": "h h",
        "attn.c_attn": "hf f",
        "attn.c_proj": "kh h",
        "ln_2": "h h",
        "mlp.c_fc": "hn n",
        "mlp.c_proj": "nh h",
    },
    neurons="n_inner",
    has_head_dim=False,
)
_OPT = _Family(
    blocks="model.decoder.layers",
    attention="self_attn",
    outside={
        "model.decoder.embed_positions": ".h",
        "model.decoder.embed_tokens": ".e",
        "model.decoder.project_in": "he",
        "model.decoder.final_layer_norm": "h h",
        "model.decoder.project_out": "eh",
        "lm_head": ".e",
    },
    inside={
        "self_attn_layer_norm": "h h",
        "self_attn.q_proj": "kh k",
        "self_attn.k_proj": "kh k",
        "self_attn.v_proj": "kh k",
        "self_attn.out_proj": "hk h",
        "final_layer_norm": "h h",
        "fc1": "nh n",
        "fc2": "hn h",
    },
    neurons="ffn_dim",
    has_head_dim=False,
)
_FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2, "opt": _OPT}


@dataclass(frozen=True)
class _Sizes:
    """Of one block: KV heads, query heads per KV head, entries per head, neurons."""

    heads: int
    queries: int
    head_dim: int
    neurons: int


def is_language_model(model: nn.Module) -> bool:
    """Return whether a model is one of transformers', which are not traced."""
    return hasattr(getattr(model, "config", None), "model_type")


def decoder_widths(model: nn.Module) -> WidthSpec:
    """Return the width axes of a causal language model; widths that differ from block to block are fine.

    Raises
    ------
    ConfigError
        If the model is of a family without rules, or has a tensor that no rule covers; names it.
    """
    config: Any = model.config
    family, names = _family(model), named_tensors(model)
    axes = {"hidden": _hidden_size(model)}
    letters = {".": WHOLE, "h": _HIDDEN, "e": WHOLE if _projects_embeddings(model) else _HIDDEN}
    dims = _named_dims("", family.outside, letters)
    for index, sizes in enumerate(_block_sizes(model)):
        path = f"{family.blocks}.{index}"
        attention, mlp = f"{path}.{family.attention}", f"{path}.mlp"
        axes |= {attention: sizes.heads, mlp: sizes.neurons}
        letters |= {
            "q": Dim(attention, sizes.queries * sizes.head_dim),
            "k": Dim(attention, sizes.head_dim),
            "f": Dim(attention, sizes.head_dim, copies=3),
            "n": Dim(mlp, 1),
        }
        dims |= _named_dims(f"{path}.", family.inside, letters)
    dims |= _adapter_dims(names, dims)
    unknown = next((name for name in names if name not in dims), None)
    if unknown is not None:
        raise ConfigError(f"width slicing has no rule for {unknown} of this {config.model_type} model")
    return WidthSpec(axes, {name: dims[name] for name in names})


def _adapter_dims(names: Iterable[str], dims: Mapping[str, tuple[Dim, ...]]) -> dict[str, tuple[Dim, ...]]:
    """Return the dimensions of adapters, (rank, in) and (out, rank): those of the weights that they belong to."""
    found: dict[str, tuple[Dim, ...]] = {}
    for name in names:
        path, _, part = name.rpartition(".")
        if part in PARTS and f"{path}.weight" in dims:
            rows, columns = dims[f"{path}.weight"]
            found[name] = (WHOLE, columns) if part == PARTS[0] else (rows, WHOLE)
    return found


def match_decoder(model: nn.Module) -> None:
    """Set the sizes that the modules of a cut language model keep as attributes, and those in its config.

    A config that can hold the size of a head gets the exact sizes where blocks agree, those of the widest block where
    they do not. Any other is left as it is unless it can describe the model exactly.
    """
    family, hidden = _family(model), _hidden_size(model)
    module: Any
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (hidden,)
        elif type(module).__name__ == "Conv1D":
            module.nx, module.nf = module.weight.shape
        if hasattr(module, "embed_dim"):
            module.embed_dim = hidden
    blocks = _block_sizes(model)
    for index, sizes in enumerate(blocks):
        attention = model.get_submodule(f"{family.blocks}.{index}.{family.attention}")
        for name, size in (("num_heads", sizes.heads * sizes.queries), ("split_size", sizes.heads * sizes.head_dim)):
            if hasattr(attention, name):
                setattr(attention, name, size)
    if family.has_head_dim or _fits_config(model, blocks):
        _write_config(model, blocks)


def _fits_config(model: nn.Module, blocks: list[_Sizes]) -> bool:
    """Return whether a config that holds no size of heads can describe the model."""
    hidden = _hidden_size(model)
    projects = _embedding_size(model) != hidden
    agree = len(set(blocks)) == 1 and blocks[0].heads * blocks[0].head_dim == hidden
    return agree and _projects_embeddings(model) == projects


def _write_config(model: nn.Module, blocks: list[_Sizes]) -> None:
    config: Any = model.config
    family, heads = _family(model), max(sizes.heads for sizes in blocks)
    config.hidden_size = _hidden_size(model)
    if family.has_head_dim:
        config.head_dim = blocks[0].head_dim
        config.num_key_value_heads = heads
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = _embedding_size(model)
    setattr(config, family.neurons, max(sizes.neurons for sizes in blocks))
    config.num_attention_heads = heads * blocks[0].queries


def _family(model: nn.Module) -> _Family:
    config: Any = model.config
    if config.model_type not in _FAMILIES:
        raise ConfigError(
            f"width slicing has no rules for language models of type {config.model_type}, only for "
            f"{', '.join(_FAMILIES)}"
        )
    return _FAMILIES[config.model_type]


def _block_sizes(model: nn.Module) -> list[_Sizes]:
    family = _family(model)
    found = []
    for block in model.get_submodule(family.blocks).children():
        attention: Any = block.get_submodule(family.attention)
        heads = _length(block, family.inside, "k") // attention.head_dim
        queries = getattr(attention, "num_key_value_groups", 1)
        found.append(_Sizes(heads, queries, attention.head_dim, _length(block, family.inside, "n")))
    return found


def _hidden_size(model: nn.Module) -> int:
    return _length(model, _family(model).outside, "h")


def _embedding_size(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def _projects_embeddings(model: nn.Module) -> bool:
    decoder = model.get_submodule(_family(model).blocks.rpartition(".")[0])
    return getattr(decoder, "project_in", None) is not None


def _length(module: nn.Module, layout: Mapping[str, str], letter: str) -> int:
    """Return the length of the first dimension of a layout's weights that has this letter."""
    name, dims = next((name, dims) for name, dims in layout.items() if letter in dims.partition(" ")[0])
    return module.get_parameter(f"{name}.weight").shape[dims.index(letter)]


def _named_dims(prefix: str, layout: Mapping[str, str], letters: Mapping[str, Dim]) -> dict[str, tuple[Dim, ...]]:
    return {
        f"{prefix}{name}.{kind}": tuple(letters[letter] for letter in dims)
        for name, both in layout.items()
        for kind, dims in zip(("weight", "bias"), both.split(), strict=False)
    }
