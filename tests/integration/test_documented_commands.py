"""Every command of the README, the guide and the pages beside it runs as it stands there, at a small size."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlp import cli
from fedlp.cli.help import HELP
from fedlp.config import compose_prune
from fedlp.data.examples import Examples, FederatedData
from fedlp.data.torchvision_sets import TorchvisionSet
from fedlp.models import describe_model
from fedlp.report import pack_runs
from tests.integration.own_images import write_images
from tests.integration.running import Call, Finished, execute

ROOT = Path(__file__).resolve().parents[2]
MAINS: dict[str, Callable[[], None]] = {
    "fedlp": cli.main,
    "fedlp-prune": cli.prune_main,
    "fedlp-search": cli.search_main,
    "fedlp-profile": cli.profile_main,
    "fedlp-report": cli.report_main,
    "fedlp-export": cli.export_main,
}
ELSEWHERE = {
    "docs/data.md": "tests/integration/test_tasks.py",
    "docs/deployment.md": "tests/deploy/test_recipe.py",
    "docs/docker.md": "tests/deploy/test_docker_commands.py",
    "docs/index.md": "tests/integration/test_documents.py",
}
"""Pages whose blocks a test of their own runs; commands within their text are run here."""

NOT_OURS = ("make", "pip", "flwr", "python", "sudo")
"""Commands of these are steps of CI (make, pip, flwr run) or of tests of deployment (flwr, sudo, docker)."""

SMALL = {
    "fedlp": (
        *("num_clients=4", "clients_per_round=2", "num_rounds=2", "simulation.workers=2"),
        *("dataset.max_train_examples=80", "dataset.max_test_examples=20", "local.batch_size=8"),
    ),
    "fedlp-prune": ("calibration.examples=32",),
    "fedlp-search": (
        *("search.evaluations=4", "search.population=2", "search.fitness_examples=2", "search.held_out_examples=2"),
        *("search.ratios=[0.3]", "search.workers=1", "calibration.examples=16"),
    ),
    "fedlp-profile": ("repeats=1", "densities=[1.0]"),
}


def lines_of(page: Path) -> Iterator[str]:
    """Yield the commands of a page: lines of its blocks, and commands with options within its text."""
    text = page.read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        found = block.replace("\\\n", " ").splitlines() if kind in ("", "sh") else []
        is_here = page.relative_to(ROOT).as_posix() not in ELSEWHERE
        yield from (line for line in found if line.split(" ")[0] in MAINS and (is_here or " describe " in line))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (found for found in re.findall(r"`(fedlp[\w-]* [^`]+)`", prose) if found.split(" ")[0] in MAINS)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FRAGMENTS = (
    *("fedlp describe", "fedlp-prune federated=true", "fedlp-prune federated=true unit_selection=client"),
    *("fedlp-prune federated=true privacy=secagg", "fedlp-search federated=true"),
    "fedlp-search federated=true privacy=secagg",
)
"""Commands of which the text gives a part."""

LINES = {line.partition("  #")[0].strip() for page in PAGES for line in lines_of(page)}
COMMANDS = sorted(line for line in LINES if line not in FRAGMENTS and not re.search(r"(?<!RUN_DIR) \.\.\.", line))
EXAMPLES = sorted({line for text in HELP.values() for line, _ in text.examples} - {*COMMANDS})


def test_pages_have_commands() -> None:
    assert len(COMMANDS) > 20
    for page, module in ELSEWHERE.items():
        assert Path(page).name in (ROOT / module).read_text(), f"{module} does not read {page}"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: Callable[..., Finished]) -> dict[str, str]:
    """Files of the names that the pages use: a run, a model of transformers, a text, a network of one's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(TorchvisionSet, "load", _random_images)
    done = once(*SMALL["fedlp"], "dataset.max_train_examples=300")
    shutil.copytree(done.path, tmp_path / "RUN_DIR")
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "nets.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self, width: int = 8):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "my_tasks.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    write_images(tmp_path / "SAMPLE", ("cat", "dog"), 2, (8, 8))
    pack_runs(tmp_path / "RUN_DIR", tmp_path / "packed.runs.jsonl.xz")
    return {
        "RUN_DIR": "RUN_DIR",
        "GROUP": "strategy",
        "METRIC": "accuracy",
        "FILE": "packed.runs.jsonl.xz",
    } | dict.fromkeys(("runs/first", "runs/fedavg"), "RUN_DIR")


