"""Command lines: logs are lines that no terminal obeys."""

from __future__ import annotations

import logging

import pytest

from fedlp.cli.common import set_up_logging


def test_a_logged_message_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logging.getLogger("fedlp").warning("client 3 failed: %s", "\x1b[2Jgone\nfedlp: all is well" + "x" * 10**5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0] == "fedlp: client 3 failed: ?[2Jgone"


def test_a_message_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("fedlp.pruning")
    for _ in range(2):  # jobs of a sweep
        set_up_logging()
        for count in (1, 1, 2):
            logger.warning("few vectors: %d", count)
    assert capsys.readouterr().err.splitlines() == ["fedlp: few vectors: 1", "fedlp: few vectors: 2"] * 2
