"""Files of tables: CSV and Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlp.data.tables import Table
from fedlp.registry import register


@register("dataset", "csv")
@dataclass(frozen=True, kw_only=True)
class Csv(Table):
    """CSV table: numeric and categorical columns, a target column, a column of clients if there is one.

    Attributes
    ----------
    separator : str
        Column separator; "auto" is found from the first line.
    """

    separator: str = ","

    name = "csv"
    pattern = "*.csv"

    def read_file(self, path: Path) -> Any:
        """Return one file, whose first line holds the column names."""
        import pandas

        automatic = self.separator == "auto"
        return pandas.read_csv(path, sep=None if automatic else self.separator, engine="python" if automatic else "c")


@register("dataset", "parquet")
@dataclass(frozen=True, kw_only=True)
class Parquet(Table):
    """Parquet table: numeric and categorical columns, a target column, a column of clients if there is one."""

    name = "parquet"
    pattern = "*.parquet"

    def read_file(self, path: Path) -> Any:
        """Return the required columns of one file."""
        import pandas

        return pandas.read_parquet(path, columns=self._needed())

    def _needed(self) -> Sequence[str] | None:
        if self.columns is None:
            return None
        chosen: Mapping[str, None] = dict.fromkeys((*self.columns, *self._targets))
        return [*chosen, *([self.client] if self.client and self.client not in chosen else [])]
