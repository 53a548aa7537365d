"""Width axes of transformers' language models, by rule: from one table of layers per architecture.

* ``hidden``: the residual stream, of LLaMA, Mistral, Qwen2/3, GPT-2 and OPT; one feature is a unit. It stays whole in
  any other architecture.
* ``BLOCK.self_attn`` (or the attention's name): one KV head with all queries that attend to it is a unit, so
  the ratio of query heads to KV heads and the size of a head do not change. If all queries share one
  KV head (multi-query attention), a query head is a unit.
* ``BLOCK.mlp``: one intermediate neuron is a unit.
* ``ranks``, alone, where only adapters are cut: one rank of all adapters is a unit.

Without units of its own an attention or MLP is a branch that a block can do without, where its output is added to a
residual stream after a norm of its own: with it go the norm and all its tensors but the output's bias.

``BLOCK`` is ``model.layers.N``, ``transformer.h.N`` of GPT-2, ``bert.encoder.layer.N`` of BERT. A part without a rule
stays whole, and pins the axis that it may depend on: a norm over all heads pins its attention.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.adapters import PARTS, cuts_ranks
from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.residual_streams import stream_dims
from fedlp.pruning.tracing.slicing import WHOLE, Dim, WidthSpec

HIDDEN, RANKS = "hidden", "ranks"
_PER_HEAD = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")  # the same for all
_SCALED_STREAMS = (  # blocks that norm or scale what they add to the residual stream
    *("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "glm4", "granite", "hyperclovax"),
    *("bert", "roberta", "xlm-roberta", "camembert"),
)


@dataclass(frozen=True)
class Block:
    """One block: its path, the axes' names, and KV heads, query heads per KV head, entries per head, neurons."""

    path: str
    attention: str
    mlp: str
    heads: int
    queries: int
    head_dim: int
    neurons: int

    @property
    def is_multi_query(self) -> bool:
        """Whether all queries share one KV head."""
        return self.heads == 1 and self.queries > 1


def is_language_model(model: nn.Module) -> bool:
    """Return whether a model is one of transformers that reads tokens; such models are not traced."""
    reads = getattr(model, "main_input_name", "input_ids")
    return reads == "input_ids" and hasattr(getattr(model, "config", None), "model_type")


def decoder_widths(model: nn.Module) -> WidthSpec:
    """Return the width axes of a language model; widths may differ between blocks.

    Raises
    ------
    ConfigError
        If the model is of an architecture without rules.
    """
    if cuts_ranks(model):
        return _rank_widths(named_tensors(model))
    layout, names, blocks = _layout(model), named_tensors(model), _blocks(model)
    streams = stream_dims(model)
    axes = {HIDDEN: streams.size} if streams is not None else {}
    dims = dict(streams.dims) if streams is not None else {}
    for block in blocks:
        sizes = {block.attention: block.queries if block.is_multi_query else block.heads, block.mlp: block.neurons}
        axes |= {axis: size for axis, size in sizes.items() if size}
        letters = _letters(block, hidden=streams is not None)
        for name, (outputs, inputs) in layout.layers.items():
            path = f"{block.path}.{name}"
            both = letters[outputs], letters[inputs]
            is_transposed = type(model.get_submodule(path)).__name__ == "Conv1D"
            dims |= {f"{path}.weight": both[::-1] if is_transposed else both, f"{path}.bias": both[:1]}
    dims |= _adapter_dims(names, dims)
    unknown = {name: tensor for name, tensor in names.items() if name not in dims}
    pinned = {axis: reason for axis, reason in _pinned(model, blocks, unknown) if axis in axes}
    found = {name: dims.get(name, (WHOLE,) * tensor.ndim) for name, tensor in names.items()}
    norms_follow = layout.norms == ("", "")  # the sums, and stay
    branches = dict(_branches(model, blocks, found)) if adds_to_stream(model) or norms_follow else {}
    return WidthSpec(axes, found, branches=branches).pinned(pinned)


