"""TensorBoard, through torch's own writer: ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedlp.errors import ConfigError
from fedlp.registry import register
from fedlp.report.trackers.values import distributions, scalars
from fedlp.types import RoundRecord


@register("tracker", "tensorboard")
@dataclass
class TensorBoard:
    """TensorBoard event files: metrics, costs and coverage by round, histograms over clients, config and result.

    Attributes
    ----------
    folder : str
        Folder of the event files, within the run directory.
    histograms : bool
        Whether numbers of clients are drawn as distributions.
    """

    folder: str = "tensorboard"
    histograms: bool = True
    _writer: Any = field(default=None, init=False, repr=False)
    _begun: tuple[Mapping[str, Any], Path] = field(default=({}, Path()), init=False, repr=False)

    def begin(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """Import the writer, which is made at the first round."""
        _summary_writer()
        self._begun = (config, run_dir)

    def round(self, record: RoundRecord) -> None:
        """Write scalars and histograms; events of this and later rounds that an earlier process left do not count."""
        if self._writer is None:
            config, run_dir = self._begun
            self._writer = _summary_writer()(str(run_dir / self.folder), purge_step=record.server_round)
            self._writer.add_text("config", _as_text(config), record.server_round)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.server_round)
        if self.histograms:
            import numpy as np

            for name, values in distributions(record).items():
                self._writer.add_histogram(name, np.array(values), record.server_round)
        self._writer.flush()

    def end(self, manifest: Mapping[str, Any]) -> None:
        """Write totals and final metrics as text, and close the files."""
        if self._writer is None:
            return
        if manifest:
            shown = {name: manifest.get(name) for name in ("final_metrics", "totals")}
            self._writer.add_text("result", _as_text(shown), int((manifest.get("totals") or {}).get("rounds", 0)))
        self._writer.close()
        self._writer = None


def _as_text(values: Mapping[str, Any]) -> str:
    """Return values as a Markdown code block, which is an indented one."""
    return "".join(f"    {line}\n" for line in yaml.safe_dump(dict(values), sort_keys=False).splitlines())


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("TensorBoard is not installed; run: pip install tensorboard") from error
    return SummaryWriter
