"""Cache of decoded images: a memory-mapped file of uint8 pixels, shared by all processes.

The file lies in ``$XDG_CACHE_HOME/fedlp/images`` (``~/.cache``), under a digest of its sources and options;
memory holds only the pages that are in use.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlp.errors import ConfigError, DataError, one_line
from fedlp.progress import Counter

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_MODES = {1: "L", 3: "RGB"}
_AHEAD = 64  # images that are decoded before they are written


@dataclass(frozen=True)
class Frame:
    """Size and channels of every image.

    Attributes
    ----------
    height, width : int
        Pixels, >= 1.
    channels : int
        1 (grey) or 3 (colour).
    fit : str
        "crop": the shorter side is scaled, and the middle is kept; "stretch": both sides are scaled.
    """

    height: int
    width: int
    channels: int = 3
    fit: str = "crop"

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ConfigError(f"dataset.size={self.height, self.width} is not allowed: it must be at least 1 pixel")
        if self.channels not in _MODES:
            raise ConfigError(f"dataset.channels={self.channels} is not allowed: it must be 1 or 3")
        if self.fit not in ("crop", "stretch"):
            raise ConfigError(f"dataset.fit={self.fit} is not allowed: it must be one of crop, stretch")

    @classmethod
    def of(cls, size: Any, channels: int, fit: str) -> Frame:
        """Return the frame of a size that is one number or [height, width]."""
        sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
        if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            raise ConfigError(f"dataset.size={size} is not allowed: it must be one number of pixels or [height, width]")
        return cls(sides[0], sides[1], channels, fit)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    def pixels(self, image: Image) -> NDArray[np.uint8]:
        """Return an image as (C, H, W) uint8; one of another size is resampled."""
        from PIL import Image as pillow
        from PIL import ImageOps

        size = self.width, self.height
        image.draft(_MODES[self.channels], size)  # JPEG: decode at a smaller scale where that is enough
        image = ImageOps.exif_transpose(image).convert(_MODES[self.channels])
        if image.size != size:
            fit = ImageOps.fit if self.fit == "crop" else pillow.Image.resize
            image = fit(image, size, pillow.Resampling.BILINEAR)
        array = np.asarray(image, dtype=np.uint8)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def cached_images(read: Callable[[int], Image], names: Sequence[str], frame: Frame, key: Any, *, label: str) -> Tensor:
    """Return images as a memory-mapped uint8 tensor, (n, C, H, W), decoded unless cached.

    Parameters
    ----------
    read : callable
        Opens an image by its number; called by several threads.
    names : sequence of str
        Name of each image, for errors.
    key : JSON value
        Identity of the images; an equal key reuses the cache.
    label : str
        Heads the line of progress.

    Raises
    ------
    DataError
        If an image cannot be decoded, naming it, or the cache cannot be written.
    """
    import torch

    text = json.dumps([key, frame.shape, frame.fit, len(names)])
    folder = _cache_folder() / hashlib.sha256(text.encode()).hexdigest()[:24]
    path = folder / "pixels.u8"
    if not path.is_file():
        try:
            _decode(read, names, frame, folder, text, label)
        except OSError as error:
            raise DataError(
                f"decoded images cannot be kept in {folder} ({one_line(error)}); set XDG_CACHE_HOME to a folder with "
                f"{len(names) * int(np.prod(frame.shape)) / 1e6:,.0f} MB"
            ) from error
    count = len(names) * int(np.prod(frame.shape))
    return torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8).view(len(names), *frame.shape)


def open_image(source: Any) -> Image:
    """Return an image from a path or a file object, not yet decoded."""
    from PIL import Image as pillow

    return pillow.open(source)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedlp" / "images"


def _decode(
    read: Callable[[int], Image], names: Sequence[str], frame: Frame, folder: Path, text: str, label: str
) -> None:
    """Write all images to ``folder``, which appears once complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)

    def decode(number: int) -> NDArray[np.uint8]:
        try:
            with read(number) as image:
                return frame.pixels(image)
        except Exception as error:  # Pillow lets anything through, from OSError to SyntaxError
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise DataError(f"image {names[number]} cannot be decoded ({reason}); repair or delete it") from error

    with TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch, Counter(label, len(names)) as counter:
        partial = Path(scratch, folder.name)
        partial.mkdir()
        with (partial / "pixels.u8").open("wb") as sink:
            for pixels in _in_order(decode, len(names)):
                sink.write(pixels.tobytes())
                counter.advance()
            sink.flush()
            os.fsync(sink.fileno())
        (partial / "key.json").write_text(text, encoding="utf-8")
        if not folder.exists():  # another process may have been faster
            partial.replace(folder)


def _in_order(decode: Callable[[int], NDArray[np.uint8]], count: int) -> Iterator[NDArray[np.uint8]]:
    """Yield decoded images in order; Pillow decodes without Python's lock, so threads share the work."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, count, _AHEAD):
            yield from pool.map(decode, range(start, min(start + _AHEAD, count)))
