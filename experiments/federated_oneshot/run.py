"""Federated one-shot pruning of real language models, beside pruning in one place, voting, and one client alone.

    python experiments/federated_oneshot/run.py --data FOLDER [--models ...] [--seeds 0]
    python experiments/federated_oneshot/run.py --collect        # only the table from what is there

FOLDER holds ``models/`` and ``text/``. Eight clients prune on 16 windows of 128 tokens each. Split "one text": each has
its own eighth of one text: WikiText-2's test text, which lm-3.3m was not trained on, or for stories260K, which knows
nothing but children's stories, the stories that it was trained on. Split "four texts": two clients per text, each with
its own half of what lm-3.3m was not trained on. About a third of each client's text, its end, is held out as test text.

One line per pruned model is appended to ``results/MODEL.jsonl``; what is there already is not run again, so stop and go
on as you like. A ratio is the fraction removed of the parameters that belong to prunable units.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from fedlp.apps import prune as oneshot
from fedlp.apps import runs as assembly
from fedlp.config import RunConfig, compose, to_yaml
from fedlp.data.datasets import FederatedData
from fedlp.models import state_tensors
from fedlp.pruning.pruner import Calibration, Pruner
from fedlp.pruning.tracing.units import find_layers
from fedlp.training.calibration_data import make_method
from fedlp.training.evaluation import evaluate_sums, metrics_from_sums
from fedlp.training.threads import one_thread

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.bench.timing import note_machine  # noqa: E402
from experiments.federated_oneshot.tables import METHOD_NAMES, regenerate, wanted_results  # noqa: E402

CLIENTS = 8
SEEN_FRACTION = 0.95  # of the texts that lm-3.3m was trained on
FOUR = dict.fromkeys(("tinystories", "wikitext2-valid", "tinyshakespeare"), (SEEN_FRACTION, 1.0, 2))
SPLITS = {  # text -> the part of it that is taken, as fractions, and how many clients share it
    "stories260K": {
        "one text": {"tinystories": (0.0, 0.25, 8)},
        "four texts": {"wikitext2-test": (0.0, 0.1, 2), **FOUR},
    },
    "lm-3.3m": {
        "one text": {"wikitext2-test": (0.0, 1.0, 8)},
        "four texts": {"wikitext2-test": (0.0, 0.1, 2), **FOUR},
    },
}
OBS = ("pruner=obs", "pruner.damping=1e-6")  # the default when the committed results were made
OPTIONS = (("pruner=slimgpt",), (*OBS, "pruner.fisher=false"), OBS)
METHODS = dict(zip(METHOD_NAMES, OPTIONS, strict=True))
OVERRIDES = {
    "pooled, float32": (),
    "pooled, float64": ("sums=float64",),
    "votes": ("unit_selection=client",),
}


@dataclass(frozen=True)
class Case:
    """One model, one split and one seed."""

    model: str
    split: str
    seed: int
    data: Path
    folder: Path  # where texts and runs are written

    @cached_property
    def texts(self) -> Path:
        """The folder of the clients' texts, one file each."""
        folder = self.folder / f"{self.model} {self.split}".replace(" ", "-")
        folder.mkdir(exist_ok=True)
        client = 0
        for text, (start, stop, shares) in SPLITS[self.model][self.split].items():
            content = (self.data / "text" / f"{text}.txt").read_text(encoding="utf-8")
            content = content[int(start * len(content)) : int(stop * len(content))]
            for share in range(shares):
                part = content[share * len(content) // shares : (share + 1) * len(content) // shares]
                (folder / f"{client}.txt").write_text(part, encoding="utf-8")
                client += 1
        return folder

    def overrides(self, method: str, ratio: float) -> tuple[str, ...]:
        """Return the command line of the pooled run."""
        model = self.data / "models" / self.model
        return (
            *("federated=true", f"sparsity={ratio}", f"seed={self.seed}", "simulation.workers=1"),
            *(f"num_clients={CLIENTS}", f"clients_per_round={CLIENTS}", "partition=natural"),
            *("model=hf", f"model.path={model}", "dataset=text", f"dataset.root={self.texts}"),
            *("dataset.documents=file", f"dataset.tokenizer={model}", "dataset.test_fraction=0.33"),
            *("dataset.max_test_examples=256", "calibration.examples=16", "calibration.batch_size=16"),
            *("eval_batch_size=32", *METHODS[method], "allocator=log_depth"),
        )


class Runner:
    """Prunes one case in all ways."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._central: dict[tuple[str, float], tuple[dict[str, Tensor], dict[str, int]]] = {}

    def results(self, wanted: Sequence[tuple[str, str, float]]) -> Iterator[dict[str, Any]]:
        """Yield one result per way, method and ratio."""
        for way, method, ratio in wanted:
            if way in OVERRIDES:
                found = self._federated(way, method, ratio)
            elif way == "dense":
                found = self._evaluate_dense()
            else:
                clients = range(CLIENTS) if way == "central" else [int(way.split()[1])]
                found = self._local(method, ratio, clients)
            yield {"way": way, "method": method, "ratio": ratio, **found}

    def _federated(self, way: str, method: str, ratio: float) -> dict[str, Any]:
        central, kept = self._centrally(method, ratio)
        config = compose([*self.case.overrides(method, ratio), *OVERRIDES[way]])
        with tempfile.TemporaryDirectory(dir=self.case.folder) as out:
            started = time.monotonic()
            assembly.run_locally(to_yaml(config), Path(out))
            seconds = time.monotonic() - started
            report = json.loads((Path(out) / "prune.json").read_text())
            tensors = load_file(Path(out) / "model.safetensors")
        assert {layer["name"]: layer["kept_units"] for layer in report["layers"]} == kept
        found = {
            "metrics": report["metrics_after"],
            "params": report["params_after"],
            "seconds": round(seconds, 2),
            "bytes_up_per_client": report["bytes_up"] / CLIENTS,
            "bytes_down_per_client": report["bytes_down"] / CLIENTS,
            "bytes_of_one_model_upload": report["bytes_of_one_model_upload"],
            "layers": [
                {key: layer[key] for key in ("name", "num_units", "kept_units", "bytes_up") if key in layer}
                for layer in report["layers"]
            ],
        }
        if way != "votes":
            found["max_difference"] = largest_difference(tensors, central)
        return found

    def _centrally(self, method: str, ratio: float) -> tuple[dict[str, Tensor], dict[str, int]]:
        if (method, ratio) not in self._central:
            self._local(method, ratio, range(CLIENTS))
        return self._central[method, ratio]

    def _local(self, method: str, ratio: float, clients: Sequence[int]) -> dict[str, Any]:
        """Prune in one place, on some clients' calibration data."""
        config = compose(self.case.overrides(method, ratio))
        runtime = assembly.make_runtime(to_yaml(config), "")
        batches = [batch for client in clients for batch in runtime.pooling.calibration(client).batches]
        model, spec = self._dense(config), runtime.submodels.widths
        started = time.monotonic()
        with one_thread():
            data = Calibration(batches, [], 0)
            pruner = Pruner(model, spec, find_layers(model, spec), data, make_method(config.pruner))
            subject = oneshot.Subject(
                runtime.submodels.spec, model, runtime.info, self._data(config), spec, tuple(pruner.layers)
            )
            plain = config.central()
            kept = oneshot.allocate(plain, subject, data, pruner)
            pruned = pruner.prune(kept).model
            seconds = time.monotonic() - started
            metrics = oneshot.evaluate(pruned, subject, plain)
        if len(clients) == CLIENTS:
            self._central[method, ratio] = dict(state_tensors(pruned)), kept
        params = sum(parameter.numel() for parameter in pruned.parameters())
        return {"metrics": metrics, "params": params, "seconds": round(seconds, 2)}

    def _evaluate_dense(self) -> dict[str, Any]:
        config = compose(self.case.overrides("SlimGPT", 0.5))
        model = self._dense(config)
        data = self._data(config)
        with one_thread():
            sums = evaluate_sums(model, data.test, data.info, config.eval_batch_size)
        params = sum(parameter.numel() for parameter in model.parameters())
        return {"metrics": metrics_from_sums(sums, data.info.task), "params": params}

    @staticmethod
    def _dense(config: RunConfig) -> nn.Module:
        return assembly.make_plan(to_yaml(config)).submodels.spec.build(config.seed).eval()

    @staticmethod
    def _data(config: RunConfig) -> FederatedData:
        return assembly.make_plan(to_yaml(config)).data


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any weight, as a fraction of the largest weight of its tensor."""
    return max(float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", action="store_true", help="run nothing, only write the table")
    arguments = parser.parse_args()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    if not arguments.collect:
        note_machine("federated_oneshot")
    cases = [(model, seed, split) for model in arguments.models for seed in arguments.seeds for split in SPLITS[model]]
    for model, seed, split in () if arguments.collect else cases:
        file = results / f"{model}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        done = {(*(line[key] for key in ("way", "method", "ratio")), line["seed"], line["split"]) for line in lines}
        wanted = [result for result in wanted_results() if (*result, seed, split) not in done]
        with tempfile.TemporaryDirectory() as folder, file.open("a") as out:
            for result in Runner(Case(model, split, seed, arguments.data, Path(folder))).results(wanted):
                out.write(json.dumps({"model": model, "split": split, "seed": seed, **result}) + "\n")
                out.flush()
                name = f"{result['ratio']:.2f} {result['method']}, {result['way']}"
                print(f"{model}, {split}, seed {seed}: {name}: {result['metrics']['loss']:.4f}", flush=True)
    regenerate(results, results)


if __name__ == "__main__":
    main()
