"""Structured one-shot pruning of real models: every method at equal size, on equal calibration data.

    python experiments/slimgpt_table/run.py --data FOLDER --cifar ROOT [--models ...] [--seeds 0 1 2]
    python experiments/slimgpt_table/run.py --collect        # only tables and plots from what is there

FOLDER holds ``models/`` and ``text/``, ROOT what torchvision's CIFAR10 reads. One line per pruned model is appended to
``results/MODEL.jsonl``; what is there already is not run again, so stop and go on as you like. Seeds draw the
calibration data (and what else is random); the test data are always the same.

Language models are calibrated on the first halves of texts that they were not trained on, and tested on the second
halves: 128 windows of 128 tokens. Image classifiers are calibrated on 512 training images and tested on 4,000 others.
A ratio is the fraction removed of the parameters that belong to prunable units; biases that a method adds count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlp.apps import prune as oneshot
from fedlp.apps.model_allocator import Allocator
from fedlp.config import compose_prune
from fedlp.models import forward_logits
from fedlp.models.cost import count_macs
from fedlp.models.language import import_transformers
from fedlp.pruning.costs.footprint import Footprint, macs_footprint
from fedlp.pruning.kernels.newton import newton_steps
from fedlp.pruning.pruner import Calibration, Method, Pruner
from fedlp.pruning.scores.flap import Flap
from fedlp.pruning.scores.magnitude import Magnitude
from fedlp.pruning.scores.obs import OBS
from fedlp.pruning.scores.random import Random
from fedlp.pruning.scores.slimgpt import SlimGPT
from fedlp.pruning.scores.taylor import Taylor
from fedlp.pruning.scores.wanda import Wanda
from fedlp.pruning.tracing.units import find_layers
from fedlp.pruning.tracing.widths import WidthSpec, trace_widths
from fedlp.rng import Stream, generator
from fedlp.training.batches import prepare_inputs
from fedlp.training.threads import one_thread
from fedlp.types import PrunableLayer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.bench.timing import note_machine  # noqa: E402
from experiments.slimgpt_table.peers import PEERS, prune_with_peer  # noqa: E402
from experiments.slimgpt_table.tables import regenerate  # noqa: E402

RATIOS = (0.2, 0.25, 0.33, 0.5)
DEPTH_RATIOS = (0.33, 0.5, 0.7, 0.85)  # with attentions, MLPs and residual blocks as units; and without, beside them
PEER_RATIOS = (0.3, 0.5)  # torch-pruning's criteria
WINDOW, NUM_WINDOWS, NUM_TEST_WINDOWS = 128, 128, 64
NUM_IMAGES, NUM_TEST_IMAGES = 512, 4000
NEWTON_STEPS = 6
SEEN_FRACTION = 0.95  # of the texts that lm-3.3m was trained on
TEXTS = {  # what a model was not trained on: file -> first character as a fraction of it
    "lm-3.3m": {"tinystories": SEEN_FRACTION, "wikitext2-valid": SEEN_FRACTION, "tinyshakespeare": SEEN_FRACTION}
    | {"wikitext2-test": 0.0},
    "stories260K": {"wikitext2-test": 0.0, "tinyshakespeare": SEEN_FRACTION},
}
SEEN = {"stories260K": "tinystories"}  # training text: a test apart, as all else is foreign to this model
RESNETS = {"resnet20": "resnet20-12fca82f", "resnet32": "resnet32-d509ac18"}

DAMPING = 1e-6  # the default when the committed results were made; today's is tried in experiments/few_vectors
OURS = Method(OBS(), correction=1.0, fisher=True, keeps_batch_norm=True, damping=DAMPING)
PAPER = Method(SlimGPT(), centred=False, damping=0.01)
REFIT = "least_squares"
STEPPED = ", then Newton steps"  # towards the calibration labels
METHODS: dict[str, tuple[Method, str]] = {  # name -> kernel, allocator
    "ours": (OURS, "dp"),
    f"ours{STEPPED}": (OURS, "dp"),
    "ours, uniform": (OURS, "uniform"),
    "ours, log depth": (OURS, "log_depth"),
    "ours, plain OBS": (Method(OBS(), keeps_batch_norm=True, damping=DAMPING), "dp"),
    "SlimGPT": (PAPER, "log_depth"),
    "SlimGPT, uniform": (PAPER, "uniform"),
    "SlimGPT, dp": (PAPER, "dp"),
    "FLAP": (Method(Flap(), recovery="bias"), "flap"),
    "FLAP, refitted": (Method(Flap(), damping=DAMPING), "flap"),
    "Wanda-sp": (Method(Wanda(), recovery="none"), "uniform"),
    "Wanda-sp, refitted": (Method(Wanda(), damping=DAMPING), "uniform"),
    f"Wanda-sp, refitted{STEPPED}": (Method(Wanda(), damping=DAMPING), "uniform"),
    "Taylor": (Method(Taylor(), recovery="none"), "uniform"),
    "Taylor, refitted": (Method(Taylor(), damping=DAMPING), "uniform"),
    "magnitude": (Method(Magnitude(), recovery="none"), "uniform"),
    "magnitude, refitted": (Method(Magnitude(), damping=DAMPING), "uniform"),
    "random": (Method(Random(), recovery="none"), "uniform"),
    "random, refitted": (Method(Random(), damping=DAMPING), "uniform"),
}
MACS, DEPTH = ", equal MACs", ", with depth"  # what a ratio is of, where not of parameters; whether branches may go
DEPTH_METHODS = ("ours", f"ours{DEPTH}", f"ours{MACS}", f"ours{MACS}{DEPTH}")

ONLY_LANGUAGE = {  # what classifiers are spared, for time
    *("ours, log depth", "ours, plain OBS", "SlimGPT, dp", "Wanda-sp, refitted", f"Wanda-sp, refitted{STEPPED}"),
    *("Taylor, refitted", "random, refitted"),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One model with its data for one seed."""

    model: nn.Module
    spec: WidthSpec
    layers: tuple[PrunableLayer, ...]
    data: Calibration
    tests: Mapping[str, tuple[Tensor, Tensor]]  # inputs, flat labels
    is_language: bool

    @cached_property
    def with_depth(self) -> Case:
        """The case in which residual branches may lose all their units."""
        spec = trace_widths(self.model, self.data.batches[0], depth=True)
        return replace(self, spec=spec, layers=find_layers(self.model, spec, shared=not self.is_language))

    def footprint(self, what: str) -> Footprint:
        """Return the parameters, or the MACs, of the model."""
        if what == MACS:
            return macs_footprint(self.model, self.spec, self.data.batches[0])
        return Footprint(self.model, self.spec)

    def limit(self, what: str, ratio: float) -> float:
        """Return the parameters or MACs that stay at a ratio, which is of those of prunable units."""
        footprint = self.footprint(what)
        whole = footprint.count({})
        return whole - ratio * (whole - footprint.count({layer.name: 0 for layer in self.layers}))

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """The dense model's log probabilities on each test."""
        return {name: log_probabilities(self.model, inputs) for name, (inputs, _) in self.tests.items()}


