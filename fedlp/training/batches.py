"""Batches: order of examples, augmentation of images, preparation for a model.

Batches are indexed from the client's tensors; there is no per-item loader. Images are kept as uint8 and normalised
batch by batch, in channels-last layout, which is the faster one for convolutions on CPUs and GPUs alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlp.config import LocalConfig
from fedlp.data.examples import DataInfo
from fedlp.tasks import task_of
from fedlp.tasks.base import Inputs


def prepare_inputs(inputs: Tensor, info: DataInfo, device: torch.device) -> Inputs:
    """Return a batch as model input; see :meth:`fedlp.tasks.Task.prepare`."""
    return task_of(info).prepare(inputs, info, device)


def draw_batches(count: int, config: LocalConfig, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield index tensors: ``epochs`` passes in fresh random order; the last batch of a pass may be smaller.

    A last batch of a single example joins the one before it: BatchNorm cannot normalise one value per channel.
    """
    sizes = batch_sizes(count, config.batch_size)
    for _ in range(config.epochs):
        yield from torch.split(torch.from_numpy(rng.permutation(count)), sizes)


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Return the sizes of the batches of one pass."""
    sizes = [batch_size] * (count // batch_size)
    if rest := count % batch_size:
        if rest == 1 and sizes and batch_size > 1:
            sizes[-1] += 1
        else:
            sizes.append(rest)
    return sizes


def augment_images(batch: Tensor, rng: np.random.Generator, padding: int, flip: bool) -> Tensor:
    """Return uint8 images, (n, C, H, W), randomly cropped after zero padding and, if ``flip``, mirrored at random."""
    count, _, height, width = batch.shape
    padded = F.pad(batch, (padding,) * 4)
    tops, lefts = rng.integers(0, 2 * padding + 1, (2, count))
    flips = rng.random(count) < (0.5 if flip else 0.0)
    rows = torch.from_numpy(tops)[:, None] + torch.arange(height)
    columns = torch.from_numpy(lefts)[:, None] + torch.arange(width)
    columns = torch.where(torch.from_numpy(flips)[:, None], columns.flip(1), columns)
    index = torch.arange(count)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
