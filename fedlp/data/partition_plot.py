"""Plot of the class counts of clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def plot_partition(
    parts: Sequence[NDArray[np.int64]], targets: NDArray[np.int64] | Tensor, path: Path | str, title: str = ""
) -> Path:
    """Plot the class counts of every client as PNG; return the file's path.

    Stacked bars for up to 20 classes, a heat map (classes by clients) for more. Missing folders are made.

    Parameters
    ----------
    parts : sequence of (n_k,) int64
        Indices of each client's examples, as :func:`partition_examples` returns them.
    targets : (n,) int64
        Class of every example.
    path : Path or str
        The file to write.
    title : str
        Heads the figure; the numbers of examples and clients where empty.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names, classes = np.unique(np.asarray(targets), return_inverse=True)
    counts = np.stack([np.bincount(classes[part], minlength=len(names)) for part in parts])
    size = (min(5 + 0.1 * len(parts), 16), 4 if len(names) <= 20 else 7)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if len(names) <= 20:
        colors = colormaps["tab10" if len(names) <= 10 else "tab20"]
        bottoms = np.cumsum(counts, axis=1) - counts
        for index, name in enumerate(names):
            axes.bar(np.arange(len(parts)), counts[:, index], 0.9, bottoms[:, index], color=colors(index), label=name)
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.set_ylabel("examples")
        axes.margins(x=0.01)
    else:
        image = axes.imshow(np.ma.masked_equal(counts.T, 0), aspect="auto", norm="log", origin="lower")
        figure.colorbar(image, ax=axes, label="examples")
        axes.set_ylabel("class")
    axes.set_xlabel("client")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title or f"{len(classes)} examples over {len(parts)} clients")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")
    return target
