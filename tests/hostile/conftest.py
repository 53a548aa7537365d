"""How many cases the fuzzers try: few in every test run, ``FEDLP_HOSTILE_CASES`` (``make test-hostile``) for more."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def num_cases() -> int:
    return int(os.environ.get("FEDLP_HOSTILE_CASES", "700"))
