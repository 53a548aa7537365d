"""FedLP's table on real CIFAR-10: FedAvg, FedLP-Homo and FedLP-Hetero, iid and Dirichlet, one after another.

    python experiments/fedlp_table/run.py --data ROOT            # two hours on two cores; stop and go on as you like
    python experiments/fedlp_table/run.py --data ROOT --collect  # only copy what is finished into results/

Every run is an ordinary run directory under ``--out``. Finished ones are skipped, stopped ones are resumed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FEDLP = Path(sys.executable).with_name("fedlp")

METHODS = {
    "fedavg": ["strategy=fedavg"],
    "homo-0.3": ["strategy=fedlp_homo", "strategy.layer_preserving_rate=0.3"],
    "homo-0.5": ["strategy=fedlp_homo", "strategy.layer_preserving_rate=0.5"],
    "homo-0.7": ["strategy=fedlp_homo", "strategy.layer_preserving_rate=0.7"],
    "hetero-u": ["strategy=fedlp_hetero", "strategy.depths=u"],
}
PARTITIONS = {"iid": ["partition=iid"], "dirichlet": ["partition=dirichlet", "partition.alpha=1.0"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--out", type=Path, default=Path("runs/fedlp_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", action="store_true", help="run nothing, only collect")
    arguments = parser.parse_args()
    if not arguments.collect:
        for seed in arguments.seeds:
            for partition, partition_overrides in PARTITIONS.items():
                for method, overrides in METHODS.items():
                    out = arguments.out / f"{partition}/{method}/seed-{seed}"
                    code = run(out, [*overrides, *partition_overrides, f"seed={seed}"], arguments.data)
                    if code:
                        return code
    collect(arguments.out, HERE / "results")
    return 0


def run(out: Path, overrides: list[str], data: Path) -> int:
    """Start, resume or skip one run; return fedlp's exit code."""
    manifest = out / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text())["final_metrics"]:
        return 0
    if any((out / "checkpoint").glob("*.json")):
        return subprocess.run([FEDLP, f"resume={out}"], check=False).returncode
    command = [FEDLP, "experiment=fedlp_table", f"dataset.root={data}", *overrides, f"hydra.run.dir={out}"]
    return subprocess.run(command, check=False).returncode


def collect(out: Path, results: Path) -> None:
    """Copy config, manifest and rounds (without per-client costs) of every finished run; plot each partition."""
    for manifest in sorted(out.glob("*/*/*/manifest.json")):
        if not json.loads(manifest.read_text())["final_metrics"]:
            continue
        target = results / manifest.parent.relative_to(out)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(manifest, target)
        config = (manifest.parent / "config.yaml").read_text().splitlines()
        (target / "config.yaml").write_text("\n".join(_without_root(line) for line in config) + "\n")
        with (target / "rounds.jsonl").open("w") as file:
            for line in (manifest.parent / "rounds.jsonl").read_text().splitlines():
                file.write(json.dumps(json.loads(line) | {"clients": []}) + "\n")
        _strip_manifest(target / "manifest.json")
    for partition in PARTITIONS:
        if (results / partition).is_dir():
            report = [FEDLP.with_name("fedlp-report"), results / partition, "--out", results / f"report-{partition}"]
            subprocess.run(report, check=True)
            (results / f"report-{partition}" / "report.html").unlink()  # made again from the rest at any time


def _without_root(line: str) -> str:
    return "  root: null" if line.startswith("  root: ") else line


def _strip_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["config"]["dataset"]["root"] = None
    path.write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
