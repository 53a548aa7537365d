from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlp.config import DatasetConfig, PartitionConfig
from fedlp.config.parts import read_part
from fedlp.data.datasets import IGNORE_INDEX, Examples, FederatedData, describe_dataset, load_dataset, make_reader
from fedlp.data.documents import split_documents
from fedlp.data.partition import partition_examples
from fedlp.data.text import count_windows, split_lengths
from fedlp.errors import ConfigError, DataError
from fedlp.rng import Stream, generator

PLAY = "ANNA:\nOne.\n\nBen:\nTwo.\nThree.\n\nAside.\n\nANNA:\nFour."


def dataset(**options: object) -> DatasetConfig:
    return read_part(DatasetConfig, "dataset", options)


def read_documents(config: DatasetConfig) -> list[str]:
    return make_reader(config).read_documents()  # type: ignore[attr-defined, no-any-return]


def rebuild(examples: Examples, document: int) -> list[int]:
    """Join a document's windows: each but the first begins with the token that the last one ended with."""
    rows = examples.inputs[examples.targets == document].tolist()
    tokens = rows[0][:1] if rows else []
    for row in rows:
        tokens += [token for token in row[1:] if token != IGNORE_INDEX]
    return tokens


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def load_file(path: Path, text: str, seed: int = 0, **change: object) -> FederatedData:
    root = write(path, text)
    return load_dataset(dataset(name="text", root=root, **change), seed)


def test_windows_rebuild_the_documents(tmp_path: Path) -> None:
    texts = ["".join(chr(97 + (i * j) % 26) for j in range(40 * i)) for i in range(1, 9)] + ["naïve café"]
    data = load_file(tmp_path / "a.txt", "\n\n".join(texts), sequence_length=16, test_fraction=0.3)
    for document, text in enumerate(texts):
        joined = rebuild(data.train, document) + rebuild(data.test, document)
        assert bytes(joined).decode() == text
    assert data.train.inputs.shape[1] == data.test.inputs.shape[1] == 17
    assert np.array_equal(data.train.groups, data.train.targets.numpy())
    assert len(data.test) / (len(data.train) + len(data.test)) == pytest.approx(0.3, abs=0.1)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=12).map(np.array),
    sequence_length=st.integers(2, 20),
    test_fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_both_parts_have_windows_and_share_no_token(
    lengths: np.ndarray, sequence_length: int, test_fraction: float, seed: int
) -> None:
    windows = count_windows(lengths, sequence_length)
    assert windows.tolist() == [len(range(0, n - 1, sequence_length)) for n in lengths]
    rng = generator(seed, Stream.DATA)
    if windows.sum() < 2:
        with pytest.raises(DataError, match="too few"):
            split_lengths(lengths, sequence_length, test_fraction, rng)
        return
    cuts = split_lengths(lengths, sequence_length, test_fraction, rng)
    assert ((cuts >= 0) & (cuts <= lengths)).all()
    assert count_windows(cuts, sequence_length).sum() >= 1
    assert count_windows(lengths - cuts, sequence_length).sum() >= 1
    if windows.sum() - len(windows) >= test_fraction * windows.sum():
        assert (count_windows(cuts, sequence_length) >= 1).all()  # every document keeps an owner


def test_held_out_fraction_is_met_on_average() -> None:
    for lengths in (np.full(2000, 640), np.full(2000, 50)):  # ends of documents, whole documents
        cuts = split_lengths(lengths, 64, 0.2, generator(0, Stream.DATA))
        held_out = count_windows(lengths - cuts, 64).sum() / count_windows(lengths, 64).sum()
        assert held_out == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(
    ("texts", "mode", "same_as"),
    [
        (["x <|endoftext|>\ny", "z"], ["x", "y", "z"], "separator"),
        ([PLAY], ["ANNA:\nOne.\n\nANNA:\nFour.", "Ben:\nTwo.\nThree.\n\nAside."], "speaker"),
        (["one\ntwo\n \nthree: four\n"], ["one\ntwo", "three: four"], "paragraph"),
        (["one\n\ntwo", "three"], ["one\n\ntwo", "three"], "file"),
    ],
)
def test_auto_guesses(texts: list[str], mode: list[str], same_as: str) -> None:
    assert split_documents(texts, "auto") == split_documents(texts, same_as) == mode


def test_lines_and_files() -> None:
    assert split_documents(["a\n\n b\n", "", "c"], "line") == ["a", " b", "c"]
    assert split_documents([PLAY], "file") == [PLAY]
    assert len(split_documents([PLAY, PLAY], "speaker")) == 4
    with pytest.raises(ConfigError, match=r"dataset.documents is 'verse'; choose one of auto, file"):
        split_documents(["a"], "verse")


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "bee")
    write(tmp_path / "deep" / "a.txt", "ay")
    write(tmp_path / "c[1].txt", "see")
    write(tmp_path / "d.md", "dee")

    def read(root: Path) -> list[str]:
        return read_documents(dataset(name="text", root=str(root)))

    assert read(tmp_path / "b.txt") == ["bee"]
    assert read(tmp_path / "c[1].txt") == ["see"]
    assert read(tmp_path) == ["bee", "see", "ay"]
    assert read(tmp_path / "?.*") == ["bee", "dee"]


