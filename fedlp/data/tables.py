"""Tables with a column for the target: facts, split and encoding; :mod:`~fedlp.data.table_files` reads the files."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import DataInfo, Examples, FederatedData
from fedlp.data.reader import HeldOut, held_out_rows
from fedlp.data.table_columns import Columns, encode_labels, find_columns, group_numbers, looks_like_classes
from fedlp.errors import ConfigError, DataError, one_line
from fedlp.rng import Stream, generator

log = logging.getLogger("fedlp")

_TASKS = ("auto", "classification", "regression", "multi_label")


@dataclass(frozen=True, kw_only=True)
class Table(HeldOut, ABC):
    """A table whose rows are examples.

    Attributes
    ----------
    path : str
        The file, or a folder of such files.
    test_path : str or None
        Another file that is the test part; a share of the rows if None.
    target : str or list of str
        Column of the class or value; several columns for several values or labels.
    client : str or None
        Column that names the client that owns a row, for ``partition=column`` and ``partition=natural``.
    columns : list of str or None
        Input columns; all but target and client if None.
    exclude : list of str
        Columns that are left out.
    categorical : list of str or None
        Categorical columns; all columns without numbers if None.
    categories : mapping from column to list
        Categories that are known beforehand, in their order; the file's where a column is absent.
    task : str
        "classification", "regression", "multi_label", or "auto" by the type of the target.
    labels : list or None
        Classes in their order; the file's, sorted, if None.
    standardize : bool
        Whether numeric columns are standardised: mean subtracted, divided by the standard deviation.
    mean, std : list of float or None
        Normalisation of every input, indicators among them; measured on the file if None.
    """

    path: str | None = None
    test_path: str | None = None
    target: Any = None
    client: str | None = None
    columns: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    categorical: list[str] | None = None
    categories: dict[str, Any] = field(default_factory=dict)
    task: str = "auto"
    labels: list[Any] | None = None
    standardize: bool = True
    mean: list[float] | None = None
    std: list[float] | None = None

    name: ClassVar[str]
    pattern: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in _TASKS:
            raise ConfigError(f"dataset.task={self.task} is not allowed: it must be one of {', '.join(_TASKS)}")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("dataset.mean and dataset.std are given together, one number for each input")
        if self.std is not None and not all(0 < value < np.inf for value in self.std):
            raise ConfigError(f"dataset.std={self.std} is not allowed: it must be finite numbers above 0")

    @abstractmethod
    def read_file(self, path: Path) -> Any:
        """Return one file as a pandas table."""

    def describe(self) -> DataInfo:
        """Return the facts; reads the file, where one is given, for its categories, classes and normalisation."""
        if self.path is None and self.columns:
            return self._describe_options()
        return self._encoded[0]

    def facts(self) -> dict[str, Any]:
        """Return the options that describe this table where it is not read."""
        table = self._read()
        columns = self._find_columns(table)
        task, labels = self._encode_target(table)[1:3]
        mean, std = self._normalisation(columns.encode(table), columns)
        found: dict[str, Any] = {"columns": self._input_names(table), "task": task}
        if columns.categories:
            found["categories"] = {name: list(values) for name, values in columns.categories.items()}
        if task == "classification":
            found["labels"] = list(labels)
        return found | ({"mean": _rounded(mean), "std": _rounded(std)} if mean else {"standardize": False})

    def load(self, seed: int) -> FederatedData:
        """Return the rows, split by the seed where there is no test file; classes are held out in proportion.

        Raises
        ------
        DataError
            If a file or column is absent, a value is of the wrong kind, or a label is unknown; names it.
        """
        info, whole, held_out = self._encoded
        del vars(self)["_encoded"]  # the examples below are copies
        if held_out is None:
            strata = whole.targets.numpy() if whole.targets.dtype.is_floating_point is False else np.zeros(len(whole))
            strata = strata if strata.ndim == 1 else np.zeros(len(whole))
            held_out = held_out_rows(strata.astype(np.int64), self.test_fraction, generator(seed, Stream.DATA, 0))
        train, test = (whole.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return FederatedData(info, *self.limit(train, test, seed))

    def _describe_options(self) -> DataInfo:
        """Return the facts of the options alone; ConfigError if one is missing."""
        names = [name for name in self.columns or () if name not in {*self._targets, *self.exclude, self.client}]
        categorical = {*(self.categorical or ()), *self.categories}
        numeric = tuple(name for name in names if name not in categorical)
        task = "classification" if self.task == "auto" and self.labels is not None else self.task
        wanted = {
            "task": task != "auto",
            "labels": task != "classification" or self.labels is not None,
            "categories": categorical <= self.categories.keys(),
            "mean": self.mean is not None or not self.standardize or not numeric,
        }
        if missing := [name for name, is_there in wanted.items() if not is_there]:
            raise ConfigError(f"dataset={self.name} without a file needs dataset.{missing[0]}")
        categories = {name: tuple(map(str, self.categories[name])) for name in names if name in categorical}
        columns = Columns(numeric, categories)
        mean, std = self._normalisation(np.zeros((0, len(columns.names))), columns)
        labels = tuple(map(str, self.labels or ())) if task == "classification" else ()
        return DataInfo(
            name=self.name,
            task=task,
            input_shape=(len(columns.names),),
            num_classes=len(labels) or len(self._targets),
            num_train=None,
            num_test=None,
            mean=mean,
            std=std,
            labels=labels or (self._targets if task == "multi_label" else ()),
        )

    # ---- reading
    def _read(self) -> Any:
        """Return all rows that have a target; ``__test__`` marks those of a test file."""
        import pandas

        if self.path is None or self.target is None:
            raise ConfigError(f"dataset={self.name} needs dataset.path=FILE and dataset.target=COLUMN")
        table = self._read_files(self.path)
        if self.test_path is not None:
            test = self._read_files(self.test_path)
            table["__test__"], test["__test__"] = False, True
            table = pandas.concat([table, test], ignore_index=True)
        for column in (*self._targets, *self._named()):
            if column not in table:
                known = ", ".join(str(name) for name in table.columns if name != "__test__")
                raise DataError(f"{self.path} has no column {column!r}; it has {known}")
        complete = table[list(self._targets)].notna().all(axis=1)
        if dropped := int((~complete).sum()):
            log.warning("%s: %d rows without a target are left out", self.path, dropped)
            table = table[complete].reset_index(drop=True)
        if len(table) < 2:
            raise DataError(f"{self.path} has {len(table)} rows with a target; give at least 2")
        return table

    def _read_files(self, path: str) -> Any:
        import pandas

        place = Path(path).expanduser()
        files = sorted(place.glob(self.pattern)) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            raise DataError(f"{self.name}: no file {place}; set dataset.path to a file or a folder of {self.pattern}")
        tables = []
        for file in files:
            try:
                tables.append(self.read_file(file))
            except (OSError, ValueError) as error:  # pandas' and pyarrow's errors are ValueErrors
                raise DataError(f"{file} cannot be read as {self.name}: {one_line(error)}") from error
        return tables[0] if len(tables) == 1 else pandas.concat(tables, ignore_index=True)

    @property
    def _targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else tuple(self.target or ())

    def _named(self) -> tuple[str, ...]:
        return (
            *(self.columns or ()),
            *self.exclude,
            *(self.categorical or ()),
            *self.categories,
            *([self.client] if self.client else []),
        )

    # ---- encoding
    @cached_property
    def _encoded(self) -> tuple[DataInfo, Examples, NDArray[np.bool_] | None]:
        """Facts, all rows, and which of them are of a test file; the files are read once for all of these."""
        table = self._read()
        return *self._encode(table), table["__test__"].to_numpy(dtype=np.bool_) if "__test__" in table else None

    def _input_names(self, table: Any) -> list[str]:
        """Return the columns that are inputs."""
        left_out = {*self._targets, *self.exclude, self.client, "__test__"}
        return [name for name in (self.columns or table.columns) if name not in left_out]

    def _find_columns(self, table: Any) -> Columns:
        return find_columns(table, self._input_names(table), self.categorical, self.categories, str(self.path))

    def _encode(self, table: Any) -> tuple[DataInfo, Examples]:
        import torch

        columns = self._find_columns(table)
        inputs = columns.encode(table)
        mean, std = self._normalisation(inputs, columns)
        for place in range(len(columns.numeric)):
            missing = np.isnan(inputs[:, place])
            if missing.any():
                inputs[missing, place] = mean[place] if mean else np.nanmean(inputs[:, place])
        targets, task, labels, outputs = self._encode_target(table)
        groups = None if self.client is None else group_numbers(table[self.client])
        if groups is not None and int(groups.min()) < 0:
            raise DataError(f"{self.path}: {int((groups < 0).sum())} rows have no client in column {self.client}")
        info = DataInfo(
            name=self.name,
            task=task,
            input_shape=(inputs.shape[1],),
            num_classes=outputs,
            num_train=None,
            num_test=None,
            mean=mean,
            std=std,
            labels=labels,
        )
        return info, Examples(torch.from_numpy(inputs), torch.from_numpy(targets), groups)

    def _normalisation(self, inputs: Any, columns: Columns) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation of every input; 0 and 1 for indicators, empty if nothing is standardised."""
        if self.mean is not None and self.std is not None:
            if not len(self.mean) == len(self.std) == len(columns.names):
                raise ConfigError(
                    f"dataset.mean and dataset.std have {len(self.mean)} and {len(self.std)} numbers, but there are "
                    f"{len(columns.names)} inputs: {', '.join(columns.names[:20])}"
                )
            return tuple(self.mean), tuple(self.std)
        if not self.standardize or not columns.numeric:
            return (), ()
        mean, std = np.zeros(len(columns.names)), np.ones(len(columns.names))
        for place, name in enumerate(columns.numeric):  # one at a time, in double precision
            numbers = inputs[:, place].astype(np.float64)
            numbers = numbers[~np.isnan(numbers)]
            if not len(numbers) or not np.isfinite(numbers).all():
                raise DataError(f"{self.path}: column {name} is empty or holds infinite values; clean or exclude it")
            mean[place] = numbers.mean()
            std[place] = numbers.std() or 1.0  # a column that never changes stays as it is
        return tuple(mean.tolist()), tuple(std.tolist())

    def _encode_target(self, table: Any) -> tuple[Any, str, tuple[str, ...], int]:
        """Return targets, task, names of the classes or labels and the number of outputs."""
        columns = [table[name] for name in self._targets]
        task = self.task
        if task == "auto" and self.labels is not None:
            task = "classification"
        if task == "auto":
            classes = all(map(looks_like_classes, columns))
            task = "regression" if not classes else "classification" if len(columns) == 1 else "multi_label"
        if task == "classification":
            if len(columns) > 1:
                raise ConfigError(
                    "dataset.target names several columns; one class is in one, or dataset.task=multi_label"
                )
            codes, labels = encode_labels(columns[0], self.labels, str(self.path))
            return codes, task, labels, len(labels)
        values = np.stack([self._numbers(column) for column in columns], axis=1)
        if task == "multi_label":
            if not np.isin(values, (0, 1)).all():
                raise DataError(f"{self.path}: the columns of a multi-label target hold 0 and 1 alone")
            return values.astype(np.uint8), task, self._targets, len(columns)
        return (values[:, 0] if len(columns) == 1 else values), task, (), len(columns)

    def _numbers(self, column: Any) -> Any:
        if column.dtype.kind not in "biuf":
            raise DataError(f"{self.path}: target {column.name} holds no numbers; set dataset.task=classification")
        return column.to_numpy(dtype=np.float32)


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
