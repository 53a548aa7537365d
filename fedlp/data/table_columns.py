"""Encoding of table columns: numeric columns unchanged, categorical ones as one indicator per category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlp.errors import DataError

MOST_CATEGORIES = 1000
MOST_CLASSES = 20
"""Distinct integers of a target up to which they are taken for classes."""


@dataclass(frozen=True)
class Columns:
    """Input columns and their encoding.

    Attributes
    ----------
    categories : mapping from column to tuple
        Categories of each categorical column, in the order of their indicators.
    numeric : tuple of str
        Numeric columns, in the order of the table.
    """

    numeric: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each input: a numeric column, or ``column=category``."""
        indicators = (f"{name}={value}" for name, values in self.categories.items() for value in values)
        return (*self.numeric, *indicators)

    def encode(self, table: Any) -> NDArray[np.float32]:
        """Return a pandas table's rows as (n, inputs): missing numbers as NaN, an unknown category as zeros."""
        found = np.zeros((len(table), len(self.names)), dtype=np.float32)
        for place, name in enumerate(self.numeric):
            found[:, place] = table[name].to_numpy(dtype=np.float32, na_value=np.nan)
        start = len(self.numeric)
        for name, values in self.categories.items():
            codes = _codes(table[name], values)
            known = np.flatnonzero(codes >= 0)
            found[known, start + codes[known]] = 1.0
            start += len(values)
        return found


def find_columns(
    table: Any, names: Sequence[str], categorical: Sequence[str] | None, given: Mapping[str, Sequence[Any]], where: str
) -> Columns:
    """Return the encoding of the columns of a pandas table.

    Parameters
    ----------
    names : sequence of str
        Columns that are inputs.
    categorical : sequence of str or None
        Categorical columns; None: all columns without numbers.
    given : mapping from column to values
        Categories known beforehand.

    Raises
    ------
    DataError
        If a column is neither numeric nor categorical, or has too many categories; names it.
    """
    numeric, categories = [], {}
    for name in names:
        kind = table[name].dtype.kind
        if kind in "mM":
            raise DataError(
                f"{where}: column {name} holds dates; turn them into numbers, or name it in dataset.exclude"
            )
        is_categorical = name in categorical if categorical is not None else kind not in "biuf"
        if not (is_categorical or name in given):
            if kind not in "biuf":
                raise DataError(f"{where}: column {name} holds no numbers; name it in dataset.categorical or exclude")
            numeric.append(name)
            continue
        values = given.get(name)
        categories[name] = tuple(_category_names(table[name]) if values is None else map(str, values))
        if len(categories[name]) > MOST_CATEGORIES:
            raise DataError(
                f"{where}: column {name} has {len(categories[name]):,} categories, more than {MOST_CATEGORIES}; name "
                "it in dataset.exclude"
            )
    if not numeric and not categories:
        raise DataError(f"{where} has no columns but the target; give dataset.columns")
    return Columns(tuple(numeric), categories)


def encode_labels(column: Any, labels: Sequence[Any] | None, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return a target column as classes, and their names; DataError for a value that ``labels`` does not have."""
    names = tuple(map(str, labels)) if labels is not None else tuple(_category_names(column))
    codes = _codes(column, names)
    if (unknown := np.flatnonzero(codes < 0)).size:
        value = column.iloc[int(unknown[0])]
        raise DataError(
            f"{where}: {unknown.size:,} rows have an unknown label, the first is {value!r}; the labels are "
            f"{', '.join(names[:20])}: add it to dataset.labels, or drop the rows"
        )
    return codes, names


def looks_like_classes(column: Any) -> bool:
    """Return whether a target column holds classes: text, truth values or few different integers."""
    if column.dtype.kind == "f":
        values = column.dropna()
        return bool((values == values.round()).all()) and values.nunique() <= MOST_CLASSES
    return column.dtype.kind not in "iu" or column.nunique() <= MOST_CLASSES


def group_numbers(column: Any) -> NDArray[np.int64]:
    """Return the number of each row's value among the sorted values."""
    return np.asarray(_codes(column, _category_names(column)))


def _category_names(column: Any) -> list[str]:
    """Return the distinct values as text, numbers in numeric order, others sorted; missing values are left out."""

    def order(value: Any) -> tuple[int, float, str]:
        return (0, float(value), "") if _is_number(value) else (1, 0.0, str(value))

    return [_name(value) for value in sorted(column.dropna().unique(), key=order)]


def _codes(column: Any, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the index of each value in ``names``, -1 for any other."""
    place = {name: index for index, name in enumerate(names)}
    codes, values = column.factorize()
    found = np.array([*(place.get(_name(value), -1) for value in values), -1], dtype=np.int64)
    chosen: NDArray[np.int64] = found[codes]  # -1, a missing value, is the last
    return chosen


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float | np.floating) and value == int(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool | np.bool_)
