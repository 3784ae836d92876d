"""The file of API keys, and the command that writes it."""

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


def name_of(held: key_file.Keys, secret: str) -> str | None:
    key = held.find(secret)
    return None if key is None else key.name


def test_a_key_from_creation_to_revocation(tmp_path: Path) -> None:
    """It is found under its name, similar strings are not, the file does not contain it, and a revoked key is unknown."""
    path = tmp_path / "sub" / "keys.json"
    ann, bob = keys.add(path, "ann"), keys.add(path, "bob")
    assert ann != bob
    assert ann.startswith("sk-")
    assert len(ann) > 50
    held = key_file.read(path)
    assert [key.name for key in held.keys] == ["ann", "bob"]
    assert (name_of(held, ann), name_of(held, bob)) == ("ann", "bob")
    assert {name_of(held, other) for other in (ann[:-1], ann + "x", "", "é", held.keys[0].sha256)} == {None}
    assert ann not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    owner = held.keys[0].owner
    keys.revoke(path, "ann")
    assert (name_of(key_file.read(path), ann), name_of(key_file.read(path), bob)) == (None, "bob")
    assert [each.name for each in path.parent.iterdir()] == ["keys.json"]
    keys.add(path, "ann")
    assert (
        key_file.read(path).keys[-1].owner != owner
    )  # another key of the same name owns nothing of the first


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key is printed once, when it is created; the file is given by the setting or the flag."""
    monkeypatch.setenv("MLXPOOL_API_KEYS_FILE", str(tmp_path / "keys"))
    assert run(monkeypatch, "add", "ann") == 0
    secret = capsys.readouterr().out.strip()
    assert name_of(key_file.read(tmp_path / "keys"), secret) == "ann"
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
        (("add", " "), "needs a printable name"),
        (("add", "a\nb"), "needs a printable name"),
        (("revoke", "eve"), "no key named 'eve'"),
        (("--file", "nowhere", "list"), "does not exist"),
        (("--file", ".", "list"), "cannot be read"),
        (("--file", "/dev/null/x", "add", "a"), "cannot be written"),
    ],
)
def test_errors_of_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    """One sentence on standard error and exit status 1; the file is unchanged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXPOOL_API_KEYS_FILE", str(tmp_path / "keys"))
    keys.add(tmp_path / "keys", "ann")
    before = (tmp_path / "keys").read_bytes()
    assert run(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert sentence in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert (tmp_path / "keys").read_bytes() == before


def test_no_file_is_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says how to set one."""
    monkeypatch.delenv("MLXPOOL_API_KEYS_FILE", raising=False)
    assert run(monkeypatch, "list") == 1
    assert "MLXPOOL_API_KEYS_FILE" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "x", "[]", '{"keys": 5}', '{"keys": [{"name": "a"}]}', "\xff"])
def test_a_malformed_key_file(tmp_path: Path, text: str) -> None:
    """It is refused when the API starts, in one sentence."""
    path = tmp_path / "keys"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StartupError, match="not a file of API keys"):
        KeyFile(path)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, advanced by the test."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def test_a_running_api_applies_changes(tmp_path: Path, now: list[float]) -> None:
    """After a second and not earlier: the file is checked once a second. A file without keys refuses every key."""
    path = tmp_path / "keys"
    ann = keys.add(path, "ann")
    file = KeyFile(path)
    bob = keys.add(path, "bob")
    now[0] += 0.9
    assert name_of(file.keys, bob) is None
    now[0] += 0.1
    assert name_of(file.keys, bob) == "bob"
    keys.revoke(path, "bob")
    now[0] += 1
    assert (name_of(file.keys, ann), name_of(file.keys, bob)) == ("ann", None)
    keys.revoke(path, "ann")
    now[0] += 1
    assert {name_of(file.keys, each) for each in (ann, bob, "", key_file.PREFIX)} == {None}


@pytest.mark.parametrize("damage", ["garbled", "gone", "folder"])
def test_a_broken_file_leaves_the_last_good_keys(
    tmp_path: Path, now: list[float], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Logged once, without the file's content; when the file is readable again, its keys apply."""
    path = tmp_path / "keys"
    ann = keys.add(path, "ann")
    file = KeyFile(path)
    path.unlink()
    if damage == "garbled":
        path.write_text('{"keys": "swordfish"}')
    elif damage == "folder":
        path.mkdir()
    for _ in range(5):
        now[0] += 1
        assert name_of(file.keys, ann) == "ann"
    [record] = caplog.records
    assert "the 1 keys that were read before stay in force" in record.getMessage()
    assert "swordfish" not in record.getMessage()
    if damage == "folder":
        path.rmdir()
    path.unlink(missing_ok=True)
    eve = keys.add(path, "eve")
    now[0] += 1
    assert (name_of(file.keys, ann), name_of(file.keys, eve)) == (None, "eve")


def test_a_failed_read_is_repeated(tmp_path: Path, now: list[float]) -> None:
    """A read that failed for lack of a file descriptor is repeated, even if the file has not changed since."""
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
        assert name_of(file.keys, bob) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    now[0] += 1
    assert name_of(file.keys, bob) == "bob"


def in_a_child(act: Callable[[], bool]) -> bool:
    """The result of `act` in a forked process."""
    child = os.fork()
    if child == 0:
        os._exit(0 if act() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # Python 3.12 warns of a fork if the test runner has threads
def test_processes_share_the_last_good_keys(tmp_path: Path, now: list[float]) -> None:
    """A process that starts while the file is broken uses the keys that a sibling read last, not those of its parent."""
    path = tmp_path / "keys"
    ann, bob = keys.add(path, "ann"), keys.add(path, "bob")
    file = KeyFile(path)
    long = keys.add(path, "x" * 500)

    def sees(*names: str | None) -> bool:
        now[0] += 1
        return tuple(name_of(file.keys, secret) for secret in (ann, bob, long)) == names

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


def test_a_symbolic_link_is_kept(tmp_path: Path) -> None:
    """The file that it points to is replaced, not the link."""
    path, link = tmp_path / "keys", tmp_path / "link"
    keys.add(path, "a")
    link.symlink_to(path)
    keys.add(link, "b")
    assert link.is_symlink()
    assert [key.name for key in key_file.read(path).keys] == ["a", "b"]


def test_concurrent_commands(tmp_path: Path) -> None:
    """Eight `add` commands at once create eight keys; none is lost."""
    path = tmp_path / "keys"
    command = [sys.executable, "-m", "api.keys", "--file", str(path), "add"]
    running = [subprocess.Popen([*command, f"k{i}"], stdout=subprocess.PIPE) for i in range(8)]
    made = [process.communicate()[0].decode().strip() for process in running]
    held = key_file.read(path)
    assert [name_of(held, secret) for secret in made] == [f"k{i}" for i in range(8)]


@pytest.mark.parametrize("arguments", [("add", "a"), ("list",), ("revoke", "a")])
@pytest.mark.parametrize("text", ["sk-mlxpool-swordfish", '{"keys": "swordfish"}', '{"keys": [{"name": 1'])
def test_a_malformed_file_is_not_overwritten(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    text: str,
) -> None:
    """No command changes a malformed file or prints its content, which may be a key that someone pasted there."""
    path = tmp_path / "keys"
    path.write_text(text)
    assert run(monkeypatch, "--file", str(path), *arguments) == 1
    said = capsys.readouterr()
    assert "is not a file of API keys" in said.err
    assert "swordfish" not in said.err + said.out
    assert path.read_text() == text
