"""What a user types: bad input of any kind ends with one line on stderr and exit code 2, and loses nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedlp import cli
from fedlp.apps import runs as assembly
from fedlp.config import aliases
from fedlp.report import pack_runs
from tests.integration.running import TINY, Call, Finished, assert_refused, execute, read

Once = Callable[..., Finished]


# ---- options
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("num_round=3", "no option num_round; did you mean num_rounds"),
        ("local.epoch=3", "no option local.epoch; did you mean local.epochs"),
        ("+num_round=3", "no option num_round; did you mean num_rounds"),
        ("+strategy.lpr=0.5", "no option strategy.lpr"),
        ("strategy.layer_preserving_rates=0.5", "did you mean strategy.layer_preserving_rate"),
        ("strategy=fedavg strategy.sparsity=0.9", "no option strategy.sparsity .*; fedlp_plan reads it"),
        (
            "strategy=heterofl strategy.layer_preserving_rate=0.1",
            "no option strategy.layer_preserving_rate with strategy=heterofl; fedlp_homo, fedlp_plan read it",
        ),
        (
            "strategy=fedlp_homo strategy.widths=[0.1]",
            "no option strategy.widths with strategy=fedlp_homo; fedrolex, fjord, heterofl read it",
        ),
        ("strategy=fedavg strategy.regrow=0.3", "strategy.regrow with strategy=fedavg; fedlp_plan reads it"),
        ("upload=topk upload.coarseness=2", "upload.coarseness with upload=topk; int2, int4, int8 read it"),
        ("server_optimizer.beta2=0.9", "with server_optimizer=none; adagrad, adam, yogi read it"),
        ("strategy=fedavg pruner=obs", "strategy=fedavg does not read pruner: drop pruner=obs; fedlp_plan"),
        ("lr=0.1", "no option lr; did you mean local.lr"),
        ("sparsity=0.3", r"no option sparsity; did you mean strategy.sparsity \(of strategy=fedlp_plan\)"),
        ("coarseness=2", r"did you mean upload.coarseness \(of upload=int2 or int4 or int8\)"),
        ("strategy=fedlp_hom", "no strategy=fedlp_hom; did you mean fedlp_homo"),
        ("strategy.name=fedlp_hom", "no strategy=fedlp_hom; did you mean fedlp_homo"),
        ("upload=int9", "no upload=int9; did you mean int8"),
        ("aggregator=trimmed_meen", "no aggregator=trimmed_meen; did you mean trimmed_mean"),
        ("server_optimizer=adm", "no server_optimizer=adm; did you mean adam"),
        ("allocator=depthline", "no allocator=depthline; did you mean depth_line"),
        ("pruner=obss", "no pruner=obss; did you mean obs"),
        ("partition=iidd", "no partition=iidd; did you mean iid"),
        ("local=sgdd", "no local=sgdd; did you mean sgd"),
        ("strategy=nowhere:Thing", "module nowhere cannot be imported: No module named 'nowhere'"),
        ("strategy=json:JSONDecodr", "json has no JSONDecodr; did you mean JSONDecode"),
        ("strategy=json:JSONDecoder", "strategy json:JSONDecoder has no method policy"),
        ("strategy={name:fedlp_hom}", "there is no strategy fedlp_hom; did you mean fedlp_homo"),
        ("model=resnet19", "no model=resnet19; did you mean resnet18 .* MODULE:OBJECT"),
        ("strategy=fedprox", "no strategy=fedprox; did you mean fedrolex or fedlp_hetero"),
        ("experiment=nope", "no experiment=nope; choose one of demo, "),
        (
            "-m hydra/launcher=nope_slurm",
            "no hydra/launcher=nope_slurm; if it is a plugin, run: pip install hydra-nope-l",
        ),
        ("num_rounds=abc", "'abc' .* could not be converted to Integer"),
        ("num_rounds=null", "num_rounds"),
        ("local.lr=fast", "'fast' .* could not be converted to Float"),
        ("num_rounds=${nope}", "nope"),
        ("foo", "foo"),
        ("=3", "must be a string"),
        ("model=null", "must be a string"),
        ("~model", "model.source is missing; choose one of .*fedlp_cnn"),
        ("a=b=[", "mismatched input"),
        ("seed=0,1", "--multirun"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--cfg nonsense", "nonsense"),
        ("--run --multirun", "Only one of"),
        ("--config-name nope", "nope"),
    ],
)
def test_misspelt_input(arguments: str, words: str, call: Call) -> None:
    assert_refused(call(*arguments.split()), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("strategy.layer_preserving_rate=1.5", r"1\.5 .* \[0, 1\]"),
        ("strategy.layer_preserving_rate=-0.1", r"-0\.1 .* \[0, 1\]"),
        ("strategy.layer_preserving_rate=nan", r"\[0, 1\]"),
        ("strategy.layer_preserving_rate=often", r"\[0, 1\]"),
        ("strategy.layer_preserving_rate=[0.1,0.2]", "a list of 2 .* one per client"),
        ("num_clients=3 clients_per_round=4", "at most num_clients=3"),
        ("min_clients=99", "min_clients=99"),
        ("num_rounds=0", "at least 1"),
        ("seed=-1", "at least 0"),
        ("local.lr=nan", "finite"),
        ("local.logit_adjustment=-1", "local.logit_adjustment=-1.0 .* at least 0"),
        (
            "model=llama_tiny dataset=topics local.logit_adjustment=1",
            "is for classifiers, but topics has no class for an example; set it to 0",
        ),
        (
            "strategy=fedlp_plan upload=float32 upload.coarseness=2",
            "no option upload.coarseness with upload=float32; int2, int4, int8 read it",
        ),
        ("strategy=fedlp_plan upload.coarseness=0.5", r"upload.coarseness=0\.5 is not allowed: .* at least 1"),
        ("strategy=fedlp_plan strategy.ramp_from=0.9", "ramp_from needs strategy.ramp_rounds"),
        ("local.optimizer=lbfgs", "one of adam, adamw, sgd"),
        ("device=tpu", "cpu, cuda"),
        ("strategy=heterofl strategy.widths=[0.5,1.5]", "strategy.widths"),
        ("strategy=heterofl strategy.width_probabilities=[0.5,0.5]", "one share per width"),
        ("server_optimizer=rmsprop", "no server_optimizer=rmsprop; choose one of adagrad, adam, momentum, none, yogi"),
        ("strategy=fedlp_hetero strategy.depths=9", "depths 1 to 5"),
        ("strategy=fedlp_hetero strategy.depths=0", "strategy.depths=0"),
        ("strategy=fedlp_hetero strategy.depths=[1,2]", "one per client"),
        ("strategy=fedlp_hetero model=fedlp_mlp", "needs a model with depth prefixes"),
        ("model=llama_tiny", "a language model, but the data set needs a classifier"),
        ("dataset=topics", "a classifier, but the data set needs a language model"),
        ("model=torchvision model.name=resnet19", "resnet19"),
        ("model=hf dataset=topics", "model.path is not set"),
        ("model=hf dataset=topics model.path=/nonexistent", "/nonexistent"),
        ("simulation.workers=-1", "simulation.workers=-1"),
        ("dataset=topics model=llama_tiny model.num_layers=0", "model.num_layers=0"),
        ("dataset=topics model=llama_tiny model.num_kv_heads=3", "model.num_kv_heads=3"),
    ],
)
def test_values_that_cannot_be(arguments: str, words: str, call: Call) -> None:
    assert_refused(call(*arguments.split()), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "dataset=cifar10 dataset.root=/nonexistent dataset.download=false",
            "no folder /nonexistent; set dataset.root",
        ),
        ("dataset=mnist dataset.root=/nonexistent dataset.download=false", "no folder /nonexistent"),
        ("dataset=text model=llama_tiny", "needs dataset.root"),
        ("dataset=text model=llama_tiny dataset.root=/nonexistent", "no file or folder at /nonexistent"),
        ("dataset=hf model=llama_tiny", "needs dataset.path"),
        ("num_clients=2000 clients_per_round=3", "2000 clients cannot share 143[78] examples"),
        ("partition=natural", "owners"),
        ("partition=dirichlet partition.alpha=0.001 partition.min_examples=140", "raise partition.alpha"),
        ("partition=shards partition.shards_per_client=1000", "more shards"),
        ("partition.min_examples=1000", "fewer than"),
        ("dataset.max_train_examples=3", "cannot share 3 examples"),
    ],
)
def test_data_that_is_not_there(arguments: str, words: str, call: Call) -> None:
    assert_refused(call(*arguments.split()), words)


# ---- old names
def test_an_old_name_works_and_says_once_which_is_new(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aliases, "_told", set())
    old = ("strategy=fedlp", "strategy.masks=client", "strategy.encoding=int8", "strategy.train_sent=false")
    code, _, errors = call("-m", *old, "dry_run=true", "seed=0,1", "hydra.sweep.dir=sweep")
    assert code == 0
    assert errors.splitlines() == [
        "fedlp: strategy=fedlp is now strategy=fedlp_plan; the old name works for now",
        "fedlp: strategy.masks is now strategy.unit_selection; the old name works for now",
        "fedlp: strategy.encoding is now upload; the old name works for now",
    ]
    config = json.loads((tmp_path / "sweep" / "1" / "manifest.json").read_text())["config"]
    assert (config["strategy"]["name"], config["upload"]["name"]) == ("fedlp_plan", "int8")
    assert config["strategy"]["unit_selection"] == "client"


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(call: Call) -> None:
    assert_refused(call("device=cuda"), "device=cuda: this machine has 0 CUDA devices")


# ---- folders
def test_a_folder_that_cannot_be_written(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(call("hydra.run.dir=file/run"), "file/run")
    assert_refused(call("hydra.run.dir=/proc/run"), "/proc/run")


def test_a_folder_with_a_run_is_not_overwritten(call: Call, once: Once, tmp_path: Path) -> None:
    done = once(*TINY)
    before = {path: path.read_bytes() for path in done.path.rglob("*") if path.is_file()}
    assert_refused(call(*TINY, f"hydra.run.dir={done.path}"), "holds a run already; continue it with resume=")
    assert_refused(call(*TINY, f"hydra.run.dir={done.path}", "dry_run=true"), "holds a run already")
    assert {path: path.read_bytes() for path in done.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("resume=/nonexistent", "not a run directory"),
        ("resume=.", "not a run directory"),
        ("resume={run} seed=3", "drop seed"),
        ("resume={run} strategy=fedavg", "drop strategy"),
        ("resume={run} hydra.run.dir=elsewhere", "drop hydra.run.dir"),
        ("resume={run} dry_run=true", "drop dry_run"),
        ("resume={run} num_rounds=1", "has done 2"),
        ("resume={run} num_rounds=0", "at least 1"),
        ("resume={run} simulation.workrs=1", "did you mean simulation.workers"),
        ("-m resume={run},/nonexistent", r"job 1 \(resume=/nonexistent\): .*not a run directory"),
    ],
)
def test_a_resume_that_cannot_be(arguments: str, words: str, call: Call, once: Once, tmp_path: Path) -> None:
    shutil.copytree(once(*TINY).path, tmp_path / "run")
    assert_refused(call(*arguments.format(run=tmp_path / "run").split()), words)
    assert read(tmp_path / "run").untimed == once(*TINY).untimed


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "checkpoint/round-*.safetensors",
            b"garbage",
            "round-000002.safetensors is damaged .*, and no older checkpoint serves",
        ),
        ("checkpoint/round-*.json", b"{", "round-000002 cannot be read .*, and no older checkpoint serves"),
        ("rounds.jsonl", b"nonsense\n", "rounds.jsonl does not hold rounds 1 to 2 of the checkpoint"),
        ("rounds.jsonl", b"", "does not hold rounds 1 to 2 of the checkpoint, and no older checkpoint serves"),
        ("rounds.jsonl", b"[1]\n", "rounds.jsonl does not hold rounds 1 to 2"),
        ("rounds.jsonl", b'{"server_round": 1}\n', "rounds.jsonl does not hold rounds 1 to 2"),
        ("config.yaml", b"num_rounds: [", "config cannot be read"),
        ("config.yaml", b"- 1\n- 2\n", "config cannot be read"),
        ("config.yaml", b"num_rounds: -3\n", "config.* cannot be read|mandatory|num_rounds=-3"),
        ("config.yaml", b"\xff\xfe\x00", "config cannot be read"),
    ],
)
def test_a_run_whose_files_are_damaged(
    file: str, content: bytes, words: str, call: Call, once: Once, tmp_path: Path
) -> None:
    shutil.copytree(once(*TINY).path, tmp_path / "run")
    damaged = list((tmp_path / "run").glob(file))
    assert damaged
    for path in damaged:
        path.write_bytes(content)
    assert_refused(call("resume=run", "num_rounds=3"), words)


def test_the_command_that_goes_on(call: Call, once: Once, tmp_path: Path) -> None:
    shutil.copytree(once(*TINY).path, tmp_path / "run")
    code, out, errors = call("resume=run", "num_rounds=3", "simulation.workers=1")
    assert code == 0, errors
    assert "accuracy" in out
    resumed, whole = read(tmp_path / "run"), once(*TINY, "num_rounds=3")
    assert resumed.model == whole.model
    assert resumed.untimed == whole.untimed
    assert resumed.config.num_rounds == 3
    assert resumed.config.simulation.workers == 1
    assert resumed.config.resume is None


# ---- what a run says and writes
def test_a_run_prints_its_rounds_and_its_result(call: Call, tmp_path: Path) -> None:
    code, out, errors = call(*TINY, "hydra.run.dir=run", "label=mine")
    assert code == 0
    first, second, last = out.splitlines()
    assert re.fullmatch(r"loading digits and fedlp_mlp  -> \S+run", first)
    assert second == "mine: 2 rounds with 4 of 6 clients"
    assert re.fullmatch(r"accuracy \S+  loss \S+  train_loss \S+  up \S+ MB  down \S+ MB  -> \S+run", last)
    assert [line[:15] for line in errors.splitlines()] == ["mine: round 1/2", "mine: round 2/2"]
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.yaml", "rounds.jsonl", "manifest.json", "model.safetensors", "checkpoint"}


def test_files_of_the_user_are_found_from_any_folder(call: Call, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    text = ("dataset=text", "dataset.root=words.txt", "dataset.sequence_length=16", "model=llama_tiny")
    code, _, errors = call(*text, "num_rounds=1", "num_clients=2", "clients_per_round=2", "hydra.run.dir=run")
    assert code == 0, errors
    dataset = read(tmp_path / "run").config.dataset
    assert (dataset.root, dataset.tokenizer) == (str(tmp_path / "words.txt"), "bytes")


def test_a_dry_run_writes_its_manifest_alone(call: Call, tmp_path: Path) -> None:
    code, out, errors = call("dry_run=true", "hydra.run.dir=run")
    assert (code, errors) == (0, "")
    assert "parameters per client and round: " in out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["manifest.json"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["expected"]["params_up_per_client"] == manifest["expected"]["params_down_per_client"] / 2


def test_runs_of_the_same_second_do_not_share_a_folder(call: Call, tmp_path: Path) -> None:
    for _ in range(2):
        assert call(*TINY, "num_rounds=1")[0] == 0
    assert len(list((tmp_path / "runs").glob("*/*/model.safetensors"))) == 2


# ---- sweeps
def test_a_sweep_gives_each_job_its_folder(call: Call, tmp_path: Path) -> None:
    code, _, errors = call("-m", *TINY, "seed=0,1", "hydra.sweep.dir=sweep")
    assert code == 0, errors
    assert [read(tmp_path / "sweep" / job).config.seed for job in ("0", "1")] == [0, 1]


def test_every_job_of_a_sweep_names_its_failed_clients(call: Call) -> None:
    code, _, errors = call(
        "-m", *TINY, "strategy=fedavg", "num_rounds=1", "local.lr=1e30", "seed=0,1", "hydra.sweep.dir=sweep"
    )
    assert code == 2
    assert errors.count("failed (rejected): ") == 8
    assert errors.count("nothing was trained: no round of 1 had a good update") == 2


def test_a_job_that_fails_does_not_stop_its_sweep(call: Call, tmp_path: Path) -> None:
    code, _, errors = call("-m", *TINY, "seed=0,-1,2", "hydra.sweep.dir=sweep")
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("fedlp: ")]
    assert re.fullmatch(r"fedlp: job 1 \(.*seed=-1\): seed=-1 is not allowed: it must be at least 0", line)
    assert [read(tmp_path / "sweep" / job).config.seed for job in ("0", "2")] == [0, 2]


def test_a_misspelt_value_in_a_sweep_stops_it_before_it_starts(call: Call, tmp_path: Path) -> None:
    assert_refused(call("-m", *TINY, "seed=0,one", "hydra.sweep.dir=sweep"), "seed=one")
    assert not (tmp_path / "sweep" / "0").exists()


# ---- reports
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "RUN_DIR"),
        ("/nonexistent", "/nonexistent"),
        ("empty", "empty"),
        ("file", "file"),
        ("--nonsense run", "unrecognized arguments: --nonsense"),
        ("run --out file/report", "file/report"),
        ("damaged", "manifest.json"),
        ("torn.runs.jsonl.xz", "torn.runs.jsonl.xz is damaged"),
    ],
)
def test_a_report_on_nonsense(arguments: str, words: str, call: Call, once: Once, tmp_path: Path) -> None:
    shutil.copytree(once(*TINY).path, tmp_path / "run")
    shutil.copytree(once(*TINY).path, tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "torn.runs.jsonl.xz").write_text("")
    assert_refused(call(*arguments.split(), main=cli.report_main), words)


def test_a_report(call: Call, once: Once, tmp_path: Path) -> None:
    shutil.copytree(once(*TINY).path, tmp_path / "run")
    code, out, errors = call("run", main=cli.report_main)
    assert (code, errors) == (0, "")
    assert "accuracy" in out
    assert any(path.suffix == ".html" for path in (tmp_path / "run" / "report").iterdir())
    pack_runs(tmp_path / "run", tmp_path / "one.runs.jsonl.xz")
    code, packed, errors = call("one.runs.jsonl.xz", main=cli.report_main)
    assert (code, errors) == (0, "")
    assert packed.split("report: ")[0] == out.split("report: ")[0]
    assert (tmp_path / "report-one" / "report.html").is_file()


# ---- real processes
def test_the_installed_commands(tmp_path: Path) -> None:
    for name in ("fedlp", "fedlp-report"):
        shown = execute(name, "--help", cwd=tmp_path)
        assert shown.returncode == 0
        assert "fedlp" in shown.stdout
        assert shown.stderr == ""
    refused = execute("fedlp", "strategy.layer_preserving_rate=1.5", cwd=tmp_path)
    assert_refused((refused.returncode, refused.stdout, refused.stderr), r"\[0, 1\]")
    refused = execute("fedlp-report", "/nonexistent", cwd=tmp_path)
    assert_refused((refused.returncode, refused.stdout, refused.stderr), "/nonexistent")


def test_a_defect_of_our_own_keeps_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(assembly, "run", broken)
    with pytest.raises(ValueError, match="a defect"):
        call("num_rounds=1")
