"""Conversion of user data to :class:`Examples`: arrays, a torch data set, a Hugging Face data set.

Every example is read once and kept as a row of one tensor; a random transform of a data set is therefore drawn once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedlp.data.examples import IGNORE_INDEX, DataInfo, Examples
from fedlp.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_INPUT_KEYS: Final = ("x", "inputs", "image", "img", "pixel_values", "features", "input_ids")
_TARGET_KEYS: Final = ("y", "label", "labels", "target", "targets", "fine_label")
_FORMS: Final = (
    "arrays (X, y), a torch Dataset of (input, target) pairs, a Hugging Face dataset with an image, array or input_ids "
    "column and a label column, or fedlp's Examples"
)


def as_examples(data: Any, *, what: str = "train") -> Examples:
    """Return a user's data as Examples; Examples are returned as they are.

    Parameters
    ----------
    data : object
        ``(X, y)``: two arrays or tensors of n rows. A mapping with an input and a target (keys such as ``x``/``y`` or
        ``image``/``label``). A torch Dataset, map-style or iterable, whose items are ``(input, target)`` pairs or such
        mappings. A Hugging Face dataset; token ids without a label column are text for language modelling.
    what : str
        Name of the data in error messages.

    Notes
    -----
    Inputs become uint8 images, (n, C, H, W), channels last being moved first; float32 arrays of any shape; or int64
    token ids, (n, tokens), padded at the end with ``IGNORE_INDEX``. Targets become int64 (n,) classes; float32 (n,) or
    (n, k) values; or uint8 (n, k) indicators of labels. Arrays are not copied where their type fits.

    Raises
    ------
    DataError
        If the data are of another kind, empty, of unequal shapes or not finite.
    """
    if isinstance(data, Examples):
        return data
    if isinstance(data, tuple) and len(data) == 2 and all(map(_is_array, data)):
        return _from_arrays(data[0], data[1], what)
    if hasattr(data, "column_names") and hasattr(data, "features"):
        return _from_hugging_face(data, what)
    if isinstance(data, Mapping):
        return _from_arrays(*_pick(data, what), what)
    tensors = getattr(data, "tensors", None)
    if isinstance(tensors, tuple) and len(tensors) == 2:  # torch's TensorDataset
        return _from_arrays(tensors[0], tensors[1], what)
    if _is_indexed(data) or isinstance(data, Iterable):
        return _from_items(_items(data), what)
    raise DataError(f"{what}: a {type(data).__name__} cannot be read as examples; give {_FORMS}")


def describe_examples(name: str, train: Examples, test: Examples | None, task: str | None = None) -> DataInfo:
    """Return the facts of examples in memory.

    Parameters
    ----------
    name : str
        Name of the data set.
    test : Examples or None
        Held-out examples of the same shapes; None if there are none.
    task : str or None
        Name of the task; found from the targets if None: float values are a regression, rows of indicators
        multi-label classification, token ids that are their own targets language modelling, all others classes.

    Raises
    ------
    DataError
        If training and test examples differ in shape, or a class is negative.
    """
    if test is not None and len(test) and test.inputs.shape[1:] != train.inputs.shape[1:]:
        raise DataError(
            f"{name}: a training example has shape {tuple(train.inputs.shape[1:])}, a test example "
            f"{tuple(test.inputs.shape[1:])}; both must be equal"
        )
    parts = [part for part in (train, test) if part is not None and len(part)]
    task = task or _guess_task(train)
    shape = tuple(train.inputs.shape[1:])
    vocabulary = None
    if task in ("causal_lm", "language"):
        shape, num_classes = (shape[0] - 1,), 1 + max(int(part.inputs.max()) for part in parts)
    elif train.targets.ndim == 2 or train.targets.is_floating_point():
        num_classes = train.targets.shape[1] if train.targets.ndim == 2 else 1
    else:
        if min(int(part.targets.min()) for part in parts) < 0:
            raise DataError(f"{name}: a class is negative; classes are numbered from 0")
        num_classes = 1 + max(int(part.targets.max()) for part in parts)
    if task == "sequence_classification":
        vocabulary = 1 + max(int(part.inputs.max()) for part in parts)
    return DataInfo(
        name=name,
        task=task,
        input_shape=shape,
        num_classes=num_classes,
        num_train=len(train),
        num_test=0 if test is None else len(test),
        vocabulary=vocabulary,
    )


def _guess_task(train: Examples) -> str:
    if train.targets.is_floating_point():
        return "regression"
    if train.targets.ndim == 2:
        return "multi_label"
    if train.inputs.ndim == 2 and not train.inputs.is_floating_point():
        if train.groups is not None and np.array_equal(train.targets.numpy(), train.groups):
            return "causal_lm"
        if bool((train.inputs[:, -1] == IGNORE_INDEX).any()):
            return "sequence_classification"
    return "classification"


# ---- forms of data
def _from_arrays(inputs: Any, targets: Any, what: str) -> Examples:
    found = _to_inputs(_to_tensor(inputs, what), what)
    if targets is None:
        return _unlabelled(found)
    labels = _to_targets(_to_tensor(targets, what), what)
    if len(found) != len(labels):
        raise DataError(f"{what}: {len(found)} inputs but {len(labels)} targets; give one target for each input")
    return Examples(found, labels, None)


def _from_items(items: Iterator[Any], what: str) -> Examples:
    """Return examples of a data set read item by item."""
    inputs, targets = [], []
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            x, y = _pick(item, f"{what}[{number}]")
        elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
            x, y = item
        else:
            raise DataError(f"{what}[{number}] is a {type(item).__name__}, not a pair (input, target)")
        inputs.append(_to_array(x, f"{what}[{number}]"))
        targets.append(None if y is None else _to_array(y, f"{what}[{number}]"))
    if not inputs:
        raise DataError(f"{what} holds no examples")
    labels = None if any(target is None for target in targets) else _stack(targets, what)  # type: ignore[arg-type]
    return _from_arrays(_stack(inputs, what), labels, what)


def _from_hugging_face(data: Any, what: str) -> Examples:
    """Return a Hugging Face dataset's examples; its columns are found by name."""
    names = list(data.column_names)
    source = next((name for name in _INPUT_KEYS if name in names), None)
    label = next((name for name in _TARGET_KEYS if name in names), None)
    if source is None or (label is None and source != "input_ids"):
        raise DataError(
            f"{what}: no input and label among the columns {', '.join(map(str, names))}; rename them to image (or "
            "input_ids) and label, or tokenize text into a column input_ids first"
        )
    columns = data.select_columns([name for name in (source, label) if name is not None])
    if source == "input_ids":
        inputs = _pad([np.asarray(row) for row in columns.with_format(None)["input_ids"]])
        return _from_arrays(inputs, None if label is None else np.asarray(columns.with_format(None)[label]), what)
    return _from_items(((row[source], row[label]) for row in columns), what)


