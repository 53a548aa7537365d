"""Check that second moments are possible for data, so that a faulty answer is rejected and its client named."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlp.errors import ProtocolError

_TOLERANCE = 1e-4  # of Cauchy and Schwarz's inequality, after rounding to float32
_UNDERFLOW = 1e-70
_RIDGE = 1e-6  # times the trace: about 10 times what rounding to float32 does to eigenvalues
_BLOCK = 2048  # rows: of larger matrices the diagonal blocks are factorised


def check_diagonal(diagonal: Tensor, total: Tensor | None, vectors: int, name: str, who: str) -> None:
    """Check the squares and the sum of some input vectors; see :func:`check_gram`."""
    if bool((diagonal < 0).any()):
        raise ProtocolError(f"{who}: second moments {name} have a negative diagonal entry")
    if total is not None and vectors:
        most = diagonal * vectors * (1 + _TOLERANCE) + _RIDGE * vectors * diagonal.sum() + _UNDERFLOW
        if bool((total.square() > most).any()):
            raise ProtocolError(f"{who}: second moments {name} are too small for the sum of the inputs")


def check_gram(packed: Tensor, size: int, total: Tensor | None, vectors: int, name: str, who: str) -> None:
    r"""Check the second moments :math:`G = \sum x x^\top` of N input vectors, and their sum :math:`t = \sum x`.

    Data give :math:`G_{ii} \ge 0`, :math:`|G_{ij}| \le \sqrt{G_{ii} G_{jj}}` and positive semi-definite :math:`G` and
    :math:`G - t t^\top / N`, on which damping relies. Up to 2048 inputs the last is checked to 10^-6 of the
    trace; beyond, of blocks of as many neighbouring inputs.

    Parameters
    ----------
    packed : (size (size + 1) / 2,)
        The lower triangle of G, row by row.
    total, vectors : (size,) or None, int
        t and N; not checked if None or 0.

    Raises
    ------
    ProtocolError
        Naming ``who`` and ``name``.
    """
    rows = torch.arange(size)
    diagonal = packed[rows * (rows + 3) // 2]
    check_diagonal(diagonal, total, vectors, name, who)
    lower = torch.ones(size, size, dtype=torch.bool).tril_()
    if bool((packed.square() > torch.outer(diagonal, diagonal)[lower] * (1 + _TOLERANCE) + _UNDERFLOW).any()):
        raise ProtocolError(f"{who}: second moments {name} have an entry that no data could give")
    matrix = packed.new_zeros(size, size)
    matrix[lower] = packed
    if total is not None and vectors:
        matrix.addr_(total, total, alpha=-1.0 / vectors)
    matrix.diagonal().add_(_RIDGE * diagonal.sum() + _UNDERFLOW)
    for start in range(0, size, _BLOCK):
        block = matrix[start : start + _BLOCK, start : start + _BLOCK]
        if int(torch.linalg.cholesky_ex(block).info):  # which reads the lower triangle alone
            raise ProtocolError(
                f"{who}: second moments {name} are not positive semi-definite, as those of any data are"
            )