def _branches(
    model: nn.Module, blocks: list[Block], dims: Mapping[str, tuple[Dim, ...]]
) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield the axis of each attention and MLP, and the tensors off the axis that are of no use without its units."""
    layout = _layout(model)
    outputs = [name for letters in _template().OUTPUT_BIASES for name, both in layout.layers.items() if both == letters]
    for block in blocks:
        for axis, output, norm in zip((block.attention, block.mlp), outputs, layout.norms, strict=False):
            is_attention = axis == block.attention
            parts = [x for x, both in layout.layers.items() if _template().is_of_attention(both) == is_attention]
            if is_attention:
                parts.append(layout.attention)
            owners = tuple(f"{block.path}.{name}." for name in (norm, *parts) if name)
            yield (
                axis,
                frozenset(
                    name
                    for name, each in dims.items()
                    if name.startswith(owners)
                    and name != f"{block.path}.{output}.bias"
                    and all(dim.axis != axis for dim in each)
                ),
            )


def _letters(block: Block, hidden: bool) -> dict[str, Dim]:
    """Return the size behind each letter of a layout in one block."""
    queries, head = block.queries, block.head_dim
    return {
        "h": Dim(HIDDEN, 1) if hidden else WHOLE,
        "q": Dim(block.attention, head if block.is_multi_query else queries * head),
        "k": WHOLE if block.is_multi_query else Dim(block.attention, head),
        "f": Dim(block.attention, head, 3) if queries == 1 else Dim(block.attention, queries * head, 1, (head, head)),
        "i": Dim(block.attention, (queries + 2) * head),
        "n": Dim(block.mlp, 1),
        "g": Dim(block.mlp, 1, 2),
    }


def _pinned(model: nn.Module, blocks: list[Block], unknown: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield the axes that stay whole, with reasons; the residual stream if any other tensor is unknown."""
    config, layout = _config(model), _layout(model)
    is_fused = any(letters[0] in "fi" for letters in layout.layers.values())
    for block in blocks:
        if config.model_type == "bloom" or getattr(config, "alibi", False):
            yield block.attention, "the slopes of its position bias (ALiBi) depend on how many heads there are"
        elif is_fused and block.is_multi_query:
            yield block.attention, "its queries lie in one layer with the key and value that all of them share"
    for name, tensor in unknown.items():
        owner = name.rpartition(".")[0]
        around = (axis for block in blocks for axis in (block.attention, block.mlp) if name.startswith(f"{axis}."))
        if tensor.numel() > 1 and not _is_per_head(model, owner, tensor):
            yield next(around, HIDDEN), f"there is no rule for {type(model.get_submodule(owner)).__name__} in it"


