"""Time to the first round and memory of a run on large data of each reader.

    python experiments/data_readers/run.py --cifar DIR --model DIR --text DIR --work DIR

makes 10,000 JPEG files of 320 x 240 pixels (CIFAR-10's images, enlarged) and a folder of 2,000 of them, a Parquet file
of a million rows and Hugging Face folders of 10,000 labelled images and of 10,000 labelled texts, runs ``fedlp`` twice
on each, with empty caches and with full ones, and writes ``results/data_readers.json``; ``--readers`` chooses some, and
keeps the results of others. Memory is that of all processes of the run together, sampled every 0.2 s: proportional set
size (shared pages counted once), and its anonymous part, which leaves out pages of memory-mapped files. Beside them
stands the largest resident set of one process (VmHWM), pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SPREAD = ("num_clients=200", "clients_per_round=5", "num_rounds=1", "dataset.max_test_examples=500")
READERS = ("imagefolder", "imagefolder_2000", "parquet", "hf_images", "hf_text")
NUM_IMAGES, NUM_ROWS, NUM_TEXTS = 10_000, 1_000_000, 10_000
FEWER_IMAGES = 2_000


def make_images(cifar: Path, folder: Path, count: int = NUM_IMAGES) -> Path:
    """Write JPEG files in a folder for each class; return their folder."""
    from PIL import Image

    from fedlp.models.torchvision_compat import import_torchvision

    found = import_torchvision().datasets.CIFAR10(str(cifar), train=True)
    for number in range(count):
        image, label = found[number]
        path = folder / "photos" / CLASSES[label] / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder / "photos"


def make_table(folder: Path) -> Path:
    """Write a Parquet file of 20 numeric columns, two categorical ones, a client and a target."""
    import pandas

    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((NUM_ROWS, 20), dtype=np.float32)
    score = numbers @ rng.standard_normal(20) + rng.standard_normal(NUM_ROWS)
    table = pandas.DataFrame(numbers, columns=[f"x{i}" for i in range(20)])
    table["region"] = rng.choice(["north", "south", "east", "west"], NUM_ROWS)
    table["kind"] = rng.choice([f"kind {i}" for i in range(12)], NUM_ROWS)
    table["branch"] = rng.integers(0, 100, NUM_ROWS)
    table["default"] = (score > 0).astype(np.int64)
    table.to_parquet(folder / "loans.parquet")
    return folder / "loans.parquet"


def make_labelled_images(cifar: Path, folder: Path) -> Path:
    """Write a Hugging Face data set of images and classes; return its folder."""
    import datasets

    from fedlp.models.torchvision_compat import import_torchvision

    found = import_torchvision().datasets.CIFAR10(str(cifar), train=True)
    rows = [found[number] for number in range(NUM_IMAGES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "pictures"))
    return folder / "pictures"


def make_texts(text: Path, folder: Path) -> Path:
    """Write labelled texts: paragraphs, and the file that each is of; return their folder."""
    import datasets

    rows = []
    for path in sorted(text.glob("*.txt")):
        parts = path.read_text(encoding="utf-8").split("\n")
        rows += [(part, path.stem) for part in parts if len(part) > 80]
    order = np.random.default_rng(0).permutation(len(rows))[:NUM_TEXTS]
    chosen = [rows[i] for i in order]
    table = datasets.Dataset.from_dict({"text": [one for one, _ in chosen], "label": [label for _, label in chosen]})
    table.class_encode_column("label").save_to_disk(str(folder / "texts"))
    return folder / "texts"


def processes(root: int) -> Iterator[int]:
    """Yield a process and all below it."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from processes(int(child))


def memory(root: int) -> tuple[float, float]:
    """Return proportional set size and its anonymous part of a process and all below it, in MB."""
    total = anonymous = 0
    for process in processes(root):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
        total, anonymous = total + sizes["Pss"], anonymous + sizes["Pss_Anon"]
    return total / 1024, anonymous / 1024


