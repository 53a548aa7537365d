"""Writes synthetic run directories: what a run would have left, with numbers that a formula gives."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

LAYERS = {"conv1": 900, "conv2": 9_200, "conv3": 18_500, "conv4": 37_000, "fc1": 262_000, "fc2": 1_300}
CONFIG: dict[str, Any] = {
    "seed": 0,
    "num_rounds": 6,
    "num_clients": 10,
    "clients_per_round": 4,
    "dry_run": False,
    "resume": None,
    "label": None,
    "model": {"name": "fedlp_cnn", "source": "fedlp_cnn", "path": None},
    "dataset": {"name": "cifar10", "root": "/somewhere", "download": True},
    "partition": {"name": "iid", "alpha": 1.0},
    "strategy": {"name": "fedavg", "layer_preserving_rate": 1.0, "depths": "u", "widths": [1.0]},
    "local": {"optimizer": "sgd", "lr": 0.05, "epochs": 1, "batch_size": 32},
    "simulation": {"engine": "local", "workers": None},
}
RunWriter = Callable[..., Path]


def make_config(**overrides: Any) -> dict[str, Any]:
    """Return a config with dotted overrides (``strategy__name="fedlp_homo"``)."""
    config = copy.deepcopy(CONFIG)
    for key, value in overrides.items():
        *path, last = key.split("__")
        section = config
        for name in path:
            section = section[name]
        section[last] = value
    return config


def make_rounds(config: dict[str, Any], count: int, metric: str) -> list[dict[str, Any]]:
    """Return lines of ``rounds.jsonl``: round 0, then ``count`` rounds in which layers are uploaded at random."""
    rate = config["strategy"]["layer_preserving_rate"]
    random = np.random.default_rng([config["seed"], int(100 * rate)])
    total = sum(LAYERS.values())
    lines = [_line(0, metrics=_metrics(metric, 0, random))]
    for server_round in range(1, count + 1):
        cohort = sorted(random.choice(config["num_clients"], config["clients_per_round"], replace=False).tolist())
        sent = random.random((len(cohort), len(LAYERS))) < rate
        up = (sent * np.array(list(LAYERS.values()))).sum(axis=1).tolist()
        clients = [
            {
                "client_id": client,
                "num_examples": 500,
                "bytes_down": 4 * total + 200,
                "bytes_up": 4 * params + 100,
                "params_down": total,
                "params_up": params,
                "macs": 2.5e9,
                "train_loss": 0.5,
            }
            for client, params in zip(cohort, up, strict=True)
        ]
        lines.append(
            _line(
                server_round,
                cohort=cohort,
                clients=clients,
                coverage=dict(zip(LAYERS, sent.any(axis=0).astype(float).tolist(), strict=True)),
                metrics=_metrics(metric, server_round, random),
                wall_time_s=1.5,
            )
        )
    return lines


def _line(server_round: int, **values: Any) -> dict[str, Any]:
    clients = values.get("clients", [])
    sums = {
        name: sum(client[name] for client in clients)
        for name in ("bytes_up", "bytes_down", "params_up", "params_down", "macs")
    }
    empty = {"cohort": [], "coverage": {}, "failures": [], "clients": [], "metrics": {}, "wall_time_s": 0.0}
    return {"server_round": server_round, **sums, **empty, **values}


def _metrics(metric: str, server_round: int, random: np.random.Generator) -> dict[str, float]:
    loss = 2.3 * float(np.exp(-server_round / 8)) + 0.4 + float(random.normal(0, 0.02))
    return {"loss": loss, metric: float(np.exp(3 * loss)) if metric == "perplexity" else 0.9 - 0.29 * loss}


@pytest.fixture
def write_run(tmp_path: Path) -> RunWriter:
    """Return a function that writes ``tmp_path/name`` and returns its path; ``edit`` may change the lines first."""
    return run_writer(tmp_path)


def run_writer(root: Path) -> RunWriter:
    """Return the function of :func:`write_run` for any folder."""

    def write(
        name: str = "run",
        *,
        metric: str = "accuracy",
        stop_after: int | None = None,
        edit: Callable[[list[dict[str, Any]]], Any] | None = None,
        manifest: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> Path:
        config = make_config(**overrides)
        folder = root / name
        folder.mkdir(parents=True)
        document = {
            "config": config,
            "versions": {"fedlp": "0.1.0", "python": "3.11.7", "commit": "abc1234"},
            "seed": config["seed"],
            "expected": {
                "params_down_per_client": 328_900.0,
                "params_up_per_client": 328_900.0 * config["strategy"]["layer_preserving_rate"],
                "bytes_down_per_client": 1_315_800.0,
                "bytes_up_per_client": 1_315_700.0 * config["strategy"]["layer_preserving_rate"],
                "macs_per_example": 5e6,
            },
        }
        if not config["dry_run"]:
            lines = make_rounds(config, config["num_rounds"] if stop_after is None else stop_after, metric)
            if edit:
                edit(lines)
            (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            if stop_after is None:
                document["final_metrics"] = lines[-1]["metrics"]
        (folder / "manifest.json").write_text(json.dumps(document | (manifest or {})))
        return folder

    return write
