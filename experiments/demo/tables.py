"""The demo's table and figure, of ``make demo``."""

from __future__ import annotations

from pathlib import Path

from experiments.tables import line, runs_by_method, write_figures

LABELS = {"0": "FedAvg", "1": "FedLP-Homo(0.5)", "2": "FedLP-Hetero(u)", "3": "FedLP-Plan"}  # jobs of the sweep
TEST_IMAGES = 359  # a fifth of scikit-learn's digits
HEAD = ["method", "row", "accuracy, %", "test images wrong", "uplink, MB"]


def regenerate(results: Path, out: Path) -> None:
    """Write ``tables.md`` and the figure from the packed runs in ``results`` to ``out``."""
    runs = runs_by_method(results, "demo")
    rows = []
    for name, label in LABELS.items():
        run, accuracy = runs[name][0], runs[name][0].final_metrics["accuracy"]
        wrong = f"{round((1 - accuracy) * TEST_IMAGES)} of {TEST_IMAGES}"
        rows.append([label, name, f"{100 * accuracy:.1f}", wrong, f"{run.totals['bytes_up'] / 1e6:.1f}"])
    lines = ["# The demo", "", "One seed. Rows are jobs of the sweep.", "", "## digits", ""]
    lines += [line(HEAD), line(["---"] * len(HEAD)), *map(line, rows)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_figures(runs, LABELS, ["accuracy_vs_uplink.png"], out)
