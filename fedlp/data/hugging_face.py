"""Data sets of the Hugging Face ``datasets`` library: images, text, and text with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples, FederatedData, Rows
from fedlp.data.hub_splits import load_split
from fedlp.data.image_cache import cached_images, open_image
from fedlp.data.imagefolder import ImageOptions
from fedlp.data.reader import held_out_rows
from fedlp.data.text import LanguageData
from fedlp.data.tokenizers import encode_texts, pair_separator, vocabulary_size
from fedlp.errors import ConfigError, DataError
from fedlp.registry import register
from fedlp.rng import Stream, generator

if TYPE_CHECKING:
    from torch import Tensor

_LABELS = ("label", "labels", "target", "class", "fine_label", "category", "sentiment")
_TEXTS = ("text", "sentence", "content", "document", "story", "review", "question")
_TESTS = ("test", "validation", "valid", "dev")


@register("dataset", "hf")
@dataclass(frozen=True, kw_only=True)
class HuggingFace(ImageOptions, LanguageData):
    """Images, text or labelled text of the Hugging Face hub, of a folder of files or of a folder of ``save_to_disk``.

    A column of images and a label are image classification; a column of text and a label are text classification; text
    alone is language modelling, with a document in each row.

    Attributes
    ----------
    path : str
        Name on the hub, or a folder.
    subset : str or None
        Name of a configuration.
    split : str
        Split of the training examples.
    test_split : str or None
        Split of the test examples; "auto" is a split named test or validation where there is one and the examples have
        labels, else a share of the training split is held out. None holds out a share.
    image_column, text_column, label_column : str or None
        "auto" finds a column by its type and name; None: there is none, so that ``label_column=null`` makes labelled
        text a language model's.
    text_pair_column : str or None
        Column of a second text, which is joined to the first one: a premise and a hypothesis, two sentences.
    client_column : str or None
        Column whose values are clients, for ``partition=column`` and ``partition=natural``.
    """

    path: str | None = None
    subset: str | None = None
    split: str = "train"
    test_split: str | None = "auto"
    image_column: str | None = "auto"
    text_column: str | None = "auto"
    text_pair_column: str | None = None
    label_column: str | None = "auto"
    client_column: str | None = None

    name = "hf"

    # ---- facts
    def describe(self) -> DataInfo:
        """Return the facts; loads the library's table, whose examples stay on disk, where one is given."""
        by_options = self.path is None and any(self._named_columns)
        if by_options:
            self._check_options()
        image, _, label = self._named_columns if by_options else self._columns
        if image is not None:
            return self.info(self.name, self._labels)
        if label is None:
            return LanguageData.describe(self)
        labels = self._labels
        return DataInfo(
            name=self.name,
            task="sequence_classification",
            input_shape=(self.sequence_length,),
            num_classes=len(labels),
            num_train=None,
            num_test=None,
            vocabulary=vocabulary_size(self.tokenizer),
            labels=tuple(labels),
            separator=None if self.text_pair_column is None else pair_separator(self.tokenizer),
        )

    def load(self, seed: int) -> FederatedData:
        """Return the examples; windows of documents for language modelling, else one example a row."""
        image, text, label = self._columns
        if label is None:
            return LanguageData.load(self, seed)
        read = self._read_images if image is not None else self._read_texts
        train = read(self._table, image or text or "", label)
        test_table = self._test_table
        if test_table is not None:
            test = read(test_table, image or text or "", label)
        else:
            held_out = held_out_rows(train.targets.numpy(), self.test_fraction, generator(seed, Stream.DATA, 0))
            train, test = (train.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return FederatedData(self.describe(), *self.limit(train, test, seed))

    def facts(self) -> dict[str, Any]:
        """Return the options that describe this data set where it is not read."""
        image, text, label = self._columns
        found: dict[str, Any] = {"text_column": text} if image is None else {"image_column": image}
        return found | {"label_column": label} | ({} if label is None else {"labels": self._labels})

    @property
    def _named_columns(self) -> tuple[str | None, str | None, str | None]:
        """Columns that the options name."""
        image, text, label = (
            None if name == "auto" else name for name in (self.image_column, self.text_column, self.label_column)
        )
        return image, text, label

    def _check_options(self) -> None:
        """Raise ConfigError where options alone do not tell the columns and classes."""
        image, text, label = self._named_columns
        if image is None and text is None:
            raise ConfigError("dataset=hf without a folder needs dataset.image_column or dataset.text_column")
        if label is None and (image is not None or self.label_column == "auto"):
            raise ConfigError("dataset=hf without a folder needs dataset.label_column; null for language modelling")
        if label is not None and self.labels is None:
            raise ConfigError("dataset=hf without a folder needs dataset.labels, the names of the classes")

    def read_documents(self) -> list[str]:
        """Return the non-empty texts of the text column."""
        column = self._columns[1]
        rows = self._column(self._table, column or "")
        documents = [text for text in rows if isinstance(text, str) and text.strip()]
        if not documents:
            raise DataError(f"hf: column {column!r} of {self._where} holds no text; set dataset.text_column")
        return documents

    # ---- columns
    @cached_property
    def _columns(self) -> tuple[str | None, str | None, str | None]:
        """Names of the columns of images, texts and labels; None if there is none."""
        features, names = self._table.features, self._table.column_names
        kinds = {name: type(features[name]).__name__ for name in names}
        texts = [name for name in names if getattr(features[name], "dtype", "") in ("string", "large_string")]
        label = self._find("label_column", names, [n for n in names if kinds[n] == "ClassLabel"], _LABELS)
        images = [n for n in names if kinds[n] == "Image"]
        is_text = self.image_column == "auto" and self.text_column not in (None, "auto")
        image = None if is_text else self._find("image_column", names, images, ("image", "img"))
        if image is not None:
            if label is None:
                raise DataError(
                    f"hf: {self._where} has images but no label; set dataset.label_column to one of {_join(names)}"
                )
            return image, None, label
        text = self._find("text_column", names, [n for n in texts if n != label], _TEXTS)
        if text is None:
            raise DataError(
                f"hf: {self._where} has no text and no images; set dataset.text_column to one of {_join(names)}"
            )
        return None, text, label

    def _find(self, option: str, names: Sequence[str], typed: Sequence[str], usual: Sequence[str]) -> str | None:
        """Return a column by its given name, else by type or common names."""
        asked = getattr(self, option)
        if asked is not None and asked != "auto":
            if asked not in names:
                raise DataError(
                    f"hf: {self._where} has no column {asked!r}; set dataset.{option} to one of {_join(names)}"
                )
            return str(asked)
        if asked is None:
            return None
        named = [name for name in usual if name in (typed if option != "label_column" else names)]
        if option == "label_column":
            return next(iter([*typed, *named]), None)
        return next(iter([*named, *typed]), None)

    @cached_property
    def _labels(self) -> list[str]:
        """Names of the classes."""
        if self.labels is not None:
            return list(self.labels)
        column = self._columns[2]
        assert column is not None
        known = getattr(self._table.features[column], "names", None)
        if known:
            return list(known)
        values = [value for value in set(self._column(self._table, column)) if value is not None]
        if not all(isinstance(value, str | int | bool) for value in values):
            raise DataError(f"hf: column {column!r} of {self._where} holds no classes; set dataset.label_column")
        return [str(value) for value in sorted(values, key=lambda v: (isinstance(v, str), v))]

    # ---- tables
    @property
    def _where(self) -> str:
        part = "" if self.subset is None else f"subset {self.subset}, "
        return f"{self.path} ({part}split {self.split})"

    @cached_property
    def _table(self) -> Any:
        if not self.path:
            raise ConfigError("dataset=hf needs dataset.path: a data set's name on the Hugging Face hub, or a folder")
        try:
            return load_split(self.path, self.subset, self.split, self.split)
        except Exception as error:  # the library lets anything through, from OSError to its hub client's own errors
            if isinstance(error, DataError):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"hf: cannot load {self._where}: {reason}; check dataset.path, subset and split") from error

    @cached_property
    def _test_table(self) -> Any:
        """The table of the test split, or None."""
        wanted = _TESTS if self.test_split == "auto" else (self.test_split,) if self.test_split else ()
        failure: Exception | None = None
        for split in wanted:
            try:
                return load_split(self.path or "", self.subset, split, self.split)
            except Exception as error:  # there is none of this name
                failure = error
        if self.test_split not in (None, "auto"):
            raise DataError(f"hf: {self.path} has no split {self.test_split}; check dataset.test_split") from failure
        return None

    @staticmethod
    def _column(table: Any, name: str) -> list[Any]:
        return list(table.select_columns([name])[:][name])

    # ---- examples
    def _read_texts(self, table: Any, text: str, label: str) -> Examples:
        import torch

        texts = self._texts(table, text)
        pairs = None if self.text_pair_column is None else self._texts(table, self.text_pair_column)
        parts = encode_texts(texts, self.tokenizer, self.sequence_length, pairs)
        tokens = np.full((len(parts), self.sequence_length), IGNORE_INDEX, dtype=np.int64)
        for row, part in zip(tokens, parts, strict=True):
            row[: len(part)] = part
        if not all(map(len, parts)):
            number = next(index for index, part in enumerate(parts) if not len(part))
            raise DataError(f"hf: row {number} of {self._where} holds no text in column {text!r}; drop such rows")
        return Examples(torch.from_numpy(tokens), self._classes(table, label), self._owners(table))

    def _texts(self, table: Any, column: str) -> list[str]:
        if column not in table.column_names:
            raise DataError(f"hf: {self._where} has no column {column!r}; set dataset.text_pair_column")
        return [value if isinstance(value, str) else "" for value in self._column(table, column)]

    def _read_images(self, table: Any, image: str, label: str) -> Examples:
        import datasets
        import torch

        raw = table.cast_column(image, datasets.Image(decode=False))
        names = [f"{self.path}[{number}]" for number in range(len(table))]
        key = [str(self.path), self.subset, image, table._fingerprint]
        pixels = cached_images(partial(_open, raw, image), names, self.frame, key, label=f"decoding {self.path}")
        rows = cast("Tensor", Rows(pixels, torch.arange(len(table))))
        return Examples(rows, self._classes(table, label), self._owners(table))

    def _classes(self, table: Any, label: str) -> Tensor:
        import torch

        values = self._column(table, label)
        if getattr(table.features[label], "names", None) and self.labels is None:
            return torch.tensor(values, dtype=torch.int64)
        names = getattr(table.features[label], "names", None)
        named = [str(names[value]) if names else str(value) for value in values]
        number = {name: index for index, name in enumerate(self._labels)}
        if unknown := sorted(set(named) - set(number)):
            raise DataError(
                f"hf: {self._where} has the unknown label {unknown[0]}; the labels are {_join(self._labels)}: add it "
                "to dataset.labels, or drop its rows"
            )
        return torch.tensor([number[name] for name in named], dtype=torch.int64)

    def _owners(self, table: Any) -> NDArray[np.int64] | None:
        if self.client_column is None:
            return None
        if self.client_column not in table.column_names:
            raise DataError(f"hf: {self._where} has no column {self.client_column!r}; set dataset.client_column")
        values = [str(value) for value in self._column(table, self.client_column)]
        return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _open(table: Any, column: str, number: int) -> Any:
    import io

    value = table[number][column]
    return open_image(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])


def _join(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:20]))
