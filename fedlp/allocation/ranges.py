"""Ranges of options that several allocation rules share."""

from __future__ import annotations

from fedlp.errors import ConfigError


def check_amplitude(amplitude: float | None) -> None:
    """Raise ConfigError for an amplitude outside [0, 2]."""
    if amplitude is not None and not 0 <= amplitude <= 2:
        raise ConfigError(f"allocator.amplitude={amplitude} is not allowed: it must be in [0, 2], or null")
