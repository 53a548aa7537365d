"""Speed of a federated round: ``python experiments/bench/simulation.py [--quick] [--json FILE]``.

Takes less than ten minutes on two free cores, of which it wants both. ``--engines FILE [REPEATS]`` adds the engines'
whole runs alone to a report, as ``engines``; ``--memory FILE`` measures its peak memory anew, alone.

* Steady rounds of a CNN (CIFAR-10 shapes, 10 clients of 500 images, batches of 50, one epoch of SGD): fedlp's strategy,
  messages and client app on its local engine with two workers, and bare PyTorch in two processes, with fedlp's fast
  step and with the plain one. One round of each in turn.
* Whole runs, five rounds, from the start of Python to its end: fedlp on its local engine, fedlp on Ray (two actors),
  and Flower's FedAvg on its simulation runtime (Ray, two actors) with the plain step. One run of each in turn; and once
  more with 50 images a client.
* Rounds of almost no work (softmax regression, 784 inputs, one step on 10 images a client): fedlp with two workers
  against a bare loop in one process.
* Peak memory of whole runs, all processes together: small cohorts of many clients, and all of them at once.

Nothing is evaluated (fedlp looks at one image after the last round) and nothing is written to disk.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bare import BareLoop, BareRounds
from timing import (
    MemoryPeak,
    alternate,
    clock,
    describe_machine,
    paired_ratio,
    parse_args,
    print_table,
    write_report,
)
from workload import WORKLOADS, run_fedlp

HERE = Path(__file__).resolve().parent
WORKERS = 2
NUM_CLIENTS = 10
Times = dict[str, list[float]]


def steady_rounds(name: str, num_rounds: int) -> Times:
    """Return the seconds of each round of the CNN, fedlp's and the bare ones interleaved."""
    work = WORKLOADS[name]
    bare = {
        "bare, fast step": BareRounds(work, NUM_CLIENTS, WORKERS, fast=True),
        "bare, plain step": BareRounds(work, NUM_CLIENTS, WORKERS, fast=False),
    }
    return interleave(name, NUM_CLIENTS, num_rounds, {other: rounds.run_round for other, rounds in bare.items()})


def tiny_rounds(num_clients: int, num_rounds: int) -> Times:
    """Return the seconds of each round of softmax regression."""
    bare = BareLoop(WORKLOADS["linear"], num_clients)
    return interleave("linear", num_clients, num_rounds, {"bare": bare.run_round})


def interleave(name: str, num_clients: int, num_rounds: int, others: dict[str, Any]) -> Times:
    """Run ``num_rounds`` rounds of fedlp, and one of each other after each; the first and the last do not count."""
    times: Times = {"fedlp": [], **{other: [] for other in others}}

    def observe(seconds: float) -> None:
        times["fedlp"].append(seconds)
        for other, action in others.items():
            times[other].append(clock(action))

    run_fedlp(WORKLOADS[name], num_clients, num_clients, num_rounds + 2, WORKERS, observe)
    return {key: values[1:-1] for key, values in times.items()}


def whole_runs(name: str, num_rounds: int, repeats: int) -> tuple[Times, Times]:
    """Return the seconds of whole runs, and of all their rounds but the first of each."""
    rounds: Times = {"fedlp": [], "fedlp on Ray": [], "flower": []}

    def run(engine: str, *command: object) -> None:
        rounds[engine] += json.loads(run_program(*command).splitlines()[-1])[1:]

    actions = {
        "fedlp": lambda: run("fedlp", "workload.py", name, num_rounds, NUM_CLIENTS, NUM_CLIENTS),
        "fedlp on Ray": lambda: run("fedlp on Ray", "workload.py", name, num_rounds, NUM_CLIENTS, NUM_CLIENTS, "ray"),
        "flower": lambda: run("flower", "plain_flower.py", name, num_rounds, NUM_CLIENTS),
    }
    return alternate(actions, repeats, warmup=0), rounds


def run_program(*command: object) -> str:
    """Run a program of this folder and return what it prints; RuntimeError with its last words if it fails."""
    line = [sys.executable, str(HERE / str(command[0])), *map(str, command[1:])]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed: {done.stderr[-2000:]}")
    return done.stdout


