"""Result of a run: metrics by round, the trained model, a table, a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedlp.models import state_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Result:
    """Files of a finished run, read back.

    Attributes
    ----------
    path : Path
        Run directory.
    manifest : dict
        Totals, final metrics, config and versions.
    build : callable
        Returns a module of the global architecture.
    """

    path: Path
    manifest: Mapping[str, Any]
    build: Callable[[], nn.Module]

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last round, such as ``accuracy`` and ``loss``."""
        return dict(self.manifest["final_metrics"])

    @property
    def bytes_up(self) -> int:
        """Bytes of all uploads, as encoded."""
        return int(self.manifest["totals"]["bytes_up"])

    @property
    def bytes_down(self) -> int:
        """Bytes of all downloads, as encoded."""
        return int(self.manifest["totals"]["bytes_down"])

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """One record per round: cohort, bytes, parameters, MACs, coverage, failures, metrics."""
        lines = (self.path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def model(self) -> nn.Module:
        """Return the trained global model, in evaluation mode."""
        from safetensors.torch import load_file

        module = self.build()
        stored = load_file(self.path / "model.safetensors")
        for name, tensor in state_tensors(module).items():
            tensor.copy_(stored[name])
        return module.eval()

    def table(self) -> str:
        """Return the summary table of the run as text."""
        from fedlp.report import group_runs, load_run, summary_table

        return summary_table(group_runs([load_run(self.path)]))

    def plot(self, metric: str | None = None) -> Figure:
        """Return a figure of a test metric against rounds and against uplink bytes.

        Parameters
        ----------
        metric : str, optional
            Name in ``metrics``; the first one except losses if absent.
        """
        from matplotlib.figure import Figure

        name = metric or next((key for key in self.metrics if "loss" not in key), "loss")
        rounds, seen, sent, total = [], [], [], 0
        for line in self.rounds:
            total += line["bytes_up"]
            if line["metrics"].get(name) is not None:
                rounds.append(line["server_round"])
                seen.append(line["metrics"][name])
                sent.append(total / 1e6)
        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, values, label in ((left, rounds, "round"), (right, sent, "uplink, MB")):
            axes.plot(values, seen, marker="o", markersize=3)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        left.set_ylabel(name)
        return figure
