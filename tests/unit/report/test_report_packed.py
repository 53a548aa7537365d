"""Packing run directories into one file, reading it, and damage to it."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlp.errors import DataError
from fedlp.report import default_report_dir, find_runs, group_runs, pack_runs, summary_table, unpack_runs, write_report

WriteRun = Callable[..., Path]


@pytest.fixture
def sweep(write_run: WriteRun, tmp_path: Path) -> Path:
    """Return a folder of three runs: two seeds of one method, and one that was stopped before its manifest."""
    for seed in (2, 10):
        write_run(f"sweep/homo/seed-{seed}", seed=seed, strategy__name="fedlp_homo")
    (write_run("sweep/fedavg/seed-2", stop_after=2) / "manifest.json").unlink()
    return tmp_path / "sweep"


@pytest.fixture
def packed(sweep: Path, tmp_path: Path) -> Path:
    """Return the packed sweep."""
    file = tmp_path / "sweep.runs.jsonl.xz"
    assert pack_runs(sweep, file) == 3
    return file


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lzma.decompress(file.read_bytes()).splitlines()]


def test_a_packed_folder_reads_as_the_folder(sweep: Path, packed: Path) -> None:
    loose, tight = find_runs([sweep]), find_runs([packed])
    assert [run.path.relative_to(packed) for run in tight] == [run.path.relative_to(sweep) for run in loose]
    assert [str(run.path.relative_to(sweep)) for run in loose] == ["fedavg/seed-2", "homo/seed-2", "homo/seed-10"]
    for name in ("config", "rounds", "manifest", "totals", "finished"):
        assert [getattr(run, name) for run in tight] == [getattr(run, name) for run in loose]
    assert summary_table(group_runs(tight)) == summary_table(group_runs(loose))


def test_unpacking_gives_the_same_files(sweep: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert unpack_runs(packed, out) == 3
    files = {path.relative_to(sweep) for path in sweep.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == files
    for file in files:
        was, now = (sweep / file).read_text(), (out / file).read_text()
        assert json.loads(was) == json.loads(now) if file.suffix == ".json" else was == now
    again = tmp_path / "again.runs.jsonl.xz"
    pack_runs(out, again)
    assert again.read_bytes() == packed.read_bytes()


def test_one_run_is_packed_by_its_name(sweep: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.runs.jsonl.xz"
    assert pack_runs(sweep / "homo" / "seed-10", file) == 1
    assert [line["run"] for line in lines_of(file)] == ["seed-10"]


def test_a_folder_of_packed_files_is_searched(packed: Path, write_run: WriteRun, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    packed.rename(folder / packed.name)
    write_run("results/alone", seed=5)
    names = [str(run.path.relative_to(folder)) for run in find_runs([folder, folder / packed.name])]
    assert names == ["alone", *(f"{packed.name}/{name}" for name in ("fedavg/seed-2", "homo/seed-2", "homo/seed-10"))]


def test_a_report_on_a_packed_file_stands_beside_it(packed: Path) -> None:
    out = default_report_dir(packed)
    assert out == packed.parent / "report-sweep"
    assert default_report_dir(packed.parent) == packed.parent / "report"
    assert f"{packed.name}/homo/seed-10" in write_report([packed], out).read_text(encoding="utf-8")


def test_nothing_is_packed_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run in"):
        pack_runs(tmp_path, tmp_path / "none.runs.jsonl.xz")
    assert not list(tmp_path.iterdir())


def test_another_suffix_is_refused(sweep: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is named NAME\.runs\.jsonl\.xz"):
        pack_runs(sweep, tmp_path / "sweep.xz")
    with pytest.raises(DataError, match=r"neither a run directory nor a file of packed runs \(\*\.runs\.jsonl\.xz\)"):
        find_runs([packed.rename(tmp_path / "sweep.xz")])


def _edit(edit: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        lines = lines_of(file)
        edit(lines)
        file.write_bytes(lzma.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))

    return damage


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, r"xz is damaged: it is not a whole xz file"),
        (lambda file: file.write_bytes(b"seed: 0\n" * 9), r"xz is damaged: it is not a whole xz file"),
        (lambda file: file.write_bytes(lzma.compress(b"")), r"xz is damaged: it holds no run"),
        (lambda file: file.write_bytes(lzma.compress(b"{\n")), r"xz, line 1 is damaged: it is not JSON"),
        (lambda file: file.write_bytes(lzma.compress(b"[]\n")), r"xz, line 1 is damaged: it holds list where an"),
        (_edit(lambda lines: lines[1].pop("rounds.jsonl")), r"xz, line 2 is damaged: it has no rounds\.jsonl"),
        (
            _edit(lambda lines: lines[2].update(run="homo/seed-2")),
            r"xz, line 3 is damaged: it repeats the run homo/see",
        ),
        (_edit(lambda lines: lines[0].update({"config.yaml": 3})), r"xz, line 1 is damaged: config\.yaml is not text"),
        (_edit(lambda lines: lines[0].update({"rounds.jsonl": {}})), r"xz, line 1 is damaged: rounds\.jsonl is not a"),
        (
            _edit(lambda lines: lines[1].update({"manifest.json": 3})),
            r"homo/seed-2/manifest\.json is damaged: it holds",
        ),
        (
            _edit(lambda lines: lines[2]["rounds.jsonl"][4].update(bytes_up=-5)),
            r"homo/seed-10/rounds\.jsonl, line 5: bytes_up is -5",
        ),
        (
            _edit(lambda lines: lines[0].update({"config.yaml": "seed: [0"})),
            r"fedavg/seed-2/config\.yaml, line 1 is damaged: it is not YAML",
        ),
    ],
)
def test_damage_is_named_in_one_line(packed: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(packed)
    with pytest.raises(DataError, match=words) as caught:
        find_runs([packed])
    assert "\n" not in str(caught.value)
    assert str(packed) in str(caught.value)


@pytest.mark.parametrize("name", ["../out", "/etc/run", "a//b", "", ".", "a\\b", "a\nb", 7, None])
def test_names_that_lead_elsewhere_are_refused(packed: Path, tmp_path: Path, name: object) -> None:
    _edit(lambda lines: lines[1].update(run=name))(packed)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"line 2: the run's name is .* not a path below the packed folder"):
        unpack_runs(packed, tmp_path / "in" / "out")
    assert sorted(tmp_path.rglob("*")) == before
