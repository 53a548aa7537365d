"""Devices that bring a budget of their own: it counts instead of what the config's fleet says."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message

from fedlp.apps import runs as assembly
from fedlp.errors import ConfigError
from tests.integration.running import TINY, App, run

SMALL = (*TINY, "num_clients=3", "clients_per_round=3", "aggregator.batch_norm=average")
HONEST = assembly.client_app


def bringing(folder: Path, text: str, client: int | None = 1) -> App:
    """Return the clients' app, in which one client's node, or all, name a budget file."""
    path = folder / "budget.yaml"
    path.write_text(text)

    def app(message: Message, context: Context) -> Message:
        if client in (None, context.node_config["partition-id"]):
            context.node_config["budget"] = str(path)
        return HONEST(message, context)

    return app


def params_down(line: dict) -> dict[int, int]:  # type: ignore[type-arg]
    return {cost["client_id"]: cost["params_down"] for cost in line["clients"]}


@pytest.mark.parametrize("strategy", ["fedlp", "heterofl"])
def test_a_client_gets_no_more_than_the_budget_that_it_brings(tmp_path: Path, strategy: str) -> None:
    widths = ("strategy.widths=[1.0,0.5,0.25]",) if strategy == "heterofl" else ("strategy.sparsity=0",)
    case = (*SMALL, f"strategy={strategy}", *widths)
    app = bringing(tmp_path, "params: 60000")
    done = run(tmp_path / "run", *case, app=app)
    assert done.failures == []
    for line in done.rounds:
        down = params_down(line)
        assert 0 < down[1] <= 60000 < down[0]
        if strategy == "fedlp":  # in heterofl a level is drawn for those without a budget
            assert down[0] == down[2]


def test_a_client_may_have_to_hold_little_and_send_less(tmp_path: Path) -> None:
    app = bringing(tmp_path, "params: 40000\nupload_bytes: 20000")
    done = run(tmp_path / "run", *SMALL, "strategy=fedlp_plan", "strategy.refresh_every=1", app=app)
    assert done.failures == []
    for line in done.rounds:
        assert 0 < params_down(line)[1] <= 40000
        assert {cost["client_id"]: cost["bytes_up"] for cost in line["clients"]}[1] < 25000
    assert len(done.rounds) > 1  # in the second the units have scores


def test_a_budget_that_is_brought_goes_before_that_of_the_fleet(tmp_path: Path) -> None:
    case = (*SMALL, "strategy=fedlp_plan", "strategy.sparsity=0", "fleet=tiers", "fleet.fractions=[0.5]")
    done = run(tmp_path / "run", *case, "fleet.limited=[params]", app=bringing(tmp_path, "params: 60000"))
    down = params_down(done.rounds[0])
    assert down[1] <= 60000 < down[0] == down[2]


def test_a_device_whose_budget_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = run(tmp_path / "run", *SMALL, "strategy=fedavg", app=bringing(tmp_path, "macs: many"))
    assert [line["cohort"] for line in done.rounds] == [[0, 2]] * 2
    assert "cannot take part" in caplog.text
    assert "macs='many'" in caplog.text


def test_a_client_whose_limit_on_uploads_does_not_go_with_noise_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = (word for word in SMALL if "model" not in word)
    private = ("model=small_cnn", "strategy=fedavg", "privacy=local_dp")
    done = run(tmp_path / "run", *plain, *private, app=bringing(tmp_path, "upload_bytes: 9"))
    assert [line["cohort"] for line in done.rounds] == [[0, 2]] * 2
    assert "node 2 cannot take part: client 1 brought a limit on uploads" in caplog.text


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl", "fedlp"])
def test_a_budget_out_of_reach_costs_its_client_the_rounds_and_nobody_else(tmp_path: Path, strategy: str) -> None:
    done = run(tmp_path / "run", *SMALL, f"strategy={strategy}", app=bringing(tmp_path, "params: 1.0e-300"))
    for line in done.rounds:
        assert {cost["client_id"] for cost in line["clients"]} == {0, 2}
        assert set(line["cohort"]) - {failure["client_id"] for failure in line["failures"]} == {0, 2}


def test_budgets_that_are_all_out_of_reach_end_the_run_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client \d has a budget of 0 params, but the smallest"):
        run(
            tmp_path / "run",
            *(*SMALL, "strategy=heterofl", "num_clients=2", "clients_per_round=2"),
            app=bringing(tmp_path, "params: 0.1", None),
        )
