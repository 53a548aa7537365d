"""Rows of tables of results that documents quote, filled in again from the tables beside the results.

A document quotes rows between two comments; columns are found by their names, rows by the last cell::

    <!-- rows of experiments/per_byte/results/tables.md -->
    |  | end | uplink, MB | row |
    | --- | --- | --- | --- |
    | FedAvg | 62.3 ± 0.3 | 442.1 | `full-iid` `fedavg` |
    <!-- end -->

The last cell has a section's title, or the beginning of it, and the row's first cell, or more of them joined with
``", "``. The first cell is a label of the document's own. To quote another row, write its label and last cell and run
``experiments/regenerate.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import accumulate

Sections = Mapping[str, list[dict[str, str]]]  # title -> rows, each by the names of its columns
BLOCK = re.compile(r"(<!-- rows of (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
ROW = re.compile(r"`([^`]+)` `([^`]+)`")


def fill_in(page: str, read: Callable[[str], str]) -> str:
    """Return a document with all its quoted rows written anew; ``read`` returns a file by its path from the root.

    Raises
    ------
    LookupError
        If a file of tables does not have a section, a row or a column; says which.
    """

    def block(found: re.Match[str]) -> str:
        sections = read_tables(read(found[2]))
        head, rule, *rows = found[3].splitlines()
        lines = [_filled(row, _cells(head)[1:-1], sections, found[2]) for row in rows]
        return f"{found[1]}{chr(10).join([head, rule, *lines])}\n{found[4]}"

    return BLOCK.sub(block, page)


def read_tables(text: str) -> Sections:
    """Return the tables of a Markdown file, by the titles of their sections."""
    sections: dict[str, list[dict[str, str]]] = {}
    title, head = "", None
    for row in text.splitlines():
        if row.startswith(("## ", "**")):
            title, head = row.strip("#* ").replace("**", ""), None
        elif row.startswith("|") and head is None:
            head = _cells(row)
        elif row.startswith("|") and head is not None and not set(row) <= set("|- "):
            values = [cell.strip("*") for cell in _cells(row)]
            sections.setdefault(title, []).append(dict(zip(head, values, strict=True)))
    return sections


def find_row(sections: Sections, section: str, row: str) -> dict[str, str]:
    """Return the one row of a section whose first cells are ``row``; LookupError where there is none, or more."""
    title = section if section in sections else next((one for one in sections if one.startswith(section)), None)
    if title is None:
        raise LookupError(f"no section {section}")
    found = [cells for cells in sections[title] if row in accumulate(cells.values(), "{}, {}".format)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows {row} in section {section}, not one")
    return found[0]


def _filled(row: str, columns: list[str], sections: Sections, source: str) -> str:
    label, *_, last = _cells(row)
    key = ROW.fullmatch(last)
    if key is None:
        raise LookupError(f"the last cell of {row!r} is not `section` `row`")
    try:
        found = find_row(sections, key[1], key[2])
        values = [found[column] for column in columns]
    except LookupError as error:
        raise LookupError(f"{source}: {error.args[0]}") from error
    return f"| {' | '.join([label, *values, last])} |"


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]
