"""CPython's documentation topics, embedded in the interpreter; their wording follows its version."""

from __future__ import annotations

from dataclasses import dataclass

from fedlp.data.text import LanguageData
from fedlp.registry import register


@register("dataset", "topics")
@dataclass(frozen=True, kw_only=True)
class Topics(LanguageData):
    """CPython's documentation topics (pydoc), one document a topic: embedded, needs no network."""

    name = "topics"

    def read_documents(self) -> list[str]:
        """Return the topics in the order of their names."""
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
