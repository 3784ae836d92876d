"""Settings: parsing, errors, and the documents generated from them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import msgspec
import pytest

from common.errors import StartupError
from common.settings import (
    EMBEDDED_REDIS_URL,
    GROUPS,
    Settings,
    add_flags,
    describe,
    from_arguments,
    markdown,
)
from worker.__main__ import WorkerFlags

ROOT = Path(__file__).parents[3]


def test_defaults_without_variables() -> None:
    """Nothing set: loopback, the demo model and the embedded server."""
    settings = Settings.load({})
    assert settings == Settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8080, "demo")
    assert settings.redis_url == EMBEDDED_REDIS_URL


def test_variables_are_converted() -> None:
    """Text is converted to numbers and booleans; other programs' variables are ignored."""
    settings = Settings.load(
        {
            "MLXPOOL_PORT": "9000",
            "MLXPOOL_TRUST_REMOTE_CODE": "1",
            "MLXPOOL_LEASE_SECONDS": "2.5",
            "PORT": "x",
        }
    )
    assert (settings.port, settings.trust_remote_code, settings.lease_seconds) == (9000, True, 2.5)


def test_empty_variable_is_unset() -> None:
    """`MLXPOOL_PORT=`, such as in an env file, means the default."""
    assert Settings.load({"MLXPOOL_PORT": "", "MLXPOOL_ADAPTER_PATH": ""}) == Settings()


def test_overrides_win() -> None:
    """A flag takes precedence over the environment, unless it is not given."""
    settings = Settings.load({"MLXPOOL_PORT": "9000", "MLXPOOL_HOST": "::1"}, {"port": "9001", "host": None})
    assert (settings.port, settings.host) == (9001, "::1")


def test_unknown_variable_is_refused_with_a_hint() -> None:
    """A misspelled name is refused, and the closest name is suggested."""
    with pytest.raises(
        StartupError, match=r"MLXPOOL_PROT is not a setting of mlx-pool; did you mean MLXPOOL_PORT\?"
    ):
        Settings.load({"MLXPOOL_PROT": "1"})
    with pytest.raises(
        StartupError, match=r"MLXPOOL_ZZZ is not a setting of mlx-pool; docs/settings\.md lists all"
    ):
        Settings.load({"MLXPOOL_ZZZ": "1"})


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MLXPOOL_PORT", "0", "a whole number >= 1"),
        ("MLXPOOL_PORT", "70000", "a whole number <= 65535"),
        ("MLXPOOL_PORT", "http", "a whole number"),
        ("MLXPOOL_MAX_BATCH", "1.5", "a whole number"),
        ("MLXPOOL_LEASE_SECONDS", "soon", "a number"),
        ("MLXPOOL_CACHE_LIMIT_GB", "little", "a number"),
        ("MLXPOOL_CACHE_LIMIT_GB", "-1", "a number >= 0.0"),
        ("MLXPOOL_LOG_LEVEL", "LOUD", "DEBUG, INFO, WARNING or ERROR"),
        ("MLXPOOL_TRUST_REMOTE_CODE", "maybe", "true or false"),
    ],
)
def test_bad_value_is_refused(variable: str, value: str, expected: str) -> None:
    """The sentence names the variable, or the flag if one was given, what was expected and what was given."""
    name = variable.removeprefix("MLXPOOL_").lower()
    with pytest.raises(StartupError) as caught:
        Settings.load({variable: value})
    assert str(caught.value) == f"{variable} must be {expected}, not {value!r}"
    with pytest.raises(StartupError) as caught:
        Settings.load({}, {name: value})
    assert str(caught.value) == f"--{name.replace('_', '-')} must be {expected}, not {value!r}"


@pytest.mark.parametrize("name", Settings.__struct_fields__)
def test_errors_are_in_plain_words(name: str) -> None:
    """The error for every type of setting is free of Python type names."""
    for value in ("?", "-1", "-0.5", "0", "99999999999999999999"):
        try:
            Settings.load({}, {name: value})
        except StartupError as error:
            assert re.fullmatch(r"--[a-z-]+ must be [^`]+, not '[^']+'", str(error))  # noqa: PT017


