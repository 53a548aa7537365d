"""Options whose keys are the user's: device classes, further options of an optimizer."""

from __future__ import annotations

import pytest

from fedlp.config import compose
from fedlp.errors import ConfigError

PLAN, A = "strategy=fedlp_plan", "{memory_bytes: 2e9, flops: 5e9, uplink_bytes_s: 1e6}"
NEW = [f"fleet.devices={{a: {A}}}", f"+fleet.devices={{a: {A}}}", f"fleet.devices.a={A}"]


@pytest.mark.parametrize(
    "override", [f"{sign}fleet.devices={{a: {A}}}" for sign in ("", "+")] + [f"fleet.devices.a={A}"]
)
def test_device_classes_are_added_to_those_of_the_fleet(override: str) -> None:
    alone, mixed = compose([PLAN, override]).fleet.devices, compose([PLAN, "fleet=mixed", override]).fleet.devices
    assert list(alone) == ["a"]
    assert alone["a"].flops == 5e9
    assert list(mixed) == [*compose([PLAN, "fleet=mixed"]).fleet.devices, "a"]


def test_one_figure_of_a_known_class() -> None:
    devices = compose([PLAN, "fleet=mixed", "fleet.devices.phone.share=0.7", "~fleet.devices.laptop"]).fleet.devices
    assert devices["phone"].share == 0.7
    assert "laptop" not in devices


@pytest.mark.parametrize("override", ["local.optimizer_options={beta2: 0.9}", "local.optimizer_options.beta2=0.9"])
def test_further_options_of_an_optimizer(override: str) -> None:
    assert compose(["local=adam", override]).local.optimizer_options == {"beta2": 0.9}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fleet.devices.phon.share=3", r"fleet.devices has no phon; a new one is .*: fleet.devices=\{phon: \{memory"),
        ("fleet.devices.phone.shar=3", "no option fleet.devices.phone.shar; fleet.devices.phone has memory_bytes, "),
        ("fleet.devices={a: {memory_bytes: 3}}", "fleet.devices.a.flops is missing"),
        ("fleet.devices={a: {memory_bytez: 3}}", "override fleet.devices=.*: Key 'memory_bytez' not in"),
        ("fleet.devices=3", "override fleet.devices=3: Cannot assign int"),
    ],
)
def test_classes_that_cannot_be(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        compose([PLAN, "fleet=mixed", override])
    assert "\n" not in str(caught.value)
    assert "++" not in str(caught.value)
