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
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

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


@pytest.mark.slow
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
def test_the_site_builds_offline_without_a_warning(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text("utf-8")
        assert not re.search(r'(src|<link[^>]*href)="(https?:)?//', text), f"{page.name} fetches from elsewhere"
        assert not re.search(r":(class|func|math|mod):", text), f"{page.name} shows markup of a docstring"


@pytest.mark.slow
def test_no_link_of_the_site_is_dead(site: Path) -> None:
    assert dead_links(site) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a id="top" href="b.html#one">x</a><a href="b.html#two">x</a><source srcset="c.svg">'
    )
    (tmp_path / "b.html").write_text(
        '<h1 id="one">x</h1><a href="a.html#top">x</a><a href="d/">x</a><a href="https://e.f">'
    )
    assert dead_links(tmp_path) == ["a.html: b.html#two", "a.html: c.svg", "b.html: d/"]


class _Links(HTMLParser):
    """Collects what a page links to or shows, and the names that links may lead to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.names.add(value or "")
            elif name in ("href", "src", "srcset"):
                self.links.append(value or "")


def dead_links(site: Path) -> list[str]:
    """Return the links of built pages that lead to no file, or to no place in a page of the same site."""
    pages = {page.resolve(): _Links(page.read_text("utf-8")) for page in sorted(site.rglob("*.html"))}
    found = []
    for page, here in pages.items():
        for link in dict.fromkeys(here.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or page.name == "404.html":  # which is served from any folder
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            name = unquote(parts.fragment)
            missing = target in pages and name not in pages[target].names | {"", "__skip"}
            if missing or not target.is_file():
                found.append(f"{page.relative_to(site.resolve())}: {link}")
    return found
