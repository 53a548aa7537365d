"""Width axes of a model: tracing, and cutting the model along them.

A cut model is a smaller dense model, never a masked one. Its outputs are those of the whole model with the removed
units silenced, except along a language model's ``hidden`` axis, where norms average over fewer features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fedlp.errors import ConfigError
from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.cut_check import without_broken_axes
from fedlp.pruning.tracing.decoder import decoder_widths, is_language_model, match_decoder
from fedlp.pruning.tracing.empty_layers import drop_empty_layers
from fedlp.pruning.tracing.graph import trace_classifier
from fedlp.pruning.tracing.slicing import Dim, WidthSpec, slice_tensor, tensor_keeps
from fedlp.pruning.tracing.swin import is_swin, match_heads, swin_widths
from fedlp.pruning.tracing.vision_transformer import is_vision_transformer, replace_attention, vit_widths
from fedlp.types import Keep

__all__ = ["Dim", "WidthSpec", "cut_in_place", "cut_model", "slice_tensor", "tensor_keeps", "trace_widths"]


def trace_widths(model: nn.Module, inputs: Tensor, depth: bool = False) -> WidthSpec:
    """Return the width axes of a classifier (traced), or of a vision transformer or a language model (by rule).

    A part of a classifier that no rule covers stays whole, and so does an axis along which the cut model fails.

    Parameters
    ----------
    model : nn.Module
        The whole model; not touched.
    inputs : (batch, ...)
        Only their shape matters.
    depth : bool
        Whether residual branches may lose all their units; else ``branches`` of the spec is empty.

    Raises
    ------
    ConfigError
        If the model is a language model of an architecture without rules; names it.
    """
    if is_language_model(model):
        spec = decoder_widths(model)
    elif is_vision_transformer(model):
        spec = vit_widths(model)
    elif is_swin(model):
        spec = swin_widths(model)
    else:
        found = trace_classifier(model, inputs)
        spec = without_broken_axes(model, found if depth else replace(found, branches={}), inputs, cut_model)
    return spec if depth else replace(spec, branches={})


def cut_model(model: nn.Module, spec: WidthSpec, widths: Mapping[str, Keep]) -> nn.Module:
    """Return a smaller dense model that holds the kept units' weights; the model is not touched.

    Parameters
    ----------
    model : nn.Module
        The whole model that ``spec`` was traced from, or one of equal shapes.
    spec : WidthSpec
        Its axes.
    widths : mapping from axis name to Keep
        Kept units; absent axes stay whole.

    Returns
    -------
    nn.Module
        Of the same class, device and dtypes, with its own tensors; the sizes that modules keep as attributes are
        right for them. The attentions of torchvision's transformers are ones that take any number of heads, cut or not.

    Raises
    ------
    ConfigError
        If an axis does not exist, or a Keep is not of its axis's size, or empty and no branch's.
    """
    unknown = next((axis for axis in widths if axis not in spec.axes), None)
    if unknown is not None:
        raise ConfigError(f"this model has no width axis {unknown}; it has {', '.join(spec.axes)}")
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        part = slice_tensor(tensor, tensor_keeps(spec, name, tensor.shape, widths))
        memo[id(tensor)] = nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
    return _match(copy.deepcopy(model, memo))


def cut_in_place(model: nn.Module, spec: WidthSpec, widths: Mapping[str, Keep]) -> nn.Module:
    """Return the same as :func:`cut_model`, in place: tensor by tensor, so that no second model is held."""
    for name, tensor in named_tensors(model).items():
        keeps = tensor_keeps(spec, name, tensor.shape, widths)
        if any(keep.count < size for keep, size in zip(keeps, tensor.shape, strict=True)):
            tensor.data = slice_tensor(tensor, keeps)
    return _match(model)


def _match(cut: nn.Module) -> nn.Module:
    """Set the size attributes of all modules of a cut model, and drop branches without units; return it."""
    for module in cut.modules():
        _match_sizes(module)
    if is_language_model(cut):
        match_decoder(cut)
    elif is_vision_transformer(cut):
        replace_attention(cut)
    elif is_swin(cut):
        match_heads(cut)
    else:
        drop_empty_layers(cut)
    return cut


def _match_sizes(module: nn.Module) -> None:
    """Set a module's size attributes to the sizes of its tensors."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        outputs_per_group = module.out_channels // module.groups
        module.out_channels = module.weight.shape[0]
        if module.groups > 1:
            module.groups = module.out_channels // outputs_per_group
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        vector = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if vector is None else len(vector)
    elif isinstance(module, nn.GroupNorm) and module.affine:
        channels_per_group = module.num_channels // module.num_groups
        module.num_channels = len(module.weight)
        module.num_groups = module.num_channels // channels_per_group
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
