r"""LoRA (Hu et al., ICLR 2022): linear layers :math:`y = W x + \frac{\alpha}{r} B A x` with trainable A and B.

An adapted layer keeps the names of its weight and bias, beside ``lora_a`` (r, in), drawn at random, and ``lora_b``
(out, r), zero at first. A slice of the layer is a slice of both: the columns of A and the rows of B lie on the width
axes of the weight's columns and rows, so that the product of the slices is the slice of the product.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.adapter_stacks import apply_stack, stack_of
from fedlp.models.blueprint import Blueprint

PARTS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class LoraOptions:
    """Options of the adapters of one model.

    Attributes
    ----------
    rank : int
        r, >= 1.
    alpha : float
        Scale of the product is alpha / r, > 0.
    targets : tuple of str
        Patterns of the names of linear layers, as for file names; of the last part of the path, or of all of it.
    dropout : float
        Probability that an adapter's input is dropped in training, in [0, 1).
    freeze_a : bool
        Whether A keeps its first values (FFA-LoRA, Sun et al., ICLR 2024).
    cut : "widths" or "ranks"
        What sub-models cut: widths of the model and its adapters, or ranks of all adapters alike, on the whole base.
    base : "float32" or "encoded"
        What clients hold the base in: float32, or as it was sent, widened a few rows at a time.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*_proj",)
    dropout: float = 0.0
    freeze_a: bool = False
    cut: str = "widths"
    base: str = "float32"

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", 0 < self.alpha < math.inf, "a finite number above 0"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("targets", bool(self.targets), "at least one name or pattern"),
            ("cut", self.cut in ("widths", "ranks"), "widths or ranks"),
            ("base", self.base in ("float32", "encoded"), "float32 or encoded"),
        ):
            if not holds:
                raise ConfigError(f"adapter.{name}={getattr(self, name)} is not allowed: it must be {allowed}")


class LoraLinear(nn.Linear):
    """Linear layer with an adapter; shares the layer's parameters."""

    def __init__(self, linear: nn.Linear, options: LoraOptions) -> None:
        nn.Module.__init__(self)  # the weights are there already
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(linear.weight.new_empty(options.rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, options.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale, self.dropout = options.alpha / options.rank, options.dropout
        self.cuts_ranks = options.cut == "ranks"

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum of the layer's and the adapter's output."""
        if (stack := stack_of(self)) is not None:
            return apply_stack(self, input, stack, self.scale, self.dropout if self.training else 0.0)
        dropped = F.dropout(input, self.dropout, self.training)
        return self.base(input) + self.scale * F.linear(F.linear(dropped, self.lora_a), self.lora_b)

    def base(self, input: Tensor) -> Tensor:
        """Return the output without the adapter's."""
        return F.linear(input, self.weight, self.bias)

    @torch.no_grad()
    def product(self) -> Tensor:
        """Return the adapter's weight update, (out, in)."""
        return self.scale * (self.lora_b @ self.lora_a)


@dataclass(frozen=True)
class AdaptedBlueprint(Blueprint):
    """Blueprint of a language model with adapters; all other parameters are frozen."""

    base: Blueprint
    options: LoraOptions
    is_language: ClassVar[bool | None] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """The model's."""
        return self.base.name

    @property
    def num_depths(self) -> int:  # type: ignore[override]
        """The model's."""
        return self.base.num_depths

    @property
    def is_pretrained(self) -> bool:
        """Whether the model's weights are pretrained."""
        return self.base.is_pretrained

    def check_inputs(self) -> None:
        """Raise ConfigError if the model has no rules for adapters, or cannot take the inputs."""
        if self.base.is_language is not True:
            raise ConfigError(f"adapter=lora is for causal language models; model {self.name} is none")
        self.base.check_inputs()

    def build(self) -> nn.Module:
        """Return the model with fresh parameters and adapters."""
        return add_adapters(self.base.build(), self.options)

    def build_initial(self) -> nn.Module:
        """Return the initial model with fresh adapters."""
        return add_adapters(self.base.build_initial(), self.options)

    def build_prefix(self, depth: int) -> nn.Module:
        """Return a prefix with adapters; its personal head has none and is trained whole."""
        return add_adapters(self.base.build_prefix(depth), self.options)

    def frozen(self, parameters: Sequence[str]) -> frozenset[str]:
        """Return the parameters that are not adapters, and A where it is frozen."""
        trained = PARTS[1:] if self.options.freeze_a else PARTS
        return frozenset(name for name in parameters if name.rpartition(".")[2] not in trained)


def add_adapters(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Add adapters to a model's target layers and return it; ConfigError if no linear layer is a target."""
    found = {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and _is_target(path, options.targets)
    }
    if not found:
        linear = sorted({path.rpartition(".")[2] for path, m in model.named_modules() if type(m) is nn.Linear})
        raise ConfigError(
            f"adapter.targets={list(options.targets)}: no linear layer has such a name; the model's are called "
            f"{', '.join(linear) or 'nothing: it has none'}"
        )
    for path, module in found.items():
        _replace(model, path, LoraLinear(module, options))
    return model


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers with adapters, by path."""
    return dict(_adapted(model))


def has_adapters(model: nn.Module) -> bool:
    """Return whether some layer has an adapter."""
    return any(True for _ in _adapted(model))


def cuts_ranks(model: nn.Module) -> bool:
    """Return whether sub-models cut the ranks of adapters, and nothing else."""
    return any(module.cuts_ranks for _, module in _adapted(model))


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Merge adapters into the weights in place and set them to zero; outputs stay the same."""
    for _, module in _adapted(model):
        module.weight += module.product()
        module.lora_b.zero_()
    return model


def without_adapters(model: nn.Module) -> nn.Module:
    """Return a copy with adapters merged into plain linear layers."""
    plain = merge_adapters(copy.deepcopy(model))
    for path, module in list(_adapted(plain)):
        linear = nn.Linear(1, 1)
        linear.in_features, linear.out_features = module.in_features, module.out_features
        linear.weight, linear.bias = module.weight, module.bias
        _replace(plain, path, linear)
    return plain


def save_peft(model: nn.Module, options: LoraOptions, base: str, folder: Path) -> None:
    """Write adapters as a folder that ``peft.PeftModel.from_pretrained`` loads onto the base model."""
    folder.mkdir(parents=True)
    tensors, names = {}, []
    for path, module in _adapted(model):
        names.append(path)
        for part, theirs in zip(PARTS, ("lora_A", "lora_B"), strict=True):
            tensor: Tensor = getattr(module, part)
            tensors[f"base_model.model.{path}.{theirs}.weight"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    about: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": names,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _is_target(path: str, patterns: Sequence[str]) -> bool:
    name = path.rpartition(".")[2]
    return any(fnmatchcase(name, pattern) or fnmatchcase(path, pattern) for pattern in patterns)


def _adapted(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
