"""The file of API keys and the command that writes it."""

from __future__ import annotations

import stat
import sys
import time
from pathlib import Path

import pytest

from api import key_file, keys
from api.key_file import KeyFile
from common.errors import StartupError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["keys", *arguments])
    return keys.main()


def test_a_key_from_its_making_to_its_end(tmp_path: Path) -> None:
    """It opens under its name, nothing like it does, the file has no trace of it, and a revoked one is nobody's."""
    path = tmp_path / "sub" / "keys.json"
    ann, bob = keys.add(path, "ann"), keys.add(path, "bob")
    assert ann != bob
    assert ann.startswith("sk-")
    assert len(ann) > 50
    held = key_file.read(path)
    assert [key.name for key in held.keys] == ["ann", "bob"]
    assert (held.name_of(ann), held.name_of(bob)) == ("ann", "bob")
    assert {held.name_of(other) for other in (ann[:-1], ann + "x", "", "é", held.keys[0].sha256)} == {None}
    assert ann not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys.revoke(path, "ann")
    assert (key_file.read(path).name_of(ann), key_file.read(path).name_of(bob)) == (None, "bob")
    assert [each.name for each in path.parent.iterdir()] == ["keys.json"]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key is printed once, when it is made; the file is found by its setting or its flag."""
    monkeypatch.setenv("MLXPOOL_API_KEYS_FILE", str(tmp_path / "keys"))
    assert run(monkeypatch, "add", "ann") == 0
    secret = capsys.readouterr().out.strip()
    assert key_file.read(tmp_path / "keys").name_of(secret) == "ann"
    assert run(monkeypatch, "--file", str(tmp_path / "keys"), "list") == 0
    listed = capsys.readouterr().out
    assert "ann" in listed
    assert secret not in listed
    assert run(monkeypatch, "revoke", "ann") == 0
    assert key_file.read(tmp_path / "keys").keys == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "ann"), "already"),
        (("add", " "), "needs a name"),
        (("add", "a\nb"), "needs a name"),
        (("revoke", "eve"), "no key of the name 'eve'"),
        (("--file", "nowhere", "list"), "does not exist"),
        (("--file", ".", "list"), "cannot be read"),
        (("--file", "/dev/null/x", "add", "a"), "cannot be written"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    """On standard error, with a status that says so, and nothing is changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXPOOL_API_KEYS_FILE", str(tmp_path / "keys"))
    keys.add(tmp_path / "keys", "ann")
    before = (tmp_path / "keys").read_bytes()
    assert run(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert sentence in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert (tmp_path / "keys").read_bytes() == before


def test_no_file_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says how to name one."""
    monkeypatch.delenv("MLXPOOL_API_KEYS_FILE", raising=False)
    assert run(monkeypatch, "list") == 1
    assert "MLXPOOL_API_KEYS_FILE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "x", "[]", '{"keys": 5}', '{"keys": [{"name": "a"}]}', "\xff"])
def test_what_is_no_key_file(tmp_path: Path, text: str) -> None:
    """It is refused when the API starts, in a sentence."""
    path = tmp_path / "keys"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StartupError, match="no file of API keys"):
        KeyFile(path)


def test_a_running_api_sees_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a second; a file that breaks or goes away leaves the last good keys in force."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = tmp_path / "keys"
    ann = keys.add(path, "ann")
    file = KeyFile(path)
    bob = keys.add(path, "bob")
    assert file.keys.name_of(bob) is None
    now[0] += 1.5
    assert file.keys.name_of(bob) == "bob"
    for breaking in (lambda: path.write_text("garbage"), path.unlink):
        breaking()
        now[0] += 1.5
        assert file.keys.name_of(ann) == "ann"
    keys.add(path, "eve")
    now[0] += 1.5
    assert file.keys.name_of(ann) is None
