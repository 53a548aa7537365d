"""Memory of the server stays flat over many rounds, whatever the clients choose."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from fedlp.apps import runs as assembly
from fedlp.config import compose, to_yaml
from fedlp.federation import submodels
from fedlp.types import RoundRecord
from tests.hostile.instant_clients import InstantClient, InstantGrid

PLAIN = (
    *("model=cifar_resnet", "dataset=digits", "dataset.max_train_examples=160", "dataset.max_test_examples=8"),
    *("num_clients=8", "clients_per_round=8", "checkpoint_every=1000", "eval_every=1000"),
)
CASES = {
    "clients choose units": (
        "strategy=fedlp_plan",
        "strategy.unit_selection=client",
        "strategy.sparsity=0.5",
        "upload=float32",
        "upload.values=weights",
    ),
    "draws of layers change": ("strategy=fedlp_homo", "strategy.layer_preserving_rate=0.5"),
    "windows move": ("strategy=fedrolex",),
}
WARM, ROUNDS = 40, 240


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_memory_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submodels, "_CACHE_BYTES", 1 << 22)  # so that it is full soon
    grown = {case: growth(tmp_path / case, *CASES[case]) for case in CASES}
    assert all(more < 8e6 for more in grown.values()), grown


def growth(folder: Path, *overrides: str) -> int:
    """Return how many bytes more the server holds after ROUNDS rounds than after WARM rounds."""
    config = compose((*PLAIN, *overrides, f"num_rounds={ROUNDS}"))
    cfg = to_yaml(config)
    seen: dict[int, int] = {}

    def watch(record: RoundRecord, _: object) -> None:
        assert not record.failures
        if record.server_round in (WARM, ROUNDS - 1):
            seen[record.server_round] = resident()

    assembly.serve_run(InstantGrid(config.num_clients, InstantClient(cfg)), cfg, folder, [watch])
    return seen[ROUNDS - 1] - seen[WARM]
