"""Causal language models of transformers: a small LLaMA by sizes, or any model by name or folder.

A depth prefix is the embeddings and the first decoder blocks, with the final norm and the output layer as personal
head, where the decoder is found: in the LLaMA style (``model.layers``; Mistral, Qwen, ...), GPT-2's
(``transformer.h``), MPT's (``transformer.blocks``), GPT-NeoX's (``gpt_neox.layers``) and OPT's
(``model.decoder.layers``). Any other causal language model trains as a whole.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.blueprint import Blueprint, ModelTask
from fedlp.models.sequence_classifier import SequenceClassifierBlueprint
from fedlp.models.stored_dtype import model_dtype
from fedlp.models.transformers_loading import import_transformers, loading, quiet
from fedlp.registry import register

_MAX_DEPTHS = 6
_DECODERS = (  # path of the decoder, names of its blocks and final norm
    ("model", "layers", "norm"),
    ("model", "layers", "final_layernorm"),
    ("model", "layers", "final_norm"),
    ("transformer", "h", "ln_f"),
    ("transformer", "blocks", "norm_f"),
    ("gpt_neox", "layers", "final_layer_norm"),
    ("model.decoder", "layers", "final_layer_norm"),
)


class Decoder(NamedTuple):
    """Location of a language model's blocks.

    Attributes
    ----------
    path : str
        Of the module that holds the list of blocks.
    module : nn.Module
        That module.
    blocks, norm : str
        Names in it of the list, and of the norm after the last block.
    """

    path: str
    module: nn.Module
    blocks: str
    norm: str


class PrefixLM(nn.Module):
    """A backbone without final norm, under its global names, and the norm and output layer as ``personal_head``."""

    def __init__(self, model: nn.Module, num_blocks: int) -> None:
        super().__init__()
        path, decoder, blocks_name, norm_name = find_decoder(model)
        blocks = decoder.get_submodule(blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        del blocks[num_blocks:]
        output = model.get_output_embeddings()  # type: ignore[operator]
        norm = getattr(decoder, norm_name) or nn.Identity()  # some OPT models have none
        setattr(decoder, norm_name, nn.Identity())
        self.backbone = path.partition(".")[0]
        self.add_module(self.backbone, model.get_submodule(self.backbone))
        bias = output.bias is not None
        self.personal_head = nn.Sequential(norm, nn.Linear(output.in_features, output.out_features, bias))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, tokens) to logits (batch, tokens, vocabulary)."""
        hidden = self.get_submodule(self.backbone)(tokens, use_cache=False).last_hidden_state
        return self.personal_head(hidden)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LanguageBlueprint(Blueprint):
    """Blueprint of a causal language model by its transformers config; ``path`` names its weights."""

    name: str
    config: Any
    path: str | None
    is_language: ClassVar[bool | None] = True

    @property
    def num_depths(self) -> int:  # type: ignore[override]
        """Every number of blocks, or six spread evenly where there are more."""
        return min(int(self.config.num_hidden_layers), _MAX_DEPTHS)

    def build(self) -> nn.Module:
        """Return the model with fresh parameters, float32."""
        config = copy.deepcopy(self.config)
        if (pruned := _pruned_class(config)) is not None:
            model: nn.Module = pruned(config)
        else:
            model = import_transformers().AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model

    def has_prefixes(self, model: nn.Module) -> bool:
        """Return whether the model's blocks lie where known families have theirs."""
        return self.num_depths > 1 and try_decoder(model) is not None

    def build_initial(self) -> nn.Module:
        """Return the initial model, float32."""
        if self.path is None:
            return self.build()
        kind = _pruned_class(self.config) or import_transformers().AutoModelForCausalLM
        with quiet(), loading(self.path):
            model: nn.Module = kind.from_pretrained(
                self.path, config=copy.deepcopy(self.config), dtype=torch.float32, use_safetensors=True
            )
        return model.train()

    def stored_dtype(self) -> torch.dtype:
        """Return the format of a local folder's weights, else that of the model's config."""
        return model_dtype(self.path, self.config)

    def build_prefix(self, depth: int) -> nn.Module:
        """Return embeddings and first blocks with a personal norm and output layer."""
        num_blocks = math.ceil(int(self.config.num_hidden_layers) * depth / self.num_depths)
        return PrefixLM(self.build(), num_blocks)


