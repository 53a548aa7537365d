"""What the documents show runs: every block of a page with ``test:`` in its front matter, from docs/index.md on.

A block with a title is a file; the other blocks of ``python`` are one script, in their order among blocks of ``sh``.
Blocks of ``text`` are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_KIND = re.compile(r"\A---\ntest: (\w+)\n---\n")
PAGES = {
    path: match[1] for path in sorted(ROOT.glob("docs/**/*.md")) if (match := _KIND.match(path.read_text("utf-8")))
}
FAST = [path for path, kind in PAGES.items() if kind == "fast"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _steps(text: str) -> Iterator[tuple[str, str]]:
    """Yield ``(kind, content)``: a file's name and text, or "python" and "sh" with what is run."""
    before = ""
    for language, title, body in _FENCE.findall(text):
        if title:
            yield title, body
        elif language == "python":
            before += body  # the names of earlier blocks are known to later ones
            yield "python", before
        elif language == "sh":
            yield "sh", body


def _run(text: str, folder: Path, **more: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"} | more
    for kind, content in _steps(text):
        if kind not in ("python", "sh"):
            (folder / kind).parent.mkdir(parents=True, exist_ok=True)
            (folder / kind).write_text(content, encoding="utf-8")
            continue
        command = [sys.executable, "-c", content] if kind == "python" else ["bash", "-euo", "pipefail", "-c", content]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_pages_are_run() -> None:
    assert len(FAST) >= 12
    assert set(PAGES.values()) == {"fast", "shared", "deploy"}
    unknown = {
        language for path in ROOT.glob("docs/**/*.md") for language, *_ in _FENCE.findall(path.read_text("utf-8"))
    }
    assert unknown <= {"python", "sh", "text", "toml", "yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("path", FAST, ids=_name)
def test_a_page_runs(path: Path, tmp_path: Path) -> None:
    _run(path.read_text("utf-8"), tmp_path)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, kind in PAGES.items() if kind == "shared"], ids=_name)
def test_a_page_with_real_data_runs(path: Path, tmp_path: Path, shared: Path) -> None:
    _run(path.read_text("utf-8"), tmp_path, DATA=str(shared))


@pytest.mark.deploy
@pytest.mark.parametrize("path", [path for path, kind in PAGES.items() if kind == "deploy"], ids=_name)
def test_a_page_with_devices_runs(path: Path, tmp_path: Path) -> None:
    _run(path.read_text("utf-8"), tmp_path)


# ---- the README
README = (ROOT / "README.md").read_text("utf-8")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    prose = re.sub(r"```.*?```|<!--.*?-->|<[^>]+>", "", README, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#", "!")))
    sentences = re.split(r"(?<=[.:;!?])\s+(?=[A-Z*`\[])|\n\s*\n|\n[-*] ", prose)
    assert max(len(sentence.split()) for sentence in sentences) <= 35


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    examples = [body for language, title, body in _FENCE.findall(README) if language == "python" and not title]
    done = subprocess.run(
        [sys.executable, "-c", examples[0]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy = float(re.search(r"FedLP-Plan +1 +\d+ +([\d.]+)", done.stdout)[1])  # type: ignore[index]
    assert accuracy > 90


# ---- the site
@pytest.mark.slow
def test_the_site_builds_offline_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs fedlp[docs]")
    if not (ROOT / "experiments").is_dir():
        pytest.skip("a source distribution has no experiments")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (done.stdout + done.stderr).strip()
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text("utf-8")
        assert not re.search(r'(src|<link[^>]*href)="(https?:)?//', text), f"{page.name} fetches from elsewhere"
        assert not re.search(r":(class|func|math|mod):", text), f"{page.name} shows markup of a docstring"
