"""Local text files."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from fedlp.data.documents import split_documents
from fedlp.data.text import LanguageData
from fedlp.errors import ConfigError, DataError
from fedlp.registry import register


@register("dataset", "text")
@dataclass(frozen=True, kw_only=True)
class TextFiles(LanguageData):
    """Local text for language modelling.

    Attributes
    ----------
    root : str
        A text file, a folder of ``*.txt`` files or a pattern.
    documents : str
        Definition of a document: file, line, paragraph, separator, speaker, or auto by the text's form; see
        :func:`fedlp.data.documents.split_documents`.
    """

    root: str | None = None
    documents: str = "auto"

    name = "text"

    def read_documents(self) -> list[str]:
        """Return the non-empty documents of all files."""
        if not self.root:
            raise ConfigError("dataset=text needs dataset.root: a text file, a folder of *.txt files or a pattern")
        texts = []
        for path in _find_files(self.root):
            try:
                texts.append(path.read_text(encoding="utf-8-sig"))
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"cannot read {path} as UTF-8 text ({error}); convert the file or leave it out"
                ) from error
        documents = split_documents(texts, self.documents)
        if not documents:
            raise DataError(f"{self.root} holds no text; give dataset.root another file")
        return documents


def _find_files(root: str) -> list[Path]:
    place = Path(root).expanduser()
    if place.is_file():
        return [place]
    pattern = str(Path(glob.escape(str(place)), "**", "*.txt") if place.is_dir() else place)
    paths = sorted(path for found in glob.glob(pattern, recursive=True) if (path := Path(found)).is_file())
    if not paths:
        what = "no *.txt file in the folder" if place.is_dir() else "no file or folder at"
        raise DataError(f"text: {what} {root}; set dataset.root to a text file, a folder of *.txt files or a pattern")
    return paths
