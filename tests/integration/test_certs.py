"""``fedlp-certs`` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlp import cli
from tests.integration.running import Call, assert_refused


def test_it_names_what_goes_where(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("keys", "--host", "superlink.example", "--supernodes", "2", main=cli.certs_main)
    assert code == 0
    assert "SuperLink: keys/ca.crt keys/server.crt keys/server.key\n" in out
    assert "SuperNode: keys/ca.crt keys/supernodes/supernode-1 " in out
    named = {word for word in out.split() if word.startswith("keys/")}
    assert named == {str(path.relative_to(tmp_path)) for path in (tmp_path / "keys").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("keys", "--host", "a b"), "neither a host name"),
        (("keys", "--supernodes", "0"), "supernodes=0"),
        (("keys", "--supernodes", "many"), "invalid int"),
        ((), "required: DIR"),
        (("file/keys",), "Not a directory"),
    ],
)
def test_bad_input_is_one_line(call: Call, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "file").touch()
    assert_refused(call(*arguments, main=cli.certs_main), words)


def test_a_second_time_is_refused(call: Call) -> None:
    assert call("keys", main=cli.certs_main)[0] == 0
    assert_refused(call("keys", main=cli.certs_main), r"keys/ca\.key is there already")
