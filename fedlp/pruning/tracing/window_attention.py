"""Self-attention in shifted windows with a variable number of heads."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASKED = -100.0  # score of tokens that only the cyclic shift brought together
_MAX_SCALE = math.log(100.0)


def call_by_heads(attention: Any) -> None:
    """Let one of torchvision's attentions compute with the heads that its tensors have.

    torchvision takes the size of a head for channels over heads, which a cut changes. The module keeps its parameters,
    names and position bias; ``proj`` is called as a module, so that forward hooks apply.

    Parameters
    ----------
    attention : ShiftedWindowAttention or ShiftedWindowAttentionV2
        Possibly cut, changed in place.
    """
    if not hasattr(attention, "head_dim"):
        attention.head_dim = attention.qkv.weight.shape[1] // attention.num_heads
        attention.__class__ = _by_heads(type(attention))  # type: ignore[arg-type]
    attention.num_heads = attention.proj.weight.shape[1] // attention.head_dim


@cache
def _by_heads(base: type[nn.Module]) -> type[nn.Module]:
    """Return a class of attentions whose heads are independent of their channels."""
    return type(f"{base.__name__}ByHeads", (base,), {"forward": _forward, "__module__": __name__})


def _forward(self: Any, inputs: Tensor) -> Tensor:
    """Map (batch, height, width, channels) to the same shape."""
    batch, height, width, channels = inputs.shape
    rows, columns = self.window_size
    padded = F.pad(inputs, (0, 0, 0, -width % columns, 0, -height % rows))
    high, wide = padded.shape[1:3]
    shifts = (self.shift_size[0] if rows < high else 0, self.shift_size[1] if columns < wide else 0)
    if any(shifts):
        padded = torch.roll(padded, (-shifts[0], -shifts[1]), (1, 2))
    grid = (batch, high // rows, rows, wide // columns, columns, channels)
    windows = padded.view(grid).transpose(2, 3).reshape(-1, rows * columns, channels)
    mask = _shift_mask((high, wide), (rows, columns), shifts, inputs) if any(shifts) else None
    outputs = F.dropout(self.proj(_mix(self, windows, mask)), self.dropout, self.training)
    merged = outputs.view(batch, high // rows, wide // columns, rows, columns, channels).transpose(2, 3)
    merged = merged.reshape(batch, high, wide, channels)
    if any(shifts):
        merged = torch.roll(merged, shifts, (1, 2))
    return merged[:, :height, :width].contiguous()


def _mix(attention: Any, windows: Tensor, mask: Tensor | None) -> Tensor:
    """Return the values mixed within windows, (windows, tokens, heads * head_dim)."""
    scale, bias = getattr(attention, "logit_scale", None), attention.qkv.bias
    if scale is not None and bias is not None:  # keys have no bias where attention is by cosine
        zeros = torch.zeros_like(bias[: len(bias) // 3])
        bias = torch.cat([bias[: len(zeros)], zeros, bias[2 * len(zeros) :]])
    fused = F.linear(windows, attention.qkv.weight, bias)
    by_head = fused.view(*fused.shape[:2], 3, attention.num_heads, attention.head_dim)
    queries, keys, values = by_head.permute(2, 0, 3, 1, 4)
    if scale is None:
        scores = (queries * attention.head_dim**-0.5) @ keys.transpose(2, 3)
    else:
        cosines = F.normalize(queries, dim=3) @ F.normalize(keys, dim=3).transpose(2, 3)
        scores = cosines * scale.clamp(max=_MAX_SCALE).exp()
    scores = scores + attention.get_relative_position_bias()
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    weights = F.dropout(scores.softmax(3), attention.attention_dropout, attention.training)
    mixed: Tensor = (weights @ values).transpose(1, 2)
    return mixed.flatten(2)


def _shift_mask(size: tuple[int, int], window: tuple[int, int], shifts: tuple[int, int], like: Tensor) -> Tensor:
    """Return 0 or -100 for each window and pair of its tokens: (windows, tokens, tokens)."""
    regions = like.new_zeros(size)
    for dim, (length, side, shift) in enumerate(zip(size, window, shifts, strict=True)):
        places = torch.arange(length, device=like.device)
        found = (places >= length - side).to(like) + (places >= length - shift).to(like)
        regions = 3 * regions + (found[:, None] if dim == 0 else found)
    (high, wide), (rows, columns) = size, window
    tokens = regions.view(high // rows, rows, wide // columns, columns).transpose(1, 2).reshape(-1, rows * columns)
    return (tokens[:, None] != tokens[:, :, None]).to(like) * _MASKED
