"""One browser for all tests of pages, and functions that open a page in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium, Page, find_chromium

Open = Callable[..., Page]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """Return a running browser."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: install one (chromium, chromium-browser, google-chrome) or set FEDLP_CHROMIUM")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def open_page(chromium: Chromium) -> Iterator[Open]:
    """Return a function that opens a file: ``open_page(path, width=1280, scheme="dark")``."""
    pages: list[Page] = []

    def open_file(path: Path, *, width: int = 1280, scheme: str = "light") -> Page:
        pages.append(Page(chromium, path.as_uri(), width=width, scheme=scheme))
        return pages[-1]

    yield open_file
    for page in pages:
        page.close()
