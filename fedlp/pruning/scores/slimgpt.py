"""SlimGPT (Ling et al., NeurIPS 2024).

Its Incremental Pruning Ratio is ``allocator=log_depth``. *Deviations*: the released code divides by ``log(32)`` at any
depth; there it is the paper's ``log(n)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlp.pruning.kernels.elimination import Score
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.view import LayerView
from fedlp.registry import register

_FIRST, _LARGEST, _SMALLEST = 512, 1024, 64  # of the released code; the paper says "like 8"


@register("score", "slimgpt")
@dataclass(frozen=True)
class SlimGPT(OBS):
    """SlimGPT's grouped Cholesky score: heads are removed one by one, FFN channels in groups of dynamic size."""

    form: ClassVar[Score] = "columns"

    def schedule(self, view: LayerView, total: int) -> list[int]:
        """Return the number of units that each step removes, summing to ``total``."""
        return [1] * total if view.layer.unit_size > 1 else group_schedule(total)


def group_schedule(total: int, scale: float = 1.0) -> list[int]:
    """Return the FFN channels removed per step (Dynamic Group Size of the released code), summing to ``total``.

    The group size minus 512 is halved from step to step, between 1024 and 64. ``scale`` multiplies
    these constants of the 11,008 channels of LLaMA-7B.
    """
    first, largest, smallest = (max(1, round(size * scale)) for size in (_FIRST, _LARGEST, _SMALLEST))
    schedule: list[int] = []
    group, left = (total - first) // 2, total
    while left > 0:
        schedule.append(min(left, max(group, smallest), largest))
        left -= schedule[-1]
        group = (group - first) // 2
    return schedule
