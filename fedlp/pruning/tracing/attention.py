"""Self-attention with a variable number of heads."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.pruning.tracing.empty_layers import EmptyLayer


class EmptyAttention(nn.Module):
    """Self-attention without heads: the bias of its output layer, or zeros, at every token.

    Parameters
    ----------
    attention : nn.MultiheadAttention or HeadAttention
        Cut to no heads; the bias is shared, not copied.
    """

    num_heads = 0

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.head_dim: int = attention.head_dim
        self.out_proj = EmptyLayer(attention.out_proj)

    def forward(self, inputs: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """Map (batch, tokens, embed_dim) to the same shape, and None for the attention's weights."""
        return self.out_proj(inputs), None


class HeadAttention(nn.Module):
    """Self-attention like torch's, whose heads may be fewer than ``embed_dim / head_dim``.

    Its parameters have the names and meaning of :class:`torch.nn.MultiheadAttention`'s, but ``out_proj`` is called as
    a module, so that forward hooks apply.

    Parameters
    ----------
    attention : nn.MultiheadAttention
        Batch first, with equal sizes of queries, keys and values. Its parameters, possibly pruned, are
        shared, not copied.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight = attention.in_proj_weight
        self.in_proj_bias = attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.head_dim: int = attention.head_dim
        self.dropout = attention.dropout
        self.training = attention.training

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return len(self.in_proj_weight) // (3 * self.head_dim)

    def forward(self, inputs: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """Map (batch, tokens, embed_dim) to the same shape, and None for the attention's weights.

        Keys and values are the inputs too; other arguments are ignored.
        """
        fused = F.linear(inputs, self.in_proj_weight, self.in_proj_bias)
        by_head = fused.view(*inputs.shape[:2], 3, self.num_heads, self.head_dim)
        queries, keys, values = by_head.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None