def _is_per_head(model: nn.Module, owner: str, tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a norm over the entries of a head, shared by all heads."""
    path, _, name = owner.rpartition(".")
    return name in _PER_HEAD and tensor.shape == (_template().head_dim_of(model.get_submodule(path)),)


def _adapter_dims(names: Iterable[str], dims: Mapping[str, tuple[Dim, ...]]) -> dict[str, tuple[Dim, ...]]:
    """Return the dimensions of adapters, (rank, in) and (out, rank), from their weights."""
    found: dict[str, tuple[Dim, ...]] = {}
    for name in names:
        path, _, part = name.rpartition(".")
        if part in PARTS and f"{path}.weight" in dims:
            rows, columns = dims[f"{path}.weight"]
            found[name] = (WHOLE, columns) if part == PARTS[0] else (rows, WHOLE)
    return found


def _rank_widths(names: Mapping[str, Tensor]) -> WidthSpec:
    """Return one axis, that of the ranks of all adapters; all other tensors are whole."""
    dims = {name: (WHOLE,) * tensor.ndim for name, tensor in names.items()}
    size = 0
    for name, tensor in names.items():
        if name.rpartition(".")[2] == PARTS[0]:
            dims[name], size = (Dim(RANKS, 1), WHOLE), tensor.shape[0]
        elif name.rpartition(".")[2] == PARTS[1]:
            dims[name] = (WHOLE, Dim(RANKS, 1))
    return WidthSpec({RANKS: size}, dims, {})


def match_decoder(model: nn.Module) -> None:
    """Set the size attributes of the modules of a cut language model, and the sizes in its config.

    A config that can hold the size of a head gets the exact sizes if blocks agree, those of the widest block if
    they do not. Any other is changed only if it can describe the model exactly.
    """
    _template().drop_branches(model)
    layout, blocks, streams = _layout(model), _blocks(model), stream_dims(model)
    module: Any
    for module in model.modules():
        if streams is not None and isinstance(module, nn.LayerNorm):
            module.normalized_shape = (streams.size,)
        elif type(module).__name__ == "Conv1D":
            module.nx, module.nf = module.weight.shape
        if streams is not None and hasattr(module, "embed_dim"):
            module.embed_dim = streams.size
    for block in blocks:
        names = ("attention_heads", "key_value_heads", "head_dim")
        sizes = dict(zip(names, (block.heads * block.queries, block.heads, block.head_dim), strict=True))
        attention = model.get_submodule(f"{block.path}.{layout.attention}")
        _template().match_attention(attention, layout, model.config, sizes)
    if _holds_head_dim(model) or _fits_config(model, blocks):
        _write_config(model, blocks)


def path_of_blocks(model: nn.Module) -> str:
    """Return the path of the list of blocks; ConfigError if the architecture has no rules."""
    _layout(model)
    path: str = _template().path_of_blocks(model)
    return path


def adds_to_stream(model: nn.Module) -> bool:
    """Return whether each block adds the outputs of its attention and MLP unchanged to a residual stream."""
    config = _config(model)
    is_after_norm = getattr(config, "apply_residual_connection_post_layernorm", False)
    is_before = getattr(config, "do_layer_norm_before", True)
    return config.model_type not in _SCALED_STREAMS and is_before and not is_after_norm


def _config(model: nn.Module) -> Any:
    return model.config


def _template() -> Any:
    return importlib.import_module("fedlp.models.modeling_pruned")  # imports transformers


def _layout(model: nn.Module) -> Any:
    layouts, kind = _template().LAYOUTS, _config(model).model_type
    if kind not in layouts:
        raise ConfigError(
            f"width slicing has no rules for language models of type {kind}, only for {', '.join(layouts)}; such a "
            "model trains with strategy=fedavg or fedlp_homo"
        )
    return layouts[kind]


def _blocks(model: nn.Module) -> list[Block]:
    path, layout = path_of_blocks(model), _layout(model)
    found = []
    for index, sizes in enumerate(_template().describe_blocks(model)):
        block, heads = f"{path}.{index}", sizes["key_value_heads"]
        found.append(
            Block(
                path=block,
                attention=f"{block}.{layout.attention}",
                mlp=f"{block}.mlp",
                heads=heads,
                queries=sizes["attention_heads"] // max(heads, 1),
                head_dim=sizes["head_dim"],
                neurons=sizes["intermediate_size"],
            )
        )
    return found


def _write_config(model: nn.Module, blocks: list[Block]) -> None:
    config, layout, streams = _config(model), _layout(model), stream_dims(model)
    heads, neurons = (max(1, *(getattr(block, name) for block in blocks)) for name in ("heads", "neurons"))
    sizes = {layout.neurons: neurons, "num_kv_heads": heads}
    if streams is not None:
        sizes |= {"hidden_size": streams.size, "word_embed_proj_dim": streams.embedding}
    if _holds_head_dim(model):
        config.head_dim = blocks[0].head_dim
        sizes["num_key_value_heads"] = heads
    for name, size in sizes.items():
        if hasattr(config, name):
            setattr(config, name, size)
    config.num_attention_heads = max(1, *(block.heads * block.queries for block in blocks))


def _holds_head_dim(model: nn.Module) -> bool:
    """Return whether the architecture reads the size of a head from its config."""
    config = _config(model)
    return hasattr(config, "num_key_value_heads") and config.model_type != "stablelm"


def _fits_config(model: nn.Module, blocks: list[Block]) -> bool:
    """Return whether a config that holds no size of heads can describe the model."""
    streams, first = stream_dims(model), blocks[0]
    hidden = _config(model).hidden_size if streams is None else streams.size
    agree = all((b.heads, b.queries, b.neurons) == (first.heads, first.queries, first.neurons) for b in blocks)
    fills = first.heads * first.queries * first.head_dim == hidden
    return agree and fills and (streams is None or streams.fits_config)
