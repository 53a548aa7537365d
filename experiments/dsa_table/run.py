"""How sparsity is spread: every allocation rule and the searched ones, with one kernel, at equal size.

    python experiments/dsa_table/run.py --data FOLDER --cifar ROOT [--models ...] [--seeds 0 1 2]
    python experiments/dsa_table/run.py --collect        # only tables and plots from what is there

Models, texts, calibration and test data are those of ``experiments/slimgpt_table``; the kernel is exact OBS. For
language models ``fedlp-search`` runs once per seed on the calibration texts, at 150 evaluations of each of its modes;
the best function of each mode is a row, and so is the best vector of sparsities. One line per pruned model is appended
to ``results/MODEL.jsonl``; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.dsa_table.tables import SEARCHES, regenerate  # noqa: E402
from experiments.slimgpt_table.run import (  # noqa: E402
    RESNETS,
    TEXTS,
    Case,
    classifier_case,
    evaluate,
    language_case,
    note_machine,
)
from fedlp.apps.model_allocator import Allocator, rule_names  # noqa: E402
from fedlp.apps.search import run_search  # noqa: E402
from fedlp.config import compose_search  # noqa: E402
from fedlp.pruning.costs.footprint import Footprint  # noqa: E402
from fedlp.pruning.pruner import Method, Pruner  # noqa: E402
from fedlp.pruning.scores.obs import OBS  # noqa: E402
from fedlp.training.threads import one_thread  # noqa: E402

DAMPING = 1e-6  # the default when the committed results were made
KERNEL = Method(
    OBS(), keeps_batch_norm=True, damping=DAMPING
)  # exact OBS alone: half of the time of all that ``pruner=obs`` does
RATIOS = (0.2, 0.35, 0.5)
SEARCHED = ("searched function", "random function", "searched vector")
MODES = dict(zip(SEARCHED, ("evolution", "random", "vector"), strict=True))
CALIBRATION_PART = 0.45  # of a text's characters: safely within the first half of its tokens


def search_once(name: str, data: Path, seed: int, out: Path) -> dict[str, Any]:
    """Return the report of a search on the calibration texts, made now or before."""
    if not (out / "search.json").exists():
        texts = out / "texts"
        texts.mkdir(parents=True, exist_ok=True)
        for text, start in TEXTS[name].items():
            content = (data / "text" / f"{text}.txt").read_text(encoding="utf-8")
            unseen = content[int(start * len(content)) :]
            (texts / f"{text}.txt").write_text(unseen[: int(CALIBRATION_PART * len(unseen))], encoding="utf-8")
        config = compose_search(
            [
                *("model=hf", f"model.path={data}/models/{name}", f"dataset.tokenizer={data}/models/{name}"),
                *("dataset=text", f"dataset.root={texts}", "dataset.documents=file", f"seed={seed}"),
                *("dataset.test_fraction=0.01", "calibration.examples=96", f"pruner.damping={DAMPING}"),
            ]
        )
        run_search(config, out)
    report: dict[str, Any] = json.loads((out / "search.json").read_text())
    return report


def add_search(file: Path, report: dict[str, Any]) -> None:
    """Add a search's report to the file of all, instead of one of the same model and seed."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    others = [line for line in lines if (line["model"], line["seed"]) != (report["model"], report["seed"])]
    found = sorted([*others, report], key=lambda line: (line["model"], line["seed"]))
    file.write_text("".join(json.dumps(line) + "\n" for line in found))


def run_case(case: Case, wanted: list[tuple[str, float]], report: dict[str, Any] | None) -> Any:
    """Yield one result per rule and ratio."""
    measuring = Method(OBS(), fisher=True, keeps_batch_norm=True, damping=DAMPING)
    cost = Footprint(case.model, case.spec).count
    allocator = Allocator(Pruner(case.model, case.spec, case.layers, case.data, measuring), cost)
    for rule, ratio in wanted:
        started = time.monotonic()
        if rule == "dense":
            yield {"method": rule, "ratio": ratio, "seconds": 0.0, "metrics": evaluate(case.model, case)}
            continue
        pruner = Pruner(case.model, case.spec, case.layers, case.data, KERNEL)
        limit = allocator.limit(ratio) - pruner.num_added_params()
        kept = allocate(allocator, rule, limit, report)
        pruned = pruner.prune(kept).model
        seconds = round(time.monotonic() - started, 2)
        params = sum(parameter.numel() for parameter in pruned.parameters())
        result = {"method": rule, "ratio": ratio, "params": params, "seconds": seconds, "kept": kept}
        yield result | {"metrics": evaluate(pruned, case)}


def allocate(allocator: Allocator, rule: str, limit: float, report: dict[str, Any] | None) -> dict[str, int]:
    """Return the units kept of each layer by a rule, or by what a search found."""
    if rule not in SEARCHED:
        return allocator.by_rule(rule, limit)
    assert report is not None
    found = report["modes"][MODES[rule]]
    if rule == "searched vector":
        return allocator.by_shape(found["sparsity"], 1.0, limit)
    file = HERE / "results" / "function.yaml"
    file.write_text(json.dumps({key: found[key] for key in ("function", "amplitude", "power")}))
    try:
        return allocator.by_file(str(file), limit)
    finally:
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--cifar", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--models", nargs="+", choices=[*TEXTS, *RESNETS], default=[*TEXTS, "resnet20"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "runs", help="where searches are kept")
    parser.add_argument("--collect", action="store_true", help="run nothing, only write tables and plots")
    arguments = parser.parse_args()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    if not arguments.collect:
        note_machine("dsa_table")
    for seed in () if arguments.collect else arguments.seeds:
        for name in arguments.models:
            file = results / f"{name}.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            done = {(line["seed"], line["method"], line["ratio"]) for line in lines}
            rules = [*rule_names(), *(SEARCHED if name in TEXTS else ())]
            wanted = [("dense", 0.0), *((rule, ratio) for ratio in RATIOS for rule in rules)]
            wanted = [(rule, ratio) for rule, ratio in wanted if (seed, rule, ratio) not in done]
            if not wanted:
                continue
            report = None
            if name in TEXTS:
                out = arguments.out / name / f"seed-{seed}"
                report = search_once(name, arguments.data, seed, out)
                add_search(results / SEARCHES, {"model": name, "seed": seed, **report})
            with one_thread(), file.open("a") as sink:
                if name in TEXTS:
                    case = language_case(name, arguments.data, seed)
                else:
                    case = classifier_case(name, arguments.data, arguments.cifar, seed)
                for result in run_case(case, wanted, report):
                    sink.write(json.dumps({"model": name, "seed": seed, **result}) + "\n")
                    sink.flush()
                    score = result["metrics"].get("accuracy", result["metrics"]["loss"])
                    print(f"{name} seed {seed} {result['ratio']:.2f} {result['method']}: {score:.4f}", flush=True)
    regenerate(results, results)


if __name__ == "__main__":
    main()
