"""Small whole runs in this process, and what they leave."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from safetensors.torch import load
from torch import Tensor

from fedlp.apps import runs as assembly
from fedlp.apps.batching import cohort_size, sends_stacks
from fedlp.config import RunConfig, compose, to_yaml
from fedlp.simulation.local import LocalGrid

TINY = (
    "model=fedlp_mlp",
    "model.variant=deep",
    "dataset.max_train_examples=120",
    "dataset.max_test_examples=40",
    "num_clients=6",
    "clients_per_round=4",
    "num_rounds=2",
    "local.batch_size=8",
    "simulation.workers=2",
)
TINY_CNN = ("model=fedlp_cnn", *TINY[2:])

App = Callable[[Message, Context], Message]
Call = Callable[..., tuple[int, str, str]]  # a command line: exit code, stdout, stderr


@dataclass(frozen=True)
class Finished:
    """The files of a run."""

    path: Path
    config: RunConfig
    manifest: dict[str, Any]
    rounds: list[dict[str, Any]]
    model: bytes

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load(self.model)

    @property
    def untimed(self) -> list[dict[str, Any]]:
        """The rounds without the one value that differs between equal runs."""
        return [{key: value for key, value in line.items() if key != "wall_time_s"} for line in self.rounds]

    @property
    def failures(self) -> list[tuple[int, int, str]]:
        """(round, client, reason) of every failure."""
        return [(line["server_round"], f["client_id"], f["reason"]) for line in self.rounds for f in line["failures"]]


def run(out: Path, *overrides: str, app: App | None = None) -> Finished:
    """Run on the local engine; ``app`` stands in for the clients' app."""
    serve(compose(overrides), out, app)
    return read(out)


def serve(config: RunConfig, out: Path, app: App | None = None) -> None:
    """Run a config on the local engine; ``app`` stands in for the clients' app."""
    cfg = to_yaml(config)
    if app is None:
        assembly.run_locally(cfg, out)
        return
    plan = assembly.make_plan(cfg)
    assembly.make_runtime(cfg, str(out / "clients"))
    with LocalGrid(
        lambda: app,  # type: ignore[arg-type, return-value]
        num_clients=config.num_clients,
        num_workers=2,
        message_bytes=8 * sum(math.prod(info.shape) for info in plan.submodels.spec.tensors.values()),
        run_config={"cfg": cfg, "out": str(out)},
        cohort=cohort_size(config, plan.submodels, plan.info),
        stacks=sends_stacks(config),
    ) as grid:
        assembly.serve_run(grid, cfg, out)


def read(out: Path) -> Finished:
    """Return the files of a finished run."""
    return Finished(
        out,
        assembly.from_yaml((out / "config.yaml").read_text()),
        json.loads((out / "manifest.json").read_text()),
        [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()],
        (out / "model.safetensors").read_bytes(),
    )


def command(name: str, *arguments: str) -> list[str]:
    """Return the command line of an installed entry point."""
    return [str(Path(sys.executable).parent / name), *arguments]


def interruptible(line: list[str]) -> list[str]:
    """Return a command line that heeds signals even if the tests run in the background, where shells turn some off."""
    heed = "import os, signal as s, sys; [s.signal(n, s.SIG_DFL) for n in (s.SIGINT, s.SIGHUP)]; "
    heed += "os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", heed, *line]


def execute(name: str, *arguments: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run an installed entry point to its end."""
    return subprocess.run(
        command(name, *arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def assert_refused(result: tuple[int, str, str], words: str) -> None:
    code, _, errors = result
    assert code == 2
    assert errors.count("\n") == 1, f"not one line: {errors}"
    assert errors.startswith("fedlp: ")
    assert re.search(words, errors), errors
