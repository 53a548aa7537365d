"""The README's example of the public API, as it stands there: in a script, which is quiet, and in a notebook."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def example() -> str:
    """Return the code block of the README that simulates."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if "fedlp.simulate(" in block]
    return found


@pytest.mark.slow
def test_in_a_script_it_prints_its_table_alone(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(example())
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "accuracy" in done.stdout
    assert "round 1/" not in done.stdout
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's packages against each other
def test_in_a_notebook_it_shows_a_bar(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(code) for code in (example(), "result.model()")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = dict.fromkeys(("stdout", "stderr"), "")
    for output in notebook.cells[0].outputs:
        if output.output_type == "stream":
            said[output.name] += output.text
    assert said["stderr"] == ""
    assert len(re.findall(r"\[#{20}\]  round (\d+)/\1  accuracy [\d.]+", said["stdout"])) == 1
    (shown,) = notebook.cells[1].outputs
    assert shown.data["text/plain"].startswith("Sequential(")
