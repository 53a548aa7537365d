"""Texts from outside are shown in one short line that no terminal obeys."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlp.errors import printable
from fedlp.federation.flower_compat import become_server
from fedlp.federation.server.exchange import reason_of


@given(st.text(st.characters()), st.integers(1, 300))
def test_whatever_comes_is_one_short_printable_line(text: str, most: int) -> None:
    shown = printable(text, most)
    assert shown.isprintable()
    assert len(shown) <= most + 3
    shown.encode()


def test_what_is_harmless_stays() -> None:
    assert printable(" RuntimeError: Größe 3\nand more") == "RuntimeError: Größe 3"
    assert printable("\x1b[31mred\u202e") == "?[31mred?"
    assert printable("x" * 10**7) == "x" * 200 + "..."


@pytest.mark.parametrize("reason", ["", " ", "\n", "\r\n \t", "\x0b\x0c", "\u2028"])
def test_an_error_without_a_reason_says_so(reason: str) -> None:
    become_server()
    reply = Message(Error(2, reason), reply_to=Message(RecordDict(), 1, "train"))
    assert reason_of(reply) == "no reason given"
