"""The command that runs a group again, spelt from its config."""

from __future__ import annotations

import re
import shlex
from typing import Any

from fedlp.report.groups import Group, flatten

_BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./:@%+*?|-]*")
_NOT_TEXT = {"null", "true", "false", "nan", "inf"}
_LEFT_OUT = {"seed", "resume"}


def command(group: Group) -> str:
    """Return a shell command that spells out every value that is read, one a line, so that no default matters."""
    # loads Hydra, which a report's readers do without
    from fedlp.config import schema_for, todays_config, unread_groups, unread_options

    config = todays_config(group.config)
    unread, left_out = unread_groups(config), _LEFT_OUT | unread_options(config)
    program = schema_for(config).command.partition(" ")[0]
    if config.get("run"):  # which brings them
        unread |= {"model", "dataset", "task", "partition", "num_clients"}
    config = {key: value for key, value in config.items() if key not in unread}
    seeds = sorted({run.seed for run in group.runs})
    words = [program if len(seeds) == 1 else f"{program} -m", f"seed={','.join(map(str, seeds))}"]
    words += [_word(key, value) for key, value in flatten(config).items() if key not in left_out]
    return " \\\n  ".join(words)


def _word(key: str, value: Any) -> str:
    return shlex.quote(f"{key}={spell(value)}")


def spell(value: Any) -> str:
    """Return ``value`` in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(spell(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_spell_within(item)}' for key, item in value.items())}}}"
    if not isinstance(value, str):
        return str(value)
    if _BARE.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return _quote(value)


def _spell_within(value: Any) -> str:
    """Return a value of a mapping, in which colons separate."""
    return _quote(value) if isinstance(value, str) and ":" in value else spell(value)


def _quote(value: str) -> str:
    # A backslash means itself unless a quote follows it, the closing one included.
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", value + "'")[:-2] + "'"
