"""Sweeps: what a job returns, folders that hold their runs already, Optuna."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.integration.running import TINY, Call, command, execute, read, run

NOTE = "+hydra.callbacks.note._target_=noting.Note"
NOTING = """
from hydra.experimental.callback import Callback

values = []


class Note(Callback):
    def on_job_end(self, config, job_return, **_):
        values.append(job_return.return_value)
"""


@pytest.fixture
def returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return what the jobs of sweeps with ``NOTE`` return, as Hydra's launchers hand it to sweepers."""
    (tmp_path / "noting.py").write_text(NOTING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noting", raising=False)
    values: list[object] = importlib.import_module("noting").values
    return values


def test_a_job_returns_its_objective(call: Call, tmp_path: Path, returned: list[object]) -> None:
    code, out, errors = call("-m", *TINY, "seed=0,-1", "objective=loss", "hydra.sweep.dir=sweep", NOTE)
    assert code == 2
    done = read(tmp_path / "sweep" / "0")
    assert returned == [done.manifest["final_metrics"]["loss"], None]
    first = out.splitlines()[0]
    assert re.fullmatch(r"job 0 \(.*seed=0 objective=loss\): loading digits and fedlp_mlp  -> .*sweep/0", first)
    assert errors.count("fedlp: job 1 (") == 1


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(call: Call, tmp_path: Path, returned: list[object]) -> None:
    line = ("-m", *TINY, "num_rounds=3", "seed=0,1,2", "hydra.sweep.dir=sweep", NOTE)
    assert call(*line)[0] == 0
    jobs = [tmp_path / "sweep" / name for name in "012"]
    before = [read(job) for job in jobs]
    (jobs[1] / "manifest.json").unlink()  # as a kill in round 3 leaves it
    for name in ("round-000003.json", "round-000003.safetensors"):
        (jobs[1] / "checkpoint" / name).unlink()
    for path in sorted(jobs[2].rglob("*"), reverse=True):  # as a kill before the job leaves it
        path.rmdir() if path.is_dir() else path.unlink()
    stamp = (jobs[0] / "model.safetensors").stat().st_mtime_ns
    code, out, errors = call(*line)
    assert code == 0, errors
    assert (jobs[0] / "model.safetensors").stat().st_mtime_ns == stamp
    assert "finished before" in out.splitlines()[0]
    assert [text.partition(": round ")[2].split("/")[0] for text in errors.splitlines()] == ["3", "1", "2", "3"]
    assert [read(job).model for job in jobs] == [run.model for run in before]
    assert returned[:3] == returned[3:] == [run.manifest["final_metrics"]["accuracy"] for run in before]


@pytest.mark.slow
def test_another_sweep_into_the_same_folder_is_refused(call: Call, tmp_path: Path) -> None:
    assert call("-m", *TINY, "seed=0", "hydra.sweep.dir=sweep")[0] == 0
    before = read(tmp_path / "sweep" / "0")
    code, _, errors = call("-m", *TINY, "seed=3", "local.lr=0.2", "hydra.sweep.dir=sweep")
    assert code == 2
    assert "sweep/0 holds a run with another seed and local.lr; choose another hydra.sweep.dir\n" in errors
    assert read(tmp_path / "sweep" / "0").model == before.model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Optuna's own
def test_optuna_maximises_accuracy(call: Call, tmp_path: Path) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="Optuna's sweeper is not installed: hydra-optuna-sweeper"
    )
    optuna = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=sweep")
    search = ("local.lr=choice(0.0001,0.1,-1)", "hydra.sweeper.sampler.seed=3")
    code, _, errors = call("-m", *TINY, *optuna, *search, "num_rounds=1", "objective=accuracy")
    runs = [read(path.parent) for path in sorted((tmp_path / "sweep").glob("*/manifest.json"))]
    values = [run.manifest["final_metrics"]["accuracy"] for run in runs]
    failed = errors.count("local.lr=-1.0 is not allowed")
    assert len(runs) + failed == 6
    assert code == (2 if failed else 0)  # a trial that fails does not end the search
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert found["best_value"] == max(values)
    assert {run.config.local.lr for run in runs} == {0.0001, 0.1}


