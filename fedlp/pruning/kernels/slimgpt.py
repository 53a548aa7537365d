"""SlimGPT's own choices (Ling et al., NeurIPS 2024), to reproduce it and to measure the difference.

Its Incremental Pruning Ratio is ``allocator=log_depth``. *Deviations*: the released code divides by ``log(32)`` at any
depth; there it is the paper's ``log(n)``.
"""

from __future__ import annotations

_FIRST, _LARGEST, _SMALLEST = 512, 1024, 64  # of the released code; the paper says "like 8"


def group_schedule(total: int, scale: float = 1.0) -> list[int]:
    """Return how many FFN channels each step removes (Dynamic Group Size of the released code), summing to ``total``.

    The group is halved from step to step, after 512 has been taken off it, between 1024 and 64. ``scale`` multiplies
    these constants, which are meant for the 11,008 channels of LLaMA-7B.
    """
    first, largest, smallest = (max(1, round(size * scale)) for size in (_FIRST, _LARGEST, _SMALLEST))
    schedule: list[int] = []
    group, left = (total - first) // 2, total
    while left > 0:
        schedule.append(min(left, max(group, smallest), largest))
        left -= schedule[-1]
        group = (group - first) // 2
    return schedule
