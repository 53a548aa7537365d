"""Federated runs of an experiment: started, resumed or skipped under ``runs/``, and packed for the repository.

python experiments/runs.py unpack experiments/per_byte/results/full-iid.runs.jsonl.xz FOLDER   # run directories again
python experiments/runs.py pack FOLDER FILE.runs.jsonl.xz                                      # the other way round
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlp.report import pack_runs, unpack_runs
from fedlp.report.files import PACKED, RunFiles, is_packed, read_files, run_sources
from fedlp.report.packed import read_packed, write_packed

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


def collect(out: Path, results: Path) -> None:
    """Merge the finished runs of every group folder in ``out`` into ``results/GROUP.runs.jsonl.xz``.

    A run replaces the packed run of its name; all others stay. Per-client costs, data roots and the folders of model
    and tokenizer files are left out.
    """
    for group in sorted(folder for folder in out.glob("*") if folder.is_dir()):
        folders = [path for path in run_sources(group) if not is_packed(path) and is_finished(path)]
        finished = {path.relative_to(group).as_posix(): _stripped(read_files(path)) for path in folders}
        file = results / f"{group.name}{PACKED}"
        if finished:
            write_packed(file, (read_packed(file) if file.is_file() else {}) | finished)


def _stripped(files: RunFiles) -> RunFiles:
    config = None if files.config is None else "\n".join(map(_without_root, files.config.splitlines())) + "\n"
    rounds = tuple((number, entry | {"clients": []}) for number, entry in files.rounds or ())
    return replace(files, config=config, manifest=_stripped_manifest(files.manifest), rounds=rounds)


def _without_root(line: str) -> str:
    """Return a line of a config without the folders of this machine."""
    indent, dash, item = line.partition("- /")
    if dash and not indent.strip():
        return f"{indent}- {Path(item).name}"
    name, _, value = line.partition(": ")
    if name == "  root":
        return "  root: null"
    return f"{name}: {Path(value).name}" if name in ("  path", "  tokenizer") and "/" in value else line


def _stripped_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(manifest["config"])
    dataset, model = config["dataset"], config["model"]
    files = {"files": [Path(file).name for file in dataset["files"]]} if "files" in dataset else {}
    tokenizer = {"tokenizer": Path(dataset["tokenizer"]).name} if "tokenizer" in dataset else {}
    path = {"path": model["path"] and Path(model["path"]).name} if "path" in model else {}
    config["dataset"], config["model"] = dataset | {"root": None} | tokenizer | files, model | path
    return {**manifest, "config": config}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    count = (pack_runs if arguments.action == "pack" else unpack_runs)(arguments.source, arguments.target)
    print(f"{count} runs in {arguments.target}")


if __name__ == "__main__":
    main()