def _random_images(reader: Any, seed: int) -> FederatedData:
    rng = np.random.default_rng(seed)
    info = reader.describe()

    def draw(count: int) -> Examples:
        pixels = torch.from_numpy(rng.integers(0, 256, (count, *info.input_shape), dtype=np.uint8))
        return Examples(pixels, torch.from_numpy(rng.integers(0, info.num_classes, count)), None)

    return FederatedData(info, draw(80), draw(20))


def _write_language_model(folder: Path) -> str:
    from fedlp.models.transformers_loading import import_transformers

    transformers = import_transformers()
    sizes = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(sizes).save_pretrained(folder / "lm")
    return "lm"


def _write_resnet(folder: Path) -> str:
    from safetensors.torch import save_file

    config = compose_prune(["model=cifar_resnet", "dataset=cifar10", "sparsity=0.5"])
    net = describe_model(config.model, (3, 32, 32), 10, "classification").build(0)
    save_file(net.state_dict(), folder / "net.safetensors")
    return "net.safetensors"


def stated(line: str, names: dict[str, str], folder: Path) -> list[str]:
    """Return the words of a command with real files in place of the names that stand for them."""
    words = []
    for word in shlex.split(line):
        option, _, value = word.partition("=")
        if value == "DIR" and option in ("model.path", "dataset.tokenizer"):
            value = "bytes" if option == "dataset.tokenizer" else _write_language_model(folder)
        elif value == "FILE" and option:
            value = _write_resnet(folder) if option == "model.path" else "words.txt"
        elif option in ("run", "resume"):
            value = names[value]
        words += [] if word == "..." else [f"{option}={value}" if "=" in word else names.get(word, word)]
    return words


def cases() -> Iterator[Any]:
    """Yield the commands; those of other pages than README, many runs and other engines are slow tests."""
    readme = {line.partition("  #")[0].strip() for line in lines_of(ROOT / "README.md")}
    for line in [*COMMANDS, *EXAMPLES]:
        is_slow = line not in readme or re.search(r" -m |=ray|=flower|^fedlp-search|-profile", line)
        yield pytest.param(line, id=line.replace("/", "|"), marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.filterwarnings("ignore")  # of Optuna's own
@pytest.mark.parametrize("line", list(cases()))
def test_a_command_of_the_pages_runs(line: str, workplace: dict[str, str], call: Call, tmp_path: Path) -> None:
    name, *words = stated(line, workplace, tmp_path)
    if "=optuna" in line:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
        words.append("hydra.sweeper.n_trials=2")
    if "privacy=secagg" in words:
        words.append("clients_per_round=3")
    given = {word.partition("=")[0] for word in words}
    if "federated=true" in words:
        words += [word for word in ("num_clients=2", "clients_per_round=2") if word.partition("=")[0] not in given]
        words += ["calibration.batch_size=4"] if name == "fedlp-prune" else ["search.batch_size=4"]
    is_whole = {"options", "describe", "new"} & {*words} or "resume" in given
    small = [] if is_whole else [word for word in SMALL.get(name, ()) if word.partition("=")[0] not in given]
    if name == "fedlp-search" and "federated=true" in words:
        small.remove("search.workers=1")
    if name == "fedlp" and {"simulation=ray", "simulation=flower"} & {*words}:
        done = execute(name, *words, *small, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return
    code, out, errors = call(*words, *small, main=MAINS[name])
    assert code == 0, errors
    assert out
