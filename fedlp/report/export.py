"""The report's numbers for machines: ``summary.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from fedlp.report.groups import Group, differences
from fedlp.report.runs import Run
from fedlp.report.summary import Metric, best_value, coverage, curve, evaluations, mean_coverage, summarize
from fedlp.report.tables import notes


def summary_json(groups: Sequence[Group]) -> str:
    """Return ``summary.json``: strict JSON with null for unknown or non-finite values.

    ``groups`` holds one object a group: its row of the table (accuracies in per cent, costs in bytes, parameters,
    multiply-accumulates and seconds), ``curve`` (arrays over evaluated rounds), ``coverage`` (layer -> mean over
    rounds and seeds) and ``runs`` (one object a run directory, with its own totals and metrics).
    """
    document = {
        "groups": [_group(group) for group in groups],
        "differences": differences(groups),
        "notes": notes(groups),
    }
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _group(group: Group) -> dict[str, Any]:
    row = summarize(group)
    metric = row.metric
    numbers = {field.name: getattr(row, field.name) for field in fields(row) if field.name not in ("group", "metric")}
    for name in ("final", "best"):
        numbers[name] = asdict(numbers[name]) if numbers[name] else None
    curves = curve(group, metric) if metric else None
    layers, _, values = coverage(group)
    return {
        "label": group.label,
        "dry_run": group.dry,
        "metric": metric.name if metric else None,
        "unit": metric.unit if metric else None,
        "seeds": [run.seed for run in group.counted],
        "num_rounds": group.runs[0].num_rounds,
        **numbers,
        "curve": {field.name: getattr(curves, field.name) for field in fields(curves)} if curves else None,
        "coverage": dict(zip(layers, mean_coverage(values).tolist(), strict=True)) if layers else {},
        "runs": [_run(run, metric, counted=any(run is other for other in group.counted)) for run in group.runs],
        "config": {key: value for key, value in group.config.items() if key != "seed"},
    }


def _run(run: Run, metric: Metric | None, *, counted: bool) -> dict[str, Any]:
    values = list(evaluations(run, metric).values()) if metric else []
    return {
        "path": str(run.path),
        "seed": run.seed,
        "finished": run.finished,
        "counted": counted,
        "totals": run.totals,
        "final": values[-1] if values else None,
        "best": best_value(values, metric) if metric else None,
        "expected": run.expected,
        "versions": run.manifest.get("versions") or {},
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
