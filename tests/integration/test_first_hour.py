"""Faults of a first hour: runs that train nothing, files that cannot be read, the reader of the output gone."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from flwr.app import Context, Message

from fedlp.errors import TrainingError
from fedlp.federation.client.app import make_client_app
from fedlp.federation.server.provenance import provenance
from tests.integration.running import TINY, Call, assert_refused, command, execute, read, run


# ---- runs that train nothing
def test_a_run_that_trained_nothing(call: Call, tmp_path: Path) -> None:
    code, out, errors = call(*TINY, "num_rounds=1", "local.lr=1e308", "hydra.run.dir=run")
    assert code == 2
    assert len(out.splitlines()) == 2  # no result
    words = r"nothing was trained: no round of 1 had a good update; 4 updates failed, most of them \w+, such as: "
    assert_refused((code, "", errors.splitlines()[-1] + "\n"), words)
    assert read(tmp_path / "run").manifest["totals"]["good_rounds"] == 0


def test_a_run_with_few_good_rounds_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fedlp.apps.runs import make_runtime
    from fedlp.simulation.flower_apps import settings_of

    def breaks_later(message: Message, context: Context) -> Message:
        if message.metadata.message_type.startswith("train") and message.metadata.group_id != "1":
            raise RuntimeError("out of memory")
        return make_client_app(make_runtime, settings_of)(message, context)

    done = run(tmp_path / "run", *TINY, "num_rounds=3", app=breaks_later)
    assert done.manifest["totals"]["good_rounds"] == 1
    assert "2 of 3 rounds had no good update and left the model as it was; 8 updates failed" in caplog.text
    with pytest.raises(TrainingError, match="no round of 1 had a good update"):
        run(tmp_path / "other", *TINY, "num_rounds=1", "min_clients=4", "local.lr=1e308")


# ---- what a run says of itself
def test_a_manifest_says_where_and_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        setting = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *setting, *words], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    assert provenance(tmp_path)["commit"] is None
    git("init", "-q")
    (tmp_path / "net.py").write_text("")
    git("add", ".")
    git("commit", "-qm", "net")
    made = run(tmp_path / "run", *TINY, "num_rounds=1").manifest["made"]
    assert made["commit"] == git("rev-parse", "HEAD")
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(made["date"])).total_seconds()) < 60
    assert made["host"] == os.uname().nodename
    assert made["cpu"]
    assert made["cores"] == os.cpu_count()
    (tmp_path / "net.py").write_text("changed")
    assert provenance(tmp_path)["commit"] == made["commit"] + "+"


def test_rounds_hold_the_training_loss_of_each_client(tmp_path: Path) -> None:
    done = run(tmp_path, *TINY)
    for line in done.rounds:
        losses = [(cost["train_loss"], cost["num_examples"]) for cost in line["clients"]]
        mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        assert mean == pytest.approx(line["metrics"]["train_loss"])


# ---- files that cannot be read
@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"num_rounds: 1\n\tseed: 2\n", r"line 2, column 1: found character '\\t' .*; indent with spaces"),
        (b"label: caf\xe9\n", "byte 11 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_yaml_file_that_cannot_be_read(content: bytes, words: str, call: Call, tmp_path: Path) -> None:
    for folder in ("conf/experiment", "run"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_bytes(content)
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    assert_refused(call("--config-dir", "conf", "experiment=mine"), f"mine.yaml.*{words}")
    assert_refused(call("--config-dir=conf", "experiment=mine"), f"mine.yaml.*{words}")
    assert_refused(call("resume=run"), f"run/config.yaml.*{words}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sparsity=0.3", r"did you mean strategy\.sparsity \(of strategy=fedlp_plan\)"),
        ("lr=0.1", r"did you mean local.lr\?"),
        ("partition=dirichlet partition.alpha=0.001 num_clients=100", r"partition.min_examples \(0 allows clients"),
    ],
)
def test_advice_that_can_be_followed(arguments: str, words: str, call: Call) -> None:
    assert_refused(call(*arguments.split()), words)


# ---- real processes
@pytest.mark.slow
def test_warnings_of_other_packages_are_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    done = execute("fedlp", *TINY, "num_rounds=1", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["options", "strategy"], [*TINY, "dry_run=true"]])
def test_a_reader_that_has_gone(arguments: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("fedlp", *arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # at once, as `| head -0` does
    assert process.stderr.read() == b""
    process.wait(60)
    process.stderr.close()


@pytest.mark.parametrize(
    ("main", "arguments", "loads"),
    [
        ("main", TINY, "digits and fedlp_mlp"),
        ("prune_main", ("model.path=models/lm", "sparsity=0.3"), "topics and hf (lm)"),
        ("prune_main", ("run=trained", "sparsity=0.3"), "the run in trained"),
        ("search_main", ("model.path=lm",), "topics and hf (lm)"),
        ("profile_main", ("model=small_cnn", "dataset=digits"), "digits and small_cnn"),
    ],
)
def test_the_first_line_comes_before_heavy_imports(
    main: str, arguments: tuple[str, ...], loads: str, tmp_path: Path
) -> None:
    code = (
        "import sys; from fedlp import cli; from fedlp.cli import run, tools\n"
        "heavy = {'torch', 'flwr', 'transformers', 'datasets', 'fedlp.apps'}\n"
        "announce = run.announce\n"
        "def stop(*arguments):\n"
        "    announce(*arguments); raise SystemExit(' '.join(sorted(heavy & set(sys.modules))) or 0)\n"
        f"run.announce = tools.announce = stop\ncli.{main}()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "hydra.run.dir=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"imported before: {done.stderr}"
    assert done.stdout == f"loading {loads}  -> {tmp_path}/run\n"