def language_case(name: str, data: Path, seed: int) -> Case:
    """Return a language model, calibration windows of all its unseen texts, and test windows by text."""
    transformers = import_transformers()
    folder = data / "models" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    calibration, tests = [], {}
    for index, (text, start) in enumerate(TEXTS[name].items()):
        content = (data / "text" / f"{text}.txt").read_text(encoding="utf-8")
        tokens = np.array(tokenizer(content[int(start * len(content)) :], verbose=False)["input_ids"])
        windows = torch.from_numpy(tokens[: len(tokens) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1))
        half = len(windows) // 2
        order = generator(seed, Stream.CALIBRATION, index).permutation(half)
        calibration.append(windows[:half][order[: NUM_WINDOWS // len(TEXTS[name])]])
        test = windows[half:][:NUM_TEST_WINDOWS]
        tests[text] = test[:, :-1], test[:, 1:].flatten()
    if name in SEEN:
        content = (data / "text" / f"{SEEN[name]}.txt").read_text(encoding="utf-8")
        tokens = np.array(tokenizer(content[: len(content) // 10], verbose=False)["input_ids"])
        windows = torch.from_numpy(tokens[: NUM_TEST_WINDOWS * (WINDOW + 1)].reshape(-1, WINDOW + 1))
        tests[f"{SEEN[name]}, seen"] = windows[:, :-1], windows[:, 1:].flatten()
    drawn = torch.cat(calibration)
    drawn = drawn[torch.from_numpy(generator(seed, Stream.CALIBRATION, 99).permutation(len(drawn)))]
    batches = [batch[:, :-1] for batch in drawn.split(16)]
    labels = [batch[:, 1:].flatten() for batch in drawn.split(16)]
    spec = trace_widths(model, batches[0])
    return Case(model, spec, find_layers(model, spec), Calibration(batches, labels, seed), tests, True)


def load_classifier(
    name: str, data: Path, cifar: Path, num_images: int, seed: int
) -> tuple[oneshot.Subject, Calibration, tuple[Tensor, Tensor]]:
    """Return a CIFAR-10 ResNet, training images to calibrate on, and test images with their classes."""
    config = compose_prune(
        [
            *("model=cifar_resnet", f"model.name={name}", "sparsity=0.5", f"seed={seed}"),
            f"model.path={data}/models/cifar10-resnet/{RESNETS[name]}.safetensors",
            *("dataset=cifar10", f"dataset.root={cifar}", f"calibration.examples={num_images}"),
            *("dataset.mean=[0.485,0.456,0.406]", "dataset.std=[0.229,0.224,0.225]", "calibration.batch_size=64"),
        ]
    )
    subject = oneshot.load_subject(config)
    test = subject.data.test.select(np.arange(NUM_TEST_IMAGES))
    inputs = prepare_inputs(test.inputs, subject.info, torch.device("cpu"))
    return subject, oneshot.draw_calibration(config, subject), (inputs, test.targets)


def classifier_case(name: str, data: Path, cifar: Path, seed: int) -> Case:
    """Return a CIFAR-10 ResNet with training images to calibrate on and test images."""
    subject, calibration, test = load_classifier(name, data, cifar, NUM_IMAGES, seed)
    return Case(subject.model, subject.widths, subject.layers, calibration, {"cifar10": test}, False)


def evaluate(model: nn.Module, case: Case) -> dict[str, float]:
    """Return the mean loss by text, over all unseen texts, and the KL divergence there; or loss and accuracy."""
    found: dict[str, float] = {}
    divergences = []
    for name, (inputs, labels) in case.tests.items():
        predicted = log_probabilities(model, inputs)
        found[name] = float(F.nll_loss(predicted, labels))
        if not name.endswith("seen"):
            divergences.append(float(F.kl_div(predicted, case.dense[name], log_target=True, reduction="batchmean")))
        if not case.is_language:
            found["accuracy"] = float((predicted.argmax(dim=-1) == labels).double().mean())
    found["loss"] = float(np.mean([found[name] for name in case.tests if not name.endswith("seen")]))
    found["divergence"] = float(np.mean(divergences))
    return found


@torch.no_grad()
def log_probabilities(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return (labels, classes)."""
    return torch.cat([forward_logits(model, batch).flatten(0, -2).log_softmax(dim=-1) for batch in inputs.split(50)])


class Allocations:
    """Units kept by each allocator at each ratio; what they measure is measured once."""

    def __init__(self, case: Case, what: str = "") -> None:
        measuring = Method(fisher=True, keeps_batch_norm=True, damping=DAMPING)
        pruner = Pruner(case.model, case.spec, case.layers, case.data, measuring)
        self._allocator = Allocator(pruner, case.footprint(what).count)

    def __call__(self, rule: str, limit: float) -> dict[str, int]:
        """Return the units kept of each layer."""
        return self._allocator.by_rule(rule, limit)


def prune_all(case: Case, wanted: list[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """Yield one result per method and ratio."""
    allocations: dict[str, Allocations] = {}
    for method, ratio in wanted:
        name = method.removesuffix(DEPTH).removesuffix(MACS)
        chosen, what = case.with_depth if method.endswith(DEPTH) else case, MACS if MACS in method else ""
        limit = case.limit(what, ratio)
        if (kind := method.removeprefix(name)) not in allocations:
            allocations[kind] = Allocations(chosen, what)
        allocate = allocations[kind]
        started = time.monotonic()
        if method == "dense":
            model, kept = case.model, {layer.name: layer.num_units for layer in case.layers}
        elif method in PEERS:
            kept = allocate("uniform", limit)
            model = prune_with_peer(method, case.model, kept, case.data)
        else:
            kernel, rule = METHODS[name]
            pruner = Pruner(chosen.model, chosen.spec, chosen.layers, chosen.data, kernel)
            kept = allocate(rule, limit - (0 if what == MACS else pruner.num_added_params()))
            model = pruner.prune(kept).model
            if method.endswith(STEPPED):
                newton_steps(model, [path for layer in case.layers for path in layer.readers], case.data, NEWTON_STEPS)
        seconds = time.monotonic() - started
        params = sum(parameter.numel() for parameter in model.parameters())
        macs = count_macs(model, case.data.batches[0]).forward
        assert method == "dense" or (macs if what == MACS else params) <= limit + 1e-6
        result = {"method": method, "ratio": ratio, "params": params, "seconds": round(seconds, 2), "kept": kept}
        if method in DEPTH_METHODS and ratio in DEPTH_RATIOS:
            result |= {"macs": macs, "forward_ms": forward_ms(model, case.data.batches[0])}
        yield result | {"metrics": evaluate(model, case)}


@torch.no_grad()
def forward_ms(model: nn.Module, inputs: Tensor, passes: int = 20) -> float:
    """Return the milliseconds of the fastest of some forward passes, on one thread."""
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        forward_logits(model, inputs)
        seconds.append(time.perf_counter() - started)
    return round(1e3 * min(seconds), 2)


def wanted_results(model: str) -> list[tuple[str, float]]:
    """Return every method and ratio of one model and seed, the most telling first."""
    methods = [name for name in METHODS if model in TEXTS or name not in ONLY_LANGUAGE]
    wanted = [("dense", 0.0), *((method, ratio) for ratio in RATIOS for method in methods)]
    wanted += [(method, ratio) for ratio in DEPTH_RATIOS for method in DEPTH_METHODS if (method, ratio) not in wanted]
    if model in RESNETS:
        few = ("ours", "ours, uniform", "SlimGPT", "magnitude")
        wanted += [(method, ratio) for ratio in PEER_RATIOS for method in PEERS]
        wanted += [(method, ratio) for ratio in PEER_RATIOS for method in few if ratio not in RATIOS]
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--cifar", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--models", nargs="+", choices=[*TEXTS, *RESNETS], default=[*TEXTS, *RESNETS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--collect", action="store_true", help="run nothing, only write tables and plots")
    arguments = parser.parse_args()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    if not arguments.collect:
        note_machine("slimgpt_table")
    for seed in () if arguments.collect else arguments.seeds:
        for name in arguments.models:
            file = results / f"{name}.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            done = {(line["seed"], line["method"], line["ratio"]) for line in lines}
            wanted = [(method, ratio) for method, ratio in wanted_results(name) if (seed, method, ratio) not in done]
            if not wanted:
                continue
            with one_thread(), file.open("a") as out:
                if name in TEXTS:
                    case = language_case(name, arguments.data, seed)
                else:
                    case = classifier_case(name, arguments.data, arguments.cifar, seed)
                for result in prune_all(case, wanted):
                    out.write(json.dumps({"model": name, "seed": seed, **result}) + "\n")
                    out.flush()
                    score = result["metrics"].get("accuracy", result["metrics"]["loss"])
                    print(f"{name} seed {seed} {result['ratio']:.2f} {result['method']}: {score:.4f}", flush=True)
    regenerate(results, results)


if __name__ == "__main__":
    main()
