"""The registry: names, ``module:object``, entry points, and what is said where there is none."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from fedlp import registry
from fedlp.errors import ConfigError


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PARTS", dict(registry._PARTS))


def test_a_registered_part_is_found_by_its_name() -> None:
    @registry.register("allocator", "mine")
    class Mine:
        """One line."""

    assert registry.lookup("allocator", "mine") is Mine
    assert "mine" in registry.names("allocator")
    assert registry.summary(Mine) == "One line."


def test_a_name_is_not_given_twice() -> None:
    registry.register("allocator", "mine")(dict)
    with pytest.raises(ConfigError, match="allocator mine is registered already, by builtins"):
        registry.register("allocator", "mine")(list)


def test_an_object_of_a_module_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_my_own.py").write_text("class Rule:\n    pass\nvalue = 3\n")
    monkeypatch.chdir(tmp_path)
    assert registry.lookup("allocator", "of_my_own:Rule").__name__ == "Rule"
    with pytest.raises(ConfigError, match=r"allocator=of_my_own:Rul: of_my_own has no Rul; did you mean Rule\?"):
        registry.lookup("allocator", "of_my_own:Rul")
    with pytest.raises(ConfigError, match="is a int; it must be a class or function"):
        registry.lookup("allocator", "of_my_own:value")
    with pytest.raises(ConfigError, match="module nowhere_at_all cannot be imported: No module named"):
        registry.lookup("allocator", "nowhere_at_all:Rule")


def test_an_entry_point_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("theirs", "collections:OrderedDict", "fedlp.score")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "fedlp.score" else [])
    assert registry.lookup("score", "theirs").__name__ == "OrderedDict"
    assert "theirs" in registry.names("score")


def test_an_unknown_name_gets_the_close_ones() -> None:
    registry.register("score", "wandering")(dict)
    with pytest.raises(ConfigError, match="there is no score wanderin; did you mean wandering"):
        registry.lookup("score", "wanderin")
    with pytest.raises(ConfigError, match="there is no kind of part 'scores'"):
        registry.lookup("scores", "wanda")


def test_options_are_the_signature() -> None:
    def build(width: int, depth=2, *, num_classes: int = 10) -> None: ...  # type: ignore[no-untyped-def]

    found = registry.options("model", build)
    assert list(found) == ["width", "depth"]
    assert found["width"].annotation is int
    assert found["depth"].default == 2
