"""Trackers: services and files that follow a run beside its run directory; built where the server runs.

A tracker is a class, registered as ``@register("tracker", NAME)``, whose fields are its options; see :class:`Tracker`.
"""

from fedlp.report.trackers.base import NoTracker, Tracker
from fedlp.report.trackers.guard import GuardedTracker, tracking

__all__ = ["GuardedTracker", "NoTracker", "Tracker", "tracking"]
