"""Splits of data sets of the Hugging Face ``datasets`` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlp.errors import DataError


def load_split(path: str, subset: str | None, split: str, train_split: str) -> Any:
    """Return the table of one split: of ``save_to_disk``'s folder, of a folder of files, or of the hub.

    Parameters
    ----------
    train_split : str
        The split that a folder with a single one is taken for.

    Raises
    ------
    DataError
        If the library is not installed, or a folder's only split is another one; the library raises errors of its own.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("dataset=hf needs the package datasets; run: pip install datasets") from error
    folder = Path(path).expanduser()
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))[split]
    if (folder / "state.json").is_file():
        if split != train_split:
            raise DataError(f"{folder} has one split")
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(str(folder) if folder.is_dir() else path, name=subset, split=split)
