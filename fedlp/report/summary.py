"""Numbers of a group: its totals, its final metric and its curves, over the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlp.report.groups import Group
from fedlp.report.runs import TOTALS, Run
from fedlp.types import RoundRecord

FloatArray = NDArray[np.float64]
MB = 1e6


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric; ``scale`` turns the files' values into ``unit``; the direction of a user's own metric is unknown."""

    name: str
    unit: str
    scale: float
    higher_is_better: bool | None

    @property
    def title(self) -> str:
        """Name and unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


METRICS = (
    Metric("accuracy", "%", 100.0, True),
    Metric("top_5", "%", 100.0, True),
    Metric("macro_f1", "%", 100.0, True),
    Metric("perplexity", "", 1.0, False),
    Metric("rmse", "", 1.0, False),
    Metric("mae", "", 1.0, False),
    Metric("r2", "", 1.0, True),
    Metric("loss", "", 1.0, False),
    Metric("client_accuracy", "%", 100.0, True),  # of runs that evaluate on clients alone
    Metric("client_perplexity", "", 1.0, False),
    Metric("client_loss", "", 1.0, False),
)


_NOT_OWN = ("train_loss", "client_", "tier_")


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over seeds; ``std`` is None for fewer than two."""

    mean: float
    std: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the rounds that every counted run evaluated; all arrays have one value a round.

    Attributes
    ----------
    mean : array
        Over seeds, in the metric's unit; NaN where a seed's value is not finite.
    low, high : array
        mean -/+ sample standard deviation of three or more seeds, the range of two, the value of one.
    bytes_up, macs, simulated_s : array
        Spent by the end of the round since the start of training; means over seeds. 0 without a virtual clock.
    """

    rounds: NDArray[np.int64]
    mean: FloatArray
    low: FloatArray
    high: FloatArray
    bytes_up: FloatArray
    macs: FloatArray
    simulated_s: FloatArray


@dataclass(frozen=True, slots=True)
class Summary:
    """Row of the table: means over a group's counted runs; None if unknown.

    Attributes
    ----------
    final, best : Spread or None
        The metric of the last evaluated model, and of the best one, in the metric's unit.
    bytes_up, bytes_down, macs : float or None
        Totals of a whole run; of a dry run the expected ones if no client fails.
    params_per_client, expected_params_per_client : float or None
        Parameters sent to and from one client in one round, measured and predicted.
    epsilon : float or None
        Largest epsilon that a run had spent at its end; None where it is not on record.
    """

    group: Group
    metric: Metric | None = None
    final: Spread | None = None
    best: Spread | None = None
    rounds: int = 0
    bytes_up: float | None = None
    bytes_down: float | None = None
    bytes_up_per_round: float | None = None
    bytes_down_per_round: float | None = None
    params_per_client: float | None = None
    expected_params_per_client: float | None = None
    macs: float | None = None
    wall_time_s: float | None = None
    failures: int = 0
    epsilon: float | None = None


def metric_of(group: Group) -> Metric | None:
    """Return the metric of a group: the first known one that a run reports, else a user's own, else the loss."""
    names = dict.fromkeys(name for run in group.counted for name in _reported(run))
    known = {metric.name: metric for metric in METRICS}
    own = [Metric(name, "", 1.0, None) for name in names if not name.startswith(_NOT_OWN) and name not in known]
    first = next((index for index, metric in enumerate(METRICS) if metric.name == "loss"), len(METRICS))
    ordered = [*METRICS[:first], *own, *METRICS[first:]]
    return next((metric for metric in ordered if metric.name in names), None)


def evaluations(run: Run, metric: Metric) -> dict[int, float]:
    """Return ``{server_round: value}`` of the evaluated rounds in the metric's unit; NaN for non-finite values."""
    values = {
        record.server_round: record.metrics[metric.name] * metric.scale
        for record in run.rounds
        if metric.name in record.metrics
    }
    if not values and metric.name in run.final_metrics:
        values = {run.num_rounds: run.final_metrics[metric.name] * metric.scale}
    return {server_round: value if np.isfinite(value) else np.nan for server_round, value in values.items()}


def best_value(values: Iterable[float], metric: Metric) -> float:
    """Return the best finite value; NaN where there is none, or the direction of the metric is unknown."""
    finite = [value for value in values if np.isfinite(value)] if metric.higher_is_better is not None else []
    choose = max if metric.higher_is_better else min
    return choose(finite) if finite else np.nan


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def curve(group: Group, metric: Metric) -> Curve | None:
    """Return the group's curve of ``metric``; None if no round was evaluated by every counted run."""
    runs = [run for run in group.counted if run.rounds]
    if not runs:
        return None
    series = [evaluations(run, metric) for run in runs]
    rounds = np.array(sorted(set.intersection(*(set(one) for one in series))), dtype=np.int64)
    if not rounds.size:
        return None
    values = np.array([[one[server_round] for server_round in rounds.tolist()] for one in series])
    mean = values.mean(axis=0)
    low, high = values.min(axis=0), values.max(axis=0)
    if len(runs) > 2:
        deviation = values.std(axis=0, ddof=1)
        low, high = mean - deviation, mean + deviation
    names = ("bytes_up", "macs", "simulated_s")
    bytes_up, macs, seconds = (np.mean([spent_by(run, name, rounds) for run in runs], axis=0) for name in names)
    return Curve(rounds, mean, low, high, bytes_up, macs, seconds)


