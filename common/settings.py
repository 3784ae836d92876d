"""All settings of mlx-pool: one frozen object, read once at an entry point from the environment and flags.

A setting `name` is the variable `MLXPOOL_NAME` and, where a command has flags, `--name`. The table of docs/settings.md
is checked against this class by a test.
"""

from __future__ import annotations

import argparse
import difflib
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from common.errors import StartupError

PREFIX = "MLXPOOL_"
EMBEDDED_REDIS_URL = "redis://127.0.0.1:6399/0"
DEMO_MODEL = "demo"
"""The model that needs no hub: `--model demo`."""

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}

GROUPS = {
    "host": "API",
    "header_seconds": "HTTP limits",
    "sse_comment_seconds": "Streams",
    "request_seconds": "Queue and deadlines",
    "response_ttl_seconds": "Stored answers",
    "model": "Model",
    "max_batch": "Worker",
    "memory_limit_gb": "Memory of a worker",
    "lease_seconds": "Leases and recovery",
    "redis_url": "Redis",
    "cache_dir": "This machine",
}
"""The headings of docs/settings.md, by the first setting below each. A new setting belongs to the group it stands in."""


def _about(description: str, **constraints: Any) -> Meta:
    return Meta(description=description, **constraints)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The description of each field is also its text in `--help` and docs/settings.md."""

    host: Annotated[str, _about("address the API listens on", min_length=1)] = "127.0.0.1"
    port: Annotated[int, _about("port the API listens on", ge=1, le=65535)] = 8080
    api_processes: Annotated[int, _about("API processes under gunicorn", ge=1, le=64)] = 2
    api_keys_file: Annotated[
        str | None,
        _about("file of API keys, made by `python -m api.keys add NAME`; unset: no key is needed"),
    ] = None
    allow_unauthenticated: Annotated[bool, _about("let the API listen beyond loopback without API keys")] = (
        False
    )
    cors_origins: Annotated[
        str | None,
        _about(
            "web origins that may call, separated by commas, such as https://app.example or http://localhost:*; local for this "
            "machine's pages and desktop apps; * for any; unset: any with API keys, local without keys (docs/operations.md)"
        ),
    ] = None
    default_model: Annotated[
        str | None, _about("model of requests that name none; unset: the only one served")
    ] = None
    model_aliases: Annotated[
        str | None,
        _about(
            "other names of models, as alias=model pairs separated by commas; * in an alias matches any characters, such as "
            "claude-*=my-model (docs/operations.md)"
        ),
    ] = None
    thinking_budget: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        _about("tokens of reasoning before the answer, if a request sets no limit; unset: no limit"),
    ] = None
    strict_parameters: Annotated[bool, _about("answer 400 to unknown request fields")] = False

    header_seconds: Annotated[float, _about("time for a client to send the request headers", gt=0)] = 10.0
    body_seconds: Annotated[float, _about("time for a client to send the request body", gt=0)] = 60.0
    take_seconds: Annotated[
        float, _about("a client that does not read its response for this long is disconnected", gt=0)
    ] = 120.0
    max_body_bytes: Annotated[int, _about("largest request body", ge=1024, le=40 * 1024 * 1024)] = (
        10 * 1024 * 1024
    )

    sse_comment_seconds: Annotated[
        float, _about("silence in a stream before a comment line is sent", gt=0)
    ] = 10.0
    sse_header_seconds: Annotated[
        float, _about("how long the headers of a stream wait for its first event", gt=0)
    ] = 2.0
    stream_buffer_events: Annotated[
        int, _about("events buffered for a slow client; further ones are read from the journal", ge=16)
    ] = 1024

    sse_ids: Annotated[
        bool,
        _about(
            "number the frames of every stream (SSE id lines), not only of those that can be resumed; some clients fail on them"
        ),
    ] = False

    request_seconds: Annotated[
        float, _about("deadline of a request; the header X-Request-Timeout may shorten it", gt=0)
    ] = 1800.0
    queue_seconds: Annotated[int, _about("how long a request may wait in the queue", ge=1)] = 600
    max_queued_requests: Annotated[int, _about("requests that may wait for a model", ge=1)] = 512
    max_queued_tokens: Annotated[
        int, _about("estimated prompt and answer tokens that may wait for a model", ge=1)
    ] = 1_000_000

    response_ttl_seconds: Annotated[
        int, _about("how long a stored response is kept after its end", ge=1, le=30 * 24 * 3600)
    ] = 3600
    resumable_ttl_seconds: Annotated[
        int, _about("how long a resumable stream can be resumed after its end", ge=1, le=30 * 24 * 3600)
    ] = 600
    max_stored_mb: Annotated[
        int,
        _about("memory in Redis for stored responses and resumable streams; a full store answers 503", ge=1),
    ] = 256

    model: Annotated[
        str, _about("path, hub repository or 'demo'; for `make up` several, separated by spaces")
    ] = "demo"
    model_name: Annotated[
        str | None, _about("model id for clients; unset: derived from the model's path")
    ] = None
    adapter_path: Annotated[str | None, _about("LoRA adapter folder for the model")] = None
    chat_template: Annotated[str | None, _about("Jinja chat template, or a file that holds one")] = None
    chat_template_args: Annotated[
        str | None,
        _about(
            'arguments of the chat template as a JSON object, such as {"enable_thinking": false}; those of a request come first'
        ),
    ] = None
    use_generation_config: Annotated[
        bool, _about("apply the model's generation_config.json where a request is silent")
    ] = True
    use_default_chat_template: Annotated[bool, _about("use the tokenizer class's default chat template")] = (
        False
    )
    trust_remote_code: Annotated[bool, _about("run Python code that comes with the model")] = False

    max_batch: Annotated[int, _about("requests that a worker decodes together", ge=1, le=1024)] = 32
    prefill_step_tokens: Annotated[
        Annotated[int, Meta(ge=16)] | None,
        _about(
            "maximum number of prompt tokens prefilled between two decode steps; unset: measured at start on a GPU, else 2048"
        ),
    ] = None

    memory_limit_gb: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        _about(
            "memory that a worker may use; unset: a fair share of what MLX recommends for the GPU, or of 3/4 of main memory"
        ),
    ] = None
    prompt_cache_gb: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        _about("part of it for cached prefixes; unset: an eighth of the memory for KV caches"),
    ] = None
    cache_limit_gb: Annotated[Annotated[float, Meta(ge=0)] | None, _about("limit of MLX's buffer cache")] = (
        None
    )
    wired_limit: Annotated[
        bool, _about("wire the model's memory (Mac only; linked to panics, mlx #3186)")
    ] = False

    lease_seconds: Annotated[
        float, _about("other workers take over the jobs of a worker that is silent this long", ge=0.5)
    ] = 3.0
    stall_seconds: Annotated[
        float, _about("a worker exits if one step or prompt takes this long; others take over", ge=1)
    ] = 60.0
    max_takeovers: Annotated[int, _about("how often a job is taken over after its worker died", ge=0)] = 3
    orphan_seconds: Annotated[
        float, _about("generation stops if no API process has listened for this long", ge=1)
    ] = 10.0
    drain_seconds: Annotated[
        float, _about("on SIGTERM: time to finish jobs before they are requeued", ge=0)
    ] = 30.0

    redis_url: Annotated[str, _about("Redis or Valkey that all processes share", min_length=1)] = (
        EMBEDDED_REDIS_URL
    )
    journal_ttl_seconds: Annotated[int, _about("time to live of a journal after its last token", ge=10)] = 300
    result_ttl_seconds: Annotated[int, _about("time to live of a finished job in RQ", ge=1)] = 60
    failure_ttl_seconds: Annotated[int, _about("time to live of a failed job in RQ", ge=1)] = 3600

    cache_dir: Annotated[str | None, _about("folder of the demo model; unset: the user's cache folder")] = (
        None
    )
    state_dir: Annotated[
        str | None,
        _about(
            "folder of the embedded server's data and of the workers' memory claims; unset: the user's state folder"
        ),
    ] = None
    log_level: Annotated[LogLevel, _about("lowest level of messages that are logged")] = "INFO"

    @classmethod
    def load(
        cls, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
    ) -> Settings:
        """Read the environment (default: `os.environ`), then `overrides` such as flags, where None means not given.

        Raises:
            StartupError: A value is not of its type or range, or a variable with our prefix is unknown.
        """
        environ = os.environ if environ is None else environ
        fields = cls.__struct_fields__
        values: dict[str, Any] = {}
        for variable, text in environ.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in fields or variable != variable.upper():
                near = difflib.get_close_matches(name, fields, 1)
                hint = (
                    f"; did you mean {PREFIX}{near[0].upper()}?"
                    if near
                    else "; docs/settings.md lists all of them"
                )
                raise StartupError(f"{variable} is not a setting of mlx-pool{hint}")
            if text != "":
                values[name] = text
        flags = {k: v for k, v in (overrides or {}).items() if v is not None}
        values |= flags
        for name, value in values.items():
            _check(cls, name, value, _flag(name) if name in flags else PREFIX + name.upper())
        return msgspec.convert(values, cls, strict=False)

    @property
    def model_id(self) -> str:
        """The model's name for clients: as set, else its folder's name, else the repository or `demo`.

        Raises:
            StartupError: It cannot be the name of an RQ queue.
        """
        folder = pathlib.Path(self.model).expanduser()
        is_folder = self.model != DEMO_MODEL and (self.model.startswith((".", "/", "~")) or folder.is_dir())
        name = self.model_name or (folder.resolve().name if is_folder else self.model)
        if not name or "," in name or not name.isprintable() or name != name.strip():
            raise StartupError(
                f"{name!r} cannot be a model id: give one without commas with {PREFIX}MODEL_NAME"
            )
        return name

    def to_environ(self) -> dict[str, str]:
        """The settings that differ from the defaults, as variables for a child process."""
        changed = {k: v for k, v in msgspec.structs.asdict(self).items() if v != getattr(Settings(), k)}
        return {PREFIX + k.upper(): str(int(v) if isinstance(v, bool) else v) for k, v in changed.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(cls: type[Settings], name: str, value: Any, given_as: str) -> None:
    """Refuse a bad value in a sentence that names its variable or flag, what was expected and what was given."""
    try:
        msgspec.convert({name: value}, cls, strict=False)
    except msgspec.ValidationError as error:
        raise StartupError(f"{given_as} must be {_expected(name, str(error))}, not {value!r}") from None


def _expected(name: str, error: str) -> str:
    """An error of msgspec (0.22) in plain words, such as "Expected `int`, got `str` - at `$.port`"."""
    if name == "log_level":
        *others, last = get_args(LogLevel)
        return f"{', '.join(others)} or {last}"
    expected = error.split(" - at ", maxsplit=1)[0].removeprefix("Expected ").split(", got ", maxsplit=1)[0]
    kind, _, rest = expected.strip("`").replace(" | null", "").partition("`")
    return _KINDS[kind] + rest


def describe() -> list[tuple[str, str, str]]:
    """(variable, default as text, description) of every setting, in order."""
    rows = []
    for field in msgspec.structs.fields(Settings):
        meta = next(m for m in field.type.__metadata__ if isinstance(m, Meta))
        default = "" if field.default is None else str(field.default)
        rows.append((PREFIX + field.name.upper(), default, meta.description or ""))
    return rows


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add `--name VALUE` for each setting; a flag that is not given stays None.

    A yes or no has `--name` alone, or `--no-name` if it is yes by default.
    """
    for variable, default, description in describe():
        name = variable.removeprefix(PREFIX).lower()
        if name not in names:
            continue
        flag = _flag(name)
        text = description.replace("%", "%%") + (f" (default: {default})" if default else "")
        if default == "False":
            parser.add_argument(flag, action="store_const", const=True, default=None, help=text)
        elif default == "True":
            off = f"do not {description}"
            parser.add_argument(
                _flag(f"no_{name}"), dest=name, action="store_const", const=False, default=None, help=off
            )
        else:
            parser.add_argument(flag, metavar="VALUE", default=None, help=text)


def from_arguments(arguments: argparse.Namespace) -> Settings:
    """The settings of the environment, overridden by the flags that `add_flags` added to a parser.

    Raises:
        StartupError: As `Settings.load`.
    """
    return Settings.load(
        overrides={k: v for k, v in vars(arguments).items() if k in Settings.__struct_fields__}
    )


def markdown() -> str:
    """The groups and tables of docs/settings.md: `python -m common.settings` prints them."""
    lines: list[str] = []
    for variable, default, about in describe():
        if group := GROUPS.get(variable.removeprefix(PREFIX).lower()):
            lines += ["", f"## {group}", "", "| variable | default | what |", "| --- | --- | --- |"]
        lines.append(f"| `{variable}` | {f'`{default}`' if default else ''} | {about} |")
    return "\n".join(lines[1:]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
