"""The report in headless Chromium: errors, requests, overflow, marks, text, contrast, keyboard, light and dark.

Pixels are compared with pixels of the same machine only: fonts differ between machines, and so would any picture that
lay in the repository. What does not depend on fonts, the places of figures and tables, is compared with
``layout.json``; ``FEDLP_LAYOUT=write`` writes it anew.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedlp.report.groups import group_runs
from fedlp.report.page import render
from fedlp.report.runs import find_runs
from tests.browser import looks
from tests.browser.conftest import Open
from tests.unit.report.conftest import run_writer
from tests.unit.report.test_report_simulated import with_clock

pytestmark = [pytest.mark.browser, pytest.mark.slow]
LAYOUT = Path(__file__).parent / "layout.json"
WIDTHS = (400, 1280, 1600)
ENTER, SPACE, TAB = ("Enter", 13, "\r"), (" ", 32, " "), ("Tab", 9)
METHODS: dict[str, dict[str, Any]] = {
    "avg": {},
    "homo": {"strategy__name": "fedlp_homo", "strategy__layer_preserving_rate": 0.5},
    "named": {"label": "a method with a name that is longer than most, and then some", "local__lr": 0.1},
}


def _edit(lines: list[dict[str, Any]]) -> None:
    """Add what clients evaluated, and who failed, was clipped and was absent."""
    for line in lines[1:]:
        line["metrics"]["client_accuracy_worst"] = 0.05 * line["server_round"]
    lines[-1]["evaluations"] = [
        {
            "client_id": client,
            "tier": str(1.0 - client % 2 / 2),
            "num_examples": 5,
            "metrics": {"accuracy": 0.1 * client},
        }
        for client in range(8)
    ]
    failure = {"client_id": 1, "reason": "late", "message": "no answer within two seconds"}
    lines[1] |= {"failures": [failure], "clipped": {"2": 0.5}, "absent": {"unavailable": [3]}}


def _write(folder: Path) -> Path:
    """Write the page alone: the pictures beside it are another test's."""
    page = folder / "report.html"
    page.write_text(render(group_runs(find_runs([folder / "runs"])), ["accuracy_vs_rounds.png"]), encoding="utf-8")
    return page


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report with every kind of section and figure."""
    folder = tmp_path_factory.mktemp("report")
    write = run_writer(folder)
    fleet = {"name": "tiers", "fractions": [1.0, 0.5], "limited": ["params"]}
    for name, values in METHODS.items():
        for seed in range(3):
            with_clock(write(f"runs/{name}{seed}", seed=seed, edit=_edit, fleet=fleet, **values))
    return _write(folder)


@pytest.fixture(scope="session")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report of nine methods, whose long names begin alike."""
    folder = tmp_path_factory.mktemp("crowd")
    write = run_writer(folder)
    for index in range(9):
        label = f"one method with the same words at first, option={index}, another=true"
        write(f"runs/{index}", label=label, local__lr=0.1 * (index + 1))
    return _write(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["report", "crowd"])
def test_nothing_is_wrong_at_a_glance(
    which: str, width: int, scheme: str, open_page: Open, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(which), width=width, scheme=scheme)
    assert page.complaints == []
    assert page.requests == []
    assert page.overflow == 0
    assert page.run(looks.OUTSIDE) == []
    marks = page.run(looks.MARKS)
    assert len(marks) >= 5
    assert [one["title"] for one in marks if not one["marks"]] == []
    assert page.run(looks.TEXT) == []
    assert page.run(looks.CONTRAST) == []


def test_figures_and_tables_lie_where_they_did(report: Path, open_page: Open) -> None:
    found = {str(width): open_page(report, width=width).run(looks.BOXES) for width in WIDTHS}
    if os.environ.get("FEDLP_LAYOUT") == "write":
        LAYOUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    known = json.loads(LAYOUT.read_text(encoding="utf-8"))
    assert {width: list(boxes) for width, boxes in found.items()} == {
        width: list(boxes) for width, boxes in known.items()
    }
    for width, boxes in found.items():
        for name, box in boxes.items():
            assert box == pytest.approx(known[width][name], abs=4), f"{name} at {width} px"


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16)


def _difference(one: bytes, other: bytes) -> float:
    """Return the fraction of pixels that differ by more than a rounding of colours."""
    return float((np.abs(_pixels(one) - _pixels(other)).max(axis=2) > 8).mean())


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_looks_the_same_twice_and_other_in_the_dark(report: Path, width: int, open_page: Open) -> None:
    once, twice, dark = (
        open_page(report, width=width, scheme=scheme).screenshot() for scheme in ("light", "light", "dark")
    )
    assert _difference(once, twice) < 0.001
    assert _difference(once, dark) > 0.9
    assert _pixels(once).mean() > 200
    assert _pixels(dark).mean() < 60


