"""Peak memory of this process."""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import resource


def peak_memory() -> int | None:
    """Return the largest resident memory of this process in bytes; None on Windows, which has no such count."""
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
