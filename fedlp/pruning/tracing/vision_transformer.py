"""Width axes of torchvision's vision transformers, by rule.

* ``encoder.layers.encoder_layer_N.self_attention``: one head is a unit.
* ``encoder.layers.encoder_layer_N.mlp``: one hidden neuron is a unit.

Everything else stays whole: all blocks share the residual stream.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.attention import HeadAttention
from fedlp.pruning.tracing.slicing import WHOLE, Dim, WidthSpec

_BLOCKS = "encoder.layers"


def is_vision_transformer(model: nn.Module) -> bool:
    """Return whether a model is torchvision's VisionTransformer; does not import torchvision."""
    module = sys.modules.get("torchvision.models.vision_transformer")
    return module is not None and isinstance(model, module.VisionTransformer)


def vit_widths(model: nn.Module) -> WidthSpec:
    """Return the width axes of a vision transformer; widths may differ between blocks."""
    axes: dict[str, int] = {}
    dims: dict[str, tuple[Dim, ...]] = {}
    block: Any
    for name, block in model.get_submodule(_BLOCKS).named_children():
        attention, mlp = f"{_BLOCKS}.{name}.self_attention", f"{_BLOCKS}.{name}.mlp"
        axes |= {attention: block.self_attention.num_heads, mlp: block.mlp[0].out_features}
        head_dim = block.self_attention.head_dim
        heads, fused, neurons = Dim(attention, head_dim), Dim(attention, head_dim, copies=3), Dim(mlp, 1)
        dims |= {
            f"{attention}.in_proj_weight": (fused, WHOLE),
            f"{attention}.in_proj_bias": (fused,),
            f"{attention}.out_proj.weight": (WHOLE, heads),
            f"{mlp}.0.weight": (neurons, WHOLE),
            f"{mlp}.0.bias": (neurons,),
            f"{mlp}.3.weight": (WHOLE, neurons),
        }
    return WidthSpec(axes, {name: dims.get(name, (WHOLE,) * t.ndim) for name, t in named_tensors(model).items()})


def replace_attention(model: nn.Module) -> None:
    """Put a HeadAttention in the place of each of a vision transformer's attentions, with its parameters."""
    block: Any
    for block in model.get_submodule(_BLOCKS).children():
        if isinstance(block.self_attention, nn.MultiheadAttention):
            block.self_attention = HeadAttention(block.self_attention)
