"""Width axes of torchvision's vision transformers, by rule.

* ``encoder.layers.encoder_layer_N.self_attention``: one head is a unit.
* ``encoder.layers.encoder_layer_N.mlp``: one hidden neuron is a unit.

Everything else stays whole: all blocks share the residual stream. Without units a branch adds the bias of its
last layer, and the norm before it goes too.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fedlp.models.spec import named_tensors
from fedlp.pruning.tracing.attention import EmptyAttention, HeadAttention
from fedlp.pruning.tracing.empty_layers import EmptyLayer
from fedlp.pruning.tracing.slicing import WHOLE, Dim, WidthSpec

_BLOCKS = "encoder.layers"


def is_vision_transformer(model: nn.Module) -> bool:
    """Return whether a model is torchvision's VisionTransformer; does not import torchvision."""
    module = sys.modules.get("torchvision.models.vision_transformer")
    return module is not None and isinstance(model, module.VisionTransformer)


def vit_widths(model: nn.Module) -> WidthSpec:
    """Return the width axes of a vision transformer; widths may differ between blocks."""
    axes: dict[str, int] = {}
    branches: dict[str, frozenset[str]] = {}
    dims: dict[str, tuple[Dim, ...]] = {}
    block: Any
    for name, block in model.get_submodule(_BLOCKS).named_children():
        attention, mlp = f"{_BLOCKS}.{name}.self_attention", f"{_BLOCKS}.{name}.mlp"
        sizes = {attention: block.self_attention.num_heads, mlp: len(block.mlp[0].weight)}
        axes |= {axis: size for axis, size in sizes.items() if size}
        for axis, norm in ((attention, "ln_1"), (mlp, "ln_2")):
            if sizes[axis]:
                branches[axis] = frozenset(f"{_BLOCKS}.{name}.{norm}.{part}" for part in ("weight", "bias"))
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
    found = {name: dims.get(name, (WHOLE,) * tensor.ndim) for name, tensor in named_tensors(model).items()}
    return WidthSpec(axes, found, branches=branches)


def replace_attention(model: nn.Module) -> None:
    """Replace a vision transformer's attentions by ones of any number of heads, and branches without units."""
    block: Any
    for block in model.get_submodule(_BLOCKS).children():
        attention, mlp = block.self_attention, block.mlp
        if not isinstance(attention, EmptyAttention) and not attention.in_proj_weight.numel():
            block.self_attention, block.ln_1 = EmptyAttention(attention), nn.Identity()
        elif isinstance(attention, nn.MultiheadAttention):
            block.self_attention = HeadAttention(attention)
        if isinstance(mlp[0], nn.Linear) and not mlp[0].weight.numel():
            mlp[0], mlp[3], block.ln_2 = EmptyLayer(mlp[0]), EmptyLayer(mlp[3]), nn.Identity()
