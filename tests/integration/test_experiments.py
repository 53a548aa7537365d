"""The committed results: tables, figures and quoted rows come from them, and runners add to them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedlp.report import unpack_runs
from fedlp.report.packed import read_packed
from tests.conftest import ROOT

if not (ROOT / "experiments").is_dir():
    pytest.skip("a source distribution has no experiments", allow_module_level=True)

from experiments import runs
from experiments.quotes import fill_in, read_tables
from experiments.regenerate import EXPERIMENTS, PAGES, regenerate

PAGE = ROOT / "docs" / "results.md"
QUOTING = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern)) if "<!-- rows of " in page.read_text()]
FEDLP_TABLE = ROOT / "experiments/fedlp_table/results"


# ---- from results to tables and figures
@pytest.mark.slow
@pytest.mark.parametrize("name", ["per_byte", *(name for name in EXPERIMENTS if name != "per_byte")])
def test_tables_and_figures_are_those_of_the_results(name: str, tmp_path: Path) -> None:
    regenerate([name], tmp_path)
    results = Path("experiments", name, "results")
    made = {path.relative_to(tmp_path) for path in (tmp_path / results).rglob("*") if path.is_file()}
    assert {path.relative_to(ROOT) for path in (ROOT / results).rglob("*.md")} == {
        one for one in made if one.suffix == ".md"
    }
    for path in made:
        content, committed = (tmp_path / path).read_bytes(), (ROOT / path).read_bytes()
        if path.suffix == ".md":
            assert content == committed
        else:
            assert content.startswith(b"\x89PNG")
            assert committed.startswith(b"\x89PNG")


def test_estimates_of_memory_are_within_15_percent_of_peaks() -> None:
    found = json.loads((ROOT / "experiments/memory/results/memory.json").read_text())
    assert all(abs(x["estimate"] / x["measured"] - 1) <= 0.15 for x in found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts a process's peak memory")
def test_a_peak_is_measured(shared: Path) -> None:
    script, case = ROOT / "experiments/memory/run.py", "stories260K, adam, batch 32 of 128"
    command = [sys.executable, str(script), "--data", str(shared), "--case", case, "--client", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < found["share"] <= 1.0
    assert 0.5 < found["estimate"] / found["measured"] < 1.5


def test_one_command_makes_tables_and_pages_again(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments/regenerate.py"), "fedlp_table", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert Path("experiments/fedlp_table/results/tables.md") in made
    assert {page.relative_to(ROOT) for page in QUOTING} <= set(made)
    for path in made:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), path


def test_every_local_link_of_a_page_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links {link}"


def test_the_results_are_few_and_small() -> None:
    found = subprocess.run(["git", "ls-files", "-z", "experiments"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("not a checkout")
    files = [ROOT / name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) <= 150
    assert sum(file.stat().st_size for file in files) <= 8e6


# ---- from tables to documents
def test_there_are_pages_that_quote() -> None:
    assert PAGE in QUOTING


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: str(page.relative_to(ROOT)))
def test_quoted_rows_are_those_of_the_tables(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill_in(text, lambda path: (ROOT / path).read_text(encoding="utf-8")) == text
    assert text.count("<!-- rows of ") == text.count("<!-- end -->")


TABLES = (
    "## full, 3 seeds\n\n| method | end | MB |\n|---|---|---|\n| a | **1.0** | 2 |\n| a, b | 3.0 | 4 |\n| c | 5 | |\n"
)


def _page(key: str, column: str = "end") -> str:
    return f"x\n<!-- rows of t.md -->\n| | {column} | row |\n|---|---|---|\n| ours | 9 | {key} |\n<!-- end -->\ny\n"


@pytest.mark.parametrize(("key", "value"), [("`full` `a`", "1.0"), ("`full` `a, b`", "3.0"), ("`full` `c, 5`", "5")])
def test_a_row_is_found_by_section_and_first_cells(key: str, value: str) -> None:
    filled = fill_in(_page(key), lambda path: {"t.md": TABLES}[path])
    assert filled == _page(key).replace("| 9 |", f"| {value} |")


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (_page("`none` `a`"), r"t\.md: no section none"),
        (_page("`full` `d`"), r"t\.md: 0 rows d in section full"),
        (_page("full a"), "is not `section` `row`"),
        (_page("`full` `a`", "GB"), r"t\.md: GB"),
    ],
)
def test_a_quote_of_what_is_not_there_is_refused(page: str, words: str) -> None:
    with pytest.raises(LookupError, match=words):
        fill_in(page, lambda _: TABLES)


def prose(text: str) -> Iterator[str]:
    """Yield the paragraphs and list items of a page, without tables, code, comments, links and pictures."""
    text = re.sub(r"<!--.*?-->|!\[.*?\]\(.*?\)|```.*?```|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "code", text)
    for part in re.split(r"\n\s*\n|\n(?=\* |#)", text):
        yield " ".join(part.split())


def test_no_sentence_of_the_results_is_long() -> None:
    for part in prose(PAGE.read_text(encoding="utf-8")):
        for sentence in re.split(r"(?<=[.:;!?])\s", part):
            assert len(sentence.split()) <= 35, sentence


def test_every_decimal_of_the_results_stands_in_a_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith(("|", "From ")))
    for part in prose(text):
        for number in re.findall(r"(?<![(\w.])\d+\.\d+", part):
            assert number in tables, f"{number} in: {part}"
    tested = (ROOT / "tests/integration/test_configs.py").read_text(encoding="utf-8")
    costs = text.partition("**Cost model.**")[2].partition("\n## ")[0]
    assert len(re.findall(r"\d+\.\d\d", costs)) == 9
    assert all(f'"{number}"' in tested for number in re.findall(r"\d+\.\d\d", costs))


def test_sections_of_tables_are_read() -> None:
    assert read_tables(TABLES)["full, 3 seeds"][0] == {"method": "a", "end": "1.0", "MB": "2"}


# ---- from runs to results
def test_finished_runs_replace_packed_ones_and_all_others_stay(tmp_path: Path) -> None:
    out, results = tmp_path / "runs", tmp_path / "results"
    unpack_runs(FEDLP_TABLE / "iid.runs.jsonl.xz", out / "iid")
    runs.collect(out, results)
    file = results / "iid.runs.jsonl.xz"
    before = read_packed(file)
    committed = read_packed(FEDLP_TABLE / "iid.runs.jsonl.xz")
    assert before == {name: replace(files, path=file / name) for name, files in committed.items()}
    for name in before:
        manifest = out / "iid" / name / "manifest.json"
        content = json.loads(manifest.read_text())
        if name.startswith("homo-0.5"):  # run again, here, with costs of each client
            content["config"]["dataset"]["root"] = "/home/me/cifar"
            rounds = manifest.with_name("rounds.jsonl")
            rounds.write_text(rounds.read_text().replace('"clients": []', '"clients": [{"client_id": 3}]'))
            config = manifest.with_name("config.yaml")
            config.write_text(config.read_text().replace("  root: null", "  root: /home/me/cifar"))
        else:  # stopped
            content["final_metrics"] = {}
        content["totals"]["wall_time_s"] = 1.0
        manifest.write_text(json.dumps(content))
    runs.collect(out, results)
    after = read_packed(file)
    assert list(after) == list(before)
    for name, files in after.items():
        again = name.startswith("homo-0.5")
        assert (files.manifest["totals"]["wall_time_s"] == 1.0) == again
        assert replace(files, manifest=before[name].manifest) == before[name]
        assert files.manifest["config"] == before[name].manifest["config"]


@pytest.mark.parametrize(("state", "asked"), [("new", "seed=3"), ("stopped", "resume="), ("finished", None)])
def test_a_run_is_started_resumed_or_skipped(
    state: str, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fedlp = tmp_path / "out", tmp_path / "fedlp"
    fedlp.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\nexit 5\n')
    fedlp.chmod(0o755)
    monkeypatch.setattr(runs, "FEDLP", fedlp)
    (out / "checkpoint").mkdir(parents=True)
    if state == "stopped":
        (out / "checkpoint" / "round-3.json").write_text("{}")
    if state == "finished":
        (out / "manifest.json").write_text('{"final_metrics": {"loss": 1.0}}')
    assert runs.run(out, ["seed=3"]) == (0 if asked is None else 5)
    found = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else None
    assert found == {"new": f"seed=3 hydra.run.dir={out}\n", "stopped": f"resume={out}\n", "finished": None}[state]
    assert asked is None or (found and asked in found)
