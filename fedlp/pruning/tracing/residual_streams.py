"""Tensors along a language model's residual stream, for architectures whose stream can lose features."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedlp.pruning.tracing.slicing import WHOLE, Dim

_HIDDEN = Dim("hidden", 1)


@dataclass(frozen=True)
class _Table:
    """Modules outside the blocks, and norms in each block, by path.

    One letter per dimension of the weight, then of the bias: ``.`` whole, ``h`` hidden, ``e`` embedding (hidden, unless
    a layer projects it to hidden).
    """

    blocks: str
    outside: Mapping[str, str]
    norms: Mapping[str, str]


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model.

    Attributes
    ----------
    size : int
        Its features.
    embedding : int
        Features of an embedding.
    dims : mapping from tensor name to one Dim per dimension
        Dimensions of all tensors along it, except the layers of blocks.
    fits_config : bool
        Whether the sizes in a config alone tell if embeddings are projected.
    """

    size: int
    embedding: int
    dims: Mapping[str, tuple[Dim, ...]]
    fits_config: bool


_LLAMA = _Table(
    blocks="model.layers",
    outside={"model.embed_tokens": ".h", "model.norm": "h", "lm_head": ".h", "score": ".h"},
    norms={"input_layernorm": "h", "post_attention_layernorm": "h"},
)
_GPT2 = _Table(
    blocks="transformer.h",
    outside={
        "transformer.wte": ".h",
        "transformer.wpe": ".h",
        "transformer.ln_f": "h h",
        "lm_head": ".h",
        "score": ".h",
    },
    norms={"ln_1": "h h", "ln_2": "h h"},
)
_OPT = _Table(
    blocks="model.decoder.layers",
    outside={
        "model.decoder.embed_positions": ".h",
        "model.decoder.embed_tokens": ".e",
        "model.decoder.project_in": "he",
        "model.decoder.final_layer_norm": "h h",
        "model.decoder.project_out": "eh",
        "lm_head": ".e",
        "score": ".e",
    },
    norms={"self_attn_layer_norm": "h h", "final_layer_norm": "h h"},
)
_TABLES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2, "opt": _OPT}


def stream_dims(model: nn.Module) -> Stream | None:
    """Return the residual stream of a language model; None if it cannot lose features."""
    config: Any = model.config
    table = _TABLES.get(config.model_type)
    if table is None or not _has(model, table.blocks):
        return None
    blocks = list(model.get_submodule(table.blocks).named_children())
    decoder = model.get_submodule(table.blocks.rpartition(".")[0])
    projects = getattr(decoder, "project_in", None) is not None
    letters = {".": WHOLE, "h": _HIDDEN, "e": WHOLE if projects else _HIDDEN}
    layout = dict(table.outside)
    for name, _ in blocks:
        layout |= {f"{table.blocks}.{name}.{norm}": dims for norm, dims in table.norms.items()}
    dims = {
        f"{name}.{kind}": tuple(letters[letter] for letter in part)
        for name, both in layout.items()
        for kind, part in zip(("weight", "bias"), both.split(), strict=False)
    }
    template: Any = importlib.import_module("fedlp.models.modeling_pruned")  # imports transformers
    size: int = template.layer_sizes(blocks[0][1], template.LAYOUTS[config.model_type])["h"]
    embedding = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    return Stream(size, embedding, dims, projects == (embedding != size))


def _has(model: nn.Module, path: str) -> bool:
    try:
        return len(list(model.get_submodule(path).children())) > 0
    except AttributeError:
        return False
