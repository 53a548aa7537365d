"""One table per benchmark from ``results/*.json``: medians of paired ratios, with quartiles."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.tables import line

Rows = list[list[str]]
PARTS = (
    *("training", "load, gather on clients", "decode on clients", "encode on clients", "Flower's ClientApp"),
    *("transport", "roster, cohort", "assign, encode", "decode, check", "aggregate", "evaluate", "record", "rest"),
)
HEADS = {
    "step_time": ["model", "width", "step / dense step", "quartiles", "peak memory, MB", "k params", "forward MMACs"],
    "scoring": ["model", "scoring / local epoch, time", "quartiles", "scoring / local epoch, MACs"],
    "scoring, choice of units": ["model, units kept", "fine", "coarse", "exactly, by other images", "random"],
    "obs": [
        "inputs",
        "released form / fedlp",
        "fedlp / unavoidable work",
        "greedy / unavoidable work",
        "peak memory, MB",
    ],
    "simulation": ["case", "other", "other / fedlp, time", "quartiles", "fedlp / other, time"],
    "simulation, peak memory": ["model", "cohort", "MB"],
    "cohorts": ["case", "fedlp / bare loop, time", "quartiles", "fedlp / bare loop, processor seconds"],
    "cohorts, training alone": [
        "network, two steps",
        "parameters",
        "clients in a stack",
        "stacked / one by one",
        "quartiles",
    ],
    "cohorts, adapters": ["model", "trained numbers", "clients in a stack", "stacked / one by one", "quartiles"],
    "cohorts, rounds of adapters": ["model", "batched / one by one, time", "quartiles", "processor seconds"],
    "peers": [
        *("workload", "clients a round", "simulator", "a round / fedlp's with one worker", "quartiles"),
        *("round, ms", "start, s", "peak memory, MB"),
    ],
    "encoding": ["freed memory", "other", "other / fedlp, time", "quartiles", "fedlp / other, time"],
    "aggregation": ["case", "clients", "other", "fedlp / other, time", "quartiles"],
    "aggregation, peak memory": ["method", "clients", "MB"],
    "growth": ["round", "parameters", "processor ms a client", "wall ms a client", "start and first round, s"],
    "growth, parts": ["round", *PARTS],
    "growth, aggregation": ["NumPy on as many numbers", "NumPy / average, processor seconds", "quartiles"],
}


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` from the reports in ``results`` to ``out``."""
    lines = ["# Benchmarks", "", "Medians of paired ratios and their quartiles; each file names machine and versions."]
    for title, head in HEADS.items():
        file = results / f"{title.partition(',')[0]}.json"
        report = json.loads(file.read_text())
        rows = ROWS[title](report["results"])
        if not rows:
            continue
        about = report.get("peak_memory_measured", report) if title == "simulation, peak memory" else report
        lines += ["", f"## {title}", "", f"Commit `{about['commit'][:7]}`, {about['machine']['cores']} cores.", ""]
        lines += [line(head), line(["---"] * len(head)), *map(line, rows)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quartiles(ratio: Mapping[str, float], digits: int = 2) -> str:
    return f"{ratio['q1']:.{digits}f} to {ratio['q3']:.{digits}f}"


def _ratio(ratio: Mapping[str, float]) -> list[str]:
    """Return a ratio over fedlp's time, its quartiles, and its inverse."""
    return [f"{ratio['median']:.2f}", _quartiles(ratio), f"{1 / ratio['median']:.2f}"]


def _step_time(results: Mapping[str, Any]) -> Rows:
    return [
        [
            *(one["model"], f"{one['width']:.0%}", f"{one['ratio']['median']:.2f}", _quartiles(one["ratio"])),
            *(f"{one['peak_memory_bytes'] / 1e6:.0f}", f"{one['params'] / 1e3:.1f}", f"{one['macs'] / 1e6:.1f}"),
        ]
        for one in results["widths"]
    ]


def _scoring(results: Mapping[str, Any]) -> Rows:
    return [
        [
            *(one["model"], f"{one['time_ratio']['median']:.2f}", _quartiles(one["time_ratio"])),
            f"{one['macs_ratio']:.2f}",
        ]
        for one in results["rows"]
    ]


def _choices(results: Mapping[str, Any]) -> Rows:
    return [
        [
            f"{one['model']}, {one['kept']:.0%}",
            *(f"{one[how]:.3f}" for how in ("fine", "coarse", "exact, other images", "random")),
        ]
        for one in results.get("choices", ())
    ]


def _obs(results: Mapping[str, Any]) -> Rows:
    return [
        [
            *(str(one["n"]), f"{one['speedup']:.1f}", f"{one['limit_ratio']:.2f}", f"{one['greedy_limit_ratio']:.2f}"),
            f"{one['peak_memory_bytes'] / 1e6:.0f}",
        ]
        for one in results["rows"]
    ]


def _simulation(results: Mapping[str, Any]) -> Rows:
    return [
        [case, other, *_ratio(ratio)]
        for case, found in results.items()
        if case != "peak_memory"
        for other, ratio in found["ratio_over_fedlp"].items()
        if other != "fedlp"
    ]


def _simulation_memory(results: Mapping[str, Any]) -> Rows:
    peaks: Sequence[Mapping[str, Any]] = results["peak_memory"]
    return [[one["model"], f"{one['cohort']} of {one['clients']}", f"{one['bytes'] / 1e6:.0f}"] for one in peaks]


def _cohorts(results: Mapping[str, Any]) -> Rows:
    def row(case: str, found: Mapping[str, Any]) -> list[str]:
        over = found["ratio_over_fedlp"]["bare loop"]
        ratio = {key: 1 / over[other] for key, other in {"median": "median", "q1": "q3", "q3": "q1"}.items()}
        return [case, f"{ratio['median']:.2f}", _quartiles(ratio), f"{found['processor_ratio']:.2f}"]

    return [row(case, found) for case, found in results.items() if "ratio_over_fedlp" in found]


def _cohorts_alone(results: Mapping[str, Any], part: str = "training") -> Rows:
    return [
        [name, str(one["params"]), str(one["clients"]), f"{one['ratio']['median']:.2f}", _quartiles(one["ratio"])]
        for name, one in results.get(part, {}).items()
    ]


def _cohorts_adapters(results: Mapping[str, Any]) -> Rows:
    return _cohorts_alone(results, "adapters")


def _cohorts_adapter_rounds(results: Mapping[str, Any]) -> Rows:
    return [
        [name, f"{one['ratio']['median']:.2f}", _quartiles(one["ratio"]), f"{one['processor_ratio']:.2f}"]
        for name, one in results.get("adapter_rounds", {}).items()
    ]


def _peers(results: Mapping[str, Any]) -> Rows:
    return [
        [
            *(*case.rsplit("_", 1), who, f"{one['ratio']['median']:.2f}", _quartiles(one["ratio"])),
            *(f"{1e3 * one['round']:.0f}", f"{one['start']:.1f}", f"{one['bytes'] / 1e6:.0f}"),
        ]
        for case, found in results.items()
        for who, one in found["table"].items()
    ]


def _encoding(results: Mapping[str, Any]) -> Rows:
    return [
        [case, other, *_ratio(ratio)]
        for key, case in {"as_is": "as the system does", "kept": "kept"}.items()
        for other, ratio in results[key]["ratio_over_fedlp_update"].items()
        if other != "fedlp, update"
    ]


def _aggregation(results: Mapping[str, Any]) -> Rows:
    def rows() -> Iterator[list[str]]:
        for one in results["times"]:
            for other, ratio in one["fedlp_over"].items():
                if other != "fedlp":
                    yield [one["case"], str(one["clients"]), other, f"{ratio['median']:.2f}", _quartiles(ratio)]

    return list(rows())


def _aggregation_memory(results: Mapping[str, Any]) -> Rows:
    return [[one["method"], str(one["clients"]), f"{one['bytes'] / 1e6:.0f}"] for one in results["memory"]]


def _growing(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what the rounds of the growth benchmark are, and their measurements."""
    for what in ("clients", "cohort", "model"):
        for one in results[what]:
            yield f"{one['model']}, {one['cohort']} of {one['clients']} clients", one


def _growth(results: Mapping[str, Any]) -> Rows:
    def each(one: Mapping[str, Any], key: str) -> str:
        return f"{1e3 * statistics.median(one[key]) / one['cohort']:.2f}"

    return [
        [
            *(name, str(one["params"]), each(one, "processor"), each(one, "wall")),
            f"{one['start_and_first_round']:.1f}",
        ]
        for name, one in _growing(results)
    ]


def _growth_parts(results: Mapping[str, Any]) -> Rows:
    rows = []
    for name, one in _growing(results):
        total = sum(one["parts"].values())
        rows.append([name, *(f"{one['parts'].get(part, 0.0) / total:.1%}" for part in PARTS)])
    return rows


def _growth_aggregation(results: Mapping[str, Any]) -> Rows:
    found = results["aggregation"]
    names = {"sum in place": "share_of_bandwidth", "copy": "copy_over_average"}
    names |= {"sum in place, float64": "add_wide_over_average", "the same products and sums": "weigh_over_average"}
    return [[name, f"{found[key]['median']:.2f}", _quartiles(found[key])] for name, key in names.items()]


ROWS = dict(
    zip(
        HEADS,
        (
            *(_step_time, _scoring, _choices, _obs, _simulation, _simulation_memory, _cohorts, _cohorts_alone),
            *(_cohorts_adapters, _cohorts_adapter_rounds, _peers),
            *(_encoding, _aggregation, _aggregation_memory, _growth, _growth_parts, _growth_aggregation),
        ),
        strict=True,
    )
)
