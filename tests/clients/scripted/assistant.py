"""The script for SDKs and frameworks: a call of `get_weather`, an answer with its result, a typed object, or one sentence.

What a request offers decides: an output tool and a grammar want an object, `get_weather` is called once. Pure.
"""

from __future__ import annotations

import json
from typing import Any, Final

from tests.clients.scripted.conversation import Answer, Call, Conversation, MadeCall, ScriptError

SENTENCE: Final = "The capital of France is Paris."
WEATHER: Final = {"city": "Paris", "unit": "celsius"}
CITY: Final[dict[str, Any]] = {
    "name": "Paris",
    "continent": "Europe",
    "is_capital": True,
    "districts": [1, 20],
}
REPORT: Final = "In Paris: "
_OUTPUT_TOOL: Final = "final_result"
"""pydantic-ai's name of the function whose arguments are the typed answer."""


def answer(conversation: Conversation) -> Answer:
    """The script; see the module.

    Raises:
        ScriptError: A call came back changed.
    """
    made = conversation.calls
    if "get_weather" in conversation.functions and not made:
        return Answer("call", "", [Call("get_weather", WEATHER)])
    if any(each.call != Call("get_weather", WEATHER) for each in made):
        raise ScriptError(f"the calls came back as {made}")
    return _final_answer(conversation, made)


def _final_answer(conversation: Conversation, made: list[MadeCall]) -> Answer:
    if _OUTPUT_TOOL in conversation.functions:
        return Answer("object", "", [Call(_OUTPUT_TOOL, CITY)])
    if conversation.has_grammar:
        return Answer("object", json.dumps(CITY))
    return Answer("text", f"{REPORT}{made[-1].result}" if made else SENTENCE)
