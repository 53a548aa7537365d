"""Pages of the documents, and the README, in headless Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.conftest import Open
from tests.conftest import ROOT

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PAGES = (
    "index",
    "guide",
    "results",
    "comparison",
    "how/round",
    "how/methods",
    "reference/options",
    "results/pretrained",
)
PICTURES = """[...document.querySelectorAll("img")].filter((one) => getComputedStyle(one).display !== "none")
  .map((one) => [one.currentSrc.split("/").at(-1), one.complete && one.naturalWidth > 0, one.alt.length > 20])"""
# as wide as GitHub shows a README
STYLE = """body { margin: 0; background: #fff; color: #1f2328; font: 16px/1.5 sans-serif; }
article { max-width: 838px; margin: 0 auto; padding: 32px; } img { max-width: 100%; }
pre { overflow: auto; background: #f6f8fa; padding: 16px; font-size: 85%; } table { display: block; overflow: auto; }
td, th { padding: 6px 13px; border: 1px solid #d1d9e0; }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #f0f6fc; } pre { background: #151b23; } }"""


@pytest.mark.parametrize("width", [400, 1280, 1600])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_site_is_whole(site: Path, name: str, width: int, open_page: Open) -> None:
    for scheme in ("light", "dark"):
        page = open_page(site / f"{name}.html", width=width, scheme=scheme)
        assert page.complaints == []
        assert page.requests == []
        assert page.overflow == 0
        assert [one for one in page.run(PICTURES) if not one[1]] == [], "a picture that is not there"
        paper = page.run("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.fixture(scope="session")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the README as a page, about as GitHub renders it."""
    markdown = pytest.importorskip("markdown", reason="needs fedlp[docs]")
    text = (ROOT / "README.md").read_text("utf-8")
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "md_in_html"])
    page = tmp_path_factory.mktemp("readme") / "README.html"
    base = f'<base href="{ROOT.as_uri()}/">'
    page.write_text(
        f"<!doctype html><meta charset=utf-8>{base}<style>{STYLE}</style><article>{body}</article>", "utf-8"
    )
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1012])
def test_the_readmes_pictures_are_there(readme: Path, width: int, scheme: str, open_page: Open) -> None:
    page = open_page(readme, width=width, scheme=scheme)
    assert page.complaints == []
    assert page.overflow == 0
    drawing, plot = page.run(PICTURES)
    assert scheme in drawing[0]
    assert ("narrow" in drawing[0]) == (width == 400)
    assert drawing[1:] == plot[1:] == [True, True]


def test_the_readmes_first_screen_answers_five_questions(readme: Path, open_page: Open) -> None:
    page = open_page(readme, width=1012)
    ends = page.run(
        "Object.fromEntries([...document.querySelectorAll('h1, p, pre, table')].slice(0, 9)"
        ".map((one) => [one.textContent.trim().split(/[ :\\n]/)[0], one.getBoundingClientRect().bottom]))"
    )
    what, audience, why, start, printed = (ends[key] for key in ("Federated", "For", "Why", "make", "accuracy,"))
    assert what < audience < why < start < printed < 1000  # with the widest fonts


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", ["", "-narrow"])
def test_the_drawing_of_a_round_is_readable(shape: str, scheme: str, open_page: Open) -> None:
    drawing = ROOT / f"docs/how/round{shape}-{scheme}.svg"
    page = open_page(drawing, width=400 if shape else 900)
    texts = page.run(
        "[...document.querySelectorAll('text')].map((one) => { const box = one.getBoundingClientRect();"
        " return [one.textContent, box.left, box.right, box.top, box.bottom, box.height]; })"
    )
    assert len(texts) > 10
    assert [text for text, *_, height in texts if height < 11] == []
    width = 400 if shape else 900
    assert [text for text, left, right, *_ in texts if left < 0 or right > width] == []
    lying = [
        (a[0], b[0])
        for i, a in enumerate(texts)
        for b in texts[i + 1 :]
        if min(a[2], b[2]) - max(a[1], b[1]) > 2 and min(a[4], b[4]) - max(a[3], b[3]) > 4
    ]
    assert lying == []
