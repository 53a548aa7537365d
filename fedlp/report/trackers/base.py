"""Protocol of trackers, and the null tracker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedlp.registry import register
from fedlp.types import RoundRecord


@runtime_checkable
class Tracker(Protocol):
    """Tracker of one run; its first exception becomes a warning and ends its own work only."""

    def begin(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """Start, before the first round of a new or resumed run.

        Parameters
        ----------
        config : mapping
            The run's config as nested plain values.
        run_dir : Path
            Absolute; files of the tracker belong there.
        """

    def round(self, record: RoundRecord) -> None:
        """Take one finished round."""

    def end(self, manifest: Mapping[str, Any]) -> None:
        """End, after ``manifest.json`` is written; the manifest is empty if the run was stopped or failed."""


@register("tracker", "none")
@dataclass(frozen=True)
class NoTracker:
    """No tracker; the run directory holds everything."""

    def begin(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """Do nothing."""

    def round(self, record: RoundRecord) -> None:
        """Do nothing."""

    def end(self, manifest: Mapping[str, Any]) -> None:
        """Do nothing."""
