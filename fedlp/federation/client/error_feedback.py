"""Error feedback: the part of an update that was not sent is added to the client's next update.

A *residual* holds that part, by tensor name, in the shapes of the global model (Seide et al., Interspeech 2014;
Karimireddy et al., ICML 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlp.pruning.tracing.widths import slice_tensor
from fedlp.types import Keep

Keeps = Mapping[str, tuple[Keep, ...]]  # one Keep per dimension, by tensor name


def add_residual(updates: Mapping[str, Tensor], residual: Mapping[str, Tensor], held: Keeps) -> dict[str, Tensor]:
    """Return updates with the residual of the entries that the client holds added; new tensors where there is one.

    Parameters
    ----------
    updates : mapping from name to Tensor
        In the shapes of the client's sub-model.
    residual : mapping from name to Tensor
        In the global shapes; tensors that are absent have none.
    held : mapping from name to Keeps
        Entries of the global tensors that the sub-model has; tensors that are absent are whole.
    """
    found = dict(updates)
    for name in updates.keys() & residual.keys():
        left = slice_tensor(residual[name], held[name]) if name in held else residual[name]
        found[name] = updates[name] + left.to(updates[name])
    return found


def keep_residual(
    updates: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
    sent_keeps: Keeps,
    residual: Mapping[str, Tensor],
    held: Keeps,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """Return the residual after an upload: updates less their decoded values, in the global shapes.

    Entries that the client does not hold keep their residual.

    Parameters
    ----------
    updates : mapping from name to Tensor
        Residual included, in the shapes of the client's sub-model; only these have a residual.
    sent : mapping from name to Tensor
        Values as the server decodes them.
    sent_keeps : mapping from name to Keeps
        Entries of the sub-model's tensors that were sent.
    residual : mapping from name to Tensor
        From before; zero if absent.
    held : mapping from name to Keeps
        As of :func:`add_residual`.
    shapes : mapping from name to shape
        Of the global tensors.
    """
    found = {}
    for name, update in updates.items():
        left = update.clone()
        if name in sent:
            left[_index_of(sent_keeps[name])] -= sent[name].to(left)
        shape = shapes[name]
        whole = residual[name].clone() if name in residual else torch.zeros(tuple(shape), dtype=left.dtype)
        whole[_index_of(held.get(name) or tuple(Keep.full(size) for size in shape))] = left.cpu()
        found[name] = whole
    return found


def _index_of(keeps: tuple[Keep, ...]) -> tuple[Tensor, ...]:
    """Return an index of the kept entries of a tensor, for reading and for writing."""
    return tuple(torch.from_numpy(part) for part in np.ix_(*(keep.indices() for keep in keeps)))
