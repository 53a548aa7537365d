"""Pieces of HTML: escaped text, tables that readers of screens can follow, sections."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from fedlp.report.groups import clean

_NUMBER = re.compile(r"~?(-?[\d,]*\.?\d+(?:e[+-]?\d+)?)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def text(value: Any) -> str:
    """Return a text from a file as one line that HTML shows as it is."""
    return escape(clean(str(value)))


def section(title: str, body: str) -> str:
    """Return a section with a heading that links lead to; nothing for an empty body."""
    if not body:
        return ""
    name = anchor(title)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{text(title)}</h2>\n{body}</section>'


def anchor(title: str) -> str:
    """Return the name of a section in links."""
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """Return a table whose first column heads its rows."""
    titles = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    lines = [_line([f"<td>{text(cell)}</td>" for cell in row[1:]], row[0]) for row in rows]
    return _table("", titles, lines, caption)


def number_table(
    head: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], caption: str, kind: str = "numbers"
) -> str:
    """Return a table to sort, with columns to choose.

    Parameters
    ----------
    head : sequence of (str, bool)
        Title of each column, and whether it is hidden at first.
    """
    titles = "".join(
        f'<th scope="col" data-name="{text(title)}"{" data-extra" if hidden else ""}>'
        f'<button type="button" title="sort">{text(title)}</button></th>'
        for title, hidden in head
    )
    lines = [_line([f"<td{_value(cell)}>{text(cell)}</td>" for cell in row[1:]], row[0]) for row in rows]
    return _table(kind, titles, lines, caption)


def _line(cells: Sequence[str], first: Any) -> str:
    return f'<tr><th scope="row">{text(first)}</th>{"".join(cells)}</tr>'


def _table(kind: str, titles: str, lines: Sequence[str], caption: str) -> str:
    body = "\n".join(lines)
    label = text(caption)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="{kind}"><caption><span>{label}</span></caption>'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _value(cell: str) -> str:
    """Return the attribute by which a cell is sorted; none for what is no number."""
    match = _NUMBER.match(cell)
    if match is None:
        return ""
    unit = cell[match.end() :].strip()
    return f' data-value="{float(match[1].replace(",", "")) * _SECONDS.get(unit, 1.0):g}"'


def asset(name: str) -> str:
    """Return the text of a file in ``assets``."""
    return files("fedlp.report").joinpath("assets", name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """Return Plotly as it lies in its Python package."""
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """Return JSON that may stand in a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
