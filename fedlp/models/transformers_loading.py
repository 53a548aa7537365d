"""Transformers, importable next to any build of torchvision, its models read quietly and its errors in one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlp.errors import ConfigError
from fedlp.models.forward import first_line
from fedlp.models.torchvision_compat import ensure_operators


def import_transformers() -> Any:
    """Return the transformers module, importable next to any build of torchvision."""
    ensure_operators()
    return importlib.import_module("transformers")


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Convert errors of transformers while it reads a model into one line."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ConfigError(f"model.path={path} is not a folder")
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"model.path={path} cannot be loaded: {first_line(error)}; give a model name that can be reached or a "
            "local folder with config.json and model.safetensors"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notes within a context."""
    logging = import_transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
