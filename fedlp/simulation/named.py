"""Names ``module:qualname`` of functions and classes, by which another process imports them."""

from __future__ import annotations

import importlib
import multiprocessing
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlp.errors import FedLPError, one_line

_NAME = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


def name_of(target: object) -> str | None:
    """Return the name of a function or class; None if a spawned process cannot import it by name."""
    module, path = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    name = f"{module}:{path}"  # "<lambda>" and "<locals>" are no names
    if not _NAME.fullmatch(name) or (module == "__main__" and not _is_main_imported()):
        return None
    return name if _follow(sys.modules.get(str(module)), str(path)) is target else None


def find_named(name: object) -> Callable[..., Any]:
    """Return the function or class of a name; its module is imported.

    Raises
    ------
    FedLPError
        If it is no such name, its module cannot be imported or has no such function or class.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FedLPError(f"{name!r} is no name of a function or class, MODULE:NAME")
    module, _, path = name.partition(":")
    try:
        found = _follow(importlib.import_module(module), path)
    except Exception as error:  # a user's module may raise anything
        raise FedLPError(f"a worker process cannot import {name}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(found):
        raise FedLPError(
            f"a worker process finds no function or class {name}; define it at the top level of its module, not under "
            'if __name__ == "__main__":'
        )
    return found  # type: ignore[no-any-return]


def missing_script() -> str | None:
    """Return the main script's name if processes cannot import it, since it is no file; else None."""
    main = sys.modules["__main__"]
    name = getattr(main, "__file__", None)
    folder = getattr(multiprocessing.process, "ORIGINAL_DIR", None) or ""  # where the program started
    return str(name) if name is not None and main.__spec__ is None and not Path(folder, name).exists() else None


def _is_main_imported() -> bool:
    """Return whether spawned processes import the main script: neither ``-c`` nor an interactive session is one."""
    main = sys.modules["__main__"]
    return missing_script() is None and (main.__spec__ is not None or getattr(main, "__file__", None) is not None)


def _follow(found: Any, path: str) -> Any:
    """Return the attribute at a dotted path; None if there is none."""
    for attribute in path.split("."):
        found = getattr(found, attribute, None)
    return found
