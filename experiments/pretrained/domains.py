"""Text of several domains, spread over clients: ``dataset=experiments.pretrained.domains:Domains``."""

from __future__ import annotations

import asyncio
import pydoc_data.topics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fedlp.data.examples import Examples, FederatedData
from fedlp.data.text import LanguageData
from fedlp.data.tokenizers import encode_texts
from fedlp.errors import DataError

LICENCES = Path("/usr/share/common-licenses")


@dataclass(frozen=True, kw_only=True)
class Domains(LanguageData):
    """Windows of several texts, one domain each; a client has a home domain.

    Attributes
    ----------
    files : list of str
        One text file per domain. The first 80 % are for training.
    homes : list of int
        Home domain of each client.
    correlation : float
        Probability that a window of a client is of its home domain, in [0, 1]; else its domain is uniform.
    windows : int
        Training windows of each client. They overlap between clients where a text is too short.
    test_windows : int
        Test windows of each domain.
    """

    files: list[str] = field(default_factory=list)
    homes: list[int] = field(default_factory=list)
    correlation: float = 1.0
    windows: int = 24
    test_windows: int = 16

    name = "text"

    def read_documents(self) -> list[str]:
        """Return the texts."""
        return [Path(file).read_text(encoding="utf-8") for file in self.files]

    def load(self, seed: int) -> FederatedData:
        """Return each client's windows, whose owner it is, and the same test windows for every correlation."""
        length = self.sequence_length
        rows = [_windows(ids, length) for ids in encode_texts(self.read_documents(), self.tokenizer)]
        cuts = [int(0.8 * len(row)) for row in rows]
        if min(len(row) - cut for row, cut in zip(rows, cuts, strict=True)) < self.test_windows:
            raise DataError(
                f"a text of {self.files} has too few windows of {length} tokens; lower dataset.test_windows"
            )
        rng = np.random.default_rng([seed, 7])
        orders = [rng.permutation(cut) for cut in cuts]
        used = [0] * len(rows)
        train: list[np.ndarray] = []
        for home in self.homes:
            own = rng.random(self.windows) < self.correlation
            for domain in np.where(own, home, rng.integers(len(rows), size=self.windows)):
                train.append(rows[domain][orders[domain][used[domain] % cuts[domain]]])
                used[domain] += 1
        step = [
            np.linspace(cut, len(row) - 1, self.test_windows).astype(int) for row, cut in zip(rows, cuts, strict=True)
        ]
        test = [row[index] for row, index in zip(rows, step, strict=True)]
        owners = np.repeat(np.arange(len(self.homes)), self.windows)
        domains = np.repeat(np.arange(len(rows)), self.test_windows)
        return FederatedData(
            self.describe(), _examples(np.stack(train), owners), _examples(np.concatenate(test), domains)
        )


def _windows(ids: np.ndarray, length: int) -> np.ndarray:
    """Return windows of ``length + 1`` tokens, each one token into the next; a remainder is left out."""
    count = (len(ids) - 1) // length
    return np.asarray(ids, dtype=np.int64)[np.arange(count)[:, None] * length + np.arange(length + 1)]


def _examples(windows: np.ndarray, owners: np.ndarray) -> Examples:
    return Examples(torch.from_numpy(windows), torch.from_numpy(owners), owners)


def write_texts(folder: Path, wiki: Path) -> list[Path]:
    """Write four texts, 200,000 characters at most each, and return their files.

    WikiText-2 (``wiki``), the language reference and the code of asyncio of this Python, and the licences that Debian
    ships; none of them was in the training of lm-3.3m or stories260K.
    """
    code = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    texts = {
        "wiki": wiki.read_text(encoding="utf-8"),
        "manual": "\n".join(pydoc_data.topics.topics.values()),
        "code": "\n".join(file.read_text(encoding="utf-8") for file in code),
        "licences": "\n".join(f.read_text(encoding="utf-8") for f in sorted(LICENCES.iterdir()) if not f.is_symlink()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in texts.items():
        files.append(folder / f"{name}.txt")
        files[-1].write_text(text[:200_000], encoding="utf-8")
    return files
