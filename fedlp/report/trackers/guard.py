"""Guard of trackers: the first exception becomes one warning, and the run goes on without the tracker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlp.errors import one_line
from fedlp.report.trackers.base import Tracker
from fedlp.types import RoundRecord

log = logging.getLogger("fedlp")


class GuardedTracker:
    """Tracker whose first exception is logged; from then on it is not called.

    Parameters
    ----------
    name : str
        Name in the warning.
    make : callable
        Returns the tracker.
    """

    def __init__(self, name: str, make: Callable[[], object]) -> None:
        self._name, self._make = name, make
        self._tracker: Tracker | None = None

    def begin(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """Make the tracker and start it."""
        with self._guarded("begin"):
            made = self._make()
            if not isinstance(made, Tracker):
                raise TypeError("a tracker must have begin(config, run_dir), round(record) and end(manifest)")
            made.begin(config, run_dir)
            self._tracker = made

    def round(self, record: RoundRecord) -> None:
        """Pass on one finished round."""
        if self._tracker is not None:
            with self._guarded("round"):
                self._tracker.round(record)

    def end(self, manifest: Mapping[str, Any]) -> None:
        """End the tracker; once."""
        if self._tracker is not None:
            with self._guarded("end"):
                self._tracker.end(manifest)
        self._tracker = None

    @contextmanager
    def _guarded(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # a package that ends the process is no reason to lose the run
            self._tracker = None
            log.warning("tracker=%s failed in %s (%s); the run goes on without it", self._name, verb, one_line(error))


@contextmanager
def tracking(
    name: str, make: Callable[[], object], config: Mapping[str, Any], run_dir: Path
) -> Iterator[GuardedTracker]:
    """Start a tracker, and end it with an empty manifest if the run fails or is stopped."""
    tracker = GuardedTracker(name, make)
    tracker.begin(config, run_dir)
    try:
        yield tracker
    finally:
        tracker.end({})
