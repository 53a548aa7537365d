"""A stranger's package: one part of every kind, by MODULE:OBJECT and by name, on every engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fedlp.simulation.flower_process import SUPERLINK, call_flwr, find_flwr, write_run_config
from fedlp.simulation.flower_run import private_superlink
from tests.integration.running import command

PARTS = Path(__file__).parent / "own" / "parts.py"
M = "other_package.parts"
SMALL = ("num_rounds=3", "num_clients=4", "clients_per_round=3", "simulation.workers=1", "local.batch_size=16")
SETTINGS = (
    f"model={M}:ResCNN",
    "model.width=6",
    f"dataset={M}:load",
    "dataset.count=160",
    f"partition={M}:alternate",
    f"task={M}:Smoothed",
    f"local.optimizer={M}:SignSGD",
    f"local.schedule={M}:halving",
    f"server_optimizer={M}:HalfStep",
    f"aggregator={M}:Midrange",
    f"tracker={M}:Lines",
    "tracker.file=mine.txt",
    f"callbacks=[{{name: {M}:StopAfter, rounds: 2}}]",
)
OWN_STRATEGY = (f"strategy={M}:FirstUnits", "strategy.share=0.6", f"upload={M}:Signs", "upload.values=deltas")
OWN_PLAN = (
    "strategy=fedlp_plan",
    f"allocator={M}:even",
    f"pruner={M}:Norms",
    "fleet=tiers",
    "fleet.fractions=[1.0,0.5]",
    "strategy.unit_selection=client",
    "strategy.refresh_every=1",
)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Return an empty folder with the stranger's package in it, and nothing else."""
    (tmp_path / "other_package").mkdir()
    (tmp_path / "other_package" / "__init__.py").write_text("")
    shutil.copy(PARTS, tmp_path / "other_package" / "parts.py")
    return tmp_path


