"""Files of allocation plans and functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedlp.errors import AllocationError, one_line


def read_mapping(path: str) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; AllocationError if it cannot be read."""
    try:
        stored = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AllocationError(f"allocator.path={path} cannot be read: {one_line(error)}") from error
    if not isinstance(stored, dict):
        raise AllocationError(f"allocator.path={path} does not map names to values")
    return stored