def _is_indexed(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _items(data: Any) -> Iterator[Any]:
    if _is_indexed(data):
        return (data[index] for index in range(len(data)))
    return iter(data)


def _pick(item: Mapping[str, Any], what: str) -> tuple[Any, Any]:
    """Return input and target of a mapping; no target where there are token ids alone."""
    source = next((name for name in _INPUT_KEYS if name in item), None)
    label = next((name for name in _TARGET_KEYS if name in item), None)
    if source is None or (label is None and source != "input_ids"):
        raise DataError(
            f"{what} has the keys {', '.join(map(str, item))}; give an input (one of {', '.join(_INPUT_KEYS)}) and a "
            f"target (one of {', '.join(_TARGET_KEYS)})"
        )
    return item[source], None if label is None else item[label]


def _unlabelled(tokens: Tensor) -> Examples:
    """Return token ids for language modelling: each row a document of its own."""
    import torch

    numbers = np.arange(len(tokens))
    return Examples(tokens, torch.from_numpy(numbers), numbers)


# ---- values
def _is_array(value: Any) -> bool:
    """Whether a value has rows: a pair of such values is a data set, not one example."""
    return getattr(value, "ndim", 0) > 0 or (isinstance(value, list) and len(value) != 0)


def _to_array(value: Any, what: str) -> NDArray[Any]:
    """Return one input or target as an array; a Pillow image with channels first."""
    if hasattr(value, "getbands") and hasattr(value, "convert"):
        pixels = np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGB"))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what}: a {type(value).__name__} is no number, array or image; convert it first")
    return array


def _stack(rows: list[NDArray[Any]], what: str) -> NDArray[Any]:
    first = rows[0].shape
    odd = next((number for number, row in enumerate(rows) if row.shape != first), None)
    if odd is None:
        return np.stack(rows)
    if all(row.ndim == 1 and row.dtype.kind in "iu" for row in rows):
        return _pad(rows)
    raise DataError(f"{what}[{odd}] has shape {rows[odd].shape}, {what}[0] {first}; resize or pad them to one shape")


def _pad(rows: list[NDArray[Any]]) -> NDArray[np.int64]:
    """Return rows of token ids, (n, longest), padded at the end."""
    padded = np.full((len(rows), max((len(row) for row in rows), default=0)), IGNORE_INDEX, dtype=np.int64)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def _to_tensor(value: Any, what: str) -> Tensor:
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{what}: values of type {array.dtype} are no numbers; encode text and labels as numbers")
        native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
        tensor = torch.from_numpy(native if native.flags.writeable else native.copy())
    if not len(tensor):
        raise DataError(f"{what} holds no examples")
    return tensor


def _to_inputs(tensor: Tensor, what: str) -> Tensor:
    import torch

    if tensor.ndim < 2:
        raise DataError(f"{what}: inputs have shape {tuple(tensor.shape)}; give rows of values, images or token ids")
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{what}: inputs hold NaN or infinite values; fill or drop them")
        return tensor
    if tensor.ndim in (3, 4) and tensor.dtype == torch.uint8:
        return _channels_first(tensor)
    return tensor.to(torch.int64)


def _channels_first(images: Tensor) -> Tensor:
    """Return uint8 images as (n, C, H, W); (n, H, W) are grey."""
    if images.ndim == 3:
        return images[:, None]
    is_last = images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4)
    return images.permute(0, 3, 1, 2).contiguous() if is_last else images


def _to_targets(tensor: Tensor, what: str) -> Tensor:
    import torch

    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim > 2:
        raise DataError(f"{what}: targets have shape {tuple(tensor.shape)}; give a class, a value or a row for each")
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{what}: targets hold NaN or infinite values; drop these examples")
        return tensor
    if tensor.ndim == 1:
        return tensor.to(torch.int64)
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        raise DataError(
            f"{what}: rows of integer targets are indicators, 0 or 1; give classes as (n,), values as float"
        )
    return tensor.to(torch.uint8)