@pytest.mark.parametrize("name", ["no.txt", "folder", "latin.txt", "blank.txt"])
def test_unusable_files_are_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    write(tmp_path / "blank.txt", " \n\n")
    with pytest.raises(DataError) as error:
        load_dataset(dataset(name="text", root=str(tmp_path / name)), 0)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few for a training and a test window"):
        load_file(tmp_path / "a.txt", "short")
    with pytest.raises(DataError, match="no document has two tokens"):
        load_file(tmp_path / "a.txt", "a\nb", documents="line")


@pytest.mark.parametrize("name", ["text", "hf"])
def test_a_source_is_needed(name: str) -> None:
    with pytest.raises(ConfigError, match=f"dataset={name} needs dataset"):
        load_dataset(dataset(name=name), 0)


def test_topics_need_nothing_and_give_every_topic_an_owner() -> None:
    config = dataset(name="topics")
    info = describe_dataset(config)
    assert (info.task, info.input_shape, info.num_classes) == ("causal_lm", (128,), 256)
    assert (info.num_train, info.num_test, info.mean, info.std) == (None, None, (), ())
    data = load_dataset(config, 0)
    assert data.info == info
    num_topics = len(read_documents(config))
    parts = partition_examples(read_part(PartitionConfig, "partition", {"name": "natural"}), data.train, num_topics, 0)
    assert all(len(set(data.train.targets[part].tolist())) == 1 for part in parts)
    assert len(data.test) / (len(data.test) + len(data.train)) == pytest.approx(0.1, abs=0.02)


def test_truncation_keeps_a_seeded_subset_in_order(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) * 7 for i in range(300))
    whole = load_file(tmp_path / "a.txt", text, sequence_length=8)
    few = load_file(tmp_path / "a.txt", text, sequence_length=8, max_train_examples=20, max_test_examples=5)
    other = load_file(tmp_path / "a.txt", text, seed=1, sequence_length=8, max_train_examples=20)
    assert (len(few.train), len(few.test)) == (20, 5)
    rows = {tuple(row) for row in whole.train.inputs.tolist()}
    assert all(tuple(row) in rows for row in few.train.inputs.tolist())
    assert not np.array_equal(few.train.inputs, other.train.inputs)


def test_bad_values() -> None:
    for change in ({"sequence_length": 1}, {"augment": True}, {"max_test_examples": 0}, {"test_fraction": 1.0}):
        with pytest.raises(ConfigError, match=f"dataset.{next(iter(change))}"):
            dataset(name="topics", **change)


def test_an_absent_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot load dataset\.tokenizer=") as error:
        describe_dataset(dataset(name="topics", tokenizer=str(tmp_path / "none")))
    assert "\n" not in str(error.value)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_hub_folders(hub_cache: Path) -> None:
    import datasets

    texts = ["first " * 9, "", "second " * 9]
    folder = hub_cache / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"story": text, "n": 1}) + "\n" for text in texts))
    table = datasets.Dataset.from_dict({"story": texts, "n": [1, 2, 3]})
    table.save_to_disk(hub_cache / "saved")
    datasets.DatasetDict({"train": table, "rest": table.select([0])}).save_to_disk(hub_cache / "splits")
    for name in ("files", "saved", "splits"):
        config = dataset(name="hf", path=str(hub_cache / name), text_column="story", sequence_length=16)
        assert read_documents(config) == [texts[0], texts[2]]
    data = load_dataset(config, 0)
    assert len(np.unique(data.train.groups)) == 2


def test_hub_failures_are_one_line(hub_cache: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"story": ["a b c"], "n": [1]}).save_to_disk(hub_cache / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [" "]})}).save_to_disk(hub_cache / "splits")
    for change, message in (
        ({"path": "saved", "text_column": "text"}, "has no column 'text'; set dataset.text_column to one of story, n"),
        ({"path": "saved", "text_column": "n"}, "holds no text"),
        ({"path": "splits", "split": "dev"}, "cannot load .*splits .*dev"),
        ({"path": "none"}, "cannot load .*none"),
    ):
        config = dataset(name="hf", **(change | {"path": str(hub_cache / change["path"])}))
        with pytest.raises(DataError, match=message) as error:
            load_dataset(config, 0)
        assert "\n" not in str(error.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_dataset(dataset(name="hf", path="anything"), 0)


@pytest.mark.shared
def test_shakespeare_has_299_speakers(shared: Path) -> None:
    data = load_dataset(dataset(name="text", root=str(shared / "text/tinyshakespeare.txt")), 0)
    assert len(np.unique(data.train.groups)) == 299
    assert (
        len(partition_examples(read_part(PartitionConfig, "partition", {"name": "natural"}), data.train, 299, 0)) == 299
    )
    assert len(data.train) + len(data.test) > 8000


@pytest.mark.shared
def test_stories_and_their_tokenizer(shared: Path) -> None:
    config = dataset(
        name="text", root=str(shared / "text/tinystories.txt"), tokenizer=str(shared / "models/stories260K")
    )
    assert describe_dataset(config).num_classes == 512
    data = load_dataset(config, 0)
    stories = read_documents(config)
    assert len(stories) == len(np.unique(data.train.groups)) == 2317  # 2,316 and the beginning of one more
    assert int(data.train.inputs.max()) < 512

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    for story in (0, 1000, 2316):
        tokens = rebuild(data.train, story) + rebuild(data.test, story)
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == stories[story]


@pytest.mark.shared
def test_wikitext_falls_into_paragraphs(shared: Path) -> None:
    documents = read_documents(dataset(name="text", root=str(shared / "text/wikitext2-valid.txt")))
    assert documents[0] == "= Homarus gammarus = "
    assert len(documents) == 1160
