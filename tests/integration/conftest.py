"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.running import Finished, run


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Return the run of some overrides; equal overrides run once a session."""
    done: dict[tuple[str, ...], Finished] = {}

    def get(*overrides: str) -> Finished:
        if overrides not in done:
            done[overrides] = run(tmp_path_factory.mktemp("run"), *overrides)
        return done[overrides]

    return get
