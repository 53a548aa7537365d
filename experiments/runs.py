"""Federated runs of an experiment: started, resumed or skipped, and what is committed of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FEDLP = Path(sys.executable).with_name("fedlp")


def is_finished(out: Path) -> bool:
    """Return whether a run directory holds a run that has come to its end."""
    manifest = out / "manifest.json"
    return manifest.is_file() and bool(json.loads(manifest.read_text())["final_metrics"])


def run(out: Path, overrides: Sequence[str]) -> int:
    """Start, resume or skip one run; return fedlp's exit code."""
    if is_finished(out):
        return 0
    if any((out / "checkpoint").glob("*.json")):
        return subprocess.run([FEDLP, f"resume={out}"], check=False).returncode
    return subprocess.run([FEDLP, *overrides, f"hydra.run.dir={out}"], check=False).returncode


def collect(out: Path, results: Path, report_on: Sequence[str]) -> None:
    """Copy config, manifest and rounds (without per-client costs) of every finished run; report on some folders."""
    for manifest in sorted(out.rglob("manifest.json")):
        if not is_finished(manifest.parent):
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
    for name in report_on:  # by names within the results, so that no report names a folder of this machine
        if (results / name).is_dir():
            report = [
                FEDLP.with_name("fedlp-report"),
                name,
                "--out",
                f"report-{name}",
            ]
            subprocess.run(report, check=True, cwd=results)
            (results / f"report-{name}" / "report.html").unlink()  # made again from the rest at any time


def _without_root(line: str) -> str:
    """Return a line of a config without the folders of this machine."""
    name, _, value = line.partition(": ")
    if name == "  root":
        return "  root: null"
    return f"{name}: {Path(value).name}" if name in ("  path", "  tokenizer") and "/" in value else line


def _strip_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    dataset, model = manifest["config"]["dataset"], manifest["config"]["model"]
    dataset["root"] = None
    dataset["tokenizer"] = Path(dataset["tokenizer"]).name
    model["path"] = model["path"] and Path(model["path"]).name
    path.write_text(json.dumps(manifest, indent=2) + "\n")
