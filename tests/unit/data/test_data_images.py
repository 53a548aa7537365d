"""Folders of images: decoded once, whatever their sizes; classes, clients and damage are found by name."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fedlp.config import DatasetConfig
from fedlp.config.parts import read_part
from fedlp.data import image_cache
from fedlp.data.datasets import describe_dataset, load_dataset
from fedlp.data.examples import FederatedData, Rows
from fedlp.data.image_cache import Frame
from fedlp.errors import ConfigError, DataError
from fedlp.progress import Counter

COLORS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}


def dataset(**options: object) -> DatasetConfig:
    return read_part(DatasetConfig, "dataset", {"name": "imagefolder", "size": 16, **options})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedlp" / "images"


def write_folder(root: Path, count: int = 12, names: tuple[str, ...] = tuple(COLORS)) -> Path:
    """Write images of one colour a class, of different sizes and formats; the writer's name is in the file's."""
    rng = np.random.default_rng(0)
    for number in range(count):
        name = names[number % len(names)]
        size = tuple(int(x) for x in rng.integers(10, 60, 2))
        kind = ("png", "jpg", "JPEG")[number % 3]
        path = root / name / f"w{number % 4}_{number:03}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, COLORS[name]).save(path, quality=95)
    (root / names[0] / "notes.txt").write_text("no image")
    return root


def colors_of(data: FederatedData) -> list[tuple[int, ...]]:
    rows = data.train.inputs.index_select(0, torch.arange(len(data.train)))
    return [tuple(map(int, row.float().mean(dim=(1, 2)).round())) for row in rows]


def test_classes_are_folders_and_images_of_any_size_become_one(tmp_path: Path) -> None:
    config = dataset(path=str(write_folder(tmp_path / "images")), test_fraction=0.25)
    info = describe_dataset(config)
    assert (info.task, info.input_shape, info.num_classes, info.labels) == (
        "classification",
        (3, 16, 16),
        3,
        ("ant", "bee", "cat"),
    )
    assert info.mean == (0.485, 0.456, 0.406)
    data = load_dataset(config, 0)
    assert (len(data.train), len(data.test)) == (9, 3)
    assert sorted(data.test.targets.tolist()) == [0, 1, 2]  # classes are held out in proportion
    for color, label in zip(colors_of(data), data.train.targets.tolist(), strict=True):
        assert np.allclose(color, list(COLORS.values())[label], atol=6)  # JPEG
    assert torch.equal(load_dataset(config, 0).train.inputs[:9], data.train.inputs[:9])
    means = [load_dataset(config, seed).train.inputs[:9].float().mean() for seed in range(6)]
    assert len(set(means)) > 1  # the split follows the seed


def test_images_are_decoded_once_and_stay_in_their_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataset(path=str(write_folder(tmp_path / "images")))
    first = load_dataset(config, 0)
    assert isinstance(first.train.inputs, Rows)
    chosen = first.train.select(np.array([3, 1]))
    assert isinstance(chosen.inputs, Rows)
    assert torch.equal(chosen.inputs[:2], first.train.inputs.index_select(0, torch.tensor([3, 1])))
    assert [file.stat().st_size for file in cache.rglob("pixels.u8")] == [12 * 3 * 16 * 16]

    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_cache, "_decode", refuse)
    assert torch.equal(load_dataset(config, 0).train.inputs[:9], first.train.inputs[:9])
    with pytest.raises(AssertionError, match="decoded again"):  # at another size
        load_dataset(dataset(path=config.path, size=8), 0)
    Image.new("RGB", (9, 9)).save(tmp_path / "images/ant/w0_000.png")
    with pytest.raises(AssertionError, match="decoded again"):  # a file has changed
        load_dataset(config, 0)


def test_train_and_test_folders_are_the_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "images/train", 12)
    write_folder(tmp_path / "images/val", 6, ("bee", "cat"))
    data = load_dataset(dataset(path=str(tmp_path / "images")), 0)
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.info.labels == ("ant", "bee", "cat")
    assert set(data.test.targets.tolist()) == {1, 2}
    few = load_dataset(dataset(path=str(tmp_path / "images"), max_train_examples=5, max_test_examples=2), 0)
    assert (len(few.train), len(few.test)) == (5, 2)


def test_a_pattern_names_the_clients(tmp_path: Path) -> None:
    config = dataset(path=str(write_folder(tmp_path / "images", 24)), client_pattern=r"(w\d)_", test_fraction=0.1)
    groups = load_dataset(config, 0).train.groups
    assert groups is not None
    assert set(groups.tolist()) == {0, 1, 2, 3}
    with pytest.raises(DataError, match=r"ant/w0_000\.png does not match dataset\.client_pattern=z"):
        load_dataset(dataset(path=config.path, client_pattern="z"), 0)


def test_proportions_are_kept_unless_stretched() -> None:
    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    wide.paste((255, 255, 255), (0, 0, 10, 20))  # the first quarter is white
    cropped, stretched = (Frame(10, 10, 1, fit).pixels(wide) for fit in ("crop", "stretch"))
    assert cropped.shape == stretched.shape == (1, 10, 10)
    assert cropped[:, :, 1:].max() == 0  # only the middle half is kept
    assert 50 < stretched.mean() < 80
    assert Frame(20, 40, 3).pixels(wide).shape == (3, 20, 40)
    assert np.array_equal(Frame(20, 40, 3).pixels(wide), np.asarray(wide).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs dataset.path: a folder"),
        ({"path": "absent"}, "no folder absent"),
        ({"path": "empty"}, "holds no folder"),
        ({"path": "bare"}, "holds 0 images"),
        ({"path": "images", "labels": ["ant", "bee"]}, "4 images of the unknown class cat; the classes are ant, bee"),
        ({"path": "damaged"}, r"image bee/broken\.png cannot be decoded \(UnidentifiedImageError.*repair or delete it"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    options: dict[str, object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("images"))
    write_folder(Path("damaged"))
    Path("damaged/bee/broken.png").write_bytes(b"no image")
    Path("empty").mkdir()
    Path("bare/ant").mkdir(parents=True)
    with pytest.raises((DataError, ConfigError), match=words) as error:
        load_dataset(dataset(**options), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "at least 1 pixel"),
        ({"size": [3]}, r"one number of pixels or \[height, width\]"),
        ({"channels": 2}, "must be 1 or 3"),
        ({"fit": "pad"}, "one of crop, stretch"),
        ({"mean": [0.5]}, "must be 3 finite numbers"),
        ({"std": [1, 1, 0]}, "above 0"),
        ({"labels": ["a", "a"]}, "twice"),
        ({"client_pattern": "("}, "no regular expression"),
        ({"padding": -1}, "padding"),
    ],
)
def test_values_out_of_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataset(path="x", **options)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"decoded images cannot be kept in .*set XDG_CACHE_HOME"):
        load_dataset(dataset(path=str(write_folder(tmp_path / "images"))), 0)


def test_images_of_hugging_face(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images")
    paths = [str(path) for path in sorted(folder.rglob("*")) if path.suffix != ".txt" and path.is_file()]
    columns = {"picture": paths, "kind": [Path(path).parent.name for path in paths], "label": [0, 1, 2] * 4}
    features = {"picture": datasets.Image(), "kind": datasets.Value("string"), "label": datasets.ClassLabel(3)}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.save_to_disk(tmp_path / "saved")
    config = dataset(name="hf", path=str(tmp_path / "saved"), label_column="kind", test_fraction=0.25)
    data = load_dataset(config, 0)
    assert (data.info.labels, data.info.input_shape) == (("ant", "bee", "cat"), (3, 16, 16))
    for color, label in zip(colors_of(data), data.train.targets.tolist(), strict=True):
        assert np.allclose(color, list(COLORS.values())[label], atol=6)
    found = describe_dataset(dataset(name="hf", path=config.path))  # a ClassLabel, found by its type
    assert found.labels == ("0", "1", "2")
    datasets.DatasetDict({"train": table, "test": table.select([0, 1])}).save_to_disk(tmp_path / "splits")
    both = load_dataset(dataset(name="hf", path=str(tmp_path / "splits")), 0)
    assert (len(both.train), len(both.test)) == (12, 2)
    with pytest.raises(DataError, match=r"has images but no label; set dataset\.label_column to one of picture, kind"):
        load_dataset(dataset(name="hf", path=config.path, label_column=None), 0)
    with pytest.raises(DataError, match="has the unknown label cat; the labels are ant, bee"):
        load_dataset(dataset(name="hf", path=config.path, label_column="kind", labels=["ant", "bee"]), 0)


def test_progress_is_counted() -> None:
    stream = io.StringIO()
    with Counter("decoding", 3, stream) as counter:
        counter._every = 0.0
        for _ in range(3):
            counter.advance()
    assert stream.getvalue().splitlines()[-1] == "decoding: 3 of 3, 0s left"


@pytest.mark.slow
def test_ten_thousand_images_are_decoded_within_a_minute(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (256, 320, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=80)
    for number in range(10_000):
        path = tmp_path / "images" / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    data = load_dataset(dataset(path=str(tmp_path / "images"), size=64), 0)
    assert len(data.train) + len(data.test) == 10_000
    shutil.rmtree(tmp_path / "images")