def coverage(group: Group) -> tuple[list[str], NDArray[np.int64], FloatArray]:
    """Return layers, rounds and a ``(layers, rounds)`` array of coverage, its mean over seeds, in [0, 1].

    NaN where a run does not say anything about a layer in a round; no layers where none ever does.
    """
    runs = [run for run in group.counted if any(record.coverage for record in run.rounds)]
    layers = list(dict.fromkeys(layer for run in runs for record in run.rounds for layer in record.coverage))
    rounds = sorted({record.server_round for run in runs for record in run.rounds if record.server_round > 0})
    row = {layer: index for index, layer in enumerate(layers)}
    column = {server_round: index for index, server_round in enumerate(rounds)}
    values = np.full((len(runs), len(layers), len(rounds)), np.nan)
    for index, run in enumerate(runs):
        for record in run.rounds:
            for layer, fraction in record.coverage.items() if record.server_round > 0 else ():
                values[index, row[layer], column[record.server_round]] = fraction
    return layers, np.array(rounds, dtype=np.int64), values.mean(axis=0) if runs else np.empty((0, 0))


def mean_coverage(values: FloatArray) -> FloatArray:
    """Return each layer's mean over the rounds that are known; NaN where none is."""
    known = np.isfinite(values)
    sums = np.where(known, values, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), sums / np.maximum(known.sum(axis=1), 1), np.nan)


def client_uploads(group: Group) -> FloatArray:
    """Return the uplink bytes of every client in every round of the counted runs."""
    costs = [cost.bytes_up for run in group.counted for record in run.rounds for cost in record.clients]
    return np.array(costs, dtype=np.float64)


def summarize(group: Group) -> Summary:
    """Return the group's row."""
    metric, runs = metric_of(group), group.counted
    if not runs:
        return _expected_summary(group)
    values = [list(evaluations(run, metric).values()) for run in runs] if metric else []
    is_directed = metric is not None and metric.higher_is_better is not None
    totals = {name: float(np.mean([run.totals[name] for run in runs])) for name in TOTALS}
    return Summary(
        group=group,
        metric=metric,
        final=spread([one[-1] for one in values if one]),
        best=spread([best_value(one, metric) for one in values if one]) if metric and is_directed else None,
        rounds=min(int(run.totals["rounds"]) for run in runs),
        bytes_up=totals["bytes_up"],
        bytes_down=totals["bytes_down"],
        bytes_up_per_round=_ratio(totals["bytes_up"], totals["rounds"]),
        bytes_down_per_round=_ratio(totals["bytes_down"], totals["rounds"]),
        params_per_client=_ratio(totals["params_up"] + totals["params_down"], totals["contacts"]),
        expected_params_per_client=_expected(group, "params_up_per_client", "params_down_per_client"),
        macs=totals["macs"],
        wall_time_s=totals["wall_time_s"],
        failures=sum(int(run.totals["failures"]) for run in runs),
        epsilon=max((run.rounds[-1].privacy["epsilon"] for run in runs if _is_accounted(run)), default=None),
    )


def _expected_summary(group: Group) -> Summary:
    totals, rounds = group.runs[0].expected_totals, group.runs[0].num_rounds
    up, down = totals.get("bytes_up"), totals.get("bytes_down")
    return Summary(
        group=group,
        bytes_up=up,
        bytes_down=down,
        bytes_up_per_round=_ratio(up, rounds),
        bytes_down_per_round=_ratio(down, rounds),
        expected_params_per_client=_expected(group, "params_up_per_client", "params_down_per_client"),
        macs=totals.get("macs"),
    )


def _is_accounted(run: Run) -> bool:
    return bool(run.rounds) and "epsilon" in run.rounds[-1].privacy


def _reported(run: Run) -> list[str]:
    """Return the names of a run's metrics, the task's first one at the front."""
    return [*(name for record in run.rounds for name in record.metrics), *run.final_metrics]


def spent_by(run: Run, name: str, rounds: NDArray[np.int64]) -> FloatArray:
    """Return the cumulated cost at the end of each round: a counter of the records, or ``simulated_s``."""
    recorded = np.array([record.server_round for record in run.rounds])
    sums: FloatArray = np.cumsum([0.0, *(_amount(record, name) for record in run.rounds)])
    return sums[np.searchsorted(recorded, rounds, side="right")]


def _amount(record: RoundRecord, name: str) -> float:
    if name != "simulated_s":
        return float(getattr(record, name))
    return 0.0 if record.simulated is None else record.simulated.seconds


def _expected(group: Group, *names: str) -> float | None:
    expected = group.runs[0].expected
    return sum(expected[name] for name in names) if all(name in expected for name in names) else None


def _ratio(amount: float | None, count: float) -> float | None:
    return amount / count if amount is not None and count else None