def files(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return manifest and rounds; the config names a package that this process does not have."""
    lines = (run / "rounds.jsonl").read_text().splitlines()
    return json.loads((run / "manifest.json").read_text()), [json.loads(line) for line in lines]


def call(tool: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(tool, *arguments), cwd=cwd, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return done


def bytes_of(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def install(folder: Path) -> dict[str, str]:
    """Return an environment in which the package is installed, with entry points for some of its parts."""
    site = folder / "site"
    shutil.copytree(folder / "other_package", site / "other_package")
    info = site / "other_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    points = {"model": "res_cnn = other_package.parts:ResCNN", "dataset": "blobs = other_package.parts:load"}
    (info / "entry_points.txt").write_text("".join(f"[fedlp.{kind}]\n{line}\n\n" for kind, line in points.items()))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


def test_a_strategy_and_an_encoding_with_everything_around_them(elsewhere: Path) -> None:
    call("fedlp", *SETTINGS, *OWN_STRATEGY, *SMALL, "hydra.run.dir=run", cwd=elsewhere)
    manifest, rounds = files(elsewhere / "run")
    metrics = manifest["final_metrics"]
    assert set(metrics) >= {"accuracy", "error_rate", "loss"}
    assert metrics["accuracy"] + metrics["error_rate"] == pytest.approx(1.0)
    assert manifest["totals"]["failures"] == 0
    assert rounds[-1]["coverage"]["wide"] < 1.0
    assert len(rounds) == 2  # the callback ended it
    lines = (elsewhere / "run" / "mine.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "end"]
    assert float(lines[1].split()[1]) == metrics["error_rate"]


def test_an_allocator_and_a_score_in_a_round(elsewhere: Path) -> None:
    call("fedlp", *SETTINGS, *OWN_PLAN, *SMALL, "hydra.run.dir=run", cwd=elsewhere)
    manifest, rounds = files(elsewhere / "run")
    assert manifest["totals"]["failures"] == 0
    assert len({client["params_down"] for line in rounds for client in line["clients"]}) > 1


@pytest.mark.slow
def test_a_sweep_over_an_option_of_ones_own(elsewhere: Path) -> None:
    call(
        "fedlp",
        "-m",
        *SETTINGS,
        OWN_STRATEGY[0],
        *OWN_STRATEGY[2:],
        *SMALL,
        "strategy.share=0.5,0.9",
        "hydra.sweep.dir=sweep",
        cwd=elsewhere,
    )
    runs = [json.loads((elsewhere / "sweep" / str(job) / "manifest.json").read_text()) for job in (0, 1)]
    assert runs[0]["totals"]["params_up"] < runs[1]["totals"]["params_up"]


@pytest.mark.slow
def test_pruning_with_an_allocator_and_a_score_of_ones_own(elsewhere: Path) -> None:
    call("fedlp", *SETTINGS, "strategy=fedavg", *SMALL, "hydra.run.dir=run", cwd=elsewhere)
    own = (f"pruner={M}:Norms", f"allocator={M}:even", "sparsity=0.4", "calibration.examples=64", "pruner.shared=true")
    call("fedlp-prune", "run=run", *own, "hydra.run.dir=pruned", cwd=elsewhere)
    report = json.loads((elsewhere / "pruned" / "prune.json").read_text())
    assert report["params_after"] < 0.8 * report["params_before"]


@pytest.mark.slow
def test_names_of_an_installed_package(elsewhere: Path) -> None:
    env = install(elsewhere)
    shutil.rmtree(elsewhere / "other_package")
    line = command("fedlp", "model=res_cnn", "dataset=blobs", "strategy=fedavg", *SMALL, "hydra.run.dir=run")
    done = subprocess.run(line, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    wrong = command("fedlp", "model=res_cn", "hydra.run.dir=other")
    failed = subprocess.run(wrong, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "res_c" in failed.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_strategy_has_the_same_bytes_on_flowers_runtime(elsewhere: Path) -> None:
    same_bytes_on_ray(elsewhere, OWN_STRATEGY)


@pytest.mark.slow
@pytest.mark.ray
def test_a_plan_has_the_same_bytes_on_flowers_runtime(elsewhere: Path) -> None:
    same_bytes_on_ray(elsewhere, OWN_PLAN)


def same_bytes_on_ray(elsewhere: Path, method: tuple[str, ...]) -> None:
    call("fedlp", *SETTINGS, *method, *SMALL, "hydra.run.dir=local", cwd=elsewhere)
    call("fedlp", *SETTINGS, *method, *SMALL, "simulation=flower", "hydra.run.dir=ray", cwd=elsewhere)
    assert bytes_of(elsewhere / "ray") == bytes_of(elsewhere / "local")
    assert (elsewhere / "ray" / "mine.txt").read_text() == (elsewhere / "local" / "mine.txt").read_text()


PROJECT = """
[project]
name = "strange"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "stranger"

[tool.flwr.app.components]
serverapp = "other_package.apps:server_app"
clientapp = "other_package.apps:client_app"

[tool.flwr.app.config]
overrides = ""
out = ""
"""


APPS = """import fedlp.apps.runs

server_app = fedlp.apps.runs.server_app  # Flower looks for assignments
client_app = fedlp.apps.runs.client_app
"""


@pytest.mark.slow
@pytest.mark.ray
def test_flwr_run_of_an_app_of_ones_own(elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (elsewhere / "pyproject.toml").write_text(PROJECT)
    (elsewhere / "other_package" / "apps.py").write_text(APPS)
    out, scratch, program = tmp_path_factory.mktemp("out") / "run", Path(tempfile.mkdtemp(prefix="f")), find_flwr()
    assert program is not None
    overrides = (*SETTINGS[:-1], *OWN_STRATEGY, *SMALL)
    settings = write_run_config(scratch / "run.toml", {"overrides": " ".join(overrides), "out": str(out)})
    with private_superlink(scratch, program) as env:
        line = [program, "run", str(elsewhere), SUPERLINK, "--stream", "--run-config", str(settings)]
        said = call_flwr([*line, "--federation-config", "num-supernodes=4 client-resources-num-cpus=1"], env)
    shutil.rmtree(scratch, ignore_errors=True)
    assert (out / "manifest.json").is_file(), said
    call("fedlp", *overrides, "hydra.run.dir=local", cwd=elsewhere)
    assert bytes_of(out) == bytes_of(elsewhere / "local")
    assert (out / "mine.txt").read_text() == (elsewhere / "local" / "mine.txt").read_text()


@pytest.mark.slow
def test_a_dataclass_of_ones_own_in_python(elsewhere: Path) -> None:
    code = (
        "import fedlp; from other_package.parts import ResCNN, FirstUnits, load\n"
        "train, test = load(120)\n"
        "result = fedlp.simulate(ResCNN, train, test, clients=3, rounds=1, strategy=FirstUnits(share=0.7), out='run')\n"
        "print(result.metrics['accuracy'], result.bytes_up)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) >= 0.0
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["at the top", "in the function"])
def test_a_loader_of_torchvisions(elsewhere: Path, place: str) -> None:
    """Even next to a torchvision that was built for another torch."""
    line = "from torchvision.datasets import FakeData"
    top, inner = (line, "pass") if place == "at the top" else ("", line)
    body = (inner, "from torchvision.transforms import ToTensor", "return FakeData(60, (3, 8, 8), 4, ToTensor())")
    (elsewhere / "pictures.py").write_text("\n    ".join([f"{top}\n\ndef load():", *body]))
    call("fedlp", "dataset=pictures:load", "model=linear", "dry_run=true", "hydra.run.dir=dry", cwd=elsewhere)
