"""Division of text into documents."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from fedlp.errors import ConfigError

_SEPARATOR: Final = "<|endoftext|>"
_SPEECH: Final = re.compile(r"(?P<speaker>[^\W\d_][^\n:]{0,39}):[ \t]*\n")


def split_documents(texts: list[str], documents: str) -> list[str]:
    """Return the non-empty documents of one or many files.

    Parameters
    ----------
    texts : list of str
        Each file's text.
    documents : str
        Definition of a document. ``file``: a file. ``line``: a line. ``paragraph``: text between blank lines.
        ``separator``: text between ``<|endoftext|>`` marks. ``speaker``: all lines of one speaker of a play; a
        block of "NAME:" and lines is a speech, and a block without a name goes on with the last one; names are told
        apart file by file. ``auto``: separator if a mark is found, speaker if most blocks are speeches, else paragraph
        for one file and file for many.

    Raises
    ------
    ConfigError
        If ``documents`` is none of these.
    """
    if documents == "auto":
        documents = _guess(texts)
    if documents not in _SPLITTERS:
        raise ConfigError(f"dataset.documents is {documents!r}; choose one of auto, {', '.join(_SPLITTERS)}")
    split = _SPLITTERS[documents]
    return [document for text in texts for document in split(text) if document.strip()]


def _guess(texts: list[str]) -> str:
    if any(_SEPARATOR in text for text in texts):
        return "separator"
    blocks = [block for text in texts for block in _paragraphs(text)]
    if 2 * sum(_SPEECH.match(block) is not None for block in blocks) > len(blocks):
        return "speaker"
    return "paragraph" if len(texts) == 1 else "file"


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text.strip())


def _speakers(text: str) -> list[str]:
    """Return the text of each speaker, in order of first appearance; a preface without a name is one more speaker."""
    speeches: dict[str, list[str]] = {}
    speaker = ""
    for block in _paragraphs(text):
        if heading := _SPEECH.match(block):
            speaker = heading["speaker"]
        speeches.setdefault(speaker, []).append(block)
    return ["\n\n".join(blocks) for blocks in speeches.values()]


_SPLITTERS: Final[dict[str, Callable[[str], list[str]]]] = {
    "file": lambda text: [text],
    "line": str.splitlines,
    "paragraph": _paragraphs,
    "separator": lambda text: [document.strip() for document in text.split(_SEPARATOR)],
    "speaker": _speakers,
}
