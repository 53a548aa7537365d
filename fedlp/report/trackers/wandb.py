"""Weights & Biases, through its own client; ``mode=offline`` keeps everything in the run directory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlp.errors import ConfigError
from fedlp.registry import register
from fedlp.report.groups import run_label
from fedlp.report.trackers.files import result_files
from fedlp.report.trackers.values import distributions, scalars
from fedlp.types import RoundRecord


@register("tracker", "wandb")
@dataclass
class WandB:
    """Weights & Biases run: config, every metric of a round, histograms over clients, the report as an artifact.

    Attributes
    ----------
    project : str
        Project of the run.
    entity, group : str or None
        Team, and the runs that belong together; W&B's own defaults if absent.
    mode : str or None
        "online", "offline" or "disabled"; ``WANDB_MODE``, else online, if absent.
    report : bool
        Whether the report page is made and stored as an artifact, beside config and manifest.
    """

    project: str = "fedlp"
    entity: str | None = None
    group: str | None = None
    mode: str | None = None
    report: bool = True
    _run: Any = field(default=None, init=False, repr=False)
    _folder: Path = field(default=Path(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(f"tracker.mode={self.mode} is not allowed: it must be online, offline or disabled")

    def begin(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """Start the run; its id is that of the run directory, so that a resumed run goes on."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("Weights & Biases is not installed; run: pip install wandb") from error
        self._folder = run_dir
        mode: Any = self.mode
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            mode=mode,
            name=run_label(config),
            id=hashlib.sha256(str(run_dir).encode()).hexdigest()[:16],
            resume=None if self.mode == "offline" else "allow",
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def round(self, record: RoundRecord) -> None:
        """Write the metrics and histograms of a round."""
        import wandb

        values: dict[str, Any] = dict(scalars(record))
        for name, numbers in distributions(record).items():
            values[f"{name}/distribution"] = wandb.Histogram(numbers)
        self._run.log(values, step=record.server_round)

    def end(self, manifest: Mapping[str, Any]) -> None:
        """Store the artifact of a finished run; mark any other as failed."""
        import wandb

        if manifest:
            artifact = wandb.Artifact(f"run-{self._run.id}", type="run")
            for path in result_files(self._folder, self.report):
                artifact.add_file(str(path), name=str(path.relative_to(self._folder)))
            self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if manifest else 1)
