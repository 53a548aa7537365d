"""The page and the files beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedlp.errors import DataError
from fedlp.report import html, write_report
from tests.unit.report.test_report_simulated import with_clock

WriteRun = Callable[..., Path]
PNG = b"\x89PNG\r\n\x1a\n"


class _Page(HTMLParser):
    """Collects tags and links, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def without_plotly(path: Path) -> str:
    """Return the page without the library that lies in it."""
    text = path.read_text(encoding="utf-8")
    library = html.plotly_script()
    assert text.count(library) <= 1
    return text.replace(library, "")


def figures(path: Path) -> list[dict[str, Any]]:
    """Return the figures that the page holds as data."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', without_plotly(path))
    return json.loads(found[1])  # type: ignore[index, no-any-return]


def _pngs(out: Path) -> set[str]:
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))
    return {path.name for path in out.glob("*.png")}


def test_the_page_needs_nothing_but_itself(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(2):
        write_run(f"runs/a{seed}", seed=seed)
        write_run(f"runs/b{seed}", seed=seed, strategy__name="fedlp_homo", strategy__layer_preserving_rate=0.5)
    out = tmp_path / "out" / "report"
    path = write_report([tmp_path / "runs"], out)
    assert path == out / "report.html"
    page = _Page(path.read_text(encoding="utf-8"))
    assert _pngs(out) == {
        "accuracy_vs_rounds.png",
        "accuracy_vs_uplink.png",
        "accuracy_vs_macs.png",
        "uplink_per_client.png",
        "coverage.png",
    }
    own = without_plotly(path)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|url\(|@import|fetch\(", own)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} <= set(page.ids)
    assert {"FedAvg", "FedLP-Homo(0.5)", "abc1234", "strategy.layer_preserving_rate"} <= set(page.words)
    assert [one["title"] for one in figures(path)] == [
        "Accuracy",
        "Coverage of each layer",
        "What a client held",
        "What a client sent",
        "Cost by part",
    ]
    assert page.tags.count("figure") == page.tags.count("figcaption") == 5
    assert page.tags.count("table") == page.tags.count("caption")
    labels = [group["label"] for group in json.loads((out / "summary.json").read_text())["groups"]]
    assert labels == ["FedAvg", "FedLP-Homo(0.5)"]


def test_equal_runs_give_equal_bytes(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run()
    for out in ("one", "two"):
        write_report([run], tmp_path / out)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_text_from_files_is_escaped(write_run: WriteRun, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"' $x_{ \ud800 _"

    def fail(lines: list[dict[str, Any]]) -> None:
        lines[1]["failures"] = [{"client_id": 1, "reason": evil, "message": evil}] * 201
        for line in lines[1:]:
            line["coverage"] = {evil: 0.5, "_": 1.0}

    values = {"label": evil, "dataset__name": evil, "manifest": {"versions": {evil: evil}, "commit": evil}}
    write_run("runs/0", edit=fail, **values)
    write_run("runs/1", edit=fail, local__lr=0.1, **values)
    path = write_report([tmp_path / "runs"], tmp_path / "out")
    page = _Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 4  # Plotly, the palette, the figures, ours
    assert "<script>alert" not in without_plotly(path)
    assert any("<script>alert(1)</script>" in word for word in page.words)
    assert "and 202 more." in page.words


@pytest.mark.parametrize(
    ("values", "plots"),
    [
        ({"dry_run": True}, set()),
        ({"num_rounds": 0}, set()),
        ({"stop_after": 0}, set()),
        (
            {"metric": "perplexity", "num_rounds": 1},
            {"perplexity_vs_rounds.png", "perplexity_vs_uplink.png", "perplexity_vs_macs.png", "coverage.png"},
        ),
    ],
)
def test_odd_runs_have_a_page_too(write_run: WriteRun, tmp_path: Path, values: dict[str, Any], plots: set[str]) -> None:
    write_report([write_run(**values)], tmp_path / "out")
    assert _pngs(tmp_path / "out") == plots


def test_metrics_that_are_never_finite_leave_no_curve(write_run: WriteRun, tmp_path: Path) -> None:
    def diverge(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["metrics"] = {"accuracy": math.nan, "loss": math.nan}

    write_report([write_run(edit=diverge)], tmp_path / "out")
    assert _pngs(tmp_path / "out") == {"coverage.png"}
    assert "NaN" not in (tmp_path / "out" / "summary.json").read_text()


def test_many_methods_share_one_map_of_coverage(write_run: WriteRun, tmp_path: Path) -> None:
    for index in range(1, 11):
        rate = index / 10
        write_run(f"runs/{index}", strategy__name="fedlp_homo", strategy__layer_preserving_rate=rate, num_rounds=2)
    page = write_report([tmp_path / "runs"], tmp_path / "out").read_text()
    assert "FedLP-Homo(0.1), FedLP-Homo(0.2), FedLP-Homo(0.3) and 7 more on cifar10" in page
    assert "10 runs of 10 configs" in page


def test_a_report_that_cannot_be_written_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write the report to"):
        write_report([write_run()], tmp_path / "file")


def test_the_page_says_when_where_and_from_what(write_run: WriteRun, tmp_path: Path) -> None:
    made = {"date": "2026-11-29T23:06:40+00:00", "commit": "0123456789abcdef", "cpu": "Some CPU", "cores": 4}
    path = write_report([write_run(manifest={"made": made})], tmp_path / "out")
    assert "1 run of 1 config · 2026-11-29 · commit 0123456789ab… · Some CPU, 4 cores" in without_plotly(path)


def test_cells_are_sorted_as_numbers(write_run: WriteRun, tmp_path: Path) -> None:
    text = without_plotly(write_report([write_run()], tmp_path / "out"))
    assert '<td data-value="9">9.0 s</td>' in text
    assert html._value("2.0 min") == ' data-value="120"'
    assert html._value("98.89 ± 0.10") == ' data-value="98.89"'
    assert html._value("~1,234") == ' data-value="1234"'
    assert html._value("–") == ""


def test_failures_are_counted_by_reason(write_run: WriteRun, tmp_path: Path) -> None:
    def fail(lines: list[dict[str, Any]]) -> None:
        lines[1]["failures"] = [{"client_id": client, "reason": "no_reply", "message": "late"} for client in (1, 2)]

    text = without_plotly(write_report([write_run(edit=fail)], tmp_path / "out"))
    assert '<th scope="row">FedAvg</th><td>failed or refused</td><td>no_reply</td><td>2</td>' in text


def test_clipped_and_absent_clients_are_counted(write_run: WriteRun, tmp_path: Path) -> None:
    def edit(lines: list[dict[str, Any]]) -> None:
        lines[1] |= {"clipped": {"1": 0.5, "2": 0.25}, "absent": {"unavailable": [3]}}

    text = without_plotly(write_report([write_run(edit=edit)], tmp_path / "out"))
    assert "<td>clipped</td><td>its norm was beyond the bound</td><td>2</td>" in text
    assert "<td>not sampled</td><td>unavailable</td><td>1</td>" in text


def test_the_worst_tenth_of_clients_has_curves(write_run: WriteRun, tmp_path: Path) -> None:
    def evaluate(lines: list[dict[str, Any]]) -> None:
        for line in lines[1:]:
            line["metrics"] |= {"client_accuracy_worst": 0.01 * line["server_round"]}
            one = {"client_id": 1, "tier": "1.0", "num_examples": 5, "metrics": {"accuracy": 0.5}}
            line["evaluations"] = [one]

    found = figures(write_report([write_run(edit=evaluate)], tmp_path / "out"))
    worst = next(one for one in found if one["title"] == "Accuracy of the worst tenth of clients")
    assert worst["section"] == "Tiers and clients"
    assert worst["curves"][0]["y"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_sections_stand_in_the_order_of_a_readers_questions(write_run: WriteRun, tmp_path: Path) -> None:
    for name, values in {"a": {}, "b": {"local__lr": 0.1}}.items():
        with_clock(write_run(f"runs/{name}", edit=lambda lines: lines[1].update(absent={"no_data": [9]}), **values))
    text = without_plotly(write_report([tmp_path / "runs"], tmp_path / "out"))
    assert re.findall(r"<h2 [^>]*>(.*?)</h2>", text) == [
        "Results",
        "Learning curves",
        "Layers: sparsity and coverage",
        "Budgets",
        "Failures and attacks",
        "Cost of a round",
        "Simulated time",
        "What differs",
        "Run it again",
        "Runs",
        "For papers",
    ]


def test_clients_that_evaluate_are_shown_by_tier(write_run: WriteRun, tmp_path: Path) -> None:
    def evaluate(lines: list[dict[str, Any]]) -> None:
        lines[-1]["evaluations"] = [
            {
                "client_id": client,
                "tier": str(1.0 - client % 2 / 2),
                "num_examples": 5,
                "metrics": {"loss": 1.0, "accuracy": 0.1 * client},
            }
            for client in range(4)
        ]

    found = figures(write_report([write_run(edit=evaluate)], tmp_path / "out"))
    boxes = next(one for one in found if one["title"] == "Accuracy by tier and client")
    assert boxes["series"][0]["x"] == ["tier 1.0", "tier 0.5", "tier 1.0", "tier 0.5"]
    assert boxes["series"][0]["y"] == [0.0, 10.0, 20.0, 30.0]
    assert "median of 15" in boxes["alt"]


def test_budgets_stand_beside_what_was_held(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(fleet={"name": "tiers", "fractions": [1.0, 0.5], "limited": ["params"]})
    held = next(one for one in figures(write_report([run], tmp_path / "out")) if one["title"] == "What a client held")
    assert [limit["label"] for limit in held["limits"]] == ["budget 1", "budget 0.5"]


def test_use_of_budgets_by_tier(write_run: WriteRun, tmp_path: Path) -> None:
    limits = {"1": {"macs": {"limit": 200.0, "used": 150.0}}, "0.5": {"macs": {"limit": 100.0, "used": 99.0}}}
    run = write_run(manifest={"budgets": limits})
    used = next(
        one for one in figures(write_report([run], tmp_path / "out")) if one["title"] == "Budgets and their use"
    )
    assert used["labels"] == ["1", "0.5"]
    assert used["parts"] == [{"label": "used of the limit on operations, %", "values": [75.0, 99.0]}]
    assert "0.5 99" in used["alt"]


@pytest.mark.parametrize(
    "budgets", [[1], {"a": 1}, {"a": {"macs": {"limit": 0, "used": 1}}}, {"a": {"macs": {"limit": 1}}}]
)
def test_damaged_budgets_are_named(write_run: WriteRun, tmp_path: Path, budgets: object) -> None:
    run = write_run(manifest={"budgets": budgets})
    with pytest.raises(DataError, match=r"manifest\.json: budgets"):
        write_report([run], tmp_path / "out")


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), pytest.param("pdf", b"%PDF", marks=pytest.mark.slow)])
def test_plots_for_papers_are_vectors(write_run: WriteRun, tmp_path: Path, kind: str, start: bytes) -> None:
    run = write_run()
    for out in ("one", "two"):
        write_report([run], tmp_path / out, formats=[kind])
    files = sorted((tmp_path / "one").glob(f"*.{kind}"))
    assert len(files) == 4
    assert not list((tmp_path / "one").glob("*.png"))
    for file in files:
        assert file.read_bytes().startswith(start)
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
