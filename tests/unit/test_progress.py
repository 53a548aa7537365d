"""The line of progress fits its terminal; the task's metric stands in it."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest

from fedlp import progress
from fedlp.progress import Progress, fit_line

PARTS = ["round 10/20", "accuracy 0.9131", "up 12.34 MB", "3 failed", "1m07s left"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 0


def line(server_round: int, **metrics: float | None) -> dict[str, Any]:
    return {"server_round": server_round, "bytes_up": 10**6, "metrics": metrics, "failures": []}


def test_a_notebook_shows_one_bar() -> None:
    stream = io.StringIO()
    shown = Progress(4, "FedAvg", stream=stream, bar=True)
    for server_round in (1, 2):
        shown.show(line(server_round, accuracy=0.5))
    shown.close()
    first, second = stream.getvalue().removesuffix("\n").split("\r")[1:]
    assert first.startswith("FedAvg: [#####...............]  round 1/4  accuracy 0.5  up 1.00 MB")
    assert second.startswith("FedAvg: [##########..........]  round 2/4")
    assert len(second) >= len(first.rstrip())  # nothing of the longer line is left over
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("width", [200, 80, 60, 40, 20, 10])
def test_a_line_of_any_width(width: int) -> None:
    for label in ("FedAvg", "a label of one's own that says all there is to say about a run"):
        found = fit_line(label, PARTS, width)
        assert len(found) <= width
        assert "round 10/2" in found
        assert width < 40 or "accuracy 0.9131" in found
    assert fit_line("FedAvg", PARTS, 200) == "FedAvg: " + "  ".join(PARTS)


def test_a_narrow_terminal_shows_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((60, 20)))
    stream = Terminal()
    shown = Progress(3, "FedLP-Plan of a long label, dirichlet(0.1), resnet18 on cifar10", stream=stream)
    for i in (1, 2):
        shown.show(line(i, accuracy=0.5, loss=1.0))
    shown.close()
    shown.close()
    text = stream.getvalue()
    assert text.count("\n") == 1  # the run ended before its last round
    assert all(len(part.replace(progress.ERASE_REST, "")) < 60 for part in text.strip("\n").split("\r"))


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"rmse": 0.25, "mae": 0.2, "loss": 0.1}, "rmse 0.25"),
        ({"train_loss": 3.0, "loss": 2.0}, "loss 2"),
        ({"train_loss": 3.0}, "up 1.00 MB"),
        ({"accuracy": None, "loss": None}, "up 1.00 MB"),
    ],
)
def test_the_first_metric_of_the_task(metrics: dict[str, float | None], words: str) -> None:
    stream = io.StringIO()
    Progress(2, "run", stream=stream).show(line(1, **metrics))
    assert stream.getvalue().startswith(f"run: round 1/2  {words}")


@pytest.mark.parametrize(("steps", "words"), [({"0": 0, "3": 3}, "1.5 steps stale"), ({"0": 0}, ""), ({}, "")])
def test_staleness_of_asynchronous_rounds(steps: dict[str, int], words: str) -> None:
    stream = io.StringIO()
    Progress(2, "run", stream=stream).show(line(1, accuracy=0.5) | {"staleness": steps})
    assert ("stale" in stream.getvalue()) == bool(words)
    assert words in stream.getvalue()


def test_metrics_of_clients_stand_before_their_losses() -> None:
    stream = io.StringIO()
    Progress(3, "FedAvg", stream=stream).show(line(1, client_loss=2.0, client_accuracy=0.5, train_loss=1.0))
    assert "round 1/3  client_accuracy 0.5  up" in stream.getvalue()
    Progress(3, "FedAvg", stream=stream).show(line(1, client_loss=2.0))
    assert "round 1/3  client_loss 2  up" in stream.getvalue()
