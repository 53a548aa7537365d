"""Whole runs on data and tasks of every kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedlp import cli
from fedlp.config import compose
from fedlp.data.datasets import make_reader
from fedlp.models.transformers_loading import import_transformers
from fedlp.training.batches import prepare_inputs
from tests.integration.running import Call, Finished, run

Once = Callable[..., Finished]

SMALL = ("num_clients=4", "clients_per_round=4", "num_rounds=6", "simulation.workers=2", "eval_every=6")
STRATEGIES = {
    "fedavg": ("strategy=fedavg",),
    "fedlp_homo": ("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.7"),
    "heterofl": ("strategy=heterofl", "strategy.widths=[1.0,0.5]"),
    "fedlp_plan": ("strategy=fedlp_plan", "strategy.sparsity=0.3", "fleet=tiers", "fleet.fractions=[1.0,0.6]"),
}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table whose class, value and labels follow from its columns."""
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame({f"x{i}": rng.standard_normal(400) * (i + 1) + i for i in range(4)})
    frame["kind"] = rng.choice(["a", "b"], 400)
    score = frame["x0"] + (frame["x1"] - 1) / 2 + 2 * (frame["kind"] == "a")
    frame["risk"] = np.where(score > 1, "high", "low")
    frame["price"] = 3 * score + 5
    frame["tall"], frame["wide"] = (frame["x0"] > 0).astype(int), (frame["x1"] > 1).astype(int)
    frame["branch"] = rng.choice(["north", "south", "west"], 400)
    path = tmp_path_factory.mktemp("table") / "table.parquet"
    frame.to_parquet(path)
    return path


def of_table(path: Path, target: str, *more: str) -> tuple[str, ...]:
    unused = {"risk", "price", "tall", "wide", "branch"} - {target}
    options = (f"dataset.path={path}", f"dataset.target={target}", f"dataset.exclude=[{','.join(sorted(unused))}]")
    return (*SMALL, "dataset=parquet", *options, "model=fedlp_mlp", "local.lr=0.1", *more)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_table_of_numbers_and_categories(strategy: str, table: Path, once: Once) -> None:
    done = once(*of_table(table, "risk", *STRATEGIES[strategy]))
    assert done.rounds[-1]["metrics"]["accuracy"] > 0.85
    assert done.rounds[-1]["failures"] == []


def test_regression_reports_its_errors(table: Path, once: Once) -> None:
    done = once(*of_table(table, "price", "strategy=fedavg", "local.lr=0.01", "num_rounds=12", "eval_every=12"))
    metrics = done.rounds[-1]["metrics"]
    assert set(metrics) == {"train_loss", "rmse", "mae", "r2", "loss"}
    assert metrics["r2"] > 0.8
    assert metrics["rmse"] ** 2 == pytest.approx(metrics["loss"], rel=1e-5)


def test_several_labels(table: Path, once: Once) -> None:
    options = ("dataset.target=[tall,wide]", "dataset.exclude=[risk,price,branch]", "strategy=fedavg", "local.lr=0.3")
    done = once(*of_table(table, "tall", *options))
    metrics = done.rounds[-1]["metrics"]
    assert metrics["macro_f1"] > 0.8
    assert metrics["accuracy"] > 0.8


def test_each_value_of_a_column_is_a_client(table: Path, once: Once) -> None:
    column = ("dataset.client=branch", "partition=column", "num_clients=3", "clients_per_round=3", "strategy=fedavg")
    done = once(*of_table(table, "risk", *column))
    frame = pandas.read_parquet(table)
    sizes = [client["num_examples"] for client in done.rounds[0]["clients"]]
    assert sum(sizes) == 360
    for size, name in zip(sizes, ("north", "south", "west"), strict=True):
        assert size == pytest.approx(0.9 * (frame["branch"] == name).sum(), rel=0.15)


