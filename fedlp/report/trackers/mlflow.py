"""MLflow, through its own client: a run of an experiment, in a local store or on a tracking server."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fedlp.errors import ConfigError
from fedlp.registry import register
from fedlp.report.groups import run_label
from fedlp.report.trackers.files import result_files
from fedlp.report.trackers.values import distributions, flat, scalars
from fedlp.types import RoundRecord

_FOLDER_TAG = "fedlp.run_dir"
_LONGEST_PARAM = 500
_BATCH = 100  # parameters of one request, at most


@register("tracker", "mlflow")
@dataclass
class MLflow:
    """MLflow run: config as parameters, every metric of a round, mean, median and range over clients, artifacts.

    Attributes
    ----------
    uri : str or None
        Tracking server or store; ``MLFLOW_TRACKING_URI``, else ``mlruns`` in the run directory, if absent.
    experiment : str
        Name of the experiment; it is made if absent.
    report : bool
        Whether the report page is made and stored as an artifact, beside config and manifest.
    """

    uri: str | None = None
    experiment: str = "fedlp"
    report: bool = True
    _client: Any = field(default=None, init=False, repr=False)
    _run_id: str = field(default="", init=False, repr=False)
    _folder: Path = field(default=Path(), init=False, repr=False)

    def begin(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """Create the run, or resume that of this run directory; write the parameters."""
        try:
            from mlflow.entities import Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ConfigError("MLflow is not installed; run: pip install mlflow") from error
        self._folder = run_dir
        store = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlruns").as_uri()
        if store.startswith("file:"):  # newer versions ask for this where the store is a folder
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(store)
        known = self._client.get_experiment_by_name(self.experiment)
        where = known.experiment_id if known else self._client.create_experiment(self.experiment)
        quoted = str(run_dir).replace("'", r"\'")
        found = self._client.search_runs([where], f"tags.`{_FOLDER_TAG}` = '{quoted}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        made = self._client.create_run(where, run_name=run_label(config), tags={_FOLDER_TAG: str(run_dir)})
        self._run_id = made.info.run_id
        params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in flat(config).items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + _BATCH])

    def round(self, record: RoundRecord) -> None:
        """Write the metrics of a round."""
        from mlflow.entities import Metric

        values = scalars(record)
        for name, numbers in distributions(record).items():
            parts = {"mean": fmean(numbers), "median": median(numbers), "min": min(numbers), "max": max(numbers)}
            values |= {f"{name}/{part}": value for part, value in parts.items()}
        now = int(1000 * time.time())
        metrics = [Metric(_legal(name), value, now, record.server_round) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def end(self, manifest: Mapping[str, Any]) -> None:
        """Store the artifacts of a finished run; mark any other as failed."""
        for path in result_files(self._folder, self.report) if manifest else ():
            self._client.log_artifact(self._run_id, str(path), path.parent.name if path.parent != self._folder else "")
        self._client.set_terminated(self._run_id, "FINISHED" if manifest else "FAILED")


def _legal(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return "".join(character if character.isalnum() or character in "_-. /:" else "_" for character in name)