def largest(root: int) -> float:
    """Return the largest resident set so far of a process and of each below it, in MB."""
    found = []
    for process in processes(root):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        found += [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return max(found, default=0) / 1024


def measure(overrides: list[str], out: Path, cache: Path) -> dict[str, Any]:
    """Run ``fedlp`` and return the seconds to its first line and its first round, and its peak memory."""
    command = [str(Path(sys.executable).parent / "fedlp"), *overrides, f"hydra.run.dir={out}"]
    env = os.environ | {"XDG_CACHE_HOME": str(cache)}
    began = time.monotonic()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    peaks = [0.0, 0.0, 0.0]

    def sample() -> None:
        while run.poll() is None:
            try:
                peaks[:] = map(max, peaks, (*memory(run.pid), largest(run.pid)))
            except OSError:  # a process ended meanwhile
                continue
            time.sleep(0.2)

    watcher = threading.Thread(target=sample)
    watcher.start()
    assert run.stdout is not None
    run.stdout.readline()
    first_line, rounds, first_round = time.monotonic() - began, out / "rounds.jsonl", 0.0
    while run.poll() is None:
        if not first_round and rounds.is_file() and rounds.stat().st_size:
            first_round = time.monotonic() - began
        time.sleep(0.05)
    watcher.join()
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {run.returncode}")
    metrics = json.loads((out / "manifest.json").read_text())["final_metrics"]
    return {
        "first_line_s": round(first_line, 2),
        "first_round_s": round(first_round or time.monotonic() - began, 1),
        "peak_pss_mb": round(peaks[0]),
        "peak_anonymous_mb": round(peaks[1]),
        "largest_process_mb": round(peaks[2]),
        "load_average": round(os.getloadavg()[0], 1),
        "accuracy": metrics["accuracy"],
    }


def case(reader: str, arguments: argparse.Namespace) -> list[str]:
    """Return the command of a reader, whose data are made first."""
    work, model = arguments.work, arguments.model
    images = ["dataset=imagefolder", "dataset.size=64", "model=small_cnn", "dataset.max_test_examples=200"]
    if reader == "imagefolder":
        return [*images, f"dataset.path={make_images(arguments.cifar, work)}"]
    if reader == "imagefolder_2000":  # as many images a client and in the test set as there are of all
        fewer = make_images(arguments.cifar, work / "fewer", FEWER_IMAGES)
        return [*images, f"dataset.path={fewer}", "num_clients=40"]
    if reader == "parquet":
        columns = ["dataset.target=default", "dataset.client=branch", "partition=natural"]
        return ["dataset=parquet", f"dataset.path={make_table(work)}", *columns, "num_clients=100", "model=fedlp_mlp"]
    if reader == "hf_images":
        path = make_labelled_images(arguments.cifar, work)
        return ["dataset=hf", f"dataset.path={path}", "dataset.size=32", "model=small_cnn"]
    bert = ["dataset.sequence_length=32", "model=hf", f"model.path={model}", "local=adamw", "local.lr=0.0003"]
    return ["dataset=hf", f"dataset.path={make_texts(arguments.text, work)}", *bert]


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("cifar", "folder of torchvision's CIFAR-10"),
        ("model", "folder of a BERT-like encoder"),
        ("text", "folder of text files"),
        ("work", "scratch folder, which must not exist"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=READERS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True)
    path = FOLDER / "results" / "data_readers.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    for name in arguments.readers:
        command = case(name, arguments)
        chosen = [word for word in SPREAD if word.partition("=")[0] not in {w.partition("=")[0] for w in command}]
        shown = " ".join(["fedlp", *command, *chosen])
        results[name] = {"command": shown.replace(f"{arguments.work}/", "").replace(str(arguments.model), "MODEL")}
        for state in ("first", "cached"):
            out = arguments.work / f"{name}-{state}"
            results[name][state] = measure([*command, *chosen], out, arguments.work / "cache")
            print(name, state, results[name][state], flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=FOLDER)
    import torch

    written = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "results": results,
    }
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
