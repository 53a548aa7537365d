"""``fedlp describe``: options of a sample by which devices and a server know the data without reading them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedlp.config import compose
from fedlp.data.datasets import describe_dataset
from fedlp.data.device_data import describe_for_devices, load_at
from fedlp.errors import ConfigError, DataError
from tests.integration.own_images import write_images
from tests.integration.running import Call, assert_refused

TABLE = """size,kind,owner,target
1.0,"a, b",x,0
3.0,it's,x,1
5.0,"say ""so"" \\",y,1
7.5,true,y,0
"""


def described(call: Call, *sample: str) -> list[str]:
    """Return the overrides that ``fedlp describe`` prints."""
    code, printed, errors = call("describe", *sample)
    assert code == 0, errors
    (line,) = printed.splitlines()
    return shlex.split(line)


def same_facts(overrides: Sequence[str], sample: Sequence[str]) -> None:
    found, asked = describe_for_devices(compose(overrides).dataset), describe_dataset(compose(sample).dataset)
    for name in ("task", "input_shape", "num_classes", "vocabulary"):
        assert getattr(found, name) == getattr(asked, name), name
    np.testing.assert_allclose(found.mean, asked.mean, rtol=1e-5)
    np.testing.assert_allclose(found.std, asked.std, rtol=1e-5)


def write_arrays(path: Path, classes: Sequence[int], shape: tuple[int, ...] = (6, 5, 3)) -> Path:
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.integers(0, 255, (len(classes), *shape), dtype=np.uint8), y=np.array(classes))
    return path


def test_arrays_are_described_and_read_by_the_described_facts(call: Call, tmp_path: Path) -> None:
    sample = ("dataset=arrays", f"dataset.path={write_arrays(tmp_path / 'sample.npz', [0, 1, 2, 1])}")
    overrides = described(call, *sample)
    same_facts(overrides, sample)
    config = compose(overrides).dataset
    info = describe_for_devices(config)
    assert (info.input_shape, info.num_classes) == ((3, 6, 5), 3)
    some = write_arrays(tmp_path / "device.npz", [1, 0, 0])  # fewer classes than the config has
    assert sorted(load_at(config, str(some), info, seed=0).targets.tolist()) == [0, 0, 1]
    with pytest.raises(DataError, match=r"4 classes, but the config says 3"):
        load_at(config, str(write_arrays(tmp_path / "more.npz", [3, 0])), info, seed=0)
    with pytest.raises(DataError, match=r"shape \[3, 7, 4\], but dataset.shape=\[3, 6, 5\]"):
        load_at(config, str(write_arrays(tmp_path / "other.npz", [1, 0], (7, 4, 3))), info, seed=0)


@pytest.mark.parametrize("task", ["regression", "multi_label"])
def test_values_and_labels_of_arrays(call: Call, tmp_path: Path, task: str) -> None:
    targets = np.eye(3, dtype=np.float32 if task == "regression" else np.uint8)
    np.savez(tmp_path / "own.npz", x=np.ones((3, 4), dtype=np.float32), y=targets)
    sample = ("dataset=arrays", f"dataset.path={tmp_path / 'own.npz'}")
    same_facts(described(call, *sample), sample)
    config = compose([*sample, "dataset.num_outputs=4"]).dataset
    with pytest.raises(DataError, match=r"3 outputs, but the config says 4"):
        describe_dataset(config)


def test_tables_with_odd_names_are_described(call: Call, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(TABLE)
    sample = ("dataset=csv", f"dataset.path={tmp_path / 'own.csv'}", "dataset.target=target", "dataset.client=owner")
    overrides = described(call, *sample)
    same_facts(overrides, sample)
    config = compose(overrides).dataset
    categories = config.options["categories"]["kind"]
    assert set(categories) == {"a, b", "it's", 'say "so" \\', "true"}
    examples = load_at(config, str(tmp_path / "own.csv"), describe_for_devices(config), seed=0)
    whole = np.sort(examples.inputs.numpy().sum(axis=1))
    np.testing.assert_allclose(whole, [2.0, 4.0, 6.0, 8.5])  # each row has the indicator of its category


def test_folders_of_images_are_described(call: Call, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "sample", ("red", "blue", "two words"), 2, (9, 7))
    sample = ("dataset=imagefolder", f"dataset.path={folder}", "dataset.size=8")
    overrides = described(call, *sample)
    assert "dataset.size=8" in overrides
    same_facts(overrides, sample)
    assert describe_for_devices(compose(overrides).dataset).labels == ("blue", "red", "two words")


@pytest.mark.parametrize("kind", ["images", "labelled", "text"])
def test_hugging_face_folders_are_described(call: Call, tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "images": {"picture": [Image.new("RGB", (6, 6), (i, 0, 0)) for i in range(4)], "kind": list("abab")},
        "labelled": {"review": ["good one", "bad one"] * 4, "other": ["x"] * 8, "label": ["pos", "neg"] * 4},
        "text": {"text": ["so it goes, and on it goes"] * 4},
    }[kind]
    table = datasets.Dataset.from_dict(rows)
    table.save_to_disk(str(tmp_path / "own"))
    sample = ["dataset=hf", f"dataset.path={tmp_path / 'own'}", "dataset.sequence_length=8", "dataset.size=8"]
    if kind == "images":
        sample.append("dataset.label_column=kind")
    overrides = described(call, *sample)
    same_facts(overrides, sample)
    config = compose(overrides).dataset
    info = describe_for_devices(config)
    assert info.labels == {"images": ("a", "b"), "labelled": ("neg", "pos"), "text": ()}[kind]
    assert len(load_at(config, str(tmp_path / "own"), info, seed=0)) >= 4
    if kind == "labelled":
        table.filter(lambda row: row["label"] == "pos").save_to_disk(str(tmp_path / "some"))
        assert set(load_at(config, str(tmp_path / "some"), info, seed=0).targets.tolist()) == {1}
        datasets.Dataset.from_dict(rows | {"label": ["odd"] * 8}).save_to_disk(str(tmp_path / "odd"))
        with pytest.raises(DataError, match="unknown label odd"):
            load_at(config, str(tmp_path / "odd"), info, seed=0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset=arrays"], "needs dataset.path"),
        (["dataset=arrays", "dataset.shape=[3,8,8]"], "needs dataset.task"),
        (["dataset=arrays", "dataset.shape=[3,8,8]", "dataset.task=classification"], "needs dataset.num_outputs"),
        (["dataset=hf"], "needs dataset.path"),
        (["dataset=hf", "dataset.text_column=text"], "needs dataset.label_column"),
        (["dataset=hf", "dataset.text_column=text", "dataset.label_column=label"], "needs dataset.labels"),
    ],
)
def test_facts_that_the_config_lacks_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"fedlp describe writes them.*{words}"):
        describe_for_devices(compose(overrides).dataset)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.shape=[0,8]"], "sizes of at least 1"),
        (["dataset.num_outputs=0"], "at least 1"),
        (["dataset.labels=[a,a]"], "names a class twice"),
        (["dataset.labels=[a,b]", "dataset.num_outputs=3"], "has 2 names"),
    ],
)
def test_facts_of_arrays_are_checked(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        describe_dataset(compose(["dataset=arrays", *overrides]).dataset)


def test_describe_refuses_what_it_cannot_describe(call: Call) -> None:
    assert_refused(call("describe", "dataset=digits"), "devices cannot bring their own")
    assert_refused(call("describe", "seed=1"), "options of dataset and model alone")
