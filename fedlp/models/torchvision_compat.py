"""Import of torchvision without its compiled operators.

torchvision's wheels on PyPI are compiled against the CUDA build of torch. Next to the CPU build their extension does
not load, and ``import torchvision`` then dies with "operator torchvision::nms does not exist", because the package
describes that operator without asking whether it is there. transformers, seeing torchvision installed, dies with it.
Nothing in fedlp calls the operator: classifiers and image transforms are plain torch. So its schema is all that is
missing, and it is declared here, only where the real one cannot be had.

torchvision also imports torch's compiler, for one question that aligning regions asks of it: 130 MB of memory, and a
second or two at the start of a run. It is answered by a stand-in, which imports the compiler when it is asked.

Call :func:`import_torchvision` in place of ``import torchvision``, and :func:`ensure_operators` before the first import
of transformers, in every process.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from fedlp.errors import ConfigError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_COMPILER = "torch._dynamo"
_lock = threading.Lock()
_declared: list[torch.library.Library] = []  # a library that is collected takes its declarations away


def import_torchvision() -> ModuleType:
    """Return the torchvision module, next to any build of torch.

    Raises
    ------
    ConfigError
        If torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError("torchvision is not installed; run: pip install torchvision")
    ensure_operators()
    with _lock, warnings.catch_warnings(), _without_compiler():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        return importlib.import_module("torchvision")


def ensure_operators() -> None:
    """Declare torchvision's ``nms`` operators unless they exist or torchvision is absent.

    Idempotent and safe in threads. Where the compiled operators load they are used, untouched.
    """
    with _lock:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None or _is_defined() or _load_compiled(Path(spec.origin).parent):
            return
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            library.define(schema)  # type: ignore[no-untyped-call]
        _declared.append(library)


def import_note() -> str | None:
    """Return one line on why transformers does not import by itself in this environment; None if it does."""
    ensure_operators()
    if not _declared:
        return None
    return (
        "torchvision here is built for another torch, so that transformers does not import outside fedlp: it says "
        "\"Could not import module 'LlamaConfig'\"; run pip uninstall torchvision, or install its build for this torch"
    )


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Let torchvision be imported without ``torch._dynamo``, unless that is there already."""
    if "torchvision" in sys.modules or _COMPILER in sys.modules:
        yield
        return
    package, utils = ModuleType(_COMPILER), ModuleType(f"{_COMPILER}.utils")
    package.__path__ = []  # a package, of which nothing else can be imported
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    stand_ins = {module.__name__: module for module in (package, utils)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _is_compile_supported(device_type: str) -> bool:
    found: bool = importlib.import_module(f"{_COMPILER}.utils").is_compile_supported(device_type)
    return found


def _is_defined() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def _load_compiled(folder: Path) -> bool:
    """Load torchvision's extension; return whether its operators exist afterwards."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_C{suffix}"
        if path.is_file():
            try:
                torch.ops.load_library(path)  # type: ignore[no-untyped-call]
            except OSError:  # the extension of another build of torch: what this module is for
                continue
    return _is_defined()