def test_clients_without_examples_are_left_out_of_every_round(once: Once) -> None:
    few = ("dataset.max_train_examples=5", "partition.min_examples=0", "num_clients=8", "clients_per_round=8")
    done = once(*SMALL, "model=linear", "strategy=fedavg", *few, "num_rounds=2", "eval_every=1")
    for line in done.rounds:
        assert len(line["cohort"]) == 5
        assert line["failures"] == []


# ---- text
@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled text, a tokenizer and a small BERT, as ``datasets`` and transformers write them."""
    folder = tmp_path_factory.mktemp("reviews")
    subjects, endings = ["day", "book", "meal", "road", "song"], [["bad", "dull", "sad"], ["good", "fine", "glad"]]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    texts = [f"the {rng.choice(subjects)} was {rng.choice(endings[label])}" for label in labels]
    datasets.Dataset.from_dict({"text": texts, "label": labels}).save_to_disk(folder / "data")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "was", *subjects, *endings[0], *endings[1]]
    transformers = import_transformers()
    numbers = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizer(numbers).save_pretrained(folder / "bert")
    sizes = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.BertForSequenceClassification(sizes).save_pretrained(folder / "bert")
    return folder


def of_reviews(folder: Path, *more: str) -> tuple[str, ...]:
    data = (
        "dataset=hf",
        f"dataset.path={folder}/data",
        f"dataset.tokenizer={folder}/bert",
        "dataset.sequence_length=8",
    )
    return (*SMALL, "dataset=hf", *data, "model=hf", f"model.path={folder}/bert", "local=adam", "local.lr=0.01", *more)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_labelled_text_trains_an_encoder(strategy: str, reviews: Path, once: Once) -> None:
    done = once(*of_reviews(reviews, *STRATEGIES[strategy]))
    assert done.rounds[-1]["metrics"]["accuracy"] > 0.95


@pytest.mark.slow
def test_an_encoder_is_pruned(reviews: Path, call: Call, tmp_path: Path) -> None:
    given = (f"model.path={reviews}/bert", "dataset=hf", f"dataset.path={reviews}/data", "dataset.sequence_length=8")
    asked = ("sparsity=0.4", "calibration.examples=32", "hydra.run.dir=out")
    code, out, errors = call(*given, *asked, main=cli.prune_main)
    assert code == 0, errors
    assert "accuracy" in out
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_two_texts_have_the_token_types_of_the_tokenizer(reviews: Path, tmp_path: Path, once: Once) -> None:
    rng = np.random.default_rng(0)
    words = rng.choice(["day", "book", "meal", "road", "song"], (300, 2))
    rows = {"one": [f"the {a} was {a}" for a, _ in words], "two": [f"the {b}" for _, b in words]}
    rows["label"] = [int(a == b) for a, b in words]
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "pairs")
    columns = ("dataset.text_column=one", "dataset.text_pair_column=two", "dataset.label_column=label")
    overrides = [*of_reviews(reviews, "strategy=fedavg", *columns), f"dataset.path={tmp_path}/pairs"]
    overrides.append("dataset.sequence_length=12")
    reader = make_reader(compose(overrides).dataset)
    info, data = reader.describe(), reader.load(0)
    encode = import_transformers().BertTokenizer.from_pretrained(reviews / "bert")
    known = {
        tuple(encode(a, b)["input_ids"]): encode(a, b)["token_type_ids"]
        for a, b in zip(rows["one"], rows["two"], strict=True)
    }
    prepared = prepare_inputs(data.test.inputs, info, torch.device("cpu"))
    assert isinstance(prepared, dict)
    for ids, types, mask in zip(
        prepared["input_ids"], prepared["token_type_ids"], prepared["attention_mask"], strict=True
    ):
        length = int(mask.sum())
        assert types[:length].tolist() == known[tuple(ids[:length].tolist())]
        assert 0 < int(types.sum()) < length
        assert not types[length:].any()
    assert run(tmp_path / "run", *overrides, "num_rounds=1", "eval_every=1").rounds[0]["failures"] == []


def test_single_texts_have_no_token_types(reviews: Path) -> None:
    reader = make_reader(compose(of_reviews(reviews)).dataset)
    prepared = prepare_inputs(reader.load(0).test.inputs[:3], reader.describe(), torch.device("cpu"))
    assert isinstance(prepared, dict)
    assert set(prepared) == {"input_ids", "attention_mask"}


# ---- images
def test_a_folder_of_images_of_many_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for number in range(60):
        label, client = number % 2, number // 10
        pixels = rng.normal([60, 180][label], 20, (*rng.integers(12, 40, 2), 3)).clip(0, 255).astype(np.uint8)
        path = tmp_path / "images" / ["dark", "light"][label] / f"c{client}_{number}.{('png', 'jpg')[number % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    data = (f"dataset.path={tmp_path}/images", "dataset.size=8", "dataset.client_pattern='c[0-9]+'")
    more = ("partition=natural", "model=small_cnn", "strategy=fedavg", "local.lr=0.05", "local.epochs=3")
    done = run(tmp_path / "run", *SMALL, "dataset=imagefolder", *data, *more)
    assert done.rounds[-1]["metrics"]["accuracy"] == 1.0


# ---- options
def test_data_and_a_task_of_ones_own_need_one_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "import numpy as np\n"
        "from fedlp.tasks.regression import Regression\n\n"
        "def load(count: int = 60):\n"
        "    x = np.random.default_rng(0).standard_normal((count, 3))\n"
        "    return x, x.sum(axis=1)\n\n"
        "@dataclass(frozen=True)\n"
        "class Absolute(Regression):\n"
        "    scale: float = 1.0\n\n"
        "    def loss(self, outputs, inputs, targets):\n"
        "        return self.scale * (outputs.flatten() - targets).abs().mean()\n"
    )
    own = ("dataset=mine:load", "dataset.count=80", "task=mine:Absolute", "task.scale=0.5", "task.metrics=[mae]")
    code, out, _ = call(*SMALL, *own, "model=linear", "model.name=line", "strategy=fedavg", "hydra.run.dir=out")
    assert code == 0
    line = json.loads((tmp_path / "out/rounds.jsonl").read_text().splitlines()[-1])
    assert set(line["metrics"]) == {"train_loss", "mae", "loss"}
    assert "mae" in out
    code, _, err = call(*own[:2], "task=classification", "model=linear")
    assert (code, err) == (
        2,
        "fedlp: the task needs a class for each example, but the data set load has values\n",
    )


@pytest.mark.slow
def test_options_of_local_training_reach_the_clients(once: Once) -> None:
    base = (*SMALL, "model=linear", "dataset.max_train_examples=80", "strategy=fedavg", "local.batch_size=5")
    base = (*base, "num_rounds=2", "eval_every=1")
    plain = once(*base)
    assert differing(plain.tensors, once(*base, "local.schedule=constant", "local.accumulation=1").tensors) == []
    first_round = {"cosine": True, "{name: step, every: 1}": True, "{name: warmup, rounds: 4}": False}
    for schedule, same in first_round.items():
        done = once(*base, f"local.schedule={schedule}")
        assert (done.rounds[0]["metrics"] == plain.rounds[0]["metrics"]) == same
        assert differing(plain.tensors, done.tensors) != []
    for option in ("local.proximal=1", "local.accumulation=2", "local.precision=bfloat16", "local=adamw"):
        assert differing(plain.tensors, once(*base, option).tensors) != []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("local.optimizer=adan", "local.optimizer=adan is not allowed: it must be one of adam"),
        ("local.precision=float16", "local.precision=float16 is not allowed"),
        ("local.accumulation=0", "local.accumulation=0 is not allowed"),
        ("local.proximal=-1", "local.proximal=-1.0 is not allowed"),
        ("local.schedule=cosin", "there is no schedule cosin; did you mean cosine"),
        ("local.schedule={name: step, gamma: 0}", "gamma=0 of the step schedule must be in (0, 1]"),
        ("task.label_smoothing=0.1", "there is no option task.label_smoothing with task=auto"),
        ("task=classification task.label_smoothing=2", "task.label_smoothing=2.0 is not allowed"),
        ("task=classification task.metrics=[acc]", "there is no metric acc; choose one of accuracy"),
        ("dataset=csv", "dataset=csv needs dataset.path=FILE and dataset.target=COLUMN"),
        ("dataset=imagefolder dataset.path=nowhere", "no folder nowhere"),
        ("partition=column", "partition=column needs a column of clients"),
    ],
)
def test_what_is_wrong_is_one_line(override: str, words: str, call: Call) -> None:
    code, _, err = call(*override.replace("{name: step, gamma: 0}", "{name:step,gamma:0}").split(" "))
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("pruner", ["obs", "taylor"])
@pytest.mark.parametrize("target", ["price", "risk"])
def test_models_of_tables_are_pruned(target: str, pruner: str, table: Path, once: Once, call: Call) -> None:
    rate = "local.lr=0.01" if target == "price" else "local.lr=0.1"
    done = once(*of_table(table, target, "strategy=fedavg", rate, "num_rounds=12", "eval_every=12"))
    options = ("sparsity=0.5", f"pruner={pruner}", "pruner.damping=0.01", "hydra.run.dir=pruned")
    code, _, err = call(f"run={done.path}", *options, main=cli.prune_main)
    assert code == 0, err
    report = json.loads(Path("pruned/prune.json").read_text())
    name = {"price": "r2", "risk": "accuracy"}[target]
    assert report["metrics_before"][name] > 0.8
    assert report["metrics_after"][name] > report["metrics_before"][name] - 0.1
    assert report["params_after"] < 0.6 * report["params_before"]
    newton = (*options[:3], "finetune=newton", "hydra.run.dir=other")
    code, _, err = call(f"run={done.path}", *newton, main=cli.prune_main)
    assert (code == 2) == (target == "price"), err
    assert ("finetune=newton is for classifiers" in err) == (target == "price")


# ---- the page about all this
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
COMMANDS += re.findall(r"`(fedlp task=my_tasks[^`]*)`", PAGE)
OPTIONS = re.findall(r"`'?(local(?:\.\w+)?=[^`']*)'?`", PAGE)


def _choices(option: str) -> list[str]:
    """Return an option with each of the values that the page gives it."""
    name, _, values = option.partition("=")
    return [f"{name}={value}" for value in values.split("\\|")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_runs(
    command: str, reviews: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "photos" / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    loans = pandas.DataFrame({"size": rng.random(60), "branch": list("abc") * 20, "default": [0, 1] * 30})
    loans.to_parquet(tmp_path / "loans.parquet")
    (tmp_path / "mine.py").write_text("import numpy as np\n\ndef load():\n    return np.eye(40), np.arange(40) % 2\n")
    (tmp_path / "my_tasks.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
    line = command.replace("MINILM", f"{reviews}/bert").replace("path=reviews", f"path={reviews}/data")
    line = line.replace("sequence_length=64", "sequence_length=8")
    small = ["num_clients=3", "clients_per_round=2", "num_rounds=1", "simulation.workers=2", "strategy=fedavg"]
    code, out, err = call(*line.split()[1:], *small)
    assert code == 0, err
    assert "train_loss" in out


@pytest.mark.parametrize("option", [choice for option in OPTIONS for choice in _choices(option)])
def test_every_option_of_local_training_on_the_page_runs(option: str, once: Once) -> None:
    small = ("model=linear", "dataset.max_train_examples=40", "num_clients=2", "clients_per_round=2", "num_rounds=1")
    assert once(*small, "strategy=fedavg", option).rounds[0]["failures"] == []
