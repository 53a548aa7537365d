"""``fedlp options GROUP``: the options of a config group with meaning, type and default, as text or as a page.

The source is one: docstrings of parts, and comments of the schema's fields.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from fedlp import registry
from fedlp.config import PruneConfig, RunConfig, config_dir
from fedlp.config.reading import part_groups
from fedlp.config.tools import SearchConfig
from fedlp.errors import ConfigError

_FIELD = re.compile(r"    (\w+): ")
_COMMENT = re.compile(r"(?:^|  )\s*(?:None\s+)?# (.*)$")


@dataclass(frozen=True, slots=True)
class Section:
    """Options of a group's schema, or of one choice of the group.

    Attributes
    ----------
    title : str
        ``GROUP`` or ``GROUP=CHOICE``.
    summary : str
        Of the docstring: the first line of a part's, all of a schema's.
    options : tuple of (str, str, str, str)
        Name, type, default and meaning.
    """

    title: str
    summary: str
    options: tuple[tuple[str, str, str, str], ...]


def describe_group(group: str) -> str:
    """Return the options of a group, choice by choice; ConfigError where there is no such group."""
    found, choices = list(sections(group)), yaml_choices(group)
    texts = [_text(section) for section in found]
    if choices and len(found) == 1:
        texts.append(f"choices: {' '.join(choices)}")
    return "\n\n".join(texts)


def option_page() -> str:
    """Return a page of every group's options, in Markdown."""
    parts = ["# Every option", "", "Made from the docstrings of the code, as `fedlp options GROUP` prints them.", ""]
    parts += ["## Options outside of groups { #top }", "", *_rows(Section("", "", _schema_options(RunConfig, "")))]
    for group in group_schemas():
        choices = yaml_choices(group)
        parts += ["", f"## {group}", ""]
        for section in sections(group):
            if section.title != group:
                parts += ["", f"### {section.title} {{ #{section.title.replace('=', '-')} }}", ""]
            parts += [_prose(section.summary), "", *(_rows(section) if section.options else [])]
            if section.title == group and choices:
                parts += ["", f"Choices: {', '.join(f'`{choice}`' for choice in choices)}."]
    return "\n".join(parts) + "\n"


def group_schemas() -> dict[str, Any]:
    """Return the schema of each group: of runs, and of the tools beside them."""
    schemas: dict[str, Any] = {}
    for config in (RunConfig, PruneConfig, SearchConfig):
        schemas |= {f.name: f.default_factory for f in fields(config) if is_dataclass(f.default_factory)}
    return schemas


def yaml_choices(group: str) -> list[str]:
    """Return the choices of a group that have a YAML."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def sections(group: str) -> Iterator[Section]:
    """Yield the options of a group that all choices share, then each choice's own.

    Raises
    ------
    ConfigError
        If there is no such group; names all groups.
    """
    schemas = group_schemas()
    if group == "experiment":
        yield Section(group, "Values of a committed experiment; conf/experiment holds them.", ())
        return
    if group not in schemas:
        raise ConfigError(f"there is no group {group}; choose one of {', '.join(sorted({*schemas, 'experiment'}))}")
    schema = schemas[group]
    yield Section(group, inspect.getdoc(schema) or "", _schema_options(schema, f"{group}."))
    parts = part_groups(RunConfig)
    for name in registry.names(parts[group].kind) if group in parts else ():
        target = registry.lookup(parts[group].kind, name)
        found = _part_options(group, parts[group].kind, target)
        yield Section(f"{group}={name}", registry.summary(target), tuple(found))


def _schema_options(schema: Any, prefix: str) -> tuple[tuple[str, str, str, str], ...]:
    """Return a schema's own fields, with their comments as its source has them."""
    meanings: dict[str, str] = {}
    current = ""
    for line in inspect.getsource(schema).splitlines():
        field_found, comment = _FIELD.match(line), _COMMENT.search(line)
        if field_found or line.startswith("    def "):
            current = field_found[1] if field_found else ""
        if current and comment:
            meanings[current] = f"{meanings.get(current, '')} {comment[1]}".strip()
    own = [f for f in fields(schema) if not is_dataclass(f.default_factory)]
    if "name" not in meanings:  # a choice of the group, which the command line names by the group alone
        own = [f for f in own if f.name not in ("name", "options")]
    return tuple((prefix + f.name, _type(f.type), _default(f), meanings.get(f.name, "")) for f in own)


def _default(field: Any) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return "required" if value in (MISSING, "???") else _show(value)


def _part_options(group: str, kind: str, target: Any) -> Iterator[tuple[str, str, str, str]]:
    meanings: dict[str, str] = {}
    for base in reversed(target.__mro__) if isinstance(target, type) else (target,):
        meanings |= _meanings(inspect.cleandoc(base.__doc__ or ""))
    for option in registry.options(kind, target).values():
        default = "required" if option.default is inspect.Parameter.empty else _show(option.default)
        meaning = re.sub(r":\w+:`~?([^`]*)`", r"\1", meanings.get(option.name, ""))
        yield f"{group}.{option.name}", _type(option.annotation), default, meaning


def _type(annotation: Any) -> str:
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return "any" if name == "Any" else name.replace("None", "null")


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _text(section: Section) -> str:
    """Return a section as the terminal shows it."""
    lines = [section.summary if "=" not in section.title else f"{section.title}: {section.summary}"]
    for name, kind, default, meaning in section.options:
        shown = default if default == "required" else f"default {default}"
        lines.append(f"  {name} ({kind}, {shown}): {meaning}".rstrip(": "))
    return "\n".join(lines)


def _rows(section: Section) -> list[str]:
    """Return a section's options as a table in Markdown."""
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, meaning in section.options:
        kind, default, meaning = (text.replace("|", "\\|") for text in (kind, default, meaning))
        rows.append(f"| `{name}` | {kind} | `{default}` | {_prose(meaning)} |")
    return rows


def _prose(text: str) -> str:
    """Return text whose double backticks are Markdown's single ones, and whose markup characters mean themselves."""
    plain = re.sub(r"``(.+?)``", r"`\1`", text)
    parts = re.split(r"(`[^`]*`)", plain)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<{\[\]])", r"\\\1", part) for part in parts)


def _meanings(doc: str) -> dict[str, str]:
    """Return the meaning of each attribute or parameter in a numpydoc docstring, in one line."""
    found: dict[str, str] = {}
    current: list[str] = []
    for line in doc.splitlines():
        if line and not line.startswith(" ") and " : " in line:
            current = [name.strip() for name in line.partition(" : ")[0].split(",")]
            found |= dict.fromkeys(current, "")
        elif line.startswith("    ") and current:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in current}
        elif line and not line.startswith(" "):
            current = []
    return found
