"""``fedlp describe``: the options that devices and a server without data need, read from a sample of the data."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedlp.config import compose
from fedlp.data.device_data import facts_of
from fedlp.errors import ConfigError

_PLACES = ("dataset.path", "dataset.root", "dataset.test_path", "dataset.server", "dataset.on_devices")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_RESERVED = ("true", "false", "null", "inf", "nan")


def describe(overrides: Sequence[str]) -> str:
    """Return one line of overrides for a run whose devices hold data like the sample.

    Parameters
    ----------
    overrides : sequence of str
        The sample: ``dataset=NAME``, its place, and options of the reader.

    Raises
    ------
    ConfigError
        If the data set is of a kind that devices cannot bring, or an override is none of a data set or model.
    DataError
        If the sample cannot be read.
    """
    if odd := [word for word in overrides if not re.match(r"(dataset|model)[.=]", word)]:
        raise ConfigError(f"fedlp describe takes options of dataset and model alone, not {odd[0]}")
    facts = facts_of(compose([*overrides]).dataset)
    given = {word.partition("=")[0]: word for word in overrides if word.partition("=")[0] not in _PLACES}
    words = given | {f"dataset.{name}": f"dataset.{name}={hydra_value(value)}" for name, value in facts.items()}
    kind = words.pop("dataset", "dataset=digits")
    return shlex.join([kind, "dataset.on_devices=true", *words.values()])


def hydra_value(value: Any) -> str:
    """Return a value as Hydra's command line reads it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{hydra_value(key)}:{hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value.lower() not in _RESERVED
        return value if is_plain else '"' + _escape(value) + '"'
    return "[" + ",".join(map(hydra_value, value)) + "]" if isinstance(value, Sequence) else str(value)


def _escape(text: str) -> str:
    """Return the inside of a quoted value: a backslash is doubled only before a quote, as Hydra's grammar has it."""
    return re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text)
