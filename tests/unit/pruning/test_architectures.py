"""The page of architectures says what is cut of each, and what stays whole.

``python -m tests.unit.pruning.test_architectures`` prints the rows of classifiers as they are to be.
"""

from __future__ import annotations

import re

import pytest

from fedlp.config import ModelConfig
from fedlp.models import describe_model
from fedlp.models.modeling_pruned import LAYOUTS
from fedlp.models.torchvision_compat import import_torchvision
from fedlp.pruning.costs.footprint import Footprint
from fedlp.pruning.tracing.widths import trace_widths
from tests.conftest import ROOT

PAGE = (ROOT / "docs/reference/architectures.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| (`.*) \|$", PAGE, re.MULTILINE)
ROWS = [[cell.strip() for cell in line.split("|")] for line in LINES if not line.startswith("`model")]
VISION = {row[0].strip("`"): row for row in ROWS if len(row) == 5}
LANGUAGE = [row for row in ROWS if len(row) == 3]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_architecture_with_rules_is_listed_once() -> None:
    listed = [name for row in LANGUAGE for name in names(row[0])]
    assert sorted(listed) == sorted(LAYOUTS)


def test_every_family_of_torchvisions_is_listed() -> None:
    models = import_torchvision().models
    families = {models.get_model_builder(name).__module__ for name in models.list_models(module=models)}
    assert {models.get_model_builder(name).__module__ for name in VISION} == families


def row_of(name: str, pixels: int) -> list[str]:
    """Return the row of a classifier: its axes, its smallest sub-model and what stays whole."""
    spec = describe_model(ModelConfig(name=name, source="torchvision"), (3, pixels, pixels), 10, "classification")
    model = spec.build(0).eval()
    widths = trace_widths(model, spec.example_inputs(1))
    least = Footprint(model, widths).count(dict.fromkeys(widths.axes, 1)) / spec.num_params
    reasons = "; ".join(dict.fromkeys(widths.whole.values()))
    return [f"`{name}`", str(pixels), str(len(widths.axes)), f"{100 * least:.1f}", reasons]


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_what_is_cut_of_a_classifier(name: str) -> None:
    assert VISION[name] == row_of(name, int(VISION[name][1]))


if __name__ == "__main__":
    for name in VISION:
        print(f"| {' | '.join(row_of(name, int(VISION[name][1])))} |")
