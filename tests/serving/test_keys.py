"""API keys: hashed in files, compared in full, weak or plain ones refused, admin keys apart."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steerwell.apps.cli.keys import app
from steerwell.core.errors import ArgumentError
from steerwell.serving import keys as module
from steerwell.serving.keys import Keys, add_key, load_keys, new_key

PLAIN = "a-key-of-twenty-and-more"
OTHER = "another-key-of-twenty-and-more"


def test_a_new_key_opens_and_its_line_does_not_hold_it(tmp_path: Path) -> None:
    key, line = new_key("alice")
    assert re.fullmatch(r"sw-[\w-]{43}", key)
    assert line == f"alice {hashlib.sha256(key.encode()).hexdigest()}"
    assert key != new_key("alice")[0]
    (tmp_path / "keys.txt").write_text(f"# who may ask\n\n{line}  # since May\n")
    keys = Keys.from_file(tmp_path / "keys.txt")
    assert keys.name_of(key) == "alice"
    assert key not in repr(keys)


@pytest.mark.parametrize("presented", [None, "", PLAIN[:-1], f"{PLAIN} ", PLAIN.upper(), "clé", "\udcff", "\x00"])
def test_what_is_no_key_opens_nothing(presented: str | None) -> None:
    assert Keys.of({"alice": PLAIN}).name_of(presented) is None
    assert Keys().name_of(presented) is None


def test_no_key_opens_nothing_even_where_its_hash_is_listed() -> None:
    assert Keys((("nobody", hashlib.sha256(b"").digest()),)).name_of("") is None


def test_every_entry_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(module, "hmac", type("Spy", (), {"compare_digest": staticmethod(compare)}))
    keys = Keys.of({"first": PLAIN, "second": OTHER, "third": PLAIN + OTHER})
    assert [keys.name_of(key) for key in (PLAIN, OTHER, "none of them, but long")] == ["first", "second", None]
    assert compared == [digest for _, digest in keys.hashes] * 3


@pytest.mark.parametrize("key", ["", "short", "x" * 19, "a key of twenty letters", f"{PLAIN}\n", "clé" * 10])
def test_weak_keys_are_refused(key: str) -> None:
    with pytest.raises(ArgumentError, match=r"STEERWELL_API_KEY: got a key of .*steerwell keys new NAME"):
        load_keys(None, None, {"STEERWELL_API_KEY": key})


def test_keys_come_from_files_and_environment(tmp_path: Path) -> None:
    alice, root = add_key("alice", tmp_path / "keys.txt"), add_key("root", tmp_path / "admin.txt")
    environ = {"STEERWELL_API_KEY": PLAIN, "STEERWELL_ADMIN_KEY": OTHER}
    clients, admins = load_keys(tmp_path / "keys.txt", tmp_path / "admin.txt", environ)
    names = [[keys.name_of(key) for key in (alice, PLAIN, root, OTHER)] for keys in (clients, admins)]
    assert names == [["alice", "STEERWELL_API_KEY", None, None], [None, None, "root", "STEERWELL_ADMIN_KEY"]]
    assert [bool(keys) for keys in load_keys(None, None, {})] == [False, False]


def test_one_key_cannot_be_both_a_clients_and_an_admins() -> None:
    environ = {"STEERWELL_API_KEY": PLAIN, "STEERWELL_ADMIN_KEY": PLAIN}
    with pytest.raises(ArgumentError, match="STEERWELL_ADMIN_KEY and STEERWELL_API_KEY are one key"):
        load_keys(None, None, environ)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "holds no key, so nobody could come in"),
        ("# nobody yet\n", "holds no key"),
        (f"alice {PLAIN}\n", "line 1: expected 'name sha256-hex'"),
        (f"{PLAIN}\n", "line 1"),
        (f"# one\nalice {'0' * 63}\n", "line 2"),
        (f"a/b {'0' * 64}\n", "line 1"),
        (f"alice {'0' * 64}\nalice {'1' * 64}\n", "line 2: 'alice' is there already"),
    ],
)
def test_a_wrong_file_is_refused_and_not_quoted(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(text)
    with pytest.raises(ArgumentError, match=fault) as raised:
        Keys.from_file(file)
    assert PLAIN not in str(raised.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"cannot be read: .*steerwell keys new NAME --file .*none\.txt"):
        Keys.from_file(tmp_path / "none.txt")


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o640, 0), (0o644, 1), (0o660, 1), (0o602, 1)])
def test_a_file_that_is_open_to_others_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: int
) -> None:
    file = tmp_path / "keys.txt"
    add_key("alice", file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        Keys.from_file(file)
    assert [f"chmod 600 {file}" in record.getMessage() for record in caplog.records] == [True] * warned


def test_the_command_prints_a_key_once_and_appends_its_hash(tmp_path: Path) -> None:
    file, runner = tmp_path / "keys.txt", CliRunner()
    made = [runner.invoke(app, ["new", "alice", "--file", str(file)])]
    file.write_text(file.read_text().removesuffix("\n"))  # an editor may leave no newline at the end
    made.append(runner.invoke(app, ["new", "bob", "--file", str(file), "--json"]))
    assert [result.exit_code for result in made] == [0, 0]
    alice, told = made[0].stdout.strip(), json.loads(made[1].stdout)
    keys = Keys.from_file(file)
    assert [keys.name_of(alice), keys.name_of(told["key"])] == ["alice", "bob"]
    assert not [key for key in (alice, told["key"]) if key in file.read_text()]
    again = runner.invoke(app, ["new", "alice", "--file", str(file)])
    assert isinstance(again.exception, ArgumentError)
    assert "'alice' is in" in str(again.exception)
    assert len(Keys.from_file(file).hashes) == 2


@pytest.mark.parametrize("name", ["", "two words", "line\nbreak", "../up", "x" * 65, "#not"])
def test_a_name_is_one_word(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match="expected 1 to 64 letters"):
        add_key(name, tmp_path / "keys.txt")
    assert not (tmp_path / "keys.txt").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be written"):
        add_key("alice", tmp_path / "none" / "keys.txt")
