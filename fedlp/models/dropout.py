"""Fast dropout on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 256  # values of a random byte
_stacked: list[tuple[torch.Generator, int]] = []  # generator and rows of each client of the pass under way


@contextmanager
def draw_from(generators: Sequence[torch.Generator], rows: Sequence[int]) -> Iterator[None]:
    """Let dropout of a stack of clients draw from each client's generator for a while, for its own rows alone."""
    _stacked[:] = zip(generators, rows, strict=False)
    try:
        yield
    finally:
        _stacked.clear()


class _DropoutByClient(torch.autograd.Function):
    """Dropout of inputs that ``vmap`` has stacked."""

    @staticmethod
    def forward(inputs: Tensor, p: float) -> Tensor:
        """Raise: only stacks come here."""
        raise RuntimeError("dropout of a stack needs vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: the operators of ``vmap`` know their own gradients."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], inputs: Tensor, p: float) -> tuple[Tensor, int]:
        """Return the inputs with each client's zeros; padded rows keep their values."""
        if in_dims[0] is None or info.batch_size != len(_stacked):
            raise RuntimeError("dropout of inputs that all clients share has no stream to draw from")
        stack = inputs.movedim(in_dims[0], 0)
        scale = torch.ones_like(stack)
        for own, (source, rows) in zip(scale, _stacked, strict=True):
            own[:rows] = byte_scale(own[:rows], p, source)
        return stack * scale, 0


def drop_stack(stack: Tensor, p: float) -> Tensor:
    """Return torch's dropout of the inputs of several clients, (clients, n, ...), each from its own generator.

    Numbers are those that ``F.dropout`` would draw for a client alone, on a CPU; padded rows keep their values.

    Raises
    ------
    RuntimeError
        If there are not as many generators.
    """
    if len(stack) != len(_stacked):
        raise RuntimeError("dropout of a stack has no streams to draw from")
    scale = torch.ones_like(stack)
    for own, (source, rows) in zip(scale, _stacked, strict=True):
        own[:rows].bernoulli_(1 - p, generator=source).div_(1 - p)
    return stack * scale


def byte_scale(like: Tensor, p: float, source: torch.Generator | None = None) -> Tensor:
    """Return 0 with probability ``p``, else ``1 / (1 - p)``, in the shape and layout of a tensor on the CPU."""
    count = like.numel()
    draws = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=source)
    kept = draws.view(torch.uint8)[:count] >= int(p * _LEVELS)
    scale = kept.to(like.dtype).mul_(1 / (1 - p))
    layout = torch.empty_like(like).stride()  # never written; on the meta device it would import SymPy
    return scale.as_strided(like.shape, layout)


class ByteDropout(nn.Module):
    """Dropout with one random byte per entry, about 3x as fast as torch's on a CPU.

    torch draws a 32-bit number per entry, one at a time; here one 64-bit draw decides eight entries. The distribution
    is exactly that of dropout, and the numbers come from torch's generator. Off the CPU, torch's own dropout is used.

    Parameters
    ----------
    p : float
        Probability that an entry is zeroed; a multiple of 1/256 in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1 or (p * _LEVELS) % 1:
            raise ValueError(f"p must be a multiple of 1/{_LEVELS} in [0, 1), not {p}")
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs, in training with zeros and the rest divided by ``1 - p``; same shape and layout."""
        if not self.training or inputs.device.type != "cpu":
            return F.dropout(inputs, self.p, self.training)
        if _stacked:
            return _DropoutByClient.apply(inputs, self.p)  # type: ignore[no-untyped-call, no-any-return]
        return inputs * byte_scale(inputs, self.p)

    def extra_repr(self) -> str:
        """Return the options shown by ``repr``."""
        return f"p={self.p}"
