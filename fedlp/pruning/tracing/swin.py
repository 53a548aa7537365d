"""Width axes of Swin transformers, torchvision's (also V2) and transformers', by rule.

* ``BLOCK.attn`` (transformers: ``BLOCK.attention``): one head is a unit, with its entries of the position bias.
* ``BLOCK.mlp``: one hidden neuron is a unit.

Everything else stays whole: all blocks of a stage share the residual stream.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.slicing import WHOLE, Dim, WidthSpec
from fedlp.pruning.tracing.window_attention import call_by_heads


def is_swin(model: nn.Module) -> bool:
    """Return whether a model is a Swin transformer that the rules fit; imports neither library."""
    found = sys.modules.get("torchvision.models.swin_transformer")
    if found is not None and isinstance(model, found.SwinTransformer):
        return True
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind == "swin" and any(_has_projections(module) for module in model.modules())


def swin_widths(model: nn.Module) -> WidthSpec:
    """Return the width axes of a Swin transformer; widths may differ between blocks."""
    axes: dict[str, int] = {}
    dims: dict[str, tuple[Dim, ...]] = {}
    block: Any
    for path, block in model.named_modules():
        attention: Any = getattr(block, "attn", getattr(block, "attention", None))
        if _is_fused(attention):
            names = (f"{path}.attn", f"{path}.mlp")
            axes |= dict(zip(names, (attention.num_heads, block.mlp[0].out_features), strict=True))
            dims |= _fused_dims(*names, attention.proj.in_features // attention.num_heads)
        elif _has_projections(attention):
            names = (f"{path}.attention", f"{path}.mlp")
            heads = attention.o_proj.in_features // attention.head_dim
            axes |= dict(zip(names, (heads, block.mlp.fc1.out_features), strict=True))
            dims |= _separate_dims(*names, attention.head_dim)
    return WidthSpec(axes, {name: dims.get(name, (WHOLE,) * t.ndim) for name, t in named_tensors(model).items()})


def match_heads(model: nn.Module) -> None:
    """Set the numbers of heads that a cut Swin transformer's attentions keep; see :func:`call_by_heads`."""
    module: Any
    for module in model.modules():
        if _is_fused(module):
            call_by_heads(module)
        elif _has_projections(module):
            module.num_attention_heads = module.o_proj.weight.shape[1] // module.head_dim


def _is_fused(module: Any) -> bool:
    """Return whether a module is an attention of torchvision's."""
    found = sys.modules.get("torchvision.models.swin_transformer")
    return found is not None and isinstance(module, found.ShiftedWindowAttention)


def _has_projections(module: Any) -> bool:
    """Return whether a module is an attention of transformers', of the versions with these names."""
    return type(module).__name__ == "SwinAttention" and hasattr(module, "o_proj") and hasattr(module, "head_dim")


def _fused_dims(attention: str, mlp: str, head_dim: int) -> dict[str, tuple[Dim, ...]]:
    """Return the dimensions of a block of torchvision's; of V1 and V2 alike, as absent names are not looked up."""
    one, fused, neurons = Dim(attention, 1), Dim(attention, head_dim, copies=3), Dim(mlp, 1)
    return {
        f"{attention}.qkv.weight": (fused, WHOLE),
        f"{attention}.qkv.bias": (fused,),
        f"{attention}.proj.weight": (WHOLE, Dim(attention, head_dim)),
        f"{attention}.relative_position_bias_table": (WHOLE, one),
        f"{attention}.logit_scale": (one, WHOLE, WHOLE),
        f"{attention}.cpb_mlp.2.weight": (one, WHOLE),
        f"{mlp}.0.weight": (neurons, WHOLE),
        f"{mlp}.0.bias": (neurons,),
        f"{mlp}.3.weight": (WHOLE, neurons),
    }


def _separate_dims(attention: str, mlp: str, head_dim: int) -> dict[str, tuple[Dim, ...]]:
    """Return the dimensions of a block of transformers'."""
    heads, neurons = Dim(attention, head_dim), Dim(mlp, 1)
    dims: dict[str, tuple[Dim, ...]] = {
        f"{attention}.o_proj.weight": (WHOLE, heads),
        f"{attention}.relative_position_bias.relative_position_bias_table": (WHOLE, Dim(attention, 1)),
        f"{mlp}.fc1.weight": (neurons, WHOLE),
        f"{mlp}.fc1.bias": (neurons,),
        f"{mlp}.fc2.weight": (WHOLE, neurons),
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        dims |= {f"{attention}.{name}.weight": (heads, WHOLE), f"{attention}.{name}.bias": (heads,)}
    return dims
