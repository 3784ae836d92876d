"""Structured output: answers are validated by jsonschema, although the prompt asks for something else."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import openai
import pydantic

from tests.conformance import judge
from tests.conformance.server import CHAT, Answer, NotShown, Server, require

_MAX_TOKENS = 40
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sky": {"type": "string", "enum": ["clear", "grey"]}, "wet": {"type": "boolean"}},
    "required": ["sky", "wet"],
    "additionalProperties": False,
}


def _format(schema: dict[str, Any], *, strict: bool | None = True) -> dict[str, Any]:
    json_schema: dict[str, Any] = {"name": "answer", "schema": schema}
    return {
        "type": "json_schema",
        "json_schema": json_schema if strict is None else json_schema | {"strict": strict},
    }


def _ask(server: Server, schema: dict[str, Any] = _SCHEMA, **fields: Any) -> Answer:
    return server.once(CHAT, **{"max_tokens": _MAX_TOKENS, "response_format": _format(schema)} | fields)


def _validate(text: str, schema: dict[str, Any] = _SCHEMA) -> None:
    try:
        jsonschema.validate(json.loads(text), schema)
    except ValueError:
        raise NotShown(f"{text[:50]!r} is no JSON") from None
    except jsonschema.ValidationError as error:
        raise NotShown(f"{text[:50]!r} does not validate: {error.message[:60]}") from None


def json_object(server: Server, *, stream: bool) -> None:
    """An object that is not complete within so few tokens must be the beginning of one."""
    question = [{"role": "user", "content": 'Answer with JSON: {"a": 1}'}]
    fields = {"messages": question, "max_tokens": _MAX_TOKENS, "response_format": {"type": "json_object"}}
    answer = server.chat(**fields, stream=stream)
    text = "".join(answer.texts()) if stream else answer.text()
    require(text.lstrip().startswith("{"), f"the text is {text[:40]!r}")
    decoder = json.JSONDecoder()
    try:
        _, end = decoder.raw_decode(text.lstrip())
        require(not text.lstrip()[end:].strip(), f"something follows it: {text[-20:]!r}")
    except json.JSONDecodeError as error:
        require("Unterminated" in error.msg or error.pos >= len(text.strip()), f"{text[:50]!r} is no JSON")


def holds(server: Server, schema: str) -> None:
    asked = json.loads(schema)
    answer = _ask(server, asked)
    _validate(answer.text(), asked)
    require(
        answer.choice()["finish_reason"] == "stop", f"finish_reason is {answer.choice()['finish_reason']}"
    )


def hot(server: Server) -> None:
    fields = {"max_tokens": _MAX_TOKENS, "response_format": _format(_SCHEMA), "temperature": 2}
    for answer in server.concurrent_chats([fields | {"seed": seed} for seed in range(4)]):
        _validate(answer.text())


def stream_equals_plain(server: Server) -> None:
    fields = {"max_tokens": _MAX_TOKENS, "response_format": _format(_SCHEMA), "temperature": 1, "seed": 3}
    plain, stream = server.both(CHAT, **fields)
    _validate(plain.text())
    require("".join(stream.texts()) == plain.text(), f"{''.join(stream.texts())!r} is not {plain.text()!r}")


def each_choice(server: Server) -> None:
    answer = _ask(server, n=2, temperature=2)
    for index in range(2):
        _validate(answer.text(index))


def finishes(server: Server) -> None:
    answer = _ask(server)
    _validate(answer.text())
    require(
        answer.choice()["finish_reason"] == "stop", f"finish_reason is {answer.choice()['finish_reason']}"
    )


def is_cut(server: Server) -> None:
    answer = _ask(server, max_tokens=2)
    require(answer.text().lstrip()[:1] in ("{", ""), f"the text is {answer.text()!r}")
    require(
        answer.choice()["finish_reason"] == "length", f"finish_reason is {answer.choice()['finish_reason']}"
    )


def with_logprobs(server: Server) -> None:
    answer = _ask(server, logprobs=True, top_logprobs=1)
    _validate(answer.text())
    text = "".join(item["token"] for item in answer.choice()["logprobs"]["content"])
    require(text == answer.text(), f"{text!r} is not {answer.text()!r}")


def not_strict(server: Server) -> None:
    text = _ask(server, response_format=_format(_SCHEMA, strict=None)).text()
    try:
        json.loads(text)
    except ValueError:
        raise NotShown(f"{text[:50]!r} is no JSON") from None


def beside_others(server: Server) -> None:
    held: tuple[str, dict[str, Any]] = (
        CHAT,
        {"max_tokens": _MAX_TOKENS, "response_format": _format(_SCHEMA)},
    )
    free: tuple[str, dict[str, Any]] = (CHAT, {"max_tokens": 6})
    alone = server.post(*free).text()
    found = server.concurrently([held, free, held, free])
    require(
        [found[1].text(), found[3].text()] == [alone, alone], "the texts of unconstrained requests differ"
    )
    for index in (0, 2):
        _validate(found[index].text())


class _Weather(pydantic.BaseModel):
    sky: Literal["clear", "grey"]
    wet: bool


def sdk_parses(server: Server) -> None:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=server.key or "none", max_retries=0, timeout=server.left_seconds
    ) as client:
        try:
            answer = client.chat.completions.parse(
                model=server.model,
                messages=[{"role": "user", "content": "How is the sea?"}],
                response_format=_Weather,
                max_tokens=_MAX_TOKENS,
            )
        except (openai.OpenAIError, pydantic.ValidationError) as error:
            raise NotShown(f"{type(error).__name__}: {error}") from None
    require(
        isinstance(answer.choices[0].message.parsed, _Weather), f"it is {answer.choices[0].message.parsed!r}"
    )


def impossible(server: Server) -> None:
    schemas: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {"a": {"enum": []}},
            "required": ["a"],
            "additionalProperties": False,
        },
        {"type": "nothing"},
    ]
    for schema in schemas:
        for stream in (False, True):
            judge.check_error(_ask(server, schema, stream=stream), 400, param="response_format")
