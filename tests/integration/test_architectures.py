"""Vision transformers in a round: whole clients score heads as narrow ones do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.running import run

NETS = """
from torch import nn

from fedlp.models.language import import_transformers
from fedlp.models.torchvision_compat import import_torchvision


def vit(num_classes):
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 16, "mlp_dim": 64, "num_classes": num_classes}
    model = import_torchvision().models.VisionTransformer(image_size=8, patch_size=2, **sizes)
    model.conv_proj = nn.Conv2d(1, 16, 2, 2)
    return model


def swin(num_classes):
    sizes = {"mlp_ratio": 4.0, "num_classes": num_classes}
    model = import_torchvision().models.swin_transformer.SwinTransformer([2, 2], 16, [2], [4], [3, 3], **sizes)
    model.features[0][0] = nn.Conv2d(1, 16, 2, 2)
    return model


def swin_of_transformers(num_classes):
    import transformers  # as a user would, whatever torchvision is built for

    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "embed_dim": 16, "depths": [2], "num_heads": [4]}
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(**sizes, window_size=3, num_labels=num_classes)
    )


def resnet_of_transformers(num_classes):
    transformers = import_transformers()
    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=num_classes))
"""
SMALL = (
    *("num_clients=4", "clients_per_round=4", "num_rounds=1", "simulation.workers=1", "local.batch_size=8"),
    *("dataset.max_train_examples=80", "dataset.max_test_examples=20", "pruner=wanda"),
)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets_of_heads.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "swin_of_transformers")]


@pytest.mark.parametrize("name", ["swin", *SLOW])
def test_heads_are_scored_by_whole_and_by_narrow_clients(name: str, nets: Path) -> None:
    plan = ("strategy=fedlp_plan", "strategy.spread=allocator", "fleet=tiers", "fleet.fractions=[1.0,0.8]")
    done = run(nets / "run", f"model=nets_of_heads:{name}", *SMALL, *plan)
    assert done.failures == []
    held = {client["params_down"] for client in done.rounds[0]["clients"]}
    assert len(held) == 2
    assert min(held) <= 0.8 * max(held)


@pytest.mark.slow
def test_an_image_classifier_of_transformers_without_rules_trains_whole(nets: Path) -> None:
    done = run(nets / "run", "model=nets_of_heads:resnet_of_transformers", *SMALL[:-1], "strategy=fedlp_homo")
    assert done.failures == []