def test_optuna_is_told_the_direction(call: Call) -> None:
    from fedlp.cli.sweeps import sweep_direction

    asked = ["hydra/sweeper=optuna", "seed=0,1"]
    assert sweep_direction([*asked, "objective=accuracy"]) == ["hydra.sweeper.direction=maximize"]
    assert sweep_direction([*asked, "objective=loss"]) == ["hydra.sweeper.direction=minimize"]
    assert sweep_direction([*asked, "hydra.sweeper.direction=minimize"]) == []
    assert sweep_direction(["seed=0,1"]) == []
    code, _, errors = call("-m", *asked)
    assert (code, errors) == (2, "fedlp: hydra/sweeper=optuna needs objective=METRIC, such as accuracy or loss\n")


def test_a_job_that_trained_nothing_is_not_finished(call: Call, tmp_path: Path) -> None:
    line = ("-m", *TINY, "num_rounds=1", "local.lr=1e308", "hydra.sweep.dir=sweep")
    assert call(*line)[0] == 2
    assert json.loads((tmp_path / "sweep" / "0" / "manifest.json").read_text())["totals"]["good_rounds"] == 0
    code, _, errors = call(*line)
    assert code == 2
    assert "sweep/0 holds a run that trained nothing; delete it to try again" in errors


# ---- real processes
EIGHT = (*TINY, "num_rounds=3", "seed=0,1,2,3,4,5,6,7", "hydra.sweep.dir=sweep")


@pytest.mark.slow
def test_a_killed_sweep_of_eight_jobs_goes_on_where_it_was(tmp_path: Path) -> None:
    jobs = [tmp_path / "sweep" / str(number) for number in range(8)]
    process = subprocess.Popen(
        command("fedlp", "-m", *EIGHT), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (jobs[3] / "config.yaml").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()  # in the middle of the fourth job
    process.wait(30)
    done = [job for job in jobs if (job / "manifest.json").is_file()]
    stamps = {job: (job / "model.safetensors").stat().st_mtime_ns for job in done}
    assert 3 <= len(done) < 8
    again = execute("fedlp", "-m", *EIGHT, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == len(done)
    assert stamps == {job: (job / "model.safetensors").stat().st_mtime_ns for job in done}
    assert [read(job).config.seed for job in jobs] == list(range(8))
    whole = run(tmp_path / "whole", *TINY, "num_rounds=3", "seed=3")
    assert read(jobs[3]).model == whole.model
    assert read(jobs[3]).untimed == whole.untimed


@pytest.mark.slow
def test_jobs_in_other_processes(tmp_path: Path) -> None:
    for launcher in ("joblib", "submitit_local"):
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher", reason="not installed")
        (tmp_path / launcher).mkdir()
        _run_in_other_processes(launcher, tmp_path / launcher)


def _run_in_other_processes(launcher: str, folder: Path) -> None:
    chosen = [f"hydra/launcher={launcher}", "simulation.workers=1", "seed=0,1", "hydra.sweep.dir=sweep"]
    done = execute("fedlp", "-m", *TINY, *chosen, cwd=folder, timeout=240)
    assert done.returncode == 0, done.stderr
    runs = [read(folder / "sweep" / name) for name in "01"]
    assert [one.config.seed for one in runs] == [0, 1]
    failing = execute("fedlp", "-m", *TINY, *chosen[:2], "local.lr=-1,0.1", "hydra.sweep.dir=bad", cwd=folder)
    assert failing.returncode == 2
    assert "Traceback" not in failing.stderr
    assert re.search(r"a job of the sweep failed: job 0 \(.*\): local.lr=-1.0 is not allowed", failing.stderr)
    assert (folder / "bad" / "1" / "manifest.json").is_file()
