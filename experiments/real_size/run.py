"""One-shot pruning at real size: every kernel with every allocator.

    python experiments/real_size/run.py --data FOLDER      # FOLDER holds models/smollm2-135m and text/; resumable
    python experiments/real_size/run.py --collect          # only the table from what is there

One line per pruned model is appended to ``results/smollm2-135m.jsonl``; what is there already is not run again. Data,
tests and methods are those of ``experiments/few_vectors``: 2.7 calibration tokens per input of the widest reader, of
WikiText-2 valid; tests are WikiText-2 test and Shakespeare, which calibration has not seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.bench.timing import describe_machine  # noqa: E402
from experiments.few_vectors.run import language_case, prune_all  # noqa: E402
from experiments.real_size.tables import METHODS, RATIOS, RULES, regenerate  # noqa: E402
from fedlp.training.threads import one_thread  # noqa: E402

MODEL, VECTORS = "smollm2-135m", 2.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--collect", action="store_true", help="run nothing, only write the table")
    arguments = parser.parse_args()
    results = HERE / "results"
    if not arguments.collect:
        logging.getLogger("fedlp").setLevel(logging.ERROR)
        (results / "machine.json").write_text(json.dumps(describe_machine(), indent=1) + "\n")
        run(arguments, results / f"{MODEL}.jsonl")
    regenerate(results, results)


def run(arguments: argparse.Namespace, file: Path) -> None:
    """Prune in every way that is wanted and not there yet."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(x["seed"], x["method"], x["rule"], x["ratio"]) for x in lines}
    wanted = [("dense", "none", 0.0)]
    wanted += [(method, rule, q) for q in arguments.ratios for rule in arguments.rules for method in METHODS]
    left = [key for key in wanted if (arguments.seed, *key) not in done]
    if not left:
        return
    with one_thread(), file.open("a") as out:
        case = language_case(MODEL, arguments.data, VECTORS, arguments.seed)
        for result in prune_all(case, left):
            out.write(json.dumps({"model": MODEL, "seed": arguments.seed, "vectors": VECTORS, **result}) + "\n")
            out.flush()
            print(*result.values(), flush=True)


if __name__ == "__main__":
    main()
