"""What the rendering of a response needs to know of its request (`AnswerRecord.options`).

Written by `api.openai.responses.request`, read by `api.openai.responses.rendering`, perhaps days later and in another version:
new fields have defaults.
"""

from __future__ import annotations

from typing import Any

import msgspec


class ResponseOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """See the module.

    Attributes:
        echo: Fields of the response object that repeat the request; those that have their default value are left out.
        called: What a function of the model is to the client, by its name (`tools.CalledTool`).
        with_logprobs: Whether the client asked for log-probabilities.
        is_summarized: Whether the client asked for a summary of the reasoning: then the thoughts are given as one.
        is_encoded: Whether the client asked for the thoughts in a form that it can send back (`reasoning.encrypted_content`).
    """

    echo: dict[str, Any] = {}
    called: dict[str, list[Any]] = {}
    with_logprobs: bool = False
    is_summarized: bool = False
    is_encoded: bool = False

    @property
    def is_background(self) -> bool:
        """Whether the response is queued first, and generated without its client."""
        return bool(self.echo.get("background"))


DEFAULT_ECHO: dict[str, Any] = {
    "background": False,
    "frequency_penalty": 0.0,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
    "user": None,
}
"""The fields of `ResponseOptions.echo`, with the values that they have if the request does not say otherwise."""


def changed(echo: dict[str, Any]) -> dict[str, Any]:
    """The fields whose values are not the default."""
    return {name: value for name, value in echo.items() if value != DEFAULT_ECHO[name]}