def test_the_button_changes_the_colours(report: Path, open_page: Open) -> None:
    page = open_page(report, scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    mark = "document.querySelector('.scatterlayer path.point').style.fill"
    before = page.run(paper), page.run(mark)
    page.run("document.getElementById('theme').focus()")
    page.press(*ENTER)
    after = page.run(paper), page.run(mark)
    assert before == ("rgb(20, 23, 27)", "rgb(86, 180, 233)")
    assert after == ("rgb(255, 255, 255)", "rgb(0, 114, 178)")
    assert page.run(looks.CONTRAST) == []


def test_columns_are_sorted_by_keyboard(report: Path, open_page: Open) -> None:
    page = open_page(report)
    heads = "[...document.querySelectorAll('table.numbers')[0].tHead.rows[0].cells]"
    column = f"{heads}.findIndex((one) => one.dataset.name.startsWith('MB up'))"
    cell = f"parseFloat(row.cells[{column}].textContent)"
    values = f"[...document.querySelector('table.numbers').tBodies[0].rows].map((row) => {cell})"
    page.run(f"{heads}[{column}].querySelector('button').focus()")
    page.press(*ENTER)
    up = page.run(values)
    page.press(*ENTER)
    down = page.run(values)
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert up != down
    assert page.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "descending"


def test_controls_work_by_keyboard(report: Path, open_page: Open) -> None:
    page = open_page(report)
    first = "document.querySelector('.plot')"
    label = "[...document.querySelectorAll('figure label')].find((one) => one.textContent.includes({}))"
    box = f"{label}.querySelector('input')"
    for text, axis in (("logarithmic x", "xaxis"), ("logarithmic y", "yaxis")):
        kind = f"{first}._fullLayout.{axis}.type"
        page.run(f"{box.format(json.dumps(text))}.focus()")
        assert page.run(kind) == "linear"
        page.press(*SPACE)
        assert page.run(kind) == "log"
        assert page.run(looks.TEXT) == []
        page.press(*SPACE)
        assert page.run(kind) == "linear"
    page.run("document.querySelector('details.curves').open = true")
    lines = f"{first}.querySelectorAll('.scatterlayer .js-line').length"
    before = page.run(lines)
    page.run(f"{box.format(json.dumps('FedAvg'))}.focus()")
    page.press(*SPACE)
    assert page.run(lines) == before - 2  # a curve and its band
    assert page.complaints == []


def test_every_axis_and_part_can_be_chosen(report: Path, open_page: Open) -> None:
    page = open_page(report)
    count = page.run("document.querySelectorAll('figure select').length")
    assert count >= 4
    for index in range(count):
        for option in range(page.run(f"document.querySelectorAll('figure select')[{index}].length")):
            page.run(
                f"{{ const one = document.querySelectorAll('figure select')[{index}]; one.selectedIndex = {option};"
                " one.dispatchEvent(new Event('change')); }"
            )
            assert [one["title"] for one in page.run(looks.MARKS) if not one["marks"]] == []
            assert page.run(looks.TEXT) == []
    assert page.complaints == []


def test_few_curves_have_their_names_beside_them(report: Path, crowd: Path, open_page: Open) -> None:
    names = "[...document.querySelector('.plot').querySelectorAll('.annotation-text')].map((one) => one.textContent)"
    key = "document.querySelector('details.curves').open"
    wide, small, many = open_page(report), open_page(report, width=400), open_page(crowd)
    assert {"FedAvg", "FedLP-Homo(0.5)"} < set(wide.run(names))
    assert len(wide.run(names)) == 3
    assert not wide.run(key)
    assert small.run(names) == many.run(names) == []
    assert small.run(key)
    assert many.run(key)


def test_the_focus_is_seen_wherever_it_goes(report: Path, open_page: Open) -> None:
    page = open_page(report)
    seen = []
    for _ in range(60):
        page.press(*TAB)
        seen.append(page.run(looks.FOCUS))
    assert seen[0]["what"] == "BUTTON switch between light and dark"
    assert {one["what"].split()[0] for one in seen} >= {"BUTTON", "A", "SUMMARY", "SELECT", "INPUT", "DIV"}
    assert [one["what"] for one in seen if not one["seen"]] == []


def test_the_first_column_stays_and_columns_are_chosen(report: Path, open_page: Open) -> None:
    page = open_page(report, width=400)
    place = "document.querySelector('table.numbers tbody th').getBoundingClientRect().left"
    before = page.run(place)
    assert (
        page.run(
            "(() => { const one = document.querySelector('.wide'); one.scrollLeft = 200; return one.scrollLeft; })()"
        )
        == 200
    )
    assert page.run(place) == pytest.approx(before, abs=1)
    shown = "[...document.querySelector('table.numbers').tHead.rows[0].cells].filter((one) => !one.hidden).length"
    columns = page.run(shown)
    page.run("document.querySelector('.columns').closest('details').open = true")
    page.run("[...document.querySelectorAll('.columns input')].find((one) => !one.checked).focus()")
    page.press(*SPACE)
    assert page.run(shown) == columns + 1


def test_readers_of_screens_hear_what_is_seen(report: Path, open_page: Open) -> None:
    page = open_page(report)
    plots = page.run("[...document.querySelectorAll('.plot')].map((one) => [one.getAttribute('role'), one.ariaLabel])")
    assert {role for role, _ in plots} == {"group"}  # an image could hold no buttons
    assert [label for _, label in plots if len(label or "") < 40] == []
    assert page.run("[...document.querySelectorAll('table')].filter((one) => !one.caption).length") == 0
    assert page.run("[...document.querySelectorAll('th')].filter((one) => !one.scope).length") == 0
    assert page.run("[...document.querySelectorAll('input, select')].filter((one) => !one.labels.length).length") == 0
    assert page.run("document.documentElement.lang") == "en"
