"""What the files in ``docker/`` say, read without a container engine."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
DOCKER = CHECKOUT / "docker"


@dataclass(frozen=True)
class Image:
    """What a target of the Dockerfile sets for its containers; ``user`` and such are the text, lists are exec forms."""

    env: dict[str, str]
    entrypoint: list[str]
    command: list[str]
    health: list[str]
    user: str
    folder: str
    stop_signal: str


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions (keyword, text) of every stage by its name, the stage's FROM first."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    found: dict[str, list[tuple[str, str]]] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, _, text = line.partition(" ")
        if keyword == "FROM":
            current = found.setdefault(text.split(" AS ")[1], [])
        if keyword and found:
            current.append((keyword, text.strip()))
    return found


def image(target: str) -> Image:
    """Return what a target sets, itself or by the stages that it is made from."""
    own = stages()
    chain = [target]
    while (parent := own[chain[-1]][0][1].split(" AS ")[0]) in own:
        chain.append(parent)
    said = [line for name in reversed(chain) for line in own[name]]
    last = dict(said)
    env = {key: value for keyword, text in said if keyword == "ENV" for key, value in _pairs(text)}
    health = last["HEALTHCHECK"].partition("CMD ")[2] if "HEALTHCHECK" in last else "[]"
    entrypoint, command = (json.loads(last.get(keyword, "[]")) for keyword in ("ENTRYPOINT", "CMD"))
    return Image(env, entrypoint, command, json.loads(health), last["USER"], last["WORKDIR"], last["STOPSIGNAL"])


def services(file: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the services of a compose file with variables put in, and each secret's file in the place of its name."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return "$" if name is None else settings[name] if default is None else settings.get(name, default)

    text = re.sub(r"\$(?:\$|\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)\})", value, (DOCKER / file).read_text())
    project = yaml.safe_load(text)
    for service in project["services"].values():
        mounts = (
            [{"source": item, "target": item} if isinstance(item, str) else item for item in service["secrets"]]
            if "secrets" in service
            else []
        )
        service["secrets"] = {item["target"]: project["secrets"][item["source"]]["file"] for item in mounts}
    return dict(project["services"])


def command_line(service: Mapping[str, Any]) -> list[str]:
    """Return what a service's container executes: as in Docker, its own entrypoint takes the image's command away."""
    made = image(target_of(service))
    if "entrypoint" in service:
        return [*service["entrypoint"], *service.get("command", [])]
    return [*made.entrypoint, *service.get("command", made.command)]


def health_command(service: Mapping[str, Any]) -> list[str]:
    """Return the command that tells whether a service's container is well."""
    test = service.get("healthcheck", {}).get("test")
    return list(test[1:]) if test else image(target_of(service)).health


def target_of(service: Mapping[str, Any]) -> str:
    """Return the Dockerfile's target that a service's image is built from."""
    return re.fullmatch(r"fedlp-(\w+):\w+", service["image"])[1]  # type: ignore[index]


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(key, value) for key, _, value in (word.partition("=") for word in shlex.split(text))]
