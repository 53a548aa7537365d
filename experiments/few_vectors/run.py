"""Pruning with few calibration vectors: the default against SlimGPT, Wanda and fixed dampings at equal widths.

    python experiments/few_vectors/run.py --data FOLDER [--cifar ROOT] [--models ...] [--vectors 2 8] [--seeds 0 1 2]
    python experiments/few_vectors/run.py --collect        # only the table from what is there

FOLDER holds ``models/`` and ``text/``, ROOT what torchvision's CIFAR10 reads. One line per pruned model is appended to
``results/runs.jsonl``; what is there already is not run again. Seeds draw the calibration data; test data stay.

Calibration has so many vectors per input of the widest reader (tokens per neuron of an FFN; image positions per column
of the last convolutions): windows of 128 tokens of one text, or training images. Language models are tested on the
text's other half and on texts that calibration has not seen. Widths are those of the rule ``uniform`` or ``dp``, the
latter measured on the same calibration data with the default method, equal for all methods but for the biases that a
method adds. A ratio is the fraction removed of the parameters that belong to prunable units.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.apps.model_allocator import Allocator
from fedlp.models.language import import_transformers
from fedlp.pruning.costs.footprint import Footprint
from fedlp.pruning.pruner import Calibration, Method, Pruner
from fedlp.pruning.scores.flap import Flap
from fedlp.pruning.scores.magnitude import Magnitude
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.slimgpt import SlimGPT
from fedlp.pruning.scores.wanda import Wanda
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import WidthSpec, trace_widths
from fedlp.rng import Stream, generator
from fedlp.training.threads import one_thread
from fedlp.types import PrunableLayer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.bench.timing import note_machine  # noqa: E402
from experiments.few_vectors.tables import regenerate  # noqa: E402
from experiments.slimgpt_table.run import RESNETS, load_classifier, log_probabilities  # noqa: E402

WINDOW = 128
UNSEEN = 0.95  # lm-3.3m was trained on what comes before, as a fraction of a text


@dataclass(frozen=True)
class Source:
    """Where a language model's data come from.

    Attributes
    ----------
    calibration : str
        Text whose first half calibrates.
    held_out : str
        Text whose second half tests the same kind of text.
    others : mapping from text to float
        Texts of another kind, and the first character as a fraction.
    inputs : int
        Inputs of the widest reader.
    windows : int
        Test windows of each text.
    """

    calibration: str
    held_out: str
    others: Mapping[str, float]
    inputs: int
    windows: int = 64


SOURCES = {
    "stories260K": Source("tinystories", "tinystories", {"wikitext2-valid": 0.0, "tinyshakespeare": 0.0}, 172),
    "lm-3.3m": Source("wikitext2-test", "wikitext2-test", {"tinystories": UNSEEN, "tinyshakespeare": UNSEEN}, 512),
    "smollm2-135m": Source("wikitext2-valid", "wikitext2-test", {"tinyshakespeare": 0.0}, 1536, 24),
}
COLUMNS, POSITIONS = 576, 64  # of a ResNet's last convolutions

OURS = {"correction": 1.0, "fisher": True, "keeps_batch_norm": True}
METHODS = {
    "default": Method(OBS(), **OURS),
    "damping 1e-6, the old default": Method(OBS(), **OURS, damping=1e-6),
    "damping 0.01": Method(OBS(), **OURS, damping=0.01),
    "SlimGPT": Method(SlimGPT(), centred=False, damping=0.01),
    "Wanda": Method(Wanda(), recovery="none"),
    "Wanda, refitted": Method(Wanda(), keeps_batch_norm=True),
    "FLAP": Method(Flap(), recovery="bias"),
    "magnitude": Method(Magnitude(), recovery="none"),
}
RULES, RATIOS = ("dp", "uniform"), (0.2, 0.33)  # by default; any of ALL_RULES
ALL_RULES = (*RULES, "log_depth", "owl", "dsa")


@dataclass(frozen=True, eq=False)
class Case:
    """One model with its data for one seed and one number of vectors."""

    model: nn.Module
    spec: WidthSpec
    layers: tuple[PrunableLayer, ...]
    data: Calibration
    tests: Mapping[str, tuple[Tensor, Tensor]]  # inputs, flat labels

    @cached_property
    def allocator(self) -> Allocator:
        """Measures with the default method what ``dp`` asks for."""
        measuring = Method(OBS(), fisher=True, keeps_batch_norm=True)
        return Allocator(
            Pruner(self.model, self.spec, self.layers, self.data, measuring), Footprint(self.model, self.spec).count
        )


def language_case(name: str, data: Path, vectors: float, seed: int) -> Case:
    """Return a language model, ``vectors`` calibration tokens per input of its FFN, and test windows by text."""
    transformers, source = import_transformers(), SOURCES[name]
    folder = data / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def windows(text: str, start: float = 0.0) -> Tensor:
        content = (data / "text" / f"{text}.txt").read_text(encoding="utf-8")
        tokens = np.array(tokenizer(content[int(start * len(content)) :], verbose=False)["input_ids"])
        return torch.from_numpy(tokens[: len(tokens) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1))

    seen, held_out = windows(source.calibration), windows(source.held_out)
    order = generator(seed, Stream.CALIBRATION).permutation(len(seen) // 2)
    drawn = seen[order[: max(1, int(vectors * source.inputs) // WINDOW)]]
    tests = {"held out": held_out[len(held_out) // 2 :][: source.windows]}
    tests |= {text: windows(text, start)[: source.windows] for text, start in source.others.items()}
    batches = [batch[:, :-1] for batch in drawn.split(16)]
    labels = [batch[:, 1:].flatten() for batch in drawn.split(16)]
    spec = trace_widths(model, batches[0])
    split = {text: (test[:, :-1], test[:, 1:].flatten()) for text, test in tests.items()}
    return Case(model, spec, find_layers(model, spec), Calibration(batches, labels, seed), split)


def classifier_case(name: str, data: Path, cifar: Path, vectors: float, seed: int) -> Case:
    """Return a CIFAR-10 ResNet with training images to calibrate on and test images."""
    images = max(1, round(vectors * COLUMNS / POSITIONS))
    subject, drawn, test = load_classifier(name, data, cifar, images, seed)
    return Case(subject.model, subject.widths, subject.layers, drawn, {"held out": test})


def prune_all(case: Case, wanted: Sequence[tuple[str, str, float]]) -> Iterator[dict[str, Any]]:
    """Yield one result per method, rule and ratio."""
    for method, rule, ratio in wanted:
        model, started = case.model, time.monotonic()
        if method != "dense":
            pruner = Pruner(case.model, case.spec, case.layers, case.data, METHODS[method])
            limit = case.allocator.limit(ratio) - pruner.num_added_params()
            kept = case.allocator.by_rule(rule, limit)
            started = time.monotonic()
            model = pruner.prune(kept).model
        seconds = round(time.monotonic() - started, 1)
        params = sum(parameter.numel() for parameter in model.parameters())
        result = {"method": method, "rule": rule, "ratio": ratio, "params": params, "seconds": seconds}
        yield result | {"losses": evaluate(model, case)}


def evaluate(model: nn.Module, case: Case) -> dict[str, float]:
    """Return the mean loss by text; of a classifier also the accuracy."""
    found = {}
    for text, (inputs, labels) in case.tests.items():
        predicted = log_probabilities(model, inputs)
        found[text] = round(float(F.nll_loss(predicted, labels)), 5)
        if inputs.is_floating_point():
            found["accuracy"] = float((predicted.argmax(dim=-1) == labels).double().mean())
    return found


def wanted_results(arguments: argparse.Namespace) -> list[tuple[str, str, float]]:
    """Return every method, rule and ratio, the most telling first."""
    found = [("dense", "none", 0.0)]
    for ratio in arguments.ratios:
        found += [(method, rule, ratio) for rule in arguments.rules for method in arguments.methods]
    return found


def run_model(name: str, vectors: float, seed: int, arguments: argparse.Namespace) -> None:
    """Prune one model in every way that is wanted and not there yet."""
    file = HERE / "results" / "runs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(x["seed"], x["vectors"], x["method"], x["rule"], x["ratio"]) for x in lines if x["model"] == name}
    wanted = [key for key in wanted_results(arguments) if (seed, vectors, *key) not in done]
    if not wanted:
        return
    with one_thread(), file.open("a") as out:
        if name in SOURCES:
            case = language_case(name, arguments.data, vectors, seed)
        else:
            case = classifier_case(name, arguments.data, arguments.cifar, vectors, seed)
        for result in prune_all(case, wanted):
            out.write(json.dumps({"model": name, "seed": seed, "vectors": vectors, **result}) + "\n")
            out.flush()
            print(name, seed, vectors, *result.values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [*SOURCES, *RESNETS]
    parser.add_argument("--data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--cifar", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--models", nargs="+", choices=models, default=["stories260K", "lm-3.3m", "resnet32"])
    parser.add_argument("--vectors", type=float, nargs="+", default=[2, 8, 32, 128], help="per input, widest reader")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rules", nargs="+", choices=ALL_RULES, default=list(RULES))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--collect", action="store_true", help="run nothing, only write the table")
    arguments = parser.parse_args()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    if not arguments.collect:
        logging.getLogger("fedlp").setLevel(logging.ERROR)
        note_machine("few_vectors")
        for name in arguments.models:
            for vectors in arguments.vectors:
                for seed in arguments.seeds:
                    run_model(name, vectors, seed, arguments)
    regenerate(results, results)


if __name__ == "__main__":
    main()