@register("model", "llama")
def make_llama(
    name: str,
    input_shape: tuple[int, ...],
    vocabulary: int,
    task: ModelTask,
    hidden_size: int = 64,
    intermediate_size: int = 172,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> LanguageBlueprint:
    """LLaMA of given sizes with tied embeddings; its vocabulary is the data set's."""
    sequence_length = _sequence_length(name, input_shape)
    if task.exact_outputs:
        raise ConfigError(f"model {name} is a language model, which predicts tokens; classify text with model=hf")
    sizes_given = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_layers": num_layers}
    for option, size in (sizes_given | {"num_heads": num_heads, "num_kv_heads": num_kv_heads}).items():
        if size < 1:
            raise ConfigError(f"model.{option}={size} is not allowed: it must be at least 1")
    if hidden_size % num_heads or num_heads % num_kv_heads:
        raise ConfigError(
            f"model.num_heads={num_heads} must divide model.hidden_size={hidden_size} and be a multiple "
            f"of model.num_kv_heads={num_kv_heads}"
        )
    sizes = import_transformers().LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LanguageBlueprint(name, sizes, path=None)


@register("model", "hf")
def load_hf(
    input_shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int,
    task: ModelTask,
    path: str | None = None,
    pretrained: bool = True,
) -> Blueprint:
    """Model of transformers on the Hugging Face hub or in a local folder, by ``path``, with the head of the task.

    Raises
    ------
    ConfigError
        If it cannot be read, is no model of the task, or is too small for the vocabulary or the sequences.
    """
    sequence_length = _sequence_length(str(path), input_shape)
    if path is None:
        raise ConfigError("model.path is not set; give a Hugging Face model name or a local folder")
    transformers = import_transformers()
    with quiet(), loading(path):
        sizes = transformers.AutoConfig.from_pretrained(path)
    table = re.sub("(?<=[a-z])(?=[A-Z])", "_", task.auto_model.removeprefix("Auto")).upper() + "_MAPPING"
    if type(sizes) not in getattr(transformers, table, ()):
        kind = "a sequence classifier" if task.exact_outputs else "a causal language model"
        raise ConfigError(f"model.path={path} is a {sizes.model_type}, not {kind}")
    sizes.use_cache = False
    tokens = sizes.get_text_config().vocab_size
    if tokens < vocabulary:
        raise ConfigError(
            f"model {path} knows {tokens} tokens, but the data set has {vocabulary}; set dataset.tokenizer={path}"
        )
    limit = getattr(sizes, "max_position_embeddings", sequence_length)
    if sequence_length > limit:
        raise ConfigError(f"model {path} reads {limit} tokens; set dataset.sequence_length to at most that")
    if task.exact_outputs:
        return SequenceClassifierBlueprint.of(path, sizes, task.auto_model, num_classes, pretrained)
    return LanguageBlueprint(path, sizes, path if pretrained else None)


def _sequence_length(name: str, input_shape: tuple[int, ...]) -> int:
    if len(input_shape) != 1:
        raise ConfigError(f"model {name} is a language model, but the data set needs a classifier")
    return input_shape[0]


def _pruned_class(config: Any) -> Any:
    """Return the class of a model with blocks of unequal width, as ``fedlp-prune`` writes it; None for any other.

    The folder's own copy of that class is not executed.
    """
    if not hasattr(config, "pruned_blocks"):
        return None
    modeling = importlib.import_module("fedlp.models.modeling_pruned")  # imports transformers
    name = (config.architectures or [""])[0]
    if not name.startswith("Pruned") or not hasattr(modeling, name):
        raise ConfigError(f"a {config.model_type} with pruned_blocks, but of class {name!r}: fedlp-prune wrote no such")
    return getattr(modeling, name)


def find_decoder(model: nn.Module) -> Decoder:
    """Return the location of a model's blocks; ConfigError if unknown."""
    found = try_decoder(model)
    if found is None:
        known = ", ".join(f"{path}.{blocks}" for path, blocks, _ in _DECODERS)
        raise ConfigError(f"no decoder blocks known in {type(model).__name__}; supported are {known}")
    return found


def try_decoder(model: nn.Module) -> Decoder | None:
    """Return the location of a model's blocks; None if unknown."""
    modules = dict(model.named_modules())
    for path, blocks, norm in _DECODERS:
        if isinstance(modules.get(f"{path}.{blocks}"), nn.ModuleList) and hasattr(modules[path], norm):
            return Decoder(path, modules[path], blocks, norm)
    return None
