"""``fedlp new DIR``: a project of one's own that runs as it is: model, data, config and a test."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fedlp.errors import ConfigError, one_line

_FILES = {
    "README.md": "README.md.txt",
    "model.py": "model.py.txt",
    "data.py": "data.py.txt",
    "conf/experiment/run.yaml": "run.yaml.txt",
    "test_project.py": "test_project.py.txt",
    ".gitignore": None,
}
_IGNORED = "runs/\nmultirun/\n__pycache__/\n.pytest_cache/\n"


def new_project(words: list[str]) -> None:
    """Write a project into a new folder and say how to run it.

    Raises
    ------
    ConfigError
        If there is not one folder among the words, it holds something already, or it cannot be written.
    """
    if len(words) != 1 or words[0].startswith("-") or "=" in words[0]:
        raise ConfigError("fedlp new takes one folder, which it makes: fedlp new my_project")
    folder = Path(words[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty; choose another folder")
        for name, source in _FILES.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = _IGNORED if source is None else files("fedlp.cli").joinpath("project", source).read_text("utf-8")
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the project: {one_line(error)}") from error
    print(f"wrote {folder}: {' '.join(_FILES)}\nrun it:\n  cd {folder}")
    print("  fedlp --config-dir conf experiment=run model=model:Net dataset=data:load\n  pytest")
