"""The page and the files beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedlp.errors import DataError
from fedlp.report import write_report

WriteRun = Callable[..., Path]
PNG = b"\x89PNG\r\n\x1a\n"


class _Page(HTMLParser):
    """Collects tags and links, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


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
    embedded = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in page.links]
    assert {hashlib.sha256(png).digest() for png in embedded} == {
        hashlib.sha256(png.read_bytes()).digest() for png in out.glob("*.png")
    }
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", path.read_text())
    assert "url(" not in path.read_text()
    assert {"FedAvg", "FedLP-Homo(0.5)", "abc1234", "strategy.layer_preserving_rate"} <= set(page.words)
    assert page.tags.count("figure") == 5
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
    page = _Page(write_report([tmp_path / "runs"], tmp_path / "out").read_text(encoding="utf-8"))
    assert "script" not in page.tags
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
    assert "mean over rounds and seeds" in page
    assert "10 methods, 10 runs" in page


def test_a_report_that_cannot_be_written_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write the report to"):
        write_report([write_run()], tmp_path / "file")
