"""instructor: a typed answer in its modes, complete and streamed."""

from __future__ import annotations

from typing import Any

import instructor
import openai
from cases import CITY_QUESTION, KEY, MAX_FORM_TOKENS, City, refused, run, user


def client(url: str, mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(
        openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120), mode=mode
    )


def asked(model: str) -> Any:
    return {
        "model": model,
        "messages": user(CITY_QUESTION),
        "response_model": City,
        "temperature": 0,
        "max_tokens": MAX_FORM_TOKENS,
        "max_retries": 0,
    }


def created(url: str, model: str, mode: instructor.Mode) -> Any:
    parsed, completion = client(url, mode).create_with_completion(**asked(model))
    return {
        "parsed": parsed.model_dump(),
        "finish_reason": completion.choices[0].finish_reason,
        "usage": completion.usage.model_dump(),
    }


def json_schema(url: str, model: str) -> Any:
    return created(url, model, instructor.Mode.JSON_SCHEMA)


def tools(url: str, model: str) -> Any:
    return created(url, model, instructor.Mode.TOOLS)


def tools_strict(url: str, model: str) -> Any:
    return created(url, model, instructor.Mode.TOOLS_STRICT)


def partial(url: str, model: str) -> Any:
    """Streamed: the growing object, by mode."""
    answers = {}
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        growing = list(client(url, mode).create_partial(**asked(model)))
        answers[mode.name] = {"num": len(growing), "last": growing[-1].model_dump()}
    return answers


def unknown_model(url: str, _model: str) -> Any:
    mode = instructor.Mode.TOOLS
    return refused(lambda: client(url, mode).create(**asked("no-such-model")))


if __name__ == "__main__":
    run(json_schema, tools, tools_strict, partial, unknown_model)
