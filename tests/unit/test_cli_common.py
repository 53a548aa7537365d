"""Command lines: logs are lines that no terminal obeys."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedlp.cli.common import set_up_logging
from fedlp.cli.run import _print_result


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


def test_the_last_line_begins_with_a_metric_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"train_loss": 1.0, "client_loss": 2.0, "client_loss_worst": 3.0, "client_accuracy": 0.5, "rmse": None}
    totals = {"rounds": 1, "bytes_up": 0, "bytes_down": 0}
    _print_result({"final_metrics": metrics, "totals": totals}, Path("out"))
    line = "client_accuracy 0.5000  client_loss 2.0000  client_loss_worst 3.0000  train_loss 1.0000  up 0.00 MB"
    assert capsys.readouterr().out.startswith(line)
