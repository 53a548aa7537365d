"""The files in ``docker/`` pass their linters, and say what docs/docker.md says of them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlp.federation.budgets import read_budget
from tests.deploy.containers import CHECKOUT, DOCKER, command_line, health_command, image, services, stages

DEVICE = {"SUPERLINK": "superlink.example:8000", "PARTITION": "3", "PARTITIONS": "4"}
ALL = [*services("compose.yaml", {}).items(), *services("compose.device.yaml", DEVICE).items()]
LONG_LIVED = {name: service for name, service in ALL if service.get("restart") == "unless-stopped"}
each = pytest.mark.parametrize(("name", "service"), ALL, ids=[name for name, _ in ALL])


def lint(*line: str) -> None:
    program = Path(sys.executable).with_name(line[0])
    done = subprocess.run([str(program), *line[1:]], cwd=DOCKER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    lint("hadolint", "Dockerfile")


def test_shellcheck_finds_nothing() -> None:
    lint("shellcheck", "test.sh")


@pytest.mark.parametrize("file", sorted(path.name for path in DOCKER.glob("compose*.yaml")))
def test_compose_files_follow_the_specification(file: str) -> None:
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


def test_linters_heed_nothing_but_the_rules() -> None:
    assert not [path for path in DOCKER.rglob("*") if path.is_file() and "ignore=" in path.read_text()]


@pytest.mark.parametrize("target", ["server", "client"])
def test_images_are_pinned_and_belong_to_no_root(target: str) -> None:
    made = image(target)
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", made.user)
    assert made.health
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(.*)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\S+/python:3\.\d+\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    installs = [text for keyword, text in stages()["builder"] if keyword == "RUN" and "install" in text]
    assert len(installs) == 2
    assert all("constraint" in text.lower() for text in installs)


def test_the_build_gets_what_it_copies_and_little_more() -> None:
    allowed = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    copied = [
        word
        for lines in stages().values()
        for keyword, text in lines
        if keyword == "COPY" and not text.startswith("--from")
        for word in text.split()[:-1]
    ]
    assert sorted(copied) == sorted(allowed)
    assert all((CHECKOUT / path).exists() for path in copied)


@each
def test_every_service_is_confined(name: str, service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pull_policy"] == "never"
    assert service["mem_limit"]
    assert service["init"] is True
    assert ("user" in service) == (name == "keys") == ("cap_add" in service)


@each
def test_only_the_superlinks_port_is_published(name: str, service: dict[str, Any]) -> None:
    networks = yaml.safe_load((DOCKER / "compose.yaml").read_text())["networks"]
    assert networks["fleet"] == {"internal": True}
    assert service.get("ports") == (["127.0.0.1:8000:8000"] if name == "superlink" else None)
    if name not in ("superlink", "supernode"):
        assert service["networks"] == ["fleet"]


@each
def test_programs_and_secrets_exist(name: str, service: dict[str, Any]) -> None:
    line = command_line(service)
    assert line[0] == "sh" or Path(sys.executable).with_name(line[0]).exists()
    used = re.findall(
        r"/run/secrets/([\w.-]+)", " ".join(line + (health_command(service) if name in LONG_LIVED else []))
    )
    assert set(used) <= service["secrets"].keys()
    if name in LONG_LIVED:
        assert health_command(service)[:2] == ["python", "/opt/fedlp/health.py"]


def test_supernodes_differ_in_number_key_and_budget() -> None:
    nodes = [service for name, service in ALL if name.startswith("supernode-")]
    settings = [dict(word.split("=", 1) for word in shlex.split(node["command"][1].split("=", 1)[1])) for node in nodes]
    assert [(one["partition-id"], one["num-partitions"]) for one in settings] == [(str(i), "4") for i in range(4)]
    assert len({node["secrets"]["supernode.key"] for node in nodes}) == 4
    budgets = [read_budget(DOCKER / "budgets" / Path(one["budget"]).name) for one in settings]
    assert None not in budgets
    assert len(set(budgets)) == 4
    assert {one["budget"] for one in settings} == {f"/etc/fedlp/{path.name}" for path in (DOCKER / "budgets").iterdir()}


def test_without_an_engine_docker_test_says_so(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    for name in ("dirname", "docker"):
        (tmp_path / name).symlink_to(shutil.which(name if name == "dirname" else "false"))
    done = subprocess.run([bash, DOCKER / "test.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no container engine" in done.stderr
