"""Where text comes from, and where one document ends and the next begins.

Sources are CPython's documentation topics (embedded; their wording follows the interpreter's version), local text files
and the Hugging Face ``datasets`` library.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedlp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedlp.config import DatasetConfig

_SEPARATOR: Final = "<|endoftext|>"
_SPEECH: Final = re.compile(r"(?P<speaker>[^\W\d_][^\n:]{0,39}):[ \t]*\n")


def read_documents(config: DatasetConfig) -> list[str]:
    """Return the documents of a language data set, in a fixed order.

    Raises
    ------
    ConfigError
        If a value that the source needs is missing or unknown.
    DataError
        If the text is absent, unreadable or empty.
    """
    if config.name == "topics":
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    return _read_files(config) if config.name == "text" else _read_hub(config)


def split_documents(texts: list[str], documents: str) -> list[str]:
    """Return the non-empty documents of one or many files.

    Parameters
    ----------
    texts : list of str
        Each file's text.
    documents : str
        What a document is. ``file``: a file. ``line``: a line. ``paragraph``: what stands between blank lines.
        ``separator``: what stands between ``<|endoftext|>`` marks. ``speaker``: all that one speaker of a play says; a
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
    """Return what each speaker says, in order of first appearance; a preface without a name is a speaker of its own."""
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


def _read_files(config: DatasetConfig) -> list[str]:
    if not config.root:
        raise ConfigError("dataset=text needs dataset.root: a text file, a folder of *.txt files or a pattern")
    texts = []
    for path in _find_files(config.root):
        try:
            texts.append(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path} as UTF-8 text ({error}); convert the file or leave it out") from error
    documents = split_documents(texts, config.documents)
    if not documents:
        raise DataError(f"{config.root} holds no text; give dataset.root another file")
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


def _read_hub(config: DatasetConfig) -> list[str]:
    """Return the text column of a data set of the hub, of a folder of data files, or of what ``save_to_disk`` wrote."""
    if not config.path:
        raise ConfigError("dataset=hf needs dataset.path: a data set's name on the Hugging Face hub, or a folder")
    try:
        import datasets
    except ImportError as error:
        raise DataError("dataset=hf needs the package datasets; run: pip install datasets") from error
    where = f"{config.path} (subset {config.subset}, split {config.split})"
    try:
        table = _load_table(datasets, config)
        known = config.text_column in table.column_names
        column = table.select_columns([config.text_column])[:][config.text_column] if known else []
    except Exception as error:  # the library lets anything through, from OSError to its hub client's own errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"hf: cannot load {where}: {reason}; check dataset.path, subset and split") from error
    if not known:
        names = ", ".join(table.column_names)
        raise DataError(f"hf: {where} has no column {config.text_column!r}; set dataset.text_column to one of {names}")
    documents = [text for text in column if isinstance(text, str) and text.strip()]
    if not documents:
        raise DataError(f"hf: column {config.text_column!r} of {where} holds no text; set dataset.text_column")
    return documents


def _load_table(datasets: Any, config: DatasetConfig) -> Any:
    folder = Path(config.path or "").expanduser()
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))[config.split]
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    path = str(folder) if folder.is_dir() else config.path
    return datasets.load_dataset(path, name=config.subset, split=config.split)
