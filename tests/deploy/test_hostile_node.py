"""A SuperNode whose owner changed the code of clients: over a real SuperLink it is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.bench import WHOLE, assert_is_the_others_model, bench_or_loopback

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found by /proc"),
]
# Imported by every Python of the hostile node at its start; changes what the client app sends.
SITECUSTOMIZE = """
import importlib.abc, importlib.util, sys
from dataclasses import replace


class Change(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "fedlp.federation.client.app":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def change(module):
            run(module)
            honest = module.messages.encode_update

            def hostile(update, *rest):
                value = 3e38 if update.server_round == 1 else float("nan")
                params = {name: tensor.fill_(value) for name, tensor in update.params.items()}
                return honest(replace(update, params=params), *rest)

            module.messages.encode_update = hostile

        spec.loader.exec_module = change
        return spec


sys.meta_path.insert(0, Change())
"""


def test_a_hostile_node_is_refused_by_name_and_changes_no_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "changed"
    code.mkdir()
    (code / "sitecustomize.py").write_text(SITECUSTOMIZE)
    with bench_or_loopback(folder) as made:
        made.start(0)
        with monkeypatch.context() as hostile:
            hostile.setenv("PYTHONPATH", str(code), prepend=":")
            made.start(1)
        done = made.run(tmp_path / "run", WHOLE)
        assert "has no attribute" not in (folder / "supernode-1.log").read_text()
    assert done.failures == [(1, 1, "rejected"), (2, 1, "rejected")]
    messages = [failure["message"] for line in done.rounds for failure in line["failures"]]
    assert all(text.startswith("client 1, round ") for text in messages), messages
    assert_is_the_others_model(done, tmp_path / "here", WHOLE)