def peak_memory(name: str, num_clients: int, cohort: int) -> int:
    """Return the most bytes that all processes of a run held at once in which each client trained twice on average."""
    num_rounds = 2 * num_clients // cohort
    command = [sys.executable, str(HERE / "workload.py"), name, str(num_rounds), str(num_clients), str(cohort)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process,
        MemoryPeak(process.pid) as memory,
    ):
        _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed: {errors[-2000:]}")
    return memory.bytes


def memory_table(cases: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Measure, print and return the peak memory of runs of (model, clients, cohort)."""
    peaks = [peak_memory(*case) for case in cases]
    named = [f"{name}, {cohort} of {clients} clients a round" for name, clients, cohort in cases]
    print_table("peak memory", ("", "MB"), [(name, peak >> 20) for name, peak in zip(named, peaks, strict=True)])
    keys = ("model", "clients", "cohort", "bytes")
    return [dict(zip(keys, (*case, peak), strict=True)) for case, peak in zip(cases, peaks, strict=True)]


def compare(title: str, times: Times, unit: str = "s") -> dict[str, Any]:
    """Print medians and how many times fedlp's each is, pair by pair; return them with the raw times."""
    scale = {"s": 1, "ms": 1e3}[unit]
    ratios = {name: paired_ratio(values, times["fedlp"]) for name, values in times.items()}
    rows = [
        (name, f"{scale * statistics.median(values):.3g}", *(f"{ratios[name][q]:.2f}" for q in ("median", "q1", "q3")))
        for name, values in times.items()
    ]
    print_table(title, ("", unit, "over fedlp", "q1", "q3"), rows)
    return {"seconds": times, "ratio_over_fedlp": ratios}


def add_engines(path: Path, repeats: int) -> None:
    """Measure whole runs of 50 images a client alone, on every engine, and add them to a report."""
    runs, rounds = whole_runs("cnn_short", 5, repeats)
    found = compare("whole runs of five rounds, 50 images a client", runs)
    later = compare("their rounds but the first", rounds)
    report = json.loads(path.read_text())
    report["results"] |= {"engines": {**found, "measured": describe_machine()}, "engines_rounds": later}
    path.write_text(json.dumps(report, indent=1) + "\n")


MEMORY_CASES = [("linear", 1000, 10), ("linear", 1000, 1000), ("resnet18", 50, 10), ("resnet18", 50, 50)]


def add_memory(path: Path) -> None:
    """Measure peak memory alone, and write it to a report."""
    report = json.loads(path.read_text())
    report["results"]["peak_memory"] = memory_table(MEMORY_CASES)
    report["peak_memory_measured"] = describe_machine()
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["--engines"]:
        add_engines(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 5)
        return
    if sys.argv[1:2] == ["--memory"]:
        add_memory(Path(sys.argv[2]))
        return
    args = parse_args(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    quick, cnn = args.quick, "cnn_short" if args.quick else "cnn"
    results: dict[str, Any] = {}
    # First of all: later, this process and what is forked from it keep freed memory as fedlp's engine has set it.
    results["steady"] = compare("a round of the CNN", steady_rounds(cnn, 8))
    for num_clients, num_rounds in {10: 40, 100: 20, 1000: 10}.items():
        times = tiny_rounds(num_clients, 3 if quick else num_rounds)
        results[f"tiny_{num_clients}"] = compare(
            f"a round of {num_clients} clients with one tiny step each", times, "ms"
        )
    for name in ("cnn_short",) if quick else ("cnn", "cnn_short"):
        runs, rounds = whole_runs(name, 5, 1 if quick else 3)
        images = WORKLOADS[name].examples
        results[f"whole_runs_{name}"] = compare(f"whole runs of five rounds, {images} images a client", runs)
        results[f"whole_runs_{name}_rounds"] = compare("their rounds but the first", rounds)
    results["peak_memory"] = memory_table(MEMORY_CASES[:2] if quick else MEMORY_CASES)
    write_report(args.json, quick, results)


if __name__ == "__main__":
    main()
