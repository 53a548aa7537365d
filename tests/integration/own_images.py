"""Folders of images as devices have them: sizes and classes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ("blue", "green", "red")
READS = (
    "dataset=imagefolder",
    "dataset.on_devices=true",
    "dataset.labels=[blue,green,red]",
    "dataset.size=8",
    "dataset.client_test_fraction=0.25",
    "dataset.max_train_examples=null",
    "dataset.max_test_examples=null",
)


def write_images(folder: Path, classes: Sequence[str], count: int, size: tuple[int, int]) -> Path:
    """Write ``count`` images of each class, of its colour with noise."""
    rng = np.random.default_rng(len(classes) * count)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 90, (*size, 3), dtype=np.uint8)
            pixels[..., LABELS[::-1].index(name) if name in LABELS else 0] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def write_devices(folder: Path) -> list[Path]:
    """Write the folders of four devices: two that differ, one with an unknown label, an empty one."""
    (folder / "empty").mkdir(parents=True)
    return [
        write_images(folder / "first", ("blue", "green"), 20, (20, 20)),
        write_images(folder / "second", ("green", "red"), 8, (16, 24)),
        write_images(folder / "unknown", ("red", "violet"), 4, (8, 8)),
        folder / "empty",
    ]
