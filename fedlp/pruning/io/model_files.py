"""How a pruned model leaves fedlp: files that its own ecosystem loads.

A language model becomes a folder for transformers, a classifier compact weights with the units they belong to, and
either of them an ONNX file.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedlp.errors import ConfigError, one_line
from fedlp.models.spec import named_tensors, state_tensors
from fedlp.models.transformers_loading import import_transformers
from fedlp.pruning.io.classifier_files import load_classifier, round_weights, save_classifier, stored_tensors
from fedlp.pruning.tracing.decoder import is_language_model

if TYPE_CHECKING:
    from fedlp.models.modeling_pruned import Layout  # imports transformers

__all__ = ["export_onnx", "load_classifier", "round_weights", "save_classifier", "save_language_model"]

_TEMPLATE = "modeling_pruned"
_MAX_ONNX_BYTES = 2**31 - 2**27  # of weights in one file; more lie beside it

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
        loaded with ``from_pretrained(folder, trust_remote_code=True)``.
    tokenizer : str or None
        Hugging Face name or folder of a tokenizer that is saved along.
    dtype : torch.dtype or None
        Of the weights in the file; the model's own for None.

    Raises
    ------
    ConfigError
        If the model cannot be described, the tokenizer not be loaded or the folder not be written.
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
        if hasattr(config, "pruned_blocks"):
            (folder / f"{_TEMPLATE}.py").write_text(Path(inspect.getfile(model_class)).read_text())
        if vocabulary is not None:
            vocabulary.save_pretrained(folder)
        save_file(stored_tensors(model, written), folder / "model.safetensors", {"format": "pt"})
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model cannot be written to {folder}: {one_line(error)}") from error


def _load_tokenizer(name: str) -> Any:
    try:
        return import_transformers().AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library lets anything through, from OSError to its hub client's own errors
        raise ConfigError(f"tokenizer {name} cannot be loaded: {one_line(error)}; give a name or a folder") from error


def _describe(model: nn.Module) -> tuple[Any, Any]:
    """Return a config that describes a model, and the class that it builds: transformers' own if possible."""
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
        setattr(config, layout.neurons, max(neurons) + (len(neurons) == 1))
    if not _builds(getattr(template, name), config, model, blocks):
        raise ConfigError(f"this {native.__name__} cannot be exported: more than its heads and neurons is unusual")
    return config, getattr(template, name)


def _auto_class(native: Any, config_class: Any) -> str:
    """Return the class of transformers that finds a class by its config."""
    transformers = import_transformers()
    for kind, words in _AUTO_CLASSES.items():
        if getattr(transformers, f"MODEL_FOR_{kind}_MAPPING").get(config_class, None) is native:
            return f"AutoModelFor{words}"
    return "AutoModel"


def _write_sizes(config: Any, model: nn.Module, blocks: Blocks, layout: Layout) -> None:
    """Write the sizes that the model has, those of the widest block where blocks differ."""
    from fedlp.models.modeling_pruned import layer_sizes, path_of_blocks

    for stale in ("auto_map", "pruned_blocks"):
        if hasattr(config, stale):
            delattr(config, stale)
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


def _valid_heads(blocks: Blocks, hidden: int) -> tuple[int, int]:
    """Return the heads of a config whose blocks say their own: query heads must divide the hidden size.

    They fill the hidden size, if possible, and are no fewer than any block's, if possible.
    """
    queries = max(block["attention_heads"] // block["key_value_heads"] for block in blocks)
    widest = _widest(blocks, "key_value_heads")
    if widest == 1 and queries > 1:  # multi-query attention, whose blocks may differ in queries
        valid = [(heads, 1) for heads in range(queries, hidden + 1) if hidden % heads == 0]
    else:
        valid = [(n * queries, n) for n in range(widest, hidden + 1) if hidden % (n * queries) == 0]
    return min(valid, key=lambda heads: heads[0] * blocks[0]["head_dim"] != hidden, default=(1, 1))


def _widest(blocks: Blocks, size: str) -> int:
    return max(block[size] for block in blocks)


def _builds(model_class: Any, config: Any, model: nn.Module, blocks: Blocks) -> bool:
    """Return whether a class builds a model of the same tensors and blocks from a config that is read again."""
    from huggingface_hub.errors import StrictDataclassError

    from fedlp.models.modeling_pruned import describe_blocks

    try:
        again = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            built: nn.Module = model_class(again)
    except (ValueError, StrictDataclassError):
        return False
    shapes = [{name: tensor.shape for name, tensor in named_tensors(each).items()} for each in (built, model)]
    return shapes[0] == shapes[1] and describe_blocks(built) == blocks


class _Logits(nn.Module):
    """A model of which only the logits come out."""

    def __init__(self, model: nn.Module, is_language: bool) -> None:
        super().__init__()
        self.model = model
        self.is_language = is_language

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs, use_cache=False).logits if self.is_language else self.model(inputs)
        return logits


def export_onnx(model: nn.Module, example_inputs: Tensor, path: Path) -> None:
    """Write a model as ONNX: ``input_ids`` or ``images`` in, ``logits`` out.

    Parameters
    ----------
    model : nn.Module
        A classifier or a causal language model; exported in evaluation mode, and left as it was.
    example_inputs : (batch, ...)
        Only their shape and type matter. The batch may differ later, and so may a language model's number of tokens.
    path : Path
        The file. Weights of more than 1.9 GB lie beside it, in ``path`` with ``.data`` at the end.

    Raises
    ------
    ConfigError
        If onnx or onnxscript is not installed, if the model has an operation without a counterpart, or if the
        file cannot be written.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX needs {" and ".join(missing)}; run: pip install "fedlp[export]"')
    program = _to_onnx(model, example_inputs)
    num_bytes = sum(tensor.nbytes for tensor in state_tensors(model).values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(path, external_data=num_bytes > _MAX_ONNX_BYTES)
    except OSError as error:
        raise ConfigError(f"the model cannot be written to {path}: {one_line(error)}") from error


def _to_onnx(model: nn.Module, example_inputs: Tensor) -> Any:
    is_language, name = is_language_model(model), type(model).__name__
    dynamic = {0: "batch", 1: "tokens"} if is_language else {0: "batch"}
    inputs = example_inputs.repeat(2, *[1] * (example_inputs.ndim - 1))  # a batch of one would be taken for fixed
    modes = [(module, module.training) for module in model.modules()]
    try:
        # FutureWarnings are torch's of itself; what it prints on a failure is in the error too.
        with warnings.catch_warnings(action="ignore", category=FutureWarning), redirect_stderr(io.StringIO()):
            program: Any = torch.onnx.export(
                _Logits(model, is_language).eval(),
                (inputs,),
                input_names=["input_ids" if is_language else "images"],
                output_names=["logits"],
                dynamic_shapes=({dim: torch.export.Dim(size) for dim, size in dynamic.items()},),
                verbose=False,
                dynamo=True,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"{name} cannot be written as ONNX: {_cause(error)}") from error
    finally:
        for module, training in modes:
            module.training = training
    for dim, size in zip(dynamic.values(), program.model.graph.inputs[0].shape, strict=False):
        if isinstance(size, int):
            raise ConfigError(f"{name} cannot be written as ONNX: its {dim} size is fixed to {size}")
    return program


def _cause(error: BaseException) -> str:
    """Return the first line of what an exporter's error is about."""
    while isinstance(error, torch.onnx.errors.OnnxExporterError) and error.__cause__ is not None:
        error = error.__cause__
    return one_line(error).partition(";")[0]
