"""Whatever causal language model plain transformers trains: federated with FedAvg and FedLP-Homo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlp.models.language import import_transformers
from tests.integration.running import run

SIZES = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {"intermediate_size": 24, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": LLAMA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
    "granitemoe": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": SIZES | {"ffn_hidden_size": 24},
    "phi": LLAMA,
    "gpt_neox": SIZES | {"intermediate_size": 24},
    "mpt": {"vocab_size": 256, "d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "mamba": {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
RUN = (
    *("model=hf", "dataset=topics", "dataset.sequence_length=24", "dataset.max_train_examples=12"),
    *("dataset.max_test_examples=4", "num_clients=3", "clients_per_round=3", "local.batch_size=4"),
    *("simulation.workers=1", "upload=float32"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of fresh weights per family."""
    transformers, root = import_transformers(), tmp_path_factory.mktemp("families")
    for family, sizes in FAMILIES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes, bos_token_id=None, eos_token_id=None)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_fedavg(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options = (*RUN, f"model.path={folders[family]}", "num_rounds=1", "strategy=fedavg", "local.lr=0.3")
    done = run(tmp_path / "run", *options)
    assert not done.failures
    before = run(tmp_path / "still", *options[:-1], "local.lr=1e-9").rounds[-1]["metrics"]["loss"]
    assert done.rounds[-1]["metrics"]["loss"] < before


def test_layers_of_a_mixture_of_experts_are_drawn(folders: dict[str, Path], tmp_path: Path) -> None:
    options = (*RUN, f"model.path={folders['mixtral']}", "num_rounds=1", "strategy=fedlp_homo")
    done = run(tmp_path, *options, "strategy.layer_preserving_rate=0.5")
    assert not done.failures
    assert 0 < done.rounds[0]["bytes_up"] < 0.9 * done.rounds[0]["bytes_down"]
