"""``fedlp.run``: what only the command does is refused, not ignored."""

from __future__ import annotations

import pytest

import fedlp
from fedlp.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hydra.run.dir=run", "does not read hydra.run.dir=run: drop it; the run directory is out=FOLDER"),
        ("hydra/launcher=joblib", "does not read hydra/launcher"),
        ("dry_run=true", "use the command fedlp dry_run=true"),
        ("resume=run", "use the command fedlp resume=run"),
        ("simulation=flower", "use the command fedlp simulation=flower"),
    ],
)
def test_what_only_the_command_does_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fedlp.run(["model=linear", override])
