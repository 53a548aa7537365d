"""Fixtures of the integration tests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedlp import cli
from tests.integration.running import Call, Finished, run


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Return the run of some overrides; equal overrides run once a session."""
    done: dict[tuple[str, ...], Finished] = {}

    def get(*overrides: str) -> Finished:
        if overrides not in done:
            done[overrides] = run(tmp_path_factory.mktemp("run"), *overrides)
        return done[overrides]

    return get


@pytest.fixture(autouse=True)
def own_modules_end_with_their_test(tmp_path: Path) -> Iterator[None]:
    """Forget modules of a test's own folder, whose names another test may use, and where they were found."""
    path = sys.path[:]
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs a command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.setattr(argparse.ArgumentParser, "error", argparse.ArgumentParser.error)  # main sets both: restore them

    def run(*arguments: str, main: Callable[[], None] = cli.main) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [main.__name__, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run
