"""Files of a pruned model for its own ecosystem.

A language model becomes a folder for transformers, a classifier compact weights with their units, and
either of them an ONNX file.
"""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from fedlp.errors import ConfigError, one_line
from fedlp.models.spec import named_tensors
from fedlp.models.torchvision_compat import import_note
from fedlp.models.transformers_loading import import_transformers, quiet
from fedlp.pruning.io.classifier_files import load_classifier, round_weights, save_classifier, stored_tensors
from fedlp.pruning.io.model_card import model_card
from fedlp.pruning.io.onnx_files import export_onnx

if TYPE_CHECKING:
    from fedlp.models.modeling_pruned import Layout  # imports transformers

__all__ = ["export_onnx", "load_classifier", "round_weights", "save_classifier", "save_language_model"]

log = logging.getLogger("fedlp")

_TEMPLATE = "modeling_pruned"

_AUTO_CLASSES = {
    "CAUSAL_LM": "CausalLM",
    "SEQUENCE_CLASSIFICATION": "SequenceClassification",
    "MASKED_LM": "MaskedLM",
}

Blocks = list[dict[str, int | bool]]


def save_language_model(
    model: nn.Module, folder: Path, tokenizer: str | None, dtype: torch.dtype | None = None
) -> None:
    """Write a causal language model so that transformers loads it and computes the same logits.

    Parameters
    ----------
    model : nn.Module
        Of an architecture in ``modeling_pruned.LAYOUTS``, whole or cut by ``pruning.tracing.widths.cut_model``: blocks
        may differ in width, and the last layers of their attentions and MLPs may have got a bias.
    folder : Path
        Gets ``config.json``, ``generation_config.json`` and ``model.safetensors``. Where no config of transformers'
        own class describes the model also ``modeling_pruned.py``, and ``pruned_blocks`` in the config: such a folder is
        loaded with ``from_pretrained(folder, trust_remote_code=True)``. ``README.md`` says how.
    tokenizer : str or None
        Hugging Face name or folder of a tokenizer, which is saved as well.
    dtype : torch.dtype or None
        Of the weights in the file; the model's own for None.

    Raises
    ------
    ConfigError
        If the model cannot be described, the tokenizer cannot be loaded or the folder cannot be written.
    """
    config, model_class = _describe(model)
    config.architectures = [model_class.__name__]
    written = dtype or cast(torch.dtype, model.dtype)
    config.dtype = str(written).removeprefix("torch.")
    vocabulary = None if tokenizer is None else _load_tokenizer(tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            generation: Any = copy.deepcopy(model.generation_config)
            generation.use_cache = True
            generation.save_pretrained(folder)
        has_own_code = hasattr(config, "pruned_blocks")
        native: Any = getattr(import_transformers(), model_class.__name__.removeprefix("Pruned"))
        card = model_card(model_class.__name__, _auto_class(native, type(config)), has_own_code)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if has_own_code:
            (folder / f"{_TEMPLATE}.py").write_text(Path(inspect.getfile(model_class)).read_text())
        if vocabulary is not None:
            vocabulary.save_pretrained(folder)
        save_file(stored_tensors(model, written), folder / "model.safetensors", {"format": "pt"})
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model cannot be written to {folder}: {one_line(error)}") from error
    if (note := import_note()) is not None:
        log.warning("%s", note)


def _load_tokenizer(name: str) -> Any:
    try:
        return import_transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library lets anything through, from OSError to its hub client's own errors
        raise ConfigError(f"tokenizer {name} cannot be loaded: {one_line(error)}; give a name or a folder") from error


def _describe(model: nn.Module) -> tuple[Any, Any]:
    """Return a config that describes a model, and the class it builds: transformers' own if possible."""
    from fedlp.models import modeling_pruned as template

    config: Any = copy.deepcopy(model.config)
    if config.model_type not in template.LAYOUTS:
        known = ", ".join(template.LAYOUTS)
        raise ConfigError(f"language models of type {config.model_type} cannot be exported, only {known}")
    layout = template.LAYOUTS[config.model_type]
    blocks = template.describe_blocks(model)
    _write_sizes(config, model, blocks, layout)
    native: Any = getattr(import_transformers(), type(model).__name__.removeprefix("Pruned"))
    if _builds(native, config, model, blocks):
        return config, native
    name = f"Pruned{native.__name__}"
    config.auto_map = {_auto_class(native, type(config)): f"{_TEMPLATE}.{name}"}
    config.pruned_blocks = blocks
    _write_heads(config, blocks, *_valid_heads(blocks, config.hidden_size))
    neurons = {block["intermediate_size"] for block in blocks}
    if hasattr(config, layout.neurons):
        # Where all agree, one too many: the native class is to refuse the weights, not to leave out the biases.
        setattr(config, layout.neurons, max(1, *neurons) + (len(neurons) == 1))
    _write_layers(config, blocks, layout)
    if not _builds(getattr(template, name), config, model, blocks):
        raise ConfigError(f"this {native.__name__} cannot be exported: more than its heads and neurons is unusual")
    return config, getattr(template, name)


def _auto_class(native: Any, config_class: Any) -> str:
    """Return the auto class of transformers for a model class."""
    transformers = import_transformers()
    for kind, words in _AUTO_CLASSES.items():
        if getattr(transformers, f"MODEL_FOR_{kind}_MAPPING").get(config_class, None) is native:
            return f"AutoModelFor{words}"
    return "AutoModel"


def _write_sizes(config: Any, model: nn.Module, blocks: Blocks, layout: Layout) -> None:
    """Write the model's sizes, those of the widest block if blocks differ."""
    from fedlp.models.modeling_pruned import layer_sizes, path_of_blocks

    config.per_layer_config = None
    for stale in ("auto_map", "pruned_blocks", "per_layer_config", "allow_global_per_layer_attribute_access"):
        vars(config).pop(stale, None)
    config.use_cache = True
    config.hidden_size = layer_sizes(next(model.get_submodule(path_of_blocks(model)).children()), layout)["h"]
    if hasattr(config, "word_embed_proj_dim"):
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        config.word_embed_proj_dim = embedding.weight.shape[1]
    _write_heads(config, blocks, _widest(blocks, "attention_heads"), _widest(blocks, "key_value_heads"))
    if hasattr(config, layout.neurons):
        setattr(config, layout.neurons, _widest(blocks, "intermediate_size"))


def _write_heads(config: Any, blocks: Blocks, attention_heads: int, key_value_heads: int) -> None:
    config.num_attention_heads = attention_heads
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = key_value_heads
        config.head_dim = blocks[0]["head_dim"]
    elif hasattr(config, "num_kv_heads"):
        config.num_kv_heads = key_value_heads


def _write_layers(config: Any, blocks: Blocks, layout: Layout) -> None:
    """Write the sizes of every block in transformers' own form too, which 5.15 and newer read (a later one builds)."""
    sizes = {
        "num_attention_heads": "attention_heads",
        "num_key_value_heads": "key_value_heads",
        layout.neurons: "intermediate_size",
    }
    known = {name: size for name, size in sizes.items() if hasattr(config, name)}
    config.allow_global_per_layer_attribute_access = True  # of the widest block, for what asks the whole config
    config.per_layer_config = {
        number: {name: block[size] for name, size in known.items()} for number, block in enumerate(blocks)
    }


def _valid_heads(blocks: Blocks, hidden: int) -> tuple[int, int]:
    """Return the heads of a config with per-block sizes: query heads must divide the hidden size.

    They fill the hidden size, if possible, and are no fewer than any block's, if possible.
    """
    queries = max(block["attention_heads"] // max(block["key_value_heads"], 1) for block in blocks) or 1
    widest = _widest(blocks, "key_value_heads")
    if widest == 1 and queries > 1:  # multi-query attention, whose blocks may differ in queries
        valid = [(heads, 1) for heads in range(queries, hidden + 1) if hidden % heads == 0]
    else:
        valid = [(n * queries, n) for n in range(widest, hidden + 1) if hidden % (n * queries) == 0]
    return min(valid, key=lambda heads: heads[0] * blocks[0]["head_dim"] != hidden, default=(1, 1))


def _widest(blocks: Blocks, size: str) -> int:
    return max(1, *(block[size] for block in blocks))


def _builds(model_class: Any, config: Any, model: nn.Module, blocks: Blocks) -> bool:
    """Return whether a class builds a model of the same tensors and blocks from the config as written."""
    from huggingface_hub.errors import StrictDataclassError

    from fedlp.models.modeling_pruned import describe_blocks

    try:
        with quiet(), torch.device("meta"):  # the library warns that its own check reads a size that blocks override
            again = type(config).from_dict(config.to_dict())
            built: nn.Module = model_class(again)
    except (ValueError, StrictDataclassError):
        return False
    shapes = [{name: tensor.shape for name, tensor in named_tensors(each).items()} for each in (built, model)]
    return shapes[0] == shapes[1] and describe_blocks(built) == blocks
