"""The file of API keys and the command that writes it."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from api import keys
from api.auth import key_file
from api.auth.key_file import KeyFile
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
    assert capsys.readouterr().out == "revoked ann\n"
    assert key_file.read(tmp_path / "keys").keys == []
    assert run(monkeypatch, "list") == 0
    assert capsys.readouterr().out == "no keys\n"


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


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that a test lets pass."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def test_a_running_api_sees_changes(tmp_path: Path, now: list[float]) -> None:
    """Within a second, and not before: the file is not looked at oftener. One without keys lets nobody in."""
    path = tmp_path / "keys"
    ann = keys.add(path, "ann")
    file = KeyFile(path)
    bob = keys.add(path, "bob")
    now[0] += 0.9
    assert file.keys.name_of(bob) is None
    now[0] += 0.1
    assert file.keys.name_of(bob) == "bob"
    keys.revoke(path, "bob")
    now[0] += 1
    assert (file.keys.name_of(ann), file.keys.name_of(bob)) == ("ann", None)
    keys.revoke(path, "ann")
    now[0] += 1
    assert {file.keys.name_of(each) for each in (ann, bob, "", key_file.PREFIX)} == {None}


@pytest.mark.parametrize("harm", ["garbled", "gone", "folder"])
def test_a_broken_file_leaves_the_last_good_keys(
    tmp_path: Path, now: list[float], caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    """Said once in the log, without what is in it; when it can be read again, it counts again."""
    path = tmp_path / "keys"
    ann = keys.add(path, "ann")
    file = KeyFile(path)
    path.unlink()
    if harm == "garbled":
        path.write_text('{"keys": "swordfish"}')
    elif harm == "folder":
        path.mkdir()
    for _ in range(5):
        now[0] += 1
        assert file.keys.name_of(ann) == "ann"
    [record] = caplog.records
    assert "the 1 keys read before stay" in record.getMessage()
    assert "swordfish" not in record.getMessage()
    if harm == "folder":
        path.rmdir()
    path.unlink(missing_ok=True)
    eve = keys.add(path, "eve")
    now[0] += 1
    assert (file.keys.name_of(ann), file.keys.name_of(eve)) == (None, "eve")


def test_an_unreadable_moment_is_no_change(tmp_path: Path, now: list[float]) -> None:
    """What failed once, for want of a free descriptor, is tried again, also when the file is the same as before."""
    path = tmp_path / "keys"
    keys.add(path, "ann")
    file = KeyFile(path)
    bob = keys.add(path, "bob")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(path, os.O_RDONLY)
    os.close(probe)
    now[0] += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    try:
        assert file.keys.name_of(bob) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    now[0] += 1
    assert file.keys.name_of(bob) == "bob"


def in_a_child(act: Callable[[], bool]) -> bool:
    """What `act` says in a process that is forked here."""
    child = os.fork()
    if child == 0:
        os._exit(0 if act() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # of Python 3.12, where a test runner has threads
def test_processes_share_the_last_good_keys(tmp_path: Path, now: list[float]) -> None:
    """One that starts beside a broken file lets in whom its sibling last let in, not who was revoked since the parent read."""
    path = tmp_path / "keys"
    ann, bob = keys.add(path, "ann"), keys.add(path, "bob")
    file = KeyFile(path)
    long = keys.add(path, "x" * 500)

    def sees(*names: str | None) -> bool:
        now[0] += 1
        return tuple(map(file.keys.name_of, (ann, bob, long))) == names

    assert in_a_child(lambda: sees("ann", "bob", "x" * 500))
    keys.revoke(path, "x" * 500)
    keys.revoke(path, "bob")
    assert in_a_child(lambda: sees("ann", None, None))
    path.write_text("garbage")
    assert in_a_child(lambda: sees("ann", None, None))
    assert sees("ann", None, None)
    os.truncate(file._last_good, 5)
    now[0] += 1
    assert sees(None, None, None)


def test_a_link_stays_one(tmp_path: Path) -> None:
    """What is replaced is the file that it leads to."""
    path, link = tmp_path / "keys", tmp_path / "link"
    keys.add(path, "a")
    link.symlink_to(path)
    keys.add(link, "b")
    assert link.is_symlink()
    assert [key.name for key in key_file.read(path).keys] == ["a", "b"]


def test_commands_at_once(tmp_path: Path) -> None:
    """Eight that start together make eight keys: none is lost, and no revoked one comes back."""
    path = tmp_path / "keys"
    command = [sys.executable, "-m", "api.keys", "--file", str(path), "add"]
    running = [subprocess.Popen([*command, f"k{i}"], stdout=subprocess.PIPE) for i in range(8)]
    made = [process.communicate()[0].decode().strip() for process in running]
    held = key_file.read(path)
    assert [held.name_of(secret) for secret in made] == [f"k{i}" for i in range(8)]


@pytest.mark.parametrize("arguments", [("add", "a"), ("list",), ("revoke", "a")])
@pytest.mark.parametrize("text", ["sk-mlxpool-swordfish", '{"keys": "swordfish"}', '{"keys": [{"name": 1'])
def test_a_garbled_file_is_not_written_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    text: str,
) -> None:
    """No command touches what it does not understand, or repeats what is in it: it may be a key, put there by hand."""
    path = tmp_path / "keys"
    path.write_text(text)
    assert run(monkeypatch, "--file", str(path), *arguments) == 1
    said = capsys.readouterr()
    assert "is no file of API keys" in said.err
    assert "swordfish" not in said.err + said.out
    assert path.read_text() == text
