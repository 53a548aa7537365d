"""The numbers of ``docs/sizing.md`` follow from each other, from the committed results and from the fleet's file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
WIDTHS = json.loads((ROOT / "experiments/bench/results/step_time.json").read_text())["results"]["widths"]
DEVICES = yaml.safe_load((ROOT / "conf/fleet/mixed.yaml").read_text())["devices"]
KINDS = {"Raspberry Pi 4, estimate": "raspberry_pi_4", "phone, estimate": "phone"}
TRAINING_MACS = {"`fedlp_cnn`": 116.72e6, "`resnet18`": 1669.41e6}  # as the page has them of a dry run
STEPS, BATCH_SIZE = 16, 32


def rows() -> list[tuple[str, str, list[float]]]:
    found = [[cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.splitlines()]
    tables = [cells for cells in found if len(cells) == 9 and re.fullmatch(r"[\d.]+", cells[2])]
    return [(client, model, [float(cell) for cell in cells]) for client, model, *cells in tables]


def test_the_sums_add_up() -> None:
    assert len(rows()) == 5
    for _, _, (down, up, link, step, transfer, training, total) in rows():
        assert transfer == pytest.approx((down + up) / link, abs=0.051)
        assert training == pytest.approx(STEPS * step, abs=0.051)
        assert total == pytest.approx((down + up) / link + STEPS * step, abs=0.051)


def test_steps_and_links_are_those_of_the_files() -> None:
    measured = {(entry["model"], entry["width"]): entry["step_s"] for entry in WIDTHS}
    for client, case, (_, _, link, step, *_) in rows():
        model = case.split(",")[0].split(" at ")[0]
        kind = DEVICES[KINDS.get(client, "raspberry_pi_4")]
        assert link == kind["uplink_bytes_s"] / 1e6
        if client in KINDS:
            assert f"{TRAINING_MACS[model] / 1e6:,.2f} M" in PAGE
            assert step == pytest.approx(2 * TRAINING_MACS[model] * BATCH_SIZE / kind["flops"], abs=0.001)
        else:
            assert step == pytest.approx(measured[model.strip("`"), 0.5 if "half" in case else 1.0], abs=0.001)


def test_measured_memory_over_the_estimate_is_as_said() -> None:
    ratios = [entry["peak_memory_bytes"] / entry["estimated_memory_bytes"] for entry in WIDTHS]
    assert (len(ratios), round(min(ratios), 1), round(max(ratios), 1)) == (10, 1.1, 1.9)
    assert "1.1 to 1.9 times that estimate in ten cases" in PAGE