def test_every_worker_setting_is_a_flag() -> None:
    """Every setting that a worker reads is a flag of `python -m worker`, as docs/settings.md states."""
    read = {
        name
        for path in (ROOT / "worker").glob("*.py")
        for name in re.findall(r"settings\.(\w+)", path.read_text())
    }
    parsed = vars(WorkerFlags("worker", "").parser.parse_args([]))
    assert read & set(Settings.__struct_fields__) <= set(parsed)
    assert "model_name" in parsed


def test_variables_are_upper_case() -> None:
    """`make up port=9000` is refused by every process."""
    with pytest.raises(StartupError, match=r"MLXPOOL_port is not a setting .* did you mean MLXPOOL_PORT\?"):
        Settings.load({"MLXPOOL_port": "9000"})


def test_to_environ_round_trip() -> None:
    """A child process with the variables of `to_environ` has the same settings."""
    settings = msgspec.structs.replace(
        Settings(), port=9000, trust_remote_code=True, cache_limit_gb=1.5, model="/a b/c", adapter_path="x"
    )
    assert Settings.load(settings.to_environ()) == settings
    assert Settings().to_environ() == {}


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("demo", None, "demo"),
        ("org/name", None, "org/name"),
        ("/models/Llama-1B/", None, "Llama-1B"),
        ("./Llama-1B", None, "Llama-1B"),
        ("/models/Llama-1B", "llama", "llama"),
    ],
)
def test_model_id(model: str, name: str | None, expected: str) -> None:
    """The id is as set, else the folder's name, else the model as it was given."""
    assert Settings(model=model, model_name=name).model_id == expected


def test_model_id_that_cannot_be_a_queue() -> None:
    """RQ's tools split queue names at commas: such an id is refused at startup."""
    with pytest.raises(StartupError, match="'a,b' cannot be a model id"):
        _ = Settings(model_name="a,b").model_id


def test_flags_are_settings() -> None:
    """`--max-batch 8 --trust-remote-code` gives the same settings as the variables."""
    parser = argparse.ArgumentParser()
    add_flags(parser, ["max_batch", "trust_remote_code", "model"])
    settings = from_arguments(parser.parse_args(["--max-batch", "8", "--trust-remote-code"]))
    assert (settings.max_batch, settings.trust_remote_code, settings.model) == (8, True, "demo")


def test_a_flag_turns_off_what_is_on() -> None:
    """A yes or no that is yes by default has a flag that begins with `--no-`."""
    parser = argparse.ArgumentParser()
    add_flags(parser, ["use_generation_config"])
    assert from_arguments(parser.parse_args([])).use_generation_config
    assert not from_arguments(parser.parse_args(["--no-use-generation-config"])).use_generation_config


def test_every_setting_is_described() -> None:
    """Every setting has a description for `--help` and docs/settings.md."""
    assert all(about for _, _, about in describe())


def test_groups() -> None:
    """Every group begins with a setting that exists, the first setting begins one."""
    fields = list(Settings.__struct_fields__)
    assert fields[0] in GROUPS
    assert list(GROUPS) == [field for field in fields if field in GROUPS]
    assert markdown().count("## ") == len(GROUPS) == len(set(GROUPS.values()))


def test_readme_table() -> None:
    """docs/settings.md is the output of `python -m common.settings`; the README's short table has existing settings only."""
    written = (ROOT / "docs" / "settings.md").read_text()
    assert markdown() in written, (
        "run `python -m common.settings` and put what it prints into docs/settings.md"
    )
    named = set(re.findall(r"MLXPOOL_[A-Z_]*[A-Z]", (ROOT / "README.md").read_text()))
    assert named <= {variable for variable, _, _ in describe()}
